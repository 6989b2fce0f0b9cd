"""Appendix B: two learning-rate groups, SGD with Nesterov momentum, a step schedule."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

# Layers of the lower rate: VGG16's pretrained features; ResNet50's layers before layer4.
OLD_LAYERS = {"vgg16": ("features.",), "resnet50": ("conv1.", "bn1.", "layer1.", "layer2.", "layer3.")}


def parameter_groups(net: nn.Module, arch: str) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(old, new) layers of appendix B; every parameter is in exactly one of the two lists.

    VGG16: `features` / conv6 and fc, which VGG16-GAP adds. ResNet50: layers before layer4 / layer4 and fc.
    Layers that a method adds are new. The authors' released code has fc alone in ResNet50's second group;
    where sources differ, the appendix decides.
    """
    named = list(net.named_parameters())
    old = [parameter for name, parameter in named if name.startswith(OLD_LAYERS[arch])]
    return old, [parameter for name, parameter in named if not name.startswith(OLD_LAYERS[arch])]


def build_optimizer(method: nn.Module, config: SimpleNamespace) -> torch.optim.SGD:
    """SGD over the two groups; each keeps its first rate as `base_lr` for `set_learning_rates`.

    config: arch, lr, lr_new, momentum, nesterov, weight_decay. Raises ValueError for a method with parameters
    outside of its network: a checkpoint would not hold them.
    """
    outside = [name for name, _ in method.named_parameters() if not name.startswith("net.")]
    if outside:
        raise ValueError(f"parameter {outside[0]} of the method is not in its network: add it to self.net")
    groups = zip(parameter_groups(method.net, config.arch), (config.lr, config.lr_new))
    return torch.optim.SGD(
        [{"params": parameters, "lr": lr, "base_lr": lr} for parameters, lr in groups],
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        # One pass over each parameter instead of four; the same update up to rounding.
        fused=all(parameter.device.type in ("cpu", "cuda") for parameter in method.parameters()),
    )


def set_learning_rates(
    optimizer: torch.optim.Optimizer, epoch: int, decay_at: list[int], decay_factor: float
) -> list[float]:
    """Sets and returns the rate of each group: base_lr times decay_factor for each of decay_at reached.

    The step schedule depends on the epoch alone, counted from 1.
    """
    factor = decay_factor ** sum(epoch >= start for start in decay_at)
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    return [group["lr"] for group in optimizer.param_groups]
