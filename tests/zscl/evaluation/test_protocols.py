"""Evaluation under each protocol, against the metrics of scikit-learn and values calculated by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, top_k_accuracy_score
from support.data import coloured_images, make_task, open_task
from support.errors import refused

from schemas.errors import ErrorCode
from schemas.evaluation import PROTOCOLS, TaskEvaluation
from schemas.experiment import Model
from zscl.data.loader import Loader
from zscl.data.task import TaskFolder
from zscl.datasets.task_writer import write_task
from zscl.evaluation.protocols import EvaluationAccumulator, LabelSpace, build_shared_space, evaluate_tasks
from zscl.evaluation.zero_shot import compute_accuracies, embed_classes
from zscl.models.clip import Clip, load_clip

LOADER = Loader(torch.device("cpu"))


@pytest.fixture
def clip(tiny_model: str) -> Clip:
    return load_clip(Model(name=tiny_model))


def table(evaluation: TaskEvaluation, names: list[str]) -> list[list[int]]:
    cells = {(pair.true, pair.predicted): pair.images for pair in evaluation.confused}
    return [[cells.get((true, predicted), 0) for predicted in names] for true in names]


def test_metrics_equal_those_of_scikit_learn() -> None:
    torch.manual_seed(0)
    classes, images, names = 8, 500, [f"class {index}" for index in range(8)]
    embeddings = torch.nn.functional.normalize(torch.randn(classes, 6), dim=1)
    labels = torch.randint(classes - 1, (images,))  # one class has no image
    features = torch.nn.functional.normalize(embeddings[labels] + 0.9 * torch.randn(images, 6), dim=1)
    accumulator = EvaluationAccumulator(LabelSpace(embeddings, torch.arange(classes), tuple(names)), torch.tensor(5.0))
    for batch, batch_labels in zip(features.split(64), labels.split(64), strict=True):
        accumulator.update(batch, batch_labels)
    folder = TaskFolder("made", "made", tuple(names), ("{c}",))
    evaluation = accumulator.compute(folder, "task-aware")

    scores = features @ embeddings.T
    predicted = scores.argmax(dim=1)
    assert table(evaluation, names) == confusion_matrix(labels, predicted, labels=range(classes)).tolist()
    assert evaluation.top1 == pytest.approx(float((predicted == labels).float().mean()))
    assert evaluation.top5 == pytest.approx(top_k_accuracy_score(labels, scores, k=5, labels=range(classes)))
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        balanced = balanced_accuracy_score(labels, predicted)
    assert evaluation.mean_per_class == pytest.approx(balanced)
    assert "class 7" not in evaluation.per_class

    confidence, right = (5 * scores).softmax(dim=1).max(dim=1).values, predicted == labels
    expected = 0.0
    for low in range(15):
        inside = (confidence >= low / 15) & (confidence < (low + 1) / 15)
        if inside.any():
            gap = float(confidence[inside].mean() - right[inside].float().mean())
            expected += abs(gap) * int(inside.sum()) / images
    assert evaluation.calibration_error == pytest.approx(expected, abs=1e-6)
    assert sum(interval.images for interval in evaluation.bins) == images


def test_task_aware_evaluation_equals_the_accuracy_matrix(clip: Clip, tasks: list[str]) -> None:
    folders = [open_task(path) for path in tasks]
    evaluations = list(evaluate_tasks(clip, folders[:2], folders[2:], PROTOCOLS, LOADER, batch_size=4))
    assert [(evaluation.task, evaluation.protocol) for evaluation in evaluations] == [
        ("first", "task-aware"), ("first", "task-agnostic"), ("second", "task-aware"), ("second", "task-agnostic"),
        ("third", "task-aware"),
    ]  # fmt: skip
    heads = embed_classes(clip, folders, "all", "fp32", torch.device("cpu"))
    for folder, head in zip(folders, heads, strict=True):
        [evaluation] = [
            evaluation
            for evaluation in evaluations
            if (evaluation.task, evaluation.protocol) == (folder.name, "task-aware")
        ]
        assert ([evaluation.top1], evaluation.images) == compute_accuracies(clip, folder, [head], LOADER)


def test_a_class_name_of_two_tasks_is_one_class(clip: Clip, tmp_path: Path) -> None:
    def write(name: str, classes: list[str]) -> TaskFolder:
        splits: dict[str, Any] = {split: list(coloured_images(8, 0)) for split in ("train", "test")}
        write_task(tmp_path / name, classes, ["a {c}"], splits, suffix="png", source="made by a test")
        return open_task(tmp_path / name)

    one, two = write("one", ["red", "green", "blue", "crane"]), write("two", ["Red", "crane", "tin", "crane"])
    embedded = embed_classes(clip, [one, two], "all", "fp32", torch.device("cpu"))
    space, classes_of_tasks = build_shared_space([one, two], embedded)
    assert space.names == ("red", "green", "blue", "crane", "tin", "crane")
    assert [classes.tolist() for classes in classes_of_tasks] == [[0, 1, 2, 3], [0, 3, 4, 5]]
    features = torch.nn.functional.normalize(torch.randn(5, 16), dim=1)
    plain = features @ torch.cat(embedded).T
    expected = torch.stack([plain[:, rows].amax(dim=1) for rows in ([0, 4], [1], [2], [3, 5], [6], [7])], dim=1)
    torch.testing.assert_close(space.similarities(features), expected)
    evaluations = list(evaluate_tasks(clip, [one, two], [], ["task-agnostic"], LOADER))
    assert [evaluation.classes for evaluation in evaluations] == [6, 6]
    assert set(evaluations[1].per_class) == {"red", "crane [3]", "tin", "crane [5]"}
    assert all(evaluation.top5 is not None for evaluation in evaluations)


def test_a_task_without_a_usable_image(clip: Clip, tmp_path: Path) -> None:
    folder = open_task(make_task(tmp_path / "empty", 0))
    accumulator = EvaluationAccumulator(
        LabelSpace(torch.eye(4, 16), torch.arange(4), folder.classnames), torch.tensor(1.0)
    )
    with refused(ErrorCode.EMPTY) as error:
        accumulator.compute(folder, "task-aware")
    assert f"{folder.path}/test" in str(error.value)
