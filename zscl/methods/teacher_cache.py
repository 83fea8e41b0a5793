"""On-disk cache of the teacher's image features, shared by stages, runs and ranks.

A cache is a folder with two memory-mapped files, filled during training or before it:

    features.npy  [N, D]  the features of each image, in the order of the data set
    checks.npy    [N, 2]  for each row: the content hash of its image (0 if the row is empty), and a checksum

A row is used only if its content hash matches the requested image and its checksum matches the features that were read.
Therefore, features of an image that has changed, and rows that were only half written when a machine failed, are never
used. The folder's name is a hash of everything else that the features depend on: the version of the computation
(`schemas.algorithm`), the teacher's weights and transform, the precision, and the layout of the data set.
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
from zscl.runtime.distributed import all_reduce_sum, barrier, rank, rank_slice, world_size
from zscl.runtime.hashing import sha256_of
from zscl.runtime.retry import retry_io

FEATURES, CHECKS = "features.npy", "checks.npy"
OPEN_TIMEOUT_SECONDS = 20.0  # limit of retries for opening a cache; after it, the run continues without the cache
PRECOMPUTE_COVERAGE = 0.9  # a run that reads at least this fraction of a data set computes all features before training
EncodeImages = Callable[[torch.Tensor], torch.Tensor]


def build_encoder(teacher: Callable[[], nn.Module], precision: str) -> EncodeImages:
    """Build a function that encodes images with a teacher.

    The function does not check the features for NaN and Inf, because the check would have to wait for the device.
    Features are checked before they are cached. Without a cache, the check of the loss detects NaN and Inf.

    Args:
        teacher: Returns the frozen teacher model. It is not called before the first images are encoded, so the model
            can be loaded lazily.
        precision: `fp32` or `bf16`.

    Returns:
        A function from images [b, 3, H, W] to L2-normalised features [b, D].
    """

    @torch.no_grad()
    def encode(images: torch.Tensor) -> torch.Tensor:
        with precision_context(precision, images.device):
            return at_least_float32(teacher().encode_image(images, normalize=True))  # type: ignore[operator]

    return encode


class FeatureCache:
    """A cache of the features of N images. The index of a row is the index of its image in the data set.

    Attributes:
        folder: The folder of the cache.
    """

    def __init__(self, folder: Path, count: int, width: int, dtype: torch.dtype) -> None:
        """Open a cache. If the folder does not exist, create an empty cache with sparse files.

        Args:
            folder: The folder of the cache.
            count: N, the number of images.
            width: D, the width of the features.
            dtype: The type of the features.

        Raises:
            ValueError: The arrays in the files have other shapes.
        """
        self.folder = folder
        if not folder.is_dir():
            _create(folder, count, width, np.dtype(str(dtype).removeprefix("torch.")))
        self._features, self._checks = (open_memmap(folder / name, mode="r") for name in (FEATURES, CHECKS))
        if self._features.shape != (count, width) or self._checks.shape != (count, 2):
            raise ValueError(f"found features of shape {self._features.shape}, expected {(count, width)}")

    def read(self, identities: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Read the features of images.

        Args:
            identities: Index and content hash of each image, [b, 2].

        Returns:
            Features [b, D], and whether each row is valid [b]. Invalid rows have arbitrary content.
        """
        indices, hashes = identities.numpy().T
        features, checks = self._features[indices], self._checks[indices]
        sums = np.array([_checksum(row, image) for row, image in zip(features, hashes, strict=True)], dtype=np.uint64)
        is_valid = (checks[:, 0] == hashes.astype(np.uint64)) & (checks[:, 1] == sums)
        return torch.from_numpy(features), torch.from_numpy(is_valid)

    def write(self, identities: torch.Tensor, features: torch.Tensor) -> None:
        """Write the features of images.

        Args:
            identities: Index and content hash of each image, [b, 2].
            features: The features of the images, [b, D].

        Raises:
            OSError: The disk is full or not available. A write through the memory map would instead end the process.
        """
        for name, array, rows in (
            (FEATURES, self._features, features.numpy()),
            (CHECKS, self._checks, _compute_checks(identities.numpy(), features.numpy())),
        ):
            descriptor = os.open(self.folder / name, os.O_WRONLY)
            try:
                for index, row in zip(identities[:, 0].tolist(), rows, strict=True):
                    os.pwrite(descriptor, row.tobytes(), array.offset + index * array.strides[0])
            finally:
                os.close(descriptor)

    def missing_indices(self) -> list[int]:
        """Return the indices of the images without features."""
        indices: list[int] = np.flatnonzero(self._checks[:, 0] == 0).tolist()
        return indices

    @property
    def megabytes(self) -> float:
        """The disk space that the cache uses."""
        return sum(file.stat().st_blocks * 512 for file in self.folder.iterdir()) / 1e6


