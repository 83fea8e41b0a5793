"""Untrusted files: pickles in weights, shards and caches are never unpickled, and decoders are limited."""

import io
import json
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from support.data import TINY_MODEL, coloured_images, make_task
from support.errors import refused

from schemas.data import Task
from schemas.errors import ErrorCode, InputError
from schemas.experiment import Experiment, Model
from zscl.data.decode import Decoder
from zscl.data.indexed import IndexedSamples
from zscl.data.loader import EvaluationImages, TrainingImages
from zscl.data.shard_urls import open_samples
from zscl.data.streaming import StreamedSamples
from zscl.data.task import TaskFolder
from zscl.methods.distillation_texts import embed_texts
from zscl.methods.teacher_cache import FeatureCache, open_feature_cache
from zscl.models.clip import load_clip, weights_digest
from zscl.sequence.resolve import resolve
from zscl.sequence.run import run_sequence

CPU = torch.device("cpu")
WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
    "model.safetensors",
    "pytorch_model.bin",
    "x.pth",
)


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.mark,)


@pytest.fixture
def evil(tmp_path: Path) -> Any:
    """An object that must not be unpickled; checked at the end of the test."""
    mark = tmp_path / "was-run"
    pickle.loads(pickle.dumps(Evil(mark)))
    assert mark.exists()  # unpickling is detected
    mark.unlink()
    yield Evil(mark)
    assert not mark.exists()


def pickled(evil: Evil, way: str) -> bytes:
    """Return a file that runs code when it is unpickled, as different libraries write it."""
    stream = io.BytesIO()
    match way:
        case "pickle":
            pickle.dump(evil, stream)
        case "old pickle":
            pickle.dump(evil, stream, protocol=0)
        case "torch":
            torch.save({"state_dict": {"weight": evil}}, stream)
        case "old torch":
            torch.save({"state_dict": {"weight": evil}}, stream, _use_new_zipfile_serialization=False)
        case "npy":
            np.save(stream, np.array([evil], dtype=object), allow_pickle=True)
        case "npz":
            np.savez(stream, **{"params/img/embedding/kernel": np.array([evil], dtype=object)})
        case "archive":  # a torch file whose very first record is the pickle
            with zipfile.ZipFile(stream, "w") as archive:
                archive.writestr("archive/data.pkl", pickle.dumps(evil))
                archive.writestr("archive/version", "3")
    return stream.getvalue()


WAYS = ("pickle", "old pickle", "torch", "old torch", "npy", "npz", "archive")


