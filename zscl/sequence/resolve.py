"""Resolves an experiment: opens its data, splits a class-incremental dataset into tasks, computes the fingerprint."""

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pydantic import ValidationError

from schemas.base import input_error
from schemas.data import ClassIncremental, Task
from schemas.errors import ErrorCode, InputError, did_you_mean
from schemas.experiment import Experiment
from zscl.data.indexed import IndexedSamples
from zscl.data.reference_set import ReferenceSet
from zscl.data.task import TaskFolder, read_lines
from zscl.methods import custom_losses
from zscl.methods.exemplars import check_budget
from zscl.models.clip import weights_digest
from zscl.runtime.seeding import derive_seed


@dataclass(frozen=True)
class ResolvedExperiment:
    """An experiment with opened data and a fingerprint.

    Attributes:
        experiment: The experiment. A class-incremental dataset is split into one task per stage.
        tasks: The tasks in order.
        reference: The reference set; `None` if the method needs none.
        model_digest: Digest of the initial model's weights.
        content_digests: Digest of the content at each path, URL or model name (see `Experiment.identity`).
        fingerprint: Hash of the experiment and the content of all its inputs.
    """

    experiment: Experiment
    tasks: tuple[TaskFolder, ...]
    reference: ReferenceSet | None
    model_digest: str
    content_digests: Mapping[str, str]
    fingerprint: str

    @property
    def custom_loss_digests(self) -> dict[str, str]:
        """Map the name under which results record each custom loss to the first 8 digits of its code's hash."""
        losses = self.experiment.method.custom_losses
        return {f"code of {loss.path}": self.content_digests[loss.path][:8] for loss in losses}


def resolve(experiment: Experiment) -> ResolvedExperiment:
    """Open all inputs of an experiment, split a class-incremental dataset into tasks and compute the fingerprint.

    Args:
        experiment: The experiment.

    Returns:
        The resolved experiment.

    Raises:
        InputError: A task, shard, template, caption, model or custom loss is missing or broken.
    """
    cache = experiment.compute.shard_cache
    experiment, tasks, folders = resolve_tasks(experiment)
    settings = experiment.reference if experiment.method.needs_reference else None
    reference = ReferenceSet(settings, cache) if settings else None
    if experiment.method.memory:
        check_budget(experiment.method.memory.budget, tasks)
        for task in tasks[:-1]:
            if not isinstance(task.train, IndexedSamples):
                raise InputError(
                    f"{task.path}: found remote shards, expected local ones, because method.memory stores "
                    "exemplars of them; set compute.shard_cache to download them",
                    code=ErrorCode.UNSUPPORTED,
                    field="method.memory",
                )
    model_digest = weights_digest(experiment.model)
    digests = {path: folder.digest for path, folder in folders.items()} | {experiment.model.name: model_digest}
    digests |= {loss.path: custom_losses.code_digest(loss) for loss in experiment.method.custom_losses}
    if reference:
        digests["reference"] = reference.digest
    return ResolvedExperiment(experiment, tasks, reference, model_digest, digests, experiment.fingerprint(digests))


def resolve_tasks(experiment: Experiment) -> tuple[Experiment, tuple[TaskFolder, ...], dict[str, TaskFolder]]:
    """Open an experiment's tasks.

    Args:
        experiment: The experiment.

    Returns:
        The experiment, in which a class-incremental dataset is split into one task per stage; its tasks in order; and
        the opened folders by path.

    Raises:
        InputError: A task, class name or template is missing or broken.
    """
    cache, scenario = experiment.compute.shard_cache, experiment.class_incremental
    held_out = experiment.evaluation.held_out
    folders: dict[str, TaskFolder] = {}
    if scenario is not None:
        dataset = TaskFolder.open(Task(path=scenario.path, name="classes"), cache, held_out)
        template = scenario.template or dataset.templates[0]
        folders[scenario.path] = replace(dataset, templates=(template,))
        experiment = expand_class_incremental(experiment, scenario, folders[scenario.path])
    for task in experiment.tasks:
        if task.path not in folders:
            folders[task.path] = TaskFolder.open(task, cache, held_out)
    tasks = tuple(
        replace(folders[task.path].subset(task.classes, task.name), shots=task.shots, shots_seed=experiment.seed)
        for task in experiment.tasks
    )
    return experiment, tasks, folders


