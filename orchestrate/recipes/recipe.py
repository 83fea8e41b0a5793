"""A recipe: one YAML file and a few overrides → an experiment."""

import io
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

from schemas.base import Abbreviable, Strict, explain
from schemas.data import ClassIncremental, Reference, Task
from schemas.errors import InputError, command, one_line
from schemas.experiment import LONGEST_NAME, Experiment, Model
from schemas.method import Method
from schemas.redaction import masked
from schemas.search import Search
from zscl.runtime.atomic_io import write_text

# Sections that a recipe may abbreviate to a string; an override of one of their fields needs the long form.
ABBREVIABLE: Mapping[str, type[Abbreviable]] = {
    "method": Method,
    "model": Model,
    "reference": Reference,
    "tasks": Task,
    "class_incremental": ClassIncremental,
}


class Searched(Strict):
    """What a search's recipe has beside its experiment."""

    search: Search


SchemaT = TypeVar("SchemaT", bound=Strict)

ALL = "all"
_VARIANT = re.compile(r"[A-Za-z0-9_.-]*[A-Za-z0-9][A-Za-z0-9_.-]*")
# A recipe is written by hand: what is larger is none, or means to keep us busy.
MOST_BYTES, MOST_VALUES = 1_000_000, 100_000


def load_experiment(file: Path, overrides: Sequence[str] = (), variant: str | None = None) -> Experiment:
    """Read a recipe. It is named after its file unless it names itself.

    Raises:
        InputError: the file or an override cannot be read, the recipe is refused, or it has no such variant.
    """
    [experiment] = load_variants(file, overrides, variant).values()
    return experiment


def load_variants(file: Path, overrides: Sequence[str] = (), variant: str | None = None) -> dict[str, Experiment]:
    """Read a recipe that may be a table of variants. Returns the experiments wanted, by variant; "" where it has none.

    A table names the recipe it varies (`base`) and has, under `variants`, for each of its rows the fields that differ,
    by dotted path. Overrides come last.

    Raises:
        InputError: as of `load_experiment`.
    """
    table = read(file)
    if "variants" not in table:
        if variant is not None:
            raise InputError(f"--variant {variant}: found no variants in {file}, expected a recipe that has some")
        for override in overrides:
            _override(table, override)
        if "search" in table:
            raise InputError(
                f"{file}: found a search, expected a run's recipe; to search: {command('zscl', 'search', file)}"
            )
        if "base" in table:
            raise InputError(f"{file}: found base alone, expected variants beside it, a row each")
        return {"": parse(Experiment, {"name": name_of(file), **table}, file, overrides=overrides)}
    if table.keys() != {"base", "variants"} or not isinstance(table["variants"], dict):
        raise InputError(
            f"{file}: found the fields {', '.join(map(str, table))}, expected base and variants (a row each) alone"
        )
    rows = {str(name): changes or {} for name, changes in table["variants"].items()}
    if not rows:
        raise InputError(f"{file}: variants: found none, expected a row each")
    for name in rows:
        if not _VARIANT.fullmatch(name):
            raise InputError(
                f"{file}: variants: found the name {name!r}, expected nothing but letters, digits and any of _.-: "
                "folders are named after it"
            )
    if variant != ALL and variant not in rows:
        given = f"--variant {variant}" if variant else f"{file}: found a table of variants"
        raise InputError(f"{given}, expected --variant {', '.join(rows)} or {ALL}")
    return {
        name: _vary(file, file.parent / str(table["base"]), name, changes, overrides)
        for name, changes in rows.items()
        if variant in (name, ALL)
    }


def name_of(file: Path, ending: str = "") -> str:
    """Name an experiment after its recipe's file, with the characters and the length that a name may have.

    Args:
        file: The recipe.
        ending: Of the name. The part before it is shortened where both together are too long.
    """
    plain = unicodedata.normalize("NFKD", file.stem).encode("ascii", "ignore").decode()
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", plain).strip("-")
    return (name[: max(LONGEST_NAME - len(ending), 0)] or "recipe") + ending


def _vary(file: Path, base: Path, name: str, changes: Any, overrides: Sequence[str]) -> Experiment:
    if not isinstance(changes, dict):
        raise InputError(f"{file}: variants.{name}: found {changes!r}, expected fields by dotted path")
    try:
        content = read(base)
    except InputError as error:
        raise InputError(f"{file}: base: {error}") from error
    for path, value in changes.items():
        _set(content, str(path), value, f"{file}: variants.{name}: {path}")
    for override in overrides:
        _override(content, override)
    return parse(Experiment, {**content, "name": name_of(file, f"-{name}")}, file, overrides=overrides)


