"""The networks against torchvision, the layers of the clean and the dropped pass, and weights files."""

import re
from types import SimpleNamespace
from urllib.error import URLError

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.vgg import cfgs, make_layers

from bridge_wsol import utils
from bridge_wsol.config import preset_values
from bridge_wsol.methods import Bridge
from bridge_wsol.models import build_network, load_pretrained, load_weights, read_weights
from bridge_wsol.optim import build_optimizer
from bridge_wsol.utils import InputError

SMALL = [c if c == "M" else c // 16 for c in cfgs["D"]]  # torchvision's VGG16 at 1/16 of its width


def bridge(arch, stride=16):
    """The paper's method, VGG16 at 1/16 of its width."""
    config = {name: value for name, (value, _) in preset_values("CUB", arch, "bridge").items()}
    config |= {"arch": arch, "stride": stride, "gamma": 0.5, "p": 1.0, "lr": 0.1, "lr_new": 0.1}
    return Bridge(SimpleNamespace(**config | {"width": 1 / 16 if arch == "vgg16" else 1.0}), 3)


SHAPES = [("vgg16", 16, 64), ("vgg16", 8, 64), ("resnet50", 8, 2048), ("resnet50", 16, 2048)]


@pytest.mark.parametrize("arch, stride, channels", SHAPES)
@torch.inference_mode()
def test_one_forward_gives_logits_and_a_large_map(arch, stride, channels):
    net, images = bridge(arch, stride).net.eval(), torch.rand(1, 3, 96, 96)
    features = net.after_dropout(net.before_dropout(images))
    assert features.shape == (1, channels, 96 / stride, 96 / stride) and (features >= 0).all()
    expected = features.mean((2, 3)) @ net.fc.weight.T + net.fc.bias
    torch.testing.assert_close(net.classify(features), expected)
    torch.testing.assert_close(net(images), expected)


@pytest.mark.parametrize("stride", [16, 8])
def test_vgg16_has_the_layers_of_torchvision_without_the_last_pool(stride):
    reference, images = make_layers(SMALL)[:-1].eval(), torch.rand(2, 3, 64, 64)
    net = build_network("vgg16", 3, stride, width=1 / 16).eval()
    net.features.load_state_dict(reference.state_dict())
    reference[23] = reference[23] if stride == 16 else nn.Identity()  # the fourth pool
    found = net.after_dropout(net.before_dropout(images))
    torch.testing.assert_close(found, net.conv6(reference(images)))
    torch.testing.assert_close(net.before_dropout(images), reference[:23](images))  # up to conv4_3's ReLU


def test_vgg16_has_the_channels_of_the_paper_and_starts_as_torchvision_s_does():
    net = build_network("vgg16", 200, stride=16)
    assert net.conv6[0].weight.shape == (1024, 512, 3, 3) and net.fc.weight.shape == (200, 1024)
    for layer in (*net.features, net.conv6[0], net.fc):
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            expected = 0.01 if layer is net.fc else (2 / (9 * layer.out_channels)) ** 0.5
            assert layer.weight.std().item() == pytest.approx(expected, rel=0.06) and not layer.bias.any()
    net.features.load_state_dict(make_layers(cfgs["D"]).state_dict())


@torch.inference_mode()
def test_resnet50_has_torchvision_s_names_and_agrees_up_to_the_first_changed_stride():
    net, images, seen = build_network("resnet50", 1000, stride=16).eval(), torch.rand(1, 3, 64, 64), []
    with torch.device("meta"):
        reference = torchvision.models.resnet50(weights=None).eval()
    reference.load_state_dict(net.state_dict(), assign=True)
    for either in (reference, net):
        either.layer3.register_forward_hook(lambda *call: seen.append(call[-1]))
        either(images)
    assert torch.equal(*seen)


LAYERS = {"vgg16": ("features.22", "features.23", "fc"), "resnet50": ("layer4.0", "layer4.1", "fc")}


@pytest.mark.parametrize("arch", LAYERS)
def test_the_dropped_pass_starts_at_the_dropout_after_the_clean_one(arch):
    method, images, called = bridge(arch).train(), torch.rand(2, 3, 64, 64), []
    by_hand = bridge(arch).train().net
    by_hand.load_state_dict(method.net.state_dict())
    for name in LAYERS[arch]:
        method.net.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name))
    passes = method.passes(images)
    assert [*map(called.count, LAYERS[arch])] == [1, 2, 1]  # the linear layer: in the clean pass only
    x = by_hand.before_dropout(images)
    mean, clean = x.mean(1, keepdim=True), by_hand.after_dropout(x)
    dropped = by_hand.after_dropout(x * (mean <= 0.5 * mean.amax((2, 3), keepdim=True)))
    assert torch.equal(passes.features, clean) and torch.equal(passes.dropped, dropped)
    assert not torch.equal(clean, dropped)
    for found, expected in zip(method.buffers(), by_hand.buffers()):  # batch norm: clean, then dropped
        assert torch.equal(found, expected)
    assert method.eval().passes(images).dropped is None and [*map(called.count, LAYERS[arch])] == [2, 3, 2]
    method.config.p = 0.0
    passes = method.train().passes(images)
    assert torch.equal(passes.dropped, passes.features)


