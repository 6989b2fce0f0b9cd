"""From a network or files to numbers: score maps of a split, their metrics, the files of a run.

The protocol is that of Choe et al. (CVPR 2020): the map of the ground-truth class, bicubic resize, min-max
per image; `boxes` and `metrics` do the rest. For use from Python:

    found = Localizer("runs/CUB_vgg16_bridge")("photo.jpg")                       boxes for one's own images
    evaluate_score_maps(((name, my_map(name)) for name in split.ids), split)      metrics for one's own maps
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from . import cam
from .baselines import METHODS
from .boxes import LEVELS, fixed_level, level_boxes, scale_boxes
from .data import Masks, Split, decode, load_masks, test_loader, to_input, to_rgb
from .datasets import load_splits
from .losses import full_precision
from .methods import CAM
from .metrics import BoxAccuracy, Localization, PixelAveragePrecision, label_ranks, localize, top_k_accuracy
from .models import load_tensors, restore_weights
from .processes import all_gather, ordered_map
from .utils import (
    InputError,
    Progress,
    atomic_write,
    autocast,
    counted,
    duration,
    first_line,
    rank,
    resolve_device,
    world_size,
    write_json,
    write_text,
)

LEVEL_NAMES = ("30", "50", "70", "largest")  # the chosen levels: all contours by IoU, the largest contour
FIX_OUT = "pass another --out, or remove it"
RUN_KEYS = ("dataset", "arch", "method", "seed")  # of the configuration, in every results file of a run

# ------------------------------------------------------------------------------------------- score maps


class MapBatch(NamedTuple):
    """Score maps of some images of a split."""

    indices: list[int]
    maps: np.ndarray  # N x size x size float32 in [0, 1]
    ranks: list[int] | None = None  # `label_ranks`; None without a classifier
    predicted: list[int] | None = None  # Top-1 class of each image


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
    """Score map of the ground-truth class and rank of that class, for every image: one forward pass each.

    normalization None: the maps as the method returns them, N x h x w, unbounded, for `normalized`.
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


def normalized(
    batches: Iterable[MapBatch], image_size: int, upsampling: str, normalization: str, percentile: float
) -> Iterator[MapBatch]:
    """The batches of `network_maps` with this normalization, from its batches without one."""
    for batch in batches:
        maps = cam.resize(torch.from_numpy(batch.maps), image_size, upsampling)
        yield batch._replace(maps=cam.normalize(maps, normalization, percentile).numpy())


def pair_maps(
    pairs: Iterable[tuple[str, np.ndarray]],
    split: Split,
    *,
    image_size: int,
    normalization: str = "minmax",
    percentile: float | None = None,
) -> Iterator[MapBatch]:
    """Batches of one image from (image id, score map) pairs, in any order; a third item holds K logits.

    A map is H x W, floats in [0, 1], of any size: it is resized (bicubic) to image_size and normalized.
    Raises InputError for an id that is not in the split or comes twice, for images of the split that have not
    come at the end, and for a map or logits of another form.
    """
    index_of = {image: index for index, image in enumerate(split.ids)}
    for image, score_map, *logits in pairs:
        index = index_of.pop(image, None)
        if index is None:
            raise InputError(f"{image}: not an image of {split.name}, or its second score map")
        score_map = np.asarray(score_map, dtype=np.float32)
        if score_map.ndim != 2 or not score_map.size or not 0 <= score_map.min() <= score_map.max() <= 1:
            raise InputError(f"{image}: a score map must be a 2-D array of floats in [0, 1]")
        maps = cam.resize(torch.from_numpy(score_map)[None], image_size)
        batch = MapBatch([index], cam.normalize(maps, normalization, percentile).numpy())
        if logits:
            scores, label = np.array(logits[0], dtype=float, ndmin=2), split.labels[index : index + 1]
            if scores.shape[:-1] != (1,) or scores.shape[1] <= label[0]:
                raise InputError(f"{image}: logits must be a list of numbers, one for each class")
            ranks = label_ranks(scores, label).tolist()
            batch = batch._replace(ranks=ranks, predicted=[int(scores.argmax())])
        yield batch
    if index_of:
        raise InputError(
            f"{split.name}: {len(index_of)} images without a score map, {next(iter(index_of))} first"
        )


