"""The losses against maps computed by hand, loops over the formulas, and finite differences."""

import ast
import functools
import math
import shutil
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from bridge_wsol import losses
from bridge_wsol.losses import (
    alignment_losses,
    attentive_dropout,
    consistency_loss,
    cosine_map,
    feature_norm,
    minmax,
)


def hand_worked():
    """Four locations with f = (3,4), (0,1), (0,0), (4,3); classes w_0 = (1,-1), w_1 = (0,1).

    F = 5, 1, 0, 5 and F-hat = 1, 0.2, 0, 1.
    With r = 1 / (5 sqrt 2): S_0 = -r, -5r, 0, r and S_1 = 0.8, 1, 0, 0.6.
    """
    features = torch.tensor([[[3.0, 0.0], [0.0, 4.0]], [[4.0, 1.0], [0.0, 3.0]]], dtype=torch.float64)[None]
    return features, torch.tensor([[1.0, -1.0], [0.0, 1.0]], dtype=torch.float64)


def test_maps_of_the_hand_worked_case():
    features, weight = hand_worked()
    r = 1 / (5 * math.sqrt(2))
    F = torch.tensor([[[5.0, 1.0], [0.0, 5.0]]], dtype=torch.float64)
    torch.testing.assert_close(feature_norm(features), F)
    torch.testing.assert_close(minmax(feature_norm(features)), F / 5)
    S = torch.tensor([[[-r, -5 * r], [0.0, r]], [[0.8, 1.0], [0.0, 0.6]]], dtype=torch.float64)[None]
    torch.testing.assert_close(cosine_map(features, weight), S)


def test_alignment_losses_of_the_hand_worked_case():
    features, weight = hand_worked()
    r = 1 / (5 * math.sqrt(2))
    l_sim, l_norm = alignment_losses(features, weight, torch.tensor([0]), tau_fg=0.6, tau_bg=0.3)
    assert float(l_sim) == pytest.approx((-5 * r + 0) / 2 - (-r + r) / 2, abs=1e-12)
    assert float(l_norm) == pytest.approx((1 + 0.2) / 2 - 1, abs=1e-12)
    # With the maximum over classes, S = 0.8, 1, 0, 0.6: no location is negative, three are positive.
    same_l_sim, l_norm = alignment_losses(features, weight, torch.tensor([0]), 0.6, 0.3, norm_class="max")
    assert float(same_l_sim) == float(l_sim)
    assert float(l_norm) == pytest.approx(0 - (1 + 0.2 + 1) / 3, abs=1e-12)


def test_thresholds_are_strict_and_the_values_between_them_are_ignored():
    features, weight = hand_worked()
    r = 1 / (5 * math.sqrt(2))
    # F-hat = 0.2 is not above or below 0.2. Foreground: the two ones; background: the zero vector (S = 0).
    l_sim, _ = alignment_losses(features, weight, torch.tensor([0]), tau_fg=0.2, tau_bg=0.2)
    assert float(l_sim) == pytest.approx(0 - (-r + r) / 2, abs=1e-12)


def test_the_batch_is_averaged_and_an_image_with_empty_sets_adds_zero():
    features, weight = hand_worked()
    both = torch.cat([features, torch.zeros_like(features)])
    one = alignment_losses(features, weight, torch.tensor([0]), 0.6, 0.3)
    two = alignment_losses(both, weight, torch.tensor([0, 1]), 0.6, 0.3)
    for a, b in zip(one, two):
        assert float(b) == pytest.approx(float(a) / 2, abs=1e-12)


def by_the_formulas(features, weight, labels, tau_fg, tau_bg, norm_class):
    """As one writes them down first: all classes, image by image. A zero vector has no gradient here."""
    F = (features**2).sum(1).sqrt()
    low, high = F.amin((1, 2), keepdim=True), F.amax((1, 2), keepdim=True)
    directions = features / F[:, None].clamp(min=1e-12), weight / weight.norm(dim=1, keepdim=True)
    S = torch.einsum("nchw,kc->nkhw", *directions)

    def mean(values, where):
        return values[where].mean() if where.any() else values.new_zeros(())

    l_sim = l_norm = 0
    for s_all, y, f_hat in zip(S, labels, (F - low) / (high - low)):
        s = s_all.amax(0) if norm_class == "max" else s_all[y]
        l_sim = l_sim + mean(s_all[y], f_hat < tau_bg) - mean(s_all[y], f_hat > tau_fg)
        l_norm = l_norm + mean(f_hat, s < 0) - mean(f_hat, s > 0)
    return l_sim / len(labels), l_norm / len(labels)


