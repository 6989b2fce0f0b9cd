"""On a GPU: the CPU's losses, gradients, maps and metrics; training, resume, evaluation. Skipped elsewhere.

float32 here is without TF32, so the tolerances are those of another order of sums.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import lines_of, results, run
from PIL import Image
from torch import nn

from bridge_wsol.config import preset_values
from bridge_wsol.data import TrainImages, to_input, train_loader
from bridge_wsol.datasets import load_splits
from bridge_wsol.evaluation import TrainedRun
from bridge_wsol.losses import alignment_losses, attentive_dropout, consistency_loss
from bridge_wsol.methods import METHODS
from bridge_wsol.reproduce import demo
from bridge_wsol.utils import autocast, load_tensors, resolve_device

DEVICE = torch.device("cuda:0")
CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def float32_is_float32():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def make(name, arch, device):
    """A method with CUB's preset and the network of seed 0 on the device, VGG16 at 1/4 of its width.

    p = 1 drops every candidate: the generators of the devices draw different numbers. The draws of the
    compared methods come from the CPU's generator on both.
    """
    config = {key: value for key, (value, _) in preset_values("CUB", arch, name).items()}
    config |= {"arch": arch, "width": 1 / 4 if arch == "vgg16" else 1.0, "p": 1.0}
    torch.manual_seed(0)
    return METHODS[name](SimpleNamespace(**config), 5).to(device, memory_format=torch.channels_last)


def batch(device, n=4):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (n, 3, 112, 112), dtype=torch.uint8, generator=generator)
    return to_input(images, device), torch.arange(n, device=device) % 5


@pytest.mark.parametrize("arch", ["vgg16", "resnet50"])
@pytest.mark.parametrize("name", METHODS)
def test_losses_gradients_and_maps_are_the_cpu_s(name, arch):
    found = []
    for device in (CPU, DEVICE):
        method, (images, labels) = make(name, arch, device), batch(device)
        torch.manual_seed(1)
        terms, logits = method.train()(images, labels, 70)
        sum(weight * value for weight, value in terms.values()).backward()
        gradients = {key: p.grad.cpu() for key, p in method.named_parameters() if p.grad is not None}
        with torch.no_grad():
            _, maps = method.eval().predict(images, labels)
        losses = {key: value.detach().cpu() for key, (_, value) in terms.items()}
        found.append((losses, logits.detach().cpu(), gradients, maps.cpu()))
    (losses, logits, gradients, maps), on_gpu = found
    torch.testing.assert_close(on_gpu[0], losses, rtol=1e-4, atol=1e-5)
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


def test_a_run_learns_what_the_cpu_learns_and_evaluates_to_the_same(tiny, tmp_path):
    folders = {device: tmp_path / device.type for device in (CPU, DEVICE)}
    for device, folder in folders.items():
        run("train", f"{tiny} --drop-p 0 --device {device} --out {folder}")
    for a, b in zip(*map(lines_of, folders.values()), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-2)

    # One checkpoint on both devices: images near a threshold may change sides, at most one of nine here.
    metrics, maps = [], []
    for device in folders:
        out, saved = tmp_path / f"{device.type}.json", tmp_path / f"maps_{device.type}"
        run("evaluate", f"{folders[DEVICE]} --device {device} --amp off --out {out} --save-maps {saved}")
        metrics.append(results(tmp_path, out.name)["metrics"])
        maps.append(np.stack([np.load(path) for path in sorted(saved.rglob("*.npy"))]))
    assert len(maps[0]) == 9
    np.testing.assert_allclose(*maps, atol=1e-3)
    for key, value in metrics[0].items():
        found = metrics[1][key]
        pairs = [(found[k], value[k]) for k in value] if isinstance(value, dict) else [(found, value)]
        for a, b in pairs:
            assert (a is None and b is None) or abs(a - b) <= 100 / 9 + 1e-9, key


def test_resume_continues_on_the_gpu(tiny, tmp_path):
    flags, half = f"{tiny} --device {DEVICE} --workers 2 --out", tmp_path / "half"
    run("train", f"{flags} {tmp_path}/whole")
    run("train", f"{flags} {half} --epochs 1")
    states = load_tensors(half / "last.pt")["random_states"]
    assert len(states["cuda"]) == torch.cuda.device_count()
    run("train", f"{flags} {half} --resume")
    for a, b in zip(lines_of(tmp_path / "whole"), lines_of(half), strict=True):
        # Some sums on a GPU have no fixed order.
        assert a["epoch"] == b["epoch"] and a["loss"] == pytest.approx(b["loss"], rel=1e-3)


def test_pinned_batches_reach_the_gpu_unchanged(tiny, tmp_path):
    train = load_splits("tiny", tmp_path / "data", tmp_path / "lists", ("train",))[0]["train"]
    images, batches = TrainImages(train, 72, 64, seed=0), []
    for workers in (0, 2):
        batches.append(list(train_loader(images, 8, workers)))
        assert all(x.is_pinned() and labels.is_pinned() for x, labels in batches[-1])
    for (a, _), (b, labels) in zip(*batches, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(to_input(b, DEVICE).cpu(), to_input(a.clone(), CPU))
        assert torch.equal(labels.to(DEVICE, non_blocking=True).cpu(), labels)


def test_batch_norm_over_one_process_and_nccl(tmp_path):
    """With one process, SyncBatchNorm under NCCL is batch norm, and averaged gradients are the gradients."""
    (images, labels), gradients = batch(DEVICE), []
    dist.init_process_group("nccl", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        for distributed in (False, True):
            method = step = make("bridge", "resnet50", DEVICE).train()
            if distributed:
                method = nn.SyncBatchNorm.convert_sync_batchnorm(method)
                step = nn.parallel.DistributedDataParallel(method)
            terms, _ = step(images, labels, 70)
            sum(weight * value for weight, value in terms.values()).backward()
            gradients.append([p.grad.clone() for p in method.parameters()])
    finally:
        dist.destroy_process_group()
    for a, b in zip(*gradients, strict=True):
        assert float((a - b).norm()) <= 1e-2 * float(a.norm()) + 1e-5


def test_an_epoch_of_the_demo_trains(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "DEMO_COUNTS", {"train": 64, "val": 16, "test": 16})
    folder, places = tmp_path / "run", f"--data-root {tmp_path}/data --lists {tmp_path}/lists"
    run("train", f"--epochs 2 --device {DEVICE} {places} --out {folder}")
    first, second = lines_of(folder)
    assert second["loss"] < first["loss"]
    environment = results(folder, "config.json")["environment"]
    assert environment["device"] == torch.cuda.get_device_name(DEVICE)
    assert resolve_device("auto") == resolve_device("cuda") == resolve_device("cuda:0") == DEVICE
    assert Image.open(folder / "boxes_test.png").width > 3 * 112
    assert next(TrainedRun(folder, "best", DEVICE).method.parameters()).device == DEVICE


def test_too_large_a_batch_is_one_line_that_names_the_flag(tiny, fails, tmp_path):
    torch.cuda.set_per_process_memory_fraction(1e-4)  # a few MB
    try:
        flags = f"{tiny} --device {DEVICE} --workers 0 --batch-size 18 --out {tmp_path}/big"
        fails("train", flags, "memory", "--batch-size")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
