"""The commands that write model folders: `zscl export` and `zscl pretrain`."""

from pathlib import Path
from typing import Annotated

import typer

from orchestrate.cli.options import AsJson, Overrides, Recipe, print_result, progress_console


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")],
    out: Annotated[Path, typer.Option(help="Folder for the model; it must be empty or not exist.")],
    stage: Annotated[int | None, typer.Option(help="Stage whose model to export, from 1. Default: the last.")] = None,
    as_json: AsJson = False,
) -> None:
    """Export the model of a stage for the Hugging Face hub, as an open_clip folder with a model card.

    Example: zscl export runs/demo/zscl --stage 6 --out runs/demo-zscl-model
    """
    from orchestrate.analysis.export import export_model
    from orchestrate.lifecycle.paths import check_writable

    check_writable(out.absolute())
    folder = export_model(run.absolute(), stage, out.absolute())
    lines = [f"model   {folder}  (open_clip: local-dir:{folder})", f"upload  hf upload OWNER/NAME {folder}"]
    print_result({"folder": str(folder)}, as_json, lines)


def pretrain(
    recipe: Recipe,
    out: Annotated[Path, typer.Option(help="Folder for the model.")],
    overrides: Overrides = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Pre-train a small CLIP from scratch. The model is written as an open_clip folder.

    Example: zscl pretrain experiments/pretrain-embedded.yaml --out runs/embedded-model
    """
    from orchestrate.lifecycle.paths import check_writable
    from orchestrate.recipes.recipe import parse_recipe, read_recipe, recipe_name
    from orchestrate.runs.progress import ProgressBar
    from schemas.pretraining import Pretraining

    pretraining = parse_recipe(Pretraining, {"name": recipe_name(recipe), **read_recipe(recipe, overrides)}, recipe)
    check_writable(out.absolute())
    import torch

    from zscl.training.pretrain import pretrain_clip

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with ProgressBar(progress_console) as bar:
        result = pretrain_clip(
            pretraining,
            out.absolute(),
            lambda step, steps, loss: bar.update("pre-training", step, steps, f"loss {loss:.3f}"),
            device,
        )
    lines = [f"zero-shot {task} {100 * value:.1f}" for task, value in result.zero_shot.items()]
    lines.append(f"model   {result.folder}  (open_clip: local-dir:{result.folder})")
    content = {
        "folder": str(result.folder),
        "steps": result.steps,
        "loss": result.loss,
        "zero_shot": result.zero_shot,
    }
    print_result(content, as_json, lines)
