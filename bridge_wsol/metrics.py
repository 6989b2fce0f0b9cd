"""Metrics of the protocol (Choe et al., CVPR 2020): MaxBoxAcc, MaxBoxAccV2, GT-known and Top-k Loc, PxAP.

All results are in percent. The box metrics need one IoU per image and level: acc_delta(level) is the share of
images whose IoU at this level is at least delta. One threshold is chosen for the whole set, not per image.
Level t is the threshold t / 255 on the quantized map (see boxes.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .boxes import LEVELS, iou_matrix, level_boxes

DELTAS = (30, 50, 70)  # IoU thresholds of MaxBoxAccV2, in percent


class Localization(NamedTuple):
    """Boxes of one image at every level, compared with the ground truth."""

    # 2 x 255 float64 in [0, 1], best IoU with any ground-truth box. Row 0: all contours; row 1: the largest
    # one.
    ious: np.ndarray
    largest: np.ndarray  # 255 x 4 int64, box of the largest contour, in pixels of the map


def localize(score_map: np.ndarray, boxes: np.ndarray) -> Localization:
    """IoU of the boxes of every level with the ground truth.

    score_map H x W in [0, 1]; boxes G x 4 (x0, y0, x1, y1, corners included) in pixels of the map, G >= 1.
    Raises ValueError as `boxes.level_boxes` does.
    """
    found = level_boxes(score_map)
    ious = np.zeros((2, LEVELS))
    np.maximum.at(ious[0], found.levels, iou_matrix(found.boxes, boxes).max(1))
    ious[1] = iou_matrix(found.largest, boxes).max(1)
    return Localization(ious, found.largest)


def label_ranks(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Rank of each image's label among its predictions, 0 for the best: logits N x K, labels N -> N int64.

    Of equal logits, the lower class ranks first, as in argmax. An image with a NaN logit has rank K, after
    all classes: it is never Top-1. With K < 5, all ranks are below 5, so Top-5 includes every image.
    """
    own = np.take_along_axis(logits, labels[:, None], 1)
    before = (logits > own) | ((logits == own) & (np.arange(logits.shape[1]) < labels[:, None]))
    return np.where(np.isnan(logits).any(1), logits.shape[1], before.sum(1))


def top_k_accuracy(ranks: Sequence[int], k: int) -> float:
    """Percent of images whose label is among the top k predictions (`label_ranks`)."""
    return percent(np.asarray(ranks) < k)


def percent(hits: np.ndarray) -> float:
    """Share of True values in percent, from integer counts: hits N bool, N >= 1."""
    return 100 * int(hits.sum()) / len(hits)


