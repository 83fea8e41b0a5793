"""Reading of caption files, with detection of the format and the caption column.

A file is refused if its captions cannot be identified with certainty.

Formats: one caption per line; a table with columns separated by tabs, commas, semicolons or bars, with or without a
header; JSON (COCO annotations, lists, a mapping of images to captions) and JSON lines. A file may be compressed with
gzip, bzip2 or xz. All formats except JSON are streamed.
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from schemas.errors import ErrorCode, InputError
from zscl.data.captions.columns import CAPTION_NAMES, CaptionSource, normalize_name
from zscl.data.captions.json_records import parse_record, read_json
from zscl.data.captions.tables import detect_delimiter, read_table
from zscl.data.captions.text_file import iter_lines, open_text

ONE_PER_LINE = "one per line"  # `Captions.origin` of a file without a header
SAMPLE_SIZE = 1_000  # lines from which the format is detected
SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass
class Captions:
    """Iterable of the captions of a file. It can be iterated over only once.

    Attributes:
        origin: Description of the format and of the caption column for the user.
        values: The captions as they are in the file; `None` for a record without a caption.
        count: Number of captions read so far.
        empty: Number of records without a caption so far. They are skipped.
    """

    origin: str
    values: Iterator[str | None]
    count: int = 0
    empty: int = 0

    def __iter__(self) -> Iterator[str]:
        for value in self.values:
            # A caption may contain line separators (\n, U+2028, …), but captions.txt has one caption per line.
            # JSON may contain single halves of surrogate pairs, which UTF-8 cannot encode.
            encodable = SURROGATE.sub("\N{REPLACEMENT CHARACTER}", (value or "").replace("\t", " ").replace("\0", " "))
            caption = " ".join(encodable.splitlines()).strip()
            if caption:
                self.count += 1
                yield caption
            else:
                self.empty += 1


def read_captions(location: str, column: str | None = None, lenient: bool = False) -> Captions:
    """Detect the format of a caption file and read its captions.

    Args:
        location: Path or URL.
        column: Name or number (from 1) of the caption column, or the key in JSON; `None`: it is detected.
        lenient: Whether numbers and identifiers are accepted as captions.

    Returns:
        The captions. The file is read during the iteration, which may raise the same errors.

    Raises:
        InputError: The file cannot be read, or its captions cannot be identified with certainty.
    """
    source = CaptionSource(location, column, lenient or column is not None)
    with open_text(location) as stream:
        head = list(itertools.islice(stream, SAMPLE_SIZE))
    lines = [line for line in head if line.strip()]
    if not lines:
        return Captions("nothing", iter(()))
    name, first = re.sub(r"\.(gz|bz2|xz)$", "", location.lower()), parse_record(lines[0])
    if name.endswith((".jsonl", ".ndjson")) or (isinstance(first, dict) and len(lines) > 1):
        return Captions(*read_json(source, is_lines=True))
    if name.endswith(".json") or isinstance(first, dict | list) or lines[0].strip() in ("[", "{"):
        return Captions(*read_json(source, is_lines=False))
    delimiter = detect_delimiter(lines, name, column)
    return Captions(*(_read_lines(source, lines) if delimiter is None else read_table(source, delimiter)))


def _read_lines(source: CaptionSource, sample: Sequence[str]) -> tuple[str, Iterator[str | None]]:
    """Read a file with one caption per line. Return a description of the format for the user, and the captions."""
    if any("\r" in line.strip() for line in sample):
        raise InputError(
            f"{source.location}: found a carriage return within a line, expected lines that end in \\n",
            code=ErrorCode.UNREADABLE,
        )
    first = sample[0].strip()
    is_named = source.column not in (None, "1")
    if is_named and normalize_name(source.column or "") != normalize_name(first):
        raise InputError(
            f"--column {source.column}: found a single column in {source.location}, expected 1 or its name",
            code=ErrorCode.UNKNOWN_NAME,
            field="--column",
        )
    is_header = source.column is None and len(sample) > 1 and normalize_name(first) in CAPTION_NAMES
    has_header = is_named or is_header
    source.check_is_text(sample[has_header:], "its lines")
    values = itertools.islice(iter_lines(source.location), int(has_header), None)
    return f"{ONE_PER_LINE}, below the header {first!r}" if has_header else ONE_PER_LINE, values
