"""The members of tar shards: what would be read of one is looked at first.

A shard is a tar of samples KEY.(jpg|jpeg|png|webp) + KEY.cls or KEY.txt. KEY is everything before the last dot.
KEY.NAME.json and the like, and KEY.NAME.txt, are side data of KEY where KEY has an image.
Nothing here unpickles: only image, label and text members are ever read.
"""

import re
import tarfile
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import IO, Generic, NamedTuple, TypeVar

import webdataset

from schemas.errors import InputError
from zscl.data.sample import Fault, Sample, printable_name
from zscl.runtime.hashing import sha256_of_file
from zscl.runtime.paths import is_hidden

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
EXPECTED_SUFFIXES = f"expected one of {', '.join(f'.{suffix}' for suffix in IMAGE_SUFFIXES)}"
KINDS = {**dict.fromkeys(IMAGE_SUFFIXES, "image"), "cls": "label", "txt": "text"}  # no other member is ever read
# Images of other formats. They are never decoded, but a user takes them for data, so they are named and counted.
OTHER_IMAGE_SUFFIXES = frozenset(
    {"arw", "avif", "bmp", "cr2", "dng", "gif", "heic", "heif", "ico", "jfif", "jp2", "jpe", "jxl", "nef", "pbm", "pgm"}
    | {"pnm", "ppm", "psd", "raw", "svg", "tga", "tif", "tiff"}
)
# How files begin that are often found under the name of a shard.
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
LARGEST_MEMBER = 2**28  # bytes: what claims to be larger is no image, label or text
MOST_READS_IN_VAIN = 100
AT_ONCE = 2**20  # bytes
T = TypeVar("T")


class Member(NamedTuple):
    """A member of a shard, and where its content lies; `link`: what it points to where it is no file."""

    name: str
    key: str
    suffix: str
    offset: int
    size: int
    link: str | None

    @property
    def kind(self) -> str | None:
        """Whether it is an image (of whatever format), a label or a text."""
        return "image" if self.suffix in OTHER_IMAGE_SUFFIXES else KINDS.get(self.suffix)

    @property
    def is_read(self) -> bool:
        """Whether its content is ever read."""
        return self.suffix in KINDS and self.link is None

    @property
    def file_name(self) -> str:
        """Its name without folders, to be shown."""
        return printable_name(self.name.rpartition("/")[2])


class Parts(NamedTuple, Generic[T]):
    """A sample's image, label and text; `fault`: why they make no sample."""

    image: T | None
    label: T | None
    text: T | None
    fault: Fault | None


def is_image_name(name: str) -> bool:
    """Whether a file is an image by its suffix, of whatever format."""
    suffix = name.lower().rpartition(".")[2]
    return suffix in IMAGE_SUFFIXES or suffix in OTHER_IMAGE_SUFFIXES


def assemble(members: Sequence[tuple[Member, T]], shard: str) -> Parts[T]:
    """Put the members of one key together.

    Args:
        members: each with its content, or where that lies.
        shard: that holds them.

    Returns:
        The parts. Where one is missing, doubled, a link or of another format, the fault says so.

    Raises:
        InputError: a member is there twice.
    """
    found: dict[str, T] = {}
    names: set[str] = set()
    for member, content in members:
        if member.name in names and member.kind:
            raise InputError(f"{shard}: found the member '{member.name}' twice, expected every member once")
        names.add(member.name)
        if member.is_read:
            found.setdefault(KINDS[member.suffix], content)
    fault = _fault_of([member for member, _ in members])
    return Parts(found.get("image"), found.get("label"), found.get("text"), fault)


def _fault_of(members: Sequence[Member]) -> Fault | None:
    """Why the members of one key make no sample, if they do not."""
    of_kind: dict[str | None, list[Member]] = {}
    for member in members:
        of_kind.setdefault(member.kind, []).append(member)
    images = of_kind.get("image", [])
    links = [member for member in members if member.link and (member.kind or not images)]
    if links:
        advice = "expected a file: pack it with tar --dereference --hard-dereference"
        return Fault("link", f"found {links[0].file_name}, a link to {links[0].link}, {advice}")
    for kind in ("image", "label", "text"):
        if len(of_kind.get(kind, [])) > 1:
            names = " and ".join(member.file_name for member in of_kind[kind])
            return Fault("several members of a kind", f"found {names}, expected one {kind}")
    if not images:
        names = ", ".join(member.file_name for member in members)
        return Fault("no image member", f"found {names} alone, {EXPECTED_SUFFIXES} with the same key")
    if images[0].suffix in OTHER_IMAGE_SUFFIXES:
        return Fault("unsupported image format", f"found {images[0].file_name}, {EXPECTED_SUFFIXES}")
    return None


