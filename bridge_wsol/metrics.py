"""The field's metrics (Choe et al., CVPR 2020): box accuracies over all thresholds, PxAP. Results in percent.

One IoU per image and level is all the box metrics need: acc_delta(level) is the share of images whose IoU at that level
is at least delta, and a threshold is chosen once for the whole set, never per image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .boxes import LEVELS, iou_matrix, level_boxes

DELTAS = (30, 50, 70)  # IoU thresholds of MaxBoxAccV2, percent


class Localization(NamedTuple):
    """What one image's map says at every level."""

    ious: (
        np.ndarray
    )  # 2 x 255 float64, best IoU with any ground-truth box: row 0 over all contours, row 1 the largest one's
    largest: np.ndarray  # 255 x 4 int64, the largest contour's box


def localize(score_map: np.ndarray, boxes: np.ndarray) -> Localization:
    """Boxes of every level against the ground truth: score_map H x W in [0, 1]; boxes G x 4 in the map's pixels, G >= 1."""
    found = level_boxes(score_map)
    ious = np.zeros((2, LEVELS))
    np.maximum.at(ious[0], found.levels, iou_matrix(found.boxes, boxes).max(1))
    ious[1] = iou_matrix(found.largest, boxes).max(1)
    return Localization(ious, found.largest)


def label_ranks(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Rank of each true class among the predictions, 0 the best: logits N x K, labels N -> N int64.

    Of equal logits the lower class comes first (as argmax has it), and an image with a logit that is NaN ranks last: a network that
    says nothing is not right.
    """
    own = np.take_along_axis(logits, labels[:, None], 1)
    before = (logits > own) | ((logits == own) & (np.arange(logits.shape[1]) < labels[:, None]))
    return np.where(np.isnan(logits).any(1), logits.shape[1], before.sum(1))


def top_k_accuracy(ranks: Sequence[int], k: int) -> float:
    """Percent of images whose true class is among the k first predictions."""
    return percent(np.asarray(ranks) < k)


def percent(hits: np.ndarray) -> float:
    """Share of True in percent, from exact counts."""
    return 100 * int(hits.sum()) / len(hits)


class BoxAccuracy:
    """MaxBoxAcc, MaxBoxAccV2, GT-known, Top-1 and Top-5 Loc of a set of images.

    Images are kept by their index in the split: results do not depend on the order of updates, and merging the parts of several
    processes is exact. An image that comes twice is an error, not a second vote.
    """

    def __init__(self) -> None:
        self.ious: dict[int, np.ndarray] = {}  # index -> 2 x 255
        self.ranks: dict[int, int] = {}  # index -> rank of the true class; absent when there are no logits

    def update(self, index: int, ious: np.ndarray, rank: int | None = None) -> None:
        """One image: its index in the split, the `ious` of its `localize`, and its `label_ranks` where there is a classifier."""
        if index in self.ious:
            raise ValueError(f"image {index} was counted before")
        self.ious[index] = ious
        if rank is not None:
            self.ranks[index] = int(rank)

    def merge(self, other: BoxAccuracy) -> None:
        """Adds the images another process saw. Raises ValueError where both saw the same one."""
        for index, ious in other.ious.items():
            self.update(index, ious, other.ranks.get(index))

    def compute(self, val_levels: dict[str, int] | None = None) -> dict[str, Any]:
        """{"metrics", "levels", "curves"} as in results_*.json; levels are the chosen ones, the lowest of equals.

        val_levels: the `levels` chosen on another split (train-fullsup), for the accuracy at thresholds that never saw these images.
        Raises ValueError when there are no images.
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
        """GT-known, Top-1 and Top-5 Loc of the largest contour where no threshold is searched: the rule of the papers since CAM (CVPR 2016).

        levels: index -> the image's own level (`boxes.fixed_level`). Percent; Top-k is None without logits.
        Raises ValueError when there are no images.
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


def _with_mean(accuracies: dict[str, float]) -> dict[str, float]:
    of_deltas = {str(delta): accuracies[str(delta)] for delta in DELTAS}
    return of_deltas | {"mean": sum(of_deltas.values()) / len(DELTAS)}


class PixelAveragePrecision:
    """PxAP: area under the pixel precision-recall curve of all images together, for data with masks (OpenImages30k).

    Scores are histogrammed at the field's edges, 0, 0.001, ..., 0.999, 1, 2, 3, so memory does not grow with the number of images and
    merging is exact.
    """

    EDGES = np.append(np.arange(0, 1, 0.001), [1.0, 2.0, 3.0])

    def __init__(self) -> None:
        self.positive = np.zeros(len(self.EDGES) - 1, dtype=np.int64)  # pixels of objects by score
        self.negative = np.zeros_like(self.positive)

    def update(self, score_map: np.ndarray, mask: np.ndarray, ignore: np.ndarray | None = None) -> None:
        """One image: score_map H x W in [0, 1]; mask and ignore H x W bool. Ignored pixels outside the mask do not count."""
        bins = np.searchsorted(self.EDGES, score_map, side="right") - 1
        outside = ~mask if ignore is None else ~mask & ~ignore
        self.positive += np.bincount(bins[mask], minlength=len(self.positive))
        self.negative += np.bincount(bins[outside], minlength=len(self.negative))

    def merge(self, other: PixelAveragePrecision) -> None:
        self.positive += other.positive
        self.negative += other.negative

    def compute(self) -> float | None:
        """PxAP = sum of precision * (step in recall), thresholds descending, in percent; None without any object pixel."""
        true_positive, false_positive = self.positive[::-1].cumsum(), self.negative[::-1].cumsum()
        if not true_positive[-1]:
            return None
        precision = true_positive / np.maximum(true_positive + false_positive, 1)
        recall = true_positive / true_positive[-1]
        return 100 * float((precision * np.diff(recall, prepend=0)).sum())
