"""The cache of the teacher's image features: rows are used only if they are complete and of the same image."""

import errno
import gc
import io
import re
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from numpy.lib.format import open_memmap
from PIL import Image
from pydantic import BaseModel
from support.errors import refused
from torch import nn

from schemas.errors import ErrorCode
from schemas.events import ImagesEmbedded, Note, StepsTaken
from schemas.experiment import Experiment
from zscl.methods.teacher_cache import (
    CHECKS,
    FEATURES,
    CachedFeatures,
    FeatureCache,
    _open_or_replace,
    build_encoder,
    expected_coverage,
)
from zscl.sequence.run import run_sequence

CPU = torch.device("cpu")
IDENTITIES = torch.tensor([[2, 1_000], [0, 2**55 + 3]])


@pytest.fixture
def cache(tmp_path: Path) -> FeatureCache:
    return FeatureCache(tmp_path / "cache", count=5, width=3, dtype=torch.float32)


def test_reads_what_was_written_and_lists_missing_indices(cache: FeatureCache) -> None:
    features = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    assert not cache.read(IDENTITIES)[1].any()
    cache.write(IDENTITIES, features)
    for opened in (cache, FeatureCache(cache.folder, 5, 3, torch.float32)):
        stored, is_valid = opened.read(IDENTITIES)
        assert torch.equal(stored, features)
        assert is_valid.all()
        assert opened.missing_indices() == [1, 3, 4]


def test_a_row_of_another_image_is_invalid(cache: FeatureCache) -> None:
    cache.write(IDENTITIES, torch.ones(2, 3))
    assert cache.read(torch.tensor([[2, 1_001], [0, 2**55 + 3]]))[1].tolist() == [False, True]
    cache.write(torch.tensor([[2, 1_001]]), torch.zeros(1, 3))
    stored, is_valid = cache.read(torch.tensor([[2, 1_001]]))
    assert (is_valid.tolist(), stored.tolist()) == ([True], [[0.0, 0.0, 0.0]])


@pytest.mark.parametrize("name", [FEATURES, CHECKS])
def test_a_half_written_row_is_invalid(cache: FeatureCache, name: str) -> None:
    cache.write(IDENTITIES, torch.ones(2, 3))
    array = np.load(cache.folder / name, mmap_mode="r+")
    array.view(np.uint8)[2, -1] ^= 1  # in the row of the first image
    array.flush()
    assert cache.read(IDENTITIES)[1].tolist() == [False, True]


def test_two_processes_that_create_a_cache_share_it(tmp_path: Path) -> None:
    first, second = (FeatureCache(tmp_path / "cache", 5, 3, torch.float64) for _ in range(2))
    first.write(IDENTITIES, torch.ones(2, 3, dtype=torch.float64))
    assert second.read(IDENTITIES)[1].all()
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


class Tower(nn.Module):
    """An image tower whose features are the images' pixels."""

    def encode_image(self, images: torch.Tensor, normalize: bool) -> torch.Tensor:
        return images.flatten(1)


def test_encoding_does_not_synchronise_with_the_device() -> None:
    """A tensor on the meta device has no content that could be read."""
    features = build_encoder(Tower, "fp32")(torch.empty(2, 3, 1, 1, device="meta"))
    assert features.shape == (2, 3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_not_cached(cache: FeatureCache, value: float) -> None:
    features = CachedFeatures(cache, build_encoder(Tower, "fp32"), pytest.fail)
    images = torch.ones(2, 3, 1, 1)
    images[1, 0] = value
    with refused(ErrorCode.NOT_FINITE) as error:
        features(images, IDENTITIES)
    assert "reference images" in str(error.value)
    assert cache.missing_indices() == list(range(5))


def test_a_full_disk_is_reported_once_and_changes_no_result(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path / "cache", count=100, width=64, dtype=torch.float32)
    messages: list[str] = []
    features = CachedFeatures(cache, lambda images: images.flatten(1)[:, :64], messages.append)
    images = torch.rand(3, 3, 8, 8)
    identities = torch.tensor([[97, 5], [98, 6], [99, 7]])
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, limit[1]))
    try:
        results = [features(images, identities) for _ in range(2)]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert all(torch.equal(result, images.flatten(1)[:, :64]) for result in results)
    assert len(messages) == 1
    assert "no longer stored" in messages[0]


