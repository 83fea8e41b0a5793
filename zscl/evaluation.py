"""One model, many tasks → one row of the accuracy matrix."""

import torch
from open_clip import build_zero_shot_classifier
from torch import nn

from schemas.compute import Compute
from schemas.experiment import Experiment
from zscl.distributed import gather, rank, share, sum_over_workers, world_size
from zscl.model import Clip, precision_context
from zscl.streams import Decode, EvaluationImages, Loader
from zscl.tasks import TaskFolder

CLASSES_AT_ONCE = 32  # classes (times templates) in one pass of the text tower


def accuracy(
    clip: Clip, model: nn.Module, task: TaskFolder, experiment: Experiment, device: torch.device
) -> tuple[float, int]:
    """Top-1 accuracy on a task's test images among its classes, and how many images there are.

    Each class embedding is the normalised mean of its normalised template embeddings.

    Args:
        clip: tokenizer and evaluation transform.
        model: the model to judge, of clip's architecture.
        task: what to judge it on.
        experiment: templates, precision and batch size.
        device: where the model lies.
    """
    was_training = model.training
    model.eval()
    with torch.inference_mode(), precision_context(experiment.optimisation.precision, device):
        classifier = class_embeddings(clip, model, task, experiment.evaluation.templates, device)
        correct, images = count_correct(clip, model, task, classifier, experiment.compute, device)
    model.train(was_training)
    return correct / images, images


def class_embeddings(
    clip: Clip, model: nn.Module, task: TaskFolder, templates: str, device: torch.device
) -> torch.Tensor:
    """Embed every class; the workers share the classes. Returns [C, D], normalised."""
    used = task.templates if templates == "all" else task.templates[:1]
    formats = [lambda name, template=template: template.replace("{c}", name) for template in used]
    own = [task.classnames[index] for index in share(len(task.classnames))]
    if not own:  # more workers than classes: embed one for its shape
        own = [task.classnames[0]]
    embedded = build_zero_shot_classifier(
        model, clip.tokenizer, own, formats, num_classes_per_batch=CLASSES_AT_ONCE, device=device
    ).T[: len(share(len(task.classnames)))]
    return gather(embedded.float().contiguous(), len(task.classnames))


def count_correct(
    clip: Clip,
    model: nn.Module,
    task: TaskFolder,
    classifier: torch.Tensor,
    compute: Compute,
    device: torch.device,
) -> tuple[int, int]:
    """Classify every test image once over all workers. Returns (correct, images)."""
    images = EvaluationImages(task.test, Decode(clip.evaluation_transform, task.label), rank(), world_size())
    loader = Loader(device, compute.loader_processes)
    correct = seen = 0
    for batch, labels in images.batches(compute.evaluation_batch_size, loader):
        features = model.encode_image(batch, normalize=True).float()  # type: ignore[operator]
        correct += int((features @ classifier.T).argmax(dim=1).eq(labels).sum())
        seen += len(labels)
    correct_everywhere, seen_everywhere = sum_over_workers(correct, seen)
    return int(correct_everywhere), int(seen_everywhere)
