"""Trees of images, a folder a class → tasks."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from schemas.errors import InputError, counted
from zscl.checks.image import has_image_header
from zscl.data.sample import printable_name
from zscl.data.tar import IMAGE_SUFFIXES, is_image_name
from zscl.datasets.sources import SPLIT_SEED, SourceFile, PreparedTask, random_split, convert_errors, write_files
from zscl.datasets.task_writer import image_suffix
from zscl.runtime.paths import files_within, is_hidden

DEFAULT_TEMPLATE = "a photo of a {c}."
MOST_NAMED = 8  # classes or files, in a sentence


def prepare_folder(images: Path, folder: Path, templates: Sequence[str], seed: int = SPLIT_SEED) -> PreparedTask:
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
        if len(template.splitlines()) > 1:
            raise InputError(f"--template: found {template!r}, expected one line")
    left_out: list[str] = []
    family, classes, splits = _folder_splits(images, seed, left_out)
    classnames = [_class_name(images, name) for name in classes]
    for name in classnames:
        if classnames.count(name) > 1:
            raise InputError(f"{images}: found two folders for the class '{name}', expected one folder a class")
    prepared = write_files(folder, classnames, templates, splits, printable_name(str(images)), family)
    notes = [
        _names(classnames),
        *_folders_in_classes(images, splits),
        *_left_out(left_out, "without an image in it"),
        *_left_out(_beside_classes(images, classes), "beside the classes' folders"),
    ]
    return replace(prepared, notes=tuple(notes))


def _class_name(images: Path, folder: str) -> str:
    """The class that a folder is named after.

    Raises:
        InputError: there is no name in it, or it is no text.
    """
    name = " ".join(folder.replace("_", " ").replace("-", " ").splitlines()).strip()
    if not name or not name.replace("\xa0", " ").isprintable():
        raise InputError(
            f"{images}: found the folder '{printable_name(folder)}', expected one named after its class; rename it"
        )
    return name


def _names(classnames: Sequence[str]) -> str:
    more = ", …" if len(classnames) > MOST_NAMED else ""
    return f"{len(classnames)} classes, named after their folders: {', '.join(classnames[:MOST_NAMED])}{more}"


def _folders_in_classes(images: Path, splits: Mapping[str, Sequence[SourceFile]]) -> list[str]:
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


def _left_out(names: Sequence[str], what: str) -> list[str]:
    if not names:
        return []
    more = ", …" if len(names) > MOST_NAMED else ""
    return [f"warning: left out {counted(len(names), 'file')} {what} ({', '.join(names[:MOST_NAMED])}{more})"]


def _beside_classes(images: Path, classes: Sequence[str]) -> list[str]:
    """The images of a tree that lie in no class's folder."""
    splits = ("train", "test") if _folders(images / "train") else ()
    others = [place for place in images.iterdir() if place.name not in (splits or classes)]
    others += [place for split in splits for place in (images / split).iterdir() if place.name not in classes]
    files = [
        file
        for place in sorted(others)
        if not is_hidden(place.name)
        for file in (files_within(place) if place.is_dir() else [place])
    ]
    return [printable_name(file.relative_to(images).as_posix()) for file in files if is_image_name(file.name)]


def _folder_splits(images: Path, seed: int, left_out: list[str]) -> tuple[str, list[str], dict[str, list[SourceFile]]]:
    """Family, classes and files of a tree; files that are no images are left out, and their names are kept."""
    if not images.is_dir():
        raise InputError(f"{images}: found no such folder, expected images sorted into a folder a class")
    given = [split for split in ("train", "test") if _folders(images / split)]
    if len(given) == 1:
        raise InputError(f"{images}: found {given[0]}/ alone, expected both train/ and test/, or a folder a class")
    if not given:
        classes = _folders(images)
        files = _images(list_class_files(images, images, classes), classes, left_out)
        places = random_split(len(files), seed)
        split_files = {split: [files[index] for index in indices] for split, indices in places.items()}
        return f"folder-seed{seed}", classes, split_files
    classes, tested = _folders(images / "train"), _folders(images / "test")
    if classes != tested:
        [odd, *_] = sorted(set(classes) ^ set(tested))
        here, there = ("train", "test") if odd in classes else ("test", "train")
        raise InputError(f"{images}: found the class '{odd}' in {here}/ and not in {there}/, expected it in both")
    found = {split: _images(list_class_files(images, images / split, classes), classes, left_out) for split in given}
    return "folder", classes, found


def _images(files: Sequence[SourceFile], classes: Sequence[str], left_out: list[str]) -> list[SourceFile]:
    """The files that begin like an image; the names of the others join those that are left out."""
    images = []
    for file in files:
        with convert_errors(f"{file.name}: cannot be read"):
            is_image = has_image_header(file.read())
        if is_image:
            images.append(file)
        else:
            left_out.append(file.name)
    labels = {file.label for file in images}
    for label, name in enumerate(classes):
        if label not in labels:
            raise InputError(f"{name}: found no file with an image in it, expected at least one a class")
    return images


def _folders(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return sorted(place.name for place in folder.iterdir() if place.is_dir() and not is_hidden(place.name))


def list_class_files(images: Path, folder: Path, classes: Sequence[str], subfolder: str = "") -> list[SourceFile]:
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
        place = folder / name / subfolder
        with convert_errors(f"{place}: cannot be read"):
            found = files_within(place) if place.is_dir() else []
        if not found:
            raise InputError(f"{folder / name}: found no image, expected at least one a class")
        for file in found:
            image_suffix(str(file))
            files.append(SourceFile(printable_name(file.relative_to(images).as_posix()), label, file.read_bytes))
    if not files:
        raise InputError(
            f"{folder}: found no folder with images, expected one a class ({', '.join(IMAGE_SUFFIXES)} files)"
        )
    return files
