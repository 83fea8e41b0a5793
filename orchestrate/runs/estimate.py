"""A run, begun where it would run and stopped after a minute: how fast it is, and so how long the whole would take."""

import tempfile
import time
from contextlib import suppress
from pathlib import Path
from statistics import median

from pydantic import BaseModel
from rich.console import Console

from orchestrate.lifecycle.signals import handle_signals
from orchestrate.runs.preflight import images_through_student
from orchestrate.runs.progress import ProgressBar
from schemas.errors import InputError, InterruptedRunError
from schemas.events import StepsTaken
from zscl.data.indexed import IndexedSamples
from zscl.sequence.layout import ZERO_SHOT
from zscl.sequence.resolve import ResolvedExperiment
from zscl.sequence.result import AccuracyRow
from zscl.sequence.stage_cache import SharedWork
from zscl.sequence.teacher import teacher_cache_folder

SECONDS = 60.0  # of training


def estimate_run(
    opened: ResolvedExperiment, folder: Path, console: Console, seconds: float = SECONDS
) -> dict[str, float]:
    """Measure the first task's row and train on that task for a minute, on the recipe's cluster. Returns figures.

    The teacher's features are met as they come, as in the slowest step of a run, and stay in the store beside `folder`.

    Raises:
        InputError: nothing is trained, or the cluster is not as expected.
        InterruptedRunError: a signal ended it.
    """
    from orchestrate.cluster.connect import check_resources, connect
    from orchestrate.cluster.train_workers import train

    experiment = opened.experiment
    if experiment.method.task_loss is None:
        raise InputError(f"--probe: method '{experiment.method.name}' trains nothing, expected one that does")
    if experiment.compute.storage is not None:
        raise InputError("--probe: found compute.storage, expected a folder that all nodes see")
    compute = experiment.compute.model_copy(update={"teacher_features": "as_met", "evaluation": "inline"})
    # Two tasks, for a method that looks at the others' names.
    tasks = experiment.tasks[:2] if experiment.class_incremental is None else experiment.tasks
    part = experiment.model_copy(update={"compute": compute, "tasks": tasks})
    connect(compute, note=lambda text: console.print(text, highlight=False))
    check_resources(compute)
    speeds, began = list[float](), list[float]()

    def hear(progress: BaseModel) -> None:
        if not isinstance(progress, StepsTaken):
            return
        speeds.append(progress.images_per_second)
        began.append(time.monotonic())
        bar.update("probing", round(began[-1] - began[0]), round(seconds))
        if began[-1] - began[0] >= seconds:
            interruption.ask()

    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = tempfile.TemporaryDirectory(prefix=".probe-", dir=folder.parent, ignore_cleanup_errors=True)
    with scratch, ProgressBar(console) as bar, handle_signals() as interruption:
        run = Path(scratch.name, "run")
        with suppress(InterruptedRunError):  # of a minute that is over; a signal is told below
            train(part, run, hear, interruption, SharedWork(teacher_cache_folder(folder)))
        if interruption.signal is not None:
            raise interruption.error("the probe was stopped, and gives no estimate; the same command probes anew")
        row = AccuracyRow.model_validate_json((run / ZERO_SHOT).read_text())
    training = median(speeds[1:] or speeds)  # the first steps pay for what is allocated and compiled
    evaluation = sum(row.images.values()) / row.seconds
    tests = [len(task.test) for task in opened.tasks if isinstance(task.test, IndexedSamples)]
    return {
        "training_images_per_second": round(training, 1),
        "evaluation_images_per_second": round(evaluation, 1),
        "training_minutes": round(images_through_student(experiment) / training / 60, 1),
        "evaluation_minutes": round((1 + len(opened.tasks)) * sum(tests) / evaluation / 60, 1),
    }
