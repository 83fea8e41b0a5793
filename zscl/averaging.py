"""What a stage hands on: the last weights, or an average of the weights along the way, merged with an anchor or not.

Both kinds of averaging are told after which update they stand and answer with a model.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_swa_multi_avg_fn

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
    """Plain running mean of the stage's start and the weights after steps 0, I, 2I, …, T (paper, eq. 7).

    Parameters only: buffers are the student's. The authors' loop takes T + 1 steps of which the last has learning
    rate 0, so the weights after step T are those after step T − 1, merged once more.
    """

    def __init__(self, student: nn.Module, every: int) -> None:
        self.student = student
        self.every = every
        self.mean = AveragedModel(student, multi_avg_fn=get_swa_multi_avg_fn())
        self.mean.update_parameters(student)

    def after_step(self, step: int) -> None:
        """Take the student in when the step is a multiple of the interval."""
        if step % self.every == 0:
            self.mean.update_parameters(self.student)

    @property
    def merges(self) -> int:
        """Models in the mean so far, the stage's start included."""
        return int(self.mean.n_averaged)

    @property
    def model(self) -> nn.Module:
        """The mean."""
        module: nn.Module = self.mean.module
        return module


def hand_on(average: Average | None, student: nn.Module) -> HandOn:
    """Build what follows the student, from the method's averaging part."""
    return LastWeights(student) if average is None else WeightEnsemble(student, average.every)


@torch.no_grad()
def interpolate(weights: Sequence[torch.Tensor], anchor: Sequence[torch.Tensor], share: float) -> None:
    """θ ← (1 − share) · θ + share · anchor, in place."""
    torch._foreach_lerp_(list(weights), list(anchor), share)
