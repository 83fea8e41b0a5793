"""One model, many tasks → one row of the accuracy matrix."""

from collections.abc import Sequence

import torch
from open_clip import build_zero_shot_classifier

from schemas.errors import InputError, command
from zscl.data.decode import Decoder
from zscl.data.loader import EvaluationImages, Loader
from zscl.data.task import TaskFolder
from zscl.models.clip import Clip, at_least_float32, precision_context
from zscl.models.load_checks import check_finite
from zscl.runtime.distributed import all_reduce_ints, gather, rank, rank_slice, world_size

CLASSES_AT_ONCE = 32  # classes (times templates) in one pass of the text tower


def accuracies(
    clip: Clip,
    task: TaskFolder,
    heads: Sequence[torch.Tensor],
    loader: Loader,
    *,
    precision: str = "fp32",
    batch_size: int = 256,
) -> tuple[list[float], int]:
    """Top-1 accuracy of `clip.model` on a task's test images under each of some heads, and how many images there are.

    Args:
        clip: model and evaluation transform.
        task: what to judge it on.
        heads: class embeddings [C or more, D], the task's own classes first (see `class_embeddings`).
        loader: how to read, and the model's device.
        precision: `fp32` or `bf16`.
        batch_size: images a worker encodes at once.

    Raises:
        InputError: there is no usable image.
    """
    was_training = clip.model.training
    clip.model.eval()
    with torch.inference_mode():
        correct, images = count_correct(clip, task, heads, loader, precision, batch_size)
    clip.model.train(was_training)
    if images == 0:
        raise InputError(
            f"{task.path}/test: found no image that can be used, expected some to judge '{task.name}' by; "
            f"{command('zscl', 'data', 'check', task.path)} lists what is wrong"
        )
    return [each / images for each in correct], images


def embed_classes(
    clip: Clip, tasks: Sequence[TaskFolder], templates: str, precision: str, device: torch.device
) -> list[torch.Tensor]:
    """Each task's class embeddings [C, D].

    Args:
        clip: model and tokenizer.
        tasks: whose classes.
        templates: `all` or `first`; a class embedding is the normalised mean of its template embeddings.
        precision: `fp32` or `bf16`.
        device: the model's.
    """
    was_training = clip.model.training
    clip.model.eval()
    with torch.inference_mode(), precision_context(precision, device):
        embedded = [class_embeddings(clip, task, templates, device) for task in tasks]
    clip.model.train(was_training)
    return embedded


def slice_head(embedded: Sequence[torch.Tensor], task: int, last: int) -> torch.Tensor:
    """What tells the classes of the tasks up to `last` apart, those of `task`, one of them, first. [C or more, D]"""
    return torch.cat([embedded[task], *embedded[:task], *embedded[task + 1 : last + 1]])


def class_embeddings(clip: Clip, task: TaskFolder, templates: str, device: torch.device) -> torch.Tensor:
    """Embed every class; the workers share the classes. Returns [C, D], normalised."""
    used = task.templates if templates == "all" else task.templates[:1]
    formats = [lambda name, template=template: template.replace("{c}", name) for template in used]
    own = rank_slice(len(task.classnames))
    # With more workers than classes, some have none to embed: they embed one, for its shape, and give no row.
    names = [task.classnames[index] for index in own] or [task.classnames[0]]
    embedded = build_zero_shot_classifier(
        clip.model, clip.tokenizer, names, formats, num_classes_per_batch=CLASSES_AT_ONCE, device=device
    ).T[: len(own)]
    gathered = gather(at_least_float32(embedded).contiguous(), len(task.classnames))
    check_finite(gathered, f"task '{task.name}': the model gives its class prompts")
    return gathered


def count_correct(
    clip: Clip, task: TaskFolder, heads: Sequence[torch.Tensor], loader: Loader, precision: str, batch_size: int
) -> tuple[list[int], int]:
    """Classify every test image once over all workers. Returns (correct under each head, images)."""
    images = EvaluationImages(task.test, Decoder(clip.evaluation_transform, task.label_of), rank(), world_size())
    correct, seen, finite = [0] * len(heads), 0, True
    for batch, labels in images.batches(batch_size, loader):
        with precision_context(precision, loader.device):
            features = at_least_float32(clip.model.encode_image(batch, normalize=True))  # type: ignore[operator]
        finite &= bool(features.isfinite().all())
        for number, head in enumerate(heads):
            correct[number] += int((features @ head.T).argmax(dim=1).eq(labels).sum())
        seen += len(labels)
    loader.check_over_workers()
    *correct_everywhere, seen_everywhere, finite_everywhere = map(int, all_reduce_ints(*correct, seen, finite))
    if finite_everywhere < world_size():  # all workers raise
        raise InputError(f"{task.path}/test: the model gives its images features that are NaN or Inf, expected numbers")
    return correct_everywhere, seen_everywhere
