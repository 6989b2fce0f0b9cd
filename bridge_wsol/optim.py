"""Presets (appendix B and C.5), the two learning-rate groups, the schedule."""

from __future__ import annotations

import argparse
import platform
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torchvision
from torch import nn

from .datasets import is_folder
from .models import ARCHS
from .utils import InputError, Parser, default_workers

# Where each value comes from, in the words config.json repeats.
B = "appendix B"
C5 = "appendix C.5"
CODE = "authors' released configuration"
ANSWER = "authors' answer in an issue of their code"
CHOE = "Choe et al."
OURS = "our choice"

DEMO_WEIGHTS = str(
    Path(__file__).with_name("demo_vgg16.pth")
)  # a quarter of VGG16's width, pretrained on drawn shapes: demo.py

# stride: input pixels per location of the map (16: 224 -> 14 x 14, 8: 28 x 28).
# decay_at: epochs, counted from 1, from which the learning rates are multiplied by decay_factor once more.
# warm_epochs: the first ones, trained with L_CE + lambda_drop L_drop only. lr / lr_new: pretrained / new layers.
# norm_class: whose S splits the locations in L_norm, the ground-truth class's or the maximum over classes.
# fmt: off
PRESETS: dict[tuple[str, str], dict[str, tuple[Any, str]]] = {
    ("CUB", "vgg16"): {
        "lr": (4e-3, B), "lr_new": (2e-2, B),
        "lambda_sim": (0.5, CODE), "lambda_norm": (0.15, CODE), "lambda_drop": (3.0, CODE),
        "tau_fg": (0.6, CODE), "tau_bg": (0.1, CODE), "gamma": (0.8, CODE), "p": (0.5, CODE),
        "epochs": (70, CODE), "warm_epochs": (20, CODE), "decay_at": ([41, 61], CODE), "decay_factor": (0.2, CODE),
        "warm_batch_size": (32, CODE), "batch_size": (64, CODE),
        "norm_class": ("max", CODE), "stride": (16, CHOE),
    },
    ("CUB", "resnet50"): {
        "lr": (2e-3, B), "lr_new": (2e-2, B),
        "lambda_sim": (0.6, C5), "lambda_norm": (0.07, C5), "lambda_drop": (2.0, C5),
        "tau_fg": (0.4, C5), "tau_bg": (0.2, C5), "gamma": (0.8, C5), "p": (0.25, C5),
        "epochs": (70, CODE), "warm_epochs": (20, CODE), "decay_at": ([41, 61], CODE), "decay_factor": (0.2, CODE),
        "warm_batch_size": (32, CODE), "batch_size": (32, CODE),
        "norm_class": ("max", CODE), "stride": (8, CHOE),
    },
    ("ILSVRC", "vgg16"): {
        "lr": (2e-5, B), "lr_new": (1e-4, B),
        "lambda_sim": (0.5, C5), "lambda_norm": (0.2, C5), "lambda_drop": (3.0, C5),
        "tau_fg": (0.5, C5), "tau_bg": (0.3, C5), "gamma": (0.8, C5), "p": (0.5, C5),
        "epochs": (40, ANSWER), "warm_epochs": (5, ANSWER), "decay_at": ([11, 31], ANSWER), "decay_factor": (0.1, ANSWER),
        "warm_batch_size": (32, ANSWER), "batch_size": (32, ANSWER),
        "norm_class": ("target", CODE), "stride": (16, CHOE),
    },
    ("ILSVRC", "resnet50"): {
        "lr": (1e-5, B), "lr_new": (1e-4, B),
        "lambda_sim": (8.0, ANSWER), "lambda_norm": (1.0, ANSWER), "lambda_drop": (2.0, ANSWER),
        "tau_fg": (0.28, ANSWER), "tau_bg": (0.25, ANSWER), "gamma": (0.8, ANSWER), "p": (0.25, ANSWER),
        "epochs": (30, ANSWER), "warm_epochs": (14, ANSWER), "decay_at": ([21], ANSWER), "decay_factor": (0.1, ANSWER),
        "warm_batch_size": (32, ANSWER), "batch_size": (32, ANSWER),
        "norm_class": ("target", CODE), "stride": (8, CHOE),
    },
    ("OpenImages", "vgg16"): {
        "lr": (2e-3, OURS), "lr_new": (2e-2, OURS),
        "lambda_sim": (0.5, C5), "lambda_norm": (0.2, C5), "lambda_drop": (3.0, C5),
        "tau_fg": (0.5, C5), "tau_bg": (0.3, C5), "gamma": (0.8, C5), "p": (0.5, C5),
        "epochs": (10, OURS), "warm_epochs": (2, OURS), "decay_at": ([4, 7], OURS), "decay_factor": (0.1, OURS),
        "warm_batch_size": (32, OURS), "batch_size": (32, OURS),
        "norm_class": ("target", C5), "stride": (16, CHOE),
    },
    # The drawn data set, on a quarter of VGG16's width and 14 x 14 maps of 112 x 112 pixels: minutes on two CPU cores. Chosen on val,
    # with one seed. val_every: the pretrained features localize best before the classes are learned, so that the epoch with the best
    # localization would be one that hardly classifies; the last one is taken.
    ("demo", "vgg16"): {
        "lr": (3e-4, OURS), "lr_new": (2e-2, OURS),
        "lambda_sim": (1.0, OURS), "lambda_norm": (1.0, OURS), "lambda_drop": (0.0, OURS),
        "tau_fg": (0.3, OURS), "tau_bg": (0.2, OURS), "gamma": (0.8, OURS), "p": (0.5, OURS),
        "epochs": (10, OURS), "warm_epochs": (0, OURS), "decay_at": ([9], OURS), "decay_factor": (0.2, OURS), "val_every": (10, OURS),
        "warm_batch_size": (32, OURS), "batch_size": (32, OURS),
        "norm_class": ("target", OURS), "stride": (8, OURS), "width": (0.25, OURS), "resize_size": (128, OURS), "image_size": (112, OURS),
        "weights": (DEMO_WEIGHTS, OURS),
    },
    # What bridge_wsol/demo_vgg16.pth was pretrained on, from scratch.
    ("demo-pretrain", "vgg16"): {
        "lr": (3e-2, OURS), "lr_new": (3e-2, OURS),
        "lambda_sim": (0.0, OURS), "lambda_norm": (0.0, OURS), "lambda_drop": (0.0, OURS),
        "tau_fg": (0.25, OURS), "tau_bg": (0.15, OURS), "gamma": (0.8, OURS), "p": (0.5, OURS),
        "epochs": (12, OURS), "warm_epochs": (12, OURS), "decay_at": ([9, 11], OURS), "decay_factor": (0.2, OURS),
        "warm_batch_size": (32, OURS), "batch_size": (32, OURS),
        "norm_class": ("target", OURS), "stride": (8, OURS), "width": (0.25, OURS), "resize_size": (128, OURS), "image_size": (112, OURS),
        "weights": ("none", OURS), "batch_norm": (True, OURS),
    },
}

