"""What the choice of the test images alone would change: intervals, paired differences, hits files.

The bootstrap over images: a resample draws N of the N images, with replacement. A metric that chooses its
threshold on the split chooses it anew in each resample; thresholds of val stay. The draws are seeded by the
split's digest, so that two evaluations of a split see the same resamples, and their differences are paired.

    intervals([hits], split.digest())          95 % interval of each metric
    difference(hits_of_a, hits_of_b, digest)   95 % interval of B - A, means over seeds
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .boxes import LEVELS
from .data import Split
from .metrics import LEVEL_NAMES, Hits, tree_map
from .utils import InputError, atomic_write

RESAMPLES, NOMINAL = 1000, 0.95  # number of resamples, nominal coverage of an interval
TAILS = (0.5 - NOMINAL / 2, 0.5 + NOMINAL / 2)

# ------------------------------------------------------------------------------------------------- intervals


def resamples(digest: str, n: int) -> np.ndarray:
    """RESAMPLES x n uint8: how often each resample has each image. digest: hexadecimal, the seed."""
    rng = np.random.default_rng(int(digest, 16))
    draws = (np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(RESAMPLES))
    return np.stack([counts.astype(np.uint8) for counts in draws])


def interval(values: np.ndarray, metric: float, of_difference: bool = False) -> list[float] | None:
    """[low, high]: the percentiles of a metric's values in the resamples, less twice their bias.

    values: R, with NaN where it is not defined; None if all are. metric: on the split; the interval contains
    it. The best accuracy over thresholds is biased upwards on the split, and again in each resample, by about
    as much: mean(values) - metric. In a difference the two biases cancel in part: nothing is taken off.
    docs/evaluation.md has the coverage.
    """
    values = values[~np.isnan(values)]
    if not len(values):
        return None
    bias = 0.0 if of_difference else values.mean() - metric
    low, high = np.quantile(values, TAILS) - 2 * bias
    return [float(min(low, metric)), float(max(high, metric))]


def _mean(seeds: Sequence[Hits], counts: np.ndarray) -> dict[str, Any]:
    """The metrics of `Hits.sample`, means over seeds."""
    return tree_map(lambda *values: np.mean(values, axis=0), *(hits.sample(counts)[0] for hits in seeds))


def intervals(seeds: Sequence[Hits], digest: str) -> dict[str, Any]:
    """The interval of each metric, [low, high] in percent, by its key; of the mean where there are seeds."""
    on_split = tree_map(lambda x: float(x[0]), _mean(seeds, seeds[0].once()))
    bounds = tree_map(interval, _mean(seeds, resamples(digest, len(seeds[0].boxed))), on_split)
    return tree_map(lambda of: np.clip(of, 0, 100).tolist(), bounds)


def band(seeds: Sequence[Hits], digest: str) -> dict[str, np.ndarray]:
    """Plain percentiles of the seeds' mean curve at each level by itself: {name: 2 x 255} in percent."""
    counts = resamples(digest, len(seeds[0].boxed))
    curves = np.mean([hits.curves(counts) for hits in seeds], axis=0)
    return dict(zip(LEVEL_NAMES, np.nanquantile(curves, TAILS, axis=0).transpose(1, 0, 2)))


