"""One run from a recipe: folder, pre-flight, tracking, display, training."""

import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from orchestrate.cluster.storage_sync import Following, synced_folder
from orchestrate.lifecycle.lock import run_lock
from orchestrate.lifecycle.paths import EXPERIMENT, check_writable, run_folder
from orchestrate.lifecycle.run_status import read_state, record_outcome, write_state
from orchestrate.lifecycle.signals import handle_signals
from orchestrate.recipes.recipe import load_experiment, load_variants, write_experiment
from orchestrate.recipes.variants import expand_seeds_and_orders
from orchestrate.reports.results import load_result
from orchestrate.runs import preflight
from orchestrate.runs.progress import ProgressBar, RunDisplay
from schemas.errors import InputError, command
from schemas.experiment import Experiment
from schemas.redaction import MASK
from schemas.results import Embedded, Result
from zscl.sequence.resolve import ResolvedExperiment
from zscl.sequence.teacher import check_embeddable

if TYPE_CHECKING:
    from orchestrate.tracking.uploader import JournalUploader


def prepare_variants(
    recipe: Path,
    overrides: Sequence[str],
    variant: str | None,
    out: Path | None,
    seeds: int = 1,
    orders: str = "",
) -> Iterator[tuple[ResolvedExperiment, Path]]:
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
    experiments = expand_seeds_and_orders(load_variants(recipe, overrides, variant), seeds, orders)
    for name, experiment in experiments.items():
        opened = preflight.prepare(experiment, recipe)
        yield opened, run_folder(experiment, opened.fingerprint, out, name if len(experiments) > 1 else "")


def run_experiment(opened: ResolvedExperiment, folder: Path, console: Console, offline: bool = False) -> Result:
    """Run an experiment on Ray, recorded in MLflow; one that is finished in `folder` is not run again.

    Offline, its journal is all that records it, and `orchestrate.tracking.uploader.sync` sends that later.

    Raises:
        InputError: the cluster, the tracking store or the folder is not as expected.
        InterruptedRunError: a signal ended it; it can go on.
    """
    if finished := _finished(opened, folder, console, offline):
        return finished
    owner = run_lock(folder, note=partial(console.print, highlight=False, soft_wrap=True))
    with owner, synced_folder(opened.experiment, folder) as following:
        return _finished(opened, folder, console, offline) or _run(opened, folder, console, offline, following)


def load_resumable_run(folder: Path, overrides: Sequence[str]) -> Experiment:
    """Read the experiment that a run's folder holds.

    Args:
        folder: of a run that was started before.
        overrides: `a.b.c=value`, of compute and tracking alone.

    Raises:
        InputError: there is no run, or an override would make it another one.
    """
    file = folder / EXPERIMENT
    if not file.is_file():
        raise InputError(f"{folder}: found no {EXPERIMENT}, expected the folder of a run that was started before")
    for override in overrides:
        if not override.startswith(("compute.", "tracking.")):
            raise InputError(f"--set {override}: expected a field of compute or tracking; all else is what the run is")
    experiment = load_experiment(file, overrides)
    if MASK in experiment.model_dump_json(exclude={"tracking"}):
        raise InputError(
            f"{file}: found {MASK} where the recipe has secrets, expected the recipe: "
            + command("zscl", "run", "RECIPE", "--out", folder)
        )
    return experiment


