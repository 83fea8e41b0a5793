"""Which samples lie where, in which order."""

import io
import pickle
import shutil
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
import webdataset
from conftest import coloured, make_task

from schemas.base import InputError
from zscl.files import patiently
from zscl.shards import Draw, IndexedSamples, Sample, StreamedSamples, open_samples, seed_of
from zscl.tasks import write_shards


@pytest.fixture
def shards(tmp_path: Path) -> list[str]:
    """Three shards of 4, 4 and 2 samples."""
    write_shards(tmp_path, ({"png": image, "cls": str(n).encode()} for n, (image, _) in enumerate(coloured(10, 0))), 4)
    return [str(tmp_path / f"{index}.tar") for index in range(3)]


def first(draws: Iterator[Draw]) -> Iterator[Sample]:
    return (draw(0) for draw in draws)


def labels(samples: object) -> list[int]:
    return [int(sample.label) for sample in samples]  # type: ignore[attr-defined]


@pytest.mark.parametrize("remote", [False, True])
def test_once_gives_every_sample_to_exactly_one_part(shards: list[str], remote: bool) -> None:
    samples = StreamedSamples([f"file://{shard}" for shard in shards]) if remote else open_samples(shards)
    assert labels(samples.once(0, 1)) == list(range(10))
    for parts in (1, 2, 3, 11):
        found = [label for part in range(parts) for label in labels(samples.once(part, parts))]
        assert sorted(found) == list(range(10))


@pytest.mark.parametrize("remote", [False, True])
def test_the_endless_order_is_a_pure_function_of_seed_and_position(shards: list[str], remote: bool) -> None:
    samples = StreamedSamples([f"file://{shard}" for shard in shards]) if remote else open_samples(shards)
    order = labels(first(samples.at(range(30), seed=5)))
    assert [sorted(order[start : start + 10]) for start in (0, 10, 20)] == [list(range(10))] * 3
    assert order[:10] != order[10:20]
    assert labels(first(samples.at(range(13, 27), seed=5))) == order[13:27]
    assert labels(first(samples.at([1, 2, 17], seed=5))) == [order[1], order[2], order[17]]
    assert labels(first(samples.at(range(10), seed=6))) != order[:10]


def test_locations_may_be_globs_braces_folders_and_urls(shards: list[str]) -> None:
    folder = Path(shards[0]).parent
    for locations in ([f"{folder}/*.tar"], [f"{folder}/{{0..2}}.tar"], [str(folder)]):
        found = open_samples(locations)
        assert isinstance(found, IndexedSamples)
        assert len(found) == 10
    assert isinstance(open_samples([f"file://{folder}/{{0..2}}.tar"]), StreamedSamples)


def test_loose_images_are_samples_too(tmp_path: Path) -> None:
    for index, (image, _) in enumerate(coloured(3, 0)):
        (tmp_path / f"{index}.png").write_bytes(image)
    (tmp_path / "1.txt").write_text("a caption\n")
    (tmp_path / ".DS_Store").write_bytes(b"x")
    (tmp_path / "0.png").rename(tmp_path / "0.v2.png")
    samples = open_samples([str(tmp_path)])
    assert [(sample.key, sample.text) for sample in samples.once(0, 1)] == [
        ("0.v2", None), ("1", b"a caption\n"), ("2", None),
    ]  # fmt: skip
    assert isinstance(samples, IndexedSamples)
    assert list(samples.texts()) == ["a caption"]


def test_only_images_labels_and_texts_are_read(tmp_path: Path) -> None:
    image = next(coloured(1, 0))[0]
    write_shards(
        tmp_path, [{"pkl": b"cos\nsystem\n(S'touch stolen'\ntR."}, {"png": image, "pth": b"x", "cls": b"0"}], 9
    )
    [sample] = open_samples([str(tmp_path)]).once(0, 1)
    assert (sample.image, sample.label, sample.text, sample.key) == (image, b"0", None, "0000001")


