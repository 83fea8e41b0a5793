"""Names and listings of files."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from schemas.errors import did_you_mean

SYSTEM_FILES = frozenset({"thumbs.db", "desktop.ini"})  # of Windows; those of macOS begin with a dot


def is_hidden(name: str) -> bool:
    """Whether a file is hidden or the operating system's own: `.DS_Store`, `._*`, `__MACOSX/`, `Thumbs.db`, ….

    Args:
        name: with the folders that it is in, as a tar has it.
    """
    parts = [part for part in name.split("/") if part not in ("", ".", "..")]
    return not parts or parts[-1].lower() in SYSTEM_FILES or any(part[0] == "." or part == "__MACOSX" for part in parts)


def files_within(folder: Path) -> list[Path]:
    """The files of a folder at any depth, in the order of their paths; links are followed, hidden files are left out.

    Raises:
        OSError: a folder cannot be read.
    """
    return sorted(_files_within(folder, ()))


def _files_within(folder: Path, above: tuple[Path, ...]) -> Iterator[Path]:
    real = folder.resolve()
    if real in above:  # a link leads back to where it is
        return
    for path in folder.iterdir():
        if is_hidden(path.name):
            continue
        if path.is_dir():
            yield from _files_within(path, (*above, real))
        else:
            yield path


def did_you_mean_path(path: Path) -> str:
    """The end of a sentence about a path that is not there: what is called nearly so, if anything."""
    with suppress(OSError):
        return did_you_mean(path.name, [each.name for each in path.parent.iterdir()])
    return ""
