"""The loss terms of a method and their sum, the objective: task loss, distillation and weight consolidation.

`build_objective` builds the terms of an experiment once per stage. Terms whose weight is 0 are not built. Each term
returns named, weighted losses. The training step adds the losses and does not depend on the method.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from schemas.errors import ErrorCode, InputError
from schemas.experiment import Experiment
from schemas.method import Distill
from zscl.methods import losses
from zscl.methods.custom_losses import build_custom_term
from zscl.methods.interfaces import Batch, Features, LossTerm, StageContext, Teacher
from zscl.runtime.distributed import gather


@dataclass(frozen=True)
class Classification:
    """The task loss: cross-entropy over the class prompts of the current task.

    Attributes:
        batch_size: B, the number of task images in a global batch.
        label_smoothing: The fraction of the target probability that is spread over all classes.
    """

    batch_size: int
    label_smoothing: float

    def __call__(self, features: Features, batch: Batch) -> dict[str, torch.Tensor]:
        """Return the loss `classification` (see `losses.classification`)."""
        labels = gather(batch.labels, self.batch_size)
        loss = losses.classification(features.images, features.prompts, labels, features.scale, self.label_smoothing)
        return {"classification": loss}


class DistillationLoss(Protocol):
    """A loss between the student's and the teacher's features of the same reference images."""

    def __call__(self, student: torch.Tensor, teacher: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return named, weighted losses for the features [B', D] of student and teacher.

        Args:
            student: The student's features of the reference images, [B', D].
            teacher: The teacher's features of the same images, [B', D].
            scale: s = exp(logit_scale), a scalar.
        """


