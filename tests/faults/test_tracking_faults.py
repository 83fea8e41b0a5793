"""Tests of MLflow tracking with a server that is killed, loses responses or stays down, and with a locked database."""

import http.client
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient
from support.faults import PATIENCE_SECONDS

from orchestrate.lifecycle.run_status import write_state
from orchestrate.recipes import recipe as recipes
from orchestrate.tracking import uploader as shipping
from orchestrate.tracking.mlflow_client import PARENT
from orchestrate.tracking.uploader import JournalUploader
from schemas.events import RowMeasured, RunStarted, StageStarted, StageTrained, StepsTaken
from schemas.experiment import Experiment
from schemas.results import StageResult, StepLosses
from zscl.sequence.journal import Journal
from zscl.sequence.layout import JOURNAL

pytestmark = [pytest.mark.faults, pytest.mark.timeout(3600)]
STEPS_A_SECOND = 20
MOST_SECONDS = 10.0  # maximum duration of a step that does not wait for MLflow, even on a busy machine
COSTS = {"steps": 1, "images_seen": 1, "train_seconds": 1.0, "images_per_second": 1.0, "merges": 1, "losses": {}}


class Server:
    """An `mlflow server` process that can be killed and restarted on the same database."""

    def __init__(self, database: Path) -> None:
        self.database = database
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{self.database}"]
        command += ["--artifacts-destination", str(self.database.parent / "artefacts")]
        self.process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"],
            env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        for _ in range(2 * round(PATIENCE_SECONDS)):
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=1)
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
            else:
                return
        raise TimeoutError(self.uri)

    def kill(self) -> None:
        if self.process:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.process = None


@pytest.fixture
def server(tmp_path: Path, empty_store: Path) -> Iterator[Server]:
    made = Server(shutil.copy(empty_store, tmp_path / "mlflow.db"))
    made.start()
    yield made
    made.kill()


class Training:
    """Writes events of stages to a journal at a steady pace, and measures the slowest step."""

    def __init__(self, folder: Path) -> None:
        self.journal, self.latest, self.stage, self.taken = Journal(folder / JOURNAL), 0.0, 0, list[int]()
        self.journal(RunStarted(fingerprint="abc"))
        self.journal(RowMeasured(stage=0, accuracy={"task": 0.5}))

    def begin(self) -> None:
        self.stage += 1
        self.taken.append(0)
        self.journal(StageStarted(stage=self.stage, task="task", steps=1000))

    def go_on(self, seconds: float) -> None:
        for _ in range(round(seconds * STEPS_A_SECOND)):
            before = time.perf_counter()
            step = StepLosses(step=self.taken[-1], learning_rate=0.1, losses={"loss": 0.5}, gradient_norm=1.0)
            self.journal(StepsTaken(stage=self.stage, task="task", steps=(step,), images_per_second=1.0))
            self.taken[-1] += 1
            self.latest = max(self.latest, time.perf_counter() - before)
            time.sleep(1 / STEPS_A_SECOND)

    def complete(self) -> None:
        self.journal(StageTrained(result=StageResult.model_validate({"stage": self.stage, "task": "task", **COSTS})))
        self.journal(RowMeasured(stage=self.stage, accuracy={"task": 0.5 + self.stage / 100}))

    def check(self, uri: str) -> None:
        """Assert that a store has every record once and in order."""
        client = MlflowClient(uri)
        at = [client.get_experiment_by_name("zscl").experiment_id]
        [parent] = client.search_runs(at, "tags.`zscl.level` = 'sequence'")
        rows = client.get_metric_history(parent.info.run_id, "accuracy/task")
        assert [row.step for row in rows] == list(range(self.stage + 1))
        stages = client.search_runs(at, f"tags.`{PARENT}` = '{parent.info.run_id}'", order_by=["start_time ASC"])
        assert [stage.info.run_name for stage in stages] == [f"{stage}-task" for stage in range(1, self.stage + 1)]
        for stage, taken in zip(stages, self.taken, strict=True):
            assert stage.info.status == "FINISHED"
            for name in ("loss/loss", "learning_rate", "gradient_norm", "images_per_second"):
                history = client.get_metric_history(stage.info.run_id, name)
                assert [point.step for point in history] == list(range(taken)), (stage.info.run_name, name)
                times = [point.timestamp for point in history]
                assert times == sorted(times)


@pytest.fixture
def begin(
    tmp_path: Path, experiment: Callable[..., Experiment]
) -> Callable[[str], tuple[Training, JournalUploader, list[str]]]:
    def start(uri: str) -> tuple[Training, JournalUploader, list[str]]:
        made, folder, said = experiment(tracking={"uri": uri}), tmp_path / "run", list[str]()
        recipes.write_experiment(made, folder / "experiment.yaml")
        write_state(folder, "RUNNING")
        return Training(folder), JournalUploader(made, "abc", folder, said.append), said

    return start


