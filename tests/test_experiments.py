"""Many runs: which are trained, which are skipped, which are refused; tables against the numbers."""

import csv
import json
import re
import shlex
import shutil
import statistics
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from conftest import REPOSITORY, correct_at, results, run, split_of, write_results

from bridge_wsol import metrics
from bridge_wsol.config import fingerprint, parse_args
from bridge_wsol.evaluation import load_per_image
from bridge_wsol.metrics import intervals
from bridge_wsol.reproduce import experiments, figures
from bridge_wsol.reproduce.experiments import METRICS, flat, read_sweep
from bridge_wsol.utils import InputError

reproduce = partial(run, "reproduce")


def cells(path):
    """The rows of the Markdown tables in a file, heads first, as lists of cells."""
    lines = [line for line in path.read_text().splitlines() if line.startswith("|") and "| ---" not in line]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def move_a_box(root):
    """Another box of the image test/03.png."""
    boxes = root / "lists" / "tiny" / "test" / "localization.txt"
    boxes.write_text(re.sub(r"(test/03.png,\d+,\d+),\d+,\d+", r"\1,30,30", boxes.read_text()))


def csv_rows(path):
    with path.open(newline="") as file:
        return {row["method"]: row for row in csv.DictReader(file)}


def changed(source, folder, v2=None, metrics=(), **config):
    """A copy of a run with other values in config.json, and other metrics in its results on test."""
    shutil.copytree(source, folder)
    values = results(folder, "config.json")
    for name, value in config.items():
        values["config"][name]["value"] = value
    of_run = fingerprint({name: entry["value"] for name, entry in values["config"].items()})
    values["fingerprint"]["values"] = of_run
    (folder / "config.json").write_text(json.dumps(values))
    for path in folder.glob("results_*_test.json"):
        result = json.loads(path.read_text())
        result["fingerprint"]["values"] = of_run
        result |= {name: value for name, value in config.items() if name in result}
        result["metrics"] |= dict(metrics)
        if v2 is not None:
            result["metrics"]["max_box_acc_v2"]["mean"] = v2
        path.write_text(json.dumps(result))
        if v2 is not None or metrics:
            path.with_suffix(".npz").unlink()
    return folder


@pytest.fixture
def compared(trained, tmp_path):
    """(flags of a comparison that is finished, its folder, the tiny run)."""
    flags, source = trained
    changed(source, tmp_path / "runs" / "bridge_seed0")
    return f"compare --methods bridge --seeds 0 --runs {tmp_path}/runs {flags}", tmp_path / "runs", source


@pytest.fixture
def in_process(monkeypatch):
    """Scripts are called in this process. The test of scripts that fail starts one."""

    def call(script, arguments, folder):
        print(f"{folder}: {script}")
        run(script.removesuffix(".py"), shlex.join(arguments))

    monkeypatch.setattr(experiments, "run_script", call)


@pytest.mark.slow
def test_the_comparison_trains_and_tabulates_what_is_missing(compared, capsys, fails, in_process):
    flags, runs, _ = compared
    eil = "eil:eil_gamma=0.5,eil_lambda=2"
    flags = flags.replace("--methods bridge --seeds 0", f"--methods bridge bridge+ivr {eil} --seeds 0 1")
    folders = ["bridge_seed{}", "bridge_seed{}", "eil_eil_gamma=0.5_eil_lambda=2_seed{}"]
    reproduce(flags)
    printed = capsys.readouterr().out
    assert "1 of 4 runs are finished" in printed
    assert printed.count(": train.py") == 3 and printed.count(": evaluate.py") == 2  # one ivr per seed
    config = results(runs / folders[2].format(1), "config.json")["config"]
    assert config["eil_gamma"] == {"value": 0.5, "source": "flag"} and config["seed"]["value"] == 1

    head, *lines = cells(runs / "table.md")
    assert [line[0] for line in lines] == ["bridge", "bridge+ivr", eil]
    for line, folder, suffix in zip(lines, folders, ("", "_ivr_val", "")):
        files = [results(runs / folder.format(seed), f"results_last_test{suffix}.json") for seed in (0, 1)]
        metrics = [flat(file["metrics"]) for file in files]
        row = csv_rows(runs / "table.csv")[line[0]]
        for key in ("v2_mean", "v2_at_val", "gt_known_loc", "gt_known_loc_largest", "pxap"):
            values = [m[key] for m in metrics]
            text = f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"
            assert line[head.index(experiments.METRICS[key])] == text
            assert float(row[f"{key}_mean"]) == pytest.approx(statistics.mean(values))
        assert row["seeds"] == "0 1" and float(row["images_per_second_mean"]) > 0

    # Again: nothing is run. Without its results, a run is resumed. With more epochs, all are.
    before = (runs / "table.csv").read_bytes()
    reproduce(flags)
    assert ".py" not in capsys.readouterr().out and (runs / "table.csv").read_bytes() == before
    (runs / "bridge_seed1" / "results_last_test.json").unlink()
    reproduce(flags)
    assert capsys.readouterr().out.count(": train.py") == 1 and (runs / "table.csv").read_bytes() == before
    reproduce(flags.replace(eil, "").replace("0 1", "0") + " --epochs 3")
    assert results(runs / "bridge_seed0", "results_last_test_ivr_val.json")["epoch"] == 3
    fails("reproduce", flags, runs / "bridge_seed0", "epochs 3 instead of 2", "--runs")


