"""Names and paths of the files in a run's folder."""

from pathlib import Path

from schemas.errors import InputError
from zscl.sequence.resolve import ResolvedExperiment

ZERO_SHOT, ACCURACY = "zero_shot.json", "accuracy.json"


def partial_row_file(row: Path) -> Path:
    """Where a row is kept while its cells are measured."""
    return row.with_suffix(".part.json")


def stage_folder_of(opened: ResolvedExperiment, folder: Path, stage: int) -> Path:
    """A stage's folder in that of its run."""
    return stage_folder(folder, stage, opened.tasks[stage - 1].name)


def stage_folder(run: Path, stage: int, task: str) -> Path:
    """The folder of a stage, counted from 1, that trains a task, in that of its run."""
    return run / "stages" / f"{stage}-{task}"


def model_folder(run: Path, stage: int, task: str) -> Path:
    """Where the model lies that such a stage hands on, as open_clip's `local-dir:` reads it."""
    return stage_folder(run, stage, task) / "model"


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


TRAINING = "training.json"


RESULT = "result.json"
