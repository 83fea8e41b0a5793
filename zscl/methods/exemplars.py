"""Exemplars of earlier tasks (iCaRL): chosen by herding on image features, stored as encoded images.

After each stage, exemplars of its task are written to the run's folder in the order in which they were chosen. The more
tasks share the memory, the fewer exemplars of each task are used: `load_exemplars` then reads fewer of the written
exemplars, so the files need not be rewritten.
"""

import io
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from schemas.errors import ErrorCode, InputError
from zscl.data.decode import IMAGE_FORMATS, Decoder
from zscl.data.indexed import IndexedSamples
from zscl.data.loader import EvaluationImages, Loader
from zscl.data.sample import Samples
from zscl.data.shard_urls import open_samples
from zscl.data.tar import write_shards
from zscl.data.task import TaskFolder
from zscl.models.clip import Clip, at_least_float32, image_size, precision_context
from zscl.runtime.distributed import gather_ragged, rank, world_size

FILE_SUFFIXES = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
IMAGES_PER_SHARD = 1_000


def exemplars_per_class(budget: int, task_count: int, class_count: int) -> int:
    """Return how many exemplars each class of a task gets.

    Args:
        budget: The number of images in the memory (`method.memory.budget`).
        task_count: The number of tasks that share the budget evenly.
        class_count: The number of classes of the task, which share the task's part of the budget evenly.

    Returns:
        The number of images for each class, rounded down.
    """
    return budget // task_count // class_count


def check_budget(budget: int, tasks: Sequence[TaskFolder]) -> None:
    """Check that the budget allows at least one exemplar for every class of all tasks except the last.

    Args:
        budget: The number of images in the memory.
        tasks: All tasks of the sequence in order.

    Raises:
        InputError: The budget is too small for a task. The message names the task and the smallest budget for it.
    """
    remembered = tasks[:-1]
    for task in remembered:
        if exemplars_per_class(budget, len(remembered), len(task.classnames)) == 0:
            raise InputError(
                f"method.memory.budget: found {budget}, expected at least {len(remembered) * len(task.classnames)}, "
                f"because {len(remembered)} tasks share it and {task.name} has {len(task.classnames)} classes",
                code=ErrorCode.INVALID_VALUE,
                field="method.memory.budget",
            )


def herd(features: torch.Tensor, count: int) -> list[int]:
    """Choose images one by one so that their mean feature stays closest to the mean feature of all images.

    Algorithm 4 of Rebuffi et al., iCaRL: Incremental Classifier and Representation Learning, CVPR 2017.

    Args:
        features: L2-normalised features of one class, [n, D].
        count: The number of images to choose. If there are fewer images, all are chosen.

    Returns:
        Indices of rows of `features` in the order of choice. For a smaller `count`, the list is a prefix of this list.
    """
    target = features.mean(dim=0)
    is_free = torch.ones(len(features), dtype=torch.bool, device=features.device)
    total, chosen = torch.zeros_like(target), []
    for size in range(1, min(count, len(features)) + 1):
        distance = ((total + features) / size - target).square().sum(dim=1)
        best = int(distance.where(is_free, torch.inf).argmin())
        chosen.append(best)
        is_free[best] = False
        total += features[best]
    return chosen


