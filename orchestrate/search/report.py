"""A search for people: the table of its trials, and Optuna's own pictures of them."""

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

from orchestrate.reports.charts import MAIN
from orchestrate.reports.results import format_percent
from schemas.search import Search, SearchResult, Trial, direction_of
from zscl.runtime.atomic_io import atomic_file

DPI = 120
IMPORTANCE_FROM = 10  # trials: of fewer, a share of variance explained says little


def trial_columns(found: SearchResult) -> dict[str, list[Any]]:
    """The trials as columns: number, what became of it, its values, its objectives as fractions."""
    paths = list(found.trials[0].values)
    columns: dict[str, list[Any]] = {
        "trial": [trial.number for trial in found.trials],
        "status": [trial.status for trial in found.trials],
        "stages": [trial.stages for trial in found.trials],
    }
    for path in paths:
        columns[path] = [trial.values.get(path) for trial in found.trials]
    for name in found.objectives:
        columns[name] = [trial.objectives.get(name) for trial in found.trials]
    columns["note"] = [_note(found, trial) for trial in found.trials]
    return columns


def _note(found: SearchResult, trial: Trial) -> str:
    if trial.number == found.chosen:
        return "chosen"
    if trial.number in found.front:
        return "on the front"
    return trial.reason


def terminal_tables(found: SearchResult) -> Group:
    """The trials, the chosen one in bold, and what the search cost."""
    columns = trial_columns(found)
    table = Table(title="Trials, judged on held-out training images, %")
    for name in columns:
        table.add_column(Text(_short(name)), justify="left" if name in ("status", "note") else "right", overflow="fold")
    for number, row in enumerate(zip(*columns.values(), strict=True), start=1):
        cells = [
            Text(format_percent(value) if name in found.objectives else format_value(value))
            for name, value in zip(columns, row, strict=True)
        ]
        table.add_row(*cells, style="bold" if number == found.chosen else None)
    trainings = [f"{number} {name.replace('_', ' ')}" for name, number in found.stage_trainings.model_dump().items()]
    lines = [
        Text(_importance(found)),
        Text(f"stage trainings: {', '.join(trainings)}"),
        Text(f"chosen: trial {found.chosen}; judged on the test images, once: {_figures(found)}"),
    ]
    return Group(table, *lines)


def _importance(found: SearchResult) -> str:
    if not found.importance:
        return "importance: fewer than two different trials"
    finished = sum(trial.status in ("finished", "read") for trial in found.trials)
    doubt = f" (of {finished} trials: a hint at most)" if finished < IMPORTANCE_FROM else ""
    return f"importance{doubt}: {', '.join(f'{path} {value:.2f}' for path, value in found.importance.items())}"


def _figures(found: SearchResult) -> str:
    figures = found.test.metrics
    return ", ".join(f"{name} {format_percent(getattr(figures, name))}" for name in MAIN)


def format_value(value: Any) -> str:
    """A value of a trial, short."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def draw_trials(search: Search, trials: Sequence[Trial], folder: Path) -> list[Path]:
    """Draw what there is to see of the finished trials; nothing where fewer than two are. Returns the pictures."""
    mpl.use("Agg")
    from matplotlib import pyplot
    from optuna.visualization import matplotlib as drawing

    from orchestrate.search.samplers import build_study

    study = build_study(search, trials)
    if len(study.trials) < 2:
        return []
    drawn: dict[str, Axes] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        warnings.filterwarnings("ignore", message="Attempting to set identical low and high")  # all came to the same
        for index, objective in enumerate(search.objectives):
            value_of = partial(_value, index) if len(search.objectives) > 1 else None
            axes = drawing.plot_parallel_coordinate(study, target=value_of, target_name=f"{objective}, %")
            axes.set_xticks(axes.get_xticks(), [f"{objective}, %", *map(_short, sorted(search.domains))])
            axes.set_title("Trials, judged on held-out training images")
            best_is_dark = "viridis_r" if direction_of(objective) == "max" else "viridis"
            for lines in axes.collections:
                lines.set(cmap=best_is_dark, linewidth=2, clip_on=False)  # Optuna's own has white for the best
            drawn[f"parallel-{objective.replace('/', '-')}"] = axes
        if 1 < len(search.objectives) < 4:
            axes = drawing.plot_pareto_front(study, target_names=[f"{name}, %" for name in search.objectives])
            axes.set_title("Trials and their front, judged on held-out training images")
            for trial in study.trials:
                axes.annotate(
                    str(trial.user_attrs["number"]), trial.values[:2], xytext=(4, 4), textcoords="offset points"
                )
            drawn["pareto"] = axes
    return [_kept(axes.figure, folder / f"{name}.png", pyplot) for name, axes in drawn.items()]


def _kept(figure: Any, file: Path, pyplot: Any) -> Path:
    with atomic_file(file) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI, bbox_inches="tight")
    pyplot.close(figure)
    return file


def _short(path: str) -> str:
    return path.removeprefix("method.")


def _value(index: int, trial: Any) -> float:
    """One of several objectives of Optuna's trial."""
    return float(trial.values[index])
