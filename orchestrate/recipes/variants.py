"""Build several experiments from one recipe: variants of the recipe, seeds and task orders."""

import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrate.recipes.overrides import apply_override, set_field
from orchestrate.recipes.recipe import parse_experiment, parse_recipe, read_base, recipe_name
from orchestrate.recipes.yaml_loader import read_yaml
from schemas.data import Task
from schemas.errors import ErrorCode, InputError
from schemas.experiment import Experiment
from zscl.runtime.seeding import derive_seed

ALL_VARIANTS = "all"
_VARIANT_NAME = re.compile(r"[A-Za-z0-9_.-]*[A-Za-z0-9][A-Za-z0-9_.-]*")

# The task orders of the paper's tables (Zheng et al., ICCV 2023, supplementary material).
MTIL_ORDERS: Mapping[str, Sequence[str]] = {
    "I": (
        "Aircraft", "Caltech101", "CIFAR100", "DTD", "EuroSAT", "Flowers", "Food", "MNIST", "OxfordPet",
        "StanfordCars", "SUN397",
    ),
    "II": (
        "StanfordCars", "Food", "MNIST", "OxfordPet", "Flowers", "SUN397", "Aircraft", "Caltech101", "DTD", "EuroSAT",
        "CIFAR100",
    ),
}  # fmt: skip
ORDER_CHOICES = "given, reversed, I, II or random:N"
MAX_RANDOM_ORDERS = 100


def load_variants(file: Path, overrides: Sequence[str] = (), variant: str | None = None) -> dict[str, Experiment]:
    """Read a recipe that is a single experiment or a table of variants.

    A table has two fields: `base` is the recipe to vary, and `variants` maps each variant's name to the fields that
    differ from the base, by dotted path. Overrides are applied to every variant, after the fields of the variant.

    Args:
        file: The recipe.
        overrides: Overrides `a.b.c=value`, applied in order.
        variant: The name of a variant, or `all`; `None` if the recipe is a single experiment.

    Returns:
        The selected experiments by the variant's name. The key of a single experiment is "".

    Raises:
        InputError: The file or an override cannot be read, a recipe is invalid, the variant does not exist, or no
            variant is named.
    """
    content = read_yaml(file)
    if "variants" not in content:
        if variant is not None:
            raise InputError(
                f"--variant {variant}: found no variants in {file}, expected a recipe with variants",
                code=ErrorCode.UNSUPPORTED,
                field="--variant",
            )
        return {"": parse_experiment(content, file, overrides)}
    rows = _read_rows(content, file)
    if variant != ALL_VARIANTS and variant not in rows:
        source = f"--variant {variant}" if variant else f"{file}: found a table of variants"
        raise InputError(
            f"{source}, expected --variant {', '.join(rows)} or {ALL_VARIANTS}",
            code=ErrorCode.UNKNOWN_NAME if variant else ErrorCode.MISSING_VALUE,
            field="--variant",
        )
    return {
        name: _build_variant(file, content["base"], name, changes, overrides)
        for name, changes in rows.items()
        if variant in (name, ALL_VARIANTS)
    }


