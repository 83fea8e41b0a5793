"""Images of uniform noise, as a set to distil on: what is left of distillation without any content (an ablation)."""

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count

from zscl.data.sample import Draw, Sample
from zscl.runtime.seeding import seed_of


@dataclass(frozen=True)
class NoiseSamples:
    """Endless noise: every position has an image of its own, drawn from (seed, position) alone.

    size: height and width in pixels.
    """

    size: tuple[int, int]

    def at(self, positions: Iterable[int], seed: int) -> Iterator[Draw]:
        """See `Samples.at`."""
        for position in positions:
            yield partial(self._draw, seed, position)

    def once(self, part: int, parts: int) -> Iterator[Sample]:
        """See `Samples.once`; here there is no end to it."""
        return (draw(0) for draw in self.at(count(part, parts), seed=0))

    def _draw(self, seed: int, position: int, attempt: int) -> Sample:
        height, width = self.size
        header = f"P6 {width} {height} 255\n".encode()  # PPM: plain pixels behind a header
        pixels = random.Random(seed_of(seed, position)).randbytes(3 * height * width)
        return Sample(header + pixels, None, None, "noise", str(position))
