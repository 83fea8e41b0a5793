"""Wrappers of standard output and standard error, so that a run continues when its terminal or pipe is closed."""

import errno
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO

CLOSED_ERRNOS = (errno.EPIPE, errno.EIO, errno.ENXIO)  # a pipe without a reader, or a closed terminal


class TolerantStream:
    """A text stream that discards its output after its terminal was closed or the reader of its pipe has exited."""

    def __init__(self, stream: TextIO, optional: bool) -> None:
        """Wrap a stream.

        Args:
            stream: The stream to write to.
            optional: Whether to discard output after any error of the operating system, for example a full disk.
        """
        self._stream, self._optional = stream, optional

    def write(self, text: str) -> int:
        """Write a text, or discard it.

        Args:
            text: The text.

        Returns:
            The number of characters of the text.
        """
        try:
            return self._stream.write(text)
        except OSError as error:
            self._drop(error)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write texts, or discard them."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush the stream, or discard the content of its buffer."""
        try:
            self._stream.flush()
        except OSError as error:
            self._drop(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _drop(self, error: OSError) -> None:
        if error.errno in CLOSED_ERRNOS:
            # Redirect the file descriptor: Python flushes its buffer to it at exit, and libraries write to it directly.
            with suppress(OSError, ValueError), open(os.devnull, "wb") as null:  # noqa: PTH123
                os.dup2(null.fileno(), self._stream.fileno())
        elif not self._optional:
            raise error


@contextmanager
def tolerate_closed_streams() -> Iterator[None]:
    """Context manager: discard standard output and standard error after the terminal or pipe is closed."""
    with ExitStack() as stack:
        if sys.stdout is not None:
            output: Any = TolerantStream(sys.stdout, optional=False)
            stack.callback(output.flush)
            stack.enter_context(redirect_stdout(output))
        if sys.stderr is not None:
            errors: Any = TolerantStream(sys.stderr, optional=True)
            stack.enter_context(redirect_stderr(errors))
        yield