def evaluate_score_maps(
    pairs: Iterable[tuple[str, np.ndarray]], split: Split, *, image_size: int = 224, **options: Any
) -> dict[str, Any]:
    """`evaluate_maps` of the maps of `pair_maps`. options: of both functions; workers defaults to 0."""
    normalization = {k: options.pop(k) for k in ("normalization", "percentile") if k in options}
    batches = pair_maps(pairs, split, image_size=image_size, **normalization)
    return evaluate_maps(batches, split, **({"workers": 0} | options))


# ---------------------------------------------------------------------------------------------- metrics


class Job(NamedTuple):
    """One image, for a worker process."""

    index: int
    score_map: np.ndarray
    boxes: np.ndarray | None  # G x 4, in pixels of the map
    root: Path
    masks: Masks | None
    threshold: float | None  # the fixed one


class Measured(NamedTuple):
    """What a worker process found. None: the image has no boxes or masks, or there is no fixed threshold."""

    index: int
    localization: Localization | None
    fixed_level: int | None
    pixels: PixelAveragePrecision | None


def measure(job: Job) -> Measured:
    """The work that runs beside the network: the sweep over all levels, the histogram of pixels."""
    localization = level = pixels = None
    if job.boxes is not None:
        localization = localize(job.score_map, job.boxes)
        if job.threshold is not None:
            level = fixed_level(job.score_map, job.threshold)
    if job.masks is not None:
        pixels = PixelAveragePrecision()
        pixels.update(job.score_map, *load_masks(job.root, job.masks, len(job.score_map)))
    return Measured(job.index, localization, level, pixels)


@dataclass
class Tally:
    """What is known of the images so far. Images are kept by their index, so merging processes is exact."""

    seen: list[int] = field(default_factory=list)
    ranks: dict[int, int] = field(default_factory=dict)
    predicted: dict[int, int] = field(default_factory=dict)
    largest: dict[int, np.ndarray] = field(default_factory=dict)  # boxes of the largest contour at each level
    fixed: dict[int, int] = field(default_factory=dict)  # level of the fixed threshold
    accuracy: BoxAccuracy = field(default_factory=BoxAccuracy)
    pixels: PixelAveragePrecision = field(default_factory=PixelAveragePrecision)

    def note(self, batch: MapBatch) -> None:
        """Images whose maps are made."""
        self.seen.extend(batch.indices)
        if batch.ranks is not None:
            self.ranks.update(zip(batch.indices, batch.ranks))
            self.predicted.update(zip(batch.indices, batch.predicted))

    def add(self, found: Measured, keep_largest: bool) -> None:
        """An image that a worker has measured."""
        if found.localization is not None:
            self.accuracy.update(found.index, found.localization.ious, self.ranks.get(found.index))
            if keep_largest:
                self.largest[found.index] = found.localization.largest
        if found.fixed_level is not None:
            self.fixed[found.index] = found.fixed_level
        if found.pixels is not None:
            self.pixels.merge(found.pixels)

    def merge(self, other: Tally) -> None:
        """Adds the images of another process."""
        self.seen = sorted(self.seen + other.seen)
        for name in ("ranks", "predicted", "largest", "fixed"):
            getattr(self, name).update(getattr(other, name))
        self.accuracy.merge(other.accuracy)
        self.pixels.merge(other.pixels)


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
    """All metrics of the score maps: {"images", "metrics", "levels", "thresholds", "curves", "kept"}.

    Metrics are in percent, and None where boxes, masks or logits are missing. `workers` changes no result.
    Where some images have no boxes or masks, "images_with_boxes" or "images_with_masks" has the number of the
    others. Raises InputError where there is nothing to measure, and where some images have no logits.

    workers: processes that sweep maps while the network makes the next ones.
    val_levels: levels chosen on val, for the accuracy at thresholds that did not see this split.
    save_maps: a folder for the maps. per_image: a CSV file to write. keep: indices whose maps are in "kept".
    threshold: a fixed one, a fraction of each map's maximum, for "fixed_threshold" in the metrics.
    """
    tally, kept, keep = Tally(), {}, set(keep)
    _check_threshold(threshold)

    def jobs() -> Iterator[Job]:
        for batch in batches:
            tally.note(batch)
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

    share = len(range(rank(), len(split), world_size()))
    for found in counted(ordered_map(measure, jobs(), workers), split.name, share):
        tally.add(found, keep_largest=per_image is not None)
    parts = all_gather(tally)
    if len(parts) > 1:
        tally = Tally()
        for part in parts:
            tally.merge(part)
    result = {**_summary(tally, split, val_levels, threshold), "kept": kept}
    if per_image is not None:
        write_per_image(per_image, split, tally, result["levels"])
    return result


