"""The method's losses (main-text section 3; hyperparameters: appendix C.5). Imports torch and nothing else.

Copy this file into your project: it needs no other part of this one. Notation of the paper throughout:

    features  f   N x C x H x W   last feature map, after ReLU
    weight    w   K x C           rows of the linear classifier (its bias is not part of the map)
    labels    y   N               ground-truth class of each image

    CAM(u) = w_y . f_u = |w_y| * F_u * S_u      with F_u = |f_u| and S_u = cos(f_u, w_y)      (Fig. A3 draws the three)

Norms, cosines and the min-max run in float32 whatever autocast says (float64 input stays float64). Gradients are finite
everywhere: where the formula is 0/0 -- a location whose feature vector is zero, a map F that is constant -- the value
is 0 and no gradient passes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from torch import Tensor


def feature_norm(features: Tensor) -> Tensor:
    """F_u = |f_u|, the Euclidean norm over channels: N x C x H x W -> N x H x W, in [0, inf).

    Differentiable; at a zero vector the gradient is 0 (a subgradient of the norm).
    """
    return torch.linalg.vector_norm(full_precision(features), dim=1)


def minmax(x: Tensor) -> Tensor:
    """Min-max over the last two dimensions: ... x H x W -> the same shape in [0, 1]. F-hat = minmax(feature_norm(f)).

    Gradient flows through the value, the minimum and the maximum. A map that is constant to the precision of its type
    becomes 0 everywhere and passes no gradient.
    """
    x = full_precision(x)
    low, high = x.amin((-2, -1), keepdim=True), x.amax((-2, -1), keepdim=True)
    info = torch.finfo(x.dtype)
    # A spread of one rounding step is noise, and its reciprocal (the gradient) would drown everything else.
    varies = high - low > torch.maximum(low.abs(), high.abs()) * info.eps + info.tiny
    return torch.where(varies, (x - low) / torch.where(varies, high - low, 1), 0)


def cosine_map(features: Tensor, weight: Tensor) -> Tensor:
    """S_{k,u} = cos(f_u, w_k), in [-1, 1].

    features N x C x H x W with weight K x C    -> N x K x H x W: every class for every image;
    features N x C x H x W with weight N x M x C -> N x M x H x W: rows of its own for each image, for instance
    `weight[labels][:, None]` for the ground-truth class alone, which costs K times less.

    Gradient flows to both arguments. A zero vector (norm at most the square root of the smallest normal number, 1e-19
    in float32: its square is not representable) has S = 0 and passes no gradient through S.
    """
    if weight.dim() not in (2, 3) or weight.shape[-1] != features.shape[1]:
        raise ValueError(
            f"weight must be K x C or N x M x C with C = {features.shape[1]}, got {tuple(weight.shape)}"
        )
    with torch.autocast(features.device.type, enabled=False):
        norm, weight = feature_norm(features)[:, None], full_precision(weight)
        # w is made a unit vector, f is not: dividing the product by |f| spares a second map of N x C x H x W.
        unit_w = _divide(weight, torch.linalg.vector_norm(weight, dim=-1, keepdim=True))
        projection = unit_w @ full_precision(features).flatten(2)  # N x K x HW
        return _divide(projection.unflatten(2, features.shape[2:]), norm)


def alignment_losses(
    features: Tensor, weight: Tensor, labels: Tensor, tau_fg: float, tau_bg: float, norm_class: str = "target"
) -> tuple[Tensor, Tensor]:
    """Feature direction alignment: the two scalar losses (L_sim, L_norm), each a mean over the batch, in [-2, 2] and [-1, 1].

    L_sim  = mean of S_y over {u : F-hat_u < tau_bg}  -  mean of S_y over {u : F-hat_u > tau_fg}
    L_norm = mean of F-hat over {u : S_u < 0}         -  mean of F-hat over {u : S_u > 0}

    S in L_norm is the ground-truth class's map (`norm_class="target"`: ImageNet-1K, OpenImages30k) or the maximum over
    all classes (`"max"`: CUB, where every class is a bird). Locations between the two thresholds are in neither set of
    L_sim; an empty set contributes 0. The sets are hard masks without gradient. Gradient flows to features and weight
    through S_y (L_sim), and to features through F-hat (L_norm).

    features N x C x H x W, weight K x C, labels N (int64); tau_fg, tau_bg are fractions of F-hat's range.
    Raises ValueError for another `norm_class`.
    """
    if norm_class not in ("target", "max"):
        raise ValueError(f'norm_class must be "target" or "max", got {norm_class!r}')
    F_hat = minmax(feature_norm(features))  # N x H x W
    S_y = cosine_map(features, weight[labels][:, None])[:, 0]  # N x H x W
    l_sim = (_masked_mean(S_y, F_hat < tau_bg) - _masked_mean(S_y, F_hat > tau_fg)).mean()

    S = S_y.detach()
    if norm_class == "max":
        with torch.no_grad():
            S = cosine_map(features, weight).amax(1)
    l_norm = (_masked_mean(F_hat, S < 0) - _masked_mean(F_hat, S > 0)).mean()
    return l_sim, l_norm


def attentive_dropout(features: Tensor, gamma: float, p: float) -> Tensor:
    """Attentive dropout at an intermediate map: zeroes its strongest locations at random. Shape unchanged.

    m = mean over channels; u is a candidate when m_u > gamma * max m (per image), and each candidate is zeroed, in all
    channels, independently with probability p. The rest is kept as it is: nothing is rescaled.
    Gradient flows to `features` where they are kept; the mask carries none. Random numbers: torch's default generator
    of the device. p = 0 returns `features` itself.
    """
    if p == 0:
        return features
    with torch.no_grad():
        m = full_precision(features).mean(1, keepdim=True)  # N x 1 x H x W
        candidate = m > gamma * m.amax((2, 3), keepdim=True)
        dropped = candidate & (torch.rand_like(m) < p)
    return features.masked_fill(dropped, 0)


def consistency_loss(features: Tensor, features_dropped: Tensor) -> Tensor:
    """L_drop = mean |f - f_dropped| over all elements of the last feature map of the two passes: a scalar, >= 0.

    Gradient flows through both passes.
    """
    return nnf.l1_loss(full_precision(features_dropped), full_precision(features))


def full_precision(x: Tensor) -> Tensor:
    """float64 stays float64; every other type becomes float32. Shape unchanged, differentiable."""
    return x if x.dtype == torch.float64 else x.float()


def _divide(x: Tensor, norm: Tensor) -> Tensor:
    nonzero = norm > torch.finfo(norm.dtype).tiny ** 0.5
    # `where` on the denominator too: a masked 0/0 would still send NaN backwards.
    return torch.where(nonzero, x / torch.where(nonzero, norm, 1), 0)


def _masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x over the locations of `mask`, 0 where it is empty: N x H x W, N x H x W -> N."""
    return torch.where(mask, x, 0).sum((1, 2)) / mask.sum((1, 2)).clamp(min=1)