def expand_class_incremental(experiment: Experiment, scenario: ClassIncremental, dataset: TaskFolder) -> Experiment:
    """Split the dataset of a class-incremental experiment into one task per stage.

    Args:
        experiment: The experiment.
        scenario: The recipe's `class_incremental`.
        dataset: The dataset with all classes.

    Returns:
        The experiment with explicit tasks.

    Raises:
        InputError: The dataset has fewer classes than the first stage needs, the class order does not match the
            dataset, or the recipe also has other tasks.
    """
    order = class_order(scenario, dataset)
    if scenario.first > len(order):
        raise InputError(
            f"class_incremental.first: found {scenario.first}, expected at most {len(order)} classes",
            code=ErrorCode.INVALID_VALUE,
            field="class_incremental.first",
        )
    boundaries = [0, *range(scenario.first, len(order), scenario.increment), len(order)]
    tasks = []
    for start, stop in itertools.pairwise(boundaries):
        name, classes = f"classes-{start + 1}-{stop}", tuple(order[start:stop])
        images = dataset.subset(classes, name).train
        assert isinstance(images, IndexedSamples)
        steps = math.ceil(scenario.epochs * len(images) / experiment.optimisation.batch_size)
        tasks.append({"path": scenario.path, "name": name, "classes": classes, "steps": steps})
    try:
        expanded = Experiment.model_validate({**experiment.model_dump(), "tasks": tasks})
    except ValidationError as error:
        refusal = input_error(error)
        raise refusal from error
    if experiment.tasks not in ((), expanded.tasks):  # workers get the expanded experiment
        raise InputError(
            "tasks: class_incremental defines the tasks, expected no other tasks: remove them",
            code=ErrorCode.CONFLICT,
            field="tasks",
        )
    return expanded


def class_order(scenario: ClassIncremental, dataset: TaskFolder) -> Sequence[int]:
    """Return the order in which classes are learnt, from a seed or from a file of class names or labels.

    Class names may be numbers, as labels are. The lines of a file are read as labels only if all lines are numbers and
    some of them are not class names.

    Args:
        scenario: The recipe's `class_incremental`.
        dataset: The dataset with all classes.

    Returns:
        The labels of all classes in this order.

    Raises:
        InputError: The file does not name every class exactly once.
    """
    count = len(dataset.classnames)
    if isinstance(scenario.order, int):
        return random.Random(derive_seed(scenario.order, "class order")).sample(range(count), count)
    field = "class_incremental.order"
    lines = read_lines(scenario.order, "class names or labels")
    names = {name: label for label, name in enumerate(dataset.classnames)}
    labels = {str(label): label for label in range(count)}
    has_only_labels = all(map(str.isdecimal, lines)) and not names.keys() >= set(lines)
    labels = labels if has_only_labels else labels | names
    for number, line in enumerate(lines, start=1):
        if not has_only_labels and dataset.classnames.count(line) > 1:
            raise InputError(
                f"{scenario.order}: line {number}: {line!r} is the name of several classes of {dataset.path}; "
                "give labels (numbers) instead",
                code=ErrorCode.DUPLICATE,
                field=field,
            )
        if line not in labels:
            raise InputError(
                f"{scenario.order}: found {line!r} on line {number}, expected the class names of {dataset.path}, or "
                f"labels from 0 to {count - 1}, one per line{did_you_mean(line, dataset.classnames)}",
                code=ErrorCode.UNKNOWN_NAME,
                field=field,
            )
    order = [labels[line] for line in lines]
    if sorted(order) != list(range(count)):
        raise InputError(
            f"{scenario.order}: found {len(set(order))} classes, expected each of the {count} classes once",
            code=ErrorCode.MISMATCH,
            field=field,
        )
    return order
