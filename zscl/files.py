"""Writes that are whole or not there, and digests."""

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

PATIENCE_SECONDS = 300.0  # with storage that fails: a server that restarts is back by then
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
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
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
    temporary = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        yield temporary
        _flush(temporary)
        temporary.replace(file)
        _flush(file.parent)
    finally:
        temporary.unlink(missing_ok=True)


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
