"""How long the boxes of every threshold take: the sweep of bridge_wsol/boxes.py, plain labeling, and a contour-tracer loop.

    python tests/bench_boxes.py RUN [RUN ...] [--images 60]

Real CAMs: the score maps of the first test images of each run that train.py wrote, at the run's image size. Each way does the same
work an image: boxes of all contours and of the largest one at every threshold, IoU with the ground truth, best IoU at each threshold.
One process, one thread; the ways take turns, ten maps each. The contour tracer needs `pip install opencv-python-headless`.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import plain_boxes

from bridge_wsol.boxes import iou_matrix, scale_boxes
from bridge_wsol.data import test_loader
from bridge_wsol.datasets import load_splits
from bridge_wsol.metrics import localize
from bridge_wsol.processes import ordered_map
from evaluate import load_run, network_maps

try:
    import cv2

    cv2.setNumThreads(1)
except ImportError:
    cv2 = None


def plain(score_map: np.ndarray, truth: np.ndarray) -> np.ndarray:
    found = plain_boxes.level_boxes(score_map)
    ious = np.zeros((2, 255))
    np.maximum.at(ious[0], found.levels, iou_matrix(found.boxes, truth).max(1))
    ious[1] = iou_matrix(found.largest, truth).max(1)
    return ious


def contours(score_map: np.ndarray, truth: np.ndarray, thresholds: int) -> np.ndarray:
    """The usual loop: at each of the thresholds, binarise, trace the contours, take their boxes."""
    v = (score_map * 255).astype(np.uint8)
    height, width = v.shape
    boxes, starts, largest = [], [], []
    for threshold in np.arange(thresholds) / thresholds:
        _, mask = cv2.threshold(v, int(threshold * v.max()), 255, cv2.THRESH_BINARY)
        found, _ = cv2.findContours(mask, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)
        starts.append(len(boxes))
        best, best_area = (0, 0, 0, 0), -1.0
        for contour in found:
            x, y, w, h = cv2.boundingRect(contour)
            box, area = (x, y, min(x + w, width - 1), min(y + h, height - 1)), cv2.contourArea(contour)
            boxes.append(box)
            if area > best_area:
                best, best_area = box, area
        if not found:
            boxes.append(best)
        largest.append(best)
    ious = np.maximum.reduceat(iou_matrix(boxes, truth).max(1), starts)
    return np.stack([ious, iou_matrix(largest, truth).max(1)])


def private_memory(job: tuple[np.ndarray, np.ndarray]) -> float:
    """MB that a worker process has of its own, not shared with the process it was forked from, after a sweep (Linux)."""
    localize(*job)
    fields = (line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines())
    return sum(int(field[1]) for field in fields if field[0].startswith("Private")) / 1024


def real_maps(run: Path, n: int) -> tuple[list[np.ndarray], list[np.ndarray], str]:
    model, method, checkpoint = load_run(run, "best", torch.device("cpu"))
    c = checkpoint["config"]
    splits, _ = load_splits(
        c["dataset"], Path(c["data_root"]), Path(c["splits"]), ("test",), c["val_per_class"]
    )
    split = splits["test"].take(range(0, len(splits["test"]), max(1, len(splits["test"]) // n)), "bench")
    loader = test_loader(split, 8, image_size=c["image_size"], workers=0)
    maps = []
    for batch in network_maps(
        model,
        loader,
        method=method,
        device=torch.device("cpu"),
        amp="off",
        normalization="minmax",
        image_size=c["image_size"],
    ):
        maps += list(batch.maps)
    truths = [scale_boxes(split.boxes[i], tuple(split.sizes[i]), c["image_size"]) for i in range(len(split))]
    side = c["image_size"] // c["stride"]
    return (
        maps,
        truths,
        f"{run.name}: {len(maps)} maps of {side} x {side} at {c['image_size']} x {c['image_size']}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--images", type=int, default=60)
    args = parser.parse_args()
    torch.set_num_threads(1)

    ways = {"merge-tree sweep (exact)": lambda m, t: localize(m, t).ious, "plain labeling (exact)": plain}
    if cv2 is not None:
        ways["contour loop, 1,000 thresholds"] = lambda m, t: contours(m, t, 1000)
        ways["contour loop, 200 thresholds"] = lambda m, t: contours(m, t, 200)
    for run in args.runs:
        maps, truths, title = real_maps(run, args.images)
        memory = max(ordered_map(private_memory, list(zip(maps, truths)), 1))
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for start in range(
            0, len(maps), 10
        ):  # in turns of ten maps: each way finds the caches as it leaves them
            results: dict[str, list[np.ndarray]] = {name: [] for name in ways}
            for name, way in ways.items():
                for score_map, truth in zip(maps[start : start + 10], truths[start : start + 10]):
                    began = time.perf_counter()
                    results[name].append(way(score_map, truth))
                    seconds[name].append(time.perf_counter() - began)
            np.testing.assert_array_equal(
                results["merge-tree sweep (exact)"], results["plain labeling (exact)"]
            )
        ours = np.median(seconds["merge-tree sweep (exact)"])
        print(f"{title}; median milliseconds an image, one core")
        for name, values in seconds.items():
            print(f"  {name:<32}{1e3 * np.median(values):8.2f} ms   {np.median(values) / ours:6.1f} x ours")
        print(f"  {memory:.0f} MB of its own in a worker process of evaluate.py that sweeps these maps")


if __name__ == "__main__":
    main()