@pytest.mark.parametrize("unsafe", [False, True])
@pytest.mark.parametrize("suffix", ["pt", "pth", "bin", "npy", "npz", "safetensors"])
def test_a_pickle_for_pretrained_weights_is_refused(
    evil: Evil, tmp_path: Path, suffix: str, unsafe: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if unsafe:  # users may have set it for other programs
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    (tmp_path / "tiny-of-this-test.json").write_text(json.dumps(TINY_MODEL))
    open_clip.add_model_config(tmp_path / "tiny-of-this-test.json")
    file = tmp_path / f"weights.{suffix}"
    for way in WAYS:
        file.write_bytes(pickled(evil, way))
        with refused(ErrorCode.UNREADABLE, "model") as error:
            load_clip(Model(name="tiny-of-this-test", pretrained=str(file)))
        assert str(file) in str(error.value)


def test_a_second_attempt_to_load_a_torch_file_does_not_unpickle(
    evil: Evil, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    (tmp_path / "tiny-of-this-test.json").write_text(json.dumps(TINY_MODEL))
    open_clip.add_model_config(tmp_path / "tiny-of-this-test.json")
    (tmp_path / "weights.pt").write_bytes(pickled(evil, "torch"))
    original = torch.load

    def failing_once(*arguments: Any, **options: Any) -> Any:
        if options.pop("weights_only", None) is not None:
            raise TypeError("no such option")  # open_clip then tries again without it
        return original(*arguments, **options)

    monkeypatch.setattr(torch, "load", failing_once)
    with refused(ErrorCode.UNREADABLE, "model"):
        load_clip(Model(name="tiny-of-this-test", pretrained=str(tmp_path / "weights.pt")))


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("has_weights", [False, True])
def test_a_pickle_in_an_open_clip_folder_is_refused(
    evil: Evil, tmp_path: Path, tiny_model: str, name: str, has_weights: bool
) -> None:
    valid = Path(tiny_model.removeprefix("local-dir:"))
    folder = tmp_path / "clip"
    folder.mkdir()
    (folder / "open_clip_config.json").write_bytes((valid / "open_clip_config.json").read_bytes())
    if has_weights and not name.endswith("safetensors"):  # valid weights, whose name open_clip does not try first
        (folder / "weights.safetensors").write_bytes((valid / "open_clip_model.safetensors").read_bytes())
    for way in WAYS:
        (folder / name).write_bytes(pickled(evil, way))
        with pytest.raises(InputError, match=rf"model: 'local-dir:{folder}'.* expected"):
            load_clip(Model(name=f"local-dir:{folder}"))


def test_pickles_next_to_the_weights_are_ignored(evil: Evil, tmp_path: Path, tiny_model: str) -> None:
    folder = tmp_path / "clip"
    folder.mkdir()
    for file in Path(tiny_model.removeprefix("local-dir:")).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    for name in WEIGHTS[1:]:
        if not name.endswith("safetensors"):
            (folder / name).write_bytes(pickled(evil, "torch"))
    model = Model(name=f"local-dir:{folder}")
    assert len(weights_digest(model)) == 64
    assert load_clip(model).config["embed_dim"] == 16


def test_a_tokenizer_that_brings_code_is_refused(tmp_path: Path, tiny_model: str) -> None:
    folder = tmp_path / "clip"
    folder.mkdir()
    for file in Path(tiny_model.removeprefix("local-dir:")).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"trust_remote_code": True}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with refused(ErrorCode.UNREADABLE, "model") as error:
        load_clip(Model(name=f"local-dir:{folder}"))
    assert "trust_remote_code" in str(error.value)


@pytest.mark.parametrize("way", WAYS)
def test_a_pickle_in_the_store_of_text_embeddings_is_recomputed(evil: Evil, tmp_path: Path, way: str) -> None:
    class Teacher(torch.nn.Module):
        def encode_text(self, tokens: torch.Tensor, normalize: bool) -> torch.Tensor:
            return torch.ones(len(tokens), 4)

    notes: list[str] = []
    tokens = torch.arange(6).view(3, 2)

    def embedded() -> torch.Tensor:
        return embed_texts(tokens, Teacher, tmp_path / "teacher", "weights", CPU, notes.append)

    first = embedded()
    [file] = (tmp_path / "teacher").iterdir()
    file.write_bytes(pickled(evil, way))
    assert torch.equal(embedded(), first)
    assert f"{file}: found no embeddings of 3 texts" in notes[1]
    notes.clear()
    assert torch.equal(embedded(), first)
    assert notes == []


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["features.npy", "checks.npy"])
def test_a_pickle_in_the_store_of_image_features_is_recomputed(
    evil: Evil, tmp_path: Path, tiny_model: str, tasks: list[str], way: str, name: str
) -> None:
    clip, images = load_clip(Model(name=tiny_model)), open_samples([f"{tasks[0]}/train"])
    assert isinstance(images, IndexedSamples)

    def store() -> FeatureCache | None:
        return open_feature_cache(tmp_path / "teacher", clip, "weights", "fp32", images, 16, lambda note: None)

    first = store()
    assert first is not None
    first.write(torch.tensor([[0, 1]]), torch.ones(1, 16))
    (first.folder / name).write_bytes(pickled(evil, way))
    again = store()
    assert again is not None
    assert again.missing_indices() == list(range(len(images)))


