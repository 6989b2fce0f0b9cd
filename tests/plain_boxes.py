"""From a score map to boxes: every threshold at once (Choe et al.'s protocol, exact).

A map is quantised to v = floor(255 * map); at level t the mask is v > t. A threshold in [0, 1) of the map's maximum is one
of the 255 levels 0 ... 254, so sweeping the levels is exact: there is no interval to choose.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import ndimage

LEVELS = 255
EIGHT = np.ones((3, 3), dtype=bool)


class LevelBoxes(NamedTuple):
    """Boxes x0, y0, x1, y1 of all levels, in pixels of the map, corners inside."""

    boxes: np.ndarray  # M x 4 int64, all contours of all levels
    levels: np.ndarray  # M int64, the level of each, in 0 ... 254, ascending
    largest: np.ndarray  # 255 x 4 int64, the largest contour of each level


def quantise(score_map: np.ndarray) -> np.ndarray:
    """floor(255 * map) as uint8: H x W in [0, 1] -> H x W. Raises ValueError for another shape, NaN, or values outside [0, 1]."""
    score_map = np.asarray(score_map)
    if score_map.ndim != 2 or 0 in score_map.shape:
        raise ValueError(f"a score map is H x W, got shape {score_map.shape}")
    if not (score_map.min() >= 0 and score_map.max() <= 1):  # false for NaN as well
        raise ValueError("a score map lies in [0, 1]; this one has values outside, or NaN")
    return (score_map * 255).astype(np.uint8)


def level_boxes(score_map: np.ndarray) -> LevelBoxes:
    """The boxes of every level of one map: H x W in [0, 1] -> LevelBoxes.

    All contours (MaxBoxAccV2): a box for each 8-connected component of the mask and one for each hole in it (a
    4-connected component of the background off the image border), as a contour tracer returns both. A component's
    box is its extent; a hole's is the extent of the ring of foreground around it; then x1 + 1, y1 + 1, clipped to the image.
    Largest contour (MaxBoxAcc): the contour with the largest polygon area, the polygon running through the centres
    of its border pixels; ties go to the contour whose first pixel in reading order comes first.
    A level without foreground has the one box (0, 0, 0, 0).
    """
    v = quantise(score_map)
    limit = np.array([v.shape[1] - 1, v.shape[0] - 1] * 2)
    boxes, levels, largest = [], [], np.zeros((LEVELS, 4), dtype=np.int64)
    for level in range(LEVELS):
        mask = v > level
        components, _ = ndimage.label(mask, EIGHT)
        background, n_background = ndimage.label(~mask)
        border = np.concatenate([background[0], background[-1], background[:, 0], background[:, -1]])
        is_hole = np.ones(n_background + 1, dtype=bool)
        is_hole[np.append(border, 0)] = False
        at_level = np.concatenate([
            _extents(components) + [0, 0, 1, 1],
            _extents(background)[is_hole[1:]] + [-1, -1, 2, 2],
        ])
        at_level = np.minimum(at_level, limit) if len(at_level) else np.zeros((1, 4), dtype=np.int64)
        boxes.append(at_level)
        levels.append(np.full(len(at_level), level))

        # No contour is larger than the component around it, so the largest is among the components, holes filled.
        filled, n_filled = ndimage.label(mask | is_hole[background], EIGHT)
        if n_filled:
            areas = np.bincount(*_block_areas(filled), minlength=n_filled + 1)
            largest[level] = np.minimum(_extents(filled)[areas[1:].argmax()] + [0, 0, 1, 1], limit)
    return LevelBoxes(np.concatenate(boxes), np.concatenate(levels), largest)


def _extents(labels: np.ndarray) -> np.ndarray:
    found = [(x.start, y.start, x.stop - 1, y.stop - 1) for y, x in ndimage.find_objects(labels)]
    return np.array(found, dtype=np.int64).reshape(-1, 4)


def _block_areas(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Label and area of each 2 x 2 block of pixels: 1 where all four are in, 1/2 where three are, else 0."""
    blocks = np.stack([labels[:-1, :-1], labels[:-1, 1:], labels[1:, :-1], labels[1:, 1:]]).reshape(4, -1)
    return blocks.max(0), np.maximum((blocks > 0).sum(0) - 2, 0) / 2


def iou_matrix(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union with inclusive corners (a width is x1 - x0 + 1): M x 4, G x 4 -> M x G float64, in [0, 1]."""
    a, b = np.asarray(a, dtype=np.int64).reshape(-1, 1, 4), np.asarray(b, dtype=np.int64).reshape(1, -1, 4)
    overlap = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]) + 1
    intersection = overlap.clip(min=0).prod(-1)
    area_a, area_b = ((x[..., 2:] - x[..., :2] + 1).prod(-1) for x in (a, b))
    return intersection / (area_a + area_b - intersection)


def scale_boxes(boxes: np.ndarray, size: tuple[int, int], map_size: int) -> np.ndarray:
    """Boxes from an image of size (width, height) to a map of map_size x map_size: int(x * map_size / width), truncated."""
    return np.asarray(boxes, dtype=np.int64) * map_size // np.array([*size, *size])
