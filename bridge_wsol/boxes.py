"""From a score map to boxes: every threshold at once, exactly (the protocol of Choe et al.).

A map is quantised to v = floor(255 * map); at level t the mask is v > t. A threshold in [0, 1) of the map's maximum is one
of the 255 levels 0 ... 254, so a sweep over the levels is the exact sweep: there is no interval to choose. It needs no labeling
per level either. One pass over the pixels and one over a small tree give the components of all masks:

*Basins.* Every pixel points to a neighbour higher than itself; following the pointers leads uphill to a peak, and the pixels that reach the
same peak are its basin (which of the higher neighbours does not matter: first along the row, then the highest above or below). A path uphill
never leaves a mask it is in, so the part of a basin that lies in the mask is connected at every level: within a basin, boxes and areas are running minima, maxima and sums from the peak's value downwards.

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
    of its border pixels; of equal areas the one whose first pixel in reading order comes last, which is the
    first that the tracer of Choe et al. lists (OpenCV's findContours).
    A level without foreground has the one box (0, 0, 0, 0).
    Raises ValueError for another shape, NaN, or values outside [0, 1].
    """
    heights = _heights(score_map)
    H, W = heights.shape
    limit = np.array([W - 1, H - 1, W - 1, H - 1])

    basins = _Basins(heights, eight=True)
    mask = _Components(basins, heights >> 8)
    extents = mask.extents()
    boxes = np.minimum(_boxes(extents, W) + [0, 0, 1, 1], limit)

    # The background with its border: c = 255 - v, and level t of the mask is level 254 - t of the background.
    background = np.full((H + 2, W + 2), HEIGHT_MAX, dtype=np.int32)
    background[1:-1, 1:-1] -= heights
    dark = _Components(_Basins(background, eight=False, border_is_one=True), background >> 8)
    hole = dark.row > 0  # row 0 is the border's
    holes = np.minimum(_boxes(dark.extents()[:, hole], W + 2) + [-2, -2, 1, 1], limit)

    # No contour is larger than the component around it, so the largest is among the components with their holes filled. A pixel is
    # filled at the levels at which its way to the border is cut; a path uphill stays in the filled mask too, so the basins serve again.
    filled, within, first = mask, slice(None), extents[0]
    if len(holes):
        way_out = dark.way_out()[dark.basins.labels].reshape(background.shape)
        filled = _Components(basins, 255 - np.minimum(background >> 8, way_out)[1:-1, 1:-1])
        within = filled.slot[mask.row, mask.level + 1]  # the filled component around each component
        first = np.full(len(filled.row), H * W)
        np.minimum.at(first, within, extents[0])
    # Of equal areas the last in reading order; a filled component has the first pixel of the component around
    # all others in it. A hole as large as the largest component has the box of the component around it.
    rank = filled.double_areas() * (H * W) + first
    highest = np.full(LEVELS, -1)
    np.maximum.at(highest, filled.level, rank)
    winner = np.flatnonzero((rank[within] == highest[mask.level]) & (first[within] == extents[0]))
    largest = np.zeros((LEVELS, 4), dtype=np.int64)
    largest[mask.level[winner]] = boxes[winner]

    empty = np.arange(heights.max() >> 8, LEVELS)
    boxes = np.concatenate([boxes, holes, np.zeros((len(empty), 4), dtype=np.int64)])
    return LevelBoxes(boxes, np.concatenate([mask.level, LEVELS - 1 - dark.level[hole], empty]), largest)


