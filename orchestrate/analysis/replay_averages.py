"""Weight averages recomputed from the snapshots of a stage and evaluated, without training (`zscl average`)."""

import csv
import dataclasses
import io
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar, get_args

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pydantic import BaseModel, ValidationError
from rich.console import Console
from rich.table import Table

from orchestrate.recipes.recipe import load_experiment
from orchestrate.reports.results import format_percent
from orchestrate.runs.progress import ProgressBar
from schemas.base import explain, input_error
from schemas.errors import ErrorCode, InputError
from schemas.evaluation import ReplayedAverage, ReplayedAverages
from schemas.experiment import LOCAL_MODEL, Experiment, Model
from schemas.method import Average, Merge
from zscl.data.loader import Loader
from zscl.data.task import TaskFolder
from zscl.evaluation.zero_shot import compute_accuracies, embed_classes, slice_head
from zscl.methods.weight_averaging import interpolate
from zscl.models.clip import Clip, load_clip
from zscl.runtime.atomic_io import atomic_file, write_text
from zscl.sequence.layout import EXPERIMENT, model_folder, snapshots_folder
from zscl.sequence.resolve import resolve_tasks
from zscl.training.optim import select_trained_parameters
from zscl.training.snapshots import replay_average, snapshot_interval

Setting = TypeVar("Setting", bound=BaseModel)
AVERAGE_KINDS: tuple[str, ...] = get_args(Average.model_fields["kind"].annotation)


@dataclass(frozen=True)
class AverageGrid:
    """The settings to evaluate: every averaging setting is combined with every interpolation weight.

    Attributes:
        averages: Averaging settings. `None` means that the weights after the last step are used, without averaging.
        shares: Interpolation weights of the anchor model, from 0 (only the average) to 1 (only the anchor).
        anchor: The anchor model, `stage_start` or `initial`.
    """

    averages: tuple[Average | None, ...]
    shares: tuple[float, ...]
    anchor: str


def parse_grid(every: str, kinds: str, decay: float, shares: str, anchor: str) -> AverageGrid:
    """Parse and check the options of `zscl average`.

    Args:
        every: Averaging intervals in steps, separated by commas.
        kinds: Kinds of averages, separated by commas: `mean`, `exponential`, `none` (the weights after the last step).
        decay: Decay of the exponential average.
        shares: Interpolation weights of the anchor model, separated by commas.
        anchor: The anchor model: `stage_start` (the model at the start of the stage) or `initial` (the initial model of
            the run).

    Returns:
        The settings, without duplicates.

    Raises:
        InputError: An option has an invalid value.
    """
    averages: list[Average | None] = []
    for kind in kinds.split(","):
        if kind == "none":
            averages.append(None)
            continue
        if kind not in AVERAGE_KINDS:
            raise InputError(
                f"--kind {kinds}: found '{kind}', expected none, {' or '.join(AVERAGE_KINDS)}",
                code=ErrorCode.INVALID_VALUE,
                field="--kind",
            )
        for steps in every.split(","):
            settings: dict[str, Any] = {"every": _parse_steps(steps), "kind": kind}
            if kind == "exponential":
                settings["decay"] = decay
            averages.append(_validate(Average, settings, f"--every {every} --kind {kinds}", "--every"))
    parsed_shares = dict.fromkeys(_parse_share(share) for share in shares.split(","))
    _validate(Merge, {"anchor": anchor}, "--anchor", "--anchor")
    return AverageGrid(tuple(dict.fromkeys(averages)), tuple(parsed_shares), anchor)


def _validate(schema: type[Setting], settings: dict[str, Any], source: str, option: str) -> Setting:
    """Validate settings against a pydantic model. Error messages begin with `source`, which names the options."""
    try:
        return schema.model_validate(settings)
    except ValidationError as error:
        raise input_error(error, f"{source}: {explain(error)}", field=option) from error


