"""MLflow's web pages of a recorded run, in a headless browser."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from PIL import Image

from orchestrate.recipes import recipe as recipes
from orchestrate.tracking.uploader import JournalUploader
from schemas.experiment import Experiment
from zscl.sequence.resolve import resolve
from zscl.sequence.run import run_sequence

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pages")


@pytest.fixture
def recorded(folder: Path, experiment: Callable[..., Experiment]) -> str:
    """Two recorded runs; the ZSCL run's id."""
    for method in ("finetune", "zscl"):
        variant, run = experiment(method=method), folder / f"run-{method}"
        uploader = JournalUploader(variant, resolve(variant).fingerprint, run, print)
        run_sequence(variant, run)
        recipes.write_experiment(variant, run / "experiment.yaml")
        assert uploader.end()
    return uploader.run_id


@pytest.fixture
def server(folder: Path, recorded: str) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    process = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"],
        env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(f"{address}/health")
        yield address
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def wait_for(url: str) -> None:
    for _ in range(1200):
        try:
            urllib.request.urlopen(url, timeout=1)
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
        else:
            return
    raise TimeoutError(url)


def browse(url: str, profile: Path, *output: str) -> str:
    command = [str(CHROMIUM), *QUIET, f"--user-data-dir={profile}", "--window-size=1500,1400"]
    command += ["--virtual-time-budget=20000", *output, url]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=True).stdout


def test_a_user_sees_tree_charts_and_pictures(server: str, recorded: str, folder: Path) -> None:
    [experiment] = MlflowClient(f"sqlite:///{folder}/mlflow.db").search_experiments(filter_string="name = 'zscl'")
    pages = {
        "tree": (f"{server}/#/experiments/{experiment.experiment_id}/runs", ["run-zscl", "run-finetune"]),
        "charts": (
            f"{server}/#/experiments/{experiment.experiment_id}/runs?compareRunsMode=CHART"
            "&searchFilter=tags.%60zscl.level%60%20%3D%20'sequence'",
            ["accuracy/first", "accuracy/second", "accuracy/third", "run-zscl", "run-finetune"],
        ),
        "picture": (
            f"{server}/#/experiments/{experiment.experiment_id}/runs/{recorded}/artifacts/figures/accuracy_matrix.png",
            ["accuracy_matrix.json", "experiment.yaml", "result.json"],
        ),
    }
    for name, (url, words) in pages.items():
        page = browse(url, folder / "profile", "--dump-dom")
        for word in words:
            assert word in page, (name, word)
        browse(url, folder / "profile", f"--screenshot={folder / name}.png")
        with Image.open(folder / f"{name}.png") as picture:
            assert picture.size == (1500, 1400)
            assert len(picture.convert("RGB").getcolors(2**24) or []) > 200, f"{name} is nearly blank"
