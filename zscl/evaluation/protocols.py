"""Evaluation of one model on many tasks under the task-aware and the task-agnostic protocol.

Each test image is encoded once and classified under every protocol:

- task-aware (MTIL): among the classes of its own task;
- task-agnostic (X-TAIL: Xu et al., Advancing Cross-domain Discriminability in Continual Learning of Vision-Language
  Models, NeurIPS 2024): among the classes of all tasks. If several tasks have the same class name, it is one class with
  a prompt from each task.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from schemas.evaluation import ConfidenceBin, ConfusionCount, Protocol, TaskEvaluation
from zscl.data.decode import Decoder
from zscl.data.loader import EvaluationImages, Loader
from zscl.data.task import TaskFolder
from zscl.evaluation.zero_shot import check_has_images, embed_classes
from zscl.models.clip import Clip, at_least_float32, precision_context
from zscl.models.load_checks import check_finite

CALIBRATION_BINS = 15  # intervals of the confidence; Guo et al., On Calibration of Modern Neural Networks, ICML 2017


@dataclass(frozen=True)
class LabelSpace:
    """The C classes among which an image is classified.

    Attributes:
        embeddings: R L2-normalised class embeddings, [R, D]: one or more rows for each class.
        class_of_row: The index of each row's class, [R].
        names: The names of the C classes.
    """

    embeddings: torch.Tensor
    class_of_row: torch.Tensor
    names: tuple[str, ...]

    def similarities(self, features: torch.Tensor) -> torch.Tensor:
        """Compute the cosine similarity of each image to each class: the highest similarity to one of its embeddings.

        Args:
            features: L2-normalised image features, [b, D].

        Returns:
            Similarities, [b, C].
        """
        rows = features @ self.embeddings.T
        if len(self.names) == len(self.class_of_row):
            return rows
        nearest = rows.new_full((len(rows), len(self.names)), -torch.inf)
        return nearest.scatter_reduce(1, self.class_of_row.expand(len(rows), -1), rows, "amax")


def build_shared_space(
    tasks: Sequence[TaskFolder], embedded: Sequence[torch.Tensor]
) -> tuple[LabelSpace, list[torch.Tensor]]:
    """Build one label space from the classes of all tasks. Names that differ only in case are the same class.

    Args:
        tasks: The tasks.
        embedded: The class embeddings of each task, [C of the task, D].

    Returns:
        The label space, and a tensor for each task that maps its labels to classes of the label space, [C of the task].
    """
    class_of_key: dict[tuple[str, int], int] = {}
    names: list[str] = []
    classes_of_tasks = []
    for task in tasks:
        classes: list[int] = []
        for label, name in enumerate(task.classnames):
            # Two classes of one task are different classes even if they have the same name.
            repetition = sum(name.casefold() == earlier.casefold() for earlier in task.classnames[:label])
            key = name.casefold(), repetition
            if key not in class_of_key:
                class_of_key[key] = len(names)
                names.append(name)
            classes.append(class_of_key[key])
        classes_of_tasks.append(torch.tensor(classes, device=embedded[0].device))
    return LabelSpace(torch.cat(list(embedded)), torch.cat(classes_of_tasks), tuple(names)), classes_of_tasks


class EvaluationAccumulator:
    """Accumulates predictions on a task's images and computes the metrics of the task.

    Attributes:
        space: The label space with C classes.
        scale: exp(logit_scale), by which similarities are multiplied before the softmax.
        confusion: The number of images for each true class (row) and predicted class (column), [C, C].
        top5_correct: The number of images whose class is among the five most similar ones; counted if C > 5.
        bins: For each interval of confidence, the number of images, the sum of their confidences, and the number of
            correct predictions, [3, CALIBRATION_BINS].
    """

    def __init__(self, space: LabelSpace, scale: torch.Tensor) -> None:
        self.space, self.scale = space, scale
        device, class_count = space.embeddings.device, len(space.names)
        self.confusion = torch.zeros(class_count, class_count, dtype=torch.long, device=device)
        self.top5_correct = 0
        self.bins = torch.zeros(3, CALIBRATION_BINS, dtype=torch.float64, device=device)

    def update(self, features: torch.Tensor, classes: torch.Tensor) -> None:
        """Add a batch of images.

        Args:
            features: L2-normalised image features, [b, D].
            classes: The images' classes in the label space, [b].
        """
        similarities = self.space.similarities(features)
        class_count = len(self.space.names)
        predicted = similarities.argmax(dim=1)
        pairs = (classes * class_count + predicted).bincount(minlength=class_count * class_count)
        self.confusion += pairs.view(class_count, class_count)
        if class_count > 5:
            self.top5_correct += int((similarities.topk(5).indices == classes[:, None]).any(dim=1).sum())
        confidence = (self.scale * similarities).softmax(dim=1).amax(dim=1).double()
        bins = (confidence * CALIBRATION_BINS).long().clamp(max=CALIBRATION_BINS - 1)
        for row, values in zip(self.bins, (torch.ones_like(confidence), confidence, predicted == classes), strict=True):
            row.index_add_(0, bins, values.double())

    def compute(self, task: TaskFolder, protocol: Protocol) -> TaskEvaluation:
        """Compute the metrics of the accumulated predictions.

        Args:
            task: The task whose images were added.
            protocol: The evaluation protocol, recorded in the result.

        Returns:
            The metrics.

        Raises:
            InputError: No image was added.
        """
        confusion = self.confusion.cpu()
        per_class_images, per_class_correct = confusion.sum(dim=1), confusion.diagonal()
        images, class_count = int(per_class_images.sum()), len(self.space.names)
        check_has_images(task, images)
        present = per_class_images.nonzero().flatten().tolist()
        names = _unique_names(self.space.names)
        bin_images, bin_confidence, bin_correct = self.bins.cpu()
        divisor = bin_images.clamp(min=1)
        return TaskEvaluation(
            task=task.name,
            protocol=protocol,
            images=images,
            classes=class_count,
            top1=int(per_class_correct.sum()) / images,
            top5=self.top5_correct / images if class_count > 5 else None,
            mean_per_class=float((per_class_correct[present] / per_class_images[present]).double().mean()),
            calibration_error=float((bin_confidence - bin_correct).abs().sum() / images),
            per_class={names[label]: int(per_class_correct[label]) / int(per_class_images[label]) for label in present},
            bins=tuple(
                ConfidenceBin(images=int(count), confidence=float(confidence), accuracy=float(accuracy))
                for count, confidence, accuracy in zip(
                    bin_images, bin_confidence / divisor, bin_correct / divisor, strict=True
                )
            ),
            confused=tuple(
                ConfusionCount(true=names[true], predicted=names[predicted], images=int(confusion[true, predicted]))
                for true, predicted in confusion.nonzero().tolist()
            ),
        )


def _unique_names(names: Sequence[str]) -> list[str]:
    """Append its label to each class name that occurs twice, such as `crane` in CLIP's class names of ImageNet."""
    return [name if names.count(name) == 1 else f"{name} [{label}]" for label, name in enumerate(names)]


