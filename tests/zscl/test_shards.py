"""Where shards lie: locations of every kind, and the cache."""

import shutil
from pathlib import Path

import pytest
from conftest import first, labels

from schemas.base import InputError
from zscl.indexed_samples import IndexedSamples
from zscl.shards import open_samples
from zscl.streamed_samples import StreamedSamples


def test_locations_may_be_globs_braces_folders_and_urls(shards: list[str]) -> None:
    folder = Path(shards[0]).parent
    for locations in ([f"{folder}/*.tar"], [f"{folder}/{{0..2}}.tar"], [str(folder)]):
        found = open_samples(locations)
        assert isinstance(found, IndexedSamples)
        assert len(found) == 10
    assert isinstance(open_samples([f"file://{folder}/{{0..2}}.tar"]), StreamedSamples)


@pytest.mark.parametrize(
    ("location", "sentence"),
    [
        ("missing.tar", "found no such file"),
        ("*.nothing", "found no file of that pattern"),
        (".", "no .tar shard and no image"),
    ],
)
def test_names_what_is_missing(tmp_path: Path, location: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        open_samples([str(tmp_path / location)])


def test_a_cache_makes_remote_shards_local_ones_once(shards: list[str], tmp_path: Path) -> None:
    urls, cache = [f"file://{shard}" for shard in shards], tmp_path / "cache"
    cached = open_samples(urls, str(cache))
    assert isinstance(cached, IndexedSamples)
    local = open_samples(shards)
    assert labels(first(cached.at(range(25), seed=3))) == labels(first(local.at(range(25), seed=3)))
    times = [file.stat().st_mtime_ns for file in sorted(cache.rglob("*.tar"))]
    open_samples(urls, str(cache))
    assert [file.stat().st_mtime_ns for file in sorted(cache.rglob("*.tar"))] == times
    shutil.copy(shards[2], shards[0])  # another size
    assert labels(open_samples(urls, str(cache)).once()) == [8, 9, 4, 5, 6, 7, 8, 9]
    with pytest.raises(InputError, match=r"nowhere\.tar: found no readable shard"):
        open_samples([f"file://{tmp_path}/nowhere.tar"], str(cache))


def test_remote_globs_are_listed(shards: list[str]) -> None:
    folder = Path(shards[0]).parent
    assert labels(open_samples([f"file://{folder}/*.tar"]).once()) == list(range(10))
    with pytest.raises(InputError, match="found no file of that pattern"):
        open_samples([f"file://{folder}/*.nothing"])


@pytest.mark.parametrize("location", ["{0..999999999999}.tar", "{{0..9999}{0..9999}x}.tar", "{a,b", "{" * 1_000])
@pytest.mark.timeout(300)
def test_a_range_that_is_none_or_too_long_is_refused_at_once(location: str) -> None:
    with pytest.raises(InputError, match=r"found (no readable brace|a) range"):
        open_samples([location])


def test_a_presigned_url_is_no_pattern_and_names_no_file(tmp_path: Path) -> None:
    url = "http://127.0.0.1:9/0.tar?X-Amz-Signature=5ignature"
    samples = open_samples([url])
    assert isinstance(samples, StreamedSamples)
    assert samples.urls == [url]
    assert samples.digest == StreamedSamples([url.replace("5ignature", "another")]).digest
    with pytest.raises(InputError, match=r"0\.tar\?X-Amz-Signature=\*\*\*: found no readable shard"):
        open_samples([url], str(tmp_path))
    assert not any("ignature" in str(path) for path in tmp_path.rglob("*"))
