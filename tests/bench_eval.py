"""Whole evaluation in images/s, and the share of input, network and sweep.

    python tests/bench_eval.py [--arch vgg16] [--images 128] [--workers N] [--device cpu]

Images of CUB's usual size (500 x 375 JPEG) and random boxes in a temporary folder; a network with random
weights at 224 x 224, on which the times do not depend. Each stage is timed alone, then all of them together.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from bridge_wsol.config import preset_values
from bridge_wsol.data import Split, eval_loader
from bridge_wsol.evaluation import MapBatch, evaluate_maps, network_maps
from bridge_wsol.methods import CAM
from bridge_wsol.metrics import measure
from bridge_wsol.models import ARCHS
from bridge_wsol.utils import cores, resolve_device


def drawn_split(folder: Path, n: int) -> Split:
    rng = np.random.default_rng(0)
    ids = [f"{i}.jpg" for i in range(n)]
    for name in ids:
        coarse = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC).save(folder / name, quality=90)
    x0, y0 = rng.integers(0, 200, n), rng.integers(0, 150, n)
    boxes = {i: np.array([[x0[i], y0[i], x0[i] + 250, y0[i] + 200]]) for i in range(n)}
    return Split("bench", folder, ids, rng.integers(0, 200, n), np.tile([500, 375], (n, 1)), boxes)


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--arch", choices=ARCHS, default="vgg16")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=cores())
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    device, n = resolve_device(args.device), args.images

    with tempfile.TemporaryDirectory() as folder:
        split = drawn_split(Path(folder), n)
        torch.manual_seed(0)
        values = {name: value for name, (value, _) in preset_values("CUB", args.arch).items()}
        method = CAM(SimpleNamespace(**values | {"arch": args.arch}), 200).to(device)

        def loader(workers: int):
            return eval_loader(split, args.batch_size, image_size=224, workers=workers)

        def maps(batches) -> list[MapBatch]:
            return list(network_maps(method, batches, amp="auto"))

        batches = list(loader(0))
        maps(batches[:1])  # warm-up
        made: list[MapBatch] = []
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        alone = {"input, one process": timed(lambda: list(loader(0)))}
        torch.set_num_threads(threads)
        alone["network"] = timed(lambda: made.extend(maps(batches)))
        sweeps = [(score_map, split.boxes[0]) for batch in made for score_map in batch.maps]
        alone["sweep, one process"] = timed(lambda: [measure(*sweep) for sweep in sweeps])
        all_maps = network_maps(method, loader(args.workers), amp="auto")
        together = timed(lambda: evaluate_maps(all_maps, split, workers=args.workers))

    gpu = device.type == "cuda" and torch.cuda.get_device_name(device)
    print(f"{args.arch}, {n} images at 224 x 224, {gpu or f'CPU, {threads} threads'}")
    total = sum(alone.values())
    for stage, seconds in alone.items():
        share = 100 * seconds / total
        print(f"  {stage:<22}{n / seconds:9.1f} images/s alone   {share:5.1f} % of the work")
    times = f"{n / together:9.1f} images/s, {total / together:.2f} x one after another"
    print(f"  {f'all, {args.workers} workers':<22}{times}")


if __name__ == "__main__":
    main()
