"""The demo: fine-tuning against ZSCL on the embedded suite."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from orchestrate import recipes
from orchestrate import run as running
from schemas.experiment import Experiment
from zscl.suites import write_embedded

# What each run takes in place of the recipe's method; `None`: the recipe's own.
METHODS = {"finetune": "finetune", "zscl": None}


def demo(recipe: Path, folder: Path, overrides: Sequence[str], console: Console) -> list[Path]:
    """Draw the suite into `folder`, run the recipe there by both methods, and return the runs' folders."""
    content = recipes.read(recipe, overrides)
    data = folder / "data"
    content["tasks"] = [str(data / Path(task).name) for task in content["tasks"]]
    content["reference"] = str(data / "reference")
    write_embedded(data, corpus=False, note=lambda text: console.print(text, highlight=False))
    runs = []
    for method, parts in METHODS.items():
        console.rule(method)
        runs.append(folder / method)
        named = {"name": recipe.stem, **content, "method": parts or content["method"]}
        running.run(running.prepare(recipes.parse(Experiment, named, recipe)), runs[-1], console)
    return runs
