"""`Localizer` and `evaluate.py --images`: photos, boxes in their pixels, thresholds."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, make_folder, results, run
from PIL import Image

from bridge_wsol import evaluation
from bridge_wsol.boxes import LEVELS
from bridge_wsol.evaluation import Localizer


def localize(folder, arguments):
    run("evaluate", f"{folder} --device cpu --images {arguments}")
    return json.loads((folder / "images" / "boxes.json").read_text())


def test_photos_of_every_kind_and_one_that_cannot_be_read(trained, tmp_path, capsys):
    photos, images = tmp_path / "photos", trained[1] / "images"
    photos.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    for mode in ("L", "CMYK", "P", "RGBA"):
        Image.fromarray(noise).convert(mode).save(photos / f"{mode}.tif")
    for name, size in (("one.png", (1, 1)), ("thin.png", (3, 500)), ("large.jpg", (4000, 3000))):
        Image.fromarray(noise).resize(size).save(photos / name)
    (photos / "half.jpg").write_bytes((photos / "large.jpg").read_bytes()[:700])
    with pytest.raises(SystemExit) as end:
        localize(trained[1], f"{photos} nothing.jpg")
    error = capsys.readouterr().err
    assert end.value.code == 1 and f"{photos}/half.jpg: " in error and "nothing.jpg: " in error
    found = {Path(x["image"]).name: x for x in json.loads((images / "boxes.json").read_text())}
    assert len(found) == 7 and (found["large.jpg"]["width"], found["large.jpg"]["height"]) == (4000, 3000)
    for entry in found.values():
        x0, y0, x1, y1 = entry["box"] or [0, 0, 0, 0]
        assert 0 <= x0 <= x1 < entry["width"] and 0 <= y0 <= y1 < entry["height"]
    pictures = {path.name[6:]: Image.open(path).size for path in images.glob("*.png")}
    assert len(pictures) == 7 and pictures["large.png"] == (448, 2 * 336)


def test_the_box_covers_in_the_photo_what_it_covers_in_the_map():
    rng = np.random.default_rng(0)
    for size, high in ((224, 900), (64, 60), (64, 3)) * 20:
        shown, corners = rng.integers(1, high, 2), np.sort(rng.integers(0, size, (2, 2)), axis=0)
        found = evaluation.original_box(corners.ravel(), size, tuple(shown))
        for n, (a, b), ends in zip(shown, corners.T, np.reshape(found, (2, 2)).T):
            touched = [p for p in range(n) if p * size < (b + 1) * n and (p + 1) * size > a * n]
            assert ends.tolist() == [touched[0], touched[-1]]
    assert evaluation.original_box(np.zeros(4, dtype=int), 224, (50, 50)) is None


def test_each_normalization_has_its_own_threshold_from_val(trained, tmp_path, fails, capsys):
    folder, photo = trained[1], tmp_path / "data" / "tiny" / "test" / "03.png"
    for how in ("minmax", "ivr"):
        run("evaluate", f"{folder} --device cpu --split val --normalize {how} --out {folder}/val.json")
        level, chosen = results(folder, "val.json")["levels"]["largest"], f"{photo} --normalize {how}"
        assert localize(folder, chosen) == localize(folder, f"{chosen} --threshold {(level + 0.5) / 255}")
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
    assert capsys.readouterr().out.count("no threshold was chosen on val") == 1
    assert [fallback] == localize(out, "'own/class 0/3.png' --threshold 0.2")
    assert {k["name"]: k["class"] for k in fallback["top5"]} == {f"class {k}": k for k in range(3)}
    (folder / "class 1").rename(folder / "other class")
    fails("evaluate", f"{out} --device cpu --workers 0", "other classes")


def test_a_localizer_takes_arrays(trained):
    pixels = np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)
    localizer = Localizer(trained[1], device="cpu")
    of_array, of_image = localizer(pixels), localizer(Image.fromarray(pixels))
    assert of_array.box == of_image.box and of_array.top5 == of_image.top5
    assert localizer.level is not None and localizer.threshold == localizer.level / LEVELS


def test_a_photo_whose_name_has_commas_and_many_bytes(trained, tmp_path):
    photo = tmp_path / ("é" * 120 + ", 2.png")  # 247 bytes
    Image.new("RGB", (40, 50)).save(photo)
    assert len(localize(trained[1], f"'{photo}'")) == 1
    assert len([*(trained[1] / "images").glob("*.png")]) == 1
