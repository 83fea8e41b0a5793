"""CLIP's text transformer for packed prompts, without padding and with a single copy of the common prefix."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from open_clip import CLIP
from open_clip.transformer import ResidualAttentionBlock, TextTransformer
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


@dataclass(frozen=True)
class PackedPrompts:
    """Token ids of C prompts, concatenated without padding to R rows, one row for each token.

    The first P rows are the prefix that all prompts share. They are followed by the rest of each prompt, its suffix.
    Attention needs a rectangular tensor: `row_of_slot` pads each suffix to S slots, and `slot_of_row` maps the result
    back to rows.

    Attributes:
        ids: Token ids, [R].
        positions: The position of each row in its prompt, [R].
        prefix_length: P, the number of rows of the common prefix; 0 if nothing is shared.
        row_of_slot: The row in each slot of a suffix, [C, S]. Slots after a suffix's end repeat its last row.
        slot_of_row: The inverse map: for each suffix row, its index among the C · S slots of all suffixes, [R − P].
        end_slots: The slot of each prompt's end token within the prompt's suffix, [C].
    """

    ids: torch.Tensor
    positions: torch.Tensor
    prefix_length: int
    row_of_slot: torch.Tensor
    slot_of_row: torch.Tensor
    end_slots: torch.Tensor

    @property
    def end_rows(self) -> torch.Tensor:
        """The row of each prompt's end token, [C]."""
        return self.row_of_slot.gather(1, self.end_slots[:, None]).flatten()

    def causal_mask(self) -> torch.Tensor:
        """Return a mask of the keys (P prefix rows, S suffix slots) that each suffix slot may attend to, [S, P + S]."""
        slots, prefix = self.row_of_slot.shape[1], self.prefix_length
        return torch.ones(slots, prefix + slots, dtype=torch.bool, device=self.ids.device).tril(prefix)

    def end_mask(self) -> torch.Tensor:
        """Return a mask of the keys that each prompt's end token may attend to, [C, 1, 1, P + S]."""
        keys = torch.arange(self.prefix_length + self.row_of_slot.shape[1], device=self.ids.device)
        return (keys <= self.prefix_length + self.end_slots[:, None])[:, None, None]


def pack_prompts(tokens: torch.Tensor, end_positions: torch.Tensor, *, cut: bool, pack: bool) -> PackedPrompts:
    """Pack prompts for a causal text tower that pools at the end token.

    Args:
        tokens: Token ids, [C, L].
        end_positions: The position of each prompt's end token, [C].
        cut: Whether to drop the positions after the end of the longest prompt.
        pack: Whether to store the common prefix only once, and to drop the positions after the end of each prompt.

    Returns:
        The packed prompts.
    """
    longest = int(end_positions.max()) + 1 if cut else tokens.shape[1]
    lengths = end_positions + 1 if pack else torch.full_like(end_positions, longest)
    prefix_length = 0
    if pack:
        common = (tokens == tokens[0]).all(dim=0).int().cumprod(dim=0).sum()
        prefix_length = min(int(common), int(end_positions.min()))  # every suffix has at least one row
    slots = torch.arange(int(lengths.max()) - prefix_length, device=tokens.device)
    suffix_lengths = lengths[:, None] - prefix_length
    is_used = slots < suffix_lengths  # [C, S]
    first_rows = prefix_length + torch.cat([suffix_lengths.new_zeros(1, 1), suffix_lengths.cumsum(dim=0)[:-1]])
    suffix_positions = (prefix_length + slots).expand_as(is_used)[is_used]
    suffix_ids = tokens[:, prefix_length : prefix_length + len(slots)][is_used]
    return PackedPrompts(
        ids=torch.cat([tokens[0, :prefix_length], suffix_ids]),
        positions=torch.cat([torch.arange(prefix_length, device=tokens.device), suffix_positions]),
        prefix_length=prefix_length,
        row_of_slot=first_rows + torch.minimum(slots, suffix_lengths - 1),
        slot_of_row=is_used.flatten().nonzero().flatten(),
        end_slots=end_positions - prefix_length,
    )