HEIGHT_MAX = 65535  # heights are 16 bits: the quantised value and 8 bits below it
DENSE = 2**21  # up to so many pairs of basins, their saddles are found in a table, beyond it by sorting


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
    """The basins of heights H x W: `labels` H * W, the basin of each pixel; `peaks` B, the pixel at the top of each; `borders`, the pairs
    of neighbouring pixels in different basins. With `border_is_one` the pixels at the edge are one basin, number 0.
    """

    def __init__(self, heights: np.ndarray, eight: bool, border_is_one: bool = False):
        H, W = self.shape = heights.shape
        self.border_is_one = border_is_one
        bits, kind = (16, np.uint32) if H * W < 2**16 else (32, np.uint64)
        key = np.zeros(
            (H + 2, W + 2), dtype=kind
        )  # height and pixel: distinct, of equal heights the last pixel is the higher one
        inner = key[1:-1, 1:-1]
        inner[...] = heights
        inner <<= kind(bits)
        inner |= _pixels(H, W).index.reshape(H, W).astype(kind)

        # First along the row to its next summit, which takes no steps; then from summit to summit of the rows, a tenth of the pixels.
        rising = inner < key[1:-1, 2:]
        summit = ~rising
        summit[:, 1:] &= rising[:, :-1]
        summits = np.flatnonzero(summit)
        to_summit = (summit.ravel().cumsum(dtype=np.int32) + (rising.ravel() - np.int32(1))).astype(np.intp)
        y, x = np.divmod(summits, W)
        at, flat = (y + 1) * (W + 2) + x + 1, key.ravel()
        above_and_below = (-W - 3, -W - 2, -W - 1, W + 1, W + 2, W + 3) if eight else (-W - 2, W + 2)
        highest = flat[at]
        for step in above_and_below:
            np.maximum(highest, flat[at + step], out=highest)
        uphill = to_summit[(highest & kind(2**bits - 1)).astype(np.intp)]
        if border_is_one:
            uphill[(y == 0) | (x == 0) | (y == H - 1) | (x == W - 1)] = 0
        while not np.array_equal(further := uphill[uphill], uphill):  # each round doubles the steps taken
            uphill = further

        tops = np.flatnonzero(uphill == np.arange(len(uphill)))
        self.peaks = summits[tops]
        number = np.zeros(len(summits), dtype=np.intp)
        number[tops] = np.arange(len(tops))
        self.labels = number[uphill][to_summit]
        self.borders = self._borders(eight)

    def _borders(self, eight: bool) -> tuple[np.ndarray, np.ndarray]:
        H, W = self.shape
        labels = self.labels.astype(np.uint16 if len(self.peaks) < 2**16 else np.uint32)
        # The neighbour's distance in the flat image, and the column that has none.
        steps = [(1, W - 1), (W, None)] + ([(W + 1, W - 1), (W - 1, 0)] if eight else [])
        if W == 1:
            steps = [(1, None)]
        first, second = [], []
        for step, edge in steps:
            differ = labels[step:] != labels[:-step]
            if edge is not None:
                differ[edge::W] = False
            first.append(np.flatnonzero(differ))
            second.append(first[-1] + step)
        return np.concatenate(first), np.concatenate(second)


