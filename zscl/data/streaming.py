"""Remote samples, streamed from tar shards through WebDataset and shuffled in a buffer."""

import itertools
import random
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import IO

import fsspec
import webdataset

from schemas.errors import ErrorCode, InputError
from schemas.redaction import mask_urls
from zscl.data.sample import MAX_ATTEMPTS, Sample, SampleFetcher, decode_text
from zscl.data.tar import CheckedTarStream, read_samples, summarize_error
from zscl.runtime.hashing import sha256_of
from zscl.runtime.seeding import derive_seed

SHUFFLE_BUFFER = 2_000  # samples in memory while streaming; local samples are shuffled over the whole dataset instead


class StreamedSamples:
    """Remote samples without random access. Shards are shuffled; then samples are shuffled in a buffer.

    The order does not depend on the number of processes: each process reads the whole stream and selects its own
    positions. The number of bytes read is therefore proportional to workers x loader processes.

    Attributes:
        urls: URLs of the shards.
        count: Number of samples; `None` until this process has read all of them.
    """

    def __init__(self, urls: Sequence[str]) -> None:
        self.urls = list(urls)
        self.count: int | None = None

    def iter_positions(self, positions: Iterable[int], seed: int) -> Iterator[SampleFetcher]:
        """Iterate over positions of the shuffled stream; see `Samples.iter_positions`.

        A sample that cannot be used is replaced by a preceding sample of the stream, or near the start of the stream by
        one of its first `MAX_ATTEMPTS` samples.

        Args:
            positions: Positions in ascending order.
            seed: Seed of the order of shards and samples.

        Yields:
            For each position, a function that loads its sample.
        """
        stream = itertools.chain.from_iterable(self._iter_epoch(seed, epoch) for epoch in itertools.count())
        first = list(itertools.islice(stream, MAX_ATTEMPTS))
        latest: deque[Sample] = deque(maxlen=MAX_ATTEMPTS)
        numbered = enumerate(itertools.chain(first, stream))
        for position in positions:
            for number, sample in numbered:
                latest.appendleft(sample)
                if number == position:
                    break
            near = latest if position >= MAX_ATTEMPTS else [first[position], *first[:position], *first[position + 1 :]]
            yield partial(_fetch, near)

    @property
    def digest(self) -> str:
        """Hash of the URLs, with secrets masked. The content is not hashed, because it would have to be downloaded."""
        return sha256_of(*map(mask_urls, self.urls))

    def iter_shard(self, index: int = 0, num_shards: int = 1) -> Iterator[Sample]:
        """Iterate once over part `index` of `num_shards` parts, without shuffling; see `Samples.iter_shard`."""
        return itertools.islice(self._count(_stream_samples(self.urls)), index, None, num_shards)

    def iter_texts(self) -> Iterator[str]:
        """Iterate over the texts of the .txt members of usable samples, in the order of the shards."""
        for sample in _stream_samples(self.urls):
            if sample.fault is None and sample.text is not None:
                yield decode_text(sample.text)

    def _iter_epoch(self, seed: int, epoch: int) -> Iterator[Sample]:
        rng = random.Random(derive_seed(seed, epoch))
        urls = rng.sample(self.urls, len(self.urls))
        shuffle = webdataset.filters.shuffle(SHUFFLE_BUFFER, initial=SHUFFLE_BUFFER, rng=rng)
        yield from shuffle(self._count(_stream_samples(urls)))

    def _count(self, samples: Iterator[Sample]) -> Iterator[Sample]:
        """Yield all samples, and set `count` after the last one."""
        count = 0
        for sample in samples:
            count += 1
            yield sample
        self.count = count


def _fetch(samples: Sequence[Sample], attempt: int) -> Sample:
    return samples[min(attempt, len(samples) - 1)]


def _open_url(url: str) -> IO[bytes]:
    try:
        stream: IO[bytes] = fsspec.open(url, "rb").open()
    except Exception as error:  # each fsspec backend raises its own classes of error
        raise InputError(
            f"{url}: found no readable shard ({error}), expected a tar", code=remote_error_code(error)
        ) from error
    return stream


def remote_error_code(error: Exception) -> ErrorCode:
    """Return the `ErrorCode` for an error that an fsspec backend raised."""
    return ErrorCode.NOT_FOUND if isinstance(error, FileNotFoundError) else ErrorCode.UNREACHABLE


def _stream_samples(urls: Sequence[str]) -> Iterator[Sample]:
    for url in urls:
        with _open_url(url) as stream:
            samples = read_samples(CheckedTarStream(stream, url), url)
            while (sample := _next_sample(samples, url)) is not None:
                yield sample


def _next_sample(samples: Iterator[Sample], url: str) -> Sample | None:
    try:
        return next(samples, None)
    except InputError:
        raise
    except Exception as error:  # from tarfile, or from the fsspec backend if the connection is lost
        raise InputError(
            f"{url}: found no readable shard ({summarize_error(error)}), expected a tar", code=ErrorCode.UNREADABLE
        ) from error
