"""Metrics of the protocol (Choe et al., CVPR 2020): MaxBoxAcc, MaxBoxAccV2, GT-known and Top-k Loc, PxAP.

All results are in percent. The box metrics need one IoU per image and level: acc_delta(level) is the share of
images whose IoU at this level is at least delta. One threshold is chosen for the whole set, not per image.
Level t is the threshold t / 255 on the quantized map (see boxes.py).

    found = measure(score_map, boxes)          one image, also in a worker process
    evaluator.add(index, found, rank)          all images, in any order
    evaluator.result()                         metrics, levels, curves
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from .boxes import LEVELS, fixed_level, iou_matrix, level_boxes
from .utils import InputError

DELTAS = (30, 50, 70)  # IoU thresholds of MaxBoxAccV2, in percent
LEVEL_NAMES = ("30", "50", "70", "largest")  # the chosen levels: all contours by IoU, the largest contour

# Edges of the bins in which PxAP counts scores, as in the protocol.
EDGES = np.append(np.arange(0, 1, 0.001), [1.0, 2.0, 3.0])


# --------------------------------------------------------------------------------------------- one image


class Measured(NamedTuple):
    """What is known of one image. None: it has no boxes or masks, or there is no fixed threshold."""

    # 2 x 255 float64 in [0, 1], the best IoU at each level: row 0 of all contours, row 1 of the largest one.
    ious: np.ndarray | None = None
    largest: np.ndarray | None = None  # 255 x 4 int64, box of the largest contour, in pixels of the map
    fixed_level: int | None = None  # level of the fixed threshold
    pixels: np.ndarray | None = None  # 2 x bins int64, `pixel_histogram`


def measure(
    score_map: np.ndarray,
    boxes: np.ndarray | None = None,
    masks: tuple[np.ndarray, np.ndarray] | None = None,
    threshold: float | None = None,
) -> Measured:
    """Measures one image at every level.

    score_map: H x W in [0, 1]. boxes: G x 4 (x0, y0, x1, y1, corners included) in pixels of the map, G >= 1.
    masks: (mask, ignore), H x W bool. threshold: a fixed one, a fraction of the map's maximum in [0, 1).
    Raises ValueError as `boxes.level_boxes` and `boxes.fixed_level` do.
    """
    ious = largest = level = None
    if boxes is not None:
        found = level_boxes(score_map)
        ious, largest = np.zeros((2, LEVELS)), found.largest
        np.maximum.at(ious[0], found.levels, iou_matrix(found.boxes, boxes).max(1))
        ious[1] = iou_matrix(largest, boxes).max(1)
        level = None if threshold is None else fixed_level(score_map, threshold)
    return Measured(ious, largest, level, None if masks is None else pixel_histogram(score_map, *masks))


def label_ranks(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Rank of each image's label among its predictions, 0 for the best: logits N x K, labels N -> N int64.

    Of equal logits, the lower class ranks first, as in argmax. An image with a NaN logit has rank K, after
    all classes: it is never Top-1. With K < 5, all ranks are below 5, so Top-5 includes every image.
    """
    own = np.take_along_axis(logits, labels[:, None], 1)
    before = (logits > own) | ((logits == own) & (np.arange(logits.shape[1]) < labels[:, None]))
    return np.where(np.isnan(logits).any(1), logits.shape[1], before.sum(1))


def pixel_histogram(score_map: np.ndarray, mask: np.ndarray, ignore: np.ndarray) -> np.ndarray:
    """Scores of the pixels per bin of EDGES: 2 x bins int64, object pixels and other pixels.

    score_map H x W in [0, 1]; mask and ignore H x W bool. Pixels in `ignore` do not count, unless they are in
    `mask`.
    """
    bins = np.searchsorted(EDGES, score_map, side="right") - 1
    regions = mask, ~mask & ~ignore
    return np.stack([np.bincount(bins[region], minlength=len(EDGES) - 1) for region in regions])


