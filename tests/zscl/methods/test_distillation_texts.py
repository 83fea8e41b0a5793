"""Texts that a stage distils on, and noise images."""

import io
from collections.abc import Callable

import pytest
import torch
from PIL import Image

from schemas.experiment import Experiment
from schemas.method import Distill
from zscl.data.loader import Loader
from zscl.data.sample import NoiseSamples
from zscl.methods.distillation_texts import distillation_tokens
from zscl.models.clip import image_size, load_clip
from zscl.sequence.resolve import resolve
from zscl.training.batches import training_batches

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("prompts_of", "names"),
    [("current", ["second"]), ("others", ["first", "third"]), ("all", ["first", "second", "third"])],
)
def test_class_prompts_of_any_tasks(experiment: Callable[..., Experiment], prompts_of: str, names: list[str]) -> None:
    settings = experiment()
    resolved, clip = resolve(settings), load_clip(settings.model)
    distill = Distill.model_validate({"texts": "class_prompts", "prompts_of": prompts_of})
    tokens = distillation_tokens(distill, clip, resolved.tasks[1], resolved.tasks, None, seed=0)
    prompts = [f"a {task} square of {name}" for task in names for name in ("red", "green", "blue", "yellow")]
    assert torch.equal(tokens, clip.tokenizer(prompts))


def test_noise_is_uniform_and_depends_on_seed_and_position() -> None:
    noise = NoiseSamples((16, 24))
    first, again, other = ([draw(0) for draw in noise.iter_positions([0, 1, 10**9], seed)] for seed in (0, 0, 1))
    assert [sample.image for sample in first] == [sample.image for sample in again]
    assert len({sample.image for sample in (*first, *other)}) == 6
    with Image.open(io.BytesIO(first[2].image)) as image:
        assert image.size == (24, 16)
        pixels = torch.tensor(list(image.convert("RGB").tobytes()), dtype=torch.float32)
    assert float(pixels.mean()) == pytest.approx(127.5, abs=10)
    assert float(pixels.std()) == pytest.approx(73.9, abs=10)


def test_a_stage_distils_on_noise(experiment: Callable[..., Experiment]) -> None:
    settings = experiment(method={"preset": "zscl", "distill": {"images": "noise"}})
    resolved, clip = resolve(settings), load_clip(settings.model)
    noise = NoiseSamples(image_size(clip.model))
    batches = training_batches(settings, 1, resolved.tasks[0], clip, noise, Loader(CPU))
    one, two = next(batches), next(batches)
    assert one.references is not None
    assert one.references.shape == (5, 3, 16, 16)
    assert two.references is not None
    assert not torch.equal(one.references, two.references)
