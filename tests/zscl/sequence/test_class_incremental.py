"""Class-incremental learning: one dataset, a group of classes a stage, one head over all classes seen."""

import importlib
import io
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from support.data import coloured_images, open_task
from support.errors import refused

from orchestrate.recipes import recipe as recipes
from schemas.data import ClassIncremental
from schemas.errors import ErrorCode
from schemas.experiment import Experiment
from schemas.results import Result
from zscl.data.indexed import IndexedSamples
from zscl.data.shard_urls import open_samples
from zscl.datasets.task_writer import write_task
from zscl.models.clip import load_clip
from zscl.sequence.resolve import class_order, resolve
from zscl.sequence.run import run_sequence

CPU = torch.device("cpu")
Make = Callable[..., Experiment]
OPTIMISATION = {"warmup_steps": 1, "batch_size": 5, "reference_batch_size": 4, "learning_rate": 0.005}


@pytest.fixture
def incremental(experiment: Make, tasks: list[str]) -> Make:
    """A dataset of four classes, 24 training and 10 test images, learnt as two, one and one; order 2 0 3 1."""

    def make(scenario: dict[str, Any] | None = None, **changes: Any) -> Experiment:
        settings = {"path": tasks[0], "first": 2, "increment": 1, "order": 3, "template": "a bad photo of {c}"}
        changes.setdefault("optimisation", OPTIMISATION)
        return experiment(tasks=[], class_incremental=settings | (scenario or {}), **changes)

    return make


def test_stages_are_split_from_the_dataset(incremental: Make) -> None:
    opened = resolve(incremental())
    assert [task.name for task in opened.tasks] == ["classes-1-2", "classes-3-3", "classes-4-4"]
    labels = [label for task in opened.tasks for label in task.classes or ()]
    assert sorted(labels) == [0, 1, 2, 3]
    assert [task.steps for task in opened.experiment.tasks] == [3, 2, 2]  # one epoch of 12, 6 and 6 images, by fives
    names = ("red", "green", "blue", "yellow")
    for task in opened.tasks:
        assert task.classes is not None
        assert task.classnames == tuple(names[label] for label in task.classes)
        assert task.templates == ("a bad photo of {c}",)
        assert isinstance(task.train, IndexedSamples)
        assert len(task.train) == 6 * len(task.classes)
        for sample in task.train.iter_shard(0, 1):  # the shards are as they were; labels are counted anew
            assert int(sample.label or b"") == task.classes[task.get_label(sample)]
    assert opened.tasks[0].digest != opened.tasks[1].digest
    again = resolve(opened.experiment)  # as the workers do
    assert (again.experiment, again.fingerprint) == (opened.experiment, opened.fingerprint)


def test_the_order_comes_from_a_seed_or_a_file(incremental: Make, tasks: list[str], tmp_path: Path) -> None:
    whole = resolve(incremental()).tasks[0].full_task
    assert whole is not None

    def order(given: int | str) -> list[int]:
        return list(class_order(ClassIncremental(path=tasks[0], order=given), whole))

    assert order(0) == order(0)
    assert len({tuple(order(seed)) for seed in range(9)}) > 3
    file = tmp_path / "order.txt"
    file.write_text("blue\nred\n3\n1\n")
    assert order(str(file)) == [2, 0, 3, 1]
    for content, code, words in (
        ("blue\nrde\n", ErrorCode.UNKNOWN_NAME, "found 'rde' on line 2"),
        ("0\n1\n2\n2\n", ErrorCode.MISMATCH, "found 3 classes"),
    ):
        file.write_text(content)
        with refused(code, "class_incremental.order") as error:
            order(str(file))
        assert words in str(error.value)


@pytest.mark.parametrize(
    ("scenario", "sentence"),
    [
        ({"first": 5}, "class_incremental.first: found 5, expected at most 4 classes"),
        ({"template": "no place"}, "found the template 'no place', expected one with {c}"),
        ({"path": "/no/such/folder"}, "/no/such/folder: found no such folder"),
    ],
)
def test_a_wrong_scenario_is_refused(incremental: Make, scenario: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match="found") as error:
        resolve(incremental(scenario))
    assert sentence in str(error.value)


