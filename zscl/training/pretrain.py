"""Contrastive pre-training of a small CLIP, in one process: how the embedded model was made."""

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
from schemas.errors import InputError
from schemas.pretraining import Pretraining
from zscl.data.decode import Decoder
from zscl.data.indexed import IndexedSamples
from zscl.data.loader import Loader, TrainingImages
from zscl.data.sample import decode_text
from zscl.data.shard_urls import open_samples
from zscl.data.task import TaskFolder
from zscl.evaluation.zero_shot import accuracies, embed_classes
from zscl.models.clip import CONFIG, Clip
from zscl.runtime.seeding import derive_seed
from zscl.training.optim import learning_rate_factor

LARGEST_SCALE = 100.0  # CLIP's bound on exp(logit_scale)


@dataclass(frozen=True)
class Pretrained:
    """What pre-training made and how good it is."""

    folder: Path
    steps: int
    loss: float
    zero_shot: dict[str, float]


def build_untrained(recipe: Pretraining, device: torch.device) -> Clip:
    """Make a randomly initialised model from the recipe.

    Raises:
        InputError: open_clip cannot build the architecture.
    """
    config = {"model_cfg": recipe.architecture, "preprocess_cfg": recipe.preprocess.model_dump()}
    torch.manual_seed(recipe.seed)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / CONFIG).write_text(json.dumps(config))
        name = f"local-dir:{folder}"
        try:
            logging.disable(logging.WARNING)  # that there are no weights yet is meant
            model, train_transform, evaluation_transform = open_clip.create_model_and_transforms(
                name, device=device, output_dict=True
            )
        except (TypeError, KeyError, ValueError) as error:
            raise InputError(f"architecture: open_clip cannot build it ({error}), expected a model_cfg") from error
        finally:
            logging.disable(logging.NOTSET)
        return Clip(model, open_clip.get_tokenizer(name), train_transform, evaluation_transform, recipe.architecture)


def contrastive_loss(
    images: torch.Tensor, texts: torch.Tensor, captions: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """CLIP's loss where equal captions are positives of each other.

    Args:
        images: [B, D], normalised.
        texts: [B, D], normalised.
        captions: [B], equal numbers for equal captions.
        scale: exp(logit_scale).
    """
    logits = scale * images @ texts.T
    positives = (captions[:, None] == captions[None, :]).float()
    target = positives / positives.sum(dim=1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def pretrain(
    recipe: Pretraining,
    folder: Path,
    report: Callable[[int, int, float], None],
    device: torch.device,
) -> Pretrained:
    """Train, write an open_clip folder in float16, and measure what was written.

    Args:
        recipe: what to train.
        folder: where the model will be.
        report: told (steps done, steps in all, loss) after every step.
        device: where to train.

    Raises:
        InputError: the corpus has no captions, or something else in the recipe is wrong.
    """
    tasks = [TaskFolder.open(Task.model_validate(path)) for path in recipe.judge]
    corpus, numbers = _open_corpus(recipe)
    clip = build_untrained(recipe, device)
    tokens = clip.tokenizer(list(numbers)).to(device)
    steps = recipe.epochs * len(corpus) // recipe.batch_size
    batches = TrainingImages(
        samples=corpus,
        decode=Decoder(_shifting(recipe, clip), lambda sample: numbers[decode_text(sample.text)]),
        seed=derive_seed(recipe.seed, "corpus"),
        batch_size=recipe.batch_size,
        own=range(recipe.batch_size),
    ).batches(Loader(device))

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
            model.logit_scale.clamp_(max=torch.tensor(LARGEST_SCALE).log())  # type: ignore[operator]
        report(step + 1, steps, float(loss.detach()))

    clip.save(model, folder, dtype=torch.float16)
    model.half().float()  # measure the weights as they were written
    zero_shot = {
        task.name: accuracies(clip, task, [own], Loader(device))[0][0]
        for task, own in zip(tasks, embed_classes(clip, tasks, "all", "fp32", device), strict=True)
    }
    return Pretrained(folder, steps, float(loss.detach()), zero_shot)


def _open_corpus(recipe: Pretraining) -> tuple[IndexedSamples, dict[str, int]]:
    """The corpus, and a number for each of its captions; equal ones have the same."""
    corpus = open_samples(recipe.corpus)
    if not isinstance(corpus, IndexedSamples):
        raise InputError(f"corpus: found remote shards ({recipe.corpus[0]}), expected local ones")
    numbers = {caption: number for number, caption in enumerate(dict.fromkeys(corpus.texts()))}
    if not numbers:
        raise InputError(
            f"corpus: found no .txt captions in {', '.join(recipe.corpus)}, expected one beside each image"
        )
    return corpus, numbers


def _shifting(recipe: Pretraining, clip: Clip) -> Callable[[Any], torch.Tensor]:
    if recipe.shift_pixels == 0:
        return clip.evaluation_transform
    size = recipe.architecture["vision_cfg"]["image_size"]
    shift = RandomCrop(size, padding=recipe.shift_pixels, padding_mode="edge")
    transform: Callable[[Any], torch.Tensor] = Compose([shift, clip.evaluation_transform])
    return transform


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Decay matrices; leave biases, norms, embeddings and the logit scale alone."""
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        matrix = parameter.ndim >= 2 and "embedding" not in name
        (decayed if matrix else others).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
