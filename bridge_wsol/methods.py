"""What a method is: the registry, the CAM baseline, and the paper's method with its total loss."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import torch.nn.functional as nnf
from torch import Tensor, nn

from .cam import class_activation_map
from .losses import alignment_losses, consistency_loss, full_precision
from .models import GAPNetwork, Output, build_model
from .utils import InputError

METHODS: dict[str, type[CAM]] = {}


class Losses(NamedTuple):
    """What a method makes of a batch."""

    terms: dict[str, tuple[float, Tensor]]  # name -> (weight, scalar); the loss is the weighted sum
    logits: Tensor  # N x K, for the training accuracy


class CAM:
    """The vanilla classifier (Zhou et al., CVPR 2016), and what other methods start from: cross-entropy; the map is w_y . f_u.

    c: the run's values (`config.json`); those of `preset` are among them. Raises InputError for one that `allowed` does not have.
    """

    upsampling: ClassVar[str] = "bicubic"  # of the map to the image's size: the protocol's
    allowed: ClassVar[dict[str, tuple]] = {}  # own value -> (lowest, highest), or the strings it may be

    def __init_subclass__(cls, name: str | None = None) -> None:
        if name is not None:
            METHODS[name] = cls

    def __init__(self, c: SimpleNamespace):
        self.c = c
        for cls in type(self).__mro__:
            for name, allowed in vars(cls).get("allowed", {}).items():
                value = getattr(c, name)
                if isinstance(value, str) and value not in allowed:
                    raise InputError(f"--{name.replace('_', '-')} {value}: must be {' or '.join(allowed)}")
                if not isinstance(value, str) and not allowed[0] <= value <= allowed[1]:
                    raise InputError(
                        f"--{name.replace('_', '-')} {value}: must be in [{allowed[0]}, {allowed[1]}]"
                    )

    @classmethod
    def preset(cls, dataset: str, arch: str) -> dict[str, tuple[Any, str]]:
        """{name: (value, source)}: the method's own hyperparameters, each a flag of train.py, and values of the data set's preset it sets."""
        return {name: (0.0, "not this method's") for name in ("lambda_sim", "lambda_norm", "lambda_drop")}

    def network(self, num_classes: int) -> GAPNetwork:
        """A network with fresh weights (torch's default generator)."""
        c = self.c
        return build_model(c.arch, num_classes, stride=c.stride, width=c.width, batch_norm=c.batch_norm)

    def forward(self, model: nn.Module, images: Tensor) -> Output:
        """The pass that `losses` and `predict` share."""
        return model(images)

    def losses(self, model: nn.Module, images: Tensor, labels: Tensor, epoch: int) -> Losses:
        """images N x 3 x H x W normalized, labels N int64; epoch counts from 1. Gradient flows through the terms."""
        output = self.forward(model, images)
        return Losses(self.terms(model, output, labels, epoch), output.logits)

    def terms(
        self, model: nn.Module, output: Output, labels: Tensor, epoch: int
    ) -> dict[str, tuple[float, Tensor]]:
        return {"l_ce": (1.0, nnf.cross_entropy(full_precision(output.logits), labels))}

    def predict(
        self, model: nn.Module, images: Tensor, labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(logits N x K, maps N x h x w, unbounded) of a network in eval mode.

        The maps are those of `labels`, or of the first predictions.
        """
        output = self.forward(model, images)
        labels = output.logits.argmax(1) if labels is None else labels
        return output.logits, class_activation_map(output.features, model.fc.weight, labels)


METHODS["cam"] = CAM


class Bridge(CAM, name="bridge"):
    """The paper's method (Kim et al., CVPR 2022, section 3; the terms: `losses.py`).

    Warm stage, the first warm_epochs: L = L_CE + lambda_drop L_drop; after it L = ... + lambda_sim L_sim + lambda_norm L_norm.
    """

    @classmethod
    def preset(cls, dataset: str, arch: str) -> dict[str, tuple[Any, str]]:
        return {}

    def network(self, num_classes: int) -> GAPNetwork:
        model = super().network(num_classes)
        if self.c.lambda_drop:
            model.gamma, model.p = self.c.gamma, self.c.p
        return model

    def terms(
        self, model: nn.Module, output: Output, labels: Tensor, epoch: int
    ) -> dict[str, tuple[float, Tensor]]:
        c, terms = self.c, super().terms(model, output, labels, epoch)
        if output.features_dropped is not None:
            terms["l_drop"] = c.lambda_drop, consistency_loss(output.features, output.features_dropped)
        if epoch > c.warm_epochs and (c.lambda_sim or c.lambda_norm):
            l_sim, l_norm = alignment_losses(
                output.features, model.fc.weight, labels, c.tau_fg, c.tau_bg, c.norm_class
            )
            terms |= {"l_sim": (c.lambda_sim, l_sim), "l_norm": (c.lambda_norm, l_norm)}
        return terms
