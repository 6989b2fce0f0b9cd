"""The two scripts end to end on the small data set: files, identities, resume, one line for bad input."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import plain_boxes
import pytest
import torch
from conftest import REPOSITORY
from PIL import Image
from scipy import ndimage

import evaluate
import train
from bridge_wsol import cam, evaluation, utils
from bridge_wsol.boxes import iou_matrix, scale_boxes
from bridge_wsol.data import test_loader, to_input
from bridge_wsol.datasets import load_splits
from bridge_wsol.models import load_tensors, save_checkpoint
from bridge_wsol.processes import ordered_map
from bridge_wsol.utils import InputError


def read_json(path):
    return json.loads(path.read_text())


def weights(path):
    return torch.load(path, weights_only=True)["model"]


def lines_of(run):
    """log.jsonl without what the clock decides."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("images_per_second", "seconds")} for line in lines]


def same_run(a, b):
    assert lines_of(a) == lines_of(b)
    assert read_json(a / "results_best_test.json") == read_json(b / "results_best_test.json")
    for name in ("last.pt", "best.pt"):
        ours, theirs = weights(a / name), weights(b / name)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    return True


def test_a_run_leaves_its_files_and_says_what_it_did(trained, trained_once):
    (_, run), (_, printed) = trained, trained_once
    assert {path.name for path in run.iterdir()} == {
        "config.json",
        "log.jsonl",
        "best.pt",
        "last.pt",
        "results_best_test.json",
        "results_last_test.json",
    }

    config = read_json(run / "config.json")
    assert config["config"]["lambda_sim"] == {
        "value": 0.5,
        "source": "preset: authors' released configuration",
    }
    assert config["config"]["weights"] == {"value": "none", "source": "flag"}
    assert config["config"]["seed"] == {"value": 0, "source": "default"}
    assert {"python", "torch", "torchvision", "device", "git_commit"} <= config["environment"].keys()
    assert config["data"]["val"] in printed and config["data"]["num_classes"] == 3

    warm, after = lines_of(run)
    assert (
        warm["epoch"] == 1
        and {"loss", "l_ce", "l_drop", "lr", "lr_new", "top1", "val"} <= warm.keys()
        and "l_sim" not in warm
    )
    assert warm["loss"] == pytest.approx(warm["l_ce"] + 3 * warm["l_drop"], abs=1e-5)
    weighted = after["l_ce"] + 3 * after["l_drop"] + 0.5 * after["l_sim"] + 0.15 * after["l_norm"]
    assert after["loss"] == pytest.approx(weighted, abs=1e-5)
    assert re.search(
        r"epoch 2/2  loss .* l_ce .* l_drop .* l_sim .* l_norm .* val MaxBoxAccV2 .* images/s  0h00m00s left",
        printed,
    )


def test_results_have_the_documented_form(trained):
    _, run = trained
    result = read_json(run / "results_best_test.json")
    assert result["dataset"] == "tiny" and result["split"] == "test" and result["images"] == 9
    v2 = {"30", "50", "70", "mean"}
    metrics = result["metrics"]
    assert metrics.keys() == {
        "max_box_acc_v2",
        "max_box_acc",
        "gt_known_loc",
        "gt_known_loc_largest",
        "top1_loc",
        "top5_loc",
        "top1_cls",
        "top5_cls",
        "max_box_acc_v2_at_val_threshold",
        "pxap",
    }
    assert metrics["max_box_acc_v2"].keys() == metrics["max_box_acc_v2_at_val_threshold"].keys() == v2
    assert metrics["top5_cls"] == 100 and 0 < metrics["pxap"] <= 100  # three classes; the set has masks too
    for name in ("30", "50", "70", "largest"):
        assert len(result["curves"][name]) == 255
        assert result["curves"][name][round(result["thresholds"][name] * 255)] == max(result["curves"][name])
    assert max(result["curves"]["50"]) == metrics["gt_known_loc"] == metrics["max_box_acc_v2"]["50"]
    assert max(result["curves"]["largest"]) == metrics["max_box_acc"] == metrics["gt_known_loc_largest"]


def test_evaluate_repeats_the_numbers_of_training(trained, capsys, tmp_path):
    _, run = trained
    capsys.readouterr()
    before = read_json(run / "results_best_test.json")
    flags = [
        "--device",
        "cpu",
        "--workers",
        "0",
        "--batch-size",
        "8",
        "--data-root",
        str(tmp_path / "data"),
        "--splits",
        str(tmp_path / "splits"),
    ]
    evaluate.main([str(run), *flags])
    assert read_json(run / "results_best_test.json") == before
    printed = capsys.readouterr().out
    for name in ("MaxBoxAccV2", "GT-known Loc", "Top-1 Loc", "Top-5 Loc", "PxAP", "Top-1 cls"):
        assert name in printed
    evaluate.main([str(run), "--checkpoint", "last", "--split", "val", *flags])
    assert (
        read_json(run / "results_last_val.json")["metrics"]["max_box_acc_v2"]
        == lines_of(run)[-1]["val"]["max_box_acc_v2"]
    )


