"""Two stages of every preset, derived again from the formulas, sharing no arithmetic with the product.

Only the data and its order are taken from the product: both sides see the same images, labels and tokens.
"""

import csv
import io
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support.errors import refused
from torch.optim.optimizer import register_optimizer_step_pre_hook

from schemas.errors import ErrorCode
from schemas.experiment import Experiment, Model
from schemas.method import PRESETS
from zscl.data.loader import Loader
from zscl.data.sample import Samples
from zscl.methods import exemplars as memory
from zscl.methods.distillation_texts import distillation_tokens, draw_random_sentences
from zscl.methods.interfaces import Batch
from zscl.models.clip import load_clip
from zscl.sequence.resolve import resolve
from zscl.sequence.run import run_sequence
from zscl.training.batches import training_batches
from zscl.training.optim import learning_rate_factor

CPU = torch.device("cpu")
STEPS, WARMUP, EVERY, TEMPERATURE, SMOOTHING, MERGED, BUDGET = 16, 6, 4, 2.0, 0.2, 0.2, 12
# Learning rates of the two stages. Adam makes whole steps of gradients that are round-off, so float32 takes small ones.
RATES = {torch.float64: (1e-3, 5e-3), torch.float32: (1e-4, 5e-4)}
METHODS: dict[str, dict[str, Any]] = {preset: {"preset": preset} for preset in PRESETS if preset != "zero-shot"}
for name in ("we", "we+wc", "zscl*", "zscl"):
    METHODS[name]["average"] = {"every": EVERY}
METHODS["lwf-vr"]["distill"] = {"random_texts": 30, "random_length": 6}
METHODS["icarl"]["memory"] = {"budget": BUDGET}
METHODS["other distances"] = {
    "preset": "zscl*",
    "average": None,
    "distill": {
        "teacher": "previous",
        "image_weight": 0.0,
        "text_weight": 0.0,
        "similarity_weight": 0.7,
        "feature_weight": 3.0,
    },
}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def unit(rows: torch.Tensor) -> torch.Tensor:
    return rows / rows.pow(2).sum(dim=1, keepdim=True).sqrt()


def log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    return logits - logits.exp().sum(dim=1, keepdim=True).log()


