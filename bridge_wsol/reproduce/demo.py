"""The data set `demo`: drawn birds, in the list format of data.py, with exact boxes and masks.

The classes are fine-grained, as those of CUB. The pattern of the whole body (spotted or barred) shows the
*genus*. A small part, the colour of the head, shows the *species*; class = genus x species. Everything else
varies: the body's hue, size, proportions, pose and position, and the background. Some birds are partly
outside the image, but the head is always inside.

`pretrain` made the weights of the demo's small backbone, demo_vgg16.pth, in place of ImageNet's: from random
shapes whose class, texture x colour, shows on the whole object. They contain no birds and none of the demo's
classes. 25 minutes on one core:

    python -m bridge_wsol.reproduce.demo FOLDER OUT.pth      the shapes are drawn into FOLDER

Every image has its own random generator, derived from (seed, split, index): no image depends on another one.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable, Sequence
from colorsys import hsv_to_rgb
from contextlib import suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as nnf
from PIL import Image, ImageDraw
from torch import nn

from .. import utils
from ..data import TrainImages, read_split, to_input, train_loader, write_lists
from ..models import VGG16GAP
from ..utils import InputError

SIZE = 128  # pixels of an image; training crops 7/8 of it, as 224 of 256
SCALE = 2  # drawn at twice the size, then averaged: smooth edges
CANVAS = SIZE * SCALE

GENERA = ("dots", "stripes")  # texture of the body: spotted and barred birds
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

TEXTURES = ("plain", "stripes", "dots", "checks", "rings")
HUES = (0.0, 0.15, 0.33, 0.5, 0.63, 0.8)  # and grey, the last colour
PRETRAINING_COUNTS = {"train": 8000}

Color = tuple[int, int, int]


class Drawing(NamedTuple):
    """An image with the masks of its object; each SIZE x SIZE."""

    image: Image.Image  # RGB
    mask: np.ndarray  # bool: the object
    part: np.ndarray  # bool: the head, which shows the species; empty in the pretraining set


# -------------------------------------------------------------------------------------------------- the files

STAMP = "complete.txt"  # the last file of a data set; its text says what was drawn
VERSION = 1  # of the drawings: another one draws them again


def draw_demo(data_root: Path, lists: Path) -> None:
    """Draws the data set `demo` if it is not there: images and masks in data_root/demo, lists in lists/demo.

    data_root/demo/masks has the masks of the birds, data_root/demo/parts those of the heads. The pixels are
    the same on every machine with the same Pillow and NumPy. Raises InputError if nothing can be written.
    """
    _draw(data_root / "demo", lists / "demo", DEMO_COUNTS, draw_bird, len(GENERA) * len(HEADS), seed=0)


def _draw(root: Path, lists: Path, counts: dict[str, int], draw: Callable, classes: int, seed: int) -> None:
    stamp = f"{root.name} version {VERSION}, {counts}\n"
    if all(_text(folder / STAMP) == stamp for folder in (root, lists)):
        return
    orders = {  # image id -> (seed of its generator, label)
        f"{split}/{index:05d}.png": ((seed, number, index), index % classes)
        for number, (split, count) in enumerate(counts.items())
        for index in range(count)
    }
    if _text(root / STAMP) != stamp:
        _draw_images(root, [*counts], draw, orders, stamp)
    for split in counts:
        ids = [image for image in orders if image.startswith(f"{split}/")]
        files = {
            "image_ids": ids,
            "class_labels": [f"{image},{orders[image][1]}" for image in ids],
            "image_sizes": [f"{image},{SIZE},{SIZE}" for image in ids],
            "localization": [line for image in ids for line in _localization(root, image)],
        }
        write_lists(lists / split, files)
    utils.write_text(lists / STAMP, stamp)


def _draw_images(root: Path, splits: list[str], draw: Callable, orders: dict[str, tuple], stamp: str) -> None:
    print(f"drawing {len(orders)} images into {root}", flush=True)
    part = root.with_name(f".{root.name}.{secrets.token_hex(4)}.part")
    try:
        for split in splits:
            for kind in ("", "masks", "parts"):
                (part / kind / split).mkdir(parents=True)
        drawn = utils.imap(partial(_draw_one, part, draw), orders.items(), utils.cores())
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


def _draw_one(folder: Path, draw: Callable, order: tuple[str, tuple]) -> None:
    """Writes one image, its mask and, if it is not empty, the mask of its part."""
    image, (seed, label) = order
    drawing = draw(np.random.default_rng(seed), label)
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
    image = _background(rng)

    hue, saturation = rng.random(), rng.uniform(0.15, 0.55)
    light = _rgb(hue, saturation, rng.uniform(0.65, 0.95))
    dark = _rgb(hue + rng.uniform(-0.06, 0.06), saturation, rng.uniform(0.15, 0.38))
    colors = (dark, light) if rng.random() < 0.5 else (light, dark)  # of the ground and of the marks on it
    skin = _rgb(rng.uniform(0.05, 0.12), 0.4, rng.uniform(0.25, 0.6))

    legs, coat = (parts["leg0"], parts["leg1"]), (parts["tail"], parts["neck"], parts["body"])
    _fill(image, skin, *legs)
    dx, dy = parts["axis"][1] - parts["axis"][0]
    period, angle = unit * rng.uniform(0.22, 0.30), np.arctan2(dy, dx) + rng.uniform(-0.3, 0.3)
    _paint(image, _mask(*coat), parts["body"], _texture(rng, GENERA[genus], period, angle), colors)
    tail, body = (np.concatenate([parts[name], parts[name][:1]]) for name in ("tail", "body"))
    for outline in (tail, body, parts["wing"]):
        _line(image, outline, _darker(colors[1], 0.5))

    h, s, v = [*HEADS.values()][species]
    head = _rgb(h + rng.uniform(-0.015, 0.015), s * rng.uniform(0.9, 1), v * rng.uniform(0.92, 1))
    _fill(image, skin, parts["beak"])
    _fill(image, head, parts["head"])
    _fill(image, (250, 250, 250), parts["eye"])
    _fill(image, (10, 10, 10), parts["pupil"])
    return _finish(rng, image, _mask(*legs, *coat, parts["beak"], parts["head"]), _mask(parts["head"]))


def _bird_in_view(rng: np.random.Generator) -> tuple[dict[str, np.ndarray], float]:
    """(polygons in pixels of the canvas, pixels per body length); the whole head is inside the canvas."""
    while True:
        parts = _bird_outline(rng)
        unit = rng.uniform(84, 124) / 128 * CANVAS / 2
        to_canvas = _placement(rng, unit, tilt=25)
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
    body = _ellipse(0.5, height, _turn(40))
    body[:, 1] *= 1 + 0.25 * np.cos(_turn(40))

    lift, stretch, r = np.radians(rng.uniform(15, 70)), rng.uniform(0.20, 0.36), rng.uniform(0.165, 0.2)
    along, across = _axes(-lift)
    shoulder = np.array([0.34, -0.45 * height])
    centre = shoulder + stretch * along
    ends = [(shoulder, 0.2), (centre, 0.85 * r), (centre, -0.85 * r), (shoulder, -0.2)]
    neck = np.array([end + width * across for end, width in ends])
    head = centre + _ellipse(r, r * rng.uniform(0.88, 1))

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
    parts["eye"], parts["pupil"] = eye + _ellipse(0.05, 0.05), eye + _ellipse(0.028, 0.028)
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


# --------------------------------------------------------------------------------------- pretraining's shapes


def draw_shape(rng: np.random.Generator, label: int) -> Drawing:
    """One shape of class `label` = texture * 7 + colour: a blob, a star, a polygon or an ellipse."""
    texture, color = divmod(label, len(HUES) + 1)
    n, form, t = rng.integers(3, 9), rng.integers(4), _turn(48)
    if form == 0:  # blob
        waves = [rng.uniform(-0.3, 0.3) / k * np.cos(k * t + rng.uniform(0, 6.3)) for k in range(2, 6)]
        radius = 1 + sum(waves)
    elif form == 1:  # star
        t = _turn(2 * n)
        radius = np.where(np.arange(2 * n) % 2, rng.uniform(0.4, 0.7), 1)
    elif form == 2:  # polygon
        t = np.sort(_turn(n) + rng.uniform(-0.3, 0.3, n))
        radius = rng.uniform(0.75, 1, n)
    else:  # ellipse
        radius = 1
    shape = _ellipse(radius, radius, t) * [1, rng.uniform(0.35, 1)]
    unit = rng.uniform(30, 58) / 128 * CANVAS
    shape = _placement(rng, unit, tilt=180)(shape) + rng.uniform(0.3, 0.7, 2) * CANVAS

    image = _background(rng)
    saturation, value = rng.uniform(0.2, 1), rng.uniform(0.6, 1)
    if color == len(HUES):
        first, value = _rgb(0, 0.03, rng.uniform(0.05, 1)), rng.uniform(0.3, 0.9)
        second = _rgb(0, 0.03, (value + 0.5) % 1)
    else:
        hue = HUES[color] + rng.uniform(-0.02, 0.02)
        first = _rgb(hue, saturation, value)
        second = _rgb(hue, saturation * rng.uniform(0.3, 1), value * rng.uniform(0.2, 0.5))
        if rng.random() < 0.3:
            second = _rgb(hue, 0.1, 1)
    pattern = _texture(rng, TEXTURES[texture], period=rng.uniform(9, 20) * SCALE, angle=rng.uniform(0, np.pi))
    _paint(image, _mask(shape), shape, pattern, (first, second))
    return _finish(rng, image, _mask(shape), _mask())


# ----------------------------------------------------------------------------------------------- shared parts


def _background(rng: np.random.Generator) -> Image.Image:
    """Soft colours, then leaves, stones, blades and twigs. Only the objects have saturated colours."""
    tint = rng.choice([0.08, 0.12, 0.25, 0.32, 0.55, 0.6]) + rng.uniform(-0.04, 0.04)
    ground = [
        _rgb(tint + rng.uniform(-0.05, 0.05), rng.uniform(0.05, 0.4), rng.uniform(0.3, 0.85))
        for _ in range(25)
    ]
    image = Image.fromarray(np.array(ground, dtype=np.uint8).reshape(5, 5, 3))
    image = image.resize((CANVAS, CANVAS), Image.Resampling.BICUBIC)
    for _ in range(rng.integers(8, 26)):
        where = rng.uniform(-0.05, 1.05, 2) * CANVAS
        color = _rgb(tint + rng.uniform(-0.12, 0.12), rng.uniform(0.05, 0.45), rng.uniform(0.2, 0.85))
        place = _placement(rng, rng.uniform(8, 26) * SCALE, tilt=180)
        kind = rng.integers(4)
        if kind == 0:  # leaf
            s = np.linspace(-1, 1, 12)
            edge = np.stack([s, 0.4 * (1 - s**2)], 1)
            blade = np.concatenate([edge, edge[::-1] * [1, -1]])
            _fill(image, color, where + place(blade))
            _line(image, where + place(np.array([[-1.2, 0], [0.9, 0]])), _darker(color, 0.7))
        elif kind == 1:  # stone
            stone = place(_ellipse(0.8, rng.uniform(0.4, 0.7)))
            _fill(image, _darker(color, 0.7), where + stone)
            _fill(image, color, where + stone * 0.8 - SCALE)
        elif kind == 2:  # blades of grass
            for lean in rng.uniform(-0.6, 0.6, 3):
                blade = np.array([[-0.06, 0], [0.06, 0], [lean, -1.6]]) * rng.uniform(10, 24) * SCALE
                _fill(image, color, where + blade)
        else:  # twig
            twig = np.array([[-2, -0.05], [0, -0.1], [2, -0.03], [2, 0.03], [0, 0.1], [-2, 0.05]])
            _fill(image, color, where + place(twig))
    return image


def _texture(rng: np.random.Generator, kind: str, period: float, angle: float) -> np.ndarray:
    """A pattern over the whole canvas, bool. period: in pixels; angle: of its axis, in radians."""
    origin = rng.uniform(0, CANVAS, (2, 1, 1)).astype(np.float32)
    y, x = np.mgrid[:CANVAS, :CANVAS].astype(np.float32) - origin
    c, s = np.float32(np.cos(angle) / period), np.float32(np.sin(angle) / period)
    u, v = c * x + s * y, c * y - s * x  # in periods, along and across the axis
    if kind == "stripes":
        return u % 1 < 0.5
    if kind == "dots":
        row = np.floor(v)
        return ((u + 0.5 * (row % 2)) % 1 - 0.5) ** 2 + (v - row - 0.5) ** 2 < 0.11
    if kind == "checks":
        return (np.floor(u) + np.floor(v)) % 2 < 1
    if kind == "rings":
        return np.hypot(u, v) % 1 < 0.5
    return np.zeros(u.shape, dtype=bool)  # plain


def _paint(
    image: Image.Image, mask: Image.Image, outline: np.ndarray, pattern: np.ndarray, colors: Sequence[Color]
) -> None:
    """Paints a pattern of two colours into the mask: lighter above, darker below, so that it looks round."""
    top, bottom = outline[:, 1].min(), outline[:, 1].max()
    light = np.clip(1.12 - 0.42 * (np.arange(CANVAS) - top) / max(bottom - top, 1), 0.6, 1.12)
    coat = np.where(pattern[..., None], colors[1], colors[0]).astype(np.float32)
    coat = np.minimum(coat * light[:, None, None].astype(np.float32), 255)
    image.paste(Image.fromarray(coat.astype(np.uint8)), mask=mask)


def _finish(rng: np.random.Generator, image: Image.Image, mask: Image.Image, part: Image.Image) -> Drawing:
    """Reduces the canvas to SIZE; adds noise and changes the exposure."""
    pixels = np.asarray(image.reduce(SCALE), dtype=np.float32)
    noise = rng.standard_normal((SIZE, SIZE, 3), dtype=np.float32)
    pixels = pixels * np.float32(rng.uniform(0.85, 1.1)) + noise * np.float32(rng.uniform(1, 6))
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    return Drawing(image, *(np.asarray(m.reduce(SCALE)) > 127 for m in (mask, part)))


def _placement(rng: np.random.Generator, unit: float, tilt: float) -> Callable[[np.ndarray], np.ndarray]:
    """A random map of points (n x 2): scales by `unit`, may mirror, rotates by up to `tilt` degrees."""
    a, mirror = np.radians(rng.uniform(-tilt, tilt)), rng.choice([-1.0, 1.0])
    matrix = unit * np.array([[mirror * np.cos(a), -np.sin(a)], [mirror * np.sin(a), np.cos(a)]])
    return lambda points: points @ matrix.T


def _turn(n: int) -> np.ndarray:
    """The angles of n points around a centre."""
    return np.linspace(0, 2 * np.pi, n, endpoint=False)


def _ellipse(a: Any, b: Any, t: np.ndarray | None = None) -> np.ndarray:
    """n x 2 points at the angles t (default: 28). a, b: half axes, of the ellipse or of each point."""
    t = _turn(28) if t is None else t
    return np.stack([a * np.cos(t), b * np.sin(t)], 1)


def _axes(angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors: to the right, turned by an angle (radians), and upwards from it."""
    return np.array([np.cos(angle), np.sin(angle)]), np.array([np.sin(angle), -np.cos(angle)])


