"""Tests of workers on different nodes, with a shared folder, and with object storage but no shared folder."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster
from support.faults import add_node, ended, numbers, processes, starts_of, trained, until

from orchestrate.cluster.auth import bind_to_loopback
from zscl.sequence.layout import CHECKPOINT

pytest_plugins = ["support.faulty_cluster", "support.object_storage"]
pytestmark = [pytest.mark.faults, pytest.mark.timeout(3600)]
Launch = Callable[..., Any]


@pytest.fixture(scope="module")
def cluster(bucket: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Start a cluster of a head node without CPUs and two nodes with one CPU and a separate temporary folder each."""
    head = {"num_cpus": 0, "include_dashboard": False, "node_ip_address": "127.0.0.1"}
    with bind_to_loopback():
        cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.scratch = [tmp_path_factory.mktemp(f"node-{number}") for number in range(2)]
    for scratch in cluster.scratch:
        add_node(cluster, cpus=1, TMPDIR=str(scratch))
    yield cluster
    cluster.shutdown()


def scratch_of(cluster: Cluster) -> list[list[Path]]:
    """Return the folders of runs on each node."""
    return [list(scratch.glob("zscl-*/*/run")) for scratch in cluster.scratch]


def stored(bucket: Any, run: str) -> Callable[[], bool]:
    """Return a function that tells whether the checkpoint is in storage. It polls slowly to spare the S3 server."""

    def there() -> bool:
        time.sleep(0.1)
        return bool(bucket.exists(f"bucket/runs/{run}/{CHECKPOINT}"))

    return there


def close(run: Path, whole: Path) -> None:
    """Assert that a run has the results of a run in one process, within float tolerance."""
    found, expected = numbers(run), numbers(whole)
    assert found["accuracy_matrix"] == expected["accuracy_matrix"]
    for ours, theirs in zip(found["stages"], expected["stages"], strict=True):
        assert ours["images_seen"] == theirs["images_seen"]
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=0.01)


def test_workers_on_two_nodes_with_a_folder_that_both_see(launch: Launch, tmp_path: Path, whole: Path) -> None:
    with launch("compute.workers=2") as process:
        ended(process)
    close(tmp_path / "run", whole)


def test_workers_on_two_nodes_that_share_nothing(
    launch: Launch, tmp_path: Path, whole: Path, bucket: Any, cluster: Cluster
) -> None:
    run = tmp_path / "run"
    with launch("compute.workers=2", "compute.storage=s3://bucket/runs") as process:
        ended(process)
    close(run, whole)
    stored = {path.removeprefix("bucket/runs/run/") for path in bucket.find("bucket/runs/run")}
    for file in (file for file in run.rglob("*") if file.is_file() and not file.name.startswith(".")):
        assert file.relative_to(run).as_posix() in stored
    assert json.loads(bucket.cat_file("bucket/runs/run/state.json"))["status"] == "FINISHED"
    nodes = scratch_of(cluster)
    assert [len(runs) for runs in nodes] == [1, 1]  # each worker uses a separate folder
    for [folder] in nodes:
        assert (folder / "stages/1-first/model/open_clip_model.safetensors").read_bytes() == (
            run / "stages/1-first/model/open_clip_model.safetensors"
        ).read_bytes()


@pytest.mark.fault(
    "Nodes share no folder (compute.storage), and the main worker's is lost; another joins",
    "Resumed from object storage; same matrix",
)
def test_a_node_is_lost_and_one_is_added(
    launch: Launch, tmp_path: Path, whole: Path, bucket: Any, cluster: Cluster, tmp_path_factory: Any
) -> None:
    run = tmp_path / "lost"
    with launch("compute.workers=2", "compute.storage=s3://bucket/runs", run="lost") as process:
        until(stored(bucket, "lost"), "a checkpoint is in storage")
        [node, _] = cluster.worker_nodes
        cluster.remove_node(node, allow_graceful=False)
        cluster.scratch.append(tmp_path_factory.mktemp("node-2"))
        add_node(cluster, cpus=1, TMPDIR=str(cluster.scratch[-1]))
        ended(process)
    assert starts_of(run) >= 2
    close(run, whole)
    assert scratch_of(cluster)[-1]  # a worker ran on the new node


def test_a_killed_run_goes_on_where_nothing_of_it_is(launch: Launch, tmp_path: Path, whole: Path, bucket: Any) -> None:
    settings = ("compute.workers=2", "compute.storage=s3://bucket/runs", "compute.evaluation=inline")
    with launch(*settings, run="killed") as process:
        until(stored(bucket, "killed"), "a checkpoint is in storage")
        process.kill()
    until(lambda: not processes("RayTrainWorker"), "its workers are gone")
    (tmp_path / "killed").rename(tmp_path / "of another machine")
    with launch(*settings, run="killed") as process:
        ended(process)
    assert starts_of(tmp_path / "killed") == 2
    close(tmp_path / "killed", whole)
    with launch(*settings, run="killed") as process:
        assert "finished before" in ended(process)


def test_rows_are_measured_on_another_node(launch: Launch, tmp_path: Path, whole: Path, bucket: Any) -> None:
    with launch("compute.evaluation=overlapped", "compute.storage=s3://bucket/runs", run="overlapped") as process:
        ended(process)
    assert numbers(tmp_path / "overlapped")["accuracy_matrix"] == numbers(whole)["accuracy_matrix"]
    assert trained(tmp_path / "overlapped", 480)()
