"""ResNet50 against numbers that the authors' release and the code of Choe et al. gave, in float64."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bridge_wsol import config
from bridge_wsol.cam import normalize
from bridge_wsol.methods import METHODS
from bridge_wsol.optim import build_optimizer

HERE = Path(__file__).parent
pytestmark = pytest.mark.slow


def make(name: str, **values):
    """A method on ResNet50 with stride 8 and ten classes, in float64."""
    of_preset = {key: value for key, (value, _) in config.preset_values("CUB", "resnet50", name).items()}
    settings = of_preset | {"arch": "resnet50", "method": name} | values
    return METHODS[name](SimpleNamespace(**settings), 10).double()


def filled(rng: np.random.RandomState, name: str, shape: tuple[int, ...]) -> np.ndarray:
    if len(shape) == 4:
        return rng.randn(*shape) * np.sqrt(2 / np.prod(shape[1:]))
    if len(shape) == 2:
        return rng.randn(*shape) * 0.01
    if name.endswith("bn3.weight"):
        return 0.25 + 0.05 * rng.rand(*shape)
    return 1 + 0.1 * rng.randn(*shape) if name.endswith("weight") else 0.05 * rng.randn(*shape)


def test_six_steps_of_the_authors_training():
    """Losses, terms, weights, running statistics and maps of the authors' code. Two steps are warm."""
    expected = json.loads((HERE / "authors_training_resnet50.json").read_text())
    method, rng = make("bridge", lr=0.002, lr_new=0.002, p=1.0, warm_epochs=2), np.random.RandomState(13)
    net = method.net
    with torch.no_grad():
        for name, parameter in sorted(net.named_parameters()):
            parameter.copy_(torch.from_numpy(filled(rng, name, tuple(parameter.shape))))
    images, labels = torch.from_numpy(rng.randn(24, 3, 64, 64)), torch.from_numpy(rng.randint(0, 10, 24))

    optimizer = build_optimizer(method.train(), method.config)
    for step, of_step in enumerate(expected["steps"]):
        batch = slice(4 * step, 4 * step + 4)
        terms, _ = method(images[batch], labels[batch], epoch=step + 1)
        loss = sum(weight * value for weight, value in terms.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found = {"loss": loss.item()} | {name: value.item() for name, (_, value) in terms.items()}
        assert found.keys() == (of_step.keys() if step >= 2 else {"loss", "l_ce", "l_drop"})
        assert found == pytest.approx({key: of_step[key] for key in found}, rel=1e-9, abs=1e-9), step

    norms = {name: parameter.norm().item() for name, parameter in net.named_parameters()}
    assert norms == pytest.approx(expected["norms"], rel=1e-9)
    statistics = {
        name: value.norm().item() for name, value in net.named_buffers() if name in expected["running"]
    }
    assert statistics == pytest.approx(expected["running"], rel=1e-9)
    with torch.inference_mode():
        _, maps = method.eval().predict(images[:4], labels[:4])
    assert normalize(maps).mean((1, 2)).tolist() == pytest.approx(expected["cams"], rel=1e-9)


@pytest.mark.parametrize(
    "name, values, side",
    [("acol", {}, 64), ("adl_0", {"adl_rate": 0.0}, 64), ("adl_1", {"adl_rate": 1.0}, 64), ("spg", {}, 224)],
)
def test_losses_and_gradients_of_the_common_code(name, values, side):
    expected = json.loads((HERE / "common_code_losses_resnet50.json").read_text())[name]
    method, rng = make(name.split("_")[0], **values), np.random.RandomState(17)
    with torch.no_grad():
        for parameter in method.net.parameters():
            shape = tuple(parameter.shape)
            of_bias_and_norm = len(shape) == 1
            value = 0.5 + 0.1 * rng.rand(*shape) if of_bias_and_norm else filled(rng, "", shape)
            parameter.copy_(torch.from_numpy(value))
    images, labels = torch.from_numpy(rng.randn(2, 3, side, side)), torch.from_numpy(rng.randint(0, 10, 2))
    terms, _ = method.train()(images, labels, epoch=1)
    loss = sum(weight * value for weight, value in terms.values())
    loss.backward()
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-9)
    norms = [p.grad.norm().item() for p in method.net.parameters() if p.grad is not None]
    assert norms == pytest.approx(expected["gradient_norms"], rel=1e-9, abs=1e-12)
