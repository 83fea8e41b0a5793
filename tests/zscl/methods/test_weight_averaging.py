"""Weight averaging against means calculated by hand."""

import pytest
import torch
from torch import nn

from schemas.method import Average
from zscl.methods.weight_averaging import RunningAverage, build_averager


def trajectory(steps: int, multi_tensor: bool = True, **settings: object) -> tuple[float, int]:
    """Average a single weight that starts at 100 and is step + 1 after each step; return the average and its merges."""
    student = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        student.weight.fill_(100.0)
    start = [weight.detach().clone() for weight in student.parameters()]
    ensemble = RunningAverage(student, Average.model_validate(settings), start, multi_tensor)
    for step in range(steps):
        with torch.no_grad():
            student.weight.fill_(step + 1.0)
        ensemble.after_step(step)
    ensemble.after_step(steps)
    return float(ensemble.average.module.weight.detach()), ensemble.merges


def test_the_mean_includes_the_start_and_the_last_step() -> None:
    # after steps 0, 2, 4 and, once more, the last weights at T = 6
    assert trajectory(every=2, steps=6) == (pytest.approx((100 + 1 + 3 + 5 + 6) / 5), 5)


def test_no_final_merge_unless_the_interval_divides_the_steps() -> None:
    assert trajectory(every=2, steps=5) == (pytest.approx((100 + 1 + 3 + 5) / 4), 4)


def test_the_paper_averages_twelve_models() -> None:
    assert trajectory(every=100, steps=1000)[1] == 12


def test_exponential_average() -> None:
    expected = 100.0
    for weight in (1, 3, 5, 6):
        expected = 0.75 * expected + 0.25 * weight
    result = trajectory(every=2, steps=6, kind="exponential", decay=0.75)
    assert result == (pytest.approx(expected, rel=1e-6), 5)


def test_the_start_is_blended_in_at_every_merge() -> None:
    expected, merged = 100.0, 1
    for weight in (1, 3, 5, 6):
        expected = (expected * merged + weight) / (merged + 1)
        expected, merged = 0.7 * expected + 0.3 * 100, merged + 1
    assert trajectory(every=2, steps=6, start_share=0.3) == (pytest.approx(expected, rel=1e-6), 5)


@pytest.mark.parametrize("settings", [{}, {"kind": "exponential", "decay": 0.75}, {"start_share": 0.3}])
def test_multi_tensor_operations_give_the_same_average(settings: dict[str, object]) -> None:
    multi, single = (trajectory(every=2, steps=6, multi_tensor=value, **settings) for value in (True, False))
    assert single == (pytest.approx(multi[0], rel=1e-6), multi[1])


def test_averaging_does_not_change_the_student() -> None:
    student = nn.Linear(1, 1, bias=False)
    before = student.weight.clone()
    RunningAverage(student, Average(every=1), start=()).after_step(0)
    assert torch.equal(student.weight, before)


def test_without_averaging_the_result_is_the_student() -> None:
    student = nn.Linear(1, 1)
    assert build_averager(None, student).model is student
    assert build_averager(Average(every=1), student).model is not student


def test_build_averager_passes_the_start() -> None:
    student = nn.Linear(1, 1, bias=False)
    start = [parameter.detach().clone() for parameter in student.parameters()]
    averager = build_averager(Average(every=1, start_share=0.5), student, start)
    with torch.no_grad():
        student.weight += 2.0
    averager.after_step(0)
    # The mean of start and start + 2 is start + 1, and half of the distance is drawn back.
    assert float(averager.model.weight) == pytest.approx(float(start[0]) + 0.5)  # type: ignore[arg-type]


def test_an_average_resumes_from_its_state() -> None:
    student = nn.Linear(1, 1, bias=False)
    original, restored = (RunningAverage(student, Average(every=1), ()) for _ in range(2))
    with torch.no_grad():
        student.weight += 3.0
    original.after_step(0)
    restored.load_state_dict(original.state_dict())
    assert restored.merges == original.merges == 2
    with torch.no_grad():
        student.weight += 3.0
    for average in (original, restored):
        average.after_step(1)
    assert float(restored.model.weight) == float(original.model.weight)  # type: ignore[arg-type]
