"""The text tower over packed prompts: their common beginning once, nothing behind an end, only embeddings in use."""

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
    finish_block,
    extract_blocks,
    project_qkv,
    check_attributes,
    run_block,
)


@dataclass(frozen=True)
class PackedPrompts:
    """Token ids of C prompts as R rows: first those that all prompts share, then what follows in each of them.

    ids and positions [R]; padded [C, S]: the row in each place of a prompt's own part, where places behind its end
    repeat its last row; places [R − shared]: the same map backwards, into C · S; ends [C]: each prompt's end token
    within its own part.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    prefix_length: int
    row_of_slot: torch.Tensor
    slot_of_row: torch.Tensor
    end_slots: torch.Tensor

    @property
    def end_rows(self) -> torch.Tensor:
        """The end tokens' rows. [C]"""
        return self.row_of_slot.gather(1, self.end_slots[:, None]).flatten()

    def causal_mask(self) -> torch.Tensor:
        """What each place of a prompt's own part may look at. [S, shared + S]"""
        size = self.row_of_slot.shape[1]
        return torch.ones(size, self.prefix_length + size, dtype=torch.bool, device=self.ids.device).tril(self.prefix_length)

    def end_mask(self) -> torch.Tensor:
        """What each prompt's end token may look at. [C, 1, 1, shared + S]"""
        looked_at = torch.arange(self.prefix_length + self.row_of_slot.shape[1], device=self.ids.device)
        return (looked_at <= self.prefix_length + self.end_slots[:, None])[:, None, None]


def pack_prompts(tokens: torch.Tensor, end_positions: torch.Tensor, *, cut: bool, pack: bool) -> PackedPrompts:
    """Lay prompts out for a causal tower.

    Args:
        tokens: [C, L].
        ends: [C], where each prompt's end token is.
        cut: leave out what lies behind the longest prompt's end.
        pack: share the common beginning, and leave out what lies behind each prompt's own end.
    """
    lengths = end_positions + 1 if pack else torch.full_like(end_positions, int(end_positions.max()) + 1 if cut else tokens.shape[1])
    shared = 0
    if pack:
        common = (tokens == tokens[0]).all(dim=0).int().cumprod(dim=0).sum()
        shared = min(int(common), int(end_positions.min()))  # every prompt keeps a row of its own
    place = torch.arange(int(lengths.max()) - shared, device=tokens.device)
    own = lengths[:, None] - shared
    kept = place < own  # [C, S]
    first = shared + torch.cat([own.new_zeros(1, 1), own.cumsum(dim=0)[:-1]])
    positions = (shared + place).expand_as(kept)[kept]
    return PackedPrompts(
        ids=torch.cat([tokens[0, :shared], tokens[:, shared : shared + len(place)][kept]]),
        positions=torch.cat([torch.arange(shared, device=tokens.device), positions]),
        prefix_length=shared,
        row_of_slot=first + torch.minimum(place, own - 1),
        slot_of_row=kept.flatten().nonzero().flatten(),
        end_slots=end_positions - shared,
    )


@dataclass(frozen=True)
class TextTower:
    """An open_clip text transformer, causal, that pools at the end token."""

    token_embedding: nn.Embedding
    positional_embedding: torch.Tensor
    blocks: Sequence[ResidualAttentionBlock]
    ln_final: nn.Module
    projection: nn.Module | torch.Tensor | None
    end_token: int | None
    checkpointed: bool

    @classmethod
    def from_clip(cls, clip: nn.Module, checkpointed: bool = False) -> "TextTower":
        """Take the model's text tower apart.

        Raises:
            NotApplicableError: what lies behind a prompt's end matters to it, or it is built differently.
        """
        whole: Any = clip
        text: Any = getattr(clip, "text", whole)  # open_clip's CLIP has the tower's modules as its own
        if not isinstance(text, CLIP | TextTransformer):
            raise NotApplicableError(f"it is a {type(text).__name__}")
        check_attributes(
            text, "attn_mask", "token_embedding", "positional_embedding", "transformer", "ln_final", "text_projection"
        )
        pooling = getattr(text, "pool_type", None) or getattr(text, "text_pool_type", None)
        mask = text.attn_mask
        causal = mask is not None and torch.equal(mask, torch.full_like(mask, -torch.inf).triu(1))
        if not causal or getattr(text, "use_pad_mask", False):
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
        """Where the tower pools: CLIP's end token is the largest id. [C, L] → [C]"""
        return (tokens if self.end_token is None else (tokens == self.end_token).int()).argmax(dim=1)

    def __call__(self, prompts: PackedPrompts, pooled_row: bool = True) -> torch.Tensor:
        """Encode prompts. Returns [C, D], normalised."""
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
    """A block over packed prompts. [R, W] → the same, or [C, W] for the end tokens alone."""
    attention, normalised, shared = block.attn, block.ln_1(rows), prompts.prefix_length
    keys, values = (
        torch.cat([part[:shared].expand(len(prompts.row_of_slot), *part[:shared].shape), _padded(part, prompts)], dim=1)
        for part in project_qkv(attention, normalised, slice(1, 3))
    )
    if pooled_row:
        ends = prompts.end_rows
        [query] = project_qkv(attention, normalised.index_select(0, ends), slice(0, 1))
        looked = attend(query[:, None], keys, values, prompts.end_mask())
        return finish_block(block, rows.index_select(0, ends), looked[:, 0])
    [query] = project_qkv(attention, normalised, slice(0, 1))
    looked = attend(_padded(query, prompts), keys, values, prompts.causal_mask())
    looked = looked.flatten(0, 1).index_select(0, prompts.slot_of_row)
    if shared:
        causal = torch.ones(shared, shared, dtype=torch.bool, device=rows.device).tril()
        beginning = attend(query[None, :shared], keys[:1, :shared], values[:1, :shared], causal)
        looked = torch.cat([beginning[0], looked])
    return finish_block(block, rows, looked)


def _padded(rows: torch.Tensor, prompts: PackedPrompts) -> torch.Tensor:
    """Rows in each prompt's places. [R, ...] → [C, S, ...]"""
    padded: torch.Tensor = rows.index_select(0, prompts.row_of_slot.flatten()).unflatten(0, prompts.row_of_slot.shape)
    return padded


class UsedEmbeddings:
    """Trains only the rows of a token embedding that the given tokens use; `restore` puts the whole table back."""

    def __init__(self, clip: nn.Module, tokens: torch.Tensor) -> None:
        embedding = TextTower.from_clip(clip).token_embedding
        self.full_weight, self.token_ids = embedding.weight, tokens.unique()
        embedding.weight = nn.Parameter(self.full_weight.detach()[self.token_ids])

    def remap(self, prompts: PackedPrompts) -> PackedPrompts:
        """The prompts with their ids counted in the small table."""
        return replace(prompts, ids=torch.searchsorted(self.token_ids, prompts.ids))

    @torch.no_grad()
    def restore(self, clip: nn.Module) -> None:
        """Put the whole table, with the trained rows in it, into this model or a copy of it."""
        embedding = TextTower.from_clip(clip).token_embedding
        embedding.weight = nn.Parameter(self.full_table(embedding.weight))

    @torch.no_grad()
    def full_table(self, rows: torch.Tensor) -> torch.Tensor:
        """The whole table, with the trained rows in it."""
        whole = self.full_weight.detach().clone()
        whole[self.token_ids] = rows
        return whole
