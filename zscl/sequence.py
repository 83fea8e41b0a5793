"""Stages in order → accuracy matrix.

A run's folder is its own checkpoint. Every file in it appears whole, and what is there is not done again:

    zero_shot.json                      the initial model's row
    checkpoint.pt                       the stage under way (see `zscl.checkpoint`)
    journal.jsonl                       what happened, a line each (see `zscl.journal`)
    stages/<k>-<task>/model/            an open_clip folder: what stage k hands on (k from 1)
    stages/<k>-<task>/exemplars/        for a method with a memory: what stage k leaves in it, best first
    stages/<k>-<task>/losses.csv        every step's named losses
    stages/<k>-<task>/training.json     what the stage cost; with it, the stage is trained
    stages/<k>-<task>/accuracy.json     the row after it; with it, the stage is finished
    *.part.json                         a row of which only some cells are measured
    result.json                         everything; with it, the run is finished
"""

import importlib.metadata
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from pydantic import BaseModel
from torch import nn

from schemas.base import InputError
from schemas.experiment import LOCAL_MODEL, Experiment, Model
from schemas.results import (
    Note,
    Result,
    RunStarted,
    StageResult,
    StageStarted,
    StageTrained,
    StepLosses,
    TaskName,
)
from zscl import memory
from zscl.averaging import interpolate
from zscl.checkpoint import CHECKPOINT
from zscl.curves import NotFiniteError
from zscl.distributed import barrier, rank, world_size
from zscl.files import patiently, whole_folder, write_text
from zscl.journal import JOURNAL, Journal
from zscl.metrics import metrics
from zscl.model import Clip, load, load_weights
from zscl.opened import Opened, open_experiment
from zscl.rows import ZERO_SHOT, AccuracyRow, Rows, refuse_other_run, write_whole
from zscl.shards import seed_of
from zscl.streams import Loader
from zscl.teaching import Teaching, frozen, store_beside
from zscl.training import loader_of, train_stage

Report = Callable[[BaseModel], None]
LIBRARIES = ("torch", "open_clip_torch", "webdataset")


