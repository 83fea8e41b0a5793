"""What became of a search's trials: as Ray Tune or a finished search tells it, which are best, what they cost."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from orchestrate.lifecycle.paths import FOUND
from schemas.base import parse_json
from schemas.search import Search, SearchResult, StageTrainings, Trial, direction_of

if TYPE_CHECKING:
    from ray.tune import ResultGrid


def load_search_result(folder: Path) -> SearchResult:
    """What a finished search found, as its folder says."""
    return parse_json(SearchResult, (folder / FOUND).read_bytes(), folder / FOUND, "remove the file, and search again")


def trials_from_grid(grid: "ResultGrid", search: Search) -> list[Trial]:
    """What became of the trials, in the order of suggestion."""
    from orchestrate.search.samplers import TRIAL_NUMBER
    from orchestrate.search.trial import STAGES_DONE

    found = []
    for result in grid:
        reported, domains = result.metrics or {}, search.domains
        given = result.config or {}
        status, reason = str(reported.get("status", "running")), str(reported.get("reason", ""))
        stages = int(reported.get(STAGES_DONE, 0))
        if result.error is not None:
            status, reason = "failed", _last_line(result.error)
        elif status == "running":
            status = "stopped"
        objectives = {name: float(reported[name]) for name in search.objectives if name in reported}
        found.append(
            Trial(
                number=given[TRIAL_NUMBER],
                values={path: domain.meant(given[path]) for path, domain in domains.items()},
                status=status,  # type: ignore[arg-type]  # checked by pydantic
                reason=reason,
                fingerprint=str(reported.get("fingerprint", "")),
                folder=f"trials/{reported.get('fingerprint', '')}",
                stages=stages,
                shared_stages=int(reported.get("shared_stages", 0)),
                objectives={} if any(map(math.isnan, objectives.values())) else objectives,
                train_seconds=float(reported.get("train_seconds", 0.0)),
            )
        )
    return sorted(found, key=lambda trial: trial.number)


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def pareto_front(trials: Sequence[Trial], objectives: Sequence[str]) -> list[Trial]:
    """The finished trials that no other one beats: better in one objective, and worse in none."""
    done = [trial for trial in trials if trial.status in ("finished", "read") and trial.objectives]
    goodness = {trial.number: [utility({name: trial.objectives[name]}) for name in objectives] for trial in done}

    def beaten(trial: Trial) -> bool:
        mine = goodness[trial.number]
        return any(
            other != mine and all(theirs >= ours for theirs, ours in zip(other, mine, strict=True))
            for other in goodness.values()
        )

    return [trial for trial in done if not beaten(trial)]


def utility(objectives: Mapping[str, float]) -> float:
    """The mean of a trial's objectives, each the larger the better; all are differences or means of accuracies."""
    return fmean(value if direction_of(name) == "max" else -value for name, value in objectives.items())


def count_stage_trainings(trials: Sequence[Trial], stages: int) -> StageTrainings:
    """What became of the stages that all trials would have trained; `stages` of them are a trial's."""

    def left(*statuses: str) -> int:
        return sum(stages - trial.stages for trial in trials if trial.status in statuses)

    read = sum(trial.stages for trial in trials if trial.status == "read")
    shared = sum(trial.shared_stages for trial in trials if trial.status != "read")
    return StageTrainings(
        asked=len(trials) * stages,
        run=sum(trial.stages for trial in trials) - read - shared,
        shared=shared,
        read=read,
        stopped_early=left("stopped"),
        failed=left("failed"),
    )
