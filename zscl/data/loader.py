"""Data loading: decoded, batched and deterministic streams of training and evaluation images, through WebDataset.

A training stream is endless and a pure function of (seed, position): a global batch holds the same images with the same
augmentation for any number of workers and loader processes, and after any resume. An unusable sample is skipped and
reported; in training, another sample replaces it. Too many unusable samples stop the run.
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
from schemas.errors import ErrorCode, InputError
from schemas.events import Note
from zscl.data.decode import Decoded, Decoder
from zscl.data.indexed import IndexedSamples
from zscl.data.sample import MAX_ATTEMPTS, BrokenSampleError, Sample, SampleFetcher, Samples, check_broken_share
from zscl.data.streaming import StreamedSamples
from zscl.runtime.distributed import all_gather_unique, all_reduce_sum, world_size
from zscl.runtime.seeding import derive_seed

Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]  # images [b, 3, H, W] and labels [b]
DecodedStream = Iterator[Decoded | str]  # decoded samples, and messages about skipped ones
MAX_TEMP_PATH_BYTES = 107 - 32  # the path of a Unix socket has 107 bytes, of which multiprocessing uses up to 32
PIXEL_BYTES = 4  # Pillow's memory for one RGB pixel
MIN_SAMPLES_FOR_SHARE = 10_000  # denominator of the fraction of unusable samples while the dataset's size is unknown


def _shorten_temp_folder(process: int) -> None:
    """Create a loader process's sockets in /tmp if the path of the temporary folder is too long for a socket.

    Otherwise batches would be lost, because multiprocessing prints the error but does not raise it.
    """
    if len(os.fsencode(tempfile.gettempdir())) > MAX_TEMP_PATH_BYTES:
        tempfile.tempdir = "/tmp"


@dataclass
class ReadProgress:
    """A worker's progress in reading a dataset.

    Attributes:
        total: Number of samples in the dataset; `None` if unknown.
        broken_samples: Messages about unusable samples, without repetitions; a dict used as an ordered set.
        samples_read: Number of samples read. A sample that is read several times is counted each time.
        is_complete: Whether the worker has read all samples of its part. Training streams never end.
    """

    total: int | None
    broken_samples: dict[str, None] = field(default_factory=dict)
    samples_read: int = 0
    is_complete: bool = False


@dataclass(frozen=True)
class Loader:
    """Reads batches in loader processes, moves them to the device, and limits the fraction of unusable samples.

    Attributes:
        device: Device of the batches.
        processes: Number of loader processes per worker; 0 loads in the worker itself.
        labels_on_cpu: Whether labels stay on the CPU.
        max_broken_share: Largest accepted fraction of unusable samples of a dataset.
        on_skip: Callback that receives a message for each skipped sample, once per sample.
        broken_samples: Messages about unusable samples of all datasets, without repetitions; an ordered set.
        progress: Progress of each dataset, in the order in which reading started.
        restored_broken_samples: Messages about unusable samples that were found before the run was interrupted and
            resumed, one list for each dataset that will be read.
    """

    device: torch.device
    processes: int = 0
    labels_on_cpu: bool = False
    max_broken_share: float = 0.0
    on_skip: Callable[[str], None] = lambda message: None
    broken_samples: dict[str, None] = field(default_factory=dict)
    progress: list[ReadProgress] = field(default_factory=list)
    restored_broken_samples: list[Sequence[str]] = field(default_factory=list)

    def __call__(self, batches: "BatchedDataset", total: int | None) -> Batches:
        """Read batches and move them to the device.

        Args:
            batches: The batched dataset.
            total: Number of samples in the dataset; `None` if unknown.

        Yields:
            Images [b, 3, H, W] and labels [b].

        Raises:
            InputError: A shard cannot be read, or too many samples are unusable.
        """
        loader = webdataset.WebLoader(
            webdataset.DataPipeline(batches),
            batch_size=None,
            num_workers=self.processes,
            pin_memory=self.device.type == "cuda",
            prefetch_factor=4 if self.processes else None,
            worker_init_fn=_shorten_temp_folder,
            generator=torch.Generator(),  # otherwise the loader draws from the global generator
        )
        restored = self.restored_broken_samples.pop(0) if self.restored_broken_samples else ()
        progress = ReadProgress(total, dict.fromkeys(restored))
        self.progress.append(progress)
        for batch in loader:
            if isinstance(batch, InputError):
                raise batch
            images, labels, skipped, counted = batch
            progress.samples_read += len(labels) + len(skipped)
            progress.total = counted if total is None else total
            if skipped:
                progress.broken_samples.update(dict.fromkeys(skipped))
                current_total = progress.total or max(progress.samples_read, MIN_SAMPLES_FOR_SHARE)
                check_broken_share(skipped[0], len(progress.broken_samples), current_total, self.max_broken_share)
                self._report_skipped(skipped)
            if len(labels):
                images = images.to(self.device, non_blocking=True)
                yield images, labels if self.labels_on_cpu else labels.to(self.device, non_blocking=True)
        progress.is_complete = True

    def check_broken_across_ranks(self) -> None:
        """Check the fraction of unusable samples over all workers.

        All ranks must call this, and all ranks raise the same error.

        Raises:
            InputError: Too many samples of a dataset are unusable.
        """
        for progress in self.progress:
            is_known = progress.total is not None
            broken, samples_read, total, known_count, complete_count = map(
                int,
                all_reduce_sum(
                    len(progress.broken_samples),
                    progress.samples_read,
                    progress.total or 0,
                    is_known,
                    progress.is_complete,
                ),
            )
            if known_count:
                total //= known_count
            else:  # a stream: its size is known once all ranks have read their parts
                is_complete = complete_count == world_size()
                total = samples_read if is_complete else max(samples_read, MIN_SAMPLES_FOR_SHARE)
            if broken > self.max_broken_share * total:  # gather the messages: two ranks may have read the same sample
                messages = all_gather_unique(progress.broken_samples)
                check_broken_share(messages[0], len(messages), total, self.max_broken_share)

    def _report_skipped(self, skipped: list[str]) -> None:
        for message in skipped:
            if message not in self.broken_samples:
                self.broken_samples[message] = None
                self.on_skip(f"skipped {message}")


class DecodedImageCache:
    """In-memory cache of decoded images by content, shared by the stages and runs of this process.

    If an image would exceed the memory budget of all datasets, other datasets are evicted, least recently used first.
    A dataset that is being read is not evicted.
    """

    def __init__(self) -> None:
        self._images: dict[str, dict[int, Image.Image]] = {}  # by dataset, in the order of the last access
        self._bytes: Counter[str] = Counter()
        self._readers: Counter[str] = Counter()

    @contextmanager
    def open_reader(self, name: str) -> Iterator[None]:
        """Protect a dataset's images from eviction during the `with` block."""
        self._images[name] = self._images.pop(name, {})
        self._readers[name] += 1
        try:
            yield
        finally:
            self._readers[name] -= 1

    def get_or_decode(self, name: str, sample: Sample, decoder: Decoder, budget: int, total_budget: int) -> Image.Image:
        """Return a sample's cached image, or decode it and add it to the cache if it fits.

        Args:
            name: Name of the dataset. `open_reader(name)` must be active.
            sample: A sample of the dataset. Streamed samples are not cached.
            decoder: Decoder of the image.
            budget: Memory for this dataset in bytes.
            total_budget: Memory for all datasets in bytes.

        Returns:
            The RGB image.

        Raises:
            BrokenSampleError: The image cannot be decoded.
        """
        if budget == 0 or sample.index < 0:
            return decoder.load_image(sample)
        cached, content = self._images[name], sample.identity()[1]
        if content in cached:
            return cached[content]
        image = decoder.load_image(sample)
        size = PIXEL_BYTES * image.width * image.height
        if self._bytes[name] + size <= budget and self._evict(size, total_budget):
            self._bytes[name] += size
            cached[content] = image
        return image

    def _evict(self, size: int, budget: int) -> bool:
        """Evict datasets until `size` more bytes fit into the budget. Return whether they fit."""
        while self._bytes.total() + size > budget:
            idle = next((name for name in self._images if not self._readers[name]), None)
            if idle is None:
                return False
            del self._images[idle], self._bytes[idle]
        return True


