"""Version numbers of the algorithm: results of different versions are never reused or averaged with each other.

Increment a version in the same commit as any code change that changes numbers for the same recipe and data beyond
float rounding, however small the change is. Do not increment it for faster code with the same results, a new option
whose default is the old behaviour, or changes of messages, plots and files.
"""

# Losses, optimisation, weight averaging, exemplars, sampling and augmentation of images, evaluation and its metrics.
# Part of the fingerprints of runs and searches, and of the keys of cached stages and matrix rows.
ALGORITHM_VERSION = 1

# Decoding of images, the evaluation transform, and encoding by a frozen model: everything that the teacher's cached
# features depend on. Part of their key. Training depends on the features, too, so this version is also part of all
# fingerprints and keys above: there is no need to increment both versions.
FEATURES_VERSION = 1


def algorithm_version() -> str:
    """Return both versions as `ALGORITHM_VERSION.FEATURES_VERSION`, for example `1.1`, as in results and messages."""
    return f"{ALGORITHM_VERSION}.{FEATURES_VERSION}"
