"""Signals: the first asks a run to stop where it can go on; a second SIGTERM or Ctrl-C ends it at once.

Beside SIGTERM and SIGINT (Ctrl-C) these are SIGHUP (the terminal or the ssh connection is closed) and SIGUSR1 and
SIGUSR2 (a batch system's warning before the time is up: Slurm's `--signal`, as submitit and Lightning use it).
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from schemas.errors import InterruptedRunError

URGENT = (signal.SIGTERM, signal.SIGINT)
# These may come several times for one reason: a shell and the kernel each send SIGHUP when a terminal is closed, and
# SIGTERM follows SIGUSR1 when the time is up. So none of them ends a process that stops already.
WARNINGS = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class StopRequest:
    """Whether this process was asked to stop, and by which signal, if by one."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._asked = self._urgent = False

    def __bool__(self) -> bool:
        return self._asked or self.signal is not None

    def ask(self) -> None:
        """Ask to stop without a signal."""
        self._asked = True

    def error(self, how_to_go_on: str) -> InterruptedRunError:
        """What the command line ends with."""
        return InterruptedRunError(how_to_go_on, exit_code=128 + (self.signal or signal.SIGINT))

    def _take(self, number: int, frame: FrameType | None) -> None:
        if number in URGENT and self._urgent:
            raise self.error("ended at once; the same command goes on from the last checkpoint")
        self._urgent = self._urgent or number in URGENT
        self.signal = self.signal or number


def _handled() -> list[signal.Signals]:
    """List the signals to handle; `nohup` has SIGHUP ignored, and it stays ignored."""
    return [*URGENT, *(each for each in WARNINGS if signal.getsignal(each) is not signal.SIG_IGN)]


def _ignore_warnings() -> None:
    """Ignore further warnings: what is left to do is to stop."""
    for number in WARNINGS:
        signal.signal(number, signal.SIG_IGN)


def end_on_signals() -> None:
    """Have signals end this process with a sentence: Ray would have it exit with 15, Python say nothing."""

    def end(number: int, frame: FrameType | None) -> None:
        _ignore_warnings()
        raise InterruptedRunError("the same command goes on from what was kept, if anything", exit_code=128 + number)

    if threading.current_thread() is threading.main_thread():
        for number in _handled():
            signal.signal(number, end)


@contextmanager
def handle_signals() -> Iterator[StopRequest]:
    """Take signals while the block runs; elsewhere than in the main thread, leave them alone.

    Ray sets handlers of its own when it starts: enter this afterwards.
    """
    interruption = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return
    before = {number: signal.signal(number, interruption._take) for number in _handled()}
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if interruption.signal is not None:
            _ignore_warnings()


@contextmanager
def defer_warning_signals() -> Iterator[None]:
    """Hold SIGHUP, SIGUSR1 and SIGUSR2 back while the block runs; processes that it starts never get them.

    A closed terminal and a batch system send them to every process of a job. Ray's processes, and the workers among
    them, would end before a checkpoint is written.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, WARNINGS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
