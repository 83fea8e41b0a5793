"""The weight ensemble, counted by hand."""

import pytest
import torch
from torch import nn

from schemas.method import Average
from zscl.methods.weight_averaging import RunningAverage, build_averager


def trajectory(steps: int, multi_tensor: bool = True, **settings: object) -> tuple[float, int]:
    """A single weight that starts at 100 and stands at step + 1 after each step."""
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


def test_takes_in_the_start_and_steps_zero_to_the_last() -> None:
    # after steps 0, 2, 4 and, once more, the last weights at T = 6
    assert trajectory(every=2, steps=6) == (pytest.approx((100 + 1 + 3 + 5 + 6) / 5), 5)


def test_no_merge_at_the_end_when_it_is_no_multiple() -> None:
    assert trajectory(every=2, steps=5) == (pytest.approx((100 + 1 + 3 + 5) / 4), 4)


def test_the_paper_averages_twelve_models() -> None:
    assert trajectory(every=100, steps=1000)[1] == 12


def test_an_exponential_average_forgets_at_its_decay() -> None:
    expected = 100.0
    for weight in (1, 3, 5, 6):
        expected = 0.75 * expected + 0.25 * weight
    found = trajectory(every=2, steps=6, kind="exponential", decay=0.75)
    assert found == (pytest.approx(expected, rel=1e-6), 5)


def test_the_start_may_be_blended_in_at_every_merge() -> None:
    expected, merged = 100.0, 1
    for weight in (1, 3, 5, 6):
        expected = (expected * merged + weight) / (merged + 1)
        expected, merged = 0.7 * expected + 0.3 * 100, merged + 1
    assert trajectory(every=2, steps=6, start_share=0.3) == (pytest.approx(expected, rel=1e-6), 5)


@pytest.mark.parametrize("settings", [{}, {"kind": "exponential", "decay": 0.75}, {"start_share": 0.3}])
def test_one_tensor_after_another_gives_the_same(settings: dict[str, object]) -> None:
    together, alone = (trajectory(every=2, steps=6, multi_tensor=each, **settings) for each in (True, False))
    assert alone == (pytest.approx(together[0], rel=1e-6), together[1])


def test_the_student_itself_is_not_touched() -> None:
    student = nn.Linear(1, 1, bias=False)
    before = student.weight.clone()
    RunningAverage(student, Average(every=1), start=()).after_step(0)
    assert torch.equal(student.weight, before)


def test_without_a_part_the_last_weights_are_handed_on() -> None:
    student = nn.Linear(1, 1)
    assert build_averager(None, student).model is student
    assert build_averager(Average(every=1), student).model is not student


def test_what_is_handed_on_knows_the_start() -> None:
    student = nn.Linear(1, 1, bias=False)
    start = [parameter.detach().clone() for parameter in student.parameters()]
    following = build_averager(Average(every=1, start_share=0.5), student, start)
    with torch.no_grad():
        student.weight += 2.0
    following.after_step(0)
    # The mean of start and start + 2 is start + 1, of which half is drawn back.
    assert float(following.model.weight) == pytest.approx(float(start[0]) + 0.5)  # type: ignore[arg-type]


def test_it_goes_on_from_its_state() -> None:
    student = nn.Linear(1, 1, bias=False)
    whole, other = (RunningAverage(student, Average(every=1), ()) for _ in range(2))
    with torch.no_grad():
        student.weight += 3.0
    whole.after_step(0)
    other.load_state_dict(whole.state_dict())
    assert other.merges == whole.merges == 2
    with torch.no_grad():
        student.weight += 3.0
    for each in (whole, other):
        each.after_step(1)
    assert float(other.model.weight) == float(whole.model.weight)  # type: ignore[arg-type]
