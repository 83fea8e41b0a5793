"""Conversion of caption files to the `captions.txt` of a reference set."""

import itertools
from dataclasses import dataclass
from pathlib import Path

from schemas.errors import ErrorCode, InputError
from zscl.data.captions.formats import ONE_PER_LINE, read_captions
from zscl.data.captions.text_file import CAPTION_FORMATS
from zscl.runtime.atomic_io import atomic_file

PREVIEW_CAPTIONS = 3  # shown to the user
HEADER = b"caption\n"  # every line after it is a caption


@dataclass(frozen=True)
class WrittenCaptions:
    """Summary of a `captions.txt` that was just written or already had the same captions.

    Attributes:
        captions: Number of captions.
        origin: The format of the caption file, with the column or key of the captions.
        first: The first captions, as a preview for the user.
        empty: Number of records without a caption; they are skipped.
    """

    captions: int
    origin: str
    first: tuple[str, ...]
    empty: int


def write_captions(file: Path, folder: Path, column: str | None = None) -> WrittenCaptions:
    """Convert a caption file to the captions.txt of a reference set, atomically.

    Captions are neither deduplicated nor reordered. Empty captions are skipped.

    Args:
        file: A file in one of the formats of `zscl.data.captions.formats`.
        folder: Folder of the reference set, in which `captions.txt` is written.
        column: Name or number (from 1) of the caption column, or key in JSON; detected by default.

    Returns:
        A summary of the captions. If `captions.txt` exists with the same captions, it is not written again.

    Raises:
        InputError: The file cannot be read, its format or column is ambiguous, it has no caption, or `captions.txt`
            exists with other captions.
    """
    if not file.is_file():
        kind = "a folder" if file.is_dir() else "no such file"
        advice = "; a folder of shards, or of images with .txt files, needs no conversion" if file.is_dir() else ""
        raise InputError(
            f"{file}: found {kind}, expected a caption file: {CAPTION_FORMATS}{advice}", code=ErrorCode.NOT_FOUND
        )
    source = read_captions(str(file), column)
    captions = iter(source)
    first = list(itertools.islice(captions, PREVIEW_CAPTIONS))
    if not first:
        raise InputError(f"{file}: found no caption, expected at least one ({CAPTION_FORMATS})", code=ErrorCode.EMPTY)
    captions = itertools.chain(first, captions)
    path = folder / "captions.txt"
    if path.exists():
        existing = read_captions(str(path), lenient=True)
        if not all(old == new for old, new in itertools.zip_longest(existing, captions)):
            raise InputError(
                f"{path}: the file exists and has other captions, expected a folder without a captions.txt",
                code=ErrorCode.MISMATCH,
            )
    else:
        with atomic_file(path) as temporary:
            with temporary.open("w", encoding="utf-8") as stream:
                stream.writelines(caption + "\n" for caption in captions)
            _add_header_if_ambiguous(temporary, file, first[0])
    return WrittenCaptions(source.count, source.origin, tuple(first), source.empty)


def _add_header_if_ambiguous(written: Path, file: Path, first: str) -> None:
    """Add a header line if a run would otherwise detect another format and read other captions.

    A run detects the format of `captions.txt` from its content.

    Args:
        written: File with one caption per line.
        file: The source of the captions, for the message.
        first: The first caption.

    Raises:
        InputError: A run cannot read the captions, even with a header.
    """
    try:
        captions = read_captions(str(written), lenient=True)
        if captions.origin == ONE_PER_LINE and next(iter(captions)) == first:  # a byte order mark would be lost
            return
    except InputError:
        pass  # they may be readable with a header
    written.write_bytes(HEADER + written.read_bytes())
    try:
        first_read = next(iter(read_captions(str(written), lenient=True)))
    except InputError as error:
        reason = str(error).replace(f"{written}: ", "").partition("; name it: ")[0]
        raise InputError(
            f"{file}: {reason}; a run cannot read the resulting captions.txt. Choose another column with "
            "--column NAME_OR_NUMBER, or remove these captions",
            code=error.code,
            field=error.field,
        ) from error
    assert first_read == first
