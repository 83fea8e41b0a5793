"""A comparison as tables: rows for programs, text for a terminal, Markdown, and LaTeX for a paper."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from orchestrate.reports.charts import MAIN_METRICS
from orchestrate.reports.comparison import Comparison, Difference, MeanOverRuns
from orchestrate.reports.published import MTIL_PUBLISHED
from orchestrate.reports.results import ZERO_SHOT, format_cell, format_percent, format_markdown_table
from schemas.errors import InputError
from schemas.results import Result

METRICS = ("transfer", "avg", "last", "learned", "forgetting", "backward_transfer", "forward_transfer")
SMALLER_IS_BETTER = ("forgetting",)
DIFFERENCE_NOTE = (
    "difference from {baseline} over pairs of one seed and order, its 95 % confidence interval (paired t), and the "
    "sample it is of"
)
NUMBER_WIDTH, LONGEST_HEADING = 5, 16  # columns of a terminal
Row = dict[str, str | float | None]


def build_run_rows(comparison: Comparison) -> list[Row]:
    """One row for each zero-shot baseline and one a run: figures, then each task's final accuracy, as fractions."""
    rows: list[Row] = []
    names = comparison.tasks
    for run in comparison.runs:
        result, of_task = run.result, [task.name for task in run.result.tasks]
        zero_shot = _row(
            "",
            ZERO_SHOT,
            "",
            "",
            result.zero_shot_metrics.model_dump(),
            dict(zip(of_task, result.zero_shot, strict=True)),
        )
        row = _row(
            run.name,
            run.label,
            str(result.seed),
            run.order,
            run.metrics,
            dict(zip(of_task, result.accuracy_matrix[-1], strict=True)),
        ) | _costs(result)
        whole = len(result.accuracy_matrix) == len(result.tasks)  # of a part, the figures are of fewer rows
        alike = (*MAIN_METRICS, *names) if whole else names
        before = [other for other in rows if not other["run"]]
        if not any(all(zero_shot[name] == other[name] for name in alike) for other in before):
            told_apart = {"method": f"{ZERO_SHOT} of {run.name}"} if before else {}
            rows.append(zero_shot | told_apart | dict.fromkeys(_costs(result)))
        rows.append(row)
    columns = ["run", "method", "seed", "order", *METRICS, *names, *_costs(comparison.runs[0].result)]
    return [{column: row.get(column) for column in columns} for row in rows]


def _row(
    run: str, method: str, seed: str, order: str, figures: Mapping[str, float | None], tasks: Mapping[str, float]
) -> Row:
    return {"run": run, "method": method, "seed": seed, "order": order, **figures, **tasks}


def _costs(result: Result) -> dict[str, float]:
    """What a run cost: worker hours of training, images a second, megabytes at most."""
    seconds = sum(stage.train_seconds for stage in result.stages)
    images = sum(stage.images_seen for stage in result.stages)
    memory = [stage.peak_memory_megabytes for stage in result.stages if stage.peak_memory_megabytes is not None]
    return {
        "worker_hours": result.workers * seconds / 3600,
        "images_per_second": images / seconds if seconds else math.nan,
        "peak_memory_megabytes": max(memory, default=math.nan),
    }


def build_published_rows(order: str, tasks: Sequence[str]) -> list[Row]:
    """The paper's figures for MTIL in a task order, as rows of a comparison; it prints none for single tasks.

    Raises:
        InputError: there is no such order.
    """
    if order not in MTIL_PUBLISHED:
        raise InputError(f"--published: found the order '{order}', expected {' or '.join(MTIL_PUBLISHED)}")
    rows: list[Row] = []
    for method, figures in MTIL_PUBLISHED[order].items():
        shown = dict(zip(("transfer", "avg", "last"), (figure / 100 for figure in figures), strict=True))
        rows.append({"run": f"published, MTIL order {order}", "method": method, "seed": "", "order": "", **shown})
    return rows


def build_group_table(comparison: Comparison, baseline: str | None = None) -> list[list[str]]:
    """The groups as text, heads first: mean ± standard deviation in per cent; differences from a baseline, if any."""
    head = ["method", "runs", *MAIN_METRICS]
    rows = [[ZERO_SHOT, "", *(format_percent(comparison.zero_shot(figure)) for figure in MAIN_METRICS)]]
    for label, runs in comparison.groups.items():
        cells = [_plus_minus(comparison.summary(label, figure)) for figure in MAIN_METRICS]
        if baseline is not None and label != baseline:
            changes = [_change(comparison.difference(label, baseline, figure)) for figure in MAIN_METRICS]
            cells = [f"{figure} {change}".rstrip() for figure, change in zip(cells, changes, strict=True)]
        rows.append([label, str(len(runs)), *cells])
    return [head, *rows]


def _plus_minus(summary: MeanOverRuns | None) -> str:
    if summary is None:
        return format_percent(None)
    return format_percent(summary.mean) + (
        "" if summary.deviation is None else f" ± {format_percent(summary.deviation)}"
    )


