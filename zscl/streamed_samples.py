"""Samples of remote shards, in the order in which they are streamed."""

import itertools
import random
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import IO, Any

import fsspec
import webdataset

from schemas.base import InputError
from schemas.secrets import mask_urls
from zscl.files import digest
from zscl.members import Tail, image_of, read_members, reason_of
from zscl.samples import ATTEMPTS, Draw, Sample, decoded_text
from zscl.seeds import seed_of

SHUFFLE_BUFFER = 2_000  # samples held while streaming; local shards are shuffled as a whole instead


class StreamedSamples:
    """Remote samples in stream order through WebDataset, shuffled by shard and in a buffer.

    The order does not depend on how many processes read: each reads the whole stream and keeps its own positions,
    so the bytes read grow with workers x loader processes.
    """

    def __init__(self, urls: Sequence[str]) -> None:
        self.urls = list(urls)

    def at(self, positions: Iterable[int], seed: int) -> Iterator[Draw]:
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
        return digest(*map(mask_urls, self.urls))

    def once(self, part: int = 0, parts: int = 1) -> Iterator[Sample]:
        """See `Samples.once`."""
        return itertools.islice(_stream(self.urls), part, None, parts)

    def texts(self) -> Iterator[str]:
        """The .txt members, in order."""
        for sample in _stream(self.urls):
            if sample.text is not None:
                yield decoded_text(sample.text)

    def _epoch(self, seed: int, epoch: int) -> Iterator[Sample]:
        rng = random.Random(seed_of(seed, epoch))
        urls = rng.sample(self.urls, len(self.urls))
        shuffle = webdataset.filters.shuffle(SHUFFLE_BUFFER, initial=SHUFFLE_BUFFER, rng=rng)
        empty = True
        for sample in shuffle(_stream(urls)):
            empty = False
            yield sample
        if empty:
            raise InputError(f"{self.urls[0]}: found no image in the shards, expected at least one")


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
            stream = Tail(opened)
            groups = webdataset.tariterators.group_by_keys(read_members(stream, url))
            while (group := _next_group(groups, url)) is not None:
                image = image_of(group)
                if image is not None:
                    yield Sample(image, group.get("cls"), group.get("txt"), url, group["__key__"])
            # A shard cut between two members reads without an error; only the end mark's absence tells.
            if stream.tail.strip(b"\0") or not stream.tail:
                raise InputError(f"{url}: found no readable shard (it has no end), expected a tar")


def _next_group(groups: Iterator[dict[str, Any]], url: str) -> dict[str, Any] | None:
    try:
        return next(groups, None)
    except InputError:
        raise
    except Exception as error:  # of the tar, or of the store: it may break off in the middle
        raise InputError(f"{url}: found no readable shard ({reason_of(error)}), expected a tar") from error
