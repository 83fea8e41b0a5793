"""The cluster recipe, against Ray's own schema."""

from pathlib import Path

import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

FILE = Path(__file__).parent.parent / "ray_cluster.yaml"


def test_ray_accepts_the_cluster_file() -> None:
    validate_config(prepare_config(yaml.safe_load(FILE.read_text())))


def test_every_node_asks_for_a_token_and_installs_by_the_constraints() -> None:
    cluster = yaml.safe_load(FILE.read_text())
    for command in cluster["head_start_ray_commands"] + cluster["worker_start_ray_commands"]:
        assert command.startswith("RAY_AUTH_MODE=token ray start")
    assert any("--constraint ~/zscl/constraints.txt" in command for command in cluster["setup_commands"])