def test_rows_that_differ_in_the_map_share_a_run(tiny, tmp_path, capsys, in_process):
    runs, maps = tmp_path / "runs", ("joint", "location")
    run("train", f"{tiny} --method calm --epochs 1 --out {runs}/calm_seed0")
    rows = "calm:calm_map=joint calm:calm_map=location"
    reproduce(f"compare --methods {rows} --seeds 0 --runs {runs} {tiny} --epochs 1")
    assert "train.py" not in capsys.readouterr().out
    for line, name in zip(cells(runs / "table.md")[1:], maps):
        result = results(runs / "calm_seed0", f"results_last_test_calm_map={name}.json")
        assert result["calm_map"] == name and line[1] == f"{result['metrics']['max_box_acc_v2']['mean']:.1f}"


def test_all_mistakes_are_reported_before_the_first_run(tiny, fails, tmp_path, monkeypatch):
    for flags, *words in (
        ("compare --methods cam bridge:p=0,", "--methods bridge:p=0,"),
        ("compare --methods cam bridge:seed=5", "seed is not a value of a row"),
        ("compare --methods cam cam:lambda_sim=5", "--lambda-sim", "--method cam"),
        ("compare --seed 3", "--seed", "--seeds"),
        (f"compare --lists {tmp_path}/nowhere", tmp_path / "nowhere"),
        ("sweep --param lambda_sim", "--values"),
        ("sweep --param lambda_sim --values 1 --lambda-sim 2", "lambda_sim", "flag"),
        ("sweep --param arch --values 1", "--param arch", "lambda_norm"),
        ("sweep --param p --values 0.5 1.5", "--drop-p 1.5", "[0, 1]"),
    ):
        command, _, rest = flags.partition(" ")
        fails("reproduce", f"{command} --runs {tmp_path}/runs {tiny} {rest}", *words)
    monkeypatch.setattr(experiments, "SCRIPTS", tmp_path)  # as where the package is installed from a wheel
    fails("reproduce", "compare --methods nothing", tmp_path, "train.py", "clone")
    assert not (tmp_path / "runs").exists()


def test_a_row_can_set_two_decays():
    row = experiments.row_of("cam:decay_at=6,9,lr=0.5")
    assert row.values == {"decay_at": "6,9", "lr": "0.5"}
    for flags in ("--decay-at=6,9", "--decay-at 6 9"):
        assert parse_args(flags.split(), "").given == {"decay_at": [6, 9]}


def test_a_run_of_another_configuration_is_refused(compared, fails, capsys):
    flags, runs, source = compared
    changed(source, runs / "bridge_seed1", seed=1, val_every=3, amp="bf16", workers=2, data_root="elsewhere")
    flags = flags.replace("--seeds 0", "--seeds 1")  # --amp off is one of the flags
    fails("reproduce", flags, runs / "bridge_seed1", "amp bf16 instead of off")
    flags = flags.replace("--amp off", "")
    reproduce(flags)  # what can change on --resume may differ where it is not asked for
    fails("reproduce", f"{flags} --val-every 2", "val_every 3 instead of 2", "--runs")
    fails("reproduce", f"{flags} --drop-p 0.25", "p 0.5 instead of 0.25")
    assert ".py" not in capsys.readouterr().out


