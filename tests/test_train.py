"""train.py end to end on the small data set: files, identities, resume, one line for bad input."""

import itertools
import json
import os
import re
import shutil
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from conftest import content, lines_of, load, results, run, same_run
from torch.nn.functional import cross_entropy
from torch.optim.optimizer import register_optimizer_step_post_hook

import train
from bridge_wsol import evaluation, utils
from bridge_wsol.config import resolve_config
from bridge_wsol.data import TrainImages, to_input, train_loader
from bridge_wsol.utils import one_line_errors

NO_VAL = {"max_box_acc_v2_at_val_threshold": None}  # while training, on val itself


def edit(path, change):
    """Changes a file of torch.save."""
    change(parts := load(path))
    torch.save(parts, path)


@contextmanager
def after_step(action):
    """action(optimizer) after each step of any optimizer; yields a list that has an entry for each step."""
    steps = []

    def done(optimizer, *_):
        steps.append(optimizer)
        action(optimizer)

    handle = register_optimizer_step_post_hook(done)
    try:
        yield steps
    finally:
        handle.remove()


# ---- what a run leaves
def test_a_run_leaves_its_files(trained):
    _, folder = trained
    names = "best.pt config.json last.pt log.jsonl results_best_test.json results_best_test.npz "
    names += "results_last_test.json results_last_test.npz"
    assert sorted(path.name for path in folder.iterdir()) == names.split()
    config = results(folder, "config.json")
    source = "preset of CUB: authors' released configuration"
    assert config["config"]["lambda_sim"] == {"value": 0.5, "source": source}
    assert config["config"]["weights"] == {"value": "none", "source": "flag"}
    assert config["config"]["seed"] == {"value": 0, "source": "default"}
    assert {"python", "torch", "torchvision", "device", "git_commit"} <= config["environment"].keys()
    assert config["data"]["num_classes"] == 3
    assert config["fingerprint"].keys() == {"values", "train", "val", "test"}

    warm, after = lines_of(folder)
    assert {"epoch", "loss", "l_ce", "l_drop", "lr", "lr_new", "top1", "val"} == warm.keys()
    assert warm["loss"] == pytest.approx(warm["l_ce"] + 3 * warm["l_drop"], abs=1e-5)
    weighted = after["l_ce"] + 3 * after["l_drop"] + 0.5 * after["l_sim"] + 0.15 * after["l_norm"]
    assert after["loss"] == pytest.approx(weighted, abs=1e-5)


def test_results_have_the_documented_form(trained):
    result = results(trained[1])
    metrics, v2 = result["metrics"], result["metrics"]["max_box_acc_v2"]
    assert (result["dataset"], result["split"], result["images"]) == ("tiny", "test", 9)
    names = "max_box_acc_v2 max_box_acc gt_known_loc gt_known_loc_largest top1_loc top5_loc top1_cls top5_cls"
    assert metrics.keys() == {*names.split(), "max_box_acc_v2_at_val_threshold", "pxap", "piou"}
    assert metrics["top5_cls"] == 100 and 0 < metrics["pxap"] <= 100  # three classes; the set has masks too
    for name, best in (v2 | {"largest": metrics["max_box_acc"]}).items():
        if name != "mean":
            level, curve = result["levels"][name], result["curves"][name]
            assert (curve.index(max(curve)), max(curve), len(curve)) == (level, best, 255)
            assert result["thresholds"][name] == level / 255
    at_val, of_val = metrics["max_box_acc_v2_at_val_threshold"], load(trained[1] / "best.pt")["val"]
    assert at_val.keys() == v2.keys()
    assert all(at_val[d] == result["curves"][d][of_val["levels"][d]] for d in ("30", "50", "70"))


@pytest.mark.parametrize("name", ["sim", "norm"])
def test_each_loss_changes_the_run_and_only_after_the_warm_stage(trained, tmp_path, name):
    flags, whole = trained
    run("train", f"{flags} --lambda-{name} 0 --out {tmp_path}/without")
    assert lines_of(whole)[0] == lines_of(tmp_path / "without")[0]
    assert content(whole / "last.pt")["model"] != content(tmp_path / "without" / "last.pt")["model"]


