"""All methods: the defining property of each, computed by hand or with plain code of the test."""

import copy
import functools
import json
import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
from conftest import REPOSITORY, results, run
from test_losses import by_the_formulas
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bridge_wsol import evaluation
from bridge_wsol.cam import NORMALIZATIONS, normalize, resize
from bridge_wsol.config import preset_values
from bridge_wsol.data import to_input
from bridge_wsol.losses import alignment_losses, consistency_loss
from bridge_wsol.methods import CAM, METHODS, Bridge
from bridge_wsol.models import load_weights
from bridge_wsol.optim import build_optimizer
from bridge_wsol.reproduce import baselines, demo
from bridge_wsol.reproduce.baselines import attention_based_dropout, hide, mix, seeds, thresholded_average
from bridge_wsol.utils import autocast

COMPARED = ("acol", "adl", "eil", "cutmix", "pas", "calm", "has", "spg")
LABELS = torch.tensor([2, 0])
EVALUATE = "--device cpu --workers 0 --batch-size 8"


class BridgeCutMix(baselines.CutMix, Bridge):
    """Two methods combined by inheritance; without a name, it is not in METHODS."""


# Networks and images are float64 unless a test states another type. The tolerance detects float32.
close = functools.partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)


def images(n=2, side=64, dtype=torch.float64):
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(0)).to(dtype)


def make(name, arch="vgg16", num_classes=3, dtype=torch.float64, **values):
    """A method (or class) with CUB's preset and the network of seed 0, VGG16 at 1/16 of its width."""
    cls = METHODS.get(name, name)
    config = {key: value.default_for("CUB", arch) for key, value in cls.all_values().items()}
    config |= {key: value for key, (value, _) in preset_values("CUB", arch, "bridge").items()}
    config |= {"arch": arch, "width": 1 / 16 if arch == "vgg16" else 1.0}
    assert values.keys() <= config.keys()
    torch.manual_seed(0)
    return cls(SimpleNamespace(**config | values), num_classes).to(dtype)


def total(terms):
    return sum(weight * value for weight, value in terms.values())


def gradients(loss, net):
    """{name: gradient} of the parameters that the loss reaches."""
    found = torch.autograd.grad(loss, list(net.parameters()), allow_unused=True, retain_graph=True)
    return {name: g for (name, _), g in zip(net.named_parameters(), found) if g is not None}


def calls_of(net, *names):
    """{name: number of calls} of these modules, counted from now on."""
    counts = Counter()
    for name in names:
        net.get_submodule(name).register_forward_hook(lambda *_, name=name: counts.update([name]))
    return counts


OWN_LAYERS = [(name, "resnet50") for name in ("acol", "adl", "eil", "calm", "spg")]


LEARNING = [*((name, "vgg16") for name in (*COMPARED, BridgeCutMix)), ("adl", "resnet50")]
LEARNING += [pytest.param(*pair, marks=pytest.mark.slow) for pair in OWN_LAYERS if pair[0] != "adl"]


@pytest.mark.parametrize("name, arch", LEARNING)
def test_every_layer_learns_and_the_pretrained_ones_have_torchvision_s_names(name, arch):
    dtype = torch.float64 if arch == "vgg16" else torch.float32
    method, inputs = make(name, arch, dtype=dtype), images(side=64 if arch == "vgg16" else 32, dtype=dtype)
    with torch.device("meta"):  # shapes alone
        cam = make("cam", arch)
    for key, value in cam.net.named_parameters():
        if key.startswith(cam.net.pretrained_names):
            assert method.net.get_parameter(key).shape == value.shape, key
    terms, logits = method.train()(inputs, LABELS, 70)
    assert {value.dtype for _, value in terms.values()} == {logits.dtype} == {dtype}
    found = gradients(total(terms), method)
    assert found.keys() == {name for name, _ in method.named_parameters()}
    for parameter, gradient in found.items():
        assert gradient.isfinite().all() and gradient.abs().sum() > 0, parameter
    with torch.inference_mode():
        logits, maps = method.eval().predict(inputs)
    assert logits.shape == (2, 3) and maps.shape == (2, 4, 4) and maps.dtype == logits.dtype == dtype


@torch.inference_mode()
@pytest.mark.parametrize("name", (*METHODS, BridgeCutMix))
def test_maps_without_labels_are_those_of_the_predictions_and_weights_load(name):
    other = {"calm_map": "joint"} if name == "calm" else {}  # p(z|x) is the same for all classes
    method, again = make(name, **other).eval(), make(name, **other).eval()
    for parameter in method.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    logits, maps = method.predict(images())
    assert torch.equal(maps, method.predict(images(), logits.argmax(1))[1])
    assert not torch.equal(maps, method.predict(images(), (logits.argmax(1) + 1) % 3)[1])
    load_weights(again.net, method.net.state_dict(), "checkpoint")
    for found, expected in zip(again.predict(images()), (logits, maps)):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", (*METHODS, BridgeCutMix))
def test_float32_gives_what_float64_gives_and_autocast_keeps_losses_and_maps_float32(name):
    def computed(dtype, amp=False):
        method = make(name, dtype=dtype, p=1.0)  # p = 1: the dropout draws other numbers in float32
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, amp):
            terms, logits = method.train()(images(dtype=dtype), LABELS, 70)
            with torch.no_grad():
                predicted, maps = method.eval().predict(images(dtype=dtype), LABELS)
        return maps, *(value for _, value in terms.values()), logits, predicted

    for double, single in zip(computed(torch.float64), computed(torch.float32)):
        torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-5)
    assert {value.dtype for value in computed(torch.float32, amp=True)[:-2]} == {torch.float32}