def test_maps_are_the_ground_truth_class_s_from_one_forward_pass(trained, tmp_path):
    _, run = trained
    model, method, checkpoint = evaluation.load_run(run, "best", torch.device("cpu"))
    split = load_splits("tiny", tmp_path / "data", tmp_path / "splits", ("test",))[0]["test"]
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    loader = test_loader(split, 4, image_size=64, workers=0)
    batches = list(
        evaluation.network_maps(
            model,
            loader,
            method=method,
            device=torch.device("cpu"),
            amp="off",
            normalization="minmax",
            image_size=64,
        )
    )
    assert len(passes) == 3 and [i for batch in batches for i in batch.indices] == list(range(9))
    images, labels, _ = next(iter(loader))
    with torch.inference_mode():
        output, weight = model(to_input(images, torch.device("cpu"))), model.fc.weight.detach()
    for n, label in enumerate(labels.tolist()):
        of_class = sum(weight[label, c] * output.features[n, c] for c in range(output.features.shape[1]))
        expected = cam.normalize(cam.resize(of_class[None], 64))[0].numpy()
        np.testing.assert_allclose(batches[0].maps[n], expected, atol=1e-3)
        assert batches[0].ranks[n] == (output.logits[n] > output.logits[n, label]).sum()
    assert len(set(labels.tolist())) == 3


def test_saved_maps_evaluate_to_the_same_numbers(trained, tmp_path):
    flags, run = trained
    maps = tmp_path / "maps"
    evaluate.main([str(run), "--save-maps", str(maps), "--device", "cpu", "--batch-size", "8"])
    of_run = read_json(run / "results_best_test.json")
    data_flags = flags[: flags.index("--weights")]
    evaluate.main(
        ["--score-maps", str(maps), "--split", "test", "--out", str(tmp_path / "r.json"), *data_flags]
    )
    of_maps = read_json(tmp_path / "r.json")
    assert of_maps["curves"] == of_run["curves"] and of_maps["thresholds"] == of_run["thresholds"]
    for name in ("max_box_acc_v2", "gt_known_loc", "gt_known_loc_largest", "pxap"):
        assert of_maps["metrics"][name] == of_run["metrics"][name]
    for name in ("top1_loc", "top5_loc", "top1_cls", "top5_cls", "max_box_acc_v2_at_val_threshold"):
        assert of_maps["metrics"][name] is None
    # The other way of naming a map, without the image's extension, in double precision.
    for path in maps.rglob("*.png.npy"):
        np.save(path.with_name(path.name.replace(".png", "")), np.load(path).astype(np.float64))
        path.unlink()
    evaluate.main(
        ["--score-maps", str(maps), "--split", "test", "--out", str(tmp_path / "r2.json"), *data_flags]
    )
    assert read_json(tmp_path / "r2.json") == of_maps


def test_score_maps_need_the_lists_alone(trained, tmp_path, fails):
    """No image, no data root, no train list: the numbers are the run's."""
    flags, run = trained
    evaluate.main([str(run), "--save-maps", str(tmp_path / "maps"), "--device", "cpu"])
    lists = tmp_path / "lists" / "tiny" / "test"
    shutil.copytree(tmp_path / "splits" / "tiny" / "test", lists)
    boxes = [
        line
        for line in (lists / "localization.txt").read_text().splitlines()
        if ".png," in line and "masks" not in line
    ]
    (lists / "localization.txt").write_text("\n".join(boxes))
    shutil.rmtree(tmp_path / "data")
    arguments = [
        "--score-maps",
        tmp_path / "maps",
        "--dataset",
        "tiny",
        "--splits",
        tmp_path / "lists",
        "--out",
        tmp_path / "r.json",
    ]
    arguments += ["--data-root", tmp_path / "nowhere"]
    evaluate.main([str(argument) for argument in arguments])
    assert read_json(tmp_path / "r.json")["curves"] == read_json(run / "results_best_test.json")["curves"]
    fails(evaluate.main, [*arguments, "--pictures", 1], "no such image", "--data-root")
    fails(evaluate.main, [*arguments, "--split", "val"], "no such folder")


@pytest.mark.parametrize("normalization", ["minmax", "max", "log"])
def test_a_fixed_threshold_is_a_fraction_of_each_map_s_maximum(trained, tmp_path, normalization):
    """Against a labeling of each float map at T * max, whatever the normalization leaves as its maximum."""
    flags, run = trained
    evaluate.main(
        [str(run), "--save-maps", str(tmp_path / "maps"), "--device", "cpu", "--normalize", normalization]
    )
    evaluate.main([str(run), "--threshold", "0.35", "--device", "cpu", "--normalize", normalization])
    suffix = "" if normalization == "minmax" else f"_{normalization}"
    fixed = read_json(run / f"results_best_test{suffix}.json")["metrics"]["fixed_threshold"]
    split = load_splits("tiny", tmp_path / "data", tmp_path / "splits", ("test",))[0]["test"]
    hits = []
    for index in range(9):
        v = plain_boxes.quantize(np.load(tmp_path / "maps" / f"{split.ids[index]}.npy")).astype(int)
        labels, n = ndimage.label(ndimage.binary_fill_holes(v > int(0.35 * v.max())), plain_boxes.EIGHT)
        box = (0, 0, 0, 0)
        if n:
            largest = plain_boxes.double_areas(labels, n).argmax()
            box = np.minimum(plain_boxes.extents(labels)[largest] + [0, 0, 1, 1], 63)
        truth = scale_boxes(split.boxes[index], tuple(split.sizes[index]), 64)
        hits.append(iou_matrix(np.array(box)[None], truth).max() >= 0.5)
    assert fixed["threshold"] == 0.35 and fixed["gt_known_loc"] == pytest.approx(100 * np.mean(hits))
    assert (
        fixed["top1_loc"] <= fixed["top5_loc"] == fixed["gt_known_loc"]
    )  # three classes: each is among five


