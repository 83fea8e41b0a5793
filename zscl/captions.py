"""Caption files → the texts of a reference set."""

import itertools
from collections.abc import Iterator
from pathlib import Path

from schemas.base import InputError
from zscl.files import whole_file


def write_captions(file: Path, folder: Path) -> int:
    """Write a caption file (Conceptual Captions' TSV, or one caption a line) as the captions.txt of a reference set.

    Nothing is deduplicated or reordered; only empty captions are left out. Returns how many there are.

    Raises:
        InputError: no such file, not UTF-8, no caption in it, or other captions there already.
    """
    if not file.is_file():
        raise InputError(f"{file}: found no such file, expected captions, one a line (caption<TAB>url or caption)")
    try:
        count = sum(1 for _ in _captions(file))
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: found no UTF-8 text ({error.reason}), expected captions in UTF-8") from error
    if not count:
        raise InputError(f"{file}: found no caption, expected one a line (caption<TAB>url or caption)")
    place = folder / "captions.txt"
    if place.exists():
        if not all(there == ours for there, ours in itertools.zip_longest(_captions(place), _captions(file))):
            raise InputError(f"{place}: found other captions there, expected a folder without a captions.txt")
        return count
    with whole_file(place) as temporary, temporary.open("w", encoding="utf-8") as written:
        written.writelines(caption + "\n" for caption in _captions(file))
    return count


def _captions(file: Path) -> Iterator[str]:
    with file.open(encoding="utf-8-sig", newline="\n") as lines:
        for line in lines:
            # Unicode has more line ends than \n, and captions.txt has one caption a line.
            caption = " ".join(line.partition("\t")[0].splitlines()).strip()
            if caption:
                yield caption
