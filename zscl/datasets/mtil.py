"""Conversion of the eleven MTIL tasks of the published results, read through torchvision's dataset classes.

Splits, class names and templates are those of the published results. `prompts.json` maps torchvision's class names to
those of CLIP. torchvision is imported on first use.
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

from schemas.errors import ErrorCode, InputError, shell_command
from zscl.data.task import MANIFEST
from zscl.datasets.sources import (
    SPLIT_SEED,
    PreparedTask,
    SourceFile,
    convert_errors,
    find_existing_task,
    random_split,
    read_images,
)
from zscl.datasets.task_writer import write_task
from zscl.runtime.atomic_io import atomic_folder

PROGRESS_INTERVAL = 200  # images

OnProgress = Callable[[str, int, int], None]  # task, images written, images in total


@cache
def _prompts() -> Any:
    return json.loads(Path(__file__).with_name("prompts.json").read_text(encoding="utf-8"))


# ----------------------------------------------------------------------------- attributes of torchvision's datasets


def _image_files(dataset: Any, root: Path) -> list[SourceFile]:
    return _source_files(zip(dataset._image_files, dataset._labels, strict=True), root)


def _sorted_image_files(dataset: Any, root: Path) -> list[SourceFile]:
    # torchvision lists the files in directory order. A seeded split of that order would differ between machines.
    return sorted(_image_files(dataset, root), key=lambda file: file.name)


def _images(dataset: Any, root: Path) -> list[SourceFile]:
    return _source_files(zip(dataset._images, dataset._labels, strict=True), root)


def _samples(dataset: Any, root: Path) -> list[SourceFile]:
    return _source_files(getattr(dataset, "samples", None) or dataset._samples, root)


def _caltech_files(dataset: Any, root: Path) -> list[SourceFile]:
    folder = Path(dataset.root, "101_ObjectCategories")
    return _source_files(
        (
            (folder / dataset.categories[label] / f"image_{number:04d}.jpg", label)
            for number, label in zip(dataset.index, dataset.y, strict=True)
        ),
        root,
    )


def _source_files(paths_and_labels: Iterable[tuple[str | Path, int]], root: Path) -> list[SourceFile]:
    return [
        SourceFile(Path(path).relative_to(root).as_posix(), int(label), Path(path).read_bytes)
        for path, label in paths_and_labels
    ]


def _arrays(dataset: Any, _: Path) -> list[SourceFile]:
    return [
        SourceFile(f"{index:07d}.png", int(label), partial(_png, dataset.data, index))
        for index, label in enumerate(dataset.targets)
    ]


def _png(images: Any, index: int) -> bytes:
    stream = io.BytesIO()
    pixels = images[index]
    Image.fromarray(pixels.numpy() if isinstance(pixels, torch.Tensor) else pixels).save(stream, "PNG")
    return stream.getvalue()


def _classes(dataset: Any) -> list[str]:
    return list(dataset.classes)


@dataclass(frozen=True)
class TorchvisionSource:
    """One of torchvision's dataset classes, and how to read its splits, images and class names.

    Attributes:
        dataset: Name of the class in `torchvision.datasets`.
        folder: Name of the folder, inside the root folder, from which the class reads the dataset.
        published_counts: Numbers of train and test images in the published results.
        list_files: Returns the image files of an instance of the class, given the instance and its root folder.
        split_arguments: Arguments of the class for train and test. `None` means that there is no official split, so the
            paper's 80/20 `random_split` is used.
        list_classes: Returns the class names of an instance of the class, in label order.
        separators: Characters between the words of a class name, which are replaced by spaces.
        is_downloadable: Whether torchvision can download the dataset.
    """

    dataset: str
    folder: str
    published_counts: tuple[int, int]
    list_files: Callable[[Any, Path], list[SourceFile]] = _image_files
    split_arguments: tuple[Mapping[str, Any], Mapping[str, Any]] | None = ({"split": "train"}, {"split": "test"})
    list_classes: Callable[[Any], list[str]] = _classes
    separators: str = "_"
    is_downloadable: bool = True

    @property
    def split_family(self) -> str:
        """Name of the split. Results are comparable only if the split families are equal."""
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
    # Older versions of torchvision have no class names for this dataset.
    "Flowers": TorchvisionSource(
        "Flowers102", "flowers-102", (1_020, 6_149), list_classes=lambda _: _prompts()["Flowers"]["classes"]
    ),
    "Food": TorchvisionSource("Food101", "food-101", (75_750, 25_250)),
    "MNIST": TorchvisionSource("MNIST", "MNIST", (60_000, 10_000), _arrays, _BY_TRAIN),
    "OxfordPet": TorchvisionSource(
        "OxfordIIITPet", "oxford-iiit-pet", (3_680, 3_669), _images, ({"split": "trainval"}, {"split": "test"})
    ),
    "StanfordCars": TorchvisionSource("StanfordCars", "stanford_cars", (8_144, 8_041), _samples, is_downloadable=False),
    "SUN397": TorchvisionSource("SUN397", "SUN397", (87_003, 21_751), _sorted_image_files, None, separators="_/"),
}


def templates_of(task: str) -> list[str]:
    """Return the prompt templates of an MTIL task; the first one is used for training."""
    return list(_prompts()[task]["templates"])


def classnames_of(task: str, classes: Sequence[str]) -> list[str]:
    """Convert the class names of a source to CLIP's spelling, which the published results use.

    Args:
        task: A name in `MTIL`.
        classes: Class names in the spelling and order of the source.

    Returns:
        The converted names, in the same order.
    """
    names = _prompts()[task].get("names", {})
    spaces = str.maketrans(dict.fromkeys(MTIL[task].separators, " "))
    return [names.get(name) or name.translate(spaces) for name in classes]


# ----------------------------------------------------------------------------------------------------------- conversion


def prepare(task: str, out: Path, root: Path | None, on_progress: OnProgress = lambda *_: None) -> PreparedTask:
    """Convert one of torchvision's datasets to the task folder `out/task`. An existing task is reused.

    Args:
        task: A name in `MTIL`.
        out: Folder of the tasks.
        root: Folder of a local copy in torchvision's layout. If `None`, the dataset is downloaded, and the download is
            removed after conversion.
        on_progress: Called every few hundred images.

    Returns:
        The written or existing task.

    Raises:
        InputError: The local copy is missing or damaged, the download fails, or `out/task` exists with other content.
    """
    source, folder = MTIL[task], out / task
    existing = find_existing_task(folder, source.split_family)
    if existing is not None:
        return existing
    check_copies([task], out, root)
    if root is not None:
        return _convert(task, folder, root, on_progress)
    downloads = out / ".downloads" / task
    if not downloads.is_dir():
        # torchvision does not detect a partly unpacked archive, so the download is made atomic.
        with atomic_folder(downloads) as temporary:
            _read_splits(task, temporary, download=True)
    prepared = _convert(task, folder, downloads, on_progress)
    _remove_downloads(downloads)
    return prepared


def check_copies(tasks: Sequence[str], out: Path, root: Path | None) -> None:
    """Check that every task without a task folder has a local copy of its dataset or can be downloaded.

    Args:
        tasks: Names in `MTIL`.
        out: Folder of the tasks.
        root: Folder of local copies in torchvision's layout; `None` if the datasets are downloaded.

    Raises:
        InputError: A folder that torchvision's class expects is missing, or a task needs a local copy.
    """
    missing = [task for task in tasks if not (out / task / MANIFEST).is_file()]
    if root is None:
        for task in missing:
            if not MTIL[task].is_downloadable:
                prepare_command = shell_command("zscl", "data", "prepare", task, "--out", out, "--root", "FOLDER")
                raise InputError(
                    f"{task}: torchvision can no longer download this dataset, expected a local copy: "
                    f"{prepare_command}, where FOLDER contains {MTIL[task].folder}/",
                    code=ErrorCode.MISSING_VALUE,
                    field="--root",
                )
        return
    absent = [task for task in missing if not (root / MTIL[task].folder).is_dir()]
    if absent:
        raise InputError(
            f"--root {root}: found no folder {', '.join(MTIL[task].folder for task in absent)}, expected "
            f"the folders that torchvision unpacks for {', '.join(absent)}",
            code=ErrorCode.NOT_FOUND,
            field="--root",
        )


def _convert(task: str, folder: Path, root: Path, on_progress: OnProgress) -> PreparedTask:
    source = MTIL[task]
    classes, splits = _read_splits(task, root, download=False)
    total, written = sum(map(len, splits.values())), itertools.count(1)

    def on_image() -> None:
        done = next(written)
        if done % PROGRESS_INTERVAL == 0 or done == total:
            on_progress(task, done, total)

    write_task(
        folder,
        classnames_of(task, classes),
        templates_of(task),
        {split: read_images(task, files, on_image) for split, files in splits.items()},
        source=f"torchvision {source.dataset}",
        split_family=source.split_family,
    )
    images = {split: len(files) for split, files in splits.items()}
    return PreparedTask(task, str(folder), images, source.split_family, notes=_size_notes(source, images))


def _size_notes(source: TorchvisionSource, images: Mapping[str, int]) -> tuple[str, ...]:
    """Return a note if the numbers of images differ from those of the published results."""
    train, test = source.published_counts
    if (images["train"], images["test"]) == (train, test):
        return ()
    return (f"these are not the images of the published results, which use {train} train and {test} test images",)


def _read_splits(task: str, root: Path, download: bool) -> tuple[list[str], dict[str, list[SourceFile]]]:
    """Return a task's class names in torchvision's label order, and the files of its splits."""
    source = MTIL[task]
    message = f"{task}: torchvision's {source.dataset} cannot read {root}"
    with convert_errors(message), redirect_stdout(sys.stderr):
        import torchvision

        open_dataset = partial(getattr(torchvision.datasets, source.dataset), str(root), download=download)
        datasets = [open_dataset(**arguments) for arguments in source.split_arguments or [{}]]
        classes = [source.list_classes(dataset) for dataset in datasets]
        files = [source.list_files(dataset, root) for dataset in datasets]
    if classes[0] != classes[-1]:
        raise InputError(
            f"{task}: the train and test splits have different classes, expected the same classes",
            code=ErrorCode.MISMATCH,
        )
    for file in itertools.chain(*files):
        if not 0 <= file.label < len(classes[0]):
            raise InputError(
                f"{task}: {file.name} has the label {file.label}, expected 0 to {len(classes[0]) - 1}, because there "
                f"are {len(classes[0])} classes",
                code=ErrorCode.MISMATCH,
            )
    if source.split_arguments:
        return classes[0], dict(zip(("train", "test"), files, strict=True))
    indices = random_split(len(files[0]))
    return classes[0], {split: [files[0][index] for index in indices[split]] for split in indices}


def _remove_downloads(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    if not any(folder.parent.iterdir()):
        folder.parent.rmdir()
