"""Fixtures (a tiny CLIP, tiny data, the command line, Ray, MLflow), and the table of faults after the tests."""

import os

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_worker_niceness": "0",  # by default, workers run at a lower priority than parallel tests
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "COLUMNS": "160",
}

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from pydantic import BaseModel
from safetensors.torch import save_file
from support.command import Command
from support.data import COLOURS, TINY_MODEL, coloured_images, make_task

from schemas.experiment import Experiment
from zscl.data.tar import write_shards


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the `local-dir:` name of a random CLIP with 0.8 M parameters, most of them in the token embedding."""
    torch.manual_seed(0)
    model = open_clip.CLIP(**TINY_MODEL)  # type: ignore[arg-type]
    folder = tmp_path_factory.mktemp("tiny-clip")
    config = {"model_cfg": TINY_MODEL, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Write three tasks, and return their folders."""
    root = tmp_path_factory.mktemp("tasks")
    return [str(make_task(root / name, seed)) for seed, name in enumerate(["first", "second", "third"])]


@pytest.fixture
def shards(tmp_path: Path) -> list[str]:
    """Write three shards with 4, 4 and 2 samples."""
    images = enumerate(image for image, _ in coloured_images(10, 0))
    write_shards(tmp_path, ({"png": image, "cls": str(n).encode()} for n, image in images), 4)
    return [str(tmp_path / f"{index}.tar") for index in range(3)]


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Write a reference set of two shards with 14 images and captions, and return its folder."""
    folder = tmp_path_factory.mktemp("reference")
    words = list(COLOURS)
    images = coloured_images(14, seed=9)
    samples = ({"png": image, "txt": f"a thing of {words[label]}".encode()} for image, label in images)
    write_shards(folder, samples, shard_images=8)
    return str(folder)


@pytest.fixture
def recipe(tiny_model: str, tasks: list[str], reference: str) -> Callable[..., dict[str, Any]]:
    """Return a function that builds a recipe of a few steps. Keyword arguments replace sections."""

    def make(**changes: Any) -> dict[str, Any]:
        return {
            "name": "tiny",
            "model": tiny_model,
            "tasks": tasks,
            "reference": reference,
            "method": {"preset": "zscl", "average": {"every": 2}},
            "optimisation": {
                "steps": 5,
                "warmup_steps": 2,
                "batch_size": 6,
                "reference_batch_size": 5,
                "learning_rate": 0.01,
            },
            "compute": {"device": "cpu"},
        } | changes

    return make


@pytest.fixture
def experiment(recipe: Callable[..., dict[str, Any]]) -> Callable[..., Experiment]:
    """Return a function that builds an experiment of a few steps. Keyword arguments replace sections."""
    return lambda **changes: Experiment.model_validate(recipe(**changes))


@pytest.fixture
def zscl(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Command]:
    """Return a function that runs the command line in this process."""
    from orchestrate.cli.main import main
    from orchestrate.lifecycle.signals import TERMINATION_SIGNALS, WARNING_SIGNALS

    def run(*arguments: object) -> Command:
        monkeypatch.setattr("sys.argv", ["zscl", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        handlers = {number: signal.getsignal(number) for number in (*TERMINATION_SIGNALS, *WARNING_SIGNALS)}
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return Command(code, *capsys.readouterr())

    return run


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disable the MD5 checks of two torchvision datasets, because the archives of the tests have other content."""
    import torchvision

    for module in (torchvision.datasets.cifar, torchvision.datasets.flowers102):
        monkeypatch.setattr(module, "check_integrity", lambda path, md5=None: Path(path).is_file())


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return a function that makes later runs of a test use this process in place of Ray, which saves 15 s per run."""
    from orchestrate.cluster import train_workers as train

    def in_this_process(
        work: str, made: Experiment, folder: Path, on_progress: Callable[[BaseModel], None], *_: object
    ) -> str:
        found = train.WORK[work](made, folder, report=on_progress, device=torch.device("cpu"))
        return found.model_dump_json()

    return lambda: monkeypatch.setattr(train, "_run_on_workers", in_this_process)


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create an MLflow database for tests to copy, because creating one takes seconds."""
    from mlflow.tracking import MlflowClient

    file = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """Start a local cluster with four logical CPUs for all tests of this process."""
    import ray

    from orchestrate.cluster.auth import bind_to_loopback

    with bind_to_loopback():  # the tests use no token, so the cluster must be unreachable from outside
        ray.init(
            address="local",  # do not connect to another cluster on this machine
            num_cpus=4,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=200 * 2**20,
            _node_ip_address="127.0.0.1",
        )
    yield
    ray.shutdown()


# Maps a fault and its expected effect to the outcomes and durations (in seconds) of its tests.
FAULTS: dict[tuple[str, str], list[tuple[str, float]]] = {}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Add the texts of a test's marker `fault` to its report."""
    report: pytest.TestReport = yield  # type: ignore[misc, assignment]
    fault = item.get_closest_marker("fault")
    if fault is not None and (report.when == "call" or report.outcome != "passed"):
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        report.user_properties.append(("fault", [text.format(**parameters) for text in fault.args]))
    return report  # type: ignore[return-value]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Collect the outcome of a fault from any test process."""
    for name, fault in report.user_properties:
        if name == "fault":
            what, outcome = fault  # type: ignore[misc]
            FAULTS.setdefault((what, outcome), []).append((report.outcome, report.duration))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the outcomes of all faults as a Markdown table."""
    if not FAULTS:
        return
    terminalreporter.section("faults")
    rows = [("Fault", "What happens", "", "s"), ("---", "---", "---", "---:")]
    for (what, outcome), found in FAULTS.items():
        outcomes = ", ".join(dict.fromkeys(each for each, _ in found))
        rows.append((what, outcome, outcomes, f"{sum(seconds for _, seconds in found):.0f}"))
    for row in rows:
        terminalreporter.write_line("| " + " | ".join(row) + " |")
