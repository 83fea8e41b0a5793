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
    SourceFile,
    PreparedTask,
    find_existing_task,
    random_split,
    read_images,
    convert_errors,
)
from zscl.datasets.task_writer import write_task
from zscl.runtime.atomic_io import atomic_folder

REPORT_EVERY = 200  # images

OnProgress = Callable[[str, int, int], None]  # task, images written, images in all


@cache
def _prompts() -> Any:
    return json.loads(Path(__file__).with_name("prompts.json").read_text(encoding="utf-8"))


# ------------------------------------------------------------------------- what torchvision's classes hold inside


def _image_files(dataset: Any, root: Path) -> list[SourceFile]:
    return _files(zip(dataset._image_files, dataset._labels, strict=True), root)


def _sorted_image_files(dataset: Any, root: Path) -> list[SourceFile]:
    # torchvision lists them in the order that the disk gives them: a seeded split of that differs by machine.
    return sorted(_image_files(dataset, root), key=lambda file: file.name)


def _images(dataset: Any, root: Path) -> list[SourceFile]:
    return _files(zip(dataset._images, dataset._labels, strict=True), root)


def _samples(dataset: Any, root: Path) -> list[SourceFile]:
    return _files(getattr(dataset, "samples", None) or dataset._samples, root)


def _caltech_files(dataset: Any, root: Path) -> list[SourceFile]:
    folder = Path(dataset.root, "101_ObjectCategories")
    return _files(
        (
            (folder / dataset.categories[label] / f"image_{number:04d}.jpg", label)
            for number, label in zip(dataset.index, dataset.y, strict=True)
        ),
        root,
    )


def _files(found: Iterable[tuple[str | Path, int]], root: Path) -> list[SourceFile]:
    return [SourceFile(Path(file).relative_to(root).as_posix(), int(label), Path(file).read_bytes) for file, label in found]


def _arrays(dataset: Any, _: Path) -> list[SourceFile]:
    return [
        SourceFile(f"{number:07d}.png", int(label), partial(_png, dataset.data, number))
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
class TorchvisionSource:
    """One of torchvision's dataset classes: how its images are split, and where it keeps them.

    `splits` holds the arguments for train and test; `None` where there is no official split: then it is the authors'
    80/20 `random_split`.
    """

    dataset: str  # class in torchvision.datasets
    folder: str  # what it looks for under its root
    published_counts: tuple[int, int]  # train and test images of the published numbers
    list_files: Callable[[Any, Path], list[SourceFile]] = _image_files
    split_arguments: tuple[Mapping[str, Any], Mapping[str, Any]] | None = ({"split": "train"}, {"split": "test"})
    list_classes: Callable[[Any], list[str]] = _classes
    separators: str = "_"  # between the words of a class name
    is_downloadable: bool = True

    @property
    def split_family(self) -> str:
        """Name of the split: results are comparable only within one."""
        return "torchvision" if self.split_arguments else f"zscl-seed{SPLIT_SEED}"


_BY_TRAIN: tuple[Mapping[str, Any], Mapping[str, Any]] = ({"train": True}, {"train": False})

# In the order of the published results.
MTIL: Mapping[str, TorchvisionSource] = {
    "Aircraft": TorchvisionSource("FGVCAircraft", "fgvc-aircraft-2013b", (3_334, 3_333)),
    "Caltech101": TorchvisionSource(
        "Caltech101", "caltech101", (6_941, 1_736), _caltech_files, None, lambda dataset: list(dataset.categories)
    ),
    "CIFAR100": TorchvisionSource("CIFAR100", "cifar-100-python", (50_000, 10_000), _arrays, _BY_TRAIN),
    "DTD": TorchvisionSource("DTD", "dtd", (1_880, 1_880)),
    "EuroSAT": TorchvisionSource("EuroSAT", "eurosat", (21_600, 5_400), _samples, None),
    # Not every torchvision knows the names of its flowers.
    "Flowers": TorchvisionSource("Flowers102", "flowers-102", (1_020, 6_149), list_classes=lambda _: _prompts()["Flowers"]["classes"]),
    "Food": TorchvisionSource("Food101", "food-101", (75_750, 25_250)),
    "MNIST": TorchvisionSource("MNIST", "MNIST", (60_000, 10_000), _arrays, _BY_TRAIN),
    "OxfordPet": TorchvisionSource(
        "OxfordIIITPet", "oxford-iiit-pet", (3_680, 3_669), _images, ({"split": "trainval"}, {"split": "test"})
    ),
    "StanfordCars": TorchvisionSource("StanfordCars", "stanford_cars", (8_144, 8_041), _samples, is_downloadable=False),
    "SUN397": TorchvisionSource("SUN397", "SUN397", (87_003, 21_751), _sorted_image_files, None, separators="_/"),
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


def prepare(task: str, out: Path, root: Path | None, on_progress: OnProgress = lambda *_: None) -> PreparedTask:
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
    kept = find_existing_task(folder, source.split_family)
    if kept is not None:
        return kept
    check_copies([task], out, root)
    if root is not None:
        return _convert(task, folder, root, on_progress)
    downloads = out / ".downloads" / task
    if not downloads.is_dir():
        # torchvision takes a half-unpacked archive for a whole one: a download is whole or not there.
        with atomic_folder(downloads) as temporary:
            _open_splits(task, temporary, download=True)
    prepared = _convert(task, folder, downloads, on_progress)
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
            if not MTIL[task].is_downloadable:
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


def _convert(task: str, folder: Path, root: Path, report: OnProgress) -> PreparedTask:
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
    return PreparedTask(task, str(folder), images, source.split_family, notes=_unlike_published(source, images))


def _unlike_published(source: TorchvisionSource, images: Mapping[str, int]) -> tuple[str, ...]:
    train, test = source.published_counts
    if (images["train"], images["test"]) == (train, test):
        return ()
    return (f"not the data of the published numbers, which are from {train} train and {test} test images",)


def _open_splits(task: str, root: Path, download: bool) -> tuple[list[str], dict[str, list[SourceFile]]]:
    """A task's classes in torchvision's label order, and the files of its splits."""
    source = MTIL[task]
    what = f"{task}: torchvision's {source.dataset} cannot read {root}"
    with convert_errors(what), redirect_stdout(sys.stderr):
        import torchvision

        opened = partial(getattr(torchvision.datasets, source.dataset), str(root), download=download)
        datasets = [opened(**arguments) for arguments in source.split_arguments or [{}]]
        classes = [source.list_classes(dataset) for dataset in datasets]
        listed = [source.list_files(dataset, root) for dataset in datasets]
    if classes[0] != classes[-1]:
        raise InputError(f"{task}: found other classes in the test split than in the train split, expected the same")
    for file in (file for files in listed for file in files):
        if not 0 <= file.label < len(classes[0]):
            raise InputError(
                f"{task}: {file.name} has the label {file.label}, expected 0 to {len(classes[0]) - 1} as there are "
                f"{len(classes[0])} classes"
            )
    if source.split_arguments:
        return classes[0], dict(zip(("train", "test"), listed, strict=True))
    places = random_split(len(listed[0]))
    return classes[0], {split: [listed[0][index] for index in indices] for split, indices in places.items()}


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    if not any(folder.parent.iterdir()):
        folder.parent.rmdir()
