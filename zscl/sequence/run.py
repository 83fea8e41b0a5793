"""Runs a sequence of stages: trains each stage, evaluates the model after it, and writes the run's result.

A run can be resumed from its folder: every result is written to a file, atomically, and a result whose file exists is
not computed again. `zscl.sequence.layout` describes the files.
"""

import csv
import importlib.metadata
import io
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from pydantic import BaseModel
from torch import nn

from schemas.algorithm import algorithm_version
from schemas.errors import ErrorCode, InputError
from schemas.events import CheckpointWritten, Note, RowMeasured, RunStarted, StageStarted, StageTrained
from schemas.experiment import LOCAL_MODEL, Experiment, Model
from schemas.results import Result, StageResult, StepLosses, TaskSummary
from zscl.data.loader import build_loader
from zscl.evaluation.metrics import compute_metrics
from zscl.methods.exemplars import choose_exemplars, encode_training_images, exemplars_per_class, write_exemplars
from zscl.methods.weight_averaging import interpolate
from zscl.models.clip import Clip, has_no_deterministic_kernel, load_clip, load_weights, use_deterministic_kernels
from zscl.runtime.atomic_io import atomic_folder, remove_if_possible, write_text
from zscl.runtime.distributed import barrier, broadcast_text, rank, world_size
from zscl.runtime.retry import read_text_if_exists, retry_io
from zscl.runtime.seeding import derive_seed
from zscl.sequence.async_matrix import AsyncMatrixEvaluator, SubmitEvaluation
from zscl.sequence.journal import Journal
from zscl.sequence.layout import (
    CHECKPOINT,
    EXEMPLARS_FOLDER,
    JOURNAL,
    LOSSES,
    MODEL_FOLDER,
    RESULT,
    TRAINING,
    exemplars_folder,
    glob_stages,
    model_folder,
    snapshots_folder,
    stage_folder,
    stages_folder,
    teacher_cache_folder,
)
from zscl.sequence.matrix import MatrixEvaluator
from zscl.sequence.object_store import RemoteSync
from zscl.sequence.resolve import ResolvedExperiment, resolve
from zscl.sequence.result import AccuracyRow, check_same_run, parse_stage_result, write_json, write_run_marker
from zscl.sequence.stage_cache import Averages, SharedWork, StageCache, stage_identity
from zscl.sequence.teacher import TeacherBuilder, load_frozen
from zscl.training.loss_log import NotFiniteError
from zscl.training.stage import train_stage

Report = Callable[[BaseModel], None]
LIBRARIES = ("torch", "open_clip_torch", "webdataset")  # results record their versions
TEMPORARY = ".*.partial"  # incomplete files and folders of `zscl.runtime.atomic_io`


