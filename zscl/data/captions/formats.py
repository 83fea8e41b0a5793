"""Reads the captions of a file in any common format; a file whose captions are in doubt is refused.

Formats: one caption a line; a table whose columns are separated by tabs, commas, semicolons or bars, with or without a
header line; JSON (COCO annotations, lists, a mapping of images to captions) and JSON lines. A file may be compressed
with gzip, bzip2 or xz. It is read as a stream, but for JSON.
"""

import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import re
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TextIO

import fsspec

from schemas.errors import InputError, did_you_mean

ONE_A_LINE = "one a line"
FORMATS = "one caption a line, or TSV, CSV, JSON or JSON lines"
# Names of columns and keys, in lower case and with underscores.
CAPTION_NAMES = {
    *("caption", "captions", "text", "texts", "title", "sentence", "sentences", "comment", "comments"),
    *("description", "descriptions", "raw", "alt", "alt_text", "alttext"),
}
OTHER_NAMES = {
    *(
        "",
        "url",
        "urls",
        "link",
        "image",
        "images",
        "image_url",
        "image_urls",
        "image_name",
        "image_id",
        "img",
        "img_id",
    ),
    *("imgid", "filepath", "file", "filename", "file_name", "path", "key", "id", "index", "hash", "sha256", "md5"),
    *("width", "height", "split", "license", "similarity", "label", "language", "lang"),
    *("comment_number", "caption_number", "sentid", "sentids"),
}
DELIMITERS = {"\t": "tab", ",": "comma", ";": "semicolon", "|": "bar"}
SAMPLE = 1_000  # records that a format is detected from
BINARY = (  # offset, first bytes, what it is and what to do
    (0, b"PAR1", "a Parquet file, expected text: write its caption column as CSV first (pandas.read_parquet, to_csv)"),
    (0, b"PK\x03\x04", "a zip archive, expected text: unpack it first"),
    (0, b"\x28\xb5\x2f\xfd", "a zstd file, expected text: decompress it first"),
    (0, b"\xff\xfe", "UTF-16, expected UTF-8: convert it first (iconv -f UTF-16 -t UTF-8)"),
    (0, b"\xfe\xff", "UTF-16, expected UTF-8: convert it first (iconv -f UTF-16 -t UTF-8)"),
    (257, b"ustar", "a tar, expected text: a reference set reads the .txt members of its shards as they are"),
)
DECOMPRESSORS: Mapping[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lzma.open,
}
URL = re.compile(r"([a-z][a-z0-9+]*://|www\.)\S+", re.IGNORECASE)
IMAGE_FILE = re.compile(r"(\S+|.*/.*)\.(jpe?g|png|webp|gif|bmp|tiff?)(#\d+)?(\s+\d+)*", re.IGNORECASE)  # and labels
NUMBER = re.compile(r"[+-]?\d[\d.,:eE/+-]*")
IDENTIFIER = re.compile(r"(?=\S*\d)[\w.\-/#]+")
HALF_PAIR = re.compile("[\ud800-\udfff]")
NO_TEXT = ("URLs", "file names", "JSON")  # refused as captions, whatever the user says
HARDLY_TEXT = ("numbers", "identifiers")  # captions only if the user says so


@dataclass
class Captions:
    """The captions of a file, to be iterated over once.

    Attributes:
        origin: the format and the column that they are from, for the user.
        values: the captions as they are in the file.
        count: captions so far.
        empty: records without a caption so far, which are left out.
    """

    origin: str
    values: Iterator[str | None]
    count: int = 0
    empty: int = 0

    def __iter__(self) -> Iterator[str]:
        for value in self.values:
            # A caption may have line separators of its own (\n, U+2028, ...), and captions.txt has one caption a line.
            # JSON may hold what no UTF-8 file can: halves of surrogate pairs.
            plain = HALF_PAIR.sub("\N{REPLACEMENT CHARACTER}", (value or "").replace("\t", " ").replace("\0", " "))
            caption = " ".join(plain.splitlines()).strip()
            if caption:
                self.count += 1
                yield caption
            else:
                self.empty += 1


