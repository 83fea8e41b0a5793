"""Samples of remote shards, in the order in which they are streamed."""

import itertools
import random
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import IO

import fsspec
import webdataset

from schemas.errors import InputError
from schemas.redaction import mask_urls
from zscl.data.sample import ATTEMPTS, Sample, SampleFetcher, decode_text
from zscl.data.tar import Tail, read_samples, reason_of
from zscl.runtime.hashing import sha256_of
from zscl.runtime.seeding import derive_seed

SHUFFLE_BUFFER = 2_000  # samples held while streaming; local shards are shuffled as a whole instead


class StreamedSamples:
    """Remote samples in stream order through WebDataset, shuffled by shard and in a buffer.

    The order does not depend on how many processes read: each reads the whole stream and keeps its own positions,
    so the bytes read grow with workers x loader processes.
    """

    def __init__(self, urls: Sequence[str]) -> None:
        self.urls = list(urls)
        self.count: int | None = None  # of samples, once this process has read all of them

    def iter_positions(self, positions: Iterable[int], seed: int) -> Iterator[SampleFetcher]:
        """See `Samples.at`; a sample from just before in the stream may stand in, at its start one from just behind."""
        stream = itertools.chain.from_iterable(self._epoch(seed, epoch) for epoch in itertools.count())
        first = list(itertools.islice(stream, ATTEMPTS))
        latest: deque[Sample] = deque(maxlen=ATTEMPTS)
        numbered = enumerate(itertools.chain(first, stream))
        for position in positions:
            for index, sample in numbered:
                latest.appendleft(sample)
                if index == position:
                    break
            near = latest if position >= ATTEMPTS else [first[position], *first[:position], *first[position + 1 :]]
            yield partial(_near, near)

    @property
    def digest(self) -> str:
        """Of remote samples, only where they lie is known beforehand."""
        return sha256_of(*map(mask_urls, self.urls))

    def iter_shard(self, part: int = 0, parts: int = 1) -> Iterator[Sample]:
        """See `Samples.once`."""
        return itertools.islice(self._counted(_stream(self.urls)), part, None, parts)

    def texts(self) -> Iterator[str]:
        """The .txt members of usable samples, in order."""
        for sample in _stream(self.urls):
            if sample.fault is None and sample.text is not None:
                yield decode_text(sample.text)

    def _epoch(self, seed: int, epoch: int) -> Iterator[Sample]:
        rng = random.Random(derive_seed(seed, epoch))
        urls = rng.sample(self.urls, len(self.urls))
        shuffle = webdataset.filters.shuffle(SHUFFLE_BUFFER, initial=SHUFFLE_BUFFER, rng=rng)
        yield from shuffle(self._counted(_stream(urls)))

    def _counted(self, samples: Iterator[Sample]) -> Iterator[Sample]:
        """Pass all samples on, and know behind the last one how many they are."""
        count = 0
        for sample in samples:
            count += 1
            yield sample
        self.count = count


def _opened(url: str) -> IO[bytes]:
    """Open a remote file.

    Raises:
        InputError: it cannot be.
    """
    try:
        opened: IO[bytes] = fsspec.open(url, "rb").open()
    except Exception as error:  # fsspec raises what its stores raise: no credentials, no such bucket, ...
        raise InputError(f"{url}: found no readable shard ({error}), expected a tar") from error
    return opened


def _near(samples: Sequence[Sample], attempt: int) -> Sample:
    return samples[min(attempt, len(samples) - 1)]


def _stream(urls: Sequence[str]) -> Iterator[Sample]:
    for url in urls:
        with _opened(url) as opened:
            samples = read_samples(Tail(opened, url), url)
            while (sample := _next_sample(samples, url)) is not None:
                yield sample


def _next_sample(samples: Iterator[Sample], url: str) -> Sample | None:
    try:
        return next(samples, None)
    except InputError:
        raise
    except Exception as error:  # of the tar, or of the store: it may break off in the middle
        raise InputError(f"{url}: found no readable shard ({reason_of(error)}), expected a tar") from error
