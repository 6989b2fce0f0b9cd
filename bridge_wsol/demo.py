"""The embedded data set: drawn birds, in the field's split format, with exact boxes and masks.

Fine-grained as CUB is. The *genus* is told by the whole body's pattern (spotted or barred), the *species* by a small part,
the colour of the head; class = genus x species. Everything else varies: the body's hue, size, proportions, pose,
position, background, and now and then a part of the bird is outside the picture. The head always is inside.

`draw_pretraining` draws what the demo's small backbone is pretrained on, in place of ImageNet: random shapes whose cue,
texture x colour, fills the whole object. It has neither birds nor the demo's classes.

Every picture has a random generator of its own, derived from (seed, split, index): a picture depends on no other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from colorsys import hsv_to_rgb
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from .processes import ordered_map
from .utils import default_workers, write_text, writing

SIZE = 128  # of a picture; training crops 7/8 of it, as 224 of 256
SCALE = 2  # drawn larger, then averaged: smooth edges
CANVAS = SIZE * SCALE

GENERA = {"spotted": "dots", "barred": "stripes"}  # and the texture of each
# (hue, saturation, value) of the head.
HEADS = {
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

TEXTURES = ("plain", "stripes", "dots", "checks", "rings")
HUES = (0.0, 0.15, 0.33, 0.5, 0.63, 0.8)  # and, without a hue, grey
PRETRAINING_COUNTS = {"train": 8000, "val": 320, "test": 320}

Color = tuple[int, int, int]


class Picture(NamedTuple):
    image: Image.Image  # SIZE x SIZE, RGB
    mask: np.ndarray  # SIZE x SIZE, bool: the object
    part: (
        np.ndarray
    )  # SIZE x SIZE, bool: the species-telling head (empty in the pretraining set); `figures gap` reads it


def draw_demo(data_root: Path, splits: Path) -> None:
    """Draws the data set `demo`, once: images, masks and (parts/) masks of the heads below data_root/demo, split files below splits/demo.

    The same pixels on every machine with the same Pillow and NumPy. Raises InputError where nothing can be written.
    """
    _draw(data_root, splits, "demo", DEMO_COUNTS, len(GENERA) * len(HEADS), seed=0, draw=draw_bird)


def draw_pretraining(data_root: Path, splits: Path) -> None:
    """Draws the data set `demo-pretrain` the same way, for the backbone that the package ships."""
    classes = len(TEXTURES) * (len(HUES) + 1)
    _draw(data_root, splits, "demo-pretrain", PRETRAINING_COUNTS, classes, seed=1, draw=draw_shape)


class _Order(NamedTuple):
    draw: Callable[[np.random.Generator, int], Picture]
    random: tuple[int, int, int]  # seed, split, index
    label: int
    image: Path
    mask: Path
    part: Path


def _draw(
    data_root: Path, splits: Path, name: str, counts: dict[str, int], classes: int, seed: int, draw: Callable
) -> None:
    root, lists = data_root / name, splits / name
    # Written last: where it is, everything is. Its text changes with the number of pictures and with this file, which draws them.
    drawer = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
    done, stamp = root / "complete.txt", f"{name} seed {seed} {counts} by {drawer}\n"
    if (
        done.exists()
        and done.read_text() == stamp
        and all((lists / split / "localization.txt").exists() for split in counts)
    ):
        return
    print(f"drawing {sum(counts.values())} pictures into {root}", flush=True)
    orders: dict[str, _Order] = {}
    for number, (split, count) in enumerate(counts.items()):
        for folder in (root / split, root / "masks" / split, root / "parts" / split):
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
        for index in range(count):
            paths = (
                root / folder / f"{index:05d}.png" for folder in (split, f"masks/{split}", f"parts/{split}")
            )
            orders[f"{split}/{index:05d}.png"] = _Order(draw, (seed, number, index), index % classes, *paths)
    boxes = dict(zip(orders, ordered_map(_draw_one, orders.values(), default_workers())))
    for split in counts:
        ids = [path for path in orders if path.startswith(f"{split}/")]
        files = {
            "image_ids": ids,
            "class_labels": [f"{path},{orders[path].label}" for path in ids],
            "image_sizes": [f"{path},{SIZE},{SIZE}" for path in ids],
            "localization": [
                line
                for path in ids
                for line in (",".join(map(str, (path, *boxes[path]))), f"{path},masks/{path},")
            ],
        }
        for file, lines in files.items():
            write_text(lists / split / f"{file}.txt", "".join(f"{line}\n" for line in lines))
    write_text(done, stamp)


def _draw_one(order: _Order) -> tuple[int, int, int, int]:
    """Writes one picture, its mask, and the mask of its part if it has one; returns the exact box of the mask."""
    picture = order.draw(np.random.default_rng(order.random), order.label)
    with writing(order.image):
        picture.image.save(order.image, compress_level=1)
        Image.fromarray(picture.mask).save(order.mask)
        if picture.part.any():
            Image.fromarray(picture.part).save(order.part)
    y, x = np.nonzero(picture.mask)
    return int(x.min()), int(y.min()), int(x.max()), int(y.max())


# ---------------------------------------------------------------------------------------------------- the bird


def draw_bird(rng: np.random.Generator, label: int) -> Picture:
    """One bird of class `label` = genus * 8 + species. Redrawn until the head and most of the body are in the picture."""
    while True:
        genus, species = divmod(label, len(HEADS))
        parts = _bird_outline(rng)
        unit = rng.uniform(84, 124) / 128 * CANVAS / 2  # pixels per body length
        to_canvas = _placement(rng, unit, tilt=25)
        parts = {k: to_canvas(v) for k, v in parts.items()}
        everything = np.concatenate(list(parts.values()))
        low, high = everything.min(0), everything.max(0)
        # A third of the birds stand partly outside, by up to a quarter of their extent.
        slack = rng.uniform(0, 0.25, 2) if rng.random() < 0.33 else np.zeros(2)
        room_low, room_high = -slack * (high - low) - low, CANVAS - 1 + slack * (high - low) - high
        shift = rng.uniform(np.minimum(room_low, room_high), np.maximum(room_low, room_high))
        parts = {k: v + shift for k, v in parts.items()}
        head = parts["head"]
        if head.min() >= 0 and head.max() < CANVAS:
            break

    image = _background(rng)
    draw = ImageDraw.Draw(image)
    mask = Image.new("L", (CANVAS, CANVAS))
    mask_draw = ImageDraw.Draw(mask)

    hue, saturation = rng.random(), rng.uniform(0.15, 0.55)
    light, dark = (
        _rgb(hue, saturation, rng.uniform(0.65, 0.95)),
        _rgb(hue + rng.uniform(-0.06, 0.06), saturation, rng.uniform(0.15, 0.38)),
    )
    if rng.random() < 0.5:
        light, dark = dark, light
    skin = _rgb(rng.uniform(0.05, 0.12), 0.4, rng.uniform(0.25, 0.6))

    for name in ("leg0", "leg1"):
        _polygon(draw, parts[name], skin)
        _polygon(mask_draw, parts[name], 255)

    plumage = Image.new("L", (CANVAS, CANVAS))
    plumage_draw = ImageDraw.Draw(plumage)
    for name in ("tail", "neck", "body"):
        _polygon(plumage_draw, parts[name], 255)
        _polygon(mask_draw, parts[name], 255)
    angle = _angle(parts["axis"])
    pattern = _texture(
        rng,
        list(GENERA.values())[genus],
        period=unit * rng.uniform(0.22, 0.30),
        angle=angle + rng.uniform(-0.3, 0.3),
    )
    coat = Image.composite(Image.new("RGB", image.size, dark), Image.new("RGB", image.size, light), pattern)
    image.paste(_shade(coat, parts["body"]), mask=plumage)

    outline = tuple(c // 2 for c in dark)
    for name in ("tail", "body"):
        _outline(draw, parts[name], outline)
    _polyline(draw, parts["wing"], outline)
    part = Image.new("L", (CANVAS, CANVAS))
    _polygon(draw, parts["beak"], skin)
    _polygon(mask_draw, parts["beak"], 255)
    h, s, v = list(HEADS.values())[species]
    _polygon(
        draw,
        parts["head"],
        _rgb(h + rng.uniform(-0.015, 0.015), s * rng.uniform(0.9, 1), v * rng.uniform(0.92, 1)),
    )
    _polygon(mask_draw, parts["head"], 255)
    _polygon(ImageDraw.Draw(part), parts["head"], 255)
    _polygon(draw, parts["eye"], (250, 250, 250))
    _polygon(draw, parts["pupil"], (10, 10, 10))
    return _finish(rng, image, mask, part)


def _bird_outline(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Polygons (n x 2) in the bird's own frame: the body is 1 long, the head is to the right, y points down."""
    height = rng.uniform(0.38, 0.48)
    t = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    body = np.stack([0.5 * np.cos(t), height * np.sin(t) * (1 + 0.25 * np.cos(t))], 1)

    lift, stretch, r = np.radians(rng.uniform(15, 70)), rng.uniform(0.20, 0.36), rng.uniform(0.165, 0.2)
    shoulder = np.array([0.34, -0.45 * height])
    centre = shoulder + stretch * np.array([np.cos(lift), -np.sin(lift)])
    across = np.array([np.sin(lift), np.cos(lift)])
    neck = np.array(
        [
            shoulder - 0.2 * across,
            centre - 0.85 * r * across,
            centre + 0.85 * r * across,
            shoulder + 0.2 * across,
        ]
    )
    head = centre + _ellipse(r, r * rng.uniform(0.88, 1))

    gaze = np.radians(rng.uniform(-25, 25))
    ahead, up = np.array([np.cos(gaze), np.sin(gaze)]), np.array([np.sin(gaze), -np.cos(gaze)])
    length = rng.uniform(0.13, 0.26)
    beak = centre + np.array(
        [0.85 * r * ahead + 0.075 * up, (r + length) * ahead, 0.85 * r * ahead - 0.075 * up]
    )
    eye = centre + 0.3 * r * ahead + 0.25 * r * up

    droop = np.radians(rng.uniform(-35, 25))
    back, side = np.array([-np.cos(droop), -np.sin(droop)]), np.array([np.sin(droop), -np.cos(droop)])
    root, length, spread = np.array([-0.36, -0.04]), rng.uniform(0.25, 0.45), rng.uniform(0.1, 0.22)
    end = root + back * length
    tail = np.array(
        [root + 0.09 * side, end + spread * side, end + 0.04 * back, end - spread * side, root - 0.09 * side]
    )

    parts = {"body": body, "neck": neck, "head": head, "beak": beak, "tail": tail}
    parts["eye"], parts["pupil"] = eye + _ellipse(0.05, 0.05), eye + _ellipse(0.028, 0.028)
    for i, x in enumerate((-0.09, 0.10)):
        swing = rng.uniform(-0.08, 0.08)
        hip, foot = np.array([x, 0.8 * height]), np.array([x + swing, height + rng.uniform(0.05, 0.13)])
        w = 0.028
        toes = foot + np.array(
            [[w, -0.02], [0.12, 0.02], [0.12, 0.05], [-0.06, 0.05], [-0.06, 0.02], [-w, -0.02]]
        )
        parts[f"leg{i}"] = np.concatenate([[hip + [w, 0]], toes, [hip - [w, 0]]])
    s = np.linspace(0, np.pi, 14)
    parts["wing"] = np.stack(
        [-0.08 + 0.3 * np.cos(s), -0.02 + 0.6 * height * np.sin(s) - 0.05 * np.cos(s)], 1
    )
    parts["axis"] = np.array([[0.0, 0.0], [0.3, 0.0]])
    return parts


