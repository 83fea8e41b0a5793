"""The accuracy matrix, measured row by row and cell by cell; what is measured once is kept.

Task-aware, a task's images are told apart among its own classes; class-incremental, one head tells all classes seen
apart.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from pydantic import BaseModel, Field, ValidationError

from schemas.algorithm import algorithm
from schemas.base import Strict, parse_json
from schemas.errors import InputError
from schemas.events import Note, RowMeasured, TaskEvaluated
from schemas.results import StageResult
from zscl.data.loader import loader_of
from zscl.data.task import TaskFolder
from zscl.evaluation.metrics import at_chance
from zscl.evaluation.zero_shot import accuracies, embed_classes, head
from zscl.models.clip import WEIGHTS, Clip
from zscl.runtime.atomic_io import remove, write_text
from zscl.runtime.distributed import agree, barrier, from_main_text, gather_sentences, rank
from zscl.runtime.retry import patiently, read_if_there
from zscl.sequence.resolve import Opened
from zscl.sequence.stage_cache import TRAINING, StageStore, stage_identity
from zscl.training.checkpoint import CHECKPOINT, StoppedError

Report = Callable[[BaseModel], None]
ZERO_SHOT, ACCURACY = "zero_shot.json", "accuracy.json"
MOST_BEHIND = 2  # rows that training may be ahead of
LOOK_EVERY_SECONDS = 0.5


ROW_ADVICE = "remove the file, to have the row measured again"
STAGE_ADVICE = "remove the stage's folder and those of the stages behind it, to have them trained again"


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
    return parse_json(AccuracyRow, read_if_there(files[0], folder), files[0], ROW_ADVICE) if files else None


def stage_files(run: Path, name: str) -> list[Path]:
    """List a file of every stage of a run that has one, in the order of the stages.

    Args:
        run: the run's folder.
        name: the file's, in a stage's folder.

    Raises:
        InputError: a folder is not called as a stage is, or one before it is missing.
    """
    found: dict[int, Path] = {}
    for file in run.glob(f"stages/[!.]*/{name}"):
        number = file.parent.name.partition("-")[0]
        if not (number.isascii() and number.isdecimal()) or int(number) in found:
            raise InputError(f"{file.parent}: found it among the stages, expected one folder <number>-<task> for each")
        found[int(number)] = file
    for expected, stage in enumerate(sorted(found), start=1):
        if expected != stage:
            raise InputError(f"{found[stage].parent}: found stage {stage} and no stage {expected}, expected both")
    return [found[stage] for stage in sorted(found)]


def parsed_row(opened: Opened, text: str, file: Path, whole: bool = True) -> AccuracyRow:
    """Read a row of this run.

    Args:
        opened: the run's experiment.
        text: the file's content.
        file: for the sentence.
        whole: expect every task in it.

    Raises:
        InputError: it is damaged, or of another run.
    """
    row = parse_json(AccuracyRow, text, file, ROW_ADVICE)
    if row.fingerprint != opened.fingerprint:
        raise InputError(
            f"{file}: found the row of another run (fingerprint {row.fingerprint}), expected {opened.fingerprint}; "
            f"where the whole folder was copied from there, remove it, to have the stage done again; else {ROW_ADVICE}"
        )
    names = {task.name for task in opened.tasks}
    measured = row.accuracy.keys() & row.images.keys()
    if unknown := (row.accuracy.keys() | row.images.keys()) - names:
        raise InputError(f"{file}: found the task {min(unknown)!r}, which the run does not have; {ROW_ADVICE}")
    if whole and (missing := names - measured):
        raise InputError(f"{file}: found no accuracy on the task {min(missing)!r}, expected one on each; {ROW_ADVICE}")
    return row


def parsed_training(opened: Opened, stage: int, text: str, file: Path) -> StageResult:
    """Read the outcome of a stage of this run.

    Args:
        opened: the run's experiment.
        stage: which stage, from 1.
        text: the file's content.
        file: for the sentence.

    Raises:
        InputError: it is damaged, or of another run's stage.
    """
    result = parse_json(StageResult, text, file, STAGE_ADVICE)
    task = opened.experiment.tasks[stage - 1]
    expected: dict[str, tuple[object, object]] = {
        "stage": (result.stage, stage),
        "task": (result.task, task.name),
        "steps": (result.steps, opened.experiment.stage_steps(task)),
    }
    if result.identity:  # older runs left none
        expected["identity"] = (result.identity, stage_identity(opened, stage))
    for name, (found, wanted) in expected.items():
        if found != wanted:
            raise InputError(
                f"{file}: found {name} {found}, expected {wanted}: the stage was trained by another run; {STAGE_ADVICE}"
            )
    return result


def check_run_folder(opened: Opened, folder: Path) -> None:
    """Read every small file that a run leaves, as far as it is there, before anything goes on from it.

    Raises:
        InputError: naming the first file that is damaged, missing beside others, or of another run.
    """
    finished = (folder / "result.json").is_file()  # its models may have been removed
    rows = [folder / ZERO_SHOT, *(place_of(opened, folder, k) / ACCURACY for k in range(1, len(opened.tasks) + 1))]
    for stage, row in enumerate(rows):
        for file, whole in ((row, True), (part_of(row), False)):
            if text := read_if_there(file, folder) if folder.is_dir() else "":
                parsed_row(opened, text, file, whole)
        training = row.with_name(TRAINING)
        if stage and (text := read_if_there(training, folder) if folder.is_dir() else ""):
            parsed_training(opened, stage, text, training)
            weights = row.parent / "model" / WEIGHTS
            if not finished and not weights.is_file():
                raise InputError(f"{weights}: found no such file, expected stage {stage}'s weights; {STAGE_ADVICE}")


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
                with suppress(ValidationError):  # of a damaged file, which is written again below
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
        row = self.read(part_of(file), whole=False) or nothing
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

    def read(self, file: Path, whole: bool = True) -> AccuracyRow | None:
        """A row that is on disk, as the main worker sees it: what is there decides what all of them do.

        Raises:
            InputError: it is damaged, or of another run.
        """
        text = from_main_text(read_if_there(file, self.folder) if rank() == 0 else "")
        return parsed_row(self.opened, text, file, whole) if text else None

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
