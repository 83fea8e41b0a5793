"""MLflow client: open a tracking store, find runs by fingerprint and folder, log metrics and tables, finish runs."""

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

# MLflow itself must not retry: if the response to a request was lost, a retry could create a second run. Retries are
# made by `orchestrate.tracking.uploader`, which searches for the run first. With the timeout, a server that does not
# answer is detected within seconds instead of two minutes.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
# Standard output is reserved for results.
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
from orchestrate.tracking.local_store import artifact_folder, relocate_artifacts
from orchestrate.tracking.store_errors import artifact_error, explain_store_errors
from schemas.errors import ErrorCode, InputError, shell_command
from schemas.redaction import mask
from zscl.runtime.hashing import sha256_of

logging.getLogger("mlflow").setLevel(logging.WARNING)
# This logger would print a traceback for every attempt to open a locked database.
logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)

# Tags of a run.
PARENT = "mlflow.parentRunId"
FINGERPRINT = "zscl.fingerprint"
FOLDER = "zscl.folder"  # the run's folder
JOURNAL_POSITION = "zscl.journal"  # number of journal entries that were sent, and the time of the journal's first entry
LEVEL = "zscl.level"  # search, trial, sequence (a run that is not a trial) or stage
REASON = "zscl.reason"  # why the run failed or was killed
LOGGED_TABLES = "mlflow.loggedArtifacts"  # artifacts that MLflow's pages show as tables
ARTIFACTS_MISSING = "zscl.artifacts_missing"  # why the files of a finished run are not in its artifact store yet
# Tag of an experiment. With it, the experiment's page shows charts for training instead of those for language models.
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}

MAX_VALUE_LENGTH = 6_000  # characters of a parameter or tag
MAX_NAME_LENGTH = 250  # characters of a metric's or run's name
METRICS_PER_CALL = 1_000  # MLflow's limit
DEFAULT_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}


def open_store(uri: str, experiment: str) -> tuple[MlflowClient, str]:
    """Open a store for writing, and create the experiment if it does not exist.

    Args:
        uri: Tracking URI.
        experiment: Name of the experiment.

    Returns:
        The client and the experiment's ID.

    Raises:
        InputError: The experiment was deleted.
        MlflowException: The store cannot be used. In this case, any of `store_errors.FAILURES` may be raised.
    """
    if uri.partition("://")[0].partition("+")[0] in set(DATABASE_ENGINES) - {"sqlite"}:
        # MLflow itself retries for a hundred seconds if a database does not answer.
        _check_database(uri)
    file = sqlite_file(uri)
    with _sqlite_lock(file):
        if file is not None:
            relocate_artifacts(file)
        client = open_client(uri)
        existing = client.get_experiment_by_name(experiment)
        if existing is not None:
            return client, _active_experiment_id(existing, uri)
        # The artifacts of an SQLite store are in a folder next to it. A server chooses the location itself.
        location = None if file is None else artifact_folder(file).as_uri()
        try:
            return client, str(client.create_experiment(experiment, artifact_location=location, tags=EXPERIMENT_TAGS))
        except MlflowException:
            existing = client.get_experiment_by_name(experiment)  # another process may have created it in the meantime
            if existing is None:
                raise
            return client, _active_experiment_id(existing, uri)


def _active_experiment_id(experiment: Experiment, uri: str) -> str:
    """Return the ID of an MLflow experiment that was not deleted.

    Args:
        experiment: The experiment.
        uri: Tracking URI, for the error message.

    Returns:
        The ID.

    Raises:
        InputError: The experiment was deleted.
    """
    if experiment.lifecycle_stage == LifecycleStage.DELETED:
        raise InputError(
            f"tracking.experiment: found '{experiment.name}' deleted in the MLflow store at {mask(uri)}, expected an "
            f"active experiment. Restore it (MLFLOW_TRACKING_URI={mask(uri)} mlflow experiments restore "
            f"--experiment-id {experiment.experiment_id}), or set tracking.experiment to another name",
            code=ErrorCode.REJECTED,
            field="tracking.experiment",
        )
    return str(experiment.experiment_id)


def _check_database(uri: str) -> None:
    """Connect to a database server once, to detect within seconds whether it answers."""
    url = make_url(uri)
    engine = create_engine(uri, poolclass=NullPool)  # raises if the driver is missing
    port = url.port or DEFAULT_PORTS.get(url.get_backend_name())
    if url.host and port and not {"/", ","} & set(url.host):  # neither a Unix socket nor several hosts
        check_port(url.host, port)
    engine.connect().close()