def test_dot_files_in_a_shard_are_passed_over(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, content in (("._0.png", b"no image"), (".DS_Store", b"x"), ("a/0.png", b"image"), ("a/0.cls", b"0")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    [sample] = open_samples([str(tmp_path)]).once(0, 1)
    assert (sample.image, sample.label, sample.key) == (b"image", b"0", "a/0")


@pytest.mark.parametrize("kept", [0.1, 0.3])
def test_names_a_truncated_shard(shards: list[str], kept: float) -> None:
    content = Path(shards[1]).read_bytes()
    Path(shards[1]).write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(InputError, match=r"1\.tar: found a"):
        open_samples(shards)


def test_names_a_shard_cut_between_two_members(shards: list[str]) -> None:
    samples = open_samples(shards[1:2])
    assert isinstance(samples, IndexedSamples)
    _, offset, _ = samples.table[2, 0].tolist()
    Path(shards[1]).write_bytes(Path(shards[1]).read_bytes()[: offset - 512])
    with pytest.raises(InputError, match="without its end after 5 members"):
        open_samples(shards)


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


def test_names_a_missing_remote_shard(shards: list[str]) -> None:
    shutil.rmtree(Path(shards[0]).parent)
    with pytest.raises(InputError, match=r"file://.*0\.tar: found no readable shard"):
        list(islice(StreamedSamples([f"file://{shards[0]}"]).at(range(3), 0), 3))


def test_webdataset_runs_in_its_secure_mode() -> None:
    with pytest.raises(ValueError, match="not allowed for security reasons"):
        webdataset.autodecode.unpickle_loads(pickle.dumps("harmless"))


def test_seeds_do_not_depend_on_the_process() -> None:
    assert seed_of(0, 1, "task") == 46669659644933465
    assert seed_of(0, 1, "task") != seed_of(0, 11, "task")


def test_an_empty_shard_among_others_is_named(shards: list[str]) -> None:
    with tarfile.open(shards[1], "w"):
        pass
    with pytest.raises(InputError, match=r"1\.tar: found no image in the shard, expected at least one"):
        open_samples(shards)
    Path(shards[1]).write_bytes(b"")
    with pytest.raises(InputError, match=r"1\.tar: found a truncated or broken shard"):
        open_samples(shards)


def test_a_remote_shard_cut_between_two_samples_is_named(shards: list[str]) -> None:
    with tarfile.open(shards[0]) as tar:
        border = tar.getmembers()[4].offset
    shard = Path(shards[0])
    shard.write_bytes(shard.read_bytes()[:border])
    samples = StreamedSamples([f"file://{each}" for each in shards])
    with pytest.raises(InputError, match=r"file://.*0\.tar: found no readable shard \(it has no end\)"):
        list(samples.once())


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


@pytest.mark.timeout(30)
@pytest.mark.parametrize("suffix", ["png", "json"])
@pytest.mark.parametrize("remote", [False, True])
def test_a_member_larger_than_anything_is_refused_at_once(tmp_path: Path, suffix: str, remote: bool) -> None:
    info = tarfile.TarInfo(f"0.{suffix}")
    info.size = 2**60
    (tmp_path / "0.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + b"\0" * 10_240)
    with pytest.raises(InputError, match=r"0\.tar: found "):
        list(open_samples([f"file://{tmp_path}/0.tar" if remote else f"{tmp_path}/0.tar"]).once(0, 1))


def test_a_member_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for content in (b"one", b"other"):
            info = tarfile.TarInfo("0.png")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    with pytest.raises(InputError, match=r"0\.tar: found the member '0\.png' twice"):
        open_samples([f"{tmp_path}/0.tar"])
    with pytest.raises(InputError, match=r"0\.png: duplicate file name"):
        list(open_samples([f"file://{tmp_path}/0.tar"]).once(0, 1))


@pytest.mark.parametrize("location", ["{0..999999999999}.tar", "{{0..9999}{0..9999}x}.tar", "{a,b", "{" * 1_000])
@pytest.mark.timeout(30)
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


def test_shards_that_are_away_for_a_moment_are_waited_for(tmp_path: Path) -> None:
    samples = open_samples([str(make_task(tmp_path / "task", seed=0) / "train")])
    (tmp_path / "task").rename(tmp_path / "away")
    back = threading.Timer(0.5, (tmp_path / "away").rename, [tmp_path / "task"])
    back.start()
    assert len(list(samples.once(0, 1))) == 24
    back.join()


def test_shards_that_are_gone_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = open_samples([str(make_task(tmp_path / "task", seed=0) / "train")])
    shutil.rmtree(tmp_path / "task")
    monkeypatch.setattr("zscl.shards.patiently", partial(patiently, seconds=0.2))
    with pytest.raises(InputError, match=r"train/0\.tar: cannot be read any more \(No such file"):
        list(samples.once(0, 1))
