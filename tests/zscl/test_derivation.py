"""A stage of training, derived again from the formulas in float64, sharing no arithmetic with the product.

Only the data order is taken from the product: both sides see the same images.
"""

import io
import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from schemas.base import InputError
from schemas.experiment import Experiment
from zscl.model import freeze, load
from zscl.objective import Batch, Teacher
from zscl.reference import random_sentences, tokens_of
from zscl.sequence import open_experiment
from zscl.training import learning_rate_factor, train_stage, training_batches

CPU = torch.device("cpu")
STEPS, WARMUP, EVERY, TEMPERATURE, SMOOTHING = 52, 10, 4, 2.0, 0.2
METHODS = {
    "finetune": "finetune",
    "we": {"preset": "we", "average": {"every": EVERY}},
    "wc": "wc",
    "lwf": "lwf",
    "lwf-vr": {"preset": "lwf-vr", "distill": {"random_texts": 30, "random_length": 6}},
    "other distances": {
        "preset": "zscl*",
        "average": None,
        "distill": {
            "teacher": "previous",
            "image_weight": 0.0,
            "text_weight": 0.0,
            "similarity_weight": 0.7,
            "feature_weight": 3.0,
        },
    },
    "zscl*": {"preset": "zscl*", "average": {"every": EVERY}},
    "zscl": {"preset": "zscl", "average": {"every": EVERY}},
}


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
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
    weights: dict[str, torch.Tensor]


def derive(
    model: nn.Module, initial: nn.Module, parts: set[str], batches: Iterator[Batch], prompts: torch.Tensor,
    texts: torch.Tensor, learning_rate: float,
) -> Derived:  # fmt: skip
    """The authors' loop: T + 1 steps, the last with learning rate 0; Adam and the running mean by hand."""
    net: Any = deepcopy(model).train()
    teacher: Any = initial
    trained = {name: parameter for name, parameter in net.named_parameters() if name != "logit_scale"}
    for parameter in net.parameters():
        parameter.requires_grad_(True)
    start = {name: parameter.detach().clone() for name, parameter in trained.items()}
    mean, merged = {name: value.clone() for name, value in start.items()}, 1
    first = {name: torch.zeros_like(value) for name, value in start.items()}
    second = {name: torch.zeros_like(value) for name, value in start.items()}
    scale = math.exp(float(net.logit_scale.detach()))
    history = []
    for step in range(STEPS + 1):
        if step < WARMUP:
            rate = learning_rate * (step + 1) / WARMUP
        else:
            rate = learning_rate * 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP)))
        batch = next(batches)
        named = {}

        logits = scale * unit(net.visual(batch.images)) @ unit(net.encode_text(prompts)).T
        hot = torch.zeros_like(logits)
        hot[torch.arange(len(batch.labels)), batch.labels] = 1.0
        target = (1 - SMOOTHING) * hot + SMOOTHING / logits.shape[1]
        named["classification"] = -(target * log_probabilities(logits)).sum(dim=1).mean()
        if "distill" in parts:
            assert batch.references is not None
            anchor = unit(teacher.encode_text(texts).detach())
            student_logits = scale * unit(net.visual(batch.references)) @ anchor.T
            teacher_logits = scale * unit(teacher.visual(batch.references).detach()) @ anchor.T
            named["image_distillation"] = soft_cross_entropy(student_logits, teacher_logits)
            named["text_distillation"] = soft_cross_entropy(student_logits.T, teacher_logits.T)
        if "other distances" in parts:
            assert batch.references is not None
            ours, theirs = unit(net.visual(batch.references)), unit(teacher.visual(batch.references).detach())
            others = ~torch.eye(len(ours), dtype=torch.bool)  # an image is not compared with itself
            similarities = [(scale * rows @ rows.T)[others].reshape(len(rows), -1) for rows in (ours, theirs)]
            named["similarity_distillation"] = 0.7 * soft_cross_entropy(similarities[0], similarities[1])
            named["feature_distance"] = 3.0 * (ours - theirs).pow(2).mean()
        if "consolidate" in parts:
            distances = [(trained[name] - start[name]).pow(2).sum() for name in trained]
            named["consolidation"] = torch.stack(distances).sum()

        gradients = torch.autograd.grad(torch.stack(list(named.values())).sum(), list(trained.values()))
        with torch.no_grad():
            for (name, parameter), gradient in zip(trained.items(), gradients, strict=True):
                first[name] = 0.9 * first[name] + 0.1 * gradient
                second[name] = 0.999 * second[name] + 0.001 * gradient**2
                momentum = first[name] / (1 - 0.9 ** (step + 1))
                deviation = (second[name] / (1 - 0.999 ** (step + 1))).sqrt()
                parameter -= rate * momentum / (deviation + 1e-8)
        if step % EVERY == 0:
            for name, parameter in trained.items():
                mean[name] = (merged * mean[name] + parameter.detach()) / (merged + 1)
            merged += 1
        history.append({name: value.item() for name, value in named.items()})
    last = {name: parameter.detach() for name, parameter in trained.items()}
    return Derived(history[:STEPS], mean if "average" in parts else last)


