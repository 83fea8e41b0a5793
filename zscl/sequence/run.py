"""Stages in order → accuracy matrix.

A run's folder is its own checkpoint. Every file in it appears whole, and what is there is not done again:

    zero_shot.json                      the initial model's row
    checkpoint.pt                       the stage under way (see `zscl.training.checkpoint`)
    journal.jsonl                       what happened, a line each (see `zscl.sequence.journal`)
    stages/<k>-<task>/model/            an open_clip folder: what stage k hands on (k from 1)
    stages/<k>-<task>/exemplars/        for a method with a memory: what stage k leaves in it, best first
    stages/<k>-<task>/losses.csv        every step's named losses
    stages/<k>-<task>/training.json     what the stage cost; with it, the stage is trained
    stages/<k>-<task>/accuracy.json     the row after it; with it, the stage is finished
    *.part.json                         a row of which only some cells are measured
    snapshots/<k>-<task>/               weights along stage k, where asked for (see `zscl.training.snapshots`)
    result.json                         everything; with it, the run is finished
"""

import csv
import importlib.metadata
import io
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from pydantic import BaseModel
from torch import nn

from schemas.algorithm import algorithm
from schemas.errors import InputError
from schemas.events import CheckpointWritten, Note, RowMeasured, RunStarted, StageStarted, StageTrained
from schemas.experiment import LOCAL_MODEL, Experiment, Model
from schemas.results import Result, StageResult, StepLosses, TaskName
from zscl.data.loader import Loader, build_loader
from zscl.evaluation.metrics import metrics
from zscl.methods.exemplars import choose_exemplars, encode_training_images, exemplars_per_class, write_exemplars
from zscl.methods.weight_averaging import interpolate
from zscl.models.clip import Clip, has_no_deterministic_kernel, load_clip, load_weights, use_deterministic_kernels
from zscl.runtime.atomic_io import atomic_folder, remove_quietly, write_text
from zscl.runtime.distributed import barrier, broadcast_text, rank, world_size
from zscl.runtime.retry import read_text_if_exists, retry_io
from zscl.runtime.seeding import derive_seed
from zscl.sequence.async_matrix import AsyncMatrixEvaluator, SubmitEvaluation
from zscl.sequence.journal import JOURNAL, Journal
from zscl.sequence.layout import RESULT, TRAINING, stage_folder_of
from zscl.sequence.matrix import MatrixEvaluator
from zscl.sequence.object_store import RemoteSync
from zscl.sequence.resolve import ResolvedExperiment, resolve
from zscl.sequence.result import AccuracyRow, check_same_run, parse_stage_result, write_json, write_run_marker
from zscl.sequence.stage_cache import SharedWork, StageCache, stage_identity
from zscl.sequence.teacher import TeacherBuilder, load_frozen, teacher_cache_folder
from zscl.training.checkpoint import CHECKPOINT
from zscl.training.loss_log import NotFiniteError
from zscl.training.stage import train_stage

Report = Callable[[BaseModel], None]
LIBRARIES = ("torch", "open_clip_torch", "webdataset")


