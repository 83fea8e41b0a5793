"""What a stage hands on: the last weights, or an average of the weights along the way, merged with an anchor or not.

Both kinds of averaging are told after which update they stand and answer with a model.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn
from torch.optim.swa_utils import (
    AveragedModel,
    get_ema_avg_fn,
    get_ema_multi_avg_fn,
    get_swa_avg_fn,
    get_swa_multi_avg_fn,
)

from schemas.method import Average


class WeightAverager(Protocol):
    """Follows the student through a stage and gives the model that the stage hands on."""

    @property
    def merges(self) -> int:
        """Models averaged so far."""

    def after_step(self, step: int) -> None:
        """Look at the student after `step`, counted from 0."""

    @property
    def model(self) -> nn.Module:
        """The model to save, evaluate and start the next stage from."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What a checkpoint holds of it, beside the student."""

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from a checkpoint."""


class LastIterate:
    """No average: the student as it is."""

    merges = 0

    def __init__(self, student: nn.Module) -> None:
        self.model = student

    def after_step(self, step: int) -> None:
        """Nothing to do."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Nothing but the student."""
        return {}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Nothing to do."""


class RunningAverage:
    """Running average of the stage's start and the weights after steps 0, I, 2I, …, T (paper, eq. 7).

    A plain mean, or an exponential average: mean ← decay · mean + (1 − decay) · θ; after each merge, a share of the
    stage's start may be blended in again. Parameters only: buffers are the student's. The authors' loop takes T + 1
    steps of which the last has learning rate 0, so the weights after step T are those after step T − 1, merged once
    more.
    """

    def __init__(
        self, student: nn.Module, settings: Average, start: Sequence[torch.Tensor], multi_tensor: bool = True
    ) -> None:
        self.student, self.settings, self.start = student, settings, start
        self.average = _averaged(student, settings, multi_tensor)
        self.average.update_parameters(student)

    def after_step(self, step: int) -> None:
        """Take the student in when the step is a multiple of the interval."""
        if step % self.settings.every == 0:
            self.average.update_parameters(self.student)
            if self.settings.start_share:
                interpolate(trained_parameters(self.model), self.start, self.settings.start_share)

    @property
    def merges(self) -> int:
        """Models in the average so far, the stage's start included."""
        return int(self.average.n_averaged)

    @property
    def model(self) -> nn.Module:
        """The average."""
        module: nn.Module = self.average.module
        return module

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The average and how many models are in it."""
        return dict(self.average.state_dict())

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from a checkpoint."""
        self.average.load_state_dict(state)


def _averaged(student: nn.Module, settings: Average, multi_tensor: bool) -> AveragedModel:
    """A copy of the student that takes models in: all tensors at once, or one after another."""
    exponential = settings.kind == "exponential"
    if multi_tensor:
        merge = get_ema_multi_avg_fn(settings.decay) if exponential else get_swa_multi_avg_fn()
        return AveragedModel(student, multi_avg_fn=merge)
    return AveragedModel(student, avg_fn=get_ema_avg_fn(settings.decay) if exponential else get_swa_avg_fn())


def build_averager(
    average: Average | None, student: nn.Module, start: Sequence[torch.Tensor] = (), multi_tensor: bool = True
) -> WeightAverager:
    """Build what follows the student, from the method's averaging part.

    Args:
        average: the part, if the method has it.
        student: the model in training.
        start: the trained parameters at the stage's start, for a part that blends them in.
        multi_tensor: merge all tensors at once, or one after another.
    """
    return LastIterate(student) if average is None else RunningAverage(student, average, start, multi_tensor)


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that an optimizer changes, in the model's order."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@torch.no_grad()
def interpolate(weights: Sequence[torch.Tensor], anchor: Sequence[torch.Tensor], share: float) -> None:
    """θ ← (1 − share) · θ + share · anchor, in place."""
    torch._foreach_lerp_(list(weights), list(anchor), share)