def test_runs_with_other_lists_are_refused(compared, fails, tmp_path):
    flags, runs, source = compared
    other = changed(source, runs / "bridge_seed1", seed=1)
    config = results(other, "config.json")
    config["fingerprint"]["val"] = {"images": "another", "boxes": None}
    (other / "config.json").write_text(json.dumps(config))
    without = flags.replace(f"--lists {tmp_path}/lists", "").replace("--seeds 0", "--seeds 0 1")
    fails("reproduce", without, other, "val list", "bridge_seed0")
    for path in (tmp_path / "lists" / "tiny" / "test").glob("*.txt"):  # the last image is gone
        path.write_text("".join(f"{x}\n" for x in path.read_text().splitlines() if "test/08" not in x))
    fails("reproduce", flags, runs / "bridge_seed0", "test list", "--lists")
    fails("reproduce", flags.replace("--seeds 0", "--seeds 0 2"), runs / "bridge_seed0", "test list")


@pytest.mark.parametrize("code, word", [(2, "ended with exit code 2"), (130, "was interrupted")])
def test_a_script_that_fails_ends_the_comparison(tiny, fails, monkeypatch, tmp_path, code, word):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho $* >> {tmp_path}/started\nexit {code}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    flags = f"compare --methods cam --seeds 7 8 --runs {tmp_path}/runs {tiny}"
    fails("reproduce", flags, tmp_path / "runs" / "cam_seed7", word, "--method=cam --seed=7")
    (started,) = (tmp_path / "started").read_text().splitlines()
    assert started.startswith(str(REPOSITORY / "train.py")) and "--seed=7" in started


def test_a_sweep_has_means_and_deviations_over_seeds(trained, tmp_path, capsys):
    flags, source = trained
    runs = tmp_path / "runs"
    for seed in (0, 1):  # the preset's value has the run of a comparison
        for number, row in ((0.5, "bridge"), (1.0, "bridge_lambda_sim=1")):
            metrics = {"gt_known_loc": 10 * number + 20 * seed}
            changed(source, runs / f"{row}_seed{seed}", metrics=metrics, seed=seed, lambda_sim=number)
    reproduce(f"sweep --param lambda-sim --values 1 0.5 --seeds 0 1 --runs {runs} {flags}")
    assert ".py" not in capsys.readouterr().out
    assert (runs / "sweep_lambda_sim.png").exists() == figures.has_matplotlib()
    table = [line[:2] for line in cells(runs / "sweep_lambda_sim.md")[1:]]
    assert table == [["0.5 (preset)", "15.00 ± 14.14"], ["1", "20.00 ± 14.14"]]  # deviation: 20 / sqrt(2)
    found = read_sweep(runs / "sweep_lambda_sim.json")
    assert [row["gt_known_loc"] for row in found["values"]] == [[5, 25], [10, 30]]
    assert (found["preset"], found["metric"], found["values"][0]["seeds"]) == (0.5, "gt_known_loc", [0, 1])


def test_a_sweep_trains_an_integer_that_is_missing(trained, tmp_path, capsys, in_process):
    flags, source = trained
    runs = tmp_path / "runs"
    changed(source, runs / "bridge_warm_epochs=2_seed3", seed=3, warm_epochs=2)
    flags = f"--runs {runs} --seed 3 --checkpoint last " + flags.replace("--warm-epochs 1", "")
    reproduce(f"sweep --param warm_epochs --values 0 2 {flags}")
    printed = capsys.readouterr().out
    assert "bridge_warm_epochs=0_seed3: train.py" in printed and printed.count(": train.py") == 1
    found = read_sweep(runs / "sweep_warm_epochs.json")
    assert [row["value"] for row in found["values"]] == [0, 2]
    assert found["checkpoint"] == "last" and found["preset"] == 20  # CUB's


def test_a_sweep_without_boxes_measures_pxap(trained, tmp_path):
    flags, source = trained
    none = dict.fromkeys(("gt_known_loc", "max_box_acc_v2", "max_box_acc_v2_at_val_threshold"))
    changed(source, tmp_path / "runs" / "bridge_seed0", metrics=none | {"pxap": 40.0})
    reproduce(f"sweep --param p --values 0.5 --runs {tmp_path}/runs {flags}")
    (row,) = results(tmp_path / "runs", "sweep_p.json")["values"]
    assert row["pxap"] == [40.0] and "gt_known_loc" not in row


