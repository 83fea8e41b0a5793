"""User-facing errors with stable codes, and helpers that format their messages."""

import shlex
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from enum import StrEnum

from schemas.redaction import mask

MAX_PROBLEMS = 20  # problems in one message
MAX_LINE_LENGTH = 2_000  # characters of a message's line
MAX_PATH_BYTES = 4_000  # bytes that a file system accepts
MAX_NAME_BYTES = 255  # bytes of one part of a path


class ErrorCode(StrEnum):
    """Stable codes of `InputError`.

    A code names the kind of mistake and does not change if the message is reworded.
    """

    INVALID_VALUE = "invalid-value"  # a value of the wrong type, or outside the allowed values
    UNKNOWN_NAME = "unknown-name"  # a field, option, class, task, model or dataset of that name does not exist
    MISSING_VALUE = "missing-value"  # a required setting, option or column is absent
    CONFLICT = "conflict"  # settings or options that exclude each other
    UNUSED_SETTING = "unused-setting"  # a setting that has no effect
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
        code: The kind of mistake.
        field: The recipe field or command-line option that is wrong; `None` if the error concerns neither.
    """

    def __init__(self, message: str, *, code: ErrorCode = ErrorCode.INVALID_VALUE, field: str | None = None) -> None:
        """Mask secrets in the message and replace control characters.

        Args:
            message: The message; it may have several lines.
            code: The kind of mistake.
            field: The recipe field or command-line option that is wrong.
        """
        self.code, self.field = code, field
        printable = "".join(
            character if character.isprintable() or character == "\n" else "\N{REPLACEMENT CHARACTER}"
            for character in message
        )
        super().__init__("\n".join(map(_shorten_line, mask(printable).split("\n"))))


def _shorten_line(line: str) -> str:
    """Replace the middle of a line with … if the line is longer than `MAX_LINE_LENGTH`."""
    if len(line) <= MAX_LINE_LENGTH:
        return line
    return f"{line[: MAX_LINE_LENGTH * 2 // 3]} … {line[-MAX_LINE_LENGTH // 3 :]}"


class InterruptedRunError(BaseException):
    """A signal stopped the run. The command line prints how to resume and exits with 128 + the signal's number.

    The class derives from BaseException, like KeyboardInterrupt, so that `except Exception` does not catch it.

    Attributes:
        exit_code: The exit code of the process.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def shell_command(*words: object) -> str:
    """Format a command so that a user can paste it into a shell. Words are quoted, and secrets are masked."""
    return shlex.join(mask(str(word)) for word in words)


def one_line(error: object) -> str:
    """Format an error's message as one line. If the message is empty, return the name of the error's class."""
    return " ".join(str(error).split()) or type(error).__name__


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """Format a suggestion for a misspelt name, to be appended to a message.

    Args:
        name: The name that does not exist.
        candidates: The names that exist.

    Returns:
        The text `; did you mean 'CANDIDATE'?`, or an empty string if no candidate is similar.
    """
    nearest = get_close_matches(name, candidates, n=1)
    return f"; did you mean '{nearest[0]}'?" if nearest else ""


MAX_LISTED = 5  # names in a message


def format_names(names: Sequence[str], singular: str, plural: str = "") -> str:
    """Format the number of names and the first `MAX_LISTED` names: `7 classes (a, b, c, d, e, …)`.

    Args:
        names: The names.
        singular: The noun in the singular.
        plural: The noun in the plural; default: `singular` with an s.

    Returns:
        A phrase for a message.
    """
    more = ", …" if len(names) > MAX_LISTED else ""
    return f"{format_count(len(names), singular, plural)} ({', '.join(names[:MAX_LISTED])}{more})"


def format_count(number: int, singular: str, plural: str = "") -> str:
    """Format a number with a noun: `1 shard`, `2 shards`. The default plural is `singular` with an s."""
    return f"{number} {singular if number == 1 else plural or singular + 's'}"
