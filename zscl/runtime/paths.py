"""Recursive listing of files, detection of hidden files, and suggestions for misspelt paths."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from schemas.errors import did_you_mean

SYSTEM_FILES = frozenset({"thumbs.db", "desktop.ini"})  # Windows; the system files of macOS begin with a dot


def is_hidden(name: str) -> bool:
    """Return whether a file is hidden or created by the operating system, such as `.DS_Store`, `._*` or `Thumbs.db`.

    Args:
        name: The file's name, or its path relative to a folder or in a tar file.

    Returns:
        `True` if the file should be ignored. This includes all files in hidden folders.
    """
    parts = [part for part in name.split("/") if part not in ("", ".", "..")]
    return not parts or parts[-1].lower() in SYSTEM_FILES or any(part[0] == "." or part == "__MACOSX" for part in parts)


def list_files(folder: Path) -> list[Path]:
    """List the files of a folder recursively, without hidden files. Symbolic links are followed.

    Args:
        folder: The folder to list.

    Returns:
        The files, sorted by path.
    """
    return sorted(_iter_files(folder, ()))


def _iter_files(folder: Path, parents: tuple[Path, ...]) -> Iterator[Path]:
    real = folder.resolve()
    if real in parents:  # a cycle of symbolic links
        return
    for path in folder.iterdir():
        if is_hidden(path.name):
            continue
        if path.is_dir():
            yield from _iter_files(path, (*parents, real))
        else:
            yield path


def did_you_mean_path(path: Path) -> str:
    """Format a suggestion for a path that does not exist: a similar name in the same folder.

    Args:
        path: The path that does not exist.

    Returns:
        The text `; did you mean 'NAME'?`, to be appended to a message; empty if no name is similar.
    """
    with suppress(OSError):
        return did_you_mean(path.name, [sibling.name for sibling in path.parent.iterdir()])
    return ""
