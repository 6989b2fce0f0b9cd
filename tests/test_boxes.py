"""Boxes of every level: masks by hand, plain labeling, and OpenCV's contour tracer if it is installed."""

import numpy as np
import plain_boxes
import pytest

from bridge_wsol.boxes import fixed_level, iou_matrix, level_boxes, scale_boxes


def drawn(*rows: str) -> np.ndarray:
    """A map from digits: 0 ... 9 are the values 0, 1/9, ... 1."""
    return np.array([[int(x) for x in row] for row in rows], dtype=np.float32) / 9


def at(found, level: int) -> list[tuple[int, ...]]:
    return sorted(map(tuple, found.boxes[found.levels == level].tolist()))


def test_iou_is_inclusive():
    # 3 x 6 and 4 x 5 pixels with 2 x 4 in common: 8 / (18 + 20 - 8); the same box; a box of one pixel; boxes
    # without a common pixel.
    a = [[0, 0, 2, 5], [4, 4, 4, 4]]
    b = [[1, 2, 4, 6], [0, 0, 2, 5], [3, 0, 5, 5]]
    expected = [[8 / 30, 1, 0], [1 / 20, 0, 1 / 18]]
    np.testing.assert_allclose(iou_matrix(a, b), expected)
    # Side by side, one above the other, and diagonal: nothing in common.
    np.testing.assert_array_equal(iou_matrix([[0, 0, 2, 2]], [[4, 0, 6, 2], [0, 4, 2, 6], [5, 6, 7, 8]]), 0)


def test_a_component_s_box_is_its_extent_plus_one_clipped():
    found = level_boxes(drawn("00000", "09900", "09900", "00009"))
    # (4, 3) does not touch (2, 2): two components. The second is at the border, so its box is clipped.
    assert at(found, 0) == [(1, 1, 3, 3), (4, 3, 4, 3)]
    assert found.largest[0].tolist() == [1, 1, 3, 3]


def test_components_are_connected_over_corners_and_holes_are_not():
    found = level_boxes(drawn("900000", "090000", "009000", "000000", "000000", "000000"))
    assert at(found, 0) == [(0, 0, 3, 3)]
    # The two dark pixels inside touch at a corner only: two holes, each with the box of the ring around it.
    found = level_boxes(drawn("999990", "909990", "990990", "999990", "000000", "000000"))
    assert at(found, 0) == [(0, 0, 3, 3), (0, 0, 5, 4), (1, 1, 4, 4)]


def test_background_that_touches_the_border_is_no_hole():
    assert at(level_boxes(drawn("99999", "90009", "90909", "90009", "99099")), 0) == [
        (0, 0, 4, 4),
        (2, 2, 3, 3),
    ]
    # The same ring, closed: its component, its hole, the island in the hole.
    assert at(level_boxes(drawn("99999", "90009", "90909", "90009", "99999")), 0) == [
        (0, 0, 4, 4),
        (0, 0, 4, 4),
        (2, 2, 3, 3),
    ]


def test_every_level_has_its_own_boxes():
    # 3 / 9 and 6 / 9 are quantized to 85 and 170. The mask at a level has the values strictly above it.
    found = level_boxes(drawn("000000", "033330", "036630", "033330", "000009", "000000"))
    assert at(found, 84) == [(1, 1, 5, 5)]  # the pixel (5, 4) touches (4, 3) at a corner
    assert at(found, 85) == [(2, 2, 4, 3), (5, 4, 5, 5)]
    assert at(found, 169) == at(found, 85)
    assert at(found, 170) == at(found, 254) == [(5, 4, 5, 5)]


def test_the_largest_contour_has_the_largest_polygon_area_with_holes_filled():
    # Left: 6 pixels in a row, polygon area 0. Right: 2 x 2 pixels, area 1.
    found = level_boxes(drawn("99999900", "00000000", "00000990", "00000990", "00000000"))
    assert found.largest[0].tolist() == [5, 2, 7, 4]
    # A ring of 12 pixels around a 2 x 2 hole has area 9; a full square of 9 pixels has area 4.
    ring = drawn("999900000", "900900999", "900900999", "999900999", "000000000")
    assert level_boxes(ring).largest[0].tolist() == [0, 0, 4, 4]


