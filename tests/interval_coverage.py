"""How often the intervals over images contain the truth: test sets drawn from curves that are known.

    python tests/interval_coverage.py --images 243 5794 --draws 500       minutes

A population of images has a range of levels at which each image's box is right, per IoU, so its curves are
known exactly. Each draw is a test set of N of them, for two methods on the same images. Compared are the
plain percentiles of the resamples, the basic interval (2 * estimate - percentiles), and the bias-corrected
percentiles that `intervals` uses; for the difference of the methods, too. Percent of the draws.
"""

import argparse

import numpy as np

from bridge_wsol.bootstrap import interval, resamples
from bridge_wsol.boxes import LEVELS
from bridge_wsol.metrics import LEVEL_NAMES, Hits, each


def population(seed: int, width: float, n: int = 200_000) -> np.ndarray:
    """n x 4 x 2 levels: the first and the last at which an image's box is right, by LEVEL_NAMES."""
    rng = np.random.default_rng(seed)
    centre, size = rng.normal(0.3, 0.1, n), rng.gamma((width / 0.1) ** 2, 0.01 / width, n)
    needed = np.array([0, 0.09, 0.2, 0.1]) * rng.lognormal(0, 0.25, (n, 4))
    half = size[:, None] - needed
    first, last = centre[:, None] - 0.7 * half, centre[:, None] + 1.3 * half
    ranges = np.stack([np.ceil(first * LEVELS), np.floor(last * LEVELS)], -1).clip(-1, LEVELS).astype(int)
    return np.where(half[..., None] > 0, ranges, [LEVELS, -1])


def hits_of(ranges: np.ndarray, levels: dict[str, int] | None = None) -> Hits:
    """The images with these ranges. levels: fixed ones, in the place of val's."""
    at, n = np.arange(LEVELS), len(ranges)
    right = (ranges[..., :1] <= at) & (at <= ranges[..., 1:])
    return Hits(np.ones(n, dtype=bool), np.zeros(n, dtype=bool), right, val_levels=levels)


def chosen(metrics: dict) -> dict:
    """The metrics of the study."""
    v2, fixed = metrics["max_box_acc_v2"], metrics["max_box_acc_v2_at_val_threshold"]
    numbers = {"GT-known at a fixed threshold": fixed["50"], "MaxBoxAccV2 at fixed thresholds": fixed["mean"]}
    return numbers | {"GT-known": v2["50"], "MaxBoxAccV2": v2["mean"]}


def study(n: int, draws: int) -> None:
    """Prints a table of the coverage for test sets of n images."""
    methods, known = [population(0, width) for width in (0.22, 0.27)], []
    for ranges in methods:
        result = hits_of(ranges).result()
        curves = result["curves"]
        best = {str(delta): max(curves[str(delta)]) for delta in (30, 50, 70)}
        at_best = best | {"mean": sum(best.values()) / 3}  # the fixed thresholds are the population's best
        truth = {"max_box_acc_v2": at_best, "max_box_acc_v2_at_val_threshold": at_best}
        known.append((ranges, result["levels"], chosen(truth)))
    rng, covered, bias = np.random.default_rng(n), {}, {}
    for draw in range(draws):
        images, counts, sides = rng.integers(len(methods[0]), size=n), resamples(f"{draw:x}", n), []
        for ranges, levels, truth in known:
            hits = hits_of(ranges[images], {name: levels[name] for name in LEVEL_NAMES})
            whole = chosen(hits.sample(hits.once())[0])
            sides.append((truth, whole, chosen(hits.sample(counts)[0])))
        truth, whole, values = (each(lambda a, b: b - a, a, b) for a, b in zip(*sides))
        rows = [(sides[0], ""), ((truth, whole, values), "difference in ")]
        for (truth, whole, values), what in rows:
            for name, x in values.items():
                low, high = np.quantile(x, [0.025, 0.975])
                basic = [2 * whole[name][0] - bound for bound in (high, low)]
                found = [(low, high), basic, interval(x, whole[name])]
                inside = [a - 1e-9 <= truth[name] <= b + 1e-9 for a, b in found]
                covered[what + name] = covered.get(what + name, 0) + np.array(inside)
                bias[what + name] = bias.get(what + name, 0) + whole[name][0] - truth[name]
    print(f"{n} images, {draws} draws: percentile, basic, bias-corrected; mean bias of the metric")
    for name, share in covered.items():
        cells = "  ".join(f"{100 * x / draws:5.1f}" for x in share)
        print(f"  {name:<46}{cells}  {bias[name] / draws:+6.2f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, nargs="+", default=[243, 5794], metavar="N")
    parser.add_argument("--draws", type=int, default=500, metavar="N")
    args = parser.parse_args()
    for size in args.images:
        study(size, args.draws)