Begin = Callable[[str], tuple[Training, JournalUploader, list[str]]]


@pytest.mark.fault(
    "The MLflow server is killed, twice, and restarted", "Training at full speed; everything arrives in order, once"
)
def test_a_server_that_is_killed_and_started_again_gets_everything_once(
    server: Server, begin: Begin, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training, shipper, said = begin(server.uri)
    training.begin()
    training.go_on(6)
    for _ in range(2):
        server.kill()
        training.go_on(10)
        training.complete()
        training.begin()
        training.go_on(10)
        server.start()
        training.go_on(6)
    training.complete()
    write_state(tmp_path / "run", "KILLED", "enough")
    assert shipper.end(PATIENCE_SECONDS), said
    assert training.latest < MOST_SECONDS
    assert len(said) >= 2  # two per outage; a second outage before the next retry is not reported
    assert all("does not accept records" in text for text in said[::2])
    assert all("accepts records again" in text for text in said[1::2])
    assert capsys.readouterr().out == ""
    training.check(server.uri)


@pytest.mark.fault("The MLflow server is gone for good", "The run finishes; `zscl sync` uploads everything later")
def test_a_server_that_never_comes_back_holds_nobody_up(server: Server, begin: Begin, tmp_path: Path) -> None:
    training, shipper, said = begin(server.uri)
    training.begin()
    training.go_on(6)
    server.kill()
    training.go_on(20)
    training.complete()
    write_state(tmp_path / "run", "KILLED", "enough")
    before = time.perf_counter()
    assert not shipper.end()
    assert time.perf_counter() - before < PATIENCE_SECONDS
    assert said[-1].endswith(f"zscl sync {tmp_path / 'run'}")
    assert training.latest < MOST_SECONDS
    server.start()
    made = shipping.sync_run(tmp_path / "run", None, lambda sent, total: None)
    assert (made.status, made.entries > 400) == ("KILLED", True)
    training.check(server.uri)


class _Lossy(BaseHTTPRequestHandler):
    """A proxy that forwards every request, and can drop every third response."""

    server: Any

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        connection = http.client.HTTPConnection("127.0.0.1", self.server.target)
        headers = {name: value for name, value in self.headers.items() if name.lower() != "host"}
        connection.request(self.command, self.path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
        self.server.count += 1
        self.close_connection = True
        if self.server.losing and self.server.count % 3 == 0:
            self.server.lost += 1
            return
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.headers["Content-Type"] or "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_POST = do_PATCH = do_PUT = do_DELETE = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def lossy(server: Server) -> Iterator[Any]:
    proxy: Any = ThreadingHTTPServer(("127.0.0.1", 0), _Lossy)
    proxy.target, proxy.count, proxy.lost, proxy.losing = server.port, 0, 0, False
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    yield proxy
    proxy.shutdown()
    proxy.server_close()


@pytest.mark.fault("Every third answer of the MLflow server is lost", "Everything is recorded in order, once")
def test_answers_that_are_lost_make_nothing_twice(
    server: Server, lossy: Any, begin: Begin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipping, "RETRY_DELAYS", (0.1, 0.5))
    monkeypatch.setattr(shipping, "POLL_SECONDS", 0.5)
    training, shipper, said = begin(f"http://127.0.0.1:{lossy.server_port}")
    lossy.losing = True
    for _ in range(4):
        training.begin()
        training.go_on(4)
        training.complete()
    lossy.losing = False
    write_state(tmp_path / "run", "KILLED", "enough")
    assert shipper.end(PATIENCE_SECONDS), said
    assert lossy.lost > 5
    training.check(server.uri)


@pytest.mark.fault(
    "The MLflow database is locked for half a minute", "Training at full speed; everything arrives in order, once"
)
def test_a_database_that_is_locked_for_longer_than_mlflow_waits(
    tmp_path: Path, empty_store: Path, begin: Begin
) -> None:
    database = shutil.copy(empty_store, tmp_path / "mlflow.db")
    training, shipper, said = begin(f"sqlite:///{database}")
    training.begin()
    training.go_on(4)
    with closing(sqlite3.connect(database, timeout=30, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        training.go_on(30)
        other.execute("ROLLBACK")
    training.go_on(2)
    training.complete()
    write_state(tmp_path / "run", "KILLED", "enough")
    assert shipper.end(PATIENCE_SECONDS), said
    assert len(said) == 2
    assert training.latest < MOST_SECONDS
    training.check(f"sqlite:///{database}")
