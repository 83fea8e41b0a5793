"""Estimate of a run's duration from one minute of training on the recipe's cluster (`zscl run --dry-run --probe`)."""

import tempfile
import time
from contextlib import suppress
from pathlib import Path
from statistics import median

from pydantic import BaseModel
from rich.console import Console

from orchestrate.lifecycle.signals import handle_signals
from orchestrate.runs.preflight import count_student_images
from orchestrate.runs.progress import ProgressBar
from schemas.errors import ErrorCode, InputError, InterruptedRunError
from schemas.events import StepsTaken
from zscl.data.indexed import IndexedSamples
from zscl.sequence.layout import ZERO_SHOT, teacher_cache_folder
from zscl.sequence.resolve import ResolvedExperiment
from zscl.sequence.result import AccuracyRow
from zscl.sequence.stage_cache import SharedWork

PROBE_SECONDS = 60.0  # duration of the training


def estimate_run(
    resolved: ResolvedExperiment, folder: Path, console: Console, seconds: float = PROBE_SECONDS
) -> dict[str, float]:
    """Measure throughput by evaluating the initial model and training on the first task, and estimate the duration.

    The teacher's features that are not in the feature cache next to `folder` are computed during training, as in the
    slowest steps of a run, and are stored in the cache.

    Args:
        resolved: The experiment.
        folder: The run's folder; nothing is written into it.
        console: Console for progress.
        seconds: Duration of the training, in seconds.

    Returns:
        Mapping from `training_images_per_second`, `evaluation_images_per_second`, `training_minutes` and
        `evaluation_minutes` to their values. The minutes are those of the complete run.

    Raises:
        InputError: The method trains nothing, the recipe sets `compute.storage`, or the cluster does not have the
            resources that the recipe requests.
        InterruptedRunError: A signal stopped the probe.
    """
    from orchestrate.cluster.connect import check_resources, connect
    from orchestrate.cluster.train_workers import train

    experiment = resolved.experiment
    if experiment.method.task_loss is None:
        message = f"--probe: method '{experiment.method.name}' trains nothing, expected a method that trains"
        raise InputError(message, code=ErrorCode.UNSUPPORTED, field="--probe")
    if experiment.compute.storage is not None:
        message = "--probe cannot be used with compute.storage. Use a folder that all nodes see"
        raise InputError(message, code=ErrorCode.UNSUPPORTED, field="--probe")
    compute = experiment.compute.model_copy(update={"teacher_features": "as_met", "evaluation": "inline"})
    # Some methods need the class names of a second task.
    tasks = experiment.tasks[:2] if experiment.class_incremental is None else experiment.tasks
    probe = experiment.model_copy(update={"compute": compute, "tasks": tasks})
    connect(compute, note=lambda text: console.print(text, highlight=False))
    check_resources(compute)
    speeds, times = list[float](), list[float]()

    def on_event(event: BaseModel) -> None:
        if not isinstance(event, StepsTaken):
            return
        speeds.append(event.images_per_second)
        times.append(time.monotonic())
        elapsed = times[-1] - times[0]
        bar.update("probing", round(elapsed), round(seconds))
        if elapsed >= seconds:
            stop_requested.request()

    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = tempfile.TemporaryDirectory(prefix=".probe-", dir=folder.parent, ignore_cleanup_errors=True)
    with scratch, ProgressBar(console) as bar, handle_signals() as stop_requested:
        run = Path(scratch.name, "run")
        with suppress(InterruptedRunError):  # raised when the time is over
            train(probe, run, on_event, stop_requested, SharedWork(teacher_cache_folder(folder)))
        if stop_requested.signal is not None:
            message = "the probe was stopped before it gave an estimate; the same command starts a new probe"
            raise stop_requested.to_error(message)
        row = AccuracyRow.model_validate_json((run / ZERO_SHOT).read_text())
    training = median(speeds[1:] or speeds)  # the first steps include allocation and compilation
    evaluation = sum(row.images.values()) / row.seconds
    test_images = sum(len(task.test) for task in resolved.tasks if isinstance(task.test, IndexedSamples))
    return {
        "training_images_per_second": round(training, 1),
        "evaluation_images_per_second": round(evaluation, 1),
        "training_minutes": round(count_student_images(experiment) / training / 60, 1),
        "evaluation_minutes": round((1 + len(resolved.tasks)) * test_images / evaluation / 60, 1),
    }
