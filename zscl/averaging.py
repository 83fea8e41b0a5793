"""What a stage hands on: the last weights, or an average of the weights along the way, merged with an anchor or not.

Both kinds of averaging are told after which update they stand and answer with a model.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from schemas.method import Average


class HandOn(Protocol):
    """Follows the student through a stage and gives the model that the stage hands on."""

    @property
    def merges(self) -> int:
        """Models averaged so far."""

    def after_step(self, step: int) -> None:
        """Look at the student after `step`, counted from 0."""

    @property
    def model(self) -> nn.Module:
        """The model to save, evaluate and start the next stage from."""


class LastWeights:
    """No average: the student as it is."""

    merges = 0

    def __init__(self, student: nn.Module) -> None:
        self.model = student

    def after_step(self, step: int) -> None:
        """Nothing to do."""


class WeightEnsemble:
    """Running average of the stage's start and the weights after steps 0, I, 2I, …, T (paper, eq. 7).

    A plain mean, or an exponential average: mean ← decay · mean + (1 − decay) · θ; after each merge, a share of the
    stage's start may be blended in again. Parameters only: buffers are the student's. The authors' loop takes T + 1
    steps of which the last has learning rate 0, so the weights after step T are those after step T − 1, merged once
    more.
    """

    def __init__(self, student: nn.Module, settings: Average) -> None:
        self.student, self.settings = student, settings
        exponential = settings.kind == "exponential"
        merge = get_ema_multi_avg_fn(settings.decay) if exponential else get_swa_multi_avg_fn()
        self.average = AveragedModel(student, multi_avg_fn=merge)
        self.average.update_parameters(student)
        self.start = [parameter.detach().clone() for parameter in student.parameters()] if settings.start_share else []

    def after_step(self, step: int) -> None:
        """Take the student in when the step is a multiple of the interval."""
        if step % self.settings.every == 0:
            self.average.update_parameters(self.student)
            if self.start:
                interpolate(list(self.model.parameters()), self.start, self.settings.start_share)

    @property
    def merges(self) -> int:
        """Models in the average so far, the stage's start included."""
        return int(self.average.n_averaged)

    @property
    def model(self) -> nn.Module:
        """The average."""
        module: nn.Module = self.average.module
        return module


def hand_on(average: Average | None, student: nn.Module) -> HandOn:
    """Build what follows the student, from the method's averaging part."""
    return LastWeights(student) if average is None else WeightEnsemble(student, average)


@torch.no_grad()
def interpolate(weights: Sequence[torch.Tensor], anchor: Sequence[torch.Tensor], share: float) -> None:
    """θ ← (1 − share) · θ + share · anchor, in place."""
    torch._foreach_lerp_(list(weights), list(anchor), share)
