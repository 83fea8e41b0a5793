"""The teacher's features of images, stored by content: computed once, shared by stages, runs and workers.

A store is a folder of two memory-mapped files, filled as images are met or ahead of training:

    features.npy  [N, D]  a row an image, in the order of the set
    checks.npy    [N, 2]  of each row: a hash of the encoded image it belongs to (0: none yet), and a checksum

A row counts only if both agree with what is asked for and what is read, so neither a changed image nor a row that was
being written when a machine died is ever used. The folder's name is a hash of the version of the computation (see
`schemas.algorithm`), of the teacher's weights and transform, of the precision, and of the set's layout.
"""

import errno
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
from filelock import FileLock
from numpy.lib.format import open_memmap
from torch import nn

from schemas.algorithm import FEATURES_VERSION
from zscl.data.decode import Decoder
from zscl.data.indexed import IndexedSamples
from zscl.data.loader import EvaluationImages, Loader
from zscl.data.sample import Sample
from zscl.models.clip import Clip, at_least_float32, precision_context
from zscl.models.load_checks import check_finite
from zscl.runtime.atomic_io import quarantine
from zscl.runtime.distributed import all_reduce_ints, barrier, rank, rank_slice, world_size
from zscl.runtime.hashing import sha256_of
from zscl.runtime.retry import retry_io

FEATURES, CHECKS = "features.npy", "checks.npy"
OPEN_SECONDS = 20.0  # to wait for a store that storage does not give: a run goes on without it
NEARLY_ALL = 0.9  # of a set: a run that meets so much of it may as well compute all of it ahead
Encode = Callable[[torch.Tensor], torch.Tensor]


def build_encoder(teacher: Callable[[], nn.Module], precision: str) -> Encode:
    """Encode images with a teacher that is loaded when it is first needed. [b, 3, H, W] → [b, D], normalised

    Nothing here waits for the device. Whether features are finite is checked before they are stored, or by the loss.
    """

    @torch.no_grad()
    def encode(images: torch.Tensor) -> torch.Tensor:
        with precision_context(precision, images.device):
            return at_least_float32(teacher().encode_image(images, normalize=True))  # type: ignore[operator]

    return encode