def test_a_broken_reference_image_is_tolerated_in_every_stage_and_run(
    experiment: Callable[..., Experiment], tmp_path: Path
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number in range(30):
        (images / f"{number}.png").write_bytes(uncompressed(8 * number) if number else b"no image")
    (images / "captions.txt").write_text("red\ngreen\nblue\n")
    compute = {"device": "cpu", "teacher_features": "ahead", "max_broken_share": 0.05}
    for folder in ("first", "again"):
        _, messages = run(experiment(reference=str(images), compute=compute), tmp_path / folder)
        assert "images/0.png: sample" in notes(messages) or "sample '0' is no readable image" in notes(messages)
    [cache] = (tmp_path / "teacher").glob("images-*")
    assert FeatureCache(cache, 30, 16, torch.float32).missing_indices() == [0]


def test_a_run_continues_without_a_cache(experiment: Callable[..., Experiment], tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/teacher").write_text("not a folder")
    losses_without_cache, messages = run(experiment(), tmp_path / "a/run")
    assert "teacher features are not stored" in notes(messages)
    assert "teacher embeddings of texts are not stored" in notes(messages)
    never = experiment(compute={"device": "cpu", "teacher_features": "never"})
    assert losses_without_cache == run(never, tmp_path / "b/run")[0]


def test_a_damaged_cache_is_replaced(experiment: Callable[..., Experiment], tmp_path: Path) -> None:
    before, _ = run(experiment(), tmp_path / "first")
    [folder] = (tmp_path / "teacher").glob("images-*")
    for damage in (lambda: (folder / FEATURES).unlink(), lambda: (folder / CHECKS).write_bytes(b"")):
        damage()
        again, messages = run(experiment(), tmp_path / f"again-{len(list(tmp_path.iterdir()))}")
        assert "Teacher embedded 14 images, once" in notes(messages)
        assert again == before


def count_rows(folder: Path) -> int:
    return 5 - len(FeatureCache(folder, 5, 3, torch.float32).missing_indices())


@pytest.mark.parametrize("name", ["ESTALE", "EIO", "EACCES", "ENOMEM", "EMFILE"])
@pytest.mark.parametrize("times", [1, 1_000])
def test_a_cache_that_cannot_be_opened_is_not_changed(
    cache: FeatureCache, monkeypatch: pytest.MonkeyPatch, name: str, times: int
) -> None:
    cache.write(IDENTITIES, torch.ones(2, 3))
    messages, failures = list[str](), iter(range(times))

    def failing(*arguments: Any, **options: Any) -> Any:
        for _ in failures:
            raise OSError(getattr(errno, name), name)
        return open_memmap(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr("zscl.methods.teacher_cache.open_memmap", failing)
        patch.setattr("zscl.methods.teacher_cache.OPEN_TIMEOUT_SECONDS", 0.2)
        opened = _open_or_replace(cache.folder, 5, 3, torch.float32, messages.append)
    is_retried = name in ("ESTALE", "EIO") and times == 1
    assert (opened is not None) == is_retried
    assert (messages == []) == is_retried
    assert all("teacher features are not stored" in message for message in messages)
    assert count_rows(cache.folder) == 2
    assert [path.name for path in cache.folder.parent.iterdir()] == [cache.folder.name]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda cache: (cache / CHECKS).write_bytes(b""), "magic"),
        (lambda cache: (cache / FEATURES).write_bytes(b"something else, and longer than a header"), "magic"),
        (lambda cache: (cache / FEATURES).write_bytes((cache / FEATURES).read_bytes()[:-1]), "length"),
        (lambda cache: (cache / CHECKS).unlink(), "checks.npy is missing"),
        (lambda cache: np.save(cache / FEATURES, np.zeros((4, 3), dtype=np.float32)), r"shape \(4, 3\)"),
    ],
)
def test_a_damaged_cache_is_renamed(cache: FeatureCache, damage: Callable[[Path], object], reason: str) -> None:
    cache.write(IDENTITIES, torch.ones(2, 3))
    damage(cache.folder)
    messages: list[str] = []
    assert _open_or_replace(cache.folder, 5, 3, torch.float32, messages.append) is not None
    assert count_rows(cache.folder) == 0
    [moved] = cache.folder.parent.glob(f"damaged-*-{cache.folder.name}")
    assert (moved / FEATURES).is_file()
    [message] = messages
    assert re.search(reason, message)
    assert moved.name in message


def test_expected_coverage() -> None:
    assert expected_coverage(100, [50]) == pytest.approx(0.5)
    assert expected_coverage(100, [50, 50]) == pytest.approx(0.75)
    assert expected_coverage(100, [150, 1]) == 1.0
    assert expected_coverage(1_281_167, [64_000] * 11) == pytest.approx(0.43, abs=0.01)  # MTIL over ImageNet


def losses(folder: Path) -> list[str]:
    return [file.read_text() for file in sorted(folder.glob("stages/*/losses.csv"))]


def run(settings: Experiment, folder: Path) -> tuple[list[str], list[BaseModel]]:
    messages: list[BaseModel] = []
    run_sequence(settings, folder, report=messages.append, device=CPU)
    return losses(folder), messages


def notes(messages: list[BaseModel]) -> str:
    return "\n".join(message.text for message in messages if isinstance(message, Note))


