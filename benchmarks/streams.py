"""Throughput of training images, compared with the same decoder and transform on bytes in memory.

    python benchmarks/streams.py
    python benchmarks/streams.py --processes 4 --images 2000 --size 400 --json

Prints three ratios of speeds, which are measured in alternation (medians over rounds), and one ratio of memory:

- over_ceiling: images per second of `zscl.data.loader.TrainingImages` on local shards, divided by the ceiling, which
  decodes and transforms the same images from memory in a plain loop or a DataLoader with as many processes;
- remote_over_ceiling: the same ratio for shards that are streamed like remote shards (from a file:// URL);
- kept_over_decoded: images per second with decoded images cached in memory, divided by the speed without the cache;
- memory_growth: peak resident memory with ten times as many images, divided by the memory with the original number,
  without the cache of decoded images.
"""

import argparse
import io
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from open_clip import image_transform
from PIL import Image

from zscl.data.decode import Decoder
from zscl.data.loader import Loader, TrainingImages
from zscl.data.sample import Sample
from zscl.data.shard_urls import open_samples
from zscl.data.tar import write_shards

BATCH, SEED = 64, 0
CPU = torch.device("cpu")


def encoded_images(count: int, size: int) -> Iterator[bytes]:
    """Yield JPEGs of smooth noise, which decode like photographs."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8))
        fine = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), dtype=np.int16)
        pixels = np.clip(fine + rng.normal(0, 8, fine.shape), 0, 255).astype(np.uint8)
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "JPEG", quality=90)
        yield stream.getvalue()


def write(folder: Path, images: list[bytes]) -> Path:
    """Write the images as shards, and return their folder."""
    write_shards(folder, ({"jpg": image, "cls": b"0"} for image in images), 250)
    return folder


def label_of(sample: Sample) -> int:
    """Return the label of a sample, which is always 0."""
    return 0


class InMemory(torch.utils.data.Dataset[torch.Tensor]):
    """The ceiling: encoded images in memory with the same decoder and transform."""

    def __init__(self, images: list[bytes], decode: Decoder) -> None:
        self.samples = [Sample(image, None, None, "", "") for image in images]
        self.decode = decode

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.decode(self.samples[index])[0]


def ceiling(images: list[bytes], decode: Decoder, options: argparse.Namespace) -> Iterator[torch.Tensor]:
    """Yield batches of the ceiling without end."""
    dataset = InMemory(images, decode)
    while True:
        loader = torch.utils.data.DataLoader(
            dataset, BATCH, shuffle=True, drop_last=True, num_workers=options.processes,
            prefetch_factor=4 if options.processes else None,
        )  # fmt: skip
        yield from loader


def stream(location: str, decode: Decoder, options: argparse.Namespace, keep_bytes: int = 0) -> Iterator[torch.Tensor]:
    """Return the batches of zscl."""
    samples = open_samples([location])
    images = TrainingImages(samples, decode, SEED, BATCH, range(BATCH), cache_bytes=keep_bytes)
    return (batch for batch, _ in images.iter_batches(Loader(CPU, options.processes)))


def images_per_second(batches: Iterator[torch.Tensor], count: int) -> float:
    """Measure the images per second of wall time over `count` images."""
    started = time.perf_counter()
    taken = sum(len(batch) for batch in islice(batches, -(-count // BATCH)))
    return taken / (time.perf_counter() - started)


def _peak_memory(location: str, images: int, size: int, send: Any) -> None:
    torch.set_num_threads(1)
    decode = Decoder(image_transform(size, is_train=True), label_of)
    batches = stream(location, decode, argparse.Namespace(processes=0))
    for _ in islice(batches, -(-images // BATCH)):
        pass
    send.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def peak_memory(location: str, images: int, size: int) -> int:
    """Return the peak memory of a new process that reads the images, in kilobytes."""
    receive, send = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=_peak_memory, args=(location, images, size, send))
    process.start()
    found: int = receive.recv()
    process.join()
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure and return all ratios."""
    images = list(encoded_images(options.images, options.size))
    decode = Decoder(image_transform(options.pixels, is_train=True), label_of)
    with tempfile.TemporaryDirectory() as folder:
        place = write(Path(folder) / "set", images)
        large = write(Path(folder) / "large", images * 10)
        remote = f"file://{place}/{{0..{len(list(place.glob('*.tar'))) - 1}}}.tar"
        ways: dict[str, Callable[[], Iterator[torch.Tensor]]] = {
            "ceiling": lambda: ceiling(images, decode, options),
            "local": lambda: stream(str(place), decode, options),
            "remote": lambda: stream(remote, decode, options),
            "kept": lambda: stream(str(place), decode, options, keep_bytes=2**31),
        }
        running = {name: way() for name, way in ways.items()}
        for batches in running.values():
            images_per_second(batches, options.images)  # warm up: start processes, read files, fill the cache
        rounds = [
            {name: images_per_second(batches, options.images) for name, batches in running.items()}
            for _ in range(options.rounds)
        ]
        if options.memory:
            memory = [peak_memory(str(each), options.images, options.pixels) for each in (place, large)]
    speed = {name: median(each[name] for each in rounds) for name in ways}
    return {
        "images": options.images,
        "size": options.size,
        "processes": options.processes,
        "rounds": options.rounds,
        "over_ceiling": median(each["local"] / each["ceiling"] for each in rounds),
        "remote_over_ceiling": median(each["remote"] / each["ceiling"] for each in rounds),
        "kept_over_decoded": median(each["kept"] / each["local"] for each in rounds),
        "memory_growth": memory[1] / memory[0] if options.memory else None,
        "images_per_second": speed,
    }


def main() -> None:
    """Measure and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--size", type=int, default=400, help="side length of the images in pixels")
    parser.add_argument("--pixels", type=int, default=224, help="input size of the model in pixels")
    parser.add_argument("--processes", type=int, default=0, help="loader processes; 0: the main process")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure memory, too")
    parser.add_argument("--json", action="store_true", help="figures as JSON on standard output")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(options)
    growth = f"; {found['memory_growth']:.2f} x the memory for ten times the data" if options.memory else ""
    print(
        f"{found['images']} images of {found['size']} px, {found['processes']} loader processes: "
        f"{found['over_ceiling']:.2f} of the ceiling, {found['remote_over_ceiling']:.2f} from remote shards; "
        f"{found['kept_over_decoded']:.1f} x with decoded images kept{growth} "
        f"({found['images_per_second']['local']:.0f} images/s)",
        file=sys.stderr,
    )
    if options.json:
        print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