def test_tasks_and_scenario_do_not_go_together(experiment: Make, tasks: list[str]) -> None:
    with pytest.raises(ValueError, match="tasks cannot be used with class_incremental"):
        experiment(tasks=[tasks[1]], class_incremental=tasks[0])
    with pytest.raises(ValueError, match="tasks: found none, expected at least one"):
        experiment(tasks=[])


def predictions(run: Path, stage: int, opened: Any) -> tuple[list[int], list[int], list[int]]:
    """What open_clip alone predicts after a stage among all classes seen: predictions, labels, and their stages."""
    name = f"local-dir:{run}/stages/{stage}-{opened.tasks[stage - 1].name}/model"
    model, _, transform = open_clip.create_model_and_transforms(name)
    model.eval()
    seen = [label for task in opened.tasks[:stage] for label in task.classes]
    names = [opened.tasks[0].full_task.classnames[label] for label in seen]
    found: tuple[list[int], list[int], list[int]] = ([], [], [])
    with torch.no_grad():
        prompts = open_clip.get_tokenizer(name)([f"a bad photo of {name}" for name in names])
        texts = model.encode_text(prompts, normalize=True)
        for sample in opened.tasks[0].full_task.test.iter_shard(0, 1):
            label = int(sample.label)
            if label in seen:
                image = transform(Image.open(io.BytesIO(sample.image)))[None]
                guess = int((model.encode_image(image, normalize=True) @ texts.T).argmax())
                found[0].append(seen[guess])
                found[1].append(label)
                found[2].append(next(k for k, task in enumerate(opened.tasks) if label in task.classes))
    return found


def test_metrics_use_one_head_and_agree_with_continuums_logger(incremental: Make, tmp_path: Path) -> None:
    # Long enough to learn the first two classes, and to take some images of theirs for later ones.
    made = incremental({"epochs": 12}, method="finetune")
    result = run_sequence(made, tmp_path / "run", device=CPU)
    assert 0.0 < result.accuracy_matrix[1][0] < result.accuracy_matrix[0][0]
    opened = resolve(made)
    logged = [predictions(tmp_path / "run", stage, opened) for stage in (1, 2, 3)]
    for row, (guesses, labels, stages) in zip(result.accuracy_matrix, logged, strict=True):
        for task in set(stages):
            own = [guess == label for guess, label, stage in zip(guesses, labels, stages, strict=True) if stage == task]
            assert row[task] == pytest.approx(sum(own) / len(own), abs=1e-12)
    assert [task.test_images for task in result.tasks] == [len(found) for found in _by_stage(logged[-1][2])]

    logger = continuum_logger()
    for stage, found in enumerate(logged):
        if stage:
            logger.end_task()
        logger.add([np.array(each) for each in found], subset="test")
    assert result.metrics.last == pytest.approx(logger.accuracy, abs=1e-12)
    assert result.metrics.avg == pytest.approx(logger.average_incremental_accuracy, abs=1e-12)
    assert result.accuracy_matrix[-1] == pytest.approx(logger.accuracy_per_task, abs=1e-12)


def _by_stage(stages: list[int]) -> list[list[int]]:
    return [[stage for stage in stages if stage == each] for each in sorted(set(stages))]


def continuum_logger() -> Any:
    """Its Logger, without its datasets, which need a dozen libraries more."""
    package = find_spec("continuum")
    if package is None or not package.submodule_search_locations:
        pytest.skip("continuum is not installed; `make install` brings it")
    bare = ModuleType("continuum")
    bare.__path__ = list(package.submodule_search_locations)
    sys.modules["continuum"] = bare
    return importlib.import_module("continuum.metrics.logger").Logger(list_subsets=["test"])


