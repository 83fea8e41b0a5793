"""`zscl compare`: runs compared, shown on a terminal, written as files, and left as a page in MLflow."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from orchestrate.reports import html_page as page
from orchestrate.reports.charts import MAIN_METRICS, draw_accuracies, draw_comparison
from orchestrate.reports.comparison import Comparison, Difference, group_runs
from orchestrate.reports.tables import (
    METRICS,
    Row,
    render_latex,
    render_markdown,
    published_rows,
    run_rows,
    terminal_tables,
)
from orchestrate.tracking.attachments import attach_files
from schemas.errors import InputError, did_you_mean
from zscl.runtime.atomic_io import atomic_file, write_text
from zscl.sequence.layout import EXPERIMENT


def compare_runs(
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
        baseline: the method from which the others' differences are shown; default: `Comparison.default_baseline`.
        note: told which store of MLflow cannot take the page; without it, none is asked.

    Returns the content for programs, and lines that say what was written where.

    Raises:
        InputError: nothing is left to compare, or there is no such baseline or order.
    """
    comparison = group_runs(found)
    labels = list(comparison.groups)
    if baseline is not None and baseline not in labels:
        raise InputError(
            f"--baseline {baseline}: found the methods {', '.join(labels)}, expected one of them"
            f"{did_you_mean(baseline, labels)}"
        )
    against = baseline or comparison.default_baseline
    rows = run_rows(comparison)
    if published:
        rows += published_rows(published, comparison.tasks)
    written = write_comparison(comparison, rows, folder, against)
    if console is not None:
        console.print(terminal_tables(comparison, rows, against, console.width))
    if note is not None:
        place = "comparison" if folder.name == "comparison" else f"comparison/{folder.name}"
        for run in comparison.runs:
            if (run.folder / EXPERIMENT).is_file():
                attach_files(run.folder, [Path(written["page"])], place, note)
    lines = [f"left out: {reason}" for reason in comparison.excluded.values()]
    if against is not None and baseline is None:
        lines.append(f"baseline  {against} (by default finetune, else zero-shot, else the first; --baseline METHOD)")
    content = {
        "rows": rows,
        "baseline": against,
        "groups": _groups(comparison, against),
        "left_out": dict(comparison.excluded),
        "files": written,
    }
    return content, [*lines, *(f"{kind:9} {file}" for kind, file in written.items())]


def _groups(comparison: Comparison, baseline: str | None) -> dict[str, Any]:
    """What programs get of the groups."""
    found: dict[str, Any] = {}
    for label, runs in comparison.groups.items():
        figures: dict[str, Any] = {}
        for figure in METRICS:
            summary = comparison.summary(label, figure)
            figures[figure] = None if summary is None else asdict(summary)
            if summary is not None and baseline is not None and label != baseline:
                figures[figure] |= _difference(comparison.difference(label, baseline, figure))
        found[label] = {"runs": [run.name for run in runs], "figures": figures}
    return found


def _difference(difference: Difference | None) -> dict[str, Any]:
    """Give a difference to programs; where no two runs make a pair, there is none, of no pairs."""
    if difference is None:
        return {"difference": None, "interval": None, "pairs": 0}
    names = {"mean": "difference"}
    return {names.get(name, name): value for name, value in asdict(difference).items()}


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
    write_text(written["markdown"], render_markdown(comparison, rows, baseline))
    write_text(written["latex"], render_latex(comparison))
    write_text(written["page"], page.build_page(comparison, rows, baseline))
    results = [run.result for run in comparison.runs]
    labels = [f"{run.label}, seed {run.result.seed}" for run in comparison.runs]
    pictures = {
        "picture": draw_comparison(results, labels, {name: comparison.zero_shot(name) for name in MAIN_METRICS}),
        "curves": draw_accuracies(*results, labels=labels),
    }
    for kind, figure in pictures.items():
        with atomic_file(written[kind]) as temporary:
            figure.savefig(temporary, format="png", dpi=120)
    return {kind: str(file) for kind, file in written.items()}
