"""evaluate.py on the small data set: maps, thresholds, results, own images, one line for bad input."""

import csv
import multiprocessing
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
from conftest import lines_of, load, results, run
from PIL import Image
from test_baselines import make
from test_models import as_saved
from test_train import NO_VAL, edit, interrupt

from bridge_wsol import cam, evaluation
from bridge_wsol.boxes import iou_matrix, scale_boxes
from bridge_wsol.data import Split, eval_loader, to_input
from bridge_wsol.datasets import load_split
from bridge_wsol.localize import Localizer
from bridge_wsol.metrics import label_ranks
from bridge_wsol.models import build_network
from bridge_wsol.utils import one_line_errors

EVALUATE = "--device cpu --workers 0 --batch-size 8"


def test_ivr_s_percentile_is_the_lowest_that_fits_all_maps():
    """By hand: one map needs its noise of 0.5 removed, the other its object of 0.3 kept. No single threshold
    does both.
    """
    noisy, faint = np.zeros((2, 10, 10), dtype=np.float32)
    noisy.flat[34:] = 0.5  # the quantiles from 0.35 on are 0.5
    noisy[7:, 2:6] = 1  # the object: columns 2 to 5, rows 7 to 9
    faint.flat[48:] = 0.3  # the quantiles up to 0.45 are 0
    faint[7, 4] = 1
    boxes = {0: np.array([[2, 7, 5, 9]]), 1: np.array([[0, 4, 9, 9]])}
    split = Split("val", Path(), ["noisy", "faint"], np.zeros(2, dtype=np.int64), np.full((2, 2), 10), boxes)
    opened = object.__new__(evaluation.TrainedRun)
    opened.maps = lambda *_: [evaluation.MapBatch([0, 1], np.stack([noisy, faint]))]
    opened.split, opened.state, opened.workers = lambda _: split, {"val": None, "epoch": 1}, 0
    opened.config, opened.method = SimpleNamespace(image_size=10), SimpleNamespace(upsampling="bilinear")
    chosen = opened.choose("ivr", "val")
    assert chosen.percentile == 0.35 and chosen.scores["by"] == "MaxBoxAccV2"
    scores = {q: 100.0 if q in (0.35, 0.4, 0.45) else 50.0 for q in evaluation.QS}
    assert chosen.scores["scores"] == scores


def test_ivr_s_percentile_and_thresholds_are_chosen_on_val(trained):
    folder, flags = trained[1], f"{trained[1]} --device cpu --workers 0 --normalize ivr"
    run("evaluate", f"{flags} --percentile val")
    chosen = results(folder, "results_best_test_ivr_val.json")
    q, scores = chosen["percentile"]["value"], chosen["percentile"]["scores"]
    assert [float(key) for key in scores] == [round(0.05 * i, 2) for i in range(1, 15)]
    for key in ("0.05", "0.45", str(q)):
        run("evaluate", f"{flags} --percentile {key} --split val")
        on_val = results(folder, f"results_best_val_ivr_{key}.json")
        assert on_val["metrics"]["max_box_acc_v2"]["mean"] == scores[key]
    run("evaluate", f"{flags} --split val")  # the default is 0.45
    assert results(folder, "results_best_val_ivr.json") == results(folder, "results_best_val_ivr_0.45.json")
    assert q == min(float(key) for key in scores if scores[key] == max(scores.values()))
    run("evaluate", f"{flags} --percentile {q}")
    given = results(folder, f"results_best_test_ivr_{q}.json")
    assert given.pop("percentile") == {"value": q} and chosen.pop("percentile") and given == chosen
    at_val = given["metrics"]["max_box_acc_v2_at_val_threshold"]
    assert all(at_val[d] == given["curves"][d][on_val["levels"][d]] for d in ("30", "50", "70"))