def test_a_smaller_last_batch_counts_by_its_images(tiny, tmp_path):
    """Batches of 17 and 1: means over all images in the log, the plain mean's gradient in each step."""
    gradients, folder = [], tmp_path / "run"
    flags = f"{tiny} --method cam --epochs 1 --batch-size 17 --warm-batch-size 17 --lr 1e-12 --lr-new 1e-12"

    def keep(optimizer):
        gradients.append([p.grad.clone() for group in optimizer.param_groups for p in group["params"]])

    with after_step(keep):
        run("train", f"{flags} --out {folder}")
    trained = evaluation.TrainedRun(folder, "last", "cpu")
    images = TrainImages(trained.split("train"), 72, 64, seed=0)
    batches = [*train_loader(images, 17, workers=0)]
    losses, right, net = [], [], trained.method.net
    for (pixels, labels), found in zip(batches, gradients, strict=True):
        logits = net(to_input(pixels, torch.device("cpu")))
        losses += cross_entropy(logits, labels, reduction="none").tolist()
        right += (logits.argmax(1) == labels).tolist()
        expected = torch.autograd.grad(cross_entropy(logits, labels), [*net.parameters()])
        for own, other in zip(found, expected, strict=True):
            torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-6)
    (line,) = lines_of(folder)
    assert len(losses) == 18 and line["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert line["top1"] == pytest.approx(100 * np.mean(right))


def test_pretrained_weights_and_frozen_blocks_reach_the_network(monkeypatch):
    """ImageNet's classifier is for ImageNet's classes alone; the demo learns from its third block on."""
    loaded = []
    monkeypatch.setattr(train, "load_pretrained", lambda net, *how: loaded.append(how))
    for dataset in ("ILSVRC", "CUB"):
        c, _ = resolve_config({"dataset": dataset, "arch": "resnet50", "method": "cam"})
        train.build(c, 3, torch.device("cpu"), pretrained=True)
    assert loaded == [("resnet50", "imagenet", True), ("resnet50", "imagenet", False)]
    method, _ = train.build(resolve_config({})[0], 16, torch.device("cpu"), pretrained=False)
    blocks = [[p.requires_grad for p in block.parameters()] for block in method.net.pretrained_blocks()]
    assert [{*of_block} for of_block in blocks] == [{False}, {False}, {True}, {True}, {True}]


def test_best_is_the_epoch_with_the_best_val(tiny, tmp_path):
    folder = tmp_path / "run"
    run("train", f"{tiny} --epochs 5 --val-every 2 --lr 0.02 --out {folder}")
    vals = {line["epoch"]: line["val"] for line in lines_of(folder) if "val" in line}
    assert list(vals) == [2, 4, 5]
    best = max(vals, key=lambda epoch: vals[epoch]["max_box_acc_v2"]["mean"])  # the first of equals
    for which, epoch in (("best", best), ("last", 5)):
        found = results(folder, f"results_{which}_test.json")
        assert load(folder / f"{which}.pt")["epoch"] == found["epoch"] == epoch
        assert found["checkpoint"] == which
    last = results(folder, "results_last_test.json")
    run("evaluate", f"{folder} --checkpoint last --device cpu")
    assert results(folder, "results_last_test.json") == last
    assert best != 5 and last["curves"] != results(folder)["curves"]


def test_val_every_0_is_after_the_last_epoch(tiny, tmp_path, trained_once, capsys):
    run("train", f"{tiny} --epochs 2 --val-every 0 --out {tmp_path}/run")
    # Else few boxes of val choose the best epoch, and a line says so.
    assert "--val-every 0" in trained_once[1] and "--val-every 0" not in capsys.readouterr().out
    run("train", f"{tiny} --epochs 3 --val-every 0 --out {tmp_path}/run --resume")
    assert [line["epoch"] for line in lines_of(tmp_path / "run") if "val" in line] == [2, 3]


def test_weights_of_a_run_start_another(trained, tmp_path):
    flags, first = trained
    rates = "--lr 1e-12 --lr-new 1e-12"  # nothing is learned: of equal scores on val, the first is the best
    run("train", f"{flags} {rates} --weights {first}/best.pt --out {tmp_path}/next")
    ours, theirs = load(tmp_path / "next" / "best.pt"), load(first / "best.pt")["model"]
    assert ours["epoch"] == 1 and ours["val"]["metrics"] == lines_of(tmp_path / "next")[1]["val"]
    for name, value in ours["model"].items():  # conv6 and fc are new
        assert torch.allclose(value, theirs[name], atol=1e-6) == name.startswith("features."), name


# ---- the same run again
def test_the_same_seed_is_the_same_run(trained, tmp_path, capsys):
    flags, whole = trained
    run("train", f"{flags} --out {tmp_path}/again --quiet")
    assert capsys.readouterr().err == "" and same_run(whole, tmp_path / "again")
    run("train", f"{flags} --seed 1 --out {tmp_path}/other")
    assert lines_of(whole) != lines_of(tmp_path / "other")


@pytest.mark.parametrize("workers", [(0, 2), pytest.param((2, 0), marks=pytest.mark.slow)])
def test_resumed_equals_uninterrupted_with_any_number_of_workers(trained, tmp_path, workers):
    (flags, whole), half = trained, tmp_path / "half"
    run("train", f"{flags} --epochs 1 --workers {workers[0]} --out {half}")
    with (half / "log.jsonl").open("a") as log:  # as after a crash between log and checkpoint
        log.write('{"epoch": 2, "loss": 9, "seconds": 1}\n')
    run("train", f"{flags} --epochs 2 --workers {workers[1]} --out {half} --resume")
    assert same_run(whole, half)
    before = (half / "last.pt").read_bytes()
    (half / "results_best_test.json").unlink()
    run("train", f"{flags} --workers 0 --out {half} --resume")  # nothing is left to do but the evaluation
    assert same_run(whole, half) and (half / "last.pt").read_bytes() == before


def interrupt():
    raise KeyboardInterrupt


@pytest.mark.parametrize("step, left", [(3, 5 + 3), (7, 3)])
def test_an_interrupted_epoch_is_repeated(trained, tmp_path, step, left, capsys):
    """18 images are 5 batches of 4 in the warm epoch, then 3 of 8."""
    flags, whole = trained
    stopped, count = tmp_path / "stopped", itertools.count(1)
    stop = after_step(lambda _: interrupt() if next(count) == step else None)
    with pytest.raises(SystemExit) as end, stop, one_line_errors():
        run("train", f"{flags} --out {stopped}")
    assert end.value.code == 130 and "interrupted" in capsys.readouterr().err
    with after_step(lambda _: None) as steps:
        run("train", f"{flags} --out {stopped} --resume")
    assert len(steps) == left and same_run(whole, stopped)


@pytest.mark.parametrize("n", [4, 6, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 3, 5, 7, 8))])
def test_a_run_that_ends_before_one_of_its_files_is_written_goes_on(trained, tmp_path, monkeypatch, n):
    """In turn: config, log, best and last of the first epoch, log and last of the second, two results."""
    flags, whole = trained
    count, replace = itertools.count(1), os.replace
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", lambda *paths: interrupt() if next(count) == n else replace(*paths))
        run("train", f"{flags} --out {tmp_path}/stopped")
    assert not list((tmp_path / "stopped").glob(".*"))  # nothing half written is left
    run("train", f"{flags} --out {tmp_path}/stopped --resume")
    assert same_run(whole, tmp_path / "stopped")


