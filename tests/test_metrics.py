"""Metrics on sets counted by hand, and PxAP against the definition of average precision."""

import json

import interval_coverage
import numpy as np
import pytest
from conftest import REPOSITORY
from scipy.stats import binom

from bridge_wsol import metrics as module
from bridge_wsol.evaluation import load_per_image
from bridge_wsol.metrics import ImageResult, PerImage, difference, intervals, measure, resamples
from bridge_wsol.reproduce.experiments import METRICS, flat
from bridge_wsol.utils import InputError


def image(contours=(), largest=(), fixed_level=None):
    """What is measured of an image: {level: IoU} of all contours and of the largest one, 0 elsewhere."""
    ious = np.zeros((2, 255))
    for row, at in zip(ious, (dict(contours), dict(largest))):
        row[list(at)] = list(at.values())
    return ImageResult(module.correct_boxes(ious), ious, fixed_level=fixed_level)


def stack(images, ranks=None, **options):
    ranks = [None] * len(images) if ranks is None else ranks
    return PerImage.stack([one._replace(rank=rank) for one, rank in zip(images, ranks)], **options)


def metrics(images, ranks=None, **options):
    return stack(images, ranks, **options).result()["metrics"]


def test_the_threshold_is_chosen_for_the_set_not_for_each_image():
    # Each image has a level at which its box is right. At every level, at most two of the three are right.
    result = stack([image({10: 0.9}), image({10: 0.6, 20: 0.9}), image({20: 0.4, 30: 0.9})]).result()
    third = pytest.approx(100 / 3)
    two = pytest.approx(200 / 3)
    expected = {"30": two, "50": two, "70": third, "mean": pytest.approx(500 / 9)}
    assert result["metrics"]["max_box_acc_v2"] == expected
    # Of equally good levels, the lowest: two images reach IoU 0.3 at level 10, and two at level 20.
    assert result["levels"] == {"30": 10, "50": 10, "70": 10, "largest": 0}
    assert result["thresholds"]["30"] == 10 / 255
    curve = result["curves"]["50"]
    assert curve[10] == two and curve[30] == third and len(curve) == 255
    assert result["metrics"]["top1_loc"] is None is result["metrics"]["max_box_acc_v2_at_val_threshold"]


def test_an_iou_of_exactly_delta_counts_and_the_next_smaller_number_does_not():
    exact = [image({5: iou}, {7: iou}, fixed_level=7) for iou in (3 / 10, 5 / 10, 7 / 10)]
    found = metrics(exact, threshold=0.5)
    two, third = pytest.approx(200 / 3), pytest.approx(100 / 3)
    assert found["max_box_acc_v2"] == {"30": 100, "50": two, "70": third, "mean": two}
    assert found["max_box_acc"] == found["gt_known_loc_largest"] == two
    assert found["fixed_threshold"]["gt_known_loc"] == two
    below = [np.nextafter(delta, 0) for delta in (0.3, 0.5, 0.7)]
    found = metrics([image({5: iou}, {7: iou}, fixed_level=7) for iou in below], threshold=0.5)
    assert found["max_box_acc_v2"] == {"30": two, "50": third, "70": 0, "mean": third}
    assert found["max_box_acc"] == found["fixed_threshold"]["gt_known_loc"] == third


def test_the_two_box_rules_are_separate():
    # The first image has no right box among the largest contours, at any level.
    result = stack([image({10: 0.8}), image({10: 0.8}, {40: 0.55})], ranks=[0, 0]).result()
    found = result["metrics"]
    assert found["max_box_acc_v2"] == {"30": 100, "50": 100, "70": 100, "mean": 100}
    assert found["gt_known_loc"] == found["top1_loc"] == found["top5_loc"] == 100
    assert found["max_box_acc"] == found["gt_known_loc_largest"] == 50
    assert result["levels"] == {"30": 10, "50": 10, "70": 10, "largest": 40}
    assert result["curves"]["50"][40] == 0 and result["curves"]["largest"][10] == 0


