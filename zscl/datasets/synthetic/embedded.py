"""A small multi-domain benchmark of 32 x 32 pictures, rendered from seeds: nothing to download.

Six domains, 64 classes, two looks each. The *web* look fills the captioned corpus that a small CLIP is pre-trained
on, and the reference set; the *task* look is what tasks show. The gap between the two leaves zero-shot accuracy good
but improvable, as it is for a real CLIP on real tasks. The digits task shows scikit-learn's real handwritten digits.

Every picture is a pure function of (seed, stream, index): streams may be cut, resumed or read in any order.
"""

import zlib
from collections.abc import Iterator, Mapping
from typing import Literal

import numpy as np

from zscl.datasets.synthetic.domains import DOMAINS, Style, enlarge_digit
from zscl.datasets.synthetic.drawing import pick, encode_png

Split = Literal["train", "test"]
TASK_SIZES: Mapping[Split, int] = {"train": 400, "test": 300}


def task_samples(domain: str, split: Split, count: int | None, seed: int) -> Iterator[tuple[bytes, int]]:
    """(PNG, label) pairs of one task split, classes evenly spread; `count` None means TASK_SIZES."""
    count = TASK_SIZES[split] if count is None else count
    if domain == "digits":
        yield from _real_digits(split, count, seed)
        return
    task = DOMAINS[domain]
    for index in range(count):
        label = index % len(task.classnames)
        yield encode_png(task.draw(label, "task", _generator(seed, f"{domain}/{split}", index)).pixels), label


def captioned_samples(count: int, seed: int, task_style_share: float) -> Iterator[tuple[bytes, str]]:
    """(PNG, caption) pairs over all domains, a share of them in the task look; never a task's own picture."""
    domains = [domain for domain in DOMAINS.values() for _ in range(domain.corpus_weight)]
    for index in range(count):
        rng = _generator(seed, "captioned", index)
        domain = domains[rng.integers(len(domains))]
        label = int(rng.integers(len(domain.classnames)))
        look: Style = "task" if rng.random() < task_style_share else "web"
        pixels, colour, ground = domain.draw(label, look, rng)
        caption = pick(rng, domain.captions[look])
        yield encode_png(pixels), caption.format(c=domain.classnames[label], colour=colour, ground=ground)


def _real_digits(split: Split, count: int, seed: int) -> Iterator[tuple[bytes, int]]:
    """Scikit-learn's handwritten digits, shuffled by the seed; 1200 train, 597 test."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    train, test = np.split(_generator(seed, "digits", 0).permutation(len(digits.target)), [1200])
    chosen = train if split == "train" else test
    if count > len(chosen):
        raise ValueError(f"digits has {len(chosen)} {split} images, {count} were asked for")
    for index in chosen[:count]:
        yield encode_png(enlarge_digit(digits.images[index] / 16)), int(digits.target[index])


def _generator(seed: int, stream: str, index: int) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(stream.encode()), index])
