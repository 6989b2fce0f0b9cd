"""The compared methods: the defining property of each, computed by hand or with plain code of the test."""

import functools
import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
from conftest import REPOSITORY
from test_losses import by_the_formulas
from torch import nn

import evaluate
import train
from bridge_wsol import demo, evaluation, optim
from bridge_wsol.baselines import (
    CutMix,
    attention_based_dropout,
    hide,
    mix,
    seed_loss,
    seeds,
    thresholded_average,
)
from bridge_wsol.cam import normalize
from bridge_wsol.data import Split
from bridge_wsol.losses import alignment_losses, consistency_loss
from bridge_wsol.methods import METHODS, Bridge
from bridge_wsol.models import load_pretrained, restore_weights

COMPARED = ("acol", "adl", "eil", "cutmix", "pas", "calm", "has", "spg")
LABELS = torch.tensor([2, 0])


class BridgeCutMix(CutMix, Bridge):
    """Two methods combined by inheritance; without a name, it is not in METHODS."""


# Networks and images are float64 unless a test states another type. The tolerance detects float32.
close = functools.partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)


def images(n=2, side=64, seed=0, dtype=torch.float64):
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make(name, arch="vgg16", num_classes=3, dtype=torch.float64, **values):
    """(method, network of seed 0) with the CUB preset, VGG16 at 1/16 width. name: in METHODS, or a class."""
    cls = METHODS.get(name, name)
    preset = optim.preset("CUB", arch) | cls.preset("CUB", arch)
    config = SimpleNamespace(arch=arch, **{key: value for key, (value, _) in preset.items()})
    if arch == "vgg16":
        config.width = 1 / 16
    for key, value in values.items():
        assert hasattr(config, key)
        setattr(config, key, value)
    torch.manual_seed(0)
    method = cls(config)
    return method, method.network(num_classes).to(dtype)


def total(losses):
    return sum(weight * value for weight, value in losses.terms.values())


def gradients(loss, model):
    return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, retain_graph=True)


def reached(loss, model):
    """The top-level modules that get a gradient from the loss."""
    named = zip(model.named_parameters(), gradients(loss, model))
    return {name.split(".")[0] for (name, _), gradient in named if gradient is not None}


def same_gradients(loss, expected, model):
    for (name, _), a, b in zip(model.named_parameters(), gradients(loss, model), gradients(expected, model)):
        assert (a is None) == (b is None), name
        if a is not None:
            close(a, b, msg=name)


# ---- All methods


@functools.cache
def layers_of_the_cam_baseline(arch):
    _, model = make("cam", arch)
    return model.backbone_state_dict().keys(), [p.shape for p in optim.parameter_groups(model, arch)[0]]


@pytest.mark.parametrize("arch", ["vgg16", "resnet50"])
@pytest.mark.parametrize("name", (*COMPARED, BridgeCutMix))
def test_forward_backward_and_pretrained_layers(name, arch):
    method, model = make(name, arch)
    old, new = optim.parameter_groups(model, arch)
    found = model.backbone_state_dict().keys(), [p.shape for p in old]
    assert found == layers_of_the_cam_baseline(arch) and new

    losses = method.losses(model.train(), images(), LABELS, epoch=70)
    assert {value.dtype for _, value in losses.terms.values()} == {losses.logits.dtype} == {torch.float64}
    total(losses).backward()
    for parameter_name, parameter in model.named_parameters():
        gradient = parameter.grad
        assert gradient is not None and gradient.isfinite().all() and gradient.abs().sum() > 0, parameter_name

    with torch.inference_mode():
        logits, maps = method.predict(model.eval(), images())
    side = 4 if arch == "vgg16" else 8
    assert logits.shape == (2, 3) and maps.shape == (2, side, side)
    assert maps.dtype == logits.dtype == torch.float64


@torch.inference_mode()
@pytest.mark.parametrize("name", (*COMPARED, BridgeCutMix))
def test_maps_without_labels_are_those_of_the_predictions_and_checkpoints_load(name):
    other = {"calm_map": "joint"} if name == "calm" else {}  # p(z|x) is the same for all classes
    method, model = make(name, **other)
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    logits, maps = method.predict(model.eval(), images())
    assert torch.equal(maps, method.predict(model, images(), logits.argmax(1))[1])
    assert not torch.equal(maps, method.predict(model, images(), (logits.argmax(1) + 1) % 3)[1])
    _, again = make(name)
    restore_weights(again, model.state_dict(), "checkpoint")
    for found, expected in zip(method.predict(again.eval(), images()), (logits, maps)):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", (*COMPARED, BridgeCutMix))
def test_pretrained_layers_load_and_losses_and_maps_are_float32_under_autocast(name, tmp_path):
    _, baseline = make("cam", dtype=torch.float32)
    for parameter in baseline.parameters():
        nn.init.normal_(parameter, std=0.02)
    torch.save(baseline.state_dict(), tmp_path / "weights.pth")
    method, model = make(name, dtype=torch.float32)
    load_pretrained(model, "vgg16", str(tmp_path / "weights.pth"))
    for key, value in baseline.backbone_state_dict().items():
        assert torch.equal(model.state_dict()[key], value)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = method.losses(model.train(), images(dtype=torch.float32), LABELS, epoch=70)
        with torch.no_grad():
            maps = method.predict(model.eval(), images(dtype=torch.float32))[1]
    assert {maps.dtype, *(value.dtype for _, value in losses.terms.values())} == {torch.float32}


@pytest.mark.parametrize("name", (*METHODS, BridgeCutMix))
def test_float32_gives_what_float64_gives(name):
    found = []
    for dtype in (torch.float64, torch.float32):
        method, model = make(name, dtype=dtype, p=1.0)  # p = 1: the dropout draws other numbers in float32
        torch.manual_seed(0)
        losses = method.losses(model.train(), images(dtype=dtype), LABELS, epoch=70)
        with torch.no_grad():
            logits, maps = method.predict(model.eval(), images(dtype=dtype), LABELS)
        values = [value for _, value in losses.terms.values()] + [losses.logits, logits, maps]
        found.append([value.double() for value in values])
    for double, single in zip(*found):
        torch.testing.assert_close(single, double, rtol=1e-4, atol=1e-5)


