"""Losses of the method (main-text section 3; hyperparameters: appendix C.5). Imports torch only.

To use these losses elsewhere, copy this file: it needs no other file of this project. Notation of the
paper:

    features  f   N x C x H x W   last feature map, after ReLU
    weight    w   K x C           weight of the linear classifier (its bias is not part of the CAM)
    labels    y   N               ground-truth class of each image
    u                             a location of the map

    CAM(u) = w_y . f_u = |w_y| * F_u * S_u    with F_u = |f_u| and S_u = cos(f_u, w_y)    (drawn in Fig. A3)

Norms, cosines and min-max are computed in float32, under autocast too; float64 input stays float64. For
features of float32, bfloat16 and float64 all gradients are finite. Two cases make the formulas 0/0: a
location with a zero feature vector, and a constant map F. There the value is 0, and no gradient passes.

The gradient of S_u is of the order of 1 / |f_u|. For features of float16 it overflows at weak locations, the
more so with a loss scale: use bfloat16 or float32. features.float() does not help: its gradient is float16.
"""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from torch import Tensor


def feature_norm(features: Tensor) -> Tensor:
    """F_u = |f_u|, the Euclidean norm over channels (F of Fig. A3): N x C x H x W -> N x H x W, in [0, inf).

    Differentiable. At a zero vector the gradient is 0, which is a subgradient of the norm.
    """
    return torch.linalg.vector_norm(full_precision(features), dim=1)


def minmax(x: Tensor) -> Tensor:
    """Min-max over the last two dimensions: ... x H x W -> the same shape, in [0, 1].

    F-hat of main-text section 3 is `minmax(feature_norm(features))`. Gradient flows through the value, the
    minimum and the maximum. A map that is constant to the precision of its type becomes 0 everywhere and
    passes no gradient.
    """
    x = full_precision(x)
    low, high = x.amin((-2, -1), keepdim=True), x.amax((-2, -1), keepdim=True)
    info = torch.finfo(x.dtype)
    # A spread of one rounding step is noise. The gradient scales with its reciprocal and would be huge.
    varies = high - low > torch.maximum(low.abs(), high.abs()) * info.eps + info.tiny
    return torch.where(varies, (x - low) / torch.where(varies, high - low, 1), 0)


def cosine_map(features: Tensor, weight: Tensor) -> Tensor:
    """S_{k,u} = cos(f_u, w_k), the cosine of feature and class weight (S of Fig. A3), in [-1, 1].

    features N x C x H x W, weight K x C     -> N x K x H x W: every class for every image.
    features N x C x H x W, weight N x M x C -> N x M x H x W: M classes per image. For example
    `weight[labels][:, None]` gives the ground-truth class only, at 1/K of the cost.

    Gradient flows to both arguments. A zero vector has S = 0 and passes no gradient through S. "Zero" means a
    norm of at most 1e-19 in float32 (square root of the smallest normal number): its square is not
    representable. Raises ValueError for another shape of `weight`.
    """
    if weight.dim() not in (2, 3) or weight.shape[-1] != features.shape[1]:
        raise ValueError(
            f"weight must be K x C or N x M x C with C = {features.shape[1]}, got {tuple(weight.shape)}"
        )
    with torch.autocast(features.device.type, enabled=False):
        norm, weight = feature_norm(features)[:, None], full_precision(weight)
        # Only w becomes a unit vector. Dividing the product by |f| avoids a second tensor of N x C x H x W.
        unit_w = _divide(weight, torch.linalg.vector_norm(weight, dim=-1, keepdim=True))
        projection = unit_w @ full_precision(features).flatten(2)  # N x K x HW
        return _divide(projection.unflatten(2, features.shape[2:]), norm)


def alignment_losses(
    features: Tensor, weight: Tensor, labels: Tensor, tau_fg: float, tau_bg: float, norm_class: str = "target"
) -> tuple[Tensor, Tensor]:
    """Feature direction alignment (main-text section 3): the scalars (L_sim, L_norm), means over the batch.

    L_sim  = mean of S_y over {u : F-hat_u < tau_bg}  -  mean of S_y over {u : F-hat_u > tau_fg},  in [-2, 2]
    L_norm = mean of F-hat over {u : S_u < 0}         -  mean of F-hat over {u : S_u > 0},         in [-1, 1]

    features N x C x H x W, weight K x C. labels N (int64), in [0, K): -1 would be the last class (a check
    would wait for the GPU). tau_fg and tau_bg, 0 <= tau_bg <= tau_fg <= 1, are thresholds on F-hat (values:
    C.5). Locations between the two are in neither set of L_sim. The mean of an empty set is 0.

    norm_class selects S in L_norm. "target": the ground-truth class (ImageNet-1K, OpenImages30k). "max": the
    maximum over all classes (CUB, where every class is a bird).

    The sets are hard masks without gradient. Gradient flows through S_y (L_sim) to features and weight, and
    through F-hat (L_norm) to features. Raises ValueError for another `norm_class` and other thresholds.
    """
    if not 0 <= tau_bg <= tau_fg <= 1:
        raise ValueError(f"expected 0 <= tau_bg <= tau_fg <= 1, got tau_fg {tau_fg} and tau_bg {tau_bg}")
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
    """Attentive dropout (main-text section 3; gamma and p: C.5): zeroes the strongest locations at random.

    features N x C x H x W, an intermediate feature map -> the same shape. With m the mean over channels, u is
    a candidate if m_u > gamma * max_u m (per image). Each candidate is zeroed in all channels with
    probability p, independently. The other values are unchanged, without rescaling. p = 0 returns `features`
    itself.

    Gradient flows to `features` at the locations that are not zeroed; the mask has none.
    Random numbers come from the default generator of the device.
    """
    if p == 0:
        return features
    with torch.no_grad():
        m = full_precision(features).mean(1, keepdim=True)  # N x 1 x H x W
        candidate = m > gamma * m.amax((2, 3), keepdim=True)
        dropped = candidate & (torch.rand_like(m) < p)
    return torch.where(dropped, 0, features)  # masked_fill would lose channels_last


def consistency_loss(features: Tensor, features_dropped: Tensor) -> Tensor:
    """L_drop = mean |f - f_dropped|: consistency with attentive dropout (main-text section 3).

    features, features_dropped: N x C x H x W, the last feature map of the clean and of the dropped pass -> a
    scalar, >= 0. The mean is over all elements. Gradient flows through both passes.
    """
    return nnf.l1_loss(full_precision(features_dropped), full_precision(features))


def full_precision(x: Tensor) -> Tensor:
    """Converts to float32, except float64, which stays float64. Same shape, differentiable."""
    return x if x.dtype == torch.float64 else x.float()


def _divide(x: Tensor, norm: Tensor) -> Tensor:
    """x / norm, and 0 without gradient where the norm is zero."""
    nonzero = norm > torch.finfo(norm.dtype).tiny ** 0.5
    # The denominator needs `where`, too: the gradient of a masked 0/0 is still NaN.
    return torch.where(nonzero, x / torch.where(nonzero, norm, 1), 0)


def _masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x over the locations in `mask`, 0 if there is none: N x H x W, N x H x W -> N."""
    return torch.where(mask, x, 0).sum((1, 2)) / mask.sum((1, 2)).clamp(min=1)