def read_captions(location: str, column: str | None = None, lenient: bool = False) -> Captions:
    """Detect a caption file's format, and read its captions.

    Args:
        location: a path or URL.
        column: name or number (from 1) of the caption column, or key in JSON; default: it is detected.
        lenient: accept numbers and identifiers as captions.

    Returns:
        The captions; reading on may raise the same errors.

    Raises:
        InputError: the file cannot be read, or what its captions are is in doubt.
    """
    detect = Detector(location, column, lenient or column is not None)
    with _text(location) as stream:
        lines = list(itertools.islice(stream, SAMPLE))
    filled = [line for line in lines if line.strip()]
    if not filled:
        return Captions("nothing", iter(()))
    name, first = re.sub(r"\.(gz|bz2|xz)$", "", location.lower()), _parsed(filled[0])
    if name.endswith((".jsonl", ".ndjson")) or (isinstance(first, dict) and len(filled) > 1):
        return detect.json(whole=False)
    if name.endswith(".json") or isinstance(first, dict | list) or filled[0].strip() in ("[", "{"):
        return detect.json(whole=True)
    delimiter = _delimiter(filled, name, column)
    return detect.lines(filled) if delimiter is None else detect.table(delimiter)


@dataclass(frozen=True)
class Detector:
    """Reads one file in a known format, and chooses its caption column; arguments as of `read_captions`."""

    location: str
    column: str | None
    lenient: bool

    def lines(self, sample: Sequence[str]) -> Captions:
        """Read one caption a line.

        Args:
            sample: the first lines that are not empty.
        """
        if any("\r" in line.strip() for line in sample):
            raise InputError(f"{self.location}: found a carriage return within a line, expected lines that end in \\n")
        first = sample[0].strip()
        named = self.column not in (None, "1")
        if named and _name(self.column or "") != _name(first):
            raise InputError(
                f"--column {self.column}: found a single column in {self.location}, expected 1 or its name"
            )
        header = named or (self.column is None and len(sample) > 1 and _name(first) in CAPTION_NAMES)
        self._refuse_no_text(sample[header:], "its lines")
        values = itertools.islice(_filled(self.location), int(header), None)
        return Captions(f"{ONE_A_LINE}, below the header {first!r}" if header else ONE_A_LINE, values)

    def table(self, delimiter: str) -> Captions:
        """Read the caption column of a table."""
        quoted = self._quoted(delimiter)
        sample = [row for _, row in itertools.islice(_rows(self.location, delimiter, quoted), SAMPLE)]
        header = self._has_header(sample)
        names = [cell.strip() for cell in sample[0]] if header else []
        body = sample[1:] if header else sample
        width = len(names) or Counter(map(len, body)).most_common(1)[0][0]
        index = self._column(names, body, width)
        shown = f"column {index + 1} of {width}" + (f", {names[index]!r}" if header else "")
        self._refuse_no_text([row[index] for row in body if len(row) > index], shown)
        rows = itertools.islice(_rows(self.location, delimiter, quoted), int(header), None)
        return Captions(f"{shown} ({DELIMITERS[delimiter]}-separated)", self._cells(rows, index, width))

    def json(self, whole: bool) -> Captions:
        """Read JSON (`whole`) or JSON lines."""
        records, origin = self._json_value() if whole else (self._json_lines(), "JSON lines")
        sample = list(itertools.islice(records, SAMPLE))
        keys = list(dict.fromkeys(key for record in sample if isinstance(record, dict) for key in record))
        key = self._named(keys, "keys") if keys else None
        texts = list(itertools.chain.from_iterable(self._texts(record, key) for record in sample))
        shown = f"{origin}, key {key!r}" if key else origin
        self._refuse_no_text([text for text in texts if text is not None], shown)
        rest = itertools.chain.from_iterable(self._texts(record, key) for record in records)
        return Captions(shown, itertools.chain(texts, rest))

    # ------------------------------------------------------------------------------------------------- tables

    def _quoted(self, delimiter: str) -> bool:
        """Whether cells may be quoted, as in CSV: in a table of tabs or bars, a quotation mark may be mere text."""
        if delimiter in ",;":
            return True
        try:
            plain = {len(row) for _, row in itertools.islice(_rows(self.location, delimiter, quoted=False), SAMPLE)}
            if len(plain) == 1:
                return False
            quoted = {len(row) for _, row in itertools.islice(_rows(self.location, delimiter, quoted=True), SAMPLE)}
        except InputError:
            return False
        return len(quoted) == 1

    def _has_header(self, sample: Sequence[Sequence[str]]) -> bool:
        """Whether the first row names the columns."""
        first, body = sample[0], sample[1:]
        names = {_name(cell) for cell in first}
        if (self.column is not None and not self.column.isdecimal()) or names & CAPTION_NAMES or names <= OTHER_NAMES:
            return True
        # A word above a column of URLs is a name.
        kinds = [_kind_of([row[index] for row in body if len(row) > index]) for index in range(len(first))]
        return any(
            kind in NO_TEXT and cell.strip() and _kind(cell) != kind for cell, kind in zip(first, kinds, strict=True)
        )

    def _column(self, names: Sequence[str], body: Sequence[Sequence[str]], width: int) -> int:
        """Number of the caption column, from 0."""
        if self.column is not None and self.column.isdecimal() and self.column not in names:
            if not 1 <= int(self.column) <= width:
                raise InputError(
                    f"--column {self.column}: found {width} columns in {self.location}, expected one of them"
                )
            return int(self.column) - 1
        if self.column is not None or any(_name(name) in CAPTION_NAMES for name in names):
            return list(names).index(self._named(names, "columns"))
        columns = [[row[index] for row in body if len(row) > index and row[index].strip()] for index in range(width)]
        texts = [index for index, cells in enumerate(columns) if cells and _kind_of(cells) == "text"]
        if len(texts) > 1:  # labels and the like are single words
            texts = [
                index
                for index in texts
                if sum(" " in cell.strip() for cell in columns[index]) > len(columns[index]) / 2
            ]
        if len(texts) == 1:
            return texts[0]
        shown = "; ".join(f"{index + 1}: {cells[0].strip()[:40]!r}" for index, cells in enumerate(columns) if cells)
        raise InputError(
            f"{self.location}: found {len(texts)} columns that look like captions, of {width} ({shown}), expected one; "
            f"{self._advice}"
        )

    def _cells(self, rows: Iterator[tuple[int, list[str]]], index: int, width: int) -> Iterator[str | None]:
        for line, row in rows:
            if len(row) <= index or any(cell.strip() for cell in row[width:]):
                raise InputError(
                    f"{self.location}: found {len(row)} columns on line {line}, expected {width} as in other lines; in "
                    "CSV, a caption that holds a separator is quoted"
                )
            yield row[index]

    # --------------------------------------------------------------------------------------------------- JSON

    def _json_value(self) -> tuple[Iterator[Any], str]:
        """Records of a file that is one JSON value, and where in it they are."""
        with _text(self.location) as stream:
            try:
                value = json.loads(stream.read())
            except (ValueError, RecursionError) as error:
                if isinstance(error, UnicodeDecodeError):
                    raise
                raise InputError(f"{self.location}: found no readable JSON ({error}), expected {FORMATS}") from error
        if isinstance(value, list):
            return iter(value), "JSON list"
        if not isinstance(value, dict):
            raise InputError(f"{self.location}: found {type(value).__name__} in JSON, expected a list or an object")
        if self._knows(value):
            return iter([value]), "JSON object"
        lists = [key for key, held in value.items() if isinstance(held, list) and any(map(self._knows, held[:SAMPLE]))]
        if len(lists) == 1:
            return iter(value[lists[0]]), f"JSON list {lists[0]!r}"
        # A mapping of images to captions.
        texts = [held for held in value.values() if isinstance(held, str | list) or self._knows(held)]
        if not lists and value and len(texts) == len(value):
            return iter(texts), "values of a JSON object"
        raise InputError(
            f"{self.location}: found {len(lists)} lists of captions in JSON (its keys: {', '.join(map(repr, value))}), "
            f"expected one; {self._advice}"
        )

    def _knows(self, record: Any) -> bool:
        """Whether a record has a key for captions."""
        if not isinstance(record, dict):
            return False
        return self.column in record if self.column is not None else any(_name(key) in CAPTION_NAMES for key in record)

    def _json_lines(self) -> Iterator[Any]:
        for number, line in enumerate(_filled(self.location), start=1):
            record = _parsed(line)
            if record is None:
                raise InputError(f"{self.location}: found no JSON object on line {number}, expected one on each line")
            yield record

    def _texts(self, record: Any, key: str | None) -> Iterator[str | None]:
        """All captions of a record."""
        match record:
            case None | str():
                yield record
            case list():
                for each in record:
                    yield from self._texts(each, None)
            case dict():
                chosen = key or (
                    self.column if self.column in record else self._named(list(record), "keys", CAPTION_NAMES)
                )
                yield from self._texts(record.get(chosen), None)
            case _:
                raise InputError(f"{self.location}: found {record!r} as a caption, expected text; {self._advice}")

    # ------------------------------------------------------------------------------------------------- names

    def _named(self, names: Sequence[str], what: str, wanted: Collection[str] = ()) -> str:
        """The name of the caption column, among the names there are."""
        wanted = wanted or (CAPTION_NAMES if self.column is None else {_name(self.column)})
        found = [name for name in names if name == self.column] or [name for name in names if _name(name) in wanted]
        if len(found) == 1:
            return found[0]
        hint = did_you_mean(self.column, names) if self.column else ""
        raise InputError(
            f"{self.location}: found {len(found)} {what} that are called like captions, of "
            f"{', '.join(map(repr, names))}, expected one{hint}; {self._advice}"
        )

    def _refuse_no_text(self, values: Sequence[str], shown: str) -> None:
        kind = _kind_of([value for value in values if value.strip()])
        if kind in NO_TEXT or (kind in HARDLY_TEXT and not self.lenient):
            example = next(value.strip() for value in values if _kind(value) == kind)
            raise InputError(
                f"{self.location}: found {kind} in {shown} ({example[:100]!r}), expected captions; {self._advice}"
            )

    @property
    def _advice(self) -> str:
        return f"name it: zscl data prepare captions {self.location} --column NAME_OR_NUMBER --out FOLDER"


