"""The six domains of the embedded benchmark: class names, prompt templates, captions and drawing functions.

Every domain has two styles. The *web* style has any colours, backgrounds and fonts. The *task* style is handwriting,
pencil, faded cloth, false-colour haze, chalk or faint print.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from zscl.datasets.synthetic.drawing import (
    CANVAS_SIDE,
    COLOURS,
    IMAGE_SIDE,
    Array,
    Canvas,
    Mask,
    arc,
    blend,
    downsample_with_noise,
    grid,
    jitter_colour,
    join,
    lit_background,
    pick,
    pick_colour_pair,
    polygon,
    smooth_noise,
    solid,
)

Style = Literal["web", "task"]


class Picture(NamedTuple):
    """A rendered picture.

    Attributes:
        pixels: Colours in 0..1 [IMAGE_SIDE, IMAGE_SIDE, 3].
        colour: Name of the figure's colour, for captions; empty if captions do not mention it.
        background: Name of the background's colour, for captions; empty if captions do not mention it.
    """

    pixels: Array
    colour: str = ""
    background: str = ""


@dataclass(frozen=True)
class Domain:
    """One domain of the embedded benchmark. Each domain is a task.

    Attributes:
        name: The task's name.
        classnames: Class names in label order.
        templates: Prompt templates with `{c}`; the first one is used for training, all of them are used for evaluation.
        captions: Caption templates for each style, with `{c}` and optionally `{colour}` and `{background}`.
        draw: Renders a picture of a label in a style.
        corpus_weight: Relative frequency of the domain in the pre-training corpus. It is higher for domains with fine
            strokes, because strokes take longer to learn than colours.
    """

    name: str
    classnames: tuple[str, ...]
    templates: tuple[str, ...]
    captions: Mapping[Style, tuple[str, ...]]
    draw: Callable[[int, Style, np.random.Generator], Picture]
    corpus_weight: int = 1


_DIGITS: Sequence[tuple[Array, ...]] = (  # the strokes of each digit
    (arc(0, 0, 0.55, 0.95, -90, 270),),
    (join((-0.35, -0.55), (0.05, -0.95), (0.05, 0.95)),),
    (join(arc(0, -0.45, 0.5, 0.5, 190, 390), (-0.55, 0.92), (0.6, 0.92)),),
    (join(arc(-0.05, -0.48, 0.5, 0.46, 200, 450), arc(-0.05, 0.46, 0.55, 0.48, -90, 160)),),
    (join((0.05, -0.95), (-0.55, 0.25), (0.6, 0.25)), join((0.25, -0.3), (0.2, 0.95))),
    (join((0.5, -0.92), (-0.4, -0.92), (-0.45, -0.1), arc(-0.05, 0.36, 0.55, 0.55, 230, 510)),),
    (join((0.35, -0.95), (-0.3, -0.3), arc(0, 0.45, 0.48, 0.48, 200, 560)),),
    (join((-0.55, -0.9), (0.55, -0.9), (-0.1, 0.95)), join((-0.3, 0.05), (0.45, 0.05))),
    (arc(0, -0.48, 0.4, 0.44), arc(0, 0.46, 0.48, 0.48)),
    (join(arc(0, -0.45, 0.48, 0.48), (0.45, -0.45), (0.25, 0.95)),),
)


def _draw_digit(label: int, style: Style, rng: np.random.Generator) -> Picture:
    from matplotlib import get_data_path

    if style == "task":  # pen strokes at 8 x 8 pixels, as in scikit-learn's scanned digits
        canvas = Canvas(solid(0.0), rng, max_rotation=10, size=(0.75, 0.95))
        breadth, slant, width = rng.uniform(0.7, 1.1), rng.uniform(-0.25, 0.1), rng.uniform(4, 6.5)
        canvas.transform = np.array([[breadth, 0], [slant, 1]]) @ canvas.transform
        for stroke in _DIGITS[label]:
            canvas.stroke(stroke, np.ones(3), width, jitter=0.05)
        cells = np.asarray(canvas.image.convert("L").resize((8, 8), Image.Resampling.BOX))
        return Picture(enlarge_digit((cells / 255 * rng.uniform(1.0, 1.4)).clip(0, 1)))
    colour, background = pick_colour_pair(rng)
    face = pick(rng, ("Sans", "Sans-Bold", "Sans-Oblique", "Serif", "Serif-Bold", "SansMono"))
    glyph = Image.new("L", (CANVAS_SIDE, CANVAS_SIDE))
    x, y = CANVAS_SIDE / 2 + rng.uniform(-6, 6, 2)
    font = ImageFont.truetype(f"{get_data_path()}/fonts/ttf/DejaVu{face}.ttf", int(rng.integers(75, 110)))
    ImageDraw.Draw(glyph).text((x, y), str(label), fill=255, font=font, anchor="mm")
    coverage = np.asarray(glyph.rotate(rng.uniform(-12, 12), Image.Resampling.BILINEAR)) / np.float64(255)
    painted = blend(lit_background(background, rng), jitter_colour(colour, rng), coverage)
    return Picture(downsample_with_noise(painted, 0.06, rng), colour, background)


def enlarge_digit(ink: Array) -> Array:
    """Enlarge a scanned digit.

    Args:
        ink: The amount of ink in 0..1 [8, 8].

    Returns:
        White writing on black [IMAGE_SIDE, IMAGE_SIDE, 3].
    """
    enlarged = Image.fromarray(ink.astype(np.float32)).resize((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.BICUBIC)
    return np.repeat(np.asarray(enlarged, np.float64)[..., None], 3, 2)


_EYES: Mapping[str, tuple[Array, ...]] = {  # relative to the left eye's centre; the right eye is mirrored
    "angry": (arc(0, 0.05, 0.06, 0.08), join((-0.28, -0.42), (0.28, -0.1))),
    "arched": (join((-0.22, 0.14), (0, -0.18), (0.22, 0.14)),),
    "closed": (join((-0.25, 0), (0.25, 0)),),
    "crossed": (join((-0.19, -0.19), (0.19, 0.19)), join((0.19, -0.19), (-0.19, 0.19))),
    "open": (arc(0, 0, 0.06, 0.1),),
    "tearful": (arc(0, 0, 0.06, 0.08), join((-0.12, 0.25), (-0.14, 0.75))),
    "wide": (arc(0, -0.05, 0.22, 0.28),),
    "worried": (arc(0, 0.05, 0.06, 0.08), join((-0.28, -0.12), (0.28, -0.45))),
}
_MOUTHS: Mapping[str, Array] = {
    "flat": join((-0.4, 0.5), (0.4, 0.5)),
    "frown": arc(0, 0.75, 0.42, 0.38, 200, 340),
    "grin": join(arc(0, 0.22, 0.52, 0.5, 0, 180), (0.52, 0.22)),
    "round": arc(0, 0.5, 0.17, 0.22),
    "smile": arc(0, 0.2, 0.5, 0.45, 10, 170),
    "wave": join((-0.5, 0.5), (-0.25, 0.32), (0, 0.62), (0.25, 0.32), (0.5, 0.5)),
}
_FACES: Mapping[str, tuple[str, str, str]] = {  # left eye, right eye, mouth
    "angry": ("angry", "angry", "frown"), "crying": ("tearful", "tearful", "frown"),
    "dizzy": ("crossed", "crossed", "wave"), "happy": ("open", "open", "smile"),
    "laughing": ("arched", "arched", "grin"), "neutral": ("open", "open", "flat"),
    "sad": ("worried", "worried", "frown"), "sleepy": ("closed", "closed", "round"),
    "surprised": ("wide", "wide", "round"), "winking": ("open", "closed", "smile"),
}  # fmt: skip


def _draw_face(label: int, style: Style, rng: np.random.Generator) -> Picture:
    left, right, mouth = list(_FACES.values())[label]
    lines = [line + np.array((-0.38, -0.18)) for line in _EYES[left]]
    lines += [line * (-1, 1) + np.array((0.38, -0.18)) for line in _EYES[right]] + [_MOUTHS[mouth]]
    head, colour, background = arc(0, 0, rng.uniform(0.9, 1), rng.uniform(0.92, 1)), "", ""
    if style == "web":
        colour = pick(rng, ("yellow", "pink", "orange", "white"))
        background = pick(rng, ("blue", "green", "purple", "red"))
        canvas = Canvas(lit_background(background, rng), rng, max_rotation=8, size=(0.85, 0.98))
        canvas.fill(head, jitter_colour(colour, rng))
        ink, width, jitter, max_noise = np.full(3, rng.uniform(0, 0.2)), rng.uniform(1.4, 2.2), 0.0, 0.06
    else:
        canvas = Canvas(solid(rng.uniform(0.8, 0.95)), rng, max_rotation=14, size=(0.8, 0.98))
        ink, width, jitter, max_noise = np.full(3, rng.uniform(0.25, 0.55)), rng.uniform(1.0, 1.6), 0.03, 0.1
        canvas.stroke(head, ink, width, jitter)
    for line in lines:
        canvas.stroke(line, ink, width, jitter)
    return Picture(downsample_with_noise(canvas.pixels(), max_noise, rng), colour, background)


_LAYOUTS: Mapping[str, Callable[[Array, Array], Array | Mask]] = {  # index of the colour at each point of -0.5..0.5
    "columns": lambda u, v: (u + 0.5) * 3,
    "cross": lambda u, v: ((abs(u) < 0.09) & (abs(v) < 0.33)) | ((abs(u) < 0.25) & (abs(v) < 0.12)),
    "disc": lambda u, v: np.hypot(u, v / 1.3) < 0.24,
    "nordic": lambda u, v: (abs(u + 0.14) < 0.08) | (abs(v) < 0.11),
    "rows": lambda u, v: (v + 0.5) * 3,
    "two rows": lambda u, v: v > 0,
}
_FLAGS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "Austria": ("rows", ("red", "white", "red")), "Denmark": ("nordic", ("red", "white")),
    "France": ("columns", ("blue", "white", "red")), "Germany": ("rows", ("black", "red", "yellow")),
    "Ireland": ("columns", ("green", "white", "orange")), "Italy": ("columns", ("green", "white", "red")),
    "Japan": ("disc", ("white", "red")), "Netherlands": ("rows", ("red", "white", "blue")),
    "Poland": ("two rows", ("white", "red")), "Sweden": ("nordic", ("blue", "yellow")),
    "Switzerland": ("cross", ("red", "white")), "Ukraine": ("two rows", ("blue", "yellow")),
}  # fmt: skip


def _draw_flag(label: int, style: Style, rng: np.random.Generator) -> Picture:
    layout, names = list(_FLAGS.values())[label]
    u, v = grid(rng.uniform(-8, 8), rng.uniform(0.52, 0.7))
    height = rng.uniform(0, 0.04 if style == "web" else 0.1)
    ripple = height * np.sin(u * rng.uniform(4, 9) + rng.uniform(0, 6))
    v = (v + ripple) * 1.3
    regions = _LAYOUTS[layout](u, v).astype(np.int64).clip(0, len(names) - 1)
    cloth = np.array([jitter_colour(name, rng) for name in names])[regions]
    sky = lit_background(pick(rng, list(COLOURS)), rng) if style == "web" else solid(rng.uniform(0.5, 0.9))
    if style == "task":
        grey = cloth.mean(2, keepdims=True) * 0.4 + rng.uniform(0.3, 0.45)
        cloth = grey + (cloth - grey) * rng.uniform(0.1, 0.4) + rng.uniform(0, 2) * ripple[..., None]
    outside = (abs(u) > 0.5) | (abs(v) > 0.5)
    return Picture(downsample_with_noise(blend(cloth, sky, outside), 0.05 if style == "web" else 0.12, rng))


_GRASS, _SOIL, _SAND = np.array([0.25, 0.45, 0.18]), np.array([0.5, 0.38, 0.25]), np.array([0.85, 0.73, 0.5])
_WATER, _PAVED, _PAINT = np.array([0.1, 0.25, 0.5]), np.array([0.42, 0.42, 0.44]), np.array([0.92, 0.92, 0.9])
_LAND = ("coastline", "crop fields", "desert", "forest", "highway",
         "houses", "lake", "orchard", "river", "warehouses")  # fmt: skip


def _draw_land(label: int, style: Style, rng: np.random.Generator) -> Picture:
    u, v = grid(rng.uniform(0, 360), 1.0, (rng.uniform(-0.3, 0.3), rng.uniform(-0.3, 0.3)))
    scene = _land(_LAND[label], u, v, rng) * (0.85 + 0.3 * smooth_noise(rng, 6)[..., None]) * rng.uniform(0.8, 1.2)
    if style == "task":  # haze, and the false colours of near-infrared images, in which plants are red
        scene = blend(scene[..., [1, 0, 2]], np.array([0.75, 0.78, 0.82]), np.array(rng.uniform(0.35, 0.65)))
    return Picture(downsample_with_noise(scene, 0.05 if style == "web" else 0.07, rng))


def _land(kind: str, u: Array, v: Array, rng: np.random.Generator) -> Array:
    """Paint an aerial view of a kind of land [CANVAS_SIDE, CANVAS_SIDE, 3], at the coordinates `u` and `v`."""
    meadow = blend(solid(_GRASS), _SOIL, smooth_noise(rng, 4) * rng.uniform(0, 0.7))
    bend = 0.25 * np.sin(rng.uniform(2, 4) * u + rng.uniform(0, 6))
    match kind:
        case "coastline":
            shore = v + bend / 2
            beach = blend(blend(meadow, _SAND, shore > -0.25), _PAINT, shore > 0)
            return blend(beach, _WATER, shore > 0.08)
        case "crop fields":
            return _cells(u, v, rng.uniform(0.35, 0.6), (_GRASS, _GRASS * 1.5, _SOIL, _SAND * 0.9), rng)
        case "desert":
            dunes = np.sin(rng.uniform(12, 20) * (v + bend) + 4 * smooth_noise(rng, 4))
            return blend(_SAND, _SOIL, 0.2 + 0.2 * dunes)
        case "forest":
            return blend(_GRASS * 0.9, _GRASS * 0.1, smooth_noise(rng, 12))
        case "highway":
            lines = (abs(abs(v) - 0.17) < 0.03) | ((abs(v) < 0.03) & (u * 3 % 1 < 0.6))
            return blend(blend(meadow, _PAVED, abs(v) < 0.2), _PAINT, lines)
        case "houses":
            roofs = _cells(u, v, 0.33, (np.array([0.7, 0.3, 0.2]), np.array([0.85, 0.5, 0.3])), rng)
            return blend(blend(meadow, _PAVED, v % 0.66 < 0.14), roofs, _inside(u, v, 0.33, 0.5))
        case "lake":
            return blend(meadow, _WATER, np.hypot(u, v * rng.uniform(1, 1.5)) + 0.5 * smooth_noise(rng, 5) < 0.9)
        case "orchard":
            trees = np.hypot((u * 4.5) % 1 - 0.5, (v * 4.5) % 1 - 0.5) < rng.uniform(0.28, 0.36)
            return blend(_SOIL * rng.uniform(1, 1.4), _GRASS * 0.5, trees)
        case "river":
            return blend(meadow, _WATER, abs(v + 1.3 * bend) < rng.uniform(0.14, 0.22))
        case _:
            roofs = _cells(u, v, 0.75, (_PAINT, _PAINT * 0.8, np.array([0.6, 0.7, 0.85])), rng)
            return blend(_PAVED * rng.uniform(0.5, 1), roofs, _inside(u, v, 0.75, 0.75))


def _cells(u: Array, v: Array, pitch: float, colours: Sequence[Array], rng: np.random.Generator) -> Array:
    """Paint a grid of square cells with side `pitch`. Each cell has a random colour of `colours`."""
    chosen = np.array(colours)[rng.integers(len(colours), size=(16, 16))]
    return chosen[(u // pitch).astype(np.int64) % 16, (v // pitch).astype(np.int64) % 16]


def _inside(u: Array, v: Array, pitch: float, share: float) -> Mask:
    """Return a mask of the centre of each grid cell: a square whose side is the fraction `share` of the cell's side."""
    return (abs(u / pitch % 1 - 0.5) < share / 2) & (abs(v / pitch % 1 - 0.5) < share / 2)


