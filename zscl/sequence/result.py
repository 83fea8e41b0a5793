"""The small files of a run's folder: rows of the matrix and outcomes of stages, read, checked and written."""

from pathlib import Path

from pydantic import BaseModel, Field

from schemas.algorithm import algorithm
from schemas.base import StrictModel, parse_json
from schemas.errors import InputError
from schemas.results import StageResult
from zscl.models.clip import WEIGHTS
from zscl.runtime.atomic_io import write_text
from zscl.runtime.retry import read_text_if_exists, retry_io
from zscl.sequence.layout import ACCURACY, TRAINING, ZERO_SHOT, partial_row_file, stage_folder_of
from zscl.sequence.resolve import ResolvedExperiment
from zscl.sequence.stage_cache import stage_identity
from zscl.training.checkpoint import CHECKPOINT

ROW_ADVICE = "remove the file, to have the row measured again"


STAGE_ADVICE = "remove the stage's folder and those of the stages behind it, to have them trained again"


class AccuracyRow(StrictModel):
    """`zero_shot.json`, `accuracy.json`: a row of the matrix and what it cost."""

    fingerprint: str
    algorithm: str = ""  # before there were versions
    accuracy: dict[str, float]
    images: dict[str, int]
    under_later_heads: dict[str, list[float]] = Field(default_factory=dict)
    broken: dict[str, list[str]] = Field(default_factory=dict)
    seconds: float


class OtherAlgorithmError(InputError):
    """A folder holds results of another version of the algorithm (see `schemas.algorithm`)."""


def describe_version(version: str) -> str:
    """Return a version of the algorithm as messages name it; empty stands for runs older than the versions."""
    return f"algorithm version {version}" if version else "an algorithm older than version 1.1"


def check_same_run(folder: Path, fingerprint: str) -> None:
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
                f"{folder}: found a run that was computed by {describe_version(row.algorithm)}, expected {describe_version(algorithm())}, "
                "which is what this version of zscl computes: the two may give different numbers. Choose another "
                "folder; the results there stay as they are, for `zscl compare` for example"
            )
        raise InputError(
            f"{folder}: found a run of another experiment (fingerprint {row.fingerprint}), expected {fingerprint} or "
            "an empty folder; choose another folder"
        )


def write_run_marker(folder: Path, fingerprint: str) -> None:
    """Say whose run a folder holds before anything else lies in it: a row may be measured long after training began."""
    row = _first_row(folder)
    if row is None or row.fingerprint != fingerprint:
        write_json(
            partial_row_file(folder / ZERO_SHOT),
            AccuracyRow(fingerprint=fingerprint, algorithm=algorithm(), accuracy={}, images={}, seconds=0.0),
        )


def _first_row(folder: Path) -> AccuracyRow | None:
    """The zero-shot row, or as much of it as is measured."""
    files = [file for file in (folder / ZERO_SHOT, partial_row_file(folder / ZERO_SHOT)) if file.is_file()]
    return parse_json(AccuracyRow, read_text_if_exists(files[0], folder), files[0], ROW_ADVICE) if files else None


def parse_row(opened: ResolvedExperiment, text: str, file: Path, whole: bool = True) -> AccuracyRow:
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


def parse_stage_result(opened: ResolvedExperiment, stage: int, text: str, file: Path) -> StageResult:
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


def check_run_folder(opened: ResolvedExperiment, folder: Path) -> None:
    """Read every small file that a run leaves, as far as it is there, before anything goes on from it.

    Raises:
        InputError: naming the first file that is damaged, missing beside others, or of another run.
    """
    finished = (folder / "result.json").is_file()  # its models may have been removed
    rows = [
        folder / ZERO_SHOT,
        *(stage_folder_of(opened, folder, k) / ACCURACY for k in range(1, len(opened.tasks) + 1)),
    ]
    for stage, row in enumerate(rows):
        for file, whole in ((row, True), (partial_row_file(row), False)):
            if text := read_text_if_exists(file, folder) if folder.is_dir() else "":
                parse_row(opened, text, file, whole)
        training = row.with_name(TRAINING)
        if stage and (text := read_text_if_exists(training, folder) if folder.is_dir() else ""):
            parse_stage_result(opened, stage, text, training)
            weights = row.parent / "model" / WEIGHTS
            if not finished and not weights.is_file():
                raise InputError(f"{weights}: found no such file, expected stage {stage}'s weights; {STAGE_ADVICE}")


def write_json(file: Path, content: BaseModel, within: Path | None = None) -> None:
    """Write JSON as a whole, when storage takes it; `within` is a folder that was there before."""
    retry_io(lambda: write_text(file, content.model_dump_json(indent=1) + "\n"), must_exist=within, what=file)