def test_bad_percentiles_and_a_val_without_boxes(trained, fails, tmp_path):
    for flags in (
        "--normalize max --percentile 0.5",
        "--normalize pas --percentile val",
        "--normalize ivr --percentile 1",
    ):
        fails("evaluate", f"{trained[1]} {flags}", "percentile")
    flags = f"{trained[1]} {EVALUATE} --lists {tmp_path}/lists --normalize ivr --percentile val"
    val, test = (tmp_path / "lists" / "tiny" / name / "localization.txt" for name in ("val", "test"))
    for path in (val, test):
        path.write_text("".join(x for x in path.read_text().splitlines(keepends=True) if "masks" in x))
    run("evaluate", f"{flags} --out {tmp_path}/masks.json")
    assert results(tmp_path, "masks.json")["percentile"]["by"] == "PxAP"
    val.unlink()
    fails("evaluate", flags, "percentile val", "neither boxes nor masks")
    # A percentile that was given stays where val has no boxes, or is not there.
    opened = [
        evaluation.TrainedRun(trained[1], device="cpu", lists=tmp_path / name) for name in ("lists", "no")
    ]
    assert [run.choose("ivr", 0.2)[:2] for run in opened] == [(None, 0.2)] * 2


def test_another_map_of_a_trained_run(tiny, tmp_path, fails):
    """The map values of evaluate.py: metrics and val's thresholds of a run that was trained with them."""
    expected, joint = {}, tmp_path / "joint"
    for value in ("joint", "location"):
        run("train", f"{tiny} --method calm --calm-map {value} --epochs 1 --out {tmp_path}/{value}")
        expected[value] = results(tmp_path / value, "results_last_test.json")
    run("evaluate", f"{joint} {EVALUATE} --checkpoint last --calm-map location")
    found = results(joint, "results_last_test_calm_map=location.json")
    for result in (found, *expected.values()):
        result.pop("fingerprint")
    assert found.pop("calm_map") == "location" and found == expected["location"] != expected["joint"]
    assert found["metrics"]["max_box_acc_v2_at_val_threshold"] is not None
    assert results(joint, "results_last_test.json")["metrics"] == expected["joint"]["metrics"]
    other = evaluation.TrainedRun(joint, "last", "cpu", map_options={"calm_map": "location"}).choose()
    levels = [evaluation.TrainedRun(tmp_path / x, "last", "cpu").choose().levels for x in expected]
    assert other.levels == levels[1] != levels[0]
    ivr = evaluation.TrainedRun(joint, "last", "cpu").choose(
        "ivr", "val"
    )  # CALM upscales its map its own way
    run(
        "evaluate",
        f"{joint} {EVALUATE} --checkpoint last --split val --normalize ivr --percentile {ivr.percentile}",
    )
    on_val = results(joint, f"results_last_val_ivr_{ivr.percentile}.json")
    assert on_val["metrics"]["max_box_acc_v2"]["mean"] == ivr.scores["scores"][ivr.percentile]
    assert on_val["levels"] == ivr.levels
    fails("evaluate", f"{joint} --calm-map sum", "--calm-map", "sum")
    fails("evaluate", f"{joint} --pas-nwc off", "pas_nwc", "method calm")
    for flags in (f"{joint} --images a.jpg", f"--score-maps {tmp_path} --dataset tiny"):
        fails("evaluate", f"{flags} --calm-map joint", "values of a map")


@pytest.mark.parametrize("dtype, rank", [(torch.float64, 1), (torch.bfloat16, 0)])
def test_classes_are_ranked_in_the_logits_own_precision(dtype, rank):
    """The first two are equal in float32 and bf16. Of equal logits, the lower class ranks first."""

    class Method(torch.nn.Linear):
        config, upsampling = SimpleNamespace(image_size=8), "bilinear"

        def predict(self, images, labels):
            return torch.tensor([[1.0, 1 + 1e-12, 0.5]], dtype=torch.float64).to(dtype), torch.zeros(1, 4, 4)

    loader = [(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.tensor([0]), torch.tensor([0]))]
    (batch,) = evaluation.network_maps(Method(1, 1), loader, amp="off")
    assert label_ranks(batch.logits, np.array([0])).tolist() == [rank]


