"""What all sources share: the random split, and names that are not known."""

import pytest
import torch

from schemas.errors import InputError
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
    with pytest.raises(InputError, match=r"prepare: found the unknown name 'oxfordpets'; did you mean 'OxfordPet'\?"):
        check_name("prepare", "oxfordpets", list(MTIL))
    with pytest.raises(InputError, match="expected one of: Aircraft, Caltech101"):
        check_name("prepare", "xyzzy", list(MTIL))
