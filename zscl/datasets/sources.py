"""From the files of any source to a task folder; one that is there already is kept.

Images that are files at their source keep their bytes.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import torch

from schemas.errors import InputError
from zscl.data.task import MANIFEST, read_lines
from zscl.datasets.task_writer import FileList, LabelledImage, write_task

SPLIT_SEED = 42  # of the authors' random splits


class SourceFile(NamedTuple):
    """An image of a source that has not been read yet."""

    name: str
    label: int
    read: Callable[[], bytes]


@dataclass(frozen=True)
class PreparedTask:
    """A task folder that is there now."""

    name: str
    folder: str
    images: Mapping[str, int]  # split -> how many
    split_family: str
    kept: bool = False  # it was there before
    notes: tuple[str, ...] = ()


def check_name(command: str, name: str, allowed: Sequence[str]) -> str:
    """Give the name back.

    Raises:
        InputError: it is not among those allowed; the sentence says which is nearest.
    """
    if name in allowed:
        return name
    lower = {candidate.lower(): candidate for candidate in allowed}
    nearest = get_close_matches(name.lower(), lower, n=1)
    hint = f"did you mean '{lower[nearest[0]]}'?" if nearest else "expected one of: " + ", ".join(allowed)
    raise InputError(f"{command}: found the unknown name '{name}'; {hint}")


def random_split(total: int, seed: int = SPLIT_SEED) -> dict[str, list[int]]:
    """The authors' 80/20 split: which of `total` samples train and which test, in their order."""
    train = int(0.8 * total)
    places: Any = range(total)
    parts = torch.utils.data.random_split(places, [train, total - train], generator=torch.Generator().manual_seed(seed))
    return {split: list(part.indices) for split, part in zip(("train", "test"), parts, strict=True)}


def find_existing_task(folder: Path, split_family: str) -> PreparedTask | None:
    """The task that is there already, if there is one.

    Raises:
        InputError: another split's task lies there, or something that is no task of ours.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        found = manifest["split_family"]
        images = {split: sum(shard["samples"] for shard in shards) for split, shards in manifest["splits"].items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder}: found something that is no task made by zscl data, expected a new folder or one with a "
            f"{MANIFEST} that names its split"
        ) from error
    if found != split_family:
        raise InputError(
            f"{folder}: found a task of the split family '{found}', expected '{split_family}' or a new folder"
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
    """Write a task of image files, whose bytes it keeps; one made of the same files is kept as it is.

    Arguments as of `zscl.datasets.task_writer.write_task`.

    Raises:
        InputError: a file cannot be read, or something else lies at `folder`.
    """
    kept = find_existing_task(folder, split_family)
    if kept is not None:
        _check_same(folder, splits, classnames, templates)
        return kept
    read = {split: read_images(folder.name, files, lambda: None) for split, files in splits.items()}
    write_task(folder, classnames, templates, read, source=source, split_family=split_family)
    return PreparedTask(folder.name, str(folder), {split: len(files) for split, files in splits.items()}, split_family)


def _check_same(
    folder: Path, splits: Mapping[str, Sequence[SourceFile]], classnames: Sequence[str], templates: Sequence[str]
) -> None:
    lists = {}
    for split, files in splits.items():
        listed = FileList()
        for file in files:
            listed.add(file.name, file.label)
        lists[split] = listed.sha256
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    words = {"classnames.txt": classnames, "zeroshot_classification_templates.txt": templates}
    same_words = all(
        read_lines(str(folder / file), "lines") == [line.strip() for line in lines] for file, lines in words.items()
    )
    if manifest.get("file_lists") != lists or not same_words:
        raise InputError(f"{folder}: found a task of other files, classes or templates, expected a new folder")


def read_images(task: str, files: Sequence[SourceFile], on_image: Callable[[], None]) -> Iterator[LabelledImage]:
    """Read a task's images one after another; `done` is called behind each.

    Raises:
        InputError: a file cannot be read.
    """
    for file in files:
        with convert_errors(f"{task}: cannot read {file.name}"):
            image = file.read()
        yield LabelledImage(image, file.label, file.name)
        on_image()


@contextmanager
def convert_errors(what: str) -> Iterator[None]:
    """Turn whatever is raised within into an `InputError` that begins with `what`."""
    # torchvision's classes parse what they find: whatever that raises says that the copy is not what it should be.
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{what} ({reason}), expected a whole copy of the dataset") from error
