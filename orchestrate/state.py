"""How a run stands, as its folder says it: who works on it, and how the last attempt ended."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout
from pydantic import ValidationError

from schemas.base import InputError
from schemas.results import RunState
from zscl.files import write_text

STATE = "state.json"


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Keep a run's folder for this process; the lock goes with the process, however that ends.

    Raises:
        InputError: another process is at work on the run.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder.with_name(f".{folder.name}.lock"), timeout=0):
            yield
    except Timeout as error:
        raise InputError(f"{folder}: found another process at work on this run, expected none") from error


def write_state(folder: Path, status: Literal["RUNNING", "FINISHED", "FAILED", "KILLED"], reason: str = "") -> None:
    """Say how the run stands from now on."""
    state = RunState(status=status, reason=reason, time=time.time_ns() // 1_000_000)
    write_text(folder / STATE, state.model_dump_json(indent=1) + "\n")


def read_state(folder: Path) -> RunState | None:
    """How the run stands, if its folder says so."""
    try:
        return RunState.model_validate_json((folder / STATE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValidationError):
        return None