def test_cam_and_bridge_by_the_formulas():
    method, model = make("bridge", p=1.0)
    losses, c = method.losses(model.train(), images(), LABELS, epoch=70), method.config
    with torch.no_grad():
        shared = model.features[:23](images())
        strong = shared.mean(1, keepdim=True)
        dropped = shared * (strong <= c.gamma * strong.amax((2, 3), keepdim=True))
        f, f_dropped = (model.conv6(model.features[23:](x)) for x in (shared, dropped))
        scores = torch.einsum("nchw,kc->nkhw", f, model.fc.weight)  # N x K x h x w
        logits = scores.mean((2, 3)) + model.fc.bias
        predicted, maps = METHODS["cam"].predict(method, model.eval(), images(), LABELS)
    weight = model.fc.weight.detach().numpy()
    l_sim, l_norm = by_the_formulas(f.numpy(), weight, LABELS, c.tau_fg, c.tau_bg, c.norm_class)
    l_ce = (logits.exp().sum(1).log() - logits[[0, 1], LABELS]).mean()
    expected = {"l_ce": l_ce, "l_drop": (f - f_dropped).abs().mean(), "l_sim": l_sim, "l_norm": l_norm}
    assert losses.terms.keys() == expected.keys()
    for name, value in expected.items():
        close(losses.terms[name][1], torch.as_tensor(value, dtype=torch.float64))
    close(predicted, logits)
    close(maps, scores[[0, 1], LABELS])


@pytest.mark.parametrize("name", COMPARED)
def test_a_run_evaluates_to_the_same_table(name, tiny, tmp_path, capsys):
    run = tmp_path / "run"
    train.main([*tiny, "--method", name, "--out", str(run)])
    results = {which: run / f"results_{which}_test.json" for which in ("best", "last")}
    before = {which: json.loads(path.read_text()) for which, path in results.items()}
    table = capsys.readouterr().out
    flags = "--device cpu --workers 0 --batch-size 8 --checkpoint".split()
    for which in ("best", "last"):
        evaluate.main([str(run), *flags, which])
        assert json.loads(results[which].read_text()) == before[which]
        assert capsys.readouterr().out.rsplit("written", 1)[0].split("\n", 1)[1] in table
    assert before["last"]["method"] == name
    assert before["last"]["metrics"]["max_box_acc_v2"]["mean"] is not None
    own = {key for key in METHODS[name].preset("tiny", "vgg16") if key in optim.method_values(METHODS)}
    assert own <= json.loads((run / "config.json").read_text())["config"].keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_ten_classes_of_cub(name, real_data, tiny_preset, tmp_path):
    data = ["--data-root", real_data, "--splits", tmp_path / "splits"]
    flags = "--dataset CUB --weights none --epochs 2 --warm-epochs 1 --device cpu --method".split()
    twice_the_same_table([*flags, name, *data, "--out", tmp_path / "run"], name, images=243, batch_size=8)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_the_demo(name, monkeypatch, tmp_path):
    """The demo's preset and backbone, with fewer images."""
    monkeypatch.setattr(demo, "DEMO_COUNTS", {"train": 64, "val": 16, "test": 32})
    data = ["--data-root", tmp_path / "data", "--splits", tmp_path / "splits"]
    flags = "--epochs 2 --device cpu --amp off --method".split()
    twice_the_same_table([*flags, name, *data, "--out", tmp_path / "run"], name, images=32, batch_size=32)


def twice_the_same_table(flags, name, images, batch_size):
    train.main([str(flag) for flag in flags])
    run = flags[-1]
    before = json.loads((run / "results_best_test.json").read_text())
    evaluate.main([str(run), "--device", "cpu", "--amp", "off", "--batch-size", str(batch_size)])
    after = json.loads((run / "results_best_test.json").read_text())
    assert after == before and before["images"] == images and before["method"] == name


def test_values_out_of_range_are_named(tiny, fails, tmp_path):
    out = ["--out", tmp_path / "run"]
    for name, flag, value in (
        ("acol", "--acol-delta", 1.5),
        ("adl", "--adl-rate", -1),
        ("adl", "--adl-position", "here"),
        ("eil", "--eil-lambda", "nan"),
        ("cutmix", "--cutmix-beta", 0),
        ("cutmix", "--cutmix-p", 2),
        ("pas", "--pas-theta", 1.5),
        ("pas", "--pas-nwc", "maybe"),
        ("calm", "--calm-loss", "mle"),
        ("has", "--has-p", 1.1),
        ("has", "--has-cells", "16,-2"),
        ("has", "--has-cells", "16,x"),
        ("spg", "--spg-h2", 7),
    ):
        fails(train.main, [*tiny, *out, "--method", name, flag, value], flag, str(value), "must be")
    flags = ["--method", "cam", "--adl-rate", 0.5]
    fails(train.main, [*tiny, *out, *flags], "--adl-rate", "not a value of --method cam")
    assert not (tmp_path / "run").exists()


# ---- ACoL


