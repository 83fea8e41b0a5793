"""Checks of a search before it starts (recipe, domains, data and objectives), and an estimate of its size."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrate.lifecycle.paths import SEARCH
from orchestrate.recipes.recipe import build_trial_experiment, load_search, recipe_name
from orchestrate.runs import preflight
from schemas.errors import ErrorCode, InputError, shell_command
from schemas.redaction import MASK
from schemas.search import TASK_ACCURACY_PREFIX, Search
from zscl.sequence.resolve import ResolvedExperiment
from zscl.sequence.stage_cache import Averages

MAX_SHARED_AVERAGES = 8  # every average needs a copy of the trained weights in memory in the first stage
MAX_POINTS = 1_000  # combinations of values from which the averages are collected
UNDEFINED_FOR_ONE_TASK = ("transfer", "forgetting", "backward_transfer", "forward_transfer")
DATA_FIELDS = (
    "model",
    "tasks",
    "reference",
    "class_incremental",
)  # domains whose values select other data


@dataclass(frozen=True)
class PreparedSearch:
    """A search with a valid recipe, valid data and a usable model (see `prepare_search`).

    Attributes:
        search: The section `search` of the recipe.
        content: The content of the experiment's recipe, before a trial's values are inserted.
        file: The recipe's file.
        base: The experiment that the recipe defines without a trial's values, evaluated on held-out training images.
        fingerprint: The search's fingerprint.
        averages: The averaging settings that occur in the trials. Trials that differ only in averaging share the
            training of the first stage. Empty if no trials can share it.
    """

    search: Search
    content: Mapping[str, Any]
    file: Path
    base: ResolvedExperiment
    fingerprint: str
    averages: Averages

    @property
    def stage_count(self) -> int:
        """The number of stages of a trial."""
        return len(self.base.tasks)

    @property
    def trial_count(self) -> int:
        """The number of trials: the recipe's setting, or the number of combinations of values in a grid."""
        if self.search.trials is not None:
            return self.search.trials
        return math.prod(len(domain.values or ()) for domain in self.search.domains.values())


def prepare_search(file: Path, overrides: Sequence[str] = ()) -> PreparedSearch:
    """Read a search's recipe and check the experiment, the domains, the data and the objectives.

    Args:
        file: The search's recipe.
        overrides: Changes to fields of the recipe, `a.b.c=value`.

    Returns:
        The checked search.

    Raises:
        InputError: The recipe or the data are invalid, or a setting is not supported in a search.
    """
    search, content = load_search(file, overrides)
    experiment = build_trial_experiment(search, content, {}, file)
    _check_points(search, content, file)
    if experiment.compute.storage is not None:
        raise InputError(
            f"{file}: compute.storage cannot be used in a search, because trials share trained stages. Remove it, "
            "and use a folder that all nodes see",
            code=ErrorCode.UNSUPPORTED,
            field="compute.storage",
        )
    if experiment.compute.evaluation == "overlapped":
        raise InputError(
            f"{file}: found overlapped in compute.evaluation, expected inline, because a search evaluates each "
            "stage of a trial before the next stage starts",
            code=ErrorCode.UNSUPPORTED,
            field="compute.evaluation",
        )
    base = preflight.prepare(experiment, file, Path(search.root) if search.root else None)
    _check_objectives(search, base, file)
    return PreparedSearch(
        search, content, file, base, search.fingerprint(base.fingerprint), _shared_averages(search, content, file)
    )


def _check_points(search: Search, content: Mapping[str, Any], file: Path) -> None:
    """Check that the recipe is valid with the values of trials.

    For a grid, every combination of values is checked. For other samplers, the bounds or choices of each domain are
    checked separately.

    Raises:
        InputError: The recipe is invalid with some of the values. The message lists all errors.
    """
    if search.sampler == "grid":
        values = [[(path, value) for value in domain.values or ()] for path, domain in search.domains.items()]
        points = [dict(point) for point in itertools.product(*values)]
    else:
        points = [{path: end} for path, domain in search.domains.items() for end in domain.values_to_check]
    errors: list[InputError] = []
    for point in points:
        try:
            experiment = build_trial_experiment(search, content, point, file)
            if any(path.split(".")[0] in DATA_FIELDS for path in point):
                preflight.prepare(experiment)
        except InputError as error:
            errors.append(error)
    if errors:
        message = "\n".join(dict.fromkeys(map(str, errors)))
        raise InputError(message, code=errors[0].code, field=errors[0].field)


