"""Tables of a comparison: rows for programs, text for the terminal, Markdown, and LaTeX for a paper."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from orchestrate.reports.charts import MAIN_METRICS
from orchestrate.reports.comparison import Comparison, Difference, MeanOverRuns
from orchestrate.reports.published import MTIL_PUBLISHED
from orchestrate.reports.results import ZERO_SHOT, format_cell, format_markdown_table, format_percent
from schemas.errors import ErrorCode, InputError
from schemas.results import Result

METRICS = ("transfer", "avg", "last", "learned", "forgetting", "backward_transfer", "forward_transfer")
SMALLER_IS_BETTER = ("forgetting",)
DIFFERENCE_NOTE = (
    "mean difference from {baseline} over pairs of runs with the same seed and task order, its 95 % confidence "
    "interval (paired t), and the size of the sample"
)
NUMBER_WIDTH, MAX_HEADING_WIDTH = 5, 16  # in columns of the terminal
COSTS = ("worker_hours", "images_per_second", "peak_memory_megabytes")
Row = dict[str, str | float | None]

_LATEX_ESCAPES = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}"}
)


def build_run_rows(comparison: Comparison) -> list[Row]:
    """Build the table rows of a comparison: one per run, and one per initial model (zero-shot).

    Runs with the same zero-shot results share one zero-shot row, which precedes the first of these runs.

    Args:
        comparison: The comparison.

    Returns:
        Rows with the metrics and the final accuracy on every task, as fractions, and with the training costs.
    """
    rows: list[Row] = []
    tasks = comparison.tasks
    for run in comparison.runs:
        result, names = run.result, [task.name for task in run.result.tasks]
        zero_shot_tasks = dict(zip(names, result.zero_shot, strict=True))
        zero_shot = _row("", ZERO_SHOT, "", "", result.zero_shot_metrics.model_dump(), zero_shot_tasks)
        final_tasks = dict(zip(names, result.accuracy_matrix[-1], strict=True))
        row = _row(run.name, run.label, str(result.seed), run.order, run.metrics, final_tasks) | _costs(result)
        # The zero-shot metrics of an unfinished run cover fewer stages, so only the accuracies are compared.
        is_finished = len(result.accuracy_matrix) == len(result.tasks)
        compared = (*MAIN_METRICS, *tasks) if is_finished else tasks
        baselines = [other for other in rows if not other["run"]]
        if not any(all(zero_shot[name] == other[name] for name in compared) for other in baselines):
            method = {"method": f"{ZERO_SHOT} of {run.name}"} if baselines else {}
            rows.append(zero_shot | method | dict.fromkeys(COSTS))
        rows.append(row)
    columns = ["run", "method", "seed", "order", *METRICS, *tasks, *COSTS]
    return [{column: row.get(column) for column in columns} for row in rows]


def _row(
    run: str, method: str, seed: str, order: str, metrics: Mapping[str, float | None], tasks: Mapping[str, float]
) -> Row:
    return {"run": run, "method": method, "seed": seed, "order": order, **metrics, **tasks}


def _costs(result: Result) -> dict[str, float]:
    """Return a run's costs: worker hours of training, images per second, and peak memory in megabytes."""
    seconds = sum(stage.train_seconds for stage in result.stages)
    images = sum(stage.images_seen for stage in result.stages)
    memory = [stage.peak_memory_megabytes for stage in result.stages if stage.peak_memory_megabytes is not None]
    costs = (
        result.workers * seconds / 3600,
        images / seconds if seconds else math.nan,
        max(memory, default=math.nan),
    )
    return dict(zip(COSTS, costs, strict=True))


def build_published_rows(order: str, tasks: Sequence[str]) -> list[Row]:
    """Build table rows with the paper's published results on MTIL. They contain no accuracies on single tasks.

    Args:
        order: The paper's name of the task order: `I` or `II`.
        tasks: The names of the comparison's tasks.

    Returns:
        One row per method.

    Raises:
        InputError: The paper has no task order of this name.
    """
    if order not in MTIL_PUBLISHED:
        raise InputError(
            f"--published: found the order '{order}', expected {' or '.join(MTIL_PUBLISHED)}",
            code=ErrorCode.UNKNOWN_NAME,
            field="--published",
        )
    rows: list[Row] = []
    for method, percentages in MTIL_PUBLISHED[order].items():
        metrics = dict(zip(("transfer", "avg", "last"), (value / 100 for value in percentages), strict=True))
        rows.append({"run": f"published, MTIL order {order}", "method": method, "seed": "", "order": "", **metrics})
    return rows


