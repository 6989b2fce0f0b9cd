"""VGG16-GAP and ResNet50, cut where attentive dropout sits (main-text section 3); pretrained weights.

    arch      layers                                                                   dropout after
    vgg16     features (13 convolutions, no last pool), conv6 3 x 3 + ReLU, GAP, fc    conv4_3 + ReLU
    resnet50  conv1 ... layer4 with smaller strides, GAP, fc                           layer4[0]

A network is three steps: before_dropout -> after_dropout -> classify. The last feature map f is the output of
the second; the CAM of class y is w_y . f_u with w the weight of `fc` (cam.py). Parameters have torchvision's
names, so its weights files load directly.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import ResNet, ResNet50_Weights, VGG16_Weights
from torchvision.models.resnet import Bottleneck

from .utils import InputError, first_line, load_tensors

ARCHS = ("vgg16", "resnet50")

# The original ImageNet-1K weights, as in the literature. The V2 weights of ResNet50 are newer.
IMAGENET_WEIGHTS = {"vgg16": VGG16_Weights.IMAGENET1K_V1, "resnet50": ResNet50_Weights.IMAGENET1K_V1}


class GAPNetwork(nn.Module):
    """A backbone with global average pooling (GAP) and a linear classifier.

    Subclasses have what is declared here. pretrained_names: the prefixes of the parameters that a weights
    file fills.
    """

    fc: nn.Linear
    before_dropout: Callable[[Tensor], Tensor]
    after_dropout: Callable[[Tensor], Tensor]
    pretrained_blocks: Callable[[], list[nn.Module]]
    pretrained_names: tuple[str, ...]

    def classify(self, features: Tensor) -> Tensor:
        """GAP and the linear classifier: f, N x C x h x w -> logits, N x K."""
        return self.fc(features.mean((2, 3)))

    def forward(self, images: Tensor) -> Tensor:
        """images N x 3 x H x W, normalized -> logits N x K, without dropout."""
        return self.classify(self.after_dropout(self.before_dropout(images)))

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

    stride 8: without the fourth pool, 224 -> 28 x 28. width scales the number of channels.
    """

    CHANNELS = (64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool", 512, 512, 512)
    pretrained_names = ("features.",)

    def __init__(self, num_classes: int, stride: int = 16, width: float = 1.0):
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for c in self.CHANNELS:
            if c == "pool":
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [nn.Conv2d(channels, round(c * width), 3, padding=1), nn.ReLU(inplace=True)]
                channels = round(c * width)
        # Index of the fourth pool, which follows the ReLU of conv4_3: the dropout is between the two.
        self.dropout_at = [i for i, layer in enumerate(layers) if isinstance(layer, nn.MaxPool2d)][3]
        if stride == 8:
            layers[self.dropout_at] = nn.Identity()
        self.features = nn.Sequential(*layers)
        new = round(1024 * width)
        self.conv6 = nn.Sequential(nn.Conv2d(channels, new, 3, padding=1), nn.ReLU(inplace=True))
        self.fc = nn.Linear(new, num_classes)
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


class ResNet50GAP(GAPNetwork, ResNet):
    """ResNet50 with GAP. stride 8: no downsampling in layer3 and layer4, 224 -> 28 x 28.

    stride 16: no downsampling in layer4, 224 -> 14 x 14.
    """

    pretrained_names = ("conv1.", "bn1.", "layer1.", "layer2.", "layer3.", "layer4.")

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


def build_network(arch: str, num_classes: int, stride: int, width: float = 1.0) -> GAPNetwork:
    """A network with initial weights, drawn from torch's default generator.

    stride: image pixels per location of the map, 8 or 16. width: of VGG16. Raises InputError for another
    `arch` or stride, and for resnet50 with a width.
    """
    if arch not in ARCHS:
        raise InputError(f"unknown architecture {arch!r}: choose {' or '.join(ARCHS)}")
    if stride not in (8, 16):
        raise InputError(f"--stride {stride}: must be 8 or 16")
    if arch == "vgg16":
        return VGG16GAP(num_classes, stride, width)
    if width != 1:
        raise InputError("resnet50 has no width: use it with vgg16")
    return ResNet50GAP(num_classes, stride)


def load_pretrained(net: GAPNetwork, arch: str, weights: str, load_fc: bool = False) -> None:
    """Loads pretrained weights into the network.

    weights: "none", "imagenet" (torchvision's file, downloaded and checked), or a file of `read_weights`. The
    fully connected layers of VGG16 are not loaded. The linear layer of ResNet50 is loaded only with load_fc,
    for ImageNet-1K: the file has the same classes.
    Raises InputError if the download fails, and for a file that lacks tensors or has other shapes.
    """
    if weights == "none":
        return
    state = _download(arch) if weights == "imagenet" else read_weights(Path(weights), arch)[0]
    names = net.pretrained_names + (("fc.",) if load_fc and arch == "resnet50" else ())
    # Files from before PyTorch 0.4.1 do not have num_batches_tracked, which no forward pass here uses.
    own = {name: value for name, value in net.state_dict().items() if not name.endswith("batches_tracked")}
    wanted = {name: value for name, value in own.items() if name.startswith(names)}
    load_weights(net, own | {name: state.get(name) for name in wanted}, weights, strict=False)


def read_weights(path: Path, arch: str) -> tuple[dict[str, Tensor], int | None]:
    """(tensors by our names, VGG16's stride) of a file that train.py, torchvision or another code has saved.

    The tensors may be under `state_dict`, `model_state_dict` or `model`, and their names may begin with
    `module.`. Names of VGG16 and ResNet50 that are read:

        ours and torchvision's                  features.N, conv6.0, fc             layer4.N
        the authors' release                    features.0.N, features.2.N, conv6   layer4_1.0, layer4_2.N
        Choe et al.'s code: cam, has, cutmix    features.N, conv6, fc               layer4.N

    stride: 8 or 16 where the last two tell it; None: unknown. Raises InputError as `load_tensors` does.
    """
    state: Any = load_tensors(path)
    for key in ("state_dict", "model_state_dict", "model"):
        state = state[key] if isinstance(state.get(key), dict) else state
    state = {str(name).removeprefix("module."): value for name, value in state.items()}
    if arch == "resnet50":
        ours = {"layer4_1.0.": "layer4.0.", "layer4_2.0.": "layer4.1.", "layer4_2.1.": "layer4.2."}
        for theirs, own in ours.items():
            state = {name.replace(theirs, own): value for name, value in state.items()}
        return state, None
    stride = 16 if "conv6.weight" in state else None
    matches = {name: re.match(r"features\.(?:[02]\.)?(\d+)\.", name) for name in state}
    numbers = {name: int(match[1]) for name, match in matches.items() if match}
    if "features.2.0.weight" in state or "features.23.weight" in state:  # no fourth pool, and no place for it
        stride = 8
    renamed = {}
    for name, value in state.items():
        kind = name.rpartition(".")[2]
        if name.startswith("features.2.") and name.count(".") == 3:
            name = f"features.{numbers[name] + (24 if stride == 8 else 23)}.{kind}"
        elif name in numbers:
            name = f"features.{numbers[name] + (stride == 8 and numbers[name] >= 23)}.{kind}"
        elif name in ("conv6.weight", "conv6.bias"):
            name = f"conv6.0.{kind}"
        renamed[name] = value
    return renamed, stride


def load_weights(net: nn.Module, state: dict[str, Tensor], path: str | Path, strict: bool = True) -> None:
    """`load_state_dict`. path: for the InputError that names what is missing, superfluous or misshapen."""
    own = net.state_dict()
    wrong = sorted(own.keys() ^ state.keys()) if strict else []
    wrong += [name for name, value in state.items() if name in own and not _fits(value, own[name])]
    if wrong:
        value = state.get(wrong[0])
        there = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else "missing"
        needed = tuple(own[wrong[0]].shape) if wrong[0] in own else "nothing"
        what = f"{len(wrong)} tensors differ, first {wrong[0]}: {there} in the file, {needed} in the network"
        what += f"; the file holds {', '.join(map(str, [*state][:3]))}, ..."
        raise InputError(f"{path}: weights of another architecture, layout or number of classes ({what})")
    net.load_state_dict(state, strict=strict)


def _fits(value: object, own: Tensor) -> bool:
    """Whether a file's value is a dense tensor of numbers like the network's own."""
    dense = isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"
    return dense and value.shape == own.shape and value.is_floating_point() == own.is_floating_point()


def _download(arch: str) -> dict[str, Tensor]:
    weights = IMAGENET_WEIGHTS[arch]
    try:
        return weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except Exception as error:  # no network, a full disk, a wrong checksum, a damaged file in torch's cache
        cache = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rsplit("/", 1)[-1]
        fix = "pass --weights FILE, or train from scratch with --weights none"
        problem = f"could not load {weights.url} ({first_line(error)})"
        raise InputError(f"{problem}: download it elsewhere, put it at {cache}, {fix}") from error