@pytest.mark.parametrize("arch, delta", [("vgg16", 0.6), ("vgg16", 1.0), ("resnet50", 0.6)])
def test_acol_erases_for_b_and_fuses_by_the_maximum(arch, delta):
    method, model = make("acol", arch, acol_delta=delta)
    seen = {}
    model.head_a.register_forward_hook(lambda _, inputs, output: seen.update(x=inputs[0], s_a=output))
    model.register_forward_hook(lambda _, inputs, output: seen.update(features=output.features))
    model.head_b.register_forward_hook(lambda _, inputs, output: seen.update(erased=inputs[0], s_b=output))
    side = 64 if arch == "vgg16" else 32
    losses = method.losses(model.train(), images(side=side), LABELS, epoch=1)
    assert arch == "vgg16" or torch.equal(seen["x"], seen["features"])
    zeros = 0
    for n, label in enumerate(LABELS):
        s = seen["s_a"][n, label]
        attention = (s - s.min()) / (s.max() - s.min())
        for i in range(len(s)):
            for j in range(len(s)):
                is_erased = bool(attention[i, j] >= delta)
                zeros += is_erased
                expected = seen["x"][n, :, i, j] * (not is_erased)
                assert torch.equal(seen["erased"][n, :, i, j], expected)
    # With delta 1, the maximum of each of the two images.
    assert zeros == 2 if delta == 1 else 2 < zeros < 2 * len(s) ** 2
    for term, s in (("l_a", seen["s_a"]), ("l_b", seen["s_b"])):
        close(losses.terms[term], (1.0, nnf.cross_entropy(s.mean((2, 3)), LABELS)))
    assert torch.equal(losses.logits, seen["s_a"].mean((2, 3)))

    # The loss of B trains head B and the backbone, but not head A: the mask has no gradient.
    backbone = "features" if arch == "vgg16" else "conv1"
    assert reached(losses.terms["l_b"][1], model) & {"head_a", "head_b", backbone} == {"head_b", backbone}

    if arch == "resnet50":
        return
    with torch.inference_mode():
        logits, maps = method.predict(model.eval(), images(), LABELS)
    close(logits, seen["s_a"].mean((2, 3)))
    for n, label in enumerate(LABELS):
        a, b = ((s - s.min()) / (s.max() - s.min()) for s in (seen["s_a"][n, label], seen["s_b"][n, label]))
        close(maps[n], torch.stack([a, b]).amax(0))


@pytest.mark.parametrize("stride", [8, 16])
def test_acol_s_vgg16_pools_and_its_heads(stride):
    _, model = make("acol", stride=stride)
    _, baseline = make("cam", stride=stride)
    x = images(side=32)
    plain = x
    for layer in baseline.features:
        plain = nnf.max_pool2d(plain, 3, 2, 1) if isinstance(layer, nn.MaxPool2d) else layer(plain)
    model.features.load_state_dict(baseline.features.state_dict())
    close(model.pool(model(x).features), nnf.avg_pool2d(nnf.max_pool2d(plain, 3, 1, 1), 3, 1, 1))
    shapes = [layer.weight.shape for layer in model.head_a if isinstance(layer, nn.Conv2d)]
    assert shapes == [(64, 32, 3, 3), (64, 64, 3, 3), (3, 64, 1, 1)]


# ---- ADL


def test_attention_based_dropout_by_hand():
    z = torch.tensor([[[1.0, 2.0], [0.0, 4.0]], [[1.0, 2.0], [2.0, 4.0]]], dtype=torch.float64)
    z = z.expand(3, 2, 2, 2).clone().requires_grad_()
    # Channel means 1, 2, 1, 4. With gamma = 0.5 the threshold is 2; a value equal to it is dropped.
    dropped = attention_based_dropout(z, gamma=0.5, rate=1.0)
    close(dropped[0], torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[1.0, 0.0], [2.0, 0.0]]], dtype=torch.float64))
    dropped.sum().backward()
    assert (z.grad[0] == torch.tensor([[1.0, 0.0], [1.0, 0.0]])).all()

    z.grad = None
    weighed = attention_based_dropout(z, gamma=0.5, rate=0.0)
    importance = 1 / (1 + (-torch.tensor([[1.0, 2.0], [1.0, 4.0]], dtype=torch.float64)).exp())
    close(weighed, z * importance)
    weighed.sum().backward()
    through_the_map = z.detach().sum(1, keepdim=True) * importance * (1 - importance) / 2  # two channels
    close(z.grad, importance + through_the_map.expand_as(z))


def test_adl_draws_once_for_the_whole_batch():
    torch.manual_seed(0)
    z, masks = torch.rand(16, 4, 5, 5) + 0.5, 0
    for _ in range(400):
        has_zeros = (attention_based_dropout(z, gamma=0.9, rate=0.75) == 0).flatten(1).any(1)
        assert has_zeros.all() or not has_zeros.any()
        masks += int(has_zeros.all())
    assert 0.68 < masks / 400 < 0.82


# Indices in torchvision, without and with batch norm: pool3, ReLU of conv4_3, pool4, ReLU of conv5_3.
PLACES = {False: (16, 22, 23, 29), True: (23, 32, 33, 42)}


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("stride", [8, 16])
@pytest.mark.parametrize("position", ["common", "authors"])
@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_places_of_adl_in_vgg16_and_identity_in_eval_mode(batch_norm, stride, position, rate):
    method, model = make("adl", stride=stride, batch_norm=batch_norm, adl_position=position, adl_rate=rate)
    pool3, conv4_3, pool4, conv5_3 = PLACES[batch_norm]
    places = {pool3, conv4_3 if position == "common" else pool4, conv5_3}
    _, plain = make("cam", stride=stride, batch_norm=batch_norm)  # the same seed, the same weights
    for training in (True, False):
        x = images()
        for i, layer in enumerate(plain.train(training).features):
            x = layer(x)
            if training and i in places:
                x = attention_based_dropout(x, 0.8, rate)
        expected = plain.fc(plain.conv6(x).mean((2, 3)))
        close(model.train(training)(images()).logits, expected)


def test_places_of_adl_in_resnet50():
    method, model = make("adl", "resnet50", adl_rate=1.0)
    _, plain = make("cam", "resnet50")
    places = {plain.layer3[0], plain.layer4[0], plain.layer4[2]}
    for training in (True, False):
        plain.train(training), model.train(training)
        x = plain.maxpool(plain.relu(plain.bn1(plain.conv1(images()))))
        for block in (*plain.layer1, *plain.layer2, *plain.layer3, *plain.layer4):
            x = block(x)
            if training and block in places:
                x = attention_based_dropout(x, 0.9, 1.0)
        close(model(images()).logits, plain.fc(x.mean((2, 3))))


# ---- EIL


