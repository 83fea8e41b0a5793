"""Suggestions of a search are the same for the same recipe, whichever trial finishes first."""

import math
import random
from typing import Any

import pytest

from orchestrate.search.samplers import TRIAL_NUMBER, OptunaSearcher, compute_importance, list_grid_points
from schemas.search import Search, Trial

DOMAINS = {"a": {"uniform": [0, 1]}, "b": {"choice": [1, 2, 3]}}


def search(**changes: Any) -> Search:
    return Search.model_validate({"domains": DOMAINS, "trials": 12, "objectives": "last", "batch": 3} | changes)


def value_of(values: dict[str, Any]) -> float:
    return float(values["b"]) - (values["a"] - 0.3) ** 2


def tried(made: Search, order: int, at_once: int, results: Any = value_of) -> list[dict[str, Any]]:
    """Run trials whose values are known at once; they end in an order of their own."""
    sampling, draw = OptunaSearcher(made), random.Random(order)
    suggested: list[dict[str, Any]] = []
    running: dict[str, dict[str, Any]] = {}
    while len(suggested) < 12 or running:
        waits = len(suggested) == 12 or len(running) == at_once
        values = None if waits else sampling.suggest(str(len(suggested)))
        if values is None:
            assert running
            ended = draw.choice(sorted(running))
            ended_values = running.pop(ended)
            names = made.objectives
            result = {name: results(ended_values) for name in names}
            sampling.on_trial_complete(ended, result if all(map(math.isfinite, result.values())) else None)
        else:
            running[str(len(suggested))] = values
            suggested.append(values)
    return suggested


@pytest.mark.parametrize("sampler", ["tpe", "random", "nsga2"])
def test_suggestions_do_not_depend_on_the_order_of_results(sampler: str) -> None:
    several = {"objectives": ["last", "avg"]} if sampler == "nsga2" else {}
    made = search(sampler=sampler, **several)
    first = tried(made, order=0, at_once=3)
    assert first == tried(made, order=1, at_once=3) == tried(made, order=2, at_once=2) == tried(made, 3, at_once=1)
    assert [values[TRIAL_NUMBER] for values in first] == list(range(1, 13))
    assert first != tried(search(sampler=sampler, seed=1, **several), order=0, at_once=3)


def test_tpe_learns_from_results() -> None:
    good = tried(search(), order=0, at_once=2)
    assert sum(value_of(values) for values in good[9:]) > sum(value_of(values) for values in good[:3])
    other = tried(search(), order=0, at_once=2, results=lambda values: -value_of(values))
    assert good[:3] == other[:3]  # nothing is heard before the first batch is over
    assert good[3:] != other[3:]


def test_a_failed_trial_does_not_end_the_search() -> None:
    found = tried(search(), order=0, at_once=2, results=lambda values: math.nan if values["b"] == 2 else 1.0)
    assert len(found) == 12


def test_grid_points_are_all_combinations() -> None:
    domains = {"a": {"choice": ["x", "y"]}, "b": {"integer": [1, 2]}, "c": {"choice": [None, {"k": 1}]}}
    made = Search.model_validate({"domains": domains, "sampler": "grid"})
    points = list_grid_points(made)
    assert len(points) == 8
    assert points[0] == {"a": "x", "b": 1, "c": None}
    sampling = OptunaSearcher(made)
    suggested = []
    for number in range(8):
        values = sampling.suggest(str(number))
        assert values is not None
        suggested.append({path: values[path] for path in domains})
        sampling.on_trial_complete(str(number), {"transfer": 0.5})
    assert suggested == points


def trial(number: int, values: dict[str, Any], **objectives: float) -> Trial:
    return Trial(number=number, values=values, status="finished", objectives=objectives)


def test_importance() -> None:
    made = search(objectives=["last", "forgetting"])
    draw = random.Random(0)
    trials = []
    for number in range(1, 31):
        values = {"a": draw.random(), "b": draw.choice([1, 2, 3])}
        trials.append(trial(number, values, last=values["a"], forgetting=-values["a"]))
    found = compute_importance(made, trials)
    assert found["a"] > 0.9 > 0.1 > found["b"]
    assert compute_importance(made, trials[:1]) == {}
    same = [trial(number, {"a": 0.1 * number, "b": 1}, last=0.5, forgetting=0.1) for number in range(1, 4)]
    assert compute_importance(made, same) == {}