class BoxAccuracy:
    """MaxBoxAcc, MaxBoxAccV2, GT-known, Top-1 and Top-5 Loc of a set of images (Choe et al.).

    Images are stored by their index in the split. The results do not depend on the order of updates, and
    merging the parts of several processes is exact. An image that is added twice raises an error.
    """

    def __init__(self) -> None:
        self.ious: dict[int, np.ndarray] = {}  # index -> 2 x 255
        self.ranks: dict[int, int] = {}  # index -> rank of the label; empty without logits

    def update(self, index: int, ious: np.ndarray, rank: int | None = None) -> None:
        """Adds one image.

        index: its index in the split; ious: from `localize`; rank: from `label_ranks`, None without a
        classifier. Raises ValueError if this index was added before.
        """
        if index in self.ious:
            raise ValueError(f"image {index} was added before")
        self.ious[index] = ious
        if rank is not None:
            self.ranks[index] = int(rank)

    def merge(self, other: BoxAccuracy) -> None:
        """Adds the images of another process. Raises ValueError if an image is in both."""
        for index, ious in other.ious.items():
            self.update(index, ious, other.ranks.get(index))

    def compute(self, val_levels: dict[str, int] | None = None) -> dict[str, Any]:
        """{"metrics", "levels", "curves"} as in results_*.json, in percent.

        levels: the best level per IoU ("30", "50", "70") for all contours, and "largest" for the largest
        contour at IoU 50. Of equally good levels, the lowest. curves: the accuracy at each of the 255 levels,
        likewise.
        val_levels: the `levels` of another split (train-fullsup). They give the accuracy at thresholds that
        were not chosen on these images; without them it is None. Top-k Loc is None without ranks.
        Raises ValueError if there are no images.
        """
        if not self.ious:
            raise ValueError("no images to evaluate")
        order = sorted(self.ious)
        ious = np.stack([self.ious[i] for i in order], axis=1)  # 2 x N x 255
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
            "top1_loc": None,
            "top5_loc": None,
            "max_box_acc_v2_at_val_threshold": None,
        }
        if self.ranks:
            ranks = np.array([self.ranks[i] for i in order])
            at_threshold = hits["50"][:, levels["50"]]
            metrics |= {f"top{k}_loc": percent(at_threshold & (ranks < k)) for k in (1, 5)}
        if val_levels is not None:
            metrics["max_box_acc_v2_at_val_threshold"] = _with_mean(
                {n: c[val_levels[n]] for n, c in curves.items()}
            )
        return {"metrics": metrics, "levels": levels, "curves": curves}

    def at_fixed_levels(self, levels: dict[int, int]) -> dict[str, float | None]:
        """GT-known, Top-1 and Top-5 Loc at a fixed threshold, in percent (the rule of CAM, CVPR 2016).

        levels: {index: the level of this image}, from `boxes.fixed_level`. The box is the one of the largest
        contour. No threshold is searched. Top-k is None without ranks. Raises ValueError if there are no
        images.
        """
        if not self.ious:
            raise ValueError("no images to evaluate")
        order = sorted(self.ious)
        hits = np.array([self.ious[i][1, levels[i]] >= 0.5 for i in order])
        found: dict[str, float | None] = {"gt_known_loc": percent(hits), "top1_loc": None, "top5_loc": None}
        if self.ranks:
            ranks = np.array([self.ranks[i] for i in order])
            found |= {f"top{k}_loc": percent(hits & (ranks < k)) for k in (1, 5)}
        return found


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


def _with_mean(accuracies: dict[str, float]) -> dict[str, float]:
    """The accuracies at the three IoU thresholds and their mean, which is MaxBoxAccV2."""
    of_deltas = {str(delta): accuracies[str(delta)] for delta in DELTAS}
    return of_deltas | {"mean": sum(of_deltas.values()) / len(DELTAS)}


class PixelAveragePrecision:
    """PxAP (Choe et al.): area under the pixel precision-recall curve of all images, for data with masks.

    Scores are counted in bins with the edges of the protocol: 0, 0.001, ..., 0.999, 1, 2, 3. Memory does not
    grow with the number of images, and merging is exact.
    """

    EDGES = np.append(np.arange(0, 1, 0.001), [1.0, 2.0, 3.0])

    def __init__(self) -> None:
        self.positive = np.zeros(len(self.EDGES) - 1, dtype=np.int64)  # object pixels per score bin
        self.negative = np.zeros_like(self.positive)

    def update(self, score_map: np.ndarray, mask: np.ndarray, ignore: np.ndarray | None = None) -> None:
        """Adds one image: score_map H x W in [0, 1]; mask and ignore H x W bool.

        Pixels in `ignore` do not count, unless they are in `mask`.
        """
        bins = np.searchsorted(self.EDGES, score_map, side="right") - 1
        outside = ~mask if ignore is None else ~mask & ~ignore
        self.positive += np.bincount(bins[mask], minlength=len(self.positive))
        self.negative += np.bincount(bins[outside], minlength=len(self.negative))

    def merge(self, other: PixelAveragePrecision) -> None:
        """Adds the pixels of another process."""
        self.positive += other.positive
        self.negative += other.negative

    def compute(self) -> float | None:
        """PxAP = sum of precision * (increase in recall) over descending thresholds, in percent.

        None without object pixels.
        """
        true_positive, false_positive = self.positive[::-1].cumsum(), self.negative[::-1].cumsum()
        if not true_positive[-1]:
            return None
        precision = true_positive / np.maximum(true_positive + false_positive, 1)
        recall = true_positive / true_positive[-1]
        return 100 * float((precision * np.diff(recall, prepend=0)).sum())
