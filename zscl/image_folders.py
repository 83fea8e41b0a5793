"""Trees of images, a folder a class → tasks."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from schemas.base import InputError, command
from zscl.looking import has_header
from zscl.members import IMAGE_SUFFIXES
from zscl.sources import SPLIT_SEED, File, Prepared, random_split, write_files
from zscl.writing import image_suffix

DEFAULT_TEMPLATE = "a photo of a {c}."
MOST_NAMED = 8  # classes or files, in a sentence


def prepare_folder(images: Path, folder: Path, templates: Sequence[str], seed: int = SPLIT_SEED) -> Prepared:
    """Convert a tree of images, a folder a class, to a task.

    Args:
        images: holds train/CLASS/* and test/CLASS/*, or CLASS/*, which is then split 80/20.
        folder: where the task will be; one made of the same files is kept.
        templates: prompt templates with `{c}`.
        seed: of the random split.

    Raises:
        InputError: no images, files that are none, classes that differ between the splits, a template without `{c}`,
            or something else at `folder`.
    """
    for template in templates:
        if "{c}" not in template:
            raise InputError(f"--template: found {template!r}, expected a {{c}} for the class name in it")
    family, classes, splits = _folder_splits(images, seed)
    # Line separators too: a class name is a line of classnames.txt.
    classnames = [" ".join(re.sub("[_-]", " ", name).splitlines()).strip() for name in classes]
    for folder_name, name in zip(classes, classnames, strict=True):
        if not name:
            raise InputError(f"{images}: found the folder {folder_name!r}, expected one named after its class")
        if classnames.count(name) > 1:
            raise InputError(f"{images}: found two folders for the class '{name}', expected one folder a class")
    unreadable: list[str] = []
    looked_at = {split: [_looked_at(file, unreadable) for file in files] for split, files in splits.items()}
    prepared = write_files(folder, classnames, templates, looked_at, str(images), family)
    notes = [_names(classnames), *_folders_in_classes(images, splits), *_unreadable(unreadable, folder)]
    return replace(prepared, notes=tuple(notes))


def _looked_at(file: File, unreadable: list[str]) -> File:
    """The file, which joins the unreadable ones when it is read and its header is none that PIL knows."""

    def read() -> bytes:
        content = file.read()
        if not has_header(content):
            unreadable.append(file.name)
        return content

    return file._replace(read=read)


def _names(classnames: Sequence[str]) -> str:
    more = ", …" if len(classnames) > MOST_NAMED else ""
    return f"{len(classnames)} classes, named after their folders: {', '.join(classnames[:MOST_NAMED])}{more}"


def _folders_in_classes(images: Path, splits: Mapping[str, Sequence[File]]) -> list[str]:
    """A warning where a class's folder holds folders: these may be the classes that were meant."""
    depth = 2 if (images / "train").is_dir() and (images / "test").is_dir() else 1
    for files in splits.values():
        for file in files:
            places = PurePosixPath(file.name).parts[depth - 1 : -1]
            if len(places) > 1:
                return [
                    f"warning: found the folder {places[1]} in that of the class {places[0]}, whose images it joined; "
                    "if it is a class, one folder further down is what to give"
                ]
    return []


def _unreadable(names: Sequence[str], folder: Path) -> list[str]:
    if not names:
        return []
    more = ", …" if len(names) > MOST_NAMED else ""
    return [
        f"warning: found {len(names)} files that are no images ({', '.join(names[:MOST_NAMED])}{more}), which training "
        f"will skip; {command('zscl', 'data', 'check', folder)} looks at every sample to its last pixel"
    ]


def _folder_splits(images: Path, seed: int) -> tuple[str, list[str], dict[str, list[File]]]:
    """Family, classes and files of a tree."""
    if not images.is_dir():
        raise InputError(f"{images}: found no such folder, expected images sorted into a folder a class")
    given = [split for split in ("train", "test") if _folders(images / split)]
    if len(given) == 1:
        raise InputError(f"{images}: found {given[0]}/ alone, expected both train/ and test/, or a folder a class")
    if not given:
        classes = _folders(images)
        files = class_files(images, images, classes)
        places = random_split(len(files), seed)
        split_files = {split: [files[index] for index in indices] for split, indices in places.items()}
        return f"folder-seed{seed}", classes, split_files
    classes, tested = _folders(images / "train"), _folders(images / "test")
    if classes != tested:
        [odd, *_] = sorted(set(classes) ^ set(tested))
        here, there = ("train", "test") if odd in classes else ("test", "train")
        raise InputError(f"{images}: found the class '{odd}' in {here}/ and not in {there}/, expected it in both")
    return "folder", classes, {split: class_files(images, images / split, classes) for split in given}


def _folders(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return sorted(place.name for place in folder.iterdir() if place.is_dir() and not place.name.startswith("."))


def class_files(images: Path, folder: Path, classes: Sequence[str], within: str = "") -> list[File]:
    """The image files of a tree with a folder a class, named from `images` on.

    Args:
        images: the source's root.
        folder: that holds the classes.
        classes: names of their folders, in label order.
        within: where in a class's folder its images are.

    Raises:
        InputError: a class has no image, or a file is none that shards hold.
    """
    files = []
    for label, name in enumerate(classes):
        found = sorted(file for file in (folder / name / within).rglob("[!.]*") if file.is_file())
        if not found:
            raise InputError(f"{folder / name}: found no image, expected at least one a class")
        for file in found:
            image_suffix(str(file))
            files.append(File(file.relative_to(images).as_posix(), label, file.read_bytes))
    if not files:
        raise InputError(
            f"{folder}: found no folder with images, expected one a class ({', '.join(IMAGE_SUFFIXES)} files)"
        )
    return files
