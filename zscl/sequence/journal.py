"""What happens in a run, a line each, in the run's folder.

The main worker writes it, so that nothing is lost with the process that watches or the server that records. After an
interruption it says some things again; reading leaves out what was said before.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ValidationError

from schemas.events import (
    ImagesEmbedded,
    JournalEntry,
    RowMeasured,
    RunStarted,
    StageStarted,
    StageTrained,
    StepsTaken,
    TaskEvaluated,
)
from zscl.runtime.retry import retry_io

JOURNAL = "journal.jsonl"


@dataclass(frozen=True)
class RunIdentity:
    """What tells a run from all others, wherever its folder lies.

    Attributes:
        fingerprint: of the experiment.
        begun: time of the journal's first entry, in milliseconds.
    """

    fingerprint: str
    begun: int


def identity_of(run: Path) -> RunIdentity | None:
    """Read whose journal a folder holds; `None` where there is none that tells of a run."""
    begun, fingerprint = None, None
    try:
        lines = (run / JOURNAL).read_bytes().splitlines()
    except OSError:
        return None
    for line in lines:
        if begun is not None and b'"run_started"' not in line:
            continue
        try:
            entry = JournalEntry.model_validate_json(line)
        except ValidationError:  # what a killed process left of a line
            continue
        begun = entry.time if begun is None else begun
        if isinstance(entry.progress, RunStarted):  # the last one counts: a folder in which nothing came about is taken
            fingerprint = entry.progress.fingerprint
    return None if begun is None or fingerprint is None else RunIdentity(fingerprint, begun)


def begun_in(run: Path) -> int | None:
    """Return when the run in a folder began, in milliseconds, if there is one."""
    found = identity_of(run)
    return found.begun if found else None


class Journal:
    """Writes lines at a file's end; what storage does not take now is written with the next line.

    What is only of the moment (a cell, before its row) is left out.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        # What a killed process left of a line ends here, and is no line.
        self._waiting = "\n" if file.is_file() and file.stat().st_size else ""

    def __call__(self, progress: BaseModel) -> None:
        """Write down what happened."""
        if isinstance(progress, TaskEvaluated | ImagesEmbedded):
            return
        entry = JournalEntry.model_validate({"time": time.time_ns() // 1_000_000, "progress": progress})
        self._waiting += entry.model_dump_json() + "\n"
        try:
            self._write()
        except OSError:
            self._waiting = "\n" + self._waiting.lstrip("\n")  # some of it may be there

    def flush(self) -> None:
        """Have what is waiting, and all before it, on the disk.

        Raises:
            OSError: storage does not take it.
        """
        retry_io(lambda: self._write(flush=True), must_exist=self.file.parent, what=self.file)

    def _write(self, flush: bool = False) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(self._waiting)
            if flush:
                stream.flush()
                os.fsync(stream.fileno())
        self._waiting = ""


class JournalReader:
    """Reads a journal that may still grow, everything once and in order."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._offset = 0
        self._said: set[tuple[str, int]] = set()
        self._steps: dict[int, int] = {}

    def new(self) -> list[JournalEntry]:
        """What was written since the last call; nothing where there is no journal yet.

        Raises:
            OSError: storage fails.
        """
        if not self.file.is_file():
            return []
        with self.file.open("rb") as stream:
            stream.seek(self._offset)
            content = stream.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._offset += len(whole)
        entries = []
        for line in whole.splitlines():
            try:
                entry = self._unsaid(JournalEntry.model_validate_json(line))
            except ValidationError:  # what a killed process left of a line
                continue
            if entry is not None:
                entries.append(entry)
        return entries

    def _unsaid(self, entry: JournalEntry) -> JournalEntry | None:
        progress: BaseModel = entry.progress
        match progress:
            case StepsTaken():
                known = self._steps.get(progress.stage, 0)
                steps = tuple(step for step in progress.steps if step.step >= known)
                if not steps:
                    return None
                self._steps[progress.stage] = steps[-1].step + 1
                return entry.model_copy(update={"progress": progress.model_copy(update={"steps": steps})})
            case StageStarted() | RowMeasured():
                said: tuple[str, int] = (progress.event, progress.stage)
            case StageTrained():
                said = (progress.event, progress.result.stage)
            case _:
                return entry
        if said in self._said:
            return None
        self._said.add(said)
        return entry
