"""An experiment whose data is found and whose identity is known."""

from dataclasses import dataclass

from schemas.experiment import Experiment
from zscl import memory
from zscl.model import weights_digest
from zscl.tasks import ReferenceSet, TaskFolder


@dataclass(frozen=True)
class Opened:
    """An experiment whose data is found and whose identity is known."""

    experiment: Experiment
    tasks: tuple[TaskFolder, ...]
    reference: ReferenceSet | None
    weights: str
    fingerprint: str


def open_experiment(experiment: Experiment) -> Opened:
    """Find all that the experiment names.

    Raises:
        InputError: a task, shard, template, caption or model is missing or broken.
    """
    cache = experiment.compute.shard_cache
    tasks = tuple(TaskFolder.open(task, cache) for task in experiment.tasks)
    used = experiment.reference if experiment.method.needs_reference else None
    opened = ReferenceSet(used, cache) if used else None
    if experiment.method.memory:
        memory.check_budget(experiment.method.memory.budget, tasks)
    weights = weights_digest(experiment.model)
    contents = {task.path: task.digest for task in tasks} | {experiment.model.name: weights}
    if opened:
        contents["reference"] = opened.digest
    return Opened(experiment, tasks, opened, weights, experiment.fingerprint(contents))