def test_a_file_that_is_no_sweep_is_refused(tmp_path):
    good = (REPOSITORY / "docs/results/CUB10_sweeps/sweep_lambda_sim.json").read_text()
    for change in ({"values": []}, {"preset": float("nan")}, {"gt_known_loc": [1.0, 2.0]}):
        content = json.loads(good)
        content["values"][0] |= change  # such as one value with more seeds than the others
        (tmp_path / "sweep.json").write_text(json.dumps(content | change))
        with pytest.raises(InputError, match="sweep.json.*reproduce sweep"):
            read_sweep(tmp_path / "sweep.json")


def test_tables_are_means_over_the_runs_of_a_configuration(trained, tmp_path):
    _, source = trained
    numbers = {("bridge", 0.8): (50, 60, 70), ("cam", 0.8): (55.125,), ("cam", 0.5): (20, 30)}
    runs = [
        changed(source, tmp_path / f"{method}{gamma}{seed}", v2, method=method, gamma=gamma, seed=seed)
        for (method, gamma), values in numbers.items()
        for seed, v2 in enumerate(values)
    ]
    reproduce(f"table {' '.join(map(str, runs))} --out {tmp_path}/t.md")
    # Sample deviations: of 50, 60, 70: 10; of 20, 30: root of 50.
    expected = {"bridge": "60.00 ± 10.00", "cam (gamma 0.8)": "55.12", "cam (gamma 0.5)": "25.00 ± 7.07"}
    lines = cells(tmp_path / "t.md")
    assert [line[0] for line in lines] == ["", *expected] * 3  # localization, MaxBoxAccV2, PxAP
    assert {line[0]: line[lines[4].index("MaxBoxAccV2")] for line in lines[5:8]} == expected
    rows = csv_rows(tmp_path / "t.csv")
    assert float(rows["cam (gamma 0.5)"]["v2_mean_deviation"]) == pytest.approx(50**0.5)
    assert rows["cam (gamma 0.8)"]["v2_mean_deviation"] == "" and rows["bridge"]["seeds"] == "0 1 2"


def test_what_keeps_runs_apart(trained, tmp_path):
    """A value that can change results does, others do not; so do names, and data sets."""
    _, source = trained
    slower = changed(source, tmp_path / "slower", seed=2, val_every=4)
    other = changed(source, tmp_path / "other", seed=1, workers=4, data_root="elsewhere")
    reproduce(f"table {source} {slower} {other} --out {tmp_path}/t")
    rows = csv_rows(tmp_path / "t.csv")
    seeds = {label: row["seeds"] for label, row in rows.items()}
    assert seeds == {"bridge (val_every 1)": "0 1", "bridge (val_every 4)": "2"}
    reproduce(f"table {source} {other} --names 'a|b' B --out {tmp_path}/t")
    assert csv_rows(tmp_path / "t.csv").keys() == {"a|b", "B"}
    larger = changed(source, tmp_path / "larger", 12.0, dataset="OpenImages", arch="resnet50")
    reproduce(f"table {source} {larger} --out {tmp_path}/t")
    lines = cells(tmp_path / "t.md")
    assert dict(zip(lines[2], lines[3]))["OpenImages ResNet50 MaxBoxAccV2"] == "12.00"


def test_results_files_share_a_row_if_they_differ_in_the_seed_alone(trained, tmp_path, fails):
    _, source = trained
    changes = {"ours_seed0": {}, "ours_seed1": {"seed": 1}, "x/ours_seed2": {"seed": 2, "split": "val"}}
    changes["maps"] = dict.fromkeys(("arch", "method", "checkpoint")) | {"score_maps": "maps"}
    files = [tmp_path / f"{name}.json" for name in changes]
    for file, change, v2 in zip(files, changes.values(), (50.0, 60.0, 70.0, 12.0)):
        result = results(source) | change
        result["metrics"]["max_box_acc_v2"]["mean"] = v2
        if "score_maps" in change:
            del result["seed"]
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(result))
    reproduce(f"table {' '.join(map(str, files))} --digits 1 --out {tmp_path}/t")
    rows = csv_rows(tmp_path / "t.csv")
    found = {label: (row["seeds"], float(row["v2_mean_mean"])) for label, row in rows.items()}
    ours = {"ours (split test)": ("0 1", 55.0), "ours (split val)": ("2", 70.0)}
    assert found == ours | {"maps": ("0", 12.0)}
    for file in (files[0], files[3]):
        fails("reproduce", f"table {file} {file} --out {tmp_path}/t", file, "same run")


