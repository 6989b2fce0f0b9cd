"""Speed and memory beside the plain way to the same result, in turns in one run.

    python tests/bench.py train [--arch vgg16] [--batch-size 8] [--steps 7] [--matrix 2048, on a GPU 8192]
    python tests/bench.py eval [--arch vgg16] [--images 100] [--workers 2]
    python tests/bench.py boxes RUN [RUN ...] [--images 100]
    python tests/bench.py intervals [--loops 5]
    python tests/bench.py work

train: a step against a float32 eager step with contiguous tensors, cosine maps of all classes, and SGD
parameter by parameter. eval: each stage alone, and the whole. boxes: CAMs of runs of train.py, against
labeling of each mask and OpenCV's contour tracer. intervals: random results, against a loop over resamples.
work: the floating-point operations of the paper's runs, counted by torch.
"""

import argparse
import itertools
import resource
import sys
import tempfile
import time
import tracemalloc
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as nnf
from PIL import Image
from torch import multiprocessing
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))
from plain_boxes import best_ious, level_boxes, traced_boxes
from test_baselines import make, total
from test_losses import by_the_formulas

from bridge_wsol import utils
from bridge_wsol.boxes import LEVELS, scale_boxes
from bridge_wsol.config import resolve_config
from bridge_wsol.data import Split, TrainImages, eval_loader, train_loader
from bridge_wsol.evaluation import TrainedRun, evaluate_maps, network_maps
from bridge_wsol.methods import Bridge, find
from bridge_wsol.metrics import EDGES, LEVEL_NAMES, PerImage, intervals, measure, resamples
from bridge_wsol.models import ARCHS
from bridge_wsol.optim import build_optimizer

torch.set_num_threads(utils.cores())  # conftest, which the tests import, has set it to 1
PLAIN, *OURS = MODES = ("plain float32", "ours float32", "ours bf16")


def timed(work, *args, device=torch.device("cpu")):  # noqa: B008
    """(seconds, result)."""
    wait = getattr(torch, device.type).synchronize
    wait()
    start, result = time.perf_counter(), work(*args)
    wait()
    return time.perf_counter() - start, result


def mebibytes(work, *args):
    tracemalloc.start()
    work(*args)
    used = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    return used


def drawn_split(folder, n):
    """n JPEG images of CUB's usual size, with a box each."""
    rng, ids = np.random.default_rng(0), [f"{i}.jpg" for i in range(n)]
    for name in ids:
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(Path(folder, name), quality=90)
    boxes = dict.fromkeys(range(n), np.array([[100, 50, 350, 250]]))
    return Split("bench", Path(folder), ids, rng.integers(0, 200, n), np.tile([500, 375], (n, 1)), boxes)


class Plain(Bridge):
    def terms(self, passes, labels, epoch):
        c, f = self.config, passes.features
        l_ce, l_drop = nnf.cross_entropy(passes.logits, labels), (passes.dropped - f).abs().mean()
        l_sim, l_norm = by_the_formulas(f, self.net.fc.weight, labels, c.tau_fg, c.tau_bg, c.norm_class)
        terms = {"l_ce": (1.0, l_ce), "l_drop": (c.lambda_drop, l_drop)}
        return terms | {"l_sim": (c.lambda_sim, l_sim), "l_norm": (c.lambda_norm, l_norm)}


def serve(mode, args, pipe):
    """A mode in its own process: sends first losses and FLOPs, seconds of a step on request, memory in GB."""
    device, ours = utils.resolve_device(args.device), mode in OURS
    method = make(Bridge if ours else Plain, args.arch, 200, torch.float32, width=1.0).to(device).train()
    generator, optimizer = torch.Generator().manual_seed(0), build_optimizer(method, method.config)
    images = torch.randn(args.batch_size, 3, 224, 224, generator=generator).to(device)
    labels = torch.randint(200, (args.batch_size,), generator=generator).to(device)
    if ours:
        utils.keep_freed_memory()
        images, method = (x.to(memory_format=torch.channels_last) for x in (images, method))
    for group in optimizer.param_groups:
        group |= {} if ours else {"fused": False, "foreach": False}

    def step():
        optimizer.zero_grad(set_to_none=True)
        with utils.autocast(device, "bf16" if "bf16" in mode else "off"):
            terms, _ = method(images, labels, method.config.warm_epochs + 1)  # with all four losses
        total(terms).backward()
        optimizer.step()
        return {name: value.detach() for name, (_, value) in terms.items()}

    torch.manual_seed(1)  # the same locations dropped
    with FlopCounterMode(display=False) as counter:
        first = {name: float(value) for name, value in step().items()}
    pipe.send((first, counter.get_total_flops()))
    while pipe.recv():
        pipe.send(timed(step, device=device)[0])
    of_process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    pipe.send((torch.cuda.max_memory_allocated(device) if device.type == "cuda" else of_process) / 1e9)