# The same for every preset that does not say otherwise.
COMMON: dict[str, tuple[Any, str]] = {
    "momentum": (0.9, B), "nesterov": (True, CODE), "weight_decay": (5e-4, B),
    "resize_size": (256, CHOE), "image_size": (224, CHOE),
    "width": (1.0, "the paper's networks"), "batch_norm": (False, "the paper's networks"),
}
# fmt: on


def preset(dataset: str, arch: str) -> dict[str, tuple[Any, str]]:
    """{name: (value, source)} of a run before the method's own values and flags. Raises InputError for a pair without a preset.

    A folder of one's own images has CUB's values.
    """
    if is_folder(dataset) and ("CUB", arch) in PRESETS:
        return COMMON | {name: (value, f"{OURS}: CUB's") for name, (value, _) in PRESETS["CUB", arch].items()}
    if (dataset, arch) not in PRESETS:
        pairs = ", ".join(f"{d} {a}" for d, a in PRESETS)
        raise InputError(
            f"no preset for --dataset {dataset} --arch {arch}; there is one for: {pairs}, and for a folder of your own images"
        )
    return COMMON | PRESETS[dataset, arch]


def image_size(dataset: str) -> int:
    """Side in pixels of the images and score maps on which a data set is evaluated."""
    sizes = [(COMMON | values)["image_size"][0] for (name, _), values in PRESETS.items() if name == dataset]
    return sizes[0] if sizes else COMMON["image_size"][0]


