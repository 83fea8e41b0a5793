"""The optimizer, its schedule and the parameters that it trains."""

import math

from torch import nn
from torch.optim import AdamW

from schemas.experiment import Experiment


def learning_rate_factor(step: int, warmup_steps: int, steps: int) -> float:
    """Linear warm-up, then half a cosine; `step` counts from 0."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if step >= steps:  # asked for once behind the last step, and 0 / 0 where all of them warm up
        return 0.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (steps - warmup_steps)))


def build_optimizer(parameters: list[nn.Parameter], learning_rate: float, experiment: Experiment) -> AdamW:
    """The optimizer of a stage."""
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
    """Train the model, its `image_tower` or its `text_tower`; never the logit scale (and a sigmoid model's bias)."""
    for name, parameter in model.named_parameters():
        tower = "image_tower" if name.startswith("visual.") else "text_tower"
        parameter.requires_grad_(train in ("model", tower) and name not in ("logit_scale", "logit_bias"))
