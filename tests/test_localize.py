"""`Localizer` and `evaluate.py --images`: photos, boxes in their pixels, thresholds."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, make_folder, results, run
from PIL import Image

from bridge_wsol.boxes import LEVELS
from bridge_wsol.datasets import load_split
from bridge_wsol.evaluation import TrainedRun
from bridge_wsol.localize import FALLBACK_THRESHOLD, Found, Localizer, original_box
from bridge_wsol.utils import InputError


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    for name, shape in (("a.png", (40, 70, 3)), ("b.png", (90, 30, 3))):
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(tmp_path / name)
    return [tmp_path / "a.png", tmp_path / "b.png"]


def test_localizer_finds_what_the_command_line_finds(trained, photos):
    _, folder = trained
    run("evaluate", f"{folder} --device cpu --images {photos[0]} {photos[1]}")
    entries = results(folder / "images", "boxes.json")
    localizer = Localizer(str(folder), device="cpu")
    of_paths = localizer([str(photos[0]), photos[1]])
    for entry, found in zip(entries, of_paths, strict=True):
        assert found.box == entry["box"] and found.top5 == entry["top5"]
        assert found.score_map.shape == (64, 64) and found.score_map.dtype == np.float32
        assert found.score_map.min() == 0 and found.score_map.max() == 1
        assert sum(of["probability"] for of in found.top5) == pytest.approx(1)  # three classes
    assert isinstance(alone := localizer(photos[0]), Found) and alone.box == of_paths[0].box
    assert repr([alone]).count("array") == 0 and str(alone.box[-1]) in str(alone)


def test_an_object_has_the_map_of_its_file(trained, photos, tmp_path):
    """A PIL image turned as its orientation says, one of 16 bits, an array, a tensor."""
    localizer, pixels = Localizer(trained[1], device="cpu"), np.asarray(Image.open(photos[0]))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees, clockwise
    Image.fromarray(pixels).save(turned := tmp_path / "turned.png", exif=exif)
    Image.fromarray(np.rot90(pixels, -1)).save(upright := tmp_path / "upright.png")
    deep = np.random.default_rng(0).integers(0, 2**16, (60, 40)).astype(np.uint16)
    Image.fromarray(deep).save(sixteen := tmp_path / "deep.png")
    for path, *objects in (
        (upright, turned, Image.open(turned)),
        (sixteen, Image.open(sixteen)),
        (photos[0], pixels, torch.tensor(pixels)),
    ):
        expected, *found = localizer([path, *objects])
        for of_object in found:
            assert of_object.box == expected.box and of_object.top5 == expected.top5
            np.testing.assert_array_equal(of_object.score_map, expected.score_map)
    assert not np.array_equal(localizer(turned).score_map, localizer(photos[0]).score_map)
    wrong = [pixels.transpose(2, 0, 1), pixels / 255, pixels[None], pixels.astype(np.uint16), b"photo", None]
    for image in (*wrong, torch.tensor(pixels).permute(2, 0, 1), [pixels, pixels[..., 0]]):
        with pytest.raises(InputError, match="expected a path, a PIL image, or an array or tensor H x W x 3"):
            localizer(image)


def test_thresholds_of_a_localizer(trained, photos, tmp_path):
    _, folder = trained
    checkpoint = torch.load(folder / "best.pt", weights_only=True)
    checkpoint["val"] |= {"middle": 153, "boxed": 49}
    torch.save(checkpoint, folder / "best.pt")
    few = Localizer(folder, device="cpu")
    assert few.threshold == 0.2 and "49" in few.note
    checkpoint["val"]["boxed"] = 50
    torch.save(checkpoint, folder / "best.pt")
    chosen = Localizer(folder, device="cpu")
    assert chosen.threshold == 153 / 255 == 0.6 and not chosen.note
    score_map = chosen(photos[0]).score_map
    # The mask of level 153 is v > 153, as that of every threshold in [153, 154) / 255.
    boxes = {t: Localizer(folder, device="cpu", threshold=t)(photos[0]).box for t in (0.3, 0.601, 0.603, 0.9)}
    assert boxes[0.601] == boxes[0.603] == chosen(photos[0]).box and len({*map(str, boxes.values())}) == 3
    x0, y0, x1, y1 = (boxes[0.9][i] * 64 // (70, 40)[i % 2] for i in range(4))
    assert score_map[y0 : y1 + 1, x0 : x1 + 1].max() == 1  # the top of the map is inside
    elsewhere = Localizer(folder, device="cpu", normalize="ivr", data_root=tmp_path / "nowhere")
    assert elsewhere.threshold == FALLBACK_THRESHOLD == 0.2 and "nowhere" in elsewhere.note
    given = Localizer(folder, device="cpu", normalize="ivr", threshold=0.2)
    assert elsewhere(photos[0]).box == given(photos[0]).box and not given.note
    with pytest.raises(InputError, match="nowhere"):
        Localizer(tmp_path / "nowhere")


@pytest.mark.parametrize("method", ["bridge", "calm"])
def test_a_photo_gets_the_map_of_the_evaluation(trained_once, tmp_path, method):
    """Localizer's map of a test image is the one that evaluate.py saves, where Top-1 is the label."""
    root = trained_once[0]
    lists = f"--data-root {root}/data --lists {root}/lists"
    run("train", f"{TINY} {lists} --method {method} --epochs 1 --out {tmp_path}/run")
    run("evaluate", f"{tmp_path}/run --device cpu --save-maps {tmp_path}/maps")
    localizer, compared = Localizer(tmp_path / "run", "cpu"), 0
    split = load_split("tiny", "test", f"{root}/data", f"{root}/lists")
    for image, label in zip(split.ids, split.labels):
        found = localizer(root / "data" / "tiny" / image)
        if found.top5[0]["class"] == label:
            saved = np.load(tmp_path / "maps" / f"{image}.npy")
            np.testing.assert_allclose(found.score_map, saved, atol=1e-3)
            compared += 1
    assert compared


