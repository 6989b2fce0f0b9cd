"""The decomposition, the resize against its published kernel, the normalizations on maps sorted by hand."""

import numpy as np
import pytest
import torch

from bridge_wsol.cam import class_activation_map, decompose, normalize, resize


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
    """Of any scale: the maps of CALM are small."""
    for scale in (1, 2**-12, 2**-40):
        torch.testing.assert_close(normalize(TWENTY * scale, how, percentile), expected)


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