def test_the_policy_of_caching_does_not_change_the_losses(
    experiment: Callable[..., Experiment], tmp_path: Path
) -> None:
    found = {}
    for way in ("never", "as_met", "ahead"):
        made = experiment(compute={"device": "cpu", "teacher_features": way})
        found[way], messages = run(made, tmp_path / way / "run")
        caches = list((tmp_path / way / "teacher").glob("images-*"))
        assert len(caches) == (way != "never")
        assert any(isinstance(message, ImagesEmbedded) for message in messages) == (way == "ahead")
        assert ("Teacher embedded 14 images, once" in notes(messages)) == (way == "ahead")
        if caches:
            assert FeatureCache(caches[0], 14, 16, torch.float32).missing_indices() == []

    def numbers(text: list[str]) -> list[float]:
        return [float(cell) for part in text for line in part.splitlines()[1:] for cell in line.split(",")]

    for way in ("as_met", "ahead"):  # up to rounding: the teacher encodes the images in other batches
        assert numbers(found[way]) == pytest.approx(numbers(found["never"]), rel=2e-3, abs=1e-6)


def test_features_of_another_version_of_the_computation_are_not_used(
    experiment: Callable[..., Experiment], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(experiment(), tmp_path / "before")
    monkeypatch.setattr("zscl.methods.teacher_cache.FEATURES_VERSION", 1_000)
    monkeypatch.setattr("zscl.methods.distillation_texts.FEATURES_VERSION", 1_000)
    _, messages = run(experiment(), tmp_path / "after")
    assert "Teacher embedded 14 images, once" in notes(messages)
    assert "reference texts, once" in notes(messages)
    assert [len(list((tmp_path / "teacher").glob(f"{kind}-*"))) for kind in ("images", "texts")] == [2, 2]


def test_by_default_only_small_data_sets_are_embedded_ahead(
    experiment: Callable[..., Experiment], tmp_path: Path
) -> None:
    few = {"steps": 1, "warmup_steps": 1, "batch_size": 2, "reference_batch_size": 2, "learning_rate": 1e-3}
    _, messages = run(experiment(), tmp_path / "small/run")
    assert any(isinstance(message, ImagesEmbedded) for message in messages)
    _, messages = run(experiment(optimisation=few), tmp_path / "large/run")
    assert not any(isinstance(message, ImagesEmbedded) for message in messages)
    [folder] = (tmp_path / "large/teacher").glob("images-*")
    assert 0 < len(FeatureCache(folder, 14, 16, torch.float32).missing_indices()) < 14


def count_models_while_training(settings: Experiment, folder: Path) -> int:
    """Return the largest number of CLIP models that existed at the same time during training steps."""
    alive: list[int] = []

    def count(progress: BaseModel) -> None:
        if isinstance(progress, StepsTaken):
            gc.collect()
            alive.append(sum(type(thing) is open_clip.CLIP for thing in gc.get_objects()))

    gc.collect()
    gc.freeze()  # a million objects of libraries are neither collected nor counted
    try:
        run_sequence(settings, folder, report=count, device=CPU)
    finally:
        gc.unfreeze()
    return max(alive)


@pytest.mark.parametrize(
    ("method", "features", "models"),
    [
        ("finetune", "auto", 1),  # the student
        ("we+wc", "auto", 2),  # and its average
        ("zscl", "ahead", 2),  # both caches are filled: no teacher
        ("zscl", "never", 3),
        ("lwf", "auto", 2),
        ("wise-ft", "auto", 1),  # the anchor is read from disk after the stage
    ],
)
def test_models_in_memory_are_counted(
    experiment: Callable[..., Experiment], tmp_path: Path, method: str, features: str, models: int
) -> None:
    made = experiment(method=method, compute={"device": "cpu", "teacher_features": features})
    assert count_models_while_training(made, tmp_path / "run") == models


def uncompressed(colour: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (16, 16), (colour, 255 - colour, 99)).save(stream, "PNG", compress_level=0)
    return stream.getvalue()


def test_a_changed_image_of_the_same_size_is_embedded_again(
    experiment: Callable[..., Experiment], tmp_path: Path
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number in range(6):
        (images / f"{number}.png").write_bytes(uncompressed(40 * number))
    (images / "captions.txt").write_text("red\ngreen\nblue\n")

    def made(**changes: Any) -> Experiment:
        return experiment(reference=str(images), **changes)

    before, _ = run(made(), tmp_path / "a/first")
    size = (images / "3.png").stat().st_size
    (images / "3.png").write_bytes(uncompressed(7))
    assert (images / "3.png").stat().st_size == size
    stale, _ = run(made(), tmp_path / "a/second")
    fresh, _ = run(made(), tmp_path / "b/run")
    assert len(list((tmp_path / "a/teacher").glob("images-*"))) == 1  # the layout of the data set is the same
    assert stale != before
    for ours, theirs in zip(stale, fresh, strict=True):
        found, expected = ([line.split(",") for line in text.splitlines()[1:]] for text in (ours, theirs))
        for one, other in zip(found, expected, strict=True):
            assert [float(cell) for cell in one] == pytest.approx([float(cell) for cell in other], rel=2e-3, abs=1e-6)
