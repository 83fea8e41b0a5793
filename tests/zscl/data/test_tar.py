"""Tar shards: which members are read, and what is refused."""

import bz2
import gzip
import io
import lzma
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset
from support.data import coloured_images, write_tar
from support.errors import refused

from schemas.errors import ErrorCode
from zscl.data.indexed import IndexedSamples
from zscl.data.sample import BrokenSampleError, Sample
from zscl.data.shard_urls import open_samples
from zscl.data.tar import write_shards


def test_only_images_labels_and_texts_are_read(tmp_path: Path) -> None:
    image = next(coloured_images(1, 0))[0]
    write_shards(
        tmp_path, [{"pkl": b"cos\nsystem\n(S'touch stolen'\ntR."}, {"png": image, "pth": b"x", "cls": b"0"}], 9
    )
    foreign, sample = open_samples([str(tmp_path)]).iter_shard(0, 1)
    assert (sample.image, sample.label, sample.text, sample.key) == (image, b"0", None, "0000001")
    assert (foreign.image, foreign.label, foreign.text) == (b"", None, None)
    assert foreign.fault is not None  # it is counted, and not read


IMAGE = next(coloured_images(1, 0))[0]
WHOLE = [("w.png", IMAGE), ("w.cls", b"0")]


def read(folder: Path, remote: bool) -> list[Sample]:
    """All samples of `0.tar`, read as a local or as a streamed shard."""
    return list(open_samples([f"file://{folder}/0.tar" if remote else f"{folder}/0.tar"]).iter_shard(0, 1))


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize(
    "name", ["._0.png", ".DS_Store", "Thumbs.db", "a/desktop.ini", "__MACOSX/a/0.png", "a/.cache/0.png", "__meta__"]
)
def test_hidden_and_system_files_in_a_shard_are_no_data(tmp_path: Path, name: str, remote: bool) -> None:
    write_tar(tmp_path / "0.tar", [(name, b"x"), ("a/0.png", b"image"), ("a/0.cls", b"0")])
    [sample] = read(tmp_path, remote)
    assert (sample.image, sample.label, sample.key, sample.fault) == (b"image", b"0", "a/0", None)


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize(
    ("names", "key"),
    [
        (("v1.2.x.png", "v1.2.x.cls"), "v1.2.x"),
        (("a.b/c.d.JPG", "a.b/c.d.CLS"), "a.b/c.d"),
        (("./x.jpeg", "x.cls"), "x"),
        (("train/dog/x.webp", "./train/dog/x.cls"), "train/dog/x"),
        (("\u00fc \u8272 [1]{2}%20*.png", "\u00fc \u8272 [1]{2}%20*.cls"), "\u00fc \u8272 [1]{2}%20*"),
        (("n" * 250 + ".png", "n" * 250 + ".cls"), "n" * 250),
        (("d/" * 60 + "n" * 90 + ".png", "d/" * 60 + "n" * 90 + ".cls"), "d/" * 60 + "n" * 90),
        (("\udcff.png", "\udcff.cls"), "\\xff"),
    ],
)
@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_key_is_all_before_the_last_dot(
    tmp_path: Path, names: tuple[str, str], key: str, remote: bool, form: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if form == tarfile.USTAR_FORMAT and len(names[0]) > 200:
        pytest.skip("USTAR holds no such name")
    monkeypatch.setattr(tarfile.TarFile, "format", form)
    write_tar(tmp_path / "0.tar", [(names[0], IMAGE), (names[1], b"3"), *WHOLE])
    sample, _ = read(tmp_path, remote)
    assert (sample.image, sample.label, sample.key, sample.fault) == (IMAGE, b"3", key, None)


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize(
    ("members", "reason", "detail"),
    [
        *(([(f"x.{suffix}", IMAGE), ("x.cls", b"0")], "unsupported image format", f"found x.{suffix}")
          for suffix in ("bmp", "gif", "tif", "TIFF", "heic", "avif", "ppm")),
        ([("x.npy", b"x"), ("x.cls", b"0")], "no image member", "found x.cls alone|found x.npy, x.cls alone"),
        ([("x", IMAGE), ("x.cls", b"0")], "no image member", "found x.cls alone|found x, x.cls alone"),
        ([("x", IMAGE)], "no image member", "found x alone"),
        ([("x.npy", b"x")], "no image member", "found x.npy alone"),
        ([("x.cls", b"0")], "no image member", "found x.cls alone, expected one of .jpg"),
        ([("x.txt", b"text")], "no image member", "found x.txt alone"),
        ([("x.png", IMAGE), ("x.jpg", IMAGE), ("x.cls", b"0")], "several", "x.png and x.jpg, expected one image"),
        ([("x.png", IMAGE), ("x.PNG", IMAGE), ("x.cls", b"0")], "several", "x.png and x.PNG, expected one image"),
        ([("x.png", IMAGE), ("x.tif", IMAGE), ("x.cls", b"0")], "several", "x.png and x.tif, expected one image"),
        ([("x.png", IMAGE), ("x.cls", b"0"), ("x.CLS", b"1")], "several", "x.cls and x.CLS, expected one label"),
        ([("x.png", IMAGE), ("x.txt", b"a"), ("x.TXT", b"b")], "several", "x.txt and x.TXT, expected one text"),
        ([("x.png", b"->w.png"), ("x.cls", b"0")], "link", "found x.png, a link to w.png.*--hard-dereference"),
        ([("x.png", IMAGE), ("x.cls", b"->w.cls")], "link", "found x.cls, a link to w.cls"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("link", [tarfile.LNKTYPE, tarfile.SYMTYPE])
def test_an_unusable_sample_has_a_fault(
    tmp_path: Path, members: list[tuple[str, bytes]], reason: str, detail: str, remote: bool, link: bytes
) -> None:
    write_tar(tmp_path / "0.tar", [*WHOLE, *members], link)
    samples = {sample.key: sample for sample in read(tmp_path, remote)}
    assert samples.keys() == {"w", "x"}
    assert samples["w"].fault is None
    with pytest.raises(BrokenSampleError, match=rf"0\.tar: sample 'x' cannot be used \({reason}.*: .*({detail})"):
        samples["x"].check()


@pytest.mark.parametrize("remote", [False, True])
def test_members_of_other_kinds_belong_to_their_sample_wherever_they_are(tmp_path: Path, remote: bool) -> None:
    write_tar(tmp_path / "0.tar", [("w.json", b"{}"), *WHOLE, ("v.png", IMAGE), ("v.json", b"{}"), ("w.npy", b"x")])
    assert [(sample.key, sample.fault) for sample in read(tmp_path, remote)] == [("w", None), ("v", None)]


@pytest.mark.parametrize("remote", [False, True])
def test_the_key_of_an_input_includes_its_dots(tmp_path: Path, remote: bool) -> None:
    """As WebDataset has it, `x.input.jpg` belongs to `x.cls`: here both are named."""
    write_tar(tmp_path / "0.tar", [("x.input.jpg", IMAGE), ("x.cls", b"0")])
    image, label = read(tmp_path, remote)
    assert (image.key, image.label, image.fault) == ("x.input", None, None)
    assert (label.key, label.fault is None) == ("x", False)


def test_separated_members_are_joined_locally_and_refused_in_a_stream(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("a.cls", b"0"), ("b.cls", b"1"), ("a.png", IMAGE), ("b.png", IMAGE)])
    assert [(sample.key, sample.label) for sample in read(tmp_path, remote=False)] == [("a", b"0"), ("b", b"1")]
    with refused(ErrorCode.UNSUPPORTED) as error:
        read(tmp_path, remote=True)
    assert "0.tar: the members of the sample 'a' are not adjacent" in str(error.value)


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize("appended", ["tar", "bytes", "zeros"])
def test_tars_joined_by_cat_are_refused(tmp_path: Path, appended: str, remote: bool) -> None:
    file = write_tar(tmp_path / "0.tar", WHOLE)
    more = {"tar": file.read_bytes(), "bytes": b"more", "zeros": bytes(2**21)}[appended]
    file.write_bytes(file.read_bytes() + more)
    if appended == "zeros":
        assert len(read(tmp_path, remote)) == 1
        return
    with refused(ErrorCode.UNREADABLE) as error:
        read(tmp_path, remote)
    assert "0.tar: found more content after the end of the tar" in str(error.value)


@pytest.mark.parametrize("remote", [False, True])
def test_a_damaged_header_in_the_middle_does_not_end_a_shard(tmp_path: Path, remote: bool) -> None:
    file = write_tar(tmp_path / "0.tar", [*WHOLE, ("v.png", IMAGE), ("v.cls", b"0")])
    with tarfile.open(file) as tar:
        offset = tar.getmembers()[2].offset
    content = bytearray(file.read_bytes())
    content[offset] ^= 1
    file.write_bytes(content)
    with refused(ErrorCode.UNREADABLE) as error:
        read(tmp_path, remote)
    assert f"end of the tar at byte {offset}" in str(error.value)


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize(
    ("change", "content"),
    [
        (gzip.compress, "compressed by gzip, expected a plain tar; gunzip"),
        (bz2.compress, "compressed by bzip2"),
        (lzma.compress, "compressed by xz"),
        (lambda content: b"\x28\xb5\x2f\xfd" + content, "compressed by zstd"),
        (lambda content: b"PK\x03\x04" + content, "a zip archive"),
        (lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "a pointer of Git LFS"),
        (lambda content: b"<!DOCTYPE html><html></html>", "a page of HTML"),
    ],
)
def test_a_file_of_another_kind_is_identified(
    tmp_path: Path, change: Callable[[bytes], bytes], content: str, remote: bool
) -> None:
    file = write_tar(tmp_path / "0.tar", WHOLE)
    file.write_bytes(change(file.read_bytes()))
    with refused(ErrorCode.UNREADABLE) as error:
        read(tmp_path, remote)
    assert f"0.tar: found a file that is {content}" in str(error.value)


def test_a_member_name_may_equal_the_first_bytes_of_another_format(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("<a>.png", IMAGE), ("<a>.cls", b"0")])
    assert [sample.key for sample in read(tmp_path, remote=False)] == ["<a>"]


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_a_truncated_shard_is_refused(shards: list[str], share: float) -> None:
    content = Path(shards[1]).read_bytes()
    Path(shards[1]).write_bytes(content[: int(len(content) * share)])
    with refused(ErrorCode.UNREADABLE) as error:
        open_samples(shards)
    assert shards[1] in str(error.value)


def test_a_shard_truncated_between_two_members_is_refused(shards: list[str]) -> None:
    samples = open_samples(shards[1:2])
    assert isinstance(samples, IndexedSamples)
    _, offset, _ = samples.table[2, 0].tolist()
    Path(shards[1]).write_bytes(Path(shards[1]).read_bytes()[: offset - 512])
    with refused(ErrorCode.UNREADABLE) as error:
        open_samples(shards)
    assert "without its end mark after 5 members" in str(error.value)


def test_webdataset_runs_in_its_secure_mode() -> None:
    with pytest.raises(ValueError, match="not allowed for security reasons"):
        webdataset.autodecode.unpickle_loads(pickle.dumps("harmless"))


def test_an_empty_shard_among_others_is_refused(shards: list[str]) -> None:
    with tarfile.open(shards[1], "w"):
        pass
    with refused(ErrorCode.EMPTY) as error:
        open_samples(shards)
    assert shards[1] in str(error.value)
    Path(shards[1]).write_bytes(b"")
    with refused(ErrorCode.UNREADABLE) as error:
        open_samples(shards)
    assert shards[1] in str(error.value)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("suffix", ["png", "json"])
@pytest.mark.parametrize("remote", [False, True])
def test_a_too_large_member_is_refused_immediately(tmp_path: Path, suffix: str, remote: bool) -> None:
    info = tarfile.TarInfo(f"0.{suffix}")
    info.size = 2**60
    (tmp_path / "0.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + b"\0" * 10_240)
    with refused(ErrorCode.UNSUPPORTED if suffix == "png" else ErrorCode.UNREADABLE) as error:
        list(open_samples([f"file://{tmp_path}/0.tar" if remote else f"{tmp_path}/0.tar"]).iter_shard(0, 1))
    assert f"{tmp_path}/0.tar: found " in str(error.value)


def test_a_duplicate_member_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for content in (b"one", b"other"):
            info = tarfile.TarInfo("0.png")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    with refused(ErrorCode.DUPLICATE) as local:
        open_samples([f"{tmp_path}/0.tar"])
    with refused(ErrorCode.DUPLICATE) as streamed:
        list(open_samples([f"file://{tmp_path}/0.tar"]).iter_shard(0, 1))
    assert all("0.tar: found the member '0.png' twice" in str(error.value) for error in (local, streamed))


PNG_MEMBERS = [("x.png", IMAGE), ("x.cls", b"0"), ("x.txt", b"a dog")]


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize("order", ["first", "last", "between", "sorted"])
@pytest.mark.parametrize("folder", ["", "a.b/"])
@pytest.mark.parametrize(
    "side",
    [
        ("metadata.json",),
        ("url.txt", "syn.json", "paug.json", "pth.gz", "npz", "json"),
        ("alt.txt", "a.b.txt", "seg.npy", "TXT.bak"),
    ],
)
def test_members_under_a_longer_name_are_side_data_of_their_sample(
    tmp_path: Path, side: tuple[str, ...], folder: str, order: str, remote: bool
) -> None:
    sample = [(folder + name, content) for name, content in PNG_MEMBERS]
    side_data = [(f"{folder}x.{name}", b"http://a") for name in side]
    members = {
        "first": [*side_data, *sample],
        "last": [*sample, *side_data],
        "between": [*sample[:1], *side_data, *sample[1:]],
        "sorted": sorted([*sample, *side_data]),
    }[order]
    write_tar(tmp_path / "0.tar", [*WHOLE, *members, ("z.png", IMAGE)])
    samples = open_samples([f"file://{tmp_path}/0.tar" if remote else f"{tmp_path}/0.tar"])
    content = {item.key: (item.image, item.label, item.text, item.fault) for item in samples.iter_shard(0, 1)}
    assert content == {
        "w": (IMAGE, b"0", None, None),
        f"{folder}x": (IMAGE, b"0", b"a dog", None),
        "z": (IMAGE, None, None, None),
    }
    assert list(samples.iter_texts()) == ["a dog"]


@pytest.mark.parametrize("remote", [False, True])
def test_a_key_that_continues_anothers_keeps_its_text(tmp_path: Path, remote: bool) -> None:
    write_tar(tmp_path / "0.tar", [("v1.png", IMAGE), ("v1.2.txt", b"two"), ("v1.2.png", IMAGE), ("v1.3.txt", b"side")])
    assert [(sample.key, sample.text, sample.fault) for sample in read(tmp_path, remote)] == [
        ("v1", None, None),
        ("v1.2", b"two", None),
    ]


@pytest.mark.parametrize("apart", [["v1.2.txt", "v1.png", "v1.2.png"], ["v1.2.png", "v1.png", "v1.2.txt"]])
def test_a_text_apart_from_its_dotted_key_is_not_lost(tmp_path: Path, apart: list[str]) -> None:
    write_tar(tmp_path / "0.tar", [(name, b"two" if name.endswith("txt") else IMAGE) for name in apart])
    assert {(sample.key, sample.text) for sample in read(tmp_path, remote=False)} == {("v1", None), ("v1.2", b"two")}
    with refused(ErrorCode.UNSUPPORTED) as error:
        read(tmp_path, remote=True)
    assert "the sample 'v1.2' are not adjacent" in str(error.value)


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize(
    "name", ["x.seg.cls", "y.json", "y.meta.json", "y.url.txt", "README.txt", "a/x.json", "a/x.meta.json", "xy.txt"]
)
def test_members_without_an_image_are_counted_and_give_no_text(tmp_path: Path, name: str, remote: bool) -> None:
    write_tar(tmp_path / "0.tar", [(name, b"1"), *PNG_MEMBERS])
    samples = open_samples([f"file://{tmp_path}/0.tar" if remote else f"{tmp_path}/0.tar"])
    [unmatched] = [sample for sample in samples.iter_shard(0, 1) if sample.fault]
    assert unmatched.key == name.rpartition(".")[0]
    assert "no image member" in str(unmatched.as_error())
    assert list(samples.iter_texts()) == ["a dog"]