@pytest.mark.parametrize("stride", [8, 16])
def test_eil_s_two_passes_share_weights_and_its_mask_has_no_gradient(stride):
    method, model = make("eil", stride=stride, eil_lambda=0.5)
    counts = {}
    for name, layer in model.named_modules():
        layer.register_forward_hook(lambda *_, name=name: counts.update({name: counts.get(name, 0) + 1}))
    losses = method.losses(model.train(), images(), LABELS, epoch=1)
    names = ("features.22", "features.23", "features.24", "conv6", "fc")
    assert [counts[name] for name in names] == [1, 1, 2, 2, 2]

    z = images()
    for layer in model.features[:24]:
        z = layer(z)
    constant = z.detach().mean(1, keepdim=True)
    keep = constant < 0.7 * constant.flatten(1).max(1).values[:, None, None, None]
    assert 0 < keep.float().mean() < 1
    rest = nn.Sequential(*model.features[24:], model.conv6, nn.AdaptiveAvgPool2d(1), nn.Flatten(), model.fc)
    expected = nnf.cross_entropy(rest(z), LABELS) + 0.5 * nnf.cross_entropy(rest(z * keep), LABELS)
    close(total(losses), expected)
    same_gradients(total(losses), expected, model)
    close(losses.logits, rest(z))


def test_eil_in_resnet50_splits_after_layer3_and_keeps_the_statistics_of_the_unerased_pass():
    method, model = make("eil", "resnet50")
    _, plain = make("cam", "resnet50")
    plain.train()(images())
    counts = [0, 0]
    for i, layer in enumerate((model.layer3[5], model.layer4[0])):
        layer.register_forward_hook(lambda *_, i=i: counts.__setitem__(i, counts[i] + 1))
    losses = method.losses(model.train(), images(), LABELS, epoch=1)
    assert counts == [1, 2] and not torch.allclose(losses.terms["l_ce"][1], losses.terms["l_erased"][1])
    for (name, found), expected in zip(model.named_buffers(), plain.buffers()):
        close(found, expected, msg=name)


# ---- CutMix


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
    method, model = make(name)
    passes = []
    model.register_forward_hook(lambda *call: passes.append(call[-1]))
    inputs, labels = images(4), torch.tensor([0, 1, 2, 1])
    torch.manual_seed(2)
    losses = method.losses(model.train(), inputs, labels, epoch=70)
    assert len(passes) == 1
    torch.manual_seed(2)
    torch.rand(())  # the draw that decides whether to mix
    mixed, other, lam = mix(inputs, 1.0)
    assert 0.1 < lam < 0.9 and (labels[other] != labels).any()
    output, c = passes[0], method.config
    close(output.logits, model(mixed).logits)
    own, pasted = (nnf.cross_entropy(output.logits, y) for y in (labels, labels[other]))
    expected = {"l_ce": (1.0, lam * own + (1 - lam) * pasted)}
    if name is BridgeCutMix:
        own, pasted = (
            alignment_losses(output.features, model.fc.weight, y, c.tau_fg, c.tau_bg, c.norm_class)
            for y in (labels, labels[other])
        )
        expected |= {
            "l_drop": (c.lambda_drop, consistency_loss(output.features, output.features_dropped)),
            "l_sim": (c.lambda_sim, lam * own[0] + (1 - lam) * pasted[0]),
            "l_norm": (c.lambda_norm, lam * own[1] + (1 - lam) * pasted[1]),
        }
        warm_stage = method.losses(model, inputs, labels, epoch=1)
        assert list(warm_stage.terms) == ["l_ce", "l_drop"]
        assert not torch.allclose(own[0], pasted[0])
    assert losses.terms.keys() == expected.keys()
    for key, value in expected.items():
        close(losses.terms[key], value)


def test_cutmix_with_probability():
    method, model = make("cutmix", cutmix_p=0.3)
    _, plain = make("cam")
    expected, mixed = plain(images()).logits, 0
    with torch.no_grad():
        for _ in range(150):
            mixed += not torch.equal(method.losses(model, images(), LABELS, 1).logits, expected)
    # Half of the permutations of two images is the identity: of 0.3 of the batches, some stay as they were.
    assert 0.12 < mixed / 150 < 0.42


# ---- HaS


def test_hidden_cells():
    torch.manual_seed(0)
    inputs = torch.rand(200, 3, 10, 14) + 1
    hidden = hide(inputs, [4], p=0.3) == 0
    count = 0
    for rows in (slice(0, 4), slice(4, 8), slice(8, 10)):
        for columns in (slice(0, 4), slice(4, 8), slice(8, 12), slice(12, 14)):
            cell = hidden[:, :, rows, columns].flatten(1)
            assert (cell.all(1) | ~cell.any(1)).all()
            count += int(cell.all(1).sum())
    assert 0.27 < count / (200 * 12) < 0.33
    assert torch.equal(hide(inputs, [4], 0.0), inputs) and torch.equal(hide(inputs, [0], 1.0), inputs)
    assert (hide(inputs, [4], 1.0) == 0).all()
    whole = (hide(inputs, [0, 14], 1.0) == 0).flatten(1)  # each image draws its own side
    assert (whole.all(1) | ~whole.any(1)).all() and 60 < whole.all(1).sum() < 140


def test_has_trains_on_images_with_hidden_cells_that_scale_with_the_image_size():
    method, model = make("has", has_cells="8", has_p=0.5)
    seen = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    torch.manual_seed(3)
    losses = method.losses(model, images(), LABELS, 1)
    torch.manual_seed(3)
    assert torch.equal(seen[0], hide(images(), [8], 0.5)) and losses.terms.keys() == {"l_ce"}
    assert METHODS["has"].preset("CUB", "vgg16")["has_cells"][0] == "0,16,32,44,56"
    assert METHODS["has"].preset("demo", "vgg16")["has_cells"][0] == "0,8,16,22,28"


# ---- PaS


def test_thresholded_average_by_hand():
    channels = [[1.0, 2.0, 10.0, 0.0], [4.0, 4.0, 4.0, 4.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 3.0, 0.0]]
    features = torch.tensor(channels).view(1, 4, 2, 2).requires_grad_()
    # Thresholds 1, 0.4, 0, 0.3; the value 1 of the first channel is not above its threshold.
    pooled = thresholded_average(features, 0.1)
    torch.testing.assert_close(pooled, torch.tensor([[6.0, 4.0, 0.0, 3.0]]))
    pooled.sum().backward()
    torch.testing.assert_close(
        features.grad.view(4, 4), torch.tensor([[0, 0.5, 0.5, 0], [0.25] * 4, [0] * 4, [0, 0, 1, 0]])
    )
    torch.testing.assert_close(thresholded_average(features, 0.0), torch.tensor([[13 / 3, 4.0, 0.0, 3.0]]))
    torch.testing.assert_close(thresholded_average(features, -1.0), features.mean((2, 3)))


