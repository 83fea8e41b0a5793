"""MLflow's store: opened or found unreachable, searched for runs, and told what every run of ours says of itself."""

import getpass
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

# `orchestrate.tracking.uploader` retries, with longer and longer pauses. A request that MLflow itself repeats because
# its answer was lost would create a second run. A silent server is noticed in seconds, not in two minutes.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
# Standard output holds results alone.
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

from filelock import FileLock
from git import GitError, Repo
from mlflow.entities import Experiment, LifecycleStage, Metric, Run
from mlflow.exceptions import MlflowException
from mlflow.store.db.db_types import DATABASE_ENGINES
from mlflow.tracking import MlflowClient
from sqlalchemy import NullPool, create_engine, make_url

from orchestrate.lifecycle.network import check_port
from orchestrate.lifecycle.paths import sqlite_file
from orchestrate.tracking.local_store import artefacts_beside, follow_artefacts
from orchestrate.tracking.store_errors import FAILURES, store_error
from schemas.errors import InputError
from schemas.redaction import mask
from zscl.runtime.hashing import sha256_of

logging.getLogger("mlflow").setLevel(logging.WARNING)
# It prints the traceback of every attempt at a locked database.
logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)

PARENT = "mlflow.parentRunId"
FINGERPRINT = "zscl.fingerprint"
FOLDER = "zscl.folder"  # where the run lay when it was last recorded
TAKEN = "zscl.sequence.journal"  # how many of a journal's entries a run has, and when that journal begins
LEVEL = "zscl.level"  # search, trial or sequence, stage
REASON = "zscl.reason"
TABLES = "mlflow.loggedArtifacts"  # which artefacts MLflow's pages show as tables
ARTIFACTS = (
    "zscl.artifacts_missing"  # why the files of a finished run are not in its artefact store, while they are not
)
LONGEST_VALUE = 6_000  # of a parameter
LONGEST_NAME = 250  # of a metric, or a run
PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}  # where a URI names none
METRICS_AT_ONCE = 1_000  # MLflow's limit for one call
# The kind of experiment whose page opens with charts for training instead of those for language models.
KIND = {"mlflow.experimentKind": "custom_model_development"}


def open_store(uri: str, experiment: str) -> tuple[MlflowClient, str]:
    """Open a store, and in it the experiment of this name, which is made where there is none. Returns its id, too.

    Raises:
        InputError: somebody deleted the experiment.
        Exception: one of `store_errors.FAILURES`.
    """
    if uri.partition("://")[0].partition("+")[0] in set(DATABASE_ENGINES) - {"sqlite"}:
        # MLflow asks a database that does not answer again for a hundred seconds.
        _check_database(uri)
    file = sqlite_file(uri)
    with _alone(file):
        if file is not None:
            follow_artefacts(file)
        client = open_client(uri)
        found = client.get_experiment_by_name(experiment)
        if found is not None:
            return client, _active(found, uri)
        # Beside an SQLite store lie its artefacts; a server has a place of its own.
        place = None if file is None else artefacts_beside(file).as_uri()
        try:
            return client, str(client.create_experiment(experiment, artifact_location=place, tags=KIND))
        except MlflowException:
            made = client.get_experiment_by_name(experiment)  # by another run, in between
            if made is None:
                raise
            return client, _active(made, uri)


def _active(experiment: Experiment, uri: str) -> str:
    """The id of an experiment that takes runs.

    Raises:
        InputError: it is deleted.
    """
    if experiment.lifecycle_stage == LifecycleStage.DELETED:
        raise InputError(
            f"tracking.experiment: found '{experiment.name}' deleted in the MLflow store at {mask(uri)}, expected an "
            f"experiment that takes runs; restore it (MLFLOW_TRACKING_URI={mask(uri)} mlflow experiments restore "
            f"--experiment-id {experiment.experiment_id}), or set tracking.experiment to another name"
        )
    return str(experiment.experiment_id)


def _check_database(uri: str) -> None:
    """Connect to a database server once; one that does not answer is noticed within seconds.

    Raises:
        Exception: one of `store_errors.FAILURES`.
    """
    place = make_url(uri)
    engine = create_engine(uri, poolclass=NullPool)  # its driver may be missing
    port = place.port or PORTS.get(place.get_backend_name())
    if place.host and port and not {"/", ","} & set(place.host):  # neither a Unix socket nor several hosts
        check_port(place.host, port)
    engine.connect().close()


def open_client(uri: str) -> MlflowClient:
    """Open a store to read it. Nothing in it changes, also where it was moved: see `local_store.artefacts_now`.

    Raises:
        Exception: one of `FAILURES`.
    """
    return MlflowClient(tracking_uri=uri)


def check_store(uri: str, experiment: str) -> str:
    """Check, without creating anything, that a store answers and that its experiment takes runs.

    Returns:
        What is known of the experiment, for people.

    Raises:
        InputError: it does not.
    """
    try:
        if uri.partition("://")[0].partition("+")[0] in DATABASE_ENGINES and sqlite_file(uri) is None:
            _check_database(uri)
        found = open_client(uri).get_experiment_by_name(experiment)
    except FAILURES as error:
        raise store_error(uri, error) from error
    if found is not None:
        _active(found, uri)
    return f"experiment '{experiment}' {'will be made' if found is None else 'is there'}"


