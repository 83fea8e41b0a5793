"""What is looked at when a model is loaded: names, packages, weights, and the features of both towers."""

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
from torch import nn

from orchestrate.runs import preflight
from schemas.errors import InputError
from schemas.experiment import Experiment, Model
from zscl.data.loader import Loader
from zscl.data.task import TaskFolder
from zscl.evaluation.zero_shot import accuracies, embed_classes
from zscl.models import load_checks as model_checks
from zscl.models.clip import Clip, load_clip, load_weights
from zscl.sequence.run import run_sequence

CPU = torch.device("cpu")
WEIGHTS = "open_clip_model.safetensors"


@pytest.fixture
def folder(tiny_model: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model.removeprefix("local-dir:"), tmp_path / "clip"))


def named(folder: Path) -> Model:
    return Model(name=f"local-dir:{folder}")


def change(folder: Path, **weights: Callable[[torch.Tensor], torch.Tensor] | None) -> None:
    """Change weights of a model's folder by name (with __ for a dot), or leave them out."""
    held = load_file(folder / WEIGHTS)
    for name, changed in weights.items():
        name = name.replace("__", ".")
        if changed is None:
            del held[name]
        else:
            held[name] = changed(held.get(name, torch.zeros(1))).contiguous()
    save_file(held, folder / WEIGHTS)


def built(folder: Path, vision: Any = None, text: Any = None, **top: Any) -> Path:
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
    ("changes", "sentence"),
    [
        ({"visual__proj": nan}, r"found NaN or Inf in its weights visual\.proj, expected numbers"),
        ({"ln_final__bias": lambda weight: weight + float("inf")}, r"found NaN or Inf in its weights ln_final\.bias"),
        # A row of the table that hardly any text reads.
        ({"token_embedding__weight": lambda w: w.index_fill(0, torch.tensor([7]), float("nan"))}, "token_embedding"),
        ({"visual__proj": torch.zeros_like}, "its image tower returns features that are all zero"),
        ({"text_projection": torch.zeros_like}, "its text tower returns features that are all zero"),
        ({"visual__proj": lambda weight: weight + 3e38}, "its image tower returns features that are NaN or Inf"),
        ({"logit_scale": lambda weight: weight + 1000}, r"found the logit scale \[inf\], expected one finite number"),
    ],
)
def test_a_model_whose_features_are_no_numbers_is_refused(changes: Any, sentence: str, folder: Path) -> None:
    change(folder, **changes)
    with pytest.raises(InputError, match=f"^model: 'local-dir:{folder}'.*{sentence}"):
        load_clip(named(folder))


@pytest.mark.parametrize(
    ("architecture", "sentence"),
    [
        ({"vision": {"attentional_pool": "parallel", "attn_pooler_heads": 2}}, r"image tower returns .* of shape \["),
        ({"vision": {"output_tokens": True}}, r"its image tower fails on inputs of shape \[2, 3, 16, 16\].*'tuple'"),
        ({"vision": {"pool_type": "none"}}, r"its image tower returns torch\.float32 of shape \[2, 5, 16\]"),
        ({"text": {"output_tokens": True}, "custom_text": True}, "its text tower fails on inputs"),
        ({"text": {"pool_type": "none"}}, r"its text tower returns torch\.float32 of shape \[2, 12, 16\]"),
        ({"text": {"pool_type": "first"}}, "its text tower returns the same features for unlike inputs"),
        ({"text": {"vocab_size": 1000}}, "found the token 49407 from its tokenizer and 1000 token embeddings"),
    ],
)
def test_a_model_whose_features_have_another_shape_is_refused(architecture: Any, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=sentence):
        load_clip(named(built(tmp_path / "model", **architecture)))


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
    clip = load_clip(named(built(tmp_path / "model", **architecture)))
    assert clip.model.training


