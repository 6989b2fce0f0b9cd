"""How many images with boxes val needs for a threshold that is better than 0.2 of the map's maximum.

    python tests/val_size.py docs/results/CUB10/bridge_seed?.json                  seconds

From the files per image of a row's seeds: n images of test are drawn as val and choose a level for the
largest contour at IoU 50; the accuracy is that on the other images. Mean of 300 draws and all seeds, in
percent: at the lowest of the best levels, at their middle, at 0.2 of the maximum; and how often the middle is
below the last.
"""

import sys
from pathlib import Path

import numpy as np

from bridge_wsol.boxes import LEVELS
from bridge_wsol.evaluation import load_per_image, read_results
from bridge_wsol.metrics import middle_level

SIZES, DRAWS = (3, 9, 15, 25, 50, 75, 100), 300


def study(correct: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """correct: N x 255, one row per image -> DRAWS x 3 accuracies on the images that were not drawn."""
    found = []
    for _ in range(DRAWS):
        order = rng.permutation(len(correct))
        curve, rest = correct[order[:n]].sum(0), correct[order[n:]].mean(0)
        # Min-max maps have the maximum 1: 0.2 of it is a level.
        found.append(rest[[curve.argmax(), middle_level(curve), LEVELS // 5]])
    return 100 * np.array(found)


if __name__ == "__main__":
    correct = []
    for path in map(Path, sys.argv[1:]):
        per_image = load_per_image(path, read_results(path, "best", "test")[1]["metrics"]).per_image
        correct.append(per_image.correct[per_image.boxed, -1])
    print(f"{'images':>7}{'lowest':>9}{'middle':>9}{'0.2':>9}{'worse':>9}")
    for n in SIZES:
        rng = np.random.default_rng(n)
        found = np.concatenate([study(of_seed, n, rng) for of_seed in correct])
        worse = 100 * (found[:, 1] < found[:, 2]).mean()
        print(f"{n:>7}" + "".join(f"{mean:>9.1f}" for mean in found.mean(0)) + f"{worse:>8.0f} %")