BLOCKS_12 = ("features.0.", "features.2.", "features.5.", "features.7.")
FROZEN = [("vgg16", 16, 0, ()), ("vgg16", 8, 2, BLOCKS_12), ("vgg16", 8, 5, ("features.",))]
FROZEN += [("resnet50", 16, 2, ("conv1.", "bn1.", "layer1."))]


@pytest.mark.parametrize("arch, stride, n, layers", FROZEN)
def test_frozen_blocks_keep_their_weights_and_all_others_learn(arch, stride, n, layers):
    method = bridge(arch, stride).train()
    method.net.freeze_blocks(n)
    before = {name: parameter.clone() for name, parameter in method.net.named_parameters()}
    optimizer = build_optimizer(method, method.config)
    method.passes(torch.rand(2, 3, 64, 64)).logits.sum().backward()
    optimizer.step()
    kept = {name for name, value in method.net.named_parameters() if torch.equal(value, before[name])}
    assert kept == {name for name in before if name.startswith(layers)}


def test_vgg16_loads_torchvision_s_file_its_half_precision_and_a_checkpoint(tmp_path):
    features = {f"features.{k}": v for k, v in make_layers(SMALL).state_dict().items()}
    whole, half = features | {"fc.bias": torch.ones(2)}, {k: v.half() for k, v in features.items()}
    other_classes = build_network("vgg16", 99, stride=8, width=1 / 16).state_dict() | features
    for state in (whole, half, {"model": other_classes, "epoch": 3}):
        torch.save(state, tmp_path / "weights.pth")
        net = build_network("vgg16", 10, stride=16, width=1 / 16)
        expected = {k: v.clone() for k, v in net.state_dict().items()} | features
        load_pretrained(net, "vgg16", str(tmp_path / "weights.pth"))
        tolerance = 1e-3 if state is half else 0
        torch.testing.assert_close(net.state_dict(), expected, rtol=tolerance, atol=tolerance)


def test_resnet50_loads_the_linear_layer_only_with_load_fc(tmp_path):
    with torch.device("meta"):
        reference = torchvision.models.resnet50(weights=None)
    net = build_network("resnet50", 1000, stride=8)
    state = {name: torch.full(x.shape, 0.5) for name, x in reference.state_dict().items()}
    state = {name: x for name, x in state.items() if "num_batches" not in name}  # an old file lacks them
    torch.save(state, tmp_path / "resnet50.pth")
    for load_fc in (False, True):
        load_pretrained(net, "resnet50", str(tmp_path / "resnet50.pth"), load_fc)
        for name, value in state.items():
            assert torch.equal(net.state_dict()[name], value) == (load_fc or name[:3] != "fc."), name


def test_a_wrong_weights_file_is_described_and_never_executed(tmp_path):
    class Harm:
        def __reduce__(self):
            return (open, (str(tmp_path / "harmed"), "w"))

    net, path = build_network("vgg16", 10, stride=16, width=1 / 16), tmp_path / "weights.pth"
    state = {f"features.{k}": v for k, v in net.features.state_dict().items()}
    for wrong, words in (
        ({k: v for k, v in state.items() if k != "features.0.bias"}, "features.0.bias: missing"),
        (state | {"features.2.weight": torch.zeros(3, 3)}, r"features.2.weight: \(3, 3\) .*\(4, 4, 3, 3\)"),
        (state | {"features.0.bias": torch.zeros(4, dtype=torch.int64)}, "features.0.bias: .*int64"),
        (state | {"features.0.bias": 3}, "features.0.bias"),
        ({"model": 4}, "26 tensors .*missing"),
        ([torch.zeros(2)], "list"),
        ({"features.0.weight": Harm()}, "holds a _?io.open, which could run code"),
    ):
        torch.save(wrong, path)
        before = {k: v.clone() for k, v in net.state_dict().items()}
        with pytest.raises(InputError, match=f"weights.pth: .*{words}"):
            load_pretrained(net, "vgg16", str(path))
        assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not (tmp_path / "harmed").exists()
    path.write_text("not weights")
    for name, words in (("weights.pth", "damaged"), ("absent.pth", "no such file")):
        with pytest.raises(InputError, match=f"{name}: {words}"):
            load_pretrained(net, "vgg16", str(tmp_path / name))


