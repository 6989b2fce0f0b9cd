"""From features to score maps: class activation map, its three factors (Fig. A3), resize and normalization.

Everything is computed and returned in float32, float64 input in float64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor

from .losses import cosine_map, feature_norm, full_precision, minmax

NORMALIZATIONS = ("minmax", "max", "pas", "ivr", "log")
PERCENTILES = {
    "pas": 0.9,
    "ivr": 0.45,
}  # of the normalizations that have one, unless another is given: both from their authors' code


class Factors(NamedTuple):
    """CAM(u) = weight_norm * F_u * S_u, the decomposition the method rests on (main text; drawn in Fig. A3)."""

    weight_norm: Tensor  # N          |w_y|
    F: Tensor  # N x H x W  |f_u|, >= 0
    S: Tensor  # N x H x W  cos(f_u, w_y), in [-1, 1]


def class_activation_map(features: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """CAM(u) = w_y . f_u, without the bias, unbounded.

    features N x C x H x W, weight K x C, labels N -> N x H x W.
    """
    with torch.autocast(features.device.type, enabled=False):
        return torch.einsum("nc,nchw->nhw", full_precision(weight[labels]), full_precision(features))


def decompose(features: Tensor, weight: Tensor, labels: Tensor) -> Factors:
    """The three factors of `class_activation_map` (same arguments); their product is the map, to rounding.

    Differentiable, with the zero-vector rule of `losses.cosine_map`.
    """
    w_y = weight[labels]  # N x C
    norm = torch.linalg.vector_norm(full_precision(w_y), dim=1)
    return Factors(norm, feature_norm(features), cosine_map(features, w_y[:, None])[:, 0])


def resize(maps: Tensor, size: int, mode: str = "bicubic") -> Tensor:
    """N x H x W -> N x size x size, half-pixel centres, no antialiasing.

    Bicubic (a = -0.75) is the protocol's.
    Bicubic may overshoot the range of its input; normalize afterwards.
    """
    maps = full_precision(maps)
    if maps.shape[1:] == (size, size):
        return maps
    return nnf.interpolate(maps[:, None], (size, size), mode=mode, align_corners=False)[:, 0]


def normalize(maps: Tensor, how: str = "minmax", percentile: float | None = None) -> Tensor:
    """Normalization of each map to [0, 1]: N x H x W -> the same shape. Apply after `resize`.

    minmax  (M - min) / (max - min): the protocol's, and this method's
    max     max(M, 0) / max M
    pas     M - min, divided by its `percentile` (default 0.9), clipped at 1      (Bae et al., ECCV 2020)
    ivr     max(M - v, 0) / its maximum, v the `percentile` (default 0.45) of M   (Kim et al., ICCV 2021)
    log     1 + log10(M) / 7, M clipped to [1e-7, 1]: for probabilities, whose thresholds are even in the exponent then (CALM: Kim et al., ICCV 2021)

    A percentile q in [0, 1) is the sorted value at index int(q * H * W). A map that is constant, holds NaN or infinity,
    or has nothing left to divide by becomes all zeros. Raises ValueError for an unknown `how` or percentile.
    """
    if how not in NORMALIZATIONS:
        raise ValueError(f"normalization must be one of {', '.join(NORMALIZATIONS)}, got {how!r}")
    q = PERCENTILES.get(how, 0.0) if percentile is None else percentile
    if not 0 <= q < 1:
        raise ValueError(f"percentile must be in [0, 1), got {q}")
    maps = full_precision(maps)
    usable = maps.isfinite().flatten(1).all(1) & (maps.flatten(1).amax(1) > maps.flatten(1).amin(1))
    maps = torch.where(usable[:, None, None], maps, 0)
    if how == "minmax":
        return minmax(maps)
    if how == "log":
        return 1 + maps.clamp(1e-7, 1).log10() / 7

    if how == "max":
        maps = maps.clamp(min=0)
    elif how == "pas":
        maps = maps - maps.amin((1, 2), keepdim=True)
    else:
        maps = (maps - _percentile(maps, q)).clamp(min=0)
    top = _percentile(maps, q) if how == "pas" else maps.amax((1, 2), keepdim=True)
    return torch.where(top > torch.finfo(maps.dtype).tiny, (maps / top).clamp(max=1), 0)


def _percentile(maps: Tensor, q: float) -> Tensor:
    values = maps.flatten(1).sort(dim=1).values
    return values[:, int(q * values.shape[1])][:, None, None]
