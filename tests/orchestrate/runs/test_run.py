"""Runs through the real Ray and the real MLflow, as a user makes them."""

import errno
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow.tracking import MlflowClient
from pydantic import BaseModel
from ruamel.yaml import YAML
from support.command import Command

from orchestrate.recipes import recipe as recipes
from schemas.results import Result, RunState
from zscl.runtime.retry import retry_io
from zscl.sequence.run import run_sequence

Zscl = Callable[..., Command]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs of this module lie."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def file(place: Path, recipe: Callable[..., dict[str, Any]]) -> Path:
    file = place / "recipe.yaml"
    YAML(typ="safe").dump(recipe(), file)
    return file


@pytest.fixture
def runs(place: Path, file: Path, zscl: Zscl, ray_cluster: None, without_ray: Callable[[], None]) -> dict[str, Path]:
    """A ZSCL run on two workers, its rows measured beside them, and a fine-tuning run without Ray.

    Made by the first test that asks.
    """
    folders = {"zscl": place / "zscl", "finetune": place / "finetune"}
    if not folders["zscl"].exists():
        two = ("--set", "compute.workers=2", "--set", "compute.evaluation=overlapped")
        made = zscl("run", file, "--out", folders["zscl"], *two, "--json")
        assert made.code == 0, made.error
        assert json.loads(made.out)["folder"] == str(folders["zscl"])
        without_ray()
        made = zscl("run", file, "--out", folders["finetune"], "--set", "method=finetune")
        assert made.code == 0, made.error
        assert str(folders["finetune"]) in made.out
        assert f"mlflow ui --backend-store-uri sqlite:///{place}/mlflow.db" in made.out
    return folders


def result_of(folder: Path) -> Result:
    return Result.model_validate_json((folder / "result.json").read_text())


def test_two_ray_workers_give_the_numbers_of_one_plain_process(runs: dict[str, Path], tmp_path: Path) -> None:
    experiment = recipes.load_experiment(runs["zscl"] / "experiment.yaml")
    alone = run_sequence(experiment, tmp_path / "alone", device=torch.device("cpu"))
    together = result_of(runs["zscl"])
    assert together.workers == 2
    assert (together.fingerprint, together.accuracy_matrix) == (alone.fingerprint, alone.accuracy_matrix)
    for ours, theirs in zip(together.stages, alone.stages, strict=True):
        assert ours.losses == pytest.approx(theirs.losses, rel=2e-3)


def test_a_finished_run_is_not_run_again(runs: dict[str, Path], file: Path, zscl: Zscl) -> None:
    written = (runs["zscl"] / "result.json").stat().st_mtime_ns
    again = zscl("run", file, "--out", runs["zscl"])
    assert again.code == 0
    assert "finished before, nothing to do" in again.error
    assert (runs["zscl"] / "result.json").stat().st_mtime_ns == written


