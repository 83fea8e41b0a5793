"""HTML page of a comparison with Vega-Altair charts. It is a single file that needs neither a server nor a network.

The page's template and the data of the charts use the name `figure` for a metric.
"""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import altair as alt
import vl_convert
from jinja2 import Environment, PackageLoader, select_autoescape

from orchestrate.reports.charts import MAIN_METRICS, distinct_colours
from orchestrate.reports.comparison import Comparison
from orchestrate.reports.results import ZERO_SHOT
from orchestrate.reports.tables import DIFFERENCE_NOTE, Row, build_group_table
from zscl.sequence.layout import LOSSES, stage_folder

MAX_CURVE_POINTS = 60  # the maximum number of points of a loss curve
CHART_HEIGHT = 150  # the height of a small chart in pixels
# Filters for the charts. The page sets `shown_method` and `shown_task` when the user selects a method or a task.
METHOD_FILTER = "shown_method == null || datum.method == shown_method"
TASK_FILTER = "shown_task == null || datum.task == shown_task"
TEXT_COLOUR = "currentColor"  # the page's text colour, which differs between the light and the dark theme
THEME = {
    "background": "transparent",
    "view": {"stroke": "transparent"},
    "font": "system-ui, sans-serif",
    "axis": {
        "labelColor": TEXT_COLOUR,
        "titleColor": TEXT_COLOUR,
        "gridOpacity": 0.25,
        "domainColor": TEXT_COLOUR,
        "tickColor": TEXT_COLOUR,
    },
    "legend": {"labelColor": TEXT_COLOUR, "titleColor": TEXT_COLOUR, "orient": "top", "columns": 1, "labelLimit": 400},
    "header": {"labelColor": TEXT_COLOUR, "titleColor": TEXT_COLOUR, "labelFontSize": 12},
    "title": {"color": TEXT_COLOUR},
    "text": {"color": TEXT_COLOUR},
}


def build_page(comparison: Comparison, rows: Sequence[Row], baseline: str | None) -> str:
    """Build the HTML page of a comparison.

    Args:
        comparison: The comparison.
        rows: The table rows of the runs (`build_run_rows`) and of published results (`build_published_rows`).
        baseline: The label of the group with which the other groups are compared; `None` for a table without
            differences.

    Returns:
        The page as HTML.
    """
    charts = {
        "figures": _draw_metrics(comparison),
        "accuracy": _draw_accuracies(comparison),
        "matrices": _draw_matrices(comparison),
    }
    losses = _draw_losses(comparison)
    if losses is not None:
        charts["losses"] = losses
    environment = Environment(loader=PackageLoader("orchestrate"), autoescape=select_autoescape(default=True))
    header, *groups = build_group_table(comparison, baseline)
    return environment.get_template("comparison.html").render(
        specs={name: _dump_chart(chart) for name, chart in charts.items()},
        bundle=_javascript_bundle(),
        head=header,
        groups=groups,
        changes=DIFFERENCE_NOTE.format(baseline=baseline) if baseline else None,
        methods=list(comparison.groups),
        published=[row for row in rows if str(row["run"]).startswith("published")],
        costs=[(run, _row_of(rows, run.name)) for run in comparison.runs],
        tasks=comparison.tasks,
        left_out=comparison.excluded.values(),
    )


def _javascript_bundle() -> str:
    """Return Vega, Vega-Lite and Vega-Embed as one script."""
    script = vl_convert.javascript_bundle()  # type: ignore[call-arg]  # its stub requires an optional argument
    return script.replace("</script", "<\\/script")


def _dump_chart(chart: Any) -> str:
    """Return a chart's specification as JSON that can be embedded in a script element."""
    return json.dumps(chart.configure(**THEME).to_dict()).replace("</", "<\\/")


def _row_of(rows: Sequence[Row], run: str) -> Row:
    return next(row for row in rows if row["run"] == run)