@pytest.mark.parametrize("method", METHODS)
def test_two_stages_agree_with_the_derivation(experiment: Callable[..., Experiment], method: str) -> None:
    optimisation = {
        "steps": STEPS, "warmup_steps": WARMUP, "batch_size": 6, "reference_batch_size": 5, "learning_rate": 1e-3,
    }  # fmt: skip
    made = experiment(method=METHODS[method], optimisation=optimisation)
    second = made.tasks[1].model_copy(update={"learning_rate": 5e-3})
    made = made.model_copy(update={"tasks": (made.tasks[0], second, made.tasks[2])})
    parts = {part for part in ("distill", "consolidate", "average") if getattr(made.method, part)}
    if method == "other distances":
        parts = {"other distances"}
    distill = made.method.distill
    opened, clip = open_experiment(made), load(made.model)
    initial = freeze(deepcopy(clip.model))
    scale = clip.model.logit_scale.detach().clone()  # type: ignore[union-attr, operator]
    for stage, learning_rate in ((1, 1e-3), (2, 5e-3)):
        task = opened.tasks[stage - 1]
        tokens, teacher, images = torch.empty(0), None, None
        frozen = initial if distill is None or distill.teacher == "initial" else freeze(deepcopy(clip.model))
        if distill is not None:
            tokens = tokens_of(distill, clip, task, opened.tasks, opened.reference, made.seed)
            images = task.train if distill.images == "task" or opened.reference is None else opened.reference.images
            with torch.no_grad():
                texts = frozen.encode_text(tokens, normalize=True)  # type: ignore[operator]
            assert images is not None
            teacher = Teacher(images, texts, lambda shown, _, frozen=frozen: frozen.encode_image(shown, normalize=True))
        derived = derive(
            clip.model,
            frozen,
            parts,
            training_batches(made, stage, task, clip, images, CPU),
            clip.tokenizer(task.prompts(task.templates[0])),
            tokens,
            learning_rate,
        )
        model, result, steps = train_stage(made, stage, task, clip, teacher, CPU, report=lambda taken: None)
        assert result.merges == (STEPS // EVERY + 2 if "average" in parts else 0)
        for ours, theirs in zip(steps, derived.losses, strict=True):
            for loss, expected in theirs.items():
                # Consolidation also sums what round-off did to the attention biases; see below.
                rel = 1e-3 if loss == "consolidation" else 1e-6
                assert ours.losses[loss] == pytest.approx(expected, rel=rel, abs=1e-12), (ours.step, loss)
            assert ours.losses.keys() == theirs.keys()
        found = dict(model.named_parameters())
        assert torch.equal(found["logit_scale"], scale)
        for name, weights in derived.weights.items():
            # The key third of an attention's input bias has no gradient but round-off, which Adam makes steps of.
            if "in_proj_bias" not in name:
                assert torch.allclose(found[name], weights, rtol=1e-6, atol=1e-9), (stage, name)
        clip.model.load_state_dict(model.state_dict())


def test_lwf_distils_the_tasks_own_images_and_prompts(experiment: Callable[..., Experiment]) -> None:
    made = experiment(method="lwf", reference=None)
    opened, clip = open_experiment(made), load(made.model)
    task = opened.tasks[1]
    assert made.method.distill is not None
    assert torch.equal(
        tokens_of(made.method.distill, clip, task, opened.tasks, None, 0),
        clip.tokenizer(task.prompts(task.templates[0])),
    )
    plain = [clip.evaluation_transform(Image.open(io.BytesIO(s.image))) for s in task.train.once(0, 1)]
    batch = next(training_batches(made, 2, task, clip, task.train, CPU))
    assert batch.references is not None
    assert all(any(torch.equal(image, other) for other in plain) for image in batch.references)


def test_random_sentences_are_plain_tokens_between_start_and_end(experiment: Callable[..., Experiment]) -> None:
    tokenizer: Any = load(experiment().model).tokenizer
    first, again, other = (random_sentences(tokenizer, 50, 6, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (50, 12)
    assert set(first[:, 0].tolist()) == {tokenizer.sot_token_id}
    assert set(first[:, 7].tolist()) == {tokenizer.eot_token_id}
    assert int(first[:, 1:7].max()) < tokenizer.sot_token_id
    assert int(first[:, 8:].abs().sum()) == 0
    with pytest.raises(InputError, match=r"random_length: found 11, expected at most 10"):
        random_sentences(tokenizer, 50, 11, 0)


def test_stages_and_streams_have_orders_of_their_own(experiment: Callable[..., Experiment]) -> None:
    made = experiment()
    opened, clip = open_experiment(made), load(made.model)
    task = opened.tasks[0]
    assert opened.reference is not None
    images = opened.reference.images
    one, two = (next(training_batches(made, stage, task, clip, images, CPU)) for stage in (1, 2))
    assert not torch.equal(one.images, two.images)
    assert one.references is not None
    assert two.references is not None
    assert not torch.equal(one.references, two.references)


def test_reference_images_are_seen_as_in_evaluation(experiment: Callable[..., Experiment]) -> None:
    made = experiment()
    opened, clip = open_experiment(made), load(made.model)
    assert opened.reference is not None
    plain = [clip.evaluation_transform(Image.open(io.BytesIO(s.image))) for s in opened.reference.images.once(0, 1)]
    batch = next(training_batches(made, 1, opened.tasks[0], clip, opened.reference.images, CPU))
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
