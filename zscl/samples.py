"""What a sample is, and what any set of them can be asked for."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from schemas.base import InputError


@dataclass(frozen=True, slots=True)
class Sample:
    """One encoded sample and where it was found; `place`: its number in its set, -1 where a stream has none."""

    image: bytes
    label: bytes | None
    text: bytes | None
    shard: str
    key: str
    place: int = -1

    def identity(self) -> tuple[int, int]:
        """Its place, and a hash of the encoded image that is never 0."""
        return self.place, 1 + int.from_bytes(hashlib.blake2b(self.image, digest_size=7).digest())


def decoded_label(member: bytes | None) -> str:
    """What a .cls member says; nothing where there is none."""
    return (member or b"").decode("ascii", errors="replace").strip()


def decoded_text(member: bytes | None) -> str:
    """What a .txt member says; nothing where there is none."""
    return (member or b"").decode("utf-8", errors="replace").strip()


class BrokenSampleError(InputError):
    """A sample that cannot be used; its sentence names shard and key."""


# A position of an endless order: the sample there, or what stands in for it at the k-th attempt to find a usable one.
Draw = Callable[[int], Sample]
ATTEMPTS = 8


class Samples(Protocol):
    """Samples in an endless shuffled order, or once in their own."""

    def at(self, positions: Iterable[int], seed: int) -> Iterator[Draw]:
        """Yield the draws at the given rising positions of the endless order that `seed` makes.

        A draw holds until the next one is asked for; what stands in depends on seed and position alone.
        """

    def once(self, part: int, parts: int) -> Iterator[Sample]:
        """Yield every `parts`-th sample from `part` on, each sample of the whole in exactly one part."""
