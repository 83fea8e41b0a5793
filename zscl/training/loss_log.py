"""Log of per-step losses and gradient norms: raises on NaN or Inf and warns of gradient spikes."""

import math
import time
from collections.abc import Callable, Sequence
from statistics import median

import torch
from torch import nn

from schemas.errors import ErrorCode, InputError
from schemas.events import Note, StepsTaken
from schemas.results import StepLosses

# A spike is a gradient norm above SPIKE_FACTOR times the median of the last SPIKE_WINDOW steps.
SPIKE_FACTOR, SPIKE_WINDOW = 100, 20
MAX_SPIKE_WARNINGS = 5  # per stage
Report = Callable[[StepsTaken | Note], None]


class NotFiniteError(InputError):
    """A loss, the gradients or the weights are NaN or Inf. The results of earlier stages remain usable."""

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence, code=ErrorCode.NOT_FINITE)


class LossLog:
    """Buffers the losses of every step. `flush` waits for the device, reads the buffered losses and reports them.

    Attributes:
        stage: The stage's number, from 1.
        task: The task's name.
        images_per_step: Number of images in a step, summed over all ranks.
        report: Callback for events.
        steps: The losses of all flushed steps.
        spike_warnings: Messages about gradient spikes, at most `MAX_SPIKE_WARNINGS`.
    """

    def __init__(self, stage: int, task: str, images_per_step: int, report: Report) -> None:
        self.stage, self.task, self.images_per_step, self.report = stage, task, images_per_step, report
        self.steps: list[StepLosses] = []
        self.spike_warnings: list[str] = []
        self._pending: list[tuple[int, float, dict[str, torch.Tensor], torch.Tensor]] = []
        self._started = self._reported = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds of training in this stage, including the time before an interruption."""
        return time.perf_counter() - self._started

    def notify(self, text: str) -> None:
        """Report a message for the user."""
        self.report(Note(text=text))

    def restore(self, steps: list[StepLosses], seconds: float) -> None:
        """Restore the losses of a checkpoint's steps, and report these steps again.

        They are reported again because the interrupted process may have stopped before it reported them.

        Args:
            steps: The losses of the completed steps.
            seconds: The time that the completed steps took.
        """
        self._started, self._reported = time.perf_counter() - seconds, time.perf_counter()
        self._append(steps, images_per_second=len(steps) * self.images_per_step / max(seconds, 1e-9))

    def add(
        self, step: int, learning_rate: float, losses: dict[str, torch.Tensor], gradient_norm: torch.Tensor
    ) -> None:
        """Buffer the losses of a step without waiting for the device to compute them.

        Args:
            step: The step's number, from 0.
            learning_rate: The step's learning rate.
            losses: The losses by name, scalars.
            gradient_norm: The norm of the gradients, a scalar.
        """
        self._pending.append((step, learning_rate, losses, gradient_norm))

    def flush(self) -> None:
        """Report the buffered steps.

        Raises:
            NotFiniteError: A loss or the gradient norm of a step is NaN or Inf.
        """
        if not self._pending:
            return
        # All steps are read from the device at once. Their losses may have different names.
        scalars = [scalar for *_, losses, norm in self._pending for scalar in (*losses.values(), norm)]
        values = iter(torch.stack(scalars).tolist())
        steps = [
            StepLosses(
                step=step,
                learning_rate=rate,
                losses={name: next(values) for name in losses},
                gradient_norm=next(values),
            )
            for step, rate, losses, _ in self._pending
        ]
        for step in steps:
            self._check_finite(step)
        now = time.perf_counter()
        images_per_second = len(steps) * self.images_per_step / max(now - self._reported, 1e-9)
        self._pending, self._reported = [], now
        self._append(steps, images_per_second)

    def check_weights_finite(self, model: nn.Module) -> None:
        """Check that the weights after the last step of the stage are finite.

        Args:
            model: The model to check.

        Raises:
            NotFiniteError: A weight is NaN or Inf.
        """
        if not all(bool(parameter.isfinite().all()) for parameter in model.parameters()):
            raise NotFiniteError(
                f"stage {self.stage} {self.task}: found NaN or Inf in the weights after its last step, expected finite "
                "weights"
            )

    def _append(self, steps: list[StepLosses], images_per_second: float) -> None:
        """Append steps to the log, report them, and warn of gradient spikes."""
        for step in steps:
            previous = [earlier.gradient_norm for earlier in self.steps[-SPIKE_WINDOW:]]
            if is_gradient_spike(step.gradient_norm, previous):
                self._warn_of_spike(step)
            self.steps.append(step)
        self.report(
            StepsTaken(stage=self.stage, task=self.task, steps=tuple(steps), images_per_second=images_per_second)
        )

    def _check_finite(self, step: StepLosses) -> None:
        losses = {f"the loss {name}": value for name, value in step.losses.items()}
        for name, value in (losses | {"the gradients' norm": step.gradient_norm}).items():
            if not math.isfinite(value):
                raise NotFiniteError(
                    f"stage {self.stage} {self.task}: found {name} {value} at step {step.step}, expected a finite value"
                )

    def _warn_of_spike(self, step: StepLosses) -> None:
        if len(self.spike_warnings) < MAX_SPIKE_WARNINGS:
            self.spike_warnings.append(
                f"stage {self.stage} {self.task}: the gradients exploded at step {step.step} (norm "
                f"{step.gradient_norm:.3g}, over {SPIKE_FACTOR} times the median of the steps before); set "
                "optimisation.max_gradient_norm to clip gradients"
            )
            self.notify(f"warning: {self.spike_warnings[-1]}")


def is_gradient_spike(norm: float, previous: Sequence[float]) -> bool:
    """Return whether a norm is above `SPIKE_FACTOR` times the median of `SPIKE_WINDOW` previous norms.

    With fewer previous norms, no norm counts as a spike.
    """
    return len(previous) == SPIKE_WINDOW and norm > SPIKE_FACTOR * median(previous) > 0
