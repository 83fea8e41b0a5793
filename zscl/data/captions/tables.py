"""Captions in tables: TSV, CSV, and columns separated by semicolons or bars, with or without a header."""

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Sequence

from schemas.errors import ErrorCode, InputError
from zscl.data.captions.columns import (
    CAPTION_NAMES,
    NEVER_CAPTIONS,
    OTHER_NAMES,
    CaptionSource,
    classify_value,
    classify_values,
    normalize_name,
)
from zscl.data.captions.text_file import iter_rows

DELIMITERS = {"\t": "tab", ",": "comma", ";": "semicolon", "|": "bar"}
SAMPLE_SIZE = 1_000  # rows from which the columns are detected


def detect_delimiter(lines: Sequence[str], name: str, column: str | None) -> str | None:
    """Detect the delimiter of the columns of a text file.

    Args:
        lines: The first lines of the file that are not blank.
        name: The file's name in lower case.
        column: Name or number (from 1) of the caption column; `None`: it is not known.

    Returns:
        The delimiter; `None` if the file has one caption per line.
    """
    tabs = sum("\t" in line for line in lines) / len(lines)
    if tabs > 0.5 or (tabs and name.endswith((".tsv", ".tab"))):
        return "\t"
    for delimiter in (",", ";", "|"):
        cells = [normalize_name(cell) for cell in lines[0].split(delimiter)]
        in_nearly_all = sum(delimiter in line for line in lines) > 0.9 * len(lines)
        if len(cells) == 1 or not (in_nearly_all or name.endswith(".csv")):
            continue
        header_names = CAPTION_NAMES if column is None or column.isdecimal() else {normalize_name(column)}
        if header_names & set(cells) and all(re.fullmatch(r"\w*", cell) for cell in cells):
            return delimiter
        # Without a header, a table has URLs or file names in its first or last column.
        if any(
            classify_values([line.split(delimiter)[end] for line in lines]) in NEVER_CAPTIONS[:2] for end in (0, -1)
        ):
            return delimiter
    if not name.endswith(".csv"):
        return None
    return max(",;|", key=lambda delimiter: lines[0].count(delimiter))


def read_table(source: CaptionSource, delimiter: str) -> tuple[str, Iterator[str | None]]:
    """Read the caption column of a table.

    Args:
        source: The file, and the caption column if the user has chosen it.
        delimiter: Separator of the columns.

    Returns:
        A description of the caption column and the format for the user, and the captions.
    """
    quoted = _is_quoted(source.location, delimiter)
    sample = [row for _, row in itertools.islice(iter_rows(source.location, delimiter, quoted), SAMPLE_SIZE)]
    has_header = _has_header(source, sample)
    names = [cell.strip() for cell in sample[0]] if has_header else []
    body = sample[1:] if has_header else sample
    width = len(names) or Counter(map(len, body)).most_common(1)[0][0]
    index = _find_column_index(source, names, body, width)
    origin = f"column {index + 1} of {width}" + (f", {names[index]!r}" if has_header else "")
    source.check_is_text([row[index] for row in body if len(row) > index], origin)
    rows = itertools.islice(iter_rows(source.location, delimiter, quoted), int(has_header), None)
    return f"{origin} ({DELIMITERS[delimiter]}-separated)", _iter_cells(source.location, rows, index, width)


def _is_quoted(location: str, delimiter: str) -> bool:
    """Return whether cells are quoted, as in CSV. Between tabs or bars, quotation marks may be plain text."""
    if delimiter in ",;":
        return True
    try:
        plain = {len(row) for _, row in itertools.islice(iter_rows(location, delimiter, quoted=False), SAMPLE_SIZE)}
        if len(plain) == 1:
            return False
        quoted = {len(row) for _, row in itertools.islice(iter_rows(location, delimiter, quoted=True), SAMPLE_SIZE)}
    except InputError:
        return False
    return len(quoted) == 1


def _has_header(source: CaptionSource, sample: Sequence[Sequence[str]]) -> bool:
    """Return whether the first row contains the names of the columns."""
    first, body = sample[0], sample[1:]
    names = {normalize_name(cell) for cell in first}
    is_named = source.column is not None and not source.column.isdecimal()
    if is_named or names & CAPTION_NAMES or names <= OTHER_NAMES:
        return True
    # A word above a column of URLs is a name.
    kinds = [classify_values([row[index] for row in body if len(row) > index]) for index in range(len(first))]
    return any(
        kind in NEVER_CAPTIONS and cell.strip() and classify_value(cell) != kind
        for cell, kind in zip(first, kinds, strict=True)
    )


def _find_column_index(source: CaptionSource, names: Sequence[str], body: Sequence[Sequence[str]], width: int) -> int:
    """Return the index of the caption column, which is found by its number, by its name, or as the only text column."""
    if source.column is not None and source.column.isdecimal() and source.column not in names:
        if not 1 <= int(source.column) <= width:
            raise InputError(
                f"--column {source.column}: found {width} columns in {source.location}, expected a number from 1 to "
                f"{width}",
                code=ErrorCode.INVALID_VALUE,
                field="--column",
            )
        return int(source.column) - 1
    if source.column is not None or any(normalize_name(name) in CAPTION_NAMES for name in names):
        return list(names).index(source.find_column(names, "columns"))
    columns = [[row[index] for row in body if len(row) > index and row[index].strip()] for index in range(width)]
    candidates = [index for index, cells in enumerate(columns) if cells and classify_values(cells) == "text"]
    if len(candidates) > 1:  # labels are single words, captions are not
        candidates = [
            index
            for index in candidates
            if sum(" " in cell.strip() for cell in columns[index]) > len(columns[index]) / 2
        ]
    if len(candidates) == 1:
        return candidates[0]
    shown = "; ".join(f"{index + 1}: {cells[0].strip()[:40]!r}" for index, cells in enumerate(columns) if cells)
    raise InputError(
        f"{source.location}: {len(candidates)} of {width} columns look like captions ({shown}), expected exactly one; "
        f"{source.advice}",
        code=ErrorCode.MISSING_VALUE,
        field="--column",
    )


def _iter_cells(location: str, rows: Iterator[tuple[int, list[str]]], index: int, width: int) -> Iterator[str | None]:
    """Yield the cells of column `index`, and check that each row has `width` columns."""
    for number, row in rows:
        if len(row) <= index or any(cell.strip() for cell in row[width:]):
            raise InputError(
                f"{location}: found {len(row)} columns on line {number}, expected {width} as in other lines; in "
                "CSV, put captions that contain a separator in quotes",
                code=ErrorCode.UNREADABLE,
            )
        yield row[index]
