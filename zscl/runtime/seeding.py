"""Derivation of random seeds from names."""

import hashlib


def derive_seed(*names: object) -> int:
    """Derive a random seed from values, as a hash that is the same in all processes and on all platforms.

    Args:
        *names: Values that identify what the seed is used for, such as the recipe's seed, the stage and a purpose. The
            `repr` of the values is hashed.

    Returns:
        A seed of 56 bits.
    """
    return int.from_bytes(hashlib.sha256(repr(names).encode()).digest()[:7])
