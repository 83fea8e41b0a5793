"""Checks at loading: names, packages, weights, and the features of both towers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.data import TINY_MODEL
from support.errors import refused
from torch import nn

from orchestrate.runs import preflight
from schemas.errors import ErrorCode
from schemas.experiment import Experiment, Model
from zscl.data.loader import Loader
from zscl.data.task import TaskFolder
from zscl.evaluation.zero_shot import compute_accuracies, embed_classes
from zscl.models import load_checks as model_checks
from zscl.models.clip import Clip, load_clip, load_weights
from zscl.sequence.run import run_sequence

CPU = torch.device("cpu")
WEIGHTS = "open_clip_model.safetensors"


@pytest.fixture
def folder(tiny_model: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model.removeprefix("local-dir:"), tmp_path / "clip"))


def model_in(folder: Path) -> Model:
    return Model(name=f"local-dir:{folder}")


def change(folder: Path, **weights: Callable[[torch.Tensor], torch.Tensor] | None) -> None:
    """Change weights of a model's folder by name (with __ for a dot), or remove them."""
    stored = load_file(folder / WEIGHTS)
    for name, changed in weights.items():
        name = name.replace("__", ".")
        if changed is None:
            del stored[name]
        else:
            stored[name] = changed(stored.get(name, torch.zeros(1))).contiguous()
    save_file(stored, folder / WEIGHTS)


def build_model(folder: Path, vision: Any = None, text: Any = None, **top: Any) -> Path:
    """Write a random model of another architecture."""
    config: dict[str, Any] = json.loads(json.dumps(TINY_MODEL))
    config["vision_cfg"] |= vision or {}
    config["text_cfg"] |= text or {}
    config |= top
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{folder}")
    save_file({name: weight.contiguous() for name, weight in model.state_dict().items()}, folder / WEIGHTS)
    return folder


def nan(weight: torch.Tensor) -> torch.Tensor:
    return weight * float("nan")


@pytest.mark.parametrize(
    ("changes", "code", "content"),
    [
        ({"visual__proj": nan}, ErrorCode.NOT_FINITE, "visual.proj"),
        ({"ln_final__bias": lambda weight: weight + float("inf")}, ErrorCode.NOT_FINITE, "ln_final.bias"),
        # A row of the table that hardly any text reads.
        (
            {"token_embedding__weight": lambda w: w.index_fill(0, torch.tensor([7]), float("nan"))},
            ErrorCode.NOT_FINITE,
            "token_embedding",
        ),
        ({"visual__proj": torch.zeros_like}, ErrorCode.UNSUPPORTED, "image tower"),
        ({"text_projection": torch.zeros_like}, ErrorCode.UNSUPPORTED, "text tower"),
        ({"visual__proj": lambda weight: weight + 3e38}, ErrorCode.NOT_FINITE, "image tower"),
        ({"logit_scale": lambda weight: weight + 1000}, ErrorCode.NOT_FINITE, "logit scale [inf]"),
    ],
)
def test_unusable_weights_and_features_are_refused(changes: Any, code: ErrorCode, content: str, folder: Path) -> None:
    change(folder, **changes)
    with refused(code, "model") as error:
        load_clip(model_in(folder))
    assert str(error.value).startswith(f"model: 'local-dir:{folder}'")
    assert content in str(error.value)


