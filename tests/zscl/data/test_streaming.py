"""Streamed samples: missing and truncated remote shards."""

import shutil
import tarfile
from itertools import islice
from pathlib import Path

from support.errors import refused

from schemas.errors import ErrorCode
from zscl.data.streaming import StreamedSamples


def test_names_a_missing_remote_shard(shards: list[str]) -> None:
    shutil.rmtree(Path(shards[0]).parent)
    with refused(ErrorCode.NOT_FOUND) as error:
        list(islice(StreamedSamples([f"file://{shards[0]}"]).iter_positions(range(3), 0), 3))
    assert f"file://{shards[0]}" in str(error.value)


def test_a_remote_shard_cut_between_two_samples_is_named(shards: list[str]) -> None:
    with tarfile.open(shards[0]) as tar:
        border = tar.getmembers()[4].offset
    shard = Path(shards[0])
    shard.write_bytes(shard.read_bytes()[:border])
    samples = StreamedSamples([f"file://{path}" for path in shards])
    with refused(ErrorCode.UNREADABLE) as error:
        list(samples.iter_shard())
    assert "0.tar: found a shard without its end mark" in str(error.value)
