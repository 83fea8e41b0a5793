"""Inspection of damaged task folders: every kind of damage is reported with its location."""

import io
import json
import re
import shutil
import struct
import tarfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.data import COLOURS, coloured_images, jpeg, make_task, open_task, png, write_tar

from schemas.dataset_report import DatasetReport
from zscl.checks.contact_sheet import contact_rows
from zscl.checks.scan import MAX_LISTED, inspect_task
from zscl.checks.task_scan import scan_task
from zscl.data.tar import write_shards

Members = dict[str, bytes]


def inspect(folder: Path) -> DatasetReport:
    return inspect_task(scan_task(str(folder)))


def samples(count: int, seed: int) -> list[Members]:
    return [{"png": image, "cls": str(label).encode()} for image, label in coloured_images(count, seed)]


def rewrite(folder: Path, split: str, content: Sequence[Mapping[str, bytes]], shard_images: int = 9) -> None:
    """Replace the samples of a split, and delete the manifest."""
    (folder / "zscl.json").unlink(missing_ok=True)
    shutil.rmtree(folder / split)
    shards = write_shards(folder / split, content, shard_images)
    (folder / split / "nshards.txt").write_text(f"{len(shards)}\n")


def bomb(edge: int = 20_000) -> bytes:
    """A PNG whose header promises 400 million pixels."""
    small = png((1, 2, 3), np.random.default_rng(0))
    header = b"IHDR" + struct.pack(">II", edge, edge) + small[24:29]
    return small[:12] + header + struct.pack(">I", zlib.crc32(header)) + small[33:]


@pytest.fixture
def task(tmp_path: Path) -> Path:
    return make_task(tmp_path / "task", seed=0)


def test_a_clean_task(task: Path) -> None:
    report = inspect(task)
    assert (report.problems, report.warnings, report.manifest) == ((), (), True)
    train, test = report.splits
    assert (train.split, train.shards, train.samples, train.images, train.per_class) == ("train", 3, 24, 24, (6,) * 4)
    assert (test.split, test.shards, test.images, test.per_class) == ("test", 2, 10, (3, 3, 2, 2))
    assert (train.formats, train.modes) == ({"PNG": 24}, {"RGB": 24})
    assert train.width is not None
    assert train.width.model_dump() == {"min": 16, "median": 16, "max": 16}
    assert [shard.shard for shard in report.shards] == [
        "train/0.tar", "train/1.tar", "train/2.tar", "test/0.tar", "test/1.tar",
    ]  # fmt: skip
    assert DatasetReport.model_validate_json(report.model_dump_json()) == report


def test_every_sample_that_cannot_be_used_is_named(task: Path) -> None:
    content = samples(24, 0)
    content[2]["png"] = jpeg()[:1500]
    content[5]["png"] = b"<html>404</html>"
    content[10]["png"] = bomb()
    del content[11]["cls"]
    content[13]["cls"] = b"4"
    content[20] = {"txt": b"no picture", "cls": b"1"}
    content[21] = {"png": b"", "cls": b"green"}
    rewrite(task, "train", content)
    report = inspect(task)
    assert [(sample.shard, sample.key, sample.reason) for sample in report.unreadable.first] == [
        ("train/0.tar", "0000002", "truncated image"),
        ("train/0.tar", "0000005", "not an image"),
        ("train/1.tar", "0000010", "decompression bomb"),
        ("train/1.tar", "0000011", "no label"),
        ("train/1.tar", "0000013", "label outside the class list"),
        ("train/2.tar", "0000020", "no image member"),
        ("train/2.tar", "0000021", "not an image"),
        ("train/2.tar", "0000021", "label outside the class list"),
    ]
    assert report.unreadable.samples == 7
    assert report.unreadable.reasons["not an image"] == 2
    assert report.unreadable.first[4].detail == "found '4', expected 0 to 3"
    assert "0x" not in report.unreadable.first[1].detail  # no memory address
    assert (report.splits[0].samples, report.splits[0].images) == (24, 17)
    [problem] = report.problems
    assert problem.startswith("found 7 samples that cannot be used (")


def test_all_are_counted_and_the_first_are_listed(task: Path) -> None:
    rewrite(task, "test", [{"png": b"nothing", "cls": b"0"} for _ in range(MAX_LISTED + 5)])
    report = inspect(task)
    assert (report.unreadable.samples, len(report.unreadable.first)) == (MAX_LISTED + 5, MAX_LISTED)
    assert report.within_splits.pairs == 0  # unreadable images are not duplicates
    assert "test: found no usable sample, expected at least one" in report.problems


