"""A run's folder in object storage: what changes, and only that, whole, both ways."""

import errno
import os
import pwd
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from botocore.exceptions import EndpointConnectionError
from support.errors import refused

from schemas.errors import ErrorCode
from schemas.experiment import Experiment
from zscl.runtime.atomic_io import quarantine
from zscl.sequence import object_store as module
from zscl.sequence.layout import CHECKPOINT
from zscl.sequence.object_store import RemoteSync, node_local_sync, storage_url
from zscl.sequence.run import run_sequence

pytest_plugins = ["support.object_storage"]


@pytest.fixture
def two(tmp_path: Path, bucket: Any) -> tuple[RemoteSync, RemoteSync]:
    """The folders of two nodes."""
    url = f"s3://bucket/{tmp_path.name}/run"
    return RemoteSync(url, tmp_path / "one/run"), RemoteSync(url, tmp_path / "other/run")


def content(folder: Path) -> dict[str, bytes]:
    files = [file for file in folder.rglob("*") if file.is_file() and not file.name.startswith(".")]
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def test_one_node_pulls_what_another_pushes(two: tuple[RemoteSync, RemoteSync]) -> None:
    one, other = two
    write(one.folder / "stages/1-first/model/weights", "first")
    write(one.folder / "stages/1-first/training.json", "{}")
    write(one.folder / "checkpoint.pt", "step 1")
    write(one.folder / ".half.partial", "not whole")
    one.push()
    other.pull()
    assert content(other.folder) == content(one.folder)
    assert not (other.folder / ".half.partial").exists()
    write(one.folder / "checkpoint.pt", "step 2")  # of the same size
    one.push()
    other.pull()
    assert (other.folder / "checkpoint.pt").read_text() == "step 2"
    (one.folder / "checkpoint.pt").unlink()
    one.push()
    other.pull()
    assert not (other.folder / "checkpoint.pt").exists()
    assert "checkpoint.pt" not in one.list_remote()


