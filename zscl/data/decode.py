"""Decoding of encoded images."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from zscl.data.sample import BrokenSampleError, Sample

Transform = Callable[[Any], torch.Tensor]


Label = int | tuple[int, ...]


LabelOf = Callable[[Sample], Label]


Decoded = tuple[torch.Tensor, Label]


# Whatever a file is called: other formats of PIL start other programs, or are read by code that few look at.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM")


LONGEST_SIDES = 100  # the longer side by the shorter: a strip of one pixel would be enlarged beyond all memory


@dataclass(frozen=True)
class Decoder:
    """Encoded sample → (image [3, H, W], label)."""

    transform: Transform
    label_of: LabelOf

    def __call__(self, sample: Sample) -> Decoded:
        """Decode one image and transform it.

        Raises:
            BrokenSampleError: the image or the label cannot be read.
        """
        sample.check()
        label = self.label_of(sample)
        return self.transform(self.read(sample)), label

    def read(self, sample: Sample) -> Image.Image:
        """Decode one image, as it is.

        Raises:
            BrokenSampleError: the image cannot be read.
        """
        try:
            return decode_image(sample.image)
        except Exception as error:  # what a decoder raises on foreign bytes is no closed list
            unknown = isinstance(error, UnidentifiedImageError)  # its own words show an address, another each time
            reason = f"found {len(sample.image)} bytes of no known format" if unknown else str(error)
            raise BrokenSampleError(
                f"{sample.shard}: sample '{sample.key}' is no readable image ({reason or type(error).__name__})"
            ) from error


def decode_image(encoded: bytes) -> Image.Image:
    """Decode an image to its last pixel; RGB.

    Of 16 bits, the upper 8 are taken; of several frames, the first; transparency and EXIF orientation are left alone.

    Raises:
        UnidentifiedImageError: it is in none of `FORMATS`.
        ValueError: its sides are too unlike.
        Exception: what the decoder raises.
    """
    with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
        if max(image.size) > LONGEST_SIDES * min(image.size):
            raise ValueError(
                f"found {image.width} x {image.height} pixels, expected no side over {LONGEST_SIDES} times the other"
            )
        if image.mode == "F":
            raise ValueError("found pixels of floating point, expected whole numbers")
        if image.mode.startswith("I"):  # 16 bits, which `convert` would cut off at 255: nearly all would be white
            pixels = (np.asarray(image).clip(0, 2**16 - 1) >> 8).astype(np.uint8)
            return Image.fromarray(pixels).convert("RGB")
        return image.convert("RGB")
