"""Evaluation of the accuracy matrix's rows by Ray tasks, in parallel with training. The main worker submits them."""

from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayTaskError

from orchestrate.cluster.storage_sync import NOT_PULLED
from schemas.errors import InputError
from schemas.experiment import Experiment
from zscl.sequence.async_matrix import SubmitEvaluation
from zscl.sequence.object_store import RemoteSync, node_local_sync
from zscl.sequence.run import measure_row
from zscl.training.checkpoint import StoppedError

# The number of retries of a task whose process or node died. A retry skips accuracies that are stored already.
MAX_RETRIES = 3


class EvaluationTask:
    """Handle of a Ray task that evaluates one stage's model on all tasks."""

    def __init__(self, reference: Any, sync: RemoteSync | None) -> None:
        self._reference, self._sync = reference, sync

    def done(self) -> bool:
        """Return whether the Ray task has ended."""
        return bool(ray.wait([self._reference], timeout=0)[0])

    def result(self) -> None:
        """Wait until the Ray task has ended and the accuracies that it measured are in the run's folder.

        Raises:
            InputError: A dataset or the stage's model is missing or broken.
            RayTaskError: The Ray task failed with another error.
            StoppedError: The Ray task stopped because a stop of the run was requested.
        """
        try:
            ray.get(self._reference)
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, InputError | StoppedError):
                raise cause from error
            raise
        if self._sync:
            self._sync.pull(exclude=NOT_PULLED)


def build_submitter(
    experiment: Experiment, folder: Path, use_gpu: bool, channel: Any, sync: RemoteSync | None
) -> SubmitEvaluation:
    """Build the function that submits a Ray task that evaluates one stage's model on all tasks.

    The accuracies are one row of the accuracy matrix. The Ray task requests the same resources as a training worker.

    Args:
        experiment: The run's experiment.
        folder: The run's folder.
        use_gpu: Whether the workers have GPUs.
        channel: The handle of the run's `RunChannel` actor, from which the Ray task reads a request to stop.
        sync: Copies the run's folder to and from object storage; `None` if all nodes share the folder.

    Returns:
        A function that takes the stage's number (0 for the initial model) and returns the Ray task's handle.
    """
    task = ray.remote(_evaluate_row).options(
        num_cpus=experiment.compute.cpus_per_worker,
        num_gpus=experiment.compute.gpus_per_worker if use_gpu else 0,
        max_retries=MAX_RETRIES,
        scheduling_strategy="DEFAULT",  # do not use the placement group of the worker that submits the task
    )
    recipe = experiment.model_dump_json()

    def submit(stage: int) -> EvaluationTask:
        if sync:
            sync.push()
        return EvaluationTask(task.remote(recipe, folder, stage, use_gpu, channel, sync and sync.url), sync)

    return submit


def _evaluate_row(recipe: str, folder: Path, stage: int, use_gpu: bool, channel: Any, url: str | None) -> None:
    """Evaluate one stage's model on all tasks. This function is called in the process of the Ray task.

    Args:
        recipe: The run's experiment as JSON.
        folder: The run's folder, if all nodes share it.
        stage: The stage's number.
        use_gpu: Whether to use a GPU.
        channel: The handle of the run's `RunChannel` actor.
        url: The URL of the run's folder in object storage. The folder is downloaded from this URL before the
            evaluation and uploaded afterwards. `None` if all nodes share the folder.
    """
    sync = node_local_sync(url) if url else None
    if sync:
        folder = sync.folder
        sync.pull(exclude=NOT_PULLED)
    measure_row(
        Experiment.model_validate_json(recipe),
        folder,
        stage,
        torch.device("cuda" if use_gpu else "cpu"),
        lambda: bool(ray.get(channel.stop_requested.remote())),
    )
    if sync:
        sync.push()