@pytest.mark.parametrize("name, mode", [("adl", "bicubic"), ("calm", "bilinear")])
def test_maps_of_a_run_are_made_in_eval_mode_and_resized_as_the_method_wants(name, mode):
    labels = torch.tensor([2, 0])
    method, pixels = make(name, dtype=torch.float32, image_size=56), torch.arange(2 * 3 * 64 * 64) % 251
    pixels = pixels.to(torch.uint8).view(2, 3, 64, 64)
    (batch,) = evaluation.network_maps(method.train(), [(pixels, labels, torch.arange(2))], amp="off")
    with torch.no_grad():
        logits, maps = method.eval().predict(to_input(pixels, torch.device("cpu")), labels)
    np.testing.assert_allclose(batch.logits, logits.numpy(), rtol=1e-5, atol=1e-6)
    large = nnf.interpolate(maps[:, None], 56, mode=mode)[:, 0]
    np.testing.assert_allclose(batch.maps, cam.normalize(large).numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_evaluate_a_file_of_other_code(tiny, tmp_path, fails):
    torch.manual_seed(0)
    net = build_network("vgg16", 3, stride=8)
    torch.save(net.state_dict(), tmp_path / "ours.pth")
    torch.save({"state_dict": as_saved(net.state_dict(), "authors8")}, tmp_path / "theirs.pth")
    flags = f"--dataset tiny --arch vgg16 --data-root {tmp_path}/data --lists {tmp_path}/lists --device cpu"
    fails("evaluate", f"{tmp_path}/ours.pth {flags}", "ours.pth", "--stride")  # our names do not tell it
    fails("evaluate", f"{tmp_path}/theirs.pth {flags} --stride 16", "--stride 16", "say 8")
    run("evaluate", f"{tmp_path}/ours.pth {flags} --stride 8 --out {tmp_path}/ours.json")
    run("evaluate", f"{tmp_path}/theirs.pth {flags}")
    ours, theirs = results(tmp_path, "ours.json"), results(tmp_path, "results_theirs_test.json")
    assert theirs["metrics"]["max_box_acc_v2_at_val_threshold"] is not None
    assert all(ours[key] == theirs[key] for key in ("metrics", "levels", "curves", "images"))


def test_a_file_of_another_network_is_described(tmp_path, fails, tiny):
    flags = f"--dataset tiny --arch vgg16 --data-root {tmp_path}/data --lists {tmp_path}/lists"
    torch.save({"state_dict": {"SPG_A_1.0.weight": torch.zeros(3)}}, tmp_path / "spg.pth")
    fails("evaluate", f"{tmp_path}/spg.pth {flags}", "spg.pth", "conv6 and fc", "SPG_A_1.0.weight")
    fails("evaluate", f"{tmp_path}/spg.pth --dataset tiny", "--arch")


@pytest.mark.parametrize("end", ["pipe", "full disk"])
def test_results_are_written_where_the_output_ends(trained, tmp_path, end):
    """In a fork, whose standard output is a pipe without a reader, or a full disk."""
    flags = f"{trained[1]} --out {tmp_path}/r.json --data-root {tmp_path}/data --lists {tmp_path}/lists"

    def evaluate():
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer if end == "pipe" else os.open("/dev/full", os.O_WRONLY), 1)
        with open(1, "w", 1) as sys.stdout, (tmp_path / "err").open("w") as sys.stderr, one_line_errors():
            run("evaluate", f"{flags} {EVALUATE} --quiet")

    process = multiprocessing.get_context("fork").Process(target=evaluate)
    process.start()
    process.join()
    said = (tmp_path / "err").read_text()
    assert process.exitcode == 2 and said.count("\n") == 1 and "output" in said
    assert results(tmp_path, "r.json")["metrics"] == results(trained[1])["metrics"]


@pytest.fixture
def split(trained, tmp_path):
    """The small data set's test split, in tmp_path."""
    return load_split("tiny", "test", tmp_path / "data", tmp_path / "lists")


# ---- the numbers of a run, and of score maps
def test_evaluate_repeats_the_numbers_of_training(trained, where):
    _, folder = trained
    before = results(folder)
    # Older versions of torch round other batch sizes differently. Workers change nothing.
    run("evaluate", f"{folder} --device cpu --batch-size 8 --workers 2 {where}")
    assert results(folder) == before
    run("evaluate", f"{folder} --checkpoint last --split val --device cpu --batch-size 8 {where}")
    assert results(folder, "results_last_val.json")["metrics"] | NO_VAL == lines_of(folder)[-1]["val"]


