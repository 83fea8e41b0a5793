"""Overrides of a recipe's fields from the command line."""

from collections.abc import Mapping
from typing import Any

from orchestrate.recipes.yaml_loader import parse_yaml
from schemas.base import ShorthandModel
from schemas.data import ClassIncremental, Reference, Task
from schemas.errors import InputError
from schemas.experiment import Model
from schemas.method import Method


def apply_override(content: dict[str, Any], override: str) -> None:
    path, equals, value = override.partition("=")
    if not equals or not path:
        raise InputError(f"--set {override}: expected a.b.c=value")
    set_field(content, path, parse_yaml(value, f"--set {override}: found no readable value"), f"--set {path}")


def set_field(content: dict[str, Any], path: str, value: Any, shown: str) -> None:
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


# Sections that a recipe may abbreviate to a string; an override of one of their fields needs the long form.
ABBREVIABLE: Mapping[str, type[ShorthandModel]] = {
    "method": Method,
    "model": Model,
    "reference": Reference,
    "tasks": Task,
    "class_incremental": ClassIncremental,
}
