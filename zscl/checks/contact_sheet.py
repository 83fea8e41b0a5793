"""Selection of example images of each class for a contact sheet, an overview of small images."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from PIL import Image

from zscl.checks.image import ImageFacts, inspect_image, suppress_decoder_warnings
from zscl.checks.task_scan import ScannedTask
from zscl.data.decode import decode_image
from zscl.data.indexed import IndexedSamples
from zscl.data.sample import decode_label
from zscl.data.task import parse_count


@dataclass(frozen=True)
class ContactRow:
    """One row of a contact sheet: a class and a few of its training images.

    Attributes:
        prompt: The first template, filled with the class name.
        images: The thumbnails.
    """

    prompt: str
    images: tuple[Image.Image, ...]


def contact_rows(scanned: ScannedTask, per_class: int, classes: int, max_edge: int) -> list[ContactRow]:
    """Select classes at equal intervals in label order, and training images of each class at equal intervals.

    Args:
        scanned: The scanned task folder.
        per_class: Maximum number of images of a class.
        classes: Maximum number of classes.
        max_edge: Maximum width and height of a thumbnail in pixels.

    Returns:
        One row per selected class, in label order.
    """
    task = scanned.task
    labels = [chunk[0] for chunk in _chunks(range(len(task.classnames)), classes)]
    samples_of: dict[int, list[tuple[IndexedSamples, int]]] = {label: [] for label in labels}
    for shard in scanned.shards:
        if shard.split == "train" and shard.samples:
            for index, sample in enumerate(shard.samples.iter_labels()):
                label = parse_count(decode_label(sample.label))
                if label in samples_of:
                    samples_of[label].append((shard.samples, index))
    template = task.templates[0] if task.templates else "{c}"
    with suppress_decoder_warnings():
        return [
            ContactRow(
                template.replace("{c}", task.classnames[label]), tuple(_thumbnails(samples, per_class, max_edge))
            )
            for label, samples in samples_of.items()
        ]


def _chunks(positions: Sequence[int], count: int) -> list[Sequence[int]]:
    """Divide a sequence into at most `count` chunks of about equal length. No chunk is empty."""
    count = min(count, len(positions))
    return [
        positions[chunk * len(positions) // count : (chunk + 1) * len(positions) // count] for chunk in range(count)
    ]


def _thumbnails(candidates: Sequence[tuple[IndexedSamples, int]], count: int, max_edge: int) -> Iterator[Image.Image]:
    """Divide the candidates into `count` chunks, and yield a thumbnail of the first readable image of each chunk."""
    for chunk in _chunks(range(len(candidates)), count):
        for position in chunk:
            samples, index = candidates[position]
            [sample] = samples.subset([index]).iter_shard()
            if isinstance(inspect_image(sample.image), ImageFacts):
                thumbnail = decode_image(sample.image)
                thumbnail.thumbnail((max_edge, max_edge))
                yield thumbnail
                break
