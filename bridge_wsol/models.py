"""VGG16-GAP and ResNet50 on torchvision's layers, each with the place where attentive dropout sits.

A forward pass gives the logits and the last feature map f at once; the map of class y is w_y . f_u (`cam.py`), so
evaluation never runs a network twice. Parameters carry torchvision's names: its files load as they are.

    vgg16     features (13 convolutions, no last pool) - conv6 3x3 -> 1024 + ReLU - GAP - fc      dropout: after conv4_3's ReLU
    resnet50  conv1 ... layer4, strides cut for a large map - GAP - fc                            dropout: after layer4[0]
"""

from __future__ import annotations

import random
import sys
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models import ResNet, ResNet50_Weights, VGG16_Weights
from torchvision.models.resnet import Bottleneck

from .losses import attentive_dropout
from .utils import InputError, atomic_write, first_line, one_line_errors

ARCHS = ("vgg16", "resnet50")

# The original ImageNet-1K weights, those of the literature: ResNet50's V2 recipe came later.
IMAGENET_WEIGHTS = {"vgg16": VGG16_Weights.IMAGENET1K_V1, "resnet50": ResNet50_Weights.IMAGENET1K_V1}


class Output(NamedTuple):
    logits: Tensor  # N x K
    features: Tensor  # N x C x H x W, f: after the last ReLU
    features_dropped: (
        Tensor | None
    )  # the same of the dropped pass; None in eval mode and without attentive dropout


class GAPNetwork(nn.Module):
    """Shared forward pass. Subclasses define `before_dropout`, `after_dropout`, the linear layer `fc`, and `backbone_state_dict`: the
    parameters and buffers that a pretrained file must have, by torchvision's names.

    gamma, p: attentive dropout's threshold and probability; None, None: no dropped pass (the vanilla CAM network).
    """

    gamma: float | None = None
    p: float | None = None

    def forward(self, images: Tensor) -> Output:
        """images N x 3 x H x W, normalized -> Output. The dropped pass shares the layers before the dropout with the
        clean one and touches neither the logits nor the map; batch norm sees the clean pass first, then the dropped."""
        shared = self.before_dropout(images)
        features = self.after_dropout(shared)
        logits = self.fc(features.mean((2, 3)))
        features_dropped = None
        if self.training and self.gamma is not None:
            features_dropped = self.after_dropout(attentive_dropout(shared, self.gamma, self.p))
        return Output(logits, features, features_dropped)


