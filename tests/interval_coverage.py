"""How often the intervals over images contain the truth: test sets drawn from curves that are known.

    python tests/interval_coverage.py --images 243 5794 --draws 500       minutes

A population of images has a range of levels at which each image's box is right, per IoU, so its curves are
known exactly: curves like those of CUB10, and flat ones, whose best threshold is uncertain. Each draw is a
test set of N images, for two methods. Compared are four intervals: the percentiles of the resamples; the
basic one (2 * estimate - percentiles); Efron's bias-corrected percentiles; and the percentiles less twice the
bias. `bootstrap.interval` takes the last, and for differences the first. Percent of the draws; each interval
is widened to the estimate.
"""

import argparse
from statistics import NormalDist

import numpy as np

from bridge_wsol.boxes import LEVELS
from bridge_wsol.metrics import TAILS, PerImage, interval, resamples, tree_map


def population(width: float, spread: float, n: int = 200_000) -> np.ndarray:
    """n x 4 x 2 levels: the first and the last at which an image's box is right, by LEVEL_NAMES."""
    rng = np.random.default_rng(0)
    centre, size = rng.normal(0.3, spread, n), rng.gamma((width / 0.1) ** 2, 0.01 / width, n)
    needed = np.array([0, 0.09, 0.2, 0.1]) * rng.lognormal(0, 0.25, (n, 4))
    half = size[:, None] - needed
    first, last = centre[:, None] - 0.7 * half, centre[:, None] + 1.3 * half
    ranges = np.stack([np.ceil(first * LEVELS), np.floor(last * LEVELS)], -1).clip(-1, LEVELS).astype(int)
    return np.where(half[..., None] > 0, ranges, [LEVELS, -1])


def hits_of(ranges: np.ndarray, levels: dict[str, int] | None = None) -> PerImage:
    """The images with these ranges. levels: fixed ones, in the place of val's."""
    at, n = np.arange(LEVELS), len(ranges)
    right = (ranges[..., :1] <= at) & (at <= ranges[..., 1:])
    return PerImage(np.ones(n, dtype=bool), np.zeros(n, dtype=bool), right, val_levels=levels)


def chosen(metrics: dict) -> dict:
    """The metrics of the study."""
    v2, fixed = metrics["max_box_acc_v2"], metrics["max_box_acc_v2_at_val_threshold"]
    at_best = {"IoU 30": v2["30"], "IoU 50": v2["50"], "MaxBoxAccV2": v2["mean"]}
    return {"IoU 50, fixed threshold": fixed["50"], "MaxBoxAccV2, fixed": fixed["mean"]} | at_best


def four(values: np.ndarray, estimate: np.ndarray) -> list[tuple[float, float]]:
    """The four intervals."""
    (low, high), normal, e = np.quantile(values, TAILS), NormalDist(), estimate[0]
    below = ((values < e - 1e-9).mean() + (values <= e + 1e-9).mean()) / 2
    bias = normal.inv_cdf(float(np.clip(below, *TAILS)))
    efron = np.quantile(values, [normal.cdf(2 * bias + normal.inv_cdf(tail)) for tail in TAILS])
    found = (low, high), (2 * e - high, 2 * e - low), efron, interval(values, e)
    return [(min(a, e) - 1e-9, max(b, e) + 1e-9) for a, b in found]


def study(n: int, draws: int, kind: str, spreads: tuple[float, float]) -> None:
    """Prints a table of the coverage for test sets of n images. spreads: of the two methods."""
    known, rng, rows = [], np.random.default_rng(n), {}
    for width, spread in zip((0.22, 0.27), spreads):
        result = hits_of(ranges := population(width, spread)).result()
        best = {str(delta): max(result["curves"][str(delta)]) for delta in (30, 50, 70)}
        best["mean"] = sum(best.values()) / 3  # the fixed thresholds are the population's best
        truth = chosen(dict.fromkeys(("max_box_acc_v2", "max_box_acc_v2_at_val_threshold"), best))
        known.append((ranges, result["levels"], truth))
    for draw in range(draws):
        images, counts, sides = rng.integers(len(known[0][0]), size=n), resamples(f"{draw:x}", n), []
        for ranges, levels, truth in known:
            hits = hits_of(ranges[images], levels)
            sides.append((truth, *(chosen(hits.sample(x)[0]) for x in (hits.uniform_weights(), counts))))
        gaps = [tree_map(lambda a, b: b - a, a, b) for a, b in zip(*sides)]
        for what, (truth, whole, values) in (("", sides[0]), ("difference in ", gaps)):
            for name, x in values.items():
                inside = [a <= truth[name] <= b for a, b in four(x, whole[name])]
                row = rows.setdefault(what + name, np.zeros(5))
                row += [*inside, (whole[name][0] - truth[name]) / 100]
    print(f"{kind}, {n} images, {draws} draws: percentile, basic, Efron, less twice the bias; bias")
    for name, row in rows.items():
        *share, bias = 100 * row / draws
        print(f"  {name:<38}{'  '.join(f'{x:5.1f}' for x in share)}  {bias:+6.2f}", flush=True)


if __name__ == "__main__":
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--images", type=int, nargs="+", default=[243, 5794], metavar="N")
    parser.add_argument("--draws", type=int, default=500, metavar="N")
    args = parser.parse_args()
    for size in args.images:
        study(size, args.draws, "curves like CUB10's", (0.1, 0.1))
        study(size, args.draws, "flat curves", (0.25, 0.25))
        study(size, args.draws, "a curve like CUB10's and a flat one", (0.1, 0.25))
