"""`zscl evaluate`: any model, or the models of a run, on any tasks, under more protocols than the matrix has."""

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pydantic import ValidationError
from rich.console import Console, Group
from rich.table import Table

from orchestrate.lifecycle.paths import SEARCH
from orchestrate.recipes.recipe import load_experiment
from orchestrate.reports.results import ZERO_SHOT, format_percent
from orchestrate.runs.progress import ProgressBar
from orchestrate.tracking.attachments import attach_files
from schemas.base import explain, input_error
from schemas.data import Task
from schemas.errors import InputError
from schemas.evaluation import PROTOCOLS, EvaluationReport, ModelEvaluation, Protocol, TaskEvaluation
from schemas.experiment import LOCAL_MODEL, Experiment, Model
from schemas.results import Metrics
from zscl.checks.prompts import prompt_warnings
from zscl.data.indexed import IndexedSamples
from zscl.data.loader import Loader
from zscl.data.task import TaskFolder
from zscl.evaluation.metrics import compute_metrics
from zscl.evaluation.protocols import evaluate_tasks
from zscl.models.clip import CONFIG, load_clip, weights_digest
from zscl.runtime.atomic_io import atomic_file, write_text
from zscl.sequence.layout import EXPERIMENT, TRAINING, stage_files
from zscl.sequence.resolve import resolve_tasks
from zscl.sequence.run import LIBRARIES

EVALUATION = "evaluation.json"
ALL = "all"
MOST_BROKEN = 0.01  # share of a task's test images that may be unusable, where no run's recipe says otherwise
LABELLED = 12  # classes whose names a confusion table's picture has room for


@dataclass(frozen=True)
class EvaluationOptions:
    """How to judge; `None` where a run's own recipe, or the default, decides."""

    protocols: tuple[Protocol, ...] = PROTOCOLS
    templates: str | None = None
    precision: str | None = None
    batch_size: int = 256
    loader_processes: int = 0


def parse_options(
    protocols: str, templates: str | None, precision: str | None, batch_size: int, loader_processes: int
) -> EvaluationOptions:
    """Check what the command line was given.

    Raises:
        InputError: a protocol, or another choice, that there is not.
    """
    chosen = tuple(protocol for protocol in PROTOCOLS if protocol in protocols.split(","))
    unknown = [name for name in protocols.split(",") if name not in PROTOCOLS]
    for option, found, allowed in (
        ("--protocol", unknown[0] if unknown else None, PROTOCOLS),
        ("--templates", templates, ("all", "first")),
        ("--precision", precision, ("fp32", "bf16")),
    ):
        if found is not None and found not in allowed:
            raise InputError(f"{option}: found '{found}', expected {' or '.join(allowed)}")
    return EvaluationOptions(chosen, templates, precision, batch_size, loader_processes)


@dataclass(frozen=True)
class EvaluationTarget:
    """What is judged.

    models: with their stage in a run, if they are of one; tasks, suites: on what; run: its folder; own: whether the
    tasks are the run's; whole: whether these are also all its stages.
    """

    models: tuple[tuple[int | None, Model], ...]
    tasks: tuple[TaskFolder, ...]
    suites: tuple[TaskFolder, ...]
    run: Path | None = None
    experiment: Experiment | None = None
    own: bool = False
    whole: bool = False

    @property
    def held_out(self) -> bool:
        """Whether a run's held-out training images are what it is judged on."""
        held_out = self.experiment.evaluation.held_out if self.experiment and self.own else None
        return held_out is not None and held_out.judged_on == "held_out"

    def place(self, stage: int | None, model: Model) -> str:
        """What a model is called."""
        if stage is None:
            return model.name if model.pretrained is None else f"{model.name}, {model.pretrained}"
        return f"{stage}-{Path(model.name).parent.name.partition('-')[2]}" if stage else ZERO_SHOT