def train(args):
    device, pipes = utils.resolve_device(args.device), {}
    for mode in MODES:
        pipes[mode], of_process = multiprocessing.get_context("spawn").Pipe()
        multiprocessing.get_context("spawn").Process(target=serve, args=(mode, args, of_process)).start()
    first = {mode: pipe.recv() for mode, pipe in pipes.items()}

    def ask(mode, more):
        pipes[mode].send(more)
        return pipes[mode].recv()

    turns = [{mode: ask(mode, True) for mode in MODES} for _ in range(args.steps + 1)]
    took = {mode: np.median([turn[mode] for turn in turns[1:]]) for mode in MODES}  # the first is a warm-up
    products = {}  # measured before a process ends, which takes the cores for a while
    for mode in MODES:
        a = torch.randn(args.matrix, args.matrix, device=device)
        a = a.bfloat16() if "bf16" in mode else a
        fastest = min(timed(torch.matmul, a, a, device=device)[0] for _ in range(20))
        products[mode] = 2 * args.matrix**3 / fastest
    for mode in MODES:
        apart = max(abs(first[mode][0][name] - value) for name, value in first[PLAIN][0].items())
        speed = f"{args.batch_size / took[mode]:8.2f} images/s {took[PLAIN] / took[mode]:6.2f} x plain"
        ratio = 100 * first[PLAIN][1] / took[mode] / products[mode]
        share = f"{ratio:6.1f} % of a matrix product's throughput"
        print(f"  {mode:<14}{speed} {ask(mode, False):6.2f} GB {share}, first losses {apart:.0e} apart")
    with tempfile.TemporaryDirectory() as folder:
        split = drawn_split(folder, 256)
        loader = train_loader(TrainImages(split, resize_size=256, image_size=224, seed=0), 32, workers=0)
        decoded, kept = (256 / timed(list, loader)[0] for _ in range(2))  # the second reads no files
    print(f"  input, one process: {decoded:.0f} images/s decoded, {kept:.0f} kept in memory")


def evaluation(args):
    n, device = args.images, utils.resolve_device(args.device)
    method, amp = make(Bridge, args.arch, 200, torch.float32, width=1.0), utils.resolve_amp("auto", device)[0]
    utils.keep_freed_memory()
    method.to(device, memory_format=torch.channels_last)
    with tempfile.TemporaryDirectory() as folder:
        load = partial(eval_loader, split := drawn_split(folder, n), 32, 224)
        of_input, batches = timed(list, load(0))
        list(network_maps(method, batches[:1], amp))  # warm-up
        of_network, made = timed(list, network_maps(method, batches, amp), device=device)
        of_sweep, _ = timed(lambda: [measure(x, split.boxes[0]) for batch in made for x in batch.maps])
        maps = network_maps(method, load(args.workers), amp)
        together, _ = timed(lambda: evaluate_maps(maps, split, workers=args.workers))
    one_by_one = of_input + of_network + of_sweep
    for stage, took in (("input", of_input), ("network", of_network), ("sweep", of_sweep)):
        print(f"  {stage:<10}{n / took:9.1f} images/s alone, {100 * took / one_by_one:5.1f} % of the work")
    print(f"  together  {n / together:9.1f} images/s, {one_by_one / together:.2f} x one after another")


