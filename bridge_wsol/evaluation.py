"""From a network or files to numbers."""

from __future__ import annotations

import argparse
import csv
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from . import cam
from .baselines import METHODS
from .boxes import LEVELS, fixed_level, scale_boxes
from .data import Masks, Split, load_masks, load_score_map, to_input
from .losses import full_precision
from .methods import CAM
from .metrics import (
    DELTAS,
    BoxAccuracy,
    Localization,
    PixelAveragePrecision,
    label_ranks,
    localize,
    top_k_accuracy,
)
from .models import load_tensors, restore_weights
from .utils import InputError, all_gather, atomic_write, autocast, ordered_map, write_json, write_text


class MapBatch(NamedTuple):
    """Score maps of some images of a split, whoever made them."""

    indices: list[int]
    maps: np.ndarray  # N x size x size float32 in [0, 1]
    ranks: list[int] | None = None  # `label_ranks`; None without a classifier
    predicted: list[int] | None = None  # the first class of each


@torch.inference_mode()
def network_maps(
    model: nn.Module,
    loader: DataLoader,
    *,
    method: CAM,
    device: torch.device,
    amp: str,
    normalization: str | None,
    image_size: int,
    percentile: float | None = None,
) -> Iterator[MapBatch]:
    """The ground-truth class's map of every image, as a score map, and the rank of its class: one forward pass each.

    normalization None: the maps as the method gives them, N x h x w and unbounded, for `score_maps`.
    """
    model.eval()
    for images, labels, indices in loader:
        with autocast(device, amp):
            logits, maps = method.predict(model, to_input(images, device), labels.to(device))
        if normalization is not None:
            maps = cam.normalize(cam.resize(maps, image_size, method.upsampling), normalization, percentile)
        logits = full_precision(logits).cpu().numpy()
        ranks = label_ranks(logits, labels.numpy())
        yield MapBatch(indices.tolist(), maps.cpu().numpy(), ranks.tolist(), logits.argmax(1).tolist())


def score_maps(
    batches: Iterable[MapBatch], image_size: int, upsampling: str, normalization: str, percentile: float
) -> Iterator[MapBatch]:
    """What `network_maps` would give with this normalization, from the maps it gave without one."""
    for batch in batches:
        maps = cam.resize(torch.from_numpy(batch.maps), image_size, upsampling)
        yield batch._replace(maps=cam.normalize(maps, normalization, percentile).numpy())


def file_maps(
    folder: Path, split: Split, image_size: int, normalization: str, percentile: float | None = None
) -> Iterator[MapBatch]:
    """The score maps of a folder, resized and normalized as the network's are. Raises InputError as `load_score_map` does."""
    if not folder.is_dir():
        raise InputError(f"--score-maps {folder}: no such folder")
    for index, image in enumerate(split.ids):
        score_map = torch.from_numpy(load_score_map(folder, image))[None]
        maps = cam.normalize(cam.resize(score_map, image_size), normalization, percentile)
        yield MapBatch([index], maps.numpy())


class Job(NamedTuple):
    """What a worker process needs of one image."""

    index: int
    score_map: np.ndarray
    boxes: np.ndarray | None  # G x 4 in the map's pixels
    root: Path
    masks: Masks | None
    threshold: float | None  # a fixed one


def measure(job: Job) -> tuple[int, Localization | None, int | None, PixelAveragePrecision | None]:
    """The part of the evaluation that runs beside the network: the sweep over all levels, the histogram of the pixels.

    (index, boxes of every level, level of the fixed threshold, pixels), each None where the image or the job has none.
    """
    localization = level = pixels = None
    if job.boxes is not None:
        localization = localize(job.score_map, job.boxes)
        if job.threshold is not None:
            level = fixed_level(job.score_map, job.threshold)
    if job.masks is not None:
        pixels = PixelAveragePrecision()
        pixels.update(job.score_map, *load_masks(job.root, job.masks, len(job.score_map)))
    return job.index, localization, level, pixels