def resolve_target(
    what: str, pretrained: str | None, stage: str | None, tasks: Sequence[str], suites: Sequence[str]
) -> EvaluationTarget:
    """Find the models and the tasks.

    Args:
        what: a run's folder, a model's folder, or a name that open_clip knows.
        pretrained: open_clip tag or weights file, for such a name.
        stage: of a run, from 0 (the initial model), or `all`; default: the last one that is trained.
        tasks: folders; default: those of the run.
        suites: folders of further tasks, whose classes join no others'.

    Raises:
        InputError: there is no such run, stage, model or task.
    """
    folder = Path(what).expanduser().absolute()
    extra = tuple(_opened(suite) for suite in suites)
    if (folder / SEARCH).is_file():
        raise InputError(f"{what}: found a search, expected a run: one of {folder}/trials, say")
    if not (folder / EXPERIMENT).is_file():
        if stage is not None:
            raise InputError(f"--stage {stage}: found '{what}', which is no run's folder, expected one that has stages")
        if not tasks and "/" in what and not folder.exists():
            raise InputError(f"{what}: found no such folder, expected a run's, or --task for a model of that name")
        if not tasks:
            raise InputError(f"--task: found none for the model '{what}', expected tasks to judge it on")
        name = f"{LOCAL_MODEL}{folder}" if (folder / CONFIG).is_file() else what
        model = _model(name, pretrained)
        return EvaluationTarget(((None, model),), tuple(map(_opened, tasks)), extra)
    if pretrained is not None:
        raise InputError(f"--pretrained {pretrained}: found it with a run, whose models bring their weights")
    experiment = load_experiment(folder / EXPERIMENT)
    trained = stage_files(folder, TRAINING)
    models = [(0, experiment.model)]
    models += [(k, Model(name=f"{LOCAL_MODEL}{file.parent}/model")) for k, file in enumerate(trained, start=1)]
    opened = tuple(map(_opened, tasks)) if tasks else resolve_tasks(experiment)[1]
    whole = stage == ALL and not tasks and len(trained) == len(opened)
    return EvaluationTarget(tuple(_chosen(models, stage, folder)), opened, extra, folder, experiment, not tasks, whole)


def _chosen(models: Sequence[tuple[int, Model]], stage: str | None, run: Path) -> list[tuple[int, Model]]:
    if stage == ALL:
        return list(models)
    if stage is not None and not (stage.isdecimal() and int(stage) < len(models)):
        raise InputError(f"--stage {stage}: found {len(models) - 1} trained stages in {run}, expected 0 to that or all")
    return [models[-1 if stage is None else int(stage)]]


def _model(name: str, pretrained: str | None) -> Model:
    try:
        return Model(name=name, pretrained=pretrained)
    except ValueError as error:
        raise InputError(
            f"{name}: found no run's folder, no open_clip folder and no name with --pretrained beside it, expected one"
        ) from error


def _opened(path: str) -> TaskFolder:
    location = path if "://" in path else str(Path(path).expanduser().absolute())
    try:
        return TaskFolder.open(Task.model_validate({"path": location}))
    except ValidationError as error:
        raise input_error(error, f"{path}: {explain(error)}") from error


def evaluate_models(subject: EvaluationTarget, options: EvaluationOptions, console: Console) -> EvaluationReport:
    """Judge every model of the subject on its tasks and suites.

    Raises:
        InputError: a model or a shard cannot be read, or a task has no usable image.
    """
    _refuse_same_names([*subject.tasks, *subject.suites])
    experiment = subject.experiment
    templates = options.templates or (experiment.evaluation.templates if experiment else "all")
    precision = options.precision or (experiment.optimisation.precision if experiment else "fp32")
    share = experiment.compute.max_broken_share if experiment else MOST_BROKEN
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sets = [task.test for task in (*subject.tasks, *subject.suites)]
    images = sum(len(each) for each in sets if isinstance(each, IndexedSamples)) * len(subject.models)
    judged_models, warnings = list[ModelEvaluation](), list[str]()
    with ProgressBar(console, total=images or None) as bar:
        loader = Loader(device, options.loader_processes, max_broken_share=share, on_skip=bar.print)
        for task in (*subject.tasks, *subject.suites):
            for sentence in task.list_warnings("test"):
                bar.print(f"warning: task '{task.name}', {sentence}")
        for stage, model in subject.models:
            name = subject.place(stage, model)
            bar.update(f"judging {name}", bar.done)
            clip = load_clip(model, device)
            if not judged_models:  # several models are the stages of one run, which have one tokenizer
                prompted = (*subject.tasks, *subject.suites)
                warnings += dict.fromkeys(each for task in prompted for each in prompt_warnings(task, clip.tokenizer))
                for sentence in warnings:
                    bar.print(f"warning: {sentence}")
            judged = evaluate_tasks(
                clip,
                subject.tasks,
                subject.suites,
                options.protocols,
                loader,
                templates=templates,
                precision=precision,
                batch_size=options.batch_size,
                on_images=_counter(bar, f"judging {name}"),
            )
            judged_models.append(
                ModelEvaluation(model=name, stage=stage, digest=weights_digest(model), judged=tuple(judged))
            )
    return EvaluationReport(
        tasks=tuple(task.name for task in subject.tasks),
        suites=tuple(suite.name for suite in subject.suites),
        templates="first" if templates == "first" else "all",
        held_out=subject.held_out,
        models=tuple(judged_models),
        figures={protocol: _figures(judged_models, subject, protocol) for protocol in options.protocols}
        if subject.whole
        else {},
        versions={library: version(library) for library in LIBRARIES},
        warnings=tuple(warnings),
    )


