"""Checks of a search before it starts: its recipe, domains, data and objectives, and an estimate of its size."""

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

MAX_SHARED_AVERAGES = 8  # each is a copy of the trained weights in memory while the first stage is trained
MAX_POINTS = 1_000  # combinations of values that are searched for averages
UNDEFINED_FOR_ONE_TASK = ("transfer", "forgetting", "backward_transfer", "forward_transfer")
DATA_FIELDS = ("model", "tasks", "reference", "class_incremental")  # values of these domains name other data


@dataclass(frozen=True)
class PreparedSearch:
    """A search that was checked.

    Attributes:
        search: The section `search` of the recipe.
        content: The experiment's recipe, unchecked, without the values of a trial.
        file: The recipe's file.
        base: The experiment as the recipe has it, evaluated on held-out images.
        fingerprint: The search's fingerprint.
        averages: The averages of all trials, if the first stage can be trained once for all trials that differ only
            in their average; empty otherwise.
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
        """The number of trials: as the recipe says, or all combinations of a grid."""
        if self.search.trials is not None:
            return self.search.trials
        return math.prod(len(domain.values or ()) for domain in self.search.domains.values())


def prepare_search(file: Path, overrides: Sequence[str] = ()) -> PreparedSearch:
    """Read a search's recipe and check the experiment, both ends of each domain, the data and the objectives.

    Args:
        file: The search's recipe.
        overrides: Overrides of the recipe's fields, `a.b.c=value`.

    Returns:
        The checked search.

    Raises:
        InputError: If something is missing, wrong or not supported by a search.
    """
    search, content = load_search(file, overrides)
    experiment = build_trial_experiment(search, content, {}, file)
    _check_points(search, content, file)
    if experiment.compute.storage is not None:
        raise InputError(
            f"{file}: found compute.storage, expected a folder that all nodes see: trials share trained stages",
            code=ErrorCode.UNSUPPORTED,
            field="compute.storage",
        )
    if experiment.compute.evaluation == "overlapped":
        raise InputError(
            f"{file}: compute.evaluation is overlapped, expected inline: a trial's stage is evaluated before its next "
            "stage starts",
            code=ErrorCode.UNSUPPORTED,
            field="compute.evaluation",
        )
    base = preflight.prepare(experiment, file, Path(search.root) if search.root else None)
    _check_objectives(search, base, file)
    return PreparedSearch(
        search, content, file, base, search.fingerprint(base.fingerprint), _shared_averages(search, content, file)
    )


def _check_points(search: Search, content: Mapping[str, Any], file: Path) -> None:
    """Check every combination of a grid, and otherwise the ends of each domain.

    Raises:
        InputError: With the messages of all points that are refused.
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
    """Read and check the search of a folder, to resume it.

    Args:
        folder: The search's folder.
        overrides: Overrides of fields of `compute` and `tracking`.

    Returns:
        The checked search.

    Raises:
        InputError: If an override would make it another search, or something is missing.
    """
    for override in overrides:
        if not override.startswith(("compute.", "tracking.")):
            raise InputError(
                f"--set {override}: expected a field of compute or tracking; all other fields are part of the search",
                code=ErrorCode.INVALID_VALUE,
                field="--set",
            )
    prepared = prepare_search(folder / SEARCH, overrides)
    if MASK in prepared.base.experiment.model_dump_json(exclude={"tracking"}):
        raise InputError(
            f"{folder / SEARCH}: found {MASK} where the recipe has secrets, expected the recipe: "
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
                f"{file}: search.objectives: found {objective}, expected {TASK_ACCURACY_PREFIX} and one of "
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
    """Return the trials' averages, if they are few and trials can occur that differ in nothing else."""
    values = [domain.values for domain in search.domains.values()]
    if None in values or not any(path.split(".")[0] == "method" for path in search.domains):
        return ()
    method = {path: domain.values or () for path, domain in search.domains.items() if path.split(".")[0] == "method"}
    averages: dict[Any, None] = {}
    for point in itertools.islice(itertools.product(*method.values()), MAX_POINTS):
        try:
            experiment = build_trial_experiment(search, content, dict(zip(method, point, strict=True)), file)
        except InputError:  # the trial reports it
            continue
        averages[experiment.method.average] = None
    return tuple(averages) if 1 < len(averages) <= MAX_SHARED_AVERAGES else ()


def search_folder(prepared: PreparedSearch, out: Path | None) -> Path:
    """Return the absolute path of a search's folder.

    Args:
        prepared: The search.
        out: The folder that the user chose, if any; default: `runs/NAME-FINGERPRINT`.

    Returns:
        The folder; it need not exist.
    """
    if out is not None:
        return out.absolute()
    return Path.cwd() / "runs" / f"{recipe_name(prepared.file)}-{prepared.fingerprint[:8]}"


def estimate_total_model_megabytes(prepared: PreparedSearch) -> float:
    """Estimate the disk space of all trials' models, in megabytes."""
    return prepared.trial_count * prepared.stage_count * preflight.model_megabytes(prepared.base)


def plan_search(prepared: PreparedSearch, folder: Path) -> dict[str, object]:
    """Describe in numbers what a search will do.

    Args:
        prepared: The search.
        folder: The search's folder.

    Returns:
        The plan that `zscl search --dry-run` prints.
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
