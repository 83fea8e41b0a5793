"""Evaluation (`zscl evaluate`) of a model or a run's stages on any tasks, among one task's classes or all classes."""

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
from schemas.errors import ErrorCode, InputError
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
from zscl.sequence.layout import EXPERIMENT, MODEL_FOLDER, TRAINING, stage_files
from zscl.sequence.resolve import resolve_tasks
from zscl.sequence.run import LIBRARIES

EVALUATION = "evaluation.json"
ALL_STAGES = "all"
MAX_BROKEN_SHARE = 0.01  # allowed fraction of unusable test images of a task, for models without a run
MAX_LABELLED_CLASSES = 12  # a confusion matrix with more columns is drawn without class names


@dataclass(frozen=True)
class EvaluationOptions:
    """Options of an evaluation.

    Attributes:
        protocols: Evaluation protocols, `task-aware` (among the classes of one task) or `task-agnostic` (among the
            classes of all tasks).
        templates: Prompt templates whose embeddings are averaged, `all` or `first`. `None` means the run's setting, or
            `all` for a model without a run.
        precision: `fp32` or `bf16`. `None` means the run's setting, or `fp32` for a model without a run.
        batch_size: Images per batch.
        loader_processes: Number of processes that read and decode images. 0 means that the main process does it.
    """

    protocols: tuple[Protocol, ...] = PROTOCOLS
    templates: str | None = None
    precision: str | None = None
    batch_size: int = 256
    loader_processes: int = 0


def parse_options(
    protocols: str, templates: str | None, precision: str | None, batch_size: int, loader_processes: int
) -> EvaluationOptions:
    """Parse and check the options of `zscl evaluate`.

    Args:
        protocols: Names of protocols, separated by commas.
        templates: Prompt templates whose embeddings are averaged, `all` or `first`; `None` if not set.
        precision: `fp32` or `bf16`; `None` if not set.
        batch_size: Images per batch.
        loader_processes: Number of processes that read and decode images. 0 means that the main process does it.

    Returns:
        The options.

    Raises:
        InputError: An option has an unknown value.
    """
    chosen = tuple(protocol for protocol in PROTOCOLS if protocol in protocols.split(","))
    unknown = [name for name in protocols.split(",") if name not in PROTOCOLS]
    for option, value, allowed in (
        ("--protocol", unknown[0] if unknown else None, PROTOCOLS),
        ("--templates", templates, ("all", "first")),
        ("--precision", precision, ("fp32", "bf16")),
    ):
        if value is not None and value not in allowed:
            raise InputError(
                f"{option}: found '{value}', expected {' or '.join(allowed)}",
                code=ErrorCode.INVALID_VALUE,
                field=option,
            )
    return EvaluationOptions(chosen, templates, precision, batch_size, loader_processes)


@dataclass(frozen=True)
class EvaluationTarget:
    """The models and the tasks of an evaluation.

    Attributes:
        models: Pairs of a stage's number and the stage's model. The number is `None` for a model that does not belong
            to a run.
        tasks: The tasks. In the task-agnostic protocol, an image may be classified as any class of these tasks.
        suites: Additional tasks. Their images are always classified among the classes of the task itself.
        run: The run's folder, if the models belong to a run.
        experiment: The run's experiment, if the models belong to a run.
        uses_run_tasks: Whether the tasks are those of the run.
        is_complete: Whether all stages of the run are evaluated on all tasks of the run.
    """

    models: tuple[tuple[int | None, Model], ...]
    tasks: tuple[TaskFolder, ...]
    suites: tuple[TaskFolder, ...]
    run: Path | None = None
    experiment: Experiment | None = None
    uses_run_tasks: bool = False
    is_complete: bool = False

    @property
    def held_out(self) -> bool:
        """Whether the tasks are evaluated on held-out training images of the run."""
        held_out = self.experiment.evaluation.held_out if self.experiment and self.uses_run_tasks else None
        return held_out is not None and held_out.judged_on == "held_out"

    def label(self, stage: int | None, model: Model) -> str:
        """Return the name of a model in tables, for example `2-flowers` for stage 2 of a run."""
        if stage is None:
            return model.name if model.pretrained is None else f"{model.name}, {model.pretrained}"
        return f"{stage}-{Path(model.name).parent.name.partition('-')[2]}" if stage else ZERO_SHOT


