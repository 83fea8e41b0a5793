"""Runs read to be compared: by method, over seeds and orders; what is not alike is marked and never averaged in."""

import json
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from statistics import fmean, stdev

from scipy.stats import ttest_1samp

from orchestrate.reports.results import CUSTOM_LOSS_PREFIX, format_change, load_partial_result, format_method
from schemas.errors import InputError
from schemas.results import Result
from zscl.sequence.result import describe_algorithm

CONFIDENCE = 0.95
ROUNDING_TOLERANCE = 1e-9  # of an accuracy: differences that lie closer together are equal


@dataclass(frozen=True)
class ComparedRun:
    """A run in a comparison.

    Attributes:
        name: its folder's, with the folders above it where another run's folder has the same name.
        folder: the run's.
        result: what it came to.
        method: its name, with what tells it apart from another method of that name.
        mark: what sets it apart from the first run, if anything.
    """

    name: str
    folder: Path
    result: Result
    method: str
    mark: str = ""

    @property
    def label(self) -> str:
        """What its group is called."""
        return self.method + (f" [{self.mark}]" if self.mark else "")

    @property
    def order(self) -> str:
        """The order of its tasks."""
        return ", ".join(task.name for task in self.result.tasks)

    @property
    def metrics(self) -> dict[str, float | None]:
        """Of its accuracy matrix, as fractions."""
        matrix = self.result.accuracy_matrix
        learned = fmean(row[stage] for stage, row in enumerate(matrix))
        return {**self.result.metrics.model_dump(), "learned": learned}


@dataclass(frozen=True)
class MeanOverRuns:
    """A figure of a group over its runs.

    Attributes:
        mean: over the runs.
        deviation: sample standard deviation (n - 1); none of one run.
        runs: n.
    """

    mean: float
    deviation: float | None
    runs: int


@dataclass(frozen=True)
class Difference:
    """A figure of a group minus a baseline's, paired: both runs of a pair have the same seed and task order.

    Pairs that share a seed are not independent, and neither are pairs that share an order. So the sample is either the
    seeds or the orders, whichever there are more of, and pairs that share one are averaged before.

    Attributes:
        mean: over the sample.
        interval: 95 % confidence interval of the mean (paired t); none where the sample is of one, or where all its
            differences are equal: then nothing says how far the mean would be from that of other runs.
        pairs: runs of the group that have a partner.
        size: of the sample.
        unit: what the sample is of: `seeds` or `orders`.
    """

    mean: float
    interval: tuple[float, float] | None
    pairs: int
    size: int
    unit: str


@dataclass(frozen=True)
class Comparison:
    """Runs that were compared, and those that were not, with the reason."""

    runs: tuple[ComparedRun, ...]
    excluded: Mapping[str, str]

    @property
    def groups(self) -> dict[str, list[ComparedRun]]:
        """The runs by method, in the order in which they were given."""
        grouped: dict[str, list[ComparedRun]] = {}
        for run in self.runs:
            grouped.setdefault(run.label, []).append(run)
        return grouped

    @property
    def tasks(self) -> list[str]:
        """In the first run's order."""
        return [task.name for task in self.runs[0].result.tasks]

    @property
    def default_baseline(self) -> str | None:
        """What differences are from by default: `finetune`, else `zero-shot`, else the first; none without others."""
        labels = list(self.groups)
        if len(labels) == 1:
            return None
        return next((label for label in DEFAULT_BASELINES if label in labels), labels[0])

    def summary(self, label: str, metric: str) -> MeanOverRuns | None:
        """A group's figure; none where a single task leaves it undefined."""
        values = [run.metrics[metric] for run in self.groups[label]]
        return summarize([value for value in values if value is not None])

    def zero_shot(self, metric: str) -> float | None:
        """The initial model's figure: the mean over the runs that are like the first one (orders may differ)."""
        alike = [run for run in self.runs if not run.mark] or self.runs[:1]
        found = [getattr(run.result.zero_shot_metrics, metric) for run in alike]
        return None if None in found else fmean(found)

    def difference(self, label: str, baseline: str, metric: str) -> Difference | None:
        """A group's figure against a baseline's, over pairs of runs; none where no two runs make a pair."""
        theirs = {(run.order, run.result.seed): run.metrics[metric] for run in self.groups[baseline]}
        pairs = [
            (run.result.seed, run.order, ours - other)
            for run in self.groups[label]
            if (ours := run.metrics[metric]) is not None
            and (other := theirs.get((run.order, run.result.seed))) is not None
        ]
        by_seed, by_order = (_means((pair[index], pair[2]) for pair in pairs) for index in (0, 1))
        sample, unit = (by_seed, "seeds") if len(by_seed) >= len(by_order) else (by_order, "orders")
        if not sample:
            return None
        return Difference(fmean(sample), paired_interval(sample), len(pairs), len(sample), unit)


DEFAULT_BASELINES = ("finetune", "zero-shot")


def summarize(values: Sequence[float]) -> MeanOverRuns | None:
    """Mean and standard deviation."""
    if not values:
        return None
    return MeanOverRuns(fmean(values), stdev(values) if len(values) > 1 else None, len(values))


def _means(values: Iterator[tuple[Hashable, float]]) -> list[float]:
    """Return the mean of the values of each key."""
    found: dict[Hashable, list[float]] = {}
    for key, value in values:
        found.setdefault(key, []).append(value)
    return [fmean(each) for each in found.values()]


