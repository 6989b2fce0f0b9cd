"""How often the intervals over images contain the truth: test sets drawn from curves that are known.

    python tests/interval_coverage.py --images 243 5794 --draws 500       minutes

In a population each image has a range of levels at which its box is correct, per IoU, so the curves are known
exactly: some like CUB10's, and flat ones, whose best threshold is uncertain. Each draw is a test set, for two
methods. Four intervals, each widened to the estimate: percentiles; 2 * estimate - percentiles; Efron's
bias-corrected; less twice the bias, which `interval` takes (for differences the first).
"""

import argparse
import itertools
from statistics import NormalDist

import numpy as np

from bridge_wsol.boxes import LEVELS
from bridge_wsol.metrics import TAILS, PerImage, interval, resamples, tree_map


def population(width: float, spread: float, n: int) -> np.ndarray:
    """n x 4 x 2 levels: the first and the last at which an image's box is correct, by LEVEL_NAMES."""
    rng = np.random.default_rng(0)
    centre, size = rng.normal(0.3, spread, n), rng.gamma((width / 0.1) ** 2, 0.01 / width, n)
    needed = np.array([0, 0.09, 0.2, 0.1]) * rng.lognormal(0, 0.25, (n, 4))
    half = size[:, None] - needed
    first, last = centre[:, None] - 0.7 * half, centre[:, None] + 1.3 * half
    ranges = np.stack([np.ceil(first * LEVELS), np.floor(last * LEVELS)], -1).clip(-1, LEVELS).astype(int)
    return np.where(half[..., None] > 0, ranges, [LEVELS, -1])


def per_image(ranges: np.ndarray, levels: dict[str, int] | None = None) -> PerImage:
    """The images with these ranges. levels: fixed ones, in the place of val's."""
    at, every = np.arange(LEVELS), np.ones(len(ranges), dtype=bool)
    return PerImage(every, ~every, (ranges[..., :1] <= at) & (at <= ranges[..., 1:]), val_levels=levels)


def chosen(metrics: dict) -> dict:
    v2, fixed = metrics["max_box_acc_v2"], metrics["max_box_acc_v2_at_val_threshold"]
    at_best = {"IoU 30": v2["30"], "IoU 50": v2["50"], "MaxBoxAccV2": v2["mean"]}
    return {"IoU 50, fixed threshold": fixed["50"], "MaxBoxAccV2, fixed": fixed["mean"]} | at_best


def four(values: np.ndarray, estimate: np.ndarray) -> list[tuple[float, float]]:
    (low, high), normal, e = np.quantile(values, TAILS), NormalDist(), estimate[0]
    below = ((values < e - 1e-9).mean() + (values <= e + 1e-9).mean()) / 2
    bias = normal.inv_cdf(float(np.clip(below, *TAILS)))
    efron = np.quantile(values, [normal.cdf(2 * bias + normal.inv_cdf(tail)) for tail in TAILS])
    found = (low, high), (2 * e - high, 2 * e - low), efron, interval(values, e)
    return [(min(a, e) - 1e-9, max(b, e) + 1e-9) for a, b in found]


def study(n: int, draws: int, spreads: tuple[float, float], size: int = 200_000) -> dict[str, np.ndarray]:
    """{metric: how often each of the four contains the truth; the bias}. size: of the population."""
    known, rng, rows = [], np.random.default_rng(n), {}
    for width, spread in zip((0.22, 0.27), spreads):
        levels = per_image(ranges := population(width, spread, size)).result()["levels"]
        known.append((ranges, levels, chosen(per_image(ranges, levels).result()["metrics"])))
    for draw in range(draws):
        images, counts, sides = rng.integers(size, size=n), resamples(f"{draw:x}", n), []
        for ranges, levels, truth in known:
            drawn = per_image(ranges[images], levels)
            both = drawn.uniform_weights(), counts
            sides.append((truth, *(chosen(drawn.metrics(x)[0]) for x in both)))
        gaps = [tree_map(lambda a, b: b - a, a, b) for a, b in zip(*sides)]
        for what, (truth, whole, values) in (("", sides[0]), ("difference in ", gaps)):
            for name, x in values.items():
                inside = [a <= truth[name] <= b for a, b in four(x, whole[name])]
                row = rows.setdefault(what + name, np.zeros(5))
                row += np.append(inside, whole[name][0] - truth[name]) / draws
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[243, 5794], metavar="N")
    parser.add_argument("--draws", type=int, default=500, metavar="N")
    args = parser.parse_args()
    kinds = {"like CUB10's": (0.1, 0.1), "flat": (0.25, 0.25), "one of each": (0.1, 0.25)}
    for n, (kind, spreads) in itertools.product(args.images, kinds.items()):
        print(f"curves {kind}, {n} images: percentile, basic, Efron, less twice the bias; bias")
        for name, (*shares, bias) in study(n, args.draws, spreads).items():
            print(f"  {name:<38}{'  '.join(f'{100 * x:5.1f}' for x in shares)}  {bias:+6.2f}", flush=True)
