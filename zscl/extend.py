"""Stable names for code outside this package, such as custom losses (`method.custom_losses`).

These names keep their meaning between releases. Other modules of `zscl` may change or move.
"""

from zscl.methods.interfaces import Batch, Features, LossTerm, StageContext, Teacher
from zscl.runtime.distributed import gather, rank, world_size

__all__ = ["Batch", "Features", "LossTerm", "StageContext", "Teacher", "gather", "rank", "world_size"]
