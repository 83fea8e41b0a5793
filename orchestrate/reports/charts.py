"""Results as people look at them: read from a run's folder, and drawn."""

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib import colormaps
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from orchestrate.lifecycle.paths import EXPERIMENT
from orchestrate.recipes.recipe import load_experiment
from schemas.base import parse_json
from schemas.errors import InputError, command
from schemas.method import PRESETS
from schemas.results import Result, StageResult, TaskName
from zscl.data.task import TaskFolder
from zscl.evaluation.metrics import metrics
from zscl.sequence.layout import ACCURACY, RESULT, TRAINING, stage_files
from zscl.sequence.layout import ZERO_SHOT as ROW_BEFORE
from zscl.sequence.result import ROW_ADVICE, STAGE_ADVICE, AccuracyRow

mpl.rcParams["text.parse_math"] = False  # a name with two dollar signs is no formula
MAIN = ("transfer", "avg", "last", "forgetting")  # of the figures: those that are always shown
ZERO_SHOT = "zero-shot"
FURTHER = "further_losses."
# Colours that can be told apart by whoever sees few of them (Okabe & Ito), on light and on dark.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6BB1", "#7F7F7F"]
SIGNS_OF_A_ROW, ROW_LINE_INCHES = 40, 0.17  # of the runs beside the bars of a comparison
SIGNS_AN_INCH, SIGNS_OF_A_HANDLE, LEGEND_LINE_INCHES = 12, 8, 0.25  # of a legend, at matplotlib's font size


def load_result(run: Path) -> Result:
    """Read a run folder's result.

    Raises:
        InputError: the folder has no finished run.
    """
    file = run / RESULT
    if not run.is_dir():
        raise InputError(f"{run}: found no such folder, expected a run's folder")
    if not file.is_file():
        if within := sorted(file.parent for file in run.glob(f"*/{RESULT}")):
            raise InputError(
                f"{run}: found {len(within)} runs in it, expected one, {within[0]} say, or all: {command(run)}/*"
            )
        done = len(list(run.glob("stages/*/accuracy.json")))
        raise InputError(f"{run}: found no {RESULT} ({done} stages finished), expected a finished run")
    return parse_json(Result, file.read_bytes(), file, "remove the file, and zscl resume writes it again")


def load_result_so_far(run: Path) -> Result:
    """Read a run folder's result, or what a run under way would say if it ended with its last finished stage.

    Raises:
        InputError: the folder has no run that has finished a stage.
    """
    if not run.is_dir() or (run / RESULT).is_file() or any(run.glob(f"*/{RESULT}")):
        return load_result(run)
    rows = stage_files(run, ACCURACY)
    if not rows:
        raise InputError(f"{run}: found 0 finished stages and no {RESULT}, expected a run that finished a stage")
    experiment = load_experiment(run / EXPERIMENT)
    if experiment.class_incremental is not None:
        raise InputError(f"{run}: found no {RESULT} ({len(rows)} stages finished), expected a finished run")
    try:
        zero_shot, *measured = (
            parse_json(AccuracyRow, file.read_bytes(), file, ROW_ADVICE) for file in (run / ROW_BEFORE, *rows)
        )
        trained = [file.with_name(TRAINING) for file in rows]
        stages = [parse_json(StageResult, file.read_bytes(), file, STAGE_ADVICE) for file in trained]
    except OSError as error:
        raise InputError(f"{run}: found no readable rows ({error}), expected a run's folder") from error
    names = [task.name for task in experiment.tasks]
    for file, row in zip((run / ROW_BEFORE, *rows), (zero_shot, *measured), strict=True):
        for name in names:
            if name not in row.accuracy:
                raise InputError(f"{file}: found no accuracy on the task {name!r}, expected one on each; {ROW_ADVICE}")
    matrix = tuple(tuple(row.accuracy[name] for name in names) for row in measured)
    baseline = tuple(zero_shot.accuracy[name] for name in names)
    folders = {task.name: TaskFolder.open(task, held_out=experiment.evaluation.held_out) for task in experiment.tasks}
    return Result(
        name=experiment.name,
        method=experiment.method.name,
        method_changes=experiment.method.changes,
        method_settings=experiment.method.settings,
        settings=experiment.settings,
        seed=experiment.seed,
        fingerprint=zero_shot.fingerprint,
        algorithm=zero_shot.algorithm,
        tasks=tuple(
            TaskName(
                name=task.name,
                path=task.path,
                digest=folders[task.name].digest,
                test_images=zero_shot.images[task.name],
                split_family=folders[task.name].split_family,
            )
            for task in experiment.tasks
        ),
        held_out=experiment.evaluation.held_out,
        zero_shot=baseline,
        accuracy_matrix=matrix,
        metrics=metrics(matrix, baseline),
        zero_shot_metrics=metrics([baseline] * len(matrix), baseline),
        stages=tuple(stages),
        reference_texts=0,
        templates=experiment.evaluation.templates,
        workers=experiment.compute.workers,
        device="",
        train_seconds=sum(stage.train_seconds for stage in stages),
        evaluation_seconds=sum(row.seconds for row in measured),
        versions={},
    )


def label_of(result: Result) -> str:
    """The method's name; where that is the name of a preset, with what was changed in it."""
    changes = changes_of(result) if result.method in PRESETS else ""
    return f"{result.method} ({changes})" if changes else result.method


def changes_of(result: Result) -> str:
    """What was changed in its method's preset, if anything."""
    return ", ".join(change(path, value) for path, value in result.method_changes.items())


def change(path: str, value: object) -> str:
    """A change as it is read: `distill.image_weight=2.0`, a further loss as its call, `spread.Spread(weight=0.5)`."""
    if not path.startswith(FURTHER):
        return f"{path}={json.dumps(value)}"
    settings = json.loads(str(value))
    given = ", ".join(f"{name}={json.dumps(setting)}" for name, setting in settings.items())
    return f"{path.removeprefix(FURTHER)}({given})"


