"""Training methods under one roof: each says how a batch becomes losses and how features become a map.

train.py and evaluate.py know a method by its name in METHODS alone. A new one is a subclass with a name, anywhere:

    class Mine(CAM, name="mine"):
        def losses(self, model, images, labels, epoch): ...

The paper's method is `Bridge`; the others are those it is compared with, all on one backbone, one data path, one evaluator and one set of
learning rates. Where the literature leaves something unsaid, the docstring says "our choice". "The common code" is that of Choe et al.'s
evaluation, "the search" what public scripts give as its tuned values for CUB: (VGG16), (ResNet50).

Losses and maps are computed in float32 under autocast too, those of a float64 network in float64.

    python -m bridge_wsol.baselines --seeds 0 1 2                          every method on the demo, one table
    python -m bridge_wsol.baselines --methods cam adl+ivr bridge bridge:lambda_sim=0 --dataset CUB --arch vgg16
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from .cam import class_activation_map, resize
from .losses import full_precision, minmax

# Whoever needs the registry with every method in it imports it from here.
from .methods import CAM, Bridge, Losses
from .methods import METHODS as METHODS
from .models import VGG16GAP, GAPNetwork, Output
from .optim import OURS, image_size
from .utils import InputError

# Sources of the methods' own values.
AUTHORS = "its authors' code"
COMMON_CODE = "the common code's default"


# ---------------------------------------------------------------------------------------------------- erasing and mixing


class ACoL(CAM, name="acol"):
    """Adversarial complementary learning (Zhang et al., CVPR 2018), as in the common code.

    Two heads A and B of unshared convolutions replace conv6, GAP and fc; B sees the features X with zeros where A's map of the label, min-max
    normalized, is at least acol_delta. L = CE(GAP S_A, y) + CE(GAP S_B, y). No gradient passes through the mask; X is not detached, so both
    heads train the backbone. The map is the element-wise maximum of the two, each min-max normalized; the prediction is A's.
    VGG16 pools 3 x 3 with padding 1, and X is conv5_3 after a max- and a mean-pool, both 3 x 3 at stride 1; ResNet50's X is layer4's output.
    acol_delta: the authors' 0.6, the common code's 0.7, the search's (0.89), (0.57).
    The heads' initialization is the common code's: Xavier's uniform one, biases 0.
    """

    allowed = {"acol_delta": (0, 1)}

    @classmethod
    def preset(cls, dataset: str, arch: str) -> dict[str, tuple[Any, str]]:
        return super().preset(dataset, arch) | {"acol_delta": (0.7, COMMON_CODE)}

    def network(self, num_classes: int) -> GAPNetwork:
        model = super().network(num_classes)
        channels, hidden = take_head_off(model)
        model.pool = nn.Identity()
        if isinstance(model, VGG16GAP):
            for i, layer in enumerate(model.features):
                if isinstance(layer, nn.MaxPool2d):
                    model.features[i] = nn.MaxPool2d(3, stride=2, padding=1)
            model.pool = nn.Sequential(
                nn.MaxPool2d(3, stride=1, padding=1), nn.AvgPool2d(3, stride=1, padding=1)
            )
        model.head_a, model.head_b = (head(channels, [hidden, hidden], num_classes) for _ in range(2))
        return model

    def branches(
        self, model: nn.Module, images: Tensor, labels: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(S_A, S_B, each N x K x H x W; the labels by which X was erased for B).

        Without labels they are A's first predictions.
        """
        x = model.pool(model(images).features)
        s_a = full_precision(model.head_a(x))
        labels = s_a.mean((2, 3)).argmax(1) if labels is None else labels
        erased = minmax(of_class(s_a, labels)) >= self.c.acol_delta
        return s_a, full_precision(model.head_b(x.masked_fill(erased[:, None], 0))), labels

    def losses(self, model: nn.Module, images: Tensor, labels: Tensor, epoch: int) -> Losses:
        logits_a, logits_b = (s.mean((2, 3)) for s in self.branches(model, images, labels)[:2])
        return Losses(
            {
                "l_a": (1.0, nnf.cross_entropy(logits_a, labels)),
                "l_b": (1.0, nnf.cross_entropy(logits_b, labels)),
            },
            logits_a,
        )

    def predict(
        self, model: nn.Module, images: Tensor, labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        s_a, s_b, labels = self.branches(model, images, labels)
        return s_a.mean((2, 3)), torch.maximum(minmax(of_class(s_a, labels)), minmax(of_class(s_b, labels)))


class ADL(CAM, name="adl"):
    """Attention-based dropout layer (Choe & Shim, CVPR 2019): cross-entropy through `attention_based_dropout` at three places; nothing at test.

    adl_position "common": the common code's places, VGG16's second before pool4; "authors": it is after pool4. ResNet50's are the same.
    The search: adl_gamma (0.72), (0.76), adl_rate (0.33), (0.24).
    """

    allowed = {"adl_gamma": (0, 1), "adl_rate": (0, 1), "adl_position": ("common", "authors")}

    @classmethod
    def preset(cls, dataset: str, arch: str) -> dict[str, tuple[Any, str]]:
        own = {
            "adl_gamma": (0.8 if arch == "vgg16" else 0.9, AUTHORS),
            "adl_rate": (0.75, AUTHORS),
            "adl_position": ("common", COMMON_CODE),
        }
        return super().preset(dataset, arch) | own

    def network(self, num_classes: int) -> GAPNetwork:
        model = super().network(num_classes)
        layers, place = backbone(model)
        second = "conv4_3" if self.c.adl_position == "common" else "pool4"
        # Hooks rather than layers: a layer more would shift the names of those behind it.
        for name in (
            ("pool3", second, "conv5_3")
            if isinstance(model, VGG16GAP)
            else ("layer3.0", "layer4.0", "layer4.2")
        ):
            layers[place[name] - 1].register_forward_hook(self.drop)
        return model

    def drop(self, layer: nn.Module, _: Any, output: Tensor) -> Tensor:
        return (
            attention_based_dropout(output, self.c.adl_gamma, self.c.adl_rate) if layer.training else output
        )


def attention_based_dropout(z: Tensor, gamma: float, rate: float) -> Tensor:
    """ADL's layer in training, N x C x H x W -> the same. a = the mean over channels; the drop mask is 1 where a < gamma * max a (per image),
    the importance map sigmoid(a). One draw for the whole batch: z times the mask with probability `rate`, else z times the map; no rescaling.

    Gradient flows to z through the product and the importance map, not through the mask. The draw: torch's default generator.
    """
    a = full_precision(z).mean(1, keepdim=True)  # N x 1 x H x W
    if torch.rand(()) < rate:
        return z * (a < gamma * a.amax((2, 3), keepdim=True))
    return z * a.sigmoid().to(z.dtype)


class EIL(CAM, name="eil"):
    """Erasing integrated learning (Mai et al., CVPR 2020), its single module as released: L = CE(u, y) + eil_lambda CE(e, y).

    u: the logits; e: those of a second pass through the same layers behind the split, its input zero where its channel mean is at least
    eil_gamma of the image's maximum. Both passes train all layers; the mask has no gradient. The map is the unerased pass's CAM.
    VGG16 splits behind pool4. Our choice: ResNet50 splits behind layer3 (not released), and where there is batch norm, the erased pass is
    normalized by its own batch and leaves the running statistics alone: they are the unerased pass's, as the test needs them.
    The best eil_lambda is not published; 1 is the released code's. MEIL's wiring of several modules is not, and not here.
    """

    allowed = {"eil_gamma": (0, 1), "eil_lambda": (0, float("inf"))}

    @classmethod
    def preset(cls, dataset: str, arch: str) -> dict[str, tuple[Any, str]]:
        return super().preset(dataset, arch) | {"eil_gamma": (0.7, AUTHORS), "eil_lambda": (1.0, AUTHORS)}

    def losses(self, model: nn.Module, images: Tensor, labels: Tensor, epoch: int) -> Losses:
        layers, place = backbone(model)
        split = place["pool4" if isinstance(model, VGG16GAP) else "layer3"]
        z = layers[:split](images)
        u = model.fc(layers[split:](z).mean((2, 3)))
        a = full_precision(z).mean(1, keepdim=True)  # N x 1 x H x W
        with kept_statistics(model):
            e = model.fc(
                layers[split:](z.masked_fill(a >= self.c.eil_gamma * a.amax((2, 3), keepdim=True), 0)).mean(
                    (2, 3)
                )
            )
        kept, erased = (nnf.cross_entropy(full_precision(logits), labels) for logits in (u, e))
        return Losses({"l_ce": (1.0, kept), "l_erased": (self.c.eil_lambda, erased)}, u)


@contextmanager
def kept_statistics(model: nn.Module) -> Iterator[None]:
    """In the block, batch norm in training mode normalizes as ever but does not move its running statistics."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


class CutMix(CAM, name="cutmix"):
    """CutMix (Yun et al., ICCV 2019): `mix` with probability cutmix_p a batch, then lambda L(y) + (1 - lambda) L(y of what was pasted).

    L is whatever losses the class behind it in the method's order has, cross-entropy here; one forward pass serves both labels.
    The search: cutmix_beta (0.85), (1.35), cutmix_p (0.79), (0.24 or 0.34: its sources disagree).
    """

    allowed = {"cutmix_beta": (0.01, 100), "cutmix_p": (0, 1)}

    @classmethod
    def preset(cls, dataset: str, arch: str) -> dict[str, tuple[Any, str]]:
        return super().preset(dataset, arch) | {"cutmix_beta": (1.0, AUTHORS), "cutmix_p": (1.0, AUTHORS)}

    def losses(self, model: nn.Module, images: Tensor, labels: Tensor, epoch: int) -> Losses:
        if torch.rand(()) >= self.c.cutmix_p:
            return super().losses(model, images, labels, epoch)
        images, other, lam = mix(images, self.c.cutmix_beta)
        output = self.forward(model, images)
        own, pasted = (self.terms(model, output, y, epoch) for y in (labels, labels[other]))
        return Losses(
            {
                name: (weight, lam * value + (1 - lam) * pasted[name][1])
                for name, (weight, value) in own.items()
            },
            output.logits,
        )


def mix(images: Tensor, beta: float) -> tuple[Tensor, Tensor, float]:
    """(images N x C x H x W, each with a rectangle of another pasted in; the others' indices N; lambda, the share of its own pixels).

    lambda ~ Beta(beta, beta); the rectangle, floor(sqrt(1 - lambda)) of width and height about a uniform centre, is clipped to the image and
    lambda computed anew; one rectangle and one permutation for the batch. Random numbers: torch's default generator.
    """
    height, width = images.shape[2:]
    side = (1 - float(torch.distributions.Beta(beta, beta).sample())) ** 0.5
    other = torch.randperm(len(images)).to(images.device)
    spans = []
    for n in (height, width):
        start = int(torch.randint(n, ())) - int(n * side) // 2
        spans.append(slice(max(start, 0), min(start + int(n * side), n)))
    rows, columns = spans
    mixed = images.clone()
    mixed[:, :, rows, columns] = images[other][:, :, rows, columns]
    return mixed, other, 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)


class BridgeCutMix(CutMix, Bridge, name="bridge+cutmix"):
    """Both: CutMix's images, and each of the bridging losses weighted over the two labels (our choice: neither paper has it)."""


class HaS(CAM, name="has"):
    """Hide-and-seek (Singh & Lee, ICCV 2017): cross-entropy on images with hidden cells (`hide`), the plain CAM at test.

    has_cells: sides in pixels, comma-separated, of which each image draws one; 0 hides nothing. The authors' are of 224-pixel images and
    scale with the images' size here (our choice). The common code has one for all, 4 by default; the search: (65), (120), has_p (0.47), (0.66).
    """

    allowed = {"has_p": (0, 1)}

    @classmethod
    def preset(cls, dataset: str, arch: str) -> dict[str, tuple[Any, str]]:
        cells = ",".join(str(round(side * image_size(dataset) / 224)) for side in (0, 16, 32, 44, 56))
        return super().preset(dataset, arch) | {"has_cells": (cells, AUTHORS), "has_p": (0.5, AUTHORS)}

    def __init__(self, c: SimpleNamespace):
        super().__init__(c)
        try:
            self.sides = [int(side) for side in c.has_cells.split(",")]
        except ValueError:
            self.sides = []
        if not self.sides or min(self.sides) < 0:
            raise InputError(
                f"--has-cells {c.has_cells}: must be sides in pixels, comma-separated, each at least 0"
            )

    def losses(self, model: nn.Module, images: Tensor, labels: Tensor, epoch: int) -> Losses:
        return super().losses(model, hide(images, self.sides, self.c.has_p), labels, epoch)


def hide(images: Tensor, sides: list[int], p: float) -> Tensor:
    """Each image (N x C x H x W, normalized) in square cells of a side drawn from `sides`, the last ones cut off by the border; each cell
    becomes zero, the mean colour, with probability p. Random numbers: torch's default generator.
    """
    height, width = images.shape[2:]
    hidden = torch.zeros(len(images), height, width, dtype=torch.bool)
    for image in hidden:
        side = sides[int(torch.randint(len(sides), ()))]
        if side:
            cells = torch.rand(-(-height // side), -(-width // side)) < p
            image |= cells.repeat_interleave(side, 0).repeat_interleave(side, 1)[:height, :width]
    return images.masked_fill(hidden[:, None].to(images.device), 0)


# ------------------------------------------------------------------------------------------------ pooling and distributions


class PaS(CAM, name="pas"):
    """Rethinking class activation mapping (Bae et al., ECCV 2020): three parts, each with its switch.

    Thresholded average pooling (`thresholded_average`) instead of GAP, in training and prediction: pas_theta; below 0 every location is kept,
    which is GAP, while 0 is the mean over the positive ones. Negative weights clamped to 0 in the map, not in the prediction: pas_nwc on, off.
    Percentile as a standard for thresholding: `evaluate.py --normalize pas` (train.py's own evaluation is the protocol's min-max).
    Our choice: pas_theta on ResNet50, where nothing was released, is VGG16's, on layer4's output.
    """

    allowed = {"pas_theta": (-1, 1), "pas_nwc": ("on", "off")}

    @classmethod
    def preset(cls, dataset: str, arch: str) -> dict[str, tuple[Any, str]]:
        own = {"pas_theta": (0.1, AUTHORS if arch == "vgg16" else OURS), "pas_nwc": ("on", AUTHORS)}
        return super().preset(dataset, arch) | own

    def forward(self, model: nn.Module, images: Tensor) -> Output:
        output = super().forward(model, images)
        return output._replace(logits=model.fc(thresholded_average(output.features, self.c.pas_theta)))

    def predict(
        self, model: nn.Module, images: Tensor, labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        output = self.forward(model, images)
        labels = output.logits.argmax(1) if labels is None else labels
        weight = model.fc.weight.clamp(min=0) if self.c.pas_nwc == "on" else model.fc.weight
        return output.logits, class_activation_map(output.features, weight, labels)


def thresholded_average(features: Tensor, theta: float) -> Tensor:
    """Of each channel the mean over the locations above theta * its maximum, 0 where there is none.

    features N x C x H x W, >= 0 -> N x C.

    Gradient flows to the kept values; threshold and count are constants for it.
    """
    features = full_precision(features)
    keep = features > theta * features.amax((2, 3), keepdim=True)
    return torch.where(keep, features, 0).sum((2, 3)) / keep.sum((2, 3)).clamp(min=1)


class CALM(CAM, name="calm"):
    """Class activation latent mapping (Kim et al., ICCV 2021): the location z of the cue is a latent variable.

    p(y|x,z): the softmax over classes of the linear layer at each location; p(z|x): softplus of a 1 x 1 convolution over its sum.
    p(y|x) sums the joint p(y|x,z) p(z|x) over z; its log serves as logits, the joint of the label as map.
    calm_loss "ml": -log p(y|x). "em": the responsibilities p(z|x,y), detached, weigh -log of the joint. (The authors classify better with
    em on CUB, alike elsewhere.)
    calm_normalizer "detached": the sum under p(z|x) is a constant for the gradient, as in the released code, so nothing pulls the location head
    down. Our choice is "exact": detached, the features of the demo's VGG16 (no batch norm) grew 25-fold in four epochs and classified no longer.
    Our choice too: softplus, where code (ReLU, which can be 0/0) and paper differ; the joint among the maps the code offers: the paper's localization
    was not released. The joint is heavy-tailed, and even levels of it miss the object's extent: `evaluate.py --normalize log` has the code's log-spaced ones. Bilinear upsampling is the released code's.
    """

    upsampling = "bilinear"
    allowed = {"calm_loss": ("em", "ml"), "calm_normalizer": ("exact", "detached")}

    @classmethod
    def preset(cls, dataset: str, arch: str) -> dict[str, tuple[Any, str]]:
        return super().preset(dataset, arch) | {"calm_loss": ("em", OURS), "calm_normalizer": ("exact", OURS)}

    def network(self, num_classes: int) -> GAPNetwork:
        model = super().network(num_classes)
        model.location = nn.Conv2d(model.fc.in_features, 1, 1)
        nn.init.normal_(model.location.weight, std=0.01)
        nn.init.zeros_(model.location.bias)
        return model

    def log_joint(self, model: nn.Module, images: Tensor) -> Tensor:
        """log p(y,z|x), N x K x H x W."""
        features = model(images).features
        classes = nnf.conv2d(features, model.fc.weight[:, :, None, None], model.fc.bias)
        s = nnf.softplus(full_precision(model.location(features)))  # N x 1 x H x W
        total = s.sum((2, 3), keepdim=True)
        p_z = s / (total.detach() if self.c.calm_normalizer == "detached" else total)
        return full_precision(classes).log_softmax(1) + torch.where(p_z < 1e-8, p_z + 1e-8, p_z).log()

    def losses(self, model: nn.Module, images: Tensor, labels: Tensor, epoch: int) -> Losses:
        log_joint = self.log_joint(model, images)
        of_label = of_class(log_joint, labels)
        if self.c.calm_loss == "ml":
            loss = -of_label.logsumexp((1, 2)).mean()
        else:
            joint = of_label.detach().exp()
            responsibilities = joint / (joint.sum((1, 2), keepdim=True) + 1e-10)
            loss = -(responsibilities * of_label).sum((1, 2)).mean()
        return Losses({f"l_{self.c.calm_loss}": (1.0, loss)}, log_joint.logsumexp((2, 3)))

    def predict(
        self, model: nn.Module, images: Tensor, labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        log_joint = self.log_joint(model, images)
        logits = log_joint.logsumexp((2, 3))
        return logits, of_class(log_joint, logits.argmax(1) if labels is None else labels).exp()


class SPG(CAM, name="spg"):
    """Self-produced guidance (Zhang et al., ECCV 2018), as in the common code: L = CE + three binary cross-entropies with `seeds`.

    The classifier's map S (VGG16: two 3 x 3 convolutions and a 1 x 1 in place of conv6 and fc; ResNet50: a 1 x 1 on layer4) is averaged to
    logits, and is the map. Single-channel branches, all upsampled bilinearly to the image: B1 on pool4 /
    layer3's first block, B2 on conv5_3 / layer3, C on the layer before S.
    B2 learns from seeds of minmax(S_y) by (spg_h1, spg_l1), B1 from those of sigmoid(B2) by (h2, l2),
    C from those of the mean of sigmoid(B1) and sigmoid(B2) by (h3, l3); seeds are detached, pixels that are none do not count.
    VGG16's pool4, and no other, is 3 x 3 with padding 1. The new convolutions' initialization is the common
    code's: Xavier's uniform one, biases 0.
    The search: (.29,.23)(.03,.02)(.82,.59), (.41,.35)(.24,.21)(.12,.08); the authors' first pair is (.7,.05).
    """

    allowed = {f"spg_{end}{i}": (0, 1) for i in (1, 2, 3) for end in "hl"}

    @classmethod
    def preset(cls, dataset: str, arch: str) -> dict[str, tuple[Any, str]]:
        pairs = enumerate(((0.7, 0.01), (0.5, 0.05), (0.7, 0.1)), 1)
        own = {f"spg_{end}{i}": (value, COMMON_CODE) for i, pair in pairs for end, value in zip("hl", pair)}
        return super().preset(dataset, arch) | own

    def network(self, num_classes: int) -> GAPNetwork:
        model = super().network(num_classes)
        vgg = isinstance(model, VGG16GAP)
        channels, _ = take_head_off(model)
        if vgg and isinstance(model.features[model.dropout_at], nn.MaxPool2d):  # stride 8 has no pool4
            model.features[model.dropout_at] = nn.MaxPool2d(3, stride=2, padding=1)
        hidden, inner = (channels, channels) if vgg else (512, 1024)  # of the branches; in front of B1 and B2
        model.a3 = head(channels, [hidden, hidden]) if vgg else nn.Identity()
        model.a4 = head(channels, [], num_classes)
        model.b1, model.b2 = head(inner, [hidden]), head(inner, [hidden])
        model.b = head(hidden, [hidden], 1)
        model.c = head(channels, [hidden], 1)
        return model

    def losses(self, model: nn.Module, images: Tensor, labels: Tensor, epoch: int) -> Losses:
        c, (layers, place) = self.c, backbone(model)
        names = ("pool4", "conv5_3") if isinstance(model, VGG16GAP) else ("layer3.0", "layer3")
        first, second = (place[name] for name in names)
        a1 = layers[:first](images)
        a2 = layers[first:second](a1)
        a3 = model.a3(layers[second:](a2))
        s = full_precision(model.a4(a3))
        logits = s.mean((2, 3))

        def full(x: Tensor) -> Tensor:
            return resize(x, images.shape[-1], "bilinear")

        s_y, b1, b2, of_c = (
            full(of_class(s, labels)),
            *(full(x[:, 0]) for x in (model.b(model.b1(a1)), model.b(model.b2(a2)), model.c(a3))),
        )
        terms = {
            "l_ce": nnf.cross_entropy(logits, labels),
            "l_b2": seed_loss(b2, seeds(minmax(s_y), c.spg_h1, c.spg_l1)),
            "l_b1": seed_loss(b1, seeds(b2.sigmoid(), c.spg_h2, c.spg_l2)),
            "l_c": seed_loss(of_c, seeds((b1.sigmoid() + b2.sigmoid()) / 2, c.spg_h3, c.spg_l3)),
        }
        return Losses({name: (1.0, value) for name, value in terms.items()}, logits)

    def predict(
        self, model: nn.Module, images: Tensor, labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        s = full_precision(model.a4(model.a3(model(images).features)))
        logits = s.mean((2, 3))
        return logits, of_class(s, logits.argmax(1) if labels is None else labels)


def seeds(maps: Tensor, high: float, low: float) -> Tensor:
    """SPG's pixels to learn from, maps N x H x W in [0, 1] -> the same, without gradient: 1 object, 0 background, -1 neither.

    Object is what is above `high`, or above 0.7 of the image's maximum where fewer than 30 pixels are; background what is below `low`, in any case.
    """
    few = (maps > high).sum((1, 2)) < 30
    high = torch.where(few, 0.7 * maps.amax((1, 2)), high)[:, None, None]
    # In the maps' type: PyTorch computes a binary cross-entropy in its target's.
    return torch.where(maps < low, 0.0, torch.where(maps > high, 1.0, -1.0)).to(maps.dtype)


def seed_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Binary cross-entropy of N x H x W logits, a mean over the pixels whose target is not -1; 0 where there is none."""
    count = target >= 0
    losses = nnf.binary_cross_entropy_with_logits(logits, target.clamp(min=0), reduction="none")
    return torch.where(count, losses, 0).sum() / count.sum().clamp(min=1)


# --------------------------------------------------------------------------------------------------------- their networks


def backbone(model: GAPNetwork) -> tuple[nn.Sequential, dict[str, int]]:
    """(the layers that make the last feature map, in order: the model's own; how many of them come before each named place)."""
    if isinstance(model, VGG16GAP):
        layers, pool4 = [*model.features, model.conv6], model.dropout_at
        pool3 = max(i for i in range(pool4) if isinstance(layers[i], nn.MaxPool2d))
        return nn.Sequential(*layers), {
            "pool3": pool3 + 1,
            "conv4_3": pool4,
            "pool4": pool4 + 1,
            "conv5_3": len(model.features),
        }
    layers, place = [model.conv1, model.bn1, model.relu, model.maxpool], {}
    for name in ("layer1", "layer2", "layer3", "layer4"):
        for i, block in enumerate(getattr(model, name)):
            layers.append(block)
            place[f"{name}.{i}"] = place[name] = len(layers)
    return nn.Sequential(*layers), place


def take_head_off(model: GAPNetwork) -> tuple[int, int]:
    """Leaves the pretrained layers and no conv6 or fc; returns their channels and those of a convolution with 1024 at full width."""
    vgg = isinstance(model, VGG16GAP)
    channels = (
        (model.conv6[0].in_channels, model.conv6[0].out_channels) if vgg else (model.fc.in_features, 1024)
    )
    model.fc = nn.Identity()
    if vgg:
        model.conv6 = nn.Identity()
    return channels


def head(channels: int, hidden: list[int], out: int | None = None) -> nn.Sequential:
    """A 3 x 3 convolution and ReLU for each of `hidden`, and a 1 x 1 to `out` channels.

    Xavier's uniform initialization, biases 0: the common code's for ACoL and SPG.
    """
    layers: list[nn.Module] = []
    for c in hidden:
        layers += [nn.Conv2d(channels, c, 3, padding=1), nn.ReLU(inplace=True)]
        channels = c
    if out is not None:
        layers.append(nn.Conv2d(channels, out, 1))
    for layer in layers[::2]:
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


def of_class(maps: Tensor, labels: Tensor) -> Tensor:
    """N x K x H x W, N -> N x H x W: each image's map of its label."""
    return maps[torch.arange(len(maps), device=maps.device), labels]