@dataclass(frozen=True)
class ContrastiveDistillation:
    """Image and text distillation (eq. 3): the similarities of images to texts, in both directions.

    Student and teacher logits are both s · features · textsᵀ, [B', N], with the teacher's texts. Image distillation
    takes the softmax over the N texts and the mean over the images, text distillation the softmax over the B' images
    and the mean over the texts. The student's text tower gets no gradient from these losses; the authors confirm
    that this is intended. One class computes both losses, because they share the logits.

    Attributes:
        texts: The teacher's text features, [N, D].
        temperature: The softmax temperature T.
        image_weight: Weight of image distillation.
        text_weight: Weight of text distillation.
    """

    texts: torch.Tensor
    temperature: float
    image_weight: float
    text_weight: float

    def __call__(self, student: torch.Tensor, teacher: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the losses `image_distillation` and `text_distillation`. A loss whose weight is 0 is left out."""
        student_logits, teacher_logits = scale * student @ self.texts.T, scale * teacher @ self.texts.T
        named = {}
        if self.image_weight:
            loss = losses.distillation(student_logits, teacher_logits, self.temperature)
            named["image_distillation"] = self.image_weight * loss
        if self.text_weight:
            loss = losses.distillation(student_logits.T, teacher_logits.T, self.temperature)
            named["text_distillation"] = self.text_weight * loss
        return named


@dataclass(frozen=True)
class SimilarityDistillation:
    """Distillation of the similarities of the reference images to each other.

    Attributes:
        temperature: The softmax temperature T.
        weight: Weight of the loss.
    """

    temperature: float
    weight: float

    def __call__(self, student: torch.Tensor, teacher: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the loss `similarity_distillation` (see `losses.similarity_distillation`)."""
        loss = losses.similarity_distillation(student, teacher, scale, self.temperature)
        return {"similarity_distillation": self.weight * loss}


@dataclass(frozen=True)
class FeatureDistance:
    """Mean squared error between the student's and the teacher's image features.

    Attributes:
        weight: Weight of the loss.
    """

    weight: float

    def __call__(self, student: torch.Tensor, teacher: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the loss `feature_distance` (see `losses.feature_distance`)."""
        return {"feature_distance": self.weight * losses.feature_distance(student, teacher)}


class Distillation:
    """Feature-space distillation on the global batch of reference images.

    The teacher's features are computed once per step, gathered over all ranks and passed to every distillation loss.

    Attributes:
        teacher: The stage's teacher.
        batch_size: B', the number of reference images in a global batch.
        losses: The distillation losses whose weight is not 0.
    """

    def __init__(self, teacher: Teacher, batch_size: int, settings: Distill) -> None:
        self.teacher, self.batch_size = teacher, batch_size
        self.losses: list[DistillationLoss] = []
        temperature, image_weight, text_weight = settings.temperature, settings.image_weight, settings.text_weight
        if image_weight or text_weight:
            self.losses.append(ContrastiveDistillation(teacher.texts, temperature, image_weight, text_weight))
        if settings.similarity_weight:
            self.losses.append(SimilarityDistillation(temperature, settings.similarity_weight))
        if settings.feature_weight:
            self.losses.append(FeatureDistance(settings.feature_weight))

    def __call__(self, features: Features, batch: Batch) -> dict[str, torch.Tensor]:
        """Return the named losses of all distillation losses."""
        assert features.references is not None
        assert batch.references is not None
        assert batch.identities is not None
        teacher_features = gather(self.teacher.image_features(batch.references, batch.identities), self.batch_size)
        named: dict[str, torch.Tensor] = {}
        for loss in self.losses:
            named |= loss(features.references, teacher_features, features.scale)
        return named


@dataclass(frozen=True)
class Consolidation:
    """Weight consolidation (eq. 6): the squared distance between the weights and the weights at the start of the stage.

    Attributes:
        parameters: The trained parameters θ.
        anchors: The values of the parameters at the start of the stage, θ₀.
        weight: Weight of the loss.
        multi_tensor: Whether to process all tensors with multi-tensor operations instead of one after another.
    """

    parameters: Sequence[torch.Tensor]
    anchors: Sequence[torch.Tensor]
    weight: float
    multi_tensor: bool = True

    def __call__(self, features: Features, batch: Batch) -> dict[str, torch.Tensor]:
        """Return the loss `consolidation` (see `losses.squared_distance`)."""
        distance = losses.squared_distance(self.parameters, self.anchors, self.multi_tensor)
        return {"consolidation": self.weight * distance}


@dataclass(frozen=True)
class Objective:
    """All loss terms of a method for one stage.

    Attributes:
        terms: The terms: task loss, distillation, weight consolidation, custom losses.
    """

    terms: Sequence[LossTerm]

    def __call__(self, features: Features, batch: Batch) -> dict[str, torch.Tensor]:
        """Compute all terms.

        Args:
            features: The student's features of the global batch.
            batch: This rank's slice of the global batch.

        Returns:
            The named, weighted losses of all terms.

        Raises:
            InputError: Two terms return a loss of the same name.
        """
        named: dict[str, torch.Tensor] = {}
        for term in self.terms:
            term_losses = term(features, batch)
            if duplicates := named.keys() & term_losses.keys():
                raise InputError(
                    f"method.custom_losses: found a second loss named '{min(duplicates)}', expected unique names",
                    code=ErrorCode.DUPLICATE,
                    field="method.custom_losses",
                )
            named |= term_losses
        return named


def build_objective(experiment: Experiment, context: StageContext) -> Objective:
    """Build the loss terms of an experiment's method for one stage.

    Args:
        experiment: The experiment.
        context: Information about the stage.

    Returns:
        The objective. It has no distillation term if the stage has no teacher.
    """
    method = experiment.method
    terms: list[LossTerm] = []
    if method.task_loss:
        terms.append(Classification(context.batch_size, method.task_loss.label_smoothing))
    if method.distill and context.teacher is not None:
        terms.append(Distillation(context.teacher, context.reference_batch_size, method.distill))
    if method.consolidate:
        multi_tensor = experiment.compute.savings.multi_tensor
        terms.append(Consolidation(context.trained, context.start, method.consolidate.weight, multi_tensor))
    terms += [build_custom_term(loss, context) for loss in method.custom_losses]
    return Objective(terms)
