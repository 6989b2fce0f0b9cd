"""Intervals and paired differences against a plain loop over the same draws; hits files."""

import json

import numpy as np
import pytest
from conftest import REPOSITORY, results, run
from scipy.stats import binom, norm

from bridge_wsol import intervals
from bridge_wsol.datasets import load_split
from bridge_wsol.experiments import METRICS, flat
from bridge_wsol.intervals import difference, read_hits, resamples, save_hits
from bridge_wsol.metrics import Evaluator, Hits, Measured

DIGEST = "0123456789abcdef"
VAL = {"30": 40, "50": 90, "70": 120, "largest": 60}


def images(n, seed):
    """n images, each with or without boxes, masks and a rank: (Measured, rank)."""
    rng, found = np.random.default_rng(seed), []
    for i in range(n):
        ious = np.zeros((2, 255))
        first, length = rng.integers(0, 120, 2), rng.integers(0, 130, 2)
        for row, start, end in zip(ious, first, first + length):
            row[start:end] = rng.random()
        pixels = rng.integers(0, 50, (2, 1002)).astype(np.int32)
        one = Measured(ious, None, int(rng.integers(0, 255)), pixels)
        one = one._replace(ious=None, fixed_level=None) if i % 5 == 4 else one
        found.append((one._replace(pixels=None) if i % 3 == 2 else one, int(rng.integers(0, 8))))
    return found


def hits_of(found):
    evaluator = Evaluator()
    for index, (one, rank) in enumerate(found):
        evaluator.add(index, one, rank)
    return evaluator.hits(VAL, 0.3)


def numbers(hits):
    """The ordinary metrics of a results file, one level deep."""
    metrics = hits.result()["metrics"]
    fixed = {f"fixed_{key}": value for key, value in metrics.pop("fixed_threshold").items()}
    fixed.pop("fixed_threshold")
    return {key: value for key, value in (flat(metrics) | fixed).items() if not isinstance(value, dict)}


def by_loop(found, n):
    """The ordinary metrics of each resample, whose images are added one by one: {metric: values}."""
    values = {}
    for counts in resamples(DIGEST, n):
        drawn = np.repeat(np.arange(n), counts)
        assert len(drawn) == n
        for key, value in numbers(hits_of([found[i] for i in drawn])).items():
            values.setdefault(key, []).append(np.nan if value is None else value)
    return {key: np.array(of) for key, of in values.items()}


def corrected(values, estimate):
    """Efron's bias-corrected percentiles, written down once more."""
    values = values[~np.isnan(values)]
    share = np.mean([0.5 if x == estimate else float(x < estimate) for x in values])
    z = norm.ppf(np.clip(share, 0.025, 0.975))
    low, high = np.quantile(values, [norm.cdf(2 * z - 1.9599640), norm.cdf(2 * z + 1.9599640)])
    return [min(low, estimate), max(high, estimate)]


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 80)


def test_intervals_are_those_of_a_plain_loop(few):
    found = images(13, 0)
    whole, drawn = numbers(hits_of(found)), by_loop(found, 13)
    computed = intervals.intervals([hits_of(found)], DIGEST)
    fixed = {f"fixed_{key}": bounds for key, bounds in computed.pop("fixed_threshold").items()}
    computed = flat(computed) | fixed
    assert len(whole) == 17 and None not in whole.values()
    for key, value in whole.items():
        assert computed[key] == pytest.approx(corrected(drawn[key], value), abs=1e-6), key
        assert computed[key][0] <= value <= computed[key][1]


def test_seeds_are_averaged_and_differences_paired(few):
    n, sides = 11, ([images(11, 1), images(11, 2)], [images(11, 3)])
    a, b = ([hits_of(found) for found in side] for side in sides)
    value, bounds = difference(a, b, DIGEST)
    loops = [[by_loop(found, n) for found in side] for side in sides]
    of_mean = flat(intervals.intervals(a, DIGEST))
    for key in METRICS:
        first, second = (np.mean([loop[key] for loop in side], axis=0) for side in loops)
        whole = [np.mean([numbers(hits)[key] for hits in side]) for side in (a, b)]
        expected = corrected(second - first, whole[1] - whole[0])
        assert flat(bounds)[key] == pytest.approx(expected, abs=1e-6), key
        assert flat(value)[key] == pytest.approx(whole[1] - whole[0], abs=1e-9)
        assert of_mean[key] == pytest.approx(corrected(first, whole[0]), abs=1e-6)
    # The same images twice: paired, nothing remains.
    value, bounds = difference(a, a, DIGEST)
    assert flat(value)["v2_mean"] == 0 and flat(bounds)["v2_mean"] == [0, 0]


def curve_hits(shares, n, seed):
    """Images whose boxes are right at level i with the probability shares[i], and at no other level."""
    right = np.zeros((n, 4, 255), dtype=bool)
    right[:, :, : len(shares)] = np.random.default_rng(seed).random((n, 1, len(shares))) < shares
    return Hits(np.ones(n, dtype=bool), np.zeros(n, dtype=bool), right, val_levels=dict.fromkeys(VAL, 0))


def test_an_interval_at_a_fixed_threshold_is_the_binomial_s():
    """The bootstrap of a share of n images is the binomial distribution."""
    hits = curve_hits((0.7,), 400, 0)
    share = hits.right[:, 0, 0].mean()
    bounds = intervals.intervals([hits], DIGEST)["max_box_acc_v2_at_val_threshold"]["50"]
    assert bounds == pytest.approx(100 * binom.ppf([0.025, 0.975], 400, share) / 400, abs=0.8)


