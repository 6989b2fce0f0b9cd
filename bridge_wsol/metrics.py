"""Metrics of the protocol (Choe et al., CVPR 2020): MaxBoxAcc, MaxBoxAccV2, GT-known and Top-k Loc, PxAP.

All results are in percent. The box metrics need one IoU per image and level: acc_delta(level) is the share of
images whose IoU at this level is at least delta. One threshold is chosen for the whole set, not per image.

    measure(score_map, boxes)                  one image, also in a worker process
    PerImage.stack(results).result()           all images: metrics, levels, curves
    intervals([per_image], digest)             95 % interval of each metric over the choice of test images
    difference(a, b, digest)                   B - A of each metric with its interval, means over seeds
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .boxes import LEVELS, fixed_level, iou_matrix, level_boxes
from .utils import InputError

DELTAS = (30, 50, 70)  # IoU thresholds of MaxBoxAccV2, in percent
LEVEL_NAMES = ("30", "50", "70", "largest")  # the chosen levels: all contours by IoU, the largest contour

# Edges of the bins in which PxAP counts scores, as in the protocol.
EDGES = np.append(np.arange(0, 1, 0.001), [1.0, 2.0, 3.0])


# --------------------------------------------------------------------------------------------- one image


class ImageResult(NamedTuple):
    """What is measured of one image. None: no boxes, no masks, no fixed threshold, or no logits."""

    # 4 x 255 bool: whether a box is correct at each level, in the order of LEVEL_NAMES.
    correct: np.ndarray | None = None
    # 2 x 255 float64 in [0, 1], the best IoU at each level: row 0 of all contours, row 1 of the largest one.
    ious: np.ndarray | None = None
    largest: np.ndarray | None = None  # 255 x 4 int64, box of the largest contour, in pixels of the map
    pixels: np.ndarray | None = None  # 2 x bins int32, `pixel_histogram`
    fixed_level: int | None = None  # level of the fixed threshold
    rank: int | None = None  # of the label, `label_ranks`
    predicted: int | None = None  # Top-1 class
    remarks: tuple[tuple[str, str], ...] = ()  # on its masks, `data.load_masks`


def measure(
    score_map: np.ndarray,
    boxes: np.ndarray | None = None,
    masks: tuple[np.ndarray, np.ndarray] | None = None,
    threshold: float | None = None,
) -> ImageResult:
    """Measures one image at every level; rank and predicted stay None.

    score_map: H x W in [0, 1]. boxes: G x 4 (x0, y0, x1, y1, corners included) in pixels of the map, G >= 1.
    masks: (mask, ignore), H x W bool. threshold: a fixed one, a fraction of the map's maximum in [0, 1).
    Raises ValueError as `boxes.level_boxes` and `boxes.fixed_level` do.
    """
    result = ImageResult()
    if boxes is not None:
        found = level_boxes(score_map)
        ious = np.zeros((2, LEVELS))
        np.maximum.at(ious[0], found.levels, iou_matrix(found.boxes, boxes).max(1))
        ious[1] = iou_matrix(found.largest, boxes).max(1)
        level = None if threshold is None else fixed_level(score_map, threshold)
        result = ImageResult(correct_boxes(ious), ious, found.largest, fixed_level=level)
    return result if masks is None else result._replace(pixels=pixel_histogram(score_map, *masks))


def correct_boxes(ious: np.ndarray) -> np.ndarray:
    """`ImageResult.correct` of `ImageResult.ious`: an IoU of exactly delta counts."""
    return np.stack([*(ious[0] >= delta / 100 for delta in DELTAS), ious[1] >= 0.5])


def label_ranks(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Rank of each image's label among its predictions, 0 for the best: logits N x K, labels N -> N int64.

    Of equal logits, the lower class ranks first, as in argmax. An image with a NaN logit has rank K, after
    all classes: it is never Top-1. With K < 5, all ranks are below 5, so Top-5 includes every image.
    """
    own = np.take_along_axis(logits, labels[:, None], 1)
    before = (logits > own) | ((logits == own) & (np.arange(logits.shape[1]) < labels[:, None]))
    return np.where(np.isnan(logits).any(1), logits.shape[1], before.sum(1))


