"""A stage's model in MLflow: its predictions are those of the run's evaluation, and it can be registered."""

import io
from collections.abc import Callable
from pathlib import Path

import mlflow
import pandas as pd
import pytest
import torch
from mlflow.tracking import MlflowClient
from PIL import Image

from orchestrate.recipes import recipe as recipes
from orchestrate.tracking.uploader import sync_run
from schemas.data import Task
from schemas.experiment import Experiment
from schemas.results import Result
from zscl.data.task import TaskFolder
from zscl.sequence.run import run_sequence

Make = Callable[..., Experiment]


@pytest.fixture
def send(experiment: Make, tmp_path: Path, tasks: list[str], empty_store: Path) -> Callable[..., MlflowClient]:
    """Run two stages, and send them to a store."""

    def run_and_send(**tracking: str) -> MlflowClient:
        uri = f"sqlite:///{tmp_path}/mlflow.db"
        (tmp_path / "mlflow.db").write_bytes(empty_store.read_bytes())
        variant = experiment(tasks=tasks[:2], method="finetune", tracking={"uri": uri, **tracking})
        run_sequence(variant, tmp_path / "run", device=torch.device("cpu"))
        recipes.write_experiment(variant, tmp_path / "run/experiment.yaml")
        for _ in range(2):  # repeated uploads change nothing
            sync_run(tmp_path / "run", uri, lambda *_: None)
        return MlflowClient(uri)

    return run_and_send


def test_it_predicts_as_the_run_does(
    send: Callable[..., MlflowClient], tmp_path: Path, tasks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = send()
    models = {model.name: model for model in client.search_logged_models(["1"])}
    assert sorted(models) == ["run-1-first", "run-2-second"]
    [child] = client.search_runs(["1"], "tags.`zscl.stage` = '2'")
    assert models["run-2-second"].source_run_id == child.info.run_id
    assert [output.model_id for output in child.outputs.model_outputs] == [models["run-2-second"].model_id]

    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    try:
        model = mlflow.pyfunc.load_model(models["run-2-second"].model_uri)
        version = mlflow.register_model(models["run-2-second"].model_uri, "squares")
    finally:
        mlflow.set_tracking_uri(None)
    assert (version.name, str(version.version)) == ("squares", "1")
    result = Result.model_validate_json((tmp_path / "run/result.json").read_text())
    task = TaskFolder.open(Task.model_validate(tasks[1]))
    samples = list(task.test.iter_shard(0, 1))
    probabilities = model.predict(pd.DataFrame({"image": [sample.image for sample in samples]}))
    assert list(probabilities.columns) == list(task.classnames)
    assert probabilities.sum(axis=1).tolist() == pytest.approx([1.0] * len(samples))
    correct = [task.classnames[task.get_label(sample)] for sample in samples] == probabilities.idxmax(axis=1)
    assert correct.mean() == pytest.approx(result.accuracy_matrix[1][1])

    Image.open(io.BytesIO(samples[0].image)).save(tmp_path / "one.png")
    params = {"classes": ["a cat", "red"], "templates": ["{c}"]}
    two = model.predict(pd.DataFrame({"image": [str(tmp_path / "one.png"), samples[0].image]}), params=params)
    assert list(two.columns) == ["a cat", "red"]
    assert two.iloc[0].tolist() == pytest.approx(two.iloc[1].tolist())


@pytest.mark.parametrize(("models", "names"), [("last", ["run-2-second"]), ("none", [])])
def test_which_stages_log_their_models(send: Callable[..., MlflowClient], models: str, names: list[str]) -> None:
    assert [model.name for model in send(models=models).search_logged_models(["1"])] == names