class OneDevice(TorchDispatchMode):
    """Within FakeTensorMode: fails where a tensor of the CPU meets one of a GPU, or is made of it.

    Tensors of the CPU alone are real: draws can be read. Reading a value of a GPU raises an error. A copy to
    the GPU must not make the CPU wait.
    """

    def __torch_dispatch__(self, function, _, inputs=(), options=None):
        options = options or {}
        used = {x.device.type for x in tree_leaves((inputs, options)) if isinstance(x, torch.Tensor)}
        if used | {torch.device(options.get("device") or "cpu").type} == {"cpu"}:
            with unset_fake_temporarily():
                return function(*inputs, **options)
        output = function(*inputs, **options)
        found = used | {x.device.type for x in tree_leaves(output) if isinstance(x, torch.Tensor)}
        copied = used == {"cpu"} and options.get("non_blocking")
        assert found == {"cuda"} or copied, f"{function} on {found}"
        return output


PATHS = [(name, arch, {}, "bf16") for arch in ("vgg16", "resnet50") for name in METHODS]
PATHS += [(name, "vgg16", {}, "off") for name in METHODS]
PATHS += [pytest.param(name, "resnet50", {}, "off", marks=pytest.mark.slow) for name in METHODS]
PATHS += [("adl", "vgg16", {"adl_rate": 0.0}, "bf16"), ("bridge", "vgg16", {"norm_class": "target"}, "bf16")]
PATHS += [("calm", "vgg16", {"calm_loss": "ml", "calm_map": "joint"}, "bf16")]


@pytest.mark.parametrize("name, arch, values, amp", PATHS)
def test_no_tensor_of_the_cpu_takes_part_on_a_gpu(name, arch, values, amp, monkeypatch):
    """Shapes, types and devices of a GPU alone: there need not be one."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    device, pixels = torch.device("cuda:0"), torch.zeros(3, 3, 64, 64, dtype=torch.uint8)
    with torch.device("meta"):
        method = make(name, arch, dtype=torch.float32, **values)
    with FakeTensorMode(allow_non_fake_inputs=True):
        method.to_empty(device=device)
        with OneDevice():
            inputs, labels = to_input(pixels, device), torch.arange(3).to(device, non_blocking=True)
            with autocast(device, amp):
                terms, logits = method.train()(inputs, labels, 70)
                with torch.no_grad():
                    predicted, maps = method.eval().predict(inputs, None if amp == "off" else labels)
            maps = resize(maps, 224, method.upsampling)
            ends = [maps, *(normalize(maps, x) for x in NORMALIZATIONS)]
            ends += [value for _, value in terms.values()]
        assert {(x.device, x.dtype) for x in ends} == {(device, torch.float32)}
        assert {x.device for x in (logits, predicted)} == {device}
        if name in ("cam", "bridge"):  # others have pooled in float32
            assert logits.dtype == (torch.bfloat16 if amp == "bf16" else torch.float32)


ALL = [*((name, "vgg16") for name in METHODS), ("bridge", "resnet50")]
ALL += [pytest.param(*pair, marks=pytest.mark.slow) for pair in OWN_LAYERS]


@pytest.mark.parametrize("name, arch", ALL)
def test_every_convolution_gets_its_input_channels_last(name, arch):
    """Else it converts the input in every step."""
    method, seen = make(name, arch, dtype=torch.float32).to(memory_format=torch.channels_last), {}

    def look(key, _, inputs):
        seen[key] = inputs[0].is_contiguous(memory_format=torch.channels_last) and seen.get(key, True)

    for key, layer in method.named_modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_pre_hook(functools.partial(look, key))
    inputs = to_input(torch.zeros(2, 3, 64, 64, dtype=torch.uint8), torch.device("cpu"))
    with torch.no_grad():
        method.train()(inputs, LABELS, 70)
    assert seen and all(seen.values()), seen


SLOW = [f"{name} --dataset {dataset}" for dataset in ("demo", "CUB10") for name in METHODS]
RUNS = [*COMPARED, *(pytest.param(flags, marks=pytest.mark.slow) for flags in SLOW)]


@pytest.mark.parametrize("run_of", RUNS)
def test_a_run_evaluates_to_the_same_table(run_of, tiny, request, monkeypatch, tmp_path, capsys):
    """Also with the demo's own preset and pretrained layers, on fewer images, and on ten classes of CUB."""
    flags, folder, name = f"{tiny} --method {run_of}", tmp_path / "run", run_of.split()[0]
    if "demo" in run_of:
        monkeypatch.setattr(demo, "DEMO_COUNTS", {"train": 64, "val": 16, "test": 32})
        flags = f"--method {run_of} --device cpu --data-root {tmp_path}/d --lists {tmp_path}/l --batch-size 8"
    elif "CUB10" in run_of:
        flags += f" --data-root {request.getfixturevalue('real_data')} --lists {REPOSITORY}/data_splits"
    run("train", f"{flags} --epochs 1 --out {folder}")
    before, table = results(folder, "results_last_test.json"), capsys.readouterr().out
    run("evaluate", f"{folder} {EVALUATE} --checkpoint last")
    assert results(folder, "results_last_test.json") == before
    assert capsys.readouterr().out.rsplit("written", 1)[0].split("\n", 1)[1] in table
    assert before["method"] == name and before["metrics"]["max_box_acc_v2"]["mean"] is not None
    assert METHODS[name].all_values().keys() <= results(folder, "config.json")["config"].keys()


