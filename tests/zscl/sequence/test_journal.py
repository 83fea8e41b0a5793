"""A run's journal: written through failing storage, read while it grows, everything once and in order."""

import math
from pathlib import Path

import pytest
from pydantic import BaseModel

from schemas.events import Note, RowMeasured, RunStarted, StageStarted, StageTrained, StepsTaken
from schemas.results import StageResult, StepLosses
from zscl.sequence.journal import Journal, JournalReader


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "run" / "journal.jsonl"


def notes(*texts: str) -> list[BaseModel]:
    return [Note(text=text) for text in texts]


def steps(*numbers: int, stage: int = 1, loss: float = 1.0) -> StepsTaken:
    taken = tuple(
        StepLosses(step=step, learning_rate=0.1, losses={"classification": loss}, gradient_norm=2.0) for step in numbers
    )
    return StepsTaken(stage=stage, task="first", steps=taken, images_per_second=10.0)


def write(file: Path, *progress: BaseModel) -> None:
    journal = Journal(file)
    for each in progress:
        journal(each)


def read(reader: JournalReader) -> list[BaseModel]:
    return [entry.progress for entry in reader.read_new()]


def test_a_growing_journal_is_read_once(file: Path) -> None:
    reader = JournalReader(file)
    assert read(reader) == []  # not there yet
    journal = Journal(file)
    journal(Note(text="one"))
    journal(Note(text="two – in UTF-8"))
    assert read(reader) == notes("one", "two – in UTF-8")
    assert read(reader) == []
    journal(steps(0, 1))
    assert read(reader) == [steps(0, 1)]
    times = [entry.time for entry in JournalReader(file).read_new()]
    assert times == sorted(times)


def test_an_incomplete_line_is_read_when_it_is_complete(file: Path) -> None:
    write(file, *notes("one", "two"))
    content = file.read_bytes()
    file.write_bytes(content[:-7])
    reader = JournalReader(file)
    assert read(reader) == notes("one")
    file.write_bytes(content)
    assert read(reader) == notes("two")


def test_an_incomplete_line_of_a_killed_process_hides_no_other_line(file: Path) -> None:
    write(file, *notes("one", "two"))
    file.write_bytes(file.read_bytes()[:-7])
    write(file, *notes("three"))
    assert read(JournalReader(file)) == notes("one", "three")


def test_garbage_hides_no_other_line(file: Path) -> None:
    write(file, *notes("one"))
    with file.open("ab") as stream:
        stream.write(b"\x00\xff\n{}\n[1]\n" + b'{"time": 1, "progress": {"event": "unheard of"}}\n')
    write(file, *notes("two"))
    assert read(JournalReader(file)) == notes("one", "two")


def test_repeated_events_of_a_resumed_run_are_skipped(file: Path) -> None:
    costs = {"steps": 4, "images_seen": 44, "train_seconds": 1.5, "images_per_second": 10.0, "merges": 1}
    trained = StageTrained(result=StageResult.model_validate({"stage": 1, "task": "first", "losses": {}, **costs}))
    start, row, stage = RunStarted(fingerprint="abc"), RowMeasured(stage=0, accuracy={"first": 0.5}), steps(2, 3)
    begun = StageStarted(stage=1, task="first", steps=4)
    write(file, start, row, begun, steps(0, 1), stage)
    reader = JournalReader(file)
    assert read(reader) == [start, row, begun, steps(0, 1), stage]
    write(file, start, row, begun, steps(1, 2), steps(3, 4), trained)  # from a checkpoint behind step 0
    assert read(reader) == [start, steps(4), trained]
    write(file, start, row, trained, RowMeasured(stage=1, accuracy={"first": 0.6}), steps(0, stage=2))
    assert read(reader) == [start, RowMeasured(stage=1, accuracy={"first": 0.6}), steps(0, stage=2)]


def test_readers_that_start_at_different_times_read_the_same_entries(file: Path) -> None:
    reader, together = JournalReader(file), []
    for number in range(4):
        write(file, RunStarted(fingerprint="abc"), steps(number, number + 1), *notes(str(number)))
        together += reader.read_new()
    assert together == JournalReader(file).read_new()


def test_nan_and_inf_survive_in_the_journal(file: Path) -> None:
    write(file, steps(0, loss=math.nan), steps(1, loss=math.inf))
    first, second = read(JournalReader(file))
    assert isinstance(first, StepsTaken)
    assert isinstance(second, StepsTaken)
    assert math.isnan(first.steps[0].losses["classification"])
    assert second.steps[0].losses["classification"] == math.inf


def test_lines_that_could_not_be_written_are_written_later(tmp_path: Path) -> None:
    (tmp_path / "run").symlink_to(tmp_path / "not mounted")
    file = tmp_path / "run" / "journal.jsonl"
    journal = Journal(file)
    journal(Note(text="one"))
    journal(Note(text="two"))
    (tmp_path / "not mounted").mkdir()
    assert read(JournalReader(file)) == []
    journal(Note(text="three"))
    assert read(JournalReader(file)) == notes("one", "two", "three")


def test_flush_writes_the_buffered_lines(tmp_path: Path) -> None:
    (tmp_path / "run").symlink_to(tmp_path / "not mounted")
    journal = Journal(tmp_path / "run" / "journal.jsonl")
    journal(Note(text="one"))
    (tmp_path / "not mounted").mkdir()
    journal.flush()
    assert read(JournalReader(journal.file)) == notes("one")
