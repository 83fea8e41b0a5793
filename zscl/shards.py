"""Tar shards: which samples lie where.

A shard is a tar of samples KEY.(jpg|jpeg|png|webp) + KEY.cls or KEY.txt. Local shards are indexed by member
offsets, so that any sample is one positional read away; remote ones are streamed through WebDataset, in order.
Nothing here unpickles: only image, label and text members are ever read.
"""

import hashlib
import itertools
import os
import random
import re
import tarfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path, PurePosixPath
from typing import IO, Any, Protocol
from urllib.parse import urlsplit

import fsspec
import torch
import webdataset
from braceexpand import braceexpand
from filelock import FileLock

from schemas.base import InputError
from schemas.secrets import mask_urls
from zscl.files import digest, patiently, whole_file

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
READ_SUFFIXES = (*IMAGE_SUFFIXES, "cls", "txt")  # no other member is ever read
LARGEST_MEMBER = 2**28  # bytes: what claims to be larger is no image, label or text
MOST_SHARDS = 1_000_000
MOST_READS_IN_VAIN = 100
SHUFFLE_BUFFER = 2_000  # samples held while streaming; local shards are shuffled as a whole instead


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


def seed_of(*names: object) -> int:
    """Hash any names to a seed that does not depend on the process or platform."""
    return int.from_bytes(hashlib.sha256(repr(names).encode()).digest()[:7])


def open_samples(locations: Sequence[str], cache: str | None = None) -> "IndexedSamples | StreamedSamples":
    """Resolve shards (paths, globs, brace ranges, URLs, folders) and index them where they are local.

    Args:
        locations: of shards.
        cache: folder that remote shards are copied to, once; without one they are streamed.

    Raises:
        InputError: a location matches nothing, or a shard is missing, truncated or not a tar.
    """
    expanded = [shard for location in locations for shard in _expanded(location)]
    if any("://" in shard for shard in expanded):
        urls = [url for shard in expanded for url in (_remote_glob(shard) if "://" in shard else [f"file://{shard}"])]
        if cache is None:
            return StreamedSamples(urls)
        return IndexedSamples([cached(url, cache) for url in urls])
    return IndexedSamples([path for shard in expanded for path in _local_files(Path(shard))])


def _expanded(location: str) -> list[str]:
    """What a location's brace ranges mean; `::` parts several."""
    if _most_shards(location) > MOST_SHARDS:
        raise InputError(f"{location}: found a range of more than {MOST_SHARDS} shards, expected fewer")
    try:
        return [shard for part in location.split("::") for shard in braceexpand(part)]
    except (ValueError, IndexError, RecursionError) as error:  # braces that do not close
        raise InputError(f"{location}: found no readable brace range, expected one as in {{0..9}}.tar") from error


def _most_shards(location: str) -> int:
    """An upper bound of how many shards a location's braces mean: to find out exactly may take for ever."""
    most, commas = 1, []
    for sign in location:
        if sign == "{":
            commas.append(0)
        elif sign == "," and commas:
            commas[-1] += 1
        elif sign == "}" and commas:
            most *= 1 + commas.pop()
    for first, last in re.findall(r"\{(-?[0-9]+)\.\.(-?[0-9]+)", location):
        digits = max(len(first), len(last))
        most *= 1 + abs(int(last) - int(first)) if digits < 20 else MOST_SHARDS + 1
    letters: int = 52 ** len(re.findall(r"\{[a-zA-Z]\.\.[a-zA-Z]", location))
    return most * letters


def _remote_glob(url: str) -> list[str]:
    web = url.startswith(("http://", "https://"))  # where a question mark begins the query
    if not any(mark in (url.partition("?")[0] if web else url) for mark in "*?["):
        return [url]
    try:
        found = [str(file.full_name) for file in fsspec.open_files(url, "rb")]
    except Exception as error:  # fsspec raises what its stores raise
        raise InputError(f"{url}: cannot be listed ({error}), expected shards of that pattern") from error
    if not found:
        raise InputError(f"{url}: found no file of that pattern, expected at least one shard")
    return sorted(found, key=lambda name: _natural(Path(name)))


