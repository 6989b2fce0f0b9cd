"""The figures by their content: pixels at their places; numbers from other code, or computed by hand."""

import csv
import itertools
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from PIL import Image
from torch import nn

import evaluate
from bridge_wsol import data, drawing, evaluation, figures, metrics, utils
from bridge_wsol.data import Split, load_masks, test_loader, to_input
from bridge_wsol.datasets import load_splits

CPU = ["--device", "cpu", "--workers", "0"]


def read_json(path):
    return json.loads(path.read_text())


def draw(*arguments):
    figures.main([str(argument) for argument in arguments])


@pytest.fixture
def drawn(monkeypatch):
    """The matplotlib figures that were made."""
    figure = pytest.importorskip("matplotlib.figure")
    made = []

    class Kept(figure.Figure):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(figure, "Figure", Kept)
    return made


# --------------------------------------------------------------------------------------------------- pictures


def lightness(rgb):
    """CIE L* of sRGB colours."""
    linear = np.where(rgb <= 0.04045 * 255, rgb / 255 / 12.92, ((rgb / 255 + 0.055) / 1.055) ** 2.4)
    y = linear @ [0.2126, 0.7152, 0.0722]
    return np.where(y > 0.008856, 116 * np.cbrt(y) - 16, 903.3 * y)


def test_S_has_the_end_and_middle_colours_and_its_sign_survives_a_grey_printer():
    ends = drawing.colourise_signed(np.array([[-1.0, 0.0, 1.0]]))[0]
    assert ends.tolist() == [[8, 32, 78], [128, 128, 128], [255, 238, 170]]
    assert drawing.colourise_signed(np.array([[-7.0, 7.0]]))[0].tolist() == [[8, 32, 78], [255, 238, 170]]
    steps = np.diff(lightness(drawing.colourise_signed(np.linspace(-1, 1, 41)[None])[0].astype(float)))
    assert (steps > 1).all() and steps.max() < 2 * steps.min()  # even steps: 41 colours, 2 units each
    for value, colour in ((-1.0, (8, 32, 78)), (0.0, (128, 128, 128)), (1.0, (255, 238, 170))):
        assert drawing.draw_signed(np.full((3, 3), value, dtype=np.float32), 24).getcolors() == [
            (24 * 24, colour)
        ]


def test_a_black_line_where_S_changes_its_sign():
    S = np.full((4, 4), 0.5, dtype=np.float32)
    S[:, 2:] = -0.5
    pixels = np.asarray(drawing.draw_signed(S, 40))
    black = (pixels == 0).all(-1)
    assert (np.flatnonzero(black.all(0)) == [19, 20]).all() and black.sum() == 2 * 40
    assert pixels[20, 2].tolist() == [222, 178, 82] and pixels[20, 37].tolist() == [36, 82, 140]


def test_maps_of_their_own_scale():
    values = np.array([[3.0, 5.0], [3.0, 3.0]], dtype=np.float32)
    picture = drawing.draw_map(values, 2)
    assert picture.getpixel((0, 0)) == (13, 8, 135) and picture.getpixel((1, 0)) == (240, 249, 33)


@pytest.mark.parametrize("k", [1, 3])
def test_box_pixels_have_the_stated_colours_at_the_stated_places(k):
    grey, score_map = Image.new("RGB", (100 * k, 100 * k), (100, 100, 100)), np.zeros((100, 100))
    score_map[50:] = 1
    truth, predicted = np.array([[10, 20, 59, 79]]), np.array([30, 40, 79, 89])
    picture = np.asarray(drawing.localization(grey, score_map, predicted, truth))
    assert picture.shape == (200 * k, 100 * k, 3)
    blue, green = ((picture[: 100 * k] == colour).all(-1) for colour in ((40, 80, 255), (0, 220, 60)))
    for mask, (x0, y0, x1, y1) in ((blue, truth[0]), (green, predicted)):
        ys, xs = np.nonzero(mask)  # the outline ends with the last pixel of the box
        assert (xs.min(), ys.min(), xs.max(), ys.max()) == (x0 * k, y0 * k, x1 * k + k - 1, y1 * k + k - 1)
        for x, y in ((xs.min(), ys.min()), (xs.min(), ys.max()), (xs.max(), ys.min()), (xs.max(), ys.max())):
            assert mask[y, x]
        assert not mask[(y0 + 5) * k : (y1 - 4) * k, (x0 + 5) * k : (x1 - 4) * k].any()
    # The blue outline is solid, the green one dashed, except where they cross.
    share = {
        name: mask[y * k, x0 * k : (x1 + 1) * k].mean()
        for name, mask, (x0, y, x1, _) in (("blue", blue, truth[0]), ("green", green, predicted))
    }
    assert share["blue"] == 1 and 0.55 < share["green"] < 0.85
    assert (picture[: 100 * k][~blue & ~green] == 100).all()
    # Below: 60 % of the map's colour, 40 % of the image. White on black: IoU 30 x 40 / (3000 + 2500 - 1200).
    assert picture[110 * k, 90 * k].tolist() == [round(0.4 * 100 + 0.6 * c) for c in (13, 8, 135)]
    assert picture[190 * k, 90 * k].tolist() == [round(0.4 * 100 + 0.6 * c) for c in (240, 249, 33)]
    corner = picture[100 * k : 110 * k, : 40 * k]
    assert (corner == 0).all(-1).mean() > 0.3 and (corner >= 230).all(-1).any()


