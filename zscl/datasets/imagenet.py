"""Conversion of TinyImageNet and ImageNet, or some of its classes, to tasks for class-incremental learning.

Both datasets are folders of image files with one subfolder per WordNet id (`n01440764`). The class names come from
`words.txt` or from open_clip.
"""

from collections.abc import Mapping
from pathlib import Path

from schemas.errors import ErrorCode, InputError
from zscl.data.task import read_lines
from zscl.datasets.image_folder import list_class_files
from zscl.datasets.sources import PreparedTask, SourceFile, write_files

TINY_TEMPLATE = "a bad photo of a {c}."  # template of the published results
TEMPLATE = "a good photo of a {c}."


def prepare_tinyimagenet(root: Path, folder: Path) -> PreparedTask:
    """Convert the unpacked `tiny-imagenet-200` to a task. The validation images become the test split.

    Args:
        root: Folder that contains wnids.txt, words.txt, train/WNID/images/* and val/images/* with
            val/val_annotations.txt.
        folder: Path of the task folder. An existing task built from the same files is reused.

    Returns:
        The written or existing task.

    Raises:
        InputError: A file is missing, the files contradict each other, or `folder` exists with other content.
    """
    wnids = sorted(read_lines(f"{root}/wnids.txt", "WordNet ids"))
    words = dict(line.partition("\t")[::2] for line in read_lines(f"{root}/words.txt", "WordNet ids and their names"))
    labels = {wnid: label for label, wnid in enumerate(wnids)}
    test = []
    for line in read_lines(f"{root}/val/val_annotations.txt", "validation images and their WordNet ids"):
        name, wnid, *_ = [*line.split("\t"), ""]
        image = root / "val/images" / name
        if wnid not in labels or not image.is_file():
            raise InputError(
                f"{root}/val/val_annotations.txt: found {line!r}, expected an image of val/images and an id of "
                "wnids.txt",
                code=ErrorCode.MISMATCH,
            )
        test.append(SourceFile(f"val/images/{name}", labels[wnid], image.read_bytes))
    return write_files(
        folder,
        [_first_name(words.get(wnid, ""), wnid) for wnid in wnids],
        [TINY_TEMPLATE],
        {"train": list_class_files(root, root / "train", wnids, "images"), "test": test},
        source="tiny-imagenet-200",
        split_family="official-val",
    )


def prepare_imagenet(root: Path, folder: Path, classes: Path | None) -> PreparedTask:
    """Convert ImageNet-1k, or some of its classes, to a task. The validation images become the test split.

    Args:
        root: Folder in the layout of torchvision's `ImageNet`: train/WNID/* and val/WNID/*.
        folder: Path of the task folder. An existing task built from the same files is reused.
        classes: File with one WordNet id per line in label order, optionally followed by a class name; all classes
            by default.

    Returns:
        The written or existing task.

    Raises:
        InputError: A class has no folder or no name, or `folder` exists with other content.
    """
    clip_names = _clip_names(root)
    lines = read_lines(str(classes), "WordNet ids") if classes else sorted(clip_names)
    if not lines:
        raise InputError(
            f"{root}/train: found other folders than the 1000 classes of ImageNet, expected these, or --classes FILE",
            code=ErrorCode.NOT_FOUND,
        )
    names = dict(line.partition(" ")[::2] for line in lines)
    if len(names) < len(lines):
        raise InputError(
            f"{classes}: found a WordNet id twice, expected each class once",
            code=ErrorCode.DUPLICATE,
            field="--classes",
        )
    for wnid, name in names.items():
        if not name and wnid not in clip_names:
            raise InputError(
                f"{classes}: {wnid!r} has no class name, expected the name after the id. It cannot be looked up, "
                f"because {root}/train lacks some of the 1000 classes",
                code=ErrorCode.MISSING_VALUE,
                field="--classes",
            )
    return write_files(
        folder,
        [name.strip() or clip_names[wnid] for wnid, name in names.items()],
        [TEMPLATE],
        {
            split: list_class_files(root, root / source_split, list(names))
            for split, source_split in {"train": "train", "test": "val"}.items()
        },
        source=f"ImageNet-1k, {len(names)} classes",
        split_family="official-val",
    )


def _clip_names(root: Path) -> Mapping[str, str]:
    """Return a mapping from WordNet ids to CLIP's class names.

    The ids are the names of the class folders. CLIP's class names follow the alphabetical order of all 1000 ids, so the
    mapping is empty if a class folder is missing.
    """
    from open_clip import IMAGENET_CLASSNAMES

    wnids = sorted(path.name for path in (root / "train").glob("n*") if path.is_dir())
    return dict(zip(wnids, IMAGENET_CLASSNAMES, strict=True)) if len(wnids) == len(IMAGENET_CLASSNAMES) else {}


def _first_name(names: str, wnid: str) -> str:
    name = names.partition(",")[0].strip()
    if not name:
        raise InputError(
            f"words.txt: found no name for {wnid}, expected one after the id", code=ErrorCode.MISSING_VALUE
        )
    return name
