"""Progress for people: a bar with the time left on a terminal, lines in a log."""

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

LINE_EVERY_SECONDS = 15.0
# Evaluations interrupt the steps: the time left is judged by the speed over many minutes.
SPEED_OVER_SECONDS = 1800.0


class ProgressBar:
    """Steps done, steps in all, and the time left; on standard error, so that standard output holds results alone."""

    def __init__(self, console: Console, total: int | None = None) -> None:
        self.console, self.total, self.done = console, total, 0
        self._first: int | None = None  # a resumed run does not begin at 0
        self._started = self._spoken = time.monotonic()
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
            speed_estimate_period=SPEED_OVER_SECONDS,
        )
        self._task = self._bar.add_task("starting", total=total)
        self._aside: TaskID | None = None

    def __enter__(self) -> "ProgressBar":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, what: str, done: int, total: int | None = None, detail: str = "") -> None:
        """Show that `done` steps are behind us."""
        self.done, self.total = done, total or self.total
        self._bar.update(self._task, description=what, completed=done, total=self.total)
        self._first = done if self._first is None else self._first
        if time.monotonic() - self._spoken >= LINE_EVERY_SECONDS and done > self._first and self.total:
            minutes = (time.monotonic() - self._started) * (self.total - done) / (done - self._first) / 60
            self.log(f"{what}: {done} of {self.total} steps in all, about {minutes:.1f} min left  {detail}".rstrip())

    def aside(self, what: str, done: int, total: int) -> None:
        """Show other work than the steps, on a bar of its own while it lasts."""
        if self._aside is None:
            self._aside = self._bar.add_task(what, total=total)
        self._bar.update(self._aside, completed=done)
        if done >= total:
            self._bar.remove_task(self._aside)
            self._aside = None
        if time.monotonic() - self._spoken >= LINE_EVERY_SECONDS:
            self.log(f"{what}: {done} of {total}")

    def log(self, line: str) -> None:
        """A line where there is no bar to say it."""
        self._spoken = time.monotonic()
        if not self.console.is_interactive:
            self.say(line)

    def say(self, line: str) -> None:
        """A line that stays."""
        self.console.print(line, highlight=False, soft_wrap=True)


class RunDisplay:
    """Shows a run's progress on a bar."""

    def __init__(self, experiment: Experiment, bar: ProgressBar) -> None:
        self.bar = bar
        self.steps = [experiment.stage_steps(task) for task in experiment.tasks]
        self._workers = ""

    def __call__(self, progress: BaseModel) -> None:
        """Show one piece of progress."""
        match progress:
            case Note():
                self.bar.say(progress.text)
            case ImagesEmbedded():
                self.bar.aside("the teacher embeds images", progress.done, progress.total)
            case StageStarted():
                self.bar.log(f"{self._where(progress.stage)} {progress.task}: {progress.steps} steps")
                self.bar.update(f"{self._where(progress.stage)} {progress.task}", self._before(progress.stage))
            case StepsTaken():
                last = progress.steps[-1]
                losses = "  ".join(f"{name} {value:.3f}" for name, value in last.losses.items())
                self.bar.update(
                    f"{self._where(progress.stage)} {progress.task}",
                    self._before(progress.stage) + last.step + 1,
                    detail=f"{progress.images_per_second:.0f} images/s{self._workers}  {losses}",
                )
            case WorkersUsed():
                self._workers = f" ({_used(progress)})"
            case TaskEvaluated():
                self.bar.update(f"{self._where(progress.stage)}: evaluating {progress.task}", self.bar.done)
            case RowMeasured():
                cells = "  ".join(f"{task} {100 * value:.1f}" for task, value in progress.accuracy.items())
                self.bar.say(f"{self._where(progress.stage)}: {cells}")

    def _where(self, stage: int) -> str:
        return f"stage {stage}/{len(self.steps)}" if stage else "zero-shot"

    def _before(self, stage: int) -> int:
        return sum(self.steps[: stage - 1])


def _used(used: WorkersUsed) -> str:
    """What the workers use, in a few words: each one's images, and the worst of the rest."""
    images = " + ".join(f"{worker.images_per_second:.0f}" for worker in used.workers)
    waits = 100 * max(worker.loader_wait_share for worker in used.workers)
    memory = max(worker.memory_megabytes for worker in used.workers)
    gpus = [worker.gpu_memory_megabytes for worker in used.workers if worker.gpu_memory_megabytes is not None]
    gpu = f", {max(gpus):.0f} MB of GPU" if gpus else ""
    by_worker = f"by worker {images}, " if len(used.workers) > 1 else ""
    return f"{by_worker}waits for data {waits:.0f} %, {memory:.0f} MB{gpu}"


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
