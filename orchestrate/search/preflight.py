"""Before a search is started: its recipe read, its domains, data and objectives checked, its cost foreseen."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrate.lifecycle.paths import SEARCH
from orchestrate.recipes.recipe import load_search, recipe_name, with_values
from orchestrate.runs import preflight
from schemas.errors import InputError, command
from schemas.redaction import MASK
from schemas.search import TASK_ACCURACY, Search
from zscl.sequence.resolve import ResolvedExperiment
from zscl.sequence.stage_cache import Averages

MAX_SHARED_AVERAGES = 8  # models beside the student while the first stage is trained
UNDEFINED_FOR_ONE_TASK = ("transfer", "forgetting", "backward_transfer", "forward_transfer")  # of a single task
DATA_FIELDS = ("model", "tasks", "reference", "class_incremental")  # domains whose values name other data


@dataclass(frozen=True)
class PreparedSearch:
    """A search that was looked at.

    base: its experiment as the recipe has it, judged on what is held out; content: of that experiment, unchecked;
    averages: of all trials, where the first stage can be trained once for all that differ in it alone.
    """

    search: Search
    content: Mapping[str, Any]
    file: Path
    base: ResolvedExperiment
    fingerprint: str
    averages: Averages

    @property
    def stage_count(self) -> int:
        """Of a trial."""
        return len(self.base.tasks)

    @property
    def trial_count(self) -> int:
        """How many there will be."""
        if self.search.trials is not None:
            return self.search.trials
        return math.prod(len(domain.values or ()) for domain in self.search.domains.values())


def prepare_search(file: Path, overrides: Sequence[str] = ()) -> PreparedSearch:
    """Check a search before anything is started: its experiment, each domain's ends, its data, its objectives.

    Raises:
        InputError: something is refused, missing or wrong.
    """
    search, content = load_search(file, overrides)
    experiment = with_values(search, content, {}, file)
    points = [{path: end} for path, domain in search.domains.items() for end in domain.ends]
    if search.sampler == "grid":
        values = [[(path, value) for value in domain.values or ()] for path, domain in search.domains.items()]
        points = [dict(each) for each in itertools.product(*values)]
    refusals: list[str] = []
    for point in points:
        try:
            at_point = with_values(search, content, point, file)
            if any(path.split(".")[0] in DATA_FIELDS for path in point):
                preflight.prepare(at_point)
        except InputError as error:
            refusals.append(str(error))
    if refusals:
        raise InputError("\n".join(dict.fromkeys(refusals)))
    if experiment.compute.storage is not None:
        raise InputError(
            f"{file}: found compute.storage, expected a folder that all nodes see: trials share what they have trained"
        )
    if experiment.compute.evaluation == "overlapped":
        raise InputError(
            f"{file}: compute.evaluation is overlapped, expected inline: a trial's stage is judged before its next one"
        )
    base = preflight.prepare(experiment, file, Path(search.root) if search.root else None)
    _check_objectives(search, base, file)
    return PreparedSearch(
        search, content, file, base, search.fingerprint(base.fingerprint), _shared_averages(search, content, file)
    )


def load_resumable_search(folder: Path, overrides: Sequence[str]) -> PreparedSearch:
    """Read the search that a folder holds.

    Raises:
        InputError: an override would make it another one, or something is missing.
    """
    for override in overrides:
        if not override.startswith(("compute.", "tracking.")):
            raise InputError(f"--set {override}: expected a field of compute or tracking; all else is what is searched")
    prepared = prepare_search(folder / SEARCH, overrides)
    if MASK in prepared.base.experiment.model_dump_json(exclude={"tracking"}):
        raise InputError(
            f"{folder / SEARCH}: found {MASK} where the recipe has secrets, expected the recipe: "
            + command("zscl", "search", "RECIPE", "--out", folder)
        )
    return prepared


def _check_objectives(search: Search, base: ResolvedExperiment, file: Path) -> None:
    names = [task.name for task in base.tasks]
    for objective in search.objectives:
        task = objective.removeprefix(TASK_ACCURACY)
        if objective.startswith(TASK_ACCURACY) and task not in names:
            raise InputError(
                f"{file}: search.objectives: found {objective}, expected {TASK_ACCURACY} and one of {', '.join(names)}"
            )
        if len(names) == 1 and objective in UNDEFINED_FOR_ONE_TASK:
            raise InputError(f"{file}: search.objectives: found {objective}, which a single task leaves undefined")


def _shared_averages(search: Search, content: Mapping[str, Any], file: Path) -> Averages:
    """The trials' averages, if they are few and trials can meet that differ in nothing else."""
    values = [domain.values for domain in search.domains.values()]
    if any(each is None for each in values) or not any(path.split(".")[0] == "method" for path in search.domains):
        return ()
    relevant = {path: domain.values or () for path, domain in search.domains.items() if path.split(".")[0] == "method"}
    found: dict[Any, None] = {}
    for point in itertools.islice(itertools.product(*relevant.values()), 1_000):
        try:
            found[with_values(search, content, dict(zip(relevant, point, strict=True)), file).method.average] = None
        except InputError:  # the trial will say so
            continue
    return tuple(found) if 1 < len(found) <= MAX_SHARED_AVERAGES else ()


def search_folder(prepared: PreparedSearch, out: Path | None) -> Path:
    """Where a search's folder is."""
    if out is not None:
        return out.absolute()
    return Path.cwd() / "runs" / f"{recipe_name(prepared.file)}-{prepared.fingerprint[:8]}"


def total_model_megabytes(prepared: PreparedSearch) -> float:
    """What the trials' models take up on disk."""
    return prepared.trial_count * prepared.stage_count * preflight.model_megabytes(prepared.base)


def plan_search(prepared: PreparedSearch, folder: Path) -> dict[str, object]:
    """What a search will do, in numbers."""
    experiment, trials = prepared.base.experiment, prepared.trial_count
    steps = sum(map(experiment.stage_steps, experiment.tasks))
    held_out = {task.name: len(task.test) for task in prepared.base.tasks}  # type: ignore[arg-type]  # local, then
    return {
        "fingerprint": prepared.fingerprint,
        "folder": str(folder),
        "trials": trials,
        "workers_a_trial": experiment.compute.workers,
        "stage_trainings": trials * prepared.stage_count,
        "steps_a_trial": steps,
        "images_through_student": trials * preflight.images_through_student(experiment),
        "held_out_images": held_out,
        "first_stage_shared_by_averages": len(prepared.averages),
        "megabytes_of_models": round(total_model_megabytes(prepared)),
    }