# -------------------------------------------------------------------------------------------- pretraining's shapes


def draw_shape(rng: np.random.Generator, label: int) -> Picture:
    """One shape of class `label` = texture * 7 + colour: a blob, a star, a polygon or an ellipse."""
    texture, color = divmod(label, len(HUES) + 1)
    n = rng.integers(3, 9)
    t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    form = rng.integers(4)
    if form == 0:  # blob
        radius = 1 + sum(
            rng.uniform(-0.3, 0.3) / k * np.cos(k * t + rng.uniform(0, 6.3)) for k in range(2, 6)
        )
    elif form == 1:  # star
        t = np.linspace(0, 2 * np.pi, 2 * n, endpoint=False)
        radius = np.where(np.arange(2 * n) % 2, rng.uniform(0.4, 0.7), 1)
    elif form == 2:  # polygon
        t = np.sort(np.linspace(0, 2 * np.pi, n, endpoint=False) + rng.uniform(-0.3, 0.3, n))
        radius = rng.uniform(0.75, 1, n)
    else:
        radius = np.ones_like(t)
    shape = np.stack([radius * np.cos(t), radius * np.sin(t) * rng.uniform(0.35, 1)], 1)
    unit = rng.uniform(30, 58) / 128 * CANVAS
    shape = _placement(rng, unit, tilt=180)(shape) + rng.uniform(0.3, 0.7, 2) * CANVAS

    image = _background(rng)
    mask = Image.new("L", (CANVAS, CANVAS))
    _polygon(ImageDraw.Draw(mask), shape, 255)
    saturation, value = rng.uniform(0.2, 1), rng.uniform(0.6, 1)
    if color == len(HUES):
        first, value = _rgb(0, 0.03, rng.uniform(0.05, 1)), rng.uniform(0.3, 0.9)
        second = _rgb(0, 0.03, (value + 0.5) % 1)
    else:
        hue = HUES[color] + rng.uniform(-0.02, 0.02)
        first, second = (
            _rgb(hue, saturation, value),
            _rgb(hue, saturation * rng.uniform(0.3, 1), value * rng.uniform(0.2, 0.5)),
        )
        if rng.random() < 0.3:
            second = _rgb(hue, 0.1, 1)
    pattern = _texture(rng, TEXTURES[texture], period=rng.uniform(9, 20) * SCALE, angle=rng.uniform(0, np.pi))
    coat = Image.composite(Image.new("RGB", image.size, second), Image.new("RGB", image.size, first), pattern)
    image.paste(_shade(coat, shape), mask=mask)
    return _finish(rng, image, mask, Image.new("L", mask.size))


