"""A stage under way on disk: enough to go on behind any step as if nothing had happened.

One file holds weights, optimizer, schedule, average and the losses so far. What a step draws (images, augmentation,
dropout) is a function of seed, stage and step, and what a stage looks back at (its start, the teacher, exemplars) lies
in the run's folder, so the number of steps stands for all of it.

The file is written beside the training, from a copy in memory, and takes the last one's place only when it is whole.
It is read by torch's weights-only unpickler, which makes tensors and plain containers and runs nothing.
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
from zscl.runtime.retry import os_error_of, retry_io

CHECKPOINT = "checkpoint.pt"
LOOK_EVERY_SECONDS = 1.0
RETRY_SECONDS = 30.0  # after a checkpoint that storage did not take
State = dict[str, Any]


class StoppedError(Exception):
    """The run was asked to stop; what it takes to go on is on disk."""


def read_checkpoint(file: Path | None, stage: int, note: Callable[[str], None]) -> State | None:
    """Read where a stage got to; `None` where it begins anew. The workers agree.

    A file with a damaged content is named and set aside: the stage comes to the same numbers from its start. One that
    storage does not give stays, and is asked for again.

    Raises:
        OSError: storage does not give the file, or shows the workers different ones.
    """
    state: State | None = None
    if file is not None and file.is_file():
        try:
            state = retry_io(partial(_read, file), must_exist=file.parent, what=file)
        except (RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
            reason = str(error).strip().partition("\n")[0]
            aside = quarantine(file) if rank() == 0 else None
            kept = f", and lies at {aside.name}" if aside else ""
            note(f"{file}: found no readable checkpoint ({reason}){kept}; the stage begins again")
    if state is not None and state.get("stage") != stage:  # left behind by a stage that is finished
        state = None
    found = state["step"] if state else 0
    [step] = broadcast_ints(found)
    if step and found != step:
        raise OSError(f"{file}: found the checkpoint of step {found}, the main worker finds that of step {step}")
    return state if step else None


def _read(file: Path) -> State:
    """Read a checkpoint.

    Raises:
        OSError: storage does not give it.
        MemoryError: it does not fit.
        Exception: its content is no checkpoint; torch raises several kinds.
    """
    try:
        state: State = torch.load(file, map_location="cpu", weights_only=True)
    except RuntimeError as error:
        cause = os_error_of(error)
        if cause.errno is not None:
            raise cause from error
        if "memory" in str(error):
            raise MemoryError(str(error)) from error
        raise
    if not isinstance(state, dict) or not {"stage", "step", "model"} <= state.keys():
        raise ValueError("other content than a checkpoint's")
    return state


def is_compatible(state: State, model: nn.Module) -> bool:
    """Whether a checkpoint's weights have the model's shapes; exact savings change the shape of a token embedding."""
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    return shapes == {name: tensor.shape for name, tensor in state["model"].items()}


class CheckpointWriter:
    """Now and then in a stage: flush the curves, keep a checkpoint when it is time, stop where that was asked for.

    The main worker decides and all look at the same steps, so that all stop behind the same one.
    """

    def __init__(
        self,
        file: Path | None,
        settings: Checkpoint,
        report: Callable[[CheckpointWritten | Note], None],
        stop_requested: Callable[[], bool],
        first_step: int = 0,
    ) -> None:
        """Begin to count.

        Args:
            file: the checkpoint, if one is to be kept.
            settings: how often.
            report: told what was written, or why not.
            asked_to_stop: asked on the main worker.
            first_step: steps taken already.
        """
        self.file, self.settings, self.report, self.asked_to_stop = file, settings, report, stop_requested
        self.next_poll_step = first_step + 1
        self._looked = (first_step, time.monotonic())
        self._due = time.monotonic() + 60 * settings.every_minutes
        self._overdue = False
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[CheckpointWritten | Note] | None = None

    def maybe_save(self, done: int, state: Callable[[], State]) -> None:
        """Do what is due behind `done` steps.

        Args:
            done: steps of the stage.
            state: what to keep, as it is now; called on every worker.

        Raises:
            StoppedError: the run was asked to stop.
        """
        self._collect()
        stop, keep, self.next_poll_step = broadcast_ints(*(self._decide(done) if rank() == 0 else (0, 0, 0)))
        if not (stop or keep):
            return
        now = state()
        if stop:
            self.wait()
        if rank() == 0 and self.file is not None:
            self._writing = self._writer.submit(self._write, _copied(now))
        if stop:
            outcome = self.wait()
            barrier()  # nobody ends the run while the main worker writes
            where = f"stage {now['stage']} is stopped behind step {done}"
            raise StoppedError(f"{where}, but {outcome.text}" if isinstance(outcome, Note) else where)

    def wait(self) -> CheckpointWritten | Note | None:
        """Wait for what is being written, and tell what became of it."""
        if self._writing is None:
            return None
        outcome = self._writing.result()
        self._collect()
        return outcome

    def _decide(self, done: int) -> tuple[bool, bool, int]:
        """Whether to stop, whether to keep a checkpoint, and behind how many steps to look again."""
        every, (steps, then), now = self.settings.every_steps, self._looked, time.monotonic()
        seconds_a_step = max(now - then, 1e-6) / max(done - steps, 1)
        self._looked = (done, now)
        self._overdue |= now >= self._due or (every is not None and done % every == 0)
        keep = self._overdue and self._writing is None and self.file is not None  # storage is never waited for
        if keep:
            self._overdue, self._due = False, now + 60 * self.settings.every_minutes
        # No further ahead than twice the last time: a step may take longer from now on.
        look = done + max(1, min(int(LOOK_EVERY_SECONDS / seconds_a_step), 2 * (done - steps)))
        return self.asked_to_stop(), keep, look if every is None else min(look, every * (done // every + 1))

    def _collect(self) -> None:
        """Report what became of the last checkpoint, once it is known."""
        if self._writing is None or not self._writing.done():
            return
        outcome, self._writing = self._writing.result(), None
        if isinstance(outcome, Note):
            self._due = min(self._due, time.monotonic() + RETRY_SECONDS)
        self.report(outcome)

    def _write(self, state: State) -> CheckpointWritten | Note:
        assert self.file is not None
        where = f"the checkpoint of stage {state['stage']} behind step {state['step']}"
        if not all(bool(tensor.isfinite().all()) for tensor in _numbers(state["model"])):
            return Note(text=f"{where} is not kept: found a weight that is no number")
        try:
            with atomic_file(self.file) as temporary, temporary.open("wb") as stream:
                torch.save(state, stream)
        except (OSError, RuntimeError) as error:  # torch's writer makes the latter of the former
            first: BaseException = error
            while first.__context__ is not None:
                first = first.__context__
            reason = str(first).strip().partition("\n")[0]
            return Note(text=f"{where} could not be written ({reason}); the last one stays, training goes on")
        return CheckpointWritten(stage=state["stage"], steps=state["step"])


def _copied(tree: Any) -> Any:
    """A copy on the CPU, so that training may go on."""
    if isinstance(tree, torch.Tensor):
        return tree.detach().to("cpu", copy=True)
    if isinstance(tree, Mapping):
        return {name: _copied(value) for name, value in tree.items()}
    return [_copied(value) for value in tree] if isinstance(tree, list | tuple) else tree


def _numbers(tree: Mapping[str, torch.Tensor]) -> Iterator[torch.Tensor]:
    return (tensor for tensor in tree.values() if tensor.is_floating_point())
