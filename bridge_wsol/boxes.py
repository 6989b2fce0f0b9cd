"""From a score map to boxes: all thresholds at once, exactly (protocol: Choe et al., CVPR 2020).

The map is quantized to v = floor(255 * map). At level t, which is the threshold t / 255, the mask is v > t.
The protocol's mask at a threshold in [0, 1) is the mask of one of the levels 0 ... 254. A sweep over these
levels is therefore exact.

The sweep does not label each mask. It builds a merge tree, whose branches are the components of all masks,
from one pass over the pixels and one pass over the basins.

Basins. Every pixel points to a higher neighbour. The pointers lead uphill to a peak, and the pixels that
reach the same peak are its basin. (Any higher neighbour will do: first along the image row, then the highest
above or below.) An uphill path does not leave a mask that it is in. The part of a basin inside the mask is
therefore connected at every level. Within a basin, extents and areas are running minima, maxima and sums,
from the level of the peak down.

Saddles. Going down, two neighbouring basins connect at their saddle: the largest min(v, v') over pairs of
touching pixels, one in each. Processing the saddles in descending order joins basins as Kruskal's algorithm
does for a maximum spanning tree. At each saddle the branch with the lower peak ends and merges into the other
(elder rule). From there on, the extents and areas of the ended branch belong to the other branch, too.

A node is a branch at one of its levels: one component of one mask. Holes are the components of the
background, with heights 255 - v, 4-connected instead of 8-connected, and one pixel of background around the
image. A component that is connected to this border is not a hole.
"""

from __future__ import annotations

from functools import reduce
from typing import NamedTuple

import numpy as np

LEVELS = 255


class LevelBoxes(NamedTuple):
    """Boxes of all levels: x0, y0, x1, y1 in pixels of the map, corners included."""

    boxes: np.ndarray  # M x 4 int64, all contours of all levels
    levels: np.ndarray  # M int64, the level of each box, in 0 ... 254, unsorted; at least one box per level
    largest: np.ndarray  # 255 x 4 int64, the largest contour of each level


def level_boxes(score_map: np.ndarray) -> LevelBoxes:
    """The boxes of every level of one map (Choe et al.): H x W in [0, 1] -> LevelBoxes.

    All contours (MaxBoxAccV2): one box per 8-connected component of the mask, and one per hole, as a contour
    tracer returns both. A hole is a 4-connected component of the background that does not touch the image
    border. The box of a component is its extent. The box of a hole is the extent of the ring of foreground
    around it. Then 1 is added to x1 and y1, and the box is clipped to the image.

    Largest contour (MaxBoxAcc): the contour with the largest area of the polygon through the centres of its
    border pixels. Of equal areas, the contour whose first pixel comes last in reading order: the protocol's
    contour tracer (OpenCV's findContours) lists it first.

    A level without foreground has the box (0, 0, 0, 0).
    Raises ValueError for another shape, NaN, or values outside [0, 1].
    """
    heights = _heights(score_map)
    H, W = heights.shape
    limit = np.array([W - 1, H - 1, W - 1, H - 1])

    basins = _Basins(heights, eight=True)
    mask = _Components(basins, heights >> 8)
    extents = mask.extents()
    boxes = np.minimum(_boxes(extents, W) + [0, 0, 1, 1], limit)

    # The background with its border: c = 255 - v. Level t of the mask is level 254 - t of the background.
    background = np.full((H + 2, W + 2), HEIGHT_MAX, dtype=np.int32)
    background[1:-1, 1:-1] -= heights
    dark = _Components(_Basins(background, eight=False, border_is_one=True), background >> 8)
    hole = dark.branch > 0  # branch 0 is the border
    holes = np.minimum(_boxes(dark.extents()[:, hole], W + 2) + [-2, -2, 1, 1], limit)

    filled = mask
    if len(holes):
        # At a level, a pixel is filled if the background no longer connects it to the border. An uphill path
        # stays in the filled mask, too, so the basins are the same.
        border_level = dark.border_level()[dark.basins.labels].reshape(background.shape)
        filled = _Components(basins, 255 - np.minimum(background >> 8, border_level)[1:-1, 1:-1])
    largest = np.zeros((LEVELS, 4), dtype=np.int64)
    winner = _largest(mask, filled, extents[0])
    largest[mask.level[winner]] = boxes[winner]

    empty = np.arange(heights.max() >> 8, LEVELS)
    boxes = np.concatenate([boxes, holes, np.zeros((len(empty), 4), dtype=np.int64)])
    return LevelBoxes(boxes, np.concatenate([mask.level, LEVELS - 1 - dark.level[hole], empty]), largest)


