"""Wall time by part of a stage, and memory usage of the process."""

import resource
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch

T = TypeVar("T")
P = ParamSpec("P")


class Clock:
    """Accumulates the wall time that each part of a stage takes in this process.

    GPU kernels run asynchronously. Their time may be added to a later part that waits for them.

    Attributes:
        seconds: The accumulated time by part [s].
    """

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Add the wall time of the `with` block to a part."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] += time.perf_counter() - start

    def time_iterator(self, part: str, items: Iterator[T]) -> Iterator[T]:
        """Wrap an iterator so that the time to fetch each item is added to a part.

        Args:
            part: The name of the part.
            items: The iterator to wrap.

        Yields:
            The items of the wrapped iterator.
        """
        while True:
            with self(part):
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item

    def time_calls(self, part: str, function: Callable[P, T]) -> Callable[P, T]:
        """Wrap a function so that the time of each call is added to a part.

        Args:
            part: The name of the part.
            function: The function to wrap.

        Returns:
            The wrapped function.
        """

        def timed(*args: P.args, **kwargs: P.kwargs) -> T:
            with self(part):
                return function(*args, **kwargs)

        return timed


def resident_megabytes() -> float:
    """Return the current resident memory of this process [MB], or the peak if the system has no /proc."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return peak_memory_megabytes(torch.device("cpu"))
    return pages * resource.getpagesize() / 1e6


def peak_memory_megabytes(device: torch.device) -> float:
    """Return the peak memory of this process [MB]: memory allocated on a GPU, or else resident main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3  # in kilobytes on Linux