def test_goes_on_behind_the_last_finished_stage_without_mlflow(
    runs: dict[str, Path], file: Path, place: Path, zscl: Zscl, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = Path(shutil.copytree(runs["finetune"], place / "cut"))
    (cut / "result.json").unlink()
    shutil.rmtree(cut / "stages/3-third")
    (cut / "stages/2-second/accuracy.json").unlink()
    before_third, event, _ = (cut / "journal.jsonl").read_text().partition('{"event":"stage_started","stage":3')
    assert event
    (cut / "journal.jsonl").write_text(before_third)  # with the beginning of a line, as a killed process leaves it
    first, second = (cut / f"stages/{name}/training.json" for name in ("1-first", "2-second"))
    before = first.stat().st_mtime_ns, second.stat().st_mtime_ns
    with monkeypatch.context() as without:
        for module in (
            "mlflow",
            "orchestrate.tracking.mlflow_client",
            "orchestrate.tracking.run_recorder",
            "orchestrate.tracking.uploader",
        ):
            without.setitem(sys.modules, module, None)  # nobody may import it
        made = zscl("run", file, "--out", cut, "--set", "method=finetune", "--offline")
    assert made.code == 0, made.error
    assert made.out.endswith(f"zscl sync {cut}\n")
    assert (first.stat().st_mtime_ns, second.stat().st_mtime_ns) == before
    whole, resumed = result_of(runs["finetune"]), result_of(cut)
    assert resumed.accuracy_matrix == whole.accuracy_matrix
    assert resumed.stages[2].losses == whole.stages[2].losses
    assert RunState.model_validate_json((cut / "state.json").read_text()).status == "FINISHED"
    # Afterwards, it has the same figures and curves in MLflow as the run that was recorded at once.
    assert zscl("sync", cut).code == 0
    client = MlflowClient(f"sqlite:///{place}/mlflow.db")
    assert recorded(client, cut) == recorded(client, runs["finetune"])


def recorded(client: MlflowClient, folder: Path) -> list[Any]:
    """What MLflow has of a run: that which does not differ between two runs of an experiment."""
    at = [client.get_experiment_by_name("zscl").experiment_id]
    [parent] = client.search_runs(at, f"tags.`zscl.folder` = '{folder}'")
    query = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    found = []
    for run in (parent, *client.search_runs(at, query, order_by=["attributes.start_time"])):
        histories = {
            name: [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)]
            for name in run.data.metrics
            if name not in ("train_seconds", "images_per_second")
        }
        artefacts = [item.path for item in client.list_artifacts(run.info.run_id)]
        found.append((run.info.status, run.data.params, run.data.tags.keys(), histories, artefacts))
    return found


class TestMlflow:
    """What a user browses."""

    @pytest.fixture
    def client(self, runs: dict[str, Path], place: Path) -> MlflowClient:
        return MlflowClient(f"sqlite:///{place}/mlflow.db")

    def runs_of(self, client: MlflowClient, query: str) -> list[Any]:
        experiment = client.get_experiment_by_name("zscl")
        return list(client.search_runs([experiment.experiment_id], query, order_by=["attributes.start_time"]))

    def parent(self, client: MlflowClient, folder: Path) -> Any:
        [found] = self.runs_of(client, f"tags.`zscl.folder` = '{folder}'")
        return found

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

    def test_the_parent_says_what_it_is(self, client: MlflowClient, runs: dict[str, Path]) -> None:
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

    def test_the_artefacts_are_there(self, client: MlflowClient, runs: dict[str, Path], tmp_path: Path) -> None:
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
        digests = {each.dataset.name: each.dataset.digest for each in inputs}
        expected = {task.name: task.digest[:36] for task in result.tasks} | {"reference": result.reference[:36]}
        assert digests == expected
        assert {json.loads(each.dataset.profile).get("split_family") for each in inputs} == {"own", None}
        assert run.data.tags["mlflow.source.name"].startswith("zscl ")
        assert run.data.tags["zscl.ray_job"]

    def test_a_resumed_run_is_one_run(self, client: MlflowClient, runs: dict[str, Path], place: Path) -> None:
        parents = self.runs_of(client, "tags.`zscl.level` = 'sequence'")
        folders = [parent.data.tags["zscl.folder"] for parent in parents]
        assert len(folders) == len(set(folders))


def test_compare_prints_and_writes(runs: dict[str, Path], place: Path, zscl: Zscl) -> None:
    found = zscl("compare", runs["finetune"], runs["zscl"], "--json")
    assert found.code == 0
    content = json.loads(found.out)
    assert [row["method"] for row in content["rows"]] == ["zero-shot", "finetune", "zscl (average.every=2)"]
    result = result_of(runs["zscl"])
    assert content["rows"][2]["transfer"] == result.metrics.transfer
    assert content["rows"][2]["third"] == result.accuracy_matrix[-1][2]
    for file in content["files"].values():
        assert Path(file).stat().st_size > 100
    shown = zscl("compare", runs["finetune"], runs["zscl"], "--out", place / "elsewhere", "--published", "II")
    assert f"{100 * result.metrics.avg:.1f}" in shown.out
    written = (place / "elsewhere/comparison.md").read_text()
    assert f"| zscl | zscl (average.every=2) | 0 | {100 * (result.metrics.transfer or 0):.1f} |" in written
    assert "| published, MTIL order II | zscl |  | 64.2 | 74.5 | 83.4 | – | – | – | – |" in written
    refused = zscl("compare", runs["finetune"], "--published", "III")
    assert (refused.code, refused.error) == (2, "error: --published: found the order 'III', expected I or II\n")