_SHAPES: Mapping[str, Array] = {  # closed outlines
    "arrow": join((-1, -0.3), (0.1, -0.3), (0.1, -0.8), (1, 0),
                  (0.1, 0.8), (0.1, 0.3), (-1, 0.3), (-1, -0.3)),
    "circle": arc(0, 0, 0.85, 0.85),
    "crescent": join(arc(0, 0, 1, 1, 50, 310), arc(0.55, 0, 0.77, 0.77, 277, 83)),
    "cross": join((-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3), (0.3, 1),
                   (-0.3, 1), (-0.3, 0.3), (-1, 0.3), (-1, -0.3), (-0.3, -0.3), (-0.3, -1)),
    "diamond": polygon(1, 0.6, 1, 0.6),
    "heart": join((0, 0.95), arc(-0.46, -0.3, 0.5, 0.52, 150, 335),
                  arc(0.46, -0.3, 0.5, 0.52, 205, 390), (0, 0.95)),
    "hexagon": polygon(*(0.95,) * 6),
    "lightning bolt": join((0.1, -1), (-0.6, 0.15), (-0.05, 0.15), (-0.25, 1),
                            (0.6, -0.25), (0.05, -0.25), (0.45, -1), (0.1, -1)),
    "oval": arc(0, 0, 1, 0.55),
    "square": join((-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8), (-0.8, -0.8)),
    "star": polygon(*(1, 0.42) * 5),
    "triangle": polygon(*(1.05,) * 3),
}  # fmt: skip