@torch.inference_mode()
def encode_training_images(
    clip: Clip, task: TaskFolder, loader: Loader, precision: str, batch_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Encode a task's training images with the evaluation transform. All ranks must call this.

    Unusable images are skipped.

    Args:
        clip: The model and its transform.
        task: The task.
        loader: The data loader, with the model's device.
        precision: `fp32` or `bf16`.
        batch_size: How many images a rank encodes at once.

    Returns:
        L2-normalised features [n, D], labels [n] and indices in the data set [n] of the n usable images. They are
        sorted by index and equal on all ranks.
    """
    was_training = clip.model.training
    clip.model.eval()
    decode = Decoder(clip.evaluation_transform, task.get_label_and_index)
    images = EvaluationImages(task.train, decode, rank(), world_size())
    # A rank may have no image. The features of one blank image give its empty tensor the right width.
    blank = torch.zeros(1, 3, *image_size(clip.model), device=loader.device)
    features = [at_least_float32(clip.model.encode_image(blank, normalize=True))[:0]]  # type: ignore[operator]
    labels_and_indices = [torch.empty(0, 2, dtype=torch.long, device=loader.device)]
    for batch, batch_labels_and_indices in images.iter_batches(batch_size, loader):
        with precision_context(precision, loader.device):
            features.append(at_least_float32(clip.model.encode_image(batch, normalize=True)))  # type: ignore[operator]
        labels_and_indices.append(batch_labels_and_indices)
    loader.check_broken_across_ranks()
    clip.model.train(was_training)
    all_features = gather_ragged(torch.cat(features))
    labels, indices = gather_ragged(torch.cat(labels_and_indices)).unbind(dim=1)
    order = indices.argsort()
    return all_features[order], labels[order], indices[order]


def choose_exemplars(
    features: torch.Tensor, labels: torch.Tensor, indices: torch.Tensor, count: int
) -> list[tuple[int, int]]:
    """Choose exemplars of every class by herding.

    Args:
        features: L2-normalised features of a task's training images, [n, D].
        labels: The labels of the images, [n].
        indices: The indices of the images in the data set, [n].
        count: How many images of each class to choose.

    Returns:
        Pairs (index in the data set, label). The image that herding chose first for each class comes first, then the
        second image of each class, and so on.
    """
    ranked = []
    for label in labels.unique().tolist():
        class_indices = indices[labels == label].tolist()
        for order, row in enumerate(herd(features[labels == label], count)):
            ranked.append((order, label, class_indices[row]))
    return [(index, label) for _, label, index in sorted(ranked)]


def write_exemplars(folder: Path, samples: Samples, chosen: Sequence[tuple[int, int]]) -> None:
    """Write exemplars as WebDataset shards.

    Args:
        folder: The folder of the shards.
        samples: The data set from which the exemplars were chosen.
        chosen: Pairs (index in the data set, label) in the order in which the exemplars are written. The encoded images
            are copied unchanged.
    """
    chosen_indices = {index for index, _ in chosen}
    images = {sample.index: sample.image for sample in samples.iter_shard(0, 1) if sample.index in chosen_indices}
    exemplars = ({_file_suffix(images[index]): images[index], "cls": str(label).encode()} for index, label in chosen)
    write_shards(folder, exemplars, IMAGES_PER_SHARD)


def _file_suffix(encoded: bytes) -> str:
    with Image.open(io.BytesIO(encoded), formats=IMAGE_FORMATS) as image:
        return FILE_SUFFIXES.get(image.format or "", "png")


def load_exemplars(folders: Sequence[Path], budget: int) -> IndexedSamples | None:
    """Load the exemplars of earlier stages within the budget.

    Args:
        folders: For each earlier stage, the folder that `write_exemplars` wrote.
        budget: The number of images in the memory. Each stage gets an equal share of the budget, and each class an
            equal share of its stage's images.

    Returns:
        The exemplars; `None` if there is no earlier stage.
    """
    if not folders:
        return None
    samples = open_samples([str(folder) for folder in folders])
    assert isinstance(samples, IndexedSamples)
    by_class: dict[tuple[str, bytes | None], list[int]] = defaultdict(list)
    for index, sample in enumerate(samples.iter_labels()):
        by_class[str(Path(sample.shard).parent), sample.label].append(index)
    class_counts = Counter(folder for folder, _ in by_class)
    allowed = [
        index
        for (folder, _), indices in by_class.items()
        for index in indices[: exemplars_per_class(budget, len(folders), class_counts[folder])]
    ]
    return samples.subset(sorted(allowed))
