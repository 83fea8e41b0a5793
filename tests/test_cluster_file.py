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


def test_nothing_is_open_to_the_world() -> None:
    text = FILE.read_text()
    cluster = yaml.safe_load(text)
    assert "0.0.0.0" not in text  # of an address to listen on as of a range to let in
    assert "::/0" not in text
    groups = [node["node_config"]["SecurityGroupIds"] for node in cluster["available_node_types"].values()]
    assert groups == [["<security-group>"]] * 2  # or Ray makes a group that opens SSH to everybody
    assert "security_group" not in cluster["provider"]
    assert [command for command in cluster["head_start_ray_commands"] if "--dashboard-host=127.0.0.1" in command]
    assert cluster["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