def cached(url: str, cache: str) -> Path:
    """Copy a remote file to the cache, whole or not at all, unless it is there with the size it has; return the copy.

    Raises:
        InputError: it cannot be read.
    """
    # A presigned URL is signed anew each day, and its secrets are no part of a file's name.
    name = PurePosixPath(urlsplit(url).path).stem[:100] or "shard"
    copy_of_it = Path(cache) / digest(mask_urls(url))[:16] / f"{name}.tar"
    try:
        filesystem, path = fsspec.core.url_to_fs(url)
        copy_of_it.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(copy_of_it.with_suffix(".lock")):  # of the workers on a machine, one copies
            if not copy_of_it.is_file() or copy_of_it.stat().st_size != filesystem.size(path):
                with whole_file(copy_of_it) as temporary:
                    filesystem.get_file(path, str(temporary))
    except Exception as error:  # fsspec raises what its stores raise: no credentials, no such bucket, ...
        raise InputError(f"{url}: found no readable shard ({error}), expected a tar") from error
    return copy_of_it


def _local_files(path: Path) -> list[Path]:
    try:
        return _found_files(path)
    except InputError:
        raise
    except (OSError, ValueError) as error:  # a name that no file can have, a pattern that is none, no permission
        raise InputError(f"{path}: cannot be read ({error}), expected a shard or a folder of them") from error


