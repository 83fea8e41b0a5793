"""Commands of a search."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrate.cli.options import (
    AsJson,
    Offline,
    Overrides,
    print_result,
    print_note,
    progress_console,
)
from orchestrate.cli.terminal import stdout_console
from schemas.errors import command
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
            help="Check recipe, data, model, shards, folders, disk, cluster, tracking; say what would be done.",
        ),
    ] = False,
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Search a recipe's values: many sequences, judged on held-out training images, the chosen one on test, once.

    Example: zscl search experiments/search-embedded.yaml --set search.trials=4 --set optimisation.steps=30
    """
    from orchestrate.recipes.yaml_loader import dump_yaml
    from orchestrate.search.preflight import search_folder, plan_search, prepare_search

    prepared = prepare_search(recipe, overrides)
    folder = search_folder(prepared, out)
    if dry_run:
        from orchestrate.runs.run import connect_cluster
        from orchestrate.search import run as searching
        from orchestrate.search.dry_run import check_search

        searching.check_same_search(prepared, folder)
        connect = partial(connect_cluster, prepared.base.experiment, folder, progress_console)
        checklist = check_search(prepared, folder, offline, connect)
        checklist.refuse_failures(print_note)
        content: dict[str, Any] = {"plan": plan_search(prepared, folder) | {"checked": checklist.lines}}
        print_result(content, as_json, [dump_yaml(content)])
        return
    run_and_report(prepared, folder, offline, as_json)


def run_and_report(prepared: "PreparedSearch", folder: Path, offline: bool, as_json: bool) -> None:
    """Run a search, or go on with it, and show what it found."""
    from orchestrate.lifecycle.paths import CHOSEN, browse_command, store_uri
    from orchestrate.search import run as searching

    found = searching.run_search(prepared, folder, progress_console, offline)
    if not as_json:
        from orchestrate.search.report import terminal_tables

        stdout_console().print(terminal_tables(found))
    uri = None if offline else store_uri(prepared.base.experiment, folder)
    lines = [
        f"search  {folder}",
        f"MLflow  {browse_command(uri) if uri else command('zscl', 'sync', folder)}",
        f"run the chosen recipe on all training images: {command('zscl', 'run', folder / CHOSEN)}",
    ]
    shown = {"folder": str(folder), "tracking_uri": uri and mask(uri)}
    print_result({**shown, "search": found.model_dump(mode="json")}, as_json, lines)
