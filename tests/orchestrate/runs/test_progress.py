"""Progress in a log and in a terminal."""

import io
from collections.abc import Callable

import pytest
from rich.console import Console

from orchestrate.runs.progress import ProgressBar, RunDisplay
from schemas.events import RowMeasured, StageStarted, StepsTaken
from schemas.experiment import Experiment
from schemas.results import StepLosses


def steps(stage: int, step: int) -> StepsTaken:
    last = StepLosses(step=step, learning_rate=0.1, losses={"classification": 1.25}, gradient_norm=1.0)
    return StepsTaken(stage=stage, task="second", steps=(last,), images_per_second=40.0)


def test_a_log_has_stage_step_remaining_time_and_losses(
    experiment: Callable[..., Experiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr("orchestrate.runs.progress.time.monotonic", lambda: clock[0])
    stream = io.StringIO()
    with ProgressBar(Console(file=stream, width=200), total=15) as bar:
        display = RunDisplay(experiment(), bar)
        display(RowMeasured(stage=1, accuracy={"first": 0.5, "second": 0.25}))
        display(StageStarted(stage=2, task="second", steps=5))  # a resumed run: 5 steps are done
        clock[0] = 30.0
        display(steps(2, 4))
    lines = stream.getvalue().splitlines()
    assert lines[0] == "stage 1/3: first 50.0  second 25.0"
    assert lines[1] == "stage 2/3 second: 5 steps"
    # 5 steps in 30 s, 5 left
    assert lines[2] == "stage 2/3 second: 10 of 15 steps in all, about 0.5 min left  40 images/s  classification 1.250"
    assert "\r" not in stream.getvalue()
    assert "\x1b" not in stream.getvalue()


def test_a_terminal_gets_a_bar(experiment: Callable[..., Experiment]) -> None:
    stream = io.StringIO()
    with ProgressBar(Console(file=stream, width=120, force_terminal=True), total=15) as bar:
        RunDisplay(experiment(), bar)(steps(1, 2))
    assert "3/15" in stream.getvalue()
