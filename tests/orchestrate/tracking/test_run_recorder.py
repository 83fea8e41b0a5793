"""The journal on its way to MLflow: beside a run, after it, and through whatever goes wrong in between."""

import json
import shlex
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

from orchestrate.lifecycle.lock import run_lock
from orchestrate.lifecycle.paths import browse_command, restore_password, sqlite_file, sqlite_uri
from orchestrate.lifecycle.run_status import write_state
from orchestrate.recipes import recipe as recipes
from orchestrate.tracking import uploader as shipping
from orchestrate.tracking.attachments import attach_files
from orchestrate.tracking.lookup import find_runs
from orchestrate.tracking.mlflow_client import (
    ARTIFACTS_MISSING,
    JOURNAL_POSITION,
    LEVEL,
    PARENT,
    REASON,
    check_store,
    valid_name,
)
from orchestrate.tracking.uploader import JournalUploader
from schemas.errors import InputError
from schemas.events import (
    CheckpointWritten,
    Note,
    RowMeasured,
    RunStarted,
    StageStarted,
    StageTrained,
    StepsTaken,
)
from schemas.experiment import Experiment
from schemas.redaction import mask
from schemas.results import Metrics, Result, StageResult, StepLosses, TaskSummary
from zscl.sequence.journal import Journal
from zscl.sequence.layout import JOURNAL

Make = Callable[..., Experiment]
STAGES = ("first", "second")
BEGINNING = (RunStarted(fingerprint="abc"), RowMeasured(stage=0, accuracy={"first": 0.5, "second": 0.25}))


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipping, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(shipping, "RETRY_DELAYS", (0.05, 0.2))


@pytest.fixture
def folder(tmp_path: Path, empty_store: Path, experiment: Make) -> Path:
    """A run's folder beside an MLflow store that is empty."""
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    recipes.write_experiment(experiment(), tmp_path / "run/experiment.yaml")
    return tmp_path / "run"


