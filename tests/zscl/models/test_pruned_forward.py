"""Savings: each gives the plain way's numbers over a whole stage, and none is used where it would not."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file
from support.small_clip import TOKENS, clip_of, clip_of_version_4
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from schemas.compute import Compute, Savings
from schemas.errors import InputError
from schemas.experiment import Experiment
from zscl.models.pruned_forward import PrunedForward, list_unpruned_towers
from zscl.sequence.run import run_sequence

CPU = torch.device("cpu")
PLAIN: dict[str, Any] = {
    "context_cut": "never", "packed_prompts": "never", "pooled_row": "never", "used_embeddings": "never",
    "one_pass": False, "multi_tensor": False, "fused_optimizer": False,
}  # fmt: skip
IMAGES = torch.linspace(-1, 1, 3 * 3 * 16 * 16).reshape(3, 3, 16, 16)


def encoded(model: Any, **compute: Any) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    return PrunedForward(model, TOKENS, range(2), Compute(**compute), unused_embeddings_constant=True)(
        IMAGES[:2], IMAGES[2:]
    )  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Experiment, str], tuple[list[dict[str, float]], Any]]:
    """Run a stage in float64, once for each name. Returns its losses and weights."""
    folder = tmp_path_factory.mktemp("savings")

    def run_it(made: Experiment, name: str) -> tuple[list[dict[str, float]], Any]:
        torch.set_default_dtype(torch.float64)
        try:
            run_sequence(made, folder / name / "run", device=CPU)
        finally:
            torch.set_default_dtype(torch.float32)
        place = folder / name / "run/stages/1-first"
        rows = csv.DictReader((place / "losses.csv").open())
        losses = [{loss: float(value) for loss, value in row.items()} for row in rows]
        return losses, load_file(place / "model/open_clip_model.safetensors")

    return run_it


WAYS: dict[str, dict[str, Any]] = {
    **{name: {"savings": PLAIN | {name: Savings().model_dump()[name]}} for name in PLAIN},
    "all together": {},
    "teacher's features as met": {"savings": PLAIN, "teacher_features": "as_met"},
    "teacher's features ahead": {"savings": PLAIN, "teacher_features": "ahead"},
    "gradient accumulation": {"images_at_once": 3},
    "gradient accumulation, plain": {"images_at_once": 3, "savings": PLAIN},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "gradient checkpointing, plain": {"gradient_checkpointing": True, "savings": PLAIN},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_whole_stage_comes_to_the_plain_ways_numbers(
    experiment: Callable[..., Experiment], tasks: list[str], run: Any, way: str
) -> None:
    recipe: dict[str, Any] = {
        "tasks": tasks[:1],
        "method": {"preset": "zscl", "average": {"every": 5, "start_share": 0.1}},
        "optimisation": {
            "steps": 20, "warmup_steps": 4, "batch_size": 6, "reference_batch_size": 5, "learning_rate": 1e-3,
        },
    }  # fmt: skip
    plain = run(experiment(**recipe, compute={"savings": PLAIN, "teacher_features": "never"}), "plain")
    losses, weights = run(experiment(**recipe, compute={"teacher_features": "never"} | WAYS[way]), way)
    assert len(losses) == 20
    # open_clip's attention gives a key's bias a gradient of round-off, which Adam makes whole steps of and
    # consolidation sums; the softmax does not see it.
    summed = ("consolidation", "gradient_norm")
    for ours, theirs in zip(losses, plain[0], strict=True):
        for name, loss in theirs.items():
            assert ours[name] == pytest.approx(loss, rel=1e-3 if name in summed else 1e-9, abs=1e-12), name
        assert ours.keys() == theirs.keys()
    for name, expected in plain[1].items():
        seen = torch.ones(len(expected) if expected.ndim else 1, dtype=torch.bool)
        if "in_proj_bias" in name:
            seen[len(expected) // 3 : 2 * len(expected) // 3] = False
        found, expected = (each.reshape(len(seen), -1)[seen] for each in (weights[name], expected))
        assert torch.allclose(found, expected, rtol=1e-6, atol=1e-9), name  # as they are saved: in float32


def forward_flops(**savings: str) -> int:
    """Of one forward pass with only these savings."""
    model = clip_of()
    towers = PrunedForward(model, TOKENS, range(2), Compute(savings=Savings(**{**PLAIN, **savings})), True)
    with FlopCounterMode(display=False) as counter:
        towers(IMAGES[:2], IMAGES[2:])
    return int(counter.get_total_flops())


def test_each_saving_leaves_work_out() -> None:
    plain = forward_flops()
    cut = forward_flops(context_cut="auto")
    packed = forward_flops(context_cut="auto", packed_prompts="auto")
    pooled = forward_flops(pooled_row="auto")
    assert packed < cut < plain
    assert pooled < plain
    assert forward_flops(context_cut="auto", packed_prompts="auto", pooled_row="auto") < min(packed, pooled)


@pytest.mark.parametrize("savings", [Savings(), Savings(**PLAIN)])
def test_gradient_accumulation_passes_few_images_at_once_and_twice(savings: Savings) -> None:
    model, passed = clip_of(), []
    compute = Compute(savings=savings.model_copy(update={"one_pass": True}), images_at_once=2)
    towers = PrunedForward(model, TOKENS, range(2), compute, True)
    model.visual.conv1.register_forward_pre_hook(lambda module, arguments: passed.append(len(arguments[0])))
    images, references, prompts = towers(IMAGES[:2], IMAGES[2:])
    assert passed == [2, 1]
    (images.sum() + references.sum() + prompts.sum()).backward()
    assert sorted(passed) == [1, 1, 2, 2]


@pytest.mark.parametrize("savings", [Savings(), Savings(**PLAIN)])
def test_gradient_checkpointing_computes_every_block_again(savings: Savings) -> None:
    model = clip_of()
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
    assert calls == [2 * each for each in before]


OTHER_TOWERS: dict[str, tuple[Any, str]] = {
    "average pooling": (lambda: clip_of(vision={"pool_type": "avg"}), "pooling: avg"),
    "attention pooling": (lambda: clip_of(vision={"attentional_pool": True}), "pool"),
    "other image blocks": (lambda: clip_of(vision={"qk_norm": True}), "CustomResidualAttentionBlock"),
    "not causal": (
        lambda: clip_of(text={"no_causal_mask": True}, kind=open_clip.CustomTextCLIP),
        "its attention is not causal",
    ),
    "last token": (lambda: clip_of(text={"pool_type": "last"}, kind=open_clip.CustomTextCLIP), "pooling: last"),
    "class token": (lambda: clip_of(text={"embed_cls": True}, kind=open_clip.CustomTextCLIP), "end token"),
    "other text blocks": (lambda: clip_of(text={"scale_fc": True}), "CustomResidualAttentionBlock"),
}


@pytest.mark.parametrize("kind", [open_clip.CLIP, open_clip.CustomTextCLIP])
def test_open_clips_own_towers_are_saved_on(kind: type) -> None:
    model = clip_of(kind=kind)
    assert list_unpruned_towers(model, Savings()) == []
    images, references, prompts = encoded(model, savings=dict.fromkeys(list(PLAIN)[:4], "always"))
    whole = clip_of(kind=kind)
    assert torch.allclose(images, whole.encode_image(IMAGES[:2], normalize=True), atol=1e-6)
    assert references is not None
    assert torch.allclose(references, whole.encode_image(IMAGES[2:], normalize=True), atol=1e-6)
    assert torch.allclose(prompts, whole.encode_text(TOKENS, normalize=True), atol=1e-6)


@pytest.mark.parametrize("kind", [open_clip.CLIP, open_clip.CustomTextCLIP])
def test_the_towers_of_open_clip_4_are_saved_on(kind: type) -> None:
    model = clip_of_version_4(kind=kind)
    assert list_unpruned_towers(model, Savings()) == []
    images, _, prompts = encoded(model, savings=dict.fromkeys(list(PLAIN)[:4], "always"))
    whole = clip_of(kind=kind)
    assert torch.allclose(images, whole.encode_image(IMAGES[:2], normalize=True), atol=1e-6)
    assert torch.allclose(prompts, whole.encode_text(TOKENS, normalize=True), atol=1e-6)


def heads_scaled(attention: nn.Module) -> None:
    attention.head_scale = nn.Parameter(torch.ones(2, 1, 1))


def queries_normalised(attention: nn.Module) -> None:
    attention.ln_q = nn.LayerNorm(8)


def dropped(attention: nn.Module) -> None:
    attention.attn_drop = nn.Dropout(0.1)


@pytest.mark.parametrize(
    ("change", "reason"),
    [(heads_scaled, "attn.head_scale"), (queries_normalised, "attn.ln_q.bias, attn.ln_q.weight"), (dropped, "dropout")],
)
def test_an_attention_with_further_parts_is_left_in_full(change: Callable[[nn.Module], None], reason: str) -> None:
    model = clip_of_version_4()
    for block in (model.visual.transformer.resblocks[1], model.transformer.resblocks[1]):
        change(block.attn)
    found = list_unpruned_towers(model, Savings())
    assert [
        f"the {tower} tower is computed in full" in each for tower, each in zip(("image", "text"), found, strict=True)
    ] == [True] * 2
    assert all(reason in each for each in found)


def test_attributes_that_another_version_lacks_are_named() -> None:
    model = clip_of()
    del model.visual.pool_type, model.text_projection
    image, text = list_unpruned_towers(model, Savings())
    assert "this version of open_clip has no pool_type in its VisionTransformer" in image
    assert "this version of open_clip has no text_projection in its CLIP" in text


def test_rows_before_the_batch_are_left_in_full() -> None:
    model = clip_of()
    for block in model.visual.transformer.resblocks:
        block.attn = nn.MultiheadAttention(16, 2, batch_first=False)
    [found] = list_unpruned_towers(model, Savings())
    assert "image tower is computed in full: its blocks are built differently (attn.batch_first)" in found


@pytest.mark.parametrize("name", OTHER_TOWERS)
def test_other_towers_run_as_they_are_or_are_refused(name: str) -> None:
    make, reason = OTHER_TOWERS[name]
    model = make()
    assert [sentence for sentence in list_unpruned_towers(model, Savings()) if reason in sentence]
    images, _, prompts = encoded(model)
    assert torch.allclose(images, make().encode_image(IMAGES[:2], normalize=True), atol=1e-6)
    assert torch.allclose(prompts, make().encode_text(TOKENS, normalize=True), atol=1e-6)
    field = "pooled_row" if "image" in list_unpruned_towers(model, Savings())[0] else "context_cut"
    with pytest.raises(InputError, match=rf"compute\.savings\.{field}: found always, but .* expected auto or never"):
        encoded(make(), savings={field: "always"})


def test_a_tower_that_would_differ_is_found_out_by_its_outputs() -> None:
    model = clip_of()
    for block in (model.visual.transformer.resblocks[0], model.transformer.resblocks[0]):
        block.register_forward_hook(lambda module, arguments, output: 1.5 * output)  # nothing in the structure tells
    images, _, prompts = encoded(model)
    assert torch.equal(images, model.encode_image(IMAGES, normalize=True)[:2])
    assert torch.equal(prompts, model.encode_text(TOKENS, normalize=True))
    with pytest.raises(InputError, match="its features would differ by"):
        encoded(model, savings={"pooled_row": "always"})


def test_with_weight_decay_all_embeddings_are_trained(experiment: Callable[..., Experiment], tmp_path: Path) -> None:
    model = clip_of()
    PrunedForward(model, TOKENS, range(2), Compute(), unused_embeddings_constant=False)
    assert model.token_embedding.weight.shape == (50, 16)
    with pytest.raises(ValueError, match="the unused embeddings decay, too"):
        experiment(optimisation={"weight_decay": 0.1}, compute={"savings": {"used_embeddings": "always"}})
    decaying = {"steps": 3, "warmup_steps": 1, "batch_size": 6, "learning_rate": 0.01, "weight_decay": 0.5}
    made = experiment(method="finetune", optimisation=decaying)
    run_sequence(made, tmp_path, device=CPU)
    weights = load_file(tmp_path / "stages/1-first/model/open_clip_model.safetensors")["token_embedding.weight"]
    start = load_file(Path(made.model.name.removeprefix("local-dir:")) / "open_clip_model.safetensors")
    assert not (weights == start["token_embedding.weight"]).all(dim=1).any()  # unused rows, too, have decayed


def test_one_tower_alone_leaves_the_other_and_its_embeddings(
    experiment: Callable[..., Experiment], tmp_path: Path
) -> None:
    for train in ("image_tower", "text_tower"):
        made = experiment(method={"preset": "we", "average": {"every": 2}, "train": train})
        run_sequence(made, tmp_path / train, device=CPU)
        weights = load_file(tmp_path / train / "stages/1-first/model/open_clip_model.safetensors")
        start = load_file(Path(made.model.name.removeprefix("local-dir:")) / "open_clip_model.safetensors")
        changed = {name.startswith("visual.") for name in start if not torch.equal(start[name], weights[name])}
        assert changed == {train == "image_tower"}


@pytest.mark.slow
def test_a_compiled_image_tower_gives_the_same_to_round_off(
    experiment: Callable[..., Experiment], tmp_path: Path
) -> None:
    rows = []
    for compiled in (False, True):
        made = experiment(compute={"device": "cpu", "compile": compiled})
        run_sequence(made, tmp_path / str(compiled), device=CPU)
        with (tmp_path / str(compiled) / "stages/2-second/losses.csv").open() as stream:
            rows.append([[float(value) for value in row.values()] for row in csv.DictReader(stream)])
    assert rows[0] == [pytest.approx(row, rel=1e-3) for row in rows[1]]
