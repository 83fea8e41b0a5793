"""A recipe: one YAML file and a few overrides → an experiment."""

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import ValidationError
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

from orchestrate.recipes.overrides import apply_override, set_field
from orchestrate.recipes.yaml_loader import MOST_BYTES, dump_yaml, mark_text, parse_yaml, yaml_writer
from schemas.base import StrictModel, explain
from schemas.errors import InputError, command
from schemas.experiment import LONGEST_NAME, Experiment
from schemas.redaction import masked
from schemas.search import Search
from zscl.runtime.atomic_io import write_text


class SearchRecipe(StrictModel):
    """What a search's recipe has beside its experiment."""

    search: Search


SchemaT = TypeVar("SchemaT", bound=StrictModel)

ALL = "all"
_VARIANT = re.compile(r"[A-Za-z0-9_.-]*[A-Za-z0-9][A-Za-z0-9_.-]*")


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
    table = read_recipe(file)
    if "variants" not in table:
        if variant is not None:
            raise InputError(f"--variant {variant}: found no variants in {file}, expected a recipe that has some")
        for override in overrides:
            apply_override(table, override)
        if "search" in table:
            raise InputError(
                f"{file}: found a search, expected a run's recipe; to search: {command('zscl', 'search', file)}"
            )
        if "base" in table:
            raise InputError(f"{file}: found base alone, expected variants beside it, a row each")
        return {"": parse_recipe(Experiment, {"name": recipe_name(file), **table}, file, overrides=overrides)}
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


def recipe_name(file: Path, ending: str = "") -> str:
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
        content = read_recipe(base)
    except InputError as error:
        raise InputError(f"{file}: base: {error}") from error
    for path, value in changes.items():
        set_field(content, str(path), value, f"{file}: variants.{name}: {path}")
    for override in overrides:
        apply_override(content, override)
    return parse_recipe(Experiment, {**content, "name": recipe_name(file, f"-{name}")}, file, overrides=overrides)


def load_search(file: Path, overrides: Sequence[str] = ()) -> tuple[Search, dict[str, Any]]:
    """Read a search: the section `search`, and the experiment that it varies, beside it or named as `base`.

    Overrides of `search.…` are of the section, all others of the experiment.

    Returns the section, and the experiment's content, unchecked.

    Raises:
        InputError: the file, its base or an override cannot be read, or the section is refused.
    """
    content = read_recipe(file)
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
            content = read_recipe(base)
        except InputError as error:
            raise InputError(f"{file}: base: {error}") from error
    searched = {"search": section}
    for override in overrides:
        apply_override(searched if override.startswith("search.") else content, override)
    section["root"] = str(Path.cwd() / str(section.get("root", "")))
    named = {**content, "name": content.get("name") or recipe_name(file)}
    return parse_recipe(SearchRecipe, searched, file, overrides=overrides).search, named


def with_values(
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
        set_field(varied, path, value, f"{file}: search.domains.{path}")
    if judged_on is not None:
        held_out = {"share": search.validation_share, "seed": search.seed, "judged_on": judged_on}
        set_field(varied, "evaluation.held_out", held_out, "evaluation.held_out")
    try:
        root = None if search.root is None else Path(search.root)
        return parse_recipe(Experiment, varied, file, root, as_written=not values)
    except InputError as error:
        if not values:
            raise
        raise InputError("\n".join(f"{line} ({_written(values)})" for line in str(error).splitlines())) from error


def _written(values: Mapping[str, Any]) -> str:
    return ", ".join(f"search.domains.{path} at {json.dumps(value)}" for path, value in values.items())


def write_search(search: Search, content: Mapping[str, Any], file: Path) -> None:
    """Write a search with its experiment, as `load_search` reads it."""
    write_text(file, dump_yaml(masked({**content, "search": search.model_dump(mode="json", exclude_none=True)})))


def read_recipe(file: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
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
    content = parse_yaml(text, f"{file}: found no readable YAML")
    if not isinstance(content, dict):
        found = {type(None): "nothing", str: "a text", list: "a list"}.get(type(content), "a single value")
        raise InputError(f"{file}: found {found}, expected fields such as 'model:' and 'tasks:'")
    for override in overrides:
        apply_override(content, override)
    return content


def parse_recipe(
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
        tree = yaml_writer().compose(file.read_text(encoding="utf-8"))
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
    return "" if mark is None else f" ({mark_text(mark)})"


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
    write_text(file, dump_yaml(as_recipe(experiment)))


def as_recipe(experiment: Experiment) -> dict[str, Any]:
    """Every field, as it may be written down: without the secrets that its URLs hold."""
    content = experiment.model_dump(mode="json")
    content["optimisation"]["warmup_steps"] = experiment.warmup_steps
    if experiment.class_incremental is not None:
        del content["tasks"]  # they follow from it
    return masked(content)