def resolve_target(
    what: str, pretrained: str | None, stage: str | None, tasks: Sequence[str], suites: Sequence[str]
) -> EvaluationTarget:
    """Find the models and the tasks that the arguments of `zscl evaluate` specify.

    Args:
        what: Folder of a run, folder of a model, or name of an open_clip model.
        pretrained: Tag of open_clip weights, or a weights file, if `what` is the name of an open_clip model.
        stage: Number of the run's stage, where 0 is the initial model, or `all`; default: the last trained stage.
        tasks: Folders of tasks; if empty, the tasks of the run are used.
        suites: Folders of additional tasks, whose images are classified only among the classes of the task itself.

    Returns:
        The models and the tasks.

    Raises:
        InputError: The run, the stage, the model or a task does not exist, or the arguments contradict each other.
    """
    folder = Path(what).expanduser().absolute()
    suite_folders = tuple(map(_open_task, suites))
    if (folder / SEARCH).is_file():
        raise InputError(
            f"{what}: found a search, expected a run, for example a folder in {folder}/trials", code=ErrorCode.OTHER_RUN
        )
    if not (folder / EXPERIMENT).is_file():
        model = _resolve_model(what, folder, pretrained, stage, tasks)
        return EvaluationTarget(((None, model),), tuple(map(_open_task, tasks)), suite_folders)
    if pretrained is not None:
        raise InputError(
            f"--pretrained {pretrained} cannot be used with a run, only with the name of an open_clip model",
            code=ErrorCode.CONFLICT,
            field="--pretrained",
        )
    experiment = load_experiment(folder / EXPERIMENT)
    trained = stage_files(folder, TRAINING)
    models = [(0, experiment.model)]
    models += [(k, Model(name=f"{LOCAL_MODEL}{file.parent / MODEL_FOLDER}")) for k, file in enumerate(trained, start=1)]
    task_folders = tuple(map(_open_task, tasks)) if tasks else resolve_tasks(experiment)[1]
    is_complete = stage == ALL_STAGES and not tasks and len(trained) == len(task_folders)
    selected = tuple(_select_stages(models, stage, folder))
    return EvaluationTarget(selected, task_folders, suite_folders, folder, experiment, not tasks, is_complete)


def _select_stages(models: Sequence[tuple[int, Model]], stage: str | None, run: Path) -> list[tuple[int, Model]]:
    if stage == ALL_STAGES:
        return list(models)
    if stage is not None and not (stage.isdecimal() and int(stage) < len(models)):
        raise InputError(
            f"--stage {stage}: found {len(models) - 1} trained stages in {run}, expected 0 to {len(models) - 1} or all",
            code=ErrorCode.UNKNOWN_NAME,
            field="--stage",
        )
    return [models[-1 if stage is None else int(stage)]]


def _resolve_model(what: str, folder: Path, pretrained: str | None, stage: str | None, tasks: Sequence[str]) -> Model:
    """Find a model that does not belong to a run, from the arguments of `resolve_target`."""
    if stage is not None:
        raise InputError(
            f"--stage {stage} needs the folder of a run, but '{what}' is not one",
            code=ErrorCode.CONFLICT,
            field="--stage",
        )
    if not tasks and "/" in what and not folder.exists():
        raise InputError(
            f"{what}: found no such folder, expected the folder of a run; to evaluate a model, give tasks with --task",
            code=ErrorCode.NOT_FOUND,
        )
    if not tasks:
        raise InputError(
            f"the model '{what}' needs tasks to be evaluated on; give them with --task",
            code=ErrorCode.MISSING_VALUE,
            field="--task",
        )
    name = f"{LOCAL_MODEL}{folder}" if (folder / CONFIG).is_file() else what
    try:
        return Model(name=name, pretrained=pretrained)
    except ValueError as error:
        raise InputError(
            f"{name}: expected the folder of a run, an open_clip folder, or an open_clip model name with --pretrained",
            code=ErrorCode.NOT_FOUND,
        ) from error