# --------------------------------------------------------------------------------------------------- shared parts


def _background(rng: np.random.Generator) -> Image.Image:
    """Soft colours, then leaves, stones, blades and twigs. Muted: saturated colours belong to the objects."""
    tint = rng.choice([0.08, 0.12, 0.25, 0.32, 0.55, 0.6]) + rng.uniform(-0.04, 0.04)
    ground = np.array(
        [
            _rgb(tint + rng.uniform(-0.05, 0.05), rng.uniform(0.05, 0.4), rng.uniform(0.3, 0.85))
            for _ in range(25)
        ]
    )
    image = Image.fromarray(ground.reshape(5, 5, 3).astype(np.uint8)).resize(
        (CANVAS, CANVAS), Image.Resampling.BICUBIC
    )
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(8, 26)):
        where = rng.uniform(-0.05, 1.05, 2) * CANVAS
        color = _rgb(tint + rng.uniform(-0.12, 0.12), rng.uniform(0.05, 0.45), rng.uniform(0.2, 0.85))
        darker = tuple(int(c * 0.7) for c in color)
        place = _placement(rng, rng.uniform(8, 26) * SCALE, tilt=180)
        kind = rng.integers(4)
        if kind == 0:  # leaf
            s = np.linspace(-1, 1, 12)
            width = 0.4 * (1 - s**2)
            _polygon(
                draw,
                where + place(np.concatenate([np.stack([s, width], 1), np.stack([s, -width], 1)[::-1]])),
                color,
            )
            _polyline(draw, where + place(np.array([[-1.2, 0], [0.9, 0]])), darker)
        elif kind == 1:  # stone
            stone = place(_ellipse(0.8, rng.uniform(0.4, 0.7)))
            _polygon(draw, where + stone, darker)
            _polygon(draw, where + stone * 0.8 - SCALE, color)
        elif kind == 2:  # blades of grass
            for lean in rng.uniform(-0.6, 0.6, 3):
                blade = np.array([[-0.06, 0], [0.06, 0], [lean, -1.6]]) * rng.uniform(10, 24) * SCALE
                _polygon(draw, where + blade, color)
        else:  # twig
            _polygon(
                draw,
                where
                + place(np.array([[-2, -0.05], [0, -0.1], [2, -0.03], [2, 0.03], [0, 0.1], [-2, 0.05]])),
                color,
            )
    return image


