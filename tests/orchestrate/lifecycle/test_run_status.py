"""The status that a run or a search has in its folder after the work on it has ended."""

from pathlib import Path

import pytest

from orchestrate.lifecycle.run_status import SIGNAL_FLUSH_SECONDS, read_state, record_outcome, write_state
from schemas.errors import InputError, InterruptedRunError


class Records:
    """A recorder that notes the status in the folder and the timeout when it is ended."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ended: list[tuple[str, float | None]] = []

    def end(self, timeout: float | None = None) -> None:
        state = read_state(self.folder)
        assert state is not None
        self.ended.append((state.status, timeout))


def test_a_block_without_an_error_is_finished(tmp_path: Path) -> None:
    records = Records(tmp_path)
    with record_outcome(tmp_path, records):
        write_state(tmp_path, "RUNNING")
    assert records.ended == [("FINISHED", None)]


@pytest.mark.parametrize(
    ("error", "status", "reason", "timeout"),
    [
        (InputError("found this, expected that"), "FAILED", "found this, expected that", None),
        (RuntimeError("what\n  a library said"), "FAILED", "RuntimeError: what a library said", None),
        (OSError("s3://key:password@bucket"), "FAILED", "OSError: s3://key:***@bucket", None),
        (InterruptedRunError("it goes on", exit_code=143), "KILLED", "it goes on", SIGNAL_FLUSH_SECONDS),
        (KeyboardInterrupt(), "KILLED", "KeyboardInterrupt:", SIGNAL_FLUSH_SECONDS),
    ],
)
def test_a_block_with_an_error_is_recorded_with_the_reason(
    tmp_path: Path, error: BaseException, status: str, reason: str, timeout: float | None
) -> None:
    records = Records(tmp_path)
    with pytest.raises(type(error)), record_outcome(tmp_path, records):
        raise error
    state = read_state(tmp_path)
    assert state is not None
    assert (state.status, state.reason) == (status, reason)
    assert records.ended == [(status, timeout)]
    with pytest.raises(type(error)), record_outcome(tmp_path, None):  # offline
        raise error
