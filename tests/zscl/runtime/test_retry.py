"""Retries after transient errors, and waiting for storage that is temporarily unavailable."""

import errno
import os
import time
from contextlib import suppress
from pathlib import Path

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError, ReadTimeoutError
from filelock import FileLock

from zscl.runtime.retry import is_transient, read_text_if_exists, retry_io, to_os_error, try_acquire


def test_retries_until_the_storage_recovers(monkeypatch: pytest.MonkeyPatch) -> None:
    attempts, pauses = [], list[float]()
    monkeypatch.setattr(time, "sleep", pauses.append)

    def write() -> str:
        attempts.append(1)
        if len(attempts) < 4:
            raise OSError(errno.ESTALE, "Stale file handle", "/shared/file")
        return "written"

    assert retry_io(write) == "written"
    assert pauses == [0.1, 0.2, 0.4]


def test_timeout() -> None:
    def fail() -> None:
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(OSError, match="Input/output error"):
        retry_io(fail, timeout=0.3)


def test_each_retry_is_logged_with_its_cause(caplog: pytest.LogCaptureFixture) -> None:
    failures = iter([OSError(errno.EIO, "Input/output error"), TimeoutError("https://user:secret@host is slow")])

    def read() -> str:
        for failure in failures:
            raise failure
        return "content"

    assert retry_io(read, description="/shared/file") == "content"
    first, second = caplog.messages
    assert first.startswith("/shared/file: [Errno 5] Input/output error; retrying in 0.1 s, for 300 s more")
    assert "is slow; retrying in 0.2 s" in second
    assert "secret" not in second


PERMANENT = [
    "EACCES", "EPERM", "EROFS", "ENOENT", "EISDIR", "ENOTDIR", "ENOSPC", "EDQUOT", "ENAMETOOLONG", "ELOOP", "EEXIST",
    "EINVAL", "EFBIG", "ENOTEMPTY", "EXDEV", "EMLINK", "EBADF", "EMFILE", "ENOMEM", "ENOTSUP", "ENXIO", "ENODEV",
]  # fmt: skip
TRANSIENT = [
    "EIO", "ESTALE", "EAGAIN", "EINTR", "EBUSY", "ETIMEDOUT", "ECONNRESET", "ECONNREFUSED", "ECONNABORTED", "EPIPE",
    "EHOSTUNREACH", "ENETUNREACH", "ENETDOWN", "ESHUTDOWN", "EREMOTEIO", "ENOLCK",
]  # fmt: skip


def count_attempts(failure: Exception) -> int:
    """Count the attempts of an operation that fails once."""
    attempts: list[int] = []

    def once() -> None:
        attempts.append(1)
        if len(attempts) == 1:
            raise failure

    with suppress(type(failure)):
        retry_io(once)
    return len(attempts)


@pytest.mark.parametrize("name", PERMANENT)
def test_permanent_errors_are_not_retried(name: str) -> None:
    assert count_attempts(OSError(getattr(errno, name), os.strerror(getattr(errno, name)), "/run/file")) == 1


@pytest.mark.parametrize("name", TRANSIENT)
def test_transient_errors_are_retried(name: str) -> None:
    assert count_attempts(OSError(getattr(errno, name), os.strerror(getattr(errno, name)), "/run/file")) == 2


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
        (ValueError("unrelated to storage"), 1),
    ],
)
def test_errors_of_storage_clients(failure: Exception, attempts: int) -> None:
    assert count_attempts(failure) == attempts


def test_a_missing_file_is_transient_only_while_its_folder_is_missing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(FileNotFoundError):
        retry_io(lambda: (run / "file").read_text(), must_exist=run)
    (run / "file").write_text("content")
    run.rename(tmp_path / "unmounted")
    attempts = []

    def read() -> str:
        attempts.append(1)
        if len(attempts) == 2:
            (tmp_path / "unmounted").rename(run)
        return (run / "file").read_text()

    assert retry_io(read, must_exist=run) == "content"
    assert len(attempts) == 2


def test_operating_system_error_of_a_library_error() -> None:
    error = to_os_error(RuntimeError("I/O error: No space left on device (os error 28)"))
    assert error.errno == errno.ENOSPC
    assert not is_transient(error)
    assert to_os_error(RuntimeError("something else")).errno is None


def test_optional_file(tmp_path: Path) -> None:
    assert read_text_if_exists(tmp_path / "file", tmp_path) == ""
    (tmp_path / "file").write_text("")
    assert read_text_if_exists(tmp_path / "file", tmp_path) == "\n"
    (tmp_path / "file").write_text("content")
    assert read_text_if_exists(tmp_path / "file", tmp_path) == "content"


def test_a_lock_that_another_holder_has_cannot_be_acquired(tmp_path: Path) -> None:
    first, second = (FileLock(tmp_path / "lock") for _ in range(2))
    assert try_acquire(first, 0.0)
    assert not try_acquire(second, 0.0)
    first.release()
    assert try_acquire(second, 0.0)
    second.release()
