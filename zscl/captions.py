"""Caption files → the texts of a reference set."""

import itertools
from dataclasses import dataclass
from pathlib import Path

from schemas.base import InputError
from zscl.caption_formats import FORMATS, read_captions
from zscl.files import whole_file

SHOWN = 3  # captions shown to the user


@dataclass(frozen=True)
class Written:
    """What was written as captions.txt.

    Attributes:
        captions: how many.
        origin: the format and the column that they were read from.
        first: the first ones.
        empty: records without a caption, which were left out.
    """

    captions: int
    origin: str
    first: tuple[str, ...]
    empty: int


def write_captions(file: Path, folder: Path, column: str | None = None) -> Written:
    """Write a caption file as the captions.txt of a reference set, whole or not at all.

    Nothing is deduplicated or reordered; only empty captions are left out.

    Args:
        file: in a format of `zscl.caption_formats`.
        folder: of the reference set.
        column: name or number (from 1) of the caption column, or key in JSON; default: it is detected.

    Returns:
        What was written, or is there already.

    Raises:
        InputError: the file cannot be read, its format or column is in doubt, it has no caption, or the folder has
            other captions already.
    """
    if not file.is_file():
        found = "a folder" if file.is_dir() else "no such file"
        advice = (
            "; a folder of shards or of images with .txt files is a reference set as it is" if file.is_dir() else ""
        )
        raise InputError(f"{file}: found {found}, expected a caption file: {FORMATS}{advice}")
    source = read_captions(str(file), column)
    captions = iter(source)
    first = list(itertools.islice(captions, SHOWN))
    if not first:
        raise InputError(f"{file}: found no caption, expected at least one ({FORMATS})")
    captions = itertools.chain(first, captions)
    place = folder / "captions.txt"
    if place.exists():
        written = read_captions(str(place), "1")
        if not all(there == ours for there, ours in itertools.zip_longest(written, captions)):
            raise InputError(f"{place}: found other captions there, expected a folder without a captions.txt")
    else:
        with whole_file(place) as temporary, temporary.open("w", encoding="utf-8") as stream:
            stream.writelines(caption + "\n" for caption in captions)
    return Written(source.count, source.origin, tuple(first), source.empty)