class Run:
    """A run that only happens in its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.said = folder, list[str]()
        self.journal = Journal(folder / JOURNAL)

    def happens(self, *progress: Any) -> None:
        for each in progress:
            self.journal(each)

    def shipper(self, experiment: Experiment, fingerprint: str = "abc") -> JournalUploader:
        write_state(self.folder, "RUNNING")
        return JournalUploader(experiment, fingerprint, self.folder, self.said.append)

    def finished(self) -> None:
        stages = tuple(trained(stage).result for stage in (1, 2))
        figures = Metrics(transfer=0.5, avg=0.6, last=0.7, forgetting=0.1)
        result = Result(
            name="tiny", method="zscl", method_changes={}, seed=0, fingerprint="abc",
            tasks=tuple(TaskSummary(name=name, path=name, digest=name, test_images=4) for name in STAGES),
            zero_shot=(0.5, 0.25), accuracy_matrix=((0.6, 0.3), (0.7, 0.35)), metrics=figures,
            zero_shot_metrics=figures, stages=stages, reference_texts=14, workers=1, device="cpu",
            warnings=("stage 1 looks bad",), train_seconds=2.0, evaluation_seconds=1.0, versions={},
        )  # fmt: skip
        (self.folder / "result.json").write_text(result.model_dump_json())
        write_state(self.folder, "FINISHED")


def steps(stage: int, *numbers: int) -> StepsTaken:
    taken = tuple(
        StepLosses(step=step, learning_rate=0.1, losses={"classification": 1 / (step + 1)}, gradient_norm=step + 0.5)
        for step in numbers
    )
    return StepsTaken(stage=stage, task=STAGES[stage - 1], steps=taken, images_per_second=10.0)


def started(stage: int) -> StageStarted:
    return StageStarted(stage=stage, task=STAGES[stage - 1], steps=4)


def trained(stage: int) -> StageTrained:
    result = StageResult(
        stage=stage, task=STAGES[stage - 1], steps=4, images_seen=44, train_seconds=1.5, images_per_second=10.0,
        merges=1, losses={},
    )  # fmt: skip
    return StageTrained(result=result)


def row(stage: int) -> RowMeasured:
    return RowMeasured(stage=stage, accuracy={"first": 0.5 + stage / 10, "second": 0.25 + stage / 20})


def stage_of(stage: int) -> tuple[Any, ...]:
    return (
        started(stage), steps(stage, 0, 1), CheckpointWritten(stage=stage, steps=2), Note(text="by the way"),
        steps(stage, 2), steps(stage, 3), trained(stage), row(stage),
    )  # fmt: skip


def recorded(uri: str) -> dict[str, dict[str, Any]]:
    """All that a store has: each run by its name, with its whole histories."""
    client = MlflowClient(uri)
    found = {}
    for run in client.search_runs([client.get_experiment_by_name("zscl").experiment_id]):
        stage = PARENT in run.data.tags
        assert run.info.run_name not in found
        found[run.info.run_name] = {
            "status": run.info.status,
            "ended": run.info.end_time,
            "started": run.info.start_time if stage else None,  # the parent's is before there is a journal
            "params": run.data.params,
            "tags": {name: value for name, value in run.data.tags.items() if name != PARENT},
            "histories": {
                name: [(at.step, at.value, at.timestamp) for at in client.get_metric_history(run.info.run_id, name)]
                for name in run.data.metrics
            },
            "artefacts": sorted(item.path for item in client.list_artifacts(run.info.run_id)),
        }
    return found


def curve(run: dict[str, Any], name: str) -> list[tuple[int, float]]:
    return [(step, value) for step, value, _ in run["histories"][name]]


def until(condition: Callable[[], bool], seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def online(folder: Path, experiment: Make) -> Run:
    """A run that failed, went on, was recorded while it did, and is finished."""
    run = Run(folder)
    shipper = run.shipper(experiment())
    run.happens(*BEGINNING, *stage_of(1), started(2), steps(2, 0, 1))
    write_state(folder, "FAILED", "a worker died")
    assert shipper.end()
    store = recorded(f"sqlite:///{folder.parent}/mlflow.db")
    assert {name: found["status"] for name, found in store.items()} == {
        "run": "FAILED", "1-first": "FINISHED", "2-second": "FAILED",
    }  # fmt: skip
    assert store["run"]["tags"][REASON] == "a worker died"

    again = Run(folder)
    shipper = again.shipper(experiment(compute={"workers": 2}))
    again.happens(*BEGINNING, row(1), *stage_of(2))  # it says some things again
    again.finished()
    assert shipper.end()
    assert again.said == []
    return again


def test_a_resumed_run_is_one_run_with_one_curve(online: Run, folder: Path) -> None:
    store = recorded(f"sqlite:///{folder.parent}/mlflow.db")
    assert store.keys() == {"run", "1-first", "2-second"}
    parent = store["run"]
    assert curve(parent, "accuracy/first") == [(0, 0.5), (1, 0.6), (2, 0.7)]
    assert [step for step, _ in curve(parent, "accuracy_mean")] == [0, 1, 2]
    assert curve(parent, "transfer") == [(0, 0.5)]
    assert parent["tags"]["zscl.order"] == parent["params"]["tasks"] == "first, second"
    assert parent["tags"]["zscl.warnings"] == "stage 1 looks bad"
    assert REASON not in parent["tags"]
    assert parent["artefacts"] == ["accuracy_matrix.json", "experiment.yaml", "figures", "result.json"]
    for name, accuracy in (("1-first", 0.6), ("2-second", 0.7)):
        child = store[name]
        assert curve(child, "loss/classification") == [(0, 1.0), (1, 1 / 2), (2, 1 / 3), (3, 1 / 4)]
        assert curve(child, "gradient_norm") == [(0, 0.5), (1, 1.5), (2, 2.5), (3, 3.5)]
        assert [step for step, _ in curve(child, "images_per_second")] == [1, 2, 3]
        assert curve(child, "train_seconds") == [(0, 1.5)]
        assert [value for _, value in curve(child, "accuracy/first")] == [accuracy]
    assert {run["status"] for run in store.values()} == {"FINISHED"}


def test_another_store_gets_the_same_afterwards(
    online: Run, folder: Path, empty_store: Path, zscl: Callable[..., Command]
) -> None:
    shutil.copy(empty_store, folder.parent / "other.db")
    uri = f"sqlite:///{folder.parent}/other.db"
    made = zscl("sync", folder, "--uri", uri, "--json")
    assert made.code == 0, made.error
    assert json.loads(made.out)["entries"] == 19  # what was said again is left out
    assert recorded(uri) == recorded(f"sqlite:///{folder.parent}/mlflow.db")
    # And where everything is known, nothing is sent.
    assert f"{folder}: 0 entries sent to {uri}, FINISHED" in zscl("sync", folder, "--uri", uri).out


def test_what_is_sent_again_is_there_once(online: Run, folder: Path, zscl: Callable[..., Command]) -> None:
    uri = f"sqlite:///{folder.parent}/mlflow.db"
    before, client = recorded(uri), MlflowClient(uri)
    [parent] = client.search_runs([client.get_experiment_by_name("zscl").experiment_id], f"tags.`{LEVEL}` = 'sequence'")
    # A process killed between sending and noting the position: here, all the way.
    client.delete_tag(parent.info.run_id, JOURNAL_POSITION)
    made = zscl("sync", folder)
    assert made.code == 0, made.error
    assert " 0 entries" not in made.out
    assert recorded(uri) == before


def test_a_locked_database_delays_nobody(folder: Path, experiment: Make) -> None:
    run = Run(folder)
    shipper = run.shipper(experiment())
    run.happens(*BEGINNING, started(1), steps(1, 0))
    with closing(sqlite3.connect(folder.parent / "mlflow.db", isolation_level=None)) as other:
        until(lambda: _locked(other))
        for number in range(1, 41):
            run.happens(steps(1, number))
            time.sleep(0.05)
        other.execute("ROLLBACK")  # not before all of it has happened: nothing of it has waited for this
    run.happens(trained(1), row(1))
    write_state(folder, "KILLED", "enough")
    assert shipper.end()
    child = recorded(f"sqlite:///{folder.parent}/mlflow.db")["1-first"]
    assert [step for step, _ in curve(child, "loss/classification")] == list(range(41))


def _locked(database: sqlite3.Connection) -> bool:
    try:
        database.execute("BEGIN EXCLUSIVE")
    except sqlite3.OperationalError:
        return False
    return True


@pytest.fixture
def broken(folder: Path) -> Iterator[Callable[[], None]]:
    """Break the store; calling again mends it."""
    file, kept = folder.parent / "mlflow.db", folder.parent / "kept.db"

    def swap() -> None:
        if kept.exists():
            file.write_bytes(kept.read_bytes())
            kept.unlink()
        else:
            shutil.copy(file, kept)
            file.write_bytes(b"no database any more" * 1000)

    return swap


def test_a_store_that_comes_back_gets_everything(folder: Path, experiment: Make, broken: Callable[[], None]) -> None:
    run = Run(folder)
    shipper = run.shipper(experiment())
    run.happens(*BEGINNING)
    uri = f"sqlite:///{folder.parent}/mlflow.db"
    until(lambda: len(recorded(uri)["run"]["histories"]) > 2)
    broken()
    run.happens(started(1), steps(1, 0, 1))
    until(lambda: len(run.said) == 1)
    time.sleep(0.5)  # some attempts later
    run.happens(steps(1, 2))
    broken()
    until(lambda: len(run.said) == 2)
    run.happens(steps(1, 3), trained(1), row(1))
    write_state(folder, "KILLED", "enough")
    assert shipper.end()
    assert "MLflow does not take records" in run.said[0]
    assert "MLflow takes records again" in run.said[1]
    store = recorded(uri)
    assert [step for step, _ in curve(store["1-first"], "gradient_norm")] == [0, 1, 2, 3]
    assert [step for step, _ in curve(store["run"], "accuracy/first")] == [0, 1]


def test_a_store_that_is_gone_for_good_holds_nobody_up(
    folder: Path, experiment: Make, empty_store: Path, broken: Callable[[], None], zscl: Callable[..., Command]
) -> None:
    run = Run(folder)
    shipper = run.shipper(experiment())
    broken()
    run.happens(*BEGINNING, *stage_of(1), *stage_of(2))
    run.finished()
    assert not shipper.end(timeout=0.5)
    assert run.said[-1].endswith(f"zscl sync {folder}")
    refused = zscl("sync", folder)
    assert refused.code == 2
    assert "found no reachable MLflow store" in refused.error
    shutil.copy(empty_store, folder.parent / "other.db")
    assert zscl("sync", folder, "--uri", f"sqlite:///{folder.parent}/other.db").code == 0
    assert recorded(f"sqlite:///{folder.parent}/other.db")["run"]["status"] == "FINISHED"


@pytest.fixture
def artifacts(folder: Path) -> Path:
    """The place of the store's artefacts, which cannot be made as long as a file lies beside it."""
    place = folder.parent / "blocked/artefacts"
    place.parent.touch()
    MlflowClient(f"sqlite:///{folder.parent}/mlflow.db").create_experiment("zscl", artifact_location=str(place))
    return place


