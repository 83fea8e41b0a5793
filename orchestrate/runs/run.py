"""Execution of an experiment on Ray: checks, MLflow tracking, progress display, variants of a recipe, and dry run."""

import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from orchestrate.cluster.storage_sync import BackgroundPull, synced_folder
from orchestrate.lifecycle.lock import run_lock
from orchestrate.lifecycle.paths import check_writable, run_folder
from orchestrate.lifecycle.run_status import read_state, record_outcome, write_state
from orchestrate.lifecycle.signals import handle_signals
from orchestrate.recipes.recipe import load_experiment, write_experiment
from orchestrate.recipes.variants import expand_seeds_and_orders, load_variants
from orchestrate.reports.results import load_result
from orchestrate.runs import preflight
from orchestrate.runs.progress import ProgressBar, RunDisplay
from schemas.errors import ErrorCode, InputError, shell_command
from schemas.experiment import Experiment
from schemas.redaction import MASK
from schemas.results import EmbeddingReport, Result
from zscl.sequence.layout import EXPERIMENT, RESULT
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
    """Resolve and check the experiments of a recipe: one for each variant, seed and task order.

    Args:
        recipe: A recipe, with or without variants.
        overrides: Changes to fields of the recipe, `a.b.c=value`.
        variant: Name of a variant; default: all variants.
        out: The run's folder, or the parent folder of several runs; for the default, see `lifecycle.paths.run_folder`.
        seeds: Number of seeds with which each variant is run.
        orders: Task orders, separated by commas, with which each variant is run (see
            `recipes.variants.expand_seeds_and_orders`).

    Yields:
        Pairs of an experiment and the run's folder.
    """
    experiments = expand_seeds_and_orders(load_variants(recipe, overrides, variant), seeds, orders)
    for name, experiment in experiments.items():
        resolved = preflight.prepare(experiment, recipe)
        yield resolved, run_folder(experiment, resolved.fingerprint, out, name if len(experiments) > 1 else "")


def run_experiment(resolved: ResolvedExperiment, folder: Path, console: Console, offline: bool = False) -> Result:
    """Run or resume an experiment on Ray. If the run is finished, only load its result.

    If a signal stops the run, an `InterruptedRunError` is raised. The run can be resumed later.

    Args:
        resolved: The experiment.
        folder: The run's folder.
        console: Console for progress.
        offline: Whether to record the run only in its journal, which `zscl sync` sends to MLflow later.

    Returns:
        The run's result.
    """
    if result := _load_finished(resolved, folder, console, offline):
        return result
    lock = run_lock(folder, note=partial(console.print, highlight=False, soft_wrap=True))
    with lock, synced_folder(resolved.experiment, folder) as background_pull:
        # Another process, or object storage, may have the result by now.
        if result := _load_finished(resolved, folder, console, offline):
            return result
        return _run(resolved, folder, console, offline, background_pull)


def load_resumable_run(folder: Path, overrides: Sequence[str]) -> Experiment:
    """Load the experiment that is recorded in a run's folder, in order to resume the run.

    Args:
        folder: Folder of a run that was started before.
        overrides: Changes to fields of the recipe, `a.b.c=value`. Only fields of `compute` and `tracking` are allowed.

    Returns:
        The experiment.

    Raises:
        InputError: The folder holds no run, an override changes another field, or the recorded recipe contains masked
            secrets.
    """
    file = folder / EXPERIMENT
    if not file.is_file():
        message = f"{folder}: found no {EXPERIMENT}, expected the folder of a run that was started before"
        raise InputError(message, code=ErrorCode.NOT_FOUND)
    for override in overrides:
        if not override.startswith(("compute.", "tracking.")):
            message = f"--set {override}: expected a field of compute or tracking; the other fields define the run"
            raise InputError(message, code=ErrorCode.UNSUPPORTED, field="--set")
    experiment = load_experiment(file, overrides)
    if MASK in experiment.model_dump_json(exclude={"tracking"}):
        raise InputError(
            f"{file}: secrets are masked ({MASK}) in this file. Resume with the original recipe: "
            + shell_command("zscl", "run", "RECIPE", "--out", folder),
            code=ErrorCode.MISSING_VALUE,
        )
    return experiment


def run_embedding(resolved: ResolvedExperiment, folder: Path, console: Console) -> EmbeddingReport:
    """Fill the teacher's feature cache next to a run's folder, on Ray.

    If a signal stops the work, an `InterruptedRunError` is raised. Features computed until then stay in the cache.

    Args:
        resolved: The experiment.
        folder: The run's folder. The cache is next to it, and nothing is written into it.
        console: Console for progress.

    Returns:
        The number of embedded images and texts, and the location and size of their features.

    Raises:
        InputError: The recipe sets `compute.storage`, the cluster does not have the requested resources, or the method
            uses no features that can be computed in advance.
    """
    from orchestrate.cluster.connect import connect
    from orchestrate.cluster.train_workers import embed

    experiment = resolved.experiment
    check_embeddable(resolved)
    if experiment.compute.storage is not None:
        raise InputError(
            "compute.storage cannot be used with `zscl embed`: the features must be in a folder that all nodes see",
            code=ErrorCode.UNSUPPORTED,
            field="compute.storage",
        )
    check_writable(folder.parent)
    connect(experiment.compute, note=lambda text: console.print(text, highlight=False))
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = tempfile.TemporaryDirectory(prefix=".embedding-", dir=folder.parent, ignore_cleanup_errors=True)
    with scratch, ProgressBar(console) as bar, handle_signals() as stop_requested:
        return embed(experiment, Path(scratch.name), RunDisplay(experiment, bar), stop_requested)


