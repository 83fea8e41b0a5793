"""Standard output and standard error after the reader has closed them."""

import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from orchestrate.cli.output import TolerantStream, tolerate_closed_streams

MAIN = "from orchestrate.cli.main import main; main()"


def test_output_without_a_reader_is_dropped() -> None:
    read, write = os.pipe()
    os.close(read)
    with (
        os.fdopen(write, "w", buffering=1) as stream,
        redirect_stdout(stream),
        redirect_stderr(stream),
        tolerate_closed_streams(),
    ):
        for _ in range(3):
            print("a result", flush=True)
            print("progress", file=sys.stderr)


def test_a_full_disk_loses_progress_but_not_results() -> None:
    with Path("/dev/full").open("w", buffering=1) as stream:
        TolerantStream(stream, optional=True).write("progress\n")
        with pytest.raises(OSError, match="No space left"):
            TolerantStream(stream, optional=False).write("a result\n")
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # for what is still in its buffer


@pytest.mark.parametrize("arguments", [["schema"], ["run"]])
def test_exit_code_after_the_terminal_was_closed(arguments: list[str]) -> None:
    terminal, side = os.openpty()
    os.close(terminal)  # whoever writes to the other side gets an I/O error
    outcome = subprocess.run([sys.executable, "-c", MAIN, *arguments], stdout=side, stderr=side, check=False)
    os.close(side)
    assert outcome.returncode == (0 if arguments == ["schema"] else 2)


def test_a_closed_pipe_is_not_an_error() -> None:
    process = subprocess.Popen([sys.executable, "-c", MAIN, "schema"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 0