def boxes(args):
    torch.set_num_threads(1)
    programs = {"merge tree, exact": lambda *pair: measure(*pair).ious}
    programs["labeling, exact"] = lambda x, truth: best_ious(level_boxes(x), truth)
    for n in (1000, 200):
        programs[f"contours, {n} thresholds"] = lambda x, truth, n=n: best_ious(traced_boxes(x, n), truth)
    for folder in args.runs:
        run = TrainedRun(folder, device="cpu", amp="off", batch_size=8)
        size, test = run.config.image_size, run.split("test")
        split = test.take(range(0, len(test), max(1, len(test) // args.images)), "bench")
        maps = [x for batch in run.maps(split) for x in batch.maps]
        truths = (scale_boxes(split.boxes[i], tuple(split.sizes[i]), size) for i in range(len(split)))
        pairs, took = list(zip(maps, truths)), {name: [] for name in programs}
        for start in range(0, len(pairs), 10):  # in turns: every program leaves the caches in its own state
            for name, f in programs.items():
                took[name] += [timed(f, *pair)[0] for pair in pairs[start : start + 10]]
        memory = max(mebibytes(measure, *pair) for pair in pairs)
        print(f"{folder}: {len(maps)} maps at {size} x {size}, medians; the merge tree has {memory:.0f} MiB")
        for name, times in took.items():
            ratio = np.median(times) / np.median(took["merge tree, exact"])
            print(f"  {name:<26}{1e3 * np.median(times):8.2f} ms {ratio:7.1f} x")


def over_images(args):
    rng = np.random.default_rng(0)
    for dataset, n in (("CUB", 5794), ("ILSVRC", 50000), ("OpenImages", 5000)):
        boxed, right = np.full(n, dataset != "OpenImages"), rng.random((n, 4, LEVELS), np.float32) < 0.5
        ranks, fixed, levels = rng.integers(0, 9, n), rng.random(n) < 0.5, dict.fromkeys(LEVEL_NAMES, 99)
        per_image = PerImage(boxed, ~boxed, right, ranks, fixed=fixed, threshold=0.2, val_levels=levels)
        if dataset == "OpenImages":
            per_image = PerImage(boxed, ~boxed, pixels=rng.integers(0, 50, (n, 2, len(EDGES) - 1), np.int32))
        took, _ = timed(intervals, [per_image], "1")
        used = mebibytes(intervals, [per_image], "1")

        def one(counts, per_image=per_image):
            images = np.repeat(np.arange(len(counts)), counts)
            arrays = {name: x[images] for name, x in vars(per_image).items() if isinstance(x, np.ndarray)}
            return replace(per_image, **arrays).result()

        loop = sum(timed(one, counts)[0] for counts in resamples("1", n)[: args.loops]) / args.loops * 1000
        print(f"{dataset}, {n} images: {took:.2f} s, {used:.0f} MiB; loop {loop:.1f} s, {loop / took:.0f} x")


def work(args):
    """A run's operations: train in every epoch, val after each, test twice; of two images, times images."""
    for (dataset, k, n_train, n_val, n_test), arch, name in itertools.product(
        (("CUB", 200, 5994, 1000, 5794), ("ILSVRC", 1000, 1281167, 10000, 50000)), ARCHS, ("bridge", "cam")
    ):
        c, _ = resolve_config({"dataset": dataset, "arch": arch, "method": name})
        method, images, labels = find(name)(c, k), torch.rand(2, 3, 224, 224), torch.arange(2)
        counts = []
        for step in ("warm", "full", "predict"):
            with FlopCounterMode(display=False) as counter:
                if step == "predict":
                    method.eval().predict(images, labels)
                else:
                    epoch = 1 if step == "warm" else c.epochs
                    total(method.train()(images, labels, epoch)[0]).backward()
            counts.append(counter.get_total_flops() / 2e9)
        warm = vars(c).get("warm_epochs", 0)
        of_train = n_train * (warm * counts[0] + (c.epochs - warm) * counts[1])
        of_run = (of_train + (c.epochs * n_val + 2 * n_test) * counts[2]) / 1e6
        steps = ", ".join(f"{count:.1f}" for count in counts)
        print(
            f"{dataset} {arch} {name}: GFLOP an image (warm, full, predict) {steps}; run {of_run:,.0f} PFLOP"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    programs = {"train": train, "eval": evaluation, "boxes": boxes, "intervals": over_images, "work": work}
    parser.add_argument("program", choices=programs)
    parser.add_argument("runs", nargs="*", metavar="RUN")
    numbers = {"batch_size": 8, "steps": 7, "matrix": 2048, "images": 100, "workers": 2, "loops": 5}
    for flag, default in ({"arch": "vgg16", "device": "auto"} | numbers).items():
        parser.add_argument(f"--{flag.replace('_', '-')}", type=type(default), default=default)
    args = parser.parse_args()
    print(args, torch.get_num_threads(), "threads")
    programs[args.program](args)
