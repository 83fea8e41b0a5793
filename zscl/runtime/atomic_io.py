"""Writes that are whole or not there, names that are nearly right, and digests."""

import errno
import hashlib
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout

from schemas.errors import did_you_mean
from schemas.redaction import mask

log = logging.getLogger(__name__)

PATIENCE_SECONDS = 300.0  # with storage that fails: a server that restarts is back by then
LONGEST_BESIDE = 200  # bytes of a name that are part of a temporary one's
SYSTEM_FILES = frozenset({"thumbs.db", "desktop.ini"})  # of Windows; those of macOS begin with a dot
ASIDE = "damaged-"  # begins the names of what is set aside
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


def patiently(
    access: Callable[[], T], seconds: float = PATIENCE_SECONDS, within: Path | None = None, what: object = ""
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
                within is not None and isinstance(error, OSError) and error.errno in MISSING and not _is_there(within)
            )
            left = seconds - (time.monotonic() - started)
            if not (away or is_transient(error)) or pause > left:
                raise
            reason = f"{within} is away" if away else mask(" ".join(str(error).split()) or type(error).__name__)
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


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Give a temporary folder that takes `folder`'s place when the block ends, and vanishes when it fails.

    What was at `folder` before is moved aside, and removed only when the new folder is in its place.
    """
    temporary, before = _beside(folder), _beside(folder)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.rglob("*"):
            _flush(file)
        if folder.is_dir() and not folder.is_symlink():
            folder.rename(before)
        try:
            temporary.rename(folder)
        except OSError:
            with suppress(OSError):
                before.rename(folder)
            raise
        _flush(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(before, ignore_errors=True)


@contextmanager
def whole_file(file: Path) -> Iterator[Path]:
    """Give a temporary file that takes `file`'s place when the block ends, and vanishes when it fails."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(file)
    try:
        yield temporary
        _flush(temporary)
        temporary.replace(file)
        _flush(file.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    """A name that no other process takes, on whatever machine."""
    name = os.fsdecode(os.fsencode(path.name)[:LONGEST_BESIDE])  # a file system takes 255 bytes
    return path.with_name(f".{name}.{secrets.token_hex(4)}.partial")


def _flush(path: Path) -> None:
    """Have a file's content, or a folder's names, on the disk: a machine may lose its power, too."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(file: Path, text: str) -> None:
    """Write a text file as a whole."""
    with whole_file(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def remove(file: Path) -> None:
    """Remove a file, if it is there and storage lets us: what is left behind does no harm."""
    with suppress(OSError):
        file.unlink(missing_ok=True)


def read_if_there(file: Path, within: Path) -> str:
    """Read a text file; nothing where there is no such file. While the folder around it is away, wait.

    A file without content gives a line break, so that it is not taken for none.
    """

    def read() -> str:
        try:
            return file.read_text(encoding="utf-8", errors="replace") or "\n"
        except FileNotFoundError:
            if not within.is_dir():
                raise
            return ""

    return patiently(read, within=within)


def set_aside(path: Path) -> Path | None:
    """Rename a damaged file or folder, so that another can be made and nothing is lost.

    Args:
        path: what is damaged.

    Returns:
        Where it lies now; nothing where it is gone.
    """
    aside = path.with_name(f"{ASIDE}{secrets.token_hex(4)}-{path.name}")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return None
    return aside


def is_hidden(name: str) -> bool:
    """Whether a file is hidden or the operating system's own: `.DS_Store`, `._*`, `__MACOSX/`, `Thumbs.db`, ….

    Args:
        name: with the folders that it is in, as a tar has it.
    """
    parts = [part for part in name.split("/") if part not in ("", ".", "..")]
    return not parts or parts[-1].lower() in SYSTEM_FILES or any(part[0] == "." or part == "__MACOSX" for part in parts)


def files_within(folder: Path) -> list[Path]:
    """The files of a folder at any depth, in the order of their paths; links are followed, hidden files are left out.

    Raises:
        OSError: a folder cannot be read.
    """
    return sorted(_files_within(folder, ()))


def _files_within(folder: Path, above: tuple[Path, ...]) -> Iterator[Path]:
    real = folder.resolve()
    if real in above:  # a link leads back to where it is
        return
    for path in folder.iterdir():
        if is_hidden(path.name):
            continue
        if path.is_dir():
            yield from _files_within(path, (*above, real))
        else:
            yield path


def nearest(path: Path) -> str:
    """The end of a sentence about a path that is not there: what is called nearly so, if anything."""
    with suppress(OSError):
        return did_you_mean(path.name, [each.name for each in path.parent.iterdir()])
    return ""


def link_folder(
    source: Path, target: Path, changed: Mapping[str, str] | None = None, without: Sequence[str] = ()
) -> None:
    """Let a folder's files be found elsewhere, too, as a whole: linked, or copied where the file system cannot.

    Args:
        source: the folder.
        target: where else.
        changed: content of files that are others there.
        without: names, or patterns of names, that are left out.
    """
    with whole_folder(target) as temporary:
        left_out = shutil.ignore_patterns(*without)
        shutil.copytree(source, temporary, copy_function=_link_or_copy, dirs_exist_ok=True, ignore=left_out)
        for name, content in (changed or {}).items():
            write_text(temporary / name, content)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        shutil.copy2(source, target)


def acquired(lock: FileLock, seconds: float) -> bool:
    """Take a lock, if that is possible within so many seconds."""
    try:
        lock.acquire(timeout=seconds)
    except Timeout:
        return False
    return True


def digest(*contents: bytes | str) -> str:
    """SHA-256 over the contents and their borders, in hexadecimal digits."""
    total = hashlib.sha256()
    for content in contents:
        content = content.encode() if isinstance(content, str) else content
        total.update(len(content).to_bytes(8))
        total.update(content)
    return total.hexdigest()


def file_digest(file: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
