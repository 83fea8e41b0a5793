"""What a tar shard holds: what is read of it, and what is refused."""

import io
import pickle
import tarfile
from pathlib import Path

import pytest
import webdataset
from conftest import coloured

from schemas.base import InputError
from zscl.indexed_samples import IndexedSamples
from zscl.shards import open_samples
from zscl.writing import write_shards


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


def test_webdataset_runs_in_its_secure_mode() -> None:
    with pytest.raises(ValueError, match="not allowed for security reasons"):
        webdataset.autodecode.unpickle_loads(pickle.dumps("harmless"))


def test_an_empty_shard_among_others_is_named(shards: list[str]) -> None:
    with tarfile.open(shards[1], "w"):
        pass
    with pytest.raises(InputError, match=r"1\.tar: found no image in the shard, expected at least one"):
        open_samples(shards)
    Path(shards[1]).write_bytes(b"")
    with pytest.raises(InputError, match=r"1\.tar: found a truncated or broken shard"):
        open_samples(shards)


@pytest.mark.timeout(300)
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