def localize(folder, arguments):
    run("evaluate", f"{folder} --device cpu --images {arguments}")
    return json.loads((folder / "images" / "boxes.json").read_text())


def test_photos_of_every_kind_and_one_that_cannot_be_read(trained, tmp_path, capsys):
    photos, images = tmp_path / "photos", trained[1] / "images"
    photos.mkdir()
    long = "é" * 120 + ", 2.png"  # 247 bytes and a comma
    noise = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    for mode in ("L", "CMYK", "P", "RGBA"):
        Image.fromarray(noise).convert(mode).save(photos / f"{mode}.tif")
    for name, size in (
        ("one.png", (1, 1)),
        ("thin.png", (3, 500)),
        ("large.jpg", (1200, 900)),
        (long, (40, 50)),
    ):
        Image.fromarray(noise).resize(size).save(photos / name)
    (photos / "half.jpg").write_bytes((photos / "large.jpg").read_bytes()[:700])
    with pytest.raises(SystemExit) as end:
        localize(trained[1], f"{photos} nothing.jpg")
    error = capsys.readouterr().err
    assert end.value.code == 1 and f"{photos}/half.jpg: " in error and "nothing.jpg: " in error
    found = {Path(x["image"]).name: x for x in json.loads((images / "boxes.json").read_text())}
    assert len(found) == 8 and (found["large.jpg"]["width"], found["large.jpg"]["height"]) == (1200, 900)
    for entry in found.values():
        x0, y0, x1, y1 = entry["box"] or [0, 0, 0, 0]
        assert 0 <= x0 <= x1 < entry["width"] and 0 <= y0 <= y1 < entry["height"]
    pictures = {path.name[6:]: Image.open(path).size for path in images.glob("*.png")}
    assert len(pictures) == 8 and pictures["large.png"] == (448, 2 * 336)


