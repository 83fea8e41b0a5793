"""Conversion of image folders, with one subfolder per class, to tasks."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from schemas.errors import ErrorCode, InputError, format_count
from zscl.checks.image import has_image_header
from zscl.data.sample import printable_name
from zscl.data.tar import IMAGE_SUFFIXES, is_image_name
from zscl.datasets.sources import SPLIT_SEED, PreparedTask, SourceFile, convert_errors, random_split, write_files
from zscl.datasets.task_writer import image_suffix
from zscl.runtime.paths import is_hidden, list_files

DEFAULT_TEMPLATE = "a photo of a {c}."
MAX_NAMES = 8  # classes or files in a message


def prepare_folder(images: Path, folder: Path, templates: Sequence[str], seed: int = SPLIT_SEED) -> PreparedTask:
    """Convert an image folder with one subfolder per class to a task.

    Args:
        images: Folder that contains train/CLASS/* and test/CLASS/*, or only CLASS/*. In the second case, the images are
            split 80/20 at random.
        folder: Path of the task folder. An existing task built from the same files is reused.
        templates: Prompt templates with `{c}`.
        seed: Seed of the random split.

    Returns:
        The task, with notes about class names, skipped files and unexpected folders.

    Raises:
        InputError: A class has no images, the splits have different classes, a template has no `{c}`, or `folder`
            contains something else.
    """
    for template in templates:
        if "{c}" not in template or len(template.splitlines()) > 1:
            expected = "one line" if "{c}" in template else "{c} in place of the class name"
            raise InputError(
                f"--template: found {template!r}, expected {expected}",
                code=ErrorCode.INVALID_VALUE,
                field="--template",
            )
    skipped: list[str] = []
    family, classes, splits = _read_splits(images, seed, skipped)
    classnames = [_class_name(images, name) for name in classes]
    for name in classnames:
        if classnames.count(name) > 1:
            raise InputError(
                f"{images}: found two folders for the class '{name}', expected one folder per class",
                code=ErrorCode.DUPLICATE,
            )
    prepared = write_files(folder, classnames, templates, splits, printable_name(str(images)), family)
    notes = [
        _class_names_note(classnames),
        *_nested_folder_notes(images, splits),
        *_skipped_files_notes(skipped, "without image content"),
        *_skipped_files_notes(_find_stray_images(images, classes), "outside the class folders"),
    ]
    return replace(prepared, notes=tuple(notes))


def _class_name(images: Path, folder: str) -> str:
    """Convert the name of a class's folder to a class name. Refuse a name without printable text."""
    name = " ".join(folder.replace("_", " ").replace("-", " ").splitlines()).strip()
    if not name or not name.replace("\xa0", " ").isprintable():
        raise InputError(
            f"{images}: found the folder '{printable_name(folder)}', expected the name of a class; rename the folder",
            code=ErrorCode.INVALID_VALUE,
        )
    return name


def _class_names_note(classnames: Sequence[str]) -> str:
    more = ", …" if len(classnames) > MAX_NAMES else ""
    return f"{len(classnames)} classes, named after their folders: {', '.join(classnames[:MAX_NAMES])}{more}"


def _nested_folder_notes(images: Path, splits: Mapping[str, Sequence[SourceFile]]) -> list[str]:
    """Return a warning if a class's folder has subfolders, because these may be the intended classes."""
    depth = 2 if (images / "train").is_dir() and (images / "test").is_dir() else 1
    for files in splits.values():
        for file in files:
            folders = PurePosixPath(file.name).parts[depth - 1 : -1]
            if len(folders) > 1:
                return [
                    f"warning: the images in the folder {folders[1]} were added to the class {folders[0]}, "
                    f"whose folder contains it; if {folders[1]} is a class, pass the folder that contains it"
                ]
    return []


def _skipped_files_notes(names: Sequence[str], reason: str) -> list[str]:
    if not names:
        return []
    more = ", …" if len(names) > MAX_NAMES else ""
    return [f"warning: skipped {format_count(len(names), 'file')} {reason} ({', '.join(names[:MAX_NAMES])}{more})"]


def _find_stray_images(images: Path, classes: Sequence[str]) -> list[str]:
    """Return the names of images that are not in the folder of a class."""
    splits = ("train", "test") if _list_folders(images / "train") else ()
    stray = [path for path in images.iterdir() if path.name not in (splits or classes)]
    stray += [path for split in splits for path in (images / split).iterdir() if path.name not in classes]
    files = [
        file
        for path in sorted(stray)
        if not is_hidden(path.name)
        for file in (list_files(path) if path.is_dir() else [path])
    ]
    return [printable_name(file.relative_to(images).as_posix()) for file in files if is_image_name(file.name)]


def _read_splits(images: Path, seed: int, skipped: list[str]) -> tuple[str, list[str], dict[str, list[SourceFile]]]:
    """Return the split family, class folders and image files. Append the names of non-image files to `skipped`."""
    if not images.is_dir():
        raise InputError(
            f"{images}: found no such folder, expected a folder with one subfolder per class", code=ErrorCode.NOT_FOUND
        )
    splits = [split for split in ("train", "test") if _list_folders(images / split)]
    if len(splits) == 1:
        raise InputError(
            f"{images}: found only {splits[0]}/, expected both train/ and test/, or one folder per class",
            code=ErrorCode.NOT_FOUND,
        )
    if not splits:
        classes = _list_folders(images)
        files = _filter_images(list_class_files(images, images, classes), classes, skipped)
        indices = random_split(len(files), seed)
        return f"folder-seed{seed}", classes, {split: [files[index] for index in indices[split]] for split in indices}
    classes, test_classes = _list_folders(images / "train"), _list_folders(images / "test")
    if classes != test_classes:
        [odd, *_] = sorted(set(classes) ^ set(test_classes))
        present, absent = ("train", "test") if odd in classes else ("test", "train")
        raise InputError(
            f"{images}: found the class '{odd}' in {present}/, but not in {absent}/, expected it in both",
            code=ErrorCode.MISMATCH,
        )
    split_files = {
        split: _filter_images(list_class_files(images, images / split, classes), classes, skipped) for split in splits
    }
    return "folder", classes, split_files


def _filter_images(files: Sequence[SourceFile], classes: Sequence[str], skipped: list[str]) -> list[SourceFile]:
    """Return the files with an image header. Append the names of the remaining files to `skipped`."""
    images = []
    for file in files:
        with convert_errors(f"{file.name}: cannot be read"):
            is_image = has_image_header(file.read())
        if is_image:
            images.append(file)
        else:
            skipped.append(file.name)
    labels = {file.label for file in images}
    for label, name in enumerate(classes):
        if label not in labels:
            raise InputError(f"{name}: found no image, expected at least one per class", code=ErrorCode.EMPTY)
    return images


def _list_folders(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not is_hidden(path.name))


def list_class_files(images: Path, folder: Path, classes: Sequence[str], subfolder: str = "") -> list[SourceFile]:
    """List the image files of a folder with one subfolder per class.

    Args:
        images: Root folder of the dataset. The names in the result are relative to this folder.
        folder: Folder that contains the class folders.
        classes: Names of the class folders, in label order.
        subfolder: Subfolder of each class folder that contains the images; empty if the class folder contains them.

    Returns:
        The files, ordered by class and path.

    Raises:
        InputError: A class has no image, or the file format of an image is not supported in shards.
    """
    files = []
    for label, name in enumerate(classes):
        class_folder = folder / name / subfolder
        with convert_errors(f"{class_folder}: cannot be read"):
            paths = list_files(class_folder) if class_folder.is_dir() else []
        if not paths:
            raise InputError(f"{folder / name}: found no image, expected at least one per class", code=ErrorCode.EMPTY)
        for path in paths:
            image_suffix(str(path))
            files.append(SourceFile(printable_name(path.relative_to(images).as_posix()), label, path.read_bytes))
    if not files:
        raise InputError(
            f"{folder}: found no folder with images, expected one per class ({', '.join(IMAGE_SUFFIXES)} files)",
            code=ErrorCode.EMPTY,
        )
    return files
