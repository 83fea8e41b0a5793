"""One model, many tasks, several protocols: each test image is encoded once and judged under every one of them.

Task-aware (MTIL), an image is told apart among its own task's classes. Task-agnostic (X-TAIL: Xu et al., *Advancing
Cross-domain Discriminability in Continual Learning of Vision-Language Models*, NeurIPS 2024), among the classes of all
tasks at once; a class that two tasks name alike is one class there, with a prompt of each.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from schemas.errors import InputError, command
from schemas.evaluation import Bin, ConfusionCount, Protocol, TaskEvaluation
from zscl.data.decode import Decoder
from zscl.data.loader import EvaluationImages, Loader
from zscl.data.task import TaskFolder
from zscl.evaluation.zero_shot import embed_classes
from zscl.models.clip import Clip, at_least_float32, precision_context
from zscl.models.load_checks import check_finite

BINS = 15  # of confidence; Guo et al., On Calibration of Modern Neural Networks, ICML 2017


@dataclass(frozen=True)
class LabelSpace:
    """Classes that are told apart.

    embeddings: [R, D], normalised, one or more rows a class; owner: [R], each row's class; names: of the C classes.
    """

    embeddings: torch.Tensor
    owner: torch.Tensor
    names: tuple[str, ...]

    def similarities(self, features: torch.Tensor) -> torch.Tensor:
        """Each image's cosine to the nearest row of each class. [b, D] → [b, C]"""
        rows = features @ self.embeddings.T
        if len(self.names) == len(self.owner):
            return rows
        nearest = rows.new_full((len(rows), len(self.names)), -torch.inf)
        return nearest.scatter_reduce(1, self.owner.expand(len(rows), -1), rows, "amax")


def shared_space(
    tasks: Sequence[TaskFolder], embedded: Sequence[torch.Tensor]
) -> tuple[LabelSpace, list[torch.Tensor]]:
    """One space for all tasks, and for each task its labels' classes in it, [C of the task].

    Args:
        tasks: whose classes.
        embedded: their class embeddings, [C of the task, D] each.
    """
    numbers: dict[tuple[str, int], int] = {}
    names: list[str] = []
    places = []
    for task in tasks:
        own: list[int] = []
        for label, name in enumerate(task.classnames):
            # Two classes of one task stay two, whatever they are called.
            key = name.casefold(), sum(name.casefold() == other.casefold() for other in task.classnames[:label])
            if key not in numbers:
                numbers[key] = len(names)
                names.append(name)
            own.append(numbers[key])
        places.append(torch.tensor(own, device=embedded[0].device))
    return LabelSpace(torch.cat(list(embedded)), torch.cat(places), tuple(names)), places


