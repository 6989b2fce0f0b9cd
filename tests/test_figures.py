"""The figures by their content, read from matplotlib's objects; numbers from other code, or by hand."""

import csv
import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
from conftest import results, run
from PIL import Image

from bridge_wsol.data import EvalImages, Masks, Split, load_masks, to_input
from bridge_wsol.datasets import load_split
from bridge_wsol.evaluation import TrainedRun
from bridge_wsol.reproduce import figures

CPU = "--device cpu --workers 0 --quiet"


def draw(*flags):
    if not flags[0].startswith(("gap", "boxes")):
        pytest.importorskip("matplotlib")
    run("reproduce", " ".join(map(str, flags)))


@pytest.fixture
def folder(trained):
    return trained[1]


@pytest.fixture
def drawn(monkeypatch):
    """The matplotlib figures that were saved."""
    made, figure = [], pytest.importorskip("matplotlib.figure").Figure
    save = figure.savefig
    monkeypatch.setattr(figure, "savefig", lambda self, *a, **k: made.append(self) or save(self, *a, **k))
    return made


def network_outputs(folder, root):
    """(F, S, CAM, each N x h x w float64, and the test split), from the weights with NumPy."""
    trained = TrainedRun(folder, "best", torch.device("cpu"))
    split = load_split("tiny", "test", root / "data", root / "lists")
    images = to_input(torch.stack([image for image, *_ in EvalImages(split, 64)]), torch.device("cpu"))
    with torch.no_grad():
        features = trained.method.passes(images).features.numpy().astype(float)
    w = trained.method.net.fc.weight.detach().numpy().astype(float)[split.labels]
    F, M = np.sqrt((features**2).sum(1)), np.einsum("nc,nchw->nhw", w, features)
    length = F * np.linalg.norm(w, axis=1)[:, None, None]
    return F, np.divide(M, length, out=np.zeros_like(M), where=F > 0), M, split


# ------------------------------------------------------------------------------------------ curves, histogram


def test_curves_have_the_maxima_of_the_results(folder, drawn, tmp_path):
    result = results(folder)
    other, curves = tmp_path / "other.json", result["curves"] | {"30": np.linspace(0, 40, 255).tolist()}
    other.write_text(json.dumps(result | {"curves": curves}))
    draw("curves", folder, other, "--names our$ theirs --dpi 30 --out", tmp_path / "c.png")
    ours, theirs = results(tmp_path, "c.json")["runs"]
    # At least 38 of 40: the last 254 / 20 steps.
    assert theirs["30"]["maximum"] == 40 and theirs["30"]["flatness"] == pytest.approx(13 / 255)
    for panel, iou in zip(drawn[0].axes, ("30", "50", "70")):
        assert ours[iou]["maximum"] == result["metrics"]["max_box_acc_v2"][iou]
        assert ours[iou]["threshold"] == result["thresholds"][iou]
        line = next(line for line in panel.lines if line.get_marker() != "None")
        assert line.get_ydata().tolist() == result["curves"][iou]
        assert line.get_xdata()[line.get_markevery()[0]] == result["thresholds"][iou]


def test_curves_of_seeds_are_averaged_and_compared_with_the_first_name(folder, tmp_path):
    rise = np.minimum(np.arange(255) / 10, 20)
    lower = rise - np.where(np.arange(255) < 51, 20, 0)  # at the first 51 of the 255 levels
    a = [rise + 0.1, rise + 0.2, rise + 0.3]
    assert (np.mean(a, axis=0) != np.mean(a[::-1], axis=0)).any()  # in floating point
    files = []
    for seed, curve in enumerate([*a, *a[::-1], rise + 4.2, lower + 6.2]):
        files.append(tmp_path / f"{seed}.json")
        curves = {iou: curve.tolist() for iou in ("30", "50", "70", "largest")}
        files[-1].write_text(json.dumps(results(folder) | {"curves": curves, "seed": seed}))
    draw("curves", *files, "--names a a a c c c b b --dpi 30 --out", tmp_path / "c")
    a, c, b = (of_name["50"] for of_name in results(tmp_path, "c.json")["runs"])
    assert b["maximum"] == pytest.approx(25.2) and b["threshold"] == 200 / 255
    assert b["above_first"] == pytest.approx(80) and b["below_first"] == pytest.approx(20)
    assert (c["above_first"], c["below_first"]) == (0, 0)
    # 0.95 * 20.2 = 19.19: from level 190 on; 0.95 * 25.2 = 23.94: from level 188 on.
    assert (a["flatness"], b["flatness"]) == (65 / 255, 67 / 255)


