"""Contrastive pre-training."""

from pathlib import Path

import open_clip
import pytest
import torch
from support.data import TINY_MODEL
from support.errors import refused

from schemas.errors import ErrorCode
from schemas.pretraining import Pretraining
from zscl.training.pretrain import contrastive_loss, pretrain_clip

PREPROCESS = {"mean": [0.5] * 3, "std": [0.25] * 3}


def recipe(**changes: object) -> Pretraining:
    content = {
        "architecture": TINY_MODEL,
        "preprocess": PREPROCESS,
        "epochs": 40,
        "batch_size": 7,
        "learning_rate": 0.01,
    }
    return Pretraining.model_validate(content | changes)


def test_without_equal_captions_it_is_the_loss_of_clip() -> None:
    torch.manual_seed(0)
    images, texts = (torch.nn.functional.normalize(torch.randn(5, 4), dim=1) for _ in range(2))
    expected = open_clip.ClipLoss()(images, texts, torch.tensor(7.0))
    assert torch.allclose(contrastive_loss(images, texts, torch.arange(5), torch.tensor(7.0)), expected)


def test_equal_captions_are_positives_of_each_other() -> None:
    features = torch.eye(2)[[0, 0, 1]]
    captions = torch.tensor([4, 4, 9])
    told, untold = (
        contrastive_loss(features, features, numbers, torch.tensor(20.0)) for numbers in (captions, torch.arange(3))
    )
    assert float(told) == pytest.approx(2 / 3 * torch.tensor(2.0).log().item(), abs=1e-4)  # what halving a target costs
    assert float(untold) == pytest.approx(float(told), abs=1e-4)
    wrong = contrastive_loss(features, features[[2, 0, 1]], captions, torch.tensor(20.0))
    assert float(wrong) > 5


def test_learns_and_writes_what_open_clip_loads(reference: str, tasks: list[str], tmp_path: Path) -> None:
    seen: list[tuple[int, int, float]] = []
    made = pretrain_clip(
        recipe(corpus=[reference], judge=tasks[:1]),
        tmp_path / "model",
        lambda step, steps, loss: seen.append((step, steps, loss)),
        torch.device("cpu"),
    )
    assert [step for step, _, _ in seen] == list(range(1, 40 * 14 // 7 + 1))
    assert seen[-1][2] < 0.7 * seen[0][2]
    assert set(made.zero_shot) == {"first"}
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}/model")
    assert next(model.parameters()).dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "code", "field"),
    [
        ({"corpus": ["{tasks}/train"]}, ErrorCode.EMPTY, "corpus"),
        ({"corpus": ["{reference}"], "architecture": {"embed_dim": 4}}, ErrorCode.INVALID_VALUE, "architecture"),
        ({"corpus": ["s3://bucket/0.tar"]}, ErrorCode.UNSUPPORTED, "corpus"),
    ],
)
def test_names_what_is_wrong(
    changes: dict[str, object], code: ErrorCode, field: str, reference: str, tasks: list[str], tmp_path: Path
) -> None:
    corpus = [str(place).format(tasks=tasks[0], reference=reference) for place in changes["corpus"]]  # type: ignore[attr-defined]
    with refused(code, field):
        pretrain_clip(recipe(**changes | {"corpus": corpus}), tmp_path / "model", lambda *_: None, torch.device("cpu"))
    assert not (tmp_path / "model").exists()
