"""Shards → decoded, batched, deterministic streams, through WebDataset.

A training stream is endless and a pure function of (seed, stage, position): a global batch holds the same images,
equally augmented, however many workers and loader processes share it, and from whichever step it goes on.
"""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
import webdataset
from PIL import Image, UnidentifiedImageError
from torch.utils.data import get_worker_info

from schemas.base import InputError
from zscl.shards import Sample, Samples, seed_of

Transform = Callable[[Any], torch.Tensor]
Label = int | tuple[int, ...]
LabelOf = Callable[[Sample], Label]


@dataclass(frozen=True)
class Loader:
    """How a worker reads: in `processes` of its own beside it, or itself (0); whether labels stay on the CPU."""

    device: torch.device
    processes: int = 0
    labels_stay: bool = False

    def __call__(self, batches: "Batched") -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Read batches and bring them to the device: images [b, 3, H, W] and labels [b].

        Raises:
            InputError: an image or a label cannot be read.
        """
        loader = webdataset.WebLoader(
            webdataset.DataPipeline(batches),
            batch_size=None,
            num_workers=self.processes,
            pin_memory=self.device.type == "cuda",
            prefetch_factor=4 if self.processes else None,
            generator=torch.Generator(),  # or it would draw from everybody's
        )
        for batch in loader:
            if isinstance(batch, str):  # an input error, carried as it is out of the loader process
                raise InputError(batch)
            images, labels = batch
            images = images.to(self.device, non_blocking=True)
            yield images, labels if self.labels_stay else labels.to(self.device, non_blocking=True)


@dataclass(frozen=True)
class Decode:
    """Encoded sample → (image [3, H, W], label)."""

    transform: Transform
    label_of: LabelOf

    def __call__(self, sample: Sample) -> tuple[torch.Tensor, Label]:
        """Decode one image.

        Raises:
            InputError: the image or the label cannot be read.
        """
        label = self.label_of(sample)
        try:
            with Image.open(io.BytesIO(sample.image)) as image:
                return self.transform(image.convert("RGB")), label
        except (OSError, UnidentifiedImageError, ValueError, Image.DecompressionBombError) as error:
            raise InputError(f"{sample.shard}: sample '{sample.key}' is no readable image ({error})") from error


Decoded = Iterator[tuple[torch.Tensor, Label]]


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
    """

    samples: Samples
    decode: Decode
    seed: int
    batch_size: int
    own: range
    first_step: int = 0

    def __call__(self) -> Decoded:
        """Yield what this loader process decodes: every so-many-th batch of the worker."""
        for position, sample in zip(self._positions(), self.samples.at(self._positions(), self.seed), strict=True):
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed_of(self.seed, position))
                decoded = self.decode(sample)
            yield decoded

    def _positions(self) -> Iterator[int]:
        process, processes = _process()
        for step in count(self.first_step + process, processes):
            yield from range(step * self.batch_size + self.own.start, step * self.batch_size + self.own.stop)

    def batches(self, loader: Loader) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Images [b, 3, H, W] and labels [b]; the b of all workers add up to the global batch."""
        return loader(Batched(self, len(self.own)))


@dataclass(frozen=True)
class EvaluationImages:
    """Every sample exactly once over all workers and their loader processes."""

    samples: Samples
    decode: Decode
    worker: int
    workers: int

    def __call__(self) -> Decoded:
        """Yield what this loader process decodes."""
        process, processes = _process()
        part = self.worker * processes + process
        return map(self.decode, self.samples.once(part, self.workers * processes))

    def batches(self, batch_size: int, loader: Loader) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Images [b, 3, H, W] and labels [b], with b at most `batch_size`."""
        return loader(Batched(self, batch_size))


@dataclass(frozen=True)
class Batched:
    """Decoded images, stacked; an input error ends the stream as its sentence, to cross process borders whole."""

    decoded: Callable[[], Decoded]
    batch_size: int

    def __call__(self) -> Iterator[Any]:
        """Yield (images, labels), or the sentence."""
        stack = webdataset.filters.batched(self.batch_size, collation_fn=_stack)
        try:
            yield from stack(self.decoded())
        except InputError as error:
            yield str(error)


def _process() -> tuple[int, int]:
    """This loader process's number and how many there are."""
    info = get_worker_info()
    return (info.id, info.num_workers) if info else (0, 1)


def _stack(samples: list[tuple[torch.Tensor, Label]]) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*samples, strict=True)
    return torch.stack(images), torch.tensor(labels)
