"""Metrics on sets counted by hand, and PxAP against the definition of average precision."""

import numpy as np
import pytest

from bridge_wsol.boxes import scale_boxes
from bridge_wsol.metrics import BoxAccuracy, PixelAveragePrecision, label_ranks, localize, top_k_accuracy


def ious(**at_level: float) -> np.ndarray:
    """2 x 255 zeros, with an IoU at each level given as l<level>=IoU, in both rows."""
    array = np.zeros((2, 255))
    for name, value in at_level.items():
        array[:, int(name[1:])] = value
    return array


def test_the_threshold_is_chosen_for_the_set_not_for_each_image():
    # Each image has a level at which its box is right. At every level, at most two of the three are right.
    accuracy = BoxAccuracy()
    for i, image in enumerate((ious(l10=0.9), ious(l10=0.6, l20=0.9), ious(l20=0.4, l30=0.9))):
        accuracy.update(i, image)
    result = accuracy.compute()
    third = pytest.approx(100 / 3)
    assert result["metrics"]["max_box_acc_v2"] == {
        "30": pytest.approx(200 / 3),
        "50": pytest.approx(200 / 3),
        "70": third,
        "mean": pytest.approx(500 / 9),
    }
    # Of equally good thresholds, the lowest: two images reach IoU 0.3 at level 10, and two at level 20.
    assert result["levels"] == {"30": 10, "50": 10, "70": 10, "largest": 10}
    curve = result["curves"]["50"]
    assert curve[10] == pytest.approx(200 / 3) and curve[30] == third and len(curve) == 255
    assert result["metrics"]["top1_loc"] is None
    assert result["metrics"]["max_box_acc_v2_at_val_threshold"] is None


def test_an_iou_of_exactly_delta_counts():
    accuracy = BoxAccuracy()
    accuracy.update(0, ious(l5=7 / 10))
    accuracy.update(1, ious(l5=3 / 10))
    expected = {"30": 100, "50": 50, "70": 50, "mean": pytest.approx(200 / 3)}
    assert accuracy.compute()["metrics"]["max_box_acc_v2"] == expected


def test_top_k_loc_needs_the_box_at_the_threshold_of_the_set_and_the_class():
    accuracy = BoxAccuracy()
    accuracy.update(0, ious(l10=0.6), rank=0)  # right box, right class
    accuracy.update(1, ious(l10=0.6), rank=3)  # right box, class among the top 5
    accuracy.update(2, ious(l20=0.6), rank=0)  # right class, right box only at another threshold
    accuracy.update(3, ious(l10=0.6), rank=7)
    metrics = accuracy.compute()["metrics"]
    assert (metrics["gt_known_loc"], metrics["top1_loc"], metrics["top5_loc"]) == (75, 25, 50)


def test_thresholds_of_val_are_applied_unchanged():
    accuracy = BoxAccuracy()
    accuracy.update(0, ious(l10=0.9))
    accuracy.update(1, ious(l10=0.9, l20=0.4))
    metrics = accuracy.compute({"30": 20, "50": 20, "70": 10, "largest": 0})["metrics"]
    assert metrics["max_box_acc_v2_at_val_threshold"] == {"30": 50, "50": 0, "70": 100, "mean": 50}


def test_a_fixed_threshold_has_a_level_per_image():
    accuracy = BoxAccuracy()
    for index, (level, rank) in enumerate([(20, 0), (20, 3), (40, 0), (40, 9)]):
        image = np.zeros((2, 255))
        image[0] = 0.9  # all contours: not used here
        image[1, level] = 0.5
        accuracy.update(index, image, rank)
    found = accuracy.at_fixed_levels({0: 20, 1: 20, 2: 20, 3: 40})  # image 2: right at level 40 only
    assert found == {"gt_known_loc": 75, "top1_loc": 25, "top5_loc": 50}
    assert BoxAccuracy.at_fixed_levels(without_ranks(), {0: 7})["top1_loc"] is None
    with pytest.raises(ValueError, match="no images"):
        BoxAccuracy().at_fixed_levels({})


def without_ranks():
    accuracy = BoxAccuracy()
    accuracy.update(0, np.ones((2, 255)))
    return accuracy


def test_the_two_box_rules_are_separate():
    image = np.zeros((2, 255))
    image[0, 10], image[1, 40] = 0.8, 0.55
    accuracy = BoxAccuracy()
    accuracy.update(0, image)
    result = accuracy.compute()
    assert result["levels"]["50"] == 10 and result["levels"]["largest"] == 40
    assert result["metrics"]["max_box_acc"] == result["metrics"]["gt_known_loc_largest"] == 100
    assert result["metrics"]["max_box_acc_v2"]["70"] == 100


