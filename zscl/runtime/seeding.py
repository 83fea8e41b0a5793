"""Derivation of random seeds from names."""

import hashlib


def derive_seed(*names: object) -> int:
    """Hash any names to a seed that does not depend on the process or platform.

    Args:
        *names: Values whose representations identify the use, such as the recipe's seed, the stage and a purpose.

    Returns:
        A seed of 56 bits.
    """
    return int.from_bytes(hashlib.sha256(repr(names).encode()).digest()[:7])
