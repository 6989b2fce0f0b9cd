"""Speed of a training step: this program in float32 and bf16 against a plain float32 eager step.

    python tests/bench_train.py [--dataset CUB] [--arch vgg16] [--batch-size 8] [--steps 7] [--device cpu]

The plain step has the same mathematics with contiguous tensors, no autocast, cosine maps of all classes, and
SGD parameter by parameter. Same weights and images, in turns, one process per mode. Printed: medians of
images/s, the ratio to the plain step, peak memory (on the CPU of the whole process), the share of the
throughput of matrix products of the same type; that the first losses are equal; images/s of the input.
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
MODES = ("plain float32", "ours float32", "ours bf16")


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
    c = SimpleNamespace(
        **{name: value for name, (value, _) in optim.preset(dataset, arch).items()}, arch=arch
    )
    torch.manual_seed(0)
    method = METHODS["bridge"](c)
    model = method.network(CLASSES[dataset]).to(device).train()
    if mode == "plain float32":
        old, new = optim.parameter_groups(model, arch)
        groups = [{"params": old, "lr": c.lr}, {"params": new, "lr": c.lr_new}]
        optimizer = torch.optim.SGD(
            groups, momentum=c.momentum, nesterov=c.nesterov, weight_decay=c.weight_decay, foreach=False
        )
    else:
        model = model.to(memory_format=torch.channels_last)
        optimizer = optim.build_optimizer(
            model,
            arch,
            lr=c.lr,
            lr_new=c.lr_new,
            momentum=c.momentum,
            nesterov=c.nesterov,
            weight_decay=c.weight_decay,
        )
        step = TrainingStep(model, method)
    factors = {"l_ce": 1.0, "l_drop": c.lambda_drop, "l_sim": c.lambda_sim, "l_norm": c.lambda_norm}

    def one_step(images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        torch.manual_seed(1)  # the same locations dropped
        if mode == "plain float32":
            losses = plain_losses(model(images), model.fc.weight, labels, c)
            optimizer.zero_grad(set_to_none=True)
        else:
            optimizer.zero_grad(set_to_none=True)
            images = images.contiguous(memory_format=torch.channels_last)
            with autocast(device, "bf16" if mode == "ours bf16" else "off"):
                losses = {name: value for name, (_, value) in step(images, labels, EPOCH).terms.items()}
        sum(factors[name] * value for name, value in losses.items()).backward()
        optimizer.step()
        return {name: value.detach() for name, value in losses.items()}

    return one_step


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
        self.first = json.loads(
            self.process.stdout.readline()
        )  # the losses of the first step, the FLOPs of one

    def seconds(self) -> float:
        print("step", file=self.process.stdin, flush=True)
        return float(self.process.stdout.readline())

    def end(self) -> float:
        """GB at the most so far: of the allocator on a GPU, of the whole process on the CPU."""
        return float(self.process.communicate()[0])


def serve(mode: str, args: argparse.Namespace, device: torch.device) -> None:
    """What a Runner's process does."""
    if device.type == "cpu" and mode != "plain float32":
        keep_freed_memory()
    step = make(mode, args.dataset, args.arch, device)
    images, labels = batch(args.batch_size, CLASSES[args.dataset], device)
    with FlopCounterMode(display=False) as counter:
        losses = step(images, labels)
    print(
        json.dumps(
            {
                "losses": {name: float(value) for name, value in losses.items()},
                "flops": counter.get_total_flops(),
            }
        ),
        flush=True,
    )
    for _ in sys.stdin:
        print(seconds(lambda: step(images, labels), device), flush=True)
    peak = (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if device.type == "cpu"
        else torch.cuda.max_memory_allocated(device)
    )
    print(peak / 1e9)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dataset", choices=CLASSES, default="CUB", help="whose preset and number of classes"
    )
    parser.add_argument("--arch", choices=ARCHS, default="vgg16")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--run", choices=MODES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = resolve_device(args.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = (
        False  # float32 means float32, in all of them
    )
    if args.run:
        serve(args.run, args, device)
        return

    flags = [
        "--dataset",
        args.dataset,
        "--arch",
        args.arch,
        "--batch-size",
        str(args.batch_size),
        "--device",
        str(device),
    ]
    runners = {mode: Runner(mode, flags) for mode in MODES}
    for runner in runners.values():
        runner.seconds()  # the second step is the first with gradients and momenta of before
    taken: dict[str, list[float]] = {mode: [] for mode in MODES}
    for _ in range(args.steps):
        for mode, runner in runners.items():
            taken[mode].append(runner.seconds())
    memory = {mode: runner.end() for mode, runner in runners.items()}
    first = {mode: runner.first["losses"] for mode, runner in runners.items()}
    flops = runners["plain float32"].first["flops"]

    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    classes = CLASSES[args.dataset]
    print(
        f"{args.arch}, batch {args.batch_size}, 224 x 224, {classes} classes, {name}; "
        f"{flops / args.batch_size / 1e9:.0f} GFLOP per image"
    )
    reachable = {dtype: matrix_throughput(dtype, device) for dtype in (torch.float32, torch.bfloat16)}
    plain = np.median(taken["plain float32"])
    for mode in MODES:
        median, dtype = np.median(taken[mode]), torch.bfloat16 if "bf16" in mode else torch.float32
        print(
            f"  {mode:<14}{args.batch_size / median:9.2f} images/s   {plain / median:5.2f} x plain"
            f"   {memory[mode]:6.2f} GB at most   {100 * flops / median / reachable[dtype]:5.1f} %"
            f" of a matrix product's {reachable[dtype] / 1e12:.2f} TFLOP/s"
        )
    for mode in MODES[1:]:
        difference = max(abs(first[mode][key] - first["plain float32"][key]) for key in first[mode])
        print(f"  losses of the first step, {mode} and plain: at most {difference:.1e} apart")

    with tempfile.TemporaryDirectory() as folder:
        split = drawn_split(Path(folder), 256)
        pixels = resized_pixels(split, 256, Path(folder) / "cache", workers=0)
        for what, kept in (("decoded", None), ("cached", pixels)):
            loader = train_loader(split, 32, resize_size=256, image_size=224, seed=0, workers=0, pixels=kept)
            list(loader)
            images_per_second = len(split) / seconds(partial(list, loader), torch.device("cpu"))
            print(f"  input, one process, {what:<9}{images_per_second:9.0f} images/s")


if __name__ == "__main__":
    main()
