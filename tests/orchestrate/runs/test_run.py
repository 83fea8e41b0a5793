"""Runs on Ray that are recorded in MLflow, as a user starts them."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow.tracking import MlflowClient
from ruamel.yaml import YAML
from support.command import Command

from orchestrate.recipes import recipe as recipes
from schemas.results import Result, RunState
from zscl.sequence.run import run_sequence

Zscl = Callable[..., Command]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parent folder of this module's runs."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def file(root: Path, recipe: Callable[..., dict[str, Any]]) -> Path:
    file = root / "recipe.yaml"
    YAML(typ="safe").dump(recipe(), file)
    return file


@pytest.fixture
def runs(root: Path, file: Path, zscl: Zscl, ray_cluster: None, without_ray: Callable[[], None]) -> dict[str, Path]:
    """A ZSCL run on two workers with overlapped evaluation, and a fine-tuning run without Ray.

    The first test that uses the fixture executes them.
    """
    folders = {"zscl": root / "zscl", "finetune": root / "finetune"}
    if not folders["zscl"].exists():
        two = ("--set", "compute.workers=2", "--set", "compute.evaluation=overlapped")
        completed = zscl("run", file, "--out", folders["zscl"], *two, "--json")
        assert completed.code == 0, completed.error
        assert json.loads(completed.out)["folder"] == str(folders["zscl"])
        without_ray()
        completed = zscl("run", file, "--out", folders["finetune"], "--set", "method=finetune")
        assert completed.code == 0, completed.error
        assert str(folders["finetune"]) in completed.out
        assert f"mlflow ui --backend-store-uri sqlite:///{root}/mlflow.db" in completed.out
    return folders


def result_of(folder: Path) -> Result:
    return Result.model_validate_json((folder / "result.json").read_text())


def test_two_ray_workers_give_the_numbers_of_one_plain_process(runs: dict[str, Path], tmp_path: Path) -> None:
    experiment = recipes.load_experiment(runs["zscl"] / "experiment.yaml")
    single = run_sequence(experiment, tmp_path / "single", device=torch.device("cpu"))
    parallel = result_of(runs["zscl"])
    assert parallel.workers == 2
    assert (parallel.fingerprint, parallel.accuracy_matrix) == (single.fingerprint, single.accuracy_matrix)
    for stage, expected in zip(parallel.stages, single.stages, strict=True):
        assert stage.losses == pytest.approx(expected.losses, rel=2e-3)


def test_a_finished_run_is_not_run_again(runs: dict[str, Path], file: Path, zscl: Zscl) -> None:
    written = (runs["zscl"] / "result.json").stat().st_mtime_ns
    again = zscl("run", file, "--out", runs["zscl"])
    assert again.code == 0
    assert "finished before, nothing to do" in again.error
    assert (runs["zscl"] / "result.json").stat().st_mtime_ns == written


def test_a_run_resumes_after_its_last_finished_stage_without_mlflow(
    runs: dict[str, Path], file: Path, root: Path, zscl: Zscl, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = Path(shutil.copytree(runs["finetune"], root / "cut"))
    (cut / "result.json").unlink()
    shutil.rmtree(cut / "stages/3-third")
    (cut / "stages/2-second/accuracy.json").unlink()
    before_third, event, _ = (cut / "journal.jsonl").read_text().partition('{"event":"stage_started","stage":3')
    assert event
    (cut / "journal.jsonl").write_text(before_third)  # ends in an incomplete line, as after a kill
    first, second = (cut / f"stages/{name}/training.json" for name in ("1-first", "2-second"))
    before = first.stat().st_mtime_ns, second.stat().st_mtime_ns
    with monkeypatch.context() as without:
        for module in (
            "mlflow",
            "orchestrate.tracking.mlflow_client",
            "orchestrate.tracking.run_recorder",
            "orchestrate.tracking.uploader",
        ):
            without.setitem(sys.modules, module, None)  # importing it raises
        completed = zscl("run", file, "--out", cut, "--set", "method=finetune", "--offline")
    assert completed.code == 0, completed.error
    assert completed.out.endswith(f"zscl sync {cut}\n")
    assert (first.stat().st_mtime_ns, second.stat().st_mtime_ns) == before
    original, resumed = result_of(runs["finetune"]), result_of(cut)
    assert resumed.accuracy_matrix == original.accuracy_matrix
    assert resumed.stages[2].losses == original.stages[2].losses
    assert RunState.model_validate_json((cut / "state.json").read_text()).status == "FINISHED"
    # After the sync, MLflow has the same metrics as of the run that was recorded during training.
    assert zscl("sync", cut).code == 0
    client = MlflowClient(f"sqlite:///{root}/mlflow.db")
    assert recorded(client, cut) == recorded(client, runs["finetune"])


def recorded(client: MlflowClient, folder: Path) -> list[Any]:
    """What MLflow has of a run, without what differs between two runs of an experiment."""
    experiments = [client.get_experiment_by_name("zscl").experiment_id]
    [parent] = client.search_runs(experiments, f"tags.`zscl.folder` = '{folder}'")
    query = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    records = []
    for run in (parent, *client.search_runs(experiments, query, order_by=["attributes.start_time"])):
        histories = {
            name: [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)]
            for name in run.data.metrics
            if name not in ("train_seconds", "images_per_second")
        }
        artifacts = [item.path for item in client.list_artifacts(run.info.run_id)]
        records.append((run.info.status, run.data.params, run.data.tags.keys(), histories, artifacts))
    return records


class TestMlflow:
    """What MLflow's pages show."""

    @pytest.fixture
    def client(self, runs: dict[str, Path], root: Path) -> MlflowClient:
        return MlflowClient(f"sqlite:///{root}/mlflow.db")

    def runs_of(self, client: MlflowClient, query: str) -> list[Any]:
        experiment = client.get_experiment_by_name("zscl")
        return list(client.search_runs([experiment.experiment_id], query, order_by=["attributes.start_time"]))

    def parent(self, client: MlflowClient, folder: Path) -> Any:
        [run] = self.runs_of(client, f"tags.`zscl.folder` = '{folder}'")
        return run

    def test_the_parent_has_each_task_against_the_stage(self, client: MlflowClient, runs: dict[str, Path]) -> None:
        parent, result = self.parent(client, runs["zscl"]), result_of(runs["zscl"])
        assert parent.info.status == "FINISHED"
        for column, task in enumerate(["first", "second", "third"]):
            history = client.get_metric_history(parent.info.run_id, f"accuracy/{task}")
            assert [(point.step, point.value) for point in history] == [
                (step, row[column]) for step, row in enumerate([result.zero_shot, *result.accuracy_matrix])
            ]
        for name, value in result.metrics.model_dump().items():
            assert parent.data.metrics[name] == value
        assert parent.data.metrics["zero_shot/transfer"] == result.zero_shot_metrics.transfer

    def test_the_parent_has_tags_and_parameters(self, client: MlflowClient, runs: dict[str, Path]) -> None:
        parent, result = self.parent(client, runs["zscl"]), result_of(runs["zscl"])
        assert parent.data.tags["zscl.fingerprint"] == result.fingerprint
        assert parent.data.tags["zscl.method"] == "zscl"
        assert parent.data.params["method.average.every"] == "2"
        assert parent.data.params["tasks"] == "first, second, third"

    def test_every_stage_is_a_child_with_its_curves(self, client: MlflowClient, runs: dict[str, Path]) -> None:
        parent = self.parent(client, runs["zscl"])
        children = self.runs_of(client, f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
        assert [child.info.run_name for child in children] == ["1-first", "2-second", "3-third"]
        for child in children:
            assert child.info.status == "FINISHED"
            for curve in (
                "loss/classification", "loss/image_distillation", "loss/text_distillation", "loss/consolidation",
                "learning_rate", "gradient_norm",
            ):  # fmt: skip
                history = client.get_metric_history(child.info.run_id, curve)
                assert sorted(point.step for point in history) == [0, 1, 2, 3, 4]
            assert child.data.metrics["images_per_second"] > 0

    def test_the_artifacts_are_there(self, client: MlflowClient, runs: dict[str, Path], tmp_path: Path) -> None:
        run = self.parent(client, runs["zscl"]).info.run_id
        names = {item.path for item in client.list_artifacts(run)} | {
            item.path for item in client.list_artifacts(run, "figures")
        }
        assert names >= {
            "experiment.yaml", "result.json", "accuracy_matrix.json",
            "figures/accuracy_matrix.png", "figures/accuracy_by_stage.png",
        }  # fmt: skip
        table = json.loads(Path(client.download_artifacts(run, "accuracy_matrix.json", str(tmp_path))).read_text())
        assert table["columns"] == ["after", "first", "second", "third"]
        assert len(table["data"]) == 4

    def test_data_and_origin_are_named(self, client: MlflowClient, runs: dict[str, Path]) -> None:
        [run] = self.runs_of(client, f"tags.`zscl.folder` = '{runs['zscl']}'")
        result = result_of(runs["zscl"])
        inputs = client.get_run(run.info.run_id).inputs.dataset_inputs
        digests = {item.dataset.name: item.dataset.digest for item in inputs}
        expected = {task.name: task.digest[:36] for task in result.tasks} | {"reference": result.reference[:36]}
        assert digests == expected
        assert {json.loads(item.dataset.profile).get("split_family") for item in inputs} == {"own", None}
        assert run.data.tags["mlflow.source.name"].startswith("zscl ")
        assert run.data.tags["zscl.ray_job"]

    def test_a_resumed_run_is_one_run(self, client: MlflowClient, runs: dict[str, Path], root: Path) -> None:
        parents = self.runs_of(client, "tags.`zscl.level` = 'sequence'")
        folders = [parent.data.tags["zscl.folder"] for parent in parents]
        assert len(folders) == len(set(folders))


def test_compare_prints_and_writes(runs: dict[str, Path], root: Path, zscl: Zscl) -> None:
    compared = zscl("compare", runs["finetune"], runs["zscl"], "--json")
    assert compared.code == 0
    content = json.loads(compared.out)
    assert [row["method"] for row in content["rows"]] == ["zero-shot", "finetune", "zscl (average.every=2)"]
    result = result_of(runs["zscl"])
    assert content["rows"][2]["transfer"] == result.metrics.transfer
    assert content["rows"][2]["third"] == result.accuracy_matrix[-1][2]
    for file in content["files"].values():
        assert Path(file).stat().st_size > 100
    shown = zscl("compare", runs["finetune"], runs["zscl"], "--out", root / "elsewhere", "--published", "II")
    assert f"{100 * result.metrics.avg:.1f}" in shown.out
    written = (root / "elsewhere/comparison.md").read_text()
    assert f"| zscl | zscl (average.every=2) | 0 | {100 * (result.metrics.transfer or 0):.1f} |" in written
    assert "| published, MTIL order II | zscl |  | 64.2 | 74.5 | 83.4 | – | – | – | – |" in written
    failed = zscl("compare", runs["finetune"], "--published", "III")
    assert (failed.code, failed.error) == (2, "error: --published: found the order 'III', expected I or II\n")


@pytest.mark.slow
def test_features_that_two_workers_embedded_are_used_by_the_run(
    tmp_path: Path, file: Path, zscl: Zscl, ray_cluster: None
) -> None:
    completed = zscl("embed", file, "--out", tmp_path / "run", "--set", "compute.workers=2", "--json")
    assert completed.code == 0, completed.error
    embedded = json.loads(completed.out)
    assert (embedded["images"], embedded["texts"]) == (14, 14)
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]
    store = Path(embedded["folder"])
    assert store.parent == tmp_path / "teacher"
    messages: list[str] = []
    experiment = recipes.load_experiment(file)
    run_sequence(
        experiment, tmp_path / "run", report=lambda event: messages.append(str(event)), device=torch.device("cpu")
    )
    assert not [message for message in messages if "embed" in message]
    failed = zscl("embed", file, "--set", "method=lwf", "--set", "reference=null")
    assert failed.code == 2
    assert "'lwf' does not distil from the initial model on a reference set" in failed.error
