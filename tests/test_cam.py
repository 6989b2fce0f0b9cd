"""The decomposition, the resize against its published kernel, the normalizations on maps sorted by hand, and
the flags of evaluate.py that change a map.
"""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import results, run

from bridge_wsol import evaluation
from bridge_wsol.cam import class_activation_map, decompose, normalize, resize
from bridge_wsol.data import Split
from bridge_wsol.metrics import label_ranks

EVALUATE = "--device cpu --workers 0 --batch-size 8"


def test_the_three_factors_multiply_to_the_map():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(4, 32, 7, 5, generator=generator).relu()
    features[0, :, 2, 2] = 0
    weight, labels = torch.randn(10, 32, generator=generator), torch.tensor([3, 3, 0, 9])
    cam, factors = class_activation_map(features, weight, labels), decompose(features, weight, labels)
    product = factors.weight_norm[:, None, None] * factors.F * factors.S
    torch.testing.assert_close(product, cam, rtol=1e-5, atol=1e-5)
    assert (factors.F >= 0).all() and (factors.S.abs() <= 1 + 1e-6).all() and factors.S[0, 2, 2] == 0
    loops = torch.stack([sum(weight[y, c] * features[n, c] for c in range(32)) for n, y in enumerate(labels)])
    torch.testing.assert_close(cam, loops, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(class_activation_map(features, weight, labels), cam)
        assert {x.dtype for x in decompose(features, weight, labels)} == {torch.float32}


def test_map_factors_resize_and_normalizations_against_numpy():
    """float64 stays float64. The resize is the bicubic one of the protocol."""
    rng = np.random.default_rng(0)
    features, weight, labels = np.abs(rng.normal(size=(2, 8, 14, 14))), rng.normal(size=(3, 8)), [2, 0]
    tensors = torch.tensor(features), torch.tensor(weight), torch.tensor(labels)
    expected = np.einsum("nc,nchw->nhw", weight[labels], features)
    norm, F = np.linalg.norm(weight[labels], axis=1), np.linalg.norm(features, axis=1)
    maps, factors = class_activation_map(*tensors), decompose(*tensors)
    kernel = bicubic_matrix(14, 56)
    large = kernel @ expected @ kernel.T
    low, high = (f(large, axis=(1, 2), keepdims=True) for f in (np.min, np.max))
    at_90, at_45 = (np.sort(large.reshape(2, -1))[:, int(q * 56**2), None, None] for q in (0.9, 0.45))
    for found, wanted in (
        (maps, expected),
        (factors.weight_norm, norm),
        (factors.F, F),
        (factors.S, expected / (norm[:, None, None] * F)),
        (resize(maps, 14), expected),
        (resize(maps, 56), large),
        (normalize(resize(maps, 56), "minmax"), (large - low) / (high - low)),
        (normalize(resize(maps, 56), "max"), large.clip(0) / high),
        (normalize(resize(maps, 56), "pas"), ((large - low) / (at_90 - low)).clip(max=1)),
        (normalize(resize(maps, 56), "ivr"), (large - at_45).clip(0) / (high - at_45)),
        (normalize(resize(maps, 56), "log"), 1 + np.log10(large.clip(1e-7, 1)) / 7),
    ):
        torch.testing.assert_close(found, torch.tensor(wanted), rtol=1e-12, atol=1e-12)
    kernel = bicubic_matrix(14, 224)
    np.testing.assert_allclose(resize(maps.float(), 224), kernel @ expected @ kernel.T, atol=1e-5)


def bicubic_matrix(n, size):
    """Matrix of the 1-D bicubic resize n -> size: a = -0.75, half-pixel centres, borders repeated."""
    a, matrix = -0.75, np.zeros((size, n))
    for i in range(size):
        x = (i + 0.5) * n / size - 0.5
        for j in range(int(np.floor(x)) - 1, int(np.floor(x)) + 3):
            d = abs(x - j)
            w = (a + 2) * d**3 - (a + 3) * d**2 + 1 if d <= 1 else a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
            matrix[i, min(max(j, 0), n - 1)] += w
    return matrix


# 1 ... 20 in random order. In sorted order, 19 is at index int(0.9 * 20) = 18, and 10 at int(0.45 * 20) = 9.
TWENTY = torch.randperm(20, generator=torch.Generator().manual_seed(0)).view(1, 4, 5) + 1.0


@pytest.mark.parametrize(
    "how, percentile, expected",
    [
        ("max", None, TWENTY / 20),
        ("pas", None, ((TWENTY - 1) / 18).clamp(max=1)),
        ("pas", 0.5, ((TWENTY - 1) / 10).clamp(max=1)),
        ("ivr", None, (TWENTY - 10).clamp(min=0) / 10),
        ("ivr", 0.0, (TWENTY - 1) / 19),
        ("minmax", None, (TWENTY - 1) / 19),
    ],
)
def test_percentile_normalizations_on_a_map_sorted_by_hand(how, percentile, expected):
    torch.testing.assert_close(normalize(TWENTY, how, percentile), expected)


def test_each_map_by_itself_without_negative_values_or_by_the_logarithm():
    maps = torch.tensor([[[-2.0, 1.0], [4.0, 0.0]], [[-4.0, 0.0], [0.0, 4.0]]])
    normalized = torch.tensor([[[0.0, 0.25], [1.0, 0.0]], [[0.0, 0.0], [0.0, 1.0]]])
    torch.testing.assert_close(normalize(maps, "max"), normalized)
    normalized = torch.tensor([[[0.0, 0.5], [1.0, 1 / 3]], [[0.0, 0.5], [0.5, 1.0]]])
    torch.testing.assert_close(normalize(maps), normalized)
    probabilities = torch.tensor([[[1e-7, 10**-3.5, 1.0], [0.0, 0.1, 1e-9]]])
    normalized = torch.tensor([[[0.0, 0.5, 1.0], [0.0, 6 / 7, 0.0]]])
    torch.testing.assert_close(normalize(probabilities, "log"), normalized)


@pytest.mark.parametrize("how", ["minmax", "max", "pas", "ivr", "log"])
def test_constant_and_non_finite_maps_become_zeros(how):
    maps = torch.rand(5, 3, 3)
    maps[0], maps[1], maps[2, 0, 0], maps[3, 1, 1] = 2.5, 0.0, float("nan"), float("inf")
    normalized = normalize(maps, how)
    assert (normalized[:4] == 0).all() and (normalized[4].max() == 1 or how == "log")
    assert (normalize(-torch.rand(1, 3, 3) - 1, "max") == 0).all()


def test_unknown_normalizations_raise():
    with pytest.raises(ValueError, match="minmax, max, pas, ivr"):
        normalize(TWENTY, "softmax")
    with pytest.raises(ValueError, match="percentile"):
        normalize(TWENTY, "ivr", 1.0)


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
    maps = [evaluation.MapBatch([0, 1], np.stack([noisy, faint]))]
    method = SimpleNamespace(config=SimpleNamespace(image_size=10), upsampling="bilinear")
    q, choice, _ = evaluation.choose_percentile(maps, split, method, workers=0)
    assert q == 0.35 and choice["by"] == "MaxBoxAccV2"
    assert choice["scores"] == {q: 100.0 if q in (0.35, 0.4, 0.45) else 50.0 for q in evaluation.QS}


def test_ivr_s_percentile_and_thresholds_are_chosen_on_val(trained):
    folder, flags = trained[1], f"{trained[1]} --device cpu --workers 0 --normalize ivr"
    run("evaluate", f"{flags} --percentile val")
    chosen = results(folder, "results_best_test_ivr_val.json")
    q, scores = chosen["percentile"]["value"], chosen["percentile"]["scores"]
    assert [float(key) for key in scores] == [round(0.05 * i, 2) for i in range(1, 15)]
    for key in ("0.05", "0.45", str(q)):
        run("evaluate", f"{flags} --percentile {key} --split val")
        on_val = results(folder, f"results_best_val_ivr_{key}.json")
        assert on_val["metrics"]["max_box_acc_v2"]["mean"] == scores[key]
    run("evaluate", f"{flags} --split val")  # the default is 0.45
    assert results(folder, "results_best_val_ivr.json") == results(folder, "results_best_val_ivr_0.45.json")
    assert q == min(float(key) for key in scores if scores[key] == max(scores.values()))
    run("evaluate", f"{flags} --percentile {q}")
    given = results(folder, f"results_best_test_ivr_{q}.json")
    assert given.pop("percentile") == {"value": q} and chosen.pop("percentile") and given == chosen
    at_val = given["metrics"]["max_box_acc_v2_at_val_threshold"]
    assert all(at_val[d] == given["curves"][d][on_val["levels"][d]] for d in ("30", "50", "70"))


def test_bad_percentiles_and_a_val_without_boxes(trained, fails, tmp_path):
    for flags in (
        "--percentile 0.5",
        "--normalize max --percentile 0.5",
        "--normalize pas --percentile val",
        "--normalize ivr --percentile 1",
        "--normalize ivr --percentile half",
    ):
        fails("evaluate", f"{trained[1]} {flags}", "--percentile")
    flags = f"{trained[1]} {EVALUATE} --lists {tmp_path}/lists --normalize ivr --percentile val"
    val, test = (tmp_path / "lists" / "tiny" / name / "localization.txt" for name in ("val", "test"))
    for path in (val, test):
        path.write_text("".join(x for x in path.read_text().splitlines(keepends=True) if "masks" in x))
    run("evaluate", f"{flags} --out {tmp_path}/masks.json")
    assert results(tmp_path, "masks.json")["percentile"]["by"] == "PxAP"
    val.unlink()
    fails("evaluate", flags, "--percentile val", "neither boxes nor masks")


def test_another_map_of_a_trained_run(tiny, tmp_path, fails):
    """The map values of evaluate.py: metrics and val's thresholds of a run that was trained with them."""
    expected, joint = {}, tmp_path / "joint"
    for value in ("joint", "location"):
        run("train", f"{tiny} --method calm --calm-map {value} --epochs 1 --out {tmp_path}/{value}")
        expected[value] = results(tmp_path / value, "results_last_test.json")
    run("evaluate", f"{joint} {EVALUATE} --checkpoint last --calm-map location")
    found = results(joint, "results_last_test_calm_map=location.json")
    assert found.pop("calm_map") == "location" and found == expected["location"] != expected["joint"]
    assert found["metrics"]["max_box_acc_v2_at_val_threshold"] is not None
    assert results(joint, "results_last_test.json") == expected["joint"]
    fails("evaluate", f"{joint} --calm-map sum", "--calm-map", "sum")
    fails("evaluate", f"{joint} --pas-nwc off", "--pas-nwc", "--method calm")
    for flags in (f"{joint} --images a.jpg", f"--score-maps {tmp_path} --dataset tiny"):
        fails("evaluate", f"{flags} --calm-map joint", "values of a map")


@pytest.mark.parametrize("dtype, rank", [(torch.float64, 1), (torch.bfloat16, 0)])
def test_classes_are_ranked_in_the_logits_own_precision(dtype, rank):
    """The first two are equal in float32 and bf16. Of equal logits, the lower class ranks first."""

    class Method(torch.nn.Linear):
        config, upsampling = SimpleNamespace(image_size=8), "bilinear"

        def predict(self, images, labels):
            return torch.tensor([[1.0, 1 + 1e-12, 0.5]], dtype=torch.float64).to(dtype), torch.zeros(1, 4, 4)

    loader = [(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.tensor([0]), torch.tensor([0]))]
    (batch,) = evaluation.network_maps(Method(1, 1), loader, amp="off")
    assert label_ranks(batch.logits, np.array([0])).tolist() == [rank]
