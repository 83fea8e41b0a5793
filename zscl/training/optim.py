"""The optimizer (AdamW), the learning-rate schedule, and the selection of trained parameters."""

import math

from torch import nn
from torch.optim import AdamW

from schemas.experiment import Experiment


def learning_rate_factor(step: int, warmup_steps: int, steps: int) -> float:
    """Compute the factor of a step's learning rate: linear warm-up to 1, then a half cosine to 0.

    Args:
        step: The step's number, from 0.
        warmup_steps: Number of warm-up steps.
        steps: Number of steps of the stage.

    Returns:
        The factor in [0, 1].
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if step >= steps:  # LambdaLR also calls this after the last step; avoids 0 / 0 if all steps are warm-up
        return 0.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (steps - warmup_steps)))


def build_optimizer(parameters: list[nn.Parameter], learning_rate: float, experiment: Experiment) -> AdamW:
    """Build the optimizer of a stage from the recipe's `optimisation` and `compute.savings`."""
    optimisation, savings = experiment.optimisation, experiment.compute.savings
    return AdamW(
        parameters,
        lr=learning_rate,
        betas=optimisation.betas,
        weight_decay=optimisation.weight_decay,
        fused=savings.fused_optimizer,
        foreach=None if savings.fused_optimizer else False,
    )


def select_trained_parameters(model: nn.Module, train: str) -> None:
    """Set `requires_grad` to whether a parameter is trained; the logit scale and the logit bias are never trained.

    Args:
        model: The open_clip model, changed in place.
        train: The recipe's `method.train`: `model`, `image_tower` or `text_tower`.
    """
    for name, parameter in model.named_parameters():
        tower = "image_tower" if name.startswith("visual.") else "text_tower"
        parameter.requires_grad_(train in ("model", tower) and name not in ("logit_scale", "logit_bias"))
