"""The training step."""

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
    """The model in training, seen from the step: batch in, global features out."""

    towers: nn.Module
    prompts: int
    scale: torch.Tensor
    batch_size: int
    reference_batch_size: int
    precision: str

    def __call__(self, batch: Batch) -> Features:
        """Encode this worker's images and class prompts; gather over the workers."""
        with precision_context(self.precision, batch.images.device):
            images, references, prompts = self.towers(batch.images, batch.references)
        return Features(
            images=gather_with_gradient(images, self.batch_size),
            prompts=gather_with_gradient(prompts, self.prompts) if shares_prompts(self.prompts) else prompts,
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
    """Update the student once. Returns each named loss, detached, and the norm of the gradients before any clipping."""
    named = objective(forward(batch), batch)
    optimizer.zero_grad()
    torch.stack(list(named.values())).sum().backward()
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    gradient_norm = get_total_norm([parameter.grad for parameter in trained if parameter.grad is not None])
    if max_gradient_norm is not None:
        clip_grads_with_norm_(trained, max_gradient_norm, gradient_norm)
    optimizer.step()
    schedule.step()
    return {name: loss.detach() for name, loss in named.items()}, gradient_norm


def shares_prompts(prompts: int) -> bool:
    """Whether the workers share the class prompts, or every one encodes all of them: too few to go round."""
    return prompts >= world_size()