class VGG16GAP(GAPNetwork):
    """stride 16: four pools, 224 -> 14 x 14. stride 8 leaves out the fourth pool. `width` scales every channel count.

    batch_norm: torchvision's vgg16_bn, for pretraining from scratch; the paper's network has none.
    """

    CHANNELS = (64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool", 512, 512, 512)

    def __init__(self, num_classes: int, stride: int = 16, width: float = 1.0, batch_norm: bool = False):
        super().__init__()

        def convolution(channels: int, c: int) -> list[nn.Module]:
            norm = [nn.BatchNorm2d(c)] if batch_norm else []
            return [nn.Conv2d(channels, c, 3, padding=1), *norm, nn.ReLU(inplace=True)]

        layers, channels = [], 3
        for c in self.CHANNELS:
            if c == "pool":
                layers.append(nn.MaxPool2d(2))
            else:
                layers += convolution(channels, round(c * width))
                channels = round(c * width)
        # The dropout sits between conv4_3's ReLU, features[22] without batch norm, and the fourth pool, features[23].
        self.dropout_at = [i for i, layer in enumerate(layers) if isinstance(layer, nn.MaxPool2d)][3]
        if stride == 8:
            layers[self.dropout_at] = nn.Identity()
        self.features = nn.Sequential(*layers)
        self.conv6 = nn.Sequential(*convolution(channels, round(1024 * width)))
        self.fc = nn.Linear(round(1024 * width), num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    def before_dropout(self, images: Tensor) -> Tensor:
        return self.features[: self.dropout_at](images)

    def after_dropout(self, shared: Tensor) -> Tensor:
        return self.conv6(self.features[self.dropout_at :](shared))

    def backbone_state_dict(self) -> dict[str, Tensor]:
        return {k: v for k, v in self.state_dict().items() if k.startswith("features.")}


class ResNet50GAP(GAPNetwork, ResNet):
    """stride 8: layer3 and layer4 do not downsample, 224 -> 28 x 28; stride 16: layer4 does not, 14 x 14."""

    def __init__(self, num_classes: int, stride: int = 8):
        ResNet.__init__(self, Bottleneck, [3, 4, 6, 3], num_classes=num_classes)
        for layer in {8: (self.layer3, self.layer4), 16: (self.layer4,)}[stride]:
            layer[0].conv2.stride = layer[0].downsample[0].stride = (1, 1)

    def before_dropout(self, images: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        return self.layer4[0](self.layer3(self.layer2(self.layer1(x))))

    def after_dropout(self, shared: Tensor) -> Tensor:
        return self.layer4[1:](shared)

    def backbone_state_dict(self) -> dict[str, Tensor]:
        # Files older than PyTorch 0.4.1 have no num_batches_tracked; it is used by no forward pass here.
        own = ("conv1.", "bn1.", "layer1.", "layer2.", "layer3.", "layer4.")
        return {
            k: v
            for k, v in self.state_dict().items()
            if k.startswith(own) and not k.endswith("num_batches_tracked")
        }


def build_model(
    arch: str,
    num_classes: int,
    *,
    stride: int,
    width: float = 1.0,
    batch_norm: bool = False,
    gamma: float | None = None,
    p: float | None = None,
) -> GAPNetwork:
    """A network with fresh weights (torch's default generator). stride: input pixels per location of the map, 8 or 16.

    Raises InputError for an unknown `arch`, another stride, or a `width` other than 1 or `batch_norm` with resnet50.
    """
    if arch not in ARCHS:
        raise InputError(f"unknown architecture {arch!r}: choose {' or '.join(ARCHS)}")
    if stride not in (8, 16):
        raise InputError(f"stride must be 8 or 16, got {stride}")
    if arch == "vgg16":
        model = VGG16GAP(num_classes, stride, width, batch_norm)
    elif width == 1 and not batch_norm:
        model = ResNet50GAP(num_classes, stride)
    else:
        raise InputError("width and batch_norm are vgg16's: resnet50 has neither option")
    model.gamma, model.p = gamma, p
    return model


def load_pretrained(model: GAPNetwork, arch: str, weights: str, load_fc: bool = False) -> None:
    """Loads pretrained layers in place. weights: "none", "imagenet" (torchvision downloads and checks it) or a file.

    A file holds tensors by torchvision's names, or is a checkpoint of this program. VGG16's fully connected layers are
    left out, and vgg16_bn's batch norm is folded into the convolutions of a network without; ResNet50's linear layer is loaded with
    `load_fc` only (ImageNet-1K, whose classes it tells apart).
    Raises InputError when the download fails, and for a wrong file, naming what is missing or of another shape.
    """
    if weights == "none":
        return
    if weights == "imagenet":
        source, state = "torchvision's ImageNet weights", _download(arch)
    else:
        source, state = weights, load_tensors(Path(weights))
        state = state["model"] if isinstance(state.get("model"), dict) else state
    wanted = model.backbone_state_dict()
    if (
        arch == "vgg16"
        and any(k.endswith("running_mean") for k in state)
        and not any(k.endswith("running_mean") for k in wanted)
    ):
        try:
            state = fold_batch_norm(state)
        except (AttributeError, IndexError, KeyError, RuntimeError, ValueError) as error:
            raise InputError(f"{source}: batch norm that is not vgg16_bn's ({error})") from error
    if load_fc and arch == "resnet50":
        wanted |= {k: v for k, v in model.state_dict().items() if k[:3] == "fc."}

    missing = [k for k in wanted if not isinstance(state.get(k), Tensor)]
    misshapen = [
        f"{k} ({_shape(state[k])} in the file, {_shape(v)} in the model)"
        for k, v in wanted.items()
        if k not in missing and state[k].shape != v.shape
    ]
    problems = [
        f"{what}: {_shorten(keys)}"
        for what, keys in (("missing", missing), ("wrong shape", misshapen))
        if keys
    ]
    if problems:
        raise InputError(f"{source}: not weights of this {arch}; {'; '.join(problems)}")
    model.load_state_dict({k: state[k] for k in wanted}, strict=False)


def fold_batch_norm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The `features` of torchvision's vgg16_bn as those of vgg16: the same function in eval mode, without the batch norm.

    BN(w * x + b) = (w k) * x + (b - mean) k + beta with k = gamma / sqrt(var + eps).
    """
    numbers = sorted(
        int(name.split(".")[1])
        for name, value in state.items()
        if name.startswith("features.") and value.dim() == 4
    )
    plain = [
        f"features.{i}"
        for i, layer in enumerate(VGG16GAP(1, width=1 / 64).features)
        if isinstance(layer, nn.Conv2d)
    ]
    folded = {}
    for number, new in zip(numbers, plain):
        old, norm = f"features.{number}", f"features.{number + 1}"
        k = state[f"{norm}.weight"] / torch.sqrt(state[f"{norm}.running_var"] + nn.BatchNorm2d(1).eps)
        folded[f"{new}.weight"] = state[f"{old}.weight"] * k[:, None, None, None]
        folded[f"{new}.bias"] = (state[f"{old}.bias"] - state[f"{norm}.running_mean"]) * k + state[
            f"{norm}.bias"
        ]
    return folded


def export_backbone(checkpoint: Path, out: Path) -> None:
    """Writes the pretrained layers of a VGG16 checkpoint of train.py as a weights file in half precision, batch norm folded."""
    model_state = load_tensors(checkpoint).get("model")
    if not isinstance(model_state, dict):
        raise InputError(f"{checkpoint}: not a checkpoint of train.py")
    folded = (
        fold_batch_norm(model_state) if any(k.endswith("running_mean") for k in model_state) else model_state
    )
    save_checkpoint(out, {k: v.half().contiguous() for k, v in folded.items() if k.startswith("features.")})


def save_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Tensors, numbers, strings, lists and dicts only: what `load_tensors` reads without executing anything."""
    with atomic_write(path, one_writer=True) as part, part.open("wb") as file:
        try:
            torch.save(_canonical(checkpoint), file)  # given a path, it would write that name into the file
        except RuntimeError as error:  # torch's zip writer reports a full disk so
            raise OSError(str(error).splitlines()[0]) from error


def _canonical(value: Any) -> Any:
    """Equal contents, equal bytes: pickle writes an object that is met twice once, and a resumed run shares other strings and lists."""
    if isinstance(value, str):
        return sys.intern(value)
    if isinstance(value, dict):
        return {_canonical(k): _canonical(v) for k, v in value.items()}
    return type(value)(map(_canonical, value)) if type(value) in (list, tuple) else value


def load_tensors(path: Path) -> dict[str, Any]:
    """Reads a file of torch.save onto the CPU, executing nothing in it. Raises InputError when absent or damaged."""
    try:
        if zipfile.is_zipfile(
            path
        ):  # torch does not compare the checksums that it writes: flipped bits would become weights
            with zipfile.ZipFile(path) as records:
                damaged = records.testzip()
            if damaged is not None:
                raise ValueError(f"wrong checksum of {damaged}")
        value = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:  # damaged zip, truncated pickle, foreign objects: torch raises a dozen types
        raise InputError(f"{path}: damaged, or not a file of tensors ({first_line(error)})") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds a {type(value).__name__}, not a dictionary of tensors")
    return value


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and torch on all devices. Same seed, same machine: same run, bit for bit on the CPU."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = False


def random_states() -> dict[str, Any]:
    """Torch's random states, for a checkpoint: all randomness of a run that (seed, epoch) does not determine."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"torch": torch.get_rng_state(), "cuda": cuda}


def set_random_states(states: dict[str, Any]) -> None:
    """Restores `random_states`; those of GPUs where there are as many as before."""
    torch.set_rng_state(states["torch"])
    if len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])


def restore_weights(model: GAPNetwork, state: dict[str, Tensor], path: Path) -> None:
    """Loads all of a checkpoint's weights in place. Raises InputError where they are another architecture's or another number of classes'."""
    own = model.state_dict()
    if state.keys() != own.keys():
        odd = sorted(state.keys() ^ own.keys())[0]
        raise InputError(f"{path}: weights of another architecture (its {odd} does not match)")
    for name, value in own.items():
        if state[name].shape != value.shape:
            what = "of another number of classes" if name.startswith("fc.") else "of another architecture"
            raise InputError(
                f"{path}: weights {what} ({name} is {_shape(state[name])} in the file, {_shape(value)} in the model)"
            )
    model.load_state_dict(state)


def _download(arch: str) -> dict[str, Tensor]:
    weights = IMAGENET_WEIGHTS[arch]
    try:
        return weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:  # no network, no space, or a file whose checksum differs
        cache = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rsplit("/", 1)[-1]
        raise InputError(
            f"could not download {weights.url} ({error}): fetch it elsewhere and put it at {cache} "
            "or pass --weights FILE, or train from scratch with --weights none"
        ) from error


def _shape(x: Tensor) -> str:
    return "x".join(map(str, x.shape)) or "scalar"


def _shorten(names: list[str], n: int = 3) -> str:
    return ", ".join(names[:n]) + (f" and {len(names) - n} more" if len(names) > n else "")


if __name__ == "__main__":  # python -m bridge_wsol.models CHECKPOINT OUT
    with one_line_errors():
        if len(sys.argv) != 3:
            raise InputError("usage: python -m bridge_wsol.models CHECKPOINT OUT")
        export_backbone(Path(sys.argv[1]), Path(sys.argv[2]))