def _parse_steps(text: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise InputError(
            f"--every: found '{text}', expected whole numbers, separated by commas",
            code=ErrorCode.INVALID_VALUE,
            field="--every",
        )
    return int(text)


def _parse_share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise InputError(
            f"--share: found '{text}', expected numbers from 0 to 1, separated by commas",
            code=ErrorCode.INVALID_VALUE,
            field="--share",
        )
    return share


@dataclass(frozen=True)
class ReplayedStage:
    """A stage of a run with snapshots of its weights.

    Attributes:
        run: The run's folder.
        experiment: The run's experiment.
        tasks: The run's tasks.
        number: Number of the stage, from 1.
        start: The model at the start of the stage.
        every: Interval between two snapshots, in steps.
        device: Device for the evaluation.
    """

    run: Path
    experiment: Experiment
    tasks: tuple[TaskFolder, ...]
    number: int
    start: Model
    every: int
    device: torch.device

    @classmethod
    def open(cls, run: Path, number: int | None) -> "ReplayedStage":
        """Open a stage of a run.

        Args:
            run: The run's folder.
            number: Number of the stage, from 1; default: the last stage with snapshots.

        Returns:
            The stage.

        Raises:
            InputError: The run or the stage does not exist, or the stage has no snapshots.
        """
        if not (run / EXPERIMENT).is_file():
            raise InputError(f"{run}: found no {EXPERIMENT}, expected the folder of a run", code=ErrorCode.NOT_FOUND)
        experiment, tasks, _ = resolve_tasks(load_experiment(run / EXPERIMENT))
        with_snapshots = [k for k, task in enumerate(tasks, start=1) if snapshots_folder(run, k, task.name).is_dir()]
        number = number if number is not None else max(with_snapshots, default=len(tasks))
        if not 1 <= number <= len(tasks):
            raise InputError(
                f"--stage {number}: found a run of {len(tasks)} stages, expected 1 to {len(tasks)}",
                code=ErrorCode.UNKNOWN_NAME,
                field="--stage",
            )
        every = snapshot_interval(snapshots_folder(run, number, tasks[number - 1].name))
        previous = model_folder(run, number - 1, tasks[number - 2].name)
        start = Model(name=f"{LOCAL_MODEL}{previous}") if number > 1 else experiment.model
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return cls(run, experiment, tasks, number, start, every, device)

    def check_intervals(self, grid: AverageGrid) -> None:
        """Check that every averaging interval is a multiple of the snapshot interval.

        Args:
            grid: The settings to check.

        Raises:
            InputError: An averaging interval is not a multiple of the snapshot interval.
        """
        for average in grid.averages:
            if average is not None and average.every % self.every:
                raise InputError(
                    f"--every {average.every}: found snapshots of every {self.every} steps, expected a multiple of "
                    f"{self.every}",
                    code=ErrorCode.MISMATCH,
                    field="--every",
                )

    def replay(self, average: Average | None) -> tuple[Clip, int]:
        """Compute the model that the stage would have produced with another averaging setting.

        Args:
            average: The averaging setting; `None` for the weights after the last step.

        Returns:
            The model, and the number of models that were averaged.
        """
        clip = load_clip(self.start, self.device)
        select_trained_parameters(clip.model, self.experiment.method.train)
        model, merges = replay_average(
            clip.model,
            average,
            snapshots_folder(self.run, self.number, self.tasks[self.number - 1].name),
            self.experiment.stage_steps(self.experiment.tasks[self.number - 1]),
            self.experiment.compute.savings.multi_tensor,
        )
        return dataclasses.replace(clip, model=model), merges

    def evaluate(self, clip: Clip) -> dict[str, float]:
        """Evaluate a model on all tasks of the run, with the same settings as the run's accuracy matrix.

        Args:
            clip: The model.

        Returns:
            Mapping from task names to top-1 accuracies, as fractions.
        """
        experiment, tasks = self.experiment, self.tasks
        loader = Loader(self.device, max_broken_share=experiment.compute.max_broken_share)
        precision = experiment.optimisation.precision
        embedded = embed_classes(clip, tasks, experiment.evaluation.templates, precision, self.device)
        accuracy = {}
        for index, task in enumerate(tasks):
            classes = embedded[index]
            if experiment.class_incremental is not None:  # one head for all classes seen so far
                classes = slice_head(embedded, index, max(self.number - 1, index))
            [accuracy[task.name]], _ = compute_accuracies(clip, task, [classes], loader, precision=precision)
        return accuracy

    def is_run_setting(self, average: Average | None, share: float, anchor: str) -> bool:
        """Whether averaging setting, interpolation weight and anchor model are those with which the run was trained."""
        method = self.experiment.method
        merge = (method.merge.share, method.merge.anchor) if method.merge else (0.0, anchor)
        return (average, share, anchor) == (method.average, *merge)

    def evaluate_average(
        self, average: Average | None, share: float, anchor: str, merges: int, clip: Clip
    ) -> ReplayedAverage:
        """Evaluate a model that was computed by averaging and interpolation, on all tasks of the run.

        Args:
            average: The averaging setting; `None` for the weights after the last step.
            share: Interpolation weight of the anchor model.
            anchor: The anchor model, `stage_start` or `initial`.
            merges: Number of models that were averaged.
            clip: The model.

        Returns:
            The settings and the accuracies of the model.
        """
        accuracy = self.evaluate(clip)
        values = list(accuracy.values())
        earlier, later = values[: self.number - 1], values[self.number :]
        return ReplayedAverage(
            kind=average.kind if average else "none",
            every=average.every if average else None,
            decay=average.decay if average and average.kind == "exponential" else None,
            share=share,
            merges=merges,
            own=self.is_run_setting(average, share, anchor),
            accuracy=accuracy,
            trained=values[self.number - 1],
            earlier=fmean(earlier) if earlier else None,
            later=fmean(later) if later else None,
        )


def replay_grid(stage: ReplayedStage, grid: AverageGrid, console: Console) -> ReplayedAverages:
    """Compute the model of a stage with every setting of a grid, and evaluate it on all tasks of the run.

    Args:
        stage: The stage.
        grid: The averaging settings and interpolation weights.
        console: Console for progress.

    Returns:
        The accuracies of the model for every setting, and of the model at the start of the stage.

    Raises:
        InputError: A snapshot or a model cannot be read.
    """
    anchor = load_clip(stage.experiment.model if grid.anchor == "initial" else stage.start, stage.device).model
    replayed: list[ReplayedAverage] = []
    with ProgressBar(console, total=len(grid.averages) * len(grid.shares) + 1) as bar:
        start = stage.evaluate(load_clip(stage.start, stage.device))
        for average in grid.averages:
            clip, merges = stage.replay(average)
            parameters: list[torch.Tensor] = list(clip.model.parameters())
            averaged = [parameter.detach().clone() for parameter in parameters]
            for share in grid.shares:
                bar.update("evaluating averages", len(replayed) + 1)
                with torch.no_grad():
                    torch._foreach_copy_(parameters, averaged)
                interpolate(parameters, list(anchor.parameters()), share)
                replayed.append(stage.evaluate_average(average, share, grid.anchor, merges, clip))
        bar.update("evaluating averages", len(replayed) + 1)
    return ReplayedAverages(
        stage=stage.number,
        task=stage.tasks[stage.number - 1].name,
        snapshots_every=stage.every,
        anchor="initial" if grid.anchor == "initial" else "stage_start",
        start=start,
        tried=tuple(replayed),
    )


def describe_average(average: ReplayedAverage) -> str:
    """Describe an averaging setting in a few words, such as `mean every 50`."""
    if average.kind == "none":
        return "last weights"
    decay = f", decay {average.decay:g}" if average.decay is not None else ""
    return f"{average.kind} every {average.every}{decay}"


def build_averages_table(averages: ReplayedAverages) -> Table:
    """Format accuracies as a table with one row per setting. The setting with which the run was trained is marked.

    Args:
        averages: The accuracies for each setting.

    Returns:
        The table.
    """
    table = Table(title=f"stage {averages.stage}, {averages.task}: accuracy, %", title_justify="left")
    table.add_column("average")
    for column in (f"share of the {averages.anchor.replace('_', ' ')}", "models", "its task", "earlier", "later"):
        table.add_column(column, justify="right")
    for average in averages.tried:
        figures = (average.trained, average.earlier, average.later)
        name = f"{describe_average(average)}{' (this run)' if average.own else ''}"
        table.add_row(name, f"{average.share:g}", str(average.merges), *map(format_percent, figures))
    return table


def write_averages(averages: ReplayedAverages, folder: Path) -> dict[str, str]:
    """Write accuracies as JSON, as CSV (fractions) and as a chart.

    Args:
        averages: The accuracies for each setting.
        folder: Output folder.

    Returns:
        Mapping from the kind of file to the written file.
    """
    rows = [average.model_dump(exclude={"accuracy"}) | average.accuracy for average in averages.tried]
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    files = {kind: folder / f"averages.{kind}" for kind in ("json", "csv", "png")}
    write_text(files["json"], averages.model_dump_json(indent=1) + "\n")
    write_text(files["csv"], text.getvalue())
    with atomic_file(files["png"]) as temporary:
        _draw(averages).savefig(temporary, format="png", dpi=120)
    return {kind: str(file) for kind, file in files.items()}


def _draw(averages: ReplayedAverages) -> Figure:
    """Draw accuracy against averaging interval, and accuracy on other tasks against accuracy on the stage's task."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    by_interval, trade_off = figure.subplots(1, 2)
    _draw_intervals(by_interval, averages)
    _draw_trade_off(trade_off, averages)
    figure.suptitle(f"stage {averages.stage}, {averages.task}", fontsize="medium")
    return figure


def _draw_intervals(axes: Axes, averages: ReplayedAverages) -> None:
    for kind in ("mean", "exponential"):
        of_kind = [average for average in averages.tried if average.kind == kind and average.share == 0]
        of_kind.sort(key=lambda average: average.every or 0)
        for name, style in (("trained", "-"), ("earlier", ":"), ("later", "--")):
            values = [(average.every or 0, getattr(average, name)) for average in of_kind]
            points = [(every, 100 * value) for every, value in values if value is not None]
            if points:
                colour = "C0" if kind == "mean" else "C1"
                axes.plot(*zip(*points, strict=True), style, marker="o", color=colour, label=f"{kind}: {name} tasks")
    axes.set(xscale="log", xlabel="averaging interval, steps", ylabel="top-1 accuracy, %")
    intervals = sorted({average.every for average in averages.tried if average.every})
    axes.set_xticks(intervals, map(str, intervals))
    axes.minorticks_off()
    axes.legend(fontsize="x-small")


def _draw_trade_off(axes: Axes, averages: ReplayedAverages) -> None:
    for name in dict.fromkeys(map(describe_average, averages.tried)):
        points = sorted(
            (average.share, 100 * average.trained, 100 * _mean_over_others(average.accuracy, averages.task))
            for average in averages.tried
            if describe_average(average) == name
        )
        axes.plot([x for _, x, _ in points], [y for _, _, y in points], marker="o", label=name)
    if len(averages.start) > 1:
        start = 100 * averages.start[averages.task], 100 * _mean_over_others(averages.start, averages.task)
        axes.plot(*start, "k*", label="the stage's start")
    axes.set(xlabel="on its task, %", ylabel="mean over the other tasks, %")
    axes.legend(fontsize="x-small")


def _mean_over_others(accuracy: dict[str, float], task: str) -> float:
    others = [value for name, value in accuracy.items() if name != task]
    return fmean(others) if others else 0.0
