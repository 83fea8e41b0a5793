"""Processes of a run killed, or asked to end: it comes to the numbers of one in peace."""

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from disturbing import a_worker, ended, processes, same, starts_of, trained, until

from orchestrate import recipes
from schemas.results import RunState
from zscl.checkpoint import CHECKPOINT
from zscl.sequence import run_sequence
from zscl.suites import write_embedded

pytest_plugins = ["faulty_cluster"]
pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]
Launch = Callable[..., Any]
TEACHER_FEATURES = "teacher/images-*/features.npy"


# In the order in which a run comes to them.
MOMENTS: dict[str, Callable[[Path], object]] = {
    "computes the teacher's features": lambda run: list(run.parent.glob(TEACHER_FEATURES)),
    "trains": lambda run: (run / CHECKPOINT).is_file(),
    "writes a checkpoint": lambda run: list(run.glob(f".{CHECKPOINT}.*.partial")),
    "hands over a stage": lambda run: list(run.glob("stages/.1-first.*.partial")),
    "measures a row": lambda run: (run / "stages/1-first/accuracy.part.json").is_file(),
}


@pytest.mark.fault(
    "SIGKILL of a worker while it computes the teacher's features, trains, writes a checkpoint, hands over a stage, "
    "measures a row",
    "Ray starts the group again, five times; same numbers",
)
def test_a_worker_is_killed(launch: Launch, tmp_path: Path, whole: Path) -> None:
    run = tmp_path / "run"
    with launch() as process:
        for kills, (moment, reached) in enumerate(MOMENTS.items()):
            until(lambda kills=kills: starts_of(run) > kills, "the group is at work (again)")  # type: ignore[misc]
            worker = a_worker()
            until(lambda reached=reached: reached(run), f"a worker {moment}")  # type: ignore[misc]
            worker.kill()
        ended(process)
    assert starts_of(run) == 1 + len(MOMENTS)
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
        until(trained(run, 60), "it trains")
        process.kill()
    with launch() as process:
        until(trained(run, 270), "the second stage is trained")
        process.kill()
        assert "is gone without a word, taking over" in process.communicate()[1]
    with launch(verb=("resume",)) as process:
        assert "stage 2 goes on behind step" in ended(process)
    same(whole, run)


@pytest.mark.fault("SIGTERM, Ctrl-C", "A checkpoint within the grace time, exit code 143 or 130; resumed: same numbers")
def test_the_driver_is_asked_to_end(launch: Launch, tmp_path: Path, whole: Path) -> None:
    run = tmp_path / "run"
    for number, code, steps in ((signal.SIGTERM, 143, 30), (signal.SIGINT, 130, 270)):
        with launch() as process:
            until(trained(run, steps), "it trains")
            process.send_signal(number)
            assert "is stopped behind step" in ended(process, code)
        assert RunState.model_validate_json((run / "state.json").read_text()).status == "KILLED"
    with launch(verb=("resume",)) as process:
        ended(process)
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
