"""Comparison of runs: groups of runs with the same method, means, paired differences, confidence intervals.

The runs of a group may differ in seed and task order. A run whose settings, data or model differ from those of the
first run gets a mark: a text with the differences. Runs with different marks are in different groups, so that only
comparable runs are averaged.
"""

import json
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from statistics import fmean, stdev

from scipy.stats import ttest_1samp

from orchestrate.reports.results import CUSTOM_LOSS_PREFIX, format_change, format_method, load_partial_result
from schemas.errors import ErrorCode, InputError
from schemas.results import Result
from zscl.sequence.result import describe_algorithm

CONFIDENCE = 0.95
ROUNDING_TOLERANCE = 1e-9  # differences of accuracies whose range is at most this large are treated as equal
DEFAULT_BASELINES = ("finetune", "zero-shot")


@dataclass(frozen=True)
class ComparedRun:
    """A run in a comparison.

    Attributes:
        name: The folder's name. If the folders of several runs have the same name, parent folders precede it.
        folder: The run's folder.
        result: The run's result.
        method: The method's name. If runs with the same method have different settings, these settings follow.
        mark: The reasons why the run is not comparable with the earlier runs; empty if it is comparable.
    """

    name: str
    folder: Path
    result: Result
    method: str
    mark: str = ""

    @property
    def label(self) -> str:
        """The label of the run's group: the method and the mark."""
        return self.method + (f" [{self.mark}]" if self.mark else "")

    @property
    def order(self) -> str:
        """The task order: the names of the tasks, separated by commas."""
        return ", ".join(task.name for task in self.result.tasks)

    @property
    def metrics(self) -> dict[str, float | None]:
        """The metrics by name, as fractions.

        `learned` is a mean over the tasks: the accuracy on every task directly after the stage that trained on it.
        """
        matrix = self.result.accuracy_matrix
        learned = fmean(row[stage] for stage, row in enumerate(matrix))
        return {**self.result.metrics.model_dump(), "learned": learned}


@dataclass(frozen=True)
class MeanOverRuns:
    """The mean of a metric over a group's runs.

    Attributes:
        mean: The mean of the metric.
        deviation: The sample standard deviation, with the divisor n - 1; `None` for a single run.
        runs: The number of runs, n.
    """

    mean: float
    deviation: float | None
    runs: int


@dataclass(frozen=True)
class Difference:
    """The mean difference of a metric between a group and a baseline group, over pairs of runs.

    A pair consists of a run of the group and a run of the baseline with the same seed and task order. Pairs with the
    same seed are not independent of each other, and neither are pairs with the same order. So the differences are
    averaged per seed if there are at least as many seeds as orders, and otherwise per order. The sample consists of
    these averages.

    Attributes:
        mean: The mean of the sample.
        interval: The 95 % confidence interval of the mean (paired t); `None` if the sample has one value or equal
            values, because the variance is unknown.
        pairs: The number of pairs.
        size: The number of averages in the sample.
        unit: `seeds` if the differences are averaged per seed, `orders` if they are averaged per order.
    """

    mean: float
    interval: tuple[float, float] | None
    pairs: int
    size: int
    unit: str


