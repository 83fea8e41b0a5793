"""Searches on Ray Tune: trials, shared stages, early stopping, the chosen recipe, MLflow, and error messages."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from ruamel.yaml import YAML
from support.command import Command
from support.errors import refused

from orchestrate.lifecycle import paths as places
from orchestrate.recipes import recipe as recipes
from orchestrate.search import preflight as search_preflight
from orchestrate.search.run import run_search
from schemas.algorithm import algorithm_version
from schemas.errors import ErrorCode
from schemas.search import Search, SearchResult, Trial

Zscl = Callable[..., Command]
DOMAINS = {
    "method.distill.image_weight": {"choice": [0.5, 2.0]},
    "method.average.every": {"choice": [1, 3]},
}


@pytest.fixture
def write(tmp_path: Path, recipe: Callable[..., dict[str, Any]]) -> Callable[..., Path]:
    """Write a search; `changes` are of the experiment."""

    def make(search: dict[str, Any], **changes: Any) -> Path:
        content = recipe(**changes)
        del content["name"]
        YAML(typ="safe").dump({**content, "search": {"validation_share": 0.25} | search}, tmp_path / "look.yaml")
        return tmp_path / "look.yaml"

    return make


def found_in(command: Command) -> SearchResult:
    assert command.code == 0, command.error
    return SearchResult.model_validate(json.loads(command.out)["search"])


def test_grid_search_end_to_end(
    write: Callable[..., Path], zscl: Zscl, tmp_path: Path, ray_cluster: None, empty_store: Path
) -> None:
    from mlflow.tracking import MlflowClient

    folder = tmp_path / "runs/look"
    folder.parent.mkdir()
    (folder.parent / "mlflow.db").write_bytes(empty_store.read_bytes())
    recipe = write({"domains": DOMAINS, "sampler": "grid", "objectives": ["transfer", "last"]})
    recipe = recipe.rename(tmp_path / f"a löok (2){'x' * 100}.yaml")
    command = zscl("search", recipe, "--out", folder, "--json")
    found = found_in(command)

    assert [trial.status for trial in found.trials] == ["finished"] * 4
    values = [tuple(trial.values[path] for path in DOMAINS) for trial in found.trials]
    assert values == [(0.5, 1), (2.0, 1), (0.5, 3), (2.0, 3)]
    # The two averages of a weight share their first stage.
    counted = found.stage_trainings.model_dump()
    assert counted == {"asked": 12, "run": 10, "shared": 2, "read": 0, "stopped_early": 0, "failed": 0}
    assert len(list((tmp_path / "runs/teacher").glob("images-*"))) == 1
    assert found.chosen in found.front
    assert set(found.importance) == set(DOMAINS)
    for name in ("parallel-transfer.png", "parallel-last.png", "pareto.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert "4 trials of 3 stages; the cluster holds 4 at once" in command.error
    assert "trial 4: finished, transfer" in command.error

    # Test images: looked at once, with the chosen trial's models.
    chosen = found.trials[found.chosen - 1]
    assert found.test.held_out is not None
    assert found.test.held_out.judged_on == "test"
    assert [task.test_images for task in found.test.tasks] == [10, 10, 10]
    trial = json.loads((folder / chosen.folder / "result.json").read_text())
    assert [task["test_images"] for task in trial["tasks"]] == [8, 8, 8]
    assert trial["metrics"]["last"] == chosen.objectives["last"]
    assert trial["accuracy_matrix"] != found.test.model_dump(mode="json")["accuracy_matrix"]

    # The chosen recipe trains on everything.
    experiment = recipes.load_experiment(folder / "chosen.yaml")
    assert (found.name[:10], experiment.name[:10], experiment.name[-7:]) == ("a-look-2-x", "a-look-2-x", "-chosen")
    assert experiment.evaluation.held_out is None
    assert experiment.method.average is not None
    assert experiment.method.average.every == chosen.values["method.average.every"]

    # MLflow: search, trials, stages.
    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    [own] = [client.get_experiment_by_name("zscl")]
    runs = client.search_runs([own.experiment_id])  # type: ignore[union-attr]
    of_level: dict[str, list[Any]] = {}
    for run in runs:
        of_level.setdefault(run.data.tags["zscl.level"], []).append(run)
    assert {level: len(each) for level, each in of_level.items()} == {"search": 1, "trial": 4, "stage": 12}, (
        command.error
    )
    assert {run.info.status for run in runs} == {"FINISHED"}
    [search] = of_level["search"]
    assert {run.data.tags["mlflow.parentRunId"] for run in of_level["trial"]} == {search.info.run_id}
    assert search.data.metrics["test/last"] == pytest.approx(found.test.metrics.last)
    assert search.data.metrics["chosen/last"] == pytest.approx(chosen.objectives["last"])
    logged = {artifact.path for artifact in client.list_artifacts(search.info.run_id)}
    assert {"trials.json", "chosen.yaml", "search.yaml", "search.json", "figures"} <= logged

    again = zscl("search", recipe, "--out", folder, "--json")
    assert found_in(again) == found
    assert "finished before, nothing to do" in again.error
    assert zscl("sync", folder).out == f"{folder}: 0 entries sent to sqlite:///{tmp_path}/runs/mlflow.db, FINISHED\n"

    # Another search that meets the same trials reads them.
    wider = write({"domains": DOMAINS, "sampler": "random", "trials": 2, "objectives": "transfer"})
    other = zscl("search", wider, "--out", tmp_path / "runs/other", "--offline")
    assert "finished before" in other.error
    assert other.code == 0, other.error
    assert "stage trainings: 6 asked, 0 run, 0 shared, 6 read" in other.out
    assert "run the chosen recipe on all training images: zscl run" in other.out


def test_failed_and_stopped_trials_do_not_end_the_search(
    write: Callable[..., Path], zscl: Zscl, tmp_path: Path, ray_cluster: None
) -> None:
    """One at a time, so that it is known which trial does worse than those before it."""
    domains = {"optimisation.learning_rate": {"choice": [0.002, 1e30, 1e-12]}}
    search = {
        "domains": domains,
        "sampler": "grid",
        "objectives": "accuracy/first",
        "early_stopping": "asha",
        "keep_models": "chosen",
    }
    enough = {"steps": 60, "warmup_steps": 5, "batch_size": 6, "reference_batch_size": 5}
    recipe = write(search, compute={"device": "cpu", "cpus_per_worker": 4}, optimisation=enough)
    command = zscl("search", recipe, "--out", tmp_path / "runs/look", "--offline", "--json")
    found = found_in(command)
    good, failed, bad = found.trials
    assert (good.status, good.stages) == ("finished", 3)
    assert failed.status == "failed"
    assert "found the loss classification nan at step 1" in failed.reason
    assert (bad.status, bad.stages) == ("stopped", 1)
    assert bad.objectives["accuracy/first"] < good.objectives["accuracy/first"]
    assert found.chosen == 1
    assert found.stage_trainings.model_dump(exclude={"shared", "read"}) == {
        "asked": 9,
        "run": 4,
        "stopped_early": 2,
        "failed": 3,
    }
    assert "the cluster holds 1 at once, the others wait for their turn" in command.error
    assert "stopped early after stage 1" in command.error
    state = json.loads((tmp_path / "runs/look" / bad.folder / "state.json").read_text())
    assert (state["status"], state["reason"]) == ("KILLED", "stopped early after stage 1")
    models = {model.parents[2].name for model in (tmp_path / "runs/look").glob("trials/*/stages/*/model")}
    assert models == {good.fingerprint}


@pytest.mark.parametrize(
    ("search", "sentence"),
    [
        (
            {"domains": {"method.distill.imag_weight": {"choice": [1]}}},
            "method.distill: unknown field 'imag_weight'; did you mean 'image_weight'? "
            "(search.domains.method.distill.imag_weight at 1)",
        ),
        (
            {"domains": {"optimisation.learning_rate": {"uniform": [0, 1]}}},
            "optimisation.learning_rate: found 0.0, expected a value greater than 0 "
            "(search.domains.optimisation.learning_rate at 0.0)",
        ),
        (
            {"objectives": "accuracy/tenth"},
            "found accuracy/tenth, expected accuracy/ followed by one of first, second, third",
        ),
        ({"trials": 0}, "search.trials: found 0, expected a value greater than 0"),
        ({"validation_share": 0.99}, "evaluation.held_out.share is 0.99, which leaves the class 'red' without"),
        ({"domains": {"tasks.0.path": {"choice": ["nowhere"]}}}, "nowhere: found no such folder, expected the folder"),
    ],
)
def test_errors_are_reported_before_anything_starts(
    write: Callable[..., Path], zscl: Zscl, tmp_path: Path, search: dict[str, Any], sentence: str
) -> None:
    command = zscl("search", write({"domains": DOMAINS, "trials": 2} | search), "--out", tmp_path / "runs/look")
    assert command.code == 2
    assert sentence in command.error
    assert command.error.startswith("error: ")
    assert "Traceback" not in command.error
    assert not (tmp_path / "runs").exists()


def test_dry_run_prints_the_plan(write: Callable[..., Path], zscl: Zscl) -> None:
    command = zscl("search", write({"domains": DOMAINS, "sampler": "grid"}), "--dry-run", "--json")
    plan = json.loads(command.out)["plan"]
    assert (plan["trials"], plan["stage_trainings"], plan["first_stage_shared_by_averages"]) == (4, 12, 2)
    assert plan["held_out_images"] == {"first": 8, "second": 8, "third": 8}


def test_transfer_is_undefined_for_a_single_task(write: Callable[..., Path], tasks: list[str]) -> None:
    from orchestrate.search.preflight import prepare_search

    with refused(ErrorCode.CONFLICT, "search.objectives") as error:
        prepare_search(write({"domains": DOMAINS, "trials": 1}, tasks=tasks[:1]))
    assert "found transfer" in str(error.value)


def test_pareto_front() -> None:
    from orchestrate.search.results import select_pareto_front

    def trial(number: int, transfer: float, forgetting: float, status: Any = "finished") -> Trial:
        objectives = {"transfer": transfer, "forgetting": forgetting}
        return Trial(number=number, values={}, status=status, objectives=objectives)

    trials = [
        trial(1, 0.5, 0.1),
        trial(2, 0.6, 0.2),
        trial(3, 0.5, 0.2),
        trial(4, 0.9, 0.0, "stopped"),
        trial(5, 0.5, 0.1),
    ]
    assert [each.number for each in select_pareto_front(trials, ["transfer", "forgetting"])] == [1, 2, 5]
    assert [each.number for each in select_pareto_front(trials, ["forgetting"])] == [1, 5]


def test_a_recorded_search_is_identified_by_its_start_time(tmp_path: Path, empty_store: Path) -> None:
    from orchestrate.search.tracking import SearchRecorder

    searched = Search.model_validate({"domains": DOMAINS, "sampler": "grid"})
    uri = places.sqlite_uri(tmp_path / "mlflow.db")
    (tmp_path / "mlflow.db").write_bytes(empty_store.read_bytes())

    def recorded(name: str, begun: int) -> str:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        identity = places.SearchIdentity("abc", algorithm_version(), begun)
        (folder / places.FINGERPRINT).write_text(f"{identity}\n")
        assert places.read_search_identity(folder) == identity
        return SearchRecorder(searched, "zscl", identity, folder, uri).run_id

    first = recorded("search", 1)
    assert recorded("search", 1) == first
    (tmp_path / "search").rename(tmp_path / "moved")
    assert recorded("moved", 1) == first
    assert recorded("copy", 1) != first
    assert recorded("moved", 2) != first  # deleted, and begun anew


def test_a_search_of_another_version_of_the_algorithm_is_refused(write: Callable[..., Path], tmp_path: Path) -> None:
    prepared = search_preflight.prepare_search(write({"domains": DOMAINS, "sampler": "grid"}), [])
    (tmp_path / "look").mkdir()
    (tmp_path / "look" / places.FINGERPRINT).write_text(f"{prepared.fingerprint}\n")
    with refused(ErrorCode.OTHER_ALGORITHM) as error:
        run_search(prepared, tmp_path / "look", Console())
    assert "older than version 1.1" in str(error.value)
