"""The store of the teacher's image features: what is in it counts only for the very image, whole."""

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
from torch import nn

from schemas.errors import InputError
from schemas.events import ImagesEmbedded, Note, StepsTaken
from schemas.experiment import Experiment
from zscl.methods.teacher_cache import (
    CHECKS,
    FEATURES,
    FeatureStore,
    StoredFeatures,
    _open_or_replace,
    build_encoder,
    share_drawn,
)
from zscl.sequence.run import run_sequence

CPU = torch.device("cpu")
IDENTITIES = torch.tensor([[2, 1_000], [0, 2**55 + 3]])


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    return FeatureStore(tmp_path / "store", count=5, width=3, dtype=torch.float32)


def test_gives_back_what_was_stored_and_says_what_it_lacks(store: FeatureStore) -> None:
    features = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    assert not store.read(IDENTITIES)[1].any()
    store.write(IDENTITIES, features)
    for opened in (store, FeatureStore(store.folder, 5, 3, torch.float32)):
        found, known = opened.read(IDENTITIES)
        assert torch.equal(found, features)
        assert known.all()
        assert opened.missing() == [1, 3, 4]


def test_another_image_in_the_same_place_is_unknown(store: FeatureStore) -> None:
    store.write(IDENTITIES, torch.ones(2, 3))
    assert store.read(torch.tensor([[2, 1_001], [0, 2**55 + 3]]))[1].tolist() == [False, True]
    store.write(torch.tensor([[2, 1_001]]), torch.zeros(1, 3))
    found, known = store.read(torch.tensor([[2, 1_001]]))
    assert (known.tolist(), found.tolist()) == ([True], [[0.0, 0.0, 0.0]])


@pytest.mark.parametrize("name", [FEATURES, CHECKS])
def test_a_row_half_written_is_unknown(store: FeatureStore, name: str) -> None:
    store.write(IDENTITIES, torch.ones(2, 3))
    array = np.load(store.folder / name, mmap_mode="r+")
    array.view(np.uint8)[2, -1] ^= 1  # of the first one's row
    array.flush()
    assert store.read(IDENTITIES)[1].tolist() == [False, True]


def test_two_that_make_one_store_share_it(tmp_path: Path) -> None:
    first, second = (FeatureStore(tmp_path / "store", 5, 3, torch.float64) for _ in range(2))
    first.write(IDENTITIES, torch.ones(2, 3, dtype=torch.float64))
    assert second.read(IDENTITIES)[1].all()
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


class Tower(nn.Module):
    """An image tower whose features are the images' pixels."""

    def encode_image(self, images: torch.Tensor, normalize: bool) -> torch.Tensor:
        return images.flatten(1)


def test_encoding_does_not_wait_for_the_device() -> None:
    """A tensor on the meta device has no content that could be read."""
    features = build_encoder(Tower, "fp32")(torch.empty(2, 3, 1, 1, device="meta"))
    assert features.shape == (2, 3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_never_stored(store: FeatureStore, value: float) -> None:
    features = StoredFeatures(store, build_encoder(Tower, "fp32"), pytest.fail)
    images = torch.ones(2, 3, 1, 1)
    images[1, 0] = value
    with pytest.raises(InputError, match="the teacher gives reference images features that are NaN or Inf"):
        features(images, IDENTITIES)
    assert store.missing() == list(range(5))


def test_a_full_disk_is_said_once_and_changes_nothing(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path / "store", count=100, width=64, dtype=torch.float32)
    said: list[str] = []
    features = StoredFeatures(store, lambda images: images.flatten(1)[:, :64], said.append)
    images = torch.rand(3, 3, 8, 8)
    identities = torch.tensor([[97, 5], [98, 6], [99, 7]])
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, limit[1]))
    try:
        found = [features(images, identities) for _ in range(2)]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert all(torch.equal(each, images.flatten(1)[:, :64]) for each in found)
    assert len(said) == 1
    assert "no longer stored" in said[0]


