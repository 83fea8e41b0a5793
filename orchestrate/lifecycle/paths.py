"""Default paths (run folders, files in a search's folder, MLflow's tracking URI), and a check of write permission."""

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
RUN_LEVELS = ("sequence", "trial")  # values of the tag `zscl.level` of MLflow runs that have a run's folder
# The limit for a folder's name. It leaves room for the longer names of lock files and temporary files next to a folder.
MAX_NAME_BYTES = 200
# The files in a search's folder: recipe, identity, result, and the recipe of the chosen trial.
SEARCH, FINGERPRINT, SEARCH_RESULT, CHOSEN_RECIPE = "search.yaml", "fingerprint", "search.json", "chosen.yaml"


def run_folder(experiment: Experiment, fingerprint: str, out: Path | None, name: str) -> Path:
    """Return the folder of a run.

    The name of the default folder contains the fingerprint, so that the same experiment uses the same folder again and
    is resumed.

    Args:
        experiment: The run's experiment.
        fingerprint: The experiment's fingerprint.
        out: The folder that the user chose; `None` for the default.
        name: The name of the run's subfolder in `out`; empty if `out` itself is the run's folder.

    Returns:
        An absolute path.
    """
    if out is not None:
        return out.absolute() / name
    method = experiment.method.name.replace("*", "-star")
    return Path.cwd() / "runs" / f"{experiment.name}-{method}-{fingerprint[:8]}"


@dataclass(frozen=True)
class SearchIdentity:
    """The identity of a search. It does not change when the search's folder is moved.

    Attributes:
        fingerprint: The search's fingerprint.
        algorithm: The version of the training algorithm; empty if an early version of zscl, which did not record it,
            created the folder.
        started_ms: The start time in Unix milliseconds; `None` if an early version of zscl created the folder.
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


def check_writable(folder: Path, advice: str = "choose another folder with --out") -> None:
    """Check that a folder can be created and written, without creating it.

    Args:
        folder: An absolute path; it need not exist.
        advice: The advice in the error message.

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
    """Raise `OSError` if a part of the path, or the complete path, is too long."""
    for part in folder.parts:
        if len(os.fsencode(part)) > MAX_NAME_BYTES:
            raise OSError(
                errno.ENAMETOOLONG,
                f"a name of {len(os.fsencode(part))} bytes; the limit is {MAX_NAME_BYTES} bytes",
            )
    with suppress(FileNotFoundError, NotADirectoryError):
        os.lstat(folder)


def _check_existing(folder: Path) -> None:
    """Raise `OSError` if an existing path is not a folder, or if no file can be created in it."""
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "is not a folder")
    with tempfile.TemporaryFile(dir=folder):
        pass


def tracking_uri(experiment: Experiment, folder: Path) -> str:
    """Return MLflow's tracking URI.

    It is `tracking.uri` of the recipe; without that, the environment variable MLFLOW_TRACKING_URI; without both, an
    SQLite file next to the run's folder.
    """
    configured = experiment.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    return configured or sqlite_uri(folder.parent / "mlflow.db")


def sqlite_uri(file: Path) -> str:
    """Return the tracking URI of an SQLite file. The characters `%` and `?` are percent-encoded."""
    path = str(file)
    quoted = path.replace("%", "%25").replace("?", "%3F")
    # For `sqlite:///…`, MLflow would create the parent folder of the quoted path. For `sqlite+pysqlite:///…` it does
    # not, and SQLAlchemy opens the unquoted path.
    return f"{SQLITE_PREFIX}{path}" if quoted == path else f"sqlite+pysqlite:///{quoted}"


def sqlite_file(uri: str) -> Path | None:
    """Return the absolute path of the database file of a tracking URI.

    Args:
        uri: The tracking URI.

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
    """Remove a masked password from a tracking URI, if MLflow can read the password from the environment.

    Args:
        uri: A tracking URI from a recipe that zscl has written, in which passwords are masked.

    Returns:
        The URI without user and password. A URI without a masked password is returned unchanged.

    Raises:
        InputError: The password is masked, and it is not in the environment.
    """
    parts = urlsplit(uri)
    if parts.password != MASK:
        return uri
    has_credentials = {"MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"} <= os.environ.keys()
    if has_credentials and parts.scheme in ("http", "https"):
        return uri.replace(f"{parts.username}:{MASK}@", "")
    raise InputError(
        f"tracking.uri: found {uri} without its password. Give the complete URI (--set tracking.uri=…, or `zscl sync "
        "--uri …`), or for a server, set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
        code=ErrorCode.MISSING_VALUE,
        field="tracking.uri",
    )


def browse_command(uri: str) -> str:
    """Return the URL of a tracking server; for other tracking stores, the command that shows them in a browser."""
    if uri.startswith(("http://", "https://")):
        return mask(uri)
    mlflow = "mlflow" if shutil.which("mlflow") else str(Path(sys.executable).parent / "mlflow")
    return shell_command(mlflow, "ui", "--backend-store-uri", uri)