def test_the_initial_model_is_evaluated_with_the_heads_of_each_stage(
    incremental: Make, experiment: Make, tasks: list[str], tmp_path: Path
) -> None:
    # A model that knows something of the classes, and mistakes some for others.
    taught = experiment(tasks=tasks[:1], method="finetune", optimisation={**OPTIMISATION, "steps": 18})
    run_sequence(taught, tmp_path / "taught", device=CPU)
    model = f"local-dir:{tmp_path}/taught/stages/1-first/model"
    made = incremental({"order": 1}, method="zero-shot", model=model)
    result = run_sequence(made, tmp_path / "run", device=CPU)
    assert len(set(result.accuracy_matrix)) > 1  # the heads matter
    opened = resolve(made)
    clip = load_clip(opened.experiment.model)
    clip.model.eval()
    encode: Any = clip.model
    order = [label for task in opened.tasks for label in task.classes or ()]
    whole = opened.tasks[0].full_task
    assert whole is not None
    with torch.no_grad():
        texts = encode.encode_text(
            clip.tokenizer([f"a bad photo of {whole.classnames[label]}" for label in order]), normalize=True
        )
        for stage, row in enumerate(result.accuracy_matrix):
            for index, task in enumerate(opened.tasks):
                known = sum(len(each.classes or ()) for each in opened.tasks[: max(stage, index) + 1])
                right = []
                for sample in task.test.iter_shard(0, 1):
                    image = clip.evaluation_transform(Image.open(io.BytesIO(sample.image)))[None]
                    guess = int((encode.encode_image(image, normalize=True) @ texts[:known].T).argmax())
                    right.append(order[guess] == int(sample.label or b""))
                assert row[index] == pytest.approx(sum(right) / len(right), abs=1e-12), (stage, index)
    assert result.metrics == result.zero_shot_metrics
    assert result.metrics.forward_transfer == pytest.approx(0.0, abs=1e-12)


def test_earlier_names_and_negatives_join_the_softmax(incremental: Make, tmp_path: Path) -> None:
    found: dict[str, Result] = {}
    for name, loss in {"plain": {}, "names": {"earlier_names": True}, "negatives": {"negatives": 3}}.items():
        made = incremental(method={"preset": "finetune", "task_loss": loss})
        found[name] = run_sequence(made, tmp_path / name, device=CPU)
    first = {name: result.stages[0].losses["classification"] for name, result in found.items()}
    second = {name: result.stages[1].losses["classification"] for name, result in found.items()}
    assert first["names"] == pytest.approx(first["plain"])  # nothing came earlier
    assert second["plain"] == pytest.approx(0.0, abs=1e-6)  # a single class: nothing to tell apart
    assert second["names"] > 0.01
    assert first["negatives"] != pytest.approx(first["plain"])
    assert second["negatives"] > 0.01
    with pytest.raises(ValueError, match="needs reference"):
        incremental(method={"preset": "finetune", "task_loss": {"negatives": 3}}, reference=None)


def test_a_class_incremental_run_resumes_after_its_last_stage(incremental: Make, tmp_path: Path) -> None:
    whole = run_sequence(incremental(), tmp_path / "a/run", device=CPU)
    run_sequence(incremental(), tmp_path / "b/run", device=CPU)
    for file in ("3-classes-4-4/accuracy.json", "3-classes-4-4/training.json"):
        (tmp_path / "b/run/stages" / file).unlink()
    again = run_sequence(incremental(), tmp_path / "b/run", device=CPU)
    assert again.accuracy_matrix == whole.accuracy_matrix
    other = incremental({"order": 4})
    with refused(ErrorCode.OTHER_RUN):
        run_sequence(other, tmp_path / "b/run", device=CPU)


def test_a_task_may_have_some_classes_of_a_folder(experiment: Make, tasks: list[str]) -> None:
    made = experiment(tasks=[{"path": tasks[0], "classes": [3, 0], "name": "two"}, tasks[1]])
    two, other = resolve(made).tasks
    assert two.classnames == ("yellow", "red")
    assert [two.get_label(sample) for sample in two.test.iter_shard(0, 1)] == [1, 0, 1, 0, 1]
    assert len(other.classnames) == 4
    for classes, words in (
        ([4], "found the label 4"),
        ([1, 1], "found the label 1"),
    ):
        wrong = experiment(tasks=[{"path": tasks[0], "classes": classes}])
        with refused(ErrorCode.INVALID_VALUE, "tasks.classes") as error:
            resolve(wrong)
        assert words in str(error.value)


