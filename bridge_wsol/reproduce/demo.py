"""The data set `demo`: drawn birds, in the list format of data.py, with exact boxes and masks.

The classes are fine-grained, as those of CUB. The pattern of the whole body (spotted or barred) shows the
*genus*. A small part, the colour of the head, shows the *species*; class = genus x species. Everything else
varies: the body's hue, size, proportions, pose and position, and the background. Some birds are partly
outside the image, but the head is always inside.

Every image has its own random generator, derived from (seed, split, index): no image depends on another one.
The weights of the demo's small backbone, demo_vgg16.pth, are of tests/pretrain_demo.py.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable, Sequence
from colorsys import hsv_to_rgb
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from .. import utils
from ..data import write_lists
from ..utils import InputError

SIZE = 128  # pixels of an image; training crops 7/8 of it, as 224 of 256
SCALE = 2  # drawn at twice the size, then averaged: smooth edges
CANVAS = SIZE * SCALE

HEADS = {  # species -> hue, saturation, value of the head
    "red": (0.99, 0.90, 0.88),
    "orange": (0.075, 0.95, 0.98),
    "yellow": (0.15, 0.95, 0.98),
    "green": (0.34, 0.90, 0.68),
    "cyan": (0.50, 0.85, 0.92),
    "blue": (0.625, 0.92, 0.85),
    "violet": (0.745, 0.80, 0.80),
    "magenta": (0.87, 0.80, 0.95),
}
DEMO_COUNTS = {"train": 1600, "val": 320, "test": 640}

Colour = tuple[int, int, int]


class Plan(NamedTuple):
    """A drawn data set: the image `index` of a split has the class index % classes."""

    counts: dict[str, int]  # images of each split
    draw: Callable[[np.random.Generator, int], Drawing]  # of the image's generator and class
    classes: int
    seed: int


class Drawing(NamedTuple):
    """An image with the masks of its object; each SIZE x SIZE."""

    image: Image.Image  # RGB
    mask: np.ndarray  # bool: the object
    part: np.ndarray  # bool: the head, which shows the species; empty where no part is told apart


# -------------------------------------------------------------------------------------------------- the files

STAMP = "complete.txt"  # the last file of a data set; its text says what was drawn
VERSION = 1  # of the drawings: another one draws them again


def draw_demo(data_root: Path, lists: Path) -> None:
    """Draws the data set `demo` if it is not there: images and masks in data_root/demo, lists in lists/demo.

    data_root/demo/masks has the masks of the birds, data_root/demo/parts those of the heads. The pixels are
    the same on every machine with the same Pillow and NumPy. Raises InputError if nothing can be written.
    """
    plan = Plan(DEMO_COUNTS, draw_bird, len(GENERA) * len(HEADS), seed=0)
    draw_data_set(data_root / "demo", lists / "demo", plan)


def draw_data_set(root: Path, lists: Path, plan: Plan) -> None:
    """Draws images and masks into `root` and writes their lists into `lists`, what of it is not there."""
    stamp = f"{root.name} version {VERSION}, {plan.counts}\n"
    if all(_text(folder / STAMP) == stamp for folder in (root, lists)):
        return
    if _text(root / STAMP) != stamp:
        _draw_images(root, plan, stamp)
    for split, count in plan.counts.items():
        ids = [f"{split}/{index:05d}.png" for index in range(count)]
        files = {
            "image_ids": ids,
            "class_labels": [f"{image},{index % plan.classes}" for index, image in enumerate(ids)],
            "image_sizes": [f"{image},{SIZE},{SIZE}" for image in ids],
            "localization": [line for image in ids for line in _localization(root, image)],
        }
        write_lists(lists / split, files)
    utils.write_text(lists / STAMP, stamp)


def _draw_images(root: Path, plan: Plan, stamp: str) -> None:
    orders = [(split, index) for split, count in plan.counts.items() for index in range(count)]
    print(f"drawing {len(orders)} images into {root}", flush=True)
    part = root.with_name(f".{root.name}.{secrets.token_hex(4)}.part")
    try:
        for split in plan.counts:
            for kind in ("", "masks", "parts"):
                (part / kind / split).mkdir(parents=True)
        drawn = utils.imap(partial(_draw_one, part, plan), orders, utils.cores())
        for _ in utils.progress(drawn, f"drawing {root.name}", len(orders)):
            pass
        utils.write_text(part / STAMP, stamp)
        with suppress(OSError):  # it exists: another process was first, or it is of another version
            part.rename(root)
        if _text(root / STAMP) != stamp:
            shutil.rmtree(root)
            part.rename(root)
    except OSError as error:
        raise InputError(f"{root}: cannot be written ({error.strerror})") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _draw_one(folder: Path, plan: Plan, order: tuple[str, int]) -> None:
    """Writes one image, its mask and, if it is not empty, the mask of its part."""
    (split, index), number = order, [*plan.counts].index(order[0])
    drawing = plan.draw(np.random.default_rng((plan.seed, number, index)), index % plan.classes)
    image = f"{split}/{index:05d}.png"
    drawing.image.save(folder / image, compress_level=1)
    Image.fromarray(drawing.mask).save(folder / "masks" / image)
    if drawing.part.any():
        Image.fromarray(drawing.part).save(folder / "parts" / image)


def _localization(root: Path, image: str) -> tuple[str, str]:
    """The lines of an image: the exact box of its mask, corners included, and the mask."""
    with Image.open(root / "masks" / image) as mask:
        x0, y0, x1, y1 = mask.getbbox()
    return f"{image},{x0},{y0},{x1 - 1},{y1 - 1}", f"{image},masks/{image},"


def _text(path: Path) -> str | None:
    with suppress(OSError, UnicodeDecodeError):
        return path.read_text(encoding="utf-8")


# --------------------------------------------------------------------------------------------------- the bird


def draw_bird(rng: np.random.Generator, label: int) -> Drawing:
    """One bird of class `label` = genus * 8 + species."""
    genus, species = divmod(label, len(HEADS))
    parts, unit = _bird_in_view(rng)
    image = background(rng)

    hue, saturation = rng.random(), rng.uniform(0.15, 0.55)
    light = rgb(hue, saturation, rng.uniform(0.65, 0.95))
    dark = rgb(hue + rng.uniform(-0.06, 0.06), saturation, rng.uniform(0.15, 0.38))
    colours = (dark, light) if rng.random() < 0.5 else (light, dark)  # of the ground and of the marks on it
    skin = rgb(rng.uniform(0.05, 0.12), 0.4, rng.uniform(0.25, 0.6))

    legs, coat = (parts["leg0"], parts["leg1"]), (parts["tail"], parts["neck"], parts["body"])
    _fill(image, skin, *legs)
    dx, dy = parts["axis"][1] - parts["axis"][0]
    period, angle = unit * rng.uniform(0.22, 0.30), np.arctan2(dy, dx) + rng.uniform(-0.3, 0.3)
    pattern = GENERA[genus](*periods(rng, period, angle))
    paint(image, mask_of(*coat), parts["body"], pattern, colours)
    tail, body = (np.concatenate([parts[name], parts[name][:1]]) for name in ("tail", "body"))
    for outline in (tail, body, parts["wing"]):
        _line(image, outline, _darker(colours[1], 0.5))

    h, s, v = [*HEADS.values()][species]
    head = rgb(h + rng.uniform(-0.015, 0.015), s * rng.uniform(0.9, 1), v * rng.uniform(0.92, 1))
    front = {"beak": skin, "head": head, "eye": (250, 250, 250), "pupil": (10, 10, 10)}
    for name, colour in front.items():
        _fill(image, colour, parts[name])
    return finish(rng, image, mask_of(*legs, *coat, parts["beak"], parts["head"]), mask_of(parts["head"]))


def _bird_in_view(rng: np.random.Generator) -> tuple[dict[str, np.ndarray], float]:
    """(polygons in pixels of the canvas, pixels per body length); the whole head is inside the canvas."""
    while True:
        parts = _bird_outline(rng)
        unit = rng.uniform(84, 124) / 128 * CANVAS / 2
        to_canvas = placement(rng, unit, tilt=25)
        parts = {name: to_canvas(points) for name, points in parts.items()}
        everything = np.concatenate([*parts.values()])
        low, high = everything.min(0), everything.max(0)
        # A third of the birds may be partly outside, by up to a quarter of their extent.
        outside = (rng.uniform(0, 0.25, 2) if rng.random() < 0.33 else np.zeros(2)) * (high - low)
        shift = rng.uniform(*np.sort([-outside - low, CANVAS - 1 + outside - high], axis=0))
        parts = {name: points + shift for name, points in parts.items()}
        if parts["head"].min() >= 0 and parts["head"].max() < CANVAS:
            return parts, unit


def _bird_outline(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Polygons (n x 2) in the frame of the bird: the body has length 1, the head is right, y points down."""
    height = rng.uniform(0.38, 0.48)
    body = ellipse(0.5, height, turn(40))
    body[:, 1] *= 1 + 0.25 * np.cos(turn(40))

    lift, stretch, r = np.radians(rng.uniform(15, 70)), rng.uniform(0.20, 0.36), rng.uniform(0.165, 0.2)
    along, across = _axes(-lift)
    shoulder = np.array([0.34, -0.45 * height])
    centre = shoulder + stretch * along
    ends = [(shoulder, 0.2), (centre, 0.85 * r), (centre, -0.85 * r), (shoulder, -0.2)]
    neck = np.array([end + width * across for end, width in ends])
    head = centre + ellipse(r, r * rng.uniform(0.88, 1))

    ahead, up = _axes(np.radians(rng.uniform(-25, 25)))
    length, base = rng.uniform(0.13, 0.26), 0.85 * r * ahead
    beak = centre + np.array([base + 0.075 * up, (r + length) * ahead, base - 0.075 * up])
    eye = centre + 0.3 * r * ahead + 0.25 * r * up

    front, side = _axes(np.radians(rng.uniform(-35, 25)))
    root, length, spread = np.array([-0.36, -0.04]), rng.uniform(0.25, 0.45), rng.uniform(0.1, 0.22)
    end = root - front * length
    rim = [end + spread * side, end - 0.04 * front, end - spread * side]
    tail = np.array([root + 0.09 * side, *rim, root - 0.09 * side])

    parts = {"body": body, "neck": neck, "head": head, "beak": beak, "tail": tail}
    parts["eye"], parts["pupil"] = eye + ellipse(0.05, 0.05), eye + ellipse(0.028, 0.028)
    w = 0.028
    toes = np.array([[w, -0.02], [0.12, 0.02], [0.12, 0.05], [-0.06, 0.05], [-0.06, 0.02], [-w, -0.02]])
    for i, x in enumerate((-0.09, 0.10)):
        swing = rng.uniform(-0.08, 0.08)
        hip, foot = np.array([x, 0.8 * height]), np.array([x + swing, height + rng.uniform(0.05, 0.13)])
        parts[f"leg{i}"] = np.array([hip + [w, 0], *(foot + toes), hip - [w, 0]])
    s = np.linspace(0, np.pi, 14)
    cos, sin = np.cos(s), np.sin(s)
    parts["wing"] = np.stack([-0.08 + 0.3 * cos, -0.02 + 0.6 * height * sin - 0.05 * cos], 1)
    parts["axis"] = np.array([[0.0, 0.0], [0.3, 0.0]])
    return parts


