"""Recipes: parse a YAML file with overrides into an experiment or a search, and write it back as YAML."""

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
from orchestrate.recipes.yaml_loader import dump_yaml, format_mark, read_yaml, safe_yaml
from schemas.base import StrictModel, explain, input_error
from schemas.errors import ErrorCode, InputError, shell_command
from schemas.experiment import MAX_NAME_LENGTH, Experiment
from schemas.redaction import mask_tree
from schemas.search import Search
from zscl.runtime.atomic_io import write_text


class SearchRecipe(StrictModel):
    """The part of a search's recipe that describes the search. The rest of the recipe is an experiment.

    Attributes:
        search: The section `search`.
    """

    search: Search


SchemaT = TypeVar("SchemaT", bound=StrictModel)


def load_experiment(file: Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read the recipe of a single experiment. If it has no `name`, the experiment is named after the file.

    Args:
        file: The recipe.
        overrides: Overrides `a.b.c=value`, applied in order.

    Returns:
        The validated experiment.

    Raises:
        InputError: The file or an override cannot be read, the recipe is invalid, or it is not a recipe of a single
            experiment.
    """
    return parse_experiment(read_yaml(file), file, overrides)


def parse_experiment(content: dict[str, Any], file: Path, overrides: Sequence[str] = ()) -> Experiment:
    """Apply overrides to a recipe's content and validate it as a single experiment.

    Args:
        content: The recipe's fields; changed in place.
        file: The recipe, for the experiment's name and for error messages.
        overrides: Overrides `a.b.c=value`, applied in order.

    Returns:
        The validated experiment.

    Raises:
        InputError: An override cannot be read, the content is invalid, or it does not describe a single experiment.
    """
    for override in overrides:
        apply_override(content, override)
    if "search" in content:
        raise InputError(
            f"{file}: found a search, expected a run's recipe; to search: {shell_command('zscl', 'search', file)}",
            code=ErrorCode.UNSUPPORTED,
            field="search",
        )
    if "variants" in content:
        raise InputError(
            f"{file}: found a table of variants, expected a single experiment",
            code=ErrorCode.UNSUPPORTED,
            field="variants",
        )
    if "base" in content:
        raise InputError(
            f"{file}: found base without variants, expected variants: a mapping of variant names to changed fields",
            code=ErrorCode.MISSING_VALUE,
            field="variants",
        )
    return parse_recipe(Experiment, {"name": recipe_name(file), **content}, file, overrides=overrides)


def recipe_name(file: Path, suffix: str = "") -> str:
    """Derive an experiment's name from the name of its recipe's file. The result is a valid name.

    Args:
        file: The recipe.
        suffix: The end of the name. If the name would be too long, the part before the suffix is shortened.

    Returns:
        The name.
    """
    ascii_stem = unicodedata.normalize("NFKD", file.stem).encode("ascii", "ignore").decode()
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", ascii_stem).strip("-")
    return (name[: max(MAX_NAME_LENGTH - len(suffix), 0)] or "recipe") + suffix


def load_search(file: Path, overrides: Sequence[str] = ()) -> tuple[Search, dict[str, Any]]:
    """Read a search's recipe: the section `search`, and the experiment in the same file or in the file `base`.

    Overrides of `search.…` change the section. All other overrides change the experiment.

    Args:
        file: The recipe.
        overrides: Overrides `a.b.c=value`, applied in order.

    Returns:
        The validated section `search`, and the fields of the experiment, which are not validated.

    Raises:
        InputError: The file, its base or an override cannot be read, or the section is invalid.
    """
    content = read_yaml(file)
    section = content.pop("search", None)
    if not isinstance(section, dict):
        raise InputError(
            f"{file}: found no section 'search', expected one with domains and objectives",
            code=ErrorCode.MISSING_VALUE,
            field="search",
        )
    if "base" in content:
        if content.keys() != {"base"}:
            raise InputError(
                f"{file}: found the fields {', '.join(map(str, content))} next to search, expected either only base, "
                "or a complete experiment without base",
                code=ErrorCode.CONFLICT,
                field="base",
            )
        content = read_base(file, content["base"])
    search_content = {"search": section}
    for override in overrides:
        apply_override(search_content if override.startswith("search.") else content, override)
    section["root"] = str(Path.cwd() / str(section.get("root", "")))
    content = {**content, "name": content.get("name") or recipe_name(file)}
    return parse_recipe(SearchRecipe, search_content, file, overrides=overrides).search, content


def read_base(file: Path, base: object) -> dict[str, Any]:
    """Read the recipe that another recipe names as its `base`.

    Args:
        file: The recipe with the field `base`.
        base: The value of the field: a path relative to the recipe's folder.

    Returns:
        The fields of the base recipe, which are not validated.

    Raises:
        InputError: The base cannot be read.
    """
    try:
        return read_yaml(file.parent / str(base))
    except InputError as error:
        raise InputError(f"{file}: base: {error}", code=error.code, field="base") from error


def build_trial_experiment(
    search: Search,
    content: Mapping[str, Any],
    values: Mapping[str, Any],
    file: Path,
    judged_on: Literal["held_out", "test"] | None = "held_out",
) -> Experiment:
    """Build the experiment of a search's trial.

    Args:
        search: The search. It sets the fraction of held-out images and the folder for relative paths.
        content: The recipe's fields of the experiment that the search varies.
        values: The trial's value of each varied field, by the field's dotted path.
        file: The search's recipe, for error messages.
        judged_on: The images on which the trial is evaluated (`evaluation.held_out.judged_on`). If `None`, no training
            images are held out, and the trial is evaluated on the test images.

    Returns:
        The validated experiment.

    Raises:
        InputError: The values do not make a valid experiment.
    """
    trial = deepcopy(dict(content))
    for path, value in values.items():
        set_field(trial, path, value, f"{file}: search.domains.{path}")
    if judged_on is not None:
        held_out = {"share": search.validation_share, "seed": search.seed, "judged_on": judged_on}
        set_field(trial, "evaluation.held_out", held_out, "evaluation.held_out")
    try:
        root = None if search.root is None else Path(search.root)
        return parse_recipe(Experiment, trial, file, root, as_written=not values)
    except InputError as error:
        if not values:
            raise
        shown = ", ".join(f"search.domains.{path} at {json.dumps(value)}" for path, value in values.items())
        message = "\n".join(f"{line} ({shown})" for line in str(error).splitlines())
        raise InputError(message, code=error.code, field=error.field) from error


def write_search(search: Search, content: Mapping[str, Any], file: Path) -> None:
    """Write the section `search` and the experiment's fields to a file that `load_search` can read."""
    write_text(file, dump_yaml(mask_tree({**content, "search": search.model_dump(mode="json", exclude_none=True)})))


def read_recipe(file: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a recipe's content and apply overrides, without validation.

    Args:
        file: The recipe.
        overrides: Overrides `a.b.c=value`, applied in order.

    Returns:
        The recipe's fields.

    Raises:
        InputError: The file or an override cannot be read.
    """
    content = read_yaml(file)
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
    """Validate a recipe's content against a schema.

    Each line of the error message starts with the override that set the invalid field. If no override set it, the line
    contains the file, the line number and the column.

    Args:
        schema: The schema.
        content: The recipe's fields, with all overrides applied.
        file: The recipe, for error messages.
        root: The folder for relative paths; default: the current folder.
        overrides: The overrides that were applied.
        as_written: Whether all fields except those in `overrides` are as in the file, so that errors can contain their
            line and column.

    Returns:
        The validated content.

    Raises:
        InputError: The content is invalid.
    """
    try:
        return schema.model_validate(content, context={"root": root or Path.cwd()})
    except ValidationError as error:
        tree = _compose(file) if as_written else None
        lines = [
            f"{override}: {line}"
            if (override := _find_override(line, overrides))
            else f"{file}: {line}{_format_position(tree, _field_of(line))}"
            for line in explain(error).splitlines()
        ]
        refusal = input_error(error, "\n".join(lines))
        raise refusal from error


_UNKNOWN_FIELD = re.compile(r"unknown field '([^']*)'")


def _field_of(line: str) -> str:
    """Return the dotted path of the field to which a line of a validation message refers."""
    field, _, problem = line.partition(": ")
    if unknown := _UNKNOWN_FIELD.match(problem):
        field = unknown[1] if field == "the recipe" else f"{field}.{unknown[1]}"
    return field


def _compose(file: Path) -> Node | None:
    """Parse a recipe into nodes with positions. Return `None` if the file cannot be read or has the field `base`."""
    try:
        tree = safe_yaml().compose(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, YAMLError):
        return None
    keys = {key.value for key, _ in tree.value} if isinstance(tree, MappingNode) else set()
    return tree if keys and "base" not in keys else None


def _format_position(tree: Node | None, field: str) -> str:
    """Return a field's position as ` (line …, column …)`.

    If the recipe lacks the field, the position is that of the innermost section around it that the recipe contains.
    """
    mark = None
    for part in field.split("."):
        child = None
        if isinstance(tree, MappingNode):
            child = next(((key, value) for key, value in tree.value if key.value == part), None)
        elif isinstance(tree, SequenceNode) and part.isdecimal() and int(part) < len(tree.value):
            child = (tree.value[int(part)],) * 2
        if child is None:
            break
        mark, tree = child[0].start_mark, child[1]
    return "" if mark is None else f" ({format_mark(mark)})"


def _find_override(line: str, overrides: Sequence[str]) -> str | None:
    """Return the option `--set …` that set the field named in a line of an error message; `None` if there is none."""
    field = _field_of(line)
    for override in reversed(overrides):
        path = override.partition("=")[0]
        if f"{field}.".startswith(f"{path}."):
            return f"--set {override}"
    return None


def write_experiment(experiment: Experiment, file: Path) -> None:
    """Write an experiment as a recipe with all defaults, from which `load_experiment` reads an equal experiment."""
    write_text(file, dump_yaml(to_recipe(experiment)))


def to_recipe(experiment: Experiment) -> dict[str, Any]:
    """Convert an experiment to a recipe's content. It has every field, and the secrets in URLs are masked."""
    content = experiment.model_dump(mode="json")
    content["optimisation"]["warmup_steps"] = experiment.warmup_steps
    if experiment.class_incremental is not None:
        del content["tasks"]  # the tasks are derived from class_incremental
    return mask_tree(content)