def where_time_went(result: Result, beside: bool = False) -> str:
    """In a line, what the main worker did with its time while it trained and evaluated.

    Args:
        result: of a run.
        beside: its rows were measured beside the training, so that their time is not the main worker's.
    """
    parts: dict[str, float] = {}
    for stage in result.stages:
        for part, seconds in (stage.seconds_by_part if not stage.shared else {}).items():
            parts[part] = parts.get(part, 0.0) + seconds
    if not beside:
        parts["evaluation"] = result.evaluation_seconds
    whole = sum(parts.values()) or 1e-9  # nothing was trained
    shares = sorted(parts.items(), key=lambda part: -part[1])
    line = f"{whole / 60:.1f} min: " + ", ".join(f"{part} {100 * value / whole:.0f} %" for part, value in shares)
    return f"{line}; evaluation, beside it: {result.evaluation_seconds / 60:.1f} min" if beside else line


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


def draw_accuracies(*results: Result, labels: Sequence[str] = ()) -> Figure:
    """Accuracy of each task against the stage, a line a run; the stage that trains the task is marked.

    Args:
        results: of runs.
        labels: what they are called; default: method and seed.
    """
    tasks = [task.name for task in results[0].tasks]
    columns = min(3, len(tasks))
    lines = -(-len(tasks) // columns)
    figure = Figure(figsize=(3.6 * columns, 0.8 + 2.5 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    for index, axes in enumerate(grid.flat):
        if index >= len(tasks):
            axes.set_visible(False)
            continue
        _draw_task(axes, tasks[index], results, labels or [*map(_run_label, results)])
    figure.supxlabel("stages trained")
    figure.supylabel("top-1 accuracy, %")
    handles, shown = grid.flat[0].get_legend_handles_labels()
    _draw_legend(figure, handles, shown)
    return figure


def _draw_legend(figure: Figure, handles: Sequence[Artist], labels: Sequence[str]) -> None:
    """A legend of as many columns as the figure's width has room for."""
    room = int(SIGNS_AN_INCH * figure.get_figwidth() / (max(map(len, labels)) + SIGNS_OF_A_HANDLE))
    columns = max(1, min(room, len(labels)))
    figure.set_figheight(figure.get_figheight() + LEGEND_LINE_INCHES * (-(-len(labels) // columns) - 1))
    figure.legend(handles, labels, loc="outside upper center", ncols=columns)


def _draw_task(axes: Axes, task: str, results: Sequence[Result], labels: Sequence[str]) -> None:
    for result, label, colour in zip(results, labels, colours(len(results)), strict=True):
        index = [each.name for each in result.tasks].index(task)
        axes.axvline(index + 1, color="grey", linestyle=":", linewidth=1)
        axes.axhline(100 * result.zero_shot[index], color="grey", linewidth=0.8)
        rows = [result.zero_shot, *result.accuracy_matrix]
        values = [100 * row[index] for row in rows]
        axes.plot(values, marker="o", markersize=3, label=label, color=colour, clip_on=False)
    axes.set_title(task)
    axes.set_ylim(0, 100)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _run_label(result: Result) -> str:
    return f"{label_of(result)}, seed {result.seed}"


def draw_comparison(results: Sequence[Result], labels: Sequence[str], zero_shot: Mapping[str, float | None]) -> Figure:
    """Draw Transfer, Avg, Last and forgetting as bars, a row a run, and the zero-shot figures as dashed lines.

    Args:
        results: of the runs.
        labels: what the runs are called.
        zero_shot: the initial model's figures, by name.
    """
    rows = ["\n".join(textwrap.wrap(label, SIGNS_OF_A_ROW)) for label in labels]
    lines = sum(row.count("\n") + 2 for row in rows)
    figure = Figure(figsize=(12, 1.2 + ROW_LINE_INCHES * lines), layout="constrained")
    grid = figure.subplots(1, len(MAIN), sharey=True)
    for axes, name in zip(grid, MAIN, strict=True):
        values = [getattr(result.metrics, name) for result in results]
        bars = axes.barh(range(len(values)), [0 if value is None else 100 * value for value in values], height=0.7)
        background = {"facecolor": "white", "linewidth": 0, "pad": 0.5}  # against the dashed line
        axes.bar_label(bars, [percent(value) for value in values], padding=3, bbox=background)
        axes.margins(x=0.3)
        untrained = zero_shot[name]
        if untrained is not None and name != "forgetting":
            axes.axvline(100 * untrained, color="grey", linestyle="--", linewidth=1)
        axes.set_title(name.capitalize() if name != "avg" else "Avg")
        axes.set_yticks(range(len(values)), rows)
    grid[0].invert_yaxis()  # the first run on top
    figure.supxlabel("%; dashed: zero-shot")
    return figure


def colours(count: int) -> list[str]:
    """Return so many colours, no two alike."""
    if count <= len(COLOURS):
        return COLOURS[:count]
    return [to_hex(colormaps["turbo"](0.05 + 0.9 * number / (count - 1))) for number in range(count)]


def percent(value: float | None) -> str:
    """A fraction in per cent, to one decimal."""
    return "–" if value is None else f"{100 * value:.1f}"


def cell(value: str | float | None) -> str:
    """What stands in a table: a text as it is, a fraction in per cent."""
    return value if isinstance(value, str) else percent(value)


def markdown_table(rows: Sequence[Sequence[str]], left: int) -> str:
    """A Markdown table, heads first; the first `left` columns are words, the others numbers, flush right."""
    head, *body = rows
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, rule, *body])
