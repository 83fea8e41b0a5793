"""The demo: fine-tuning against ZSCL on the embedded suite."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from orchestrate.lifecycle.paths import store_uri
from orchestrate.recipes.recipe import parse_recipe, read_recipe, recipe_name
from orchestrate.runs import preflight
from orchestrate.runs import run as running
from schemas.experiment import Experiment
from zscl.datasets.synthetic.suites import write_embedded

# What each run takes in place of the recipe's method; `None`: the recipe's own.
METHODS = {"finetune": "finetune", "zscl": None}


def run_demo(
    recipe: Path, folder: Path, overrides: Sequence[str], console: Console, offline: bool = False
) -> tuple[list[Path], str]:
    """Draw the suite into `folder` and run the recipe there by both methods.

    Returns the runs' folders and the URI of the store they are recorded in, or would be if not `offline`.
    """
    data = folder / "data"
    content = read_recipe(recipe, overrides)
    content["tasks"] = [_moved(task, data) for task in content["tasks"]]
    content["reference"] = str(data / "reference")
    experiments = {}
    for method, parts in METHODS.items():
        named = {"name": recipe_name(recipe), **content, "method": parts or content["method"]}
        experiments[folder / method] = parse_recipe(Experiment, named, recipe)
    write_embedded(data, corpus=False, report=lambda text: console.print(text, highlight=False))
    for run, experiment in experiments.items():
        console.rule(run.name)
        running.run_experiment(preflight.prepare(experiment), run, console, offline)
    return list(experiments), store_uri(experiment, run)


def _moved(task: Any, data: Path) -> Any:
    """A task of the recipe, where the demo draws it."""
    if isinstance(task, dict):
        return task | {"path": str(data / Path(task["path"]).name)}
    return str(data / Path(task).name)
