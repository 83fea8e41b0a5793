"""Verbs that make folders of models: of a run's stage, for the Hugging Face hub, and of a small CLIP from nothing."""

from pathlib import Path
from typing import Annotated

import typer

from orchestrate.cli.options import AsJson, Overrides, Recipe, print_result, progress_console


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")],
    out: Annotated[Path, typer.Option(help="Folder of the model; it must not be there yet.")],
    stage: Annotated[int | None, typer.Option(help="Which stage's model, from 1. Default: the last.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make a stage's model a folder for the Hugging Face hub: open_clip's layout, and a card made from the run.

    Example: zscl export runs/demo/zscl --stage 6 --out runs/demo-zscl-model
    """
    from orchestrate.analysis import export as exporting
    from orchestrate.lifecycle.paths import check_writable

    check_writable(out.absolute())
    folder = exporting.export_model(run.absolute(), stage, out.absolute())
    lines = [f"model   {folder}  (open_clip: local-dir:{folder})", f"upload  hf upload OWNER/NAME {folder}"]
    print_result({"folder": str(folder)}, as_json, lines)


def pretrain(
    recipe: Recipe,
    out: Annotated[Path, typer.Option(help="Folder of the model.")],
    overrides: Overrides = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Train a small CLIP from nothing, contrastively, and write it as an open_clip folder.

    Example: zscl pretrain experiments/pretrain-embedded.yaml --out runs/embedded-model
    """
    from orchestrate.lifecycle.paths import check_writable
    from orchestrate.recipes.recipe import parse_recipe, read_recipe, recipe_name
    from orchestrate.runs.progress import ProgressBar
    from schemas.pretraining import Pretraining

    checked = parse_recipe(Pretraining, {"name": recipe_name(recipe), **read_recipe(recipe, overrides)}, recipe)
    check_writable(out.absolute())
    import torch

    from zscl.training.pretrain import pretrain as train

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with ProgressBar(progress_console) as bar:
        made = train(
            checked,
            out.absolute(),
            lambda step, steps, loss: bar.update("pre-training", step, steps, f"loss {loss:.3f}"),
            device,
        )
    lines = [f"zero-shot {task} {100 * value:.1f}" for task, value in made.zero_shot.items()]
    lines.append(f"model   {made.folder}  (open_clip: local-dir:{made.folder})")
    print_result(
        {"folder": str(made.folder), "steps": made.steps, "loss": made.loss, "zero_shot": made.zero_shot},
        as_json,
        lines,
    )