def test_maps_are_the_ground_truth_class_s_from_one_forward_pass(trained, split):
    of_run = evaluation.TrainedRun(trained[1], device="cpu", batch_size=4)
    net, passes = of_run.method.net, []
    net.fc.register_forward_hook(lambda *_: passes.append(1))
    batches = list(of_run.maps(split))
    assert len(passes) == 3 and [i for batch in batches for i in batch.indices] == list(range(9))
    images, labels, _ = next(iter(eval_loader(split, 4, image_size=64, workers=0)))
    with torch.no_grad():
        features = net.after_dropout(net.before_dropout(to_input(images, torch.device("cpu"))))
        maps = torch.stack([(net.fc.weight[k, :, None, None] * f).sum(0) for k, f in zip(labels, features)])
        np.testing.assert_allclose(batches[0].maps, cam.normalize(cam.resize(maps, 64)), atol=1e-3)
        np.testing.assert_allclose(batches[0].logits, net.fc(features.mean((2, 3))), atol=1e-5)
    assert len({*labels.tolist()}) == 3


def test_saved_maps_evaluate_to_the_same_numbers(trained, tmp_path):
    """From the lists and the masks alone: no image, no list of train."""
    _, folder = trained
    run("evaluate", f"{folder} --save-maps {tmp_path}/maps --device cpu --batch-size 8")
    of_run, lists = results(folder), tmp_path / "alone" / "tiny" / "test"
    shutil.copytree(tmp_path / "lists" / "tiny" / "test", lists)
    shutil.rmtree(tmp_path / "data" / "tiny" / "test")
    maps = f"--score-maps {tmp_path}/maps --dataset tiny --image-size 64 --lists {tmp_path}/alone"
    for workers in (0, 2):
        written = f"--out {workers}.json --per-image {workers}.csv --workers {workers}"
        run("evaluate", f"{maps} --data-root {tmp_path}/data {written}")
    of_maps = results(Path(), "0.json")
    assert Path("0.json").read_bytes() == Path("2.json").read_bytes()
    assert Path("0.csv").read_bytes() == Path("2.csv").read_bytes()
    assert all(of_maps[name] == of_run[name] for name in ("images", "curves", "levels", "thresholds"))
    no_classifier = dict.fromkeys(("top1_loc", "top5_loc", "top1_cls", "top5_cls"))
    assert of_maps["metrics"] == of_run["metrics"] | no_classifier | NO_VAL
    # Without masks no file of the data is needed. The other way of naming a map, in double precision.
    boxes = lists / "localization.txt"
    boxes.write_text("".join(f"{x}\n" for x in boxes.read_text().splitlines() if "masks" not in x))
    for path in (tmp_path / "maps").rglob("*.png.npy"):
        np.save(path.with_name(path.name.replace(".png", "")), np.load(path).astype(np.float64))
        path.unlink()
    run("evaluate", maps)
    found = results(Path(), "results_maps_test.json")
    assert found["metrics"] == of_maps["metrics"] | {"pxap": None, "piou": None}
    assert found["curves"] == of_run["curves"]


def test_evaluation_is_as_precise_as_its_run_unless_told_otherwise(trained):
    _, folder = trained
    edit(folder / "best.pt", lambda checkpoint: checkpoint["config"].update(amp="bf16"))
    for name, flags in (("of_run", ""), ("bf16", "--amp bf16"), ("off", "--amp off")):
        run("evaluate", f"{folder} --device cpu {flags} --save-maps {name}")
    of_run, bf16, off = (np.load(f"{name}/test/00.png.npy") for name in ("of_run", "bf16", "off"))
    assert np.array_equal(of_run, bf16) and not np.array_equal(off, bf16)


def square_maps(split, folder, wrong=False):
    """A map per image with a rectangle whose box is the image's, or with one in the far corner."""
    for index, image in enumerate(split.ids):
        score_map = np.full((64, 64), 0.3, dtype=np.float32)
        x0, y0, x1, y1 = scale_boxes(split.boxes[index], tuple(split.sizes[index]), 64)[0]
        x0, y0, x1, y1 = (61, 61, 64, 64) if wrong else (x0, y0, x1, y1)
        score_map[y0:y1, x0:x1] = 0.6  # the box of a component ends one pixel after it
        (folder / image).parent.mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{image}.npy", score_map)


@pytest.mark.parametrize("wrong, share", [(False, 100), (True, 0)])
def test_perfect_maps_get_all_and_maps_of_the_wrong_place_nothing(split, where, tmp_path, wrong, share):
    """The whole path from image sizes over scaled boxes to metrics, with maps that are known to be right."""
    square_maps(split, tmp_path / "maps", wrong)
    maps = f"--score-maps {tmp_path}/maps --dataset tiny --image-size 64 {where}"
    run("evaluate", f"{maps} --normalize max --threshold 0.55")  # 0.3 is half of the maximum, 0.6
    metrics = results(Path(), "results_maps_test_max.json")["metrics"]
    assert metrics["max_box_acc_v2"] == dict.fromkeys(("30", "50", "70", "mean"), share)
    assert metrics["max_box_acc"] == metrics["fixed_threshold"]["gt_known_loc"] == share