def evaluate_maps(
    batches: Iterable[MapBatch],
    split: Split,
    *,
    workers: int,
    val_levels: dict[str, int] | None = None,
    save_maps: Path | None = None,
    per_image: Path | None = None,
    keep: Iterable[int] = (),
    threshold: float | None = None,
) -> dict[str, Any]:
    """All metrics of a set of score maps: {"images", "metrics", "levels", "thresholds", "curves", "kept"}.

    workers: processes that sweep the maps while the network makes the next ones; the results do not depend on their number.
    val_levels: levels chosen on val, for the accuracy at thresholds that did not see this split. per_image: a CSV file to write.
    keep: indices whose maps come back in "kept". threshold: a fixed one, a fraction of each map's maximum, for "fixed_threshold" in the
    metrics (`BoxAccuracy.at_fixed_levels`). Metrics that need what is not there (boxes, masks, logits) are None.
    """
    accuracy, pixels, kept, keep = BoxAccuracy(), PixelAveragePrecision(), {}, set(keep)
    seen: list[int] = []  # of this process; of several (torchrun), each brings its share of the images
    ranks: dict[int, int] = {}
    predicted: dict[int, int] = {}
    largest: dict[int, np.ndarray] = {}
    fixed: dict[int, int] = {}  # index -> level of the fixed threshold

    def jobs() -> Iterator[Job]:
        for batch in batches:
            seen.extend(batch.indices)
            if batch.ranks is not None:
                ranks.update(zip(batch.indices, batch.ranks))
                predicted.update(zip(batch.indices, batch.predicted))
            for index, score_map in zip(batch.indices, batch.maps):
                if save_maps is not None:
                    with atomic_write(save_maps / f"{split.ids[index]}.npy") as part, part.open("wb") as file:
                        np.save(file, score_map)
                if index in keep:
                    kept[index] = score_map
                boxes = split.boxes.get(index)
                if boxes is not None:
                    boxes = scale_boxes(boxes, tuple(split.sizes[index]), len(score_map))
                yield Job(index, score_map, boxes, split.root, split.masks.get(index), threshold)

    for index, localization, level, image_pixels in ordered_map(measure, jobs(), workers):
        if localization is not None:
            accuracy.update(index, localization.ious, ranks.get(index))
            if per_image is not None:
                largest[index] = localization.largest
        if level is not None:
            fixed[index] = level
        if image_pixels is not None:
            pixels.merge(image_pixels)

    shares = all_gather((seen, ranks, predicted, largest, fixed, accuracy, pixels))
    if len(shares) > 1:
        seen, ranks, predicted, largest, fixed, accuracy, pixels = (
            [],
            {},
            {},
            {},
            {},
            BoxAccuracy(),
            PixelAveragePrecision(),
        )
        for share in shares:
            seen += share[0]
            for mine, theirs in zip((ranks, predicted, largest, fixed), share[1:5]):
                mine |= theirs
            accuracy.merge(share[5])
            pixels.merge(share[6])
        seen.sort()

    names = ("max_box_acc_v2", "max_box_acc", "gt_known_loc", "gt_known_loc_largest", "top1_loc", "top5_loc")
    metrics: dict[str, Any] = dict.fromkeys(
        (*names, "top1_cls", "top5_cls", "max_box_acc_v2_at_val_threshold", "pxap")
    )
    result: dict[str, Any] = {
        "images": len(seen),
        "metrics": metrics,
        "levels": None,
        "thresholds": None,
        "curves": None,
        "kept": kept,
    }
    if split.boxes:
        computed = accuracy.compute(val_levels)
        metrics |= computed.pop("metrics")
        result |= computed
        result["thresholds"] = {name: level / LEVELS for name, level in result["levels"].items()}
        if threshold is not None:
            metrics["fixed_threshold"] = {"threshold": threshold, **accuracy.at_fixed_levels(fixed)}
    if ranks:
        metrics |= {f"top{k}_cls": top_k_accuracy(list(ranks.values()), k) for k in (1, 5)}
    if split.masks:
        metrics["pxap"] = pixels.compute()
    if per_image is not None:
        write_per_image(per_image, split, seen, accuracy, largest, predicted, result["levels"])
    return result