def test_histogram_of_the_largest_norms(folder, tmp_path):
    draw("histogram", folder, folder, "--names a b --bins 5 --dpi 30 --out", tmp_path / "h", CPU)
    found = results(tmp_path, "h.json")
    largest = network_outputs(folder, tmp_path)[0].max((1, 2))
    edges = np.array(found["edges"])
    assert edges[[0, -1]] == pytest.approx([largest.min(), largest.max()], rel=1e-5)
    for entry in found["runs"]:
        expected = [9, largest.mean(), np.median(largest)]
        assert [entry[name] for name in ("images", "mean", "median")] == pytest.approx(expected, rel=1e-5)
        of_bins = np.array(entry["density"]) * np.diff(edges)
        assert of_bins.sum() == pytest.approx(1)
        inside = [((largest >= lo) & (largest < hi)).mean() for lo, hi in zip(edges, edges[1:])]
        np.testing.assert_allclose(of_bins[1:-1], inside[1:-1])  # edges are rounded to float32


def test_runs_of_one_name_are_seeds_of_one_configuration(folder, tmp_path, fails, capsys):
    pytest.importorskip("matplotlib")
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    fails("reproduce", f"curves {folder} {other} --names a a", other, "the same seed")
    config = results(folder, "config.json")
    config["config"]["seed"]["value"] = 7
    good = json.dumps(config)
    config["config"]["lambda_sim"]["value"] = 0.125
    config["fingerprint"]["values"] = "another"
    (other / "config.json").write_text(json.dumps(config))
    fails("reproduce", f"gap {folder} {other} --names a a", other, "lambda_sim", "0.125", "--names")
    (other / "config.json").write_text(good)
    checkpoint = torch.load(other / "best.pt")
    for name in ("weight", "bias"):
        checkpoint["model"][f"conv6.0.{name}"] *= 2
    torch.save(checkpoint, other / "best.pt")
    draw("histogram", folder, other, folder, "--names a a b --dpi 30 --out", tmp_path / "h", CPU)
    a, b = results(tmp_path, "h.json")["runs"]
    (single,) = b["means_of_runs"]
    assert a["images"] == 18 and b["images"] == 9 and b["mean"] == pytest.approx(single)
    assert a["means_of_runs"] == pytest.approx([single, 2 * single], rel=1e-5)
    # The sample deviation of x and 2 x is x over the root of two.
    assert f"| {1.5 * single:.2f} ± {single / 2**0.5:.2f} | {single:.2f} |" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ maps, boxes


def test_maps_show_the_image_the_map_and_its_factors(folder, drawn, tmp_path):
    flags = "--names a b --images test/04.png test/01.png --dpi 30 --out"
    draw("maps", folder, folder, flags, tmp_path / "m", CPU)
    F, S, M, split = network_outputs(folder, tmp_path)
    panels = np.array(drawn[0].axes[:-2]).reshape((2, 7))  # the last two are the bars
    for row, index in zip(panels, (4, 1)):
        photo = np.asarray(Image.open(split.path(index)).convert("RGB"))
        assert np.array_equal(np.asarray(row[0].images[0].get_array())[..., :3], photo)
        for i, values in enumerate((M[index], F[index], S[index])):
            large = nnf.interpolate(torch.tensor(values)[None, None], (64, 64), mode="bicubic")[0, 0]
            own = (large - large.min()) / (large.max() - large.min())
            expected, limits = (large.clamp(-1, 1), (-1, 1)) if i == 2 else (own, (0, 1))
            for panel in row[1 + i :: 3]:
                np.testing.assert_allclose(panel.images[0].get_array(), expected, atol=1e-4)
                assert panel.images[0].get_clim() == limits
                assert len(panel.collections) == (i == 2 and bool(large.min() < 0 < large.max()))


