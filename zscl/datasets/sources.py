"""Conversion of image files from any source to a task folder.

An existing task built from the same files is reused. Image files are copied byte by byte.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import torch

from schemas.errors import ErrorCode, InputError, one_line
from zscl.data.task import MANIFEST, read_lines
from zscl.datasets.task_writer import FileList, LabelledImage, write_task

SPLIT_SEED = 42  # seed of the paper's random splits


class SourceFile(NamedTuple):
    """An image of a dataset, read on demand.

    Attributes:
        name: Path relative to the root folder of the dataset, or a unique name if the image is not a file.
        label: The label.
        read: Returns the encoded image.
    """

    name: str
    label: int
    read: Callable[[], bytes]


@dataclass(frozen=True)
class PreparedTask:
    """Summary of a task folder that was just written or already existed.

    Attributes:
        name: The task's name.
        folder: Path of the task folder.
        images: Number of images per split.
        split_family: Name of the split. Results are comparable only if the split families are equal.
        kept: Whether the folder existed before.
        notes: Messages for the user.
    """

    name: str
    folder: str
    images: Mapping[str, int]
    split_family: str
    kept: bool = False
    notes: tuple[str, ...] = ()


def check_name(command: str, name: str, allowed: Sequence[str]) -> str:
    """Check that a name is one of the allowed names.

    Args:
        command: The command that the name was passed to, for the message.
        name: The name.
        allowed: The allowed names.

    Returns:
        The name.

    Raises:
        InputError: The name is not allowed; the message suggests the nearest one.
    """
    if name in allowed:
        return name
    lower = {candidate.lower(): candidate for candidate in allowed}
    nearest = get_close_matches(name.lower(), lower, n=1)
    hint = f"did you mean '{lower[nearest[0]]}'?" if nearest else "expected one of: " + ", ".join(allowed)
    raise InputError(f"{command}: found the unknown name '{name}'; {hint}", code=ErrorCode.UNKNOWN_NAME)


def random_split(total: int, seed: int = SPLIT_SEED) -> dict[str, list[int]]:
    """Split `total` samples at random, 80/20 as in the paper, and return the indices of both splits as drawn."""
    train = int(0.8 * total)
    indices: Any = range(total)
    parts = torch.utils.data.random_split(
        indices, [train, total - train], generator=torch.Generator().manual_seed(seed)
    )
    return {split: list(part.indices) for split, part in zip(("train", "test"), parts, strict=True)}


def find_existing_task(folder: Path, split_family: str) -> PreparedTask | None:
    """Return a summary of the task in a folder, if the folder contains one.

    Args:
        folder: Path of the task folder.
        split_family: The expected name of the split.

    Returns:
        The summary, or `None` if the folder is missing or empty.

    Raises:
        InputError: The folder contains a task with another split, or something that `zscl data` did not write.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        existing_family = manifest["split_family"]
        images = {split: sum(shard["samples"] for shard in shards) for split, shards in manifest["splits"].items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder}: zscl data did not write this folder, expected a new folder, or a task with a {MANIFEST} "
            "that names its split",
            code=ErrorCode.MISMATCH,
        ) from error
    if existing_family != split_family:
        raise InputError(
            f"{folder}: found a task of the split family '{existing_family}', expected '{split_family}' or a new "
            "folder",
            code=ErrorCode.MISMATCH,
        )
    return PreparedTask(folder.name, str(folder), images, split_family, kept=True)


def write_files(
    folder: Path,
    classnames: Sequence[str],
    templates: Sequence[str],
    splits: Mapping[str, Sequence[SourceFile]],
    source: str,
    split_family: str,
) -> PreparedTask:
    """Write a task from image files. An existing task built from the same files is reused.

    Args:
        folder: Path of the task folder.
        classnames: Class names in label order.
        templates: Prompt templates with `{c}`; the first one is used for training.
        splits: Image files per split.
        source: Origin of the images, for the manifest.
        split_family: Name of the split, for the manifest.

    Returns:
        The written or existing task.

    Raises:
        InputError: A file cannot be read, or `folder` exists with other content.
    """
    existing = find_existing_task(folder, split_family)
    if existing is not None:
        _check_same_task(folder, splits, classnames, templates)
        return existing
    images = {split: read_images(folder.name, files, lambda: None) for split, files in splits.items()}
    write_task(folder, classnames, templates, images, source=source, split_family=split_family)
    counts = {split: len(files) for split, files in splits.items()}
    return PreparedTask(folder.name, str(folder), counts, split_family)


def _check_same_task(
    folder: Path, splits: Mapping[str, Sequence[SourceFile]], classnames: Sequence[str], templates: Sequence[str]
) -> None:
    hashes = {}
    for split, files in splits.items():
        file_list = FileList()
        for file in files:
            file_list.add(file.name, file.label)
        hashes[split] = file_list.sha256
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    texts = {"classnames.txt": classnames, "zeroshot_classification_templates.txt": templates}
    has_same_texts = all(
        read_lines(str(folder / file), "lines") == [line.strip() for line in lines] for file, lines in texts.items()
    )
    if manifest.get("file_lists") != hashes or not has_same_texts:
        raise InputError(
            f"{folder}: found a task with other files, classes or templates, expected a new folder",
            code=ErrorCode.MISMATCH,
        )


def read_images(task: str, files: Sequence[SourceFile], on_image: Callable[[], None]) -> Iterator[LabelledImage]:
    """Read a task's images one after another.

    Args:
        task: The task's name, for messages.
        files: The image files.
        on_image: Called after each image.

    Yields:
        The encoded images.

    Raises:
        InputError: A file cannot be read.
    """
    for file in files:
        with convert_errors(f"{task}: cannot read {file.name}"):
            image = file.read()
        yield LabelledImage(image, file.label, file.name)
        on_image()


@contextmanager
def convert_errors(message: str) -> Iterator[None]:
    """Convert every exception raised in the `with` block to an `InputError`.

    torchvision's dataset classes parse files without checks. Any exception from them means that the local copy of the
    dataset is damaged.

    Args:
        message: The beginning of the error message.

    Yields:
        Nothing.

    Raises:
        InputError: The `with` block raised an exception.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"{message} ({one_line(error)}), expected a complete copy of the dataset", code=ErrorCode.UNREADABLE
        ) from error