def open_client(uri: str) -> MlflowClient:
    """Open a store for reading.

    The artifact locations that a store records are wrong after the store was moved. They are not updated; use
    `local_store.current_artifact_uri` to convert them.

    Args:
        uri: Tracking URI.

    Returns:
        The client. Its methods may raise one of `store_errors.FAILURES`.
    """
    return MlflowClient(tracking_uri=uri)


def check_store(uri: str, experiment: str) -> str:
    """Check that a store answers and that an experiment in it was not deleted. Nothing is created.

    Args:
        uri: Tracking URI.
        experiment: Name of the experiment.

    Returns:
        A message for the user that says whether the experiment exists.

    Raises:
        InputError: The store does not answer, or the experiment was deleted.
    """
    with explain_store_errors(uri):
        if uri.partition("://")[0].partition("+")[0] in DATABASE_ENGINES and sqlite_file(uri) is None:
            _check_database(uri)
        existing = open_client(uri).get_experiment_by_name(experiment)
    if existing is not None:
        _active_experiment_id(existing, uri)
    return f"experiment '{experiment}' {'will be created' if existing is None else 'exists'}"


@contextmanager
def _sqlite_lock(file: Path | None) -> Iterator[None]:
    """Context manager: hold an inter-process lock, so that two processes do not create an SQLite store at once.

    Args:
        file: The store's SQLite file; `None` for any other store, which needs no lock.

    Raises:
        OSError: The path is a folder, or the lock file cannot be created.
    """
    if file is None:
        yield
        return
    if file.is_dir():
        raise OSError(f"{file} is a folder")
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_name(f".{file.name}.lock")):
        yield


def search_runs(
    client: MlflowClient, experiment_ids: Sequence[str], fingerprint: str, levels: Sequence[str]
) -> list[Run]:
    """Search for the runs with a fingerprint.

    Args:
        client: The store.
        experiment_ids: IDs of the MLflow experiments to search.
        fingerprint: Value of the tag `zscl.fingerprint`: the fingerprint of the runs' experiment or of a search.
        levels: Accepted values of the tag `zscl.level`.

    Returns:
        The runs, newest first.
    """
    query = f"tags.`{FINGERPRINT}` = '{fingerprint}'"
    runs = client.search_runs(list(experiment_ids), query, order_by=["attributes.start_time DESC"])
    return [run for run in runs if run.data.tags.get(LEVEL) in levels]


def find_run_of_folder(
    runs: Sequence[Run], folder: Path, start_time: int | None, read_start_time: Callable[[Path], int | None]
) -> Run | None:
    """Find the MLflow run that records the run or search in a folder.

    A run is identified by its start time, so its MLflow run is found even after the run's folder was moved. If the
    folder that MLflow records still contains a run with this start time, `folder` is a copy of that folder. A copy is
    treated as a separate run.

    Args:
        runs: The MLflow runs that have the fingerprint, level and search of the run in `folder`, newest first.
        folder: The absolute path of the run's folder.
        start_time: Start time of the run in `folder`, in milliseconds; `None` before its first event.
        read_start_time: Function that returns the start time of the run in a folder; `None` if it contains no run.

    Returns:
        The MLflow run, or `None` if the run is not recorded yet.
    """

    def is_same_folder(recorded: Path) -> bool:
        """Return whether a recorded path refers to `folder`. Return `False` if the path cannot be accessed."""
        try:
            return str(recorded) == mask(str(folder)) or recorded.samefile(folder)
        except OSError:
            return False

    records = [(run, Path(run.data.tags.get(FOLDER, "/")), recorded_start_time(run)) for run in runs]
    same_start = [(run, recorded) for run, recorded, start in records if start == start_time]
    matches = [run for run, recorded in same_start if is_same_folder(recorded)]
    if start_time is not None:
        matches += [run for run, recorded in same_start if read_start_time(recorded) != start_time]
        # A process that was killed before it sent any entry recorded no start time.
        matches += [run for run, recorded, start in records if start is None and is_same_folder(recorded)]
    return matches[0] if matches else None


def recorded_start_time(run: Run) -> int | None:
    """Return the start time that MLflow records for a run or search, in milliseconds; `None` without a record."""
    start_time = run.data.tags.get(JOURNAL_POSITION, "").partition(" since ")[2]
    return int(start_time) if start_time else None


def clear_reason(client: MlflowClient, run_id: str) -> None:
    """Delete the tag with the reason why an earlier attempt of a run or search failed or was killed."""
    if REASON in client.get_run(run_id).data.tags:
        client.delete_tag(run_id, REASON)