@dataclass(frozen=True)
class Comparison:
    """The runs of a comparison, and the runs that are excluded from it.

    Attributes:
        runs: The compared runs, in the user's order.
        excluded: For every excluded run, the reason, by the folder or run ID that the user entered.
    """

    runs: tuple[ComparedRun, ...]
    excluded: Mapping[str, str]

    @property
    def groups(self) -> dict[str, list[ComparedRun]]:
        """The groups: lists of runs by the label of the group, in the user's order."""
        groups: dict[str, list[ComparedRun]] = {}
        for run in self.runs:
            groups.setdefault(run.label, []).append(run)
        return groups

    @property
    def tasks(self) -> list[str]:
        """The names of the tasks, in the first run's order."""
        return [task.name for task in self.runs[0].result.tasks]

    @property
    def default_baseline(self) -> str | None:
        """The label of the default baseline: `finetune`, `zero-shot` or the first group; `None` for a single group."""
        labels = list(self.groups)
        if len(labels) == 1:
            return None
        return next((label for label in DEFAULT_BASELINES if label in labels), labels[0])

    def summary(self, label: str, metric: str) -> MeanOverRuns | None:
        """Return the mean of a metric over the runs of a group; `None` if no run has the metric."""
        values = [run.metrics[metric] for run in self.groups[label]]
        return summarize([value for value in values if value is not None])

    def zero_shot(self, metric: str) -> float | None:
        """Return a metric of the initial model; `None` if it is undefined.

        A metric may depend on the task order, so it is averaged over all runs without a mark.
        """
        runs = [run for run in self.runs if not run.mark] or self.runs[:1]
        values = [getattr(run.result.zero_shot_metrics, metric) for run in runs]
        return None if None in values else fmean(values)

    def difference(self, label: str, baseline: str, metric: str) -> Difference | None:
        """Compute the mean paired difference of a metric between a group and a baseline group.

        Args:
            label: The group's label.
            baseline: The label of the baseline group.
            metric: The metric's name.

        Returns:
            The difference; `None` if no run of the baseline has the same seed and order as a run of the group.
        """
        partners = {(run.order, run.result.seed): run.metrics[metric] for run in self.groups[baseline]}
        pairs = [
            (run.result.seed, run.order, value - partner)
            for run in self.groups[label]
            if (value := run.metrics[metric]) is not None
            and (partner := partners.get((run.order, run.result.seed))) is not None
        ]
        by_seed, by_order = (_mean_by_key((pair[index], pair[2]) for pair in pairs) for index in (0, 1))
        sample, unit = (by_seed, "seeds") if len(by_seed) >= len(by_order) else (by_order, "orders")
        if not sample:
            return None
        return Difference(fmean(sample), paired_interval(sample), len(pairs), len(sample), unit)


def summarize(values: Sequence[float]) -> MeanOverRuns | None:
    """Compute the mean and the sample standard deviation of values. Return `None` if there are no values."""
    if not values:
        return None
    return MeanOverRuns(fmean(values), stdev(values) if len(values) > 1 else None, len(values))


def _mean_by_key(items: Iterator[tuple[Hashable, float]]) -> list[float]:
    """Return one mean per key, over the values with this key."""
    values: dict[Hashable, list[float]] = {}
    for key, value in items:
        values.setdefault(key, []).append(value)
    return [fmean(group) for group in values.values()]


def paired_interval(differences: Sequence[float]) -> tuple[float, float] | None:
    """Compute the 95 % confidence interval of the mean of independent paired differences.

    This is the paired t interval of `scipy.stats.ttest_rel`. It is exact if the differences are normally distributed.

    Args:
        differences: One difference per pair.

    Returns:
        The lower and the upper end of the interval; `None` for fewer than two pairs, for equal differences, or for
            infinite or NaN values.
    """
    if not all(map(math.isfinite, differences)):
        return None
    if len(differences) < 2 or max(differences) - min(differences) <= ROUNDING_TOLERANCE:
        return None
    low, high = ttest_1samp(differences, 0.0).confidence_interval(CONFIDENCE)
    return float(low), float(high)


def group_runs(sources: Mapping[str, Path | InputError]) -> Comparison:
    """Read the results of runs, and build the comparison of all runs that have the same tasks as the first one.

    Args:
        sources: The runs' folders by the folder or run ID that the user entered. An error is stored instead of the
            folder if the folder was not found.

    Returns:
        The comparison.

    Raises:
        InputError: No run can be compared. The message contains the reason for every run.
    """
    results: dict[Path, Result] = {}
    names_by_path: dict[Path, str] = {}
    errors: dict[str, InputError] = {}
    for name, source in sources.items():
        try:
            folder = _check_is_new(name, source, names_by_path)
            result = load_partial_result(folder)
            if results:
                _check_same_tasks(result, next(iter(results.values())), name)
            results[folder] = result
        except InputError as error:
            errors[name] = error
    if not results:
        codes = {error.code for error in errors.values()}
        code = codes.pop() if len(codes) == 1 else ErrorCode.FAILED
        raise InputError("\n".join(map(str, errors.values())), code=code)
    runs: list[ComparedRun] = []
    run_names, labels, settings = _short_names(list(results)), _labels(list(results.values())), _CommonSettings()
    for (folder, result), run_name, label in zip(results.items(), run_names, labels, strict=True):
        run = ComparedRun(run_name, folder, result, label, settings.mark(result))
        runs.append(_mark_duplicate(run, runs))
    return Comparison(tuple(runs), {name: str(error) for name, error in errors.items()})


