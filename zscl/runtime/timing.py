"""Seconds by part of the work, and memory."""

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
    """Adds up the seconds that the parts of a stage take in this process.

    On a GPU, a part's kernels may run in the time of the next one that waits for them.
    """

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Count a block's time as a part's."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] += time.perf_counter() - started

    def over(self, part: str, items: Iterator[T]) -> Iterator[T]:
        """Count the time that it takes to get each item."""
        while True:
            with self(part):
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item

    def around(self, part: str, function: Callable[P, T]) -> Callable[P, T]:
        """Count the time of each call."""

        def counted(*arguments: P.args, **named: P.kwargs) -> T:
            with self(part):
                return function(*arguments, **named)

        return counted


def resident_megabytes() -> float:
    """Memory that this process holds now; at most so far, where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return peak_memory_megabytes(torch.device("cpu"))
    return pages * resource.getpagesize() / 1e6


def peak_memory_megabytes(device: torch.device) -> float:
    """Megabytes that this process has taken up at most, so far: on its GPU, or in all."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3  # Linux counts in kilobytes
