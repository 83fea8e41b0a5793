"""Seeds by name."""

import hashlib


def derive_seed(*names: object) -> int:
    """Hash any names to a seed that does not depend on the process or platform."""
    return int.from_bytes(hashlib.sha256(repr(names).encode()).digest()[:7])
