"""Accuracy matrix → figures. A[j][i]: accuracy on task i after stage j, as a fraction.

A sequence under way has fewer rows than tasks; its figures are those of the rows there are.
"""

import math
from collections.abc import Sequence
from statistics import fmean

from schemas.results import Metrics

Matrix = Sequence[Sequence[float]]


def transfer(matrix: Matrix) -> float | None:
    """Mean over tasks i ≥ 2 of the mean accuracy on i before it is trained; `None` for a single task."""
    before = [[row[task] for row in matrix[:task]] for task in range(1, len(matrix[0]))]
    return fmean(map(fmean, before)) if before else None


def average(matrix: Matrix) -> float:
    """Mean of the whole matrix (Avg)."""
    return fmean(map(fmean, matrix))


def last(matrix: Matrix) -> float:
    """Mean of the last row."""
    return fmean(matrix[-1])


def forgetting(matrix: Matrix) -> float | None:
    """Mean over all tasks trained but the last of best minus final accuracy; `None` before there are two."""
    lost = [max(row[task] for row in matrix) - matrix[-1][task] for task in range(len(matrix) - 1)]
    return fmean(lost) if lost else None


def backward_transfer(matrix: Matrix) -> float | None:
    """Mean over all tasks trained but the last of final accuracy minus that right after training the task.

    Lopez-Paz & Ranzato, Gradient Episodic Memory, NeurIPS 2017; `None` before there are two.
    """
    gained = [matrix[-1][task] - matrix[task][task] for task in range(len(matrix) - 1)]
    return fmean(gained) if gained else None


def forward_transfer(matrix: Matrix, zero_shot: Sequence[float]) -> float | None:
    """Mean over all tasks but the first of accuracy right before training the task minus the initial model's.

    As above, with the zero-shot row for the paper's random initialisation.
    """
    tasks = range(1, min(len(matrix) + 1, len(zero_shot)))
    gained = [matrix[task - 1][task] - zero_shot[task] for task in tasks]
    return fmean(gained) if gained else None


def is_at_chance(accuracy: float, classes: int, images: int) -> bool:
    """Whether an accuracy is what guessing gives: at most two standard deviations above one in so many classes."""
    guessed = 1 / classes
    return classes > 1 and accuracy <= guessed + 2 * math.sqrt(guessed * (1 - guessed) / images)


def seen(matrix: Matrix, images: Sequence[int]) -> list[float]:
    """After each stage, the accuracy over all test images of the tasks so far.

    Args:
        matrix: of a single head.
        images: test images of each task.
    """
    return [
        sum(row[task] * images[task] for task in range(stage)) / sum(images[:stage])
        for stage, row in enumerate(matrix, start=1)
    ]


def metrics(matrix: Matrix, zero_shot: Sequence[float], images: Sequence[int] | None = None) -> Metrics:
    """All figures of a matrix, square or with as many rows as stages are done.

    Args:
        matrix: accuracies.
        zero_shot: the initial model's row.
        images: test images of each task, where one head tells all classes seen apart (class-incremental learning).
    """
    over_seen = seen(matrix, images) if images else None
    return Metrics(
        transfer=transfer(matrix),
        avg=fmean(over_seen) if over_seen else average(matrix),
        last=over_seen[-1] if over_seen else last(matrix),
        forgetting=forgetting(matrix),
        backward_transfer=backward_transfer(matrix),
        forward_transfer=forward_transfer(matrix, zero_shot),
    )