def test_intervals_contain_the_truth_about_as_often_as_they_say():
    """The threshold is chosen on the images, of three that are equally good and independent."""
    covered = np.zeros(2)
    for seed in range(150):
        hits = curve_hits((0.5, 0.5, 0.5), 60, seed)
        low, high = intervals.intervals([hits], DIGEST)["gt_known_loc"]
        values = hits.measure(resamples(DIGEST, 60))[0]["gt_known_loc"]
        plain = np.quantile(values, [0.025, 0.975])
        covered += [low <= 50 <= high, plain[0] <= 50 <= plain[1]]
    assert covered[0] / 150 > 0.85 and covered[1] / 150 < 0.8, covered / 150


def test_two_evaluations_draw_the_same_resamples_and_two_splits_others():
    drawn = resamples(DIGEST, 30)
    np.testing.assert_array_equal(drawn, resamples(DIGEST, 30))
    assert drawn.shape == (1000, 30) and (drawn.sum(1) == 30).all() and not (drawn == 1).all(1).any()
    assert abs(drawn.mean(0) - 1).max() < 0.15  # each image once, on average
    assert (drawn != resamples("0123456789abcdee", 30)).any()


@pytest.mark.parametrize("dataset, split, limit", [("CUB", "test", 1e6), ("ILSVRC", "test", 8e6)])
def test_a_hits_file_is_small_and_read_as_it_was_written(dataset, split, limit, tmp_path):
    split = load_split(dataset, split, lists_dir=REPOSITORY / "data_splits")
    n, rng = len(split), np.random.default_rng(0)
    # Random bits: what compresses worst.
    right = np.unpackbits(rng.integers(0, 256, (n, 4, 32), dtype=np.uint8), axis=-1, count=255).astype(bool)
    fixed, every = rng.random(n) < 0.5, np.ones(n, dtype=bool)
    hits = Hits(every, ~every, right, rng.integers(0, 200, n), None, fixed, 0.25, VAL)
    save_hits(tmp_path / "results.npz", hits, split)
    assert (tmp_path / "results.npz").stat().st_size < limit
    stored = read_hits(tmp_path / "results.json")
    assert stored.ids == split.ids and stored.digest == split.digest()
    for name in ("boxed", "masked", "right", "ranks", "fixed"):
        np.testing.assert_array_equal(getattr(stored.hits, name), getattr(hits, name))
    assert stored.hits.pixels is None and (stored.hits.threshold, stored.hits.val_levels) == (0.25, VAL)


def test_difference_of_two_runs(trained, tmp_path, capsys, fails):
    flags, folder = trained
    run("train", f"{flags} --out {tmp_path}/cam --method cam --quiet")
    capsys.readouterr()
    run("experiments", f"difference {tmp_path}/cam {folder} --out {tmp_path}/d")
    printed, found = capsys.readouterr().out, results(tmp_path, "d.json")
    ours, theirs = (results(x)["metrics"] for x in (folder, tmp_path / "cam"))
    for key in METRICS:
        gap = flat(ours)[key] - flat(theirs)[key]
        assert found[key]["difference"] == pytest.approx(gap, abs=1e-9)
        assert found[key]["cam"]["value"] == flat(theirs)[key]
        assert flat(results(folder)["intervals"])[key] == found[key]["bridge"]["interval"]
    assert f"{abs(found['v2_mean']['difference']):.1f} [" in printed and "test images" in printed
    # The other way round, all signs change.
    run("experiments", f"difference {folder} {tmp_path}/cam --out {tmp_path}/d")
    back = results(tmp_path, "d.json")
    for key in METRICS:
        assert back[key]["interval"] == pytest.approx([-x for x in found[key]["interval"][::-1]], abs=1e-9)
    assert back["only"] == found["only"]
    # Score maps of the run, evaluated as files, hit the same.
    run("evaluate", f"{folder} --save-maps {tmp_path}/maps --device cpu")
    out, lists = tmp_path / "maps.json", f"--data-root {tmp_path}/data --lists {tmp_path}/lists"
    run("evaluate", f"--score-maps {tmp_path}/maps --dataset tiny --image-size 64 {lists} --out {out}")
    run("experiments", f"difference {folder} {out} --out {tmp_path}/d")
    same = results(tmp_path, "d.json")
    assert same["v2_mean"]["interval"] == [0, 0] == [*same["only"].values()] and "top1_cls" not in same
    # Other images, other boxes, no hits file.
    boxes = tmp_path / "lists/tiny/test/localization.txt"
    lines = boxes.read_text().splitlines()
    line = next(i for i, text in enumerate(lines) if text.startswith("test/03") and text.count(",") == 4)
    lines[line] = ",".join([*lines[line].split(",")[:3], "30", "30"])
    boxes.write_text("\n".join(lines))
    run("evaluate", f"--score-maps {tmp_path}/maps --dataset tiny --image-size 64 {lists} --out {out}")
    fails("experiments", f"difference {folder} {out}", "maps.json", "test/03.png first")
    fails("experiments", f"difference {folder} {folder}", "the same run")
    fails("experiments", f"difference {folder}", "--names")
    (tmp_path / "maps.npz").write_bytes(b"PK damaged")
    fails("experiments", f"difference {folder} {out}", "maps.npz", "evaluate again")
    (tmp_path / "maps.npz").unlink()
    fails("experiments", f"difference {folder} {out}", "maps.npz", "no such file")


def test_without_intervals(trained, tmp_path, capsys):
    run("evaluate", f"{trained[1]} --device cpu --no-intervals --out {tmp_path}/r.json")
    without, given = results(tmp_path, "r.json"), results(trained[1])
    assert "intervals" not in without and "95 %" not in capsys.readouterr().out
    assert without["metrics"] == given["metrics"]
    bounds = json.loads(json.dumps(given["intervals"]))
    assert bounds["max_box_acc_v2"].keys() == given["metrics"]["max_box_acc_v2"].keys()
