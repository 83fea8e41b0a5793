"""What verbs share: options that mean the same everywhere, and how results and remarks are printed."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from orchestrate.cli.terminal import stderr_console, stdout_console
from schemas.errors import InputError

progress_console = stderr_console()


Recipe = Annotated[Path, typer.Argument(help="Recipe (YAML).")]
Overrides = Annotated[
    list[str], typer.Option("--set", metavar="a.b.c=value", help="Override a field of the recipe; repeatable.")
]
Out = Annotated[
    Path | None,
    typer.Option(
        help="The run's folder; with --variant all, the folder of theirs. Default: runs/NAME-METHOD-FINGERPRINT."
    ),
]
Variant = Annotated[str | None, typer.Option(help="Which row of a recipe that is a table of variants, or 'all'.")]
Offline = Annotated[bool, typer.Option("--offline", help="Without MLflow: `zscl sync` sends everything later.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]


def print_result(content: dict[str, Any], as_json: bool, lines: list[str]) -> None:
    """End a command: what it made and where, for people or for programs."""
    if as_json:
        print(json.dumps(content, indent=1))
    elif lines:
        print("\n".join(lines))


def print_note(text: str) -> None:
    """Say something beside the results."""
    progress_console.print(text)


def single_or_list(contents: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    """What programs get of several things of a kind: all under its name, and one alone as it is."""
    return contents[0] if len(contents) == 1 else {name: list(contents)}


def compare_and_print(
    runs: Mapping[str, Path | InputError],
    folder: Path,
    as_json: bool,
    offline: bool,
    published: str | None = None,
    baseline: str | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """Compare runs; `offline` writes no page to MLflow. See `orchestrate.analysis.compare`."""
    from orchestrate.analysis.compare import compare_runs

    return compare_runs(
        runs, folder, None if as_json else stdout_console(), published, baseline, None if offline else print_note
    )
