"""Our evaluation against that of CLIP_benchmark, with the same shards and the same model."""

from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest
import torch

from schemas.experiment import Experiment, Model
from zscl.data.decode import Decoder
from zscl.data.loader import EvaluationImages, Loader
from zscl.data.task import TaskFolder
from zscl.evaluation.zero_shot import embed_task_classes
from zscl.models.clip import load_clip
from zscl.sequence.run import run_sequence

pytest.importorskip("clip_benchmark", reason="CLIP_benchmark is not installed; `make install` brings it")

from clip_benchmark.datasets.builder import build_wds_dataset
from clip_benchmark.metrics.zeroshot_classification import run_classification, zero_shot_classifier

CPU = torch.device("cpu")


def test_clip_benchmark_predicts_the_same_to_the_last_sample(
    experiment: Callable[..., Experiment], tmp_path: Path
) -> None:
    settings = experiment()
    result = run_sequence(settings, tmp_path, device=CPU)
    name = f"local-dir:{tmp_path}/stages/2-second/model"
    model, _, transform = open_clip.create_model_and_transforms(name)
    model.eval()
    clip = load_clip(Model(name=name))
    clip.model.eval()
    for column, task in enumerate(map(TaskFolder.open, settings.tasks)):
        dataset = build_wds_dataset(task.name, transform, split="test", data_dir=task.path)
        weights = zero_shot_classifier(
            model, open_clip.get_tokenizer(name), dataset.classes, dataset.templates, "cpu", amp=False
        )
        logits, labels = run_classification(
            model, weights, torch.utils.data.DataLoader(dataset, batch_size=4), "cpu", amp=False
        )
        predicted, true = [], []
        with torch.inference_mode():
            classifier = embed_task_classes(clip, task, "all", CPU)
            images = EvaluationImages(task.test, Decoder(clip.evaluation_transform, task.get_label), 0, 1)
            for batch, batch_labels in images.iter_batches(4, Loader(CPU)):
                predicted.append((clip.model.encode_image(batch, normalize=True) @ classifier.T).argmax(dim=1))  # type: ignore[operator]
                true.append(batch_labels)
        assert torch.equal(torch.cat(true), labels)
        assert torch.equal(torch.cat(predicted), logits.argmax(dim=1))
        correct = int(logits.argmax(dim=1).eq(labels).sum())
        assert correct / len(labels) == pytest.approx(result.accuracy_matrix[1][column], abs=1e-12)
