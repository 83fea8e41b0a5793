"""Samplers and schedulers of a search: Optuna suggests trials, and Ray Tune stops unpromising ones.

Suggestions depend only on the seed and on the results of earlier batches of trials.
"""

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

from schemas.search import Domain, Search, Trial, optimisation_direction

optuna.logging.set_verbosity(optuna.logging.WARNING)

TRIAL_NUMBER = "trial"  # key of the number in a trial's configuration; the other keys are paths of fields
MAX_STARTUP_TRIALS = 10  # random trials before TPE uses its model; fewer if that is more than a third of all trials
MEDIAN_MIN_TRIALS = 3  # number of trials that must reach a stage before a trial can be stopped at it


class OptunaSearcher(OptunaSearch):  # type: ignore[misc]
    """Suggests trials in batches: a batch starts when all trials of the previous batch have ended.

    Results of a batch are passed to Optuna in the order in which its trials were suggested. Therefore, suggestions do
    not depend on the order in which trials finish. Suggested values are encoded as by `Domain.encode`.
    """

    def __init__(self, search: Search) -> None:
        directions = [optimisation_direction(name) for name in search.objectives]
        several = len(directions) > 1
        super().__init__(
            space={path: to_distribution(domain) for path, domain in search.domains.items()},
            metric=list(search.objectives) if several else search.objectives[0],
            mode=directions if several else directions[0],
            sampler=build_sampler(search),
            points_to_evaluate=list_grid_points(search) if search.sampler == "grid" else None,
        )
        self._batch = search.batch
        self._order: list[str] = []
        self._results: dict[str, list[float] | None] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """Suggest the next trial.

        Args:
            trial_id: Ray Tune's id of the trial.

        Returns:
            Mapping from the path of each searched field to its encoded value, and from `TRIAL_NUMBER` to the trial's
            number. `None` while trials of the previous batch are running.
        """
        if len(self._order) % self._batch == 0 and len(self._results) < len(self._order):
            return None
        values: dict[str, Any] = super().suggest(trial_id)
        self._order.append(trial_id)
        return {**values, TRIAL_NUMBER: len(self._order)}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Do nothing: only the scheduler uses the reports that a trial sends after each stage."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Record the result of a trial. When a batch is complete, pass its results to Optuna.

        Args:
            trial_id: Ray Tune's id of the trial.
            result: The trial's last report.
            error: Whether the trial failed. Optuna is informed of the failure, without values of the objectives.
        """
        names = self.metric if isinstance(self.metric, list) else [self.metric]
        values = [float((result or {}).get(name, math.nan)) for name in names]
        self._results[trial_id] = None if error or not all(map(math.isfinite, values)) else values
        if len(self._order) % self._batch == 0 and len(self._results) == len(self._order):
            for ended in self._order[len(self._completed_trials) :]:
                values_or_none = self._results[ended]
                state = TrialState.FAIL if values_or_none is None else TrialState.COMPLETE
                self._ot_study.tell(self._ot_trials[ended], values_or_none, state=state)
                self._completed_trials.add(ended)


def to_distribution(domain: Domain) -> BaseDistribution:
    """Convert the domain of a searched field to an Optuna distribution of encoded values."""
    if domain.choice is not None:
        return CategoricalDistribution(domain.encoded_choices)
    low, high = domain.values_to_check
    kind = IntDistribution if domain.integer or domain.log_integer else FloatDistribution
    return kind(low, high, log=domain.is_log)


def build_sampler(search: Search) -> BaseSampler:
    """Build the Optuna sampler of a search, with the search's seed."""
    match search.sampler:
        case "tpe":
            startup = min(MAX_STARTUP_TRIALS, max(1, (search.trials or 1) // 3))
            return TPESampler(seed=search.seed, n_startup_trials=startup)
        case "nsga2":
            return NSGAIISampler(seed=search.seed, population_size=max(2, search.batch))
        case "random" | "grid":
            return RandomSampler(seed=search.seed)


def list_grid_points(search: Search) -> list[dict[str, Any]]:
    """Return all combinations of the domains' encoded values by field path. The last field's value varies fastest."""
    values = [list(domain.encoded_choices or domain.values or ()) for domain in search.domains.values()]
    return [dict(zip(search.domains, point, strict=True)) for point in itertools.product(*values)]


def build_scheduler(search: Search, stages: int, time_attr: str) -> TrialScheduler | None:
    """Build the Ray Tune scheduler, which stops unpromising trials early.

    Args:
        search: The search.
        stages: Number of stages that a complete trial has.
        time_attr: Key of a trial's report that contains the number of finished stages.

    Returns:
        The scheduler; `None` if the search has no early stopping.
    """
    stopping = search.early_stopping
    if stopping is None:
        return None
    [objective] = search.objectives
    settings = {"time_attr": time_attr, "metric": objective, "mode": optimisation_direction(objective)}
    if stopping.kind == "median":
        return MedianStoppingRule(
            **settings, grace_period=stopping.grace_stages, min_samples_required=MEDIAN_MIN_TRIALS
        )
    return AsyncHyperBandScheduler(
        **settings, max_t=stages, grace_period=stopping.grace_stages, reduction_factor=stopping.reduction_factor
    )


def build_study(search: Search, trials: Sequence[Trial]) -> optuna.Study:
    """Build an Optuna study of the finished trials, for charts and for the importance of fields.

    Args:
        search: The search.
        trials: All trials.

    Returns:
        The study. The values of the objectives are in per cent.
    """
    directions = {"min": StudyDirection.MINIMIZE, "max": StudyDirection.MAXIMIZE}
    study = optuna.create_study(directions=[directions[optimisation_direction(name)] for name in search.objectives])
    distributions = {path: to_distribution(domain) for path, domain in search.domains.items()}
    for trial in trials:
        if trial.status in ("finished", "read") and trial.objectives:
            params = {path: search.domains[path].encode(value) for path, value in trial.values.items()}
            values = [100 * trial.objectives[name] for name in search.objectives]
            number = {"number": trial.number}
            study.add_trial(
                optuna.trial.create_trial(values=values, params=params, distributions=distributions, user_attrs=number)
            )
    return study


def compute_importance(search: Search, trials: Sequence[Trial]) -> dict[str, float]:
    """Compute the importance of each searched field with Optuna's fANOVA.

    The importance is the fraction of the variance of the mean objective that the field explains. Objectives that are
    minimised count negatively in the mean.

    Args:
        search: The search.
        trials: All trials; only finished ones are used.

    Returns:
        Mapping from the path of each searched field to its importance; empty if all finished trials have the same mean
        objective.
    """
    study = build_study(search, trials)
    signs = [1.0 if optimisation_direction(name) == "max" else -1.0 for name in search.objectives]

    def mean_objective(trial: optuna.trial.FrozenTrial) -> float:
        return fmean(sign * value for sign, value in zip(signs, trial.values, strict=True))

    if len(set(map(mean_objective, study.trials))) < 2:
        return {}
    evaluator = FanovaImportanceEvaluator(seed=search.seed)
    shares = optuna.importance.get_param_importances(study, evaluator=evaluator, target=mean_objective)
    return {path: float(shares.get(path, 0.0)) for path in search.domains}