def parameter_groups(model: nn.Module, arch: str) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(old, new) layers of appendix B; every parameter is in exactly one of the two lists.

    VGG16: `features` / conv6 and fc, added for VGG16-GAP. ResNet50: what comes before layer4 / layer4 and fc. What a method adds is
    new. (The authors' released code has fc alone in ResNet50's second group; where sources differ, the appendix decides.)
    """
    old_prefixes = {"vgg16": ("features.",), "resnet50": ("conv1.", "bn1.", "layer1.", "layer2.", "layer3.")}[
        arch
    ]
    named = list(model.named_parameters())
    old = [parameter for name, parameter in named if name.startswith(old_prefixes)]
    new = [parameter for name, parameter in named if not name.startswith(old_prefixes)]
    return old, new


def build_optimizer(
    model: nn.Module,
    arch: str,
    *,
    lr: float,
    lr_new: float,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
) -> torch.optim.SGD:
    """SGD over the two groups; each keeps its undecayed rate as `base_lr` for `set_learning_rates`."""
    old, new = parameter_groups(model, arch)
    groups = [{"params": old, "lr": lr, "base_lr": lr}, {"params": new, "lr": lr_new, "base_lr": lr_new}]
    # One pass over each parameter instead of four; the same update to rounding.
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in model.parameters())
    return torch.optim.SGD(
        groups, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay, fused=fused
    )


def set_learning_rates(
    optimizer: torch.optim.Optimizer, epoch: int, decay_at: list[int], decay_factor: float
) -> list[float]:
    """The step schedule, a function of the epoch (counted from 1) alone. Returns the rate of each group."""
    factor = decay_factor ** sum(epoch >= start for start in decay_at)
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    return [group["lr"] for group in optimizer.param_groups]


# What is no preset's business. None: decided by the data (val_per_class) or the machine (workers).
DEFAULTS = {
    "data_root": "data",
    "splits": "data_splits",
    "weights": "imagenet",
    "seed": 0,
    "val_every": 1,
    "val_per_class": None,
    "workers": default_workers(),
    "device": "auto",
    "amp": "auto",
    "cache": None,
}


# A resumed run may have others of these than the interrupted one: they change where, how fast and how long it runs, not what it computes.
FREE_ON_RESUME = ("epochs", "val_every", "workers", "device", "amp", "cache", "data_root", "splits")


def parse_args(argv: list[str] | None, description: str, methods: dict[str, Any]) -> argparse.Namespace:
    parser = Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--dataset",
        default="demo",
        help="demo (default, drawn on first use), CUB, ILSVRC, OpenImages, or a folder with one sub-folder of images a class",
    )
    parser.add_argument(
        "--download",
        action="store_true",
        default=False,
        help="fetch CUB_200_2011 into --data-root where it is not there yet",
    )
    parser.add_argument("--arch", choices=ARCHS, default="vgg16")
    parser.add_argument("--method", choices=methods, default="bridge", help="cam: the vanilla classifier")
    parser.add_argument("--out", type=Path, default=None, help="default: runs/DATASET_ARCH_METHOD")
    parser.add_argument(
        "--resume", action="store_true", default=False, help="go on with the run in --out, with its values"
    )
    parser.add_argument("--data-root", metavar="DIR", help="the data set as distributed (default data)")
    parser.add_argument(
        "--splits", metavar="DIR", help="lists of images, labels and boxes (default data_splits)"
    )
    parser.add_argument(
        "--weights",
        metavar="W",
        help="imagenet (torchvision's, the default but for demo), none, or a file of them",
    )
    parser.add_argument(
        "--val-per-class",
        type=int,
        metavar="N",
        help="hold N images a class out from train for val (2 where val has no list)",
    )
    parser.add_argument(
        "--val-every",
        type=int,
        metavar="N",
        help="choose the best among every N-th epoch and the last (default 1; demo: the last)",
    )
    parser.add_argument("--seed", type=int, metavar="N")
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes that load images, and as many that sweep maps (default: one a core, at most 8)",
    )
    parser.add_argument(
        "--cache", metavar="DIR", help="keep the resized training images there, decoded once: 0.2 MB an image"
    )
    parser.add_argument("--device", help="auto (default), cpu, cuda, cuda:1, ...")
    parser.add_argument(
        "--amp",
        choices=("auto", "bf16", "off"),
        help="auto (default): bf16 on GPUs and CPUs with instructions for it",
    )
    group = parser.add_argument_group(
        "preset values, under their paper names (default: bridge_wsol/optim.py for --dataset and --arch)"
    )
    for name in ("epochs", "warm_epochs", "batch_size", "warm_batch_size"):
        group.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N")
    for name in (
        "lr",
        "lr_new",
        "lambda_sim",
        "lambda_norm",
        "lambda_drop",
        "tau_fg",
        "tau_bg",
        "gamma",
        "p",
        "decay_factor",
    ):
        group.add_argument(f"--{name.replace('_', '-')}", type=float, metavar="X")
    group.add_argument(
        "--decay-at",
        type=int,
        nargs="*",
        metavar="EPOCH",
        help="epochs, from 1, from which the rates are multiplied once more",
    )
    group.add_argument(
        "--norm-class", choices=("target", "max"), help="whose S splits the locations in L_norm"
    )
    group = parser.add_argument_group(
        "values of one method (default: its `preset` in bridge_wsol/baselines.py)"
    )
    for name, value in method_values(methods).items():
        group.add_argument(f"--{name.replace('_', '-')}", type=type(value), metavar="X")
    return parser.parse_args(argv)


def method_values(methods: dict[str, Any]) -> dict[str, Any]:
    """The hyperparameters that methods add to the presets, each with an example of its value."""
    own = {
        name: value
        for method in methods.values()
        for arch in ARCHS
        for name, (value, _) in method.preset("CUB", arch).items()
    }
    return {name: value for name, value in own.items() if name not in preset("CUB", "vgg16")}


def resolve_config(
    args: argparse.Namespace, interrupted: dict[str, Any] | None, methods: dict[str, Any]
) -> tuple[SimpleNamespace, dict[str, str]]:
    """(every value of the run, where each comes from: the preset and its source, a flag, or the default).

    A resumed run has the interrupted one's values. Raises InputError for a flag that contradicts them, or a value out of range.
    """
    flags = {name: value for name, value in vars(args).items() if name not in ("resume", "out", "download")}
    if interrupted:
        values, sources = dict(interrupted["config"]), dict(interrupted["sources"])
        for name, value in flags.items():
            if name not in FREE_ON_RESUME and value != values[name]:
                raise InputError(
                    f"--{name.replace('_', '-')} {value}: the run to resume has {values[name]}: give that one, or choose another --out"
                )
    else:
        own = preset(args.dataset, args.arch) | methods[args.method].preset(args.dataset, args.arch)
        values = DEFAULTS | {name: value for name, (value, _) in own.items()}
        sources = dict.fromkeys(DEFAULTS, "default") | {
            name: f"preset: {source}" for name, (_, source) in own.items()
        }
        for name in method_values(methods).keys() & flags.keys() - own.keys():
            raise InputError(f"--{name.replace('_', '-')}: not a value of --method {args.method}")
        if "batch_size" in flags:
            flags.setdefault("warm_batch_size", flags["batch_size"])
    c = SimpleNamespace(**(values | flags))

    def require(condition: bool, name: str, what: str) -> None:
        if not condition:
            raise InputError(f"--{name.replace('_', '-')} {getattr(c, name)}: must be {what}")

    for name in ("epochs", "batch_size", "warm_batch_size", "val_every"):
        require(getattr(c, name) >= 1, name, "at least 1")
    for name in ("warm_epochs", "workers", "seed", "lambda_sim", "lambda_norm", "lambda_drop", "gamma"):
        require(getattr(c, name) >= 0, name, "at least 0")
    for name in ("lr", "lr_new", "decay_factor"):
        require(0 < getattr(c, name) < float("inf"), name, "above 0")
    for name in ("tau_fg", "tau_bg", "p"):
        require(0 <= getattr(c, name) <= 1, name, "in [0, 1]")
    return c, sources | dict.fromkeys(flags, "flag")


def environment(device: torch.device) -> dict[str, Any]:
    """What a result depends on besides its configuration: for config.json."""
    try:
        here = Path(__file__).parent
        git = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=10
        )
        commit = git.stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        commit = None
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "git_commit": commit,
    }
