"""One run from a recipe: folder, pre-flight, tracking, display, training."""

import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from orchestrate import group, places, recipes, report
from orchestrate.display import Bar, Display
from orchestrate.interruption import signals_taken
from orchestrate.ownership import owned
from orchestrate.state import read_state, write_state
from schemas.base import InputError, InterruptedRunError
from schemas.experiment import Experiment
from schemas.results import Embedded, Result
from schemas.secrets import MASK, mask
from zscl.model import load
from zscl.opened import Opened, open_experiment
from zscl.rows import refuse_other_run
from zscl.shards import IndexedSamples
from zscl.teaching import check_embeddable, way_of_features
from zscl.towers import left_in_full

if TYPE_CHECKING:
    from orchestrate.shipping import Shipper

HASTE_SECONDS = 2.0  # for MLflow to take the rest, after a signal


def plan(opened: Opened, folder: Path) -> dict[str, object]:
    """What a run will do, in numbers.

    Raises:
        InputError: the folder holds another experiment's run.
    """
    experiment = opened.experiment
    steps = sum(map(experiment.stage_steps, experiment.tasks))
    test = {task.name: _count(task.test) for task in opened.tasks}
    refuse_other_run(folder, opened.fingerprint)
    return {
        "warnings": experiment.warnings,
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
        "computed_in_full": left_in_full(load(experiment.model).model, experiment.compute.savings),
        "workers": experiment.compute.workers,
    }


def images_through_student(experiment: Experiment) -> int:
    """Task images and distilled ones, in all stages."""
    steps, optimisation = sum(map(experiment.stage_steps, experiment.tasks)), experiment.optimisation
    distilled = optimisation.reference_batch_size if experiment.method.distill else 0
    return steps * (optimisation.batch_size + distilled)


def model_megabytes(experiment: Experiment) -> float:
    """What a stage's model takes up on disk."""
    weights = load(experiment.model).model.state_dict().values()
    return sum(float(4 * weight.numel()) for weight in weights) / 1e6  # written as float32


def _teacher_features(opened: Opened) -> dict[str, str]:
    """When the teacher's features of the images that each stage distils on are computed for the store, if ever."""
    experiment, distill = opened.experiment, opened.experiment.method.distill
    if distill is None:
        return {}
    reference = opened.reference.images if opened.reference else None
    images = [reference if distill.images == "reference" else task.train for task in opened.tasks]
    return {
        task.name: way_of_features(experiment, stage, distilled)
        for stage, (task, distilled) in enumerate(zip(opened.tasks, images, strict=True), start=1)
        if distilled is not None
    }


def _count(samples: object) -> int | None:
    """Images; `None` for remote shards, which are not counted beforehand."""
    return len(samples) if isinstance(samples, IndexedSamples) else None


def prepare(experiment: Experiment) -> Opened:
    """Look at everything the experiment names before anything is started.

    Raises:
        InputError: something is missing or wrong.
    """
    opened = open_experiment(experiment)
    for task in {task.whole or task for task in opened.tasks}:
        task.check(experiment.compute.max_broken_share)
    left_in_full(load(experiment.model).model, experiment.compute.savings)
    return opened


def prepare_variants(
    recipe: Path,
    overrides: Sequence[str],
    variant: str | None,
    out: Path | None,
    seeds: int = 1,
    orders: str = "",
) -> Iterator[tuple[Opened, Path]]:
    """Prepare what a recipe means, one experiment after another, each with its folder.

    Args:
        recipe: a recipe, or a table of variants.
        overrides: `a.b.c=value`.
        variant: which row of a table, or all of them.
        out: the run's folder, or that of all of them; default: see `places.folder_of`.
        seeds: how many seeds each is run with.
        orders: of the tasks, in which each is run (see `group.members`).

    Raises:
        InputError: a recipe is refused, or something that one names is missing or wrong.
    """
    experiments = group.members(recipes.load_variants(recipe, overrides, variant), seeds, orders)
    for name, experiment in experiments.items():
        opened = prepare(experiment)
        yield opened, places.folder_of(experiment, opened.fingerprint, out, name if len(experiments) > 1 else "")