def _draw_metrics(comparison: Comparison) -> Any:
    """Draw the main metrics as bars with standard deviations, and the zero-shot metrics as lines."""
    values = []
    for label in comparison.groups:
        for metric in MAIN_METRICS:
            summary = comparison.summary(label, metric)
            if summary is not None:
                deviation = summary.deviation or 0.0
                values.append(
                    {
                        "method": label,
                        "figure": metric,
                        "mean": 100 * summary.mean,
                        "low": 100 * (summary.mean - deviation),
                        "high": 100 * (summary.mean + deviation),
                        "runs": summary.runs,
                        "zero_shot": _zero_shot_percent(comparison, metric),
                    }
                )
    base = alt.Chart(alt.Data(values=values))
    tooltip = [
        alt.Tooltip("method:N"),
        alt.Tooltip("figure:N"),
        alt.Tooltip("mean:Q", format=".1f", title="mean, %"),
        alt.Tooltip("low:Q", format=".1f", title="mean − deviation"),
        alt.Tooltip("high:Q", format=".1f", title="mean + deviation"),
        alt.Tooltip("runs:Q"),
        alt.Tooltip("zero_shot:Q", format=".1f", title="zero-shot"),
    ]
    y = alt.Y("method:N", sort=None, axis=alt.Axis(title=None, labels=False, ticks=False))
    bars = base.mark_bar(cornerRadius=2).encode(
        y=y,
        x=alt.X("mean:Q", title="%"),
        color=_colour_by_method(comparison),
        tooltip=tooltip,
    )
    deviations = base.mark_rule(color=TEXT_COLOUR).encode(y=y, x="low:Q", x2="high:Q")
    zero_shot = base.mark_rule(color=TEXT_COLOUR, strokeDash=[4, 3]).encode(x="zero_shot:Q")
    return (
        alt.layer(bars, deviations, zero_shot)
        .properties(width=220, height={"step": 26})
        .facet(facet=alt.Facet("figure:N", title=None, sort=list(MAIN_METRICS)), columns=2)
        .transform_filter(METHOD_FILTER)
        .add_params(*_filter_params())
    )


def _zero_shot_percent(comparison: Comparison, metric: str) -> float | None:
    value = comparison.zero_shot(metric)
    return 100 * value if value is not None and metric != "forgetting" else None


def _draw_accuracies(comparison: Comparison) -> Any:
    """Draw the accuracy on every task over the stages, with one line per run.

    A circle marks the stage that trained on the task.

    Returns:
        The chart, with one panel per task.
    """
    values = []
    for run in comparison.runs:
        names = [task.name for task in run.result.tasks]
        for stage, row in enumerate([run.result.zero_shot, *run.result.accuracy_matrix]):
            for index, value in enumerate(row):
                point = {"run": run.name, "method": run.label, "task": names[index], "stage": stage}
                values.append(point | {"accuracy": 100 * value, "trained": stage == index + 1})
    base = alt.Chart(alt.Data(values=values))
    tooltip = [
        alt.Tooltip("run:N"),
        alt.Tooltip("method:N"),
        alt.Tooltip("task:N"),
        alt.Tooltip("stage:Q", title="stages trained"),
        alt.Tooltip("accuracy:Q", format=".1f", title="accuracy, %"),
    ]
    x = alt.X(
        "stage:Q", title="stages trained", axis=alt.Axis(values=list(range(len(comparison.tasks) + 1)), format="d")
    )
    y = alt.Y("accuracy:Q", title="%", scale=alt.Scale(domain=[0, 100]))
    colour = _colour_by_method(comparison)
    lines = base.mark_line(strokeWidth=1.6).encode(x=x, y=y, color=colour, detail="run:N")
    points = base.mark_point(filled=True, size=34).encode(x=x, y=y, color=colour, tooltip=tooltip)
    trained = base.transform_filter("datum.trained").mark_point(size=120, strokeWidth=2).encode(x=x, y=y, color=colour)
    return (
        alt.layer(lines, points, trained)
        .properties(width=220, height=CHART_HEIGHT)
        .facet(facet=alt.Facet("task:N", title=None, sort=comparison.tasks), columns=3)
        .transform_filter(METHOD_FILTER)
        .transform_filter(TASK_FILTER)
        .add_params(*_filter_params())
    )


def _colour_by_method(comparison: Comparison) -> Any:
    """Return the Altair encoding that colours marks by method. A method has the same colour in all charts."""
    methods = list(comparison.groups)
    scale = alt.Scale(domain=methods, range=distinct_colours(len(methods)))
    return alt.Color("method:N", sort=None, title=None, scale=scale)


def _filter_params() -> list[Any]:
    """Return the Vega parameters `shown_method` and `shown_task`, which the page sets in all charts."""
    return [alt.param(name=name, value=None) for name in ("shown_method", "shown_task")]


