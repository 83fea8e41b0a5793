"""The image tower with its last block for the pooled row alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import nn

from zscl.models.attention import (
    NotApplicableError,
    attend,
    finish_block,
    extract_blocks,
    project_qkv,
    check_attributes,
    run_block,
)


def apply_image_block(block: ResidualAttentionBlock, rows: torch.Tensor, pooled_row: bool = False) -> torch.Tensor:
    """A block over an image's tokens. [n, tokens, W] → the same, or [n, 1, W] for the first token alone."""
    normalised = block.ln_1(rows)
    if not pooled_row:
        return finish_block(block, rows, attend(*project_qkv(block.attn, normalised, slice(0, 3))))
    [query] = project_qkv(block.attn, normalised[:, :1], slice(0, 1))
    return finish_block(block, rows[:, :1], attend(query, *project_qkv(block.attn, normalised, slice(1, 3))))


@dataclass(frozen=True)
class ImageTower:
    """An open_clip vision transformer that pools the class token."""

    visual: VisionTransformer
    blocks: Sequence[ResidualAttentionBlock]
    checkpointed: bool

    @classmethod
    def from_clip(cls, clip: nn.Module, checkpointed: bool = False) -> "ImageTower":
        """Take the model's image tower apart.

        Raises:
            NotApplicableError: the last block's other tokens are read, too, or the tower is built differently.
        """
        visual = clip.visual
        if not isinstance(visual, VisionTransformer):
            raise NotApplicableError(f"it is a {type(visual).__name__}")
        check_attributes(visual, "attn_pool", "output_tokens", "pool_type", "transformer", "_embeds", "ln_post", "proj", "conv1")
        if visual.attn_pool is not None or visual.output_tokens or visual.pool_type != "tok":
            raise NotApplicableError(f"it does not pool the class token (pooling: {visual.pool_type})")
        return cls(visual, extract_blocks(visual.transformer), checkpointed)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Encode images, with the last block for the class token alone. [b, 3, H, W] → [b, D], normalised"""
        rows = self.visual._embeds(images)
        for block in self.blocks[:-1]:
            rows = run_block(self.checkpointed, apply_image_block, block, rows)
        rows = run_block(self.checkpointed, apply_image_block, self.blocks[-1], rows, True)
        pooled = self.visual.ln_post(rows[:, 0])
        return F.normalize(pooled if self.visual.proj is None else pooled @ self.visual.proj, dim=-1)
