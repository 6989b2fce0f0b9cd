"""Good and bad lists, images of every kind, order and crops for any number of workers, the cache."""

import math
import os
import shutil
import time

import numpy as np
import pytest
import torch
from conftest import make_tiny, write_split
from PIL import Image

import train
from bridge_wsol import data, datasets
from bridge_wsol.data import load_masks, read_split, test_loader, to_input, train_loader
from bridge_wsol.datasets import hold_out, load_splits
from bridge_wsol.utils import InputError

GOOD = {
    "image_ids": ["a/1.jpg", "b/2.jpg"],
    "class_labels": ["b/2.jpg,1", "a/1.jpg,0"],
    "image_sizes": ["a/1.jpg,50,40", "b/2.jpg,60,30"],
    "localization": [
        "a/1.jpg,0,0,49,39",
        "b/2.jpg,1,2,3,4",
        "b/2.jpg,5,6,7,8",
        "a/1.jpg,m/1.png,m/i.png",
        "a/1.jpg,m/2.png,",
    ],
}


def test_reads_boxes_and_masks_of_each_image(tmp_path):
    write_split(tmp_path, **GOOD)
    split = read_split(tmp_path, tmp_path, "good")
    assert (
        split.ids == ["a/1.jpg", "b/2.jpg"]
        and split.labels.tolist() == [0, 1]
        and split.sizes.tolist() == [[50, 40], [60, 30]]
    )
    assert split.boxes[0].tolist() == [[0, 0, 49, 39]] and split.boxes[1].tolist() == [
        [1, 2, 3, 4],
        [5, 6, 7, 8],
    ]
    assert split.masks == {0: (["m/1.png", "m/2.png"], ["m/i.png"])}
    second = split.take([1], "second")
    assert (
        second.ids == ["b/2.jpg"]
        and second.boxes[0].tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
        and not second.masks
    )


@pytest.mark.parametrize(
    "file, line, broken, words",
    [
        ("image_ids", 2, "a/1.jpg", "listed before"),
        ("image_ids", 2, "../2.jpg", "leaves the data root"),
        ("image_ids", 1, "/etc/passwd", "leaves the data root"),
        ("class_labels", 2, "a/1.jpg,0,1", "3 comma-separated fields where 2"),
        ("class_labels", 1, "b/2.jpg", "1 comma-separated fields where 2"),
        ("class_labels", 1, "b/2.jpg,one", "whole numbers"),
        ("class_labels", 1, "b/2.jpg,-1", "label -1 is out of range"),
        ("class_labels", 1, "b/2.jpg,2", "label 2 is out of range: labels run from 0 to 1"),
        ("class_labels", 1, "c/3.jpg,0", "c/3.jpg is not in"),
        ("class_labels", 2, "b/2.jpg,1", "b/2.jpg has a label already"),
        ("class_labels", 1, "b/2.jpg,0_1", "whole numbers"),
        ("class_labels", 1, "b/2.jpg,\u0661", "whole numbers"),
        ("class_labels", 1, f"b/2.jpg,{10**30}", "whole numbers"),
        ("image_sizes", 2, "a/1.jpg,50,40", "a/1.jpg has a size already"),
        ("localization", 4, "a/1.jpg,../m/1.png,", "leaves the data root"),
        ("localization", 4, "a/1.jpg,,m/i.png", "a mask's path is expected"),
        ("image_sizes", 2, "b/2.jpg,60", "2 comma-separated fields where 3"),
        ("image_sizes", 2, "b/2.jpg,0,30", "must be positive"),
        ("localization", 2, "b/2.jpg,3,2,1,4", "box 3,2,1,4 needs"),
        ("localization", 2, "b/2.jpg,1,5,3,4", "box 1,5,3,4 needs"),
        ("localization", 2, "b/2.jpg,-1,2,3,4", "box -1,2,3,4 needs"),
        ("localization", 1, "a/1.jpg,0,0,50,39", "leaves its image of 50 x 40"),
        ("localization", 2, "b/2.jpg,1,2,3", "4 comma-separated fields where 3 or 5"),
        ("localization", 2, "b/2.jpg,1,2,3,4.5", "whole numbers"),
    ],
)
def test_a_bad_line_is_named(tmp_path, file, line, broken, words):
    files = {name: list(lines) for name, lines in GOOD.items()}
    files[file][line - 1] = broken
    write_split(tmp_path, **files)
    with pytest.raises(InputError) as raised:
        read_split(tmp_path, tmp_path, "bad", num_classes=2)
    assert f"{tmp_path / file}.txt:{line}: " in str(raised.value) and words in str(raised.value)


