"""Results people look at: the matrix as a picture, and the comparison of runs."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from pydantic import ValidationError
from rich.console import Console, Group
from rich.table import Table

from orchestrate.published import MTIL
from schemas.base import InputError
from schemas.results import Metrics, Result
from zscl.files import whole_file, write_text

FIGURES = ("transfer", "avg", "last", "forgetting")
ZERO_SHOT = "zero-shot"


def load_result(run: Path) -> Result:
    """Read a run folder's result.

    Raises:
        InputError: the folder has no finished run.
    """
    file = run / "result.json"
    if not run.is_dir():
        raise InputError(f"{run}: found no such folder, expected a run's folder")
    if not file.is_file():
        done = len(list(run.glob("stages/*/accuracy.json")))
        raise InputError(f"{run}: found no result.json ({done} stages finished), expected a finished run")
    try:
        return Result.model_validate_json(file.read_text())
    except ValidationError as error:
        raise InputError(f"{file}: found no readable result ({error.error_count()} problems)") from error


def label_of(result: Result) -> str:
    """The method's name and what was changed in its preset."""
    changes = ", ".join(f"{path}={json.dumps(value)}" for path, value in result.method_changes.items())
    return f"{result.method} ({changes})" if changes else result.method


# ------------------------------------------------------------------------------------------------- pictures


def matrix_columns(result: Result) -> dict[str, list[object]]:
    """The matrix as columns: the zero-shot row first, then a row a stage."""
    stages = [ZERO_SHOT, *(f"{stage}-{task.name}" for stage, task in enumerate(result.tasks, start=1))]
    rows = [result.zero_shot, *result.accuracy_matrix]
    columns: dict[str, list[object]] = {"after": list(stages)}
    for index, task in enumerate(result.tasks):
        columns[task.name] = [row[index] for row in rows]
    return columns


def draw_matrix(result: Result) -> Figure:
    """Heat map of the accuracy matrix with the zero-shot row on top and the trained cells framed."""
    rows = [result.zero_shot, *result.accuracy_matrix]
    tasks = [task.name for task in result.tasks]
    figure = Figure(figsize=(max(6.0, 2.4 + 0.8 * len(tasks)), 1.8 + 0.5 * len(rows)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow([[100 * value for value in row] for row in rows], cmap="viridis", vmin=0, vmax=100)
    for row, values in enumerate(rows):
        for column, value in enumerate(values):
            axes.text(
                column, row, f"{100 * value:.1f}", ha="center", va="center", color="white" if value < 0.6 else "black"
            )
    for stage in range(1, len(rows)):
        axes.add_patch(_frame(stage - 1, stage))
    axes.set_xticks(range(len(tasks)), tasks, rotation=30, ha="right")
    axes.set_yticks(range(len(rows)), [ZERO_SHOT, *(f"after {task}" for task in tasks)])
    axes.set_title(f"{label_of(result)}\naccuracy on each task, %", fontsize="medium")
    figure.colorbar(image, label="top-1 accuracy, %", shrink=0.8)
    return figure


def _frame(column: int, row: int) -> Patch:
    return Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="red", linewidth=1.5)


def draw_accuracies(*results: Result) -> Figure:
    """Accuracy of each task against the stage, a line a run; the stage that trains the task is marked."""
    tasks = [task.name for task in results[0].tasks]
    columns = min(3, len(tasks))
    lines = -(-len(tasks) // columns)
    figure = Figure(figsize=(3.6 * columns, 0.8 + 2.5 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    for index, axes in enumerate(grid.flat):
        if index >= len(tasks):
            axes.set_visible(False)
            continue
        _draw_task(axes, tasks[index], index, results)
    figure.supxlabel("stages trained")
    figure.supylabel("top-1 accuracy, %")
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(4, len(labels)))
    return figure


def _draw_task(axes: Axes, task: str, index: int, results: Sequence[Result]) -> None:
    axes.axvline(index + 1, color="grey", linestyle=":", linewidth=1)
    axes.axhline(100 * results[0].zero_shot[index], color="grey", linewidth=0.8)
    for result in results:
        rows = [result.zero_shot, *result.accuracy_matrix]
        axes.plot([100 * row[index] for row in rows], marker="o", markersize=3, label=_run_label(result))
    axes.set_title(task)
    axes.set_ylim(0, 100)


def _run_label(result: Result) -> str:
    return f"{label_of(result)}, seed {result.seed}"


def draw_comparison(results: Sequence[Result]) -> Figure:
    """Transfer, Avg, Last and forgetting as bars, the zero-shot figures as lines."""
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    grid = figure.subplots(1, len(FIGURES), sharey=True)
    for axes, name in zip(grid, FIGURES, strict=True):
        values = [getattr(result.metrics, name) for result in results]
        bars = axes.bar(
            range(len(values)),
            [0 if value is None else 100 * value for value in values],
            color=[f"C{index}" for index in range(len(values))],
        )
        axes.bar_label(bars, [percent(value) for value in values])
        zero_shot = getattr(results[0].zero_shot_metrics, name)
        if zero_shot is not None and name != "forgetting":
            axes.axhline(100 * zero_shot, color="grey", linestyle="--", linewidth=1)
        axes.set_title(name.capitalize() if name != "avg" else "Avg")
        axes.set_xticks([])
    figure.supylabel("%")
    handles: list[Artist] = [Rectangle((0, 0), 1, 1, color=f"C{index}") for index in range(len(results))]
    labels = [_run_label(result) for result in results]
    if results[0].zero_shot_metrics.transfer is not None:
        handles.append(Line2D([], [], color="grey", linestyle="--"))
        labels.append(ZERO_SHOT)
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)))
    return figure


