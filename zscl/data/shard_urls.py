"""Expansion of shard locations (globs, brace ranges, folders, URLs), and opening or download of the shards.

Local shards are indexed. Remote shards are downloaded to a cache and indexed, or streamed.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import fsspec
from braceexpand import braceexpand
from filelock import FileLock

from schemas.errors import ErrorCode, InputError
from schemas.redaction import mask_urls
from zscl.data.indexed import IndexedSamples
from zscl.data.streaming import StreamedSamples, remote_error_code
from zscl.data.tar import is_image_name
from zscl.runtime.atomic_io import atomic_file
from zscl.runtime.hashing import sha256_of
from zscl.runtime.paths import did_you_mean_path, is_hidden, list_files

MAX_SHARDS = 1_000_000
COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4", ".tar.z")
IMAGE_MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*")


def open_samples(
    locations: Sequence[str], shard_cache: str | None = None, literal: bool = False
) -> IndexedSamples | StreamedSamples:
    """Expand the locations of shards and open the samples in them.

    Args:
        locations: Paths, globs, brace ranges, URLs and folders.
        shard_cache: Folder to which remote shards are downloaded. If `None`, remote shards are streamed.
        literal: Whether all locations are plain paths or URLs, in which braces, `::` and asterisks are ordinary
            characters. If `False`, they are expanded, except in existing local paths.

    Returns:
        Indexed samples if all shards are local or cached, streamed samples otherwise.

    Raises:
        InputError: A location matches nothing, a shard is missing, truncated or not a tar, or there is no image.
    """
    shards = [shard for location in locations for shard in ([location] if literal else _expand_braces(location))]
    if any("://" in shard for shard in shards):
        urls = [
            url
            for shard in shards
            for url in ([f"file://{shard}"] if "://" not in shard else [shard] if literal else _expand_url(shard))
        ]
        if shard_cache is None:
            return StreamedSamples(urls)
        return _check_has_image(IndexedSamples([download_to_cache(url, shard_cache) for url in urls]))
    return _check_has_image(IndexedSamples([path for shard in shards for path in _list_local_files(Path(shard))]))


def _check_has_image(samples: IndexedSamples) -> IndexedSamples:
    """Return the samples, or raise an error if all of them have a fault."""
    faulty = samples.faulty_samples()
    if len(faulty) == len(samples):
        raise InputError(
            f"{faulty[0].as_error()}; every other image is unreadable as well, expected at least one readable image",
            code=ErrorCode.EMPTY,
        )
    return samples


def _expand_braces(location: str) -> list[str]:
    """Split a location at `::` and expand its brace ranges. An existing local path is returned unchanged."""
    if "://" not in location and os.path.lexists(location):
        return [location]
    if _max_shard_count(location) > MAX_SHARDS:
        raise InputError(
            f"{location}: found a range of more than {MAX_SHARDS} shards, expected fewer", code=ErrorCode.INVALID_VALUE
        )
    try:
        return [shard for part in location.split("::") for shard in braceexpand(part)]
    except (ValueError, IndexError, RecursionError) as error:  # unbalanced braces
        raise InputError(
            f"{location}: found an invalid brace range, expected one such as {{0..9}}.tar", code=ErrorCode.INVALID_VALUE
        ) from error


def _max_shard_count(location: str) -> int:
    """Return an upper bound of the number of shards in a location, because its expansion could take forever."""
    bound, commas = 1, []
    for character in location:
        if character == "{":
            commas.append(0)
        elif character == "," and commas:
            commas[-1] += 1
        elif character == "}" and commas:
            bound *= 1 + commas.pop()
    for first, last in re.findall(r"\{(-?[0-9]+)\.\.(-?[0-9]+)", location):
        digits = max(len(first), len(last))
        bound *= 1 + abs(int(last) - int(first)) if digits < 20 else MAX_SHARDS + 1
    letters: int = 52 ** len(re.findall(r"\{[a-zA-Z]\.\.[a-zA-Z]", location))
    return bound * letters


def _expand_url(url: str) -> list[str]:
    is_http = url.startswith(("http://", "https://"))  # in HTTP URLs, a question mark begins the query
    if not any(mark in (url.partition("?")[0] if is_http else url) for mark in "*?["):
        return [url]
    try:
        urls = [str(file.full_name) for file in fsspec.open_files(url, "rb")]
    except Exception as error:  # each fsspec backend raises its own classes of error
        raise InputError(
            f"{url}: cannot be listed ({error}), expected shards that match the pattern", code=remote_error_code(error)
        ) from error
    if not urls:
        raise InputError(
            f"{url}: found no file that matches the pattern, expected at least one shard", code=ErrorCode.NOT_FOUND
        )
    return sorted(urls, key=lambda name: _natural_order(Path(name)))


def download_to_cache(url: str, shard_cache: str) -> Path:
    """Download a remote shard to the cache, atomically. If the cache has a copy of the same size, the copy is reused.

    Args:
        url: URL of the shard. The name of the cached copy does not depend on credentials in the URL.
        shard_cache: Folder of the cache.

    Returns:
        Path of the cached copy.

    Raises:
        InputError: The shard cannot be read.
    """
    name = PurePosixPath(urlsplit(url).path).stem[:100] or "shard"
    cached = Path(shard_cache) / sha256_of(mask_urls(url))[:16] / f"{name}.tar"
    try:
        filesystem, path = fsspec.core.url_to_fs(url)
        cached.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(cached.with_suffix(".lock")):  # only one of the workers on a machine downloads
            if not cached.is_file() or cached.stat().st_size != filesystem.size(path):
                with atomic_file(cached) as temporary:
                    filesystem.get_file(path, str(temporary))
    except Exception as error:  # each fsspec backend raises its own classes of error
        raise InputError(
            f"{url}: found no readable shard ({error}), expected a tar", code=remote_error_code(error)
        ) from error
    return cached


def _list_local_files(path: Path) -> list[Path]:
    try:
        return _match_local_files(path)
    except InputError:
        raise
    except (OSError, ValueError) as error:  # a name that no file can have, an invalid pattern, missing permissions
        raise InputError(
            f"{path}: cannot be read ({error}), expected a shard or a folder of them", code=ErrorCode.UNREADABLE
        ) from error


def _match_local_files(path: Path) -> list[Path]:
    if path.is_dir():
        return _list_folder(path)
    if path.is_file():
        return [path]
    if any(mark in path.name for mark in "*?["):
        matches = sorted((file for file in path.parent.glob(path.name) if not is_hidden(file.name)), key=_natural_order)
        files = [file for match in matches for file in (_list_folder(match) if match.is_dir() else [match])]
        if not files:
            raise InputError(
                f"{path}: found no file that matches the pattern, expected at least one shard", code=ErrorCode.NOT_FOUND
            )
        return files
    raise InputError(f"{path}: found no such file, expected a shard{did_you_mean_path(path)}", code=ErrorCode.NOT_FOUND)


def _list_folder(folder: Path) -> list[Path]:
    """List the shards directly in a folder, or the images in the folder and its subfolders.

    Args:
        folder: The folder.

    Returns:
        The paths of the shards or images, sorted.

    Raises:
        InputError: The folder contains no shards and no images, or it contains data that would be ignored: both shards
            and images, shards in subfolders, or compressed shards.
    """
    files = list_files(folder)
    all_shards = [file for file in files if file.suffix.lower() == ".tar"]
    images = [file for file in files if _is_image(file)]
    compressed = [file for file in files if file.name.lower().endswith(COMPRESSED_TARS)]
    shards = sorted((file for file in all_shards if file.parent == folder), key=_natural_order)
    if compressed and not images:
        raise InputError(
            f"{compressed[0]}: found a compressed tar, expected plain .tar shards; decompress it",
            code=ErrorCode.UNSUPPORTED,
        )
    other = images or [file for file in all_shards if file.parent != folder]
    if all_shards and other:
        raise InputError(
            f"{folder}: found both {(shards or all_shards)[0].relative_to(folder)} and "
            f"{other[-1].relative_to(folder)}, expected only .tar shards directly in the folder, or only images. To "
            f"read part of it, give a pattern such as {all_shards[0].parent}/*.tar",
            code=ErrorCode.CONFLICT,
        )
    if not shards and not images:
        raise InputError(
            f"{folder}: found no .tar shard and no image file, expected at least one", code=ErrorCode.EMPTY
        )
    return shards or images


def _is_image(file: Path) -> bool:
    """Return whether a file is an image according to its suffix, or, without a suffix, to its first bytes."""
    if file.suffix or not file.is_file():
        return is_image_name(file.name)
    with file.open("rb") as stream:
        return stream.read(len(max(IMAGE_MAGIC, key=len))).startswith(IMAGE_MAGIC)


def _natural_order(path: Path) -> tuple[int, str]:
    """Return a sort key: shards with numbers as names are sorted by number, after all other names."""
    return (int(path.stem) if path.stem.isdecimal() and len(path.stem) < 20 else -1, path.name)