def test_missing_parts_are_named(tmp_path):
    with pytest.raises(InputError, match="image_ids.txt: cannot be read"):
        read_split(tmp_path, tmp_path, "none")
    write_split(tmp_path, **{**GOOD, "class_labels": GOOD["class_labels"][:1]})
    with pytest.raises(InputError, match="class_labels.txt: no label for a/1.jpg"):
        read_split(tmp_path, tmp_path, "bad")
    write_split(tmp_path, **{**GOOD, "image_sizes": []})
    with pytest.raises(InputError, match="localization.txt:1: boxes need .*image_sizes.txt"):
        read_split(tmp_path, tmp_path, "bad")
    (tmp_path / "image_ids.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not UTF-8"):
        read_split(tmp_path, tmp_path, "bad")


def test_one_split_is_read_from_its_lists_alone(tmp_path):
    data_root, splits = make_tiny(tmp_path)
    whole = load_splits("tiny", data_root, splits, ("test",))[0]["test"]
    shutil.rmtree(data_root)
    split = datasets.load_split("tiny", data_root=str(data_root), splits_dir=splits)
    assert split.ids == whole.ids and split.labels.tolist() == whole.labels.tolist()
    assert {i: box.tolist() for i, box in split.boxes.items()} == {
        i: box.tolist() for i, box in whole.boxes.items()
    }
    assert split.masks == whole.masks and split.root == whole.root
    assert datasets.load_split("tiny", "val", data_root, str(splits)).name == "tiny val"
    with pytest.raises(InputError, match="class_labels.txt: cannot be read"):
        (splits / "tiny" / "test" / "class_labels.txt").unlink()
        datasets.load_split("tiny", "test", data_root, splits)


def test_hold_out_is_the_same_every_time_and_leaves_each_class_an_image(tmp_path):
    data_root, splits = make_tiny(tmp_path)
    train_split = read_split(splits / "tiny" / "train", data_root / "tiny", "train")
    kept, held = hold_out(train_split, 2, "tiny")
    assert sorted(kept.ids + held.ids) == sorted(train_split.ids) and np.bincount(held.labels).tolist() == [
        2,
        2,
        2,
    ]
    assert hold_out(train_split, 2, "tiny")[1].ids == held.ids
    assert np.bincount(hold_out(train_split, 100, "tiny")[0].labels).tolist() == [1, 1, 1]
    boxes = {image: box.tolist() for image, box in zip(train_split.ids, train_split.boxes.values())}
    assert all(held.boxes[i].tolist() == boxes[image] for i, image in enumerate(held.ids))


def test_val_is_the_published_list_unless_told_otherwise(tmp_path):
    data_root, splits = make_tiny(tmp_path)
    found, record = load_splits("tiny", data_root, splits, ("train", "val", "test"))
    assert [len(found[name]) for name in ("train", "val", "test")] == [18, 6, 9] and "the list of" in record[
        "val"
    ]
    found, record = load_splits("tiny", data_root, splits, ("train", "val"), val_per_class=1)
    assert [len(found[name]) for name in ("train", "val")] == [
        15,
        3,
    ] and "1 images per class, 3 in all" in record["val"]
    shutil.rmtree(splits / "tiny" / "val")
    found, record = load_splits("tiny", data_root, splits, ("train", "val"))
    assert [len(found[name]) for name in ("train", "val")] == [12, 6] and "held out from train" in record[
        "val"
    ]


@pytest.mark.parametrize(
    "ids, names",
    [
        (["train/n02/a.jpg", "train/n01/b.jpg", "train/n02/c.jpg"], ["n02", "n01"]),
        (["n02/a.jpg", "n01/b.jpg", "n03/c.jpg"], None),  # two folders of one class
        (["n02/a.jpg", "n02/b.jpg", "n02/c.jpg"], None),  # one folder of both
        (["x/n01/a.jpg", "y/n01/b.jpg", "x/n01/c.jpg"], None),
        (["a.jpg", "b.jpg", "c.jpg"], None),
    ],
)
def test_class_names_are_the_folders_where_they_tell_classes(tmp_path, ids, names):
    assert datasets.class_names(data.Split("train", tmp_path, ids, np.array([0, 1, 0]))) == names


def test_test_maps_can_be_evaluated_without_a_train_list(tmp_path):
    data_root, splits = make_tiny(tmp_path)
    shutil.rmtree(splits / "tiny" / "train")
    assert len(load_splits("tiny", data_root, splits, ("test",))[0]["test"]) == 9


def test_missing_images_are_counted_before_training(tmp_path):
    data_root, splits = make_tiny(tmp_path)
    for name in ("04.png", "05.png"):
        (data_root / "tiny" / "test" / name).unlink()
    with pytest.raises(
        InputError, match=r"test/04.png: no such image \(2 of the 9 of tiny test are missing\)"
    ):
        load_splits("tiny", data_root, splits, ("train", "val", "test"))


# ----------------------------------------------------------------------------------------------------- images


