"""Options that several commands have, and functions that print results and notes."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from orchestrate.cli.terminal import create_stderr_console, create_stdout_console
from schemas.errors import InputError

progress_console = create_stderr_console()


Recipe = Annotated[Path, typer.Argument(help="Recipe (YAML).")]
Overrides = Annotated[
    list[str], typer.Option("--set", metavar="a.b.c=value", help="Override a field of the recipe; repeatable.")
]
Out = Annotated[
    Path | None,
    typer.Option(
        help="The run's folder; with --variant all, the parent folder of the runs. "
        "Default: runs/NAME-METHOD-FINGERPRINT."
    ),
]
Variant = Annotated[str | None, typer.Option(help="Variant to run, for a recipe with variants; or 'all'.")]
Offline = Annotated[bool, typer.Option("--offline", help="Run without MLflow; `zscl sync` sends everything later.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]


def print_result(content: dict[str, Any], as_json: bool, lines: list[str]) -> None:
    """Print a command's result on standard output.

    Args:
        content: The result as a JSON dictionary.
        as_json: Whether to print `content` instead of `lines`.
        lines: The result as lines of text for people.
    """
    if as_json:
        print(json.dumps(content, indent=1))
    elif lines:
        print("\n".join(lines))


def exit_with(code: int) -> None:
    """End the command with an exit code; do nothing if it is 0."""
    if code:
        raise typer.Exit(code)


def print_note(text: str) -> None:
    """Print a message on standard error."""
    progress_console.print(text)


def combine_results(contents: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    """Combine the JSON results of several runs as a list under the key `name`. Return a single result unchanged."""
    return contents[0] if len(contents) == 1 else {name: list(contents)}


def compare_and_print(
    runs: Mapping[str, Path | InputError],
    folder: Path,
    as_json: bool,
    offline: bool,
    published: str | None = None,
    baseline: str | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """Compare runs, and print the tables if the result is not printed as JSON.

    Args:
        runs: Mapping from each run's name, as entered by the user, to the run's folder, or to the error that occurred
            when the run was looked up.
        folder: Output folder.
        as_json: Whether the command prints its result as JSON.
        offline: Whether to write nothing to MLflow.
        published: Task order of MTIL, I or II, whose published results are added to the tables.
        baseline: Label of the method to which the other methods are compared; for the default, see
            `orchestrate.analysis.compare.compare_runs`.

    Returns:
        The comparison as a JSON dictionary, and lines of text for people (see
        `orchestrate.analysis.compare.compare_runs`).
    """
    from orchestrate.analysis.compare import compare_runs

    return compare_runs(
        runs, folder, None if as_json else create_stdout_console(), published, baseline, None if offline else print_note
    )
