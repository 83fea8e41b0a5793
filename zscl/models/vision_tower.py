"""The vision transformer of CLIP, with its last block computed for the class token only."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import nn

from zscl.models.attention import (
    NotApplicableError,
    attend,
    check_attributes,
    extract_blocks,
    finish_block,
    project_qkv,
    run_block,
)


def apply_image_block(block: ResidualAttentionBlock, rows: torch.Tensor, pooled_row: bool = False) -> torch.Tensor:
    """Apply a block to the tokens of images.

    Args:
        block: The block.
        rows: Hidden states, [b, tokens, W].
        pooled_row: Whether to compute only the output of the first token (the class token).

    Returns:
        The block's output, [b, tokens, W], or [b, 1, W] with `pooled_row`.
    """
    normalised = block.ln_1(rows)
    if not pooled_row:
        return finish_block(block, rows, attend(*project_qkv(block.attn, normalised, slice(0, 3))))
    [query] = project_qkv(block.attn, normalised[:, :1], slice(0, 1))
    return finish_block(block, rows[:, :1], attend(query, *project_qkv(block.attn, normalised, slice(1, 3))))


@dataclass(frozen=True)
class ImageTower:
    """A forward pass of an open_clip vision transformer that pools the class token.

    Attributes:
        visual: open_clip's vision transformer. Its parameters are shared, not copied.
        blocks: The residual attention blocks of `visual`.
        checkpointed: Whether the blocks use gradient checkpointing.
    """

    visual: VisionTransformer
    blocks: Sequence[ResidualAttentionBlock]
    checkpointed: bool

    @classmethod
    def from_clip(cls, clip: nn.Module, checkpointed: bool = False) -> "ImageTower":
        """Build the forward pass from a model's image tower.

        Args:
            clip: open_clip's model.
            checkpointed: Whether the blocks use gradient checkpointing.

        Returns:
            The tower, which shares the model's parameters.

        Raises:
            NotApplicableError: Features depend on more than the class token of the last block, or the structure is not
                supported.
        """
        visual = clip.visual
        if not isinstance(visual, VisionTransformer):
            raise NotApplicableError(f"it is a {type(visual).__name__}")
        check_attributes(
            visual, "attn_pool", "output_tokens", "pool_type", "transformer", "_embeds", "ln_post", "proj", "conv1"
        )
        if visual.attn_pool is not None or visual.output_tokens or visual.pool_type != "tok":
            raise NotApplicableError(f"it does not pool the class token (pooling: {visual.pool_type})")
        return cls(visual, extract_blocks(visual.transformer), checkpointed)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Encode images.

        Args:
            images: Transformed images, [b, 3, H, W].

        Returns:
            L2-normalised features, [b, D].
        """
        rows = self.visual._embeds(images)
        for block in self.blocks[:-1]:
            rows = run_block(self.checkpointed, apply_image_block, block, rows)
        rows = run_block(self.checkpointed, apply_image_block, self.blocks[-1], rows, True)
        pooled = self.visual.ln_post(rows[:, 0])
        return F.normalize(pooled if self.visual.proj is None else pooled @ self.visual.proj, dim=-1)
