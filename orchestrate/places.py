"""Where things lie when a recipe does not say, and how they are shown."""

import os
import shutil
import sys
from pathlib import Path
from urllib.parse import urlsplit

from schemas.base import InputError
from schemas.experiment import Experiment
from schemas.secrets import MASK, mask

SQLITE = "sqlite:///"
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


def search_identity(folder: Path) -> tuple[str, str]:
    """Read a search's fingerprint and the version of the algorithm that computed it; empty if older than versions."""
    fingerprint, _, version = (folder / FINGERPRINT).read_text(encoding="utf-8").strip().partition(" ")
    return fingerprint, version


def store_uri(experiment: Experiment, folder: Path) -> str:
    """The recipe's tracking URI, else MLFLOW_TRACKING_URI, else an SQLite file beside the run's folder."""
    given = experiment.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    return given or f"{SQLITE}{folder.parent / 'mlflow.db'}"


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
