"""Validation of searches, their domains, fingerprints and objectives."""

from typing import Any

import pytest
from pydantic import ValidationError
from support.errors import refused

from schemas.base import input_error
from schemas.errors import ErrorCode
from schemas.results import Metrics
from schemas.search import Domain, Search, objective_values

DOMAINS = {"method.distill.image_weight": {"log_uniform": [0.1, 10]}, "method.average.every": {"choice": [5, 10]}}
CONFLICT, DUPLICATE, INVALID = ErrorCode.CONFLICT, ErrorCode.DUPLICATE, ErrorCode.INVALID_VALUE
MISSING, UNKNOWN = ErrorCode.MISSING_VALUE, ErrorCode.UNKNOWN_NAME


def validate(**changes: Any) -> Search:
    content = {"domains": DOMAINS, "trials": 4} | changes
    try:
        return Search.model_validate({name: value for name, value in content.items() if value is not None})
    except ValidationError as error:
        raise input_error(error) from error


@pytest.mark.parametrize(
    ("changes", "code", "field", "content"),
    [
        ({"trials": 0}, INVALID, "trials", "greater than 0"),
        ({"trials": None}, MISSING, "trials", "sampler tpe"),
        ({"domains": {}}, INVALID, "domains", "at least 1 item"),
        ({"domains": {"a": {}}}, INVALID, "domains.a", "uniform, log_uniform, integer"),
        ({"domains": {"a": {"uniform": [0, 1], "choice": [1]}}}, INVALID, "domains.a", "uniform and choice"),
        ({"domains": {"a": {"uniform": [2, 1]}}}, INVALID, "domains.a.uniform", "[2, 1]"),
        ({"domains": {"a": {"log_uniform": [0, 1]}}}, INVALID, "domains.a.log_uniform", "above 0"),
        ({"domains": {"a": {"choice": [1, 1]}}}, DUPLICATE, "domains.a.choice", "[1, 1]"),
        ({"domains": {"a": {"choise": [1]}}}, UNKNOWN, "domains.a.choise", "did you mean 'choice'?"),
        ({"domains": {"compute.workers": {"choice": [1, 2]}}}, CONFLICT, "domains.compute.workers", "compute"),
        ({"objectives": "accurracy"}, UNKNOWN, "objectives", "'accurracy'"),
        ({"objectives": ["last", "last"]}, DUPLICATE, "objectives", "last, last"),
        ({"sampler": "grid"}, CONFLICT, "trials", "trials is 4"),
        ({"sampler": "grid", "trials": None}, CONFLICT, "domains.method.distill.image_weight", "at most 16"),
        ({"sampler": "nsga2"}, CONFLICT, "sampler", "one objective"),
        ({"early_stopping": "asha", "objectives": ["last", "avg"]}, CONFLICT, "early_stopping", "single objective"),
        ({"early_stopping": "hyperband"}, INVALID, "early_stopping.kind", "'hyperband'"),
        ({"validation_share": 1.0}, INVALID, "validation_share", "less than 1"),
    ],
)
def test_invalid_searches(changes: dict[str, Any], code: ErrorCode, field: str, content: str) -> None:
    with refused(code, field) as error:
        validate(**changes)
    assert content in str(error.value)


def test_defaults() -> None:
    search = Search.model_validate({"domains": DOMAINS, "trials": 4})
    assert (search.objectives, search.sampler, search.early_stopping) == (("transfer",), "tpe", None)
    named = Search.model_validate({"domains": DOMAINS, "trials": 4, "objectives": "last", "early_stopping": "median"})
    assert named.objectives == ("last",)
    assert named.early_stopping is not None
    assert named.early_stopping.kind == "median"


def test_a_choice_may_have_values_of_any_type() -> None:
    domain = Domain.model_validate({"choice": [None, 1, True, "1", {"every": 5}]})
    assert domain.encoded_choices == (None, 1, True, "1", '{"every": 5}')
    assert [domain.decode(code) for code in domain.encoded_choices] == list(domain.choice or ())
    assert domain.decode(True) is True


@pytest.mark.parametrize(
    ("domain", "values"),
    [
        ({"integer": [1, 3]}, (1, 2, 3)),
        ({"log_integer": [1, 100]}, None),
        ({"uniform": [0, 1]}, None),
        ({"choice": [0.5, 2]}, (0.5, 2)),
    ],
)
def test_values_of_small_domains(domain: dict[str, Any], values: tuple[Any, ...] | None) -> None:
    assert Domain.model_validate(domain).values == values


def test_fingerprint() -> None:
    def fingerprint(base: str = "b", **changes: Any) -> str:
        return Search.model_validate({"domains": DOMAINS, "trials": 4} | changes).fingerprint(base)

    assert fingerprint() == fingerprint(keep_models="chosen") == fingerprint(root="/elsewhere")
    assert len({fingerprint(), fingerprint(trials=5), fingerprint(seed=1), fingerprint("c")}) == 4


def test_objectives_are_metrics_or_cells_of_the_matrix() -> None:
    metrics = Metrics(transfer=None, avg=0.5, last=0.6, forgetting=None)
    values = objective_values(["transfer", "last", "accuracy/first"], metrics, {"first": 0.7, "second": 0.1})
    assert values == {"transfer": 0.0, "last": 0.6, "accuracy/first": 0.7}
