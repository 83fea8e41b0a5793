"""A search whose trials, or whose own process, are killed: it finds what it would have found in peace."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from disturbing import ended, processes, starts_of, trained, until
from ruamel.yaml import YAML

from schemas.search import SearchResult

pytest_plugins = ["faulty_cluster"]
pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]
Launch = Callable[..., Any]
TIMED = {"seconds", "train_seconds", "evaluation_seconds", "images_per_second", "status", "test"}


@pytest.fixture(scope="module")
def search(long_recipe: Path) -> Path:
    """A grid of four, each of two stages of some seconds."""
    domains = {
        "method.distill.image_weight": {"choice": [0.5, 2.0]},
        "method.average.every": {"choice": [10, 40]},
    }
    content = {
        "base": long_recipe.name,
        "search": {"domains": domains, "sampler": "grid", "objectives": ["last", "avg"]},
    }
    file = long_recipe.with_name("search.yaml")
    YAML(typ="safe").dump(content, file)
    return file


def found_in(folder: Path) -> SearchResult:
    return SearchResult.model_validate_json((folder / "search.json").read_text())


def what_counts(found: SearchResult) -> dict[str, Any]:
    """What does not depend on time: nor on which trial of two trained a stage for both."""
    content = json.loads(found.model_dump_json(exclude=TIMED))
    for trial in content["trials"]:
        del trial["train_seconds"], trial["shared_stages"], trial["status"]
    del content["stage_trainings"], content["importance"]
    content["matrix"] = found.test.accuracy_matrix
    return content  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def in_peace(search: Path, tmp_path_factory: pytest.TempPathFactory, cluster: Any) -> dict[str, Any]:
    """The search that nothing happens to."""
    from disturbing import started

    folder = tmp_path_factory.mktemp("peace")
    arguments = ("search", search, "--out", folder / "look", "--set", f"compute.address={cluster.address}")
    with started(*arguments, folder=folder) as process:
        ended(process, seconds=400)
    return what_counts(found_in(folder / "look"))


def trial_processes() -> list[Any]:
    """Tune's actors."""
    return processes("SearchTrial")


def journals(look: Path) -> list[Path]:
    return sorted(file.parent for file in look.glob("trials/*/journal.jsonl"))


@pytest.mark.fault("SIGKILL of a search's trial", "Tune starts it again, it goes on; the search finds the same")
def test_a_trial_is_killed(launch: Launch, tmp_path: Path, search: Path, in_peace: dict[str, Any]) -> None:
    look = tmp_path / "look"
    with launch(verb=("search", search, "--out"), run="look") as process:
        until(lambda: journals(look) and trained(journals(look)[0], 30)(), "a trial trains")
        trial_processes()[0].kill()
        ended(process, seconds=400)
    assert sum(map(starts_of, journals(look))) == 5
    assert what_counts(found_in(look)) == in_peace


@pytest.mark.fault("SIGKILL of a search, then SIGTERM", "`zscl resume` keeps finished trials; it finds the same")
def test_a_search_is_killed_and_stopped(launch: Launch, tmp_path: Path, search: Path, in_peace: dict[str, Any]) -> None:
    look = tmp_path / "look"

    def finished() -> int:
        return len(list(look.glob("trials/*/result.json")))

    with launch(verb=("search", search, "--out"), run="look") as process:
        until(lambda: finished() >= 1, "a trial is finished", 300)
        process.kill()
    kept = {file.parent: starts_of(file.parent) for file in look.glob("trials/*/result.json")}
    with launch(verb=("search", search, "--out"), run="look") as process:
        until(lambda: sum(map(starts_of, journals(look))) > sum(kept.values()) + 1, "a trial goes on", 300)
        process.send_signal(signal.SIGTERM)
        assert "or zscl resume, goes on; finished trials are kept" in ended(process, 143)
    assert json.loads((look / "state.json").read_text())["status"] == "KILLED"
    with launch(verb=("resume",), run="look") as process:
        ended(process, seconds=400)
    assert what_counts(found_in(look)) == in_peace
    assert all(starts_of(run) == starts for run, starts in kept.items())


@pytest.mark.fault("Trials of two workers on a cluster for one trial", "They queue; one given up early leaves nothing")
def test_trials_of_more_workers_queue(launch: Launch, tmp_path: Path, long_recipe: Path) -> None:
    domains = {"optimisation.learning_rate": {"choice": [0.001, 1e-12, 0.002]}}
    search = {
        "domains": domains,
        "sampler": "grid",
        "objectives": "accuracy/first",
        "early_stopping": "asha",
    }
    YAML(typ="safe").dump({"base": str(long_recipe), "search": search}, tmp_path / "queue.yaml")
    settings = ("compute.workers=2", "optimisation.steps=40", "optimisation.warmup_steps=5")
    with launch(*settings, verb=("search", tmp_path / "queue.yaml", "--out"), run="look") as process:
        said = ended(process, seconds=600)
    assert "the cluster holds 1 at once, the others wait for their turn" in said
    found = found_in(tmp_path / "look")
    assert [trial.status for trial in found.trials][:2] == ["finished", "stopped"]
    assert found.trials[2].status in ("finished", "stopped")
    assert found.trials[2].stages >= 1
    assert found.test.workers == 2
