"""A run that is disturbed on the way, and how signals are taken; more is in `tests/faults`."""

import os
import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Command
from disturbing import a_worker, recipe_for_faults, same, trained, until
from mlflow.tracking import MlflowClient

from orchestrate import recipes
from orchestrate.interruption import signals_taken
from schemas.base import InterruptedRunError
from schemas.results import RunState
from zscl.sequence import run_sequence


@pytest.mark.faults
@pytest.mark.fault("SIGKILL of a worker, then SIGTERM, recorded in MLflow", "143, `zscl resume`; same numbers")
def test_a_worker_is_killed_and_the_run_stopped_and_it_comes_to_the_same_numbers(
    tmp_path: Path,
    tiny_model: str,
    zscl: Callable[..., Command],
    ray_cluster: None,
    without_ray: Callable[[], None],
) -> None:
    recipe, run = recipe_for_faults(tmp_path, tiny_model, steps=240), tmp_path / "run"
    killed: list[int] = []

    def disturb() -> None:
        until(lambda: (run / "checkpoint.pt").is_file(), "the first stage has a checkpoint")
        worker = a_worker()
        worker.kill()
        killed.append(worker.pid)
        until(trained(run, 241), "the second stage is trained")
        os.kill(os.getpid(), signal.SIGTERM)

    disturbing = threading.Thread(target=disturb)
    disturbing.start()
    stopped = zscl("run", recipe, "--out", run)
    disturbing.join()
    assert killed
    assert stopped.code == 143, stopped.error
    assert re.search(r"interrupted: stage 2 is stopped behind step \d+; the same command goes on there", stopped.error)
    assert (run / "checkpoint.pt").is_file()
    assert RunState.model_validate_json((run / "state.json").read_text()).status == "KILLED"
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("zscl")
    assert experiment is not None
    [parent] = client.search_runs([experiment.experiment_id], "tags.`zscl.level` = 'sequence'")
    assert parent.info.status == "KILLED"

    without_ray()  # which has shown what it does
    resumed = zscl("resume", run)
    assert resumed.code == 0, resumed.error
    assert "stage 2 goes on behind step" in resumed.error
    assert client.get_run(parent.info.run_id).info.status == "FINISHED"
    run_sequence(recipes.load_experiment(recipe), tmp_path / "whole", device=torch.device("cpu"))
    same(tmp_path / "whole", run)


def test_resume_refuses_what_is_no_run_or_would_be_another(tmp_path: Path, zscl: Callable[..., Command]) -> None:
    found = zscl("resume", tmp_path)
    assert (found.code, found.error) == (
        2, f"error: {tmp_path}: found no experiment.yaml, expected the folder of a run that was started before\n",
    )  # fmt: skip
    (tmp_path / "experiment.yaml").touch()
    found = zscl("resume", tmp_path, "--set", "seed=1")
    assert (found.code, found.error) == (
        2, "error: --set seed=1: expected a field of compute or tracking; all else is what the run is\n",
    )  # fmt: skip


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_first_signal_asks_and_the_second_ends(number: int, code: int) -> None:
    before = signal.getsignal(number)
    with signals_taken() as interruption:
        os.kill(os.getpid(), number)
        assert interruption
        assert interruption.error("").exit_code == code
        with pytest.raises(InterruptedRunError, match="ended at once"):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) == before
