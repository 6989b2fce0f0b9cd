"""Good and bad lists, images and masks of every kind, score-map files, batches for any number of workers."""

import math
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, make_tiny, split_of, write_split
from PIL import Image
from torchvision.transforms.functional import InterpolationMode, resize

from bridge_wsol import data, datasets
from bridge_wsol.data import EvalImages, Masks, Split, TrainImages, load_masks, read_split, train_loader
from bridge_wsol.evaluation import evaluate_score_maps
from bridge_wsol.utils import InputError

BOXES = ["a/1.jpg,0,0,49,39", "b, 1/2.jpg,1,2,3,4", "b, 1/2.jpg,5,6,7,8"]
GOOD = {
    "image_ids": ["a/1.jpg", "b, 1/2.jpg"],
    "class_labels": ["b, 1/2.jpg,1", "a/1.jpg,0"],
    "image_sizes": ["a/1.jpg,50,40", "b, 1/2.jpg,60,30"],
    "localization": [*BOXES, "a/1.jpg,m/1.png,m/i.png", "a/1.jpg,m/2.png,"],
}


def tiny_split(root, name="train"):
    make_tiny(root)
    return read_split(root / "lists" / "tiny" / name, root / "data" / "tiny", name)


# ------------------------------------------------------------------------------------------------------ lists