def _check_threshold(threshold: float | None) -> None:
    if threshold is not None and not 0 <= threshold < 1:
        raise InputError(f"threshold {threshold}: must be in [0, 1)")


def _summary(
    tally: Tally, split: Split, val_levels: dict[str, int] | None, threshold: float | None
) -> dict[str, Any]:
    names = ("max_box_acc_v2", "max_box_acc", "gt_known_loc", "gt_known_loc_largest", "top1_loc", "top5_loc")
    names += ("top1_cls", "top5_cls", "max_box_acc_v2_at_val_threshold", "pxap")
    metrics: dict[str, Any] = dict.fromkeys(names)
    if not split.boxes and not split.masks and not tally.ranks:
        raise InputError(f"{split.name}: no boxes, masks or logits: there is nothing to measure")
    if tally.ranks and len(tally.ranks) < len(tally.seen):
        without = next(split.ids[index] for index in tally.seen if index not in tally.ranks)
        raise InputError(f"{without}: no logits, but other images have them: pass them for all, or for none")
    result: dict[str, Any] = {"images": len(tally.seen), "metrics": metrics}
    for name, those in (("boxes", split.boxes), ("masks", split.masks)):
        if 0 < len(those) < len(tally.seen):
            result[f"images_with_{name}"] = len(those)
    result |= dict.fromkeys(("levels", "thresholds", "curves"))
    if split.boxes:
        computed = tally.accuracy.compute(val_levels)
        metrics |= computed.pop("metrics")
        result |= computed
        result["thresholds"] = {name: level / LEVELS for name, level in result["levels"].items()}
        if threshold is not None:
            at_threshold = tally.accuracy.at_fixed_levels(tally.fixed)
            metrics["fixed_threshold"] = {"threshold": threshold, **at_threshold}
    if tally.ranks:
        metrics |= {f"top{k}_cls": top_k_accuracy(list(tally.ranks.values()), k) for k in (1, 5)}
    if split.masks:
        metrics["pxap"] = tally.pixels.compute()
    return result


