"""Listing, validation, streaming and writing of tar shards.

A shard is a tar of samples KEY.(jpg|jpeg|png|webp) + KEY.cls or KEY.txt. KEY is everything before the last dot.
If the sample KEY has an image, members such as KEY.NAME.json and KEY.NAME.txt are metadata of that sample.
Only image, label and text members are read, and nothing is unpickled.
"""

import re
import tarfile
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import IO, Generic, NamedTuple, TypeVar

import webdataset

from schemas.errors import ErrorCode, InputError
from zscl.data.sample import Fault, Sample, printable_name
from zscl.runtime.hashing import sha256_of_file
from zscl.runtime.paths import is_hidden

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
EXPECTED_SUFFIXES = f"expected one of {', '.join(f'.{suffix}' for suffix in IMAGE_SUFFIXES)}"
# Members with other suffixes are never read.
KIND_OF_SUFFIX = {**dict.fromkeys(IMAGE_SUFFIXES, "image"), "cls": "label", "txt": "text"}
# Images in other formats are never decoded. They are reported and counted, because users expect them to be used.
OTHER_IMAGE_SUFFIXES = frozenset(
    {"arw", "avif", "bmp", "cr2", "dng", "gif", "heic", "heif", "ico", "jfif", "jp2", "jpe", "jxl", "nef", "pbm", "pgm"}
    | {"pnm", "ppm", "psd", "raw", "svg", "tga", "tif", "tiff"}
)
# First bytes of files that users often mistake for shards: description of the file, and advice.
FOREIGN_FILES = {
    b"\x1f\x8b": ("compressed by gzip", "gunzip"),
    b"BZh": ("compressed by bzip2", "bunzip2"),
    b"\xfd7zXZ\x00": ("compressed by xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("compressed by zstd", "unzstd"),
    b"\x04\x22\x4d\x18": ("compressed by lz4", "unlz4"),
    b"\x1f\x9d": ("compressed by compress", "uncompress"),
    b"PK\x03\x04": ("a zip archive", "unzip, and pack it as a tar"),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", "unpack it, and pack it as a tar"),
    b"version https://git-lfs": ("a pointer of Git LFS", "git lfs pull"),
    b"<": ("a page of HTML or XML", "download the shard again"),
}
MAX_MEMBER_BYTES = 2**28  # larger members are refused
MAX_EMPTY_READS = 100
READ_SIZE = 2**20  # bytes
T = TypeVar("T")


class Member(NamedTuple):
    """A member of a shard.

    Attributes:
        name: Name in the tar, with folders.
        key: The part of the name before the last dot, with folders, without a leading "./".
        suffix: The part of the name after the last dot, in lower case; empty without a dot.
        offset: Position of the content in the tar, in bytes.
        size: Size of the content in bytes.
        link_target: Target of a link; `None` for a regular file.
    """

    name: str
    key: str
    suffix: str
    offset: int
    size: int
    link_target: str | None

    @property
    def kind(self) -> str | None:
        """`image` (of any format), `label` or `text`; `None` for other members."""
        return "image" if self.suffix in OTHER_IMAGE_SUFFIXES else KIND_OF_SUFFIX.get(self.suffix)

    @property
    def is_read(self) -> bool:
        """Whether its content is read: an image in a supported format, a label or a text."""
        return self.suffix in KIND_OF_SUFFIX and self.link_target is None

    @property
    def file_name(self) -> str:
        """The printable name without folders."""
        return printable_name(self.name.rpartition("/")[2])


class SampleParts(NamedTuple, Generic[T]):
    """Image, label and text of a sample. `T` is the type of the content or of its location.

    Attributes:
        image: The image's content or location; `None` without an image.
        label: The label's content or location; `None` without a label.
        text: The text's content or location; `None` without a text.
        fault: The reason why the members are not a usable sample; `None` if they are usable.
    """

    image: T | None
    label: T | None
    text: T | None
    fault: Fault | None


def is_image_name(name: str) -> bool:
    """Return whether a file name has the suffix of an image format, supported or not."""
    suffix = name.lower().rpartition(".")[2]
    return suffix in IMAGE_SUFFIXES or suffix in OTHER_IMAGE_SUFFIXES


def assemble(members: Sequence[tuple[Member, T]], shard: str) -> SampleParts[T]:
    """Combine the members that have the same key to a sample.

    Args:
        members: All members with the key, each with its content or location.
        shard: Path or URL of the shard.

    Returns:
        The parts of the sample. The fault is set if the image is missing or in an unsupported format, if there are
        several images, labels or texts, or if a member is a link.

    Raises:
        InputError: The shard contains two members with the same name.
    """
    parts: dict[str, T] = {}
    names: set[str] = set()
    for member, content in members:
        if member.name in names and member.kind:
            raise InputError(
                f"{shard}: found the member '{member.name}' twice, expected every member once",
                code=ErrorCode.DUPLICATE,
            )
        names.add(member.name)
        if member.is_read:
            parts.setdefault(KIND_OF_SUFFIX[member.suffix], content)
    fault = _find_fault([member for member, _ in members])
    return SampleParts(parts.get("image"), parts.get("label"), parts.get("text"), fault)


def _find_fault(members: Sequence[Member]) -> Fault | None:
    """Return the reason why the members with one key are not a usable sample; `None` if they are usable."""
    by_kind: dict[str | None, list[Member]] = {}
    for member in members:
        by_kind.setdefault(member.kind, []).append(member)
    images = by_kind.get("image", [])
    links = [member for member in members if member.link_target and (member.kind or not images)]
    if links:
        advice = "expected a file: pack it with tar --dereference --hard-dereference"
        return Fault("link", f"found {links[0].file_name}, a link to {links[0].link_target}, {advice}")
    for kind in ("image", "label", "text"):
        if len(by_kind.get(kind, [])) > 1:
            names = " and ".join(member.file_name for member in by_kind[kind])
            return Fault("several members of a kind", f"found {names}, expected one {kind}")
    if not images:
        names = ", ".join(member.file_name for member in members)
        return Fault("no image member", f"found {names} alone, {EXPECTED_SUFFIXES} with the same key")
    if images[0].suffix in OTHER_IMAGE_SUFFIXES:
        return Fault("unsupported image format", f"found {images[0].file_name}, {EXPECTED_SUFFIXES}")
    return None


def list_members(file: Path) -> list[Member]:
    """List the members of a local shard that may belong to a sample.

    Args:
        file: The shard.

    Returns:
        The members in the order of the tar, without folders, hidden files and WebDataset's metadata.

    Raises:
        InputError: The shard is compressed, truncated, damaged or followed by other content, or an image, label or text
            is sparse or too large.
    """
    try:
        with file.open("rb") as stream:
            _check_is_tar(stream.read(tarfile.BLOCKSIZE), str(file))
            stream.seek(0)
            with tarfile.open(fileobj=stream, mode="r:") as tar:
                members = [member for member, _ in _iter_members(tar, str(file))]
                end = tar.offset
            stream.seek(end)
            has_trailing_content = any(block.strip(b"\0") for block in iter(lambda: stream.read(READ_SIZE), b""))
    except InputError:
        raise
    except Exception as error:  # tarfile raises any class of error on damaged bytes
        raise InputError(
            f"{file}: found a truncated or damaged shard ({summarize_error(error)}), expected a complete tar",
            code=ErrorCode.UNREADABLE,
        ) from error
    # tarfile reads a shard truncated between two members without an error; only the end mark is missing.
    if file.stat().st_size < end + tarfile.BLOCKSIZE:
        raise InputError(
            f"{file}: found a shard without its end mark after {len(members)} members, expected a complete tar",
            code=ErrorCode.UNREADABLE,
        )
    if has_trailing_content:
        raise InputError(_trailing_content_message(str(file), end), code=ErrorCode.UNREADABLE)
    return members


class CheckedTarStream:
    """A readable stream of a tar that detects truncation, and content after the end of the tar.

    The class records the number of bytes read and the position after the last byte that is not zero. It raises an error
    after `MAX_EMPTY_READS` reads without data: otherwise, tarfile would try to read all bytes that the header of a
    truncated member announces.
    """

    def __init__(self, stream: IO[bytes], url: str) -> None:
        self._stream, self._url, self._empty_reads = stream, url, 0
        self._length = self._content_end = 0

    def read(self, size: int = -1) -> bytes:
        """Read from the stream.

        Args:
            size: Maximum number of bytes; -1 for all.

        Returns:
            The bytes read.

        Raises:
            EOFError: There were too many reads without data.
            InputError: The first block is not a tar header.
        """
        content = self._stream.read(size)
        if not self._length:
            _check_is_tar(content[: tarfile.BLOCKSIZE], self._url)
        self._empty_reads += not content
        if self._empty_reads > MAX_EMPTY_READS:
            raise EOFError("it ends within a member")
        if last := len(content.rstrip(b"\0")):
            self._content_end = self._length + last
        self._length += len(content)
        return content

    def check_end(self, end: int) -> None:
        """Read the rest of the stream and check that the tar is complete.

        Args:
            end: Position at which tarfile found the end of the tar, in bytes.

        Raises:
            InputError: The tar has no end mark, or is followed by other content.
        """
        while self._content_end <= end and self.read(READ_SIZE):
            pass
        # tarfile reads a tar truncated between two members without an error; only the end mark is missing.
        if self._length < end + tarfile.BLOCKSIZE:
            raise InputError(
                f"{self._url}: found a shard without its end mark, expected a complete tar", code=ErrorCode.UNREADABLE
            )
        if self._content_end > end:
            raise InputError(_trailing_content_message(self._url, end), code=ErrorCode.UNREADABLE)


def read_samples(stream: CheckedTarStream, url: str) -> Iterator[Sample]:
    """Read the samples of a streamed shard, in the order of the tar.

    Args:
        stream: The content of the shard.
        url: URL of the shard.

    Yields:
        All samples, also those with a fault.

    Raises:
        InputError: The members of a sample are not adjacent, there is no sample, or the tar is damaged or truncated.
    """
    group: list[tuple[Member, bytes]] = []  # the members of the current sample
    texts: dict[str, list[tuple[Member, bytes]]] = {}  # KEY.NAME.txt: metadata of KEY, or text of the sample KEY.NAME
    deferred: dict[str, list[Member]] = {}  # members without content that may belong to a later sample
    done: set[str] = set()
    with_image: set[str] = set()

    def close(group: Sequence[tuple[Member, bytes]]) -> Iterator[Sample]:
        """Yield the sample of a complete group. Defer texts KEY.NAME.txt: they may be metadata of a later sample."""
        members = [member for member, _ in group]
        key = members[0].key
        if "." in key.rpartition("/")[2] and all(member.kind == "text" for member in members):
            deferred.setdefault(key, []).extend(members)
            return
        done.add(key)
        if any(member.kind == "image" for member in members):
            with_image.add(key)
        yield _to_sample(group, url)

    with tarfile.open(fileobj=stream, mode="r|") as tar:  # type: ignore[call-overload]  # it only calls `read`
        for member, info in _iter_members(tar, url):
            if member.kind is None:
                deferred.setdefault(member.key, []).append(member)
                continue
            if member.key in done or any(other.kind for other in deferred.get(member.key, ())):
                raise InputError(
                    f"{url}: the members of the sample '{printable_name(member.key)}' are not adjacent, as they must "
                    "be in a streamed shard. Pack it with tar --sort=name, or set compute.shard_cache to download "
                    "it",
                    code=ErrorCode.UNSUPPORTED,
                )
            reader = tar.extractfile(info) if member.is_read else None
            content = reader.read() if reader else b""
            tar.members = []  # otherwise tarfile keeps the headers of all members in memory
            if group and member.kind == "text" and group[0][0].key in _shorter_keys(member.key):
                texts.setdefault(member.key, []).append((member, content))
                continue
            if group and group[0][0].key != member.key:
                yield from close(group)
                group = texts.pop(member.key, [])
                for members in texts.values():
                    yield from close(members)
                texts = {}
            group.append((member, content))
        for members in [group, *texts.values()] if group else []:
            yield from close(members)
        stream.check_end(tar.offset)
    unmatched = [
        members for key, members in deferred.items() if key not in done and not is_side_data(members, with_image)
    ]
    if not done and not unmatched:
        raise InputError(f"{url}: found no image in the shard, expected at least one", code=ErrorCode.EMPTY)
    yield from (_to_sample([(member, b"") for member in members], url) for members in unmatched)


def is_side_data(members: Sequence[Member], with_image: Container[str]) -> bool:
    """Return whether the members with one key are metadata of another sample.

    For example, x.metadata.json belongs to x.jpg. Images and labels are never metadata, because users expect them to be
    samples.

    Args:
        members: All members of the shard with one key.
        with_image: The keys of the shard that have an image.

    Returns:
        `True` if a prefix of the key, cut at a dot, has an image, and no member is an image or a label.
    """
    if any(member.kind in ("image", "label") for member in members):
        return False
    return any(key in with_image for key in _shorter_keys(members[0].key))


def _shorter_keys(key: str) -> list[str]:
    """Return the prefixes of a key, cut at each dot in its file name: "a/x.b.c" → ["a/x", "a/x.b"]."""
    folder, slash, name = key.rpartition("/")
    parts = name.split(".")
    return [f"{folder}{slash}{'.'.join(parts[:count])}" for count in range(1, len(parts))]


def _to_sample(group: Sequence[tuple[Member, bytes]], url: str) -> Sample:
    image, label, text, fault = assemble(group, url)
    return Sample(image or b"", label, text, url, printable_name(group[0][0].key), fault=fault)


def _iter_members(tar: tarfile.TarFile, shard: str) -> Iterator[tuple[Member, tarfile.TarInfo]]:
    """Iterate over the members that may belong to samples. Check the headers of images, labels and texts."""
    last_offset = -1
    for info in tar:
        # A crafted size could lead back to an earlier header, which would loop forever.
        if info.offset <= last_offset or info.size < 0:
            raise InputError(
                f"{shard}: found a member with the invalid size {info.size}, expected an undamaged tar",
                code=ErrorCode.UNREADABLE,
            )
        last_offset = info.offset
        folder, slash, name = re.sub(r"^(\.?/)+", "", info.name).rpartition("/")
        is_meta = name.startswith("__") and name.endswith("__")  # WebDataset's own metadata
        if info.isdir() or is_meta or is_hidden(info.name):
            continue
        stem, dot, suffix = name.rpartition(".")
        link_target = None if info.isreg() else printable_name(info.linkname) or "a device"
        member = Member(
            info.name, f"{folder}{slash}{stem if dot else name}", suffix.lower() if dot else "", info.offset_data,
            info.size, link_target,
        )  # fmt: skip
        if member.is_read and (info.issparse() or info.size > MAX_MEMBER_BYTES):
            what = "is sparse" if info.issparse() else f"has {info.size} bytes"
            raise InputError(
                f"{shard}: found the member '{info.name}', which {what}, expected regular files of at most "
                f"{MAX_MEMBER_BYTES} bytes",
                code=ErrorCode.UNSUPPORTED,
            )
        yield member, info


def _check_is_tar(first_block: bytes, shard: str) -> None:
    """Raise an error if a file begins with a magic number in `FOREIGN_FILES` and has no valid tar header."""
    for magic, (what, advice) in FOREIGN_FILES.items():
        if first_block.startswith(magic):
            with suppress(tarfile.TarError):  # a tar begins with a member's name, which may equal a magic number
                tarfile.TarInfo.frombuf(first_block, tarfile.ENCODING, "surrogateescape")
                return
            raise InputError(
                f"{shard}: found a file that is {what}, expected a plain tar; {advice}", code=ErrorCode.UNREADABLE
            )


def _trailing_content_message(shard: str, end: int) -> str:
    return (
        f"{shard}: found more content after the end of the tar at byte {end}, expected one tar per file. Either the "
        "file is damaged there, or several tars were joined with cat, so that only the first would be read. Give them "
        "as separate shards, or join them with tar --concatenate"
    )


def summarize_error(error: Exception) -> str:
    """Return an error's message on one line, without the arguments that WebDataset adds to the exception."""
    message = error.args[0] if error.args and isinstance(error.args[0], str) else error
    return " ".join(str(message).split()) or type(error).__name__


def write_shards(folder: Path, samples: Iterable[Mapping[str, bytes]], shard_images: int) -> list[dict[str, object]]:
    """Write samples to the shards 0.tar, 1.tar, …. Equal samples give identical files.

    Args:
        folder: Folder of the shards; it is created if necessary.
        samples: The samples. Each is a mapping from the suffixes of its members to their contents.
        shard_images: Samples per shard.

    Returns:
        The manifest's entry for each shard: file name, number of samples, size in bytes and SHA-256.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, object]] = []
    remaining, total = iter(samples), 0
    while content := list(islice(remaining, shard_images)):
        file = folder / f"{len(shards)}.tar"
        with file.open("wb") as stream, webdataset.TarWriter(stream, encoder=False, mtime=0) as writer:
            for number, sample in enumerate(content, start=total):
                writer.write({"__key__": f"{number:07d}", **sample})
        size = file.stat().st_size
        shards.append({"file": file.name, "samples": len(content), "bytes": size, "sha256": sha256_of_file(file)})
        total += len(content)
    return shards
