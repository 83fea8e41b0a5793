"""Throughput monitor: images per second, waiting for data, CPU and memory of every rank, reported every 10 seconds."""

import time
from collections.abc import Callable

import torch

from schemas.events import WorkersUsed, WorkerUse
from zscl.runtime.distributed import broadcast_ints, gather_ragged, rank
from zscl.runtime.timing import Clock, resident_megabytes

REPORT_SECONDS = 10.0


class ThroughputMonitor:
    """Reports the resources that every rank has used since the previous report. Rank 0 decides when to report."""

    def __init__(
        self,
        stage: int,
        images_per_step: int,
        clock: Clock,
        device: torch.device,
        report: Callable[[WorkersUsed], None],
        first_step: int = 0,
    ) -> None:
        """Start the measurement of the first interval.

        Args:
            stage: The stage's number, from 1.
            images_per_step: Number of this rank's images in a step.
            clock: Counts the time in which training waits for data, under the key `data`.
            device: This rank's device.
            report: Callback for the event; it is called on every rank.
            first_step: Number of steps that were completed before.
        """
        self.stage, self.images_per_step, self.clock, self.device = stage, images_per_step, clock, device
        self.report = report
        self._start_interval(first_step)

    def poll(self, step: int) -> None:
        """Report the used resources if the last report is `REPORT_SECONDS` old. All ranks must call this.

        Args:
            step: Number of completed steps of the stage.
        """
        [due] = broadcast_ints(int(time.monotonic() - self._start_time >= REPORT_SECONDS) if rank() == 0 else 0)
        if due:
            measured = gather_ragged(torch.tensor([self._measure(step)], device=self.device)).tolist()
            uses = [
                WorkerUse(
                    images_per_second=images,
                    loader_wait_share=min(waited, 1.0),
                    cpu_cores=cores,
                    memory_megabytes=memory,
                    gpu_memory_megabytes=gpu if self.device.type == "cuda" else None,
                )
                for images, waited, cores, memory, gpu in measured
            ]
            self.report(WorkersUsed(stage=self.stage, step=step - 1, workers=tuple(uses)))
            self._start_interval(step)

    def _start_interval(self, step: int) -> None:
        self._start_step, self._start_wait = step, self.clock.seconds["data"]
        self._start_time, self._start_cpu_time = time.monotonic(), time.process_time()

    def _measure(self, step: int) -> list[float]:
        """Measure this rank: images/s, fraction of time waiting for data, CPU cores, memory and GPU memory in MB."""
        seconds = max(time.monotonic() - self._start_time, 1e-9)
        return [
            (step - self._start_step) * self.images_per_step / seconds,
            (self.clock.seconds["data"] - self._start_wait) / seconds,
            (time.process_time() - self._start_cpu_time) / seconds,
            resident_megabytes(),
            torch.cuda.memory_reserved(self.device) / 1e6 if self.device.type == "cuda" else 0.0,
        ]