def _texture(rng: np.random.Generator, kind: str, period: float, angle: float) -> Image.Image:
    """A pattern over the whole canvas, 0 or 255; `period` in pixels, `angle` that of the pattern's axis."""
    y, x = np.mgrid[:CANVAS, :CANVAS].astype(np.float32) - rng.uniform(0, CANVAS, (2, 1, 1)).astype(
        np.float32
    )
    c, s = np.float32(np.cos(angle) / period), np.float32(np.sin(angle) / period)
    u, v = c * x + s * y, c * y - s * x  # in periods, along and across the axis
    if kind == "stripes":
        on = u % 1 < 0.5
    elif kind == "dots":
        row = np.floor(v)
        on = ((u + 0.5 * (row % 2)) % 1 - 0.5) ** 2 + (v - row - 0.5) ** 2 < 0.11
    elif kind == "checks":
        on = (np.floor(u) + np.floor(v)) % 2 < 1
    elif kind == "rings":
        on = np.hypot(u, v) % 1 < 0.5
    else:
        on = np.zeros_like(u, dtype=bool)
    return Image.fromarray(on.astype(np.uint8) * 255)


def _shade(coat: Image.Image, outline: np.ndarray) -> Image.Image:
    """Lighter above, darker below: a body rather than a paper cut-out."""
    top, bottom = outline[:, 1].min(), outline[:, 1].max()
    light = np.clip(1.12 - 0.42 * (np.arange(CANVAS) - top) / max(bottom - top, 1), 0.6, 1.12)
    shaded = np.asarray(coat, dtype=np.float32) * light[:, None, None].astype(np.float32)
    return Image.fromarray(np.minimum(shaded, 255).astype(np.uint8))


