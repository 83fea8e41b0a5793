"""Upload of files and metrics to a run in MLflow after the run has ended, for evaluations and comparisons."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from orchestrate.lifecycle.paths import RUN_LEVELS, restore_password, sqlite_file, tracking_uri
from orchestrate.recipes.recipe import load_experiment
from schemas.errors import InputError
from schemas.redaction import mask
from zscl.sequence.journal import read_run_identity, read_start_time
from zscl.sequence.layout import EXPERIMENT


def attach_files(
    run_folder: Path,
    files: Sequence[Path],
    artifact_path: str,
    note: Callable[[str], None],
    metrics: Mapping[str, Mapping[int, float]] | None = None,
) -> bool:
    """Upload files and log metrics to the MLflow run of a run, if MLflow has a record of the run.

    Artifacts of the same name are replaced. If the upload fails, no error is raised, because the files are also on
    disk.

    Args:
        run_folder: The run's folder.
        files: The files to upload.
        artifact_path: The destination folder in the run's artifacts.
        note: Called with a message if the upload fails.
        metrics: The metrics to log: by metric name, a mapping from step to value; `None` to log no metrics.

    Returns:
        Whether MLflow has a record of the run, and everything was uploaded.
    """
    try:
        experiment = load_experiment(run_folder / EXPERIMENT)
        uri = restore_password(tracking_uri(experiment, run_folder))
    except InputError as error:
        note(f"not uploaded to MLflow: {error}")
        return False
    identity = read_run_identity(run_folder)
    from mlflow.entities import Metric  # takes seconds to import
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    from orchestrate.tracking.local_store import current_artifact_uri
    from orchestrate.tracking.mlflow_client import find_run_of_folder, log_metrics, open_client, search_runs
    from orchestrate.tracking.store_errors import root_cause

    try:
        store_file = sqlite_file(uri)
        if identity is None or (store_file is not None and not store_file.is_file()):
            return False  # a copy of a result, or an offline run, for which `zscl sync` creates the store
        client = open_client(uri)
        mlflow_experiment = client.get_experiment_by_name(experiment.tracking.experiment)
        if mlflow_experiment is None:
            return False
        runs = search_runs(client, [mlflow_experiment.experiment_id], identity.fingerprint, RUN_LEVELS)
        run = find_run_of_folder(runs, run_folder.absolute(), identity.start_time, read_start_time)
        if run is None:
            return False
        artifact_uri = current_artifact_uri(run.info.artifact_uri, store_file)
        for file in files:
            if artifact_uri == run.info.artifact_uri:
                client.log_artifact(run.info.run_id, str(file), artifact_path)
            else:
                get_artifact_repository(artifact_uri).log_artifact(str(file), artifact_path)
        # With the same timestamp in every upload, logging is idempotent: MLflow drops a metric that it already has.
        timestamp = run.info.end_time or run.info.start_time
        points = [
            Metric(name, value, timestamp, step)
            for name, values in (metrics or {}).items()
            for step, value in values.items()
        ]
        if points:
            log_metrics(client, run.info.run_id, points)
    except Exception as error:  # the client libraries of artifact stores raise errors of any type
        note(f"not uploaded to MLflow at {mask(uri)} ({root_cause(error, uri)}); the files are in {files[0].parent}")
        return False
    return True
