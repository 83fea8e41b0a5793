"""Comparison of runs (`zscl compare`): tables on the terminal, output files, and an HTML page for MLflow."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from orchestrate.reports.charts import MAIN_METRICS, draw_accuracies, draw_comparison
from orchestrate.reports.comparison import Comparison, Difference, group_runs
from orchestrate.reports.html_page import build_page
from orchestrate.reports.tables import (
    METRICS,
    Row,
    build_published_rows,
    build_run_rows,
    build_terminal_tables,
    render_latex,
    render_markdown,
)
from orchestrate.tracking.attachments import attach_files
from schemas.errors import ErrorCode, InputError, did_you_mean
from zscl.runtime.atomic_io import atomic_file, write_text
from zscl.sequence.layout import EXPERIMENT


def compare_runs(
    runs: Mapping[str, Path | InputError],
    folder: Path,
    console: Console | None,
    published: str | None = None,
    baseline: str | None = None,
    note: Callable[[str], None] | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """Compare runs: print tables, write the comparison to files, and attach its HTML page to the runs in MLflow.

    Args:
        runs: Mapping from each run's name, as entered by the user, to the run's folder, or to the error that occurred
            when the run was looked up.
        folder: Output folder.
        console: Console for the tables; `None` to print none.
        published: Task order of MTIL, I or II, whose published results are added to the tables.
        baseline: Label of the method to which the other methods are compared; default: `Comparison.default_baseline`.
        note: Called with a message if an MLflow store does not accept the page. If `None`, no page is attached.

    Returns:
        The comparison as a JSON dictionary, and lines of text about excluded runs, the baseline and the written files.

    Raises:
        InputError: No run can be compared, or the baseline or the published order does not exist.
    """
    comparison = group_runs(runs)
    labels = list(comparison.groups)
    if baseline is not None and baseline not in labels:
        raise InputError(
            f"--baseline {baseline}: found the methods {', '.join(labels)}, expected one of them"
            f"{did_you_mean(baseline, labels)}",
            code=ErrorCode.UNKNOWN_NAME,
            field="--baseline",
        )
    reference = baseline or comparison.default_baseline
    rows = build_run_rows(comparison)
    if published:
        rows += build_published_rows(published, comparison.tasks)
    files = write_comparison(comparison, rows, folder, reference)
    if console is not None:
        console.print(build_terminal_tables(comparison, rows, reference, console.width))
    if note is not None:
        artifact_path = "comparison" if folder.name == "comparison" else f"comparison/{folder.name}"
        for run in comparison.runs:
            if (run.folder / EXPERIMENT).is_file():
                attach_files(run.folder, [Path(files["page"])], artifact_path, note)
    lines = [f"left out: {reason}" for reason in comparison.excluded.values()]
    if reference is not None and baseline is None:
        lines.append(f"baseline  {reference} (by default finetune, else zero-shot, else the first; --baseline METHOD)")
    content = {
        "rows": rows,
        "baseline": reference,
        "groups": _groups(comparison, reference),
        "left_out": dict(comparison.excluded),
        "files": files,
    }
    return content, [*lines, *(f"{kind:9} {file}" for kind, file in files.items())]


def _groups(comparison: Comparison, baseline: str | None) -> dict[str, Any]:
    """Convert the groups of runs, one per method, to a JSON dictionary."""
    groups: dict[str, Any] = {}
    for label, runs in comparison.groups.items():
        figures: dict[str, Any] = {}
        for metric in METRICS:
            summary = comparison.summary(label, metric)
            figures[metric] = None if summary is None else asdict(summary)
            if summary is not None and baseline is not None and label != baseline:
                figures[metric] |= _difference(comparison.difference(label, baseline, metric))
        groups[label] = {"runs": [run.name for run in runs], "figures": figures}
    return groups


def _difference(difference: Difference | None) -> dict[str, Any]:
    """Convert a difference of two methods to a JSON dictionary. `None` means that no pair of runs can be compared."""
    if difference is None:
        return {"difference": None, "interval": None, "pairs": 0}
    return {"difference" if name == "mean" else name: value for name, value in asdict(difference).items()}


def write_comparison(comparison: Comparison, rows: Sequence[Row], folder: Path, baseline: str | None) -> dict[str, str]:
    """Write a comparison as CSV (fractions), Markdown and LaTeX (per cent), charts and an HTML page.

    Args:
        comparison: The comparison.
        rows: The rows of the main table, one per run or published result.
        folder: Output folder.
        baseline: Label of the method to which the other methods are compared; `None` for no comparison with a baseline.

    Returns:
        Mapping from the kind of file to the written file.
    """
    table = io.StringIO()
    writer = csv.DictWriter(table, rows[0].keys(), lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(rows)
    suffixes = {"csv": "csv", "markdown": "md", "latex": "tex", "page": "html", "picture": "png"}
    files = {kind: folder / f"comparison.{suffix}" for kind, suffix in suffixes.items()}
    files["curves"] = folder / "accuracy_by_stage.png"
    write_text(files["csv"], table.getvalue())
    write_text(files["markdown"], render_markdown(comparison, rows, baseline))
    write_text(files["latex"], render_latex(comparison))
    write_text(files["page"], build_page(comparison, rows, baseline))
    results = [run.result for run in comparison.runs]
    labels = [f"{run.label}, seed {run.result.seed}" for run in comparison.runs]
    charts = {
        "picture": draw_comparison(results, labels, {name: comparison.zero_shot(name) for name in MAIN_METRICS}),
        "curves": draw_accuracies(*results, labels=labels),
    }
    for kind, figure in charts.items():
        with atomic_file(files[kind]) as temporary:
            figure.savefig(temporary, format="png", dpi=120)
    return {kind: str(file) for kind, file in files.items()}