def finish_run(
    client: MlflowClient,
    run: Run,
    folder: Path,
    end_time: int | None,
    upload_files: Callable[[], None] | None,
) -> None:
    """Set the status of an MLflow run to FINISHED, then upload the run's files.

    The status is sent first, because the artifact store may be another server, which may not answer. Until the files
    are uploaded, the tag `zscl.artifacts_missing` contains the reason why they are missing.

    Args:
        client: The store.
        run: The MLflow run.
        folder: Folder of the run or search. The tag names the command that uploads the files of this folder later.
        end_time: The time at which the run finished, in milliseconds; `None` for the current time.
        upload_files: Function that uploads the files; `None` to upload no files.

    Raises:
        ArtifactError: The status was set, but the artifact store did not accept the files.
    """
    run_id = run.info.run_id
    clear_reason(client, run_id)
    advice = f"not sent yet; this command sends them: {shell_command('zscl', 'sync', folder)}"
    client.set_tag(run_id, ARTIFACTS_MISSING, advice[:MAX_VALUE_LENGTH])
    client.set_terminated(run_id, "FINISHED", end_time)
    if upload_files is None:
        return
    try:
        upload_files()
    except Exception as error:  # the client libraries of artifact stores raise errors of any type
        failure = artifact_error(client.tracking_uri, run.info.artifact_uri, error)
        client.set_tag(run_id, ARTIFACTS_MISSING, str(failure)[:MAX_VALUE_LENGTH])
        raise failure from error
    client.delete_tag(run_id, ARTIFACTS_MISSING)


def log_table(client: MlflowClient, run_id: str, columns: Mapping[str, Sequence[Any]], file: str) -> None:
    """Log a table that MLflow's pages show. An earlier table with the same path is replaced.

    Args:
        client: The store.
        run_id: ID of the MLflow run.
        columns: Values by column name.
        file: Artifact path of the table, which ends with `.json`.
    """
    # MLflow's pages interpret a dot in a column's name as a path. `client.log_table` would append to an earlier table.
    names = [name.replace(".", "/") for name in columns]
    rows = [list(row) for row in zip(*columns.values(), strict=True)]
    client.log_dict(run_id, {"columns": names, "data": rows}, file)
    client.set_tag(run_id, LOGGED_TABLES, json.dumps([{"path": file, "type": "table"}]))


def log_metrics(client: MlflowClient, run_id: str, metrics: Sequence[Metric]) -> None:
    """Log metrics in batches that MLflow accepts. Names that MLflow does not accept are replaced by `valid_name`."""
    for start in range(0, len(metrics), METRICS_PER_CALL):
        batch = metrics[start : start + METRICS_PER_CALL]
        client.log_batch(run_id, metrics=[Metric(valid_name(m.key), m.value, m.timestamp, m.step) for m in batch])


def valid_name(name: str) -> str:
    """Convert a name to a name that MLflow accepts. Different names are converted to different names.

    MLflow accepts at most 250 characters: letters, digits and `_-.: /`. A name with `/` must be a normalised path.

    Args:
        name: The name of a metric or parameter.

    Returns:
        The name itself if it is valid. Otherwise, invalid characters are replaced, and a hash is appended.
    """
    plain = re.sub(r"[^/\w.\-: ]", "_", name)
    plain = "/".join(part for part in plain.split("/") if part not in ("", ".", ".."))
    if plain == name and len(name) <= MAX_NAME_LENGTH:
        return name
    return f"{plain[: MAX_NAME_LENGTH - 9]}-{sha256_of(name)[:8]}"


def flatten(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return the values in nested dictionaries, each as a pair of its keys, joined by dots, and the value."""
    rows: list[tuple[str, Any]] = []
    for name, value in tree.items():
        rows += flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]
    return rows


def provenance_tags() -> dict[str, str]:
    """Return MLflow tags with the user, the version of zscl, the git commit and the Ray job, if they are known."""
    source = {"mlflow.source.name": f"zscl {version('zscl')}", "mlflow.source.type": "JOB"}
    return {**_user_tags(), **source, **_commit_tags(), **_ray_job_tags()}


def _user_tags() -> dict[str, str]:
    try:
        return {"mlflow.user": getpass.getuser()}
    except (OSError, KeyError):  # the user has no name, for example in a container
        return {}


def _commit_tags() -> dict[str, str]:
    """Return a tag with the current git commit, if the current folder belongs to a git repository."""
    try:
        return {"mlflow.source.git.commit": Repo(Path.cwd(), search_parent_directories=True).head.commit.hexsha}
    except (GitError, ValueError, OSError):
        return {}


def _ray_job_tags() -> dict[str, str]:
    """Return a tag with the submission ID of this process's Ray job, or with the job ID if it was not submitted."""
    if "ray" not in sys.modules or not sys.modules["ray"].is_initialized():
        return {}
    job = sys.modules["ray"].get_runtime_context().get_job_id()
    return {"zscl.ray_job": os.environ.get("RAY_JOB_SUBMISSION_ID", job)}
