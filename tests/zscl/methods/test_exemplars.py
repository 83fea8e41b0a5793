"""Exemplars: which are chosen, how they are shared out, and that they are the images they were."""

from itertools import permutations
from pathlib import Path

import pytest
import torch
from support.data import coloured

from zscl.data.shard_urls import open_samples
from zscl.data.tar import write_shards
from zscl.methods.exemplars import choose_exemplars, exemplars_per_class, herd, load_exemplars, write_exemplars


def test_herding_keeps_the_mean_of_the_chosen_nearest_to_the_mean_of_all() -> None:
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


def test_herding_gives_all_where_there_are_fewer() -> None:
    assert sorted(herd(torch.eye(3), 9)) == [0, 1, 2]


def test_the_budget_is_shared_over_tasks_and_classes() -> None:
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
        places = [place for place, found in chosen if found == label]
        own = [index for index in range(9) if labels[index] == label]
        assert places == [3 + own[index] for index in herd(features[labels == label], 2)]


def test_what_is_written_is_recalled_and_shrinks_from_the_back(tmp_path: Path) -> None:
    images = [image for image, _ in coloured(12, 0)]
    write_shards(tmp_path / "task", ({"png": image, "cls": str(n % 2).encode()} for n, image in enumerate(images)), 5)
    samples = open_samples([str(tmp_path / "task")])
    first = [(4, 0), (7, 1), (0, 0), (1, 1), (10, 0), (3, 1)]
    write_exemplars(tmp_path / "first", samples, first)
    write_exemplars(tmp_path / "second", samples, [(2, 0), (5, 1)])
    assert load_exemplars([], 6) is None

    alone = load_exemplars([tmp_path / "first"], 6)
    assert alone is not None
    assert [sample.image for sample in alone.iter_shard(0, 1)] == [images[place] for place, _ in first]
    both = load_exemplars([tmp_path / "first", tmp_path / "second"], 6)  # 3 each, so 1 of each class
    assert both is not None
    assert [sample.image for sample in both.iter_shard(0, 1)] == [images[place] for place in (4, 7, 2, 5)]
    assert [int(sample.label or b"") for sample in both.iter_shard(0, 1)] == [0, 1, 0, 1]


def test_herding_does_not_depend_on_equal_rows() -> None:
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    for order in permutations(range(3)):
        chosen = herd(rows[list(order)], 2)
        picked = rows[list(order)][chosen].mean(dim=0)
        assert float((picked - rows.mean(dim=0)).norm()) == pytest.approx(0.2357, abs=1e-3)