def sequence(uri: str) -> Any:
    """The one run of level sequence in a store."""
    client = MlflowClient(uri)
    at = [client.get_experiment_by_name("zscl").experiment_id]
    return client.search_runs(at, "tags.`zscl.level` = 'sequence'")[0]


def test_an_artefact_store_that_takes_nothing_leaves_no_run_under_way(
    folder: Path, experiment: Make, artifacts: Path
) -> None:
    run, uri = Run(folder), f"sqlite:///{folder.parent}/mlflow.db"
    shipper = run.shipper(experiment())
    run.happens(*BEGINNING, *stage_of(1), *stage_of(2))
    run.finished()
    ending = threading.Thread(target=shipper.end, args=[200.0], daemon=True)
    ending.start()
    until(lambda: bool(run.said), seconds=100.0)
    assert f"its artefact store at {artifacts}" in run.said[0]
    assert "did not take the files (NotADirectoryError" in run.said[0]
    assert sequence(uri).info.status == "FINISHED"
    assert sequence(uri).data.metrics["transfer"] == 0.5
    artifacts.parent.unlink()
    ending.join()
    assert run.said[1:] == ["MLflow takes records again; nothing is lost"]
    assert ARTIFACTS_MISSING not in sequence(uri).data.tags
    assert (Path(sequence(uri).info.artifact_uri) / "result.json").is_file()