def test_boxes_are_those_of_the_evaluation_and_the_worst_come_first(folder, tmp_path, capsys):
    run("evaluate", f"{folder} --per-image {tmp_path}/lines.csv --out {tmp_path}/r.json --batch-size 8 {CPU}")
    with (tmp_path / "lines.csv").open(newline="") as file:
        lines = {row["id"]: row for row in csv.DictReader(file)}
    iou = {image: float(row["iou_largest"]) for image, row in lines.items()}
    draw("boxes", folder, folder, "--names a b --columns 4 --images", *iou, "--out", tmp_path / "x", CPU)
    found = results(tmp_path, "x.json")["boxes"]
    assert [(entry["run"], entry["image"]) for entry in found] == [(n, image) for n in "ab" for image in iou]
    for entry in found:
        line = lines[entry["image"]]
        assert entry["iou"] == pytest.approx(iou[entry["image"]], abs=1e-6)
        assert entry["box"] == [int(line[k]) for k in ("x0", "y0", "x1", "y1")]
    assert {path.name for path in tmp_path.glob("x*.png")} == {"x_a.png", "x_b.png"}
    for flag, sign in (("--worst", 1), ("--best", -1)):
        expected = sorted(iou, key=lambda image: (sign * iou[image], image))[:2]
        draw("boxes", folder, flag, "2 --out", tmp_path / flag[2:], CPU)
        assert [entry["image"] for entry in results(tmp_path, f"{flag[2:]}.json")["boxes"]] == expected


def test_random_images_are_drawn_by_the_seed():
    ids = [f"{i}.png" for i in range(9)]
    run_of = SimpleNamespace(split=SimpleNamespace(ids=ids), ids={image: i for i, image in enumerate(ids)})
    none = dict.fromkeys(("images", "worst", "best", "random"))
    shown = []
    for of in ({"seed": 0}, {"seed": 0, "random": 4}, {"seed": 1}):
        shown.append(figures.chosen_images(run_of, SimpleNamespace(**none | of)))
    assert len({*shown[0]} & {*ids}) == 4 and shown[0] == shown[1] != shown[2]


# ------------------------------------------------------------------------------------------------------ sweep


def write_sweep(path, of_values):
    content = {"dataset": "CUB", "arch": "vgg16", "method": "bridge", "param": "tau_fg", "preset": 0.5}
    rows = [{"value": x, "gt_known_loc": of, "top1_cls": of} for x, of in of_values.items()]
    path.write_text(json.dumps(content | {"values": rows}))
    return path


def test_a_sweep_is_a_curve_with_a_star_at_the_preset_and_bars_of_the_deviation(drawn, tmp_path):
    files = [write_sweep(tmp_path / "a.json", {2.0: [70.5], 0.5: [80.25]})]
    files.append(write_sweep(tmp_path / "b.json", {0.5: [5.0, 25.0], 1.0: [10.0, 30.0]}))
    draw("sweep", *files, "--dpi 30 --out", tmp_path / "s")
    one, two = drawn[0].axes
    curve, star = ([x for x in one.lines if x.get_marker() == marker][0] for marker in "o*")
    assert list(curve.get_xdata()) == [0.5, 2] and list(curve.get_ydata()) == [80.25, 70.5]
    assert list(star.get_xdata()) == [0.5] and list(star.get_ydata()) == [80.25]
    (bars,) = two.containers
    assert list(bars.lines[0].get_xdata()) == [0.5, 1] and list(bars.lines[0].get_ydata()) == [15, 20]
    for (low, high), mean in zip(bars.lines[2][0].get_segments(), (15, 20)):
        assert [low[1], high[1]] == pytest.approx([mean - 200**0.5, mean + 200**0.5])  # n - 1 in the variance


# -------------------------------------------------------------------------------------------------------- gap


