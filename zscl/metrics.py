"""Accuracy matrix → figures. A[j][i]: accuracy on task i after stage j, as a fraction."""

from collections.abc import Sequence
from statistics import fmean

from schemas.results import Metrics

Matrix = Sequence[Sequence[float]]


def transfer(matrix: Matrix) -> float | None:
    """Mean over tasks i ≥ 2 of the mean accuracy on i before it is trained; `None` for a single task."""
    before = [[row[task] for row in matrix[:task]] for task in range(1, len(matrix))]
    return fmean(map(fmean, before)) if before else None


def average(matrix: Matrix) -> float:
    """Mean of the whole matrix (Avg)."""
    return fmean(map(fmean, matrix))


def last(matrix: Matrix) -> float:
    """Mean of the last row."""
    return fmean(matrix[-1])


def forgetting(matrix: Matrix) -> float | None:
    """Mean over all tasks but the last of best minus final accuracy; `None` for a single task."""
    lost = [max(row[task] for row in matrix) - matrix[-1][task] for task in range(len(matrix) - 1)]
    return fmean(lost) if lost else None


def metrics(matrix: Matrix) -> Metrics:
    """All figures of a square matrix."""
    return Metrics(transfer=transfer(matrix), avg=average(matrix), last=last(matrix), forgetting=forgetting(matrix))
