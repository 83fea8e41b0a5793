"""Small random CLIP models of several architectures, with two layers per tower, and prompts for them."""

from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torch import nn

SMALL: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 16, "patch_size": 8, "head_width": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 50, "width": 16, "heads": 2, "layers": 2},
}
# Two prompts with the start token 48, the end token 49 and a common prefix of four tokens.
TOKENS = torch.tensor([[48, 5, 6, 9, 49, 0, 0, 0, 0, 0, 0, 0], [48, 5, 6, 9, 7, 8, 49, 0, 0, 0, 0, 0]])


def build_small_clip(
    vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None, kind: type = open_clip.CLIP
) -> Any:
    """Build a model in evaluation mode.

    Args:
        vision: Changes to the configuration of the image tower.
        text: Changes to the configuration of the text tower.
        kind: open_clip's class, `CLIP` or `CustomTextCLIP`.

    Returns:
        The model; the same weights at every call.
    """
    torch.manual_seed(0)
    model = kind(
        16, vision_cfg=SMALL["vision_cfg"] | (vision or {}), text_cfg=SMALL["text_cfg"] | (text or {}), output_dict=True
    )
    return model.eval()


class AttentionV4(nn.Module):
    """The attention of open_clip 4: the parameters of an `nn.MultiheadAttention` without `batch_first`."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.num_heads = attention.num_heads
        self.in_proj_weight, self.in_proj_bias = attention.in_proj_weight, attention.in_proj_bias
        self.out_proj = nn.Linear(attention.embed_dim, attention.embed_dim)
        self.out_proj.load_state_dict(attention.out_proj.state_dict())
        self.ln_q, self.ln_k, self.ln_inner = nn.Identity(), nn.Identity(), nn.Identity()
        self.attn_drop, self.out_drop = nn.Dropout(0.0), nn.Dropout(0.0)

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None) -> torch.Tensor:
        projected = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in projected)
        attended = F.scaled_dot_product_attention(self.ln_q(q), self.ln_k(k), v, attn_mask=attn_mask)
        return self.out_drop(self.out_proj(self.ln_inner(attended.transpose(1, 2).flatten(2))))  # type: ignore[no-any-return]


class TransformerV4(nn.Module):
    """The transformer of open_clip 4 around the blocks of an older version."""

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.width, self.layers, self.resblocks = transformer.width, transformer.layers, transformer.resblocks
        self.grad_checkpointing = False
        for block in self.resblocks:
            if isinstance(block.attn, nn.MultiheadAttention):
                block.attn = AttentionV4(block.attn)

    def get_cast_dtype(self) -> torch.dtype:
        return self.resblocks[0].mlp.c_fc.weight.dtype  # type: ignore[no-any-return, union-attr]

    def forward(self, rows: torch.Tensor, attn_mask: torch.Tensor | None = None) -> torch.Tensor:
        for block in self.resblocks:
            rows = rows + block.ls_1(block.attn(block.ln_1(rows), attn_mask=attn_mask))  # type: ignore[operator, union-attr]
            rows = rows + block.ls_2(block.mlp(block.ln_2(rows)))  # type: ignore[operator, union-attr]
        return rows


def build_small_clip_v4(**settings: Any) -> Any:
    """Build the same model with the blocks of open_clip 4, independently of the installed version."""
    model = build_small_clip(**settings)
    model.visual.transformer = TransformerV4(model.visual.transformer)
    text = model if hasattr(model, "transformer") else model.text
    text.transformer = TransformerV4(text.transformer)
    return model.eval()
