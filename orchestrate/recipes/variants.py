"""One recipe over seeds and task orders: a group of runs that are compared at the end."""

import random
from collections.abc import Mapping, Sequence

from schemas.data import Task
from schemas.errors import InputError
from schemas.experiment import Experiment
from zscl.runtime.seeding import derive_seed

# The orders of the paper's tables (Zheng et al., supplementary material).
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
KNOWN = "given, reversed, I, II or random:N"
MOST_ORDERS = 100


def expand_seeds_and_orders(experiments: Mapping[str, Experiment], seeds: int, orders: str) -> dict[str, Experiment]:
    """Every experiment in every order with every seed, by name.

    Args:
        experiments: by variant; "" where there is but one.
        seeds: how many, from the recipe's own on.
        orders: of the tasks, parted by commas: `given`, `reversed`, MTIL's `I` and `II`, `random:N` for N of them.

    Raises:
        InputError: there is no such order, or the recipe's tasks are not those of MTIL.
    """
    found: dict[str, Experiment] = {}
    for variant, experiment in experiments.items():
        for order, tasks in _orders(experiment, orders).items():
            for seed in range(experiment.seed, experiment.seed + seeds):
                parts = [variant, order if orders else "", f"seed-{seed}" if seeds > 1 else ""]
                changed = {**experiment.model_dump(), "tasks": [task.model_dump() for task in tasks], "seed": seed}
                if experiment.class_incremental is not None:
                    del changed["tasks"]
                found["-".join(filter(None, parts))] = Experiment.model_validate(changed)
    return found


def _orders(experiment: Experiment, orders: str) -> dict[str, Sequence[Task]]:
    if experiment.class_incremental is not None and orders:
        raise InputError("--orders: found class_incremental, expected tasks; its order is class_incremental.order")
    tasks = experiment.tasks
    found: dict[str, Sequence[Task]] = {}
    for name in orders.split(",") if orders else ["given"]:
        kind, _, count = name.strip().partition(":")
        if kind == "given":
            found["given"] = tasks
        elif kind == "reversed":
            found["reversed"] = tasks[::-1]
        elif kind in MTIL_ORDERS:
            found[kind] = _mtil(tasks, kind)
        elif kind == "random" and count.isdecimal() and 1 <= int(count) <= MOST_ORDERS:
            for number in range(1, int(count) + 1):
                draw = random.Random(derive_seed("task order", number))
                found[f"random-{number}"] = draw.sample(tasks, len(tasks))
        else:
            raise InputError(f"--orders: found '{name}', expected {KNOWN} (N up to {MOST_ORDERS}), parted by commas")
    return found


def _mtil(tasks: Sequence[Task], order: str) -> list[Task]:
    of_name = {task.name: task for task in tasks}
    if of_name.keys() != set(MTIL_ORDERS[order]):
        raise InputError(
            f"--orders: {order} is of MTIL's tasks ({', '.join(MTIL_ORDERS[order])}), found {', '.join(of_name)}"
        )
    return [of_name[name] for name in MTIL_ORDERS[order]]
