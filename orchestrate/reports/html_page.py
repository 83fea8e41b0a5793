"""A comparison as one static page: no server, no network, one file; charts by Vega-Altair."""

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

MOST_POINTS = 60  # of a loss curve
HEIGHT = 150  # pixels of a small chart
# What the page's two lists choose, in every chart.
SHOWN_METHOD = "shown_method == null || datum.method == shown_method"
SHOWN_TASK = "shown_task == null || datum.task == shown_task"
INK = "currentColor"  # whatever the page writes with, by day and by night
THEME = {
    "background": "transparent",
    "view": {"stroke": "transparent"},
    "font": "system-ui, sans-serif",
    "axis": {"labelColor": INK, "titleColor": INK, "gridOpacity": 0.25, "domainColor": INK, "tickColor": INK},
    "legend": {"labelColor": INK, "titleColor": INK, "orient": "top", "columns": 1, "labelLimit": 400},
    "header": {"labelColor": INK, "titleColor": INK, "labelFontSize": 12},
    "title": {"color": INK},
    "text": {"color": INK},
}


def build_page(comparison: Comparison, rows: Sequence[Row], baseline: str | None) -> str:
    """The page as HTML.

    Args:
        comparison: what is shown.
        rows: a run each, published ones among them.
        baseline: from which differences are shown in the table.
    """
    charts = {
        "figures": _figures(comparison),
        "accuracy": _accuracy_by_stage(comparison),
        "matrices": _matrices(comparison),
    }
    losses = _losses(comparison)
    if losses is not None:
        charts["losses"] = losses
    environment = Environment(loader=PackageLoader("orchestrate"), autoescape=select_autoescape(default=True))
    head, *groups = build_group_table(comparison, baseline)
    return environment.get_template("comparison.html").render(
        specs={name: _embeddable(chart) for name, chart in charts.items()},
        bundle=_bundle(),
        head=head,
        groups=groups,
        changes=DIFFERENCE_NOTE.format(baseline=baseline) if baseline else None,
        methods=list(comparison.groups),
        published=[row for row in rows if str(row["run"]).startswith("published")],
        costs=[(run, _cost(rows, run.name)) for run in comparison.runs],
        tasks=comparison.tasks,
        left_out=comparison.excluded.values(),
    )


def _bundle() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script."""
    whole = vl_convert.javascript_bundle()  # type: ignore[call-arg]  # its stub wants the name of a part
    return whole.replace("</script", "<\\/script")


def _embeddable(chart: Any) -> str:
    """A chart's specification, safe within a script element."""
    return json.dumps(chart.configure(**THEME).to_dict()).replace("</", "<\\/")


def _cost(rows: Sequence[Row], run: str) -> Row:
    return next(row for row in rows if row["run"] == run)


