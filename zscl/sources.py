"""Where tasks come from: torchvision's own dataset classes, folders of images, caption files.

Images that are files at their source keep their bytes. Splits, class names and templates are those of the published
results (`prompts.json`: CLIP's, by torchvision's class names). torchvision is imported where it is needed.
"""

import io
import itertools
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from schemas.base import InputError
from zscl.files import whole_file, whole_folder
from zscl.members import IMAGE_SUFFIXES
from zscl.tasks import MANIFEST, FileList, LabelledImage, image_suffix, write_task

SPLIT_SEED = 42  # of the authors' random splits
DEFAULT_TEMPLATE = "a photo of a {c}."
REPORT_EVERY = 200  # images

Report = Callable[[str, int, int], None]  # task, images written, images in all


class File(NamedTuple):
    """An image of a source that has not been read yet."""

    name: str
    label: int
    read: Callable[[], bytes]


@dataclass(frozen=True)
class Prepared:
    """A task folder that is there now."""

    name: str
    folder: str
    images: Mapping[str, int]  # split -> how many
    split_family: str
    kept: bool = False  # it was there before
    notes: tuple[str, ...] = ()


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


# ------------------------------------------------------------------------------------------------ names and splits


def templates_of(task: str) -> list[str]:
    """Prompt templates of one of the eleven tasks; the first one trains."""
    return list(_prompts()[task]["templates"])


def classnames_of(task: str, classes: Sequence[str]) -> list[str]:
    """CLIP's names of a task's classes, which come in the source's own spelling and order."""
    names = _prompts()[task].get("names", {})
    spaces = str.maketrans(dict.fromkeys(MTIL[task].separators, " "))
    return [names.get(name) or name.translate(spaces) for name in classes]


def known(what: str, name: str, allowed: Sequence[str]) -> str:
    """Give the name back.

    Raises:
        InputError: it is not among those allowed; the sentence says which is nearest.
    """
    if name in allowed:
        return name
    lower = {candidate.lower(): candidate for candidate in allowed}
    nearest = get_close_matches(name.lower(), lower, n=1)
    hint = f"did you mean '{lower[nearest[0]]}'?" if nearest else "expected one of: " + ", ".join(allowed)
    raise InputError(f"{what}: found the unknown name '{name}'; {hint}")


def random_split(total: int, seed: int = SPLIT_SEED) -> dict[str, list[int]]:
    """The authors' 80/20 split: which of `total` samples train and which test, in their order."""
    train = int(0.8 * total)
    places: Any = range(total)
    parts = torch.utils.data.random_split(places, [train, total - train], generator=torch.Generator().manual_seed(seed))
    return {split: list(part.indices) for split, part in zip(("train", "test"), parts, strict=True)}


# ----------------------------------------------------------------------------------------------- torchvision's tasks


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
        with whole_folder(downloads) as temporary:
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
                    f"zscl data prepare {task} --out {out} --root FOLDER, where FOLDER holds {MTIL[task].folder}/"
                )
        return
    absent = [MTIL[task].folder for task in missing if not (root / MTIL[task].folder).is_dir()]
    if absent:
        raise InputError(
            f"--root {root}: found no folder {', '.join(absent)}, expected what torchvision's classes unpack there "
            f"({', '.join(task for task in missing if MTIL[task].folder in absent)})"
        )


def kept_task(folder: Path, split_family: str) -> Prepared | None:
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
    return Prepared(folder.name, str(folder), images, split_family, kept=True)


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
        {split: _read(task, files, step) for split, files in splits.items()},
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
    with _said_in_one_sentence(what), redirect_stdout(sys.stderr):
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


def _read(task: str, files: Sequence[File], done: Callable[[], None]) -> Iterator[LabelledImage]:
    for file in files:
        with _said_in_one_sentence(f"{task}: cannot read {file.name}"):
            image = file.read()
        yield LabelledImage(image, file.label, file.name)
        done()


@contextmanager
def _said_in_one_sentence(what: str) -> Iterator[None]:
    # torchvision's classes parse what they find: whatever that raises says that the copy is not what it should be.
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{what} ({reason}), expected a whole copy of the dataset") from error


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    if not any(folder.parent.iterdir()):
        folder.parent.rmdir()


# ------------------------------------------------------------------------------------------------- folders of images


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
    classnames = [name.replace("_", " ").replace("-", " ") for name in classes]
    for name in classnames:
        if classnames.count(name) > 1:
            raise InputError(f"{images}: found two folders for the class '{name}', expected one folder a class")
    return write_files(folder, classnames, templates, splits, str(images), family)


def write_files(
    folder: Path,
    classnames: Sequence[str],
    templates: Sequence[str],
    splits: Mapping[str, Sequence[File]],
    source: str,
    split_family: str,
) -> Prepared:
    """Write a task of image files, whose bytes it keeps; one made of the same files is kept as it is.

    Arguments as of `zscl.tasks.write_task`.

    Raises:
        InputError: a file cannot be read, or something else lies at `folder`.
    """
    kept = kept_task(folder, split_family)
    if kept is not None:
        _check_same(folder, splits, classnames, templates)
        return kept
    read = {split: _read(folder.name, files, lambda: None) for split, files in splits.items()}
    write_task(folder, classnames, templates, read, source=source, split_family=split_family)
    return Prepared(folder.name, str(folder), {split: len(files) for split, files in splits.items()}, split_family)


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


def _check_same(
    folder: Path, splits: Mapping[str, Sequence[File]], classnames: Sequence[str], templates: Sequence[str]
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
        (folder / file).read_text(encoding="utf-8").splitlines() == list(lines) for file, lines in words.items()
    )
    if manifest.get("file_lists") != lists or not same_words:
        raise InputError(f"{folder}: found a task of other files, classes or templates, expected a new folder")


# ---------------------------------------------------------------------------------------------------------- captions


def write_captions(file: Path, folder: Path) -> int:
    """Write a caption file (Conceptual Captions' TSV, or one caption a line) as the captions.txt of a reference set.

    Nothing is deduplicated or reordered; only empty captions are left out. Returns how many there are.

    Raises:
        InputError: no such file, not UTF-8, no caption in it, or other captions there already.
    """
    if not file.is_file():
        raise InputError(f"{file}: found no such file, expected captions, one a line (caption<TAB>url or caption)")
    try:
        count = sum(1 for _ in _captions(file))
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: found no UTF-8 text ({error.reason}), expected captions in UTF-8") from error
    if not count:
        raise InputError(f"{file}: found no caption, expected one a line (caption<TAB>url or caption)")
    place = folder / "captions.txt"
    if place.exists():
        if not all(there == ours for there, ours in itertools.zip_longest(_captions(place), _captions(file))):
            raise InputError(f"{place}: found other captions there, expected a folder without a captions.txt")
        return count
    with whole_file(place) as temporary, temporary.open("w", encoding="utf-8") as written:
        written.writelines(caption + "\n" for caption in _captions(file))
    return count


def _captions(file: Path) -> Iterator[str]:
    with file.open(encoding="utf-8-sig", newline="\n") as lines:
        for line in lines:
            # Unicode has more line ends than \n, and captions.txt has one caption a line.
            caption = " ".join(line.partition("\t")[0].splitlines()).strip()
            if caption:
                yield caption
