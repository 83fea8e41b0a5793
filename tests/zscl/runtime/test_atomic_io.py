"""Atomic writes of files and folders, quarantine and linked folders."""

import errno
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from zscl.runtime.atomic_io import (
    QUARANTINE_PREFIX,
    atomic_file,
    atomic_folder,
    link_folder,
    quarantine,
    remove_if_possible,
    write_text,
)


def fail_halfway(write: Callable[[Path], AbstractContextManager[Path]], path: Path) -> None:
    """Write a part of a file, or of a file in a folder, and fail."""
    with write(path) as temporary:
        (temporary / "file" if temporary.is_dir() else temporary).write_text("half")
        raise OSError("full")


@pytest.mark.parametrize("write", [atomic_file, atomic_folder])
def test_a_failed_write_keeps_the_old_content(
    tmp_path: Path, write: Callable[[Path], AbstractContextManager[Path]]
) -> None:
    write_text(tmp_path / "before", "before")
    with pytest.raises(OSError, match="full"):
        fail_halfway(write, tmp_path / "before")
    assert [path.name for path in tmp_path.iterdir()] == ["before"]
    assert (tmp_path / "before").read_text() == "before"


def test_the_old_folder_is_restored_if_the_rename_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "folder/file", "before")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if target == tmp_path / "folder" and (self / "file").read_text() == "after":
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)

    def replace() -> None:
        with atomic_folder(tmp_path / "folder") as temporary:
            (temporary / "file").write_text("after")

    with pytest.raises(OSError, match="Input/output"):
        replace()
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert (tmp_path / "folder/file").read_text() == "before"


def test_names_of_the_maximum_length(tmp_path: Path) -> None:
    for name in ("n" * 255, "\u00fc" * 127):
        write_text(tmp_path / name, "words")
        assert (tmp_path / name).read_text() == "words"
        with atomic_folder(tmp_path / f"{name[:-1]}x") as temporary:
            assert temporary.is_dir()
    assert not list(tmp_path.glob(".*"))


def test_quarantine_renames_a_damaged_folder(tmp_path: Path) -> None:
    write_text(tmp_path / "cache/file", "damaged")
    target = quarantine(tmp_path / "cache")
    assert target is not None
    assert target.name.startswith(QUARANTINE_PREFIX)
    assert [path.name for path in tmp_path.iterdir()] == [target.name]
    assert (target / "file").read_text() == "damaged"
    assert quarantine(tmp_path / "cache") is None


def test_linked_folder_shares_files_except_replacements(tmp_path: Path) -> None:
    for file in ("model/weights", "result.json", "checkpoint.pt"):
        write_text(tmp_path / "source" / file, "original")
    link_folder(tmp_path / "source", tmp_path / "target", {"result.json": "replaced"}, exclude=["*.pt"])
    target = tmp_path / "target"
    assert sorted(path.name for path in target.rglob("*")) == ["model", "result.json", "weights"]
    assert (target / "model/weights").samefile(tmp_path / "source/model/weights")
    assert (target / "result.json").read_text() == "replaced"
    assert (tmp_path / "source/result.json").read_text() == "original"


def test_files_are_copied_if_links_are_unsupported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: str, target: str) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    write_text(tmp_path / "source/file", "content")
    monkeypatch.setattr(os, "link", fail)
    link_folder(tmp_path / "source", tmp_path / "target")
    assert (tmp_path / "target/file").read_text() == "content"
    assert not (tmp_path / "target/file").samefile(tmp_path / "source/file")


def test_removal_ignores_a_missing_file_and_errors(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "content")
    for path in (tmp_path / "file", tmp_path / "file", tmp_path):
        remove_if_possible(path)
    assert list(tmp_path.iterdir()) == []
