"""What every step of a stage comes to, and what in it is poison."""

import math
import time
from collections.abc import Callable, Sequence
from statistics import median

import torch
from torch import nn

from schemas.errors import InputError
from schemas.events import Note, StepsTaken
from schemas.results import StepLosses

EXPLODED, TYPICAL_STEPS = 100, 20  # gradients so many times the median of so many steps before
EXPLOSIONS_NAMED = 5  # of a stage
Report = Callable[[StepsTaken | Note], None]


class NotFiniteError(InputError):
    """A loss or the gradients are no numbers any more: the stage is lost, those before it are not."""


class LossLog:
    """Every step's losses, reported now and then: reading a loss waits for the device.

    explosions: a sentence for each step whose gradients exploded, the first few.
    """

    def __init__(self, stage: int, task: str, images_per_step: int, report: Report) -> None:
        self.stage, self.task, self.images_per_step, self.report = stage, task, images_per_step, report
        self.steps: list[StepLosses] = []
        self.spike_warnings: list[str] = []
        self._pending: list[tuple[int, float, dict[str, torch.Tensor], torch.Tensor]] = []
        self._started = self._reported = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Time that the stage's steps took, those before an interruption included."""
        return time.perf_counter() - self._started

    def note(self, text: str) -> None:
        """Report something worth a line."""
        self.report(Note(text=text))

    def restore(self, steps: list[StepLosses], seconds: float) -> None:
        """Go on behind steps that took so many seconds; who listens may have missed them."""
        self._started, self._reported = time.perf_counter() - seconds, time.perf_counter()
        self._take(steps, speed=len(steps) * self.images_per_step / max(seconds, 1e-9))

    def add(self, step: int, learning_rate: float, named: dict[str, torch.Tensor], norm: torch.Tensor) -> None:
        """Keep a step."""
        self._pending.append((step, learning_rate, named, norm))

    def flush(self) -> None:
        """Report the steps kept.

        Raises:
            NotFiniteError: one of them has a loss or gradients that are no numbers.
        """
        if not self._pending:
            return
        # Steps may have losses of different names; the device is read once.
        scalars = [scalar for *_, named, norm in self._pending for scalar in (*named.values(), norm)]
        values = iter(torch.stack(scalars).tolist())
        taken = [
            StepLosses(
                step=step,
                learning_rate=rate,
                losses={name: next(values) for name in named},
                gradient_norm=next(values),
            )
            for step, rate, named, _ in self._pending
        ]
        for step in taken:
            self._refuse_what_is_no_number(step)
        now = time.perf_counter()
        speed = len(taken) * self.images_per_step / max(now - self._reported, 1e-9)
        self._pending, self._reported = [], now
        self._take(taken, speed)

    def check_weights_finite(self, model: nn.Module) -> None:
        """See that what the stage hands on is made of numbers.

        Raises:
            NotFiniteError: it is not.
        """
        if not all(bool(parameter.isfinite().all()) for parameter in model.parameters()):
            raise NotFiniteError(
                f"stage {self.stage} {self.task}: found weights that are no numbers behind its last step, expected "
                "finite ones"
            )

    def _take(self, taken: list[StepLosses], speed: float) -> None:
        for step in taken:
            if is_gradient_spike(step.gradient_norm, [each.gradient_norm for each in self.steps[-TYPICAL_STEPS:]]):
                self._explosion(step)
            self.steps.append(step)
        self.report(StepsTaken(stage=self.stage, task=self.task, steps=tuple(taken), images_per_second=speed))

    def _refuse_what_is_no_number(self, step: StepLosses) -> None:
        losses = {f"the loss {name}": value for name, value in step.losses.items()}
        for name, value in (losses | {"the gradients' norm": step.gradient_norm}).items():
            if not math.isfinite(value):
                raise NotFiniteError(
                    f"stage {self.stage} {self.task}: found {name} {value} at step {step.step}, expected a finite one"
                )

    def _explosion(self, step: StepLosses) -> None:
        if len(self.spike_warnings) < EXPLOSIONS_NAMED:
            self.spike_warnings.append(
                f"stage {self.stage} {self.task}: the gradients exploded at step {step.step} (norm "
                f"{step.gradient_norm:.3g}, over {EXPLODED} times the steps before it); "
                "optimisation.max_gradient_norm would clip them"
            )
            self.note(f"warning: {self.spike_warnings[-1]}")


def is_gradient_spike(norm: float, before: Sequence[float]) -> bool:
    """Whether a gradient's norm is far above those of the steps before it."""
    return len(before) == TYPICAL_STEPS and norm > EXPLODED * median(before) > 0
