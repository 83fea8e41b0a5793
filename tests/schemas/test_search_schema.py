"""What a search may say, and what it is told when it says something else."""

from typing import Any

import pytest
from pydantic import ValidationError

from schemas.base import explain
from schemas.results import Metrics
from schemas.search import Domain, Search, objectives_of

DOMAINS = {"method.distill.image_weight": {"log_uniform": [0.1, 10]}, "method.average.every": {"choice": [5, 10]}}


def refused(**changes: Any) -> str:
    content = {"domains": DOMAINS, "trials": 4} | changes
    with pytest.raises(ValidationError) as error:
        Search.model_validate({name: value for name, value in content.items() if value is not None})
    return explain(error.value)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"trials": 0}, "trials: found 0, expected a value greater than 0"),
        ({"trials": None}, "trials: found none with sampler tpe, expected how many, at least 1"),
        ({"domains": {}}, "domains: found {}, expected at least 1 item"),
        ({"domains": {"a": {}}}, "domains.a: found none, expected exactly one of uniform, log_uniform, integer"),
        (
            {"domains": {"a": {"uniform": [0, 1], "choice": [1]}}},
            "domains.a: found uniform and choice, expected exactly",
        ),
        (
            {"domains": {"a": {"uniform": [2, 1]}}},
            "domains.a: uniform is [2, 1], expected a low end below the high one",
        ),
        ({"domains": {"a": {"log_uniform": [0, 1]}}}, "domains.a: log_uniform begins at 0, expected an end above 0"),
        ({"domains": {"a": {"choice": [1, 1]}}}, "domains.a: choice names a value twice"),
        ({"domains": {"a": {"choise": [1]}}}, "domains.a: unknown field 'choise'; did you mean 'choice'?"),
        ({"domains": {"compute.workers": {"choice": [1, 2]}}}, "domains.compute.workers: expected no field of compute"),
        (
            {"objectives": "accurracy"},
            "objectives: found 'accurracy', which no metric has, expected transfer, avg, last",
        ),
        ({"objectives": ["last", "last"]}, "objectives: found last, last, expected each once"),
        ({"sampler": "grid"}, "trials is 4 with sampler grid, expected none: all combinations are tried"),
        ({"sampler": "grid", "trials": None}, "domains.method.distill.image_weight: expected a choice or at most 16"),
        ({"sampler": "nsga2"}, "sampler is nsga2 with one objective, expected several (or tpe)"),
        ({"early_stopping": "asha", "objectives": ["last", "avg"]}, "early_stopping with several objectives"),
        ({"early_stopping": "hyperband"}, "early_stopping.kind: found 'hyperband', expected 'asha' or 'median'"),
        ({"validation_share": 1.0}, "validation_share: found 1.0, expected a value less than 1"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], sentence: str) -> None:
    assert sentence in refused(**changes)


def test_what_is_left_out_has_a_default() -> None:
    search = Search.model_validate({"domains": DOMAINS, "trials": 4})
    assert (search.objectives, search.sampler, search.early_stopping) == (("transfer",), "tpe", None)
    named = Search.model_validate({"domains": DOMAINS, "trials": 4, "objectives": "last", "early_stopping": "median"})
    assert named.objectives == ("last",)
    assert named.early_stopping is not None
    assert named.early_stopping.kind == "median"


def test_a_choice_may_be_of_anything() -> None:
    domain = Domain.model_validate({"choice": [None, 1, True, "1", {"every": 5}]})
    assert domain.codes == (None, 1, True, "1", '{"every": 5}')
    assert [domain.meant(code) for code in domain.codes] == list(domain.choice or ())
    assert domain.meant(True) is True


@pytest.mark.parametrize(
    ("domain", "values"),
    [
        ({"integer": [1, 3]}, (1, 2, 3)),
        ({"log_integer": [1, 100]}, None),
        ({"uniform": [0, 1]}, None),
        ({"choice": [0.5, 2]}, (0.5, 2)),
    ],
)
def test_few_values_are_known(domain: dict[str, Any], values: tuple[Any, ...] | None) -> None:
    assert Domain.model_validate(domain).values == values


def test_the_identity_is_what_is_looked_for() -> None:
    def fingerprint(base: str = "b", **changes: Any) -> str:
        return Search.model_validate({"domains": DOMAINS, "trials": 4} | changes).fingerprint(base)

    assert fingerprint() == fingerprint(keep_models="chosen") == fingerprint(root="/elsewhere")
    assert len({fingerprint(), fingerprint(trials=5), fingerprint(seed=1), fingerprint("c")}) == 4


def test_objectives_are_figures_or_cells() -> None:
    figures = Metrics(transfer=None, avg=0.5, last=0.6, forgetting=None)
    found = objectives_of(["transfer", "last", "accuracy/first"], figures, {"first": 0.7, "second": 0.1})
    assert found == {"transfer": 0.0, "last": 0.6, "accuracy/first": 0.7}
