"""Signal handling, and what `zscl resume` refuses. Runs that receive signals are in `tests/faults`."""

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


def test_resume_refuses_a_folder_without_a_run_and_other_settings(tmp_path: Path, zscl: Callable[..., Command]) -> None:
    result = zscl("resume", tmp_path)
    assert (result.code, result.error) == (
        2, f"error: {tmp_path}: found no experiment.yaml, expected the folder of a run that was started before\n",
    )  # fmt: skip
    (tmp_path / "experiment.yaml").touch()
    result = zscl("resume", tmp_path, "--set", "seed=1")
    assert (result.code, result.error) == (
        2, "error: --set seed=1: expected a field of compute or tracking; the other fields define the run\n",
    )  # fmt: skip


@pytest.mark.parametrize("number", [*TERMINATION_SIGNALS, *WARNING_SIGNALS])
def test_a_signal_is_not_mistaken_for_a_broken_image(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zscl.checks.image.decode_image", lambda encoded: os.kill(os.getpid(), number))
    exit_on_signals()
    with pytest.raises(InterruptedRunError):
        inspect_image(next(coloured_images(1, 0))[0])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_before_the_run_starts_is_reported(number: int, code: int, tmp_path: Path) -> None:
    """While it still reads its recipe, here from a pipe that nobody writes to."""
    os.mkfifo(tmp_path / "recipe.yaml")
    main = "from orchestrate.cli.main import main; main()"
    command = [sys.executable, "-c", main, "run", str(tmp_path / "recipe.yaml")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    with process, (tmp_path / "recipe.yaml").open("w"):  # opens when the other end does
        process.send_signal(number)
        _, output = process.communicate()
    assert process.returncode == code
    assert output == "interrupted: the same command resumes from the last checkpoint, if there is one\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_first_signal_requests_a_stop_and_the_second_exits(number: int, code: int) -> None:
    previous = signal.getsignal(number)
    with handle_signals() as stop_request:
        os.kill(os.getpid(), number)
        assert stop_request
        assert stop_request.to_error("").exit_code == code
        with pytest.raises(InterruptedRunError, match="ended at once"):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) == previous


@pytest.mark.parametrize(("number", "code"), [(number, 128 + number) for number in WARNING_SIGNALS])
def test_repeated_warning_signals_request_a_stop(number: int, code: int) -> None:
    with handle_signals() as stop_request:
        for signal_number in (number, number, signal.SIGTERM, number):  # as at a time limit
            os.kill(os.getpid(), signal_number)
        assert stop_request
        assert stop_request.to_error("").exit_code == code
        with pytest.raises(InterruptedRunError, match="ended at once"):
            os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), number)  # while the run's end is written down


def test_warning_signals_are_ignored_after_the_first() -> None:
    exit_on_signals()
    with pytest.raises(InterruptedRunError):
        os.kill(os.getpid(), signal.SIGHUP)
    os.kill(os.getpid(), signal.SIGHUP)
    os.kill(os.getpid(), signal.SIGUSR1)


def test_signals_that_nohup_ignores_stay_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    exit_on_signals()
    with handle_signals() as stop_request:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop_request
        os.kill(os.getpid(), signal.SIGUSR2)
        assert stop_request
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_child_processes_never_get_deferred_warning_signals() -> None:
    with handle_signals() as stop_request:
        with defer_warning_signals():
            child = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGHUP)  # other threads may take it
            assert not stop_request  # not lost, but late
        assert stop_request.signal == signal.SIGHUP
    for number in WARNING_SIGNALS:
        child.send_signal(number)
    child.communicate(b"")
    assert child.returncode == 0
