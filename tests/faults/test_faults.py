"""Everything that may happen to a run on a cluster, done to real ones: they all come to the numbers of one in peace."""

import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from disturbing import (
    a_worker,
    ended,
    numbers,
    processes,
    recipe_for_faults,
    same,
    started,
    starts_of,
    train_workers,
    trained,
    until,
)
from ray.cluster_utils import Cluster

from orchestrate import recipes
from orchestrate.access import loopback_alone
from schemas.results import RunState
from zscl.checkpoint import CHECKPOINT
from zscl.journal import JOURNAL
from zscl.sequence import run_sequence
from zscl.suites import write_embedded

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]
Launch = Callable[..., Any]
TEACHER_FEATURES = "teacher/images-*/features.npy"


def add_node(cluster: Cluster) -> Any:
    """A node of two CPUs, on the loopback interface."""
    with loopback_alone():
        return cluster.add_node(num_cpus=2, node_ip_address="127.0.0.1")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head without CPUs and a node with two."""
    head = {"num_cpus": 0, "include_dashboard": False, "node_ip_address": "127.0.0.1"}
    with loopback_alone():
        cluster = Cluster(initialize_head=True, head_node_args=head)
    add_node(cluster)
    yield cluster
    cluster.shutdown()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_model: str) -> Path:
    return recipe_for_faults(tmp_path_factory.mktemp("faults"), tiny_model)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, recipe: Path) -> Path:
    """The run that nothing happened to, in one plain process."""
    run = tmp_path_factory.mktemp("whole") / "run"
    run_sequence(recipes.load_experiment(recipe), run, device=torch.device("cpu"))
    return run


@pytest.fixture
def launch(tmp_path: Path, cluster: Cluster, recipe: Path) -> Launch:
    """Start the command line on the cluster: `run` of the recipe, unless another verb is given."""

    def start(*settings: str, verb: tuple[object, ...] = ("run", recipe, "--out"), run: str = "run") -> Any:
        given = [part for setting in settings for part in ("--set", setting)]
        address = ("--set", f"compute.address={cluster.address}")
        return started(*verb, tmp_path / run, *address, *given, folder=tmp_path)

    return start


MOMENTS: dict[str, Callable[[Path], object]] = {
    "trains": lambda run: (run / CHECKPOINT).is_file(),
    "measures a row": lambda run: (run / "stages/1-first/accuracy.part.json").is_file(),
    "computes the teacher's features": lambda run: list(run.parent.glob(TEACHER_FEATURES)),
    "writes a checkpoint": lambda run: list(run.glob(f".{CHECKPOINT}.*.partial")),
    "hands over a stage": lambda run: list(run.glob("stages/.1-first.*.partial")),
}


@pytest.mark.fault("SIGKILL of a worker while it {moment}", "Ray starts the group again; same numbers")
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_worker_is_killed(launch: Launch, tmp_path: Path, whole: Path, moment: str) -> None:
    run = tmp_path / "run"
    with launch() as process:
        worker = a_worker()
        until(lambda: MOMENTS[moment](run), f"a worker {moment}")
        worker.kill()
        ended(process)
    assert starts_of(run) == 2
    same(whole, run)
    assert not list(run.rglob("*.part*"))


@pytest.mark.fault("SIGKILL of Ray Train's controller", "Fitted anew from the checkpoint; same numbers")
def test_the_controller_is_killed(launch: Launch, tmp_path: Path, whole: Path) -> None:
    run = tmp_path / "run"
    with launch() as process:
        until(trained(run, 30), "it trains")
        processes("TrainController")[0].kill()
        ended(process)
    assert starts_of(run) == 2
    same(whole, run)


@pytest.mark.fault("SIGKILL of the driver, twice", "The same command, then `zscl resume`, go on; same numbers")
def test_the_driver_is_killed(launch: Launch, tmp_path: Path, whole: Path) -> None:
    run = tmp_path / "run"
    with launch() as process:
        until(trained(run, 100), "it trains")
        process.kill()
    with launch() as process:
        until(trained(run, 450), "the second stage is trained")
        process.kill()
        assert "is gone without a word, taking over" in process.communicate()[1]
    with launch(verb=("resume",)) as process:
        assert "stage 2 goes on behind step" in ended(process)
    same(whole, run)


@pytest.mark.fault("SIGTERM, Ctrl-C", "A checkpoint within the grace time, exit code 143 or 130; resumed: same numbers")
def test_the_driver_is_asked_to_end(launch: Launch, tmp_path: Path, whole: Path) -> None:
    run = tmp_path / "run"
    for number, code, steps in ((signal.SIGTERM, 143, 30), (signal.SIGINT, 130, 450)):
        with launch() as process:
            until(trained(run, steps), "it trains")
            process.send_signal(number)
            assert "is stopped behind step" in ended(process, code)
        assert RunState.model_validate_json((run / "state.json").read_text()).status == "KILLED"
    with launch(verb=("resume",)) as process:
        ended(process)
    same(whole, run)


@pytest.mark.fault("The node with the workers dies; another one comes", "Ray starts the group there; same numbers")
def test_a_node_dies(launch: Launch, tmp_path: Path, whole: Path, cluster: Cluster) -> None:
    run = tmp_path / "run"
    with launch() as process:
        until(trained(run, 30), "it trains")
        [node] = cluster.worker_nodes
        cluster.remove_node(node, allow_graceful=False)
        add_node(cluster)
        ended(process, seconds=300)
    assert starts_of(run) == 2
    same(whole, run)


@pytest.mark.fault("A node is lost with elastic workers", "The rest goes on with the same global batch; same matrix")
def test_fewer_workers_go_on(launch: Launch, tmp_path: Path, whole: Path, cluster: Cluster) -> None:
    run, node = tmp_path / "run", add_node(cluster)
    elastic = ("compute.workers=2", "compute.min_workers=1", "compute.cpus_per_worker=2")
    with launch(*elastic) as process:
        until(trained(run, 30), "it trains")
        assert len(train_workers()) == 2
        cluster.remove_node(node, allow_graceful=False)
        ended(process, seconds=400)
    assert starts_of(run) >= 2
    found, expected = numbers(run), numbers(whole)
    assert found["accuracy_matrix"] == expected["accuracy_matrix"]
    for ours, theirs in zip(found["stages"], expected["stages"], strict=True):
        assert ours["images_seen"] == theirs["images_seen"]
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=0.01)


@pytest.mark.fault(
    "A worker of {workers} hangs (SIGSTOP)", "Given up after compute.hang_minutes; the group starts again"
)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_hangs(launch: Launch, tmp_path: Path, whole: Path, workers: int) -> None:
    run = tmp_path / "run"
    with launch(f"compute.workers={workers}", "compute.hang_minutes=0.25") as process:
        until(trained(run, 30), "it trains")
        a_worker().send_signal(signal.SIGSTOP)
        ended(process)
    assert starts_of(run) == 2
    assert numbers(run)["accuracy_matrix"] == numbers(whole)["accuracy_matrix"]


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[None]:
    """A disk of its own under a folder."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("a small disk can be mounted by root alone")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.fault("The disk is full while a checkpoint is written", "Noted; the last one stays; same numbers")
