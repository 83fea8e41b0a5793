"""Stages that runs have in common: trained once, to the numbers that each would have come to alone."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from schemas.events import Note, StageStarted
from schemas.experiment import Experiment
from schemas.method import Average
from schemas.results import Result
from zscl.sequence.resolve import resolve
from zscl.sequence.run import run_sequence
from zscl.sequence.stage_cache import SharedWork, StageCache, stage_identity
from zscl.training.checkpoint import StoppedError

Make = Callable[..., Experiment]
CPU = torch.device("cpu")


def zscl(every: int, **average: Any) -> dict[str, Any]:
    return {"preset": "zscl", "average": {"every": every, **average}}


def weights(run: Path) -> list[bytes]:
    return [file.read_bytes() for file in sorted(run.glob("stages/*/model/*.safetensors"))]


def run(made: Experiment, place: Path, shared: SharedWork | None = None) -> tuple[Result, list[int]]:
    """Run; returns the result and the stages that were trained."""
    trained: list[int] = []

    def hear(progress: object) -> None:
        if isinstance(progress, StageStarted):
            trained.append(progress.stage)

    return run_sequence(made, place, hear, CPU, shared=shared), trained


def test_experiments_that_differ_only_in_the_average_share_the_first_stage(experiment: Make, tmp_path: Path) -> None:
    methods = [zscl(1), zscl(3), zscl(2, start_share=0.2), {"preset": "zscl", "average": None}]
    made = [experiment(method=method) for method in methods]
    averages = tuple(each.method.average for each in made)
    shared = SharedWork(tmp_path / "teacher", tmp_path / "stages", averages)
    for number, each in enumerate(made):
        alone, _ = run(each, tmp_path / f"alone-{number}")
        together, trained = run(each, tmp_path / f"run-{number}", shared)
        assert trained == ([1, 2, 3] if number == 0 else [2, 3])
        assert [stage.shared for stage in together.stages] == [number > 0, False, False]
        assert together.accuracy_matrix == alone.accuracy_matrix
        assert weights(tmp_path / f"run-{number}") == weights(tmp_path / f"alone-{number}")
        assert [stage.merges for stage in together.stages] == [stage.merges for stage in alone.stages]
        assert [stage.losses for stage in together.stages] == [stage.losses for stage in alone.stages]
        seconds = [stage.train_seconds for stage in together.stages if not stage.shared]
        assert together.train_seconds == sum(seconds)  # a stage is paid for once


def test_experiments_that_differ_in_a_later_task_share_the_stages_before_it(
    experiment: Make, tasks: list[str], tmp_path: Path
) -> None:
    shared = SharedWork(tmp_path / "teacher", tmp_path / "stages")
    run(experiment(), tmp_path / "first", shared)
    later = [*tasks[:2], {"path": tasks[2], "learning_rate": 0.1}]
    found, trained = run(experiment(tasks=later), tmp_path / "second", shared)
    assert trained == [3]
    assert found.evaluation_seconds > 0
    measured = json.loads((tmp_path / "second/stages/2-second/accuracy.json").read_text())
    assert measured["seconds"] == 0.0  # the row is the first run's
    assert found.accuracy_matrix == run(experiment(tasks=later), tmp_path / "alone")[0].accuracy_matrix


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"method": {"preset": "zscl", "distill": {"image_weight": 2.0}}},
        {"evaluation": {"held_out": {"share": 0.25}}},
        {"optimisation": {"steps": 5, "warmup_steps": 1, "batch_size": 6, "reference_batch_size": 5}},
    ],
)
def test_experiments_that_differ_otherwise_share_nothing(
    experiment: Make, tmp_path: Path, changes: dict[str, Any]
) -> None:
    stores = [StageCache(resolve(each), tmp_path, ()) for each in (experiment(), experiment(**changes))]
    keys = [{store.training_key(stage) for stage in (1, 2, 3)} | {store.model_key(1)} for store in stores]
    assert not keys[0] & keys[1]


@pytest.mark.parametrize("version", ["ALGORITHM_VERSION", "FEATURES_VERSION"])
def test_another_version_of_the_algorithm_shares_nothing(
    experiment: Make, tmp_path: Path, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def keys() -> set[str]:
        store = StageCache(resolve(experiment()), tmp_path, ())
        return {
            key
            for stage in (0, 1, 2)
            for key in (store.training_key(stage), store.model_key(stage), store.row_key(stage))
        }

    before = keys()
    monkeypatch.setattr(f"schemas.algorithm.{version}", 1_000)
    assert not before & keys()


def test_experiments_with_other_evaluation_share_stages_but_no_rows(experiment: Make, tmp_path: Path) -> None:
    made = [experiment(), experiment(evaluation={"templates": "first"})]
    stores = [StageCache(resolve(each), tmp_path, ()) for each in made]
    assert stores[0].model_key(2) == stores[1].model_key(2)
    assert stores[0].row_key(2) != stores[1].row_key(2)


def test_distillation_on_prompts_of_all_tasks_makes_a_stage_depend_on_them(
    experiment: Make, tasks: list[str], tmp_path: Path
) -> None:
    def courses(prompts_of: str) -> list[str]:
        method = {"preset": "lwf", "distill": {"prompts_of": prompts_of}}
        made = [experiment(method=method, tasks=chosen) for chosen in (tasks, tasks[:2])]
        return [StageCache(resolve(each), tmp_path, ()).training_key(1) for each in made]

    assert len(set(courses("current"))) == 1
    assert len(set(courses("others"))) == 2


def test_a_run_waits_for_the_lock_and_can_be_stopped(experiment: Make, tmp_path: Path) -> None:
    shared, notes = SharedWork(tmp_path / "teacher", tmp_path / "stages"), []
    store = StageCache(resolve(experiment()), tmp_path / "stages", ())
    (tmp_path / "stages").mkdir()

    def hear(progress: object) -> None:
        if isinstance(progress, Note):
            notes.append(progress.text)

    with (
        FileLock(tmp_path / "stages" / f".{store.training_key(1)}.lock"),
        pytest.raises(StoppedError, match="stopped while"),
    ):
        run_sequence(
            experiment(), tmp_path / "run", hear, CPU, lambda: any("waiting" in note for note in notes), shared
        )
    assert "waiting for another run, which computes a shared stage or row" in notes
    assert run(experiment(), tmp_path / "run", shared)[1] == [1, 2, 3]


def test_extra_averages_survive_an_interruption(experiment: Make, tmp_path: Path) -> None:
    averages = (Average(every=2), Average(every=1))
    shared = SharedWork(tmp_path / "teacher", tmp_path / "stages", averages)
    made = experiment(compute={"device": "cpu", "checkpoint": {"every_steps": 1}})
    looks = iter([False] * 6)
    with pytest.raises(StoppedError):
        run_sequence(made, tmp_path / "run", device=CPU, stop_requested=lambda: next(looks, True), shared=shared)
    assert (tmp_path / "run/checkpoint.pt").is_file()
    run(made, tmp_path / "run", shared)
    other = experiment(method=zscl(1))
    run(other, tmp_path / "other", shared)
    run(other, tmp_path / "alone")
    assert weights(tmp_path / "other") == weights(tmp_path / "alone")


def test_evaluation_settings_are_not_in_the_identity_of_stages(experiment: Callable[..., Experiment]) -> None:
    held_out, test = (
        resolve(experiment(evaluation={"held_out": {"share": 0.25, "judged_on": judged_on}}))
        for judged_on in ("held_out", "test")
    )
    assert stage_identity(held_out, 1) == stage_identity(test, 1)
    assert held_out.fingerprint != test.fingerprint
    other = resolve(experiment(evaluation={"held_out": {"share": 0.5}}))
    assert stage_identity(held_out, 1) != stage_identity(other, 1)
