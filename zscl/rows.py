"""The accuracy matrix, measured row by row and cell by cell; what is measured once is kept.

Task-aware, a task's images are told apart among its own classes; class-incremental, one head tells all classes seen
apart.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from pydantic import BaseModel, Field

from schemas.algorithm import algorithm
from schemas.base import InputError, Strict
from schemas.results import Note, RowMeasured, TaskEvaluated
from zscl.checkpoint import CHECKPOINT, StoppedError
from zscl.distributed import agree, barrier, from_main_text, gather_sentences, rank
from zscl.evaluation import accuracies, embed_classes, head
from zscl.files import patiently, read_if_there, remove, write_text
from zscl.metrics import at_chance
from zscl.model import Clip
from zscl.opened import Opened
from zscl.stages import TRAINING, StageStore
from zscl.tasks import TaskFolder
from zscl.training import loader_of

Report = Callable[[BaseModel], None]
ZERO_SHOT, ACCURACY = "zero_shot.json", "accuracy.json"
MOST_BEHIND = 2  # rows that training may be ahead of
LOOK_EVERY_SECONDS = 0.5


class AccuracyRow(Strict):
    """`zero_shot.json`, `accuracy.json`: a row of the matrix and what it cost."""

    fingerprint: str
    algorithm: str = ""  # before there were versions
    accuracy: dict[str, float]
    images: dict[str, int]
    under_later_heads: dict[str, list[float]] = Field(default_factory=dict)
    broken: dict[str, list[str]] = Field(default_factory=dict)
    seconds: float


def part_of(row: Path) -> Path:
    """Where a row is kept while its cells are measured."""
    return row.with_suffix(".part.json")


def place_of(opened: Opened, folder: Path, stage: int) -> Path:
    """A stage's folder in that of its run."""
    return stage_folder(folder, stage, opened.tasks[stage - 1].name)


def stage_folder(run: Path, stage: int, task: str) -> Path:
    """The folder of a stage, counted from 1, that trains a task, in that of its run."""
    return run / "stages" / f"{stage}-{task}"


def model_folder(run: Path, stage: int, task: str) -> Path:
    """Where the model lies that such a stage hands on, as open_clip's `local-dir:` reads it."""
    return stage_folder(run, stage, task) / "model"


class OtherAlgorithmError(InputError):
    """A folder holds results of another version of the algorithm (see `schemas.algorithm`)."""


def named(version: str) -> str:
    """Return a version of the algorithm as messages name it; empty stands for runs older than the versions."""
    return f"algorithm version {version}" if version else "an algorithm older than version 1.1"


def refuse_other_run(folder: Path, fingerprint: str) -> None:
    """Refuse to mix two experiments in one folder; one that has come to nothing yet may be taken.

    Raises:
        OtherAlgorithmError: the folder holds a run that another version of the algorithm computed.
        InputError: the folder holds a run of another experiment.
    """
    row = _first_row(folder)
    if row is None or row.fingerprint == fingerprint:
        return
    kept = (folder / ZERO_SHOT, folder / CHECKPOINT, *folder.glob(f"stages/*/{TRAINING}"))
    if row.accuracy or any(file.is_file() for file in kept):
        if row.algorithm != algorithm():
            raise OtherAlgorithmError(
                f"{folder}: found a run that was computed by {named(row.algorithm)}, expected {named(algorithm())}, "
                "which is what this version of zscl computes: the two may give different numbers. Choose another "
                "folder; the results there stay as they are, for `zscl compare` for example"
            )
        raise InputError(
            f"{folder}: found a run of another experiment (fingerprint {row.fingerprint}), expected {fingerprint} or "
            "an empty folder; choose another folder"
        )


def claim(folder: Path, fingerprint: str) -> None:
    """Say whose run a folder holds before anything else lies in it: a row may be measured long after training began."""
    row = _first_row(folder)
    if row is None or row.fingerprint != fingerprint:
        write_whole(
            part_of(folder / ZERO_SHOT),
            AccuracyRow(fingerprint=fingerprint, algorithm=algorithm(), accuracy={}, images={}, seconds=0.0),
        )