def test_cam_and_bridge_by_the_formulas():
    method = make("bridge", p=1.0)
    (terms, _), c, net = method.train()(images(), LABELS, 70), method.config, method.net
    shared = net.features[:23](images())
    strong = shared.detach().mean(1, keepdim=True)
    dropped = shared * (strong <= c.gamma * strong.amax((2, 3), keepdim=True))
    f, f_dropped = (net.conv6(net.features[23:](x)) for x in (shared, dropped))
    scores = torch.einsum("nchw,kc->nkhw", f, net.fc.weight)  # N x K x h x w
    logits = scores.mean((2, 3)) + net.fc.bias
    l_sim, l_norm = by_the_formulas(f, net.fc.weight, LABELS, c.tau_fg, c.tau_bg, c.norm_class)
    expected = {
        "l_ce": (1.0, (logits.exp().sum(1).log() - logits[[0, 1], LABELS]).mean()),
        "l_drop": (c.lambda_drop, (f - f_dropped).abs().mean()),
        "l_sim": (c.lambda_sim, l_sim),
        "l_norm": (c.lambda_norm, l_norm),
    }
    close(terms, expected)
    for name, (_, term) in terms.items():
        close(gradients(term, net), gradients(expected[name][1], net))
    cam = make("cam")  # the same seed, the same network
    assert cam.train()(images(), LABELS, 70)[0].keys() == {"l_ce"}
    for either in (method, cam):
        close(either.eval().predict(images(), LABELS), (logits, scores[[0, 1], LABELS]))
    method.train().config.warm_epochs, losses = 2, lambda epoch: [*method(images(), LABELS, epoch)[0]]
    assert losses(2) == ["l_ce", "l_drop"] and losses(3) == ["l_ce", "l_drop", "l_sim", "l_norm"]
    for alone in ("lambda_sim", "lambda_norm"):  # an ablation keeps the other loss
        c.lambda_sim, c.lambda_norm = (float(name == alone) for name in ("lambda_sim", "lambda_norm"))
        found = method(images(), LABELS, 3)[0]
        assert [found[name][0] for name in ("l_sim", "l_norm")] == [c.lambda_sim, c.lambda_norm]
    c.lambda_drop = 0
    assert losses(3) == ["l_ce", "l_sim", "l_norm"]
    c.lambda_drop, c.lambda_sim, c.lambda_norm = 1, 0, 0
    assert losses(3) == ["l_ce", "l_drop"]


DEFAULTS = {"acol_delta": 0.7, "adl_gamma": 0.8, "adl_rate": 0.75, "eil_gamma": 0.7, "eil_lambda": 1.0}
DEFAULTS |= {"cutmix_beta": 1.0, "cutmix_p": 1.0, "pas_theta": 0.1, "pas_nwc": "on"}
DEFAULTS |= {"calm_loss": "em", "calm_map": "location", "has_cells": [0, 16, 32, 44, 56], "has_p": 0.5}
DEFAULTS |= {"spg_h1": 0.7, "spg_l1": 0.01, "spg_h2": 0.5, "spg_l2": 0.05, "spg_h3": 0.7, "spg_l3": 0.1}
OF_ILSVRC = {"adl_gamma": 0.9, "calm_map": "joint"}


@pytest.mark.parametrize("dataset, arch, other", [("CUB", "vgg16", {}), ("ILSVRC", "resnet50", OF_ILSVRC)])
def test_the_defaults_are_those_of_their_sources(dataset, arch, other):
    values = [pair for name in COMPARED for pair in METHODS[name].all_values().items()]
    assert {key: value.default_for(dataset, arch) for key, value in values} == DEFAULTS | other


@pytest.mark.parametrize("delta", [0.6, 1.0])
def test_acol_erases_for_b_and_fuses_by_the_maximum(delta):
    method, seen = make("acol", acol_delta=delta), {}
    for name in "ab":
        hook = lambda _, inputs, output, name=name: seen.update({name: (inputs[0], output)})  # noqa: E731
        method.net.get_submodule(f"head_{name}").register_forward_hook(hook)
    terms, logits = method.train()(images(), LABELS, 1)
    (x, s_a), (erased, s_b) = seen["a"], seen["b"]
    attention = torch.stack([s[[0, 1], LABELS] for s in (s_a, s_b)])  # 2 heads x N x h x w
    attention = attention - attention.amin((2, 3), keepdim=True)
    attention = attention / attention.amax((2, 3), keepdim=True)
    zeros = attention[0] >= delta
    # With delta 1, the maximum of each of the two images.
    assert zeros.sum() == 2 if delta == 1 else 2 < zeros.sum() < zeros.numel()
    assert torch.equal(erased, x * ~zeros[:, None])
    for term, s in (("l_a", s_a), ("l_b", s_b)):
        close(terms[term], (1.0, nnf.cross_entropy(s.mean((2, 3)), LABELS)))
    assert torch.equal(logits, s_a.mean((2, 3)))
    # The loss of B trains head B and the backbone, but not head A: the mask has no gradient.
    assert {name.split(".")[0] for name in gradients(terms["l_b"][1], method.net)} == {"features", "head_b"}
    with torch.inference_mode():
        close(method.eval().predict(images(), LABELS), (logits, attention.amax(0)))


