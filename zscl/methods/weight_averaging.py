"""Weight averaging within a stage: last iterate, running mean (SWA, weight ensemble) or exponential moving average.

The averager's model is the result of the stage. It is saved and evaluated, and the next stage starts from it.
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
    """Averages the student's weights during a stage and provides the model that results from the stage."""

    @property
    def merges(self) -> int:
        """The number of models that were averaged so far."""

    def after_step(self, step: int) -> None:
        """Update the average after training step `step`, counted from 0."""

    @property
    def model(self) -> nn.Module:
        """The result of the stage, which is saved and evaluated and from which the next stage starts."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the averager's state for a checkpoint. The student's weights are stored separately."""

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restore the averager's state from a checkpoint."""


class LastIterate:
    """No averaging: the result of the stage is the student itself.

    Attributes:
        model: The student.
        merges: Always 0.
    """

    merges = 0

    def __init__(self, student: nn.Module) -> None:
        self.model = student

    def after_step(self, step: int) -> None:
        """Do nothing."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return an empty state, because the checkpoint already contains the student."""
        return {}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Do nothing."""


class RunningAverage:
    """An average of the weights at the start of the stage and after steps 0, I, 2I, …, at most T (eq. 7).

    I is `settings.every`, T the last step, θ the student's weights, and n the number of models in the average.
    Kind `mean` updates mean ← mean + (θ − mean) / (n + 1), kind `exponential` updates mean ← decay · mean + (1 − decay)
    · θ. If `start_share` is set, the mean is also interpolated with the weights at the start of the stage after each
    update. Only parameters are averaged; buffers are copied from the student.

    The authors' training loop takes T + 1 steps, and the learning rate of the last step is 0. The weights after step T
    are therefore the same as after step T − 1. If T is a multiple of I, they are added to the average once more.

    Attributes:
        student: The model in training.
        settings: The recipe's `method.average`.
        start: The trained parameters at the start of the stage.
        average: The averaged model with its counter.
    """

    def __init__(
        self, student: nn.Module, settings: Average, start: Sequence[torch.Tensor], multi_tensor: bool = True
    ) -> None:
        self.student, self.settings, self.start = student, settings, start
        self.average = _build_averaged_model(student, settings, multi_tensor)
        self.average.update_parameters(student)

    def after_step(self, step: int) -> None:
        """Add the student's weights to the average if `step` is a multiple of `settings.every`."""
        if step % self.settings.every == 0:
            self.average.update_parameters(self.student)
            if self.settings.start_share:
                interpolate(trained_parameters(self.model), self.start, self.settings.start_share)

    @property
    def merges(self) -> int:
        """The number of models in the average, including the stage's start."""
        return int(self.average.n_averaged)

    @property
    def model(self) -> nn.Module:
        """The averaged model."""
        module: nn.Module = self.average.module
        return module

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the averaged weights and the number of models in them."""
        return dict(self.average.state_dict())

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restore the averager's state from a checkpoint."""
        self.average.load_state_dict(state)


def _build_averaged_model(student: nn.Module, settings: Average, multi_tensor: bool) -> AveragedModel:
    """Build PyTorch's `AveragedModel` of the student, with multi-tensor operations or tensor by tensor."""
    is_exponential = settings.kind == "exponential"
    if multi_tensor:
        merge = get_ema_multi_avg_fn(settings.decay) if is_exponential else get_swa_multi_avg_fn()
        return AveragedModel(student, multi_avg_fn=merge)
    return AveragedModel(student, avg_fn=get_ema_avg_fn(settings.decay) if is_exponential else get_swa_avg_fn())


def build_averager(
    average: Average | None, student: nn.Module, start: Sequence[torch.Tensor] = (), multi_tensor: bool = True
) -> WeightAverager:
    """Build the weight averager of a stage.

    Args:
        average: The recipe's `method.average`; `None` for no averaging.
        student: The model in training.
        start: The trained parameters at the start of the stage; read if `average.start_share` is not 0.
        multi_tensor: Whether to average all tensors with multi-tensor operations instead of one after another.

    Returns:
        The averager.
    """
    return LastIterate(student) if average is None else RunningAverage(student, average, start, multi_tensor)


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that require gradients, in the model's order."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@torch.no_grad()
def interpolate(weights: Sequence[torch.Tensor], anchor: Sequence[torch.Tensor], share: float) -> None:
    """Interpolate the weights θ in place: θ ← (1 − share) · θ + share · anchor."""
    torch._foreach_lerp_(list(weights), list(anchor), share)