def test_of_equal_areas_the_last_in_reading_order_wins():
    def largest(*rows: str) -> list[int]:
        return level_boxes(drawn(*rows)).largest[0].tolist()

    assert largest("0000990", "0990990", "0990000", "0000000") == [1, 1, 3, 3]
    # A block of area 2 and a ring of area 2, whose hole also has area 2 (the same four border pixels).
    assert largest("00000900", "99909090", "99900900", "00000000") == [0, 1, 3, 3]
    assert largest("00900000", "09090999", "00900999", "00000000") == [5, 1, 7, 3]
    assert largest("99900900", "99909090", "00000900", "00000000") == [4, 0, 7, 3]
    # The first pixel is in the topmost row, at any x.
    assert largest("00000009", "00990090", "00000900") == [2, 1, 4, 2]
    # Single pixels, area 0: at 0.6 of the maximum, the contour tracer of the protocol gives this box.
    single = [[0.4, 0, 0.2, 0.2, 0.2], [0.4, 0.4, 0, 0.4, 0], [0, 0, 0, 0.4, 0], [1, 0.6, 0.8, 0.2, 0.2]]
    assert level_boxes(np.array(single)).largest[int(0.6 * 255)].tolist() == [2, 3, 3, 3]


def test_no_foreground_gives_the_zero_box():
    found = level_boxes(np.zeros((4, 6)))
    assert at(found, 0) == at(found, 254) == [(0, 0, 0, 0)]
    assert (found.largest == 0).all() and found.largest.shape == (255, 4)
    half = level_boxes(np.full((4, 6), 0.5))
    assert at(half, 126) == [(0, 0, 5, 3)] and at(half, 127) == [(0, 0, 0, 0)]


def test_one_pixel():
    found = level_boxes(np.ones((1, 1)))
    assert at(found, 254) == [(0, 0, 0, 0)] and sorted(found.levels.tolist()) == list(range(255))


def test_invalid_score_maps_raise():
    for wrong in (np.zeros(4), np.zeros((2, 2, 2)), np.zeros((0, 3))):
        with pytest.raises(ValueError, match="H x W"):
            level_boxes(wrong)
    for value in (np.nan, 1.01, -0.01, np.inf):
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            level_boxes(np.array([[0.5, value]]))


def test_quantization_rounds_down():
    values = {0.0: 0, 0.9999 / 255: 0, 1 / 255 + 1e-9: 1, 0.5: 127, 254.999 / 255: 254, 1.0: 255}
    for value, levels in values.items():  # the number of levels with a foreground
        assert level_boxes(np.full((2, 2), value)).largest.any(1).sum() == levels


