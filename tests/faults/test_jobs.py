"""Test that a job that `ray job stop` ended resumes when it is submitted again, on a cluster with a token."""

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from support.faults import PATIENCE_SECONDS, recipe_for_faults, same, trained, until

from orchestrate.recipes import recipe as recipes
from schemas.results import RunState
from zscl.sequence.run import run_sequence

pytestmark = [pytest.mark.faults, pytest.mark.timeout(3600)]
Ray = Callable[..., str]
SCRIPTS = Path(sys.executable).parent


@pytest.fixture
def ray(tmp_path: Path) -> Iterator[Ray]:
    """Start a cluster with a token, and return a function that runs `ray` commands on it.

    A token is needed because `ray start` does not bind to the loopback interface.
    """
    with socket.socket() as one, socket.socket() as other:
        for each in (one, other):
            each.bind(("127.0.0.1", 0))
        port, dashboard = one.getsockname()[1], other.getsockname()[1]
    token = tmp_path / "token"
    token.write_text("0123456789abcdef" * 4)
    token.chmod(0o600)
    given = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_ADDRESS": f"http://127.0.0.1:{dashboard}",
    }
    environment = os.environ | given
    # A separate folder, because a job connects to the cluster that was last started in the cluster's folder. Its name
    # is short, because it contains sockets, and their paths have a maximum length.
    place = tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)
    start = [
        SCRIPTS / "ray", "start", "--head", "--block", f"--port={port}", "--num-cpus=2",
        "--node-ip-address=127.0.0.1", "--include-dashboard=true", "--dashboard-host=127.0.0.1",
        f"--dashboard-port={dashboard}", f"--temp-dir={place.name}",
    ]  # fmt: skip
    head = subprocess.Popen(start, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def run(*arguments: str) -> str:
        made = subprocess.run(
            [SCRIPTS / "ray", *arguments], env=environment, capture_output=True, text=True, check=False
        )
        return made.stdout + made.stderr

    try:
        until(lambda: "No jobs" in run("job", "list") or "[]" in run("job", "list"), "the cluster is up")
        yield run
    finally:
        family = [*psutil.Process(head.pid).children(recursive=True), psutil.Process(head.pid)]
        for process in family:
            if process.is_running():
                process.kill()
        head.wait()
        place.cleanup()


@pytest.mark.fault(
    "`ray job stop` (token authentication on)", "A checkpoint, marked KILLED; submitted again: same numbers"
)
def test_a_job_is_stopped(ray: Ray, tmp_path: Path, tiny_model: str) -> None:
    recipe, run = recipe_for_faults(tmp_path, tiny_model), tmp_path / "run"
    environment = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(round(PATIENCE_SECONDS))}}
    submit = [
        "job", "submit", "--no-wait", "--runtime-env-json", json.dumps(environment), "--",
        str(SCRIPTS / "zscl"), "run", str(recipe), "--out", str(run),
    ]  # fmt: skip
    first = [*submit[:2], "--submission-id=first", *submit[2:]]
    # A new cluster rejects jobs until its agent has started.
    until(lambda: "submitted successfully" in ray(*first), "the cluster takes the job")
    until(trained(run, 30), "it trains")
    ray("job", "stop", "first")
    until(lambda: (run / "state.json").read_text().find("KILLED") > 0, "the run is marked")
    assert (run / "checkpoint.pt").is_file()
    until(lambda: "was stopped" in ray("job", "status", "first"), "the job is stopped")

    ray(*submit[:2], "--submission-id=second", *submit[2:])
    until(lambda: "succeeded" in ray("job", "status", "second"), "it goes on to its end")
    assert RunState.model_validate_json((run / "state.json").read_text()).status == "FINISHED"
    assert "stage 1 resumes after step" in ray("job", "logs", "second")
    run_sequence(recipes.load_experiment(recipe), tmp_path / "whole", device=torch.device("cpu"))
    same(tmp_path / "whole", run)
