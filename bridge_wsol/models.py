"""VGG16-GAP and ResNet50 with attentive dropout (main-text section 3); weights, checkpoints, seeds.

A forward pass returns the logits and the last feature map f. The CAM of class y is w_y . f_u (cam.py).

    arch      layers                                                                   dropout after
    vgg16     features (13 convolutions, no last pool), conv6 3 x 3 + ReLU, GAP, fc    conv4_3 + ReLU
    resnet50  conv1 ... layer4 with smaller strides, GAP, fc                           layer4[0]

Parameters have torchvision's names, so its weights files load directly. This command writes the pretrained
layers of a VGG16 checkpoint as a weights file:

    python -m bridge_wsol.models CHECKPOINT OUT
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

# The original ImageNet-1K weights, as in the literature. The V2 weights of ResNet50 are newer.
IMAGENET_WEIGHTS = {"vgg16": VGG16_Weights.IMAGENET1K_V1, "resnet50": ResNet50_Weights.IMAGENET1K_V1}


class Output(NamedTuple):
    """Result of a forward pass."""

    logits: Tensor  # N x K
    features: Tensor  # N x C x H x W: f, after the last ReLU
    features_dropped: Tensor | None  # f of the dropped pass; None in eval mode and without attentive dropout


class GAPNetwork(nn.Module):
    """Base class with the forward pass, which includes attentive dropout (main-text section 3).

    Subclasses have `before_dropout`, `after_dropout`, the linear layer `fc`, `pretrained_blocks` and
    `backbone_state_dict`.
    gamma, p: threshold and probability of `losses.attentive_dropout`. None: no dropped pass, as in the CAM
    baseline.
    """

    gamma: float | None = None
    p: float | None = None

    def forward(self, images: Tensor) -> Output:
        """images N x 3 x H x W, normalized -> Output.

        In training mode with attentive dropout, features_dropped comes from a second pass that starts at the
        dropout. It is for L_drop only: logits and CAM come from the clean pass. Batch norm after the dropout
        gets the clean pass first, then the dropped pass; both update its running statistics.
        """
        shared = self.before_dropout(images)
        features = self.after_dropout(shared)
        logits = self.fc(features.mean((2, 3)))
        features_dropped = None
        if self.training and self.gamma is not None:
            features_dropped = self.after_dropout(attentive_dropout(shared, self.gamma, self.p))
        return Output(logits, features, features_dropped)

    def freeze_blocks(self, n: int) -> GAPNetwork:
        """Fixes the weights of the first n of `pretrained_blocks`, and returns the network.

        0: all layers learn, as in the paper. Running statistics of batch norm are not fixed. Raises
        InputError if there are fewer blocks.
        """
        blocks = self.pretrained_blocks()
        if n > len(blocks):
            raise InputError(f"--frozen-blocks {n}: this network has {len(blocks)} pretrained blocks")
        for block in blocks[:n]:
            block.requires_grad_(False)
        return self


class VGG16GAP(GAPNetwork):
    """VGG16-GAP (Zhou et al., CVPR 2016). stride 16: four pools, 224 -> 14 x 14.

    stride 8: without the fourth pool, 224 -> 28 x 28.
    width scales the number of channels. batch_norm: the layers of torchvision's vgg16_bn, for pretraining
    from scratch; the paper's network has no batch norm.
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
        # Index of the fourth pool, which follows the ReLU of conv4_3: the dropout is between the two.
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
        """The layers up to the ReLU of conv4_3: N x 3 x H x W -> N x 512 x H/8 x W/8 at full width."""
        return self.features[: self.dropout_at](images)

    def after_dropout(self, shared: Tensor) -> Tensor:
        """The fourth pool, block 5 and conv6: the last feature map, N x 1024 x h x w at full width."""
        return self.conv6(self.features[self.dropout_at :](shared))

    def pretrained_blocks(self) -> list[nn.Module]:
        """The five blocks of convolutions between the pools."""
        ends = [i for i, layer in enumerate(self.features) if isinstance(layer, (nn.MaxPool2d, nn.Identity))]
        return [self.features[start:end] for start, end in zip([0, *ends], [*ends, None])]

    def backbone_state_dict(self) -> dict[str, Tensor]:
        """The pretrained layers (`features`) by torchvision's names: current values, not copies."""
        return {k: v for k, v in self.state_dict().items() if k.startswith("features.")}