def paired_interval(differences: Sequence[float]) -> tuple[float, float] | None:
    """Compute the 95 % confidence interval of the mean of independent paired differences.

    It is the paired t interval, that of `scipy.stats.ttest_rel`: exact for normal differences, at any number of pairs.

    Args:
        differences: one a pair.

    Returns:
        Its ends, or `None` of fewer than two pairs, of equal differences, and of what is not finite.
    """
    if not all(map(math.isfinite, differences)):
        return None
    if len(differences) < 2 or max(differences) - min(differences) <= ROUNDING_TOLERANCE:
        return None
    low, high = ttest_1samp(differences, 0.0).confidence_interval(CONFIDENCE)
    return float(low), float(high)


def group_runs(sources: Mapping[str, Path | InputError]) -> Comparison:
    """Read runs and see which of them can be compared; the first one is what the others are held against.

    Args:
        found: by what the user gave: a run's folder, or why there is none.

    Raises:
        InputError: nothing is left to compare; each reason is named.
    """
    results: dict[Path, Result] = {}
    given_as: dict[Path, str] = {}
    left_out: dict[str, str] = {}
    for given, place in sources.items():
        try:
            if isinstance(place, InputError):
                raise place
            if (same := given_as.setdefault(place.resolve(), given)) != given:
                raise InputError(f"{given}: found the run that was given as {same}, too; it counts once")
            result = load_partial_result(place)
            if results:
                _refuse_other_tasks(result, next(iter(results.values())), given)
            results[place] = result
        except InputError as error:
            left_out[given] = str(error)
    if not results:
        raise InputError("\n".join(left_out.values()))
    runs: list[ComparedRun] = []
    names, labels, expected = _names(list(results)), _labels(list(results.values())), _Expected()
    for (folder, result), name, label in zip(results.items(), names, labels, strict=True):
        runs.append(_told_apart(ComparedRun(name, folder, result, label, expected.mark(result)), runs))
    return Comparison(tuple(runs), left_out)


def _names(folders: Sequence[Path]) -> list[str]:
    """Name each run by its folder, with as many folders above it as tell it apart from the others."""

    def name(folder: Path, depth: int = 1) -> str:
        parts = folder.parts[-depth:]
        alike = sum(other.parts[-depth:] == parts for other in folders)
        return str(PurePosixPath(*parts)) if alike == 1 or depth >= len(folder.parts) else name(folder, depth + 1)

    return list(map(name, folders))


def _labels(results: Sequence[Result]) -> list[str]:
    """Label each run by its method; of methods of one name with other settings, add the settings that differ."""
    labels = []
    for result in results:
        label = format_method(result)
        alike = [other for other in results if format_method(other) == label]
        recorded = all(other.method_settings for other in alike)  # not by older runs
        settings = [other.method_settings if recorded else other.method_changes for other in alike]
        own = result.method_settings if recorded else result.method_changes
        added = [format_change(path, value) for path, value in own.items() if _differs(path, settings)]
        labels.append(f"{label} ({', '.join(added)})" if added else label)
    return labels


def _differs(path: str, settings: Sequence[Mapping[str, object]]) -> bool:
    """Whether a setting tells methods apart: its values differ, or it is a part that only some have."""
    having = [each[path] for each in settings if path in each]
    is_part = None in having or path.startswith(CUSTOM_LOSS_PREFIX)
    return any(value != having[0] for value in having) or (is_part and len(having) < len(settings))


def _refuse_other_tasks(result: Result, first: Result, given: str) -> None:
    found, expected = ({task.name for task in each.tasks} for each in (result, first))
    if found != expected:
        names = ", ".join(task.name for task in result.tasks)
        raise InputError(
            f"{given}: found the tasks {names}, expected those of the first run: {', '.join(sorted(expected))}"
        )


def _told_apart(run: ComparedRun, others: Sequence[ComparedRun]) -> ComparedRun:
    """The run, marked where its group has its seed and order already: it is no further sample of its method."""
    of_key = {(other.label, other.order, other.result.seed): other for other in others}
    while other := of_key.get((run.label, run.order, run.result.seed)):
        again = f"same seed and order as {other.name}"
        run = replace(run, mark="; ".join(filter(None, (run.mark, again))))
    return run


class _Expected:
    """What the runs of a comparison should have in common: of each setting, what the first run that reads it has."""

    def __init__(self) -> None:
        self._settings: dict[str, object] = {}
        self._first: Result | None = None
        self._model = self._reference = ""

    def mark(self, result: Result) -> str:
        """Say what makes a run's figures no measure of its method beside the others'; they are read in order."""
        first = self._first = self._first or result
        self._settings = {**result.settings, **self._settings}
        self._model, self._reference = self._model or result.model_digest, self._reference or result.reference
        marks = [
            f"{path.removeprefix('optimisation.').removeprefix('tasks.')}={json.dumps(value)}"
            for path, value in result.settings.items()
            if self._settings[path] != value
        ]
        if result.algorithm != first.algorithm:
            marks.append(f"computed by {describe_algorithm(result.algorithm)}")
        if result.model_digest and result.model_digest != self._model:
            marks.append(f"model {PurePosixPath(result.model).name}")
        if len(result.accuracy_matrix) < len(result.tasks):
            marks.append(f"{len(result.accuracy_matrix)} of {len(result.tasks)} stages")
        theirs = {task.name: task for task in first.tasks}
        for what, named_as in (("digest", "data"), ("split_family", "split")):
            others = [t.name for t in result.tasks if getattr(t, what) != getattr(theirs[t.name], what)]
            if others:
                marks.append(f"other {named_as} in {', '.join(others)}")
        if result.templates != first.templates:
            marks.append(f"templates {result.templates}")
        if result.reference and result.reference != self._reference:
            marks.append("other reference set")
        if result.held_out != first.held_out:
            marks.append("judged on held-out images" if result.held_out else "judged on all test images")
        return "; ".join(marks)