RANKS = [0, 1, 4, 5, 0]  # the best class, the second, the fifth, the sixth


def test_top_k_loc_needs_the_box_at_the_threshold_of_the_set_and_the_class():
    right = [image({10: 0.6, 20: 0.4})] * 4  # the best level for IoU 30 is 20, for 50 it is 10
    found = metrics([*right, image({20: 0.6})], RANKS)  # the last is right at another threshold only
    assert (found["gt_known_loc"], found["top1_loc"], found["top5_loc"]) == (80, 20, 60)
    assert (found["top1_cls"], found["top5_cls"]) == (40, 80)


def test_a_fixed_threshold_has_a_level_per_image():
    images = [image(dict.fromkeys(range(255), 0.9), {level: 0.6}, level) for level in (20, 20, 40, 40)]
    images.append(image({30: 0.9}, {30: 0.6}, fixed_level=20))  # right at level 30 only
    found = metrics(images, RANKS, threshold=0.25)["fixed_threshold"]
    assert found == {"threshold": 0.25, "gt_known_loc": 80, "top1_loc": 20, "top5_loc": 60}
    found = metrics(images, threshold=0.25)["fixed_threshold"]
    assert found == {"threshold": 0.25, "gt_known_loc": 80, "top1_loc": None, "top5_loc": None}
    with pytest.raises(ValueError, match="without the fixed threshold"):
        stack([*images, image({30: 0.9})], threshold=0.25)


def test_thresholds_of_val_are_applied_unchanged_each_to_its_iou():
    # At the four levels, 4, 3, 2 and 1 images are right, by IoUs that fit one delta better than another.
    table = {10: (0.4, 0.4, 0.4, 0.4), 20: (0.6, 0.6, 0.6, 0), 30: (0.8, 0.8, 0, 0), 40: (0.9, 0, 0, 0)}
    images = [image({level: row[i] for level, row in table.items()}) for i in range(4)]
    for levels, expected in (
        ({"30": 10, "50": 20, "70": 30, "largest": 40}, {"30": 100, "50": 75, "70": 50, "mean": 75}),
        ({"30": 40, "50": 30, "70": 20, "largest": 10}, {"30": 25, "50": 50, "70": 0, "mean": 25}),
    ):
        assert metrics(images, val_levels=levels)["max_box_acc_v2_at_val_threshold"] == expected
    best = stack(images).result()
    assert best["levels"] == {"30": 10, "50": 20, "70": 30, "largest": 0}
    assert best["metrics"]["max_box_acc_v2"] == {"30": 100, "50": 75, "70": 50, "mean": 75}


def test_classes_count_for_all_images_and_boxes_for_those_that_have_them():
    found = stack([image({10: 0.6}), ImageResult(), image(), ImageResult()], ranks=[0, 0, 0, 9]).result()
    assert (found["images"], found["images_with_boxes"]) == (4, 2) and "images_with_masks" not in found
    assert found["metrics"]["gt_known_loc"] == found["metrics"]["top1_loc"] == 50
    assert found["metrics"]["top1_cls"] == 75 and found["metrics"]["pxap"] is None
    without_boxes = stack([ImageResult(), ImageResult()], ranks=[0, 5]).result()
    assert without_boxes["levels"] is None is without_boxes["metrics"]["max_box_acc_v2"]
    assert module.selection_score(without_boxes["metrics"]) == ("Top-1 cls", 50)
    assert module.selection_score(found["metrics"]) == ("MaxBoxAccV2", pytest.approx(100 / 3))  # 50, 50, 0
    for images, ranks in (([ImageResult()], None), ([], None), ([image(), image()], [0, None])):
        with pytest.raises(InputError):
            metrics(images, ranks)


