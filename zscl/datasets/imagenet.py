"""TinyImageNet and ImageNet, or a part of its classes, as tasks: the datasets of class-incremental learning.

Both come as trees of image files, a folder a WordNet id (`n01440764`); their names for people lie elsewhere.
"""

from collections.abc import Mapping
from pathlib import Path

from schemas.errors import InputError
from zscl.data.task import read_lines
from zscl.datasets.image_folder import list_class_files
from zscl.datasets.sources import SourceFile, PreparedTask, write_files

TINY_TEMPLATE = "a bad photo of a {c}."  # of the published results
TEMPLATE = "a good photo of a {c}."


def prepare_tinyimagenet(root: Path, folder: Path) -> PreparedTask:
    """Convert `tiny-imagenet-200` as it unpacks; its validation images are the test split.

    Args:
        root: holds wnids.txt, words.txt, train/WNID/images/* and val/images/* with val/val_annotations.txt.
        folder: where the task will be; one made of the same files is kept.

    Raises:
        InputError: something of it is missing or does not fit together, or something else lies at `folder`.
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
                "wnids.txt"
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
    """Convert ImageNet-1k, or some of its classes, from the layout of torchvision's ImageNet; val is the test split.

    Args:
        root: holds train/WNID/* and val/WNID/*.
        folder: where the task will be; one made of the same files is kept.
        classes: file of WordNet ids in label order, one a line, each with a name behind it if wanted; default: all.

    Raises:
        InputError: a folder of a class is missing, a class has no name, or something else lies at `folder`.
    """
    known = _names_of_all(root)
    lines = read_lines(str(classes), "WordNet ids") if classes else sorted(known)
    if not lines:
        raise InputError(f"{root}/train: found no thousand folders, expected ImageNet's, or --classes FILE")
    given = dict(line.partition(" ")[::2] for line in lines)
    if len(given) < len(lines):
        raise InputError(f"{classes}: found a WordNet id twice, expected each class once")
    for wnid, name in given.items():
        if not name and wnid not in known:
            raise InputError(
                f"{classes}: found {wnid!r} without a name, expected one behind it, as {root}/train has not all of "
                "ImageNet's thousand classes to tell it by"
            )
    return write_files(
        folder,
        [name.strip() or known[wnid] for wnid, name in given.items()],
        [TEMPLATE],
        {
            split: list_class_files(root, root / place, list(given))
            for split, place in {"train": "train", "test": "val"}.items()
        },
        source=f"ImageNet-1k, {len(given)} classes",
        split_family="official-val",
    )


def _names_of_all(root: Path) -> Mapping[str, str]:
    """CLIP's names by WordNet id, where all thousand are there to count: labels are their alphabetical order."""
    from open_clip import IMAGENET_CLASSNAMES

    folders = sorted(place.name for place in (root / "train").glob("n*") if place.is_dir())
    return dict(zip(folders, IMAGENET_CLASSNAMES, strict=True)) if len(folders) == len(IMAGENET_CLASSNAMES) else {}


def _first_name(names: str, wnid: str) -> str:
    first = names.partition(",")[0].strip()
    if not first:
        raise InputError(f"words.txt: found no name for {wnid}, expected one")
    return first