def run_sequence(
    experiment: Experiment | ResolvedExperiment,
    folder: Path,
    report: Report = lambda event: None,
    device: torch.device | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
    shared: SharedWork | None = None,
    submit_evaluation: SubmitEvaluation | None = None,
    sync: RemoteSync | None = None,
) -> Result:
    """Run an experiment in a folder, or resume it.

    A resumed run does not repeat completed stages and evaluations, and continues training from the last checkpoint.

    All ranks of a `torch.distributed` process group must call this with equal arguments. Without a process group, the
    current process does all the work. Rank 0 writes files and reports events.

    Args:
        experiment: The experiment. It is resolved first, unless it is a `ResolvedExperiment`.
        folder: The run's folder, visible to all ranks unless `sync` is given.
        report: Callback for events (see `schemas.events`), on rank 0.
        device: The device; default: CUDA if available.
        stop_requested: Returns whether the run should stop; called on rank 0, about once a second during training.
        shared: Caches that the run shares with other runs; default: only the cache of the teacher's features.
        submit_evaluation: Starts the evaluation of a stage's model on all tasks in another process (see
            `measure_row`), while training continues; default: this process evaluates the model after each stage.
        sync: Synchronises the folder between nodes. The caller calls `sync.pull` before the run and `sync.push` after
            it.

    Returns:
        The run's result.

    Raises:
        InputError: An input is missing or broken, or the folder holds another run.
        StoppedError: A stop was requested. The next call resumes the run.
        OSError: Storage has failed for several minutes.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    resolved = experiment if isinstance(experiment, ResolvedExperiment) else resolve(experiment)
    experiment = resolved.experiment
    retry_io(lambda: folder.mkdir(parents=True, exist_ok=True))
    check_same_run(folder, resolved.fingerprint)
    barrier()  # all ranks have read the folder before rank 0 writes
    if rank() == 0:
        write_run_marker(folder, resolved.fingerprint)
    shared = shared or SharedWork(teacher_cache_folder(folder))
    run = _Run(resolved, folder, report, device, stop_requested, shared, submit_evaluation, sync)
    run.report(RunStarted(fingerprint=resolved.fingerprint))
    run.remove_temporary_files()
    use_deterministic_kernels(device, experiment.compute.deterministic)
    clip = load_clip(experiment.model, device)
    run.evaluator.measure(0, clip)
    if experiment.method.task_loss is None:
        [zero_shot] = run.evaluator.rows()
        return run.write_result(zero_shot, run.evaluator.zero_shot_rows(zero_shot), [])

    stages = []
    for stage in range(1, len(resolved.tasks) + 1):
        if not run.read_training(stage):
            run.train_or_reuse(stage, clip)
        path = run.stage_folder(stage)
        load_weights(clip.model, path / MODEL_FOLDER)
        stages.append(parse_stage_result(resolved, stage, run.read_training(stage), path / TRAINING))
        run.report(StageTrained(result=stages[-1]))
        run.evaluator.measure(stage, clip)
    zero_shot, *rows = run.evaluator.rows()
    return run.write_result(zero_shot, [row.accuracy for row in rows], stages)


def measure_row(
    experiment: Experiment, folder: Path, stage: int, device: torch.device, stop_requested: Callable[[], bool]
) -> None:
    """Evaluate one stage's model of a run that another process trains, on all tasks (a row of the accuracy matrix).

    Tasks that are already evaluated are skipped.

    Args:
        experiment: The run's experiment.
        folder: The run's folder, which has the stage's model.
        stage: The row's stage; 0 is the initial model.
        device: The device to evaluate on.
        stop_requested: Returns whether to stop; called before each task.

    Raises:
        InputError: A task or the model is missing or broken.
        StoppedError: A stop was requested.
    """
    resolved = resolve(experiment)
    clip = load_clip(start_model(resolved, folder, stage + 1), device)
    MatrixEvaluator(resolved, folder, lambda event: None, device, stop_requested).measure(stage, clip)


def start_model(resolved: ResolvedExperiment, folder: Path, stage: int) -> Model:
    """Return the model from which a stage starts: the initial model, or the resulting model of the previous stage."""
    if stage == 1:
        return resolved.experiment.model
    return Model(name=f"{LOCAL_MODEL}{model_folder(folder, stage - 1, resolved.tasks[stage - 2].name)}")


@dataclass
class _Run:
    """The settings and objects that all stages of a run use.

    Attributes:
        resolved: The experiment.
        folder: The run's folder.
        on_event: The caller's callback for events.
        device: The device to train and evaluate on.
        stop_requested: Returns whether the run should stop.
        shared: Caches that the run shares with other runs.
        submit_evaluation: Starts the evaluation of a stage's model in another process; `None` to evaluate in this one.
        sync: Synchronises the folder between nodes; `None` if they share a file system.
        journal: Writes the journal.
        cache: The cache of trained stages and accuracy rows; `None` if this run shares none.
        evaluator: Evaluates the rows of the accuracy matrix.
        teacher_builder: Builds the teacher of each stage.
    """

    resolved: ResolvedExperiment
    folder: Path
    on_event: Report
    device: torch.device
    stop_requested: Callable[[], bool]
    shared: SharedWork
    submit_evaluation: SubmitEvaluation | None
    sync: RemoteSync | None

    def __post_init__(self) -> None:
        self.journal = Journal(self.folder / JOURNAL)
        cache_folder, averages = self.shared.stage_cache, self.shared.averages
        self.cache = None if cache_folder is None else StageCache(self.resolved, cache_folder, averages)
        arguments = self.resolved, self.folder, self.report, self.device, self.stop_requested, self.cache
        self.evaluator = (
            MatrixEvaluator(*arguments)
            if self.submit_evaluation is None
            else AsyncMatrixEvaluator(*arguments, submit=self.submit_evaluation)
        )
        self.teacher_builder = TeacherBuilder(self.resolved, self.shared.teacher_cache, self.device, self.report)

    def report(self, event: BaseModel) -> None:
        """Write an event to the journal and pass it to the caller's callback, on rank 0."""
        if rank() == 0:
            self.journal(event)
            self.on_event(event)
            if self.sync:
                self.sync.push_async(immediately=isinstance(event, CheckpointWritten | RowMeasured))

    def remove_temporary_files(self) -> None:
        """Remove the temporary files of a killed process, and report how many stages are trained."""
        if trained := len(glob_stages(self.folder, TRAINING)):
            self.report(Note(text=f"{self.folder}: trained stages found: {trained}, the run resumes after them"))
        if rank() == 0:
            leftovers = [*self.folder.glob(TEMPORARY), *stages_folder(self.folder).glob(TEMPORARY)]
            for path in [*leftovers, *glob_stages(self.folder, TEMPORARY)]:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else remove_if_possible(path)

    def extra_texts(self, stage: int) -> list[str]:
        """Return the additional classes of a stage's task loss: class prompts of earlier tasks, and negative texts."""
        experiment, loss = self.resolved.experiment, self.resolved.experiment.method.task_loss
        assert loss is not None
        earlier = self.resolved.tasks[: stage - 1] if loss.earlier_names else ()
        texts = [prompt for task in earlier for prompt in task.prompts(task.templates[0])]
        if loss.negatives and self.resolved.reference:
            candidates = self.resolved.reference.texts
            generator = random.Random(derive_seed(experiment.seed, stage, "negatives"))
            texts += generator.sample(candidates, min(loss.negatives, len(candidates)))
        return texts

    def stage_folder(self, stage: int) -> Path:
        """Return the folder of a stage."""
        return stage_folder(self.folder, stage, self.resolved.tasks[stage - 1].name)

    def read_training(self, stage: int) -> str:
        """Read a stage's `training.json` on rank 0, if it exists, and broadcast it. All ranks must call this."""
        file = self.stage_folder(stage) / TRAINING
        return broadcast_text(read_text_if_exists(file, self.folder) if rank() == 0 else "")

    def select_exemplars(self, stage: int, clip: Clip) -> list[tuple[int, int]]:
        """Choose the exemplars of a stage's task by herding, best first, as many as a later stage can use at most.

        All ranks must call this.

        Args:
            stage: The stage's number, from 1.
            clip: The model after this stage.

        Returns:
            The choice of `choose_exemplars`; empty without a memory, or if no later stage exists.
        """
        experiment, task = self.resolved.experiment, self.resolved.tasks[stage - 1]
        if experiment.method.memory is None or stage == len(self.resolved.tasks):
            return []
        compute, precision = experiment.compute, experiment.optimisation.precision
        loader = build_loader(compute, self.device, self.report)
        encoded = encode_training_images(clip, task, loader, precision, compute.evaluation_batch_size)
        count = exemplars_per_class(experiment.method.memory.budget, stage, len(task.classnames))
        return choose_exemplars(*encoded, count)

    def train_or_reuse(self, stage: int, clip: Clip) -> None:
        """Train one stage, or link its folder from the cache if a run has trained it. All ranks must call this."""
        if self.cache is None:
            self.train(stage, clip)
            return
        key = self.cache.training_key(stage)
        with self.cache.lock(key, self.stop_requested, lambda text: self.report(Note(text=text))):
            if not self.cache.get(stage, self.stage_folder(stage)):
                self.train(stage, clip)

    def train(self, stage: int, clip: Clip) -> None:
        """Train one stage and write its folder. All ranks must call this."""
        experiment = self.resolved.experiment
        task, merge = experiment.tasks[stage - 1], experiment.method.merge
        start = start_model(self.resolved, self.folder, stage)
        self.report(StageStarted(stage=stage, task=task.name, steps=experiment.stage_steps(task)))
        extra_averages = self.cache.extra_averages(stage) if self.cache else ()
        with _explain_errors(start.name if stage > 1 else f"the initial one, {start.name}"):
            trained, steps = self._fit(stage, clip, extra_averages)
        if merge is not None:
            anchor = load_frozen(experiment.model if merge.anchor == "initial" else start, self.device)
            for model, _ in trained:
                interpolate(list(model.parameters()), list(anchor.parameters()), merge.share)
        exemplars = self.select_exemplars(stage, replace(clip, model=trained[0][0]))
        if rank() == 0:
            self.journal.flush()  # the journal must hold the events of a stage whose folder exists
            writers = [
                partial(self._write_stage, path, stage, clip, model, exemplars, result, steps)
                for path, (model, result) in zip(self._result_folders(stage, extra_averages), trained, strict=True)
            ]
            for write in reversed(writers):  # the run's own stage is written last
                retry_io(write, must_exist=self.folder, description=write.args[0])
            if self.cache:
                self.cache.put(stage, self.stage_folder(stage))
            remove_if_possible(self.folder / CHECKPOINT)
            if self.sync:
                self.sync.push()
        barrier()
        if self.sync and rank() > 0:
            self.sync.pull()

    def _fit(
        self, stage: int, clip: Clip, extra_averages: Averages
    ) -> tuple[list[tuple[nn.Module, StageResult]], list[StepLosses]]:
        """Train one stage; return a model and a result for each averaging setting, and the losses of all steps."""
        tasks = self.resolved.tasks
        exemplars = [exemplars_folder(self.folder, k, task.name) for k, task in enumerate(tasks[: stage - 1], start=1)]
        identities = [
            stage_identity(self.resolved, stage),
            *(stage_identity(self.resolved, stage, average) for average in extra_averages),
        ]
        trained, steps = train_stage(
            self.resolved.experiment,
            stage,
            tasks[stage - 1],
            clip,
            self.teacher_builder.build(stage, clip, exemplars),
            self.extra_texts(stage),
            self.device,
            self.report,
            checkpoint=self.folder / CHECKPOINT,
            snapshots=snapshots_folder(self.folder, stage, tasks[stage - 1].name),
            stop_requested=self.stop_requested,
            extra_averages=extra_averages,
            identity=identities[0],
        )
        return [
            (model, result.model_copy(update={"identity": identity}))
            for identity, (model, result) in zip(identities, trained, strict=True)
        ], steps

    def _result_folders(self, stage: int, extra_averages: Averages) -> list[Path]:
        """Return the stage's folder in this run, and its folders in the cache for other runs' averaging settings."""
        cache = self.cache
        return [
            self.stage_folder(stage),
            *(cache.folder_for_average(stage, average) for average in extra_averages if cache),
        ]

    def _write_stage(
        self,
        folder: Path,
        stage: int,
        clip: Clip,
        model: nn.Module,
        exemplars: list[tuple[int, int]],
        result: StageResult,
        steps: list[StepLosses],
    ) -> None:
        """Write a trained stage's folder atomically, unless it exists: workers that seemed lost may have written it."""
        if (folder / TRAINING).is_file():
            return
        with atomic_folder(folder) as temporary:
            clip.save(model, temporary / MODEL_FOLDER)
            if exemplars:
                write_exemplars(temporary / EXEMPLARS_FOLDER, self.resolved.tasks[stage - 1].train, exemplars)
            write_text(temporary / LOSSES, _losses_csv(steps))
            write_text(temporary / TRAINING, result.model_dump_json(indent=1) + "\n")

    def write_result(self, zero_shot: AccuracyRow, rows: list[dict[str, float]], stages: list[StageResult]) -> Result:
        """Assemble and write the run's result. All ranks must call this."""
        experiment, resolved, evaluator = self.resolved.experiment, self.resolved, self.evaluator
        matrix, untrained_matrix = (
            tuple(tuple(row[task.name] for task in resolved.tasks) for row in accuracies)
            for accuracies in (rows, evaluator.zero_shot_rows(zero_shot))
        )
        images = [zero_shot.images[task.name] for task in resolved.tasks] if evaluator.has_single_head else None
        baseline = tuple(zero_shot.accuracy[task.name] for task in resolved.tasks)
        result = Result(
            name=experiment.name,
            method=experiment.method.name,
            method_changes=experiment.method.changes,
            method_settings=experiment.method.settings,
            settings=experiment.settings | resolved.custom_loss_digests,
            model=experiment.model.name,
            model_digest=resolved.model_digest,
            seed=experiment.seed,
            fingerprint=resolved.fingerprint,
            algorithm=algorithm_version(),
            held_out=experiment.evaluation.held_out,
            tasks=tuple(
                TaskSummary(
                    name=task.name,
                    path=task.path,
                    digest=task.digest,
                    test_images=zero_shot.images[task.name],
                    broken_test_images=len(zero_shot.broken.get(task.name, ())),
                    split_family=task.split_family,
                )
                for task in resolved.tasks
            ),
            zero_shot=baseline,
            accuracy_matrix=matrix,
            metrics=compute_metrics(matrix, baseline, images),
            zero_shot_metrics=compute_metrics(untrained_matrix, baseline, images),
            stages=tuple(stages),
            reference_texts=len(resolved.reference.texts) if resolved.reference else 0,
            reference=resolved.reference.digest if resolved.reference else "",
            templates=experiment.evaluation.templates,
            workers=world_size(),
            device=_device_name(self.device),
            warnings=tuple([message for stage in stages for message in stage.warnings] + evaluator.warnings),
            train_seconds=sum(stage.train_seconds for stage in stages if not stage.shared),
            evaluation_seconds=evaluator.seconds,
            versions={library: importlib.metadata.version(library) for library in LIBRARIES},
        )
        barrier()
        if rank() == 0:
            self.journal.flush()
            write_json(self.folder / RESULT, result, within=self.folder)
            remove_if_possible(self.folder / CHECKPOINT)
        return result


@contextmanager
def _explain_errors(last_good_model: str) -> Iterator[None]:
    """Context manager: add advice to errors of a stage's training that other settings in the recipe can avoid."""
    try:
        yield
    except NotFiniteError as error:
        raise InputError(
            f"{error}; the last good model is {last_good_model}; a lower optimisation.learning_rate or "
            "optimisation.max_gradient_norm may help",
            code=error.code,
            field=error.field,
        ) from error
    except RuntimeError as error:
        if not has_no_deterministic_kernel(error):
            raise
        operation = str(error).partition(" does not have")[0]
        raise InputError(
            f"compute.deterministic: the model or a loss has an operation without a deterministic GPU "
            f"implementation ({operation}). Set compute.deterministic=false; results then differ by rounding "
            "errors between runs",
            code=ErrorCode.UNSUPPORTED,
            field="compute.deterministic",
        ) from error


def _losses_csv(steps: list[StepLosses]) -> str:
    """Return a CSV table with one column per loss; a cell is empty if its step does not have the loss."""
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