def average_precision(histogram: np.ndarray) -> float | None:
    """PxAP (Choe et al.): sum of precision * (increase in recall) over descending thresholds, in percent.

    histogram: the sum of `pixel_histogram` over all images. None without object pixels.
    """
    true_positive, false_positive = histogram[:, ::-1].cumsum(axis=1)
    if not true_positive[-1]:
        return None
    precision = true_positive / np.maximum(true_positive + false_positive, 1)
    recall = true_positive / true_positive[-1]
    return 100 * float((precision * np.diff(recall, prepend=0)).sum())


# -------------------------------------------------------------------------------------------- all images


def percent(hits: np.ndarray) -> float:
    """Share of True values in percent, from integer counts: hits N bool, N >= 1."""
    return 100 * int(hits.sum()) / len(hits)


@dataclass
class Evaluator:
    """The images of a split, by their index in it.

    Results do not depend on the order of `add`, and merging the parts of several processes is exact. No image
    counts twice.
    """

    images: dict[int, Measured] = field(default_factory=dict)
    ranks: dict[int, int] = field(default_factory=dict)  # of the label; empty without a classifier
    predicted: dict[int, int] = field(default_factory=dict)  # Top-1 class
    pixels: np.ndarray = field(default_factory=lambda: np.zeros((2, len(EDGES) - 1), dtype=np.int64))
    masked: int = 0  # images with masks

    def add(self, index: int, found: Measured, rank: int | None = None, predicted: int | None = None) -> None:
        """Adds an image. index: in the split; found: from `measure`; rank: from `label_ranks`.

        Raises ValueError if this index was added before.
        """
        if index in self.images:
            raise ValueError(f"image {index} was added before")
        if found.pixels is not None:
            self.pixels, self.masked = self.pixels + found.pixels, self.masked + 1
        self.images[index] = found._replace(pixels=None)
        if rank is not None:
            self.ranks[index], self.predicted[index] = int(rank), predicted

    def merge(self, other: Evaluator) -> None:
        """Adds the images of another process. Raises ValueError if an image is in both."""
        for index, found in other.images.items():
            self.add(index, found, other.ranks.get(index), other.predicted.get(index))
        self.pixels, self.masked = self.pixels + other.pixels, self.masked + other.masked

    def result(
        self, val_levels: dict[str, int] | None = None, threshold: float | None = None
    ) -> dict[str, Any]:
        """{"images", "metrics", "levels", "thresholds", "curves"} as in results_*.json, in percent.

        Metrics, levels and curves are None where boxes, masks or logits are missing. levels: the best level
        per IoU ("30", "50", "70") for all contours, and "largest" for the largest contour at IoU 50; of
        equally good levels, the lowest. curves: the accuracy at each of the 255 levels, likewise. thresholds:
        levels / 255. "images_with_boxes" and "images_with_masks": where some images have them, but not all.
        val_levels: the `levels` of another split (train-fullsup). They give the accuracy at thresholds that
        were not chosen on these images. threshold: the fixed one that `measure` was given.
        Raises InputError where there is nothing to measure, and where some images have no rank.
        """
        order = sorted(self.images)
        boxed = [i for i in order if self.images[i].ious is not None]
        if not boxed and not self.masked and not self.ranks:
            raise InputError("no boxes, masks or logits: there is nothing to measure")
        if self.ranks and len(self.ranks) < len(order):
            raise InputError("some images have logits and others not: pass them for all images, or for none")
        ranks = np.array([self.ranks[i] for i in order]) if self.ranks else None
        metrics = dict.fromkeys(
            ("max_box_acc_v2", "max_box_acc", "gt_known_loc", "gt_known_loc_largest", "top1_loc", "top5_loc")
            + ("top1_cls", "top5_cls", "max_box_acc_v2_at_val_threshold", "pxap")
        )
        result = {"images": len(order), "metrics": metrics}
        for kind, count in (("boxes", len(boxed)), ("masks", self.masked)):
            if 0 < count < len(order):
                result[f"images_with_{kind}"] = count
        result |= dict.fromkeys(("levels", "thresholds", "curves"))
        if ranks is not None:
            metrics |= {f"top{k}_cls": percent(ranks < k) for k in (1, 5)}
        if self.masked:
            metrics["pxap"] = average_precision(self.pixels)
        if boxed:
            boxed_ranks = None if ranks is None else np.array([self.ranks[i] for i in boxed])
            found = _box_metrics([self.images[i] for i in boxed], boxed_ranks, val_levels, threshold)
            metrics |= found.pop("metrics")
            result |= found
        return result


