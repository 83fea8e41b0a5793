"""Where shards lie: locations → samples.

Local shards are indexed, remote ones are copied to a cache and indexed, or streamed.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import fsspec
from braceexpand import braceexpand
from filelock import FileLock

from schemas.errors import InputError
from schemas.redaction import mask_urls
from zscl.data.indexed import IndexedSamples
from zscl.data.streaming import StreamedSamples
from zscl.data.tar import is_image_name
from zscl.runtime.atomic_io import atomic_file
from zscl.runtime.hashing import sha256_of
from zscl.runtime.paths import did_you_mean_path, files_within, is_hidden

MOST_SHARDS = 1_000_000
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4", ".tar.z")
IMAGE_BEGINNINGS = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*")


def open_samples(
    locations: Sequence[str], cache: str | None = None, as_written: bool = False
) -> IndexedSamples | StreamedSamples:
    """Resolve shards (paths, globs, brace ranges, URLs, folders) and index them where they are local.

    Args:
        locations: of shards.
        cache: folder that remote shards are copied to, once; without one they are streamed.
        as_written: take braces, colons and asterisks for parts of a name. Local paths that are there always are.

    Raises:
        InputError: a location matches nothing, a shard is missing, truncated or not a tar, or there is no image.
    """
    expanded = [shard for location in locations for shard in ([location] if as_written else _expanded(location))]
    if any("://" in shard for shard in expanded):
        urls = [
            url
            for shard in expanded
            for url in ([f"file://{shard}"] if "://" not in shard else [shard] if as_written else _remote_glob(shard))
        ]
        if cache is None:
            return StreamedSamples(urls)
        return _with_images(IndexedSamples([download_to_cache(url, cache) for url in urls]))
    return _with_images(IndexedSamples([path for shard in expanded for path in _local_files(Path(shard))]))


def _with_images(samples: IndexedSamples) -> IndexedSamples:
    faulty = samples.faulty()
    if len(faulty) == len(samples):
        raise InputError(f"{faulty[0].error()}; found no image that can be read beside it, expected at least one")
    return samples


def _expanded(location: str) -> list[str]:
    """What a location's brace ranges mean; `::` parts several. What is there under this very name is taken as it is."""
    if "://" not in location and os.path.lexists(location):
        return [location]
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


def download_to_cache(url: str, cache: str) -> Path:
    """Copy a remote file to the cache, whole or not at all, unless it is there with the size it has; return the copy.

    Raises:
        InputError: it cannot be read.
    """
    # A presigned URL is signed anew each day, and its secrets are no part of a file's name.
    name = PurePosixPath(urlsplit(url).path).stem[:100] or "shard"
    copy_of_it = Path(cache) / sha256_of(mask_urls(url))[:16] / f"{name}.tar"
    try:
        filesystem, path = fsspec.core.url_to_fs(url)
        copy_of_it.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(copy_of_it.with_suffix(".lock")):  # of the workers on a machine, one copies
            if not copy_of_it.is_file() or copy_of_it.stat().st_size != filesystem.size(path):
                with atomic_file(copy_of_it) as temporary:
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
        return _files_of(path)
    if path.is_file():
        return [path]
    if any(mark in path.name for mark in "*?["):
        found = sorted((file for file in path.parent.glob(path.name) if not is_hidden(file.name)), key=_natural)
        files = [each for file in found for each in (_files_of(file) if file.is_dir() else [file])]
        if not files:
            raise InputError(f"{path}: found no file of that pattern, expected at least one shard")
        return files
    raise InputError(f"{path}: found no such file, expected a shard{did_you_mean_path(path)}")


def _files_of(folder: Path) -> list[Path]:
    """The shards of a folder, or the images in it, at any depth.

    Raises:
        InputError: there is neither, or something that would be left out silently.
    """
    files = files_within(folder)
    shards = [file for file in files if file.suffix.lower() == ".tar"]
    images = [file for file in files if _is_image(file)]
    packed = [file for file in files if file.name.lower().endswith(COMPRESSED)]
    here = sorted((file for file in shards if file.parent == folder), key=_natural)
    if packed and not images:
        raise InputError(f"{packed[0]}: found a compressed tar among the data, expected plain .tar shards; unpack it")
    odd = images or [file for file in shards if file.parent != folder]
    if shards and odd:
        raise InputError(
            f"{folder}: found {(here or shards)[0].relative_to(folder)} and {odd[-1].relative_to(folder)} in it, "
            "expected shards in the folder itself alone, or images alone; to read some of it, give a pattern such as "
            f"{shards[0].parent}/*.tar"
        )
    if not here and not images:
        raise InputError(f"{folder}: found no .tar shard and no image file, expected at least one")
    return here or images


def _is_image(file: Path) -> bool:
    """Whether a user takes a file for an image: by its suffix, or where it has none, by how it begins."""
    if file.suffix or not file.is_file():
        return is_image_name(file.name)
    with file.open("rb") as stream:
        return stream.read(len(max(IMAGE_BEGINNINGS, key=len))).startswith(IMAGE_BEGINNINGS)


def _natural(path: Path) -> tuple[int, str]:
    return (int(path.stem) if path.stem.isdecimal() and len(path.stem) < 20 else -1, path.name)
