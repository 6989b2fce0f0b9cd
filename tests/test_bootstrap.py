"""Intervals and paired differences against a plain loop over the same draws; hits files."""

import json
import re
from pathlib import Path

import interval_coverage
import numpy as np
import pytest
from conftest import REPOSITORY, results, run
from scipy.stats import binom

from bridge_wsol import bootstrap
from bridge_wsol.bootstrap import difference, interval, read_hits, resamples, save_hits
from bridge_wsol.data import Split
from bridge_wsol.datasets import load_split
from bridge_wsol.metrics import Evaluator, Hits, Measured
from bridge_wsol.reproduce.experiments import METRICS, flat
from bridge_wsol.utils import InputError

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


def percentiles(values, estimate, biases=2):
    """The percentiles, less twice the bias; those of a difference as they are."""
    values = sorted(value for value in values if not np.isnan(value))
    bias = biases * (sum(values) / len(values) - estimate)
    low, high = (np.interp(q * (len(values) - 1), range(len(values)), values) for q in (0.025, 0.975))
    return [min(low - bias, estimate), max(high - bias, estimate)]


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(bootstrap, "RESAMPLES", 50)


def test_intervals_are_those_of_a_plain_loop(few):
    found = images(13, 0)
    whole, drawn = numbers(hits_of(found)), by_loop(found, 13)
    computed = bootstrap.intervals([hits_of(found)], DIGEST)
    fixed = {f"fixed_{key}": bounds for key, bounds in computed.pop("fixed_threshold").items()}
    computed = flat(computed) | fixed
    assert len(whole) == 17 and None not in whole.values()
    for key, value in whole.items():
        expected = np.clip(percentiles(drawn[key], value), 0, 100)
        assert computed[key] == pytest.approx(expected, abs=1e-9), key
        assert computed[key][0] <= value <= computed[key][1]


def test_seeds_are_averaged_and_differences_paired(few):
    n, sides = 11, ([images(11, 1), images(11, 2)], [images(11, 3)])
    a, b = ([hits_of(found) for found in side] for side in sides)
    value, bounds = difference(a, b, DIGEST)
    loops = [[by_loop(found, n) for found in side] for side in sides]
    of_mean = flat(bootstrap.intervals(a, DIGEST))
    for key in METRICS:
        first, second = (np.mean([loop[key] for loop in side], axis=0) for side in loops)
        whole = [np.mean([numbers(hits)[key] for hits in side]) for side in (a, b)]
        expected = percentiles(second - first, whole[1] - whole[0], biases=0)
        assert flat(bounds)[key] == pytest.approx(expected, abs=1e-9), key
        assert flat(value)[key] == pytest.approx(whole[1] - whole[0], abs=1e-9)
        assert of_mean[key] == pytest.approx(np.clip(percentiles(first, whole[0]), 0, 100), abs=1e-9)
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
    bounds = bootstrap.intervals([hits], DIGEST)["max_box_acc_v2_at_val_threshold"]["50"]
    assert bounds == pytest.approx(100 * binom.ppf([0.025, 0.975], 400, share) / 400, abs=0.8)


def test_intervals_contain_the_truth_about_as_often_as_they_say(monkeypatch):
    """Flat curves, few images: where the threshold is chosen on them, percentiles alone would be too high."""
    monkeypatch.setattr(f"{resamples.__module__}.RESAMPLES", 200)
    rows = interval_coverage.study(60, 40, spreads=(0.25, 0.25), size=10_000)
    for name, (percentile, _, _, taken, bias) in rows.items():
        if name in ("IoU 30", "IoU 50", "MaxBoxAccV2"):
            assert taken > 0.7 and percentile < taken - 0.1 and bias > 1, name
        else:
            assert percentile > 0.85, name


