"""Class-wise random subsets of a task's training images: held-out images for validation, and few-shot training sets."""

import random
from collections import defaultdict
from collections.abc import Callable, Sequence

from schemas.errors import ErrorCode, InputError
from schemas.experiment import HeldOut
from zscl.data.indexed import IndexedSamples
from zscl.data.sample import Sample, decode_label
from zscl.data.streaming import StreamedSamples
from zscl.runtime.seeding import derive_seed


def hold_out(
    samples: IndexedSamples | StreamedSamples, held_out: HeldOut, path: str, classnames: Sequence[str]
) -> tuple[IndexedSamples, IndexedSamples]:
    """Hold out a random fraction of each class's images.

    The images drawn from a class depend only on the seed, the label and the number of the class's usable images.

    Args:
        samples: A task's training images.
        held_out: The recipe's settings: fraction and seed.
        path: The task's path, for error messages.
        classnames: Class names in label order.

    Returns:
        The remaining training images, and the held-out images.

    Raises:
        InputError: The images are remote, a class would have no training image left, or no image is held out.
    """
    if not isinstance(samples, IndexedSamples):
        raise InputError(
            f"{path}: found remote shards, expected local shards for evaluation.held_out; to download them, set "
            "compute.shard_cache",
            code=ErrorCode.UNSUPPORTED,
            field="evaluation.held_out",
        )
    held: list[int] = []
    for label, positions in _group_by_label(samples).items():
        count = round(held_out.share * len(positions))
        if count == len(positions):
            name = classnames[int(label)] if label.isdecimal() and int(label) < len(classnames) else label
            raise InputError(
                f"{path}: evaluation.held_out.share is {held_out.share:g}, which leaves the class '{name}' without "
                f"training images (found {len(positions)}), expected a smaller share",
                code=ErrorCode.INVALID_VALUE,
                field="evaluation.held_out.share",
            )
        held += random.Random(derive_seed(held_out.seed, "held out", label)).sample(positions, count)
    if not held:
        raise InputError(
            f"{path}: evaluation.held_out.share is {held_out.share:g}, which holds out none of its {len(samples)} "
            "training images, expected a larger share",
            code=ErrorCode.INVALID_VALUE,
            field="evaluation.held_out.share",
        )
    excluded = set(held)
    remaining = [position for position in range(len(samples)) if position not in excluded]
    return samples.subset(remaining).reindexed(), samples.subset(sorted(held)).reindexed()


def draw_shots(
    samples: IndexedSamples | StreamedSamples, shots: int, seed: int, path: str, is_usable: Callable[[Sample], bool]
) -> IndexedSamples:
    """Draw a few random images of each class, for few-shot training.

    The images drawn from a class depend only on the seed, the label and the number of the class's usable images.

    Args:
        samples: A task's training images.
        shots: Images per class; a class with fewer images contributes all of them.
        seed: Seed of the draw.
        path: The task's path, for error messages.
        is_usable: Function that returns whether a sample can be used. Unusable samples are not drawn.

    Returns:
        The drawn images.

    Raises:
        InputError: The images are remote.
    """
    if not isinstance(samples, IndexedSamples):
        raise InputError(
            f"{path}: found remote shards, expected local shards for tasks.shots; to download them, set "
            "compute.shard_cache",
            code=ErrorCode.UNSUPPORTED,
            field="tasks.shots",
        )
    drawn: list[int] = []
    for label, positions in _group_by_label(samples, is_usable).items():
        drawn += random.Random(derive_seed(seed, "shots", label)).sample(positions, min(shots, len(positions)))
    return samples.subset(sorted(drawn)).reindexed()


def _group_by_label(
    samples: IndexedSamples, is_usable: Callable[[Sample], bool] = lambda sample: sample.fault is None
) -> dict[str, list[int]]:
    """Return the positions of the usable samples in ascending order, by the text of their label."""
    by_label: defaultdict[str, list[int]] = defaultdict(list)
    for position, sample in enumerate(samples.iter_labels()):
        if is_usable(sample):
            by_label[decode_label(sample.label)].append(position)
    return dict(by_label)
