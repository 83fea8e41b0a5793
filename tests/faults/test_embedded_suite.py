"""Test that a run of the embedded suite whose workers are killed repeatedly has the result of an undisturbed run."""

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.faults import a_worker, ended, same, starts_of, until

from orchestrate.recipes import recipe as recipes
from zscl.datasets.synthetic.suites import write_embedded
from zscl.sequence.run import run_sequence

pytest_plugins = ["support.faulty_cluster"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]  # too long for `make faults`
Launch = Callable[..., Any]


@pytest.mark.fault(
    "Ten SIGKILLs of workers at random moments of an embedded run", "The `result.json` of an undisturbed run"
)
def test_ten_random_kills(launch: Launch, tmp_path: Path) -> None:
    write_embedded(tmp_path / "data", corpus=False, report=lambda text: None)
    shipped = Path(__file__).parents[2] / "experiments/embedded.yaml"
    tasks = [f"tasks.{number}={tmp_path}/data/{Path(task['path'] if isinstance(task, dict) else task).name}"
             for number, task in enumerate(recipes.read_recipe(shipped)["tasks"])]  # fmt: skip
    settings = (
        *tasks,
        f"reference={tmp_path}/data/reference",
        "optimisation.steps=60",
        "optimisation.warmup_steps=10",
        "compute.checkpoint.every_steps=5",
        "compute.max_failures=10",
    )
    run_sequence(recipes.load_experiment(shipped, settings), tmp_path / "whole", device=torch.device("cpu"))
    draw, run = random.Random(0), tmp_path / "run"
    with launch(*settings, verb=("run", shipped, "--out")) as process:
        for kill in range(10):
            until(lambda kill=kill: starts_of(run) > kill, "the group is at work (again)")  # type: ignore[misc]
            time.sleep(draw.uniform(0, 6))
            a_worker().kill()
        ended(process)
    assert starts_of(run) == 11
    same(tmp_path / "whole", run)
