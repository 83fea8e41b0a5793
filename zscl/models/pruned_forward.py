"""The student's forward pass without computations that no loss depends on; the features are the same.

Four optimisations (`compute.savings`) depend on the structure of the model. An optimisation is used only if the
structure allows it and the pruned tower reproduces open_clip's features. Otherwise open_clip's own forward pass is
used:

- context cut: a causal text tower that pools at the end token ignores all later positions, so they are dropped;
- packed prompts: under a causal mask, the hidden states of a prefix that all prompts share are equal, so they are
  computed once, and the rest of the prompts is stored without padding;
- pooled row: only the pooled token of the last block is read, so that block computes its queries, output projection
  and MLP for one token of each image or prompt;
- used embeddings: token embeddings that no prompt uses have no gradient in the whole stage, so only a small table of
  the used embeddings is trained.

`vision_tower` and `text_tower` implement the pruned towers. This module checks the pruned towers, combines them, and
disables those that cannot be used.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from schemas.compute import Compute, Savings
from schemas.errors import ErrorCode, InputError
from zscl.models.attention import NotApplicableError
from zscl.models.clip import at_least_float32, image_size
from zscl.models.text_tower import PackedPrompts, TextTower, UsedEmbeddings, pack_prompts
from zscl.models.vision_tower import ImageTower
from zscl.runtime.distributed import all_reduce_sum, world_size

TOLERANCE = 1e-5  # the largest difference between normalised features that rounding may cause
IMAGE_SAVINGS = ("pooled_row",)
TEXT_SAVINGS = ("context_cut", "packed_prompts", "pooled_row", "used_embeddings")


class OutputsDifferError(NotApplicableError):
    """The structure of a tower allows pruning, but the pruned features differ from open_clip's."""


class PrunedForward(nn.Module):
    """The student's image and text towers in one module, because `DistributedDataParallel` needs one forward pass.

    Attributes:
        clip: The model in training.
        notes: Messages for the user: which towers are computed without optimisations, and why.
    """

    def __init__(
        self,
        clip: nn.Module,
        tokens: torch.Tensor,
        rank_prompts: range,
        compute: Compute,
        unused_embeddings_constant: bool,
    ) -> None:
        """Build the pruned towers and compare their features with open_clip's. All ranks must call this.

        Args:
            clip: The open_clip model in training. If only the used embeddings are trained, its token embedding is
                replaced until `restore_embeddings` is called.
            tokens: Token ids of all class prompts, [C, L].
            rank_prompts: The indices of the prompts that this rank encodes.
            compute: The recipe's `compute`, which selects the optimisations and trades memory for computation.
            unused_embeddings_constant: Whether training leaves token embeddings without a gradient unchanged, as is the
                case if there is no weight decay.

        Raises:
            InputError: The recipe requires an optimisation or gradient checkpointing that the model does not support.
        """
        super().__init__()
        self.clip, self.one_pass, self.images_at_once = clip, compute.savings.one_pass, compute.images_at_once
        self._tokens = tokens[rank_prompts.start : rank_prompts.stop]
        self._used: UsedEmbeddings | None = None
        self._prompts: PackedPrompts | None = None
        savings, checkpointed = compute.savings, compute.gradient_checkpointing
        self.notes: list[str] = []
        self._image_tower = _build_image_tower(clip, savings, checkpointed, self.notes)
        self._text_tower = _build_text_tower(clip, tokens, savings, checkpointed, self.notes)
        if checkpointed:
            _enable_gradient_checkpointing(clip, tokens[:1], self._image_tower is None, self._text_tower is None)
        self._pooled_row = savings.pooled_row != "never"
        if self._text_tower is not None:
            self._prompts = _pack(self._text_tower, self._tokens, savings)
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
        """Encode this rank's task images, reference images and class prompts.

        Args:
            images: Task images, [b, 3, H, W].
            references: Reference images, [b', 3, H, W], or `None`.

        Returns:
            L2-normalised features of the task images [b, D], of the reference images [b', D] or `None`, and of this
            rank's prompts [c, D].
        """
        prompts = self._encode_prompts()
        if references is None:
            return self._encode_in_parts(images), None, prompts
        if not self.one_pass:
            return self._encode_in_parts(images), self._encode_in_parts(references), prompts
        encoded = self._encode_in_parts(torch.cat([images, references]))
        return encoded[: len(images)], encoded[len(images) :], prompts

    def restore_embeddings(self, clip: nn.Module) -> None:
        """Replace the small table of used token embeddings by the full table, updated with the trained embeddings.

        If the model has no small table, nothing is changed.

        Args:
            clip: The model in training or a copy of it, changed in place.
        """
        if self._used is not None:
            self._used.restore(clip)

    def named_trained_parameters(self) -> dict[str, torch.Tensor]:
        """Return the trained parameters by name, detached. The token embedding is always the full table."""
        parameters = {
            name: parameter.detach() for name, parameter in self.clip.named_parameters() if parameter.requires_grad
        }
        if self._used is not None:
            used = TextTower.from_clip(self.clip).token_embedding.weight
            [name] = [name for name, parameter in self.clip.named_parameters() if parameter is used]
            parameters[name] = self._used.full_table(used)
        return parameters

    def _encode_in_parts(self, images: torch.Tensor) -> torch.Tensor:
        """Encode images in parts of at most `images_at_once` images."""
        if self.images_at_once is None or len(images) <= self.images_at_once:
            return self._encode_images(images)
        # The backward pass recomputes the activations of each part: less memory, the same features and losses.
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


def _pack(tower: TextTower, tokens: torch.Tensor, savings: Savings) -> PackedPrompts:
    """Pack prompts with the optimisations that the recipe allows."""
    cut = savings.context_cut != "never"
    return pack_prompts(tokens, tower.end_positions(tokens), cut=cut, pack=cut and savings.packed_prompts != "never")


