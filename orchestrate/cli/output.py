"""Standard output and standard error whose reader may go away: a closed terminal or pipe does not end a run."""

import errno
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO

GONE = (errno.EPIPE, errno.EIO, errno.ENXIO)  # of a pipe without a reader, and of a terminal that is closed


class TolerantStream:
    """A text stream; once nobody reads it any more, what is written to it is dropped.

    Args:
        stream: where to write.
        optional: drop also what cannot be written for another reason, such as a full disk.
    """

    def __init__(self, stream: TextIO, optional: bool) -> None:
        self._stream, self._optional = stream, optional

    def write(self, text: str) -> int:
        """Write a text. Returns its length."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._drop(error)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write texts."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Have what was written on its way."""
        try:
            self._stream.flush()
        except OSError as error:
            self._drop(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _drop(self, error: OSError) -> None:
        if error.errno in GONE:
            # What is still in the buffer, and what libraries write to the descriptor, is dropped with it.
            with suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:  # noqa: PTH123
                os.dup2(nowhere.fileno(), self._stream.fileno())
        elif not self._optional:
            raise error


@contextmanager
def tolerate_closed_streams() -> Iterator[None]:
    """Bear it, while the block runs, that nobody reads standard output or standard error any more."""
    with ExitStack() as stack:
        if sys.stdout is not None:
            output: Any = TolerantStream(sys.stdout, optional=False)
            stack.callback(output.flush)
            stack.enter_context(redirect_stdout(output))
        if sys.stderr is not None:
            errors: Any = TolerantStream(sys.stderr, optional=True)
            stack.enter_context(redirect_stderr(errors))
        yield
