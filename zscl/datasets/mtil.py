"""The eleven tasks of the published results, from torchvision's own dataset classes.

Splits, class names and templates are those of the published results (`prompts.json`: CLIP's, by torchvision's class
names). torchvision is imported where it is needed.
"""

import io
import itertools
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from schemas.errors import InputError, command
from zscl.data.task import MANIFEST
from zscl.datasets.sources import (
    SPLIT_SEED,
    File,
    Prepared,
    kept_task,
    random_split,
    read_images,
    said_in_one_sentence,
)
from zscl.datasets.task_writer import write_task
from zscl.runtime.atomic_io import atomic_folder

REPORT_EVERY = 200  # images

Report = Callable[[str, int, int], None]  # task, images written, images in all


@cache
def _prompts() -> Any:
    return json.loads(Path(__file__).with_name("prompts.json").read_text(encoding="utf-8"))


# ------------------------------------------------------------------------- what torchvision's classes hold inside


def _image_files(dataset: Any, root: Path) -> list[File]:
    return _files(zip(dataset._image_files, dataset._labels, strict=True), root)


def _sorted_image_files(dataset: Any, root: Path) -> list[File]:
    # torchvision lists them in the order that the disk gives them: a seeded split of that differs by machine.
    return sorted(_image_files(dataset, root), key=lambda file: file.name)


def _images(dataset: Any, root: Path) -> list[File]:
    return _files(zip(dataset._images, dataset._labels, strict=True), root)


def _samples(dataset: Any, root: Path) -> list[File]:
    return _files(getattr(dataset, "samples", None) or dataset._samples, root)


def _caltech_files(dataset: Any, root: Path) -> list[File]:
    folder = Path(dataset.root, "101_ObjectCategories")
    return _files(
        (
            (folder / dataset.categories[label] / f"image_{number:04d}.jpg", label)
            for number, label in zip(dataset.index, dataset.y, strict=True)
        ),
        root,
    )


def _files(found: Iterable[tuple[str | Path, int]], root: Path) -> list[File]:
    return [File(Path(file).relative_to(root).as_posix(), int(label), Path(file).read_bytes) for file, label in found]


def _arrays(dataset: Any, _: Path) -> list[File]:
    return [
        File(f"{number:07d}.png", int(label), partial(_png, dataset.data, number))
        for number, label in enumerate(dataset.targets)
    ]


def _png(pixels: Any, number: int) -> bytes:
    stream = io.BytesIO()
    image = pixels[number]
    Image.fromarray(image.numpy() if isinstance(image, torch.Tensor) else image).save(stream, "PNG")
    return stream.getvalue()


def _classes(dataset: Any) -> list[str]:
    return list(dataset.classes)


@dataclass(frozen=True)
class Source:
    """One of torchvision's dataset classes: how its images are split, and where it keeps them.

    `splits` holds the arguments for train and test; `None` where there is no official split: then it is the authors'
    80/20 `random_split`.
    """

    dataset: str  # class in torchvision.datasets
    folder: str  # what it looks for under its root
    published: tuple[int, int]  # train and test images of the published numbers
    files: Callable[[Any, Path], list[File]] = _image_files
    splits: tuple[Mapping[str, Any], Mapping[str, Any]] | None = ({"split": "train"}, {"split": "test"})
    classes: Callable[[Any], list[str]] = _classes
    separators: str = "_"  # between the words of a class name
    downloads: bool = True

    @property
    def split_family(self) -> str:
        """Name of the split: results are comparable only within one."""
        return "torchvision" if self.splits else f"zscl-seed{SPLIT_SEED}"


_BY_TRAIN: tuple[Mapping[str, Any], Mapping[str, Any]] = ({"train": True}, {"train": False})

# In the order of the published results.
MTIL: Mapping[str, Source] = {
    "Aircraft": Source("FGVCAircraft", "fgvc-aircraft-2013b", (3_334, 3_333)),
    "Caltech101": Source(
        "Caltech101", "caltech101", (6_941, 1_736), _caltech_files, None, lambda dataset: list(dataset.categories)
    ),
    "CIFAR100": Source("CIFAR100", "cifar-100-python", (50_000, 10_000), _arrays, _BY_TRAIN),
    "DTD": Source("DTD", "dtd", (1_880, 1_880)),
    "EuroSAT": Source("EuroSAT", "eurosat", (21_600, 5_400), _samples, None),
    # Not every torchvision knows the names of its flowers.
    "Flowers": Source("Flowers102", "flowers-102", (1_020, 6_149), classes=lambda _: _prompts()["Flowers"]["classes"]),
    "Food": Source("Food101", "food-101", (75_750, 25_250)),
    "MNIST": Source("MNIST", "MNIST", (60_000, 10_000), _arrays, _BY_TRAIN),
    "OxfordPet": Source(
        "OxfordIIITPet", "oxford-iiit-pet", (3_680, 3_669), _images, ({"split": "trainval"}, {"split": "test"})
    ),
    "StanfordCars": Source("StanfordCars", "stanford_cars", (8_144, 8_041), _samples, downloads=False),
    "SUN397": Source("SUN397", "SUN397", (87_003, 21_751), _sorted_image_files, None, separators="_/"),
}