def test_regions_by_hand(tmp_path):
    """A map of 4 x 4 locations on 8 x 8 pixels: centres at pixels 1, 3, 5, 7."""
    mask, ignore, part = np.zeros((3, 8, 8), dtype=np.uint8)
    mask[0:4, 0:4] = ignore[:, 6:] = part[1, 1] = part[7, 7] = 255
    (tmp_path / "parts").mkdir()
    for name, pixels in (("mask", mask), ("ignore", ignore), ("parts/x", part)):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    boxes = {0: np.array([[4, 7, 11, 9], [0, 0, 3, 3]])}
    masks = {0: Masks(["mask.png"], ["ignore.png"])}
    split = Split("one", tmp_path, ["x"], np.zeros(1, dtype=int), np.array([[16, 16]]), boxes, masks)
    found = figures.regions(split, 0, 8, (4, 4))
    # Boxes at half size: x 2 ... 5, y 3 ... 4 has the centres (3, 3), (5, 3);
    # x 0 ... 1, y 0 ... 1 has (1, 1).
    assert np.argwhere(found["box"][0]).tolist() == [[0, 0], [1, 1], [1, 2]]
    assert (found["box"][1] == ~found["box"][0]).all()
    inside, outside = found["mask"]
    assert inside[:2, :2].all() and inside.sum() == 4 and not (outside & inside).any()
    assert not outside[:, 3].any() and outside.sum() == 8
    head, rest = found["part"]
    assert np.argwhere(head).tolist() == [[0, 0], [3, 3]]
    assert np.argwhere(rest).tolist() == [[0, 1], [1, 0], [1, 1]]


