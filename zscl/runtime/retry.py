"""Retries of storage access that fails with a transient error."""

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


PATIENCE_SECONDS = 300.0  # with storage that fails: a server that restarts is back by then


T = TypeVar("T")


# Errors that another attempt may not meet: of a device, a network file system, a connection, or a resource in use.
TRANSIENT_ERRNOS = frozenset(
    {
        errno.EIO, errno.EREMOTEIO, errno.ESTALE, errno.EAGAIN, errno.EINTR, errno.EBUSY, errno.ENOLCK, errno.ENFILE,
        errno.ETIMEDOUT, errno.ETIME, errno.ECONNRESET, errno.ECONNABORTED, errno.ECONNREFUSED, errno.ENOTCONN,
        errno.ESHUTDOWN, errno.EPIPE, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH,
        errno.ENETRESET, errno.ENOBUFS, errno.ECOMM, errno.ENOLINK,
    }
)  # fmt: skip


# Connection errors of the clients below fsspec (botocore, aiohttp, requests, urllib3, Google's, Azure's), which are
# optional, so that their classes cannot be imported here.
TRANSIENT_CLASSES = frozenset(
    {
        "ConnectionError", "TimeoutError", "Timeout", "HTTPClientError", "ClientConnectionError", "ClientPayloadError",
        "ChunkedEncodingError", "ProtocolError", "IncompleteRead", "TransportError", "ServerError",
        "ServiceRequestError", "ServiceResponseError", "ResponseStreamingError", "gaierror",
    }
)  # fmt: skip


TRANSIENT_STATUSES = frozenset({408, 425, 429})  # of HTTP, beside those from 500 on


MISSING = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EEXIST})  # what a folder that is away shows itself by


def is_transient(error: BaseException) -> bool:
    """Tell whether another attempt may succeed without anything being changed by the user.

    A full disk and a used-up quota (ENOSPC, EDQUOT) are not transient: nobody makes room within minutes, and the run
    goes on from its last checkpoint once somebody has.

    Args:
        error: what an access to storage failed with.

    Returns:
        `True` for errors of a connection, of a server, or of a device that may come back.
    """
    if isinstance(error, OSError) and error.errno is not None and error.errno > 0:
        return error.errno in TRANSIENT_ERRNOS
    if TRANSIENT_CLASSES & {each.__name__ for each in type(error).__mro__}:
        return True
    response = getattr(error, "response", None)
    metadata = response.get("ResponseMetadata", {}) if isinstance(response, Mapping) else {}
    statuses = [metadata.get("HTTPStatusCode"), *(getattr(error, name, None) for name in ("status", "code"))]
    return any(isinstance(status, int) and (status in TRANSIENT_STATUSES or 500 <= status < 600) for status in statuses)


def retry_io(
    access: Callable[[], T], seconds: float = PATIENCE_SECONDS, must_exist: Path | None = None, what: object = ""
) -> T:
    """Access storage, and try again while it fails with a transient error. Each retry is logged.

    Args:
        access: what is tried; it may be called several times.
        seconds: how long.
        within: a folder that was there before. While it is not, the storage that it lies on is away, which shows as a
            missing file.
        what: names the file in the log, where the error does not.

    Returns:
        What `access` returned.

    Raises:
        OSError: it failed with an error that is not transient, or still fails after so many seconds.
    """
    started, pause = time.monotonic(), 0.1
    while True:
        try:
            return access()
        except Exception as error:
            away = (
                must_exist is not None
                and isinstance(error, OSError)
                and error.errno in MISSING
                and not _is_there(must_exist)
            )
            left = seconds - (time.monotonic() - started)
            if not (away or is_transient(error)) or pause > left:
                raise
            reason = f"{must_exist} is away" if away else mask(" ".join(str(error).split()) or type(error).__name__)
            named = f"{what}: " if str(what) and str(what) not in reason else ""
            log.warning("%s%s; trying again in %.1f s, for %.0f s more", named, reason, pause, left)
        time.sleep(pause)
        pause = min(2 * pause, 5.0)


def _is_there(folder: Path) -> bool:
    try:
        return folder.is_dir()
    except OSError:
        return False


def os_error_of(error: Exception) -> OSError:
    """Turn what safetensors and torch make of an operating system's error back into that, with its number.

    Args:
        error: whose message ends in "(os error 28)", say, or which was raised from an `OSError`.

    Returns:
        An `OSError` with that number, or without one.
    """
    cause = error.__cause__ or error.__context__
    if isinstance(cause, OSError):
        return cause
    number = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else OSError(str(error))


def read_text_if_exists(file: Path, run: Path) -> str:
    """Read a text file; nothing where there is no such file. While the folder around it is away, wait.

    A file without content gives a line break, so that it is not taken for none.
    """

    def read() -> str:
        try:
            return file.read_text(encoding="utf-8", errors="replace") or "\n"
        except FileNotFoundError:
            if not run.is_dir():
                raise
            return ""

    return retry_io(read, must_exist=run)


def try_acquire(lock: FileLock, seconds: float) -> bool:
    """Take a lock, if that is possible within so many seconds."""
    try:
        lock.acquire(timeout=seconds)
    except Timeout:
        return False
    return True