def test_the_best_of_several_truths_is_printed(monkeypatch):
    texts = []
    monkeypatch.setattr(drawing.ImageDraw.ImageDraw, "text", lambda self, at, text, **_: texts.append(text))
    grey = Image.new("RGB", (100, 100))
    drawing.localization(
        grey, np.zeros((100, 100)), np.array([0, 0, 49, 49]), np.array([[60, 60, 99, 99], [0, 0, 99, 49]])
    )
    assert texts == ["IoU 0.50"]
    drawing.localization(grey, np.zeros((100, 100)), np.array([0, 0, 49, 49]))
    assert texts == ["IoU 0.50"]


def test_a_long_label_is_drawn_smaller_not_cut():
    picture = drawing._label("a name that is far too long", 30, 150)
    pixels = np.asarray(picture)
    assert 100 < picture.width <= 150 and (pixels[:, -1] == 255).all() and (pixels < 60).any()


def test_the_legend_of_boxes_fits_into_a_narrow_picture():
    def texts(width):
        picture = Image.new("RGB", (width, 40), "white")
        drawing.box_legend(picture, 11, 0, 0, width)
        pixels = np.asarray(picture).astype(int)
        green = np.flatnonzero((pixels == drawing.PREDICTION).all(-1).any(0))
        grey = (np.ptp(pixels, axis=-1) == 0) & (pixels[..., 0] < 128)
        return green[0], np.flatnonzero(grey.any(0))

    for width in (195, 400):
        start, columns = texts(width)
        left, right = columns[columns < start], columns[columns > start]
        assert start == width // 2 and len(left) > 30 and start - left[-1] > 3 and right[-1] < width - 3


def test_a_grid_shows_every_cell_whole():
    colours = [[(10 * i + j, 200, 50) for j in range(5)] for i in range(1, 5)]
    rows = [[Image.new("RGB", (30, 40), colour) for colour in row] for row in colours]
    rows[2][0] = None
    picture = drawing.grid(
        rows,
        columns=list("abcde"),
        groups=[("", 1), ("one", 2), ("a name that is far too long for two columns", 2)],
        names=["r"] * 4,
        group_rows=2,
        foot=drawing.colour_bars,
        foot_lines=2,
    )
    pixels = np.asarray(picture)
    places = np.array(
        [[np.argwhere((pixels == colour).all(-1)) for colour in row] for row in colours], dtype=object
    )
    for i, row in enumerate(colours):
        for j, _ in enumerate(row):
            cell = places[i, j]
            if (i, j) == (2, 0):
                assert not len(cell)
                continue
            assert len(cell) == 30 * 40 and np.ptp(cell, axis=0).tolist() == [39, 29]
            if j:
                assert i == 2 or (cell[0] - places[i, j - 1][0])[0] == 0
                assert j == 1 and i == 2 or cell[0][1] >= places[i, j - 1][0][1] + 30
            if i and (i, j) not in ((2, 0), (3, 0)):
                assert cell[0][0] >= places[i - 1, j][0][0] + 40
    assert (picture.width, picture.height) < (260, 300)


# ------------------------------------------------------------------------------------------ curves, histogram


def test_flatness_by_hand():
    curve = [0.0] * 255
    curve[40:44] = [94.9, 95.0, 96.0, 95.0]
    curve[44:50] = [94.9, 97.0, 100.0, 100.0, 95.0, 90.0]
    curve[60] = 99.0  # near the maximum too, but behind a gap
    assert metrics.flatness(curve) == (45, 48, 4 / 255)
    assert metrics.flatness([7.0] * 255) == (0, 254, 1.0)
    assert metrics.flatness([0.0] * 255)[2] is None
    assert metrics.flatness([100.0] + [0.0] * 254) == (0, 0, 1 / 255)


@pytest.mark.parametrize("width", [3.3, 6.9])
def test_curves_mark_the_maxima_of_the_results(trained, drawn, tmp_path, width):
    _, run = trained
    other = tmp_path / "maps_of_another_method.json"
    result = read_json(run / "results_best_test.json")
    result["curves"]["30"] = np.linspace(0, 40, 255).tolist()
    other.write_text(json.dumps(result))
    draw("curves", run, other, "--names", "ours", "theirs", "--width", width, "--out", tmp_path / "c.png")
    ours, theirs = read_json(tmp_path / "c.json")["runs"]
    result = read_json(run / "results_best_test.json")
    for delta in ("30", "50", "70"):
        assert ours[delta]["maximum"] == result["metrics"]["max_box_acc_v2"][delta]
        assert ours[delta]["threshold"] == result["thresholds"][delta]
    assert theirs["30"]["maximum"] == 40 and theirs["30"]["flatness"] == pytest.approx(
        13 / 255
    )  # at least 38 of 40: the last 254 / 20 steps

    panels = drawn[0].axes
    assert len(panels) == 3
    for panel, delta in zip(panels, ("30", "50", "70")):
        lines = [line for line in panel.lines if line.get_marker() != "None"]
        assert lines[0].get_ydata().tolist() == result["curves"][delta]
        assert lines[0].get_xdata()[lines[0].get_markevery()[0]] == result["thresholds"][delta]
        assert len({(line.get_color(), line.get_linestyle(), line.get_marker()) for line in lines}) == 2
        texts = [text.get_text() for text in panel.get_legend().get_texts()]
        flat = ours[delta]["flatness"]
        assert texts[
            0
        ] == f"{ours[delta]['maximum']:.1f}, {'–' if flat is None else f'{flat:.2f}'} wide" and (
            texts[1] == "40.0, 0.05 wide"
        ) == (delta == "30")
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["ours", "theirs"]
    assert Image.open(tmp_path / "c.png").size[0] == round(width * 300)


