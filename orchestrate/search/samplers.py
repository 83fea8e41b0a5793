"""What a search tries next: Optuna's samplers behind Ray Tune, so that the same recipe suggests the same trials."""

import itertools
import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.importance import FanovaImportanceEvaluator
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.study import StudyDirection
from optuna.trial import TrialState
from ray.tune.schedulers import AsyncHyperBandScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search.optuna import OptunaSearch

from schemas.search import Domain, Search, Trial, direction_of

optuna.logging.set_verbosity(optuna.logging.WARNING)

TRIAL_NUMBER = "trial"  # beside the values
RANDOM_FIRST = 10  # trials that tell TPE something, at most a third of all
MEDIAN_OF = 3  # trials that came as far, before any is given up


class OptunaSearcher(OptunaSearch):  # type: ignore[misc]
    """Suggests trials batch by batch: a batch when all of the one before are over, told in the order of suggestion.

    So what is suggested does not depend on which trial is finished first. Values are coded (see `Domain.codes`).
    """

    def __init__(self, search: Search) -> None:
        directions = [direction_of(name) for name in search.objectives]
        several = len(directions) > 1
        super().__init__(
            space={path: to_distribution(domain) for path, domain in search.domains.items()},
            metric=list(search.objectives) if several else search.objectives[0],
            mode=directions if several else directions[0],
            sampler=build_sampler(search),
            points_to_evaluate=grid_points(search) if search.sampler == "grid" else None,
        )
        self._batch = search.batch
        self._order: list[str] = []
        self._ended: dict[str, list[float] | None] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """Suggest a trial's values, by path, and its number; nothing before the batch before is over."""
        if len(self._order) % self._batch == 0 and len(self._ended) < len(self._order):
            return None
        values: dict[str, Any] = super().suggest(trial_id)
        self._order.append(trial_id)
        return {**values, TRIAL_NUMBER: len(self._order)}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """A stage is done, which only the scheduler wants to know."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Take in what became of a trial; one that failed has no value."""
        names = self.metric if isinstance(self.metric, list) else [self.metric]
        values = [float((result or {}).get(name, math.nan)) for name in names]
        self._ended[trial_id] = None if error or not all(map(math.isfinite, values)) else values
        if len(self._order) % self._batch == 0 and len(self._ended) == len(self._order):
            for ended in self._order[len(self._completed_trials) :]:
                values_or_none = self._ended[ended]
                state = TrialState.FAIL if values_or_none is None else TrialState.COMPLETE
                self._ot_study.tell(self._ot_trials[ended], values_or_none, state=state)
                self._completed_trials.add(ended)


def to_distribution(domain: Domain) -> BaseDistribution:
    """A domain as Optuna has it."""
    if domain.choice is not None:
        return CategoricalDistribution(domain.codes)
    low, high = domain.ends
    kind = IntDistribution if domain.integer or domain.log_integer else FloatDistribution
    return kind(low, high, log=domain.is_log)


def build_sampler(search: Search) -> BaseSampler:
    """Optuna's sampler of a search, seeded."""
    match search.sampler:
        case "tpe":
            first = min(RANDOM_FIRST, max(1, (search.trials or 1) // 3))
            return TPESampler(seed=search.seed, n_startup_trials=first)
        case "nsga2":
            return NSGAIISampler(seed=search.seed, population_size=max(2, search.batch))
        case "random" | "grid":
            return RandomSampler(seed=search.seed)


def grid_points(search: Search) -> list[dict[str, Any]]:
    """Every combination of values, coded; the last path's change first."""
    values = [list(domain.codes or domain.values or ()) for domain in search.domains.values()]
    return [dict(zip(search.domains, each, strict=True)) for each in itertools.product(*values)]


def build_scheduler(search: Search, stages: int, time: str) -> TrialScheduler | None:
    """Tune's scheduler, which gives trials up; `time` is what a trial's stages are called in its reports."""
    stopping = search.early_stopping
    if stopping is None:
        return None
    [objective] = search.objectives
    watched = {"time_attr": time, "metric": objective, "mode": direction_of(objective)}
    if stopping.kind == "median":
        return MedianStoppingRule(**watched, grace_period=stopping.grace_stages, min_samples_required=MEDIAN_OF)
    return AsyncHyperBandScheduler(
        **watched, max_t=stages, grace_period=stopping.grace_stages, reduction_factor=stopping.reduction_factor
    )


def build_study(search: Search, trials: Sequence[Trial]) -> optuna.Study:
    """The finished trials as Optuna's own study, for its pictures and importances: objectives in per cent."""
    directions = {"min": StudyDirection.MINIMIZE, "max": StudyDirection.MAXIMIZE}
    study = optuna.create_study(directions=[directions[direction_of(name)] for name in search.objectives])
    distributions = {path: to_distribution(domain) for path, domain in search.domains.items()}
    for trial in trials:
        if trial.status in ("finished", "read") and trial.objectives:
            params = {path: search.domains[path].code(value) for path, value in trial.values.items()}
            values = [100 * trial.objectives[name] for name in search.objectives]
            number = {"number": trial.number}
            study.add_trial(
                optuna.trial.create_trial(values=values, params=params, distributions=distributions, user_attrs=number)
            )
    return study


def compute_importance(search: Search, trials: Sequence[Trial]) -> dict[str, float]:
    """Share of the mean objective's variance over the finished trials that each path explains (Optuna's fANOVA).

    Nothing where fewer than two trials finished, or all came to the same.
    """
    study = build_study(search, trials)
    signs = [1.0 if direction_of(name) == "max" else -1.0 for name in search.objectives]

    def target(trial: optuna.trial.FrozenTrial) -> float:
        return fmean(sign * value for sign, value in zip(signs, trial.values, strict=True))

    if len(set(map(target, study.trials))) < 2:
        return {}
    judge = FanovaImportanceEvaluator(seed=search.seed)
    found = optuna.importance.get_param_importances(study, evaluator=judge, target=target)
    return {path: float(found.get(path, 0.0)) for path in search.domains}
