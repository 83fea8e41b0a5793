"""An experiment whose data is found and whose identity is known."""

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pydantic import ValidationError

from schemas.base import explain
from schemas.data import ClassIncremental, Task
from schemas.errors import InputError, did_you_mean
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
    """An experiment whose data is found and whose identity is known; its stages are spelt out.

    weights: digest of the initial model's; contents: digest of what lies at each location (see `Experiment.identity`).
    """

    experiment: Experiment
    tasks: tuple[TaskFolder, ...]
    reference: ReferenceSet | None
    weights: str
    contents: Mapping[str, str]
    fingerprint: str

    @property
    def custom_loss_digests(self) -> dict[str, str]:
        """The beginning of the digest of each further loss's code, by the name under which results record it."""
        losses = self.experiment.method.further_losses
        return {f"code of {loss.path}": self.contents[loss.path][:8] for loss in losses}


def resolve(experiment: Experiment) -> ResolvedExperiment:
    """Find all that the experiment names, and cut the stages of class-incremental learning.

    Raises:
        InputError: a task, shard, template, caption, model or further loss is missing or broken.
    """
    cache = experiment.compute.shard_cache
    experiment, tasks, folders = resolve_tasks(experiment)
    used = experiment.reference if experiment.method.needs_reference else None
    opened = ReferenceSet(used, cache) if used else None
    if experiment.method.memory:
        check_budget(experiment.method.memory.budget, tasks)
        for remembered in tasks[:-1]:
            if not isinstance(remembered.train, IndexedSamples):
                raise InputError(
                    f"{remembered.path}: found remote shards, expected local ones to keep exemplars of "
                    "(method.memory); compute.shard_cache makes them local"
                )
    weights = weights_digest(experiment.model)
    contents = {path: folder.digest for path, folder in folders.items()} | {experiment.model.name: weights}
    contents |= {loss.path: custom_losses.code_digest(loss) for loss in experiment.method.further_losses}
    if opened:
        contents["reference"] = opened.digest
    return ResolvedExperiment(experiment, tasks, opened, weights, contents, experiment.fingerprint(contents))


def resolve_tasks(experiment: Experiment) -> tuple[Experiment, tuple[TaskFolder, ...], dict[str, TaskFolder]]:
    """Find an experiment's tasks. Returns it with its stages spelt out, its tasks, and the folder at each path.

    Raises:
        InputError: a task, class name or template is missing or broken.
    """
    cache, scenario = experiment.compute.shard_cache, experiment.class_incremental
    held_out = experiment.evaluation.held_out
    folders: dict[str, TaskFolder] = {}
    if scenario is not None:
        whole = TaskFolder.open(Task(path=scenario.path, name="classes"), cache, held_out)
        template = scenario.template or whole.templates[0]
        folders[scenario.path] = replace(whole, templates=(template,))
        experiment = expand_class_incremental(experiment, scenario, folders[scenario.path])
    for task in experiment.tasks:
        if task.path not in folders:
            folders[task.path] = TaskFolder.open(task, cache, held_out)
    tasks = tuple(
        replace(folders[task.path].subset(task.classes, task.name), shots=task.shots, shots_seed=experiment.seed)
        for task in experiment.tasks
    )
    return experiment, tasks, folders


def expand_class_incremental(experiment: Experiment, scenario: ClassIncremental, whole: TaskFolder) -> Experiment:
    """Cut the dataset into the stages that a class-incremental experiment means.

    Raises:
        InputError: the dataset has fewer classes than the first stage, the class order does not fit it, or other
            stages are given.
    """
    order = class_order(scenario, whole)
    if scenario.first > len(order):
        raise InputError(f"class_incremental.first: found {scenario.first}, expected at most {len(order)} classes")
    borders = [0, *range(scenario.first, len(order), scenario.increment), len(order)]
    stages = []
    for start, stop in itertools.pairwise(borders):
        name, classes = f"classes-{start + 1}-{stop}", tuple(order[start:stop])
        images = whole.subset(classes, name).train
        assert isinstance(images, IndexedSamples)
        steps = math.ceil(scenario.epochs * len(images) / experiment.optimisation.batch_size)
        stages.append({"path": scenario.path, "name": name, "classes": classes, "steps": steps})
    try:
        spelt_out = Experiment.model_validate({**experiment.model_dump(), "tasks": stages})
    except ValidationError as error:
        raise InputError(explain(error)) from error
    if experiment.tasks not in ((), spelt_out.tasks):  # spelt out before, as the workers get it
        raise InputError(
            "tasks: found other stages than class_incremental cuts from its dataset, expected none: leave them out"
        )
    return spelt_out


def class_order(scenario: ClassIncremental, whole: TaskFolder) -> Sequence[int]:
    """The order in which classes are learnt: drawn from a seed, or read from a file of class names, or of labels.

    Class names may be numbers. They are labels only if the file has nothing but numbers, of which some are no names.

    Raises:
        InputError: the file does not name every class once.
    """
    count = len(whole.classnames)
    if isinstance(scenario.order, int):
        return random.Random(derive_seed(scenario.order, "class order")).sample(range(count), count)
    lines = read_lines(scenario.order, "class names or labels")
    names = {name: label for label, name in enumerate(whole.classnames)}
    labels = {str(label): label for label in range(count)}
    only_labels = all(map(str.isdecimal, lines)) and not names.keys() >= set(lines)
    labels = labels if only_labels else labels | names
    for number, line in enumerate(lines, start=1):
        if not only_labels and whole.classnames.count(line) > 1:
            raise InputError(
                f"{scenario.order}: found {line!r} on line {number}, the name of several classes of {whole.path}, "
                "expected their labels"
            )
        if line not in labels:
            raise InputError(
                f"{scenario.order}: found {line!r} on line {number}, expected the class names of {whole.path}, or "
                f"labels from 0 to {count - 1}, one a line{did_you_mean(line, whole.classnames)}"
            )
    found = [labels[line] for line in lines]
    if sorted(found) != list(range(count)):
        raise InputError(f"{scenario.order}: found {len(set(found))} classes, expected each of the {count} once")
    return found
