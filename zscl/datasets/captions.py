"""Caption files → the texts of a reference set."""

import itertools
from dataclasses import dataclass
from pathlib import Path

from schemas.errors import InputError
from zscl.data.captions.formats import FORMATS, ONE_A_LINE, read_captions
from zscl.runtime.atomic_io import atomic_file

SHOWN = 3  # captions shown to the user
HEADER = b"caption\n"  # below it, every line is a caption


@dataclass(frozen=True)
class WrittenCaptions:
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


def write_captions(file: Path, folder: Path, column: str | None = None) -> WrittenCaptions:
    """Write a caption file as the captions.txt of a reference set, whole or not at all.

    Nothing is deduplicated or reordered; only empty captions are left out.

    Args:
        file: in a format of `zscl.data.captions.formats`.
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
        written = read_captions(str(place), lenient=True)
        if not all(there == ours for there, ours in itertools.zip_longest(written, captions)):
            raise InputError(f"{place}: found other captions there, expected a folder without a captions.txt")
    else:
        with atomic_file(place) as temporary:
            with temporary.open("w", encoding="utf-8") as stream:
                stream.writelines(caption + "\n" for caption in captions)
            _make_readable(temporary, file, first[0])
    return WrittenCaptions(source.count, source.origin, tuple(first), source.empty)


def _make_readable(written: Path, file: Path, first: str) -> None:
    """Give captions that a run would not read back as they were written the header line that settles their format.

    Args:
        written: one caption a line.
        file: that they are from, for the message.
        first: the first caption.

    Raises:
        InputError: a run would not read them back with a header either.
    """
    try:
        plain = read_captions(str(written), lenient=True)
        if plain.origin == ONE_A_LINE and next(iter(plain)) == first:  # a byte order mark would be lost
            return
    except InputError:
        pass  # with a header they may be readable
    written.write_bytes(HEADER + written.read_bytes())
    try:
        found = next(iter(read_captions(str(written), lenient=True)))
    except InputError as error:
        reason = str(error).replace(f"{written}: ", "").partition("; name it: ")[0]
        raise InputError(
            f"{file}: {reason}; a run would refuse the captions.txt that is made of it: choose another column with "
            "--column NAME_OR_NUMBER, or leave these captions out"
        ) from error
    assert found == first
