"""A dry run refuses what would make a run fail in its first minute, and lists its checks."""

import json
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from filelock import FileLock
from ruamel.yaml import YAML
from support.command import Command
from support.data import make_task
from support.errors import refused

from orchestrate.runs import dry_run
from schemas.errors import ErrorCode, InputError
from schemas.experiment import Experiment
from zscl.sequence.resolve import resolve

Zscl = Callable[..., Command]
Make = Callable[..., Experiment]


def no_cluster() -> dict[str, float]:
    pytest.fail("connected to a cluster that is not named")


@pytest.fixture
def checked(experiment: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, str]]:
    """A function that checks an experiment with changes; returns the outcomes by name."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def check(offline: bool = False, **changes: Any) -> dict[str, str]:
        resolved = resolve(experiment(**changes))
        checklist = dry_run.check_run(resolved, tmp_path / "runs/mine", offline, no_cluster)
        assert len(checklist.lines) == len(checklist.checks)
        return {check.name: f"{check.status}: {check.detail}" for check in checklist.checks}

    return check


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_all_checks_are_listed(checked: Callable[..., dict[str, str]], tmp_path: Path) -> None:
    outcomes = checked()
    assert list(outcomes) == [
        "recipe, data and model", "shards against their manifest", "folder", "storage", "cluster", "tracking", "disk",
    ]  # fmt: skip
    assert outcomes["recipe, data and model"].startswith("ok: 3 stages, a model of ")
    # Each task has three training shards and two of test images.
    assert outcomes["shards against their manifest"] == "ok: the sizes of 15 shards, the SHA-256 of 15"
    assert outcomes["folder"] == f"ok: {tmp_path}/runs/mine can be written"
    assert outcomes["storage"] == "skipped: no compute.storage"
    assert outcomes["cluster"].startswith("ok: this machine: ")
    assert outcomes["tracking"] == f"ok: sqlite:///{tmp_path}/runs/mlflow.db will be made"
    assert outcomes["disk"].startswith("ok: ")
    assert list(tmp_path.glob("runs*")) == []  # nothing was created
    assert checked(offline=True)["tracking"] == "skipped: --offline"


def test_a_shard_that_differs_from_its_manifest(
    checked: Callable[..., dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task(tmp_path / "task", seed=0)
    shard = task / "train/1.tar"
    content = shard.read_bytes()
    shard.write_bytes(content.replace(b"IDAT", b"IDAX", 1))
    line = checked(tasks=[str(task)])["shards against their manifest"]
    assert line.startswith(f"failed: {shard}: found the SHA-256 ")
    assert f"{task}/zscl.json; copy the shard again, or delete the manifest" in line
    monkeypatch.setattr(dry_run, "HASH_SECONDS", 0.0)
    line = checked(tasks=[str(task)])["shards against their manifest"]
    assert line == "ok: the sizes of 5 shards, the SHA-256 of 0, in 0 s; `zscl data check` checks all of them"
    shard.write_bytes(content)
    manifest = json.loads((task / "zscl.json").read_text())
    manifest["splits"]["train"].append({"file": "9.tar", "samples": 1, "bytes": 1, "sha256": ""})
    (task / "zscl.json").write_text(json.dumps(manifest))
    line = checked(tasks=[str(task)])["shards against their manifest"]
    assert line == f"failed: {task}/train/9.tar: found no such file, but {task}/zscl.json lists it"
    (task / "zscl.json").unlink()
    assert checked(tasks=[str(task)])["shards against their manifest"] == "skipped: no task has a zscl.json"


@pytest.mark.parametrize(
    ("existing_file", "field"),
    [("runs", "--out"), ("runs/teacher", "--out"), ("cache", "compute.shard_cache")],
)
def test_a_folder_that_cannot_be_written(
    checked: Callable[..., dict[str, str]], tmp_path: Path, existing_file: str, field: str
) -> None:
    (tmp_path / existing_file).parent.mkdir(exist_ok=True)
    (tmp_path / existing_file).write_text("")
    line = checked(offline=True, compute={"device": "cpu", "shard_cache": str(tmp_path / "cache")})["folder"]
    assert line.startswith("failed: ")
    assert "cannot be written (" in line
    assert field in line


def test_a_run_that_another_process_has_locked(checked: Callable[..., dict[str, str]], tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    with FileLock(tmp_path / "runs/.mine.lock"):
        assert "found another process at work on this run" in checked(offline=True)["folder"]
    assert checked(offline=True)["folder"].startswith("ok")


def test_a_finished_run_is_not_checked(checked: Callable[..., dict[str, str]], tmp_path: Path) -> None:
    (tmp_path / "runs/mine").mkdir(parents=True)
    (tmp_path / "runs/mine/result.json").write_text("{}")
    assert checked(tracking={"uri": "http://127.0.0.1:9"}) == {"run": "ok: finished before, nothing is left to do"}


def test_a_full_disk(checked: Callable[..., dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2_000_000))
    assert "found 2 MB free on its disk, expected" in checked(offline=True)["disk"]


def test_a_machine_without_enough_resources(
    checked: Callable[..., dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchestrate.cluster import connect as cluster

    resources = {"CPU": 2.0, "GPU": 0.0}
    monkeypatch.setattr(cluster, "local_resources", lambda: resources)
    assert checked(offline=True)["cluster"] == "ok: this machine: 2 CPUs, 0 GPUs"
    for compute, sentence in (
        ({"device": "gpu"}, "compute.workers: 1 worker would need 1 GPU, found 0"),
        ({"device": "cpu", "workers": 3}, "compute.workers: 3 workers would need 3 CPUs, found 2"),
        ({"device": "cpu", "workers": 2, "evaluation": "overlapped"}, "would need 3 CPUs, found 2"),
    ):
        assert sentence in checked(offline=True, compute=compute)["cluster"]


def test_a_store_that_cannot_record_the_run(
    checked: Callable[..., dict[str, str]],
    tmp_path: Path,
    empty_store: Path,
    silent_port: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from mlflow.tracking import MlflowClient

    (tmp_path / "folder.db").mkdir()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/mlflow-artifacts").write_text("")
    (tmp_path / "words.db").write_text("these are words" * 100)
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    assert checked(tracking={"uri": uri})["tracking"] == f"ok: {uri}: experiment 'zscl' will be created"
    client = MlflowClient(uri)
    client.delete_experiment(client.create_experiment("gone"))
    monkeypatch.setattr(dry_run, "TIMEOUT_SECONDS", 2.0)
    for tracking, sentence in (
        ({"uri": f"sqlite:///{tmp_path}/folder.db"}, "folder.db, which is not a writable file"),
        ({"uri": f"sqlite:///{tmp_path}/words.db"}, "tracking.uri: "),
        ({"uri": f"sqlite:///{tmp_path}/taken/mlflow.db"}, "mlflow-artifacts: cannot be written (is not a folder)"),
        ({"uri": uri, "experiment": "gone"}, "tracking.experiment: found 'gone' deleted"),
        ({"uri": "http://127.0.0.1:9"}, "tracking.uri: "),
        ({"uri": f"http://127.0.0.1:{silent_port}"}, "did not respond within 2 s. Check the address and the network"),
        ({"uri": "nothing://at.all"}, "tracking.uri: "),
    ):
        line = checked(tracking=tracking)["tracking"]
        assert line.startswith("failed: ")
        assert sentence in line


def test_storage_that_cannot_be_written(
    checked: Callable[..., dict[str, str]], silent_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = {"device": "cpu", "storage": "gs://bucket/runs"}  # whose client is not installed
    assert (
        "compute.storage: found gs://bucket/runs/mine, which cannot be opened"
        in checked(offline=True, compute=compute)["storage"]
    )
    monkeypatch.setattr(dry_run, "TIMEOUT_SECONDS", 0.5)
    compute["storage"] = f"http://127.0.0.1:{silent_port}/runs"
    assert checked(offline=True, compute=compute)["storage"].startswith("failed: compute.storage: ")


def test_all_failures_are_reported_with_the_list_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zscl: Zscl, recipe: Callable[..., dict[str, Any]]
) -> None:
    monkeypatch.chdir(tmp_path)
    content = recipe(tracking={"uri": f"sqlite:///{tmp_path}"}, compute={"device": "cpu", "shard_cache": "file"})
    (tmp_path / "file").write_text("")
    search = {"domains": {"optimisation.learning_rate": {"choice": [0.1, 0.2]}}, "sampler": "grid", "objectives": "avg"}
    YAML(typ="safe").dump(content, tmp_path / "recipe.yaml")
    YAML(typ="safe").dump({**content, "search": search}, tmp_path / "search.yaml")
    for command in (("run", "recipe.yaml"), ("search", "search.yaml")):
        failed = zscl(*command, "--dry-run", "--out", "runs/mine")
        assert (failed.code, failed.out) == (2, "")
        *checks, first, second = failed.error.splitlines()
        assert [line.partition(": ")[2].partition(" ")[0] for line in checks] == [
            "ok", "ok", "failed", "skipped", "ok", "failed", "ok",
        ]  # fmt: skip
        assert first.startswith(f"error: {tmp_path}/file: cannot be written (is not a folder)")
        assert second.startswith(f"tracking.uri: found {tmp_path}, which is not a writable file")
        passed = zscl(*command, "--dry-run", "--out", "runs/mine", "--offline", "--set", "compute.shard_cache=null")
        assert (passed.code, passed.error) == (0, "")
        assert "  - 'tracking: skipped (--offline)'\n" in passed.out
    assert not (tmp_path / "runs").exists()


def test_a_failed_check_does_not_stop_the_others() -> None:
    checklist = dry_run.Checklist()

    def fail() -> str:
        raise InputError("found this, expected that")

    checklist.add("one", fail)
    checklist.add("two", lambda: "")
    assert checklist.lines == ["one: failed (found this, expected that)", "two: ok"]
    notes: list[str] = []
    with refused(ErrorCode.FAILED) as error:
        checklist.raise_on_failure(notes.append)
    assert str(error.value) == "found this, expected that"
    assert notes == ["one: failed", "two: ok"]