def _largest(mask: _Components, filled: _Components, first_pixel: np.ndarray) -> np.ndarray:
    """The nodes of `mask` that are the largest contour of their level, by the rule of `level_boxes`.

    filled: the components with their holes filled. No contour is larger than the component around it, so only
    these are compared. (A hole as large as the largest component has the box of the component around it.)
    first_pixel: the first pixel of each node of `mask` in reading order.
    """
    pixels = mask.v.size
    within, first = slice(None), first_pixel
    if filled is not mask:
        within = filled.node[mask.branch, mask.level + 1]  # the filled component around each component
        first = np.full(len(filled.branch), pixels)
        np.minimum.at(first, within, first_pixel)
    # Of equal areas, the component whose first pixel comes last. The first pixel of a filled component is in
    # the component around all others in it.
    rank = filled.double_areas() * pixels + first
    highest = np.full(LEVELS, -1)
    np.maximum.at(highest, filled.level, rank)
    return np.flatnonzero((rank[within] == highest[mask.level]) & (first[within] == first_pixel))


HEIGHT_MAX = 65535  # heights have 16 bits: 8 of the quantized value v and 8 below it


def _heights(score_map: np.ndarray) -> np.ndarray:
    """floor(255 * map * 256): the upper byte is v, the lower byte orders pixels of equal v.

    In the quantized map every plateau would be a peak. The finer heights have a hundred times fewer peaks.
    Uphill in height is never downhill in v, which is all that the sweep needs.
    """
    score_map = np.asarray(score_map)
    if score_map.ndim != 2 or 0 in score_map.shape:
        raise ValueError(f"score map has shape {score_map.shape}, expected H x W")
    if not (score_map.min() >= 0 and score_map.max() <= 1):  # false for NaN as well
        raise ValueError("score map has values outside [0, 1], or NaN: normalize it")
    return (score_map * (255 * 256)).astype(np.int32)