def test_images_of_every_mode_become_rgb(tmp_path):
    grey = np.arange(40 * 30, dtype=np.uint8).reshape(40, 30)
    for mode in ("1", "L", "P", "RGB", "RGBA", "CMYK", "I", "F", "LA"):
        path = tmp_path / f"{mode}.tif"
        Image.fromarray(grey).convert(mode).save(path)
        assert np.asarray(data.load_rgb(path, 16)).shape == (16, 16, 3)


@pytest.mark.parametrize("top, mode", [(70000, "I"), (1.0, "F"), (-1.0, "F")])
def test_values_that_pillow_would_clip_are_refused(tmp_path, top, mode):
    kind = {"I": np.int32, "F": np.float32}[mode]
    Image.fromarray(np.full((4, 4), top, dtype=kind)).save(tmp_path / "x.tif")
    with pytest.raises(InputError, match=f"x.tif: values from .* to {top:g} where 0 ... 255"):
        data.decode(tmp_path / "x.tif")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_format_is_turned_once(tmp_path, suffix, orientation):
    """Pillow turns a TIFF itself when it decodes it (Pillow 13.0.0 fails for uncompressed sideways ones)."""
    bright = np.zeros((24, 40), dtype=np.uint8)
    bright[:12, :20] = 255  # top left
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"x{suffix}"
    Image.fromarray(bright).save(path, exif=exif, **({"compression": "tiff_lzw"} if suffix == ".tif" else {}))
    # Where the stored top left corner belongs, by the EXIF standard: (row, column) of the quarter.
    row, column = {1: (0, 0), 2: (0, 1), 3: (1, 1), 4: (1, 0), 5: (0, 0), 6: (0, 1), 7: (1, 1), 8: (1, 0)}[
        orientation
    ]
    image = np.asarray(data.decode(path, upright=True).convert("L")).astype(int)
    assert (
        image.shape
        == ((24, 40) if orientation < 5 else (40, 24))
        == datasets.upright_size(tmp_path, path.name)[::-1]
    )
    height, width = (n // 2 for n in image.shape)
    expected = np.zeros_like(image)
    expected[row * height : (row + 1) * height, column * width : (column + 1) * width] = 255
    assert np.abs(image - expected).mean() < 12  # JPEG blurs the edges
    opened = data.to_rgb(Image.open(path), upright=True)
    assert np.array_equal(np.asarray(opened.convert("L")), image)


def test_unreadable_images_are_named(tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    noise = np.random.default_rng(0).integers(0, 256, (80, 80, 3), dtype=np.uint8)
    for name in ("half.jpg", "half.png"):
        Image.fromarray(noise).save(tmp_path / name)
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:3000])
    for name, words in (
        ("text.jpg", "not an image"),
        ("half.jpg", "truncated"),
        ("half.png", "truncated"),
        ("none.jpg", "no such image"),
    ):
        with pytest.raises(InputError, match=f"{name}: {words}"):
            data.load_rgb(tmp_path / name, 16)