def test_duplicates_between_and_within_splits(task: Path) -> None:
    train, test = samples(24, 0), samples(10, 1)
    train[20] = train[3] | {"cls": b"0"}  # label 3 first
    test[4] = train[12]
    rewrite(task, "train", train)
    rewrite(task, "test", test)
    report = inspect(task)
    [pair] = report.between_splits.first
    assert (pair.first.shard, pair.first.key) == ("train/1.tar", "0000012")
    assert (pair.again.shard, pair.again.key) == ("test/0.tar", "0000004")
    [pair] = report.within_splits.first
    assert (pair.first.shard, pair.first.key, pair.first.label) == ("train/0.tar", "0000003", 3)
    assert (pair.again.shard, pair.again.key, pair.again.label) == ("train/2.tar", "0000020", 0)
    assert (report.between_splits.of_other_label, report.within_splits.of_other_label) == (0, 1)
    assert report.problems == ("found 1 test image among the training images, expected none",)
    assert report.warnings == ("found 1 image repeated within a split (1 with another label)",)


def change_a_byte(file: Path) -> None:
    """Same size, same members, another byte in the padding of the first header."""
    content = bytearray(file.read_bytes())
    content[511] ^= 1  # the padding after the header's fields, which the checksum covers
    total = int(content[148:154], 8) + 1
    content[148:154] = f"{total:06o}".encode()
    file.write_bytes(content)


def add_a_sample(file: Path) -> None:
    with tarfile.open(file, "a") as tar:
        for suffix, content in samples(1, 77)[0].items():
            info = tarfile.TarInfo(f"added.{suffix}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def cut_in_half(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize(
    ("change", "problems"),
    [
        (change_a_byte, ["found the SHA-256"]),
        (add_a_sample, ["found 10 samples, expected 9"]),
        (cut_in_half, ["found a (truncated or damaged shard|shard without its end)", r"found \d+ bytes, expected \d+"]),
        (Path.unlink, ["found no such file, expected a shard"]),
    ],
)
def test_a_changed_shard(task: Path, change: Callable[[Path], None], problems: list[str]) -> None:
    change(task / "train/1.tar")
    report = inspect(task)
    [wrong] = [shard for shard in report.shards if shard.problems]
    assert wrong.shard == "train/1.tar"
    assert len(wrong.problems) >= len(problems)
    for expected, problem in zip(problems, wrong.problems, strict=False):
        assert re.match(f"train/1\\.tar: {expected}", problem)
    assert set(wrong.problems) <= set(report.problems)


def test_shards_that_differ_from_the_manifest(task: Path) -> None:
    (task / "train/nshards.txt").write_text("2\n")
    report = inspect(task)
    assert report.problems == ("zscl.json: found train/2.tar, expected only shards listed in nshards.txt",)
    assert report.warnings == (
        "train: found 1 shard (2.tar) beyond the number in nshards.txt; extra shards are never read",
    )
    manifest = json.loads((task / "zscl.json").read_text())
    del manifest["splits"]["train"][1:]
    (task / "zscl.json").write_text(json.dumps(manifest))
    [problem] = inspect(task).problems
    assert problem == "train/1.tar: found a shard that is not in zscl.json"
    (task / "zscl.json").write_text("[]")
    [problem] = inspect(task).problems
    assert problem.startswith("zscl.json: found an invalid manifest (")


def test_classes_without_images(task: Path) -> None:
    rewrite(task, "test", [sample for sample in samples(10, 1) if sample["cls"] != b"2"])
    report = inspect(task)
    assert report.splits[1].empty_classes == (2,)
    assert report.problems == ("test: found no image of 1 class (blue), expected at least one of each",)
    rewrite(task, "train", [sample for sample in samples(24, 0) if sample["cls"] != b"2"])
    report = inspect(task)
    assert report.classnames.unused == (2,)
    assert report.problems == ()
    assert report.warnings == ("classnames.txt: found 1 class (blue) without images in both splits",)


