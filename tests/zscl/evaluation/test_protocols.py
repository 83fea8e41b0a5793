"""What a model is worth under each protocol, against scikit-learn's figures and figures worked out by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, top_k_accuracy_score
from support.data import coloured, make_task, opened

from schemas.errors import InputError
from schemas.evaluation import PROTOCOLS, TaskEvaluation
from schemas.experiment import Model
from zscl.data.loader import Loader
from zscl.data.task import TaskFolder
from zscl.datasets.task_writer import write_task
from zscl.evaluation.protocols import LabelSpace, TaskTally, evaluate_tasks, shared_space
from zscl.evaluation.zero_shot import accuracies, embed_classes
from zscl.models.clip import Clip, load_clip

LOADER = Loader(torch.device("cpu"))


@pytest.fixture
def clip(tiny_model: str) -> Clip:
    return load_clip(Model(name=tiny_model))


def table(judged: TaskEvaluation, names: list[str]) -> list[list[int]]:
    cells = {(pair.true, pair.predicted): pair.images for pair in judged.confused}
    return [[cells.get((true, predicted), 0) for predicted in names] for true in names]


def test_the_figures_are_those_of_scikit_learn() -> None:
    torch.manual_seed(0)
    classes, images, names = 8, 500, [f"class {index}" for index in range(8)]
    embeddings = torch.nn.functional.normalize(torch.randn(classes, 6), dim=1)
    labels = torch.randint(classes - 1, (images,))  # one class has no image
    features = torch.nn.functional.normalize(embeddings[labels] + 0.9 * torch.randn(images, 6), dim=1)
    tally = TaskTally(LabelSpace(embeddings, torch.arange(classes), tuple(names)), torch.tensor(5.0))
    for batch, own in zip(features.split(64), labels.split(64), strict=True):
        tally.add(batch, own)
    folder = TaskFolder("made", "made", tuple(names), ("{c}",))
    judged = tally.judged(folder, "task-aware")

    scores = features @ embeddings.T
    predicted = scores.argmax(dim=1)
    assert table(judged, names) == confusion_matrix(labels, predicted, labels=range(classes)).tolist()
    assert judged.top1 == pytest.approx(float((predicted == labels).float().mean()))
    assert judged.top5 == pytest.approx(top_k_accuracy_score(labels, scores, k=5, labels=range(classes)))
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        balanced = balanced_accuracy_score(labels, predicted)
    assert judged.mean_per_class == pytest.approx(balanced)
    assert "class 7" not in judged.per_class

    confidence, right = (5 * scores).softmax(dim=1).max(dim=1).values, predicted == labels
    expected = 0.0
    for low in range(15):
        inside = (confidence >= low / 15) & (confidence < (low + 1) / 15)
        if inside.any():
            gap = float(confidence[inside].mean() - right[inside].float().mean())
            expected += abs(gap) * int(inside.sum()) / images
    assert judged.calibration_error == pytest.approx(expected, abs=1e-6)
    assert sum(each.images for each in judged.bins) == images


def test_task_aware_is_what_the_matrix_holds(clip: Clip, tasks: list[str]) -> None:
    folders = [opened(path) for path in tasks]
    judged = list(evaluate_tasks(clip, folders[:2], folders[2:], PROTOCOLS, LOADER, batch_size=4))
    assert [(each.task, each.protocol) for each in judged] == [
        ("first", "task-aware"), ("first", "task-agnostic"), ("second", "task-aware"), ("second", "task-agnostic"),
        ("third", "task-aware"),
    ]  # fmt: skip
    heads = embed_classes(clip, folders, "all", "fp32", torch.device("cpu"))
    for folder, head in zip(folders, heads, strict=True):
        [found] = [each for each in judged if each.task == folder.name and each.protocol == "task-aware"]
        assert ([found.top1], found.images) == accuracies(clip, folder, [head], LOADER)


def test_a_class_of_two_tasks_is_one_class(clip: Clip, tmp_path: Path) -> None:
    def write(name: str, classes: list[str]) -> TaskFolder:
        splits: dict[str, Any] = {split: list(coloured(8, 0)) for split in ("train", "test")}
        write_task(tmp_path / name, classes, ["a {c}"], splits, suffix="png", source="made by a test")
        return opened(tmp_path / name)

    one, two = write("one", ["red", "green", "blue", "crane"]), write("two", ["Red", "crane", "tin", "crane"])
    embedded = embed_classes(clip, [one, two], "all", "fp32", torch.device("cpu"))
    space, places = shared_space([one, two], embedded)
    assert space.names == ("red", "green", "blue", "crane", "tin", "crane")
    assert [each.tolist() for each in places] == [[0, 1, 2, 3], [0, 3, 4, 5]]
    features = torch.nn.functional.normalize(torch.randn(5, 16), dim=1)
    plain = features @ torch.cat(embedded).T
    expected = torch.stack([plain[:, rows].amax(dim=1) for rows in ([0, 4], [1], [2], [3, 5], [6], [7])], dim=1)
    torch.testing.assert_close(space.similarities(features), expected)
    judged = list(evaluate_tasks(clip, [one, two], [], ["task-agnostic"], LOADER))
    assert [each.classes for each in judged] == [6, 6]
    assert set(judged[1].per_class) == {"red", "crane [3]", "tin", "crane [5]"}
    assert all(each.top5 is not None for each in judged)


def test_a_task_without_a_usable_image(clip: Clip, tmp_path: Path) -> None:
    folder = opened(make_task(tmp_path / "empty", 0))
    tally = TaskTally(LabelSpace(torch.eye(4, 16), torch.arange(4), folder.classnames), torch.tensor(1.0))
    with pytest.raises(InputError, match="empty: found no image that can be used"):
        tally.judged(folder, "task-aware")