def load_search(file: Path, overrides: Sequence[str] = ()) -> tuple[Search, dict[str, Any]]:
    """Read a search: the section `search`, and the experiment that it varies, beside it or named as `base`.

    Overrides of `search.…` are of the section, all others of the experiment.

    Returns the section, and the experiment's content, unchecked.

    Raises:
        InputError: the file, its base or an override cannot be read, or the section is refused.
    """
    content = read(file)
    section = content.pop("search", None)
    if not isinstance(section, dict):
        raise InputError(f"{file}: found no section 'search', expected one with domains and objectives")
    if "base" in content:
        if content.keys() != {"base"}:
            raise InputError(
                f"{file}: found the fields {', '.join(map(str, content))} beside search, expected base alone, or a "
                "whole experiment"
            )
        base = file.parent / str(content["base"])
        try:
            content = read(base)
        except InputError as error:
            raise InputError(f"{file}: base: {error}") from error
    searched = {"search": section}
    for override in overrides:
        _override(searched if override.startswith("search.") else content, override)
    section["root"] = str(Path.cwd() / str(section.get("root", "")))
    named = {**content, "name": content.get("name") or name_of(file)}
    return parse(Searched, searched, file, overrides=overrides).search, named


def at(
    search: Search,
    content: Mapping[str, Any],
    values: Mapping[str, Any],
    file: Path,
    judged_on: Literal["held_out", "test"] | None = "held_out",
) -> Experiment:
    """The experiment of a search at some values.

    Args:
        search: how much is held out, and what paths count from.
        content: of the experiment that is varied.
        values: by dotted path.
        file: the search's, for what is refused.
        judged_on: `None`: nothing is held out, it is trained on everything and judged on the test images.

    Raises:
        InputError: the values make no experiment.
    """
    varied = deepcopy(dict(content))
    for path, value in values.items():
        _set(varied, path, value, f"{file}: search.domains.{path}")
    if judged_on is not None:
        held_out = {"share": search.validation_share, "seed": search.seed, "judged_on": judged_on}
        _set(varied, "evaluation.held_out", held_out, "evaluation.held_out")
    try:
        root = None if search.root is None else Path(search.root)
        return parse(Experiment, varied, file, root, as_written=not values)
    except InputError as error:
        if not values:
            raise
        raise InputError("\n".join(f"{line} ({_written(values)})" for line in str(error).splitlines())) from error


def _written(values: Mapping[str, Any]) -> str:
    return ", ".join(f"search.domains.{path} at {json.dumps(value)}" for path, value in values.items())


def write_search(search: Search, content: Mapping[str, Any], file: Path) -> None:
    """Write a search with its experiment, as `load_search` reads it."""
    write_text(file, dump(masked({**content, "search": search.model_dump(mode="json", exclude_none=True)})))


def read(file: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a recipe's YAML with its overrides (`a.b.c=value`), unchecked."""
    try:
        with file.open("rb") as stream:
            encoded = stream.read(MOST_BYTES + 1)
    except FileNotFoundError as error:
        raise InputError(f"{file}: found no such file, expected a recipe (YAML)") from error
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise InputError(f"{file}: cannot be read ({error}), expected a recipe (YAML)") from error
    if len(encoded) > MOST_BYTES:
        raise InputError(f"{file}: found more than {MOST_BYTES} bytes, expected a recipe (YAML)")
    try:
        text = encoded.decode()
    except UnicodeDecodeError as error:
        line = encoded.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{file}: found no readable YAML (line {line} has a byte that is no UTF-8), expected UTF-8"
        ) from error
    content = _parsed(text, f"{file}: found no readable YAML")
    if not isinstance(content, dict):
        found = {type(None): "nothing", str: "a text", list: "a list"}.get(type(content), "a single value")
        raise InputError(f"{file}: found {found}, expected fields such as 'model:' and 'tasks:'")
    for override in overrides:
        _override(content, override)
    return content


def parse(
    schema: type[SchemaT],
    content: dict[str, Any],
    file: Path,
    root: Path | None = None,
    overrides: Sequence[str] = (),
    as_written: bool = True,
) -> SchemaT:
    """Check a recipe's content against a schema; relative paths count from `root`, or the current folder.

    What is wrong is said to be an override's where one gave it, else the file's, with line and column where the content
    is `as_written` there.
    """
    try:
        return schema.model_validate(content, context={"root": root or Path.cwd()})
    except ValidationError as error:
        tree = _tree(file) if as_written else None
        lines = [
            f"{override}: {line}"
            if (override := _whose(line, overrides))
            else f"{file}: {line}{_line_and_column(tree, _field_of(line))}"
            for line in explain(error).splitlines()
        ]
        raise InputError("\n".join(lines)) from error


_UNKNOWN_FIELD = re.compile(r"unknown field '([^']*)'")


def _field_of(line: str) -> str:
    """The dotted path of the field that a sentence is about."""
    field, _, problem = line.partition(": ")
    if unknown := _UNKNOWN_FIELD.match(problem):
        field = unknown[1] if field == "the recipe" else f"{field}.{unknown[1]}"
    return field


def _tree(file: Path) -> Node | None:
    """What a recipe's file holds, with its places; nothing where it cannot be read, or is a table of variants."""
    try:
        tree = _yaml().compose(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, YAMLError):
        return None
    keys = {key.value for key, _ in tree.value} if isinstance(tree, MappingNode) else set()
    return tree if keys and "base" not in keys else None


