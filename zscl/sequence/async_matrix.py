"""The accuracy matrix, evaluated in other processes while training continues."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from zscl.models.clip import Clip
from zscl.runtime.distributed import broadcast_ints, rank
from zscl.sequence.matrix import MatrixEvaluator
from zscl.sequence.result import AccuracyRow
from zscl.training.checkpoint import StoppedError

MAX_PENDING_ROWS = 2  # training waits if more rows are not evaluated yet
POLL_SECONDS = 0.5


class Handle(Protocol):
    """A computation in another process, such as a `concurrent.futures.Future`."""

    def done(self) -> bool:
        """Return whether the computation has ended."""

    def result(self) -> object:
        """Wait until the computation has ended, and raise its exception if it failed."""


SubmitEvaluation = Callable[[int], Handle]


@dataclass
class AsyncMatrixEvaluator(MatrixEvaluator):
    """Evaluates the rows of the accuracy matrix in other processes. One row holds the accuracies after one stage.

    Training waits while more than `MAX_PENDING_ROWS` rows are not evaluated yet.

    Attributes:
        submit: Starts the evaluation of a stage's row, which writes the row's file; called on rank 0.
    """

    submit: SubmitEvaluation | None = None
    _pending: dict[int, Handle | None] = field(default_factory=dict)

    def measure(self, stage: int, clip: Clip) -> None:
        """Start the evaluation of a stage's row if its file does not exist, and add complete rows to the matrix.

        All ranks must call this.
        """
        row = self.read_row(self.row_file(stage))
        if row is not None:
            self.accept(stage, row)
            return
        assert self.submit is not None
        self._pending[stage] = self.submit(stage) if rank() == 0 else None
        self._collect(max_pending=MAX_PENDING_ROWS)

    def rows(self) -> list[AccuracyRow]:
        """Wait for all rows and return them in the order of their stages. All ranks must call this."""
        self._collect(max_pending=0)
        return super().rows()

    def _collect(self, max_pending: int) -> None:
        """Add complete rows to the matrix in order, and wait until at most `max_pending` rows are not complete."""
        for stage in list(self._pending):
            while not self._is_complete(stage):
                if len(self._pending) <= max_pending:
                    return
                time.sleep(POLL_SECONDS)
            file = self.row_file(stage)
            row = self.read_row(file)
            if row is None:
                raise OSError(f"{file}: found no such file, expected the row that another process has evaluated")
            del self._pending[stage]
            self.accept(stage, row)

    def _is_complete(self, stage: int) -> bool:
        """Return whether the evaluation of a row has ended.

        Args:
            stage: The row's stage.

        Returns:
            The same answer on all ranks.

        Raises:
            StoppedError: A stop was requested.
        """
        handle = self._pending[stage]  # `None` on all ranks except 0
        is_done = handle is not None and handle.done()
        if handle is not None and is_done:
            handle.result()  # raises if the evaluation failed
        is_done, stop = map(bool, broadcast_ints(is_done, not is_done and rank() == 0 and self.stop_requested()))
        if stop:
            raise StoppedError(f"stopped while the row of stage {stage} is measured")
        return is_done
