"""Decoding of image files to RGB, and of samples to pairs of an image tensor and a label."""

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
GetLabel = Callable[[Sample], Label]
Decoded = tuple[torch.Tensor, Label]

# Accepted with any file suffix. Other formats of PIL start external programs or use decoders with little review.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM")
MAX_ASPECT_RATIO = 100  # longer side by shorter side: resizing a strip of one pixel would need too much memory


@dataclass(frozen=True)
class Decoder:
    """Decodes a sample to (image [3, H, W], label).

    Attributes:
        transform: Function that converts a PIL image to a tensor [3, H, W].
        get_label: Function that returns the label of a sample.
    """

    transform: Transform
    get_label: GetLabel

    def __call__(self, sample: Sample) -> Decoded:
        """Decode and transform one sample.

        Args:
            sample: The encoded sample.

        Returns:
            The image [3, H, W] and the label.

        Raises:
            BrokenSampleError: The sample has a fault, or its image or label cannot be decoded.
        """
        sample.check()
        label = self.get_label(sample)
        return self.transform(self.load_image(sample)), label

    def load_image(self, sample: Sample) -> Image.Image:
        """Decode one image without transforming it.

        Args:
            sample: The encoded sample.

        Returns:
            The RGB image.

        Raises:
            BrokenSampleError: The image cannot be decoded.
        """
        try:
            return decode_image(sample.image)
        except Exception as error:  # decoders raise any class of error on damaged bytes
            unknown = isinstance(error, UnidentifiedImageError)  # its message holds a memory address, which varies
            reason = f"found {len(sample.image)} bytes of no known format" if unknown else str(error)
            raise BrokenSampleError(
                f"{sample.shard}: sample '{sample.key}' is no readable image ({reason or type(error).__name__})"
            ) from error


def decode_image(encoded: bytes) -> Image.Image:
    """Decode all pixels of an image and convert it to RGB.

    Of 16-bit pixels, only the upper 8 bits are used. Of several frames, only the first is used. Transparency and the
    EXIF orientation are ignored.

    Args:
        encoded: The content of an image file in one of `IMAGE_FORMATS`.

    Returns:
        The RGB image.

    Raises:
        UnidentifiedImageError: The format is not one of `IMAGE_FORMATS`.
        ValueError: The aspect ratio exceeds `MAX_ASPECT_RATIO`, or the pixels are floating-point numbers.
        Exception: Any other error of the decoder.
    """
    with Image.open(io.BytesIO(encoded), formats=IMAGE_FORMATS) as image:
        if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
            raise ValueError(
                f"found {image.width} x {image.height} pixels, expected an aspect ratio of at most {MAX_ASPECT_RATIO}"
            )
        if image.mode == "F":
            raise ValueError("found floating-point pixels, expected integers")
        if image.mode.startswith("I"):  # 16 bits: `convert` would clip at 255 and turn nearly all pixels white
            pixels = (np.asarray(image).clip(0, 2**16 - 1) >> 8).astype(np.uint8)
            return Image.fromarray(pixels).convert("RGB")
        return image.convert("RGB")