def test_the_teacher_embeds_ahead_on_two_workers_for_the_run_to_come(
    tmp_path: Path, file: Path, zscl: Zscl, ray_cluster: None
) -> None:
    made = zscl("embed", file, "--out", tmp_path / "run", "--set", "compute.workers=2", "--json")
    assert made.code == 0, made.error
    embedded = json.loads(made.out)
    assert (embedded["images"], embedded["texts"]) == (14, 14)
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]
    store = Path(embedded["folder"])
    assert store.parent == tmp_path / "teacher"
    said: list[str] = []
    experiment = recipes.load_experiment(file)
    run_sequence(experiment, tmp_path / "run", report=lambda each: said.append(str(each)), device=torch.device("cpu"))
    assert not [each for each in said if "embed" in each]  # neither images nor texts again
    refused = zscl("embed", file, "--set", "method=lwf", "--set", "reference=null")
    assert refused.code == 2
    assert "'lwf' does not distil from the initial model on a reference set" in refused.error


@pytest.mark.parametrize(
    ("number", "file", "sentence"),
    [
        (errno.ENOSPC, None, "runs/own: No space left on device; make room on its disk, and the same command resumes"),
        (errno.EACCES, "runs/own/stages", "runs/own/stages: Permission denied; have the folder writable"),
        (errno.EROFS, "runs/own/stages", "runs/own/stages: Read-only file system; have its disk writable"),
        (errno.EIO, "runs/own/stages", ""),
        (errno.EACCES, None, "runs/own: Permission denied; have the folder writable"),
        (errno.ENOSPC, "/cache/0.tar", "/cache/0.tar: No space left on device; make room on its disk"),
        # Of one machine: another can do the work.
        *((number, name, "") for number in (errno.EACCES, errno.EPERM, errno.EROFS) for name in (
            "/cache/0.tar", b"/cache/0.tar", "runs/other/stages", "runs/own-2/stages", "runs/own/../other",
        )),
    ],
)  # fmt: skip
def test_an_error_of_storage_that_lasts_comes_with_what_to_do(
    number: int, file: str | bytes | None, sentence: str
) -> None:
    from orchestrate.cluster.train_workers import storage_error_advice

    found = storage_error_advice(OSError(number, os.strerror(number), file), Path("runs/own"))
    assert found.startswith(sentence)
    assert bool(found) == bool(sentence)


def test_a_file_of_the_run_folder_is_known_by_its_absolute_path_and_as_the_target_of_a_renaming() -> None:
    from orchestrate.cluster.train_workers import storage_error_advice

    for names in ((str(Path("runs/own/stages").absolute()), None, None), ("/cache/0.tar", None, "runs/own/stages")):
        assert storage_error_advice(OSError(errno.EACCES, "Permission denied", *names), Path("runs/own"))


def test_what_a_forked_loader_process_logs_goes_to_its_standard_error(capfd: pytest.CaptureFixture[str]) -> None:
    """Ray's client never returns there."""
    from orchestrate.cluster.train_workers import EventLogHandler

    own, said = os.getpid(), list[str]()

    def report(progress: BaseModel) -> None:
        if os.getpid() != own:
            os._exit(3)
        said.append(str(progress))

    def read(name: str) -> str:
        failures = iter([OSError(errno.ESTALE, os.strerror(errno.ESTALE), name)])

        def access() -> str:
            for failure in failures:
                raise failure
            return name

        return retry_io(access)

    logger, handler = logging.getLogger("zscl"), EventLogHandler(report)
    logger.addHandler(handler)
    try:
        loader = torch.utils.data.DataLoader(
            ["in the loader"], num_workers=1, collate_fn=lambda names: read(names[0]), multiprocessing_context="fork"
        )
        assert list(loader) == ["in the loader"]
        assert read("in the worker") == "in the worker"
    finally:
        logger.removeHandler(handler)
    [note] = said
    assert "Stale file handle: 'in the worker'; trying again" in note
    assert "Stale file handle: 'in the loader'; trying again" in capfd.readouterr().err
