"""Writes that are whole or not there, and storage that comes back."""

import errno
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError, ReadTimeoutError

from zscl.runtime.atomic_io import atomic_file, atomic_folder, write_text
from zscl.runtime.retry import is_transient, os_error_of, retry_io


def half(write: Callable[[Path], AbstractContextManager[Path]], path: Path) -> None:
    """Begin to write a file, or a file in a folder, and fail."""
    with write(path) as temporary:
        (temporary / "file" if temporary.is_dir() else temporary).write_text("half")
        raise OSError("full")


@pytest.mark.parametrize("write", [atomic_file, atomic_folder])
def test_a_write_that_fails_leaves_what_was_there(
    tmp_path: Path, write: Callable[[Path], AbstractContextManager[Path]]
) -> None:
    write_text(tmp_path / "before", "before")
    with pytest.raises(OSError, match="full"):
        half(write, tmp_path / "before")
    assert [path.name for path in tmp_path.iterdir()] == ["before"]
    assert (tmp_path / "before").read_text() == "before"


def test_storage_that_comes_back_takes_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    attempts, pauses = [], list[float]()
    monkeypatch.setattr(time, "sleep", pauses.append)

    def write() -> str:
        attempts.append(1)
        if len(attempts) < 4:
            raise OSError(errno.ESTALE, "Stale file handle", "/shared/file")
        return "written"

    assert retry_io(write) == "written"
    assert pauses == [0.1, 0.2, 0.4]


def test_patience_ends() -> None:
    def fail() -> None:
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(OSError, match="Input/output error"):
        retry_io(fail, seconds=0.3)


def test_each_retry_is_logged_with_its_cause(caplog: pytest.LogCaptureFixture) -> None:
    failures = iter([OSError(errno.EIO, "Input/output error"), TimeoutError("https://user:secret@host is slow")])

    def read() -> str:
        for failure in failures:
            raise failure
        return "content"

    assert retry_io(read, what="/shared/file") == "content"
    first, second = caplog.messages
    assert first.startswith("/shared/file: [Errno 5] Input/output error; trying again in 0.1 s, for 300 s more")
    assert "is slow; trying again in 0.2 s" in second
    assert "secret" not in second


PERMANENT = [
    "EACCES", "EPERM", "EROFS", "ENOENT", "EISDIR", "ENOTDIR", "ENOSPC", "EDQUOT", "ENAMETOOLONG", "ELOOP", "EEXIST",
    "EINVAL", "EFBIG", "ENOTEMPTY", "EXDEV", "EMLINK", "EBADF", "EMFILE", "ENOMEM", "ENOTSUP", "ENXIO", "ENODEV",
]  # fmt: skip
TRANSIENT = [
    "EIO", "ESTALE", "EAGAIN", "EINTR", "EBUSY", "ETIMEDOUT", "ECONNRESET", "ECONNREFUSED", "ECONNABORTED", "EPIPE",
    "EHOSTUNREACH", "ENETUNREACH", "ENETDOWN", "ESHUTDOWN", "EREMOTEIO", "ENOLCK",
]  # fmt: skip


def attempts_of(failure: Exception) -> int:
    """How often something is tried that fails once."""
    attempts: list[int] = []

    def once() -> None:
        attempts.append(1)
        if len(attempts) == 1:
            raise failure

    with suppress(type(failure)):
        retry_io(once)
    return len(attempts)


@pytest.mark.parametrize("name", PERMANENT)
def test_an_error_that_lasts_is_not_tried_again(name: str) -> None:
    assert attempts_of(OSError(getattr(errno, name), os.strerror(getattr(errno, name)), "/run/file")) == 1


@pytest.mark.parametrize("name", TRANSIENT)
def test_an_error_that_may_pass_is_tried_again(name: str) -> None:
    assert attempts_of(OSError(getattr(errno, name), os.strerror(getattr(errno, name)), "/run/file")) == 2


@pytest.mark.parametrize(
    ("failure", "attempts"),
    [
        (EndpointConnectionError(endpoint_url="http://storage"), 2),
        (ReadTimeoutError(endpoint_url="http://storage"), 2),
        (ClientError({"Error": {}, "ResponseMetadata": {"HTTPStatusCode": 503}}, "PutObject"), 2),
        (ClientError({"Error": {}, "ResponseMetadata": {"HTTPStatusCode": 403}}, "PutObject"), 1),
        (NoCredentialsError(), 1),
        (ConnectionResetError(), 2),
        (FileNotFoundError("no errno, as fsspec raises it"), 1),
        (PermissionError("no errno"), 1),
        (ValueError("no matter of storage"), 1),
    ],
)
def test_errors_of_a_storages_client_are_told_apart(failure: Exception, attempts: int) -> None:
    assert attempts_of(failure) == attempts


def test_a_missing_file_is_waited_for_only_while_its_folder_is_away(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(FileNotFoundError):
        retry_io(lambda: (run / "file").read_text(), must_exist=run)
    write_text(run / "file", "content")
    run.rename(tmp_path / "away")
    attempts = []

    def read() -> str:
        attempts.append(1)
        if len(attempts) == 2:
            (tmp_path / "away").rename(run)
        return (run / "file").read_text()

    assert retry_io(read, must_exist=run) == "content"
    assert len(attempts) == 2


def test_an_error_of_the_system_is_found_in_what_a_library_makes_of_it() -> None:
    found = os_error_of(RuntimeError("I/O error: No space left on device (os error 28)"))
    assert found.errno == errno.ENOSPC
    assert not is_transient(found)
    assert os_error_of(RuntimeError("something else")).errno is None


def test_a_folder_is_back_where_another_cannot_take_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "folder/file", "before")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if target == tmp_path / "folder" and (self / "file").read_text() == "behind":
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)

    def replace() -> None:
        with atomic_folder(tmp_path / "folder") as temporary:
            (temporary / "file").write_text("behind")

    with pytest.raises(OSError, match="Input/output"):
        replace()
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert (tmp_path / "folder/file").read_text() == "before"


def test_a_name_as_long_as_a_file_system_takes_is_written_as_a_whole(tmp_path: Path) -> None:
    for name in ("n" * 255, "\u00fc" * 127):
        write_text(tmp_path / name, "words")
        assert (tmp_path / name).read_text() == "words"
        with atomic_folder(tmp_path / f"{name[:-1]}x") as temporary:
            assert temporary.is_dir()
    assert not list(tmp_path.glob(".*"))