def run_sequence(
    experiment: Experiment,
    folder: Path,
    report: Report = lambda progress: None,
    device: torch.device | None = None,
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> Result:
    """Run an experiment in `folder`, or go on from what is there: stages, rows, cells of a row, steps of a stage.

    Every worker of a `torch.distributed` group calls this alike; without a group, one process does it all. The main
    worker writes and reports.

    Args:
        experiment: what to run.
        folder: the run's folder, visible to all workers.
        report: told about progress (see `schemas.results`), on the main worker.
        device: default: CUDA if there is any.
        asked_to_stop: asked on the main worker, every second or so while training.

    Raises:
        InputError: something the experiment names is missing or broken, or the folder holds another experiment.
        StoppedError: it was asked to stop; called again, it goes on.
        OSError: storage has failed for minutes.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    opened = open_experiment(experiment)
    refuse_other_run(folder, opened.fingerprint)
    run = _Run(opened, folder, report, device, asked_to_stop)
    experiment = opened.experiment
    run.report(RunStarted(fingerprint=opened.fingerprint))
    run.note_what_is_there()
    clip = load(experiment.model, device)
    zero_shot = run.rows(0, clip, folder / ZERO_SHOT)
    if experiment.method.task_loss is None:
        return run.finish(zero_shot, run.rows.untrained(zero_shot), [])

    rows, stages = [], []
    for stage in range(1, len(run.opened.tasks) + 1):
        place = run.place(stage)
        if not (place / "training.json").is_file():
            run.train(stage, clip)
        load_weights(clip.model, place / "model")
        stages.append(StageResult.model_validate_json((place / "training.json").read_text()))
        rows.append(run.rows(stage, clip, place / "accuracy.json").accuracy)
    return run.finish(zero_shot, rows, stages)


@dataclass
class _Run:
    """One run under way: what its stages share."""

    opened: Opened
    folder: Path
    tell: Report
    device: torch.device
    asked_to_stop: Callable[[], bool]

    def __post_init__(self) -> None:
        self.journal = Journal(self.folder / JOURNAL)
        self.rows = Rows(self.opened, self.report, self.device, self.asked_to_stop)
        self.teaching = Teaching(self.opened, store_beside(self.folder), self.device, self.report)

    def report(self, progress: BaseModel) -> None:
        """Write down what happens, and tell whoever watches; on the main worker."""
        if rank() == 0:
            self.journal(progress)
            self.tell(progress)

    def note_what_is_there(self) -> None:
        """Say where the run goes on, and sweep what a killed process left half-written."""
        trained = len(list(self.folder.glob("stages/*/training.json")))
        if trained:
            self.report(Note(text=f"{self.folder}: trained stages found: {trained}, going on behind them"))
        if rank() == 0:
            for leftover in (*self.folder.glob(".*.partial"), *self.folder.glob("stages/.*.partial")):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()

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

    def train(self, stage: int, clip: Clip) -> None:
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
                self.folder / CHECKPOINT,
                self.asked_to_stop,
            )
        except NotFiniteError as error:
            raise InputError(
                f"{error}; the last good model is {self.start(stage).name}; a lower optimisation.learning_rate or "
                "optimisation.max_gradient_norm may help"
            ) from error
        if merge is not None:
            anchor = frozen(experiment.model if merge.anchor == "initial" else self.start(stage), self.device)
            interpolate(list(model.parameters()), list(anchor.parameters()), merge.share)
        exemplars = self.exemplars(stage, replace(clip, model=model))
        if rank() == 0:
            self.journal.flush()  # what the folder holds is to be found in the journal
            patiently(lambda: self._leave(stage, clip, model, exemplars, result, steps))
            self.report(StageTrained(result=result))
            (self.folder / CHECKPOINT).unlink(missing_ok=True)
        barrier()

    def _leave(
        self,
        stage: int,
        clip: Clip,
        model: nn.Module,
        exemplars: list[tuple[int, int]],
        result: StageResult,
        steps: list[StepLosses],
    ) -> None:
        """Write a trained stage's folder, whole."""
        with whole_folder(self.place(stage)) as temporary:
            clip.save(model, temporary / "model")
            if exemplars:
                memory.write(temporary / "exemplars", self.opened.tasks[stage - 1].train, exemplars)
            write_text(temporary / "losses.csv", _losses_table(steps))
            write_text(temporary / "training.json", result.model_dump_json(indent=1) + "\n")

    def finish(self, zero_shot: AccuracyRow, rows: list[dict[str, float]], stages: list[StageResult]) -> Result:
        """Put the result together and write it."""
        experiment, opened = self.opened.experiment, self.opened
        matrix, untrained = (
            tuple(tuple(row[task.name] for task in opened.tasks) for row in each)
            for each in (rows, self.rows.untrained(zero_shot))
        )
        images = [zero_shot.images[task.name] for task in opened.tasks] if self.rows.one_head else None
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
            warnings=tuple([sentence for stage in stages for sentence in stage.warnings] + self.rows.warnings),
            train_seconds=sum(stage.train_seconds for stage in stages),
            evaluation_seconds=self.rows.seconds,
            versions={library: importlib.metadata.version(library) for library in LIBRARIES},
        )
        barrier()
        if rank() == 0:
            self.journal.flush()
            write_whole(self.folder / "result.json", result)
        return result


def _losses_table(steps: list[StepLosses]) -> str:
    names = list(steps[0].losses)
    lines = [
        ",".join(map(repr, [step.step, step.learning_rate, *step.losses.values(), step.gradient_norm]))
        for step in steps
    ]
    return "\n".join([",".join(["step", "learning_rate", *names, "gradient_norm"]), *lines]) + "\n"


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
