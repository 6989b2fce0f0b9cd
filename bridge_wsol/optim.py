"""Presets (appendix B and C.5), the two learning-rate groups, the schedule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from .utils import InputError

# Where each value comes from, in the words config.json repeats.
B = "appendix B"
C5 = "appendix C.5"
CODE = "authors' released configuration"
ANSWER = "authors' answer in an issue of their code"
CHOE = "Choe et al."
OURS = "our choice"

DEMO_WEIGHTS = str(Path(__file__).with_name("demo_vgg16.pth"))  # a quarter of VGG16's width, pretrained on drawn shapes: demo.py

# stride: input pixels per location of the map (16: 224 -> 14 x 14, 8: 28 x 28).
# decay_at: epochs, counted from 1, from which the learning rates are multiplied by decay_factor once more.
# warm_epochs: the first ones, trained with L_CE + lambda_drop L_drop only. lr / lr_new: pretrained / new layers.
# norm_class: whose S splits the locations in L_norm, the ground-truth class's or the maximum over classes.
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
    "resize_size": (256, CHOE), "image_size": (224, CHOE), "width": (1.0, "the paper's networks"), "batch_norm": (False, "the paper's networks"),
}

def is_folder(dataset: str) -> bool:
    """Whether a --dataset is the path of a folder of one's own images: no name that has a preset, and a path or a folder here."""
    return all(dataset != name for name, _ in PRESETS) and ("/" in dataset or Path(dataset).is_dir())


def preset(dataset: str, arch: str) -> dict[str, tuple[Any, str]]:
    """{name: (value, source)} of a run before the method's own values and flags. Raises InputError for a pair without a preset.

    A folder of one's own images has CUB's values.
    """
    if is_folder(dataset) and ("CUB", arch) in PRESETS:
        return COMMON | {name: (value, f"{OURS}: CUB's") for name, (value, _) in PRESETS["CUB", arch].items()}
    if (dataset, arch) not in PRESETS:
        pairs = ", ".join(f"{d} {a}" for d, a in PRESETS)
        raise InputError(f"no preset for --dataset {dataset} --arch {arch}; there is one for: {pairs}, and for a folder of your own images")
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
    old_prefixes = {"vgg16": ("features.",), "resnet50": ("conv1.", "bn1.", "layer1.", "layer2.", "layer3.")}[arch]
    named = list(model.named_parameters())
    old = [parameter for name, parameter in named if name.startswith(old_prefixes)]
    new = [parameter for name, parameter in named if not name.startswith(old_prefixes)]
    return old, new


def build_optimizer(
    model: nn.Module, arch: str, *, lr: float, lr_new: float, momentum: float, nesterov: bool, weight_decay: float
) -> torch.optim.SGD:
    """SGD over the two groups; each keeps its undecayed rate as `base_lr` for `set_learning_rates`."""
    old, new = parameter_groups(model, arch)
    groups = [{"params": old, "lr": lr, "base_lr": lr}, {"params": new, "lr": lr_new, "base_lr": lr_new}]
    # One pass over each parameter instead of four; the same update to rounding.
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in model.parameters())
    return torch.optim.SGD(groups, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay, fused=fused)


def set_learning_rates(optimizer: torch.optim.Optimizer, epoch: int, decay_at: list[int], decay_factor: float) -> list[float]:
    """The step schedule, a function of the epoch (counted from 1) alone. Returns the rate of each group."""
    factor = decay_factor ** sum(epoch >= start for start in decay_at)
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    return [group["lr"] for group in optimizer.param_groups]
