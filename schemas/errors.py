"""Errors that users see, and the phrases of their messages."""

import shlex
from collections.abc import Iterable, Sequence
from difflib import get_close_matches

from schemas.redaction import mask

MOST_PROBLEMS = 20  # named in one answer


LONGEST_LINE = 2_000  # characters of a sentence


LONGEST_PATH, LONGEST_NAME = 4_000, 255  # of what a file system takes, in bytes


class InputError(ValueError):
    """Something the user gave is wrong: one sentence that names it, what was found and what was expected.

    The command line prints the sentence and exits with code 2. Every other exception is a fault of ours and
    keeps its traceback. Whatever it names, secrets are masked and nothing that steers a terminal is left in it: it
    may be shown, written down and recorded as it is.
    """

    def __init__(self, sentence: str) -> None:
        plain = "".join(
            sign if sign.isprintable() or sign == "\n" else "\N{REPLACEMENT CHARACTER}" for sign in sentence
        )
        super().__init__("\n".join(map(_readable, mask(plain).split("\n"))))


def _readable(line: str) -> str:
    """A line that somebody can read: the middle is left out of one that goes on for pages."""
    return line if len(line) <= LONGEST_LINE else f"{line[: LONGEST_LINE * 2 // 3]} … {line[-LONGEST_LINE // 3 :]}"


class InterruptedRunError(BaseException):
    """A run was stopped from outside. The command line says how to go on and exits with 128 + the signal's number.

    Like KeyboardInterrupt, it is no Exception: a signal may come while a decoder's or a library's errors are caught.
    """

    def __init__(self, how_to_go_on: str, exit_code: int) -> None:
        super().__init__(how_to_go_on)
        self.exit_code = exit_code


def command(*words: object) -> str:
    """Return a command as a user can type or paste it: quoted for a shell, without secrets."""
    return shlex.join(mask(str(word)) for word in words)


def one_line(error: object) -> str:
    """Return an error's message as part of a sentence, whole: the cause often stands at its end."""
    return " ".join(str(error).split()) or type(error).__name__


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """The end of a sentence that guesses what was meant; empty where nothing known is like it."""
    nearest = get_close_matches(given, known, n=1)
    return f"; did you mean '{nearest[0]}'?" if nearest else ""


NAMED = 5  # in a sentence


def listed(names: Sequence[str], one: str, many: str = "") -> str:
    """How many there are, and the first names."""
    more = ", …" if len(names) > NAMED else ""
    return f"{counted(len(names), one, many)} ({', '.join(names[:NAMED])}{more})"


def counted(number: int, one: str, many: str = "") -> str:
    """A number and its noun."""
    return f"{number} {one if number == 1 else many or one + 's'}"
