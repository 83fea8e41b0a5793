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

`image_tower` and `text_tower` know how; here they are looked at, put together, and done without where they do not fit.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from schemas.compute import Compute, Savings
from schemas.errors import InputError
from zscl.models.attention import NotApplicableError
from zscl.models.clip import at_least_float32, image_size
from zscl.models.text_tower import PackedPrompts, TextTower, UsedEmbeddings, pack_prompts
from zscl.models.vision_tower import ImageTower
from zscl.runtime.distributed import all_reduce_ints, world_size

TOLERANCE = 1e-5  # largest difference between normalised features that round-off explains
IMAGE_SAVINGS = ("pooled_row",)
TEXT_SAVINGS = ("context_cut", "packed_prompts", "pooled_row", "used_embeddings")


class OutputsDifferError(NotApplicableError):
    """A tower's structure gives no reason, but its features do."""


class PrunedForward(nn.Module):
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
        self, clip: nn.Module, tokens: torch.Tensor, rank_prompts: range, compute: Compute, unused_embeddings_constant: bool
    ) -> None:
        super().__init__()
        self.clip, self.one_pass, self.images_at_once = clip, compute.savings.one_pass, compute.images_at_once
        self._tokens = tokens[rank_prompts.start : rank_prompts.stop]
        self._used: UsedEmbeddings | None = None
        self._prompts: PackedPrompts | None = None
        savings, checkpointed = compute.savings, compute.gradient_checkpointing
        self.notes: list[str] = []
        self._image_tower = _image_tower(clip, savings, checkpointed, self.notes)
        self._text_tower = _text_tower(clip, tokens, savings, checkpointed, self.notes)
        if checkpointed:
            _enable_gradient_checkpointing(clip, tokens[:1], self._image_tower is None, self._text_tower is None)
        self._pooled_row = savings.pooled_row != "never"
        if self._text_tower is not None:
            self._prompts = _lay_out(self._text_tower, self._tokens, savings)
            if (
                savings.used_embeddings != "never"
                and unused_embeddings_constant
                and self._text_tower.token_embedding.weight.requires_grad
            ):
                self._used = UsedEmbeddings(clip, tokens)
                self._prompts = self._used.remap(self._prompts)
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

    def restore_embeddings(self, clip: nn.Module) -> None:
        """Give the model, or a copy of it made since, its whole token embedding back."""
        if self._used is not None:
            self._used.restore(clip)

    def named_trained_parameters(self) -> dict[str, torch.Tensor]:
        """The trained parameters by name, the token embedding whole."""
        found = {name: each.detach() for name, each in self.clip.named_parameters() if each.requires_grad}
        if self._used is not None:
            used = TextTower.from_clip(self.clip).token_embedding.weight
            [name] = [name for name, each in self.clip.named_parameters() if each is used]
            found[name] = self._used.full_table(used)
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


def _lay_out(tower: TextTower, tokens: torch.Tensor, savings: Savings) -> PackedPrompts:
    cut = savings.context_cut != "never"
    return pack_prompts(tokens, tower.end_positions(tokens), cut=cut, pack=cut and savings.packed_prompts != "never")


def _image_tower(clip: nn.Module, savings: Savings, checkpointed: bool, notes: list[str]) -> ImageTower | None:
    """The image tower by rows, where it may be used and gives the model's own features."""
    if savings.pooled_row == "never":
        return None
    try:
        tower = ImageTower.from_clip(clip, checkpointed)
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
        tower = TextTower.from_clip(clip, checkpointed)
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
    [agreeing] = all_reduce_ints(difference <= TOLERANCE)
    if agreeing < world_size():
        raise OutputsDifferError(f"its features would differ by {difference:.1g}")


def _enable_gradient_checkpointing(clip: nn.Module, tokens: torch.Tensor, image_tower: bool, text_tower: bool) -> None:
    """Switch on open_clip's gradient checkpointing, and run its towers forward and backward once with it.

    Args:
        clip: the model.
        tokens: of a text, [1, L].
        image_tower: whether open_clip's image tower is used.
        text_tower: whether open_clip's text tower is used.

    Raises:
        InputError: the model's blocks cannot be checkpointed.
    """
    model: Any = clip
    image = torch.zeros(1, 3, *image_size(clip)).to(next(clip.parameters()))
    was_training = clip.training
    clip.train()
    for name, used, encode, example in (
        ("image", image_tower, model.encode_image, image),
        ("text", text_tower, model.encode_text, tokens),
    ):
        try:
            model.set_grad_checkpointing(True)
            if used and (features := encode(example)).requires_grad:
                features.sum().backward()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a model's code raises what it meets
            raise InputError(
                f"compute.gradient_checkpointing: found true, but the model's {name} tower cannot do it, expected "
                f"false ({type(error).__name__}: {' '.join(str(error).split())})"
            ) from error
    clip.zero_grad()
    clip.train(was_training)


def list_unpruned_towers(clip: nn.Module, savings: Savings) -> list[str]:
    """Which towers a model's structure leaves to be computed in full, and why; a sentence each.

    Raises:
        InputError: a saving is asked for that the structure does not allow.
    """
    found = []
    for name, tower, wanted in (("image", ImageTower, IMAGE_SAVINGS), ("text", TextTower, TEXT_SAVINGS)):
        try:
            tower.from_clip(clip)
        except NotApplicableError as reason:
            _do_without(wanted, savings, name, reason, notes=[])
            found.append(f"the {name} tower is computed in full: {reason}")
    return found