_image_cache = DecodedImageCache()


@dataclass(frozen=True)
class TrainingImages:
    """Endless stream of decoded training images: one rank's part of each global batch, starting at `first_step`.

    Attributes:
        samples: The dataset.
        decoder: Decoder with its transforms. Random transforms depend only on the seed and the position.
        seed: Seed of the order and of the augmentation, derived from the experiment, the stage and the stream.
        batch_size: Images in a global batch.
        rank_indices: This rank's indices within a global batch.
        first_step: Step at which the stream starts: the number of steps already taken.
        cache_bytes: Memory for this dataset's decoded images, in bytes, all loader processes together.
        total_cache_bytes: Memory for the decoded images of all datasets, in bytes; at least `cache_bytes` is used.
    """

    samples: Samples
    decoder: Decoder
    seed: int
    batch_size: int
    rank_indices: range
    first_step: int = 0
    cache_bytes: int = 0
    total_cache_bytes: int = 0

    def __call__(self) -> DecodedStream:
        """Iterate over the images of this loader process. Each of N processes decodes every N-th batch."""
        name = self.samples.layout_digest if isinstance(self.samples, IndexedSamples) else ""
        with _image_cache.open_reader(name):
            for position, fetch in zip(
                self._positions(), self.samples.iter_positions(self._positions(), self.seed), strict=True
            ):
                yield from self._decode(position, fetch, name)

    def _decode(self, position: int, fetch: SampleFetcher, name: str) -> DecodedStream:
        """Yield the decoded sample at a position; if it is unusable, yield a message, and try other samples instead."""
        _, processes = _loader_process()
        budget, total = self.cache_bytes // processes, max(self.cache_bytes, self.total_cache_bytes) // processes
        for attempt in range(MAX_ATTEMPTS):
            try:
                sample = fetch(attempt)
                sample.check()
                label = self.decoder.get_label(sample)
                image = _image_cache.get_or_decode(name, sample, self.decoder, budget, total)
            except BrokenSampleError as error:
                yield str(error)
                continue
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(derive_seed(self.seed, position))
                decoded = self.decoder.transform(image), label
            yield decoded
            return
        raise InputError(
            f"{fetch(0).shard}: found no usable sample in {MAX_ATTEMPTS} attempts, expected readable images; zscl data "
            "check lists the unusable samples",
            code=ErrorCode.BROKEN_SAMPLES,
        )

    def _positions(self) -> Iterator[int]:
        process, processes = _loader_process()
        for step in count(self.first_step + process, processes):
            start = step * self.batch_size
            yield from range(start + self.rank_indices.start, start + self.rank_indices.stop)

    def iter_batches(self, loader: Loader) -> Batches:
        """Return an iterator over images [b, 3, H, W] and labels [b]. The sum of b over all ranks is `batch_size`."""
        return loader(BatchedDataset(self, len(self.rank_indices), self.count), self.count())

    def count(self) -> int | None:
        """Return the number of samples in the dataset; `None` if it is not known yet."""
        return _count_samples(self.samples)


