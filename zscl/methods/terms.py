"""A method's parts, bound to one stage: an object that returns named losses for a batch.

The training step adds the losses up and knows nothing of the method.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from schemas.errors import InputError
from schemas.experiment import Experiment
from schemas.method import Distill
from zscl.methods import losses
from zscl.methods.custom_losses import build_custom_term
from zscl.methods.interfaces import Batch, Features, LossTerm, StageContext, Teacher
from zscl.runtime.distributed import gather


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
        assert batch.identities is not None
        own = self.teacher.image_features(batch.references, batch.identities)
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
    multi_tensor: bool = True

    def __call__(self, features: Features, batch: Batch) -> dict[str, torch.Tensor]:
        """See `losses.squared_distance`."""
        distance = losses.squared_distance(self.parameters, self.anchors, self.multi_tensor)
        return {"consolidation": self.weight * distance}


@dataclass(frozen=True)
class Objective:
    """All parts of a method, for one stage."""

    terms: Sequence[LossTerm]

    def __call__(self, features: Features, batch: Batch) -> dict[str, torch.Tensor]:
        """Return every part's losses by name."""
        named: dict[str, torch.Tensor] = {}
        for part in self.terms:
            found = part(features, batch)
            if twice := named.keys() & found.keys():
                raise InputError(
                    f"method.further_losses: found a loss named '{min(twice)}' once more, expected a name of its own"
                )
            named |= found
        return named


def build_objective(experiment: Experiment, stage: StageContext) -> Objective:
    """Bind the experiment's method to one stage."""
    method = experiment.method
    parts: list[LossTerm] = []
    if method.task_loss:
        parts.append(Classification(stage.batch_size, method.task_loss.label_smoothing))
    if method.distill and stage.teacher is not None:  # without a teacher: nothing to distil on yet
        parts.append(Distillation(stage.teacher, stage.reference_batch_size, method.distill))
    if method.consolidate:
        multi_tensor = experiment.compute.savings.multi_tensor
        parts.append(Consolidation(stage.trained, stage.start, method.consolidate.weight, multi_tensor))
    parts += [build_custom_term(loss, stage) for loss in method.further_losses]
    return Objective(parts)
