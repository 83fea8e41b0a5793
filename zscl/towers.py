"""The student's forward pass without the work that no loss depends on: the same features, for less.

Four savings depend on how the model is built. Each is used where the structure allows it and its outputs have been
seen to agree with open_clip's own; elsewhere the model runs as it is:

- context cut: a causal text tower that pools at the end token never looks behind it, so the prompts end there;
- packed prompts: under a causal mask, the words that all prompts begin with have the same states in each of them, so
  they are computed once, and what follows is laid out without padding;
- pooled row: of the last block's output only the pooled token is read, so that block computes its queries, output
  projection and MLP for one token an image or prompt;
- used embeddings: token embeddings that no prompt uses have no gradient in the whole stage, so a stage trains a small
  table of the others and leaves the rest alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from open_clip import CLIP
from open_clip.transformer import ResidualAttentionBlock, TextTransformer, VisionTransformer
from torch import nn
from torch.utils.checkpoint import checkpoint

from schemas.base import InputError
from schemas.compute import Compute, Savings
from zscl.distributed import sum_over_workers, world_size
from zscl.model import at_least_float32, image_size

TOLERANCE = 1e-5  # largest difference between normalised features that round-off explains


IMAGE_SAVINGS = ("pooled_row",)
TEXT_SAVINGS = ("context_cut", "packed_prompts", "pooled_row", "used_embeddings")


class NotApplicableError(Exception):
    """A tower is built differently from what a saving needs; says how."""


class OutputsDifferError(NotApplicableError):
    """A tower's structure gives no reason, but its features do."""


# --------------------------------------------------------------------------------------------- prompts, packed


@dataclass(frozen=True)
class Prompts:
    """Token ids of C prompts as R rows: first those that all prompts share, then what follows in each of them.

    ids and positions [R]; padded [C, S]: the row in each place of a prompt's own part, where places behind its end
    repeat its last row; places [R − shared]: the same map backwards, into C · S; ends [C]: each prompt's end token
    within its own part.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    shared: int
    padded: torch.Tensor
    places: torch.Tensor
    ends: torch.Tensor

    @property
    def end_rows(self) -> torch.Tensor:
        """The end tokens' rows. [C]"""
        return self.padded.gather(1, self.ends[:, None]).flatten()

    def mask(self) -> torch.Tensor:
        """What each place of a prompt's own part may look at. [S, shared + S]"""
        size = self.padded.shape[1]
        return torch.ones(size, self.shared + size, dtype=torch.bool, device=self.ids.device).tril(self.shared)

    def end_mask(self) -> torch.Tensor:
        """What each prompt's end token may look at. [C, 1, 1, shared + S]"""
        looked_at = torch.arange(self.shared + self.padded.shape[1], device=self.ids.device)
        return (looked_at <= self.shared + self.ends[:, None])[:, None, None]


def lay_out(tokens: torch.Tensor, ends: torch.Tensor, *, cut: bool, pack: bool) -> Prompts:
    """Lay prompts out for a causal tower.

    Args:
        tokens: [C, L].
        ends: [C], where each prompt's end token is.
        cut: leave out what lies behind the longest prompt's end.
        pack: share the common beginning, and leave out what lies behind each prompt's own end.
    """
    lengths = ends + 1 if pack else torch.full_like(ends, int(ends.max()) + 1 if cut else tokens.shape[1])
    shared = 0
    if pack:
        common = (tokens == tokens[0]).all(dim=0).int().cumprod(dim=0).sum()
        shared = min(int(common), int(ends.min()))  # every prompt keeps a row of its own
    place = torch.arange(int(lengths.max()) - shared, device=tokens.device)
    own = lengths[:, None] - shared
    kept = place < own  # [C, S]
    first = shared + torch.cat([own.new_zeros(1, 1), own.cumsum(dim=0)[:-1]])
    positions = (shared + place).expand_as(kept)[kept]
    return Prompts(
        ids=torch.cat([tokens[0, :shared], tokens[:, shared : shared + len(place)][kept]]),
        positions=torch.cat([torch.arange(shared, device=tokens.device), positions]),
        shared=shared,
        padded=first + torch.minimum(place, own - 1),
        places=kept.flatten().nonzero().flatten(),
        ends=ends - shared,
    )


