"""Speed of a training step: this program against a plain float32 eager step with the same mathematics.

    python tests/bench_train.py [--dataset CUB] [--arch vgg16] [--batch-size 8] [--steps 7] [--device cpu]
                                [--modes "ours bf16" "ours bf16 compiled" ...]

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

from bridge_wsol import optim
from bridge_wsol.data import resized_pixels, train_loader
from bridge_wsol.methods import METHODS
from bridge_wsol.models import ARCHS
from bridge_wsol.utils import autocast, keep_freed_memory, resolve_device
from train import TrainingStep

CLASSES = {"CUB": 200, "ILSVRC": 1000, "OpenImages": 100}
EPOCH = 50  # after the warm stage, with all four losses
PLAIN = "plain float32"
MODES = (PLAIN, "ours float32", "ours bf16")  # what train.py offers; the others are tried here alone
TRIED = ("ours bf16 compiled",)
TRIED_ON_GPU = ("ours TF32", "ours bf16 cudnn.benchmark", "ours bf16 CUDA graph")


def plain_losses(output, weight: Tensor, labels: Tensor, c: SimpleNamespace) -> dict[str, Tensor]:
    """The formulas as one writes them down first, over all classes."""
    f = output.features
    F = (f**2).sum(1).sqrt()
    low, high = F.amin((1, 2), keepdim=True), F.amax((1, 2), keepdim=True)
    F_hat = (F - low) / (high - low)
    S = torch.einsum(
        "nchw,kc->nkhw", f / F[:, None].clamp(min=1e-12), weight / weight.norm(dim=1, keepdim=True)
    )
    S_y = S[torch.arange(len(labels)), labels]
    l_sim = l_norm = 0
    for i in range(len(labels)):
        bg, fg = F_hat[i] < c.tau_bg, F_hat[i] > c.tau_fg
        l_sim = l_sim + (S_y[i][bg].mean() if bg.any() else 0) - (S_y[i][fg].mean() if fg.any() else 0)
        s = S[i].amax(0) if c.norm_class == "max" else S_y[i]
        l_norm = (
            l_norm
            + (F_hat[i][s < 0].mean() if (s < 0).any() else 0)
            - (F_hat[i][s > 0].mean() if (s > 0).any() else 0)
        )
    losses = {
        "l_ce": nnf.cross_entropy(output.logits, labels),
        "l_drop": (output.features_dropped - f).abs().mean(),
    }
    return losses | {"l_sim": l_sim / len(labels), "l_norm": l_norm / len(labels)}


def make(
    mode: str, dataset: str, arch: str, device: torch.device
) -> Callable[[Tensor, Tensor], dict[str, Tensor]]:
    """A function that does one step and returns the unweighted losses."""
    values = {name: value for name, (value, _) in optim.preset(dataset, arch).items()}
    c = SimpleNamespace(**values, arch=arch)
    rates = {"lr": c.lr, "lr_new": c.lr_new, "momentum": c.momentum, "nesterov": c.nesterov}
    torch.manual_seed(0)
    method = METHODS["bridge"](c)
    model = method.network(CLASSES[dataset]).to(device).train()
    optimizer = optim.build_optimizer(model, arch, **rates, weight_decay=c.weight_decay)
    factors = {"l_ce": 1.0, "l_drop": c.lambda_drop, "l_sim": c.lambda_sim, "l_norm": c.lambda_norm}

    if mode == PLAIN:
        for group in optimizer.param_groups:
            group |= {"fused": False, "foreach": False}

        def forward(images: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return plain_losses(model(images), model.fc.weight, labels, c)
    else:
        model.to(memory_format=torch.channels_last)
        step = TrainingStep(model, method)
        step = torch.compile(step) if "compiled" in mode else step

        def forward(images: Tensor, labels: Tensor) -> dict[str, Tensor]:
            with autocast(device, "bf16" if "bf16" in mode else "off"):
                terms = step(images, labels, EPOCH).terms
            return {name: value for name, (_, value) in terms.items()}

    def one_step(images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        optimizer.zero_grad(set_to_none=True)
        losses = forward(images, labels)
        sum(factors[name] * value for name, value in losses.items()).backward()
        optimizer.step()
        return {name: value.detach() for name, value in losses.items()}

    return one_step


def graphed(one_step: Callable[[Tensor, Tensor], dict[str, Tensor]], images: Tensor, labels: Tensor):
    """The step as a CUDA graph of these tensors. Its learning rates are those of now."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries choose their algorithms before the capture
        for _ in range(3):
            one_step(images, labels)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        one_step(images, labels)
    return graph.replay


