"""Inspection of one encoded image: its size, format and digest, or the reason why it cannot be decoded."""

import hashlib
import io
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from PIL import Image, UnidentifiedImageError

from schemas.dataset_report import Reason
from zscl.data.decode import IMAGE_FORMATS, decode_image
from zscl.data.sample import Fault

EXIF_ORIENTATION = 0x0112  # EXIF tag
# Properties of an image that an image viewer shows and training ignores.
TRAITS: Mapping[str, Callable[[Image.Image], bool]] = {
    "16 bits per channel, of which only the upper 8 are used": lambda image: image.mode.startswith("I"),
    "transparency, which is ignored": lambda image: image.has_transparency_data,
    "an EXIF orientation, which is not applied": lambda image: image.getexif().get(EXIF_ORIENTATION, 1) != 1,
    "several frames, of which only the first is used": lambda image: getattr(image, "n_frames", 1) > 1,
}


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """Facts about a readable image.

    Attributes:
        width: Width in pixels.
        height: Height in pixels.
        format: PIL's name of the file format, such as "PNG".
        mode: PIL's mode, such as "RGB".
        digest: BLAKE2b digest of the encoded bytes. Images with equal digests are duplicates.
        traits: The descriptions in `TRAITS` that apply to the image.
    """

    width: int
    height: int
    format: str
    mode: str
    digest: bytes
    traits: tuple[str, ...] = ()


def inspect_image(encoded: bytes) -> ImageFacts | Fault:
    """Decode an image completely, in the same way as training, and collect facts about it.

    Args:
        encoded: The content of the image file.

    Returns:
        The facts about the image, or the fault if it cannot be decoded.
    """
    try:
        with Image.open(io.BytesIO(encoded), formats=IMAGE_FORMATS) as image:
            width, height, name, mode = *image.size, image.format or "unknown", image.mode
            traits = tuple(trait for trait, has_trait in TRAITS.items() if has_trait(image))
        decode_image(encoded)
    except Exception as error:  # decoders may raise any exception on damaged bytes; the exception is the result
        return Fault(_reason(error), _detail(error))
    digest = hashlib.blake2b(encoded, digest_size=16).digest()
    return ImageFacts(width, height, name, mode, digest, traits)


def has_image_header(encoded: bytes) -> bool:
    """Return whether a file's content has the header of a supported image format. The pixels are not decoded."""
    try:
        with Image.open(io.BytesIO(encoded), formats=IMAGE_FORMATS):
            return True
    except Exception:  # as in `inspect_image`
        return False


def _detail(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "an unknown image format"  # PIL's own message contains a memory address
    return str(error) or type(error).__name__


def _reason(error: Exception) -> Reason:
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    if isinstance(error, Image.DecompressionBombError):
        return "decompression bomb"
    if isinstance(error, EOFError) or "truncated" in str(error).lower():
        return "truncated image"
    return "broken image"


@contextmanager
def suppress_decoder_warnings() -> Iterator[None]:
    """Suppress PIL's warnings about invalid metadata and large images. Such images can still be decoded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
