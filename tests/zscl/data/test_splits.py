"""Held-out training images and few-shot training sets: drawn per class by a seed."""

import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.data import make_task, write_tar
from support.errors import refused

from schemas.errors import ErrorCode
from schemas.experiment import Experiment
from zscl.data.indexed import IndexedSamples
from zscl.data.sample import Sample
from zscl.sequence.resolve import ResolvedExperiment, resolve
from zscl.sequence.run import run_sequence

Make = Callable[..., Experiment]
Resolve = Callable[..., ResolvedExperiment]
CPU = torch.device("cpu")


@pytest.fixture
def resolve_held_out(experiment: Make) -> Resolve:
    """Return a function that resolves an experiment with held-out images."""

    def make(share: float = 0.25, seed: int = 0, judged_on: str = "held_out", **changes: Any) -> ResolvedExperiment:
        held_out = {"share": share, "seed": seed, "judged_on": judged_on}
        return resolve(experiment(evaluation={"held_out": held_out}, **changes))

    return make


def samples(images: object) -> list[Sample]:
    assert isinstance(images, IndexedSamples)
    return list(images.iter_shard())


def test_every_class_gives_its_share_and_nothing_is_in_both(resolve_held_out: Resolve, experiment: Make) -> None:
    whole, task = resolve(experiment()).tasks[0], resolve_held_out().tasks[0]
    remaining, held, everything = samples(task.train), samples(task.test), samples(whole.train)
    assert Counter(sample.label for sample in held) == {str(label).encode(): 2 for label in range(4)}  # a quarter of 6
    assert {sample.key for sample in remaining} | {sample.key for sample in held} == {
        sample.key for sample in everything
    }
    assert not {sample.key for sample in remaining} & {sample.key for sample in held}
    assert [sample.index for sample in held] == list(range(8))


def test_the_seed_draws_and_is_part_of_the_identity(resolve_held_out: Resolve, experiment: Make) -> None:
    first, again, other = resolve_held_out(), resolve_held_out(), resolve_held_out(seed=1)

    def keys(resolved: ResolvedExperiment) -> list[str]:
        return [sample.key for task in resolved.tasks for sample in samples(task.test)]

    assert keys(first) == keys(again) != keys(other)
    prints = {
        resolved.fingerprint
        for resolved in (first, other, resolve_held_out(share=0.5), resolve_held_out(judged_on="test"))
    }
    assert len(prints) == 4
    assert first.fingerprint == again.fingerprint
    assert resolve(experiment()).fingerprint not in prints
    assert first.tasks[0].digest != other.tasks[0].digest


def test_held_out_images_can_be_left_out_only(resolve_held_out: Resolve, experiment: Make) -> None:
    whole, task = resolve(experiment()).tasks[0], resolve_held_out(judged_on="test").tasks[0]
    assert samples(task.test) == samples(whole.test)
    assert [sample.key for sample in samples(task.train)] == [
        sample.key for sample in samples(resolve_held_out().tasks[0].train)
    ]


def test_no_test_image_is_read(experiment: Make, tmp_path: Path) -> None:
    folders = [make_task(tmp_path / name, seed) for seed, name in enumerate(["one", "two"])]
    for folder in folders:  # same size: only the manifest identifies the task
        (folder / "test/0.tar").write_bytes(b"\0" * (folder / "test/0.tar").stat().st_size)
    held_out = {"share": 0.25}
    recipe = experiment(tasks=[str(folder) for folder in folders], evaluation={"held_out": held_out})
    result = run_sequence(recipe, tmp_path / "run", device=CPU)
    assert [task.test_images for task in result.tasks] == [8, 8]
    assert result.held_out is not None
    assert result.held_out.share == 0.25