@pytest.mark.parametrize(
    ("architecture", "code", "content"),
    [
        (
            {"vision": {"attentional_pool": "parallel", "attn_pooler_heads": 2}},
            ErrorCode.UNSUPPORTED,
            "image tower returns",
        ),
        ({"vision": {"output_tokens": True}}, ErrorCode.UNSUPPORTED, "image tower fails on inputs of shape [2, 3, 16,"),
        ({"vision": {"pool_type": "none"}}, ErrorCode.UNSUPPORTED, "image tower returns torch.float32 of shape [2, 5,"),
        ({"text": {"output_tokens": True}, "custom_text": True}, ErrorCode.UNSUPPORTED, "text tower fails on inputs"),
        ({"text": {"pool_type": "none"}}, ErrorCode.UNSUPPORTED, "text tower returns torch.float32 of shape [2, 12,"),
        ({"text": {"pool_type": "first"}}, ErrorCode.UNSUPPORTED, "text tower returns the same features"),
        ({"text": {"vocab_size": 1000}}, ErrorCode.MISMATCH, "token id 49407, but the model has 1000"),
    ],
)
def test_features_of_another_shape_are_refused(
    architecture: Any, code: ErrorCode, content: str, tmp_path: Path
) -> None:
    with refused(code, "model") as error:
        load_clip(model_in(build_model(tmp_path / "model", **architecture)))
    assert content in str(error.value)


@pytest.mark.parametrize(
    "architecture",
    [
        {"custom_text": True},
        {"text": {"pool_type": "last"}},
        {"vision": {"pool_type": "avg"}},
        {"vision": {"attentional_pool": True, "attn_pooler_heads": 2}},
        {"init_logit_bias": -10},
        {
            "custom_text": True,
            "vision": {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
            "text": {"embed_cls": True, "output_tokens": True},
            "multimodal_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
        },  # CoCa
    ],
)
def test_other_architectures_load(architecture: Any, tmp_path: Path) -> None:
    clip = load_clip(model_in(build_model(tmp_path / "model", **architecture)))
    assert clip.model.training


def test_towers_of_different_widths_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = load_clip(model_in(folder))

    class Narrow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logit_scale = nn.Parameter(torch.ones([]))

        def encode_image(self, images: torch.Tensor, normalize: bool) -> torch.Tensor:
            return torch.eye(len(images), 8)

        def encode_text(self, tokens: torch.Tensor, normalize: bool) -> torch.Tensor:
            return torch.eye(len(tokens), 4)

    narrow = Clip(Narrow(), clip.tokenizer, clip.train_transform, clip.evaluation_transform, {})
    with refused(ErrorCode.MISMATCH, "model") as error:
        model_checks.check_features(narrow.model, narrow.tokenizer, narrow.evaluation_transform, "it", CPU)
    assert "width 8 and text features of width 4" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "differences"),
    [
        ({"visual__proj": None, "ln_final__bias": None}, "2 missing: visual.proj, ln_final.bias"),
        ({"visual__head": torch.ones_like}, "1 unexpected: visual.head"),
        ({"visual__proj": lambda weight: weight[:, :8]}, "visual.proj [16, 8] instead of [16, 16]"),
        ({"visual__proj": lambda weight: weight.T[:8].T}, "1 of another shape: visual.proj"),
        ({"positional_embedding": lambda weight: weight[:, :8]}, "positional_embedding [12, 8] instead of [12, 16]"),
    ],
)
def test_weights_that_do_not_fit_are_named(changes: Any, differences: str, folder: Path, tmp_path: Path) -> None:
    change(folder, **changes)
    with refused(ErrorCode.MISMATCH, "model") as error:
        load_clip(model_in(folder))
    assert differences in str(error.value)
    complete = load_clip(Model(name=f"local-dir:{build_model(tmp_path / 'complete')}"))
    with refused(ErrorCode.MISMATCH) as error:
        load_weights(complete.model, folder)
    assert differences in str(error.value)
    assert f"{folder / WEIGHTS}: " in str(error.value)


