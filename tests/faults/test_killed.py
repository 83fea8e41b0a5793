"""Tests that a run has the results of an undisturbed run after its processes were killed or stopped by a signal."""

import fcntl
import os
import signal
import subprocess
import sys
import termios
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from support.faults import (
    COMMAND_LINE,
    PATIENCE_SECONDS,
    a_worker,
    ended,
    processes,
    same,
    starts_of,
    trained,
    until,
)

from orchestrate.recipes import recipe as recipes
from schemas.results import RunState
from zscl.sequence.layout import CHECKPOINT
from zscl.sequence.run import run_sequence

pytest_plugins = ["support.faulty_cluster"]
pytestmark = [pytest.mark.faults, pytest.mark.timeout(3600)]
Launch = Callable[..., Any]
TEACHER_FEATURES = "teacher/images-*/features.npy"


# In the order in which they occur in a run.
MOMENTS: dict[str, Callable[[Path], object]] = {
    "computes the teacher's features": lambda run: list(run.parent.glob(TEACHER_FEATURES)),
    "trains": lambda run: (run / CHECKPOINT).is_file(),
    "writes a checkpoint": lambda run: list(run.glob(f".{CHECKPOINT}.*.partial")),
    "hands over a stage": lambda run: list(run.glob("stages/.1-first.*.partial")),
    "measures a row": lambda run: (run / "stages/1-first/accuracy.part.json").is_file(),
}


@pytest.mark.fault(
    "SIGKILL of a worker while it computes the teacher's features, trains, writes a checkpoint, writes a stage, "
    "evaluates a row; then of Ray Train's controller",
    "Ray restarts the workers, five times; resumed from the checkpoint; same numbers",
)
def test_workers_and_the_controller_are_killed(launch: Launch, tmp_path: Path, whole: Path) -> None:
    run = tmp_path / "run"
    with launch() as process:
        for kills, (moment, reached) in enumerate(MOMENTS.items()):
            until(lambda kills=kills: starts_of(run) > kills, "the group is at work (again)")  # type: ignore[misc]
            worker = a_worker()
            until(lambda reached=reached: reached(run), f"a worker {moment}")  # type: ignore[misc]
            worker.kill()
        until(lambda: starts_of(run) == 1 + len(MOMENTS), "the group is at work again")
        until(lambda: (run / CHECKPOINT).is_file(), "stage 2 has a checkpoint")
        processes("TrainController")[0].kill()
        ended(process)
    assert starts_of(run) == 2 + len(MOMENTS)
    same(whole, run)
    assert not list(run.rglob("*.part*"))


@pytest.mark.fault(
    "SIGKILL of the driver, then SIGTERM, Ctrl-C, SIGHUP, SIGUSR1",
    "The same command resumes; a checkpoint within the grace time, exit code 128 + signal; `zscl resume`: same numbers",
)
def test_the_driver_is_killed_and_asked_to_end(launch: Launch, tmp_path: Path, whole: Path) -> None:
    run = tmp_path / "run"
    with launch() as process:
        until(trained(run, 60), "it trains")
        process.kill()
    for number, code, steps in (
        (signal.SIGTERM, 143, 120), (signal.SIGINT, 130, 200), (signal.SIGHUP, 129, 280), (signal.SIGUSR1, 138, 360),
    ):  # fmt: skip
        with launch() as process:
            until(trained(run, steps), "it trains")
            process.send_signal(number)
            said = ended(process, code)
        assert "is stopped after step" in said
        assert ("has ended without releasing the lock, taking over" in said) == (number == signal.SIGTERM)
        assert RunState.model_validate_json((run / "state.json").read_text()).status == "KILLED"
    with launch(verb=("resume",)) as process:
        assert "stage 2 resumes after step" in ended(process)
    same(whole, run)


@pytest.mark.fault(
    "The terminal of a run on its own Ray is closed: SIGHUP for every process, output without a reader",
    "Ray's processes stay alive for a checkpoint; marked KILLED, exit code 129; same numbers",
)
def test_a_terminal_is_closed(tmp_path: Path, long_recipe: Path, whole: Path) -> None:
    run = tmp_path / "run"
    terminal, side = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND_LINE, "run", long_recipe, "--out", run, "--offline"],
        stdin=side,
        stdout=side,
        stderr=side,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(side)
    os.set_blocking(terminal, False)
    enough = trained(run, 30)

    def trains_on_a_terminal_that_is_read() -> bool:
        with suppress(BlockingIOError):
            os.read(terminal, 100_000)
        return enough()

    try:
        until(trains_on_a_terminal_that_is_read, "it trains")
        os.close(terminal)
        assert process.wait(PATIENCE_SECONDS) == 129
    finally:
        process.kill()
    assert (run / CHECKPOINT).is_file()
    assert RunState.model_validate_json((run / "state.json").read_text()).status == "KILLED"
    run_sequence(recipes.load_experiment(long_recipe), run, device=torch.device("cpu"))
    same(whole, run)
