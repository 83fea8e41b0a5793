"""MLflow on PostgreSQL: run, stages and models are recorded once, and comparisons find them."""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from mlflow.tracking import MlflowClient
from support.command import Command

from orchestrate.recipes import recipe as recipes
from orchestrate.tracking.uploader import sync_run
from schemas.experiment import Experiment
from zscl.sequence.run import run_sequence

PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin"))  # on Debian, which is not on the PATH
INITDB = shutil.which("initdb", path=os.pathsep.join([os.environ.get("PATH", ""), *map(str, PROGRAMS)]))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(INITDB is None, reason="no PostgreSQL on this machine"),
]


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A new server on the loopback interface; its URI, with the password."""
    assert INITDB is not None
    folder, programs = Path("/tmp") / f"zscl-postgres-{os.getpid()}", Path(INITDB).parent
    folder.mkdir(mode=0o700)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    user = {"user": "postgres"} if os.getuid() == 0 else {}  # PostgreSQL refuses to run as root
    if user:
        shutil.chown(folder, "postgres")
    secret = folder / "password"
    secret.write_text("hunter2")
    secret.chmod(0o644)
    command = [INITDB, "-D", folder / "data", "-U", "zscl", "--auth=scram-sha-256", f"--pwfile={secret}"]
    subprocess.run(command, check=True, capture_output=True, cwd=folder, **user)  # type: ignore[call-overload]
    serve = [programs / "postgres", "-D", folder / "data", "-p", str(port), "-c", "listen_addresses=127.0.0.1"]
    serve += ["-k", folder, "-c", "fsync=off"]
    process = subprocess.Popen(serve, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **user)
    try:
        for _ in range(6000):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"postgresql+psycopg://zscl:hunter2@127.0.0.1:{port}/postgres"
    finally:
        process.send_signal(signal.SIGINT)  # stops without waiting for its clients
        process.wait(600)
        shutil.rmtree(folder, ignore_errors=True)


def test_a_run_is_recorded_once(
    server: str,
    experiment: Callable[..., Experiment],
    tmp_path: Path,
    tasks: list[str],
    zscl: Callable[..., Command],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    variant = experiment(tasks=tasks[:2], method="finetune", tracking={"uri": server})
    run_sequence(variant, tmp_path / "run", device=torch.device("cpu"))
    recipes.write_experiment(variant, tmp_path / "run/experiment.yaml")
    assert "hunter2" not in (tmp_path / "run/experiment.yaml").read_text()
    for _ in range(2):
        synced = sync_run(tmp_path / "run", server, lambda *_: None)
        assert (synced.status, "hunter2" in synced.tracking_uri) == ("FINISHED", False)
    client = MlflowClient(server)
    experiment_id = client.get_experiment_by_name("zscl").experiment_id
    [parent] = client.search_runs([experiment_id], "tags.`zscl.level` = 'sequence'")
    stages = client.search_runs([experiment_id], "tags.`zscl.level` = 'stage'")
    assert sorted(stage.info.run_name for stage in stages) == ["1-first", "2-second"]
    history = client.get_metric_history(parent.info.run_id, "accuracy/first")
    assert [point.step for point in history] == [0, 1, 2]
    assert len(client.get_metric_history(stages[0].info.run_id, "loss/classification")) == 5
    assert len(client.search_logged_models([experiment_id])) == 2
    compared = zscl("compare", parent.info.run_id, "--uri", server, "--out", tmp_path / "compared")
    assert compared.code == 0, compared.error
    assert "finetune" in compared.out
    assert "hunter2" not in compared.out + compared.error
