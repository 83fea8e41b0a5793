"""Losses from other code, named in a recipe."""

import csv
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from orchestrate.reports import html_page as page
from schemas.errors import InputError
from schemas.experiment import Experiment
from zscl.sequence.resolve import resolve
from zscl.sequence.run import run_sequence

CPU = torch.device("cpu")
MODULE = """
def pull(stage, weight=1.0, name="pull"):
    assert len(stage.start) == len(stage.trained)

    def part(features, batch):
        assert len(features.images) == stage.batch_size
        distance = sum((own - start).abs().sum() for own, start in zip(stage.trained, stage.start))
        return {name: weight * distance}

    return part


number = 3
"""
Make = Callable[..., Experiment]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module of the user's."""
    file = tmp_path / "losses_of_mine.py"
    file.write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, file.stem, raising=False)
    return file


def with_losses(experiment: Make, *losses: Any, preset: str = "finetune") -> Experiment:
    return experiment(method={"preset": preset, "further_losses": list(losses)})


def test_a_further_loss_is_trained_on_and_recorded(module: Path, experiment: Make, tmp_path: Path) -> None:
    plain = run_sequence(experiment(method="finetune"), tmp_path / "plain/run", device=CPU)
    without = {"path": "losses_of_mine.pull", "settings": {"weight": 0.0}}
    nothing = run_sequence(with_losses(experiment, without), tmp_path / "nothing/run", device=CPU)
    strong = {"path": "losses_of_mine.pull", "settings": {"weight": 10.0}}
    pulled = run_sequence(with_losses(experiment, strong), tmp_path / "pulled/run", device=CPU)
    assert nothing.accuracy_matrix == plain.accuracy_matrix
    assert nothing.method_changes == {"further_losses.losses_of_mine.pull": '{"weight": 0.0}'}
    first = tmp_path / "pulled/run/stages/1-first/losses.csv"
    assert first.read_text().splitlines()[0] == "step,learning_rate,classification,pull,gradient_norm"
    assert pulled.stages[0].losses["classification"] != plain.stages[0].losses["classification"]
    assert pulled.stages[0].losses["pull"] > 0


def test_its_code_and_settings_are_part_of_what_is_computed(module: Path, experiment: Make) -> None:
    def fingerprint(made: Experiment) -> str:
        return resolve(made).fingerprint

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
    ("loss", "sentence"),
    [
        ("no_such_module.Loss", r"'no_such_module\.Loss' cannot be found \(No module named"),
        ("losses_of_mine.push", r"'losses_of_mine\.push' cannot be found \(.*no attribute 'push'"),
        ("losses_of_mine.number", r"'losses_of_mine\.number' is int, expected a class or a function"),
    ],
)
def test_what_is_not_there_is_refused_before_anything_starts(
    module: Path, experiment: Make, loss: str, sentence: str
) -> None:
    with pytest.raises(InputError, match=f"method.further_losses: {sentence}"):
        resolve(with_losses(experiment, loss))


def test_settings_and_names_that_do_not_fit(module: Path, experiment: Make, tmp_path: Path) -> None:
    wrong = with_losses(experiment, {"path": "losses_of_mine.pull", "settings": {"strength": 1.0}})
    with pytest.raises(
        InputError, match=r"does not take these settings \(got an unexpected keyword argument 'strength'"
    ):
        resolve(wrong)
    taken = with_losses(experiment, {"path": "losses_of_mine.pull", "settings": {"name": "classification"}})
    with pytest.raises(InputError, match="found a loss named 'classification' once more"):
        run_sequence(taken, tmp_path / "run", device=CPU)


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("return lambda features, batch: features.images.mean()", r"gives Tensor, expected a dict of losses by name"),
        ("return lambda features, batch: {'mine': 1.0}", r"gives float as 'mine', expected"),
        ("return lambda features, batch: {'mine': features.images}", r"gives a tensor of shape \[6, \d+\] as 'mine'"),
        (
            "return lambda features, batch: features.image",
            r"line 2 \(AttributeError: 'Features' object has no attribute",
        ),
        ("return lambda features, batch: features.images @ features.images", r"line 2 \(RuntimeError: mat1 and mat2"),
        ("raise KeyError('weight')", r"fails in losses_of_mine.py, line 2 \(KeyError: 'weight'\), expected a part"),
        ("return 3", r"gives int, expected a part"),
        (
            "return lambda features, batch: {'mine': features.images.mean().long()}",
            r"gives torch\.int64 on cpu as 'mine'",
        ),
        ("return lambda features, batch: {3: features.images.mean()}", r"gives a loss called 3, expected a name"),
        (
            "return lambda features, batch: {'a,b': features.images.mean()}",
            r"gives a loss called 'a,b', expected a name",
        ),
        (
            "return lambda features, batch: {'step': features.images.mean()}",
            r"gives a loss called 'step', expected a name",
        ),
        (
            "return lambda features, batch: {'../up': features.images.mean()}",
            r"gives a loss called '\.\./up', expected",
        ),
    ],
)
def test_a_loss_that_is_none_is_said_in_a_sentence(
    module: Path, experiment: Make, tmp_path: Path, body: str, sentence: str
) -> None:
    module.write_text(f"def broken(stage):\n    {body}\n")
    with pytest.raises(InputError, match=rf"^method.further_losses: 'losses_of_mine\.broken' .*{sentence}"):
        run_sequence(with_losses(experiment, "losses_of_mine.broken"), tmp_path / "run", device=CPU)


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
def test_losses_that_not_every_step_has_keep_their_columns(
    module: Path, experiment: Make, tmp_path: Path, every_steps: int
) -> None:
    module.write_text(VARYING)
    method = {"preset": "finetune", "further_losses": ["losses_of_mine.Varying"]}
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
    drawn = [(point["loss"], point["step"], point["value"]) for point in page._curve(file, "run", "method", 1)]
    assert [point for point in drawn if point[0] == "one"] == [("one", 2, 1.0), ("one", 3, 1.0), ("one", 4, 1.0)]


def test_a_name_without_a_module(experiment: Make) -> None:
    with pytest.raises(ValidationError, match=r"expected MODULE\.NAME"):
        with_losses(experiment, "pull")
    with pytest.raises(ValidationError, match="found further_losses without task_loss"):
        with_losses(experiment, "losses_of_mine.pull", preset="zero-shot")
