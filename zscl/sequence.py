"""Stages in order → accuracy matrix.

A run's folder is its own checkpoint. Every file in it appears whole, and what is there is not done again:

    zero_shot.json                      the initial model's row
    stages/<k>-<task>/model/            an open_clip folder: what stage k hands on (k from 1)
    stages/<k>-<task>/exemplars/        for a method with a memory: what stage k leaves in it, best first
    stages/<k>-<task>/losses.csv        every step's named losses
    stages/<k>-<task>/training.json     what the stage cost; with it, the stage is trained
    stages/<k>-<task>/accuracy.json     the row after it; with it, the stage is finished
    result.json                         everything; with it, the run is finished
"""

import importlib.metadata
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from pydantic import BaseModel, Field

from schemas.base import InputError, Strict
from schemas.experiment import LOCAL_MODEL, Experiment, Model
from schemas.results import (
    Note,
    Result,
    RowMeasured,
    StageResult,
    StageStarted,
    StageTrained,
    StepLosses,
    TaskEvaluated,
    TaskName,
)
from zscl import memory
from zscl.averaging import interpolate
from zscl.distributed import barrier, gather_sentences, rank, world_size
from zscl.evaluation import accuracies, embed_classes, head
from zscl.files import whole_folder, write_text
from zscl.metrics import metrics
from zscl.model import Clip, load, load_weights
from zscl.opened import Opened, open_experiment
from zscl.shards import seed_of
from zscl.streams import Loader
from zscl.teaching import Teaching, frozen, store_beside
from zscl.training import NotFiniteError, loader_of, train_stage

Report = Callable[[BaseModel], None]
ZERO_SHOT = "zero_shot.json"
LIBRARIES = ("torch", "open_clip_torch", "webdataset")


