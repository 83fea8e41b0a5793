"""Checks before a run starts (data, model, prompts, disk space, folder), and the plan of a run."""

import json
import shutil
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import lru_cache
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from orchestrate.lifecycle.paths import SEARCH, check_writable
from orchestrate.recipes.recipe import load_experiment, to_recipe
from schemas.compute import Compute, Savings
from schemas.errors import ErrorCode, InputError, format_count
from schemas.experiment import LOCAL_MODEL, Experiment, Model
from zscl.checks.prompts import prompt_warnings
from zscl.data.indexed import IndexedSamples
from zscl.data.sample import check_broken_share
from zscl.data.task import TaskFolder, describe_dotted_keys
from zscl.models.clip import load_clip, open_clip_name
from zscl.models.pruned_forward import PrunedForward, list_unpruned_towers
from zscl.sequence.layout import (
    ACCURACY,
    CHECKPOINT,
    EXPERIMENT,
    STAGES_FOLDER,
    STATE,
    ZERO_SHOT,
    glob_stages,
    partial_row_file,
    snapshots_folder,
    stage_folder,
    teacher_cache_folder,
)
from zscl.sequence.resolve import ResolvedExperiment, resolve
from zscl.sequence.result import OtherAlgorithmError, check_run_folder, check_same_run
from zscl.sequence.teacher import feature_policy
from zscl.training.snapshots import LAST_SNAPSHOT, SUFFIX

MAX_SAMPLES_LISTED = 3  # number of samples in a message
MAX_VALUE_LENGTH = 60  # characters of a value in a message
IGNORED_FIELDS = ("name", "compute.", "tracking.")  # these fields do not change the results
RUN_FILES = (EXPERIMENT, STATE, ZERO_SHOT, partial_row_file(Path(ZERO_SHOT)).name, STAGES_FOLDER, CHECKPOINT)


class ModelSummary(NamedTuple):
    """The size of an experiment's model, and the parts of the model that do not support `compute.savings`.

    Attributes:
        megabytes: Size of the model on disk, in float32.
        unpruned_towers: Names of the towers (image or text encoder) that do not support the optimisations of
            `compute.savings`.
    """

    megabytes: float
    unpruned_towers: tuple[str, ...]


def plan(resolved: ResolvedExperiment, folder: Path) -> dict[str, object]:
    """Describe what a run will do: its stages, images, steps, workers and disk space.

    Args:
        resolved: The experiment.
        folder: The run's folder.

    Returns:
        The plan, as `zscl run --dry-run` prints it.
    """
    experiment = resolved.experiment
    check_run_folder_is_same(resolved, folder)
    return {
        "warnings": collect_warnings(resolved),
        "fingerprint": resolved.fingerprint,
        "folder": str(folder),
        "finished_stages": len(glob_stages(folder, ACCURACY)),
        "stages": [task.name for task in resolved.tasks],
        "train_images": {task.name: _image_count(task.train) for task in resolved.tasks},
        "test_images": {task.name: _image_count(task.test) for task in resolved.tasks},
        "reference_images": _image_count(resolved.reference.images) if resolved.reference else 0,
        "reference_texts": len(resolved.reference.texts) if resolved.reference else 0,
        "steps": sum(map(experiment.stage_steps, experiment.tasks)),
        "images_through_student": count_student_images(experiment),
        "teacher_features": _feature_policies(resolved),
        "computed_in_full": list(_summarize_model(resolved).unpruned_towers),
        "workers": experiment.compute.workers,
        "megabytes_needed": round(megabytes_needed(resolved, folder)),
        "megabytes_free": round(megabytes_free(folder)),
    }


