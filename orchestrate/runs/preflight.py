"""Looked at before anything is started: data, model, prompts, disk; and what a run will do, in numbers."""

import json
import shutil
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import lru_cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

from orchestrate.lifecycle.paths import EXPERIMENT, SEARCH, check_writable
from orchestrate.lifecycle.run_status import STATE
from orchestrate.recipes.recipe import as_recipe, load_experiment
from schemas.compute import Compute, Savings
from schemas.errors import InputError, counted
from schemas.experiment import LOCAL_MODEL, Experiment, Model
from zscl.checks.prompts import prompt_warnings
from zscl.data.indexed import IndexedSamples
from zscl.data.sample import check_broken_share
from zscl.data.task import TaskFolder, dotted_keys_warning
from zscl.models.clip import load_clip, open_clip_name
from zscl.models.pruned_forward import PrunedForward, list_unpruned_towers
from zscl.sequence.layout import ZERO_SHOT, partial_row_file, stage_folder
from zscl.sequence.resolve import ResolvedExperiment, resolve
from zscl.sequence.result import OtherAlgorithmError, check_run_folder, check_same_run
from zscl.sequence.teacher import feature_policy, teacher_cache_folder
from zscl.training.checkpoint import CHECKPOINT
from zscl.training.snapshots import LAST, SUFFIX, place_of

MOST_NAMED = 3  # samples in a sentence
NO_PART = ("name", "compute.", "tracking.")  # of what is computed
OF_A_RUN = (EXPERIMENT, STATE, ZERO_SHOT, partial_row_file(Path(ZERO_SHOT)).name, "stages", CHECKPOINT)
LONGEST_SHOWN = 60  # characters of a value, where two values differ


def plan(opened: ResolvedExperiment, folder: Path) -> dict[str, object]:
    """What a run will do, in numbers.

    Raises:
        InputError: the folder holds another experiment's run.
    """
    experiment = opened.experiment
    steps = sum(map(experiment.stage_steps, experiment.tasks))
    test = {task.name: _count(task.test) for task in opened.tasks}
    check_run_folder_is_same(opened, folder)
    return {
        "warnings": warnings(opened),
        "fingerprint": opened.fingerprint,
        "folder": str(folder),
        "finished_stages": len(list(folder.glob("stages/*/accuracy.json"))),
        "stages": [task.name for task in opened.tasks],
        "train_images": {task.name: _count(task.train) for task in opened.tasks},
        "test_images": test,
        "reference_images": _count(opened.reference.images) if opened.reference else 0,
        "reference_texts": len(opened.reference.texts) if opened.reference else 0,
        "steps": steps,
        "images_through_student": images_through_student(experiment),
        "teacher_features": _teacher_features(opened),
        "computed_in_full": list(_looked_at(opened)[1]),
        "workers": experiment.compute.workers,
        "megabytes_needed": round(megabytes_needed(opened, folder)),
        "megabytes_free": round(megabytes_free(folder)),
    }


def check_run_folder_is_same(opened: ResolvedExperiment, folder: Path) -> None:
    """Refuse a place for a run where something else lies; of another experiment's run, say which fields are others.

    Raises:
        InputError: it is a file, the folder of a search or of another run, or one of something else; or a file of the
            run is damaged, or another run's.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: found a file, expected a run's folder, or none yet")
    if (folder / SEARCH).is_file():
        raise InputError(f"{folder}: found a search, expected a run's folder, an empty or a new one")
    others = [each.name for each in folder.glob("[!.]*")]
    if others and not any((folder / name).exists() for name in OF_A_RUN):
        raise InputError(f"{folder}: found {others[0]} in it, expected a run's folder, an empty or a new one")
    try:
        check_same_run(folder, opened.fingerprint)
    except OtherAlgorithmError:
        raise
    except InputError as error:
        raise InputError(f"{error}{_how_it_differs(opened.experiment, folder)}") from error
    check_run_folder(opened, folder)


def _how_it_differs(experiment: Experiment, folder: Path) -> str:
    """The end of a sentence about another experiment's folder: which fields are others there."""
    try:
        there = load_experiment(folder / EXPERIMENT)
    except InputError:
        return ""
    found = _differences(as_recipe(there), as_recipe(experiment))
    unlike = [f"{path} {was} there, {now} here" for path, (was, now) in found.items() if not path.startswith(NO_PART)]
    if not unlike:
        return " (the recipe is alike: the data, the model or a further loss's code is another)"
    return f" ({'; '.join(unlike)})"


