"""The command `zscl search`."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrate.cli.options import (
    AsJson,
    Offline,
    Overrides,
    print_note,
    print_result,
    progress_console,
)
from orchestrate.cli.terminal import create_stdout_console
from schemas.errors import shell_command
from schemas.redaction import mask

if TYPE_CHECKING:
    from orchestrate.search.preflight import PreparedSearch


def search(
    recipe: Annotated[Path, typer.Argument(help="Recipe of a search (YAML).")],
    overrides: Overrides = [],  # noqa: B006
    out: Annotated[Path | None, typer.Option(help="The search's folder. Default: runs/NAME-FINGERPRINT.")] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Check recipe, data, model, shards, folders, disk, cluster and tracking, and print the plan.",
        ),
    ] = False,
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Search hyperparameters on held-out training images. Test images are used once, at the end.

    Example: zscl search experiments/search-embedded.yaml --set search.trials=4 --set optimisation.steps=30
    """
    from orchestrate.recipes.yaml_loader import dump_yaml
    from orchestrate.search.preflight import plan_search, prepare_search, search_folder

    prepared = prepare_search(recipe, overrides)
    folder = search_folder(prepared, out)
    if dry_run:
        from orchestrate.runs.run import connect_cluster
        from orchestrate.search.dry_run import check_search
        from orchestrate.search.run import check_same_search

        check_same_search(prepared, folder)
        connect = partial(connect_cluster, prepared.base.experiment, folder, progress_console)
        checklist = check_search(prepared, folder, offline, connect)
        checklist.raise_on_failure(print_note)
        content: dict[str, Any] = {"plan": plan_search(prepared, folder) | {"checked": checklist.lines}}
        print_result(content, as_json, [dump_yaml(content)])
        return
    run_and_report(prepared, folder, offline, as_json)


def run_and_report(prepared: "PreparedSearch", folder: Path, offline: bool, as_json: bool) -> None:
    """Run or resume a search, and print its result.

    Args:
        prepared: The checked search.
        folder: The search's folder.
        offline: Whether to run without MLflow.
        as_json: Whether to print the result as JSON.
    """
    from orchestrate.lifecycle.paths import CHOSEN_RECIPE, browse_command, tracking_uri
    from orchestrate.search.run import run_search

    result = run_search(prepared, folder, progress_console, offline)
    if not as_json:
        from orchestrate.search.report import build_terminal_tables

        create_stdout_console().print(build_terminal_tables(result))
    uri = None if offline else tracking_uri(prepared.base.experiment, folder)
    lines = [
        f"search  {folder}",
        f"MLflow  {browse_command(uri) if uri else shell_command('zscl', 'sync', folder)}",
        f"run the chosen recipe on all training images: {shell_command('zscl', 'run', folder / CHOSEN_RECIPE)}",
    ]
    content = {"folder": str(folder), "tracking_uri": uri and mask(uri), "search": result.model_dump(mode="json")}
    print_result(content, as_json, lines)
