"""Uploading a journal: in the background, afterwards, and through failures of the store."""

import json
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient
from support.command import Command
from support.errors import refused
from support.tracked_run import (
    BEGINNING,
    FakeRun,
    curve,
    read_store,
    row,
    stage_events,
    started,
    steps,
    trained,
    wait_until,
)

from orchestrate.lifecycle.lock import run_lock
from orchestrate.lifecycle.run_status import write_state
from orchestrate.recipes import recipe as recipes
from orchestrate.tracking.mlflow_client import ARTIFACTS_MISSING, JOURNAL_POSITION, LEVEL
from orchestrate.tracking.uploader import JournalUploader
from schemas.errors import ErrorCode
from schemas.experiment import Experiment

Make = Callable[..., Experiment]


def test_another_store_gets_the_same_afterwards(
    resumed_run: FakeRun, folder: Path, empty_store: Path, zscl: Callable[..., Command]
) -> None:
    shutil.copy(empty_store, folder.parent / "other.db")
    uri = f"sqlite:///{folder.parent}/other.db"
    synced = zscl("sync", folder, "--uri", uri, "--json")
    assert synced.code == 0, synced.error
    assert json.loads(synced.out)["entries"] == 19  # repeated events are not counted
    assert read_store(uri) == read_store(f"sqlite:///{folder.parent}/mlflow.db")
    # Nothing is sent to a store that has everything.
    assert f"{folder}: 0 entries sent to {uri}, FINISHED" in zscl("sync", folder, "--uri", uri).out


def test_repeated_uploads_change_nothing(resumed_run: FakeRun, folder: Path, zscl: Callable[..., Command]) -> None:
    uri = f"sqlite:///{folder.parent}/mlflow.db"
    before, client = read_store(uri), MlflowClient(uri)
    [parent] = client.search_runs([client.get_experiment_by_name("zscl").experiment_id], f"tags.`{LEVEL}` = 'sequence'")
    # As if the process had been killed before it recorded the position.
    client.delete_tag(parent.info.run_id, JOURNAL_POSITION)
    synced = zscl("sync", folder)
    assert synced.code == 0, synced.error
    assert " 0 entries" not in synced.out
    assert read_store(uri) == before


def test_a_locked_database_does_not_delay_the_run(folder: Path, experiment: Make) -> None:
    run = FakeRun(folder)
    uploader = run.start_uploader(experiment())
    run.emit(*BEGINNING, started(1), steps(1, 0))
    with closing(sqlite3.connect(folder.parent / "mlflow.db", isolation_level=None)) as other:
        wait_until(lambda: _locked(other))
        for number in range(1, 41):
            run.emit(steps(1, number))
            time.sleep(0.05)
        other.execute("ROLLBACK")  # after all steps: none of them has waited for the lock
    run.emit(trained(1), row(1))
    write_state(folder, "KILLED", "enough")
    assert uploader.end()
    child = read_store(f"sqlite:///{folder.parent}/mlflow.db")["1-first"]
    assert [step for step, _ in curve(child, "loss/classification")] == list(range(41))


def _locked(database: sqlite3.Connection) -> bool:
    try:
        database.execute("BEGIN EXCLUSIVE")
    except sqlite3.OperationalError:
        return False
    return True


@pytest.fixture
def toggle_store(folder: Path) -> Iterator[Callable[[], None]]:
    """A function that damages the store, and restores it in the next call."""
    file, backup = folder.parent / "mlflow.db", folder.parent / "backup.db"

    def toggle() -> None:
        if backup.exists():
            file.write_bytes(backup.read_bytes())
            backup.unlink()
        else:
            shutil.copy(file, backup)
            file.write_bytes(b"no database any more" * 1000)

    return toggle


