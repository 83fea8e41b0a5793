"""What the workers do with their time and their memory, told now and then while a stage trains."""

import time
from collections.abc import Callable

import torch

from schemas.events import WorkersUsed, WorkerUse
from zscl.runtime.distributed import broadcast_ints, gather_ragged, rank
from zscl.runtime.timing import Clock, resident_megabytes

EVERY_SECONDS = 10.0


class ThroughputMonitor:
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

    def poll(self, done: int) -> None:
        """Report, where it is time, behind `done` steps; all workers look together."""
        [due] = broadcast_ints(int(time.monotonic() - self._at[0] >= EVERY_SECONDS) if rank() == 0 else 0)
        if due:
            everyones = gather_ragged(torch.tensor([self._used(done)], device=self.device)).tolist()
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
