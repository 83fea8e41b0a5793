"""Each of the eleven, from a tiny tree in its own format, through the very torchvision class that reads it."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import coloured
from PIL import Image
from trees import TREES, Expected

from schemas.base import InputError
from schemas.data import Reference, Task
from zscl.copies import COPIES, fetch
from zscl.sources import (
    MTIL,
    classnames_of,
    known,
    prepare,
    prepare_folder,
    random_split,
    templates_of,
    write_captions,
)
from zscl.tasks import LabelledImage, ReferenceSet, TaskFolder, write_task

TEMPLATES = {
    "Aircraft": (2, "a photo of a {c}, a type of aircraft."),
    "Caltech101": (34, "a photo of a {c}."),
    "CIFAR100": (18, "a photo of a {c}."),
    "DTD": (8, "a photo of a {c} texture."),
    "EuroSAT": (3, "a centered satellite photo of {c}."),
    "Flowers": (1, "a photo of a {c}, a type of flower."),
    "Food": (1, "a photo of a {c}, a type of food."),
    "MNIST": (1, 'a photo of the number: "{c}".'),
    "OxfordPet": (1, "a photo of a {c}, a type of pet."),
    "StanfordCars": (9, "a photo of a {c}, a type of car."),
    "SUN397": (2, "a photo of a {c}."),
}


def opened(folder: Path) -> TaskFolder:
    return TaskFolder.open(Task.model_validate(str(folder)))


def splits_of(expected: Expected) -> Expected:
    if "all" not in expected:
        return expected
    samples = expected["all"]
    train = int(0.8 * len(samples))
    parts = torch.utils.data.random_split(
        samples,  # type: ignore[arg-type]
        [train, len(samples) - train],
        generator=torch.Generator().manual_seed(42),
    )
    return {"train": list(parts[0]), "test": list(parts[1])}


@pytest.mark.parametrize("task", MTIL)
def test_converts(task: str, tmp_path: Path, unchecked: None) -> None:
    expected = splits_of(TREES[task](tmp_path / "root"))
    prepared = prepare(task, tmp_path / "out", tmp_path / "root")
    folder = opened(tmp_path / "out" / task)
    folder.check()
    count, first = TEMPLATES[task]
    assert (len(folder.templates), folder.templates[0]) == (count, first)
    for split, samples in (("train", folder.train), ("test", folder.test)):
        found = [(folder.classnames[folder.label_of(sample)], sample.image) for sample in samples.once(0, 1)]
        assert [name for name, _ in found] == [name for name, _ in expected[split]]
        if expected[split][0][1] is not None:
            assert found == expected[split]
        assert prepared.images[split] == len(expected[split])
    official = "all" not in TREES[task](tmp_path / "again")
    manifest = json.loads((tmp_path / "out" / task / "zscl.json").read_text())
    assert manifest["split_family"] == prepared.split_family == ("torchvision" if official else "zscl-seed42")
    assert manifest["source"] == f"torchvision {MTIL[task].dataset}"
    assert all(len(sha) == 64 for sha in manifest["file_lists"].values())
    assert set(manifest["file_lists"]) == {"train", "test"}
    assert "not the data of the published numbers" in prepared.notes[0]
    assert prepare(task, tmp_path / "out", tmp_path / "root").kept


@pytest.mark.parametrize("task", MTIL)
def test_clip_benchmark_reads_it(task: str, tmp_path: Path, unchecked: None) -> None:
    builder = pytest.importorskip("clip_benchmark.datasets.builder")
    expected = splits_of(TREES[task](tmp_path / "root"))
    prepare(task, tmp_path / "out", tmp_path / "root")
    dataset = builder.build_wds_dataset("", lambda image: image.size, split="test", data_dir=f"{tmp_path}/out/{task}")
    assert [dataset.classes[label] for _, label in dataset] == [name for name, _ in expected["test"]]
    assert len(dataset.templates) == TEMPLATES[task][0]


def test_arrays_become_png_of_the_same_pixels(tmp_path: Path, unchecked: None) -> None:
    for task, dataset in (("CIFAR100", torchvision.datasets.CIFAR100), ("MNIST", torchvision.datasets.MNIST)):
        TREES[task](tmp_path)
        prepare(task, tmp_path / "out", tmp_path)
        samples = list(opened(tmp_path / "out" / task).test.once(0, 1))
        for sample, (image, _) in zip(samples, dataset(tmp_path, train=False), strict=True):
            assert sample.image.startswith(b"\x89PNG")
            assert np.array_equal(np.array(Image.open(io.BytesIO(sample.image))), np.array(image))


@pytest.mark.parametrize(
    ("total", "train", "test"), [(8_677, 6_941, 1_736), (27_000, 21_600, 5_400), (108_754, 87_003, 21_751)]
)
def test_the_random_split_is_the_authors(total: int, train: int, test: int) -> None:
    places: list[int] = list(range(total))
    generator = torch.Generator().manual_seed(42)
    parts = torch.utils.data.random_split(places, [train, test], generator=generator)  # type: ignore[arg-type]
    split = random_split(total)
    assert split == {"train": list(parts[0]), "test": list(parts[1])}
    if total == 8_677:  # a generator of torch's that gave other numbers would make another benchmark
        assert split["train"][:5] == [8_512, 5_748, 7_753, 4_345, 5_587]


@pytest.mark.parametrize(
    ("task", "judge"),
    [
        ("Caltech101", "caltech101"),
        ("EuroSAT", "eurosat"),
        ("Flowers", "flowers"),
        ("MNIST", "mnist"),
        ("OxfordPet", "pets"),
    ],
)
def test_names_are_those_of_clip_benchmark(task: str, judge: str, tmp_path: Path, unchecked: None) -> None:
    package = pytest.importorskip("clip_benchmark.datasets")
    theirs = json.loads((Path(package.__path__[0]) / "en_classnames.json").read_text())[judge]
    TREES[task](tmp_path)
    prepare(task, tmp_path / "out", tmp_path)
    assert list(opened(tmp_path / "out" / task).classnames) == [name for name in theirs if name != "background"]


def test_templates_are_those_of_clip_benchmark() -> None:
    package = pytest.importorskip("clip_benchmark.datasets")
    theirs = json.loads((Path(package.__path__[0]) / "en_zeroshot_classification_templates.json").read_text())
    judges = {
        "Aircraft": "fgvc_aircraft", "Caltech101": "caltech101", "CIFAR100": "cifar100", "DTD": "dtd",
        "EuroSAT": "eurosat", "Flowers": "flowers", "MNIST": "mnist", "OxfordPet": "pets", "SUN397": "sun397",
    }  # fmt: skip
    for task, judge in judges.items():
        assert templates_of(task) == theirs[judge]
    # Those of the published numbers: another food prompt, and a car prompt more.
    assert templates_of("Food") == [theirs["food101"][0].replace("of {c}", "of a {c}")]
    assert templates_of("StanfordCars") == ["a photo of a {c}, a type of car.", *theirs["cars"]]


def test_the_same_copy_has_the_same_split_anywhere(tmp_path: Path) -> None:
    manifests = []
    for place in ("a", "b"):
        TREES["SUN397"](tmp_path / place)
        prepare("SUN397", tmp_path / place / "out", tmp_path / place)
        manifests.append(json.loads((tmp_path / place / "out/SUN397/zscl.json").read_text()))
    assert manifests[0]["file_lists"] == manifests[1]["file_lists"]
    assert manifests[0]["file_lists"]["train"] != manifests[0]["file_lists"]["test"]


def copy_without(task: str, root: Path, break_: Callable[[Path], object]) -> Path:
    TREES[task](root)
    break_(root)
    return root


@pytest.mark.parametrize(
    ("task", "break_", "sentence"),
    [
        ("DTD", lambda root: shutil.rmtree(root / "dtd"), r"--root .*found no folder dtd, expected .*\(DTD\)"),
        ("DTD", lambda root: next(root.rglob("banded_0042.jpg")).unlink(), r"DTD: cannot read dtd/.*banded_0042\.jpg"),
        ("DTD", lambda root: shutil.rmtree(root / "dtd/dtd"), r"DTD: torchvision's DTD cannot read .*not found"),
        ("Food", lambda root: (root / "food-101/meta/test.json").write_text("{"), "Food: torchvision's Food101 cannot"),
        ("Food", lambda root: (root / "food-101/meta/test.json").write_text('{"pie": []}'), "found other classes in"),
        ("MNIST", lambda root: (root / "MNIST/raw/t10k-labels-idx1-ubyte").write_bytes(b"\0\0\x08"), "MNIST: torch"),
    ],
)  # fmt: skip
def test_names_what_a_copy_lacks(task: str, break_: Callable[[Path], object], sentence: str, tmp_path: Path) -> None:
    root = copy_without(task, tmp_path / "root", break_)
    with pytest.raises(InputError, match=sentence) as refused:
        prepare(task, tmp_path / "out", root)
    assert "\n" not in str(refused.value)
    assert not list((tmp_path / "out").glob("*"))


def test_what_lies_there_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out/DTD").mkdir(parents=True)
    (tmp_path / "out/DTD/mine.txt").write_text("mine")
    TREES["DTD"](tmp_path)
    with pytest.raises(InputError, match="out/DTD: found something that is no task made by zscl data"):
        prepare("DTD", tmp_path / "out", tmp_path)
    assert (tmp_path / "out/DTD/mine.txt").read_text() == "mine"
    copied = [LabelledImage(image, label, f"{label}.png") for image, label in coloured(2, 0)]
    write_task(
        tmp_path / "copies/DTD", ["a", "b"], ["{c}"], {"train": copied}, source="", split_family="clip-benchmark-wds"
    )
    with pytest.raises(InputError, match="family 'clip-benchmark-wds', expected 'torchvision' or a new folder"):
        prepare("DTD", tmp_path / "copies", tmp_path)


def test_downloads_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(self: torchvision.datasets.DTD) -> None:  # the network is all that is made up
        if not self._check_exists():
            TREES["DTD"](Path(self.root))
            if broken:
                raise OSError("connection lost")

    monkeypatch.setattr(torchvision.datasets.DTD, "_download", download)
    broken = True
    with pytest.raises(InputError, match=r"DTD: torchvision's DTD cannot read .*\(connection lost\)"):
        prepare("DTD", tmp_path / "out", None)
    assert not list((tmp_path / "out").rglob("*.jpg"))
    broken = False
    assert prepare("DTD", tmp_path / "out", None).images == {"train": 3, "test": 3}
    assert [place.name for place in (tmp_path / "out").iterdir()] == ["DTD"]


def test_says_that_cars_cannot_be_downloaded(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"StanfordCars: torchvision can no longer download it, expected a local copy"):
        prepare("StanfordCars", tmp_path, None)


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(InputError, match=r"prepare: found the unknown name 'oxfordpets'; did you mean 'OxfordPet'\?"):
        known("prepare", "oxfordpets", list(MTIL))
    with pytest.raises(InputError, match="expected one of: Aircraft, Caltech101"):
        known("prepare", "xyzzy", list(MTIL))


# ------------------------------------------------------------------------------------------------ folders of images


def sorted_by_class(folder: Path, count: int, suffixes: tuple[str, ...] = ("png", "JPEG")) -> None:
    for number, (image, label) in enumerate(coloured(count, seed=1)):
        place = folder / ["rusty_red", "green-ish", "blue", "yellow"][label]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:03d}.{suffixes[number % len(suffixes)]}").write_bytes(image)


def test_a_folder_with_splits(tmp_path: Path) -> None:
    for split, count in (("train", 8), ("test", 4)):
        sorted_by_class(tmp_path / "photos" / split, count)
    prepared = prepare_folder(tmp_path / "photos", tmp_path / "task", ["a photo of a {c}.", "some {c}"])
    assert (prepared.images, prepared.split_family) == ({"train": 8, "test": 4}, "folder")
    task = opened(tmp_path / "task")
    assert task.classnames == ("blue", "green ish", "rusty red", "yellow")
    assert [task.label_of(sample) for sample in task.train.once(0, 1)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert prepare_folder(tmp_path / "photos", tmp_path / "task", ["a photo of a {c}.", "some {c}"]).kept
    for change in ("template", "file"):
        if change == "file":
            shutil.copy(tmp_path / "photos/train/blue/002.png", tmp_path / "photos/train/blue/003.png")
        templates = ["another {c}"] if change == "template" else ["a photo of a {c}.", "some {c}"]
        with pytest.raises(InputError, match="found a task of other files, classes or templates"):
            prepare_folder(tmp_path / "photos", tmp_path / "task", templates)


def test_a_folder_without_splits(tmp_path: Path) -> None:
    sorted_by_class(tmp_path / "photos", 20)
    found = {}
    for seed in (42, 7):
        prepared = prepare_folder(tmp_path / "photos", tmp_path / str(seed), ["{c}"], seed)
        assert (prepared.images, prepared.split_family) == ({"train": 16, "test": 4}, f"folder-seed{seed}")
        found[seed] = {sample.image for sample in opened(tmp_path / str(seed)).test.once(0, 1)}
    assert found[42] != found[7]


@pytest.mark.parametrize(
    ("break_", "sentence"),
    [
        (lambda photos: shutil.rmtree(photos), "found no such folder, expected images sorted into a folder a class"),
        (lambda photos: shutil.rmtree(photos / "test"), "found train/ alone, expected both train/ and test/"),
        (lambda photos: shutil.rmtree(photos / "test/blue"), "found the class 'blue' in train/ and not in test/"),
        (lambda photos: (photos / "train/blue/new.bmp").touch(), r"blue/new\.bmp: found no image file that"),
        (lambda photos: [f.unlink() for f in (photos / "train/blue").iterdir()], "train/blue: found no image"),
        (lambda photos: [shutil.rmtree(photos / split) for split in ("train", "test")], "found no folder with images"),
        (lambda photos: [shutil.copytree(photos / split / "green-ish", photos / split / "green_ish")
                         for split in ("train", "test")], "found two folders for the class 'green ish'"),
    ],
)  # fmt: skip
def test_names_what_a_folder_lacks(break_: Callable[[Path], object], sentence: str, tmp_path: Path) -> None:
    for split in ("train", "test"):
        sorted_by_class(tmp_path / "photos" / split, 8)
    break_(tmp_path / "photos")
    with pytest.raises(InputError, match=sentence):
        prepare_folder(tmp_path / "photos", tmp_path / "task", ["{c}"])
    assert not (tmp_path / "task").exists()


def test_a_folder_is_never_replaced_by_its_own_task(tmp_path: Path) -> None:
    sorted_by_class(tmp_path / "photos", 8)
    with pytest.raises(InputError, match="photos: found something that is no task"):
        prepare_folder(tmp_path / "photos", tmp_path / "photos", ["{c}"])
    assert len(list((tmp_path / "photos").rglob("*.png"))) == 4


# ------------------------------------------------------------------------------------------------- reference sets


def test_captions_are_kept_as_they_are(tmp_path: Path) -> None:
    content = "a dog\thttp://one\n\n a dog \thttp://two\r\ntwo\u2028lines\thttp://three\n\thttp://four\nno address\n"
    (tmp_path / "Validation.tsv").write_bytes(content.encode())
    assert write_captions(tmp_path / "Validation.tsv", tmp_path / "set") == 4
    assert (tmp_path / "set/captions.txt").read_text() == "a dog\na dog\ntwo lines\nno address\n"
    assert write_captions(tmp_path / "Validation.tsv", tmp_path / "set") == 4
    (tmp_path / "other.txt").write_text("a cat\n")
    with pytest.raises(InputError, match=r"captions\.txt: found other captions there"):
        write_captions(tmp_path / "other.txt", tmp_path / "set")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(None, "found no such file"), (b"\n \n", "found no caption"), ("ü".encode("latin-1"), "found no UTF-8 text")],
)
def test_names_what_a_caption_file_lacks(content: bytes | None, sentence: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "captions.tsv").write_bytes(content)
    with pytest.raises(InputError, match=rf"captions\.tsv: {sentence}"):
        write_captions(tmp_path / "captions.tsv", tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_a_tree_of_imagenet_is_a_reference_set(tmp_path: Path) -> None:
    for seed, wnid in enumerate(("n01440764", "n01443537")):
        for number, (image, _) in enumerate(coloured(3, seed)):
            (tmp_path / "train" / wnid).mkdir(parents=True, exist_ok=True)
            (tmp_path / "train" / wnid / f"{wnid}_{number}.JPEG").write_bytes(image)
    (tmp_path / "captions.tsv").write_text("one\thttp://a\ntwo\thttp://b\n")
    write_captions(tmp_path / "captions.tsv", tmp_path / "train")
    reference = ReferenceSet(Reference.model_validate(str(tmp_path / "train")))
    assert len(list(reference.images.once(0, 1))) == 6
    assert reference.texts == ["one", "two"]


# --------------------------------------------------------------------------------------------------------- copies


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[[Path], None]]:
    """The network, made up: repositories by name, written where a download would lie."""
    repositories: dict[str, Callable[[Path], None]] = {}

    def snapshot_download(repository: str, *, repo_type: str, local_dir: str, allow_patterns: list[str]) -> str:
        assert repo_type == "dataset"
        if repository not in repositories:
            raise OSError(f"no {repository}\nhere")
        repositories[repository](Path(local_dir))
        return local_dir

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return repositories


def copy_of(classes: list[str], splits: tuple[str, ...] = ("train", "test")) -> Callable[[Path], None]:
    """A copy as CLIP_benchmark exports it: no manifest, keys of its own, templates of its own."""

    def write(folder: Path) -> None:
        samples = [(image, label % len(classes)) for image, label in coloured(10, 0)]
        write_task(
            folder, classes, ["theirs {c}"], dict.fromkeys(splits, samples), suffix="webp", source="", shard_images=4
        )
        (folder / "zscl.json").unlink()
        (folder / "README.md").write_text("theirs")

    return write


def test_fetches_a_copy_with_our_words_over_theirs(tmp_path: Path, hub: dict[str, Callable[[Path], None]]) -> None:
    hub["clip-benchmark/wds_vtab-flowers"] = copy_of(["pink primrose", "globe-flower", "ball moss"])
    fetched = fetch("Flowers", tmp_path)
    task = opened(tmp_path / "Flowers")
    task.check()
    assert task.classnames == ("pink primrose", "globe flower", "air plant")
    assert list(task.templates) == templates_of("Flowers")
    assert fetched.images == {"train": 10, "test": 10}
    assert "'ball moss' is 'air plant' here" in fetched.notes[1]
    manifest = json.loads((tmp_path / "Flowers/zscl.json").read_text())
    assert (manifest["split_family"], manifest["source"]) == ("clip-benchmark-wds", "clip-benchmark/wds_vtab-flowers")
    assert [shard["samples"] for shard in manifest["splits"]["test"]] == [4, 4, 2]
    assert [place.name for place in tmp_path.iterdir() if not place.name.startswith(".")] == ["Flowers"]
    hub.clear()
    assert fetch("Flowers", tmp_path).kept


def test_a_copy_without_a_train_split_says_so(tmp_path: Path, hub: dict[str, Callable[[Path], None]]) -> None:
    hub["clip-benchmark/wds_sun397"] = copy_of(["abbey", "apartment building/outdoor"], ("test",))
    fetched = fetch("SUN397", tmp_path)
    assert fetched.images == {"test": 10}
    assert "a test split alone" in fetched.notes[0]
    assert opened(tmp_path / "SUN397").classnames == ("abbey", "apartment building outdoor")


def test_a_copy_keeps_its_own_label_order(tmp_path: Path, hub: dict[str, Callable[[Path], None]]) -> None:
    hub["clip-benchmark/wds_vtab-caltech101"] = copy_of(["accordion", "airplane", "background", "off-center face"])
    fetched = fetch("Caltech101", tmp_path)
    assert opened(tmp_path / "Caltech101").classnames == ("accordion", "airplane", "background", "off-center face")
    assert "a class more: the background" in fetched.notes[0]


def test_a_suite_that_shows_drift_keeps_its_words_and_has_a_test_split_alone(
    tmp_path: Path, hub: dict[str, Callable[[Path], None]]
) -> None:
    hub["clip-benchmark/wds_imagenet-r"] = copy_of(["goldfish", "great white shark"])
    fetched = fetch("ImageNet-R", tmp_path)
    assert (fetched.images, fetched.notes) == ({"test": 10}, ("200 classes",))
    task = opened(tmp_path / "ImageNet-R")
    assert (task.classnames, task.templates) == (("goldfish", "great white shark"), ("theirs {c}",))
    assert not (tmp_path / "ImageNet-R/train").exists()


def test_a_copy_that_is_broken_or_not_there(tmp_path: Path, hub: dict[str, Callable[[Path], None]]) -> None:
    with pytest.raises(InputError, match=r"Food: cannot download clip-benchmark/wds_food101 \(no .* here\)"):
        fetch("Food", tmp_path)

    def with_a_label_outside(folder: Path) -> None:
        copy_of(["apple pie", "baklava", "waffles", "ramen"])(folder)
        (folder / "classnames.txt").write_text("apple pie\n")

    hub["clip-benchmark/wds_food101"] = with_a_label_outside
    with pytest.raises(InputError, match=r"0\.tar: sample '0000001' has the label '1', expected 0 to 0"):
        fetch("Food", tmp_path)
    assert not (tmp_path / "Food").exists()


def test_every_task_has_a_copy_and_names() -> None:
    assert list(COPIES) == list(MTIL) == list(TEMPLATES)
    assert classnames_of("CIFAR100", ["aquarium_fish", "plain"]) == ["aquarium fish", "plain"]
