"""Exemplars of earlier tasks (iCaRL): herded on image features, kept as the encoded images they were.

A stage leaves its exemplars beside its model, best first, as many as it may ever need; how many of them count is
decided by who reads them. So the memory shrinks without being rewritten, and is whatever the run's folder holds.
"""

import io
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from schemas.errors import InputError
from zscl.data.decode import FORMATS, Decoder
from zscl.data.indexed import IndexedSamples
from zscl.data.loader import EvaluationImages, Loader
from zscl.data.sample import Samples
from zscl.data.shard_urls import open_samples
from zscl.data.tar import write_shards
from zscl.data.task import TaskFolder
from zscl.models.clip import Clip, at_least_float32, image_size, precision_context
from zscl.runtime.distributed import gather_ragged, rank, world_size

SUFFIXES = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
SHARD_IMAGES = 1_000


def exemplars_per_class(budget: int, tasks: int, classes: int) -> int:
    """Exemplars of each class of a task when so many tasks share the budget."""
    return budget // tasks // classes


def check_budget(budget: int, tasks: Sequence[TaskFolder]) -> None:
    """Refuse a budget that leaves a class without exemplars before the last stage.

    Raises:
        InputError: naming the task with the most classes.
    """
    remembered = tasks[:-1]
    for task in remembered:
        if exemplars_per_class(budget, len(remembered), len(task.classnames)) == 0:
            raise InputError(
                f"method.memory.budget: found {budget}, expected at least {len(remembered) * len(task.classnames)}: "
                f"{len(remembered)} tasks share it and {task.name} has {len(task.classnames)} classes"
            )


def herd(features: torch.Tensor, count: int) -> list[int]:
    """Choose rows one after another so that the mean of those chosen stays nearest to the mean of all.

    Rebuffi et al., iCaRL, CVPR 2017, algorithm 4; the first ones are the best.

    Args:
        features: [n, D], normalised, of one class.
        count: how many to choose; all if there are fewer.

    Returns indices in order of choice.
    """
    target = features.mean(dim=0)
    free = torch.ones(len(features), dtype=torch.bool, device=features.device)
    total, chosen = torch.zeros_like(target), []
    for size in range(1, min(count, len(features)) + 1):
        distance = ((total + features) / size - target).square().sum(dim=1)
        best = int(distance.where(free, torch.inf).argmin())
        chosen.append(best)
        free[best] = False
        total += features[best]
    return chosen


@torch.inference_mode()
def encode_training_images(
    clip: Clip, task: TaskFolder, loader: Loader, precision: str, batch_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Encode a task's training images as in evaluation; what cannot be used is left out.

    Returns features [n, D], labels [n] and places in the set [n], in the set's order.
    """
    was_training = clip.model.training
    clip.model.eval()
    decode = Decoder(clip.evaluation_transform, task.label_and_index_of)
    # A worker may have no image at all: it encodes one, for its shape, and gives no row.
    blank = torch.zeros(1, 3, *image_size(clip.model), device=loader.device)
    features = [at_least_float32(clip.model.encode_image(blank, normalize=True))[:0]]  # type: ignore[operator]
    found = [torch.empty(0, 2, dtype=torch.long, device=loader.device)]
    for batch, label_and_place in EvaluationImages(task.train, decode, rank(), world_size()).batches(
        batch_size, loader
    ):
        with precision_context(precision, loader.device):
            features.append(at_least_float32(clip.model.encode_image(batch, normalize=True)))  # type: ignore[operator]
        found.append(label_and_place)
    loader.check_over_workers()
    clip.model.train(was_training)
    everyones, labels_and_places = gather_ragged(torch.cat(features)), gather_ragged(torch.cat(found))
    labels, places = labels_and_places.unbind(dim=1)
    order = places.argsort()
    return everyones[order], labels[order], places[order]


def choose_exemplars(
    features: torch.Tensor, labels: torch.Tensor, places: torch.Tensor, count: int
) -> list[tuple[int, int]]:
    """Herd every class. Returns (place, label) of the chosen, the best of each class first."""
    ranked = []
    for label in labels.unique().tolist():
        own = places[labels == label].tolist()
        for order, index in enumerate(herd(features[labels == label], count)):
            ranked.append((order, label, own[index]))
    return [(place, label) for _, label, place in sorted(ranked)]


def write_exemplars(folder: Path, samples: Samples, chosen: Sequence[tuple[int, int]]) -> None:
    """Write the chosen (place, label) as shards, in their order, with the encoded images as they were."""
    wanted = {place for place, _ in chosen}
    images = {sample.index: sample.image for sample in samples.iter_shard(0, 1) if sample.index in wanted}
    kept = ({_suffix(images[place]): images[place], "cls": str(label).encode()} for place, label in chosen)
    write_shards(folder, kept, SHARD_IMAGES)


def _suffix(encoded: bytes) -> str:
    with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
        return SUFFIXES.get(image.format or "", "png")


def load_exemplars(folders: Sequence[Path], budget: int) -> IndexedSamples | None:
    """The exemplars of the earlier stages that the budget allows; `None` before there are any.

    Args:
        folders: each earlier stage's exemplars, as `write` left them.
        budget: images in all.
    """
    if not folders:
        return None
    samples = open_samples([str(folder) for folder in folders])
    assert isinstance(samples, IndexedSamples)
    by_class: dict[tuple[str, bytes | None], list[int]] = defaultdict(list)
    for place, sample in enumerate(samples.labels()):
        by_class[str(Path(sample.shard).parent), sample.label].append(place)
    classes = {folder: len({label for found, label in by_class if found == folder}) for folder, _ in by_class}
    allowed = [
        place
        for (folder, _), places in by_class.items()
        for place in places[: exemplars_per_class(budget, len(folders), classes[folder])]
    ]
    return samples.subset(sorted(allowed))
