"""Time to find the boxes of all thresholds: the sweep of boxes.py, plain labeling, and a contour-tracer loop.

    python tests/bench_boxes.py RUN [RUN ...] [--images 60]

The input is CAMs: score maps of test images of each run of train.py, at the image size of the run. Each
program does the same work per image: boxes of all contours and of the largest one at every threshold, IoU
with the ground truth, best IoU per threshold. One process, one thread; the programs alternate every ten maps.
The contour tracer needs `pip install opencv-python-headless`.
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
from bridge_wsol.evaluation import TrainedRun
from bridge_wsol.metrics import measure
from bridge_wsol.utils import imap

try:
    import cv2

    cv2.setNumThreads(1)
except ImportError:
    cv2 = None


def plain(score_map: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """The IoUs of `measure`, by labeling each mask."""
    found = plain_boxes.level_boxes(score_map)
    ious = np.zeros((2, 255))
    np.maximum.at(ious[0], found.levels, iou_matrix(found.boxes, truth).max(1))
    ious[1] = iou_matrix(found.largest, truth).max(1)
    return ious


def contours(score_map: np.ndarray, truth: np.ndarray, thresholds: int) -> np.ndarray:
    """The usual loop: at each threshold, binarize, trace the contours, take their boxes."""
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
    """Private memory of a worker process after a sweep, in MB, without pages of its parent (Linux)."""
    measure(*job)
    fields = (line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines())
    return sum(int(field[1]) for field in fields if field[0].startswith("Private")) / 1024


def maps_of_run(run: Path, n: int) -> tuple[list[np.ndarray], list[np.ndarray], str]:
    """(score maps, ground-truth boxes, title) of about n test images."""
    trained = TrainedRun(run, "best", torch.device("cpu"))
    size, test = trained.config.image_size, trained.split("test")
    split = test.take(range(0, len(test), max(1, len(test) // n)), "bench")
    maps = [score_map for batch in trained.maps(split, 8, workers=0, amp="off") for score_map in batch.maps]
    truths = [scale_boxes(split.boxes[i], tuple(split.sizes[i]), size) for i in range(len(split))]
    side = size // trained.config.stride
    return maps, truths, f"{run.name}: {len(maps)} maps of {side} x {side} at {size} x {size}"


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--images", type=int, default=60)
    args = parser.parse_args()
    torch.set_num_threads(1)

    sweep, labeling = "merge-tree sweep (exact)", "plain labeling (exact)"
    programs = {sweep: lambda m, t: measure(m, t).ious, labeling: plain}
    if cv2 is not None:
        programs["contour loop, 1,000 thresholds"] = lambda m, t: contours(m, t, 1000)
        programs["contour loop, 200 thresholds"] = lambda m, t: contours(m, t, 200)
    for run in args.runs:
        maps, truths, title = maps_of_run(run, args.images)
        memory = max(used for _, used in imap(private_memory, zip(maps, truths), 1))
        seconds: dict[str, list[float]] = {name: [] for name in programs}
        for start in range(0, len(maps), 10):  # alternate: every program leaves the caches in its own state
            results: dict[str, list[np.ndarray]] = {name: [] for name in programs}
            for name, program in programs.items():
                for score_map, truth in zip(maps[start : start + 10], truths[start : start + 10]):
                    began = time.perf_counter()
                    results[name].append(program(score_map, truth))
                    seconds[name].append(time.perf_counter() - began)
            np.testing.assert_array_equal(results[sweep], results[labeling])
        fastest = np.median(seconds[sweep])
        print(f"{title}; median milliseconds per image, one core")
        for name, values in seconds.items():
            median = np.median(values)
            print(f"  {name:<32}{1e3 * median:8.2f} ms   {median / fastest:6.1f} x the sweep")
        print(f"  {memory:.0f} MB of private memory in a worker process of evaluate.py for these maps")


if __name__ == "__main__":
    main()
