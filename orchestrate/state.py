"""How a run stands, as its folder says it."""

import time
from contextlib import suppress
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from schemas.results import RunState
from zscl.files import write_text

STATE = "state.json"


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