def _differences(one: Any, other: Any, path: str = "") -> dict[str, tuple[str, str]]:
    """Where two recipes' contents are not alike, by dotted path: each's value, as YAML has it in a line."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys: Iterable[Any] = dict.fromkeys([*one, *other])
        pairs = [(key, one.get(key), other.get(key)) for key in keys]
    elif isinstance(one, list) and isinstance(other, list):
        pairs = [(index, mine, theirs) for index, (mine, theirs) in enumerate(zip_longest(one, other))]
    else:
        return {} if one == other else {path.removesuffix("."): _around_the_difference(one, other)}
    return {
        name: pair for key, mine, theirs in pairs for name, pair in _differences(mine, theirs, f"{path}{key}.").items()
    }


def _around_the_difference(one: Any, other: Any) -> tuple[str, str]:
    """Two values, each in a line; of long ones, the part in which they begin to differ."""
    lines = ["nothing" if value is None else json.dumps(value, ensure_ascii=False) for value in (one, other)]
    alike = next((place for place, (a, b) in enumerate(zip(*lines, strict=False)) if a != b), min(map(len, lines)))
    start = max(alike - LONGEST_SHOWN // 3, 0) if max(map(len, lines)) > LONGEST_SHOWN else 0
    mine, theirs = (
        f"{'…' if start else ''}{line[start : start + LONGEST_SHOWN]}{'…' if len(line) > start + LONGEST_SHOWN else ''}"
        for line in lines
    )
    return mine, theirs


def images_through_student(experiment: Experiment) -> int:
    """Task images and distilled ones, in all stages."""
    steps, optimisation = sum(map(experiment.stage_steps, experiment.tasks)), experiment.optimisation
    distilled = optimisation.reference_batch_size if experiment.method.distill else 0
    return steps * (optimisation.batch_size + distilled)


def model_megabytes(opened: ResolvedExperiment) -> float:
    """What a stage's model takes up on disk."""
    return _looked_at(opened)[0]


def _looked_at(opened: ResolvedExperiment) -> tuple[float, tuple[str, ...]]:
    """Megabytes of the model on disk, and which of its towers are computed in full.

    Raises:
        InputError: the model cannot be loaded, or does not allow a saving that is asked for.
    """
    experiment, compute = opened.experiment, opened.experiment.compute
    return _load_and_look(experiment.model, opened.weights, compute.savings, compute.gradient_checkpointing)


@lru_cache(maxsize=8)
def _load_and_look(model: Model, weights: str, savings: Savings, checkpointing: bool) -> tuple[float, tuple[str, ...]]:
    """Load a model once, whatever is asked of it; `weights`, their digest, tells it from one of the same name."""
    clip = load_clip(model)
    network = clip.model
    values = sum(weight.numel() for weight in network.state_dict().values())
    if checkpointing:  # as a stage does
        compute, tokens = Compute(savings=savings, gradient_checkpointing=True), clip.tokenizer(["a text"])
        PrunedForward(network, tokens, range(1), compute, unused_embeddings_constant=False)
    return 4 * values / 1e6, tuple(list_unpruned_towers(network, savings))  # written as float32