@pytest.mark.parametrize("arch", ["vgg16", "resnet50"])
def test_pas_pools_for_the_logits_and_clamps_weights_for_the_map_only(arch):
    method, model = make("pas", arch)
    with torch.inference_mode():
        output = model.eval()(images())
        features, weight = output.features, model.fc.weight
        means = [[m[m > 0.1 * m.max()].mean() if m.max() > 0 else m.max() for m in f] for f in features]
        pooled = torch.tensor(means, dtype=torch.float64)
        logits, maps = method.predict(model, images(), LABELS)
        expected = pooled @ weight.T + model.fc.bias
        close(logits, expected)
        close(method.losses(model, images(), LABELS, 1).terms["l_ce"][1], nnf.cross_entropy(expected, LABELS))
        assert not torch.allclose(logits, output.logits)
        for n, label in enumerate(LABELS):
            positive = weight[label].clone()
            positive[positive < 0] = 0
            close(maps[n], (positive[:, None, None] * features[n]).sum(0))
        method.config.pas_nwc, method.config.pas_theta = "off", -1.0  # without both, the CAM baseline
        baseline = METHODS["cam"](method.config).predict(model, images(), LABELS)
        for found, expected in zip(method.predict(model, images(), LABELS), baseline):
            close(found, expected)


# ---- CALM


def calm_factors(model, inputs, detached=False):
    """(p(y|x,z), p(z|x)) by the paper's formulas; detached: without gradient through the sum under p(z|x)."""
    features = model(inputs).features
    scores = torch.einsum("kc,nchw->nkhw", model.fc.weight, features) + model.fc.bias[:, None, None]
    classes = scores.exp() / scores.exp().sum(1, keepdim=True)
    location = torch.einsum("c,nchw->nhw", model.location.weight[0, :, 0, 0], features) + model.location.bias
    s = (1 + location.exp()).log()
    total = s.sum((1, 2), keepdim=True)
    return classes, s / (total.detach() if detached else total)


@pytest.mark.parametrize("arch", ["vgg16", "resnet50"])
def test_calm_s_joint_is_a_distribution_over_classes_and_locations(arch):
    method, model = make("calm", arch, calm_map="joint")
    with torch.inference_mode():
        joint = method.log_joint(model.eval(), images()).exp()
        close(joint.sum((1, 2, 3)), torch.ones(2, dtype=torch.float64))
        classes, locations = calm_factors(model, images())
        close(joint, classes * locations[:, None])
        logits, maps = method.predict(model, images(), LABELS)
    close(logits.exp(), joint.sum((2, 3)))
    close(maps, torch.stack([joint[n, label] for n, label in enumerate(LABELS)]))
    method.config.calm_map = "location"
    with torch.inference_mode():
        for labels in (LABELS, None):
            summed, maps = method.predict(model, images(), labels)
            close(summed, logits)
            close(maps, locations)
            close(maps, joint.sum(1))
    assert method.upsampling == "bilinear" and METHODS["cam"].upsampling == "bicubic"


def test_calm_s_map_where_every_class_is_a_bird():
    found = {data: METHODS["calm"].preset(data, "vgg16")["calm_map"][0] for data in ("CUB", "CUB10", "demo")}
    assert set(found.values()) == {"location"}
    for dataset in ("ILSVRC", "OpenImages", "my_photos"):
        assert METHODS["calm"].preset(dataset, "vgg16")["calm_map"][0] == "joint"


def test_another_map_of_a_trained_run(tiny, tmp_path, capsys, fails):
    """The map values of evaluate.py: metrics and val's thresholds of a run that was trained with them."""
    results = {}
    for value in ("joint", "location"):
        run = tmp_path / value
        train.main([*tiny, "--method", "calm", "--calm-map", value, "--epochs", "1", "--out", str(run)])
        results[value] = json.loads((run / "results_last_test.json").read_text())
    flags = ["--checkpoint", "last", "--device", "cpu", "--workers", "0", "--batch-size", "8"]
    capsys.readouterr()
    evaluate.main([str(tmp_path / "joint"), *flags, "--calm-map", "location"])
    assert ", calm_map location, 9 images" in capsys.readouterr().out
    found = json.loads((tmp_path / "joint/results_last_test_calm_map=location.json").read_text())
    assert found.pop("calm_map") == "location" and found == results["location"] != results["joint"]
    assert found["metrics"]["max_box_acc_v2_at_val_threshold"] is not None
    assert json.loads((tmp_path / "joint/results_last_test.json").read_text()) == results["joint"]

    fails(evaluate.main, [tmp_path / "joint", "--calm-map", "sum"], "--calm-map sum", "joint or location")
    old = torch.load(tmp_path / "joint" / "last.pt")  # of a version without the flag, whose map was the joint
    del old["config"]["calm_map"]
    torch.save(old, tmp_path / "joint" / "last.pt")
    fails(evaluate.main, [tmp_path / "joint", *flags], "last.pt", "calm_map")
    evaluate.main([str(tmp_path / "joint"), *flags, "--calm-map", "joint"])
    found = json.loads((tmp_path / "joint/results_last_test_calm_map=joint.json").read_text())
    assert found.pop("calm_map") == "joint" and found == results["joint"]
    fails(evaluate.main, [tmp_path / "joint", "--pas-nwc", "off"], "--pas-nwc", "--method calm")
    for more in (["--images", "a.jpg"], ["--score-maps", tmp_path, "--dataset", "tiny"]):
        start = [tmp_path / "joint"] if "--images" in more else []
        fails(evaluate.main, [*start, *more, "--calm-map", "joint"], "--calm-map")