# ------------------------------------------------------------------------------------------------- reading


def _opened(location: str) -> AbstractContextManager[IO[bytes]]:
    """Open a file. A local one is not opened by fsspec, which takes `::` in a path for a chain of URLs."""
    if "://" not in location:
        return Path(location).open("rb")
    remote: AbstractContextManager[IO[bytes]] = fsspec.open(location, "rb")
    return remote


@contextmanager
def _text(location: str, newline: str = "\n") -> Iterator[TextIO]:
    """Open a text file, local or remote, compressed or not.

    Raises:
        InputError: it cannot be read, or holds no UTF-8 text.
    """
    try:
        with _opened(location) as stream:
            head = stream.read(512)
        for offset, magic, what in BINARY:
            if head[offset:].startswith(magic):
                raise InputError(f"{location}: found {what}")
        decompress = next((opens for magic, opens in DECOMPRESSORS.items() if head.startswith(magic)), None)
        with _opened(location) as stream:
            content = decompress(stream) if decompress else stream
            yield io.TextIOWrapper(content, encoding="utf-8-sig", newline=newline)
    except InputError:
        raise
    except UnicodeDecodeError as error:
        raise InputError(f"{location}: found no UTF-8 text ({error.reason}), expected captions in UTF-8") from error
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise InputError(f"{location}: found a broken compressed file ({error}), expected a whole one") from error
    except FileNotFoundError as error:
        raise InputError(f"{location}: found no such file, expected captions: {FORMATS}") from error
    except Exception as error:  # fsspec raises what its stores raise: no credentials, no such bucket, ...
        raise InputError(f"{location}: cannot be read ({error}), expected captions: {FORMATS}") from error


