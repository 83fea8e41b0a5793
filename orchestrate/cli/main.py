"""The command line: one verb each. Nothing heavy is imported before a verb is known."""

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
from orchestrate.lifecycle.signals import end_on_signals
from schemas.base import expand_path
from schemas.errors import InputError, InterruptedRunError
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
UNUSABLE = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG, errno.ELOOP,
)  # fmt: skip
DATA_COMMANDS: tuple[Callable[..., None], ...] = (data.prepare, data.fetch, data.check)


def expanding(verb: Callable[..., None]) -> Callable[..., None]:
    """Have a verb get its paths with `~` and environment variables expanded, whatever the shell has left in them.

    Raises:
        InputError: when it is called, if a variable is not set, or there is no such user.
    """

    def expanded(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [expanded(name, each) for each in value]
        try:
            return Path(expand_path(str(value))) if isinstance(value, Path) else value
        except ValueError as error:
            raise InputError(f"{name}: {error}") from error

    @wraps(verb)
    def run(**arguments: Any) -> None:
        verb(**{name: expanded(name, value) for name, value in arguments.items()})

    return run


app = typer.Typer(
    help="Continual fine-tuning of CLIP that keeps its zero-shot ability, on Ray, recorded in MLflow.\n\n"
    "Example: zscl run experiments/embedded.yaml --set method=finetune",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=True,
)
data_app = typer.Typer(help="Make and look at data.", no_args_is_help=True, rich_markup_mode=None)


def _print_versions(asked: bool) -> None:
    if asked:
        from orchestrate.runs.versions import versions

        print("\n".join(f"{name:16}{version}" for name, version in versions().items()))
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_versions, is_eager=True, help="Print what a report of a bug needs, and exit."
        ),
    ] = False,
) -> None:
    """Take the options that go before a verb."""
    terminal.check_names_are_utf8()


for verb in COMMANDS:
    app.command()(expanding(verb))
for verb in DATA_COMMANDS:
    data_app.command()(expanding(verb))
app.add_typer(data_app, name="data")


@contextmanager
def _unusable_places_told() -> Iterator[None]:
    """Turn an error of the file system that no retry and no other code would mend into a sentence.

    Raises:
        InputError: naming the file, for one of the errors in `UNUSABLE`.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in UNUSABLE or error.filename is None:
            raise
        place = os.fsdecode(error.filename)
        raise InputError(
            f"{place}: cannot be read or written ({error.strerror}), expected another place, or rights to this one"
        ) from error


def main() -> None:
    """Run the command line; what the user got wrong is a sentence and exit code 2, not a traceback."""
    terminal.use_utf8_mode()
    terminal.replace_unencodable_characters()
    with tolerate_closed_streams():
        _main()


def _main() -> None:
    try:
        end_on_signals()
        with _unusable_places_told():
            app()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except InterruptedRunError as interrupt:
        print(f"interrupted: {interrupt}", file=sys.stderr)
        sys.exit(interrupt.exit_code)
    except Exception:  # a fault of ours: its traceback may be sent to us, so no secret may be in it
        print(mask(traceback.format_exc()), end="", file=sys.stderr)
        sys.exit(1)
