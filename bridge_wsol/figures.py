"""Draws the figures of the appendix from finished runs. Trains nothing.

    python -m bridge_wsol.figures curves RUN [RUN ...]       Fig. A1: accuracy against the threshold
    python -m bridge_wsol.figures histogram RUN [RUN ...]    Fig. A2: density of the largest feature norm
    python -m bridge_wsol.figures maps RUN [RUN ...]         Fig. A3: image, CAM, F, S
    python -m bridge_wsol.figures boxes RUN [RUN ...]        Fig. A4: boxes and CAM
    python -m bridge_wsol.figures sweep FILE [FILE ...]      Fig. A5: accuracy against a hyperparameter
    python -m bridge_wsol.figures gap RUN [RUN ...]          no figure: F and S inside and outside the object

RUN is a folder that train.py wrote. curves also takes results files of evaluate.py (any method's score maps).
FILE is a JSON file that `python -m bridge_wsol.experiments sweep` wrote.
curves, histogram and gap take runs with the same name in --names as one: seeds of the same configuration.
A figure goes to figures/COMMAND.png and .pdf, or where --out says. curves, histogram, boxes and gap write
their numbers as JSON, too. The same input gives the same bytes.
curves, histogram and sweep need matplotlib (the extra `figures`).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from . import cam, drawing
from .boxes import LEVELS, iou_matrix, level_boxes, scale_boxes
from .data import Masks, Split, load_masks, load_rgb, test_loader, to_input
from .drawing import with_suffix
from .evaluation import MapBatch, evaluate_maps, load_run, names_of, read_results, run_splits
from .experiments import SWEPT, check_pools, markdown, read_sweep, spread
from .losses import feature_norm, minmax
from .methods import CAM
from .metrics import DELTAS, flatness
from .models import Output
from .utils import (
    InputError,
    Parser,
    Progress,
    atomic_write,
    autocast,
    counted,
    default_workers,
    one_line_errors,
    resolve_device,
    write_json,
)

COLUMN, PAGE = 3.3, 6.9  # widths of a column and of the text of a two-column page, in inches
RANDOM = 4  # images that maps and boxes draw without a choice
MAPS = ("CAM", "F", "S")


# ------------------------------------------------------------------------------------------------- matplotlib

STYLE = {
    **dict.fromkeys(("font.size", "axes.labelsize", "axes.titlesize"), 8),
    **dict.fromkeys(("legend.fontsize", "legend.title_fontsize", "xtick.labelsize", "ytick.labelsize"), 7),
    **{"lines.linewidth": 1.2, "lines.markersize": 5, "axes.linewidth": 0.6},
    **{"axes.grid": True, "grid.linewidth": 0.4, "grid.alpha": 0.5},
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    "pdf.fonttype": 42,
}
# The colours of Okabe and Ito. Line style and marker tell runs apart in print without colour.
LOOKS = {
    "color": ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"),
    "linestyle": ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1))),
    "marker": ("o", "s", "^", "D", "v", "P", "X"),
}
# The place of a legend above its panel: inside, the curves may pass through every place.
ABOVE = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.2}


def require_matplotlib() -> ModuleType:
    """matplotlib. Raises InputError where it is not installed."""
    try:
        import matplotlib
        import matplotlib.figure
    except ImportError as error:
        fix = "install it with pip install -e '.[figures]'"
        raise InputError(f"this figure needs matplotlib ({error}): {fix}") from error
    return matplotlib


@contextmanager
def figure(args: argparse.Namespace, height: float) -> Iterator[Any]:
    """Yields a matplotlib figure of --width x `height` inches, then saves it as --out.png and .pdf.

    The files hold no dates, and the user's settings of matplotlib have no effect.
    """
    matplotlib = require_matplotlib()
    formats = (
        (".png", {"Software": None}, {"pil_kwargs": {"optimize": True}}),
        (".pdf", {"CreationDate": None, "Creator": None, "Producer": None}, {}),
    )
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        drawn = matplotlib.figure.Figure(figsize=(args.width, height), layout="constrained")
        yield drawn
        for suffix, metadata, options in formats:
            with atomic_write(with_suffix(args.out, suffix)) as part:
                drawn.savefig(part, format=suffix[1:], dpi=args.dpi, metadata=metadata, **options)


def look(i: int) -> dict[str, Any]:
    """Colour, line style and marker of the i-th run."""
    return {name: looks[i % len(looks)] for name, looks in LOOKS.items()}


def print_numbers(names: list[str], rows: list[tuple[str, list[list[float | None]], int]]) -> None:
    """Prints a table with a column per name. rows: (label, the values of each name, decimals)."""
    known = [
        [label, *(spread([x for x in values if x is not None], digits) for values in of_names)]
        for label, of_names, digits in rows
    ]
    print(markdown(["", *names], [row for row in known if set(row[1:]) != {"–"}]), end="")


def shortened(name: str, width: float) -> str:
    """The name, cut in the middle if it does not fit into a legend `width` inches wide; $ is no formula."""
    fits = max(9, int((width - 0.6) / 0.06))
    cut = name if len(name) <= fits else f"{name[: fits // 2]}…{name[-(fits - fits // 2 - 1) :]}"
    return cut.replace("$", r"\$")


# ------------------------------------------------------------------------------------------------------- runs


class Run(NamedTuple):
    """A trained network and the images of one split."""

    folder: Path
    name: str
    model: nn.Module
    method: CAM
    config: dict[str, Any]
    split: Split
    size: int  # side of the score maps in pixels

    def index_of(self, image: str) -> int:
        """The index of an image id in the split. Raises InputError for another id."""
        try:
            return self.split.ids.index(image)
        except ValueError:
            problem = f"--images {image}: no such image in {self.split.name}"
            raise InputError(f"{problem}; pass ids like {self.split.ids[0]}") from None

    def truth(self, index: int) -> np.ndarray:
        """The ground truth boxes of an image, G x 4 in pixels of the score map."""
        return scale_boxes(self.split.boxes[index], tuple(self.split.sizes[index]), self.size)


class Batch(NamedTuple):
    """Output of a network for some images of a split."""

    indices: list[int]
    labels: Tensor  # N
    maps: Tensor  # N x h x w, unbounded: the method's map of the ground truth class
    features: Tensor | None  # N x C x h x w; None where the network returns no `Output`


def open_runs(args: argparse.Namespace) -> list[Run]:
    """The networks in eval mode and the images of --split. Raises InputError for a folder that is no run."""
    runs, device = [], resolve_device(args.device)
    for folder, name in zip(args.runs, names_of(args)):
        model, method, checkpoint = load_run(folder, args.checkpoint, device)
        config = checkpoint["config"]
        split = run_splits(folder, checkpoint, (args.split,), args.data_root, args.splits)[args.split]
        runs.append(Run(folder, name, model.eval(), method, config, split, config["image_size"]))
    return runs


def predictions(run: Run, args: argparse.Namespace, indices: Sequence[int] | None = None) -> Iterator[Batch]:
    """One forward pass over the images with these indices (None: all images of the split), in order."""
    split = run.split if indices is None else run.split.take(indices, run.split.name)
    indices = range(len(split)) if indices is None else indices
    device = next(run.model.parameters()).device
    loader = test_loader(split, args.batch_size, image_size=run.size, workers=args.workers)
    # `predict` returns no features: a hook takes them from the network's output.
    outputs: list[Any] = []
    hook = run.model.register_forward_hook(lambda model, inputs, output: outputs.append(output))
    try:
        for images, labels, at in counted(loader, run.name, len(loader), "batches"):
            outputs.clear()
            with torch.inference_mode(), autocast(device, args.amp or run.config["amp"]):
                _, maps = run.method.predict(run.model, to_input(images, device), labels.to(device))
            features = outputs[0].features if outputs and isinstance(outputs[0], Output) else None
            yield Batch([indices[i] for i in at.tolist()], labels.to(device), maps, features)
    finally:
        hook.remove()


def lacks(run: Run, what: str) -> InputError:
    """The error for a network without what a figure needs."""
    method = run.config["method"]
    return InputError(f"{run.folder}: --method {method} has {what}: pass a run of another method")


def factors(run: Run, batch: Batch) -> cam.Factors:
    """F and S of the ground truth class. Raises InputError if no linear classifier follows the features."""
    layer = getattr(run.model, "fc", None)
    linear = batch.features is not None and isinstance(layer, nn.Linear)
    if not linear or layer.in_features != batch.features.shape[1]:
        raise lacks(run, "no linear classifier over its features, so its map has no factors F and S")
    with torch.inference_mode():
        return cam.decompose(batch.features, layer.weight, batch.labels)


def score_maps(maps: Tensor, run: Run, mode: str | None = None) -> np.ndarray:
    """N x h x w, unbounded -> N x size x size in [0, 1], as in evaluate.py. mode None: the method's."""
    return cam.normalize(cam.resize(maps, run.size, mode or run.method.upsampling)).cpu().numpy()


