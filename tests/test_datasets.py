"""The shipped lists, each data set on small files, folders of images, `check`."""

import functools
import hashlib
import importlib
import json
import os
import shutil
import sys
import tarfile
from pathlib import Path

import fuzz_inputs
import numpy as np
import pytest
import torch
from conftest import REPOSITORY, TINY, make_folder, make_tiny, results, run, write_split
from PIL import Image

from bridge_wsol import config, data, datasets, evaluation
from bridge_wsol.data import eval_loader
from bridge_wsol.datasets import load_split, load_splits, read_folder
from bridge_wsol.utils import InputError

SHIPPED = REPOSITORY / "data_splits"
WNIDS = (SHIPPED / "ILSVRC" / "wnids.txt").read_text().split()
shipped = functools.cache(lambda dataset: load_splits(dataset, "data", SHIPPED, images=False))
ilsvrc_val = functools.cache(lambda: load_split("ILSVRC", "test", "data", SHIPPED))


def counts(found):
    return [len(found[name]) for name in datasets.SPLITS if name in found]


def test_the_shipped_lists_are_the_published_ones():
    """Counts and SHA-256 (of the sorted lines, joined by newlines) of the lists of Choe et al."""
    found = {}
    for path in (p for name in ("CUB", "ILSVRC", "OpenImages") for p in (SHIPPED / name).glob("*/*.txt")):
        if lines := sorted(path.read_text().splitlines()):
            digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
            found[str(path.relative_to(SHIPPED).with_suffix(""))] = [len(lines), digest]
    assert found == json.loads(Path(__file__).with_name("published_lists.json").read_text())


def test_data_sets_load_no_network(monkeypatch):
    for name in [x for x in sys.modules if x.startswith(("bridge_wsol", "torchvision"))]:
        monkeypatch.delitem(sys.modules, name)
    importlib.import_module("bridge_wsol.datasets")
    loaded = {x for x in sys.modules if x.startswith(("bridge_wsol", "torchvision"))}
    for name in loaded:  # so that they go again
        monkeypatch.setitem(sys.modules, name, sys.modules[name])
    assert not {"bridge_wsol.models", "torchvision"} & loaded and "bridge_wsol.datasets" in loaded


def test_the_shipped_lists_have_the_known_classes():
    cub, record = shipped("CUB")
    assert len(record["classes"]) == 200 and record["classes"][0] == "001.Black_footed_Albatross"
    assert cub["val"].path(0) == Path("data/CUBV2/001.Black_footed_Albatross/30107316117.jpg")
    assert WNIDS == sorted({*WNIDS}) and len(WNIDS) == 1000
    val = ilsvrc_val()
    assert val.ids[:3] == [f"val/ILSVRC2012_val_0000000{n}.JPEG" for n in (1, 2, 3)]
    assert [WNIDS[label] for label in val.labels[:3]] == ["n01751748", "n09193705", "n02105855"]


def test_cub10_has_the_lines_of_the_first_ten_classes_of_cub():
    for name in ("image_ids", "class_labels", "image_sizes", "localization"):
        texts = [(SHIPPED / f"CUB10/{split}/{name}.txt").read_text() for split in datasets.SPLITS]
        for own, published in (("\n".join(texts[:2]), "train"), (texts[2], "test")):
            lines = (SHIPPED / f"CUB/{published}/{name}.txt").read_text().split()
            assert sorted(own.split()) == sorted(line for line in lines if int(line[:3]) <= 10)
    assert np.bincount(shipped("CUB10")[0]["val"].labels).tolist() == [5] * 10


def test_imagenette_has_the_boxes_of_ilsvrc_val():
    found, record = shipped("Imagenette")
    published, classes = ilsvrc_val(), record["classes"]
    index = {Path(image).name: i for i, image in enumerate(published.ids)}
    for name in ("val", "test"):
        for i, image in enumerate(found[name].ids):
            k = index[Path(image).name]
            of_class = WNIDS[published.labels[k]]
            assert of_class == Path(image).parent.name == classes[found[name].labels[i]]
            assert found[name].sizes[i].tolist() == published.sizes[k].tolist()
            assert sorted(found[name].boxes[i].tolist()) == sorted(published.boxes[k].tolist())
    assert not {Path(x).name for x in found["train"].ids} & index.keys()  # no image of ILSVRC's val
    assert len({image for split in found.values() for image in split.ids}) == 1500
    for split, n in zip(found.values(), (100, 10, 40)):
        assert np.bincount(split.labels).tolist() == [n] * 10


