"""The command line `zscl`: its commands, expansion of paths in arguments, and exit codes.

Commands import torch, Ray and MLflow only when they are called, so that `zscl --help` is fast.
"""

import errno
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from orchestrate.cli import data, models, terminal
from orchestrate.cli.analysis import average, compare, evaluate, sync
from orchestrate.cli.output import tolerate_closed_streams
from orchestrate.cli.run import demo, embed, resume, run, schema, submit
from orchestrate.cli.search import search
from orchestrate.lifecycle.signals import exit_on_signals
from schemas.base import expand_path
from schemas.errors import ErrorCode, InputError, InterruptedRunError
from schemas.redaction import mask

COMMANDS: tuple[Callable[..., None], ...] = (  # in the order of `zscl --help`
    run,
    search,
    resume,
    embed,
    sync,
    compare,
    submit,
    evaluate,
    average,
    models.export,
    schema,
    models.pretrain,
    demo,
)
DATA_COMMANDS: tuple[Callable[..., None], ...] = (data.prepare, data.fetch, data.check)
# File system errors that the user has to fix. A retry does not help.
PATH_ERRNOS = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG, errno.ELOOP,
)  # fmt: skip


def expand_path_arguments(command: Callable[..., None]) -> Callable[..., None]:
    """Wrap a command so that `~` and environment variables in its path arguments are expanded.

    A shell does not expand `~` in every position, for example not in `--out=~/runs`.

    Args:
        command: The command's function.

    Returns:
        The wrapped function. It raises an `InputError` if a variable is not set or a user does not exist.
    """

    def expand(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [expand(name, item) for item in value]
        try:
            return Path(expand_path(str(value))) if isinstance(value, Path) else value
        except ValueError as error:
            raise InputError(f"{name}: {error}", code=ErrorCode.INVALID_VALUE) from error

    @wraps(command)
    def run_command(**arguments: Any) -> None:
        command(**{name: expand(name, value) for name, value in arguments.items()})

    return run_command


app = typer.Typer(
    help="Continual fine-tuning of CLIP that keeps its zero-shot ability, on Ray, recorded in MLflow.\n\n"
    "Example: zscl run experiments/embedded.yaml --set method=finetune",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=True,
)
data_app = typer.Typer(help="Prepare and check data.", no_args_is_help=True, rich_markup_mode=None)


def _print_versions(requested: bool) -> None:
    if requested:
        from orchestrate.runs.versions import collect_versions

        print("\n".join(f"{name:16}{version}" for name, version in collect_versions().items()))
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_versions, is_eager=True, help="Print the versions for a bug report, and exit."
        ),
    ] = False,
) -> None:
    """Handle the options that precede a command."""
    terminal.check_names_are_utf8()


for command in COMMANDS:
    app.command()(expand_path_arguments(command))
for command in DATA_COMMANDS:
    data_app.command()(expand_path_arguments(command))
app.add_typer(data_app, name="data")


@contextmanager
def _explain_path_errors() -> Iterator[None]:
    """Context manager: replace a file system error in `PATH_ERRNOS` by an `InputError` that names the file."""
    try:
        yield
    except OSError as error:
        if error.errno not in PATH_ERRNOS or error.filename is None:
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise InputError(
            f"{os.fsdecode(error.filename)}: cannot be read or written ({error.strerror}). Choose another path, or "
            "fix this one",
            code=ErrorCode.NO_SPACE if full else ErrorCode.NOT_WRITABLE,
        ) from error


def main() -> None:
    """Run the command line. After an `InputError`, print its message without a traceback, and exit with code 2."""
    terminal.use_utf8_mode()
    terminal.replace_unencodable_characters()
    with tolerate_closed_streams():
        _main()


def _main() -> None:
    try:
        exit_on_signals()
        with _explain_path_errors():
            app()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except InterruptedRunError as interrupt:
        print(f"interrupted: {interrupt}", file=sys.stderr)
        sys.exit(interrupt.exit_code)
    except Exception:  # internal error: users may publish the traceback, so it must not contain secrets
        print(mask(traceback.format_exc()), end="", file=sys.stderr)
        sys.exit(1)
