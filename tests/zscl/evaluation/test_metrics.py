"""The figures against the published matrices and by hand."""

import csv
from collections import defaultdict
from pathlib import Path

import pytest

from orchestrate.reports.published import MTIL
from zscl.evaluation.metrics import forward_transfer, is_at_chance, metrics

MATRIX = [[0.9, 0.5, 0.4], [0.7, 0.8, 0.2], [0.6, 0.7, 1.0]]
ZERO_SHOT = [0.5, 0.45, 0.3]
PUBLISHED = Path(__file__).parents[4] / "shared/published/mtil_accuracy_matrices.csv"


def test_by_hand() -> None:
    found = metrics(MATRIX, ZERO_SHOT)
    assert found.transfer == pytest.approx((0.5 + (0.4 + 0.2) / 2) / 2)
    assert found.avg == pytest.approx(sum(map(sum, MATRIX)) / 9)
    assert found.last == pytest.approx((0.6 + 0.7 + 1.0) / 3)
    assert found.forgetting == pytest.approx((0.3 + 0.1) / 2)
    assert found.backward_transfer == pytest.approx(((0.6 - 0.9) + (0.7 - 0.8)) / 2)
    assert found.forward_transfer == pytest.approx(((0.5 - 0.45) + (0.2 - 0.3)) / 2)


def test_one_head_is_judged_on_all_images_seen() -> None:
    found = metrics(MATRIX, ZERO_SHOT, images=[10, 30, 60])
    assert found.avg == pytest.approx((0.9 + (0.7 * 10 + 0.8 * 30) / 40 + (0.6 * 10 + 0.7 * 30 + 1.0 * 60) / 100) / 3)
    assert found.last == pytest.approx((0.6 * 10 + 0.7 * 30 + 1.0 * 60) / 100)
    assert found.backward_transfer == metrics(MATRIX, ZERO_SHOT).backward_transfer


def test_one_task_has_neither_transfer_nor_forgetting() -> None:
    found = metrics([[0.5]], [0.4])
    assert (found.transfer, found.forgetting) == (None, None)
    assert (found.avg, found.last) == (0.5, 0.5)


NAMES = {"finetune": "Continual-FT", "lwf": "LwF", "icarl": "iCaRL", "lwf-vr": "LwF-VR", "wise-ft": "WiSE-FT"}


@pytest.mark.skipif(not PUBLISHED.is_file(), reason=f"the published matrices are not beside the project ({PUBLISHED})")
def test_recomputes_the_printed_figures_from_the_published_matrices() -> None:
    matrices: dict[tuple[str, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    with PUBLISHED.open() as stream:
        for row in csv.DictReader(stream):
            matrices[row["method"], row["order"]][int(row["stage"])].append(float(row["accuracy_percent"]))
    compared = 0
    for order, rows in MTIL.items():
        for method, printed in rows.items():
            if method == "zero-shot":  # a row, not a matrix
                continue
            matrix = matrices[NAMES.get(method, method.upper()), order]
            found = metrics([matrix[stage] for stage in sorted(matrix)], matrix[1])
            assert (found.transfer, found.avg, found.last) == pytest.approx(printed, abs=0.11), (method, order)
            compared += 1
    assert compared == 14


def test_forward_transfer_of_a_sequence_under_way() -> None:
    # One stage done: only the second task was looked at right before its own stage.
    assert forward_transfer([[0.9, 0.6, 0.1]], [0.5, 0.5, 0.5]) == pytest.approx(0.1)
    assert forward_transfer([[0.9, 0.6, 0.1], [0.9, 0.9, 0.2]], [0.5, 0.5, 0.5]) == pytest.approx((0.1 - 0.3) / 2)


def test_what_guessing_gives() -> None:
    # Two deviations of 1,000 guesses among ten: 0.1 + 2 * sqrt(0.1 * 0.9 / 1000) = 0.11897…
    assert is_at_chance(0.1189, classes=10, images=1000)
    assert not is_at_chance(0.1191, classes=10, images=1000)
    assert is_at_chance(0.2, classes=10, images=20)  # of few images, more is luck
    assert is_at_chance(0.5, classes=2, images=20)
    assert not is_at_chance(1.0, classes=1, images=20)  # nothing to guess