def test_curves_of_seeds_are_averaged_and_compared_with_the_first_name(trained, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    _, run = trained
    result, files = read_json(run / "results_best_test.json"), []
    for name, shift in (("a0", 0), ("a1", 2), ("b0", 4), ("b1", 6)):
        curve = np.minimum(np.arange(255) / 10, 20) + shift
        if name == "b1":
            curve[:51] -= 20  # the mean of b: 10 - 6 = 4 lower than a's at the first 51 of the 255 levels
        result["curves"] = {iou: curve.tolist() for iou in ("30", "50", "70", "largest")}
        result["seed"] = shift
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps(result))
    capsys.readouterr()
    draw("curves", *files, "--names", "a", "a", "b", "b", "--out", tmp_path / "c")
    a, b = read_json(tmp_path / "c.json")["runs"]
    assert a["results"] == [str(path) for path in files[:2]] and (a["name"], b["name"]) == ("a", "b")
    assert a["50"]["maximum"] == 21 and b["50"]["maximum"] == 25 and b["50"]["threshold"] == 200 / 255
    assert (a["50"]["above_first"], a["50"]["below_first"]) == (0, 0)
    assert b["50"]["above_first"] == pytest.approx(80) and b["50"]["below_first"] == pytest.approx(20)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "|  | a | b |" and "| IoU 70: maximum, % | 21.0 | 25.0 |" in printed
    assert "| IoU 30: thresholds above a, % | 0.0 | 80.0 |" in printed
    # 0.95 * 21 = 19.95: from level 190 on; 0.95 * 25 = 23.75: from level 188 on.
    assert "| IoU 50: width within 95 % | 0.25 | 0.26 |" in printed


@pytest.mark.parametrize("width", [3.3, 6.9])
def test_nothing_of_a_figure_with_many_long_names_is_cut_off_or_hidden(trained, drawn, tmp_path, width):
    backend_agg = pytest.importorskip("matplotlib.backends.backend_agg")
    _, run = trained
    names = [f"run_{i}_with_a_name_as_long_as_names_of_folders_get_{'x' * 20 * i}_seed{i}" for i in range(4)]
    draw("curves", *[run] * 4, "--names", *names, "--width", width, "--dpi", 60, "--out", tmp_path / "c")
    draw(
        "histogram",
        *[run] * 4,
        "--names",
        *names,
        "--width",
        width,
        "--dpi",
        60,
        "--bins",
        10,
        "--out",
        tmp_path / "h",
        *CPU,
    )
    for figure in drawn:
        renderer = backend_agg.FigureCanvasAgg(figure).get_renderer()
        parts = [*figure.legends, *figure.axes]
        boxes = [part.get_tightbbox(renderer) for part in parts]
        for box in boxes:
            assert (
                box.x0 >= -1
                and box.y0 >= -1
                and box.x1 <= figure.bbox.x1 + 1
                and box.y1 <= figure.bbox.y1 + 1
            )
        for i, a in enumerate(boxes):
            assert not any(
                min(a.x1, b.x1) - max(a.x0, b.x0) > 1 and min(a.y1, b.y1) - max(a.y0, b.y0) > 1
                for b in boxes[i + 1 :]
            )
        assert all(
            panel.get_window_extent().width > 0.2 * figure.bbox.width
            and panel.get_window_extent().height > 60
            for panel in figure.axes
        )