def test_a_fixed_threshold_for_score_maps(tiny, tmp_path, capsys):
    """Each map is 0.6 in its image's box and 0.3 around it: a threshold between the two is right.

    log leaves a maximum below 1 (0.6 -> 0.968, 0.3 -> 0.925), of which T is a fraction."""
    split = load_splits("tiny", tmp_path / "data", tmp_path / "splits", ("test",))[0]["test"]
    for index, image in enumerate(split.ids):
        score_map = np.full((64, 64), 0.3)
        x0, y0, x1, y1 = scale_boxes(split.boxes[index], tuple(split.sizes[index]), 64)[0]
        score_map[y0:y1, x0:x1] = 0.6
        (tmp_path / "maps" / image).parent.mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / "maps" / f"{image}.npy", score_map)
    arguments = ["--score-maps", str(tmp_path / "maps"), "--out", str(tmp_path / "r.json")]
    for how, threshold, expected in (
        ("max", "0.45", 0),
        ("max", "0.55", 100),
        ("log", "0.95", 0),
        ("log", "0.97", 100),
    ):
        evaluate.main(
            [*arguments, "--normalize", how, *tiny[: tiny.index("--weights")], "--threshold", threshold]
        )
        fixed = read_json(tmp_path / "r.json")["metrics"]["fixed_threshold"]
        assert fixed == {
            "threshold": float(threshold),
            "gt_known_loc": expected,
            "top1_loc": None,
            "top5_loc": None,
        }
        assert (
            f"{expected:.2f}  largest contour, at the fixed threshold {threshold} of"
            in capsys.readouterr().out
        )


def test_results_and_per_image_lines_do_not_depend_on_workers(trained, tmp_path):
    flags, run = trained
    evaluate.main([str(run), "--save-maps", str(tmp_path / "maps"), "--device", "cpu", "--workers", "2"])
    written = []
    for workers in ("0", "1", "4", "4"):
        out, lines = tmp_path / f"r{len(written)}.json", tmp_path / f"r{len(written)}.csv"
        arguments = [
            "--score-maps",
            str(tmp_path / "maps"),
            "--out",
            str(out),
            "--per-image",
            str(lines),
            "--workers",
            workers,
        ]
        evaluate.main([*arguments, *flags[: flags.index("--weights")]])
        written.append((out.read_bytes(), lines.read_bytes()))
    assert len(set(written)) == 1