def _open_task(path: str) -> TaskFolder:
    location = path if "://" in path else str(Path(path).expanduser().absolute())
    try:
        return TaskFolder.open(Task.model_validate({"path": location}))
    except ValidationError as error:
        raise input_error(error, f"{path}: {explain(error)}") from error


def evaluate_models(target: EvaluationTarget, options: EvaluationOptions, console: Console) -> EvaluationReport:
    """Evaluate every model on all tasks and suites.

    Args:
        target: The models and the tasks.
        options: Options of the evaluation.
        console: Console for progress and warnings.

    Returns:
        The evaluation of each model. If all stages of a run are evaluated on its tasks, the metrics of the accuracy
        matrix are included.

    Raises:
        InputError: A model or a shard cannot be read, a task has no usable image, or two tasks have the same name.
    """
    all_tasks = (*target.tasks, *target.suites)
    _check_names_are_unique(all_tasks)
    experiment = target.experiment
    templates = options.templates or (experiment.evaluation.templates if experiment else "all")
    precision = options.precision or (experiment.optimisation.precision if experiment else "fp32")
    max_broken_share = experiment.compute.max_broken_share if experiment else MAX_BROKEN_SHARE
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = [len(task.test) for task in all_tasks if isinstance(task.test, IndexedSamples)]
    evaluations, warnings = list[ModelEvaluation](), list[str]()
    with ProgressBar(console, total=sum(sizes) * len(target.models) or None) as bar:
        loader = Loader(device, options.loader_processes, max_broken_share=max_broken_share, on_skip=bar.print)
        for task in all_tasks:
            for message in task.list_warnings("test"):
                bar.print(f"warning: task '{task.name}', {message}")
        for stage, model in target.models:
            label = target.label(stage, model)
            bar.update(f"evaluating {label}", bar.done)
            clip = load_clip(model, device)
            if not evaluations:  # several models belong to one run and have the same tokenizer
                messages = (message for task in all_tasks for message in prompt_warnings(task, clip.tokenizer))
                warnings += dict.fromkeys(messages)
                for message in warnings:
                    bar.print(f"warning: {message}")
            evaluated = evaluate_tasks(
                clip,
                target.tasks,
                target.suites,
                options.protocols,
                loader,
                templates=templates,
                precision=precision,
                batch_size=options.batch_size,
                on_images=_image_counter(bar, f"evaluating {label}"),
            )
            evaluations.append(
                ModelEvaluation(model=label, stage=stage, digest=weights_digest(model), judged=tuple(evaluated))
            )
    figures: dict[Protocol, Metrics] = {}
    if target.is_complete:
        figures = {protocol: _metrics(evaluations, target, protocol) for protocol in options.protocols}
    return EvaluationReport(
        tasks=tuple(task.name for task in target.tasks),
        suites=tuple(suite.name for suite in target.suites),
        templates="first" if templates == "first" else "all",
        held_out=target.held_out,
        models=tuple(evaluations),
        figures=figures,
        versions={library: version(library) for library in LIBRARIES},
        warnings=tuple(warnings),
    )


def _image_counter(bar: ProgressBar, description: str) -> Callable[[int], None]:
    return lambda images: bar.update(description, bar.done + images)


