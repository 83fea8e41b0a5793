"""Fixtures for runs that are recorded in MLflow."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.tracked_run import BEGINNING, FakeRun, read_store, row, stage_events, started, steps

from orchestrate.lifecycle.run_status import write_state
from orchestrate.recipes import recipe as recipes
from orchestrate.tracking import uploader
from orchestrate.tracking.mlflow_client import REASON
from schemas.experiment import Experiment

Make = Callable[..., Experiment]


@pytest.fixture(autouse=True)
def fast_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploader, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(uploader, "RETRY_DELAYS", (0.05, 0.2))


@pytest.fixture
def folder(tmp_path: Path, empty_store: Path, experiment: Make) -> Path:
    """A run's folder next to an empty MLflow store."""
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    recipes.write_experiment(experiment(), tmp_path / "run/experiment.yaml")
    return tmp_path / "run"


@pytest.fixture
def resumed_run(folder: Path, experiment: Make) -> FakeRun:
    """A run that failed, was resumed and is finished, uploaded while it was in progress."""
    run = FakeRun(folder)
    upload = run.start_uploader(experiment())
    run.emit(*BEGINNING, *stage_events(1), started(2), steps(2, 0, 1))
    write_state(folder, "FAILED", "a worker died")
    assert upload.end()
    store = read_store(f"sqlite:///{folder.parent}/mlflow.db")
    assert {name: record["status"] for name, record in store.items()} == {
        "run": "FAILED", "1-first": "FINISHED", "2-second": "FAILED",
    }  # fmt: skip
    assert store["run"]["tags"][REASON] == "a worker died"

    resumed = FakeRun(folder)
    upload = resumed.start_uploader(experiment(compute={"workers": 2}))
    resumed.emit(*BEGINNING, row(1), *stage_events(2))  # a resumed run repeats some events
    resumed.finish()
    assert upload.end()
    assert resumed.messages == []
    return resumed
