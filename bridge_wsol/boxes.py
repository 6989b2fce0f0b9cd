"""From a score map to boxes: every threshold at once, exactly (the protocol of Choe et al.).

A map is quantised to v = floor(255 * map); at level t the mask is v > t. A threshold in [0, 1) of the map's maximum is one
of the 255 levels 0 ... 254, so a sweep over the levels is the exact sweep: there is no interval to choose. It needs no labeling
per level either. One pass over the pixels and one over a small tree give the components of all masks:

*Basins.* Every pixel points to the highest of its neighbours, itself included; following the pointers leads uphill to a peak, and the
pixels that reach the same peak are its basin. A path uphill never leaves a mask it is in, so the part of a basin that lies in the mask
is connected at every level: within a basin, boxes and areas are running minima, maxima and sums from the peak's value downwards.

*Saddles.* Between two neighbouring basins the mask is first connected at the highest pair of touching pixels: the saddle is the largest
min(v, v') over such pairs. Going down through the saddles, two groups of basins that meet become one below that level (a maximum
spanning tree, Kruskal's way): the lower peak's row ends there, and what it holds is added to the other's.

A row and a level at which it is alive are one component. Holes are the components of the background, 255 - v, with 4 neighbours
instead of 8 and a border of one pixel around the image: what is connected to that border is no hole.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

LEVELS = 255

# glibc hands freed arrays of this module's size back to the kernel, and each new one faults its pages in again: a fifth of the sweep's
# time. Once a large block was freed (whose pages are never touched), it keeps them.
np.empty(2**24, dtype=np.uint8)


class LevelBoxes(NamedTuple):
    """Boxes x0, y0, x1, y1 of all levels, in pixels of the map, corners inside."""

    boxes: np.ndarray  # M x 4 int64, all contours of all levels
    levels: np.ndarray  # M int64, the level of each, in 0 ... 254, in no order; every level has at least one
    largest: np.ndarray  # 255 x 4 int64, the largest contour of each level


def level_boxes(score_map: np.ndarray) -> LevelBoxes:
    """The boxes of every level of one map: H x W in [0, 1] -> LevelBoxes.

    All contours (MaxBoxAccV2): a box for each 8-connected component of the mask and one for each hole in it (a
    4-connected component of the background off the image border), as a contour tracer returns both. A component's
    box is its extent; a hole's is the extent of the ring of foreground around it; then x1 + 1, y1 + 1, clipped to the image.
    Largest contour (MaxBoxAcc): the contour with the largest polygon area, the polygon running through the centres
    of its border pixels; ties go to the contour whose first pixel in reading order comes first.
    A level without foreground has the one box (0, 0, 0, 0).
    Raises ValueError for another shape, NaN, or values outside [0, 1].
    """
    height_map = _heights(score_map)
    H, W = height_map.shape
    limit = np.array([W - 1, H - 1, W - 1, H - 1])

    v = height_map >> 8
    mask = _Basins(height_map, eight=True)
    alone = mask.extents(v)
    merges = mask.merges(v)
    row, level = np.nonzero(mask.alive(v, merges))
    extents = _merged(alone, merges)
    components = np.minimum(_boxes(extents[row, :, level], W) + [0, 0, 1, 1], limit)

    # The background with its border: c = 255 - v, and level t of the mask is level 254 - t of the background.
    background = np.full((H + 2, W + 2), HEIGHT_MAX, dtype=np.int32)
    background[1:-1, 1:-1] -= height_map
    c = background >> 8
    dark = _Basins(background, eight=False, border_is_one=True)
    dark_merges = dark.merges(c)
    is_hole = dark.alive(c, dark_merges)
    is_hole[0] = False  # the border's row
    hole_row, hole_level = np.nonzero(is_hole)
    holes = _boxes(_merged(dark.extents(c), dark_merges)[hole_row, :, hole_level], W + 2) - 1
    holes = np.minimum(holes + [-1, -1, 2, 2], limit)

    # No contour is larger than the component around it, so the largest is among the components with their holes filled. A pixel is
    # filled at the levels at which its way to the border is cut; a path uphill stays in the filled mask too, so the basins serve again.
    filled = v
    if len(hole_row):
        c = np.minimum(c, dark.way_out(dark_merges)[dark.labels].reshape(c.shape))
        filled = 255 - c[1:-1, 1:-1]
        merges = mask.merges(filled)
        extents = _merged(alone, merges)
    areas = _merged(mask.double_areas(filled), merges, np.add)
    # Of equal areas the first in reading order: extents[:, 0] is the index of a component's first pixel.
    rank = np.where(mask.alive(filled, merges), areas * (H * W) - extents[:, 0], -H * W)
    winner = rank.argmax(0)
    largest = np.minimum(_boxes(extents[winner, :, np.arange(LEVELS)], W) + [0, 0, 1, 1], limit)
    empty = np.flatnonzero(rank.max(0) == -H * W)
    largest[empty] = 0

    boxes = np.concatenate([components, holes, np.zeros((len(empty), 4), dtype=np.int64)])
    return LevelBoxes(boxes, np.concatenate([level, LEVELS - 1 - hole_level, empty]), largest)


HEIGHT_MAX = 65535  # heights are 16 bits: the quantised value and 8 bits below it


def _heights(score_map: np.ndarray) -> np.ndarray:
    """floor(255 * map * 256): its upper byte is v, the lower one orders pixels of equal v.

    On a quantised map whole plateaus would be peaks; the finer heights leave the peaks of the map itself, a hundred times fewer.
    Uphill in height is never downhill in v, which is all that the sweep needs.
    """
    score_map = np.asarray(score_map)
    if score_map.ndim != 2 or 0 in score_map.shape:
        raise ValueError(f"a score map is H x W, got shape {score_map.shape}")
    if not (score_map.min() >= 0 and score_map.max() <= 1):  # false for NaN as well
        raise ValueError("a score map lies in [0, 1]; this one has values outside, or NaN")
    return (score_map * (255 * 256)).astype(np.int32)


class _Basins:
    """The basins of a height map H x W: `labels` H * W, the basin of each pixel; `peaks` B, the pixel at the top of each.

    Values v are H x W ints in 0 ... 255 that never fall on the way uphill. Rows of the arrays below are basins, columns levels.
    """

    def __init__(self, heights: np.ndarray, eight: bool, border_is_one: bool = False):
        H, W = heights.shape
        pixel = _pixels(H, W)[0]
        bits, kind = (16, np.uint32) if H * W < 2**16 else (32, np.uint64)
        key = (heights.astype(kind) << kind(bits)) | pixel.astype(kind).reshape(H, W)  # distinct: of equal heights the last pixel
        self.shape, self.eight, self.border_is_one = (H, W), eight, border_is_one

        rows = key.copy()
        np.maximum(rows[:, 1:], key[:, :-1], out=rows[:, 1:])
        np.maximum(rows[:, :-1], key[:, 1:], out=rows[:, :-1])
        source, top = (rows, rows.copy()) if eight else (key, rows)
        np.maximum(top[1:], source[:-1], out=top[1:])
        np.maximum(top[:-1], source[1:], out=top[:-1])
        uphill = (top & kind(2**bits - 1)).astype(np.intp)
        if border_is_one:
            uphill[[0, -1]] = uphill[:, [0, -1]] = 0
        uphill = uphill.ravel()
        for _ in range(4):  # each round doubles the steps taken; paths shorter than 16 are rare enough not to ask
            uphill = uphill[uphill]
        while not np.array_equal(further := uphill[uphill], uphill):
            uphill = further

        self.peaks = np.flatnonzero(uphill == pixel)
        number = np.empty(H * W, dtype=np.intp)
        number[self.peaks] = np.arange(len(self.peaks))
        self.labels = number[uphill]
        self.touching = self._touching_pixels()

    def _touching_pixels(self) -> tuple[np.ndarray, np.ndarray]:
        """Pairs of neighbouring pixels of different basins."""
        W, small = self.shape[1], np.uint16 if len(self.peaks) < 2**16 else np.int64
        labels = self.labels.astype(small).reshape(self.shape)
        pairs = [(labels[:, :-1] != labels[:, 1:], 0, 1), (labels[:-1] != labels[1:], 0, W)]
        if self.eight:
            pairs += [(labels[:-1, :-1] != labels[1:, 1:], 0, W + 1), (labels[:-1, 1:] != labels[1:, :-1], 1, W)]
        first, second = [], []
        for differ, a, b in pairs:
            y, x = np.divmod(np.flatnonzero(differ), max(differ.shape[1], 1))
            first.append(y * W + x + a)
            second.append(y * W + x + b)
        return np.concatenate(first), np.concatenate(second)

    def merges(self, v: np.ndarray) -> list[tuple[int, int, int]]:
        """(saddle, row that goes on, row that ends), saddles descending: below its saddle the two rows are one component."""
        v, n = v.ravel(), len(self.peaks)
        first, second = self.touching
        a, b = self.labels[first], self.labels[second]
        code = (np.minimum(a, b) * n + np.maximum(a, b)) * 256 + np.minimum(v[first], v[second])
        code.sort()
        code = code[np.append(code[1:] >> 8 != code[:-1] >> 8, True)[: len(code)]]  # the highest pair of each two basins
        code = code[np.argsort(255 - (code & 255), kind="stable")]
        a, b = np.divmod(code >> 8, n)

        peak = v[self.peaks].tolist()
        if self.border_is_one:
            peak[0] = 256  # the border's row goes on to the end
        group, merges = list(range(n)), []
        for a, b, saddle in zip(a.tolist(), b.tolist(), (code & 255).tolist()):
            while group[a] != a:  # to the row that goes on, halving the path for the next time
                group[a] = a = group[group[a]]
            while group[b] != b:
                group[b] = b = group[group[b]]
            if a != b:
                if peak[a] < peak[b]:
                    a, b = b, a
                group[b] = a
                merges.append((saddle, a, b))
        return merges

    def alive(self, v: np.ndarray, merges: list[tuple[int, int, int]]) -> np.ndarray:
        """B x 255 bool: a row is a component from just below its peak down to the saddle at which it ends."""
        ends = np.zeros(len(self.peaks), dtype=np.int64)
        for saddle, _, row in merges:
            ends[row] = saddle
        levels = np.arange(LEVELS)
        return (levels >= ends[:, None]) & (levels < v.ravel()[self.peaks][:, None])

    def extents(self, v: np.ndarray) -> np.ndarray:
        """B x 4 x 255: of each basin alone, the first pixel (in reading order), the least x, and the negated greatest x and last pixel."""
        smallest = np.full(len(self.peaks) * 4 * 256, v.size, dtype=np.int32)
        where = self.labels * (4 * 256) + v.ravel()
        for values in _pixels(*self.shape)[1:]:
            np.minimum.at(smallest, where, values)
            where += 256
        smallest = smallest.reshape(-1, 4, 256)[:, :, :0:-1]  # a pixel of value v is in the masks of levels below v
        return np.minimum.accumulate(smallest, axis=2)[:, :, ::-1]

    def double_areas(self, v: np.ndarray) -> np.ndarray:
        """B x 255: of each basin alone, twice the polygon area: a 2 x 2 block counts 2 where all four pixels are in, 1 where three are."""
        v, labels, n = v.astype(np.uint8), self.labels.reshape(self.shape), len(self.peaks)
        p, q, r, s = v[:-1, :-1], v[:-1, 1:], v[1:, :-1], v[1:, 1:]
        low, high, low2, high2 = np.minimum(p, s), np.maximum(p, s), np.minimum(q, r), np.maximum(q, r)
        all_four, three = np.minimum(low, low2), np.minimum(np.maximum(low, low2), np.minimum(high, high2))
        # Three of four pixels touch each other, and the higher one of a diagonal is among the three: the block is of its component.
        owner = np.where(p >= s, labels[:-1, :-1], labels[1:, 1:]) * 256
        blocks = sum(np.bincount((owner + level).ravel(), minlength=n * 256) for level in (all_four, three)).reshape(n, 256)
        return blocks[:, :0:-1].cumsum(axis=1)[:, ::-1]

    def way_out(self, merges: list[tuple[int, int, int]]) -> np.ndarray:
        """B: the highest level below which a basin is connected to row 0 (256 for row 0 itself)."""
        level = np.full(len(self.peaks), 256)
        for saddle, onto, row in reversed(merges):
            level[row] = min(saddle, level[onto])
        return level


@lru_cache(maxsize=8)
def _pixels(H: int, W: int) -> tuple[np.ndarray, ...]:
    """Of every pixel in reading order: its index; and, in the type of the extents, its index, x, -x and minus its index."""
    pixel = np.arange(H * W)
    small = pixel.astype(np.int32)
    return pixel, small, small % W, -(small % W), -small


def _merged(alone: np.ndarray, merges: list[tuple[int, int, int]], add: np.ufunc = np.minimum) -> np.ndarray:
    """Rows of components from rows of basins: below each saddle the row that ends goes into the one that goes on."""
    rows = alone.copy()
    for saddle, onto, row in merges:
        below = rows[onto, ..., :saddle]
        add(below, rows[row, ..., :saddle], out=below)
    return rows


def _boxes(extents: np.ndarray, width: int) -> np.ndarray:
    """M x 4 of `_Basins.extents` -> M x 4 boxes x0, y0, x1, y1."""
    first, x0, x1, last = extents.T
    return np.stack([x0, first // width, -x1, -last // width], axis=1)


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
