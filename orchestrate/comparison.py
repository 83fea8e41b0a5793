"""Runs read to be compared: by method, over seeds and orders; what is not alike is marked and never averaged in."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from statistics import fmean, stdev

import numpy as np
from scipy.stats import bootstrap

from orchestrate import report
from orchestrate.report import label_of
from schemas.base import InputError
from schemas.results import Result

RESAMPLES, CONFIDENCE = 10_000, 0.95


@dataclass(frozen=True)
class Compared:
    """A run in a comparison.

    name: its folder's; label: its method; mark: what sets it apart from the first run, if anything.
    """

    name: str
    folder: Path
    result: Result
    mark: str

    @property
    def label(self) -> str:
        """What its group is called."""
        return label_of(self.result) + (f" [{self.mark}]" if self.mark else "")

    @property
    def order(self) -> str:
        """The order of its tasks."""
        return ", ".join(task.name for task in self.result.tasks)

    @property
    def figures(self) -> dict[str, float | None]:
        """Of its accuracy matrix, as fractions."""
        matrix = self.result.accuracy_matrix
        learned = fmean(row[stage] for stage, row in enumerate(matrix))
        return {**self.result.metrics.model_dump(), "learned": learned}


@dataclass(frozen=True)
class Summary:
    """A figure of a group: mean, standard deviation over its runs (none of one alone), and how many these are."""

    mean: float
    deviation: float | None
    runs: int


@dataclass(frozen=True)
class Difference:
    """A group against another, over the runs of both that have the same seed and order: mean and 95 % interval.

    The interval is of the mean, by bootstrap over the pairs; none of one pair alone.
    """

    mean: float
    interval: tuple[float, float] | None
    pairs: int


@dataclass(frozen=True)
class Comparison:
    """Runs that were compared, and those that were not, with the reason."""

    runs: tuple[Compared, ...]
    left_out: Mapping[str, str]

    @property
    def groups(self) -> dict[str, list[Compared]]:
        """The runs by method, in the order in which they were given."""
        grouped: dict[str, list[Compared]] = {}
        for run in self.runs:
            grouped.setdefault(run.label, []).append(run)
        return grouped

    @property
    def tasks(self) -> list[str]:
        """In the first run's order."""
        return [task.name for task in self.runs[0].result.tasks]

    def summary(self, label: str, figure: str) -> Summary | None:
        """A group's figure; none where a single task leaves it undefined."""
        values = [run.figures[figure] for run in self.groups[label]]
        return summary_of([value for value in values if value is not None])

    def difference(self, label: str, baseline: str, figure: str) -> Difference | None:
        """A group's figure against a baseline's, over pairs of runs."""
        theirs = {(run.order, run.result.seed): run.figures[figure] for run in self.groups[baseline]}
        pairs = [
            ours - other
            for run in self.groups[label]
            if (ours := run.figures[figure]) is not None
            and (other := theirs.get((run.order, run.result.seed))) is not None
        ]
        return difference_of(pairs)


def summary_of(values: Sequence[float]) -> Summary | None:
    """Mean and standard deviation."""
    if not values:
        return None
    return Summary(fmean(values), stdev(values) if len(values) > 1 else None, len(values))


def difference_of(pairs: Sequence[float]) -> Difference | None:
    """Mean of paired differences, with its bootstrap interval (percentiles, seeded)."""
    if not pairs:
        return None
    if len(pairs) == 1:
        return Difference(pairs[0], None, 1)
    if len(set(pairs)) == 1:  # nothing to resample
        return Difference(pairs[0], (pairs[0], pairs[0]), len(pairs))
    found = bootstrap(
        (np.array(pairs),), np.mean, n_resamples=RESAMPLES, confidence_level=CONFIDENCE, method="percentile",
        rng=np.random.default_rng(0),
    )  # fmt: skip
    low, high = found.confidence_interval
    return Difference(fmean(pairs), (float(low), float(high)), len(pairs))


def gather(found: Mapping[str, Path | InputError]) -> Comparison:
    """Read runs and see which of them can be compared; the first one is what the others are held against.

    Args:
        found: by what the user gave: a run's folder, or why there is none.

    Raises:
        InputError: nothing is left to compare; each reason is named.
    """
    runs: list[Compared] = []
    left_out: dict[str, str] = {}
    for given, place in found.items():
        try:
            if isinstance(place, InputError):
                raise place
            result = report.load_result_so_far(place)
            if runs:
                _refuse_other_tasks(result, runs[0].result, given)
            mark = _mark(result, runs[0].result) if runs else ""
            runs.append(_told_apart(Compared(place.name, place, result, mark), runs))
        except InputError as error:
            left_out[given] = str(error)
    if not runs:
        raise InputError("\n".join(left_out.values()))
    return Comparison(tuple(runs), left_out)


def _refuse_other_tasks(result: Result, first: Result, given: str) -> None:
    found, expected = ({task.name for task in each.tasks} for each in (result, first))
    if found != expected:
        names = ", ".join(task.name for task in result.tasks)
        raise InputError(
            f"{given}: found the tasks {names}, expected those of the first run: {', '.join(sorted(expected))}"
        )


def _told_apart(run: Compared, others: Sequence[Compared]) -> Compared:
    """The run, marked where its group has its seed and order already: it is no further sample of its method."""
    of_key = {(other.label, other.order, other.result.seed): other for other in others}
    while other := of_key.get((run.label, run.order, run.result.seed)):
        again = f"same seed and order as {other.name}"
        run = replace(run, mark="; ".join(filter(None, (run.mark, again))))
    return run


def _mark(result: Result, first: Result) -> str:
    """What makes a run's figures no measure of its method beside the first run's."""
    marks = [
        f"{path.removeprefix('optimisation.').removeprefix('tasks.')}={json.dumps(value)}"
        for path, value in result.settings.items()
        if path in first.settings and first.settings[path] != value  # the first run's method may not read it
    ]
    if result.model_digest and first.model_digest and result.model_digest != first.model_digest:
        marks.append(f"model {PurePosixPath(result.model).name}")
    if len(result.accuracy_matrix) < len(result.tasks):
        marks.append(f"{len(result.accuracy_matrix)} of {len(result.tasks)} stages")
    theirs = {task.name: task for task in first.tasks}
    for what in ("digest", "split_family"):
        others = [t.name for t in result.tasks if getattr(t, what) != getattr(theirs[t.name], what)]
        if others:
            named = "data" if what == "digest" else "split"
            marks.append(f"other {named} in {', '.join(others)}")
    if result.templates != first.templates:
        marks.append(f"templates {result.templates}")
    if result.reference and first.reference and result.reference != first.reference:
        marks.append("other reference set")
    if result.held_out != first.held_out:
        marks.append("judged on held-out images" if result.held_out else "judged on all test images")
    return "; ".join(marks)