class ResNet50GAP(GAPNetwork, ResNet):
    """ResNet50 with GAP. stride 8: no downsampling in layer3 and layer4, 224 -> 28 x 28.

    stride 16: no downsampling in layer4, 224 -> 14 x 14.
    """

    def __init__(self, num_classes: int, stride: int = 8):
        ResNet.__init__(self, Bottleneck, [3, 4, 6, 3], num_classes=num_classes)
        for layer in {8: (self.layer3, self.layer4), 16: (self.layer4,)}[stride]:
            layer[0].conv2.stride = layer[0].downsample[0].stride = (1, 1)

    def before_dropout(self, images: Tensor) -> Tensor:
        """The layers up to layer4[0]: N x 3 x H x W -> N x 2048 x h x w."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        return self.layer4[0](self.layer3(self.layer2(self.layer1(x))))

    def after_dropout(self, shared: Tensor) -> Tensor:
        """The other blocks of layer4: the last feature map, N x 2048 x h x w."""
        return self.layer4[1:](shared)

    def pretrained_blocks(self) -> list[nn.Module]:
        """conv1 with its batch norm, layer1, layer2, layer3: the layers of the lower learning rate."""
        return [nn.Sequential(self.conv1, self.bn1), self.layer1, self.layer2, self.layer3]

    def backbone_state_dict(self) -> dict[str, Tensor]:
        """The pretrained layers (all but fc) by torchvision's names: current values, not copies."""
        # Files from before PyTorch 0.4.1 do not have num_batches_tracked, which no forward pass here uses.
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
    """A network with initial weights, drawn from torch's default generator.

    stride: image pixels per location of the map, 8 or 16. width, batch_norm: see `VGG16GAP`. gamma, p: see
    `GAPNetwork`. Raises InputError for another `arch` or stride, and for resnet50 with width or batch_norm.
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
        raise InputError("resnet50 has no width and no batch_norm option: use them with vgg16")
    model.gamma, model.p = gamma, p
    return model


def load_pretrained(model: GAPNetwork, arch: str, weights: str, load_fc: bool = False) -> None:
    """Loads pretrained weights into the model.

    weights: "none", "imagenet" (torchvision's file, downloaded and checked), or a file: tensors by
    torchvision's names, or a checkpoint of train.py. The fully connected layers of VGG16 are not loaded.
    Batch norm of vgg16_bn is folded into the convolutions if the model has none (`fold_batch_norm`). The
    linear layer of ResNet50 is loaded only with load_fc, for ImageNet-1K: the file has the same classes.
    Raises InputError if the download fails, and for a wrong file; it names missing tensors and wrong shapes.
    """
    if weights == "none":
        return
    if weights == "imagenet":
        source, state = "torchvision's ImageNet weights", _download(arch)
    else:
        source, state = weights, load_tensors(Path(weights))
        state = state["model"] if isinstance(state.get("model"), dict) else state
    wanted = model.backbone_state_dict()
    if arch == "vgg16" and _has_batch_norm(state) and not _has_batch_norm(wanted):
        try:
            state = fold_batch_norm(state)
        except (AttributeError, IndexError, KeyError, RuntimeError, ValueError) as error:
            raise InputError(f"{source}: batch norm does not match vgg16_bn ({error})") from error
    if load_fc and arch == "resnet50":
        wanted |= {k: v for k, v in model.state_dict().items() if k[:3] == "fc."}
    problems = _differences(state, wanted)
    if problems:
        raise InputError(f"{source}: weights do not fit this {arch}; {problems}")
    model.load_state_dict({k: state[k] for k in wanted}, strict=False)


def fold_batch_norm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Converts the `features` of torchvision's vgg16_bn to those of vgg16: the same function in eval mode.

    BN(w * x + b) = (w k) * x + (b - mean) k + beta with k = gamma / sqrt(var + eps).
    state: tensors by torchvision's names. Raises KeyError if one is missing.
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
        centred = state[f"{old}.bias"] - state[f"{norm}.running_mean"]
        folded[f"{new}.bias"] = centred * k + state[f"{norm}.bias"]
    return folded


def export_backbone(checkpoint: Path, out: Path) -> None:
    """Writes the pretrained layers of a VGG16 checkpoint in half precision to `out`, with batch norm folded.

    Raises InputError if `checkpoint` is no checkpoint of train.py.
    """
    state = load_tensors(checkpoint).get("model")
    if not isinstance(state, dict):
        raise InputError(f"{checkpoint}: not a checkpoint of train.py")
    if _has_batch_norm(state):
        state = fold_batch_norm(state)
    save_checkpoint(out, {k: v.half().contiguous() for k, v in state.items() if k.startswith("features.")})


def _has_batch_norm(state: dict[str, Tensor]) -> bool:
    return any(name.endswith("running_mean") for name in state)


def _differences(state: dict[str, Tensor], wanted: dict[str, Tensor]) -> str:
    """What `state` lacks to be loaded as `wanted`, for a message; empty if it fits."""
    missing = [name for name in wanted if not isinstance(state.get(name), Tensor)]
    there = {name: value for name, value in wanted.items() if name not in missing}
    unreadable = [name for name, value in there.items() if not _is_like(state[name], value)]
    misshapen = [
        f"{name} ({_shape(state[name])} in the file, {_shape(value)} in the model)"
        for name, value in there.items()
        if state[name].shape != value.shape
    ]
    kinds = {"missing": missing, "not dense real numbers": unreadable, "wrong shape": misshapen}
    return "; ".join(f"{kind}: {_shorten(names)}" for kind, names in kinds.items() if names)


def _is_like(value: Tensor, wanted: Tensor) -> bool:
    """Whether the file has values, and real numbers where the model has them."""
    dense = value.layout == torch.strided and value.device.type == "cpu"
    return dense and value.is_floating_point() == wanted.is_floating_point()


def save_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Writes tensors, numbers, strings, lists and dicts to `path`, for `load_tensors`.

    Equal contents give equal bytes. Raises InputError if the file cannot be written; an existing file then
    stays unchanged.
    """
    with atomic_write(path, one_writer=True) as part, part.open("wb") as file:
        try:
            torch.save(_canonical(checkpoint), file)  # with a path, torch would store the file name
        except RuntimeError as error:  # torch's error for a full disk
            raise OSError(str(error).splitlines()[0]) from error


def _canonical(value: Any) -> Any:
    """A copy that pickles to the same bytes in a resumed run as in an uninterrupted one.

    pickle writes a repeated object only once, and a resumed run shares other strings and lists.
    """
    if isinstance(value, str):
        return sys.intern(value)
    if isinstance(value, dict):
        return {_canonical(k): _canonical(v) for k, v in value.items()}
    return type(value)(map(_canonical, value)) if type(value) in (list, tuple) else value


def load_tensors(path: Path) -> dict[str, Any]:
    """Reads a file of `save_checkpoint` or torch.save onto the CPU, without executing code in it.

    Raises InputError if it is missing, damaged, or contains other objects.
    """
    try:
        if zipfile.is_zipfile(path):
            # torch writes checksums but does not verify them.
            with zipfile.ZipFile(path) as records:
                damaged = records.testzip()
            if damaged is not None:
                raise ValueError(f"wrong checksum of {damaged}")
        value = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:  # torch raises many types
        raise InputError(f"{path}: damaged, or not a file of tensors ({first_line(error)})") from error
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise InputError(f"{path}: contains a {type(value).__name__}, not a dictionary of tensors by name")
    return value


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and torch on all devices.

    The same seed on the same machine gives the same run; on the CPU it is bit-identical.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = False


def random_states() -> dict[str, Any]:
    """Torch's random states, for a checkpoint. Seed and epoch determine all other random numbers of a run."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"torch": torch.get_rng_state(), "cuda": cuda}


def set_random_states(states: dict[str, Any]) -> None:
    """Restores `random_states`. The states of GPUs are restored only if their number has not changed."""
    torch.set_rng_state(states["torch"])
    if len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])


def restore_weights(model: GAPNetwork, state: dict[str, Tensor], path: Path) -> None:
    """Loads all weights of a checkpoint into the model. path: for the message.

    Raises InputError if they belong to another architecture or another number of classes.
    """
    own = model.state_dict()
    if state.keys() != own.keys():
        name = sorted(state.keys() ^ own.keys())[0]
        where = "not in the model" if name in state else "not in the file"
        raise InputError(f"{path}: weights of another architecture ({name} is {where})")
    for name, value in own.items():
        if state[name].shape != value.shape:
            what = "of another number of classes" if name.startswith("fc.") else "of another architecture"
            shapes = f"{_shape(state[name])} in the file, {_shape(value)} in the model"
            raise InputError(f"{path}: weights {what} ({name} is {shapes})")
    model.load_state_dict(state)


def _download(arch: str) -> dict[str, Tensor]:
    weights = IMAGENET_WEIGHTS[arch]
    try:
        return weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except Exception as error:  # no network, a full disk, a wrong checksum, a damaged file in torch's cache
        cache = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rsplit("/", 1)[-1]
        raise InputError(
            f"could not load {weights.url} ({first_line(error)}): download it elsewhere, put it at {cache}, "
            "pass --weights FILE, or train from scratch with --weights none"
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
