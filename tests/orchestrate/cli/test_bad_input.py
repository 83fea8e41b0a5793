"""Errors in the user's input: one message, exit code 2, no traceback, no partial files."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from ruamel.yaml import YAML
from support.command import Command
from support.data import make_task

from schemas.algorithm import algorithm_version

Zscl = Callable[..., Command]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def refused(place: Path, zscl: Zscl, recipe: Callable[..., dict[str, Any]]) -> Callable[..., str]:
    """Run a recipe with changes; give the sentence it was refused with."""

    def run(*options: str, **changes: Any) -> str:
        YAML(typ="safe").dump(recipe(**changes), place / "recipe.yaml")
        found = zscl("run", "recipe.yaml", "--out", "runs/mine", *options)
        assert found.code == 2
        assert found.out == ""
        assert found.error.startswith("error: ")
        assert found.error.count("\n") == 1
        assert "Traceback" not in found.error
        assert not (place / "runs/mine").exists()
        return found.error

    return run


def test_a_misspelt_key(refused: Callable[..., str]) -> None:
    assert "recipe.yaml: the recipe: unknown field 'sed'; did you mean 'seed'?" in refused(sed=1)


def test_a_wrong_type(refused: Callable[..., str]) -> None:
    assert "--set seed=one: seed: found 'one', expected a valid integer" in refused("--set", "seed=one")
    assert "--set optimisation.step=5: optimisation: unknown field 'step'" in refused("--set", "optimisation.step=5")
    assert "recipe.yaml: seed: found 'one', expected a valid integer" in refused(seed="one")


@pytest.mark.parametrize(
    ("field", "given", "sentence"),
    [
        ("tasks", "x", "tasks: found 'x', expected a list"),
        ("optimisation", 5, "optimisation: found 5, expected a mapping of fields to values"),
        ("method", "zcsl", "did you mean 'zscl'?"),
        ("model", "embeded", "did you mean 'embedded'?"),
        ("model", {"name": "ViT-B-16", "pretrained": "opnai"}, "a file; did you mean 'openai'?"),
        ("model", "ViT-B16", "found no pretrained for 'ViT-B16', expected the tag of open_clip's weights"),
        ("model", None, "model: found nothing, expected a mapping of fields to values"),
        ("name", "a b", "name: found 'a b', expected only letters, digits and any of _.-"),
        ("tasks", [], "tasks: found none, expected at least one"),
        ("method", {"preset": "finetune", "custom_losses": [{"path": "Spread"}]}, "expected MODULE.NAME"),
    ],
)
def test_an_invalid_value(refused: Callable[..., str], field: str, given: object, sentence: str) -> None:
    assert sentence in refused(**{field: given})


def test_an_output_folder_that_is_not_a_run(place: Path, zscl: Zscl, recipe: Callable[..., dict[str, Any]]) -> None:
    YAML(typ="safe").dump(recipe(), place / "recipe.yaml")
    for name, file in (("search", "search.yaml"), ("photos", "one.png")):
        (place / name).mkdir()
        (place / name / file).write_text("")
    for out, sentence in (
        ("recipe.yaml", "found a file, expected a run's folder, an empty or a new one"),
        ("search", "found a search, expected a run's folder, an empty or a new one"),
        ("photos", "found one.png in it, expected a run's folder, an empty or a new one"),
    ):
        for dry in ((), ("--dry-run",)):
            found = zscl("run", "recipe.yaml", "--out", out, *dry)
            assert (found.code, found.out, found.error) == (2, "", f"error: {place / out}: {sentence}\n")
    assert sorted(file.name for file in (place / "photos").iterdir()) == ["one.png"]


def test_a_recipe_of_another_kind(place: Path, zscl: Zscl) -> None:
    (place / "search.yaml").write_text("base: recipe.yaml\nsearch: {}\n")
    (place / "alone.yaml").write_text("base: recipe.yaml\n")
    (place / "words.yaml").write_text("words\n")
    for file, sentence in (
        ("search.yaml", "found a search, expected a run's recipe; to search: zscl search search.yaml"),
        ("alone.yaml", "found base without variants, expected variants: a mapping of variant names to changed fields"),
        ("words.yaml", "found a text, expected fields such as 'model:' and 'tasks:'"),
    ):
        found = zscl("run", file)
        assert (found.code, found.error) == (2, f"error: {file}: {sentence}\n")


def test_a_misspelt_path(refused: Callable[..., str], place: Path) -> None:
    make_task(place / "animals", seed=0)
    assert f"{place}/animels: found no such folder, expected the folder of task 'animels'; did you mean 'animals'?" in (
        refused(tasks=["animels"])
    )
    (place / "reference").mkdir()
    assert "expected a shard; did you mean 'reference'?" in refused(reference="referense", method="zscl")


@pytest.mark.parametrize(
    ("field", "value", "shown"),
    [
        ("tasks", ["data/task"], "data/task"),
        ("reference", "data/*.tar", "data/*.tar"),
        ("model", "local-dir:data/clip", "data/clip"),
    ],
)
def test_a_path_relative_to_the_recipe(
    place: Path, zscl: Zscl, recipe: Callable[..., dict[str, Any]], field: str, value: object, shown: str
) -> None:
    beside = place / "recipes"
    make_task(beside / "data/task", seed=0)
    (beside / "data/clip").mkdir()
    shutil.copy(beside / "data/task/train/0.tar", beside / "data/0.tar")
    content = recipe(**{field: value})
    search = {"domains": {"seed": {"choice": [0, 1]}}, "sampler": "grid", "objectives": "avg"}
    YAML(typ="safe").dump(content, beside / "run.yaml")
    YAML(typ="safe").dump({**content, "search": search}, beside / "search.yaml")
    for command in ("run", "search"):
        found = zscl(command, f"recipes/{command}.yaml", "--dry-run", "--offline")
        assert found.code == 2
        assert (
            f"; '{shown}' exists in the recipe's folder, but paths in a recipe are relative to the current folder: "
            f"start the command in {beside}, or give the absolute path\n"
        ) in found.error


def test_a_missing_recipe(place: Path, zscl: Zscl) -> None:
    found = zscl("run", "missing.yaml")
    assert (found.code, found.error) == (2, "error: missing.yaml: found no such file, expected a recipe (YAML)\n")


def test_a_task_without_class_names(refused: Callable[..., str], place: Path) -> None:
    (make_task(place / "task", seed=0) / "classnames.txt").unlink()
    assert f"{place}/task/classnames.txt: found no such file" in refused(tasks=["task"])


def test_zero_shards(refused: Callable[..., str], place: Path) -> None:
    (make_task(place / "task", seed=0) / "train/nshards.txt").write_text("0")
    assert "train/nshards.txt: found '0'" in refused(tasks=["task"])


def test_a_label_outside_the_class_list(refused: Callable[..., str], place: Path) -> None:
    (make_task(place / "task", seed=0) / "classnames.txt").write_text("red\n")
    assert "0.tar: sample '0000001' has the label '1', expected 0 to 0" in refused(tasks=["task"])


def test_an_unreadable_model(refused: Callable[..., str], place: Path, tiny_model: str) -> None:
    shutil.copytree(tiny_model.removeprefix("local-dir:"), place / "clip")
    (place / "clip/open_clip_model.safetensors").write_bytes(b"broken")
    assert f"model: 'local-dir:{place}/clip' cannot be loaded" in refused(model="local-dir:clip")


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe"])
def test_an_unreadable_model_configuration(
    refused: Callable[..., str], place: Path, tiny_model: str, content: bytes
) -> None:
    shutil.copytree(tiny_model.removeprefix("local-dir:"), place / "clip")
    (place / "clip/open_clip_config.json").write_bytes(content)
    assert "expected JSON in open_clip_config.json" in refused(model="local-dir:clip")


def test_a_wrong_field_in_the_only_task_is_one_problem(refused: Callable[..., str]) -> None:
    assert "tasks.0: unknown field 'pth'; did you mean 'path'?" in refused(tasks=[{"pth": "x"}])


def test_more_warm_up_than_steps(refused: Callable[..., str]) -> None:
    assert "optimisation.warmup_steps is 2, expected at most the 1 steps of stage 'first'" in refused(
        "--set", "optimisation.steps=1"
    )


def test_two_processes_on_one_run(place: Path, zscl: Zscl, recipe: Callable[..., dict[str, Any]]) -> None:
    YAML(typ="safe").dump(recipe(), place / "recipe.yaml")
    (place / "runs").mkdir()
    with FileLock(place / "runs/.mine.lock"):
        found = zscl("run", "recipe.yaml", "--out", "runs/mine")
    assert (found.code, found.error) == (
        2,
        f"error: {place}/runs/mine: found another process at work on this run (unknown), expected none; end that "
        "process, or choose another folder\n",
    )


def test_a_demo_with_an_invalid_recipe_writes_nothing(place: Path, zscl: Zscl) -> None:
    shipped = Path(__file__).parents[3] / "experiments/embedded.yaml"
    found = zscl("demo", "--recipe", shipped, "--out", "demo", "--set", "sed=1")
    assert found.code == 2
    assert "unknown field 'sed'" in found.error
    assert not (place / "demo").exists()


def test_an_unknown_model(refused: Callable[..., str]) -> None:
    assert "model: 'ViT-Z' with pretrained 'openai': found no model of that name" in refused(
        model={"name": "ViT-Z", "pretrained": "openai"}
    )


def test_a_reference_set_without_texts(refused: Callable[..., str], tasks: list[str]) -> None:
    assert "reference: found no texts" in refused(reference=f"{tasks[0]}/train")


def test_more_workers_than_the_cluster_has(refused: Callable[..., str], ray_cluster: None) -> None:
    assert "compute.workers: 5 workers would need 5 CPUs, found 4 in the Ray cluster" in refused(
        compute={"workers": 5, "device": "cpu"}
    )


def test_a_gpu_on_a_cluster_without_gpus(refused: Callable[..., str], ray_cluster: None) -> None:
    assert "1 worker would need 1 GPU, found 0" in refused(compute={"device": "gpu"})


def test_an_unreachable_tracking_server(refused: Callable[..., str], ray_cluster: None) -> None:
    said = refused(tracking={"uri": "http://someone:secret@127.0.0.1:9"})
    assert "tracking.uri: found no reachable MLflow store at http://someone:***@127.0.0.1:9" in said
    assert "secret" not in said


def test_a_broken_image_during_a_run(
    place: Path, zscl: Zscl, recipe: Callable[..., dict[str, Any]], ray_cluster: None
) -> None:
    task = make_task(place / "task", seed=0)
    shard = task / "test/0.tar"
    shard.write_bytes(shard.read_bytes().replace(b"\x89PNG", b"\x00PNG"))
    (task / "zscl.json").unlink()
    content = recipe(tasks=["task"], compute={"device": "cpu", "max_failures": 2})
    YAML(typ="safe").dump(content, place / "recipe.yaml")
    found = zscl("run", "recipe.yaml", "--out", "runs/mine")
    assert found.code == 2
    assert found.error.splitlines()[-1].startswith(f"error: {shard}: sample '000000")
    assert "is no readable image" in found.error
    assert "Traceback" not in found.error
    assert sorted(file.name for file in (place / "runs/mine").iterdir()) == [
        "experiment.yaml", "journal.jsonl", "ray", "state.json", "zero_shot.part.json",
    ]  # fmt: skip


def test_the_folder_of_another_experiment(refused: Callable[..., str], place: Path) -> None:
    row = {"fingerprint": "0" * 16, "algorithm": algorithm_version(), "accuracy": {}, "images": {}, "seconds": 0.0}
    (place / "runs").mkdir()
    (place / "other").mkdir()
    (place / "other/zero_shot.json").write_text(json.dumps(row))
    YAML(typ="safe").dump({}, place / "empty.yaml")
    assert "found a run of another experiment (fingerprint 0000000000000000)" in refused("--out", "other")


@pytest.mark.parametrize(
    ("made", "sentence"),
    [
        ([], "found no such folder"),
        (["run"], "found 0 finished stages and no result.json, expected a run that finished a stage"),
    ],
)
def test_comparing_an_unfinished_run(place: Path, zscl: Zscl, made: list[str], sentence: str) -> None:
    for name in made:
        (place / name).mkdir()
    found = zscl("compare", "run")
    assert found.code == 2
    assert sentence in found.error
    assert not (place / "comparison").exists()


def test_unknown_data(place: Path, zscl: Zscl) -> None:
    found = zscl("data", "prepare", "mnist", "--out", "data")
    assert (found.code, found.error) == (
        2, "error: data prepare: found the unknown name 'mnist'; did you mean 'MNIST'?\n",
    )  # fmt: skip