def _box_metrics(
    images: list[Measured],
    ranks: np.ndarray | None,
    val_levels: dict[str, int] | None,
    threshold: float | None,
) -> dict[str, Any]:
    """`Evaluator.result` of images with boxes. ranks: N of the labels."""
    ious = np.stack([found.ious for found in images], axis=1)  # 2 x N x 255
    hits = {str(delta): ious[0] >= delta / 100 for delta in DELTAS}
    hits["largest"] = ious[1] >= 0.5
    curves = {name: [percent(at_level) for at_level in h.T] for name, h in hits.items()}
    levels = {name: int(np.argmax(curve)) for name, curve in curves.items()}
    best = {name: curve[levels[name]] for name, curve in curves.items()}
    metrics: dict[str, Any] = {
        "max_box_acc_v2": _with_mean(best),
        "max_box_acc": best["largest"],
        "gt_known_loc": best["50"],
        "gt_known_loc_largest": best["largest"],
        **_top_k(hits["50"][:, levels["50"]], ranks),
    }
    if val_levels is not None:
        at_val = {name: curve[val_levels[name]] for name, curve in curves.items()}
        metrics["max_box_acc_v2_at_val_threshold"] = _with_mean(at_val)
    if threshold is not None:
        at_fixed = np.array([found.ious[1, found.fixed_level] >= 0.5 for found in images])
        fixed = {"threshold": threshold, "gt_known_loc": percent(at_fixed), **_top_k(at_fixed, ranks)}
        metrics["fixed_threshold"] = fixed
    thresholds = {name: level / LEVELS for name, level in levels.items()}
    return {"metrics": metrics, "levels": levels, "thresholds": thresholds, "curves": curves}


def _top_k(hits: np.ndarray, ranks: np.ndarray | None) -> dict[str, float | None]:
    """Top-1 and Top-5 Loc: the box is right, and the label among the k best classes. hits, ranks: N."""
    return {f"top{k}_loc": None if ranks is None else percent(hits & (ranks < k)) for k in (1, 5)}


def _with_mean(accuracies: dict[str, float]) -> dict[str, float]:
    """The accuracies at the three IoU thresholds and their mean, which is MaxBoxAccV2."""
    of_deltas = {str(delta): accuracies[str(delta)] for delta in DELTAS}
    return of_deltas | {"mean": sum(of_deltas.values()) / len(DELTAS)}


def flatness(curve: Sequence[float]) -> tuple[int, int, float | None]:
    """(first, last, width): the levels around the maximum with at least 95 % of its accuracy, without a gap.

    curve: the accuracy at each level (claim C.1: how flat it is near its maximum).
    width: a fraction of the thresholds, in (0, 1]; None for a curve that is 0 everywhere.
    """
    top = int(np.argmax(curve))
    near = np.asarray(curve) >= 0.95 * curve[top]
    breaks = np.flatnonzero(~near)
    first = int(breaks[breaks < top].max(initial=-1)) + 1
    last = int(breaks[breaks > top].min(initial=len(curve))) - 1
    return first, last, (last - first + 1) / len(curve) if curve[top] > 0 else None


def selection_score(metrics: dict[str, Any]) -> tuple[str, float]:
    """(name, value) of the metric that selects the best epoch on val (appendix B): mean MaxBoxAccV2.

    PxAP where there are masks only, Top-1 classification where there is neither.
    """
    if metrics["max_box_acc_v2"] is not None:
        return "MaxBoxAccV2", metrics["max_box_acc_v2"]["mean"]
    return ("PxAP", metrics["pxap"]) if metrics["pxap"] is not None else ("Top-1 cls", metrics["top1_cls"])
