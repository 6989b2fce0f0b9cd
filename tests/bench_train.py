"""Speed of a training step: this program against a plain float32 eager step with the same mathematics.

    python tests/bench_train.py [--dataset CUB] [--arch vgg16] [--batch-size 8] [--steps 7] [--device cpu]
                                [--modes "ours float32" "ours bf16" "ours bf16 compiled" "ours TF32"]

The plain step has contiguous tensors, no autocast, cosine maps of all classes, and SGD parameter by
parameter. It is always run. Same weights and images, in turns, one process per mode. Printed: medians of
images/s, the ratio to the plain step, peak memory (on the CPU of the whole process), the share of the
throughput of matrix products of the same type; how far the first losses are apart; images/s of the input.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench_eval import drawn_split

from bridge_wsol.config import preset_values
from bridge_wsol.data import TrainImages, train_loader
from bridge_wsol.methods import Bridge, Passes, Terms
from bridge_wsol.models import ARCHS
from bridge_wsol.optim import build_optimizer
from bridge_wsol.utils import autocast, keep_freed_memory, resolve_device

CLASSES = {"CUB": 200, "ILSVRC": 1000, "OpenImages": 100}
EPOCH = 50  # after the warm stage, with all four losses
PLAIN = "plain float32"
MODES = ("ours float32", "ours bf16", "ours bf16 compiled", "ours TF32")  # train.py offers the first two


class Plain(Bridge):
    """The formulas as one writes them down first, over all classes."""

    def terms(self, passes: Passes, labels: Tensor, epoch: int) -> Terms:
        c, f, weight = self.config, passes.features, self.net.fc.weight
        F = (f**2).sum(1).sqrt()
        low, high = F.amin((1, 2), keepdim=True), F.amax((1, 2), keepdim=True)
        F_hat = (F - low) / (high - low)
        directions = f / F[:, None].clamp(min=1e-12), weight / weight.norm(dim=1, keepdim=True)
        S = torch.einsum("nchw,kc->nkhw", *directions)
        S_y = S[torch.arange(len(labels)), labels]

        def mean(values: Tensor, where: Tensor) -> Tensor:
            return values[where].mean() if where.any() else values.new_zeros(())

        l_sim = l_norm = 0
        for s_all, s_y, f_hat in zip(S, S_y, F_hat):
            s = s_all.amax(0) if c.norm_class == "max" else s_y
            l_sim = l_sim + mean(s_y, f_hat < c.tau_bg) - mean(s_y, f_hat > c.tau_fg)
            l_norm = l_norm + mean(f_hat, s < 0) - mean(f_hat, s > 0)
        return {
            "l_ce": (1.0, nnf.cross_entropy(passes.logits, labels)),
            "l_drop": (c.lambda_drop, (passes.dropped - f).abs().mean()),
            "l_sim": (c.lambda_sim, l_sim / len(labels)),
            "l_norm": (c.lambda_norm, l_norm / len(labels)),
        }


def make(mode: str, args: argparse.Namespace, device: torch.device) -> Callable[..., dict[str, float]]:
    """A function that does one step on (images, labels) and returns the unweighted losses."""
    values = {name: x for name, (x, _) in preset_values(args.dataset, args.arch, "bridge").items()}
    config = SimpleNamespace(**values | {"arch": args.arch})
    torch.manual_seed(0)
    step = method = (Plain if mode == PLAIN else Bridge)(config, CLASSES[args.dataset]).to(device).train()
    optimizer = build_optimizer(method, config)
    if mode == PLAIN:
        for group in optimizer.param_groups:
            group |= {"fused": False, "foreach": False}
    else:
        method.to(memory_format=torch.channels_last)
        step = torch.compile(method) if "compiled" in mode else method

    def one_step(images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        optimizer.zero_grad(set_to_none=True)
        with autocast(device, "bf16" if "bf16" in mode else "off"):
            terms, _ = step(images, labels, EPOCH)
        sum(weight * value for weight, value in terms.values()).backward()
        optimizer.step()
        return {name: value.detach() for name, (_, value) in terms.items()}

    return one_step


def seconds(work: Callable[[], object], device: torch.device) -> float:
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def matrix_throughput(mode: str, device: torch.device) -> float:
    """FLOP/s of a large matrix product: what the device reaches, not what its data sheet says."""
    torch.backends.cuda.matmul.allow_tf32 = "TF32" in mode
    n, dtype = 8192 if device.type == "cuda" else 2048, torch.bfloat16 if "bf16" in mode else torch.float32
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    a @ b
    return 2 * n**3 / min(seconds(lambda: a @ b, device) for _ in range(20))


class Runner:
    """A process that does steps of one mode on request: it has its own memory and C library settings."""

    def __init__(self, mode: str, flags: list[str]):
        command = [sys.executable, __file__, *flags, "--run", mode]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        # The losses of the first step; of the plain mode the FLOPs of a step. None: the mode does not run.
        line = self.process.stdout.readline()
        self.first = json.loads(line) if line else None

    def seconds(self) -> float:
        print("step", file=self.process.stdin, flush=True)
        return float(self.process.stdout.readline())

    def end(self) -> float:
        """GB at the most so far: of the allocator on a GPU, of the whole process on the CPU."""
        return float(self.process.communicate()[0])


def serve(mode: str, args: argparse.Namespace, device: torch.device) -> None:
    """What a Runner's process does."""
    if device.type == "cpu" and mode != PLAIN:
        keep_freed_memory()
    # float32 means float32, except where TF32 is what is measured.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = "TF32" in mode
    step, generator = make(mode, args, device), torch.Generator().manual_seed(0)
    images = torch.randn(args.batch_size, 3, 224, 224, generator=generator).to(device)
    labels = torch.randint(CLASSES[args.dataset], (args.batch_size,), generator=generator).to(device)
    if mode != PLAIN:
        images = images.contiguous(memory_format=torch.channels_last)
    torch.manual_seed(1)  # the same locations dropped
    with FlopCounterMode(display=False) if mode == PLAIN else nullcontext() as counter:
        first = {name: float(value) for name, value in step(images, labels).items()}
    print(json.dumps({"losses": first, "flops": counter and counter.get_total_flops()}), flush=True)
    for _ in sys.stdin:
        print(seconds(lambda: step(images, labels), device), flush=True)
    of_process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print((torch.cuda.max_memory_allocated(device) if device.type == "cuda" else of_process) / 1e9)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--dataset", choices=CLASSES, default="CUB", help="whose preset and number of classes")
    add("--arch", choices=ARCHS, default="vgg16")
    add("--batch-size", type=int, default=8)
    add("--steps", type=int, default=7)
    add("--device", default="auto")
    add("--modes", choices=MODES, nargs="+", default=MODES[:2], metavar="MODE", help="default: the first two")
    add("--run", choices=(PLAIN, *MODES), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    device = resolve_device(args.device)
    if args.run:
        serve(args.run, args, device)
        return

    flags = ["--dataset", args.dataset, "--arch", args.arch, "--batch-size", str(args.batch_size)]
    started = {mode: Runner(mode, [*flags, "--device", str(device)]) for mode in (PLAIN, *args.modes)}
    runners = {mode: runner for mode, runner in started.items() if runner.first}
    for mode in started.keys() - runners.keys():
        print(f"  {mode}: does not run here (its error is above)")
    for runner in runners.values():
        runner.seconds()  # the second step is the first with gradients and momenta of before
    taken: dict[str, list[float]] = {mode: [] for mode in runners}
    for _ in range(args.steps):
        for mode, runner in runners.items():
            taken[mode].append(runner.seconds())
    memory = {mode: runner.end() for mode, runner in runners.items()}
    of_plain, flops = runners[PLAIN].first["losses"], runners[PLAIN].first["flops"]

    threads = f"CPU, {torch.get_num_threads()} threads"
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else threads
    size = f"batch {args.batch_size}, 224 x 224, {CLASSES[args.dataset]} classes"
    print(f"{args.arch}, {size}, {where}; {flops / args.batch_size / 1e9:.0f} GFLOP per image")
    for mode, runner in runners.items():
        median, reachable = np.median(taken[mode]), matrix_throughput(mode, device)
        apart = max(abs(value - of_plain[name]) for name, value in runner.first["losses"].items())
        faster, share = np.median(taken[PLAIN]) / median, 100 * flops / median / reachable
        print(
            f"  {mode:<20}{args.batch_size / median:9.2f} images/s   {faster:5.2f} x plain"
            f"   {memory[mode]:6.2f} GB at most   {share:5.1f} % of a matrix product's"
            f" {reachable / 1e12:.2f} TFLOP/s   first losses {apart:.0e} apart"
        )
    with tempfile.TemporaryDirectory() as folder:
        split = drawn_split(Path(folder), 256)
        loader = train_loader(TrainImages(split, resize_size=256, image_size=224, seed=0), 32, workers=0)
        for what in ("decoded", "kept in memory"):  # the second pass does not read the files
            images_per_second = len(split) / seconds(lambda: list(loader), torch.device("cpu"))
            print(f"  input, one process, {what:<15}{images_per_second:9.0f} images/s")


if __name__ == "__main__":
    main()
