"""A CLIP of two small layers a tower, in variations, and prompts for it."""

from typing import Any

import open_clip
import torch

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
