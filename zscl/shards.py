"""Where shards lie: locations → samples.

Local shards are indexed, remote ones are copied to a cache and indexed, or streamed.
"""

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import fsspec
from braceexpand import braceexpand
from filelock import FileLock

from schemas.base import InputError
from schemas.secrets import mask_urls
from zscl.files import digest, nearest, whole_file
from zscl.indexed_samples import IndexedSamples
from zscl.members import IMAGE_SUFFIXES
from zscl.streamed_samples import StreamedSamples

MOST_SHARDS = 1_000_000


def open_samples(locations: Sequence[str], cache: str | None = None) -> IndexedSamples | StreamedSamples:
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
        raise InputError(f"{path}: found no such file, expected a shard{nearest(path)}")
    return [path]


def _natural(path: Path) -> tuple[int, str]:
    return (int(path.stem) if path.stem.isdecimal() and len(path.stem) < 20 else -1, path.name)
