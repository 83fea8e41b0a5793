"""The comparison of runs: by method, over seeds and orders, beside published figures; what is not alike is marked."""

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from rich.console import Console, Group
from rich.table import Table
from scipy.stats import bootstrap

from orchestrate import page, report
from orchestrate.attaching import attach
from orchestrate.places import EXPERIMENT
from orchestrate.published import MTIL
from orchestrate.report import ZERO_SHOT, label_of, percent
from schemas.base import InputError
from schemas.results import Result
from zscl.files import whole_file, write_text

FIGURES = ("transfer", "avg", "last", "learned", "forgetting", "backward_transfer", "forward_transfer")
MAIN = ("transfer", "avg", "last", "forgetting")
SMALLER_IS_BETTER = ("forgetting",)
RESAMPLES, CONFIDENCE = 10_000, 0.95
Row = dict[str, str | float | None]


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


# ------------------------------------------------------------------------------------------------ what is compared


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
            runs.append(Compared(place.name, place, result, _mark(result, runs[0].result if runs else result)))
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


def _mark(result: Result, first: Result) -> str:
    """What makes a run's figures no measure of its method beside the first run's."""
    marks = []
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


# ------------------------------------------------------------------------------------------------------- tables


def run_rows(comparison: Comparison) -> list[Row]:
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
            run.figures,
            dict(zip(of_task, result.accuracy_matrix[-1], strict=True)),
        ) | _costs(result)
        if not any(
            all(zero_shot[name] == other[name] for name in (*MAIN, *names)) for other in rows if not other["run"]
        ):
            rows.append(zero_shot | dict.fromkeys(_costs(result)))
        rows.append(row)
    columns = ["run", "method", "seed", "order", *FIGURES, *names, *_costs(comparison.runs[0].result)]
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
        rows.append({"run": f"published, MTIL order {order}", "method": method, "seed": "", "order": "", **shown})
    return rows


def group_table(comparison: Comparison, baseline: str | None = None) -> list[list[str]]:
    """The groups as text, heads first: mean ± standard deviation in per cent; differences from a baseline, if any."""
    head = ["method", "runs", *MAIN]
    rows = [[ZERO_SHOT, "", *(percent(value) for value in _zero_shot_means(comparison))]]
    for label, runs in comparison.groups.items():
        cells = [_plus_minus(comparison.summary(label, figure)) for figure in MAIN]
        if baseline is not None and label != baseline:
            changes = [_change(comparison.difference(label, baseline, figure)) for figure in MAIN]
            cells = [f"{cell} {change}".rstrip() for cell, change in zip(cells, changes, strict=True)]
        rows.append([label, str(len(runs)), *cells])
    return [head, *rows]


def _zero_shot_means(comparison: Comparison) -> list[float | None]:
    found = [run.result.zero_shot_metrics.model_dump() for run in comparison.runs]
    values = [[each[figure] for each in found if each[figure] is not None] for figure in MAIN]
    return [fmean(each) if each else None for each in values]


def _plus_minus(summary: Summary | None) -> str:
    if summary is None:
        return percent(None)
    return percent(summary.mean) + ("" if summary.deviation is None else f" ± {percent(summary.deviation)}")


def _change(difference: Difference | None) -> str:
    """A difference as text: in points, with its interval."""
    if difference is None:
        return ""
    if difference.interval is None:
        return f"({100 * difference.mean:+.1f})"
    low, high = difference.interval
    return f"({100 * difference.mean:+.1f}; {100 * low:+.1f} to {100 * high:+.1f})"


def terminal_tables(comparison: Comparison, rows: Sequence[Row], baseline: str | None) -> Group:
    """The comparison for a terminal: groups, runs, then each task's final accuracy with a column a run."""
    tables: list[Any] = []
    head, *body = group_table(comparison, baseline)
    title = "Figures of the accuracy matrix, %"
    if baseline is not None:
        title += f"; in brackets: paired difference from {baseline}, with a 95 % interval"
    groups = Table(title=title)
    for column in head:
        groups.add_column(column, justify="left" if column == "method" else "right")
    for line in body:
        groups.add_row(*line)
    words = ("run", "method", "seed")
    if any(len(runs) > 1 for runs in comparison.groups.values()) or any(
        not row["order"] and row["run"] for row in rows
    ):
        tables.append(groups)
    figures = Table(title="Each run, %")
    for column in (*words, *MAIN):
        figures.add_column(column, justify="left" if column in words else "right")
    for row in rows:
        figures.add_row(*(_shown(row.get(column)) for column in (*words, *MAIN)))
    names = comparison.tasks
    measured = [row for row in rows if row.get(names[0]) is not None]
    tasks = Table(title="Accuracy on each task after the last stage, %")
    tasks.add_column("task")
    for row in measured:
        tasks.add_column(str(row["run"] or row["method"]), justify="right")
    for name in names:
        tasks.add_row(name, *(_shown(row[name]) for row in measured))
    return Group(*tables, figures, tasks)


def _shown(value: str | float | None) -> str:
    return value if isinstance(value, str) else percent(value)


def markdown(comparison: Comparison, rows: Sequence[Row], baseline: str | None) -> str:
    """Groups and runs as Markdown tables."""
    columns = [
        name for name in rows[0] if name not in ("order", "worker_hours", "images_per_second", "peak_memory_megabytes")
    ]
    runs = [columns, *([_shown(row.get(column)) for column in columns] for row in rows)]
    parts = ["## Methods\n", _table(group_table(comparison, baseline), left=1), "\n## Runs\n", _table(runs, left=3)]
    if comparison.left_out:
        parts += ["\n## Left out\n", *(f"- {reason}" for reason in comparison.left_out.values())]
    return "\n".join(parts) + "\n"


