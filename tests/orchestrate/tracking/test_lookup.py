"""Finding runs by their MLflow run IDs."""

from collections.abc import Callable
from pathlib import Path

from mlflow.tracking import MlflowClient
from support.errors import refused
from support.tracked_run import BEGINNING, record_killed_run, started

from orchestrate.lifecycle.paths import sqlite_uri
from orchestrate.tracking.lookup import find_runs
from schemas.errors import ErrorCode
from schemas.experiment import Experiment

Make = Callable[..., Experiment]


def test_a_recorded_folder_that_cannot_be_read_is_another_one(folder: Path, experiment: Make) -> None:
    """Like a folder inside that of another user; a name that is too long fails for all users."""
    first = record_killed_run(folder, experiment(), *BEGINNING)
    uri, hidden = sqlite_uri(folder.parent / "mlflow.db"), f"/tmp/{'x' * 300}/run"
    MlflowClient(uri).set_tag(first, "zscl.folder", hidden)
    assert find_runs([first], None, uri) == {first: folder}
    assert record_killed_run(folder, experiment(), started(1)) == first
    with refused(ErrorCode.NOT_FOUND) as error:
        find_runs([hidden], None, uri)
    assert "cannot be read (File name too long)" in str(error.value)