def test_a_worked_map():
    # 10 x 10: a 4 x 4 square of value 1 in a 6 x 6 square of value 0.5. With 1 added to x1 and y1, the boxes
    # are 3, 3, 7, 7 and 2, 2, 8, 8.
    score_map = np.zeros((10, 10), dtype=np.float32)
    score_map[2:8, 2:8], score_map[3:7, 3:7] = 0.5, 1.0
    found = measure(score_map, np.array([[3, 3, 7, 7], [0, 0, 1, 1]]), threshold=0.3)
    # At levels 0 ... 126 (floor(0.5 * 255) = 127) the box is 7 x 7, the truth 5 x 5. Above, they are equal.
    assert found.ious[0, :127] == pytest.approx(25 / 49) and (found.ious[0, 127:] == 1).all()
    np.testing.assert_array_equal(found.ious[0], found.ious[1])
    assert found.largest[126].tolist() == [2, 2, 8, 8] and found.largest[127].tolist() == [3, 3, 7, 7]
    assert found.fixed_level == 76 and found.pixels is None  # floor(0.3 * 255)
    # A fraction of the maximum, which is floor(0.5 * 255) = 127 here.
    assert measure(score_map / 2, np.array([[3, 3, 7, 7]]), threshold=0.3).fixed_level == 38


def test_a_map_without_foreground_has_the_zero_box():
    found = measure(np.zeros((10, 10)), np.array([[0, 0, 1, 1]]))
    assert (found.ious == 1 / 4).all() and (found.largest == 0).all()
    assert (measure(np.zeros((10, 10)), np.array([[5, 5, 8, 8]])).ious == 0).all()


def test_ranks_by_hand():
    one, nan, inf = [1.0, 1.0, 1.0], np.nan, np.inf
    logits = np.array([[3.0, 1, 2], [3.0, 1, 2], one, one, [nan, 1, 0], [-inf, 0, inf]])
    assert module.label_ranks(logits, np.array([0, 1, 0, 2, 1, 2])).tolist() == [0, 2, 0, 2, 3, 0]
    # NaN ranks after all classes. With fewer than 5 classes, the Top-5 predictions are all of them.
    for classes, top_5 in ((3, 100), (5, 0)):
        rank = module.label_ranks(np.array([[nan] + [0.0] * (classes - 1)]), np.array([1]))
        found = metrics([ImageResult()], rank)
        assert rank == classes and found["top1_cls"] == 0 and found["top5_cls"] == top_5


def test_the_flat_part_of_a_curve():
    assert module.flatness([96, 10, 95, 100, 95, 94, 95]) == (2, 4, pytest.approx(3 / 7))
    assert module.flatness([100, 100]) == (0, 1, 1) and module.flatness([0, 0, 0])[2] is None


def by_definition(scores, positive):
    """Area under the precision-recall curve in steps, with every distinct score as a threshold."""
    area = last_recall = 0.0
    for t in sorted(set(scores), reverse=True):
        chosen = scores >= t
        recall = positive[chosen].sum() / positive.sum()
        area += positive[chosen].mean() * (recall - last_recall)
        last_recall = recall
    return 100 * area


@pytest.fixture
def pixels():
    """(results of random images, the scores of all pixels that count, whether they are object)."""
    rng, found, scores, positive = np.random.default_rng(0), [], [], []
    for _ in range(6):
        mask, ignore = rng.random((12, 9)) < 0.3, rng.random((12, 9)) < 0.2
        # One score per bin, not at an edge: the histogram does not order the pixels within a bin.
        score_map = (rng.integers(0, 700, (12, 9)) + 300 * mask + 0.5) / 1000
        score_map[0, 0] = 1.0
        found.append(measure(score_map, masks=(mask, ignore)))
        scores.append(score_map[mask | ~ignore])
        positive.append(mask[mask | ~ignore])
    return stack(found).result(), np.concatenate(scores), np.concatenate(positive)


