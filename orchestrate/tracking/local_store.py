"""SQLite tracking stores: the artifact folder next to the database, and its location after both are moved.

MLflow records the artifact locations of experiments, runs and models as absolute paths. After a project's folder is
moved or copied, MLflow would still read and write at the old paths.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

ARTIFACT_FOLDER = "mlflow-artifacts"
LOCATION_COLUMNS = (  # the tables and columns with artifact locations; not every version of MLflow has all of them
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)


def artifact_folder(file: Path) -> Path:
    """Return the folder of an SQLite store's artifacts."""
    return file.parent / ARTIFACT_FOLDER


def current_artifact_uri(location: str, file: Path | None) -> str:
    """Return the current location of artifacts, even if their store and its artifact folder were moved together.

    The location that the store records is not changed.

    Args:
        location: The artifact path or URI that the store records.
        file: The store's SQLite file; `None` for any other store.

    Returns:
        A URI in the store's current artifact folder, or `location` if the artifacts were not moved.
    """
    recorded = _path(location)
    root = next((parent for parent in recorded.parents if parent.name == ARTIFACT_FOLDER), None)
    if file is None or root is None or not _is_local(location) or not _is_outdated(str(root), artifact_folder(file)):
        return location
    return (artifact_folder(file) / recorded.relative_to(root)).as_uri()


def relocate_artifacts(file: Path) -> None:
    """Update the artifact locations that an SQLite store records, if it was moved together with its artifact folder.

    A location is changed only if `zscl` chose it, and if the artifacts were moved with the store, or no longer exist at
    the old location.

    Args:
        file: The store's SQLite file. If it does not exist, nothing is done.

    Raises:
        OSError: The store cannot be read or written.
    """
    if not file.is_file():
        return
    try:
        with closing(sqlite3.connect(file)) as connection, connection:  # one transaction
            _update_locations(connection, artifact_folder(file))
    except sqlite3.Error as error:
        raise OSError(f"{file}: {error}") from error


def _update_locations(connection: sqlite3.Connection, folder: Path) -> None:
    outdated = [location for location in _experiment_locations(connection) if _is_outdated(location, folder)]
    for table, column in LOCATION_COLUMNS if outdated else ():
        if column not in _columns(connection, table):
            continue
        for location in outdated:
            connection.execute(
                f"UPDATE {table} SET {column} = :new || substr({column}, length(:old) + 1) "
                f"WHERE {column} = :old OR substr({column}, 1, length(:old) + 1) = :old || '/'",
                {"new": folder.as_uri(), "old": location},
            )


def _experiment_locations(connection: sqlite3.Connection) -> Iterator[str]:
    """Yield the local artifact locations that a store records for its experiments. Remote locations are omitted."""
    if _columns(connection, "experiments"):
        for [location] in connection.execute("SELECT DISTINCT artifact_location FROM experiments"):
            if location and _is_local(location):
                yield location


def _columns(connection: sqlite3.Connection, table: str) -> set[str]:
    return {column[1] for column in connection.execute(f"PRAGMA table_info({table})")}


def _is_outdated(location: str, folder: Path) -> bool:
    """Return whether a recorded location is the artifact folder that a store had before the store was moved.

    Args:
        location: The recorded artifact location.
        folder: The store's current artifact folder.
    """
    recorded = _path(location)
    if recorded.name != ARTIFACT_FOLDER or recorded == folder:
        return False
    try:
        return not recorded.exists() or (folder.exists() and not recorded.samefile(folder))
    except OSError:  # the path is not accessible, for example in a folder of another user
        return False


def _is_local(location: str) -> bool:
    return location.startswith("file:") or "://" not in location


def _path(location: str) -> Path:
    return Path(url2pathname(urlsplit(location).path if location.startswith("file:") else location))
