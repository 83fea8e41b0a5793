"""Writes that are whole or not there, names that are nearly right, and digests."""

import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout

from schemas.base import did_you_mean

PATIENCE_SECONDS = 300.0  # with storage that fails: a server that restarts is back by then
LONGEST_BESIDE = 200  # bytes of a name that are part of a temporary one's
SYSTEM_FILES = frozenset({"thumbs.db", "desktop.ini"})  # of Windows; those of macOS begin with a dot
T = TypeVar("T")


def patiently(access: Callable[[], T], seconds: float = PATIENCE_SECONDS) -> T:
    """Access storage, again and again while it fails.

    Raises:
        OSError: it still fails after so many seconds.
    """
    started, pause = time.monotonic(), 0.1
    while True:
        try:
            return access()
        except OSError:
            if time.monotonic() - started + pause > seconds:
                raise
        time.sleep(pause)
        pause = min(2 * pause, 5.0)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Give a temporary folder that takes `folder`'s place when the block ends, and vanishes when it fails."""
    temporary = _beside(folder)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.rglob("*"):
            _flush(file)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
        _flush(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
    """A text file's content, or nothing where there is no such file; while the folder around it is away, wait."""

    def read() -> str:
        try:
            return file.read_text(encoding="utf-8")
        except FileNotFoundError:
            if not within.is_dir():
                raise
            return ""

    return patiently(read)


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