def build_group_table(comparison: Comparison, baseline: str | None = None) -> list[list[str]]:
    """Build a table with one row per group and the main metrics as mean ± standard deviation in per cent.

    Args:
        comparison: The comparison.
        baseline: The label of the group with which the other groups are compared; `None` for a table without
            differences.

    Returns:
        The formatted cells of every row. The first row is the header, and the second row contains the zero-shot
            results.
    """
    header = ["method", "runs", *MAIN_METRICS]
    rows = [[ZERO_SHOT, "", *(format_percent(comparison.zero_shot(metric)) for metric in MAIN_METRICS)]]
    for label, runs in comparison.groups.items():
        cells = [_format_summary(comparison.summary(label, metric)) for metric in MAIN_METRICS]
        if baseline is not None and label != baseline:
            changes = [_format_difference(comparison.difference(label, baseline, metric)) for metric in MAIN_METRICS]
            cells = [f"{cell} {change}".rstrip() for cell, change in zip(cells, changes, strict=True)]
        rows.append([label, str(len(runs)), *cells])
    return [header, *rows]


def _format_summary(summary: MeanOverRuns | None) -> str:
    if summary is None:
        return format_percent(None)
    deviation = "" if summary.deviation is None else f" ± {format_percent(summary.deviation)}"
    return format_percent(summary.mean) + deviation


def _format_difference(difference: Difference | None) -> str:
    """Format a difference in percentage points, its confidence interval if there is one, and the sample's size."""
    if difference is None:
        return ""
    unit = difference.unit if difference.size > 1 else difference.unit.removesuffix("s")
    if difference.interval is None:
        return f"({100 * difference.mean:+.1f}; {difference.size} {unit})"
    low, high = difference.interval
    return f"({100 * difference.mean:+.1f}; {100 * low:+.1f} to {100 * high:+.1f}; {difference.size} {unit})"


def build_terminal_tables(comparison: Comparison, rows: Sequence[Row], baseline: str | None, width: int) -> Group:
    """Build tables for a terminal: the groups, the runs, and the final accuracy on every task with one column per run.

    Args:
        comparison: The comparison.
        rows: The table rows of the runs (`build_run_rows`) and of published results (`build_published_rows`).
        baseline: The label of the group with which the other groups are compared; `None` for tables without
            differences.
        width: The terminal's width in characters. If the columns of all runs do not fit, the accuracies are split into
            several tables.

    Returns:
        The tables.
    """
    tables: list[Any] = []
    header, *body = build_group_table(comparison, baseline)
    title = "Metrics of the accuracy matrix, %"
    if baseline is not None:
        title += f"; mean ± standard deviation; in brackets: {DIFFERENCE_NOTE.format(baseline=baseline)}"
    has_published = any(not row["order"] and row["run"] for row in rows)
    if has_published or any(len(runs) > 1 for runs in comparison.groups.values()):
        tables.append(_table(title, header, body, ("method",)))
    text_columns = ("run", "method", "seed")
    columns = (*text_columns, *MAIN_METRICS)
    cells = [[format_cell(row.get(name)) for name in columns] for row in rows]
    tables.append(_table("Each run, %", columns, cells, text_columns))
    tasks = comparison.tasks
    rows_with_tasks = [row for row in rows if row.get(tasks[0]) is not None]
    for part in _split_by_width(rows_with_tasks, width - max(map(len, ["task", *tasks])) - 4):
        header = ["task", *(_heading(row) for row in part)]
        body = [[name, *(format_cell(row[name]) for row in part)] for name in tasks]
        tables.append(_table("Accuracy on each task after the last stage, %", header, body, ("task",)))
    return Group(*tables)