def _first_row(folder: Path) -> AccuracyRow | None:
    """The zero-shot row, or as much of it as is measured."""
    files = [file for file in (folder / ZERO_SHOT, part_of(folder / ZERO_SHOT)) if file.is_file()]
    return AccuracyRow.model_validate_json(files[0].read_text()) if files else None


@dataclass
class Rows:
    """Measures a run's rows.

    seconds: that they took, those measured before an interruption included; warnings: sentences about failed stages.
    """

    opened: Opened
    folder: Path
    report: Report
    device: torch.device
    asked_to_stop: Callable[[], bool]
    store: StageStore | None = None
    seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)
    found: dict[int, AccuracyRow] = field(default_factory=dict)

    def measure(self, stage: int, clip: Clip) -> None:
        """Measure the model on every task, or read what was measured."""
        file = self.file(stage)
        row = self.read(file)
        if row is None and self.store is not None:
            row = self._share(self.store, stage, clip, file)
        self.take(stage, row or self._measure(stage, clip, file))

    def file(self, stage: int) -> Path:
        """Where a stage's row lies; 0 is the zero-shot row."""
        return place_of(self.opened, self.folder, stage) / ACCURACY if stage else self.folder / ZERO_SHOT

    def measured(self) -> list[AccuracyRow]:
        """The rows, in the order of their stages."""
        return [self.found[stage] for stage in sorted(self.found)]

    def take(self, stage: int, row: AccuracyRow) -> None:
        """Take a row that is on disk, whole."""
        if rank() == 0:
            remove(part_of(self.file(stage)))
        self.seconds += row.seconds
        self.found[stage] = row
        self.report(RowMeasured(stage=stage, accuracy=row.accuracy))
        if stage > 0:
            self._doubt(stage, row)

    def _share(self, store: StageStore, stage: int, clip: Clip, file: Path) -> AccuracyRow:
        """Measure a row, unless a run beside this one has measured the same."""
        key = store.row(stage)
        with store.alone(key, self.asked_to_stop, lambda text: self.report(Note(text=text))):
            if measured := store.read_row(key):
                ours = {"fingerprint": self.opened.fingerprint, "seconds": 0.0}
                row = AccuracyRow.model_validate_json(measured).model_copy(update=ours)
                if rank() == 0:
                    write_whole(file, row, within=self.folder)
                return row
            row = self._measure(stage, clip, file)
            if rank() == 0:
                store.keep_row(key, row.model_dump_json(indent=1) + "\n")
            return row

    def _measure(self, stage: int, clip: Clip, file: Path) -> AccuracyRow:
        fingerprint = self.opened.fingerprint
        nothing = AccuracyRow(fingerprint=fingerprint, algorithm=algorithm(), accuracy={}, images={}, seconds=0.0)
        row = self.read(part_of(file)) or nothing
        started = time.perf_counter() - row.seconds
        unmeasured = [index for index, task in enumerate(self.opened.tasks) if task.name not in row.accuracy]
        embedded = self._embed_classes(clip, unmeasured)
        for index in unmeasured:
            if agree(rank() == 0 and self.asked_to_stop()) == [1]:
                raise StoppedError(f"stopped while the row of stage {stage} is measured")
            heads = [embedded[index]]
            if self.one_head:  # of all classes seen; untrained, the model is judged under those of every stage
                last = range(index, len(self.opened.tasks)) if stage == 0 else [max(stage - 1, index)]
                heads = [head(list(embedded.values()), index, until) for until in last]
            self._measure_cell(stage, clip, self.opened.tasks[index], heads, row)
            row = row.model_copy(update={"seconds": time.perf_counter() - started})
            if rank() == 0:
                write_whole(part_of(file), row, within=self.folder)
        barrier()
        if rank() == 0:
            write_whole(file, row, within=self.folder)
        return row

    def read(self, file: Path) -> AccuracyRow | None:
        """A row that is on disk, as the main worker sees it: what is there decides what all of them do."""
        text = from_main_text(read_if_there(file, self.folder) if rank() == 0 else "")
        return AccuracyRow.model_validate_json(text) if text else None

    def _embed_classes(self, clip: Clip, wanted: list[int]) -> dict[int, torch.Tensor]:
        """Class embeddings of the tasks with these numbers; where one head tells all classes apart, of all tasks."""
        experiment, tasks = self.opened.experiment, self.opened.tasks
        numbers = list(range(len(tasks))) if self.one_head else wanted
        precision, templates = experiment.optimisation.precision, experiment.evaluation.templates
        embedded = embed_classes(clip, [tasks[number] for number in numbers], templates, precision, self.device)
        return dict(zip(numbers, embedded, strict=True))

    def _measure_cell(
        self, stage: int, clip: Clip, task: TaskFolder, heads: list[torch.Tensor], row: AccuracyRow
    ) -> None:
        """Judge the model on one task, and add that to the row."""
        experiment, loader = self.opened.experiment, loader_of(self.opened.experiment.compute, self.device, self.report)
        precision, batch_size = experiment.optimisation.precision, experiment.compute.evaluation_batch_size
        found, images = accuracies(clip, task, heads, loader, precision=precision, batch_size=batch_size)
        row.accuracy[task.name], row.images[task.name] = found[0], images
        if len(found) > 1:
            row.under_later_heads[task.name] = found[1:]
        if skipped := gather_sentences(loader.broken):
            row.broken[task.name] = skipped
        self.report(TaskEvaluated(stage=stage, task=task.name, accuracy=found[0], images=images))

    def _doubt(self, stage: int, row: AccuracyRow) -> None:
        """Warn of a task that the model is at chance on right after its training, no better than the initial model."""
        tasks = self.opened.tasks
        task = tasks[stage - 1]
        classes = sum(len(each.classnames) for each in (tasks[:stage] if self.one_head else [task]))
        accuracy, images = row.accuracy[task.name], row.images[task.name]
        better = 0 in self.found and accuracy > self.found[0].accuracy[task.name]
        if at_chance(accuracy, classes, images) and not better:
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


