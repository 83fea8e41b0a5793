"""YAML documents, read strictly."""

import io
import re
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

from schemas.errors import InputError, one_line

# A recipe is written by hand: what is larger is none, or means to keep us busy.
MOST_BYTES, MOST_VALUES = 1_000_000, 100_000


def dump_yaml(content: dict[str, Any]) -> str:
    """Format as YAML."""
    stream = io.StringIO()
    yaml_writer().dump(content, stream)
    return stream.getvalue()


def yaml_writer() -> YAML:
    yaml = YAML(typ="safe", pure=True)  # pure: YAML 1.2, where 1e-5 is a number
    yaml.default_flow_style = False
    yaml.width = MOST_BYTES  # a sentence stays on its line
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    return yaml


_ODD = r"[ \t]*([\u00a0\u2000-\u200b\u202f\u3000])"  # what looks like a space


_ODD_IN_LINE = re.compile(r"^(?:[^\n#\"']*:)?" + _ODD, flags=re.MULTILINE)  # before any comment or quotation mark


_ODD_IN_SCALAR = re.compile(r"(?:[\w.]+:)?" + _ODD)  # at its beginning, or behind a field's name and its colon


_DEEP = re.compile(r"(?:[\[{]\s*){50}")


def parse_yaml(text: str, refusal: str) -> Any:
    """The plain values that a YAML text means; nothing in it makes an object of ours or takes longer than its size.

    Raises:
        InputError: it cannot be read; `refusal` is how the sentence begins.
    """
    if _DEEP.search(text):  # the parser would take seconds to find out
        raise InputError(f"{refusal} (it is nested too deep), expected a recipe's few levels")
    try:
        yaml = yaml_writer()
        node = yaml.compose(text)
        _count(node, {}, refusal)
        return None if node is None else yaml.constructor.construct_document(node)
    except InputError:
        raise
    except RecursionError as error:
        raise InputError(f"{refusal} (it is nested too deep), expected a recipe's few levels") from error
    except MarkedYAMLError as error:
        if odd := _ODD_IN_LINE.search(text):
            line, column = text.count("\n", 0, odd.start(1)) + 1, odd.start(1) - text.rfind("\n", 0, odd.start(1))
            raise InputError(f"{refusal} ({_odd(line, column, odd[1])})") from error
        raise InputError(f"{refusal} ({_where_and_what(error)})") from error
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise InputError(f"{refusal} (line {line} has a character that YAML does not allow)") from error
    except Exception as error:  # a value that its type does not have: the 32nd of a month, a number of 10,000 digits
        raise InputError(f"{refusal} ({one_line(error)})") from error


def _count(node: Node | None, known: dict[int, int], refusal: str) -> int:
    """How many values a node means with its aliases written out, which multiply."""
    if node is None:
        return 0
    line = f"line {node.start_mark.line + 1}"
    if id(node) in known:
        if known[id(node)] < 0:
            raise InputError(f"{refusal} (what is at {line} is part of itself)")
        return known[id(node)]
    known[id(node)] = -1
    if isinstance(node, ScalarNode):
        if not node.style and (odd := _ODD_IN_SCALAR.match(node.value)):
            place = node.start_mark
            raise InputError(f"{refusal} ({_odd(place.line + 1, place.column + 1 + odd.start(1), odd[1])})")
        _refuse_broken_characters(node.value, f"{refusal} ({line} has half a character)")
    pairs = node.value if isinstance(node, MappingNode) else ()
    items = node.value if isinstance(node, SequenceNode) else (part for pair in pairs for part in pair)
    values = 1 + sum(_count(item, known, refusal) for item in items)
    if values > MOST_VALUES:
        raise InputError(f"{refusal} ({line} means more than {MOST_VALUES} values), expected a recipe's")
    if isinstance(node, MappingNode) and node.flow_style:
        _refuse_slips(node, refusal)
    known[id(node)] = values
    return values


def _odd(line: int, column: int, sign: str) -> str:
    return (
        f"line {line}, column {column}: found the character U+{ord(sign):04X}, which looks like a space; expected a "
        "plain one"
    )


def _refuse_slips(node: MappingNode, refusal: str) -> None:
    """Refuse what YAML takes for a field without a value in `{…}`: a decimal comma, a colon without a space."""
    before = ""
    for key, value in node.value:
        if isinstance(key, ScalarNode) and isinstance(value, ScalarNode) and value.value == "" and not value.style:
            if key.value.isdecimal() and before.lstrip("+-").isdecimal():
                raise InputError(
                    f"{refusal} ({mark_text(key.start_mark)}: found the number {before},{key.value}, expected a decimal "
                    f"point, {before}.{key.value}, or no comma, {before}{key.value})"
                )
            if ":" in key.value:
                raise InputError(
                    f"{refusal} ({mark_text(key.start_mark)}: found '{key.value}', expected a space behind the colon)"
                )
        before = value.value if isinstance(value, ScalarNode) else ""


def _refuse_broken_characters(text: str, refusal: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # "\ud800": one half of a pair
        raise InputError(refusal) from error


# What to do about a problem, by words of the parser's. The first that fits is said.
_ADVICE = (
    ("'\\t'", "spaces: YAML takes no tabs"),
    ("cannot start any token", "quotes around a value that begins so"),
    ("escape character", "single quotes around a text with backslashes"),
    ("quoted scalar", "a closing quote"),
    ("alias", "quotes around a value that begins with *"),
    ("anchor", "quotes around a value that begins with &"),
    ("tag", "quotes around a value that begins with !"),
    (
        "flow sequence",
        "commas between values, a closing ], and quotes around a value with any of , : [ ] { } in it",
    ),
    ("flow mapping", "commas between fields, a closing }, and quotes around a value with any of , : [ ] { } in it"),
    ("duplicate key", "every field once"),
    ("another document", "one document, without a line of ---"),
    ("unhashable", "a field's name"),
    ("expected ':'", "a colon and a space behind a field's name"),
    (
        "mapping values are not allowed",
        "a space behind every colon, the fields of a section indented alike, and quotes around a value with ': ' in it",
    ),
    (
        "expected <block end>",
        "the fields of a section indented alike, and quotes around a value that begins with [ or { but does not end so",
    ),
)


def _where_and_what(error: MarkedYAMLError) -> str:
    """Where something is wrong, what, and what to do: not where the parser noticed it, if it began lines before."""
    context, problem = str(error.context or ""), str(error.problem or error.context)
    began = context.startswith("while scanning") or "flow" in context
    mark = (error.context_mark if began else None) or error.problem_mark or error.context_mark
    said = one_line(f"{problem} {context}" if began else problem)
    advice = next((f"; expected {each}" for words, each in _ADVICE if words in said), "")
    return f"{mark_text(mark)}: {said}{advice}" if mark else f"{said}{advice}"


def mark_text(mark: Any) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}"
