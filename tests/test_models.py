"""The networks against torchvision, the layers of the clean and the dropped pass, and weights files."""

from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.vgg import cfgs, make_layers

from bridge_wsol import utils
from bridge_wsol.models import build_model, export_backbone, load_pretrained
from bridge_wsol.optim import build_optimizer
from bridge_wsol.utils import InputError


def calls_of(model, *modules):
    """(number of calls of each module, output) of a forward pass on random images."""
    counts = [0] * len(modules)
    for i, module in enumerate(modules):
        module.register_forward_hook(lambda *_, i=i: counts.__setitem__(i, counts[i] + 1))
    output = model(torch.rand(2, 3, 64, 64))
    return counts, output


@pytest.mark.parametrize(
    "arch, stride, width, channels, side",
    [
        ("vgg16", 16, 1 / 16, 64, 14),
        ("vgg16", 8, 1 / 16, 64, 28),
        ("resnet50", 8, 1.0, 2048, 28),
        ("resnet50", 16, 1.0, 2048, 14),
    ],
)
def test_one_forward_gives_logits_and_a_large_map(arch, stride, width, channels, side):
    model = build_model(arch, 7, stride=stride, width=width).eval()
    with torch.inference_mode():
        output = model(torch.rand(1, 3, 224, 224))
    assert output.logits.shape == (1, 7) and output.features.shape == (1, channels, side, side)
    assert (output.features >= 0).all() and output.features_dropped is None
    expected = output.features.mean((2, 3)) @ model.fc.weight.T + model.fc.bias
    torch.testing.assert_close(output.logits, expected)


def test_full_width_has_the_channels_of_the_paper():
    model = build_model("vgg16", 200, stride=16)
    assert model.conv6[0].weight.shape == (1024, 512, 3, 3) and model.fc.weight.shape == (200, 1024)
    assert [layer.out_channels for layer in model.features if isinstance(layer, nn.Conv2d)] == [
        c for c in cfgs["D"] if c != "M"
    ]


