"""The embedded suite: its pictures, and the zero-shot accuracy of the shipped model."""

from itertools import islice
from pathlib import Path

import pytest
import torch

from schemas.data import Task
from schemas.experiment import Model
from zscl.data.loader import Loader
from zscl.data.task import TaskFolder
from zscl.datasets.synthetic import domains, embedded, suites
from zscl.evaluation.zero_shot import compute_accuracies, embed_classes
from zscl.models.clip import load_clip


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("suite")
    suites.write_embedded(folder, corpus=False, report=lambda text: None)
    return folder


@pytest.mark.parametrize("domain", domains.DOMAINS)
def test_pictures_depend_on_the_seed_alone(domain: str) -> None:
    first, again, other = (list(embedded.task_samples(domain, "test", 12, seed)) for seed in (0, 0, 1))
    assert first == again != other
    assert len({image for image, _ in first}) == 12


@pytest.mark.parametrize("domain", domains.DOMAINS)
def test_no_test_picture_is_trained_on(domain: str) -> None:
    train = {image for image, _ in embedded.task_samples(domain, "train", None, 0)}
    test = {image for image, _ in embedded.task_samples(domain, "test", None, 0)}
    assert (len(train), len(test)) == (400, 300)
    assert not train & test


def test_captions_name_classes_and_no_task_picture_is_among_them() -> None:
    pairs = list(embedded.captioned_samples(400, suites.CORPUS_SEED, suites.CORPUS_TASK_STYLE_SHARE))
    names = {name for domain in domains.DOMAINS.values() for name in domain.classnames}
    assert all(any(name in caption for name in names) for _, caption in pairs)
    tasks = {image for domain in domains.DOMAINS for image, _ in embedded.task_samples(domain, "train", 50, 0)}
    assert not tasks & {image for image, _ in pairs}


def test_the_corpus_prefix_does_not_depend_on_its_length() -> None:
    assert list(islice(embedded.captioned_samples(500, 1, 0.15), 5)) == list(embedded.captioned_samples(5, 1, 0.15))


def test_existing_folders_are_reused(suite: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in suite.rglob("*.tar")}
    suites.write_embedded(suite, corpus=False, report=lambda text: pytest.fail(text))
    assert {file: file.stat().st_mtime_ns for file in suite.rglob("*.tar")} == before


def test_the_shipped_model_has_real_zero_shot_ability(suite: Path) -> None:
    clip, loader = load_clip(Model(name="embedded")), Loader(torch.device("cpu"))
    found = {}
    for name in domains.DOMAINS:
        task = TaskFolder.open(Task.model_validate(str(suite / name)))
        task.check()
        heads = embed_classes(clip, [task], "all", "fp32", torch.device("cpu"))
        [found[name]], images = compute_accuracies(clip, task, heads, loader)
        assert images == 300
        assert 2.5 / len(task.classnames) < found[name] < 0.95
    assert sum(found.values()) / len(found) > 0.6