# ------------------------------------------------------------------------------------------------ comparison


Row = dict[str, str | float | None]


def comparison_rows(results: Sequence[Result], runs: Sequence[Path]) -> list[Row]:
    """One row for zero-shot and one a run: figures, then each task's final accuracy, as fractions.

    Raises:
        InputError: the runs do not have the same tasks, in the same order, with the same data.
    """
    first = results[0]
    names = [task.name for task in first.tasks]
    for run, result in zip(runs, results, strict=True):
        found = [task.name for task in result.tasks]
        if found != names:
            raise InputError(
                f"{run}: found the tasks {', '.join(found)}, expected those of {runs[0]}: {', '.join(names)}"
            )
        if [task.digest for task in result.tasks] != [task.digest for task in first.tasks]:
            raise InputError(f"{run}: found other data in its tasks, expected the same as {runs[0]}")
    rows: list[Row] = []
    for run, result in zip(runs, results, strict=True):
        zero_shot = _row(ZERO_SHOT, "", "", result.zero_shot_metrics, names, result.zero_shot)
        if zero_shot not in rows:  # another initial model, or other templates: its own baseline
            rows.append(zero_shot)
        rows.append(
            _row(label_of(result), str(result.seed), run.name, result.metrics, names, result.accuracy_matrix[-1])
        )
    return rows


def _row(method: str, seed: str, run: str, metrics: Metrics, names: Sequence[str], final: Sequence[float]) -> Row:
    tasks = dict(zip(names, final, strict=True))
    return {"run": run, "method": method, "seed": seed, **metrics.model_dump(), **tasks}


def _shown(value: str | float | None) -> str:
    return value if isinstance(value, str) else percent(value)


def percent(value: float | None) -> str:
    """A fraction in per cent, to one decimal."""
    return "–" if value is None else f"{100 * value:.1f}"


def terminal_tables(rows: Sequence[Row]) -> Group:
    """The comparison for a terminal: the figures, then each task's final accuracy with a column a run."""
    words = ("run", "method", "seed")
    figures = Table(title="Figures of the accuracy matrix, %")
    for column in (*words, *FIGURES):
        figures.add_column(column, justify="left" if column in words else "right")
    for row in rows:
        figures.add_row(*(_shown(row[column]) for column in (*words, *FIGURES)))
    names = [column for column in rows[0] if column not in (*words, *Metrics.model_fields)]
    measured = [row for row in rows if row[names[0]] is not None]
    tasks = Table(title="Accuracy on each task after the last stage, %")
    tasks.add_column("task")
    for row in measured:
        tasks.add_column(str(row["run"] or row["method"]), justify="right")
    for name in names:
        tasks.add_row(name, *(_shown(row[name]) for row in measured))
    return Group(figures, tasks)


def published_rows(order: str, tasks: Sequence[str]) -> list[Row]:
    """The paper's figures for MTIL in a task order, as rows of a comparison; it prints none for single tasks.

    Raises:
        InputError: there is no such order.
    """
    if order not in MTIL:
        raise InputError(f"--published: found the order '{order}', expected {' or '.join(MTIL)}")
    rows: list[Row] = []
    for method, figures in MTIL[order].items():
        shown = dict(zip(("transfer", "avg", "last"), (figure / 100 for figure in figures), strict=True))
        rows.append(
            {"run": f"published, MTIL order {order}", "method": method, "seed": ""}
            | dict.fromkeys((*Metrics.model_fields, *tasks))
            | shown
        )
    return rows


def compare(
    runs: Sequence[Path], folder: Path, console: Console | None, published: str | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Compare finished runs: print the tables to a console, if any, and write the files.

    Returns the content for programs, and lines that say what was written where.

    Raises:
        InputError: a folder has no finished run, or the runs cannot be compared.
    """
    results = [load_result(run) for run in runs]
    rows = comparison_rows(results, runs)
    if published:
        rows += published_rows(published, [task.name for task in results[0].tasks])
    written = write_comparison(results, rows, folder)
    if console is not None:
        console.print(terminal_tables(rows))
    return {"rows": rows, "files": written}, [f"{kind:9} {file}" for kind, file in written.items()]


def write_comparison(results: Sequence[Result], rows: Sequence[Row], folder: Path) -> dict[str, str]:
    """Write the comparison as CSV (fractions), Markdown (per cent) and pictures. Returns what was written where."""
    table = io.StringIO()
    writer = csv.DictWriter(table, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    columns = list(rows[0])
    lines = [columns, ["---"] * 3 + ["---:"] * (len(columns) - 3)]
    lines += [[_shown(row[column]) for column in columns] for row in rows]
    written = {
        "csv": folder / "comparison.csv",
        "markdown": folder / "comparison.md",
        "picture": folder / "comparison.png",
        "curves": folder / "accuracy_by_stage.png",
    }
    write_text(written["csv"], table.getvalue())
    write_text(written["markdown"], "".join(f"| {' | '.join(line)} |\n" for line in lines))
    for kind, figure in (("picture", draw_comparison(results)), ("curves", draw_accuracies(*results))):
        with whole_file(written[kind]) as temporary:
            figure.savefig(temporary, format="png", dpi=120)
    return {kind: str(file) for kind, file in written.items()}
