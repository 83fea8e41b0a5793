"""Checkpoints of the stage in training: reading, asynchronous writing, and stopping on request.

A checkpoint holds the weights, the optimizer, the schedule, the averages and the losses so far. Random numbers of a
step (choice of images, augmentation, dropout) are a function of seed, stage and step. The stage's start, the teacher
and the exemplars are in the run's folder. Therefore the number of steps is the only other state, and a resumed stage
gives the same numbers as an uninterrupted one.

A background thread writes the file atomically from a copy in memory. `torch.load(weights_only=True)` reads it, which
creates only tensors and plain containers and runs no code.
"""

import pickle
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from schemas.compute import Checkpoint
from schemas.events import CheckpointWritten, Note
from zscl.runtime.atomic_io import atomic_file, quarantine
from zscl.runtime.distributed import barrier, broadcast_ints, rank
from zscl.runtime.retry import retry_io, to_os_error

POLL_SECONDS = 1.0
RETRY_SECONDS = 30.0  # delay of the next attempt after a checkpoint could not be written
State = dict[str, Any]


class StoppedError(Exception):
    """The run stopped on request. It can be resumed from its folder."""


def read_checkpoint(file: Path | None, stage: int, on_note: Callable[[str], None]) -> State | None:
    """Read the checkpoint of a stage. Collective.

    A file with damaged content is renamed, and the stage starts again with the same results. If storage fails, the file
    stays unchanged, and reading is retried.

    Args:
        file: The checkpoint; `None` if the run has none.
        stage: The stage's number; a checkpoint of another stage is ignored.
        on_note: Callback for messages.

    Returns:
        The state, or `None` if the stage starts at step 0.

    Raises:
        OSError: Storage has failed for minutes, or the ranks read different checkpoints.
    """
    state: State | None = None
    if file is not None and file.is_file():
        try:
            state = retry_io(partial(_read, file), must_exist=file.parent, description=file)
        except (RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
            reason = str(error).strip().partition("\n")[0]
            renamed = quarantine(file) if rank() == 0 else None
            suffix = f", and renamed it to {renamed.name}" if renamed else ""
            on_note(f"{file}: found no readable checkpoint ({reason}){suffix}; the stage starts again")
    if state is not None and state.get("stage") != stage:  # the checkpoint of a finished stage
        state = None
    own_step = state["step"] if state else 0
    [step] = broadcast_ints(own_step)
    if step and own_step != step:
        raise OSError(f"{file}: found the checkpoint of step {own_step}, but the main worker found that of step {step}")
    return state if step else None


def _read(file: Path) -> State:
    """Read a checkpoint. If the content is not a checkpoint, torch raises exceptions of several classes."""
    try:
        state: State = torch.load(file, map_location="cpu", weights_only=True)
    except RuntimeError as error:
        cause = to_os_error(error)
        if cause.errno is not None:
            raise cause from error
        if "memory" in str(error):
            raise MemoryError(str(error)) from error
        raise
    if not isinstance(state, dict) or not {"stage", "step", "model"} <= state.keys():
        raise ValueError("the content is not a checkpoint")
    return state


def is_compatible(state: State, model: nn.Module) -> bool:
    """Return whether a checkpoint's weights have the model's shapes (`compute.savings` changes some)."""
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    return shapes == {name: tensor.shape for name, tensor in state["model"].items()}


class CheckpointWriter:
    """Writes checkpoints in the background and stops the stage on request.

    Rank 0 decides. All ranks poll at the same steps, so that all of them stop after the same step.

    Attributes:
        file: The checkpoint's path; `None` writes none.
        settings: The recipe's `compute.checkpoint`.
        report: Callback for events.
        stop_requested: Returns whether the run should stop; called on rank 0.
        next_poll_step: The number of steps after which `maybe_save` is to be called next.
    """

    def __init__(
        self,
        file: Path | None,
        settings: Checkpoint,
        report: Callable[[CheckpointWritten | Note], None],
        stop_requested: Callable[[], bool],
        first_step: int = 0,
    ) -> None:
        """Start the interval to the first checkpoint.

        Args:
            file: The checkpoint's path; `None` writes none.
            settings: The recipe's `compute.checkpoint`.
            report: Callback for events: a checkpoint was written, or could not be written.
            stop_requested: Returns whether the run should stop; called on rank 0.
            first_step: Number of completed steps.
        """
        self.file, self.settings, self.report, self.stop_requested = file, settings, report, stop_requested
        self.next_poll_step = first_step + 1
        self._last_poll = (first_step, time.monotonic())
        self._due_time = time.monotonic() + 60 * settings.every_minutes
        self._is_due = False
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[CheckpointWritten | Note] | None = None

    def maybe_save(self, step: int, state: Callable[[], State]) -> None:
        """Start writing a checkpoint if one is due, and stop if that was requested. Collective.

        Args:
            step: Number of completed steps of the stage.
            state: Returns the state to save; called on every rank.

        Raises:
            StoppedError: A stop was requested. The checkpoint is written.
        """
        self._report_outcome()
        stop, save, self.next_poll_step = broadcast_ints(*(self._decide(step) if rank() == 0 else (0, 0, 0)))
        if not (stop or save):
            return
        current = state()
        if stop:
            self.wait()
        if rank() == 0 and self.file is not None:
            self._pending = self._executor.submit(self._write, _copy_to_cpu(current))
        if stop:
            outcome = self.wait()
            barrier()  # no rank may end the run while rank 0 writes
            message = f"stage {current['stage']} is stopped after step {step}"
            raise StoppedError(f"{message}, but {outcome.text}" if isinstance(outcome, Note) else message)

    def wait(self) -> CheckpointWritten | Note | None:
        """Wait for the checkpoint that is being written, if any, and report and return its outcome."""
        if self._pending is None:
            return None
        outcome = self._pending.result()
        self._report_outcome()
        return outcome

    def _decide(self, step: int) -> tuple[bool, bool, int]:
        """Return whether to stop, whether to save, and the next step to poll at."""
        every, (last_step, last_time), now = self.settings.every_steps, self._last_poll, time.monotonic()
        seconds_per_step = max(now - last_time, 1e-6) / max(step - last_step, 1)
        self._last_poll = (step, now)
        self._is_due |= now >= self._due_time or (every is not None and step % every == 0)
        save = self._is_due and self._pending is None and self.file is not None  # training never waits for storage
        if save:
            self._is_due, self._due_time = False, now + 60 * self.settings.every_minutes
        # The interval at most doubles, because steps may become slower.
        next_poll = step + max(1, min(int(POLL_SECONDS / seconds_per_step), 2 * (step - last_step)))
        if every is not None:
            next_poll = min(next_poll, every * (step // every + 1))
        return self.stop_requested(), save, next_poll

    def _report_outcome(self) -> None:
        """Report the outcome of the last checkpoint if it is complete."""
        if self._pending is None or not self._pending.done():
            return
        outcome, self._pending = self._pending.result(), None
        if isinstance(outcome, Note):
            self._due_time = min(self._due_time, time.monotonic() + RETRY_SECONDS)
        self.report(outcome)

    def _write(self, state: State) -> CheckpointWritten | Note:
        assert self.file is not None
        subject = f"the checkpoint of stage {state['stage']} after step {state['step']}"
        if not all(bool(tensor.isfinite().all()) for tensor in _floating_tensors(state["model"])):
            return Note(text=f"{subject} is not written: found NaN or Inf in the weights")
        try:
            with atomic_file(self.file) as temporary, temporary.open("wb") as stream:
                torch.save(state, stream)
        except (OSError, RuntimeError) as error:  # torch's writer raises a RuntimeError during an OSError
            cause: BaseException = error
            while cause.__context__ is not None:
                cause = cause.__context__
            reason = str(cause).strip().partition("\n")[0]
            return Note(
                text=f"{subject} could not be written ({reason}); the previous one stays, and training continues"
            )
        return CheckpointWritten(stage=state["stage"], steps=state["step"])


def _copy_to_cpu(tree: Any) -> Any:
    """Return a copy on the CPU, which training does not change."""
    if isinstance(tree, torch.Tensor):
        return tree.detach().to("cpu", copy=True)
    if isinstance(tree, Mapping):
        return {name: _copy_to_cpu(value) for name, value in tree.items()}
    return [_copy_to_cpu(value) for value in tree] if isinstance(tree, list | tuple) else tree


def _floating_tensors(tree: Mapping[str, torch.Tensor]) -> Iterator[torch.Tensor]:
    return (tensor for tensor in tree.values() if tensor.is_floating_point())
