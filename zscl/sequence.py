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
import shutil
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from pydantic import BaseModel
from torch import nn

from schemas.base import InputError, Strict
from schemas.experiment import Experiment
from schemas.results import (
    ImagesEmbedded,
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
from zscl import features, memory, reference
from zscl.averaging import interpolate
from zscl.distributed import barrier, rank, world_size
from zscl.evaluation import accuracy
from zscl.files import whole_folder, write_text
from zscl.metrics import metrics
from zscl.model import Clip, freeze, image_size, load, load_weights, weights_digest
from zscl.noise import NoiseSamples
from zscl.objective import Teacher
from zscl.shards import IndexedSamples, Samples
from zscl.streams import Loader
from zscl.tasks import ReferenceSet, TaskFolder
from zscl.training import NotFiniteError, train_stage

Report = Callable[[BaseModel], None]
ZERO_SHOT = "zero_shot.json"
LIBRARIES = ("torch", "open_clip_torch", "webdataset")


@dataclass(frozen=True)
class Opened:
    """An experiment whose data is found and whose identity is known."""

    experiment: Experiment
    tasks: tuple[TaskFolder, ...]
    reference: ReferenceSet | None
    weights: str
    fingerprint: str


def open_experiment(experiment: Experiment) -> Opened:
    """Find all that the experiment names.

    Raises:
        InputError: a task, shard, template, caption or model is missing or broken.
    """
    tasks = tuple(TaskFolder.open(task) for task in experiment.tasks)
    used = experiment.reference if experiment.method.needs_reference else None
    opened = ReferenceSet(used) if used else None
    if experiment.method.memory:
        memory.check_budget(experiment.method.memory.budget, tasks)
    weights = weights_digest(experiment.model)
    contents = {task.path: task.digest for task in tasks} | {experiment.model.name: weights}
    if opened:
        contents["reference"] = opened.digest
    return Opened(experiment, tasks, opened, weights, experiment.fingerprint(contents))


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
    refuse_other_run(folder, run.opened.fingerprint)
    run.note_what_is_there()
    clip = load(experiment.model, device)
    zero_shot = run.row(0, clip, folder / ZERO_SHOT)
    if experiment.method.task_loss is None:
        return run.finish(zero_shot, [zero_shot] * len(run.opened.tasks), [])

    rows, stages = [], []
    for stage in range(1, len(run.opened.tasks) + 1):
        place = run.place(stage)
        if not (place / "training.json").is_file():
            run.train(stage, clip, place)
        load_weights(clip.model, place / "model")
        stages.append(StageResult.model_validate_json((place / "training.json").read_text()))
        rows.append(run.row(stage, clip, place / "accuracy.json"))
    return run.finish(zero_shot, rows, stages)


def _silent(progress: BaseModel) -> None:
    """What the other workers report."""


class OnDemand:
    """A frozen model that is loaded when it is first needed, and can be forgotten."""

    def __init__(self, load: Callable[[], nn.Module]) -> None:
        self._load = load
        self._model: nn.Module | None = None

    def __call__(self) -> nn.Module:
        """The model."""
        self._model = self._model or self._load()
        return self._model

    def forget(self) -> None:
        """Give its memory back; asked again, it is loaded again."""
        self._model = None


class AccuracyRow(Strict):
    """`zero_shot.json`, `accuracy.json`: a row of the matrix and what it cost."""

    fingerprint: str
    accuracy: dict[str, float]
    images: dict[str, int]
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
        self.initial_teacher = OnDemand(self.initial)

    def note_what_is_there(self) -> None:
        """Say where the run goes on, and sweep what a killed process left half-written."""
        trained = len(list(self.folder.glob("stages/*/training.json")))
        if trained:
            self.report(Note(text=f"{self.folder}: trained stages found: {trained}, going on behind them"))
        if rank() == 0:
            for leftover in self.folder.glob("stages/.*.partial"):
                shutil.rmtree(leftover)

    def initial(self) -> nn.Module:
        """Load the initial model, frozen: for a method that looks back at it."""
        return freeze(load(self.opened.experiment.model, self.device).model)

    def row(self, stage: int, clip: Clip, file: Path) -> AccuracyRow:
        """Measure the model on every task, or read what was measured."""
        known = file.is_file()
        row = AccuracyRow.model_validate_json(file.read_text()) if known else self._measure(stage, clip, file)
        self.evaluation_seconds += row.seconds
        self.report(RowMeasured(stage=stage, accuracy=row.accuracy))
        return row

    def _measure(self, stage: int, clip: Clip, file: Path) -> AccuracyRow:
        started, accuracies, images = time.perf_counter(), {}, {}
        experiment = self.opened.experiment
        for task in self.opened.tasks:
            accuracies[task.name], images[task.name] = accuracy(
                clip,
                task,
                Loader(self.device, experiment.compute.loader_processes),
                templates=experiment.evaluation.templates,
                precision=experiment.optimisation.precision,
                batch_size=experiment.compute.evaluation_batch_size,
            )
            self.report(
                TaskEvaluated(stage=stage, task=task.name, accuracy=accuracies[task.name], images=images[task.name])
            )
        row = AccuracyRow(
            fingerprint=self.opened.fingerprint,
            accuracy=accuracies,
            images=images,
            seconds=time.perf_counter() - started,
        )
        barrier()
        if rank() == 0:
            write_text(file, row.model_dump_json(indent=1) + "\n")
        return row

    def teacher(self, stage: int, task: TaskFolder, clip: Clip) -> Teacher | None:
        """What the stage distils from, with its embeddings of the stage's texts; `clip` is the stage's start."""
        experiment = self.opened.experiment
        distill = experiment.method.distill
        images = self.distilled_images(stage, task, clip)
        if distill is None or images is None:
            return None
        model, weights = self.initial_teacher, self.opened.weights if distill.teacher == "initial" else None
        if distill.teacher != "initial":
            frozen = freeze(deepcopy(clip.model))
            if distill.teacher == "blended":
                interpolate(list(frozen.parameters()), list(self.initial().parameters()), 1 - distill.blend)
            model = OnDemand(lambda: frozen)
        texts = reference.text_embeddings(
            reference.tokens_of(distill, clip, task, self.opened.tasks, self.opened.reference, experiment.seed),
            model,
            store=self.store,
            weights=weights,
            device=self.device,
            note=self.note,
        )
        return Teacher(images, texts, self.image_features(stage, clip, model, weights, images, texts.shape[1]))

    def image_features(
        self, stage: int, clip: Clip, model: "OnDemand", weights: str | None, images: Samples, width: int
    ) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """The teacher's features of images: from a store where it pays, filled ahead where that pays, too."""
        experiment, compute = self.opened.experiment, self.opened.experiment.compute
        distill, optimisation = experiment.method.distill, experiment.optimisation
        assert distill is not None
        encode = features.encoder(model, optimisation.precision)
        met_again = distill.images in ("reference", "task") and isinstance(images, IndexedSamples)
        if weights is None or not met_again or compute.teacher_features == "never":
            return lambda images, identities: encode(images)
        assert isinstance(images, IndexedSamples)
        store = features.store_of(self.store, clip, weights, optimisation.precision, images, width)
        stored = features.StoredFeatures(store, encode, self.note)
        drawing = experiment.tasks if distill.images == "reference" else [experiment.tasks[stage - 1]]
        draws = [experiment.stage_steps(task) * optimisation.reference_batch_size for task in drawing]
        nearly_all = features.share_met(len(images), draws) >= features.NEARLY_ALL
        if compute.teacher_features == "ahead" or (compute.teacher_features == "auto" and nearly_all):
            self.embed_ahead(stored, images, clip)
            model.forget()
        return stored

    def embed_ahead(self, stored: features.StoredFeatures, images: IndexedSamples, clip: Clip) -> None:
        """Compute what the store lacks, with the worker group's whole strength."""
        compute = self.opened.experiment.compute
        computed = stored.fill(
            images,
            clip,
            Loader(self.device, compute.loader_processes, labels_stay=True),
            compute.evaluation_batch_size,
            progress=lambda done, total: self.report(ImagesEmbedded(done=done, total=total)),
        )
        if computed:
            self.note(
                f"Teacher embedded {computed} images, once: {stored.store.megabytes:.1f} MB in {stored.store.folder}"
            )

    @property
    def store(self) -> Path:
        """Where the teacher's embeddings lie: beside the run's folder, so that runs share them."""
        return self.folder.parent / "teacher"

    def note(self, text: str) -> None:
        """Say a sentence."""
        self.report(Note(text=text))

    def distilled_images(self, stage: int, task: TaskFolder, clip: Clip) -> Samples | None:
        """What the teacher is shown; `None` where there is nothing (yet)."""
        method = self.opened.experiment.method
        if method.distill is None:
            return None
        match method.distill.images:
            case "reference":
                assert self.opened.reference is not None
                return self.opened.reference.images
            case "task":
                return task.train
            case "exemplars":
                assert method.memory is not None
                earlier = [self.place(before) / "exemplars" for before in range(1, stage)]
                return memory.recall(earlier, method.memory.budget)
            case "noise":
                return NoiseSamples(image_size(clip.model))

    def start(self, stage: int, clip: Clip) -> nn.Module:
        """What a later stage started from: the model that the stage before it left."""
        model = deepcopy(clip.model)
        load_weights(model, self.place(stage - 1) / "model")
        return model

    def place(self, stage: int) -> Path:
        """A stage's folder."""
        return self.folder / "stages" / f"{stage}-{self.opened.tasks[stage - 1].name}"

    def exemplars(self, stage: int, clip: Clip) -> list[tuple[int, int]]:
        """Herd what the stage leaves in memory, as many as it may ever need; nothing without a memory."""
        experiment, task = self.opened.experiment, self.opened.tasks[stage - 1]
        if experiment.method.memory is None or stage == len(self.opened.tasks):
            return []
        loader = Loader(self.device, experiment.compute.loader_processes)
        features, labels = memory.encode(
            clip, task, loader, experiment.optimisation.precision, experiment.compute.evaluation_batch_size
        )
        count = memory.per_class(experiment.method.memory.budget, stage, len(task.classnames))
        return memory.choose(features, labels, count)

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
                self.teacher(stage, self.opened.tasks[stage - 1], clip),
                self.device,
                self.report,
            )
        except NotFiniteError as error:
            good = f"{self.place(stage - 1)}/model" if stage > 1 else experiment.model.name
            raise InputError(
                f"{error}; the last good model is {good}; a lower optimisation.learning_rate may help"
            ) from error
        if merge is not None:
            anchor = self.initial() if merge.anchor == "initial" or stage == 1 else self.start(stage, clip)
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

    def finish(self, zero_shot: AccuracyRow, rows: list[AccuracyRow], stages: list[StageResult]) -> Result:
        """Put the result together and write it."""
        experiment, opened = self.opened.experiment, self.opened
        matrix = tuple(tuple(row.accuracy[task.name] for task in opened.tasks) for row in rows)
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
                )
                for task in opened.tasks
            ),
            zero_shot=baseline,
            accuracy_matrix=matrix,
            metrics=metrics(matrix),
            zero_shot_metrics=metrics([baseline] * len(baseline)),
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
