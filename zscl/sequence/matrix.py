"""The accuracy matrix: a row holds the accuracies of the model after one stage on every task.

Complete rows are saved in files, and so is an incomplete row after each task, so that evaluation can resume.

In task-aware evaluation, a task's images are classified among the task's own classes. In class-incremental evaluation,
a single head classifies among all classes seen so far.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from pydantic import BaseModel, ValidationError

from schemas.algorithm import algorithm_version
from schemas.events import Note, RowMeasured, TaskEvaluated
from zscl.data.loader import build_loader
from zscl.data.task import TaskFolder
from zscl.evaluation.metrics import is_at_chance
from zscl.evaluation.zero_shot import compute_accuracies, embed_classes, slice_head
from zscl.models.clip import Clip
from zscl.runtime.atomic_io import remove_if_possible
from zscl.runtime.distributed import all_gather_unique, barrier, broadcast_ints, broadcast_text, rank
from zscl.runtime.retry import read_text_if_exists
from zscl.sequence.layout import partial_row_file, row_file
from zscl.sequence.resolve import ResolvedExperiment
from zscl.sequence.result import AccuracyRow, parse_row, write_json
from zscl.sequence.stage_cache import StageCache
from zscl.training.checkpoint import StoppedError

Report = Callable[[BaseModel], None]


@dataclass
class MatrixEvaluator:
    """Evaluates the rows of a run's accuracy matrix.

    Attributes:
        resolved: The run's experiment.
        folder: The run's folder.
        report: Callback for events.
        device: The device to evaluate on.
        stop_requested: Returns whether the run should stop; called on rank 0 between cells.
        cache: The cache of rows that several runs share; `None` if this run shares none.
        seconds: The time that the evaluation of all rows took, including rows that an interrupted process evaluated.
        warnings: Warnings about stages after which the accuracy is at chance.
        rows_by_stage: The complete rows; stage 0 is the initial model.
    """

    resolved: ResolvedExperiment
    folder: Path
    report: Report
    device: torch.device
    stop_requested: Callable[[], bool]
    cache: StageCache | None = None
    seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)
    rows_by_stage: dict[int, AccuracyRow] = field(default_factory=dict)

    def measure(self, stage: int, clip: Clip) -> None:
        """Evaluate a stage's model on every task, or read the stage's row from its file or the cache.

        All ranks must call this.

        Args:
            stage: The row's stage; 0 is the initial model.
            clip: The model after this stage.
        """
        file = self.row_file(stage)
        row = self.read_row(file)
        if row is None and self.cache is not None:
            row = self._read_or_measure(self.cache, stage, clip, file)
        self.accept(stage, row or self._measure_row(stage, clip, file))

    def row_file(self, stage: int) -> Path:
        """Return the file of a stage's row; stage 0 is the zero-shot row."""
        return row_file(self.folder, stage, self.resolved.tasks[stage - 1].name)

    def rows(self) -> list[AccuracyRow]:
        """Return the complete rows in the order of their stages."""
        return [self.rows_by_stage[stage] for stage in sorted(self.rows_by_stage)]

    def accept(self, stage: int, row: AccuracyRow) -> None:
        """Add a complete row, which is already saved in its file, to the matrix, and report it."""
        if rank() == 0:
            remove_if_possible(partial_row_file(self.row_file(stage)))
        self.seconds += row.seconds
        self.rows_by_stage[stage] = row
        self.report(RowMeasured(stage=stage, accuracy=row.accuracy))
        if stage > 0:
            self._warn_if_at_chance(stage, row)

    def _read_or_measure(self, cache: StageCache, stage: int, clip: Clip, file: Path) -> AccuracyRow:
        """Read a row from the cache, or evaluate it and add it to the cache."""
        key = cache.row_key(stage)
        with cache.lock(key, self.stop_requested, lambda text: self.report(Note(text=text))):
            if cached := cache.get_row(key):
                changes = {"fingerprint": self.resolved.fingerprint, "seconds": 0.0}
                with suppress(ValidationError):  # a damaged file is replaced below
                    row = AccuracyRow.model_validate_json(cached).model_copy(update=changes)
                    if rank() == 0:
                        write_json(file, row, within=self.folder)
                    return row
            row = self._measure_row(stage, clip, file)
            if rank() == 0:
                cache.put_row(key, row.model_dump_json(indent=1) + "\n")
            return row

    def _measure_row(self, stage: int, clip: Clip, file: Path) -> AccuracyRow:
        """Evaluate the model on the tasks that are missing in the incomplete row's file, and write the complete row."""
        row = self.read_row(partial_row_file(file), complete=False) or AccuracyRow(
            fingerprint=self.resolved.fingerprint, algorithm=algorithm_version(), accuracy={}, images={}, seconds=0.0
        )
        started = time.perf_counter() - row.seconds
        missing = [index for index, task in enumerate(self.resolved.tasks) if task.name not in row.accuracy]
        embedded = self._embed_classes(clip, missing)
        for index in missing:
            if broadcast_ints(rank() == 0 and self.stop_requested()) == [1]:
                raise StoppedError(f"stopped while the row of stage {stage} is measured")
            heads = [embedded[index]]
            if self.has_single_head:  # the initial model is evaluated with the heads of all stages
                last_tasks = range(index, len(self.resolved.tasks)) if stage == 0 else [max(stage - 1, index)]
                heads = [slice_head(list(embedded.values()), index, last) for last in last_tasks]
            self._measure_cell(stage, clip, self.resolved.tasks[index], heads, row)
            row = row.model_copy(update={"seconds": time.perf_counter() - started})
            if rank() == 0:
                write_json(partial_row_file(file), row, within=self.folder)
        barrier()
        if rank() == 0:
            write_json(file, row, within=self.folder)
        return row

    def read_row(self, file: Path, complete: bool = True) -> AccuracyRow | None:
        """Read a row's file on rank 0 and broadcast it, so that all ranks take the same decisions.

        All ranks must call this.

        Args:
            file: The row's file.
            complete: Whether the row must contain all tasks.

        Returns:
            The row; `None` if there is no file.

        Raises:
            InputError: The file is damaged, or belongs to another run.
        """
        text = broadcast_text(read_text_if_exists(file, self.folder) if rank() == 0 else "")
        return parse_row(self.resolved, text, file, complete) if text else None

    def _embed_classes(self, clip: Clip, indices: list[int]) -> dict[int, torch.Tensor]:
        """Compute the class embeddings of the tasks at `indices` (with a single head, of all tasks), by index."""
        experiment, tasks = self.resolved.experiment, self.resolved.tasks
        indices = list(range(len(tasks))) if self.has_single_head else indices
        precision, templates = experiment.optimisation.precision, experiment.evaluation.templates
        embedded = embed_classes(clip, [tasks[index] for index in indices], templates, precision, self.device)
        return dict(zip(indices, embedded, strict=True))

    def _measure_cell(
        self, stage: int, clip: Clip, task: TaskFolder, heads: list[torch.Tensor], row: AccuracyRow
    ) -> None:
        """Evaluate the model on one task with the given heads (class embeddings), and add the accuracies to the row."""
        experiment = self.resolved.experiment
        loader = build_loader(experiment.compute, self.device, self.report)
        precision, batch_size = experiment.optimisation.precision, experiment.compute.evaluation_batch_size
        accuracy, images = compute_accuracies(clip, task, heads, loader, precision=precision, batch_size=batch_size)
        row.accuracy[task.name], row.images[task.name] = accuracy[0], images
        if len(accuracy) > 1:
            row.under_later_heads[task.name] = accuracy[1:]
        if skipped := all_gather_unique(loader.broken_samples):
            row.broken[task.name] = skipped
        self.report(TaskEvaluated(stage=stage, task=task.name, accuracy=accuracy[0], images=images))

    def _warn_if_at_chance(self, stage: int, row: AccuracyRow) -> None:
        """Warn if the accuracy right after training a task is at chance and not above that of the initial model."""
        tasks = self.resolved.tasks
        task = tasks[stage - 1]
        classes = sum(len(seen.classnames) for seen in (tasks[:stage] if self.has_single_head else [task]))
        accuracy, images = row.accuracy[task.name], row.images[task.name]
        is_better = 0 in self.rows_by_stage and accuracy > self.rows_by_stage[0].accuracy[task.name]
        if is_at_chance(accuracy, classes, images) and not is_better:
            self._warn(
                f"stage {stage} {task.name}: the accuracy right after training is {100 * accuracy:.1f} on {images} "
                f"images, which is not clearly above guessing among {classes} classes ({100 / classes:.1f}); check the "
                "losses. More steps or another learning rate may help; more test images give a clearer result"
            )

    def _warn(self, message: str) -> None:
        self.warnings.append(message)
        self.report(Note(text=f"warning: {message}"))

    @property
    def has_single_head(self) -> bool:
        """Whether one head classifies among all classes seen (class-incremental) instead of one head per task."""
        return self.resolved.experiment.class_incremental is not None

    def zero_shot_rows(self, zero_shot: AccuracyRow) -> list[dict[str, float]]:
        """Compute the accuracy matrix of a run without training: the initial model with the heads of each stage.

        Args:
            zero_shot: The row of the initial model.

        Returns:
            One row per stage, with the tasks as keys.
        """
        names = [task.name for task in self.resolved.tasks]
        return [
            {
                name: [zero_shot.accuracy[name], *zero_shot.under_later_heads.get(name, ())][
                    max(stage - index, 0) if self.has_single_head else 0
                ]
                for index, name in enumerate(names)
            }
            for stage in range(len(names))
        ]
