"""SIGTERM and Ctrl-C: the first asks a run to stop where it can go on, the second one ends it at once."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from schemas.base import InterruptedRunError


class Interruption:
    """Whether, and by which signal, this process was asked to end."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    def error(self, how_to_go_on: str) -> InterruptedRunError:
        """What the command line ends with."""
        return InterruptedRunError(how_to_go_on, exit_code=128 + (self.signal or signal.SIGINT))

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise self.error("ended at once; the same command goes on from the last checkpoint")
        self.signal = number


def end_on_signals() -> None:
    """Have SIGTERM and Ctrl-C end this process with a sentence: Ray would have it exit with 15, Python say nothing."""

    def end(number: int, frame: FrameType | None) -> None:
        raise InterruptedRunError("the same command goes on from what was kept, if anything", exit_code=128 + number)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, end)


@contextmanager
def signals_taken() -> Iterator[Interruption]:
    """Take SIGTERM and SIGINT while the block runs; elsewhere than in the main thread, leave them alone.

    Ray sets handlers of its own when it starts: enter this afterwards.
    """
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, interruption._take) for number in numbers}
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
