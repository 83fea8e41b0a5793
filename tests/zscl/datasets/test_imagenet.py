"""TinyImageNet and ImageNet from folders in their own layouts."""

import io
from pathlib import Path

import numpy as np
import pytest
from open_clip import IMAGENET_CLASSNAMES
from PIL import Image
from support.data import open_task
from support.errors import refused

from schemas.errors import ErrorCode
from zscl.datasets.imagenet import prepare_imagenet, prepare_tinyimagenet


def jpeg(number: int) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, "JPEG")
    return stream.getvalue()


def put(file: Path, content: bytes | str) -> bytes:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file.read_bytes()


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    root = tmp_path / "tiny-imagenet-200"
    put(root / "wnids.txt", "n02\nn01\n")
    put(root / "words.txt", "n00\tthing\nn01\tgoldfish, Carassius auratus\nn02\tEgyptian cat\n")
    for number, wnid in enumerate(["n01", "n01", "n02"]):
        put(root / "train" / wnid / "images" / f"{wnid}_{number}.JPEG", jpeg(number))
        put(root / "train" / wnid / f"{wnid}_boxes.txt", "no image")
    lines = [f"val_{number}.JPEG\t{wnid}\t0\t0\t7\t7" for number, wnid in enumerate(["n02", "n01"])]
    put(root / "val/val_annotations.txt", "\n".join(lines) + "\n")
    for number in range(2):
        put(root / f"val/images/val_{number}.JPEG", jpeg(10 + number))
    return root


def test_tinyimagenet_keeps_bytes_names_and_labels(tiny: Path, tmp_path: Path) -> None:
    made = prepare_tinyimagenet(tiny, tmp_path / "task")
    assert (made.images, made.split_family) == ({"train": 3, "test": 2}, "official-val")
    task = open_task(tmp_path / "task")
    assert task.classnames == ("goldfish", "Egyptian cat")
    assert task.templates == ("a bad photo of a {c}.",)
    assert [(sample.image, task.get_label(sample)) for sample in task.train.iter_shard(0, 1)] == [
        (jpeg(0), 0), (jpeg(1), 0), (jpeg(2), 1),
    ]  # fmt: skip
    assert [(sample.image, task.get_label(sample)) for sample in task.test.iter_shard(0, 1)] == [
        (jpeg(10), 1),
        (jpeg(11), 0),
    ]
    assert prepare_tinyimagenet(tiny, tmp_path / "task").kept


def test_inconsistent_tinyimagenet_is_refused(tiny: Path, tmp_path: Path) -> None:
    put(tiny / "val/val_annotations.txt", "val_0.JPEG\tn09\n")
    with refused(ErrorCode.MISMATCH) as error:
        prepare_tinyimagenet(tiny, tmp_path / "task")
    assert "n09" in str(error.value)
    (tiny / "wnids.txt").unlink()
    with refused(ErrorCode.NOT_FOUND) as error:
        prepare_tinyimagenet(tiny, tmp_path / "task")
    assert "wnids.txt" in str(error.value)
    assert not (tmp_path / "task").exists()


def imagenet(root: Path, classes: int) -> Path:
    for number in range(classes):
        for split in ("train", "val"):
            put(root / split / f"n{number:08d}" / f"{split}.JPEG", jpeg(number % 7))
    return root


def test_a_part_of_imagenet_in_the_order_of_its_file(tmp_path: Path) -> None:
    root = imagenet(tmp_path / "imagenet", 1000)
    put(tmp_path / "classes.txt", "n00000007\nn00000001 a tench by another name\n")
    made = prepare_imagenet(root, tmp_path / "task", tmp_path / "classes.txt")
    assert made.images == {"train": 2, "test": 2}
    task = open_task(tmp_path / "task")
    assert task.classnames == (IMAGENET_CLASSNAMES[7], "a tench by another name")
    assert task.templates == ("a good photo of a {c}.",)


@pytest.mark.parametrize(
    ("classes", "code", "field", "content"),
    [
        ("n00000001\n", ErrorCode.MISSING_VALUE, "--classes", "'n00000001'"),
        ("n00000001 one\nn00000001 two\n", ErrorCode.DUPLICATE, "--classes", "classes.txt"),
        ("n00000009 nine\n", ErrorCode.EMPTY, None, "train/n00000009"),
        (None, ErrorCode.NOT_FOUND, None, "imagenet/train"),
    ],
)
def test_an_invalid_selection_of_classes_is_refused(
    tmp_path: Path, classes: str | None, code: ErrorCode, field: str | None, content: str
) -> None:
    root = imagenet(tmp_path / "imagenet", 3)
    if classes:
        put(tmp_path / "classes.txt", classes)
    with refused(code, field) as error:
        prepare_imagenet(root, tmp_path / "task", tmp_path / "classes.txt" if classes else None)
    assert content in str(error.value)
    assert not (tmp_path / "task").exists()
