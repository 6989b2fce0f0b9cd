"""Draws images, maps and boxes with Pillow alone, for figures.py and evaluate.py.

A picture is a Pillow image in RGB. Pixels count from the top left corner.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from . import cam
from .boxes import iou_matrix, level_boxes, scale_boxes
from .data import Split, load_rgb
from .utils import atomic_write

DPI = 300
TRUTH, PREDICTION = (40, 80, 255), (0, 220, 60)  # Fig. A4: ground truth blue, prediction green

# A perceptually uniform scale (dark blue, violet, red, orange, yellow): brightness grows with the value.
COLOURS = np.array([(13, 8, 135), (126, 3, 168), (204, 71, 120), (248, 149, 64), (240, 249, 33)], dtype=float)

# The scale of [-1, 1]: blue below zero, grey at zero, yellow above. Colour-blind people can tell them apart.
# CIE lightness is 13, 34, 54, 75, 94 (equal steps), so a grey print shows the sign too.
SIGNED_COLOURS = np.array(
    [(8, 32, 78), (36, 82, 140), (128, 128, 128), (222, 178, 82), (255, 238, 170)], dtype=float
)


def colourise(score_map: np.ndarray) -> np.ndarray:
    """H x W in [0, 1] -> H x W x 3 uint8. Values outside the range are clipped."""
    return _colours(score_map, COLOURS)


def colourise_signed(S: np.ndarray) -> np.ndarray:
    """H x W in [-1, 1] -> H x W x 3 uint8, grey at zero. The scale is the same for every map."""
    return _colours((S + 1) / 2, SIGNED_COLOURS)


def _colours(position: np.ndarray, colours: np.ndarray) -> np.ndarray:
    position, keys = np.clip(position, 0, 1) * (len(colours) - 1), np.arange(len(colours))
    channels = [np.interp(position, keys, colours[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def draw_map(values: np.ndarray, size: int, mode: str = "bicubic") -> Image.Image:
    """h x w, unbounded -> size x size pixels. Each map has its own scale: minimum dark, maximum bright."""
    resized = cam.resize(torch.as_tensor(values)[None], size, mode)
    return Image.fromarray(colourise(cam.normalize(resized)[0].numpy()))


def draw_signed(S: np.ndarray, size: int) -> Image.Image:
    """h x w in [-1, 1] -> size x size pixels on the signed scale; a black line where S changes its sign."""
    S = cam.resize(torch.as_tensor(S)[None], size)[0].clamp(-1, 1).numpy()
    colours, negative = colourise_signed(S), S < 0
    edge = np.zeros_like(negative)
    for line, below_zero in ((edge, negative), (edge.T, negative.T)):
        across = below_zero[1:] != below_zero[:-1]
        line[1:] |= across
        line[:-1] |= across
    colours[edge] = 0
    return Image.fromarray(colours)


def localization(
    image: Image.Image,
    score_map: np.ndarray,
    predicted: np.ndarray | None = None,
    truth: np.ndarray | None = None,
) -> Image.Image:
    """One image of Fig. A4: the image with its boxes above, the image under its score map below.

    The ground truth is blue. The prediction is green and dashed, and its best IoU is printed.

    image: RGB of any size. score_map: H x W in [0, 1].
    predicted (4) and truth (G x 4): boxes x0, y0, x1, y1 in pixels of the map, inclusive; None: not drawn.
    """
    width, height = image.size
    zoom = width / score_map.shape[1], height / score_map.shape[0]
    large = Image.fromarray(colourise(score_map)).resize(image.size, Image.Resampling.BILINEAR)
    blend = np.asarray(image, dtype=float) * 0.4 + np.asarray(large) * 0.6
    picture = Image.new("RGB", (width, 2 * height))
    picture.paste(image.convert("RGB"), (0, 0))
    picture.paste(Image.fromarray(blend.round().astype(np.uint8)), (0, height))
    draw = ImageDraw.Draw(picture)
    for box in [] if truth is None else truth:
        _frame(draw, box, TRUTH, zoom)
    if predicted is not None:
        _frame(draw, predicted, PREDICTION, zoom, dashed=True)
        if truth is not None:
            text, font = f"IoU {iou_matrix(predicted, truth).max():.2f}", _font(max(10, width // 9))
            _, _, right, bottom = font.getbbox(text)
            # On the lower image: on the upper one the text could hide a box.
            draw.rectangle([0, height, right + 6, height + bottom + 3], fill=(0, 0, 0))
            draw.text((3, height), text, font=font, fill=(255, 255, 255))
    return picture


def _frame(
    draw: ImageDraw.ImageDraw,
    box: Sequence[int],
    colour: tuple[int, int, int],
    zoom: tuple[float, float] = (1, 1),
    dashed: bool = False,
) -> None:
    """Draws the outline of a box of a map on a picture `zoom` times as large. The outline holds the box."""
    x0, y0 = (int(box[i] * zoom[i]) for i in (0, 1))
    x1, y1 = (max(int((box[i + 2] + 1) * zoom[i]) - 1, start) for i, start in enumerate((x0, y0)))
    width = max(2, draw.im.size[0] // 64)
    if not dashed:
        draw.rectangle([x0, y0, x1, y1], outline=colour, width=width)
        return
    for a, b in _dashes(x0, x1, width):
        for near, far in ((y0, min(y0 + width - 1, y1)), (max(y1 - width + 1, y0), y1)):
            draw.rectangle([a, near, b, far], fill=colour)
    for a, b in _dashes(y0, y1, width):
        for near, far in ((x0, min(x0 + width - 1, x1)), (max(x1 - width + 1, x0), x1)):
            draw.rectangle([near, a, far, b], fill=colour)


def _dashes(start: int, end: int, width: int) -> list[tuple[int, int]]:
    """First and last pixel of each dash. Two thirds of the side are drawn, both of its ends among them."""
    dashes = max(1, (end - start) // (7 * width))
    bounds = np.linspace(start, end + 1, 3 * dashes + 3).round().astype(int).tolist()
    return [(a, max(b - 1, a)) for a, b in zip(bounds[::3], bounds[2::3])]


def in_proportion(
    image: Image.Image, score_map: np.ndarray, box: list[int] | None, side: int = 448
) -> tuple[Image.Image, np.ndarray, np.ndarray | None]:
    """(image, map, box), scaled so that the longer side of the image is `side` pixels; proportions are kept.

    score_map: H x W float32 of any size. box: x0, y0, x1, y1 in pixels of the image; None: no box.
    """
    scale = side / max(image.size)
    width, height = (max(1, round(length * scale)) for length in image.size)
    resized_map = np.asarray(Image.fromarray(score_map).resize((width, height), Image.Resampling.BILINEAR))
    corners = None
    if box is not None:
        corners = np.array([box[i] * (width, height)[i % 2] // image.size[i % 2] for i in range(4)])
    return image.resize((width, height), Image.Resampling.BILINEAR), resized_map, corners


def draw_result(folder: Path, split: Split, index: int, result: dict[str, Any]) -> None:
    """Writes one image of Fig. A4 to FOLDER/ID.png. The prediction is the largest contour's box.

    result: of `evaluate_maps`, whose "kept" holds the score map of this index of the split.
    """
    score_map, predicted, truth = result["kept"][index], None, None
    size = len(score_map)
    if index in split.boxes:
        predicted = level_boxes(score_map).largest[result["levels"]["largest"]]
        truth = scale_boxes(split.boxes[index], tuple(split.sizes[index]), size)
    image = load_rgb(split.path(index), size, upright=split.upright)
    with atomic_write(folder / f"{split.ids[index].replace('/', '_').removesuffix('.png')}.png") as part:
        localization(image, score_map, predicted, truth).save(part, format="PNG")


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)  # Pillow brings it along: the same letters on every machine


def _line(size: int) -> int:
    """Height of a line of text in pixels."""
    return sum(_font(size).getmetrics())


def _label(text: str, size: int, width: int) -> Image.Image:
    """Black on white, in a smaller font where it would be wider than `width` pixels."""
    while size > 6 and _font(size).getlength(text) > width:
        size -= 1
    font = _font(size)
    picture = Image.new("RGB", (max(1, min(width, int(font.getlength(text)) + 1)), _line(size)), "white")
    ImageDraw.Draw(picture).text((0, 0), text, font=font, fill="black")
    return picture


def _paste_centred(picture: Image.Image, part: Image.Image, x: int, y: int) -> None:
    picture.paste(part, (x - part.width // 2, y - part.height // 2))


def _starts(first: int, length: int, count: int, gap: int, extra: int, after: Collection[int]) -> list[int]:
    """First pixel of `count` cells; `extra` pixels more before each cell whose number is in `after`."""
    extras = np.cumsum([extra if i in after else 0 for i in range(count)])
    return [first + i * (length + gap) + int(more) for i, more in enumerate(extras)]


def grid(
    rows: list[list[Image.Image | None]],
    *,
    columns: Sequence[str] = (),
    groups: Sequence[tuple[str, int]] = (),
    names: Sequence[str] = (),
    group_rows: int = 1,
    foot: Callable[[Image.Image, int, int, int, int], None] | None = None,
    foot_lines: int = 1,
) -> Image.Image:
    """Cells in rows and columns, each as large as the largest cell; None leaves a place empty.

    columns: a label per column. groups: (label, number of columns) above those labels.
    names: a label per row, upright at the left. A wider gap follows every `group_rows` rows.
    foot(picture, font size, x, y, width in pixels) draws `foot_lines` lines of text below the cells.
    """
    cells = [cell for row in rows for cell in row if cell is not None]
    width, height = max(cell.width for cell in cells), max(cell.height for cell in cells)
    count = max(map(len, rows))
    gap = max(2, width // 40)
    size = max(11, count * width // 36)  # of the font: 6.5 points where the picture is a column wide
    line = _line(size)
    left = line + gap if names else 0
    top = line * (bool(columns) + bool(groups)) + (gap if columns or groups else 0)
    ends = np.cumsum([span for _, span in groups]).tolist()
    xs = _starts(left, width, count, gap, 3 * gap, ends)
    blocks = range(group_rows, len(rows), group_rows) if group_rows > 1 else ()
    ys = _starts(top, height, len(rows), gap, 2 * gap, blocks)
    right, bottom = xs[-1] + width, ys[-1] + height
    foot_height = foot_lines * line + 2 * gap if foot else 0

    picture = Image.new("RGB", (right, bottom + foot_height), "white")
    for (text, span), end in zip(groups, ends):
        start, stop = xs[end - span], xs[end - 1] + width
        _paste_centred(picture, _label(text, size, stop - start), (start + stop) // 2, line // 2)
    for text, x in zip(columns, xs):
        y = (line if groups else 0) + line // 2
        _paste_centred(picture, _label(text, size, width), x + width // 2, y)
    for name, y in zip(names, ys):
        _paste_centred(
            picture, _label(name, size, height).rotate(90, expand=True), line // 2, y + height // 2
        )
    for row, y in zip(rows, ys):
        for cell, x in zip(row, xs):
            if cell is not None:
                picture.paste(cell, (x + (width - cell.width) // 2, y + (height - cell.height) // 2))
    if foot:
        foot(picture, size, left, bottom + 2 * gap, right - left)
    return picture


def colour_bars(picture: Image.Image, size: int, x: int, y: int, width: int) -> None:
    """The foot of Fig. A3: the scale of CAM and F at the left, the scale of S at the right; two lines."""
    bar = width * 9 // 20
    _colour_bar(picture, size, x, y, bar, "CAM, F", COLOURS, ("min", "", "max"))
    begin, length = _colour_bar(picture, size, x + width - bar, y, bar, "S", SIGNED_COLOURS, ("-1", "0", "1"))
    # A black line marks S = 0, as in the maps.
    middle, top, line = begin + length // 2, y + _line(size) // 8, _line(size)
    ImageDraw.Draw(picture).line([(middle, top), (middle, top + line * 3 // 4 - 1)], fill="black")


def _colour_bar(
    picture: Image.Image,
    size: int,
    x: int,
    y: int,
    width: int,
    name: str,
    colours: np.ndarray,
    ticks: Sequence[str],
) -> tuple[int, int]:
    """Name and bar; below, the ticks at the start, middle and end. Returns (x, length) of the bar."""
    line, label = _line(size), _label(name, size, width // 2)
    picture.paste(label, (x, y))
    begin = x + label.width + size // 2
    length = x + width - begin
    ramp = _colours(np.broadcast_to(np.linspace(0, 1, length), (line * 3 // 4, length)), colours)
    picture.paste(Image.fromarray(ramp), (begin, y + line // 8))
    for text, at in zip(ticks, (0, length // 2, length - 1)):
        tick = _label(text, size, length)
        first = min(max(begin + at - tick.width // 2, begin), begin + length - tick.width)
        picture.paste(tick, (first, y + line))
    return begin, length


def box_legend(picture: Image.Image, size: int, x: int, y: int, width: int) -> None:
    """The foot of Fig. A4: the frames of ground truth and prediction; one line."""
    line = _line(size)
    for text, colour, dashed in (("ground truth", TRUTH, False), ("prediction", PREDICTION, True)):
        sample = Image.new("RGB", (2 * line, line * 3 // 4), "white")
        _frame(ImageDraw.Draw(sample), (0, 0, sample.width - 1, sample.height - 1), colour, dashed=dashed)
        picture.paste(sample, (x, y + line // 8))
        label = _label(text, size, width // 2 - sample.width - size)
        picture.paste(label, (x + sample.width + size // 2, y))
        x += width // 2


def with_suffix(out: Path, suffix: str) -> Path:
    """The path with the suffix appended."""
    return out.with_name(out.name + suffix)  # Path.with_suffix would cut the decimals of lambda_0.5


def save_picture(picture: Image.Image, out: Path) -> None:
    """Writes out.png, and out.pdf at 300 dpi. The files hold no dates: equal pictures give equal bytes."""
    with atomic_write(with_suffix(out, ".png")) as part:
        picture.save(part, format="PNG", optimize=True)
    undated = {"creationDate": None, "modDate": None, "title": ""}
    with atomic_write(with_suffix(out, ".pdf")) as part:
        picture.save(part, format="PDF", resolution=DPI, quality=95, subsampling=0, **undated)
