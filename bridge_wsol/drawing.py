"""Pictures of images, maps and boxes, with Pillow alone: what figures.py and evaluate.py draw."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from . import cam
from .boxes import iou_matrix, level_boxes, scale_boxes
from .data import Split, load_rgb
from .utils import atomic_write

TRUTH, PREDICTION = (40, 80, 255), (0, 220, 60)  # Fig. A4: ground truth blue, prediction green


# Key colours of a perceptually uniform map (dark blue, violet, red, orange, yellow): brightness grows with the value.
COLOURS = np.array([(13, 8, 135), (126, 3, 168), (204, 71, 120), (248, 149, 64), (240, 249, 33)], dtype=float)


# The same for [-1, 1]: blue below zero, yellow above (told apart with any colour vision), grey at zero; CIE lightness 13, 34, 54, 75, 94
# in equal steps, so that the sign survives a grey printer.
SIGNED_COLOURS = np.array(
    [(8, 32, 78), (36, 82, 140), (128, 128, 128), (222, 178, 82), (255, 238, 170)], dtype=float
)


DPI = 300


def colourise(score_map: np.ndarray) -> np.ndarray:
    """H x W in [0, 1] -> H x W x 3 uint8."""
    return _colours(score_map, COLOURS)


def colourise_signed(S: np.ndarray) -> np.ndarray:
    """H x W in [-1, 1] -> H x W x 3 uint8, grey at zero: the same scale whatever the map holds."""
    return _colours((S + 1) / 2, SIGNED_COLOURS)


def _colours(position: np.ndarray, colours: np.ndarray) -> np.ndarray:
    position, keys = np.clip(position, 0, 1) * (len(colours) - 1), np.arange(len(colours))
    return (
        np.stack([np.interp(position, keys, colours[:, c]) for c in range(3)], axis=-1)
        .round()
        .astype(np.uint8)
    )


def localization(
    image: Image.Image,
    score_map: np.ndarray,
    predicted: np.ndarray | None = None,
    truth: np.ndarray | None = None,
) -> Image.Image:
    """Fig. A4 for one image: boxes above, the map under it. Ground truth blue, prediction green and dashed, their best IoU printed.

    image: RGB of any size; score_map H x W in [0, 1]; boxes in the map's pixels: predicted 4, truth G x 4.
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
            draw.rectangle(
                [0, height, right + 6, height + bottom + 3], fill=(0, 0, 0)
            )  # on the map, where it hides no box
            draw.text((3, height), text, font=font, fill=(255, 255, 255))
    return picture