def _found_files(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(path.glob("*.tar"), key=_natural) or sorted(
            file
            for file in path.rglob("[!.]*")
            if file.suffix.lower().removeprefix(".") in IMAGE_SUFFIXES and file.is_file()
        )
        if not files:
            raise InputError(f"{path}: found no .tar shard and no image file, expected at least one")
        return files
    if any(mark in path.name for mark in "*?["):
        files = sorted(path.parent.glob(path.name), key=_natural)
        if not files:
            raise InputError(f"{path}: found no file of that pattern, expected at least one shard")
        return files
    if not path.is_file():
        raise InputError(f"{path}: found no such file, expected a shard")
    return [path]


def _natural(path: Path) -> tuple[int, str]:
    return (int(path.stem) if path.stem.isdecimal() and len(path.stem) < 20 else -1, path.name)


# --------------------------------------------------------------------------------------------- local shards

KINDS = ("image", "label", "text")
ABSENT = (-1, 0, 0)


class IndexedSamples:
    """Local samples by position: shuffled as a whole, O(1) to any position, however many processes read.

    `table[sample, kind]` is the (file, offset, size) of a member: 72 bytes a sample, so that ImageNet's index
    stays under 100 MB. `places[sample]` is its number in the set that it is told apart in, and `total` the size of the
    set that this one is all or a part of.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.files: list[Path] = []
        rows = [row for file in files for row in self._index(file)]
        if not rows:
            raise InputError(f"{files[0].parent}: found no image in its shards, expected at least one")
        self.table = torch.tensor(rows)
        self.places, self.total = torch.arange(len(rows)), len(rows)

    def __len__(self) -> int:
        return len(self.table)

    def only(self, indices: Sequence[int]) -> "IndexedSamples":
        """The samples at these places, in this order; each keeps its place in the whole set."""
        chosen = copy(self)
        chosen.__dict__.pop("digest", None)
        chosen.table, chosen.places = self.table[list(indices)], self.places[list(indices)]
        return chosen

    def counted_anew(self) -> "IndexedSamples":
        """The same samples as a set of their own, in which their places are counted from 0."""
        chosen = copy(self)
        chosen.places = torch.arange(len(self))
        return chosen

    def at(self, positions: Iterable[int], seed: int) -> Iterator[Draw]:
        """See `Samples.at`: epoch after epoch, each a permutation of its own; any other sample may stand in."""
        epoch, order = -1, torch.empty(0)
        with _Descriptors() as descriptors:
            for position in positions:
                if position // len(self) != epoch:
                    epoch = position // len(self)
                    generator = torch.Generator().manual_seed(seed_of(seed, epoch))
                    order = torch.randperm(len(self), generator=generator)
                yield partial(self._draw, descriptors, int(order[position % len(self)]), (seed, position))

    def _draw(self, descriptors: "_Descriptors", index: int, place: tuple[int, int], attempt: int) -> Sample:
        return self._read(descriptors, index if attempt == 0 else seed_of(*place, attempt) % len(self))

    def once(self, part: int = 0, parts: int = 1) -> Iterator[Sample]:
        """See `Samples.once`."""
        with _Descriptors() as descriptors:
            for index in range(part, len(self), parts):
                yield self._read(descriptors, index)

    def texts(self) -> Iterator[str]:
        """The .txt members, in order."""
        with _Descriptors() as descriptors:
            for row in self.table.tolist():
                text = self._member(descriptors, row[KINDS.index("text")])
                if text is not None:
                    yield text.decode("utf-8", errors="replace").strip()

    def labels(self) -> Iterator[tuple[str, str, bytes | None]]:
        """Each sample's (shard, key, label), in order."""
        with _Descriptors() as descriptors:
            for row in self.table.tolist():
                shard, key = self._name(descriptors, row)
                yield shard, key, self._member(descriptors, row[KINDS.index("label")])

    @property
    def layout(self) -> str:
        """What tells these samples from others on this machine, at no cost: where their members lie."""
        return digest(self.table.numpy().tobytes(), self.places.numpy().tobytes(), *map(str, self.files))

    @cached_property
    def digest(self) -> str:
        """What tells these samples from others without reading the images: names, places, sizes and labels."""
        names = (f"{Path(shard).name} {key} ".encode() + (label or b"") for shard, key, label in self.labels())
        return digest(self.table.numpy().tobytes(), *names)

    def _read(self, descriptors: "_Descriptors", index: int) -> Sample:
        row = self.table[index].tolist()
        image, label, text = (self._member(descriptors, member) for member in row)
        shard, key = self._name(descriptors, row)
        return Sample(image or b"", label, text, shard, key, place=int(self.places[index]))

    def _member(self, descriptors: "_Descriptors", member: list[int]) -> bytes | None:
        file, offset, size = member
        return None if file < 0 else descriptors.read(self.files[file], offset, size)

    def _name(self, descriptors: "_Descriptors", row: list[list[int]]) -> tuple[str, str]:
        number, offset, _ = row[KINDS.index("image")]
        file = self.files[number]
        if offset == 0:
            return str(file.parent), file.stem
        header = descriptors.read(file, offset - tarfile.BLOCKSIZE, tarfile.BLOCKSIZE)  # a tar header: name first
        name = header[: tarfile.LENGTH_NAME].rstrip(b"\0").decode("utf-8", errors="replace")
        return str(file), name.rpartition(".")[0]

    def _index(self, file: Path) -> list[list[tuple[int, int, int]]]:
        if file.suffix == ".tar":
            return self._index_tar(file)
        caption = file.with_suffix(".txt")
        return [[self._whole(file), ABSENT, self._whole(caption) if caption.is_file() else ABSENT]]

    def _whole(self, file: Path) -> tuple[int, int, int]:
        self.files.append(file)
        return len(self.files) - 1, 0, file.stat().st_size

    def _index_tar(self, file: Path) -> list[list[tuple[int, int, int]]]:
        self.files.append(file)
        number = len(self.files) - 1
        members: dict[str, dict[str, tuple[int, int, int]]] = {}
        for name, offset, size in tar_members(file):
            key, suffix = webdataset.tariterators.base_plus_ext(name)
            found = members.setdefault(key, {})
            if suffix.lower() in found and suffix.lower() in READ_SUFFIXES:
                raise InputError(f"{file}: found the member '{name}' twice, expected every member once")
            found[suffix.lower()] = (number, offset, size)
        rows = []
        for found in members.values():
            image = next((found[suffix] for suffix in IMAGE_SUFFIXES if suffix in found), None)
            if image is not None:
                rows.append([image, found.get("cls", ABSENT), found.get("txt", ABSENT)])
        if not rows:
            raise InputError(f"{file}: found no image in the shard, expected at least one")
        return rows


def tar_members(file: Path) -> list[tuple[str, int, int]]:
    """Every regular member's (name, offset, size).

    Raises:
        InputError: the shard is broken, or a member that would be read is not what it says.
    """
    try:
        with tarfile.open(file, "r:") as tar:
            found = [(info.name, info.offset_data, info.size) for info in _regular(tar, str(file))]
            end = tar.offset
    except InputError:
        raise
    except Exception as error:  # what tarfile raises on foreign bytes is no closed list
        raise InputError(
            f"{file}: found a truncated or broken shard ({_reason(error)}), expected a whole tar"
        ) from error
    # A shard cut between two members reads without an error; only the end mark's absence tells.
    if file.stat().st_size < end + tarfile.BLOCKSIZE:
        raise InputError(f"{file}: found a shard without its end after {len(found)} members, expected a whole tar")
    return found


def _regular(tar: tarfile.TarFile, shard: str) -> Iterator[tarfile.TarInfo]:
    """The members that are files with a suffix, one after another; those that would be read are looked at first."""
    behind = -1
    for info in tar:
        if info.offset <= behind or info.size < 0:  # or a crafted size leads back to where we were, for ever
            raise InputError(f"{shard}: found the size {info.size} of a member, expected a whole tar")
        behind = info.offset
        name = info.name.rpartition("/")[2]
        _, suffix = webdataset.tariterators.base_plus_ext(info.name)
        if not info.isreg() or not suffix or name.startswith("."):
            continue
        if suffix.lower() in READ_SUFFIXES and (info.issparse() or info.size > LARGEST_MEMBER):
            what = "is sparse" if info.issparse() else f"has {info.size} bytes"
            raise InputError(
                f"{shard}: found the member '{info.name}', which {what}, expected files of at most "
                f"{LARGEST_MEMBER} bytes"
            )
        yield info


def _reason(error: Exception) -> str:
    said = error.args[0] if error.args and isinstance(error.args[0], str) else error  # WebDataset appends to it
    return " ".join(str(said).split())[:200] or type(error).__name__


class _Tail:
    """A stream that remembers the last block that was read of it, and is not read for ever behind its end."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self.tail, self._in_vain = stream, b"", 0

    def read(self, size: int = -1) -> bytes:
        content = self._stream.read(size)
        self._in_vain += not content
        if self._in_vain > MOST_READS_IN_VAIN:  # to pass over a member, tarfile reads all that its size claims
            raise EOFError("it ends within a member")
        self.tail = (self.tail + content)[-tarfile.BLOCKSIZE :]
        return content


class _Descriptors:
    """The shards read last, kept open."""

    LIMIT = 64

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}

    def __enter__(self) -> "_Descriptors":
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)

    def read(self, path: Path, offset: int, size: int) -> bytes:
        try:
            return patiently(lambda: self._read(path, offset, size))
        except OSError as error:
            raise InputError(f"{path}: cannot be read any more ({error.strerror}), expected a shard") from error

    def _read(self, path: Path, offset: int, size: int) -> bytes:
        if path not in self._open:
            if len(self._open) == self.LIMIT:
                os.close(self._open.pop(next(iter(self._open))))
            self._open[path] = os.open(path, os.O_RDONLY)
        try:
            return os.pread(self._open[path], size, offset)
        except OSError:  # storage that comes back may not know the descriptor
            os.close(self._open.pop(path))
            raise


# -------------------------------------------------------------------------------------------- remote shards


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
                yield sample.text.decode("utf-8", errors="replace").strip()

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
            stream = _Tail(opened)
            groups = webdataset.tariterators.group_by_keys(_members(stream, url))
            while (group := _next_group(groups, url)) is not None:
                image = next((group[suffix] for suffix in IMAGE_SUFFIXES if suffix in group), None)
                if image is not None:
                    yield Sample(image, group.get("cls"), group.get("txt"), url, group["__key__"])
            # A shard cut between two members reads without an error; only the end mark's absence tells.
            if stream.tail.strip(b"\0") or not stream.tail:
                raise InputError(f"{url}: found no readable shard (it has no end), expected a tar")


def _members(stream: _Tail, url: str) -> Iterator[dict[str, Any]]:
    """The members that samples are made of, as WebDataset groups them; no other member is read."""
    with tarfile.open(fileobj=stream, mode="r|") as tar:  # type: ignore[call-overload]  # it only reads
        for info in _regular(tar, url):
            if webdataset.tariterators.base_plus_ext(info.name)[1].lower() in READ_SUFFIXES:
                member = tar.extractfile(info)
                assert member is not None
                yield {"fname": info.name, "data": member.read(), "__url__": url}
            tar.members = []  # or it remembers every header of the shard


def _next_group(groups: Iterator[dict[str, Any]], url: str) -> dict[str, Any] | None:
    try:
        return next(groups, None)
    except InputError:
        raise
    except Exception as error:  # of the tar, or of the store: it may break off in the middle
        raise InputError(f"{url}: found no readable shard ({_reason(error)}), expected a tar") from error
