"""Cache of trained stages and accuracy rows. Runs whose stage has the same inputs share the result of one training.

A key is a hash of all inputs of a stage or of an accuracy row (a model's accuracies on all tasks). The cache's folder
contains:

    <key>/            a stage's folder (see `zscl.sequence.layout`), written by the run that trained the stage
    <key>.row.json    an accuracy row
    .<key>.lock       the lock of the run that trains the stage or evaluates the row; other runs wait for it

Files are hard-linked into the runs' folders if the file system supports it, so that a shared stage uses disk space only
once.
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock
from pydantic import ValidationError

from schemas.algorithm import algorithm_version
from schemas.method import Average
from schemas.results import StageResult
from zscl.runtime.atomic_io import link_folder, quarantine, write_text
from zscl.runtime.distributed import barrier, broadcast_ints, broadcast_text, rank
from zscl.runtime.hashing import sha256_of
from zscl.runtime.retry import read_text_if_exists, retry_io, try_acquire
from zscl.sequence.layout import TRAINING
from zscl.sequence.resolve import ResolvedExperiment
from zscl.training.checkpoint import StoppedError

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
Averages = tuple[Average | None, ...]


@dataclass(frozen=True)
class SharedWork:
    """Caches that a run shares with other runs.

    Attributes:
        teacher_cache: The folder of the teacher's cached features.
        stage_cache: The folder of trained stages and accuracy rows; `None` if the run shares none.
        averages: Averaging settings of the other runs. Averaging does not change the training steps of a stage, so runs
            that differ only in averaging share the training of stage 1. Later stages start from the averaged weights
            and differ.
    """

    teacher_cache: Path
    stage_cache: Path | None = None
    averages: Averages = ()


class StageCache:
    """The cache of trained stages and accuracy rows, as one experiment uses it.

    Attributes:
        resolved: The experiment.
        folder: The cache's folder.
    """

    def __init__(self, resolved: ResolvedExperiment, folder: Path, averages: Averages) -> None:
        """Open the cache.

        Args:
            resolved: The experiment.
            folder: The cache's folder, visible to all ranks; it need not exist.
            averages: Averaging settings of the other experiments that use the cache.
        """
        self.resolved, self.folder = resolved, folder
        method = resolved.experiment.method
        different = [average for average in averages if average != method.average]
        self._extra_averages = tuple(dict.fromkeys(different)) if method.memory is None else ()

    def extra_averages(self, stage: int) -> Averages:
        """Return the averaging settings of other runs with which a stage also averages. Empty except for stage 1."""
        return self._extra_averages if stage == 1 else ()

    @contextmanager
    def lock(self, key: str, stop_requested: Callable[[], bool], on_note: Callable[[str], None]) -> Iterator[None]:
        """Context manager: hold an inter-process lock on a key. All ranks must call this.

        Args:
            key: The key of a stage or an accuracy row.
            stop_requested: Returns whether the run should stop; called on rank 0.
            on_note: Called with a message if another run holds the lock.

        Yields:
            Nothing.

        Raises:
            StoppedError: A stop was requested while waiting.
        """
        if rank() == 0:
            retry_io(lambda: self.folder.mkdir(parents=True, exist_ok=True))
        lock, is_waiting = FileLock(self.folder / f".{key}.lock"), False
        while True:
            acquired = rank() == 0 and try_acquire(lock, POLL_SECONDS)
            is_locked, stop = broadcast_ints(acquired, rank() == 0 and not acquired and stop_requested())
            if is_locked:
                break
            if stop:
                raise StoppedError("stopped while waiting for another run, which computes a shared stage or row")
            if not is_waiting:
                on_note("waiting for another run, which computes a shared stage or row")
                is_waiting = True
        try:
            yield
        finally:
            if rank() == 0:
                lock.release()

    def get(self, stage: int, folder: Path) -> bool:
        """Link a cached stage to a run's folder. All ranks must call this.

        Args:
            stage: The stage's number, from 1.
            folder: The stage's folder in the run.

        Returns:
            Whether the stage was in the cache.
        """
        cached = self.folder / self.model_key(stage)
        result = self._read_result(cached) if rank() == 0 else None
        if result is not None:
            content = result.model_copy(update={"shared": True}).model_dump_json(indent=1) + "\n"
            retry_io(lambda: link_folder(cached, folder, {TRAINING: content}), must_exist=self.folder)
        [is_cached] = broadcast_ints(result is not None)
        barrier()
        return bool(is_cached)

    def _read_result(self, folder: Path) -> StageResult | None:
        """Read the result of a cached stage; `None` if it is not cached. A damaged folder is renamed and ignored."""
        text = read_text_if_exists(folder / TRAINING, self.folder)
        if not text:
            return None
        try:
            return StageResult.model_validate_json(text)
        except ValidationError:
            renamed = quarantine(folder)
            log.warning(
                "%s: found a damaged %s; renamed the folder to %s, and the stage is trained again",
                folder,
                TRAINING,
                renamed,
            )
            return None

    def put(self, stage: int, folder: Path) -> None:
        """Add a stage's folder of a run to the cache. Only rank 0 may call this."""
        cached = self.folder / self.model_key(stage)
        if not cached.is_dir():
            retry_io(lambda: link_folder(folder, cached), must_exist=self.folder)

    def folder_for_average(self, stage: int, average: Average | None) -> Path:
        """Return the cache's folder for a stage's model with other averaging settings."""
        return self.folder / self.model_key(stage, average)

    def get_row(self, key: str) -> str:
        """Return a cached row as JSON, or an empty string if there is none. All ranks must call this."""
        return broadcast_text(read_text_if_exists(self._row_file(key), self.folder) if rank() == 0 else "")

    def put_row(self, key: str, row: str) -> None:
        """Add a row, as JSON, to the cache. Only rank 0 may call this."""
        retry_io(lambda: write_text(self._row_file(key), row), must_exist=self.folder)

    def _row_file(self, key: str) -> Path:
        return self.folder / f"{key}.row.json"

    def training_key(self, stage: int) -> str:
        """Return the hash of all inputs of a stage's training steps. Averaging is an input only after stage 1."""
        if stage > 1:
            return self.model_key(stage)
        return _content_key("course", {**self._identity, "method": self._method, "tasks": self._tasks(stage)})

    def model_key(self, stage: int, *average: Average | None) -> str:
        """Return the hash of all inputs of a stage's resulting model.

        Args:
            stage: The stage's number; 0 is the initial model.
            average: Averaging settings that replace those of the method; at most one value.

        Returns:
            The key.
        """
        if stage == 0:
            return _content_key("initial", {"model": self.resolved.model_digest})
        settings = average[0] if average else self.resolved.experiment.method.average
        method = {**self._method, "average": None if settings is None else settings.model_dump(mode="json")}
        return _content_key("stage", {**self._identity, "method": method, "tasks": self._tasks(stage)})

    def row_key(self, stage: int) -> str:
        """Return the hash of all inputs of the accuracy row after a stage."""
        experiment = self.resolved.experiment
        inputs = {
            "model": self.model_key(stage),
            "tasks": [task.digest for task in self.resolved.tasks],
            "one_head": experiment.class_incremental is not None,
            "stage": stage,
            "evaluation": experiment.evaluation.model_dump(mode="json"),
            "precision": experiment.optimisation.precision,
        }
        return _content_key("row", inputs)

    @cached_property
    def _identity(self) -> dict[str, Any]:
        """The inputs of the training of all stages, without the settings that only evaluation uses."""
        identity = self.resolved.experiment.identity(self.resolved.content_digests)
        held_out = identity.pop("evaluation").get("held_out")
        split = None if held_out is None else {name: held_out[name] for name in ("share", "seed")}
        return {**identity, "held_out": split}

    @property
    def _method(self) -> dict[str, Any]:
        """The parts of the method that influence the training steps of a stage: all except averaging."""
        return {name: part for name, part in self._identity["method"].items() if name != "average"}

    def _tasks(self, stage: int) -> Any:
        """Return the tasks that influence a stage: 1 to `stage`, or all if distillation uses prompts of later tasks."""
        distill, tasks = self.resolved.experiment.method.distill, self._identity["tasks"]
        reads_all = distill is not None and distill.prompts_of != "current"
        return {"stage": stage, "tasks": tasks if reads_all else tasks[:stage]}


def stage_identity(resolved: ResolvedExperiment, stage: int, *average: Average | None) -> str:
    """Return the hash of all inputs of a stage's training, including those of earlier stages.

    Args:
        resolved: The experiment.
        stage: The stage's number, from 1.
        average: Averaging settings that replace those of the method; at most one value.

    Returns:
        The hash, which is also the stage's key in a `StageCache`.
    """
    return StageCache(resolved, Path(), ()).model_key(stage, *average)


def _content_key(kind: str, content: Mapping[str, Any]) -> str:
    return f"{kind}-{sha256_of(algorithm_version(), json.dumps(content, sort_keys=True))[:24]}"