def test_per_image_lines_add_up_to_the_metrics(trained, split):
    _, folder = trained
    run("evaluate", f"{folder} --per-image lines.csv --device cpu --workers 2")
    result, rows = results(folder), list(csv.DictReader(Path("lines.csv").read_text().splitlines()))
    assert [row["id"] for row in rows] == split.ids
    for name, delta in (("30", 0.3), ("50", 0.5), ("70", 0.7), ("largest", 0.5)):
        share = 100 * sum(float(row[f"iou_{name}"]) >= delta for row in rows) / 9
        assert share == pytest.approx(result["curves"][name][result["levels"][name]])
    right = [row["label"] == row["predicted"] for row in rows]
    assert 100 * sum(right) / 9 == pytest.approx(result["metrics"]["top1_cls"])
    located = [float(row["iou_50"]) >= 0.5 and ok for row, ok in zip(rows, right)]
    assert 100 * sum(located) / 9 == pytest.approx(result["metrics"]["top1_loc"])
    for index, row in enumerate(rows):  # the printed box gives the printed IoU
        assert int(row["label"]) == split.labels[index]
        truth = scale_boxes(split.boxes[index], tuple(split.sizes[index]), 64)
        iou = iou_matrix([[int(row[k]) for k in ("x0", "y0", "x1", "y1")]], truth)[0, 0]
        assert iou == pytest.approx(float(row["iou_largest"]), abs=1e-6)


def test_thresholds_of_other_weights_are_not_used(trained, tmp_path, where):
    """As after `--val-every 2` in an odd epoch: last.pt has the thresholds of the epoch before."""
    _, folder = trained
    evaluate = f"{folder} --checkpoint last --device cpu {where}"
    run("evaluate", evaluate)
    before = results(folder, "results_last_test.json")
    threshold = Localizer(folder, "cpu", checkpoint="last").threshold
    levels = load(folder / "last.pt")["val"]["levels"]
    other = {"epoch": 1, "levels": dict.fromkeys(levels, 254)}
    assert levels["largest"] != 254
    edit(folder / "last.pt", lambda checkpoint: checkpoint["val"].update(other))
    run("evaluate", evaluate)
    assert results(folder, "results_last_test.json") == before
    assert Localizer(folder, "cpu", checkpoint="last").threshold == threshold
    shutil.rmtree(tmp_path / "data" / "tiny" / "val")  # best.pt has its own: val is not needed
    run("evaluate", f"{folder} --device cpu {where}")