def _filled(location: str) -> Iterator[str]:
    """The lines that are not empty."""
    with _text(location) as stream:
        for number, line in enumerate(stream, start=1):
            _refuse_nul(location, line, number)
            if line.strip():
                yield line


def _rows(location: str, delimiter: str, quoted: bool) -> Iterator[tuple[int, list[str]]]:
    """The rows that are not empty, each with the number of its last line."""
    if not quoted:
        with _text(location) as stream:
            for number, line in enumerate(stream, start=1):
                _refuse_nul(location, line, number)
                if line.strip():
                    yield number, [_unquoted(cell) for cell in line.rstrip("\r\n").split(delimiter)]
        return
    with _text(location, newline="") as stream:
        reader = csv.reader(stream, delimiter=delimiter, strict=True)
        try:
            for row in reader:
                _refuse_nul(location, "".join(row), reader.line_num)
                if any(cell.strip() for cell in row):
                    yield reader.line_num, row
        except csv.Error as error:
            raise InputError(
                f"{location}: found no readable row on line {reader.line_num} ({error}), expected a table in which "
                "quotation marks within a quoted cell are doubled"
            ) from error


def _unquoted(cell: str) -> str:
    """A cell without the quotation marks that a CSV writer sets around one that holds quotation marks."""
    inside = cell[1:-1].replace('""', "")
    return (
        cell[1:-1].replace('""', '"')
        if cell[:1] == cell[-1:] == '"' and '""' in cell[1:-1] and '"' not in inside
        else cell
    )


