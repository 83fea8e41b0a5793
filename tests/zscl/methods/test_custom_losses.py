"""Custom losses, named in a recipe."""

import csv
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from support.errors import refused

from orchestrate.reports import html_page as page
from schemas.errors import ErrorCode
from schemas.experiment import Experiment
from schemas.results import Result
from zscl.methods import interfaces
from zscl.sequence.resolve import resolve
from zscl.sequence.run import run_sequence

CPU = torch.device("cpu")
FIELD = "method.custom_losses"
MODULE = """
def pull(stage, weight=1.0, name="pull"):
    assert len(stage.start) == len(stage.trained)

    def term(features, batch):
        assert len(features.images) == stage.batch_size
        distance = sum((weight - start).abs().sum() for weight, start in zip(stage.trained, stage.start))
        return {name: weight * distance}

    return term


number = 3
"""
Make = Callable[..., Experiment]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module of the user."""
    file = tmp_path / "losses_of_mine.py"
    file.write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, file.stem, raising=False)
    return file


def with_losses(experiment: Make, *losses: Any, preset: str = "finetune") -> Experiment:
    return experiment(method={"preset": preset, "custom_losses": list(losses)})


def test_a_custom_loss_is_trained_on_and_recorded(module: Path, experiment: Make, tmp_path: Path) -> None:
    plain = run_sequence(experiment(method="finetune"), tmp_path / "plain/run", device=CPU)
    without = {"path": "losses_of_mine.pull", "settings": {"weight": 0.0}}
    nothing = run_sequence(with_losses(experiment, without), tmp_path / "nothing/run", device=CPU)
    strong = {"path": "losses_of_mine.pull", "settings": {"weight": 10.0}}
    pulled = run_sequence(with_losses(experiment, strong), tmp_path / "pulled/run", device=CPU)
    assert nothing.accuracy_matrix == plain.accuracy_matrix
    assert nothing.method_changes == {"custom_losses.losses_of_mine.pull": '{"weight": 0.0}'}
    first = tmp_path / "pulled/run/stages/1-first/losses.csv"
    assert first.read_text().splitlines()[0] == "step,learning_rate,classification,pull,gradient_norm"
    assert pulled.stages[0].losses["classification"] != plain.stages[0].losses["classification"]
    assert pulled.stages[0].losses["pull"] > 0


def test_code_and_settings_are_part_of_the_fingerprint(module: Path, experiment: Make) -> None:
    def fingerprint(settings: Experiment) -> str:
        return resolve(settings).fingerprint

    bare, again = (with_losses(experiment, "losses_of_mine.pull") for _ in range(2))
    assert fingerprint(bare) == fingerprint(again)
    other = with_losses(experiment, {"path": "losses_of_mine.pull", "settings": {"weight": 2.0}})
    assert fingerprint(other) != fingerprint(bare)
    assert fingerprint(experiment(method="finetune")) != fingerprint(bare)
    before = fingerprint(bare)
    module.write_text(MODULE + "# another\n")
    del sys.modules[module.stem]
    assert fingerprint(bare) != before


@pytest.mark.parametrize(
    ("loss", "code", "content"),
    [
        ("no_such_module.Loss", ErrorCode.UNKNOWN_NAME, "No module named"),
        ("losses_of_mine.push", ErrorCode.UNKNOWN_NAME, "no attribute 'push'"),
        ("losses_of_mine.number", ErrorCode.CUSTOM_CODE, "'losses_of_mine.number' is int"),
    ],
)
def test_a_missing_loss_is_refused_before_anything_starts(
    module: Path, experiment: Make, loss: str, code: ErrorCode, content: str
) -> None:
    with refused(code, FIELD) as error:
        resolve(with_losses(experiment, loss))
    assert content in str(error.value)


def test_settings_and_names_that_do_not_fit(module: Path, experiment: Make, tmp_path: Path) -> None:
    wrong = with_losses(experiment, {"path": "losses_of_mine.pull", "settings": {"strength": 1.0}})
    with refused(ErrorCode.INVALID_VALUE, FIELD) as error:
        resolve(wrong)
    assert "'strength'" in str(error.value)
    duplicate = with_losses(experiment, {"path": "losses_of_mine.pull", "settings": {"name": "classification"}})
    with refused(ErrorCode.DUPLICATE, FIELD) as error:
        run_sequence(duplicate, tmp_path / "run", device=CPU)
    assert "'classification'" in str(error.value)


@pytest.mark.parametrize(
    ("body", "content"),
    [
        ("return lambda features, batch: features.images.mean()", "returns Tensor"),
        ("return lambda features, batch: {'mine': 1.0}", "float as 'mine'"),
        ("return lambda features, batch: {'mine': features.images}", "a tensor of shape [6, 16] as 'mine'"),
        (
            "return lambda features, batch: features.image",
            "line 2 (AttributeError: 'Features' object has no attribute",
        ),
        ("return lambda features, batch: features.images @ features.images", "line 2 (RuntimeError: mat1 and mat2"),
        ("raise KeyError('weight')", "fails in losses_of_mine.py, line 2 (KeyError: 'weight')"),
        ("return 3", "returns int"),
        ("return lambda features, batch: {'mine': features.images.mean().long()}", "torch.int64 on cpu as 'mine'"),
        ("return lambda features, batch: {3: features.images.mean()}", "a loss named 3"),
        ("return lambda features, batch: {'a,b': features.images.mean()}", "a loss named 'a,b'"),
        ("return lambda features, batch: {'step': features.images.mean()}", "a loss named 'step'"),
        ("return lambda features, batch: {'../up': features.images.mean()}", "a loss named '../up'"),
    ],
)
def test_a_broken_loss_is_refused_with_one_sentence(
    module: Path, experiment: Make, tmp_path: Path, body: str, content: str
) -> None:
    module.write_text(f"def broken(stage):\n    {body}\n")
    with refused(ErrorCode.CUSTOM_CODE, FIELD) as error:
        run_sequence(with_losses(experiment, "losses_of_mine.broken"), tmp_path / "run", device=CPU)
    assert "'losses_of_mine.broken'" in str(error.value)
    assert content in str(error.value)


VARYING = """
class Varying:
    def __init__(self, stage):
        self.calls = 0

    def __call__(self, features, batch):
        self.calls += 1
        one, two = 1 + 0 * features.images.mean(), 2 + 0 * features.images.mean()
        return [{}, {"two": two}, {"one": one, "two": two}, {"two": two, "one": one}, {"one": one}][self.calls - 1]
