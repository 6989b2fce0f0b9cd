"""On a GPU: the CPU's losses, gradients, maps and metrics; training, resume, evaluation. Skipped elsewhere.

float32 here is without TF32, so the tolerances are those of another order of sums.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from test_train import lines_of, read_json
from torch import nn

import evaluate
import train
from bridge_wsol import demo, evaluation, optim
from bridge_wsol.baselines import METHODS
from bridge_wsol.data import split_loaders, test_loader, to_input
from bridge_wsol.datasets import load_splits
from bridge_wsol.losses import alignment_losses, attentive_dropout, consistency_loss
from bridge_wsol.models import load_tensors
from bridge_wsol.utils import autocast, resolve_device

DEVICE = torch.device("cuda:0")
CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def float32_is_float32():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def make(name, arch, device, **values):
    """(method, network of seed 0 on the device); VGG16 at 1/4 of its width."""
    preset = optim.preset("CUB", arch) | METHODS[name].preset("CUB", arch)
    config = SimpleNamespace(arch=arch, **{key: value for key, (value, _) in preset.items()})
    if arch == "vgg16":
        config.width = 1 / 4
    vars(config).update(values)
    torch.manual_seed(0)
    method = METHODS[name](config)
    return method, method.network(5).to(device, memory_format=torch.channels_last)


def batch(device, n=4):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (n, 3, 112, 112), dtype=torch.uint8, generator=generator)
    return to_input(images, device), torch.arange(n, device=device) % 5


@pytest.mark.parametrize("arch", ["vgg16", "resnet50"])
@pytest.mark.parametrize("name", METHODS)
def test_losses_gradients_and_maps_are_the_cpu_s(name, arch):
    found = []
    for device in (CPU, DEVICE):
        # p = 1 drops every candidate: the generators of the devices draw different numbers. The draws of the
        # compared methods come from the CPU's generator on both.
        method, model = make(name, arch, device, p=1.0)
        images, labels = batch(device)
        torch.manual_seed(1)
        terms, logits = method.losses(model.train(), images, labels, epoch=70)
        sum(weight * value for weight, value in terms.values()).backward()
        gradients = {key: p.grad.cpu() for key, p in model.named_parameters() if p.grad is not None}
        with torch.no_grad():
            _, maps = method.predict(model.eval(), images, labels)
        losses = {key: value.detach().cpu() for key, (_, value) in terms.items()}
        found.append((losses, logits.detach().cpu(), gradients, maps.cpu()))
    (losses, logits, gradients, maps), on_gpu = found
    for key, value in losses.items():
        torch.testing.assert_close(on_gpu[0][key], value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(on_gpu[1], logits, rtol=1e-3, atol=1e-4)
    assert on_gpu[2].keys() == gradients.keys()
    for key, value in gradients.items():
        difference = float((on_gpu[2][key] - value).norm())
        assert difference <= 1e-2 * float(value.norm()) + 1e-5, key
    scale = float(maps.abs().max())
    torch.testing.assert_close(on_gpu[3], maps, rtol=1e-3, atol=1e-3 * scale)


@pytest.mark.parametrize("norm_class", ["target", "max"])
def test_bf16_is_finite_on_zero_vectors_and_constant_maps(norm_class):
    torch.manual_seed(0)
    features = torch.randn(4, 8, 5, 5).relu()
    features[0] = 0  # no feature at all
    features[1] = 1  # a constant map
    features[2, :, :2] = 0  # some zero vectors
    features = features.to(DEVICE).requires_grad_()
    weight = torch.randn(3, 8)
    weight[1] = 0
    weight, labels = weight.to(DEVICE).requires_grad_(), torch.tensor([0, 1, 2, 1], device=DEVICE)
    with autocast(DEVICE, "bf16"):
        low = features.to(torch.bfloat16)
        l_sim, l_norm = alignment_losses(low, weight, labels, 0.6, 0.1, norm_class)
        l_drop = consistency_loss(low, attentive_dropout(low, 0.8, 0.5))
    (l_sim + l_norm + l_drop).backward()
    assert all(value.isfinite() for value in (l_sim, l_norm, l_drop))
    assert features.grad.isfinite().all() and weight.grad.isfinite().all()


def test_a_run_learns_what_the_cpu_learns_and_evaluates_to_the_same(trained, tmp_path):
    flags, _ = trained
    flags = flags[: flags.index("--device")] + flags[flags.index("--workers") :]
    runs = {"on_cpu": CPU, "on_gpu": DEVICE}
    for name, device in runs.items():
        more = ["--device", str(device), "--amp", "off", "--p", "0", "--out", str(tmp_path / name)]
        train.main([*flags, *more])
    for a, b in zip(lines_of(tmp_path / "on_gpu"), lines_of(tmp_path / "on_cpu"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-2)

    # One checkpoint on both devices: images near a threshold may change sides, at most one of nine here.
    results = {}
    for name, device in runs.items():
        out = ["--out", str(tmp_path / f"{name}.json")]
        evaluate.main([str(tmp_path / "on_gpu"), "--device", str(device), "--amp", "off", *out])
        results[name] = read_json(tmp_path / f"{name}.json")
    for key, value in results["on_cpu"]["metrics"].items():
        found = results["on_gpu"]["metrics"][key]
        pairs = [(found, value)] if not isinstance(value, dict) else [(found[k], value[k]) for k in value]
        for a, b in pairs:
            assert (a is None and b is None) or abs(a - b) <= 100 / 9 + 1e-9, key


def test_scores_of_the_same_checkpoint_agree_map_by_map(trained, tmp_path):
    _, run = trained
    split = load_splits("tiny", tmp_path / "data", tmp_path / "splits", ("test",))[0]["test"]
    maps = []
    for device in (CPU, DEVICE):
        model, method, checkpoint = evaluation.load_run(run, "last", device)
        loader = test_loader(split, 8, image_size=checkpoint["config"]["image_size"], workers=2)
        setting = {"method": method, "device": device, "amp": "off", "normalization": "minmax"}
        batches = evaluation.network_maps(model, loader, image_size=64, **setting)
        maps.append(np.concatenate([found.maps for found in batches]))
    np.testing.assert_allclose(*maps, atol=1e-3)


def test_resume_continues_on_the_gpu(trained, tmp_path):
    flags, _ = trained
    flags = [*flags[: flags.index("--device")], "--device", str(DEVICE), "--workers", "2"]
    train.main([*flags, "--epochs", "2", "--out", str(tmp_path / "whole")])
    train.main([*flags, "--epochs", "1", "--out", str(tmp_path / "half")])
    states = load_tensors(tmp_path / "half" / "last.pt")["random_states"]
    assert len(states["cuda"]) == torch.cuda.device_count()
    train.main([*flags, "--epochs", "2", "--out", str(tmp_path / "half"), "--resume"])
    whole, resumed = lines_of(tmp_path / "whole"), lines_of(tmp_path / "half")
    assert [line["epoch"] for line in resumed] == [1, 2]
    for a, b in zip(whole, resumed):  # some sums on a GPU have no fixed order
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)


def test_pinned_batches_reach_the_gpu_unchanged(trained, tmp_path):
    flags, run = trained
    splits = load_splits("tiny", tmp_path / "data", tmp_path / "splits", ("train", "val", "test"))[0]
    config = {name: entry["value"] for name, entry in read_json(run / "config.json")["config"].items()}
    batches = {}
    for workers in (0, 2):
        loader = split_loaders(splits, config | {"workers": workers}, None)[config["batch_size"]]
        batches[workers] = list(loader)
        assert all(images.is_pinned() and labels.is_pinned() for images, labels in batches[workers])
    for (a, _), (b, labels) in zip(batches[0], batches[2], strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(to_input(b, DEVICE).cpu(), to_input(a.clone(), CPU))
        assert torch.equal(labels.to(DEVICE, non_blocking=True).cpu(), labels)


def test_batch_norm_over_one_process_and_nccl(tmp_path):
    """With one process, SyncBatchNorm under NCCL is batch norm, and averaged gradients are the gradients."""
    images, labels = batch(DEVICE)
    gradients = []
    dist.init_process_group("nccl", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        for distributed in (False, True):
            method, model = make("bridge", "resnet50", DEVICE, p=1.0)
            step = train.TrainingStep(model, method).train()
            if distributed:
                step = nn.SyncBatchNorm.convert_sync_batchnorm(step)
                step = nn.parallel.DistributedDataParallel(step, device_ids=[0])
            terms, _ = step(images, labels, 70)
            sum(weight * value for weight, value in terms.values()).backward()
            gradients.append([p.grad.clone() for p in model.parameters()])
    finally:
        dist.destroy_process_group()
    for a, b in zip(*gradients, strict=True):
        assert float((a - b).norm()) <= 1e-2 * float(a.norm()) + 1e-5


def test_an_epoch_of_the_demo_trains(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "DEMO_COUNTS", {"train": 64, "val": 16, "test": 16})
    places = ["--data-root", str(tmp_path / "data"), "--splits", str(tmp_path / "splits")]
    train.main(["--epochs", "2", "--device", str(DEVICE), *places, "--out", str(tmp_path / "run")])
    first, second = lines_of(tmp_path / "run")
    assert second["loss"] < first["loss"]
    config = read_json(tmp_path / "run" / "config.json")
    assert config["environment"]["device"] == torch.cuda.get_device_name(DEVICE)
    assert Image.open(tmp_path / "run" / "boxes_test.png").width > 3 * 224


def test_devices_by_name():
    assert resolve_device("auto") == resolve_device("cuda") == resolve_device("cuda:0") == DEVICE


def test_too_large_a_batch_is_one_line_that_names_the_flag(trained, fails, tmp_path):
    flags, _ = trained
    flags = flags[: flags.index("--device")]
    torch.cuda.set_per_process_memory_fraction(1e-4)  # a few MB
    try:
        asked = [*flags, "--device", str(DEVICE), "--workers", "0", "--batch-size", "18"]
        fails(train.main, [*asked, "--out", tmp_path / "big"], "memory", "--batch-size")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