def test_an_interval_by_hand():
    values = np.append(60 + np.arange(1001) / 100, np.nan)  # mean 65, percentiles 60.25 and 69.75
    for estimate, expected in (
        (65, [60.25, 69.75]),
        (62, [54.25, 63.75]),
        (50, [30.25, 50]),
        (90, [90, 119.75]),
    ):
        assert interval(values, estimate) == pytest.approx(expected)
        plain = interval(values, estimate, of_difference=True)
        assert plain == pytest.approx([min(60.25, estimate), max(69.75, estimate)])
    assert interval(values[-1:], np.nan) is None


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
    assert list(hits.result()["curves"].values()) == (100 * right.sum(0) / n).tolist()  # in several blocks
    save_hits(tmp_path / "results.npz", hits, split)
    assert (tmp_path / "results.npz").stat().st_size < limit
    stored = read_hits(tmp_path / "results.json", hits.result()["metrics"])
    assert stored.ids == split.ids and stored.digest == split.digest()
    for name in ("boxed", "masked", "right", "ranks", "fixed"):
        np.testing.assert_array_equal(getattr(stored.hits, name), getattr(hits, name))
    assert stored.hits.pixels is None and (stored.hits.threshold, stored.hits.val_levels) == (0.25, VAL)


def write(path, hits, split, **head):
    """A results file and its hits file."""
    head = {"dataset": "D", "arch": "vgg16", "method": "cam", "split": "test", **head}
    found = hits.result() | {"intervals": bootstrap.intervals([hits], split.digest())}
    path.write_text(json.dumps(head | found))
    save_hits(path.with_suffix(".npz"), hits, split)


def split_of(n, boxes=None, sizes=(32, 32)):
    boxes = {i: np.array([[0, 0, 9, 9]]) for i in range(n)} if boxes is None else boxes
    labels = np.zeros(n, dtype=np.int64)
    return Split("D", Path(), [f"{i}.jpg" for i in range(n)], labels, np.array([sizes] * n), boxes)


def right_at(*rows, boxed=None):
    """Hits of images with a right box at level 10 where the row says so, for all IoUs; not of the largest."""
    found = np.array(rows, dtype=bool)
    right = np.zeros((len(found), 4, 255), dtype=bool)
    right[:, :3, 10] = found[:, None]
    boxed = np.ones(len(found), dtype=bool) if boxed is None else np.array(boxed, dtype=bool)
    return Hits(boxed, ~boxed & False, right)


def test_difference_by_hand(tmp_path, capsys):
    """Five images with boxes, one without. Both find 0; A alone 1; B alone 2, and 3 with one of two seeds."""
    boxed = [1, 1, 1, 1, 1, 0]
    split = split_of(6, {i: np.array([[0, 0, 9, 9]]) for i in range(5)})
    write(tmp_path / "a.json", right_at(1, 1, 0, 0, 0, 0, boxed=boxed), split)
    for seed, row in enumerate([(1, 0, 1, 1, 0, 0), (1, 0, 1, 0, 0, 0)]):
        write(tmp_path / f"b{seed}.json", right_at(*row, boxed=boxed), split, seed=seed)
    names = f"{tmp_path}/b0.json {tmp_path}/b1.json --names a b b --out {tmp_path}/d"
    run("experiments", f"difference {tmp_path}/a.json {names}")
    found, printed = results(tmp_path, "d.json"), capsys.readouterr().out
    # A: 2 of 5. B: 3 and 2 of 5.
    v2 = found["metrics"]["v2_mean"]
    assert [v2[key]["value"] for key in ("a", "b", "difference")] == pytest.approx([40, 50, 10])
    assert found["only"] == {"a": 1, "b": 1.5} and (found["a"]["name"], len(found["b"]["results"])) == (
        "a",
        2,
    )
    assert "by a alone: 1, by b alone: 1.5 of 5 images" in printed
    assert "b − a is 10.0 [" in printed and "may explain it. Means over 1 and 2 seeds" in printed
    low, high = v2["difference"]["interval"]
    assert low < 0 < 10 < high and "top1_cls" not in found["metrics"]
    # The other way round, all signs change; the better one is still the better one.
    run(
        "experiments",
        f"difference {tmp_path}/b0.json {tmp_path}/b1.json {tmp_path}/a.json --names b b a "
        f"--out {tmp_path}/d",
    )
    back = results(tmp_path, "d.json")["metrics"]["v2_mean"]["difference"]
    assert back["value"] == pytest.approx(-10) and back["interval"] == pytest.approx([-high, -low])
    assert "a − b is -10.0 [" in capsys.readouterr().out


