"""Status of a run or a search: running, finished, failed or killed, with the reason. It is stored in a file."""

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

SIGNAL_FLUSH_SECONDS = 2.0  # the time for the upload to MLflow after a signal


def write_state(folder: Path, status: Literal["RUNNING", "FINISHED", "FAILED", "KILLED"], reason: str = "") -> None:
    """Write the status of a run with the current time. Storage errors are ignored, so that they do not stop the run.

    Args:
        folder: The folder of the run or search.
        status: One of MLflow's run statuses: RUNNING, FINISHED, FAILED or KILLED.
        reason: The reason why the run failed or was killed.
    """
    state = RunState(status=status, reason=reason, time=time.time_ns() // 1_000_000)
    with suppress(OSError):
        write_text(folder / STATE, state.model_dump_json(indent=1) + "\n")


def read_state(folder: Path) -> RunState | None:
    """Read the status of a run. Return `None` if its folder contains no valid status."""
    try:
        return RunState.model_validate_json((folder / STATE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValidationError):
        return None


class Recorder(Protocol):
    """An object that uploads records to MLflow in the background."""

    def end(self, timeout: float = ...) -> object:
        """Wait up to `timeout` seconds until everything is uploaded, then stop."""


@contextmanager
def record_outcome(folder: Path, recorder: Recorder | None) -> Iterator[None]:
    """Context manager: record in the folder, then in MLflow, whether its block has finished, failed or been killed.

    A block that raises an exception has failed, or, if the exception is due to a signal, has been killed.

    Args:
        folder: The folder of the run or search.
        recorder: Uploads records of the run or search to MLflow; `None` if nothing is uploaded. Its `end` is called
            after the block, with a short timeout if the process was stopped by a signal.
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
