"""Contrastive pre-training of a small CLIP model in one process.

The model that is part of this package (`model: embedded`) was trained with it.
"""

import json
import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torchvision.transforms import Compose, RandomCrop

from schemas.data import Task
from schemas.errors import ErrorCode, InputError
from schemas.pretraining import Pretraining
from zscl.data.decode import Decoder
from zscl.data.indexed import IndexedSamples
from zscl.data.loader import Loader, TrainingImages
from zscl.data.sample import decode_text
from zscl.data.shard_urls import open_samples
from zscl.data.task import TaskFolder
from zscl.evaluation.zero_shot import compute_accuracies, embed_classes
from zscl.models.clip import CONFIG, Clip
from zscl.runtime.seeding import derive_seed
from zscl.training.optim import learning_rate_factor

MAX_LOGIT_SCALE = 100.0  # CLIP's bound on exp(logit_scale)


@dataclass(frozen=True)
class Pretrained:
    """The pre-trained model and its quality.

    Attributes:
        folder: The model's open_clip folder.
        steps: Number of steps taken.
        loss: The loss of the last step.
        zero_shot: Zero-shot accuracy in [0, 1] by task.
    """

    folder: Path
    steps: int
    loss: float
    zero_shot: dict[str, float]


def build_untrained(recipe: Pretraining, device: torch.device) -> Clip:
    """Build a randomly initialised model from the recipe.

    Args:
        recipe: The recipe of the pre-training.
        device: The model's device.

    Returns:
        The model with its tokenizer and transforms.

    Raises:
        InputError: open_clip cannot build the architecture.
    """
    config = {"model_cfg": recipe.architecture, "preprocess_cfg": recipe.preprocess.model_dump()}
    torch.manual_seed(recipe.seed)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / CONFIG).write_text(json.dumps(config))
        name = f"local-dir:{folder}"
        try:
            logging.disable(logging.WARNING)  # open_clip warns that there are no weights
            model, train_transform, evaluation_transform = open_clip.create_model_and_transforms(
                name, device=device, output_dict=True
            )
        except (TypeError, KeyError, ValueError) as error:
            raise InputError(
                f"architecture: open_clip cannot build it ({error}), expected a model_cfg",
                code=ErrorCode.INVALID_VALUE,
                field="architecture",
            ) from error
        finally:
            logging.disable(logging.NOTSET)
        return Clip(model, open_clip.get_tokenizer(name), train_transform, evaluation_transform, recipe.architecture)


def contrastive_loss(
    images: torch.Tensor, texts: torch.Tensor, captions: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """Compute CLIP's symmetric contrastive loss. An image and a text are a positive pair if their captions are equal.

    Args:
        images: L2-normalised image features, [B, D].
        texts: L2-normalised text features, [B, D].
        captions: Caption indices, [B]; equal captions have equal indices.
        scale: exp(logit_scale), a scalar.

    Returns:
        The loss, a scalar.
    """
    logits = scale * images @ texts.T
    positives = (captions[:, None] == captions[None, :]).float()
    target = positives / positives.sum(dim=1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def pretrain_clip(
    recipe: Pretraining,
    folder: Path,
    report: Callable[[int, int, float], None],
    device: torch.device,
) -> Pretrained:
    """Train a model, write it as an open_clip folder in float16, and evaluate the zero-shot accuracy of that model.

    Args:
        recipe: The recipe of the pre-training.
        folder: The open_clip folder to write.
        report: Called after every step with the number of completed steps, the number of all steps, and the loss.
        device: The device to train on.

    Returns:
        The model's folder, number of steps, last loss and zero-shot accuracies.

    Raises:
        InputError: The corpus has no captions, or another value of the recipe is invalid.
    """
    tasks = [TaskFolder.open(Task.model_validate(path)) for path in recipe.judge]
    corpus, caption_indices = _open_corpus(recipe)
    clip = build_untrained(recipe, device)
    tokens = clip.tokenizer(list(caption_indices)).to(device)
    steps = recipe.epochs * len(corpus) // recipe.batch_size
    batches = TrainingImages(
        samples=corpus,
        decoder=Decoder(_build_transform(recipe, clip), lambda sample: caption_indices[decode_text(sample.text)]),
        seed=derive_seed(recipe.seed, "corpus"),
        batch_size=recipe.batch_size,
        rank_indices=range(recipe.batch_size),
    ).iter_batches(Loader(device))

    model = clip.model.train()
    optimizer = AdamW(
        _parameter_groups(model, recipe.weight_decay), lr=recipe.learning_rate, betas=recipe.betas, eps=1e-6
    )
    warmup = int(recipe.warmup_share * steps)
    schedule = LambdaLR(optimizer, lambda step: learning_rate_factor(step, warmup, steps))
    loss = torch.tensor(0.0)
    for step, (images, captions) in zip(range(steps), batches, strict=False):
        encoded = model(images, tokens[captions])
        loss = contrastive_loss(encoded["image_features"], encoded["text_features"], captions, encoded["logit_scale"])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.gradient_norm)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=torch.tensor(MAX_LOGIT_SCALE).log())  # type: ignore[operator]
        report(step + 1, steps, float(loss.detach()))

    clip.save(model, folder, dtype=torch.float16)
    model.half().float()  # evaluate the weights as they are written
    zero_shot = {
        task.name: compute_accuracies(clip, task, [head], Loader(device))[0][0]
        for task, head in zip(tasks, embed_classes(clip, tasks, "all", "fp32", device), strict=True)
    }
    return Pretrained(folder, steps, float(loss.detach()), zero_shot)


def _open_corpus(recipe: Pretraining) -> tuple[IndexedSamples, dict[str, int]]:
    """Return the image-text pairs to train on, and the index of each distinct caption."""
    corpus = open_samples(recipe.corpus)
    if not isinstance(corpus, IndexedSamples):
        raise InputError(
            f"corpus: found remote shards ({recipe.corpus[0]}), expected local ones",
            code=ErrorCode.UNSUPPORTED,
            field="corpus",
        )
    caption_indices = {caption: index for index, caption in enumerate(dict.fromkeys(corpus.iter_texts()))}
    if not caption_indices:
        raise InputError(
            f"corpus: found no .txt captions in {', '.join(recipe.corpus)}, expected a caption for each image",
            code=ErrorCode.EMPTY,
            field="corpus",
        )
    return corpus, caption_indices


def _build_transform(recipe: Pretraining, clip: Clip) -> Callable[[Any], torch.Tensor]:
    """Build the training transform: a random shift of a few pixels, followed by the evaluation transform."""
    if recipe.shift_pixels == 0:
        return clip.evaluation_transform
    size = recipe.architecture["vision_cfg"]["image_size"]
    shift = RandomCrop(size, padding=recipe.shift_pixels, padding_mode="edge")
    transform: Callable[[Any], torch.Tensor] = Compose([shift, clip.evaluation_transform])
    return transform


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return the optimizer's parameter groups: matrices with weight decay; biases, norms and embeddings without it."""
    decayed: list[nn.Parameter] = []
    not_decayed: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_decayed = parameter.ndim >= 2 and "embedding" not in name
        (decayed if is_decayed else not_decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": not_decayed, "weight_decay": 0.0}]
