"""The command line: one verb each. Nothing heavy is imported before a verb is known."""

import sys
import traceback
from collections.abc import Callable
from typing import Annotated

import typer

from orchestrate.commands import data, looking, models, running
from orchestrate.interruption import end_on_signals
from orchestrate.output import readers_may_go
from schemas.base import InputError, InterruptedRunError
from schemas.secrets import mask

VERBS: tuple[Callable[..., None], ...] = (  # in the order of `zscl --help`
    running.run,
    running.search,
    running.resume,
    running.embed,
    looking.sync,
    looking.compare,
    running.submit,
    looking.evaluate,
    looking.average,
    models.export,
    running.schema,
    models.pretrain,
    running.demo,
)
VERBS_OF_DATA: tuple[Callable[..., None], ...] = (data.prepare, data.fetch, data.check)

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
        from orchestrate.versions import versions

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


for verb in VERBS:
    app.command()(verb)
for verb in VERBS_OF_DATA:
    data_app.command()(verb)
app.add_typer(data_app, name="data")


def main() -> None:
    """Run the command line; what the user got wrong is a sentence and exit code 2, not a traceback."""
    with readers_may_go():
        _main()


def _main() -> None:
    try:
        end_on_signals()
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
