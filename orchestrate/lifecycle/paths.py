"""Where things lie when a recipe does not say, and how they are shown."""

import errno
import os
import shutil
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from schemas.errors import InputError, command
from schemas.experiment import Experiment
from schemas.redaction import MASK, mask

SQLITE = "sqlite:///"
LEVELS = ("sequence", "trial")  # of MLflow's runs: those that are a run of ours
LONGEST_NAME = 200  # bytes of a folder's name: the names of locks and temporary files beside it are longer
EXPERIMENT = "experiment.yaml"  # of a run's folder: the recipe, with every default spelt out
# Of a search's folder: its recipe, its identity, what it found, and the recipe that it chose.
SEARCH, FINGERPRINT, FOUND, CHOSEN = "search.yaml", "fingerprint", "search.json", "chosen.yaml"


def run_folder(experiment: Experiment, fingerprint: str, out: Path | None, name: str) -> Path:
    """A folder a run: the same experiment finds its folder again, another one gets another.

    Args:
        experiment: what is run.
        fingerprint: of it.
        out: where the user wants it, if anywhere.
        name: of the run among several that the user wants there.
    """
    if out is not None:
        return out.absolute() / name
    method = experiment.method.name.replace("*", "-star")
    return Path.cwd() / "runs" / f"{experiment.name}-{method}-{fingerprint[:8]}"


@dataclass(frozen=True)
class SearchIdentity:
    """What tells a search from all others, wherever its folder lies.

    Attributes:
        fingerprint: of the search.
        algorithm: version that computed it; empty in a folder older than versions.
        begun: when, in milliseconds; `None` in such a folder.
    """

    fingerprint: str
    algorithm: str = ""
    begun: int | None = None

    def __str__(self) -> str:
        return f"{self.fingerprint} {self.algorithm} {self.begun}"


def search_identity(folder: Path) -> SearchIdentity:
    """Read a search's identity from its folder."""
    fingerprint, *rest = (folder / FINGERPRINT).read_text(encoding="utf-8").split()
    return SearchIdentity(fingerprint, rest[0], int(rest[1])) if rest else SearchIdentity(fingerprint)


def check_writable(folder: Path, advice: str = "choose another place with --out") -> None:
    """Refuse a folder that cannot be made or written. Nothing is left there, nor made.

    Args:
        folder: absolute; it need not exist.
        advice: the end of the sentence: what to do.

    Raises:
        InputError: naming what is in the way.
    """
    existing = folder
    try:
        for part in folder.parts:
            if len(os.fsencode(part)) > LONGEST_NAME:
                raise OSError(
                    errno.ENAMETOOLONG,
                    f"a name of {len(os.fsencode(part))} bytes, where {LONGEST_NAME} leave room for files beside it",
                )
        with suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(folder)  # a path that no file system can hold
        existing = next(each for each in (folder, *folder.parents) if os.path.lexists(each))
        if not existing.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "is no folder")
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        at = "" if existing == folder else f"{existing}: "
        raise InputError(
            f"{folder}: cannot be written ({at}{error.strerror}), expected a folder that this user may write; {advice}"
        ) from error


def store_uri(experiment: Experiment, folder: Path) -> str:
    """The recipe's tracking URI, else MLFLOW_TRACKING_URI, else an SQLite file beside the run's folder."""
    given = experiment.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    return given or sqlite_uri(folder.parent / "mlflow.db")


def sqlite_uri(file: Path) -> str:
    """Return the URI of an SQLite file: `%` and `?` have a meaning in a URI and are quoted."""
    path = str(file)
    quoted = path.replace("%", "%25").replace("?", "%3F")
    # Of `sqlite:///…`, MLflow makes the parent folder of the path as it is quoted; of this, SQLAlchemy finds the file.
    return f"{SQLITE}{path}" if quoted == path else f"sqlite+pysqlite:///{quoted}"


def sqlite_file(uri: str) -> Path | None:
    """Return the absolute path of the file that an SQLite URI means; `None` for any other store.

    Raises:
        ArgumentError: of SQLAlchemy; it cannot be read as a URI.
    """
    if uri.partition(":")[0].partition("+")[0] != "sqlite":
        return None
    from sqlalchemy import make_url

    database = make_url(uri).database
    return Path(database).absolute() if database and database != ":memory:" else None


def restore_password(uri: str) -> str:
    """The URI of a recipe that was written down, without the password.

    Raises:
        InputError: the password is needed, and not in the environment either.
    """
    parts = urlsplit(uri)
    if parts.password != MASK:
        return uri
    given = {"MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"} <= os.environ.keys()
    if given and parts.scheme in ("http", "https"):
        return uri.replace(f"{parts.username}:{MASK}@", "")
    raise InputError(
        f"tracking.uri: found {uri} without its password, expected the whole URI (--set tracking.uri=…; `zscl sync "
        "--uri …`), or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD for a server"
    )


def browse_command(uri: str) -> str:
    """What a user types, or opens, to see the store."""
    if uri.startswith(("http://", "https://")):
        return mask(uri)
    mlflow = "mlflow" if shutil.which("mlflow") else str(Path(sys.executable).parent / "mlflow")
    return command(mlflow, "ui", "--backend-store-uri", uri)