def test_a_store_that_recovers_receives_everything(
    folder: Path, experiment: Make, toggle_store: Callable[[], None]
) -> None:
    run = FakeRun(folder)
    uploader = run.start_uploader(experiment())
    run.emit(*BEGINNING)
    uri = f"sqlite:///{folder.parent}/mlflow.db"
    wait_until(lambda: len(read_store(uri)["run"]["histories"]) > 2)
    toggle_store()
    run.emit(started(1), steps(1, 0, 1))
    wait_until(lambda: len(run.messages) == 1)
    time.sleep(0.5)  # some attempts later
    run.emit(steps(1, 2))
    toggle_store()
    wait_until(lambda: len(run.messages) == 2)
    run.emit(steps(1, 3), trained(1), row(1))
    write_state(folder, "KILLED", "enough")
    assert uploader.end()
    assert "MLflow does not accept records" in run.messages[0]
    assert "MLflow accepts records again" in run.messages[1]
    store = read_store(uri)
    assert [step for step, _ in curve(store["1-first"], "gradient_norm")] == [0, 1, 2, 3]
    assert [step for step, _ in curve(store["run"], "accuracy/first")] == [0, 1]


def test_a_store_that_does_not_recover_does_not_block_the_run(
    folder: Path, experiment: Make, empty_store: Path, toggle_store: Callable[[], None], zscl: Callable[..., Command]
) -> None:
    run = FakeRun(folder)
    uploader = run.start_uploader(experiment())
    toggle_store()
    run.emit(*BEGINNING, *stage_events(1), *stage_events(2))
    run.finish()
    assert not uploader.end(timeout=0.5)
    assert run.messages[-1].endswith(f"zscl sync {folder}")
    failed = zscl("sync", folder)
    assert failed.code == 2
    assert "found no reachable MLflow store" in failed.error
    shutil.copy(empty_store, folder.parent / "other.db")
    assert zscl("sync", folder, "--uri", f"sqlite:///{folder.parent}/other.db").code == 0
    assert read_store(f"sqlite:///{folder.parent}/other.db")["run"]["status"] == "FINISHED"


@pytest.fixture
def artifacts(folder: Path) -> Path:
    """The location of the store's artifacts, which cannot be created until the file in its path is deleted."""
    path = folder.parent / "blocked/artifacts"
    path.parent.touch()
    MlflowClient(f"sqlite:///{folder.parent}/mlflow.db").create_experiment("zscl", artifact_location=str(path))
    return path


def sequence_run(uri: str) -> Any:
    """The only run of level sequence in a store."""
    client = MlflowClient(uri)
    experiments = [client.get_experiment_by_name("zscl").experiment_id]
    return client.search_runs(experiments, "tags.`zscl.level` = 'sequence'")[0]


def test_a_run_is_finished_even_if_the_artifact_store_fails(folder: Path, experiment: Make, artifacts: Path) -> None:
    run, uri = FakeRun(folder), f"sqlite:///{folder.parent}/mlflow.db"
    uploader = run.start_uploader(experiment())
    run.emit(*BEGINNING, *stage_events(1), *stage_events(2))
    run.finish()
    ending = threading.Thread(target=uploader.end, args=[200.0], daemon=True)
    ending.start()
    wait_until(lambda: bool(run.messages), seconds=100.0)
    assert f"its artifact store at {artifacts}" in run.messages[0]
    assert "did not accept the files (NotADirectoryError" in run.messages[0]
    assert sequence_run(uri).info.status == "FINISHED"
    assert sequence_run(uri).data.metrics["transfer"] == 0.5
    artifacts.parent.unlink()
    ending.join()
    assert run.messages[1:] == ["MLflow accepts records again; nothing is lost"]
    assert ARTIFACTS_MISSING not in sequence_run(uri).data.tags
    assert (Path(sequence_run(uri).info.artifact_uri) / "result.json").is_file()


def test_files_that_the_artifact_store_refused_are_synced_later(
    folder: Path, artifacts: Path, zscl: Callable[..., Command]
) -> None:
    run, uri = FakeRun(folder), f"sqlite:///{folder.parent}/mlflow.db"
    run.emit(*BEGINNING, *stage_events(1), *stage_events(2))
    run.finish()
    for _ in range(2):
        failed = zscl("sync", folder)
        assert (failed.code, "no reachable" in failed.error) == (2, False)
        assert f"its artifact store at {artifacts}" in failed.error
        assert failed.error.rstrip().endswith(f"then repeat: zscl sync {folder}")
        assert sequence_run(uri).info.status == "FINISHED"
        assert "its artifact store at" in sequence_run(uri).data.tags[ARTIFACTS_MISSING]
    artifacts.parent.unlink()
    assert zscl("sync", folder).code == 0
    assert ARTIFACTS_MISSING not in sequence_run(uri).data.tags
    assert (Path(sequence_run(uri).info.artifact_uri) / "result.json").is_file()
    assert f"{folder}: 0 entries sent to {uri}, FINISHED" in zscl("sync", folder).out


