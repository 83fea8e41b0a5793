"""Strict YAML: parse recipe files and option values into plain Python values, and write YAML."""

import io
import re
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

from schemas.errors import ErrorCode, InputError, one_line

# Limits of a document. Recipes are written by hand, so a larger document is not a recipe or is meant to exhaust memory.
MAX_BYTES, MAX_VALUES = 1_000_000, 100_000

_ODD_SPACE = r"[ \t]*([\u00a0\u2000-\u200b\u202f\u3000])"  # characters that look like a space
_ODD_SPACE_IN_LINE = re.compile(r"^(?:[^\n#\"']*:)?" + _ODD_SPACE, flags=re.MULTILINE)  # before a comment or a quote
_ODD_SPACE_IN_SCALAR = re.compile(r"(?:[\w.]+:)?" + _ODD_SPACE)  # at the start, or after a field's name and colon
_DEEP_NESTING = re.compile(r"(?:[\[{]\s*){50}")
_EXPECTED_LEVELS = ", expected only a few levels"


def dump_yaml(content: dict[str, Any]) -> str:
    """Format a recipe's content as YAML."""
    stream = io.StringIO()
    safe_yaml().dump(content, stream)
    return stream.getvalue()


def safe_yaml() -> YAML:
    """Return a YAML reader and writer that creates only plain values."""
    yaml = YAML(typ="safe", pure=True)  # pure: YAML 1.2, where 1e-5 is a number
    yaml.default_flow_style = False
    yaml.width = MAX_BYTES  # do not wrap long texts
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    return yaml


def read_yaml(file: Path) -> dict[str, Any]:
    """Read a recipe's file, without validation against a schema.

    Args:
        file: The recipe.

    Returns:
        The fields at the top level.

    Raises:
        InputError: The file does not exist, cannot be read, is too large, or is not a YAML mapping.
    """
    try:
        with file.open("rb") as stream:
            encoded = stream.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise InputError(f"{file}: found no such file, expected a recipe (YAML)", code=ErrorCode.NOT_FOUND) from error
    except (OSError, ValueError) as error:  # ValueError: the file system does not accept the name
        raise InputError(
            f"{file}: cannot be read ({error}), expected a recipe (YAML)", code=ErrorCode.UNREADABLE
        ) from error
    if len(encoded) > MAX_BYTES:
        raise InputError(
            f"{file}: found more than {MAX_BYTES} bytes, expected a recipe (YAML)", code=ErrorCode.UNREADABLE
        )
    try:
        text = encoded.decode()
    except UnicodeDecodeError as error:
        line = encoded.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{file}: found no readable YAML (line {line} has a byte that is not valid UTF-8), expected UTF-8",
            code=ErrorCode.UNREADABLE,
        ) from error
    content = parse_yaml(text, f"{file}: found no readable YAML")
    if not isinstance(content, dict):
        kind = {type(None): "nothing", str: "a text", list: "a list"}.get(type(content), "a single value")
        code = ErrorCode.EMPTY if content is None else ErrorCode.INVALID_VALUE
        raise InputError(f"{file}: found {kind}, expected fields such as 'model:' and 'tasks:'", code=code)
    return content


class _YamlError(Exception):
    """A YAML document cannot be parsed.

    Attributes:
        reason: The reason, which the error message contains in brackets.
        expected: What was expected instead; appended to the error message after the reason.
    """

    def __init__(self, reason: str, expected: str = "") -> None:
        super().__init__(reason)
        self.reason, self.expected = reason, expected


def parse_yaml(text: str, message: str, field: str | None = None) -> Any:
    """Parse a YAML document into plain values.

    Tags that create objects are errors, and so are aliases that expand to too many values.

    Args:
        text: The document.
        message: The beginning of the error message.
        field: The recipe's field whose value is the document, for `InputError.field`; `None` for a complete recipe.

    Returns:
        A dict, list, text, number, date or None.

    Raises:
        InputError: The document cannot be parsed, is nested too deeply, or is too large.
    """
    try:
        return _load(text)
    except _YamlError as error:
        raise InputError(
            f"{message} ({error.reason}){error.expected}", code=ErrorCode.UNREADABLE, field=field
        ) from error


def _load(text: str) -> Any:
    if _DEEP_NESTING.search(text):  # the parser would need seconds to reach its recursion limit
        raise _YamlError("it is nested too deeply", _EXPECTED_LEVELS)
    try:
        yaml = safe_yaml()
        node = yaml.compose(text)
        _check_and_count(node, {})
        return None if node is None else yaml.constructor.construct_document(node)
    except _YamlError:
        raise
    except RecursionError as error:
        raise _YamlError("it is nested too deeply", _EXPECTED_LEVELS) from error
    except MarkedYAMLError as error:
        if odd := _ODD_SPACE_IN_LINE.search(text):
            line, column = text.count("\n", 0, odd.start(1)) + 1, odd.start(1) - text.rfind("\n", 0, odd.start(1))
            raise _YamlError(_odd_space_message(line, column, odd[1])) from error
        raise _YamlError(_explain_parser_error(error)) from error
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise _YamlError(f"line {line} has a character that YAML does not allow") from error
    except Exception as error:  # an impossible value, such as the 32nd of a month or a number of 10,000 digits
        raise _YamlError(one_line(error)) from error


