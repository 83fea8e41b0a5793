"""Captions in JSON: COCO annotations, lists, mappings of images to captions, and JSON lines."""

import itertools
import json
from collections.abc import Iterator
from typing import Any

from schemas.errors import ErrorCode, InputError
from zscl.data.captions.columns import CAPTION_NAMES, CaptionSource, normalize_name
from zscl.data.captions.text_file import CAPTION_FORMATS, iter_lines, open_text

SAMPLE_SIZE = 1_000  # records from which the key is detected


def read_json(source: CaptionSource, is_lines: bool) -> tuple[str, Iterator[str | None]]:
    """Read the captions of a JSON file.

    Args:
        source: The file, and the caption key if the user has chosen it.
        is_lines: Whether the file has one JSON value on each line (JSON lines), instead of a single value.

    Returns:
        A description of the records and the caption key for the user, and the captions.
    """
    records, origin = (_iter_json_lines(source.location), "JSON lines") if is_lines else _read_records(source)
    sample = list(itertools.islice(records, SAMPLE_SIZE))
    keys = list(dict.fromkeys(key for record in sample if isinstance(record, dict) for key in record))
    key = source.find_column(keys, "keys") if keys else None
    texts = list(itertools.chain.from_iterable(_iter_texts(source, record, key) for record in sample))
    origin = f"{origin}, key {key!r}" if key else origin
    source.check_is_text([text for text in texts if text is not None], origin)
    rest = itertools.chain.from_iterable(_iter_texts(source, record, key) for record in records)
    return origin, itertools.chain(texts, rest)


def parse_record(line: str) -> Any:
    """Parse a JSON object, list or string. Return `None` for other values and for invalid JSON."""
    if not line.lstrip().startswith(("{", "[", '"')):
        return None
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict | list | str) else None


def _read_records(source: CaptionSource) -> tuple[Iterator[Any], str]:
    """Read a file that is a single JSON value. Return its records and a description of where in the value they are."""
    with open_text(source.location) as stream:
        try:
            value = json.loads(stream.read())
        except (ValueError, RecursionError) as error:
            if isinstance(error, UnicodeDecodeError):
                raise
            raise InputError(
                f"{source.location}: found no readable JSON ({error}), expected {CAPTION_FORMATS}",
                code=ErrorCode.UNREADABLE,
            ) from error
    if isinstance(value, list):
        return iter(value), "JSON list"
    if not isinstance(value, dict):
        raise InputError(
            f"{source.location}: found {type(value).__name__} in JSON, expected a list or an object",
            code=ErrorCode.UNREADABLE,
        )
    if _has_caption_key(source, value):
        return iter([value]), "JSON object"
    lists = [
        key
        for key, records in value.items()
        if isinstance(records, list) and any(_has_caption_key(source, record) for record in records[:SAMPLE_SIZE])
    ]
    if len(lists) == 1:
        return iter(value[lists[0]]), f"JSON list {lists[0]!r}"
    # A mapping of images to captions.
    texts = [item for item in value.values() if isinstance(item, str | list) or _has_caption_key(source, item)]
    if not lists and value and len(texts) == len(value):
        return iter(texts), "values of a JSON object"
    raise InputError(
        f"{source.location}: found {len(lists)} lists of captions in JSON (keys: {', '.join(map(repr, value))}), "
        f"expected exactly one; {source.advice}",
        code=ErrorCode.MISSING_VALUE,
        field="--column",
    )


def _has_caption_key(source: CaptionSource, record: Any) -> bool:
    """Return whether a record is an object with the key that the user has chosen, or with a usual name for captions."""
    if not isinstance(record, dict):
        return False
    if source.column is not None:
        return source.column in record
    return any(normalize_name(key) in CAPTION_NAMES for key in record)


def _iter_json_lines(location: str) -> Iterator[Any]:
    for number, line in enumerate(iter_lines(location), start=1):
        record = parse_record(line)
        if record is None:
            raise InputError(
                f"{location}: found no JSON object on line {number}, expected one on each line",
                code=ErrorCode.UNREADABLE,
            )
        yield record


def _iter_texts(source: CaptionSource, record: Any, key: str | None) -> Iterator[str | None]:
    """Yield all captions of a record: a text, a list of records, or an object whose caption key is `key`."""
    match record:
        case None | str():
            yield record
        case list():
            for item in record:
                yield from _iter_texts(source, item, None)
        case dict():
            chosen = key or (
                source.column if source.column in record else source.find_column(list(record), "keys", CAPTION_NAMES)
            )
            yield from _iter_texts(source, record.get(chosen), None)
        case _:
            raise InputError(
                f"{source.location}: found {record!r} as a caption, expected text; {source.advice}",
                code=ErrorCode.INVALID_VALUE,
            )