def write_per_image(path: Path, split: Split, tally: Tally, levels: dict[str, int] | None) -> None:
    """A CSV line per image: IoU at each chosen threshold; box of the largest contour, in map pixels."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    head = ["id", "label", "predicted", *(f"iou_{name}" for name in LEVEL_NAMES), "x0", "y0", "x1", "y1"]
    rows.writerow(head)
    for index in tally.seen:
        row: list[Any] = [split.ids[index], split.labels[index], tally.predicted.get(index, "")]
        if index in tally.largest:
            ious, level = tally.accuracy.ious[index], levels["largest"]
            row += [f"{ious[0, levels[name]]:.6f}" for name in ("30", "50", "70")]
            row += [f"{ious[1, level]:.6f}", *tally.largest[index][level]]
        rows.writerow(row + [""] * (len(head) - len(row)))
    write_text(path, text.getvalue())


def selection_score(metrics: dict[str, Any]) -> tuple[str, float]:
    """(name, value) of the metric that selects the best epoch on val (appendix B): mean MaxBoxAccV2.

    PxAP where there are masks only, Top-1 classification where there is neither.
    """
    if metrics["max_box_acc_v2"] is not None:
        return "MaxBoxAccV2", metrics["max_box_acc_v2"]["mean"]
    return ("PxAP", metrics["pxap"]) if metrics["pxap"] is not None else ("Top-1 cls", metrics["top1_cls"])


QS = tuple(round(0.05 * i, 2) for i in range(1, 15))  # IVR's percentiles to choose from: 0.05, ..., 0.70


def choose_percentile(
    batches: Iterable[MapBatch], split: Split, *, image_size: int, upsampling: str, workers: int
) -> tuple[float, dict[str, Any], dict[str, int] | None]:
    """IVR's percentile with the best `selection_score` on val, the lowest of equals.

    batches: maps without normalization. Returns (q, {"chosen_on", "by", "scores"}, levels chosen on val).
    Raises InputError where val has neither boxes nor masks.
    """
    if not split.boxes and not split.masks:
        raise InputError(f"--percentile val: {split.name} has neither boxes nor masks: pass a number")
    kept = list(batches)
    scores, levels = {}, {}
    for q in QS:
        result = evaluate_maps(normalized(kept, image_size, upsampling, "ivr", q), split, workers=workers)
        name, scores[q] = selection_score(result["metrics"])
        levels[q] = result["levels"]
    best = max(QS, key=scores.__getitem__)
    return best, {"chosen_on": "val", "by": name, "scores": scores}, levels[best]


# -------------------------------------------------------------------------------------- files of a run


def open_checkpoint(out: Path, resume: bool) -> dict[str, Any] | None:
    """The checkpoint to resume; None for a new run, and with --resume where last.pt is not there yet.

    Raises InputError for an existing folder without --resume, and for a damaged checkpoint.
    """
    if not resume and out.exists():
        raise InputError(f"{out}: exists: pass --resume to continue it, pass another --out, or remove it")
    if not resume or not (out / "last.pt").exists():
        return None
    checkpoint = load_tensors(out / "last.pt")
    with not_a_checkpoint(out / "last.pt", FIX_OUT):
        for name in ("optimizer", "random_states", "sources", "best", "progress"):
            if not isinstance(checkpoint[name], (dict, type(None))):
                raise KeyError(name)
        if problem := _checkpoint_problem(checkpoint):
            raise KeyError(problem)
    return checkpoint


@contextmanager
def not_a_checkpoint(path: Path, fix: str = "pass a folder that train.py wrote") -> Iterator[None]:
    """Turns the error of a readable file that is no checkpoint of train.py into an InputError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        missing = isinstance(error, KeyError) and f"{error.args[0]} is missing or has the wrong type"
        problem = f"not a checkpoint of train.py ({missing or first_line(error)})"
        raise InputError(f"{path}: {problem}: {fix}") from error


def load_run(
    run: Path, which: str, device: torch.device, of_map: dict[str, str] | None = None
) -> tuple[nn.Module, CAM, dict[str, Any]]:
    """(network, method, checkpoint) of RUN/<which>.pt, which = "best" or "last".

    of_map: values of the method's map, instead of those of the run; they are in the checkpoint's "config".
    Raises InputError for a folder that is not a run, a damaged checkpoint, one from the middle of an epoch,
    an unknown method, or a value that is not one of its map.
    """
    path = Path(run) / f"{which}.pt"
    if not path.exists():
        raise InputError(f"{path}: no such checkpoint: pass a folder that train.py wrote")
    checkpoint = load_tensors(path)
    problem = _checkpoint_problem(checkpoint)
    with not_a_checkpoint(path):
        if problem:
            raise KeyError(problem)
        if checkpoint.get("progress"):
            step = f"epoch {checkpoint['epoch'] + 1}, after step {checkpoint['progress']['step']}"
            fix = "continue it with train.py --resume, or evaluate --checkpoint best"
            raise InputError(f"{path}: the run was interrupted in {step}: {fix}")
        config = checkpoint["config"]
        if config["method"] not in METHODS:
            unknown = f"{path}: a run of the unknown method {config['method']!r}"
            raise InputError(f"{unknown}: import the file that defines its class first")
        for name in (of_map or {}).keys() - set(METHODS[config["method"]].of_map):
            flag, method_flag = f"--{name.replace('_', '-')}", f"--method {config['method']}"
            raise InputError(f"{flag}: {run} was trained with {method_flag}, which has no such value")
        config |= of_map or {}
        method = METHODS[config["method"]](SimpleNamespace(**config))
        model = method.network(checkpoint["num_classes"])
        restore_weights(model, checkpoint["model"], path)
    return model.to(device, memory_format=torch.channels_last), method, checkpoint


