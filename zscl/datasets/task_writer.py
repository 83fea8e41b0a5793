"""Writer of task folders: class names, templates, tar shards and manifest.

Files written from the same samples are always byte-identical.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from schemas.errors import ErrorCode, InputError
from zscl.data.tar import IMAGE_SUFFIXES, write_shards
from zscl.data.task import MANIFEST
from zscl.runtime.atomic_io import atomic_folder, write_text

FILE_NAMES = "files.txt"  # in the folder of a split: the original file name of each sample


class LabelledImage(NamedTuple):
    """An encoded image to write to a task.

    Attributes:
        image: The encoded image.
        label: The label.
        name: The original file name. Its suffix is also the suffix of the image in the shard, and the hash of the split
            includes the name.
    """

    image: bytes
    label: int
    name: str


class FileList:
    """The file names of a split, and a SHA-256 hash of its file names and labels. Equal hashes mean equal splits.

    Attributes:
        names: Original file names, which are written to `files.txt`, one per line. The line number, counted from 0, is
            the key of the sample in the shards.
    """

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self.names: list[str] = []

    def add(self, name: str, label: int) -> None:
        """Add a file to the hash."""
        self._hash.update(f"{name}\t{label}\n".encode())

    @property
    def sha256(self) -> str:
        """The hash of all files added so far, in hexadecimal digits."""
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
    """Write a task folder atomically.

    Args:
        folder: Path of the task folder.
        classnames: Class names in label order.
        templates: Prompt templates with `{c}`; the first one is used for training.
        splits: Encoded images of `train` and `test` with their labels, and with their file names if they have any.
        source: Origin of the images, for the manifest.
        suffix: File suffix, without the dot, of images that have no file name.
        split_family: Name of the split, for the manifest. Results are comparable only if the split families are equal.
        shard_images: Images per shard.

    Raises:
        InputError: A split has no image, the file format of an image is not supported in shards, or a class name or
            template is not a single line.
    """
    _check_single_lines(folder, "class name", classnames)
    _check_single_lines(folder, "template", templates)
    with atomic_folder(folder) as temporary:
        write_text(temporary / "classnames.txt", "\n".join(classnames) + "\n")
        write_text(temporary / "zeroshot_classification_templates.txt", "\n".join(templates) + "\n")
        shards, file_lists = {}, {}
        for split, samples in splits.items():
            files = FileList()
            shards[split] = write_shards(temporary / split, _shard_samples(samples, suffix, files), shard_images)
            if not shards[split]:
                raise InputError(
                    f"{folder}: {source} has no image for the {split} split, expected at least one",
                    code=ErrorCode.EMPTY,
                )
            write_text(temporary / split / "nshards.txt", f"{len(shards[split])}\n")
            file_lists[split] = files.sha256
            if files.names:
                # The line number is the sample's key, so line separators within a name are escaped.
                lines = (name if name.splitlines() == [name] else ascii(name) for name in files.names)
                write_text(temporary / split / FILE_NAMES, "\n".join(lines) + "\n")
        manifest = {"source": source, "split_family": split_family, "file_lists": file_lists, "splits": shards}
        write_text(temporary / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def _check_single_lines(folder: Path, kind: str, texts: Sequence[str]) -> None:
    """Refuse texts that are empty or have several lines, because the task's text files hold one text per line."""
    for number, text in enumerate(texts):
        if text.splitlines() != [text] or not text.strip() or "\0" in text:
            raise InputError(
                f"{folder}: {kind} {number} is {text!r}, expected text on a single line",
                code=ErrorCode.INVALID_VALUE,
            )


def _shard_samples(
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
    """Return the suffix of an image file.

    Args:
        name: The file name.

    Returns:
        The suffix in lower case, without the dot.

    Raises:
        InputError: The file format is not supported in shards. Images are never converted to another format.
    """
    suffix = Path(name).suffix.lower().removeprefix(".")
    if suffix not in IMAGE_SUFFIXES:
        raise InputError(
            f"{name}: found a file format that shards cannot hold, expected one of {', '.join(IMAGE_SUFFIXES)}",
            code=ErrorCode.UNSUPPORTED,
        )
    return suffix