def test_per_image_lines_add_up_to_the_metrics(trained, tmp_path):
    _, run = trained
    evaluate.main([str(run), "--per-image", str(tmp_path / "lines.csv"), "--device", "cpu", "--workers", "2"])
    result = read_json(run / "results_best_test.json")
    with (tmp_path / "lines.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == [f"test/{i:02d}.png" for i in range(9)]
    for name, delta in (("30", 0.3), ("50", 0.5), ("70", 0.7), ("largest", 0.5)):
        share = 100 * sum(float(row[f"iou_{name}"]) >= delta for row in rows) / 9
        assert share == pytest.approx(result["curves"][name][round(result["thresholds"][name] * 255)])
    right = [row["label"] == row["predicted"] for row in rows]
    assert 100 * sum(right) / 9 == pytest.approx(result["metrics"]["top1_cls"])
    located = [float(row["iou_50"]) >= 0.5 and ok for row, ok in zip(rows, right)]
    assert 100 * sum(located) / 9 == pytest.approx(result["metrics"]["top1_loc"])
    # The printed box gives the printed IoU.
    for row in rows:
        split = (tmp_path / "splits" / "tiny" / "test" / "localization.txt").read_text().splitlines()
        truth = next(
            line.split(",")[1:] for line in split if line.startswith(row["id"]) and len(line.split(",")) == 5
        )
        sizes = (tmp_path / "splits" / "tiny" / "test" / "image_sizes.txt").read_text().splitlines()
        width, height = next(map(int, line.split(",")[1:]) for line in sizes if line.startswith(row["id"]))
        scaled = [int(int(value) * 64 / side) for value, side in zip(truth, (width, height, width, height))]
        iou = iou_matrix([[int(row[k]) for k in ("x0", "y0", "x1", "y1")]], [scaled])[0, 0]
        assert iou == pytest.approx(float(row["iou_largest"]), abs=1e-6)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_bad_mask_is_named_from_any_process(trained, fails, tmp_path, workers):
    _, run = trained
    mask = tmp_path / "data" / "tiny" / "masks" / "test_03.png"
    mask.write_bytes(mask.read_bytes()[:60])
    paths = ["--data-root", tmp_path / "data", "--splits", tmp_path / "splits"]
    fails(evaluate.main, [run, "--device", "cpu", "--workers", workers, *paths], mask)
    assert mask.name not in (run / "results_best_test.json").read_text()


def kill_own_process(_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_ends_the_evaluation_with_a_line():
    with pytest.raises(InputError, match="a worker process was killed .* --workers"):
        list(ordered_map(kill_own_process, range(50), 2))


def test_ordered_map_keeps_the_order_and_does_not_run_ahead():
    made = []

    def items():
        for i in range(40):
            made.append(i)
            yield i

    results = ordered_map(abs, items(), 2)
    assert next(results) == 0 and len(made) <= 9
    assert list(results) == list(range(1, 40))


def test_perfect_maps_get_a_hundred_and_maps_of_the_wrong_place_nothing(tiny, tmp_path):
    """The whole path from image sizes over scaled boxes to metrics, with maps that are known to be right."""
    data_flags = tiny[: tiny.index("--weights")]
    test = tmp_path / "splits" / "tiny" / "test"
    sizes = {
        image: (int(w), int(h))
        for image, w, h in (line.split(",") for line in (test / "image_sizes.txt").read_text().split())
    }
    boxes = [
        line.split(",")
        for line in (test / "localization.txt").read_text().split()
        if len(line.split(",")) == 5
    ]
    for image, *box in boxes:
        x0, y0, x1, y1 = (int(v) * 64 // n for v, n in zip(box, sizes[image] * 2))
        right, wrong = np.zeros((2, 64, 64), dtype=np.float32)
        right[y0:y1, x0:x1], wrong[-3:, -3:] = 1, 1  # the box of a component ends one pixel after it
        for folder, score_map in (("right", right), ("wrong", wrong)):
            path = tmp_path / folder / f"{image}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, score_map)
    for folder, expected in (("right", 100.0), ("wrong", 0.0)):
        out = tmp_path / f"{folder}.json"
        evaluate.main(["--score-maps", str(tmp_path / folder), "--out", str(out), *data_flags])
        metrics = read_json(out)["metrics"]
        assert metrics["max_box_acc_v2"] == {"30": expected, "50": expected, "70": expected, "mean": expected}
        assert metrics["max_box_acc"] == expected


def test_same_seed_same_run_and_workers_do_not_matter(trained, tmp_path):
    flags, run = trained
    train.main([*flags, "--workers", "2", "--out", str(tmp_path / "again")])
    assert same_run(run, tmp_path / "again")
    train.main([*flags, "--seed", "1", "--out", str(tmp_path / "other")])
    assert lines_of(run) != lines_of(tmp_path / "other")


@pytest.mark.parametrize("workers", ["0", "2"])
def test_resumed_equals_uninterrupted(trained, tmp_path, workers):
    flags, run = trained
    train.main([*flags, "--epochs", "1", "--workers", workers, "--out", str(tmp_path / "half")])
    assert not same_log(run, tmp_path / "half")
    with (tmp_path / "half" / "log.jsonl").open("a") as log:  # as after a crash between log and checkpoint
        log.write('{"epoch": 2, "loss": 9}\n')
    train.main([*flags, "--epochs", "2", "--workers", workers, "--out", str(tmp_path / "half"), "--resume"])
    assert same_run(run, tmp_path / "half")


def same_log(a, b):
    return lines_of(a) == lines_of(b)


def test_resume_with_nothing_to_resume_starts_and_with_everything_done_evaluates(trained, tmp_path):
    flags, run = trained
    train.main([*flags, "--out", str(tmp_path / "new"), "--resume"])
    assert same_run(run, tmp_path / "new")
    before = (run / "last.pt").read_bytes()
    train.main([*flags, "--out", str(run), "--resume"])
    assert same_run(run, tmp_path / "new") and (run / "last.pt").read_bytes() == before


def test_vanilla_runs_through_the_same_path(tiny, tmp_path):
    run = tmp_path / "cam"
    train.main([*tiny, "--method", "cam", "--out", str(run)])
    for line in lines_of(run):
        assert line["loss"] == line["l_ce"] and not {"l_drop", "l_sim", "l_norm"} & line.keys()
    result = read_json(run / "results_best_test.json")
    assert result["method"] == "cam" and result["metrics"]["max_box_acc_v2"]["mean"] is not None


def test_each_loss_changes_the_run_and_only_after_the_warm_stage(tiny, tmp_path):
    runs = {}
    for name, flags in {
        "all": [],
        "no sim": ["--lambda-sim", "0"],
        "no norm": ["--lambda-norm", "0"],
    }.items():
        runs[name] = tmp_path / name.replace(" ", "_")
        train.main([*tiny, "--out", str(runs[name]), *flags])
    for name in ("no sim", "no norm"):
        assert lines_of(runs["all"])[0] == lines_of(runs[name])[0]
        a, b = weights(runs["all"] / "last.pt"), weights(runs[name] / "last.pt")
        assert not torch.equal(a["conv6.0.weight"], b["conv6.0.weight"])


def test_batch_size_changes_after_the_warm_stage(tiny, tmp_path, monkeypatch):
    sizes = []
    whole = train.train_one_epoch
    monkeypatch.setattr(
        train, "train_one_epoch", lambda *a: sizes.append((a[2], a[1].batch_sampler.batch_size)) or whole(*a)
    )
    train.main([*tiny, "--out", str(tmp_path / "run")])
    train.main([*tiny, "--batch-size", "6", "--out", str(tmp_path / "both")])
    assert sizes == [(1, 4), (2, 8), (1, 6), (2, 6)]


def test_best_is_the_epoch_with_the_best_val(tiny, tmp_path):
    run = tmp_path / "run"
    train.main([*tiny, "--epochs", "5", "--lr", "0.02", "--out", str(run)])
    scores = [line["val"]["max_box_acc_v2"]["mean"] for line in lines_of(run)]
    assert len(set(scores)) > 1
    assert torch.load(run / "best.pt", weights_only=True)["epoch"] == 1 + int(np.argmax(scores))
    assert torch.load(run / "last.pt", weights_only=True)["epoch"] == 5
    best, last = (read_json(run / f"results_{which}_test.json") for which in ("best", "last"))
    assert (best["checkpoint"], last["checkpoint"]) == ("best", "last") and last["epoch"] == 5 != best[
        "epoch"
    ] == 1 + int(np.argmax(scores))
    evaluate.main([str(run), "--checkpoint", "last", "--device", "cpu", "--batch-size", "8"])
    assert read_json(run / "results_last_test.json") == last and last["curves"] != best["curves"]


def test_evaluation_is_as_precise_as_its_run_unless_told_otherwise(trained, monkeypatch):
    _, run = trained
    checkpoint, used, autocast = load_tensors(run / "best.pt"), [], utils.autocast
    monkeypatch.setattr(evaluation, "autocast", lambda device, amp: used.append(amp) or autocast(device, amp))
    for of_run, flags, expected in (
        ("off", [], "off"),
        ("bf16", [], "bf16"),
        ("bf16", ["--amp", "off"], "off"),
    ):
        save_checkpoint(run / "best.pt", checkpoint | {"config": checkpoint["config"] | {"amp": of_run}})
        evaluate.main([str(run), "--device", "cpu", "--workers", "0", *flags])
        assert set(used) == {expected}
        used.clear()


def test_val_every_skips_epochs_but_not_the_last(tiny, tmp_path):
    train.main([*tiny, "--epochs", "3", "--val-every", "2", "--out", str(tmp_path / "run")])
    assert ["val" in line for line in lines_of(tmp_path / "run")] == [False, True, True]


def test_weights_of_a_run_start_another(trained, tmp_path):
    flags, run = trained
    train.main([*flags, "--weights", str(run / "best.pt"), "--epochs", "1", "--out", str(tmp_path / "next")])
    assert lines_of(tmp_path / "next")[0] != lines_of(run)[0]


def test_pictures_and_own_images(trained, tmp_path):
    _, run = trained
    evaluate.main([str(run), "--pictures", "2", "--device", "cpu", "--workers", "0"])
    pictures = sorted((run / "pictures_best_test").iterdir())
    assert [path.name for path in pictures] == ["test_00.png", "test_08.png"]
    assert Image.open(pictures[0]).size == (64, 128)
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("L", (300, 100), 80).save(photos / "grey.jpg")
    Image.effect_noise((50, 200), 90).convert("RGBA").save(photos / "noise.png")
    evaluate.main([str(run), "--images", str(photos), "--device", "cpu"])
    found = read_json(run / "images" / "boxes.json")
    assert [(entry["width"], entry["height"]) for entry in found] == [(300, 100), (50, 200)]
    for entry in found:
        x0, y0, x1, y1 = entry["box"]
        assert 0 <= x0 <= x1 < entry["width"] and 0 <= y0 <= y1 < entry["height"]
        assert sum(k["probability"] for k in entry["top5"]) == pytest.approx(1)


def test_boxes_of_test_images_and_the_time_at_the_end(tiny, tmp_path, capsys):
    run = tmp_path / "run"
    train.main([*tiny, "--epochs", "1", "--pictures", "2", "--out", str(run)])
    printed = capsys.readouterr().out
    assert f"boxes of 2 test images drawn in {run / 'boxes_test.png'}" in printed
    drawn = json.loads((run / "boxes_test.json").read_text())["boxes"]
    assert len(drawn) == 2 and all(entry["image"].startswith("test/") for entry in drawn)
    assert Image.open(run / "boxes_test.png").width > 2 * 224
    stage = r"[a-z ]+ 0h\d\dm\d\ds"
    assert re.search(rf"^time: {stage}, training 0h\d\dm\d\ds, evaluation 0h\d\dm\d\ds$", printed, re.M)
    assert "README" not in printed  # the commands for its picture follow the demo's run only


def test_boxes_are_drawn_on_images_that_have_them(tiny, tmp_path):
    boxes = tmp_path / "splits" / "tiny" / "test" / "localization.txt"
    kept = [line for line in boxes.read_text().splitlines() if line.startswith(("test/02", "test/05"))]
    boxes.write_text("\n".join(kept))
    run = tmp_path / "run"
    train.main([*tiny, "--epochs", "1", "--pictures", "6", "--out", str(run)])
    drawn = read_json(run / "boxes_test.json")["boxes"]
    assert [entry["image"] for entry in drawn] == ["test/02.png", "test/05.png"]


def test_own_images_of_any_name_leave_their_boxes(trained, tmp_path, monkeypatch):
    """An error in the middle, for example Ctrl-C, keeps what was found."""
    _, run = trained
    names = [b"\xff.png", "\u00e9".encode() * 100 + b".png", b"z.png"]
    photos = os.fsencode(tmp_path / "photos")
    os.mkdir(photos)
    for name in names:
        Image.effect_noise((50, 80), 90).save(os.fsdecode(photos + b"/" + name))
    with utils.one_line_errors():
        evaluate.main([str(run), "--images", os.fsdecode(photos), "--device", "cpu"])
    found = read_json(run / "images" / "boxes.json")
    assert len(found) == 3 and len(list((run / "images").glob("*.png"))) == 3
    seen, whole = [], evaluation.Localizer.__call__

    def stop(self, image):
        seen.append(image)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return whole(self, image)

    monkeypatch.setattr(evaluation.Localizer, "__call__", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate.main([str(run), "--images", os.fsdecode(photos), "--device", "cpu", "--out", "half"])
    assert read_json(Path("half") / "boxes.json") == found[:2]


def test_other_normalizations_get_their_own_thresholds_and_file(trained):
    _, run = trained
    evaluate.main([str(run), "--normalize", "ivr", "--device", "cpu", "--workers", "0"])
    result = read_json(run / "results_best_test_ivr.json")
    assert result["normalize"] == "ivr" and result["metrics"]["max_box_acc_v2_at_val_threshold"] is not None


# ------------------------------------------------------------------------------------------ bad input


def test_bad_input_to_train(tiny, fails, tmp_path):
    (tmp_path / "file").write_text("")
    out = ["--out", tmp_path / "run"]
    fails(
        train.main,
        [*tiny, *out, "--data-root", tmp_path / "nowhere"],
        "--data-root",
        tmp_path / "nowhere",
        "no such folder",
    )
    fails(train.main, [*tiny, *out, "--splits", tmp_path / "nowhere"], "--splits DIR")
    fails(
        train.main,
        [*tiny, *out, "--dataset", "OpenImages", "--arch", "resnet50"],
        "--dataset OpenImages --arch resnet50: no preset",
    )
    fails(train.main, [*tiny, *out, "--arch", "vgg19"], "--arch")
    fails(train.main, [*tiny, "--out", tmp_path / "file" / "run"], tmp_path / "file", "cannot be")
    fails(train.main, [*tiny, *out, "--device", "tpu9"], "--device tpu9", "--device cpu")
    for flag, value in (
        ("--epochs", 0),
        ("--lr", "nan"),
        ("--lr", "much"),
        ("--p", 1.5),
        ("--tau-fg", -1),
        ("--batch-size", 0),
        ("--val-per-class", 0),
    ):
        fails(train.main, [*tiny, *out, flag, value], flag, value)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_where_there_is_none(tiny, fails, tmp_path):
    fails(
        train.main,
        [*tiny, "--device", "cuda", "--out", tmp_path / "run"],
        "--device cuda",
        "pass --device cpu",
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "file, line, broken, words",
    [
        ("class_labels", 2, "train/01.png,1,2", "3 comma-separated fields"),
        ("class_labels", 2, "train/01.png,-1", "label -1 is out of range"),
        ("localization", 1, "train/00.png,9,9,3,12", "box 9,9,3,12"),
    ],
)
def test_bad_split_lines_end_training(tiny, fails, tmp_path, file, line, broken, words):
    path = tmp_path / "splits" / "tiny" / "train" / f"{file}.txt"
    lines = path.read_text().splitlines()
    lines[line - 1] = broken
    path.write_text("\n".join(lines))
    fails(train.main, [*tiny, "--out", tmp_path / "run"], f"{path}:{line}: ", words)


def test_a_test_label_that_train_does_not_have(tiny, fails, tmp_path):
    path = tmp_path / "splits" / "tiny" / "test" / "class_labels.txt"
    path.write_text(path.read_text().replace("test/04.png,1", "test/04.png,3"))
    fails(train.main, [*tiny, "--out", tmp_path / "run"], f"{path}:5: ", "label 3 is out of range", "0 to 2")


def test_an_existing_run_is_refused_and_untouched(trained, fails):
    flags, run = trained
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    fails(train.main, [*flags, "--out", run], run, "--resume")
    fails(train.main, [*flags, "--out", run, "--resume", "--lr", 0.5], "--lr 0.5", "0.004")
    fails(train.main, [*flags, "--out", run, "--resume", "--arch", "resnet50"], "--arch resnet50", "vgg16")
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_a_run_whose_loss_is_not_finite_stops_and_keeps_its_checkpoint(trained, fails):
    flags, run = trained
    checkpoint = torch.load(run / "last.pt", weights_only=True)
    checkpoint["model"]["fc.bias"][0] = float("nan")
    torch.save(checkpoint, run / "last.pt")
    before = (run / "last.pt").read_bytes()
    fails(
        train.main,
        [*flags, "--out", run, "--resume", "--epochs", 3],
        "non-finite loss in epoch 3",
        "l_ce nan",
    )
    assert (run / "last.pt").read_bytes() == before


def test_bad_checkpoints(trained, fails, tmp_path):
    _, run = trained
    fails(evaluate.main, [tmp_path / "nowhere"], "best.pt", "no such checkpoint")
    for name, damage in (
        ("cut", lambda b: b[: len(b) // 2]),
        ("empty", lambda b: b""),
        ("noise", lambda b: bytes(reversed(b))),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "best.pt").write_bytes(damage((run / "best.pt").read_bytes()))
        fails(evaluate.main, [tmp_path / name], tmp_path / name / "best.pt", "damaged")
    torch.save({"something": 1}, tmp_path / "empty" / "best.pt")
    fails(evaluate.main, [tmp_path / "empty"], "not a checkpoint of train.py")


def test_thresholds_of_other_weights_are_not_used(trained, capsys):
    """As after `--val-every 2` in an odd epoch: last.pt has the thresholds of the epoch before."""
    _, run = trained
    argv = [str(run), "--checkpoint", "last", "--device", "cpu", "--workers", "0"]
    evaluate.main(argv)
    before = capsys.readouterr().out
    checkpoint = torch.load(run / "last.pt", weights_only=True)
    box = evaluation.Localizer(run, "cpu", checkpoint="last").threshold
    assert checkpoint["val"]["levels"]["largest"] != 254
    checkpoint["val"] |= {"epoch": 1, "levels": dict.fromkeys(checkpoint["val"]["levels"], 254)}
    torch.save(checkpoint, run / "last.pt")
    evaluate.main(argv)
    assert capsys.readouterr().out == before and "at the thresholds chosen on val" in before
    assert evaluation.Localizer(run, "cpu", checkpoint="last").threshold == box


def test_val_is_not_needed_where_its_thresholds_are_known(trained, tmp_path):
    _, run = trained
    shutil.rmtree(tmp_path / "data" / "tiny" / "val")
    evaluate.main([str(run), "--device", "cpu", "--workers", "0"])


@pytest.mark.parametrize("name", ["train", "val"])
def test_a_run_goes_on_with_the_lists_it_began_with(trained, fails, tmp_path, name):
    flags, run = trained
    labels = tmp_path / "splits" / "tiny" / name / "class_labels.txt"
    other = {"0": "1", "1": "0", "2": "2"}
    lines = [line.split(",") for line in labels.read_text().splitlines()]
    labels.write_text("".join(f"{image},{other[label]}\n" for image, label in lines))
    before = (run / "last.pt").read_bytes()
    argv = [*flags, "--out", run, "--resume", "--epochs", "3"]
    fails(train.main, argv, f"the list of {name} has changed", "--out")
    assert (run / "last.pt").read_bytes() == before


@pytest.mark.parametrize(
    "part", ["optimizer", "random_states", "sources", "config", "val", "num_classes", "progress", "best"]
)
def test_a_wrong_checkpoint_to_resume_is_one_line(trained, fails, part):
    flags, run = trained
    checkpoint = torch.load(run / "last.pt", weights_only=True)
    for wrong in ("text", {"state": {}}, ...):
        damaged = {name: value for name, value in checkpoint.items() if name != part}
        damaged |= {} if wrong is ... else {part: wrong}
        if part in ("best", "progress", "sources") and isinstance(wrong, dict):
            continue
        torch.save(damaged, run / "last.pt")
        argv = [*flags, "--out", run, "--resume", "--epochs", "3"]
        fails(train.main, argv, run / "last.pt", "not a checkpoint of train.py")


def test_a_checkpoint_of_another_architecture_or_class_count(trained, fails, tmp_path):
    _, run = trained
    for name, change, words in (
        ("arch", lambda c: c["config"].update(arch="resnet50", width=1.0), "another architecture"),
        ("classes", lambda c: c.update(num_classes=5), "another number of classes"),
    ):
        checkpoint = torch.load(run / "best.pt", weights_only=True)
        change(checkpoint)
        (tmp_path / name).mkdir()
        torch.save(checkpoint, tmp_path / name / "best.pt")
        fails(evaluate.main, [tmp_path / name, "--device", "cpu"], tmp_path / name / "best.pt", words)
    # The same data set with one class fewer.
    splits = tmp_path / "splits2"
    shutil.copytree(tmp_path / "splits", splits)
    for path in splits.rglob("*.txt"):
        numbers = [f"{i:02d}.png" for i in range(2, 30, 3)]
        path.write_text(
            "".join(
                f"{line}\n"
                for line in path.read_text().splitlines()
                if line.split(",")[0][-6:] not in numbers
            )
        )
    fails(evaluate.main, [run, "--splits", splits, "--device", "cpu"], "3 classes", "has 2")


def test_bad_score_maps(tiny, fails, tmp_path):
    data_flags = tiny[: tiny.index("--weights")]
    maps = tmp_path / "maps"
    arguments = ["--score-maps", maps, *data_flags, "--out", tmp_path / "r.json"]
    fails(evaluate.main, arguments, maps, "no such folder")
    (maps / "test").mkdir(parents=True)
    for i in range(9):
        np.save(maps / "test" / f"{i:02d}.png.npy", np.random.default_rng(i).random((7, 9)))
    path = maps / "test" / "05.png.npy"
    good = np.load(path)
    cases = {
        "holds NaN": np.where(good > 0.5, np.nan, good),
        "values in [0.": good + 0.7,
        "values in [-": good - 0.7,
        "2-D array": good[None],
        "holds floats": good.astype(str),
    }
    for words, bad in cases.items():
        np.save(path, bad)
        fails(evaluate.main, arguments, path, words)
    np.savez(tmp_path / "z.npz", good)
    for blob in (b"", path.read_bytes()[:100], b"text", (tmp_path / "z.npz").read_bytes()):
        path.write_bytes(blob)
        fails(evaluate.main, arguments, path)
    np.save(path, np.array([[{"an": "object"}]]), allow_pickle=True)
    fails(evaluate.main, arguments, path, "not a .npy array")
    path.unlink()
    fails(evaluate.main, arguments, path, "no score map for test/05.png")
    assert not (tmp_path / "r.json").exists()
    np.save(path, good)
    evaluate.main([str(argument) for argument in arguments])
    assert read_json(tmp_path / "r.json")["images"] == 9


def test_how_many_images_have_boxes_is_said(tiny, tmp_path, capsys, fails):
    split = load_splits("tiny", tmp_path / "data", tmp_path / "splits", ("test",))[0]["test"]
    for image in split.ids:
        (tmp_path / "maps" / image).parent.mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / "maps" / f"{image}.npy", np.zeros((8, 8)))
    boxes = tmp_path / "splits" / "tiny" / "test" / "localization.txt"
    kept = [x for x in boxes.read_text().splitlines() if "masks" not in x and x < "test/03"]
    argv = ["--score-maps", str(tmp_path / "maps"), *tiny[: tiny.index("--weights")], "--out", "r.json"]
    boxes.write_text("\n".join(kept))
    evaluate.main(argv)
    assert "9 images, 3 with boxes (percent)" in capsys.readouterr().out
    result = read_json(Path("r.json"))
    assert (result["images"], result["images_with_boxes"]) == (9, 3) and "images_with_masks" not in result
    boxes.unlink()
    Path("r.json").unlink()
    fails(evaluate.main, argv, "tiny test: no boxes, masks or logits", "nothing to measure")
    assert not Path("r.json").exists()


def test_a_map_for_two_images_is_refused_and_each_percentile_has_its_file(tiny, tmp_path, fails):
    splits, where = tmp_path / "splits" / "tiny" / "test", tiny[: tiny.index("--weights")]
    for path in splits.glob("*.txt"):
        path.write_text(path.read_text().replace("test/01.png", "test/00.jpg"))
    split = load_splits("tiny", tmp_path / "data", tmp_path / "splits", ("test",), lists_only=True)[0]["test"]
    (tmp_path / "maps" / "test").mkdir(parents=True)
    for image in split.ids:
        np.save((tmp_path / "maps" / image).with_suffix(".npy"), np.random.rand(8, 8))
    argv = ["--score-maps", str(tmp_path / "maps"), *where]
    fails(evaluate.main, argv, "test/00.png.npy", "in the suffix only", "whole ids")
    for image in ("test/00.png", "test/00.jpg"):
        np.save(tmp_path / "maps" / f"{image}.npy", np.random.rand(8, 8))
    for q in ("0.2", "0.6"):
        evaluate.main([*argv, "--normalize", "ivr", "--percentile", q])
        assert Path(f"results_maps_test_ivr_{q}.json").exists()


def test_a_result_replaces_files_only(trained, tmp_path, fails):
    _, run = trained
    os.mkfifo(tmp_path / "pipe")
    fails(evaluate.main, [run, "--device", "cpu", "--out", tmp_path / "pipe"], "pipe", "not a regular file")
    assert (tmp_path / "pipe").is_fifo()


def test_a_name_that_no_file_can_have_is_one_line(trained, fails):
    """An OSError, as for a folder without permission, which a test that runs as root cannot have."""
    _, run = trained
    fails(evaluate.main, ["x" * 300], "x" * 300, "File name too long")
    fails(evaluate.main, [run, "--images", "y" * 300, "--device", "cpu"], "y" * 300, "File name too long")


def test_contradicting_flags_of_evaluate(fails, tmp_path):
    for flag in (["--save-maps", "maps"], ["--per-image", "x.csv"], ["--pictures", "3"]):
        fails(evaluate.main, [tmp_path, "--images", tmp_path, *flag], flag[0], "--images")
    fails(evaluate.main, [], "RUN", "--score-maps")
    fails(evaluate.main, ["--score-maps", tmp_path], "--dataset")
    fails(evaluate.main, ["run", "--dataset", "CUB"], "--dataset")
    fails(evaluate.main, ["run", "--batch-size", 0], "--batch-size")


def test_the_scripts_themselves_end_with_one_line_and_exit_code_2(tmp_path):
    commands = [["train.py", "--dataset", "CUB", "--data-root", "nowhere"], ["evaluate.py", "nowhere"]]
    started = [
        subprocess.Popen(
            [sys.executable, REPOSITORY / script, *arguments], stderr=subprocess.PIPE, text=True, cwd=tmp_path
        )
        for script, *arguments in commands
    ]
    for process in started:
        said = process.communicate()[1]
        assert process.returncode == 2 and said.count("\n") == 1 and "nowhere" in said


# ------------------------------------------------------------------------------------------ real birds


@pytest.mark.parametrize("method", ["bridge", pytest.param("cam", marks=pytest.mark.slow)])
def test_ten_classes_of_cub(real_data, tiny_preset, tmp_path, method):
    flags = [
        "--data-root",
        real_data,
        "--splits",
        tmp_path / "splits",
        "--weights",
        "none",
        "--epochs",
        2,
        "--warm-epochs",
        1,
    ]
    run = tmp_path / "run"
    train.main(
        [
            str(x)
            for x in [
                "--dataset",
                "CUB",
                "--arch",
                "vgg16",
                "--method",
                method,
                *flags,
                "--out",
                run,
                "--device",
                "cpu",
            ]
        ]
    )
    evaluate.main([str(run), "--device", "cpu"])
    result = read_json(run / "results_best_test.json")
    assert result["images"] == 243 and result["metrics"]["pxap"] is None
    assert 0 < result["metrics"]["max_box_acc_v2"]["mean"] < 100
    assert "a subset" in read_json(run / "config.json")["data"]["lists"]