def _counter(bar: ProgressBar, what: str) -> Callable[[int], None]:
    return lambda images: bar.update(what, bar.done + images)


def _refuse_same_names(tasks: Sequence[TaskFolder]) -> None:
    names = [task.name for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"found two tasks or suites called '{name}', expected folders of different names")


def _figures(models: Sequence[ModelEvaluation], subject: EvaluationTarget, protocol: Protocol) -> Metrics:
    zero_shot, *matrix = [[each.top1 for each in _of(model, protocol, subject.tasks)] for model in models]
    return compute_metrics(matrix, zero_shot)


def _of(model: ModelEvaluation, protocol: Protocol, tasks: Sequence[TaskFolder]) -> list[TaskEvaluation]:
    names = [task.name for task in tasks]
    return [each for each in model.judged if each.protocol == protocol and each.task in names]


# ------------------------------------------------------------------------------------------------- what is shown


def evaluation_tables(found: EvaluationReport) -> Group:
    """One model in detail; several, a row each."""
    protocols = list(dict.fromkeys(each.protocol for each in found.models[0].judged))
    if len(found.models) == 1:
        return Group(*(_detailed(found.models[0], protocol) for protocol in protocols))
    return Group(*(_by_model(found, protocol) for protocol in protocols))


def _detailed(model: ModelEvaluation, protocol: Protocol) -> Table:
    table = Table(title=f"{model.model}, {protocol}, %", title_justify="left")
    table.add_column("task")
    for column in ("images", "classes", "top-1", "top-5", "mean per class", "calibration error", "most confused"):
        table.add_column(column, justify="left" if column == "most confused" else "right")
    for each in model.judged:
        if each.protocol == protocol:
            shares = (each.top1, each.top5, each.mean_per_class, each.calibration_error)
            table.add_row(
                each.task, str(each.images), str(each.classes), *map(format_percent, shares), _most_confused(each)
            )
    return table


def _most_confused(judged: TaskEvaluation) -> str:
    wrong = [pair for pair in judged.confused if pair.true != pair.predicted]
    worst = max(wrong, key=lambda pair: pair.images, default=None)
    return f"{worst.true} → {worst.predicted} ({worst.images})" if worst else "–"


def _by_model(found: EvaluationReport, protocol: Protocol) -> Table:
    figures = found.figures.get(protocol)
    said = ""
    if figures is not None:
        said = f": Transfer {format_percent(figures.transfer)}, Avg {format_percent(figures.avg)}, Last {format_percent(figures.last)}"
    table = Table(title=f"top-1, {protocol}, %{said}", title_justify="left")
    table.add_column("after")
    names = [each.task for each in found.models[0].judged if each.protocol == protocol]
    for name in names:
        table.add_column(name, justify="right")
    for model in found.models:
        table.add_row(model.model, *(format_percent(each.top1) for each in model.judged if each.protocol == protocol))
    return table


