"""Time and memory of the intervals over images, against the plain loop over resamples.

    python tests/bench_intervals.py

Random hits of CUB's 5,794 and ILSVRC's 50,000 test images, and random histograms of 5,000 images with masks
(OpenImages). The plain loop takes the images of a resample and computes the same metrics; it is timed on
--loops resamples, and multiplied.
"""

import argparse
import time
import tracemalloc

import numpy as np

from bridge_wsol.metrics import EDGES, LEVEL_NAMES, RESAMPLES, PerImage, intervals, resamples


def taken(hits: PerImage, images: np.ndarray) -> PerImage:
    """The images with these indices, which may repeat."""
    arrays = {name: value for name, value in vars(hits).items() if isinstance(value, np.ndarray)}
    return PerImage(**{**vars(hits), **{name: value[images] for name, value in arrays.items()}})


def bench(what: str, hits: PerImage, loops: int) -> None:
    """Prints a line."""
    n, start = len(hits.boxed), time.perf_counter()
    intervals([hits], "1")
    seconds = time.perf_counter() - start
    tracemalloc.start()
    intervals([hits], "1")
    used = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    drawn, start = resamples("1", n)[:loops], time.perf_counter()
    for counts in drawn:
        taken(hits, np.repeat(np.arange(n), counts)).result()
    loop = (time.perf_counter() - start) / loops * RESAMPLES
    print(f"{what}, {n} images: {seconds:.2f} s, {used:.0f} MiB; loop {loop:.1f} s, {loop / seconds:.0f} x")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--loops", type=int, default=5, metavar="N", help="resamples of the loop (default 5)")
    args, rng = parser.parse_args(), np.random.default_rng(0)
    for what, n in (("CUB", 5794), ("ILSVRC", 50000)):
        right, every = rng.integers(0, 2, (n, 4, 255), dtype=np.uint8).astype(bool), np.ones(n, dtype=bool)
        ranks, fixed = rng.integers(0, 9, n), rng.random(n) < 0.5
        levels = dict.fromkeys(LEVEL_NAMES, 99)
        bench(what, PerImage(every, ~every, right, ranks, None, fixed, 0.2, levels), args.loops)
    every, pixels = np.ones(5000, dtype=bool), rng.integers(0, 50, (5000, 2, len(EDGES) - 1), dtype=np.int32)
    bench("OpenImages", PerImage(~every, every, pixels=pixels), args.loops)
