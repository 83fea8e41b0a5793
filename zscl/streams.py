"""Shards → decoded, batched, deterministic streams, through WebDataset.

A training stream is endless and a pure function of (seed, stage, position): a global batch holds the same images,
equally augmented, however many workers and loader processes share it, and from whichever step it goes on. A sample
that cannot be used is skipped and named (another stands in for it while training); too many of them end the run.
"""

import io
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
import webdataset
from PIL import Image, UnidentifiedImageError
from torch.utils.data import get_worker_info

from schemas.base import InputError
from zscl.indexed_samples import IndexedSamples
from zscl.samples import ATTEMPTS, BrokenSampleError, Draw, Sample, Samples
from zscl.seeds import seed_of

Transform = Callable[[Any], torch.Tensor]
Label = int | tuple[int, ...]
LabelOf = Callable[[Sample], Label]
Decoded = tuple[torch.Tensor, Label]
# What a stream is made of: decoded images, and the sentences of samples that were skipped.
Items = Iterator[Decoded | str]
# Whatever a file is called: other formats of PIL start other programs, or are read by code that few look at.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM")
LONGEST_SIDES = 100  # the longer side by the shorter: a strip of one pixel would be enlarged beyond all memory
LONGEST_TEMPORARY = 107 - 32  # bytes: a path to a Unix socket has 107, of which multiprocessing adds up to 32
FEW = 10_000  # of an unknown number of samples: judge the share of broken ones by no fewer


def _keep_socket_paths_short(process: int) -> None:
    """Have a loader process put its sockets into /tmp if the temporary folder's name is too long for them.

    Batches that it cannot send are lost: multiprocessing prints the error and goes on.
    """
    if len(os.fsencode(tempfile.gettempdir())) > LONGEST_TEMPORARY:
        tempfile.tempdir = "/tmp"


