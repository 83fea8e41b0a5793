"""Encoded samples (image, label, text), the `Samples` protocol of datasets, and a dataset of uniform noise."""

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Protocol

from schemas.dataset_report import Reason
from schemas.errors import ErrorCode, InputError
from zscl.runtime.seeding import derive_seed


@dataclass(frozen=True, slots=True)
class Fault:
    """The reason why a sample cannot be used.

    Attributes:
        reason: Kind of fault. `zscl data check` reports the number of samples for each kind.
        detail: What was found and what was expected.
    """

    reason: Reason
    detail: str


@dataclass(frozen=True, slots=True)
class Sample:
    """One encoded sample and its origin.

    Attributes:
        image: Encoded image; empty if it was not read.
        label: Content of the .cls member; `None` if there is none.
        text: Content of the .txt member; `None` if there is none.
        shard: Path or URL of the shard; for an image file outside shards, the path of its folder.
        key: The sample's key in WebDataset's sense: the file name without its suffix.
        index: Index in the dataset; -1 for a streamed sample.
        fault: The reason why the sample cannot be used, as far as its file names show; `None` if they show no fault.
            The content is not checked.
    """

    image: bytes
    label: bytes | None
    text: bytes | None
    shard: str
    key: str
    index: int = -1
    fault: Fault | None = None

    def check(self) -> None:
        """Raise an error if the sample has a fault.

        Raises:
            BrokenSampleError: The sample has a fault. The message names its shard and key.
        """
        if self.fault is not None:
            raise self.as_error()

    def as_error(self) -> "BrokenSampleError":
        """Return the error that `check` raises for a sample with a fault."""
        why = f"{self.fault.reason}: {self.fault.detail}" if self.fault else "no fault"
        return BrokenSampleError(f"{self.shard}: sample '{self.key}' cannot be used ({why})")

    def identity(self) -> tuple[int, int]:
        """Return the index and a 56-bit hash of the encoded image; the hash is never 0."""
        return self.index, 1 + int.from_bytes(hashlib.blake2b(self.image, digest_size=7).digest())


def printable_name(name: str) -> str:
    """Return a file name with invalid UTF-8, line breaks and control characters escaped."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


def decode_label(member: bytes | None) -> str:
    """Decode the content of a .cls member; return an empty text for `None`."""
    return (member or b"").decode("ascii", errors="replace").strip()


def decode_text(member: bytes | None) -> str:
    """Decode the content of a .txt member; return an empty text for `None`."""
    return (member or b"").decode("utf-8", errors="replace").strip()


class BrokenSampleError(InputError):
    """A sample cannot be used. The message names its shard and key."""

    def __init__(self, message: str, *, code: ErrorCode = ErrorCode.BROKEN_SAMPLES, field: str | None = None) -> None:
        super().__init__(message, code=code, field=field)


def check_broken_share(message: str, broken_count: int, total: int, max_broken_share: float) -> None:
    """Raise an error if too many samples of a dataset cannot be used.

    Args:
        message: Description of one of the unusable samples.
        broken_count: Number of unusable samples.
        total: Number of samples in the dataset.
        max_broken_share: Largest accepted fraction of unusable samples.

    Raises:
        InputError: The fraction of unusable samples is larger than accepted.
    """
    if broken_count > max_broken_share * total:
        raise InputError(
            f"{message}; found {broken_count} unusable samples of {total}, expected at most a fraction of "
            f"{max_broken_share:g} (compute.max_broken_share)",
            code=ErrorCode.BROKEN_SAMPLES,
            field="compute.max_broken_share",
        )


# Function that loads the sample at one position. Its argument is the number of the attempt, from 0. Attempt 0 loads the
# sample itself. If that sample cannot be used, the caller tries the next attempts, which load other samples instead.
SampleFetcher = Callable[[int], Sample]
MAX_ATTEMPTS = 8


class Samples(Protocol):
    """Protocol of datasets that can be read in an endless shuffled order, or once in the order of their files."""

    def iter_positions(self, positions: Iterable[int], seed: int) -> Iterator[SampleFetcher]:
        """Iterate over positions of the endless shuffled order.

        Args:
            positions: Positions in ascending order.
            seed: Seed of the order. The samples that replace unusable samples depend only on the seed and the position.

        Yields:
            For each position, a function that loads its sample. It must be called before the next item is requested.
        """

    def iter_shard(self, index: int, num_shards: int) -> Iterator[Sample]:
        """Iterate once over part `index` of `num_shards` disjoint parts of the dataset; each process reads one part.

        Args:
            index: Number of the part, from 0.
            num_shards: Number of parts.

        Yields:
            Every `num_shards`-th sample of the dataset, starting with sample `index`.
        """


@dataclass(frozen=True)
class NoiseSamples:
    """Infinite dataset of images of uniform noise. An image depends only on the seed and its position.

    Attributes:
        size: Height and width in pixels.
    """

    size: tuple[int, int]

    def iter_positions(self, positions: Iterable[int], seed: int) -> Iterator[SampleFetcher]:
        """Iterate over positions of the dataset; see `Samples.iter_positions`. Every sample can be used."""
        for position in positions:
            yield partial(self._draw, seed, position)

    def iter_shard(self, index: int, num_shards: int) -> Iterator[Sample]:
        """Iterate over part `index` of `num_shards` parts, without end; see `Samples.iter_shard`."""
        return (fetch(0) for fetch in self.iter_positions(count(index, num_shards), seed=0))

    def _draw(self, seed: int, position: int, attempt: int) -> Sample:
        height, width = self.size
        header = f"P6 {width} {height} 255\n".encode()  # PPM: uncompressed pixels after a header
        pixels = random.Random(derive_seed(seed, position)).randbytes(3 * height * width)
        return Sample(header + pixels, None, None, "noise", str(position))
