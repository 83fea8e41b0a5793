"""The training step: the forward pass of the global batch, the losses, and the optimizer's update."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from zscl.methods.interfaces import Batch, Features
from zscl.methods.terms import Objective
from zscl.models.clip import precision_context
from zscl.runtime.distributed import gather_with_gradient, world_size


@dataclass(frozen=True)
class GlobalBatchForward:
    """The student's forward pass. It encodes this rank's slice of a batch and returns the features of the global batch.

    Attributes:
        towers: A module that computes (image, reference, prompt features) from (task images, reference images).
        prompts: C, the number of class prompts.
        scale: exp(logit_scale), a scalar.
        batch_size: B, the number of task images in a global batch.
        reference_batch_size: B', the number of reference images in a global batch.
        precision: The recipe's `optimisation.precision`.
    """

    towers: nn.Module
    prompts: int
    scale: torch.Tensor
    batch_size: int
    reference_batch_size: int
    precision: str

    def __call__(self, batch: Batch) -> Features:
        """Encode this rank's images and class prompts, and gather the features of all ranks with gradients."""
        with precision_context(self.precision, batch.images.device):
            images, references, prompts = self.towers(batch.images, batch.references)
        return Features(
            images=gather_with_gradient(images, self.batch_size),
            prompts=gather_with_gradient(prompts, self.prompts) if has_sharded_prompts(self.prompts) else prompts,
            references=None if references is None else gather_with_gradient(references, self.reference_batch_size),
            scale=self.scale,
        )


def train_step(
    forward: GlobalBatchForward,
    objective: Objective,
    optimizer: Optimizer,
    schedule: LRScheduler,
    batch: Batch,
    max_gradient_norm: float | None = None,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Take one training step: forward pass, losses, backward pass and update of the student.

    Args:
        forward: The student's forward pass.
        objective: The sum of the method's loss terms.
        optimizer: Updates the trained parameters.
        schedule: The learning-rate schedule.
        batch: This rank's slice of the global batch.
        max_gradient_norm: The L2 norm to which gradients are clipped; `None` disables clipping.

    Returns:
        The named, detached losses, and the L2 norm of the gradients before clipping.
    """
    losses = objective(forward(batch), batch)
    optimizer.zero_grad()
    torch.stack(list(losses.values())).sum().backward()
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    gradient_norm = get_total_norm([parameter.grad for parameter in trained if parameter.grad is not None])
    if max_gradient_norm is not None:
        clip_grads_with_norm_(trained, max_gradient_norm, gradient_norm)
    optimizer.step()
    schedule.step()
    return {name: loss.detach() for name, loss in losses.items()}, gradient_norm


def has_sharded_prompts(prompts: int) -> bool:
    """Return whether the ranks divide the class prompts. With fewer prompts than ranks, every rank encodes all."""
    return prompts >= world_size()