@dataclass(frozen=True)
class Loader:
    """How a worker reads.

    Args:
        device: where batches go.
        processes: that read and decode beside the worker; 0: the worker itself.
        labels_stay: on the CPU.
        max_broken_share: of a set, above which the run stops.
        note: told about every sample that was skipped, once.
        broken: the sentences of those met so far.
    """

    device: torch.device
    processes: int = 0
    labels_stay: bool = False
    max_broken_share: float = 0.0
    note: Callable[[str], None] = lambda sentence: None
    broken: dict[str, None] = field(default_factory=dict)

    def __call__(self, batches: "Batched", total: int | None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Read batches and bring them to the device: images [b, 3, H, W] and labels [b].

        Args:
            batches: what to read.
            total: samples in the set, if that is known.

        Raises:
            InputError: a shard cannot be read, or too many samples cannot be used.
        """
        loader = webdataset.WebLoader(
            webdataset.DataPipeline(batches),
            batch_size=None,
            num_workers=self.processes,
            pin_memory=self.device.type == "cuda",
            prefetch_factor=4 if self.processes else None,
            worker_init_fn=_keep_socket_paths_short,
            generator=torch.Generator(),  # or it would draw from everybody's
        )
        broken: set[str] = set()
        drawn = 0
        for batch in loader:
            if isinstance(batch, str):  # an input error, carried as it is out of the loader process
                raise InputError(batch)
            images, labels, skipped = batch
            drawn += len(labels) + len(skipped)
            if skipped:
                broken.update(skipped)
                self._bear(skipped[0], len(broken), total or max(drawn, FEW))
                self._name(skipped)
            if len(labels):
                images = images.to(self.device, non_blocking=True)
                yield images, labels if self.labels_stay else labels.to(self.device, non_blocking=True)

    def _bear(self, sentence: str, broken: int, total: int) -> None:
        if broken > self.max_broken_share * total:
            raise InputError(
                f"{sentence}; found {broken} such samples of {total}, expected at most a share of "
                f"{self.max_broken_share:g} (compute.max_broken_share)"
            )

    def _name(self, skipped: list[str]) -> None:
        for sentence in skipped:
            if sentence not in self.broken:
                self.broken[sentence] = None
                self.note(f"skipped {sentence}")


@dataclass(frozen=True)
class Decode:
    """Encoded sample → (image [3, H, W], label)."""

    transform: Transform
    label_of: LabelOf

    def __call__(self, sample: Sample) -> Decoded:
        """Decode one image and transform it.

        Raises:
            BrokenSampleError: the image or the label cannot be read.
        """
        label = self.label_of(sample)
        return self.transform(self.read(sample)), label

    def read(self, sample: Sample) -> Image.Image:
        """Decode one image, as it is.

        Raises:
            BrokenSampleError: the image cannot be read.
        """
        try:
            return decode_image(sample.image)
        except Exception as error:  # what a decoder raises on foreign bytes is no closed list
            unknown = isinstance(error, UnidentifiedImageError)  # its own words show an address, another each time
            reason = f"found {len(sample.image)} bytes of no known format" if unknown else str(error)
            raise BrokenSampleError(
                f"{sample.shard}: sample '{sample.key}' is no readable image ({reason or type(error).__name__})"
            ) from error


def decode_image(encoded: bytes) -> Image.Image:
    """Decode an image to its last pixel; RGB.

    Raises:
        UnidentifiedImageError: it is in none of `FORMATS`.
        ValueError: its sides are too unlike.
        Exception: what the decoder raises.
    """
    with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
        if max(image.size) > LONGEST_SIDES * min(image.size):
            raise ValueError(
                f"found {image.width} x {image.height} pixels, expected no side over {LONGEST_SIDES} times the other"
            )
        return image.convert("RGB")


class DecodedImages:
    """Decoded images that this process keeps in memory, by content: stages and runs that follow share them.

    A set that needs room takes it from those that nobody reads, the one that was read longest ago first.
    """

    def __init__(self) -> None:
        self._sets: dict[str, dict[int, Image.Image]] = {}  # the one opened last comes last
        self._bytes: Counter[str] = Counter()
        self._readers: Counter[str] = Counter()

    @contextmanager
    def opened(self, name: str) -> Iterator[None]:
        """Read a set while the block runs."""
        self._sets[name] = self._sets.pop(name, {})
        self._readers[name] += 1
        try:
            yield
        finally:
            self._readers[name] -= 1

    def read(self, name: str, sample: Sample, decode: Decode, budget: int, total_budget: int) -> Image.Image:
        """Decode a sample's image, or take what is kept of it.

        Args:
            name: of the set, opened before.
            sample: of the set.
            decode: how.
            budget: bytes that the set may take up.
            total_budget: bytes that all sets may take up.

        Raises:
            BrokenSampleError: the image cannot be read.
        """
        if budget == 0 or sample.place < 0:  # nothing is kept of a stream
            return decode.read(sample)
        kept, content = self._sets[name], sample.identity()[1]
        if content in kept:
            return kept[content]
        image = decode.read(sample)
        size = 3 * image.width * image.height
        if self._bytes[name] + size <= budget and self._have_room(size, total_budget):
            self._bytes[name] += size
            kept[content] = image
        return image

    def _have_room(self, size: int, budget: int) -> bool:
        while self._bytes.total() + size > budget:
            idle = next((name for name in self._sets if not self._readers[name]), None)
            if idle is None:
                return False
            del self._sets[idle], self._bytes[idle]
        return True


_decoded = DecodedImages()


@dataclass(frozen=True)
class TrainingImages:
    """Endless decoded images: one worker's share of each global batch, from `first_step` on.

    Args:
        samples: where the images come from.
        decode: applied to each; what is random in it is drawn from (seed, position) alone.
        seed: one per experiment, stage and stream; see `seed_of`.
        batch_size: images in a global batch.
        own: this worker's part of a global batch.
        first_step: steps already taken.
        keep_bytes: memory for decoded images, over all loader processes.
        keep_in: of so many bytes for all sets together; default: for this one alone.
    """

    samples: Samples
    decode: Decode
    seed: int
    batch_size: int
    own: range
    first_step: int = 0
    keep_bytes: int = 0
    keep_in: int = 0

    def __call__(self) -> Items:
        """Yield what this loader process decodes: every so-many-th batch of the worker."""
        name = self.samples.layout if isinstance(self.samples, IndexedSamples) else ""
        with _decoded.opened(name):
            for position, draw in zip(self._positions(), self.samples.at(self._positions(), self.seed), strict=True):
                yield from self._decode(position, draw, name)

    def _decode(self, position: int, draw: Draw, name: str) -> Items:
        """Decode the sample at a position, or what stands in for it."""
        processes = _process()[1]
        budget, total = self.keep_bytes // processes, max(self.keep_bytes, self.keep_in) // processes
        for attempt in range(ATTEMPTS):
            try:
                sample = draw(attempt)
                label = self.decode.label_of(sample)
                image = _decoded.read(name, sample, self.decode, budget, total)
            except BrokenSampleError as error:
                yield str(error)
                continue
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed_of(self.seed, position))
                decoded = self.decode.transform(image), label
            yield decoded
            return
        raise InputError(
            f"{draw(0).shard}: found no usable sample in {ATTEMPTS} attempts, expected readable images; zscl data "
            "check lists what is wrong"
        )

    def _positions(self) -> Iterator[int]:
        process, processes = _process()
        for step in count(self.first_step + process, processes):
            yield from range(step * self.batch_size + self.own.start, step * self.batch_size + self.own.stop)

    def batches(self, loader: Loader) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Images [b, 3, H, W] and labels [b]; the b of all workers add up to the global batch."""
        return loader(Batched(self, len(self.own)), _count(self.samples))


@dataclass(frozen=True)
class EvaluationImages:
    """Every sample exactly once over all workers and their loader processes."""

    samples: Samples
    decode: Decode
    worker: int
    workers: int

    def __call__(self) -> Items:
        """Yield what this loader process decodes."""
        process, processes = _process()
        part = self.worker * processes + process
        for sample in self.samples.once(part, self.workers * processes):
            try:
                yield self.decode(sample)
            except BrokenSampleError as error:
                yield str(error)

    def batches(self, batch_size: int, loader: Loader) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Images [b, 3, H, W] and labels [b], with b at most `batch_size`."""
        return loader(Batched(self, batch_size), _count(self.samples))


@dataclass(frozen=True)
class Batched:
    """Decoded images, stacked; an input error ends the stream as its sentence, to cross process borders whole."""

    items: Callable[[], Items]
    batch_size: int

    def __call__(self) -> Iterator[Any]:
        """Yield (images, labels, sentences of what was skipped), or the sentence that ends the stream."""
        batch: list[Decoded] = []
        skipped: list[str] = []
        try:
            for item in self.items():
                if isinstance(item, str):
                    skipped.append(item)
                else:
                    batch.append(item)
                if len(batch) == self.batch_size:
                    yield *_stack(batch), skipped
                    batch, skipped = [], []
        except InputError as error:
            yield str(error)
            return
        if batch or skipped:
            yield *_stack(batch), skipped


def _process() -> tuple[int, int]:
    """This loader process's number and how many there are."""
    info = get_worker_info()
    return (info.id, info.num_workers) if info else (0, 1)


def _count(samples: Samples) -> int | None:
    """Samples in the whole set; `None` for a stream, whose length is not known beforehand."""
    return samples.total if isinstance(samples, IndexedSamples) else None


def _stack(samples: list[Decoded]) -> tuple[torch.Tensor, torch.Tensor]:
    if not samples:
        return torch.empty(0), torch.empty(0)
    images, labels = zip(*samples, strict=True)
    return torch.stack(images), torch.tensor(labels)
