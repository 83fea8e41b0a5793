"""Writes that are whole or not there, and storage that comes back."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import pairwise
from pathlib import Path

import pytest

from zscl.files import patiently, whole_file, whole_folder, write_text


def half(write: Callable[[Path], AbstractContextManager[Path]], path: Path) -> None:
    """Begin to write a file, or a file in a folder, and fail."""
    with write(path) as temporary:
        (temporary / "file" if temporary.is_dir() else temporary).write_text("half")
        raise OSError("full")


@pytest.mark.parametrize("write", [whole_file, whole_folder])
def test_a_write_that_fails_leaves_what_was_there(
    tmp_path: Path, write: Callable[[Path], AbstractContextManager[Path]]
) -> None:
    write_text(tmp_path / "before", "before")
    with pytest.raises(OSError, match="full"):
        half(write, tmp_path / "before")
    assert [path.name for path in tmp_path.iterdir()] == ["before"]
    assert (tmp_path / "before").read_text() == "before"


def test_storage_that_comes_back_takes_what_waits(tmp_path: Path) -> None:
    attempts = []

    def write() -> str:
        attempts.append(time.monotonic())
        if len(attempts) < 4:
            raise OSError("away")
        return "written"

    assert patiently(write) == "written"
    pauses = [later - earlier for earlier, later in pairwise(attempts)]
    assert pauses == sorted(pauses)  # longer and longer


def test_patience_ends(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        patiently(lambda: (tmp_path / "away").read_text(), seconds=0.3)


def test_what_is_no_fault_of_storage_is_not_tried_again() -> None:
    attempts = []

    def fail() -> None:
        attempts.append(1)
        raise ValueError("no matter of storage")

    with pytest.raises(ValueError, match="no matter"):
        patiently(fail)
    assert attempts == [1]


def test_a_name_as_long_as_a_file_system_takes_is_written_as_a_whole(tmp_path: Path) -> None:
    for name in ("n" * 255, "\u00fc" * 127):
        write_text(tmp_path / name, "words")
        assert (tmp_path / name).read_text() == "words"
        with whole_folder(tmp_path / f"{name[:-1]}x") as temporary:
            assert temporary.is_dir()
    assert not list(tmp_path.glob(".*"))
