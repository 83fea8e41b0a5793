"""Shards → decoded, batched, deterministic streams, through WebDataset.

A training stream is endless and a pure function of (seed, stage, position): a global batch holds the same images,
equally augmented, however many workers and loader processes share it, and from whichever step it goes on. A sample
that cannot be used is skipped and named (another stands in for it while training); too many of them end the run.
"""

import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
import webdataset
from PIL import Image
from torch.utils.data import get_worker_info

from schemas.compute import Compute
from schemas.errors import InputError
from schemas.events import Note
from zscl.data.decode import Decoded, Decoder
from zscl.data.indexed import IndexedSamples
from zscl.data.sample import ATTEMPTS, BrokenSampleError, Sample, SampleFetcher, Samples, check_broken_share
from zscl.data.streaming import StreamedSamples
from zscl.runtime.distributed import all_gather_unique, all_reduce_ints, world_size
from zscl.runtime.seeding import derive_seed

# What a stream is made of: decoded images, and the sentences of samples that were skipped.
Items = Iterator[Decoded | str]
LONGEST_TEMPORARY = 107 - 32  # bytes: a path to a Unix socket has 107, of which multiprocessing adds up to 32

PIXEL_BYTES = 4  # that Pillow takes for a pixel of RGB
FEW = 10_000  # of an unknown number of samples: judge the share of broken ones by no fewer


def _keep_socket_paths_short(process: int) -> None:
    """Have a loader process put its sockets into /tmp if the temporary folder's name is too long for them.

    Batches that it cannot send are lost: multiprocessing prints the error and goes on.
    """
    if len(os.fsencode(tempfile.gettempdir())) > LONGEST_TEMPORARY:
        tempfile.tempdir = "/tmp"


@dataclass
class ReadProgress:
    """A set that a worker reads, as far as it is read.

    broken: sentences of the samples that cannot be used; drawn: samples read so far; total: samples in the set, if that
    is known; is_read: whether each of them was read once.
    """

    total: int | None
    broken: dict[str, None] = field(default_factory=dict)
    drawn: int = 0
    is_read: bool = False


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
        sets: what was read so far, in the order in which it was begun.
        resumed: sentences of the samples that were broken in each set before an interruption.
    """

    device: torch.device
    processes: int = 0
    labels_stay: bool = False
    max_broken_share: float = 0.0
    on_skip: Callable[[str], None] = lambda sentence: None
    broken: dict[str, None] = field(default_factory=dict)
    sets: list[ReadProgress] = field(default_factory=list)
    resumed: list[Sequence[str]] = field(default_factory=list)

    def __call__(self, batches: "BatchedDataset", total: int | None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
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
        read = ReadProgress(total, dict.fromkeys(self.resumed.pop(0) if self.resumed else ()))
        self.sets.append(read)
        for batch in loader:
            if isinstance(batch, str):  # an input error, carried as it is out of the loader process
                raise InputError(batch)
            images, labels, skipped, counted = batch
            read.drawn += len(labels) + len(skipped)
            read.total = counted if total is None else total
            if skipped:
                read.broken.update(dict.fromkeys(skipped))
                total_by_now = read.total or max(read.drawn, FEW)
                check_broken_share(skipped[0], len(read.broken), total_by_now, self.max_broken_share)
                self._name(skipped)
            if len(labels):
                images = images.to(self.device, non_blocking=True)
                yield images, labels if self.labels_stay else labels.to(self.device, non_blocking=True)
        read.is_read = True

    def check_over_workers(self) -> None:
        """Compare the broken samples that all workers met with the sets; every worker calls it at the same time.

        Raises:
            InputError: too many samples of a set cannot be used. All workers raise it.
        """
        for read in self.sets:
            known = read.total is not None
            broken, drawn, total, knowing, done = map(
                int, all_reduce_ints(len(read.broken), read.drawn, read.total or 0, known, read.is_read)
            )
            if knowing:
                total //= knowing
            else:  # of a stream; whoever read all of it knows now how many there are
                total = drawn if done == world_size() else max(drawn, FEW)
            if broken > self.max_broken_share * total:  # a sample that two workers met counts once
                sentences = all_gather_unique(read.broken)
                check_broken_share(sentences[0], len(sentences), total, self.max_broken_share)

    def _name(self, skipped: list[str]) -> None:
        for sentence in skipped:
            if sentence not in self.broken:
                self.broken[sentence] = None
                self.on_skip(f"skipped {sentence}")


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

    def read(self, name: str, sample: Sample, decode: Decoder, budget: int, total_budget: int) -> Image.Image:
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
        if budget == 0 or sample.index < 0:  # nothing is kept of a stream
            return decode.read(sample)
        kept, content = self._sets[name], sample.identity()[1]
        if content in kept:
            return kept[content]
        image = decode.read(sample)
        size = PIXEL_BYTES * image.width * image.height
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
    decode: Decoder
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
            for position, draw in zip(
                self._positions(), self.samples.iter_positions(self._positions(), self.seed), strict=True
            ):
                yield from self._decode(position, draw, name)

    def _decode(self, position: int, draw: SampleFetcher, name: str) -> Items:
        """Decode the sample at a position, or what stands in for it."""
        processes = _process()[1]
        budget, total = self.keep_bytes // processes, max(self.keep_bytes, self.keep_in) // processes
        for attempt in range(ATTEMPTS):
            try:
                sample = draw(attempt)
                sample.check()
                label = self.decode.label_of(sample)
                image = _decoded.read(name, sample, self.decode, budget, total)
            except BrokenSampleError as error:
                yield str(error)
                continue
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(derive_seed(self.seed, position))
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
        return loader(BatchedDataset(self, len(self.own), self.count), self.count())

    def count(self) -> int | None:
        """Samples in the set, if that is known by now."""
        return _count(self.samples)


@dataclass(frozen=True)
class EvaluationImages:
    """Every sample exactly once over all workers and their loader processes."""

    samples: Samples
    decode: Decoder
    worker: int
    workers: int
    total: int | None = None  # samples in the set that these are a part of; default: these are all

    def __call__(self) -> Items:
        """Yield what this loader process decodes."""
        process, processes = _process()
        part = self.worker * processes + process
        for sample in self.samples.iter_shard(part, self.workers * processes):
            try:
                yield self.decode(sample)
            except BrokenSampleError as error:
                yield str(error)

    def batches(self, batch_size: int, loader: Loader) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Images [b, 3, H, W] and labels [b], with b at most `batch_size`."""
        return loader(BatchedDataset(self, batch_size, self.count), self.count())

    def count(self) -> int | None:
        """Samples in the set, if that is known by now."""
        return _count(self.samples) if self.total is None else self.total


