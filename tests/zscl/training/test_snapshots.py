"""Averages of a stage's snapshots are those of training, bit for bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.errors import refused

from schemas.errors import ErrorCode
from schemas.experiment import Experiment, Model
from schemas.method import Average
from zscl.models.clip import load_clip
from zscl.sequence.run import run_sequence
from zscl.training.checkpoint import StoppedError
from zscl.training.optim import select_trained_parameters
from zscl.training.snapshots import replay_average, snapshot_interval

Make = Callable[..., Experiment]
CPU = torch.device("cpu")
STEPS = 6
OPTIMISATION = {
    "steps": STEPS, "warmup_steps": 2, "batch_size": 6, "reference_batch_size": 5, "learning_rate": 0.01,
}  # fmt: skip


def weights(run: Path, stage: str) -> dict[str, torch.Tensor]:
    return load_file(run / f"stages/{stage}/model/open_clip_model.safetensors")


def replayed(start: str, folder: Path, average: Average | None, train: str = "model") -> dict[str, torch.Tensor]:
    model = load_clip(Model(name=start)).model
    select_trained_parameters(model, train)
    return dict(replay_average(model, average, folder, STEPS)[0].state_dict())


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(found[name], weight) for name, weight in expected.items())


@pytest.mark.parametrize(
    "average",
    [
        {"every": 2}, {"every": 4}, {"every": 3, "kind": "exponential", "decay": 0.7},
        {"every": 1, "start_share": 0.25}, None,
    ],
)  # fmt: skip
def test_replay_reproduces_and_changes_the_average_of_a_stage(
    experiment: Make, tmp_path: Path, tiny_model: str, average: Any
) -> None:
    method = {"preset": "zscl", "average": average}
    made = experiment(method=method, optimisation=OPTIMISATION, compute={"device": "cpu", "snapshots_every": 1})
    run_sequence(made, tmp_path / "run", device=CPU)
    assert made.method.average == (None if average is None else Average.model_validate(average))
    for stage, start in (("1-first", tiny_model), ("2-second", f"local-dir:{tmp_path}/run/stages/1-first/model")):
        found = replayed(start, tmp_path / f"run/snapshots/{stage}", made.method.average)
        assert same(found, weights(tmp_path / "run", stage))
    # And what another run of another average would hand on: an average has no part in a stage's steps.
    other = replayed(tiny_model, tmp_path / "run/snapshots/1-first", Average(every=5))
    another = experiment(method={"preset": "zscl", "average": {"every": 5}}, optimisation=OPTIMISATION)
    run_sequence(another.model_copy(update={"tasks": another.tasks[:1]}), tmp_path / "other", device=CPU)
    assert same(other, weights(tmp_path / "other", "1-first"))


def test_a_stopped_and_resumed_run_has_all_snapshots(experiment: Make, tmp_path: Path, tiny_model: str) -> None:
    compute = {"device": "cpu", "snapshots_every": 2, "checkpoint": {"every_steps": 1}}
    made = experiment(optimisation=OPTIMISATION, method={"preset": "zscl*", "train": "image_tower"}, compute=compute)
    asked = iter([False] * 5 + [True] * 100)
    with pytest.raises(StoppedError, match="is stopped after step"):
        run_sequence(made, tmp_path / "run", device=CPU, stop_requested=lambda: next(asked))
    run_sequence(made, tmp_path / "run", device=CPU)
    for stage in ("1-first", "2-second", "3-third"):
        names = {file.name for file in (tmp_path / f"run/snapshots/{stage}").iterdir()}
        assert names == {"0.safetensors", "2.safetensors", "4.safetensors", "last.safetensors"}
    last = replayed(tiny_model, tmp_path / "run/snapshots/1-first", None, "image_tower")
    ensemble = replayed(tiny_model, tmp_path / "run/snapshots/1-first", Average(every=100), "image_tower")
    assert not same(last, ensemble)
    assert same(ensemble, weights(tmp_path / "run", "1-first"))


def test_damaged_and_missing_snapshots_are_refused(experiment: Make, tmp_path: Path, tiny_model: str) -> None:
    made = experiment(optimisation=OPTIMISATION, compute={"device": "cpu", "snapshots_every": 1})
    run_sequence(made.model_copy(update={"tasks": made.tasks[:1]}), tmp_path / "run", device=CPU)
    folder = tmp_path / "run/snapshots/1-first"
    assert snapshot_interval(folder) == 1
    (folder / "4.safetensors").write_bytes(b"no weights")
    with refused(ErrorCode.UNREADABLE) as error:
        replayed(tiny_model, folder, Average(every=2))
    assert str(folder / "4.safetensors") in str(error.value)
    (folder / "3.safetensors").unlink()
    with refused(ErrorCode.NOT_FOUND) as error:
        snapshot_interval(folder)
    assert "found no 3.safetensors, expected one every 1 steps" in str(error.value)
    for step in (1, 5):
        (folder / f"{step}.safetensors").unlink()
    assert snapshot_interval(folder) == 2  # what is left is whole for every other step
    with refused(ErrorCode.INVALID_VALUE, "--every") as error:
        replayed(tiny_model, folder, Average(every=3))
    assert "every 2 steps" in str(error.value)
    (folder / "last.safetensors").unlink()
    with refused(ErrorCode.NOT_FOUND, "compute.snapshots_every"):
        snapshot_interval(folder)
