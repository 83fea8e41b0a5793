"""A small multi-domain benchmark of 32 x 32 pictures, rendered from seeds without any download.

The benchmark has six domains, 64 classes and two styles. The captioned corpus, on which a small CLIP is pre-trained,
and the reference set use the *web* style. Tasks use the *task* style. Because of the gap between the styles, zero-shot
accuracy is good but can be improved, as for a real CLIP on real tasks. The digits task contains scikit-learn's real
handwritten digits.

Every picture depends only on the seed, the name of its set and its index in the set. Samples can therefore be generated
in any order, and generation can stop and resume.
"""

import zlib
from collections.abc import Iterator, Mapping
from typing import Literal

import numpy as np

from zscl.datasets.synthetic.domains import DOMAINS, Style, enlarge_digit
from zscl.datasets.synthetic.drawing import encode_png, pick

Split = Literal["train", "test"]
TASK_SIZES: Mapping[Split, int] = {"train": 400, "test": 300}


def task_samples(domain: str, split: Split, count: int | None, seed: int) -> Iterator[tuple[bytes, int]]:
    """Render one split of a task. The labels cycle through the classes.

    Args:
        domain: Name of the domain.
        split: The split.
        count: Number of pictures; `None` means `TASK_SIZES[split]`.
        seed: Seed of all pictures.

    Yields:
        A PNG and its label.
    """
    count = TASK_SIZES[split] if count is None else count
    if domain == "digits":
        yield from _real_digits(split, count, seed)
        return
    task = DOMAINS[domain]
    for index in range(count):
        label = index % len(task.classnames)
        yield encode_png(task.draw(label, "task", _rng(seed, f"{domain}/{split}", index)).pixels), label


def captioned_samples(count: int, seed: int, task_style_share: float) -> Iterator[tuple[bytes, str]]:
    """Render captioned pictures of all domains. None of these pictures is part of a task.

    Args:
        count: Number of pictures.
        seed: Seed of all pictures.
        task_style_share: Probability of the task style.

    Yields:
        A PNG and its caption.
    """
    domains = [domain for domain in DOMAINS.values() for _ in range(domain.corpus_weight)]
    for index in range(count):
        rng = _rng(seed, "captioned", index)
        domain = domains[rng.integers(len(domains))]
        label = int(rng.integers(len(domain.classnames)))
        style: Style = "task" if rng.random() < task_style_share else "web"
        pixels, colour, background = domain.draw(label, style, rng)
        caption = pick(rng, domain.captions[style])
        yield encode_png(pixels), caption.format(c=domain.classnames[label], colour=colour, background=background)


def _real_digits(split: Split, count: int, seed: int) -> Iterator[tuple[bytes, int]]:
    """Yield scikit-learn's handwritten digits, shuffled with the seed: 1200 for `train` and 597 for `test`."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    train, test = np.split(_rng(seed, "digits", 0).permutation(len(digits.target)), [1200])
    chosen = train if split == "train" else test
    if count > len(chosen):
        raise ValueError(f"digits has {len(chosen)} {split} images, expected at least {count}")
    for index in chosen[:count]:
        yield encode_png(enlarge_digit(digits.images[index] / 16)), int(digits.target[index])


def _rng(seed: int, stream: str, index: int) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(stream.encode()), index])