@pytest.fixture
def poisoned(evil: Evil, tmp_path: Path) -> Path:
    """A task of six samples whose shards hold pickles as images, labels, texts and other members."""
    folder = make_task(tmp_path / "task", seed=0, train=6, test=6, shard_images=6)
    (folder / "zscl.json").unlink()
    images = [image for image, _ in coloured_images(6, 0)]
    evils = [pickled(evil, way) for way in WAYS]
    samples: list[dict[str, bytes]] = [
        {"png": images[0], "cls": b"0", "txt": b"one"},
        {"png": evils[0], "cls": b"1", "txt": b"two"},
        {"jpg": evils[2], "cls": b"1", "txt": b"three"},
        {"png": images[3], "cls": evils[1], "txt": b"four"},
        {"png": images[4], "cls": b"0", "txt": evils[1]},
        {"png": images[5], "cls": b"1", **dict.fromkeys(("pkl", "pickle", "pyd", "pth", "pt", "npy", "npz"), evils[0])},
    ]  # fmt: skip
    for split in ("train", "test"):
        with tarfile.open(folder / split / "0.tar", "w") as tar:
            for number, sample in enumerate(samples):
                for suffix, content in sample.items():
                    info = tarfile.TarInfo(f"{number}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return folder


@pytest.mark.parametrize("where", ["local", "file", "memory", "cached"])
def test_pickles_in_shards_are_broken_samples_or_ignored(poisoned: Path, tmp_path: Path, where: str) -> None:
    shard = poisoned / "train/0.tar"
    task = TaskFolder.open(Task.model_validate(str(poisoned)))
    if where == "memory":
        with fsspec.open("memory://poisoned/0.tar", "wb") as stream:
            stream.write(shard.read_bytes())
    location = {"local": str(shard), "memory": "memory://poisoned/0.tar"}.get(where, f"file://{shard}")
    samples = open_samples([location], str(tmp_path / "cache") if where == "cached" else None)
    assert isinstance(samples, StreamedSamples if where in ("file", "memory") else IndexedSamples)
    decoder = Decoder(lambda image: torch.tensor(image.size), task.get_label)
    items = list(EvaluationImages(samples, decoder, 0, 1)())
    assert [item[1] for item in items if not isinstance(item, str)] == [0, 0, 1]
    messages = [item for item in items if isinstance(item, str)]
    assert ["'1'" in messages[0], "'2'" in messages[1], "'3'" in messages[2]] == [True] * 3
    assert ["no readable image" in message for message in messages] == [True, True, False]
    assert "has the label" in messages[2]
    assert all(len(message) < 500 and "0.tar: sample" in message for message in messages)
    assert len(list(islice(TrainingImages(samples, decoder, 0, 2, range(2))(), 30))) == 30
    assert "one" in list(samples.iter_texts())


def test_a_run_on_poisoned_shards_is_refused_or_skips_them(
    poisoned: Path, experiment: Callable[..., Experiment], tmp_path: Path
) -> None:
    settings = {"tasks": [str(poisoned)], "method": "finetune"}
    with refused(ErrorCode.BROKEN_SAMPLES, "compute.max_broken_share") as error:
        run_sequence(experiment(**settings), tmp_path / "runs/strict", device=CPU)
    assert "0.tar: sample '1' is no readable image" in str(error.value)
    tolerant = experiment(**settings, compute={"device": "cpu", "max_broken_share": 0.9})
    result = run_sequence(tolerant, tmp_path / "runs/tolerant", device=CPU)
    assert [task.test_images for task in result.tasks] == [3]
    assert resolve(tolerant).fingerprint == result.fingerprint


def test_images_that_start_programs_or_fill_memory_are_broken_samples(tmp_path: Path) -> None:
    decoder = Decoder(lambda image: torch.zeros(1), lambda sample: 0)
    strip = io.BytesIO()
    Image.new("RGB", (20_000, 1)).save(strip, "PNG")
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) (w) file\n"  # PIL would start Ghostscript
    for name, content in (("strip.png", strip.getvalue()), ("script.png", postscript)):
        (tmp_path / name).write_bytes(content)
    messages = [str(item) for item in EvaluationImages(open_samples([str(tmp_path)]), decoder, 0, 1)()]
    assert f"found {len(postscript)} bytes of no known format" in messages[0]
    assert "found 20000 x 1 pixels, expected an aspect ratio of at most 100" in messages[1]
