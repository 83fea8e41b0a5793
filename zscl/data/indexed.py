"""Local samples in tar shards and separate image files, indexed by byte offsets for random access."""

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from functools import cached_property, partial
from pathlib import Path

import torch

from schemas.errors import ErrorCode, InputError
from zscl.data.sample import Fault, Sample, SampleFetcher, decode_text, printable_name
from zscl.data.tar import EXPECTED_SUFFIXES, OTHER_IMAGE_SUFFIXES, Member, assemble, is_side_data, list_members
from zscl.runtime.hashing import sha256_of
from zscl.runtime.retry import retry_io
from zscl.runtime.seeding import derive_seed

MEMBER_KINDS = ("image", "label", "text")
Location = tuple[int, int, int]  # number of the file in `IndexedSamples.files`, offset and size in bytes
ABSENT: Location = (-1, 0, 0)
IndexRow = tuple[Location, Location, Location]  # of image, label and text


class IndexedSamples:
    """Local samples with random access. They are shuffled over the whole dataset.

    For each sample, the index needs 72 bytes and the bytes of the key: less than 150 MB for ImageNet. The index
    includes samples with a fault, so that they are reported and counted. Their content is not used.

    Attributes:
        files: All files with content: shards, separate image files and their .txt files.
        table: Location of image, label and text of each sample, as (index into `files`, offset, size) [samples, 3, 3].
        indices: `Sample.index` of each sample [samples].
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.files: list[Path] = []
        self._faults: dict[int, tuple[Path, Fault]] = {}  # by row
        keys: list[bytes] = []
        rows: list[IndexRow] = []
        for file in files:
            for key, row, fault in self._index_file(file):
                if fault is not None:
                    self._faults[len(rows)] = file, fault
                keys.append(printable_name(key).encode())
                rows.append(row)
        if not rows:
            raise InputError(
                f"{files[0].parent}: found no image in its shards, expected at least one", code=ErrorCode.EMPTY
            )
        self.table = torch.tensor(rows)
        self.indices = torch.arange(len(rows))
        self._rows = torch.arange(len(rows))  # row in the index of all files; `table` may be a subset of it
        self._keys = b"".join(keys)
        self._key_ends = torch.tensor([0, *itertools.accumulate(map(len, keys))])

    def __len__(self) -> int:
        return len(self.table)

    def subset(self, positions: Sequence[int]) -> "IndexedSamples":
        """Return a dataset of the samples at some positions, in this order. Each `Sample.index` is unchanged."""
        selected = copy(self)
        selected.__dict__.pop("digest", None)
        chosen = list(positions)
        selected.table, selected.indices, selected._rows = self.table[chosen], self.indices[chosen], self._rows[chosen]
        return selected

    def reindexed(self) -> "IndexedSamples":
        """Return a dataset of the same samples, with `Sample.index` renumbered from 0."""
        renumbered = copy(self)
        renumbered.indices = torch.arange(len(self))
        return renumbered

    def iter_positions(self, positions: Iterable[int], seed: int) -> Iterator[SampleFetcher]:
        """Iterate over positions of the shuffled dataset; see `Samples.iter_positions`.

        Each epoch is a new random permutation of all samples. A sample that cannot be used is replaced by a random
        sample of the dataset.

        Args:
            positions: Positions in ascending order.
            seed: Seed of the permutations.

        Yields:
            For each position, a function that loads its sample.
        """
        epoch, order = -1, torch.empty(0)
        with _FileDescriptors() as descriptors:
            for position in positions:
                if position // len(self) != epoch:
                    epoch = position // len(self)
                    generator = torch.Generator().manual_seed(derive_seed(seed, epoch))
                    order = torch.randperm(len(self), generator=generator)
                yield partial(self._fetch, descriptors, int(order[position % len(self)]), (seed, position))

    def _fetch(self, descriptors: "_FileDescriptors", number: int, draw: tuple[int, int], attempt: int) -> Sample:
        """Read sample `number` if `attempt` is 0, else a random sample. `draw` is (seed, position)."""
        return self._read(descriptors, number if attempt == 0 else derive_seed(*draw, attempt) % len(self))

    def iter_shard(self, index: int = 0, num_shards: int = 1) -> Iterator[Sample]:
        """Iterate once over part `index` of `num_shards` parts, without shuffling; see `Samples.iter_shard`."""
        with _FileDescriptors() as descriptors:
            for number in range(index, len(self), num_shards):
                yield self._read(descriptors, number)

    def iter_texts(self) -> Iterator[str]:
        """Iterate over the texts of the .txt members of usable samples, in the order of the dataset."""
        with _FileDescriptors() as descriptors:
            for locations, row in zip(self.table.tolist(), self._rows.tolist(), strict=True):
                location = locations[MEMBER_KINDS.index("text")]
                text = None if row in self._faults else self._read_member(descriptors, location)
                if text is not None:
                    yield decode_text(text)

    def iter_labels(self) -> Iterator[Sample]:
        """Iterate over all samples in the order of the dataset, without reading images and texts."""
        with _FileDescriptors() as descriptors:
            for locations, row, index in zip(
                self.table.tolist(), self._rows.tolist(), self.indices.tolist(), strict=True
            ):
                yield self._to_sample(descriptors, locations, row, index, ("label",))

    def faulty_samples(self) -> list[Sample]:
        """Return the samples that have a fault, without reading their content."""
        if not self._faults:
            return []
        numbers = [number for number, row in enumerate(self._rows.tolist()) if row in self._faults]
        with _FileDescriptors() as descriptors:
            return [self._read(descriptors, number, ()) for number in numbers]

    def find_dotted_keys(self) -> list[str]:
        """Return the keys in shards that contain a dot. Other WebDataset readers truncate them at the first dot."""
        ends = self._key_ends.tolist()
        dotted = []
        for file_number, row in zip(self.table[:, 0, 0].tolist(), self._rows.tolist(), strict=True):
            key = self._keys[ends[row] : ends[row + 1]]
            if b"." in key.rpartition(b"/")[2] and self._file_of(row, file_number).suffix.lower() == ".tar":
                dotted.append(key.decode())
        return dotted

    @property
    def layout_digest(self) -> str:
        """Hash of file paths, offsets and sizes. It identifies the dataset on this machine; no sample is read."""
        return sha256_of(self.table.numpy().tobytes(), self.indices.numpy().tobytes(), *map(os.fsencode, self.files))

    @cached_property
    def digest(self) -> str:
        """Hash of the samples' file names, keys, labels, offsets and sizes. The content of the images is not read."""
        names = (
            os.fsencode(Path(sample.shard).name) + f" {sample.key} ".encode() + (sample.label or b"")
            for sample in self.iter_labels()
        )
        return sha256_of(self.table.numpy().tobytes(), *names)

    def _read(self, descriptors: "_FileDescriptors", number: int, kinds: Sequence[str] = MEMBER_KINDS) -> Sample:
        locations, row, index = self.table[number].tolist(), int(self._rows[number]), int(self.indices[number])
        return self._to_sample(descriptors, locations, row, index, kinds)

    def _to_sample(
        self, descriptors: "_FileDescriptors", locations: list[list[int]], row: int, index: int, kinds: Sequence[str]
    ) -> Sample:
        """Build the sample at a row of the index. Only members of `kinds` are read."""
        image, label, text = (
            self._read_member(descriptors, location) if kind in kinds else None
            for kind, location in zip(MEMBER_KINDS, locations, strict=True)
        )
        start, end = self._key_ends[row : row + 2].tolist()
        file, fault = self._file_of(row, locations[0][0]), self._faults[row][1] if row in self._faults else None
        shard = str(file if file.suffix.lower() == ".tar" else file.parent)
        return Sample(image or b"", label, text, shard, self._keys[start:end].decode(), index, fault)

    def _file_of(self, row: int, file_number: int) -> Path:
        """Return the shard or image file of a row. `file_number` is the index of the image's file in `files`, or -1."""
        return self._faults[row][0] if row in self._faults else self.files[file_number]

    def _read_member(self, descriptors: "_FileDescriptors", location: list[int]) -> bytes | None:
        file_number, offset, size = location
        return None if file_number < 0 else descriptors.read(self.files[file_number], offset, size)

    def _index_file(self, file: Path) -> Iterator[tuple[str, IndexRow, Fault | None]]:
        """Yield the key, the locations and the fault of each sample in a shard, or of a single image file."""
        if file.suffix.lower() == ".tar":
            yield from self._index_tar(file)
            return
        caption = file.with_suffix(".txt")
        fault = _find_fault(file)
        image = ABSENT if fault else self._add_file(file)
        yield file.stem, (image, ABSENT, self._add_file(caption) if caption.is_file() else ABSENT), fault

    def _add_file(self, file: Path) -> Location:
        self.files.append(file)
        return len(self.files) - 1, 0, file.stat().st_size

    def _index_tar(self, file: Path) -> Iterator[tuple[str, IndexRow, Fault | None]]:
        self.files.append(file)
        file_number = len(self.files) - 1
        by_key: dict[str, list[tuple[Member, Location]]] = {}
        for member in list_members(file):
            by_key.setdefault(member.key, []).append((member, (file_number, member.offset, member.size)))
        if not by_key:
            raise InputError(f"{file}: found no image in the shard, expected at least one", code=ErrorCode.EMPTY)
        with_image = {key for key, members in by_key.items() if any(member.kind == "image" for member, _ in members)}
        for key, members in by_key.items():
            if key not in with_image and is_side_data([member for member, _ in members], with_image):
                continue
            image, label, text, fault = assemble(members, str(file))
            yield key, (image or ABSENT, label or ABSENT, text or ABSENT), fault


