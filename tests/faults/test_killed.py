"""Processes of a run killed, or asked to end: it comes to the numbers of one in peace."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from disturbing import a_worker, ended, processes, same, starts_of, trained, until

from schemas.results import RunState
from zscl.checkpoint import CHECKPOINT

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
    "measures a row; then of Ray Train's controller",
    "Ray starts the group again, five times; fitted anew from the checkpoint; same numbers",
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
    "SIGKILL of the driver, then SIGTERM, then Ctrl-C",
    "The same command goes on; a checkpoint within the grace time, exit code 143 or 130; `zscl resume`: same numbers",
)
def test_the_driver_is_killed_and_asked_to_end(launch: Launch, tmp_path: Path, whole: Path) -> None:
    run = tmp_path / "run"
    with launch() as process:
        until(trained(run, 60), "it trains")
        process.kill()
    for number, code, steps in ((signal.SIGTERM, 143, 150), (signal.SIGINT, 130, 320)):  # some steps are taken twice
        with launch() as process:
            until(trained(run, steps), "it trains")
            process.send_signal(number)
            said = ended(process, code)
        assert "is stopped behind step" in said
        assert ("is gone without a word, taking over" in said) == (number == signal.SIGTERM)
        assert RunState.model_validate_json((run / "state.json").read_text()).status == "KILLED"
    with launch(verb=("resume",)) as process:
        assert "stage 2 goes on behind step" in ended(process)
    same(whole, run)