def test_files_that_an_artefact_store_did_not_take_are_synced_later(
    folder: Path, artifacts: Path, zscl: Callable[..., Command]
) -> None:
    run, uri = Run(folder), f"sqlite:///{folder.parent}/mlflow.db"
    run.happens(*BEGINNING, *stage_of(1), *stage_of(2))
    run.finished()
    for _ in range(2):
        refused = zscl("sync", folder)
        assert (refused.code, "no reachable" in refused.error) == (2, False)
        assert f"its artefact store at {artifacts}" in refused.error
        assert refused.error.rstrip().endswith(f"then repeat: zscl sync {folder}")
        assert sequence(uri).info.status == "FINISHED"
        assert "its artefact store at" in sequence(uri).data.tags[ARTIFACTS_MISSING]
    artifacts.parent.unlink()
    assert zscl("sync", folder).code == 0
    assert ARTIFACTS_MISSING not in sequence(uri).data.tags
    assert (Path(sequence(uri).info.artifact_uri) / "result.json").is_file()
    assert f"{folder}: 0 entries sent to {uri}, FINISHED" in zscl("sync", folder).out


def test_a_deleted_experiment_is_told_and_what_belongs_there_is_kept(
    folder: Path, experiment: Make, zscl: Callable[..., Command]
) -> None:
    run = Run(folder)
    shipper = run.shipper(experiment())
    client = MlflowClient(f"sqlite:///{folder.parent}/mlflow.db")
    identity = client.get_experiment_by_name("zscl").experiment_id
    client.delete_experiment(identity)
    run.happens(*BEGINNING, *stage_of(1))
    until(lambda: bool(run.said), seconds=100.0)
    write_state(folder, "KILLED", "enough")
    assert not shipper.end(timeout=0.1)
    assert "tracking.experiment: found 'zscl' deleted" in run.said[0]
    with pytest.raises(InputError, match=r"restore --experiment-id 1\), or set tracking.experiment .* --offline"):
        JournalUploader(experiment(), "abc", folder, print)
    refused = zscl("sync", folder)
    assert (refused.code, "tracking.experiment: found 'zscl' deleted" in refused.error) == (2, True)
    client.restore_experiment(identity)
    assert zscl("sync", folder).code == 0
    assert recorded(f"sqlite:///{folder.parent}/mlflow.db")["1-first"]["status"] == "FINISHED"


