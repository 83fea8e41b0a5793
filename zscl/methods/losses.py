"""The losses of the method as pure functions of the global batch's L2-normalised features.

Equation numbers are those of Zheng et al., Preventing Zero-Shot Transfer Degradation in Continual Learning of
Vision-Language Models, ICCV 2023.
"""

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
    """Compute the cross-entropy of s · images · promptsᵀ against the labels.

    Args:
        images: Features of task images, [B, D].
        prompts: Features of class prompts, [C, D], one row for each class.
        labels: Class indices in 0 … C − 1, [B].
        scale: s = exp(logit_scale), a scalar.
        label_smoothing: The fraction of the target probability that is spread over all classes.

    Returns:
        The mean over the images, a scalar.
    """
    return F.cross_entropy(scale * images @ prompts.T, labels, label_smoothing=label_smoothing)


def distillation(student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Compute T² · CE(softmax(teacher / T), softmax(student / T)) (eq. 3).

    This is a cross-entropy and not a KL divergence: it includes the teacher's entropy, which is a constant. For image
    distillation, the logits [B', N] are the similarities of images to texts. Text distillation uses the transpose,
    [N, B'].

    Args:
        student_logits: The student's logits, [rows, choices]. The softmax runs over the choices.
        teacher_logits: The teacher's logits, [rows, choices].
        temperature: The softmax temperature T.

    Returns:
        The mean over the rows, a scalar.
    """
    target = (teacher_logits / temperature).softmax(dim=1)
    return F.cross_entropy(student_logits / temperature, target) * temperature**2


def similarity_distillation(
    student: torch.Tensor, teacher: torch.Tensor, scale: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Compute the loss `distillation` for the similarities of each image to all other images.

    The logits are s · features · featuresᵀ without the diagonal.

    Args:
        student: The student's image features, [B', D], with B' ≥ 2.
        teacher: The teacher's image features, [B', D].
        scale: s = exp(logit_scale), a scalar.
        temperature: The softmax temperature T.

    Returns:
        The mean over the images, a scalar.
    """
    student_logits, teacher_logits = (
        scale * _without_diagonal(features @ features.T) for features in (student, teacher)
    )
    return distillation(student_logits, teacher_logits, temperature)


def _without_diagonal(square: torch.Tensor) -> torch.Tensor:
    """Remove the diagonal: [n, n] → [n, n − 1]."""
    size = len(square)
    return square.flatten()[:-1].view(size - 1, size + 1)[:, 1:].reshape(size, size - 1)


def feature_distance(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return the mean squared error between the entries of two feature matrices [B', D]."""
    return F.mse_loss(student, teacher)


class _SquaredDistance(torch.autograd.Function):
    """Σ‖θ − θ₀‖² and its gradient 2(θ − θ₀) with multi-tensor operations.

    The backward pass recomputes the differences, so they need not be stored.
    """

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
    """Compute Σ‖θ − θ₀‖² over all parameters, without the factor ½ (eq. 6).

    Args:
        parameters: θ, the current values of the parameters.
        anchors: θ₀, reference values of the same shapes.
        multi_tensor: Whether to process all tensors with multi-tensor operations instead of one after another.

    Returns:
        The sum, a scalar.
    """
    if multi_tensor:
        return _SquaredDistance.apply(anchors, *parameters)  # type: ignore[no-any-return]
    distances = [(parameter - anchor).square().sum() for parameter, anchor in zip(parameters, anchors, strict=True)]
    return torch.stack(distances).sum()
