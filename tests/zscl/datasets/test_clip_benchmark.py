"""Ready-made copies, from a hub that is made up."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support.data import coloured, opened

from schemas.errors import InputError
from zscl.datasets.clip_benchmark import fetch
from zscl.datasets.mtil import templates_of
from zscl.datasets.task_writer import write_task


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
