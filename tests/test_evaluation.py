"""The evaluation from Python, files per image, and which thresholds val gives."""

import re

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, correct_at, results, run, split_of, write_results
from PIL import Image

from bridge_wsol.data import Masks, Split, load_score_maps
from bridge_wsol.datasets import load_split
from bridge_wsol.evaluation import (
    MapBatch,
    TrainedRun,
    evaluate_maps,
    evaluate_score_maps,
    load_per_image,
    save_per_image,
)
from bridge_wsol.metrics import PerImage, measure
from bridge_wsol.utils import InputError

VAL = {"30": 40, "50": 90, "70": 120, "largest": 60}


@pytest.fixture
def split(trained, tmp_path):
    return load_split("tiny", "test", tmp_path / "data", tmp_path / "lists")


def test_pairs_from_python_are_evaluated_as_files_are(trained, split, tmp_path):
    run("evaluate", f"{trained[1]} --device cpu --save-maps {tmp_path}/maps --per-image {tmp_path}/a.csv")
    expected = results(trained[1])
    pairs = [(image, np.load(tmp_path / "maps" / f"{image}.npy")) for image in split.ids]
    result = evaluate_score_maps(reversed(pairs), split, image_size=64)
    assert result["curves"] == expected["curves"] and result["images"] == 9
    assert result["metrics"]["pxap"] == expected["metrics"]["pxap"]
    assert result["metrics"]["top1_loc"] is None and result["metrics"]["top1_cls"] is None

    # With logits: the class is right for images 0 ... 2 alone.
    logits = np.eye(3)[[label if i < 3 else (label + 1) % 3 for i, label in enumerate(split.labels)]]
    triples = [(*pair, row) for pair, row in zip(pairs, logits)]
    result = evaluate_score_maps(triples, split, image_size=64, threshold=0.5, workers=2)
    assert result["metrics"]["top1_cls"] == pytest.approx(100 / 3)
    assert result["metrics"]["top5_loc"] == expected["metrics"]["gt_known_loc"]
    assert result["metrics"]["fixed_threshold"]["threshold"] == 0.5


def test_pairs_that_do_not_fit_the_split(split):
    good = np.random.default_rng(0).random((7, 9))
    whole = [(image, good) for image in split.ids]
    with_logits = [(*pair, [1.0, 2.0, 3.0]) for pair in whole]
    for pairs, words in (
        (whole[:-1], "test/08.png"),
        ([*whole, whole[0]], "test/00.png.* second"),
        ([("other.png", good)], "other.png"),
        ([(*whole[2], [1.0, 2.0])], "test/02.png: logits"),  # its label is 2
        ([(*whole[0], [[1.0, 2.0, 3.0]] * 2)], "test/00.png: logits"),
        (with_logits[:3] + whole[3:], "some images have logits"),
        (whole[:3] + with_logits[3:], "some images have logits"),
    ):
        with pytest.raises(InputError, match=words):
            evaluate_score_maps(pairs, split, image_size=64)
    for threshold in (-0.1, 1.0, float("nan")):
        with pytest.raises(InputError, match="threshold"):
            evaluate_score_maps(whole, split, threshold=threshold)


