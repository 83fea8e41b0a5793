"""Collective operations of torch.distributed. Without a process group, they behave as with a single worker.

All workers compute the same loss on the global batch from gathered features, so the results do not depend on the number
of workers. All ranks must call a collective operation. The operations need a process group only if there are
several workers.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist


def world_size() -> int:
    """Return the number of workers."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return this worker's rank, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def barrier() -> None:
    """Wait until all workers have called this function."""
    if dist.is_initialized():
        dist.barrier()


def rank_slice(total: int, of_rank: int | None = None) -> range:
    """Divide items among the workers in contiguous slices, whose sizes differ by at most 1. Return one slice.

    Args:
        total: The number of items.
        of_rank: The rank of the worker; default: the calling worker.

    Returns:
        The indices of the worker's items.
    """
    worker = rank() if of_rank is None else of_rank
    return range(worker * total // world_size(), (worker + 1) * total // world_size())


def gather(rows: torch.Tensor, total: int) -> torch.Tensor:
    """Concatenate the rows of all workers, and return them on every worker, without gradient.

    Args:
        rows: This worker's rows, whose indices are `rank_slice(total)` [b, …].
        total: The number of rows of all workers together.

    Returns:
        All rows, in the order of the ranks [total, …].
    """
    if world_size() == 1:
        return rows
    return _gather_padded(rows, [len(rank_slice(total, worker)) for worker in range(world_size())])


def gather_ragged(rows: torch.Tensor) -> torch.Tensor:
    """Concatenate the rows of all workers, and return them on every worker, for any number of rows per worker.

    Args:
        rows: This worker's rows [b, …].

    Returns:
        All rows, in the order of the ranks [sum of all b, …].
    """
    if world_size() == 1:
        return rows
    counts = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    return _gather_padded(rows, [int(count) for count in counts])


def _gather_padded(rows: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """Gather `counts[rank]` rows from each rank. Rows are padded for all_gather, which needs equal shapes."""
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded)
    return torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)])


def all_gather_unique(messages: Iterable[str]) -> list[str]:
    """Collect the messages of all workers, and return them on every worker.

    Args:
        messages: This worker's messages.

    Returns:
        The sorted messages without duplicates, so that the result does not depend on the number of workers.
    """
    if world_size() == 1:
        return sorted(set(messages))
    gathered: list[list[str]] = [[] for _ in range(world_size())]
    dist.all_gather_object(gathered, list(messages))
    return sorted({message for of_rank in gathered for message in of_rank})


def broadcast_ints(*numbers: int) -> list[int]:
    """Return rank 0's integers on all workers."""
    if world_size() == 1:
        return list(numbers)
    broadcast = torch.tensor(numbers, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.broadcast(broadcast, src=0)
    return [int(number) for number in broadcast]


def broadcast_text(text: str) -> str:
    """Return rank 0's text on all workers."""
    if world_size() == 1:
        return text
    broadcast = [text]
    dist.broadcast_object_list(broadcast, src=0)
    return broadcast[0]


class _GatherWithGradient(torch.autograd.Function):
    """All-gather with a gradient.

    The gradient of a worker's rows is its slice of the output's gradient, times the world size. All workers
    differentiate the same global loss, so the slice is complete without communication. The factor cancels the division
    by the world size when DDP averages the parameters' gradients.
    """

    @staticmethod
    def forward(context: Any, rows: torch.Tensor, total: int) -> torch.Tensor:
        context.slice = rank_slice(total)
        return gather(rows, total)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        local = gradients[0][context.slice.start : context.slice.stop]
        return local * world_size(), None


def gather_with_gradient(rows: torch.Tensor, total: int) -> torch.Tensor:
    """Concatenate the rows of all workers, and return them on every worker, with a gradient for this worker's rows.

    The gradient assumes that all workers compute the same loss from the gathered rows.

    Args:
        rows: This worker's rows, whose indices are `rank_slice(total)` [b, …].
        total: The number of rows of all workers together.

    Returns:
        All rows, in the order of the ranks [total, …].
    """
    if world_size() == 1:
        return rows
    return _GatherWithGradient.apply(rows, total)  # type: ignore[no-any-return]


def all_reduce_sum(*numbers: float) -> list[float]:
    """Sum each number over all workers in float64, and return the sums on every worker."""
    if world_size() == 1:
        return list(numbers)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    sums = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return [float(number) for number in sums]


def broadcast_tensor(rows: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """Return rank 0's matrix on all workers.

    Args:
        rows: On rank 0, the matrix [n, d]. On other ranks, the value is not used and may be `None`.
        like: A tensor with the dtype and the device of the matrix.

    Returns:
        Rank 0's matrix [n, d].
    """
    if world_size() == 1:
        assert rows is not None
        return rows
    shape = torch.tensor(rows.shape if rows is not None else (0, 0), device=like.device)
    dist.broadcast(shape, src=0)
    rows = rows if rows is not None else like.new_empty(tuple(shape.tolist()))
    dist.broadcast(rows, src=0)
    return rows