def _refuse_nul(location: str, text: str, line: int) -> None:
    if "\0" in text:
        raise InputError(f"{location}: found a NUL byte on line {line}, expected text in UTF-8")


# ------------------------------------------------------------------------------------------------ detecting


def _parsed(line: str) -> Any:
    """A JSON object or list; nothing where the text is none."""
    if not line.lstrip().startswith(("{", "[", '"')):
        return None
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict | list | str) else None


def _delimiter(sample: Sequence[str], name: str, column: str | None) -> str | None:
    """What separates the columns; nothing where there is one caption a line."""
    tabs = sum("\t" in line for line in sample) / len(sample)
    if tabs > 0.5 or (tabs and name.endswith((".tsv", ".tab"))):
        return "\t"
    for delimiter in (",", ";", "|"):
        cells = [_name(cell) for cell in sample[0].split(delimiter)]
        nearly_all = sum(delimiter in line for line in sample) > 0.9 * len(sample)
        if len(cells) == 1 or not (nearly_all or name.endswith(".csv")):
            continue
        wanted = CAPTION_NAMES if column is None or column.isdecimal() else {_name(column)}
        if wanted & set(cells) and all(re.fullmatch(r"\w*", cell) for cell in cells):
            return delimiter
        # Without a header: the first or the last cells are URLs or file names.
        if any(_kind_of([line.split(delimiter)[end] for line in sample]) in NO_TEXT[:2] for end in (0, -1)):
            return delimiter
    if not name.endswith(".csv"):
        return None
    return max(",;|", key=lambda delimiter: sample[0].count(delimiter))


def _name(text: str) -> str:
    """A column's name as all its spellings agree."""
    return re.sub(r"[\s-]+", "_", text.strip().strip("\"'").casefold())


def _kind(value: str) -> str:
    """What a value is: text, or something else."""
    value = value.strip()
    for pattern, kind in ((URL, "URLs"), (IMAGE_FILE, "file names"), (NUMBER, "numbers"), (IDENTIFIER, "identifiers")):
        if pattern.fullmatch(value):
            return kind
    return "JSON" if re.fullmatch(r"\[.*\]|\{.*\}", value, re.DOTALL) else "text"


def _kind_of(values: Sequence[str]) -> str:
    """What most values are."""
    kind, count = Counter(map(_kind, values)).most_common(1)[0] if values else ("text", 1)
    return kind if count > len(values) / 2 else "text"