def megabytes_needed(opened: ResolvedExperiment, folder: Path) -> float:
    """What a run has yet to write: models of stages, snapshots, and the checkpoint of the stage under way, twice.

    A checkpoint is there twice while a new one takes the old one's place: weights, two moments, and the average.
    """
    experiment = opened.experiment
    model, every = model_megabytes(opened), experiment.compute.snapshots_every
    needed = 0.0
    for stage, task in enumerate(experiment.tasks, start=1):
        steps = experiment.stage_steps(task)
        if not steps or stage_folder(folder, stage, task.name).is_dir():
            continue
        place = place_of(folder, stage, task.name)
        kept = len(list(place.glob(f"*{SUFFIX}")))
        snapshots = 0 if every is None else max(len(range(0, steps, every)) + len((LAST,)) - kept, 0)
        needed += model * (1 + snapshots)
    return needed + (2 * 4 * model if needed else 0.0)


def megabytes_free(folder: Path) -> float:
    """On the disk that a folder is on, or will be."""
    there = next(place for place in (folder, *folder.parents) if place.exists())
    return shutil.disk_usage(there).free / 1e6


def check_disk(opened: ResolvedExperiment, folder: Path) -> None:
    """Refuse a run that the disk has no room for.

    Raises:
        InputError: saying how much is free, and how much is needed.
    """
    check_free_disk(folder, megabytes_needed(opened, folder))


def check_free_disk(folder: Path, needed: float) -> None:
    """Refuse a folder whose disk has no room for so many megabytes.

    Raises:
        InputError: saying how much is free, and how much is needed.
    """
    free = megabytes_free(folder)
    if needed > free:
        raise InputError(
            f"{folder}: found {free:.0f} MB free on its disk, expected {needed:.0f} MB for the stages' models, their "
            "snapshots if any, and a checkpoint; choose another place with --out"
        )


def check_places(experiment: Experiment, folder: Path) -> None:
    """Refuse folders that a run could not write: its own, the teacher's store beside it, the shards' cache.

    Raises:
        InputError: naming the folder, and the option or field to change.
    """
    for each in (folder, folder.parent, teacher_cache_folder(folder)):
        check_writable(each)
    if experiment.compute.shard_cache is not None:
        check_writable(Path(experiment.compute.shard_cache).absolute(), "change compute.shard_cache")


def warnings(opened: ResolvedExperiment) -> list[str]:
    """What is allowed but hardly meant, a sentence each: of the recipe, of prompts, of what is read again and again."""
    return [
        *opened.experiment.warnings,
        *_prompts(opened),
        *_read_again(opened),
        *_left_out(opened),
    ]


def _whole_tasks(opened: ResolvedExperiment) -> list[TaskFolder]:
    """The tasks as their folders hold them: a sample that cannot be used belongs to no class, and is drawn nowhere."""
    wholes = (task.whole or task.without_shots for task in opened.tasks)
    return list(dict.fromkeys(wholes))


def _left_out(opened: ResolvedExperiment) -> list[str]:
    """A sentence a set with samples that cannot be used, or with shards that are not counted."""
    found = []
    for task in _whole_tasks(opened):
        for split, broken in task.broken.items():
            found += [f"task '{task.name}', {split}: {_skipped(broken)}"] if broken else []
            found += [f"task '{task.name}', {sentence}" for sentence in task.warnings(split)]
    if broken := _broken_references(opened):
        found.append(f"reference.images: {_skipped(broken)}")
    images = opened.reference.images if opened.reference else None
    if isinstance(images, IndexedSamples) and (keys := images.dotted_keys()):
        found.append(dotted_keys_warning("reference.images", keys))
    return found


def _skipped(sentences: Sequence[str]) -> str:
    more = f"; and {len(sentences) - MOST_NAMED} more" if len(sentences) > MOST_NAMED else ""
    samples = counted(len(sentences), "sample")
    return f"found {samples} to be skipped: {'; '.join(sentences[:MOST_NAMED])}{more}"


def _broken_references(opened: ResolvedExperiment) -> list[str]:
    """A sentence a reference image that cannot be used, as far as file names tell."""
    images = opened.reference.images if opened.reference else None
    faulty = images.faulty() if isinstance(images, IndexedSamples) else []
    return [str(sample.error()) for sample in faulty]