def test_a_broken_reference_image_is_borne_in_every_stage_and_run(
    experiment: Callable[..., Experiment], tmp_path: Path
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number in range(30):
        (images / f"{number}.png").write_bytes(uncompressed(8 * number) if number else b"no image")
    (images / "captions.txt").write_text("red\ngreen\nblue\n")
    compute = {"device": "cpu", "teacher_features": "ahead", "max_broken_share": 0.05}
    for folder in ("first", "again"):
        _, said = run(experiment(reference=str(images), compute=compute), tmp_path / folder)
        assert "images/0.png: sample" in notes(said) or "sample '0' is no readable image" in notes(said)
    [store] = (tmp_path / "teacher").glob("images-*")
    assert FeatureStore(store, 30, 16, torch.float32).missing() == [0]


def test_a_store_that_cannot_be_made_is_done_without(experiment: Callable[..., Experiment], tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/teacher").write_text("in the way")
    found, said = run(experiment(), tmp_path / "a/run")
    assert "teacher features are not stored" in notes(said)
    assert "teacher embeddings of texts are not stored" in notes(said)
    never = experiment(compute={"device": "cpu", "teacher_features": "never"})
    assert found == run(never, tmp_path / "b/run")[0]


def test_a_damaged_store_is_made_again(experiment: Callable[..., Experiment], tmp_path: Path) -> None:
    before, _ = run(experiment(), tmp_path / "first")
    [folder] = (tmp_path / "teacher").glob("images-*")
    for damage in (lambda: (folder / FEATURES).unlink(), lambda: (folder / CHECKS).write_bytes(b"")):
        damage()
        again, said = run(experiment(), tmp_path / f"again-{len(list(tmp_path.iterdir()))}")
        assert "Teacher embedded 14 images, once" in notes(said)
        assert again == before


def rows_in(folder: Path) -> int:
    return 5 - len(FeatureStore(folder, 5, 3, torch.float32).missing())


@pytest.mark.parametrize("name", ["ESTALE", "EIO", "EACCES", "ENOMEM", "EMFILE"])
@pytest.mark.parametrize("times", [1, 1_000])
def test_a_store_that_cannot_be_opened_keeps_its_rows(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch, name: str, times: int
) -> None:
    store.write(IDENTITIES, torch.ones(2, 3))
    said, failures = list[str](), iter(range(times))

    def failing(*given: Any, **named: Any) -> Any:
        for _ in failures:
            raise OSError(getattr(errno, name), name)
        return open_memmap(*given, **named)

    with monkeypatch.context() as patch:
        patch.setattr("zscl.methods.teacher_cache.open_memmap", failing)
        patch.setattr("zscl.methods.teacher_cache.OPEN_SECONDS", 0.2)
        opened = _open_or_replace(store.folder, 5, 3, torch.float32, said.append)
    waits = name in ("ESTALE", "EIO") and times == 1
    assert (opened is not None) == waits
    assert (said == []) == waits
    assert all("teacher features are not stored" in each for each in said)
    assert rows_in(store.folder) == 2
    assert [path.name for path in store.folder.parent.iterdir()] == [store.folder.name]


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda store: (store / CHECKS).write_bytes(b""), "magic"),
        (lambda store: (store / FEATURES).write_bytes(b"something else, and longer than a header"), "magic"),
        (lambda store: (store / FEATURES).write_bytes((store / FEATURES).read_bytes()[:-1]), "length"),
        (lambda store: (store / CHECKS).unlink(), "checks.npy is missing"),
        (lambda store: np.save(store / FEATURES, np.zeros((4, 3), dtype=np.float32)), r"shape \(4, 3\)"),
    ],
)
def test_a_damaged_store_is_set_aside(store: FeatureStore, spoil: Callable[[Path], object], reason: str) -> None:
    store.write(IDENTITIES, torch.ones(2, 3))
    spoil(store.folder)
    said: list[str] = []
    assert _open_or_replace(store.folder, 5, 3, torch.float32, said.append) is not None
    assert rows_in(store.folder) == 0
    [aside] = store.folder.parent.glob(f"damaged-*-{store.folder.name}")
    assert (aside / FEATURES).is_file()
    [note] = said
    assert re.search(reason, note)
    assert aside.name in note


def test_how_much_of_a_set_a_run_meets() -> None:
    assert share_drawn(100, [50]) == pytest.approx(0.5)
    assert share_drawn(100, [50, 50]) == pytest.approx(0.75)
    assert share_drawn(100, [150, 1]) == 1.0
    assert share_drawn(1_281_167, [64_000] * 11) == pytest.approx(0.43, abs=0.01)  # MTIL over ImageNet


def losses(folder: Path) -> list[str]:
    return [file.read_text() for file in sorted(folder.glob("stages/*/losses.csv"))]


def run(made: Experiment, folder: Path) -> tuple[list[str], list[BaseModel]]:
    said: list[BaseModel] = []
    run_sequence(made, folder, report=said.append, device=CPU)
    return losses(folder), said


