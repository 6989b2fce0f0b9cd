"""A trained run and the evaluator from Python."""

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, results, run
from PIL import Image

from bridge_wsol.data import Masks, Split
from bridge_wsol.datasets import load_split
from bridge_wsol.evaluation import FALLBACK_THRESHOLD, Found, Localizer, evaluate_score_maps
from bridge_wsol.metrics import Evaluator, measure
from bridge_wsol.utils import InputError


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    for name, shape in (("a.png", (40, 70, 3)), ("b.png", (90, 30, 3))):
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(tmp_path / name)
    return [tmp_path / "a.png", tmp_path / "b.png"]


@pytest.fixture
def split(trained, tmp_path):
    return load_split("tiny", "test", tmp_path / "data", tmp_path / "lists")


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
    alone, of_image = localizer(photos[0]), localizer(Image.open(photos[0]))
    assert isinstance(alone, Found) and alone.box == of_image.box == of_paths[0].box
    np.testing.assert_array_equal(alone.score_map, of_image.score_map)


def test_an_image_object_is_turned_as_its_orientation_says(trained, photos, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees, clockwise
    Image.open(photos[0]).save(tmp_path / "turned.png", exif=exif)
    Image.open(photos[0]).transpose(Image.Transpose.ROTATE_270).save(tmp_path / "upright.png")
    localizer = Localizer(trained[1], device="cpu")
    names = [tmp_path / "turned.png", Image.open(tmp_path / "turned.png"), tmp_path / "upright.png"]
    of_path, of_image, upright = localizer(names)
    assert of_path.box == of_image.box == upright.box
    np.testing.assert_array_equal(of_path.score_map, of_image.score_map)
    np.testing.assert_array_equal(of_path.score_map, upright.score_map)
    assert not np.array_equal(of_path.score_map, localizer(photos[0]).score_map)


def test_sixteen_bits_as_a_path_and_as_an_object(trained, tmp_path):
    values = np.random.default_rng(0).integers(0, 2**16, (60, 40)).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    images = [tmp_path / "deep.png", Image.open(tmp_path / "deep.png")]
    of_path, of_image = Localizer(trained[1], device="cpu")(images)
    np.testing.assert_array_equal(of_path.score_map, of_image.score_map)


def test_thresholds_of_a_localizer(trained, photos, tmp_path):
    _, folder = trained
    checkpoint = torch.load(folder / "best.pt", weights_only=True)
    checkpoint["val"]["levels"]["largest"] = 153
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
        ([(split.ids[0], good + 1)], "test/00.png"),
        ([(split.ids[0], np.where(good > 0.5, np.nan, good))], "test/00.png"),
        ([(split.ids[0], good[0])], "test/00.png"),
        ([(*whole[2], [1.0, 2.0])], "test/02.png: logits"),  # its label is 2
        ([(*whole[0], [[1.0, 2.0, 3.0]] * 2)], "test/00.png: logits"),
        (with_logits[:3] + whole[3:], "some images have logits"),
        (whole[:3] + with_logits[3:], "some images have logits"),
    ):
        with pytest.raises(InputError, match=words):
            evaluate_score_maps(pairs, split, image_size=64)


@pytest.mark.parametrize("threshold", [-0.1, 1.0, float("nan")])
def test_a_threshold_out_of_range(trained, split, threshold):
    with pytest.raises(InputError, match="threshold"):
        Localizer(trained[1], device="cpu", threshold=threshold)
    with pytest.raises(InputError, match="threshold"):
        evaluate_score_maps([(image, np.zeros((8, 8))) for image in split.ids], split, threshold=threshold)


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


def test_masks_and_ignore_regions_count_at_the_size_of_the_map(tmp_path):
    size, rng, maps, masks, plain = 64, np.random.default_rng(0), {}, {}, Evaluator()
    rows, columns = (np.array([int(y * n / size) for y in range(size)]) for n in (7, 9))
    for i in range(4):
        a, b, ignore = three = rng.random((3, 7, 9)) < 0.4
        for name, mask in zip("abi", three):
            Image.fromarray(mask).save(tmp_path / f"{i}{name}.png")
        masks[i] = Masks([f"{i}a.png", f"{i}b.png"], [f"{i}i.png"])
        maps[str(i)] = rng.random((size, size), dtype=np.float32)
        maps[str(i)].flat[:2] = 0, 1  # what min-max leaves as it is
        map_options = [mask[rows][:, columns] for mask in (a | b, ignore & ~(a | b))]
        plain.add(i, measure(maps[str(i)], masks=map_options))
    split = Split("masks", tmp_path, [*maps], np.zeros(4, dtype=int), masks=masks)
    for workers in (0, 2):
        found = evaluate_score_maps(maps.items(), split, image_size=size, workers=workers)
        assert found["metrics"]["pxap"] == plain.hits().result()["metrics"]["pxap"] > 0