# ----------------------------------------------------------------------------------------------- shared parts


def background(rng: np.random.Generator) -> Image.Image:
    """Soft colours, then leaves, stones, blades and twigs. Only the objects have saturated colours."""
    tint = rng.choice([0.08, 0.12, 0.25, 0.32, 0.55, 0.6]) + rng.uniform(-0.04, 0.04)
    uniform = rng.uniform
    ground = [rgb(tint + uniform(-0.05, 0.05), uniform(0.05, 0.4), uniform(0.3, 0.85)) for _ in range(25)]
    image = Image.fromarray(np.array(ground, dtype=np.uint8).reshape(5, 5, 3))
    image = image.resize((CANVAS, CANVAS), Image.Resampling.BICUBIC)
    for _ in range(rng.integers(8, 26)):
        where = rng.uniform(-0.05, 1.05, 2) * CANVAS
        colour = rgb(tint + rng.uniform(-0.12, 0.12), rng.uniform(0.05, 0.45), rng.uniform(0.2, 0.85))
        place = placement(rng, rng.uniform(8, 26) * SCALE, tilt=180)
        kind = rng.integers(4)
        if kind == 0:  # leaf
            s = np.linspace(-1, 1, 12)
            edge = np.stack([s, 0.4 * (1 - s**2)], 1)
            blade = np.concatenate([edge, edge[::-1] * [1, -1]])
            _fill(image, colour, where + place(blade))
            _line(image, where + place(np.array([[-1.2, 0], [0.9, 0]])), _darker(colour, 0.7))
        elif kind == 1:  # stone
            stone = place(ellipse(0.8, rng.uniform(0.4, 0.7)))
            _fill(image, _darker(colour, 0.7), where + stone)
            _fill(image, colour, where + stone * 0.8 - SCALE)
        elif kind == 2:  # blades of grass
            for lean in rng.uniform(-0.6, 0.6, 3):
                blade = np.array([[-0.06, 0], [0.06, 0], [lean, -1.6]]) * rng.uniform(10, 24) * SCALE
                _fill(image, colour, where + blade)
        else:  # twig
            twig = np.array([[-2, -0.05], [0, -0.1], [2, -0.03], [2, 0.03], [0, 0.1], [-2, 0.05]])
            _fill(image, colour, where + place(twig))
    return image