def _change(difference: Difference | None) -> str:
    """A difference as text: in points, with its interval if it has one, and the size of the sample."""
    if difference is None:
        return ""
    of = f"{difference.size} {difference.unit if difference.size > 1 else difference.unit.removesuffix('s')}"
    if difference.interval is None:
        return f"({100 * difference.mean:+.1f}; {of})"
    low, high = difference.interval
    return f"({100 * difference.mean:+.1f}; {100 * low:+.1f} to {100 * high:+.1f}; {of})"


def build_terminal_tables(comparison: Comparison, rows: Sequence[Row], baseline: str | None, width: int) -> Group:
    """Show the comparison on a terminal: groups, runs, then each task's final accuracy with a column a run.

    Args:
        comparison: what is shown.
        rows: of it.
        baseline: from which the groups' differences are.
        width: of the terminal, in columns: runs that do not fit beside each other go into tables below each other.
    """
    tables: list[Any] = []
    head, *body = build_group_table(comparison, baseline)
    title = "Figures of the accuracy matrix, %"
    if baseline is not None:
        title += f"; mean ± standard deviation; in brackets: {DIFFERENCE_NOTE.format(baseline=baseline)}"
    if any(len(runs) > 1 for runs in comparison.groups.values()) or any(
        not row["order"] and row["run"] for row in rows
    ):
        tables.append(_table(title, head, body, ("method",)))
    words = ("run", "method", "seed")
    columns = (*words, *MAIN_METRICS)
    tables.append(
        _table("Each run, %", columns, [[format_cell(row.get(name)) for name in columns] for row in rows], words)
    )
    names = comparison.tasks
    measured = [row for row in rows if row.get(names[0]) is not None]
    for part in _fitting(measured, width - max(map(len, ["task", *names])) - 4):
        head = ["task", *(_heading(row) for row in part)]
        body = [[name, *(format_cell(row[name]) for row in part)] for name in names]
        tables.append(_table("Accuracy on each task after the last stage, %", head, body, ("task",)))
    return Group(*tables)


def _table(title: str, head: Sequence[str], body: Sequence[Sequence[str]], words: Sequence[str]) -> Table:
    """Lay out a table whose numbers are never cut; columns of words are flush left and folded where they must be."""
    table = Table(title=title)
    for number, column in enumerate(head):
        left = number == 0 or column in words
        table.add_column(
            Text(column), justify="left" if left else "right", overflow="fold", min_width=None if left else NUMBER_WIDTH
        )
    for line in body:
        table.add_row(*map(Text, line))
    return table


def _heading(row: Row) -> str:
    return str(row["run"] or row["method"])


def _fitting(rows: Sequence[Row], width: int) -> Iterator[list[Row]]:
    """Cut rows into parts whose columns fit beside each other."""
    part: list[Row] = []
    left = width
    for row in rows:
        needed = 3 + max(NUMBER_WIDTH, min(len(_heading(row)), LONGEST_HEADING))
        if part and needed > left:
            yield part
            part, left = [], width
        part.append(row)
        left -= needed
    yield part


def render_markdown(comparison: Comparison, rows: Sequence[Row], baseline: str | None) -> str:
    """Groups and runs as Markdown tables."""
    columns = [
        name for name in rows[0] if name not in ("order", "worker_hours", "images_per_second", "peak_memory_megabytes")
    ]
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
    """The groups as a LaTeX table for the package booktabs, the best mean of each figure in bold."""
    groups = comparison.groups
    means = {figure: {label: comparison.summary(label, figure) for label in groups} for figure in MAIN_METRICS}
    best = {
        figure: (min if figure in SMALLER_IS_BETTER else max)(
            (summary.mean for summary in found.values() if summary), default=math.nan
        )
        for figure, found in means.items()
    }

    def best_in_bold(label: str, figure: str) -> str:
        summary = means[figure][label]
        if summary is None:
            return "--"
        value = f"{100 * summary.mean:.1f}"
        value = f"\\textbf{{{value}}}" if value == f"{100 * best[figure]:.1f}" else value  # as far as is shown
        return value + ("" if summary.deviation is None else f" {{\\small $\\pm$ {100 * summary.deviation:.1f}}}")

    lines = [[escape_latex(label), *(best_in_bold(label, figure) for figure in MAIN_METRICS)] for label in groups]
    zero_shot = [
        ZERO_SHOT,
        *("--" if (value := comparison.zero_shot(figure)) is None else f"{100 * value:.1f}" for figure in MAIN_METRICS),
    ]
    return "\n".join(
        [
            "% needs \\usepackage{booktabs}",
            f"\\begin{{tabular}}{{l{'r' * len(MAIN_METRICS)}}}",
            "\\toprule",
            " & ".join(["Method", *(figure.capitalize() for figure in MAIN_METRICS)]) + " \\\\",
            "\\midrule",
            " & ".join(zero_shot) + " \\\\",
            *(" & ".join(line) + " \\\\" for line in lines),
            "\\bottomrule",
            "\\end{tabular}",
            "",
        ]
    )


_ESCAPES = str.maketrans(
    {sign: f"\\{sign}" for sign in "&%$#_{}"}
    | {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}"}
)


def escape_latex(text: str) -> str:
    """A text as LaTeX sets it."""
    return text.translate(_ESCAPES)