def run_embedding(opened: ResolvedExperiment, folder: Path, console: Console) -> Embedded:
    """Fill the teacher's stores beside a run's folder, on Ray.

    Raises:
        InputError: the cluster is not as expected, or the method has nothing to embed ahead.
        InterruptedRunError: a signal ended it; what is computed is stored.
    """
    from orchestrate.cluster.connect import connect
    from orchestrate.cluster.train_workers import embed as embed_on_workers

    check_embeddable(opened)
    if opened.experiment.compute.storage is not None:
        raise InputError(
            "compute.storage: found it in `zscl embed`, expected a folder that all nodes see: nothing else "
            "lets them share the features"
        )
    check_writable(folder.parent)
    connect(opened.experiment.compute, note=lambda text: console.print(text, highlight=False))
    scratch = tempfile.TemporaryDirectory(prefix=".embedding-", dir=_made(folder.parent), ignore_cleanup_errors=True)
    with scratch, ProgressBar(console) as bar, handle_signals() as interruption:
        return embed_on_workers(opened.experiment, Path(scratch.name), RunDisplay(opened.experiment, bar), interruption)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _finished(opened: ResolvedExperiment, folder: Path, console: Console, offline: bool) -> Result | None:
    """What a run has come to before, if it is finished."""
    preflight.check_run_folder_is_same(opened, folder)
    if not (folder / "result.json").is_file():
        return None
    result = load_result(folder)
    if result.fingerprint != opened.fingerprint:
        raise InputError(
            f"{folder / 'result.json'}: found the result of another run (fingerprint {result.fingerprint}), expected "
            f"{opened.fingerprint}; remove the file, or choose another folder"
        )
    console.print(f"{folder}: finished before, nothing to do", highlight=False)
    if result.method != opened.experiment.method.name:  # what a method is called is no part of what is computed
        console.print(
            f"{folder}: the recipe calls the method '{opened.experiment.method.name}', the result keeps the name "
            f"'{result.method}' that it was computed under",
            highlight=False,
            soft_wrap=True,
        )
    state = read_state(folder)
    if not offline and state is not None and state.status != "FINISHED":  # killed behind its last step
        rest = command("zscl", "sync", folder)
        console.print(f"MLflow may lack its end; send it with: {rest}", highlight=False, soft_wrap=True)
    return result


def _run(opened: ResolvedExperiment, folder: Path, console: Console, offline: bool, following: Following) -> Result:
    # Ray and MLflow take seconds to import: only once there is something to run.
    from orchestrate.cluster.train_workers import train

    experiment = opened.experiment
    for warning in preflight.warnings(opened):
        console.print(f"warning: {warning}", highlight=False, soft_wrap=True)
    preflight.check_places(experiment, folder)
    preflight.check_disk(opened, folder)
    connect_cluster(experiment, folder, console)
    bar = ProgressBar(console, total=sum(map(experiment.stage_steps, experiment.tasks)) or None)
    with handle_signals() as interruption:
        shipper = None if offline else _shipper(opened, folder, console)
        with record_outcome(folder, shipper):
            write_experiment(experiment, folder / EXPERIMENT)
            write_state(folder, "RUNNING")
            with bar, following():
                result = train(experiment, folder, RunDisplay(experiment, bar), interruption)
    return result


def plan_run(opened: ResolvedExperiment, folder: Path, console: Console, offline: bool = False) -> dict[str, object]:
    """What a run would do, in numbers, and what was checked; on a cluster that somebody has started, what that has.

    Raises:
        InputError: the run would fail as soon as it is started.
    """
    from orchestrate.runs import dry_run

    found, cluster = preflight.plan(opened, folder), dict[str, float]()

    def connect() -> dict[str, float]:
        cluster.update(connect_cluster(opened.experiment, folder, console))
        return cluster

    checklist = dry_run.check_run(opened, folder, offline, connect)
    checklist.refuse_failures(console.print)
    return {**found, **({"cluster": cluster} if cluster else {}), "checked": checklist.lines}


def connect_cluster(experiment: Experiment, folder: Path, console: Console) -> dict[str, float]:
    """Connect to the cluster. Returns its resources.

    Raises:
        InputError: it does not hold the workers, or a node does not share the folder.
    """
    import ray

    from orchestrate.cluster.connect import check_folder, check_resources, connect

    connect(experiment.compute, note=lambda text: console.print(text, highlight=False))
    check_resources(experiment.compute)
    if experiment.compute.storage is None:
        check_folder(folder.parent)
    resources = ray.cluster_resources()
    return {"nodes": len(ray.nodes()), **{kind: resources[kind] for kind in ("CPU", "GPU") if kind in resources}}


def _shipper(opened: ResolvedExperiment, folder: Path, console: Console) -> "JournalUploader":
    from orchestrate.tracking.uploader import JournalUploader

    note = partial(console.print, highlight=False, soft_wrap=True)
    return JournalUploader(opened.experiment, opened.fingerprint, folder, note)
