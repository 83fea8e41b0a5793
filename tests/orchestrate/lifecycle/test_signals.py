"""How signals are taken, and what `zscl resume` refuses; runs that are disturbed are in `tests/faults`."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.command import Command
from support.data import coloured_images

from orchestrate.lifecycle.signals import (
    TERMINATION_SIGNALS,
    WARNING_SIGNALS,
    defer_warning_signals,
    exit_on_signals,
    handle_signals,
)
from schemas.errors import InterruptedRunError
from zscl.checks.image import inspect_image


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """Have the handlers back that were there before a test."""
    handlers = {number: signal.getsignal(number) for number in (*TERMINATION_SIGNALS, *WARNING_SIGNALS)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_resume_refuses_what_is_no_run_or_would_be_another(tmp_path: Path, zscl: Callable[..., Command]) -> None:
    found = zscl("resume", tmp_path)
    assert (found.code, found.error) == (
        2, f"error: {tmp_path}: found no experiment.yaml, expected the folder of a run that was started before\n",
    )  # fmt: skip
    (tmp_path / "experiment.yaml").touch()
    found = zscl("resume", tmp_path, "--set", "seed=1")
    assert (found.code, found.error) == (
        2, "error: --set seed=1: expected a field of compute or tracking; the other fields define the run\n",
    )  # fmt: skip


@pytest.mark.parametrize("number", [*TERMINATION_SIGNALS, *WARNING_SIGNALS])
def test_a_signal_is_not_taken_for_a_broken_image(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zscl.checks.image.decode_image", lambda encoded: os.kill(os.getpid(), number))
    exit_on_signals()
    with pytest.raises(InterruptedRunError):
        inspect_image(next(coloured_images(1, 0))[0])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_command_that_is_ended_early_says_so(number: int, code: int, tmp_path: Path) -> None:
    """While it still reads its recipe, here from a pipe that nobody writes to."""
    os.mkfifo(tmp_path / "recipe.yaml")
    main = "from orchestrate.cli.main import main; main()"
    command = [sys.executable, "-c", main, "run", str(tmp_path / "recipe.yaml")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    with process, (tmp_path / "recipe.yaml").open("w"):  # opens when the other end does
        process.send_signal(number)
        _, said = process.communicate()
    assert process.returncode == code
    assert said == "interrupted: the same command resumes from the last checkpoint, if there is one\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_first_signal_asks_and_the_second_ends(number: int, code: int) -> None:
    before = signal.getsignal(number)
    with handle_signals() as interruption:
        os.kill(os.getpid(), number)
        assert interruption
        assert interruption.to_error("").exit_code == code
        with pytest.raises(InterruptedRunError, match="ended at once"):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) == before


@pytest.mark.parametrize(("number", "code"), [(each, 128 + each) for each in WARNING_SIGNALS])
def test_a_warning_asks_however_often_it_comes(number: int, code: int) -> None:
    with handle_signals() as interruption:
        for each in (number, number, signal.SIGTERM, number):  # the time is up behind a warning; a shell repeats it
            os.kill(os.getpid(), each)
        assert interruption
        assert interruption.to_error("").exit_code == code
        with pytest.raises(InterruptedRunError, match="ended at once"):
            os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), number)  # while the run's end is written down


def test_after_one_warning_the_next_does_not_disturb_the_end() -> None:
    exit_on_signals()
    with pytest.raises(InterruptedRunError):
        os.kill(os.getpid(), signal.SIGHUP)
    os.kill(os.getpid(), signal.SIGHUP)
    os.kill(os.getpid(), signal.SIGUSR1)


def test_what_nohup_ignores_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    exit_on_signals()
    with handle_signals() as interruption:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not interruption
        os.kill(os.getpid(), signal.SIGUSR2)
        assert interruption
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_processes_that_are_started_while_warnings_are_held_back_never_get_them() -> None:
    with handle_signals() as interruption:
        with defer_warning_signals():
            other = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGHUP)  # other threads may take it
            assert not interruption  # not lost, but late
        assert interruption.signal == signal.SIGHUP
    for number in WARNING_SIGNALS:
        other.send_signal(number)
    other.communicate(b"")
    assert other.returncode == 0
