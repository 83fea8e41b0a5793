"""How a run stands, as its folder says it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal, Protocol

from pydantic import ValidationError

from schemas.errors import InputError, InterruptedRunError
from schemas.redaction import mask
from schemas.results import RunState
from zscl.runtime.atomic_io import write_text

STATE = "state.json"
HASTE_SECONDS = 2.0  # for MLflow to take the rest, after a signal


def write_state(folder: Path, status: Literal["RUNNING", "FINISHED", "FAILED", "KILLED"], reason: str = "") -> None:
    """Say how the run stands from now on, if storage takes it: no run ends for this."""
    state = RunState(status=status, reason=reason, time=time.time_ns() // 1_000_000)
    with suppress(OSError):
        write_text(folder / STATE, state.model_dump_json(indent=1) + "\n")


def read_state(folder: Path) -> RunState | None:
    """How the run stands, if its folder says so."""
    try:
        return RunState.model_validate_json((folder / STATE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValidationError):
        return None


class Recorder(Protocol):
    """What is sent to MLflow beside the work."""

    def end(self, patience: float = ...) -> object:
        """Let everything arrive, within so many seconds."""


@contextmanager
def record_outcome(folder: Path, records: Recorder | None) -> Iterator[None]:
    """Say in a folder, and then to MLflow, how the block ended: FINISHED, KILLED by a signal, or FAILED, and why.

    Args:
        folder: of the run, or search, that the block works on.
        records: of it, which end with the block, in haste after a signal; offline, there are none.
    """
    killed = False
    try:
        yield
        write_state(folder, "FINISHED")
    except BaseException as error:
        killed = isinstance(error, InterruptedRunError | KeyboardInterrupt | SystemExit)
        told = isinstance(error, InterruptedRunError | InputError)  # in a sentence
        reason = str(error) if told else " ".join(f"{type(error).__name__}: {error}".split())
        write_state(folder, "KILLED" if killed else "FAILED", mask(reason))
        raise
    finally:
        if records and killed:
            records.end(HASTE_SECONDS)
        elif records:
            records.end()
