"""Relational distillation (Park et al., CVPR 2019, distance-wise): how far images are from each other, as the teacher
sees them. A loss of one's own: nothing in zscl knows of it, the recipe names `relations.Relations`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from zscl.extend import Batch, Features, StageContext, gather


@dataclass(frozen=True)
class Relations:
    """Huber distance between the student's and the teacher's pairwise distances, each relative to their mean.

    A part is made once a stage, from the stage and the recipe's settings, and called once a step.
    """

    stage: StageContext
    weight: float = 1.0

    def __call__(self, features: Features, batch: Batch) -> dict[str, torch.Tensor]:
        """Losses by name, each a weighted scalar of the global batch; zscl adds them up and draws their curves."""
        if self.stage.teacher is None or features.references is None:
            return {}
        assert batch.references is not None
        assert batch.identities is not None
        own = self.stage.teacher.image_features(batch.references, batch.identities)
        teacher = gather(own, self.stage.reference_batch_size)  # [B', D], whatever the number of workers
        distance = F.smooth_l1_loss(_distances(features.references), _distances(teacher))
        return {"relations": self.weight * distance}


def _distances(features: torch.Tensor) -> torch.Tensor:
    """[B', D] → [B' (B' − 1) / 2]"""
    distances = F.pdist(features)
    return distances / distances.mean()