def test_names_that_mlflow_refuses_become_others_that_differ() -> None:
    assert valid_name("accuracy/first-2.0_b c") == "accuracy/first-2.0_b c"
    odd = ["loss/a(b", "loss/a)b", "loss/../x", "loss//x", "/x", "x/", "a'b", "50 %", "x" * 251, "x" * 252, ".."]
    names = [valid_name(name) for name in odd]
    assert len(set(names)) == len(odd)
    assert [valid_name(name) for name in names] == names


def test_a_loss_with_an_odd_name_and_a_task_with_a_long_one_are_recorded(folder: Path, experiment: Make) -> None:
    run = Run(folder)
    shipper = run.shipper(experiment())
    losses = {"my loss (λ=0.5)": 0.5}
    step = StepLosses(step=0, learning_rate=0.1, losses=losses, gradient_norm=1.0)
    taken = StepsTaken(stage=1, task="first", steps=(step,), images_per_second=10.0)
    run.happens(*BEGINNING, started(1), taken, RowMeasured(stage=0, accuracy={"t" * 250: 0.5}))
    write_state(folder, "KILLED", "enough")
    assert shipper.end(), run.said
    store = recorded(f"sqlite:///{folder.parent}/mlflow.db")
    assert valid_name("loss/my loss (λ=0.5)") in store["1-first"]["histories"]


def test_a_stage_that_somebody_deletes_does_not_hold_up_the_rest(folder: Path, experiment: Make) -> None:
    run = Run(folder)
    shipper = run.shipper(experiment())
    run.happens(*BEGINNING, started(1), steps(1, 0, 1))
    client = MlflowClient(f"sqlite:///{folder.parent}/mlflow.db")
    query = f"tags.`{PARENT}` = '{shipper.run_id}'"
    at = [client.get_experiment_by_name("zscl").experiment_id]
    until(lambda: bool(client.search_runs(at, query)))
    client.delete_run(client.search_runs(at, query)[0].info.run_id)
    run.happens(steps(1, 2, 3), trained(1), row(1))
    write_state(folder, "KILLED", "enough")
    assert shipper.end()
    [child] = client.search_runs(at, query)
    assert child.info.status == "FINISHED"
    assert child.data.metrics["accuracy/first"] == 0.6


def test_a_run_whose_process_is_gone_was_killed(folder: Path, zscl: Callable[..., Command]) -> None:
    run = Run(folder)
    write_state(folder, "RUNNING")
    run.happens(*BEGINNING, started(1), steps(1, 0, 1))
    with run_lock(folder):
        refused = zscl("sync", folder)
    assert (refused.code, "another process at work on this run" in refused.error) == (2, True)
    assert zscl("sync", folder).code == 0
    store = recorded(f"sqlite:///{folder.parent}/mlflow.db")
    assert (store["run"]["status"], store["1-first"]["status"]) == ("KILLED", "KILLED")


def test_another_experiment_or_another_life_in_the_same_place_is_another_run(folder: Path, experiment: Make) -> None:
    found = []
    for fingerprint, anew in (("abc", False), ("abd", False), ("abc", False), ("abc", True)):
        if anew:
            (folder / JOURNAL).unlink()
        run = Run(folder)
        shipper = run.shipper(experiment(), fingerprint)
        run.happens(RunStarted(fingerprint=fingerprint))
        assert shipper.end()
        found.append(shipper.run_id)
    assert found[0] == found[2]
    assert len(set(found)) == 3


def sequences(store: Path) -> list[str]:
    """Ids of the runs in a store."""
    client = MlflowClient(sqlite_uri(store))
    at = [client.get_experiment_by_name("zscl").experiment_id]
    return [run.info.run_id for run in client.search_runs(at, f"tags.`{LEVEL}` = 'sequence'")]


