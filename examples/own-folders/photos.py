"""Make folders as a user has them: a folder a task, a folder a class, images; and a folder of anything with captions.

The images come with scikit-learn: handwritten digits, and patches of two photographs.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
SCENES = {"china.jpg": "a temple", "flower.jpg": "a flower"}
PATCH = 64


def main(folder: Path) -> None:
    """Write everything under `folder`, unless it is there."""
    if folder.is_dir():
        return
    digits = load_digits()
    for index, (image, label) in enumerate(zip(digits.images[:600], digits.target, strict=False)):
        save(folder / "digits" / WORDS[label] / f"{index}.png", (image * 15).astype(np.uint8))
    rng, photographs = np.random.default_rng(0), load_sample_images()
    captions = []
    for name, photograph in zip(photographs.filenames, photographs.images, strict=True):
        scene = SCENES[Path(name).name]
        for index in range(200):
            top, left = (int(rng.integers(0, extent - PATCH)) for extent in photograph.shape[:2])
            patch = photograph[top : top + PATCH, left : left + PATCH]
            if index < 100:
                save(folder / "scenes" / scene / f"{index}.jpg", patch)
            else:  # what the teacher is asked about: anything will do
                save(folder / "reference" / f"{scene}-{index}.jpg", np.rot90(patch))
                captions.append(f"part of a picture of {scene}, {['from afar', 'close by'][index % 2]}")
    captions += [f"a picture of the number {word}" for word in WORDS]
    (folder / "reference/captions.txt").write_text("\n".join(captions) + "\n")


def save(file: Path, pixels: np.ndarray) -> None:
    """Write an image."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).convert("RGB").save(file)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