def seconds(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def matrix_throughput(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a large matrix product: what the device reaches, not what its data sheet says."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    a @ b
    return 2 * n**3 / min(seconds(lambda: a @ b, device) for _ in range(20))


def batch(size: int, classes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(size, 3, 224, 224, generator=generator)
    return images.to(device), torch.randint(classes, (size,), generator=generator).to(device)


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
    torch.backends.cudnn.benchmark = "cudnn.benchmark" in mode
    step = make(mode, args.dataset, args.arch, device)
    images, labels = batch(args.batch_size, CLASSES[args.dataset], device)
    if mode != PLAIN:
        images = images.contiguous(memory_format=torch.channels_last)
    torch.manual_seed(1)  # the same locations dropped
    with FlopCounterMode(display=False) if mode == PLAIN else nullcontext() as counter:
        first = {name: float(value) for name, value in step(images, labels).items()}
    run = graphed(step, images, labels) if "graph" in mode else partial(step, images, labels)
    print(json.dumps({"losses": first, "flops": counter and counter.get_total_flops()}), flush=True)
    for _ in sys.stdin:
        print(seconds(run, device), flush=True)
    if device.type == "cuda":
        print(torch.cuda.max_memory_allocated(device) / 1e9)
    else:
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9)


def reached(mode: str, device: torch.device) -> float:
    """`matrix_throughput` of the number type of a mode."""
    torch.backends.cuda.matmul.allow_tf32 = "TF32" in mode
    return matrix_throughput(torch.bfloat16 if "bf16" in mode else torch.float32, device)


def measure_input() -> None:
    """Prints images/s of the training input."""
    with tempfile.TemporaryDirectory() as folder:
        split = drawn_split(Path(folder), 256)
        pixels = resized_pixels(split, 256, Path(folder) / "cache", workers=0)
        for what, kept in (("decoded", None), ("cached", pixels)):
            loader = train_loader(split, 32, resize_size=256, image_size=224, seed=0, workers=0, pixels=kept)
            list(loader)
            images_per_second = len(split) / seconds(partial(list, loader), torch.device("cpu"))
            print(f"  input, one process, {what:<9}{images_per_second:9.0f} images/s")


def parse_args() -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--dataset", choices=CLASSES, default="CUB", help="whose preset and number of classes")
    add("--arch", choices=ARCHS, default="vgg16")
    add("--batch-size", type=int, default=8)
    add("--steps", type=int, default=7)
    add("--device", default="auto")
    every = MODES + TRIED + TRIED_ON_GPU
    text = "default: on the CPU what train.py offers, on a GPU all"
    add("--modes", choices=every[1:], nargs="+", default=None, metavar="MODE", help=text)
    add("--run", choices=every, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    device = resolve_device(args.device)
    if args.run:
        serve(args.run, args, device)
        return

    flags = ["--dataset", args.dataset, "--arch", args.arch, "--batch-size", str(args.batch_size)]
    every = MODES + TRIED + TRIED_ON_GPU if device.type == "cuda" else MODES
    modes = (PLAIN, *(args.modes or every[1:]))
    runners = {mode: Runner(mode, [*flags, "--device", str(device)]) for mode in modes}
    for mode in [mode for mode, runner in runners.items() if not runner.first]:
        print(f"  {mode}: does not run here (its error is above)")
        del runners[mode]
    for runner in runners.values():
        runner.seconds()  # the second step is the first with gradients and momenta of before
    taken: dict[str, list[float]] = {mode: [] for mode in runners}
    for _ in range(args.steps):
        for mode, runner in runners.items():
            taken[mode].append(runner.seconds())
    memory = {mode: runner.end() for mode, runner in runners.items()}
    first = {mode: runner.first["losses"] for mode, runner in runners.items()}
    flops = runners[PLAIN].first["flops"]

    gpu = device.type == "cuda" and torch.cuda.get_device_name(device)
    print(
        f"{args.arch}, batch {args.batch_size}, 224 x 224, {CLASSES[args.dataset]} classes, "
        f"{gpu or f'CPU, {torch.get_num_threads()} threads'}; "
        f"{flops / args.batch_size / 1e9:.0f} GFLOP per image"
    )
    plain = np.median(taken[PLAIN])
    for mode in runners:
        median, reachable = np.median(taken[mode]), reached(mode, device)
        apart = max(abs(first[mode][key] - first[PLAIN][key]) for key in first[mode])
        print(
            f"  {mode:<26}{args.batch_size / median:9.2f} images/s   {plain / median:5.2f} x plain"
            f"   {memory[mode]:6.2f} GB at most   {100 * flops / median / reachable:5.1f} %"
            f" of a matrix product's {reachable / 1e12:.2f} TFLOP/s   first losses {apart:.0e} apart"
        )
    measure_input()


if __name__ == "__main__":
    main()