def write_per_image(
    path: Path,
    split: Split,
    indices: list[int],
    accuracy: BoxAccuracy,
    largest: dict[int, np.ndarray],
    predicted: dict[int, int],
    levels: dict[str, int] | None,
) -> None:
    """A CSV line an image: its IoU at each chosen threshold, and the largest contour's box at its own, in pixels of the map."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(
        ["id", "label", "predicted", "iou_30", "iou_50", "iou_70", "iou_largest", "x0", "y0", "x1", "y1"]
    )
    for index in indices:
        row: list[Any] = [split.ids[index], split.labels[index], predicted.get(index, "")]
        if index in largest:
            ious = accuracy.ious[index]
            row += [f"{ious[0, levels[name]]:.6f}" for name in ("30", "50", "70")]
            row += [f"{ious[1, levels['largest']]:.6f}", *largest[index][levels["largest"]]]
        rows.writerow(row + [""] * (11 - len(row)))
    write_text(path, text.getvalue())


def selection_score(metrics: dict[str, Any]) -> tuple[str, float]:
    """(name, value) by which the best epoch is chosen on val: mean MaxBoxAccV2, PxAP where there are masks only (appendix B)."""
    if metrics["max_box_acc_v2"] is not None:
        return "MaxBoxAccV2", metrics["max_box_acc_v2"]["mean"]
    return ("PxAP", metrics["pxap"]) if metrics["pxap"] is not None else ("Top-1 cls", metrics["top1_cls"])


QS = tuple(
    round(0.05 * i, 2) for i in range(1, 15)
)  # IVR's percentiles to choose from: 0.05, 0.10, ..., 0.70


def choose_percentile(
    batches: Iterable[MapBatch], split: Split, *, image_size: int, upsampling: str, workers: int
) -> tuple[float, dict[str, Any], dict[str, int] | None]:
    """IVR's percentile with the best `selection_score` on val, the lowest of equals, from its maps without normalization.

    Returns (q, {"chosen_on", "by", "scores"}, val's levels at q). Raises InputError where val has neither boxes nor masks.
    """
    if not split.boxes and not split.masks:
        raise InputError(
            f"--percentile val: {split.name} has neither boxes nor masks to choose by: give a number"
        )
    kept = list(batches)
    scores, levels = {}, {}
    for q in QS:
        result = evaluate_maps(score_maps(kept, image_size, upsampling, "ivr", q), split, workers=workers)
        name, scores[q] = selection_score(result["metrics"])
        levels[q] = result["levels"]
    best = max(QS, key=scores.__getitem__)
    return best, {"chosen_on": "val", "by": name, "scores": scores}, levels[best]


def write_results(path: Path, result: dict[str, Any], **head: Any) -> None:
    """results_<checkpoint>_<split>.json (shared by train.py and this script)."""
    write_json(path, head | {k: result[k] for k in ("images", "metrics", "thresholds", "curves")})


def table(title: str, result: dict[str, Any]) -> str:
    """The metrics as people read them; everything in percent, thresholds as fractions of the map's maximum."""
    m, t = result["metrics"], result["thresholds"]
    rows: list[tuple[str, float | None, str]] = []
    if t is not None:
        v2 = m["max_box_acc_v2"]
        at_deltas = ", ".join(f"IoU {d}: {v2[d]:.2f} at threshold {t[d]:.3f}" for d in ("30", "50", "70"))
        rows += [
            ("MaxBoxAccV2", v2["mean"], at_deltas),
            ("GT-known Loc", m["gt_known_loc"], "all contours, = MaxBoxAccV2 at IoU 50"),
            (
                "GT-known Loc",
                m["gt_known_loc_largest"],
                f"largest contour, = MaxBoxAcc, at threshold {t['largest']:.3f}",
            ),
            ("Top-1 Loc", m["top1_loc"], "all contours"),
            ("Top-5 Loc", m["top5_loc"], "all contours"),
        ]
        honest = m["max_box_acc_v2_at_val_threshold"]
        if honest is not None:
            rows.append(("MaxBoxAccV2", honest["mean"], "at the thresholds chosen on val"))
        fixed = m.get("fixed_threshold")
        if fixed is not None:
            at = f"largest contour, at the fixed threshold {fixed['threshold']:g} of the map's maximum"
            names = {"GT-known Loc": "gt_known_loc", "Top-1 Loc": "top1_loc", "Top-5 Loc": "top5_loc"}
            rows += [(name, fixed[key], at) for name, key in names.items()]
    rows += [("PxAP", m["pxap"], ""), ("Top-1 cls", m["top1_cls"], ""), ("Top-5 cls", m["top5_cls"], "")]
    lines = [f"  {name:<14}{value:6.2f}  {note}".rstrip() for name, value, note in rows if value is not None]
    return "\n".join([f"{title}, {result['images']} images (percent)", *lines])


def checkpoint_problem(checkpoint: dict[str, Any]) -> str | None:
    """The first part that a checkpoint of train.py has and this lacks, or has of another kind."""
    kinds = {"model": dict, "config": dict, "epoch": int, "num_classes": int, "val": (dict, type(None))}
    for name, kind in kinds.items():
        if not isinstance(checkpoint.get(name, ...), kind):
            return name
    levels = checkpoint["val"] and checkpoint["val"].get("levels", ...)
    if levels is not None and not (
        isinstance(levels, dict)
        and all(levels.get(name) in range(LEVELS) for name in ("30", "50", "70", "largest"))
    ):
        return "val"
    classes = checkpoint.get("classes")  # younger than the rest
    if classes is not None and not (isinstance(classes, list) and len(classes) == checkpoint["num_classes"]):
        return "classes"
    return None


def load_run(run: Path, which: str, device: torch.device) -> tuple[nn.Module, CAM, dict[str, Any]]:
    """(network, its method, checkpoint) of RUN/<which>.pt. Raises InputError for a folder that is no run, or a damaged checkpoint."""
    path = run / f"{which}.pt"
    if not path.exists():
        raise InputError(f"{path}: no such checkpoint: RUN is a folder that train.py wrote")
    checkpoint = load_tensors(path)
    problem = checkpoint_problem(checkpoint)
    if problem:
        raise InputError(f"{path}: not a checkpoint of train.py ({problem} is missing or of the wrong kind)")
    try:
        c = checkpoint["config"]
        if c["method"] not in METHODS:
            raise InputError(
                f"{path}: a run of method {c['method']!r}, which nothing here defines: import the file with its class before evaluating"
            )
        method = METHODS[c["method"]](SimpleNamespace(**c))
        model = method.network(checkpoint["num_classes"])
        restore_weights(model, checkpoint["model"], path)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: not a checkpoint of train.py ({error} is missing or of the wrong kind)"
        ) from error
    return model.to(device, memory_format=torch.channels_last), method, checkpoint


