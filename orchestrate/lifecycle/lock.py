"""Inter-process lock on a run's folder, and the file that records which process holds the lock.

The lock is a file lock of the operating system (`flock`). The system releases it when the process ends for any reason.
The owner file records which process holds the lock; it is used for messages only. If the file exists and the lock is
free, the process that wrote the file was killed.
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
from schemas.errors import ErrorCode, InputError
from zscl.runtime.atomic_io import remove_if_possible, write_text
from zscl.sequence.layout import lock_file, owner_file


class LockOwner(StrictModel):
    """The process that holds the lock on a run.

    Attributes:
        host: The host's name.
        process: The process ID.
        since: The time at which the process locked the run, in UTC.
    """

    host: str
    process: int
    since: str

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}, started {self.since}"


@contextmanager
def run_lock(
    folder: Path,
    note: Callable[[str], None] = lambda text: None,
    advice: str = "choose another folder with --out",
) -> Iterator[None]:
    """Context manager: hold the lock on a run's folder.

    Args:
        folder: The run's folder; it need not exist.
        note: Called with a message if a previous process was killed while it held the lock.
        advice: The advice in the error message if the folder cannot be written.

    Raises:
        InputError: Another process holds the lock, or the folder cannot be written.
    """
    check_writable(folder, advice)
    check_writable(folder.parent, advice)  # the parent folder contains the lock file
    folder.parent.mkdir(parents=True, exist_ok=True)
    file = owner_file(folder)
    try:
        with FileLock(lock_file(folder), timeout=0):
            if killed := _read_owner(file):
                note(f"{folder}: its owner ({killed}) has ended without releasing the lock, taking over")
            since = datetime.now(UTC).isoformat(sep=" ", timespec="seconds")
            write_text(file, LockOwner(host=platform.node(), process=os.getpid(), since=since).model_dump_json())
            try:
                yield
            finally:
                remove_if_possible(file)
    except Timeout as error:
        raise InputError(owner_message(folder), code=ErrorCode.IN_USE) from error


def owner_message(folder: Path) -> str:
    """Return the error message for a run that another process has locked."""
    owner = _read_owner(owner_file(folder)) or "unknown"
    return (
        f"{folder}: found another process at work on this run ({owner}), expected none; end that process, or choose "
        "another folder"
    )


def _read_owner(file: Path) -> LockOwner | None:
    try:
        return LockOwner.model_validate_json(file.read_text())
    except (OSError, ValidationError):
        return None