def pixel_histogram(score_map: np.ndarray, mask: np.ndarray, ignore: np.ndarray) -> np.ndarray:
    """Scores of the pixels per bin of EDGES: 2 x bins int32, object pixels and other pixels.

    score_map H x W in [0, 1]; mask and ignore H x W bool. Pixels in `ignore` do not count, unless they are in
    `mask`.
    """
    bins = np.searchsorted(EDGES, score_map, side="right") - 1
    regions = mask, ~mask & ~ignore
    counts = [np.bincount(bins[region], minlength=len(EDGES) - 1) for region in regions]
    return np.stack(counts).astype(np.int32)


def average_precision(histogram: np.ndarray) -> np.ndarray:
    """PxAP (Choe et al.): sum of precision * (increase in recall) over descending thresholds, in percent.

    histogram: ... x 2 x bins, sums of `pixel_histogram` -> ... float64; NaN without object pixels.
    """
    true_positive, false_positive = _descending(histogram)
    precision = true_positive / np.maximum(true_positive + false_positive, 1)
    with np.errstate(invalid="ignore"):
        recall = true_positive / true_positive[..., -1:]
    return 100 * (precision * np.diff(recall, prepend=0)).sum(-1)


def peak_iou(histogram: np.ndarray) -> np.ndarray:
    """Peak IoU of the pooled pixels (as DA-WSOL and BagCAMs report it), in percent.

    The maximum over thresholds of TP / (TP + FP + FN). Shapes and NaN as in `average_precision`.
    """
    true_positive, false_positive = _descending(histogram)
    objects = true_positive[..., -1:]  # TP + FN
    with np.errstate(invalid="ignore"):
        return 100 * (true_positive / np.where(objects > 0, objects + false_positive, 0)).max(-1)


def precision_at_recall(histogram: np.ndarray) -> dict[str, float]:
    """{recall: precision}, both in percent, of the pooled pixels at recalls of 10, 20 ... 90 %.

    histogram: 2 x bins, with object pixels. Each at the highest threshold that reaches the recall.
    """
    true_positive, false_positive = _descending(histogram)
    recalls = range(10, 100, 10)
    at = np.searchsorted(true_positive, [true_positive[-1] * recall / 100 for recall in recalls])
    precision = 100 * true_positive[at] / (true_positive + false_positive)[at]
    return dict(zip(map(str, recalls), precision.tolist()))


