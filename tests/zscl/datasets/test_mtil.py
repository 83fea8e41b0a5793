"""Each of the eleven tasks, from tiny files in its own format, read by its torchvision class."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from support.data import coloured_images, open_task
from support.dataset_trees import TREES, Expected
from support.errors import refused

from schemas.errors import ErrorCode
from zscl.datasets.clip_benchmark import MTIL_COPIES
from zscl.datasets.mtil import MTIL, classnames_of, prepare, templates_of
from zscl.datasets.task_writer import LabelledImage, write_task

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
    folder = open_task(tmp_path / "out" / task)
    folder.check()
    count, first = TEMPLATES[task]
    assert (len(folder.templates), folder.templates[0]) == (count, first)
    for split, samples in (("train", folder.train), ("test", folder.test)):
        found = [(folder.classnames[folder.get_label(sample)], sample.image) for sample in samples.iter_shard(0, 1)]
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
    assert "not the images of the published results" in prepared.notes[0]
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
        samples = list(open_task(tmp_path / "out" / task).test.iter_shard(0, 1))
        for sample, (image, _) in zip(samples, dataset(tmp_path, train=False), strict=True):
            assert sample.image.startswith(b"\x89PNG")
            assert np.array_equal(np.array(Image.open(io.BytesIO(sample.image))), np.array(image))


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
    assert list(open_task(tmp_path / "out" / task).classnames) == [name for name in theirs if name != "background"]


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
    for name in ("a", "b"):
        TREES["SUN397"](tmp_path / name)
        prepare("SUN397", tmp_path / name / "out", tmp_path / name)
        manifests.append(json.loads((tmp_path / name / "out/SUN397/zscl.json").read_text()))
    assert manifests[0]["file_lists"] == manifests[1]["file_lists"]
    assert manifests[0]["file_lists"]["train"] != manifests[0]["file_lists"]["test"]


def copy_without(task: str, root: Path, break_: Callable[[Path], object]) -> Path:
    TREES[task](root)
    break_(root)
    return root


@pytest.mark.parametrize(
    ("task", "break_", "code", "content"),
    [
        ("DTD", lambda root: shutil.rmtree(root / "dtd"), ErrorCode.NOT_FOUND, "unpacks for DTD"),
        ("DTD", lambda root: next(root.rglob("banded_0042.jpg")).unlink(), ErrorCode.UNREADABLE, "banded_0042.jpg"),
        ("DTD", lambda root: shutil.rmtree(root / "dtd/dtd"), ErrorCode.UNREADABLE, "torchvision's DTD"),
        ("Food", lambda root: (root / "food-101/meta/test.json").write_text("{"), ErrorCode.UNREADABLE, "Food101"),
        ("Food", lambda root: (root / "food-101/meta/test.json").write_text('{"pie": []}'), ErrorCode.MISMATCH, "Food"),
        ("MNIST", lambda root: (root / "MNIST/raw/t10k-labels-idx1-ubyte").write_bytes(b"\0\0\x08"),
         ErrorCode.UNREADABLE, "torchvision's MNIST"),
    ],
)  # fmt: skip
def test_a_damaged_copy_is_refused(
    task: str, break_: Callable[[Path], object], code: ErrorCode, content: str, tmp_path: Path
) -> None:
    root = copy_without(task, tmp_path / "root", break_)
    with refused(code, "--root" if code == ErrorCode.NOT_FOUND else None) as error:
        prepare(task, tmp_path / "out", root)
    assert content in str(error.value)
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "out").glob("*"))


def test_existing_folders_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out/DTD").mkdir(parents=True)
    (tmp_path / "out/DTD/mine.txt").write_text("mine")
    TREES["DTD"](tmp_path)
    with refused(ErrorCode.MISMATCH) as error:
        prepare("DTD", tmp_path / "out", tmp_path)
    assert "out/DTD" in str(error.value)
    assert (tmp_path / "out/DTD/mine.txt").read_text() == "mine"
    copied = [LabelledImage(image, label, f"{label}.png") for image, label in coloured_images(2, 0)]
    write_task(
        tmp_path / "copies/DTD", ["a", "b"], ["{c}"], {"train": copied}, source="", split_family="clip-benchmark-wds"
    )
    with refused(ErrorCode.MISMATCH) as error:
        prepare("DTD", tmp_path / "copies", tmp_path)
    assert "'clip-benchmark-wds', expected 'torchvision'" in str(error.value)


def test_a_download_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(self: torchvision.datasets.DTD) -> None:  # only the network is simulated
        if not self._check_exists():
            TREES["DTD"](Path(self.root))
            if broken:
                raise OSError("connection lost")

    monkeypatch.setattr(torchvision.datasets.DTD, "_download", download)
    broken = True
    with refused(ErrorCode.UNREADABLE) as error:
        prepare("DTD", tmp_path / "out", None)
    assert "(connection lost)" in str(error.value)
    assert not list((tmp_path / "out").rglob("*.jpg"))
    broken = False
    assert prepare("DTD", tmp_path / "out", None).images == {"train": 3, "test": 3}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["DTD"]


def test_cars_cannot_be_downloaded(tmp_path: Path) -> None:
    with refused(ErrorCode.MISSING_VALUE, "--root") as error:
        prepare("StanfordCars", tmp_path, None)
    assert "stanford_cars/" in str(error.value)


def test_every_task_has_a_copy_and_names() -> None:
    assert list(MTIL_COPIES) == list(MTIL) == list(TEMPLATES)
    assert classnames_of("CIFAR100", ["aquarium_fish", "plain"]) == ["aquarium fish", "plain"]
