"""From features to score maps: class activation map (CAM), its three factors, resize and normalization.

All functions compute and return float32; float64 input stays float64. A threshold on a normalized map is a
fraction in [0, 1) of the quantized range: level / 255.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor

from .losses import cosine_map, feature_norm, full_precision, minmax

NORMALIZATIONS = ("minmax", "max", "pas", "ivr", "log")
# Default percentiles of the two normalizations that use one: the values of their authors' code.
PERCENTILES = {"pas": 0.9, "ivr": 0.45}


class Factors(NamedTuple):
    """CAM(u) = weight_norm * F_u * S_u, the decomposition of the paper (main text; drawn in Fig. A3)."""

    weight_norm: Tensor  # N: |w_y|, >= 0
    F: Tensor  # N x H x W: |f_u|, >= 0
    S: Tensor  # N x H x W: cos(f_u, w_y), in [-1, 1]


def class_activation_map(features: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """CAM(u) = w_y . f_u, without the bias (Zhou et al., CVPR 2016): unbounded and differentiable.

    features N x C x H x W, weight K x C, labels N (int64) -> N x H x W.
    """
    with torch.autocast(features.device.type, enabled=False):
        return torch.einsum("nc,nchw->nhw", full_precision(weight[labels]), full_precision(features))


def decompose(features: Tensor, weight: Tensor, labels: Tensor) -> Factors:
    """The three factors of `class_activation_map` (Fig. A3), from the same arguments.

    Their product is the CAM, to rounding. Differentiable. At a zero feature vector S is 0 without gradient,
    as in `losses.cosine_map`.
    """
    w_y = weight[labels]  # N x C
    norm = torch.linalg.vector_norm(full_precision(w_y), dim=1)
    return Factors(norm, feature_norm(features), cosine_map(features, w_y[:, None])[:, 0])


def resize(maps: Tensor, size: int, mode: str = "bicubic") -> Tensor:
    """N x H x W -> N x size x size, half-pixel centres, no antialiasing.

    The protocol (Choe et al.) uses bicubic interpolation with a = -0.75. Its values may exceed the range of
    the input: normalize after the resize.
    """
    maps = full_precision(maps)
    if maps.shape[1:] == (size, size):
        return maps
    return nnf.interpolate(maps[:, None], (size, size), mode=mode, align_corners=False)[:, 0]


def normalize(maps: Tensor, how: str = "minmax", percentile: float | None = None) -> Tensor:
    """Normalizes each map to [0, 1]: N x H x W -> the same shape. Apply after `resize`.

    minmax  (M - min) / (max - min): the protocol's (Choe et al.), used for CAM and for the paper's method
    max     max(M, 0) / max M
    pas     M - min, divided by its `percentile` (default 0.9), clipped at 1     (Bae et al., ECCV 2020)
    ivr     max(M - v, 0) / its maximum, v the `percentile` (default 0.45) of M  (Kim et al., ICCV 2021)
    log     1 + log10(M) / 7, M clipped to [1e-7, 1]: for probabilities          (CALM, Kim et al., ICCV 2021)

    The maximum of a map becomes 1, except with `log`, which does not rescale the map: a step of 1/7 in its
    result is a factor of 10 in the probability. The percentile q, in [0, 1), is the sorted value at index
    int(q * H * W). A map becomes all zeros if it is constant, contains NaN or infinity, or if its divisor is
    0. Raises ValueError for an unknown `how`, and for a percentile outside [0, 1).
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