def run(opened: Opened, folder: Path, console: Console, offline: bool = False) -> Result:
    """Run an experiment on Ray, recorded in MLflow; one that is finished in `folder` is not run again.

    Offline, its journal is all that records it, and `orchestrate.shipping.sync` sends that later.

    Raises:
        InputError: the cluster, the tracking store or the folder is not as expected.
        InterruptedRunError: a signal ended it; it can go on.
    """
    refuse_other_run(folder, opened.fingerprint)
    if (folder / "result.json").is_file():
        console.print(f"{folder}: finished before, nothing to do", highlight=False)
        state = read_state(folder)
        if not offline and state is not None and state.status != "FINISHED":  # killed behind its last step
            console.print(f"MLflow may lack its end; send it with: zscl sync {folder}", highlight=False, soft_wrap=True)
        return report.load_result(folder)
    with owned(folder, note=partial(console.print, highlight=False, soft_wrap=True)):
        return _run(opened, folder, console, offline)


def resumable(folder: Path, overrides: Sequence[str]) -> Experiment:
    """Read the experiment that a run's folder holds.

    Args:
        folder: of a run that was started before.
        overrides: `a.b.c=value`, of compute and tracking alone.

    Raises:
        InputError: there is no run, or an override would make it another one.
    """
    file = folder / places.EXPERIMENT
    if not file.is_file():
        raise InputError(
            f"{folder}: found no {places.EXPERIMENT}, expected the folder of a run that was started before"
        )
    for override in overrides:
        if not override.startswith(("compute.", "tracking.")):
            raise InputError(f"--set {override}: expected a field of compute or tracking; all else is what the run is")
    experiment = recipes.load_experiment(file, overrides)
    if MASK in experiment.model_dump_json(exclude={"tracking"}):
        raise InputError(
            f"{file}: found {MASK} where the recipe has secrets, expected the recipe: zscl run RECIPE --out {folder}"
        )
    return experiment


def embed(opened: Opened, folder: Path, console: Console) -> Embedded:
    """Fill the teacher's stores beside a run's folder, on Ray.

    Raises:
        InputError: the cluster is not as expected, or the method has nothing to embed ahead.
        InterruptedRunError: a signal ended it; what is computed is stored.
    """
    from orchestrate.train import connect
    from orchestrate.train import embed as embed_on_workers

    check_embeddable(opened)
    connect(opened.experiment.compute, note=lambda text: console.print(text, highlight=False))
    scratch = tempfile.TemporaryDirectory(prefix=".embedding-", dir=_made(folder.parent), ignore_cleanup_errors=True)
    with scratch, Bar(console) as bar, signals_taken() as interruption:
        return embed_on_workers(opened.experiment, Path(scratch.name), Display(opened.experiment, bar), interruption)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _run(opened: Opened, folder: Path, console: Console, offline: bool) -> Result:
    # Ray and MLflow take seconds to import: only once there is something to run.
    from orchestrate.train import check_resources, connect, train

    experiment = opened.experiment
    for warning in experiment.warnings:
        console.print(f"warning: {warning}", highlight=False, soft_wrap=True)
    connect(experiment.compute, note=lambda text: console.print(text, highlight=False))
    check_resources(experiment.compute)
    bar = Bar(console, total=sum(map(experiment.stage_steps, experiment.tasks)) or None)
    with signals_taken() as interruption:
        shipper = None if offline else _shipper(opened, folder, console)
        killed = False
        try:
            recipes.write_experiment(experiment, folder / places.EXPERIMENT)
            write_state(folder, "RUNNING")
            with bar:
                result = train(experiment, folder, Display(experiment, bar), interruption)
            write_state(folder, "FINISHED")
        except BaseException as error:
            killed = isinstance(error, InterruptedRunError | KeyboardInterrupt | SystemExit)
            told = isinstance(error, InterruptedRunError | InputError)  # in a sentence
            reason = str(error) if told else " ".join(f"{type(error).__name__}: {error}".split())
            write_state(folder, "KILLED" if killed else "FAILED", mask(reason))
            raise
        finally:
            if shipper and killed:
                shipper.end(HASTE_SECONDS)
            elif shipper:
                shipper.end()
    return result


def _shipper(opened: Opened, folder: Path, console: Console) -> "Shipper":
    from orchestrate.shipping import Shipper

    note = partial(console.print, highlight=False, soft_wrap=True)
    return Shipper(opened.experiment, opened.fingerprint, folder, note)
