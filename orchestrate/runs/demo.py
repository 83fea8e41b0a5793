"""The demo: fine-tuning and ZSCL on the embedded suite of synthetic tasks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from orchestrate.lifecycle.paths import tracking_uri
from orchestrate.recipes.recipe import parse_recipe, read_recipe, recipe_name
from orchestrate.runs import preflight
from orchestrate.runs import run as running
from schemas.experiment import Experiment
from zscl.datasets.synthetic.suites import write_embedded

# Mapping from the folder name of a run to its method; `None` means the method of the recipe.
METHODS = {"finetune": "finetune", "zscl": None}


def run_demo(
    recipe: Path, folder: Path, overrides: Sequence[str], console: Console, offline: bool = False
) -> tuple[list[Path], str]:
    """Write the embedded suite of synthetic tasks to a folder, and run the recipe on it with each method in `METHODS`.

    Args:
        recipe: Recipe of the embedded suite.
        folder: Folder in which the data and the runs are written.
        overrides: Changes to fields of the recipe, `a.b.c=value`.
        console: Console for progress.
        offline: Whether to run without MLflow.

    Returns:
        The folders of the runs, and the MLflow tracking URI. The runs do not use the URI if `offline` is set.
    """
    data = folder / "data"
    content = read_recipe(recipe, overrides)
    content["tasks"] = [_with_path_in(data, task) for task in content["tasks"]]
    content["reference"] = str(data / "reference")
    experiments = {}
    for name, method in METHODS.items():
        variant = {"name": recipe_name(recipe), **content, "method": method or content["method"]}
        experiments[folder / name] = parse_recipe(Experiment, variant, recipe)
    write_embedded(data, corpus=False, report=lambda text: console.print(text, highlight=False))
    for run, experiment in experiments.items():
        console.rule(run.name)
        running.run_experiment(preflight.prepare(experiment), run, console, offline)
    return list(experiments), tracking_uri(experiment, run)


def _with_path_in(data: Path, task: Any) -> Any:
    """Return a task of the recipe, a path or a dictionary, with the parent folder of its path replaced by `data`."""
    if isinstance(task, dict):
        return task | {"path": str(data / Path(task["path"]).name)}
    return str(data / Path(task).name)
