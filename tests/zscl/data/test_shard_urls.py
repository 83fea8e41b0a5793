"""Where shards lie: locations of every kind, and the cache."""

import shutil
from pathlib import Path

import pytest
from support.data import coloured_images, fetch_first, sample_labels

from schemas.errors import InputError
from zscl.data.indexed import IndexedSamples
from zscl.data.shard_urls import open_samples
from zscl.data.streaming import StreamedSamples


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
    assert sample_labels(fetch_first(cached.iter_positions(range(25), seed=3))) == sample_labels(
        fetch_first(local.iter_positions(range(25), seed=3))
    )
    times = [file.stat().st_mtime_ns for file in sorted(cache.rglob("*.tar"))]
    open_samples(urls, str(cache))
    assert [file.stat().st_mtime_ns for file in sorted(cache.rglob("*.tar"))] == times
    shutil.copy(shards[2], shards[0])  # another size
    assert sample_labels(open_samples(urls, str(cache)).iter_shard()) == [8, 9, 4, 5, 6, 7, 8, 9]
    with pytest.raises(InputError, match=r"nowhere\.tar: found no readable shard"):
        open_samples([f"file://{tmp_path}/nowhere.tar"], str(cache))


def test_remote_globs_are_listed(shards: list[str]) -> None:
    folder = Path(shards[0]).parent
    assert sample_labels(open_samples([f"file://{folder}/*.tar"]).iter_shard()) == list(range(10))
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


def test_loose_files_that_look_like_images_are_named(tmp_path: Path) -> None:
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
    ("files", "sentence"),
    [
        (["0.tar", "1.png"], r"found 0\.tar and 1\.png in it, expected shards in the folder itself alone"),
        (["0.tar", "more/1.tar"], r"found 0\.tar and more/1\.tar in it"),
        (["more/1.tar"], r"found more/1\.tar and more/1\.tar in it|expected shards in the folder itself"),
        (["0.tar", "1.tar.gz"], r"1\.tar\.gz: found a compressed tar among the data"),
        (["0.tif"], r"sample '0' cannot be used \(unsupported image format.*found no image that can be read"),
    ],
)
def test_what_a_folder_would_leave_out_is_refused(
    shards: list[str], tmp_path: Path, files: list[str], sentence: str
) -> None:
    for name in files:
        file = tmp_path / "data" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(shards[0], file)
    with pytest.raises(InputError, match=sentence):
        open_samples([f"{tmp_path}/data"])