@dataclass(frozen=True)
class EvaluationImages:
    """Decoded images of a dataset, divided among all ranks and their loader processes.

    Attributes:
        samples: The dataset.
        decoder: Decoder with its transforms.
        rank: This worker's rank.
        world_size: Number of workers.
        total: The number of samples of the full dataset, set only if `samples` is a subset. `max_broken_share` is a
            fraction of this number.
    """

    samples: Samples
    decoder: Decoder
    rank: int
    world_size: int
    total: int | None = None

    def __call__(self) -> DecodedStream:
        """Iterate over the images of this loader process."""
        process, processes = _loader_process()
        index = self.rank * processes + process
        for sample in self.samples.iter_shard(index, self.world_size * processes):
            try:
                yield self.decoder(sample)
            except BrokenSampleError as error:
                yield str(error)

    def iter_batches(self, batch_size: int, loader: Loader) -> Batches:
        """Return an iterator over images [b, 3, H, W] and labels [b], where b is at most `batch_size`."""
        return loader(BatchedDataset(self, batch_size, self.count), self.count())

    def count(self) -> int | None:
        """Return the number of samples in the dataset; `None` if it is not known yet."""
        return _count_samples(self.samples) if self.total is None else self.total


def _unknown_count() -> int | None:
    return None


@dataclass(frozen=True)
class BatchedDataset:
    """Stacks decoded images into batches.

    Attributes:
        items: Function that returns the decoded stream.
        batch_size: Images in a batch.
        count: Function that returns the number of samples in the dataset; `None` if it is not known yet.
    """

    items: Callable[[], DecodedStream]
    batch_size: int
    count: Callable[[], int | None] = _unknown_count

    def __call__(self) -> Iterator[Any]:
        """Iterate over batches.

        Yields:
            (images [b, 3, H, W], labels [b], messages about skipped samples, number of samples in the dataset). If an
            `InputError` occurs, it is yielded as the last item and not raised, because PyTorch would replace an error
            raised in a loader process with another error that has a traceback in its message.
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
            yield error
            return
        if batch or skipped:
            yield *_stack(batch), skipped, self.count()


def _loader_process() -> tuple[int, int]:
    """Return the index of this loader process and the number of loader processes."""
    info = get_worker_info()
    return (info.id, info.num_workers) if info else (0, 1)


def _count_samples(samples: Samples) -> int | None:
    """Return the number of samples; `None` for endless samples, and for a stream that was never read to its end."""
    if isinstance(samples, IndexedSamples):
        return len(samples)
    return samples.count if isinstance(samples, StreamedSamples) else None


def _stack(samples: list[Decoded]) -> tuple[torch.Tensor, torch.Tensor]:
    if not samples:
        return torch.empty(0), torch.empty(0)
    images, labels = zip(*samples, strict=True)
    return torch.stack(images), torch.tensor(labels)


def build_loader(compute: Compute, device: torch.device, report: Callable[[Note], None]) -> Loader:
    """Build the loader of a worker.

    Args:
        compute: The recipe's section `compute`.
        device: Device of the batches.
        report: Callback for notes about skipped samples.

    Returns:
        The loader.
    """
    return Loader(
        device,
        compute.loader_processes,
        max_broken_share=compute.max_broken_share,
        on_skip=lambda message: report(Note(text=message)),
    )
