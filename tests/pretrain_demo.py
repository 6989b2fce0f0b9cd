"""Makes the weights of the demo's small backbone, bridge_wsol/demo_vgg16.pth, in place of ImageNet's.

    python tests/pretrain_demo.py FOLDER OUT.pth      draws the shapes into FOLDER; 14 minutes on one core

They are pretrained on random shapes whose class, texture x colour, shows on the whole object. The shapes
contain no birds and none of the demo's classes.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from bridge_wsol import utils
from bridge_wsol.data import TrainImages, read_split, to_input, train_loader
from bridge_wsol.models import VGG16GAP
from bridge_wsol.reproduce import demo
from bridge_wsol.reproduce.demo import rgb

PLAIN, CHECKS = lambda u, v: u < -np.inf, lambda u, v: (np.floor(u) + np.floor(v)) % 2 < 1
TEXTURES = (PLAIN, demo.stripes, demo.dots, CHECKS, lambda u, v: np.hypot(u, v) % 1 < 0.5)  # the last: rings
HUES = (0.0, 0.15, 0.33, 0.5, 0.63, 0.8)  # and grey, the last colour
CLASSES = len(TEXTURES) * (len(HUES) + 1)


def draw_shape(rng: np.random.Generator, label: int) -> demo.Drawing:
    """One shape of class `label` = texture * 7 + colour: a blob, a star, a polygon or an ellipse."""
    texture, colour = divmod(label, len(HUES) + 1)
    n, form, t = rng.integers(3, 9), rng.integers(4), demo.turn(48)
    if form == 0:  # blob
        radius = 1 + sum(
            rng.uniform(-0.3, 0.3) / k * np.cos(k * t + rng.uniform(0, 6.3)) for k in range(2, 6)
        )
    elif form == 1:  # star
        t = demo.turn(2 * n)
        radius = np.where(np.arange(2 * n) % 2, rng.uniform(0.4, 0.7), 1)
    elif form == 2:  # polygon
        t = np.sort(demo.turn(n) + rng.uniform(-0.3, 0.3, n))
        radius = rng.uniform(0.75, 1, n)
    else:  # ellipse
        radius = 1
    shape = demo.ellipse(radius, radius, t) * [1, rng.uniform(0.35, 1)]
    unit = rng.uniform(30, 58) / 128 * demo.CANVAS
    shape = demo.placement(rng, unit, tilt=180)(shape) + rng.uniform(0.3, 0.7, 2) * demo.CANVAS

    image = demo.background(rng)
    saturation, value = rng.uniform(0.2, 1), rng.uniform(0.6, 1)
    if colour == len(HUES):
        first, value = rgb(0, 0.03, rng.uniform(0.05, 1)), rng.uniform(0.3, 0.9)
        second = rgb(0, 0.03, (value + 0.5) % 1)
    else:
        hue = HUES[colour] + rng.uniform(-0.02, 0.02)
        first = rgb(hue, saturation, value)
        second = rgb(hue, saturation * rng.uniform(0.3, 1), value * rng.uniform(0.2, 0.5))
        if rng.random() < 0.3:
            second = rgb(hue, 0.1, 1)
    period, angle = rng.uniform(9, 20) * demo.SCALE, rng.uniform(0, np.pi)
    pattern = TEXTURES[texture](*demo.periods(rng, period, angle))
    demo.paint(image, demo.mask_of(shape), shape, pattern, (first, second))
    return demo.finish(rng, image, demo.mask_of(shape), demo.mask_of())


def pretrain(folder: Path, out: Path, epochs: int = 12) -> None:
    """Draws 8,000 shapes, trains VGG16-GAP at an eighth of its width with batch norm, writes its features.

    Batch norm helps a training from scratch. It is folded into the convolutions, in half precision.
    """
    plan = demo.Plan({"train": 8000}, draw_shape, CLASSES, seed=1)
    demo.draw_data_set(folder / "shapes", folder / "lists", plan)
    split = read_split(folder / "lists" / "train", folder / "shapes", "shapes")
    device = utils.resolve_device("auto")
    utils.seed_everything(0)
    net = VGG16GAP(CLASSES, stride=8, width=0.125)
    net.features, net.conv6 = with_batch_norm(net.features), with_batch_norm(net.conv6)
    net.to(device, memory_format=torch.channels_last)
    sgd = dict(lr=3e-2, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True)
    optimizer = torch.optim.SGD(net.parameters(), **sgd)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [8, 10], gamma=0.2)
    loader = train_loader(TrainImages(split, 128, 112, seed=0), 32, workers=0)
    for epoch in range(1, epochs + 1):
        loader.batch_sampler.set_epoch(epoch)
        for images, labels in utils.progress(loader, f"epoch {epoch}/{epochs}", len(loader), "steps"):
            with utils.autocast(device, "bf16"):
                logits = net.classify(net.conv6(net.features(to_input(images, device))))
            optimizer.zero_grad()
            loss = nnf.cross_entropy(logits.float(), labels.to(device))
            loss.backward()
            optimizer.step()
        schedule.step()
        print(f"epoch {epoch}/{epochs}: loss of the last batch {loss.item():.4f}", flush=True)
    state = {f"features.{name}": x.half().contiguous() for name, x in folded(net.features).items()}
    utils.save_checkpoint(out, state)


def with_batch_norm(layers: nn.Sequential) -> nn.Sequential:
    pairs = ([x, nn.BatchNorm2d(x.out_channels)] if isinstance(x, nn.Conv2d) else [x] for x in layers)
    return nn.Sequential(*(layer for pair in pairs for layer in pair))


@torch.no_grad()
def folded(layers: nn.Sequential) -> dict[str, torch.Tensor]:
    """The state with batch norm folded into the convolutions: (w k) * x + (b - mean) k + beta."""
    for conv, norm in pairwise(layers):
        if isinstance(norm, nn.BatchNorm2d):
            k = norm.weight / torch.sqrt(norm.running_var + norm.eps)
            conv.weight *= k[:, None, None, None]
            conv.bias.copy_((conv.bias - norm.running_mean) * k + norm.bias)
    return nn.Sequential(*(layer for layer in layers if not isinstance(layer, nn.BatchNorm2d))).state_dict()


if __name__ == "__main__":
    with utils.one_line_errors():
        parser = utils.Parser(description=__doc__.splitlines()[0])
        parser.add_argument("folder", type=Path, help="where the shapes are drawn")
        parser.add_argument("out", type=Path, help="weights file to write")
        pretrain(**vars(parser.parse_args()))