def load_resumable_search(folder: Path, overrides: Sequence[str]) -> PreparedSearch:
    """Read and check the search in a folder, in order to resume it.

    Args:
        folder: The search's folder.
        overrides: Changes to fields of the recipe, `a.b.c=value`. Only fields of `compute` and `tracking` are allowed.

    Returns:
        The checked search.

    Raises:
        InputError: An override changes another field, the recipe or the data are invalid, or the recipe contains masked
            secrets.
    """
    for override in overrides:
        if not override.startswith(("compute.", "tracking.")):
            raise InputError(
                f"--set {override}: expected a field of compute or tracking; other fields cannot change when a "
                "search resumes",
                code=ErrorCode.INVALID_VALUE,
                field="--set",
            )
    prepared = prepare_search(folder / SEARCH, overrides)
    if MASK in prepared.base.experiment.model_dump_json(exclude={"tracking"}):
        raise InputError(
            f"{folder / SEARCH}: secrets are masked ({MASK}) in this file. Resume with the original recipe: "
            + shell_command("zscl", "search", "RECIPE", "--out", folder),
            code=ErrorCode.MISSING_VALUE,
        )
    return prepared


def _check_objectives(search: Search, base: ResolvedExperiment, file: Path) -> None:
    names = [task.name for task in base.tasks]
    for objective in search.objectives:
        task = objective.removeprefix(TASK_ACCURACY_PREFIX)
        if objective.startswith(TASK_ACCURACY_PREFIX) and task not in names:
            raise InputError(
                f"{file}: search.objectives: found {objective}, expected {TASK_ACCURACY_PREFIX} followed by one of "
                + ", ".join(names),
                code=ErrorCode.UNKNOWN_NAME,
                field="search.objectives",
            )
        if len(names) == 1 and objective in UNDEFINED_FOR_ONE_TASK:
            raise InputError(
                f"{file}: search.objectives: found {objective}, which is undefined for a single task",
                code=ErrorCode.CONFLICT,
                field="search.objectives",
            )


def _shared_averages(search: Search, content: Mapping[str, Any], file: Path) -> Averages:
    """Collect the averaging settings that occur in the trials, so that trials can share the first stage's training.

    Returns:
        The settings; empty if there are more than `MAX_SHARED_AVERAGES`, or if trials cannot differ only in averaging.
    """
    values = [domain.values for domain in search.domains.values()]
    if None in values or not any(path.split(".")[0] == "method" for path in search.domains):
        return ()
    method = {path: domain.values or () for path, domain in search.domains.items() if path.split(".")[0] == "method"}
    averages: dict[Any, None] = {}
    for point in itertools.islice(itertools.product(*method.values()), MAX_POINTS):
        try:
            experiment = build_trial_experiment(search, content, dict(zip(method, point, strict=True)), file)
        except InputError:  # the trial with these values reports the error
            continue
        averages[experiment.method.average] = None
    return tuple(averages) if 1 < len(averages) <= MAX_SHARED_AVERAGES else ()


def search_folder(prepared: PreparedSearch, out: Path | None) -> Path:
    """Return the absolute path of a search's folder.

    Args:
        prepared: The search.
        out: The folder that the user chose; default: `runs/NAME-FINGERPRINT` in the current folder.

    Returns:
        The folder, which may not exist yet.
    """
    if out is not None:
        return out.absolute()
    return Path.cwd() / "runs" / f"{recipe_name(prepared.file)}-{prepared.fingerprint[:8]}"


def estimate_total_model_megabytes(prepared: PreparedSearch) -> float:
    """Estimate the disk space for the models of all trials, in megabytes."""
    return prepared.trial_count * prepared.stage_count * preflight.model_megabytes(prepared.base)


def plan_search(prepared: PreparedSearch, folder: Path) -> dict[str, object]:
    """Describe what a search will do: its trials, stages, steps, images and disk space.

    Args:
        prepared: The search.
        folder: The search's folder.

    Returns:
        The plan, as `zscl search --dry-run` prints it.
    """
    experiment, trials = prepared.base.experiment, prepared.trial_count
    steps = sum(map(experiment.stage_steps, experiment.tasks))
    held_out = {task.name: len(task.test) for task in prepared.base.tasks}  # type: ignore[arg-type]  # local data
    return {
        "fingerprint": prepared.fingerprint,
        "folder": str(folder),
        "trials": trials,
        "workers_a_trial": experiment.compute.workers,
        "stage_trainings": trials * prepared.stage_count,
        "steps_a_trial": steps,
        "images_through_student": trials * preflight.count_student_images(experiment),
        "held_out_images": held_out,
        "first_stage_shared_by_averages": len(prepared.averages),
        "megabytes_of_models": round(estimate_total_model_megabytes(prepared)),
    }
