"""Savings: each one reproduces the unpruned stage, and is used only for models that it fits."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file
from support.errors import refused
from support.small_clip import TOKENS, build_small_clip, build_small_clip_v4
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from schemas.compute import Compute, Savings
from schemas.errors import ErrorCode
from schemas.experiment import Experiment
from zscl.models.pruned_forward import PrunedForward, list_unpruned_towers
from zscl.sequence.run import run_sequence

CPU = torch.device("cpu")
PLAIN: dict[str, Any] = {
    "context_cut": "never", "packed_prompts": "never", "pooled_row": "never", "used_embeddings": "never",
    "one_pass": False, "multi_tensor": False, "fused_optimizer": False,
}  # fmt: skip
IMAGES = torch.linspace(-1, 1, 3 * 3 * 16 * 16).reshape(3, 3, 16, 16)


def encode(model: Any, **compute: Any) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    return PrunedForward(model, TOKENS, range(2), Compute(**compute), unused_embeddings_constant=True)(
        IMAGES[:2], IMAGES[2:]
    )  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Experiment, str], tuple[list[dict[str, float]], Any]]:
    """Run a stage in float64, once for each name. Returns its losses and weights."""
    folder = tmp_path_factory.mktemp("savings")

    def run_once(settings: Experiment, name: str) -> tuple[list[dict[str, float]], Any]:
        torch.set_default_dtype(torch.float64)
        try:
            run_sequence(settings, folder / name / "run", device=CPU)
        finally:
            torch.set_default_dtype(torch.float32)
        stage = folder / name / "run/stages/1-first"
        rows = csv.DictReader((stage / "losses.csv").open())
        losses = [{loss: float(value) for loss, value in row.items()} for row in rows]
        return losses, load_file(stage / "model/open_clip_model.safetensors")

    return run_once


VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {"savings": PLAIN | {name: Savings().model_dump()[name]}} for name in PLAIN},
    "all together": {},
    "teacher's features as met": {"savings": PLAIN, "teacher_features": "as_met"},
    "teacher's features ahead": {"savings": PLAIN, "teacher_features": "ahead"},
    "gradient accumulation": {"images_at_once": 3},
    "gradient accumulation, plain": {"images_at_once": 3, "savings": PLAIN},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "gradient checkpointing, plain": {"gradient_checkpointing": True, "savings": PLAIN},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_reproduces_the_unpruned_stage(
    experiment: Callable[..., Experiment], tasks: list[str], run: Any, variant: str
) -> None:
    recipe: dict[str, Any] = {
        "tasks": tasks[:1],
        "method": {"preset": "zscl", "average": {"every": 5, "start_share": 0.1}},
        "optimisation": {
            "steps": 20, "warmup_steps": 4, "batch_size": 6, "reference_batch_size": 5, "learning_rate": 1e-3,
        },
    }  # fmt: skip
    plain = run(experiment(**recipe, compute={"savings": PLAIN, "teacher_features": "never"}), "plain")
    losses, weights = run(experiment(**recipe, compute={"teacher_features": "never"} | VARIANTS[variant]), variant)
    assert len(losses) == 20
    # The bias of keys has no effect on the softmax. open_clip's attention gives it a gradient of rounding errors, which
    # Adam scales up to full steps and consolidation sums up.
    summed = ("consolidation", "gradient_norm")
    for ours, theirs in zip(losses, plain[0], strict=True):
        for name, loss in theirs.items():
            assert ours[name] == pytest.approx(loss, rel=1e-3 if name in summed else 1e-9, abs=1e-12), name
        assert ours.keys() == theirs.keys()
    for name, expected in plain[1].items():
        compared = torch.ones(len(expected) if expected.ndim else 1, dtype=torch.bool)
        if "in_proj_bias" in name:
            compared[len(expected) // 3 : 2 * len(expected) // 3] = False
        actual, expected = (weight.reshape(len(compared), -1)[compared] for weight in (weights[name], expected))
        assert torch.allclose(actual, expected, rtol=1e-6, atol=1e-9), name  # saved in float32


def forward_flops(**savings: str) -> int:
    """Count the operations of one forward pass with only these savings."""
    model = build_small_clip()
    towers = PrunedForward(model, TOKENS, range(2), Compute(savings=Savings(**{**PLAIN, **savings})), True)
    with FlopCounterMode(display=False) as counter:
        towers(IMAGES[:2], IMAGES[2:])
    return int(counter.get_total_flops())


def test_each_saving_reduces_the_operations() -> None:
    plain = forward_flops()
    cut = forward_flops(context_cut="auto")
    packed = forward_flops(context_cut="auto", packed_prompts="auto")
    pooled = forward_flops(pooled_row="auto")
    assert packed < cut < plain
    assert pooled < plain
    assert forward_flops(context_cut="auto", packed_prompts="auto", pooled_row="auto") < min(packed, pooled)


@pytest.mark.parametrize("savings", [Savings(), Savings(**PLAIN)])
def test_gradient_accumulation_splits_batches_and_recomputes(savings: Savings) -> None:
    model, passed = build_small_clip(), []
    compute = Compute(savings=savings.model_copy(update={"one_pass": True}), images_at_once=2)
    towers = PrunedForward(model, TOKENS, range(2), compute, True)
    model.visual.conv1.register_forward_pre_hook(lambda module, arguments: passed.append(len(arguments[0])))
    images, references, prompts = towers(IMAGES[:2], IMAGES[2:])
    assert passed == [2, 1]
    (images.sum() + references.sum() + prompts.sum()).backward()
    assert sorted(passed) == [1, 1, 2, 2]


@pytest.mark.parametrize("savings", [Savings(), Savings(**PLAIN)])
def test_gradient_checkpointing_recomputes_every_block(savings: Savings) -> None:
    model = build_small_clip()
    towers = PrunedForward(model, TOKENS, range(2), Compute(savings=savings, gradient_checkpointing=True), True)
    blocks = [*model.visual.transformer.resblocks, *model.transformer.resblocks]
    calls = [0] * len(blocks)

    def count(index: int) -> None:
        calls[index] += 1

    for index, block in enumerate(blocks):
        block.mlp.register_forward_pre_hook(lambda module, arguments, index=index: count(index))
    images, references, prompts = towers(IMAGES[:2], IMAGES[2:])
    before = list(calls)
    (images.sum() + references.sum() + prompts.sum()).backward()
    assert all(before)
    assert calls == [2 * count for count in before]


OTHER_TOWERS: dict[str, tuple[Any, str]] = {
    "average pooling": (lambda: build_small_clip(vision={"pool_type": "avg"}), "pooling: avg"),
    "attention pooling": (lambda: build_small_clip(vision={"attentional_pool": True}), "pool"),
    "other image blocks": (lambda: build_small_clip(vision={"qk_norm": True}), "CustomResidualAttentionBlock"),
    "not causal": (
        lambda: build_small_clip(text={"no_causal_mask": True}, kind=open_clip.CustomTextCLIP),
        "its attention is not causal",
    ),
    "last token": (
        lambda: build_small_clip(text={"pool_type": "last"}, kind=open_clip.CustomTextCLIP),
        "pooling: last",
    ),
    "class token": (lambda: build_small_clip(text={"embed_cls": True}, kind=open_clip.CustomTextCLIP), "end token"),
    "other text blocks": (lambda: build_small_clip(text={"scale_fc": True}), "CustomResidualAttentionBlock"),
}


@pytest.mark.parametrize("kind", [open_clip.CLIP, open_clip.CustomTextCLIP])
def test_towers_of_open_clip_are_pruned(kind: type) -> None:
    model = build_small_clip(kind=kind)
    assert list_unpruned_towers(model, Savings()) == []
    images, references, prompts = encode(model, savings=dict.fromkeys(list(PLAIN)[:4], "always"))
    original = build_small_clip(kind=kind)
    assert torch.allclose(images, original.encode_image(IMAGES[:2], normalize=True), atol=1e-6)
    assert references is not None
    assert torch.allclose(references, original.encode_image(IMAGES[2:], normalize=True), atol=1e-6)
    assert torch.allclose(prompts, original.encode_text(TOKENS, normalize=True), atol=1e-6)


@pytest.mark.parametrize("kind", [open_clip.CLIP, open_clip.CustomTextCLIP])
def test_towers_of_open_clip_4_are_pruned(kind: type) -> None:
    model = build_small_clip_v4(kind=kind)
    assert list_unpruned_towers(model, Savings()) == []
    images, _, prompts = encode(model, savings=dict.fromkeys(list(PLAIN)[:4], "always"))
    original = build_small_clip(kind=kind)
    assert torch.allclose(images, original.encode_image(IMAGES[:2], normalize=True), atol=1e-6)
    assert torch.allclose(prompts, original.encode_text(TOKENS, normalize=True), atol=1e-6)


def add_head_scale(attention: nn.Module) -> None:
    attention.head_scale = nn.Parameter(torch.ones(2, 1, 1))


def add_query_norm(attention: nn.Module) -> None:
    attention.ln_q = nn.LayerNorm(8)


def add_dropout(attention: nn.Module) -> None:
    attention.attn_drop = nn.Dropout(0.1)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (add_head_scale, "attn.head_scale"),
        (add_query_norm, "attn.ln_q.bias, attn.ln_q.weight"),
        (add_dropout, "dropout"),
    ],
)
def test_an_attention_with_additional_parts_is_not_pruned(change: Callable[[nn.Module], None], reason: str) -> None:
    model = build_small_clip_v4()
    for block in (model.visual.transformer.resblocks[1], model.transformer.resblocks[1]):
        change(block.attn)
    notes = list_unpruned_towers(model, Savings())
    for tower, note in zip(("image", "text"), notes, strict=True):
        assert f"the {tower} tower is computed in full" in note
        assert reason in note


def test_attributes_that_another_version_lacks_are_named() -> None:
    model = build_small_clip()
    del model.visual.pool_type, model.text_projection
    image, text = list_unpruned_towers(model, Savings())
    assert "this version of open_clip has no pool_type in its VisionTransformer" in image
    assert "this version of open_clip has no text_projection in its CLIP" in text


def test_an_attention_without_batch_first_is_not_pruned() -> None:
    model = build_small_clip()
    for block in model.visual.transformer.resblocks:
        block.attn = nn.MultiheadAttention(16, 2, batch_first=False)
    [note] = list_unpruned_towers(model, Savings())
    assert "image tower is computed in full: its blocks have a different structure (attn.batch_first)" in note


@pytest.mark.parametrize("name", OTHER_TOWERS)
def test_other_towers_are_not_pruned_or_are_refused(name: str) -> None:
    make, reason = OTHER_TOWERS[name]
    model = make()
    assert any(reason in note for note in list_unpruned_towers(model, Savings()))
    images, _, prompts = encode(model)
    assert torch.allclose(images, make().encode_image(IMAGES[:2], normalize=True), atol=1e-6)
    assert torch.allclose(prompts, make().encode_text(TOKENS, normalize=True), atol=1e-6)
    field = "pooled_row" if "image" in list_unpruned_towers(model, Savings())[0] else "context_cut"
    with refused(ErrorCode.UNSUPPORTED, f"compute.savings.{field}"):
        encode(make(), savings={field: "always"})


def test_a_tower_with_different_outputs_is_not_pruned() -> None:
    model = build_small_clip()
    for block in (model.visual.transformer.resblocks[0], model.transformer.resblocks[0]):
        block.register_forward_hook(lambda module, arguments, output: 1.5 * output)  # not visible in the structure
    images, _, prompts = encode(model)
    assert torch.equal(images, model.encode_image(IMAGES, normalize=True)[:2])
    assert torch.equal(prompts, model.encode_text(TOKENS, normalize=True))
    with refused(ErrorCode.UNSUPPORTED, "compute.savings.pooled_row") as error:
        encode(model, savings={"pooled_row": "always"})
    assert "its features differ by" in str(error.value)


def test_with_weight_decay_all_embeddings_are_trained(experiment: Callable[..., Experiment], tmp_path: Path) -> None:
    model = build_small_clip()
    PrunedForward(model, TOKENS, range(2), Compute(), unused_embeddings_constant=False)
    assert model.token_embedding.weight.shape == (50, 16)
    with pytest.raises(ValueError, match="weight_decay changes the unused embeddings, too"):
        experiment(optimisation={"weight_decay": 0.1}, compute={"savings": {"used_embeddings": "always"}})
    decaying = {"steps": 3, "warmup_steps": 1, "batch_size": 6, "learning_rate": 0.01, "weight_decay": 0.5}
    settings = experiment(method="finetune", optimisation=decaying)
    run_sequence(settings, tmp_path, device=CPU)
    weights = load_file(tmp_path / "stages/1-first/model/open_clip_model.safetensors")["token_embedding.weight"]
    start = load_file(Path(settings.model.name.removeprefix("local-dir:")) / "open_clip_model.safetensors")
    assert not (weights == start["token_embedding.weight"]).all(dim=1).any()  # unused rows decay, too


def test_training_one_tower_does_not_change_the_other(experiment: Callable[..., Experiment], tmp_path: Path) -> None:
    for train in ("image_tower", "text_tower"):
        settings = experiment(method={"preset": "we", "average": {"every": 2}, "train": train})
        run_sequence(settings, tmp_path / train, device=CPU)
        weights = load_file(tmp_path / train / "stages/1-first/model/open_clip_model.safetensors")
        start = load_file(Path(settings.model.name.removeprefix("local-dir:")) / "open_clip_model.safetensors")
        changed = {name.startswith("visual.") for name in start if not torch.equal(start[name], weights[name])}
        assert changed == {train == "image_tower"}


@pytest.mark.slow
def test_a_compiled_image_tower_gives_the_same_losses(experiment: Callable[..., Experiment], tmp_path: Path) -> None:
    rows = []
    for compiled in (False, True):
        settings = experiment(compute={"device": "cpu", "compile": compiled})
        run_sequence(settings, tmp_path / str(compiled), device=CPU)
        with (tmp_path / str(compiled) / "stages/2-second/losses.csv").open() as stream:
            rows.append([[float(value) for value in row.values()] for row in csv.DictReader(stream)])
    assert rows[0] == [pytest.approx(row, rel=1e-3) for row in rows[1]]
