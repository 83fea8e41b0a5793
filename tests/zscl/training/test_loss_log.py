"""Losses and gradients that are poison: seen at their step, named, never averaged in."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel
from support.errors import refused
from torch.optim.optimizer import register_optimizer_step_pre_hook

from schemas.errors import ErrorCode
from schemas.events import Note, StepsTaken
from schemas.experiment import Experiment
from zscl.sequence.layout import CHECKPOINT
from zscl.sequence.run import run_sequence
from zscl.training.loss_log import MAX_SPIKE_WARNINGS, SPIKE_FACTOR, SPIKE_WINDOW, LossLog, NotFiniteError

Make = Callable[..., Experiment]
CPU = torch.device("cpu")
OPTIMISATION = {"steps": 5, "warmup_steps": 2, "batch_size": 6, "reference_batch_size": 5}


def norms(run: Path) -> list[float]:
    with (run / "stages/1-first/losses.csv").open() as stream:
        return [float(row["gradient_norm"]) for row in csv.DictReader(stream)]


@pytest.mark.fault("A loss that is NaN", "The message names step, loss and last good model; nothing is averaged")
def test_a_diverging_run_names_the_step_and_the_last_good_model(experiment: Make, tmp_path: Path) -> None:
    """Real numbers that run away: the first step already throws the weights far out of float32's range."""
    made = experiment(
        method="finetune",
        optimisation={**OPTIMISATION, "learning_rate": 1e38},
        compute={"device": "cpu", "checkpoint": {"every_steps": 1}},
    )
    with refused(ErrorCode.NOT_FINITE) as error:
        run_sequence(made, tmp_path, device=CPU)
    sentence = str(error.value)
    assert sentence.startswith("stage 1 first: found the loss classification nan at step 1, expected a finite value")
    assert f"the last good model is the initial one, {made.model.name}" in sentence
    assert "a lower optimisation.learning_rate or optimisation.max_gradient_norm may help" in sentence
    assert not list(tmp_path.glob("stages/*/model"))
    if (tmp_path / CHECKPOINT).exists():  # of the step before
        kept = torch.load(tmp_path / CHECKPOINT, weights_only=True)
        assert all(bool(tensor.isfinite().all()) for tensor in kept["model"].values() if tensor.is_floating_point())


def test_gradients_are_clipped_to_the_maximum_norm(experiment: Make, tmp_path: Path) -> None:
    plain = experiment(method="finetune", optimisation={**OPTIMISATION, "learning_rate": 0.01})
    run_sequence(plain, tmp_path / "plain", device=CPU)
    unclipped = norms(tmp_path / "plain")
    for limit in (min(unclipped) / 2, 1e9):
        optimisation = {**OPTIMISATION, "learning_rate": 0.01, "max_gradient_norm": limit}
        given: list[float] = []

        def watch(optimizer: torch.optim.Optimizer, *_: Any, given: list[float] = given) -> None:
            gradients = [each.grad for group in optimizer.param_groups for each in group["params"]]
            given.append(float(torch.nn.utils.get_total_norm([each for each in gradients if each is not None])))

        handle = register_optimizer_step_pre_hook(watch)
        run_sequence(experiment(method="finetune", optimisation=optimisation), tmp_path / str(limit), device=CPU)
        handle.remove()
        told = norms(tmp_path / str(limit))  # before clipping
        assert given[:5] == pytest.approx([min(limit, norm) for norm in told], rel=1e-4)
        assert told[0] == unclipped[0]
        assert (told == unclipped) == (limit == 1e9)


def test_a_maximum_norm_that_is_not_reached_changes_only_the_identity(experiment: Make) -> None:
    contents = {
        name: name for name in ("reference", experiment().model.name, *(task.path for task in experiment().tasks))
    }
    limited = {**OPTIMISATION, "max_gradient_norm": 1.0}
    fingerprints = {
        experiment(optimisation=optimisation).fingerprint(contents) for optimisation in (OPTIMISATION, limited)
    }
    assert len(fingerprints) == 2


def curves(*values: float) -> tuple[LossLog, list[BaseModel]]:
    """Curves that were given steps of these gradient norms."""
    said: list[BaseModel] = []
    made = LossLog(2, "birds", images_per_step=1, report=said.append)
    for step, norm in enumerate(values):
        made.add(step, 0.1, {"classification": torch.tensor(1.0)}, torch.tensor(norm))
    return made, said


@pytest.mark.fault("Gradient spikes", "A warning in the result; clipped if configured")
def test_a_gradient_spike_is_reported() -> None:
    usual = [1.0, 3.0] * (SPIKE_WINDOW // 2)
    made, said = curves(*usual, 2.0 * SPIKE_FACTOR, 3.1 * SPIKE_FACTOR, *usual)
    made.flush()
    [sentence] = made.spike_warnings
    assert sentence == (
        f"stage 2 birds: the gradients exploded at step {SPIKE_WINDOW + 1} (norm 310, over 100 times the median of the "
        "steps before); set optimisation.max_gradient_norm to clip gradients"
    )
    assert [each.text for each in said if isinstance(each, Note)] == [f"warning: {sentence}"]
    steps = [step for each in said if isinstance(each, StepsTaken) for step in each.steps]
    assert len(steps) == 2 * SPIKE_WINDOW + 2


def test_the_first_steps_are_no_spike_and_warnings_are_limited() -> None:
    made, _ = curves(1000.0, 1.0, 1.0)
    made.flush()
    assert made.spike_warnings == []
    made, _ = curves(*[1.0] * SPIKE_WINDOW, *[1e6] * (MAX_SPIKE_WARNINGS + 2))
    made.flush()
    assert len(made.spike_warnings) == MAX_SPIKE_WARNINGS


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_end_the_stage(value: float) -> None:
    made, said = curves(1.0, value, 1.0)
    with refused(ErrorCode.NOT_FINITE) as error:
        made.flush()
    assert isinstance(error.value, NotFiniteError)
    assert f"stage 2 birds: found the gradients' norm {value} at step 1" in str(error.value)
    assert said == []