def test_pxap_equals_average_precision_over_all_pixels(pixels):
    found, scores, positive = pixels
    for recall, precision in found["precision_at_recall"].items():
        reaches = [t for t in scores if (scores[positive] >= t).mean() >= float(recall) / 100]
        assert precision == pytest.approx(100 * positive[scores >= max(reaches)].mean())
    expected = pytest.approx(by_definition(scores, positive), abs=1e-9)
    assert found["metrics"]["pxap"] == expected
    assert module.selection_score(found["metrics"]) == ("PxAP", expected)


def test_pxap_by_hand():
    # Scores 0.9 (object), 0.8 (background), 0.7 (object), 0.6 (ignored): precision 1 to recall 1/2, then 2/3.
    mask, ignore = np.array([[True, False], [True, False]]), np.array([[False, False], [False, True]])
    histogram = module.pixel_histogram(np.array([[0.9, 0.8], [0.7, 0.6]]), mask, ignore)
    assert module.average_precision(histogram) == pytest.approx(100 * (1 / 2 + 2 / 3 / 2))
    assert list(module.precision_at_recall(histogram).values()) == pytest.approx([100] * 5 + [200 / 3] * 4)
    assert np.isnan(module.average_precision(np.zeros_like(histogram)))
    # An object pixel of score 0 is found last: precision 1 to recall 1/2, then 2/3.
    mask = np.array([[True, False, True]])
    histogram = module.pixel_histogram(np.array([[0.9, 0.5, 0.0]]), mask, ~mask & False)
    assert module.average_precision(histogram) == pytest.approx(100 * (1 / 2 + 2 / 3 / 2))


def test_peak_iou_by_its_definition(pixels):
    """The best IoU of the masks score >= t with the true mask, all images pooled, ignored pixels left out."""
    found, scores, truth = pixels
    ious = [(truth & (scores >= t)).sum() / (truth | (scores >= t)).sum() for t in np.arange(0, 1, 0.001)]
    assert found["metrics"]["piou"] == pytest.approx(100 * max(ious), abs=1e-9) and 0 < np.argmax(ious) < 990
    # 0.9 object, 0.8 other, 0.7 object, 0.1 other: 1/2, 1/3, 2/3, 2/4.
    mask = np.array([[True, False, True, False]])
    histogram = module.pixel_histogram(np.array([[0.9, 0.8, 0.7, 0.1]]), mask, ~mask & False)
    assert module.peak_iou(histogram) == pytest.approx(200 / 3)
    assert np.isnan(module.peak_iou(np.zeros_like(histogram)))


def test_what_was_not_measured_is_none_under_its_own_key():
    mask = np.array([[True, False]])
    masked = measure(np.array([[1.0, 0.0]]), masks=(mask, ~mask & False))
    found = stack([masked, ImageResult()]).result()
    boxes = "max_box_acc_v2 max_box_acc gt_known_loc gt_known_loc_largest max_box_acc_v2_at_val_threshold"
    logits = "top1_loc top5_loc top1_cls top5_cls"
    assert found == {
        "images": 2,
        "images_with_masks": 1,
        "metrics": dict.fromkeys(f"{boxes} {logits}".split()) | {"pxap": 100, "piou": 100},
        **dict.fromkeys(("levels", "thresholds", "curves")),
        "precision_at_recall": {str(recall): 100 for recall in range(10, 100, 10)},
    }
    assert "images_with_boxes" not in stack([image({3: 1})] * 2).result()
    assert stack([image({3: 1}), ImageResult()]).result()["images_with_boxes"] == 1


# Intervals against a plain loop over the same draws.

DIGEST = "0123456789abcdef"
VAL = {"30": 40, "50": 90, "70": 120, "largest": 60}