def notes(said: list[BaseModel]) -> str:
    return "\n".join(each.text for each in said if isinstance(each, Note))


def test_ahead_as_met_and_never_give_the_same_run(experiment: Callable[..., Experiment], tmp_path: Path) -> None:
    found = {}
    for way in ("never", "as_met", "ahead"):
        made = experiment(compute={"device": "cpu", "teacher_features": way})
        found[way], said = run(made, tmp_path / way / "run")
        stores = list((tmp_path / way / "teacher").glob("images-*"))
        assert len(stores) == (way != "never")
        assert any(isinstance(each, ImagesEmbedded) for each in said) == (way == "ahead")
        assert ("Teacher embedded 14 images, once" in notes(said)) == (way == "ahead")
        if stores:
            assert FeatureStore(stores[0], 14, 16, torch.float32).missing() == []

    def numbers(text: list[str]) -> list[float]:
        return [float(cell) for part in text for line in part.splitlines()[1:] for cell in line.split(",")]

    for way in ("as_met", "ahead"):  # to round-off: the teacher sees the images in other batches
        assert numbers(found[way]) == pytest.approx(numbers(found["never"]), rel=2e-3, abs=1e-6)


def test_features_of_another_version_of_the_computation_are_not_used(
    experiment: Callable[..., Experiment], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(experiment(), tmp_path / "before")
    monkeypatch.setattr("zscl.methods.teacher_cache.FEATURES_VERSION", 1_000)
    monkeypatch.setattr("zscl.methods.distillation_texts.FEATURES_VERSION", 1_000)
    _, said = run(experiment(), tmp_path / "behind")
    assert "Teacher embedded 14 images, once" in notes(said)
    assert "reference texts, once" in notes(said)
    assert [len(list((tmp_path / "teacher").glob(f"{kind}-*"))) for kind in ("images", "texts")] == [2, 2]


def test_by_default_a_small_set_is_embedded_ahead_and_a_large_one_as_it_is_met(
    experiment: Callable[..., Experiment], tmp_path: Path
) -> None:
    few = {"steps": 1, "warmup_steps": 1, "batch_size": 2, "reference_batch_size": 2, "learning_rate": 1e-3}
    _, said = run(experiment(), tmp_path / "small/run")
    assert any(isinstance(each, ImagesEmbedded) for each in said)
    _, said = run(experiment(optimisation=few), tmp_path / "large/run")
    assert not any(isinstance(each, ImagesEmbedded) for each in said)
    [folder] = (tmp_path / "large/teacher").glob("images-*")
    assert 0 < len(FeatureStore(folder, 14, 16, torch.float32).missing()) < 14


def models_alive_while_training(made: Experiment, folder: Path) -> int:
    """Most CLIP models there were at once while steps were taken."""
    alive: list[int] = []

    def count(progress: BaseModel) -> None:
        if isinstance(progress, StepsTaken):
            gc.collect()
            alive.append(sum(type(each) is open_clip.CLIP for each in gc.get_objects()))

    gc.collect()
    gc.freeze()  # what there is already, a million objects of libraries, is neither collected nor counted
    try:
        run_sequence(made, folder, report=count, device=CPU)
    finally:
        gc.unfreeze()
    return max(alive)


@pytest.mark.parametrize(
    ("method", "features", "models"),
    [
        ("finetune", "auto", 1),  # the student
        ("we+wc", "auto", 2),  # and its average
        ("zscl", "ahead", 2),  # with both stores filled, no teacher
        ("zscl", "never", 3),
        ("lwf", "auto", 2),
        ("wise-ft", "auto", 1),  # the anchor is read from disk after the stage
    ],
)
def test_models_in_memory_are_counted(
    experiment: Callable[..., Experiment], tmp_path: Path, method: str, features: str, models: int
) -> None:
    made = experiment(method=method, compute={"device": "cpu", "teacher_features": features})
    assert models_alive_while_training(made, tmp_path / "run") == models


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
    assert len(list((tmp_path / "a/teacher").glob("images-*"))) == 1  # nothing in the set's layout tells
    assert stale != before
    for ours, theirs in zip(stale, fresh, strict=True):
        found, expected = ([line.split(",") for line in text.splitlines()[1:]] for text in (ours, theirs))
        for one, other in zip(found, expected, strict=True):
            assert [float(cell) for cell in one] == pytest.approx([float(cell) for cell in other], rel=2e-3, abs=1e-6)
