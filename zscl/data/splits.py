"""Parts of a task's training images, drawn class by class.

Those held out are what choices are judged by, so that they never see a test image; a few of each class are what
few-shot learning trains on.
"""

import random
from collections import defaultdict
from collections.abc import Callable, Sequence

from schemas.errors import InputError
from schemas.experiment import HeldOut
from zscl.data.indexed import IndexedSamples
from zscl.data.sample import Sample, decode_label
from zscl.data.streaming import StreamedSamples
from zscl.runtime.seeding import derive_seed


def hold_out(
    samples: IndexedSamples | StreamedSamples, held_out: HeldOut, path: str, classnames: Sequence[str]
) -> tuple[IndexedSamples, IndexedSamples]:
    """Draw a share of each class's images, by a seed. Returns those that stay, and those held out.

    Args:
        samples: a task's training images.
        held_out: share and seed; the draw depends on them, a class's label and its number of images alone.
        path: the task's, for what is refused.
        classnames: in label order.

    Raises:
        InputError: the images are remote, a class would have none to be trained on, or no image would be held out.
    """
    if not isinstance(samples, IndexedSamples):
        raise InputError(
            f"{path}: found remote shards, expected local ones to hold some images out of (evaluation.held_out); "
            "compute.shard_cache makes them local"
        )
    held: list[int] = []
    for label, places in _by_class(samples).items():
        count = round(held_out.share * len(places))
        if count == len(places):
            name = classnames[int(label)] if label.isdecimal() and int(label) < len(classnames) else label
            raise InputError(
                f"{path}: evaluation.held_out.share is {held_out.share:g}, which leaves the class '{name}' without "
                f"training images (found {len(places)}), expected a smaller share"
            )
        held += random.Random(derive_seed(held_out.seed, "held out", label)).sample(places, count)
    if not held:
        raise InputError(
            f"{path}: evaluation.held_out.share is {held_out.share:g}, which holds out none of its {len(samples)} "
            "training images, expected a larger share"
        )
    out = set(held)
    kept = [place for place in range(len(samples)) if place not in out]
    return samples.subset(kept).reindexed(), samples.subset(sorted(held)).reindexed()


def draw_shots(
    samples: IndexedSamples | StreamedSamples, shots: int, seed: int, path: str, is_usable: Callable[[Sample], bool]
) -> IndexedSamples:
    """Draw so many images of each class, by a seed; of a class that has fewer, all.

    Args:
        samples: a task's training images.
        shots: images of each class.
        seed: the draw depends on it, a class's label and its number of images alone.
        path: the task's, for what is refused.
        is_usable: whether a sample is of a class; others are not drawn.

    Raises:
        InputError: the images are remote.
    """
    if not isinstance(samples, IndexedSamples):
        raise InputError(
            f"{path}: found remote shards, expected local ones to train on a few images of each class (shots); "
            "compute.shard_cache makes them local"
        )
    drawn: list[int] = []
    for label, places in _by_class(samples, is_usable).items():
        drawn += random.Random(derive_seed(seed, "shots", label)).sample(places, min(shots, len(places)))
    return samples.subset(sorted(drawn)).reindexed()


def _by_class(
    samples: IndexedSamples, is_usable: Callable[[Sample], bool] = lambda sample: sample.fault is None
) -> dict[str, list[int]]:
    """The places of each label's samples, in their order; those without a readable image are none to choose from."""
    of_class: defaultdict[str, list[int]] = defaultdict(list)
    for place, sample in enumerate(samples.labels()):
        if is_usable(sample):
            of_class[decode_label(sample.label)].append(place)
    return dict(of_class)