def test_the_published_lists_are_enough_from_any_folder():
    """CUB's test list: no image, no other file of the data set, from an empty folder."""
    split = load_split("CUB", "test", lists=REPOSITORY / "data_splits")
    assert len(split) == len(split.boxes) == 5794 and len({*split.labels.tolist()}) == 200
    first = split.ids.index("001.Black_footed_Albatross/Black_Footed_Albatross_0046_18.jpg")
    assert split.sizes[first].tolist() == [500, 335] and split.boxes[first].tolist() == [[60, 27, 385, 331]]
    few, maps = split.take(range(0, 5794, 1000), "CUB test"), []
    for i, image in enumerate(few.ids):
        x0, y0, x1, y1 = (few.boxes[i][0] * 224 // np.tile(few.sizes[i], 2)).tolist()
        maps.append((image, np.zeros((224, 224))))
        maps[i][1][y0:y1, x0:x1] = 1  # the box of a component ends one pixel after it
    assert evaluate_score_maps(maps, few)["metrics"]["max_box_acc_v2"]["mean"] == 100


def test_score_maps_of_any_float_type_and_blank_ones(tiny, tmp_path, capsys):
    split = load_split("tiny", "test", tmp_path / "data", tmp_path / "lists")
    rng = np.random.default_rng(0)
    maps = {image: rng.integers(0, 129, (16, 16)) / 128 for image in split.ids}  # exact in half precision
    expected = evaluate_score_maps(maps.items(), split)
    for kind in (torch.float16, torch.bfloat16, torch.float64):
        tensors = ((image, torch.tensor(value).to(kind)) for image, value in maps.items())
        assert evaluate_score_maps(tensors, split) == expected
    assert "have no box" not in capsys.readouterr().out
    blank = {image: np.zeros((4, 4)) if i < 2 else maps[image] for i, image in enumerate(split.ids)}
    assert evaluate_score_maps(blank.items(), split)["images"] == 9
    assert "2 of 9 maps" in capsys.readouterr().out
    torch.save(torch.zeros(4, 4), tmp_path / "a.npy")
    with pytest.raises(InputError, match="a.npy: a score map must be one 2-D array"):
        list(load_score_maps(tmp_path, Split("test", tmp_path, ["a.jpg"], np.zeros(1, dtype=int))))


def test_a_file_per_image_is_small_and_read_as_it_was_written(tmp_path):
    split = load_split("CUB", "test", lists=REPOSITORY / "data_splits")
    n, rng = len(split), np.random.default_rng(0)
    # Random bits: what compresses worst.
    correct = np.unpackbits(rng.integers(0, 256, (n, 4, 32), dtype=np.uint8), axis=-1, count=255).astype(bool)
    fixed, every, ranks = rng.random(n) < 0.5, np.ones(n, dtype=bool), rng.integers(0, 256, n)
    per_image = PerImage(every, ~every, correct, np.where(ranks == 255, 256, ranks), None, fixed, 0.25, VAL)
    result = per_image.result()  # in several blocks
    assert list(result["curves"].values()) == (100 * correct.sum(0) / n).tolist()
    save_per_image(tmp_path / "results.npz", per_image, split)
    assert (tmp_path / "results.npz").stat().st_size < 160 * n
    stored = load_per_image(tmp_path / "results.json", result["metrics"])
    assert stored.ids == split.ids and stored.digest == split.digest()
    found = stored.per_image
    np.testing.assert_array_equal(found.ranks, ranks)  # at most 255: no rank wraps to 0
    for name in ("boxed", "masked", "correct", "fixed"):
        np.testing.assert_array_equal(getattr(found, name), getattr(per_image, name))
    assert (found.pixels, found.threshold, found.val_levels) == (None, 0.25, VAL)


def test_files_per_image_belong_to_the_results_whose_metrics_they_give(tmp_path):
    per_image = correct_at(1, 0, 1)
    write_results(tmp_path / "a.json", per_image, split_of(3))
    metrics = per_image.result()["metrics"]
    near, other = (metrics | {"max_box_acc": metrics["max_box_acc"] + x} for x in (1e-12, 1e-3))
    assert load_per_image(tmp_path / "a.json", near).ids == ["0.jpg", "1.jpg", "2.jpg"]
    with pytest.raises(InputError, match="not of the evaluation"):
        load_per_image(tmp_path / "a.json", other)


def test_without_intervals(trained, tmp_path, capsys):
    run("evaluate", f"{trained[1]} --device cpu --no-intervals --out {tmp_path}/r.json")
    without, given = results(tmp_path, "r.json"), results(trained[1])
    assert "intervals" not in without and "95 %" not in capsys.readouterr().out
    assert without["metrics"] == given["metrics"]
    assert given["intervals"]["max_box_acc_v2"].keys() == given["metrics"]["max_box_acc_v2"].keys()


def test_whose_thresholds_of_val_hold(trained, tmp_path):
    """The training's, for its own maps; chosen anew for other maps and for other boxes of val."""
    folder, lists = trained[1], tmp_path / "lists" / "tiny" / "val"
    where = {"device": "cpu", "data_root": tmp_path / "data", "lists": tmp_path / "lists"}

    def on_val(how):
        places = f"--data-root {tmp_path}/data --lists {tmp_path}/lists --out {tmp_path}/r.json"
        run("evaluate", f"{folder} --device cpu --split val --normalize {how} --workers 0 {places}")
        return results(tmp_path, "r.json")

    of_val, opened = on_val("minmax"), TrainedRun(folder, **where)
    assert opened.choose().levels == of_val["levels"] and not opened.choose().reason
    assert of_val["metrics"]["max_box_acc_v2_at_val_threshold"] is None  # it would be the line above
    assert opened.choose("max").levels == on_val("max")["levels"]
    chosen = opened.choose("ivr", "val")
    scores = chosen.head("ivr")["percentile"]["scores"]
    assert scores[chosen.percentile] == max(chosen.scores["scores"].values())

    text = (lists / "localization.txt").read_text()
    other = re.sub(r"(val/0[0-3].png),\d+,\d+,\d+,\d+", r"\1,30,30,35,35", text)
    (lists / "localization.txt").write_text(other)
    anew, chosen = on_val("minmax"), TrainedRun(folder, **where).choose()
    assert anew["levels"] != of_val["levels"] and chosen.levels == anew["levels"]
    now = opened.split("val").fingerprint()  # results say which boxes they are of
    assert anew["fingerprint"]["val"] == now != of_val["fingerprint"]["val"]
    assert "boxes of val have changed" in chosen.reason
    (lists / "localization.txt").write_text("")
    chosen = TrainedRun(folder, **where).choose()
    assert chosen.levels is None and "no boxes" in chosen.reason
    # Other images: of those the thresholds of the training were not chosen, and none are for other maps.
    (lists / "localization.txt").write_text(text)
    for path in lists.glob("*.txt"):
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in lines if "val/05" not in line))
    fewer = TrainedRun(folder, **where)
    assert fewer.choose().levels == of_val["levels"]
    assert fewer.choose("max").levels is None and "list of val" in fewer.choose("max").reason


