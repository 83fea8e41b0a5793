"""Where things lie when a recipe does not say, and how they are shown."""

import errno
import os
import shutil
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from schemas.base import InputError
from schemas.experiment import Experiment
from schemas.secrets import MASK, mask

SQLITE = "sqlite:///"
LONGEST_NAME = 200  # bytes of a folder's name: the names of locks and temporary files beside it are longer
EXPERIMENT = "experiment.yaml"  # of a run's folder: the recipe, with every default spelt out
# Of a search's folder: its recipe, its identity, what it found, and the recipe that it chose.
SEARCH, FINGERPRINT, FOUND, CHOSEN = "search.yaml", "fingerprint", "search.json", "chosen.yaml"


def folder_of(experiment: Experiment, fingerprint: str, out: Path | None, name: str) -> Path:
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


def refuse_unwritable(folder: Path, advice: str = "choose another place with --out") -> None:
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
    return given or f"{SQLITE}{folder.parent / 'mlflow.db'}"


def sqlite_file(uri: str) -> Path | None:
    """Return the file of an SQLite store; `None` for any other store."""
    return Path(uri.removeprefix(SQLITE)).absolute() if uri.startswith(SQLITE) else None


def unmasked(uri: str) -> str:
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
    return f"{mlflow} ui --backend-store-uri {mask(uri)}"