def test_the_disk_is_full(launch: Launch, tmp_path: Path, whole: Path) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk, megabytes=64), launch(run="disk/run") as process:
        until(lambda: (disk / "run" / CHECKPOINT).is_file(), "there is a checkpoint")
        free = shutil.disk_usage(disk).free
        (disk / "ballast").write_bytes(b"\0" * (free - 150_000))  # for the journal, not for a checkpoint
        journal = disk / "run" / JOURNAL
        until(lambda: "could not be written" in journal.read_text(), "a checkpoint meets the full disk")
        assert "No space left on device" in journal.read_text()
        (disk / "ballast").unlink()
        ended(process)
        same(whole, disk / "run")


@pytest.mark.fault("Storage is away for a minute", "Checkpoints are noted as missed, a stage's end waits; same numbers")
def test_storage_is_away(launch: Launch, tmp_path: Path, whole: Path) -> None:
    storage, run = tmp_path / "storage", tmp_path / "run"
    storage.mkdir()
    run.symlink_to(storage)
    with launch() as process:
        until(trained(run, 30), "it trains")
        storage.rename(tmp_path / "away")
        time.sleep(60)
        (tmp_path / "away").rename(storage)
        ended(process)
    assert starts_of(run) == 1
    same(whole, run)


@pytest.mark.fault(
    "Ten SIGKILLs of workers at random moments of an embedded run", "The `result.json` of a run in peace"
)
def test_ten_random_kills(launch: Launch, tmp_path: Path) -> None:
    write_embedded(tmp_path / "data", corpus=False, note=lambda text: None)
    shipped = Path(__file__).parents[2] / "experiments/embedded.yaml"
    tasks = [f"tasks.{number}={tmp_path}/data/{Path(task['path'] if isinstance(task, dict) else task).name}"
             for number, task in enumerate(recipes.read(shipped)["tasks"])]  # fmt: skip
    settings = (
        *tasks,
        f"reference={tmp_path}/data/reference",
        "optimisation.steps=60",
        "optimisation.warmup_steps=10",
        "compute.checkpoint.every_steps=5",
        "compute.max_failures=10",
    )
    run_sequence(recipes.load_experiment(shipped, settings), tmp_path / "whole", device=torch.device("cpu"))
    draw, run = random.Random(0), tmp_path / "run"
    with launch(*settings, verb=("run", shipped, "--out")) as process:
        for kill in range(10):
            until(lambda kill=kill: starts_of(run) > kill, "the group is at work (again)")  # type: ignore[misc]
            time.sleep(draw.uniform(0, 6))
            a_worker().kill()
        ended(process, seconds=600)
    assert starts_of(run) == 11
    same(tmp_path / "whole", run)
