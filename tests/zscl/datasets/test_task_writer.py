"""Written task folders."""

import json
from pathlib import Path

import pytest
from support.data import coloured_images, make_task, open_task
from support.errors import refused

from schemas.errors import ErrorCode
from zscl.datasets.task_writer import LabelledImage, write_task


def test_writes_the_layout_that_clip_benchmark_reads(tmp_path: Path) -> None:
    folder = make_task(tmp_path / "colours", seed=0, train=24, test=10, shard_images=9)
    assert sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()) == [
        "classnames.txt", "test/0.tar", "test/1.tar", "test/nshards.txt", "train/0.tar", "train/1.tar", "train/2.tar",
        "train/nshards.txt", "zeroshot_classification_templates.txt", "zscl.json",
    ]  # fmt: skip
    task = open_task(folder)
    assert task.prompts(task.templates[0])[0] == "a colours square of red"
    assert [task.get_label(sample) for sample in task.test.iter_shard(0, 1)] == [index % 4 for index in range(10)]
    task.check()


def test_same_samples_same_bytes(tmp_path: Path) -> None:
    digests = {open_task(make_task(tmp_path / parent / "same", seed=0)).digest for parent in ("a", "b")}
    assert len(digests) == 1
    assert open_task(make_task(tmp_path / "c" / "same", seed=1)).digest not in digests


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def failing() -> object:
        yield from coloured_images(3, 0)
        raise RuntimeError("source broke")

    with pytest.raises(RuntimeError, match="source broke"):
        write_task(tmp_path / "task", ["a"], ["{c}"], {"train": failing()}, suffix="png", source="test")  # type: ignore[dict-item]
    assert list(tmp_path.iterdir()) == []


def test_the_manifest_counts(tmp_path: Path) -> None:
    manifest = json.loads((make_task(tmp_path / "task", seed=0) / "zscl.json").read_text())
    assert [shard["samples"] for shard in manifest["splits"]["train"]] == [9, 9, 6]
    assert manifest["source"] == "made by a test"


@pytest.mark.parametrize("name", ["two\nlines", "two\u2028lines", "two\x85lines", "", " ", "nul\0"])
def test_a_class_name_or_template_that_is_no_line_is_refused(name: str, tmp_path: Path) -> None:
    splits = {split: coloured_images(4, 0) for split in ("train", "test")}
    for names, templates in (["red", name], ["{c}"]), (["red"], ["{c}", name]):
        with refused(ErrorCode.INVALID_VALUE) as error:
            write_task(tmp_path / "task", names, templates, splits, suffix="png", source="test")
        assert repr(name) in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_file_name_is_one_line_of_the_list(tmp_path: Path) -> None:
    image, _ = next(coloured_images(1, 0))
    files = [LabelledImage(image, 0, name) for name in ("a\nb.png", "c\u2028d.png", "e.png")]
    write_task(tmp_path / "task", ["red"], ["{c}"], {"train": files, "test": files}, source="test")
    assert (tmp_path / "task/train/files.txt").read_text().split("\n") == [
        r"'a\nb.png'",
        r"'c\u2028d.png'",
        "e.png",
        "",
    ]
