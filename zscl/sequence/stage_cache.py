"""Trained stages and measured rows by content: what runs beside each other have in common is done once.

    <key>/            a stage's folder (see `zscl.sequence.run`), as the run that trained it left it
    <key>.row.json    the row of the model that it hands on
    .<key>.lock       held by the run that is at it; others wait, and take what it leaves

Files are linked where the file system can, so that a stage takes up its room once.
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

from schemas.algorithm import algorithm
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

LOOK_EVERY_SECONDS = 1.0
Averages = tuple[Average | None, ...]


@dataclass(frozen=True)
class SharedWork:
    """What a run shares with those beside it.

    teacher: folder of the teacher's embeddings; stages: folder of trained stages, `None`: every run trains its own;
    averages: those of the other runs. No average has a part in the steps of a stage, so that the first stage is trained
    once for all that differ in it alone.
    """

    teacher: Path
    stages: Path | None = None
    averages: Averages = ()


class StageCache:
    """Stages and rows that an experiment has in common with others."""

    def __init__(self, opened: ResolvedExperiment, folder: Path, averages: Averages) -> None:
        """Look at a store.

        Args:
            opened: the experiment.
            folder: of the store, visible to all workers; it need not exist.
            averages: of the experiments beside it.
        """
        self.opened, self.folder = opened, folder
        method = opened.experiment.method
        different = [average for average in averages if average != method.average]
        self._others = tuple(dict.fromkeys(different)) if method.memory is None else ()

    def other_averages(self, stage: int) -> Averages:
        """Averages that the stage's training serves beside the method's own; later stages start from an average."""
        return self._others if stage == 1 else ()

    @contextmanager
    def lock(self, key: str, asked_to_stop: Callable[[], bool], note: Callable[[str], None]) -> Iterator[None]:
        """Wait until no other run is at what has this key, and keep others from it. All workers enter together.

        Raises:
            StoppedError: the run was asked to stop while it waited.
        """
        if rank() == 0:
            retry_io(lambda: self.folder.mkdir(parents=True, exist_ok=True))
        lock, waits = FileLock(self.folder / f".{key}.lock"), False
        while True:
            got = rank() == 0 and try_acquire(lock, LOOK_EVERY_SECONDS)
            ours, stop = broadcast_ints(got, rank() == 0 and not got and asked_to_stop())
            if ours:
                break
            if stop:
                raise StoppedError("stopped while another run is at work for both")
            if not waits:
                note("waiting for a run beside this one, which is at work for both")
                waits = True
        try:
            yield
        finally:
            if rank() == 0:
                lock.release()

    def get(self, stage: int, place: Path) -> bool:
        """Leave a stage's folder at `place` as another run trained it, if one has. All workers ask together."""
        trained = self.folder / self.model_key(stage)
        result = self._trained(trained) if rank() == 0 else None
        there = result is not None
        if result is not None:
            shared = result.model_copy(update={"shared": True})
            content = shared.model_dump_json(indent=1) + "\n"
            retry_io(lambda: link_folder(trained, place, {TRAINING: content}), must_exist=self.folder)
        [taken] = broadcast_ints(there)
        barrier()
        return bool(taken)

    def _trained(self, folder: Path) -> StageResult | None:
        """Read what a stage's folder in the store says; one that is damaged is set aside."""
        text = read_text_if_exists(folder / TRAINING, self.folder)
        if not text:
            return None
        try:
            return StageResult.model_validate_json(text)
        except ValidationError:
            aside = quarantine(folder)
            log.warning("%s: found a damaged %s; the stage is trained again, this lies at %s", folder, TRAINING, aside)
            return None

    def put(self, stage: int, place: Path) -> None:
        """Let other runs take a stage; on the main worker."""
        kept = self.folder / self.model_key(stage)
        if not kept.is_dir():
            retry_io(lambda: link_folder(place, kept), must_exist=self.folder)

    def folder_for_average(self, stage: int, average: Average | None) -> Path:
        """Where the folder of a stage with another average belongs."""
        return self.folder / self.model_key(stage, average)

    def get_row(self, key: str) -> str:
        """A row as another run measured it; nothing where none has."""
        return broadcast_text(read_text_if_exists(self.folder / f"{key}.row.json", self.folder) if rank() == 0 else "")

    def put_row(self, key: str, row: str) -> None:
        """Let other runs read a row; on the main worker."""
        retry_io(lambda: write_text(self.folder / f"{key}.row.json", row), must_exist=self.folder)

    def training_key(self, stage: int) -> str:
        """Identity of all steps of a stage; the average has no part in those of the first."""
        if stage > 1:
            return self.model_key(stage)
        return _key("course", {**self._identity, "method": self._method, "tasks": self._tasks(stage)})

    def model_key(self, stage: int, *average: Average | None) -> str:
        """Identity of what a stage hands on, with the method's own average or another; stage 0: the initial model."""
        if stage == 0:
            return _key("initial", {"model": self.opened.weights})
        chosen = average[0] if average else self.opened.experiment.method.average
        method = {**self._method, "average": None if chosen is None else chosen.model_dump(mode="json")}
        return _key("stage", {**self._identity, "method": method, "tasks": self._tasks(stage)})

    def row_key(self, stage: int) -> str:
        """Identity of the row that is measured after a stage."""
        experiment = self.opened.experiment
        judged = {
            "model": self.model_key(stage),
            "tasks": [task.digest for task in self.opened.tasks],
            "one_head": experiment.class_incremental is not None,
            "stage": stage,
            "evaluation": experiment.evaluation.model_dump(mode="json"),
            "precision": experiment.optimisation.precision,
        }
        return _key("row", judged)

    @cached_property
    def _identity(self) -> dict[str, Any]:
        """What every stage's training reads beside method and tasks: not by what it is judged."""
        identity = self.opened.experiment.identity(self.opened.contents)
        held_out = identity.pop("evaluation").get("held_out")
        kept = None if held_out is None else {name: held_out[name] for name in ("share", "seed")}
        return {**identity, "held_out": kept}

    @property
    def _method(self) -> dict[str, Any]:
        """The parts that have to do with a stage's steps."""
        return {name: part for name, part in self._identity["method"].items() if name != "average"}

    def _tasks(self, stage: int) -> Any:
        """The tasks up to a stage; all of them where prompts of the others are distilled on."""
        distill, tasks = self.opened.experiment.method.distill, self._identity["tasks"]
        reads_all = distill is not None and distill.prompts_of != "current"
        return {"stage": stage, "tasks": tasks if reads_all else tasks[:stage]}


def stage_identity(opened: ResolvedExperiment, stage: int, *average: Average | None) -> str:
    """Return the content hash of all that the training of a stage reads: the stages before it included.

    Args:
        opened: the experiment.
        stage: counted from 1.
        average: another one than the method's own.
    """
    return StageCache(opened, Path(), ()).model_key(stage, *average)


def _key(kind: str, content: Mapping[str, Any]) -> str:
    return f"{kind}-{sha256_of(algorithm(), json.dumps(content, sort_keys=True))[:24]}"
