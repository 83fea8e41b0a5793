"""What a training step and the terms of a loss exchange."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from zscl.data.sample import Samples


@dataclass(frozen=True)
class Batch:
    """This worker's share of a global batch.

    images [b, 3, H, W], labels [b]; references [b', 3, H, W] and, on the CPU, who they are (see
    `samples.Sample.identity`) [b', 2], or `None`.
    """

    images: torch.Tensor
    labels: torch.Tensor
    references: torch.Tensor | None = None
    identities: torch.Tensor | None = None


@dataclass(frozen=True)
class Features:
    """The student's normalised features of the global batch.

    images [B, D], prompts [C, D], references [B', D] or `None`; scale = exp(logit_scale).
    """

    images: torch.Tensor
    prompts: torch.Tensor
    references: torch.Tensor | None
    scale: torch.Tensor


class LossTerm(Protocol):
    """One term, or a few, of a method's loss."""

    def __call__(self, features: Features, batch: Batch) -> dict[str, torch.Tensor]:
        """Return the part's losses by name, each a weighted scalar."""


@dataclass(frozen=True)
class Teacher:
    """What a stage distils from: the teacher, seen through its embeddings.

    images: the images distilled on; texts [N, D]: the teacher's embeddings of all texts distilled on, normalised;
    image_features: from images [b', 3, H, W] and their identities [b', 2] to the teacher's features [b', D].
    """

    images: Samples
    texts: torch.Tensor
    image_features: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class StageContext:
    """What a part may want to know of the stage that it is bound to.

    batch_size, reference_batch_size: B and B', over all workers; trained: the student's trained parameters; start: what
    they are at the stage's start, for a method that looks back at it; teacher: for a stage that distils.
    """

    batch_size: int
    reference_batch_size: int
    trained: Sequence[torch.Tensor]
    start: Sequence[torch.Tensor]
    teacher: Teacher | None
