"""`zscl average`: other averages of a stage's weights."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.command import Command

from orchestrate.recipes import recipe as recipes
from schemas.evaluation import ReplayedAverages
from schemas.experiment import Experiment
from schemas.results import Result
from zscl.sequence.run import run_sequence

Zscl = Callable[..., Command]


@pytest.fixture
def run(experiment: Callable[..., Experiment], tmp_path: Path) -> Path:
    method = {"preset": "zscl", "average": {"every": 2}, "merge": {"share": 0.25}}
    made = experiment(method=method, compute={"device": "cpu", "snapshots_every": 1})
    run_sequence(made, tmp_path / "run", device=torch.device("cpu"))
    recipes.write_experiment(made, tmp_path / "run/experiment.yaml")
    return tmp_path / "run"


def test_averages_of_a_stage(run: Path, zscl: Zscl) -> None:
    choices = ("--every", "1,2", "--kind", "mean,exponential,none", "--share", "0,0.25,1")
    said = zscl("average", run, "--stage", 2, *choices, "--json")
    assert said.code == 0, said.error
    place = run / "averages/2-second"
    found = ReplayedAverages.model_validate_json((place / "averages.json").read_text())
    assert json.loads(said.out)["averages"] == found.model_dump(mode="json")
    assert len(found.tried) == (2 * 2 + 1) * 3

    result = Result.model_validate_json((run / "result.json").read_text())
    [own] = [each for each in found.tried if each.own]
    assert (own.kind, own.every, own.share, own.merges) == ("mean", 2, 0.25, 5 - 1)  # start, 0, 2, 4
    assert tuple(own.accuracy.values()) == result.accuracy_matrix[1]
    assert (own.trained, own.earlier, own.later) == (
        own.accuracy["second"],
        own.accuracy["first"],
        own.accuracy["third"],
    )
    assert tuple(found.start.values()) == result.accuracy_matrix[0]
    assert all(each.accuracy == found.start for each in found.tried if each.share == 1)  # nothing but the anchor
    with (place / "averages.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [float(row["third"]) for row in rows] == [each.accuracy["third"] for each in found.tried]
    assert (place / "averages.png").stat().st_size > 10_000

    shown = zscl("average", run, "--every", "5", "--anchor", "initial")  # of the last stage
    assert shown.code == 0, shown.error
    assert "stage 3, third" in shown.out
    assert "last weights" in shown.out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--every", "two"], "--every: found 'two', expected whole numbers"),
        (["--every", "0"], "--every 0 --kind mean,none: every: found 0, expected a value greater than 0"),
        (["--every", "2", "--kind", "median"], "--kind median: found 'median', expected none, mean or exponential"),
        (["--every", "2", "--share", "1.5"], "--share: found '1.5', expected numbers from 0 to 1"),
        (["--every", "2", "--anchor", "end"], "--anchor: anchor: found 'end', expected 'stage_start' or 'initial'"),
        (["--every", "2", "--stage", "4"], "--stage 4: found a run of 3 stages, expected 1 to 3"),
    ],
)
def test_invalid_arguments(run: Path, zscl: Zscl, arguments: list[str], sentence: str) -> None:
    said = zscl("average", run, *arguments)
    assert (said.code, sentence in said.error) == (2, True), said.error


def test_a_run_without_snapshots(run: Path, zscl: Zscl, tmp_path: Path) -> None:
    for file in (run / "snapshots/3-third").iterdir():
        if file.stem.isdecimal() and int(file.stem) % 2:
            file.unlink()
    said = zscl("average", run, "--every", "3")
    assert said.code == 2
    assert "found snapshots of every 2 steps, expected a multiple of 2" in said.error
    said = zscl("average", tmp_path, "--every", "2")
    assert (said.code, "found no experiment.yaml, expected the folder of a run" in said.error) == (2, True)