def images(n, seed):
    """n images, each with or without boxes and masks, and with a rank."""
    rng, found = np.random.default_rng(seed), []
    for i in range(n):
        ious = np.zeros((2, 255))
        first, length = rng.integers(0, 120, 2), rng.integers(0, 130, 2)
        for row, start, end in zip(ious, first, first + length):
            row[start:end] = rng.random()
        pixels = rng.integers(0, 50, (2, 1002)).astype(np.int32)
        one = ImageResult(module.correct_boxes(ious), pixels=pixels, fixed_level=int(rng.integers(0, 255)))
        one = one._replace(correct=None, fixed_level=None) if i % 5 == 4 else one
        one = one._replace(pixels=None) if i % 3 == 2 else one
        found.append(one._replace(rank=int(rng.integers(0, 8))))
    return found


def stacked(found):
    return PerImage.stack(found, VAL, 0.3)


def numbers(per_image):
    """The ordinary metrics of a results file, one level deep."""
    metrics = per_image.result()["metrics"]
    fixed = {f"fixed_{key}": value for key, value in metrics.pop("fixed_threshold").items()}
    fixed.pop("fixed_threshold")
    return {key: value for key, value in (flat(metrics) | fixed).items() if not isinstance(value, dict)}


def by_loop(found, n):
    """The ordinary metrics of each resample, whose images are added one by one: {metric: values}."""
    values = {}
    for counts in resamples(DIGEST, n):
        drawn = np.repeat(np.arange(n), counts)
        assert len(drawn) == n
        for key, value in numbers(stacked([found[i] for i in drawn])).items():
            values.setdefault(key, []).append(np.nan if value is None else value)
    return {key: np.array(of) for key, of in values.items()}


def percentiles(values, estimate, biases=2):
    """The percentiles, less twice the bias; those of a difference as they are."""
    values = sorted(value for value in values if not np.isnan(value))
    bias = biases * (sum(values) / len(values) - estimate)
    low, high = (np.interp(q * (len(values) - 1), range(len(values)), values) for q in (0.025, 0.975))
    return [min(low - bias, estimate), max(high - bias, estimate)]


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(module, "RESAMPLES", 50)


def test_intervals_are_those_of_a_plain_loop(few):
    found = images(13, 0)
    whole, drawn = numbers(stacked(found)), by_loop(found, 13)
    computed = intervals([stacked(found)], DIGEST)
    fixed = {f"fixed_{key}": bounds for key, bounds in computed.pop("fixed_threshold").items()}
    computed = flat(computed) | fixed
    assert len(whole) == 17 and None not in whole.values()
    for key, value in whole.items():
        expected = np.clip(percentiles(drawn[key], value), 0, 100)
        assert computed[key] == pytest.approx(expected, abs=1e-9), key
        assert computed[key][0] <= value <= computed[key][1]


def test_seeds_are_averaged_and_differences_paired(few):
    n, sides = 11, ([images(11, 1), images(11, 2)], [images(11, 3)])
    a, b = ([stacked(found) for found in side] for side in sides)
    value, bounds = difference(a, b, DIGEST)
    loops = [[by_loop(found, n) for found in side] for side in sides]
    of_mean = flat(intervals(a, DIGEST))
    for key in METRICS:
        first, second = (np.mean([loop[key] for loop in side], axis=0) for side in loops)
        whole = [np.mean([numbers(per_image)[key] for per_image in side]) for side in (a, b)]
        expected = percentiles(second - first, whole[1] - whole[0], biases=0)
        assert flat(bounds)[key] == pytest.approx(expected, abs=1e-9), key
        assert flat(value)[key] == pytest.approx(whole[1] - whole[0], abs=1e-9)
        assert of_mean[key] == pytest.approx(np.clip(percentiles(first, whole[0]), 0, 100), abs=1e-9)
    # The same images twice: paired, nothing remains.
    value, bounds = difference(a, a, DIGEST)
    assert flat(value)["v2_mean"] == 0 and flat(bounds)["v2_mean"] == [0, 0]


