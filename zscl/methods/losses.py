"""The losses of the method: pure functions of the global batch's features, all L2-normalised."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F


def classification(
    images: torch.Tensor,
    prompts: torch.Tensor,
    labels: torch.Tensor,
    scale: torch.Tensor,
    label_smoothing: float,
) -> torch.Tensor:
    """Cross-entropy over the current task's class prompts.

    Args:
        images: [B, D].
        prompts: [C, D], one a class.
        labels: [B], in 0 … C − 1.
        scale: exp(logit_scale), a scalar.
        label_smoothing: share of the target spread over all classes.
    """
    return F.cross_entropy(scale * images @ prompts.T, labels, label_smoothing=label_smoothing)


def distillation(student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Cross-entropy of the student's soft prediction against the teacher's, times T² (paper, eq. 3).

    A cross-entropy and not a KL divergence: the teacher's entropy stays in as a constant.

    Args:
        student_logits: [rows, choices]; the softmax runs over the choices, the mean over the rows.
        teacher_logits: [rows, choices].
        temperature: T.
    """
    target = (teacher_logits / temperature).softmax(dim=1)
    return F.cross_entropy(student_logits / temperature, target) * temperature**2


def similarity_distillation(
    student: torch.Tensor, teacher: torch.Tensor, scale: torch.Tensor, temperature: float
) -> torch.Tensor:
    """`distillation` of the images' similarities to each other, instead of those to texts; not of those to themselves.

    Args:
        student: [B', D], normalised, B' at least 2.
        teacher: [B', D], normalised.
        scale: exp(logit_scale).
        temperature: T.
    """
    ours, theirs = (scale * _without_diagonal(features @ features.T) for features in (student, teacher))
    return distillation(ours, theirs, temperature)


def _without_diagonal(square: torch.Tensor) -> torch.Tensor:
    """[n, n] → [n, n − 1]"""
    size = len(square)
    return square.flatten()[:-1].view(size - 1, size + 1)[:, 1:].reshape(size, size - 1)


def feature_distance(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean squared error over all entries of the normalised features, both [B', D]."""
    return F.mse_loss(student, teacher)


class _SquaredDistance(torch.autograd.Function):
    """Σ ‖θ − θ₀‖² and its gradient 2(θ − θ₀), all tensors at once; the differences are not kept in between."""

    @staticmethod
    def forward(context: Any, anchors: Sequence[torch.Tensor], *parameters: torch.Tensor) -> torch.Tensor:
        context.parameters, context.anchors = parameters, anchors
        norms = torch._foreach_norm(torch._foreach_sub(parameters, list(anchors)))
        return torch.stack(norms).square().sum()

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        differences = torch._foreach_sub(context.parameters, list(context.anchors))
        torch._foreach_mul_(differences, 2 * gradients[0])
        return None, *differences


def squared_distance(
    parameters: Sequence[torch.Tensor], anchors: Sequence[torch.Tensor], multi_tensor: bool = True
) -> torch.Tensor:
    """Σ ‖θ − θ₀‖² over all parameters, without ½ (paper, eq. 6).

    Args:
        parameters: θ.
        anchors: θ₀, of the same shapes.
        multi_tensor: all parameters at once, or one after another.
    """
    if multi_tensor:
        return _SquaredDistance.apply(anchors, *parameters)  # type: ignore[no-any-return]
    distances = [(own - anchor).square().sum() for own, anchor in zip(parameters, anchors, strict=True)]
    return torch.stack(distances).sum()
