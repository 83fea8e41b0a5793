"""Indexed samples: loose images, and shards on storage that is temporarily unavailable."""

import shutil
import threading
from functools import partial
from pathlib import Path

import pytest
from support.data import coloured_images, make_task
from support.errors import refused

from schemas.errors import ErrorCode
from zscl.data.indexed import IndexedSamples
from zscl.data.shard_urls import open_samples
from zscl.runtime.retry import retry_io


def test_loose_images_are_samples_too(tmp_path: Path) -> None:
    for index, (image, _) in enumerate(coloured_images(3, 0)):
        (tmp_path / f"{index}.png").write_bytes(image)
    (tmp_path / "1.txt").write_text("a caption\n")
    (tmp_path / ".DS_Store").write_bytes(b"x")
    (tmp_path / "0.png").rename(tmp_path / "0.v2.png")
    samples = open_samples([str(tmp_path)])
    assert [(sample.key, sample.text) for sample in samples.iter_shard(0, 1)] == [
        ("0.v2", None), ("1", b"a caption\n"), ("2", None),
    ]  # fmt: skip
    assert isinstance(samples, IndexedSamples)
    assert list(samples.iter_texts()) == ["a caption"]


def test_reading_is_retried_while_shards_are_unavailable(tmp_path: Path) -> None:
    samples = open_samples([str(make_task(tmp_path / "task", seed=0) / "train")])
    (tmp_path / "task").rename(tmp_path / "away")
    back = threading.Timer(0.5, (tmp_path / "away").rename, [tmp_path / "task"])
    back.start()
    assert len(list(samples.iter_shard(0, 1))) == 24
    back.join()


def test_missing_shards_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = open_samples([str(make_task(tmp_path / "task", seed=0) / "train")])
    shutil.rmtree(tmp_path / "task")
    monkeypatch.setattr("zscl.data.indexed.retry_io", partial(retry_io, timeout=0.2))
    with refused(ErrorCode.NOT_FOUND) as error:
        list(samples.iter_shard(0, 1))
    assert "train/0.tar: can no longer be read (No such file" in str(error.value)