@pytest.mark.parametrize("stride", [8, 16])
def test_acol_s_vgg16_pools_and_its_heads(stride):
    net, baseline = (make(name, stride=stride).net for name in ("acol", "cam"))
    plain = images(side=32)
    for layer in baseline.features:
        plain = nnf.max_pool2d(plain, 3, 2, 1) if isinstance(layer, nn.MaxPool2d) else layer(plain)
    net.features.load_state_dict(baseline.features.state_dict())
    found = net.pool(net.after_dropout(net.before_dropout(images(side=32))))
    close(found, nnf.avg_pool2d(nnf.max_pool2d(plain, 3, 1, 1), 3, 1, 1))
    shapes = [layer.weight.shape for layer in net.head_a if isinstance(layer, nn.Conv2d)]
    assert shapes == [(64, 32, 3, 3), (64, 64, 3, 3), (3, 64, 1, 1)]


def test_attention_based_dropout_by_hand():
    z = torch.tensor([[[1.0, 2.0], [0.0, 4.0]], [[1.0, 2.0], [2.0, 4.0]]], dtype=torch.float64)
    z = z.expand(3, 2, 2, 2).clone().requires_grad_()
    # Channel means 1, 2, 1, 4. With gamma = 0.5 the threshold is 2; a value equal to it is dropped.
    dropped = attention_based_dropout(z, gamma=0.5, rate=1.0)
    keep = torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    close(dropped, z * keep)
    close(torch.autograd.grad(dropped.sum(), z)[0], keep.expand_as(z))

    weighed = attention_based_dropout(z, gamma=0.5, rate=0.0)
    importance = 1 / (1 + (-torch.tensor([[1.0, 2.0], [1.0, 4.0]], dtype=torch.float64)).exp())
    close(weighed, z * importance)
    through_the_map = z.sum(1, keepdim=True) * importance * (1 - importance) / 2  # two channels
    close(torch.autograd.grad(weighed.sum(), z)[0], importance + through_the_map.expand_as(z))

    # One draw for the whole batch.
    torch.manual_seed(0)
    z, masks = torch.rand(16, 4, 5, 5) + 0.5, 0
    for _ in range(400):
        has_zeros = (attention_based_dropout(z, gamma=0.9, rate=0.75) == 0).flatten(1).any(1)
        assert has_zeros.all() or not has_zeros.any()
        masks += int(has_zeros.all())
    assert 0.68 < masks / 400 < 0.82


@pytest.mark.parametrize("arch, stride, rate", [("vgg16", 8, 0.0), ("vgg16", 16, 1.0), ("resnet50", 8, 1.0)])
def test_places_of_adl_and_identity_in_eval_mode(arch, stride, rate):
    method, net = make("adl", arch, stride=stride, adl_rate=rate), make("cam", arch, stride=stride).net
    if arch == "vgg16":  # torchvision's pool3, ReLU of conv4_3, ReLU of conv5_3
        layers, places, gamma = [*net.features], (16, 22, 29), 0.8
    else:  # the first block of layer3, the first and the last of layer4
        layers, places, gamma = [net.conv1, net.bn1, net.relu, net.maxpool], (11, 17, 19), 0.9
        layers += [*net.layer1, *net.layer2, *net.layer3, *net.layer4]
    for training in (True, False):
        net.train(training)
        x = images(side=32)
        for i, layer in enumerate(layers):
            x = layer(x)
            if training and i in places:
                x = attention_based_dropout(x, gamma, rate)
        x = net.conv6(x) if arch == "vgg16" else x
        close(method.train(training).net(images(side=32)), net.fc(x.mean((2, 3))))


@pytest.mark.parametrize("stride", [8, 16])
def test_eil_s_two_passes_share_weights_and_its_mask_has_no_gradient(stride):
    method = make("eil", stride=stride, eil_lambda=0.5)
    net, counts = method.net, calls_of(method.net, "features.22", "features.23", "features.24", "conv6", "fc")
    terms, logits = method.train()(images(), LABELS, 1)
    assert [*counts.values()] == [1, 1, 2, 2, 2]
    z = net.features[:24](images())
    constant = z.detach().mean(1, keepdim=True)
    keep = constant < 0.7 * constant.flatten(1).max(1).values[:, None, None, None]
    assert 0 < keep.float().mean() < 1
    rest = nn.Sequential(*net.features[24:], net.conv6, nn.AdaptiveAvgPool2d(1), nn.Flatten(), net.fc)
    expected = nnf.cross_entropy(rest(z), LABELS) + 0.5 * nnf.cross_entropy(rest(z * keep), LABELS)
    close(total(terms), expected)
    close(gradients(total(terms), net), gradients(expected, net))
    close(logits, rest(z))
    assert method.eval().passes(images()).dropped is None  # the clean pass only


