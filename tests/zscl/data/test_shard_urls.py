"""Locations of shards: globs, brace ranges, folders, URLs, and the shard cache."""

import shutil
from pathlib import Path

import pytest
from support.data import coloured_images, fetch_first, sample_labels
from support.errors import refused

from schemas.errors import ErrorCode
from zscl.data.indexed import IndexedSamples
from zscl.data.shard_urls import open_samples
from zscl.data.streaming import StreamedSamples


def test_locations_may_be_globs_braces_folders_and_urls(shards: list[str]) -> None:
    folder = Path(shards[0]).parent
    for locations in ([f"{folder}/*.tar"], [f"{folder}/{{0..2}}.tar"], [str(folder)]):
        samples = open_samples(locations)
        assert isinstance(samples, IndexedSamples)
        assert len(samples) == 10
    assert isinstance(open_samples([f"file://{folder}/{{0..2}}.tar"]), StreamedSamples)


@pytest.mark.parametrize(
    ("location", "code"),
    [("missing.tar", ErrorCode.NOT_FOUND), ("*.nothing", ErrorCode.NOT_FOUND), (".", ErrorCode.EMPTY)],
)
def test_missing_shards_are_reported(tmp_path: Path, location: str, code: ErrorCode) -> None:
    with refused(code) as error:
        open_samples([str(tmp_path / location)])
    assert str(tmp_path / location) in str(error.value)


def test_a_cache_makes_remote_shards_local_ones_once(shards: list[str], tmp_path: Path) -> None:
    urls, cache = [f"file://{shard}" for shard in shards], tmp_path / "cache"
    cached = open_samples(urls, str(cache))
    assert isinstance(cached, IndexedSamples)
    local = open_samples(shards)
    assert sample_labels(fetch_first(cached.iter_positions(range(25), seed=3))) == sample_labels(
        fetch_first(local.iter_positions(range(25), seed=3))
    )
    times = [file.stat().st_mtime_ns for file in sorted(cache.rglob("*.tar"))]
    open_samples(urls, str(cache))
    assert [file.stat().st_mtime_ns for file in sorted(cache.rglob("*.tar"))] == times
    shutil.copy(shards[2], shards[0])  # another size
    assert sample_labels(open_samples(urls, str(cache)).iter_shard()) == [8, 9, 4, 5, 6, 7, 8, 9]
    with refused(ErrorCode.NOT_FOUND) as error:
        open_samples([f"file://{tmp_path}/nowhere.tar"], str(cache))
    assert "nowhere.tar" in str(error.value)


def test_remote_globs_are_listed(shards: list[str]) -> None:
    folder = Path(shards[0]).parent
    assert sample_labels(open_samples([f"file://{folder}/*.tar"]).iter_shard()) == list(range(10))
    with refused(ErrorCode.NOT_FOUND):
        open_samples([f"file://{folder}/*.nothing"])


@pytest.mark.parametrize("location", ["{0..999999999999}.tar", "{{0..9999}{0..9999}x}.tar", "{a,b", "{" * 1_000])
@pytest.mark.timeout(300)
def test_an_invalid_or_too_long_range_is_refused_immediately(location: str) -> None:
    with refused(ErrorCode.INVALID_VALUE):
        open_samples([location])


def test_a_presigned_url_is_no_pattern_and_names_no_file(tmp_path: Path) -> None:
    url = "http://127.0.0.1:9/0.tar?X-Amz-Signature=5ignature"
    samples = open_samples([url])
    assert isinstance(samples, StreamedSamples)
    assert samples.urls == [url]
    assert samples.digest == StreamedSamples([url.replace("5ignature", "another")]).digest
    with refused(ErrorCode.UNREACHABLE) as error:
        open_samples([url], str(tmp_path))
    assert "0.tar?X-Amz-Signature=***" in str(error.value)
    assert not any("ignature" in str(path) for path in tmp_path.rglob("*"))


