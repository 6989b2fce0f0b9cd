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
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from . import cam, evaluation
from .baselines import METHODS
from .boxes import LEVELS, iou_matrix, level_boxes, scale_boxes
from .data import Masks, Split, load_masks, load_rgb, test_loader, to_input
from .datasets import load_splits
from .drawing import (
    DPI,
    box_legend,
    colour_bars,
    draw_map,
    draw_signed,
    grid,
    localization,
    save_picture,
    with_suffix,
)
from .evaluation import load_run, names_of, read_results
from .experiments import is_finished, markdown, spread, table, train_run
from .losses import feature_norm, minmax
from .metrics import DELTAS
from .models import Output
from .optim import parse_args as parse_train_args
from .optim import resolve_config
from .utils import (
    InputError,
    Parser,
    atomic_write,
    autocast,
    default_workers,
    one_line_errors,
    resolve_device,
    write_json,
    write_text,
)

# Okabe and Ito's colours, each run's with a line and a marker of its own.
RUN_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
COLUMN, PAGE = 3.3, 6.9  # inches: widths of a column and of the text of a two-column page


# ------------------------------------------------------------------------------------------------- pictures, by Pillow alone


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
        "font.size": 8,
        "axes.labelsize": 8,
        "axes.titlesize": 8,
        "legend.fontsize": 7,
        "xtick.labelsize": 7,
        "ytick.labelsize": 7,
        "lines.linewidth": 1.2,
        "lines.markersize": 5,
        "axes.linewidth": 0.6,
        "axes.grid": True,
        "grid.linewidth": 0.4,
        "grid.alpha": 0.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "pdf.fonttype": 42,
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
            with atomic_write(with_suffix(args.out, suffix)) as part:
                drawn.savefig(part, format=suffix[1:], dpi=args.dpi, metadata=metadata, **options)
            written.append(with_suffix(args.out, suffix))


def look(i: int) -> dict[str, Any]:
    """Colour, line and marker of the i-th run."""
    return {
        "color": RUN_COLOURS[i % len(RUN_COLOURS)],
        "linestyle": LINES[i % len(LINES)],
        "marker": MARKERS[i % len(MARKERS)],
    }


def shortened(name: str, width: float) -> str:
    """A name that fits a legend's line of so many inches, without its middle where it is too long."""
    fits = max(9, int((width - 0.6) / 0.06))
    return name if len(name) <= fits else f"{name[: fits // 2]}…{name[-(fits - fits // 2 - 1) :]}"


# ------------------------------------------------------------------------------------------------------------------ runs


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
            raise InputError(
                f"--images {image}: not an image of {self.split.name}, whose ids are like {self.split.ids[0]}"
            ) from None

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
    model, method, checkpoint = load_run(folder, args.checkpoint, resolve_device(args.device))
    config = checkpoint["config"]
    data_root, splits = args.data_root or Path(config["data_root"]), args.splits or Path(config["splits"])
    split = load_splits(config["dataset"], data_root, splits, (args.split,), config["val_per_class"])[0][
        args.split
    ]
    return Run(folder, name, model.eval(), method, config, split, config["image_size"])


def open_runs(args: argparse.Namespace) -> list[Run]:
    return [open_run(folder, name, args) for folder, name in zip(args.runs, names_of(args))]


