"""Weights kept along a stage, and other averages of them than the stage handed on, without training.

    <run>/snapshots/<k>-<task>/<step>.safetensors   trained parameters after steps 0, N, 2N, … (compute.snapshots_every)
    <run>/snapshots/<k>-<task>/last.safetensors     those after the last step

Replay calls the averagers of training (`zscl.methods.weight_averaging`) at the same steps, so that the method's own
average is reproduced bit for bit.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from schemas.errors import InputError
from schemas.method import Average
from zscl.methods.weight_averaging import build_averager, trained_parameters
from zscl.runtime.atomic_io import atomic_file
from zscl.runtime.distributed import rank
from zscl.runtime.retry import os_error_of, retry_io

FOLDER = "snapshots"
SUFFIX = ".safetensors"
LAST = f"last{SUFFIX}"


def place_of(run: Path, stage: int, task: str) -> Path:
    """Where a stage's snapshots lie in a run's folder."""
    return run / FOLDER / f"{stage}-{task}"


class SnapshotWriter:
    """Keeps the weights after every so many steps; a step that is taken again, after an interruption, is kept again."""

    def __init__(self, folder: Path, every: int, steps: int, weights: Callable[[], Mapping[str, torch.Tensor]]) -> None:
        """Begin a stage.

        Args:
            folder: of its snapshots.
            every: steps from one to the next.
            steps: of the stage.
            weights: the trained parameters by name, in their whole shapes.
        """
        self.folder, self.every, self.steps, self.weights = folder, every, steps, weights

    def after_step(self, step: int) -> None:
        """Keep the weights, on the main worker, when the step is a multiple of the interval or the stage's end."""
        if rank() == 0 and step == self.steps:
            retry_io(lambda: self._write(LAST), must_exist=self.folder.parents[1])
        elif rank() == 0 and step % self.every == 0:
            retry_io(lambda: self._write(f"{step}{SUFFIX}"), must_exist=self.folder.parents[1])

    def _write(self, name: str) -> None:
        weights = {name: tensor.detach().to("cpu").contiguous() for name, tensor in self.weights().items()}
        with atomic_file(self.folder / name) as temporary:
            try:
                save_file(weights, temporary)
            except SafetensorError as error:  # of a full disk, too
                raise os_error_of(error) from error
            temporary.chmod(0o644)  # safetensors writes for its owner alone


def interval(folder: Path) -> int:
    """Steps from one snapshot of a stage to the next.

    Raises:
        InputError: there are none, or one of them is missing.
    """
    steps = sorted(int(file.stem) for file in folder.glob(f"*{SUFFIX}") if file.stem.isdecimal())
    if not steps or not (folder / LAST).is_file():
        raise InputError(
            f"{folder}: found no snapshots of a whole stage, expected a run with compute.snapshots_every set"
        )
    every = steps[1] if len(steps) > 1 else 1
    for index, step in enumerate(steps):
        if step != index * every:
            raise InputError(f"{folder}: found no {index * every}{SUFFIX}, expected one every {every} steps")
    return every


def replay(
    student: nn.Module, average: Average | None, folder: Path, steps: int, multi_tensor: bool = True
) -> tuple[nn.Module, int]:
    """What a stage would have handed on with another average. Returns the model, and how many models are in it.

    Args:
        student: the stage's start, with its trained parameters marked as such; it ends as the stage's last weights.
        average: the other average, or none.
        folder: the stage's snapshots.
        steps: of the stage.
        multi_tensor: as in training (`compute.savings`).

    Raises:
        InputError: a merge falls between two snapshots, or a snapshot cannot be read.
    """
    every = interval(folder)
    if average is not None and average.every % every:
        raise InputError(
            f"--every {average.every}: found snapshots of every {every} steps in {folder}, expected a multiple of that"
        )
    start = [parameter.detach().clone() for parameter in trained_parameters(student)]
    handed_on = build_averager(average, student, start, multi_tensor)
    for step, file in _merged(folder, average.every if average else steps, steps):
        _load(student, file)
        handed_on.after_step(step)
    return handed_on.model, handed_on.merges


def _merged(folder: Path, every: int, steps: int) -> Iterator[tuple[int, Path]]:
    """The steps that a merge may follow, and the weights after them."""
    yield from ((step, folder / f"{step}{SUFFIX}") for step in range(0, steps, every))
    yield steps, folder / LAST


@torch.no_grad()
def _load(student: nn.Module, file: Path) -> None:
    try:
        kept = load_file(file)
        parameters = {name: each for name, each in student.named_parameters() if each.requires_grad}
        if kept.keys() != parameters.keys():
            raise ValueError("other parameters than the model trains")
        for name, parameter in parameters.items():
            parameter.copy_(kept[name])
    except Exception as error:  # safetensors and torch raise what they meet
        reason = " ".join(str(error).split())
        raise InputError(f"{file}: found no readable snapshot ({reason}), expected the stage's weights") from error