def test_eil_in_resnet50_splits_after_layer3_and_keeps_the_statistics_of_the_clean_pass():
    method, plain = (make(name, "resnet50", dtype=torch.float32).train() for name in ("eil", "cam"))
    plain.net(images(dtype=torch.float32))
    counts = calls_of(method.net, "layer3.5", "layer4.0")
    terms, _ = method(images(dtype=torch.float32), LABELS, 1)
    assert [*counts.values()] == [1, 2]
    assert not torch.allclose(terms["l_ce"][1], terms["l_erased"][1])
    torch.testing.assert_close(dict(method.net.named_buffers()), dict(plain.net.named_buffers()))


def test_cutmix_s_lambda_is_the_share_of_kept_pixels(monkeypatch):
    inputs = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 3, 20, 30).contiguous()
    before, areas, corners = inputs.clone(), set(), torch.zeros(20, 30)
    torch.manual_seed(0)
    for _ in range(300):
        mixed, other, lam = mix(inputs, beta=1.0)
        assert torch.equal(inputs, before) and sorted(other.tolist()) == list(range(6))
        foreign = mixed != before
        for n in range(6):
            if other[n] != n:
                assert foreign[n].float().mean() == pytest.approx(1 - lam)
                assert (mixed[n][foreign[n]] == other[n]).all()
                assert torch.equal(foreign[n], foreign[(other != torch.arange(6)).nonzero()[0, 0]])
                corners += foreign[n, 0] / 300
        areas.add(round(lam, 4))
    assert len(areas) > 100 and (corners > 0).all()  # every pixel is replaced at times, in the corners, too
    monkeypatch.setattr(torch.distributions.Beta, "sample", lambda self: torch.tensor(0.75))
    kept = [mix(inputs, beta=1.0)[2] for _ in range(100)]
    # The rectangle has half of each side; at most half of that is clipped.
    assert min(kept) == 1 - 10 * 15 / 600 and max(kept) <= 1 - 5 * 7 / 600


@pytest.mark.parametrize("name", ["cutmix", BridgeCutMix])
def test_cutmix_weights_each_loss_over_both_labels_in_one_pass(name):
    method, labels = make(name).train(), torch.tensor([0, 1, 2, 1])
    counts, c = calls_of(method.net, "features.0", "fc"), method.config
    torch.manual_seed(2)
    terms, logits = method(images(4), labels, 70)
    assert [*counts.values()] == [1, 1]
    torch.manual_seed(2)
    torch.rand(())  # the draw that decides whether to mix
    mixed, other, lam = mix(images(4), 1.0)
    assert 0.1 < lam < 0.9 and (labels[other] != labels).any()
    passes = method.passes(mixed)  # its dropout has the same draws
    close(logits, passes.logits)

    def both(loss):
        return lam * loss(labels) + (1 - lam) * loss(labels[other])

    def aligned(y):
        pair = alignment_losses(passes.features, method.net.fc.weight, y, c.tau_fg, c.tau_bg, c.norm_class)
        return torch.stack(pair)

    expected = {"l_ce": (1.0, both(lambda y: nnf.cross_entropy(passes.logits, y)))}
    if name is BridgeCutMix:
        l_sim, l_norm = both(aligned)
        expected["l_drop"] = c.lambda_drop, consistency_loss(passes.features, passes.dropped)
        expected |= {"l_sim": (c.lambda_sim, l_sim), "l_norm": (c.lambda_norm, l_norm)}
        assert list(method(images(4), labels, 1)[0]) == ["l_ce", "l_drop"]  # the warm stage
        assert not torch.allclose(aligned(labels), aligned(labels[other]))
    close(terms, expected)


@torch.no_grad()
def test_cutmix_with_probability():
    method, inputs = make("cutmix", cutmix_p=0.3), images(side=32)
    expected = make("cam").net(inputs)
    mixed = sum(not torch.equal(method(inputs, LABELS, 1)[1], expected) for _ in range(150))
    # Half of the permutations of two images is the identity: of 0.3 of the batches, some stay as they were.
    assert 0.12 < mixed / 150 < 0.42


def test_has_trains_on_images_with_hidden_cells():
    torch.manual_seed(0)
    inputs = torch.rand(200, 3, 10, 14) + 1
    hidden, count = hide(inputs, [4], p=0.3) == 0, 0
    for rows in (slice(0, 4), slice(4, 8), slice(8, 10)):
        for columns in (slice(0, 4), slice(4, 8), slice(8, 12), slice(12, 14)):
            cell = hidden[:, :, rows, columns].flatten(1)
            assert (cell.all(1) | ~cell.any(1)).all()
            count += int(cell.all(1).sum())
    assert 0.27 < count / (200 * 12) < 0.33
    assert torch.equal(hide(inputs, [4], 0.0), inputs) and torch.equal(hide(inputs, [0], 1.0), inputs)
    whole = (hide(inputs, [0, 14], 1.0) == 0).flatten(1)  # each image draws its own side
    assert (whole.all(1) | ~whole.any(1)).all() and 60 < whole.all(1).sum() < 140

    method = make("has", has_cells=[8], has_p=0.5)
    torch.manual_seed(3)
    terms, logits = method(images(), LABELS, 1)
    torch.manual_seed(3)
    assert torch.equal(logits, method.net(hide(images(), [8], 0.5))) and terms.keys() == {"l_ce"}
    close(terms["l_ce"], (1.0, nnf.cross_entropy(logits, LABELS)))


