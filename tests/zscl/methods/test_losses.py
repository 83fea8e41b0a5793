"""The losses against their formulas in plain Python."""

import math

import pytest
import torch

from zscl.methods.losses import (
    classification,
    distillation,
    feature_distance,
    similarity_distillation,
    squared_distance,
)

torch.manual_seed(0)
IMAGES = torch.nn.functional.normalize(torch.randn(3, 4, dtype=torch.float64), dim=1)
TEXTS = torch.nn.functional.normalize(torch.randn(5, 4, dtype=torch.float64), dim=1)


def log_softmax(row: list[float]) -> list[float]:
    total = math.log(sum(math.exp(value) for value in row))
    return [value - total for value in row]


def test_classification_smooths_over_all_classes() -> None:
    labels, scale, smoothing = [1, 4, 0], 10.0, 0.2
    expected = 0.0
    for image, label in zip(IMAGES.tolist(), labels, strict=True):
        logits = [scale * sum(a * b for a, b in zip(image, text, strict=True)) for text in TEXTS.tolist()]
        for choice, value in enumerate(log_softmax(logits)):
            target = smoothing / 5 + (1 - smoothing if choice == label else 0)
            expected -= target * value / 3
    loss = classification(IMAGES, TEXTS, torch.tensor(labels), torch.tensor(scale), smoothing)
    assert float(loss) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_distillation_is_a_cross_entropy_times_temperature_squared(temperature: float) -> None:
    student, teacher = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    expected = 0.0
    for ours, theirs in zip(student.tolist(), teacher.tolist(), strict=True):
        targets = [math.exp(value) for value in log_softmax([value / temperature for value in theirs])]
        scores = log_softmax([value / temperature for value in ours])
        expected -= temperature**2 * sum(a * b for a, b in zip(targets, scores, strict=True)) / 3
    assert float(distillation(student, teacher, temperature)) == pytest.approx(expected, rel=1e-12)


def test_distilling_equal_logits_gives_the_entropy_and_no_gradient() -> None:
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    loss = distillation(logits, logits.detach(), 2.0)
    loss.backward()
    assert float(loss) > 0
    assert logits.grad is not None
    assert float(logits.grad.abs().max()) < 1e-15


def test_squared_distance_has_no_factor_one_half() -> None:
    parameters = [torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([[3.0]], requires_grad=True)]
    anchors = [torch.tensor([0.0, 2.0]), torch.tensor([[1.0]])]
    distance = squared_distance(parameters, anchors)
    distance.backward()
    assert float(distance) == 1 + 4
    assert [parameter.grad.tolist() for parameter in parameters if parameter.grad is not None] == [[2.0, 0.0], [[4.0]]]


@pytest.mark.parametrize("multi_tensor", [True, False])
def test_squared_distance_under_a_weight(multi_tensor: bool) -> None:
    parameters = [torch.tensor([3.0, 1.0], requires_grad=True), torch.tensor([[2.0]], requires_grad=True)]
    anchors = [torch.tensor([1.0, 1.0]), torch.tensor([[5.0]])]
    (3 * squared_distance(parameters, anchors, multi_tensor)).backward()
    assert [parameter.grad.tolist() for parameter in parameters if parameter.grad is not None] == [
        [12.0, 0.0],
        [[-18.0]],
    ]
    with pytest.raises((ValueError, RuntimeError)):
        squared_distance(parameters, anchors[:1], multi_tensor)


def test_similarity_distillation_excludes_the_diagonal() -> None:
    student, teacher = (torch.nn.functional.normalize(torch.randn(3, 4), dim=1) for _ in range(2))
    scale, temperature, expected = torch.tensor(5.0), 2.0, 0.0
    for row in range(3):
        others = [column for column in range(3) if column != row]
        ours, theirs = (
            torch.stack([5 * features[row] @ features[column] / temperature for column in others])
            for features in (student, teacher)
        )
        expected += float(-(theirs.softmax(0) * ours.log_softmax(0)).sum()) * temperature**2 / 3
    assert float(similarity_distillation(student, teacher, scale, temperature)) == pytest.approx(expected, rel=1e-5)


def test_feature_distance_is_the_mean_over_all_entries() -> None:
    assert float(feature_distance(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 3.0]]))) == pytest.approx(5.0)