def tar_members(file: Path) -> list[Member]:
    """Every member of a local shard that may belong to a sample.

    Raises:
        InputError: the shard is compressed, cut, broken or followed by something else, or a member that would be read
            is not what it says.
    """
    try:
        with file.open("rb") as stream:
            _refuse_foreign(stream.read(tarfile.BLOCKSIZE), str(file))
            stream.seek(0)
            with tarfile.open(fileobj=stream, mode="r:") as tar:
                found = [member for member, _ in _members_of(tar, str(file))]
                end = tar.offset
            stream.seek(end)
            more = any(block.strip(b"\0") for block in iter(lambda: stream.read(AT_ONCE), b""))
    except InputError:
        raise
    except Exception as error:  # what tarfile raises on foreign bytes is no closed list
        raise InputError(
            f"{file}: found a truncated or broken shard ({reason_of(error)}), expected a whole tar"
        ) from error
    # A shard cut between two members reads without an error; only the end mark's absence tells.
    if file.stat().st_size < end + tarfile.BLOCKSIZE:
        raise InputError(f"{file}: found a shard without its end after {len(found)} members, expected a whole tar")
    if more:
        raise InputError(_more_behind(str(file), end))
    return found


class Tail:
    """A stream that knows how long it was and where its last byte that is not zero lay.

    It is not read for ever behind its end.
    """

    def __init__(self, stream: IO[bytes], url: str) -> None:
        self._stream, self._url, self._in_vain = stream, url, 0
        self._length = self._content_end = 0

    def read(self, size: int = -1) -> bytes:
        """Read on.

        Raises:
            EOFError: reading has been in vain too often.
            InputError: the stream begins like something else than a tar.
        """
        content = self._stream.read(size)
        if not self._length:
            _refuse_foreign(content[: tarfile.BLOCKSIZE], self._url)
        self._in_vain += not content
        if self._in_vain > MOST_READS_IN_VAIN:  # to pass over a member, tarfile reads all that its size claims
            raise EOFError("it ends within a member")
        if last := len(content.rstrip(b"\0")):
            self._content_end = self._length + last
        self._length += len(content)
        return content

    def check_end(self, end: int) -> None:
        """Read the rest of a stream.

        Args:
            end: where tarfile found the end of the tar.

        Raises:
            InputError: the tar has no end mark, or something follows it.
        """
        while self._content_end <= end and self.read(AT_ONCE):
            pass
        if self._length < end + tarfile.BLOCKSIZE:  # cut between two members: only the end mark's absence tells
            raise InputError(f"{self._url}: found no readable shard (it has no end), expected a tar")
        if self._content_end > end:
            raise InputError(_more_behind(self._url, end))


def read_samples(stream: Tail, url: str) -> Iterator[Sample]:
    """Read the samples of a streamed shard, one after another; only images, labels and texts are read.

    Raises:
        InputError: the members of a sample are apart, there is no sample, or the shard is no whole tar.
    """
    group: list[tuple[Member, bytes]] = []
    held: dict[str, list[tuple[Member, bytes]]] = {}  # texts KEY.….txt of the sample KEY, or of a sample that follows
    others: dict[str, list[Member]] = {}  # what may belong to a sample that comes later, without its content
    done: set[str] = set()
    with_image: set[str] = set()

    def close(group: Sequence[tuple[Member, bytes]]) -> Iterator[Sample]:
        """Yield a group whose last member was read; texts KEY.….txt alone may be side data of a sample behind them."""
        members = [member for member, _ in group]
        key = members[0].key
        if "." in key.rpartition("/")[2] and all(member.kind == "text" for member in members):
            others.setdefault(key, []).extend(members)
            return
        done.add(key)
        if any(member.kind == "image" for member in members):
            with_image.add(key)
        yield _sample_of(group, url)

    with tarfile.open(fileobj=stream, mode="r|") as tar:  # type: ignore[call-overload]  # it only reads
        for member, info in _members_of(tar, url):
            if member.kind is None:
                others.setdefault(member.key, []).append(member)
                continue
            if member.key in done or any(other.kind for other in others.get(member.key, ())):
                raise InputError(
                    f"{url}: found the members of the sample '{printable_name(member.key)}' apart, expected them one "
                    "after another in a streamed shard: pack it with tar --sort=name, or let compute.shard_cache "
                    "copy it"
                )
            opened = tar.extractfile(info) if member.is_read else None
            read = member, opened.read() if opened else b""
            tar.members = []  # or it remembers every header of the shard
            if group and member.kind == "text" and group[0][0].key in _shorter_keys(member.key):
                held.setdefault(member.key, []).append(read)
                continue
            if group and group[0][0].key != member.key:
                yield from close(group)
                group = held.pop(member.key, [])
                for texts in held.values():
                    yield from close(texts)
                held = {}
            group.append(read)
        for each in [group, *held.values()] if group else []:
            yield from close(each)
        stream.check_end(tar.offset)
    lonely = [members for key, members in others.items() if key not in done and not is_side_data(members, with_image)]
    if not done and not lonely:
        raise InputError(f"{url}: found no image in the shard, expected at least one")
    yield from (_sample_of([(member, b"") for member in members], url) for members in lonely)