def of_curve(shares, n, seed):
    """Images whose boxes are correct at level i with the probability shares[i], and at no other level."""
    correct = np.zeros((n, 4, 255), dtype=bool)
    correct[:, :, : len(shares)] = np.random.default_rng(seed).random((n, 1, len(shares))) < shares
    return PerImage(
        np.ones(n, dtype=bool), np.zeros(n, dtype=bool), correct, val_levels=dict.fromkeys(VAL, 0)
    )


def test_an_interval_at_a_fixed_threshold_is_the_binomial_s():
    """The bootstrap of a share of n images is the binomial distribution."""
    per_image = of_curve((0.7,), 400, 0)
    share = per_image.correct[:, 0, 0].mean()
    bounds = intervals([per_image], DIGEST)["max_box_acc_v2_at_val_threshold"]["50"]
    assert bounds == pytest.approx(100 * binom.ppf([0.025, 0.975], 400, share) / 400, abs=0.8)


def test_intervals_contain_the_truth_about_as_often_as_they_say(monkeypatch):
    """Flat curves, few images: where the threshold is chosen on them, percentiles alone would be too high."""
    monkeypatch.setattr(module, "RESAMPLES", 200)
    rows = interval_coverage.study(60, 40, spreads=(0.25, 0.25), size=10_000)
    for name, (percentile, _, _, taken, bias) in rows.items():
        if name in ("IoU 30", "IoU 50", "MaxBoxAccV2"):
            assert taken > 0.7 and percentile < taken - 0.1 and bias > 1, name
        else:
            assert percentile > 0.85, name


def test_an_interval_by_hand():
    values = np.append(60 + np.arange(1001) / 100, np.nan)  # mean 65, percentiles 60.25 and 69.75
    by_hand = {65: [60.25, 69.75], 62: [54.25, 63.75], 50: [30.25, 50], 90: [90, 119.75]}
    for estimate, expected in by_hand.items():
        assert module.interval(values, estimate) == pytest.approx(expected)
        plain = module.interval(values, estimate, bias_corrected=False)
        assert plain == pytest.approx([min(60.25, estimate), max(69.75, estimate)])
    assert module.interval(values[-1:], np.nan) is None


def test_two_evaluations_draw_the_same_resamples_and_two_splits_others():
    drawn = resamples(DIGEST, 30)
    np.testing.assert_array_equal(drawn, resamples(DIGEST, 30))
    assert drawn.shape == (1000, 30) and (drawn.sum(1) == 30).all() and not (drawn == 1).all(1).any()
    assert abs(drawn.mean(0) - 1).max() < 0.15  # each image once, on average
    assert (drawn != resamples("0123456789abcdee", 30)).any()


def test_a_band_is_the_percentiles_of_the_curve():
    per_image = of_curve((0.7, 0.2), 400, 0)
    low, high = module.band([per_image], DIGEST)["50"]
    for level in (0, 1):
        share = per_image.correct[:, 0, level].mean()
        expected = 100 * binom.ppf([0.025, 0.975], 400, share) / 400
        assert [low[level], high[level]] == pytest.approx(expected, abs=0.8)
    assert low.shape == (255,) and not low[2:].any() and not high[2:].any()


def test_what_a_side_localizes_is_at_iou_50_and_its_best_level():
    """IoUs of four images at levels 10 and 20: the best level of IoU 50 is 20, of IoU 30 and 70 it is 10."""
    ious = [(0.4, 0.6), (0.4, 0.6), (0.4, 0.0), (0.8, 0.0)]
    one = stack([image({10: a, 20: b}) for a, b in ious])
    other = stack([image({10: 0.9}) for _ in ious])
    assert module.localized([one]).tolist() == [1, 1, 0, 0]
    assert module.localized([one, other]).tolist() == [1, 1, 0.5, 0.5]


def test_the_intervals_of_a_committed_result_come_out_again():
    path = REPOSITORY / "docs" / "results" / "CUB10" / "bridge_seed0.json"
    stored = load_per_image(path, (result := json.loads(path.read_text()))["metrics"])
    assert intervals([stored.per_image], stored.digest) == result["intervals"]