class _Basins:
    """The basins of heights H x W.

    labels: H * W, the basin of each pixel. peaks: B, the pixel at the top of each basin. borders: the pairs
    of neighbouring pixels in different basins. eight: 8 neighbours per pixel, else 4. border_is_one: the
    pixels at the edge are one basin, number 0.
    """

    def __init__(self, heights: np.ndarray, eight: bool, border_is_one: bool = False):
        H, W = self.shape = heights.shape
        self.eight, self.border_is_one = eight, border_is_one
        bits, kind = (16, np.uint32) if H * W < 2**16 else (32, np.uint64)
        # Height and pixel index: keys are distinct, and of equal heights the last pixel is the highest.
        key = np.zeros((H + 2, W + 2), dtype=kind)
        inner = key[1:-1, 1:-1]
        inner[...] = heights
        inner <<= kind(bits)
        inner |= np.arange(H * W, dtype=kind).reshape(H, W)

        # Within an image row, a cumulative sum gives the next summit. Only the summits, a tenth of the
        # pixels, then follow pointers.
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
        while not np.array_equal(further := uphill[uphill], uphill):  # each round doubles the distance
            uphill = further

        tops = np.flatnonzero(uphill == np.arange(len(uphill)))
        self.peaks = summits[tops]
        number = np.zeros(len(summits), dtype=np.intp)
        number[tops] = np.arange(len(tops))
        self.labels = number[uphill][to_summit]
        self.borders = self._borders()

    def _borders(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The pairs of neighbouring pixels in different basins, each pair once, sorted by basins.

        Returns P, P: the indices of the pixels; Q: where the pairs of two basins begin; Q x 2: these basins.
        """
        H, W = self.shape
        labels = self.labels.astype(np.uint16 if len(self.peaks) < 2**16 else np.uint32)
        # Distance of the neighbour in the flat image, and the column without this neighbour.
        steps = [(1, W - 1), (W, None)] + ([(W + 1, W - 1), (W - 1, 0)] if self.eight else [])
        if W == 1:
            steps = [(1, None)]
        first, second = [], []
        for step, edge in steps:
            differ = labels[step:] != labels[:-step]
            if edge is not None:
                differ[edge::W] = False
            first.append(np.flatnonzero(differ))
            second.append(first[-1] + step)
        first, second = np.concatenate(first), np.concatenate(second)
        a, b, n = self.labels[first], self.labels[second], len(self.peaks)
        pair = np.minimum(a, b) * n + np.maximum(a, b)
        order = np.argsort(pair.astype(np.uint16) if n < 256 else pair, kind="stable")  # 16 bits: radix sort
        pair = pair[order]
        begins = np.flatnonzero(np.append(True, pair[1:] != pair[:-1])[: len(pair)])
        return first[order], second[order], begins, np.stack(np.divmod(pair[begins], n), axis=1)


class _Components:
    """The merge tree of the masks v > t of all levels t. v: H x W integers in 0 ... 255, never lower uphill.

    A node is a branch (numbered as its basin) and a level at which the branch exists: one component of one
    mask.
    branch, level: T each. The nodes of a branch are in descending order of level. The nodes of all branches
    that end in it follow its own.
    node: B x 256, the node of a pixel of basin b and value v at level v - 1, the first level whose mask
    contains the pixel. T for v = 0, which is in no mask.
    """

    def __init__(self, basins: _Basins, v: np.ndarray):
        self.basins, self.v, n = basins, v.ravel(), len(basins.peaks)
        peak = self.v[basins.peaks]
        self.merges = self._merge(peak.tolist())

        # Nodes of a branch with those of all branches that end in it (span), and the level at which it ends.
        span, end = peak.tolist(), [0] * n
        for saddle, kept, ended in self.merges:
            end[ended] = saddle
            span[ended] -= saddle
            span[kept] += span[ended]
        self.span, self.end = np.array(span), np.array(end)
        life = peak - self.end
        is_root = np.ones(n, dtype=bool)
        is_root[[ended for _, _, ended in self.merges]] = False
        start, T = np.zeros(n, dtype=np.intp), int(life.sum())
        start[is_root] = self.span[is_root].cumsum() - self.span[is_root]
        start, free = start.tolist(), (start + life).tolist()
        for _, kept, ended in reversed(self.merges):
            start[ended] = free[kept]
            free[ended] += free[kept]
            free[kept] += span[ended]
        self.start = np.array(start)

        in_turn = np.argsort(self.start, kind="stable")
        self.branch = np.repeat(in_turn, life[in_turn])
        self.level = (self.start + peak - 1)[self.branch] - np.arange(T)
        self.node = (self.start + peak)[:, None] - np.arange(LEVELS + 1)
        self.node[:, 0] = T
        for saddle, kept, ended in reversed(self.merges):
            self.node[ended, 1 : saddle + 1] = self.node[kept, 1 : saddle + 1]

    def _merge(self, peak: list[int]) -> list[tuple[int, int, int]]:
        """(saddle, branch that continues, branch that ends), in descending order of the saddles.

        Below the saddle, the two branches are one component.
        """
        if self.basins.border_is_one:
            peak[0] = 256  # the branch of the border never ends
        branch, merges = list(range(len(peak))), []
        for a, b, saddle in zip(*self._saddles()):
            while branch[a] != a:  # find the branch that continues, with path halving
                branch[a] = a = branch[branch[a]]
            while branch[b] != b:
                branch[b] = b = branch[branch[b]]
            if a != b and saddle:
                if peak[a] < peak[b]:
                    a, b = b, a
                branch[b] = a
                merges.append((saddle, a, b))
        return merges

    def _saddles(self) -> tuple[list[int], list[int], list[int]]:
        """Two neighbouring basins and their saddle, for all pairs, in descending order of the saddles."""
        first, second, begins, pairs = self.basins.borders
        if not len(begins):
            return [], [], []
        saddle = np.maximum.reduceat(np.minimum(self.v[first], self.v[second]), begins)
        order = np.argsort(-saddle, kind="stable")
        return (*pairs[order].T.tolist(), saddle[order].tolist())

    def extents(self) -> np.ndarray:
        """4 x T, per node: first pixel in reading order, smallest x, -largest x, -last pixel."""
        H, W = self.basins.shape
        row = W + 1  # zeros after each image row, and two rows of them above and below
        v = np.zeros((H + 4, row), dtype=np.uint8)
        v[2:-2, :-1] = self.v.reshape(H, W)
        v, begin, end = v.ravel(), 2 * row, (H + 2) * row
        neighbours = 4 if self.basins.eight else 2
        by_row = (-1, -row, -row - 1, 1 - row)[:neighbours]  # the neighbours that come before a pixel
        by_column = (-1, -row, -row - 1, row - 1)[:neighbours]
        own = np.full((4, len(self.branch) + 1), H * W, dtype=np.int64)
        for of_nodes, steps, sign in zip(own, (by_row, by_column, by_column, by_row), (1, 1, -1, -1)):
            # A pixel is not the first of its component if a neighbour before it is in the mask, too.
            before = reduce(np.maximum, (v[begin + sign * step : end + sign * step] for step in steps))
            at = np.flatnonzero(v[begin:end] > before)
            y = at // row
            pixel = at - y  # without the zeros
            node = self.node.ravel()[self.basins.labels[pixel] * 256 + self.v[pixel]]
            np.minimum.at(of_nodes, node, sign * (pixel if steps is by_row else at - y * row))
        return self._downwards(own, np.minimum)

    def double_areas(self) -> np.ndarray:
        """T, per node: twice the polygon area. A 2 x 2 block adds 2 with four pixels inside, 1 with three."""
        v = self.v.astype(np.uint8).reshape(self.basins.shape)
        labels = self.basins.labels.reshape(self.basins.shape)
        p, q, r, s = v[:-1, :-1], v[:-1, 1:], v[1:, :-1], v[1:, 1:]
        low, high, low2, high2 = np.minimum(p, s), np.maximum(p, s), np.minimum(q, r), np.maximum(q, r)
        all_four, three = np.minimum(low, low2), np.minimum(np.maximum(low, low2), np.minimum(high, high2))
        # Any three of the four pixels are connected, and the higher pixel of a diagonal is one of the three.
        # The block belongs to the component of this pixel.
        owner = np.where(p >= s, labels[:-1, :-1], labels[1:, 1:]) * 256
        cells = sum(
            np.bincount((owner + value).ravel(), minlength=self.node.size) for value in (all_four, three)
        )
        used = np.flatnonzero(cells)
        own = np.bincount(self.node.ravel()[used], cells[used], len(self.branch) + 1).astype(np.int64)
        return self._downwards(own[None], np.add)[0]

    def _downwards(self, own: np.ndarray, add: np.ufunc) -> np.ndarray:
        """Accumulates values down the tree: k x (T + 1), added at each node -> k x T, the total of each node.

        The total of a node includes its branch above, and the branches that ended in it. add: np.add or
        np.minimum.
        """
        T = len(self.branch)
        if not T:
            return own[:, :0]
        saddle, kept, ended = np.array(self.merges, dtype=np.intp).reshape(-1, 3).T
        # Skip a branch without nodes. Skip it, too, if the continuing branch ends at the same saddle: the
        # nodes of the ended branch are within the span of that branch.
        counts = (self.span[ended] > 0) & (self.end[kept] < saddle)
        if counts.any():
            saddle, kept, ended = saddle[counts], kept[counts], ended[counts]
            bounds = np.stack([self.start[ended], self.start[ended] + self.span[ended]], axis=1)
            totals = add.reduceat(own, bounds.ravel(), axis=1)[:, ::2]
            for of_nodes, of_branches in zip(own, totals):
                add.at(of_nodes, self.node[kept, saddle], of_branches)

        own = own[:, :T]
        begins = np.flatnonzero(np.append(True, self.branch[1:] != self.branch[:-1]))
        lengths = np.diff(np.append(begins, T))
        if add is np.add:
            total = own.cumsum(axis=1)
            return total - np.repeat(total[:, begins] - own[:, begins], lengths, axis=1)
        # Shift each branch below the range of the branch before: one pass then serves all branches.
        lower = np.repeat(np.arange(len(begins)) * -(2 * len(self.v) + 1), lengths)
        return np.minimum.accumulate(own + lower, axis=1) - lower

    def border_level(self) -> np.ndarray:
        """B: the level below which each basin is connected to branch 0, the border (256 for branch 0)."""
        level = [0] * len(self.basins.peaks)
        level[0] = 256
        for saddle, kept, ended in reversed(self.merges):
            level[ended] = min(saddle, level[kept])
        return np.array(level)


def _boxes(extents: np.ndarray, width: int) -> np.ndarray:
    """`_Components.extents`, 4 x T -> T x 4 boxes x0, y0, x1, y1 in pixels, corners included."""
    first, x0, x1, last = extents
    return np.stack([x0, first // width, -x1, -last // width], axis=1)


def iou_matrix(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union (Choe et al.): boxes M x 4 and G x 4, in pixels -> M x G float64 in [0, 1].

    Corners are included: the width of a box is x1 - x0 + 1.
    """
    ax0, ay0, ax1, ay1 = np.asarray(a, dtype=np.int64).reshape(-1, 4).T.copy()[:, :, None]
    bx0, by0, bx1, by1 = np.asarray(b, dtype=np.int64).reshape(-1, 4).T[:, None, :]
    width = (np.minimum(ax1, bx1) - np.maximum(ax0, bx0) + 1).clip(min=0)
    height = (np.minimum(ay1, by1) - np.maximum(ay0, by0) + 1).clip(min=0)
    intersection = width * height
    area_a, area_b = (ax1 - ax0 + 1) * (ay1 - ay0 + 1), (bx1 - bx0 + 1) * (by1 - by0 + 1)
    return intersection / (area_a + area_b - intersection)


def scale_boxes(boxes: np.ndarray, size: tuple[int, int], map_size: int) -> np.ndarray:
    """Scales boxes G x 4 from an image to a map: int(x * map_size / width), rounded down (Choe et al.).

    size: (width, height) of the image in pixels. The map has map_size x map_size pixels.
    """
    return np.asarray(boxes, dtype=np.int64) * map_size // np.array([*size, *size])


def fixed_level(score_map: np.ndarray, threshold: float) -> int:
    """The level of a fixed threshold: floor(threshold * max v).

    score_map H x W in [0, 1]; threshold: a fraction in [0, 1) of the map's maximum. Raises ValueError as
    `level_boxes` does, and for another threshold.
    """
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold {threshold}: must be in [0, 1)")
    return int(threshold * (int(_heights(score_map).max()) >> 8))