def test_a_difference_that_images_cannot_explain_and_none_at_all(tmp_path, capsys):
    write(tmp_path / "a.json", right_at(*[1] * 10, *[0] * 30), split_of(40))
    write(tmp_path / "b.json", right_at(*[1] * 35, *[0] * 5), split_of(40))
    run("experiments", f"difference {tmp_path}/a.json {tmp_path}/b.json --out {tmp_path}/d")
    assert "b is better than a by 62.5 [" in (printed := capsys.readouterr().out)
    assert "more than the choice of test images explains." in printed
    run("experiments", f"difference {tmp_path}/b.json {tmp_path}/a.json --out {tmp_path}/d")
    assert "b is better than a by 62.5 [" in capsys.readouterr().out
    run("experiments", f"difference {tmp_path}/a.json {tmp_path}/a.json --names a b --out {tmp_path}/d")
    assert (
        "b − a is 0.0 [0.0, 0.0] in MaxBoxAccV2: the choice of test images may explain it."
        in capsys.readouterr().out
    )


def test_tables_have_the_interval_of_the_seeds_mean(tmp_path):
    sides = [right_at(*np.random.default_rng(seed).random(20) < 0.5) for seed in range(2)]
    for seed, hits in enumerate(sides):
        write(tmp_path / f"r_seed{seed}.json", hits, split_of(20), seed=seed)
    low, high = bootstrap.intervals(sides, split_of(20).digest())["max_box_acc_v2"]["mean"]
    command = f"table {tmp_path}/r_seed0.json {tmp_path}/r_seed1.json --out {tmp_path}/t"
    run("experiments", command)
    text = (tmp_path / "t.md").read_text()
    assert "| MaxBoxAccV2, 95 % over images |" in text and f"| [{low:.1f}, {high:.1f}] |" in text
    (tmp_path / "r_seed1.npz").unlink()
    run("experiments", command)
    assert "over images" not in (tmp_path / "t.md").read_text()
    write(tmp_path / "r_seed1.json", sides[1], split_of(20, sizes=(64, 64)), seed=1)
    with pytest.raises(InputError, match="r_seed1.json: other images, .* is 0.jpg"):
        run("experiments", command)


def test_hits_belong_to_the_results_whose_metrics_they_give(tmp_path):
    hits = right_at(1, 0, 1)
    write(tmp_path / "a.json", hits, split_of(3))
    metrics = hits.result()["metrics"]
    near, other = (metrics | {"max_box_acc": metrics["max_box_acc"] + x} for x in (1e-12, 1e-3))
    assert read_hits(tmp_path / "a.json", near).ids == ["0.jpg", "1.jpg", "2.jpg"]
    with pytest.raises(InputError, match="not of the evaluation"):
        read_hits(tmp_path / "a.json", other)


def test_a_band_is_the_percentiles_of_the_curve():
    hits = curve_hits((0.7, 0.2), 400, 0)
    low, high = bootstrap.band([hits], DIGEST)["50"]
    for level in (0, 1):
        share = hits.right[:, 0, level].mean()
        expected = 100 * binom.ppf([0.025, 0.975], 400, share) / 400
        assert [low[level], high[level]] == pytest.approx(expected, abs=0.8)
    assert low.shape == (255,) and not low[2:].any() and not high[2:].any()


