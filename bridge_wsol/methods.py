"""What a method is: the CAM baseline, and Bridge, the paper's method on one screen.

A method is an nn.Module that owns its network, `self.net`. A new one is a subclass of CAM (or of another
method) with a name, in any file that is imported before train.main() runs. Change as little as you need:

    values    the method's own hyperparameters; each becomes a flag of train.py
    network   another network, for example with one more layer
    passes    other forward passes
    terms     other losses, from what `passes` returned
    forward   other images or labels
    predict   another map or other logits

Call `super()` in these functions: two methods then combine by inheritance, if both have their losses in
`terms` (ACoL, SPG and CALM have them in `forward`). Examples: the compared systems in reproduce/baselines.py,
and the complete file in docs/methods.md. Compute losses and maps in float32 under autocast.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import ClassVar, NamedTuple

import torch.nn.functional as nnf
from torch import Tensor, nn

from .cam import class_activation_map
from .losses import alignment_losses, attentive_dropout, consistency_loss, full_precision
from .models import GAPNetwork, build_network
from .utils import InputError, Value

METHODS: dict[str, type[CAM]] = {}  # name -> class; a subclass with a name registers itself
Terms = dict[str, tuple[float, Tensor]]  # name -> (weight, scalar); the loss is the weighted sum


class Passes(NamedTuple):
    """What the forward passes of a batch return."""

    logits: Tensor  # N x K
    features: Tensor  # N x C x h x w: f, after the last ReLU
    dropped: Tensor | None = None  # f of a second pass with dropout; None in eval mode, and without one
    extra: Tensor | None = None  # what a compared system adds: see its `passes`


class CAM(nn.Module):
    """The CAM baseline (Zhou et al., CVPR 2016), base class of all methods: L_CE, and the map w_y . f_u.

    config: every value of the run, those of `values` among them. Every parameter is in `self.net`.
    """

    net: GAPNetwork
    values: ClassVar[dict[str, Value]] = {}  # the method's own, without those of its base classes
    map_options: ClassVar[tuple[str, ...]] = ()  # values of the map alone: evaluate.py can change them
    upsampling: ClassVar[str] = "bicubic"  # of the map to the image size; bicubic is the protocol's

    def __init_subclass__(cls, name: str | None = None) -> None:
        if name is not None:
            METHODS[name] = cls  # a later class of the same name replaces an earlier one

    def __init__(self, config: SimpleNamespace, num_classes: int):
        super().__init__()
        self.config = config
        self.net = self.network(num_classes)

    @classmethod
    def all_values(cls) -> dict[str, Value]:
        """`values` of this class and of its base classes."""
        return {name: v for base in reversed(cls.__mro__) for name, v in vars(base).get("values", {}).items()}

    def network(self, num_classes: int) -> GAPNetwork:
        """The network with initial weights, drawn from torch's default generator."""
        c = self.config
        return build_network(c.arch, num_classes, c.stride, c.width)

    def passes(self, images: Tensor) -> Passes:
        """The forward passes: images N x 3 x H x W, normalized -> Passes."""
        features = self.net.after_dropout(self.net.before_dropout(images))
        return Passes(self.net.classify(features), features)

    def terms(self, passes: Passes, labels: Tensor, epoch: int) -> Terms:
        """The losses of a batch, each with its weight: labels N (int64); epoch counts from 1. Here L_CE."""
        return {"l_ce": (1.0, nnf.cross_entropy(full_precision(passes.logits), labels))}

    def forward(self, images: Tensor, labels: Tensor, epoch: int) -> tuple[Terms, Tensor]:
        """(terms, logits N x K) of a batch in training mode. Gradient flows through the terms."""
        passes = self.passes(images)
        return self.terms(passes, labels, epoch), passes.logits

    def predict(self, images: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(logits N x K, maps N x h x w, unbounded) in eval mode.

        labels N (int64): classes of the maps. None: the top-1 predictions.
        """
        passes = self.passes(images)
        labels = passes.logits.argmax(1) if labels is None else labels
        return passes.logits, class_activation_map(passes.features, self.net.fc.weight, labels)


METHODS["cam"] = CAM


class Bridge(CAM, name="bridge"):
    """The paper's method (Kim et al., CVPR 2022, main-text section 3; its losses: losses.py).

    Warm stage, the first warm_epochs epochs: L = L_CE + lambda_drop L_drop.
    After it: L = L_CE + lambda_drop L_drop + lambda_sim L_sim + lambda_norm L_norm.
    """

    values = {
        "lambda_sim": Value(float, None, "weight of L_sim", "[0, inf)"),
        "lambda_norm": Value(float, None, "weight of L_norm", "[0, inf)"),
        "lambda_drop": Value(float, None, "weight of L_drop; 0 switches attentive dropout off", "[0, inf)"),
        "tau_fg": Value(float, None, "L_sim: foreground where F-hat > tau_fg, in [0, 1]", "[0, 1]"),
        "tau_bg": Value(float, None, "L_sim: background where F-hat < tau_bg, in [0, 1]", "[0, 1]"),
        "gamma": Value(float, None, "attentive dropout: candidates above gamma x the maximum", "[0, inf)"),
        "p": Value(float, None, "attentive dropout: probability to drop a candidate", "[0, 1]"),
        "norm_class": Value(
            str, None, "S in L_norm: ground truth, or maximum over classes", ("target", "max")
        ),
    }

    def passes(self, images: Tensor) -> Passes:
        """The clean pass, of the logits; in training mode also a second pass, from the dropout on."""
        net, c = self.net, self.config
        shared = net.before_dropout(images)
        features, dropped = net.after_dropout(shared), None  # the clean pass first: batch norm sees both
        if c.lambda_drop and self.training:
            dropped = net.after_dropout(attentive_dropout(shared, c.gamma, c.p))
        return Passes(net.classify(features), features, dropped)

    def terms(self, passes: Passes, labels: Tensor, epoch: int) -> Terms:
        """L_CE and L_drop, and after the warm stage L_sim and L_norm."""
        c = self.config
        terms = super().terms(passes, labels, epoch)
        if passes.dropped is not None:
            terms["l_drop"] = c.lambda_drop, consistency_loss(passes.features, passes.dropped)
        if epoch > c.warm_epochs and (c.lambda_sim or c.lambda_norm):
            l_sim, l_norm = alignment_losses(
                passes.features, self.net.fc.weight, labels, c.tau_fg, c.tau_bg, c.norm_class
            )
            terms |= {"l_sim": (c.lambda_sim, l_sim), "l_norm": (c.lambda_norm, l_norm)}
        return terms


def find(name: str) -> type[CAM]:
    """The class of a method's name. Raises InputError for an unknown one."""
    if name not in METHODS:
        # The only import upwards but that of the drawn data set: a run of a compared system opens everywhere.
        from .reproduce import baselines  # noqa: F401
    if name not in METHODS:
        raise InputError(f"unknown method {name!r}: import the file that defines its class first")
    return METHODS[name]
