"""Task folders and shards, written: the same samples give the same bytes."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from schemas.errors import InputError
from zscl.data.tar import IMAGE_SUFFIXES, write_shards
from zscl.data.task import MANIFEST
from zscl.runtime.atomic_io import atomic_folder, write_text

FILE_NAMES = "files.txt"  # of a split: what each sample was called at its source


class LabelledImage(NamedTuple):
    """An encoded image of a task to write."""

    image: bytes
    label: int
    name: str  # of its file at the source: the suffix is kept, and the split's hash is over these names


class FileList:
    """SHA-256 over a split's file names and labels, in order: who has the same hash has the same split.

    names: those of files at the source; the line number, from 0, is the sample's key.
    """

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self.names: list[str] = []

    def add(self, name: str, label: int) -> None:
        """Append a file."""
        self._hash.update(f"{name}\t{label}\n".encode())

    @property
    def sha256(self) -> str:
        """The hash of the files so far, in hexadecimal digits."""
        return self._hash.hexdigest()


def write_task(
    folder: Path,
    classnames: Sequence[str],
    templates: Sequence[str],
    splits: Mapping[str, Iterable[LabelledImage | tuple[bytes, int]]],
    *,
    source: str,
    suffix: str = "",
    split_family: str = "own",
    shard_images: int = 1_000,
) -> None:
    """Write a task folder, whole or not at all.

    Args:
        folder: where the task will be.
        classnames: label order.
        templates: with `{c}`; the first one trains.
        splits: for `train` and `test`, encoded images and labels, with their file names where they have any.
        source: where the images come from, for the manifest.
        suffix: the file suffix of images without a name, without the dot.
        split_family: how the images were split, for the manifest: rows are comparable only within a family.
        shard_images: images a shard.

    Raises:
        InputError: a split has no image, an image's file is none that a shard may hold, or a class name or template
            does not fit on a line.
    """
    _refuse_several_lines(folder, "class name", classnames)
    _refuse_several_lines(folder, "template", templates)
    with atomic_folder(folder) as temporary:
        write_text(temporary / "classnames.txt", "\n".join(classnames) + "\n")
        write_text(temporary / "zeroshot_classification_templates.txt", "\n".join(templates) + "\n")
        shards, file_lists = {}, {}
        for split, samples in splits.items():
            files = FileList()
            shards[split] = write_shards(temporary / split, _labelled(samples, suffix, files), shard_images)
            if not shards[split]:
                raise InputError(f"{folder}: found no image for its {split} split in {source}, expected at least one")
            write_text(temporary / split / "nshards.txt", f"{len(shards[split])}\n")
            file_lists[split] = files.sha256
            if files.names:
                # A name may hold line separators; the number of a line is a sample's key.
                lines = (name if name.splitlines() == [name] else ascii(name) for name in files.names)
                write_text(temporary / split / FILE_NAMES, "\n".join(lines) + "\n")
        manifest = {"source": source, "split_family": split_family, "file_lists": file_lists, "splits": shards}
        write_text(temporary / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def _refuse_several_lines(folder: Path, what: str, lines: Sequence[str]) -> None:
    """A class name's line number is its label, so that a name is one line, and not an empty one."""
    for number, line in enumerate(lines):
        if line.splitlines() != [line] or not line.strip() or "\0" in line:
            raise InputError(f"{folder}: found {line!r} as {what} {number}, expected text on a single line")


def _labelled(
    samples: Iterable[LabelledImage | tuple[bytes, int]], suffix: str, files: FileList
) -> Iterator[Mapping[str, bytes]]:
    for number, sample in enumerate(samples):
        image, label = sample[:2]
        name = sample.name if isinstance(sample, LabelledImage) else f"{number:07d}.{suffix}"
        files.add(name, label)
        if isinstance(sample, LabelledImage):
            files.names.append(name)
        yield {image_suffix(name): image, "cls": str(label).encode()}


def image_suffix(name: str) -> str:
    """Suffix of an image file, lower case and without the dot.

    Raises:
        InputError: shards may not hold such files; nothing is encoded anew behind the user's back.
    """
    suffix = Path(name).suffix.lower().removeprefix(".")
    if suffix not in IMAGE_SUFFIXES:
        raise InputError(f"{name}: found no image file that shards hold, expected one of {', '.join(IMAGE_SUFFIXES)}")
    return suffix
