"""Samples of local shards and loose images: indexed by member offsets, any of them one positional read away."""

import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from functools import cached_property, partial
from pathlib import Path

import torch
import webdataset

from schemas.base import InputError
from zscl.files import digest, patiently
from zscl.members import READ_SUFFIXES, image_of, tar_members
from zscl.samples import Draw, Sample, decoded_text
from zscl.seeds import seed_of

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
                    yield decoded_text(text)

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
            image = image_of(found)
            if image is not None:
                rows.append([image, found.get("cls", ABSENT), found.get("txt", ABSENT)])
        if not rows:
            raise InputError(f"{file}: found no image in the shard, expected at least one")
        return rows


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
            return patiently(lambda: self._read(path, offset, size), within=path.parent, what=path)
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
