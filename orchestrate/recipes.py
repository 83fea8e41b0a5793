"""A recipe: one YAML file and a few overrides → an experiment."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from orchestrate.places import without_password
from schemas.base import Abbreviable, InputError, Strict, explain
from schemas.data import ClassIncremental, Reference, Task
from schemas.experiment import Experiment, Model
from schemas.method import Method
from zscl.files import write_text

# Sections that a recipe may abbreviate to a string; an override of one of their fields needs the long form.
ABBREVIABLE: Mapping[str, type[Abbreviable]] = {
    "method": Method,
    "model": Model,
    "reference": Reference,
    "tasks": Task,
    "class_incremental": ClassIncremental,
}
SchemaT = TypeVar("SchemaT", bound=Strict)


ALL = "all"


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
        return {"": parse(Experiment, {"name": file.stem, **read(file, overrides)}, file)}
    if table.keys() != {"base", "variants"} or not isinstance(table["variants"], dict):
        raise InputError(f"{file}: found the fields {', '.join(table)}, expected base and variants (a row each) alone")
    rows = {str(name): changes or {} for name, changes in table["variants"].items()}
    if variant != ALL and variant not in rows:
        given = f"--variant {variant}" if variant else f"{file}: found a table of variants"
        raise InputError(f"{given}, expected --variant {', '.join(rows)} or {ALL}")
    return {
        name: _vary(file, file.parent / str(table["base"]), name, changes, overrides)
        for name, changes in rows.items()
        if variant in (name, ALL)
    }


def _vary(file: Path, base: Path, name: str, changes: Any, overrides: Sequence[str]) -> Experiment:
    if not isinstance(changes, dict):
        raise InputError(f"{file}: variants.{name}: found {changes!r}, expected fields by dotted path")
    content = read(base)
    for path, value in changes.items():
        _set(content, str(path), value, f"{file}: variants.{name}: {path}")
    for override in overrides:
        _override(content, override)
    return parse(Experiment, {**content, "name": f"{file.stem}-{name}"}, file)


def read(file: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a recipe's YAML with its overrides (`a.b.c=value`), unchecked."""
    try:
        content = _yaml().load(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{file}: found no such file, expected a recipe (YAML)") from error
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        raise InputError(f"{file}: found no readable YAML ({_one_line(error)})") from error
    if not isinstance(content, dict):
        raise InputError(f"{file}: found {type(content).__name__}, expected fields such as 'model:' and 'tasks:'")
    for override in overrides:
        _override(content, override)
    return content


def parse(schema: type[SchemaT], content: dict[str, Any], file: Path) -> SchemaT:
    """Check a recipe's content against a schema; relative paths count from the current folder."""
    try:
        return schema.model_validate(content, context={"root": Path.cwd()})
    except ValidationError as error:
        raise InputError("\n".join(f"{file}: {line}" for line in explain(error).splitlines())) from error


def write_experiment(experiment: Experiment, file: Path) -> None:
    """Write the resolved recipe; `load_experiment` reads it back to the same experiment."""
    write_text(file, dump(shown(experiment)))


def shown(experiment: Experiment) -> dict[str, Any]:
    """Every field, as it may be written down: without the password of a tracking URI."""
    content = experiment.model_dump(mode="json")
    if experiment.class_incremental is not None:
        del content["tasks"]  # they follow from it
    if experiment.tracking.uri:
        content["tracking"]["uri"] = without_password(experiment.tracking.uri)
    return content


def dump(content: dict[str, Any]) -> str:
    """Format as YAML."""
    stream = io.StringIO()
    _yaml().dump(content, stream)
    return stream.getvalue()


def _yaml() -> YAML:
    yaml = YAML(typ="safe", pure=True)  # pure: YAML 1.2, where 1e-5 is a number
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    return yaml


def _override(content: dict[str, Any], override: str) -> None:
    path, equals, value = override.partition("=")
    if not equals or not path:
        raise InputError(f"--set {override}: expected a.b.c=value")
    try:
        parsed = _yaml().load(value)
    except YAMLError as error:
        raise InputError(f"--set {override}: found no readable value ({_one_line(error)})") from error
    _set(content, path, parsed, f"--set {path}")


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
    if not key.isdecimal() or int(key) >= len(node):
        raise InputError(f"{path}: found position '{key}', expected 0 to {len(node) - 1}")
    return int(key)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).partition("To suppress this check")[0].split())
