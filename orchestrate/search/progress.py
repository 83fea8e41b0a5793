"""Progress of a search."""

from itertools import accumulate

from pydantic import BaseModel

from orchestrate.runs.progress import ProgressBar, _short
from orchestrate.search.results import utility
from schemas.events import (
    RowMeasured,
    StageTrained,
    StepsTaken,
)
from schemas.experiment import Experiment
from schemas.search import Search, TrialEnded, TrialNews, TrialStarted


class SearchDisplay:
    """Shows a search's progress on a bar: steps of all trials, which of them run, and the best so far.

    running: the numbers of the trials that run.
    """

    def __init__(self, search: Search, experiment: Experiment, trials: int, bar: ProgressBar) -> None:
        self.search, self.trials, self.bar = search, trials, bar
        self.tasks = [task.name for task in experiment.tasks]
        self._ends = list(accumulate(experiment.stage_steps(task) for task in experiment.tasks))
        self._steps: dict[int, int] = {}
        self._stages: dict[int, int] = {}
        self._over: set[int] = set()
        self.running: set[int] = set()
        self._best: tuple[float, int] | None = None

    def __call__(self, told: TrialNews) -> None:
        """Show what a trial reports."""
        number, news = told.trial, told.news
        if number == 0:
            self._judge_on_test(news)
            return
        match news:
            case TrialStarted():
                self.running.add(number)
                values = ", ".join(f"{path.rpartition('.')[2]} {_short(value)}" for path, value in news.values.items())
                self.bar.say(f"trial {number}: {values}{' (finished before)' if news.read else ''}")
            case StepsTaken():
                self._done(number, self._ends[news.stage - 1] - self._in(news.stage) + news.steps[-1].step + 1)
            case StageTrained():
                self._done(number, self._ends[news.result.stage - 1])
            case RowMeasured():
                self._stages[number] = news.stage
            case TrialEnded():
                self._end(number, news)

    def _in(self, stage: int) -> int:
        return self._ends[stage - 1] - (self._ends[stage - 2] if stage > 1 else 0)

    def _done(self, number: int, steps: int) -> None:
        self._steps[number] = steps
        best = "" if self._best is None else f", best {self._named(self._best[0])} (trial {self._best[1]})"
        running = ", ".join(map(str, sorted(self.running)))
        stages = f"{sum(self._stages.values())}/{self.trials * len(self.tasks)} stages"
        what = f"{len(self._over)}/{self.trials} trials, {stages}, at work: {running or 'none'}{best}"
        self.bar.update(what, sum(self._steps.values()))

    def _end(self, number: int, end: TrialEnded) -> None:
        self.running.discard(number)
        if end.status == "interrupted":
            return
        self._over.add(number)
        figures = ", ".join(f"{name} {100 * value:.1f}" for name, value in end.objectives.items())
        if end.status in ("finished", "read"):
            goodness = utility(end.objectives)
            self._best = max(self._best or (goodness, -number), (goodness, number))
        said = {"stopped": f"given up early behind stage {end.stages}", "failed": f"failed: {end.reason}"}
        self._stages[number] = len(self.tasks)  # none of it is left
        self.bar.say(f"trial {number}: {said.get(end.status, end.status)}{f', {figures}' if figures else ''}")
        self._done(number, self._ends[-1])

    def _named(self, goodness: float) -> str:
        several = len(self.search.objectives) > 1
        name = "mean of the objectives" if several else self.search.objectives[0]
        return f"{name} {100 * abs(goodness):.1f}"

    def _judge_on_test(self, news: BaseModel) -> None:
        if isinstance(news, RowMeasured):
            where = f"stage {news.stage}/{len(self.tasks)}" if news.stage else "zero-shot"
            cells = "  ".join(f"{task} {100 * value:.1f}" for task, value in news.accuracy.items())
            self.bar.say(f"the chosen trial on the test images, {where}: {cells}")