@pytest.mark.parametrize(
    ("share", "content"),
    [(0.95, "leaves the class 'red' without training images (found 6)"), (0.01, "none of its 24 training images")],
)
def test_a_too_small_or_large_share_is_refused(resolve_held_out: Resolve, share: float, content: str) -> None:
    with refused(ErrorCode.INVALID_VALUE, "evaluation.held_out.share") as error:
        resolve_held_out(share).tasks[0].train  # noqa: B018 - `check` reads it before a run
    assert content in str(error.value)


def test_class_incremental_learning_holds_out_too(resolve_held_out: Resolve, tasks: list[str]) -> None:
    resolved = resolve_held_out(tasks=[], class_incremental={"path": tasks[0], "first": 2, "increment": 2})
    assert [len(samples(task.train)) for task in resolved.tasks] == [8, 8]
    assert [len(samples(task.test)) for task in resolved.tasks] == [4, 4]
    assert [task.steps for task in resolved.experiment.tasks] == [2, 2]  # one epoch of 8 images in batches of 6


def test_a_few_of_each_class(experiment: Make, tasks: list[str]) -> None:
    few = [{"path": path, "shots": 2} for path in tasks]
    resolved, again, other = (resolve(experiment(tasks=few, seed=seed)) for seed in (0, 0, 1))
    labels = Counter(sample.label for sample in samples(resolved.tasks[0].train))
    assert labels == {str(label).encode(): 2 for label in range(4)}
    assert len(samples(resolved.tasks[0].test)) == 10

    def keys(resolved: ResolvedExperiment) -> list[str]:
        return [sample.key for task in resolved.tasks for sample in samples(task.train)]

    assert keys(resolved) == keys(again) != keys(other)
    all_of_them = resolve(experiment(tasks=[{"path": path, "shots": 1000} for path in tasks]))
    whole = resolve(experiment())
    assert keys(all_of_them) == keys(whole)
    assert len({resolved.fingerprint, other.fingerprint, all_of_them.fingerprint, whole.fingerprint}) == 4


def test_a_few_of_some_classes_and_of_those_not_held_out(experiment: Make, tasks: list[str]) -> None:
    task = {"path": tasks[0], "name": "some", "classes": [3, 1], "shots": 3}
    held_out = {"held_out": {"share": 0.5, "seed": 0}}
    few = resolve(experiment(tasks=[task], evaluation=held_out)).tasks[0]
    remaining = resolve(experiment(evaluation=held_out)).tasks[0]
    drawn = samples(few.train)
    assert Counter(sample.label for sample in drawn) == {b"1": 3, b"3": 3}
    assert {sample.key for sample in drawn} <= {sample.key for sample in samples(remaining.train)}
    assert [few.get_label(sample) for sample in drawn if sample.label == b"3"] == [0, 0, 0]


def odd_task(folder: Path) -> Path:
    """Of each split, the first sample has no label, the second no image that can be read."""
    make_task(folder, seed=0, shard_images=50)
    (folder / "zscl.json").unlink()
    for split in ("train", "test"):
        with tarfile.open(folder / split / "0.tar") as tar:
            members = [(info.name, tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]
        odd = {"0000000.cls": None, "0000001.png": "0000001.tif"}
        write_tar(
            folder / split / "0.tar", [(odd.get(name, name) or "0000000.json", content) for name, content in members]
        )
    return folder


def test_unusable_samples_are_not_drawn_as_shots(experiment: Make, tmp_path: Path) -> None:
    task = odd_task(tmp_path / "task")
    few = resolve(experiment(tasks=[{"path": str(task), "shots": 5}])).tasks[0]
    drawn = samples(few.train)
    assert Counter(sample.label for sample in drawn) == {str(label).encode(): 5 for label in range(4)}
    assert all(sample.fault is None for sample in drawn)


def test_unusable_samples_are_not_held_out(resolve_held_out: Resolve, tmp_path: Path) -> None:
    task = resolve_held_out(tasks=[str(odd_task(tmp_path / "task"))]).tasks[0]
    assert all(sample.fault is None for sample in samples(task.test))
    assert [sample.key for sample in samples(task.train) if sample.fault] == ["0000001"]
