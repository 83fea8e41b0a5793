"""open_clip's own transformer blocks in parts, so that rows whose outputs nobody reads can be left out."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock
from torch import nn
from torch.utils.checkpoint import checkpoint


class NotApplicableError(Exception):
    """A tower is built differently from what a saving needs; says how."""


def check_attributes(tower: object, *names: str) -> None:
    """See that a tower has the attributes that are used of it: another version of open_clip may have others.

    Args:
        tower: open_clip's module.
        names: of the attributes.

    Raises:
        NotApplicableError: it lacks one of them.
    """
    if missing := [name for name in names if not hasattr(tower, name)]:
        raise NotApplicableError(f"this version of open_clip has no {', '.join(missing)} in its {type(tower).__name__}")


# What a plain block consists of. A part that is not listed (a norm of queries, a scale of heads, a norm of what is
# attended to) would be left out by the functions below.
BLOCK_PARTS = {"ln_1", "attn", "ls_1", "ln_2", "mlp", "ls_2"}
ATTENTION_PARAMETERS = {"in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"}


def extract_blocks(transformer: object) -> Sequence[ResidualAttentionBlock]:
    """Return a transformer's residual attention blocks after checking their structure.

    The check looks at the blocks and not at attributes of the transformer around them, which change between versions
    of open_clip: version 3 has `nn.MultiheadAttention` and says `batch_first` of it, version 4 has an attention of its
    own that knows no other layout. Both keep the same parameters.

    Args:
        transformer: open_clip's module with `resblocks`.

    Returns:
        The blocks in order.

    Raises:
        NotApplicableError: there are none, or one of them has other parts than those that are computed here.
    """
    blocks = list(getattr(transformer, "resblocks", []))
    if not blocks:
        raise NotApplicableError("its transformer is not open_clip's own")
    for block in blocks:
        if type(block) is not ResidualAttentionBlock:
            raise NotApplicableError(f"it has blocks of another kind ({type(block).__name__})")
        if other := _differing_parts(block):
            raise NotApplicableError(f"its blocks are built differently ({', '.join(sorted(other))})")
    return blocks


def _differing_parts(block: ResidualAttentionBlock) -> set[str]:
    """Name the parts that a block has beside, or lacks of, those of a plain block."""
    other = BLOCK_PARTS ^ {name for name, _ in block.named_children()}
    if "attn" in other:
        return other
    attention = block.attn
    other |= {f"attn.{name}" for name in ATTENTION_PARAMETERS ^ {name for name, _ in attention.named_parameters()}}
    if not getattr(attention, "batch_first", True):  # an attention without the choice has the batch first
        other.add("attn.batch_first")
    dropouts = [module.p for module in attention.modules() if isinstance(module, nn.Dropout)]
    if any([getattr(attention, "dropout", 0.0), *dropouts]):
        other.add("attn.dropout")
    if getattr(attention, "add_zero_attn", False):
        other.add("attn.add_zero_attn")
    return other


def project_qkv(attention: nn.MultiheadAttention, rows: torch.Tensor, parts: slice) -> list[torch.Tensor]:
    """Queries, keys, values (parts 0, 1, 2) of the rows, each [..., heads, width of a head].

    Keys get no bias: it would move all scores of a query alike, which a softmax does not see. So its gradient is 0,
    as it is in exact arithmetic, and not round-off that Adam makes whole steps of.
    """
    width = rows.shape[-1]
    within = slice(parts.start * width, parts.stop * width)
    bias = attention.in_proj_bias
    seen = torch.cat([bias[:width], bias.new_zeros(width), bias[2 * width :]])
    projected = F.linear(rows, attention.in_proj_weight[within], seen[within])
    return [part.unflatten(-1, (attention.num_heads, -1)) for part in projected.split(width, dim=-1)]


def attend(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention over [n, rows, heads, width]; rows come back with their heads joined."""
    q, k, v = (part.transpose(1, 2) for part in (queries, keys, values))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def finish_block(block: ResidualAttentionBlock, rows: torch.Tensor, looked: torch.Tensor) -> torch.Tensor:
    """The rest of a block: what `look` gave for these rows, projected and added, and the MLP. [..., W] → the same"""
    between = rows + block.ls_1(block.attn.out_proj(looked))
    behind: torch.Tensor = between + block.ls_2(block.mlp(block.ln_2(between)))
    return behind


def run_block(checkpointed: bool, function: Callable[..., torch.Tensor], *arguments: object) -> torch.Tensor:
    """Call a function, and forget its activations until the backward pass where asked."""
    return checkpoint(function, *arguments, use_reentrant=False) if checkpointed else function(*arguments)
