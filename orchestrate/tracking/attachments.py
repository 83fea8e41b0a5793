"""Files and figures that join a run in MLflow after it has ended: evaluations, and comparisons it takes part in."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from orchestrate.lifecycle.paths import EXPERIMENT, LEVELS, restore_password, sqlite_file, store_uri
from orchestrate.recipes.recipe import load_experiment
from schemas.errors import InputError
from schemas.redaction import mask
from zscl.sequence.journal import begun_in, identity_of


def attach_files(
    run: Path,
    files: Sequence[Path],
    place: str,
    note: Callable[[str], None],
    metrics: Mapping[str, Mapping[int, float]] | None = None,
) -> bool:
    """Leave files among the artefacts of a run, where its store has it; what is there of the same name is replaced.

    A store that does not answer is noted: the files are on disk, and this is a second place for them.

    Args:
        run: the run's folder.
        files: what to leave.
        place: the folder among the run's artefacts.
        note: told why nothing was left.
        metrics: by name and step, which join the run's.
    """
    try:
        experiment = load_experiment(run / EXPERIMENT)
        uri = restore_password(store_uri(experiment, run))
    except InputError as error:
        note(f"not left in MLflow: {error}")
        return False
    identity = identity_of(run)
    from mlflow.entities import Metric  # takes seconds to import
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    from orchestrate.tracking.local_store import artefacts_now
    from orchestrate.tracking.mlflow_client import find_recorded, log_metrics, open_client, runs_of
    from orchestrate.tracking.store_errors import reason_of

    try:
        file = sqlite_file(uri)
        if identity is None or (file is not None and not file.is_file()):
            return False  # a copy of a result, or an offline run: `zscl sync` makes the store
        client = open_client(uri)
        found = client.get_experiment_by_name(experiment.tracking.experiment)
        runs = runs_of(client, [found.experiment_id], identity.fingerprint, LEVELS) if found else []
        run_there = find_recorded(runs, run.absolute(), identity.begun, begun_in)
        if run_there is not None:
            where = run_there.info.run_id
            uri_now = artefacts_now(run_there.info.artifact_uri, file)
            for each in files:
                if uri_now == run_there.info.artifact_uri:
                    client.log_artifact(where, str(each), place)
                else:
                    get_artifact_repository(uri_now).log_artifact(str(each), place)
            rows = [
                # The time of the run's end: sent again, it is the same metric.
                Metric(name, value, run_there.info.end_time or run_there.info.start_time, step)
                for name, values in (metrics or {}).items()
                for step, value in values.items()
            ]
            if rows:
                log_metrics(client, where, rows)
    except Exception as error:  # also whatever a store of artefacts may raise: the files are on disk
        note(f"not left in MLflow at {mask(uri)} ({reason_of(error, uri)}); the files are in {files[0].parent}")
        return False
    return run_there is not None
