"""Fixtures for fault tests: a cluster to disturb, a recipe to run on it, and an undisturbed run of the recipe."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.cluster_utils import Cluster
from support.faults import add_node, recipe_for_faults, started

from orchestrate.cluster.auth import bind_to_loopback
from orchestrate.recipes import recipe as recipes
from zscl.sequence.run import run_sequence

Launch = Callable[..., Any]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Start a cluster of a head node without CPUs and a worker node with two CPUs."""
    head = {"num_cpus": 0, "include_dashboard": False, "node_ip_address": "127.0.0.1"}
    with bind_to_loopback():
        cluster = Cluster(initialize_head=True, head_node_args=head)
    add_node(cluster)
    yield cluster
    cluster.shutdown()


@pytest.fixture(scope="module")
def long_recipe(tmp_path_factory: pytest.TempPathFactory, tiny_model: str) -> Path:
    return recipe_for_faults(tmp_path_factory.mktemp("faults"), tiny_model)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, long_recipe: Path) -> Path:
    """Run the recipe undisturbed in one process, and return the run's folder."""
    run = tmp_path_factory.mktemp("whole") / "run"
    run_sequence(recipes.load_experiment(long_recipe), run, device=torch.device("cpu"))
    return run


@pytest.fixture
def launch(tmp_path: Path, cluster: Cluster, long_recipe: Path) -> Launch:
    """Return a function that starts a command on the cluster; the default command runs the recipe."""

    def start(*settings: str, verb: tuple[object, ...] = ("run", long_recipe, "--out"), run: str = "run") -> Any:
        given = [part for setting in settings for part in ("--set", setting)]
        address = ("--set", f"compute.address={cluster.address}")
        return started(*verb, tmp_path / run, *address, *given, folder=tmp_path)

    return start