def killed(folder: Path, experiment: Experiment, *progress: Any) -> str:
    """Have a run do something and be killed. Returns its id in MLflow."""
    run = Run(folder)
    shipper = run.shipper(experiment)
    run.happens(*progress)
    write_state(folder, "KILLED", "enough")
    assert shipper.end()
    return shipper.run_id


def test_a_moved_project_keeps_its_runs_and_its_artefacts(
    folder: Path, experiment: Make, tmp_path_factory: pytest.TempPathFactory
) -> None:
    first = killed(folder, experiment(), *BEGINNING, started(1))
    # Not by a client: within one process, MLflow remembers where it has left a run's artefacts.
    artefacts = folder.parent / f"mlflow-artifacts/{first}/artifacts/notes"
    artefacts.mkdir(parents=True)
    (artefacts / "note.txt").write_text("before")
    moved = tmp_path_factory.mktemp("elsewhere") / "project"
    folder.parent.rename(moved)
    assert killed(moved / "run", experiment(), steps(1, 0)) == first
    assert sequences(moved / "mlflow.db") == [first]
    (moved / "run/more.txt").write_text("after")
    assert attach_files(moved / "run", [moved / "run/more.txt"], "notes", print)
    client = MlflowClient(sqlite_uri(moved / "mlflow.db"))
    assert [each.path for each in client.list_artifacts(first, "notes")] == ["notes/more.txt", "notes/note.txt"]
    assert client.get_run(first).data.tags["zscl.folder"] == str(moved / "run")
    assert len(list((moved / "mlflow-artifacts").rglob("*.txt"))) == 2
    assert not folder.parent.exists()


