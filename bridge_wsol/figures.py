"""Figures of the appendix from finished runs: pictures of images by Pillow alone, curves by matplotlib (the extra `figures`).

    python -m bridge_wsol.figures curves RUN [RUN ...]                   Fig. A1: accuracy against the threshold, and how flat it is
    python -m bridge_wsol.figures histogram RUN [RUN ...]                Fig. A2: density of the largest feature norm
    python -m bridge_wsol.figures maps RUN [RUN ...] --random 4          Fig. A3: image, CAM, F, S
    python -m bridge_wsol.figures boxes RUN [RUN ...] --worst 4          Fig. A4: boxes and CAM
    python -m bridge_wsol.figures sweep --param lambda_sim --values ...  Fig. A5: trains, then GT-known Loc against the value
    python -m bridge_wsol.figures table RUN [RUN ...]                    Table A1's form and the paper's main form
    python -m bridge_wsol.figures gap RUN [RUN ...]                      the gap itself: F and S inside and outside the object

RUN is a folder that train.py wrote; for curves and table also a results file of evaluate.py (another method's score maps). Files go to
figures/<command>.* or where --out says: PNG and PDF of a figure, and its numbers as JSON or tables. The same runs give the same bytes.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Iterable, Iterator, NamedTuple, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from . import cam
from .boxes import LEVELS, iou_matrix, level_boxes, scale_boxes
from .data import Masks, Split, load_masks, load_rgb, load_splits, test_loader, to_input
from .losses import feature_norm, minmax
from .metrics import DELTAS
from .models import Output
from .utils import (
    InputError, Parser, autocast, default_workers, one_line_errors, replacing, resolve_device, write_json, write_text,
)

TRUTH, PREDICTION = (40, 80, 255), (0, 220, 60)  # Fig. A4: ground truth blue, prediction green

# Key colours of a perceptually uniform map (dark blue, violet, red, orange, yellow): brightness grows with the value.
COLOURS = np.array([(13, 8, 135), (126, 3, 168), (204, 71, 120), (248, 149, 64), (240, 249, 33)], dtype=float)
# The same for [-1, 1]: blue below zero, yellow above (told apart with any colour vision), grey at zero; CIE lightness 13, 34, 54, 75, 94
# in equal steps, so that the sign survives a grey printer.
SIGNED_COLOURS = np.array([(8, 32, 78), (36, 82, 140), (128, 128, 128), (222, 178, 82), (255, 238, 170)], dtype=float)
# Okabe and Ito's colours, each run's with a line and a marker of its own.
RUN_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
COLUMN, PAGE = 3.3, 6.9  # inches: widths of a column and of the text of a two-column page
DPI = 300


# ------------------------------------------------------------------------------------------------- pictures, by Pillow alone


def colourise(score_map: np.ndarray) -> np.ndarray:
    """H x W in [0, 1] -> H x W x 3 uint8."""
    return _colours(score_map, COLOURS)


def colourise_signed(S: np.ndarray) -> np.ndarray:
    """H x W in [-1, 1] -> H x W x 3 uint8, grey at zero: the same scale whatever the map holds."""
    return _colours((S + 1) / 2, SIGNED_COLOURS)


def _colours(position: np.ndarray, colours: np.ndarray) -> np.ndarray:
    position, keys = np.clip(position, 0, 1) * (len(colours) - 1), np.arange(len(colours))
    return np.stack([np.interp(position, keys, colours[:, c]) for c in range(3)], axis=-1).round().astype(np.uint8)


def localization(
    image: Image.Image, score_map: np.ndarray, predicted: np.ndarray | None = None, truth: np.ndarray | None = None
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
            draw.rectangle([0, height, right + 6, height + bottom + 3], fill=(0, 0, 0))  # on the map, where it hides no box
            draw.text((3, height), text, font=font, fill=(255, 255, 255))
    return picture


def _frame(
    draw: ImageDraw.ImageDraw, box: Sequence[int], colour: tuple[int, int, int], zoom: tuple[float, float] = (1, 1), dashed: bool = False
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
            for near, far in (((x0, min(x0 + width - 1, x1)), (max(x1 - width + 1, x0), x1)) if upright else
                              ((y0, min(y0 + width - 1, y1)), (max(y1 - width + 1, y0), y1))):
                draw.rectangle([near, a, far, max(b - 1, a)] if upright else [a, near, max(b - 1, a), far], fill=colour)


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)  # the one that comes with Pillow


def _label(text: str, size: int, width: int) -> Image.Image:
    """Black on white, in a smaller font where it would be wider than `width`."""
    while size > 6 and _font(size).getlength(text) > width:
        size -= 1
    font = _font(size)
    picture = Image.new("RGB", (max(1, min(width, int(font.getlength(text)) + 1)), sum(font.getmetrics())), "white")
    ImageDraw.Draw(picture).text((0, 0), text, font=font, fill="black")
    return picture


def _paste_centred(picture: Image.Image, part: Image.Image, x: int, y: int) -> None:
    picture.paste(part, (x - part.width // 2, y - part.height // 2))


def _grid(
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


def _colour_bars(picture: Image.Image, size: int, x: int, y: int, width: int) -> None:
    """Below the maps: the scale of CAM and F, each map's own, and that of S, the same for all."""
    line, bar = sum(_font(size).getmetrics()), width * 9 // 20
    for x, colours, ticks, what in ((x, COLOURS, ("min", "", "max"), "CAM, F"), (x + width - bar, SIGNED_COLOURS, ("-1", "0", "1"), "S")):
        label = _label(what, size, bar // 2)
        picture.paste(label, (x, y))
        begin = x + label.width + size // 2
        length = x + bar - begin
        ramp = _colours(np.broadcast_to(np.linspace(0, 1, length), (line * 3 // 4, length)), colours)
        picture.paste(Image.fromarray(ramp), (begin, y + line // 8))
        for text, at in zip(ticks, (0, length // 2, length - 1)):
            tick = _label(text, size, length)
            picture.paste(tick, (min(max(begin + at - tick.width // 2, begin), begin + length - tick.width), y + line))
    # The zero of S is drawn into its maps as a line: so it is here.
    ImageDraw.Draw(picture).line([(begin + length // 2, y + line // 8), (begin + length // 2, y + line // 8 + line * 3 // 4 - 1)], fill="black")


def _box_legend(picture: Image.Image, size: int, x: int, y: int, width: int) -> None:
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
    return Image.fromarray(colourise(cam.normalize(cam.resize(torch.as_tensor(values)[None], size, mode))[0].numpy()))


def save_picture(picture: Image.Image, out: Path) -> list[Path]:
    """out.png, and out.pdf for those who need one (the picture at 300 dpi); neither has a date in it."""
    paths = [_with_suffix(out, ".png"), _with_suffix(out, ".pdf")]
    with replacing(paths[0]) as part:
        picture.save(part, format="PNG", optimize=True)
    with replacing(paths[1]) as part:
        picture.save(part, format="PDF", resolution=DPI, quality=95, subsampling=0, creationDate=None, modDate=None, title="")
    return paths


# ----------------------------------------------------------------------------------------------------- curves, by matplotlib


def require_matplotlib() -> ModuleType:
    try:
        import matplotlib
        import matplotlib.figure
    except ImportError as error:
        raise InputError(f"this figure needs matplotlib ({error}): pip install -e '.[figures]'") from error
    return matplotlib


@contextmanager
def figure(args: argparse.Namespace, height: float, written: list[Path]) -> Iterator[Any]:
    """A matplotlib figure, --width and `height` in inches; --out.pdf and .png when the block ends. No user's settings, no date: same bytes."""
    matplotlib = require_matplotlib()
    style = {
        "font.size": 8, "axes.labelsize": 8, "axes.titlesize": 8, "legend.fontsize": 7, "xtick.labelsize": 7, "ytick.labelsize": 7,
        "lines.linewidth": 1.2, "lines.markersize": 5, "axes.linewidth": 0.6, "axes.grid": True, "grid.linewidth": 0.4, "grid.alpha": 0.5,
        "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "pdf.fonttype": 42,
    }
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(style)
        drawn = matplotlib.figure.Figure(figsize=(args.width, height), layout="constrained")
        yield drawn
        for suffix, metadata, options in (
            (".png", {"Software": None}, {"pil_kwargs": {"optimize": True}}),
            (".pdf", {"CreationDate": None, "Creator": None, "Producer": None}, {}),
        ):
            with replacing(_with_suffix(args.out, suffix)) as part:
                drawn.savefig(part, format=suffix[1:], dpi=args.dpi, metadata=metadata, **options)
            written.append(_with_suffix(args.out, suffix))


def look(i: int) -> dict[str, Any]:
    """Colour, line and marker of the i-th run."""
    return {"color": RUN_COLOURS[i % len(RUN_COLOURS)], "linestyle": LINES[i % len(LINES)], "marker": MARKERS[i % len(MARKERS)]}


def shortened(name: str, width: float) -> str:
    """A name that fits a legend's line of so many inches, without its middle where it is too long."""
    fits = max(9, int((width - 0.6) / 0.06))
    return name if len(name) <= fits else f"{name[: fits // 2]}…{name[-(fits - fits // 2 - 1) :]}"


# ------------------------------------------------------------------------------------------------------------------ runs


def script(name: str) -> ModuleType:
    """evaluate.py or train.py: scripts beside the package, not modules of it. Raises InputError where there is only the package."""
    root = Path(__file__).resolve().parents[1]
    if not (root / f"{name}.py").is_file():
        raise InputError(f"{root / name}.py: no such file: figures need a clone of the repository, installed by pip install -e .")
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    return __import__(name)


def read_json(path: Path, made_by: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; it is made by: {made_by}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); it is made by: {made_by}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: not a file of this program; it is made by: {made_by}")
    return value


def read_results(run: Path, checkpoint: str, split: str, normalize: str = "minmax") -> tuple[Path, dict[str, Any]]:
    """(path, content) of a run's results file, or of the one that `run` is. Raises InputError, naming the command that makes it."""
    suffix = "" if normalize == "minmax" else f"_{normalize}"
    path = run if run.suffix == ".json" else run / f"results_{checkpoint}_{split}{suffix}.json"
    if path != run and not run.is_dir():
        raise InputError(f"{run}: no such run: RUN is a folder that train.py wrote")
    command = f"python evaluate.py {run}" if path != run else "python evaluate.py --score-maps DIR --dataset NAME --out FILE"
    for flag, value, default in (("checkpoint", checkpoint, "best"), ("split", split, "test"), ("normalize", normalize, "minmax")):
        command += f" --{flag} {value}" if value != default and path != run else ""
    result = read_json(path, command)
    of_metrics, of_curves = result.get("metrics"), result.get("curves")
    complete = isinstance(of_metrics, dict) and {"max_box_acc_v2", "gt_known_loc", "top1_cls", "pxap"} <= of_metrics.keys() and "dataset" in result
    if of_curves is not None:  # null where the data set has masks only
        levels = [of_curves.get(str(delta)) for delta in DELTAS] if isinstance(of_curves, dict) else []
        complete = complete and isinstance(result.get("thresholds"), dict) and bool(levels) and all(
            isinstance(curve, list) and len(curve) == LEVELS and all(isinstance(value, (int, float)) for value in curve) for curve in levels
        )
    if not complete:
        raise InputError(f"{path}: not a results file of evaluate.py; it is made by: {command}")
    return path, result


def read_config(run: Path) -> dict[str, Any]:
    """The values of a run, from its config.json."""
    try:
        return {name: entry["value"] for name, entry in read_json(run / "config.json", "train.py")["config"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{run / 'config.json'}: not a run's values ({error} is missing or of the wrong kind)") from error


class Run(NamedTuple):
    """A trained network and the images of one split."""

    folder: Path
    name: str
    model: nn.Module
    method: Any
    config: dict[str, Any]
    split: Split
    size: int  # side of the score maps in pixels

    def index_of(self, image: str) -> int:
        try:
            return self.split.ids.index(image)
        except ValueError:
            raise InputError(f"--images {image}: not an image of {self.split.name}, whose ids are like {self.split.ids[0]}") from None

    def truth(self, index: int) -> np.ndarray:
        """G x 4, in the map's pixels."""
        return scale_boxes(self.split.boxes[index], tuple(self.split.sizes[index]), self.size)


class Batch(NamedTuple):
    """What a network says of some images of a split."""

    indices: list[int]
    labels: Tensor  # N
    maps: Tensor  # N x h x w, the method's own map of the true class, unbounded
    features: Tensor | None  # N x C x h x w; None where the network gives none


def open_run(folder: Path, name: str, args: argparse.Namespace) -> Run:
    model, method, checkpoint = script("evaluate").load_run(folder, args.checkpoint, resolve_device(args.device))
    config = checkpoint["config"]
    data_root, splits = args.data_root or Path(config["data_root"]), args.splits or Path(config["splits"])
    split = load_splits(config["dataset"], data_root, splits, (args.split,), config["val_per_class"])[0][args.split]
    return Run(folder, name, model.eval(), method, config, split, config["image_size"])


def open_runs(args: argparse.Namespace) -> list[Run]:
    return [open_run(folder, name, args) for folder, name in zip(args.runs, names_of(args))]


def names_of(args: argparse.Namespace) -> list[str]:
    if args.names and len(args.names) != len(args.runs):
        raise InputError(f"--names: {len(args.names)} names for {len(args.runs)} runs")
    return args.names or [run.stem if run.suffix == ".json" else run.resolve().name for run in args.runs]


def predictions(run: Run, args: argparse.Namespace, indices: Sequence[int] | None = None) -> Iterator[Batch]:
    """One forward pass over images of the run's split, all or `indices`, in order."""
    split = run.split if indices is None else run.split.take(indices, run.split.name)
    indices = range(len(split)) if indices is None else indices
    device = next(run.model.parameters()).device
    outputs: list[Any] = []  # a method's `predict` returns no features: they are caught where the network returns them
    hook = run.model.register_forward_hook(lambda model, inputs, output: outputs.append(output))
    try:
        for images, labels, at in test_loader(split, args.batch_size, image_size=run.size, workers=args.workers):
            outputs.clear()
            with torch.inference_mode(), autocast(device, args.amp or run.config["amp"]):
                _, maps = run.method.predict(run.model, to_input(images, device), labels.to(device))
            features = outputs[0].features if outputs and isinstance(outputs[0], Output) else None
            yield Batch([indices[i] for i in at.tolist()], labels.to(device), maps, features)
    finally:
        hook.remove()


def factors(run: Run, batch: Batch) -> cam.Factors:
    """F and S of the true class. Raises InputError where the network has no linear classifier over its features."""
    layer = getattr(run.model, "fc", None)
    if batch.features is None or not isinstance(layer, nn.Linear) or layer.in_features != batch.features.shape[1]:
        raise InputError(f"{run.folder}: --method {run.config['method']} has no linear classifier over its features, so its map has no factors F and S")
    with torch.inference_mode():
        return cam.decompose(batch.features, layer.weight, batch.labels)


def score_maps(maps: Tensor, run: Run, mode: str = "bicubic") -> np.ndarray:
    """N x h x w -> N x size x size in [0, 1], as evaluate.py makes them."""
    return cam.normalize(cam.resize(maps, run.size, mode)).cpu().numpy()


# ------------------------------------------------------------------------------------------------------- Fig. A1, curves


def flatness(curve: Sequence[float]) -> tuple[int, int, float | None]:
    """(first, last, width) of the levels around the maximum where the accuracy is at least 95 % of it, without a break.

    width: as a fraction of the thresholds, in (0, 1]; None for a curve that is 0 everywhere.
    """
    top = int(np.argmax(curve))
    near = np.asarray(curve) >= 0.95 * curve[top]
    breaks = np.flatnonzero(~near)
    first = int(breaks[breaks < top].max(initial=-1)) + 1
    last = int(breaks[breaks > top].min(initial=len(curve))) - 1
    return first, last, (last - first + 1) / len(curve) if curve[top] > 0 else None


def curves(args: argparse.Namespace) -> list[Path]:
    """Fig. A1: accuracy against the threshold; each maximum, the MaxBoxAccV2 at that IoU, is marked."""
    require_matplotlib()
    entries, lines = [], []
    for run, name in zip(args.runs, names_of(args)):
        path, result = read_results(run, args.checkpoint, args.split, args.normalize)
        if result["curves"] is None:
            raise InputError(f"{path}: {result['dataset']} has no boxes, so there is no accuracy over thresholds")
        entry: dict[str, Any] = {"name": name, "results": str(path)}
        for delta in map(str, DELTAS):
            curve = result["curves"][delta]
            first, last, width = flatness(curve)
            top = int(np.argmax(curve))
            entry[delta] = {
                "maximum": curve[top], "threshold": top / LEVELS, "within_95_percent": [first / LEVELS, last / LEVELS], "flatness": width,
            }
        entries.append(entry)
        lines.append(result["curves"])

    written: list[Path] = []
    beside = args.width > 5
    names = [shortened(entry["name"], args.width) for entry in entries]
    columns = min(len(names), max(1, int(args.width // (0.06 * max(map(len, names)) + 0.5))))  # of names, above everything
    lines_above = (len(names) if beside else (len(names) + 1) // 2) * 0.15
    height = (2.0 + lines_above if beside else (1.45 + lines_above) * len(DELTAS) + 0.2) + 0.17 * -(-len(names) // columns)
    with figure(args, height, written) as drawn:
        panels = drawn.subplots(1, 3, sharey=True) if beside else drawn.subplots(3, 1, sharex=True)
        for panel, delta in zip(panels, DELTAS):
            for i, (entry, of_run) in enumerate(zip(entries, lines)):
                style, numbers = look(i), entry[str(delta)]
                at = round(numbers["threshold"] * LEVELS)
                flat = "–" if numbers["flatness"] is None else f"{numbers['flatness']:.2f}"
                label = f"{numbers['maximum']:.1f}, {flat} wide"
                low, high = (round(t * LEVELS) for t in numbers["within_95_percent"])
                panel.plot(np.arange(low, high + 1) / LEVELS, of_run[str(delta)][low : high + 1], color=style["color"], linewidth=5, alpha=0.25)
                panel.plot(np.arange(LEVELS) / LEVELS, of_run[str(delta)], markevery=[at], label=label, **style)
            panel.text(0.99, 0.98, f"IoU {delta / 100}", transform=panel.transAxes, ha="right", va="top", fontweight="bold")
            panel.set_xlim(0, 1)
            panel.set_ylim(0, 105)
            panel.set_yticks([0, 25, 50, 75, 100])
            # Above the panel: inside, some curve passes wherever a legend could be.
            panel.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2, handlelength=2.6, ncols=1 if beside else 2)
            if beside or delta == DELTAS[-1]:
                panel.set_xlabel("threshold")
            if not beside or delta == DELTAS[0]:
                panel.set_ylabel("accuracy, %")
        handles = [panel.plot([], [], **look(i))[0] for i in range(len(names))]
        drawn.legend(handles, names, loc="outside upper left", ncols=columns, handlelength=2.6)
    write_json(_with_suffix(args.out, ".json"), {"runs": entries})
    return [*written, _with_suffix(args.out, ".json")]


# ---------------------------------------------------------------------------------------------------- Fig. A2, histogram


def histogram(args: argparse.Namespace) -> list[Path]:
    """Fig. A2: how the largest feature norm of an image, max_u F_u, is distributed over the split."""
    require_matplotlib()
    values = {}
    for i, run in enumerate(open_runs(args)):
        largest = []
        for batch in predictions(run, args):
            if batch.features is None:
                raise InputError(f"{run.folder}: --method {run.config['method']} gives no feature map")
            largest.append(feature_norm(batch.features).amax((1, 2)).cpu().numpy().astype(float))
        values[i, run.name] = np.concatenate(largest)
    edges = np.histogram_bin_edges(np.concatenate(list(values.values())), bins=args.bins)
    entries, written = [], []
    with figure(args, 2.1 + 0.15 * len(values), written) as drawn:
        panel = drawn.subplots()
        for (i, name), of_run in values.items():
            density = np.histogram(of_run, edges, density=True)[0]
            style = look(i)
            label = f"{shortened(name, args.width - 1)}: mean {of_run.mean():.3g}"
            panel.stairs(density, edges, fill=True, color=style["color"], alpha=0.15)
            panel.stairs(density, edges, color=style["color"], linestyle=style["linestyle"], linewidth=1.2)
            centres, filled = (edges[:-1] + edges[1:]) / 2, np.flatnonzero(density)
            panel.plot(centres, density, markevery=filled[:: max(1, len(filled) // 5)].tolist(), **(style | {"linestyle": "none"}))
            panel.plot([], [], label=label, **style)
            entries.append({
                "name": name, "images": len(of_run), "mean": of_run.mean(), "median": float(np.median(of_run)),
                "deviation": of_run.std(), "density": density.tolist(),
            })
        panel.set_xlabel(r"$\max_u\,\mathcal{F}_u$")
        panel.set_ylabel("density")
        panel.set_ylim(bottom=0)
        panel.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
    write_json(_with_suffix(args.out, ".json"), {"edges": edges.tolist(), "runs": entries})
    return [*written, _with_suffix(args.out, ".json")]


# ------------------------------------------------------------------------------------------------- Figs. A3 and A4, images


def chosen_images(runs: list[Run], args: argparse.Namespace) -> list[str]:
    """The ids to draw: those of --images, --random N with --seed, or the N on which the first run's box is best or worst."""
    split = runs[0].split
    if args.images:
        return args.images
    n = min(len(split), args.worst or args.best or args.random)
    if not (args.worst or args.best):
        return [split.ids[i] for i in sorted(np.random.default_rng(args.seed).permutation(len(split))[:n].tolist())]
    level, ious = chosen_level(runs[0], args), {}
    for batch in predictions(runs[0], args):
        for index, score_map in zip(batch.indices, score_maps(batch.maps, runs[0], runs[0].method.upsampling)):
            if index in split.boxes:
                ious[index] = float(iou_matrix(level_boxes(score_map).largest[level], runs[0].truth(index)).max())
    order = sorted(ious, key=lambda index: (ious[index] if args.worst else -ious[index], index))
    return [split.ids[i] for i in order[:n]]


def chosen_level(run: Run, args: argparse.Namespace) -> int:
    """The level of the largest contour's boxes, one for the whole split, that evaluate.py found."""
    path, result = read_results(run.folder, args.checkpoint, args.split)
    if result["curves"] is None:
        raise InputError(f"{path}: {result['dataset']} has no boxes to draw")
    return round(result["thresholds"]["largest"] * LEVELS)


def maps(args: argparse.Namespace) -> list[Path]:
    """Fig. A3: image, CAM, F and S. CAM and F on each map's own scale, S on [-1, 1] everywhere, a black line at its zero."""
    runs = open_runs(args)
    images, cells = chosen_images(runs, args), {}
    for i, run in enumerate(runs):
        for batch in predictions(run, args, [run.index_of(image) for image in images]):
            _, F, S = factors(run, batch)
            for index, M, F, S in zip(batch.indices, *(x.float().cpu().numpy() for x in (batch.maps, F, S))):
                drawn = [draw_map(M, args.cell, run.method.upsampling), draw_map(F, args.cell), draw_signed(S, args.cell)]
                cells[i, run.split.ids[index]] = drawn
    pictures = {image: load_rgb(runs[0].split.path(runs[0].index_of(image)), args.cell) for image in images}
    if args.below or len(runs) > 2:
        rows = [[pictures[image] if i == 0 else None, *cells[i, image]] for image in images for i in range(len(runs))]
        layout = {"columns": ["image", "CAM", "F", "S"], "names": [run.name for _ in images for run in runs], "group_rows": len(runs)}
    else:
        rows = [[pictures[image]] + [cell for i in range(len(runs)) for cell in cells[i, image]] for image in images]
        layout = {"columns": ["image"] + ["CAM", "F", "S"] * len(runs), "groups": [("", 1)] + [(run.name, 3) for run in runs]}
    print("images:", " ".join(images))
    return save_picture(_grid(rows, **layout, foot=_colour_bars, foot_lines=2), args.out)


def boxes(args: argparse.Namespace) -> list[Path]:
    """Fig. A4: the box of the largest contour at the split's threshold beside the ground truth, and the CAM under it."""
    runs = open_runs(args)
    images, rows, numbers = chosen_images(runs, args), [], []
    cells: dict[tuple[int, str], Image.Image] = {}
    for i, run in enumerate(runs):
        level = chosen_level(run, args)
        indices = [run.index_of(image) for image in images]
        for image, index in zip(images, indices):
            if index not in run.split.boxes:
                raise InputError(f"{image}: has no box in {run.split.name}: --images names others")
        for batch in predictions(run, args, indices):
            for index, score_map in zip(batch.indices, score_maps(batch.maps, run, run.method.upsampling)):
                predicted, truth = level_boxes(score_map).largest[level], run.truth(index)
                picture = load_rgb(run.split.path(index), args.cell)
                cells[i, run.split.ids[index]] = localization(picture, score_map, predicted, truth)
                iou = float(iou_matrix(predicted, truth).max())
                numbers.append({"run": run.name, "image": run.split.ids[index], "box": predicted.tolist(), "truth": truth.tolist(), "iou": iou})
    for start in range(0, len(images), args.columns):
        rows += [[cells[i, image] for image in images[start : start + args.columns]] for i in range(len(runs))]
    picture = _grid(rows, names=[run.name for run in runs] * (len(rows) // len(runs)), group_rows=len(runs), foot=_box_legend)
    print("images:", " ".join(images))
    write_json(_with_suffix(args.out, ".json"), {"boxes": numbers})
    return [*save_picture(picture, args.out), _with_suffix(args.out, ".json")]


# ---------------------------------------------------------------------------------------------------------- Fig. A5, sweep

# What may differ between a finished run and the one a sweep asks for: where and how fast it runs.
FREE = ("data_root", "splits", "workers", "device", "amp", "val_every")


def sweep(args: argparse.Namespace) -> list[Path]:
    """Fig. A5: trains a run for each value (what is done is not done again, what was interrupted goes on) and draws them."""
    require_matplotlib()
    train, param = script("train"), args.param.replace("-", "_")
    flag = f"--{param.replace('_', '-')}"
    preset, sources = train.resolve_config(train.parse_args(args.flags), None)
    value = vars(preset).get(param)
    numbers = [name for name, v in vars(preset).items() if type(v) in (int, float) and sources[name] != "default"]
    if param not in numbers:
        raise InputError(f"--param {args.param}: not a number of the preset; {preset.dataset} {preset.arch} {preset.method} has {', '.join(numbers)}")
    if sources[param] == "flag":
        raise InputError(f"{flag}: is what this sweep varies: leave it out of the flags")
    if any(word.split("=")[0] in ("--out", "--resume") for word in args.flags):
        raise InputError("--out is the picture's place and --resume is always on: --runs DIR says where the runs go")

    seeds = args.seeds if args.seeds else [preset.seed]
    if len(set(seeds)) < len(seeds) or len(set(map(float, args.values))) < len(args.values):
        raise InputError("--values and --seeds: each once")
    jobs: dict[tuple[str, int], tuple[Path, list[str]]] = {}
    for text in args.values:
        for seed in seeds:
            folder = args.runs / f"{preset.dataset}_{preset.arch}_{preset.method}_{param}_{float(text):g}_seed{seed}"
            jobs[text, seed] = folder, [*args.flags, flag, text, "--seed", str(seed), "--out", str(folder), "--resume"]
    # All that can be wrong with the flags or with what is there already, before the first hour is spent.
    waiting = [job for job in jobs.values() if not is_finished(*job)]
    if waiting:
        load_splits(preset.dataset, Path(preset.data_root), Path(preset.splits), ("train", "val", "test"), preset.val_per_class)
    print(f"{len(jobs) - len(waiting)} of {len(jobs)} runs are done already", flush=True)
    failures: list[InputError] = []

    def train_one(job: tuple[Path, list[str]]) -> None:
        if not failures:  # what ended one run would end the others too
            try:
                train_run(*job, args.jobs)
            except InputError as error:
                failures.append(error)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(train_one, waiting))
    if failures:
        raise failures[0]

    rows = []
    for text in args.values:
        found = [read_results(jobs[text, seed][0], args.checkpoint, "test")[1]["metrics"] for seed in seeds]
        metric = "gt_known_loc" if found[0]["gt_known_loc"] is not None else "pxap"
        rows.append({"value": float(text), "seeds": seeds, metric: [m[metric] for m in found], "top1_cls": [m["top1_cls"] for m in found]})
    rows.sort(key=lambda row: row["value"])
    label = {"gt_known_loc": "GT-known Loc", "pxap": "PxAP"}[metric]
    written: list[Path] = []
    with figure(args, 2.2, written) as drawn:
        panel = drawn.subplots()
        x, mean = [row["value"] for row in rows], [np.mean(row[metric]) for row in rows]
        panel.axvline(value, color="0.35", linestyle=":", linewidth=1, label=f"preset: {value:g}")
        if len(seeds) > 1:
            deviation = [np.std(row[metric], ddof=1) for row in rows]
            panel.errorbar(x, mean, deviation, capsize=2, label=f"mean ± deviation, {len(seeds)} seeds", **look(0))
        else:
            panel.plot(x, mean, **look(0))
        if value in x:
            panel.plot([value], [mean[x.index(value)]], "*", markersize=13, color=RUN_COLOURS[1], zorder=3)
        panel.set_xlabel(param_label(param))
        panel.set_ylabel(f"{label}, %")
        panel.margins(y=0.15)
        panel.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2, ncols=2)
    lines = [[f"{row['value']:g}" + (" (preset)" if row["value"] == value else ""), *(spread(row[k], 2) for k in (metric, "top1_cls"))] for row in rows]
    text = markdown([param, label, "Top-1 cls"], lines)
    write_text(_with_suffix(args.out, ".md"), text)
    write_json(_with_suffix(args.out, ".json"), {"param": param, "preset": value, "checkpoint": args.checkpoint, "values": rows})
    print(text, end="")
    return [*written, _with_suffix(args.out, ".md"), _with_suffix(args.out, ".json")]


def param_label(param: str) -> str:
    """The paper's symbol: lambda_sim -> a lambda with index sim; other names as they are."""
    symbol, _, index = param.partition("_")
    if symbol in ("lambda", "tau", "gamma"):
        return rf"$\{symbol}" + (rf"_{{\mathrm{{{index}}}}}$" if index else "$")
    return param.replace("_", " ")


def is_finished(folder: Path, arguments: list[str]) -> bool:
    """Whether the run that these arguments ask for is in the folder, evaluated. Raises InputError for another run's folder."""
    train = script("train")
    asked = vars(train.resolve_config(train.parse_args(arguments), None)[0])
    if not (folder / "last.pt").exists():
        return False
    there = read_config(folder)
    for name, value in asked.items():
        if name not in (*FREE, "epochs") and there.get(name) != json.loads(json.dumps(value)):
            raise InputError(f"{folder}: a run with {name} {there.get(name)}, where this sweep asks for {value}: pass another --runs DIR, or remove it")
    if not all((folder / f"results_{which}_test.json").exists() for which in ("best", "last")):
        return False
    epoch = read_results(folder, "last", "test")[1].get("epoch", 0)
    if epoch > asked["epochs"]:
        raise InputError(f"{folder}: a run of {epoch} epochs, where this sweep asks for {asked['epochs']}: pass another --runs DIR, or remove it")
    return epoch == asked["epochs"]


def train_run(folder: Path, arguments: list[str], jobs: int) -> None:
    """train.py in a process of its own, as from the command line; with several at a time each prints into <folder>.log."""
    command = [sys.executable, str(Path(script("train").__file__)), *arguments]
    environment = dict(os.environ)
    if jobs == 1:
        print(f"{folder}: training", flush=True)
        code = subprocess.run(command, env=environment).returncode
        where = "said why above"
    else:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
        log = folder.with_name(f"{folder.name}.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        print(f"{folder}: training, log in {log}", flush=True)
        with log.open("a", encoding="utf-8") as file:
            code = subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT).returncode
        where = f"said why in {log}"
    if code:
        raise InputError(f"{folder}: train.py ended with exit code {code} and {where}; the same command goes on from here")


# ------------------------------------------------------------------------------------------------------------------ table

METRICS = {
    "top1_loc": "Top-1 Loc", "top5_loc": "Top-5 Loc", "gt_known_loc": "GT-known Loc", "gt_known_loc_largest": "GT-known Loc, largest contour",
    "v2_30": "IoU 30", "v2_50": "IoU 50", "v2_70": "IoU 70", "v2_mean": "MaxBoxAccV2", "v2_at_val": "at val's thresholds",
    "top1_cls": "Top-1 cls", "top5_cls": "Top-5 cls", "pxap": "PxAP",
}
FORMS = (
    ("Localization, %", ("top1_loc", "top5_loc", "gt_known_loc", "top1_cls")),
    ("MaxBoxAccV2, %", ("v2_30", "v2_50", "v2_70", "v2_mean", "v2_at_val")),
    ("PxAP, % (the form of Table A1)", ("pxap",)),
)


class Group(NamedTuple):
    """Runs that differ in the seed only."""

    label: str
    dataset: str
    arch: str | None
    seeds: list[int]
    metrics: dict[str, list[float]]  # of METRICS, those that the results have


def grouped(args: argparse.Namespace) -> list[Group]:
    """The runs by all that config.json says but the seed and what does not change a result. Raises InputError for a run that comes twice."""
    found: dict[str, list[dict[str, Any]]] = {}
    for run, name in zip(args.runs, names_of(args)):
        path, result = read_results(run, args.checkpoint, args.split, args.normalize)
        if path == run:
            config: dict[str, Any] = {"file": str(run.resolve()), "method": name}
        else:
            config = {name: value for name, value in read_config(run).items() if name not in FREE}
        seed = config.pop("seed", 0)
        entry = {"run": run, "name": name if args.names else config["method"], "named": bool(args.names), "seed": seed, "config": config, "result": result}
        same = found.setdefault(json.dumps(config, sort_keys=True), [])
        for other in same:
            if other["seed"] == seed:
                raise InputError(f"{run}: the same run as {other['run']}, seed {seed} included: one of them only")
        same.append(entry)

    groups = list(found.values())
    made = []
    for group in groups:
        first = group[0]
        keys = [first["result"].get(key) for key in ("dataset", "arch")]
        alike = [g[0]["config"] for g in groups if [g[0]["result"].get(key) for key in ("dataset", "arch")] == keys and g[0]["name"] == first["name"]]
        differing = sorted(k for k in set().union(*alike) if len({json.dumps(c.get(k)) for c in alike}) > 1)
        values = ", ".join(f"{k} {first['config'].get(k)}" for k in differing)
        label = f"{first['name']} ({values})" if differing else first["name"]
        metrics: dict[str, list[float]] = {}
        for entry in group:
            m = entry["result"]["metrics"]
            flat = {**m, **{f"v2_{k}": v for k, v in (m["max_box_acc_v2"] or {}).items()}}
            flat["v2_at_val"] = (m["max_box_acc_v2_at_val_threshold"] or {}).get("mean")
            for key in METRICS:
                if flat.get(key) is not None:
                    metrics.setdefault(key, []).append(flat[key])
        made.append(Group(label, *keys, [entry["seed"] for entry in group], metrics))
    return made


def spread(values: Sequence[float] | None, digits: int, plus_minus: str = " ± ") -> str:
    """Mean ± standard deviation (n - 1) of several values, one value as it is, – for none."""
    if not values:
        return "–"
    text = f"{np.mean(values):.{digits}f}"
    return text + f"{plus_minus}{np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else text


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [[cell.replace("|", r"\|") for cell in row] for row in (head, *rows)]
    return "".join(f"| {' | '.join(row)} |\n" for row in (lines[0], ["---"] * len(head), *lines[1:]))


def latex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--"}
    return "".join(special.get(c, f"\\{c}" if c in "&%$#_{}" else c) for c in text)


def table(args: argparse.Namespace) -> list[Path]:
    """Table A1's form and the paper's main form: rows are methods, columns the metrics on each data set and backbone."""
    groups = grouped(args)
    pairs = list(dict.fromkeys((g.dataset, g.arch) for g in groups))
    cells = {(g.label, g.dataset, g.arch): g for g in groups}
    labels = list(dict.fromkeys(g.label for g in groups))
    as_markdown, as_latex = [], ["% \\usepackage{booktabs}"]
    for title, keys in FORMS:
        columns = [(pair, key) for pair in pairs for key in keys if any(key in g.metrics for g in groups if (g.dataset, g.arch) == pair)]
        if not columns:
            continue
        rows = [(label, [cells.get((label, *pair)) for pair, _ in columns]) for label in labels]
        rows = [(label, of) for label, of in rows if any(g and key in g.metrics for g, (_, key) in zip(of, columns))]
        seeds = {len(g.seeds) for _, of in rows for g in of if g}
        note = "" if seeds == {1} else f"; mean ± standard deviation over {' or '.join(map(str, sorted(seeds)))} seeds"
        head = ["", *(f"{_pair(pair)} {METRICS[key]}" for pair, key in columns)]
        body = [[label, *(spread(g and g.metrics.get(key), args.digits) for g, (_, key) in zip(of, columns))] for label, of in rows]
        as_markdown.append(f"{title}{note}\n\n{markdown(head, body)}")

        used = [pair for pair in pairs if any(p == pair for p, _ in columns)]
        spans, rules, at = [], [], 2
        for pair in used:
            n = sum(p == pair for p, _ in columns)
            spans.append(f"\\multicolumn{{{n}}}{{c}}{{{latex(_pair(pair))}}}")
            rules.append(f"\\cmidrule(lr){{{at}-{at + n - 1}}}")
            at += n
        lines = [" & ".join(["", *spans]) + r" \\", "".join(rules), " & ".join(["", *(latex(METRICS[key]) for _, key in columns)]) + r" \\", r"\midrule"]
        for label, of in rows:
            numbers = [spread(g and g.metrics.get(key), args.digits, r" \pm ") for g, (_, key) in zip(of, columns)]
            lines.append(" & ".join([latex(label), *("--" if n == "–" else f"${n}$" for n in numbers)]) + r" \\")
        as_latex += [f"% {title}{note}", f"\\begin{{tabular}}{{l{'c' * len(columns)}}}", r"\toprule", *lines, r"\bottomrule", r"\end{tabular}", ""]

    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["method", "dataset", "arch", "seeds", *(f"{key}_{what}" for key in METRICS for what in ("mean", "deviation"))])
    for g in groups:
        row: list[Any] = [g.label, g.dataset, g.arch or "", " ".join(map(str, g.seeds))]
        for key in METRICS:
            values = g.metrics.get(key, [])
            row += [repr(float(np.mean(values))) if values else "", repr(float(np.std(values, ddof=1))) if len(values) > 1 else ""]
        rows.writerow(row)
    written = []
    for suffix, content in ((".md", "\n".join(as_markdown)), (".tex", "\n".join(as_latex)), (".csv", text.getvalue())):
        write_text(_with_suffix(args.out, suffix), content)
        written.append(_with_suffix(args.out, suffix))
    print("\n".join(as_markdown))
    return written


def _pair(pair: tuple[str, str | None]) -> str:
    arch = {"vgg16": "VGG16", "resnet50": "ResNet50", None: ""}.get(pair[1], pair[1])
    return f"{pair[0]} {arch}".strip()


# -------------------------------------------------------------------------------------------------------------------- gap


def regions(run: Run, index: int, shape: tuple[int, int]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{"box": (inside, outside), "mask": ..., "part": ...}, h x w bool, of what the image has: a location is where its centre is.

    The ignore region of a mask is in neither. A part is what the data set has below parts/ (a mask parts/ID.png for an image ID), as the demo
    has its heads; outside of it is the rest of the object.
    """
    y, x = ((2 * np.arange(n) + 1) * run.size // (2 * n) for n in shape)
    found = {}
    if index in run.split.boxes:
        x0, y0, x1, y1 = run.truth(index).T[:, :, None, None]
        inside = ((x0 <= x) & (x <= x1) & (y0 <= y[:, None]) & (y[:, None] <= y1)).any(0)
        found["box"] = inside, ~inside
    if index in run.split.masks:
        mask, ignore = load_masks(run.split.root, run.split.masks[index], run.size)
        at = np.ix_(y, x)
        found["mask"] = mask[at], ~mask[at] & ~ignore[at]
        part_file = (Path("parts") / run.split.ids[index]).with_suffix(".png")
        if (run.split.root / part_file).exists():
            part = load_masks(run.split.root, Masks([str(part_file)], []), run.size)[0][at]
            found["part"] = part, mask[at] & ~part
    return found


def region_numbers(F_hat: np.ndarray, S: np.ndarray, inside: np.ndarray, outside: np.ndarray) -> dict[str, float]:
    """Of one image, maps h x w: the means that its regions have (an empty region has none), the negative share in percent."""
    numbers = {}
    for where, region in (("inside", inside), ("outside", outside)):
        if region.any():
            numbers |= {f"S_{where}": float(S[region].mean()), f"F_hat_{where}": float(F_hat[region].mean())}
    if inside.any():
        numbers["S_negative_inside"] = 100 * float((S[inside] < 0).mean())
    return numbers


GAP = {
    "S_inside": "S inside", "S_outside": "S outside", "F_hat_inside": "F-hat inside", "F_hat_outside": "F-hat outside",
    "S_negative_inside": "inside with S < 0, %",
}
REGIONS = ("box", "mask", "part")


def gap_of(run: Run, args: argparse.Namespace) -> dict[str, Any]:
    """The numbers of one run: means over images of each image's mean over locations, and what CAM, F and S localize alone."""
    evaluate = script("evaluate")
    numbers: dict[str, dict[str, list[float]]] = {}
    kept: dict[str, list[Tensor]] = {"CAM": [], "F": [], "S": []}  # at the network's resolution: small
    order: list[int] = []
    for batch in predictions(run, args):
        _, F, S = factors(run, batch)
        for name, values in (("CAM", batch.maps), ("F", F), ("S", S)):
            kept[name].append(values.float().cpu())
        order += batch.indices
        for index, F_hat, of_S in zip(batch.indices, minmax(F).cpu().numpy(), S.cpu().numpy()):
            for kind, (inside, outside) in regions(run, index, of_S.shape).items():
                for name, value in region_numbers(F_hat, of_S, inside, outside).items():
                    numbers.setdefault(kind, {}).setdefault(name, []).append(value)

    localized = {}
    for name, parts in kept.items():
        mode = run.method.upsampling if name == "CAM" else "bicubic"
        batches, done = [], 0
        for part in parts:
            batches.append((order[done : done + len(part)], part))
            done += len(part)
        of_map = (evaluate.MapBatch(indices, score_maps(part, run, mode)) for indices, part in batches)
        found = evaluate.evaluate_maps(of_map, run.split, workers=args.workers)["metrics"]
        localized[name] = {key: found[key] for key in ("max_box_acc_v2", "max_box_acc", "pxap")}
    means = {kind: {name: float(np.mean(of[name])) if name in of else None for name in GAP} for kind, of in numbers.items()}
    for kind, of in numbers.items():
        means[kind]["images"] = len(of.get("S_inside", ()))
    return {
        "name": run.name, "run": str(run.folder), "split": args.split, "checkpoint": args.checkpoint, "images": len(order),
        **{kind: means.get(kind) for kind in REGIONS}, "localization": localized,
    }


def gap(args: argparse.Namespace) -> list[Path]:
    """The gap between classification and localization as numbers: printed, and as JSON."""
    found = [gap_of(run, args) for run in open_runs(args)]

    def row(label: str, values: list[float | None], digits: int) -> list[str]:
        return [label, *("–" if value is None else f"{value:.{digits}f}" for value in values)]

    rows = []
    for kind in REGIONS:
        for key, label in GAP.items():
            if any(entry[kind] for entry in found):
                rows.append(row(f"{label} ({kind})", [(entry[kind] or {}).get(key) for entry in found], 1 if "%" in label else 3))
    for name in ("CAM", "F", "S"):
        of_name = [entry["localization"][name] for entry in found]
        if any(entry["max_box_acc_v2"] for entry in of_name):
            rows.append(row(f"MaxBoxAccV2 by {name}", [(entry["max_box_acc_v2"] or {}).get("mean") for entry in of_name], 1))
    for name in ("CAM", "F", "S"):
        values = [entry["localization"][name]["pxap"] for entry in found]
        if any(value is not None for value in values):
            rows.append(row(f"PxAP by {name}", values, 1))
    print(markdown(["", *(entry["name"] for entry in found)], rows), end="")
    write_json(_with_suffix(args.out, ".json"), {"runs": found})
    return [_with_suffix(args.out, ".json")]


# ----------------------------------------------------------------------------------------------------------- command line

COMMANDS = {
    "curves": (curves, "Fig. A1: accuracy against the threshold"),
    "histogram": (histogram, "Fig. A2: density of the largest feature norm"),
    "maps": (maps, "Fig. A3: image, CAM, F, S"),
    "boxes": (boxes, "Fig. A4: boxes and CAM"),
    "sweep": (sweep, "Fig. A5: GT-known Loc against a hyperparameter; flags it does not know go to train.py"),
    "table": (table, "Table A1's form and the paper's main form"),
    "gap": (gap, "mean F-hat and S inside and outside the object, localization by F and by S alone"),
}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m bridge_wsol.figures", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (_, what) in COMMANDS.items():
        # No abbreviations: sweep hands on what it does not know, --p among it, which is not short for --param.
        sub = commands.add_parser(name, help=what, description=what, allow_abbrev=False)
        if name != "sweep":
            sub.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders that train.py wrote")
            sub.add_argument("--names", nargs="+", metavar="NAME", help="what to call the runs, in their order (default: their folders' names)")
            sub.add_argument("--split", choices=("test", "val"), default="test")
        sub.add_argument("--checkpoint", choices=("best", "last"), default="best")
        sub.add_argument("--out", type=Path, metavar="PATH", help=f"without suffix (default figures/{name})")
        if name in ("curves", "histogram", "sweep"):
            sub.add_argument("--width", type=float, default=COLUMN, metavar="INCHES", help=f"{COLUMN}: a column (default); {PAGE}: a page")
            sub.add_argument("--dpi", type=int, default=DPI, help="of the PNG")
        if name in ("curves", "table"):
            sub.add_argument("--normalize", choices=cam.NORMALIZATIONS, default="minmax", help="whose results files")
        if name in ("histogram", "maps", "boxes", "gap"):
            sub.add_argument("--data-root", type=Path, help="default: the one the run was trained with")
            sub.add_argument("--splits", type=Path, help="default: the one the run was trained with")
            sub.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
            sub.add_argument("--amp", choices=("auto", "bf16", "off"), help="default: the run's")
            sub.add_argument("--batch-size", type=int, default=32)
            sub.add_argument("--workers", type=int, default=default_workers())
        if name in ("maps", "boxes"):
            which = sub.add_mutually_exclusive_group(required=True)
            which.add_argument("--images", nargs="+", metavar="ID", help="ids as in the split's image_ids.txt")
            which.add_argument("--worst", type=int, metavar="N", help="where the first run's box is worst")
            which.add_argument("--best", type=int, metavar="N", help="where it is best")
            which.add_argument("--random", type=int, metavar="N", help="drawn with --seed")
            sub.add_argument("--seed", type=int, default=0, help="of --random")
            sub.add_argument("--cell", type=int, default=224, metavar="PIXELS", help="side of an image in the figure")
    flags = commands.choices
    flags["histogram"].add_argument("--bins", type=int, default=40)
    flags["maps"].add_argument("--below", action="store_true", help="runs below each other (three and more always are)")
    flags["boxes"].add_argument("--columns", type=int, default=4, metavar="N", help="images a row")
    flags["table"].add_argument("--digits", type=int, default=2)
    flags["sweep"].add_argument("--param", required=True, help="a flag of train.py, as lambda_sim")
    flags["sweep"].add_argument("--values", nargs="+", required=True, metavar="X")
    flags["sweep"].add_argument("--seeds", nargs="+", type=int, metavar="N", help="several runs a value: mean and deviation")
    flags["sweep"].add_argument("--runs", type=Path, default=Path("runs/sweep"), metavar="DIR", help="where the runs go (default runs/sweep)")
    flags["sweep"].add_argument("--jobs", type=int, default=1, metavar="N", help="runs side by side")
    args, args.flags = parser.parse_known_args(argv)
    if args.flags and args.command != "sweep":
        parser.error(f"unrecognized arguments: {' '.join(args.flags)}")
    for name, least in (("worst", 1), ("best", 1), ("random", 1), ("cell", 16), ("columns", 1), ("bins", 1), ("batch_size", 1), ("jobs", 1),
                        ("workers", 0), ("dpi", 10), ("digits", 0), ("seed", 0), ("width", 1)):
        value = getattr(args, name, None)
        if value is not None and not least <= value < 10**6:
            parser.error(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    for value in getattr(args, "values", ()):
        try:
            float(value)
        except ValueError:
            parser.error(f"--values {value}: must be a number")
    if args.out is None:
        args.out = Path("figures") / (f"sweep_{args.param.replace('-', '_')}" if args.command == "sweep" else args.command)
    elif args.out.suffix in (".png", ".pdf", ".json", ".md", ".tex", ".csv"):
        args.out = args.out.with_suffix("")
    return args


def _with_suffix(out: Path, suffix: str) -> Path:
    return out.with_name(out.name + suffix)  # not Path.with_suffix: a value's decimals are no suffix


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    for path in COMMANDS[args.command][0](args):
        print(f"written to {path}")


if __name__ == "__main__":
    with one_line_errors():
        main()