def test_class_names_and_templates(task: Path) -> None:
    (task / "classnames.txt").write_text("red\n\nred\nyellow\n")
    (task / "zeroshot_classification_templates.txt").write_text("a {c}\na photo\na {c}\n")
    report = inspect(task)
    assert [repeated.model_dump() for repeated in report.classnames.repeated] == [{"name": "red", "labels": (0, 2)}]
    assert (report.classnames.empty, report.templates.without_place) == ((1,), ("a photo",))
    assert report.problems == (
        "classnames.txt: line 2 is empty, expected a class name, because line numbers are labels",
        "templates: found 'a photo', expected one with {c} for the class name",
    )
    assert report.warnings == (
        "classnames.txt: found 'red' for the labels 0 and 2; prompts cannot distinguish them",
        "templates: found 'a {c}' more than once",
    )


def test_a_task_without_some_files_is_inspected(task: Path) -> None:
    (task / "zeroshot_classification_templates.txt").unlink()
    (task / "test/nshards.txt").write_text("two\n")
    (task / "zscl.json").unlink()
    report = inspect(task)
    assert [problem.partition(": ")[2].partition(",")[0] for problem in report.problems] == [
        "found no such file", "found 'two'",
    ]  # fmt: skip
    assert report.splits[0].images == 24


def test_images_of_several_sizes(task: Path) -> None:
    rng = np.random.default_rng(3)
    sizes = [16, 20, 20, 48]
    rewrite(task, "test", [{"png": png((9, 9, 9), rng, size), "cls": str(n).encode()} for n, size in enumerate(sizes)])
    report = inspect(task)
    assert report.splits[1].width is not None
    assert report.splits[1].width.model_dump() == {"min": 16, "median": 20, "max": 48}
    assert report.problems == ()
    assert "several sizes (edges from 16 to 48 pixels)" in report.warnings[0]


def test_contact_rows_have_images_of_each_class(task: Path) -> None:
    content = samples(24, 0)
    content[0]["png"] = b"broken"  # the first red image; another one is chosen
    rewrite(task, "train", content)
    opened = scan_task(str(task))
    rows = contact_rows(opened, per_class=3, classes=24, max_edge=8)
    assert [row.prompt for row in rows] == [f"a task square of {colour}" for colour in COLOURS]
    for row, colour in zip(rows, COLOURS.values(), strict=True):
        assert [image.size for image in row.images] == [(8, 8)] * 3
        assert np.abs(np.asarray(row.images[0]).mean((0, 1)) - colour).max() < 25
    assert [row.prompt for row in contact_rows(opened, 1, classes=2, max_edge=8)] == [
        "a task square of red", "a task square of blue",
    ]  # fmt: skip


def test_unusable_file_names_are_reported_as_in_training(task: Path) -> None:
    content = samples(24, 0)
    rewrite(task, "train", content, shard_images=50)
    image = content[0]["png"]
    with tarfile.open(task / "train/0.tar") as tar:
        members = [(info.name, tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]
    odd = [("a.bmp", image), ("a.cls", b"0"), ("b.png", image), ("b.jpg", image), ("c.npy", b"x"), ("v1.d.cls", b"0")]
    write_tar(task / "train/0.tar", [*members, *odd])
    report = inspect(task)
    assert [(sample.key, sample.reason) for sample in report.unreadable.first] == [
        ("a", "unsupported image format"), ("b", "several members of a kind"), ("c", "no image member"),
        ("v1.d", "no image member"),
    ]  # fmt: skip
    assert (report.splits[0].samples, report.splits[0].images) == (28, 24)
    assert len(open_task(task).broken_samples["train"]) == report.unreadable.samples == 4
    assert any("1 sample whose key has a dot (v1.d)" in warning for warning in report.warnings)


def test_image_properties_that_training_ignores_are_warnings(task: Path) -> None:
    content = samples(24, 0)
    pixels = np.random.default_rng(0).integers(0, 255, (16, 16, 4), dtype=np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6
    first, second = Image.fromarray(pixels[..., :3]), Image.fromarray(pixels[::-1, :, :3])
    for number, (image, options) in enumerate(
        [
            (Image.fromarray(pixels[..., 0].astype(np.uint16) * 256), {}),
            (Image.fromarray(pixels), {}),
            (first, {"exif": turned}),
            (first, {"save_all": True, "append_images": [second]}),
        ]
    ):
        stream = io.BytesIO()
        image.save(stream, "PNG", **options)
        content[number]["png"] = stream.getvalue()
    rewrite(task, "train", content)
    report = inspect(task)
    assert report.problems == ()
    assert sorted(report.warnings) == [
        "found 1 image with 16 bits per channel, of which only the upper 8 are used",
        "found 1 image with an EXIF orientation, which is not applied",
        "found 1 image with several frames, of which only the first is used",
        "found 1 image with transparency, which is ignored",
    ]