def _line_and_column(tree: Node | None, field: str) -> str:
    """The end of a sentence about a field: where it stands, or the innermost section around it that is there."""
    mark = None
    for part in field.split("."):
        if isinstance(tree, MappingNode):
            found = next(((key, value) for key, value in tree.value if key.value == part), None)
        elif isinstance(tree, SequenceNode) and part.isdecimal() and int(part) < len(tree.value):
            found = (tree.value[int(part)],) * 2
        else:
            found = None
        if found is None:
            break
        mark, tree = found[0].start_mark, found[1]
    return "" if mark is None else f" ({_place(mark)})"


def _place(mark: Any) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}"


def _whose(line: str, overrides: Sequence[str]) -> str | None:
    """The override that a sentence about a field is about."""
    field = _field_of(line)
    for override in reversed(overrides):
        path = override.partition("=")[0]
        if f"{field}.".startswith(f"{path}."):
            return f"--set {override}"
    return None


def write_experiment(experiment: Experiment, file: Path) -> None:
    """Write the resolved recipe; `load_experiment` reads it back to the same experiment."""
    write_text(file, dump(shown(experiment)))


def shown(experiment: Experiment) -> dict[str, Any]:
    """Every field, as it may be written down: without the secrets that its URLs hold."""
    content = experiment.model_dump(mode="json")
    content["optimisation"]["warmup_steps"] = experiment.warmup_steps
    if experiment.class_incremental is not None:
        del content["tasks"]  # they follow from it
    return masked(content)


def dump(content: dict[str, Any]) -> str:
    """Format as YAML."""
    stream = io.StringIO()
    _yaml().dump(content, stream)
    return stream.getvalue()


def _yaml() -> YAML:
    yaml = YAML(typ="safe", pure=True)  # pure: YAML 1.2, where 1e-5 is a number
    yaml.default_flow_style = False
    yaml.width = MOST_BYTES  # a sentence stays on its line
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    return yaml


def _override(content: dict[str, Any], override: str) -> None:
    path, equals, value = override.partition("=")
    if not equals or not path:
        raise InputError(f"--set {override}: expected a.b.c=value")
    _set(content, path, _parsed(value, f"--set {override}: found no readable value"), f"--set {path}")


def _set(content: dict[str, Any], path: str, value: Any, shown: str) -> None:
    """Set the field at a dotted path; `shown` is what the user gave."""
    *parents, last = path.split(".")
    node: Any = content
    for depth, key in enumerate(parents):
        node = _child(node, key, shown.removesuffix(path) + ".".join(parents[: depth + 1]))
    if isinstance(node, list):
        node[_position(node, last, shown)] = value
    else:
        node[last] = value


def _child(node: Any, key: str, path: str) -> Any:
    """The node under a key, ready to take fields: absent becomes empty, a bare preset or path its long form."""
    place: Any = _position(node, key, path) if isinstance(node, list) else key
    found = node[place] if isinstance(node, list) else node.get(place)
    if found is None:
        found = {}
    elif isinstance(found, str):
        section = ABBREVIABLE.get("tasks" if isinstance(node, list) else key)
        if section is None:
            raise InputError(f"{path}: found the value {found!r}, expected a section to set a field of")
        found = {section.main_field: found}
    elif not isinstance(found, dict | list):
        raise InputError(f"{path}: found the value {found!r}, expected a section to set a field of")
    node[place] = found
    return found


def _position(node: list[Any], key: str, path: str) -> int:
    if key not in map(str, range(len(node))):
        expected = f"0 to {len(node) - 1}" if node else "a list with something in it"
        raise InputError(f"{path}: found position '{key}', expected {expected}")
    return int(key)


_ODD = r"[ \t]*([\u00a0\u2000-\u200b\u202f\u3000])"  # what looks like a space
_ODD_IN_LINE = re.compile(r"^(?:[^\n#\"']*:)?" + _ODD, flags=re.MULTILINE)  # before any comment or quotation mark
_ODD_IN_SCALAR = re.compile(r"(?:[\w.]+:)?" + _ODD)  # at its beginning, or behind a field's name and its colon
_DEEP = re.compile(r"(?:[\[{]\s*){50}")


def _parsed(text: str, refusal: str) -> Any:
    """The plain values that a YAML text means; nothing in it makes an object of ours or takes longer than its size.

    Raises:
        InputError: it cannot be read; `refusal` is how the sentence begins.
    """
    if _DEEP.search(text):  # the parser would take seconds to find out
        raise InputError(f"{refusal} (it is nested too deep), expected a recipe's few levels")
    try:
        yaml = _yaml()
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
                    f"{refusal} ({_place(key.start_mark)}: found the number {before},{key.value}, expected a decimal "
                    f"point, {before}.{key.value}, or no comma, {before}{key.value})"
                )
            if ":" in key.value:
                raise InputError(
                    f"{refusal} ({_place(key.start_mark)}: found '{key.value}', expected a space behind the colon)"
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
    return f"{_place(mark)}: {said}{advice}" if mark else f"{said}{advice}"