def test_a_weights_file_of_another_architecture_is_named(folder: Path) -> None:
    config = json.loads(json.dumps(TINY_MODEL))
    config["vision_cfg"]["layers"] = 2
    (folder / "deeper-in-this-test.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "deeper-in-this-test.json")
    with refused(ErrorCode.MISMATCH, "model") as error:
        load_clip(Model(name="deeper-in-this-test", pretrained=str(folder / WEIGHTS)))
    assert "deeper-in-this-test (12 missing: visual." in str(error.value)


def test_a_model_that_needs_transformers_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_checks.importlib.util, "find_spec", lambda name: None)
    file = folder / "open_clip_config.json"
    config = json.loads(file.read_text())
    config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "timm/ViT-B-16-SigLIP"
    file.write_text(json.dumps(config))
    with refused(ErrorCode.MISSING_PACKAGE, "model") as error:
        load_clip(model_in(folder))
    assert "pip install 'zscl[hf]'" in str(error.value)
    with refused(ErrorCode.MISSING_PACKAGE, "model") as error:
        model_checks.check_packages(open_clip.get_model_config("roberta-ViT-B-32"), "roberta-ViT-B-32", "it")
    assert "its text tower" in str(error.value)
    model_checks.check_packages(open_clip.get_model_config("ViT-B-32"), "local-dir:/siglip/clip", "it")


@pytest.mark.parametrize(
    ("model", "call"),
    [
        (Model(name="ViT-B-32-quickgelu", pretrained="openai"), "('ViT-B-32-quickgelu', pretrained='openai')"),
        (Model(name="hf-hub:somebody/something"), "('hf-hub:somebody/something')"),
    ],
)
def test_weights_that_cannot_be_downloaded_are_refused_at_once(
    model: Model, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    unreachable = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", unreachable)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with refused(ErrorCode.UNREACHABLE, "model") as error:
        load_clip(model)
    message = str(error.value)
    assert f"open_clip.create_model{call}" in message
    assert f"copy its folder {tmp_path} here" in message
    assert message.endswith("refused)")  # the complete cause
    assert "Retrying" not in caplog.text


def test_features_with_nan_are_not_evaluated(folder: Path, tasks: list[str]) -> None:
    clip, task = load_clip(model_in(folder)), TaskFolder.open(open_experiment_task(tasks[0]))
    with torch.no_grad():
        clip.model.visual.proj.fill_(float("nan"))  # type: ignore[union-attr, operator]
    heads = embed_classes(clip, [task], "all", "fp32", CPU)
    with refused(ErrorCode.NOT_FINITE, "model"):
        compute_accuracies(clip, task, heads, Loader(CPU))
    with torch.no_grad():
        clip.model.text_projection.fill_(float("nan"))  # type: ignore[union-attr, operator]
    with refused(ErrorCode.NOT_FINITE, "model") as error:
        embed_classes(clip, [task], "all", "fp32", CPU)
    assert "task 'first'" in str(error.value)


def open_experiment_task(path: str) -> Any:
    from schemas.data import Task

    return Task.model_validate(path)


def test_every_command_refuses_a_model_with_nan(
    folder: Path, experiment: Callable[..., Experiment], zscl: Callable[..., Any], tasks: list[str], tmp_path: Path
) -> None:
    change(folder, visual__proj=nan)
    settings = experiment(model=f"local-dir:{folder}", method="zero-shot")
    for command in (lambda: run_sequence(settings, tmp_path / "run", device=CPU), lambda: preflight.prepare(settings)):
        with refused(ErrorCode.NOT_FINITE, "model"):
            command()
    result = zscl("evaluate", folder, "--task", tasks[0], "--offline", "--out", tmp_path / "out")
    assert (result.code, result.error.count("found NaN or Inf in its weights")) == (2, 1)


def test_blocks_that_cannot_be_checkpointed_are_refused(experiment: Callable[..., Experiment], tmp_path: Path) -> None:
    custom = {"block_type": "custom", "qk_norm": True}
    model = build_model(tmp_path / "model", vision=custom, text=custom, custom_text=True)
    settings = experiment(
        model=f"local-dir:{model}", method="finetune", compute={"device": "cpu", "gradient_checkpointing": True}
    )
    with refused(ErrorCode.UNSUPPORTED, "compute.gradient_checkpointing"):
        preflight.prepare(settings)
    with refused(ErrorCode.UNSUPPORTED, "compute.gradient_checkpointing"):
        run_sequence(settings, tmp_path / "run", device=CPU)
