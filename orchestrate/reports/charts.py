"""Charts of results as matplotlib figures: the accuracy matrix, accuracy over the stages, and bars of several runs."""

import textwrap
from collections.abc import Mapping, Sequence

import matplotlib as mpl
from matplotlib import colormaps
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from orchestrate.reports.results import ZERO_SHOT, format_method, format_percent
from schemas.results import Result

mpl.rcParams["text.parse_math"] = False  # names may contain dollar signs
MAIN_METRICS = ("transfer", "avg", "last", "forgetting")  # the metrics in every table and chart
# The Okabe-Ito colours and two more. They are distinguishable with colour blindness, on light and dark backgrounds.
PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6BB1", "#7F7F7F"]
ROW_LABEL_CHARACTERS, ROW_LINE_INCHES = 40, 0.17  # maximum width and line height of a run's label in the bar chart
# Dimensions of a legend at matplotlib's default font size.
LEGEND_CHARACTERS_PER_INCH, LEGEND_HANDLE_CHARACTERS, LEGEND_LINE_INCHES = 12, 8, 0.25


def draw_matrix(result: Result) -> Figure:
    """Draw a heat map of the accuracy matrix, with the zero-shot row on top.

    Every other row contains the accuracies after one stage. A frame marks the task on which the stage trained.

    Args:
        result: The run's result.

    Returns:
        The figure.
    """
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
    axes.set_title(f"{format_method(result)}\naccuracy on each task, %", fontsize="medium")
    figure.colorbar(image, label="top-1 accuracy, %", shrink=0.8)
    return figure


def _frame(column: int, row: int) -> Patch:
    return Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="red", linewidth=1.5)


def draw_accuracies(*results: Result, labels: Sequence[str] = ()) -> Figure:
    """Draw the accuracy on every task over the stages, with one line per run.

    In the panel of a task, a vertical line marks the stage that trained on the task, and a horizontal line marks the
    zero-shot accuracy.

    Args:
        results: The results of the runs.
        labels: The runs' labels in the legend; default: the method and the seed of each run.

    Returns:
        The figure, with one panel per task.
    """
    tasks = [task.name for task in results[0].tasks]
    columns = min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    figure = Figure(figsize=(3.6 * columns, 0.8 + 2.5 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for index, axes in enumerate(grid.flat):
        if index >= len(tasks):
            axes.set_visible(False)
            continue
        _draw_task(axes, tasks[index], results, labels or [*map(_format_method_and_seed, results)])
    figure.supxlabel("stages trained")
    figure.supylabel("top-1 accuracy, %")
    _draw_legend(figure, *grid.flat[0].get_legend_handles_labels())
    return figure


def _draw_legend(figure: Figure, handles: Sequence[Artist], labels: Sequence[str]) -> None:
    """Draw a legend with as many columns as fit into the figure's width."""
    column_characters = max(map(len, labels)) + LEGEND_HANDLE_CHARACTERS
    fitting = int(LEGEND_CHARACTERS_PER_INCH * figure.get_figwidth() / column_characters)
    columns = max(1, min(fitting, len(labels)))
    figure.set_figheight(figure.get_figheight() + LEGEND_LINE_INCHES * (-(-len(labels) // columns) - 1))
    figure.legend(handles, labels, loc="outside upper center", ncols=columns)


def _draw_task(axes: Axes, task: str, results: Sequence[Result], labels: Sequence[str]) -> None:
    for result, label, colour in zip(results, labels, distinct_colours(len(results)), strict=True):
        index = [task.name for task in result.tasks].index(task)
        axes.axvline(index + 1, color="grey", linestyle=":", linewidth=1)
        axes.axhline(100 * result.zero_shot[index], color="grey", linewidth=0.8)
        rows = [result.zero_shot, *result.accuracy_matrix]
        values = [100 * row[index] for row in rows]
        axes.plot(values, marker="o", markersize=3, label=label, color=colour, clip_on=False)
    axes.set_title(task)
    axes.set_ylim(0, 100)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _format_method_and_seed(result: Result) -> str:
    return f"{format_method(result)}, seed {result.seed}"


def draw_comparison(results: Sequence[Result], labels: Sequence[str], zero_shot: Mapping[str, float | None]) -> Figure:
    """Draw the main metrics as bars, with one row per run, and the zero-shot metrics as dashed lines.

    Args:
        results: The results of the runs.
        labels: The runs' labels, in the order of `results`.
        zero_shot: The initial model's metrics by name, as fractions; `None` for an undefined metric.

    Returns:
        The figure, with one panel per metric.
    """
    rows = ["\n".join(textwrap.wrap(label, ROW_LABEL_CHARACTERS)) for label in labels]
    lines = sum(row.count("\n") + 2 for row in rows)
    figure = Figure(figsize=(12, 1.2 + ROW_LINE_INCHES * lines), layout="constrained")
    grid = figure.subplots(1, len(MAIN_METRICS), sharey=True)
    for axes, name in zip(grid, MAIN_METRICS, strict=True):
        values = [getattr(result.metrics, name) for result in results]
        bars = axes.barh(range(len(values)), [0 if value is None else 100 * value for value in values], height=0.7)
        background = {"facecolor": "white", "linewidth": 0, "pad": 0.5}  # covers the dashed line
        axes.bar_label(bars, [format_percent(value) for value in values], padding=3, bbox=background)
        axes.margins(x=0.3)
        zero_shot_value = zero_shot[name]
        if zero_shot_value is not None and name != "forgetting":
            axes.axvline(100 * zero_shot_value, color="grey", linestyle="--", linewidth=1)
        axes.set_title(name.capitalize() if name != "avg" else "Avg")
        axes.set_yticks(range(len(values)), rows)
    grid[0].invert_yaxis()  # show the first run on top
    figure.supxlabel("%; dashed: zero-shot")
    return figure


def distinct_colours(count: int) -> list[str]:
    """Return `count` distinct colours as hexadecimal codes, for example `#0072B2`."""
    if count <= len(PALETTE):
        return PALETTE[:count]
    return [to_hex(colormaps["turbo"](0.05 + 0.9 * number / (count - 1))) for number in range(count)]
