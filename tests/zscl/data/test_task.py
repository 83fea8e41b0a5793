"""Task folders and reference sets: what is read, and what is refused."""

import shutil
from pathlib import Path

import pytest
from support.data import coloured_images, make_task, open_task
from support.errors import refused

from schemas.data import Reference, Task
from schemas.errors import ErrorCode
from zscl.data.reference_set import ReferenceSet
from zscl.data.tar import write_shards
from zscl.data.task import TaskFolder
from zscl.datasets.task_writer import write_task


def test_names_a_sample_without_a_label(tmp_path: Path) -> None:
    folder = make_task(tmp_path / "task", seed=0)
    write_shards(folder / "test", ({"png": image} for image, _ in coloured_images(3, 0)), 9)
    (folder / "test/nshards.txt").write_text("1\n")
    with refused(ErrorCode.BROKEN_SAMPLES, "compute.max_broken_share") as error:
        open_task(folder).check()
    assert "test/0.tar: sample '0000000' has no .cls member" in str(error.value)


def test_the_digest_follows_the_prompts_and_the_shards(tmp_path: Path) -> None:
    folder = make_task(tmp_path / "task", seed=0)
    before = open_task(folder).digest
    (folder / "classnames.txt").write_text("red\ngreen\nblue\namber\n")
    renamed = open_task(folder).digest
    (folder / "zscl.json").unlink()
    by_size = open_task(folder).digest
    assert len({before, renamed, by_size}) == 3


def damage(folder: Path, how: str) -> None:
    match how:
        case "no folder":
            shutil.rmtree(folder)
        case "no class names":
            (folder / "classnames.txt").unlink()
        case "no classes":
            (folder / "classnames.txt").write_text("\n")
        case "no {c}":
            (folder / "zeroshot_classification_templates.txt").write_text("a photo\n")
        case "zero shards":
            (folder / "test/nshards.txt").write_text("0\n")
        case "a missing shard":
            (folder / "train/1.tar").unlink()
        case "a label outside":
            (folder / "classnames.txt").write_text("red\ngreen\nblue\n")
        case "a class without a name":
            (folder / "classnames.txt").write_text("red\n\nblue\nyellow\n")
        case "another encoding":
            (folder / "classnames.txt").write_bytes("r\u00f6t\ngr\u00fcn\nblau\ngelb\n".encode("latin-1"))
        case "a folder for a file":
            (folder / "classnames.txt").unlink()
            (folder / "classnames.txt").mkdir()
        case "a broken manifest":
            (folder / "zscl.json").write_text("{")
        case "another manifest":
            (folder / "zscl.json").write_text("[]")
        case "a changed shard":
            (folder / "zscl.json").write_text((folder / "zscl.json").read_text().replace('"bytes": ', '"bytes": 1'))


def open_and_check(folder: Path) -> str:
    task = open_task(folder)
    task.check()
    return task.digest


@pytest.mark.parametrize(
    ("how", "code", "content"),
    [
        ("no folder", ErrorCode.NOT_FOUND, "found no such folder"),
        ("no class names", ErrorCode.NOT_FOUND, "classnames.txt"),
        ("no classes", ErrorCode.EMPTY, "classnames.txt"),
        ("no {c}", ErrorCode.INVALID_VALUE, "the template 'a photo', expected one with {c}"),
        ("a class without a name", ErrorCode.INVALID_VALUE, "classnames.txt: line 2 is empty"),
        ("another encoding", ErrorCode.UNREADABLE, "classnames.txt: found no UTF-8 text"),
        ("a folder for a file", ErrorCode.UNREADABLE, "classnames.txt: found a folder"),
        ("a broken manifest", ErrorCode.UNREADABLE, "zscl.json: found an invalid manifest"),
        ("another manifest", ErrorCode.UNREADABLE, "zscl.json: found an invalid manifest"),
        ("zero shards", ErrorCode.INVALID_VALUE, "test/nshards.txt: found '0'"),
        ("a missing shard", ErrorCode.NOT_FOUND, "train/1.tar: found no such file, expected 3 shards"),
        ("a label outside", ErrorCode.BROKEN_SAMPLES, "sample '0000003' has the label '3', expected 0 to 2"),
        ("a changed shard", ErrorCode.MISMATCH, "according to zscl.json"),
    ],
)
def test_a_damaged_task_is_refused(tmp_path: Path, how: str, code: ErrorCode, content: str) -> None:
    folder = make_task(tmp_path / "task", seed=0)
    damage(folder, how)
    with refused(code) as error:
        open_and_check(folder)
    assert content in str(error.value)