def test_thresholded_average_by_hand():
    channels = [[1.0, 2.0, 10.0, 0.0], [4.0, 4.0, 4.0, 4.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 3.0, 0.0]]
    features = torch.tensor(channels).view(1, 4, 2, 2).requires_grad_()
    # Thresholds 1, 0.4, 0, 0.3; the value 1 of the first channel is not above its threshold.
    pooled = thresholded_average(features, 0.1)
    torch.testing.assert_close(pooled, torch.tensor([[6.0, 4.0, 0.0, 3.0]]))
    pooled.sum().backward()
    expected = torch.tensor([[0, 0.5, 0.5, 0], [0.25] * 4, [0] * 4, [0, 0, 1, 0]])
    torch.testing.assert_close(features.grad.view(4, 4), expected)
    torch.testing.assert_close(thresholded_average(features, 0.0), torch.tensor([[13 / 3, 4.0, 0.0, 3.0]]))
    torch.testing.assert_close(thresholded_average(features, -1.0), features.mean((2, 3)))


@torch.inference_mode()
def test_pas_pools_for_the_logits_and_clamps_weights_for_the_map_only():
    method = make("pas").eval()
    passes, weight = CAM.passes(method, images()), method.net.fc.weight
    means = [[m[m > 0.1 * m.max()].mean() if m.max() > 0 else m.max() for m in f] for f in passes.features]
    expected = torch.tensor(means, dtype=torch.float64) @ weight.T + method.net.fc.bias
    logits, maps = method.predict(images(), LABELS)
    close(logits, expected)
    close(method(images(), LABELS, 1)[0]["l_ce"][1], nnf.cross_entropy(expected, LABELS))
    assert not torch.allclose(logits, passes.logits)
    for n, label in enumerate(LABELS):
        positive = torch.where(weight[label] > 0, weight[label], 0)
        close(maps[n], (positive[:, None, None] * passes.features[n]).sum(0))
    method.config.pas_nwc, method.config.pas_theta = "off", -1.0  # without both, the CAM baseline
    close(method.predict(images(), LABELS), make("cam").predict(images(), LABELS))


def calm_factors(net, inputs):
    """(p(y|x,z), p(z|x)) by the paper's formulas."""
    features = net.after_dropout(net.before_dropout(inputs))
    scores = torch.einsum("kc,nchw->nkhw", net.fc.weight, features) + net.fc.bias[:, None, None]
    location = torch.einsum("c,nchw->nhw", net.location.weight[0, :, 0, 0], features) + net.location.bias
    s = (1 + location.exp()).log()
    return scores.exp() / scores.exp().sum(1, keepdim=True), s / s.sum((1, 2), keepdim=True)


@torch.inference_mode()
def test_calm_s_joint_is_a_distribution_over_classes_and_locations():
    method = make("calm", calm_map="joint").eval()
    classes, locations = calm_factors(method.net, images())
    joint = classes * locations[:, None]
    close(joint.sum((1, 2, 3)), torch.ones(2, dtype=torch.float64))
    logits = joint.sum((2, 3)).log()
    close(method.predict(images(), LABELS), (logits, joint[[0, 1], LABELS]))
    method.config.calm_map = "location"
    for labels in (LABELS, None):
        close(method.predict(images(), labels), (logits, joint.sum(1)))
    assert method.upsampling == "bilinear" and CAM.upsampling == "bicubic"


@pytest.mark.parametrize("loss", ["em", "ml"])
def test_calm_s_losses_and_their_detached_part(loss):
    method = make("calm", calm_loss=loss).train()
    net = method.net
    nn.init.normal_(net.location.weight, std=0.3)
    nn.init.normal_(net.fc.weight, std=0.3)
    terms, logits = method(images(), LABELS, 1)
    classes, locations = calm_factors(net, images())
    joint = classes[[0, 1], LABELS] * locations
    responsibilities = (joint / (joint.sum((1, 2), keepdim=True) + 1e-10)).detach()
    em, ml = -(responsibilities * joint.log()).sum((1, 2)).mean(), -joint.sum((1, 2)).log().mean()
    expected = em if loss == "em" else ml
    close(terms, {f"l_{loss}": (1.0, expected)})
    close(gradients(total(terms), net), gradients(expected, net))
    close(logits, (classes * locations[:, None]).sum((2, 3)).log())
    with torch.no_grad():  # a location without probability
        net.location.bias.fill_(-1000)  # softplus underflows to zero
        net.location.weight[0, 0] = 1e6
    value = total(method(images(), LABELS, 1)[0])
    assert value.isfinite() and all(g.isfinite().all() for g in gradients(value, net).values())


HEADS = {"acol": ("head_a", "head_b"), "spg": ("a3", "a4", "b1", "b2", "b", "c")}


@pytest.mark.parametrize("name, arch, n", [("acol", "vgg16", 6), ("spg", "vgg16", 9), ("spg", "resnet50", 7)])
def test_new_convolutions_start_from_xavier_s_uniform_distribution(name, arch, n):
    net = make(name, arch, dtype=torch.float32).net
    modules = [module for head in HEADS[name] for module in getattr(net, head).modules()]
    layers = [module for module in modules if isinstance(module, nn.Conv2d)]
    assert len(layers) == n
    for layer in layers:
        bound = (6 / (layer.kernel_size[0] ** 2 * (layer.in_channels + layer.out_channels))) ** 0.5
        largest, deviation = layer.weight.abs().max(), layer.weight.square().mean().sqrt()
        assert 0.8 * bound < largest <= bound and deviation.item() == pytest.approx(bound / 3**0.5, rel=0.3)
        assert not layer.bias.any()