@contextmanager
def _alone(file: Path | None) -> Iterator[None]:
    """Let one process at a time open an SQLite store: two that create it at once break it."""
    if file is None:
        yield
        return
    if file.is_dir():
        raise OSError(f"{file} is a folder")
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_name(f".{file.name}.lock")):
        yield


def runs_of(client: MlflowClient, experiments: Sequence[str], fingerprint: str, levels: Sequence[str]) -> list[Run]:
    """Return the runs, of some levels, of what has a fingerprint, the newest first."""
    query = f"tags.`{FINGERPRINT}` = '{fingerprint}'"
    found = client.search_runs(list(experiments), query, order_by=["attributes.start_time DESC"])
    return [run for run in found if run.data.tags.get(LEVEL) in levels]


def find_recorded(
    runs: Sequence[Run], folder: Path, begun: int | None, begun_in: Callable[[Path], int | None]
) -> Run | None:
    """Choose, among the runs of one fingerprint, the record of what lies in a folder.

    It is known by when it began, so that it is found again after its folder was moved. A copy, whose original is still
    where it was recorded, is not its original.

    Args:
        runs: of one fingerprint, level and search, the newest first.
        folder: absolute.
        begun: when what lies in it began, if it has begun.
        begun_in: gives the same of another folder, if there is one.
    """

    def is_here(place: Path) -> bool:
        """Whether a recorded place is this folder, by whatever path; a place that cannot be read is not."""
        try:
            return str(place) == mask(str(folder)) or place.samefile(folder)
        except OSError:
            return False

    began = [(run, Path(run.data.tags.get(FOLDER, "/")), start_times(run)) for run in runs]
    alike = [(run, place) for run, place, when in began if when == begun]
    choices = [run for run, place in alike if is_here(place)]
    if begun is not None:
        choices += [run for run, place in alike if begun_in(place) != begun]
        choices += [run for run, place, when in began if when is None and is_here(place)]  # killed before it sent any
    return choices[0] if choices else None


def start_times(run: Run) -> int | None:
    """Return when what a run records began, if it says so."""
    begun = run.data.tags.get(TAKEN, "").partition(" since ")[2]
    return int(begun) if begun else None


def clear_reason(client: MlflowClient, run: str) -> None:
    """Forget why an earlier attempt at a run, or search, ended."""
    if REASON in client.get_run(run).data.tags:
        client.delete_tag(run, REASON)


def log_table(client: MlflowClient, run: str, columns: Mapping[str, Sequence[Any]], file: str) -> None:
    """Log columns as a table that MLflow's pages show; what was logged before is replaced."""
    # A dot in a column's name would be a path to these pages; `client.log_table` would append.
    names = [name.replace(".", "/") for name in columns]
    rows = [list(row) for row in zip(*columns.values(), strict=True)]
    client.log_dict(run, {"columns": names, "data": rows}, file)
    client.set_tag(run, TABLES, json.dumps([{"path": file, "type": "table"}]))


def log_metrics(client: MlflowClient, run: str, metrics: Sequence[Metric]) -> None:
    """Log metrics, as many in a call as MLflow takes, under names that it takes."""
    for start in range(0, len(metrics), METRICS_AT_ONCE):
        batch = metrics[start : start + METRICS_AT_ONCE]
        client.log_batch(run, metrics=[Metric(valid_name(m.key), m.value, m.timestamp, m.step) for m in batch])


def valid_name(name: str) -> str:
    """A name that MLflow takes; names that differ stay different.

    MLflow takes letters, digits and `_-.: /`, 250 of them, and no path that has another, shorter form.
    """
    plain = re.sub(r"[^/\w.\-: ]", "_", name)
    plain = "/".join(part for part in plain.split("/") if part not in ("", ".", ".."))
    if plain == name and len(name) <= LONGEST_NAME:
        return name
    return f"{plain[: LONGEST_NAME - 9]}-{sha256_of(name)[:8]}"


def flatten(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Every value of a tree, by dotted path."""
    rows: list[tuple[str, Any]] = []
    for name, value in tree.items():
        rows += flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]
    return rows


def provenance() -> dict[str, str]:
    """Tags that say who runs this, with what, from where."""
    source = {"mlflow.source.name": f"zscl {version('zscl')}", "mlflow.source.type": "JOB"}
    return {**_user(), **source, **_commit(), **_ray_job()}


def _user() -> dict[str, str]:
    """Who runs this, where the machine knows."""
    try:
        return {"mlflow.user": getpass.getuser()}
    except (OSError, KeyError):  # a container whose user has no name
        return {}


def _commit() -> dict[str, str]:
    """The commit that the current folder is at, where it is a repository's."""
    try:
        return {"mlflow.source.git.commit": Repo(Path.cwd(), search_parent_directories=True).head.commit.hexsha}
    except (GitError, ValueError, OSError):
        return {}


def _ray_job() -> dict[str, str]:
    """The submission id of the Ray job that this process is, or Ray's id of it."""
    if "ray" not in sys.modules or not sys.modules["ray"].is_initialized():
        return {}
    job = sys.modules["ray"].get_runtime_context().get_job_id()
    return {"zscl.ray_job": os.environ.get("RAY_JOB_SUBMISSION_ID", job)}
