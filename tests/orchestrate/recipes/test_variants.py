"""Seeds and task orders of a recipe."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from support.command import Command
from support.errors import refused

from orchestrate.recipes.variants import MTIL_ORDERS, expand_seeds_and_orders
from schemas.errors import ErrorCode
from schemas.experiment import Experiment

Make = Callable[..., Experiment]


def test_every_seed_in_every_order(experiment: Make) -> None:
    found = expand_seeds_and_orders({"": experiment(seed=3)}, 2, "given, reversed,random:2")
    assert list(found) == [
        f"{order}-seed-{seed}" for order in ("given", "reversed", "random-1", "random-2") for seed in (3, 4)
    ]
    orders = {name: [task.name for task in each.tasks] for name, each in found.items()}
    assert orders["given-seed-3"] == ["first", "second", "third"]
    assert orders["reversed-seed-4"] == ["third", "second", "first"]
    assert sorted(orders["random-2-seed-3"]) == ["first", "second", "third"]
    assert orders["random-1-seed-3"] == orders["random-1-seed-4"]
    assert {name: each.seed for name, each in found.items()}["given-seed-4"] == 4
    assert expand_seeds_and_orders({"": experiment()}, 1, "") == {"": experiment()}
    assert list(expand_seeds_and_orders({"a": experiment(), "b": experiment()}, 2, "")) == [
        "a-seed-0",
        "a-seed-1",
        "b-seed-0",
        "b-seed-1",
    ]


def test_the_orders_of_the_paper(experiment: Make) -> None:
    base = experiment(tasks=[f"data/{name}" for name in MTIL_ORDERS["I"]])
    [found] = expand_seeds_and_orders({"": base}, 1, "II").values()
    assert [task.name for task in found.tasks] == list(MTIL_ORDERS["II"])
    assert sorted(MTIL_ORDERS["I"]) == sorted(MTIL_ORDERS["II"])


@pytest.mark.parametrize(
    ("orders", "code"),
    [
        ("III", ErrorCode.UNKNOWN_NAME),
        ("random", ErrorCode.UNKNOWN_NAME),
        ("random:0", ErrorCode.UNKNOWN_NAME),
        ("I", ErrorCode.MISMATCH),
    ],
)
def test_an_unknown_order_is_refused(experiment: Make, orders: str, code: ErrorCode) -> None:
    with refused(code, "--orders") as error:
        expand_seeds_and_orders({"": experiment()}, 1, orders)
    assert orders in str(error.value)


def test_a_group_ends_with_its_comparison(
    tmp_path: Path,
    recipe: Callable[..., dict[str, Any]],
    zscl: Callable[..., Command],
    ray_cluster: None,
    without_ray: Callable[[], None],
) -> None:
    without_ray()
    YAML(typ="safe").dump(recipe(method="finetune"), tmp_path / "mine.yaml")
    group = ("--seeds", 2, "--orders", "given,reversed", "--out", tmp_path / "group", "--offline")
    found = zscl("run", tmp_path / "mine.yaml", *group, "--json")
    assert found.code == 0, found.error
    content = json.loads(found.out)
    names = ["given-seed-0", "given-seed-1", "reversed-seed-0", "reversed-seed-1"]
    assert [Path(run["folder"]).name for run in content["variants"]] == names
    assert content["comparison"]["groups"]["finetune"]["runs"] == names
    assert content["comparison"]["groups"]["finetune"]["figures"]["last"]["deviation"] is not None
    assert (tmp_path / "group/comparison/comparison.html").is_file()