class Handle(Protocol):
    """Something that goes on elsewhere: a `concurrent.futures.Future`, say."""

    def done(self) -> bool:
        """Whether it has ended."""

    def result(self) -> object:
        """Wait for its end, and raise what it failed with."""


Elsewhere = Callable[[int], Handle]


@dataclass
class RowsElsewhere(Rows):
    """Rows that are measured elsewhere while training goes on; it is never more than a few of them ahead.

    elsewhere: begins to measure a stage's row, which will lie in the run's folder; called on the main worker.
    """

    elsewhere: Elsewhere | None = None
    _under_way: dict[int, Handle | None] = field(default_factory=dict)

    def measure(self, stage: int, clip: Clip) -> None:
        """Have the row measured, unless it is there; take those that have come in meanwhile."""
        row = self.read(self.file(stage))
        if row is not None:
            self.take(stage, row)
            return
        assert self.elsewhere is not None
        self._under_way[stage] = self.elsewhere(stage) if rank() == 0 else None
        self._collect(most=MOST_BEHIND)

    def measured(self) -> list[AccuracyRow]:
        """Wait for the rows; in the order of their stages."""
        self._collect(most=0)
        return super().measured()

    def _collect(self, most: int) -> None:
        """Take what has come in, in order, and wait until at most so many rows are missing."""
        for stage in list(self._under_way):
            while not self._there(stage):
                if len(self._under_way) <= most:
                    return
                time.sleep(LOOK_EVERY_SECONDS)
            row = self.read(self.file(stage))
            if row is None:
                raise OSError(f"{self.file(stage)}: found no such file, expected the row that was measured elsewhere")
            del self._under_way[stage]
            self.take(stage, row)

    def _there(self, stage: int) -> bool:
        """Whether a row has come in, as all workers agree.

        Raises:
            StoppedError: the run was asked to stop.
            Exception: what the measuring failed with.
        """
        handle = self._under_way[stage]  # the main worker's
        there = handle is not None and handle.done()
        if handle is not None and there:
            handle.result()
        there, stop = map(bool, agree(there, not there and rank() == 0 and self.asked_to_stop()))
        if stop:
            raise StoppedError(f"stopped while the row of stage {stage} is measured")
        return there


def write_whole(file: Path, content: BaseModel, within: Path | None = None) -> None:
    """Write JSON as a whole, when storage takes it; `within` is a folder that was there before."""
    patiently(lambda: write_text(file, content.model_dump_json(indent=1) + "\n"), within=within, what=file)