def _finish(rng: np.random.Generator, image: Image.Image, mask: Image.Image, part: Image.Image) -> Picture:
    """Down to SIZE, with a little noise and another exposure."""
    pixels = np.asarray(image.reduce(SCALE), dtype=np.float32)
    noise = rng.standard_normal((SIZE, SIZE, 3), dtype=np.float32)
    pixels = pixels * np.float32(rng.uniform(0.85, 1.1)) + noise * np.float32(rng.uniform(1, 6))
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    return Picture(image, *(np.asarray(m.reduce(SCALE)) > 127 for m in (mask, part)))


def _placement(rng: np.random.Generator, unit: float, tilt: float) -> Callable[[np.ndarray], np.ndarray]:
    """Scale by `unit`, mirror at random, turn by up to `tilt` degrees."""
    a, mirror = np.radians(rng.uniform(-tilt, tilt)), rng.choice([-1.0, 1.0])
    matrix = unit * np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]]) @ np.diag([mirror, 1.0])
    return lambda points: points @ matrix.T


def _ellipse(a: float, b: float) -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 28, endpoint=False)
    return np.stack([a * np.cos(t), b * np.sin(t)], 1)


def _angle(axis: np.ndarray) -> float:
    dx, dy = axis[1] - axis[0]
    return float(np.arctan2(dy, dx))


def _rgb(hue: float, saturation: float, value: float) -> Color:
    r, g, b = hsv_to_rgb(hue % 1, saturation, value)
    return int(255 * r), int(255 * g), int(255 * b)


def _polygon(draw: ImageDraw.ImageDraw, points: np.ndarray, color: Color | int) -> None:
    draw.polygon(points.ravel().tolist(), fill=color)


def _outline(draw: ImageDraw.ImageDraw, points: np.ndarray, color: Color) -> None:
    draw.line(np.concatenate([points, points[:1]]).ravel().tolist(), fill=color, width=SCALE)


def _polyline(draw: ImageDraw.ImageDraw, points: np.ndarray, color: Color) -> None:
    draw.line(points.ravel().tolist(), fill=color, width=SCALE)
