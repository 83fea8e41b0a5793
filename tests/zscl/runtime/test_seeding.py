"""Seeds by name."""

from zscl.runtime.seeding import seed_of


def test_seeds_do_not_depend_on_the_process() -> None:
    assert seed_of(0, 1, "task") == 46669659644933465
    assert seed_of(0, 1, "task") != seed_of(0, 11, "task")