@pytest.mark.parametrize(
    "method",
    [
        {"preset": "icarl", "memory": {"budget": 8}},
        {"preset": "zscl", "distill": {"images": "task"}, "average": {"every": 1}},
    ],
)
def test_a_group_of_classes_is_a_separate_dataset(incremental: Make, tmp_path: Path, method: dict[str, Any]) -> None:
    made = incremental(method=method)
    run_sequence(made, tmp_path / "run", device=CPU)
    opened = resolve(made)
    whole = opened.tasks[0].full_task
    assert whole is not None
    images = {sample.image: int(sample.label or b"") for sample in whole.train.iter_shard(0, 1)}
    kept = 0
    for stage, task in enumerate(opened.tasks[:-1], start=1):
        exemplars = tmp_path / "run/stages" / f"{stage}-{task.name}" / "exemplars"
        for sample in open_samples([str(exemplars)]).iter_shard(0, 1) if exemplars.is_dir() else ():
            assert task.classes is not None
            assert images[sample.image] == task.classes[int(sample.label or b"")]  # the image of its label
            kept += 1
    assert (kept > 0) == (method["preset"] == "icarl")


def test_a_written_recipe_keeps_its_class_incremental_scenario(incremental: Make, tmp_path: Path) -> None:
    written = tmp_path / "experiment.yaml"
    recipes.write_experiment(resolve(incremental()).experiment, written)
    again = resolve(recipes.load_experiment(written))
    assert again.fingerprint == resolve(incremental()).fingerprint
    changed = resolve(recipes.load_experiment(written, ["class_incremental.first=1"]))
    assert [len(task.classes or ()) for task in changed.tasks] == [1, 1, 1, 1]
    other = resolve(incremental({"first": 1})).experiment
    mixed = other.model_copy(update={"class_incremental": incremental().class_incremental})
    with refused(ErrorCode.CONFLICT, "tasks"):
        resolve(mixed)


def test_steps_are_not_in_the_fingerprint_without_training(incremental: Make) -> None:
    few, many = (incremental(method="zero-shot", optimisation={"batch_size": size}) for size in (4, 8))
    assert resolve(few).fingerprint == resolve(many).fingerprint


def test_class_names_that_are_numbers_are_names_in_an_order(tmp_path: Path) -> None:
    names = sorted(map(str, range(12)))  # as of folders: 0, 1, 10, 11, 2, ...
    images = [(image, number % 12) for number, (image, _) in enumerate(coloured_images(24, 0))]
    splits = dict.fromkeys(("train", "test"), images)
    write_task(tmp_path / "numbers", names, ["a {c}"], splits, suffix="png", source="")
    whole, file = open_task(tmp_path / "numbers"), tmp_path / "order.txt"

    def order(lines: list[str]) -> list[int]:
        file.write_text("\n".join(lines))
        return list(class_order(ClassIncremental(path=whole.path, order=str(file)), whole))

    assert [names[label] for label in order([str(label) for label in range(12)])] == [str(label) for label in range(12)]
    crane = replace(whole, classnames=("crane", "heron", "crane"))

    def of_crane(lines: list[str]) -> list[int]:
        file.write_text("\n".join(lines))
        return list(class_order(ClassIncremental(path=whole.path, order=str(file)), crane))

    assert of_crane(["2", "0", "1"]) == [2, 0, 1]
    with refused(ErrorCode.DUPLICATE, "class_incremental.order") as error:
        of_crane(["crane", "heron"])
    assert "line 1: 'crane' is the name of several classes" in str(error.value)
    with refused(ErrorCode.UNKNOWN_NAME, "class_incremental.order") as error:
        of_crane(["2", "hern"])
    assert "did you mean 'heron'" in str(error.value)