def _check_is_new(name: str, source: Path | InputError, names_by_path: dict[Path, str]) -> Path:
    """Return the folder of a run of the user's list.

    Args:
        name: The folder or run ID that the user entered.
        source: The run's folder, or the error if the folder was not found.
        names_by_path: The names of the earlier runs by their folders. This run is added.

    Returns:
        The folder.

    Raises:
        InputError: The folder does not exist, or another name in the list already refers to it.
    """
    if isinstance(source, InputError):
        raise source
    if (first := names_by_path.setdefault(source.resolve(), name)) != name:
        raise InputError(f"{name}: this is the same run as {first}; it counts once", code=ErrorCode.DUPLICATE)
    return source


def _short_names(folders: Sequence[Path]) -> list[str]:
    """Return a unique name for every folder: its name, preceded by as many parent folders as necessary."""

    def name(folder: Path, depth: int = 1) -> str:
        parts = folder.parts[-depth:]
        count = sum(other.parts[-depth:] == parts for other in folders)
        return str(PurePosixPath(*parts)) if count == 1 or depth >= len(folder.parts) else name(folder, depth + 1)

    return list(map(name, folders))


def _labels(results: Sequence[Result]) -> list[str]:
    """Return a label for every run: the method, and the settings in which runs with the same method differ."""
    labels = []
    for result in results:
        label = format_method(result)
        namesakes = [other for other in results if format_method(other) == label]
        has_settings = all(other.method_settings for other in namesakes)  # old results contain only the changes
        all_settings = [other.method_settings if has_settings else other.method_changes for other in namesakes]
        settings = result.method_settings if has_settings else result.method_changes
        added = [format_change(path, value) for path, value in settings.items() if _differs(path, all_settings)]
        labels.append(f"{label} ({', '.join(added)})" if added else label)
    return labels


def _differs(path: str, settings: Sequence[Mapping[str, object]]) -> bool:
    """Return whether methods differ in a setting.

    They also differ if the setting belongs to an optional part, such as a custom loss, that only some methods have.

    Args:
        path: The setting's dotted path.
        settings: The settings of every method by path.
    """
    values = [method[path] for method in settings if path in method]
    is_optional_part = None in values or path.startswith(CUSTOM_LOSS_PREFIX)
    return any(value != values[0] for value in values) or (is_optional_part and len(values) < len(settings))


def _check_same_tasks(result: Result, first: Result, name: str) -> None:
    tasks, expected = ({task.name for task in run.tasks} for run in (result, first))
    if tasks != expected:
        found = ", ".join(task.name for task in result.tasks)
        raise InputError(
            f"{name}: found the tasks {found}, expected those of the first run: {', '.join(sorted(expected))}",
            code=ErrorCode.MISMATCH,
        )


def _mark_duplicate(run: ComparedRun, previous: Sequence[ComparedRun]) -> ComparedRun:
    """Return the run with a mark if an earlier run of its group has the same seed and task order.

    The mark puts the run into a separate group, so that the same result is not averaged twice.
    """
    by_key = {(other.label, other.order, other.result.seed): other for other in previous}
    while other := by_key.get((run.label, run.order, run.result.seed)):
        mark = f"same seed and order as {other.name}"
        run = replace(run, mark="; ".join(filter(None, (run.mark, mark))))
    return run


class _CommonSettings:
    """The settings that all runs of a comparison should have. Every setting is taken from the first run that has it."""

    def __init__(self) -> None:
        self._settings: dict[str, object] = {}
        self._first: Result | None = None
        self._model = self._reference = ""

    def mark(self, result: Result) -> str:
        """Return the reasons why a run is not comparable with the earlier runs.

        This method must be called once for every run, in the order of the comparison.

        Args:
            result: The run's result.

        Returns:
            The reasons, separated by semicolons; empty if the run is comparable.
        """
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
        first_tasks = {task.name: task for task in first.tasks}
        for attribute, noun in (("digest", "data"), ("split_family", "split")):
            tasks = [t.name for t in result.tasks if getattr(t, attribute) != getattr(first_tasks[t.name], attribute)]
            if tasks:
                marks.append(f"other {noun} in {', '.join(tasks)}")
        if result.templates != first.templates:
            marks.append(f"templates {result.templates}")
        if result.reference and result.reference != self._reference:
            marks.append("other reference set")
        if result.held_out != first.held_out:
            marks.append("judged on held-out images" if result.held_out else "judged on all test images")
        return "; ".join(marks)