@pytest.mark.parametrize("norm_class", ["target", "max"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_alignment_losses_equal_the_formulas(norm_class, dtype, tolerance):
    rng = np.random.default_rng(0)
    for _ in range(10):
        features = np.maximum(rng.normal(size=(3, 6, 5, 4)), 0) * rng.random((3, 1, 5, 4)) ** 3
        features[0, :, 1, 1] = 0
        features, weight = torch.tensor(features), torch.tensor(rng.normal(size=(4, 6)))
        others = torch.tensor(rng.integers(0, 4, 3)), 0.5, 0.2, norm_class
        expected = by_the_formulas(features, weight, *others)
        got = alignment_losses(features.to(dtype), weight.to(dtype), *others)
        assert [float(x) for x in got] == pytest.approx([float(x) for x in expected], abs=tolerance)


def test_float64_stays_and_every_other_type_becomes_float32():
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        found = losses.full_precision(torch.tensor([1.5], dtype=dtype, requires_grad=True))
        assert found.dtype == (dtype if dtype == torch.float64 else torch.float32)
        assert found.requires_grad and found.item() == 1.5


def test_gradients_equal_finite_differences():
    generator = torch.Generator().manual_seed(1)
    features = (torch.rand(2, 3, 3, 4, generator=generator, dtype=torch.float64) + 0.1).requires_grad_()
    weight = torch.randn(5, 3, generator=generator, dtype=torch.float64).requires_grad_()
    labels = torch.tensor([1, 4])
    assert gradcheck(feature_norm, features)
    assert gradcheck(lambda f: minmax(feature_norm(f)), features)
    assert gradcheck(cosine_map, (features, weight))
    for norm_class in ("target", "max"):
        losses_of = functools.partial(
            alignment_losses, labels=labels, tau_fg=0.6, tau_bg=0.3, norm_class=norm_class
        )
        assert gradcheck(losses_of, (features, weight))
    assert gradcheck(consistency_loss, (features, features.detach().flip(0).requires_grad_()))


@pytest.mark.parametrize("norm_class", ["target", "max"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "case", ["zero vectors", "all zero", "constant", "nearly constant", "denormal", "zero weight"]
)
def test_gradients_are_finite_where_the_formulas_are_not(case, dtype, norm_class):
    features = torch.rand(2, 4, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight = torch.ones(2, 4, dtype=torch.float64) - 2 * torch.eye(2, 4, dtype=torch.float64)
    if case == "zero vectors":
        features[:, :, 1] = 0
    elif case == "all zero":
        features[:] = 0
    elif case == "constant":
        features[:] = 0.3
    elif case == "nearly constant":
        features[:] = 0.3
        features[0, 0, 0, 0] += 1e-7
    elif case == "denormal":
        features *= torch.finfo(dtype).tiny / 100
    else:
        weight[:] = 0
    features, weight = features.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
        l_sim, l_norm = alignment_losses(features, weight, torch.tensor([0, 1]), 0.6, 0.3, norm_class)
        loss = l_sim + l_norm + consistency_loss(features, attentive_dropout(features, 0.8, 0.5))
    loss.backward()
    assert loss.isfinite()
    for gradient in (features.grad, weight.grad):
        assert gradient is None or (gradient.isfinite().all() and gradient.abs().max() < 1e8)


def test_a_zero_vector_and_a_constant_map_pass_no_gradient():
    features = torch.rand(1, 4, 2, 2, dtype=torch.float64)
    features[:, :, 0, 0] = 0
    features.requires_grad_()
    cosine_map(features, torch.randn(3, 4, dtype=torch.float64)).sum().backward()
    assert (features.grad[:, :, 0, 0] == 0).all() and (features.grad[:, :, 1, 1] != 0).all()

    constant = torch.full((1, 3, 3), 7.0, requires_grad=True)
    value = minmax(constant)
    value.sum().backward()
    assert (value == 0).all() and (constant.grad == 0).all()


def test_a_spread_of_a_few_rounding_steps_is_a_map():
    ramp = torch.arange(9.0).view(3, 3) / 8
    torch.testing.assert_close(minmax(1 + ramp / 2**13), ramp, rtol=0, atol=2**-10)


def test_masks_carry_no_gradient():
    features, weight = torch.rand(2, 4, 3, 3, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    l_sim, l_norm = alignment_losses(features, weight, torch.tensor([0, 3]), 0.6, 0.3, "max")
    # L_norm depends on the weight only through its sets; L_sim on the weights of ground-truth classes only.
    assert torch.autograd.grad(l_norm, weight, retain_graph=True, allow_unused=True)[0] is None
    (gradient,) = torch.autograd.grad(l_sim, weight)
    assert gradient.abs().sum(1).nonzero().flatten().tolist() == [0, 3]


def test_autocast_changes_no_value():
    features, weight, labels = torch.rand(2, 64, 7, 7), torch.randn(9, 64), torch.tensor([1, 2])

    def values():
        pair = alignment_losses(features, weight, labels, 0.6, 0.3, "max")
        return *pair, feature_norm(features), cosine_map(features, weight)

    outside = values()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = values()
    torch.testing.assert_close(inside, outside, rtol=0, atol=0)


def test_attentive_dropout_zeroes_only_the_candidates():
    # Channel means of image 0: 1.0, 0.81, 0.8, 0.1. The first two are above 0.8 * 1.0: the candidates.
    # Image 1 has ten times larger values.
    means = torch.tensor([[1.0, 0.81], [0.8, 0.1]])
    first, second = torch.stack([means * 1.5, means * 0.5]), torch.stack([means * 10, means * 10])
    features = torch.stack([first, second]).requires_grad_()
    dropped = attentive_dropout(features, gamma=0.8, p=1.0)
    keep = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    torch.testing.assert_close(dropped, features * keep, rtol=0, atol=0)
    dropped.sum().backward()
    torch.testing.assert_close(features.grad, keep.expand_as(features))


def test_attentive_dropout_draws_each_candidate_independently():
    features = torch.ones(200, 3, 10, 10)
    torch.manual_seed(0)
    zeroed = attentive_dropout(features, gamma=0.5, p=0.3) == 0
    assert (zeroed.all(1) | ~zeroed.any(1)).all()  # all channels of a location, or none
    zeroed = zeroed[:, 0].double()
    # 20,000 draws: five standard deviations are 0.016. The share does not depend on the image or location.
    assert float(zeroed.mean()) == pytest.approx(0.3, abs=0.015)
    assert float(zeroed.mean((1, 2)).std()) < 0.1 and float(zeroed.mean(0).std()) < 0.06


def test_attentive_dropout_without_probability_or_without_candidates_changes_nothing():
    features = torch.rand(2, 3, 4, 4)
    assert attentive_dropout(features, 0.8, 0.0) is features
    assert (attentive_dropout(torch.zeros(2, 3, 4, 4), 0.8, 1.0) == 0).all()
    torch.testing.assert_close(attentive_dropout(features, 1.0, 1.0), features)  # none above the maximum


def test_consistency_loss_is_the_mean_absolute_difference_and_reaches_both_passes():
    clean = torch.tensor([1.0, 4.0]).view(1, 2, 1, 1).requires_grad_()
    dropped = torch.tensor([3.0, 0.0]).view(1, 2, 1, 1).requires_grad_()
    loss = consistency_loss(clean, dropped)
    loss.backward()
    assert loss.item() == 3.0
    assert clean.grad.flatten().tolist() == [-0.5, 0.5] and dropped.grad.flatten().tolist() == [0.5, -0.5]


def test_wrong_arguments_raise():
    with pytest.raises(ValueError):
        alignment_losses(*hand_worked(), torch.tensor([0]), 0.6, 0.3, norm_class="mean")
    for taus in ((0.3, 0.6), (60, 10), (0.6, -0.1), (float("nan"), 0.1)):
        with pytest.raises(ValueError):
            alignment_losses(*hand_worked(), torch.tensor([0]), *taus)
    with pytest.raises(ValueError):
        cosine_map(hand_worked()[0], torch.ones(3, 5))


def test_losses_imports_only_torch_and_works_as_a_copy(tmp_path):
    tree = ast.parse(Path(losses.__file__).read_text())
    modules = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {module.split(".")[0] for module in modules} == {"torch", "__future__"}

    alone = spec_from_file_location("alone", shutil.copy(losses.__file__, tmp_path))
    module = module_from_spec(alone)
    alone.loader.exec_module(module)
    assert module.minmax(torch.arange(4.0).view(2, 2) / 3).flatten().tolist() == pytest.approx(
        [0, 1 / 3, 2 / 3, 1]
    )


def test_a_norm_whose_square_is_not_representable_counts_as_zero():
    features, weight = torch.tensor([1e-18, 1e-20])[None, None, None].requires_grad_(), torch.ones(1, 1)
    S = cosine_map(features, weight)  # norms 1e-18 and 1e-20; the limit is 1e-19
    assert S.flatten().tolist() == [1, 0]
    S[..., 1].sum().backward()
    assert not features.grad.any()
