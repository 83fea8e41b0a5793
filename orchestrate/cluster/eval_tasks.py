"""Rows of the matrix as Ray tasks beside the training, asked for by the main worker, which they end with."""

from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayTaskError

from orchestrate.cluster.storage_sync import NOT_WATCHED
from schemas.errors import InputError
from schemas.experiment import Experiment
from zscl.sequence.async_matrix import SubmitEvaluation
from zscl.sequence.object_store import RemoteSync, node_local_folder
from zscl.sequence.run import measure_row
from zscl.training.checkpoint import StoppedError

RETRIES = 3  # of a task whose process or node has died: cells that are measured stay


class EvaluationTask:
    """A task under way."""

    def __init__(self, reference: Any, mirror: RemoteSync | None) -> None:
        self._reference, self._mirror = reference, mirror

    def done(self) -> bool:
        """Whether it has ended."""
        return bool(ray.wait([self._reference], timeout=0)[0])

    def result(self) -> None:
        """Wait for its end.

        Raises:
            InputError: what it has found wrong.
            StoppedError: the run was asked to stop.
            RayTaskError: what else it failed with.
        """
        try:
            ray.get(self._reference)
        except RayTaskError as error:
            if isinstance(error.cause, InputError | StoppedError):
                raise error.cause from error
            raise
        if self._mirror:
            self._mirror.pull(without=NOT_WATCHED)


def submit_to_ray(
    experiment: Experiment, folder: Path, use_gpu: bool, line: Any, mirror: RemoteSync | None
) -> SubmitEvaluation:
    """What begins to measure a row, with as much of the cluster as a worker gets.

    Args:
        experiment: the run's.
        folder: the run's.
        use_gpu: whether the workers have GPUs.
        line: asked for the wish to stop.
        mirror: of the folder, where nodes share none.
    """
    measure = ray.remote(_measure).options(
        num_cpus=experiment.compute.cpus_per_worker,
        num_gpus=experiment.compute.gpus_per_worker if use_gpu else 0,
        max_retries=RETRIES,
        scheduling_strategy="DEFAULT",  # not into the resources of the worker group, of which this is called
    )
    recipe = experiment.model_dump_json()

    def begin(stage: int) -> EvaluationTask:
        if mirror:
            mirror.push()
        return EvaluationTask(measure.remote(recipe, folder, stage, use_gpu, line, mirror and mirror.url), mirror)

    return begin


def _measure(recipe: str, folder: Path, stage: int, use_gpu: bool, line: Any, url: str | None) -> None:
    mirror = node_local_folder(url) if url else None
    if mirror:
        folder = mirror.folder
        mirror.pull(without=NOT_WATCHED)
    measure_row(
        Experiment.model_validate_json(recipe),
        folder,
        stage,
        torch.device("cuda" if use_gpu else "cpu"),
        lambda: bool(ray.get(line.asked_to_stop.remote())),
    )
    if mirror:
        mirror.push()