class FeatureStore:
    """Features of N images by their places in the set."""

    def __init__(self, folder: Path, count: int, width: int, dtype: torch.dtype) -> None:
        """Open a store, or make an empty one (sparse: it takes up what is filled).

        Args:
            folder: of the store.
            count: N.
            width: D.
            dtype: of the features.
        """
        self.folder = folder
        if not folder.is_dir():
            _make(folder, count, width, np.dtype(str(dtype).removeprefix("torch.")))
        self._features, self._checks = (open_memmap(folder / name, mode="r") for name in (FEATURES, CHECKS))
        if self._features.shape != (count, width) or self._checks.shape != (count, 2):
            raise ValueError(f"found features of shape {self._features.shape}, expected {(count, width)}")

    def read(self, identities: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Look images up by their places and hashes. [b, 2] → features [b, D], and which of them are known [b]."""
        places, hashes = identities.numpy().T
        features, checks = self._features[places], self._checks[places]
        sums = np.array([_checksum(row, image) for row, image in zip(features, hashes, strict=True)], dtype=np.uint64)
        known = (checks[:, 0] == hashes.astype(np.uint64)) & (checks[:, 1] == sums)
        return torch.from_numpy(features), torch.from_numpy(known)

    def write(self, identities: torch.Tensor, features: torch.Tensor) -> None:
        """Store images' features.

        Raises:
            OSError: the disk is full or gone. (A write through the memory map would end the process instead.)
        """
        for name, array, rows in (
            (FEATURES, self._features, features.numpy()),
            (CHECKS, self._checks, _checks(identities.numpy(), features.numpy())),
        ):
            descriptor = os.open(self.folder / name, os.O_WRONLY)
            try:
                for place, row in zip(identities[:, 0].tolist(), rows, strict=True):
                    os.pwrite(descriptor, row.tobytes(), array.offset + place * array.strides[0])
            finally:
                os.close(descriptor)

    def missing(self) -> list[int]:
        """Which places have no features yet."""
        found: list[int] = np.flatnonzero(self._checks[:, 0] == 0).tolist()
        return found

    @property
    def megabytes(self) -> float:
        """What the store takes up on disk."""
        return sum(file.stat().st_blocks * 512 for file in self.folder.iterdir()) / 1e6


def _make(folder: Path, count: int, width: int, dtype: np.dtype[np.generic]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
    try:
        temporary.chmod(0o755)
        open_memmap(temporary / FEATURES, mode="w+", dtype=dtype, shape=(count, width)).flush()
        open_memmap(temporary / CHECKS, mode="w+", dtype=np.uint64, shape=(count, 2)).flush()
        temporary.rename(folder)
    except OSError:  # another run was quicker: its store is as good
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _checks(identities: np.ndarray, features: np.ndarray) -> np.ndarray:
    sums = [_checksum(row, image) for row, image in zip(features, identities[:, 1], strict=True)]
    return np.stack([identities[:, 1].astype(np.uint64), np.array(sums, dtype=np.uint64)], axis=1)


def _checksum(row: np.ndarray, image: np.integer) -> int:
    return zlib.crc32(row.tobytes(), int(image) & 0xFFFFFFFF)


def open_feature_store(
    root: Path,
    clip: Clip,
    weights: str,
    precision: str,
    images: IndexedSamples,
    width: int,
    note: Callable[[str], None],
) -> FeatureStore | None:
    """Open the store of a teacher's features of a set, or make it where there is none.

    Where nodes share no folder, each has a store, of what its own workers meet.

    Args:
        root: where stores lie, visible to all workers of a node.
        clip: the teacher's transform, and the dtype of its weights.
        weights: digest of the teacher's weights.
        precision: that the teacher runs in.
        images: the set.
        width: D.
        note: told why there is no store, where it can neither be opened nor made.

    Returns `None` on every worker in that case: a store saves work, and a run goes on without it.
    """
    transform = re.sub(r" at 0x[0-9a-f]+", "", str(clip.evaluation_transform))  # a function shows its address
    dtype = torch.promote_types(next(clip.model.parameters()).dtype, torch.float32)
    made_by = str(FEATURES_VERSION), weights, transform, precision, str(dtype), images.digest
    folder = root / f"images-{sha256_of(*made_by)[:24]}"
    opened = _open_or_replace(folder, len(images), width, dtype, note) if rank() == 0 else None
    barrier()  # who shares the main worker's folder finds its store there
    opened = opened or _open_or_replace(folder, len(images), width, dtype, note)
    [usable] = all_reduce_ints(opened is not None)
    return opened if usable == world_size() else None


def _open_or_replace(
    folder: Path, count: int, width: int, dtype: torch.dtype, note: Callable[[str], None]
) -> FeatureStore | None:
    """Open a store. One that is damaged is set aside, and an empty one takes its place; nothing is ever removed.

    Only the content of its files, or that one of them is missing, tells that a store is damaged. Where storage does
    not give them, the store stays as it is and is not used.
    """
    opening = partial(FeatureStore, folder, count, width, dtype)
    try:
        with suppress(_DamagedError):
            return retry_io(partial(_opened, opening, folder), OPEN_SECONDS, what=folder)
        with FileLock(folder.with_name(f".{folder.name}.lock")):  # another worker may be replacing it
            try:
                return retry_io(partial(_opened, opening, folder), OPEN_SECONDS, what=folder)
            except _DamagedError as error:
                aside = quarantine(folder)
                if aside is not None:
                    note(f"{folder}: found no readable features ({error}); it lies at {aside.name}, and is made again")
            return opening()
    except OSError as error:
        note(f"{folder}: teacher features are not stored ({error})")
        return None


class _DamagedError(Exception):
    """The files of a store were read, and are no store."""


def _opened(opening: Callable[[], FeatureStore], folder: Path) -> FeatureStore:
    try:
        return opening()
    except OSError as error:
        missing = [name for name in (FEATURES, CHECKS) if not (folder / name).exists()]
        if error.errno == errno.ENOENT and folder.is_dir() and missing:
            raise _DamagedError(f"{missing[0]} is missing") from error
        raise
    except (ValueError, EOFError, UnpicklingError) as error:  # what numpy makes of a file that is no array
        raise _DamagedError(" ".join(str(error).split())) from error


@dataclass
class StoredFeatures:
    """Features from a store; what it does not know is computed and stored."""

    store: FeatureStore
    encode: Encode
    note: Callable[[str], None]
    _full: bool = field(default=False, init=False)

    def __call__(self, images: torch.Tensor, identities: torch.Tensor) -> torch.Tensor:
        """Features of images [b, 3, H, W] with identities [b, 2] on the CPU. Returns [b, D] on the images' device."""
        features, known = self.store.read(identities)
        if images.device.type == "cuda":
            features = features.pin_memory().to(images.device, non_blocking=True)
        if not bool(known.all()):
            unknown = ~known
            computed = self.encode(images[unknown.to(images.device)])
            features[unknown.to(images.device)] = computed
            self._keep(identities[unknown], computed)
        return features

    def fill(
        self,
        images: IndexedSamples,
        clip: Clip,
        loader: Loader,
        batch_size: int,
        progress: Callable[[int, int], None],
    ) -> int:
        """Compute what the store lacks; each worker takes a contiguous part of it, and so of the shards.

        Args:
            images: the set.
            clip: its transform.
            loader: how to read.
            batch_size: images encoded at once.
            progress: told the images done, by all workers if they are as fast as this one, and how many there are.

        Returns how many images were missing.
        """
        lacking = self.store.missing()
        barrier()  # all have looked before any writes
        own, done = [lacking[index] for index in rank_slice(len(lacking))], 0
        decode = Decoder(clip.evaluation_transform, Sample.identity)
        for batch, identities in EvaluationImages(images.subset(own), decode, 0, 1, total=len(images)).batches(
            batch_size, loader
        ):
            self(batch, identities)
            done += len(batch)
            progress(round(done * len(lacking) / len(own)), len(lacking))
            if self._full:
                break
        barrier()
        loader.check_over_workers()
        return len(lacking)

    def _keep(self, identities: torch.Tensor, features: torch.Tensor) -> None:
        if self._full:
            return
        features = features.cpu()
        check_finite(features, "the teacher gives reference images")
        try:
            self.store.write(identities, features)
        except OSError as error:  # a store saves work; training goes on without it
            self._full = True
            self.note(f"{self.store.folder}: teacher features are no longer stored ({error})")


def share_drawn(count: int, draws: Sequence[int]) -> float:
    """Share of a set that is met at least once.

    Args:
        count: images in the set.
        draws: images drawn by each stage, in a shuffled order of its own, without replacement until all are met.
    """
    return 1.0 - prod(max(0.0, 1.0 - drawn / count) for drawn in draws)