def test_masks_are_the_union_of_instances_and_ignore_is_what_remains(tmp_path):
    pixels = {"a": [[0, 255], [0, 0]], "b": [[0, 0], [1, 0]], "i": [[255, 255], [0, 0]]}
    for name, values in pixels.items():
        Image.fromarray(np.array(values, dtype=np.uint8)).save(tmp_path / f"{name}.png")
    mask, ignore = load_masks(tmp_path, data.Masks(["a.png", "b.png"], ["i.png"]), 4)
    assert mask.astype(int).tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]]
    assert ignore.astype(int).tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_masks_shrink_to_the_pixels_that_the_field_takes(tmp_path):
    size, odd = 224, []
    for n in range(225, 1700):
        exact = [x * n // size for x in range(size)]
        field = [math.floor(x * (1 / (size / n))) for x in range(size)]
        if field == exact:
            continue
        odd.append(n)
        # Every other pixel of a line is in, so that its neighbours differ from it; rows and columns in turns.
        stripes, tall = np.tile(np.arange(n) % 2 * 255, (3, 1)).astype(np.uint8), len(odd) % 2
        Image.fromarray(stripes.T.copy() if tall else stripes).save(tmp_path / "mask.png")
        mask, _ = load_masks(tmp_path, data.Masks(["mask.png"], []), size)
        assert (mask.T if tall else mask)[0].tolist() == [x % 2 == 1 for x in field], n
    assert len(odd) == 105 and {288, 344, 400, 1600} <= set(odd)


def test_masks_shrink_as_opencv_shrinks_them(tmp_path):
    cv2 = pytest.importorskip("cv2")
    rng = np.random.default_rng(0)
    for height, width in ((1600, 400), (288, 344), (100, 1600), (224, 225), (5, 3), (1024, 683)):
        pixels = rng.integers(0, 2, (height, width), dtype=np.uint8) * 255
        Image.fromarray(pixels).save(tmp_path / "mask.png")
        for size in (224, 64):
            mask, _ = load_masks(tmp_path, data.Masks(["mask.png"], []), size)
            expected = cv2.resize(pixels, (size, size), interpolation=cv2.INTER_NEAREST) > 0
            np.testing.assert_array_equal(mask, expected, err_msg=f"{height} x {width} at {size}")


def test_an_image_of_another_size_than_listed_is_refused(tmp_path):
    data_root, splits = make_tiny(tmp_path)
    split = read_split(splits / "tiny" / "test", data_root / "tiny", "test")
    Image.new("RGB", (33, 44)).save(split.path(5))
    with pytest.raises(InputError, match="test/05.png: 33 x 44 pixels where the list has"):
        list(test_loader(split, 4, image_size=32, workers=0))


def epoch_of(loader, epoch):
    loader.batch_sampler.epoch = epoch
    return [(images, labels) for images, labels in loader]


def test_batches_do_not_depend_on_workers_and_change_with_epoch_and_seed(tmp_path):
    data_root, splits = make_tiny(tmp_path)
    split = read_split(splits / "tiny" / "train", data_root / "tiny", "train")

    def loader(workers, seed):
        return train_loader(split, 4, resize_size=40, image_size=32, seed=seed, workers=workers)

    alone, helped, other_seed = loader(0, 1), loader(2, 1), loader(0, 2)
    first = epoch_of(alone, 1)
    assert [len(labels) for _, labels in first] == [4, 4, 4, 4, 2]
    epoch_of(alone, 2)
    for epoch in (2, 1):  # out of order, with workers that persist
        for (images, labels), (same_images, same_labels) in zip(
            epoch_of(alone, epoch), epoch_of(helped, epoch)
        ):
            assert torch.equal(images, same_images) and torch.equal(labels, same_labels)
    assert not torch.equal(first[0][0], epoch_of(alone, 2)[0][0]) and not torch.equal(
        first[0][0], epoch_of(other_seed, 1)[0][0]
    )
    state = torch.get_rng_state()
    epoch_of(alone, 3)
    assert torch.equal(state, torch.get_rng_state())  # attentive dropout draws from this stream


def test_training_crops_are_windows_of_the_resized_image_flipped_or_not(tmp_path):
    data_root, splits = make_tiny(tmp_path)
    split = read_split(splits / "tiny" / "train", data_root / "tiny", "train")
    images = data.TrainImages(split, resize_size=12, image_size=10, seed=0)
    whole = np.asarray(data.load_rgb(split.path(3), 12)).transpose(2, 0, 1)
    windows = {
        (flip, x, y): whole[:, y : y + 10, x : x + 10][:, :, :: -1 if flip else 1]
        for flip in (0, 1)
        for x in range(3)
        for y in range(3)
    }
    seen = set()
    for epoch in range(200):
        crop = images[epoch, 3][0].numpy()
        seen |= {key for key, window in windows.items() if np.array_equal(window, crop)}
        assert any(np.array_equal(window, crop) for window in windows.values())
    assert len(seen) == 18


def test_normalization_is_imagenet_s():
    pixels = torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    expected = [(0 - 0.485) / 0.229, (128 / 255 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    assert to_input(pixels, torch.device("cpu")).flatten().tolist() == pytest.approx(expected, abs=1e-6)


def test_what_a_killed_process_left_is_removed_after_a_day(tmp_path):
    names = (".a[1].npy.01.part", ".a[1].npy.02.part", ".a1.npy.03.part", "a[1].npy")
    for name in names:
        (tmp_path / name).write_text("half")
    (tmp_path / ".a[1].npy.04.part").mkdir()
    (tmp_path / ".a[1].npy.04.part" / "image.png").write_text("half")
    two_days_ago = time.time() - 2 * 24 * 3600
    for name in (*names[1:], ".a[1].npy.04.part"):
        os.utime(tmp_path / name, (two_days_ago, two_days_ago))
    data.remove_leftovers(tmp_path / "a[1].npy")
    # The first one may be in work; the others are not leftovers of this file.
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cwd") == sorted(
        {*names} - {names[1]}
    )


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda path: path.unlink(), "no such image"),
        (lambda path: path.write_bytes(path.read_bytes()[:200]), "truncated or damaged image"),
        (lambda path: path.write_text("text"), "not an image"),
    ],
)
def test_a_bad_training_image_ends_the_run_with_its_name(
    tiny, fails, tmp_path, monkeypatch, workers, damage, words
):
    monkeypatch.setattr(
        data.Split, "require_images", lambda self: None
    )  # as if it broke after the check at the start
    path = tmp_path / "data" / "tiny" / "train" / "03.png"
    damage(path)
    fails(train.main, [*tiny, "--workers", workers, "--out", tmp_path / "run"], path, words)
