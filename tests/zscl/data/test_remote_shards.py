"""Tasks and reference sets on S3, with a real client and a server on this machine."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from schemas.experiment import Experiment
from zscl.data.indexed import IndexedSamples
from zscl.data.shard_urls import open_samples
from zscl.data.streaming import StreamedSamples
from zscl.sequence.run import run_sequence

pytest_plugins = ["support.object_storage"]
CPU = torch.device("cpu")


def test_shards_on_s3_equal_local_ones(bucket: Any, tasks: list[str], tmp_path: Path) -> None:
    bucket.put(f"{tasks[0]}/train/", "bucket/task/train/", recursive=True)
    local = [sample.image for sample in open_samples([f"{tasks[0]}/train"]).iter_shard(0, 1)]
    for location in ("s3://bucket/task/train/{0..2}.tar", "s3://bucket/task/train/*.tar"):
        streamed = open_samples([location])
        assert isinstance(streamed, StreamedSamples)
        assert [sample.image for sample in streamed.iter_shard(0, 1)] == local
        copied = open_samples([location], shard_cache=str(tmp_path))
        assert isinstance(copied, IndexedSamples)
        assert [sample.image for sample in copied.iter_shard(0, 1)] == local


def test_a_run_from_s3_through_the_cache_is_the_local_run(
    bucket: Any, experiment: Callable[..., Experiment], tasks: list[str], reference: str, tmp_path: Path
) -> None:
    for path in tasks[:2]:
        bucket.put(f"{path}/", f"bucket/{Path(path).name}/", recursive=True)
    bucket.put(f"{reference}/", "bucket/reference/", recursive=True)
    captions = [sample.text or b"" for sample in open_samples([reference]).iter_shard(0, 1)]
    with bucket.open("bucket/captions.txt", "wb") as stream:
        stream.write(b"\n".join(captions))
    remote = {
        "tasks": [f"s3://bucket/{Path(path).name}" for path in tasks[:2]],
        "reference": {"images": ["s3://bucket/reference/{0..1}.tar"], "texts": "s3://bucket/captions.txt"},
    }
    cached = {"device": "cpu", "shard_cache": str(tmp_path / "cache")}
    matrices = [
        run_sequence(recipe, tmp_path / str(run) / "run", device=CPU).accuracy_matrix
        for run, recipe in enumerate([experiment(tasks=tasks[:2]), experiment(**remote, compute=cached)])
    ]
    assert matrices[0] == matrices[1]
    losses = [(tmp_path / str(run) / "run/stages/2-second/losses.csv").read_text() for run in range(2)]
    assert losses[0] == losses[1]
    streamed = run_sequence(experiment(**remote), tmp_path / "streamed/run", device=CPU)
    assert [task.test_images for task in streamed.tasks] == [10, 10]