def _check_names_are_unique(tasks: Sequence[TaskFolder]) -> None:
    names = [task.name for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise InputError(
                f"found two tasks or suites called '{name}', expected folders with different names",
                code=ErrorCode.DUPLICATE,
            )


def _metrics(models: Sequence[ModelEvaluation], target: EvaluationTarget, protocol: Protocol) -> Metrics:
    names = [task.name for task in target.tasks]
    zero_shot, *matrix = [
        [task.top1 for task in model.judged if task.protocol == protocol and task.task in names] for model in models
    ]
    return compute_metrics(matrix, zero_shot)


# --------------------------------------------------------------------------------------------- tables and charts


def build_evaluation_tables(report: EvaluationReport) -> Group:
    """Format an evaluation as tables, one per protocol.

    Args:
        report: The evaluation.

    Returns:
        The tables. They have one row per task if there is a single model, and one row per model otherwise.
    """
    protocols = list(dict.fromkeys(task.protocol for task in report.models[0].judged))
    if len(report.models) == 1:
        return Group(*(_task_table(report.models[0], protocol) for protocol in protocols))
    return Group(*(_model_table(report, protocol) for protocol in protocols))


def _task_table(model: ModelEvaluation, protocol: Protocol) -> Table:
    table = Table(title=f"{model.model}, {protocol}, %", title_justify="left")
    table.add_column("task")
    for column in ("images", "classes", "top-1", "top-5", "mean per class", "calibration error", "most confused"):
        table.add_column(column, justify="left" if column == "most confused" else "right")
    for task in model.judged:
        if task.protocol == protocol:
            shares = (task.top1, task.top5, task.mean_per_class, task.calibration_error)
            cells = (task.task, str(task.images), str(task.classes), *map(format_percent, shares))
            table.add_row(*cells, _most_confused(task))
    return table


def _most_confused(task: TaskEvaluation) -> str:
    wrong = [count for count in task.confused if count.true != count.predicted]
    worst = max(wrong, key=lambda count: count.images, default=None)
    return f"{worst.true} → {worst.predicted} ({worst.images})" if worst else "–"


def _model_table(report: EvaluationReport, protocol: Protocol) -> Table:
    metrics = report.figures.get(protocol)
    summary = ""
    if metrics is not None:
        columns = {"Transfer": metrics.transfer, "Avg": metrics.avg, "Last": metrics.last}
        summary = ": " + ", ".join(f"{name} {format_percent(value)}" for name, value in columns.items())
    table = Table(title=f"top-1, {protocol}, %{summary}", title_justify="left")
    table.add_column("after")
    for task in report.models[0].judged:
        if task.protocol == protocol:
            table.add_column(task.task, justify="right")
    for model in report.models:
        table.add_row(model.model, *(format_percent(task.top1) for task in model.judged if task.protocol == protocol))
    return table


def write_evaluation(report: EvaluationReport, folder: Path) -> dict[str, str]:
    """Write an evaluation as JSON and CSV (accuracies as fractions), with charts for the last model.

    Args:
        report: The evaluation.
        folder: Output folder.

    Returns:
        Mapping from the kind of file to the written file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = [(model.model, task) for model in report.models for task in model.judged]
    per_class = [
        (model, task.protocol, task.task, name, share) for model, task in rows for name, share in task.per_class.items()
    ]
    confused = [
        (model, task.protocol, task.task, count.true, count.predicted, count.images)
        for model, task in rows
        for count in task.confused
    ]
    head = ("model", "protocol", "task")
    contents = {
        "json": (EVALUATION, report.model_dump_json(indent=1) + "\n"),
        "classes": ("per_class.csv", _to_csv([(*head, "class", "top1"), *per_class])),
        "confusion": ("confusion.csv", _to_csv([(*head, "true", "predicted", "images"), *confused])),
    }
    files = {kind: folder / name for kind, (name, _) in contents.items()}
    for kind, (_, text) in contents.items():
        write_text(files[kind], text)
    last = report.models[-1]
    for kind, figure in (("calibration", _draw_calibration(last)), ("confusions", _draw_confusions(last))):
        files[kind] = folder / f"{kind}.png"
        with atomic_file(files[kind]) as temporary:
            figure.savefig(temporary, format="png", dpi=120)
    return {kind: str(file) for kind, file in files.items()}


def _to_csv(rows: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _draw_calibration(model: ModelEvaluation) -> Figure:
    """Draw accuracy against confidence, one chart per task. An overconfident model's curve is below the diagonal."""
    names = list(dict.fromkeys(task.task for task in model.judged))
    figure, charts = _subplots(names, f"{model.model}: accuracy against confidence")
    for axes, name in zip(charts, names, strict=True):
        axes.plot([0, 1], [0, 1], color="grey", linestyle=":", linewidth=1)
        for task in model.judged:
            if task.task == name:
                bins = [confidence_bin for confidence_bin in task.bins if confidence_bin.images]
                x, y = [item.confidence for item in bins], [item.accuracy for item in bins]
                [line] = axes.plot(x, y, label=f"{task.protocol}, error {format_percent(task.calibration_error)}")
                axes.scatter(x, y, s=[8 + 60 * item.images / task.images for item in bins], color=line.get_color())
        axes.set(title=name, xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy")
        axes.legend(fontsize="x-small")
    return figure


def _draw_confusions(model: ModelEvaluation) -> Figure:
    """Draw one confusion matrix per task, task-aware if that protocol was used. Each row sums to 1."""
    tasks = [task for task in model.judged if task.protocol == "task-aware"] or list(model.judged)
    figure, charts = _subplots([task.task for task in tasks], f"{model.model}: true class (row), predicted (column)")
    for axes, task in zip(charts, tasks, strict=True):
        rows = list(task.per_class)
        columns = list(dict.fromkeys([*rows, *(count.predicted for count in task.confused)]))
        shares = [[0.0] * len(columns) for _ in rows]
        for count in task.confused:
            shares[rows.index(count.true)][columns.index(count.predicted)] = count.images
        shares = [[value / sum(row) for value in row] for row in shares]
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        axes.set(title=task.task, xticks=[], yticks=[])
        if len(columns) <= MAX_LABELLED_CLASSES:
            axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize="x-small")
            axes.set_yticks(range(len(rows)), rows, fontsize="x-small")
    return figure


def _subplots(names: Sequence[str], title: str) -> tuple[Figure, list[Axes]]:
    """Create a figure with one chart per name."""
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(3.8 * columns, 0.6 + 3.6 * lines), layout="constrained")
    charts = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes in charts[len(names) :]:
        axes.set_visible(False)
    figure.suptitle(title, fontsize="medium")
    return figure, charts[: len(names)]


def record_evaluation(
    report: EvaluationReport,
    target: EvaluationTarget,
    options: EvaluationOptions,
    files: Sequence[str],
    note: Callable[[str], None],
) -> bool:
    """Record an evaluation in the MLflow run to which the models belong: its files, and the accuracies of each stage.

    Accuracies are recorded only if the models were evaluated on the run's tasks with the run's settings. Otherwise,
    values with the same metric name could not be compared.

    Args:
        report: The evaluation.
        target: The evaluated models and tasks. The models must belong to a run.
        options: Options of the evaluation.
        files: The files to attach.
        note: Called with a message if the MLflow store does not accept the evaluation.

    Returns:
        Whether the store accepted all files and accuracies.
    """
    assert target.run is not None
    series: dict[str, dict[int, float]] = {}
    if target.uses_run_tasks and options.templates is None and options.precision is None:
        for model in report.models:
            for task in model.judged:
                if task.task in report.tasks:
                    series.setdefault(f"{task.protocol}/{task.task}", {})[model.stage or 0] = task.top1
    return attach_files(target.run, list(map(Path, files)), "evaluation", note, series)