def _create(folder: Path, count: int, width: int, dtype: np.dtype[np.generic]) -> None:
    """Create an empty cache atomically."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
    try:
        temporary.chmod(0o755)
        open_memmap(temporary / FEATURES, mode="w+", dtype=dtype, shape=(count, width)).flush()
        open_memmap(temporary / CHECKS, mode="w+", dtype=np.uint64, shape=(count, 2)).flush()
        temporary.rename(folder)
    except OSError:  # if another run created the folder in the meantime, its cache is used
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _compute_checks(identities: np.ndarray, features: np.ndarray) -> np.ndarray:
    sums = [_checksum(row, image) for row, image in zip(features, identities[:, 1], strict=True)]
    return np.stack([identities[:, 1].astype(np.uint64), np.array(sums, dtype=np.uint64)], axis=1)


def _checksum(row: np.ndarray, image: np.integer) -> int:
    return zlib.crc32(row.tobytes(), int(image) & 0xFFFFFFFF)


def open_feature_cache(
    parent: Path,
    clip: Clip,
    weights_digest: str,
    precision: str,
    images: IndexedSamples,
    width: int,
    on_note: Callable[[str], None],
) -> FeatureCache | None:
    """Open or create the cache of a teacher's features of a data set. All ranks must call this.

    If nodes share no folder, each node has its own cache.

    Args:
        parent: The folder that contains the caches, shared by all ranks of a node.
        clip: The model, for the teacher's transform and the type of its weights.
        weights_digest: The digest of the teacher's weights.
        precision: The teacher's precision, `fp32` or `bf16`.
        images: The data set.
        width: D, the width of the features.
        on_note: Called with the reason if the cache can neither be opened nor created.

    Returns:
        The cache. If one rank has no cache, the result is `None` on all ranks, and the run continues without a cache.
    """
    transform = re.sub(r" at 0x[0-9a-f]+", "", str(clip.evaluation_transform))  # remove the addresses of functions
    dtype = torch.promote_types(next(clip.model.parameters()).dtype, torch.float32)
    key = str(FEATURES_VERSION), weights_digest, transform, precision, str(dtype), images.digest
    folder = parent / f"images-{sha256_of(*key)[:24]}"
    cache = _open_or_replace(folder, len(images), width, dtype, on_note) if rank() == 0 else None
    barrier()  # ranks that share rank 0's folder open its cache
    cache = cache or _open_or_replace(folder, len(images), width, dtype, on_note)
    [usable_count] = all_reduce_sum(cache is not None)
    return cache if usable_count == world_size() else None


def _open_or_replace(
    folder: Path, count: int, width: int, dtype: torch.dtype, on_note: Callable[[str], None]
) -> FeatureCache | None:
    """Open or create a cache. Rename a damaged cache and create an empty one. Return `None` if the storage fails."""
    # A cache is damaged only if its files were read and have the wrong content, or if one of them is missing. If the
    # storage fails, the cache stays as it is and is not used.
    opening = partial(FeatureCache, folder, count, width, dtype)
    try:
        with suppress(_DamagedError):
            return retry_io(partial(_open, opening, folder), OPEN_TIMEOUT_SECONDS, description=folder)
        with FileLock(folder.with_name(f".{folder.name}.lock")):  # another rank may be replacing it
            try:
                return retry_io(partial(_open, opening, folder), OPEN_TIMEOUT_SECONDS, description=folder)
            except _DamagedError as error:
                moved = quarantine(folder)
                if moved is not None:
                    on_note(
                        f"{folder}: found no readable features ({error}); the folder is renamed to {moved.name}, and "
                        "a new one is created"
                    )
            return opening()
    except OSError as error:
        on_note(f"{folder}: teacher features are not stored ({error})")
        return None


class _DamagedError(Exception):
    """The files of a cache were read and have the wrong content, or one of them is missing."""


def _open(opening: Callable[[], FeatureCache], folder: Path) -> FeatureCache:
    """Call `opening`, which opens the cache in `folder`. Raise a `_DamagedError` only for damaged files."""
    try:
        return opening()
    except OSError as error:
        missing = [name for name in (FEATURES, CHECKS) if not (folder / name).exists()]
        if error.errno == errno.ENOENT and folder.is_dir() and missing:
            raise _DamagedError(f"{missing[0]} is missing") from error
        raise
    except (ValueError, EOFError, UnpicklingError) as error:  # numpy's errors for a file that is not an array
        raise _DamagedError(" ".join(str(error).split())) from error


@dataclass
class CachedFeatures:
    """Reads features from a cache, and computes and caches missing features.

    Attributes:
        cache: The cache.
        encode: The function that computes features (see `build_encoder`).
        on_note: Called with the reason when the cache can no longer be written.
    """

    cache: FeatureCache
    encode: EncodeImages
    on_note: Callable[[str], None]
    _is_read_only: bool = field(default=False, init=False)

    def __call__(self, images: torch.Tensor, identities: torch.Tensor) -> torch.Tensor:
        """Return the features of images.

        Args:
            images: Transformed images, [b, 3, H, W].
            identities: Index and content hash of each image, [b, 2], on the CPU.

        Returns:
            L2-normalised features, [b, D], on the images' device.
        """
        features, is_valid = self.cache.read(identities)
        if images.device.type == "cuda":
            features = features.pin_memory().to(images.device, non_blocking=True)
        if not bool(is_valid.all()):
            is_missing = ~is_valid
            computed = self.encode(images[is_missing.to(images.device)])
            features[is_missing.to(images.device)] = computed
            self._write(identities[is_missing], computed)
        return features

    def fill(
        self,
        images: IndexedSamples,
        clip: Clip,
        loader: Loader,
        batch_size: int,
        on_progress: Callable[[int, int], None],
    ) -> int:
        """Compute and cache all missing features. The ranks divide the images. All ranks must call this.

        Args:
            images: The data set.
            clip: The model, for its transform.
            loader: The data loader.
            batch_size: How many images are encoded at once.
            on_progress: Called with the number of images that all ranks have encoded, extrapolated from this rank, and
                the number of images whose features were missing.

        Returns:
            The number of images whose features were missing.
        """
        missing = self.cache.missing_indices()
        barrier()  # all ranks read the missing indices before any rank writes
        rank_indices, done = [missing[position] for position in rank_slice(len(missing))], 0
        decode = Decoder(clip.evaluation_transform, Sample.identity)
        rank_images = EvaluationImages(images.subset(rank_indices), decode, 0, 1, total=len(images))
        for batch, identities in rank_images.iter_batches(batch_size, loader):
            self(batch, identities)
            done += len(batch)
            on_progress(round(done * len(missing) / len(rank_indices)), len(missing))
            if self._is_read_only:
                break
        barrier()
        loader.check_broken_across_ranks()
        return len(missing)

    def _write(self, identities: torch.Tensor, features: torch.Tensor) -> None:
        if self._is_read_only:
            return
        features = features.cpu()
        check_finite(features, "the teacher's features of reference images")
        try:
            self.cache.write(identities, features)
        except OSError as error:  # the cache only saves work: training continues without writing to it
            self._is_read_only = True
            self.on_note(f"{self.cache.folder}: teacher features are no longer stored ({error})")


def expected_coverage(count: int, draws: Sequence[int]) -> float:
    """Return the expected fraction of a data set that is drawn at least once.

    Args:
        count: The number of images in the data set.
        draws: The number of images that each stage draws. Each stage has its own random order, and draws an image again
            only after it has drawn all images.

    Returns:
        1 − Π max(0, 1 − draws / count) over the stages.
    """
    return 1.0 - prod(max(0.0, 1.0 - drawn / count) for drawn in draws)
