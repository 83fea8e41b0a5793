"""Versions of what is computed: results of one version are never reused by, or averaged with, those of another.

Raise a version in the same commit as any change of the code that changes numbers for the same recipe and data beyond
float rounding, however small the change is. Do not raise it for a faster way to the same numbers, a new option whose
default is the old behaviour, or messages, plots and files.
"""

# Losses, optimisation, weight averaging, exemplars, sampling and augmentation of images, evaluation and its metrics.
# Part of a run's fingerprint, a search's, and the keys of shared stages and rows.
ALGORITHM_VERSION = 1

# Decoding of images, the evaluation transform, and encoding by a frozen model: what the stored features of the teacher
# depend on. Part of the key of the teacher's feature store. Training depends on it, too, so it is part of all of the
# above: it needs no raise of ALGORITHM_VERSION beside it.
FEATURES_VERSION = 1


def algorithm() -> str:
    """Return both versions as one text, as results and messages name them."""
    return f"{ALGORITHM_VERSION}.{FEATURES_VERSION}"
