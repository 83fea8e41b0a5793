"""Atomic writes of files and folders, hard-linked copies of folders, and quarantine of damaged files."""

import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

MAX_TEMPORARY_NAME_BYTES = 200  # of the target's name; a file system allows 255 with prefix and suffix
QUARANTINE_PREFIX = "damaged-"


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Write a folder atomically: other processes see the old folder, or the complete new one.

    An existing folder is renamed first, and deleted only after the new folder has its name.

    Args:
        folder: The folder to create or to replace.

    Yields:
        A temporary folder, which replaces `folder` at the end of the block, and is deleted if the block fails.

    Raises:
        OSError: The temporary folder cannot be renamed to `folder`; the old folder is restored.
    """
    temporary, backup = _temporary_path(folder), _temporary_path(folder)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.rglob("*"):
            _fsync(file)
        if folder.is_dir() and not folder.is_symlink():
            folder.rename(backup)
        try:
            temporary.rename(folder)
        except OSError:
            with suppress(OSError):
                backup.rename(folder)
            raise
        _fsync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(backup, ignore_errors=True)


@contextmanager
def atomic_file(file: Path) -> Iterator[Path]:
    """Write a file atomically: other processes see the old file, or the complete new one.

    Args:
        file: The file to create or to replace. Missing parent folders are created.

    Yields:
        The path of a temporary file, which replaces `file` at the end of the block, and is deleted if the block fails.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_path(file)
    try:
        yield temporary
        _fsync(temporary)
        temporary.replace(file)
        _fsync(file.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _temporary_path(path: Path) -> Path:
    """Return a path with a random name in the folder of `path`, so that no other process or machine uses it."""
    name = os.fsdecode(os.fsencode(path.name)[:MAX_TEMPORARY_NAME_BYTES])
    return path.with_name(f".{name}.{secrets.token_hex(4)}.partial")


def _fsync(path: Path) -> None:
    """Flush a file's content or a folder's entries to the disk, so that they survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(file: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8."""
    with atomic_file(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def remove_if_possible(file: Path) -> None:
    """Remove a file if it exists, and ignore errors of the file system."""
    with suppress(OSError):
        file.unlink(missing_ok=True)


def quarantine(path: Path) -> Path | None:
    """Rename a damaged file or folder, so that it can be replaced without loss of its content.

    Args:
        path: The damaged file or folder.

    Returns:
        The new path; `None` if the file or folder no longer exists.
    """
    target = path.with_name(f"{QUARANTINE_PREFIX}{secrets.token_hex(4)}-{path.name}")
    try:
        path.rename(target)
    except FileNotFoundError:
        return None
    return target


def link_folder(
    source: Path, target: Path, replacements: Mapping[str, str] | None = None, exclude: Sequence[str] = ()
) -> None:
    """Copy a folder atomically, with hard links instead of copied files. Files are copied if links are unsupported.

    Args:
        source: The existing folder.
        target: The folder to create.
        replacements: New contents, by file name. The files with these names are written instead of linked.
        exclude: Names or glob patterns of files that are omitted.
    """
    with atomic_folder(target) as temporary:
        ignore = shutil.ignore_patterns(*exclude)
        shutil.copytree(source, temporary, copy_function=_link_or_copy, dirs_exist_ok=True, ignore=ignore)
        for name, content in (replacements or {}).items():
            write_text(temporary / name, content)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copy2(source, target)
