"""`zscl average`: other averages and interpolations of a stage's weights, judged without training."""

import csv
import dataclasses
import io
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import get_args

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from orchestrate.recipes.recipe import load_experiment
from orchestrate.reports.results import format_percent
from orchestrate.runs.progress import ProgressBar
from schemas.base import explain, input_error
from schemas.errors import InputError
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
from zscl.training.snapshots import snapshot_interval, replay_average

Choice = Average | None


@dataclass(frozen=True)
class AverageGrid:
    """What is tried: each average, with each share of the anchor merged in behind it."""

    averages: tuple[Choice, ...]
    shares: tuple[float, ...]
    anchor: str


KINDS: tuple[str, ...] = get_args(Average.model_fields["kind"].annotation)


def parse_grid(every: str, kinds: str, decay: float, shares: str, anchor: str) -> AverageGrid:
    """Read what the command line was given.

    Raises:
        InputError: something that no recipe could say either.
    """
    averages: list[Choice] = []
    for kind in kinds.split(","):
        if kind == "none":
            averages.append(None)
            continue
        if kind not in KINDS:
            raise InputError(f"--kind {kinds}: found '{kind}', expected none, {' or '.join(KINDS)}")
        for steps in every.split(","):
            given = {"every": _whole(steps), "kind": kind, **({"decay": decay} if kind == "exponential" else {})}
            try:
                averages.append(Average.model_validate(given))
            except ValidationError as error:
                raise input_error(error, f"--every {every} --kind {kinds}: {explain(error)}", field="--every") from error
    found = tuple(_fraction(share) for share in shares.split(","))
    try:
        Merge.model_validate({"anchor": anchor})
    except ValidationError as error:
        raise input_error(error, f"--anchor: {explain(error)}", field="--anchor") from error
    return AverageGrid(tuple(dict.fromkeys(averages)), tuple(dict.fromkeys(found)), anchor)


