"""Results of runs, read from their folders and formatted."""

import json
from collections.abc import Sequence
from pathlib import Path

from orchestrate.recipes.recipe import load_experiment
from schemas.base import parse_json
from schemas.errors import InputError, shell_command
from schemas.method import PRESETS
from schemas.results import Result, StageResult, TaskSummary
from zscl.data.task import TaskFolder
from zscl.evaluation.metrics import compute_metrics
from zscl.sequence.layout import ACCURACY, EXPERIMENT, RESULT, TRAINING, glob_stages, stage_files
from zscl.sequence.layout import ZERO_SHOT as ROW_BEFORE
from zscl.sequence.result import ROW_ADVICE, STAGE_ADVICE, AccuracyRow


def load_result(run: Path) -> Result:
    """Read a run folder's result.

    Raises:
        InputError: the folder has no finished run.
    """
    file = run / RESULT
    if not run.is_dir():
        raise InputError(f"{run}: found no such folder, expected a run's folder")
    if not file.is_file():
        if within := sorted(file.parent for file in run.glob(f"*/{RESULT}")):
            raise InputError(
                f"{run}: found {len(within)} runs in it, expected one, {within[0]} say, or all: {shell_command(run)}/*"
            )
        done = len(glob_stages(run, ACCURACY))
        raise InputError(f"{run}: found no {RESULT} ({done} stages finished), expected a finished run")
    return parse_json(Result, file.read_bytes(), file, "remove the file, and zscl resume writes it again")


def load_partial_result(run: Path) -> Result:
    """Read a run folder's result, or what a run under way would say if it ended with its last finished stage.

    Raises:
        InputError: the folder has no run that has finished a stage.
    """
    if not run.is_dir() or (run / RESULT).is_file() or any(run.glob(f"*/{RESULT}")):
        return load_result(run)
    rows = stage_files(run, ACCURACY)
    if not rows:
        raise InputError(f"{run}: found 0 finished stages and no {RESULT}, expected a run that finished a stage")
    experiment = load_experiment(run / EXPERIMENT)
    if experiment.class_incremental is not None:
        raise InputError(f"{run}: found no {RESULT} ({len(rows)} stages finished), expected a finished run")
    try:
        zero_shot, *measured = (
            parse_json(AccuracyRow, file.read_bytes(), file, ROW_ADVICE) for file in (run / ROW_BEFORE, *rows)
        )
        trained = [file.with_name(TRAINING) for file in rows]
        stages = [parse_json(StageResult, file.read_bytes(), file, STAGE_ADVICE) for file in trained]
    except OSError as error:
        raise InputError(f"{run}: found no readable rows ({error}), expected a run's folder") from error
    names = [task.name for task in experiment.tasks]
    for file, row in zip((run / ROW_BEFORE, *rows), (zero_shot, *measured), strict=True):
        for name in names:
            if name not in row.accuracy:
                raise InputError(f"{file}: found no accuracy on the task {name!r}, expected one on each; {ROW_ADVICE}")
    matrix = tuple(tuple(row.accuracy[name] for name in names) for row in measured)
    baseline = tuple(zero_shot.accuracy[name] for name in names)
    folders = {task.name: TaskFolder.open(task, held_out=experiment.evaluation.held_out) for task in experiment.tasks}
    return Result(
        name=experiment.name,
        method=experiment.method.name,
        method_changes=experiment.method.changes,
        method_settings=experiment.method.settings,
        settings=experiment.settings,
        seed=experiment.seed,
        fingerprint=zero_shot.fingerprint,
        algorithm=zero_shot.algorithm,
        tasks=tuple(
            TaskSummary(
                name=task.name,
                path=task.path,
                digest=folders[task.name].digest,
                test_images=zero_shot.images[task.name],
                split_family=folders[task.name].split_family,
            )
            for task in experiment.tasks
        ),
        held_out=experiment.evaluation.held_out,
        zero_shot=baseline,
        accuracy_matrix=matrix,
        metrics=compute_metrics(matrix, baseline),
        zero_shot_metrics=compute_metrics([baseline] * len(matrix), baseline),
        stages=tuple(stages),
        reference_texts=0,
        templates=experiment.evaluation.templates,
        workers=experiment.compute.workers,
        device="",
        train_seconds=sum(stage.train_seconds for stage in stages),
        evaluation_seconds=sum(row.seconds for row in measured),
        versions={},
    )


def run_label(result: Result) -> str:
    """The method's name; where that is the name of a preset, with what was changed in it."""
    changes = method_changes(result) if result.method in PRESETS else ""
    return f"{result.method} ({changes})" if changes else result.method


def method_changes(result: Result) -> str:
    """What was changed in its method's preset, if anything."""
    return ", ".join(format_change(path, value) for path, value in result.method_changes.items())


def format_change(path: str, value: object) -> str:
    """A change as it is read: `distill.image_weight=2.0`, a further loss as its call, `spread.Spread(weight=0.5)`."""
    if not path.startswith(CUSTOM_LOSS_PREFIX):
        return f"{path}={json.dumps(value)}"
    settings = json.loads(str(value))
    given = ", ".join(f"{name}={json.dumps(setting)}" for name, setting in settings.items())
    return f"{path.removeprefix(CUSTOM_LOSS_PREFIX)}({given})"


def format_time_breakdown(result: Result, overlapped: bool = False) -> str:
    """In a line, what the main worker did with its time while it trained and evaluated.

    Args:
        result: of a run.
        beside: its rows were measured beside the training, so that their time is not the main worker's.
    """
    parts: dict[str, float] = {}
    for stage in result.stages:
        for part, seconds in (stage.seconds_by_part if not stage.shared else {}).items():
            parts[part] = parts.get(part, 0.0) + seconds
    if not overlapped:
        parts["evaluation"] = result.evaluation_seconds
    whole = sum(parts.values()) or 1e-9  # nothing was trained
    shares = sorted(parts.items(), key=lambda part: -part[1])
    line = f"{whole / 60:.1f} min: " + ", ".join(f"{part} {100 * value / whole:.0f} %" for part, value in shares)
    return f"{line}; evaluation, beside it: {result.evaluation_seconds / 60:.1f} min" if overlapped else line


def matrix_columns(result: Result) -> dict[str, list[object]]:
    """The matrix as columns: the zero-shot row first, then a row a stage."""
    stages = [ZERO_SHOT, *(f"{stage}-{task.name}" for stage, task in enumerate(result.tasks, start=1))]
    rows = [result.zero_shot, *result.accuracy_matrix]
    columns: dict[str, list[object]] = {"after": list(stages)}
    for index, task in enumerate(result.tasks):
        columns[task.name] = [row[index] for row in rows]
    return columns


def format_percent(value: float | None) -> str:
    """A fraction in per cent, to one decimal."""
    return "–" if value is None else f"{100 * value:.1f}"


def format_cell(value: str | float | None) -> str:
    """What stands in a table: a text as it is, a fraction in per cent."""
    return value if isinstance(value, str) else format_percent(value)


def markdown_table(rows: Sequence[Sequence[str]], left: int) -> str:
    """A Markdown table, heads first; the first `left` columns are words, the others numbers, flush right."""
    head, *body = rows
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, rule, *body])


ZERO_SHOT = "zero-shot"


CUSTOM_LOSS_PREFIX = "further_losses."
