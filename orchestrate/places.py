"""Where things lie when a recipe does not say."""

from pathlib import Path
from urllib.parse import urlsplit

from schemas.experiment import Experiment


def default_folder(experiment: Experiment, fingerprint: str) -> Path:
    """A folder a run: the same experiment finds its folder again, another one gets another."""
    return Path.cwd() / "runs" / f"{experiment.name}-{experiment.method.name.replace('*', '-star')}-{fingerprint[:8]}"


def store_uri(experiment: Experiment, folder: Path) -> str:
    """The recipe's tracking URI; by default an SQLite file beside the run's folder."""
    return experiment.tracking.uri or f"sqlite:///{folder.parent / 'mlflow.db'}"


def without_password(uri: str) -> str:
    """A URI as it may be shown."""
    parts = urlsplit(uri)
    return uri.replace(f"{parts.username}:{parts.password}@", f"{parts.username}:***@") if parts.password else uri
