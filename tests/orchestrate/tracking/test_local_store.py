"""SQLite stores and their artifacts in folders that are moved, copied or have unusual names."""

import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from support.tracked_run import BEGINNING, record_killed_run, sequence_run_ids, started, steps

from orchestrate.lifecycle.paths import browse_command, sqlite_file, sqlite_uri
from orchestrate.tracking.attachments import attach_files
from orchestrate.tracking.lookup import find_runs
from orchestrate.tracking.mlflow_client import check_store
from schemas.experiment import Experiment

Make = Callable[..., Experiment]


def test_a_moved_project_keeps_its_runs_and_its_artifacts(
    folder: Path, experiment: Make, tmp_path_factory: pytest.TempPathFactory
) -> None:
    first = record_killed_run(folder, experiment(), *BEGINNING, started(1))
    # Written without a client, which would cache the location of the run's artifacts in this process.
    artifacts = folder.parent / f"mlflow-artifacts/{first}/artifacts/notes"
    artifacts.mkdir(parents=True)
    (artifacts / "note.txt").write_text("before")
    moved = tmp_path_factory.mktemp("elsewhere") / "project"
    folder.parent.rename(moved)
    assert record_killed_run(moved / "run", experiment(), steps(1, 0)) == first
    assert sequence_run_ids(moved / "mlflow.db") == [first]
    (moved / "run/more.txt").write_text("after")
    assert attach_files(moved / "run", [moved / "run/more.txt"], "notes", print)
    client = MlflowClient(sqlite_uri(moved / "mlflow.db"))
    assert [artifact.path for artifact in client.list_artifacts(first, "notes")] == ["notes/more.txt", "notes/note.txt"]
    assert client.get_run(first).data.tags["zscl.folder"] == str(moved / "run")
    assert len(list((moved / "mlflow-artifacts").rglob("*.txt"))) == 2
    assert not folder.parent.exists()


def test_a_store_that_was_moved_is_read_without_changes(
    folder: Path, experiment: Make, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """It may be read-only, or in use on another machine."""
    first = record_killed_run(folder, experiment(), *BEGINNING, started(1))
    artifacts = folder.parent / f"mlflow-artifacts/{first}/artifacts"
    artifacts.mkdir(parents=True)
    (artifacts / "result.json").write_text("{}")
    shutil.copy(folder / "experiment.yaml", artifacts)
    moved = tmp_path_factory.mktemp("elsewhere") / "project"
    folder.parent.rename(moved)
    before, uri = (moved / "mlflow.db").read_bytes(), sqlite_uri(moved / "mlflow.db")
    assert check_store(uri, "zscl") == "experiment 'zscl' exists"
    assert find_runs([first], None, uri) == {first: moved / "run"}
    (moved / "run/more.txt").write_text("after")
    assert attach_files(moved / "run", [moved / "run/more.txt"], "notes", print)
    assert (moved / f"mlflow-artifacts/{first}/artifacts/notes/more.txt").read_text() == "after"
    (moved / "run").rename(moved / "other")
    downloaded = find_runs([first], None, uri)[first]
    assert isinstance(downloaded, Path)
    assert (downloaded / "result.json").read_text() == "{}"
    assert (moved / "mlflow.db").read_bytes() == before
    assert not folder.parent.exists()


def test_a_copied_project_does_not_change_its_original(folder: Path, experiment: Make, tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    for name in ("mlflow.db", "run"):
        (tmp_path / name).rename(project / name)
    record_killed_run(project / "run", experiment(), *BEGINNING)
    (tmp_path / "note.txt").write_text("x")
    attach_files(project / "run", [tmp_path / "note.txt"], "notes", print)
    shutil.copytree(project, tmp_path / "copy")
    before = sorted(project.rglob("*"))
    record_killed_run(tmp_path / "copy/run", experiment(), started(1))
    assert attach_files(tmp_path / "copy/run", [tmp_path / "note.txt"], "notes", print)
    assert len(sequence_run_ids(project / "mlflow.db")) == 1
    assert sorted(project.rglob("*")) == before
    assert len(list((tmp_path / "copy/mlflow-artifacts").rglob("note.txt"))) == 2


@pytest.mark.parametrize("name", ["it's", "a%20b", "who?me", "a#b;c", "ü ö", '[x] "y"', "a&b=c", "a\\b", "x@y:z"])
def test_stores_and_artifacts_in_folders_with_unusual_names(
    folder: Path, experiment: Make, tmp_path: Path, name: str
) -> None:
    path = tmp_path / "odd" / name
    path.mkdir(parents=True)
    shutil.move(folder.parent / "mlflow.db", path / "mlflow.db")
    shutil.move(folder, path / "run")
    store = path / "mlflow.db"
    assert sqlite_file(sqlite_uri(store)) == store
    command = shlex.split(browse_command(sqlite_uri(store)))
    assert command[1:3] == ["ui", "--backend-store-uri"]
    assert sqlite_file(command[3]) == store
    first = record_killed_run(path / "run", experiment(), *BEGINNING)
    assert record_killed_run(path / "run", experiment(), started(1)) == first
    assert sequence_run_ids(store) == [first]
    (path / "run/note.txt").write_text("x")
    assert attach_files(path / "run", [path / "run/note.txt"], "notes", print)
    assert len(list((path / "mlflow-artifacts").rglob("note.txt"))) == 1
    assert [folder.name for folder in (tmp_path / "odd").iterdir()] == [name]