def _check_and_count(node: Node | None, counts: dict[int, int]) -> int:
    """Count the values of a node with all aliases expanded, and check its scalars and mappings.

    Args:
        node: The node; `None` for an empty document.
        counts: The number of values of each node that was visited before, by `id(node)`; -1 for a node that is being
            counted.

    Returns:
        The number of values.

    Raises:
        _YamlError: The node is too large, contains itself, or contains a likely typing error.
    """
    if node is None:
        return 0
    line = f"line {node.start_mark.line + 1}"
    if id(node) in counts:
        if counts[id(node)] < 0:
            raise _YamlError(f"the value at {line} contains itself")
        return counts[id(node)]
    counts[id(node)] = -1
    if isinstance(node, ScalarNode):
        _check_scalar(node, line)
    pairs = node.value if isinstance(node, MappingNode) else ()
    items = node.value if isinstance(node, SequenceNode) else (part for pair in pairs for part in pair)
    count = 1 + sum(_check_and_count(item, counts) for item in items)
    if count > MAX_VALUES:
        raise _YamlError(f"{line} expands to more than {MAX_VALUES} values", ", expected fewer")
    if isinstance(node, MappingNode) and node.flow_style:
        _check_flow_mapping(node)
    counts[id(node)] = count
    return count


def _check_scalar(node: ScalarNode, line: str) -> None:
    """Raise `_YamlError` if a scalar starts with a character that looks like a space, or has half a surrogate pair."""
    if not node.style and (odd := _ODD_SPACE_IN_SCALAR.match(node.value)):
        mark = node.start_mark
        raise _YamlError(_odd_space_message(mark.line + 1, mark.column + 1 + odd.start(1), odd[1]))
    try:
        node.value.encode()
    except UnicodeEncodeError as error:
        raise _YamlError(f"{line} has an incomplete character, half of a surrogate pair") from error


def _odd_space_message(line: int, column: int, character: str) -> str:
    return (
        f"line {line}, column {column}: found the character U+{ord(character):04X}, which looks like a space; expected "
        "a plain space"
    )


def _check_flow_mapping(node: MappingNode) -> None:
    """Raise `_YamlError` if `{…}` has a decimal comma, or a colon without a space: YAML reads both as extra fields."""
    previous = ""
    for key, value in node.value:
        if isinstance(key, ScalarNode) and isinstance(value, ScalarNode) and value.value == "" and not value.style:
            if key.value.isdecimal() and previous.lstrip("+-").isdecimal():
                raise _YamlError(
                    f"{format_mark(key.start_mark)}: found the number {previous},{key.value}, expected a decimal "
                    f"point, {previous}.{key.value}, or no comma, {previous}{key.value}"
                )
            if ":" in key.value:
                raise _YamlError(
                    f"{format_mark(key.start_mark)}: found '{key.value}', expected a space after the colon"
                )
        previous = value.value if isinstance(value, ScalarNode) else ""


# The advice for each kind of parser error. A kind is identified by a part of its text; the first match is used.
_ADVICE = (
    ("'\\t'", "spaces, because YAML does not allow tabs"),
    ("cannot start any token", "quotes around a value that begins with this character"),
    ("escape character", "single quotes around a text with backslashes"),
    ("quoted scalar", "a closing quote"),
    ("alias", "quotes around a value that begins with *"),
    ("anchor", "quotes around a value that begins with &"),
    ("tag", "quotes around a value that begins with !"),
    ("flow sequence", "commas between values, a closing ], and quotes around a value that contains any of , : [ ] { }"),
    ("flow mapping", "commas between fields, a closing }, and quotes around a value that contains any of , : [ ] { }"),
    ("duplicate key", "every field only once"),
    ("another document", "one document, without the line ---"),
    ("unhashable", "a field's name"),
    ("expected ':'", "a colon and a space after a field's name"),
    (
        "mapping values are not allowed",
        "a space after every colon, the same indentation for all fields of a section, and quotes around a value that "
        "contains ': '",
    ),
    (
        "expected <block end>",
        "the same indentation for all fields of a section, and quotes around a value that begins with [ or { and does "
        "not end with ] or }",
    ),
)


def _explain_parser_error(error: MarkedYAMLError) -> str:
    """Format a parser error's position, problem and advice. The position is the start of the invalid construct."""
    context, problem = str(error.context or ""), str(error.problem or error.context)
    starts_earlier = context.startswith("while scanning") or "flow" in context
    mark = (error.context_mark if starts_earlier else None) or error.problem_mark or error.context_mark
    message = one_line(f"{problem} {context}" if starts_earlier else problem)
    message += next((f"; expected {advice}" for part, advice in _ADVICE if part in message), "")
    return f"{format_mark(mark)}: {message}" if mark else message


def format_mark(mark: Any) -> str:
    """Format a parser's position, counted from 1."""
    return f"line {mark.line + 1}, column {mark.column + 1}"
