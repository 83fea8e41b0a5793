"""The losses of the method: pure functions of the global batch's features, all L2-normalised."""

from collections.abc import Sequence

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
    """`distillation` of the images' similarities to each other, instead of those to texts.

    Args:
        student: [B', D], normalised.
        teacher: [B', D], normalised.
        scale: exp(logit_scale).
        temperature: T.
    """
    return distillation(scale * student @ student.T, scale * teacher @ teacher.T, temperature)


def feature_distance(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean squared error over all entries of the normalised features, both [B', D]."""
    return F.mse_loss(student, teacher)


def squared_distance(parameters: Sequence[torch.Tensor], anchors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Σ ‖θ − θ₀‖² over all parameters, without ½ (paper, eq. 6)."""
    differences = torch._foreach_sub(list(parameters), list(anchors))
    return torch.stack([difference.square().sum() for difference in differences]).sum()
