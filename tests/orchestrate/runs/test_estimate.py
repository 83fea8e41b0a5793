"""The estimate of a run's duration from a short probe."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from support.errors import refused

from orchestrate.lifecycle.signals import WARNING_SIGNALS
from orchestrate.runs.estimate import estimate_run
from schemas.errors import ErrorCode, InterruptedRunError
from schemas.experiment import Experiment
from zscl.sequence.resolve import resolve

Make = Callable[..., Experiment]


def test_a_probe_estimates_the_duration(
    experiment: Make,
    tmp_path: Path,
    ray_cluster: None,
    without_ray: Callable[[], None],
) -> None:
    without_ray()
    resolved = resolve(experiment())
    estimate = estimate_run(resolved, tmp_path / "runs/mine", Console(stderr=True), seconds=0.0)
    assert estimate["training_images_per_second"] > 0
    assert estimate["evaluation_images_per_second"] > 0
    assert {path.name for path in (tmp_path / "runs").iterdir()} <= {"teacher"}  # the scratch folder is deleted
    with refused(ErrorCode.UNSUPPORTED, "--probe"):
        estimate_run(resolve(experiment(method="zero-shot")), tmp_path / "run", Console(stderr=True))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_an_interrupted_probe_gives_no_estimate(
    experiment: Make,
    tmp_path: Path,
    ray_cluster: None,
    without_ray: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    code: int,
) -> None:
    without_ray()
    monkeypatch.setattr(
        "orchestrate.runs.progress.ProgressBar.update", lambda *_: os.kill(os.getpid(), number)
    )  # at the first step
    handlers = {name: signal.getsignal(name) for name in WARNING_SIGNALS}
    few = experiment(optimisation={"steps": 1, "warmup_steps": 0, "batch_size": 6, "reference_batch_size": 5})
    try:
        with pytest.raises(InterruptedRunError, match="the probe was stopped before it gave an estimate") as error:
            estimate_run(resolve(few), tmp_path / "runs/mine", Console(stderr=True))
    finally:
        for name, handler in handlers.items():
            signal.signal(name, handler)
    assert error.value.exit_code == code
