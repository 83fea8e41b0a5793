"""Signal handling: the first signal requests a stop at the next checkpoint, a second SIGTERM or Ctrl-C exits at once.

SIGHUP, SIGUSR1 and SIGUSR2 also request a stop. SIGHUP means that the terminal or the ssh connection was closed. Batch
systems send SIGUSR1 or SIGUSR2 as a warning before the time limit (Slurm's `--signal`).
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from schemas.errors import InterruptedRunError

TERMINATION_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# One cause may send several of these signals: a shell and the kernel both send SIGHUP when a terminal is closed, and
# SIGTERM follows SIGUSR1 at the time limit. So a warning signal never ends a process that is already stopping.
WARNING_SIGNALS = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class StopRequest:
    """Records whether this process should stop. The object is true after a signal or after `request` was called.

    Attributes:
        signal: The number of the first signal; `None` if no signal has arrived.
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
        """Return the error that ends the command. Its exit code is 128 plus the signal's number (default: SIGINT's)."""
        return InterruptedRunError(message, exit_code=128 + (self.signal or signal.SIGINT))

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal; a handler for `signal.signal`. A second termination signal raises `InterruptedRunError`."""
        if number in TERMINATION_SIGNALS and self._terminating:
            raise self.to_error("ended at once; the same command resumes from the last checkpoint")
        self._terminating = self._terminating or number in TERMINATION_SIGNALS
        self.signal = self.signal or number


def _handled_signals() -> list[signal.Signals]:
    """List the signals to handle. Warning signals that are already ignored (SIGHUP under `nohup`) stay ignored."""
    warnings = [number for number in WARNING_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    return [*TERMINATION_SIGNALS, *warnings]


def _ignore_warning_signals() -> None:
    """Ignore all later warning signals, because the process is already stopping."""
    for number in WARNING_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def exit_on_signals() -> None:
    """Install signal handlers that raise `InterruptedRunError`.

    The new handlers replace Ray's, which exit with code 15, and Python's, which print no message.
    """

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
    """Context manager: turn signals into a stop request. Outside the main thread, no signal is handled.

    Enter the context after Ray is started, because Ray installs its own handlers.

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
    """Context manager: block SIGHUP, SIGUSR1 and SIGUSR2 in the current thread.

    Child processes started inside the context inherit the block and never receive these signals. The current process
    receives a signal that was sent to it inside the context when the context exits.

    The signals are sent to every process of a terminal or a batch job. Without the block, Ray's processes and the
    workers would end before a checkpoint is written.
    """
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, WARNING_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