def _figures(comparison: Comparison) -> Any:
    """Transfer, Avg, Last and forgetting as bars with their deviations; the zero-shot figures as lines."""
    values = []
    for label in comparison.groups:
        for figure in MAIN_METRICS:
            summary = comparison.summary(label, figure)
            if summary is not None:
                spread = summary.deviation or 0.0
                values.append(
                    {
                        "method": label,
                        "figure": figure,
                        "mean": 100 * summary.mean,
                        "low": 100 * (summary.mean - spread),
                        "high": 100 * (summary.mean + spread),
                        "runs": summary.runs,
                        "zero_shot": _zero_shot(comparison, figure),
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
        color=_colour(comparison),
        tooltip=tooltip,
    )
    spreads = base.mark_rule(color=INK).encode(y=y, x="low:Q", x2="high:Q")
    zero_shot = base.mark_rule(color=INK, strokeDash=[4, 3]).encode(x="zero_shot:Q")
    return (
        alt.layer(bars, spreads, zero_shot)
        .properties(width=220, height={"step": 26})
        .facet(facet=alt.Facet("figure:N", title=None, sort=list(MAIN_METRICS)), columns=2)
        .transform_filter(SHOWN_METHOD)
        .add_params(*_shown())
    )


def _zero_shot(comparison: Comparison, figure: str) -> float | None:
    found = comparison.zero_shot(figure)
    return 100 * found if found is not None and figure != "forgetting" else None


def _accuracy_by_stage(comparison: Comparison) -> Any:
    """Accuracy of each task over the stages, a line a method; the stage that trains it is marked."""
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
    colour = _colour(comparison)
    lines = base.mark_line(strokeWidth=1.6).encode(x=x, y=y, color=colour, detail="run:N")
    points = base.mark_point(filled=True, size=34).encode(x=x, y=y, color=colour, tooltip=tooltip)
    trained = base.transform_filter("datum.trained").mark_point(size=120, strokeWidth=2).encode(x=x, y=y, color=colour)
    return (
        alt.layer(lines, points, trained)
        .properties(width=220, height=HEIGHT)
        .facet(facet=alt.Facet("task:N", title=None, sort=comparison.tasks), columns=3)
        .transform_filter(SHOWN_METHOD)
        .transform_filter(SHOWN_TASK)
        .add_params(*_shown())
    )


def _colour(comparison: Comparison) -> Any:
    """A colour a method, which it keeps whatever else is shown."""
    methods = list(comparison.groups)
    return alt.Color("method:N", sort=None, title=None, scale=alt.Scale(domain=methods, range=distinct_colours(len(methods))))


def _shown() -> list[Any]:
    """The method and the task that are shown; the page sets them in all charts at once."""
    return [alt.param(name=name, value=None) for name in ("shown_method", "shown_task")]


def _matrices(comparison: Comparison) -> Any:
    """The accuracy matrix of each run, the trained cells framed."""
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
    framed = (
        base.transform_filter("datum.trained").mark_rect(fill=None, stroke="#D55E00", strokeWidth=2.5).encode(x=x, y=y)
    )
    dark = alt.condition("datum.accuracy < 60", alt.value("white"), alt.value("black"))
    numbers = base.mark_text(fontSize=10).encode(x=x, y=y, text=alt.Text("accuracy:Q", format=".0f"), color=dark)
    return (
        alt.layer(cells, framed, numbers)
        .properties(width={"step": 34}, height={"step": 24})
        .facet(facet=alt.Facet("run:N", title=None, sort=None), columns=2)
        .transform_filter(SHOWN_METHOD)
        .transform_filter(SHOWN_TASK)
        .add_params(*_shown())
    )


def _losses(comparison: Comparison) -> Any | None:
    """Loss curves of every stage, thinned out; nothing where no run has any left."""
    values: list[dict[str, Any]] = []
    for run in comparison.runs:
        for number, task in enumerate(run.result.tasks, start=1):
            values += _curve(stage_folder(run.folder, number, task.name) / LOSSES, run.name, run.label, number)
    if not values:
        return None
    stages = sorted({value["stage"] for value in values})
    bound = alt.binding_select(options=stages, name="Stage ")
    stage = alt.param(name="shown_stage", value=stages[0], bind=bound)
    return (
        alt.Chart(alt.Data(values=values))
        .mark_line(strokeWidth=1.4)
        .encode(
            x=alt.X("step:Q", title="step"),
            y=alt.Y("value:Q", title=None, scale=alt.Scale(zero=False)),
            color=_colour(comparison),
            detail="run:N",
            tooltip=[
                alt.Tooltip("run:N"),
                alt.Tooltip("loss:N"),
                alt.Tooltip("step:Q"),
                alt.Tooltip("value:Q", format=".4g"),
            ],
        )
        .properties(width=220, height=HEIGHT)
        .facet(facet=alt.Facet("loss:N", title=None), columns=3)
        .transform_filter(SHOWN_METHOD)
        .transform_filter("datum.stage == shown_stage")
        .add_params(*_shown(), stage)
        .resolve_scale(y="independent")
    )


def _curve(file: Path, run: str, method: str, stage: int) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    with file.open(encoding="utf-8", newline="") as stream:
        table = csv.DictReader(stream)
        steps = list(table)
    names = [name for name in table.fieldnames or () if name not in ("step", "learning_rate")]
    curves = {name: [step for step in steps if step[name]] for name in names}  # not every step has every loss
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
        for step in points[:: max(1, -(-len(points) // MOST_POINTS))]
    ]
