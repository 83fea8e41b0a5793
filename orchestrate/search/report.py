"""Reports of a search: the table of trials, for terminals and MLflow, and Optuna's charts."""

import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from optuna.exceptions import ExperimentalWarning
from rich.console import Group
from rich.table import Table
from rich.text import Text

from orchestrate.reports.charts import MAIN_METRICS
from orchestrate.reports.results import format_percent
from schemas.search import Search, SearchResult, Trial, optimisation_direction
from zscl.runtime.atomic_io import atomic_file

DPI = 120
RELIABLE_TRIALS = 10  # the importance of fields is reliable from this number of finished trials on


def build_trial_columns(result: SearchResult) -> dict[str, list[Any]]:
    """Arrange the trials of a search in the columns of a table.

    Args:
        result: The search's result.

    Returns:
        Mapping from a column's name to its cells, one per trial. The columns are the trial's number, its status, the
        number of finished stages, one column per searched field, one per objective (as fractions), and a note.
    """
    trials = result.trials
    columns: dict[str, list[Any]] = {
        "trial": [trial.number for trial in trials],
        "status": [trial.status for trial in trials],
        "stages": [trial.stages for trial in trials],
    }
    for path in trials[0].values:
        columns[path] = [trial.values.get(path) for trial in trials]
    for name in result.objectives:
        columns[name] = [trial.objectives.get(name) for trial in trials]
    columns["note"] = [_note(result, trial) for trial in trials]
    return columns


def _note(result: SearchResult, trial: Trial) -> str:
    if trial.number == result.chosen:
        return "chosen"
    if trial.number in result.front:
        return "on the front"
    return trial.reason


def build_terminal_tables(result: SearchResult) -> Group:
    """Format a table of the trials, with the chosen trial in bold, and a summary of the search.

    Args:
        result: The search's result.

    Returns:
        The table, followed by lines of text: the importance of each searched field, the number of stage trainings, and
        the test results of the chosen trial.
    """
    columns = build_trial_columns(result)
    table = Table(title="Trials, evaluated on held-out training images, %")
    for name in columns:
        table.add_column(
            Text(_short_path(name)), justify="left" if name in ("status", "note") else "right", overflow="fold"
        )
    for number, row in enumerate(zip(*columns.values(), strict=True), start=1):
        cells = [
            Text(format_percent(value) if name in result.objectives else _format_value(value))
            for name, value in zip(columns, row, strict=True)
        ]
        table.add_row(*cells, style="bold" if number == result.chosen else None)
    counts = [f"{number} {name.replace('_', ' ')}" for name, number in result.stage_trainings.model_dump().items()]
    figures = result.test.metrics
    shown = ", ".join(f"{name} {format_percent(getattr(figures, name))}" for name in MAIN_METRICS)
    return Group(
        table,
        Text(_importance(result)),
        Text(f"stage trainings: {', '.join(counts)}"),
        Text(f"chosen: trial {result.chosen}; evaluated on the test images, once: {shown}"),
    )


def _importance(result: SearchResult) -> str:
    if not result.importance:
        return "importance: not available, because fewer than two trials have different results"
    finished = sum(trial.status in ("finished", "read") for trial in result.trials)
    doubt = f" (not reliable with only {finished} trials)" if finished < RELIABLE_TRIALS else ""
    return f"importance{doubt}: {', '.join(f'{path} {value:.2f}' for path, value in result.importance.items())}"


def _format_value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def draw_trials(search: Search, trials: Sequence[Trial], folder: Path) -> list[Path]:
    """Draw charts of the finished trials with Optuna: parallel coordinates, and the Pareto front.

    The Pareto front is drawn only for searches with two or three objectives.

    Args:
        search: The search.
        trials: All trials.
        folder: Output folder for the charts.

    Returns:
        The written PNG files; empty if fewer than two trials finished.
    """
    mpl.use("Agg")
    from matplotlib import pyplot
    from optuna.visualization import matplotlib as optuna_charts

    from orchestrate.search.samplers import build_study

    study = build_study(search, trials)
    if len(study.trials) < 2:
        return []
    charts: dict[str, Axes] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        warnings.filterwarnings("ignore", message="Attempting to set identical low and high")  # all values equal
        for index, objective in enumerate(search.objectives):
            target = partial(_value, index) if len(search.objectives) > 1 else None
            axes = optuna_charts.plot_parallel_coordinate(study, target=target, target_name=f"{objective}, %")
            axes.set_xticks(axes.get_xticks(), [f"{objective}, %", *map(_short_path, sorted(search.domains))])
            axes.set_title("Trials, evaluated on held-out training images")
            best_is_dark = "viridis_r" if optimisation_direction(objective) == "max" else "viridis"
            for lines in axes.collections:
                lines.set(cmap=best_is_dark, linewidth=2, clip_on=False)  # Optuna draws the best trials in white
            charts[f"parallel-{objective.replace('/', '-')}"] = axes
        if 1 < len(search.objectives) < 4:
            axes = optuna_charts.plot_pareto_front(study, target_names=[f"{name}, %" for name in search.objectives])
            axes.set_title("Trials and their Pareto front, evaluated on held-out training images")
            for trial in study.trials:
                axes.annotate(
                    str(trial.user_attrs["number"]), trial.values[:2], xytext=(4, 4), textcoords="offset points"
                )
            charts["pareto"] = axes
    return [_save(axes.figure, folder / f"{name}.png", pyplot) for name, axes in charts.items()]


def _save(figure: Any, file: Path, pyplot: Any) -> Path:
    with atomic_file(file) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI, bbox_inches="tight")
    pyplot.close(figure)
    return file


def _short_path(path: str) -> str:
    return path.removeprefix("method.")


def _value(index: int, trial: Any) -> float:
    """Return the value of an objective in an Optuna trial, by the objective's index."""
    return float(trial.values[index])
