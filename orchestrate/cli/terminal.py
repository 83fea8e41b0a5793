"""Standard streams, locales and names of paths: none of them ends a command with a traceback."""

import codecs
import io
import locale
import os
import sys
from pathlib import Path

from rich.console import Console

from schemas.errors import InputError

WIDE = 200  # columns, where a table goes to a file or another program
NARROW = 80  # columns that a table gets on any terminal: a narrower terminal wraps lines, and nothing is cut
# ASCII for the characters that our own output uses.
PLAIN = {"–": "-", "—": "-", "−": "-", "→": ">", "·": ".", "…": "...", "±": "+-", "×": "x", "½": "/"}
ERRORS = "zscl.plain"


def use_utf8_mode() -> None:
    """Start Python again in UTF-8 mode where the locale has another encoding.

    Recipes, class names, captions and MLflow's files are UTF-8. Terminal output keeps the locale's encoding.
    """
    encoding = locale.getencoding()
    if sys.flags.utf8_mode or codecs.lookup(encoding).name == "utf-8":
        return
    os.environ["PYTHONUTF8"] = "1"  # for the processes that this one starts
    os.environ.setdefault("PYTHONIOENCODING", f"{encoding}:backslashreplace")
    os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def replace_unencodable_characters() -> None:
    """Let standard output and standard error replace the characters that their encoding does not have."""
    codecs.register_error(ERRORS, _plain)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=ERRORS)


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    escaped = (PLAIN.get(sign) or sign.encode("ascii", "backslashreplace").decode() for sign in missing)
    return "".join(escaped), error.end


def check_names_are_utf8() -> None:
    """Refuse arguments, and a current folder, whose names are no UTF-8: records in JSON and SQLite cannot hold them.

    Raises:
        InputError: naming the argument or the folder.
    """
    try:
        current = str(Path.cwd())
    except FileNotFoundError as error:
        raise InputError("the current folder: found it deleted, expected one that exists; cd to another one") from error
    for what, name in (("the current folder", current), *(("the arguments", name) for name in sys.argv[1:])):
        try:
            name.encode()
        except UnicodeEncodeError as error:
            shown = os.fsencode(name).decode("utf-8", "backslashreplace")
            raise InputError(
                f"{what}: found {shown}, a name with bytes that are no UTF-8, expected UTF-8; rename it (mv)"
            ) from error


def stderr_console() -> Console:
    """Make the console for progress and remarks. Names are shown as they are: no markup, no emoji codes."""
    return Console(stderr=True, markup=False, emoji=False, highlight=False, soft_wrap=True)


def stdout_console() -> Console:
    """Make the console for tables. No column is cut where no terminal ends."""
    console = Console(markup=False, emoji=False, highlight=False)
    console.width = max(console.width, NARROW) if console.is_terminal else WIDE
    return console