def _frame(
    draw: ImageDraw.ImageDraw,
    box: Sequence[int],
    colour: tuple[int, int, int],
    zoom: tuple[float, float] = (1, 1),
    dashed: bool = False,
) -> None:
    """The outline of a box of a map, on a picture `zoom` times as large: it encloses all pixels of the box, corners included."""
    x0, y0 = (int(box[i] * zoom[i]) for i in (0, 1))
    x1, y1 = (max(int((box[i + 2] + 1) * zoom[i]) - 1, start) for i, start in enumerate((x0, y0)))
    width = max(2, draw.im.size[0] // 64)
    if not dashed:
        draw.rectangle([x0, y0, x1, y1], outline=colour, width=width)
        return
    # Two thirds drawn, one third left out, from corner to corner: both ends of a side are drawn.
    for start, end, upright in ((x0, x1, False), (y0, y1, True)):
        dashes = max(1, (end - start) // (7 * width))
        bounds = np.linspace(start, end + 1, 3 * dashes + 3).round().astype(int).tolist()
        for a, b in zip(bounds[::3], bounds[2::3]):
            for near, far in (
                ((x0, min(x0 + width - 1, x1)), (max(x1 - width + 1, x0), x1))
                if upright
                else ((y0, min(y0 + width - 1, y1)), (max(y1 - width + 1, y0), y1))
            ):
                draw.rectangle(
                    [near, a, far, max(b - 1, a)] if upright else [a, near, max(b - 1, a), far], fill=colour
                )


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)  # the one that comes with Pillow


def _label(text: str, size: int, width: int) -> Image.Image:
    """Black on white, in a smaller font where it would be wider than `width`."""
    while size > 6 and _font(size).getlength(text) > width:
        size -= 1
    font = _font(size)
    picture = Image.new(
        "RGB", (max(1, min(width, int(font.getlength(text)) + 1)), sum(font.getmetrics())), "white"
    )
    ImageDraw.Draw(picture).text((0, 0), text, font=font, fill="black")
    return picture


def _paste_centred(picture: Image.Image, part: Image.Image, x: int, y: int) -> None:
    picture.paste(part, (x - part.width // 2, y - part.height // 2))


def grid(
    rows: list[list[Image.Image | None]],
    *,
    columns: Sequence[str] = (),
    groups: Sequence[tuple[str, int]] = (),
    names: Sequence[str] = (),
    group_rows: int = 1,
    foot: Any = None,
    foot_lines: int = 1,
) -> Image.Image:
    """Cells in rows, all as large as the largest. columns: their labels; groups: labels above those, each over so many columns;
    names: of the rows, upright at the left. After every `group_rows` rows a wider gap.
    foot(picture, font size, x, y, width) draws so many lines below."""
    cells = [cell for row in rows for cell in row if cell is not None]
    w, h, n = max(cell.width for cell in cells), max(cell.height for cell in cells), max(map(len, rows))
    gap = max(2, w // 40)
    size = max(11, n * w // 36)  # 6.5 points where the picture is a column wide, 13 over a page
    line = sum(_font(size).getmetrics())
    left = line + gap if names else 0
    top = (line if columns else 0) + (line if groups else 0) + (gap if columns or groups else 0)
    # A group of columns stands apart from the one before it.
    starts, xs, x = set(np.cumsum([span for _, span in groups]).tolist()), [], left
    for i in range(n):
        x += 3 * gap if i in starts else 0
        xs.append(x)
        x += w + gap
    width, ys, y = x - gap, [], top
    for i in range(len(rows)):
        y += 2 * gap if i and i % group_rows == 0 and group_rows > 1 else 0
        ys.append(y)
        y += h + gap
    picture = Image.new("RGB", (width, y - gap + (foot_lines * line + 2 * gap if foot else 0)), "white")
    first = 0
    for text, span in groups:
        a, b = xs[first], xs[first + span - 1] + w
        _paste_centred(picture, _label(text, size, b - a), (a + b) // 2, line // 2)
        first += span
    for text, x in zip(columns, xs):
        _paste_centred(picture, _label(text, size, w), x + w // 2, (line if groups else 0) + line // 2)
    for name, y in zip(names, ys):
        _paste_centred(picture, _label(name, size, h).rotate(90, expand=True), line // 2, y + h // 2)
    for row, y in zip(rows, ys):
        for cell, x in zip(row, xs):
            if cell is not None:
                picture.paste(cell, (x + (w - cell.width) // 2, y + (h - cell.height) // 2))
    if foot:
        foot(picture, size, left, ys[-1] + h + 2 * gap, width - left)
    return picture


def colour_bars(picture: Image.Image, size: int, x: int, y: int, width: int) -> None:
    """Below the maps: the scale of CAM and F, each map's own, and that of S, the same for all."""
    line, bar = sum(_font(size).getmetrics()), width * 9 // 20
    for x, colours, ticks, what in (
        (x, COLOURS, ("min", "", "max"), "CAM, F"),
        (x + width - bar, SIGNED_COLOURS, ("-1", "0", "1"), "S"),
    ):
        label = _label(what, size, bar // 2)
        picture.paste(label, (x, y))
        begin = x + label.width + size // 2
        length = x + bar - begin
        ramp = _colours(np.broadcast_to(np.linspace(0, 1, length), (line * 3 // 4, length)), colours)
        picture.paste(Image.fromarray(ramp), (begin, y + line // 8))
        for text, at in zip(ticks, (0, length // 2, length - 1)):
            tick = _label(text, size, length)
            picture.paste(
                tick, (min(max(begin + at - tick.width // 2, begin), begin + length - tick.width), y + line)
            )
    # The zero of S is drawn into its maps as a line: so it is here.
    ImageDraw.Draw(picture).line(
        [(begin + length // 2, y + line // 8), (begin + length // 2, y + line // 8 + line * 3 // 4 - 1)],
        fill="black",
    )


def box_legend(picture: Image.Image, size: int, x: int, y: int, width: int) -> None:
    draw = ImageDraw.Draw(picture)
    line = sum(_font(size).getmetrics())
    for text, colour, dashed in (("ground truth", TRUTH, False), ("prediction", PREDICTION, True)):
        sample = Image.new("RGB", (2 * line, line * 3 // 4), "white")
        _frame(ImageDraw.Draw(sample), (0, 0, sample.width - 1, sample.height - 1), colour, dashed=dashed)
        picture.paste(sample, (x, y + line // 8))
        draw.text((x + sample.width + size // 2, y), text, font=_font(size), fill="black")
        x += width // 2


def draw_signed(S: np.ndarray, size: int) -> Image.Image:
    """S h x w in [-1, 1], enlarged to size x size on its fixed scale; a black line where it changes its sign."""
    S = cam.resize(torch.as_tensor(S)[None], size)[0].clamp(-1, 1).numpy()
    colours, negative = colourise_signed(S), S < 0
    edge = np.zeros_like(negative)
    for ours, theirs in ((edge, negative), (edge.T, negative.T)):
        across = theirs[1:] != theirs[:-1]
        ours[1:] |= across
        ours[:-1] |= across
    colours[edge] = 0
    return Image.fromarray(colours)


def draw_map(values: np.ndarray, size: int, mode: str = "bicubic") -> Image.Image:
    """h x w, enlarged to size x size on a scale of its own: the least value dark, the greatest bright."""
    return Image.fromarray(
        colourise(cam.normalize(cam.resize(torch.as_tensor(values)[None], size, mode))[0].numpy())
    )


def save_picture(picture: Image.Image, out: Path) -> list[Path]:
    """out.png, and out.pdf for those who need one (the picture at 300 dpi); neither has a date in it."""
    paths = [with_suffix(out, ".png"), with_suffix(out, ".pdf")]
    with atomic_write(paths[0]) as part:
        picture.save(part, format="PNG", optimize=True)
    with atomic_write(paths[1]) as part:
        picture.save(
            part,
            format="PDF",
            resolution=DPI,
            quality=95,
            subsampling=0,
            creationDate=None,
            modDate=None,
            title="",
        )
    return paths


def with_suffix(out: Path, suffix: str) -> Path:
    return out.with_name(out.name + suffix)  # not Path.with_suffix: a value's decimals are no suffix


def in_proportion(
    image: Image.Image, score_map: np.ndarray, box: list[int] | None, side: int = 448
) -> tuple[Image.Image, np.ndarray, np.ndarray | None]:
    """Image, map and box of the image, all scaled so that the image's longer side is `side`, its proportions kept."""
    scale = side / max(image.size)
    width, height = (max(1, round(n * scale)) for n in image.size)
    resized_map = np.asarray(Image.fromarray(score_map).resize((width, height), Image.Resampling.BILINEAR))
    corners = (
        None
        if box is None
        else np.array(
            [
                box[0] * width // image.width,
                box[1] * height // image.height,
                box[2] * width // image.width,
                box[3] * height // image.height,
            ]
        )
    )
    return image.resize((width, height), Image.Resampling.BILINEAR), resized_map, corners


def draw_result(folder: Path, split: Split, index: int, result: dict[str, Any]) -> None:
    """Fig. A4 for one image: ground truth blue, largest contour at the split's threshold green."""
    score_map = result["kept"][index]
    size, predicted, truth = score_map.shape[0], None, None
    if index in split.boxes:
        predicted = level_boxes(score_map).largest[result["levels"]["largest"]]
        truth = scale_boxes(split.boxes[index], tuple(split.sizes[index]), size)
    image = load_rgb(split.path(index), size, upright=split.upright)
    with atomic_write(folder / f"{split.ids[index].replace('/', '_')}.png") as part:
        localization(image, score_map, predicted, truth).save(part, format="PNG")