def _table(title: str, header: Sequence[str], body: Sequence[Sequence[str]], text_columns: Sequence[str]) -> Table:
    """Build a table in which only texts are wrapped. Texts are aligned to the left, numbers to the right."""
    table = Table(title=title)
    for number, column in enumerate(header):
        is_text = number == 0 or column in text_columns
        table.add_column(
            Text(column),
            justify="left" if is_text else "right",
            overflow="fold",
            min_width=None if is_text else NUMBER_WIDTH,
        )
    for row in body:
        table.add_row(*map(Text, row))
    return table


def _heading(row: Row) -> str:
    return str(row["run"] or row["method"])


def _split_by_width(rows: Sequence[Row], width: int) -> Iterator[list[Row]]:
    """Split the rows of runs into parts for several tables with one column per run.

    Args:
        rows: The rows of the runs.
        width: The maximum total width of a table's columns, in characters.

    Yields:
        The rows of one table.
    """
    part: list[Row] = []
    available = width
    for row in rows:
        required = 3 + max(NUMBER_WIDTH, min(len(_heading(row)), MAX_HEADING_WIDTH))
        if part and required > available:
            yield part
            part, available = [], width
        part.append(row)
        available -= required
    yield part


def render_markdown(comparison: Comparison, rows: Sequence[Row], baseline: str | None) -> str:
    """Format the groups and the runs as Markdown tables.

    Args:
        comparison: The comparison.
        rows: The table rows of the runs (`build_run_rows`) and of published results (`build_published_rows`).
        baseline: The label of the group with which the other groups are compared; `None` for tables without
            differences.

    Returns:
        The Markdown text.
    """
    columns = [name for name in rows[0] if name not in ("order", *COSTS)]
    runs = [columns, *([format_cell(row.get(column)) for column in columns] for row in rows)]
    parts = [
        "## Methods\n",
        "In per cent, mean ± standard deviation over the runs."
        + (f" In brackets: {DIFFERENCE_NOTE.format(baseline=baseline)}." if baseline else "")
        + "\n",
        format_markdown_table(build_group_table(comparison, baseline), text_columns=1),
        "\n## Runs\n",
        format_markdown_table(runs, text_columns=3),
    ]
    if comparison.excluded:
        parts += ["\n## Left out\n", *(f"- {reason}" for reason in comparison.excluded.values())]
    return "\n".join(parts) + "\n"


def render_latex(comparison: Comparison) -> str:
    """Format the groups as a LaTeX table for the package booktabs, with the best mean of each metric in bold."""
    groups = comparison.groups
    summaries = {metric: {label: comparison.summary(label, metric) for label in groups} for metric in MAIN_METRICS}
    best = {
        metric: (min if metric in SMALLER_IS_BETTER else max)(
            (summary.mean for summary in by_label.values() if summary), default=math.nan
        )
        for metric, by_label in summaries.items()
    }

    def format_mean(label: str, metric: str) -> str:
        summary = summaries[metric][label]
        if summary is None:
            return "--"
        value = f"{100 * summary.mean:.1f}"
        value = f"\\textbf{{{value}}}" if value == f"{100 * best[metric]:.1f}" else value  # rounded values are compared
        return value + ("" if summary.deviation is None else f" {{\\small $\\pm$ {100 * summary.deviation:.1f}}}")

    rows = [[escape_latex(label), *(format_mean(label, metric) for metric in MAIN_METRICS)] for label in groups]
    zero_shot = [
        ZERO_SHOT,
        *("--" if (value := comparison.zero_shot(metric)) is None else f"{100 * value:.1f}" for metric in MAIN_METRICS),
    ]
    return "\n".join(
        [
            "% needs \\usepackage{booktabs}",
            f"\\begin{{tabular}}{{l{'r' * len(MAIN_METRICS)}}}",
            "\\toprule",
            " & ".join(["Method", *(metric.capitalize() for metric in MAIN_METRICS)]) + " \\\\",
            "\\midrule",
            " & ".join(zero_shot) + " \\\\",
            *(" & ".join(row) + " \\\\" for row in rows),
            "\\bottomrule",
            "\\end{tabular}",
            "",
        ]
    )


def escape_latex(text: str) -> str:
    """Escape LaTeX's special characters in a text."""
    return text.translate(_LATEX_ESCAPES)
