"""Progress of a run: a progress bar with the remaining time on a terminal, or lines of text in a log."""

import time

from pydantic import BaseModel
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from schemas.events import (
    ImagesEmbedded,
    Note,
    RowMeasured,
    StageStarted,
    StepsTaken,
    TaskEvaluated,
    WorkersUsed,
)
from schemas.experiment import Experiment

LOG_INTERVAL_SECONDS = 15.0
# The speed is averaged over many minutes, because evaluations interrupt the steps.
SPEED_WINDOW_SECONDS = 1800.0


class ProgressBar:
    """Shows the number of finished steps, the total number and the remaining time.

    If the console is not a terminal, at most one line of text is printed every `LOG_INTERVAL_SECONDS`.

    Attributes:
        console: The console. It writes to standard error, because standard output is reserved for results.
        total: Total number of steps; `None` if it is not known.
        done: Number of finished steps.
    """

    def __init__(self, console: Console, total: int | None = None) -> None:
        self.console, self.total, self.done = console, total, 0
        self._first_done: int | None = None  # a resumed run does not start at 0
        self._start_time = self._last_logged = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("·"),
            TimeElapsedColumn(),
            TextColumn("· left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_interactive,
            speed_estimate_period=SPEED_WINDOW_SECONDS,
        )
        self._task = self._bar.add_task("starting", total=total)
        self._secondary: TaskID | None = None

    def __enter__(self) -> "ProgressBar":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, description: str, done: int, total: int | None = None, detail: str = "") -> None:
        """Show the number of finished steps.

        Args:
            description: Description of the current work.
            done: Number of finished steps.
            total: Total number of steps; default: the previous total.
            detail: Text that is appended to the line in a log but not shown on a terminal, for example the losses.
        """
        self.done, self.total = done, total or self.total
        self._bar.update(self._task, description=description, completed=done, total=self.total)
        self._first_done = done if self._first_done is None else self._first_done
        if self._is_log_due() and done > self._first_done and self.total:
            seconds_per_step = (time.monotonic() - self._start_time) / (done - self._first_done)
            minutes = seconds_per_step * (self.total - done) / 60
            text = f"{description}: {done} of {self.total} steps in all, about {minutes:.1f} min left  {detail}"
            self.log(text.rstrip())

    def update_secondary(self, description: str, done: int, total: int) -> None:
        """Show the progress of concurrent work on a second bar, until the work is finished."""
        if self._secondary is None:
            self._secondary = self._bar.add_task(description, total=total)
        self._bar.update(self._secondary, completed=done)
        if done >= total:
            self._bar.remove_task(self._secondary)
            self._secondary = None
        if self._is_log_due():
            self.log(f"{description}: {done} of {total}")

    def log(self, text: str) -> None:
        """Print a line if the console is not a terminal, which would show the bar instead."""
        self._last_logged = time.monotonic()
        if not self.console.is_interactive:
            self.print(text)

    def print(self, text: str) -> None:
        """Print a line. On a terminal, the line appears above the bar."""
        self.console.print(text, highlight=False, soft_wrap=True)

    def _is_log_due(self) -> bool:
        return time.monotonic() - self._last_logged >= LOG_INTERVAL_SECONDS


class RunDisplay:
    """Shows the events of a run on a progress bar.

    Attributes:
        bar: The progress bar.
        steps: Number of steps of each stage.
    """

    def __init__(self, experiment: Experiment, bar: ProgressBar) -> None:
        self.bar = bar
        self.steps = [experiment.stage_steps(task) for task in experiment.tasks]
        self._usage = ""

    def __call__(self, event: BaseModel) -> None:
        """Show an event of the run."""
        match event:
            case Note():
                self.bar.print(event.text)
            case ImagesEmbedded():
                self.bar.update_secondary("the teacher embeds images", event.done, event.total)
            case StageStarted():
                description = f"{self._stage_label(event.stage)} {event.task}"
                self.bar.log(f"{description}: {event.steps} steps")
                self.bar.update(description, self._steps_before(event.stage))
            case StepsTaken():
                last = event.steps[-1]
                losses = "  ".join(f"{name} {value:.3f}" for name, value in last.losses.items())
                self.bar.update(
                    f"{self._stage_label(event.stage)} {event.task}",
                    self._steps_before(event.stage) + last.step + 1,
                    detail=f"{event.images_per_second:.0f} images/s{self._usage}  {losses}",
                )
            case WorkersUsed():
                self._usage = f" ({_describe_usage(event)})"
            case TaskEvaluated():
                self.bar.update(f"{self._stage_label(event.stage)}: evaluating {event.task}", self.bar.done)
            case RowMeasured():
                cells = "  ".join(f"{task} {100 * value:.1f}" for task, value in event.accuracy.items())
                self.bar.print(f"{self._stage_label(event.stage)}: {cells}")

    def _stage_label(self, stage: int) -> str:
        return f"stage {stage}/{len(self.steps)}" if stage else "zero-shot"

    def _steps_before(self, stage: int) -> int:
        return sum(self.steps[: stage - 1])


def _describe_usage(event: WorkersUsed) -> str:
    """Summarize resource use: throughput by worker, and the maximum over workers of loader waits and memory use."""
    images = " + ".join(f"{worker.images_per_second:.0f}" for worker in event.workers)
    waits = 100 * max(worker.loader_wait_share for worker in event.workers)
    memory = max(worker.memory_megabytes for worker in event.workers)
    gpus = [worker.gpu_memory_megabytes for worker in event.workers if worker.gpu_memory_megabytes is not None]
    gpu = f", {max(gpus):.0f} MB of GPU" if gpus else ""
    by_worker = f"by worker {images}, " if len(event.workers) > 1 else ""
    return f"{by_worker}waits for data {waits:.0f} %, {memory:.0f} MB{gpu}"


def format_value(value: object) -> str:
    """Format a value for display. A float gets three significant digits."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
