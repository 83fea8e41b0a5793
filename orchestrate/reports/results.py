"""Results of finished and unfinished runs: read them from the runs' folders, and format them as text."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrate.recipes.recipe import load_experiment
from schemas.base import parse_json
from schemas.errors import ErrorCode, InputError, shell_command
from schemas.experiment import Experiment
from schemas.method import PRESETS
from schemas.results import Result, StageResult, TaskSummary
from zscl.data.task import TaskFolder
from zscl.evaluation.metrics import compute_metrics
from zscl.sequence.layout import ACCURACY, EXPERIMENT, RESULT, TRAINING, glob_stages, stage_files
from zscl.sequence.layout import ZERO_SHOT as ZERO_SHOT_FILE
from zscl.sequence.result import ROW_ADVICE, STAGE_ADVICE, AccuracyRow

ZERO_SHOT = "zero-shot"
CUSTOM_LOSS_PREFIX = "custom_losses."  # begins the path of a custom loss in `method_changes`


def load_result(run: Path) -> Result:
    """Read the result of a finished run.

    Args:
        run: The run's folder.

    Returns:
        The result.

    Raises:
        InputError: The folder does not exist, or contains no finished run.
    """
    file = run / RESULT
    if not run.is_dir():
        raise InputError(f"{run}: found no such folder, expected a run's folder", code=ErrorCode.NOT_FOUND)
    if not file.is_file():
        if runs := sorted(file.parent for file in run.glob(f"*/{RESULT}")):
            raise InputError(
                f"{run}: found {len(runs)} runs in this folder, expected one run, for example {runs[0]}, or all of "
                f"them: {shell_command(run)}/*",
                code=ErrorCode.UNSUPPORTED,
            )
        finished = len(glob_stages(run, ACCURACY))
        raise InputError(
            f"{run}: found no {RESULT} ({finished} stages finished), expected a finished run",
            code=ErrorCode.NOT_FOUND,
        )
    return parse_json(Result, file.read_bytes(), file, "remove the file, and zscl resume writes it again")


def load_partial_result(run: Path) -> Result:
    """Read the result of a finished run, or build a result from the finished stages of an unfinished run.

    Args:
        run: The run's folder.

    Returns:
        The result. For an unfinished run, the accuracy matrix has one row per finished stage.

    Raises:
        InputError: The folder contains no run that has finished a stage, or an unfinished class-incremental run.
    """
    if not run.is_dir() or (run / RESULT).is_file() or any(run.glob(f"*/{RESULT}")):
        return load_result(run)
    row_files = stage_files(run, ACCURACY)
    if not row_files:
        raise InputError(
            f"{run}: found 0 finished stages and no {RESULT}, expected a run that finished a stage",
            code=ErrorCode.NOT_FOUND,
        )
    experiment = load_experiment(run / EXPERIMENT)
    if experiment.class_incremental is not None:
        raise InputError(
            f"{run}: found no {RESULT} ({len(row_files)} stages finished), expected a finished run",
            code=ErrorCode.UNSUPPORTED,
        )
    return _build_partial_result(experiment, _read_finished_stages(run, row_files, experiment))


@dataclass(frozen=True)
class _FinishedStages:
    """The results in the folder of an unfinished run.

    Attributes:
        zero_shot: The accuracies of the initial model on all tasks.
        rows: The accuracies on all tasks after every finished stage.
        results: The training results of the finished stages.
    """

    zero_shot: AccuracyRow
    rows: Sequence[AccuracyRow]
    results: Sequence[StageResult]


def _read_finished_stages(run: Path, row_files: Sequence[Path], experiment: Experiment) -> _FinishedStages:
    """Read the accuracies and the training results of a run's finished stages.

    Args:
        run: The run's folder.
        row_files: The files with the accuracies after each stage.
        experiment: The run's experiment.

    Returns:
        The contents of the files.

    Raises:
        InputError: A file is missing or incomplete.
    """
    files = [run / ZERO_SHOT_FILE, *row_files]
    try:
        rows = [parse_json(AccuracyRow, file.read_bytes(), file, ROW_ADVICE) for file in files]
        result_files = [file.with_name(TRAINING) for file in row_files]
        results = [parse_json(StageResult, file.read_bytes(), file, STAGE_ADVICE) for file in result_files]
    except OSError as error:
        raise InputError(
            f"{run}: the results of its stages cannot be read ({error}), expected a run's folder",
            code=ErrorCode.UNREADABLE,
        ) from error
    for file, row in zip(files, rows, strict=True):
        for task in experiment.tasks:
            if task.name not in row.accuracy:
                raise InputError(
                    f"{file}: found no accuracy on the task {task.name!r}, expected one for every task; {ROW_ADVICE}",
                    code=ErrorCode.MISMATCH,
                )
    return _FinishedStages(rows[0], rows[1:], results)


def _build_partial_result(experiment: Experiment, stages: _FinishedStages) -> Result:
    names = [task.name for task in experiment.tasks]
    matrix = tuple(tuple(row.accuracy[name] for name in names) for row in stages.rows)
    zero_shot = tuple(stages.zero_shot.accuracy[name] for name in names)
    folders = {task.name: TaskFolder.open(task, held_out=experiment.evaluation.held_out) for task in experiment.tasks}
    return Result(
        name=experiment.name,
        method=experiment.method.name,
        method_changes=experiment.method.changes,
        method_settings=experiment.method.settings,
        settings=experiment.settings,
        seed=experiment.seed,
        fingerprint=stages.zero_shot.fingerprint,
        algorithm=stages.zero_shot.algorithm,
        tasks=tuple(
            TaskSummary(
                name=task.name,
                path=task.path,
                digest=folders[task.name].digest,
                test_images=stages.zero_shot.images[task.name],
                split_family=folders[task.name].split_family,
            )
            for task in experiment.tasks
        ),
        held_out=experiment.evaluation.held_out,
        zero_shot=zero_shot,
        accuracy_matrix=matrix,
        metrics=compute_metrics(matrix, zero_shot),
        zero_shot_metrics=compute_metrics([zero_shot] * len(matrix), zero_shot),
        stages=tuple(stages.results),
        reference_texts=0,
        templates=experiment.evaluation.templates,
        workers=experiment.compute.workers,
        device="",
        train_seconds=sum(stage.train_seconds for stage in stages.results),
        evaluation_seconds=sum(row.seconds for row in stages.rows),
        versions={},
    )


def format_method(result: Result) -> str:
    """Return the method's name. For a preset, it is followed by the changes to the preset in brackets."""
    changes = format_method_changes(result) if result.method in PRESETS else ""
    return f"{result.method} ({changes})" if changes else result.method