def test_imagenette_may_be_a_smaller_copy(tmp_path):
    lists, data, place = tmp_path / "lists", tmp_path / "data", tmp_path / "data" / "imagenette2-160"
    for path in (SHIPPED / "Imagenette").glob("*/*.txt"):
        lines = path.read_text().splitlines()
        first = lines[0].split(",")[0]
        kept = [line for line in lines if line.split(",")[0] == first]
        write_split(lists / "Imagenette" / path.parent.name, **{path.stem: kept})
        (place / first).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 10)).save(place / first)
    found, record = load_splits("Imagenette", data, lists)
    assert any("sizes are not compared" in note for note in record["notes"])
    assert found["test"].path(0).is_relative_to(place) and found["test"].sizes[0].tolist() == [500, 375]
    run("datasets", f"check --dataset Imagenette --data-root {data} --lists {lists} --workers 0")
    images, _, _ = next(iter(eval_loader(found["test"], 1, 224, workers=0)))
    assert images.shape == (1, 3, 224, 224)
    place.rename(data / "imagenette2")  # preferred to copies
    place.mkdir()
    assert load_splits("Imagenette", data, lists)[0]["test"].path(0).is_relative_to(data / "imagenette2")


def test_cub10_has_the_official_images_labels_and_boxes(real_data):
    root, names = real_data / "CUB_200_2011", "images image_class_labels train_test_split bounding_boxes"
    tables = [map(str.split, (root / f"{name}.txt").open()) for name in names.split()]
    expected, found = [{}, {}], load_splits("CUB10", real_data, SHIPPED)[0]
    for (_, image), (_, label), (_, in_train), (_, *box) in zip(*tables):
        w, h = Image.open(root / "images" / image).size
        x, y, width, height = map(float, box)
        corners = [int(x), int(y), min(int(x + width), w - 1), min(int(y + height), h - 1)]
        expected[int(in_train)][image] = (int(label) - 1, [w, h], [corners])
    train, val, test = (
        {x: (s.labels[i], s.sizes[i].tolist(), s.boxes[i].tolist()) for i, x in enumerate(s.ids)}
        for s in found.values()
    )
    assert counts(found) == [250, 50, 243] and [test, train | val] == expected


def test_a_named_data_set_is_the_named_one_and_a_folder_a_path_or_the_only_thing_of_its_name(tmp_path):
    lists, _ = tmp_path / "lists", make_tiny(tmp_path)
    for name in ("CUB", "tiny", "birds"):
        Path(name).mkdir()
    for name in ("birds", "./CUB", "tiny/", "."):
        assert datasets.is_folder(name, lists), name
        args = config.parse_args(["--dataset", name], "")
        assert config.run_folder(args) == Path(f"runs/{Path(name).resolve().name}_vgg16_bridge")
    assert not any(datasets.is_folder(name, lists) for name in ("CUB", "tiny", "unheard-of"))


def test_lists_that_are_not_the_shipped_ones_are_told(tmp_path):
    path = shutil.copytree(SHIPPED / "CUB10", tmp_path / "CUB10") / "test" / "localization.txt"
    for told in (False, True):
        notes = load_splits("CUB10", tmp_path, tmp_path, images=False)[1]["notes"]
        assert any(str(path) in note for note in notes) == told
        path.write_text(path.read_text().replace(",", ",1", 1))


def test_class_names_are_the_folders_where_they_tell_classes():
    for folders, names in {"n2 n1 n2": ["n2", "n1"], "n2 n1 n3": None, "x/n1 y/n1 x/n1": None}.items():
        ids = [f"{folder}/a.jpg" for folder in folders.split()]
        assert datasets.class_names(data.Split("train", Path(), ids, np.array([0, 1, 0]))) == names


def test_hold_out_is_the_same_every_time_and_leaves_each_class_an_image(tmp_path):
    make_tiny(tmp_path)
    whole = load_split("tiny", "train", tmp_path / "data", tmp_path / "lists")
    (kept, held), (rest, _) = datasets.hold_out(whole, 2), datasets.hold_out(whole, 100)
    assert sorted(kept.ids + held.ids) == sorted(whole.ids) and datasets.hold_out(whole, 2)[1].ids == held.ids
    assert np.bincount(held.labels).tolist() == [2] * 3 and np.bincount(rest.labels).tolist() == [1] * 3
    for i, place in enumerate(map(whole.ids.index, held.ids)):
        assert (held.boxes[i] == whole.boxes[place]).all() and held.labels[i] == whole.labels[place]
    with pytest.raises(InputError, match="one image per class"):
        datasets.hold_out(rest, 2)


