"""Remote samples: what cannot be streamed is named."""

import shutil
import tarfile
from itertools import islice
from pathlib import Path

import pytest

from schemas.errors import InputError
from zscl.data.streaming import StreamedSamples


def test_names_a_missing_remote_shard(shards: list[str]) -> None:
    shutil.rmtree(Path(shards[0]).parent)
    with pytest.raises(InputError, match=r"file://.*0\.tar: found no readable shard"):
        list(islice(StreamedSamples([f"file://{shards[0]}"]).iter_positions(range(3), 0), 3))


def test_a_remote_shard_cut_between_two_samples_is_named(shards: list[str]) -> None:
    with tarfile.open(shards[0]) as tar:
        border = tar.getmembers()[4].offset
    shard = Path(shards[0])
    shard.write_bytes(shard.read_bytes()[:border])
    samples = StreamedSamples([f"file://{each}" for each in shards])
    with pytest.raises(InputError, match=r"file://.*0\.tar: found no readable shard \(it has no end\)"):
        list(samples.iter_shard())