def _draw_shape(label: int, style: Style, rng: np.random.Generator) -> Picture:
    outline = list(_SHAPES.values())[label]
    if style == "web":
        colour, background = pick_colour_pair(rng)
        canvas = Canvas(lit_background(background, rng), rng, max_rotation=10, size=(0.7, 0.95))
        paint = jitter_colour(colour, rng)
        if rng.random() < 0.5:
            canvas.fill(outline, paint)
        canvas.stroke(outline, paint, rng.uniform(2, 3.5))
        return Picture(downsample_with_noise(canvas.pixels(), 0.06, rng), colour, background)
    board = solid(np.array([0.13, 0.13 + rng.uniform(0, 0.1), 0.16]) * rng.uniform(0.8, 1.6))
    canvas = Canvas(board, rng, max_rotation=18, size=(0.65, 0.92))
    canvas.stroke(outline, np.full(3, rng.uniform(0.6, 0.95)), rng.uniform(1.2, 2.2), jitter=0.03)
    crumbling = smooth_noise(rng, 24) * rng.uniform(0.3, 0.8)
    return Picture(downsample_with_noise(blend(canvas.pixels(), board, crumbling), 0.1, rng))


def _honeycomb(u: Array, v: Array) -> Mask:
    """Return the mask of the walls between hexagonal cells: the points that are far from every cell centre."""
    nearest = np.full_like(u, np.inf)
    for offset in (0.0, 0.5):  # the centres form two interleaved rectangular grids
        x, y = abs((u + offset) % 1 - 0.5), abs((v / 3**0.5 + offset) % 1 - 0.5) * 3**0.5
        nearest = np.minimum(nearest, np.maximum(x, x / 2 + y * 3**0.5 / 2))
    return nearest > 0.4


