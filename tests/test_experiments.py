"""Many runs: which are trained, which are skipped, how jobs share the machine; tables against the numbers."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY

import evaluate
import train
from bridge_wsol import experiments
from bridge_wsol.methods import METHODS
from bridge_wsol.utils import InputError, Stopped


def read_json(path):
    return json.loads(path.read_text())


def run(*arguments):
    experiments.main([str(argument) for argument in arguments])


def cells(markdown):
    """The rows of the Markdown tables in a text, head first, as lists of cells."""
    lines = [line for line in markdown.splitlines() if line.startswith("|") and not line.startswith("| ---")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.fixture
def in_this_process(monkeypatch):
    """The scripts run here, where the tiny preset is; the list of what was called."""
    calls = []

    def run_script(script, arguments, folder, slot):
        calls.append((script, *arguments))
        {"train.py": train, "evaluate.py": evaluate}[script].main(arguments)

    monkeypatch.setattr(experiments, "run_script", run_script)
    return calls


def trained_folders(calls):
    out = [
        next(word for word in call if word.startswith("--out=")) for call in calls if call[0] == "train.py"
    ]
    return [Path(word).name for word in out]


def changed(source, folder, metrics=(), **config):
    """A copy of a run with other values in config.json and in "metrics" of the results on test."""
    shutil.copytree(source, folder)
    values = read_json(folder / "config.json")
    for name, value in config.items():
        values["config"][name]["value"] = value
    (folder / "config.json").write_text(json.dumps(values))
    for path in folder.glob("results_*_test.json"):
        result = read_json(path)
        result |= {name: value for name, value in config.items() if name in result}
        for name, value in dict(metrics).items():
            if name == "v2_mean":
                result["metrics"]["max_box_acc_v2"]["mean"] = value
            else:
                result["metrics"][name] = value
        path.write_text(json.dumps(result))
    return folder


# ------------------------------------------------------------------------------------------------- comparison


def test_the_comparison_trains_what_is_missing_and_tabulates_what_was_measured(
    tiny, in_this_process, tmp_path, capsys, fails
):
    runs, calls = tmp_path / "runs", in_this_process
    ablated = "eil:eil_gamma=0.5,eil_lambda=2"
    arguments = ["compare", "--methods", "cam", "cam+ivr", ablated, "--runs", runs, *tiny]
    run(*arguments, "--seeds", 0)
    assert [call[0] for call in calls] == ["train.py", "evaluate.py", "train.py"]

    calls.clear()
    interrupted = runs / "eil_eil_gamma=0.5_eil_lambda=2_seed0"  # as after one epoch of two
    assert read_json(interrupted / "config.json")["config"]["eil_gamma"] == {"value": 0.5, "source": "flag"}
    shutil.rmtree(interrupted)
    values = ["--eil-gamma", "0.5", "--eil-lambda", "2", "--epochs", "1"]
    train.main([*tiny, "--method", "eil", *values, "--out", str(interrupted)])
    for path in interrupted.glob("results_*"):
        path.unlink()
    capsys.readouterr()
    run(*arguments, "--seeds", 0, 1)
    assert trained_folders(calls) == [interrupted.name, "cam_seed1", f"{interrupted.name[:-1]}1"]

    table, printed = (runs / "table.md").read_text(), capsys.readouterr().out
    assert table in printed and printed.count("resumed after epoch 1") == 1
    assert "1 of 4 runs are finished" in printed and str(runs / "table.csv") in printed
    assert table.startswith("tiny VGG16, test, last checkpoint, %; mean ± standard deviation over 2 seeds\n")
    lines = cells(table)
    assert [line[0] for line in lines] == ["method", "cam", "cam+ivr", ablated]
    with (runs / "table.csv").open(newline="") as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    latex = (runs / "table.tex").read_text().splitlines()
    of_row = "cam_seed{}/results_last_test", "cam_seed{}/results_last_test_ivr_val"
    of_row += (f"{interrupted.name[:-1]}{{}}/results_last_test",)
    for line, file in zip(lines[1:], of_row):
        metrics = [read_json(runs / f"{file.format(seed)}.json")["metrics"] for seed in (0, 1)]
        at_val = [m["max_box_acc_v2_at_val_threshold"]["mean"] for m in metrics]
        expected = {
            "MaxBoxAccV2": [m["max_box_acc_v2"]["mean"] for m in metrics],
            "IoU 70": [m["max_box_acc_v2"]["70"] for m in metrics],
            "GT-known Loc (largest contour)": [m["max_box_acc"] for m in metrics],
            "Top-1 Loc": [m["top1_loc"] for m in metrics],
            "MaxBoxAccV2 at val's thresholds": at_val,
            "Top-1 cls": [m["top1_cls"] for m in metrics],
            "PxAP": [m["pxap"] for m in metrics],
        }
        in_latex = next(x for x in latex if x.startswith(line[0].replace("_", r"\_") + " & "))
        for heading, (a, b) in expected.items():
            deviation = (2 * ((a - (a + b) / 2) ** 2)) ** 0.5  # over n - 1 = 1
            assert line[lines[0].index(heading)] == f"{(a + b) / 2:.1f} ± {deviation:.1f}"
            assert f"${(a + b) / 2:.1f} \\pm {deviation:.1f}$" in in_latex
        assert rows[line[0]]["seeds"] == "0 1" and float(rows[line[0]]["v2_at_val_mean"]) == sum(at_val) / 2
        assert lines[0][-1] == "images/s" and float(line[-1].split(" ± ")[0]) > 0

    other = [*arguments, "--seeds", "0", "--lr", "0.1"]
    fails(experiments.main, other, runs / "cam_seed0", "lr 0.004", "0.1", "--runs")
    longer = [*arguments, "--seeds", "0", "--epochs", "1"]
    fails(experiments.main, longer, runs / "cam_seed0", "2 epochs instead of 1", "--runs")


def test_rows(fails, monkeypatch):
    for name in ("cam+sum", "bridge:", "bridge:lambda_sim", "bridge:p=0,", "+ivr"):
        fails(experiments.main, ["compare", "--methods", name], f"--methods {name}")
    monkeypatch.setitem(METHODS, "bridge+more", METHODS["bridge"])
    everything = experiments.row_of("bridge+more:lambda_sim=0,p=0.25+ivr")
    flags = ["--lambda-sim=0", "--p=0.25"]
    assert everything == ("bridge+more", flags, {}, "ivr", "bridge+more_lambda_sim=0_p=0.25")
    of_map = experiments.row_of("pas:pas_nwc=off,pas_theta=-1")
    assert of_map == ("pas", ["--pas-theta=-1"], {"pas_nwc": "off"}, "minmax", "pas_pas_theta=-1")
    monkeypatch.undo()
    cells_of_has = experiments.row_of("has:has_cells=16,32,has_p=0.4").flags
    assert cells_of_has == ["--has-cells=16,32", "--has-p=0.4"]
    for key in ("seed", "method", "dataset"):
        row = f"bridge:{key}=5"
        fails(experiments.main, ["compare", "--methods", row], f"--methods {row}", f"{key} is not a value")
    fails(experiments.main, ["compare", "--methods", "cam:lambda_sim=5"], "--lambda-sim", "--method cam")
    fails(experiments.main, ["compare", "--method", "cam"], "--method", "--methods")
    rows = {experiments.row_of(row)[0] for row in experiments.ROWS}
    assert rows == METHODS.keys() - {"bridge+cutmix"}


def test_rows_that_differ_in_the_map_share_a_run(tiny, in_this_process, tmp_path):
    maps = {"joint": "", "location": "", "location+log": "_log"}
    rows, runs = [f"calm:calm_map={name}" for name in maps], tmp_path / "runs"
    arguments = ["compare", "--methods", *rows, "--seeds", 0, "--runs", runs, *tiny]
    run(*arguments)
    assert [call[0] for call in in_this_process] == ["train.py", *["evaluate.py"] * 3]
    table = {line[0]: line for line in cells((runs / "table.md").read_text())}
    for row, (name, normalization) in zip(rows, maps.items()):
        value = name.removesuffix("+log")
        path = runs / f"calm_seed0/results_last_test{normalization}_calm_map={value}.json"
        result = read_json(path)
        assert result["calm_map"] == value and result["normalize"] == (normalization[1:] or "minmax")
        assert table[row][1] == f"{result['metrics']['max_box_acc_v2']['mean']:.1f}"
    in_this_process.clear()
    run(*arguments)
    assert in_this_process == []


def test_all_mistakes_are_reported_before_the_first_run(tiny, in_this_process, fails, tmp_path):
    base = ["compare", "--runs", tmp_path / "r", "--methods", "cam", "bridge", *tiny]
    fails(experiments.main, [*base, "--pas-nwc", "off"], "--pas-nwc", "--method cam")
    fails(experiments.main, [*base, "--methods", "cam", "pas:pas_theta=7"], "--pas-theta 7")
    fails(experiments.main, [*base, "--methods", "cam", "calm:calm_map=7"], "--calm-map 7", "joint")
    fails(experiments.main, [*base, "--methods", "cam", "bridge:p=2"], "--p 2")
    fails(experiments.main, [*base, "--seeds", 1, 1], "--seeds 1 1", "once")
    fails(experiments.main, [*base, "--jobs", 0], "--jobs 0")
    fails(experiments.main, [*base, "--splits", tmp_path / "nowhere"], tmp_path / "nowhere")
    fails(experiments.main, [], "command")
    assert not in_this_process and not (tmp_path / "r").exists()


def test_a_run_with_more_epochs_than_its_results_is_not_finished(trained, in_this_process, fails, tmp_path):
    """As after an interruption in the evaluation on test of a longer run."""
    flags, source = trained
    folder = changed(source, tmp_path / "runs" / "bridge_seed0")
    log = (folder / "log.jsonl").read_text().splitlines()
    (folder / "log.jsonl").write_text("\n".join([*log, log[-1].replace('"epoch": 2', '"epoch": 3')]))
    asked = ["compare", "--methods", "bridge", "--seeds", 0, "--runs", tmp_path / "runs", *flags]
    fails(experiments.main, asked, folder, "3 epochs instead of 2", "--runs")
    run(*asked, "--epochs", 3)
    assert trained_folders(in_this_process) == [folder.name]
    (folder / "log.jsonl").write_text("{}")
    fails(experiments.main, [*asked, "--epochs", 3], folder / "log.jsonl", "epoch")


def test_a_run_from_before_a_flag_has_the_flag_s_default(trained, in_this_process, tmp_path):
    flags, source = trained
    folder = changed(source, tmp_path / "runs" / "bridge_seed0")
    values = read_json(folder / "config.json")
    del values["config"]["frozen_blocks"]
    (folder / "config.json").write_text(json.dumps(values))
    newer = changed(source, tmp_path / "bridge_seed1", seed=1)
    asked = ["compare", "--methods", "bridge", "--seeds", 0, "--runs", tmp_path / "runs", *flags]
    run(*asked)
    assert not in_this_process
    run("table", folder, newer, "--out", tmp_path / "t")
    assert "over 2 seeds" in (tmp_path / "t.md").read_text()


@pytest.mark.parametrize("flags", [("--amp", "bf16"), ("--val-every", "2")])
def test_a_run_with_another_value_that_was_asked_for_is_refused(
    trained, in_this_process, fails, tmp_path, flags
):
    """Without the flag the value may differ: it can change on --resume."""
    all_flags, source = trained
    folder = changed(source, tmp_path / "runs" / "bridge_seed0", val_every=3, amp="off")
    asked = ["compare", "--methods", "bridge", "--seeds", 0, "--runs", tmp_path / "runs", *all_flags]
    run(*asked)
    name = flags[0][2:].replace("-", "_")
    fails(experiments.main, [*asked, *flags], folder, f"a run with {name}", flags[1])


def test_a_finished_run_is_of_the_test_list_of_splits(trained, in_this_process, fails, tmp_path):
    flags, source = trained
    changed(source, tmp_path / "runs" / "bridge_seed0")
    asked = ["compare", "--methods", "bridge", "--seeds", 0, "--runs", tmp_path / "runs", *flags]
    run(*asked)
    ids = tmp_path / "splits" / "tiny" / "test"
    for path in ids.glob("*.txt"):  # the last image is gone
        path.write_text("".join(f"{x}\n" for x in path.read_text().splitlines() if "test/08" not in x))
    fails(experiments.main, asked, "bridge_seed0", "another test list", "--splits")
    assert not in_this_process


def test_another_normalization_is_evaluated_again_after_more_epochs(trained, in_this_process, tmp_path):
    flags, source = trained
    folder = changed(source, tmp_path / "runs" / "bridge_seed0")
    asked = ["compare", "--methods", "bridge+ivr", "--seeds", 0, "--runs", tmp_path / "runs", *flags]
    for epochs in (2, 2, 3):
        run(*asked, "--epochs", epochs)
        assert read_json(folder / "results_last_test_ivr_val.json")["epoch"] == epochs
    assert [call[0] for call in in_this_process] == ["evaluate.py", "train.py", "evaluate.py"]


# ------------------------------------------------------------------------------------------------------- jobs


def test_jobs_are_done_at_the_same_time_and_a_run_by_one_of_them(trained, tmp_path, monkeypatch):
    flags, source = trained
    runs = tmp_path / "runs"
    for seed in (0, 1):
        changed(source, runs / f"bridge_seed{seed}", seed=seed)
        changed(source, runs / f"bridge_p=0.25_seed{seed}", seed=seed, p=0.25)
    together, order, finish = threading.Barrier(2), [], experiments.finish

    def finish_together(of, checkpoint, slot):
        together.wait(timeout=30)  # fails where less than two runs are under way
        order.append((of.folder.name, [row.normalization for row in of.rows], slot.log))
        finish(of, checkpoint, slot)

    monkeypatch.setattr(experiments, "finish", finish_together)
    monkeypatch.setattr(
        experiments, "results_path", lambda folder, which, _: folder / f"results_{which}_test.json"
    )
    rows = ["bridge", "bridge:p=0.25", "bridge+ivr"]
    run("compare", "--methods", *rows, "--seeds", 0, 1, "--runs", runs, "--jobs", 2, *flags)
    first, second = ("bridge", ["minmax", "ivr"], True), ("bridge_p=0.25", ["minmax"], True)
    expected = [(f"{name}_seed{seed}", *rest) for seed in (0, 1) for name, *rest in (first, second)]
    assert sorted(order[:2]) == sorted(expected[:2]) and sorted(order[2:]) == sorted(expected[2:])
    assert [line[0] for line in cells((runs / "table.md").read_text())[1:]] == rows


def test_jobs_share_the_machine(monkeypatch):
    stop = threading.Event()
    monkeypatch.setattr(experiments.os, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(experiments.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(experiments.torch.cuda, "device_count", lambda: 2)
    found = experiments.slots(3, stop, False)
    assert [slot.device for slot in found] == [["--device", f"cuda:{i}"] for i in (0, 1, 0)]
    assert {slot.environment["OMP_NUM_THREADS"] for slot in found} == {"2"}
    assert [slot.device for slot in experiments.slots(3, stop, True)] == [[]] * 3
    assert experiments.slots(1, stop, False) == [([], dict(os.environ), False, stop)]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert experiments.slots(2, stop, False)[0].environment["OMP_NUM_THREADS"] == "5"
    monkeypatch.setattr(experiments.torch.cuda, "is_available", lambda: False)
    assert [slot.device for slot in experiments.slots(2, stop, False)] == [[]] * 2


@pytest.mark.skipif(not shutil.which("false"), reason="no program here that only fails")
def test_a_script_that_fails_ends_the_comparison(tiny, fails, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    arguments = ["compare", "--methods", "cam", "--seeds", "7", "--epochs", "1", "--runs", tmp_path, *tiny]
    words = "train.py ended with exit code 1", "--method=cam --seed=7", "--epochs 1", tmp_path / "cam_seed7"
    fails(experiments.main, arguments, *words)


PROGRAM = """
import pathlib, signal, sys, time
folder = pathlib.Path(next(word for word in sys.argv if word.startswith("--out="))[6:])
if "seed1" in folder.name:
    while not folder.with_name("cam_seed0.begun").exists():
        time.sleep(0.05)
    print("broken")
    sys.exit(3)
