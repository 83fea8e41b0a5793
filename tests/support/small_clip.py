"""A CLIP of two small layers a tower, in variations, and prompts for it."""

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
TOKENS = torch.tensor([[48, 5, 6, 9, 49, 0, 0, 0, 0, 0, 0, 0], [48, 5, 6, 9, 7, 8, 49, 0, 0, 0, 0, 0]])


def clip_of(
    vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None, kind: type = open_clip.CLIP
) -> Any:
    torch.manual_seed(0)
    model = kind(
        16, vision_cfg=SMALL["vision_cfg"] | (vision or {}), text_cfg=SMALL["text_cfg"] | (text or {}), output_dict=True
    )
    return model.eval()


class AttentionOfVersion4(nn.Module):
    """The attention of open_clip 4, with the parameters of an `nn.MultiheadAttention` and no `batch_first`."""

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


class TransformerOfVersion4(nn.Module):
    """The transformer of open_clip 4, around the blocks of an older one."""

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.width, self.layers, self.resblocks = transformer.width, transformer.layers, transformer.resblocks
        self.grad_checkpointing = False
        for block in self.resblocks:
            if isinstance(block.attn, nn.MultiheadAttention):
                block.attn = AttentionOfVersion4(block.attn)

    def get_cast_dtype(self) -> torch.dtype:
        return self.resblocks[0].mlp.c_fc.weight.dtype  # type: ignore[no-any-return, union-attr]

    def forward(self, rows: torch.Tensor, attn_mask: torch.Tensor | None = None) -> torch.Tensor:
        for block in self.resblocks:
            rows = rows + block.ls_1(block.attn(block.ln_1(rows), attn_mask=attn_mask))  # type: ignore[operator, union-attr]
            rows = rows + block.ls_2(block.mlp(block.ln_2(rows)))  # type: ignore[operator, union-attr]
        return rows


def clip_of_version_4(**given: Any) -> Any:
    """The same model with the blocks that open_clip 4 has, whichever version is installed."""
    model = clip_of(**given)
    model.visual.transformer = TransformerOfVersion4(model.visual.transformer)
    text = model if hasattr(model, "transformer") else model.text
    text.transformer = TransformerOfVersion4(text.transformer)
    return model.eval()