def test_seeds_by_hand():
    values = torch.linspace(0, 1, 101)  # 0.00, 0.01, ..., 1.00
    found = seeds(values.view(1, 101, 1), high=0.655, low=0.105)[0, :, 0]
    assert [int((found == value).sum()) for value in (0, -1, 1)] == [11, 55, 35]
    assert found[10] == 0 and found[11] == -1 and found[65] == -1 and found[66] == 1
    # Above 0.755 there are 25 pixels, fewer than 30: the threshold is 0.7 times the maximum.
    found = seeds(values.view(1, 101, 1), high=0.755, low=0.105)[0, :, 0]
    assert (found == 1).sum() == (values > 0.7 * values.max()).sum() and found[72] == 1 and found[69] == -1
    # Per image; the background takes precedence.
    # Exactly 30 are enough: 0.8 is above 0.7 times the maximum, but no seed.
    assert (seeds(torch.tensor([1.0] * 30 + [0.8]).view(1, 31, 1), high=0.9, low=0.1) == 1).sum() == 30
    found = seeds(torch.stack([values.view(101, 1), values.view(101, 1) / 10]), high=0.6, low=0.2)
    assert (found[0] == 1).sum() >= 30 and (found[1] == 0).all()
    assert seeds(torch.tensor([[[0.25, 0.5]]]), high=1.0, low=0.25).tolist() == [[[-1, 1]]]
    assert baselines.seed_loss(torch.rand(1, 2, 2), -torch.ones(1, 2, 2)) == 0  # no seed


@pytest.mark.parametrize("arch, stride", [("vgg16", 16), ("vgg16", 8), ("resnet50", 8)])
def test_spg_s_three_guidances(arch, stride):
    values = {"spg_l1": 0.3, "spg_h2": 0.52, "spg_l2": 0.49, "spg_h3": 0.51, "spg_l3": 0.5}
    method, inputs = make("spg", arch, stride=stride, **values).train(), images(side=stride * 4)
    for name in ("a4", "b", "c"):  # with initial weights, every cross-entropy is about log 2
        getattr(method.net, name)[-1].weight.data *= 100
    again = copy.deepcopy(method.net)
    terms, logits = method(inputs, LABELS, 1)
    if arch == "vgg16":
        a1 = again.features[:23](inputs)
        a1 = nnf.max_pool2d(a1, 3, 2, 1) if stride == 16 else a1  # only pool4 is 3 x 3
        a2 = again.features[24:](a1)
        a3 = again.a3(a2)
    else:
        x = again.layer2(again.layer1(again.maxpool(again.relu(again.bn1(again.conv1(inputs))))))
        a1 = again.layer3[0](x)
        a2 = again.layer3[1:](a1)
        a3 = again.layer4(a2)
    up, s = nn.Upsample(size=inputs.shape[2:], mode="bilinear"), again.a4(a3)
    b1, b2, c = up(again.b(again.b1(a1))), up(again.b(again.b2(a2))), up(again.c(a3))
    s_y = up(s[[0, 1], LABELS][:, None])
    lowest, highest = s_y.amin((2, 3), keepdim=True), s_y.amax((2, 3), keepdim=True)
    close(logits, s.mean((2, 3)))
    for term, branch, guide, high, low in (
        ("l_b2", b2, (s_y - lowest) / (highest - lowest), 0.7, 0.3),
        ("l_b1", b1, b2.sigmoid(), 0.52, 0.49),
        ("l_c", c, (b1.sigmoid() + b2.sigmoid()) / 2, 0.51, 0.5),
    ):
        target = seeds(guide[:, 0], high, low)
        x, t = branch[:, 0][target >= 0], target[target >= 0]
        expected = (nnf.softplus(x) - t * x).mean()
        close(terms[term][1], expected, rtol=1e-10)  # batch norm of two images amplifies rounding
        assert (expected - math.log(2)).abs() > 0.01
    # The branch that gives the seeds gets no gradient from the branch that learns from them.
    heads = {"l_ce": {"a3", "a4"}, "l_b2": {"b2", "b"}, "l_b1": {"b1", "b"}, "l_c": {"c", "a3"}}
    branches = nn.ModuleDict({name: getattr(method.net, name) for name in HEADS["spg"]})
    for term, (_, value) in terms.items():
        found = {name.split(".")[0] for name in gradients(value, branches)}
        assert found == heads[term] - ({"a3"} if arch == "resnet50" else set()), term
    if arch == "vgg16":
        with torch.inference_mode():
            close(method.eval().predict(inputs, LABELS), (s.mean((2, 3)), s[[0, 1], LABELS]))


# ---- Numbers of other implementations
# Each file has results of another implementation in float64, and none of its code.


def numbers(file, arch):
    name = f"{file}.json" if arch == "vgg16" else f"{file}_resnet50.json"
    return json.loads((REPOSITORY / "tests" / name).read_text())


def fill(parameters, draw):
    """draw: (name, shape) -> array."""
    with torch.no_grad():
        for name, parameter in parameters:
            parameter.copy_(torch.from_numpy(draw(name, parameter.shape)))


def he(rng, shape):
    return rng.randn(*shape) * np.sqrt(2 / shape[1:].numel())