def test_the_committed_results_are_readable(tmp_path):
    files = sorted((REPOSITORY / "docs/results/CUB10").glob("*.json"))
    reproduce(f"table {' '.join(map(str, files))} --out {tmp_path}/t")
    metrics = [results(files[0].parent, f"bridge_seed{seed}.json")["metrics"] for seed in (0, 1, 2)]
    v2, rows = [m["max_box_acc_v2"]["mean"] for m in metrics], csv_rows(tmp_path / "t.csv")
    assert rows["bridge"]["seeds"] == "0 1 2" and rows["bridge"]["arch"] == "vgg16"
    assert float(rows["bridge"]["v2_mean_mean"]) == pytest.approx(statistics.mean(v2))
    assert float(rows["bridge"]["v2_mean_deviation"]) == pytest.approx(statistics.stdev(v2))
    assert rows.keys() == {file.stem.partition("_seed")[0] for file in files}


# ---- differences of results files made by hand
def test_difference_by_hand(tmp_path, capsys):
    """Five images with boxes, one without. Both find 0; A alone 1; B alone 2, and 3 with one of two seeds."""
    boxed = [1, 1, 1, 1, 1, 0]
    split = split_of(6, {i: np.array([[0, 0, 9, 9]]) for i in range(5)})
    write_results(tmp_path / "a.json", correct_at(1, 1, 0, 0, 0, 0, boxed=boxed), split)
    for seed, row in enumerate([(1, 0, 1, 1, 0, 0), (1, 0, 1, 0, 0, 0)]):
        write_results(tmp_path / f"b{seed}.json", correct_at(*row, boxed=boxed), split, seed=seed)
    a, b, out = f"{tmp_path}/a.json", f"{tmp_path}/b0.json {tmp_path}/b1.json", f"--out {tmp_path}/d"
    reproduce(f"difference {a} {b} --names a b b {out}")
    found, printed = results(tmp_path, "d.json"), capsys.readouterr().out
    # A: 2 of 5. B: 3 and 2 of 5.
    v2 = found["metrics"]["v2_mean"]
    assert [v2[key]["value"] for key in ("a", "b", "difference")] == pytest.approx([40, 50, 10])
    assert found["only"] == {"a": 1, "b": 1.5} and "top1_cls" not in found["metrics"]
    assert found["a"]["name"] == "a" and len(found["b"]["results"]) == 2
    low, high = v2["difference"]["interval"]
    assert low < 0 < 10 < high and "contains 0" in printed
    # The other way round, all signs change.
    reproduce(f"difference {b} {a} --names b b a {out}")
    back = results(tmp_path, "d.json")["metrics"]["v2_mean"]["difference"]
    assert back["value"] == pytest.approx(-10) and back["interval"] == pytest.approx([-high, -low])


def test_a_difference_whose_interval_excludes_0_and_none_at_all(tmp_path, capsys):
    write_results(tmp_path / "a.json", correct_at(*[1] * 10, *[0] * 30), split_of(40))
    write_results(tmp_path / "b.json", correct_at(*[1] * 35, *[0] * 5), split_of(40))
    found = []
    for b in "ba":
        reproduce(f"difference {tmp_path}/a.json {tmp_path}/{b}.json --names a b --out {tmp_path}/d")
        found.append(results(tmp_path, "d.json")["metrics"]["v2_mean"]["difference"])
        assert f"{'excludes' if b == 'b' else 'contains'} 0" in capsys.readouterr().out
    assert found[0]["value"] == pytest.approx(62.5) and found[0]["interval"][0] > 0
    assert found[1] == {"value": 0, "interval": [0, 0]}


def test_tables_have_the_interval_of_the_seeds_mean(tmp_path):
    sides = [correct_at(*np.random.default_rng(seed).random(20) < 0.5) for seed in range(2)]
    for seed, per_image in enumerate(sides):
        write_results(tmp_path / f"r_seed{seed}.json", per_image, split_of(20), seed=seed)
    low, high = intervals(sides, split_of(20).digest())["max_box_acc_v2"]["mean"]
    command = f"table {tmp_path}/r_seed0.json {tmp_path}/r_seed1.json --out {tmp_path}/t"
    reproduce(command)
    text = (tmp_path / "t.md").read_text()
    assert "| MaxBoxAccV2, 95 % over images |" in text and f"| [{low:.1f}, {high:.1f}] |" in text
    (tmp_path / "r_seed1.npz").unlink()
    reproduce(command)
    assert "over images" not in (tmp_path / "t.md").read_text()
    write_results(tmp_path / "r_seed1.json", sides[1], split_of(20, sizes=(64, 64)), seed=1)
    with pytest.raises(InputError, match="r_seed1.json: other images, .* is 0.jpg"):
        reproduce(command)


