"""Default paths: run folders, files of a search's folder, MLflow's tracking URI; checks that a folder is writable."""

import errno
import os
import shutil
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from schemas.errors import ErrorCode, InputError, shell_command
from schemas.experiment import Experiment
from schemas.redaction import MASK, mask

SQLITE_PREFIX = "sqlite:///"
RUN_LEVELS = ("sequence", "trial")  # the levels of MLflow runs that have a run's folder
MAX_NAME_BYTES = 200  # of a folder's name: lock files and temporary files next to the folder have longer names
# Files in a search's folder: its recipe, its identity, its result, and the recipe of the chosen trial.
SEARCH, FINGERPRINT, SEARCH_RESULT, CHOSEN_RECIPE = "search.yaml", "fingerprint", "search.json", "chosen.yaml"


def run_folder(experiment: Experiment, fingerprint: str, out: Path | None, name: str) -> Path:
    """Return the folder of a run. By default it depends on the fingerprint, so that the same experiment is resumed.

    Args:
        experiment: The run's experiment.
        fingerprint: The experiment's fingerprint.
        out: The folder that the user chose, or `None`.
        name: The run's subfolder in `out`; empty if `out` is for a single run.

    Returns:
        An absolute path.
    """
    if out is not None:
        return out.absolute() / name
    method = experiment.method.name.replace("*", "-star")
    return Path.cwd() / "runs" / f"{experiment.name}-{method}-{fingerprint[:8]}"


@dataclass(frozen=True)
class SearchIdentity:
    """The identity of a search, which is independent of its folder.

    Attributes:
        fingerprint: The search's fingerprint.
        algorithm: The version of the algorithm that computed it; empty in a folder from before versions.
        started_ms: The start, in Unix milliseconds; `None` in such a folder.
    """

    fingerprint: str
    algorithm: str = ""
    started_ms: int | None = None

    def __str__(self) -> str:
        return f"{self.fingerprint} {self.algorithm} {self.started_ms}"


def read_search_identity(folder: Path) -> SearchIdentity:
    """Read a search's identity from its folder."""
    fingerprint, *rest = (folder / FINGERPRINT).read_text(encoding="utf-8").split()
    return SearchIdentity(fingerprint, rest[0], int(rest[1])) if rest else SearchIdentity(fingerprint)


def check_writable(folder: Path, advice: str = "choose another place with --out") -> None:
    """Check that a folder can be created and written. Nothing is created.

    Args:
        folder: An absolute path; it need not exist.
        advice: What the user can do, for the error message.

    Raises:
        InputError: The folder cannot be created or written.
    """
    existing = folder
    try:
        _check_name_lengths(folder)
        existing = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
        _check_existing(existing)
    except OSError as error:
        cause = error.strerror if existing == folder else f"{existing}: {error.strerror}"
        raise InputError(
            f"{folder}: cannot be written ({cause}), expected a folder that this user may write; {advice}",
            code=ErrorCode.NOT_WRITABLE,
        ) from error


def _check_name_lengths(folder: Path) -> None:
    """Raise OSError if a part of the path, or the whole path, is too long for the file system."""
    for part in folder.parts:
        if len(os.fsencode(part)) > MAX_NAME_BYTES:
            raise OSError(
                errno.ENAMETOOLONG,
                f"a name of {len(os.fsencode(part))} bytes, where {MAX_NAME_BYTES} leave room for files beside it",
            )
    with suppress(FileNotFoundError, NotADirectoryError):
        os.lstat(folder)


def _check_existing(folder: Path) -> None:
    """Raise OSError if an existing path is not a folder, or no file can be created in it."""
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "is no folder")
    with tempfile.TemporaryFile(dir=folder):
        pass


def tracking_uri(experiment: Experiment, folder: Path) -> str:
    """Return the recipe's tracking URI, or MLFLOW_TRACKING_URI, or else an SQLite file next to the run's folder."""
    configured = experiment.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    return configured or sqlite_uri(folder.parent / "mlflow.db")


def sqlite_uri(file: Path) -> str:
    """Return the URI of an SQLite file, with `%` and `?`, which have a meaning in URIs, quoted."""
    path = str(file)
    quoted = path.replace("%", "%25").replace("?", "%3F")
    # For `sqlite:///…`, MLflow would create the parent folder of the quoted path. For `sqlite+pysqlite:///…` it does
    # not, and SQLAlchemy opens the unquoted path.
    return f"{SQLITE_PREFIX}{path}" if quoted == path else f"sqlite+pysqlite:///{quoted}"


def sqlite_file(uri: str) -> Path | None:
    """Return the absolute path of the database file of a tracking URI.

    Args:
        uri: The URI.

    Returns:
        The path; `None` if the store is not an SQLite file.

    Raises:
        sqlalchemy.exc.ArgumentError: The URI cannot be parsed.
    """
    if uri.partition(":")[0].partition("+")[0] != "sqlite":
        return None
    from sqlalchemy import make_url

    database = make_url(uri).database
    return Path(database).absolute() if database and database != ":memory:" else None


def restore_password(uri: str) -> str:
    """Return the tracking URI of a recipe in which the password was masked, usable without the password.

    Args:
        uri: The URI. One without a masked password is returned as it is.

    Returns:
        The URI without user and password, if MLflow reads both from the environment.

    Raises:
        InputError: The password is needed and not in the environment.
    """
    parts = urlsplit(uri)
    if parts.password != MASK:
        return uri
    has_credentials = {"MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"} <= os.environ.keys()
    if has_credentials and parts.scheme in ("http", "https"):
        return uri.replace(f"{parts.username}:{MASK}@", "")
    raise InputError(
        f"tracking.uri: found {uri} without its password, expected the whole URI (--set tracking.uri=…; `zscl sync "
        "--uri …`), or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD for a server",
        code=ErrorCode.MISSING_VALUE,
        field="tracking.uri",
    )


def browse_command(uri: str) -> str:
    """Return the command, or the address, with which a user can browse the tracking store."""
    if uri.startswith(("http://", "https://")):
        return mask(uri)
    mlflow = "mlflow" if shutil.which("mlflow") else str(Path(sys.executable).parent / "mlflow")
    return shell_command(mlflow, "ui", "--backend-store-uri", uri)
