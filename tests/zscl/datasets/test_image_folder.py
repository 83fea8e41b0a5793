"""Tasks from image folders with one subfolder per class."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.data import coloured_images, open_task
from support.errors import refused

from schemas.errors import ErrorCode
from zscl.datasets.image_folder import prepare_folder


def sorted_by_class(folder: Path, count: int, suffixes: tuple[str, ...] = ("png", "JPEG")) -> None:
    for number, (image, label) in enumerate(coloured_images(count, seed=1)):
        class_folder = folder / ["rusty_red", "green-ish", "blue", "yellow"][label]
        class_folder.mkdir(parents=True, exist_ok=True)
        (class_folder / f"{number:03d}.{suffixes[number % len(suffixes)]}").write_bytes(image)


def test_a_folder_with_splits(tmp_path: Path) -> None:
    for split, count in (("train", 8), ("test", 4)):
        sorted_by_class(tmp_path / "photos" / split, count)
    prepared = prepare_folder(tmp_path / "photos", tmp_path / "task", ["a photo of a {c}.", "some {c}"])
    assert (prepared.images, prepared.split_family) == ({"train": 8, "test": 4}, "folder")
    task = open_task(tmp_path / "task")
    assert task.classnames == ("blue", "green ish", "rusty red", "yellow")
    assert [task.get_label(sample) for sample in task.train.iter_shard(0, 1)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert prepare_folder(tmp_path / "photos", tmp_path / "task", ["a photo of a {c}.", "some {c}"]).kept
    for change in ("template", "file"):
        if change == "file":
            shutil.copy(tmp_path / "photos/train/blue/002.png", tmp_path / "photos/train/blue/003.png")
        templates = ["another {c}"] if change == "template" else ["a photo of a {c}.", "some {c}"]
        with refused(ErrorCode.MISMATCH):
            prepare_folder(tmp_path / "photos", tmp_path / "task", templates)


def test_unexpected_content_is_noted(tmp_path: Path) -> None:
    sorted_by_class(tmp_path / "photos/colours", 8)
    sorted_by_class(tmp_path / "photos/others", 8)
    (tmp_path / "photos/others/blue/broken.png").write_bytes(b"no image")
    prepared = prepare_folder(tmp_path / "photos", tmp_path / "task", ["{c}"])
    classes, folders, unreadable = prepared.notes
    assert classes == "2 classes, named after their folders: colours, others"
    assert "were added to the class colours" in folders
    assert unreadable == "warning: skipped 1 file without image content (others/blue/broken.png)"
    names = [line for split in ("train", "test") for line in (tmp_path / "task" / split / "files.txt").open()]
    assert len(names) == 16


def test_a_key_is_the_line_of_its_file(tmp_path: Path) -> None:
    sorted_by_class(tmp_path / "photos", 12)
    assert len(prepare_folder(tmp_path / "photos", tmp_path / "task", ["{c}"]).notes) == 1
    task = open_task(tmp_path / "task")
    for split, samples in (("train", task.train), ("test", task.test)):
        names = (tmp_path / "task" / split / "files.txt").read_text().splitlines()
        for sample in samples.iter_shard(0, 1):
            assert (tmp_path / "photos" / names[int(sample.key)]).read_bytes() == sample.image


def test_a_folder_without_splits(tmp_path: Path) -> None:
    sorted_by_class(tmp_path / "photos", 20)
    found = {}
    for seed in (42, 7):
        prepared = prepare_folder(tmp_path / "photos", tmp_path / str(seed), ["{c}"], seed)
        assert (prepared.images, prepared.split_family) == ({"train": 16, "test": 4}, f"folder-seed{seed}")
        found[seed] = {sample.image for sample in open_task(tmp_path / str(seed)).test.iter_shard(0, 1)}
    assert found[42] != found[7]


@pytest.mark.parametrize(
    ("break_", "code", "content"),
    [
        (lambda photos: shutil.rmtree(photos), ErrorCode.NOT_FOUND, "photos: "),
        (lambda photos: shutil.rmtree(photos / "test"), ErrorCode.NOT_FOUND, "found only train/"),
        (lambda photos: shutil.rmtree(photos / "test/blue"), ErrorCode.MISMATCH, "'blue' in train/, but not in test/"),
        (lambda photos: (photos / "train/blue/new.bmp").touch(), ErrorCode.UNSUPPORTED, "blue/new.bmp"),
        (lambda photos: [f.unlink() for f in (photos / "train/blue").iterdir()], ErrorCode.EMPTY, "train/blue"),
        (lambda photos: [shutil.rmtree(photos / split) for split in ("train", "test")], ErrorCode.EMPTY, "photos: "),
        (lambda photos: [shutil.copytree(photos / split / "green-ish", photos / split / "green_ish")
                         for split in ("train", "test")], ErrorCode.DUPLICATE, "'green ish'"),
    ],
)  # fmt: skip
def test_an_invalid_folder_is_refused(
    break_: Callable[[Path], object], code: ErrorCode, content: str, tmp_path: Path
) -> None:
    for split in ("train", "test"):
        sorted_by_class(tmp_path / "photos" / split, 8)
    break_(tmp_path / "photos")
    with refused(code) as error:
        prepare_folder(tmp_path / "photos", tmp_path / "task", ["{c}"])
    assert content in str(error.value)
    assert not (tmp_path / "task").exists()


def test_a_folder_is_never_replaced_by_its_own_task(tmp_path: Path) -> None:
    sorted_by_class(tmp_path / "photos", 8)
    with refused(ErrorCode.MISMATCH):
        prepare_folder(tmp_path / "photos", tmp_path / "photos", ["{c}"])
    assert len(list((tmp_path / "photos").rglob("*.png"))) == 4


def test_system_files_are_no_images_and_linked_folders_are_read(tmp_path: Path) -> None:
    sorted_by_class(tmp_path / "photos", 20)
    for name in ("Thumbs.db", "blue/desktop.ini", "blue/._001.png", "blue/.DS_Store", "blue/.cache/1.png"):
        (tmp_path / "photos" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(b"x")
    (tmp_path / "photos/blue").rename(tmp_path / "blue")
    (tmp_path / "photos/blue").mkdir()
    (tmp_path / "photos/blue/linked").symlink_to(tmp_path / "blue")
    prepared = prepare_folder(tmp_path / "photos", tmp_path / "task", ["{c}"])
    assert prepared.images == {"train": 16, "test": 4}
    assert not any("left out" in note for note in prepared.notes)


def test_images_outside_the_class_folders_are_noted(tmp_path: Path) -> None:
    for split in ("train", "test"):
        sorted_by_class(tmp_path / "photos" / split, 8)
    sorted_by_class(tmp_path / "photos/val", 4)
    shutil.copy(tmp_path / "photos/train/blue/002.png", tmp_path / "photos/train/stray.png")
    (tmp_path / "photos/README").write_text("words")
    notes = prepare_folder(tmp_path / "photos", tmp_path / "task", ["{c}"]).notes
    assert any(
        note.startswith("warning: skipped 5 files outside the class folders (train/stray.png, val/") for note in notes
    )


def test_class_folders_and_files_may_have_any_name(tmp_path: Path) -> None:
    names = ["a b", "[c]{d}*?%", "\u00fcbung", "e\u2028f\ng", "n" * 250]
    for name in names:
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number, (image, _) in enumerate(coloured_images(4, seed=1)):
            (tmp_path / "photos" / name / f"{number}\udcff\n.png").write_bytes(image)
    prepare_folder(tmp_path / "photos", tmp_path / "a task", ["a photo of a {c}."])
    task = open_task(tmp_path / "a task")
    assert sorted(task.classnames) == sorted(["a b", "[c]{d}*?%", "\u00fcbung", "e f g", "n" * 250])
    task.check()
    files = (tmp_path / "a task/train/files.txt").read_text().splitlines()
    assert len(files) == len(list(task.train.iter_shard(0, 1))) == 16
    assert any(name.endswith("0\\xff\\n.png") for name in files)
    assert prepare_folder(tmp_path / "photos", tmp_path / "a task", ["a photo of a {c}."]).kept


@pytest.mark.parametrize("name", ["_", "--", "\udcff", " \u2028"])
def test_a_folder_whose_name_makes_no_class_name_is_refused(tmp_path: Path, name: str) -> None:
    sorted_by_class(tmp_path / "photos", 8)
    (tmp_path / "photos/blue").rename(tmp_path / "photos" / name)
    with refused(ErrorCode.INVALID_VALUE) as error:
        prepare_folder(tmp_path / "photos", tmp_path / "task", ["{c}"])
    assert "photos: found the folder" in str(error.value)


def test_a_template_is_one_line_with_a_class_name(tmp_path: Path) -> None:
    sorted_by_class(tmp_path / "photos", 8)
    with refused(ErrorCode.INVALID_VALUE, "--template") as error:
        prepare_folder(tmp_path / "photos", tmp_path / "task", ["a {c}\nwithout the class"])
    assert "expected one line" in str(error.value)
    with refused(ErrorCode.INVALID_VALUE, "--template") as error:
        prepare_folder(tmp_path / "photos", tmp_path / "task", ["a photo"])
    assert "expected {c}" in str(error.value)


def test_a_class_of_files_that_are_no_images_is_refused(tmp_path: Path) -> None:
    sorted_by_class(tmp_path / "photos", 8)
    for file in (tmp_path / "photos/blue").iterdir():
        file.write_bytes(b"no image")
    with refused(ErrorCode.EMPTY) as error:
        prepare_folder(tmp_path / "photos", tmp_path / "task", ["{c}"])
    assert "blue" in str(error.value)


def test_a_folder_name_becomes_one_line(tmp_path: Path) -> None:
    sorted_by_class(tmp_path / "photos", 12)
    (tmp_path / "photos/blue").rename(tmp_path / "photos/_b\u2028l\nue")
    prepare_folder(tmp_path / "photos", tmp_path / "task", ["{c}"])
    assert open_task(tmp_path / "task").classnames == ("b l ue", "green ish", "rusty red", "yellow")
    assert prepare_folder(tmp_path / "photos", tmp_path / "task", ["{c}"]).kept
    (tmp_path / "photos/yellow").rename(tmp_path / "photos/_-")
    with refused(ErrorCode.INVALID_VALUE) as error:
        prepare_folder(tmp_path / "photos", tmp_path / "other", ["{c}"])
    assert "'_-'" in str(error.value)