def test_masks_and_ignore_regions_count_at_the_size_of_the_map(tmp_path):
    size, rng, maps, masks, plain = 64, np.random.default_rng(0), {}, {}, []
    rows, columns = (np.array([int(y * n / size) for y in range(size)]) for n in (7, 9))
    for i in range(4):
        a, b, ignore = three = rng.random((3, 7, 9)) < 0.4
        for name, mask in zip("abi", three):
            Image.fromarray(mask).save(tmp_path / f"{i}{name}.png")
        masks[i] = Masks([f"{i}a.png", f"{i}b.png"], [f"{i}i.png"])
        maps[str(i)] = rng.random((size, size), dtype=np.float32)
        maps[str(i)].flat[:2] = 0, 1  # what min-max leaves as it is
        expected = [mask[rows][:, columns] for mask in (a | b, ignore & ~(a | b))]
        plain.append(measure(maps[str(i)], masks=expected))
    split = Split("masks", tmp_path, [*maps], np.zeros(4, dtype=int), masks=masks)
    for workers in (0, 2):
        found = evaluate_score_maps(maps.items(), split, image_size=size, workers=workers)
        assert found["metrics"]["pxap"] == PerImage.stack(plain).result()["metrics"]["pxap"] > 0


def test_results_are_not_replaced_by_those_of_other_maps_nor_lost(split, tmp_path, fails):
    flags = f"--dataset tiny --data-root {tmp_path}/data --lists {tmp_path}/lists --image-size 64 --workers 0"
    for k, method in enumerate(("ours", "theirs")):
        for i, image in enumerate(split.ids):
            path = tmp_path / method / "maps" / f"{image}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, np.random.default_rng([k, i]).random((8, 8)))
    flags += f" --score-maps {tmp_path}"
    for _ in range(2):
        run("evaluate", f"{flags}/ours/maps")
    before = (tmp_path / "cwd" / "results_maps_test.json").read_bytes()
    fails("evaluate", f"{flags}/theirs/maps", "results_maps_test.json", "--out")
    (tmp_path / "file").touch()
    fails("evaluate", f"{flags}/none --out {tmp_path}/file/r.json", "none")
    fails("evaluate", f"{flags}/ours --out {tmp_path}/file/r.json", "file/r.json")
    assert (tmp_path / "cwd" / "results_maps_test.json").read_bytes() == before


def test_masks_that_may_mean_something_else_are_said_once(split, tmp_path, capsys, fails):
    maps = [(image, np.random.default_rng(i).random((8, 8))) for i, image in enumerate(split.ids)]
    evaluate_score_maps(maps, split, image_size=64)
    assert "masks" not in capsys.readouterr().out
    for index in (1, 2):
        path = split.root / split.masks[index].instances[0]
        Image.fromarray(np.minimum(np.asarray(Image.open(path)), 9) + np.uint8(index)).save(path)
    for workers in (0, 2):
        evaluate_score_maps(maps, split, image_size=64, workers=workers)
        assert capsys.readouterr().out.count("2 masks have no pixel of value 0") == 1
    check = f"check --dataset tiny --data-root {tmp_path}/data --lists {tmp_path}/lists --workers 0"
    run("datasets", check)
    assert "2 masks have no pixel of value 0" in capsys.readouterr().out
    for masks in split.masks.values():
        path = split.root / masks.instances[0]
        Image.fromarray(np.zeros_like(np.asarray(Image.open(path)))).save(path)
    with pytest.raises(InputError, match="no mask has an object pixel"):
        evaluate_score_maps(maps, split, image_size=64)


def test_each_image_counts_once(split):
    maps = np.random.default_rng(0).random((9, 64, 64), dtype=np.float32)
    batches = [MapBatch([i], maps[i : i + 1]) for i in range(9)]
    assert evaluate_maps(batches[::-1], split).result == evaluate_maps(batches, split).result
    for wrong in (batches[1:], [*batches, batches[3]], [*batches[1:], batches[3]]):
        with pytest.raises(ValueError, match="maps"):
            evaluate_maps(wrong, split)