def _rgb(hue: float, saturation: float, value: float) -> Color:
    r, g, b = hsv_to_rgb(hue % 1, saturation, value)
    return int(255 * r), int(255 * g), int(255 * b)


def _darker(color: Color, factor: float) -> Color:
    return tuple(int(c * factor) for c in color)


def _fill(image: Image.Image, color: Color | int, *polygons: np.ndarray) -> None:
    for points in polygons:
        ImageDraw.Draw(image).polygon(points.ravel().tolist(), fill=color)


def _mask(*polygons: np.ndarray) -> Image.Image:
    mask = Image.new("L", (CANVAS, CANVAS))
    _fill(mask, 255, *polygons)
    return mask


def _line(image: Image.Image, points: np.ndarray, color: Color) -> None:
    ImageDraw.Draw(image).line(points.ravel().tolist(), fill=color, width=SCALE)


# ------------------------------------------------------------------------------------ the pretrained weights


def pretrain(folder: Path, out: Path, epochs: int = 12) -> None:
    """Draws 8,000 shapes, trains VGG16-GAP at a quarter of its width with batch norm, writes its features.

    Batch norm helps a training from scratch. It is folded into the convolutions, in half precision.
    """
    classes = len(TEXTURES) * (len(HUES) + 1)
    _draw(folder / "shapes", folder / "lists", PRETRAINING_COUNTS, draw_shape, classes, seed=1)
    split = read_split(folder / "lists" / "train", folder / "shapes", "shapes")
    device = utils.resolve_device("auto")
    utils.seed_everything(0)
    net = VGG16GAP(classes, stride=8, width=0.25)
    net.features, net.conv6 = _with_batch_norm(net.features), _with_batch_norm(net.conv6)
    net.to(device, memory_format=torch.channels_last)
    sgd = dict(lr=3e-2, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True)
    optimizer = torch.optim.SGD(net.parameters(), **sgd)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [8, 10], gamma=0.2)
    loader = train_loader(TrainImages(split, 128, 112, seed=0), 32, workers=0)
    for epoch in range(1, epochs + 1):
        loader.batch_sampler.set_epoch(epoch)
        for images, labels in utils.progress(loader, f"epoch {epoch}/{epochs}", len(loader), "steps"):
            with utils.autocast(device, "bf16"):
                logits = net.classify(net.conv6(net.features(to_input(images, device))))
            optimizer.zero_grad()
            loss = nnf.cross_entropy(logits.float(), labels.to(device))
            loss.backward()
            optimizer.step()
        schedule.step()
        print(f"epoch {epoch}/{epochs}: loss of the last batch {loss.item():.4f}", flush=True)
    state = {f"features.{name}": x.half().contiguous() for name, x in _folded(net.features).items()}
    utils.save_checkpoint(out, state)


