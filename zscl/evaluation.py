"""One model, many tasks → one row of the accuracy matrix."""

import torch
from open_clip import build_zero_shot_classifier

from zscl.distributed import gather, rank, share, sum_over_workers, world_size
from zscl.model import Clip, at_least_float32, precision_context
from zscl.streams import Decode, EvaluationImages, Loader
from zscl.tasks import TaskFolder

CLASSES_AT_ONCE = 32  # classes (times templates) in one pass of the text tower


def accuracy(
    clip: Clip,
    task: TaskFolder,
    loader: Loader,
    *,
    templates: str = "all",
    precision: str = "fp32",
    batch_size: int = 256,
) -> tuple[float, int]:
    """Top-1 accuracy of `clip.model` on a task's test images among its classes, and how many images there are.

    Each class embedding is the normalised mean of its normalised template embeddings.

    Args:
        clip: model, tokenizer and evaluation transform.
        task: what to judge it on.
        loader: how to read, and the model's device.
        templates: `all` or `first`.
        precision: `fp32` or `bf16`.
        batch_size: images a worker encodes at once.
    """
    was_training = clip.model.training
    clip.model.eval()
    with torch.inference_mode():
        with precision_context(precision, loader.device):
            classifier = class_embeddings(clip, task, templates, loader.device)
        correct, images = count_correct(clip, task, classifier, loader, precision, batch_size)
    clip.model.train(was_training)
    return correct / images, images


def class_embeddings(clip: Clip, task: TaskFolder, templates: str, device: torch.device) -> torch.Tensor:
    """Embed every class; the workers share the classes. Returns [C, D], normalised."""
    used = task.templates if templates == "all" else task.templates[:1]
    formats = [lambda name, template=template: template.replace("{c}", name) for template in used]
    own = share(len(task.classnames))
    # With more workers than classes, some have none to embed: they embed one, for its shape, and give no row.
    names = [task.classnames[index] for index in own] or [task.classnames[0]]
    embedded = build_zero_shot_classifier(
        clip.model, clip.tokenizer, names, formats, num_classes_per_batch=CLASSES_AT_ONCE, device=device
    ).T[: len(own)]
    return gather(at_least_float32(embedded).contiguous(), len(task.classnames))


def count_correct(
    clip: Clip, task: TaskFolder, classifier: torch.Tensor, loader: Loader, precision: str, batch_size: int
) -> tuple[int, int]:
    """Classify every test image once over all workers. Returns (correct, images)."""
    images = EvaluationImages(task.test, Decode(clip.evaluation_transform, task.label_of), rank(), world_size())
    correct = seen = 0
    for batch, labels in images.batches(batch_size, loader):
        with precision_context(precision, loader.device):
            features = clip.model.encode_image(batch, normalize=True)  # type: ignore[operator]
        correct += int((at_least_float32(features) @ classifier.T).argmax(dim=1).eq(labels).sum())
        seen += len(labels)
    correct_everywhere, seen_everywhere = sum_over_workers(correct, seen)
    return int(correct_everywhere), int(seen_everywhere)