def test_vgg16_has_the_layers_of_torchvision_without_the_last_pool():
    reference = make_layers([c if c == "M" else c // 16 for c in cfgs["D"]])[:-1].eval()
    model = build_model("vgg16", 3, stride=16, width=1 / 16).eval()
    model.features.load_state_dict(reference.state_dict())
    images = torch.rand(2, 3, 64, 64)
    seen = []
    model.conv6.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(images)
    torch.testing.assert_close(seen[0], reference(images))


def test_resnet50_loads_torchvision_s_weights_and_agrees_up_to_the_first_changed_stride():
    reference = torchvision.models.resnet50(weights=None).eval()
    model = build_model("resnet50", 1000, stride=16).eval()
    model.load_state_dict(reference.state_dict())
    images, seen = torch.rand(1, 3, 64, 64), []
    for network in (reference, model):
        network.layer3.register_forward_hook(lambda *call: seen.append(call[-1]))
        network(images)
    torch.testing.assert_close(*seen)


@pytest.mark.parametrize(
    "arch, width, shared, repeated",
    [
        ("vgg16", 1 / 16, "features.22", "features.23"),
        ("resnet50", 1.0, "layer4.0", "layer4.1"),
    ],
)
def test_the_dropped_pass_shares_the_layers_before_the_dropout(arch, width, shared, repeated):
    model = build_model(arch, 3, stride=16, width=width, gamma=0.5, p=0.9)
    layers = dict(model.named_modules())
    modules = [layers[shared], layers[repeated], model.fc]
    counts, output = calls_of(model.train(), *modules)
    assert counts == [1, 2, 1]  # the linear layer runs in the clean pass only
    assert output.features_dropped.shape == output.features.shape
    assert not torch.equal(output.features_dropped, output.features)

    counts, output = calls_of(model.eval(), *modules)
    assert counts == [1, 1, 1] and output.features_dropped is None


def test_the_cam_baseline_has_no_dropped_pass():
    model = build_model("vgg16", 3, stride=16, width=1 / 16).train()
    assert model(torch.rand(1, 3, 64, 64)).features_dropped is None


def test_without_probability_both_passes_are_equal():
    model = build_model("vgg16", 3, stride=16, width=1 / 16, gamma=0.8, p=0.0).train()
    output = model(torch.rand(1, 3, 64, 64))
    torch.testing.assert_close(output.features_dropped, output.features, rtol=0, atol=0)


def test_gradient_reaches_every_layer_through_both_passes():
    model = build_model("vgg16", 3, stride=16, width=1 / 16, gamma=0.5, p=0.9).train()
    output = model(torch.rand(2, 3, 64, 64))
    ((output.features - output.features_dropped).abs().mean() + output.logits.sum()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    "arch, stride, width, n, layers",
    [
        ("vgg16", 16, 1 / 16, 0, ()),
        ("vgg16", 8, 1 / 16, 2, ("features.0.", "features.2.", "features.5.", "features.7.")),
        ("vgg16", 8, 1 / 16, 5, ("features.",)),
        ("resnet50", 16, 1.0, 2, ("conv1.", "bn1.", "layer1.")),
    ],
)
def test_frozen_blocks_keep_their_weights_and_all_others_learn(arch, stride, width, n, layers):
    model = build_model(arch, 3, stride=stride, width=width, gamma=0.5, p=0.9).freeze_blocks(n).train()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(
        model, arch, lr=0.1, lr_new=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    model(torch.rand(2, 3, 64, 64)).logits.sum().backward()
    optimizer.step()
    kept = {name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])}
    assert kept == {name for name in before if name.startswith(layers)}


def test_more_frozen_blocks_than_there_are():
    model = build_model("vgg16", 3, stride=16, width=1 / 16)
    with pytest.raises(InputError, match="--frozen-blocks 6: .* 5 pretrained blocks"):
        model.freeze_blocks(6)


def test_vgg16_loads_a_file_in_torchvision_s_format(tmp_path):
    features = make_layers(cfgs["D"])
    state = {f"features.{k}": v for k, v in features.state_dict().items()}
    torch.save(state | {"classifier.0.weight": torch.zeros(2, 2)}, tmp_path / "vgg16.pth")
    model = build_model("vgg16", 10, stride=16)
    new_layer = model.conv6[0].weight.clone()
    load_pretrained(model, "vgg16", str(tmp_path / "vgg16.pth"))
    for name, value in features.state_dict().items():
        torch.testing.assert_close(model.features.state_dict()[name], value, rtol=0, atol=0)
    torch.testing.assert_close(model.conv6[0].weight, new_layer, rtol=0, atol=0)


def test_batch_norm_of_vgg16_bn_is_folded_into_the_convolutions(tmp_path):
    layers = make_layers([c if c == "M" else c // 16 for c in cfgs["D"]], batch_norm=True)
    reference = torchvision.models.VGG(layers, 2, init_weights=False)
    torch.manual_seed(0)
    for module in reference.features:
        if isinstance(module, nn.BatchNorm2d):  # values as after training
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 1.5)
            for tensor in (module.bias.data, module.running_mean):
                tensor.normal_(std=0.2)
    state = {f"features.{k}": v for k, v in reference.features.state_dict().items()}
    torch.save(state, tmp_path / "vgg16_bn.pth")
    images = torch.rand(2, 3, 64, 64)
    expected = reference.features[:-1].eval()(images)
    for batch_norm in (False, True):
        model = build_model("vgg16", 3, stride=16, width=1 / 16, batch_norm=batch_norm).eval()
        load_pretrained(model, "vgg16", str(tmp_path / "vgg16_bn.pth"))
        torch.testing.assert_close(model.features(images), expected, rtol=1e-4, atol=1e-5)


def test_a_backbone_is_exported_in_half_precision(tmp_path):
    trained = build_model("vgg16", 3, stride=8, width=1 / 16, batch_norm=True)
    trained(torch.rand(4, 3, 64, 64))  # updates the running statistics
    torch.save({"model": trained.state_dict()}, tmp_path / "last.pt")
    export_backbone(tmp_path / "last.pt", tmp_path / "small.pth")
    state = torch.load(tmp_path / "small.pth", weights_only=True)
    assert {value.dtype for value in state.values()} == {torch.float16} and len(state) == 26
    model = build_model("vgg16", 9, stride=8, width=1 / 16).eval()
    load_pretrained(model, "vgg16", str(tmp_path / "small.pth"))
    images = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(model.features(images), trained.eval().features(images), rtol=0.02, atol=0.01)


@pytest.mark.parametrize("load_fc", [False, True])
def test_resnet50_loads_the_linear_layer_only_with_load_fc(tmp_path, load_fc):
    reference = torchvision.models.resnet50(weights=None)
    state = {k: v for k, v in reference.state_dict().items() if "num_batches_tracked" not in k}
    torch.save(state, tmp_path / "resnet50.pth")
    model = build_model("resnet50", 1000, stride=8)
    load_pretrained(model, "resnet50", str(tmp_path / "resnet50.pth"), load_fc=load_fc)
    assert torch.equal(model.layer4[2].conv3.weight, reference.layer4[2].conv3.weight)
    assert torch.equal(model.bn1.running_var, reference.bn1.running_var)
    assert torch.equal(model.fc.weight, reference.fc.weight) == load_fc


def test_a_wrong_weights_file_is_described(tmp_path):
    model = build_model("vgg16", 10, stride=16, width=1 / 16)
    state = {k: v for k, v in model.state_dict().items() if k.startswith("features.")}
    del state["features.0.bias"]
    state["features.2.weight"] = torch.zeros(3, 3)
    torch.save(state, tmp_path / "odd.pth")
    problems = r"missing: features.0.bias; wrong shape: features.2.weight \(3x3 in the file, 4x4x3x3"
    with pytest.raises(InputError, match=f"odd.pth.*{problems}"):
        load_pretrained(model, "vgg16", str(tmp_path / "odd.pth"))
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), tmp_path / "resnet18.pth")
    missing = "missing: features.0.weight, features.0.bias, features.2.weight and 23 more"
    with pytest.raises(InputError, match=missing):
        load_pretrained(model, "vgg16", str(tmp_path / "resnet18.pth"))
    (tmp_path / "text.pth").write_text("not weights")
    for name, words in (("text.pth", "damaged"), ("absent.pth", "no such file")):
        with pytest.raises(InputError, match=f"{name}: {words}"):
            load_pretrained(model, "vgg16", str(tmp_path / name))


