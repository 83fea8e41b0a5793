"""What the workers do with their time and their memory, told now and then while a stage trains."""

import resource
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch

from schemas.events import WorkersUsed, WorkerUse
from zscl.runtime.distributed import agree, gather_unequal, rank

EVERY_SECONDS = 10.0
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


class Usage:
    """Reports what every worker has used since the last time, every few seconds; the main worker says when."""

    def __init__(
        self,
        stage: int,
        own_images: int,
        clock: Clock,
        device: torch.device,
        report: Callable[[WorkersUsed], None],
        first_step: int = 0,
    ) -> None:
        """Begin to count.

        Args:
            stage: whose steps are taken.
            own_images: this worker's images a step.
            clock: where the time spent on `data` is counted.
            device: of the worker.
            report: told on every worker; the main one's counts.
            first_step: steps taken already.
        """
        self.stage, self.own_images, self.clock, self.device, self.report = stage, own_images, clock, device, report
        self._begin(first_step)

    def look(self, done: int) -> None:
        """Report, where it is time, behind `done` steps; all workers look together."""
        [due] = agree(int(time.monotonic() - self._at[0] >= EVERY_SECONDS) if rank() == 0 else 0)
        if due:
            everyones = gather_unequal(torch.tensor([self._used(done)], device=self.device)).tolist()
            uses = [
                WorkerUse(
                    images_per_second=images,
                    loader_wait_share=min(waited, 1.0),
                    cpu_cores=cores,
                    memory_megabytes=memory,
                    gpu_memory_megabytes=gpu if self.device.type == "cuda" else None,
                )
                for images, waited, cores, memory, gpu in everyones
            ]
            self.report(WorkersUsed(stage=self.stage, step=done - 1, workers=tuple(uses)))
            self._begin(done)

    def _begin(self, done: int) -> None:
        self._done, self._waited = done, self.clock.seconds["data"]
        self._at = time.monotonic(), time.process_time()

    def _used(self, done: int) -> list[float]:
        seconds = max(time.monotonic() - self._at[0], 1e-9)
        return [
            (done - self._done) * self.own_images / seconds,
            (self.clock.seconds["data"] - self._waited) / seconds,
            (time.process_time() - self._at[1]) / seconds,
            resident_megabytes(),
            torch.cuda.memory_reserved(self.device) / 1e6 if self.device.type == "cuda" else 0.0,
        ]


def resident_megabytes() -> float:
    """Memory that this process holds now; at most so far, where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return peak_memory(torch.device("cpu"))
    return pages * resource.getpagesize() / 1e6


def peak_memory(device: torch.device) -> float:
    """Megabytes that this process has taken up at most, so far: on its GPU, or in all."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3  # Linux counts in kilobytes
