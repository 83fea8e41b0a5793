"""Terminal output in any locale: UTF-8 mode, replacement of unencodable characters, checks of file names, consoles."""

import codecs
import io
import locale
import os
import sys
from pathlib import Path

from rich.console import Console

from schemas.errors import ErrorCode, InputError

FILE_WIDTH = 200  # width of tables, in characters, if the output is a file or a pipe
MIN_TERMINAL_WIDTH = 80  # minimum width of tables, in characters; a narrower terminal wraps lines and cuts nothing
# ASCII replacements for the non-ASCII characters in the messages of zscl.
ASCII_REPLACEMENTS = {"–": "-", "—": "-", "−": "-", "→": ">", "·": ".", "…": "...", "±": "+-", "×": "x", "½": "/"}
ERROR_HANDLER = "zscl.plain"


def use_utf8_mode() -> None:
    """Restart Python in UTF-8 mode if the locale has another encoding.

    Recipes, class names, captions and MLflow's files are UTF-8. Terminal output keeps the locale's encoding.
    """
    encoding = locale.getencoding()
    if sys.flags.utf8_mode or codecs.lookup(encoding).name == "utf-8":
        return
    os.environ["PYTHONUTF8"] = "1"  # child processes inherit it
    os.environ.setdefault("PYTHONIOENCODING", f"{encoding}:backslashreplace")
    os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def replace_unencodable_characters() -> None:
    """Configure standard output and standard error to replace characters that their encoding cannot represent."""
    codecs.register_error(ERROR_HANDLER, _replace)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=ERROR_HANDLER)


def _replace(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    replaced = (
        ASCII_REPLACEMENTS.get(character) or character.encode("ascii", "backslashreplace").decode()
        for character in missing
    )
    return "".join(replaced), error.end


def check_names_are_utf8() -> None:
    """Check that the command's arguments and the current folder's name are UTF-8; JSON and SQLite store no other names.

    Raises:
        InputError: The current folder was deleted, or its name or an argument is not UTF-8.
    """
    try:
        current = str(Path.cwd())
    except FileNotFoundError as error:
        raise InputError(
            "the current folder was deleted; change to another folder with cd",
            code=ErrorCode.NOT_FOUND,
        ) from error
    for source, name in (("the current folder", current), *(("the arguments", name) for name in sys.argv[1:])):
        try:
            name.encode()
        except UnicodeEncodeError as error:
            shown = os.fsencode(name).decode("utf-8", "backslashreplace")
            raise InputError(
                f"{source}: found the name {shown}, expected UTF-8; rename it with mv",
                code=ErrorCode.INVALID_VALUE,
            ) from error


def create_stderr_console() -> Console:
    """Create the console for progress and notes. Markup and emoji codes are disabled, so that names print unchanged."""
    return Console(stderr=True, markup=False, emoji=False, highlight=False, soft_wrap=True)


def create_stdout_console() -> Console:
    """Create the console for tables, wide enough that no column is cut."""
    console = Console(markup=False, emoji=False, highlight=False)
    console.width = max(console.width, MIN_TERMINAL_WIDTH) if console.is_terminal else FILE_WIDTH
    return console