def test_val_is_its_list_if_its_images_are_there_and_else_held_out_once_per_run(tiny, tmp_path):
    places, images = (tmp_path / "data", tmp_path / "lists"), tmp_path / "data" / "CUB_200_2011" / "images"
    flags = f"{tiny} --dataset CUB --warm-epochs 0 --out {tmp_path}/run"
    shutil.copytree(tmp_path / "lists" / "tiny", tmp_path / "lists" / "CUB")
    shutil.copytree(tmp_path / "data" / "tiny", images)
    of_list = load_split("CUB", "val", *places).ids  # score maps are always those of the list
    found, record = load_splits("CUB", *places)
    assert record["val_per_class"] == 2 and counts(found) == [12, 6, 9]
    run("train", f"{flags} --epochs 1")
    shutil.copytree(images, tmp_path / "data" / "CUBV2")
    found, record = load_splits("CUB", *places)
    assert record["val_per_class"] == 0 and counts(found) == [18, 6, 9]
    assert found["val"].ids == of_list == [f"val/{i:02d}.png" for i in range(6)]
    run("train", f"{flags} --epochs 2 --resume")  # the run keeps what it had
    held_out = evaluation.TrainedRun(tmp_path / "run", "last", torch.device("cpu")).split("val").ids
    assert len(held_out) == 6 and all(image.startswith("train/") for image in held_out)
    (tmp_path / "data" / "CUBV2" / "val" / "02.png").unlink()
    with pytest.raises(InputError, match="CUBV2/val/02.png: "):
        load_splits("CUB", *places)
    assert counts(load_splits("CUB", *places, val_per_class=1)[0]) == [15, 3, 9]


def touch(root, *images):
    for image in images:
        (root / image).parent.mkdir(parents=True, exist_ok=True)
        (root / image).touch()


def test_ilsvrc_train_is_its_folders_and_each_is_listed_once(tmp_path, monkeypatch):
    root, places = tmp_path / "ILSVRC", (tmp_path, tmp_path / "lists")
    touch(root, *(f"train/{wnid}/{wnid}_{i}.JPEG" for wnid in WNIDS for i in range(3)), "val/a.JPEG")
    for split, image, label in (("val", "val2/970/0.jpeg", 970), ("test", "val/a.JPEG", 65)):
        write_split(places[1] / "ILSVRC" / split, image_ids=[image], class_labels=[f"{image},{label}"])
    calls = []
    with monkeypatch.context() as patch:  # a query of each of 1.28 million images takes long
        for name in ("stat", "listdir", "scandir"):
            real = getattr(os, name)
            patch.setattr(os, name, lambda x, f=real, **k: calls.append((f.__name__, str(x))) or f(x, **k))
        found, record = load_splits("ILSVRC", *places)
    assert max(calls.count((name, str(root / "train" / WNIDS[0]))) for name in ("scandir", "listdir")) == 1
    assert len(calls) < 1100
    assert record["classes"] == WNIDS and counts(found) == [1000, 2000, 1]
    for split in (found["train"], found["val"]):
        assert [WNIDS[k] for k in split.labels] == [image.split("/")[1] for image in split.ids]
    touch(root, "val2/970/0.jpeg")
    assert counts(load_splits("ILSVRC", *places)[0]) == [3000, 1, 1]
    place = root / "train" / WNIDS[5]
    for other, first in (("n00000001", "n00000001 is extra"), ("n99999999", f"{WNIDS[5]} is missing")):
        place = place.rename(place.with_name(other))
        with pytest.raises(InputError, match=f"{root / 'train'}: .*{first}"):
            load_splits("ILSVRC", *places)


