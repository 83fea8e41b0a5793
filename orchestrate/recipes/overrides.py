"""Overrides of a recipe's fields from the command line: `--set a.b.c=value`."""

from collections.abc import Mapping
from typing import Any

from orchestrate.recipes.yaml_loader import parse_yaml
from schemas.base import ShorthandModel
from schemas.data import ClassIncremental, Reference, Task
from schemas.errors import ErrorCode, InputError
from schemas.experiment import Model
from schemas.method import Method

# Sections that a recipe may abbreviate to a string. Before a field of such a section is set, the string is replaced by
# a mapping.
SHORTHAND_SECTIONS: Mapping[str, type[ShorthandModel]] = {
    "method": Method,
    "model": Model,
    "reference": Reference,
    "tasks": Task,
    "class_incremental": ClassIncremental,
}


def apply_override(content: dict[str, Any], override: str) -> None:
    """Apply an override to a recipe's content.

    Args:
        content: The recipe's fields; changed in place.
        override: The override, `a.b.c=value`. The value is YAML.

    Raises:
        InputError: The override cannot be parsed, or its path does not exist.
    """
    path, equals, value = override.partition("=")
    if not equals or not path:
        raise InputError(f"--set {override}: expected a.b.c=value", code=ErrorCode.INVALID_VALUE, field="--set")
    value = parse_yaml(value, f"--set {override}: found no readable value", field=path)
    set_field(content, path, value, f"--set {path}")


def set_field(content: dict[str, Any], path: str, value: Any, source: str) -> None:
    """Set the field at a dotted path, and create the sections of the path that do not exist.

    Args:
        content: The recipe's fields; changed in place.
        path: The dotted path. Numbers in it are indices of lists.
        value: The new value.
        source: The beginning of error messages: the option or the recipe's field that contains the path. It ends with
            the path.

    Raises:
        InputError: A part of the path is neither a section nor a valid index.
    """
    *parents, last = path.split(".")
    node: Any = content
    for depth, key in enumerate(parents, start=1):
        node = _child(node, key, source.removesuffix(path), ".".join(parents[:depth]))
    if isinstance(node, list):
        node[_list_index(node, last, source, path)] = value
    else:
        node[last] = value


def _child(node: Any, key: str, source: str, path: str) -> Any:
    """Return the section or list under a key. Create a missing section; replace an abbreviated one by a mapping."""
    index: Any = _list_index(node, key, source + path, path) if isinstance(node, list) else key
    child = node[index] if isinstance(node, list) else node.get(index)
    section = SHORTHAND_SECTIONS.get("tasks" if isinstance(node, list) else key)
    if child is None:
        child = {}
    elif isinstance(child, str) and section is not None:
        child = {section.main_field: child}
    elif not isinstance(child, dict | list):
        raise InputError(
            f"{source}{path}: found the value {child!r}, expected a section with fields",
            code=ErrorCode.INVALID_VALUE,
            field=path,
        )
    node[index] = child
    return child


def _list_index(node: list[Any], key: str, source: str, path: str) -> int:
    if key not in map(str, range(len(node))):
        expected = f"0 to {len(node) - 1}" if node else "a list that is not empty"
        raise InputError(
            f"{source}: found position '{key}', expected {expected}", code=ErrorCode.UNKNOWN_NAME, field=path
        )
    return int(key)