def difference(a: Sequence[Hits], b: Sequence[Hits], digest: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(B - A, its interval) of each metric that both have, in points; means over the seeds of a side.

    Paired: A and B are measured in the same resamples.
    """

    def gap(counts: np.ndarray) -> dict[str, Any]:
        return tree_map(np.subtract, _mean(b, counts), _mean(a, counts))

    on_split = tree_map(lambda x: float(x[0]), gap(a[0].once()))
    in_resamples = gap(resamples(digest, len(a[0].boxed)))
    bounds = tree_map(lambda values, of: interval(values, of, of_difference=True), in_resamples, on_split)
    return tree_map(lambda x: None if np.isnan(x) else x, on_split), bounds


def localized(seeds: Sequence[Hits]) -> np.ndarray:
    """N in [0, 1]: the share of the seeds with a right box at IoU 50 (all contours, the best threshold)."""
    levels = [hits.curves(hits.once())[0, 1].argmax() for hits in seeds]
    return np.mean([hits.right[:, 1, level] for hits, level in zip(seeds, levels)], axis=0)


# ------------------------------------------------------------------------------------------------ hits files


class Stored(NamedTuple):
    """The content of a hits file."""

    hits: Hits
    digest: str  # of the split
    ids: list[str]
    truth: np.ndarray  # N uint32, a checksum of each image's label, size, boxes and paths of masks


def hits_path(results: Path) -> Path:
    """The hits file beside a results file."""
    return results.with_name(results.name.removesuffix(".json") + ".npz")


def save_hits(path: Path, hits: Hits, split: Split) -> None:
    """Writes a hits file: a bit for each IoU, level and image, 128 bytes an image before compression."""
    content = {"digest": split.digest(), "ids": split.ids, "boxed": hits.boxed, "masked": hits.masked}
    sizes = np.zeros((len(split), 2), dtype=int) if split.sizes is None else split.sizes
    boxes = [split.boxes[i].tolist() if i in split.boxes else None for i in range(len(split))]
    masks = [split.masks.get(i) for i in range(len(split))]
    texts = map(repr, zip(split.labels.tolist(), sizes.tolist(), boxes, masks))
    checksums = [zlib.crc32(text.encode("utf-8", "surrogateescape")) for text in texts]
    content["truth"] = np.array(checksums, dtype=np.uint32)
    optional = {
        "right": None if hits.right is None else np.packbits(hits.right, axis=-1),
        "ranks": None if hits.ranks is None else hits.ranks.clip(max=255).astype(np.uint8),
        "val_levels": hits.val_levels and [hits.val_levels[name] for name in LEVEL_NAMES],
        **{name: getattr(hits, name) for name in ("pixels", "fixed", "threshold")},
    }
    content |= {name: value for name, value in optional.items() if value is not None}
    with atomic_write(path) as part, part.open("wb") as file:
        np.savez_compressed(file, **content)


def read_hits(results: Path, metrics: dict[str, Any]) -> Stored:
    """The hits file beside a results file with these metrics.

    Raises InputError for a missing or damaged one, and for one of another evaluation.
    """
    path = hits_path(results)
    try:
        with np.load(path) as file:
            found = dict(file)
        ids, digest, truth = found.pop("ids").tolist(), str(found.pop("digest")), found.pop("truth")
        if "right" in found:
            found["right"] = np.unpackbits(found["right"], axis=-1, count=LEVELS).astype(bool)
        if "val_levels" in found:
            found["val_levels"] = dict(zip(LEVEL_NAMES, found["val_levels"].tolist(), strict=True))
        found |= {"threshold": float(found["threshold"])} if "threshold" in found else {}
        stored = Stored(Hits(**found), digest, ids, truth)
        int(digest, 16)
        if not len(ids) == len(truth) == len(stored.hits.boxed):
            raise ValueError("arrays of different lengths")
        measured = stored.hits.result()["metrics"]
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file: evaluate again, evaluate.py writes it") from error
    except Exception as error:  # a damaged archive raises errors of ten kinds
        raise InputError(f"{path}: not a file of hits per image: evaluate again") from error
    # Other versions of NumPy may sum PxAP in another order.
    if tree_map(lambda x: round(x, 6), measured) != tree_map(lambda x: round(x, 6), metrics):
        raise InputError(f"{path}: not of the evaluation in {results.name}: evaluate again")
    return stored


def require_same_images(files: dict[Path, Stored]) -> None:
    """Raises InputError where these hits files are not of the same images with the same labels and boxes."""
    (first, known), *others = files.items()
    for path, other in others:
        pairs = zip(zip(known.ids, known.truth.tolist()), zip(other.ids, other.truth.tolist()))
        differing = [a[0] for a, b in pairs if a != b]
        if differing or len(known.ids) != len(other.ids):
            shorter = min(len(known.ids), len(other.ids))
            image = differing[0] if differing else max(known.ids, other.ids, key=len)[shorter]
            what = "images, labels, sizes, boxes or mask paths"
            raise InputError(f"{path}: other {what} than {first} has; the first that differs is {image}")