def _build_image_tower(clip: nn.Module, savings: Savings, checkpointed: bool, notes: list[str]) -> ImageTower | None:
    """Build the pruned image tower. Return `None` if the recipe disables it or the features are not reproduced."""
    if savings.pooled_row == "never":
        return None
    try:
        tower = ImageTower.from_clip(clip, checkpointed)
        height, width = image_size(clip)
        images = torch.linspace(-1, 1, 2 * 3 * height * width).reshape(2, 3, height, width)
        images = images.to(tower.visual.conv1.weight)
        _check_outputs(clip, tower, images, clip.encode_image, images)  # type: ignore[arg-type]
    except NotApplicableError as reason:
        _disable_savings(IMAGE_SAVINGS, savings, "image", reason, notes)
        return None
    return tower


def _build_text_tower(
    clip: nn.Module, tokens: torch.Tensor, savings: Savings, checkpointed: bool, notes: list[str]
) -> TextTower | None:
    """Build the pruned text tower. Return `None` if the recipe disables it or the features are not reproduced."""
    if all(getattr(savings, name) == "never" for name in TEXT_SAVINGS):
        return None
    try:
        tower = TextTower.from_clip(clip, checkpointed)
        examples = tokens[:3]  # the same prompts on every rank
        _check_outputs(clip, tower, _pack(tower, examples, savings), clip.encode_text, examples)  # type: ignore[arg-type]
    except NotApplicableError as reason:
        _disable_savings(TEXT_SAVINGS, savings, "text", reason, notes)
        return None
    return tower


def _disable_savings(
    names: Sequence[str], savings: Savings, tower: str, reason: NotApplicableError, notes: list[str]
) -> None:
    """Handle a tower that cannot be pruned. Add a note if the reason is that its features differ from open_clip's.

    Args:
        names: The optimisations of the tower.
        savings: The recipe's `compute.savings`.
        tower: "image" or "text".
        reason: The reason why the tower cannot be pruned.
        notes: The list to which the note is appended.

    Raises:
        InputError: The recipe requires one of the optimisations.
    """
    for name in names:
        if getattr(savings, name) == "always":
            raise InputError(
                f"compute.savings.{name}=always is not possible with the model's {tower} tower ({reason}). "
                "Set it to auto or never",
                code=ErrorCode.UNSUPPORTED,
                field=f"compute.savings.{name}",
            ) from reason
    if isinstance(reason, OutputsDifferError):
        notes.append(f"the {tower} tower is computed in full: {reason}")


@torch.no_grad()
def _check_outputs(
    clip: nn.Module,
    pruned: Callable[..., torch.Tensor],
    pruned_input: object,
    original: Callable[..., torch.Tensor],
    original_input: object,
) -> None:
    """Check on every rank that a pruned tower reproduces open_clip's features. All ranks must call this.

    Args:
        clip: The model.
        pruned: The pruned tower.
        pruned_input: The input of the pruned tower.
        original: open_clip's method for the same tower.
        original_input: The same images or prompts, as input of `original`.

    Raises:
        OutputsDifferError: The features differ on at least one rank.
    """
    was_training = clip.training
    clip.eval()
    difference = float((pruned(pruned_input) - original(original_input, normalize=True)).abs().max())
    clip.train(was_training)
    [agreeing] = all_reduce_sum(difference <= TOLERANCE)
    if agreeing < world_size():
        raise OutputsDifferError(f"its features differ by {difference:.1g}")


def _enable_gradient_checkpointing(clip: nn.Module, tokens: torch.Tensor, image_tower: bool, text_tower: bool) -> None:
    """Enable open_clip's gradient checkpointing, and check it with one forward and backward pass of open_clip's towers.

    Args:
        clip: The model.
        tokens: Token ids of one prompt, [1, L].
        image_tower: Whether images are encoded by open_clip's image tower instead of a pruned one.
        text_tower: Whether texts are encoded by open_clip's text tower instead of a pruned one.

    Raises:
        InputError: The model does not support gradient checkpointing.
        OutOfMemoryError: The device has too little memory for one example.
    """
    model: Any = clip
    image = torch.zeros(1, 3, *image_size(clip)).to(next(clip.parameters()))
    was_training = clip.training
    clip.train()
    for name, is_used, encode, example in (
        ("image", image_tower, model.encode_image, image),
        ("text", text_tower, model.encode_text, tokens),
    ):
        try:
            model.set_grad_checkpointing(True)
            if is_used and (features := encode(example)).requires_grad:
                features.sum().backward()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a model's code may raise any exception
            raise InputError(
                f"compute.gradient_checkpointing=true is not possible with the model's {name} tower. Set it to "
                f"false ({type(error).__name__}: {' '.join(str(error).split())})",
                code=ErrorCode.UNSUPPORTED,
                field="compute.gradient_checkpointing",
            ) from error
    clip.zero_grad()
    clip.train(was_training)


def list_unpruned_towers(clip: nn.Module, savings: Savings) -> list[str]:
    """List the towers whose structure does not allow pruning.

    Args:
        clip: The model.
        savings: The recipe's `compute.savings`.

    Returns:
        One sentence with the reason for each tower that is computed in full.

    Raises:
        InputError: The recipe requires an optimisation that the model's structure does not allow.
    """
    notes = []
    for name, tower, names in (("image", ImageTower, IMAGE_SAVINGS), ("text", TextTower, TEXT_SAVINGS)):
        try:
            tower.from_clip(clip)
        except NotApplicableError as reason:
            _disable_savings(names, savings, name, reason, notes=[])
            notes.append(f"the {name} tower is computed in full: {reason}")
    return notes
