"""Opening of text files, local or remote, plain or compressed, and reading of their lines and table rows."""

import bz2
import csv
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, Any, TextIO

import fsspec

from schemas.errors import ErrorCode, InputError

CAPTION_FORMATS = "one caption per line, or TSV, CSV, JSON or JSON lines"
BINARY_FORMATS = (  # offset, first bytes, what the file is and what to do
    (0, b"PAR1", "a Parquet file, expected text: write its caption column as CSV first (pandas.read_parquet, to_csv)"),
    (0, b"PK\x03\x04", "a zip archive, expected text: unpack it first"),
    (0, b"\x28\xb5\x2f\xfd", "a zstd file, expected text: decompress it first"),
    (0, b"\xff\xfe", "UTF-16, expected UTF-8: convert it first (iconv -f UTF-16 -t UTF-8)"),
    (0, b"\xfe\xff", "UTF-16, expected UTF-8: convert it first (iconv -f UTF-16 -t UTF-8)"),
    (257, b"ustar", "a tar, expected text: a reference set reads the .txt members of its shards directly"),
)
DECOMPRESSORS: Mapping[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lzma.open,
}


def open_binary(location: str) -> AbstractContextManager[IO[bytes]]:
    """Open a local or remote file. fsspec opens only URLs, because it regards `::` in a path as a separator of URLs."""
    if "://" not in location:
        return Path(location).open("rb")
    remote: AbstractContextManager[IO[bytes]] = fsspec.open(location, "rb")
    return remote


@contextmanager
def open_text(location: str, newline: str = "\n") -> Iterator[TextIO]:
    r"""Open a caption file as UTF-8 text. Files compressed by gzip, bzip2 or xz are decompressed.

    Args:
        location: Path or URL.
        newline: The argument of the built-in `open`; by default, only \n ends a line.

    Yields:
        The text stream.

    Raises:
        InputError: The file cannot be read, is damaged, or is not UTF-8 text. This error is also raised if reading
            fails in the `with` block.
    """
    try:
        with open_binary(location) as stream:
            head = stream.read(512)
        for offset, magic, what in BINARY_FORMATS:
            if head[offset:].startswith(magic):
                raise InputError(f"{location}: found {what}", code=ErrorCode.UNSUPPORTED)
        decompress = next((opens for magic, opens in DECOMPRESSORS.items() if head.startswith(magic)), None)
        with open_binary(location) as stream:
            content = decompress(stream) if decompress else stream
            yield io.TextIOWrapper(content, encoding="utf-8-sig", newline=newline)
    except InputError:
        raise
    except UnicodeDecodeError as error:
        raise InputError(
            f"{location}: found no UTF-8 text ({error.reason}), expected captions in UTF-8", code=ErrorCode.UNREADABLE
        ) from error
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise InputError(
            f"{location}: found a damaged compressed file ({error}), expected a complete one", code=ErrorCode.UNREADABLE
        ) from error
    except FileNotFoundError as error:
        raise InputError(
            f"{location}: found no such file, expected captions: {CAPTION_FORMATS}", code=ErrorCode.NOT_FOUND
        ) from error
    except Exception as error:  # each fsspec backend raises its own classes of error
        raise InputError(
            f"{location}: cannot be read ({error}), expected captions: {CAPTION_FORMATS}", code=ErrorCode.UNREADABLE
        ) from error


def iter_lines(location: str) -> Iterator[str]:
    """Iterate over the lines of a caption file that are not blank."""
    with open_text(location) as stream:
        for number, line in enumerate(stream, start=1):
            _check_no_nul(location, line, number)
            if line.strip():
                yield line


def iter_rows(location: str, delimiter: str, quoted: bool) -> Iterator[tuple[int, list[str]]]:
    """Iterate over the rows of a table that are not blank.

    Args:
        location: Path or URL.
        delimiter: Separator of the columns.
        quoted: Whether quoted cells may contain separators and line breaks, as in CSV.

    Yields:
        The line number of the end of the row, from 1, and the cells of the row.

    Raises:
        InputError: A quoted cell is malformed, or the file cannot be read.
    """
    if not quoted:
        with open_text(location) as stream:
            for number, line in enumerate(stream, start=1):
                _check_no_nul(location, line, number)
                if line.strip():
                    yield number, [_unquote(cell) for cell in line.rstrip("\r\n").split(delimiter)]
        return
    with open_text(location, newline="") as stream:
        reader = csv.reader(stream, delimiter=delimiter, strict=True)
        try:
            for row in reader:
                _check_no_nul(location, "".join(row), reader.line_num)
                if any(cell.strip() for cell in row):
                    yield reader.line_num, row
        except csv.Error as error:
            raise InputError(
                f"{location}: found no readable row on line {reader.line_num} ({error}), expected a table in which "
                "quotation marks within a quoted cell are doubled",
                code=ErrorCode.UNREADABLE,
            ) from error


def _unquote(cell: str) -> str:
    """Undo the quoting by which a CSV writer escapes a cell that contains quotation marks."""
    inside = cell[1:-1].replace('""', "")
    return (
        cell[1:-1].replace('""', '"')
        if cell[:1] == cell[-1:] == '"' and '""' in cell[1:-1] and '"' not in inside
        else cell
    )


def _check_no_nul(location: str, text: str, number: int) -> None:
    if "\0" in text:
        raise InputError(
            f"{location}: found a NUL byte on line {number}, expected text in UTF-8", code=ErrorCode.UNREADABLE
        )
