"""The demo, as a toy: two tasks, two steps."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from support.command import Command

ROOT = Path(__file__).parents[3]


def test_the_demo_prints_the_comparison_and_the_store(
    tmp_path: Path,
    zscl: Callable[..., Command],
    ray_cluster: None,
    without_ray: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    without_ray()  # runs on Ray are tested in test_run.py
    toy = ("--set", "tasks=[flags, shapes]", "--set", "optimisation.steps=2", "--set", "optimisation.warmup_steps=1")
    demo = zscl("demo", "--out", tmp_path / "demo", *toy)
    assert demo.code == 0, demo.error
    for method in ("finetune", "zscl"):
        result = json.loads((tmp_path / "demo" / method / "result.json").read_text())
        assert result["method"] == method
        assert [task["name"] for task in result["tasks"]] == ["flags", "shapes"]
        assert (tmp_path / "demo" / method / "stages/2-shapes/model/open_clip_config.json").is_file()
    assert "finetune" in demo.out
    assert f"mlflow ui --backend-store-uri sqlite:///{tmp_path}/demo/mlflow.db" in demo.out
    client = MlflowClient(f"sqlite:///{tmp_path}/demo/mlflow.db")
    for run in client.search_runs(["1"], "tags.`zscl.level` = 'sequence'"):
        [page] = client.list_artifacts(run.info.run_id, "comparison")
        assert page.path == "comparison/comparison.html"
    again = zscl("demo", "--out", tmp_path / "demo", *toy, "--json")
    assert again.error.count("finished before, nothing to do") == 2
    assert [row["method"] for row in json.loads(again.out)["rows"]][:2] == ["zero-shot", "finetune"]