def soft_cross_entropy(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean over rows of −Σ p log q at temperature T, times T²."""
    target = log_probabilities(teacher / TEMPERATURE).exp()
    return -(target * log_probabilities(student / TEMPERATURE)).sum(dim=1).mean() * TEMPERATURE**2


@dataclass
class Derived:
    """What the derivation comes to."""

    losses: list[dict[str, float]]
    gradients: list[dict[str, torch.Tensor]]
    weights: dict[str, torch.Tensor]
    tokens: torch.Tensor


def derive(
    net: Any, teacher: Any, parts: set[str], batches: Iterator[Batch], prompts: torch.Tensor, texts: torch.Tensor,
    learning_rate: float,
) -> Derived:  # fmt: skip
    """The authors' loop in float64: T + 1 steps, the last with learning rate 0; Adam and the running mean by hand."""
    net.double().train()
    trained = {name: parameter for name, parameter in net.named_parameters() if name != "logit_scale"}
    start = {name: parameter.detach().clone() for name, parameter in trained.items()}
    mean, merged = {name: value.clone() for name, value in start.items()}, 1
    first = {name: torch.zeros_like(value) for name, value in start.items()}
    second = {name: torch.zeros_like(value) for name, value in start.items()}
    scale = math.exp(float(net.logit_scale.detach()))
    history, slopes = [], []
    for step in range(STEPS + 1):
        if step < WARMUP:
            rate = learning_rate * (step + 1) / WARMUP
        else:
            rate = learning_rate * 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP)))
        batch = next(batches)
        references = None if batch.references is None else batch.references.double()
        named = {}

        logits = scale * unit(net.visual(batch.images.double())) @ unit(net.encode_text(prompts)).T
        hot = torch.zeros_like(logits)
        hot[torch.arange(len(batch.labels)), batch.labels] = 1.0
        target = (1 - SMOOTHING) * hot + SMOOTHING / logits.shape[1]
        named["classification"] = -(target * log_probabilities(logits)).sum(dim=1).mean()
        if "distill" in parts:
            anchor = unit(teacher.encode_text(texts).detach())
            student_logits = scale * unit(net.visual(references)) @ anchor.T
            teacher_logits = scale * unit(teacher.visual(references).detach()) @ anchor.T
            named["image_distillation"] = soft_cross_entropy(student_logits, teacher_logits)
            named["text_distillation"] = soft_cross_entropy(student_logits.T, teacher_logits.T)
        if "other distances" in parts:
            ours, theirs = unit(net.visual(references)), unit(teacher.visual(references).detach())
            others = ~torch.eye(len(ours), dtype=torch.bool)  # an image is not compared with itself
            similarities = [(scale * rows @ rows.T)[others].reshape(len(rows), -1) for rows in (ours, theirs)]
            named["similarity_distillation"] = 0.7 * soft_cross_entropy(similarities[0], similarities[1])
            named["feature_distance"] = 3.0 * (ours - theirs).pow(2).mean()
        if "consolidate" in parts:
            distances = [(trained[name] - start[name]).pow(2).sum() for name in trained]
            named["consolidation"] = torch.stack(distances).sum()

        gradients = dict(
            zip(
                trained,
                torch.autograd.grad(torch.stack(list(named.values())).sum(), list(trained.values())),
                strict=True,
            )
        )
        with torch.no_grad():
            for name, parameter in trained.items():
                if "in_proj_bias" in name:  # a key's bias moves all scores of a softmax alike: no gradient
                    gradients[name][len(parameter) // 3 : 2 * len(parameter) // 3] = 0
                first[name].mul_(0.9).add_(gradients[name], alpha=0.1)
                second[name].mul_(0.999).addcmul_(gradients[name], gradients[name], value=0.001)
                deviation = (second[name] / (1 - 0.999 ** (step + 1))).sqrt_().add_(1e-8)
                parameter.addcdiv_(first[name], deviation, value=-rate / (1 - 0.9 ** (step + 1)))
        if step % EVERY == 0:
            for name, parameter in trained.items():
                mean[name].mul_(merged / (merged + 1)).add_(parameter.detach(), alpha=1 / (merged + 1))
            merged += 1
        history.append({name: value.item() for name, value in named.items()})
        slopes.append(gradients)
    weights = mean if "average" in parts else {name: parameter.detach() for name, parameter in trained.items()}
    if "merge" in parts:
        weights = {name: (1 - MERGED) * value + MERGED * start[name] for name, value in weights.items()}
    return Derived(history[:STEPS], slopes[:STEPS], weights, prompts.unique())


def run_and_watch(made: Experiment, folder: Path) -> list[list[torch.Tensor]]:
    """Run the product. Returns the gradients that its optimizer was given, step by step over all stages."""
    gradients: list[list[torch.Tensor]] = []

    def watch(optimizer: Any, *_: object) -> None:
        gradients.append([parameter.grad.clone() for parameter in optimizer.param_groups[0]["params"]])

    hook = register_optimizer_step_pre_hook(watch)
    try:
        run_sequence(made, folder, device=CPU)
    finally:
        hook.remove()
    return gradients


def derive_stage(made: Experiment, folder: Path, stage: int) -> Derived:
    """Derive one stage from where the product began it."""
    opened = resolve(made)
    task, distill = opened.tasks[stage - 1], made.method.distill
    start = Model(name=f"local-dir:{folder}/stages/1-first/model") if stage == 2 else made.model
    clip = load_clip(start)
    parts = {part for part in ("distill", "consolidate", "average", "merge") if getattr(made.method, part)}
    if distill and distill.similarity_weight:
        parts = {"other distances"}
    images: Samples | None = None
    tokens, teacher = torch.empty(0), None
    if distill:
        tokens = distillation_tokens(distill, clip, task, opened.tasks, opened.reference, made.seed)
        teacher = load_clip(made.model if distill.teacher == "initial" else start).model.double().eval()
        if distill.images == "exemplars":
            images = memory.load_exemplars([folder / "stages/1-first/exemplars"] if stage == 2 else [], BUDGET)
        else:
            assert opened.reference is not None or distill.images == "task"
            images = task.train if opened.reference is None else opened.reference.images
    if images is None:
        parts -= {"distill"}
    prompts = clip.tokenizer(task.prompts(task.templates[0]))
    batches = training_batches(made, stage, task, clip, images, Loader(CPU))
    rate = made.tasks[stage - 1].learning_rate
    assert rate is not None
    return derive(clip.model, teacher, parts, batches, prompts, tokens, rate)


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """How far two tensors are apart, relative to the expected one's length."""
    return float((found.double() - expected).norm() / expected.norm().clamp(min=1e-12))


FLOAT64, FLOAT32 = (torch.float64, 1e-6), (torch.float32, 1e-4)
FAST_IN_FLOAT32 = ("zscl", "lwf")  # the others in float32 belong to the slow tests
CASES = [
    *(pytest.param(method, *FLOAT64, id=f"{method}-float64") for method in METHODS),
    *(
        pytest.param(
            method, *FLOAT32, id=f"{method}-float32", marks=() if method in FAST_IN_FLOAT32 else pytest.mark.slow
        )
        for method in METHODS
    ),
]


@pytest.mark.parametrize(("method", "dtype", "tolerance"), CASES)
def test_two_stages_agree_with_the_derivation(
    experiment: Callable[..., Experiment], tmp_path: Path, tasks: list[str], method: str, dtype: torch.dtype,
    tolerance: float,
) -> None:  # fmt: skip
    made = experiment(
        method=METHODS[method],
        tasks=[{"path": path, "learning_rate": rate} for path, rate in zip(tasks[:2], RATES[dtype], strict=True)],
        optimisation={"steps": STEPS, "warmup_steps": WARMUP, "batch_size": 6, "reference_batch_size": 5},
    )
    with default_dtype(dtype):
        gradients = run_and_watch(made, tmp_path / "run")
    assert len(gradients) == 2 * STEPS
    for stage, place in ((1, "1-first"), (2, "2-second")):
        with default_dtype(dtype):
            derived = derive_stage(made, tmp_path / "run", stage)
        rows = list(csv.DictReader((tmp_path / "run/stages" / place / "losses.csv").open()))
        for step, (row, losses, slopes) in enumerate(zip(rows, derived.losses, derived.gradients, strict=True)):
            assert row.keys() - {"step", "learning_rate", "gradient_norm"} == losses.keys()
            norm = math.hypot(*(float(slope.norm()) for slope in slopes.values()))
            assert float(row["gradient_norm"]) == pytest.approx(norm, rel=tolerance), (stage, step)
            for loss, expected in losses.items():
                # Consolidation squares differences of weights that float32 rounds before they are subtracted.
                least = 1e-9 if loss == "consolidation" and dtype == torch.float32 else 1e-12
                assert float(row[loss]) == pytest.approx(expected, rel=tolerance, abs=least), (stage, step, loss)
            seen = gradients[(stage - 1) * STEPS + step]
            for found, (name, slope) in zip(seen, slopes.items(), strict=True):
                # Of the token embedding, only the rows that prompts use are trained; the others have no gradient.
                used = derived.tokens if name == "token_embedding.weight" else slice(None)
                assert float(slope[used].norm()) == pytest.approx(float(slope.norm()), rel=1e-12)
                assert apart(found, slope[used]) < tolerance, (stage, step, name)
        found_weights = load_file(tmp_path / "run/stages" / place / "model/open_clip_model.safetensors")
        for name, weights in derived.weights.items():
            assert apart(found_weights[name], weights) < tolerance, (stage, name)
        assert torch.equal(found_weights["logit_scale"], load_clip(made.model).model.logit_scale.detach())  # type: ignore[arg-type]


def test_lwf_distils_the_tasks_own_images_and_prompts(experiment: Callable[..., Experiment]) -> None:
    made = experiment(method="lwf", reference=None)
    opened, clip = resolve(made), load_clip(made.model)
    task = opened.tasks[1]
    assert made.method.distill is not None
    assert torch.equal(
        distillation_tokens(made.method.distill, clip, task, opened.tasks, None, 0),
        clip.tokenizer(task.prompts(task.templates[0])),
    )
    plain = [clip.evaluation_transform(Image.open(io.BytesIO(s.image))) for s in task.train.iter_shard(0, 1)]
    batch = next(training_batches(made, 2, task, clip, task.train, Loader(CPU)))
    assert batch.references is not None
    assert all(any(torch.equal(image, other) for other in plain) for image in batch.references)


def test_random_sentences_are_plain_tokens_between_start_and_end(experiment: Callable[..., Experiment]) -> None:
    tokenizer: Any = load_clip(experiment().model).tokenizer
    first, again, other = (draw_random_sentences(tokenizer, 50, 6, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (50, 12)
    assert set(first[:, 0].tolist()) == {tokenizer.sot_token_id}
    assert set(first[:, 7].tolist()) == {tokenizer.eot_token_id}
    assert int(first[:, 1:7].max()) < tokenizer.sot_token_id
    assert int(first[:, 8:].abs().sum()) == 0
    with refused(ErrorCode.INVALID_VALUE, "method.distill.random_length") as error:
        draw_random_sentences(tokenizer, 50, 11, 0)
    assert "found 11, expected at most 10" in str(error.value)


def test_stages_and_streams_have_different_sample_orders(experiment: Callable[..., Experiment]) -> None:
    made = experiment()
    opened, clip = resolve(made), load_clip(made.model)
    task = opened.tasks[0]
    assert opened.reference is not None
    images = opened.reference.images
    one, two = (next(training_batches(made, stage, task, clip, images, Loader(CPU))) for stage in (1, 2))
    assert not torch.equal(one.images, two.images)
    assert one.references is not None
    assert two.references is not None
    assert not torch.equal(one.references, two.references)


def test_reference_images_use_the_evaluation_transform(experiment: Callable[..., Experiment]) -> None:
    made = experiment()
    opened, clip = resolve(made), load_clip(made.model)
    assert opened.reference is not None
    plain = [
        clip.evaluation_transform(Image.open(io.BytesIO(s.image))) for s in opened.reference.images.iter_shard(0, 1)
    ]
    batch = next(training_batches(made, 1, opened.tasks[0], clip, opened.reference.images, Loader(CPU)))
    assert batch.references is not None
    for image in batch.references:
        assert any(torch.equal(image, other) for other in plain)


@pytest.mark.parametrize(
    ("step", "factor"),
    [(0, 0.25), (1, 0.5), (3, 1.0), (4, 1.0), (7, 0.5 * (1 + math.cos(math.pi / 2))), (10, 0.0), (11, 0.0)],
)
def test_warm_up_then_cosine(step: int, factor: float) -> None:
    assert learning_rate_factor(step, 4, 10) == pytest.approx(factor, abs=1e-15)


def test_a_schedule_may_be_all_warm_up() -> None:
    assert [learning_rate_factor(step, 2, 2) for step in range(3)] == [0.5, 1.0, 0.0]
