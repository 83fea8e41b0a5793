"""What all sources share: the random split, and the check of names."""

import pytest
import torch
from support.errors import refused

from schemas.errors import ErrorCode
from zscl.datasets.mtil import MTIL
from zscl.datasets.sources import check_name, random_split


@pytest.mark.parametrize(
    ("total", "train", "test"), [(8_677, 6_941, 1_736), (27_000, 21_600, 5_400), (108_754, 87_003, 21_751)]
)
def test_the_random_split_is_the_authors(total: int, train: int, test: int) -> None:
    places: list[int] = list(range(total))
    generator = torch.Generator().manual_seed(42)
    parts = torch.utils.data.random_split(places, [train, test], generator=generator)  # type: ignore[arg-type]
    split = random_split(total)
    assert split == {"train": list(parts[0]), "test": list(parts[1])}
    if total == 8_677:  # a generator of torch's that gave other numbers would make another benchmark
        assert split["train"][:5] == [8_512, 5_748, 7_753, 4_345, 5_587]


def test_an_unknown_name_suggests_the_nearest() -> None:
    with refused(ErrorCode.UNKNOWN_NAME) as error:
        check_name("prepare", "oxfordpets", list(MTIL))
    assert "'OxfordPet'" in str(error.value)
    with refused(ErrorCode.UNKNOWN_NAME) as error:
        check_name("prepare", "xyzzy", list(MTIL))
    assert ", ".join(MTIL) in str(error.value)