def predictions(run: Run, args: argparse.Namespace, indices: Sequence[int] | None = None) -> Iterator[Batch]:
    """One forward pass over images of the run's split, all or `indices`, in order."""
    split = run.split if indices is None else run.split.take(indices, run.split.name)
    indices = range(len(split)) if indices is None else indices
    device = next(run.model.parameters()).device
    outputs: list[
        Any
    ] = []  # a method's `predict` returns no features: they are caught where the network returns them
    hook = run.model.register_forward_hook(lambda model, inputs, output: outputs.append(output))
    try:
        for images, labels, at in test_loader(
            split, args.batch_size, image_size=run.size, workers=args.workers
        ):
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
    if (
        batch.features is None
        or not isinstance(layer, nn.Linear)
        or layer.in_features != batch.features.shape[1]
    ):
        raise InputError(
            f"{run.folder}: --method {run.config['method']} has no linear classifier over its features, so its map has no factors F and S"
        )
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
            raise InputError(
                f"{path}: {result['dataset']} has no boxes, so there is no accuracy over thresholds"
            )
        entry: dict[str, Any] = {"name": name, "results": str(path)}
        for delta in map(str, DELTAS):
            curve = result["curves"][delta]
            first, last, width = flatness(curve)
            top = int(np.argmax(curve))
            entry[delta] = {
                "maximum": curve[top],
                "threshold": top / LEVELS,
                "within_95_percent": [first / LEVELS, last / LEVELS],
                "flatness": width,
            }
        entries.append(entry)
        lines.append(result["curves"])

    written: list[Path] = []
    beside = args.width > 5
    names = [shortened(entry["name"], args.width) for entry in entries]
    columns = min(
        len(names), max(1, int(args.width // (0.06 * max(map(len, names)) + 0.5)))
    )  # of names, above everything
    lines_above = (len(names) if beside else (len(names) + 1) // 2) * 0.15
    height = (2.0 + lines_above if beside else (1.45 + lines_above) * len(DELTAS) + 0.2) + 0.17 * -(
        -len(names) // columns
    )
    with figure(args, height, written) as drawn:
        panels = drawn.subplots(1, 3, sharey=True) if beside else drawn.subplots(3, 1, sharex=True)
        for panel, delta in zip(panels, DELTAS):
            for i, (entry, of_run) in enumerate(zip(entries, lines)):
                style, numbers = look(i), entry[str(delta)]
                at = round(numbers["threshold"] * LEVELS)
                flat = "–" if numbers["flatness"] is None else f"{numbers['flatness']:.2f}"
                label = f"{numbers['maximum']:.1f}, {flat} wide"
                low, high = (round(t * LEVELS) for t in numbers["within_95_percent"])
                panel.plot(
                    np.arange(low, high + 1) / LEVELS,
                    of_run[str(delta)][low : high + 1],
                    color=style["color"],
                    linewidth=5,
                    alpha=0.25,
                )
                panel.plot(
                    np.arange(LEVELS) / LEVELS, of_run[str(delta)], markevery=[at], label=label, **style
                )
            panel.text(
                0.99,
                0.98,
                f"IoU {delta / 100}",
                transform=panel.transAxes,
                ha="right",
                va="top",
                fontweight="bold",
            )
            panel.set_xlim(0, 1)
            panel.set_ylim(0, 105)
            panel.set_yticks([0, 25, 50, 75, 100])
            # Above the panel: inside, some curve passes wherever a legend could be.
            panel.legend(
                loc="lower left",
                bbox_to_anchor=(0, 1),
                borderaxespad=0.2,
                handlelength=2.6,
                ncols=1 if beside else 2,
            )
            if beside or delta == DELTAS[-1]:
                panel.set_xlabel("threshold")
            if not beside or delta == DELTAS[0]:
                panel.set_ylabel("accuracy, %")
        handles = [panel.plot([], [], **look(i))[0] for i in range(len(names))]
        drawn.legend(handles, names, loc="outside upper left", ncols=columns, handlelength=2.6)
    write_json(with_suffix(args.out, ".json"), {"runs": entries})
    return [*written, with_suffix(args.out, ".json")]


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
            panel.plot(
                centres,
                density,
                markevery=filled[:: max(1, len(filled) // 5)].tolist(),
                **(style | {"linestyle": "none"}),
            )
            panel.plot([], [], label=label, **style)
            entries.append(
                {
                    "name": name,
                    "images": len(of_run),
                    "mean": of_run.mean(),
                    "median": float(np.median(of_run)),
                    "deviation": of_run.std(),
                    "density": density.tolist(),
                }
            )
        panel.set_xlabel(r"$\max_u\,\mathcal{F}_u$")
        panel.set_ylabel("density")
        panel.set_ylim(bottom=0)
        panel.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
    write_json(with_suffix(args.out, ".json"), {"edges": edges.tolist(), "runs": entries})
    return [*written, with_suffix(args.out, ".json")]


# ------------------------------------------------------------------------------------------------- Figs. A3 and A4, images


def chosen_images(runs: list[Run], args: argparse.Namespace) -> list[str]:
    """The ids to draw: those of --images, --random N with --seed, or the N on which the first run's box is best or worst."""
    split = runs[0].split
    if args.images:
        return args.images
    n = min(len(split), args.worst or args.best or args.random)
    if not (args.worst or args.best):
        return [
            split.ids[i]
            for i in sorted(np.random.default_rng(args.seed).permutation(len(split))[:n].tolist())
        ]
    level, ious = chosen_level(runs[0], args), {}
    for batch in predictions(runs[0], args):
        for index, score_map in zip(
            batch.indices, score_maps(batch.maps, runs[0], runs[0].method.upsampling)
        ):
            if index in split.boxes:
                ious[index] = float(
                    iou_matrix(level_boxes(score_map).largest[level], runs[0].truth(index)).max()
                )
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
                drawn = [
                    draw_map(M, args.cell, run.method.upsampling),
                    draw_map(F, args.cell),
                    draw_signed(S, args.cell),
                ]
                cells[i, run.split.ids[index]] = drawn
    pictures = {image: load_rgb(runs[0].split.path(runs[0].index_of(image)), args.cell) for image in images}
    if args.below or len(runs) > 2:
        rows = [
            [pictures[image] if i == 0 else None, *cells[i, image]]
            for image in images
            for i in range(len(runs))
        ]
        layout = {
            "columns": ["image", "CAM", "F", "S"],
            "names": [run.name for _ in images for run in runs],
            "group_rows": len(runs),
        }
    else:
        rows = [
            [pictures[image]] + [cell for i in range(len(runs)) for cell in cells[i, image]]
            for image in images
        ]
        layout = {
            "columns": ["image"] + ["CAM", "F", "S"] * len(runs),
            "groups": [("", 1)] + [(run.name, 3) for run in runs],
        }
    print("images:", " ".join(images))
    return save_picture(grid(rows, **layout, foot=colour_bars, foot_lines=2), args.out)


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
                numbers.append(
                    {
                        "run": run.name,
                        "image": run.split.ids[index],
                        "box": predicted.tolist(),
                        "truth": truth.tolist(),
                        "iou": iou,
                    }
                )
    for start in range(0, len(images), args.columns):
        rows += [
            [cells[i, image] for image in images[start : start + args.columns]] for i in range(len(runs))
        ]
    picture = grid(
        rows,
        names=[run.name for run in runs] * (len(rows) // len(runs)),
        group_rows=len(runs),
        foot=box_legend,
    )
    print("images:", " ".join(images))
    write_json(with_suffix(args.out, ".json"), {"boxes": numbers})
    return [*save_picture(picture, args.out), with_suffix(args.out, ".json")]


# ---------------------------------------------------------------------------------------------------------- Fig. A5, sweep


def sweep(args: argparse.Namespace) -> list[Path]:
    """Fig. A5: trains a run for each value (what is done is not done again, what was interrupted goes on) and draws them."""
    require_matplotlib()
    param = args.param.replace("-", "_")
    flag = f"--{param.replace('_', '-')}"
    preset, sources = resolve_config(parse_train_args(args.flags, "", METHODS), None, METHODS)
    value = vars(preset).get(param)
    numbers = [
        name for name, v in vars(preset).items() if type(v) in (int, float) and sources[name] != "default"
    ]
    if param not in numbers:
        raise InputError(
            f"--param {args.param}: not a number of the preset; {preset.dataset} {preset.arch} {preset.method} has {', '.join(numbers)}"
        )
    if sources[param] == "flag":
        raise InputError(f"{flag}: is what this sweep varies: leave it out of the flags")
    if any(word.split("=")[0] in ("--out", "--resume") for word in args.flags):
        raise InputError(
            "--out is the picture's place and --resume is always on: --runs DIR says where the runs go"
        )

    seeds = args.seeds if args.seeds else [preset.seed]
    if len(set(seeds)) < len(seeds) or len(set(map(float, args.values))) < len(args.values):
        raise InputError("--values and --seeds: each once")
    jobs: dict[tuple[str, int], tuple[Path, list[str]]] = {}
    for text in args.values:
        for seed in seeds:
            folder = (
                args.runs
                / f"{preset.dataset}_{preset.arch}_{preset.method}_{param}_{float(text):g}_seed{seed}"
            )
            jobs[text, seed] = (
                folder,
                [*args.flags, flag, text, "--seed", str(seed), "--out", str(folder), "--resume"],
            )
    # All that can be wrong with the flags or with what is there already, before the first hour is spent.
    waiting = [job for job in jobs.values() if not is_finished(*job)]
    if waiting:
        load_splits(
            preset.dataset,
            Path(preset.data_root),
            Path(preset.splits),
            ("train", "val", "test"),
            preset.val_per_class,
        )
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
        rows.append(
            {
                "value": float(text),
                "seeds": seeds,
                metric: [m[metric] for m in found],
                "top1_cls": [m["top1_cls"] for m in found],
            }
        )
    rows.sort(key=lambda row: row["value"])
    label = {"gt_known_loc": "GT-known Loc", "pxap": "PxAP"}[metric]
    written: list[Path] = []
    with figure(args, 2.2, written) as drawn:
        panel = drawn.subplots()
        x, mean = [row["value"] for row in rows], [np.mean(row[metric]) for row in rows]
        panel.axvline(value, color="0.35", linestyle=":", linewidth=1, label=f"preset: {value:g}")
        if len(seeds) > 1:
            deviation = [np.std(row[metric], ddof=1) for row in rows]
            panel.errorbar(
                x, mean, deviation, capsize=2, label=f"mean ± deviation, {len(seeds)} seeds", **look(0)
            )
        else:
            panel.plot(x, mean, **look(0))
        if value in x:
            panel.plot([value], [mean[x.index(value)]], "*", markersize=13, color=RUN_COLOURS[1], zorder=3)
        panel.set_xlabel(param_label(param))
        panel.set_ylabel(f"{label}, %")
        panel.margins(y=0.15)
        panel.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2, ncols=2)
    lines = [
        [
            f"{row['value']:g}" + (" (preset)" if row["value"] == value else ""),
            *(spread(row[k], 2) for k in (metric, "top1_cls")),
        ]
        for row in rows
    ]
    text = markdown([param, label, "Top-1 cls"], lines)
    write_text(with_suffix(args.out, ".md"), text)
    write_json(
        with_suffix(args.out, ".json"),
        {"param": param, "preset": value, "checkpoint": args.checkpoint, "values": rows},
    )
    print(text, end="")
    return [*written, with_suffix(args.out, ".md"), with_suffix(args.out, ".json")]


def param_label(param: str) -> str:
    """The paper's symbol: lambda_sim -> a lambda with index sim; other names as they are."""
    symbol, _, index = param.partition("_")
    if symbol in ("lambda", "tau", "gamma"):
        return rf"$\{symbol}" + (rf"_{{\mathrm{{{index}}}}}$" if index else "$")
    return param.replace("_", " ")


# ------------------------------------------------------------------------------------------------------------------ table


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


def region_numbers(
    F_hat: np.ndarray, S: np.ndarray, inside: np.ndarray, outside: np.ndarray
) -> dict[str, float]:
    """Of one image, maps h x w: the means that its regions have (an empty region has none), the negative share in percent."""
    numbers = {}
    for where, region in (("inside", inside), ("outside", outside)):
        if region.any():
            numbers |= {f"S_{where}": float(S[region].mean()), f"F_hat_{where}": float(F_hat[region].mean())}
    if inside.any():
        numbers["S_negative_inside"] = 100 * float((S[inside] < 0).mean())
    return numbers


GAP = {
    "S_inside": "S inside",
    "S_outside": "S outside",
    "F_hat_inside": "F-hat inside",
    "F_hat_outside": "F-hat outside",
    "S_negative_inside": "inside with S < 0, %",
}
REGIONS = ("box", "mask", "part")


def gap_of(run: Run, args: argparse.Namespace) -> dict[str, Any]:
    """The numbers of one run: means over images of each image's mean over locations, and what CAM, F and S localize alone."""
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
        of_map = (evaluation.MapBatch(indices, score_maps(part, run, mode)) for indices, part in batches)
        found = evaluation.evaluate_maps(of_map, run.split, workers=args.workers)["metrics"]
        localized[name] = {key: found[key] for key in ("max_box_acc_v2", "max_box_acc", "pxap")}
    means = {
        kind: {name: float(np.mean(of[name])) if name in of else None for name in GAP}
        for kind, of in numbers.items()
    }
    for kind, of in numbers.items():
        means[kind]["images"] = len(of.get("S_inside", ()))
    return {
        "name": run.name,
        "run": str(run.folder),
        "split": args.split,
        "checkpoint": args.checkpoint,
        "images": len(order),
        **{kind: means.get(kind) for kind in REGIONS},
        "localization": localized,
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
                rows.append(
                    row(
                        f"{label} ({kind})",
                        [(entry[kind] or {}).get(key) for entry in found],
                        1 if "%" in label else 3,
                    )
                )
    for name in ("CAM", "F", "S"):
        of_name = [entry["localization"][name] for entry in found]
        if any(entry["max_box_acc_v2"] for entry in of_name):
            rows.append(
                row(
                    f"MaxBoxAccV2 by {name}",
                    [(entry["max_box_acc_v2"] or {}).get("mean") for entry in of_name],
                    1,
                )
            )
    for name in ("CAM", "F", "S"):
        values = [entry["localization"][name]["pxap"] for entry in found]
        if any(value is not None for value in values):
            rows.append(row(f"PxAP by {name}", values, 1))
    print(markdown(["", *(entry["name"] for entry in found)], rows), end="")
    write_json(with_suffix(args.out, ".json"), {"runs": found})
    return [with_suffix(args.out, ".json")]


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
    parser = Parser(
        prog="python -m bridge_wsol.figures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (_, what) in COMMANDS.items():
        # No abbreviations: sweep hands on what it does not know, --p among it, which is not short for --param.
        sub = commands.add_parser(name, help=what, description=what, allow_abbrev=False)
        if name != "sweep":
            sub.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders that train.py wrote")
            sub.add_argument(
                "--names",
                nargs="+",
                metavar="NAME",
                help="what to call the runs, in their order (default: their folders' names)",
            )
            sub.add_argument("--split", choices=("test", "val"), default="test")
        sub.add_argument("--checkpoint", choices=("best", "last"), default="best")
        sub.add_argument("--out", type=Path, metavar="PATH", help=f"without suffix (default figures/{name})")
        if name in ("curves", "histogram", "sweep"):
            sub.add_argument(
                "--width",
                type=float,
                default=COLUMN,
                metavar="INCHES",
                help=f"{COLUMN}: a column (default); {PAGE}: a page",
            )
            sub.add_argument("--dpi", type=int, default=DPI, help="of the PNG")
        if name in ("curves", "table"):
            sub.add_argument(
                "--normalize", choices=cam.NORMALIZATIONS, default="minmax", help="whose results files"
            )
        if name in ("histogram", "maps", "boxes", "gap"):
            sub.add_argument("--data-root", type=Path, help="default: the one the run was trained with")
            sub.add_argument("--splits", type=Path, help="default: the one the run was trained with")
            sub.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
            sub.add_argument("--amp", choices=("auto", "bf16", "off"), help="default: the run's")
            sub.add_argument("--batch-size", type=int, default=32)
            sub.add_argument("--workers", type=int, default=default_workers())
        if name in ("maps", "boxes"):
            which = sub.add_mutually_exclusive_group(required=True)
            which.add_argument(
                "--images", nargs="+", metavar="ID", help="ids as in the split's image_ids.txt"
            )
            which.add_argument("--worst", type=int, metavar="N", help="where the first run's box is worst")
            which.add_argument("--best", type=int, metavar="N", help="where it is best")
            which.add_argument("--random", type=int, metavar="N", help="drawn with --seed")
            sub.add_argument("--seed", type=int, default=0, help="of --random")
            sub.add_argument(
                "--cell", type=int, default=224, metavar="PIXELS", help="side of an image in the figure"
            )
    flags = commands.choices
    flags["histogram"].add_argument("--bins", type=int, default=40)
    flags["maps"].add_argument(
        "--below", action="store_true", help="runs below each other (three and more always are)"
    )
    flags["boxes"].add_argument("--columns", type=int, default=4, metavar="N", help="images a row")
    flags["table"].add_argument("--digits", type=int, default=2)
    flags["sweep"].add_argument("--param", required=True, help="a flag of train.py, as lambda_sim")
    flags["sweep"].add_argument("--values", nargs="+", required=True, metavar="X")
    flags["sweep"].add_argument(
        "--seeds", nargs="+", type=int, metavar="N", help="several runs a value: mean and deviation"
    )
    flags["sweep"].add_argument(
        "--runs",
        type=Path,
        default=Path("runs/sweep"),
        metavar="DIR",
        help="where the runs go (default runs/sweep)",
    )
    flags["sweep"].add_argument("--jobs", type=int, default=1, metavar="N", help="runs side by side")
    args, args.flags = parser.parse_known_args(argv)
    if args.flags and args.command != "sweep":
        parser.error(f"unrecognized arguments: {' '.join(args.flags)}")
    for name, least in (
        ("worst", 1),
        ("best", 1),
        ("random", 1),
        ("cell", 16),
        ("columns", 1),
        ("bins", 1),
        ("batch_size", 1),
        ("jobs", 1),
        ("workers", 0),
        ("dpi", 10),
        ("digits", 0),
        ("seed", 0),
        ("width", 1),
    ):
        value = getattr(args, name, None)
        if value is not None and not least <= value < 10**6:
            parser.error(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    for value in getattr(args, "values", ()):
        try:
            float(value)
        except ValueError:
            parser.error(f"--values {value}: must be a number")
    if args.out is None:
        args.out = Path("figures") / (
            f"sweep_{args.param.replace('-', '_')}" if args.command == "sweep" else args.command
        )
    elif args.out.suffix in (".png", ".pdf", ".json", ".md", ".tex", ".csv"):
        args.out = args.out.with_suffix("")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    for path in COMMANDS[args.command][0](args):
        print(f"written to {path}")


if __name__ == "__main__":
    with one_line_errors():
        main()