def _find_fault(file: Path) -> Fault | None:
    """Return the fault of an image file outside shards that its path and suffix show; `None` if they show no fault."""
    if not file.is_file():
        return Fault("link", f"found {printable_name(file.name)}, a link to a missing file")
    suffix = file.suffix.lower().removeprefix(".")
    if not suffix or suffix in OTHER_IMAGE_SUFFIXES:
        return Fault("unsupported image format", f"found {printable_name(file.name)}, {EXPECTED_SUFFIXES}")
    return None


class _FileDescriptors:
    """Context manager that reads from files and keeps up to `LIMIT` of them open. The oldest is closed first."""

    LIMIT = 64

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}

    def __enter__(self) -> "_FileDescriptors":
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)

    def read(self, path: Path, offset: int, size: int) -> bytes:
        """Read `size` bytes of a file at `offset`. Reads that fail with transient errors are retried."""
        try:
            return retry_io(lambda: self._read(path, offset, size), must_exist=path.parent, description=path)
        except OSError as error:
            raise InputError(
                f"{path}: can no longer be read ({error.strerror}), expected a shard", code=ErrorCode.NOT_FOUND
            ) from error

    def _read(self, path: Path, offset: int, size: int) -> bytes:
        if path not in self._open:
            if len(self._open) == self.LIMIT:
                os.close(self._open.pop(next(iter(self._open))))
            self._open[path] = os.open(path, os.O_RDONLY)
        try:
            return os.pread(self._open[path], size, offset)
        except OSError:  # network storage that was remounted rejects old descriptors
            os.close(self._open.pop(path))
            raise