def test_towers_of_different_widths_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = load_clip(named(folder))

    class Narrow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logit_scale = nn.Parameter(torch.ones([]))

        def encode_image(self, images: torch.Tensor, normalize: bool) -> torch.Tensor:
            return torch.eye(len(images), 8)

        def encode_text(self, tokens: torch.Tensor, normalize: bool) -> torch.Tensor:
            return torch.eye(len(tokens), 4)

    narrow = Clip(Narrow(), clip.tokenizer, clip.train_transform, clip.evaluation_transform, {})
    with pytest.raises(InputError, match="found features of 8 numbers an image and 4 a text"):
        model_checks.check_features(narrow.model, narrow.tokenizer, narrow.evaluation_transform, "it", CPU)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"visual__proj": None, "ln_final__bias": None}, r"2 missing: visual\.proj, ln_final\.bias"),
        ({"visual__head": torch.ones_like}, r"1 unexpected: visual\.head"),
        ({"visual__proj": lambda weight: weight[:, :8]}, r"visual\.proj \[16, 8\] instead of \[16, 16\]"),
        ({"visual__proj": lambda weight: weight.T[:8].T}, r"1 of another shape: visual\.proj"),
        (
            {"positional_embedding": lambda weight: weight[:, :8]},
            r"positional_embedding \[12, 8\] instead of \[12, 16\]",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(changes: Any, sentence: str, folder: Path, tmp_path: Path) -> None:
    change(folder, **changes)
    with pytest.raises(
        InputError, match=rf"found weights of another architecture in .*{WEIGHTS}, expected.*\(.*{sentence}"
    ):
        load_clip(named(folder))
    whole = load_clip(Model(name=f"local-dir:{built(tmp_path / 'whole')}"))
    with pytest.raises(InputError, match=rf"{WEIGHTS}: found weights of another architecture.*\(.*{sentence}"):
        load_weights(whole.model, folder)


def test_a_weights_file_of_another_architecture_is_named(folder: Path) -> None:
    config = json.loads(json.dumps(TINY_MODEL))
    config["vision_cfg"]["layers"] = 2
    (folder / "deeper-in-this-test.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "deeper-in-this-test.json")
    sentence = r"of another architecture in .*, expected those of deeper-in-this-test \(12 missing: visual\..*, …\)"
    with pytest.raises(InputError, match=sentence):
        load_clip(Model(name="deeper-in-this-test", pretrained=str(folder / WEIGHTS)))


def test_a_model_that_needs_transformers_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_checks.importlib.util, "find_spec", lambda name: None)
    file = folder / "open_clip_config.json"
    config = json.loads(file.read_text())
    config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "timm/ViT-B-16-SigLIP"
    file.write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"its tokenizer needs the package transformers.*pip install 'zscl\[hf\]'"):
        load_clip(named(folder))
    with pytest.raises(InputError, match="its text tower needs the package transformers"):
        model_checks.check_packages(open_clip.get_model_config("roberta-ViT-B-32"), "roberta-ViT-B-32", "it")
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
    nobody = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", nobody)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError) as found:
        load_clip(model)
    sentence = str(found.value)
    assert "its weights are not on this machine, and the hub cannot be reached; expected a network" in sentence
    assert f"open_clip.create_model{call}" in sentence
    assert f"copy its folder {tmp_path} here" in sentence
    assert sentence.endswith("refused)")  # the cause, whole
    assert "Retrying" not in caplog.text


def test_features_that_are_no_numbers_are_no_accuracy(folder: Path, tasks: list[str]) -> None:
    clip, task = load_clip(named(folder)), TaskFolder.open(open_experiment_task(tasks[0]))
    with torch.no_grad():
        clip.model.visual.proj.fill_(float("nan"))  # type: ignore[union-attr, operator]
    heads = embed_classes(clip, [task], "all", "fp32", CPU)
    with pytest.raises(InputError, match="first/test: the model gives its images features that are NaN or Inf"):
        accuracies(clip, task, heads, Loader(CPU))
    with torch.no_grad():
        clip.model.text_projection.fill_(float("nan"))  # type: ignore[union-attr, operator]
    with pytest.raises(
        InputError, match="task 'first': the model gives its class prompts features that are NaN or Inf"
    ):
        embed_classes(clip, [task], "all", "fp32", CPU)


def open_experiment_task(path: str) -> Any:
    from schemas.data import Task

    return Task.model_validate(path)


def test_every_way_to_a_model_refuses_it(
    folder: Path, experiment: Callable[..., Experiment], zscl: Callable[..., Any], tasks: list[str], tmp_path: Path
) -> None:
    change(folder, visual__proj=nan)
    made = experiment(model=f"local-dir:{folder}", method="zero-shot")
    for way in (lambda: run_sequence(made, tmp_path / "run", device=CPU), lambda: preflight.prepare(made)):
        with pytest.raises(InputError, match="found NaN or Inf in its weights"):
            way()
    found = zscl("evaluate", folder, "--task", tasks[0], "--offline", "--out", tmp_path / "out")
    assert (found.code, found.error.count("found NaN or Inf in its weights")) == (2, 1)


def test_blocks_that_cannot_be_checkpointed_are_refused(experiment: Callable[..., Experiment], tmp_path: Path) -> None:
    custom = {"block_type": "custom", "qk_norm": True}
    model = built(tmp_path / "model", vision=custom, text=custom, custom_text=True)
    made = experiment(
        model=f"local-dir:{model}", method="finetune", compute={"device": "cpu", "gradient_checkpointing": True}
    )
    sentence = (
        r"compute\.gradient_checkpointing: found true, but the model's image tower cannot do it, expected false \(Type"
    )
    with pytest.raises(InputError, match=sentence):
        preflight.prepare(made)
    with pytest.raises(InputError, match=sentence):
        run_sequence(made, tmp_path / "run", device=CPU)