def periods(rng: np.random.Generator, period: float, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """(u, v) of each pixel: periods (in pixels) along and across an axis with this angle (radians)."""
    origin = rng.uniform(0, CANVAS, (2, 1, 1)).astype(np.float32)
    y, x = np.mgrid[:CANVAS, :CANVAS].astype(np.float32) - origin
    c, s = np.float32(np.cos(angle) / period), np.float32(np.sin(angle) / period)
    return c * x + s * y, c * y - s * x


def dots(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Rows of dots, every other row shifted: bool."""
    row = np.floor(v)
    return ((u + 0.5 * (row % 2)) % 1 - 0.5) ** 2 + (v - row - 0.5) ** 2 < 0.11


def stripes(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Stripes across the axis: bool."""
    return u % 1 < 0.5


GENERA = (dots, stripes)  # pattern of the body: spotted and barred birds


def paint(
    image: Image.Image, mask: Image.Image, outline: np.ndarray, pattern: np.ndarray, colours: Sequence[Colour]
) -> None:
    """Paints a pattern of two colours into the mask: lighter above, darker below, so that it looks round."""
    x0, y0, x1, y1 = box = mask.getbbox()
    top, bottom = outline[:, 1].min(), outline[:, 1].max()
    light = np.clip(1.12 - 0.42 * (np.arange(y0, y1) - top) / max(bottom - top, 1), 0.6, 1.12)
    first, second = np.array(colours, dtype=np.float32)
    coat = np.where(pattern[y0:y1, x0:x1, None], second, first)
    coat = np.minimum(coat * light[:, None, None].astype(np.float32), 255)
    image.paste(Image.fromarray(coat.astype(np.uint8)), box, mask.crop(box))


def finish(rng: np.random.Generator, image: Image.Image, mask: Image.Image, part: Image.Image) -> Drawing:
    """Reduces the canvas to SIZE; adds noise and changes the exposure."""
    pixels = np.asarray(image.reduce(SCALE), dtype=np.float32)
    noise = rng.standard_normal((SIZE, SIZE, 3), dtype=np.float32)
    pixels = pixels * np.float32(rng.uniform(0.85, 1.1)) + noise * np.float32(rng.uniform(1, 6))
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    return Drawing(image, *(np.asarray(m.reduce(SCALE)) > 127 for m in (mask, part)))


def placement(rng: np.random.Generator, unit: float, tilt: float) -> Callable[[np.ndarray], np.ndarray]:
    """A random map of points (n x 2): scales by `unit`, may mirror, rotates by up to `tilt` degrees."""
    a, mirror = np.radians(rng.uniform(-tilt, tilt)), rng.choice([-1.0, 1.0])
    matrix = unit * np.array([[mirror * np.cos(a), -np.sin(a)], [mirror * np.sin(a), np.cos(a)]])
    return lambda points: points @ matrix.T


def turn(n: int) -> np.ndarray:
    """The angles of n points around a centre."""
    return np.linspace(0, 2 * np.pi, n, endpoint=False)


def ellipse(a: Any, b: Any, t: np.ndarray | None = None) -> np.ndarray:
    """n x 2 points at the angles t (default: 28). a, b: half axes, of the ellipse or of each point."""
    t = turn(28) if t is None else t
    return np.stack([a * np.cos(t), b * np.sin(t)], 1)


def _axes(angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors: to the right, turned by an angle (radians), and upwards from it."""
    return np.array([np.cos(angle), np.sin(angle)]), np.array([np.sin(angle), -np.cos(angle)])


def rgb(hue: float, saturation: float, value: float) -> Colour:
    """Of a hue (1: a full turn), a saturation and a value in [0, 1]."""
    return tuple(int(255 * c) for c in hsv_to_rgb(hue % 1, saturation, value))


def _darker(colour: Colour, factor: float) -> Colour:
    return tuple(int(c * factor) for c in colour)


def _fill(image: Image.Image, colour: Colour | int, *polygons: np.ndarray) -> None:
    for points in polygons:
        ImageDraw.Draw(image).polygon(points.ravel().tolist(), fill=colour)


def mask_of(*polygons: np.ndarray) -> Image.Image:
    """The union of polygons on the canvas, "L"."""
    mask = Image.new("L", (CANVAS, CANVAS))
    _fill(mask, 255, *polygons)
    return mask


def _line(image: Image.Image, points: np.ndarray, colour: Colour) -> None:
    ImageDraw.Draw(image).line(points.ravel().tolist(), fill=colour, width=SCALE)
