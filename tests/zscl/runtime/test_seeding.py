"""Seeds that are derived from names."""

from zscl.runtime.seeding import derive_seed


def test_seeds_do_not_depend_on_the_process() -> None:
    assert derive_seed(0, 1, "task") == 46669659644933465
    assert derive_seed(0, 1, "task") != derive_seed(0, 11, "task")
