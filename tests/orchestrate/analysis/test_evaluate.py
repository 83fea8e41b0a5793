"""`zscl evaluate`: models of a run and other models, both protocols, files and MLflow."""

import csv
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow.tracking import MlflowClient
from support.command import Command
from support.data import coloured_images, make_task

from orchestrate.analysis import evaluate
from orchestrate.recipes import recipe as recipes
from orchestrate.tracking.uploader import sync_run
from schemas.evaluation import EvaluationReport
from schemas.experiment import Experiment
from zscl.checks.prompts import prompt_warnings
from zscl.data.task import TaskFolder
from zscl.datasets.task_writer import write_task
from zscl.sequence.run import run_sequence

Zscl = Callable[..., Command]


@pytest.fixture
def run(experiment: Callable[..., Experiment], tmp_path: Path, tasks: list[str]) -> Path:
    """A run over two of three tasks."""
    made = experiment(tasks=tasks[:2], method="finetune")
    run_sequence(made, tmp_path / "run", device=torch.device("cpu"))
    recipes.write_experiment(made, tmp_path / "run/experiment.yaml")
    return tmp_path / "run"


def evaluation(folder: Path) -> EvaluationReport:
    return EvaluationReport.model_validate_json((folder / "evaluation.json").read_text())


def test_all_stages_of_a_run(
    run: Path, zscl: Zscl, tasks: list[str], tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = f"sqlite:///{tmp_path}/mlflow.db"
    (tmp_path / "mlflow.db").write_bytes(empty_store.read_bytes())
    sync_run(run, store, lambda *_: None)
    looked_at: list[str] = []

    def counted(task: TaskFolder, tokenizer: Any) -> list[str]:
        looked_at.append(task.name)
        return prompt_warnings(task, tokenizer)

    monkeypatch.setattr(evaluate, "prompt_warnings", counted)
    said = zscl("evaluate", run, "--stage", "all", "--suite", tasks[2], "--json")
    assert said.code == 0, said.error
    assert looked_at == ["first", "second", "third"]  # once for all stages, which have one tokenizer
    found = evaluation(run / "evaluation")
    assert json.loads(said.out)["evaluation"] == found.model_dump(mode="json")
    assert [model.stage for model in found.models] == [0, 1, 2]
    assert [model.model for model in found.models] == ["zero-shot", "1-first", "2-second"]

    result = json.loads((run / "result.json").read_text())
    for row, model in zip([result["zero_shot"], *result["accuracy_matrix"]], found.models, strict=True):
        aware = [each.top1 for each in model.judged if each.protocol == "task-aware"]
        assert (aware[:2], len(aware)) == (row, 3)
        agnostic = [each for each in model.judged if each.protocol == "task-agnostic"]
        # The tasks have the same four classes, by name: told apart, they are four and not eight.
        assert [(each.task, each.classes) for each in agnostic] == [("first", 4), ("second", 4)]
    assert found.figures["task-aware"].model_dump() == result["metrics"]

    with (run / "evaluation/confusion.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert sum(int(row["images"]) for row in rows if row["protocol"] == "task-aware") == 3 * 3 * 10
    client = MlflowClient(store)
    [recorded] = client.search_runs(["1"], "tags.`zscl.level` = 'sequence'")
    assert {file.path for file in client.list_artifacts(recorded.info.run_id, "evaluation")} == {
        f"evaluation/{name}"
        for name in ("evaluation.json", "per_class.csv", "confusion.csv", "calibration.png", "confusions.png")
    }
    history = client.get_metric_history(recorded.info.run_id, "task-agnostic/second")
    assert [each.step for each in history] == [0, 1, 2]
    assert zscl("evaluate", run, "--stage", "all", "--suite", tasks[2]).code == 0  # and again: nothing is there twice
    assert len(client.get_metric_history(recorded.info.run_id, "task-agnostic/second")) == 3


def test_one_model_in_detail(run: Path, zscl: Zscl, tasks: list[str], tmp_path: Path) -> None:
    said = zscl("evaluate", run / "stages/1-first/model", "--task", tasks[0], "--out", tmp_path / "out")
    assert said.code == 0, said.error
    assert "calibration error" in said.out
    assert "task-agnostic" in said.out
    found = evaluation(tmp_path / "out")
    [model] = found.models
    assert (model.stage, found.figures) == (None, {})
    last = zscl("evaluate", run, "--protocol", "task-agnostic", "--templates", "first", "--offline")
    assert last.code == 0, last.error
    assert {each.protocol for each in evaluation(run / "evaluation").models[0].judged} == {"task-agnostic"}
    assert evaluation(run / "evaluation").models[0].stage == 2


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["RUN", "--stage", "3"], "--stage 3: found 2 trained stages in"),
        (["RUN", "--stage", "last"], "expected 0 to 2 or all"),
        (["RUN", "--protocol", "task-aware,both"], "--protocol: found 'both', expected task-aware or task-agnostic"),
        (["RUN", "--precision", "fp16"], "--precision: found 'fp16', expected fp32 or bf16"),
        (["RUN", "--pretrained", "openai"], "--pretrained openai cannot be used with a run"),
        (["RUN", "--suite", "TASK"], "found two tasks or suites called 'first'"),
        (["embedded"], "the model 'embedded' needs tasks to be evaluated on"),
        (
            ["embedded", "--stage", "1", "--task", "TASK"],
            "--stage 1 needs the folder of a run, but 'embedded' is not one",
        ),
        (
            ["nothing", "--task", "TASK"],
            "nothing: expected the folder of a run, an open_clip folder, or an open_clip model name",
        ),
        (["ViT-B-33", "--pretrained", "openai", "--task", "TASK"], "found no model of that name"),
        (["embedded", "--task", "missing"], "missing: found no such folder, expected the folder of task"),
    ],
)
def test_invalid_arguments(run: Path, zscl: Zscl, tasks: list[str], arguments: list[str], sentence: str) -> None:
    given = {"RUN": str(run), "TASK": tasks[0]}
    said = zscl("evaluate", *(given.get(each, each) for each in arguments))
    assert (said.code, sentence in said.error) == (2, True), said.error
    assert not (run / "evaluation").exists()


