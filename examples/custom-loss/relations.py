"""Relational distillation (Park et al., CVPR 2019, distance-wise) as a custom loss.

The student's pairwise distances between images are pulled towards the teacher's. The recipe names
`relations.Relations`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from zscl.extend import Batch, Features, StageContext, gather


@dataclass(frozen=True)
class Relations:
    """Huber distance between the student's and the teacher's pairwise distances, each relative to their mean.

    zscl creates one object per stage, with the stage's context and the recipe's settings, and calls it once per step.

    Attributes:
        stage: The stage's context.
        weight: The factor of the loss.
    """

    stage: StageContext
    weight: float = 1.0

    def __call__(self, features: Features, batch: Batch) -> dict[str, torch.Tensor]:
        """Compute the loss of the global batch.

        Args:
            features: The student's features of the global batch.
            batch: This worker's part of the batch.

        Returns:
            The weighted loss by name; empty if the stage does not distil.
        """
        if self.stage.teacher is None or features.references is None:
            return {}
        assert batch.references is not None
        assert batch.identities is not None
        local = self.stage.teacher.image_features(batch.references, batch.identities)
        teacher = gather(local, self.stage.reference_batch_size)  # [B', D] for any number of workers
        distance = F.smooth_l1_loss(_distances(features.references), _distances(teacher))
        return {"relations": self.weight * distance}


def _distances(features: torch.Tensor) -> torch.Tensor:
    """Return the pairwise distances [B' (B' − 1) / 2] of features [B', D], divided by their mean."""
    distances = F.pdist(features)
    return distances / distances.mean()