def test_difference_of_two_runs(trained, tmp_path, capsys, fails):
    flags, folder = trained
    run("train", f"{flags} --out {tmp_path}/cam --method cam --quiet")
    run("experiments", f"difference {tmp_path}/cam {folder} --out {tmp_path}/d")
    found = results(tmp_path, "d.json")["metrics"]
    assert found.keys() == METRICS.keys()
    for key, entry in found.items():
        for side, run_of in (("a", tmp_path / "cam"), ("b", folder)):
            assert entry[side]["value"] == flat(results(run_of)["metrics"])[key]
            assert entry[side]["interval"] == flat(results(run_of)["intervals"])[key]
        assert entry["difference"]["value"] == pytest.approx(entry["b"]["value"] - entry["a"]["value"])
    # Score maps of the run, evaluated as files, hit the same.
    run("evaluate", f"{folder} --save-maps {tmp_path}/maps --device cpu")
    out, lists = tmp_path / "maps.json", f"--data-root {tmp_path}/data --lists {tmp_path}/lists"
    of_maps = f"--score-maps {tmp_path}/maps --dataset tiny --image-size 64 {lists} --out {out}"
    run("evaluate", of_maps)
    run("experiments", f"difference {folder} {out} --out {tmp_path}/d")
    same = results(tmp_path, "d.json")
    assert same["metrics"]["v2_mean"]["difference"] == {"value": 0, "interval": [0, 0]}
    assert same["only"] == {"a": 0, "b": 0} and "top1_cls" not in same["metrics"]
    for runs, words in (
        (f"{folder} {folder}", "the same run"),
        (folder, "1 sides (bridge)"),
        (f"{folder} {tmp_path}/cam {out}", "3 sides"),
    ):
        fails("experiments", f"difference {runs}", words)
    # Other boxes; results of another evaluation; damaged files.
    boxes = tmp_path / "lists/tiny/test/localization.txt"
    text = boxes.read_text()
    boxes.write_text(re.sub(r"(test/03.png,\d+,\d+),\d+,\d+", r"\1,30,30", text))
    run("evaluate", of_maps)
    fails("experiments", f"difference {folder} {out}", "maps.json", "test/03.png")
    (tmp_path / "maps.npz").write_bytes((folder / "results_last_test.npz").read_bytes())
    fails("experiments", f"difference {folder} {out}", "maps.npz", "not of the evaluation")
    whole, rng = (folder / "results_best_test.npz").read_bytes(), np.random.default_rng(0)
    for _ in range(40):
        damaged = bytearray(whole[: rng.integers(1, len(whole))] if rng.random() < 0.3 else whole)
        damaged[rng.integers(len(damaged))] ^= 1 << rng.integers(8)
        (folder / "results_best_test.npz").write_bytes(damaged)
        try:
            assert read_hits(folder / "results_best_test.json", results(folder)["metrics"]).ids
        except InputError as error:
            assert "evaluate again" in str(error)
    (folder / "results_best_test.npz").unlink()
    fails("experiments", f"difference {folder} {tmp_path}/cam", "no such file")


def test_masks_without_an_object_have_neither_metric_nor_interval(tmp_path):
    pixels = np.zeros((3, 2, 1002), dtype=np.int32)
    pixels[:, 1, 5] = 9
    hits = right_at(1, 0, 1)
    hits.masked, hits.pixels = np.ones(3, dtype=bool), pixels
    write(tmp_path / "a.json", hits, split_of(3))
    run("experiments", f"difference {tmp_path}/a.json {tmp_path}/a.json --names a b --out {tmp_path}/d")
    assert "pxap" not in results(tmp_path, "d.json")["metrics"]
    assert bootstrap.intervals([hits], DIGEST)["pxap"] is None


def test_without_intervals(trained, tmp_path, capsys):
    run("evaluate", f"{trained[1]} --device cpu --no-intervals --out {tmp_path}/r.json")
    without, given = results(tmp_path, "r.json"), results(trained[1])
    assert "intervals" not in without and "95 %" not in capsys.readouterr().out
    assert without["metrics"] == given["metrics"]
    assert given["intervals"]["max_box_acc_v2"].keys() == given["metrics"]["max_box_acc_v2"].keys()