def templates_of(task: str) -> list[str]:
    """Prompt templates of one of the eleven tasks; the first one trains."""
    return list(_prompts()[task]["templates"])


def classnames_of(task: str, classes: Sequence[str]) -> list[str]:
    """CLIP's names of a task's classes, which come in the source's own spelling and order."""
    names = _prompts()[task].get("names", {})
    spaces = str.maketrans(dict.fromkeys(MTIL[task].separators, " "))
    return [names.get(name) or name.translate(spaces) for name in classes]


# ----------------------------------------------------------------------------------------------------------- conversion


def prepare(task: str, out: Path, root: Path | None, report: Report = lambda *_: None) -> Prepared:
    """Convert one of torchvision's datasets to the task folder `out/task`; one that is there already is kept.

    Args:
        task: a name in `MTIL`.
        out: folder of the tasks.
        root: local copy in torchvision's own layout; `None` downloads, and removes what the task then holds.
        report: hears of every few hundred images.

    Raises:
        InputError: there is no readable copy, it cannot be downloaded, or something else lies where the task would.
    """
    source, folder = MTIL[task], out / task
    kept = kept_task(folder, source.split_family)
    if kept is not None:
        return kept
    check_copies([task], out, root)
    if root is not None:
        return _convert(task, folder, root, report)
    downloads = out / ".downloads" / task
    if not downloads.is_dir():
        # torchvision takes a half-unpacked archive for a whole one: a download is whole or not there.
        with atomic_folder(downloads) as temporary:
            _open_splits(task, temporary, download=True)
    prepared = _convert(task, folder, downloads, report)
    _remove(downloads)
    return prepared


def check_copies(tasks: Sequence[str], out: Path, root: Path | None) -> None:
    """See that every task that is not there yet has a copy, before any work is done.

    Raises:
        InputError: a folder that torchvision's class looks for is missing.
    """
    missing = [task for task in tasks if not (out / task / MANIFEST).is_file()]
    if root is None:
        for task in missing:
            if not MTIL[task].downloads:
                raise InputError(
                    f"{task}: torchvision can no longer download it, expected a local copy: "
                    f"{command('zscl', 'data', 'prepare', task, '--out', out, '--root', 'FOLDER')}, where FOLDER holds "
                    f"{MTIL[task].folder}/"
                )
        return
    absent = [MTIL[task].folder for task in missing if not (root / MTIL[task].folder).is_dir()]
    if absent:
        raise InputError(
            f"--root {root}: found no folder {', '.join(absent)}, expected what torchvision's classes unpack there "
            f"({', '.join(task for task in missing if MTIL[task].folder in absent)})"
        )


def _convert(task: str, folder: Path, root: Path, report: Report) -> Prepared:
    source = MTIL[task]
    classes, splits = _open_splits(task, root, download=False)
    total, written = sum(map(len, splits.values())), itertools.count(1)

    def step() -> None:
        done = next(written)
        if done % REPORT_EVERY == 0 or done == total:
            report(task, done, total)

    write_task(
        folder,
        classnames_of(task, classes),
        templates_of(task),
        {split: read_images(task, files, step) for split, files in splits.items()},
        source=f"torchvision {source.dataset}",
        split_family=source.split_family,
    )
    images = {split: len(files) for split, files in splits.items()}
    return Prepared(task, str(folder), images, source.split_family, notes=_unlike_published(source, images))


def _unlike_published(source: Source, images: Mapping[str, int]) -> tuple[str, ...]:
    train, test = source.published
    if (images["train"], images["test"]) == (train, test):
        return ()
    return (f"not the data of the published numbers, which are from {train} train and {test} test images",)


def _open_splits(task: str, root: Path, download: bool) -> tuple[list[str], dict[str, list[File]]]:
    """A task's classes in torchvision's label order, and the files of its splits."""
    source = MTIL[task]
    what = f"{task}: torchvision's {source.dataset} cannot read {root}"
    with said_in_one_sentence(what), redirect_stdout(sys.stderr):
        import torchvision

        opened = partial(getattr(torchvision.datasets, source.dataset), str(root), download=download)
        datasets = [opened(**arguments) for arguments in source.splits or [{}]]
        classes = [source.classes(dataset) for dataset in datasets]
        listed = [source.files(dataset, root) for dataset in datasets]
    if classes[0] != classes[-1]:
        raise InputError(f"{task}: found other classes in the test split than in the train split, expected the same")
    for file in (file for files in listed for file in files):
        if not 0 <= file.label < len(classes[0]):
            raise InputError(
                f"{task}: {file.name} has the label {file.label}, expected 0 to {len(classes[0]) - 1} as there are "
                f"{len(classes[0])} classes"
            )
    if source.splits:
        return classes[0], dict(zip(("train", "test"), listed, strict=True))
    places = random_split(len(listed[0]))
    return classes[0], {split: [listed[0][index] for index in indices] for split, indices in places.items()}


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    if not any(folder.parent.iterdir()):
        folder.parent.rmdir()