def write_reference(folder: Path, captions: bool) -> str:
    samples = [
        {"png": image} | ({"txt": f"caption {label}".encode()} if captions else {})
        for image, label in coloured_images(6, 0)
    ]
    write_shards(folder, samples, 4)
    return str(folder)


def test_texts_come_from_members_a_file_or_captions_txt(tmp_path: Path) -> None:
    with_members, without = write_reference(tmp_path / "with", True), write_reference(tmp_path / "without", False)
    (tmp_path / "lines.txt").write_text("one\n\ntwo\nthree\n")
    (tmp_path / "without/captions.txt").write_text("four\n")
    assert ReferenceSet(Reference.model_validate(with_members)).texts == [f"caption {n % 4}" for n in range(6)]
    settings = {"images": with_members, "texts": str(tmp_path / "lines.txt")}
    assert ReferenceSet(Reference.model_validate(settings)).texts == ["one", "two", "three"]
    assert ReferenceSet(Reference.model_validate(settings | {"max_texts": 2})).texts == ["one", "two"]
    assert ReferenceSet(Reference.model_validate(without)).texts == ["four"]


def test_without_a_manifest_the_labels_count(tmp_path: Path) -> None:
    folders = [make_task(tmp_path / name / "task", seed=0) for name in ("a", "b")]
    image = list(coloured_images(24, 0))
    turned = [(png, (label + 1) % 4) for png, label in image]
    write_task(
        folders[1], ["red", "green", "blue", "yellow"], ["a task square of {c}", "some {c}"],
        {"train": turned, "test": coloured_images(10, 1)}, suffix="png", source="made by a test", shard_images=9,
    )  # fmt: skip
    for folder in folders:
        (folder / "zscl.json").unlink()
    assert open_task(folders[0]).digest != open_task(folders[1]).digest


@pytest.mark.parametrize("path", ["nowhere://bucket/task", "s3://bucket/task"])
def test_a_store_that_cannot_be_read_is_reported(path: str) -> None:
    with refused(ErrorCode.UNREADABLE) as error:
        TaskFolder.open(Task.model_validate(path))
    assert f"{path}/classnames.txt" in str(error.value)


def test_refuses_a_reference_set_without_texts(tmp_path: Path) -> None:
    with refused(ErrorCode.EMPTY, "reference.texts"):
        ReferenceSet(Reference.model_validate(write_reference(tmp_path / "without", False)))


def test_only_a_newline_ends_a_class_name(tmp_path: Path) -> None:
    folder = make_task(tmp_path / "task", seed=0)
    names = ["r\u2028ed", "gr\x85een", "bl\x0bu\x0ce", "yel\x1clow"]
    (folder / "classnames.txt").write_bytes(("\ufeff" + "\r\n".join(names) + "\r\n\r\n").encode())
    assert open_task(folder).classnames == tuple(names)
    for content, message in (
        (b"red\0\ngreen\n", "a NUL byte on line 1"),
        (b"red\ngr\reen\n", "a carriage return within a line on line 2"),
    ):
        (folder / "classnames.txt").write_bytes(content)
        with refused(ErrorCode.UNREADABLE) as error:
            open_task(folder)
        assert f"classnames.txt: found {message}" in str(error.value)
