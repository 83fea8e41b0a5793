"""Paint for small synthetic pictures: named colours, smooth fields, and pens that draw in unit coordinates.

Everything is painted OVERSAMPLING times finer than the finished picture and averaged down, for smooth edges.
"""

import io
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Mask = NDArray[np.bool_]  # (height, width)
Array = NDArray[np.float64]  # pictures (height, width, 3) in 0..1, fields (height, width), paths (points, 2)

IMAGE_SIDE = 32  # pixels of a finished picture
OVERSAMPLING = 3
CANVAS_SIDE = IMAGE_SIDE * OVERSAMPLING
COLOURS: Mapping[str, tuple[float, float, float]] = {
    "red": (0.85, 0.12, 0.15), "orange": (0.97, 0.55, 0.10), "yellow": (0.97, 0.88, 0.20),
    "green": (0.13, 0.60, 0.25), "blue": (0.12, 0.28, 0.80), "purple": (0.50, 0.20, 0.65),
    "pink": (0.97, 0.60, 0.75), "black": (0.06, 0.06, 0.06), "white": (0.97, 0.97, 0.97),
}  # fmt: skip


def to_image(pixels: Array) -> Image.Image:
    """Colours in 0..1 to an 8-bit image."""
    return Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8))


def encode_png(pixels: Array) -> bytes:
    """Colours in 0..1 to an encoded PNG."""
    buffer = io.BytesIO()
    to_image(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def downsample_with_noise(canvas: Array, max_noise: float, rng: np.random.Generator) -> Array:
    """(FINE, FINE, 3) averaged down to (SIDE, SIDE, 3), with noise of at most that standard deviation."""
    pixels: Array = canvas.reshape(IMAGE_SIDE, OVERSAMPLING, IMAGE_SIDE, OVERSAMPLING, 3).mean((1, 3))
    return pixels + rng.standard_normal(pixels.shape) * rng.uniform(0, max_noise)


def pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    """One of the options, all equally likely."""
    return options[int(rng.integers(len(options)))]


def pick_colour_pair(rng: np.random.Generator) -> tuple[str, str]:
    """Names of a figure's and a ground's colour that can be told apart."""
    figure = pick(rng, list(COLOURS))
    distances = np.abs(np.subtract(list(COLOURS.values()), COLOURS[figure])).sum(1)
    apart = [name for name, distance in zip(COLOURS, distances, strict=True) if distance > 0.9]
    return figure, pick(rng, apart)


def jitter_colour(name: str, rng: np.random.Generator) -> Array:
    """A colour (3,) that still deserves the name."""
    return (np.array(COLOURS[name]) + rng.uniform(-0.08, 0.08, 3)).clip(0, 1)


def blend(base: Array, paint: Array, coverage: Array | Mask) -> Array:
    """`paint` over `base`, each (height, width, 3) or (3,), where `coverage` (height, width) is 1."""
    return base + (paint - base) * coverage[..., None]


def solid(colour: Array | float) -> Array:
    """A ground of one colour, (FINE, FINE, 3)."""
    return np.ones((CANVAS_SIDE, CANVAS_SIDE, 3)) * colour


def lit_background(name: str, rng: np.random.Generator) -> Array:
    """A wall of the named colour with light falling on it from one side."""
    u, v = grid(rng.uniform(0, 360), 1.0)
    return jitter_colour(name, rng) + (rng.uniform(0, 0.15) * (u + v))[..., None]


def grid(degrees: float, scale: float, centre: tuple[float, float] = (0.0, 0.0)) -> tuple[Array, Array]:
    """Coordinates of every point: -scale..scale across the picture, turned by degrees, then shifted."""
    across = np.linspace(-scale, scale, CANVAS_SIDE)[None]
    cosine, sine = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return cosine * across - sine * across.T + centre[0], sine * across + cosine * across.T + centre[1]


def smooth_noise(rng: np.random.Generator, cells: int) -> Array:
    """Smooth random heights 0..1 (FINE, FINE), about one hill a cell."""
    coarse = Image.fromarray(rng.random((cells, cells)).astype(np.float32))
    return np.asarray(coarse.resize((CANVAS_SIDE, CANVAS_SIDE), Image.Resampling.BICUBIC), np.float64).clip(0, 1)


class Canvas:
    """A ground to draw on in unit coordinates (-1..1, y down), which one random placement maps to pixels."""

    def __init__(self, background: Array, rng: np.random.Generator, max_rotation: float, size: tuple[float, float]) -> None:
        self.image, self.rng = to_image(background), rng
        self.pen = ImageDraw.Draw(self.image)
        angle, reach = np.radians(rng.uniform(-max_rotation, max_rotation)), rng.uniform(*size)
        turned = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        self.transform = turned * reach * CANVAS_SIDE / 2
        self.centre = CANVAS_SIDE / 2 * (1 + rng.uniform(-0.6, 0.6, 2) * (1 - reach))

    def fill(self, outline: Array, colour: Array) -> None:
        """Paint the inside of a closed outline."""
        self.pen.polygon(self._placed(outline, 0.0), fill=_ink(colour))

    def stroke(self, path: Array, colour: Array, width: float, jitter: float = 0.0) -> None:
        """A line with round ends, `width` in finished pixels; `tremor` (unit coordinates) shakes the hand."""
        placed, radius = self._placed(path, jitter), width * OVERSAMPLING / 2
        self.pen.line(placed, fill=_ink(colour), width=round(2 * radius), joint="curve")
        for x, y in (placed[0], placed[-1]):
            self.pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=_ink(colour))

    def pixels(self) -> Array:
        """What has been drawn, (FINE, FINE, 3)."""
        return np.asarray(self.image) / np.float64(255)

    def _placed(self, path: Array, tremor: float) -> list[tuple[float, float]]:
        shaken = path + self.rng.normal(0, tremor, path.shape)
        return [(float(x), float(y)) for x, y in shaken @ self.transform + self.centre]


def _ink(colour: Array) -> tuple[int, ...]:
    return tuple((colour * 255).astype(int).tolist())


def arc(x: float, y: float, rx: float, ry: float, start: float = 0, stop: float = 360) -> Array:
    """Points along an ellipse, from the right (0 degrees) over the bottom (90)."""
    angles = np.radians(np.linspace(start, stop, 20))
    return np.stack([x + rx * np.cos(angles), y + ry * np.sin(angles)], 1)


def join(*parts: tuple[float, float] | Array) -> Array:
    """Corners and arcs, joined in order."""
    return np.concatenate([np.reshape(part, (-1, 2)) for part in parts]).astype(np.float64)


def polygon(*radii: float) -> Array:
    """A closed outline around the centre, one corner a radius, the first on top."""
    angles = np.linspace(0, 2 * np.pi, len(radii) + 1)
    corners: Array = np.stack([np.sin(angles), -np.cos(angles)], 1) * np.array([*radii, radii[0]])[:, None]
    return corners