def _draw_matrices(comparison: Comparison) -> Any:
    """Draw the accuracy matrix of every run. In the row of a stage, a frame marks the task that it trained on."""
    values = []
    for run in comparison.runs:
        names = [task.name for task in run.result.tasks]
        stages = [ZERO_SHOT, *names]
        for stage, row in enumerate([run.result.zero_shot, *run.result.accuracy_matrix]):
            for index, value in enumerate(row):
                cell = {"run": run.name, "method": run.label, "task": names[index]}
                cell["after"] = f"{stage} {stages[stage]}"
                values.append(cell | {"accuracy": 100 * value, "trained": stage == index + 1})
    base = alt.Chart(alt.Data(values=values))
    x = alt.X("task:N", title=None, sort=None, axis=alt.Axis(labelAngle=-40))
    y = alt.Y("after:N", title="after stage", sort=None)
    tooltip = [
        alt.Tooltip("run:N"),
        alt.Tooltip("after:N"),
        alt.Tooltip("task:N"),
        alt.Tooltip("accuracy:Q", format=".1f"),
    ]
    cells = base.mark_rect().encode(
        x=x,
        y=y,
        tooltip=tooltip,
        color=alt.Color("accuracy:Q", title="%", scale=alt.Scale(scheme="viridis", domain=[0, 100])),
    )
    frames = (
        base.transform_filter("datum.trained").mark_rect(fill=None, stroke="#D55E00", strokeWidth=2.5).encode(x=x, y=y)
    )
    text_colour = alt.condition("datum.accuracy < 60", alt.value("white"), alt.value("black"))
    numbers = base.mark_text(fontSize=10).encode(x=x, y=y, text=alt.Text("accuracy:Q", format=".0f"), color=text_colour)
    return (
        alt.layer(cells, frames, numbers)
        .properties(width={"step": 34}, height={"step": 24})
        .facet(facet=alt.Facet("run:N", title=None, sort=None), columns=2)
        .transform_filter(METHOD_FILTER)
        .transform_filter(TASK_FILTER)
        .add_params(*_filter_params())
    )


def _draw_losses(comparison: Comparison) -> Any | None:
    """Draw the loss curves of every stage.

    Returns:
        The chart, whose curves have at most `MAX_CURVE_POINTS` points; `None` if no run has a curve.
    """
    values: list[dict[str, Any]] = []
    for run in comparison.runs:
        for number, task in enumerate(run.result.tasks, start=1):
            values += _read_curve(stage_folder(run.folder, number, task.name) / LOSSES, run.name, run.label, number)
    if not values:
        return None
    stages = sorted({value["stage"] for value in values})
    binding = alt.binding_select(options=stages, name="Stage ")
    stage = alt.param(name="shown_stage", value=stages[0], bind=binding)
    return (
        alt.Chart(alt.Data(values=values))
        .mark_line(strokeWidth=1.4)
        .encode(
            x=alt.X("step:Q", title="step"),
            y=alt.Y("value:Q", title=None, scale=alt.Scale(zero=False)),
            color=_colour_by_method(comparison),
            detail="run:N",
            tooltip=[
                alt.Tooltip("run:N"),
                alt.Tooltip("loss:N"),
                alt.Tooltip("step:Q"),
                alt.Tooltip("value:Q", format=".4g"),
            ],
        )
        .properties(width=220, height=CHART_HEIGHT)
        .facet(facet=alt.Facet("loss:N", title=None), columns=3)
        .transform_filter(METHOD_FILTER)
        .transform_filter("datum.stage == shown_stage")
        .add_params(*_filter_params(), stage)
        .resolve_scale(y="independent")
    )


def _read_curve(file: Path, run: str, method: str, stage: int) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    with file.open(encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream)
        steps = list(reader)
    names = [name for name in reader.fieldnames or () if name not in ("step", "learning_rate")]
    curves = {name: [step for step in steps if step[name]] for name in names}  # a step may lack a loss
    return [
        {
            "run": run,
            "method": method,
            "stage": stage,
            "loss": name,
            "step": int(step["step"]),
            "value": float(step[name]),
        }
        for name, points in curves.items()
        for step in points[:: max(1, -(-len(points) // MAX_CURVE_POINTS))]
    ]