def is_side_data(members: Sequence[Member], with_image: Container[str]) -> bool:
    """Whether the members of one key are side data of another sample, such as x.metadata.json beside x.jpg.

    Images and labels never are: a user takes them for samples.

    Args:
        members: of one key.
        with_image: the keys of the shard that have an image.
    """
    if any(member.kind in ("image", "label") for member in members):
        return False
    return any(key in with_image for key in _shorter_keys(members[0].key))


def _shorter_keys(key: str) -> list[str]:
    """The keys that a file's name has where it is cut at one of the dots within its key."""
    folder, slash, name = key.rpartition("/")
    parts = name.split(".")
    return [f"{folder}{slash}{'.'.join(parts[:count])}" for count in range(1, len(parts))]


def _sample_of(group: Sequence[tuple[Member, bytes]], url: str) -> Sample:
    image, label, text, fault = assemble(group, url)
    return Sample(image or b"", label, text, url, printable_name(group[0][0].key), fault=fault)


def _members_of(tar: tarfile.TarFile, shard: str) -> Iterator[tuple[Member, tarfile.TarInfo]]:
    """The members that may belong to samples, one after another; those that would be read are looked at first."""
    behind = -1
    for info in tar:
        if info.offset <= behind or info.size < 0:  # or a crafted size leads back to where we were, for ever
            raise InputError(f"{shard}: found the size {info.size} of a member, expected a whole tar")
        behind = info.offset
        folder, slash, name = re.sub(r"^(\.?/)+", "", info.name).rpartition("/")
        is_meta = name.startswith("__") and name.endswith("__")  # WebDataset's own
        if info.isdir() or is_meta or is_hidden(info.name):
            continue
        stem, dot, suffix = name.rpartition(".")
        link = None if info.isreg() else printable_name(info.linkname) or "a device"
        member = Member(
            info.name, f"{folder}{slash}{stem if dot else name}", suffix.lower() if dot else "", info.offset_data,
            info.size, link,
        )  # fmt: skip
        if member.is_read and (info.issparse() or info.size > LARGEST_MEMBER):
            what = "is sparse" if info.issparse() else f"has {info.size} bytes"
            raise InputError(
                f"{shard}: found the member '{info.name}', which {what}, expected files of at most "
                f"{LARGEST_MEMBER} bytes"
            )
        yield member, info


def _refuse_foreign(beginning: bytes, shard: str) -> None:
    """Refuse what begins like another kind of file; a tar begins with a member's name, which may be anything."""
    for magic, (what, advice) in FOREIGN_FILES.items():
        if beginning.startswith(magic):
            with suppress(tarfile.TarError):
                tarfile.TarInfo.frombuf(beginning, tarfile.ENCODING, "surrogateescape")
                return
            raise InputError(f"{shard}: found a file that is {what}, expected a plain tar; {advice}")


def _more_behind(shard: str, end: int) -> str:
    return (
        f"{shard}: found more content behind the end of the tar at byte {end}, expected one whole tar a file: it is "
        "broken there, or tars were joined by cat, of which only the first would be read; give them as shards of their "
        "own, or join them with tar --concatenate"
    )


def reason_of(error: Exception) -> str:
    """What an error says, on one line, whole."""
    said = error.args[0] if error.args and isinstance(error.args[0], str) else error  # WebDataset appends to it
    return " ".join(str(said).split()) or type(error).__name__


def write_shards(folder: Path, samples: Iterable[Mapping[str, bytes]], shard_images: int) -> list[dict[str, object]]:
    """Write samples (suffix -> content) to 0.tar, 1.tar, …; the same samples give the same bytes.

    Returns each shard's file name, samples, bytes and sha256.
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