def _read_rows(table: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Return the changed fields of each variant by the variant's name; check the table's fields and these names."""
    if table.keys() != {"base", "variants"} or not isinstance(table["variants"], dict):
        raise InputError(
            f"{file}: found the fields {', '.join(map(str, table))}, expected only base, and variants: a mapping of "
            "variant names to changed fields",
            code=ErrorCode.INVALID_VALUE,
            field="variants",
        )
    rows = {str(name): changes or {} for name, changes in table["variants"].items()}
    if not rows:
        raise InputError(
            f"{file}: variants: found no variant, expected at least one", code=ErrorCode.EMPTY, field="variants"
        )
    for name in rows:
        if not _VARIANT_NAME.fullmatch(name):
            raise InputError(
                f"{file}: variants: found the name {name!r}, expected only letters, digits and the characters _.-, "
                "because folders are named after it",
                code=ErrorCode.INVALID_VALUE,
                field="variants",
            )
    return rows


def _build_variant(file: Path, base: object, name: str, changes: Any, overrides: Sequence[str]) -> Experiment:
    field = f"variants.{name}"
    if not isinstance(changes, dict):
        raise InputError(
            f"{file}: {field}: found {changes!r}, expected a mapping of dotted paths to values",
            code=ErrorCode.INVALID_VALUE,
            field=field,
        )
    content = read_base(file, base)
    for path, value in changes.items():
        set_field(content, str(path), value, f"{file}: {field}: {path}")
    for override in overrides:
        apply_override(content, override)
    return parse_recipe(Experiment, {**content, "name": recipe_name(file, f"-{name}")}, file, overrides=overrides)


def expand_seeds_and_orders(experiments: Mapping[str, Experiment], seeds: int, orders: str) -> dict[str, Experiment]:
    """Build every experiment with every task order and every seed.

    Args:
        experiments: The experiments by the variant's name. The key of a single experiment is "".
        seeds: The number of consecutive seeds. The first seed is that of the recipe.
        orders: The task orders, separated by commas: `given` (the order in the recipe), `reversed`, `I` and `II` (the
            orders of the MTIL benchmark), or `random:N` for N random orders. Empty is the same as `given`.

    Returns:
        The experiments by name. A name consists of the variant, the order and the seed, as far as they vary.

    Raises:
        InputError: An order does not exist, or the recipe's tasks are not those of MTIL.
    """
    expanded: dict[str, Experiment] = {}
    for variant, experiment in experiments.items():
        for order, tasks in _expand_orders(experiment, orders).items():
            for seed in range(experiment.seed, experiment.seed + seeds):
                parts = [variant, order if orders else "", f"seed-{seed}" if seeds > 1 else ""]
                fields = {**experiment.model_dump(), "tasks": [task.model_dump() for task in tasks], "seed": seed}
                if experiment.class_incremental is not None:
                    del fields["tasks"]
                expanded["-".join(filter(None, parts))] = Experiment.model_validate(fields)
    return expanded


def _expand_orders(experiment: Experiment, orders: str) -> dict[str, Sequence[Task]]:
    """Return the tasks in every requested order, by the name of the order."""
    if experiment.class_incremental is not None and orders:
        raise InputError(
            "--orders: found a recipe with class_incremental, expected one with tasks. Set class_incremental.order "
            "instead",
            code=ErrorCode.CONFLICT,
            field="--orders",
        )
    tasks = experiment.tasks
    expanded: dict[str, Sequence[Task]] = {}
    for name in orders.split(",") if orders else ["given"]:
        kind, _, count = name.strip().partition(":")
        if kind == "given":
            expanded["given"] = tasks
        elif kind == "reversed":
            expanded["reversed"] = tasks[::-1]
        elif kind in MTIL_ORDERS:
            expanded[kind] = _sort_as_mtil(tasks, kind)
        elif kind == "random" and count.isdecimal() and 1 <= int(count) <= MAX_RANDOM_ORDERS:
            for number in range(1, int(count) + 1):
                generator = random.Random(derive_seed("task order", number))
                expanded[f"random-{number}"] = generator.sample(tasks, len(tasks))
        else:
            raise InputError(
                f"--orders: found '{name}', expected {ORDER_CHOICES} (N up to {MAX_RANDOM_ORDERS}), separated by "
                "commas",
                code=ErrorCode.UNKNOWN_NAME,
                field="--orders",
            )
    return expanded


def _sort_as_mtil(tasks: Sequence[Task], order: str) -> list[Task]:
    by_name = {task.name: task for task in tasks}
    if by_name.keys() != set(MTIL_ORDERS[order]):
        raise InputError(
            f"--orders: found the tasks {', '.join(by_name)}, expected those of order {order} of MTIL: "
            f"{', '.join(MTIL_ORDERS[order])}",
            code=ErrorCode.MISMATCH,
            field="--orders",
        )
    return [by_name[name] for name in MTIL_ORDERS[order]]
