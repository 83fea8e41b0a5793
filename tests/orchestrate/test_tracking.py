"""The tracker by itself: opened again after an interruption, and a store that breaks under it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from orchestrate import recipes
from orchestrate.tracking import Tracker
from schemas.base import InputError
from schemas.experiment import Experiment
from schemas.results import RowMeasured, StageStarted, StepLosses, StepsTaken
from schemas.secrets import mask
from zscl.sequence import run_sequence

Make = Callable[..., Experiment]


def row(stage: int, value: float) -> RowMeasured:
    return RowMeasured(stage=stage, accuracy={"first": value, "second": value / 2})


def steps(stage: int, *numbers: int) -> StepsTaken:
    taken = tuple(
        StepLosses(step=step, learning_rate=0.1, losses={"classification": 1.0 / (step + 1)}) for step in numbers
    )
    return StepsTaken(stage=stage, task="first", steps=taken, images_per_second=10.0)


def histories(client: MlflowClient, run: str, metric: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in client.get_metric_history(run, metric)]


def children(client: MlflowClient, tracker: Tracker) -> list[Any]:
    query = f"tags.`mlflow.parentRunId` = '{tracker.parent}'"
    return list(client.search_runs([tracker.experiment_id], query, order_by=["attributes.start_time"]))


def test_a_resumed_run_is_one_run_with_one_curve(experiment: Make, tmp_path: Path) -> None:
    first = Tracker(experiment(), "abc", tmp_path / "run")
    for progress in (
        row(0, 0.5),
        StageStarted(stage=1, task="first", steps=4),
        steps(1, 0, 1),
        steps(1, 2, 3),
        row(1, 0.6),
    ):
        first(progress)
    for progress in (StageStarted(stage=2, task="second", steps=4), steps(2, 0, 1)):
        first(progress)  # and here it dies

    second = Tracker(experiment(compute={"workers": 2}), "abc", tmp_path / "run")
    assert second.parent == first.parent
    for progress in (
        row(0, 0.5),
        row(1, 0.6),
        StageStarted(stage=2, task="second", steps=4),
        steps(2, 0, 1, 2, 3),
        row(2, 0.7),
    ):
        second(progress)
    client = second.client
    assert histories(client, second.parent, "accuracy/first") == [(0, 0.5), (1, 0.6), (2, 0.7)]
    runs = children(client, second)
    assert [run.info.run_name for run in runs] == ["1-first", "2-second"]
    for run in runs:
        assert [step for step, _ in histories(client, run.info.run_id, "loss/classification")] == [0, 1, 2, 3]
        assert run.info.status == "FINISHED"


def test_another_experiment_in_the_same_place_is_another_run(experiment: Make, tmp_path: Path) -> None:
    assert (
        Tracker(experiment(), "abc", tmp_path / "run").parent != Tracker(experiment(), "abd", tmp_path / "run").parent
    )


def test_a_failed_run_is_marked_with_its_open_stage(experiment: Make, tmp_path: Path) -> None:
    tracker = Tracker(experiment(), "abc", tmp_path / "run")
    tracker(StageStarted(stage=1, task="first", steps=4))
    tracker.close("FAILED")
    assert tracker.client.get_run(tracker.parent).info.status == "FAILED"
    assert [run.info.status for run in children(tracker.client, tracker)] == ["FAILED"]


def test_a_store_that_breaks_later_never_stops_a_run(
    experiment: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = Tracker(experiment(), "abc", tmp_path / "run")
    (tmp_path / "mlflow.db").write_bytes(b"no database any more" * 1000)
    for progress in (row(0, 0.5), StageStarted(stage=1, task="first", steps=4), steps(1, 0), row(1, 0.6)):
        tracker(progress)
    tracker.close("FAILED")
    assert "MLflow did not take" in caplog.text


@pytest.mark.parametrize(
    "uri", ["sqlite:////proc/no/such/place.db", "http://127.0.0.1:9", "nonsense://x", "postgresql://x/y"]
)
def test_a_store_that_cannot_be_opened_is_refused(experiment: Make, tmp_path: Path, uri: str) -> None:
    with pytest.raises(InputError, match=r"tracking\.uri: found no reachable MLflow store"):
        Tracker(experiment(tracking={"uri": uri}), "abc", tmp_path / "run")


def test_a_database_that_is_none_is_refused(experiment: Make, tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"no database" * 1000)
    with pytest.raises(InputError, match=r"tracking\.uri: found no reachable MLflow store"):
        Tracker(experiment(), "abc", tmp_path / "run")


def test_passwords_are_not_shown() -> None:
    assert mask("postgresql://me:secret@host/db") == "postgresql://me:***@host/db"
    assert mask("sqlite:////tmp/mlflow.db") == "sqlite:////tmp/mlflow.db"


def test_a_password_is_not_written_down(experiment: Make, tmp_path: Path) -> None:
    made = experiment(tracking={"uri": "http://me:secret@somewhere:5000"})
    recipes.write_experiment(made, tmp_path / "experiment.yaml")
    assert "http://me:***@somewhere:5000" in (tmp_path / "experiment.yaml").read_text()
    assert "secret" not in (tmp_path / "experiment.yaml").read_text()


def test_rows_that_were_not_taken_are_recorded_at_the_end(experiment: Make, tmp_path: Path) -> None:
    made = experiment(method="finetune")
    tracker = Tracker(made, "abc", tmp_path / "run")
    tracker.silent_until = float("inf")  # as after a failure
    result = run_sequence(made, tmp_path / "run", report=tracker)
    recipes.write_experiment(made, tmp_path / "run/experiment.yaml")
    tracker.finish(result, tmp_path / "run")
    assert [step for step, _ in histories(tracker.client, tracker.parent, "accuracy/first")] == [0, 1, 2, 3]
    assert tracker.client.get_run(tracker.parent).info.status == "FINISHED"


def test_a_stage_whose_row_comes_after_an_interruption_is_closed(experiment: Make, tmp_path: Path) -> None:
    first = Tracker(experiment(), "abc", tmp_path / "run")
    for progress in (row(0, 0.5), StageStarted(stage=1, task="first", steps=4), steps(1, 0, 1)):
        first(progress)
    second = Tracker(experiment(), "abc", tmp_path / "run")
    second(row(1, 0.6))  # trained before, measured now
    [child] = children(second.client, second)
    assert child.info.status == "FINISHED"
    assert child.data.metrics["accuracy/first"] == 0.6