# ---------------------------------------------------------------------------------------------- blocks by rows


def _project(attention: nn.MultiheadAttention, rows: torch.Tensor, parts: slice) -> list[torch.Tensor]:
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


def _look(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention over [n, rows, heads, width]; rows come back with their heads joined."""
    q, k, v = (part.transpose(1, 2) for part in (queries, keys, values))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def _behind_attention(block: ResidualAttentionBlock, rows: torch.Tensor, looked: torch.Tensor) -> torch.Tensor:
    between = rows + block.ls_1(block.attn.out_proj(looked))
    behind: torch.Tensor = between + block.ls_2(block.mlp(block.ln_2(between)))
    return behind


def image_block(block: ResidualAttentionBlock, rows: torch.Tensor, pooled_row: bool = False) -> torch.Tensor:
    """A block over an image's tokens. [n, tokens, W] → the same, or [n, 1, W] for the first token alone."""
    normalised = block.ln_1(rows)
    if not pooled_row:
        return _behind_attention(block, rows, _look(*_project(block.attn, normalised, slice(0, 3))))
    [query] = _project(block.attn, normalised[:, :1], slice(0, 1))
    return _behind_attention(block, rows[:, :1], _look(query, *_project(block.attn, normalised, slice(1, 3))))


def prompt_block(
    block: ResidualAttentionBlock, rows: torch.Tensor, prompts: Prompts, pooled_row: bool = False
) -> torch.Tensor:
    """A block over packed prompts. [R, W] → the same, or [C, W] for the end tokens alone."""
    attention, normalised, shared = block.attn, block.ln_1(rows), prompts.shared
    keys, values = (
        torch.cat([part[:shared].expand(len(prompts.padded), *part[:shared].shape), _padded(part, prompts)], dim=1)
        for part in _project(attention, normalised, slice(1, 3))
    )
    if pooled_row:
        ends = prompts.end_rows
        [query] = _project(attention, normalised.index_select(0, ends), slice(0, 1))
        looked = _look(query[:, None], keys, values, prompts.end_mask())
        return _behind_attention(block, rows.index_select(0, ends), looked[:, 0])
    [query] = _project(attention, normalised, slice(0, 1))
    looked = _look(_padded(query, prompts), keys, values, prompts.mask())
    looked = looked.flatten(0, 1).index_select(0, prompts.places)
    if shared:
        causal = torch.ones(shared, shared, dtype=torch.bool, device=rows.device).tril()
        beginning = _look(query[None, :shared], keys[:1, :shared], values[:1, :shared], causal)
        looked = torch.cat([beginning[0], looked])
    return _behind_attention(block, rows, looked)


def _padded(rows: torch.Tensor, prompts: Prompts) -> torch.Tensor:
    """Rows in each prompt's places. [R, ...] → [C, S, ...]"""
    padded: torch.Tensor = rows.index_select(0, prompts.padded.flatten()).unflatten(0, prompts.padded.shape)
    return padded


# ------------------------------------------------------------------------------------- open_clip's two towers


def _plain_blocks(transformer: object) -> Sequence[ResidualAttentionBlock]:
    blocks = list(getattr(transformer, "resblocks", []))
    if not blocks or not getattr(transformer, "batch_first", False):
        raise NotApplicableError("its transformer is not open_clip's own")
    for block in blocks:
        if type(block) is not ResidualAttentionBlock or block.attn.in_proj_bias is None:
            raise NotApplicableError(f"it has blocks of another kind ({type(block).__name__})")
    return blocks


@dataclass(frozen=True)
class ImageTower:
    """An open_clip vision transformer that pools the class token."""

    visual: VisionTransformer
    blocks: Sequence[ResidualAttentionBlock]
    checkpointed: bool

    @classmethod
    def of(cls, clip: nn.Module, checkpointed: bool = False) -> "ImageTower":
        """Take the model's image tower apart.

        Raises:
            NotApplicableError: the last block's other tokens are read, too, or the tower is built differently.
        """
        visual = clip.visual
        if not isinstance(visual, VisionTransformer):
            raise NotApplicableError(f"it is a {type(visual).__name__}")
        if visual.attn_pool is not None or visual.output_tokens or visual.pool_type != "tok":
            raise NotApplicableError(f"it does not pool the class token (pooling: {visual.pool_type})")
        return cls(visual, _plain_blocks(visual.transformer), checkpointed)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Encode images, with the last block for the class token alone. [b, 3, H, W] → [b, D], normalised"""
        rows = self.visual._embeds(images)
        for block in self.blocks[:-1]:
            rows = _run(self.checkpointed, image_block, block, rows)
        rows = _run(self.checkpointed, image_block, self.blocks[-1], rows, True)
        pooled = self.visual.ln_post(rows[:, 0])
        return F.normalize(pooled if self.visual.proj is None else pooled @ self.visual.proj, dim=-1)


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
    def of(cls, clip: nn.Module, checkpointed: bool = False) -> "TextTower":
        """Take the model's text tower apart.

        Raises:
            NotApplicableError: what lies behind a prompt's end matters to it, or it is built differently.
        """
        whole: Any = clip
        text: Any = getattr(clip, "text", whole)  # open_clip's CLIP has the tower's modules as its own
        if not isinstance(text, CLIP | TextTransformer):
            raise NotApplicableError(f"it is a {type(text).__name__}")
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
            _plain_blocks(text.transformer),
            text.ln_final,
            text.text_projection,
            getattr(text, "eos_id", getattr(text, "text_eos_id", None)) if pooling == "eos" else None,
            checkpointed,
        )

    def ends(self, tokens: torch.Tensor) -> torch.Tensor:
        """Where the tower pools: CLIP's end token is the largest id. [C, L] → [C]"""
        return (tokens if self.end_token is None else (tokens == self.end_token).int()).argmax(dim=1)

    def __call__(self, prompts: Prompts, pooled_row: bool = True) -> torch.Tensor:
        """Encode prompts. Returns [C, D], normalised."""
        rows = self.token_embedding(prompts.ids) + self.positional_embedding[prompts.positions]
        for block in self.blocks[:-1]:
            rows = _run(self.checkpointed, prompt_block, block, rows, prompts)
        rows = _run(self.checkpointed, prompt_block, self.blocks[-1], rows, prompts, pooled_row)
        pooled = self.ln_final(rows if pooled_row else rows.index_select(0, prompts.end_rows))
        if isinstance(self.projection, nn.Module):
            pooled = self.projection(pooled)
        elif self.projection is not None:
            pooled = pooled @ self.projection
        return F.normalize(pooled, dim=-1)


def _run(checkpointed: bool, function: Callable[..., torch.Tensor], *arguments: object) -> torch.Tensor:
    """Call a function, and forget its activations until the backward pass where asked."""
    return checkpoint(function, *arguments, use_reentrant=False) if checkpointed else function(*arguments)


# --------------------------------------------------------------------------------------------- used embeddings


class UsedEmbeddings:
    """Trains only the rows of a token embedding that the given tokens use; `restore` puts the whole table back."""

    def __init__(self, clip: nn.Module, tokens: torch.Tensor) -> None:
        embedding = TextTower.of(clip).token_embedding
        self.whole, self.rows = embedding.weight, tokens.unique()
        embedding.weight = nn.Parameter(self.whole.detach()[self.rows])

    def renumber(self, prompts: Prompts) -> Prompts:
        """The prompts with their ids counted in the small table."""
        return replace(prompts, ids=torch.searchsorted(self.rows, prompts.ids))

    @torch.no_grad()
    def restore(self, clip: nn.Module) -> None:
        """Put the whole table, with the trained rows in it, into this model or a copy of it."""
        embedding = TextTower.of(clip).token_embedding
        embedding.weight = nn.Parameter(self.table(embedding.weight))

    @torch.no_grad()
    def table(self, rows: torch.Tensor) -> torch.Tensor:
        """The whole table, with the trained rows in it."""
        whole = self.whole.detach().clone()
        whole[self.rows] = rows
        return whole


# ------------------------------------------------------------------------------------------------- the student


class Towers(nn.Module):
    """Both towers in one forward pass, which is what DistributedDataParallel can follow.

    Args:
        clip: the open_clip model in training; used embeddings change its token embedding until `restore`.
        tokens: the class prompts' token ids, [C, L].
        own: this worker's part of the prompts.
        compute: which savings to use, and how memory is traded for work.
        unused_embeddings_stay: whether token embeddings without a gradient stay as they are (no weight decay).

    Raises:
        InputError: a saving is asked for that the model does not allow.
    """

    def __init__(
        self, clip: nn.Module, tokens: torch.Tensor, own: range, compute: Compute, unused_embeddings_stay: bool
    ) -> None:
        super().__init__()
        self.clip, self.one_pass, self.images_at_once = clip, compute.savings.one_pass, compute.images_at_once
        self._tokens = tokens[own.start : own.stop]
        self._used: UsedEmbeddings | None = None
        self._prompts: Prompts | None = None
        savings, checkpointed = compute.savings, compute.gradient_checkpointing
        if checkpointed:  # some of open_clip's towers take any answer for yes
            clip.set_grad_checkpointing(True)  # type: ignore[operator]
        self.notes: list[str] = []
        self._image_tower = _image_tower(clip, savings, checkpointed, self.notes)
        self._text_tower = _text_tower(clip, tokens, savings, checkpointed, self.notes)
        self._pooled_row = savings.pooled_row != "never"
        if self._text_tower is not None:
            self._prompts = _lay_out(self._text_tower, self._tokens, savings)
            if (
                savings.used_embeddings != "never"
                and unused_embeddings_stay
                and self._text_tower.token_embedding.weight.requires_grad
            ):
                self._used = UsedEmbeddings(clip, tokens)
                self._prompts = self._used.renumber(self._prompts)
        if compute.compile:
            self._encode_images = torch.compile(self._encode_images)  # type: ignore[method-assign]

    def forward(
        self, images: torch.Tensor, references: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Encode task images [b, 3, H, W], distilled images [b', 3, H, W] if any, and this worker's prompts.

        Returns normalised features [b, D], [b', D] or `None`, and [c, D].
        """
        prompts = self._encode_prompts()
        if references is None:
            return self._images(images), None, prompts
        if not self.one_pass:
            return self._images(images), self._images(references), prompts
        encoded = self._images(torch.cat([images, references]))
        return encoded[: len(images)], encoded[len(images) :], prompts

    def restore(self, clip: nn.Module) -> None:
        """Give the model, or a copy of it made since, its whole token embedding back."""
        if self._used is not None:
            self._used.restore(clip)

    def trained(self) -> dict[str, torch.Tensor]:
        """The trained parameters by name, the token embedding whole."""
        found = {name: each.detach() for name, each in self.clip.named_parameters() if each.requires_grad}
        if self._used is not None:
            used = TextTower.of(self.clip).token_embedding.weight
            [name] = [name for name, each in self.clip.named_parameters() if each is used]
            found[name] = self._used.table(used)
        return found

    def _images(self, images: torch.Tensor) -> torch.Tensor:
        if self.images_at_once is None or len(images) <= self.images_at_once:
            return self._encode_images(images)
        # Each part's activations are computed again in the backward pass: less memory, the same features and losses.
        parts = images.split(self.images_at_once)
        return torch.cat([checkpoint(self._encode_images, part, use_reentrant=False) for part in parts])

    def _encode_images(self, images: torch.Tensor) -> torch.Tensor:
        if self._image_tower is None:
            return at_least_float32(self.clip.encode_image(images, normalize=True))  # type: ignore[operator]
        return at_least_float32(self._image_tower(images))

    def _encode_prompts(self) -> torch.Tensor:
        if self._text_tower is None or self._prompts is None:
            return at_least_float32(self.clip.encode_text(self._tokens, normalize=True))  # type: ignore[operator]
        return at_least_float32(self._text_tower(self._prompts, self._pooled_row))


def _lay_out(tower: TextTower, tokens: torch.Tensor, savings: Savings) -> Prompts:
    cut = savings.context_cut != "never"
    return lay_out(tokens, tower.ends(tokens), cut=cut, pack=cut and savings.packed_prompts != "never")


def _image_tower(clip: nn.Module, savings: Savings, checkpointed: bool, notes: list[str]) -> ImageTower | None:
    """The image tower by rows, where it may be used and gives the model's own features."""
    if savings.pooled_row == "never":
        return None
    try:
        tower = ImageTower.of(clip, checkpointed)
        height, width = image_size(clip)
        images = torch.linspace(-1, 1, 2 * 3 * height * width).reshape(2, 3, height, width)
        images = images.to(tower.visual.conv1.weight)
        _check(clip, tower, clip.encode_image, images, images)  # type: ignore[arg-type]
    except NotApplicableError as reason:
        _do_without(IMAGE_SAVINGS, savings, "image", reason, notes)
        return None
    return tower


def _text_tower(
    clip: nn.Module, tokens: torch.Tensor, savings: Savings, checkpointed: bool, notes: list[str]
) -> TextTower | None:
    """The text tower by rows, where it may be used and gives the model's own features."""
    if all(getattr(savings, name) == "never" for name in TEXT_SAVINGS):
        return None
    try:
        tower = TextTower.of(clip, checkpointed)
        few = tokens[:3]  # the same on every worker
        _check(clip, tower, clip.encode_text, _lay_out(tower, few, savings), few)  # type: ignore[arg-type]
    except NotApplicableError as reason:
        _do_without(TEXT_SAVINGS, savings, "text", reason, notes)
        return None
    return tower


def _do_without(
    names: Sequence[str], savings: Savings, tower: str, reason: NotApplicableError, notes: list[str]
) -> None:
    """Refuse where a saving was asked for; note where only the outputs told that it cannot be used."""
    for name in names:
        if getattr(savings, name) == "always":
            raise InputError(
                f"compute.savings.{name}: found always, but the model's {tower} tower does not allow it ({reason}), "
                "expected auto or never"
            ) from reason
    if isinstance(reason, OutputsDifferError):
        notes.append(f"the {tower} tower is computed in full: {reason}")


@torch.no_grad()
def _check(
    clip: nn.Module, ours: Callable[..., torch.Tensor], plain: Callable[..., torch.Tensor], own: object, whole: object
) -> None:
    """See that a tower by rows gives what open_clip gives, on every worker.

    Raises:
        OutputsDifferError: on one of them, it does not.
    """
    was_training = clip.training
    clip.eval()
    difference = float((ours(own) - plain(whole, normalize=True)).abs().max())
    clip.train(was_training)
    [agreeing] = sum_over_workers(difference <= TOLERANCE)
    if agreeing < world_size():
        raise OutputsDifferError(f"its features would differ by {difference:.1g}")


def left_in_full(clip: nn.Module, savings: Savings) -> list[str]:
    """Which towers a model's structure leaves to be computed in full, and why; a sentence each.

    Raises:
        InputError: a saving is asked for that the structure does not allow.
    """
    found = []
    for name, tower, wanted in (("image", ImageTower, IMAGE_SAVINGS), ("text", TextTower, TEXT_SAVINGS)):
        try:
            tower.of(clip)
        except NotApplicableError as reason:
            _do_without(wanted, savings, name, reason, notes=[])
            found.append(f"the {name} tower is computed in full: {reason}")
    return found
