"""Progress of one run, for people: a bar with the time left on a terminal, lines in a log."""

import time

from pydantic import BaseModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from schemas.experiment import Experiment
from schemas.results import Note, RowMeasured, StageStarted, StageTrained, StepsTaken, TaskEvaluated

LINE_EVERY_SECONDS = 15.0
# Evaluations interrupt the steps: the time left is judged by the speed over many minutes.
SPEED_OVER_SECONDS = 1800.0


class Display:
    """Shows progress on standard error, so that standard output holds results alone."""

    def __init__(self, experiment: Experiment, console: Console) -> None:
        self.console = console
        self.stages = len(experiment.tasks)
        self.total = sum(map(experiment.stage_steps, experiment.tasks))
        self.stage_steps = [experiment.stage_steps(task) for task in experiment.tasks]
        self.done = self.done_before = 0
        self.started = self.spoken = time.monotonic()
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps ·"),
            TimeElapsedColumn(),
            TextColumn("· left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            speed_estimate_period=SPEED_OVER_SECONDS,
        )
        self.task = self.bar.add_task("starting", total=self.total or None)

    def __enter__(self) -> "Display":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def __call__(self, progress: BaseModel) -> None:
        """Show one piece of progress."""
        match progress:
            case Note():
                self.console.print(progress.text, highlight=False)
            case StageStarted():
                self.done_before = sum(self.stage_steps[: progress.stage - 1])
                self._say(f"stage {progress.stage}/{self.stages} {progress.task}: training, {progress.steps} steps")
                self._update(f"stage {progress.stage}/{self.stages} {progress.task}", self.done_before)
            case StepsTaken():
                self._steps(progress)
            case StageTrained():
                result = progress.result
                self._update(f"stage {result.stage}/{self.stages} {result.task}", self.done_before + result.steps)
            case TaskEvaluated():
                where = f"stage {progress.stage}/{self.stages}" if progress.stage else "zero-shot"
                self._update(f"{where}: evaluating {progress.task}", self.done)
            case RowMeasured():
                where = f"after stage {progress.stage}" if progress.stage else "zero-shot"
                cells = "  ".join(f"{task} {100 * value:.1f}" for task, value in progress.accuracy.items())
                self.console.print(f"{where}: {cells}", highlight=False)

    def _steps(self, taken: StepsTaken) -> None:
        done = self.done_before + taken.steps[-1].step + 1
        losses = "  ".join(f"{name} {value:.3f}" for name, value in taken.steps[-1].losses.items())
        self._update(f"stage {taken.stage}/{self.stages} {taken.task}", done)
        if time.monotonic() - self.spoken >= LINE_EVERY_SECONDS:
            left = (time.monotonic() - self.started) * (self.total - done) / done
            self._say(
                f"stage {taken.stage}/{self.stages} {taken.task}: step {done} of {self.total}, "
                f"{taken.images_per_second:.0f} images/s, about {left / 60:.1f} min left  {losses}"
            )

    def _update(self, description: str, done: int) -> None:
        self.done = done
        self.bar.update(self.task, description=description, completed=done)

    def _say(self, line: str) -> None:
        """A line for logs; the bar says it on a terminal."""
        self.spoken = time.monotonic()
        if not self.console.is_terminal:
            self.console.print(line, highlight=False)