def random_maps(count: int, largest: int):
    """Maps of many kinds: noise, smooth, plateaus, binary, blocks, rings, nested rings, cut by the border,
    one image row, constant, many contours of equal area.
    """
    rng = np.random.default_rng(0)
    kinds = "noise", "smooth", "plateaus", "binary", "blocks", "rings", "nested", "border", "constant", "ties"
    for i in range(count):
        height, width = rng.integers(1, largest + 1, 2) if i % 7 else (1, int(rng.integers(1, largest + 1)))
        y, x = np.mgrid[:height, :width]
        noise, kind = rng.random((height, width)), kinds[i % len(kinds)]
        if kind == "smooth":
            waves = rng.normal(size=(4, 4))
            noise = sum(a * np.sin(b * x / 3 + c) * np.cos(d * y / 3 + c) for a, b, c, d in waves)
        elif kind == "plateaus":
            noise = np.floor(noise * 5)
        elif kind == "binary":
            noise = (noise < rng.random()).astype(float)
        elif kind == "blocks":
            coarse = rng.integers(0, 6, (height // 3 + 1, width // 3 + 1))
            noise = np.kron(coarse, np.ones((3, 3)))[:height, :width]
        elif kind in ("rings", "nested"):
            r = np.hypot(y - rng.random() * height, x - rng.random() * width)
            noise = np.sin(r * rng.uniform(0.5, 2)) + (0.2 * noise if kind == "nested" else 0)
            noise = np.round(noise * 4) if rng.random() < 0.5 else noise
        elif kind == "border":
            noise = np.exp(-np.hypot(y, x - width) / 5) + 0.05 * noise
        elif kind == "ties":  # single pixels, squares, rings with and without an island
            noise = np.zeros((height, width))
            for _ in range(rng.integers(1, 9)):
                side, value = rng.integers(1, 6), rng.integers(1, 4)
                ring = np.full((side, side), value)
                ring[1:-1, 1:-1] = 0
                ring[2:-2, 2:-2] = rng.integers(0, 4)
                ring[:: max(side - 1, 1), :: max(side - 1, 1)] *= rng.integers(0, 2)  # the corners
                x0, y0 = rng.integers(0, width), rng.integers(0, height)
                part = noise[y0 : y0 + side, x0 : x0 + side]
                part[...] = ring[: part.shape[0], : part.shape[1]]
        elif kind == "constant":
            noise = np.full((height, width), rng.integers(0, 2))
        spread = noise.max() - noise.min()
        yield ((noise - noise.min()) / spread if spread else np.clip(noise, 0, 1)).astype(np.float32)


def test_agrees_with_the_contour_tracer():
    pytest.importorskip("cv2")
    for score_map in random_maps(50, 24):
        swept, traced = level_boxes(score_map), plain_boxes.traced_boxes(score_map)
        np.testing.assert_array_equal(table(swept), table(traced))
        np.testing.assert_array_equal(swept.largest, traced.largest)


def table(found) -> np.ndarray:
    rows = np.column_stack([found.levels, found.boxes])
    return rows[np.lexsort(rows.T[::-1])]


@pytest.mark.parametrize("count, largest", [(100, 20), (20, 64)])
def test_the_sweep_equals_plain_labeling_at_every_level(count, largest):
    for i, score_map in enumerate(random_maps(count, largest)):
        swept, labeled = level_boxes(score_map), plain_boxes.level_boxes(score_map)
        np.testing.assert_array_equal(table(swept), table(labeled), err_msg=f"map {i}")
        np.testing.assert_array_equal(swept.largest, labeled.largest, err_msg=f"map {i}")


def test_maps_beyond_16_bit_pixel_numbers():
    rng = np.random.default_rng(0)
    coarse = rng.random((9, 11))
    score_map = np.kron(coarse, np.ones((30, 30)))[:260, :300]  # 78,000 pixels
    swept, labeled = level_boxes(score_map), plain_boxes.level_boxes(score_map)
    np.testing.assert_array_equal(table(swept), table(labeled))
    np.testing.assert_array_equal(swept.largest, labeled.largest)


def test_a_fixed_threshold_is_a_fraction_of_the_largest_value():
    score_map = drawn("02", "41")  # v = 0, 56, 113, 28
    assert [fixed_level(score_map, threshold) for threshold in (0, 0.5, 0.999)] == [0, 56, 112]
    for threshold in (-0.1, 1, 1.5):
        with pytest.raises(ValueError, match="in \\[0, 1\\)"):
            fixed_level(score_map, threshold)


def test_boxes_are_scaled_as_the_field_scales_them():
    for width in (*range(1, 1200), 4000, 5003):
        xs = range(width)
        boxes = np.array([xs, [0] * width, xs, xs]).T
        x0, y0, x1, y1 = scale_boxes(boxes, (width, 2 * width), 224).T.tolist()
        assert x0 == x1 == [int(x * 224 / width) for x in xs], width
        assert y0 == [0] * width and y1 == [int(y * 224 / (2 * width)) for y in xs], width
