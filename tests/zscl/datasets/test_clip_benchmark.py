"""Ready-made copies, from a simulated hub."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support.data import coloured_images, open_task
from support.errors import refused

from schemas.errors import ErrorCode
from zscl.datasets.clip_benchmark import fetch
from zscl.datasets.mtil import templates_of
from zscl.datasets.task_writer import write_task


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[[Path], None]]:
    """A simulated hub: functions that write a repository, by its name."""
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
        samples = [(image, label % len(classes)) for image, label in coloured_images(10, 0)]
        write_task(
            folder, classes, ["theirs {c}"], dict.fromkeys(splits, samples), suffix="webp", source="", shard_images=4
        )
        (folder / "zscl.json").unlink()
        (folder / "README.md").write_text("theirs")

    return write


def test_a_copy_gets_the_published_texts(tmp_path: Path, hub: dict[str, Callable[[Path], None]]) -> None:
    hub["clip-benchmark/wds_vtab-flowers"] = copy_of(["pink primrose", "globe-flower", "ball moss"])
    fetched = fetch("Flowers", tmp_path)
    task = open_task(tmp_path / "Flowers")
    task.check()
    assert task.classnames == ("pink primrose", "globe flower", "air plant")
    assert list(task.templates) == templates_of("Flowers")
    assert fetched.images == {"train": 10, "test": 10}
    assert "'ball moss' by 'air plant'" in fetched.notes[1]
    manifest = json.loads((tmp_path / "Flowers/zscl.json").read_text())
    assert (manifest["split_family"], manifest["source"]) == ("clip-benchmark-wds", "clip-benchmark/wds_vtab-flowers")
    assert [shard["samples"] for shard in manifest["splits"]["test"]] == [4, 4, 2]
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == ["Flowers"]
    hub.clear()
    assert fetch("Flowers", tmp_path).kept


def test_a_copy_without_a_train_split_says_so(tmp_path: Path, hub: dict[str, Callable[[Path], None]]) -> None:
    hub["clip-benchmark/wds_sun397"] = copy_of(["abbey", "apartment building/outdoor"], ("test",))
    fetched = fetch("SUN397", tmp_path)
    assert fetched.images == {"test": 10}
    assert "only a test split" in fetched.notes[0]
    assert open_task(tmp_path / "SUN397").classnames == ("abbey", "apartment building outdoor")


def test_a_copy_keeps_its_own_label_order(tmp_path: Path, hub: dict[str, Callable[[Path], None]]) -> None:
    hub["clip-benchmark/wds_vtab-caltech101"] = copy_of(["accordion", "airplane", "background", "off-center face"])
    fetched = fetch("Caltech101", tmp_path)
    assert open_task(tmp_path / "Caltech101").classnames == ("accordion", "airplane", "background", "off-center face")
    assert "an additional class: the background" in fetched.notes[0]


def test_a_drift_copy_keeps_its_texts_and_has_only_a_test_split(
    tmp_path: Path, hub: dict[str, Callable[[Path], None]]
) -> None:
    hub["clip-benchmark/wds_imagenet-r"] = copy_of(["goldfish", "great white shark"])
    fetched = fetch("ImageNet-R", tmp_path)
    assert (fetched.images, fetched.notes) == ({"test": 10}, ("200 classes",))
    task = open_task(tmp_path / "ImageNet-R")
    assert (task.classnames, task.templates) == (("goldfish", "great white shark"), ("theirs {c}",))
    assert not (tmp_path / "ImageNet-R/train").exists()


def test_a_broken_or_missing_copy_is_refused(tmp_path: Path, hub: dict[str, Callable[[Path], None]]) -> None:
    with refused(ErrorCode.UNREACHABLE) as error:
        fetch("Food", tmp_path)
    assert "(no clip-benchmark/wds_food101 here)" in str(error.value)

    def with_a_label_outside(folder: Path) -> None:
        copy_of(["apple pie", "baklava", "waffles", "ramen"])(folder)
        (folder / "classnames.txt").write_text("apple pie\n")

    hub["clip-benchmark/wds_food101"] = with_a_label_outside
    with refused(ErrorCode.BROKEN_SAMPLES) as error:
        fetch("Food", tmp_path)
    assert "'0000001'" in str(error.value)
    assert not (tmp_path / "Food").exists()