def run_splits(
    run: Path,
    checkpoint: dict[str, Any],
    names: tuple[str, ...],
    data_root: Path | None = None,
    splits_dir: Path | None = None,
) -> dict[str, Split]:
    """The named splits of a run's data set. data_root, splits_dir: instead of those of the run.

    Raises InputError as `load_splits` does, and where the lists have other classes than the run.
    """
    config = checkpoint["config"]
    data_root, splits_dir = data_root or Path(config["data_root"]), splits_dir or Path(config["splits"])
    splits, record = load_splits(config["dataset"], data_root, splits_dir, names, config["val_per_class"])
    require_classes(run, checkpoint, record)
    return splits


def require_classes(run: Path, checkpoint: dict[str, Any], record: dict[str, Any]) -> None:
    """Raises InputError where a run has other classes than its data set has now. record: of `load_splits`."""
    dataset = checkpoint["config"]["dataset"]
    if record["num_classes"] != checkpoint["num_classes"]:
        trained = f"{run} was trained on {checkpoint['num_classes']} classes"
        raise InputError(f"{trained}, {dataset} has {record['num_classes']} now: check --splits")
    if checkpoint.get("classes") and record.get("classes") and checkpoint["classes"] != record["classes"]:
        raise InputError(f"{run} was trained on other classes than {dataset} has now: check --splits")


def require_same_data(run: Path, checkpoint: dict[str, Any], record: dict[str, Any]) -> None:
    """Raises InputError where a run to resume has other classes, or other images of train or val."""
    require_classes(run, checkpoint, record)
    digests = checkpoint.get("digests") or record["digests"]  # old checkpoints have none
    for name in ("train", "val"):
        if digests[name] != record["digests"][name]:
            fix = "restore it, or train in another --out"
            raise InputError(f"{run}: the list of {name} has changed since the run began: {fix}")


def levels_of(checkpoint: dict[str, Any]) -> dict[str, int] | None:
    """The levels that val chose with these weights; None where it has no boxes or was not evaluated then."""
    val = checkpoint["val"] or {}
    return val.get("levels") if val.get("epoch") == checkpoint["epoch"] else None


def _checkpoint_problem(checkpoint: dict[str, Any]) -> str | None:
    """The first part of a checkpoint of train.py that is missing or has the wrong type."""
    types = {"model": dict, "config": dict, "epoch": int, "num_classes": int, "val": (dict, type(None))}
    for name, kind in types.items():
        if not isinstance(checkpoint.get(name, ...), kind):
            return name
    if checkpoint["num_classes"] < 1:
        return "num_classes"
    for name in (*RUN_KEYS, "image_size", "data_root", "splits", "val_per_class"):
        if name not in checkpoint["config"]:
            return name
    if not isinstance(checkpoint["config"]["image_size"], int) or checkpoint["config"]["image_size"] < 1:
        return "image_size"
    levels = checkpoint["val"] and checkpoint["val"].get("levels", ...)
    if levels is not None:
        if not isinstance(levels, dict) or any(levels.get(n) not in range(LEVELS) for n in LEVEL_NAMES):
            return "val"
    classes = checkpoint.get("classes")  # old checkpoints have none
    if classes is not None and not (isinstance(classes, list) and len(classes) == checkpoint["num_classes"]):
        return "classes"
    return None


def write_results(path: Path, result: dict[str, Any], **head: Any) -> None:
    """results_<checkpoint>_<split>.json: the head, then images, metrics, thresholds and curves."""
    keys = ("images", "images_with_boxes", "images_with_masks", "metrics", "thresholds", "curves")
    write_json(path, head | {key: result[key] for key in keys if key in result})