# -------------------------------------------------------------------------------------------- Fig. A1, curves


def maximum(curve: Sequence[float]) -> dict[str, Any]:
    """The maximum of a curve in percent, its threshold, and the range of thresholds that `flatness` finds."""
    (first, last, width), top = flatness(curve), int(np.argmax(curve))
    found = {"maximum": float(curve[top]), "threshold": top / LEVELS}
    return found | {"within_95_percent": [first / LEVELS, last / LEVELS], "flatness": width}


def read_curves(args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[dict[str, np.ndarray]]]:
    """(numbers, {IoU: curve}) of each name; the curve is the mean over the runs with that name.

    "above_first", "below_first": percent of the thresholds at which it is above or below the first name's.
    Raises InputError for results without boxes.
    """
    found: dict[str, list[tuple[Path, dict[str, list[float]]]]] = {}
    for run, name in zip(args.runs, names_of(args)):
        path, result = read_results(run, args.checkpoint, args.split, args.normalize)
        if result["curves"] is None:
            raise InputError(f"{path}: {result['dataset']} has no boxes, so no curves: use maps or gap")
        found.setdefault(name, []).append((path, result["curves"]))
    entries, all_curves = [], []
    for name, runs in found.items():
        means = {str(iou): np.mean([of_run[str(iou)] for _, of_run in runs], axis=0) for iou in DELTAS}
        all_curves.append(means)
        numbers = {iou: maximum(mean) for iou, mean in means.items()}
        for iou, mean in means.items():
            first = all_curves[0][iou]
            numbers[iou]["above_first"] = 100 * float((mean > first).mean())
            numbers[iou]["below_first"] = 100 * float((mean < first).mean())
        entries.append({"name": name, "results": [str(path) for path, _ in runs], **numbers})
    return entries, all_curves