_TEXTURES: Mapping[str, Callable[[Array, Array], Mask]] = {  # mask of the ink, for coordinates in cells
    "bricked": lambda u, v: (v % 1 < 0.2) | ((u / 2 + 0.5 * (v // 1 % 2)) % 1 < 0.12),
    "checkered": lambda u, v: (u // 1 + v // 1) % 2 < 1,
    "dotted": lambda u, v: np.hypot(u % 1 - 0.5, v % 1 - 0.5) < 0.32,
    "gridded": lambda u, v: (u % 1 < 0.2) | (v % 1 < 0.2),
    "honeycombed": _honeycomb,
    "marbled": lambda u, v: abs(np.sin(1.3 * u + 2.2 * np.sin(v) + 1.4 * np.sin(2 * v + 0.8 * u))) < 0.4,
    "spiralled": lambda u, v: (np.hypot(u, v) * 0.8 + np.arctan2(v, u) / (2 * np.pi)) % 1 < 0.5,
    "striped": lambda u, v: u % 1 < 0.5,
    "wavy": lambda u, v: (v + 0.35 * np.sin(np.pi * u)) % 1 < 0.5,
    "zigzagged": lambda u, v: (1.5 * v + 2 * abs(u % 1 - 0.5)) % 1 < 0.5,
}


def _draw_texture(label: int, style: Style, rng: np.random.Generator) -> Picture:
    x, y = rng.uniform(-0.5, 0.5, 2)
    u, v = grid(rng.uniform(-20, 20), rng.uniform(1.8, 2.6), (x, y))
    ink = list(_TEXTURES.values())[label](u, v)
    if style == "web":
        colour, background = pick_colour_pair(rng)
        printed = blend(lit_background(background, rng), jitter_colour(colour, rng), ink)
        return Picture(downsample_with_noise(printed, 0.06, rng), colour, background)
    paper = rng.uniform(0.4, 0.7) + rng.uniform(-0.06, 0.06, 3)
    stains = 0.2 * (smooth_noise(rng, 4)[..., None] - 0.5)
    faint = blend(paper, paper + rng.uniform(0.12, 0.3) * rng.choice((-1, 1)), ink)
    return Picture(downsample_with_noise(faint + stains, 0.12, rng))


_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_DOMAINS = (
    Domain("digits", _NUMBERS,
        ("a photo of the number {c}", "a handwritten number {c}", "the digit {c}"),
        {"web": ("a photo of the number {c}", "the digit {c}", "the number {c}", "a {colour} {c}"),
         "task": ("a handwritten number {c}", "the digit {c} written by hand")},
        _draw_digit, 2),
    Domain("faces", tuple(_FACES),
        ("a drawing of a {c} face", "a sketch of a {c} face", "a person who looks {c}"),
        {"web": ("a drawing of a {c} face", "a person who looks {c}", "a {c} emoji", "a {c} {colour} face"),
         "task": ("a pencil sketch of a {c} face", "a sketch of a {c} face")},
        _draw_face, 2),
    Domain("flags", tuple(_FLAGS),
        ("a photo of the flag of {c}", "the flag of {c} in the wind", "the flag of {c}"),
        {"web": ("a photo of the flag of {c}", "the flag of {c}", "an icon of the flag of {c}"),
         "task": ("a faded flag of {c}", "the flag of {c} in the wind")},
        _draw_flag),
    Domain("land", _LAND,
        ("a satellite photo of {c}", "an aerial view of {c}", "a hazy satellite image of {c}"),
        {"web": ("a satellite photo of {c}", "an aerial view of {c}", "{c} seen from above"),
         "task": ("a hazy satellite image of {c}", "{c} in infrared")},
        _draw_land),
    Domain("shapes", tuple(_SHAPES),
        ("a drawing of a {c}", "a chalk drawing of a {c}", "a picture of a {c}"),
        {"web": ("a drawing of a {c}", "a picture of a {c}", "a {colour} {c}",
                 "a {c} on a {background} background"),
         "task": ("a chalk drawing of a {c}", "a {c} on a blackboard")},
        _draw_shape, 2),
    Domain("textures", tuple(_TEXTURES),
        ("a photo of a {c} texture", "a {c} surface", "a faint {c} pattern"),
        {"web": ("a photo of a {c} texture", "a {c} surface", "a {c} pattern",
                 "{colour} and {background} {c} cloth"),
         "task": ("a faint {c} pattern", "a worn {c} surface")},
        _draw_texture, 2),
)  # fmt: skip
DOMAINS: Mapping[str, Domain] = {domain.name: domain for domain in _DOMAINS}
