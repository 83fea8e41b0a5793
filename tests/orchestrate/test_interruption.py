"""How signals are taken, and what `zscl resume` refuses; runs that are disturbed are in `tests/faults`."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Command, coloured

from orchestrate.interruption import end_on_signals, signals_taken
from schemas.base import InterruptedRunError
from zscl.looking import look_at


def test_resume_refuses_what_is_no_run_or_would_be_another(tmp_path: Path, zscl: Callable[..., Command]) -> None:
    found = zscl("resume", tmp_path)
    assert (found.code, found.error) == (
        2, f"error: {tmp_path}: found no experiment.yaml, expected the folder of a run that was started before\n",
    )  # fmt: skip
    (tmp_path / "experiment.yaml").touch()
    found = zscl("resume", tmp_path, "--set", "seed=1")
    assert (found.code, found.error) == (
        2, "error: --set seed=1: expected a field of compute or tracking; all else is what the run is\n",
    )  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_not_taken_for_a_broken_image(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    handlers = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}
    monkeypatch.setattr("zscl.looking.decode_image", lambda encoded: os.kill(os.getpid(), number))
    end_on_signals()
    try:
        with pytest.raises(InterruptedRunError):
            look_at(next(coloured(1, 0))[0])
    finally:
        for each, handler in handlers.items():
            signal.signal(each, handler)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_command_that_is_ended_early_says_so(number: int, code: int, tmp_path: Path) -> None:
    """While it still reads its recipe, here from a pipe that nobody writes to."""
    os.mkfifo(tmp_path / "recipe.yaml")
    main = "from orchestrate.cli import main; main()"
    command = [sys.executable, "-c", main, "run", str(tmp_path / "recipe.yaml")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    with process, (tmp_path / "recipe.yaml").open("w"):  # opens when the other end does
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    assert process.returncode == code
    assert said == "interrupted: the same command goes on from what was kept, if anything\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_first_signal_asks_and_the_second_ends(number: int, code: int) -> None:
    before = signal.getsignal(number)
    with signals_taken() as interruption:
        os.kill(os.getpid(), number)
        assert interruption
        assert interruption.error("").exit_code == code
        with pytest.raises(InterruptedRunError, match="ended at once"):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) == before
