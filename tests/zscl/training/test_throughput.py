"""What workers use is counted and told; what is counted adds up."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from schemas.events import WorkersUsed
from schemas.experiment import Experiment
from schemas.results import Result
from zscl.runtime.timing import Clock
from zscl.sequence.journal import JournalReader
from zscl.sequence.layout import JOURNAL
from zscl.sequence.run import run_sequence
from zscl.training import throughput as usage
from zscl.training.throughput import ThroughputMonitor


def test_a_clock_times_blocks_items_and_calls() -> None:
    clock = Clock()
    with clock("block"):
        time.sleep(0.02)
    with pytest.raises(ValueError, match="inside"), clock("block"):
        raise ValueError("inside")
    assert list(clock.time_iterator("items", iter("abc"))) == ["a", "b", "c"]
    slow = clock.time_calls("calls", lambda pause: time.sleep(pause) or "done")
    assert slow(0.03) == "done"
    assert clock.seconds["block"] >= 0.02
    assert clock.seconds["calls"] >= 0.03
    assert clock.seconds["items"] >= 0


def test_a_resumed_stage_counts_from_its_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage, "REPORT_SECONDS", 0.0)
    seconds = iter([10.0, 12.0, 12.0, 12.0])
    monkeypatch.setattr(usage.time, "monotonic", lambda: next(seconds))
    told: list[WorkersUsed] = []
    ThroughputMonitor(2, 16, Clock(), torch.device("cpu"), told.append, first_step=1000).poll(1010)
    assert told[0].workers[0].images_per_second == pytest.approx(10 * 16 / 2)


def test_a_stage_reports_its_use_of_resources(
    experiment: Callable[..., Experiment], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage, "REPORT_SECONDS", 0.0)
    made = experiment(compute={"device": "cpu", "checkpoint": {"every_steps": 1}})
    run_sequence(made, tmp_path / "run", device=torch.device("cpu"))
    entries = [entry.progress for entry in JournalReader(tmp_path / "run" / JOURNAL).read_new()]
    used = [each for each in entries if isinstance(each, WorkersUsed)]
    assert [(each.stage, each.step) for each in used][:4] == [(1, 0), (1, 1), (1, 2), (1, 3)]
    for each in used:
        [worker] = each.workers
        assert worker.images_per_second > 0
        assert 0 <= worker.loader_wait_share <= 1
        assert worker.memory_megabytes > 50
        assert worker.gpu_memory_megabytes is None
    result = Result.model_validate_json((tmp_path / "run/result.json").read_text())
    for stage in result.stages:
        parts = stage.seconds_by_part
        assert set(parts) == {"data", "student", "teacher", "averaging", "checkpoint"}
        assert min(parts.values()) >= 0
        assert sum(parts.values()) == pytest.approx(stage.train_seconds, rel=0.1)