def _table(rows: Sequence[Sequence[str]], left: int) -> str:
    head, *body = rows
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, rule, *body])


def latex(comparison: Comparison) -> str:
    """The groups as a LaTeX table for the package booktabs, the best mean of each figure in bold."""
    groups = comparison.groups
    means = {figure: {label: comparison.summary(label, figure) for label in groups} for figure in MAIN}
    best = {
        figure: (min if figure in SMALLER_IS_BETTER else max)(
            (summary.mean for summary in found.values() if summary), default=math.nan
        )
        for figure, found in means.items()
    }

    def cell(label: str, figure: str) -> str:
        summary = means[figure][label]
        if summary is None:
            return "--"
        value = f"{100 * summary.mean:.1f}"
        value = f"\\textbf{{{value}}}" if summary.mean == best[figure] else value
        return value + ("" if summary.deviation is None else f" {{\\small $\\pm$ {100 * summary.deviation:.1f}}}")

    lines = [[_escaped(label), *(cell(label, figure) for figure in MAIN)] for label in groups]
    zero_shot = [
        ZERO_SHOT,
        *("--" if value is None else f"{100 * value:.1f}" for value in _zero_shot_means(comparison)),
    ]
    return "\n".join(
        [
            "% needs \\usepackage{booktabs}",
            f"\\begin{{tabular}}{{l{'r' * len(MAIN)}}}",
            "\\toprule",
            " & ".join(["Method", *(figure.capitalize() for figure in MAIN)]) + " \\\\",
            "\\midrule",
            " & ".join(zero_shot) + " \\\\",
            *(" & ".join(line) + " \\\\" for line in lines),
            "\\bottomrule",
            "\\end{tabular}",
            "",
        ]
    )


def _escaped(text: str) -> str:
    for sign in "\\&%$#_{}":
        text = text.replace(sign, "\\textbackslash{}" if sign == "\\" else f"\\{sign}")
    return text.replace("~", "\\textasciitilde{}").replace("^", "\\textasciicircum{}")


# ---------------------------------------------------------------------------------------------------- the command


def compare(
    found: Mapping[str, Path | InputError],
    folder: Path,
    console: Console | None,
    published: str | None = None,
    baseline: str | None = None,
    note: Callable[[str], None] | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """Compare runs: print the tables to a console, if any, write the files, and leave the page in MLflow.

    Args:
        found: by what the user gave: a run's folder, or why there is none.
        folder: where to write.
        console: for tables.
        published: order of MTIL whose published figures stand beside.
        baseline: the method from which the others' differences are shown; default: the first, where there are several.
        note: told which store of MLflow cannot take the page; without it, none is asked.

    Returns the content for programs, and lines that say what was written where.

    Raises:
        InputError: nothing is left to compare, or there is no such baseline or order.
    """
    comparison = gather(found)
    labels = list(comparison.groups)
    if baseline is not None and baseline not in labels:
        raise InputError(f"--baseline {baseline}: found the methods {', '.join(labels)}, expected one of them")
    against = baseline or (labels[0] if len(labels) > 1 else None)
    rows = run_rows(comparison)
    if published:
        rows += published_rows(published, comparison.tasks)
    written = write_comparison(comparison, rows, folder, against)
    if console is not None:
        console.print(terminal_tables(comparison, rows, against))
    if note is not None:
        for run in comparison.runs:
            if (run.folder / EXPERIMENT).is_file():
                attach(run.folder, [Path(written["page"])], "comparison", note)
    lines = [f"left out: {reason}" for reason in comparison.left_out.values()]
    content = {
        "rows": rows,
        "groups": _groups(comparison, against),
        "left_out": dict(comparison.left_out),
        "files": written,
    }
    return content, [*lines, *(f"{kind:9} {file}" for kind, file in written.items())]


def _groups(comparison: Comparison, baseline: str | None) -> dict[str, Any]:
    """What programs get of the groups."""
    found: dict[str, Any] = {}
    for label, runs in comparison.groups.items():
        figures: dict[str, Any] = {}
        for figure in FIGURES:
            summary = comparison.summary(label, figure)
            figures[figure] = None if summary is None else {"mean": summary.mean, "deviation": summary.deviation}
            if summary is not None and baseline is not None and label != baseline:
                difference = comparison.difference(label, baseline, figure)
                if difference is not None:
                    figures[figure] |= {"difference": difference.mean, "interval": difference.interval}
        found[label] = {"runs": [run.name for run in runs], "figures": figures}
    return found


def write_comparison(comparison: Comparison, rows: Sequence[Row], folder: Path, baseline: str | None) -> dict[str, str]:
    """Write the comparison: CSV (fractions), Markdown and LaTeX (per cent), pictures, and the page."""
    table = io.StringIO()
    writer = csv.DictWriter(table, rows[0].keys(), lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(rows)
    names = {"csv": "csv", "markdown": "md", "latex": "tex", "page": "html", "picture": "png"}
    written = {kind: folder / f"comparison.{suffix}" for kind, suffix in names.items()}
    written["curves"] = folder / "accuracy_by_stage.png"
    write_text(written["csv"], table.getvalue())
    write_text(written["markdown"], markdown(comparison, rows, baseline))
    write_text(written["latex"], latex(comparison))
    write_text(written["page"], page.page(comparison, rows, baseline))
    results = [run.result for run in comparison.runs]
    for kind, figure in (("picture", report.draw_comparison(results)), ("curves", report.draw_accuracies(*results))):
        with whole_file(written[kind]) as temporary:
            figure.savefig(temporary, format="png", dpi=120)
    return {kind: str(file) for kind, file in written.items()}
