"""The accuracy matrix, measured in other processes while training continues."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from zscl.models.clip import Clip
from zscl.runtime.distributed import broadcast_ints, rank
from zscl.sequence.matrix import MatrixEvaluator
from zscl.sequence.result import AccuracyRow
from zscl.training.checkpoint import StoppedError

MOST_BEHIND = 2  # rows that training may be ahead of


LOOK_EVERY_SECONDS = 0.5


class Handle(Protocol):
    """Something that goes on elsewhere: a `concurrent.futures.Future`, say."""

    def done(self) -> bool:
        """Whether it has ended."""

    def result(self) -> object:
        """Wait for its end, and raise what it failed with."""


SubmitEvaluation = Callable[[int], Handle]


@dataclass
class AsyncMatrixEvaluator(MatrixEvaluator):
    """Rows that are measured elsewhere while training goes on; it is never more than a few of them ahead.

    elsewhere: begins to measure a stage's row, which will lie in the run's folder; called on the main worker.
    """

    submit: SubmitEvaluation | None = None
    _under_way: dict[int, Handle | None] = field(default_factory=dict)

    def measure(self, stage: int, clip: Clip) -> None:
        """Have the row measured, unless it is there; take those that have come in meanwhile."""
        row = self.read(self.file(stage))
        if row is not None:
            self.accept(stage, row)
            return
        assert self.submit is not None
        self._under_way[stage] = self.submit(stage) if rank() == 0 else None
        self._collect(most=MOST_BEHIND)

    def rows(self) -> list[AccuracyRow]:
        """Wait for the rows; in the order of their stages."""
        self._collect(most=0)
        return super().rows()

    def _collect(self, most: int) -> None:
        """Take what has come in, in order, and wait until at most so many rows are missing."""
        for stage in list(self._under_way):
            while not self._there(stage):
                if len(self._under_way) <= most:
                    return
                time.sleep(LOOK_EVERY_SECONDS)
            row = self.read(self.file(stage))
            if row is None:
                raise OSError(f"{self.file(stage)}: found no such file, expected the row that was measured elsewhere")
            del self._under_way[stage]
            self.accept(stage, row)

    def _there(self, stage: int) -> bool:
        """Whether a row has come in, as all workers agree.

        Raises:
            StoppedError: the run was asked to stop.
            Exception: what the measuring failed with.
        """
        handle = self._under_way[stage]  # the main worker's
        there = handle is not None and handle.done()
        if handle is not None and there:
            handle.result()
        there, stop = map(bool, broadcast_ints(there, not there and rank() == 0 and self.stop_requested()))
        if stop:
            raise StoppedError(f"stopped while the row of stage {stage} is measured")
        return there