def percentile_note(normalize: str, q: float | None, choice: dict[str, Any]) -> str:
    """What a table's title says of a normalization that has a percentile."""
    if q is None:
        return ""
    chosen = (
        f", chosen on {choice['chosen_on']} by {choice['by']} ({choice['scores'][q]:.2f})" if choice else ""
    )
    return f", {normalize} at percentile {q:.2f}{chosen}"


# Of the map's maximum, where val chose none: the value of CAM (CVPR 2016) and of the papers after it.
FALLBACK_THRESHOLD = 0.2


def original_box(box: np.ndarray, size: int, image_size: tuple[int, int]) -> list[int] | None:
    """A box of the size x size map in pixels of an image (width, height): every pixel that it touches. None for no box, 0,0,0,0."""
    if not box.any():
        return None
    x0, y0, x1, y1 = box.tolist()
    width, height = image_size
    # The pixels x0 ... x1 of the map cover the fractions x0 / size ... (x1 + 1) / size of the image.
    return [
        x0 * width // size,
        y0 * height // size,
        -(-(x1 + 1) * width // size) - 1,
        -(-(y1 + 1) * height // size) - 1,
    ]


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


def read_results(
    run: Path, checkpoint: str, split: str, normalize: str = "minmax"
) -> tuple[Path, dict[str, Any]]:
    """(path, content) of a run's results file, or of the one that `run` is. Raises InputError, naming the command that makes it."""
    suffix = "" if normalize == "minmax" else f"_{normalize}"
    path = run if run.suffix == ".json" else run / f"results_{checkpoint}_{split}{suffix}.json"
    if path != run and not run.is_dir():
        raise InputError(f"{run}: no such run: RUN is a folder that train.py wrote")
    command = (
        f"python evaluate.py {run}"
        if path != run
        else "python evaluate.py --score-maps DIR --dataset NAME --out FILE"
    )
    for flag, value, default in (
        ("checkpoint", checkpoint, "best"),
        ("split", split, "test"),
        ("normalize", normalize, "minmax"),
    ):
        command += f" --{flag} {value}" if value != default and path != run else ""
    result = read_json(path, command)
    of_metrics, of_curves = result.get("metrics"), result.get("curves")
    complete = (
        isinstance(of_metrics, dict)
        and {"max_box_acc_v2", "gt_known_loc", "top1_cls", "pxap"} <= of_metrics.keys()
        and "dataset" in result
    )
    if of_curves is not None:  # null where the data set has masks only
        levels = [of_curves.get(str(delta)) for delta in DELTAS] if isinstance(of_curves, dict) else []
        complete = (
            complete
            and isinstance(result.get("thresholds"), dict)
            and bool(levels)
            and all(
                isinstance(curve, list)
                and len(curve) == LEVELS
                and all(isinstance(value, (int, float)) for value in curve)
                for curve in levels
            )
        )
    if not complete:
        raise InputError(f"{path}: not a results file of evaluate.py; it is made by: {command}")
    return path, result


def read_config(run: Path) -> dict[str, Any]:
    """The values of a run, from its config.json."""
    try:
        return {
            name: entry["value"]
            for name, entry in read_json(run / "config.json", "train.py")["config"].items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{run / 'config.json'}: not a run's values ({error} is missing or of the wrong kind)"
        ) from error


def names_of(args: argparse.Namespace) -> list[str]:
    if args.names and len(args.names) != len(args.runs):
        raise InputError(f"--names: {len(args.names)} names for {len(args.runs)} runs")
    return args.names or [run.stem if run.suffix == ".json" else run.resolve().name for run in args.runs]
