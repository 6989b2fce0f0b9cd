"""The flags of evaluate.py that change a map, and what its maps and ranks are computed from."""

import multiprocessing
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
from conftest import results, run
from test_baselines import make
from test_models import as_saved

from bridge_wsol import evaluation
from bridge_wsol.cam import normalize
from bridge_wsol.data import Split, to_input
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
    opened.split, opened.checkpoint, opened.workers = lambda _: split, {"val": None, "epoch": 1}, 0
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
        "--percentile 0.5",
        "--normalize max --percentile 0.5",
        "--normalize pas --percentile val",
        "--normalize ivr --percentile 1",
        "--normalize ivr --percentile half",
    ):
        fails("evaluate", f"{trained[1]} {flags}", "--percentile")
    flags = f"{trained[1]} {EVALUATE} --lists {tmp_path}/lists --normalize ivr --percentile val"
    val, test = (tmp_path / "lists" / "tiny" / name / "localization.txt" for name in ("val", "test"))
    for path in (val, test):
        path.write_text("".join(x for x in path.read_text().splitlines(keepends=True) if "masks" in x))
    run("evaluate", f"{flags} --out {tmp_path}/masks.json")
    assert results(tmp_path, "masks.json")["percentile"]["by"] == "PxAP"
    val.unlink()
    fails("evaluate", flags, "--percentile val", "neither boxes nor masks")


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
    fails("evaluate", f"{joint} --calm-map sum", "--calm-map", "sum")
    fails("evaluate", f"{joint} --pas-nwc off", "--pas-nwc", "--method calm")
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
    np.testing.assert_allclose(batch.maps, normalize(large).numpy(), rtol=1e-5, atol=1e-5)


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
        with open(1, "w") as sys.stdout, (tmp_path / "err").open("w") as sys.stderr, one_line_errors():
            run("evaluate", f"{flags} {EVALUATE} --quiet")

    process = multiprocessing.get_context("fork").Process(target=evaluate)
    process.start()
    process.join()
    said = (tmp_path / "err").read_text()
    assert process.exitcode == 2 and said.count("\n") == 1 and "output" in said
    assert results(tmp_path, "r.json")["metrics"] == results(trained[1])["metrics"]
