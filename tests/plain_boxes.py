"""Boxes of every level by labeling each mask, or by OpenCV's contour tracer: for test_boxes and bench."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from bridge_wsol.boxes import LEVELS, LevelBoxes, iou_matrix

EIGHT = np.ones((3, 3), dtype=bool)


def quantize(score_map: np.ndarray) -> np.ndarray:
    """floor(255 * map) as uint8."""
    return (np.asarray(score_map) * 255).astype(np.uint8)


def level_boxes(score_map: np.ndarray) -> LevelBoxes:
    """The result of `bridge_wsol.boxes.level_boxes`, computed level by level."""
    v = quantize(score_map)
    limit = np.array([v.shape[1] - 1, v.shape[0] - 1] * 2)
    boxes, levels, largest = [], [], np.zeros((LEVELS, 4), dtype=np.int64)
    for level in range(LEVELS):
        if level and not (v == level).any():  # the mask of the level below
            boxes.append(boxes[-1])
            levels.append(np.full(len(boxes[-1]), level))
            largest[level] = largest[level - 1]
            continue
        mask = v > level
        components, n_components = ndimage.label(mask, EIGHT)
        background, n_background = ndimage.label(~mask)
        is_hole = np.ones(n_background + 1, dtype=bool)
        is_hole[0] = False
        for side in (background[0], background[-1], background[:, 0], background[:, -1]):
            is_hole[side] = False
        at_level = extents(components) + [0, 0, 1, 1]
        filled, n_filled = components, n_components
        if is_hole.any():
            at_level = np.concatenate([at_level, extents(background)[is_hole[1:]] + [-1, -1, 2, 2]])
            filled, n_filled = ndimage.label(mask | is_hole[background], EIGHT)
        at_level = np.minimum(at_level, limit) if len(at_level) else np.zeros((1, 4), dtype=np.int64)
        boxes.append(at_level)
        levels.append(np.full(len(at_level), level))
        if n_filled:
            # No contour is larger than the component around it: compare the components with filled holes.
            # Labels are in reading order of the first pixel. Of equal areas, the last one is the largest.
            areas = double_areas(filled, n_filled)
            last = np.flatnonzero(areas == areas.max())[-1]
            largest[level] = np.minimum(extents(filled)[last] + [0, 0, 1, 1], limit)
    return LevelBoxes(np.concatenate(boxes), np.concatenate(levels), largest)


def extents(labels: np.ndarray) -> np.ndarray:
    found = [(x.start, y.start, x.stop - 1, y.stop - 1) for y, x in ndimage.find_objects(labels)]
    return np.array(found, dtype=np.int64).reshape(-1, 4)


def double_areas(labels: np.ndarray, n: int) -> np.ndarray:
    """Twice the polygon area per component. A 2 x 2 block adds 2 with four pixels inside, 1 with three."""
    inside = (labels > 0).astype(np.uint8)
    count = inside[:-1, :-1] + inside[:-1, 1:] + inside[1:, :-1] + inside[1:, 1:]
    y, x = np.nonzero(count > 2)
    owner = np.maximum(labels[y, x], labels[y + 1, x + 1])  # at least one of three pixels is on this diagonal
    return np.bincount(owner, count[y, x] - 2, minlength=n + 1)[1:]


def traced_boxes(score_map: np.ndarray, n: int = LEVELS) -> LevelBoxes:
    """The usual loop: at each of n thresholds, binarize, trace the contours, take their boxes.

    The thresholds are fractions of [0, 1] for n = LEVELS, as the levels are, else of the map's maximum.
    """
    import cv2

    cv2.setNumThreads(1)
    v = quantize(score_map)
    boxes, levels, largest, limit = [], [], [], np.array([v.shape[1] - 1, v.shape[0] - 1])
    for i in range(n):
        threshold = i if n == LEVELS else int(i / n * v.max())
        mask = cv2.threshold(v, threshold, 255, cv2.THRESH_BINARY)[1]
        contours = cv2.findContours(mask, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)[0]
        areas = [cv2.contourArea(contour) for contour in contours] or [0.0]
        largest.append(len(boxes) + areas.index(max(areas)))
        boxes += [cv2.boundingRect(contour) for contour in contours] or [(0, 0, 0, 0)]
        levels += [i] * len(areas)
    corners = np.array(boxes)
    corners[:, 2:] = np.minimum(corners[:, :2] + corners[:, 2:], limit)
    return LevelBoxes(corners, np.array(levels), corners[largest])


def best_ious(found: LevelBoxes, truth: np.ndarray) -> np.ndarray:
    """The IoUs of `bridge_wsol.metrics.measure`: per level, the best of all contours, and the largest's."""
    best = np.zeros((2, len(found.largest)))
    np.maximum.at(best[0], found.levels, iou_matrix(found.boxes, truth).max(1))
    best[1] = iou_matrix(found.largest, truth).max(1)
    return best