def run_sequence(
    experiment: Experiment,
    folder: Path,
    report: Report = lambda progress: None,
    device: torch.device | None = None,
) -> Result:
    """Run an experiment in `folder`, or go on behind the last finished stage there.

    Every worker of a `torch.distributed` group calls this alike; without a group, one process does it all. The main
    worker writes and reports.

    Args:
        experiment: what to run.
        folder: the run's folder, visible to all workers.
        report: told about progress (see `schemas.results`), on the main worker.
        device: default: CUDA if there is any.

    Raises:
        InputError: something the experiment names is missing or broken, or the folder holds another experiment.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = _Run(open_experiment(experiment), folder, report if rank() == 0 else _silent, device)
    experiment = run.opened.experiment
    refuse_other_run(folder, run.opened.fingerprint)
    run.note_what_is_there()
    clip = load(experiment.model, device)
    zero_shot = run.row(0, clip, folder / ZERO_SHOT)
    if experiment.method.task_loss is None:
        return run.finish(zero_shot, run.untrained(zero_shot), [])

    rows, stages = [], []
    for stage in range(1, len(run.opened.tasks) + 1):
        place = run.place(stage)
        if not (place / "training.json").is_file():
            run.train(stage, clip, place)
        load_weights(clip.model, place / "model")
        stages.append(StageResult.model_validate_json((place / "training.json").read_text()))
        rows.append(run.row(stage, clip, place / "accuracy.json").accuracy)
    return run.finish(zero_shot, rows, stages)


def _silent(progress: BaseModel) -> None:
    """What the other workers report."""


class AccuracyRow(Strict):
    """`zero_shot.json`, `accuracy.json`: a row of the matrix and what it cost."""

    fingerprint: str
    accuracy: dict[str, float]
    images: dict[str, int]
    under_later_heads: dict[str, list[float]] = Field(default_factory=dict)
    broken: dict[str, list[str]] = Field(default_factory=dict)
    seconds: float


def refuse_other_run(folder: Path, fingerprint: str) -> None:
    """Refuse to mix two experiments in one folder.

    Raises:
        InputError: the folder holds a run of another experiment.
    """
    file = folder / ZERO_SHOT
    if not file.is_file():
        return
    found = AccuracyRow.model_validate_json(file.read_text()).fingerprint
    if found != fingerprint:
        raise InputError(
            f"{folder}: found a run of another experiment (fingerprint {found}), expected {fingerprint} or an empty "
            "folder; choose another folder"
        )


@dataclass
class _Run:
    """One run under way: what its stages share."""

    opened: Opened
    folder: Path
    report: Report
    device: torch.device
    evaluation_seconds: float = 0.0

    def __post_init__(self) -> None:
        self.teaching = Teaching(self.opened, store_beside(self.folder), self.device, self.report)

    def note_what_is_there(self) -> None:
        """Say where the run goes on, and sweep what a killed process left half-written."""
        trained = len(list(self.folder.glob("stages/*/training.json")))
        if trained:
            self.report(Note(text=f"{self.folder}: trained stages found: {trained}, going on behind them"))
        if rank() == 0:
            for leftover in self.folder.glob("stages/.*.partial"):
                shutil.rmtree(leftover)

    def row(self, stage: int, clip: Clip, file: Path) -> AccuracyRow:
        """Measure the model on every task, or read what was measured."""
        known = file.is_file()
        row = AccuracyRow.model_validate_json(file.read_text()) if known else self._measure(stage, clip, file)
        self.evaluation_seconds += row.seconds
        self.report(RowMeasured(stage=stage, accuracy=row.accuracy))
        return row

    def _measure(self, stage: int, clip: Clip, file: Path) -> AccuracyRow:
        started = time.perf_counter()
        experiment = self.opened.experiment
        precision = experiment.optimisation.precision
        embedded = embed_classes(clip, self.opened.tasks, experiment.evaluation.templates, precision, self.device)
        row = AccuracyRow(fingerprint=self.opened.fingerprint, accuracy={}, images={}, seconds=0.0)
        for index, task in enumerate(self.opened.tasks):
            heads = [embedded[index]]
            if self.one_head:  # of all classes seen; untrained, the model is judged under those of every stage
                last = range(index, len(embedded)) if stage == 0 else [max(stage - 1, index)]
                heads = [head(embedded, index, until) for until in last]
            loader = self.loader()
            found, images = accuracies(
                clip, task, heads, loader, precision=precision, batch_size=experiment.compute.evaluation_batch_size
            )
            row.accuracy[task.name], row.images[task.name] = found[0], images
            if len(found) > 1:
                row.under_later_heads[task.name] = found[1:]
            if skipped := gather_sentences(loader.broken):
                row.broken[task.name] = skipped
            self.report(TaskEvaluated(stage=stage, task=task.name, accuracy=found[0], images=images))
        row = row.model_copy(update={"seconds": time.perf_counter() - started})
        barrier()
        if rank() == 0:
            write_text(file, row.model_dump_json(indent=1) + "\n")
        return row

    @property
    def one_head(self) -> bool:
        """Whether all classes seen are told apart at once (class-incremental), or each task's own (task-aware)."""
        return self.opened.experiment.class_incremental is not None

    def untrained(self, zero_shot: AccuracyRow) -> list[dict[str, float]]:
        """The initial model's accuracies after each stage, under the heads of that stage."""
        names = [task.name for task in self.opened.tasks]
        return [
            {
                name: [zero_shot.accuracy[name], *zero_shot.under_later_heads.get(name, ())][
                    max(stage - index, 0) if self.one_head else 0
                ]
                for index, name in enumerate(names)
            }
            for stage in range(len(names))
        ]

    def start(self, stage: int) -> Model:
        """What a stage starts from: the model that the one before it left, or the initial one."""
        return Model(name=f"{LOCAL_MODEL}{self.place(stage - 1)}/model") if stage > 1 else self.opened.experiment.model

    def further_texts(self, stage: int) -> list[str]:
        """What joins the softmax of a stage's task loss beside its own class prompts."""
        experiment, loss = self.opened.experiment, self.opened.experiment.method.task_loss
        assert loss is not None
        earlier = self.opened.tasks[: stage - 1] if loss.earlier_names else ()
        texts = [prompt for task in earlier for prompt in task.prompts(task.templates[0])]
        if loss.negatives and self.opened.reference:
            known = self.opened.reference.texts
            draw = random.Random(seed_of(experiment.seed, stage, "negatives"))
            texts += draw.sample(known, min(loss.negatives, len(known)))
        return texts

    def loader(self) -> Loader:
        """How this worker reads."""
        return loader_of(self.opened.experiment.compute, self.device, self.report)

    def place(self, stage: int) -> Path:
        """A stage's folder."""
        return self.folder / "stages" / f"{stage}-{self.opened.tasks[stage - 1].name}"

    def exemplars(self, stage: int, clip: Clip) -> list[tuple[int, int]]:
        """Herd what the stage leaves in memory, as many as it may ever need; nothing without a memory."""
        experiment, task = self.opened.experiment, self.opened.tasks[stage - 1]
        if experiment.method.memory is None or stage == len(self.opened.tasks):
            return []
        features, labels, places = memory.encode(
            clip, task, self.loader(), experiment.optimisation.precision, experiment.compute.evaluation_batch_size
        )
        count = memory.per_class(experiment.method.memory.budget, stage, len(task.classnames))
        return memory.choose(features, labels, places, count)

    def train(self, stage: int, clip: Clip, place: Path) -> None:
        """Train one stage and leave its folder, whole."""
        experiment = self.opened.experiment
        task, merge = experiment.tasks[stage - 1], experiment.method.merge
        self.report(StageStarted(stage=stage, task=task.name, steps=experiment.stage_steps(task)))
        try:
            model, result, steps = train_stage(
                experiment,
                stage,
                self.opened.tasks[stage - 1],
                clip,
                self.teaching.teacher(stage, clip, [self.place(before) / "exemplars" for before in range(1, stage)]),
                self.further_texts(stage),
                self.device,
                self.report,
            )
        except NotFiniteError as error:
            raise InputError(
                f"{error}; the last good model is {self.start(stage).name}; a lower optimisation.learning_rate may help"
            ) from error
        if merge is not None:
            anchor = frozen(experiment.model if merge.anchor == "initial" else self.start(stage), self.device)
            interpolate(list(model.parameters()), list(anchor.parameters()), merge.share)
        exemplars = self.exemplars(stage, replace(clip, model=model))
        if rank() == 0:
            with whole_folder(place) as temporary:
                clip.save(model, temporary / "model")
                if exemplars:
                    memory.write(temporary / "exemplars", self.opened.tasks[stage - 1].train, exemplars)
                write_text(temporary / "losses.csv", _losses_table(steps))
                write_text(temporary / "training.json", result.model_dump_json(indent=1) + "\n")
            self.report(StageTrained(result=result))
        barrier()

    def finish(self, zero_shot: AccuracyRow, rows: list[dict[str, float]], stages: list[StageResult]) -> Result:
        """Put the result together and write it."""
        experiment, opened = self.opened.experiment, self.opened
        matrix, untrained = (
            tuple(tuple(row[task.name] for task in opened.tasks) for row in each)
            for each in (rows, self.untrained(zero_shot))
        )
        images = [zero_shot.images[task.name] for task in opened.tasks] if self.one_head else None
        baseline = tuple(zero_shot.accuracy[task.name] for task in opened.tasks)
        result = Result(
            name=experiment.name,
            method=experiment.method.name,
            method_changes=experiment.method.changes,
            seed=experiment.seed,
            fingerprint=opened.fingerprint,
            tasks=tuple(
                TaskName(
                    name=task.name,
                    path=task.path,
                    digest=task.digest,
                    test_images=zero_shot.images[task.name],
                    broken_test_images=len(zero_shot.broken.get(task.name, ())),
                )
                for task in opened.tasks
            ),
            zero_shot=baseline,
            accuracy_matrix=matrix,
            metrics=metrics(matrix, baseline, images),
            zero_shot_metrics=metrics(untrained, baseline, images),
            stages=tuple(stages),
            reference_texts=len(opened.reference.texts) if opened.reference else 0,
            workers=world_size(),
            device=_device_name(self.device),
            train_seconds=sum(stage.train_seconds for stage in stages),
            evaluation_seconds=self.evaluation_seconds,
            versions={library: importlib.metadata.version(library) for library in LIBRARIES},
        )
        barrier()
        if rank() == 0:
            write_text(self.folder / "result.json", result.model_dump_json(indent=1) + "\n")
        return result


def _losses_table(steps: list[StepLosses]) -> str:
    names = list(steps[0].losses)
    lines = [f"{step.step},{step.learning_rate!r}," + ",".join(map(repr, step.losses.values())) for step in steps]
    return "\n".join([",".join(["step", "learning_rate", *names]), *lines]) + "\n"


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
