"""Results of a search: conversion of Ray Tune's results to trials, Pareto front, and counts of stage trainings."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from orchestrate.lifecycle.paths import SEARCH_RESULT
from schemas.base import parse_json
from schemas.search import Search, SearchResult, StageTrainings, Trial, optimisation_direction

if TYPE_CHECKING:
    from ray.tune import ResultGrid


def load_search_result(folder: Path) -> SearchResult:
    """Read the result of a finished search from its folder."""
    file = folder / SEARCH_RESULT
    return parse_json(SearchResult, file.read_bytes(), file, "remove the file, and search again")


def build_trials(grid: "ResultGrid", search: Search) -> list[Trial]:
    """Convert Ray Tune's results to trials.

    Args:
        grid: Ray Tune's results.
        search: The search.

    Returns:
        The trials, in the order in which the sampler suggested them.
    """
    from orchestrate.search.samplers import TRIAL_NUMBER
    from orchestrate.search.trial import STAGES_DONE

    trials = []
    for result in grid:
        report, config = result.metrics or {}, result.config or {}
        status, reason = str(report.get("status", "running")), str(report.get("reason", ""))
        if result.error is not None:
            status, reason = "failed", _last_line(result.error)
        elif status == "running":
            status = "stopped"
        objectives = {name: float(report[name]) for name in search.objectives if name in report}
        trials.append(
            Trial(
                number=config[TRIAL_NUMBER],
                values={path: domain.decode(config[path]) for path, domain in search.domains.items()},
                status=status,  # type: ignore[arg-type]  # checked by pydantic
                reason=reason,
                fingerprint=str(report.get("fingerprint", "")),
                folder=f"trials/{report.get('fingerprint', '')}",
                stages=int(report.get(STAGES_DONE, 0)),
                shared_stages=int(report.get("shared_stages", 0)),
                objectives={} if any(map(math.isnan, objectives.values())) else objectives,
                train_seconds=float(report.get("train_seconds", 0.0)),
            )
        )
    return sorted(trials, key=lambda trial: trial.number)


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def select_pareto_front(trials: Sequence[Trial], objectives: Sequence[str]) -> list[Trial]:
    """Select the finished trials that no other finished trial dominates.

    Args:
        trials: All trials.
        objectives: Names of the objectives.

    Returns:
        The trials of the Pareto front. A trial dominates another one if it is better in at least one objective and
        worse in none.
    """
    finished = [trial for trial in trials if trial.status in ("finished", "read") and trial.objectives]
    utilities = {
        trial.number: [compute_utility({name: trial.objectives[name]}) for name in objectives] for trial in finished
    }

    def is_dominated(trial: Trial) -> bool:
        values = utilities[trial.number]
        return any(
            other != values and all(theirs >= ours for theirs, ours in zip(other, values, strict=True))
            for other in utilities.values()
        )

    return [trial for trial in finished if not is_dominated(trial)]


def compute_utility(objectives: Mapping[str, float]) -> float:
    """Compute the mean of a trial's objectives, all fractions. Objectives that are minimised count negatively."""
    return fmean(value if optimisation_direction(name) == "max" else -value for name, value in objectives.items())


def count_stage_trainings(trials: Sequence[Trial], stages: int) -> StageTrainings:
    """Count the stages of all trials by origin.

    A stage was trained, was shared by another trial, was read from a trial that had finished before, or was not
    trained because its trial was stopped early or failed.

    Args:
        trials: All trials.
        stages: Number of stages that a complete trial has.

    Returns:
        The counts.
    """

    def untrained(status: str) -> int:
        return sum(stages - trial.stages for trial in trials if trial.status == status)

    read = sum(trial.stages for trial in trials if trial.status == "read")
    shared = sum(trial.shared_stages for trial in trials if trial.status != "read")
    return StageTrainings(
        asked=len(trials) * stages,
        run=sum(trial.stages for trial in trials) - read - shared,
        shared=shared,
        read=read,
        stopped_early=untrained("stopped"),
        failed=untrained("failed"),
    )