class _Components:
    """The components of the masks v > t of all levels t; v is H x W ints in 0 ... 255 that never falls on the way uphill.

    A *slot* is a row (a basin's) and a level at which it is alive, that is, one component of one mask: `row` and `level`, T each. The
    slots of a row run from its peak downwards, and those of all the rows that end in it follow its own.
    `slot` B x 256: where a pixel of basin b and value v belongs at level v - 1, the first whose mask has it (T for v = 0: in no mask).
    """

    def __init__(self, basins: _Basins, v: np.ndarray):
        self.basins, self.v, n = basins, v.ravel(), len(basins.peaks)
        peak = self.v[basins.peaks]
        self.merges = self._merge(peak.tolist())

        # The lifetime of a row with those of all that end in it: as many slots they take, the row's own first.
        span, end = peak.tolist(), [0] * n
        for saddle, onto, row in self.merges:
            end[row] = saddle
            span[row] -= saddle
            span[onto] += span[row]
        self.span, self.end = np.array(span), np.array(end)
        life = peak - self.end
        is_root = np.ones(n, dtype=bool)
        is_root[[row for _, _, row in self.merges]] = False
        start, T = np.zeros(n, dtype=np.intp), int(life.sum())
        start[is_root] = self.span[is_root].cumsum() - self.span[is_root]
        start, free = start.tolist(), (start + life).tolist()
        for _, onto, row in reversed(self.merges):
            start[row] = free[onto]
            free[row] += free[onto]
            free[onto] += span[row]
        self.start = np.array(start)

        in_turn = np.argsort(self.start, kind="stable")
        self.row = np.repeat(in_turn, life[in_turn])
        self.level = (self.start + peak - 1)[self.row] - np.arange(T)
        self.slot = (self.start + peak)[:, None] - np.arange(LEVELS + 1)
        self.slot[:, 0] = T
        for saddle, onto, row in reversed(self.merges):
            self.slot[row, 1 : saddle + 1] = self.slot[onto, 1 : saddle + 1]

    def _merge(self, peak: list[int]) -> list[tuple[int, int, int]]:
        """(saddle, row that goes on, row that ends), saddles descending: below its saddle the two rows are one component."""
        n, (first, second) = len(peak), self.basins.borders
        a, b = self.basins.labels[first], self.basins.labels[second]
        pair = np.minimum(a, b) * n + np.maximum(a, b)
        value = np.minimum(self.v[first], self.v[second])
        if n * n < DENSE:  # the highest pair of pixels of each two basins
            highest = np.zeros(n * n, dtype=np.uint8)
            np.maximum.at(highest, pair, value.astype(np.uint8))
            pair = np.flatnonzero(highest)
            value = highest[pair]
        else:
            order = np.lexsort((255 - value, pair))
            order = order[np.append(True, np.diff(pair[order]) > 0)[: len(order)]]
            pair, value = pair[order], value[order].astype(np.uint8)
        order = np.argsort(255 - value, kind="stable")
        a, b = np.divmod(pair[order], n)

        if self.basins.border_is_one:
            peak[0] = 256  # the border's row goes on to the end
        group, merges = list(range(n)), []
        for a, b, saddle in zip(a.tolist(), b.tolist(), value[order].tolist()):
            while group[a] != a:  # to the row that goes on, halving the path for the next time
                group[a] = a = group[group[a]]
            while group[b] != b:
                group[b] = b = group[group[b]]
            if a != b and saddle:
                if peak[a] < peak[b]:
                    a, b = b, a
                group[b] = a
                merges.append((saddle, a, b))
        return merges

    def extents(self) -> np.ndarray:
        """4 x T: the first pixel (in reading order), the least x, and the negated greatest x and last pixel."""
        pixels, where = _pixels(*self.basins.shape), self._where(self.basins.labels * 256, self.v)
        by_column = where.reshape(self.basins.shape).ravel("F")
        own = np.full((4, len(self.row) + 1), len(where), dtype=np.int64)
        # Of several pixels with one slot the last assignment stays.
        first, least_x, greatest_x, last = own
        first[where[::-1].copy()] = pixels.index_back
        least_x[by_column[::-1].copy()] = pixels.x_back
        greatest_x[by_column] = pixels.minus_x
        last[where] = pixels.minus_index
        return self._downwards(own, np.minimum)

    def double_areas(self) -> np.ndarray:
        """T: twice the polygon area: a 2 x 2 block counts 2 where all four pixels are in, 1 where three are."""
        v, labels = (
            self.v.astype(np.uint8).reshape(self.basins.shape),
            self.basins.labels.reshape(self.basins.shape),
        )
        p, q, r, s = v[:-1, :-1], v[:-1, 1:], v[1:, :-1], v[1:, 1:]
        low, high, low2, high2 = np.minimum(p, s), np.maximum(p, s), np.minimum(q, r), np.maximum(q, r)
        all_four, three = np.minimum(low, low2), np.minimum(np.maximum(low, low2), np.minimum(high, high2))
        # Three of four pixels touch each other, and the higher one of a diagonal is among the three: the block is of its component.
        owner = np.where(p >= s, labels[:-1, :-1], labels[1:, 1:]) * 256
        own = sum(
            np.bincount(self._where(owner, value).ravel(), minlength=len(self.row) + 1)
            for value in (all_four, three)
        )
        return self._downwards(own[None], np.add)[0]

    def _where(self, labels_256: np.ndarray, v: np.ndarray) -> np.ndarray:
        return self.slot.ravel()[labels_256 + v]

    def _downwards(self, own: np.ndarray, add: np.ufunc) -> np.ndarray:
        """k x (T + 1), what each slot gets at its level -> k x T, what it holds: all that its row got above, and the rows that ended in it."""
        T = len(self.row)
        if not T:
            return own[:, :0]
        saddle, onto, row = np.array(self.merges, dtype=np.intp).reshape(-1, 3).T
        # A row that never lived brings nothing; where the row that goes on ends at the same saddle, it brings the other along.
        counts = (self.span[row] > 0) & (self.end[onto] < saddle)
        if counts.any():
            saddle, onto, row = saddle[counts], onto[counts], row[counts]
            bounds = np.stack([self.start[row], self.start[row] + self.span[row]], axis=1)
            brought = add.reduceat(own, bounds.ravel(), axis=1)[:, ::2]
            for of_slots, of_rows in zip(own, brought):
                add.at(of_slots, self.slot[onto, saddle], of_rows)

        own = own[:, :T]
        begins = np.flatnonzero(np.append(True, self.row[1:] != self.row[:-1]))
        lengths = np.diff(np.append(begins, T))
        if add is np.add:
            total = own.cumsum(axis=1)
            return total - np.repeat(total[:, begins] - own[:, begins], lengths, axis=1)
        # Each row in a range of its own, below that of the row before: then one pass serves all rows.
        lower = np.repeat(np.arange(len(begins)) * -(2 * len(self.v) + 1), lengths)
        return np.minimum.accumulate(own + lower, axis=1) - lower

    def way_out(self) -> np.ndarray:
        """B: the highest level below which a basin is connected to row 0 (256 for row 0 itself)."""
        level = [0] * len(self.basins.peaks)
        level[0] = 256
        for saddle, onto, row in reversed(self.merges):
            level[row] = min(saddle, level[onto])
        return np.array(level)


