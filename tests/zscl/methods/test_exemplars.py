"""Exemplars: their choice, the budget, and that their images are stored unchanged."""

from itertools import permutations
from pathlib import Path

import pytest
import torch
from support.data import coloured_images

from zscl.data.shard_urls import open_samples
from zscl.data.tar import write_shards
from zscl.methods.exemplars import choose_exemplars, exemplars_per_class, herd, load_exemplars, write_exemplars


def test_herding_approximates_the_mean_of_all_rows() -> None:
    torch.manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(6, 3), dim=1)
    chosen = herd(features, 6)
    assert sorted(chosen) == list(range(6))
    target = features.mean(dim=0)
    for size in range(1, 7):
        before = chosen[: size - 1]
        distances = {
            index: float((features[[*before, index]].mean(dim=0) - target).norm())
            for index in range(6)
            if index not in before
        }
        assert distances[chosen[size - 1]] == pytest.approx(min(distances.values()), abs=1e-6)


def test_herding_returns_all_rows_if_there_are_fewer() -> None:
    assert sorted(herd(torch.eye(3), 9)) == [0, 1, 2]


def test_tasks_and_classes_share_the_budget() -> None:
    assert exemplars_per_class(10_000, 1, 100) == 100
    assert exemplars_per_class(10_000, 3, 100) == 33
    assert exemplars_per_class(7, 2, 4) == 0


def test_the_best_of_each_class_come_first() -> None:
    torch.manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(9, 3), dim=1)
    labels = torch.tensor([0, 1, 0, 1, 0, 1, 0, 1, 1])
    chosen = choose_exemplars(features, labels, torch.arange(9) + 3, 2)
    assert [label for _, label in chosen] == [0, 1, 0, 1]
    for label in (0, 1):
        indices = [index for index, chosen_label in chosen if chosen_label == label]
        rows = [row for row in range(9) if labels[row] == label]
        assert indices == [3 + rows[row] for row in herd(features[labels == label], 2)]


def test_loading_drops_the_last_exemplars_first(tmp_path: Path) -> None:
    images = [image for image, _ in coloured_images(12, 0)]
    write_shards(tmp_path / "task", ({"png": image, "cls": str(n % 2).encode()} for n, image in enumerate(images)), 5)
    samples = open_samples([str(tmp_path / "task")])
    first = [(4, 0), (7, 1), (0, 0), (1, 1), (10, 0), (3, 1)]
    write_exemplars(tmp_path / "first", samples, first)
    write_exemplars(tmp_path / "second", samples, [(2, 0), (5, 1)])
    assert load_exemplars([], 6) is None

    one = load_exemplars([tmp_path / "first"], 6)
    assert one is not None
    assert [sample.image for sample in one.iter_shard(0, 1)] == [images[index] for index, _ in first]
    both = load_exemplars([tmp_path / "first", tmp_path / "second"], 6)  # 3 each, so 1 of each class
    assert both is not None
    assert [sample.image for sample in both.iter_shard(0, 1)] == [images[index] for index in (4, 7, 2, 5)]
    assert [int(sample.label or b"") for sample in both.iter_shard(0, 1)] == [0, 1, 0, 1]


def test_herding_of_equal_rows() -> None:
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    for order in permutations(range(3)):
        chosen = herd(rows[list(order)], 2)
        picked = rows[list(order)][chosen].mean(dim=0)
        assert float((picked - rows.mean(dim=0)).norm()) == pytest.approx(0.2357, abs=1e-3)
