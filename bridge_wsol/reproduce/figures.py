"""Draws the figures of the appendix from finished runs, and prints their numbers. Trains nothing.

A run is a folder that train.py wrote. `curves` also takes results files of evaluate.py (any method's score
maps), `sweep` takes JSON files of `experiments.sweep`. `curves`, `histogram` and `gap` take runs with the
same name in --names as one: seeds of the same configuration. A figure goes to figures/COMMAND.png and .pdf
(`boxes`: .png), or where --out says. All but `maps`, `sweep` and `losses` write their numbers as JSON, too.
The same input gives the same bytes. matplotlib is the extra `figures`; `boxes` and `gap` do without.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .. import cam, utils
from ..boxes import LEVELS, iou_matrix, level_boxes, scale_boxes
from ..data import Masks, Split, eval_loader, load_masks, open_rgb, to_input
from ..evaluation import MapBatch, TrainedRun, evaluate_maps, read_results
from ..localize import draw_split
from ..losses import feature_norm, minmax
from ..metrics import DELTAS, band, flat, flatness
from ..utils import InputError, Value, atomic_write, autocast, progress, user_path
from .experiments import LEADING, METRICS, SWEPT, Row, check_pools, markdown, names_of, read_sweep, spread

Flags = argparse.Namespace  # of the command line
COLUMN, PAGE, DPI = 3.3, 6.9, 300  # widths of a column and of the text of a page, in inches; resolution
RANDOM = 4  # images that maps and boxes draw without a choice
MAPS = ("CAM", "F", "S")
Maps = tuple[list[int], dict[str, Tensor]]  # of `map_batches`
Regions = dict[str, tuple[np.ndarray, np.ndarray]]  # of `regions`


# ------------------------------------------------------------------------------------------------- matplotlib

STYLE = {
    **{"font.size": 8, "axes.titlesize": "medium", "figure.labelsize": "medium", "legend.handlelength": 2.6},
    **dict.fromkeys(("legend.fontsize", "xtick.labelsize", "ytick.labelsize"), "small"),
    **{"lines.linewidth": 1.2, "lines.markersize": 5, "axes.linewidth": 0.6, "axes.axisbelow": True},
    **{"axes.grid": True, "grid.linewidth": 0.4, "grid.alpha": 0.5, "pdf.fonttype": 42},
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    "text.parse_math": False,  # a $ in a name is no formula
}
# The colours of Okabe and Ito. Line style and marker tell runs apart in print without colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
# The place of a legend above its panel: inside, the curves may pass through every place.
ABOVE = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.2}


def has_matplotlib() -> bool:
    """Whether the extra `figures` is installed."""
    return find_spec("matplotlib") is not None


def look(i: int) -> dict[str, Any]:
    """Colour and line style of the i-th run."""
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": LINES[i % len(LINES)]}


@contextmanager
def figure(args: Flags, height: float, crop: bool = False) -> Iterator[Any]:
    """Yields a matplotlib figure, --width x `height` inches, then saves it as --out.png and .pdf.

    The files hold no dates, and the user's settings of matplotlib have no effect.
    """
    os.environ.pop("MPLBACKEND", None)  # of a notebook: no backend is used here, and its may be missing
    import matplotlib
    from matplotlib.figure import Figure

    undated = {"png": {"Software": None}, "pdf": dict.fromkeys(("CreationDate", "Creator", "Producer"))}
    size = {"bbox_inches": "tight", "pad_inches": 0.02} if crop else {}
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        drawn = Figure(figsize=(args.width, height), dpi=args.dpi, layout="compressed")
        yield drawn
        for kind, metadata in undated.items():
            with atomic_write(Path(f"{args.out}.{kind}")) as part:
                drawn.savefig(part, format=kind, metadata=metadata, **size)
            print(f"written to {args.out}.{kind}")


@contextmanager
def panel_grid(args: Flags, n: int, height: float, **share: bool) -> Iterator[tuple[Any, Sequence[Any]]]:
    """Yields a `figure` and its n panels, `height` inches each, as many in a row as --width takes."""
    columns = min(n, max(1, int(args.width // 2.2)))
    rows = math.ceil(n / columns)
    with figure(args, height * rows) as drawn:
        panels = drawn.subplots(rows, columns, squeeze=False, **share)
        yield drawn, panels.flat[:n]
        for panel in panels.flat[n:]:
            panel.set_visible(False)


def print_numbers(names: list[str], rows: dict[str, tuple[list[float | None], int]]) -> None:
    """Prints mean ± deviation of the runs of each name. rows: {label: (value of each run, decimals)}."""
    columns, cells = list(dict.fromkeys(names)), []
    for label, (values, digits) in rows.items():
        known = [(name, value) for name, value in zip(names, values) if value is not None]
        if known:
            cells.append([label, *(spread([x for of, x in known if of == name], digits) for name in columns)])
    print(markdown(["", *columns], cells), end="")


# ------------------------------------------------------------------------------------------------------- runs


class OpenRun(NamedTuple):
    """A trained run and the images of a split."""

    name: str
    trained: TrainedRun
    split: Split
    size: int  # side of the score maps in pixels
    ids: dict[str, int]  # image id -> index, of the images that the command can draw

    def take(self, images: list[str]) -> Split:
        """The images with these ids, in this order. Raises InputError for an id that cannot be drawn."""
        if wrong := [image for image in images if image not in self.ids]:
            what = f"no such image, or no box, in {self.split.name}"
            raise InputError(f"--images {wrong[0]}: {what}: pass ids like {next(iter(self.ids), None)}")
        return self.split.take([self.ids[image] for image in images], self.split.name)


def open_runs(args: Flags) -> list[OpenRun]:
    """The runs with the images of --split. Raises InputError for a folder that is no run."""
    runs, device = [], utils.resolve_device(args.device)
    args.workers = utils.default_workers(device) if args.workers is None else args.workers
    places = {name: vars(args)[name] for name in ("data_root", "lists", "amp", "batch_size", "workers")}
    for folder, name in zip(args.runs, names_of(args)):
        trained = TrainedRun(folder, args.checkpoint, device, **places)
        split = trained.split(args.split)
        drawable = sorted(split.boxes) if args.command == "boxes" else range(len(split))
        ids = {split.ids[i]: i for i in drawable}
        runs.append(OpenRun(name, trained, split, trained.config.image_size, ids))
    return runs


@torch.inference_mode()
def map_batches(run: OpenRun, args: Flags, split: Split, names: Sequence[str] = MAPS) -> Iterator[Maps]:
    """(indices, {name: maps}) of each batch of a split, in order: N x h x w float32, unbounded, on the CPU.

    CAM is the method's map of the ground-truth class, F and S are the factors of w_y . f_u. Raises InputError
    where there is no S: for a method without a linear classifier over its features.
    """
    trained, method, device = run.trained, run.trained.method, run.trained.device
    fc, loader = getattr(method.net, "fc", None), eval_loader(split, args.batch_size, run.size, args.workers)
    for images, labels, indices in progress(loader, run.name, len(loader), "batches"):
        images, labels, found = to_input(images, device), labels.to(device), {}
        with autocast(device, trained.amp):
            features = method.passes(images).features
            if "CAM" in names:
                found["CAM"] = method.predict(images, labels)[1]
        found["F"] = feature_norm(features)
        if "S" in names:
            if not isinstance(fc, nn.Linear) or fc.in_features != features.shape[1]:
                problem = f"--method {trained.config.method} has no linear classifier over its features"
                fix = "so its map has no factors F and S: pass a run of another method"
                raise InputError(f"{trained.folder}: {problem}, {fix}")
            found["S"] = cam.decompose(features, fc.weight, labels).S
        yield indices.tolist(), {name: maps.float().cpu() for name, maps in found.items()}


def resized(run: OpenRun, name: str, maps: Tensor) -> Tensor:
    """One of MAPS at the image size: N x h x w -> N x size x size, unbounded."""
    return cam.resize(maps, run.size, run.trained.method.upsampling if name == "CAM" else "bicubic")


# ---------------------------------------------------------------------- Figs. A1 and A2, curves and histogram


Curves = dict[str, np.ndarray]  # IoU in percent -> 255 values, or 2 x 255


def read_curves(args: Flags) -> list[tuple[dict[str, Any], Curves, Curves]]:
    """(numbers, curves, intervals) of each name; a curve is the mean over the runs with that name.

    The intervals are those of `metrics.band`, where all runs of the name have files per image.
    Numbers of each IoU: the maximum in percent, its threshold, the range of thresholds that `flatness` finds,
    and the percent of the thresholds at which the curve is above or below the first name's. Raises InputError
    for results without boxes.
    """
    rows: dict[str, Row] = {}
    for run, name in zip(args.runs, names_of(args)):
        path, result = read_results(run, args.checkpoint, args.split, args.normalize)
        if result["curves"] is None:
            raise InputError(f"{path}: {result['dataset']} has no boxes, so no curves: use maps or gap")
        rows.setdefault(name, Row(name)).results.append(result | {"path": path})
    found: list[tuple[dict[str, Any], Curves, Curves]] = []
    for name, row in rows.items():
        entry: dict[str, Any] = {"name": name, "results": [str(result["path"]) for result in row.results]}
        of_seeds = [result["curves"] for result in row.results]
        means = {str(iou): np.mean([x[str(iou)] for x in of_seeds], axis=0) for iou in DELTAS}
        found.append((entry, means, band(*row.per_image) if row.has_files else {}))
        for iou, curve in means.items():
            (first, last, width), top = flatness(curve), int(np.argmax(curve))
            apart = np.round(curve - found[0][1][iou], 9)  # the means of equal counts can differ by 1e-14
            entry[iou] = {
                "maximum": float(curve[top]),
                "threshold": top / LEVELS,
                "within_95_percent": [first / LEVELS, last / LEVELS],
                "flatness": width,
                "above_first": 100 * float((apart > 0).mean()),
                "below_first": 100 * float((apart < 0).mean()),
            }
    return found


def curves(args: Flags) -> dict[str, Any]:
    """Fig. A1: accuracy against the threshold.

    A marker shows each maximum (of one run: MaxBoxAccV2 at that IoU), a thick line the range of `flatness`
    around it, a band the 95 % interval over images, at each threshold by itself.
    Prints the numbers of claim C.1: maximum, `flatness`, and the share of thresholds above the first run.
    """
    found = read_curves(args)
    entries = [entry for entry, *_ in found]
    names, thresholds = [entry["name"] for entry in entries], np.arange(LEVELS) / LEVELS
    rows, columns = (1, 3) if args.width > 5 else (3, 1)
    lines = 0.13 * len(names)  # height of a legend
    with figure(args, rows * (1.6 + lines) + lines + 0.2) as drawn:
        panels = drawn.subplots(rows, columns, sharex=True, sharey=True)
        for panel, delta in zip(panels.flat, DELTAS):
            handles = []
            for i, (entry, of_run, bounds) in enumerate(found):
                curve, numbers = of_run[str(delta)], entry[str(delta)]
                at = numbers["threshold"], *numbers["within_95_percent"]
                top, first, last = (round(threshold * LEVELS) for threshold in at)
                near, colour = slice(first, last + 1), look(i)["color"]
                panel.plot(thresholds[near], curve[near], color=colour, linewidth=5, alpha=0.25)
                if bounds:
                    panel.fill_between(thresholds, *bounds[str(delta)], color=colour, alpha=0.15, linewidth=0)
                width = "–" if numbers["flatness"] is None else f"{numbers['flatness']:.2f}"
                marker = {"marker": MARKERS[i % len(MARKERS)], "markevery": [top]}
                label = f"{numbers['maximum']:.1f}, {width} wide"
                handles += panel.plot(thresholds, curve, label=label, **marker, **look(i))
            panel.set(xlim=(0, 1), ylim=(0, 105), yticks=[0, 25, 50, 75, 100])
            panel.set_title(f"IoU {delta / 100}", loc="right")
            panel.legend(**ABOVE)
        drawn.legend(handles, names, loc="outside upper left", ncols=columns)
        drawn.supxlabel("threshold")
        drawn.supylabel("accuracy, %")
    table = {}
    for key, what, digits in (
        ("maximum", "maximum, %", 1),
        ("flatness", "width within 95 %", 2),
        ("above_first", f"thresholds above {names[0]}, %", 1),
        ("below_first", f"thresholds below {names[0]}, %", 1),
    ):
        table |= {f"IoU {iou}: {what}": ([e[str(iou)][key] for e in entries], digits) for iou in DELTAS}
    print_numbers(names, table)
    return {"runs": entries}


def histogram(args: Flags) -> dict[str, Any]:
    """Fig. A2: density of the largest feature norm.

    Of each image, max_u F_u. Runs with the same name are pooled. Prints the mean, ± the sample deviation of
    the runs' means.
    """
    found: dict[str, list[np.ndarray]] = {}
    for run in open_runs(args):
        largest = [maps["F"].amax((1, 2)) for _, maps in map_batches(run, args, run.split, ["F"])]
        found.setdefault(run.name, []).append(torch.cat(largest).numpy().astype(float))
    edges = np.histogram_bin_edges(np.concatenate(sum(found.values(), [])), bins=args.bins)
    entries, names, means = [], [], []
    with figure(args, 2 + 0.13 * len(found)) as drawn:
        panel = drawn.subplots()
        for i, (name, runs) in enumerate(found.items()):
            pooled, of_runs = np.concatenate(runs), [float(of_run.mean()) for of_run in runs]
            density = np.histogram(pooled, edges, density=True)[0]
            panel.stairs(density, edges, fill=True, color=look(i)["color"], alpha=0.15)
            panel.stairs(density, edges, linewidth=1.2, label=f"{name}: mean {pooled.mean():.3g}", **look(i))
            entry = {"name": name, "images": len(pooled), "mean": pooled.mean()}
            entry |= {"median": float(np.median(pooled)), "deviation": pooled.std()}
            entries.append(entry | {"means_of_runs": of_runs, "density": density.tolist()})
            names, means = names + [name] * len(runs), means + of_runs
        panel.set_xlabel(r"$\max_u\,\mathcal{F}_u$", parse_math=True)
        panel.set(ylabel="density", ylim=(0, None))
        panel.legend(**ABOVE)
    print_numbers(names, {"mean of the largest F": (means, 2)})
    return {"edges": edges.tolist(), "runs": entries}


# ------------------------------------------------------------------------------------ Figs. A3 and A4, images


def chosen_images(run: OpenRun, args: Flags) -> list[str]:
    """The ids to draw, which are printed: --images, --random, or --worst or --best by the IoU of the box."""
    split, chosen = run.split, args.images
    if args.worst or args.best:
        maps = run.trained.maps(split)
        batches = progress(maps, run.name, math.ceil(len(split) / args.batch_size), "batches")
        ious = {i: entry["iou"] for i, entry in found_boxes(split, chosen_level(run, args), batches)}
        order = sorted(ious, key=lambda i: (ious[i] if args.worst else -ious[i], i))
        chosen = [split.ids[i] for i in order[: args.worst or args.best]]
    elif not chosen:
        order = np.random.default_rng(args.seed).permutation([*run.ids.values()])
        chosen = [split.ids[i] for i in sorted(order[: args.random or RANDOM].tolist())]
    print("images:", " ".join(chosen))
    return chosen


def chosen_level(run: OpenRun, args: Flags) -> int:
    """The level of the largest contour in the results file of --split. Raises InputError without boxes."""
    path, result = read_results(run.trained.folder, args.checkpoint, args.split)
    if result["curves"] is None:
        raise InputError(f"{path}: {result['dataset']} has no boxes to draw: use maps")
    return round(result["thresholds"]["largest"] * LEVELS)


def found_boxes(split: Split, level: int, batches: Iterable[MapBatch]) -> Iterator[tuple[int, dict]]:
    """(index, {"box", "truth", "iou"}) of each image with boxes: box of the largest contour, its best IoU.

    Boxes are in pixels of the score map, both corners inside.
    """
    for batch in batches:
        for index, score_map in zip(batch.indices, batch.maps):
            if index in split.boxes:
                box = level_boxes(score_map).largest[level]
                truth = scale_boxes(split.boxes[index], tuple(split.sizes[index]), len(score_map))
                iou = float(iou_matrix(box, truth).max())
                yield index, {"box": box.tolist(), "truth": truth.tolist(), "iou": iou}


def maps(args: Flags) -> None:
    """Fig. A3: image, CAM, F, S.

    CAM and F have a scale per map; S is on [-1, 1] in all maps.
    """
    runs = open_runs(args)
    images = chosen_images(runs[0], args)
    below = len(runs) > 2  # one run below the other, else beside it
    step = len(runs) if below else 1  # rows per image
    rows, columns = len(images) * step, 4 if below else 1 + 3 * len(runs)
    with figure(args, args.width * rows / columns + 0.9, crop=True) as drawn:
        drawn.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
        panels = drawn.subplots(rows, columns, squeeze=False)
        for panel in panels.flat:
            panel.set(xticks=[], yticks=[], box_aspect=1)
            panel.spines[:].set_visible(False)
        panels[0, 0].set_title("image")
        for panel, path in zip(panels[::step, 0], map(runs[0].take(images).path, range(len(images)))):
            panel.imshow(open_rgb(path, upright=runs[0].split.upright), aspect="auto")
        for r, run in enumerate(runs):
            block = panels[r::step, 1:] if below else panels[:, 1 + 3 * r : 4 + 3 * r]
            shown = draw_maps(block, run, args, run.take(images))
            for panel, name in zip(() if below and r else block[0], MAPS):
                panel.set_title(f"{run.name}\n{name}" if name == "F" and not below else name)
            for panel in panels[r::step, 0] if below else ():
                panel.set_ylabel(run.name)
        middle, bar = columns // 2, {"location": "bottom", "aspect": 30, "shrink": 0.9}
        own = drawn.colorbar(shown[0], ax=panels[:, :middle], label="CAM, F", **bar)
        own.set_ticks([0, 1], labels=["min", "max"])
        drawn.colorbar(shown[1], ax=panels[:, middle:], label="S", ticks=[-1, 0, 1], **bar)


def draw_maps(panels: np.ndarray, run: OpenRun, args: Flags, split: Split) -> tuple[Any, Any]:
    """CAM, F and S of each image of a split in a row of panels. Returns the pictures of an F and an S."""
    for indices, found in map_batches(run, args, split):
        M, F, S = (resized(run, name, found[name]) for name in MAPS)
        shown = (values.numpy() for values in (cam.normalize(M), cam.normalize(F), S.clamp(-1, 1)))
        for index, *scaled, S_u in zip(indices, *shown):
            for panel, values in zip(panels[index], scaled):
                own = panel.imshow(values, cmap="plasma", vmin=0, vmax=1)
            # Blue, grey, yellow for S = -1, 0, 1: the lightness grows, a grey print shows the sign, too.
            shared = panels[index, 2].imshow(S_u, cmap="cividis", vmin=-1, vmax=1)
            if S_u.min() < 0 < S_u.max():
                panels[index, 2].contour(S_u, [0], colors="black", linewidths=0.8)
    return own, shared


def boxes(args: Flags) -> dict[str, Any]:
    """Fig. A4: ground truth, predicted box and CAM.

    The box is that of the largest contour, at the threshold of the split. One PNG per run: OUT.png, with
    several runs OUT_NAME.png.
    """
    runs, numbers = open_runs(args), []
    if len({run.name for run in runs}) < len(runs):
        raise InputError("--names: each run has its own picture: pass a name of its own for each")
    images = chosen_images(runs[0], args)
    for run in runs:
        split, level = run.take(images), chosen_level(run, args)
        batches = [*run.trained.maps(split)]
        path = Path(f"{args.out}_{run.name}.png" if len(runs) > 1 else f"{args.out}.png")
        draw_split(path, split, batches, level, args.columns)
        for index, entry in found_boxes(split, level, batches):
            numbers.append({"run": run.name, "image": images[index], **entry})
    return {"boxes": numbers}


# --------------------------------------------------------------------------------------------- Fig. A5, sweep


def sweep(args: Flags) -> None:
    """Fig. A5: accuracy against the value of a hyperparameter, one panel per file; a star at the preset."""
    files = [read_sweep(path) for path in args.files]
    titled = len({file["title"] for file in files}) > 1
    with panel_grid(args, len(files), 2.3, sharey=not titled) as (_, panels):
        for panel, file in zip(panels, files):
            draw_sweep(panel, file)
            panel.legend(title=file["title"] if titled else None, alignment="left", **ABOVE)


def draw_sweep(panel: Any, file: dict[str, Any]) -> None:
    """The mean over the seeds; with several seeds, bars of the sample deviation."""
    preset, values = file["preset"], [row["value"] for row in file["values"]]
    results = [row[file["metric"]] for row in file["values"]]
    mean, seeds = [np.mean(of_value) for of_value in results], len(results[0])
    panel.axvline(preset, color="0.35", linestyle=":", linewidth=1, label=f"preset: {preset:g}")
    bars = np.std(results, axis=1, ddof=1) if seeds > 1 else None
    label = f"mean ± deviation, {seeds} seeds" if seeds > 1 else None
    panel.errorbar(values, mean, bars, capsize=2, label=label, marker="o", **look(0))
    if preset in values:
        panel.plot(preset, mean[values.index(preset)], "*", markersize=13, color=COLOURS[1], zorder=3)
    symbol, _, index = file["param"].partition("_")  # the paper's symbol in TeX, for lambda, tau and gamma
    tex = rf"$\{symbol}" + (rf"_{{\mathrm{{{index}}}}}$" if index else "$")
    greek = symbol in ("lambda", "tau", "gamma")
    panel.set_xlabel(tex if greek else file["param"].replace("_", " "), parse_math=greek)
    panel.set_ylabel(f"{SWEPT[file['metric']]}, %")
    panel.margins(y=0.15)


# -------------------------------------------------------------------------------------------------------- gap

GAP = {
    "S_inside": "S inside",
    "S_outside": "S outside",
    "F_hat_inside": "F-hat inside",
    "F_hat_outside": "F-hat outside",
    "S_negative_inside": "inside with S < 0, %",
}
REGIONS = ("box", "mask", "part")


def regions(split: Split, index: int, size: int, shape: tuple[int, int]) -> Regions:
    """{"box" | "mask" | "part": (inside, outside)}, h x w bool, as far as the image has them.

    size: side of the score maps in pixels. shape: h, w of the feature map. A location is inside where its
    centre is. The ignore region of a mask is neither inside nor outside. A part is a mask in the data set's
    folder parts/ (parts/ID.png), as the heads of the demo's birds; outside of it is the rest of the object.
    """
    y, x = ((2 * np.arange(n) + 1) * size // (2 * n) for n in shape)
    found = {}
    if index in split.boxes:
        truth = scale_boxes(split.boxes[index], tuple(split.sizes[index]), size)
        x0, y0, x1, y1 = truth.T[:, :, None, None]
        inside = ((x0 <= x) & (x <= x1) & (y0 <= y[:, None]) & (y[:, None] <= y1)).any(0)
        found["box"] = inside, ~inside
    if index in split.masks:
        at = np.ix_(y, x)
        mask, ignore = (pixels[at] for pixels in load_masks(split.root, split.masks[index], size)[:2])
        found["mask"] = mask, ~mask & ~ignore
        part_file = (Path("parts") / split.ids[index]).with_suffix(".png")
        if (split.root / part_file).exists():
            part = load_masks(split.root, Masks([str(part_file)], []), size)[0][at]
            found["part"] = part, mask & ~part
    return found


def gap_of(run: OpenRun, args: Flags) -> dict[str, Any]:
    """The numbers of one run: means over images of the means over locations; metrics of CAM, F and S."""
    kept = list(map_batches(run, args, run.split))  # h x w: the maps of a split fit in memory
    of_images: dict[str, list[list[float]]] = {kind: [] for kind in REGIONS}
    for indices, found in kept:
        for index, F_hat, S in zip(indices, minmax(found["F"]).numpy(), found["S"].numpy()):
            for kind, (inside, outside) in regions(run.split, index, run.size, S.shape).items():
                parts = S[inside], S[outside], F_hat[inside], F_hat[outside], S[inside] < 0
                means = [float(x.mean()) if x.size else math.nan for x in parts]
                of_images[kind].append([*means[:-1], 100 * means[-1]])
    head = {"name": run.name, "run": str(run.trained.folder), "split": args.split}
    entry: dict[str, Any] = head | {"checkpoint": args.checkpoint, "images": len(run.split)}
    for kind, numbers in of_images.items():
        values = {name: [x for x in of if not math.isnan(x)] for name, of in zip(GAP, zip(*numbers))}
        entry[kind] = {name: float(np.mean(x)) if x else None for name, x in values.items()} or None
        if numbers:
            entry[kind]["images"] = len(values["S_inside"])
    entry["localization"] = {}
    for name in MAPS:
        sized = ((indices, resized(run, name, found[name])) for indices, found in kept)
        score_maps = (MapBatch(indices, cam.normalize(values).numpy()) for indices, values in sized)
        metrics = evaluate_maps(score_maps, run.split, workers=args.workers).result["metrics"]
        entry["localization"][name] = {key: metrics[key] for key in ("max_box_acc_v2", "max_box_acc", "pxap")}
    return entry


def gap(args: Flags) -> dict[str, Any]:
    """F and S inside and outside of the object, in numbers.

    And the metrics of CAM, F and S as score maps. Prints a table and writes JSON. Runs with the same name
    share a column: mean ± sample deviation.
    """
    found = [gap_of(run, args) for run in open_runs(args)]
    rows: dict[str, tuple[list[float | None], int]] = {
        f"{label} ({kind})": ([(entry[kind] or {}).get(key) for entry in found], 1 if "%" in label else 3)
        for kind in REGIONS
        for key, label in GAP.items()
    }
    for key, label in (("v2_mean", "MaxBoxAccV2"), ("pxap", "PxAP")):
        for name in MAPS:
            rows[f"{label} by {name}"] = [flat(entry["localization"][name]).get(key) for entry in found], 1
    print_numbers([entry["name"] for entry in found], rows)
    return {"runs": found}


# ----------------------------------------------------------------------------------------------------- losses


def read_log(run: Path) -> dict[str, dict[int, float]]:
    """{what: {epoch: value}} of a run's log.jsonl: each loss, Top-1 on train, the metrics of LEADING on val.

    Raises InputError for a log that is missing or damaged.
    """
    found: dict[str, dict[int, float]] = {}
    try:
        for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            values = {name: x for name, x in entry.items() if name == "loss" or name.startswith("l_")}
            on_val = flat(entry.get("val", {}))
            values |= {"train Top-1, %": entry["top1"]}
            values |= {f"val {METRICS[key]}, %": on_val.get(key) for key in LEADING}
            for what, value in values.items():
                if value is not None:
                    found.setdefault(what, {})[entry["epoch"]] = float(value)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        problem = f"cannot be read ({utils.first_line(error)})"
        raise InputError(f"{run / 'log.jsonl'}: {problem}; it is made by: train.py") from error
    return found


def losses(args: Flags) -> None:
    """Each loss, Top-1 on train and the metrics on val over the epochs.

    From the log.jsonl of the runs, also of one that is still training; a line per run.
    """
    logs, names = [read_log(run) for run in args.runs], names_of(args)
    # The losses of all runs first.
    whats = sorted(dict.fromkeys(what for log in logs for what in log), key=lambda what: "%" in what)
    if not whats:
        raise InputError(f"{args.runs[0]}: no epoch is finished")
    last = max(epoch for log in logs for values in log.values() for epoch in values)
    with panel_grid(args, len(whats), 1.7) as (drawn, panels):
        for panel, what in zip(panels, whats):
            for i, log in enumerate(logs):
                values, marker = log.get(what, {}), MARKERS[i % len(MARKERS)]
                panel.plot([*values], [*values.values()], marker=marker, markersize=3, **look(i))
            panel.set(title=what, xlim=(0.5, last + 0.5))
            panel.locator_params("x", integer=True)
        drawn.legend(panels[0].lines, names, loc="outside upper left", ncols=2)
        drawn.supxlabel("epoch")


# ----------------------------------------------------------------------------------------------- command line

COMMANDS = {command.__name__: command for command in (curves, histogram, maps, boxes, gap, losses)}
DRAWN = ("curves", "histogram", "maps", "sweep", "losses")  # with matplotlib
RANGES = {"width": "[1, 100)", "dpi": "[10, 10000)", "workers": "[0, inf)", "seed": "[0, inf)"}
RANGES |= dict.fromkeys(("bins", "columns", "batch_size", "random", "worst", "best"), "[1, 1000000)")


def add_flags(sub: argparse.ArgumentParser, command: str) -> None:
    """The flags of one command."""
    add, number = sub.add_argument, {"type": int, "metavar": "N"}
    files = ", or results files of evaluate.py" if command == "curves" else ""
    add("runs", nargs="+", type=user_path, metavar="RUN", help=f"folders that train.py wrote{files}")
    add("--names", nargs="+", metavar="NAME", help="a name per run (default: the folders' names)")
    if command != "losses":
        add("--split", choices=("test", "val"), default="test", help="default test")
        add("--checkpoint", choices=("best", "last"), default="best", help="default best")
        add("--quiet", action="store_true", help="show no progress")
    if command == "curves":
        add("--normalize", choices=cam.NORMALIZATIONS, default="minmax", help="default minmax")
    elif command != "losses":
        add("--data-root", type=user_path, metavar="DIR", help="default: the run's")
        add("--lists", type=user_path, metavar="DIR", help="default: the run's")
        add("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, ...")
        add("--amp", choices=("auto", "bf16", "off"), help="default: the run's")
        add("--batch-size", default=32, **number, help="images per batch (default 32)")
        add("--workers", **number, help="processes that load images (default: CPU 0, GPU the cores)")
    if command in ("maps", "boxes"):
        choose = sub.add_mutually_exclusive_group().add_argument
        choose("--images", nargs="+", metavar="ID", help="ids as in the split's image_ids.txt")
        choose("--worst", **number, help="N images with the lowest IoU of the first run's box")
        choose("--best", **number, help="N images with the highest IoU of the first run's box")
        choose("--random", **number, help=f"N random images (the default, with N = {RANDOM})")
        add("--seed", default=0, **number, help="seed of --random (default 0)")
    if command == "histogram":
        add("--bins", default=40, **number, help="number of bins (default 40)")
    elif command == "boxes":
        add("--columns", default=4, **number, help="images per row (default 4)")
    add_file_flags(sub, command)


def add_file_flags(sub: argparse.ArgumentParser, command: str) -> None:
    """The flags for the files to write."""
    add, width = sub.add_argument, PAGE if command in ("maps", "losses") else COLUMN
    if command in DRAWN:
        text = f"width of the figure: {COLUMN} for a column, {PAGE} for a page (default {width})"
        add("--width", type=float, default=width, metavar="INCHES", help=text)
        add("--dpi", type=int, default=DPI, metavar="N", help=f"resolution of the PNG (default {DPI})")
    out = Path("figures") / command
    add("--out", type=user_path, default=out, metavar="PATH", help=f"files without suffix (default {out})")


def check(args: Flags) -> None:
    """Before any other work. Raises InputError for a value out of range, and without matplotlib."""
    for name, allowed in RANGES.items():
        if (value := getattr(args, name, None)) is not None:
            Value(float, allowed=allowed).check(name, value)
    if args.command in DRAWN and not has_matplotlib():
        raise InputError("this figure needs matplotlib: install it with pip install -e '.[figures]'")
    if args.command in ("curves", "histogram", "gap"):
        check_pools(args)
