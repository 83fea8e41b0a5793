"""A few images of each class of a task, made small, to look at oneself."""

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
    """A class and a few of its training images, made small."""

    prompt: str
    images: tuple[Image.Image, ...]


def contact_rows(scanned: ScannedTask, per_class: int, classes: int, max_edge: int) -> list[ContactRow]:
    """Choose classes and training images of each, evenly; an image is made to fit into a square of `edge` pixels."""
    task = scanned.task
    labels = [spread[0] for spread in _parts(range(len(task.classnames)), classes)]
    places: dict[int, list[tuple[IndexedSamples, int]]] = {label: [] for label in labels}
    for shard in scanned.shards:
        if shard.split == "train" and shard.samples:
            for index, sample in enumerate(shard.samples.labels()):
                number = parse_count(decode_label(sample.label))
                if number in places:
                    places[number].append((shard.samples, index))
    template = task.templates[0] if task.templates else "{c}"
    with suppress_decoder_warnings():
        return [
            ContactRow(template.replace("{c}", task.classnames[label]), tuple(_thumbnails(found, per_class, max_edge)))
            for label, found in places.items()
        ]


def _parts(things: Sequence[int], count: int) -> list[Sequence[int]]:
    """Cut into at most `count` parts of about the same length, none of them empty."""
    count = min(count, len(things))
    return [things[part * len(things) // count : (part + 1) * len(things) // count] for part in range(count)]


def _thumbnails(places: Sequence[tuple[IndexedSamples, int]], count: int, edge: int) -> Iterator[Image.Image]:
    """From each of as many parts as images are wanted, the first that can be read."""
    for part in _parts(range(len(places)), count):
        for number in part:
            samples, index = places[number]
            [sample] = samples.subset([index]).iter_shard()
            if isinstance(inspect_image(sample.image), ImageFacts):
                small = decode_image(sample.image)
                small.thumbnail((edge, edge))
                yield small
                break
