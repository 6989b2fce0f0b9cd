"""What a method is: the registry METHODS, the CAM baseline, and Bridge, the paper's method.

A new method is a subclass of CAM (or of another method) with a name, in any file that is imported before
train.main() runs. Change as little as you need:

    preset    the method's hyperparameters; each becomes a flag of train.py. `allowed` gives their ranges.
    network   another network, for example with one more layer
    forward   another forward pass, for `losses` and `predict`
    terms     other losses, from the output of the forward pass
    losses    other images or labels, or more than one forward pass
    predict   another map or other logits

Call `super()` in these functions: two methods then combine by inheritance. Examples: the compared systems in
baselines.py, and the complete file in docs/methods.md. Compute losses and maps in float32 under autocast.
"""

from __future__ import annotations

from math import isinf
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import torch.nn.functional as nnf
from torch import Tensor, nn

from .cam import class_activation_map
from .losses import alignment_losses, consistency_loss, full_precision
from .models import GAPNetwork, Output, build_model
from .optim import NOT_USED
from .utils import InputError

METHODS: dict[str, type[CAM]] = {}  # name -> class; a subclass with a name registers itself


class Losses(NamedTuple):
    """Result of `CAM.losses` for one batch."""

    terms: dict[str, tuple[float, Tensor]]  # name -> (weight, scalar); the loss is the weighted sum
    logits: Tensor  # N x K, for the training accuracy


class CAM:
    """The CAM baseline (Zhou et al., CVPR 2016), base class of all methods: L_CE, and the map w_y . f_u.

    config: every value of the run (`config.json`), including those of `preset`. Raises InputError for a value
    outside `allowed`.
    """

    upsampling: ClassVar[str] = "bicubic"  # of the map to the image size; bicubic is the protocol's
    allowed: ClassVar[dict[str, tuple]] = {}  # hyperparameter -> (minimum, maximum), or the allowed strings
    of_map: ClassVar[tuple[str, ...]] = ()  # hyperparameters of the map alone: evaluate.py can change them

    def __init_subclass__(cls, name: str | None = None) -> None:
        if name is not None:
            METHODS[name] = cls

    def __init__(self, config: SimpleNamespace):
        self.config = config
        for cls in type(self).__mro__:
            for name, allowed in vars(cls).get("allowed", {}).items():
                value = getattr(config, name)
                flag = f"--{name.replace('_', '-')} {value}"
                if isinstance(value, str) and value not in allowed:
                    raise InputError(f"{flag}: must be {' or '.join(allowed)}")
                if not isinstance(value, str) and (not allowed[0] <= value <= allowed[1] or isinf(value)):
                    raise InputError(f"{flag}: must be in [{allowed[0]}, {allowed[1]}]")

    @classmethod
    def preset(cls, dataset: str, arch: str) -> dict[str, tuple[Any, str]]:
        """{name: (value, source)}: the method's hyperparameters, and changes to the data set's preset."""
        return {name: (0.0, NOT_USED) for name in ("lambda_sim", "lambda_norm", "lambda_drop")}

    def network(self, num_classes: int) -> GAPNetwork:
        """A network with initial weights, drawn from torch's default generator."""
        shape = {name: getattr(self.config, name) for name in ("stride", "width", "batch_norm")}
        return build_model(self.config.arch, num_classes, **shape)

    def forward(self, model: nn.Module, images: Tensor) -> Output:
        """The forward pass of `losses` and `predict`: images N x 3 x H x W, normalized -> Output."""
        return model(images)

    def losses(self, model: nn.Module, images: Tensor, labels: Tensor, epoch: int) -> Losses:
        """Losses of one batch. Gradient flows through the terms.

        images N x 3 x H x W, normalized; labels N (int64); epoch counts from 1; model in training mode.
        """
        output = self.forward(model, images)
        return Losses(self.terms(model, output, labels, epoch), output.logits)

    def terms(
        self, model: nn.Module, output: Output, labels: Tensor, epoch: int
    ) -> dict[str, tuple[float, Tensor]]:
        """{name: (weight, scalar)}: the loss terms of a forward pass. Here L_CE alone, with weight 1."""
        return {"l_ce": (1.0, nnf.cross_entropy(full_precision(output.logits), labels))}

    def predict(
        self, model: nn.Module, images: Tensor, labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(logits N x K, maps N x h x w, unbounded) of a network in eval mode.

        images N x 3 x H x W, normalized; labels N (int64): classes of the maps. None: the top-1 predictions.
        """
        output = self.forward(model, images)
        labels = output.logits.argmax(1) if labels is None else labels
        return output.logits, class_activation_map(output.features, model.fc.weight, labels)


METHODS["cam"] = CAM


class Bridge(CAM, name="bridge"):
    """The paper's method (Kim et al., CVPR 2022, main-text section 3; its losses: losses.py).

    Warm stage, the first warm_epochs epochs: L = L_CE + lambda_drop L_drop.
    After it: L = L_CE + lambda_drop L_drop + lambda_sim L_sim + lambda_norm L_norm.
    """

    @classmethod
    def preset(cls, dataset: str, arch: str) -> dict[str, tuple[Any, str]]:
        """Empty: the presets of optim.py are this method's."""
        return {}

    def network(self, num_classes: int) -> GAPNetwork:
        """The CAM baseline's network, with attentive dropout unless lambda_drop is 0."""
        model = super().network(num_classes)
        if self.config.lambda_drop:
            model.gamma, model.p = self.config.gamma, self.config.p
        return model

    def terms(
        self, model: nn.Module, output: Output, labels: Tensor, epoch: int
    ) -> dict[str, tuple[float, Tensor]]:
        """L_CE and L_drop, and after the warm stage L_sim and L_norm."""
        config, terms = self.config, super().terms(model, output, labels, epoch)
        if output.features_dropped is not None:
            terms["l_drop"] = config.lambda_drop, consistency_loss(output.features, output.features_dropped)
        if epoch > config.warm_epochs and (config.lambda_sim or config.lambda_norm):
            thresholds = config.tau_fg, config.tau_bg
            l_sim, l_norm = alignment_losses(
                output.features, model.fc.weight, labels, *thresholds, config.norm_class
            )
            terms |= {"l_sim": (config.lambda_sim, l_sim), "l_norm": (config.lambda_norm, l_norm)}
        return terms
