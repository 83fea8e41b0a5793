"""Small images, tasks and tars for tests."""

import io
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from schemas.data import Task
from zscl.data.sample import Sample, SampleFetcher
from zscl.data.task import TaskFolder
from zscl.datasets.task_writer import write_task

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "yellow": (220, 220, 30)}
TINY_MODEL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "patch_size": 8, "head_width": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def png(colour: tuple[int, int, int], rng: np.random.Generator, size: int = 16) -> bytes:
    """Return a noisy square of one colour as PNG."""
    pixels = np.clip(np.array(colour) + rng.normal(0, 25, (size, size, 3)), 0, 255).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def jpeg(size: int = 64) -> bytes:
    """Return an image of noise as JPEG."""
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(5).integers(0, 256, (size, size, 3), dtype=np.uint8)).save(stream, "JPEG")
    return stream.getvalue()


def coloured_images(count: int, seed: int) -> Iterator[tuple[bytes, int]]:
    """Yield pairs of image and label, with alternating colours."""
    rng = np.random.default_rng(seed)
    for index in range(count):
        label = index % len(COLOURS)
        yield png(list(COLOURS.values())[label], rng), label


def make_task(folder: Path, seed: int, train: int = 24, test: int = 10, shard_images: int = 9) -> Path:
    """Write a task folder of coloured squares."""
    write_task(
        folder,
        list(COLOURS),
        [f"a {folder.name} square of {{c}}", "some {c}"],
        {"train": coloured_images(train, seed), "test": coloured_images(test, seed + 1)},
        suffix="png",
        source="made by a test",
        shard_images=shard_images,
    )
    return folder


def write_tar(file: Path, members: Iterable[tuple[str, bytes]], kind: bytes = tarfile.REGTYPE) -> Path:
    """Write a tar file. If `kind` is a link type, the content "->TARGET" creates a link to TARGET."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if kind != tarfile.REGTYPE and content.startswith(b"->"):
                info.type, info.linkname = kind, content[2:].decode()
                content = b""
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file


def open_task(folder: str | Path) -> TaskFolder:
    """Open the task in a folder."""
    return TaskFolder.open(Task.model_validate(str(folder)))


def fetch_first(fetchers: Iterator[SampleFetcher]) -> Iterator[Sample]:
    """Yield the sample of each position, as if every sample were usable."""
    return (fetch(0) for fetch in fetchers)


def sample_labels(samples: Iterable[Sample]) -> list[int]:
    """Return the samples' labels as numbers."""
    return [int(sample.label or b"") for sample in samples]
