"""Weight snapshots of a stage, and computation of other weight averages from them without training again.

A stage's folder of snapshots (see `zscl.sequence.layout`) contains:

    <step>.safetensors   the trained parameters after steps 0, N, 2N, … (N: compute.snapshots_every)
    last.safetensors     the trained parameters after the last step

`replay_average` loads the snapshots in the order of their steps and averages them as training does (see
`zscl.methods.weight_averaging`). With the averaging settings of the run's recipe, it returns the averaged model of the
run bit for bit.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from schemas.errors import ErrorCode, InputError
from schemas.method import Average
from zscl.methods.weight_averaging import build_averager, trained_parameters
from zscl.runtime.atomic_io import atomic_file
from zscl.runtime.distributed import rank
from zscl.runtime.retry import retry_io, to_os_error

SUFFIX = ".safetensors"
LAST_SNAPSHOT = f"last{SUFFIX}"


class SnapshotWriter:
    """Writes a snapshot of the trained parameters every `every` steps, on rank 0.

    A run that resumes after a crash repeats the steps since its last checkpoint and writes their snapshots again.

    Attributes:
        folder: The stage's folder of snapshots.
        every: The interval in steps.
        steps: Number of steps of the stage.
        weights: Returns the trained parameters by name, in their full shapes.
    """

    def __init__(self, folder: Path, every: int, steps: int, weights: Callable[[], Mapping[str, torch.Tensor]]) -> None:
        self.folder, self.every, self.steps, self.weights = folder, every, steps, weights

    def after_step(self, step: int) -> None:
        """Write a snapshot if the step is a multiple of the interval, or if it is `steps`, the end of the stage."""
        if rank() == 0 and step == self.steps:
            self._write(LAST_SNAPSHOT)
        elif rank() == 0 and step % self.every == 0:
            self._write(f"{step}{SUFFIX}")

    def _write(self, name: str) -> None:
        retry_io(lambda: self._write_once(self.folder / name), must_exist=self.folder.parents[1])

    def _write_once(self, file: Path) -> None:
        weights = {name: tensor.detach().to("cpu").contiguous() for name, tensor in self.weights().items()}
        with atomic_file(file) as temporary:
            try:
                save_file(weights, temporary)
            except SafetensorError as error:  # also if the disk is full
                raise to_os_error(error) from error
            temporary.chmod(0o644)  # safetensors creates files that only their owner can read


def snapshot_interval(folder: Path) -> int:
    """Read the interval of a stage's snapshots from their file names.

    Args:
        folder: The stage's folder of snapshots.

    Returns:
        The interval in steps.

    Raises:
        InputError: The folder has no snapshots, or a snapshot is missing.
    """
    steps = sorted(int(file.stem) for file in folder.glob(f"*{SUFFIX}") if file.stem.isdecimal())
    if not steps or not (folder / LAST_SNAPSHOT).is_file():
        raise InputError(
            f"{folder}: found no snapshots of a complete stage, expected a run with compute.snapshots_every set",
            code=ErrorCode.NOT_FOUND,
            field="compute.snapshots_every",
        )
    every = steps[1] if len(steps) > 1 else 1
    for index, step in enumerate(steps):
        if step != index * every:
            raise InputError(
                f"{folder}: found no {index * every}{SUFFIX}, expected one every {every} steps",
                code=ErrorCode.NOT_FOUND,
            )
    return every


def replay_average(
    model: nn.Module, average: Average | None, folder: Path, steps: int, multi_tensor: bool = True
) -> tuple[nn.Module, int]:
    """Compute the resulting model of a stage with other averaging settings, from the stage's snapshots.

    Args:
        model: The model at the start of the stage, with `requires_grad` set for the parameters that the stage trains.
            It is changed in place. At the end, it has the weights after the last step.
        average: The averaging settings; `None` for no averaging, so that the weights after the last step are returned.
        folder: The stage's folder of snapshots.
        steps: Number of steps of the stage.
        multi_tensor: Use multi-tensor operations, as in training (`compute.savings`).

    Returns:
        The model, and the number of models that were averaged.

    Raises:
        InputError: The settings average weights at a step without a snapshot, or a snapshot cannot be read.
    """
    every = snapshot_interval(folder)
    if average is not None and average.every % every:
        raise InputError(
            f"--every {average.every}: {folder} has a snapshot every {every} steps, expected a multiple of {every}",
            code=ErrorCode.INVALID_VALUE,
            field="--every",
        )
    start = [parameter.detach().clone() for parameter in trained_parameters(model)]
    averager = build_averager(average, model, start, multi_tensor)
    for step, file in _merge_files(folder, average.every if average else steps, steps):
        _load_snapshot(model, file)
        averager.after_step(step)
    return averager.model, averager.merges


def _merge_files(folder: Path, every: int, steps: int) -> Iterator[tuple[int, Path]]:
    """Yield the steps after which weights may be averaged, each with the file of its snapshot."""
    yield from ((step, folder / f"{step}{SUFFIX}") for step in range(0, steps, every))
    yield steps, folder / LAST_SNAPSHOT


@torch.no_grad()
def _load_snapshot(model: nn.Module, file: Path) -> None:
    try:
        weights = load_file(file)
        parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        if weights.keys() != parameters.keys():
            raise ValueError("the parameters are not those that the model trains")
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    except Exception as error:  # safetensors and torch raise exceptions of many classes
        reason = " ".join(str(error).split())
        raise InputError(
            f"{file}: found no readable snapshot ({reason}), expected the stage's weights", code=ErrorCode.UNREADABLE
        ) from error