def test_difference_of_two_runs(trained, tmp_path, fails, monkeypatch):
    monkeypatch.setattr(metrics, "RESAMPLES", 50)
    flags, folder = trained
    run("evaluate", f"{folder} --save-maps {tmp_path}/maps --device cpu")
    run("train", f"{flags} --out {tmp_path}/cam --method cam")
    reproduce(f"difference {tmp_path}/cam {folder} --out {tmp_path}/d")
    found = results(tmp_path, "d.json")["metrics"]
    assert found.keys() == METRICS.keys()
    for key, entry in found.items():
        for side, run_of in (("a", tmp_path / "cam"), ("b", folder)):
            assert entry[side]["value"] == flat(results(run_of)["metrics"])[key]
            assert entry[side]["interval"] == flat(results(run_of)["intervals"])[key]
        assert entry["difference"]["value"] == pytest.approx(entry["b"]["value"] - entry["a"]["value"])
    # Score maps of the run, evaluated as files, hit the same.
    out, lists = tmp_path / "maps.json", f"--data-root {tmp_path}/data --lists {tmp_path}/lists"
    of_maps = f"--score-maps {tmp_path}/maps --dataset tiny --image-size 64 --workers 0 {lists} --out {out}"
    run("evaluate", of_maps)
    reproduce(f"difference {folder} {out} --out {tmp_path}/d")
    same = results(tmp_path, "d.json")
    assert same["metrics"]["v2_mean"]["difference"] == {"value": 0, "interval": [0, 0]}
    assert same["only"] == {"a": 0, "b": 0} and "top1_cls" not in same["metrics"]
    for runs, word in ((f"{folder} {folder}", "the same run"), (f"{folder} {tmp_path}/cam {out}", "3 sides")):
        fails("reproduce", f"difference {runs}", word)
    # Other boxes; results of another evaluation; none.
    move_a_box(tmp_path)
    run("evaluate", of_maps)
    fails("reproduce", f"difference {folder} {out}", "maps.json", "test/03.png")
    (tmp_path / "maps.npz").write_bytes((folder / "results_last_test.npz").read_bytes())
    fails("reproduce", f"difference {folder} {out}", "maps.npz", "not of the evaluation")
    (folder / "results_best_test.npz").unlink()
    fails("reproduce", f"difference {folder} {tmp_path}/cam", "no such file")


def test_a_damaged_file_per_image_is_refused_or_read_whole(trained):
    folder, rng = trained[1], np.random.default_rng(0)
    path, json_path = folder / "results_best_test.npz", folder / "results_best_test.json"
    whole, ids = path.read_bytes(), load_per_image(json_path, results(folder)["metrics"]).ids
    for _ in range(40):
        damaged = bytearray(whole[: rng.integers(1, len(whole))] if rng.random() < 0.3 else whole)
        damaged[rng.integers(len(damaged))] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            assert load_per_image(json_path, results(folder)["metrics"]).ids == ids
        except InputError as error:
            assert "evaluate again" in str(error)


def test_masks_without_an_object_have_neither_metric_nor_interval(tmp_path):
    pixels = np.zeros((3, 2, 1002), dtype=np.int32)
    pixels[:, 1, 5] = 9
    per_image = replace(correct_at(1, 0, 1), masked=np.ones(3, dtype=bool), pixels=pixels)
    write_results(tmp_path / "a.json", per_image, split_of(3))
    reproduce(f"difference {tmp_path}/a.json {tmp_path}/a.json --names a b --out {tmp_path}/d")
    assert "pxap" not in results(tmp_path, "d.json")["metrics"]
    assert intervals([per_image], "0123456789abcdef")["pxap"] is None


def test_a_table_needs_the_same_images(trained, tmp_path, fails):
    """Rows of other test images or boxes are refused, by the fingerprint, without it by their number."""
    flags, folder = trained
    move_a_box(tmp_path)
    run("train", f"{flags} --method cam --epochs 1 --out {tmp_path}/cam")
    fails("reproduce", f"table {folder} {tmp_path}/cam", "cam", "9 test images", "same images")
    for n, name in ((9, "a"), (8, "b")):
        write_results(tmp_path / f"{name}.json", correct_at(*[1] * n), split_of(n))
    fails("reproduce", f"table {tmp_path}/a.json {tmp_path}/b.json", "b.json: has 8 test images")
