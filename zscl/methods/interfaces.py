"""Interfaces of loss terms: `Batch`, `Features`, `Teacher`, `StageContext` and the `LossTerm` protocol.

A loss term is built once per stage from a `StageContext` and called at every training step with the `Features` of the
global batch and this rank's `Batch`. The training step adds the returned losses and does not depend on the method.

Symbols in tensor shapes:

- B, B': task images and reference images in a global batch, summed over all ranks;
- b, b': this rank's slice of them. A rank holds a contiguous slice (`zscl.runtime.distributed.rank_slice`), and the
  slices of all ranks in order are the global batch;
- C: class prompts; N: distillation texts; D: width of the embedding.

A custom loss (recipe field `method.custom_losses`) imports these names from `zscl.extend`. Minimal example, with the
settings `{weight: 0.5}` in the recipe:

    from dataclasses import dataclass

    import torch

    from zscl.extend import Batch, Features, StageContext, gather

    @dataclass(frozen=True)
    class FeatureDistance:
        context: StageContext
        weight: float = 1.0

        def __call__(self, features: Features, batch: Batch) -> dict[str, torch.Tensor]:
            teacher = self.context.teacher
            if teacher is None:  # no distillation in this stage
                return {}
            rank_features = teacher.image_features(batch.references, batch.identities)  # [b', D]
            target = gather(rank_features, self.context.reference_batch_size)  # [B', D]
            return {"feature_distance_l2": self.weight * (features.references - target).square().mean()}

Every rank must return the same value, computed from the global batch, so that results do not depend on the number of
ranks. Tensors of a `Batch` or of the teacher hold this rank's slice only and need `gather`, which is collective: all
ranks must call it at the same steps. Gradients reach the student through `Features` and `StageContext.trained`; a term
must not run the student itself.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from zscl.data.sample import Samples


@dataclass(frozen=True)
class Batch:
    """This rank's slice of a global batch.

    Images are transformed and on the model's device. Task images use the training transform, reference images the
    evaluation transform.

    Attributes:
        images: Task images, [b, 3, H, W].
        labels: Class indices of the task images, int64, [b]. They index the first rows of `Features.prompts`.
        references: Reference images (the images used for distillation), [b', 3, H, W]; `None` if the stage has no
            teacher.
        identities: Index in the data set and content hash of each reference image, int64, [b', 2], on the CPU (see
            `zscl.data.sample.Sample.identity`). They are the keys of cached teacher features. `None` if the stage has
            no teacher.
    """

    images: torch.Tensor
    labels: torch.Tensor
    references: torch.Tensor | None = None
    identities: torch.Tensor | None = None


@dataclass(frozen=True)
class Features:
    """The student's features of the global batch: all ranks hold the same values.

    All features are L2-normalised and at least float32, also with bf16 autocast. Rows have the order of the global
    batch. The gradient of a loss with respect to them is propagated to the student.

    Attributes:
        images: Features of the task images, [B, D].
        prompts: Features of the class prompts, [C, D]: one row for each class of the current task in label order, with
            the task's first template. If the recipe adds classes of earlier tasks or negative texts to the softmax,
            their rows follow.
        references: Features of the reference images, [B', D]; `None` if the stage has no teacher.
        scale: s = exp(logit_scale), a scalar, which is not trained.
    """

    images: torch.Tensor
    prompts: torch.Tensor
    references: torch.Tensor | None
    scale: torch.Tensor


class LossTerm(Protocol):
    """A term of the training objective. Any callable with this signature can be used."""

    def __call__(self, features: Features, batch: Batch) -> dict[str, torch.Tensor]:
        """Compute the term for one training step.

        Args:
            features: The student's features of the global batch.
            batch: This rank's slice of the global batch.

        Returns:
            A dict of named, weighted losses, which are floating-point scalars on the model's device. The training step
            minimises the sum of the losses of all terms, and logs every loss under its name. Names must be unique
            within the method. An empty dict means that the term does not apply at this step.
        """


@dataclass(frozen=True)
class Teacher:
    """Access to the features of the frozen model from which a stage distils.

    Attributes:
        images: The data set of reference images. The training loop draws `Batch.references` from it.
        texts: The teacher's L2-normalised features of all distillation texts, [N, D], on the model's device. They are
            computed once and equal on all ranks.
        image_features: Returns the teacher's L2-normalised features, [b', D], of `Batch.references` [b', 3, H, W] and
            `Batch.identities` [b', 2]. It runs without gradients. Cached features are read instead of computed.
    """

    images: Samples
    texts: torch.Tensor
    image_features: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class StageContext:
    """Information about a stage for its loss terms. All values are constant during the stage.

    Attributes:
        batch_size: B, the number of task images in a global batch. It is the second argument of `gather` for tensors
            with one row per task image.
        reference_batch_size: B', the number of reference images in a global batch. It is the second argument of
            `gather` for tensors with one row per reference image.
        trained: The student's trained parameters θ, which are updated in place at every step. If only the embeddings of
            tokens that occur in the class prompts are trained, the token embedding has one row for each such token.
        start: Copies of the trained parameters at the start of the stage, θ₀, in the order of `trained`. Empty if no
            part of the method needs them. If the method has custom losses, they are always available.
        teacher: The teacher; `None` if the method does not distil, or if the stage has no images for distillation (for
            example, no exemplars in the first stage).
    """

    batch_size: int
    reference_batch_size: int
    trained: Sequence[torch.Tensor]
    start: Sequence[torch.Tensor]
    teacher: Teacher | None