def test_reads_boxes_and_masks_of_each_image(tmp_path):
    write_split(tmp_path, **GOOD)
    ids = tmp_path / "image_ids.txt"  # as an editor on Windows saves it
    ids.write_bytes(b"\xef\xbb\xbf" + ids.read_bytes().replace(b"\n", b"\r\n") + b"\r\n")
    split = read_split(tmp_path, tmp_path, "good")
    assert split.ids == ["a/1.jpg", "b, 1/2.jpg"] and split.labels.tolist() == [0, 1]
    assert split.sizes.tolist() == [[50, 40], [60, 30]]
    of_b = [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert {i: boxes.tolist() for i, boxes in split.boxes.items()} == {0: [[0, 0, 49, 39]], 1: of_b}
    assert split.masks == {0: (["m/1.png", "m/2.png"], ["m/i.png"])}
    second = split.take([1], "second")
    assert second.ids == ["b, 1/2.jpg"] and second.boxes[0].tolist() == of_b and not second.masks
    assert second.labels.tolist() == [1] and second.sizes.tolist() == [[60, 30]]


def test_a_bad_line_or_a_missing_part_is_named(tmp_path):
    b = "b, 1/2.jpg"
    values = ["", ",one", ",0_1", ",\u0661", f",{10**30}", ",-1", ",2"]  # num_classes is 2
    for file, line, *broken in (
        ("image_ids", 2, "a/1.jpg", "../2.jpg", "/etc/passwd"),
        ("class_labels", 1, *(f"{b}{value}" for value in values)),
        ("class_labels", 2, "c/3.jpg,0", f"{b},1"),
        ("image_sizes", 2, "a/1.jpg,50,40", f"{b},60", f"{b},0,30"),
        ("localization", 1, "a/1.jpg,0,0,50,39", "a/1.jpg,0,0,49,40", "a/1.jpg,-1,2,3,4"),
        ("localization", 2, f"{b},3,2,1,4", f"{b},1,5,3,4", f"{b},1,2,3,4.5", "c/3.jpg,1,2,3,4"),
        ("localization", 4, "a/1.jpg,../m/1.png,", "a/1.jpg,,m/i.png", "a/1.jpg"),
    ):
        for text in broken:
            write_split(tmp_path, **GOOD | {file: [*GOOD[file][: line - 1], text, *GOOD[file][line:]]})
            with pytest.raises(InputError) as raised:
                read_split(tmp_path, tmp_path, "bad", num_classes=2)
            assert f"{tmp_path / file}.txt:{line}: " in str(raised.value), text
    for file, lines, where in (
        ("class_labels", ["a/1.jpg,0"], "class_labels.txt: "),
        ("image_ids", [], "image_ids.txt: "),
        ("image_sizes", [], "localization.txt:1: .*image_sizes.txt"),
    ):
        write_split(tmp_path, **GOOD | {file: lines})
        with pytest.raises(InputError, match=where):
            read_split(tmp_path, tmp_path, "bad")
    (tmp_path / "image_ids.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="image_ids.txt: .*not UTF-8"):
        read_split(tmp_path, tmp_path, "bad")


def test_a_fingerprint_tells_images_and_boxes_apart(tmp_path):
    def read(**changed):
        write_split(tmp_path / "lists", **GOOD | changed)
        return read_split(tmp_path / "lists", tmp_path, "any").fingerprint()

    known = read()
    for what, changed in (
        ("boxes", {"localization": [*BOXES[:2], "b, 1/2.jpg,5,6,7,9", *GOOD["localization"][3:]]}),
        ("boxes", {"localization": [*GOOD["localization"][:-1], "a/1.jpg,m/3.png,"]}),
        ("boxes", {"image_sizes": ["a/1.jpg,50,41", "b, 1/2.jpg,60,30"]}),
        ("images boxes", {"class_labels": ["b, 1/2.jpg,2", "a/1.jpg,0"]}),
    ):
        other = read(**changed)
        assert [name for name in known if other[name] != known[name]] == what.split(), changed
    plain, other = (Split("plain", tmp_path, [image], np.array([1])) for image in "ab")
    assert plain.fingerprint() == {"images": plain.digest(), "boxes": None} != other.fingerprint()
    masked = Split("masked", tmp_path / "c", ["a"], np.array([1]), masks={0: Masks(["m"], [])})
    assert masked.digest() == plain.digest() and masked.take([0, 0], "part").masks[1] == masked.masks[0]
    of_mask = b"(1, [0, 0], None, Masks(instances=['m'], ignore=[]))"
    assert masked.checksums().tolist() == [zlib.crc32(of_mask)]
    cub10 = read_split(REPOSITORY / "data_splits" / "CUB10" / "test", tmp_path, "test")
    with np.load(REPOSITORY / "docs" / "results" / "CUB10" / "cam_seed0.npz") as committed:
        np.testing.assert_array_equal(cub10.checksums(), committed["truth"])
        assert cub10.checksums().dtype == committed["truth"].dtype and cub10.digest() == committed["digest"]


# ----------------------------------------------------------------------------------------------------- images


def test_images_of_every_mode_become_rgb(tmp_path):
    grey = np.arange(40 * 30, dtype=np.uint8).reshape(40, 30)
    for mode in ("1", "L", "P", "RGB", "RGBA", "CMYK", "I", "F", "LA"):
        Image.fromarray(grey).convert(mode).save(tmp_path / f"{mode}.tif")
        assert data.open_rgb(tmp_path / f"{mode}.tif").mode == "RGB"
    for suffix in ("png", "tif"):  # 16 bits per pixel: the upper byte
        Image.fromarray(grey.astype(np.uint16) * 256 + 3).save(tmp_path / f"16.{suffix}")
        assert (np.asarray(data.open_rgb(tmp_path / f"16.{suffix}")) == grey[..., None]).all()


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_format_is_turned_once_and_only_if_asked(tmp_path, suffix, orientation):
    """Pillow turns a TIFF itself when it decodes it (Pillow 13.0.0 fails for uncompressed sideways ones)."""
    bright = np.zeros((24, 40), dtype=np.uint8)
    bright[:12, :20] = 255  # top left
    exif, path = Image.Exif(), tmp_path / f"x{suffix}"
    exif[0x0112] = orientation
    Image.fromarray(bright).save(path, exif=exif, **({"compression": "tiff_lzw"} if suffix == ".tif" else {}))
    # Where the stored top left corner belongs, by the EXIF standard: (row, column) of the quarter.
    row, column = [(0, 0), (0, 1), (1, 1), (1, 0), (0, 0), (0, 1), (1, 1), (1, 0)][orientation - 1]
    image = np.asarray(data.open_rgb(path, upright=True).convert("L")).astype(int)
    assert image.shape == ((24, 40) if orientation < 5 else (40, 24))
    assert image.shape[::-1] == datasets._upright_size(path)
    (height, width), expected = (n // 2 for n in image.shape), np.zeros_like(image)
    expected[row * height : (row + 1) * height, column * width : (column + 1) * width] = 255
    assert np.abs(image - expected).mean() < 12  # JPEG blurs the edges
    assert np.array_equal(np.asarray(data.open_rgb(Image.open(path), upright=True).convert("L")), image)
    if suffix != ".tif":  # published data sets: as stored
        assert np.abs(np.asarray(data.open_rgb(path).convert("L")).astype(int) - bright).mean() < 12


def test_train_and_test_images_are_turned_where_the_split_says_so(tmp_path):
    stored, exif = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8), Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    Image.fromarray(stored).save(tmp_path / "turned.png", exif=exif)
    for upright, shown in ((True, np.rot90(stored, -1)), (False, stored)):
        Image.fromarray(shown).save(tmp_path / "plain.png")
        turned = Split("turned", tmp_path, ["turned.png"], np.array([0]), upright=upright)
        plain = Split("plain", tmp_path, ["plain.png"], np.array([0]))
        crops = [TrainImages(split, 40, 32, seed=0)[1, 0][0] for split in (turned, plain)]
        assert torch.equal(*crops) and torch.equal(*(EvalImages(x, 32)[0][0] for x in (turned, plain)))


def test_images_that_are_missing_damaged_or_of_another_size_than_listed_are_named(tmp_path):
    split = tiny_split(tmp_path, "test")
    split.path(1).write_text("no image")
    split.path(2).write_bytes(split.path(2).read_bytes()[:3000])
    Image.effect_noise((80, 80), 90).save(tmp_path / "half.jpg")
    split.path(3).write_bytes((tmp_path / "half.jpg").read_bytes()[:1000])
    Image.new("RGB", (33, 44)).save(split.path(4))
    for index in (5, 6):
        split.path(index).unlink()
    for index in range(1, 6):
        with pytest.raises(InputError, match=f"test/{index:02d}.png: "):
            list(data.eval_loader(split.take([0, index], "test"), 4, image_size=32, workers=0))
    with pytest.raises(InputError, match="test/05.png: .*2 of the 9 of test"):
        split.require_images()


def test_masks_are_the_union_of_instances_and_ignore_is_what_remains(tmp_path):
    pixels = {"a": [[0, 255], [0, 0]], "b": [[0, 0], [1, 0]], "i": [[255, 255], [0, 0]]}
    for name, values in pixels.items():
        Image.fromarray(np.array(values, dtype=np.uint8)).save(tmp_path / f"{name}.png")
    *masks, _ = load_masks(tmp_path, Masks(["a.png", "b.png"], ["i.png"]), 4)
    mask, ignore = (pixels.astype(int).tolist() for pixels in masks)
    assert mask == [[0, 0, 1, 1]] * 2 + [[1, 1, 0, 0]] * 2 and ignore == [[1, 1, 0, 0]] * 2 + [[0] * 4] * 2
    with pytest.raises(InputError, match="none.png: "):
        load_masks(tmp_path, Masks(["a.png"], ["none.png"]), 4)


def shrunk(path, pixels, size):
    Image.fromarray(pixels).save(path)
    return load_masks(path.parent, Masks([path.name], []), size)[0]


def test_masks_shrink_to_the_pixels_that_the_field_takes(tmp_path):
    size, odd = 224, []
    for n in range(225, 1700):
        field = [math.floor(x * (1 / (size / n))) for x in range(size)]
        if field != [x * n // size for x in range(size)]:
            odd.append(n)
            # Every other pixel of a line is in, so that its neighbours differ; rows and columns in turns.
            stripes, tall = np.tile(np.arange(n) % 2 * 255, (3, 1)).astype(np.uint8), len(odd) % 2
            mask = shrunk(tmp_path / "mask.png", stripes.T.copy() if tall else stripes, size)
            assert (mask.T if tall else mask)[0].tolist() == [x % 2 == 1 for x in field], n
    assert len(odd) == 105 and {288, 344, 400, 1600} <= set(odd)


def test_masks_shrink_as_opencv_shrinks_them(tmp_path):
    cv2, rng = pytest.importorskip("cv2"), np.random.default_rng(0)
    for shape in ((1600, 400), (288, 344), (100, 1600), (224, 225), (5, 3), (1024, 683)):
        pixels = rng.integers(0, 2, shape, dtype=np.uint8)
        for size in (224, 64):
            expected = cv2.resize(pixels, (size, size), interpolation=cv2.INTER_NEAREST)
            np.testing.assert_array_equal(shrunk(tmp_path / "mask.png", pixels, size), expected)


def read_map(folder, array):
    """The map as read from a file, None if it is refused; the evaluation from Python does alike."""
    np.save(folder / "a.npy", array, allow_pickle=True)
    split = Split("maps", folder, ["a.jpg"], np.array([0]), np.array([[9, 9]]), {0: np.array([[1, 1, 5, 5]])})
    try:
        ((_, found),) = data.load_score_maps(folder, split)
    except InputError as error:
        assert f"{folder / 'a.npy'}: " in str(error)
        with pytest.raises(InputError, match="a.jpg: "):
            evaluate_score_maps([("a.jpg", array)], split, image_size=8)
        return None
    assert found.dtype == np.float32 and evaluate_score_maps([("a.jpg", array)], split, image_size=8)
    return found


def test_score_maps_are_floats_in_0_1_but_for_rounding_from_files_as_from_python(tmp_path):
    good = np.random.default_rng(0).random((6, 5))
    good[0, :2] = 0, 1
    for kind in ("f2", "f4", "f8", ">f4"):
        expected = good.astype(kind).astype(np.float32)
        np.testing.assert_array_equal(read_map(tmp_path, good.astype(kind)), expected)
    for beyond, clipped in ((1 + 9e-7, 1), (-9e-7, 0), (np.float32(1.0000001), 1)):
        found = read_map(tmp_path, np.where(good == clipped, beyond, good))
        np.testing.assert_array_equal(found, good.astype(np.float32))
    for value in (np.nan, np.inf, -np.inf, 1 + 2e-6, -2e-6, 255.0):
        assert read_map(tmp_path, np.where(good == 1, value, good)) is None, value
    for array in (good[0], good[None], good[:0], good.astype(complex), good.astype(str), good.astype(object)):
        assert read_map(tmp_path, array) is None


def test_a_score_map_file_is_found_by_whole_id_or_by_stem_and_else_named(tmp_path):
    ids = ["x/a.jpg", "b.jpg", "b.png"]
    split = Split("maps", tmp_path, ids, np.zeros(3, dtype=np.int64))
    for n, name in enumerate(("x/a", "b.jpg", "b.png")):
        (tmp_path / "x").mkdir(exist_ok=True)
        np.save(tmp_path / f"{name}.npy", np.full((2, 2), n / 4))
    found = [(i, float(m[0, 0])) for i, m in data.load_score_maps(tmp_path, split)]
    assert found == [*zip(ids, (0, 0.25, 0.5))]
    (tmp_path / "b.png.npy").rename(tmp_path / "b.npy")  # of which image?
    with pytest.raises(InputError, match="b.png.npy: "):
        list(data.load_score_maps(tmp_path, split))
    content = (tmp_path / "x" / "a.npy").read_bytes()
    (tmp_path / "x" / "a.npy").write_bytes(content.replace(b"}", b" ", 1))
    with pytest.raises(InputError, match="x/a.npy: not a .npy array"):
        list(data.load_score_maps(tmp_path, split))


# ---------------------------------------------------------------------------------------------------- loaders


def epoch_of(loader, epoch):
    loader.batch_sampler.set_epoch(epoch)
    return list(loader)


@pytest.mark.parametrize("small", [data.SMALL, 0])
def test_batches_depend_on_seed_and_epoch_alone(tmp_path, monkeypatch, small):
    split = tiny_split(tmp_path)
    in_memory = epoch_of(train_loader(TrainImages(split, 40, 32, seed=1), 4, workers=0), 2)
    monkeypatch.setattr(data, "SMALL", small)  # 0: every image is decoded anew in each epoch

    def loader(workers, seed):
        return train_loader(TrainImages(split, 40, 32, seed), 4, workers)

    alone, helped, other_seed = loader(0, 1), loader(2, 1), loader(0, 2)
    first, second = epoch_of(alone, 1), epoch_of(alone, 2)
    assert [len(labels) for _, labels in first] == [4, 4, 4, 4, 2]
    assert sorted(torch.cat([labels for _, labels in first]).tolist()) == sorted(split.labels.tolist())
    # Out of order, with workers that persist.
    for ours, theirs in ((second, in_memory), (second, epoch_of(helped, 2)), (first, epoch_of(helped, 1))):
        for (images, labels), (same_images, same_labels) in zip(ours, theirs):
            assert torch.equal(images, same_images) and torch.equal(labels, same_labels)
    assert not torch.equal(first[0][0], second[0][0])
    assert not torch.equal(first[0][0], epoch_of(other_seed, 1)[0][0])
    state, _ = torch.get_rng_state(), epoch_of(alone, 3)
    assert torch.equal(state, torch.get_rng_state())  # attentive dropout draws from this stream


def test_crops_are_windows_of_the_resized_image_each_as_often_as_the_others(tmp_path):
    split = tiny_split(tmp_path).take([3] * 100, "one")
    whole = data.resized(data.open_rgb(split.path(0)), 12).transpose(2, 0, 1)
    names = [(flip, x, y) for flip in (1, -1) for x in range(3) for y in range(3)]
    name_of = {whole[:, y : y + 10, x : x + 10][:, :, ::flip].tobytes(): (flip, x, y) for flip, x, y in names}

    def drawn(seed, items):
        images = TrainImages(split, 12, 10, seed)
        return [name_of[images[item][0].numpy().tobytes()] for item in items]

    items = [(epoch, index) for epoch in range(1, 51) for index in range(100)]
    crops = drawn(0, items)
    assert crops[::-1] == drawn(0, items[::-1])  # in any order
    chance = sum((crops.count(name) / len(crops)) ** 2 for name in names)  # that two crops agree, 1 / 18
    others = {"seed": drawn(1, items), "epoch": crops[100:] + crops[:100], "index": crops[1:] + crops[:1]}
    for what, other in others.items():
        assert np.mean([a == b for a, b in zip(crops, other)]) == pytest.approx(chance, abs=0.02), what
    assert np.mean([flip < 0 for flip, _, _ in crops]) == pytest.approx(0.5, abs=0.03)
    assert [crops.count(name) / len(crops) for name in names] == pytest.approx([1 / 18] * 18, abs=0.015)


def test_normalization_is_imagenet_s():
    pixels = torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    expected = [(0 - 0.485) / 0.229, (128 / 255 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    assert data.to_input(pixels, torch.device("cpu")).flatten().tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_training_image_ends_the_run_with_its_name(tiny, fails, tmp_path, workers):
    path = tmp_path / "data" / "tiny" / "train" / "03.png"
    path.write_bytes(path.read_bytes()[:200])
    fails("train", f"{tiny} --workers {workers} --out {tmp_path}/run", path)


def test_images_are_resized_as_torchvision_resizes_them(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (90, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    for size in (32, 128):  # antialiased where it shrinks
        expected = resize(Image.fromarray(pixels), [size, size], InterpolationMode.BILINEAR)
        np.testing.assert_array_equal(data.resized(data.open_rgb(tmp_path / "a.png"), size), expected)


def test_values_of_32_bits_are_those_of_8_or_refused():
    fits = (np.int32([[0, 255]]), np.float32([[0, 1.5]]), np.float32([[0, 0]]))
    for values in fits:
        assert data.open_rgb(Image.fromarray(values)).getpixel((1, 0)) == (int(values[0, 1]),) * 3
    # The last is a map in [0, 1], not an image.
    for values in (np.int32([[0, 256]]), np.int32([[-1, 255]]), np.float32([[0, 1]])):
        with pytest.raises(InputError, match="where 0 ... 255 are expected"):
            data.open_rgb(Image.fromarray(values))


def test_boxes_of_one_pixel_and_sizes_of_batches(tmp_path):
    (tmp_path / "localization.txt").write_text("a.png,3,4,3,4\n")
    boxes, _ = data.read_localization(tmp_path / "localization.txt", {"a.png": 0}, np.array([[9, 9]]))
    assert boxes[0].tolist() == [[3, 4, 3, 4]]
    sampler = data.EpochSampler(7, 3, seed=0)
    assert [sampler.size(batch) for batch in range(len(sampler))] == [(3, 3), (3, 3), (1, 1)]
    assert [len(batch) for batch in sampler] == [3, 3, 1]


def test_masks_that_may_mean_something_else(tmp_path):
    """By the protocol every pixel above 0 is object: a line says where a mask holds more than that."""
    y, x = np.mgrid[:72, :96]
    inside = ((x - 40) / 30) ** 2 + ((y - 40) / 20) ** 2 < 1
    mask, full = (inside * 255).astype(np.uint8), np.full((72, 96), 255, dtype=np.uint8)

    def remarks(name, pixels):
        Image.fromarray(pixels).save(tmp_path / name)
        return [text for text, _ in load_masks(tmp_path, Masks([name], []), 24, np.array([96, 72]))[2]]

    assert not remarks("a.png", mask) + remarks("a.png", inside) + remarks("a.png", np.dstack([mask] * 3))
    for height in (360, 36, 35, 18):  # the same aspect ratio, but for the rounding
        resized = Image.fromarray(inside).resize((round(height * 96 / 72), height))
        assert not remarks("a.png", np.array(resized))
    # Of 96 x 72: 2 % wider is alike, 3 % is not; 5 x 4 pixels are the ratio rounded, 7 x 4 are not.
    ones = [np.eye(height, width, dtype=bool) for width, height in ((979, 720), (989, 720), (5, 4), (7, 4))]
    assert [len(remarks("a.png", pixels)) for pixels in ones] == [0, 1, 0, 1]
    values, full_mask = remarks("a.jpg", mask), remarks("a.png", np.where(inside, 1, 2).astype(np.uint8))
    assert remarks("a.png", inside + np.eye(72, 96, dtype=np.uint8)) == values  # 0, 1 and 2: a label map
    told = values + full_mask + remarks("a.png", mask[:60])
    assert len(told) == len({*told}) == 3
    with pytest.raises(InputError, match="a.png: .*alpha channel"):
        remarks("a.png", np.dstack([full, full, full, mask]))
    with pytest.raises(InputError, match="a.png: a mask of 72 x 96 pixels .* 96 x 72: .*rotated"):
        remarks("a.png", np.ascontiguousarray(np.rot90(mask)))


def test_training_images_are_decoded_once_for_all_workers_and_loaders(tiny, tmp_path, monkeypatch):
    split = read_split(tmp_path / "lists" / "tiny" / "train", tmp_path / "data" / "tiny", "train")
    images, count = TrainImages(split, 24, 16, seed=0), tmp_path / "decoded"

    def counted(*args, **options):
        with count.open("a") as file:  # from each process
            file.write(".")
        return decode(*args, **options)

    decode = data.open_rgb
    monkeypatch.setattr(data, "open_rgb", counted)
    for batch_size, workers in ((4, 2), (6, 2), (6, 0)):
        loader = train_loader(images, batch_size, workers)
        for epoch in (1, 2):
            loader.batch_sampler.set_epoch(epoch)
            assert sum(len(batch) for batch, _ in loader) == 18
    assert count.read_text() == "." * 18


def test_the_fingerprint_of_a_split_has_its_boxes_and_its_masks():
    boxed = split_of(3)
    moved = replace(boxed, boxes=boxed.boxes | {1: np.array([[0, 0, 9, 8]])})
    masked = replace(boxed, boxes={}, masks={0: Masks(["a.png"], [])})
    plain = replace(boxed, boxes={})
    prints = [split.fingerprint() for split in (boxed, moved, masked, plain)]
    assert prints[3]["boxes"] is None and len({x["boxes"] for x in prints}) == 4
    assert len({x["images"] for x in prints}) == 1
    relabelled = replace(boxed, labels=boxed.labels + 1).fingerprint()
    assert relabelled["images"] != prints[0]["images"]
