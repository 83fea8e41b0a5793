"""The JSON files of a run's folder: accuracy rows and stage results, with checks that they belong to the run."""

from pathlib import Path

from pydantic import BaseModel, Field

from schemas.algorithm import algorithm_version
from schemas.base import StrictModel, parse_json
from schemas.errors import ErrorCode, InputError
from schemas.results import StageResult
from zscl.models.clip import WEIGHTS
from zscl.runtime.atomic_io import write_text
from zscl.runtime.retry import read_text_if_exists, retry_io
from zscl.sequence.layout import (
    CHECKPOINT,
    MODEL_FOLDER,
    RESULT,
    TRAINING,
    ZERO_SHOT,
    glob_stages,
    partial_row_file,
    row_file,
)
from zscl.sequence.resolve import ResolvedExperiment
from zscl.sequence.stage_cache import stage_identity

ROW_ADVICE = "delete the file, and the row is evaluated again"
STAGE_ADVICE = "delete the folders of this stage and of later stages, and they are trained again"


class AccuracyRow(StrictModel):
    """A row of the accuracy matrix: the accuracies of one stage's model on every task.

    It is the content of `zero_shot.json` and `accuracy.json`.

    Attributes:
        fingerprint: The run's fingerprint.
        algorithm: Version of the algorithm; empty in runs that are older than version 1.1.
        accuracy: Accuracy in [0, 1] by task.
        images: Number of test images by task.
        under_later_heads: The initial model's accuracies with the heads of later stages, by task (class-incremental).
        broken: Messages about skipped test images, by task.
        seconds: The time that the evaluation took.
    """

    fingerprint: str
    algorithm: str = ""
    accuracy: dict[str, float]
    images: dict[str, int]
    under_later_heads: dict[str, list[float]] = Field(default_factory=dict)
    broken: dict[str, list[str]] = Field(default_factory=dict)
    seconds: float


class OtherAlgorithmError(InputError):
    """A folder holds results of another version of the algorithm (see `schemas.algorithm`)."""


def describe_algorithm(version: str) -> str:
    """Return the name of a version of the algorithm for messages. Runs before version 1.1 have an empty version."""
    return f"algorithm version {version}" if version else "an algorithm older than version 1.1"


def check_same_run(folder: Path, fingerprint: str) -> None:
    """Check that a folder holds no results of another run. A run without any result may be replaced.

    Args:
        folder: The run's folder.
        fingerprint: The run's fingerprint.

    Raises:
        OtherAlgorithmError: The folder holds a run of another version of the algorithm.
        InputError: The folder holds a run of another experiment.
    """
    row = _first_row(folder)
    if row is None or row.fingerprint == fingerprint:
        return
    results = (folder / ZERO_SHOT, folder / CHECKPOINT, *glob_stages(folder, TRAINING))
    if row.accuracy or any(file.is_file() for file in results):
        if row.algorithm != algorithm_version():
            raise OtherAlgorithmError(
                f"{folder}: found a run of {describe_algorithm(row.algorithm)}, expected "
                f"{describe_algorithm(algorithm_version())}, which this version of zscl uses. The results may differ. "
                "Choose another folder. The existing results stay usable, for example for `zscl compare`",
                code=ErrorCode.OTHER_ALGORITHM,
            )
        raise InputError(
            f"{folder}: found a run of another experiment (fingerprint {row.fingerprint}), expected {fingerprint} or "
            "an empty folder; choose another folder",
            code=ErrorCode.OTHER_RUN,
        )


def write_run_marker(folder: Path, fingerprint: str) -> None:
    """Record which run uses a folder: write a zero-shot row with the run's fingerprint, but without accuracies."""
    row = _first_row(folder)
    if row is None or row.fingerprint != fingerprint:
        write_json(
            partial_row_file(folder / ZERO_SHOT),
            AccuracyRow(fingerprint=fingerprint, algorithm=algorithm_version(), accuracy={}, images={}, seconds=0.0),
        )


def _first_row(folder: Path) -> AccuracyRow | None:
    """Read the complete or incomplete zero-shot row of a run; `None` if there is none."""
    files = [file for file in (folder / ZERO_SHOT, partial_row_file(folder / ZERO_SHOT)) if file.is_file()]
    return parse_json(AccuracyRow, read_text_if_exists(files[0], folder), files[0], ROW_ADVICE) if files else None


