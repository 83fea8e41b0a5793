"""A cluster to disturb, a recipe to run on it, and its run in peace."""

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
    """A head without CPUs and a node with two."""
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
    """The run that nothing happened to, in one plain process."""
    run = tmp_path_factory.mktemp("whole") / "run"
    run_sequence(recipes.load_experiment(long_recipe), run, device=torch.device("cpu"))
    return run


@pytest.fixture
def launch(tmp_path: Path, cluster: Cluster, long_recipe: Path) -> Launch:
    """Start the command line on the cluster: `run` of the recipe, unless another verb is given."""

    def start(*settings: str, verb: tuple[object, ...] = ("run", long_recipe, "--out"), run: str = "run") -> Any:
        given = [part for setting in settings for part in ("--set", setting)]
        address = ("--set", f"compute.address={cluster.address}")
        return started(*verb, tmp_path / run, *address, *given, folder=tmp_path)

    return start
