"""Tests that a run has the results of an undisturbed run after the loss of nodes, workers or disk space."""

import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster
from support.faults import a_worker, add_node, ended, numbers, same, starts_of, train_workers, trained, until

from zscl.sequence.layout import CHECKPOINT, JOURNAL

pytest_plugins = ["support.faulty_cluster"]
pytestmark = [pytest.mark.faults, pytest.mark.timeout(3600)]
Launch = Callable[..., Any]


@pytest.mark.fault("The node with the workers dies; another one joins", "Ray starts the workers there; same numbers")
def test_a_node_dies(launch: Launch, tmp_path: Path, whole: Path, cluster: Cluster) -> None:
    run = tmp_path / "run"
    with launch() as process:
        until(trained(run, 30), "it trains")
        [node] = cluster.worker_nodes
        cluster.remove_node(node, allow_graceful=False)
        add_node(cluster)
        ended(process)
    assert starts_of(run) == 2
    same(whole, run)


@pytest.mark.fault(
    "A node is lost with elastic workers", "The remaining workers continue with the same global batch; same matrix"
)
def test_fewer_workers_go_on(launch: Launch, tmp_path: Path, whole: Path, cluster: Cluster) -> None:
    run, node = tmp_path / "run", add_node(cluster)
    elastic = ("compute.workers=2", "compute.min_workers=1", "compute.cpus_per_worker=2")
    with launch(*elastic) as process:
        until(trained(run, 30), "it trains")
        assert len(train_workers()) == 2
        cluster.remove_node(node, allow_graceful=False)
        ended(process)
    assert starts_of(run) >= 2
    found, expected = numbers(run), numbers(whole)
    assert found["accuracy_matrix"] == expected["accuracy_matrix"]
    for ours, theirs in zip(found["stages"], expected["stages"], strict=True):
        assert ours["images_seen"] == theirs["images_seen"]
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=0.01)


@pytest.mark.fault("One worker of two hangs (SIGSTOP)", "Abandoned after compute.hang_minutes; the workers restart")
def test_a_worker_hangs(launch: Launch, tmp_path: Path, whole: Path) -> None:
    run = tmp_path / "run"
    with launch("compute.workers=2", "compute.hang_minutes=0.25") as process:
        until(trained(run, 30), "it trains")
        a_worker().send_signal(signal.SIGSTOP)
        ended(process)
    assert starts_of(run) == 2
    assert numbers(run)["accuracy_matrix"] == numbers(whole)["accuracy_matrix"]


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[None]:
    """Context manager: mount a small separate disk at a folder."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("a small disk can be mounted by root alone")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.fault(
    "The disk is full while a checkpoint is written", "A warning; the previous checkpoint stays; same numbers"
)
def test_the_disk_is_full(launch: Launch, tmp_path: Path, whole: Path) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk, megabytes=64), launch(run="disk/run") as process:
        until(lambda: (disk / "run" / CHECKPOINT).is_file(), "there is a checkpoint")
        free = shutil.disk_usage(disk).free
        (disk / "ballast").write_bytes(b"\0" * (free - 150_000))  # space for the journal, but not for a checkpoint
        journal = disk / "run" / JOURNAL
        until(lambda: "could not be written" in journal.read_text(), "a checkpoint meets the full disk")
        assert "No space left on device" in journal.read_text()
        (disk / "ballast").unlink()
        ended(process)
        same(whole, disk / "run")


@pytest.mark.fault(
    "Storage is away for a minute", "Checkpoints are skipped with warnings, the end of a stage waits; same numbers"
)
def test_storage_is_away(launch: Launch, tmp_path: Path, whole: Path) -> None:
    storage, run = tmp_path / "storage", tmp_path / "run"
    storage.mkdir()
    run.symlink_to(storage)
    with launch() as process:
        until(trained(run, 30), "it trains")
        storage.rename(tmp_path / "away")
        time.sleep(60)
        (tmp_path / "away").rename(storage)
        ended(process)
    assert starts_of(run) == 1
    same(whole, run)