@pytest.mark.parametrize("loss", ["em", "ml"])
@pytest.mark.parametrize("normalizer", ["exact", "detached"])
def test_calm_s_losses_and_their_detached_parts(loss, normalizer):
    method, model = make("calm", calm_loss=loss, calm_normalizer=normalizer)
    nn.init.normal_(model.location.weight, std=0.3)
    nn.init.normal_(model.fc.weight, std=0.3)
    losses = method.losses(model.train(), images(), LABELS, 1)
    classes, locations = calm_factors(model, images(), normalizer == "detached")
    joint = torch.stack([classes[n, label] * locations[n] for n, label in enumerate(LABELS)])
    if loss == "ml":
        expected = -joint.sum((1, 2)).log().mean()
    else:
        with torch.no_grad():
            responsibilities = joint / (joint.sum((1, 2), keepdim=True) + 1e-10)
        expected = -(responsibilities * joint.log()).sum((1, 2)).mean()
    close(losses.terms[f"l_{loss}"][1], expected)
    same_gradients(losses.terms[f"l_{loss}"][1], expected, model)
    close(losses.logits, (classes * locations[:, None]).sum((2, 3)).log())


def test_calm_is_finite_where_a_location_has_no_probability():
    for loss, normalizer in itertools.product(("em", "ml"), ("exact", "detached")):
        method, model = make("calm", calm_loss=loss, calm_normalizer=normalizer)
        with torch.no_grad():
            model.location.bias.fill_(-1000)  # softplus underflows to zero
            model.location.weight[0, 0] = 1e6
        value = method.losses(model, images(), LABELS, 1).terms[f"l_{loss}"][1]
        value.backward()
        assert value.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())


def test_log_spaced_thresholds_of_a_probability():
    maps = torch.tensor([[[1e-7, 10**-3.5, 1.0], [0.0, 0.1, 1e-9]], [[0.2, 0.2, 0.2], [0.2, 0.2, 0.2]]])
    constant = [[0.0] * 3] * 2  # a constant map becomes zeros
    expected = torch.tensor([[[0.0, 0.5, 1.0], [0.0, 6 / 7, 0.0]], constant])
    torch.testing.assert_close(normalize(maps, "log"), expected)


# ---- SPG


def test_spg_s_vgg16_without_pool4():
    """Stride 8: the input of B1 is conv4_3, and the map is as large as that of the CAM baseline."""
    method, model = make("spg", stride=8)
    seen = []
    model.b1.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0].shape))
    method.losses(model.train(), images(), LABELS, 1)
    assert seen == [(2, 32, 8, 8)] and method.predict(model, images())[1].shape == (2, 8, 8)


@pytest.mark.parametrize("arch", ["vgg16", "resnet50"])
@pytest.mark.parametrize("name", ["acol", "spg"])
def test_new_convolutions_start_from_xavier_s_uniform_distribution(name, arch):
    _, model = make(name, arch)
    heads = ("head_a", "head_b") if name == "acol" else ("a3", "a4", "b1", "b2", "b", "c")
    layers = [layer for head in heads for layer in getattr(model, head).modules()]
    convolutions = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
    assert len(convolutions) == {"acol": 6, "spg": 9 if arch == "vgg16" else 7}[name]
    for layer in convolutions:
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
    found = seeds((values * 1.0).view(1, 101, 1), high=0.755, low=0.105)[0, :, 0]
    assert (found == 1).sum() == (values > 0.7 * values.max()).sum() and found[72] == 1 and found[69] == -1
    # Per image; the background takes precedence.
    pair = torch.stack([values.view(101, 1), values.view(101, 1) / 10])
    found = seeds(pair, high=0.6, low=0.2)
    assert (found[0] == 1).sum() >= 30 and (found[1] == 0).all()
    assert not seeds(torch.rand(1, 3, 3, requires_grad=True), 0.5, 0.1).requires_grad


def test_seed_loss_is_a_mean_over_seeds_only():
    logits = torch.tensor([[[0.5, -1.0], [2.0, 3.0]]], requires_grad=True)
    target = torch.tensor([[[1.0, 0.0], [-1.0, -1.0]]])
    expected = ((1 + (-torch.tensor(0.5)).exp()).log() + (1 + torch.tensor(-1.0).exp()).log()) / 2
    loss = seed_loss(logits, target)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert (logits.grad[0, 1] == 0).all() and (logits.grad[0, 0] != 0).all()
    assert seed_loss(logits, -torch.ones(1, 2, 2)) == 0


@pytest.mark.parametrize("arch", ["vgg16", "resnet50"])
def test_spg_s_three_guidances(arch):
    method, model = make("spg", arch, spg_l1=0.3, spg_h2=0.52, spg_l2=0.49, spg_h3=0.51, spg_l3=0.5)
    again = make("spg", arch)[1].train()
    for network in (model, again):
        for name in ("a4", "b", "c"):  # with initial weights, every cross-entropy is about log 2
            getattr(network, name)[-1].weight.data *= 100
    losses = method.losses(model.train(), images(), LABELS, 1)
    if arch == "vgg16":
        a1 = nnf.max_pool2d(again.features[:23](images()), 3, 2, 1)  # only pool4 is 3 x 3
        a2 = again.features[24:](a1)
        a3 = again.a3(a2)
    else:
        x = again.layer2(again.layer1(again.maxpool(again.relu(again.bn1(again.conv1(images()))))))
        a1 = again.layer3[0](x)
        a2 = again.layer3[1:](a1)
        a3 = again.layer4(a2)
    up = nn.Upsample(size=(64, 64), mode="bilinear")
    s = again.a4(a3)
    b1, b2, c = up(again.b(again.b1(a1))), up(again.b(again.b2(a2))), up(again.c(a3))
    s_y = up(torch.stack([s[n, y] for n, y in enumerate(LABELS)])[:, None])
    lowest, highest = s_y.amin((2, 3), keepdim=True), s_y.amax((2, 3), keepdim=True)
    close(losses.logits, s.mean((2, 3)))
    for term, branch, guide, high, low in (
        ("l_b2", b2, (s_y - lowest) / (highest - lowest), 0.7, 0.3),
        ("l_b1", b1, b2.sigmoid(), 0.52, 0.49),
        ("l_c", c, (b1.sigmoid() + b2.sigmoid()) / 2, 0.51, 0.5),
    ):
        target = seeds(guide[:, 0], high, low)
        x, t = branch[:, 0][target >= 0], target[target >= 0]
        expected = (nnf.softplus(x) - t * x).mean()
        close(losses.terms[term][1], expected, rtol=1e-10)  # batch norm of two images amplifies rounding
        assert (expected - math.log(2)).abs() > 0.01

    # The branch that gives the seeds gets no gradient from the branch that learns from them.
    heads = {"l_ce": {"a3", "a4"}, "l_b2": {"b2", "b"}, "l_b1": {"b1", "b"}, "l_c": {"c", "a3"}}
    without = {"a3"} if arch == "resnet50" else set()
    for term, (_, value) in losses.terms.items():
        found = reached(value, model) & {"a3", "a4", "b", "b1", "b2", "c"}
        assert found == heads[term] - without, term

    if arch == "vgg16":
        with torch.inference_mode():
            logits, maps = method.predict(model.eval(), images(), LABELS)
        close(maps, torch.stack([s[n, y] for n, y in enumerate(LABELS)]))