"""


@pytest.mark.parametrize("every_steps", [1, 2, 100])
def test_losses_of_some_steps_have_a_column(module: Path, experiment: Make, tmp_path: Path, every_steps: int) -> None:
    module.write_text(VARYING)
    method = {"preset": "finetune", "custom_losses": ["losses_of_mine.Varying"]}
    compute = {"device": "cpu", "checkpoint": {"every_steps": every_steps}}
    run_sequence(experiment(method=method, compute=compute), tmp_path / "run", device=CPU)
    file = tmp_path / "run/stages/1-first/losses.csv"
    with file.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == ["step", "learning_rate", "classification", "two", "one", "gradient_norm"]
    assert [(row["one"], row["two"]) for row in rows] == [
        ("", ""),
        ("", "2.0"),
        ("1.0", "2.0"),
        ("1.0", "2.0"),
        ("1.0", ""),
    ]
    assert all(float(row["classification"]) > 0 and float(row["gradient_norm"]) > 0 for row in rows)
    points = [(point["loss"], point["step"], point["value"]) for point in page._read_curve(file, "run", "method", 1)]
    assert [point for point in points if point[0] == "one"] == [("one", 2, 1.0), ("one", 3, 1.0), ("one", 4, 1.0)]


def test_the_example_in_the_examples_folder(experiment: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[3] / "examples/custom-loss")
    example = {"path": "relations.Relations", "settings": {"weight": 2.0}}
    result = run_sequence(with_losses(experiment, example, preset="zscl"), tmp_path / "run", device=CPU)
    assert result.stages[-1].losses["relations"] > 0


def test_the_former_name_of_the_field_is_accepted(module: Path, experiment: Make, tmp_path: Path) -> None:
    losses = [{"path": "losses_of_mine.pull", "settings": {"weight": 0.5}}]
    with pytest.warns(FutureWarning, match=r"use method\.custom_losses"):
        former = experiment(method={"preset": "finetune", "further_losses": losses})
    made = experiment(method={"preset": "finetune", "custom_losses": losses})
    assert former == made
    assert resolve(former).fingerprint == resolve(made).fingerprint
    with pytest.raises(ValidationError, match="further_losses"):
        experiment(method={"preset": "finetune", "further_losses": losses, "custom_losses": losses})
    result = run_sequence(made, tmp_path / "run", device=CPU)
    earlier = result.model_dump_json().replace("custom_losses.losses_of_mine", "further_losses.losses_of_mine")
    assert Result.model_validate_json(earlier) == result


def test_a_name_without_a_module(experiment: Make) -> None:
    with pytest.raises(ValidationError, match=r"expected MODULE\.NAME"):
        with_losses(experiment, "pull")
    with pytest.raises(ValidationError, match="without task_loss, custom_losses cannot be used"):
        with_losses(experiment, "losses_of_mine.pull", preset="zero-shot")


def test_the_example_in_the_documentation_of_the_interfaces(module: Path, experiment: Make, tmp_path: Path) -> None:
    lines = (interfaces.__doc__ or "").splitlines()
    module.write_text(textwrap.dedent("\n".join(line for line in lines if line.startswith("    ") or not line)))
    example = {"path": "losses_of_mine.FeatureDistance", "settings": {"weight": 0.5}}
    result = run_sequence(with_losses(experiment, example, preset="zscl"), tmp_path / "run", device=CPU)
    assert result.stages[0].losses["feature_distance_l2"] > 0