def save(*_):
    folder.with_name(folder.name + ".saved").touch()
    sys.exit(130)
signal.signal(signal.SIGTERM, save)
folder.with_name(folder.name + ".begun").touch()
time.sleep(60)
"""


def test_the_first_failure_stops_the_jobs_beside_it_and_starts_no_other(tiny, fails, tmp_path, monkeypatch):
    program, runs = tmp_path / "train.py", tmp_path / "runs"
    program.write_text(PROGRAM)
    monkeypatch.setattr(experiments, "script_path", lambda script: program)
    arguments = ["compare", "--methods", "cam", "--seeds", 0, 1, 2, "--jobs", 2, "--runs", runs, *tiny]
    started = time.monotonic()
    fails(experiments.main, arguments, "cam_seed1: ", "exit code 3", runs / "cam_seed1.log")
    assert time.monotonic() - started < 30
    names = {path.name for path in runs.iterdir()}
    assert names == {"cam_seed0.begun", "cam_seed0.saved", "cam_seed0.log", "cam_seed1.log"}
    assert (runs / "cam_seed1.log").read_text() == "broken\n"


def test_one_interrupted_job_leaves_the_others_time_to_save(tiny, tmp_path, monkeypatch):
    """Ctrl-C reaches all of them: no second signal, and no other run is started."""
    stops, order = [], []

    def finish(of, checkpoint, slot):
        order.append(of.seed)
        stops.append(slot.stop)
        raise Stopped("interrupted")

    monkeypatch.setattr(experiments, "finish", finish)
    with pytest.raises(Stopped):
        run("compare", "--methods", "cam", "--seeds", 0, 1, "--runs", tmp_path / "runs", *tiny)
    assert order == [0] and not stops[0].is_set()


def test_a_script_runs_in_a_process_of_its_own_and_its_failure_is_named(tmp_path, capfd, monkeypatch):
    program = tmp_path / "train.py"
    program.write_text("import sys; print(*sys.argv[1:]); sys.exit('broken' in sys.argv and 3)")
    monkeypatch.setattr(experiments, "script_path", lambda name: program)
    stop = threading.Event()
    (alone,), (beside, _) = experiments.slots(1, stop, True), experiments.slots(2, stop, True)
    experiments.run_script("train.py", ["--p", "0.5"], tmp_path / "x", alone)
    assert "--p 0.5\n" in capfd.readouterr().out
    for slot, where in ((alone, "above"), (beside, "x.log")):
        with pytest.raises(InputError, match=f"exit code 3, .*{where}.*same command again to resume"):
            experiments.run_script("train.py", ["broken"], tmp_path / "x", slot)
    assert (tmp_path / "x.log").read_text() == "broken\n"
    program.write_text("import sys; sys.exit(130)")
    with pytest.raises(Stopped, match="x: train.py was interrupted"):
        experiments.run_script("train.py", [], tmp_path / "x", alone)


def test_only_the_package(tiny, fails, tmp_path, monkeypatch):
    installed = tmp_path / "site-packages" / "bridge_wsol" / "experiments.py"
    monkeypatch.setattr(experiments, "__file__", str(installed))
    arguments = ["compare", "--methods", "cam", "--runs", tmp_path / "runs", *tiny]
    fails(experiments.main, arguments, tmp_path / "site-packages" / "train.py", "clone")


# ------------------------------------------------------------------------------------------------------ sweep


def test_sweep_does_what_is_missing_and_nothing_else(
    trained, in_this_process, fails, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    flags, source = trained
    runs, calls = tmp_path / "runs", in_this_process
    asked = ["sweep", "--param", "lambda-sim", "--values", "2", "0.5", "--runs", runs, *flags]
    done = runs / "bridge_seed0"
    shutil.copytree(source, done)  # the preset's value: the fixture's run is what the sweep would train
    run(*asked)
    printed = capsys.readouterr().out
    assert trained_folders(calls) == ["bridge_lambda_sim=2_seed0"] and "1 of 2 runs are finished" in printed
    assert f"python -m bridge_wsol.figures sweep {runs / 'sweep_lambda_sim.json'}\n" in printed
    found = read_json(runs / "sweep_lambda_sim.json")
    head = {"dataset": "tiny", "arch": "vgg16", "method": "bridge", "param": "lambda_sim", "preset": 0.5}
    entries = []
    for value in (0.5, 2.0):
        folder = done if value == 0.5 else runs / "bridge_lambda_sim=2_seed0"
        metrics = read_json(folder / "results_best_test.json")["metrics"]
        entries.append(
            {"value": value, "seeds": [0], **{k: [metrics[k]] for k in ("gt_known_loc", "top1_cls")}}
        )
    assert found == {**head, "checkpoint": "best", "values": entries}
    table = cells((runs / "sweep_lambda_sim.md").read_text())
    assert [line[0] for line in table] == ["lambda_sim", "0.5 (preset)", "2"]
    measured = [entry["gt_known_loc"][0] for entry in entries]
    assert [float(line[1]) for line in table[1:]] == pytest.approx(measured, abs=0.005)
    assert r"lambda\_sim & " in (runs / "sweep_lambda_sim.tex").read_text()
    with (runs / "sweep_lambda_sim.csv").open(newline="") as file:
        assert [float(row["gt_known_loc_mean"]) for row in csv.DictReader(file)] == measured

    # Again: nothing to train, and the same files.
    before = (runs / "sweep_lambda_sim.json").read_bytes()
    run(*asked)
    assert len(calls) == 1 and (runs / "sweep_lambda_sim.json").read_bytes() == before
    # An interrupted run is resumed, more epochs are trained in all runs.
    (done / "results_last_test.json").unlink()
    log = (done / "log.jsonl").read_text()
    run(*asked)
    assert trained_folders(calls[1:]) == [done.name] and (done / "log.jsonl").read_text() == log
    assert (done / "results_last_test.json").exists()
    run(*asked, "--epochs", 3)
    assert len(calls) == 4 and read_json(done / "results_last_test.json")["epoch"] == 3
    # Other runs in the folder are not taken for what was asked.
    fails(experiments.main, asked, "bridge_seed0", "3 epochs instead of 2", "--runs")
    other = [*asked, "--epochs", 3, "--lr", 0.5]
    fails(experiments.main, other, "lr 0.004 instead of 0.5", "--runs")
    # train.py's --p is not short for --param.
    fails(experiments.main, [*asked, "--epochs", 3, "--p", 0.4], "p 0.5 instead of 0.4")
    assert len(calls) == 4


def test_sweep_over_seeds_has_mean_and_deviation(trained, in_this_process, tmp_path):
    flags, source = trained
    runs = tmp_path / "runs"
    for seed in (0, 1):
        for number, row in ((0.5, "bridge"), (1.0, "bridge_lambda_sim=1")):
            folder = runs / f"{row}_seed{seed}"
            changed(source, folder, {"gt_known_loc": 10 * number + 20 * seed}, seed=seed, lambda_sim=number)
    run("sweep", "--param", "lambda_sim", "--values", 1.0, 0.5, "--seeds", 0, 1, "--runs", runs, *flags)
    assert not in_this_process
    text = (runs / "sweep_lambda_sim.md").read_text()
    assert [line[1] for line in cells(text)[1:]] == ["15.00 ± 14.14", "20.00 ± 14.14"]
    assert "over 2 seeds" in text.splitlines()[0]
    entries = read_json(runs / "sweep_lambda_sim.json")["values"]
    assert [(entry["seeds"], entry["gt_known_loc"]) for entry in entries] == [
        ([0, 1], [5, 25]),
        ([0, 1], [10, 30]),
    ]


def test_sweep_of_an_integer_over_masks_with_another_seed(trained, in_this_process, tmp_path):
    flags, source = trained
    nothing = dict.fromkeys(("gt_known_loc", "max_box_acc_v2", "max_box_acc_v2_at_val_threshold"))
    folder = tmp_path / "runs" / "bridge_seed3"
    changed(source, folder, nothing | {"pxap": 40.0}, seed=3)
    for path in folder.glob("results_*_test.json"):
        path.write_text(json.dumps(read_json(path) | {"curves": None, "thresholds": None}))
    asked = ["sweep", "--param", "warm_epochs", "--values", 1.0, "--seed", 3, "--checkpoint", "last"]
    run(*asked, "--runs", tmp_path / "runs", *flags)
    found = read_json(tmp_path / "runs" / "sweep_warm_epochs.json")
    top1 = read_json(folder / "results_last_test.json")["metrics"]["top1_cls"]
    assert found["values"] == [{"value": 1.0, "seeds": [3], "pxap": [40.0], "top1_cls": [top1]}]
    assert found["checkpoint"] == "last" and not in_this_process
    result = read_json(folder / "results_last_test.json")
    result["metrics"]["pxap"] = None  # neither boxes nor masks
    (folder / "results_last_test.json").write_text(json.dumps(result))
    run(*asked, "--runs", tmp_path / "runs", *flags)
    found = read_json(tmp_path / "runs" / "sweep_warm_epochs.json")
    assert found["values"] == [{"value": 1.0, "seeds": [3], "top1_cls": [top1]}]


def test_the_first_failure_ends_a_sweep(tiny, fails, tmp_path, monkeypatch):
    tried = []

    def fail(script, arguments, folder, slot):
        tried.append(folder)
        raise InputError(f"{folder}: failed")

    monkeypatch.setattr(experiments, "run_script", fail)
    asked = ["sweep", "--param", "p", "--values", "0.1", "0.2", "0.3", "--runs", tmp_path / "r", *tiny]
    fails(experiments.main, asked, "p=0.1_seed0: failed")
    assert len(tried) == 1


def test_sweep_flags_that_make_no_sense(tiny, in_this_process, fails, tmp_path):
    base = ["sweep", "--runs", tmp_path / "r", *tiny]
    lambda_sim, p = ["--param", "lambda_sim", "--values", "1"], ["--param", "p", "--values"]
    fails(experiments.main, [*base, *lambda_sim, "much"], "--values", "'much'", "float")
    fails(experiments.main, [*base, *lambda_sim, "--lambda-sim", "2"], "--lambda-sim", "remove it")
    fails(
        experiments.main,
        [*base, "--param", "learning_rate", "--values", "1"],
        "--param learning_rate",
        "lambda_norm",
    )
    for param in ("arch", "stride", "momentum"):
        fails(experiments.main, [*base, "--param", param, "--values", "1"], f"--param {param}")
    fails(experiments.main, [*base, *lambda_sim, "--method", "cam"], "--param lambda_sim", "tiny vgg16 cam")
    fails(experiments.main, [*base, *p, "0.5", "1.5"], "--p 1.5", "[0, 1]")
    fails(experiments.main, [*base, *p, "1", "1.0"], "--values")
    fails(experiments.main, [*base, *p, "1", "--resume"], "--resume", "--runs")
    fails(experiments.main, [*base, *p, "1", "--frobnicate", "3"], "--frobnicate")
    assert not in_this_process and not (tmp_path / "r").exists()


# ------------------------------------------------------------------------------------------------------ table


def seeds_of(source, tmp_path, numbers, **config):
    """Copies of a run with these seeds and MaxBoxAccV2 / Top-1 Loc numbers."""
    names = [f"{'_'.join(map(str, config.values()))}{seed}" for seed in numbers]
    return [
        changed(source, tmp_path / name, {"v2_mean": v2, "top1_loc": top1}, seed=seed, **config)
        for name, (seed, (v2, top1)) in zip(names, numbers.items())
    ]


def test_tables_parse_back_to_the_numbers(trained, tmp_path):
    _, source = trained
    bridge = seeds_of(source, tmp_path, {0: (50.0, 40.0), 1: (60.0, 41.0), 2: (70.0, 45.0)})
    cam = seeds_of(source, tmp_path, {0: (55.125, 30.0)}, method="cam")
    weak = seeds_of(source, tmp_path, {0: (20.0, 10.0), 1: (30.0, 20.0)}, method="cam", lambda_sim=0.25)
    run("table", *bridge, *cam, *weak, "--out", tmp_path / "t.md")
    # Sample deviations: 50, 60, 70: 10; 40, 41, 45: root of 7; 20, 30 and 10, 20: root of 50.
    expected = {
        "bridge": (60.0, 10.0, 42.0, 7**0.5),
        "cam (lambda_sim 0.5)": (55.125, None, 30.0, None),
        "cam (lambda_sim 0.25)": (25.0, 50**0.5, 15.0, 50**0.5),
    }
    with (tmp_path / "t.csv").open(newline="") as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert rows.keys() == expected.keys()
    assert rows["bridge"]["seeds"] == "0 1 2" and rows["bridge"]["dataset"] == "tiny"
    pxap = read_json(source / "results_best_test.json")["metrics"]["pxap"]
    for label, (v2, v2_deviation, top1, top1_deviation) in expected.items():
        row = rows[label]
        for key, value in (
            ("v2_mean_mean", v2),
            ("v2_mean_deviation", v2_deviation),
            ("top1_loc_mean", top1),
            ("top1_loc_deviation", top1_deviation),
        ):
            assert (float(row[key]) == pytest.approx(value)) if value is not None else (row[key] == "")
        assert float(row["pxap_mean"]) == pytest.approx(pxap)

    def cell(mean, deviation, plus_minus):
        return f"{mean:.2f}" if deviation is None else f"{mean:.2f}{plus_minus}{deviation:.2f}"

    lines = cells((tmp_path / "t.md").read_text())
    assert len(lines) == 12 and [line[0] for line in lines] == ["", *expected] * 3
    tables = [(lines[i], {row[0]: row[1:] for row in lines[i + 1 : i + 4]}) for i in (0, 4, 8)]
    latex = (tmp_path / "t.tex").read_text()
    for label, (v2, v2_deviation, top1, top1_deviation) in expected.items():
        for (head, body), name, numbers in (
            (tables[0], "Top-1 Loc", (top1, top1_deviation)),
            (tables[1], "MaxBoxAccV2", (v2, v2_deviation)),
        ):
            assert body[label][head.index(name) - 1] == cell(*numbers, " ± ")
        assert len(tables[2][1][label]) == 1
        rows = [line for line in latex.splitlines() if line.startswith(label.replace("_", r"\_") + " & ")]
        assert len(rows) == 3 and all(line.endswith(r" \\") for line in rows)
        assert rows[0].split(" & ")[1] == f"${cell(top1, top1_deviation, chr(32) + chr(92) + 'pm ')}$"
        assert f"${cell(v2, v2_deviation, chr(32) + chr(92) + 'pm ')}$" in rows[1].split(" & ")
    tabulars = re.findall(r"\\begin\{tabular\}\{(lc*)\}(.*?)\\end\{tabular\}", latex, re.S)
    assert [len(begin) for begin, _ in tabulars] == [6, 6, 2]
    for begin, body in tabulars:
        assert "multicolumn" not in body  # one data set and backbone: the title has them
        assert all(line.count(" & ") == len(begin) - 1 for line in body.splitlines() if line.endswith(r"\\"))


def test_a_table_over_two_data_sets_has_a_row_per_method(trained, tmp_path, fails):
    _, source = trained
    other = seeds_of(source, tmp_path, {0: (12.0, 6.0)}, dataset="Open_Images")
    run("table", source, *other, "--out", tmp_path / "t")
    assert "tiny VGG16 PxAP" in (tmp_path / "t.md").read_text()
    assert (tmp_path / "t.md").read_text().count("| bridge |") == 3
    latex = (tmp_path / "t.tex").read_text()
    assert r"\multicolumn{5}{c}{Open\_Images VGG16}" in latex and latex.count(r"\multicolumn") == 6
    fails(
        experiments.main, ["table", source, source, "--out", tmp_path / "t"], source, "seed 0", "one of the"
    )


def test_a_table_of_results_files_and_names(trained, tmp_path):
    _, source = trained
    file = tmp_path / "other_maps.json"
    result = read_json(source / "results_best_test.json") | dict.fromkeys(("arch", "method"))
    result["metrics"]["max_box_acc_v2"]["mean"] = 12.0
    file.write_text(json.dumps(result))
    run("table", source, file, "--digits", 1, "--out", tmp_path / "t")
    lines = cells((tmp_path / "t.md").read_text())
    row = next(line for line in lines if line[0] == "other_maps" and "12.0" in line)
    assert "–" in row  # the run has a backbone, the file has none: columns of their own
    run("table", source, file, "--names", "a|b", "c_d", "--out", tmp_path / "t")
    assert r"| a\|b |" in (tmp_path / "t.md").read_text() and r"c\_d & " in (tmp_path / "t.tex").read_text()


def test_results_files_of_seeds_share_a_row(trained, tmp_path, fails):
    _, source = trained
    files = []
    for row, seed, value in (("bridge", 0, 50.0), ("bridge", 1, 60.0), ("bridge_p=0.25", 1, 70.0)):
        run_of_seed = changed(source, tmp_path / f"{row}{seed}", {"v2_mean": value}, seed=seed)
        result = read_json(run_of_seed / "results_best_test.json")
        assert result["seed"] == seed
        files.append(tmp_path / f"{row}_seed{seed}.json")
        shutil.copy(run_of_seed / "results_best_test.json", files[-1])
    run("table", *files, "--out", tmp_path / "t", "--digits", 1)
    lines = cells((tmp_path / "t.md").read_text())
    head = next(i for i, line in enumerate(lines) if "MaxBoxAccV2" in line)
    column = lines[head].index("MaxBoxAccV2")
    found = [(line[0], line[column]) for line in lines[head + 1 : head + 3]]
    assert found == [("bridge", "55.0 ± 7.1"), ("bridge_p=0.25", "70.0")]  # deviation: 10 / 2 ** 0.5
    fails(experiments.main, ["table", files[0], files[0]], f"{files[0]}: the same run")


def test_results_files_of_other_methods_or_splits_do_not_share_a_row(trained, tmp_path):
    """Files of one name: only those that differ in the seed alone are averaged."""
    _, source = trained
    files = []
    for i, change in enumerate(({}, {"seed": 1, "method": "cam"}, {"seed": 2, "split": "val"})):
        result = read_json(source / "results_best_test.json") | change
        result["metrics"]["max_box_acc_v2"]["mean"] = 50.0 + i
        files.append(tmp_path / str(i) / "results.json")
        files[-1].parent.mkdir()
        files[-1].write_text(json.dumps(result))
    run("table", *files, "--out", tmp_path / "t")
    text = (tmp_path / "t.md").read_text()
    assert "±" not in text and "tiny VGG16. MaxBoxAccV2" in text
    for words, value in (("method bridge, split test", 50), ("method cam", 51), ("split val", 52)):
        assert any(words in line and f"| {value}.00 |" in line for line in text.splitlines())
    run("table", files[2], "--out", tmp_path / "t")
    assert "tiny VGG16, val. MaxBoxAccV2" in (tmp_path / "t.md").read_text()


def test_names_keep_runs_apart_and_values_that_can_change_results_do_too(trained, tmp_path):
    _, source = trained
    seeds = seeds_of(source, tmp_path, {0: (50.0, 40.0), 1: (60.0, 41.0)})
    run("table", *seeds, "--names", "A", "B", "--out", tmp_path / "t")
    assert "±" not in (tmp_path / "t.md").read_text() and "| B |" in (tmp_path / "t.md").read_text()
    other = changed(source, tmp_path / "other", seed=2, val_every=4)
    run("table", *seeds, other, "--out", tmp_path / "t")
    text = (tmp_path / "t.md").read_text()
    assert "| bridge (val_every 1) | " in text and "| bridge (val_every 4) | " in text


def test_bad_input_to_table(trained, tmp_path, fails):
    _, source = trained
    fails(experiments.main, ["table", tmp_path / "nowhere"], tmp_path / "nowhere", "no such run")
    fails(experiments.main, ["table", source, "--names", "a", "b"], "2 names for 1 runs")
    fails(experiments.main, ["table", source, "--frobnicate"], "--frobnicate")
    fails(experiments.main, ["table", source, "--digits", "-1"], "--digits -1")
    last = ["table", source, "--split", "val", "--checkpoint", "last"]
    fails(experiments.main, last, f"python evaluate.py {source} --checkpoint last --split val")
    results = source / "results_best_test.json"
    whole = results.read_text()
    for damaged in ("", "[]", "{}", whole[:500], whole.replace('"metrics"', '"m"')):
        results.write_text(damaged)
        fails(experiments.main, ["table", source], results, "evaluate.py")
    results.write_text(whole)
    (source / "config.json").write_text('{"config": 3}')
    fails(experiments.main, ["table", source], source / "config.json")


def test_the_command_itself_from_anywhere(tmp_path):
    command = [sys.executable, "-W", "ignore", "-m", "bridge_wsol.experiments", "table", "nowhere"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1 and "nowhere" in ended.stderr, ended.stderr
