"""The members of tar shards: what would be read of one is looked at first.

A shard is a tar of samples KEY.(jpg|jpeg|png|webp) + KEY.cls or KEY.txt.
Nothing here unpickles: only image, label and text members are ever read.
"""

import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, TypeVar

import webdataset

from schemas.base import InputError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
READ_SUFFIXES = (*IMAGE_SUFFIXES, "cls", "txt")  # no other member is ever read
LARGEST_MEMBER = 2**28  # bytes: what claims to be larger is no image, label or text
MOST_READS_IN_VAIN = 100
T = TypeVar("T")


def image_of(members: Mapping[str, T]) -> T | None:
    """A sample's image among its members by suffix, if it has one."""
    return next((members[suffix] for suffix in IMAGE_SUFFIXES if suffix in members), None)


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
            f"{file}: found a truncated or broken shard ({reason_of(error)}), expected a whole tar"
        ) from error
    # A shard cut between two members reads without an error; only the end mark's absence tells.
    if file.stat().st_size < end + tarfile.BLOCKSIZE:
        raise InputError(f"{file}: found a shard without its end after {len(found)} members, expected a whole tar")
    return found


class Tail:
    """A stream that remembers the last block that was read of it, and is not read for ever behind its end."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self.tail, self._in_vain = stream, b"", 0

    def read(self, size: int = -1) -> bytes:
        """Read on; raises `EOFError` when that has been in vain too often."""
        content = self._stream.read(size)
        self._in_vain += not content
        if self._in_vain > MOST_READS_IN_VAIN:  # to pass over a member, tarfile reads all that its size claims
            raise EOFError("it ends within a member")
        self.tail = (self.tail + content)[-tarfile.BLOCKSIZE :]
        return content


def read_members(stream: Tail, url: str) -> Iterator[dict[str, Any]]:
    """The members that samples are made of, as WebDataset groups them; no other member is read."""
    with tarfile.open(fileobj=stream, mode="r|") as tar:  # type: ignore[call-overload]  # it only reads
        for info in _regular(tar, url):
            if webdataset.tariterators.base_plus_ext(info.name)[1].lower() in READ_SUFFIXES:
                member = tar.extractfile(info)
                assert member is not None
                yield {"fname": info.name, "data": member.read(), "__url__": url}
            tar.members = []  # or it remembers every header of the shard


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


def reason_of(error: Exception) -> str:
    """What an error says, on one line, whole."""
    said = error.args[0] if error.args and isinstance(error.args[0], str) else error  # WebDataset appends to it
    return " ".join(str(said).split()) or type(error).__name__