def read_json(path: Path, made_by: str) -> dict[str, Any]:
    """A file that the command `made_by` writes. Raises InputError, naming that command."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; make it with: {made_by}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); make it with: {made_by}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: not a file of this program; make it with: {made_by}")
    return value


def read_results(
    run: Path, checkpoint: str, split: str, normalize: str = "minmax"
) -> tuple[Path, dict[str, Any]]:
    """(path, content) of a run's results file, or of `run` where that is a results file itself.

    Raises InputError for a missing or damaged file, naming the command that makes it.
    """
    suffix = "" if normalize == "minmax" else f"_{normalize}"
    path, command = run, "python evaluate.py --score-maps DIR --dataset NAME --out FILE"
    if run.suffix != ".json":
        path, command = run / f"results_{checkpoint}_{split}{suffix}.json", f"python evaluate.py {run}"
        if not run.is_dir():
            raise InputError(f"{run}: no such run: pass a folder that train.py wrote")
        given = {"checkpoint": checkpoint, "split": split, "normalize": normalize}
        defaults = {"checkpoint": "best", "split": "test", "normalize": "minmax"}
        command += "".join(f" --{k} {value}" for k, value in given.items() if value != defaults[k])
    result = read_json(path, command)
    if not _is_results(result):
        raise InputError(f"{path}: not a results file of evaluate.py; make it with: {command}")
    return path, result


def _is_results(result: dict[str, Any]) -> bool:
    metrics, curves = result.get("metrics"), result.get("curves")
    needed = {"max_box_acc_v2", "gt_known_loc", "top1_cls", "pxap"}
    if not isinstance(metrics, dict) or not needed <= metrics.keys() or "dataset" not in result:
        return False
    if curves is None:  # a data set with masks only
        return True
    if not isinstance(curves, dict) or not isinstance(result.get("thresholds"), dict):
        return False
    of_ious = [curves.get(name) for name in ("30", "50", "70")]
    return all(
        isinstance(curve, list) and len(curve) == LEVELS and all(isinstance(v, (int, float)) for v in curve)
        for curve in of_ious
    )


def read_config(run: Path) -> dict[str, Any]:
    """{name: value} of a run, from its config.json. Raises InputError for a damaged file."""
    path = run / "config.json"
    try:
        return {name: entry["value"] for name, entry in read_json(path, "train.py")["config"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not the configuration of a run ({error} is missing or wrong)") from error


def read_log(run: Path, epochs: int) -> list[dict[str, Any]]:
    """The first `epochs` entries of log.jsonl. An epoch that was interrupted later is not among them."""
    path = run / "log.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if epochs else []
        return [entry for entry in map(json.loads, lines) if entry["epoch"] <= epochs]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: cannot be read ({error}): pass another --out to start anew") from error


def names_of(args: argparse.Namespace) -> list[str]:
    """What to call each run of a command line: --names, or the names of their folders."""
    if args.names and len(args.names) != len(args.runs):
        raise InputError(f"--names: {len(args.names)} names for {len(args.runs)} runs: pass one per run")
    return args.names or [run.stem if run.suffix == ".json" else run.resolve().name for run in args.runs]


# -------------------------------------------------------------------------------- a trained run in Python

# A fraction of the map's maximum, where val chose no threshold: the value of CAM (CVPR 2016).
FALLBACK_THRESHOLD = 0.2


class Found(NamedTuple):
    """What `Localizer` found in an image."""

    box: list[int] | None  # x0, y0, x1, y1, in pixels of the image as shown, corners inside; None: empty map
    top5: list[dict[str, Any]]  # "class" from 0, "name" where known, "probability"; the best first
    # Of the Top-1 class, float32 in [0, 1], at the run's image_size (224 x 224): stretch it over the image.
    score_map: np.ndarray

    def text(self) -> str:
        """The best class with its probability, and the box."""
        best, box = self.top5[0], ",".join(map(str, self.box or ["none"]))
        return f"class {best.get('name', best['class'])} ({100 * best['probability']:.1f} %), box {box}"


class Localizer:
    """A trained run, for images of one's own: box of the Top-1 class, five best classes, score map.

    The box is the largest contour at `threshold`, in [0, 1): as an argument a fraction of the map's maximum.
    Default: the threshold chosen on val for this normalization, a fraction of [0, 1]; else
    FALLBACK_THRESHOLD of the maximum, and `note` tells why.

    run: a folder that train.py wrote. checkpoint: "best" or "last". amp: default the run's.
    normalize, percentile: of `cam.normalize`. data_root, splits, batch_size, workers: for val, which is
    evaluated where a normalization other than "minmax" needs its threshold. Raises InputError as `load_run`.
    """

    def __init__(
        self,
        run: str | Path,
        device: str = "auto",
        *,
        checkpoint: str = "best",
        normalize: str = "minmax",
        percentile: float | None = None,
        threshold: float | None = None,
        amp: str | None = None,
        data_root: Path | None = None,
        splits: Path | None = None,
        batch_size: int = 32,
        workers: int = 0,
    ):
        self.run, self.device = Path(run), resolve_device(device)
        self.normalize, self.percentile = normalize, percentile
        self.model, self.method, self.checkpoint = load_run(self.run, checkpoint, self.device)
        self.model.eval()
        config = self.checkpoint["config"]
        self.amp, self.size = amp or config.get("amp", "auto"), config["image_size"]
        _check_threshold(threshold)
        self.threshold, self.level, self.note = threshold, None, ""
        if threshold is None:
            self.level, self.note = self._chosen_level(data_root, splits, batch_size, workers)
            self.threshold = FALLBACK_THRESHOLD if self.level is None else self.level / LEVELS

    def __call__(self, images: Any) -> Found | list[Found]:
        """A path or PIL image -> Found; a list of them -> a list. EXIF orientation is applied.

        Raises InputError for an image that cannot be read.
        """
        if isinstance(images, (str, Path, Image.Image)):
            return self._localize(images)
        return [self._localize(image) for image in images]

    @torch.inference_mode()
    def _localize(self, image: str | Path | Image.Image) -> Found:
        if isinstance(image, Image.Image):
            image = to_rgb(image, upright=True)
        else:
            image = decode(Path(image), upright=True)
        pixels = np.array(image.resize((self.size, self.size), Image.Resampling.BILINEAR))
        with autocast(self.device, self.amp):
            batch = to_input(torch.from_numpy(pixels).permute(2, 0, 1)[None], self.device)
            logits, maps = self.method.predict(self.model, batch)
        maps = cam.resize(maps, self.size, self.method.upsampling)
        score_map = cam.normalize(maps, self.normalize, self.percentile)[0].cpu().numpy()
        level = fixed_level(score_map, self.threshold) if self.level is None else self.level
        box = original_box(level_boxes(score_map).largest[level], self.size, image.size)

        probabilities, names = full_precision(logits)[0].softmax(0), self.checkpoint.get("classes")
        top = probabilities.topk(min(5, len(probabilities)))
        best = list(zip(top.indices.tolist(), top.values.tolist()))
        top5 = [{"class": k, **({"name": names[k]} if names else {}), "probability": q} for k, q in best]
        return Found(box, top5, score_map)

    def _chosen_level(
        self, data_root: Path | None, splits_dir: Path | None, batch_size: int, workers: int
    ) -> tuple[int | None, str]:
        """(the largest contour's level chosen on val, "") or (None, the reason)."""
        levels = levels_of(self.checkpoint)
        if levels and self.normalize == "minmax":
            return levels["largest"], ""
        if levels is None and (self.checkpoint["val"] or {}).get("epoch") == self.checkpoint["epoch"]:
            return None, "val has no boxes"
        try:
            split = run_splits(self.run, self.checkpoint, ("val",), data_root, splits_dir)["val"]
        except InputError as error:
            return None, f"its images are needed for --normalize {self.normalize}: {error}"
        loader = test_loader(split, batch_size, image_size=self.size, workers=workers)
        setting = {"method": self.method, "device": self.device, "amp": self.amp, "image_size": self.size}
        setting |= {"normalization": self.normalize, "percentile": self.percentile}
        found = evaluate_maps(network_maps(self.model, loader, **setting), split, workers=workers)
        return (found["levels"]["largest"], "") if found["levels"] else (None, "val has no boxes")


def original_box(box: np.ndarray, size: int, image_size: tuple[int, int]) -> list[int] | None:
    """A box of the size x size map in pixels of an image (width, height): every pixel that it touches.

    None for the box 0, 0, 0, 0, which stands for no box.
    """
    if not box.any():
        return None
    x0, y0, x1, y1 = box.tolist()
    width, height = image_size
    # Pixels x0 ... x1 of the map cover the fractions x0 / size ... (x1 + 1) / size of the image's width.
    right, bottom = -(-(x1 + 1) * width // size) - 1, -(-(y1 + 1) * height // size) - 1
    return [x0 * width // size, y0 * height // size, right, bottom]


# ------------------------------------------------------------------------------------- what is printed

# After a training on the demo. Not in demo.py: another text of that file draws the demo again.
README_PICTURE = """the picture of the README (CAM, F and S of the CAM baseline and of bridge) is made by:
  python train.py --method cam
  python -m bridge_wsol.figures maps runs/demo_vgg16_cam {run} --names vanilla bridge --random 3"""


def table(title: str, result: dict[str, Any]) -> str:
    """The metrics of `evaluate_maps` as text: percent; thresholds as fractions of the 255 levels."""
    m, t = result["metrics"], result["thresholds"]
    rows: list[tuple[str, float | None, str]] = []
    if t is not None:
        v2 = m["max_box_acc_v2"]
        at_deltas = ", ".join(f"IoU {d}: {v2[d]:.2f} at threshold {t[d]:.3f}" for d in ("30", "50", "70"))
        largest = f"largest contour, = MaxBoxAcc, at threshold {t['largest']:.3f}"
        rows += [
            ("MaxBoxAccV2", v2["mean"], at_deltas),
            ("GT-known Loc", m["gt_known_loc"], "all contours, = MaxBoxAccV2 at IoU 50"),
            ("GT-known Loc", m["gt_known_loc_largest"], largest),
            ("Top-1 Loc", m["top1_loc"], "all contours"),
            ("Top-5 Loc", m["top5_loc"], "all contours"),
        ]
        at_val = m["max_box_acc_v2_at_val_threshold"]
        if at_val is not None:
            rows.append(("MaxBoxAccV2", at_val["mean"], "at the thresholds chosen on val"))
        fixed = m.get("fixed_threshold")
        if fixed is not None:
            note = f"largest contour, at the fixed threshold {fixed['threshold']:g} of the map's maximum"
            names = {"GT-known Loc": "gt_known_loc", "Top-1 Loc": "top1_loc", "Top-5 Loc": "top5_loc"}
            rows += [(name, fixed[key], note) for name, key in names.items()]
    rows += [("PxAP", m["pxap"], ""), ("Top-1 cls", m["top1_cls"], ""), ("Top-5 cls", m["top5_cls"], "")]
    lines = [f"  {name:<14}{value:6.2f}  {note}".rstrip() for name, value, note in rows if value is not None]
    counts = ", ".join(
        [f"{result['images']} images"]
        + [
            f"{result[k]} with {k.removeprefix('images_with_')}"
            for k in result
            if k.startswith("images_with_")
        ]
    )
    return "\n".join([f"{title}, {counts} (percent)", *lines])


def epoch_line(log: list[dict[str, Any]], epochs: int, is_best: bool) -> str:
    """The last entry of a run's log as text. epochs: of the whole run."""
    entry = log[-1]
    line = f"epoch {entry['epoch']}/{epochs}  {loss_text(entry)}  train top-1 {entry['top1']:.1f}"
    if "val" in entry:
        name, score = selection_score(entry["val"])
        line += (
            f"  val {name} {score:.2f}{' (best)' if is_best else ''}, top-1 {entry['val']['top1_cls']:.1f}"
        )
    left = sum(past["seconds"] for past in log) / len(log) * (epochs - entry["epoch"])
    return f"{line}  {entry['images_per_second']:.1f} images/s  {duration(left)} left"


def progress_note(values: dict[str, Any], batch: int, progress: Progress, epochs_after: int) -> str:
    """The losses of the last batch, images/s, and the time left in the run."""
    speed = (progress.done - progress.first) / (time.monotonic() - progress.started)  # steps/s
    left = progress.total - progress.done + epochs_after * progress.total
    return f"  {loss_text(values)}  {speed * batch:.1f} images/s, {duration(left / speed)} left in the run"


def loss_text(values: dict[str, Any]) -> str:
    """Each loss by name."""
    return "  ".join(f"{k} {float(v):.4f}" for k, v in values.items() if k == "loss" or k.startswith("l_"))
