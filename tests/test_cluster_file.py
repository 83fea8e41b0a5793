"""Tests of the cluster files with Ray's schema, and of the RayJob as far as possible without Kubernetes."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parent.parent
FILE, ON_PREMISES, RAY_JOB = ROOT / "ray_cluster.yaml", ROOT / "deploy/on-premises.yaml", ROOT / "deploy/rayjob.yaml"


@pytest.mark.parametrize("file", [FILE, ON_PREMISES], ids=lambda file: file.stem)
def test_ray_accepts_the_cluster_file(file: Path) -> None:
    validate_config(prepare_config(yaml.safe_load(file.read_text())))


@pytest.mark.parametrize("file", [FILE, ON_PREMISES], ids=lambda file: file.stem)
def test_every_node_asks_for_a_token_and_installs_by_the_constraints(file: Path) -> None:
    cluster = yaml.safe_load(file.read_text())
    for command in cluster["head_start_ray_commands"] + cluster["worker_start_ray_commands"]:
        assert re.match(r"RAY_AUTH_MODE=token \S*ray start", command)
        assert "0.0.0.0" not in command
    assert any("--constraint ~/zscl/constraints.txt" in command for command in cluster["setup_commands"])
    assert cluster["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


def test_the_job_for_kubernetes() -> None:
    job = yaml.safe_load(RAY_JOB.read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    command = shlex.split(job["spec"]["entrypoint"])
    assert command[:2] == ["zscl", "run"]
    assert (ROOT / "experiments" / Path(command[2]).name).is_file()
    cluster = job["spec"]["rayClusterSpec"]
    [ray] = re.findall(r"^ray==(\S+)", (ROOT / "constraints.txt").read_text(), flags=re.M)
    assert cluster["rayVersion"] == ray
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        [container] = pod["containers"]
        environment: dict[str, Any] = {each["name"]: each for each in container["env"]}
        assert environment["RAY_AUTH_MODE"]["value"] == "token"
        assert environment["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]["name"] == "zscl-token"
        assert {mount["name"] for mount in container["volumeMounts"]} == {each["name"] for each in pod["volumes"]}
    [workers] = cluster["workerGroupSpecs"]
    resources = workers["template"]["spec"]["containers"][0]["resources"]
    assert resources["limits"]["nvidia.com/gpu"] == "1"
    assert workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"]


def test_the_image_has_the_packages_of_the_constraints() -> None:
    text = (ROOT / "deploy/Containerfile").read_text()
    assert "pip install --no-cache-dir --constraint /opt/zscl/constraints.txt '/opt/zscl[s3]'" in text
    assert text.rindex("USER ray") > text.rindex("RUN")


def test_nothing_is_open_to_the_world() -> None:
    text = FILE.read_text()
    cluster = yaml.safe_load(text)
    assert "0.0.0.0" not in text  # neither a listening address nor an allowed range may cover all addresses
    assert "::/0" not in text
    groups = [node["node_config"]["SecurityGroupIds"] for node in cluster["available_node_types"].values()]
    assert groups == [["<security-group>"]] * 2  # otherwise, Ray creates a group that opens SSH to the internet
    assert "security_group" not in cluster["provider"]
    assert [command for command in cluster["head_start_ray_commands"] if "--dashboard-host=127.0.0.1" in command]
    assert cluster["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