def test_what_is_held_out_as_val_is_decided_once(trained, tmp_path, where):
    """Without a list of val, two images per class; a list that appears later changes nothing."""
    flags, of_list = trained
    held_out, val = tmp_path / "held_out", tmp_path / "lists" / "tiny" / "val"
    shutil.move(val, tmp_path / "val")
    run("train", f"{flags} --epochs 1 --out {held_out}")
    shutil.move(tmp_path / "val", val)
    for folder, per_class in ((of_list, 0), (held_out, 2)):
        assert results(folder, "config.json")["config"]["val_per_class"]["value"] == per_class
    run("evaluate", f"{held_out} --split val --device cpu {where}")
    assert results(held_out, "results_best_val.json")["metrics"] | NO_VAL == lines_of(held_out)[0]["val"]
    run("train", f"{flags} --epochs 2 --out {held_out} --resume")
    assert len(lines_of(held_out)) == 2


# ---- bad input
def test_bad_input_to_train(tiny, fails, tmp_path):
    (tmp_path / "file").write_text("")
    for flags, *words in (
        (f"--data-root {tmp_path}/nowhere", f"{tmp_path}/nowhere"),
        (f"--out {tmp_path}/file/run", f"{tmp_path}/file"),
        ("--device tpu9", "device tpu9"),
        ("--lr nan", "--lr", "nan"),
        *([] if torch.cuda.is_available() else [("--device cuda", "device cuda")]),
    ):
        fails("train", f"{tiny} --out {tmp_path}/run {flags}", *words)
    assert not (tmp_path / "run").exists()


def test_an_existing_run_is_refused_and_untouched(trained, fails):
    flags, folder = trained
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    fails("train", f"{flags} --out {folder}", folder, "--resume")
    fails("train", f"{flags} --out {folder} --resume --lr 0.5", "--lr 0.5", "0.004")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_run_whose_loss_is_not_finite_stops_and_keeps_its_checkpoint(trained, fails):
    flags, folder = trained
    edit(folder / "last.pt", lambda checkpoint: checkpoint["model"]["fc.bias"].fill_(float("nan")))
    before = (folder / "last.pt").read_bytes()
    fails("train", f"{flags} --out {folder} --resume --epochs 3", "epoch 3/3", "l_ce nan", "--lr")
    assert (folder / "last.pt").read_bytes() == before and len(lines_of(folder)) == 2


