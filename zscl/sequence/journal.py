"""The journal of a run: its events, one JSON object per line, in the run's folder.

Rank 0 writes the journal, so that no event is lost if the tracking server or the process that displays the run fails. A
resumed run reports some events again; `JournalReader` skips these repetitions.
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
from zscl.sequence.layout import JOURNAL


@dataclass(frozen=True)
class RunIdentity:
    """Identifies a run, independent of the location of its folder.

    Attributes:
        fingerprint: The experiment's fingerprint.
        start_time: Unix time of the journal's first entry, in milliseconds.
    """

    fingerprint: str
    start_time: int


def read_run_identity(run: Path) -> RunIdentity | None:
    """Read the identity of the run in a folder.

    Args:
        run: The run's folder.

    Returns:
        The identity; `None` if the folder has no journal of a run.
    """
    start_time, fingerprint = None, None
    try:
        lines = (run / JOURNAL).read_bytes().splitlines()
    except OSError:
        return None
    for line in lines:
        if start_time is not None and b'"run_started"' not in line:
            continue
        try:
            entry = JournalEntry.model_validate_json(line)
        except ValidationError:  # an incomplete line of a killed process
            continue
        start_time = entry.time if start_time is None else start_time
        # The last of these entries counts, because another run may reuse a folder without results.
        if isinstance(entry.progress, RunStarted):
            fingerprint = entry.progress.fingerprint
    return None if start_time is None or fingerprint is None else RunIdentity(fingerprint, start_time)


def read_start_time(run: Path) -> int | None:
    """Return the Unix time in milliseconds at which the run in a folder started; `None` if there is no run."""
    identity = read_run_identity(run)
    return identity.start_time if identity else None


class Journal:
    """Appends events to the journal. Events that cannot be written are kept in memory and written with the next event.

    Events of progress within a longer computation (`TaskEvaluated`, `ImagesEmbedded`) are not written.

    Attributes:
        file: The journal's path.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        # Ends an incomplete last line of a killed process.
        self._buffer = "\n" if file.is_file() and file.stat().st_size else ""

    def __call__(self, event: BaseModel) -> None:
        """Append an event to the journal."""
        if isinstance(event, TaskEvaluated | ImagesEmbedded):
            return
        entry = JournalEntry.model_validate({"time": time.time_ns() // 1_000_000, "progress": event})
        self._buffer += entry.model_dump_json() + "\n"
        try:
            self._write()
        except OSError:
            self._buffer = "\n" + self._buffer.lstrip("\n")  # a part of the buffer may have been written

    def flush(self) -> None:
        """Write the events that are kept in memory, and flush the file to the disk.

        Raises:
            OSError: Storage has failed permanently or for several minutes.
        """
        retry_io(lambda: self._write(flush=True), must_exist=self.file.parent, description=self.file)

    def _write(self, flush: bool = False) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(self._buffer)
            if flush:
                stream.flush()
                os.fsync(stream.fileno())
        self._buffer = ""


class JournalReader:
    """Reads a journal to which a run may still append. It returns every event once and in order.

    Attributes:
        file: The journal's path.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._offset = 0
        self._seen: set[tuple[str, int]] = set()
        self._next_step: dict[int, int] = {}

    def read_new(self) -> list[JournalEntry]:
        """Read the entries that were written since the last call.

        Returns:
            The new entries; empty if there is no journal yet.

        Raises:
            OSError: The journal cannot be read.
        """
        if not self.file.is_file():
            return []
        with self.file.open("rb") as stream:
            stream.seek(self._offset)
            content = stream.read()
        complete_lines = content[: content.rfind(b"\n") + 1]
        self._offset += len(complete_lines)
        entries = []
        for line in complete_lines.splitlines():
            try:
                entry = self._remove_repetition(JournalEntry.model_validate_json(line))
            except ValidationError:  # an incomplete line of a killed process
                continue
            if entry is not None:
                entries.append(entry)
        return entries

    def _remove_repetition(self, entry: JournalEntry) -> JournalEntry | None:
        """Return an entry without the steps that were read before; `None` if it contains nothing new."""
        event: BaseModel = entry.progress
        match event:
            case StepsTaken():
                next_step = self._next_step.get(event.stage, 0)
                steps = tuple(step for step in event.steps if step.step >= next_step)
                if not steps:
                    return None
                self._next_step[event.stage] = steps[-1].step + 1
                return entry.model_copy(update={"progress": event.model_copy(update={"steps": steps})})
            case StageStarted() | RowMeasured():
                key: tuple[str, int] = (event.event, event.stage)
            case StageTrained():
                key = (event.event, event.result.stage)
            case _:
                return entry
        if key in self._seen:
            return None
        self._seen.add(key)
        return entry