def test_gap_of_a_run_against_loops_and_the_evaluation_of_score_maps(folder, tmp_path):
    draw("gap", folder, "--out", tmp_path / "gap", "--batch-size 4", CPU)
    (entry,) = results(tmp_path, "gap.json")["runs"]
    F, S, M, split = network_outputs(folder, tmp_path)
    F_hat, shifted, CAM = (
        (m - m.min((1, 2), keepdims=True)) / np.ptp(m, axis=(1, 2), keepdims=True) for m in (F, S, M)
    )
    for name, maps in (("CAM", CAM), ("F", F_hat), ("S", shifted)):
        for image, score_map in zip(split.ids, maps):
            path = tmp_path / name / f"{image}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, score_map)
        flags = f"--dataset tiny --image-size 64 --data-root {tmp_path}/data --lists {tmp_path}/lists --quiet"
        run("evaluate", f"--score-maps {tmp_path / name} --out {tmp_path}/{name}.json {flags}")
        of_maps, ours = results(tmp_path, f"{name}.json")["metrics"], entry["localization"][name]
        assert ours["max_box_acc_v2"] == pytest.approx(of_maps["max_box_acc_v2"])
        assert ours["pxap"] == pytest.approx(of_maps["pxap"], abs=0.05)

    rows = {"box": [], "mask": []}
    n = F.shape[1]
    centres = [((2 * r + 1) * 32 // n, (2 * c + 1) * 32 // n) for r in range(n) for c in range(n)]
    for i in range(9):
        x0, y0, x1, y1 = (int(v) * 64 // n for v, n in zip(split.boxes[i][0], tuple(split.sizes[i]) * 2))
        in_box = [y0 <= y <= y1 and x0 <= x <= x1 for y, x in centres]
        mask = load_masks(split.root, split.masks[i], 64)[0]
        for kind, inside in (("box", in_box), ("mask", [mask[at] for at in centres])):
            row = np.full(5, np.nan)  # of an image without a location inside
            row[3:] = [np.mean(m[i].ravel()[~np.array(inside)]) for m in (S, F_hat)]
            if any(inside):
                of_S, of_F = S[i].ravel()[inside], F_hat[i].ravel()[inside]
                row[:3] = of_S.mean(), of_F.mean(), 100 * (of_S < 0).mean()
            rows[kind].append(row)
    names = ("S_inside", "F_hat_inside", "S_negative_inside", "S_outside", "F_hat_outside")
    for kind, of_images in rows.items():
        found, expected = [entry[kind][name] for name in names], np.nanmean(of_images, axis=0)
        np.testing.assert_allclose(found, expected, atol=1e-4)
        assert entry[kind]["images"] == np.isfinite(of_images)[:, 0].sum()
    assert entry["images"] == 9 and entry["part"] is None


def test_a_method_without_linear_classifier_has_no_factors(tiny, fails, tmp_path):
    pytest.importorskip("matplotlib")
    run("train", f"{tiny} --method acol --epochs 1 --quiet --out {tmp_path}/acol")
    words = tmp_path / "acol", "--method acol", "no linear classifier"
    fails("reproduce", f"gap {tmp_path}/acol --out {tmp_path}/x {CPU}", *words)
    draw("histogram", tmp_path / "acol", "--dpi 30 --out", tmp_path / "x", CPU)


# ----------------------------------------------------------------------------------------------------- losses


def test_losses_are_those_of_the_logs(folder, drawn, tmp_path, fails):
    ours = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    theirs = [{"epoch": k, "loss": 1 / k, "l_own": 2.0 * k, "top1": 10.0 * k} for k in (1, 2, 3)]
    (tmp_path / "theirs").mkdir()
    log = tmp_path / "theirs" / "log.jsonl"
    log.write_text("".join(json.dumps(entry) + "\n" for entry in theirs))
    draw("losses", folder, log.parent, "--dpi 30 --out", tmp_path / "both")
    draw("losses", log.parent, "--dpi 30 --out", tmp_path / "alone")
    both, alone = ([panel for panel in of.axes if panel.get_visible()] for of in drawn[::2])
    names = [name for name in ours[-1] if name == "loss" or name.startswith("l_")]
    assert len(names) > 2 and len(both) == len(names) + 1 + 1 + 4 and len(alone) == 3

    def expected(value_of, entries):
        return {entry["epoch"]: value for entry in entries if (value := value_of(entry)) is not None}

    values = {name: lambda entry, name=name: entry.get(name) for name in ("l_own", "top1", *names)}
    for key in ("gt_known_loc", "pxap", "top1_cls"):
        values[key] = lambda entry, key=key: entry.get("val", {}).get(key)
    values["v2"] = lambda entry: entry["val"]["max_box_acc_v2"]["mean"] if "val" in entry else None
    shown = [[dict(zip(line.get_xdata(), line.get_ydata())) for line in panel.lines] for panel in both]
    for value_of in values.values():
        assert [expected(value_of, ours), expected(value_of, theirs)] in shown
    shown = [[dict(zip(line.get_xdata(), line.get_ydata())) for line in panel.lines] for panel in alone]
    assert shown == [[expected(values[name], theirs)] for name in ("loss", "l_own", "top1")]
    log.write_text('{"epoch": 1}\n')
    fails("reproduce", f"losses {folder} {log.parent}", log, "train.py")


# -------------------------------------------------------------------------------------------------- bad input


def test_bad_input_to_figures(folder, fails, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    missing = f"python evaluate.py {folder} --checkpoint last --split val"
    fails("reproduce", f"curves {folder} --split val --checkpoint last", "results_last_val.json", missing)
    fails("reproduce", f"curves {folder} --names a b", "2 names for 1 runs")
    fails("reproduce", f"boxes {folder} {folder} {CPU}", "--names")
    fails("reproduce", f"boxes {folder} --images test/77.png {CPU}", "test/77.png")
    fails("reproduce", f"sweep {tmp_path}/s.json", tmp_path / "s.json", "reproduce sweep")
    masks_only = results(folder) | {"curves": None}
    (folder / "results_best_test.json").write_text(json.dumps(masks_only))
    fails("reproduce", f"curves {folder}", "no boxes")
    fails("reproduce", f"boxes {folder} --random 1 {CPU}", "no boxes")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    fails("reproduce", f"curves {folder}", "matplotlib", "pip install -e '.[figures]'")
    draw("gap", folder, "--out", tmp_path / "x", CPU)


def test_a_backend_of_a_notebook_does_not_matter(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    for name in [x for x in sys.modules if x.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setenv("MPLBACKEND", "no_such_backend")
    file = write_sweep(tmp_path / "a.json", {0.5: [5.0]})
    run("reproduce", f"sweep {file} --dpi 30 --out {tmp_path}/s")
    assert (tmp_path / "s.png").stat().st_size
