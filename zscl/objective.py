"""A method's parts, bound to one stage: an object that returns named losses for a batch.

The training step adds the losses up and knows nothing of the method.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from schemas.experiment import Experiment
from schemas.method import Distill
from zscl import losses
from zscl.distributed import gather
from zscl.model import at_least_float32, precision_context
from zscl.shards import Samples


@dataclass(frozen=True)
class Batch:
    """This worker's share of a global batch.

    images [b, 3, H, W], labels [b], references [b', 3, H, W] or `None`.
    """

    images: torch.Tensor
    labels: torch.Tensor
    references: torch.Tensor | None


@dataclass(frozen=True)
class Features:
    """The student's normalised features of the global batch.

    images [B, D], prompts [C, D], references [B', D] or `None`; scale = exp(logit_scale).
    """

    images: torch.Tensor
    prompts: torch.Tensor
    references: torch.Tensor | None
    scale: torch.Tensor


class Part(Protocol):
    """One term, or a few, of a method's loss."""

    def __call__(self, features: Features, batch: Batch) -> dict[str, torch.Tensor]:
        """Return the part's losses by name, each a weighted scalar."""


@dataclass(frozen=True)
class Classification:
    """The task loss, over the current task's class prompts."""

    batch_size: int
    label_smoothing: float

    def __call__(self, features: Features, batch: Batch) -> dict[str, torch.Tensor]:
        """See `losses.classification`."""
        labels = gather(batch.labels, self.batch_size)
        loss = losses.classification(features.images, features.prompts, labels, features.scale, self.label_smoothing)
        return {"classification": loss}


@dataclass(frozen=True)
class Teacher:
    """The frozen model distilled from, what it is shown, and its embeddings of all texts distilled on.

    images: where the reference images come from; texts [N, D], normalised.
    """

    model: nn.Module
    images: Samples
    texts: torch.Tensor
    precision: str

    @torch.no_grad()
    def image_features(self, images: torch.Tensor) -> torch.Tensor:
        """Encode images. [b, 3, H, W] → [b, D], normalised."""
        with precision_context(self.precision, images.device):
            encoded: torch.Tensor = self.model.encode_image(images, normalize=True)  # type: ignore[operator]
        return at_least_float32(encoded)


@dataclass(frozen=True)
class Distillation:
    """Feature-space distillation: the student's reference images against the teacher's texts, both ways.

    Both directions run over the global reference batch. The text tower gets no gradient from it: the texts are the
    teacher's (the authors confirm that this is by design).
    """

    teacher: Teacher
    batch_size: int
    settings: Distill

    def __call__(self, features: Features, batch: Batch) -> dict[str, torch.Tensor]:
        """Image distillation: softmax over the N texts. Text distillation: softmax over the B' images.

        Two more compare the images with each other, or their features; all are named for their weights.
        """
        assert features.references is not None
        assert batch.references is not None
        own = self.teacher.image_features(batch.references)
        settings, scale, temperature = self.settings, features.scale, self.settings.temperature
        student, teacher = features.references, gather(own, self.batch_size)
        named = {}
        if settings.image_weight or settings.text_weight:
            ours, theirs = scale * student @ self.teacher.texts.T, scale * teacher @ self.teacher.texts.T
            if settings.image_weight:
                named["image_distillation"] = settings.image_weight * losses.distillation(ours, theirs, temperature)
            if settings.text_weight:
                named["text_distillation"] = settings.text_weight * losses.distillation(ours.T, theirs.T, temperature)
        if settings.similarity_weight:
            distilled = losses.similarity_distillation(student, teacher, scale, temperature)
            named["similarity_distillation"] = settings.similarity_weight * distilled
        if settings.feature_weight:
            named["feature_distance"] = settings.feature_weight * losses.feature_distance(student, teacher)
        return named


@dataclass(frozen=True)
class Consolidation:
    """Weight consolidation: the squared distance to the weights at the stage's start."""

    parameters: Sequence[torch.Tensor]
    anchors: Sequence[torch.Tensor]
    weight: float

    def __call__(self, features: Features, batch: Batch) -> dict[str, torch.Tensor]:
        """See `losses.squared_distance`."""
        return {"consolidation": self.weight * losses.squared_distance(self.parameters, self.anchors)}


@dataclass(frozen=True)
class Objective:
    """All parts of a method, for one stage."""

    parts: Sequence[Part]

    def __call__(self, features: Features, batch: Batch) -> dict[str, torch.Tensor]:
        """Return every part's losses by name."""
        named: dict[str, torch.Tensor] = {}
        for part in self.parts:
            named |= part(features, batch)
        return named


def build(experiment: Experiment, student: nn.Module, teacher: Teacher | None) -> Objective:
    """Bind the experiment's method to the student as it stands at the stage's start."""
    method, optimisation = experiment.method, experiment.optimisation
    parts: list[Part] = []
    if method.task_loss:
        parts.append(Classification(optimisation.batch_size, method.task_loss.label_smoothing))
    if method.distill and teacher is not None:  # without a teacher: nothing to distil on yet
        parts.append(Distillation(teacher, optimisation.reference_batch_size, method.distill))
    if method.consolidate:
        trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
        anchors = [parameter.detach().clone() for parameter in trained]
        parts.append(Consolidation(trained, anchors, method.consolidate.weight))
    return Objective(parts)
