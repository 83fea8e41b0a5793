"""Metrics of continual learning from an accuracy matrix: Transfer, Avg, Last, forgetting, BWT and FWT.

A[j, i] is the accuracy on task i after stage j, as a fraction: one row for each stage, one column for each task. In an
unfinished sequence, the metrics are computed from the rows of the finished stages.
"""

import math
from collections.abc import Sequence
from statistics import fmean

from schemas.results import Metrics

Matrix = Sequence[Sequence[float]]


def transfer(matrix: Matrix) -> float | None:
    """Return Transfer: the mean of mean_{j < i} A[j, i] over all tasks i ≥ 2; `None` for a single task."""
    before = [[row[task] for row in matrix[:task]] for task in range(1, len(matrix[0]))]
    return fmean(map(fmean, before)) if before else None


def average(matrix: Matrix) -> float:
    """Return Avg: the mean of all entries of the matrix."""
    return fmean(map(fmean, matrix))


def last(matrix: Matrix) -> float:
    """Return Last: the mean of the last row of the matrix."""
    return fmean(matrix[-1])


def forgetting(matrix: Matrix) -> float | None:
    """Return the forgetting: the mean of max_j A[j, i] − A[last, i] over all trained tasks i except the last one.

    Args:
        matrix: The accuracy matrix.

    Returns:
        The forgetting; `None` before the second stage.
    """
    losses = [max(row[task] for row in matrix) - matrix[-1][task] for task in range(len(matrix) - 1)]
    return fmean(losses) if losses else None


def backward_transfer(matrix: Matrix) -> float | None:
    """Return BWT: the mean of A[last, i] − A[i, i] over all trained tasks i except the last one.

    Lopez-Paz & Ranzato, Gradient Episodic Memory for Continual Learning, NeurIPS 2017.

    Args:
        matrix: The accuracy matrix.

    Returns:
        The backward transfer; `None` before the second stage.
    """
    gains = [matrix[-1][task] - matrix[task][task] for task in range(len(matrix) - 1)]
    return fmean(gains) if gains else None


def forward_transfer(matrix: Matrix, zero_shot: Sequence[float]) -> float | None:
    """Return FWT: the mean of A[i − 1, i] − zero_shot[i] over all tasks i ≥ 2.

    Lopez-Paz & Ranzato, NeurIPS 2017, except that the accuracy of a randomly initialised model is replaced by the
    zero-shot accuracy.

    Args:
        matrix: The accuracy matrix.
        zero_shot: The initial model's accuracy on every task.

    Returns:
        The forward transfer; `None` for a single task.
    """
    tasks = range(1, min(len(matrix) + 1, len(zero_shot)))
    gains = [matrix[task - 1][task] - zero_shot[task] for task in tasks]
    return fmean(gains) if gains else None


def is_at_chance(accuracy: float, classes: int, images: int) -> bool:
    """Return whether an accuracy is at most two standard deviations above the expected accuracy of random guessing.

    Args:
        accuracy: The accuracy as a fraction.
        classes: The number of classes.
        images: The number of test images.

    Returns:
        Whether guessing among the classes may explain the accuracy; `False` for a single class.
    """
    chance = 1 / classes
    return classes > 1 and accuracy <= chance + 2 * math.sqrt(chance * (1 - chance) / images)


def seen_class_accuracies(matrix: Matrix, image_counts: Sequence[int]) -> list[float]:
    """Compute the accuracy over all classes seen so far, for class-incremental learning.

    Args:
        matrix: The accuracy matrix, measured by classifying each image among all classes seen so far.
        image_counts: The number of test images of each task.

    Returns:
        The accuracy after each stage, on all test images of the tasks up to this stage.
    """
    return [
        sum(row[task] * image_counts[task] for task in range(stage)) / sum(image_counts[:stage])
        for stage, row in enumerate(matrix, start=1)
    ]


def compute_metrics(matrix: Matrix, zero_shot: Sequence[float], image_counts: Sequence[int] | None = None) -> Metrics:
    """Compute all metrics of an accuracy matrix.

    Args:
        matrix: The accuracy matrix, with a row for each finished stage.
        zero_shot: The initial model's accuracy on every task.
        image_counts: The number of test images of each task, for class-incremental learning; `None` otherwise. If
            given, Avg and Last are the mean and the last value of the accuracy over all seen classes.

    Returns:
        The metrics.
    """
    seen_accuracies = seen_class_accuracies(matrix, image_counts) if image_counts else None
    return Metrics(
        transfer=transfer(matrix),
        avg=fmean(seen_accuracies) if seen_accuracies else average(matrix),
        last=seen_accuracies[-1] if seen_accuracies else last(matrix),
        forgetting=forgetting(matrix),
        backward_transfer=backward_transfer(matrix),
        forward_transfer=forward_transfer(matrix, zero_shot),
    )
