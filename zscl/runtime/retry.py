"""Retries of file system and storage operations that fail with transient errors."""

import errno
import logging
import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout

from schemas.redaction import mask

log = logging.getLogger(__name__)

RETRY_SECONDS = 300.0  # default timeout: long enough for the restart of a storage server

T = TypeVar("T")

# Errors of a device, a network file system, a connection, or a resource in use, after which a retry may succeed.
TRANSIENT_ERRNOS = frozenset(
    {
        errno.EIO, errno.EREMOTEIO, errno.ESTALE, errno.EAGAIN, errno.EINTR, errno.EBUSY, errno.ENOLCK, errno.ENFILE,
        errno.ETIMEDOUT, errno.ETIME, errno.ECONNRESET, errno.ECONNABORTED, errno.ECONNREFUSED, errno.ENOTCONN,
        errno.ESHUTDOWN, errno.EPIPE, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH,
        errno.ENETRESET, errno.ENOBUFS, errno.ECOMM, errno.ENOLINK,
    }
)  # fmt: skip

# Names of the connection errors of fsspec's clients (botocore, aiohttp, requests, urllib3, Google's, Azure's). The
# clients are optional dependencies, so the classes cannot be imported.
TRANSIENT_CLASSES = frozenset(
    {
        "ConnectionError", "TimeoutError", "Timeout", "HTTPClientError", "ClientConnectionError", "ClientPayloadError",
        "ChunkedEncodingError", "ProtocolError", "IncompleteRead", "TransportError", "ServerError",
        "ServiceRequestError", "ServiceResponseError", "ResponseStreamingError", "gaierror",
    }
)  # fmt: skip

TRANSIENT_STATUSES = frozenset({408, 425, 429})  # HTTP statuses, in addition to those from 500 to 599

MISSING_FOLDER_ERRNOS = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EEXIST})  # on an unmounted volume


def is_transient(error: BaseException) -> bool:
    """Return whether a retry may succeed without any change by the user.

    A full disk (ENOSPC) and an exceeded quota (EDQUOT) are not transient: somebody has to free space, which rarely
    happens within minutes. Afterwards, the user can resume the run from its last checkpoint.

    Args:
        error: The error that a storage operation raised.

    Returns:
        `True` for errors of a connection, of a server, or of a device that may recover.
    """
    if isinstance(error, OSError) and error.errno is not None and error.errno > 0:
        return error.errno in TRANSIENT_ERRNOS
    if TRANSIENT_CLASSES & {base.__name__ for base in type(error).__mro__}:
        return True
    response = getattr(error, "response", None)
    metadata = response.get("ResponseMetadata", {}) if isinstance(response, Mapping) else {}
    statuses = [metadata.get("HTTPStatusCode"), *(getattr(error, name, None) for name in ("status", "code"))]
    return any(isinstance(status, int) and (status in TRANSIENT_STATUSES or 500 <= status < 600) for status in statuses)


def retry_io(
    operation: Callable[[], T],
    timeout: float = RETRY_SECONDS,
    must_exist: Path | None = None,
    description: object = "",
) -> T:
    """Call an operation, and retry with exponential backoff while it fails with a transient error.

    Each retry is logged. The pauses double from 0.1 s to at most 5 s.

    Args:
        operation: The function to call. It may be called several times.
        timeout: The maximum time from the first call to the last retry [s].
        must_exist: A folder that is known to exist. If it is missing, its storage is regarded as temporarily
            unavailable, and errors about missing files are retried.
        description: The file or URL, which is added to the log message if the error does not contain it.

    Returns:
        The result of the operation.

    Raises:
        Exception: The operation failed with an error that is not transient, or the timeout has elapsed.
    """
    start, pause = time.monotonic(), 0.1
    while True:
        try:
            return operation()
        except Exception as error:
            is_unavailable = (
                must_exist is not None
                and isinstance(error, OSError)
                and error.errno in MISSING_FOLDER_ERRNOS
                and not _is_folder(must_exist)
            )
            remaining = timeout - (time.monotonic() - start)
            if not (is_unavailable or is_transient(error)) or pause > remaining:
                raise
            if is_unavailable:
                reason = f"{must_exist} is not available"
            else:
                reason = mask(" ".join(str(error).split()) or type(error).__name__)
            prefix = f"{description}: " if str(description) and str(description) not in reason else ""
            log.warning("%s%s; retrying in %.1f s, for %.0f s more", prefix, reason, pause, remaining)
        time.sleep(pause)
        pause = min(2 * pause, 5.0)


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        return False


def to_os_error(error: Exception) -> OSError:
    """Return the `OSError` that caused an error raised by safetensors or PyTorch.

    Args:
        error: The error. Its cause is an `OSError`, or its message contains an error number, as in "(os error 28)".

    Returns:
        The `OSError`. Its `errno` is `None` if the message contains no number.
    """
    cause = error.__cause__ or error.__context__
    if isinstance(cause, OSError):
        return cause
    number = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else OSError(str(error))


def read_text_if_exists(file: Path, folder: Path) -> str:
    """Read a text file that may not exist, and retry while its folder is unavailable.

    Args:
        file: The file, in UTF-8.
        folder: The folder of the file, which must exist.

    Returns:
        The content; a line break for an empty file; an empty text if the file does not exist.
    """

    def read() -> str:
        try:
            return file.read_text(encoding="utf-8", errors="replace") or "\n"
        except FileNotFoundError:
            if not folder.is_dir():
                raise
            return ""

    return retry_io(read, must_exist=folder)


def try_acquire(lock: FileLock, timeout: float) -> bool:
    """Try to acquire a lock within `timeout` seconds, and return whether that succeeded."""
    try:
        lock.acquire(timeout=timeout)
    except Timeout:
        return False
    return True