def test_max_broken_share_is_that_of_the_run(run: Path, zscl: Zscl, tmp_path: Path) -> None:
    task = make_task(tmp_path / "odd", seed=0)
    with tarfile.open(task / "test/0.tar", "a") as tar:
        tar.addfile(tarfile.TarInfo("x.cls"))
    said = zscl("evaluate", run, "--task", task, "--offline")
    assert said.code == 2
    assert "found 1 unusable samples of 11, expected at most a fraction of 0.01" in said.error
    recipe = run / "experiment.yaml"
    recipe.write_text(recipe.read_text().replace("max_broken_share: 0.01", "max_broken_share: 0.1"))
    said = zscl("evaluate", run, "--task", task, "--offline")
    assert said.code == 0, said.error
    assert "sample 'x' cannot be used (no image member: found x.cls alone" in said.error


@pytest.mark.parametrize("name", ["animal photos", "tiere-\u00fcbung", "a[b]{c,d}::*%20?'$x", "n" * 250, "-v"])
def test_a_task_folder_may_have_any_name(zscl: Zscl, tmp_path: Path, name: str, tiny_model: str) -> None:
    folder = make_task(tmp_path / "task", seed=0, train=4).rename(tmp_path / name)
    said = zscl("evaluate", tiny_model.removeprefix("local-dir:"), "--task", folder, "--out", tmp_path / "out")
    assert said.code == 0, said.error


def test_a_task_folder_without_a_usable_name_is_refused(zscl: Zscl, tmp_path: Path, tiny_model: str) -> None:
    for name in ("\u52d5\u7269", "\udcff"):
        make_task(tmp_path / "task", seed=0, train=4).rename(tmp_path / name)
        said = zscl("evaluate", tiny_model.removeprefix("local-dir:"), "--task", tmp_path / name)
        assert said.code == 2, said.error
        assert len(said.error.splitlines()) == 1


def test_warnings_about_classes_with_equal_tokens_and_long_prompts(zscl: Zscl, tiny_model: str, tmp_path: Path) -> None:
    splits = {split: list(coloured_images(8, 0)) for split in ("train", "test")}
    templates = ["a {c}", "a picture of a very small and nearly square patch of {c}"]
    write_task(tmp_path / "letters", ["A", "b", "a", r"$\no{$ $x$"], templates, splits, suffix="png", source="")
    model = tiny_model.removeprefix("local-dir:")
    said = zscl("evaluate", model, "--task", tmp_path / "letters", "--offline", "--out", tmp_path / "out")
    warnings = evaluation(tmp_path / "out").warnings
    assert (said.code, len(warnings)) == (0, 2)
    assert all(f"warning: {sentence}" in said.error for sentence in warnings)
    assert "found the classes 'A' (0), 'a' (2) with the same tokens" in said.error
    checked = zscl("data", "check", tmp_path / "letters")
    assert "found the classes 'A' (0), 'a' (2) with the same tokens" in checked.out
