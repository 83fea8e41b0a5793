"""Signal handling: the first signal requests a stop at the next checkpoint, a second SIGTERM or Ctrl-C exits at once.

The other signals are SIGHUP (the terminal or ssh connection was closed) and SIGUSR1 and SIGUSR2 (a batch system's
warning before the time limit: Slurm's `--signal`, as submitit and Lightning use it).
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from schemas.errors import InterruptedRunError

TERMINATION_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# These may arrive several times for one reason: a shell and the kernel both send SIGHUP when a terminal is closed, and
# SIGTERM follows SIGUSR1 at the time limit. So none of them ends a process that is already stopping.
WARNING_SIGNALS = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class StopRequest:
    """A request to stop this process: true once a signal has arrived or `request` was called.

    Attributes:
        signal: The number of the first signal; `None` if there was none.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._requested = self._terminating = False

    def __bool__(self) -> bool:
        return self._requested or self.signal is not None

    def request(self) -> None:
        """Request a stop without a signal."""
        self._requested = True

    def to_error(self, message: str) -> InterruptedRunError:
        """Return the error that ends the command, with the exit code of the signal; SIGINT's if there was none."""
        return InterruptedRunError(message, exit_code=128 + (self.signal or signal.SIGINT))

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal, as `signal.signal` calls it. A second termination signal raises InterruptedRunError."""
        if number in TERMINATION_SIGNALS and self._terminating:
            raise self.to_error("ended at once; the same command resumes from the last checkpoint")
        self._terminating = self._terminating or number in TERMINATION_SIGNALS
        self.signal = self.signal or number


def _handled_signals() -> list[signal.Signals]:
    """List the signals to handle. A signal that the parent process ignores, as `nohup` does SIGHUP, stays ignored."""
    warnings = [number for number in WARNING_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    return [*TERMINATION_SIGNALS, *warnings]


def _ignore_warning_signals() -> None:
    """Ignore warning signals from now on, because the process is already stopping."""
    for number in WARNING_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def exit_on_signals() -> None:
    """Make signals raise `InterruptedRunError`. Ray would exit with code 15, and Python would print nothing."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        _ignore_warning_signals()
        raise InterruptedRunError(
            "the same command resumes from the last checkpoint, if there is one", exit_code=128 + number
        )

    if threading.current_thread() is threading.main_thread():
        for number in _handled_signals():
            signal.signal(number, interrupt)


@contextmanager
def handle_signals() -> Iterator[StopRequest]:
    """Turn signals into a stop request while the block runs. Outside the main thread, signals are not handled.

    Enter this after Ray was started, because Ray installs handlers of its own.

    Yields:
        The stop request.
    """
    stop_request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop_request
        return
    previous = {number: signal.signal(number, stop_request.handle) for number in _handled_signals()}
    try:
        yield stop_request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if stop_request.signal is not None:
            _ignore_warning_signals()


@contextmanager
def defer_warning_signals() -> Iterator[None]:
    """Block SIGHUP, SIGUSR1 and SIGUSR2 while the block runs. Child processes started in it never receive them.

    A closed terminal and a batch system send these signals to every process of a job. Without this, Ray's processes
    and the workers would end before a checkpoint is written.
    """
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, WARNING_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