@pytest.mark.parametrize("name", ["train", "val"])
def test_a_run_goes_on_with_the_lists_it_began_with(trained, fails, tmp_path, where, name):
    flags, folder = trained
    labels = tmp_path / "lists" / "tiny" / name / "class_labels.txt"
    swapped = {"0": "1", "1": "0", "2": "2"}
    labels.write_text(re.sub(r"\d$", lambda label: swapped[label[0]], labels.read_text(), flags=re.MULTILINE))
    before = (folder / "last.pt").read_bytes()
    fails("train", f"{flags} --out {folder} --resume --epochs 3", folder, f"list of {name}", "--out")
    assert (folder / "last.pt").read_bytes() == before
    evaluate = f"{folder} --device cpu {where}"
    if name == "val":
        for flags in ("--split val", "--normalize ivr --percentile val"):
            fails("evaluate", f"{evaluate} {flags}", folder, "val has changed")
        run("evaluate", f"{evaluate} --normalize ivr")  # the thresholds of its maps would be val's
        found = results(folder, "results_best_test_ivr.json")["metrics"]
        assert found["max_box_acc_v2_at_val_threshold"] is None and found["max_box_acc_v2"] is not None
    run("evaluate", evaluate)


# ---- a run folder
def test_a_run_folder_belongs_to_one_process(trained, tmp_path, fails):
    flags, folder = trained
    with utils.own_folder(folder, resume=True):  # as another process would hold it
        fails("train", f"{flags} --out {folder} --resume", folder, "another process")
    (folder / ".log.jsonl.0123.part").write_text("left by a kill")
    run("train", f"{flags} --out {folder} --resume")
    assert not [*folder.glob(".*")]
    fails("train", f"{flags} --out {tmp_path}/new --data-root {tmp_path}/nowhere", "nowhere")
    assert not (tmp_path / "new").exists()  # nothing keeps the next try from its folder


@pytest.mark.parametrize("missing", [1, 2])
def test_a_run_resumes_with_a_damaged_log(trained, missing, capsys):
    """Blank lines and one that is no entry, around a line that is cut; no file."""
    flags, folder = trained
    path, lines = folder / "log.jsonl", lines_of(folder)
    path.write_text(f"\n{path.read_text()[:-40]}\n[]\n")
    if missing == 2:
        path.unlink()
    run("train", f"{flags} --out {folder} --epochs 3 --resume")
    assert f"{missing} of 2 epochs are missing" in capsys.readouterr().out
    assert lines_of(folder)[:-1] == lines[: 2 - missing] and lines_of(folder)[-1]["epoch"] == 3


def test_what_is_missing_or_was_edited_is_said_at_the_start(trained, tmp_path, capsys):
    flags, folder = trained
    (folder / "best.pt").unlink()
    config = json.loads((folder / "config.json").read_text())
    config["config"]["lr"]["value"] = 7.0
    (folder / "config.json").write_text(json.dumps(config))
    run("train", f"{flags} --out {folder} --epochs 3 --resume")
    said = capsys.readouterr().out.partition("epoch 3/3")[0]
    assert "best.pt is missing" in said and "lr is 7.0 in config.json" in said
    assert load(folder / "best.pt")["epoch"] == 3 and load(folder / "best.pt")["config"]["lr"] == 4e-3
    run("train", f"{flags} --out {tmp_path}/other --resume --epochs 1")
    assert "a new run begins" in capsys.readouterr().out


def test_variables_of_a_launcher(monkeypatch, fails, tmp_path, trained, where):
    """A cluster numbers its jobs by RANK: the run is one process, and its messages are printed."""
    monkeypatch.setenv("RANK", "1")
    fails("evaluate", tmp_path / "nowhere", "nowhere/best.pt")
    fails("train", f"--dataset {tmp_path}/nowhere/", "nowhere")
    monkeypatch.setenv("WORLD_SIZE", "2")
    fails("train", f"--dataset {tmp_path}/nowhere/", "RANK=1", "MASTER_ADDR")
    fails("evaluate", f"{trained[1]} --device cpu {where}", "RANK=1", "MASTER_ADDR")
    fails("evaluate", f"{trained[1]} --images photos", "--images", "one process")
    monkeypatch.setenv("WORLD_SIZE", "many")
    fails("train", f"--dataset {tmp_path}/nowhere/", "WORLD_SIZE=many", "whole numbers")


def test_the_number_type_is_decided_once_per_run(tiny, tmp_path, monkeypatch):
    """Measured at the start; a machine where it would be otherwise continues and evaluates with it."""
    tiny, out = tiny.replace("--amp off", ""), tmp_path / "run"
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    for faster, epochs in (("bf16", 1), ("off", 2)):
        monkeypatch.setattr(utils, "convolution_speed", lambda amp, faster=faster: 2 if amp == faster else 1)
        run("train", f"{tiny} --epochs {epochs} --out {out} --resume")
        value = results(out, "config.json")["config"]["amp"]
        assert value == {"value": "bf16", "source": "auto: bf16 2, float32 1 GFLOP/s"}
        assert evaluation.TrainedRun(out, device="cpu").amp == "bf16"
    assert evaluation.TrainedRun(out, device="cpu", amp="auto").amp == "off"