def data(rng, n, side=64):
    return torch.from_numpy(rng.randn(n, 3, side, side)), torch.from_numpy(rng.randint(0, 10, n))


@pytest.mark.slow
@pytest.mark.parametrize(
    "arch, seed, rates, warm", [("vgg16", 7, (1e-3, 5e-3), 5), ("resnet50", 13, (2e-3, 2e-3), 2)]
)
def test_steps_of_the_authors_training(arch, seed, rates, warm):
    """Loss, terms, final weights, running statistics and maps of the authors' code on random images."""
    authors, rng = numbers("authors_training", arch), np.random.RandomState(seed)
    values = dict(zip(("lr", "lr_new"), rates), p=1.0, width=1.0, warm_epochs=warm)
    method = make("bridge", arch, 10, **values).train()

    def draw(name, shape):
        if len(shape) > 1:
            return he(rng, shape) if len(shape) == 4 else rng.randn(*shape) * 0.01
        if arch == "vgg16":
            return np.zeros(shape)
        if name.endswith("bn3.weight"):
            return 0.25 + 0.05 * rng.rand(*shape)
        return 1 + 0.1 * rng.randn(*shape) if name.endswith("weight") else 0.05 * rng.randn(*shape)

    named = list(method.net.named_parameters())
    fill(named if arch == "vgg16" else sorted(named), draw)
    inputs, labels = data(rng, 4 * len(authors["steps"]))
    optimizer = build_optimizer(method, method.config)
    for step, expected in enumerate(authors["steps"]):
        batch = slice(4 * step, 4 * step + 4)
        terms, _ = method(inputs[batch], labels[batch], step + 1)
        optimizer.zero_grad()
        total(terms).backward()
        optimizer.step()
        found = {"loss": total(terms).item()} | {name: value.item() for name, (_, value) in terms.items()}
        assert found.keys() == ({"loss", "l_ce", "l_drop"} if step < warm else expected.keys())
        assert found == pytest.approx({key: expected[key] for key in found}, rel=1e-9, abs=1e-9), step
    norms = {name: x.double().norm().item() for name, x in (*method.net.named_buffers(), *named)}
    if arch == "vgg16":
        weights = [name for name in norms if name.endswith("weight")]
        authors |= {"norms": dict(zip(weights, authors["norms"], strict=True)), "cams": authors["cam"]}
    for expected in (authors["norms"], authors.get("running", {})):
        assert {name: norms[name] for name in expected} == pytest.approx(expected, rel=1e-9)
    with torch.inference_mode():
        _, maps = method.eval().predict(inputs[:4], labels[:4])
    assert normalize(maps).mean((1, 2)).tolist() == pytest.approx(authors["cams"], rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["vgg16", "resnet50"])
@pytest.mark.parametrize("case", ["acol", "adl_0", "adl_1", "spg"])
def test_losses_and_gradients_of_the_common_code(case, arch):
    name, _, rate = case.partition("_")
    vgg, rng = arch == "vgg16", np.random.RandomState(11 if arch == "vgg16" else 17)
    method = make(name, arch, 10, width=1.0, **({"adl_rate": float(rate)} if rate else {})).train()

    def draw(_, shape):
        if len(shape) == 1:
            return rng.randn(*shape) * 0.01 if vgg else 0.5 + 0.1 * rng.rand(*shape)
        return he(rng, shape) if vgg or len(shape) == 4 else rng.randn(*shape) * 0.01

    fill(method.net.named_parameters(), draw)
    inputs, labels = data(rng, 6 if vgg and name != "spg" else 2, 224 if name == "spg" else 64)
    loss, expected = total(method(inputs, labels, 1)[0]), numbers("common_code_losses", arch)[case]
    loss.backward()
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-9)
    parameters = [x for x in method.net.parameters() if x.grad is not None and (x.dim() > 1 or not vgg)]
    norms = [x.grad.norm().item() for x in parameters]
    assert norms == pytest.approx(expected["gradient_norms"], rel=1e-9, abs=1e-12)


def test_the_documented_method_of_one_s_own(tiny, tmp_path, fails):
    """tests/my_method.py is the example of the docs: one file, no edit elsewhere, and its value is a flag."""
    text = (REPOSITORY / "tests" / "my_method.py").read_text()
    assert f"```python\n{text}```" in (REPOSITORY / "docs" / "methods.md").read_text()
    folder, flags = tmp_path / "run", f"{tiny} --method gradcam --epochs 1 --out"
    exec(compile(text, "my_method.py", "exec"), {"__name__": "my_method"})
    try:
        run("train", f"{flags} {folder} --smoothing 0.3")
        fails("train", f"{flags} {tmp_path}/other --smoothing 2", "--smoothing 2", "[0, 1]")
        run("evaluate", f"{folder} {EVALUATE}")
        method = evaluation.TrainedRun(folder, "last", torch.device("cpu")).method
        inputs = images(dtype=torch.float32)
        maps, cam = method.predict(inputs, LABELS)[1], CAM.predict(method, inputs, LABELS)[1]
        assert torch.equal(maps, cam.clamp(min=0)) and not torch.equal(maps, cam)
    finally:
        del METHODS["gradcam"]
    assert results(folder, "config.json")["config"]["smoothing"] == {"value": 0.3, "source": "flag"}
    fails("evaluate", f"{folder} --device cpu", "'gradcam'", "import")