def _whole(text: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise InputError(f"--every: found '{text}', expected whole numbers, by commas")
    return int(text)


def _fraction(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = -1.0
    if not 0 <= found <= 1:
        raise InputError(f"--share: found '{text}', expected numbers from 0 to 1, by commas")
    return found


@dataclass(frozen=True)
class ReplayedStage:
    """A stage of a run whose weights were kept along the way.

    number: from 1; start: what it started from; every: steps from one snapshot to the next.
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
        """Find a stage of a run; default: the last one that has snapshots.

        Raises:
            InputError: there is no such run or stage, or it has no snapshots.
        """
        if not (run / EXPERIMENT).is_file():
            raise InputError(f"{run}: found no {EXPERIMENT}, expected the folder of a run")
        experiment, tasks, _ = resolve_tasks(load_experiment(run / EXPERIMENT))
        kept = [k for k, task in enumerate(tasks, start=1) if snapshots_folder(run, k, task.name).is_dir()]
        number = number if number is not None else max(kept, default=len(tasks))
        if not 1 <= number <= len(tasks):
            raise InputError(f"--stage {number}: found a run of {len(tasks)} stages, expected 1 to {len(tasks)}")
        every = snapshot_interval(snapshots_folder(run, number, tasks[number - 1].name))
        before = model_folder(run, number - 1, tasks[number - 2].name)
        start = Model(name=f"{LOCAL_MODEL}{before}") if number > 1 else experiment.model
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return cls(run, experiment, tasks, number, start, every, device)

    def check_intervals(self, wanted: AverageGrid) -> None:
        """Refuse an average whose merges fall between two snapshots.

        Raises:
            InputError: naming it.
        """
        for average in wanted.averages:
            if average is not None and average.every % self.every:
                raise InputError(
                    f"--every {average.every}: found snapshots of every {self.every} steps, expected multiples of that"
                )

    def replay(self, average: Choice) -> tuple[Clip, int]:
        """The stage's outcome with an average, and how many models are in it."""
        clip = load_clip(self.start, self.device)
        select_trained_parameters(clip.model, self.experiment.method.train)
        name = self.tasks[self.number - 1].name
        steps = self.experiment.stage_steps(self.experiment.tasks[self.number - 1])
        model, merges = replay_average(
            clip.model,
            average,
            snapshots_folder(self.run, self.number, name),
            steps,
            self.experiment.compute.savings.multi_tensor,
        )
        return dataclasses.replace(clip, model=model), merges

    def judge(self, clip: Clip) -> dict[str, float]:
        """Accuracy on each of the run's tasks, as in its matrix."""
        experiment, tasks = self.experiment, self.tasks
        loader = Loader(self.device, max_broken_share=experiment.compute.max_broken_share)
        precision = experiment.optimisation.precision
        embedded = embed_classes(clip, tasks, experiment.evaluation.templates, precision, self.device)
        found = {}
        for index, task in enumerate(tasks):
            classes = embedded[index]
            if experiment.class_incremental is not None:  # one head, of all classes seen by then
                classes = slice_head(embedded, index, max(self.number - 1, index))
            [found[task.name]], _ = compute_accuracies(clip, task, [classes], loader, precision=precision)
        return found

    def is_own(self, average: Choice, share: float, anchor: str) -> bool:
        """Whether this is what the run's method has handed on."""
        method = self.experiment.method
        merged = (method.merge.share, method.merge.anchor) if method.merge else (0.0, anchor)
        return (average, share, anchor) == (method.average, *merged)

    def tried(self, average: Choice, share: float, anchor: str, merges: int, clip: Clip) -> ReplayedAverage:
        """Judge one outcome."""
        accuracy = self.judge(clip)
        shares = list(accuracy.values())
        earlier, later = shares[: self.number - 1], shares[self.number :]
        return ReplayedAverage(
            kind=average.kind if average else "none",
            every=average.every if average else None,
            decay=average.decay if average and average.kind == "exponential" else None,
            share=share,
            merges=merges,
            own=self.is_own(average, share, anchor),
            accuracy=accuracy,
            trained=shares[self.number - 1],
            earlier=fmean(earlier) if earlier else None,
            later=fmean(later) if later else None,
        )


def replay_grid(stage: ReplayedStage, wanted: AverageGrid, console: Console) -> ReplayedAverages:
    """Judge what a stage would have handed on, on all tasks of the run, as the run's matrix is judged.

    Raises:
        InputError: a snapshot or a model cannot be read.
    """
    anchor = load_clip(stage.experiment.model if wanted.anchor == "initial" else stage.start, stage.device).model
    tried: list[ReplayedAverage] = []
    with ProgressBar(console, total=len(wanted.averages) * len(wanted.shares) + 1) as bar:
        start = stage.judge(load_clip(stage.start, stage.device))
        for average in wanted.averages:
            clip, merges = stage.replay(average)
            whole = [parameter.detach().clone() for parameter in clip.model.parameters()]
            for share in wanted.shares:
                bar.update("judging averages", len(tried) + 1)
                with torch.no_grad():
                    torch._foreach_copy_(list(clip.model.parameters()), whole)
                interpolate(list(clip.model.parameters()), list(anchor.parameters()), share)
                tried.append(stage.tried(average, share, wanted.anchor, merges, clip))
        bar.update("judging averages", len(tried) + 1)
    return ReplayedAverages(
        stage=stage.number,
        task=stage.tasks[stage.number - 1].name,
        snapshots_every=stage.every,
        anchor="initial" if wanted.anchor == "initial" else "stage_start",
        start=start,
        tried=tuple(tried),
    )


def name_of(tried: ReplayedAverage) -> str:
    """An average in a few words."""
    if tried.kind == "none":
        return "last weights"
    decay = f", decay {tried.decay:g}" if tried.decay is not None else ""
    return f"{tried.kind} every {tried.every}{decay}"


def averages_table(found: ReplayedAverages) -> Table:
    """What was tried, a row each; the run's own is marked."""
    table = Table(title=f"stage {found.stage}, {found.task}: accuracy, %", title_justify="left")
    table.add_column("handed on")
    for column in (f"share of the {found.anchor.replace('_', ' ')}", "models", "its task", "earlier", "later"):
        table.add_column(column, justify="right")
    for each in found.tried:
        figures = (each.trained, each.earlier, each.later)
        name = f"{name_of(each)}{' (this run)' if each.own else ''}"
        table.add_row(name, f"{each.share:g}", str(each.merges), *map(format_percent, figures))
    return table


def write_averages(found: ReplayedAverages, folder: Path) -> dict[str, str]:
    """Write what was tried as JSON and CSV (fractions), and draw it. Returns each kind's file."""
    rows = [each.model_dump(exclude={"accuracy"}) | each.accuracy for each in found.tried]
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    written = {kind: folder / f"averages.{kind}" for kind in ("json", "csv", "png")}
    write_text(written["json"], found.model_dump_json(indent=1) + "\n")
    write_text(written["csv"], text.getvalue())
    with atomic_file(written["png"]) as temporary:
        _draw(found).savefig(temporary, format="png", dpi=120)
    return {kind: str(file) for kind, file in written.items()}


def _draw(found: ReplayedAverages) -> Figure:
    """The interval's curve, and what the trained task gains against what the others lose."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    by_interval, trade = figure.subplots(1, 2)
    _draw_intervals(by_interval, found)
    _draw_trade(trade, found)
    figure.suptitle(f"stage {found.stage}, {found.task}", fontsize="medium")
    return figure


def _draw_intervals(axes: Axes, found: ReplayedAverages) -> None:
    for kind in ("mean", "exponential"):
        tried = [(each.every or 0, each) for each in found.tried if each.kind == kind and each.share == 0]
        tried.sort(key=lambda pair: pair[0])
        for name, style in (("trained", "-"), ("earlier", ":"), ("later", "--")):
            points = [(every, 100 * value) for every, each in tried if (value := getattr(each, name)) is not None]
            if points:
                colour = "C0" if kind == "mean" else "C1"
                axes.plot(*zip(*points, strict=True), style, marker="o", color=colour, label=f"{kind}: {name} tasks")
    axes.set(xscale="log", xlabel="steps from one merge to the next", ylabel="top-1 accuracy, %")
    intervals = sorted({each.every for each in found.tried if each.every})
    axes.set_xticks(intervals, map(str, intervals))
    axes.minorticks_off()
    axes.legend(fontsize="x-small")


def _draw_trade(axes: Axes, found: ReplayedAverages) -> None:
    others = [value for task, value in found.start.items() if task != found.task]
    for name in dict.fromkeys(map(name_of, found.tried)):
        tried = [each for each in found.tried if name_of(each) == name]
        points = sorted((each.share, 100 * each.trained, 100 * _others(each, found.task)) for each in tried)
        axes.plot([x for _, x, _ in points], [y for _, _, y in points], marker="o", label=name)
    if others:
        axes.plot(100 * found.start[found.task], 100 * fmean(others), "k*", label="the stage's start")
    axes.set(xlabel="on its task, %", ylabel="mean over the other tasks, %")
    axes.legend(fontsize="x-small")


def _others(tried: ReplayedAverage, task: str) -> float:
    others = [value for name, value in tried.accuracy.items() if name != task]
    return fmean(others) if others else 0.0
