"""Status of a run or a search in its folder: running, finished, failed or killed, and why."""

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
from zscl.sequence.layout import STATE

SIGNAL_FLUSH_SECONDS = 2.0  # for the upload to MLflow to finish after a signal


def write_state(folder: Path, status: Literal["RUNNING", "FINISHED", "FAILED", "KILLED"], reason: str = "") -> None:
    """Write the status of a run with the current time. Errors of storage are ignored: no run fails because of them.

    Args:
        folder: The run's or search's folder.
        status: The status, in MLflow's words.
        reason: Why the run failed or was killed.
    """
    state = RunState(status=status, reason=reason, time=time.time_ns() // 1_000_000)
    with suppress(OSError):
        write_text(folder / STATE, state.model_dump_json(indent=1) + "\n")


def read_state(folder: Path) -> RunState | None:
    """Read the status of a run; `None` if its folder has none."""
    try:
        return RunState.model_validate_json((folder / STATE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValidationError):
        return None


class Recorder(Protocol):
    """Uploads records to MLflow in the background."""

    def end(self, timeout: float = ...) -> object:
        """Wait up to `timeout` seconds until everything is uploaded, and stop."""


@contextmanager
def record_outcome(folder: Path, recorder: Recorder | None) -> Iterator[None]:
    """Record how the block ends, in the folder and then in MLflow: FINISHED, KILLED by a signal, or FAILED, and why.

    Args:
        folder: The folder of the run or search.
        recorder: Its uploader, which is ended with the block, with a short timeout after a signal; `None` if offline.
    """
    killed = False
    try:
        yield
        write_state(folder, "FINISHED")
    except BaseException as error:
        killed = isinstance(error, InterruptedRunError | KeyboardInterrupt | SystemExit)
        is_message = isinstance(error, InterruptedRunError | InputError)
        reason = str(error) if is_message else " ".join(f"{type(error).__name__}: {error}".split())
        write_state(folder, "KILLED" if killed else "FAILED", mask(reason))
        raise
    finally:
        if recorder and killed:
            recorder.end(SIGNAL_FLUSH_SECONDS)
        elif recorder:
            recorder.end()
