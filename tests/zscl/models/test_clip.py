"""Loading and saving of models, and their identity."""

import json
import shutil
from pathlib import Path

import open_clip
import pytest
import torch
from support.errors import refused

from schemas.errors import ErrorCode
from schemas.experiment import Model
from zscl.models.clip import has_no_deterministic_kernel, load_clip, weights_digest


@pytest.fixture
def folder(tiny_model: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model.removeprefix("local-dir:"), tmp_path / "clip"))


def model_in(folder: Path) -> Model:
    return Model(name=f"local-dir:{folder}")


def test_a_saved_model_is_what_open_clip_loads(folder: Path, tmp_path: Path) -> None:
    clip = load_clip(model_in(folder))
    with torch.no_grad():
        next(clip.model.parameters()).add_(1.0)
    clip.save(clip.model, tmp_path / "saved")
    loaded, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}/saved")
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), clip.model.state_dict().values(), strict=True)
    )
    assert str(transform) == str(clip.evaluation_transform)
    assert torch.equal(
        open_clip.get_tokenizer(f"local-dir:{tmp_path}/saved")(["a red cat"]), clip.tokenizer(["a red cat"])
    )


def test_the_embedded_model_is_an_open_clip_folder() -> None:
    clip = load_clip(Model(name="embedded"))
    assert clip.tokenizer(["a photo"]).shape == (1, 16)
    assert next(clip.model.parameters()).dtype == torch.float32


def test_the_digest_follows_weights_and_configuration(folder: Path, tmp_path: Path) -> None:
    before = weights_digest(model_in(folder))
    assert weights_digest(model_in(Path(shutil.copytree(folder, tmp_path / "elsewhere")))) == before
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["preprocess_cfg"]["mean"] = [0.4] * 3
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    assert weights_digest(model_in(folder)) != before
    assert weights_digest(Model(name="ViT-B-32", pretrained="openai")) != before


@pytest.mark.parametrize(
    ("model", "code", "field", "content"),
    [
        (Model(name="ViT-B-33", pretrained="openai"), ErrorCode.UNKNOWN_NAME, "model.name", "'ViT-B-32'"),
        (Model(name="vit-l-14-336", pretrained="openai"), ErrorCode.UNKNOWN_NAME, "model.name", "'ViT-L-14-336'"),
        (Model(name="ViT-B/32", pretrained="opena1"), ErrorCode.UNKNOWN_NAME, "model.pretrained", "mean 'openai'"),
        (Model(name="ViT-B-32", pretrained="nowhere"), ErrorCode.UNKNOWN_NAME, "model.pretrained", "'nowhere'"),
        (Model(name="local-dir:/no/such/folder"), ErrorCode.NOT_FOUND, "model", "/no/such/folder"),
    ],
)
def test_an_unknown_model_is_refused(model: Model, code: ErrorCode, field: str, content: str) -> None:
    with refused(code, field) as error:
        load_clip(model)
    assert content in str(error.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("open_clip_model.safetensors", b"not weights"),
        ("open_clip_config.json", b"{"),
        ("open_clip_config.json", b"{}"),
    ],
)
def test_an_unreadable_model_is_refused(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    with refused(ErrorCode.UNREADABLE, "model"):
        load_clip(model_in(folder))


def test_refuses_pickled_weights(folder: Path) -> None:
    (folder / "open_clip_model.safetensors").unlink()
    torch.save({"weights": torch.zeros(1)}, folder / "open_clip_pytorch_model.bin")
    with refused(ErrorCode.NOT_FOUND, "model"):
        load_clip(model_in(folder))


def test_refuses_a_model_that_normalises_over_the_batch(folder: Path) -> None:
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"] = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    from safetensors.torch import save_file

    model = open_clip.CLIP(**config["model_cfg"])
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    with refused(ErrorCode.UNSUPPORTED, "model"):
        load_clip(model_in(folder))


def test_an_operation_without_a_deterministic_kernel_is_recognised() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError) as raised:
            torch.zeros(2).put_(torch.tensor([0]), torch.tensor([1.0]))
    finally:
        torch.use_deterministic_algorithms(False)
    assert has_no_deterministic_kernel(raised.value)
    assert not has_no_deterministic_kernel(RuntimeError("CUDA out of memory"))
