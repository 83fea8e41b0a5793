"""Wall time by part, and memory of the process."""

import time

import pytest
import torch

from zscl.runtime.timing import Clock, peak_memory_megabytes, resident_megabytes


def test_time_is_counted_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(100))
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))  # every measurement takes one second
    clock = Clock()
    with clock("teacher"):
        pass
    assert list(clock.time_iterator("data", iter("ab"))) == ["a", "b"]
    assert clock.time_calls("student", max)(1, 2) == 2
    with pytest.raises(ZeroDivisionError), clock("student"):
        _ = 1 / 0
    assert clock.seconds == {"teacher": 1, "data": 3, "student": 2}  # the end of the iterator is measured, too


def test_memory_of_this_process() -> None:
    peak = peak_memory_megabytes(torch.device("cpu"))
    assert 10 < resident_megabytes() <= 1.05 * peak
