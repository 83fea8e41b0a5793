"""Samples, the protocol of a set of samples, and a set of uniform noise."""

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Protocol

from schemas.dataset_report import Reason
from schemas.errors import InputError
from zscl.runtime.seeding import derive_seed


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a sample cannot be used, as its file names tell: no content was looked at."""

    reason: Reason
    detail: str


@dataclass(frozen=True, slots=True)
class Sample:
    """One encoded sample and where it was found.

    place: its number in its set, -1 where a stream has none; fault: why it cannot be used.
    """

    image: bytes
    label: bytes | None
    text: bytes | None
    shard: str
    key: str
    index: int = -1
    fault: Fault | None = None

    def check(self) -> None:
        """Refuse a sample whose members make none.

        Raises:
            BrokenSampleError: naming shard and key.
        """
        if self.fault is not None:
            raise self.error()

    def error(self) -> "BrokenSampleError":
        """What `check` raises."""
        why = f"{self.fault.reason}: {self.fault.detail}" if self.fault else "no fault"
        return BrokenSampleError(f"{self.shard}: sample '{self.key}' cannot be used ({why})")

    def identity(self) -> tuple[int, int]:
        """Its place, and a hash of the encoded image that is never 0."""
        return self.index, 1 + int.from_bytes(hashlib.blake2b(self.image, digest_size=7).digest())


def printable_name(name: str) -> str:
    """A file's name as text files can hold it: bytes that are no UTF-8, line breaks and the like are escaped."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


def decode_label(member: bytes | None) -> str:
    """What a .cls member says; nothing where there is none."""
    return (member or b"").decode("ascii", errors="replace").strip()


def decode_text(member: bytes | None) -> str:
    """What a .txt member says; nothing where there is none."""
    return (member or b"").decode("utf-8", errors="replace").strip()


class BrokenSampleError(InputError):
    """A sample that cannot be used; its sentence names shard and key."""


def check_broken_share(sentence: str, broken: int, total: int, max_broken_share: float) -> None:
    """Refuse a set of which too many samples cannot be used.

    Args:
        sentence: about one of them.
        broken: how many they are.
        total: samples in the set.
        max_broken_share: that may be broken.

    Raises:
        InputError: more of them are.
    """
    if broken > max_broken_share * total:
        raise InputError(
            f"{sentence}; found {broken} such samples of {total}, expected at most a share of "
            f"{max_broken_share:g} (compute.max_broken_share)"
        )


# A position of an endless order: the sample there, or what stands in for it at the k-th attempt to find a usable one.
SampleFetcher = Callable[[int], Sample]
ATTEMPTS = 8


class Samples(Protocol):
    """Samples in an endless shuffled order, or once in their own."""

    def iter_positions(self, positions: Iterable[int], seed: int) -> Iterator[SampleFetcher]:
        """Yield the draws at the given rising positions of the endless order that `seed` makes.

        A draw holds until the next one is asked for; what stands in depends on seed and position alone.
        """

    def iter_shard(self, part: int, parts: int) -> Iterator[Sample]:
        """Yield every `parts`-th sample from `part` on, each sample of the whole in exactly one part."""


@dataclass(frozen=True)
class NoiseSamples:
    """Endless noise: every position has an image of its own, drawn from (seed, position) alone.

    size: height and width in pixels.
    """

    size: tuple[int, int]

    def iter_positions(self, positions: Iterable[int], seed: int) -> Iterator[SampleFetcher]:
        """See `Samples.at`."""
        for position in positions:
            yield partial(self._draw, seed, position)

    def iter_shard(self, part: int, parts: int) -> Iterator[Sample]:
        """See `Samples.once`; here there is no end to it."""
        return (draw(0) for draw in self.iter_positions(count(part, parts), seed=0))

    def _draw(self, seed: int, position: int, attempt: int) -> Sample:
        height, width = self.size
        header = f"P6 {width} {height} 255\n".encode()  # PPM: plain pixels behind a header
        pixels = random.Random(derive_seed(seed, position)).randbytes(3 * height * width)
        return Sample(header + pixels, None, None, "noise", str(position))
