"""A trained run and the evaluator from Python."""

import json

import numpy as np
import pytest
from PIL import Image

import evaluate
from bridge_wsol.datasets import load_splits
from bridge_wsol.evaluation import FALLBACK_THRESHOLD, Found, Localizer, evaluate_score_maps
from bridge_wsol.utils import InputError


def read_json(path):
    return json.loads(path.read_text())


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    for name, shape in (("a.png", (40, 70, 3)), ("b.png", (90, 30, 3))):
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(tmp_path / name)
    return [tmp_path / "a.png", tmp_path / "b.png"]


def test_localizer_finds_what_the_command_line_finds(trained, photos):
    _, run = trained
    evaluate.main([str(run), "--device", "cpu", "--images", *map(str, photos)])
    entries = read_json(run / "images" / "boxes.json")
    localizer = Localizer(str(run), device="cpu")
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
    _, run = trained
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(photos[0]).save(tmp_path / "turned.png", exif=exif)
    localizer = Localizer(run, device="cpu")
    of_path, of_image = localizer([tmp_path / "turned.png", Image.open(tmp_path / "turned.png")])
    assert of_path.box == of_image.box
    np.testing.assert_array_equal(of_path.score_map, of_image.score_map)
    assert not np.array_equal(of_path.score_map, localizer(photos[0]).score_map)


def test_sixteen_bits_as_a_path_and_as_an_object(trained, tmp_path):
    _, run = trained
    values = np.random.default_rng(0).integers(0, 2**16, (60, 40)).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    of_path, of_image = Localizer(run, device="cpu")(
        [tmp_path / "deep.png", Image.open(tmp_path / "deep.png")]
    )
    np.testing.assert_array_equal(of_path.score_map, of_image.score_map)


def test_values_out_of_range_from_python(trained, tmp_path):
    _, run = trained
    split = load_splits("tiny", tmp_path / "data", tmp_path / "splits", ("test",))[0]["test"]
    maps = [(image, np.zeros((8, 8))) for image in split.ids]
    for threshold in (-0.1, 1.0):
        with pytest.raises(InputError, match="must be in \\[0, 1\\)"):
            Localizer(run, device="cpu", threshold=threshold)
        with pytest.raises(InputError, match="must be in \\[0, 1\\)"):
            evaluate_score_maps(maps, split, threshold=threshold)
    for logits in ([1.0], [[1.0, 2.0, 3.0]] * 2):
        with pytest.raises(InputError, match="logits must be a list of numbers, one for each class"):
            evaluate_score_maps(((*pair, logits) for pair in maps[::-1]), split)
    some = [(*pair, [1.0, 2.0, 3.0]) if i < 3 else pair for i, pair in enumerate(maps)]
    with pytest.raises(InputError, match="no logits, but other images have them"):
        evaluate_score_maps(some, split)


def test_thresholds_of_a_localizer(trained, photos, tmp_path):
    _, run = trained
    chosen = Localizer(run, device="cpu")
    levels = read_json(run / "results_best_test.json")["thresholds"]
    assert 0 <= chosen.threshold < 1 and not chosen.note and levels
    fixed = Localizer(run, device="cpu", threshold=chosen.threshold + 0.5 / 255)
    assert fixed(photos[0]).box == chosen(photos[0]).box
    elsewhere = Localizer(run, device="cpu", normalize="ivr", data_root=tmp_path / "nowhere")
    assert elsewhere.threshold == FALLBACK_THRESHOLD and "nowhere" in elsewhere.note
    with pytest.raises(InputError, match="no such checkpoint"):
        Localizer(tmp_path / "nowhere")


def test_pairs_from_python_are_evaluated_as_files_are(trained, tmp_path):
    flags, run = trained
    evaluate.main([str(run), "--save-maps", str(tmp_path / "maps"), "--device", "cpu"])
    expected = read_json(run / "results_best_test.json")
    where = ("tiny", tmp_path / "data", tmp_path / "splits")
    split = load_splits(*where, ("test",))[0]["test"]
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


def test_pairs_that_do_not_fit_the_split(trained, tmp_path):
    split = load_splits("tiny", tmp_path / "data", tmp_path / "splits", ("test",))[0]["test"]
    good = np.random.default_rng(0).random((7, 9))
    whole = [(image, good) for image in split.ids]
    for pairs, words in (
        (whole[:-1], "1 images without a score map, test/08.png first"),
        ([*whole, whole[0]], "test/00.png: not an image of tiny test, or its second score map"),
        ([("other.png", good)], "other.png: not an image of"),
        ([(split.ids[0], good + 1)], "floats in"),
        ([(split.ids[0], np.where(good > 0.5, np.nan, good))], "floats in"),
        ([(split.ids[0], good[0])], "2-D"),
    ):
        with pytest.raises(InputError, match=words):
            evaluate_score_maps(pairs, split, image_size=64)
