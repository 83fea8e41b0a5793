"""`zscl data prepare` and `zscl data fetch`: prepared folders, and error messages."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support.command import Command
from support.data import COLOURS, coloured_images, open_task
from support.dataset_trees import TREES

Zscl = Callable[..., Command]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_several_tasks_in_parallel(place: Path, zscl: Zscl) -> None:
    for task in ("DTD", "Food", "Aircraft"):
        TREES[task](place / "root")
    found = zscl("data", "prepare", "DTD", "Food", "--out", "mtil", "--root", "root", "--jobs", 2)
    assert found.code == 0, found.error
    assert f"{place}/mtil/DTD  3 train, 3 test images, split torchvision\n" in found.out
    assert "  DTD: these are not the images of the published results" in found.out
    assert "Food: 12 images written" in found.error
    again = zscl("data", "prepare", "Food", "Aircraft", "DTD", "--out", "mtil", "--root", "root", "--jobs", 1, "--json")
    tasks = json.loads(again.out)["tasks"]
    assert [(task["name"], task["kept"]) for task in tasks] == [("Food", True), ("Aircraft", False), ("DTD", True)]


def test_missing_local_copies_are_reported_before_anything_starts(place: Path, zscl: Zscl) -> None:
    for task in TREES:
        if task not in ("Food", "SUN397"):
            TREES[task](place / "root")
    found = zscl("data", "prepare", "mtil", "--out", "mtil", "--root", "root")
    assert (found.code, found.error) == (
        2, f"error: --root {place}/root: found no folder food-101, SUN397, expected the folders that torchvision "
        "unpacks for Food, SUN397\n",
    )  # fmt: skip
    found = zscl("data", "prepare", "mtil", "--out", "mtil")
    assert found.code == 2
    assert "StanfordCars: torchvision can no longer download this dataset, expected a local copy" in found.error
    assert not (place / "mtil").exists()


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_broken_copy_does_not_stop_the_other_tasks(jobs: int, place: Path, zscl: Zscl) -> None:
    for task in ("DTD", "Food", "Aircraft"):
        TREES[task](place / "root")
    (place / "root/food-101/meta/test.json").write_text("{")
    next((place / "root/dtd").rglob("*_0042.jpg")).unlink()
    arguments = ("DTD", "Food", "Aircraft", "--out", "mtil", "--root", "root", "--jobs", jobs)
    found = zscl("data", "prepare", *arguments)
    assert found.code == 2
    [sentence] = [line for line in found.error.splitlines() if line.startswith("error: ")]
    assert sentence.startswith("error: DTD: cannot read dtd/dtd/images/")
    assert sentence.endswith("(Food failed, too)")
    assert [task.name for task in (place / "mtil").iterdir()] == ["Aircraft"]


def test_a_folder_of_images(place: Path, zscl: Zscl) -> None:
    for number, (image, label) in enumerate(coloured_images(12, seed=0)):
        (place / "photos" / f"class_{label}").mkdir(parents=True, exist_ok=True)
        (place / "photos" / f"class_{label}" / f"{number}.png").write_bytes(image)
    arguments = ["photos", "--out", "tasks/mine", "--template", "a {c}", "--template", "the {c}", "--seed", 3]
    found = zscl("data", "prepare", "folder", *arguments)
    assert (found.code, found.out.splitlines()) == (0, [
        f"{place}/tasks/mine  9 train, 3 test images, split folder-seed3",
        "  mine: 4 classes, named after their folders: class 0, class 1, class 2, class 3",
    ])  # fmt: skip
    assert (place / "tasks/mine/zeroshot_classification_templates.txt").read_text() == "a {c}\nthe {c}\n"
    assert (place / "tasks/mine/classnames.txt").read_text().splitlines()[0] == "class 0"


def test_captions(place: Path, zscl: Zscl) -> None:
    (place / "Validation.tsv").write_text("a dog\thttp://one\na cat\thttp://two\n")
    found = zscl("data", "prepare", "captions", "Validation.tsv", "--out", "reference", "--json")
    taken = {"origin": "column 1 of 2 (tab-separated)", "first": ["a dog", "a cat"], "empty": 0}
    assert json.loads(found.out) == {"file": f"{place}/reference/captions.txt", "captions": 2, **taken}
    (place / "named.csv").write_text("title,caption\na title here,a dog in fog\n")
    assert (
        "expected exactly one; select it with: zscl data prepare captions named.csv --column"
        in zscl("data", "prepare", "captions", "named.csv", "--out", "named").error
    )
    found = zscl("data", "prepare", "captions", "named.csv", "--out", "named", "--column", "caption")
    assert found.out.endswith("1 captions: column 2 of 2, 'caption' (comma-separated); the first:\n  a dog in fog\n")


def test_fetch_reports_how_a_copy_differs(place: Path, zscl: Zscl, monkeypatch: pytest.MonkeyPatch) -> None:
    from zscl.datasets.task_writer import write_task

    def snapshot_download(repository: str, *, local_dir: str, **_: object) -> None:  # the network, made up
        assert repository == "clip-benchmark/wds_vtab-pets"
        splits = {split: list(coloured_images(4, 0)) for split in ("train", "test")}
        write_task(
            Path(local_dir), ["Abyssinian", "Beagle", "Pug", "Samoyed"], ["{c}"], splits, suffix="png", source=""
        )

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    found = zscl("data", "fetch", "OxfordPet", "--out", "copies")
    assert found.code == 0, found.error
    assert found.out == (
        f"{place}/copies/OxfordPet  4 train, 4 test images, split clip-benchmark-wds\n"
        "  OxfordPet: 80 % of the training images\n"
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["prepare", "mnist"], "data prepare: found the unknown name 'mnist'; did you mean 'MNIST'?"),
        (["prepare", "Food", "Flower"], "data prepare: found the unknown name 'Flower'; did you mean 'Flowers'?"),
        (["fetch", "StanfordCar"], "data fetch: found the unknown name 'StanfordCar'; did you mean 'StanfordCars'?"),
        (["prepare", "folder"], "data prepare: found 'folder', expected 'zscl data prepare folder DIR'"),
        (["prepare", "captions", "a", "b"], "found 'captions a b', expected 'zscl data prepare captions FILE'"),
        (["prepare", "embedded", "Food"], "found 'embedded Food', expected 'zscl data prepare embedded'"),
        (["prepare", "embedded", "--seed", "1"], "--seed cannot be used with 'embedded', only with 'folder'"),
        (["prepare", "folder", "x", "--root", "y"], "--root cannot be used with 'folder', only with tasks"),
        (["prepare", "folder", "x", "--template", "y"], "--template: found 'y', expected {c} in place of the class"),
        (["prepare", "captions", "none.tsv"], "none.tsv: found no such file, expected a caption file"),
    ],
)  # fmt: skip
def test_invalid_arguments(arguments: list[str], sentence: str, place: Path, zscl: Zscl) -> None:
    found = zscl("data", *arguments, "--out", "out")
    assert (found.code, found.out) == (2, "")
    assert sentence in found.error
    assert found.error.count("\n") == 1
    assert not (place / "out").exists()


@pytest.mark.parametrize("name", ["two words", "[a]{b,c}*?%20'", "\u00fcbung", "n" * 200])
def test_prepared_data_can_be_checked_and_opened(place: Path, zscl: Zscl, name: str) -> None:
    for split in ("train", "test"):
        for number, (image, label) in enumerate(coloured_images(8, seed=len(split))):
            folder = place / "photos" / split / f"{list(COLOURS)[label]} [{label}]{{x}} %"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number}.png").write_bytes(image)
        (place / "photos" / split / "Thumbs.db").write_bytes(b"x")
    made = zscl("data", "prepare", "folder", place / "photos", "--out", place / name)
    assert made.code == 0, made.error
    said = zscl("data", "check", place / name)
    assert said.code == 0, said.out
    assert open_task(place / name).train.iter_shard(0, 1)


def test_a_path_that_is_not_utf_8_is_refused(place: Path, zscl: Zscl) -> None:
    (place / "photos").mkdir()
    for arguments in (("prepare", "folder", place / "photos", "--out", place / "\udcff"), ("check", place / "\udcff")):
        said = zscl("data", *arguments)
        assert (said.code, "expected UTF-8" in said.error) == (2, True), said.error
