"""Checkpoints of the stage in training: reading, asynchronous writing, and stopping on request.

A checkpoint holds the weights, the states of the optimizer and of the learning-rate schedule, the averaged weights and
the losses so far. Random numbers of a step (choice of images, augmentation, dropout) are a function of seed, stage and
step. The model at the start of the stage, the teacher and the exemplars can be loaded from other files. Therefore the
only other state to save is the number of completed steps, and a resumed stage gives the same numbers as an
uninterrupted one.

A background thread writes the file atomically from a copy in memory. The file is read with
`torch.load(weights_only=True)`, which creates only tensors and plain containers and runs no code.
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
    """Read the checkpoint of a stage. All ranks must call this.

    If the file's content is damaged, the file is renamed and the stage is trained again from step 0, which gives the
    same results. If storage fails, the file stays unchanged and reading is retried.

    Args:
        file: The checkpoint's path; `None` if the run writes no checkpoints.
        stage: The stage's number; a checkpoint of another stage is ignored.
        on_note: Called with a message for the user if the checkpoint cannot be used.

    Returns:
        The saved state, or `None` if the stage starts at step 0.

    Raises:
        OSError: Storage has failed for several minutes, or the ranks have read different checkpoints.
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
    """Return whether a checkpoint's weights have the model's names and shapes (`compute.savings` changes shapes)."""
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    return shapes == {name: tensor.shape for name, tensor in state["model"].items()}


class CheckpointWriter:
    """Writes checkpoints in the background and stops the stage on request.

    Rank 0 decides when to write and when to stop. All ranks call `maybe_save` after the same steps, so that all of them
    stop after the same step.

    Attributes:
        file: The checkpoint's path; if `None`, no checkpoint is written.
        settings: The recipe's `compute.checkpoint`.
        report: Callback for events.
        stop_requested: Returns whether the run should stop; called on rank 0.
        next_poll_step: The number of completed steps at which `maybe_save` must be called next.
    """

    def __init__(
        self,
        file: Path | None,
        settings: Checkpoint,
        report: Callable[[CheckpointWritten | Note], None],
        stop_requested: Callable[[], bool],
        first_step: int = 0,
    ) -> None:
        """Start the timer for the first checkpoint.

        Args:
            file: The checkpoint's path; if `None`, no checkpoint is written.
            settings: The recipe's `compute.checkpoint`.
            report: Callback for events: a checkpoint was written, or could not be written.
            stop_requested: Returns whether the run should stop; called on rank 0.
            first_step: Number of steps that were completed before.
        """
        self.file, self.settings, self.report, self.stop_requested = file, settings, report, stop_requested
        self.next_poll_step = first_step + 1
        self._last_poll = (first_step, time.monotonic())
        self._due_time = time.monotonic() + 60 * settings.every_minutes
        self._is_due = False
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[CheckpointWritten | Note] | None = None

    def maybe_save(self, step: int, state: Callable[[], State]) -> None:
        """Start to write a checkpoint if the next one is due; if a stop was requested, write it and raise an error.

        All ranks must call this.

        Args:
            step: Number of completed steps of the stage.
            state: Returns the state to save; called on every rank.

        Raises:
            StoppedError: A stop was requested.
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
        """Wait until the pending checkpoint, if any, is written, and report and return the outcome."""
        if self._pending is None:
            return None
        outcome = self._pending.result()
        self._report_outcome()
        return outcome

    def _decide(self, step: int) -> tuple[bool, bool, int]:
        """Return whether to stop, whether to save a checkpoint, and the next value of `next_poll_step`."""
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
        """Report whether the pending checkpoint could be written, if the attempt has ended."""
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
    """Copy nested containers with all their tensors to the CPU, so that training does not change the copy."""
    if isinstance(tree, torch.Tensor):
        return tree.detach().to("cpu", copy=True)
    if isinstance(tree, Mapping):
        return {name: _copy_to_cpu(value) for name, value in tree.items()}
    return [_copy_to_cpu(value) for value in tree] if isinstance(tree, list | tuple) else tree


def _floating_tensors(tree: Mapping[str, torch.Tensor]) -> Iterator[torch.Tensor]:
    return (tensor for tensor in tree.values() if tensor.is_floating_point())
