"""Drawing primitives of the synthetic pictures: named colours, smooth noise, and a canvas with unit coordinates.

For anti-aliasing, pictures are drawn at OVERSAMPLING times the final resolution and then reduced by averaging.
"""

import io
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Mask = NDArray[np.bool_]  # [height, width]
Array = NDArray[np.float64]  # pictures [height, width, 3] in 0..1, fields [height, width], paths [points, 2]

IMAGE_SIDE = 32  # pixels of a picture
OVERSAMPLING = 3
CANVAS_SIDE = IMAGE_SIDE * OVERSAMPLING  # pixels
COLOURS: Mapping[str, tuple[float, float, float]] = {
    "red": (0.85, 0.12, 0.15), "orange": (0.97, 0.55, 0.10), "yellow": (0.97, 0.88, 0.20),
    "green": (0.13, 0.60, 0.25), "blue": (0.12, 0.28, 0.80), "purple": (0.50, 0.20, 0.65),
    "pink": (0.97, 0.60, 0.75), "black": (0.06, 0.06, 0.06), "white": (0.97, 0.97, 0.97),
}  # fmt: skip


def to_image(pixels: Array) -> Image.Image:
    """Convert colours in 0..1 to an 8-bit image."""
    return Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8))


def encode_png(pixels: Array) -> bytes:
    """Encode colours in 0..1 as a PNG."""
    buffer = io.BytesIO()
    to_image(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def downsample_with_noise(canvas: Array, max_noise: float, rng: np.random.Generator) -> Array:
    """Reduce a canvas to the picture's resolution by averaging, and add Gaussian noise.

    Args:
        canvas: Colours in 0..1 [CANVAS_SIDE, CANVAS_SIDE, 3].
        max_noise: Maximum standard deviation of the noise.
        rng: Random generator.

    Returns:
        The picture [IMAGE_SIDE, IMAGE_SIDE, 3]; values may be slightly outside 0..1.
    """
    pixels: Array = canvas.reshape(IMAGE_SIDE, OVERSAMPLING, IMAGE_SIDE, OVERSAMPLING, 3).mean((1, 3))
    return pixels + rng.standard_normal(pixels.shape) * rng.uniform(0, max_noise)


def pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    """Return one of the options, all with equal probability."""
    return options[int(rng.integers(len(options)))]


def pick_colour_pair(rng: np.random.Generator) -> tuple[str, str]:
    """Return the names of two colours with sufficient contrast, for a figure and its background."""
    figure = pick(rng, list(COLOURS))
    distances = np.abs(np.subtract(list(COLOURS.values()), COLOURS[figure])).sum(1)
    contrasting = [name for name, distance in zip(COLOURS, distances, strict=True) if distance > 0.9]
    return figure, pick(rng, contrasting)


def jitter_colour(name: str, rng: np.random.Generator) -> Array:
    """Return a random variation of a named colour [3]."""
    return (np.array(COLOURS[name]) + rng.uniform(-0.08, 0.08, 3)).clip(0, 1)


def blend(base: Array, paint: Array, coverage: Array | Mask) -> Array:
    """Blend a paint over a base.

    Args:
        base: Colours where the coverage is 0 [height, width, 3] or [3].
        paint: Colours where the coverage is 1 [height, width, 3] or [3].
        coverage: The coverage in 0..1 [height, width].

    Returns:
        The blended colours [height, width, 3].
    """
    return base + (paint - base) * coverage[..., None]


def solid(colour: Array | float) -> Array:
    """Return a background of one colour [CANVAS_SIDE, CANVAS_SIDE, 3]."""
    return np.ones((CANVAS_SIDE, CANVAS_SIDE, 3)) * colour


def lit_background(name: str, rng: np.random.Generator) -> Array:
    """Return a background of a named colour with a brightness gradient in a random direction."""
    u, v = grid(rng.uniform(0, 360), 1.0)
    return jitter_colour(name, rng) + (rng.uniform(0, 0.15) * (u + v))[..., None]


def grid(degrees: float, scale: float, centre: tuple[float, float] = (0.0, 0.0)) -> tuple[Array, Array]:
    """Return the coordinates of every canvas pixel.

    Args:
        degrees: Rotation of the coordinate system.
        scale: The unrotated canvas extends from -scale to scale.
        centre: Coordinates of the canvas centre.

    Returns:
        The x and y coordinates, each [CANVAS_SIDE, CANVAS_SIDE].
    """
    across = np.linspace(-scale, scale, CANVAS_SIDE)[None]
    cosine, sine = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return cosine * across - sine * across.T + centre[0], sine * across + cosine * across.T + centre[1]


def smooth_noise(rng: np.random.Generator, cells: int) -> Array:
    """Return smooth noise in 0..1 [CANVAS_SIDE, CANVAS_SIDE], interpolated from [cells, cells] random values."""
    coarse = Image.fromarray(rng.random((cells, cells)).astype(np.float32))
    return np.asarray(coarse.resize((CANVAS_SIDE, CANVAS_SIDE), Image.Resampling.BICUBIC), np.float64).clip(0, 1)


class Canvas:
    """A canvas to draw on in unit coordinates (-1..1, y down), with a random rotation, scale and position.

    Attributes:
        image: The image that is drawn on.
        rng: Random generator.
        pen: The `ImageDraw` object that draws on the image.
        transform: Matrix from unit coordinates to pixels [2, 2].
        centre: Position of the origin in pixels [2].
    """

    def __init__(
        self, background: Array, rng: np.random.Generator, max_rotation: float, size: tuple[float, float]
    ) -> None:
        """Create a canvas, and choose its rotation, scale and position at random.

        Args:
            background: The background [CANVAS_SIDE, CANVAS_SIDE, 3].
            rng: Random generator.
            max_rotation: Maximum rotation in degrees, in both directions.
            size: Minimum and maximum of the random scale; 1 means that the square -1..1 fills the canvas.
        """
        self.image, self.rng = to_image(background), rng
        self.pen = ImageDraw.Draw(self.image)
        angle, scale = np.radians(rng.uniform(-max_rotation, max_rotation)), rng.uniform(*size)
        rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        self.transform = rotation * scale * CANVAS_SIDE / 2
        self.centre = CANVAS_SIDE / 2 * (1 + rng.uniform(-0.6, 0.6, 2) * (1 - scale))

    def fill(self, outline: Array, colour: Array) -> None:
        """Fill the inside of a closed outline [points, 2] with a colour [3]."""
        self.pen.polygon(self._to_pixels(outline, 0.0), fill=_to_rgb(colour))

    def stroke(self, path: Array, colour: Array, width: float, jitter: float = 0.0) -> None:
        """Draw a line with round ends.

        Args:
            path: Points of the line [points, 2].
            colour: The colour [3].
            width: Width in pixels of the final picture.
            jitter: Standard deviation of random offsets of the points, in unit coordinates.
        """
        points, radius = self._to_pixels(path, jitter), width * OVERSAMPLING / 2
        self.pen.line(points, fill=_to_rgb(colour), width=round(2 * radius), joint="curve")
        for x, y in (points[0], points[-1]):
            self.pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=_to_rgb(colour))

    def pixels(self) -> Array:
        """Return the canvas as an array of colours in 0..1 [CANVAS_SIDE, CANVAS_SIDE, 3]."""
        return np.asarray(self.image) / np.float64(255)

    def _to_pixels(self, path: Array, jitter: float) -> list[tuple[float, float]]:
        jittered = path + self.rng.normal(0, jitter, path.shape)
        return [(float(x), float(y)) for x, y in jittered @ self.transform + self.centre]


def _to_rgb(colour: Array) -> tuple[int, ...]:
    return tuple((colour * 255).astype(int).tolist())


def arc(x: float, y: float, rx: float, ry: float, start: float = 0, stop: float = 360) -> Array:
    """Return 20 points along an ellipse.

    Args:
        x: Horizontal position of the centre.
        y: Vertical position of the centre.
        rx: Horizontal radius.
        ry: Vertical radius.
        start: First angle in degrees; 0 is right, 90 is down.
        stop: Last angle in degrees.

    Returns:
        The points [20, 2].
    """
    angles = np.radians(np.linspace(start, stop, 20))
    return np.stack([x + rx * np.cos(angles), y + ry * np.sin(angles)], 1)


def join(*parts: tuple[float, float] | Array) -> Array:
    """Concatenate points and paths to one path [points, 2]."""
    return np.concatenate([np.reshape(part, (-1, 2)) for part in parts]).astype(np.float64)


def polygon(*radii: float) -> Array:
    """Return a closed outline around the origin with one corner per radius, the first at the top."""
    angles = np.linspace(0, 2 * np.pi, len(radii) + 1)
    corners: Array = np.stack([np.sin(angles), -np.cos(angles)], 1) * np.array([*radii, radii[0]])[:, None]
    return corners
