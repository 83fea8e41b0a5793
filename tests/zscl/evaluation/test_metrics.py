"""The metrics against the published matrices and against values calculated by hand."""

import csv
from collections import defaultdict
from pathlib import Path

import pytest

from orchestrate.reports.published import MTIL_PUBLISHED
from zscl.evaluation.metrics import compute_metrics, forward_transfer, is_at_chance

MATRIX = [[0.9, 0.5, 0.4], [0.7, 0.8, 0.2], [0.6, 0.7, 1.0]]
ZERO_SHOT = [0.5, 0.45, 0.3]
PUBLISHED = Path(__file__).parents[4] / "shared/published/mtil_accuracy_matrices.csv"


def test_by_hand() -> None:
    result = compute_metrics(MATRIX, ZERO_SHOT)
    assert result.transfer == pytest.approx((0.5 + (0.4 + 0.2) / 2) / 2)
    assert result.avg == pytest.approx(sum(map(sum, MATRIX)) / 9)
    assert result.last == pytest.approx((0.6 + 0.7 + 1.0) / 3)
    assert result.forgetting == pytest.approx((0.3 + 0.1) / 2)
    assert result.backward_transfer == pytest.approx(((0.6 - 0.9) + (0.7 - 0.8)) / 2)
    assert result.forward_transfer == pytest.approx(((0.5 - 0.45) + (0.2 - 0.3)) / 2)


def test_class_incremental_metrics_count_all_seen_images() -> None:
    result = compute_metrics(MATRIX, ZERO_SHOT, image_counts=[10, 30, 60])
    assert result.avg == pytest.approx((0.9 + (0.7 * 10 + 0.8 * 30) / 40 + (0.6 * 10 + 0.7 * 30 + 1.0 * 60) / 100) / 3)
    assert result.last == pytest.approx((0.6 * 10 + 0.7 * 30 + 1.0 * 60) / 100)
    assert result.backward_transfer == compute_metrics(MATRIX, ZERO_SHOT).backward_transfer


def test_one_task_has_neither_transfer_nor_forgetting() -> None:
    result = compute_metrics([[0.5]], [0.4])
    assert (result.transfer, result.forgetting) == (None, None)
    assert (result.avg, result.last) == (0.5, 0.5)


NAMES = {"finetune": "Continual-FT", "lwf": "LwF", "icarl": "iCaRL", "lwf-vr": "LwF-VR", "wise-ft": "WiSE-FT"}


@pytest.mark.skipif(not PUBLISHED.is_file(), reason=f"the published matrices are missing ({PUBLISHED})")
def test_published_metrics_follow_from_the_published_matrices() -> None:
    matrices: dict[tuple[str, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    with PUBLISHED.open() as stream:
        for row in csv.DictReader(stream):
            matrices[row["method"], row["order"]][int(row["stage"])].append(float(row["accuracy_percent"]))
    compared = 0
    for order, rows in MTIL_PUBLISHED.items():
        for method, printed in rows.items():
            if method == "zero-shot":  # a row, not a matrix
                continue
            matrix = matrices[NAMES.get(method, method.upper()), order]
            result = compute_metrics([matrix[stage] for stage in sorted(matrix)], matrix[1])
            assert (result.transfer, result.avg, result.last) == pytest.approx(printed, abs=0.11), (method, order)
            compared += 1
    assert compared == 14


def test_forward_transfer_of_an_unfinished_sequence() -> None:
    # After one stage, only the second task was evaluated right before its own stage.
    assert forward_transfer([[0.9, 0.6, 0.1]], [0.5, 0.5, 0.5]) == pytest.approx(0.1)
    assert forward_transfer([[0.9, 0.6, 0.1], [0.9, 0.9, 0.2]], [0.5, 0.5, 0.5]) == pytest.approx((0.1 - 0.3) / 2)


def test_accuracy_at_chance_level() -> None:
    # Two deviations of 1,000 guesses among ten: 0.1 + 2 * sqrt(0.1 * 0.9 / 1000) = 0.11897…
    assert is_at_chance(0.1189, classes=10, images=1000)
    assert not is_at_chance(0.1191, classes=10, images=1000)
    assert is_at_chance(0.2, classes=10, images=20)  # with few images, a higher accuracy is within chance
    assert is_at_chance(0.5, classes=2, images=20)
    assert not is_at_chance(1.0, classes=1, images=20)  # nothing to guess