def test_merging_in_any_order_gives_the_same_result_and_no_image_counts_twice():
    rng = np.random.default_rng(0)
    images = [(rng.random((2, 255)), int(rank)) for rank in rng.integers(0, 8, 11)]
    whole = BoxAccuracy()
    parts = [BoxAccuracy() for _ in range(3)]
    for i, (image, rank) in enumerate(images):
        whole.update(i, image, rank)
        parts[i % 3].update(i, image, rank)
    parts[2].merge(parts[0])
    parts[2].merge(parts[1])
    assert parts[2].compute() == whole.compute()
    with pytest.raises(ValueError, match="image 0 was added before"):
        parts[2].merge(parts[0])
    with pytest.raises(ValueError, match="no images"):
        BoxAccuracy().compute()


def test_ious_of_a_worked_map():
    # 10 x 10: a 4 x 4 square of value 1 in a 6 x 6 square of value 0.5. With 1 added to x1 and y1, the boxes
    # are 3, 3, 7, 7 and 2, 2, 8, 8.
    score_map = np.zeros((10, 10), dtype=np.float32)
    score_map[2:8, 2:8], score_map[3:7, 3:7] = 0.5, 1.0
    found = localize(score_map, np.array([[3, 3, 7, 7], [0, 0, 1, 1]])).ious
    # At levels 0 ... 126 (floor(0.5 * 255) = 127) the box is 7 x 7, the truth 5 x 5. Above, they are equal.
    assert found[0, :127] == pytest.approx(25 / 49) and (found[0, 127:] == 1).all()
    np.testing.assert_array_equal(found[0], found[1])


def test_a_map_without_foreground_has_the_zero_box():
    found = localize(np.zeros((10, 10)), np.array([[0, 0, 1, 1]]))
    assert (found.ious == 1 / 4).all() and (found.largest == 0).all()
    assert (localize(np.zeros((10, 10)), np.array([[5, 5, 8, 8]])).ious == 0).all()


def test_boxes_are_scaled_with_truncation():
    # int(x * 224 / 500), int(y * 224 / 333), computed with exact fractions.
    assert scale_boxes([[60, 27, 384, 330]], (500, 333), 224).tolist() == [[26, 18, 172, 221]]


def test_ranks_by_hand():
    logits = np.array(
        [
            [3.0, 1.0, 2.0],
            [3.0, 1.0, 2.0],
            [1.0, 1.0, 1.0],
            [1.0, 1.0, 1.0],
            [np.nan, 1.0, 0.0],
            [-np.inf, 0.0, np.inf],
        ]
    )
    assert label_ranks(logits, np.array([0, 1, 0, 2, 1, 2])).tolist() == [0, 2, 0, 2, 3, 0]
    assert top_k_accuracy([0, 2, 5, 0], 1) == 50 and top_k_accuracy([0, 2, 5, 0], 5) == 75


@pytest.mark.parametrize("classes, top_5", [(3, 100), (5, 0)])
def test_nan_logits_rank_after_all_classes(classes, top_5):
    """With fewer than 5 classes, the Top-5 predictions are all classes, for an image with NaN logits, too."""
    logits = np.array([[np.nan] + [0.0] * (classes - 1)])
    rank = label_ranks(logits, np.array([1]))
    assert rank == classes and top_k_accuracy(rank, 1) == 0 and top_k_accuracy(rank, 5) == top_5


def average_precision(scores, positive):
    """Area under the precision-recall curve in steps, with every distinct score as a threshold."""
    area = last_recall = 0.0
    for t in sorted(set(scores), reverse=True):
        chosen = scores >= t
        recall = positive[chosen].sum() / positive.sum()
        area += positive[chosen].mean() * (recall - last_recall)
        last_recall = recall
    return 100 * area


def test_pxap_equals_average_precision_over_all_pixels():
    rng = np.random.default_rng(0)
    metric, scores, positive = PixelAveragePrecision(), [], []
    halves = PixelAveragePrecision(), PixelAveragePrecision()
    for i in range(6):
        mask, ignore = rng.random((12, 9)) < 0.3, rng.random((12, 9)) < 0.2
        # One score per bin, not at an edge: the histogram does not order the pixels within a bin.
        score_map = (rng.integers(0, 1000, (12, 9)) + 0.5) / 1000
        score_map[0, 0] = 1.0
        metric.update(score_map, mask, ignore)
        halves[i % 2].update(score_map, mask, ignore)
        counted = mask | ~ignore
        scores.append(score_map[counted])
        positive.append(mask[counted])
    expected = average_precision(np.concatenate(scores), np.concatenate(positive))
    assert metric.compute() == pytest.approx(expected, abs=1e-9)
    halves[0].merge(halves[1])
    assert halves[0].compute() == metric.compute()


def test_pxap_by_hand():
    metric = PixelAveragePrecision()
    assert metric.compute() is None
    # Scores 0.9 (object), 0.8 (background), 0.7 (object), 0.6 (ignored): precision 1 to recall 1/2, then 2/3.
    scores = np.array([[0.9, 0.8], [0.7, 0.6]])
    metric.update(scores, np.array([[True, False], [True, False]]), np.array([[False, False], [False, True]]))
    assert metric.compute() == pytest.approx(100 * (1 / 2 + 2 / 3 / 2))