def _prompts(opened: ResolvedExperiment) -> list[str]:
    """A sentence for prompts that the model does not read to their end, and for classes that it cannot tell apart."""
    import open_clip

    tokenizer = open_clip.get_tokenizer(open_clip_name(opened.experiment.model))
    one_head = opened.experiment.class_incremental is not None
    judged = dict.fromkeys(task.whole or task if one_head else task for task in opened.tasks)
    return [sentence for task in judged for sentence in prompt_warnings(task, tokenizer)]


def _read_again(opened: ResolvedExperiment) -> list[str]:
    """A sentence a set whose remote shards several readers would each fetch whole."""
    compute = opened.experiment.compute
    readers = compute.workers * max(compute.loader_processes, 1)
    sets = {f"task '{task.name}'": task.train for task in opened.tasks}
    if opened.reference:
        sets["reference.images"] = opened.reference.images
    return [
        f"{name}: found remote shards and {readers} readers (compute.workers x compute.loader_processes), of which "
        "each streams all of them; with compute.shard_cache they are copied once"
        for name, samples in sets.items()
        if readers > 1 and not isinstance(samples, IndexedSamples)
    ]


def _teacher_features(opened: ResolvedExperiment) -> dict[str, str]:
    """When the teacher's features of the images that each stage distils on are computed for the store, if ever."""
    experiment, distill = opened.experiment, opened.experiment.method.distill
    if distill is None:
        return {}
    reference = opened.reference.images if opened.reference else None
    images = [reference if distill.images == "reference" else task.train for task in opened.tasks]
    return {
        task.name: feature_policy(experiment, stage, distilled)
        for stage, (task, distilled) in enumerate(zip(opened.tasks, images, strict=True), start=1)
        if distilled is not None
    }


def _count(samples: object) -> int | None:
    """Images; `None` for remote shards, which are not counted beforehand."""
    return len(samples) if isinstance(samples, IndexedSamples) else None


def prepare(experiment: Experiment, recipe: Path | None = None, root: Path | None = None) -> ResolvedExperiment:
    """Look at everything the experiment names before anything is started.

    Args:
        experiment: checked against its schema.
        recipe: the file that it was read from.
        root: the folder that its relative paths counted from; default: the current one.

    Raises:
        InputError: something is missing or wrong.
    """
    try:
        return _prepare(experiment)
    except InputError as error:
        hint = _beside(experiment, recipe.absolute().parent, root or Path.cwd()) if recipe else ""
        raise InputError(f"{error}{hint}") from error


def _beside(experiment: Experiment, beside: Path, root: Path) -> str:
    """The end of a sentence, where a path that is missing is there if it counts from the recipe's own folder."""
    scenario, reference, model = experiment.class_incremental, experiment.reference, experiment.model
    locations = [task.path for task in experiment.tasks]
    locations += [scenario.path, str(scenario.order)] if scenario else []
    locations += [*reference.images, reference.texts or ""] if reference else []
    locations += [model.name.removeprefix(LOCAL_MODEL), model.pretrained or ""]
    for path in map(Path, locations):
        if path.is_relative_to(root) and not _matches(path) and _matches(beside / path.relative_to(root)):
            return (
                f"; '{path.relative_to(root)}' is beside the recipe, but a recipe's paths count from the current "
                f"folder: start the command in {beside}, or give the whole path"
            )
    return ""


def _matches(path: Path) -> bool:
    """Whether a path, or a pattern of paths, is there; not where it cannot be looked for, as `a**b.tar`."""
    with suppress(OSError, ValueError):
        return path.exists() or any(path.parent.glob(path.name))
    return False


def _prepare(experiment: Experiment) -> ResolvedExperiment:
    opened, share = resolve(experiment), experiment.compute.max_broken_share
    for task in dict.fromkeys([*_whole_tasks(opened), *opened.tasks]):
        task.check(share)
    if broken := _broken_references(opened):
        assert opened.reference is not None
        assert isinstance(opened.reference.images, IndexedSamples)
        check_broken_share(broken[0], len(broken), len(opened.reference.images), share)
    _looked_at(opened)
    return opened