class _Pixels(NamedTuple):
    index: np.ndarray
    index_back: np.ndarray
    minus_index: np.ndarray
    x_back: np.ndarray
    minus_x: np.ndarray


@lru_cache(maxsize=8)
def _pixels(H: int, W: int) -> _Pixels:
    """Of every pixel: its index in reading order; its x, column by column; `back`: from the last to the first."""
    index, x = np.arange(H * W), np.repeat(np.arange(W), H)
    return _Pixels(index, index[::-1].copy(), -index, x[::-1].copy(), -x)


def _boxes(extents: np.ndarray, width: int) -> np.ndarray:
    """`_Components.extents` 4 x T -> T x 4 boxes x0, y0, x1, y1."""
    first, x0, x1, last = extents
    return np.stack([x0, first // width, -x1, -last // width], axis=1)


def iou_matrix(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union with inclusive corners (a width is x1 - x0 + 1): M x 4, G x 4 -> M x G float64, in [0, 1]."""
    ax0, ay0, ax1, ay1 = np.asarray(a, dtype=np.int64).reshape(-1, 4).T.copy()[:, :, None]
    bx0, by0, bx1, by1 = np.asarray(b, dtype=np.int64).reshape(-1, 4).T[:, None, :]
    width = (np.minimum(ax1, bx1) - np.maximum(ax0, bx0) + 1).clip(min=0)
    height = (np.minimum(ay1, by1) - np.maximum(ay0, by0) + 1).clip(min=0)
    intersection = width * height
    area_a, area_b = (ax1 - ax0 + 1) * (ay1 - ay0 + 1), (bx1 - bx0 + 1) * (by1 - by0 + 1)
    return intersection / (area_a + area_b - intersection)


def scale_boxes(boxes: np.ndarray, size: tuple[int, int], map_size: int) -> np.ndarray:
    """Boxes from an image of size (width, height) to a map of map_size x map_size: int(x * map_size / width), truncated."""
    return np.asarray(boxes, dtype=np.int64) * map_size // np.array([*size, *size])


def fixed_level(score_map: np.ndarray, threshold: float) -> int:
    """The level of a fixed threshold, a fraction in [0, 1) of the map's maximum: floor(threshold * max v).

    score_map H x W in [0, 1]. Raises ValueError as `level_boxes` does.
    """
    return int(threshold * (int(_heights(score_map).max()) >> 8))