def run_sequence(
    experiment: Experiment | ResolvedExperiment,
    folder: Path,
    report: Report = lambda progress: None,
    device: torch.device | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
    shared: SharedWork | None = None,
    submit_evaluation: SubmitEvaluation | None = None,
    sync: RemoteSync | None = None,
) -> Result:
    """Run an experiment in `folder`, or go on from what is there: stages, rows, cells of a row, steps of a stage.

    Every worker of a `torch.distributed` group calls this alike; without a group, one process does it all. The main
    worker writes and reports.

    Args:
        experiment: what to run, opened before or not.
        folder: the run's folder, visible to all workers, unless there is a mirror.
        report: told about progress (see `schemas.results`), on the main worker.
        device: default: CUDA if there is any.
        asked_to_stop: asked on the main worker, every second or so while training.
        shared: with the runs beside this one; default: the teacher's embeddings.
        elsewhere: begins to measure a stage's row elsewhere (see `measure_row`), beside the training; default: rows
            are measured between the stages.
        mirror: through which workers on other nodes see the folder; the caller pulls before and pushes behind.

    Raises:
        InputError: something the experiment names is missing or broken, or the folder holds another experiment.
        StoppedError: it was asked to stop; called again, it goes on.
        OSError: storage has failed for minutes.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    opened = experiment if isinstance(experiment, ResolvedExperiment) else resolve(experiment)
    retry_io(lambda: folder.mkdir(parents=True, exist_ok=True))
    check_same_run(folder, opened.fingerprint)
    barrier()  # every worker has looked
    if rank() == 0:
        write_run_marker(folder, opened.fingerprint)
    run = _Run(
        opened,
        folder,
        report,
        device,
        stop_requested,
        shared or SharedWork(teacher_cache_folder(folder)),
        submit_evaluation,
        sync,
    )
    experiment = opened.experiment
    run.report(RunStarted(fingerprint=opened.fingerprint))
    run.clean_up_and_report()
    use_deterministic_kernels(device, experiment.compute.deterministic)
    clip = load_clip(experiment.model, device)
    run.rows.measure(0, clip)
    if experiment.method.task_loss is None:
        [zero_shot] = run.rows.rows()
        return run.finish(zero_shot, run.rows.untrained(zero_shot), [])

    stages = []
    for stage in range(1, len(run.resolved.tasks) + 1):
        place = run.place(stage)
        if not run.trained(stage):
            run.train_or_reuse(stage, clip)
        load_weights(clip.model, place / "model")
        stages.append(parse_stage_result(run.resolved, stage, run.trained(stage), place / TRAINING))
        run.report(StageTrained(result=stages[-1]))
        run.rows.measure(stage, clip)
    zero_shot, *rows = run.rows.rows()
    return run.finish(zero_shot, [row.accuracy for row in rows], stages)


def measure_row(
    experiment: Experiment, folder: Path, stage: int, device: torch.device, stop_requested: Callable[[], bool]
) -> None:
    """Measure one row of a run that trains elsewhere meanwhile; cells that are measured already stay.

    Args:
        experiment: the run's.
        folder: the run's; the stage is trained.
        stage: 0 for the zero-shot row.
        device: where to.
        asked_to_stop: asked between cells.

    Raises:
        InputError: a task or the model is missing or broken.
        StoppedError: it was asked to stop.
    """
    opened = resolve(experiment)
    clip = load_clip(stage_start(opened, folder, stage + 1), device)
    MatrixEvaluator(opened, folder, lambda progress: None, device, stop_requested).measure(stage, clip)


def stage_start(opened: ResolvedExperiment, folder: Path, stage: int) -> Model:
    """What a stage starts from: the model that the one before it left, or the initial one."""
    if stage == 1:
        return opened.experiment.model
    return Model(name=f"{LOCAL_MODEL}{stage_folder_of(opened, folder, stage - 1)}/model")


@dataclass
class _Run:
    """One run under way: what its stages share."""

    resolved: ResolvedExperiment
    folder: Path
    tell: Report
    device: torch.device
    stop_requested: Callable[[], bool]
    shared: SharedWork
    submit_evaluation: SubmitEvaluation | None
    sync: RemoteSync | None

    def __post_init__(self) -> None:
        self.journal = Journal(self.folder / JOURNAL)
        stages, averages = self.shared.stages, self.shared.averages
        self.store = None if stages is None else StageCache(self.resolved, stages, averages)
        given = self.resolved, self.folder, self.report, self.device, self.stop_requested, self.store
        self.rows = (
            MatrixEvaluator(*given)
            if self.submit_evaluation is None
            else AsyncMatrixEvaluator(*given, submit=self.submit_evaluation)
        )
        self.teaching = TeacherBuilder(self.resolved, self.shared.teacher, self.device, self.report)

    def report(self, progress: BaseModel) -> None:
        """Write down what happens, and tell whoever watches; on the main worker."""
        if rank() == 0:
            self.journal(progress)
            self.tell(progress)
            if self.sync:
                self.sync.push_async(soon=isinstance(progress, CheckpointWritten | RowMeasured))

    def clean_up_and_report(self) -> None:
        """Say where the run goes on, and sweep what a killed process left half-written."""
        trained = len(list(self.folder.glob("stages/*/training.json")))
        if trained:
            self.report(Note(text=f"{self.folder}: trained stages found: {trained}, going on behind them"))
        if rank() == 0:
            for where in (".*.partial", "stages/.*.partial", "stages/*/.*.partial"):
                for leftover in self.folder.glob(where):
                    shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else remove_quietly(leftover)

    def extra_texts(self, stage: int) -> list[str]:
        """What joins the softmax of a stage's task loss beside its own class prompts."""
        experiment, loss = self.resolved.experiment, self.resolved.experiment.method.task_loss
        assert loss is not None
        earlier = self.resolved.tasks[: stage - 1] if loss.earlier_names else ()
        texts = [prompt for task in earlier for prompt in task.prompts(task.templates[0])]
        if loss.negatives and self.resolved.reference:
            known = self.resolved.reference.texts
            draw = random.Random(derive_seed(experiment.seed, stage, "negatives"))
            texts += draw.sample(known, min(loss.negatives, len(known)))
        return texts

    def loader(self) -> Loader:
        """How this worker reads."""
        return build_loader(self.resolved.experiment.compute, self.device, self.report)

    def place(self, stage: int) -> Path:
        """A stage's folder."""
        return stage_folder_of(self.resolved, self.folder, stage)

    def trained(self, stage: int) -> str:
        """What a trained stage's `training.json` says, as the main worker reads it; nothing before it is trained."""
        file = self.place(stage) / TRAINING
        return broadcast_text(read_text_if_exists(file, self.folder) if rank() == 0 else "")

    def exemplars(self, stage: int, clip: Clip) -> list[tuple[int, int]]:
        """Herd what the stage leaves in memory, as many as it may ever need; nothing without a memory."""
        experiment, task = self.resolved.experiment, self.resolved.tasks[stage - 1]
        if experiment.method.memory is None or stage == len(self.resolved.tasks):
            return []
        features, labels, places = encode_training_images(
            clip, task, self.loader(), experiment.optimisation.precision, experiment.compute.evaluation_batch_size
        )
        count = exemplars_per_class(experiment.method.memory.budget, stage, len(task.classnames))
        return choose_exemplars(features, labels, places, count)

    def train_or_reuse(self, stage: int, clip: Clip) -> None:
        """Train one stage, unless a run beside this one has trained the same."""
        if self.store is None:
            self.train(stage, clip)
            return
        with self.store.lock(
            self.store.training_key(stage), self.stop_requested, lambda text: self.report(Note(text=text))
        ):
            if not self.store.get(stage, self.place(stage)):
                self.train(stage, clip)

    def train(self, stage: int, clip: Clip) -> None:
        """Train one stage and leave its folder, whole."""
        experiment = self.resolved.experiment
        task, merge = experiment.tasks[stage - 1], experiment.method.merge
        start = stage_start(self.resolved, self.folder, stage)
        self.report(StageStarted(stage=stage, task=task.name, steps=experiment.stage_steps(task)))
        others = self.store.other_averages(stage) if self.store else ()
        identities = [stage_identity(self.resolved, stage, *average) for average in ((), *((each,) for each in others))]
        try:
            trained, steps = train_stage(
                experiment,
                stage,
                self.resolved.tasks[stage - 1],
                clip,
                self.teaching.build(stage, clip, [self.place(before) / "exemplars" for before in range(1, stage)]),
                self.extra_texts(stage),
                self.device,
                self.report,
                self.folder / CHECKPOINT,
                self.stop_requested,
                others,
                identities[0],
            )
        except NotFiniteError as error:
            raise InputError(
                f"{error}; the last good model is {'the initial one, ' if stage == 1 else ''}{start.name}; a lower "
                "optimisation.learning_rate or optimisation.max_gradient_norm may help"
            ) from error
        except RuntimeError as error:
            if not has_no_deterministic_kernel(error):
                raise
            operation = str(error).partition(" does not have")[0]
            raise InputError(
                f"compute.deterministic: found a model or a loss with an operation that has no deterministic GPU "
                f"implementation ({operation}), expected compute.deterministic=false for it: results then differ by "
                "round-off from run to run"
            ) from error
        if merge is not None:
            anchor = load_frozen(experiment.model if merge.anchor == "initial" else start, self.device)
            for model, _ in trained:
                interpolate(list(model.parameters()), list(anchor.parameters()), merge.share)
        exemplars = self.exemplars(stage, replace(clip, model=trained[0][0]))
        if rank() == 0:
            self.journal.flush()  # what the folder holds is to be found in the journal
            places = [
                self.place(stage),
                *(self.store.folder_for_average(stage, average) for average in others if self.store),
            ]
            for place, identity, (model, result) in reversed(list(zip(places, identities, trained, strict=True))):
                result = result.model_copy(update={"identity": identity})  # the run's own stage comes last
                leave = partial(self._leave, place, stage, clip, model, exemplars, result, steps)
                retry_io(leave, must_exist=self.folder, what=place)
            if self.store:
                self.store.put(stage, self.place(stage))
            remove_quietly(self.folder / CHECKPOINT)
            if self.sync:
                self.sync.push()
        barrier()
        if self.sync and rank() > 0:
            self.sync.pull()

    def _leave(
        self,
        place: Path,
        stage: int,
        clip: Clip,
        model: nn.Module,
        exemplars: list[tuple[int, int]],
        result: StageResult,
        steps: list[StepLosses],
    ) -> None:
        """Write a trained stage's folder, whole, unless it is there: a group given up for dead may have left it."""
        if (place / TRAINING).is_file():
            return
        with atomic_folder(place) as temporary:
            clip.save(model, temporary / "model")
            if exemplars:
                write_exemplars(temporary / "exemplars", self.resolved.tasks[stage - 1].train, exemplars)
            write_text(temporary / "losses.csv", _losses_table(steps))
            write_text(temporary / TRAINING, result.model_dump_json(indent=1) + "\n")

    def finish(self, zero_shot: AccuracyRow, rows: list[dict[str, float]], stages: list[StageResult]) -> Result:
        """Put the result together and write it."""
        experiment, opened = self.resolved.experiment, self.resolved
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
            method_settings=experiment.method.settings,
            settings=experiment.settings | self.resolved.custom_loss_digests,
            model=experiment.model.name,
            model_digest=opened.weights,
            seed=experiment.seed,
            fingerprint=opened.fingerprint,
            algorithm=algorithm(),
            held_out=experiment.evaluation.held_out,
            tasks=tuple(
                TaskName(
                    name=task.name,
                    path=task.path,
                    digest=task.digest,
                    test_images=zero_shot.images[task.name],
                    broken_test_images=len(zero_shot.broken.get(task.name, ())),
                    split_family=task.split_family,
                )
                for task in opened.tasks
            ),
            zero_shot=baseline,
            accuracy_matrix=matrix,
            metrics=metrics(matrix, baseline, images),
            zero_shot_metrics=metrics(untrained, baseline, images),
            stages=tuple(stages),
            reference_texts=len(opened.reference.texts) if opened.reference else 0,
            reference=opened.reference.digest if opened.reference else "",
            templates=experiment.evaluation.templates,
            workers=world_size(),
            device=_device_name(self.device),
            warnings=tuple([sentence for stage in stages for sentence in stage.warnings] + self.rows.warnings),
            train_seconds=sum(stage.train_seconds for stage in stages if not stage.shared),
            evaluation_seconds=self.rows.seconds,
            versions={library: importlib.metadata.version(library) for library in LIBRARIES},
        )
        barrier()
        if rank() == 0:
            self.journal.flush()
            write_json(self.folder / RESULT, result, within=self.folder)
            remove_quietly(self.folder / CHECKPOINT)
        return result


def _losses_table(steps: list[StepLosses]) -> str:
    """CSV with a column for every loss that any step has; empty where a step does not have it."""
    names = dict.fromkeys(name for step in steps for name in step.losses)
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["step", "learning_rate", *names, "gradient_norm"])
    for step in steps:
        losses = (step.losses.get(name) for name in names)
        table.writerow([step.step, step.learning_rate, *losses, step.gradient_norm])
    return text.getvalue()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
