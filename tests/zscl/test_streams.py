"""Streams: the same global batch however many share it, and whatever breaks is named."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch
from conftest import coloured
from torchvision.transforms import Compose, RandomResizedCrop, ToTensor

from schemas.base import InputError
from zscl.shards import IndexedSamples, Sample, open_samples
from zscl.streams import Decode, EvaluationImages, Loader, TrainingImages
from zscl.tasks import write_shards

AUGMENT = Compose([RandomResizedCrop(8, scale=(0.3, 1.0)), ToTensor()])
Batches = list[tuple[torch.Tensor, torch.Tensor]]


def label_of(sample: Sample) -> int:
    return int(sample.label or b"-1")


@pytest.fixture
def samples(tmp_path: Path) -> IndexedSamples:
    write_shards(tmp_path, ({"png": image, "cls": str(n).encode()} for n, (image, _) in enumerate(coloured(10, 0))), 4)
    found = open_samples([str(tmp_path)])
    assert isinstance(found, IndexedSamples)
    return found


def batches(samples: IndexedSamples, own: range, processes: int = 0, first_step: int = 0, count: int = 5) -> Batches:
    images = TrainingImages(samples, Decode(AUGMENT, label_of), 3, 6, own, first_step)
    stream: Iterator[tuple[torch.Tensor, torch.Tensor]] = images.batches(Loader(torch.device("cpu"), processes))
    return list(islice(stream, count))


def same(left: Batches, right: Batches) -> bool:
    return all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(left, right, strict=True))


def test_workers_share_the_one_global_batch_augmentation_included(samples: IndexedSamples) -> None:
    whole = batches(samples, range(6))
    first, second = batches(samples, range(0, 2)), batches(samples, range(2, 6))
    joined = [(torch.cat([a, c]), torch.cat([b, d])) for (a, b), (c, d) in zip(first, second, strict=True)]
    assert same(joined, whole)
    assert not torch.equal(whole[0][0][0], whole[0][0][1])


@pytest.mark.parametrize("processes", [1, 4])
def test_loader_processes_change_nothing(samples: IndexedSamples, processes: int) -> None:
    assert same(batches(samples, range(6), processes), batches(samples, range(6)))


@pytest.mark.parametrize("processes", [0, 3])
def test_goes_on_from_any_step(samples: IndexedSamples, processes: int) -> None:
    whole = batches(samples, range(6), count=6)
    assert same(batches(samples, range(6), processes, first_step=2, count=4), whole[2:])


def test_the_callers_random_state_is_left_alone(samples: IndexedSamples) -> None:
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    batches(samples, range(6))
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(("workers", "processes"), [(1, 0), (2, 0), (3, 2), (12, 0)])
def test_evaluation_sees_every_image_once(samples: IndexedSamples, workers: int, processes: int) -> None:
    seen: list[int] = []
    for worker in range(workers):
        images = EvaluationImages(samples, Decode(ToTensor(), label_of), worker, workers)
        seen += [int(n) for _, found in images.batches(4, Loader(torch.device("cpu"), processes)) for n in found]
    assert sorted(seen) == list(range(10))


@pytest.mark.parametrize("processes", [0, 2])
def test_names_a_broken_image(tmp_path: Path, processes: int) -> None:
    write_shards(tmp_path, [{"png": b"no image", "cls": b"0"}], 4)
    images = EvaluationImages(open_samples([str(tmp_path)]), Decode(ToTensor(), label_of), 0, 1)
    with pytest.raises(InputError, match=r"^.*0\.tar: sample '0000000' is no readable image"):
        list(images.batches(4, Loader(torch.device("cpu"), processes)))