def test_the_same_runs_give_the_same_bytes(trained, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    _, run = trained
    for folder, time in (("one", "1000000000"), ("two", "1700000000")):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", time)  # the date that matplotlib would write
        draw("curves", run, "--out", tmp_path / folder / "curves")
        draw("maps", run, "--random", 2, "--cell", 64, "--out", tmp_path / folder / "maps", *CPU)
    for name in ("curves.png", "curves.pdf", "curves.json", "maps.png", "maps.pdf"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    for name in ("curves.png", "maps.png"):
        assert not {"Software", "Creation Time", "date"} & Image.open(tmp_path / "one" / name).info.keys()


def network_of(run, tmp_path):
    """(model, normalized test images, labels, split), made without figures.py."""
    model, _, _ = evaluation.load_run(run, "best", torch.device("cpu"))
    split = load_splits("tiny", tmp_path / "data", tmp_path / "splits", ("test",))[0]["test"]
    images, labels, _ = next(iter(test_loader(split, 9, image_size=64, workers=0)))
    return model.eval(), to_input(images, torch.device("cpu")), labels.numpy(), split


def test_histogram_of_the_largest_norms(trained, drawn, tmp_path):
    _, run = trained
    draw("histogram", run, run, "--names", "a", "b", "--bins", 5, "--out", tmp_path / "h", *CPU)
    found = read_json(tmp_path / "h.json")
    model, images, _, _ = network_of(run, tmp_path)
    with torch.no_grad():
        features = model(images).features.numpy().astype(float)
    largest = np.sqrt((features**2).sum(1)).max((1, 2))
    edges = np.array(found["edges"])
    assert edges[0] == pytest.approx(largest.min(), rel=1e-5) and edges[-1] == pytest.approx(
        largest.max(), rel=1e-5
    )
    for entry in found["runs"]:
        assert entry["images"] == 9
        assert entry["mean"] == pytest.approx(largest.mean(), rel=1e-5) and entry["median"] == pytest.approx(
            np.median(largest), rel=1e-5
        )
        density = np.array(entry["density"])
        assert (density * np.diff(edges)).sum() == pytest.approx(1)
        inside = [
            (largest >= lo * (1 - 1e-6)) & (largest < hi * (1 - 1e-6)) for lo, hi in zip(edges, edges[1:])
        ]
        inside[-1] |= largest >= edges[-1] * (1 - 1e-6)
        np.testing.assert_allclose(density * np.diff(edges), [m.mean() for m in inside])
    assert len(drawn) == 1


def set_config(run, **values):
    """Changes values in the config.json of a run."""
    config = read_json(run / "config.json")
    for name, value in values.items():
        config["config"][name]["value"] = value
    (run / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("command", ["curves", "histogram", "gap"])
def test_runs_of_one_name_that_are_no_seeds_of_one_configuration_are_refused(
    command, trained, tmp_path, fails
):
    if command != "gap":
        pytest.importorskip("matplotlib")
    _, run = trained
    other = tmp_path / "other"
    shutil.copytree(run, other)
    pooled = [command, run, other, "--names", "a", "a"]
    fails(figures.main, pooled, "has the name a", "and the same seed", "--names")
    set_config(other, seed=7, lambda_sim=0.125)
    fails(figures.main, pooled, str(other), "lambda_sim", "and 0.125: runs", "differ in the seed only")
    set_config(other, lambda_sim=evaluation.read_config(run)["lambda_sim"])
    figures.check_pools(figures.parse_args([str(value) for value in pooled]))  # a seed: allowed


def test_histogram_and_gap_of_seeds(trained, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    _, run = trained
    other = tmp_path / "other"
    shutil.copytree(run, other)
    checkpoint = torch.load(other / "best.pt")
    checkpoint["model"]["conv6.0.weight"] *= 2
    checkpoint["model"]["conv6.0.bias"] *= 2
    torch.save(checkpoint, other / "best.pt")
    set_config(other, seed=7)
    names = ["--names", "a", "a", "b"]
    capsys.readouterr()
    draw("histogram", run, other, run, *names, "--out", tmp_path / "h", *CPU)
    a, b = read_json(tmp_path / "h.json")["runs"]
    (single,) = b["means_of_runs"]
    assert a["images"] == 18 and b["images"] == 9 and b["mean"] == pytest.approx(single)
    assert a["means_of_runs"] == pytest.approx([single, 2 * single], rel=1e-5)
    assert a["mean"] == pytest.approx(1.5 * single, rel=1e-5)
    deviation = single / 2**0.5  # of x and 2 x
    line = f"| mean of the largest F | {1.5 * single:.2f} ± {deviation:.2f} | {single:.2f} |"
    assert line in capsys.readouterr().out
    draw("gap", run, other, run, *names, "--out", tmp_path / "g", *CPU)
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["a", "b"]  # a column per name
    found = {line[0]: line[1:] for line in lines[2:]}
    mean, _, deviation = found["S inside (box)"][0].partition(" ± ")  # S does not depend on the scale of F
    assert mean == found["S inside (box)"][1] and deviation == "0.000"


# ------------------------------------------------------------------------------------------------ maps, boxes


def test_maps_show_the_image_the_map_and_its_factors(trained, tmp_path, monkeypatch):
    _, run = trained
    grids = []
    whole = drawing.grid
    monkeypatch.setattr(
        drawing, "grid", lambda rows, **layout: grids.append((rows, layout)) or whole(rows, **layout)
    )
    draw(
        "maps",
        run,
        run,
        "--names",
        "a",
        "b",
        "--images",
        "test/04.png",
        "test/01.png",
        "--cell",
        64,
        "--out",
        tmp_path / "m",
        *CPU,
    )
    ((rows, layout),) = grids
    assert layout["columns"] == ["image", "CAM", "F", "S", "CAM", "F", "S"] and layout["groups"] == [
        ("", 1),
        ("a", 3),
        ("b", 3),
    ]
    model, images, labels, split = network_of(run, tmp_path)
    with torch.no_grad():
        features, weight = model(images).features.numpy().astype(float), model.fc.weight.numpy().astype(float)
    for row, index in zip(rows, (4, 1)):
        assert np.array_equal(
            np.asarray(row[0]),
            np.asarray(
                Image.open(split.path(index)).convert("RGB").resize((64, 64), Image.Resampling.BILINEAR)
            ),
        )
        f, w = features[index], weight[labels[index]]
        F = np.sqrt((f**2).sum(0))
        M = np.einsum("c,chw->hw", w, f)
        S = np.divide(M, F * np.linalg.norm(w), out=np.zeros_like(M), where=F > 0)
        for cells in (row[1:4], row[4:7]):
            for cell, values, scale in zip(
                cells, (M, F, S), (drawing.draw_map, drawing.draw_map, drawing.draw_signed)
            ):
                expected = np.asarray(scale(values.astype(np.float32), 64)).astype(int)
                assert (
                    np.abs(np.asarray(cell).astype(int) - expected).max(-1) <= 3
                ).mean() > 0.99  # except where rounding moves the black line
    assert Image.open(tmp_path / "m.png").size[0] > 7 * 64

    draw("maps", run, "--random", 3, "--seed", 5, "--cell", 64, "--below", "--out", tmp_path / "m", *CPU)
    assert grids[1][1]["columns"] == ["image", "CAM", "F", "S"] and len(grids[1][0]) == 3


def test_boxes_are_those_of_the_evaluation_and_the_worst_come_first(trained, tmp_path, capsys):
    _, run = trained
    evaluate.main(
        [
            str(run),
            "--per-image",
            str(tmp_path / "lines.csv"),
            "--out",
            str(tmp_path / "r.json"),
            "--batch-size",
            "8",
            *CPU,
        ]
    )
    with (tmp_path / "lines.csv").open(newline="") as file:
        lines = {row["id"]: row for row in csv.DictReader(file)}
    ids = sorted(lines)
    draw("boxes", run, "--images", *ids, "--out", tmp_path / "b", *CPU)
    for entry in read_json(tmp_path / "b.json")["boxes"]:
        line = lines[entry["image"]]
        assert entry["iou"] == pytest.approx(float(line["iou_largest"]), abs=1e-6)
        assert entry["box"] == [int(line[k]) for k in ("x0", "y0", "x1", "y1")]
    order = sorted(ids, key=lambda image: (float(lines[image]["iou_largest"]), image))
    assert float(lines[order[0]]["iou_largest"]) < float(lines[order[-1]]["iou_largest"])
    for flag, expected in (
        ("--worst", order[:2]),
        ("--best", sorted(ids, key=lambda image: (-float(lines[image]["iou_largest"]), image))[:2]),
    ):
        capsys.readouterr()
        draw("boxes", run, flag, 2, "--columns", 1, "--out", tmp_path / flag[2:], *CPU)
        assert f"images: {' '.join(expected)}\n" in capsys.readouterr().out
        assert [entry["image"] for entry in read_json(tmp_path / f"{flag[2:]}.json")["boxes"]] == expected

    # The first image of the picture has its boxes, scaled from the map (64 pixels) to the cell (224).
    entry = read_json(tmp_path / "worst.json")["boxes"][0]
    pixels = np.asarray(Image.open(tmp_path / "worst.png").convert("RGB"))
    (x0, y0, x1, y1), (px0, py0, px1, py1) = entry["truth"][0], entry["box"]
    left = pixels.shape[1] - 224
    blue, green = (
        np.argwhere((pixels[:224, left:] == colour).all(-1)) for colour in (drawing.TRUTH, drawing.PREDICTION)
    )
    assert green.min(0).tolist() == [int(py0 * 3.5), int(px0 * 3.5)] and green.max(0).tolist() == [
        int((py1 + 1) * 3.5) - 1,
        int((px1 + 1) * 3.5) - 1,
    ]
    assert (
        blue.min(0)[0] >= int(y0 * 3.5)
        and blue.min(0)[1] >= int(x0 * 3.5)
        and blue.max(0)[0] < (y1 + 1) * 3.5
        and blue.max(0)[1] < (x1 + 1) * 3.5
    )


def test_four_random_images_without_a_choice(trained, tmp_path, capsys):
    _, run = trained
    for command in ("maps", "boxes"):
        draw(command, run, "--cell", 32, "--out", tmp_path / "default", *CPU)
        shown = re.search("images: (.*)", capsys.readouterr().out)[1].split()
        assert len(set(shown)) == 4
        draw(command, run, "--random", 4, "--cell", 32, "--out", tmp_path / "four", *CPU)
        assert re.search("images: (.*)", capsys.readouterr().out)[1].split() == shown
        draw(command, run, "--seed", 1, "--cell", 32, "--out", tmp_path / "other", *CPU)
        assert re.search("images: (.*)", capsys.readouterr().out)[1].split() != shown
    assert (tmp_path / "default.png").read_bytes() == (tmp_path / "four.png").read_bytes()


def test_long_loops_show_how_far_they_are_unless_quiet(trained, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    _, run = trained
    monkeypatch.setattr(utils.time, "monotonic", itertools.count(step=100).__next__)  # every line is due
    monkeypatch.setattr(utils.Progress, "quiet", False)
    for command in ("histogram", "maps", "boxes", "gap"):
        draw(command, run, "--batch-size", 2, "--out", tmp_path / "x", *CPU)
        lines = capsys.readouterr().err.splitlines()
        assert any(line.startswith(f"{run.name}: 2 of ") for line in lines), lines
        draw(command, run, "--batch-size", 2, "--out", tmp_path / "x", "--quiet", *CPU)
        assert capsys.readouterr().err == ""


# ------------------------------------------------------------------------------------------------------ sweep


def write_sweep(path, results, *, metric="gt_known_loc", **changes):
    """A file as experiments sweep writes it. results: {value: [percent of each seed]}."""
    values = [
        {
            "value": value,
            "seeds": list(range(len(numbers))),
            "top1_cls": [99.0] * len(numbers),
            metric: numbers,
        }
        for value, numbers in results.items()
    ]
    content = {"dataset": "CUB", "arch": "vgg16", "method": "bridge", "param": "lambda_sim", "preset": 0.5}
    path.write_text(json.dumps(content | {"checkpoint": "best", "values": values} | changes))
    return path


def line_of(panel, marker):
    (line,) = (line for line in panel.lines if line.get_marker() == marker)
    return line


def test_a_sweep_of_one_seed_is_a_curve_with_a_star_at_the_preset(drawn, tmp_path, capsys):
    file = write_sweep(tmp_path / "s.json", {2.0: [70.5], 0.5: [80.25]})  # sorted when it is read
    draw("sweep", file, "--out", tmp_path / "s.pdf")
    (panel,) = drawn[0].axes
    curve, star = line_of(panel, "o"), line_of(panel, "*")
    assert list(curve.get_xdata()) == [0.5, 2] and list(curve.get_ydata()) == [80.25, 70.5]
    assert list(star.get_xdata()) == [0.5] and list(star.get_ydata()) == [80.25]
    assert panel.get_xlabel() == r"$\lambda_{\mathrm{sim}}$" and panel.get_ylabel() == "GT-known Loc, %"
    assert [text.get_text() for text in panel.get_legend().get_texts()] == ["preset: 0.5"]
    assert not panel.containers and panel.get_legend().get_title().get_text() == ""
    assert Image.open(tmp_path / "s.png").size == (round(3.3 * 300), round(2.2 * 300))
    written = capsys.readouterr().out.splitlines()
    assert written == [f"written to {tmp_path / name}" for name in ("s.png", "s.pdf")]
    before = (tmp_path / "s.png").read_bytes()
    draw("sweep", file, "--out", tmp_path / "s")
    assert (tmp_path / "s.png").read_bytes() == before


def test_a_sweep_over_seeds_shows_mean_and_deviation(drawn, tmp_path):
    results = {0.5: [5.0, 25.0], 1.0: [10.0, 30.0]}
    draw("sweep", write_sweep(tmp_path / "s.json", results, preset=0.75), "--out", tmp_path / "s")
    (panel,) = drawn[0].axes
    (bars,) = panel.containers
    assert list(bars.lines[0].get_xdata()) == [0.5, 1] and list(bars.lines[0].get_ydata()) == [15, 20]
    (segments,) = bars.lines[2]
    for (low, high), mean in zip(segments.get_segments(), (15, 20)):
        assert [low[1], high[1]] == pytest.approx([mean - 200**0.5, mean + 200**0.5])  # n - 1 in the variance
    texts = [text.get_text() for text in panel.get_legend().get_texts()]
    assert sorted(texts) == ["mean ± deviation, 2 seeds", "preset: 0.75"]
    assert not [
        line for line in panel.lines if line.get_marker() == "*"
    ]  # the preset is no value of the sweep
    assert [list(line.get_xdata()) for line in panel.lines if line.get_linestyle() == ":"] == [[0.75, 0.75]]


@pytest.mark.parametrize("width, columns", [(3.3, 1), (6.9, 3)])
def test_several_sweeps_are_panels_and_nothing_is_cut_off(drawn, tmp_path, width, columns):
    backend_agg = pytest.importorskip("matplotlib.backends.backend_agg")
    files = [
        write_sweep(tmp_path / "a.json", {0.25: [60.0, 61.0], 0.5: [70.0, 75.0]}),
        write_sweep(tmp_path / "b.json", {0.1: [50.0], 0.9: [51.0]}, param="tau_fg", preset=0.9),
        write_sweep(
            tmp_path / "c.json",
            {1: [40.0], 2: [41.0]},
            metric="pxap",
            dataset="OpenImages",
            param="p",
            preset=1,
        ),
        write_sweep(
            tmp_path / "d.json", {1: [40.0], 2: [41.0]}, metric="top1_cls", param="warm_epochs", preset=1
        ),
    ]
    draw("sweep", *files, "--width", width, "--dpi", 100, "--out", tmp_path / "s")
    panels = [panel for panel in drawn[0].axes if panel.get_visible()]
    assert [panel.get_xlabel() for panel in panels] == [
        r"$\lambda_{\mathrm{sim}}$",
        r"$\tau_{\mathrm{fg}}$",
        "p",
        "warm epochs",
    ]
    assert [panel.get_ylabel() for panel in panels] == [
        f"{metric}, %" for metric in ("GT-known Loc", "GT-known Loc", "PxAP", "Top-1 cls")
    ]
    titles = [panel.get_legend().get_title().get_text() for panel in panels]
    assert titles == ["CUB vgg16 bridge"] * 2 + ["OpenImages vgg16 bridge", "CUB vgg16 bridge"]
    renderer = backend_agg.FigureCanvasAgg(drawn[0]).get_renderer()
    boxes = [panel.get_tightbbox(renderer) for panel in panels]
    assert len({round(panel.get_position().x0, 2) for panel in panels}) == columns
    for i, box in enumerate(boxes):
        assert min(box.x0, box.y0) >= -1
        assert box.x1 <= drawn[0].bbox.x1 + 1 and box.y1 <= drawn[0].bbox.y1 + 1
        for other in boxes[i + 1 :]:
            over = (
                min(box.x1, other.x1) - max(box.x0, other.x0),
                min(box.y1, other.y1) - max(box.y0, other.y0),
            )
            assert min(over) <= 1, over
        assert min(panels[i].get_window_extent().width, panels[i].get_window_extent().height) > 80


def test_a_bad_sweep_file_is_one_line_that_names_it(fails, tmp_path):
    pytest.importorskip("matplotlib")
    good, bad = write_sweep(tmp_path / "good.json", {1: [2.0]}), tmp_path / "bad.json"
    whole = read_json(good)
    row = whole["values"][0]
    fails(figures.main, ["sweep", bad], bad, "experiments sweep")
    broken = [
        {key: value for key, value in whole.items() if key != name} for name in whole if name != "checkpoint"
    ]
    broken += [whole | {"preset": preset} for preset in ("much", None, True, float("nan"), 10**400)]
    broken += [whole | {"param": param} for param in (3, "a $b", "")]
    broken += [
        whole | {"values": values}
        for values in ([], None, 3, [3], [None], {"value": 1}, [row, row | {"value": "x"}])
    ]
    broken += [
        whole | {"values": [row, row | {"value": 2, "gt_known_loc": numbers}]}
        for numbers in ([], None, 3, ["x"], [None], [1, 2], [float("inf")])
    ]
    broken += [whole | {"values": [row, {"value": 2, "seeds": [0], "pxap": [1]}]}, whole | {"arch": None}]
    for text in ["", "[]", "3", *map(json.dumps, broken)]:
        bad.write_text(text)
        fails(figures.main, ["sweep", good, bad, "--out", tmp_path / "s"], bad, "experiments sweep")
    assert not list(tmp_path.glob("s.*"))


# -------------------------------------------------------------------------------------------------------- gap


def test_regions_and_numbers_by_hand(tmp_path):
    """A map of 4 x 4 locations on 8 x 8 pixels: centres at pixels 1, 3, 5, 7."""
    mask = np.zeros((8, 8), dtype=np.uint8)
    mask[0:4, 0:4] = 255
    ignore = np.zeros((8, 8), dtype=np.uint8)
    ignore[:, 6:] = 255
    for name, pixels in (("mask", mask), ("ignore", ignore)):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    split = Split(
        "one",
        tmp_path,
        ["x"],
        np.zeros(1, dtype=np.int64),
        np.array([[16, 16]]),
        {0: np.array([[4, 7, 11, 9], [0, 0, 3, 3]])},
        {},
    )
    split.masks[0] = type(data.Masks([], []))(["mask.png"], ["ignore.png"])
    run = figures.Run(tmp_path, "run", nn.Identity(), None, {}, split, 8)
    found = figures.regions(run, 0, (4, 4))
    # Boxes at half size: x 2 ... 5, y 3 ... 4 holds the centres (3, 3) and (5, 3).
    # x 0 ... 1, y 0 ... 1 holds the centre (1, 1).
    inside = np.zeros((4, 4), dtype=bool)
    inside[1, 1] = inside[1, 2] = inside[0, 0] = True
    assert (found["box"][0] == inside).all() and (found["box"][1] == ~inside).all()
    expected = np.zeros((4, 4), dtype=bool)
    expected[:2, :2] = True
    outside = ~expected
    outside[:, 3] = False
    assert (
        (found["mask"][0] == expected).all() and (found["mask"][1] == outside).all() and "part" not in found
    )

    part = np.zeros((8, 8), dtype=np.uint8)
    part[1, 1] = part[7, 7] = 255
    (tmp_path / "parts").mkdir()
    Image.fromarray(part).save(tmp_path / "parts" / "x.png")
    head, rest = figures.regions(run, 0, (4, 4))["part"]
    assert np.argwhere(head).tolist() == [[0, 0], [3, 3]] and np.argwhere(rest).tolist() == [
        [0, 1],
        [1, 0],
        [1, 1],
    ]

    S = np.array([[0.0, 0, 0, 0], [0, -0.5, 0.3, 0], [0, 0, 0, 0], [0, 0, 0, -1.3]])
    F_hat = np.array([[1.0, 0, 0, 0], [0, 0.5, 0.6, 0], [0, 0, 0, 0], [0, 0, 0, 0.26]])
    numbers = figures.region_numbers(F_hat, S, *found["box"])
    assert numbers == pytest.approx(
        {
            "S_inside": -0.2 / 3,
            "S_outside": -0.1,
            "F_hat_inside": 0.7,
            "F_hat_outside": 0.02,
            "S_negative_inside": 100 / 3,
        }
    )
    assert figures.region_numbers(F_hat, S, np.zeros_like(inside), ~np.zeros_like(inside)).keys() == {
        "S_outside",
        "F_hat_outside",
    }


def test_gap_of_a_run_against_loops_and_the_evaluator(trained, tmp_path, capsys):
    flags, run = trained
    evaluate.main([str(run), "--batch-size", "8", *CPU])
    draw("gap", run, "--out", tmp_path / "gap", "--batch-size", 4, *CPU)
    (entry,) = read_json(tmp_path / "gap.json")["runs"]
    result = read_json(run / "results_best_test.json")
    assert (
        entry["images"] == 9
        and entry["localization"]["CAM"]["max_box_acc_v2"] == result["metrics"]["max_box_acc_v2"]
    )
    assert entry["localization"]["CAM"]["pxap"] == pytest.approx(result["metrics"]["pxap"], abs=1e-3)
    table = capsys.readouterr().out
    assert f"| MaxBoxAccV2 by CAM | {result['metrics']['max_box_acc_v2']['mean']:.1f} |" in table

    # evaluate.py on files with F and S as score maps.
    model, images, labels, split = network_of(run, tmp_path)
    with torch.no_grad():
        features, weight = model(images).features.numpy(), model.fc.weight.numpy()
    F = np.sqrt((features**2).sum(1))
    S = np.einsum("nc,nchw->nhw", weight[labels], features)
    S = np.divide(
        S, F * np.linalg.norm(weight[labels], axis=1)[:, None, None], out=np.zeros_like(S), where=F > 0
    )
    for name, values in (("F", F), ("S", S)):
        low, high = values.min((1, 2), keepdims=True), values.max((1, 2), keepdims=True)
        for image, score_map in zip(split.ids, (values - low) / (high - low)):
            path = tmp_path / name / f"{image}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, score_map)
        out = tmp_path / f"{name}.json"
        evaluate.main(
            ["--score-maps", str(tmp_path / name), "--out", str(out), *flags[: flags.index("--weights")]]
        )
        of_maps, ours = read_json(out)["metrics"], entry["localization"][name]
        assert ours["max_box_acc_v2"] == of_maps["max_box_acc_v2"] and ours["pxap"] == pytest.approx(
            of_maps["pxap"], abs=0.05
        )

    # Means inside and outside, with a loop over locations.
    F_hat = (F - F.min((1, 2), keepdims=True)) / np.ptp(F, axis=(1, 2), keepdims=True)
    of_image = {"box": [], "mask": []}
    for i in range(9):
        x0, y0, x1, y1 = (int(v) * 64 // n for v, n in zip(split.boxes[i][0], tuple(split.sizes[i]) * 2))
        mask = load_masks(split.root, split.masks[i], 64)[0]
        n = F.shape[1]
        cells = [(r, c, (2 * r + 1) * 32 // n, (2 * c + 1) * 32 // n) for r in range(n) for c in range(n)]
        for kind, pixels in (
            ("box", {(y, x) for y in range(y0, y1 + 1) for x in range(x0, x1 + 1)}),
            ("mask", set(zip(*np.nonzero(mask)))),
        ):
            inside = [(r, c) for r, c, y, x in cells if (y, x) in pixels]
            outside = [(r, c) for r, c, y, x in cells if (y, x) not in pixels]
            of_image[kind].append(
                [
                    np.mean([S[i][at] for at in inside]) if inside else np.nan,
                    np.mean([S[i][at] for at in outside]),
                    np.mean([F_hat[i][at] for at in inside]) if inside else np.nan,
                    np.mean([F_hat[i][at] for at in outside]),
                    100 * np.mean([S[i][at] < 0 for at in inside]) if inside else np.nan,
                ]
            )
    for kind, rows in of_image.items():
        expected = np.nanmean(np.array(rows), axis=0)
        np.testing.assert_allclose([entry[kind][name] for name in figures.GAP], expected, atol=1e-4)
        assert entry[kind]["images"] == int((~np.isnan(np.array(rows)[:, 0])).sum())


def test_a_network_without_linear_classifier_has_no_factors(trained, fails, tmp_path, monkeypatch):
    _, run = trained
    load_run = evaluation.load_run

    def without_fc(*arguments):
        model, method, checkpoint = load_run(*arguments)
        layer = nn.Conv1d(model.fc.in_features, model.fc.out_features, 1)
        layer.weight, layer.bias = nn.Parameter(model.fc.weight[:, :, None]), model.fc.bias
        model.fc = nn.Sequential(nn.Unflatten(1, (-1, 1)), layer, nn.Flatten())
        method.predict = lambda model, images, labels: (model(images).logits, model(images).features[:, 0])
        return model, method, checkpoint

    monkeypatch.setattr(figures, "load_run", without_fc)
    for command in (["gap", run], ["maps", run, "--random", 1]):
        fails(
            figures.main,
            [*command, "--out", tmp_path / "x", *CPU],
            run,
            "--method bridge",
            "no linear classifier",
        )


# -------------------------------------------------------------------------------------------------- bad input


def test_without_matplotlib(trained, fails, tmp_path, monkeypatch):
    _, run = trained
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    fails(figures.main, ["curves", run], "matplotlib", "pip install -e '.[figures]'")
    fails(figures.main, ["histogram", run, *CPU], "pip install")
    fails(figures.main, ["sweep", tmp_path / "s.json"], "pip install")
    for command in (
        ["maps", run, "--random", 1, *CPU],
        ["boxes", run, "--random", 1, *CPU],
        ["gap", run, *CPU],
    ):
        draw(*command, "--out", tmp_path / "x")


def test_the_command_itself_from_anywhere(tmp_path):
    code = (
        "import runpy, bridge_wsol.figures; assert 'matplotlib' not in sys.modules; "
        "runpy.run_module('bridge_wsol.figures', run_name='__main__')"
    )
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        f"import sys; sys.path.insert(0, {str(REPOSITORY)!r}); {code}",
        "gap",
        "nowhere",
    ]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1 and "nowhere" in ended.stderr, ended.stderr


def test_only_the_package(trained, tmp_path):
    """figures works from an installed package, without train.py and evaluate.py beside it."""
    _, run = trained
    site = tmp_path / "site-packages"
    shutil.copytree(
        REPOSITORY / "bridge_wsol", site / "bridge_wsol", ignore=shutil.ignore_patterns("__pycache__")
    )
    for command in ("gap", "boxes"):
        flags = [command, str(run), "--out", str(tmp_path / command), *CPU]
        ended = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "bridge_wsol.figures", *flags],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(site)},
        )
        assert ended.returncode == 0 and ended.stderr == "", ended.stderr
    assert read_json(tmp_path / "gap.json")["runs"][0]["images"] == 9
    assert len(read_json(tmp_path / "boxes.json")["boxes"]) == 4
    assert not list(site.rglob("train.py")) and not list(site.rglob("evaluate.py"))


def test_bad_input_to_figures(trained, fails, tmp_path):
    pytest.importorskip("matplotlib")
    _, run = trained
    fails(figures.main, ["curves", tmp_path / "nowhere"], tmp_path / "nowhere", "no such run")
    fails(
        figures.main,
        ["curves", run, "--split", "val", "--checkpoint", "last"],
        "results_last_val.json",
        f"python evaluate.py {run} --checkpoint last --split val",
    )
    fails(figures.main, ["curves", run, "--names", "a", "b"], "2 names for 1 runs")
    fails(figures.main, ["curves", run, "--frobnicate"], "--frobnicate")
    fails(figures.main, ["boxes", run, "--images", "test/77.png", *CPU], "test/77.png", "test/00.png")
    fails(figures.main, ["boxes", run, "--worst", 1, "--best", 1, *CPU], "--best", "--worst")
    fails(figures.main, ["boxes", run, "--worst", 0, *CPU], "--worst 0")
    fails(figures.main, [], "command")
    results = run / "results_best_test.json"
    whole = results.read_text()
    for damaged in (
        "",
        "[]",
        "{}",
        whole[:500],
        whole.replace('"metrics"', '"m"'),
        json.dumps(read_json(results) | {"curves": {"30": [1]}}),
    ):
        results.write_text(damaged)
        fails(figures.main, ["curves", run], results, "evaluate.py")
    masks_only = read_json(run / "results_last_test.json") | {"curves": None, "thresholds": None}
    results.write_text(json.dumps(masks_only))
    fails(figures.main, ["curves", run], "no boxes")
    fails(figures.main, ["boxes", run, "--random", 1, *CPU], "no boxes")
