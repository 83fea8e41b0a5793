"""The accuracy matrix, measured row by row and cell by cell; what is measured once is kept.

Task-aware, a task's images are told apart among its own classes; class-incremental, one head tells all classes seen
apart.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from pydantic import BaseModel, ValidationError

from schemas.algorithm import algorithm
from schemas.events import Note, RowMeasured, TaskEvaluated
from zscl.data.loader import build_loader
from zscl.data.task import TaskFolder
from zscl.evaluation.metrics import is_at_chance
from zscl.evaluation.zero_shot import accuracies, embed_classes, slice_head
from zscl.models.clip import Clip
from zscl.runtime.atomic_io import remove_quietly
from zscl.runtime.distributed import all_gather_unique, barrier, broadcast_ints, broadcast_text, rank
from zscl.runtime.retry import read_text_if_exists
from zscl.sequence.layout import ACCURACY, ZERO_SHOT, partial_row_file, stage_folder_of
from zscl.sequence.resolve import ResolvedExperiment
from zscl.sequence.result import AccuracyRow, parse_row, write_json
from zscl.sequence.stage_cache import StageCache
from zscl.training.checkpoint import StoppedError

Report = Callable[[BaseModel], None]


@dataclass
class MatrixEvaluator:
    """Measures a run's rows.

    seconds: that they took, those measured before an interruption included; warnings: sentences about failed stages.
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
        """Measure the model on every task, or read what was measured."""
        file = self.file(stage)
        row = self.read(file)
        if row is None and self.cache is not None:
            row = self._share(self.cache, stage, clip, file)
        self.accept(stage, row or self._measure(stage, clip, file))

    def file(self, stage: int) -> Path:
        """Where a stage's row lies; 0 is the zero-shot row."""
        return stage_folder_of(self.resolved, self.folder, stage) / ACCURACY if stage else self.folder / ZERO_SHOT

    def rows(self) -> list[AccuracyRow]:
        """The rows, in the order of their stages."""
        return [self.rows_by_stage[stage] for stage in sorted(self.rows_by_stage)]

    def accept(self, stage: int, row: AccuracyRow) -> None:
        """Take a row that is on disk, whole."""
        if rank() == 0:
            remove_quietly(partial_row_file(self.file(stage)))
        self.seconds += row.seconds
        self.rows_by_stage[stage] = row
        self.report(RowMeasured(stage=stage, accuracy=row.accuracy))
        if stage > 0:
            self._warn_if_at_chance(stage, row)

    def _share(self, store: StageCache, stage: int, clip: Clip, file: Path) -> AccuracyRow:
        """Measure a row, unless a run beside this one has measured the same."""
        key = store.row_key(stage)
        with store.lock(key, self.stop_requested, lambda text: self.report(Note(text=text))):
            if measured := store.get_row(key):
                ours = {"fingerprint": self.resolved.fingerprint, "seconds": 0.0}
                with suppress(ValidationError):  # of a damaged file, which is written again below
                    row = AccuracyRow.model_validate_json(measured).model_copy(update=ours)
                    if rank() == 0:
                        write_json(file, row, within=self.folder)
                    return row
            row = self._measure(stage, clip, file)
            if rank() == 0:
                store.put_row(key, row.model_dump_json(indent=1) + "\n")
            return row

    def _measure(self, stage: int, clip: Clip, file: Path) -> AccuracyRow:
        fingerprint = self.resolved.fingerprint
        nothing = AccuracyRow(fingerprint=fingerprint, algorithm=algorithm(), accuracy={}, images={}, seconds=0.0)
        row = self.read(partial_row_file(file), whole=False) or nothing
        started = time.perf_counter() - row.seconds
        unmeasured = [index for index, task in enumerate(self.resolved.tasks) if task.name not in row.accuracy]
        embedded = self._embed_classes(clip, unmeasured)
        for index in unmeasured:
            if broadcast_ints(rank() == 0 and self.stop_requested()) == [1]:
                raise StoppedError(f"stopped while the row of stage {stage} is measured")
            heads = [embedded[index]]
            if self.one_head:  # of all classes seen; untrained, the model is judged under those of every stage
                last = range(index, len(self.resolved.tasks)) if stage == 0 else [max(stage - 1, index)]
                heads = [slice_head(list(embedded.values()), index, until) for until in last]
            self._measure_cell(stage, clip, self.resolved.tasks[index], heads, row)
            row = row.model_copy(update={"seconds": time.perf_counter() - started})
            if rank() == 0:
                write_json(partial_row_file(file), row, within=self.folder)
        barrier()
        if rank() == 0:
            write_json(file, row, within=self.folder)
        return row

    def read(self, file: Path, whole: bool = True) -> AccuracyRow | None:
        """A row that is on disk, as the main worker sees it: what is there decides what all of them do.

        Raises:
            InputError: it is damaged, or of another run.
        """
        text = broadcast_text(read_text_if_exists(file, self.folder) if rank() == 0 else "")
        return parse_row(self.resolved, text, file, whole) if text else None

    def _embed_classes(self, clip: Clip, wanted: list[int]) -> dict[int, torch.Tensor]:
        """Class embeddings of the tasks with these numbers; where one head tells all classes apart, of all tasks."""
        experiment, tasks = self.resolved.experiment, self.resolved.tasks
        numbers = list(range(len(tasks))) if self.one_head else wanted
        precision, templates = experiment.optimisation.precision, experiment.evaluation.templates
        embedded = embed_classes(clip, [tasks[number] for number in numbers], templates, precision, self.device)
        return dict(zip(numbers, embedded, strict=True))

    def _measure_cell(
        self, stage: int, clip: Clip, task: TaskFolder, heads: list[torch.Tensor], row: AccuracyRow
    ) -> None:
        """Judge the model on one task, and add that to the row."""
        experiment, loader = (
            self.resolved.experiment,
            build_loader(self.resolved.experiment.compute, self.device, self.report),
        )
        precision, batch_size = experiment.optimisation.precision, experiment.compute.evaluation_batch_size
        found, images = accuracies(clip, task, heads, loader, precision=precision, batch_size=batch_size)
        row.accuracy[task.name], row.images[task.name] = found[0], images
        if len(found) > 1:
            row.under_later_heads[task.name] = found[1:]
        if skipped := all_gather_unique(loader.broken):
            row.broken[task.name] = skipped
        self.report(TaskEvaluated(stage=stage, task=task.name, accuracy=found[0], images=images))

    def _warn_if_at_chance(self, stage: int, row: AccuracyRow) -> None:
        """Warn of a task that the model is at chance on right after its training, no better than the initial model."""
        tasks = self.resolved.tasks
        task = tasks[stage - 1]
        classes = sum(len(each.classnames) for each in (tasks[:stage] if self.one_head else [task]))
        accuracy, images = row.accuracy[task.name], row.images[task.name]
        better = 0 in self.rows_by_stage and accuracy > self.rows_by_stage[0].accuracy[task.name]
        if is_at_chance(accuracy, classes, images) and not better:
            self._warn(
                f"stage {stage} {task.name}: found an accuracy of {100 * accuracy:.1f} on {images} images right after "
                f"training it, which cannot be told from guessing among {classes} classes ({100 / classes:.1f}); "
                "look at its losses: more steps or another learning rate may help, or more test images tell more"
            )

    def _warn(self, sentence: str) -> None:
        self.warnings.append(sentence)
        self.report(Note(text=f"warning: {sentence}"))

    @property
    def one_head(self) -> bool:
        """Whether all classes seen are told apart at once (class-incremental), or each task's own (task-aware)."""
        return self.resolved.experiment.class_incremental is not None

    def untrained(self, zero_shot: AccuracyRow) -> list[dict[str, float]]:
        """The initial model's accuracies after each stage, under the heads of that stage."""
        names = [task.name for task in self.resolved.tasks]
        return [
            {
                name: [zero_shot.accuracy[name], *zero_shot.under_later_heads.get(name, ())][
                    max(stage - index, 0) if self.one_head else 0
                ]
                for index, name in enumerate(names)
            }
            for stage in range(len(names))
        ]