def check_run_folder_is_same(resolved: ResolvedExperiment, folder: Path) -> None:
    """Check that a folder does not exist, is empty, or holds a run of this experiment.

    Args:
        resolved: The experiment.
        folder: The run's folder.

    Raises:
        InputError: The folder holds another run or other files, or a file of the run is damaged. For a run of another
            experiment, the message lists the recipe fields that differ.
        OtherAlgorithmError: The folder holds a run of another version of the algorithm.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(
            f"{folder}: found a file, expected a run's folder, an empty or a new one", code=ErrorCode.MISMATCH
        )
    if (folder / SEARCH).is_file():
        message = f"{folder}: found a search, expected a run's folder, an empty or a new one"
        raise InputError(message, code=ErrorCode.OTHER_RUN)
    names = [path.name for path in folder.glob("[!.]*")]
    if names and not any((folder / name).exists() for name in RUN_FILES):
        message = f"{folder}: found {names[0]} in it, expected a run's folder, an empty or a new one"
        raise InputError(message, code=ErrorCode.OTHER_RUN)
    try:
        check_same_run(folder, resolved.fingerprint)
    except OtherAlgorithmError:
        raise
    except InputError as error:
        message = f"{error}{_describe_differences(resolved.experiment, folder)}"
        raise InputError(message, code=error.code, field=error.field) from error
    check_run_folder(resolved, folder)


def _describe_differences(experiment: Experiment, folder: Path) -> str:
    """List the recipe fields in which an experiment differs from the run in a folder, for an error message."""
    try:
        recorded = load_experiment(folder / EXPERIMENT)
    except InputError:
        return ""
    differences = diff_recipes(to_recipe(recorded), to_recipe(experiment))
    sentences = [
        f"{path} {old} there, {new} here"
        for path, (old, new) in differences.items()
        if not path.startswith(IGNORED_FIELDS)
    ]
    if not sentences:
        return " (the recipes are equal: the data, the model or a custom loss's code differs)"
    return f" ({'; '.join(sentences)})"


def diff_recipes(first: Any, second: Any, path: str = "") -> dict[str, tuple[str, str]]:
    """Compare the contents of two recipes.

    Args:
        first: A value of the first recipe: a dictionary, a list or a scalar.
        second: The value at the same path in the second recipe.
        path: Dotted path of the two values in their recipes, with a trailing dot; empty for the complete recipes.

    Returns:
        Mapping from the dotted path of each field that differs to its value in the first and in the second recipe, as
        text.
    """
    if isinstance(first, dict) and isinstance(second, dict):
        keys: Iterable[Any] = dict.fromkeys([*first, *second])
        items = [(key, first.get(key), second.get(key)) for key in keys]
    elif isinstance(first, list) and isinstance(second, list):
        items = [(index, one, two) for index, (one, two) in enumerate(zip_longest(first, second))]
    else:
        return {} if first == second else {path.removesuffix("."): _excerpt_values(first, second)}
    return {name: values for key, one, two in items for name, values in diff_recipes(one, two, f"{path}{key}.").items()}


def _excerpt_values(first: Any, second: Any) -> tuple[str, str]:
    """Format two values as one line of text each. Long values are cut around the first difference."""
    texts = ["nothing" if value is None else json.dumps(value, ensure_ascii=False) for value in (first, second)]
    shorter, longer = sorted(map(len, texts))
    difference = next((index for index, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), shorter)
    start = max(difference - MAX_VALUE_LENGTH // 3, 0) if longer > MAX_VALUE_LENGTH else 0
    stop = start + MAX_VALUE_LENGTH
    one, two = (f"{'…' if start else ''}{text[start:stop]}{'…' if len(text) > stop else ''}" for text in texts)
    return one, two


def count_student_images(experiment: Experiment) -> int:
    """Count the images that the student encodes in all stages: task images and distillation images."""
    steps, optimisation = sum(map(experiment.stage_steps, experiment.tasks)), experiment.optimisation
    distilled = optimisation.reference_batch_size if experiment.method.distill else 0
    return steps * (optimisation.batch_size + distilled)


def model_megabytes(resolved: ResolvedExperiment) -> float:
    """Return the size of a stage's model on disk, in megabytes."""
    return _summarize_model(resolved).megabytes


def _summarize_model(resolved: ResolvedExperiment) -> ModelSummary:
    """Summarize the experiment's model, and check that it supports gradient checkpointing if the recipe sets it."""
    experiment, compute = resolved.experiment, resolved.experiment.compute
    return _load_summary(experiment.model, resolved.model_digest, compute.savings, compute.gradient_checkpointing)


@lru_cache(maxsize=8)
def _load_summary(model: Model, digest: str, savings: Savings, checkpointing: bool) -> ModelSummary:
    """Summarize a model. `digest` is in the cache key because a file's content may change under the same name."""
    clip = load_clip(model)
    network = clip.model
    parameters = sum(tensor.numel() for tensor in network.state_dict().values())
    if checkpointing:  # the constructor raises if the model does not support it
        compute, tokens = Compute(savings=savings, gradient_checkpointing=True), clip.tokenizer(["a text"])
        PrunedForward(network, tokens, range(1), compute, unused_embeddings_constant=False)
    return ModelSummary(4 * parameters / 1e6, tuple(list_unpruned_towers(network, savings)))


