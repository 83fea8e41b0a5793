"""One run, one owner: a lock beside the run's folder, and who holds it.

The lock is the operating system's (`flock`) and goes with its process, however that ends; the owner's name is for
people. A name without a lock is that of a process that was killed.
"""

import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout
from pydantic import ValidationError

from orchestrate.lifecycle.paths import check_writable
from schemas.base import StrictModel
from schemas.errors import InputError
from zscl.runtime.atomic_io import remove_quietly, write_text


class Owner(StrictModel):
    """The process at work on a run."""

    host: str
    process: int
    since: str

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}, started {self.since}"


@contextmanager
def run_lock(
    folder: Path,
    note: Callable[[str], None] = lambda text: None,
    advice: str = "choose another place with --out",
) -> Iterator[None]:
    """Keep a run's folder for this process.

    Args:
        folder: the run's; it need not exist.
        note: told when a killed process had it before.
        advice: what to do where it cannot be written.

    Raises:
        InputError: another process has it, or it cannot be written.
    """
    check_writable(folder, advice)
    check_writable(folder.parent, advice)  # where the lock lies
    folder.parent.mkdir(parents=True, exist_ok=True)
    name = _name(folder)
    try:
        with FileLock(folder.with_name(f".{folder.name}.lock"), timeout=0):
            if killed := _read(name):
                note(f"{folder}: its owner ({killed}) is gone without a word, taking over")
            since = datetime.now(UTC).isoformat(sep=" ", timespec="seconds")
            write_text(name, Owner(host=platform.node(), process=os.getpid(), since=since).model_dump_json())
            try:
                yield
            finally:
                remove_quietly(name)
    except Timeout as error:
        raise InputError(owner_message(folder)) from error


def owner_message(folder: Path) -> str:
    """Return the sentence about a run that another process is at work on."""
    found = f"{folder}: found another process at work on this run ({_read(_name(folder)) or 'unknown'})"
    return f"{found}, expected none; end it, or choose another folder"


def _name(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.owner.json")


def _read(file: Path) -> Owner | None:
    try:
        return Owner.model_validate_json(file.read_text())
    except (OSError, ValidationError):
        return None
