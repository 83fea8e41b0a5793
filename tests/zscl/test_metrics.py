"""The figures against the published matrices and by hand."""

import csv
from collections import defaultdict
from pathlib import Path

import pytest

from zscl.metrics import metrics

MATRIX = [[0.9, 0.5, 0.4], [0.7, 0.8, 0.2], [0.6, 0.7, 1.0]]
PUBLISHED = Path(__file__).parents[3] / "shared/published/mtil_accuracy_matrices.csv"


def test_by_hand() -> None:
    found = metrics(MATRIX)
    assert found.transfer == pytest.approx((0.5 + (0.4 + 0.2) / 2) / 2)
    assert found.avg == pytest.approx(sum(map(sum, MATRIX)) / 9)
    assert found.last == pytest.approx((0.6 + 0.7 + 1.0) / 3)
    assert found.forgetting == pytest.approx((0.3 + 0.1) / 2)


def test_one_task_has_neither_transfer_nor_forgetting() -> None:
    found = metrics([[0.5]])
    assert (found.transfer, found.forgetting) == (None, None)
    assert (found.avg, found.last) == (0.5, 0.5)


# Transfer, Avg, Last as printed in the paper, in per cent.
PRINTED = {
    ("Continual-FT", "I"): (44.6, 55.9, 77.3),
    ("LwF", "I"): (56.9, 64.7, 74.6),
    ("iCaRL", "I"): (50.4, 65.7, 80.1),
    ("LwF-VR", "I"): (57.2, 65.1, 76.6),
    ("WiSE-FT", "I"): (52.3, 60.7, 77.7),
    ("ZSCL*", "I"): (62.2, 72.6, 84.5),
    ("ZSCL", "I"): (68.1, 75.4, 83.6),
    ("Continual-FT", "II"): (46.6, 56.2, 67.4),
    ("LwF", "II"): (53.2, 62.2, 71.9),
    ("iCaRL", "II"): (50.9, 56.9, 71.6),
    ("LwF-VR", "II"): (53.1, 60.6, 68.3),
    ("WiSE-FT", "II"): (51.0, 61.5, 72.2),
    ("ZSCL*", "II"): (59.8, 71.8, 83.3),
    ("ZSCL", "II"): (64.2, 74.5, 83.4),
}


@pytest.mark.skipif(not PUBLISHED.is_file(), reason=f"the published matrices are not beside the project ({PUBLISHED})")
def test_recomputes_the_printed_figures_from_the_published_matrices() -> None:
    matrices: dict[tuple[str, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    with PUBLISHED.open() as stream:
        for row in csv.DictReader(stream):
            matrices[row["method"], row["order"]][int(row["stage"])].append(float(row["accuracy_percent"]))
    assert set(PRINTED) <= set(matrices)
    for key, printed in PRINTED.items():
        found = metrics([matrices[key][stage] for stage in sorted(matrices[key])])
        assert (found.transfer, found.avg, found.last) == pytest.approx(printed, abs=0.11), key