def format_method_changes(result: Result) -> str:
    """Format the changes to the method's preset; an empty string if there are none."""
    return ", ".join(format_change(path, value) for path, value in result.method_changes.items())


def format_change(path: str, value: object) -> str:
    """Format a changed setting as `distill.image_weight=2.0`, and a custom loss as `spread.Spread(weight=0.5)`."""
    if not path.startswith(CUSTOM_LOSS_PREFIX):
        return f"{path}={json.dumps(value)}"
    settings = json.loads(str(value))
    arguments = ", ".join(f"{name}={json.dumps(setting)}" for name, setting in settings.items())
    return f"{path.removeprefix(CUSTOM_LOSS_PREFIX)}({arguments})"


def format_time_breakdown(result: Result, overlapped: bool = False) -> str:
    """Format on one line how the main worker's time was divided between evaluation and the parts of training.

    Args:
        result: The run's result.
        overlapped: Whether other processes evaluated the models, so that the main worker spent no time on evaluation.

    Returns:
        The total time in minutes, and every part in per cent of it, the largest part first.
    """
    parts: dict[str, float] = {}
    for stage in result.stages:
        for part, seconds in (stage.seconds_by_part if not stage.shared else {}).items():
            parts[part] = parts.get(part, 0.0) + seconds
    if not overlapped:
        parts["evaluation"] = result.evaluation_seconds
    total = sum(parts.values()) or 1e-9  # the sum is 0 if nothing was trained
    shares = sorted(parts.items(), key=lambda part: -part[1])
    text = f"{total / 60:.1f} min: " + ", ".join(f"{part} {100 * value / total:.0f} %" for part, value in shares)
    return f"{text}; evaluation in parallel: {result.evaluation_seconds / 60:.1f} min" if overlapped else text


def build_matrix_columns(result: Result) -> dict[str, list[object]]:
    """Return the accuracy matrix as the columns of a table, by column name.

    The first column contains the labels of the stages. Every other column contains the accuracies on one task, starting
    with the zero-shot accuracy.
    """
    stages = [ZERO_SHOT, *(f"{stage}-{task.name}" for stage, task in enumerate(result.tasks, start=1))]
    rows = [result.zero_shot, *result.accuracy_matrix]
    columns: dict[str, list[object]] = {"after": list(stages)}
    for index, task in enumerate(result.tasks):
        columns[task.name] = [row[index] for row in rows]
    return columns


def format_percent(value: float | None) -> str:
    """Format a fraction in per cent with one decimal, and `None` as a dash."""
    return "–" if value is None else f"{100 * value:.1f}"


def format_cell(value: str | float | None) -> str:
    """Format the value of a table's cell. Texts are unchanged, and fractions are formatted in per cent."""
    return value if isinstance(value, str) else format_percent(value)


def format_markdown_table(rows: Sequence[Sequence[str]], text_columns: int) -> str:
    """Format a Markdown table.

    Args:
        rows: The cells by row; the first row is the header.
        text_columns: The number of columns on the left that contain texts. The other columns contain numbers, which
            are aligned to the right.

    Returns:
        The table.
    """
    header, *body = rows
    rule = ["---"] * text_columns + ["---:"] * (len(header) - text_columns)
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, rule, *body])
