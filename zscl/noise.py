"""Images of uniform noise, as a set to distil on: what is left of distillation without any content (an ablation)."""

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count

from zscl.shards import Sample, seed_of


@dataclass(frozen=True)
class NoiseSamples:
    """Endless noise: every position has an image of its own, drawn from (seed, position) alone.

    size: height and width in pixels.
    """

    size: tuple[int, int]

    def at(self, positions: Iterable[int], seed: int) -> Iterator[Sample]:
        """See `Samples.at`."""
        height, width = self.size
        header = f"P6 {width} {height} 255\n".encode()  # PPM: plain pixels behind a header
        for position in positions:
            pixels = random.Random(seed_of(seed, position)).randbytes(3 * height * width)
            yield Sample(header + pixels, None, None, "noise", str(position))

    def once(self, part: int, parts: int) -> Iterator[Sample]:
        """See `Samples.once`; here there is no end to it."""
        return self.at(count(part, parts), seed=0)