def curves(args: argparse.Namespace) -> None:
    """Fig. A1: accuracy against the threshold. A marker shows each maximum: MaxBoxAccV2 at that IoU.

    Prints the numbers of claim C.1: maximum, `flatness`, and the share of thresholds above the first run.
    """
    entries, all_curves = read_curves(args)
    beside = args.width > 5  # three panels side by side
    names = [shortened(entry["name"], args.width) for entry in entries]
    columns = min(len(names), max(1, int(args.width // (0.06 * max(map(len, names)) + 0.5))))  # of names
    lines_above = (1 + (len(names) if beside else (len(names) + 1) // 2)) * 0.15
    height = 2.0 + lines_above if beside else (1.45 + lines_above) * len(DELTAS) + 0.2
    height += 0.17 * math.ceil(len(names) / columns)
    with figure(args, height) as drawn:
        panels = drawn.subplots(1, 3, sharey=True) if beside else drawn.subplots(3, 1, sharex=True)
        for panel, delta in zip(panels, DELTAS):
            for i, (entry, of_run) in enumerate(zip(entries, all_curves)):
                draw_curve(panel, i, of_run[str(delta)], entry[str(delta)])
            finish_curves(panel, delta, beside)
        handles = [panels[-1].plot([], [], **look(i))[0] for i in range(len(names))]
        drawn.legend(handles, names, loc="outside upper left", ncols=columns, handlelength=2.6)
    rows, first = [], entries[0]["name"]
    for key, what, digits in (
        ("maximum", "maximum, %", 1),
        ("flatness", "width within 95 %", 2),
        ("above_first", f"thresholds above {first}, %", 1),
        ("below_first", f"thresholds below {first}, %", 1),
    ):
        rows += [(f"IoU {iou}: {what}", [[e[str(iou)][key]] for e in entries], digits) for iou in DELTAS]
    print_numbers([entry["name"] for entry in entries], rows)
    write_json(with_suffix(args.out, ".json"), {"runs": entries})


def draw_curve(panel: Any, i: int, curve: Sequence[float], numbers: dict[str, Any]) -> None:
    """The curve of the i-th run, a marker at its maximum, and a band over the range of `flatness`."""
    thresholds, style = np.arange(LEVELS) / LEVELS, look(i)
    flat = "–" if numbers["flatness"] is None else f"{numbers['flatness']:.2f}"
    label = f"{numbers['maximum']:.1f}, {flat} wide"
    first, last = (round(threshold * LEVELS) for threshold in numbers["within_95_percent"])
    band = slice(first, last + 1)
    panel.plot(thresholds[band], curve[band], color=style["color"], linewidth=5, alpha=0.25)
    panel.plot(thresholds, curve, markevery=[round(numbers["threshold"] * LEVELS)], label=label, **style)


def finish_curves(panel: Any, delta: int, beside: bool) -> None:
    """Axes and legend of the panel for the IoU of `delta` percent."""
    panel.set(xlim=(0, 1), ylim=(0, 105), yticks=[0, 25, 50, 75, 100])
    title = {"title": f"IoU {delta / 100}", "title_fontproperties": {"weight": "bold"}}
    panel.legend(handlelength=2.6, ncols=1 if beside else 2, **title, **ABOVE)
    if beside or delta == DELTAS[-1]:
        panel.set_xlabel("threshold")
    if not beside or delta == DELTAS[0]:
        panel.set_ylabel("accuracy, %")


# ----------------------------------------------------------------------------------------- Fig. A2, histogram


def largest_norms(run: Run, args: argparse.Namespace) -> np.ndarray:
    """max_u F_u of each image of the split. Raises InputError where the network returns no features."""
    largest = []
    for batch in predictions(run, args):
        if batch.features is None:
            raise lacks(run, "no feature map")
        largest.append(feature_norm(batch.features).amax((1, 2)).cpu().numpy().astype(float))
    return np.concatenate(largest)


def histogram(args: argparse.Namespace) -> None:
    """Fig. A2: density over the split of the largest feature norm of an image, max_u F_u.

    Runs with the same name are pooled. Prints the mean, ± the sample deviation of the runs' means.
    """
    found: dict[str, list[np.ndarray]] = {}
    for run in open_runs(args):
        found.setdefault(run.name, []).append(largest_norms(run, args))
    values = [np.concatenate(of_name) for of_name in found.values()]
    edges = np.histogram_bin_edges(np.concatenate(values), bins=args.bins)
    entries = []
    with figure(args, 2.1 + 0.15 * len(values)) as drawn:
        panel = drawn.subplots()
        for i, (name, of_run) in enumerate(zip(found, values)):
            density = np.histogram(of_run, edges, density=True)[0]
            style, filled = look(i), np.flatnonzero(density)
            panel.stairs(density, edges, fill=True, color=style["color"], alpha=0.15)
            panel.stairs(density, edges, color=style["color"], linestyle=style["linestyle"], linewidth=1.2)
            markers = filled[:: max(1, len(filled) // 5)].tolist()  # about five
            panel.plot(
                (edges[:-1] + edges[1:]) / 2, density, markevery=markers, **(style | {"linestyle": "none"})
            )
            label = f"{shortened(name, args.width - 1)}: mean {of_run.mean():.3g}"
            panel.plot([], [], label=label, **style)
            numbers = {"mean": of_run.mean(), "median": float(np.median(of_run)), "deviation": of_run.std()}
            numbers["means_of_runs"] = [float(of_seed.mean()) for of_seed in found[name]]
            entries.append({"name": name, "images": len(of_run), **numbers, "density": density.tolist()})
        panel.set(xlabel=r"$\max_u\,\mathcal{F}_u$", ylabel="density", ylim=(0, None))
        panel.legend(**ABOVE)
    print_numbers([*found], [("mean of the largest F", [entry["means_of_runs"] for entry in entries], 2)])
    write_json(with_suffix(args.out, ".json"), {"edges": edges.tolist(), "runs": entries})


# ------------------------------------------------------------------------------------ Figs. A3 and A4, images


def chosen_images(runs: list[Run], args: argparse.Namespace) -> list[str]:
    """The ids to draw: --images, --random, or --worst or --best by the IoU of the first run's box."""
    split = runs[0].split
    if args.images:
        return args.images
    if not (args.worst or args.best):
        drawable = sorted(split.boxes) if args.command == "boxes" else range(len(split))
        order = np.random.default_rng(args.seed).permutation(drawable)
        return [split.ids[i] for i in sorted(order[: args.random or RANDOM].tolist())]
    level, ious = largest_level(runs[0], args), {}
    for batch in predictions(runs[0], args):
        for index, score_map in zip(batch.indices, score_maps(batch.maps, runs[0])):
            if index in split.boxes:
                box = level_boxes(score_map).largest[level]
                ious[index] = float(iou_matrix(box, runs[0].truth(index)).max())
    order = sorted(ious, key=lambda index: (ious[index] if args.worst else -ious[index], index))
    return [split.ids[i] for i in order[: args.worst or args.best]]


def largest_level(run: Run, args: argparse.Namespace) -> int:
    """The level that evaluate.py chose for the boxes of the largest contour, one for the whole split."""
    path, result = read_results(run.folder, args.checkpoint, args.split)
    if result["curves"] is None:
        raise InputError(f"{path}: {result['dataset']} has no boxes to draw: use maps")
    return round(result["thresholds"]["largest"] * LEVELS)


def map_cells(run: Run, args: argparse.Namespace, images: list[str]) -> dict[str, list[Image.Image]]:
    """{image id: pictures of CAM, F and S}."""
    cells = {}
    for batch in predictions(run, args, [run.index_of(image) for image in images]):
        _, F, S = factors(run, batch)
        arrays = (maps.float().cpu().numpy() for maps in (batch.maps, F, S))
        for index, M, F_u, S_u in zip(batch.indices, *arrays):
            cells[run.split.ids[index]] = [
                drawing.draw_map(M, args.cell, run.method.upsampling),
                drawing.draw_map(F_u, args.cell),
                drawing.draw_signed(S_u, args.cell),
            ]
    return cells


def maps(args: argparse.Namespace) -> None:
    """Fig. A3: image, CAM, F, S. CAM and F have a scale per map; S is on [-1, 1] in all maps."""
    runs = open_runs(args)
    images = chosen_images(runs, args)
    cells = [map_cells(run, args, images) for run in runs]
    pictures = {image: load_rgb(runs[0].split.path(runs[0].index_of(image)), args.cell) for image in images}
    names = [run.name for run in runs]
    if args.below or len(runs) > 2:
        rows = [[None, *of_run[image]] for image in images for of_run in cells]
        for row, image in zip(rows[:: len(runs)], images):
            row[0] = pictures[image]
        columns, layout = MAPS, {"names": names * len(images), "group_rows": len(runs)}
    else:
        rows = [[pictures[image], *(cell for of_run in cells for cell in of_run[image])] for image in images]
        columns, layout = MAPS * len(runs), {"groups": [("", 1), *((name, 3) for name in names)]}
    print("images:", " ".join(images))
    foot = {"foot": drawing.colour_bars, "foot_lines": 2}
    picture = drawing.grid(rows, columns=["image", *columns], **layout, **foot)
    drawing.save_picture(picture, args.out)


def box_cells(run: Run, args: argparse.Namespace, images: list[str]) -> tuple[dict[str, Image.Image], list]:
    """({image id: picture}, [{"run", "image", "box", "truth", "iou"}]), boxes in pixels of the score map."""
    level, indices = largest_level(run, args), [run.index_of(image) for image in images]
    for image, index in zip(images, indices):
        if index not in run.split.boxes:
            raise InputError(f"{image}: no box in {run.split.name}: choose other images with --images")
    cells, numbers = {}, []
    for batch in predictions(run, args, indices):
        for index, score_map in zip(batch.indices, score_maps(batch.maps, run)):
            image, predicted = run.split.ids[index], level_boxes(score_map).largest[level]
            picture, truth = load_rgb(run.split.path(index), args.cell), run.truth(index)
            cells[image] = drawing.localization(picture, score_map, predicted, truth)
            of_image = {"box": predicted.tolist(), "truth": truth.tolist()}
            iou = float(iou_matrix(predicted, truth).max())
            numbers.append({"run": run.name, "image": image, **of_image, "iou": iou})
    return cells, numbers


def boxes(args: argparse.Namespace) -> None:
    """Fig. A4: ground truth, box of the largest contour at the threshold of the split, and CAM."""
    runs = open_runs(args)
    images = chosen_images(runs, args)
    drawn = [box_cells(run, args, images) for run in runs]
    blocks = [images[start : start + args.columns] for start in range(0, len(images), args.columns)]
    rows = [[cells[image] for image in block] for block in blocks for cells, _ in drawn]
    names = [run.name for run in runs] * len(blocks)
    picture = drawing.grid(rows, names=names, group_rows=len(runs), foot=drawing.box_legend)
    print("images:", " ".join(images))
    write_json(with_suffix(args.out, ".json"), {"boxes": [entry for _, of_run in drawn for entry in of_run]})
    drawing.save_picture(picture, args.out)


# --------------------------------------------------------------------------------------------- Fig. A5, sweep


def sweep(args: argparse.Namespace) -> None:
    """Fig. A5: accuracy against the value of a hyperparameter, one panel per file; a star at the preset."""
    files = [read_sweep(path) for path in args.files]
    columns = min(len(files), max(1, int(args.width // 2.2)))
    count = math.ceil(len(files) / columns)
    titled = len({file["title"] for file in files}) > 1
    several_seeds = any(len(file["values"][0][file["metric"]]) > 1 for file in files)
    # One line of legend fits into 2.2 inches.
    height = count * (2.2 + 0.15 * (titled + (columns > 1 and several_seeds)))
    with figure(args, height) as drawn:
        panels = drawn.subplots(count, columns, squeeze=False, sharey=not titled).flatten()
        for panel, file in zip(panels, files):
            draw_sweep(panel, file)
            title = {"title": file["title"], "alignment": "left"} if titled else {}
            panel.legend(ncols=2 if columns == 1 else 1, **ABOVE, **title)
        for panel in panels[len(files) :]:
            panel.set_visible(False)


def draw_sweep(panel: Any, file: dict[str, Any]) -> None:
    """The mean over the seeds; with several seeds, bars of the sample deviation."""
    preset, values = file["preset"], [row["value"] for row in file["values"]]
    results = [row[file["metric"]] for row in file["values"]]
    mean, seeds = [np.mean(of_value) for of_value in results], len(results[0])
    panel.axvline(preset, color="0.35", linestyle=":", linewidth=1, label=f"preset: {preset:g}")
    if seeds > 1:
        deviation = [np.std(of_value, ddof=1) for of_value in results]
        label = f"mean ± deviation, {seeds} seeds"
        panel.errorbar(values, mean, deviation, capsize=2, label=label, **look(0))
    else:
        panel.plot(values, mean, **look(0))
    if preset in values:
        star = {"markersize": 13, "color": LOOKS["color"][1], "zorder": 3}
        panel.plot([preset], [mean[values.index(preset)]], "*", **star)
    panel.set(xlabel=param_label(file["param"]), ylabel=f"{SWEPT[file['metric']]}, %")
    panel.margins(y=0.15)


def param_label(param: str) -> str:
    """The paper's symbol in TeX: for lambda_sim a lambda with the index sim. Other names stay as they are."""
    symbol, _, index = param.partition("_")
    if symbol in ("lambda", "tau", "gamma"):
        return rf"$\{symbol}" + (rf"_{{\mathrm{{{index}}}}}$" if index else "$")
    return param.replace("_", " ")


# -------------------------------------------------------------------------------------------------------- gap

GAP = {
    "S_inside": "S inside",
    "S_outside": "S outside",
    "F_hat_inside": "F-hat inside",
    "F_hat_outside": "F-hat outside",
    "S_negative_inside": "inside with S < 0, %",
}
REGIONS = ("box", "mask", "part")


def regions(run: Run, index: int, shape: tuple[int, int]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{"box" | "mask" | "part": (inside, outside)}, h x w bool, as far as the image has them.

    A location is inside where its centre is. The ignore region of a mask is neither inside nor outside.
    A part is a mask in the data set's folder parts/ (parts/ID.png), as the heads of the demo's birds.
    Outside of a part is the rest of the object.
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


def region_numbers(
    F_hat: np.ndarray, S: np.ndarray, inside: np.ndarray, outside: np.ndarray
) -> dict[str, float]:
    """Means of the maps (h x w) of one image over its regions, and the percentage of S < 0 inside.

    The keys are those of GAP. An empty region has no numbers.
    """
    numbers = {}
    for where, region in (("inside", inside), ("outside", outside)):
        if region.any():
            numbers |= {f"S_{where}": float(S[region].mean()), f"F_hat_{where}": float(F_hat[region].mean())}
    if inside.any():
        numbers["S_negative_inside"] = 100 * float((S[inside] < 0).mean())
    return numbers


def gap_of(run: Run, args: argparse.Namespace) -> dict[str, Any]:
    """The numbers of one run: means over images of the means over locations; metrics of CAM, F and S."""
    numbers: dict[str, dict[str, list[float]]] = {}
    kept: list[tuple[list[int], tuple[Tensor, ...]]] = []  # h x w: the maps of a split fit in memory
    for batch in predictions(run, args):
        _, F, S = factors(run, batch)
        kept.append((batch.indices, tuple(values.float().cpu() for values in (batch.maps, F, S))))
        for index, F_hat, S_u in zip(batch.indices, minmax(F).cpu().numpy(), S.cpu().numpy()):
            for kind, (inside, outside) in regions(run, index, S_u.shape).items():
                for name, value in region_numbers(F_hat, S_u, inside, outside).items():
                    numbers.setdefault(kind, {}).setdefault(name, []).append(value)

    means = dict.fromkeys(REGIONS)
    for kind, values in numbers.items():
        means[kind] = {name: float(np.mean(values[name])) if name in values else None for name in GAP}
        means[kind]["images"] = len(values.get("S_inside", ()))
    localized = {}
    for i, (name, mode) in enumerate(zip(MAPS, (None, "bicubic", "bicubic"))):
        batches = (MapBatch(indices, score_maps(values[i], run, mode)) for indices, values in kept)
        metrics = evaluate_maps(batches, run.split, workers=args.workers)["metrics"]
        localized[name] = {key: metrics[key] for key in ("max_box_acc_v2", "max_box_acc", "pxap")}
    head = {"name": run.name, "run": str(run.folder), "split": args.split, "checkpoint": args.checkpoint}
    images = sum(len(indices) for indices, _ in kept)
    return {**head, "images": images, **means, "localization": localized}


def gap(args: argparse.Namespace) -> None:
    """The gap between classification and localization in numbers: prints a table, and writes JSON.

    Runs with the same name share a column: mean ± sample deviation.
    """
    found, rows = [gap_of(run, args) for run in open_runs(args)], []
    names = list(dict.fromkeys(entry["name"] for entry in found))

    def add(label: str, values: list[float | None], digits: int) -> None:
        of_runs = [(entry["name"], value) for entry, value in zip(found, values)]
        rows.append((label, [[value for of, value in of_runs if of == name] for name in names], digits))

    for kind in REGIONS:
        for key, label in GAP.items():
            values = [(entry[kind] or {}).get(key) for entry in found]
            add(f"{label} ({kind})", values, 1 if "%" in label else 3)
    for label, key in (("MaxBoxAccV2", "max_box_acc_v2"), ("PxAP", "pxap")):
        for name in MAPS:
            values = [entry["localization"][name][key] for entry in found]
            add(f"{label} by {name}", [v["mean"] if isinstance(v, dict) else v for v in values], 1)
    print_numbers(names, rows)
    write_json(with_suffix(args.out, ".json"), {"runs": found})


# ----------------------------------------------------------------------------------------------- command line

PNG_PDF, JSON = (".png", ".pdf"), (".json",)
COMMANDS = {  # function, files, help
    "curves": (curves, PNG_PDF + JSON, "Fig. A1: accuracy against the threshold"),
    "histogram": (histogram, PNG_PDF + JSON, "Fig. A2: density of the largest feature norm"),
    "maps": (maps, PNG_PDF, "Fig. A3: image, CAM, F, S"),
    "boxes": (boxes, PNG_PDF + JSON, "Fig. A4: boxes and CAM"),
    "sweep": (sweep, PNG_PDF, "Fig. A5: GT-known Loc (all contours) against a hyperparameter"),
    "gap": (gap, JSON, "means of F-hat and S inside and outside the object, metrics of CAM, F and S"),
}
LEAST = {"cell": 16, "dpi": 10, "workers": 0, "seed": 0}  # values of flags; 1 for the others
MOST = {"width": 100, "dpi": 10_000, "cell": 10_000}  # they stay below; the others below 10**6


def add_flags(sub: argparse.ArgumentParser, command: str) -> None:
    """The flags of one command."""
    add, needs_network = sub.add_argument, command in ("histogram", "maps", "boxes", "gap")
    if command == "sweep":
        add("files", nargs="+", type=Path, metavar="FILE", help="JSON files of experiments sweep")
    else:
        files = ", or results files of evaluate.py" if command == "curves" else ""
        add("runs", nargs="+", type=Path, metavar="RUN", help=f"folders that train.py wrote{files}")
        add("--names", nargs="+", metavar="NAME", help="a name per run (default: the folders' names)")
        add("--split", choices=("test", "val"), default="test", help="default test")
        add("--checkpoint", choices=("best", "last"), default="best", help="default best")
    if needs_network:
        add("--data-root", type=Path, metavar="DIR", help="default: the run's")
        add("--splits", type=Path, metavar="DIR", help="default: the run's")
        add("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, ...")
        add("--amp", choices=("auto", "bf16", "off"), help="default: the run's")
        add("--batch-size", type=int, default=32, metavar="N", help="images per batch (default 32)")
        workers = "processes that load images (default: one per CPU core, at most 8)"
        add("--workers", type=int, default=default_workers(), metavar="N", help=workers)
    if command in ("maps", "boxes"):
        choose = sub.add_mutually_exclusive_group().add_argument
        choose("--images", nargs="+", metavar="ID", help="ids as in the split's image_ids.txt")
        choose("--worst", type=int, metavar="N", help="N images with the lowest IoU of the first run's box")
        choose("--best", type=int, metavar="N", help="N images with the highest IoU of the first run's box")
        choose("--random", type=int, metavar="N", help=f"N random images (the default, with N = {RANDOM})")
        add("--seed", type=int, default=0, help="seed of --random (default 0)")
        add("--cell", type=int, default=224, metavar="PIXELS", help="side of an image (default 224)")
    if command in ("curves", "histogram", "sweep"):
        width = f"width of the figure: {COLUMN} for a column (default), {PAGE} for a page"
        add("--width", type=float, default=COLUMN, metavar="INCHES", help=width)
        add("--dpi", type=int, default=drawing.DPI, help=f"resolution of the PNG (default {drawing.DPI})")
    if command == "curves":
        add("--normalize", choices=cam.NORMALIZATIONS, default="minmax", help="default minmax")
    elif command == "histogram":
        add("--bins", type=int, default=40, metavar="N", help="number of bins (default 40)")
    elif command == "maps":
        add("--below", action="store_true", help="one run below the other (always with three or more runs)")
    elif command == "boxes":
        add("--columns", type=int, default=4, metavar="N", help="images per row (default 4)")
    text = f"files to write, without suffix (default figures/{command})"
    add("--out", type=Path, metavar="PATH", help=text)
    add("--quiet", action="store_true", help="show no progress")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The flags; `out` is a path without suffix. Raises InputError for a value out of range."""
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="python -m bridge_wsol.figures", description=__doc__, formatter_class=form)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (_, _, what) in COMMANDS.items():
        add_flags(commands.add_parser(name, help=what, description=what, allow_abbrev=False), name)
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        least, most = LEAST.get(name, 1), MOST.get(name, 10**6)
        if type(value) in (int, float) and not least <= value < most:
            parser.error(f"--{name.replace('_', '-')} {value}: must be at least {least}, and below {most}")
    if args.out is None:
        args.out = Path("figures") / args.command
    elif args.out.suffix in (".png", ".pdf", ".json"):
        args.out = args.out.with_suffix("")
    return args


def main(argv: list[str] | None = None) -> None:
    """Draws one figure and prints the paths of its files."""
    args = parse_args(argv)
    Progress.quiet = args.quiet
    if args.command in ("curves", "histogram", "sweep"):
        require_matplotlib()  # before the forward passes
    if args.command in ("curves", "histogram", "gap"):
        check_pools(args)
    command, suffixes, _ = COMMANDS[args.command]
    command(args)
    for suffix in suffixes:
        print(f"written to {with_suffix(args.out, suffix)}")


if __name__ == "__main__":
    with one_line_errors():
        main()