def test_a_store_that_was_moved_is_read_without_a_change(
    folder: Path, experiment: Make, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """It may be read-only, or another machine's view of a store that is in use there."""
    first = killed(folder, experiment(), *BEGINNING, started(1))
    artefacts = folder.parent / f"mlflow-artifacts/{first}/artifacts"
    artefacts.mkdir(parents=True)
    (artefacts / "result.json").write_text("{}")
    shutil.copy(folder / "experiment.yaml", artefacts)
    moved = tmp_path_factory.mktemp("elsewhere") / "project"
    folder.parent.rename(moved)
    before, uri = (moved / "mlflow.db").read_bytes(), sqlite_uri(moved / "mlflow.db")
    assert check_store(uri, "zscl") == "experiment 'zscl' is there"
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


def test_a_recorded_folder_that_cannot_be_looked_at_is_another_one(folder: Path, experiment: Make) -> None:
    """As one below a folder of another user is; a name that is too long is refused to all users."""
    first = killed(folder, experiment(), *BEGINNING)
    uri, hidden = sqlite_uri(folder.parent / "mlflow.db"), f"/tmp/{'x' * 300}/run"
    MlflowClient(uri).set_tag(first, "zscl.folder", hidden)
    assert find_runs([first], None, uri) == {first: folder}
    assert killed(folder, experiment(), started(1)) == first
    with pytest.raises(InputError, match=r"run: cannot be read \(File name too long\), expected a run's folder"):
        find_runs([hidden], None, uri)


def test_a_copied_project_leaves_its_original_alone(folder: Path, experiment: Make, tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    for name in ("mlflow.db", "run"):
        (tmp_path / name).rename(project / name)
    killed(project / "run", experiment(), *BEGINNING)
    (tmp_path / "note.txt").write_text("x")
    attach_files(project / "run", [tmp_path / "note.txt"], "notes", print)
    shutil.copytree(project, tmp_path / "copy")
    before = sorted(project.rglob("*"))
    killed(tmp_path / "copy/run", experiment(), started(1))
    assert attach_files(tmp_path / "copy/run", [tmp_path / "note.txt"], "notes", print)
    assert len(sequences(project / "mlflow.db")) == 1
    assert sorted(project.rglob("*")) == before
    assert len(list((tmp_path / "copy/mlflow-artifacts").rglob("note.txt"))) == 2


def test_a_run_by_another_path_is_the_same_run(folder: Path, experiment: Make, tmp_path: Path) -> None:
    first = killed(folder, experiment(), *BEGINNING)
    (tmp_path / "link").symlink_to(folder)
    linked = experiment(tracking={"uri": sqlite_uri(tmp_path / "mlflow.db")})
    assert killed(tmp_path / "link", linked, started(1)) == first


def test_a_copied_run_is_another_run(folder: Path, experiment: Make) -> None:
    first = killed(folder, experiment(), *BEGINNING)
    shutil.copytree(folder, folder.with_name("copy"))
    second = killed(folder.with_name("copy"), experiment(), started(1))
    assert killed(folder, experiment(), steps(1, 0)) == first
    assert sorted(sequences(folder.parent / "mlflow.db")) == sorted([first, second])


@pytest.mark.parametrize("name", ["it's", "a%20b", "who?me", "a#b;c", "ü ö", '[x] "y"', "a&b=c", "a\\b", "x@y:z"])
def test_whatever_a_folder_is_called_its_store_and_artefacts_lie_in_it(
    folder: Path, experiment: Make, tmp_path: Path, name: str
) -> None:
    place = tmp_path / "odd" / name
    place.mkdir(parents=True)
    shutil.move(folder.parent / "mlflow.db", place / "mlflow.db")
    shutil.move(folder, place / "run")
    store = place / "mlflow.db"
    assert sqlite_file(sqlite_uri(store)) == store
    command = shlex.split(browse_command(sqlite_uri(store)))
    assert command[1:3] == ["ui", "--backend-store-uri"]
    assert sqlite_file(command[3]) == store
    first = killed(place / "run", experiment(), *BEGINNING)
    assert killed(place / "run", experiment(), started(1)) == first
    assert sequences(store) == [first]
    (place / "run/note.txt").write_text("x")
    assert attach_files(place / "run", [place / "run/note.txt"], "notes", print)
    assert len(list((place / "mlflow-artifacts").rglob("note.txt"))) == 1
    assert [each.name for each in (tmp_path / "odd").iterdir()] == [name]


@pytest.mark.parametrize(
    "uri",
    ["sqlite:////proc/no/such/place.db", "http://127.0.0.1:9", "postgresql+psycopg://127.0.0.1:9/y"],
)
def test_a_store_that_cannot_be_opened_is_refused(experiment: Make, tmp_path: Path, uri: str) -> None:
    with pytest.raises(InputError, match=r"tracking\.uri: found no reachable MLflow store"):
        JournalUploader(experiment(tracking={"uri": uri}), "abc", tmp_path / "run", print)


def test_a_database_that_is_none_is_refused(experiment: Make, tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"no database" * 1000)
    with pytest.raises(InputError, match=r"tracking\.uri: found no reachable MLflow store"):
        JournalUploader(experiment(), "abc", tmp_path / "run", print)


def test_what_cannot_be_synced_is_refused_in_a_sentence(
    folder: Path, experiment: Make, zscl: Callable[..., Command]
) -> None:
    def refused(run: Path, *options: str) -> str:
        made = zscl("sync", run, *options)
        assert made.code == 2
        return made.error

    assert "no such folder, expected a run's folder" in refused(folder.parent / "nowhere")
    assert "found no journal.jsonl" in refused(folder)
    Run(folder).happens(*BEGINNING)
    assert "found no reachable MLflow store at http://127.0.0.1:9" in refused(folder, "--uri", "http://127.0.0.1:9")
    recipes.write_experiment(experiment(tracking={"uri": "http://me:secret@127.0.0.1:9"}), folder / "experiment.yaml")
    assert "tracking.uri: found http://me:***@127.0.0.1:9 without its password" in refused(folder)


def test_passwords_are_not_shown() -> None:
    assert mask("postgresql://me:secret@host/db") == "postgresql://me:***@host/db"
    assert mask("sqlite:////tmp/mlflow.db") == "sqlite:////tmp/mlflow.db"


def test_a_password_is_not_written_down(experiment: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, file = experiment(tracking={"uri": "http://me:secret@somewhere:5000"}), tmp_path / "experiment.yaml"
    recipes.write_experiment(made, file)
    assert "http://me:***@somewhere:5000" in file.read_text()
    assert "secret" not in file.read_text()
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret")
    assert restore_password("http://me:***@somewhere:5000") == "http://somewhere:5000"