def megabytes_needed(resolved: ResolvedExperiment, folder: Path) -> float:
    """Estimate the disk space that a run still needs for models, snapshots and two checkpoints.

    A checkpoint has the size of four models: the weights, the optimizer's two moments, and the average of the weights.
    While a new checkpoint replaces the previous one, both exist.

    Args:
        resolved: The experiment.
        folder: The run's folder. Stages that are finished in it need no more space.

    Returns:
        The needed disk space, in megabytes.
    """
    experiment = resolved.experiment
    model, interval = model_megabytes(resolved), experiment.compute.snapshots_every
    needed = 0.0
    for stage, task in enumerate(experiment.tasks, start=1):
        steps = experiment.stage_steps(task)
        if not steps or stage_folder(folder, stage, task.name).is_dir():
            continue
        existing = len(list(snapshots_folder(folder, stage, task.name).glob(f"*{SUFFIX}")))
        snapshots = 0 if interval is None else max(len(range(0, steps, interval)) + len((LAST_SNAPSHOT,)) - existing, 0)
        needed += model * (1 + snapshots)
    return needed + (2 * 4 * model if needed else 0.0)


def megabytes_free(folder: Path) -> float:
    """Return the free space on the disk of a folder, which may not exist yet, in megabytes."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(existing).free / 1e6


def check_disk(resolved: ResolvedExperiment, folder: Path) -> None:
    """Raise an `InputError` if the disk does not have enough free space for a run."""
    check_free_disk(folder, megabytes_needed(resolved, folder))


def check_free_disk(folder: Path, needed: float) -> None:
    """Check that the disk has enough free space.

    Args:
        folder: A folder on the disk, which may not exist yet.
        needed: Megabytes that will be written.

    Raises:
        InputError: The disk has less free space than `needed`.
    """
    free = megabytes_free(folder)
    if needed > free:
        raise InputError(
            f"{folder}: found {free:.0f} MB free on its disk, expected {needed:.0f} MB for the stages' models, "
            "snapshots and checkpoints; choose another disk with --out",
            code=ErrorCode.NO_SPACE,
            field="--out",
        )


def check_output_folders(experiment: Experiment, folder: Path) -> None:
    """Check that a run can write its folder, the teacher's feature cache and the shard cache.

    Args:
        experiment: The experiment.
        folder: The run's folder.
    """
    for path in (folder, folder.parent, teacher_cache_folder(folder)):
        check_writable(path)
    if experiment.compute.shard_cache is not None:
        check_writable(Path(experiment.compute.shard_cache).absolute(), "change compute.shard_cache")


def collect_warnings(resolved: ResolvedExperiment) -> list[str]:
    """Return warnings about probable mistakes in the recipe, the prompts, the use of remote shards, and the samples."""
    return [
        *resolved.experiment.warnings,
        *_prompt_warnings(resolved),
        *_streaming_warnings(resolved),
        *_sample_warnings(resolved),
    ]


def _full_tasks(resolved: ResolvedExperiment) -> list[TaskFolder]:
    """Return the tasks with all their classes and samples, because a subset of a task lists no unusable samples."""
    tasks = (task.full_task or task.without_shots for task in resolved.tasks)
    return list(dict.fromkeys(tasks))


def _sample_warnings(resolved: ResolvedExperiment) -> list[str]:
    """Return warnings about unusable samples, keys with dots, and shards that `nshards.txt` does not list."""
    messages = []
    for task in _full_tasks(resolved):
        for split, broken in task.broken_samples.items():
            messages += [f"task '{task.name}', {split}: {_describe_broken(broken)}"] if broken else []
            messages += [f"task '{task.name}', {warning}" for warning in task.list_warnings(split)]
    if broken := _broken_references(resolved):
        messages.append(f"reference.images: {_describe_broken(broken)}")
    images = resolved.reference.images if resolved.reference else None
    if isinstance(images, IndexedSamples) and (keys := images.find_dotted_keys()):
        messages.append(describe_dotted_keys("reference.images", keys))
    return messages


def _describe_broken(messages: Sequence[str]) -> str:
    """Summarize messages about unusable samples, one message per sample, in one text."""
    more = f"; and {len(messages) - MAX_SAMPLES_LISTED} more" if len(messages) > MAX_SAMPLES_LISTED else ""
    samples = format_count(len(messages), "sample")
    return f"{samples} will be skipped: {'; '.join(messages[:MAX_SAMPLES_LISTED])}{more}"


def _broken_references(resolved: ResolvedExperiment) -> list[str]:
    """Return a message for each reference image that is unusable, as far as this is known before images are decoded."""
    images = resolved.reference.images if resolved.reference else None
    faulty = images.faulty_samples() if isinstance(images, IndexedSamples) else []
    return [str(sample.as_error()) for sample in faulty]


def _prompt_warnings(resolved: ResolvedExperiment) -> list[str]:
    """Return warnings about prompts that the model truncates, and about classes whose prompts have equal tokens."""
    import open_clip

    tokenizer = open_clip.get_tokenizer(open_clip_name(resolved.experiment.model))
    is_class_incremental = resolved.experiment.class_incremental is not None
    tasks = dict.fromkeys(task.full_task or task if is_class_incremental else task for task in resolved.tasks)
    return [message for task in tasks for message in prompt_warnings(task, tokenizer)]


def _streaming_warnings(resolved: ResolvedExperiment) -> list[str]:
    """Return warnings about datasets in remote shards, if each of several processes would download all the shards."""
    compute = resolved.experiment.compute
    readers = compute.workers * max(compute.loader_processes, 1)
    datasets = {f"task '{task.name}'": task.train for task in resolved.tasks}
    if resolved.reference:
        datasets["reference.images"] = resolved.reference.images
    return [
        f"{name}: each of {readers} readers (compute.workers x compute.loader_processes) streams all remote shards. "
        "Set compute.shard_cache to download them once"
        for name, samples in datasets.items()
        if readers > 1 and not isinstance(samples, IndexedSamples)
    ]


def _feature_policies(resolved: ResolvedExperiment) -> dict[str, str]:
    """Map each task's name to the policy for computing the teacher's features in its stage (see `feature_policy`)."""
    experiment, distill = resolved.experiment, resolved.experiment.method.distill
    if distill is None:
        return {}
    reference = resolved.reference.images if resolved.reference else None
    distilled = [reference if distill.images == "reference" else task.train for task in resolved.tasks]
    return {
        task.name: feature_policy(experiment, stage, images)
        for stage, (task, images) in enumerate(zip(resolved.tasks, distilled, strict=True), start=1)
        if images is not None
    }


def _image_count(samples: object) -> int | None:
    """Return the number of images in a dataset; `None` for remote shards, which have no index."""
    return len(samples) if isinstance(samples, IndexedSamples) else None


def prepare(experiment: Experiment, recipe: Path | None = None, root: Path | None = None) -> ResolvedExperiment:
    """Resolve an experiment and check its data and its model.

    Args:
        experiment: The experiment.
        recipe: The recipe's file, for a hint in the error message if a path of the recipe does not exist.
        root: Folder to which the recipe's relative paths were resolved, for the same hint; default: the current folder.

    Returns:
        The resolved experiment.

    Raises:
        InputError: The data or the model of the experiment is missing or unusable.
    """
    try:
        return _resolve_and_check(experiment)
    except InputError as error:
        hint = _recipe_folder_hint(experiment, recipe.absolute().parent, root or Path.cwd()) if recipe else ""
        raise InputError(f"{error}{hint}", code=error.code, field=error.field) from error


def _recipe_folder_hint(experiment: Experiment, recipe_folder: Path, root: Path) -> str:
    """Return a hint for an error message if a missing path exists relative to the recipe's folder; empty otherwise."""
    scenario, reference, model = experiment.class_incremental, experiment.reference, experiment.model
    locations = [task.path for task in experiment.tasks]
    locations += [scenario.path, str(scenario.order)] if scenario else []
    locations += [*reference.images, reference.texts or ""] if reference else []
    locations += [model.name.removeprefix(LOCAL_MODEL), model.pretrained or ""]
    for path in map(Path, locations):
        if not path.is_relative_to(root):
            continue
        relative = path.relative_to(root)
        if not _path_exists(path) and _path_exists(recipe_folder / relative):
            return (
                f"; '{relative}' exists in the recipe's folder, but paths in a recipe are relative to the current "
                f"folder: start the command in {recipe_folder}, or give the absolute path"
            )
    return ""


def _path_exists(pattern: Path) -> bool:
    """Whether a path exists or a pattern matches an existing path. No path matches an invalid pattern (`a**b.tar`)."""
    with suppress(OSError, ValueError):
        return pattern.exists() or any(pattern.parent.glob(pattern.name))
    return False


def _resolve_and_check(experiment: Experiment) -> ResolvedExperiment:
    resolved, max_share = resolve(experiment), experiment.compute.max_broken_share
    for task in dict.fromkeys([*_full_tasks(resolved), *resolved.tasks]):
        task.check(max_share)
    if broken := _broken_references(resolved):
        assert resolved.reference is not None
        assert isinstance(resolved.reference.images, IndexedSamples)
        check_broken_share(broken[0], len(broken), len(resolved.reference.images), max_share)
    _summarize_model(resolved)
    return resolved