def _load_finished(resolved: ResolvedExperiment, folder: Path, console: Console, offline: bool) -> Result | None:
    """Load the result of a run if the run is finished, and print that there is nothing to do.

    Returns:
        The result; `None` if the run is not finished.

    Raises:
        InputError: The folder holds another run, or the result of another run.
    """
    preflight.check_run_folder_is_same(resolved, folder)
    if not (folder / RESULT).is_file():
        return None
    result = load_result(folder)
    if result.fingerprint != resolved.fingerprint:
        raise InputError(
            f"{folder / RESULT}: found the result of another run (fingerprint {result.fingerprint}), expected "
            f"{resolved.fingerprint}; remove the file, or choose another folder",
            code=ErrorCode.OTHER_RUN,
        )
    console.print(f"{folder}: finished before, nothing to do", highlight=False)
    if result.method != resolved.experiment.method.name:  # the name is not part of the fingerprint
        console.print(
            f"{folder}: the recipe calls the method '{resolved.experiment.method.name}', but the result keeps the name "
            f"'{result.method}' with which it was computed",
            highlight=False,
            soft_wrap=True,
        )
    state = read_state(folder)
    if not offline and state is not None and state.status != "FINISHED":  # the process was killed after its last step
        sync = shell_command("zscl", "sync", folder)
        console.print(
            f"MLflow may lack the last records of this run; send them with: {sync}", highlight=False, soft_wrap=True
        )
    return result


def _run(
    resolved: ResolvedExperiment, folder: Path, console: Console, offline: bool, background_pull: BackgroundPull
) -> Result:
    # Importing Ray takes seconds, so it is imported only if there is something to run.
    from orchestrate.cluster.train_workers import train

    experiment = resolved.experiment
    for warning in preflight.collect_warnings(resolved):
        console.print(f"warning: {warning}", highlight=False, soft_wrap=True)
    preflight.check_output_folders(experiment, folder)
    preflight.check_disk(resolved, folder)
    connect_cluster(experiment, folder, console)
    bar = ProgressBar(console, total=sum(map(experiment.stage_steps, experiment.tasks)) or None)
    with handle_signals() as stop_requested:
        uploader = None if offline else _start_uploader(resolved, folder, console)
        with record_outcome(folder, uploader):
            write_experiment(experiment, folder / EXPERIMENT)
            write_state(folder, "RUNNING")
            with bar, background_pull():
                result = train(experiment, folder, RunDisplay(experiment, bar), stop_requested)
    return result


def _start_uploader(resolved: ResolvedExperiment, folder: Path, console: Console) -> "JournalUploader":
    from orchestrate.tracking.uploader import JournalUploader  # importing MLflow takes seconds

    note = partial(console.print, highlight=False, soft_wrap=True)
    return JournalUploader(resolved.experiment, resolved.fingerprint, folder, note)


def plan_run(resolved: ResolvedExperiment, folder: Path, console: Console, offline: bool = False) -> dict[str, object]:
    """Describe a run and check its requirements, without starting the run.

    If a check fails, an `InputError` is raised.

    Args:
        resolved: The experiment.
        folder: The run's folder.
        console: Console for messages.
        offline: Whether the run would not be recorded in MLflow.

    Returns:
        The plan, the outcomes of the checks, and, if a cluster is specified, its resources.
    """
    from orchestrate.runs import dry_run

    plan, cluster = preflight.plan(resolved, folder), dict[str, float]()

    def connect() -> dict[str, float]:
        cluster.update(connect_cluster(resolved.experiment, folder, console))
        return cluster

    checklist = dry_run.check_run(resolved, folder, offline, connect)
    checklist.raise_on_failure(console.print)
    return {**plan, **({"cluster": cluster} if cluster else {}), "checked": checklist.lines}


def connect_cluster(experiment: Experiment, folder: Path, console: Console) -> dict[str, float]:
    """Connect to the Ray cluster. Check its resources, and that all nodes share the parent folder of the run.

    Args:
        experiment: The experiment.
        folder: The run's folder.
        console: Console for messages.

    Returns:
        Mapping from `nodes`, `CPU` and `GPU` to their number in the cluster.
    """
    import ray

    from orchestrate.cluster.connect import check_resources, check_shared_folder, connect

    connect(experiment.compute, note=lambda text: console.print(text, highlight=False))
    check_resources(experiment.compute)
    if experiment.compute.storage is None:
        check_shared_folder(folder.parent)
    resources = ray.cluster_resources()
    return {"nodes": len(ray.nodes()), **{kind: resources[kind] for kind in ("CPU", "GPU") if kind in resources}}
