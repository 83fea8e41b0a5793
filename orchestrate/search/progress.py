"""Progress of a search on a terminal: steps of all trials, running trials, and the best trial so far."""

from itertools import accumulate

from pydantic import BaseModel

from orchestrate.runs.progress import ProgressBar, format_value
from orchestrate.search.results import compute_utility
from schemas.events import RowMeasured, StageTrained, StepsTaken
from schemas.experiment import Experiment
from schemas.search import Search, TrialEnded, TrialEvent, TrialStarted


class SearchDisplay:
    """Shows the progress of a search on a progress bar.

    Attributes:
        search: The search.
        trials: The number of trials of the search.
        bar: The progress bar.
        tasks: Names of the tasks.
        running: Numbers of the running trials.
    """

    def __init__(self, search: Search, experiment: Experiment, trials: int, bar: ProgressBar) -> None:
        self.search, self.trials, self.bar = search, trials, bar
        self.tasks = [task.name for task in experiment.tasks]
        self.running: set[int] = set()
        self._steps_until = [0, *accumulate(experiment.stage_steps(task) for task in experiment.tasks)]
        self._steps: dict[int, int] = {}
        self._stages: dict[int, int] = {}
        self._ended: set[int] = set()
        self._best: tuple[float, int] | None = None  # utility and number of the best trial

    def __call__(self, trial_event: TrialEvent) -> None:
        """Show an event of a trial, or of the evaluation of the chosen trial on the test images (trial number 0)."""
        number, event = trial_event.trial, trial_event.news
        if number == 0:
            self._show_test_row(event)
            return
        match event:
            case TrialStarted():
                self.running.add(number)
                values = ", ".join(
                    f"{path.rpartition('.')[2]} {format_value(value)}" for path, value in event.values.items()
                )
                self.bar.print(f"trial {number}: {values}{' (finished before)' if event.read else ''}")
            case StepsTaken():
                self._show_steps(number, self._steps_until[event.stage - 1] + event.steps[-1].step + 1)
            case StageTrained():
                self._show_steps(number, self._steps_until[event.result.stage])
            case RowMeasured():
                self._stages[number] = event.stage
            case TrialEnded():
                self._end(number, event)

    def _show_steps(self, number: int, steps: int) -> None:
        self._steps[number] = steps
        best = "" if self._best is None else f", best {self._format_utility(self._best[0])} (trial {self._best[1]})"
        running = ", ".join(map(str, sorted(self.running)))
        stages = f"{sum(self._stages.values())}/{self.trials * len(self.tasks)} stages"
        ended = f"{len(self._ended)}/{self.trials} trials"
        self.bar.update(f"{ended}, {stages}, running: {running or 'none'}{best}", sum(self._steps.values()))

    def _end(self, number: int, end: TrialEnded) -> None:
        self.running.discard(number)
        if end.status == "interrupted":
            return
        self._ended.add(number)
        figures = ", ".join(f"{name} {100 * value:.1f}" for name, value in end.objectives.items())
        if end.status in ("finished", "read"):
            trial = (compute_utility(end.objectives), number)
            self._best = max(self._best or trial, trial)
        outcomes = {"stopped": f"stopped early after stage {end.stages}", "failed": f"failed: {end.reason}"}
        self._stages[number] = len(self.tasks)  # a stopped or failed trial runs no more stages
        self.bar.print(f"trial {number}: {outcomes.get(end.status, end.status)}{f', {figures}' if figures else ''}")
        self._show_steps(number, self._steps_until[-1])

    def _format_utility(self, value: float) -> str:
        several = len(self.search.objectives) > 1
        name = "mean of the objectives" if several else self.search.objectives[0]
        return f"{name} {100 * abs(value):.1f}"

    def _show_test_row(self, event: BaseModel) -> None:
        if isinstance(event, RowMeasured):
            row = f"stage {event.stage}/{len(self.tasks)}" if event.stage else "zero-shot"
            cells = "  ".join(f"{task} {100 * value:.1f}" for task, value in event.accuracy.items())
            self.bar.print(f"the chosen trial on the test images, {row}: {cells}")
