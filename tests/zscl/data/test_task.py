"""Task folders and reference sets: what is read, what is refused."""

import shutil
from pathlib import Path

import pytest
from support.data import coloured_images, make_task, open_task

from schemas.data import Reference, Task
from schemas.errors import InputError
from zscl.data.reference_set import ReferenceSet
from zscl.data.tar import write_shards
from zscl.data.task import TaskFolder
from zscl.datasets.task_writer import write_task


def test_names_a_sample_without_a_label(tmp_path: Path) -> None:
    folder = make_task(tmp_path / "task", seed=0)
    write_shards(folder / "test", ({"png": image} for image, _ in coloured_images(3, 0)), 9)
    (folder / "test/nshards.txt").write_text("1\n")
    with pytest.raises(InputError, match=r"test/0\.tar: sample '0000000' has no \.cls member, expected its label"):
        open_task(folder).check()


def test_the_digest_follows_the_prompts_and_the_shards(tmp_path: Path) -> None:
    folder = make_task(tmp_path / "task", seed=0)
    before = open_task(folder).digest
    (folder / "classnames.txt").write_text("red\ngreen\nblue\namber\n")
    renamed = open_task(folder).digest
    (folder / "zscl.json").unlink()
    by_size = open_task(folder).digest
    assert len({before, renamed, by_size}) == 3


def break_(folder: Path, how: str) -> None:
    match how:
        case "no folder":
            shutil.rmtree(folder)
        case "no class names":
            (folder / "classnames.txt").unlink()
        case "no classes":
            (folder / "classnames.txt").write_text("\n")
        case "no place for the class name":
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


def look_at(folder: Path) -> str:
    task = open_task(folder)
    task.check()
    return task.digest


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("no folder", "found no such folder, expected a task"),
        ("no class names", r"classnames\.txt: found no such file, expected class names"),
        ("no classes", r"classnames\.txt: found an empty file"),
        ("no place for the class name", r"found the template 'a photo', expected a \{c\}"),
        ("a class without a name", r"classnames\.txt: found line 2 empty, expected a class name"),
        ("another encoding", r"classnames\.txt: found no UTF-8 text"),
        ("a folder for a file", r"classnames\.txt: found no file but a folder"),
        ("a broken manifest", r"zscl\.json: found no manifest"),
        ("another manifest", r"zscl\.json: found no manifest"),
        ("zero shards", r"test/nshards\.txt: found '0', expected the number of shards, at least 1"),
        ("a missing shard", r"train/1\.tar: found no such file, expected 3 shards"),
        ("a label outside", r"train/0\.tar: sample '0000003' has the label '3', expected 0 to 2"),
        ("a changed shard", r"bytes, expected 1\d+ as zscl\.json"),
    ],
)
def test_names_what_is_wrong(tmp_path: Path, how: str, sentence: str) -> None:
    folder = make_task(tmp_path / "task", seed=0)
    break_(folder, how)
    with pytest.raises(InputError, match=sentence):
        look_at(folder)


def captioned(folder: Path, captions: bool) -> str:
    samples = [
        {"png": image} | ({"txt": f"caption {label}".encode()} if captions else {}) for image, label in coloured_images(6, 0)
    ]
    write_shards(folder, samples, 4)
    return str(folder)


def test_texts_come_from_members_a_file_or_captions_txt(tmp_path: Path) -> None:
    with_members, without = captioned(tmp_path / "with", True), captioned(tmp_path / "without", False)
    (tmp_path / "lines.txt").write_text("one\n\ntwo\nthree\n")
    (tmp_path / "without/captions.txt").write_text("four\n")
    assert ReferenceSet(Reference.model_validate(with_members)).texts == [f"caption {n % 4}" for n in range(6)]
    given = {"images": with_members, "texts": str(tmp_path / "lines.txt")}
    assert ReferenceSet(Reference.model_validate(given)).texts == ["one", "two", "three"]
    assert ReferenceSet(Reference.model_validate(given | {"max_texts": 2})).texts == ["one", "two"]
    assert ReferenceSet(Reference.model_validate(without)).texts == ["four"]


def test_without_a_manifest_the_labels_count(tmp_path: Path) -> None:
    folders = [make_task(tmp_path / place / "task", seed=0) for place in ("a", "b")]
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
def test_names_a_store_that_cannot_be_read(path: str) -> None:
    with pytest.raises(InputError, match=r"classnames\.txt: (cannot be read|found no such file)"):
        TaskFolder.open(Task.model_validate(path))


def test_refuses_a_reference_set_without_texts(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"reference: found no texts in .*expected \.txt members"):
        ReferenceSet(Reference.model_validate(captioned(tmp_path / "without", False)))


def test_only_a_newline_ends_a_class_name(tmp_path: Path) -> None:
    folder = make_task(tmp_path / "task", seed=0)
    names = ["r\u2028ed", "gr\x85een", "bl\x0bu\x0ce", "yel\x1clow"]
    (folder / "classnames.txt").write_bytes(("\ufeff" + "\r\n".join(names) + "\r\n\r\n").encode())
    assert open_task(folder).classnames == tuple(names)
    for content, found in (
        (b"red\0\ngreen\n", "a NUL byte on line 1"),
        (b"red\ngr\reen\n", "a carriage return .*line 2"),
    ):
        (folder / "classnames.txt").write_bytes(content)
        with pytest.raises(InputError, match=rf"classnames\.txt: found {found}"):
            open_task(folder)