def evaluate_tasks(
    clip: Clip,
    tasks: Sequence[TaskFolder],
    suites: Sequence[TaskFolder],
    protocols: Sequence[Protocol],
    loader: Loader,
    *,
    templates: str = "all",
    precision: str = "fp32",
    batch_size: int = 256,
    on_images: Callable[[int], None] = lambda images: None,
) -> Iterator[TaskEvaluation]:
    """Evaluate `clip.model` on tasks under several protocols, and on additional tasks under the task-aware protocol.

    Args:
        clip: The model, its tokenizer and its evaluation transform.
        tasks: The tasks, whose classes form the label space of the task-agnostic protocol.
        suites: Additional tasks that measure the drift of the model. Their classes are not part of the task-agnostic
            label space.
        protocols: The protocols for the tasks.
        loader: The data loader, with the model's device.
        templates: `all` or `first` (see `embed_classes`).
        precision: `fp32` or `bf16`.
        batch_size: How many images are encoded at once.
        on_images: Called after each batch with its number of images.

    Yields:
        The metrics of each task under each protocol, then those of each suite.

    Raises:
        InputError: A task has no usable image, or features are not finite.
    """
    embedded = embed_classes(clip, [*tasks, *suites], templates, precision, loader.device)
    shared, classes_of_tasks = build_shared_space(tasks, embedded[: len(tasks)]) if tasks else (None, [])
    scale = clip.model.logit_scale.detach().exp()  # type: ignore[operator]
    clip.model.eval()
    for index, (task, embeddings) in enumerate(zip([*tasks, *suites], embedded, strict=True)):
        labels_as_classes = torch.arange(len(task.classnames), device=loader.device)
        accumulators: dict[Protocol, tuple[EvaluationAccumulator, torch.Tensor]] = {}
        if "task-aware" in protocols or index >= len(tasks):
            space = LabelSpace(embeddings, labels_as_classes, task.classnames)
            accumulators["task-aware"] = EvaluationAccumulator(space, scale), labels_as_classes
        if "task-agnostic" in protocols and index < len(tasks) and shared is not None:
            accumulators["task-agnostic"] = EvaluationAccumulator(shared, scale), classes_of_tasks[index]
        images = EvaluationImages(task.test, Decoder(clip.evaluation_transform, task.get_label), rank=0, world_size=1)
        with torch.inference_mode():
            for batch, labels in images.iter_batches(batch_size, loader):
                with precision_context(precision, loader.device):
                    features = at_least_float32(clip.model.encode_image(batch, normalize=True))  # type: ignore[operator]
                check_finite(features, f"{task.path}/test: the model's features of its images")
                for accumulator, classes in accumulators.values():
                    accumulator.update(features, classes[labels])
                on_images(len(labels))
        loader.check_broken_across_ranks()
        yield from (accumulator.compute(task, protocol) for protocol, (accumulator, _) in accumulators.items())
