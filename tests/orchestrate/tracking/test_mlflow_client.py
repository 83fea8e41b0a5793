"""Finding the MLflow run of a folder, and names that MLflow accepts."""

import shutil
from collections.abc import Callable
from pathlib import Path

from support.tracked_run import BEGINNING, FakeRun, record_killed_run, sequence_run_ids, started, steps

from orchestrate.lifecycle.paths import sqlite_uri
from orchestrate.tracking.mlflow_client import valid_name
from schemas.events import RunStarted
from schemas.experiment import Experiment
from zscl.sequence.layout import JOURNAL

Make = Callable[..., Experiment]


def test_another_experiment_or_start_time_in_the_same_folder_is_another_run(folder: Path, experiment: Make) -> None:
    run_ids = []
    for fingerprint, is_restarted in (("abc", False), ("abd", False), ("abc", False), ("abc", True)):
        if is_restarted:
            (folder / JOURNAL).unlink()
        run = FakeRun(folder)
        uploader = run.start_uploader(experiment(), fingerprint)
        run.emit(RunStarted(fingerprint=fingerprint))
        assert uploader.end()
        run_ids.append(uploader.run_id)
    assert run_ids[0] == run_ids[2]
    assert len(set(run_ids)) == 3


def test_a_run_in_a_symbolic_link_is_the_same_run(folder: Path, experiment: Make, tmp_path: Path) -> None:
    first = record_killed_run(folder, experiment(), *BEGINNING)
    (tmp_path / "link").symlink_to(folder)
    linked = experiment(tracking={"uri": sqlite_uri(tmp_path / "mlflow.db")})
    assert record_killed_run(tmp_path / "link", linked, started(1)) == first


def test_a_copied_run_is_another_run(folder: Path, experiment: Make) -> None:
    first = record_killed_run(folder, experiment(), *BEGINNING)
    shutil.copytree(folder, folder.with_name("copy"))
    second = record_killed_run(folder.with_name("copy"), experiment(), started(1))
    assert record_killed_run(folder, experiment(), steps(1, 0)) == first
    assert sorted(sequence_run_ids(folder.parent / "mlflow.db")) == sorted([first, second])


def test_invalid_names_become_different_valid_names() -> None:
    assert valid_name("accuracy/first-2.0_b c") == "accuracy/first-2.0_b c"
    odd = ["loss/a(b", "loss/a)b", "loss/../x", "loss//x", "/x", "x/", "a'b", "50 %", "x" * 251, "x" * 252, ".."]
    names = [valid_name(name) for name in odd]
    assert len(set(names)) == len(odd)
    assert [valid_name(name) for name in names] == names
