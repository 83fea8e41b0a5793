"""An SQLite store of MLflow's and the artefacts beside it, which may be moved together.

MLflow records where artefacts lie as absolute locations: of an experiment, of each run and of each model. After a
project's folder was moved or copied, it would still read and write at the old place.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

ARTEFACTS = "mlflow-artifacts"
LOCATIONS = (  # table and column, as far as a version of MLflow has them
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)


def artefacts_beside(file: Path) -> Path:
    """Return the folder of an SQLite store's artefacts."""
    return file.parent / ARTEFACTS


def artefacts_now(location: str, file: Path | None) -> str:
    """Return where artefacts lie now, without a change to the store: beside it, where it was moved with them.

    Args:
        location: What the store says.
        file: Of the store, if it is an SQLite file.
    """
    recorded = _path(location)
    root = next((each for each in recorded.parents if each.name == ARTEFACTS), None)
    if file is None or root is None or not _is_local(location) or not _was_left(str(root), artefacts_beside(file)):
        return location
    return (artefacts_beside(file) / recorded.relative_to(root)).as_uri()


def follow_artefacts(file: Path) -> None:
    """Have a store that was moved name its artefacts where they lie now: beside it.

    Only locations change that `zscl` chose, in the folder beside the store, and only if the artefacts came along or are
    gone from where they were.

    Args:
        file: of the store; it need not exist.

    Raises:
        OSError: the store cannot be read or written.
    """
    if not file.is_file():
        return
    try:
        with closing(sqlite3.connect(file)) as store, store:  # a transaction: all or nothing
            _follow(store, artefacts_beside(file))
    except sqlite3.Error as error:
        raise OSError(f"{file}: {error}") from error


def _follow(store: sqlite3.Connection, here: Path) -> None:
    left = [location for location in _locations(store) if _was_left(location, here)]
    for table, column in LOCATIONS if left else ():
        if column not in _columns(store, table):
            continue
        for location in left:
            store.execute(
                f"UPDATE {table} SET {column} = :new || substr({column}, length(:old) + 1) "
                f"WHERE {column} = :old OR substr({column}, 1, length(:old) + 1) = :old || '/'",
                {"new": here.as_uri(), "old": location},
            )


def _locations(store: sqlite3.Connection) -> Iterator[str]:
    """Give where the experiments of a store have their artefacts, if it has any experiments yet."""
    if _columns(store, "experiments"):
        for [location] in store.execute("SELECT DISTINCT artifact_location FROM experiments"):
            if location and _is_local(location):
                yield location


def _columns(store: sqlite3.Connection, table: str) -> set[str]:
    return {column[1] for column in store.execute(f"PRAGMA table_info({table})")}


def _was_left(location: str, here: Path) -> bool:
    """Whether a location is that of a store's artefacts before the store came to lie where it lies now."""
    recorded = _path(location)
    if recorded.name != ARTEFACTS or recorded == here:
        return False
    try:
        is_there = recorded.exists()
        return not is_there or (here.exists() and not recorded.samefile(here))
    except OSError:  # below a folder of another user: nobody knows
        return False


def _is_local(location: str) -> bool:
    return location.startswith("file:") or "://" not in location


def _path(location: str) -> Path:
    return Path(url2pathname(urlsplit(location).path if location.startswith("file:") else location))