@dataclass(frozen=True)
class TextTower:
    """A forward pass of a causal open_clip text transformer that pools at the end token.

    The modules and parameters are those of the model, not copies.

    Attributes:
        token_embedding: The table of token embeddings.
        positional_embedding: The positional embeddings, [L, W].
        blocks: The residual attention blocks.
        ln_final: The norm after the last block.
        projection: The projection from width W to D: a module, a matrix [W, D], or `None` for no projection.
        end_token: The id of the end token; `None` for CLIP's vocabulary, in which the end token has the largest id.
        checkpointed: Whether the blocks use gradient checkpointing.
    """

    token_embedding: nn.Embedding
    positional_embedding: torch.Tensor
    blocks: Sequence[ResidualAttentionBlock]
    ln_final: nn.Module
    projection: nn.Module | torch.Tensor | None
    end_token: int | None
    checkpointed: bool

    @classmethod
    def from_clip(cls, clip: nn.Module, checkpointed: bool = False) -> "TextTower":
        """Build the forward pass from a model's text tower.

        Args:
            clip: open_clip's model.
            checkpointed: Whether the blocks use gradient checkpointing.

        Returns:
            The tower, which shares the model's parameters.

        Raises:
            NotApplicableError: Features depend on tokens after the end token, or the structure is not supported.
        """
        model: Any = clip
        text: Any = getattr(clip, "text", model)  # open_clip's `CLIP` holds the modules of the text tower itself
        if not isinstance(text, CLIP | TextTransformer):
            raise NotApplicableError(f"it is a {type(text).__name__}")
        check_attributes(
            text, "attn_mask", "token_embedding", "positional_embedding", "transformer", "ln_final", "text_projection"
        )
        pooling = getattr(text, "pool_type", None) or getattr(text, "text_pool_type", None)
        mask = text.attn_mask
        is_causal = mask is not None and torch.equal(mask, torch.full_like(mask, -torch.inf).triu(1))
        if not is_causal or getattr(text, "use_pad_mask", False):
            raise NotApplicableError("its attention is not causal")
        if pooling not in ("argmax", "eos") or getattr(text, "cls_emb", None) is not None:
            raise NotApplicableError(f"it does not pool at the end token (pooling: {pooling})")
        return cls(
            text.token_embedding,
            text.positional_embedding,
            extract_blocks(text.transformer),
            text.ln_final,
            text.text_projection,
            getattr(text, "eos_id", getattr(text, "text_eos_id", None)) if pooling == "eos" else None,
            checkpointed,
        )

    def end_positions(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the position at which the tower pools, [C], for token ids [C, L]."""
        return (tokens if self.end_token is None else (tokens == self.end_token).int()).argmax(dim=1)

    def __call__(self, prompts: PackedPrompts, pooled_row: bool = True) -> torch.Tensor:
        """Encode prompts.

        Args:
            prompts: C packed prompts.
            pooled_row: Whether to compute the last block only for the end tokens. The features are the same.

        Returns:
            L2-normalised features, [C, D].
        """
        rows = self.token_embedding(prompts.ids) + self.positional_embedding[prompts.positions]
        for block in self.blocks[:-1]:
            rows = run_block(self.checkpointed, apply_prompt_block, block, rows, prompts)
        rows = run_block(self.checkpointed, apply_prompt_block, self.blocks[-1], rows, prompts, pooled_row)
        pooled = self.ln_final(rows if pooled_row else rows.index_select(0, prompts.end_rows))
        if isinstance(self.projection, nn.Module):
            pooled = self.projection(pooled)
        elif self.projection is not None:
            pooled = pooled @ self.projection
        return F.normalize(pooled, dim=-1)


def apply_prompt_block(
    block: ResidualAttentionBlock, rows: torch.Tensor, prompts: PackedPrompts, pooled_row: bool = False
) -> torch.Tensor:
    """Apply a block to packed prompts.

    Args:
        block: The block.
        rows: Hidden states, [R, W].
        prompts: The packed prompts to which the rows belong.
        pooled_row: Whether to compute only the output of the end tokens.

    Returns:
        The block's output, [R, W], or [C, W] with `pooled_row`.
    """
    attention, normalised, prefix = block.attn, block.ln_1(rows), prompts.prefix_length
    keys, values = (
        torch.cat([part[:prefix].expand(len(prompts.row_of_slot), *part[:prefix].shape), _pad(part, prompts)], dim=1)
        for part in project_qkv(attention, normalised, slice(1, 3))
    )
    if pooled_row:
        end_rows = prompts.end_rows
        [query] = project_qkv(attention, normalised.index_select(0, end_rows), slice(0, 1))
        attended = attend(query[:, None], keys, values, prompts.end_mask())
        return finish_block(block, rows.index_select(0, end_rows), attended[:, 0])
    [query] = project_qkv(attention, normalised, slice(0, 1))
    attended = attend(_pad(query, prompts), keys, values, prompts.causal_mask())
    attended = attended.flatten(0, 1).index_select(0, prompts.slot_of_row)
    if prefix:
        causal = torch.ones(prefix, prefix, dtype=torch.bool, device=rows.device).tril()
        attended_prefix = attend(query[None, :prefix], keys[:1, :prefix], values[:1, :prefix], causal)
        attended = torch.cat([attended_prefix[0], attended])
    return finish_block(block, rows, attended)


def _pad(rows: torch.Tensor, prompts: PackedPrompts) -> torch.Tensor:
    """Select the rows of the suffixes from all rows [R, ...], and arrange them in padded slots [C, S, ...]."""
    padded: torch.Tensor = rows.index_select(0, prompts.row_of_slot.flatten()).unflatten(0, prompts.row_of_slot.shape)
    return padded


class UsedEmbeddings:
    """Replaces a model's token embedding by a small table with the embeddings of the tokens that occur in the prompts.

    All other embeddings have no gradient. Leaving them out saves the memory and time of their optimizer states.

    Attributes:
        full_weight: The original table, [vocabulary, W].
        token_ids: The sorted ids of the U tokens that occur in the prompts, [U]. Row i of the small table is the
            embedding of the token `token_ids[i]`.
    """

    def __init__(self, clip: nn.Module, tokens: torch.Tensor) -> None:
        """Replace the token embedding of a model by the small table.

        Args:
            clip: open_clip's model, changed in place.
            tokens: The token ids of all prompts, [C, L].
        """
        embedding = TextTower.from_clip(clip).token_embedding
        self.full_weight, self.token_ids = embedding.weight, tokens.unique()
        embedding.weight = nn.Parameter(self.full_weight.detach()[self.token_ids])

    def remap(self, prompts: PackedPrompts) -> PackedPrompts:
        """Return the prompts with ids that index the small table."""
        return replace(prompts, ids=torch.searchsorted(self.token_ids, prompts.ids))

    @torch.no_grad()
    def restore(self, clip: nn.Module) -> None:
        """Replace the small table by the full table, updated with the trained embeddings.

        Args:
            clip: The model in training or a copy of it, changed in place.
        """
        embedding = TextTower.from_clip(clip).token_embedding
        embedding.weight = nn.Parameter(self.full_table(embedding.weight))

    @torch.no_grad()
    def full_table(self, rows: torch.Tensor) -> torch.Tensor:
        """Return a copy of the full table, [vocabulary, W], in which `rows` [U, W] replace the rows `token_ids`."""
        table = self.full_weight.detach().clone()
        table[self.token_ids] = rows
        return table