# ---- Numbers of other implementations

# Each file has results of another implementation in float64, and none of its code.
AUTHORS_TRAINING = json.loads(Path(__file__).with_name("authors_training.json").read_text())
COMMON_CODE_LOSSES = json.loads(Path(__file__).with_name("common_code_losses.json").read_text())


def weighted_layers(model):
    return [layer for layer in model.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]


@pytest.mark.slow
def test_twenty_steps_of_the_authors_training():
    """Loss, terms, final weights and maps of the authors' code on random images. Five steps are warm."""
    values = {"lr": 0.001, "lr_new": 0.005, "p": 1.0, "warm_epochs": 5, "width": 1.0}
    method, model = make("bridge", num_classes=10, **values)
    c, rng = method.config, np.random.RandomState(7)
    *convolutions, fc = weighted_layers(model)
    with torch.no_grad():
        for layer in convolutions:
            o, i, _, _ = layer.weight.shape
            layer.weight.copy_(torch.from_numpy(rng.randn(o, i, 3, 3) * np.sqrt(2 / (9 * i))))
            layer.bias.zero_()
        fc.weight.copy_(torch.from_numpy(rng.randn(10, 1024) * 0.01))
    inputs, labels = torch.from_numpy(rng.randn(80, 3, 64, 64)), torch.from_numpy(rng.randint(0, 10, 80))

    keys = ("lr", "lr_new", "momentum", "nesterov", "weight_decay")
    optimizer = optim.build_optimizer(model.train(), "vgg16", **{key: getattr(c, key) for key in keys})
    for step, expected in enumerate(AUTHORS_TRAINING["steps"]):
        batch = slice(4 * step, 4 * step + 4)
        losses = method.losses(model, inputs[batch], labels[batch], epoch=step + 1)
        loss = total(losses)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found = {"loss": loss.item()} | {name: value.item() for name, (_, value) in losses.terms.items()}
        assert found.keys() == (expected.keys() if step >= 5 else {"loss", "l_ce", "l_drop"})
        assert found == pytest.approx({key: expected[key] for key in found}, rel=1e-9, abs=1e-9), step

    norms = [layer.weight.norm().item() for layer in (*convolutions, fc)]
    assert norms == pytest.approx(AUTHORS_TRAINING["norms"], rel=1e-9)
    with torch.inference_mode():
        _, maps = method.predict(model.eval(), inputs[:4], labels[:4])
    assert normalize(maps).mean((1, 2)).tolist() == pytest.approx(AUTHORS_TRAINING["cam"], rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, values, n, side",
    [
        ("acol", {"acol_delta": 0.7}, 6, 64),
        ("adl_0", {"adl_rate": 0.0}, 6, 64),
        ("adl_1", {"adl_rate": 1.0}, 6, 64),
        ("spg", {}, 2, 224),
    ],
)
def test_losses_and_gradients_of_the_common_code(name, values, n, side):
    method, model = make(name.split("_")[0], num_classes=10, width=1.0, **values)
    layers, rng = weighted_layers(model), np.random.RandomState(11)
    with torch.no_grad():
        for layer in layers:
            fan_in = layer.weight[0].numel()
            layer.weight.copy_(torch.from_numpy(rng.randn(*layer.weight.shape) * np.sqrt(2 / fan_in)))
            layer.bias.copy_(torch.from_numpy(rng.randn(len(layer.bias)) * 0.01))
    inputs, labels = torch.from_numpy(rng.randn(n, 3, side, side)), torch.from_numpy(rng.randint(0, 10, n))
    loss = total(method.losses(model.train(), inputs, labels, epoch=1))
    loss.backward()
    expected = COMMON_CODE_LOSSES[name]
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-9)
    norms = [layer.weight.grad.norm().item() for layer in layers]
    assert norms == pytest.approx(expected["gradient_norms"], rel=1e-9)


# ---- Percentiles of evaluate.py


@pytest.mark.parametrize("dtype, rank", [(torch.float64, 1), (torch.bfloat16, 0)])
def test_classes_are_ranked_in_the_logits_own_precision(dtype, rank):
    """The first two are equal in float32 and bf16. Of equal logits, the lower class ranks first."""
    logits = torch.tensor([[1.0, 1 + 1e-12, 0.5]], dtype=torch.float64).to(dtype)
    method = SimpleNamespace(predict=lambda *_: (logits, torch.zeros(1, 4, 4)), upsampling="bilinear")
    loader = [(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.tensor([0]), torch.tensor([0]))]
    setting = {"device": torch.device("cpu"), "amp": "off", "normalization": "minmax", "image_size": 8}
    (batch,) = evaluation.network_maps(nn.Identity(), loader, method=method, **setting)
    assert batch.ranks == [rank]