def test_ilsvrc_val_and_imagenet_v2_are_the_same_images_under_either_names(tmp_path):
    source = SHIPPED / "ILSVRC" / "val"
    lines = (source / "imagenet_v2_names.csv").read_text().split()
    old, new = zip(*(line.split(",") for line in lines))
    v2 = (source / "image_ids.txt").read_text().split()
    assert sorted(f"val2/{name}" for name in old) == sorted(v2) and len({*new}) == 10_000
    hashed = {f"val2/{o}": f"val2/{o.split('/')[0]}/{n}" for o, n in zip(old, new)}
    v2, val = v2[:20], ["val/a.JPEG", "val/b.JPEG"]
    sorted_val = [f"val/{WNIDS[970]}/a.JPEG", f"val/{WNIDS[65]}/b.JPEG"]
    of_val = {"class_labels": [f"{val[0]},970", f"{val[1]},65"], "image_sizes": [f"{x},9,9" for x in val]}
    of_val["localization"] = [f"{x},1,1,5,5" for x in val]
    write_split(tmp_path / "lists" / "ILSVRC" / "test", image_ids=val, **of_val)
    labels = [f"{image},{image.split('/')[1]}" for image in v2]
    write_split(tmp_path / "lists" / "ILSVRC" / "val", image_ids=v2, class_labels=labels)
    prints = []
    for place, files in (("plain", [v2, val]), ("renamed", [[hashed[x] for x in v2], sorted_val])):
        places = tmp_path / place, tmp_path / "lists"
        touch(tmp_path / place / "ILSVRC", *files[0], *files[1])
        found, record = load_splits("ILSVRC", *places, ("val", "test"), 0)
        prints.append(record["lists"])
        for split, ids, of_split in zip(found.values(), (v2, val), files):
            part = split.take([1, 0], "part")
            assert split.ids == ids and part.ids == ids[1::-1]
            assert [split.path(i) for i in range(len(split))] == [split.root / file for file in of_split]
            assert [part.path(0), part.path(1)] == [split.path(1), split.path(0)]
        batches = evaluation.pair_maps([(x, np.zeros((8, 8))) for x in val], found["test"], image_size=8)
        listed, maps = load_split("ILSVRC", "test", *places), tmp_path / place / "maps"
        assert len([*evaluation.save_maps(batches, found["test"], maps)]) == 2
        assert [image for image, _ in data.load_score_maps(maps, listed)] == val
        (tmp_path / place / "ILSVRC" / files[1][1]).unlink()
        with pytest.raises(InputError, match=f"{files[1][1]}: .*1 of the 2"):
            load_splits("ILSVRC", *places, ("test",))
    assert prints[0] == prints[1]


