"""Errors that users see, and the phrases of their messages."""

import shlex
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from enum import StrEnum

from schemas.redaction import mask

MOST_PROBLEMS = 20  # in one message
LONGEST_LINE = 2_000  # characters of a message's line
LONGEST_PATH = 4_000  # bytes that a file system accepts
LONGEST_NAME = 255  # bytes of one part of a path


class ErrorCode(StrEnum):
    """Stable codes of `InputError`: what kind of mistake it is, whatever the wording of the message."""

    INVALID_VALUE = "invalid-value"  # a value of the wrong type, or outside the allowed values
    UNKNOWN_NAME = "unknown-name"  # a field, option, class, task, model or dataset of that name does not exist
    MISSING_VALUE = "missing-value"  # a required setting, option or column is absent
    CONFLICT = "conflict"  # settings or options that exclude each other
    UNUSED_SETTING = "unused-setting"  # a setting that nothing would read
    DUPLICATE = "duplicate"  # a name, label or file that must be unique occurs more than once
    NOT_FOUND = "not-found"  # a file, folder, shard, run or remote object does not exist
    EMPTY = "empty"  # a file, folder, split or set without usable content
    UNREADABLE = "unreadable"  # damaged content, or a format that cannot be parsed
    MISMATCH = "mismatch"  # content that differs from a manifest, a size, a hash, a shape or another file
    BROKEN_SAMPLES = "broken-samples"  # more unusable samples than `compute.max_broken_share` allows
    UNSUPPORTED = "unsupported"  # a valid input that this operation does not support
    OTHER_RUN = "other-run"  # a folder or file of another run, search or experiment
    OTHER_ALGORITHM = "other-algorithm"  # results of another version of the algorithm
    IN_USE = "in-use"  # another process holds the lock
    NOT_WRITABLE = "not-writable"  # a file or folder that cannot be read or written by this user
    NO_SPACE = "no-space"  # a disk or a quota is full
    NO_RESOURCES = "no-resources"  # a cluster or machine without the requested CPUs, GPUs or memory
    UNREACHABLE = "unreachable"  # a server, cluster or bucket does not answer
    REJECTED = "rejected"  # a server answered with an error, such as missing rights
    MISSING_PACKAGE = "missing-package"  # an optional dependency is not installed
    CUSTOM_CODE = "custom-code"  # code that the recipe names raised an error or returned a wrong type
    NOT_FINITE = "not-finite"  # NaN or Inf in losses, gradients, weights or features
    FAILED = "failed"  # one or more of several items failed; the message lists them


class InputError(ValueError):
    """An error in the user's input: one message that names the input, what was found and what was expected.

    The command line prints the message and exits with code 2. Every other exception is an internal error and keeps
    its traceback. Secrets are masked and control characters are replaced, so that the message can be printed, stored
    and recorded unchanged.

    Attributes:
        code: What kind of mistake it is. Codes are stable; the wording of messages is not.
        field: The recipe's field, the option or the file that is wrong, if there is one.
    """

    def __init__(self, sentence: str, *, code: ErrorCode = ErrorCode.INVALID_VALUE, field: str | None = None) -> None:
        """Mask and clean the message.

        Args:
            sentence: The message; it may have several lines.
            code: What kind of mistake it is.
            field: The recipe's field, the option or the file that is wrong.
        """
        self.code, self.field = code, field
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
