"""Tests that a search whose trials or main process are killed has the results of an undisturbed search."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML
from support.faults import ended, processes, starts_of, trained, until

from orchestrate.recipes import recipe as recipes
from schemas.search import SearchResult
from zscl.sequence.run import run_sequence

pytest_plugins = ["support.faulty_cluster"]
pytestmark = [pytest.mark.faults, pytest.mark.timeout(3600)]
Launch = Callable[..., Any]


@pytest.fixture(scope="module")
def search(long_recipe: Path) -> Path:
    """Write the recipe of a grid search with four trials of two stages, which take some seconds each."""
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


def journals(look: Path) -> list[Path]:
    return sorted(file.parent for file in look.glob("trials/*/journal.jsonl"))


@pytest.mark.fault(
    "SIGKILL of a search's trial, then of the search, then SIGTERM",
    "The trial resumes; `zscl resume` keeps finished trials; every trial has the numbers of an undisturbed one",
)
def test_a_trial_and_a_search_are_killed(launch: Launch, tmp_path: Path, search: Path) -> None:
    look = tmp_path / "look"
    with launch(verb=("search", search, "--out"), run="look") as process:
        until(lambda: any(trained(run, 30)() for run in journals(look)), "a trial trains")
        processes("Trainable")[0].kill()  # the name of Tune's actors
        until(lambda: sum(map(starts_of, journals(look))) > len(journals(look)), "that trial is taken up again")
        until(lambda: list(look.glob("trials/*/result.json")), "a trial is finished")
        process.kill()
    kept = {file.parent: starts_of(file.parent) for file in look.glob("trials/*/result.json")}
    starts = sum(map(starts_of, journals(look)))
    with launch(verb=("search", search, "--out"), run="look") as process:
        until(lambda: sum(map(starts_of, journals(look))) > starts, "a trial goes on")
        process.send_signal(signal.SIGTERM)
        assert "or zscl resume, resumes it; finished trials are kept" in ended(process, 143)
    assert json.loads((look / "state.json").read_text())["status"] == "KILLED"
    with launch(verb=("resume",), run="look") as process:
        ended(process)

    found = found_in(look)
    assert [trial.status for trial in found.trials].count("finished") + len(kept) >= 4
    assert all(starts_of(run) == times for run, times in kept.items())
    section, content = recipes.load_search(search)
    for trial in found.trials:
        alone = tmp_path / "alone" / str(trial.number)
        result = run_sequence(
            recipes.build_trial_experiment(section, content, trial.values, search), alone, device=torch.device("cpu")
        )
        assert trial.objectives == {"last": result.metrics.last, "avg": result.metrics.avg}


@pytest.mark.fault(
    "Trials of two workers on a cluster for one trial", "They queue; a stopped trial leaves no processes"
)
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
        said = ended(process)
    assert "the cluster holds 1 at once, the others wait for their turn" in said
    found = found_in(tmp_path / "look")
    assert [trial.status for trial in found.trials][:2] == ["finished", "stopped"]
    assert found.trials[2].status in ("finished", "stopped")
    assert found.trials[2].stages >= 1
    assert found.test.workers == 2
