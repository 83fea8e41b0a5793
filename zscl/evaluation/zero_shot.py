"""Zero-shot classification: class embeddings from prompts, and top-1 accuracy, distributed over all ranks."""

from collections.abc import Sequence

import torch
from open_clip import build_zero_shot_classifier

from schemas.errors import ErrorCode, InputError, shell_command
from zscl.data.decode import Decoder
from zscl.data.loader import EvaluationImages, Loader
from zscl.data.task import TaskFolder
from zscl.models.clip import Clip, at_least_float32, precision_context
from zscl.models.load_checks import check_finite
from zscl.runtime.distributed import all_reduce_sum, gather, rank, rank_slice, world_size

CLASS_BATCH_SIZE = 32  # classes, each with all its templates, in one pass of the text tower


def compute_accuracies(
    clip: Clip,
    task: TaskFolder,
    heads: Sequence[torch.Tensor],
    loader: Loader,
    *,
    precision: str = "fp32",
    batch_size: int = 256,
) -> tuple[list[float], int]:
    """Compute the top-1 accuracy of `clip.model` on a task's test images. All ranks must call this.

    A head is a matrix of class embeddings; an image is classified as the row with the highest cosine similarity. Each
    image is encoded once and classified with every head.

    Args:
        clip: The model and its evaluation transform.
        task: The task.
        heads: One or more heads, [C or more, D]. The first C rows are the classes of the task, in label order.
        loader: The data loader, with the model's device.
        precision: `fp32` or `bf16`.
        batch_size: How many images a rank encodes at once.

    Returns:
        The accuracy with each head, as a fraction, and the number of test images.

    Raises:
        InputError: There is no usable image, or features are not finite.
    """
    was_training = clip.model.training
    clip.model.eval()
    with torch.inference_mode():
        correct, images = count_correct(clip, task, heads, loader, precision, batch_size)
    clip.model.train(was_training)
    check_has_images(task, images)
    return [count / images for count in correct], images


def check_has_images(task: TaskFolder, images: int) -> None:
    """Check that a task has usable test images.

    Args:
        task: The task.
        images: The number of usable test images.

    Raises:
        InputError: The task has no usable test image.
    """
    if images == 0:
        raise InputError(
            f"{task.path}/test: found no usable image, expected images to evaluate '{task.name}'; "
            f"{shell_command('zscl', 'data', 'check', task.path)} lists the problems",
            code=ErrorCode.EMPTY,
        )


def embed_classes(
    clip: Clip, tasks: Sequence[TaskFolder], templates: str, precision: str, device: torch.device
) -> list[torch.Tensor]:
    """Compute the class embeddings of tasks in evaluation mode. All ranks must call this.

    Args:
        clip: The model and its tokenizer.
        tasks: The tasks.
        templates: Which of a task's templates are used, `all` or `first`. Each template gives one prompt for a class. A
            class embedding is the normalised mean of the normalised features of the class's prompts.
        precision: `fp32` or `bf16`.
        device: The model's device.

    Returns:
        A matrix [C, D] for each task.
    """
    was_training = clip.model.training
    clip.model.eval()
    with torch.inference_mode(), precision_context(precision, device):
        embedded = [embed_task_classes(clip, task, templates, device) for task in tasks]
    clip.model.train(was_training)
    return embedded


def slice_head(embedded: Sequence[torch.Tensor], task: int, last: int) -> torch.Tensor:
    """Build the head (matrix of class embeddings) for all tasks up to `last`. The classes of `task` come first.

    Args:
        embedded: The class embeddings of every task, [C of the task, D].
        task: The index of the task that is evaluated, at most `last`.
        last: The index of the last task whose classes are in the head.

    Returns:
        Class embeddings, [C or more, D].
    """
    return torch.cat([embedded[task], *embedded[:task], *embedded[task + 1 : last + 1]])


def embed_task_classes(clip: Clip, task: TaskFolder, templates: str, device: torch.device) -> torch.Tensor:
    """Compute the class embeddings of one task. The ranks divide the classes. All ranks must call this.

    Args:
        clip: The model, in evaluation mode, and its tokenizer.
        task: The task.
        templates: `all` or `first` (see `embed_classes`).
        device: The model's device.

    Returns:
        L2-normalised class embeddings, [C, D], the same on all ranks.
    """
    used = task.templates if templates == "all" else task.templates[:1]
    formats = [lambda name, template=template: template.replace("{c}", name) for template in used]
    rank_indices = rank_slice(len(task.classnames))
    # A rank without classes embeds one class, to get the width of its empty tensor.
    names = [task.classnames[index] for index in rank_indices] or [task.classnames[0]]
    embedded = build_zero_shot_classifier(
        clip.model, clip.tokenizer, names, formats, num_classes_per_batch=CLASS_BATCH_SIZE, device=device
    ).T[: len(rank_indices)]
    gathered = gather(at_least_float32(embedded).contiguous(), len(task.classnames))
    check_finite(gathered, f"task '{task.name}': the model's features of its class prompts")
    return gathered


def count_correct(
    clip: Clip, task: TaskFolder, heads: Sequence[torch.Tensor], loader: Loader, precision: str, batch_size: int
) -> tuple[list[int], int]:
    """Classify every test image once. The ranks divide the images. All ranks must call this.

    Args:
        clip: The model, in evaluation mode, and its evaluation transform.
        task: The task.
        heads: Matrices of class embeddings (see `compute_accuracies`).
        loader: The data loader, with the model's device.
        precision: `fp32` or `bf16`.
        batch_size: How many images a rank encodes at once.

    Returns:
        The number of correct predictions with each head, and the number of images, over all ranks.

    Raises:
        InputError: Features are not finite. All ranks raise the error.
    """
    images = EvaluationImages(task.test, Decoder(clip.evaluation_transform, task.get_label), rank(), world_size())
    correct, count, is_finite = [0] * len(heads), 0, True
    for batch, labels in images.iter_batches(batch_size, loader):
        with precision_context(precision, loader.device):
            features = at_least_float32(clip.model.encode_image(batch, normalize=True))  # type: ignore[operator]
        is_finite &= bool(features.isfinite().all())
        for index, head in enumerate(heads):
            correct[index] += int((features @ head.T).argmax(dim=1).eq(labels).sum())
        count += len(labels)
    loader.check_broken_across_ranks()
    *total_correct, total_count, finite_ranks = map(int, all_reduce_sum(*correct, count, is_finite))
    if finite_ranks < world_size():
        raise InputError(
            f"{task.path}/test: the model's features of its images are NaN or Inf, expected finite numbers",
            code=ErrorCode.NOT_FINITE,
            field="model",
        )
    return total_correct, total_count