def parse_row(resolved: ResolvedExperiment, text: str, file: Path, complete: bool = True) -> AccuracyRow:
    """Parse a row of a run's accuracy matrix, and check that it belongs to the run.

    Args:
        resolved: The run's experiment.
        text: The file's content.
        file: The file, for messages.
        complete: Whether the row must contain all tasks.

    Returns:
        The row.

    Raises:
        InputError: The content is damaged, or belongs to another run.
    """
    row = parse_json(AccuracyRow, text, file, ROW_ADVICE)
    if row.fingerprint != resolved.fingerprint:
        raise InputError(
            f"{file}: found accuracies of another run (fingerprint {row.fingerprint}), expected "
            f"{resolved.fingerprint}. If the stage's folder was copied from that run, delete it, and the stage is "
            f"trained again; otherwise {ROW_ADVICE}",
            code=ErrorCode.OTHER_RUN,
        )
    names = {task.name for task in resolved.tasks}
    measured = row.accuracy.keys() & row.images.keys()
    if unknown := (row.accuracy.keys() | row.images.keys()) - names:
        raise InputError(
            f"{file}: found the task {min(unknown)!r}, which the run does not have; {ROW_ADVICE}",
            code=ErrorCode.UNKNOWN_NAME,
        )
    if complete and (missing := names - measured):
        raise InputError(
            f"{file}: found no accuracy on the task {min(missing)!r}, expected one for every task; {ROW_ADVICE}",
            code=ErrorCode.MISSING_VALUE,
        )
    return row


def parse_stage_result(resolved: ResolvedExperiment, stage: int, text: str, file: Path) -> StageResult:
    """Parse the result of a run's stage, and check that it belongs to the run.

    Args:
        resolved: The run's experiment.
        stage: The stage's number, from 1.
        text: The file's content.
        file: The file, for messages.

    Returns:
        The stage's result.

    Raises:
        InputError: The content is damaged, or belongs to another run.
    """
    result = parse_json(StageResult, text, file, STAGE_ADVICE)
    task = resolved.experiment.tasks[stage - 1]
    pairs: dict[str, tuple[object, object]] = {
        "stage": (result.stage, stage),
        "task": (result.task, task.name),
        "steps": (result.steps, resolved.experiment.stage_steps(task)),
    }
    if result.identity:  # older runs have none
        pairs["identity"] = (result.identity, stage_identity(resolved, stage))
    for name, (actual, expected) in pairs.items():
        if actual != expected:
            raise InputError(
                f"{file}: found {name} {actual}, expected {expected}: the stage was trained by another run; "
                f"{STAGE_ADVICE}",
                code=ErrorCode.OTHER_RUN,
            )
    return result


def check_run_folder(resolved: ResolvedExperiment, folder: Path) -> None:
    """Parse and check all rows and stage results in a run's folder before the run resumes.

    Args:
        resolved: The run's experiment.
        folder: The run's folder; it need not exist.

    Raises:
        InputError: A file is damaged or belongs to another run, or the weights of a trained stage are missing.
    """
    if not folder.is_dir():
        return
    is_finished = (folder / RESULT).is_file()  # the models of a finished run may have been removed
    for stage in range(len(resolved.tasks) + 1):
        row = row_file(folder, stage, resolved.tasks[stage - 1].name)
        for file, complete in ((row, True), (partial_row_file(row), False)):
            if text := read_text_if_exists(file, folder):
                parse_row(resolved, text, file, complete)
        training = row.with_name(TRAINING)
        if stage and (text := read_text_if_exists(training, folder)):
            parse_stage_result(resolved, stage, text, training)
            weights = row.parent / MODEL_FOLDER / WEIGHTS
            if not is_finished and not weights.is_file():
                raise InputError(
                    f"{weights}: found no such file, expected the weights of stage {stage}; {STAGE_ADVICE}",
                    code=ErrorCode.NOT_FOUND,
                )


def write_json(file: Path, content: BaseModel, within: Path | None = None) -> None:
    """Write a pydantic model as JSON, atomically and with retries.

    Args:
        file: The file to write.
        content: The pydantic model.
        within: A folder that exists unless its storage is temporarily unavailable. While it is missing, writing is
            retried.
    """
    retry_io(lambda: write_text(file, content.model_dump_json(indent=1) + "\n"), must_exist=within, description=file)
