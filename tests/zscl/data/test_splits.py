"""A part of the training images, held out by class and seed: nothing of it is trained on, and no test image is read."""

import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.data import make_task, write_tar

from schemas.errors import InputError
from schemas.experiment import Experiment
from zscl.data.indexed import IndexedSamples
from zscl.data.sample import Sample
from zscl.sequence.resolve import ResolvedExperiment, resolve
from zscl.sequence.run import run_sequence

Make = Callable[..., Experiment]
CPU = torch.device("cpu")


@pytest.fixture
def opened(experiment: Make) -> Callable[..., ResolvedExperiment]:
    """Open an experiment with something held out."""

    def make(share: float = 0.25, seed: int = 0, judged_on: str = "held_out", **changes: Any) -> ResolvedExperiment:
        held_out = {"share": share, "seed": seed, "judged_on": judged_on}
        return resolve(experiment(evaluation={"held_out": held_out}, **changes))

    return make


def samples(images: object) -> list[Sample]:
    assert isinstance(images, IndexedSamples)
    return list(images.iter_shard())


def test_every_class_gives_its_share_and_nothing_is_in_both(
    opened: Callable[..., ResolvedExperiment], experiment: Make
) -> None:
    whole, task = resolve(experiment()).tasks[0], opened().tasks[0]
    kept, held, everything = samples(task.train), samples(task.test), samples(whole.train)
    assert Counter(sample.label for sample in held) == {str(label).encode(): 2 for label in range(4)}  # a quarter of 6
    assert {sample.key for sample in kept} | {sample.key for sample in held} == {sample.key for sample in everything}
    assert not {sample.key for sample in kept} & {sample.key for sample in held}
    assert [sample.index for sample in held] == list(range(8))


def test_the_seed_draws_and_is_part_of_the_identity(
    opened: Callable[..., ResolvedExperiment], experiment: Make
) -> None:
    first, again, other = opened(), opened(), opened(seed=1)

    def keys(made: ResolvedExperiment) -> list[str]:
        return [sample.key for task in made.tasks for sample in samples(task.test)]

    assert keys(first) == keys(again) != keys(other)
    prints = {made.fingerprint for made in (first, other, opened(share=0.5), opened(judged_on="test"))}
    assert len(prints) == 4
    assert first.fingerprint == again.fingerprint
    assert resolve(experiment()).fingerprint not in prints
    assert first.tasks[0].digest != other.tasks[0].digest


def test_judged_on_test_the_part_is_only_left_out(opened: Callable[..., ResolvedExperiment], experiment: Make) -> None:
    whole, task = resolve(experiment()).tasks[0], opened(judged_on="test").tasks[0]
    assert samples(task.test) == samples(whole.test)
    assert [sample.key for sample in samples(task.train)] == [sample.key for sample in samples(opened().tasks[0].train)]


def test_no_test_image_is_read(experiment: Make, tmp_path: Path) -> None:
    places = [make_task(tmp_path / name, seed) for seed, name in enumerate(["one", "two"])]
    for place in places:  # only what identifies the task is read of it: here its manifest
        (place / "test/0.tar").write_bytes(b"\0" * (place / "test/0.tar").stat().st_size)
    held_out = {"share": 0.25}
    made = experiment(tasks=[str(place) for place in places], evaluation={"held_out": held_out})
    result = run_sequence(made, tmp_path / "run", device=CPU)
    assert [task.test_images for task in result.tasks] == [8, 8]
    assert result.held_out is not None
    assert result.held_out.share == 0.25


@pytest.mark.parametrize(
    ("share", "sentence"),
    [
        (0.95, "evaluation.held_out.share is 0.95, which leaves the class 'red' without training images (found 6)"),
        (0.01, "evaluation.held_out.share is 0.01, which holds out none of its 24 training images"),
    ],
)
def test_a_share_that_does_not_fit(opened: Callable[..., ResolvedExperiment], share: float, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence.replace("(", r"\(").replace(")", r"\)")):
        opened(share).tasks[0].train  # noqa: B018 - looked at before a run, by `check`


def test_class_incremental_learning_holds_out_too(opened: Callable[..., ResolvedExperiment], tasks: list[str]) -> None:
    made = opened(tasks=[], class_incremental={"path": tasks[0], "first": 2, "increment": 2})
    assert [len(samples(task.train)) for task in made.tasks] == [8, 8]
    assert [len(samples(task.test)) for task in made.tasks] == [4, 4]
    assert [task.steps for task in made.experiment.tasks] == [2, 2]  # one epoch of what is left, by sixes


def test_a_few_of_each_class(experiment: Make, tasks: list[str]) -> None:
    few = [{"path": path, "shots": 2} for path in tasks]
    opened, again, other = (resolve(experiment(tasks=few, seed=seed)) for seed in (0, 0, 1))
    labels = Counter(sample.label for sample in samples(opened.tasks[0].train))
    assert labels == {str(label).encode(): 2 for label in range(4)}
    assert len(samples(opened.tasks[0].test)) == 10

    def keys(made: ResolvedExperiment) -> list[str]:
        return [sample.key for task in made.tasks for sample in samples(task.train)]

    assert keys(opened) == keys(again) != keys(other)
    all_of_them = resolve(experiment(tasks=[{"path": path, "shots": 1000} for path in tasks]))
    whole = resolve(experiment())
    assert keys(all_of_them) == keys(whole)
    assert len({opened.fingerprint, other.fingerprint, all_of_them.fingerprint, whole.fingerprint}) == 4


def test_a_few_of_some_classes_and_of_those_not_held_out(experiment: Make, tasks: list[str]) -> None:
    task = {"path": tasks[0], "name": "some", "classes": [3, 1], "shots": 3}
    held_out = {"held_out": {"share": 0.5, "seed": 0}}
    opened = resolve(experiment(tasks=[task], evaluation=held_out)).tasks[0]
    kept = resolve(experiment(evaluation=held_out)).tasks[0]
    drawn = samples(opened.train)
    assert Counter(sample.label for sample in drawn) == {b"1": 3, b"3": 3}
    assert {sample.key for sample in drawn} <= {sample.key for sample in samples(kept.train)}
    assert [opened.get_label(sample) for sample in drawn if sample.label == b"3"] == [0, 0, 0]


def odd_task(folder: Path) -> Path:
    """Of each split, the first sample has no label, the second no image that can be read."""
    make_task(folder, seed=0, shard_images=50)
    (folder / "zscl.json").unlink()
    for split in ("train", "test"):
        with tarfile.open(folder / split / "0.tar") as tar:
            members = [(info.name, tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]
        odd = {"0000000.cls": None, "0000001.png": "0000001.tif"}
        write_tar(folder / split / "0.tar", [(odd.get(name, name) or "0000000.json", each) for name, each in members])
    return folder


def test_what_cannot_be_used_is_not_drawn_among_a_few(experiment: Make, tmp_path: Path) -> None:
    task = odd_task(tmp_path / "task")
    made = resolve(experiment(tasks=[{"path": str(task), "shots": 5}])).tasks[0]
    drawn = samples(made.train)
    assert Counter(sample.label for sample in drawn) == {str(label).encode(): 5 for label in range(4)}
    assert all(sample.fault is None for sample in drawn)


def test_what_cannot_be_used_is_not_held_out(opened: Callable[..., ResolvedExperiment], tmp_path: Path) -> None:
    task = opened(tasks=[str(odd_task(tmp_path / "task"))]).tasks[0]
    assert all(sample.fault is None for sample in samples(task.test))
    assert [sample.key for sample in samples(task.train) if sample.fault] == ["0000001"]
