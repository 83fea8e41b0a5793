"""Writes that are whole or not there, names that are nearly right, and digests."""

import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

LONGEST_BESIDE = 200  # bytes of a name that are part of a temporary one's
ASIDE = "damaged-"  # begins the names of what is set aside


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Give a temporary folder that takes `folder`'s place when the block ends, and vanishes when it fails.

    What was at `folder` before is moved aside, and removed only when the new folder is in its place.
    """
    temporary, before = _beside(folder), _beside(folder)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.rglob("*"):
            _flush(file)
        if folder.is_dir() and not folder.is_symlink():
            folder.rename(before)
        try:
            temporary.rename(folder)
        except OSError:
            with suppress(OSError):
                before.rename(folder)
            raise
        _flush(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(before, ignore_errors=True)


@contextmanager
def atomic_file(file: Path) -> Iterator[Path]:
    """Give a temporary file that takes `file`'s place when the block ends, and vanishes when it fails."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(file)
    try:
        yield temporary
        _flush(temporary)
        temporary.replace(file)
        _flush(file.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    """A name that no other process takes, on whatever machine."""
    name = os.fsdecode(os.fsencode(path.name)[:LONGEST_BESIDE])  # a file system takes 255 bytes
    return path.with_name(f".{name}.{secrets.token_hex(4)}.partial")


def _flush(path: Path) -> None:
    """Have a file's content, or a folder's names, on the disk: a machine may lose its power, too."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(file: Path, text: str) -> None:
    """Write a text file as a whole."""
    with atomic_file(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def remove_quietly(file: Path) -> None:
    """Remove a file, if it is there and storage lets us: what is left behind does no harm."""
    with suppress(OSError):
        file.unlink(missing_ok=True)


def quarantine(path: Path) -> Path | None:
    """Rename a damaged file or folder, so that another can be made and nothing is lost.

    Args:
        path: what is damaged.

    Returns:
        Where it lies now; nothing where it is gone.
    """
    aside = path.with_name(f"{ASIDE}{secrets.token_hex(4)}-{path.name}")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return None
    return aside


def link_folder(
    source: Path, target: Path, changed: Mapping[str, str] | None = None, without: Sequence[str] = ()
) -> None:
    """Let a folder's files be found elsewhere, too, as a whole: linked, or copied where the file system cannot.

    Args:
        source: the folder.
        target: where else.
        changed: content of files that are others there.
        without: names, or patterns of names, that are left out.
    """
    with atomic_folder(target) as temporary:
        left_out = shutil.ignore_patterns(*without)
        shutil.copytree(source, temporary, copy_function=_link_or_copy, dirs_exist_ok=True, ignore=left_out)
        for name, content in (changed or {}).items():
            write_text(temporary / name, content)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        shutil.copy2(source, target)