def test_boxes_are_drawn_on_images_that_have_them(tiny, tmp_path):
    boxes = tmp_path / "lists" / "tiny" / "test" / "localization.txt"
    boxes.write_text("".join(re.findall(r"test/0[25].png,\d.*\n", boxes.read_text())))
    run("train", f"{tiny} --epochs 1 --pictures 6 --out {tmp_path}/run")
    two = np.asarray(Image.open(tmp_path / "run" / "boxes_test.png").convert("RGB"))
    # Two columns of a photo above its map; margins of 6 pixels.
    side = (two.shape[1] - 18) // 2
    assert two.shape == (6 + 2 * side + 6, 6 + side + 6 + side + 6, 3) and side % 64 == 0
    split = load_split("tiny", "test", tmp_path / "data", tmp_path / "lists")
    for column, index in enumerate((2, 5)):
        scaled = scale_boxes(split.boxes[index], tuple(split.sizes[index]), 64)[0]
        x0, y0, _, y1 = scaled * (side // 64) + [6 + (side + 6) * column, 6, 0, 6]
        assert (two[y0:y1, x0] == (40, 80, 255)).all(1).any()  # the ground truth's left edge, blue
    run("evaluate", f"{tmp_path}/run --pictures 1 --device cpu")
    assert Image.open(tmp_path / "run" / "boxes_results_best_test.png").size == (side, 2 * side)


def test_own_images_of_any_name_leave_their_boxes(trained, tmp_path, monkeypatch, capsys):
    """Unreadable files are skipped; an error in the middle, for example Ctrl-C, keeps what was found."""
    _, folder = trained
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a.jpg").write_bytes(b"no image")
    for name in (b"\xff.png", "\u00e9".encode() * 100 + b".png", b"~.png"):
        Image.effect_noise((50, 80), 90).save(photos / os.fsdecode(name))
    with pytest.raises(SystemExit) as end, one_line_errors():
        run("evaluate", f"{folder} --images {photos} --device cpu")
    assert end.value.code == 1 and str(photos / "a.jpg") in capsys.readouterr().err
    found = results(folder / "images", "boxes.json")
    assert len(found) == 3 == len(list((folder / "images").glob("*.png")))
    for x0, y0, x1, y1 in (entry["box"] for entry in found):
        assert 0 <= x0 <= x1 < 50 and 0 <= y0 <= y1 < 80
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        decode, last = Image.open, found[-1]["image"]
        patch.setattr(Image, "open", lambda path: interrupt() if str(path) == last else decode(path))
        run("evaluate", f"{folder} --images {photos} --device cpu --out half")
    assert results(Path("half"), "boxes.json") == found[:2]


# ---- bad input
def test_bad_checkpoints(trained, fails, tmp_path, where):
    _, folder = trained
    path, good = folder / "best.pt", (folder / "best.pt").read_bytes()
    fails("evaluate", tmp_path / "nowhere", "nowhere/best.pt", "no such file")
    for damaged in (good[: len(good) // 2], b"text"):
        path.write_bytes(damaged)
        fails("evaluate", folder, path, "damaged")
    for change, word in (
        (lambda checkpoint: checkpoint.pop("fingerprint"), "fingerprint"),
        (lambda checkpoint: checkpoint.update(num_classes=5), "number of classes"),
        (lambda checkpoint: checkpoint["config"].update(arch="resnet50", width=1.0), "architecture"),
    ):
        path.write_bytes(good)
        edit(path, change)
        fails("evaluate", f"{folder} --device cpu", path, word)
    path.write_bytes(good)
    for lists in (tmp_path / "lists").rglob("*.txt"):  # the same data set with one class fewer
        kept = [x for x in lists.read_text().splitlines() if int(re.search(r"/(\d\d)\.", x)[1]) % 3 < 2]
        lists.write_text("\n".join(kept))
    fails("evaluate", f"{folder} --device cpu {where}", folder, "classes", "lists")


def test_bad_score_maps(split, where, fails, tmp_path):
    maps, flags = tmp_path / "maps", f"--score-maps {tmp_path}/maps --dataset tiny {where} --out r.json"
    fails("evaluate", flags, maps, "no such folder")
    square_maps(split, maps)
    path = maps / "test" / "05.png.npy"
    np.save(path, np.load(path) + 0.7)
    fails("evaluate", flags, path, "[0, 1]")
    np.save(path, np.array([[{"an": "object"}]]), allow_pickle=True)
    for damaged in (path.read_bytes(), path.read_bytes()[:100], b""):
        path.write_bytes(damaged)
        fails("evaluate", flags, path, "not a .npy array")
    path.unlink()
    fails("evaluate", flags, path, "no score map for test/05.png")
    # 05.npy would be the map of two images, which differ in the suffix only.
    np.save(maps / "test" / "05.npy", np.zeros((8, 8)))
    for file in (tmp_path / "lists" / "tiny" / "test").glob("*.txt"):
        file.write_text(file.read_text().replace("test/06.png", "test/05.jpg"))
    fails("evaluate", flags, "test/05.png.npy", "whole ids")
    assert not Path("r.json").exists()


def test_a_bad_mask_is_named_from_a_worker_process(trained, fails, tmp_path, where):
    mask = tmp_path / "data" / "tiny" / "masks" / "test_03.png"
    mask.write_bytes(mask.read_bytes()[:60])
    fails("evaluate", f"{trained[1]} --device cpu --workers 2 {where}", mask)


def test_contradicting_flags_of_evaluate(fails):
    for flags, *words in (
        ("run --images photos --save-maps maps", "--save-maps", "--images"),
        ("", "RUN", "--score-maps"),
        ("--score-maps maps", "--dataset"),
        ("run --image-size 64", "--image-size"),
        ("run --batch-size 0", "--batch-size"),
        ("run --threshold 1", "threshold 1"),
    ):
        fails("evaluate", flags, *words)