def test_a_name_is_no_pattern_where_a_file_has_it(shards: list[str], tmp_path: Path) -> None:
    for name in ("a[0]{1,2} *?", "\u00fc::b%20", "n" * 250):
        folder = tmp_path / name
        folder.mkdir()
        for shard in shards:
            shutil.copy(shard, folder)
        assert sample_labels(open_samples([str(folder)]).iter_shard(0, 1)) == list(range(10))
        assert sample_labels(open_samples([f"{folder}/0.tar"]).iter_shard(0, 1)) == [0, 1, 2, 3]
    shutil.copy(shards[0], tmp_path / "[1]{2}.TAR")
    assert sample_labels(open_samples([f"{tmp_path}/[1]{{2}}.TAR"]).iter_shard(0, 1)) == [0, 1, 2, 3]


def test_linked_folders_are_followed_and_do_not_go_round(tmp_path: Path) -> None:
    images = [image for image, _ in coloured_images(2, 0)]
    (tmp_path / "far/away").mkdir(parents=True)
    (tmp_path / "far/away/1.png").write_bytes(images[1])
    (tmp_path / "here").mkdir()
    (tmp_path / "here/0.png").write_bytes(images[0])
    (tmp_path / "here/linked").symlink_to(tmp_path / "far")
    (tmp_path / "far/back").symlink_to(tmp_path / "here")
    assert [sample.image for sample in open_samples([f"{tmp_path}/here"]).iter_shard(0, 1)] == images


def test_a_pattern_may_mean_folders_too(shards: list[str], tmp_path: Path) -> None:
    for name, shard in (("a", shards[0]), ("b", shards[1])):
        (tmp_path / "sets" / name).mkdir(parents=True)
        shutil.copy(shard, tmp_path / "sets" / name)
    (tmp_path / "sets/.DS_Store").write_bytes(b"x")
    assert sample_labels(open_samples([f"{tmp_path}/sets/*"]).iter_shard(0, 1)) == list(range(8))


def test_loose_files_that_look_like_images_are_reported(tmp_path: Path) -> None:
    image = next(coloured_images(1, 0))[0]
    for name in ("0.png", "1.tif", "2.BMP", "3.heic", "plain", "4.JPG", "notes.md", "LICENSE", "x.json"):
        (tmp_path / name).write_bytes(b"words" if name in ("LICENSE", "notes.md") else image)
    for name in ("Thumbs.db", "desktop.ini", "._0.png", ".DS_Store"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    samples = open_samples([str(tmp_path)])
    assert isinstance(samples, IndexedSamples)
    assert [sample.key for sample in samples.iter_shard()] == ["0", "1", "2", "3", "4", "gone", "plain"]
    assert [(sample.key, sample.fault.reason) for sample in samples.faulty_samples() if sample.fault] == [
        ("1", "unsupported image format"), ("2", "unsupported image format"), ("3", "unsupported image format"),
        ("gone", "link"), ("plain", "unsupported image format"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("files", "code", "names"),
    [
        (["0.tar", "1.png"], ErrorCode.CONFLICT, "0.tar and 1.png"),
        (["0.tar", "more/1.tar"], ErrorCode.CONFLICT, "0.tar and more/1.tar"),
        (["more/1.tar"], ErrorCode.CONFLICT, "more/1.tar"),
        (["0.tar", "1.tar.gz"], ErrorCode.UNSUPPORTED, "1.tar.gz"),
        (["0.tif"], ErrorCode.EMPTY, "sample '0'"),
    ],
)
def test_a_folder_with_data_that_would_be_ignored_is_refused(
    shards: list[str], tmp_path: Path, files: list[str], code: ErrorCode, names: str
) -> None:
    for name in files:
        file = tmp_path / "data" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(shards[0], file)
    with refused(code) as error:
        open_samples([f"{tmp_path}/data"])
    assert names in str(error.value)
