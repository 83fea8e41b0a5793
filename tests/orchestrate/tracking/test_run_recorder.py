"""A run in MLflow: one parent run, one child run per stage, complete series."""

from collections.abc import Callable
from pathlib import Path

from mlflow.tracking import MlflowClient
from support.tracked_run import BEGINNING, FakeRun, curve, read_store, row, started, steps, trained, wait_until

from orchestrate.lifecycle.run_status import write_state
from orchestrate.tracking.mlflow_client import PARENT, REASON, valid_name
from schemas.events import RowMeasured, StepsTaken
from schemas.experiment import Experiment
from schemas.results import StepLosses

Make = Callable[..., Experiment]


def test_a_resumed_run_is_one_run_with_one_curve(resumed_run: FakeRun, folder: Path) -> None:
    store = read_store(f"sqlite:///{folder.parent}/mlflow.db")
    assert store.keys() == {"run", "1-first", "2-second"}
    parent = store["run"]
    assert curve(parent, "accuracy/first") == [(0, 0.5), (1, 0.6), (2, 0.7)]
    assert [step for step, _ in curve(parent, "accuracy_mean")] == [0, 1, 2]
    assert curve(parent, "transfer") == [(0, 0.5)]
    assert parent["tags"]["zscl.order"] == parent["params"]["tasks"] == "first, second"
    assert parent["tags"]["zscl.warnings"] == "stage 1 looks bad"
    assert parent["tags"]["zscl.journal"].partition(" since ")[0] == "19"  # repeated events are not counted
    assert REASON not in parent["tags"]
    assert parent["artefacts"] == ["accuracy_matrix.json", "experiment.yaml", "figures", "result.json"]
    for name, accuracy in (("1-first", 0.6), ("2-second", 0.7)):
        child = store[name]
        assert curve(child, "loss/classification") == [(0, 1.0), (1, 1 / 2), (2, 1 / 3), (3, 1 / 4)]
        assert curve(child, "gradient_norm") == [(0, 0.5), (1, 1.5), (2, 2.5), (3, 3.5)]
        assert [step for step, _ in curve(child, "images_per_second")] == [1, 2, 3]
        assert curve(child, "train_seconds") == [(0, 1.5)]
        assert [value for _, value in curve(child, "accuracy/first")] == [accuracy]
    assert {run["status"] for run in store.values()} == {"FINISHED"}


def test_losses_and_tasks_with_unusual_names_are_recorded(folder: Path, experiment: Make) -> None:
    run = FakeRun(folder)
    uploader = run.start_uploader(experiment())
    losses = {"my loss (λ=0.5)": 0.5}
    step = StepLosses(step=0, learning_rate=0.1, losses=losses, gradient_norm=1.0)
    taken = StepsTaken(stage=1, task="first", steps=(step,), images_per_second=10.0)
    run.emit(*BEGINNING, started(1), taken, RowMeasured(stage=0, accuracy={"t" * 250: 0.5}))
    write_state(folder, "KILLED", "enough")
    assert uploader.end(), run.messages
    store = read_store(f"sqlite:///{folder.parent}/mlflow.db")
    assert valid_name("loss/my loss (λ=0.5)") in store["1-first"]["histories"]


def test_a_deleted_stage_run_is_created_again(folder: Path, experiment: Make) -> None:
    run = FakeRun(folder)
    uploader = run.start_uploader(experiment())
    run.emit(*BEGINNING, started(1), steps(1, 0, 1))
    client = MlflowClient(f"sqlite:///{folder.parent}/mlflow.db")
    query = f"tags.`{PARENT}` = '{uploader.run_id}'"
    experiments = [client.get_experiment_by_name("zscl").experiment_id]
    wait_until(lambda: bool(client.search_runs(experiments, query)))
    client.delete_run(client.search_runs(experiments, query)[0].info.run_id)
    run.emit(steps(1, 2, 3), trained(1), row(1))
    write_state(folder, "KILLED", "enough")
    assert uploader.end()
    [child] = client.search_runs(experiments, query)
    assert child.info.status == "FINISHED"
    assert child.data.metrics["accuracy/first"] == 0.6