def _unknown() -> int | None:
    return None


@dataclass(frozen=True)
class BatchedDataset:
    """Decoded images, stacked; an input error ends the stream as its sentence, to cross process borders whole."""

    items: Callable[[], Items]
    batch_size: int
    count: Callable[[], int | None] = _unknown

    def __call__(self) -> Iterator[Any]:
        """Yield (images, labels, sentences of what was skipped, samples in the set), or the sentence that ends it all.

        How many samples a stream has is not known before its end.
        """
        batch: list[Decoded] = []
        skipped: list[str] = []
        try:
            for item in self.items():
                if isinstance(item, str):
                    skipped.append(item)
                else:
                    batch.append(item)
                if len(batch) == self.batch_size:
                    yield *_stack(batch), skipped, self.count()
                    batch, skipped = [], []
        except InputError as error:
            yield str(error)
            return
        if batch or skipped:
            yield *_stack(batch), skipped, self.count()


def _process() -> tuple[int, int]:
    """This loader process's number and how many there are."""
    info = get_worker_info()
    return (info.id, info.num_workers) if info else (0, 1)


def _count(samples: Samples) -> int | None:
    """Samples in the set; `None` for a stream that was not read to its end yet, and where there is no end."""
    if isinstance(samples, IndexedSamples):
        return len(samples)
    return samples.count if isinstance(samples, StreamedSamples) else None


def _stack(samples: list[Decoded]) -> tuple[torch.Tensor, torch.Tensor]:
    if not samples:
        return torch.empty(0), torch.empty(0)
    images, labels = zip(*samples, strict=True)
    return torch.stack(images), torch.tensor(labels)


def build_loader(compute: Compute, device: torch.device, report: Callable[[Note], None]) -> Loader:
    """How a worker reads; what it skips is reported."""
    return Loader(
        device,
        compute.loader_processes,
        max_broken_share=compute.max_broken_share,
        on_skip=lambda sentence: report(Note(text=sentence)),
    )
