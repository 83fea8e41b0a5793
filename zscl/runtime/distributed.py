"""The few collectives the method needs; with one process, all of them do nothing.

Every worker computes the same loss on the global batch from gathered features, so that any number of workers
gives the same numbers.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist


def world_size() -> int:
    """Number of workers."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This worker's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def barrier() -> None:
    """Wait for every worker."""
    if dist.is_initialized():
        dist.barrier()


def rank_slice(total: int, of_rank: int | None = None) -> range:
    """A worker's part of `total` things, this one's by default: contiguous, as even as can be."""
    worker = rank() if of_rank is None else of_rank
    return range(worker * total // world_size(), (worker + 1) * total // world_size())


def gather(rows: torch.Tensor, total: int) -> torch.Tensor:
    """Concatenate the workers' shares of `total` rows. [b, …] → [total, …]"""
    if world_size() == 1:
        return rows
    counts = [len(rank_slice(total, worker)) for worker in range(world_size())]
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded)
    return torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)])


def gather_ragged(rows: torch.Tensor) -> torch.Tensor:
    """Concatenate the workers' rows, as many as each has. [b, …] → [sum of all b, …]"""
    if world_size() == 1:
        return rows
    counts = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    padded = rows.new_zeros(max(map(int, counts)), *rows.shape[1:])
    padded[: len(rows)] = rows
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded)
    return torch.cat([part[: int(count)] for part, count in zip(gathered, counts, strict=True)])


def all_gather_unique(sentences: Iterable[str]) -> list[str]:
    """What any worker has to say, each sentence once, sorted: the same for any number of workers."""
    if world_size() == 1:
        return sorted(set(sentences))
    gathered: list[list[str]] = [[] for _ in range(world_size())]
    dist.all_gather_object(gathered, list(sentences))
    return sorted({sentence for own in gathered for sentence in own})


def broadcast_ints(*numbers: int) -> list[int]:
    """The main worker's whole numbers, for all."""
    if world_size() == 1:
        return list(numbers)
    agreed = torch.tensor(numbers, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.broadcast(agreed, src=0)
    return [int(number) for number in agreed]


def broadcast_text(text: str) -> str:
    """The main worker's text, for all."""
    if world_size() == 1:
        return text
    told = [text]
    dist.broadcast_object_list(told, src=0)
    return told[0]


class _GatherWithGradient(torch.autograd.Function):
    """`gather`, with the gradient that averaging over the workers makes whole.

    Every worker differentiates the same global loss, so the gradient of its own rows is complete on arrival: no
    communication. The averaging of parameter gradients then divides by the number of workers; hence the factor.
    """

    @staticmethod
    def forward(context: Any, rows: torch.Tensor, total: int) -> torch.Tensor:
        context.share = rank_slice(total)
        return gather(rows, total)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        own = gradients[0][context.share.start : context.share.stop]
        return own * world_size(), None


def gather_with_gradient(rows: torch.Tensor, total: int) -> torch.Tensor:
    """`gather`, through which a loss reaches this worker's rows. [b, …] → [total, …]"""
    if world_size() == 1:
        return rows
    return _GatherWithGradient.apply(rows, total)  # type: ignore[no-any-return]


def all_reduce_ints(*numbers: float) -> list[float]:
    """Sum each number over the workers."""
    if world_size() == 1:
        return list(numbers)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    sums = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return [float(number) for number in sums]


def broadcast_tensor(rows: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """Give every worker the main worker's rows, a matrix of `like`'s dtype and device."""
    if world_size() == 1:
        assert rows is not None
        return rows
    shape = torch.tensor(rows.shape if rows is not None else (0, 0), device=like.device)
    dist.broadcast(shape, src=0)
    rows = rows if rows is not None else like.new_empty(tuple(shape.tolist()))
    dist.broadcast(rows, src=0)
    return rows