def write_evaluation(found: EvaluationReport, folder: Path) -> dict[str, str]:
    """Write the figures as JSON and CSV (fractions), and the pictures. Returns each kind's file."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [(model.model, each) for model in found.models for each in model.judged]
    per_class = [
        (model, each.protocol, each.task, name, share) for model, each in rows for name, share in each.per_class.items()
    ]
    confused = [
        (model, each.protocol, each.task, pair.true, pair.predicted, pair.images)
        for model, each in rows
        for pair in each.confused
    ]
    head = ("model", "protocol", "task")
    contents = {
        "json": (EVALUATION, found.model_dump_json(indent=1) + "\n"),
        "classes": ("per_class.csv", _table([(*head, "class", "top1"), *per_class])),
        "confusion": ("confusion.csv", _table([(*head, "true", "predicted", "images"), *confused])),
    }
    written = {kind: folder / name for kind, (name, _) in contents.items()}
    for kind, (_, text) in contents.items():
        write_text(written[kind], text)
    last = found.models[-1]
    for kind, figure in (("calibration", _draw_calibration(last)), ("confusions", _draw_confusions(last))):
        written[kind] = folder / f"{kind}.png"
        with atomic_file(written[kind]) as temporary:
            figure.savefig(temporary, format="png", dpi=120)
    return {kind: str(file) for kind, file in written.items()}


def _table(rows: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _draw_calibration(model: ModelEvaluation) -> Figure:
    """Accuracy against confidence, a panel a task and a line a protocol: below the diagonal, too sure of itself."""
    names = list(dict.fromkeys(each.task for each in model.judged))
    figure, panels = _panels(names, f"{model.model}: accuracy against confidence")
    for axes, name in zip(panels, names, strict=True):
        axes.plot([0, 1], [0, 1], color="grey", linestyle=":", linewidth=1)
        for each in model.judged:
            if each.task == name:
                filled = [one for one in each.bins if one.images]
                sizes = [8 + 60 * one.images / each.images for one in filled]
                label = f"{each.protocol}, error {format_percent(each.calibration_error)}"
                [line] = axes.plot([one.confidence for one in filled], [one.accuracy for one in filled], label=label)
                x, y = line.get_data()
                axes.scatter(x, y, s=sizes, color=line.get_color())
        axes.set(title=name, xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy")
        axes.legend(fontsize="x-small")
    return figure


def _draw_confusions(model: ModelEvaluation) -> Figure:
    """Each task's confusion table among its own classes, in shares of the true class."""
    own = [each for each in model.judged if each.protocol == "task-aware"] or list(model.judged)
    figure, panels = _panels([each.task for each in own], f"{model.model}: true class (row), predicted (column)")
    for axes, each in zip(panels, own, strict=True):
        rows = list(each.per_class)
        columns = list(dict.fromkeys([*rows, *(pair.predicted for pair in each.confused)]))
        shares = [[0.0] * len(columns) for _ in rows]
        for pair in each.confused:
            shares[rows.index(pair.true)][columns.index(pair.predicted)] = pair.images
        shares = [[value / sum(row) for value in row] for row in shares]
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        axes.set(title=each.task, xticks=[], yticks=[])
        if len(columns) <= LABELLED:
            axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize="x-small")
            axes.set_yticks(range(len(rows)), rows, fontsize="x-small")
    return figure


def _panels(names: Sequence[str], title: str) -> tuple[Figure, list[Axes]]:
    """A small chart a name."""
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(3.8 * columns, 0.6 + 3.6 * lines), layout="constrained")
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    figure.suptitle(title, fontsize="medium")
    return figure, panels[: len(names)]


def record_evaluation(
    found: EvaluationReport,
    subject: EvaluationTarget,
    options: EvaluationOptions,
    files: Sequence[str],
    note: Callable[[str], None],
) -> bool:
    """Leave the evaluation in MLflow with its run: the files, and each protocol's accuracies by stage.

    The latter where the run was judged on its own tasks and as its recipe says: under one name, one thing.
    """
    assert subject.run is not None
    series: dict[str, dict[int, float]] = {}
    if subject.own and options.templates is None and options.precision is None:
        for model in found.models:
            for each in model.judged:
                if each.task in found.tasks:
                    series.setdefault(f"{each.protocol}/{each.task}", {})[model.stage or 0] = each.top1
    return attach_files(subject.run, list(map(Path, files)), "evaluation", note, series)