def test_a_deleted_experiment_can_be_restored_and_synced(
    folder: Path, experiment: Make, zscl: Callable[..., Command]
) -> None:
    run = FakeRun(folder)
    uploader = run.start_uploader(experiment())
    client = MlflowClient(f"sqlite:///{folder.parent}/mlflow.db")
    experiment_id = client.get_experiment_by_name("zscl").experiment_id
    client.delete_experiment(experiment_id)
    run.emit(*BEGINNING, *stage_events(1))
    wait_until(lambda: bool(run.messages), seconds=100.0)
    write_state(folder, "KILLED", "enough")
    assert not uploader.end(timeout=0.1)
    assert "tracking.experiment: found 'zscl' deleted" in run.messages[0]
    with refused(ErrorCode.REJECTED, "tracking.experiment") as error:
        JournalUploader(experiment(), "abc", folder, print)
    assert "restore --experiment-id 1)" in str(error.value)
    assert "--offline" in str(error.value)
    failed = zscl("sync", folder)
    assert (failed.code, "tracking.experiment: found 'zscl' deleted" in failed.error) == (2, True)
    client.restore_experiment(experiment_id)
    assert zscl("sync", folder).code == 0
    assert read_store(f"sqlite:///{folder.parent}/mlflow.db")["1-first"]["status"] == "FINISHED"


def test_a_run_whose_process_is_gone_was_killed(folder: Path, zscl: Callable[..., Command]) -> None:
    run = FakeRun(folder)
    write_state(folder, "RUNNING")
    run.emit(*BEGINNING, started(1), steps(1, 0, 1))
    with run_lock(folder):
        failed = zscl("sync", folder)
    assert (failed.code, "another process at work on this run" in failed.error) == (2, True)
    assert zscl("sync", folder).code == 0
    store = read_store(f"sqlite:///{folder.parent}/mlflow.db")
    assert (store["run"]["status"], store["1-first"]["status"]) == ("KILLED", "KILLED")


@pytest.mark.parametrize(
    "uri",
    ["sqlite:////proc/no/such/place.db", "http://127.0.0.1:9", "postgresql+psycopg://127.0.0.1:9/y"],
)
def test_a_store_that_cannot_be_opened_is_refused(experiment: Make, tmp_path: Path, uri: str) -> None:
    with refused(ErrorCode.UNREACHABLE, "tracking.uri"):
        JournalUploader(experiment(tracking={"uri": uri}), "abc", tmp_path / "run", print)


def test_a_file_that_is_not_a_database_is_refused(experiment: Make, tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"no database" * 1000)
    with refused(ErrorCode.UNREACHABLE, "tracking.uri"):
        JournalUploader(experiment(), "abc", tmp_path / "run", print)


def test_folders_and_stores_that_cannot_be_synced_are_refused(
    folder: Path, experiment: Make, zscl: Callable[..., Command]
) -> None:
    def sync_error(run: Path, *options: str) -> str:
        failed = zscl("sync", run, *options)
        assert failed.code == 2
        return failed.error

    assert "no such folder, expected a run's folder" in sync_error(folder.parent / "nowhere")
    assert "found no journal.jsonl" in sync_error(folder)
    FakeRun(folder).emit(*BEGINNING)
    assert "found no reachable MLflow store at http://127.0.0.1:9" in sync_error(folder, "--uri", "http://127.0.0.1:9")
    recipes.write_experiment(experiment(tracking={"uri": "http://me:secret@127.0.0.1:9"}), folder / "experiment.yaml")
    assert "tracking.uri: found http://me:***@127.0.0.1:9 without its password" in sync_error(folder)
