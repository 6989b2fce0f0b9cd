"""The systems that the paper's method is compared with, one class per system.

All use the same backbones, data pipeline, evaluation and learning rates. The CAM baseline is in methods.py,
the IVR normalization in cam.py. Importing this file registers the methods. Sources in the docstrings:

    authors       the released code of the method's authors
    common code   the evaluation code of Choe et al. (CVPR 2020)
    search        tuned values for CUB in public scripts: (VGG16), (ResNet50)
    our choice    no source states the value
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from ..cam import class_activation_map, resize
from ..config import AUTHORS, COMMON_CODE, OURS
from ..losses import full_precision, minmax
from ..methods import CAM, Passes, Terms
from ..models import VGG16GAP, GAPNetwork
from ..utils import Value

SHARE = "[0, 1]"
BIRDS = ("CUB", "CUB10", "demo")  # data sets with classes of one kind, for CALM's map


# ---- Erasing and mixing


class ACoL(CAM, name="acol"):
    """ACoL, adversarial complementary learning (Zhang et al., CVPR 2018), as in the common code.

    Two heads A and B with separate convolutions (see `head`) replace conv6, GAP and fc. B sees the features X
    with zeros where the min-max normalized map of A for the label is at least acol_delta. The mask has no
    gradient; both heads train the backbone. L = CE(GAP S_A, y) + CE(GAP S_B, y). The logits are A's. The map
    is the element-wise maximum of the maps of A and B, each min-max normalized.

    VGG16: all pools are 3 x 3 with padding 1. X is conv5_3 after a max pool and an average pool, both 3 x 3
    with stride 1. ResNet50: X is the output of layer4.

    acol_delta: 0.7 (common code, the default), 0.6 (authors), (0.89), (0.57) (search)
    """

    values = {"acol_delta": Value(float, 0.7, "erases where A's map is at least this", SHARE, COMMON_CODE)}

    def network(self, num_classes: int) -> GAPNetwork:
        """The CAM baseline's network with heads A and B in place of conv6, GAP and fc."""
        net = super().network(num_classes)
        channels, hidden = remove_head(net)
        net.pool = nn.Identity()
        if isinstance(net, VGG16GAP):
            for i, layer in enumerate(net.features):
                if isinstance(layer, nn.MaxPool2d):
                    net.features[i] = nn.MaxPool2d(3, 2, padding=1)
            net.pool = nn.Sequential(nn.MaxPool2d(3, 1, padding=1), nn.AvgPool2d(3, 1, padding=1))
        net.head_a, net.head_b = (head(channels, [hidden, hidden], num_classes) for _ in range(2))
        return net

    def passes(self, images: Tensor) -> Passes:
        """Logits of A, and the features without the pools in front of the heads."""
        features = self.net.after_dropout(self.net.before_dropout(images))
        return Passes(full_precision(self.net.head_a(self.net.pool(features))).mean((2, 3)), features)

    def branches(self, images: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """(S_A and S_B, N x K x H x W; labels N, by default A's top-1: A's map of them masks X for B)."""
        x = self.net.pool(self.net.after_dropout(self.net.before_dropout(images)))
        s_a = full_precision(self.net.head_a(x))
        labels = s_a.mean((2, 3)).argmax(1) if labels is None else labels
        erased = minmax(of_class(s_a, labels)) >= self.config.acol_delta
        return s_a, full_precision(self.net.head_b(torch.where(erased[:, None], 0, x))), labels

    def forward(self, images: Tensor, labels: Tensor, epoch: int) -> tuple[Terms, Tensor]:
        """Cross-entropy of each head. The logits are those of A."""
        logits_a, logits_b = (s.mean((2, 3)) for s in self.branches(images, labels)[:2])
        loss_a, loss_b = (nnf.cross_entropy(logits, labels) for logits in (logits_a, logits_b))
        return {"l_a": (1.0, loss_a), "l_b": (1.0, loss_b)}, logits_a

    def predict(self, images: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits of A; maps: the element-wise maximum of both heads, in [0, 1]."""
        s_a, s_b, labels = self.branches(images, labels)
        return s_a.mean((2, 3)), torch.maximum(minmax(of_class(s_a, labels)), minmax(of_class(s_b, labels)))


class ADL(CAM, name="adl"):
    """ADL, attention-based dropout layer (Choe & Shim, CVPR 2019): `attention_based_dropout` at three places.

    The loss is cross-entropy. In eval mode the layers do nothing. VGG16's places are the common code's; the
    authors have pool4 in place of conv4_3.

    adl_gamma, adl_rate: (0.72), (0.76) and (0.33), (0.24) (search)
    """

    values = {
        "adl_gamma": Value(
            float,
            lambda dataset, arch: 0.8 if arch == "vgg16" else 0.9,
            "drops above this share of the maximum (vgg16 0.8, resnet50 0.9)",
            SHARE,
            AUTHORS,
        ),
        "adl_rate": Value(float, 0.75, "probability of the drop mask, else importance map", SHARE, AUTHORS),
    }

    def network(self, num_classes: int) -> GAPNetwork:
        """The CAM baseline's network with a dropout hook at each of the three places."""
        net = super().network(num_classes)
        parts = split(net, ("pool3", "conv4_3", "conv5_3"), ("layer3.0", "layer4.0", "layer4.2"))
        # Hooks, not layers: an inserted layer would rename the parameters of all layers after it.
        for part in parts[:-1]:
            part[-1].register_forward_hook(self.drop)
        return net

    def drop(self, layer: nn.Module, _: Any, output: Tensor) -> Tensor:
        """Forward hook: `attention_based_dropout` of the layer's output, in training mode only."""
        c = self.config
        return attention_based_dropout(output, c.adl_gamma, c.adl_rate) if layer.training else output


def attention_based_dropout(z: Tensor, gamma: float, rate: float) -> Tensor:
    """The layer of ADL in training mode (Choe & Shim): z N x C x H x W -> the same shape.

    a is the mean over channels. One draw per call, from torch's default generator: with probability `rate`
    the whole batch is multiplied by the drop mask, 1 where a < gamma * max a (per image), else 0; otherwise
    by the importance map sigmoid(a). Nothing is rescaled. gamma and rate in [0, 1].

    Gradient flows to z through the product and the importance map; the mask has none.
    """
    a = full_precision(z).mean(1, keepdim=True)  # N x 1 x H x W
    if torch.rand(()) < rate:
        return z * (a < gamma * a.amax((2, 3), keepdim=True))
    return z * a.sigmoid().to(z.dtype)


class EIL(CAM, name="eil"):
    """EIL, erasing integrated learning (Mai et al., CVPR 2020): L = CE(u, y) + eil_lambda CE(e, y).

    u are the logits, e those of a second pass through the layers after the split. Its input is zero where the
    channel mean is at least eil_gamma times the image's maximum. Both passes train all layers; the mask has
    no gradient. The map is the CAM of the first pass.

    VGG16 splits after pool4 (authors). Our choice: ResNet50 splits after layer3 (no released code), and batch
    norm uses the batch statistics of the erased pass without updating the running statistics. One module, as
    in the released code; MEIL, with several modules, is not implemented.

    eil_lambda: 1 (authors); the best value is not published
    """

    values = {
        "eil_gamma": Value(float, 0.7, "erases from this share of the maximum on", SHARE, AUTHORS),
        "eil_lambda": Value(float, 1.0, "weight of the erased pass's loss", "[0, inf)", AUTHORS),
    }

    def passes(self, images: Tensor) -> Passes:
        """The clean pass; extra: f of the erased pass, None in eval mode."""
        first, second = split(self.net, ("pool4",), ("layer3",))
        z = first(images)
        features, erased = second(z), None
        if self.training:
            a = full_precision(z).mean(1, keepdim=True)  # N x 1 x H x W
            strong = a >= self.config.eil_gamma * a.amax((2, 3), keepdim=True)
            with frozen_statistics(self.net):
                erased = second(torch.where(strong, 0, z))
        return Passes(self.net.classify(features), features, extra=erased)

    def terms(self, passes: Passes, labels: Tensor, epoch: int) -> Terms:
        """Cross-entropy of the clean and of the erased pass."""
        erased = nnf.cross_entropy(full_precision(self.net.classify(passes.extra)), labels)
        return super().terms(passes, labels, epoch) | {"l_erased": (self.config.eil_lambda, erased)}


@contextmanager
def frozen_statistics(net: nn.Module) -> Iterator[None]:
    """Within the block, batch norm in training mode does not update its running statistics (for EIL)."""
    norms = [module for module in net.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


class CutMix(CAM, name="cutmix"):
    """CutMix (Yun et al., ICCV 2019): pastes a rectangle of another image into each image (see `mix`).

    With probability cutmix_p per batch, L = lambda L(y) + (1 - lambda) L(y of the pasted image); one forward
    pass serves both labels. L is each loss term of the next class in the method resolution order:
    cross-entropy here, other losses for a class that also inherits from another method.

    cutmix_beta: (0.85), (1.35); cutmix_p: (0.79), (0.24 or 0.34: two sources disagree) (search)
    """

    values = {
        "cutmix_beta": Value(float, 1.0, "lambda ~ Beta(beta, beta)", "[0.01, 100]", AUTHORS),
        "cutmix_p": Value(float, 1.0, "probability to mix a batch", SHARE, AUTHORS),
    }

    def forward(self, images: Tensor, labels: Tensor, epoch: int) -> tuple[Terms, Tensor]:
        """Each loss term of the mixed images, weighted over the two labels by lambda."""
        if torch.rand(()) >= self.config.cutmix_p:
            return super().forward(images, labels, epoch)
        images, other, lam = mix(images, self.config.cutmix_beta)
        passes = self.passes(images)
        own, pasted = (self.terms(passes, y, epoch) for y in (labels, labels[other]))
        mixed = {name: (w, lam * value + (1 - lam) * pasted[name][1]) for name, (w, value) in own.items()}
        return mixed, passes.logits


def mix(images: Tensor, beta: float) -> tuple[Tensor, Tensor, float]:
    """CutMix of a batch: images N x C x H x W -> (mixed images, indices N of the pasted images, lambda).

    First lambda ~ Beta(beta, beta). The rectangle has sqrt(1 - lambda) of height and width, rounded down, and
    a uniformly drawn centre. It is clipped to the image, and lambda becomes the share of pixels, in [0, 1],
    that an image keeps. One rectangle and one permutation per batch, from torch's default generator.
    """
    height, width = images.shape[2:]
    side = (1 - float(torch.distributions.Beta(beta, beta).sample())) ** 0.5
    other = torch.randperm(len(images)).to(images.device, non_blocking=True)
    spans = []
    for n in (height, width):
        start = int(torch.randint(n, ())) - int(n * side) // 2
        spans.append(slice(max(start, 0), min(start + int(n * side), n)))
    rows, columns = spans
    mixed, pasted = images.clone(), images[other][..., rows, columns]
    mixed[..., rows, columns] = pasted
    return mixed, other, 1 - pasted[0, 0].numel() / (height * width)


def cell_sides(text: str) -> list[int]:
    """The flag of `has_cells`: sides in pixels, comma-separated. Raises ValueError for a negative side."""
    sides = [int(side) for side in text.split(",")]
    if min(sides) < 0:
        raise ValueError("a negative side")
    return sides


class HaS(CAM, name="has"):
    """HaS, hide-and-seek (Singh & Lee, ICCV 2017): cross-entropy on images with hidden cells (see `hide`).

    The authors' sides are for 224-pixel images. The common code has one side for all images, by default 4.

    has_cells, has_p: (65), (120) and (0.47), (0.66) (search)
    """

    values = {
        "has_cells": Value(cell_sides, [0, 16, 32, 44, 56], "sides of the cells in pixels", None, AUTHORS),
        "has_p": Value(float, 0.5, "probability to hide a cell", SHARE, AUTHORS),
    }

    def forward(self, images: Tensor, labels: Tensor, epoch: int) -> tuple[Terms, Tensor]:
        """The losses of the images with hidden cells."""
        return super().forward(hide(images, self.config.has_cells, self.config.has_p), labels, epoch)


def hide(images: Tensor, sides: list[int], p: float) -> Tensor:
    """HaS of a batch: images N x C x H x W, normalized -> the same shape with hidden cells.

    Each image draws a side in pixels from `sides` and is divided into square cells, cut off at the image
    border. Each cell becomes zero, the mean colour, with probability p; side 0 hides nothing. Random numbers
    come from torch's default generator.
    """
    height, width = images.shape[2:]
    hidden = torch.zeros(len(images), height, width, dtype=torch.bool)
    for image in hidden:
        side = sides[int(torch.randint(len(sides), ()))]
        if side:
            cells = torch.rand(-(-height // side), -(-width // side)) < p
            image |= cells.repeat_interleave(side, 0).repeat_interleave(side, 1)[:height, :width]
    return torch.where(hidden[:, None].to(images.device, non_blocking=True), 0, images)


# ---- Pooling and distributions


class PaS(CAM, name="pas"):
    """PaS, rethinking class activation mapping (Bae et al., ECCV 2020). Its three parts are separate options.

    pas_theta: `thresholded_average` in place of GAP, in training and prediction. A negative value is GAP; 0
        is the mean over positive locations. The default for ResNet50 is that of VGG16 (our choice).
    pas_nwc: "on" clamps negative class weights to 0 in the map. The logits use all weights.
    A percentile as threshold is `evaluate.py --normalize pas`; train.py evaluates with min-max.
    """

    values = {
        "pas_theta": Value(
            float, 0.1, "pools above this share of the maximum; < 0: GAP", "[-1, 1]", f"{AUTHORS}, for VGG16"
        ),
        "pas_nwc": Value(str, "on", "non-negative class weights in the map", ("on", "off"), AUTHORS),
    }
    map_options = ("pas_nwc",)

    def passes(self, images: Tensor) -> Passes:
        """The passes of the base class, with logits from thresholded average pooling."""
        passes = super().passes(images)
        pooled = thresholded_average(passes.features, self.config.pas_theta)
        return passes._replace(logits=self.net.fc(pooled))

    def predict(self, images: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits of `passes`; maps: CAM, with non-negative class weights if pas_nwc is "on"."""
        passes = self.passes(images)
        labels = passes.logits.argmax(1) if labels is None else labels
        weight = self.net.fc.weight.clamp(min=0) if self.config.pas_nwc == "on" else self.net.fc.weight
        return passes.logits, class_activation_map(passes.features, weight, labels)


def thresholded_average(features: Tensor, theta: float) -> Tensor:
    """Thresholded average pooling of PaS: features N x C x H x W, >= 0 -> N x C.

    The mean of a channel over the locations above theta times its maximum; 0 if there is none. theta is in
    [-1, 1]. Gradient flows to these locations; threshold and count are constants for the gradient.
    """
    features = full_precision(features)
    keep = features > theta * features.amax((2, 3), keepdim=True)
    return torch.where(keep, features, 0).sum((2, 3)) / keep.sum((2, 3)).clamp(min=1)


class CALM(CAM, name="calm"):
    """CALM, class activation latent mapping (Kim et al., ICCV 2021): the location z is a latent variable.

    p(y|x,z) is the softmax over classes of the linear layer at a location. p(z|x) is the softplus of a 1 x 1
    convolution, divided by its sum over locations. The joint is p(y,z|x) = p(y|x,z) p(z|x). The logits are
    log p(y|x), the log of its sum over z.

    calm_map: "joint" is p(y,z|x) of the label. "location" is p(z|x), the joint summed over all classes. The
        authors' code can sum the joint over a superclass; "location" is this sum where all classes are of one
        kind, and the default there: on CUB, CUB10 and the demo every class is a bird.
    calm_loss: "ml" is -log p(y|x). "em" is -log of the joint, weighted by the detached responsibilities
        p(z|x,y). On CUB the authors report a higher accuracy with em.

    Our choice: the defaults (the authors' code offers these maps; which of them its published numbers have is
    not stated), softplus (the authors' code has ReLU, which can give 0/0), and the gradient through the sum
    under p(z|x) (a constant in the authors' code; with it a training on CUB10 did not learn to classify).
    Upsampling is bilinear (authors). Both maps have a heavy tail: evenly spaced thresholds miss the extent of
    an object. `evaluate.py --normalize log` spaces them by the logarithm (authors).
    """

    upsampling = "bilinear"
    values = {
        "calm_loss": Value(str, "em", "loss", ("em", "ml"), OURS),
        "calm_map": Value(
            str,
            lambda dataset, arch: "location" if dataset in BIRDS else "joint",
            "map (birds: location, else joint)",
            ("joint", "location"),
            OURS,
        ),
    }
    map_options = ("calm_map",)

    def network(self, num_classes: int) -> GAPNetwork:
        """The CAM baseline's network with a 1 x 1 convolution, the location head."""
        net = super().network(num_classes)
        net.location = nn.Conv2d(net.fc.in_features, 1, 1)
        nn.init.normal_(net.location.weight, std=0.01)
        nn.init.zeros_(net.location.bias)
        return net

    def log_joint(self, features: Tensor) -> Tensor:
        """log p(y,z|x), N x K x H x W."""
        fc = self.net.fc
        classes = nnf.conv2d(features, fc.weight[:, :, None, None], fc.bias)
        s = nnf.softplus(full_precision(self.net.location(features)))  # N x 1 x H x W
        p_z = s / s.sum((2, 3), keepdim=True)
        return full_precision(classes).log_softmax(1) + torch.where(p_z < 1e-8, p_z + 1e-8, p_z).log()

    def forward(self, images: Tensor, labels: Tensor, epoch: int) -> tuple[Terms, Tensor]:
        """The loss that calm_loss selects. The logits are log p(y|x)."""
        log_joint = self.log_joint(self.passes(images).features)
        of_label = of_class(log_joint, labels)
        if self.config.calm_loss == "ml":
            loss = -of_label.logsumexp((1, 2)).mean()
        else:
            joint = of_label.detach().exp()
            responsibilities = joint / (joint.sum((1, 2), keepdim=True) + 1e-10)
            loss = -(responsibilities * of_label).sum((1, 2)).mean()
        return {f"l_{self.config.calm_loss}": (1.0, loss)}, log_joint.logsumexp((2, 3))

    def predict(self, images: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits: log p(y|x). Maps: p(y,z|x) or p(z|x) (calm_map), in [0, 1]."""
        log_joint = self.log_joint(self.passes(images).features)
        logits = log_joint.logsumexp((2, 3))
        if self.config.calm_map == "location":
            return logits, log_joint.logsumexp(1).exp()
        return logits, of_class(log_joint, logits.argmax(1) if labels is None else labels).exp()


class SPG(CAM, name="spg"):
    """SPG, self-produced guidance (Zhang et al., ECCV 2018), as in the common code.

    S has K channels: the map. Its spatial mean is the logits. VGG16: two 3 x 3 convolutions and a 1 x 1
    convolution replace conv6 and fc. ResNet50: a 1 x 1 convolution on layer4. Three branches of one channel,
    upsampled bilinearly to the image size, learn from detached `seeds`:

        B2  on conv5_3 / layer3               from minmax(S_y)                     thresholds spg_h1, spg_l1
        B1  on pool4 / first block of layer3  from sigmoid(B2)                     thresholds spg_h2, spg_l2
        C   on the input of S's last layer    from mean(sigmoid(B1), sigmoid(B2))  thresholds spg_h3, spg_l3

    L = L_CE + L_B1 + L_B2 + L_C, where the last three are `seed_loss`. VGG16's pool4 is 3 x 3 with padding 1.
    The new convolutions are made by `head`.

    Pairs (h, l): (.29,.23)(.03,.02)(.82,.59) and (.41,.35)(.24,.21)(.12,.08) (search).
    First pair: (.7,.05) (authors).
    """

    values = {
        f"spg_{end}{i}": Value(float, default, f"{kind} seeds", SHARE, COMMON_CODE)
        for i, pair in enumerate(((0.7, 0.01), (0.5, 0.05), (0.7, 0.1)), 1)
        for end, kind, default in zip("hl", ("object", "background"), pair)
    }

    def network(self, num_classes: int) -> GAPNetwork:
        """The CAM baseline's network with the branches in place of conv6, GAP and fc."""
        net = super().network(num_classes)
        vgg = isinstance(net, VGG16GAP)
        channels, _ = remove_head(net)
        if vgg and isinstance(net.features[net.dropout_at], nn.MaxPool2d):  # stride 8 has no pool4
            net.features[net.dropout_at] = nn.MaxPool2d(3, stride=2, padding=1)
        inner, of_c = (channels, channels) if vgg else (1024, 512)  # channels of B1, B2 and B; of C
        net.a3 = head(channels, [channels, channels]) if vgg else nn.Identity()
        net.a4 = head(channels, [], num_classes)
        net.b1, net.b2 = head(inner, [inner]), head(inner, [inner])
        net.b, net.c = head(inner, [inner], 1), head(channels, [of_c], 1)
        return net

    def passes(self, images: Tensor) -> Passes:
        """Logits from S, and the features of the backbone; extra: S, N x K x h x w."""
        features = self.net.after_dropout(self.net.before_dropout(images))
        s = full_precision(self.net.a4(self.net.a3(features)))
        return Passes(s.mean((2, 3)), features, extra=s)

    def forward(self, images: Tensor, labels: Tensor, epoch: int) -> tuple[Terms, Tensor]:
        """Cross-entropy of the logits, and of B1, B2 and C with their seeds."""
        c, net = self.config, self.net
        first, second, third = split(net, ("pool4", "conv5_3"), ("layer3.0", "layer3"))
        a1 = first(images)
        a2 = second(a1)
        a3 = net.a3(third(a2))
        s = full_precision(net.a4(a3))
        branches = net.b(net.b1(a1)), net.b(net.b2(a2)), net.c(a3)
        maps = [*(branch[:, 0] for branch in branches), of_class(s, labels)]
        b1, b2, of_c, s_y = (resize(x, images.shape[-1], "bilinear") for x in maps)
        logits = s.mean((2, 3))
        return {
            "l_ce": (1.0, nnf.cross_entropy(logits, labels)),
            "l_b2": (1.0, seed_loss(b2, seeds(minmax(s_y), c.spg_h1, c.spg_l1))),
            "l_b1": (1.0, seed_loss(b1, seeds(b2.sigmoid(), c.spg_h2, c.spg_l2))),
            "l_c": (1.0, seed_loss(of_c, seeds((b1.sigmoid() + b2.sigmoid()) / 2, c.spg_h3, c.spg_l3))),
        }, logits

    def predict(self, images: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits and maps from S."""
        logits, _, _, s = self.passes(images)
        return logits, of_class(s, logits.argmax(1) if labels is None else labels)


def seeds(maps: Tensor, high: float, low: float) -> Tensor:
    """Seeds of SPG: maps N x H x W in [0, 1] -> the same shape: 1 object, 0 background, -1 ignored.

    Object: above `high`, or above 0.7 times the image's maximum if fewer than 30 pixels are above `high`.
    Background: below `low`; it takes precedence. The result has no gradient.
    """
    few = (maps > high).sum((1, 2)) < 30
    high = torch.where(few, 0.7 * maps.amax((1, 2)), high)[:, None, None]
    # In the type of the maps: PyTorch computes a binary cross-entropy in the type of its target.
    return torch.where(maps < low, 0.0, torch.where(maps > high, 1.0, -1.0)).to(maps.dtype)


def seed_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Binary cross-entropy of SPG: logits N x H x W, target from `seeds` -> scalar, the mean over all seeds.

    0 if there is no seed (target >= 0). Gradient flows to the logits.
    """
    count = target >= 0
    losses = nnf.binary_cross_entropy_with_logits(logits, target.clamp(min=0), reduction="none")
    return torch.where(count, losses, 0).sum() / count.sum().clamp(min=1)


# ---- Networks


# The number of layers up to the end of a place (a pool, a convolution with its ReLU, a block or blocks). In
# layer1 to layer4 of ResNet50 a layer is a block.
ENDS = {"pool3": 17, "conv4_3": 23, "pool4": 24, "conv5_3": 30}
ENDS |= {"layer3.0": 12, "layer3": 17, "layer4.0": 18, "layer4.2": 20}


def split(net: GAPNetwork, vgg16: tuple[str, ...], resnet50: tuple[str, ...]) -> list[nn.Sequential]:
    """The network's own layers (no copies) up to the last feature map, cut at the end of each given place."""
    if isinstance(net, VGG16GAP):
        layers, places = [*net.features, net.conv6], vgg16
    else:
        stem, places = [net.conv1, net.bn1, net.relu, net.maxpool], resnet50
        layers = [*stem, *net.layer1, *net.layer2, *net.layer3, *net.layer4]
    ends = [0, *(ENDS[place] for place in places), None]
    return [nn.Sequential(*layers[start:end]) for start, end in pairwise(ends)]


def remove_head(net: GAPNetwork) -> tuple[int, int]:
    """Removes conv6 and fc. Returns (channels of the last layer that remains, 1024 scaled by the width)."""
    fc, net.fc = net.fc, nn.Identity()
    if not isinstance(net, VGG16GAP):
        return fc.in_features, 1024
    conv6, net.conv6 = net.conv6[0], nn.Identity()
    return conv6.in_channels, conv6.out_channels


def head(channels: int, hidden: list[int], out: int | None = None) -> nn.Sequential:
    """A 3 x 3 convolution and ReLU for each entry of `hidden`, then a 1 x 1 convolution to `out` channels.

    out None: without the latter. Initialization: Xavier's uniform distribution, biases 0 (common code).
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
    """The map of each image's label: maps N x K x H x W, labels N -> N x H x W."""
    return maps[torch.arange(len(maps), device=maps.device), labels]
