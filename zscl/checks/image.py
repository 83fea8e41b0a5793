"""One encoded image looked at: figures of it, or why it cannot be read."""

import hashlib
import io
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from PIL import Image, UnidentifiedImageError

from schemas.dataset_report import Reason
from zscl.data.decode import FORMATS, decode_image

# What of an image training does not see as an image viewer shows it.
TRAITS: Mapping[str, Callable[[Image.Image], bool]] = {
    "16 bits a channel, of which the upper 8 are read": lambda image: image.mode.startswith("I"),
    "transparency, which is ignored": lambda image: image.has_transparency_data,
    "an EXIF orientation, which is not applied": lambda image: image.getexif().get(ORIENTATION, 1) != 1,
    "several frames, of which the first is read": lambda image: getattr(image, "n_frames", 1) > 1,
}
ORIENTATION = 0x0112  # tag of EXIF


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What is kept of a readable image."""

    width: int
    height: int
    format: str
    mode: str
    digest: bytes
    traits: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class DecodeError:
    """Why an image cannot be read."""

    reason: Reason
    detail: str


def inspect_image(encoded: bytes) -> ImageFacts | DecodeError:
    """Decode an image to its last pixel, as training does, and keep only figures of it."""
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
            width, height, name, mode = *image.size, image.format or "unknown", image.mode
            traits = tuple(trait for trait, has in TRAITS.items() if has(image))
        decode_image(encoded)
    except Exception as error:  # what a decoder raises on foreign bytes is no closed list, and is the finding itself
        return DecodeError(_reason(error), _detail(error))
    content = hashlib.blake2b(encoded, digest_size=16).digest()
    return ImageFacts(width, height, name, mode, content, traits)


def has_image_header(encoded: bytes) -> bool:
    """Whether something begins like an image that training decodes; the rest of it is not looked at."""
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS):
            return True
    except Exception:  # as in look_at
        return False


def _detail(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "no image format that PIL knows"  # its own words name an address in memory
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
    """Keep warnings off the terminal: PIL warns of odd metadata and of large images, and decodes them all the same."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