class TaskTally:
    """What is counted of a task's images in a space.

    Args:
        space: classes told apart.
        scale: by which similarities are multiplied before the softmax.
    """

    def __init__(self, space: LabelSpace, scale: torch.Tensor) -> None:
        self.space, self.scale = space, scale
        device, classes = space.embeddings.device, len(space.names)
        self.confusion = torch.zeros(classes, classes, dtype=torch.long, device=device)  # true, predicted
        self.in_top5 = 0
        self.bins = torch.zeros(3, BINS, dtype=torch.float64, device=device)  # images, sum of confidence, right ones

    def add(self, features: torch.Tensor, classes: torch.Tensor) -> None:
        """Count images: normalised features [b, D] and their classes in the space, [b]."""
        similarities = self.space.similarities(features)
        count = len(self.space.names)
        predicted = similarities.argmax(dim=1)
        pairs = (classes * count + predicted).bincount(minlength=count * count)
        self.confusion += pairs.view(count, count)
        if count > 5:
            self.in_top5 += int((similarities.topk(5).indices == classes[:, None]).any(dim=1).sum())
        confidence = (self.scale * similarities).softmax(dim=1).amax(dim=1).double()
        bins = (confidence * BINS).long().clamp(max=BINS - 1)
        for row, each in zip(self.bins, (torch.ones_like(confidence), confidence, predicted == classes), strict=True):
            row.index_add_(0, bins, each.double())

    def judged(self, task: TaskFolder, protocol: Protocol) -> TaskEvaluation:
        """The figures.

        Raises:
            InputError: there was no image.
        """
        confusion = self.confusion.cpu()
        of_class, right = confusion.sum(dim=1), confusion.diagonal()
        images, count = int(of_class.sum()), len(self.space.names)
        if images == 0:
            raise InputError(
                f"{task.path}: found no image that can be used, expected some to judge '{task.name}' by; "
                f"{command('zscl', 'data', 'check', task.path)} lists what is wrong"
            )
        found = of_class.nonzero().flatten().tolist()
        names = _told_apart(self.space.names)
        in_bin, confidence, accurate = self.bins.cpu()
        filled = in_bin.clamp(min=1)
        return TaskEvaluation(
            task=task.name,
            protocol=protocol,
            images=images,
            classes=count,
            top1=int(right.sum()) / images,
            top5=self.in_top5 / images if count > 5 else None,
            mean_per_class=float((right[found] / of_class[found]).double().mean()),
            calibration_error=float((confidence - accurate).abs().sum() / images),
            per_class={names[each]: int(right[each]) / int(of_class[each]) for each in found},
            bins=tuple(
                Bin(images=int(count), confidence=float(sure), accuracy=float(right))
                for count, sure, right in zip(in_bin, confidence / filled, accurate / filled, strict=True)
            ),
            confused=tuple(
                ConfusionCount(true=names[true], predicted=names[predicted], images=int(confusion[true, predicted]))
                for true, predicted in confusion.nonzero().tolist()
            ),
        )


def _told_apart(names: Sequence[str]) -> list[str]:
    """Class names of which no two are alike: CLIP calls two of ImageNet's classes `crane`."""
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
    """Judge `clip.model` on every task, and on suites whose classes join no other's.

    Args:
        clip: model, tokenizer and evaluation transform.
        tasks: whose classes share the label space of the task-agnostic protocol.
        suites: further ones, judged task-aware alone: what is watched for drift.
        protocols: of the tasks.
        loader: how to read, and the model's device.
        templates: `all` or `first`; a class embedding is the normalised mean of its template embeddings.
        precision: `fp32` or `bf16`.
        batch_size: images encoded at once.
        on_images: told how many images were judged since.

    Raises:
        InputError: a task has no usable image.
    """
    embedded = embed_classes(clip, [*tasks, *suites], templates, precision, loader.device)
    shared, places = shared_space(tasks, embedded[: len(tasks)]) if tasks else (None, [])
    scale = clip.model.logit_scale.detach().exp()  # type: ignore[operator]
    clip.model.eval()
    for number, (task, embeddings) in enumerate(zip([*tasks, *suites], embedded, strict=True)):
        own = torch.arange(len(task.classnames), device=loader.device)
        tallies: dict[Protocol, tuple[TaskTally, torch.Tensor]] = {}
        if "task-aware" in protocols or number >= len(tasks):
            tallies["task-aware"] = TaskTally(LabelSpace(embeddings, own, task.classnames), scale), own
        if "task-agnostic" in protocols and number < len(tasks) and shared is not None:
            tallies["task-agnostic"] = TaskTally(shared, scale), places[number]
        images = EvaluationImages(task.test, Decoder(clip.evaluation_transform, task.label_of), worker=0, workers=1)
        with torch.inference_mode():
            for batch, labels in images.batches(batch_size, loader):
                with precision_context(precision, loader.device):
                    features = at_least_float32(clip.model.encode_image(batch, normalize=True))  # type: ignore[operator]
                check_finite(features, f"{task.path}/test: the model gives its images")
                for tally, classes in tallies.values():
                    tally.add(features, classes[labels])
                on_images(len(labels))
        loader.check_over_workers()
        yield from (tally.judged(task, protocol) for protocol, (tally, _) in tallies.items())