def test_ivr_s_percentile_is_chosen_on_val(trained, capsys):
    _, run = trained
    flags = [str(run), "--normalize", "ivr", "--device", "cpu", "--workers", "0", "--percentile"]
    evaluate.main([*flags, "val"])
    printed = capsys.readouterr().out
    chosen = json.loads((run / "results_best_test_ivr_val.json").read_text())
    q, scores = chosen["percentile"]["value"], chosen["percentile"]["scores"]
    assert [float(key) for key in scores] == [round(0.05 * i, 2) for i in range(1, 15)]
    for key in ("0.05", "0.45", str(q)):
        evaluate.main([*flags, key, "--split", "val"])
        on_val = json.loads((run / f"results_best_val_ivr_{key}.json").read_text())
        assert on_val["metrics"]["max_box_acc_v2"]["mean"] == scores[key]
    assert q == min(float(key) for key in scores if scores[key] == max(scores.values()))
    assert f"ivr at percentile {q:.2f}, chosen on val by MaxBoxAccV2 ({scores[str(q)]:.2f})" in printed
    evaluate.main([*flags, str(q)])
    given = json.loads((run / f"results_best_test_ivr_{q}.json").read_text())
    assert given.pop("percentile") == {"value": q} and chosen.pop("percentile") and given == chosen


def test_ivr_s_percentile_is_the_lowest_that_fits_all_maps():
    """By hand: one map needs its noise of 0.5 removed, the other its object of 0.3 kept. No single threshold
    does both.
    """
    noisy, faint = np.zeros((2, 10, 10), dtype=np.float32)
    noisy.flat[34:] = 0.5  # the quantiles from 0.35 on are 0.5
    noisy[7:, 2:6] = 1  # the object: columns 2 to 5, rows 7 to 9
    faint.flat[48:] = 0.3  # the quantiles up to 0.45 are 0
    faint[7, 4] = 1
    boxes = {0: np.array([[2, 7, 5, 9]]), 1: np.array([[0, 4, 9, 9]])}
    split = Split("val", Path(), ["noisy", "faint"], np.zeros(2, dtype=np.int64), np.full((2, 2), 10), boxes)
    maps = [evaluation.MapBatch([0, 1], np.stack([noisy, faint]), [0, 0], [0, 0])]
    q, choice, _ = evaluation.choose_percentile(maps, split, image_size=10, upsampling="bilinear", workers=0)
    assert q == 0.35 and choice["by"] == "MaxBoxAccV2"
    assert choice["scores"] == {q: 100.0 if q in (0.35, 0.4, 0.45) else 50.0 for q in evaluation.QS}


def test_a_percentile_reaches_the_maps(trained, tmp_path):
    _, run = trained
    saved = {}
    for how, q in (("ivr", None), ("ivr", "0.45"), ("ivr", "0.6"), ("pas", "0.5")):
        folder = tmp_path / f"{how}{q}"
        percentile = ["--percentile", q] if q else []
        flags = ["--normalize", how, *percentile, "--save-maps", str(folder)]
        evaluate.main([str(run), *flags, "--device", "cpu", "--workers", "0"])
        saved[how, q] = [path.read_bytes() for path in sorted(folder.rglob("*.npy"))]
    assert len(saved["ivr", None]) == 9
    assert saved["ivr", None] == saved["ivr", "0.45"] != saved["ivr", "0.6"] != saved["pas", "0.5"]


def test_pxap_chooses_the_percentile_where_only_masks_are_given(trained, tmp_path):
    _, run = trained
    for split in ("val", "test"):
        path = tmp_path / "splits" / "tiny" / split / "localization.txt"
        masks = [line for line in path.read_text().splitlines(keepends=True) if "masks" in line]
        path.write_text("".join(masks))
    flags = "--normalize ivr --percentile val --device cpu --workers 0 --splits".split()
    evaluate.main([str(run), *flags, str(tmp_path / "splits")])
    assert json.loads((run / "results_best_test_ivr_val.json").read_text())["percentile"]["by"] == "PxAP"


def test_bad_percentiles(trained, fails, tmp_path):
    _, run = trained
    for flags in (
        ["--percentile", 0.5],
        ["--normalize", "max", "--percentile", 0.5],
        ["--normalize", "pas", "--percentile", "val"],
        ["--normalize", "ivr", "--percentile", 1],
        ["--normalize", "ivr", "--percentile", "half"],
    ):
        fails(evaluate.main, [run, *flags], "--percentile")
    (tmp_path / "splits" / "tiny" / "val" / "localization.txt").unlink()
    flags = [run, "--normalize", "ivr", "--device", "cpu", "--workers", 0, "--splits", tmp_path / "splits"]
    fails(evaluate.main, [*flags, "--percentile", "val"], "--percentile val", "neither boxes nor masks")


# ---- The example


def test_the_documented_method_of_one_s_own(tiny, tmp_path, fails):
    """tests/my_method.py is the example of the docs: one file, no edit elsewhere, and its value is a flag."""
    text = (REPOSITORY / "tests" / "my_method.py").read_text()
    assert len([line for line in text.splitlines() if line]) <= 20
    pages = [page for page in (REPOSITORY / "docs" / "methods.md", REPOSITORY / "README.md") if page.exists()]
    assert text in pages[0].read_text()
    exec(compile(text, "my_method.py", "exec"), {"__name__": "my_method"})
    try:
        run = tmp_path / "run"
        flags = [*tiny, "--method", "gradcam", "--out"]
        train.main([*flags, str(run), "--smoothing", "0.3"])
        fails(train.main, [*flags, tmp_path / "other", "--smoothing", 2], "--smoothing 2", "[0, 1]")
        evaluate.main([str(run), "--device", "cpu", "--workers", "0"])
        model, method, _ = evaluation.load_run(run, "last", torch.device("cpu"))
        inputs = images(dtype=torch.float32)
        _, maps = method.predict(model.eval(), inputs, LABELS)
        cam = METHODS["cam"].predict(method, model, inputs, LABELS)[1]
        assert torch.equal(maps, cam.clamp(min=0)) and not torch.equal(maps, cam)
    finally:
        del METHODS["gradcam"]
    config = json.loads((run / "config.json").read_text())["config"]
    assert config["smoothing"] == {"value": 0.3, "source": "flag"}
    fails(evaluate.main, [run, "--device", "cpu"], run / "best.pt", "'gradcam'", "import")
