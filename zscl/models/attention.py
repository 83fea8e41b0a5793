"""Parts of open_clip's transformer blocks (projections, attention, MLP), for towers that skip unused rows."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock
from torch import nn
from torch.utils.checkpoint import checkpoint


class NotApplicableError(Exception):
    """An optimisation of `compute.savings` cannot be used with a model's tower; the message gives the reason."""


def check_attributes(tower: object, *names: str) -> None:
    """Check that a tower has certain attributes, which other versions of open_clip may lack.

    Args:
        tower: open_clip's module for images or texts.
        *names: The names of the attributes.

    Raises:
        NotApplicableError: An attribute is missing.
    """
    if missing := [name for name in names if not hasattr(tower, name)]:
        raise NotApplicableError(f"this version of open_clip has no {', '.join(missing)} in its {type(tower).__name__}")


# The parts of a block that the functions below compute. They would ignore any other part (a norm of the queries, a
# scale of the heads, a norm of the context).
BLOCK_PARTS = {"ln_1", "attn", "ls_1", "ln_2", "mlp", "ls_2"}
ATTENTION_PARAMETERS = {"in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"}


def extract_blocks(transformer: object) -> Sequence[ResidualAttentionBlock]:
    """Return a transformer's residual attention blocks after checking their structure.

    The check reads only the blocks, because the attributes of the transformer differ between versions of open_clip:
    version 3 uses `nn.MultiheadAttention`, which has `batch_first`; version 4 has its own attention class, which is
    always batch-first. The parameters have the same names in both.

    Args:
        transformer: open_clip's module with `resblocks`.

    Returns:
        The blocks in order.

    Raises:
        NotApplicableError: There are no blocks, or one of them has parts that this module does not compute.
    """
    blocks = list(getattr(transformer, "resblocks", []))
    if not blocks:
        raise NotApplicableError("its transformer is not a class of open_clip")
    for block in blocks:
        if type(block) is not ResidualAttentionBlock:
            raise NotApplicableError(f"it has blocks of the unsupported class ({type(block).__name__})")
        if differing := _differing_parts(block):
            raise NotApplicableError(f"its blocks have a different structure ({', '.join(sorted(differing))})")
    return blocks


def _differing_parts(block: ResidualAttentionBlock) -> set[str]:
    """Return the names of parts that distinguish a block from one with `BLOCK_PARTS` and `ATTENTION_PARAMETERS`."""
    differing = BLOCK_PARTS ^ {name for name, _ in block.named_children()}
    if "attn" in differing:
        return differing
    attention = block.attn
    differing |= {f"attn.{name}" for name in ATTENTION_PARAMETERS ^ {name for name, _ in attention.named_parameters()}}
    if not getattr(attention, "batch_first", True):  # open_clip 4 has no such attribute and is batch-first
        differing.add("attn.batch_first")
    dropouts = [module.p for module in attention.modules() if isinstance(module, nn.Dropout)]
    if any([getattr(attention, "dropout", 0.0), *dropouts]):
        differing.add("attn.dropout")
    if getattr(attention, "add_zero_attn", False):
        differing.add("attn.add_zero_attn")
    return differing


def project_qkv(attention: nn.MultiheadAttention, rows: torch.Tensor, parts: slice) -> list[torch.Tensor]:
    """Project hidden states to queries, keys and values.

    The bias of the keys is left out. It would shift all scores of a query equally, and the softmax ignores such a
    shift. If the bias is left out, its gradient is exactly 0. Otherwise, its gradient would be a rounding error, which
    Adam would scale up to full steps.

    Args:
        attention: The block's attention module.
        rows: Normalised hidden states, [..., W].
        parts: The range of projections to compute: 0 is the queries, 1 the keys and 2 the values.

    Returns:
        One tensor [..., heads, W / heads] for each projection.
    """
    width = rows.shape[-1]
    selected = slice(parts.start * width, parts.stop * width)
    bias = attention.in_proj_bias
    bias_without_keys = torch.cat([bias[:width], bias.new_zeros(width), bias[2 * width :]])
    projected = F.linear(rows, attention.in_proj_weight[selected], bias_without_keys[selected])
    return [part.unflatten(-1, (attention.num_heads, -1)) for part in projected.split(width, dim=-1)]


def attend(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute multi-head scaled dot-product attention.

    Args:
        queries: The q queries of each of n sequences, [n, q, heads, W / heads].
        keys: The k keys of each sequence, [n, k, heads, W / heads].
        values: The value of each key, [n, k, heads, W / heads].
        mask: `True` where a query may attend to a key, broadcastable to [n, heads, q, k].

    Returns:
        The attended values with their heads concatenated, [n, q, W].
    """
    q, k, v = (part.transpose(1, 2) for part in (queries, keys, values))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def finish_block(block: ResidualAttentionBlock, rows: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
    """Apply the part of a block that follows attention: output projection, residual sums and MLP.

    Args:
        block: The block.
        rows: The hidden states at the block's input, [..., W].
        attended: The output of `attend` for these hidden states, [..., W].

    Returns:
        The block's output, [..., W].
    """
    hidden = rows + block.ls_1(block.attn.out_proj(attended))
    output: torch.Tensor = hidden + block.ls_2(block.mlp(block.ln_2(hidden)))
    return output


def run_block(checkpointed: bool, function: Callable[..., torch.Tensor], *arguments: object) -> torch.Tensor:
    """Call a function, with gradient checkpointing if `checkpointed`."""
    return checkpoint(function, *arguments, use_reentrant=False) if checkpointed else function(*arguments)