def _descending(histogram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(object pixels, other pixels) with at least the score of each bin, the highest bin first."""
    sums = histogram[..., ::-1].cumsum(-1)
    return sums[..., 0, :], sums[..., 1, :]


# -------------------------------------------------------------------------------------------- all images


@dataclass(frozen=True)
class PerImage:
    """What is correct in each of the N images of a split, in their order: all that the metrics need."""

    boxed: np.ndarray  # N bool: the image has boxes
    masked: np.ndarray  # N bool: it has masks
    correct: np.ndarray | None = None  # N x 4 x 255 bool, `ImageResult.correct`; False without boxes
    ranks: np.ndarray | None = None  # N int, of the label
    pixels: np.ndarray | None = None  # N x 2 x bins int32, `pixel_histogram`; 0 without masks
    fixed: np.ndarray | None = None  # N bool: whether the largest contour is correct at the fixed threshold
    threshold: float | None = None  # the fixed one, a fraction of each map's maximum
    val_levels: dict[str, int] | None = None  # "levels" of val, for the accuracy at thresholds chosen there

    @classmethod
    def stack(
        cls,
        results: Sequence[ImageResult],
        val_levels: dict[str, int] | None = None,
        threshold: float | None = None,
    ) -> PerImage:
        """The images of a split. val_levels, threshold: as the fields; threshold as `measure` had it.

        Raises InputError where there is nothing to measure, and where some images have no logits.
        """
        boxed = np.array([x.correct is not None for x in results], dtype=bool)
        masked = np.array([x.pixels is not None for x in results], dtype=bool)
        ranks = [x.rank for x in results if x.rank is not None]
        if not boxed.any() and not masked.any() and not ranks:
            raise InputError("no boxes, masks or logits: there is nothing to measure")
        if 0 < len(ranks) < len(results):
            raise InputError("some images have logits and others not: pass them for all images, or for none")
        correct = fixed = pixels = None
        if boxed.any():
            nowhere = np.zeros((len(LEVEL_NAMES), LEVELS), dtype=bool)
            correct = np.stack([nowhere if x.correct is None else x.correct for x in results])
            if threshold is not None:
                if any(x.correct is not None and x.fixed_level is None for x in results):
                    raise ValueError("an image was measured without the fixed threshold")
                fixed = np.array([c[-1, x.fixed_level or 0] for c, x in zip(correct, results)])
        if masked.any():
            nothing = np.zeros((2, len(EDGES) - 1), dtype=np.int32)
            pixels = np.stack([nothing if x.pixels is None else x.pixels for x in results])
        val_levels = val_levels if boxed.any() else None
        of_labels = np.array(ranks) if ranks else None
        return cls(boxed, masked, correct, of_labels, pixels, fixed, threshold, val_levels)

    def arrays(self) -> dict[str, Any]:
        """The fields that are not None, as arrays for a file: 128 bytes an image, and its histogram."""
        levels = self.val_levels and [self.val_levels[name] for name in LEVEL_NAMES]
        fields = {
            "right": None if self.correct is None else np.packbits(self.correct, axis=-1),
            "ranks": None if self.ranks is None else self.ranks.clip(max=255).astype(np.uint8),
            "val_levels": levels,
            **{name: getattr(self, name) for name in ("boxed", "masked", "pixels", "fixed", "threshold")},
        }
        return {name: value for name, value in fields.items() if value is not None}

    @classmethod
    def of_arrays(cls, arrays: dict[str, np.ndarray]) -> PerImage:
        """The inverse of `arrays`."""
        fields: dict[str, Any] = dict(arrays)
        if "right" in fields:
            fields["correct"] = np.unpackbits(fields.pop("right"), axis=-1, count=LEVELS).astype(bool)
        if "val_levels" in fields:
            fields["val_levels"] = dict(zip(LEVEL_NAMES, fields["val_levels"].tolist(), strict=True))
        fields |= {"threshold": float(fields["threshold"])} if "threshold" in fields else {}
        return cls(**fields)

    def uniform_weights(self) -> np.ndarray:
        """The sample that has each image once, 1 x N: the split itself."""
        return np.ones((1, len(self.boxed)), dtype=np.uint8)

    def curves(self, weights: np.ndarray) -> np.ndarray:
        """The accuracy at each level in R samples, R x 4 x 255 in percent, in the order of LEVEL_NAMES."""
        return _percent(weights, self.correct, self.boxed)

    def metrics(self, weights: np.ndarray) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
        """(metrics, levels, curves) of R samples of the images. weights: R x N, how often a sample has each.

        metrics: the keys of results_*.json, each with R float64 in percent (NaN where the sample has no such
        image), or None. levels: R x 4 int, the best ones; of equally good levels, the lowest. The sums are of
        whole numbers, so they are exact.
        """
        metrics: dict[str, Any] = dict.fromkeys(
            ("max_box_acc_v2", "max_box_acc", "gt_known_loc", "gt_known_loc_largest", "top1_loc", "top5_loc")
            + ("top1_cls", "top5_cls", "max_box_acc_v2_at_val_threshold", "pxap", "piou")
        )
        best = {} if self.ranks is None else {k: self.ranks < k for k in (1, 5)}
        metrics |= {f"top{k}_cls": _percent(weights, top, np.ones_like(top)) for k, top in best.items()}
        if self.pixels is not None:
            pooled = _sums(weights, self.pixels)
            metrics |= {"pxap": average_precision(pooled), "piou": peak_iou(pooled)}
        if self.correct is None:
            return metrics, np.zeros((len(weights), 0), dtype=int), np.zeros((len(weights), 0, LEVELS))
        curves = self.curves(weights)
        levels, samples = curves.argmax(2), np.arange(len(weights))
        chosen = dict(zip(LEVEL_NAMES, curves.max(2).T))
        metrics |= {"max_box_acc_v2": _with_mean(chosen), "gt_known_loc": chosen["50"]}
        metrics |= dict.fromkeys(("max_box_acc", "gt_known_loc_largest"), chosen["largest"])
        if self.val_levels is not None:
            at_val = {name: curves[:, i, self.val_levels[name]] for i, name in enumerate(LEVEL_NAMES)}
            metrics["max_box_acc_v2_at_val_threshold"] = _with_mean(at_val)
        for k, top in best.items():  # the box is correct, and the label among the k best classes
            of_level = _percent(weights, self.correct[:, 1] & top[:, None], self.boxed)
            metrics[f"top{k}_loc"] = of_level[samples, levels[:, 1]]
        if self.fixed is not None:
            fixed = {"gt_known_loc": self.fixed, **dict.fromkeys(("top1_loc", "top5_loc"))}
            fixed |= {f"top{k}_loc": self.fixed & top for k, top in best.items()}
            metrics["fixed_threshold"] = tree_map(
                lambda correct: _percent(weights, correct, self.boxed), fixed
            )
        return metrics, levels, curves

    def result(self) -> dict[str, Any]:
        """{"images", "metrics", "levels", "thresholds", "curves"} as in results_*.json, in percent.

        Metrics, levels and curves are None where boxes, masks or logits are missing. levels: the best level
        per IoU ("30", "50", "70") for all contours, and "largest" for the largest contour at IoU 50.
        thresholds: levels / 255. curves: the accuracy at each of the 255 levels. "images_with_boxes" and
        "images_with_masks": where some images have them, but not all. "precision_at_recall": with PxAP only.
        """
        metrics, levels, curves = self.metrics(self.uniform_weights())
        metrics = tree_map(lambda x: None if np.isnan(x[0]) else float(x[0]), metrics)
        if "fixed_threshold" in metrics:
            metrics["fixed_threshold"] = {"threshold": self.threshold, **metrics["fixed_threshold"]}
        result = {"images": len(self.boxed), "metrics": metrics}
        for kind, count in (("boxes", int(self.boxed.sum())), ("masks", int(self.masked.sum()))):
            if 0 < count < len(self.boxed):
                result[f"images_with_{kind}"] = count
        result |= dict.fromkeys(("levels", "thresholds", "curves"))
        if metrics["pxap"] is not None:
            result["precision_at_recall"] = precision_at_recall(self.pixels.sum(0))
        if self.correct is not None:
            result["levels"] = dict(zip(LEVEL_NAMES, levels[0].tolist()))
            result["thresholds"] = {name: level / LEVELS for name, level in result["levels"].items()}
            result["curves"] = dict(zip(LEVEL_NAMES, curves[0].tolist()))
        return result


BLOCK = 2048  # images


def _sums(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """R x N weights, N x ... values -> R x ... float64, exact for whole numbers; in blocks, for memory."""
    flat, total = values.reshape(len(values), -1), 0.0
    for start in range(0, len(flat), BLOCK):
        block = slice(start, start + BLOCK)
        total = total + weights[:, block].astype(float) @ flat[block].astype(float)
    return total.reshape(len(weights), *values.shape[1:])


def _percent(weights: np.ndarray, correct: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Share of the correct, N x ... bool, among the images `among`, N bool: R x ... in percent."""
    of = _sums(weights, among).reshape(-1, *[1] * (correct.ndim - 1))
    with np.errstate(invalid="ignore"):
        return 100 * _sums(weights, correct) / of


def _with_mean(accuracies: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The accuracies at the three IoU thresholds and their mean, which is MaxBoxAccV2."""
    of_deltas = {str(delta): accuracies[str(delta)] for delta in DELTAS}
    return of_deltas | {"mean": sum(of_deltas.values()) / len(DELTAS)}


def tree_map(function: Callable[..., Any], *trees: Any) -> Any:
    """The function of the leaves of nested dicts of metrics, by the keys that all have. None stays None."""
    if any(tree is None for tree in trees):
        return None
    if isinstance(trees[0], dict):
        shared = [key for key in trees[0] if all(key in tree for tree in trees)]
        return {key: tree_map(function, *(tree[key] for tree in trees)) for key in shared}
    return function(*trees)


def middle_level(curve: Sequence[float]) -> int:
    """The middle one of the best levels of a curve: the accuracy at each of the 255 levels."""
    best = np.flatnonzero(np.asarray(curve) == np.max(curve))
    return int(best[len(best) // 2])


def flat(metrics: dict[str, Any]) -> dict[str, Any]:
    """Metrics, or what else has their keys, also by flat keys: v2_30, v2_mean, v2_at_val, fixed_top1_loc."""
    found = metrics | {"v2_at_val": (metrics.get("max_box_acc_v2_at_val_threshold") or {}).get("mean")}
    for prefix, key in (("v2", "max_box_acc_v2"), ("fixed", "fixed_threshold")):
        found |= {f"{prefix}_{name}": value for name, value in (metrics.get(key) or {}).items()}
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


def selection_score(metrics: dict[str, Any]) -> tuple[str, float]:
    """(name, value) of the metric that selects the best epoch on val (appendix B): mean MaxBoxAccV2.

    PxAP where there are masks only, Top-1 classification where there is neither.
    """
    if metrics["max_box_acc_v2"] is not None:
        return "MaxBoxAccV2", metrics["max_box_acc_v2"]["mean"]
    return ("PxAP", metrics["pxap"]) if metrics["pxap"] is not None else ("Top-1 cls", metrics["top1_cls"])


# ------------------------------------------------------------------------------------------------- intervals

# The bootstrap over images: a resample draws N of the N images, with replacement. A metric that chooses its
# threshold on the split chooses it anew in each resample; thresholds of val stay. The draws are seeded by the
# split's digest, so that two evaluations of a split see the same resamples, and their differences are paired.
RESAMPLES, NOMINAL = 1000, 0.95  # number of resamples, nominal coverage of an interval
TAILS = (0.5 - NOMINAL / 2, 0.5 + NOMINAL / 2)


def resamples(digest: str, n: int) -> np.ndarray:
    """RESAMPLES x n uint8: how often each resample has each image. digest: hexadecimal, the seed."""
    rng = np.random.default_rng(int(digest, 16))
    draws = (np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(RESAMPLES))
    return np.stack([counts.astype(np.uint8) for counts in draws])


def interval(values: np.ndarray, metric: float, bias_corrected: bool = True) -> list[float] | None:
    """[low, high]: the percentiles of a metric's values in the resamples, less twice their bias.

    values: R, with NaN where it is not defined; None if all are. metric: on the split; the interval contains
    it. The best accuracy over thresholds is biased upwards on the split, and again in each resample, by about
    as much: mean(values) - metric. In a difference the two biases cancel in part: nothing is taken off.
    docs/intervals.md has the coverage.
    """
    values = values[~np.isnan(values)]
    if not len(values):
        return None
    bias = values.mean() - metric if bias_corrected else 0.0
    low, high = np.quantile(values, TAILS) - 2 * bias
    return [float(min(low, metric)), float(max(high, metric))]


def _mean(seeds: Sequence[PerImage], weights: np.ndarray) -> dict[str, Any]:
    """The metrics of `PerImage.metrics`, means over seeds."""
    return tree_map(lambda *values: np.mean(values, axis=0), *(seed.metrics(weights)[0] for seed in seeds))


def intervals(seeds: Sequence[PerImage], digest: str) -> dict[str, Any]:
    """The interval of each metric, [low, high] in percent, by its key; of the mean where there are seeds."""
    on_split = tree_map(lambda x: float(x[0]), _mean(seeds, seeds[0].uniform_weights()))
    bounds = tree_map(interval, _mean(seeds, resamples(digest, len(seeds[0].boxed))), on_split)
    return tree_map(lambda of: np.clip(of, 0, 100).tolist(), bounds)


def band(seeds: Sequence[PerImage], digest: str) -> dict[str, np.ndarray]:
    """Plain percentiles of the seeds' mean curve at each level by itself: {name: 2 x 255} in percent."""
    weights = resamples(digest, len(seeds[0].boxed))
    curves = np.mean([seed.curves(weights) for seed in seeds], axis=0)
    return dict(zip(LEVEL_NAMES, np.nanquantile(curves, TAILS, axis=0).transpose(1, 0, 2)))


def difference(
    a: Sequence[PerImage], b: Sequence[PerImage], digest: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(B - A, its interval) of each metric that both have, in points; means over the seeds of a side.

    Paired: A and B are measured in the same resamples.
    """

    def gap(weights: np.ndarray) -> dict[str, Any]:
        return tree_map(np.subtract, _mean(b, weights), _mean(a, weights))

    on_split = tree_map(lambda x: float(x[0]), gap(a[0].uniform_weights()))
    in_resamples = gap(resamples(digest, len(a[0].boxed)))
    bounds = tree_map(lambda values, of: interval(values, of, bias_corrected=False), in_resamples, on_split)
    return tree_map(lambda x: None if np.isnan(x) else x, on_split), bounds


def localized(seeds: Sequence[PerImage]) -> np.ndarray:
    """N in [0, 1]: the share of the seeds with a correct box at IoU 50 (all contours, the best threshold)."""
    levels = [seed.curves(seed.uniform_weights())[0, 1].argmax() for seed in seeds]
    return np.mean([seed.correct[:, 1, level] for seed, level in zip(seeds, levels)], axis=0)