def test_download_checks_and_unpacks_the_archive(tmp_path, fails, monkeypatch):
    archive, flags = tmp_path / "CUB_200_2011.tgz", f"--download --data-root {tmp_path} --out {tmp_path}/run"
    monkeypatch.setattr(datasets, "CUB_URL", "http://127.0.0.1:1/CUB_200_2011.tgz")
    fails("train", f"{flags} --dataset ILSVRC", "--download")
    fails("train", f"{flags} --dataset CUB", "CUB: the download failed")
    archive.write_bytes(b"a file of the user's")
    fails("train", f"{flags} --dataset CUB", archive, "MD5")
    assert archive.read_bytes() == b"a file of the user's"
    with tarfile.open(archive, "w:gz") as tar:
        for name in ("CUB_200_2011/images.txt", "attributes.txt"):  # as in the official one
            tar.addfile(tarfile.TarInfo(name))
    monkeypatch.setattr(datasets, "CUB_MD5", hashlib.md5(archive.read_bytes()).hexdigest())
    datasets.download("CUB10", tmp_path)
    unpack = lambda root, **_: (root / "imagenette2-320").mkdir()  # noqa: E731
    monkeypatch.setattr("torchvision.datasets.Imagenette", unpack)
    assert {path.name for path in tmp_path.rglob("*")} == {archive.name, archive.stem, "images.txt", "cwd"}
    (tmp_path / ".download.part" / "imagenette2-320").mkdir(parents=True)  # of an interrupted download
    for _ in range(2):  # the second time it is there
        datasets.download("Imagenette", tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*image*")) == ["imagenette2-320"]


# ------------------------------------------------------------------------------------ a folder of own images


def test_every_image_of_a_folder_is_in_one_split_and_stays_there(tmp_path):
    def split_of():
        splits, classes, _ = read_folder(folder)
        for split in splits.values():
            assert [classes[k] for k in split.labels] == [image.split("/")[0] for image in split.ids]
        return {image: name for name, split in splits.items() for image in split.ids}

    folder = make_folder(tmp_path / "own", 0)
    for n in range(300):
        (folder / f"class {n % 3}" / f"{n // 3}.png").touch()
    before = split_of()
    for k in range(3):  # by the definition in the docstring, with 15 of val and of test at least
        places = {"train": [], "val": [], "test": []}
        for i in range(100):
            image = f"class {k}/{i}.png"
            places[before[image]].append(int(hashlib.sha256(image.encode()).hexdigest()[:16], 16) / 16**16)
        train, val, test = places.values()
        assert max(train) < min(val) and max(val) < min(test)
        assert len(test) == 15 or min(test) >= 0.85
        assert len(val) == 15 or min(val) >= 0.7 and max(val) < 0.85
    for i in range(50):
        (folder / "class 1" / f"{i}.png").rename(folder / "class 0" / f"new {i}, {i}.JPG")
    for name in ("class 0/._0.png", "class 0/notes.txt", ".cache"):
        (folder / name).touch()
    after = split_of()
    assert len(before) == len(after) == 300 and len(before.keys() & after.keys()) == 250
    assert sum(before.get(image, name) != name for image, name in after.items()) <= 10
    for n, least in ((3, 1), (4, 1), (13, 1), (14, 2), (20, 3), (27, 4)):  # of each class, in val and in test
        splits = read_folder(make_folder(tmp_path / str(n), images=n))[0]
        for split in (splits["val"], splits["test"]):
            assert np.bincount(split.labels).min() >= least and np.bincount(splits["train"].labels).min() >= 1


def test_folders_in_the_layout_of_image_folder_keep_their_splits(tmp_path):
    folder, boxed = make_folder(tmp_path / "own", 4, ("train", "val", "test")), "val/class 1/2.png"
    where = str(folder), tmp_path, tmp_path
    (folder / "localization.txt").write_text(f"{boxed},5,5,29,29\n")
    (found, record), (of_both, _) = load_splits(*where), load_splits(*where, val_per_class=3)
    for name, split in found.items():
        assert split.ids == [f"{name}/class {k}/{i}.png" for k in range(3) for i in range(4)]
        assert split.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert record["classes"] == ["class 0", "class 1", "class 2"] and counts(of_both) == [15, 9, 12]
    for splits in (found, of_both):
        boxes = [(s.ids[i], box.tolist()) for s in splits.values() for i, box in s.boxes.items()]
        assert boxes == [(boxed, [[5, 5, 29, 29]])]
    (folder / "localization.txt").unlink()
    shutil.rmtree(folder / "val")
    assert counts(load_splits(*where)[0]) == [6, 6, 12]


def test_folders_that_are_no_data_set_are_named(tmp_path, fails):
    folder, by_split = make_folder(tmp_path / "own", 2), make_folder(tmp_path / "other", 3, ("train", "test"))
    flags = f"--weights none --out {tmp_path}/run --dataset"
    fails("train", f"{flags} unheard-of", "unheard-of: ")
    fails("train", f"{flags} {tmp_path}/nothing", tmp_path / "nothing")
    fails("train", f"{flags} '{folder}/class 0'", folder / "class 0")  # no classes
    fails("train", f"{flags} {folder}", folder / "class 0")  # at least 3 images per class
    fails("train", f"{flags} {by_split} --val-per-class 0", by_split)  # no val
    for names, n in ((("test",), 0), (datasets.SPLITS, 1)):
        assert [*load_splits(str(by_split), tmp_path, tmp_path, names, n)[0]] == [*names]
    (by_split / "test" / "class 3").mkdir()
    fails("train", f"{flags} {by_split}", by_split / "test" / "class 3")  # no class of train


def test_boxes_of_a_turned_photo_are_in_pixels_as_it_is_shown(tmp_path):
    folder, name = make_folder(tmp_path / "own", images=4), "tench, Tinca tinca/turned.png"
    (folder / "class 0").rename(folder / "tench, Tinca tinca")
    stored, exif = np.pad(np.full((4, 6), 255, np.uint8), ((2, 14), (3, 41))), Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise: stored (x, y) is shown at (19 - y, x)
    Image.fromarray(stored).save(folder / name, exif=exif)
    (folder / "localization.txt").write_text(f"{name},14,3,17,8\n")
    ((split, i),) = ((s, s.ids.index(name)) for s in read_folder(folder)[0].values() if name in s.ids)
    pixels = np.asarray(data.open_rgb(split.path(i), split.sizes[i], split.upright))
    ((x0, y0, x1, y1),), inside = split.boxes[i], np.zeros((50, 20), dtype=bool)
    inside[y0 : y1 + 1, x0 : x1 + 1] = True
    np.testing.assert_array_equal(pixels[..., 0] > 0, inside)
    (folder / "localization.txt").write_text(f"{name},14,3,20,8\n")
    with pytest.raises(InputError, match="localization.txt:1: "):
        read_folder(folder)


def test_bad_lines_of_boxes_are_counted_and_an_image_that_is_not_there_is_told_apart(tmp_path):
    folder, good = make_folder(tmp_path / "own", images=4), "class 0/0.png,5,5,29,29"
    (folder / "class 0" / "1.png").rename(folder / "class 0" / "Cafe\u0301.png")  # NFD, as on a Mac
    said = set()
    for line in ("class 0/9.png,5,5,29,29", "class 0/Caf\u00e9.png,5,5,29,29", "class 0/0.png,5,5,29.5,29"):
        for others in range(3):
            lines = [good, line, good, *["class 0/0.png,0,0,60,9"] * others]
            (folder / "localization.txt").write_text("\n".join(lines), encoding="utf-8")
            with pytest.raises(InputError) as raised:
                read_folder(folder)
            message = str(raised.value).removeprefix(f"{folder}/localization.txt:2: {line}: ")
            assert f"(and {others} more lines)" in message or not others and "more lines" not in message
            assert "image_sizes" not in message
            said.add(message.partition(" (and ")[0])
    assert len(said) == 3


def test_a_folder_of_images_may_move(tmp_path, capsys):
    flags = f"{TINY} --warm-epochs 0 --method cam --workers 0 --out run --dataset"
    make_folder(Path("birds"), images=4)
    Path("birds", "class 1", "IMG.HEIC").write_bytes(b"x")
    run("train", f"{flags} birds --epochs 1")
    assert "left out: 1 files" in (printed := capsys.readouterr().out) and "IMG.HEIC" in printed
    before = results(Path("run"))["metrics"]
    run("train", f"{flags} birds/ --epochs 1 --resume")  # the shell completes a folder so
    Path("disk").mkdir()
    shutil.move("birds", "disk/birds")
    for place in ("disk", "disk/birds"):
        run("evaluate", f"run --data-root {place} --device cpu --quiet")
        assert results(Path("run"))["metrics"] == before
    run("train", f"{flags} disk/birds --epochs 2 --resume")
    assert results(Path("run"), "results_last_test.json")["epoch"] == 2


# ------------------------------------------------------------------------------------------------------ check


def test_check_names_what_is_missing_damaged_or_of_another_size(tiny, tmp_path, capsys):
    root, folder = tmp_path / "data" / "tiny", make_folder(tmp_path / "own", images=3)
    flags = f"check --data-root {tmp_path}/data --lists {tmp_path}/lists --workers"
    for dataset in ("tiny", folder):
        run("datasets", f"{flags} 0 --dataset {dataset}")
        assert capsys.readouterr().out.count(" 0 with a problem") == 3
    (root / "train" / "04.png").write_bytes((root / "train" / "04.png").read_bytes()[:900])
    (root / "masks" / "val_02.png").unlink()
    (root / "masks" / "test_01.png").write_text("no mask")
    Image.new("RGB", (33, 44)).save(root / "test" / "05.png")
    with pytest.raises(InputError, match="^tiny: 4 "):
        run("datasets", f"{flags} 2 --dataset tiny")
    printed = capsys.readouterr().out
    for name in ("train/04.png", "masks/val_02.png", "masks/test_01.png", "test/05.png"):
        assert f"\n{root / name}: " in printed


def test_damaged_inputs_give_neither_tracebacks_nor_wrong_numbers(trained, tmp_path):
    outcomes = fuzz_inputs.fuzz(tmp_path, cases=60, seed=1)
    refused = [n for (_, outcome), n in outcomes.items() if outcome == "refused"]
    assert sum(outcomes.values()) == 60 and len(refused) == 4 and min(refused) >= 4


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_what_a_folder_holds_beside_its_splits_is_named(tmp_path, capsys, name):
    own = make_folder(tmp_path / "own", 2, ("train", name, "test", "extra"))
    found, record = load_splits(str(own), tmp_path, tmp_path)
    assert found["val"].ids[0] == f"{name}/class 0/0.png" and counts(found) == [6, 6, 6]
    assert "left out: 1 " in record["notes"][1] and "own/extra first" in record["notes"][1]
    for image in own.glob("*/*/*.png"):  # all images differ
        Image.effect_noise((9, 8), 90).save(image)
    shutil.copy(own / "train/class 0/1.png", own / "test/class 1/1.png")
    run("datasets", f"check --dataset {own} --workers 0")
    printed = capsys.readouterr().out
    assert "own/extra first" in printed and "1 images equal one of train" in printed
    assert "own/test/class 1/1.png is " in printed