def test_the_box_covers_in_the_photo_what_it_covers_in_the_map():
    rng = np.random.default_rng(0)
    for size, high in ((224, 900), (64, 60), (64, 3)) * 20:
        shown, corners = rng.integers(1, high, 2), np.sort(rng.integers(0, size, (2, 2)), axis=0)
        found = original_box(corners.ravel(), size, tuple(shown))
        for n, (a, b), ends in zip(shown, corners.T, np.reshape(found, (2, 2)).T):
            touched = [p for p in range(n) if p * size < (b + 1) * n and (p + 1) * size > a * n]
            assert ends.tolist() == [touched[0], touched[-1]]
    assert original_box(np.zeros(4, dtype=int), 224, (50, 50)) is None


def test_each_normalization_has_its_own_threshold_from_val(trained, tmp_path, fails, capsys, monkeypatch):
    folder, photo = trained[1], tmp_path / "data" / "tiny" / "test" / "03.png"
    for how in ("minmax", "ivr"):
        run("evaluate", f"{folder} --device cpu --split val --normalize {how} --out {folder}/val.json")
        curve, chosen = results(folder, "val.json")["curves"]["largest"], f"{photo} --normalize {how}"
        best = [level for level in range(LEVELS) if curve[level] == max(curve)]
        assert len(best) > 2 and localize(folder, chosen) == localize(folder, f"{chosen} --threshold 0.2")
        with monkeypatch.context() as patch:
            patch.setattr("bridge_wsol.evaluation.ENOUGH_BOXED", 3)
            middle = best[len(best) // 2]
            assert Localizer(folder, "cpu", normalize=how).threshold == middle / LEVELS
            assert localize(folder, chosen) == localize(
                folder, f"{chosen} --threshold {(middle + 0.5) / 255}"
            )
    fails("evaluate", f"{folder} --images {photo} --threshold 1", "threshold")
    fails("evaluate", f"{folder} --device cpu --images {tmp_path}/lists", tmp_path / "lists")


def test_a_folder_without_boxes_trains_and_chooses_by_classification(tmp_path, capsys, fails):
    folder, out = make_folder(tmp_path / "cwd" / "own"), tmp_path / "run"
    run("train", f"{TINY} --dataset own --workers 0 --out {out}")
    assert "val has no boxes" in capsys.readouterr().out
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    best, result = max(entries, key=lambda x: (x["val"]["top1_cls"], -x["epoch"])), results(out)
    assert result["epoch"] == best["epoch"] and result["metrics"]["max_box_acc_v2"] is None
    (fallback,) = localize(out, "'own/class 0/3.png'")  # no threshold from val: 0.2 of the map's maximum
    assert capsys.readouterr().out.count("no thresholds of val") == 1
    assert [fallback] == localize(out, "'own/class 0/3.png' --threshold 0.2")
    assert {k["name"]: k["class"] for k in fallback["top5"]} == {f"class {k}": k for k in range(3)}
    (folder / "class 1").rename(folder / "other class")
    fails("evaluate", f"{out} --device cpu --workers 0", "other classes")


def test_a_percentile_that_val_chooses_serves_photos_too(trained, tmp_path):
    folder, photo = trained[1], tmp_path / "data" / "tiny" / "test" / "03.png"
    chosen = TrainedRun(folder, device="cpu").choose("ivr", "val")
    for threshold in (None, 0.5):
        how = dict(normalize="ivr", threshold=threshold)
        by_val = Localizer(folder, "cpu", percentile="val", **how)(photo)
        given = Localizer(folder, "cpu", percentile=chosen.percentile, **how)(photo)
        assert by_val.box == given.box
        np.testing.assert_array_equal(by_val.score_map, given.score_map)
    with pytest.raises(InputError, match="ivr"):
        Localizer(folder, "cpu", percentile="val")
