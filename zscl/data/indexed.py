"""Samples of local shards and loose images: indexed by member offsets, any of them one positional read away."""

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from functools import cached_property, partial
from pathlib import Path

import torch

from schemas.errors import InputError
from zscl.data.sample import Fault, Sample, SampleFetcher, decode_text, printable_name
from zscl.data.tar import EXPECTED_SUFFIXES, OTHER_IMAGE_SUFFIXES, Member, assemble, is_side_data, tar_members
from zscl.runtime.hashing import sha256_of
from zscl.runtime.retry import retry_io
from zscl.runtime.seeding import derive_seed

KINDS = ("image", "label", "text")
ABSENT = (-1, 0, 0)
Place = tuple[int, int, int]  # file, offset, size


class IndexedSamples:
    """Local samples by position: shuffled as a whole, O(1) to any position, however many processes read.

    `table[sample, kind]` is the (file, offset, size) of a member: 72 bytes a sample, so that ImageNet's index, with
    the keys, stays under 150 MB. `places[sample]` is its number in the set that it is told apart in. A sample whose
    members make none is there with its fault: it is never read, but it is drawn, named and counted.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.files: list[Path] = []
        self._faults: dict[int, tuple[Path, Fault]] = {}  # by row
        keys: list[bytes] = []
        rows: list[tuple[Place, ...]] = []
        for file in files:
            for key, row, fault in self._index(file):
                if fault is not None:
                    self._faults[len(rows)] = file, fault
                keys.append(printable_name(key).encode())
                rows.append(row)
        if not rows:
            raise InputError(f"{files[0].parent}: found no image in its shards, expected at least one")
        self.table = torch.tensor(rows)
        self.places = torch.arange(len(rows))
        self._rows = torch.arange(len(rows))  # of the index of all files: `table` may be a part of it
        self._keys = b"".join(keys)
        self._key_ends = torch.tensor([0, *itertools.accumulate(map(len, keys))])

    def __len__(self) -> int:
        return len(self.table)

    def subset(self, indices: Sequence[int]) -> "IndexedSamples":
        """The samples at these places, in this order; each keeps its place in the whole set."""
        chosen, wanted = copy(self), list(indices)
        chosen.__dict__.pop("digest", None)
        chosen.table, chosen.places, chosen._rows = self.table[wanted], self.places[wanted], self._rows[wanted]
        return chosen

    def reindexed(self) -> "IndexedSamples":
        """The same samples as a set of their own, in which their places are counted from 0."""
        chosen = copy(self)
        chosen.places = torch.arange(len(self))
        return chosen

    def iter_positions(self, positions: Iterable[int], seed: int) -> Iterator[SampleFetcher]:
        """See `Samples.at`: epoch after epoch, each a permutation of its own; any other sample may stand in."""
        epoch, order = -1, torch.empty(0)
        with _Descriptors() as descriptors:
            for position in positions:
                if position // len(self) != epoch:
                    epoch = position // len(self)
                    generator = torch.Generator().manual_seed(derive_seed(seed, epoch))
                    order = torch.randperm(len(self), generator=generator)
                yield partial(self._draw, descriptors, int(order[position % len(self)]), (seed, position))

    def _draw(self, descriptors: "_Descriptors", index: int, place: tuple[int, int], attempt: int) -> Sample:
        return self._read(descriptors, index if attempt == 0 else derive_seed(*place, attempt) % len(self))

    def iter_shard(self, part: int = 0, parts: int = 1) -> Iterator[Sample]:
        """See `Samples.once`."""
        with _Descriptors() as descriptors:
            for index in range(part, len(self), parts):
                yield self._read(descriptors, index)

    def texts(self) -> Iterator[str]:
        """The .txt members of usable samples, in order."""
        with _Descriptors() as descriptors:
            for places, row in zip(self.table.tolist(), self._rows.tolist(), strict=True):
                text = None if row in self._faults else self._member(descriptors, places[KINDS.index("text")])
                if text is not None:
                    yield decode_text(text)

    def labels(self) -> Iterator[Sample]:
        """Each sample without its image and text, in order."""
        with _Descriptors() as descriptors:
            for places, row, place in zip(self.table.tolist(), self._rows.tolist(), self.places.tolist(), strict=True):
                yield self._sample(descriptors, places, row, place, ("label",))

    def faulty(self) -> list[Sample]:
        """The samples whose members make none, without what they hold."""
        if not self._faults:
            return []
        indices = [index for index, row in enumerate(self._rows.tolist()) if row in self._faults]
        with _Descriptors() as descriptors:
            return [self._read(descriptors, index, ()) for index in indices]

    def dotted_keys(self) -> list[str]:
        """The keys of samples of shards that have a dot in them, where WebDataset's own reader ends a key."""
        ends = self._key_ends.tolist()
        found = []
        for place, row in zip(self.table[:, 0, 0].tolist(), self._rows.tolist(), strict=True):
            key = self._keys[ends[row] : ends[row + 1]]
            if b"." in key.rpartition(b"/")[2] and self._file_of(row, place).suffix.lower() == ".tar":
                found.append(key.decode())
        return found

    @property
    def layout(self) -> str:
        """What tells these samples from others on this machine, at no cost: where their members lie."""
        return sha256_of(self.table.numpy().tobytes(), self.places.numpy().tobytes(), *map(os.fsencode, self.files))

    @cached_property
    def digest(self) -> str:
        """What tells these samples from others without reading the images: names, places, sizes and labels."""
        names = (
            os.fsencode(Path(sample.shard).name) + f" {sample.key} ".encode() + (sample.label or b"")
            for sample in self.labels()
        )
        return sha256_of(self.table.numpy().tobytes(), *names)

    def _read(self, descriptors: "_Descriptors", index: int, kinds: Sequence[str] = KINDS) -> Sample:
        places, row, place = self.table[index].tolist(), int(self._rows[index]), int(self.places[index])
        return self._sample(descriptors, places, row, place, kinds)

    def _sample(
        self, descriptors: "_Descriptors", places: list[list[int]], row: int, place: int, kinds: Sequence[str]
    ) -> Sample:
        """A sample with what is wanted of it."""
        image, label, text = (
            self._member(descriptors, member) if kind in kinds else None
            for kind, member in zip(KINDS, places, strict=True)
        )
        start, end = self._key_ends[row : row + 2].tolist()
        file, fault = self._file_of(row, places[0][0]), self._faults[row][1] if row in self._faults else None
        shard = str(file if file.suffix.lower() == ".tar" else file.parent)
        return Sample(image or b"", label, text, shard, self._keys[start:end].decode(), place, fault)

    def _file_of(self, row: int, place: int) -> Path:
        """The shard or the loose image of a row whose image lies in the file `place`, where it has no fault."""
        return self._faults[row][0] if row in self._faults else self.files[place]

    def _member(self, descriptors: "_Descriptors", place: list[int]) -> bytes | None:
        file, offset, size = place
        return None if file < 0 else descriptors.read(self.files[file], offset, size)

    def _index(self, file: Path) -> Iterator[tuple[str, tuple[Place, ...], Fault | None]]:
        """The key, the places and the fault of each sample of a shard, or of a loose image."""
        if file.suffix.lower() == ".tar":
            yield from self._index_tar(file)
            return
        caption = file.with_suffix(".txt")
        fault = _fault_of_file(file)
        image = ABSENT if fault else self._whole(file)
        yield file.stem, (image, ABSENT, self._whole(caption) if caption.is_file() else ABSENT), fault

    def _whole(self, file: Path) -> Place:
        self.files.append(file)
        return len(self.files) - 1, 0, file.stat().st_size

    def _index_tar(self, file: Path) -> Iterator[tuple[str, tuple[Place, ...], Fault | None]]:
        self.files.append(file)
        number = len(self.files) - 1
        members: dict[str, list[tuple[Member, Place]]] = {}
        for member in tar_members(file):
            members.setdefault(member.key, []).append((member, (number, member.offset, member.size)))
        if not members:
            raise InputError(f"{file}: found no image in the shard, expected at least one")
        with_image = {key for key, found in members.items() if any(member.kind == "image" for member, _ in found)}
        for key, found in members.items():
            if key not in with_image and is_side_data([member for member, _ in found], with_image):
                continue
            image, label, text, fault = assemble(found, str(file))
            yield key, (image or ABSENT, label or ABSENT, text or ABSENT), fault


def _fault_of_file(file: Path) -> Fault | None:
    """Why a loose file is no image that can be read, as its name tells."""
    if not file.is_file():
        return Fault("link", f"found {printable_name(file.name)}, a link to a file that is not there")
    suffix = file.suffix.lower().removeprefix(".")
    if not suffix or suffix in OTHER_IMAGE_SUFFIXES:
        return Fault("unsupported image format", f"found {printable_name(file.name)}, {EXPECTED_SUFFIXES}")
    return None


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
            return retry_io(lambda: self._read(path, offset, size), must_exist=path.parent, what=path)
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