def _with_batch_norm(layers: nn.Sequential) -> nn.Sequential:
    pairs = ([x, nn.BatchNorm2d(x.out_channels)] if isinstance(x, nn.Conv2d) else [x] for x in layers)
    return nn.Sequential(*(layer for pair in pairs for layer in pair))


@torch.no_grad()
def _folded(layers: nn.Sequential) -> dict[str, torch.Tensor]:
    """Folds batch norm into the convolutions, and returns their state: the same function in eval mode.

    BN(w * x + b) = (w k) * x + (b - mean) k + beta with k = gamma / sqrt(var + eps).
    """
    for conv, norm in pairwise(layers):
        if isinstance(norm, nn.BatchNorm2d):
            k = norm.weight / torch.sqrt(norm.running_var + norm.eps)
            conv.weight *= k[:, None, None, None]
            conv.bias.copy_((conv.bias - norm.running_mean) * k + norm.bias)
    return nn.Sequential(*(layer for layer in layers if not isinstance(layer, nn.BatchNorm2d))).state_dict()


if __name__ == "__main__":
    with utils.one_line_errors():
        parser = utils.Parser(prog="python -m bridge_wsol.reproduce.demo", description=pretrain.__doc__)
        parser.add_argument("folder", type=Path, help="where the shapes are drawn")
        parser.add_argument("out", type=Path, help="weights file to write")
        pretrain(**vars(parser.parse_args()))