def test_incomplete_batch_norm_is_described(tmp_path):
    state = build_model("vgg16", 2, stride=16, width=1 / 16, batch_norm=True).state_dict()
    del state["features.1.running_var"]
    torch.save(state, tmp_path / "bn.pth")
    torch.save({"a.running_mean": 3, "model": 4}, tmp_path / "numbers.pth")
    for name, words in (
        ("bn.pth", "batch norm does not match vgg16_bn .*running_var"),
        ("numbers.pth", "weights do not fit this vgg16"),
    ):
        with pytest.raises(InputError, match=f"{name}: {words}"):
            load_pretrained(build_model("vgg16", 2, stride=16, width=1 / 16), "vgg16", str(tmp_path / name))
    with pytest.raises(InputError, match="numbers.pth: not a checkpoint of train.py"):
        export_backbone(tmp_path / "numbers.pth", tmp_path / "out.pth")


def test_a_weights_file_is_never_executed(tmp_path):
    class Harm:
        def __reduce__(self):
            return (open, (str(tmp_path / "harmed"), "w"))

    torch.save({"features.0.weight": Harm()}, tmp_path / "harm.pth")
    with pytest.raises(InputError, match="harm.pth: damaged, or not a file of tensors"):
        load_pretrained(build_model("vgg16", 2, stride=16, width=1 / 16), "vgg16", str(tmp_path / "harm.pth"))
    assert not (tmp_path / "harmed").exists()


def test_imagenet_weights_come_from_torchvision_with_checksum_and_weights_only(monkeypatch):
    features, calls = make_layers(cfgs["D"]), []

    def download(url, *args, **kwargs):
        calls.append((url, kwargs))
        return {f"features.{k}": v for k, v in features.state_dict().items()}

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", download)
    model = build_model("vgg16", 10, stride=16)
    load_pretrained(model, "vgg16", "imagenet")
    assert torch.equal(model.features[0].weight, features[0].weight)
    ((url, kwargs),) = calls
    assert url.endswith("vgg16-397923af.pth") and kwargs["check_hash"] and kwargs["weights_only"]


@pytest.mark.parametrize(
    "error", [URLError("no network"), RuntimeError("invalid hash value"), TimeoutError("timed out")]
)
def test_the_message_of_a_failed_download_has_the_url_and_the_flags(monkeypatch, error):
    def download(*args, **kwargs):
        raise error

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", download)
    with pytest.raises(InputError) as raised:
        load_pretrained(build_model("resnet50", 10, stride=8), "resnet50", "imagenet")
    message = str(raised.value)
    for words in ("resnet50-0676ba61.pth", "--weights FILE", "--weights none"):
        assert words in message
    assert "\n" not in message


def test_unknown_networks_raise():
    for arguments in (
        {"arch": "vgg19", "stride": 16},
        {"arch": "vgg16", "stride": 32},
        {"arch": "resnet50", "stride": 8, "width": 0.5},
    ):
        with pytest.raises(InputError):
            build_model(num_classes=3, **arguments)


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="needs the CPU flags of Linux")
def test_amp_auto_is_bf16_on_a_cpu_with_bf16_instructions(monkeypatch):
    cpu, flags = torch.device("cpu"), Path("/proc/cpuinfo").read_text()
    assert utils.has_bf16(cpu) == ("avx512_bf16" in flags or "amx_bf16" in flags)

    def product(amp):
        with utils.autocast(cpu, amp):
            return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype

    for has in (True, False):
        monkeypatch.setattr(utils, "has_bf16", lambda device, has=has: has)
        assert product("auto") == (torch.bfloat16 if has else torch.float32)
        assert product("bf16") == torch.bfloat16 and product("off") == torch.float32