@pytest.mark.parametrize(
    "arch, file", [("vgg16", "vgg16-397923af.pth"), ("resnet50", "resnet50-0676ba61.pth")]
)
def test_imagenet_weights_are_torchvision_s_first_with_checksum_and_weights_only(monkeypatch, arch, file):
    net, calls, errors = build_network(arch, 10, stride=16), [], []
    state = {name: value + 1 for name, value in net.state_dict().items()}

    def download(url, *args, **kwargs):
        calls.append((url, kwargs))
        if errors:
            raise errors[0]
        return state

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", download)
    load_pretrained(net, arch, "imagenet")
    assert all(
        torch.equal(x, state[k]) for k, x in net.named_parameters() if k.startswith(net.pretrained_names)
    )
    ((url, kwargs),) = calls
    assert url.endswith(file) and kwargs["check_hash"] and kwargs["weights_only"]
    errors.append(URLError("no\nnetwork"))
    with pytest.raises(InputError, match=f"{file}.*--weights FILE") as raised:
        load_pretrained(net, arch, "imagenet")
    assert "\n" not in str(raised.value)


# Our names -> those of the authors' release and of Choe et al.'s code, with a fourth pool and without.
LAYOUTS = {
    "authors16": (
        ("features.24", "features.2.1"),
        ("features.26", "features.2.3"),
        ("features.28", "features.2.5"),
    ),
    "authors8": (
        ("features.24", "features.2.0"),
        ("features.26", "features.2.2"),
        ("features.28", "features.2.4"),
    ),
    "choe16": (),
    "choe8": (("features.24", "features.23"), ("features.26", "features.25"), ("features.28", "features.27")),
}


def as_saved(state: dict, layout: str) -> dict:
    """A VGG16 state dict under the names of another code."""
    saved = {}
    for name, value in state.items():
        layer, kind = name.rsplit(".", 1)
        new = dict(LAYOUTS[layout]).get(layer, layer)
        if layout.startswith("authors") and new == layer:
            new = re.sub(r"^features\.(\d+)$", r"features.0.\1", layer)
        saved[f"{new.replace('conv6.0', 'conv6')}.{kind}"] = value
    return saved


WRAPPERS = (
    lambda state: state,
    lambda state: {"state_dict": {f"module.{name}": value for name, value in state.items()}, "epoch": 3},
    lambda state: {"model_state_dict": state},
    lambda state: {"model": {f"module.{name}": value for name, value in state.items()}},
)


@pytest.mark.parametrize("layout, wrap", [*zip(LAYOUTS, WRAPPERS)])
def test_a_vgg16_of_other_code_is_ours_bit_for_bit(tmp_path, layout, wrap):
    stride = int(layout.strip("authorsce"))
    net = build_network("vgg16", 5, stride, width=1 / 16)
    torch.save(wrap(as_saved(net.state_dict(), layout)), tmp_path / "other.pth")
    state, found = read_weights(tmp_path / "other.pth", "vgg16")
    other = build_network("vgg16", 5, stride, width=1 / 16)
    load_weights(other, state, tmp_path / "other.pth")
    images = torch.randn(2, 3, 64, 64)
    assert found == stride and torch.equal(net(images), other(images))


@pytest.mark.parametrize("authors", [True, False])
def test_a_resnet50_of_other_code_is_ours_bit_for_bit(tmp_path, authors):
    net, other = (build_network("resnet50", 5, stride=8).eval() for _ in range(2))
    theirs = {"layer4.0.": "layer4_1.0.", "layer4.1.": "layer4_2.0.", "layer4.2.": "layer4_2.1."}
    theirs = theirs if authors else {}
    state = {theirs.get(name[:9], name[:9]) + name[9:]: x for name, x in net.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "other.pth")
    state, stride = read_weights(tmp_path / "other.pth", "resnet50")
    load_weights(other, state, tmp_path / "other.pth")
    images = torch.randn(1, 3, 32, 32)
    assert stride is None and torch.equal(net(images), other(images))


def test_networks_that_do_not_exist_raise():
    for arguments in (("vgg19", 3, 16), ("vgg16", 3, 32), ("resnet50", 3, 8, 0.5)):
        with pytest.raises(InputError):
            build_network(*arguments)
    with pytest.raises(InputError, match="--frozen-blocks 6: .* 5 pretrained blocks"):
        bridge("vgg16").net.freeze_blocks(6)


@pytest.mark.parametrize(
    "bf16, instructions, chosen", [(131, True, "bf16"), (129, True, "off"), (200, False, "off")]
)
def test_amp_auto_is_bf16_where_a_cpu_is_faster_in_it(monkeypatch, bf16, instructions, chosen):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: instructions, raising=False)
    monkeypatch.setattr(utils, "convolution_speed", lambda amp: bf16 if amp == "bf16" else 100)
    amp, source = utils.resolve_amp("auto", cpu := torch.device("cpu"))
    assert amp == chosen and (f"bf16 {bf16}, float32 100" in source) == instructions
    assert [utils.resolve_amp(given, cpu)[0] for given in ("bf16", "off")] == ["bf16", "off"]
    with utils.autocast(cpu, amp):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == (
            torch.bfloat16 if chosen == "bf16" else torch.float32
        )
    with pytest.raises(KeyError):  # not float32 without a word
        utils.autocast(cpu, "auto")


def test_the_speed_of_a_convolution_leaves_the_random_state():
    before = torch.get_rng_state()
    assert 0.01 < utils.convolution_speed("off") < 1e5 and torch.equal(torch.get_rng_state(), before)
