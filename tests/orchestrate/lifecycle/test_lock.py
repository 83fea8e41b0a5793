"""Two processes on one run, and the lock of a process that was killed."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from support.errors import refused

from orchestrate.lifecycle.lock import run_lock
from schemas.errors import ErrorCode


def lock_in_other_process(run: Path, then: str) -> "subprocess.Popen[str]":
    """Start another process that holds a run's lock."""
    imports = "from pathlib import Path; from orchestrate.lifecycle.lock import run_lock"
    code = f"{imports}\nwith run_lock(Path({str(run)!r})): {then}"
    return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.mark.fault("Two processes on one run", "The second is refused, and the message names the owner")
def test_the_second_process_gets_an_error_that_names_the_first(tmp_path: Path) -> None:
    with lock_in_other_process(tmp_path / "run", "print('mine', flush=True); input()") as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "mine\n"
        with refused(ErrorCode.IN_USE) as error, run_lock(tmp_path / "run"):
            pytest.fail("two processes hold the lock")
        first.communicate("\n")
    assert f"process {first.pid} on {platform.node()}, started 20" in str(error.value)
    assert not (tmp_path / "run").exists()
    with run_lock(tmp_path / "run", note=pytest.fail):  # the first one has ended, and said so
        pass


@pytest.mark.fault("A lock whose process was killed", "Recognised as stale and taken over")
def test_the_lock_of_a_killed_process_is_stale(tmp_path: Path) -> None:
    with lock_in_other_process(tmp_path / "run", "import os; os.kill(os.getpid(), 9)") as killed:
        killed.wait()
    messages: list[str] = []
    with run_lock(tmp_path / "run", messages.append):
        assert (tmp_path / ".run.owner.json").is_file()
    assert len(messages) == 1
    assert f"its owner (process {killed.pid} on {platform.node()}" in messages[0]
    assert os.getpid() != killed.pid
    assert not (tmp_path / ".run.owner.json").exists()