def test_unchanged_files_are_not_transferred(
    two: tuple[RemoteSync, RemoteSync], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = two
    write(one.folder / "journal.jsonl", "a line\n")
    one.push()
    other.pull()
    moved: list[str] = []
    monkeypatch.setattr(RemoteSync, "_upload", lambda self, name: moved.append(name))
    monkeypatch.setattr(RemoteSync, "_download", lambda self, name, file: bool(moved.append(name)))
    for mirror in (one, other, RemoteSync(one.url, one.folder)):  # the last: another process
        mirror.push()
        mirror.pull(exact=True)
    assert moved == []


def test_local_changes_stay_unless_the_pull_is_exact(two: tuple[RemoteSync, RemoteSync]) -> None:
    one, other = two
    write(one.folder / "state.json", "running")
    one.push()
    other.pull()
    write(other.folder / "state.json", "killed")
    write(other.folder / "left.json", "of a worker that was given up")
    other.pull()
    assert content(other.folder) == {"state.json": b"killed", "left.json": b"of a worker that was given up"}
    other.pull(exact=True)
    assert content(other.folder) == {"state.json": b"running"}


def test_files_that_mark_others_as_complete_are_transferred_last(
    two: tuple[RemoteSync, RemoteSync], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = two
    names = ["result.json", "stages/1-first/accuracy.json", "stages/1-first/training.json", "stages/1-first/weights"]
    for name in names:
        write(one.folder / name, name)
    order: list[str] = []
    send, fetch = RemoteSync._upload, RemoteSync._download
    monkeypatch.setattr(RemoteSync, "_upload", lambda self, name: order.append(name) or send(self, name))
    monkeypatch.setattr(RemoteSync, "_download", lambda self, name, file: order.append(name) or fetch(self, name, file))
    one.push()
    other.pull()
    assert order == [*reversed(names), *reversed(names)] == [*names[::-1]] * 2


def test_push_async_pushes_in_the_background(
    two: tuple[RemoteSync, RemoteSync], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, _ = two
    write(one.folder / "journal.jsonl", "a line\n")
    one.push_async()
    assert one.list_remote() == {}  # too early
    monkeypatch.setattr(module, "SYNC_SECONDS", 0.0)
    time.sleep(0.01)
    one.push_async()
    deadline = time.monotonic() + 300
    while not one.list_remote() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert list(one.list_remote()) == ["journal.jsonl"]


def test_storage_that_cannot_be_written_is_refused(tmp_path: Path, bucket: Any) -> None:
    RemoteSync("s3://bucket/runs/run", tmp_path).check()
    with refused(ErrorCode.NOT_WRITABLE, "compute.storage") as error:
        RemoteSync("s3://no-such-bucket/run", tmp_path).check()
    assert "s3://no-such-bucket/run" in str(error.value)
    with refused(ErrorCode.INVALID_VALUE, "compute.storage"):
        RemoteSync("nowhere://run", tmp_path)


def test_a_file_that_vanishes_during_a_pull_is_skipped(
    two: tuple[RemoteSync, RemoteSync], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = two
    write(one.folder / "checkpoint.pt", "of a stage that ends")
    one.push()
    there = one.list_remote()
    (one.folder / "checkpoint.pt").unlink()
    one.push()
    monkeypatch.setattr(other, "list_remote", lambda: there)
    other.pull()
    assert content(other.folder) == {}


@pytest.mark.parametrize("exactly", [True, False])
@pytest.mark.parametrize("below", ["", "stages", "stages/1-first", "stages/1-first/model"])
def test_a_failed_listing_removes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exactly: bool, below: str
) -> None:
    """On a mounted disk, whose folders fsspec takes for empty when it cannot list them."""
    (tmp_path / "storage").mkdir()
    mirror = RemoteSync((tmp_path / "storage/run").as_uri(), tmp_path / "here/run")
    write(mirror.folder / "stages/1-first/training.json", "{}")
    write(mirror.folder / "stages/1-first/model/weights", "first")
    write(mirror.folder / "zero_shot.json", "{}")
    mirror.push()
    before, scandir, failures = content(mirror.folder), os.scandir, iter([errno.ESTALE, errno.EIO])

    def failing(path: Any) -> Any:
        if Path(path) == tmp_path / "storage/run" / below:
            for number in failures:
                raise OSError(number, "storage is away")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", failing)
    mirror.pull(exact=exactly)
    assert next(failures, None) is None
    assert content(mirror.folder) == before
    monkeypatch.undo()
    assert RemoteSync(mirror.url, tmp_path / "other/run").list_remote().keys() == before.keys()
    assert RemoteSync(f"{mirror.url}-2", tmp_path / "third/run").list_remote() == {}


def test_quarantined_files_stay_on_their_node(two: tuple[RemoteSync, RemoteSync]) -> None:
    """A checkpoint may have gigabytes, and nobody reads a damaged one."""
    one, other = two
    for name in (CHECKPOINT, "journal.jsonl", "stages/1-first/training.json"):
        write(one.folder / name, name)
    one.push()
    aside = [quarantine(one.folder / name) for name in (CHECKPOINT, "stages/1-first")]
    one.push()
    other.pull()
    assert list(content(other.folder)) == list(other.list_remote()) == ["journal.jsonl"]
    one.pull(exact=True)
    assert all(each is not None and each.exists() for each in aside)


def test_excluded_folders_are_not_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray leaves one for each group of workers."""
    (tmp_path / "storage").mkdir()
    mirror = RemoteSync((tmp_path / "storage/run").as_uri(), tmp_path / "here/run")
    for name in ("ray/group/state.json", ".cache/file", "stages/.half.partial/weights", "stages/ray/training.json"):
        write(tmp_path / "storage/run" / name, "{}")
    listed: list[str] = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(str(path)) or scandir(path))
    assert list(mirror.list_remote()) == ["stages/ray/training.json"]
    root = tmp_path / "storage/run"
    assert [Path(path).relative_to(root).as_posix() for path in listed] == [".", "stages", "stages/ray"]


def test_a_user_without_a_name_has_a_node_local_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)

    def unknown(user: int) -> None:
        raise KeyError(user)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    folder = node_local_sync("s3://bucket/runs/own").folder
    assert folder == node_local_sync("s3://bucket/runs/own").folder
    assert f"zscl-{os.getuid()}" in folder.parts


def test_unavailable_storage_is_retried(two: tuple[RemoteSync, RemoteSync], monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = two
    write(one.folder / "journal.jsonl", "a line\n")
    put, failures = (
        type(one._storage).put_file,
        iter([ConnectionResetError, EndpointConnectionError(endpoint_url="http://storage")]),
    )

    def failing(*given: Any, **named: Any) -> Any:
        for failure in failures:
            raise failure
        return put(one._storage, *given, **named)

    monkeypatch.setattr(one._storage, "put_file", failing)
    one.push()
    other.pull()
    assert content(other.folder) == content(one.folder)


def test_a_run_resumes_on_another_node(
    experiment: Callable[..., Experiment], tmp_path: Path, two: tuple[RemoteSync, RemoteSync]
) -> None:
    from zscl.training.checkpoint import StoppedError

    one, other = two
    made, cpu = experiment(), torch.device("cpu")
    whole = run_sequence(made, tmp_path / "whole/run", device=cpu)
    asked = iter(range(100))
    with pytest.raises(StoppedError):
        run_sequence(made, one.folder, device=cpu, stop_requested=lambda: next(asked) > 8, sync=one)
    assert (one.folder / "stages").is_dir()
    one.push()
    other.pull(exact=True)
    result = run_sequence(made, other.folder, device=cpu, sync=other)
    assert result.accuracy_matrix == whole.accuracy_matrix
    other.push()
    assert {"result.json", "journal.jsonl", "zero_shot.json"} <= other.list_remote().keys()
    assert "checkpoint.pt" not in other.list_remote()


def test_a_folder_keeps_its_name_in_storage() -> None:
    assert storage_url("s3://bucket/runs/", Path("/here/own")) == "s3://bucket/runs/own"
