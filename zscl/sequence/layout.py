"""File names and paths in a run's folder, each defined once.

All files except the journal are written atomically. When a run resumes, a result whose file exists is not computed
again:

    experiment.yaml                     the recipe with every default written out
    state.json                          whether the run is running, finished, failed or killed
    journal.jsonl                       the run's events, one JSON object per line (see `zscl.sequence.journal`)
    checkpoint.pt                       the state of the stage in training (see `zscl.training.checkpoint`)
    zero_shot.json                      the accuracy row of the initial model: its accuracy on every task
    stages/<k>-<task>/model/            the resulting model of stage k (from 1), an open_clip folder
    stages/<k>-<task>/exemplars/        the exemplars of stage k, best first, for methods with a memory
    stages/<k>-<task>/losses.csv        the losses of every step
    stages/<k>-<task>/training.json     the stage's result; the stage is trained if this file exists
    stages/<k>-<task>/accuracy.json     the accuracy row after stage k; the stage is finished if this file exists
    *.part.json                         an incomplete accuracy row: some tasks are not evaluated yet
    snapshots/<k>-<task>/               weights during stage k (`compute.snapshots_every`)
    result.json                         the run's result; the run is finished if this file exists
    ray/                                Ray Train's storage

The folder `teacher` next to the run's folder holds the teacher's cached features, which several runs share.

This module does not import torch, so that every package can import it quickly.
"""

from pathlib import Path

from schemas.errors import ErrorCode, InputError

# Files in a run's folder.
EXPERIMENT = "experiment.yaml"
STATE = "state.json"
JOURNAL = "journal.jsonl"
CHECKPOINT = "checkpoint.pt"
ZERO_SHOT = "zero_shot.json"
RESULT = "result.json"

# Files in a stage's folder.
LOSSES = "losses.csv"
TRAINING = "training.json"
ACCURACY = "accuracy.json"

# Folders in a run's folder, in a stage's folder, and next to the run's folder.
STAGES_FOLDER = "stages"
SNAPSHOTS_FOLDER = "snapshots"
RAY_FOLDER = "ray"
MODEL_FOLDER = "model"
EXEMPLARS_FOLDER = "exemplars"
TEACHER_FOLDER = "teacher"

# Hidden files of the synchronisation with object storage.
SYNC_MANIFEST = ".mirror.json"
SYNC_LOCK = ".mirror.lock"


def stages_folder(run: Path) -> Path:
    """Return the folder that contains the stage folders of a run."""
    return run / STAGES_FOLDER


def stage_folder(run: Path, stage: int, task: str) -> Path:
    """Return the folder of a trained stage in a run's folder.

    Args:
        run: The run's folder.
        stage: The stage's number, from 1.
        task: The name of the stage's task.

    Returns:
        The path; the folder need not exist.
    """
    return stages_folder(run) / f"{stage}-{task}"


def model_folder(run: Path, stage: int, task: str) -> Path:
    """Return the folder of a stage's model, which open_clip loads as `local-dir:<folder>`."""
    return stage_folder(run, stage, task) / MODEL_FOLDER


def exemplars_folder(run: Path, stage: int, task: str) -> Path:
    """Return the folder of the exemplars that a stage adds to the memory."""
    return stage_folder(run, stage, task) / EXEMPLARS_FOLDER


def snapshots_folder(run: Path, stage: int, task: str) -> Path:
    """Return the folder of a stage's snapshots, which exists if `compute.snapshots_every` is set."""
    return run / SNAPSHOTS_FOLDER / f"{stage}-{task}"


def row_file(run: Path, stage: int, task: str = "") -> Path:
    """Return the file of a row of the accuracy matrix, which holds the accuracies of one stage's model on every task.

    Args:
        run: The run's folder.
        stage: The stage's number, from 1; 0 is the row of the initial model.
        task: The name of the stage's task; unused for stage 0.

    Returns:
        The path; the file need not exist.
    """
    return stage_folder(run, stage, task) / ACCURACY if stage else run / ZERO_SHOT


def partial_row_file(row: Path) -> Path:
    """Return the file of an incomplete row from the row's file; it is removed when the row is complete."""
    return row.with_suffix(".part.json")


def teacher_cache_folder(run: Path) -> Path:
    """Return the folder of the teacher's cached features, which all runs with the same parent folder share."""
    return run.parent / TEACHER_FOLDER


def stage_cache_folder(search: Path) -> Path:
    """Return the folder of the trained stages that the trials of a search share (see `zscl.sequence.stage_cache`)."""
    return search / STAGES_FOLDER


def lock_file(run: Path) -> Path:
    """Return the lock file of a run, which is next to the run's folder."""
    return run.with_name(f".{run.name}.lock")


def owner_file(run: Path) -> Path:
    """Return the file that names the process that holds the lock of a run."""
    return run.with_name(f".{run.name}.owner.json")


def glob_stages(run: Path, pattern: str) -> list[Path]:
    """List the files whose names match a pattern in the folders of all stages, in no particular order."""
    return list(run.glob(f"{STAGES_FOLDER}/*/{pattern}"))


def stage_files(run: Path, name: str) -> list[Path]:
    """List the files with one name in the folders of all stages, in the order of the stages.

    Args:
        run: The run's folder.
        name: The name of the file in each stage's folder.

    Returns:
        The files of stages 1, 2, … without gaps; later stages need not have the file.

    Raises:
        InputError: A folder is not named `<number>-<task>`, or a stage before the last one does not have the file.
    """
    files: dict[int, Path] = {}
    for file in run.glob(f"{STAGES_FOLDER}/[!.]*/{name}"):
        number = file.parent.name.partition("-")[0]
        if not (number.isascii() and number.isdecimal()) or int(number) in files:
            raise InputError(
                f"{file.parent}: found this folder among the stages, expected one folder <number>-<task> per stage",
                code=ErrorCode.MISMATCH,
            )
        files[int(number)] = file
    for expected, stage in enumerate(sorted(files), start=1):
        if expected != stage:
            raise InputError(
                f"{files[stage].parent}: found stage {stage}, but no stage {expected}, expected both",
                code=ErrorCode.NOT_FOUND,
            )
    return [files[stage] for stage in sorted(files)]
