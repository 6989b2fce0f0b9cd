"""Each data set on small files, a folder of images, `check`, and `evaluate.py --images`."""

import hashlib
import http.server
import io
import itertools
import json
import multiprocessing
import re
import shutil
import tarfile
import threading
from xml.etree import ElementTree

import fuzz_inputs
import numpy as np
import pytest
import scipy.io
import torch
from conftest import REPOSITORY, make_tiny, set_tiny_preset, write_split
from PIL import Image, ImageOps

import evaluate
import train
from bridge_wsol import data, datasets, evaluation, optim, utils
from bridge_wsol.data import read_split
from bridge_wsol.datasets import load_splits, read_folder
from bridge_wsol.utils import InputError

ORIENTATION = 0x0112


def read_json(path):
    return json.loads(path.read_text())


# -------------------------------------------------------------------------------------------------------- CUB


def test_cub_lists_are_the_published_ones_line_for_line(real_data, tmp_path):
    found, record = load_splits("CUB", real_data, tmp_path, ("train", "val", "test"))
    assert (
        "a subset, 10 of 200 classes, 543 of 11788 images" in record["lists"] and record["num_classes"] == 10
    )
    assert [len(found[name]) for name in ("train", "val", "test")] == [280, 20, 243]
    for split in ("train", "test"):
        for name in ("image_ids", "class_labels", "image_sizes", "localization"):
            published = (real_data / "wsol-metadata" / "CUB" / split / f"{name}.txt").read_text().splitlines()
            built = (tmp_path / "CUB" / split / f"{name}.txt").read_text().splitlines()
            assert built == [line for line in published if int(line[:3]) <= 10]


def test_the_lists_of_ten_classes_are_cub_s_with_five_images_per_class_held_out(real_data, tmp_path):
    names = ("train", "val", "test")
    of_cub, _ = load_splits("CUB", real_data, tmp_path, names, val_per_class=5)
    shipped, record = load_splits("CUB10", real_data, REPOSITORY / "data_splits", names)
    assert {name: len(split) for name, split in shipped.items()} == {"train": 250, "val": 50, "test": 243}
    assert record["num_classes"] == 10 and "10 of CUB's 200 classes" in record["lists"]
    for name in names:
        ours, theirs = shipped[name], of_cub[name]
        assert ours.ids == theirs.ids and ours.root == theirs.root
        np.testing.assert_array_equal(ours.labels, theirs.labels)
        np.testing.assert_array_equal(ours.sizes, theirs.sizes)
        assert all((ours.boxes[i] == theirs.boxes[i]).all() for i in range(len(theirs)))
    assert np.bincount(shipped["val"].labels).tolist() == [5] * 10


def test_lists_follow_the_official_files_they_were_built_from(real_data, tmp_path):
    official = tmp_path / "CUB_200_2011"
    official.mkdir()
    for name in datasets.CUB_FILES:
        shutil.copy(real_data / "CUB_200_2011" / name, official)
    (official / "images").symlink_to(real_data / "CUB_200_2011" / "images")
    folder = tmp_path / "splits" / "CUB"
    first = datasets.ensure_cub_lists(official, folder)
    (folder / "train" / "image_ids.txt").write_text("untouched\n")
    assert (
        datasets.ensure_cub_lists(official, folder) == first
        and (folder / "train" / "image_ids.txt").read_text() == "untouched\n"
    )
    for name in datasets.CUB_FILES:
        lines = (official / name).read_text().splitlines()
        (official / name).write_text("\n".join(lines[:100]))
    assert "100 of 11788 images" in datasets.ensure_cub_lists(official, folder)
    assert (folder / "train" / "image_ids.txt").read_text() != "untouched\n"
    (folder / "built_from.json").unlink()  # lists that came from elsewhere stay
    assert "found in" in datasets.ensure_cub_lists(official, folder)
    shutil.rmtree(folder / "train")  # also where they are for test alone
    before = {path: path.read_bytes() for path in folder.rglob("*.txt")}
    assert "found in" in datasets.ensure_cub_lists(official, folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_lists_of_which_a_part_was_written_are_built_anew(real_data, tmp_path, monkeypatch):
    write, folder = datasets.write_lists, tmp_path / "CUB"

    def killed(path, lists):
        write(path, lists)
        raise KeyboardInterrupt

    monkeypatch.setattr(datasets, "write_lists", killed)
    with pytest.raises(KeyboardInterrupt):
        datasets.ensure_cub_lists(real_data / "CUB_200_2011", folder)
    assert (folder / "train").exists() and not (folder / "test").exists()
    monkeypatch.undo()
    assert "a subset" in datasets.ensure_cub_lists(real_data / "CUB_200_2011", folder)
    assert len((folder / "test" / "localization.txt").read_text().splitlines()) == 243


def test_several_runs_that_build_the_lists_at_once_all_get_whole_lists(real_data, tmp_path):
    def first_run(number):
        started.wait()
        splits, _ = load_splits("CUB", real_data, tmp_path / "splits", ("train", "val", "test"))
        counts = [len(split.ids) + len(split.boxes) for split in splits.values()]
        (tmp_path / f"{number}.txt").write_text(str(counts))

    fork = multiprocessing.get_context("fork")
    started = fork.Barrier(3)
    runs = [fork.Process(target=first_run, args=(number,)) for number in range(3)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert {(tmp_path / f"{number}.txt").read_text() for number in range(3)} == {"[560, 40, 486]"}
    assert sorted(path.name for path in (tmp_path / "splits" / "CUB").iterdir()) == [
        "built_from.json",
        "test",
        "train",
    ]


def test_published_lists_are_told_from_others(real_data, tmp_path):
    for dataset, told in (
        ("CUB", "train as published; val as published; test as published"),
        ("ILSVRC", "val as published; test as published"),
        ("OpenImages", "train as published; val as published; test as published"),
    ):
        assert (
            datasets.describe_lists(dataset, real_data / "wsol-metadata" / dataset)
            == f"the lists found in {real_data / 'wsol-metadata' / dataset}: {told}"
        )
    lists = tmp_path / "CUB"
    shutil.copytree(real_data / "wsol-metadata" / "CUB", lists)
    path = lists / "test" / "localization.txt"
    path.write_text(path.read_text().replace(",", ",1", 1))
    (lists / "val" / "image_ids.txt").write_text("".join(path.read_text().splitlines(keepends=True)[:999]))
    said = datasets.describe_lists("CUB", lists)
    assert (
        "val 999 images where the published list has 1000" in said
        and "test localization not as published" in said
        and "train as published" in said
    )


def test_the_published_folder_is_accepted_as_splits(real_data):
    splits = real_data / "wsol-metadata"
    found, record = load_splits("CUB", real_data, splits, ("train", "val", "test"), check_images=False)
    assert (
        record["num_classes"] == len(record["classes"]) == 200
        and record["classes"][0] == "001.Black_footed_Albatross"
    )
    assert found["val"].path(0) == real_data / "CUBV2" / "001.Black_footed_Albatross" / "30107316117.jpg"
    with pytest.raises(
        InputError,
        match=r"1000 of the 1000 of CUB val are missing.*without it, pass --val-per-class 2",
    ):
        load_splits("CUB", real_data, splits, ("val",))
    found, record = load_splits("OpenImages", real_data, splits, ("train", "val", "test"), check_images=False)
    assert (
        record["num_classes"] == 100 and len(found["test"].masks) == 5000 and record["classes"][0] == "01226z"
    )
    found, record = load_splits("ILSVRC", real_data, splits, ("val", "test"), check_images=False)
    assert record["num_classes"] == 1000 and len(found["test"].boxes) == 50000


def test_published_lists_load(real_data):
    metadata = real_data / "wsol-metadata"
    expected = json.loads(
        (datasets.Path(datasets.__file__).parents[1] / "data_splits" / "checksums.json").read_text()
    )
    for key, files in expected.items():
        dataset, name = key.split("/")
        if not (metadata / key).exists():
            continue
        split = read_split(
            metadata / key, real_data, key, {"CUB": 200, "ILSVRC": 1000, "OpenImages": 100}[dataset]
        )
        assert len(split) == files["image_ids"]["lines"]
        located = sum(map(len, split.boxes.values())) + sum(
            len(masks.instances) for masks in split.masks.values()
        )
        assert located == files.get("localization", {"lines": 0})["lines"]


def test_incomplete_official_files_are_named(tmp_path):
    with pytest.raises(InputError, match="CUB_200_2011: no such folder: pass --download"):
        datasets.ensure_cub_lists(tmp_path / "CUB_200_2011", tmp_path / "CUB")
    official = tmp_path / "CUB_200_2011"
    official.mkdir()
    for name, text in {
        "images.txt": "1 a/1.jpg\n",
        "image_class_labels.txt": "1 1\n",
        "train_test_split.txt": "1 1\n",
    }.items():
        (official / name).write_text(text)
    with pytest.raises(InputError, match="bounding_boxes.txt: no such file"):
        datasets.ensure_cub_lists(official, tmp_path / "CUB")
    assert not (tmp_path / "CUB").exists()


CUB_LINES = {  # of each file: what follows an image's number, the words for it, and lines that are wrong
    "images.txt": ("a/{}.jpg", "its path", ["2", "", "two a/2.jpg", "-2 a/2.jpg", "2 a/2.jpg 0"]),
    "image_class_labels.txt": ("1", "its class (a whole number from 1)", ["2", "2 one", "2 0", "2 1.5"]),
    "train_test_split.txt": ("0", "1 (train) or 0 (test)", ["2", "2 2", "2 yes", "2 0 1"]),
    "bounding_boxes.txt": (
        "1.0 2.0 3.0 4.0",
        "x, y, width and height in pixels",
        [
            "2 1.0 2.0 3.0",
            "2 1.0 2.0 3.0 4.0 5.0",
            "2 1.0 two 3.0 4.0",
            "2 1.0 2.0 nan 4.0",
            "2 1.0 2.0 -3.0 4.0",
            f"2 1.0 2.0 3.0 {10**400}",
        ],
    ),
}


@pytest.mark.parametrize("name", CUB_LINES)
def test_a_broken_line_of_cub_s_official_files_is_named(tmp_path, fails, name):
    official, splits = tmp_path / "CUB_200_2011", tmp_path / "splits"
    (official / "images" / "a").mkdir(parents=True)
    for i in (1, 2, 3):
        Image.new("RGB", (8, 6)).save(official / "images" / "a" / f"{i}.jpg")
    for file, (values, _, _) in CUB_LINES.items():
        (official / file).write_text("".join(f"{i} {values.format(i)}\n" for i in (1, 2, 3)))

    values, expected, wrong = CUB_LINES[name]
    cases = {line: f":2: an image's number and {expected} are expected: {line[:80]!r}" for line in wrong}
    cases[f"1 {values}"] = ":2: one line for each image is expected: 1 was there before"
    if name != "images.txt":
        cases[f"9 {values}"] = ":2: an image of images.txt is expected: 9 is not there"
        cases[None] = ": a line for every image of images.txt is expected: 2 has none"
    if name == "bounding_boxes.txt":
        for x, y in ((8, 2), (1, 6)):
            words = f"a box inside image 2 (a/2.jpg, 8 x 6) is expected: its corner is {x}, {y}"
            cases[f"2 {x} {y} 3 4"] = f":2: {words}"
    first, _, last = (official / name).read_text().splitlines()
    for line, words in cases.items():
        (official / name).write_text("\n".join([first, *([] if line is None else [line]), last]))
        flags = ["--dataset", "CUB", "--data-root", tmp_path, "--splits", splits, "--workers", "0"]
        fails(datasets.main, ["check", *flags], f"error: {official / name}{words}\n")
        assert not (splits / "CUB").exists()


@pytest.fixture
def server():
    """serve(content, ranges=True, cut=()) -> (URL of an HTTP server on the loopback, Range headers it got).

    cut: the server closes the connection after that many bytes of a body, once each.
    """
    running = []

    def serve(content, ranges=True, cut=()):
        cuts = list(cut)

        class Handler(http.server.BaseHTTPRequestHandler):
            asked = []

            def do_GET(self):
                self.asked.append(self.headers.get("Range"))
                start = (
                    int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
                    if ranges and "Range" in self.headers
                    else 0
                )
                if start >= len(content):
                    return self.send_error(416)
                self.send_response(206 if start else 200)
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
                self.send_header("Content-Length", str(len(content) - start))
                self.end_headers()
                self.wfile.write(content[start : cuts.pop(0) if cuts else len(content)])

            def log_message(self, *args):
                pass

        httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
        running.append(httpd)
        return f"http://127.0.0.1:{httpd.server_port}/CUB_200_2011.tgz", Handler.asked

    yield serve
    for httpd in running:
        httpd.shutdown()
        httpd.server_close()


def archive(**members):
    """A .tgz of these members, incompressible so that it can be cut, with the noise in a file of its own."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        members = {
            "CUB_200_2011/images.txt": b"1 a/1.jpg\n",
            "noise": np.random.default_rng(0).bytes(300_000),
        } | members
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def official(monkeypatch, url, content):
    monkeypatch.setattr(datasets, "CUB_URL", url)
    monkeypatch.setattr(datasets, "CUB_MD5", hashlib.md5(content).hexdigest())


def test_download_verifies_unpacks_and_leaves_nothing_else(server, monkeypatch, tmp_path):
    content = archive()
    url, asked = server(content)
    official(monkeypatch, url, content)
    datasets.download_cub(tmp_path / "data")
    assert (tmp_path / "data" / "CUB_200_2011" / "images.txt").read_text() == "1 a/1.jpg\n"
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["CUB_200_2011"]
    datasets.download_cub(tmp_path / "data")  # it is there already
    assert asked == [None]


def test_of_two_downloads_at_once_one_waits_for_the_other(server, monkeypatch, tmp_path):
    content = archive()
    url, asked = server(content)
    official(monkeypatch, url, content)
    both = [threading.Thread(target=datasets.download_cub, args=(tmp_path / "data",)) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert asked == [None] and [path.name for path in (tmp_path / "data").iterdir()] == ["CUB_200_2011"]


def test_a_download_that_is_cut_off_is_resumed_where_it_was(server, monkeypatch, tmp_path):
    content = archive()
    url, asked = server(content, cut=[100_000, 200_000])
    official(monkeypatch, url, content)
    datasets.download_cub(tmp_path)
    assert (tmp_path / "CUB_200_2011").is_dir() and asked == [None, "bytes=100000-", "bytes=200000-"]


def test_the_next_call_resumes_an_interrupted_download(server, monkeypatch, tmp_path):
    content = archive()
    (tmp_path / "CUB_200_2011.tgz.part").write_bytes(content[:50_000])
    url, asked = server(content, cut=[50_000])
    official(monkeypatch, url, content)
    with pytest.raises(
        InputError, match=rf"was interrupted .*50000 of {len(content)} bytes are kept: .* to resume"
    ):
        datasets.download_cub(tmp_path)
    datasets.download_cub(tmp_path)
    assert (tmp_path / "CUB_200_2011").is_dir() and asked == ["bytes=50000-"] * 2


def test_without_ranges_a_download_starts_over_and_a_whole_one_is_not_asked_for_again(
    server, monkeypatch, tmp_path
):
    content = archive()
    url, asked = server(content, ranges=False, cut=[100_000])
    official(monkeypatch, url, content)
    datasets.download_cub(tmp_path / "a")
    assert (tmp_path / "a" / "CUB_200_2011").is_dir() and asked == [None, "bytes=100000-"]
    (tmp_path / "CUB_200_2011.tgz.part").write_bytes(content)
    url, asked = server(content)
    monkeypatch.setattr(datasets, "CUB_URL", url)
    datasets.download_cub(tmp_path)
    assert (tmp_path / "CUB_200_2011").is_dir() and asked == [f"bytes={len(content)}-"]


def test_a_wrong_checksum_is_refused_before_anything_is_unpacked(server, fails, monkeypatch, tmp_path):
    content = archive()
    url, _ = server(content[:-1] + b"x")
    official(monkeypatch, url, content)
    fails(
        train.main,
        ["--dataset", "CUB", "--download", "--data-root", tmp_path / "data"],
        "MD5",
        hashlib.md5(content).hexdigest(),
        "removed",
    )
    assert not list((tmp_path / "data").iterdir())
    (tmp_path / "data" / "CUB_200_2011.tgz").write_bytes(b"a file of the user's")
    fails(
        train.main,
        ["--dataset", "CUB", "--download", "--data-root", tmp_path / "data"],
        "MD5",
        "CUB_200_2011.tgz",
        "remove it",
    )
    assert (tmp_path / "data" / "CUB_200_2011.tgz").exists()


@pytest.mark.parametrize(
    "name", ["../outside.txt", "CUB_200_2011/../../outside.txt", "CUB_200_2011/a/../../../../outside.txt"]
)
def test_an_archive_that_leaves_its_folder_is_refused(server, monkeypatch, tmp_path, name):
    content = archive(**{name: b"escaped"})
    url, _ = server(content)
    official(monkeypatch, url, content)
    with pytest.raises(InputError, match="cannot be unpacked .*outside"):
        datasets.download_cub(tmp_path / "data")
    assert not list(tmp_path.rglob("outside.txt")) and not (tmp_path / "data" / "CUB_200_2011").exists()


def test_download_problems_are_one_line(server, fails, monkeypatch, tmp_path):
    monkeypatch.setattr(datasets, "CUB_URL", "http://127.0.0.1:1/CUB_200_2011.tgz")
    fails(
        train.main,
        ["--dataset", "CUB", "--download", "--data-root", tmp_path],
        "127.0.0.1:1",
        "was interrupted",
        "refused",
    )
    fails(train.main, ["--dataset", "ILSVRC", "--download", "--data-root", tmp_path], "--download: only CUB")


# ----------------------------------------------------------------------------------------------------- ILSVRC

WNIDS = ["n01440764", "n01443537", "n02123045"]


def make_ilsvrc(root, sorted_into_folders=False, text=False):
    """Writes the official files of three classes to root/ILSVRC. Their IDs are not sorted as the wnids."""
    official, order = root / "ILSVRC", [WNIDS[2], WNIDS[0], WNIDS[1]]
    for k, wnid in enumerate(WNIDS):
        (official / "train" / wnid).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (40 + i, 30), (80 * k, 0, 0)).save(
                official / "train" / wnid / f"{wnid}_{i}.JPEG"
            )
    truth = [1, 3, 2, 1, 2]
    boxes = {1: [(0, 2, 50, 40)], 2: [(5, 6, 7, 8), (1, 1, 30, 30)], 3: [(3, 3, 51, 39)], 4: []}
    (official / "val").mkdir()
    (official / "bbox_val" / "val").mkdir(parents=True)
    for n, ilsvrc_id in enumerate(truth, 1):
        folder = official / "val" / order[ilsvrc_id - 1] if sorted_into_folders else official / "val"
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (50 + n // 3, 40)).save(folder / f"ILSVRC2012_val_{n:08d}.JPEG")
        if n in boxes:
            annotation = ElementTree.Element("annotation")
            for box in boxes[n]:
                bndbox = ElementTree.SubElement(ElementTree.SubElement(annotation, "object"), "bndbox")
                for name, value in zip(("xmin", "ymin", "xmax", "ymax"), box):
                    ElementTree.SubElement(bndbox, name).text = str(value)
            ElementTree.ElementTree(annotation).write(
                official / "bbox_val" / "val" / f"ILSVRC2012_val_{n:08d}.xml"
            )
    kit = official / "ILSVRC2012_devkit_t12" / "data"
    kit.mkdir(parents=True)
    (kit / datasets.GROUND_TRUTH).write_text("".join(f"{n}\n" for n in truth))
    if text:
        (kit / "ILSVRC2012_ids.txt").write_text("".join(f"{wnid}\n" for wnid in order))
    else:
        synsets = np.zeros(3, dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O")])
        synsets["ILSVRC2012_ID"], synsets["WNID"] = [1, 2, 3], order
        scipy.io.savemat(kit / "meta.mat", {"synsets": synsets})
    return official


def lists_of(folder):
    return {
        name: (folder / f"{name}.txt").read_text().splitlines()
        for name in datasets.LIST_FILES
        if (folder / f"{name}.txt").exists()
    }


@pytest.mark.parametrize("text", [False, True])
def test_ilsvrc_lists_from_the_official_distribution(tmp_path, text):
    official = make_ilsvrc(tmp_path, text=text)
    found, record = load_splits("ILSVRC", tmp_path, tmp_path / "splits", ("train", "test"))
    assert (
        "3 classes, 9 images, a subset of the 1000" in record["lists"]
        and "5 of 50000 images" in record["lists"]
    )
    assert (
        "2 images without boxes count for classification alone: "
        "val/ILSVRC2012_val_00000004.JPEG, val/ILSVRC2012_val_00000005.JPEG" in record["lists"]
    )
    assert record["classes"] == WNIDS and record["num_classes"] == 3
    train_lists = lists_of(tmp_path / "splits" / "ILSVRC" / "train")
    assert train_lists["image_ids"][:4] == [
        *(f"train/n01440764/n01440764_{i}.JPEG" for i in range(3)),
        "train/n01443537/n01443537_0.JPEG",
    ]
    assert train_lists["class_labels"][3] == "train/n01443537/n01443537_0.JPEG,1"
    image = "val/ILSVRC2012_val_0000000{}.JPEG".format
    assert lists_of(
        tmp_path / "splits" / "ILSVRC" / "test"
    ) == {  # IDs 1, 3, 2, 1, 2 are the wnids 2, 1, 0, 2, 0 in sorted order
        "image_ids": [image(n) for n in (1, 2, 3, 4, 5)],
        "class_labels": [f"{image(n)},{label}" for n, label in zip((1, 2, 3, 4, 5), (2, 1, 0, 2, 0))],
        "image_sizes": [f"{image(n)},{width},40" for n, width in zip((1, 2, 3, 4, 5), (50, 50, 51, 51, 51))],
        "localization": [
            f"{image(1)},0,2,49,39",
            f"{image(2)},5,6,7,8",
            f"{image(2)},1,1,30,30",
            f"{image(3)},3,3,50,39",
        ],
    }
    assert sorted(found["test"].boxes) == [0, 1, 2]
    shutil.rmtree(official / "bbox_val")  # built once
    assert "the lists found in" in load_splits("ILSVRC", tmp_path, tmp_path / "splits", ("test",))[1]["lists"]


def test_ilsvrc_val_sorted_into_folders_and_a_part_of_the_classes(tmp_path):
    official = make_ilsvrc(tmp_path, sorted_into_folders=True)
    shutil.rmtree(official / "train" / WNIDS[0])
    found, _ = load_splits("ILSVRC", tmp_path, tmp_path / "splits", ("train", "test"))
    assert found["test"].ids == [
        f"val/n02123045/ILSVRC2012_val_0000000{n}.JPEG"
        if n != 2
        else "val/n01443537/ILSVRC2012_val_00000002.JPEG"
        for n in (1, 2, 4)
    ]
    assert found["test"].labels.tolist() == [1, 0, 1]
    shutil.rmtree(tmp_path / "splits")
    (official / "val" / WNIDS[2] / "ILSVRC2012_val_00000001.JPEG").rename(
        official / "val" / WNIDS[1] / "ILSVRC2012_val_00000001.JPEG"
    )
    with pytest.raises(
        InputError, match="in the folder of n01443537, but its class in the development kit is n02123045"
    ):
        load_splits("ILSVRC", tmp_path, tmp_path / "splits", ("train", "test"))


@pytest.mark.parametrize(
    "damage, words",
    [
        (
            lambda official: shutil.rmtree(official / "ILSVRC2012_devkit_t12"),
            "unpack ILSVRC2012_devkit_t12.tar.gz",
        ),
        (lambda official: shutil.rmtree(official / "bbox_val"), "unpack ILSVRC2012_bbox_val_v3.tgz"),
        (
            lambda official: next(official.rglob("meta.mat")).write_bytes(b"no matlab"),
            "meta.mat: no synsets can be read",
        ),
        (lambda official: next(official.rglob("meta.mat")).unlink(), "meta.mat: no synsets can be read"),
        (
            lambda official: next(official.rglob(datasets.GROUND_TRUTH)).write_text("1\nfour\n"),
            f"{datasets.GROUND_TRUTH}:2: 'four' is no ILSVRC2012_ID",
        ),
        (
            lambda official: next(official.rglob(datasets.GROUND_TRUTH)).write_text("1\n3\n"),
            "ILSVRC2012_val_00000003.JPEG: not an image of",
        ),
        (
            lambda official: next(official.rglob("*2.xml")).write_text("<annotation><object><bndbox><xmin>1"),
            "00000002.xml: not a file of boxes",
        ),
        (
            lambda official: next(official.rglob("*2.xml")).write_text(
                "<a><bndbox><xmin>9</xmin><ymin>1</ymin><xmax>5</xmax><ymax>4</ymax></bndbox></a>"
            ),
            "00000002.xml: box 9,1,5,4",
        ),
        (
            lambda official: [path.unlink() for path in (official / "train" / WNIDS[1]).iterdir()],
            "n01443537: no .JPEG images of this class",
        ),
    ],
)
def test_ilsvrc_parts_that_are_missing_or_damaged_are_named(tmp_path, damage, words):
    damage(make_ilsvrc(tmp_path))
    with pytest.raises(InputError) as raised:
        load_splits("ILSVRC", tmp_path, tmp_path / "splits", ("train", "test"))
    assert words in str(raised.value) and not (tmp_path / "splits" / "ILSVRC" / "test").exists()


def test_imagenet_v2_under_other_names_is_recognised_or_named(tmp_path):
    ids = ["val2/0/0.jpeg", "val2/0/1.jpeg"]
    folder = tmp_path / "imagenetv2-matched-frequency" / "0"
    folder.mkdir(parents=True)
    for n in (0, 1):
        (folder / f"{n}.JPEG").touch()
    assert datasets.imagenet_v2_names(tmp_path, ids) == [
        f"imagenetv2-matched-frequency/0/{n}.JPEG" for n in (0, 1)
    ]
    folder.parent.rename(tmp_path / "val2")
    for n in (0, 1):
        (tmp_path / "val2" / "0" / f"{n}.JPEG").rename(
            tmp_path / "val2" / "0" / f"{'7e2a453559384e2a' if n else '0c1b'}.jpeg"
        )
    with pytest.raises(
        InputError, match="val2/0: holds 0c1b.jpeg where the published val list has 0.jpeg: another release"
    ):
        datasets.imagenet_v2_names(tmp_path, ids)
    (tmp_path / "val2" / "0" / "0.jpeg").touch()
    assert datasets.imagenet_v2_names(tmp_path, ids) == ids


def test_long_lists_are_read_with_errors_that_name_their_line(tmp_path):
    ids = [f"train/n{i // 100:08d}/{i}.JPEG" for i in range(20_000)]
    write_split(tmp_path, image_ids=ids, class_labels=[f"{image},{i // 100}" for i, image in enumerate(ids)])
    split = read_split(tmp_path, tmp_path, "big")
    assert len(split) == 20_000 and (split.labels == np.arange(20_000) // 100).all()
    lines = (tmp_path / "class_labels.txt").read_text().splitlines()
    lines[15_000] = lines[15_000] + "x"
    (tmp_path / "class_labels.txt").write_text("\n".join(lines))
    with pytest.raises(InputError, match="class_labels.txt:15001: 150x should be whole numbers"):
        read_split(tmp_path, tmp_path, "big")


# ------------------------------------------------------------------------------------------------- OpenImages


def test_pxap_of_masks_and_ignore_regions_from_the_published_format(monkeypatch, tmp_path):
    set_tiny_preset(monkeypatch)
    size, rng = 64, np.random.default_rng(0)
    scores, positive = [], []
    for split in ("train", "val", "test"):
        files = {"image_ids": [], "class_labels": [], "image_sizes": [], "localization": []}
        for i in range(4):
            stem = f"{split}/0{i % 2}abc/{i}"
            (tmp_path / "OpenImages" / stem).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (90, 70)).save(tmp_path / "OpenImages" / f"{stem}.jpg")
            files["image_ids"].append(f"{stem}.jpg")
            files["class_labels"].append(f"{stem}.jpg,{i % 2}")
            if split == "train":
                continue
            # Masks of another size than the image, in blocks of their own pixels: nearest neighbour by exact
            # fractions.
            parts = [rng.random((7, 9)) < 0.3 for _ in range(2)], rng.random((7, 9)) < 0.4
            for name, mask in zip(("a", "b", "ignore"), (*parts[0], parts[1])):
                Image.fromarray(mask).save(tmp_path / "OpenImages" / f"{stem}_{name}.png")
            files["localization"] += [
                f"{stem}.jpg,{stem}_a.png,{stem}_ignore.png",
                f"{stem}.jpg,{stem}_b.png,",
            ]
            if split == "test":
                score_map = (rng.integers(1, 1000, (size, size)) + 0.5) / 1000
                score_map.flat[:2] = 0, 1  # what min-max leaves as it is
                path = tmp_path / "maps" / f"{stem}.jpg.npy"
                path.parent.mkdir(parents=True, exist_ok=True)
                np.save(path, score_map)
                rows, columns = (np.array([int(y * n / size) for y in range(size)]) for n in (7, 9))
                mask, ignore = ((m[rows][:, columns]) for m in (parts[0][0] | parts[0][1], parts[1]))
                counted = mask | ~ignore
                scores.append(score_map[counted])
                positive.append(mask[counted])
        write_split(tmp_path / "splits" / "OpenImages" / split, **files)
    scores, positive = np.concatenate(scores), np.concatenate(positive)
    expected = recall = 0.0
    for t in sorted(set(scores), reverse=True):
        chosen = scores >= t
        expected += 100 * positive[chosen].mean() * (positive[chosen].sum() / positive.sum() - recall)
        recall = positive[chosen].sum() / positive.sum()
    texts = set()
    for workers in ("0", "2"):
        flags = [
            "--score-maps",
            tmp_path / "maps",
            "--dataset",
            "OpenImages",
            "--data-root",
            tmp_path,
            "--splits",
            tmp_path / "splits",
        ]
        evaluate.main([*map(str, flags), "--workers", workers, "--out", str(tmp_path / f"{workers}.json")])
        texts.add((tmp_path / f"{workers}.json").read_text())
    (text,) = texts
    metrics = json.loads(text)["metrics"]
    assert metrics["pxap"] == pytest.approx(expected, abs=1e-9) and metrics["max_box_acc_v2"] is None
    assert optim.PRESETS["OpenImages", "vgg16"]["stride"][0] == 16  # 224 -> 14 x 14


# ------------------------------------------------------------------------------------ a folder of your images


def make_folder(root, classes=3, images=12, size=(60, 40)):
    """Class k: a bright patch of channel k on noise. Returns the folder, named `own`."""
    rng = np.random.default_rng(0)
    for k in range(classes):
        (root / "own" / f"class {k}").mkdir(parents=True)
        for i in range(images):
            pixels = rng.integers(0, 90, (size[1], size[0], 3), dtype=np.uint8)
            pixels[5:30, 5:30, k % 3] = 255
            Image.fromarray(pixels).save(root / "own" / f"class {k}" / f"{i}.png")
    return root / "own"


def split_of(folder):
    return {image: name for name, split in read_folder(folder)[0].items() for image in split.ids}


def test_every_image_of_a_folder_is_in_one_split_and_stays_there(tmp_path):
    folder = make_folder(tmp_path, classes=2, images=200, size=(40, 40))
    splits, record = read_folder(folder)
    assert record["classes"] == ["class 0", "class 1"] and sum(map(len, splits.values())) == 400
    for name, share in (("train", 0.7), ("val", 0.15), ("test", 0.15)):
        assert abs(len(splits[name]) / 400 - share) < 0.06
        assert all(
            image.startswith(f"class {label}/") for image, label in zip(splits[name].ids, splits[name].labels)
        )
    before = split_of(folder)
    for image, name in before.items():  # by the definition in the docstring
        place = int(hashlib.sha256(image.encode()).hexdigest()[:16], 16) / 16**16
        assert name == ("train" if place < 0.7 else "val" if place < 0.85 else "test")
    for i in range(100):
        shutil.copy(folder / "class 0" / "0.png", folder / "class 0" / f"new {i}, {i}.png")
    for i in range(50, 90):
        (folder / "class 1" / f"{i}.png").unlink()
    (folder / "class 0" / "._0.png").touch()
    (folder / "class 0" / "notes.txt").touch()
    (folder / ".cache").mkdir()
    after = split_of(folder)
    assert len(after) == 460 and all(
        before[image] == name for image, name in after.items() if image in before
    )


@pytest.mark.parametrize("images", [3, 4, 5])
def test_small_classes_have_an_image_in_every_split(tmp_path, images):
    splits, _ = read_folder(make_folder(tmp_path, classes=6, images=images))
    for split in splits.values():
        assert set(split.labels) == set(range(6))


def test_folders_that_are_no_data_set_are_named(tmp_path, fails):
    folder = make_folder(tmp_path)
    flags = ["--weights", "none", "--out", tmp_path / "run", "--dataset"]
    fails(train.main, [*flags, tmp_path / "nothing"], "nothing: neither the name of a data set nor a folder")
    fails(train.main, [*flags, tmp_path / "own" / "class 0"], "0 sub-folders where one for each class")
    (tmp_path / "outer" / "train").mkdir(parents=True)
    shutil.copytree(folder, tmp_path / "outer" / "test")
    fails(train.main, [*flags, tmp_path / "outer"], "test/class 0: a folder inside of the class test")
    for i in range(10):
        (folder / "class 1" / f"{i}.png").unlink()
    fails(train.main, [*flags, folder], "own/class 1: 2 images: at least 3 per class")
    fails(
        train.main,
        [*flags, "unheard-of"],
        "--dataset unheard-of --arch vgg16: no preset",
        "a folder of images",
    )


def own_flags(folder, out):
    flags = ["--dataset", folder, "--weights", "none", "--device", "cpu", "--workers", "0", "--out", out]
    return [*map(str, flags), "--epochs", "2", "--warm-epochs", "1", "--batch-size", "8"]


def test_a_folder_without_boxes_trains_and_chooses_by_classification(
    tmp_path, tiny_preset, capsys, monkeypatch
):
    folder, run = make_folder(tmp_path), tmp_path / "run"
    monkeypatch.chdir(tmp_path)
    train.main(own_flags("own", run))
    assert (
        "val has no boxes: the best epoch is the one with the best Top-1 classification"
        in capsys.readouterr().out
    )
    config = read_json(run / "config.json")
    assert config["config"]["lambda_sim"] == {"value": 0.5, "source": "preset: our choice: CUB's"} and config[
        "data"
    ]["classes"] == ["class 0", "class 1", "class 2"]
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    best = max(lines, key=lambda line: (line["val"]["top1_cls"], -line["epoch"]))
    result = read_json(run / "results_best_test.json")
    assert (
        result["epoch"] == best["epoch"]
        and result["metrics"]["max_box_acc_v2"] is None
        and result["metrics"]["top1_cls"] is not None
    )
    evaluate.main([str(run), "--device", "cpu", "--workers", "0", "--pictures", "1"])
    assert read_json(run / "results_best_test.json") == result
    evaluate.main([str(run), "--device", "cpu", "--images", "own/class 0/3.png", "--threshold", "0.5"])
    (found,) = read_json(run / "images" / "boxes.json")
    assert {k["name"]: k["class"] for k in found["top5"]} == {"class 0": 0, "class 1": 1, "class 2": 2}
    (folder / "class 1").rename(folder / "other class")
    with pytest.raises(InputError, match="was trained on other classes"):
        evaluate.main([str(run), "--device", "cpu", "--workers", "0"])


def test_where_a_run_on_a_folder_goes_by_default(tmp_path, tiny_preset, monkeypatch):
    folder = make_folder(tmp_path)
    for where, dataset in (("cwd", "../own/"), ("own", ".")):
        monkeypatch.chdir(tmp_path / where)
        train.main([flag for flag in own_flags(dataset, "x") if flag not in ("--out", "x")])
        assert (tmp_path / where / "runs" / "own_vgg16_bridge" / "best.pt").exists()
        shutil.rmtree(tmp_path / where / "runs")
    assert folder.exists()


def test_boxes_in_localization_txt_switch_the_metrics_on(tmp_path, tiny_preset):
    folder, run = make_folder(tmp_path), tmp_path / "run"
    where = split_of(folder)
    (folder / "localization.txt").write_text(
        "".join(f"{image},5,5,29,29\n" for image in where if where[image] != "train")
    )
    train.main(own_flags(folder, run))
    result = read_json(run / "results_best_test.json")
    assert (
        result["metrics"]["max_box_acc_v2"]["mean"] >= 0
        and result["metrics"]["max_box_acc_v2_at_val_threshold"] is not None
    )
    assert "(0 with boxes), val" in read_json(run / "config.json")["data"]["lists"]
    splits, record = load_splits(str(folder), tmp_path, tmp_path, ("train", "val"), val_per_class=3)
    assert len(splits["val"]) == 9 and "held out" in record["val"]
    boxed = {image for split in splits.values() for i, image in enumerate(split.ids) if i in split.boxes}
    assert boxed == {image for image in where if where[image] == "val"}


def test_boxes_of_a_turned_photo_are_in_pixels_as_it_is_shown(tmp_path):
    folder = make_folder(tmp_path)
    stored = np.zeros((20, 50, 3), dtype=np.uint8)
    stored[2:6, 3:9] = 255
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # shown after a quarter turn clockwise: stored (x, y) is shown at (19 - y, x)
    Image.fromarray(stored).save(folder / "class 0" / "turned.png", exif=exif)
    (folder / "localization.txt").write_text("class 0/turned.png,14,3,17,8\n")
    for split in read_folder(folder)[0].values():
        if "class 0/turned.png" in split.ids:
            index = split.ids.index("class 0/turned.png")
            pixels = np.asarray(data.decode(split.path(index), split.sizes[index], split.upright))
            ((x0, y0, x1, y1),) = split.boxes[index]
            assert split.sizes[index].tolist() == [20, 50] and pixels.shape == (50, 20, 3)
            inside = np.zeros((50, 20), dtype=bool)
            inside[y0 : y1 + 1, x0 : x1 + 1] = True
            np.testing.assert_array_equal(pixels[..., 0] > 0, inside)
    (folder / "localization.txt").write_text("class 0/turned.png,14,3,20,8\n")
    with pytest.raises(InputError, match="localization.txt:1: box 14,3,20,8 leaves its image of 20 x 50"):
        read_folder(folder)


# --------------------------------------------------------------------------------------- evaluate.py --images


def localize(run, *arguments):
    evaluate.main([str(run), "--device", "cpu", "--images", *map(str, arguments)])
    return read_json(run / "images" / "boxes.json")


def test_photos_of_every_kind(trained, tmp_path):
    _, run = trained
    photos = tmp_path / "photos"
    photos.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    for mode in ("L", "CMYK", "P", "RGBA", "1", "LA", "I;16"):
        image = (
            Image.fromarray(noise[..., 0].astype(np.uint16) * 256 + 3)
            if mode == "I;16"
            else Image.fromarray(noise).convert(mode)
        )
        image.save(photos / f"{mode.replace(';', '')}.{'jpg' if mode == 'CMYK' else 'png'}")
    Image.new("RGB", (1, 1), (9, 200, 30)).save(photos / "one.png")
    Image.new("RGB", (3, 500)).save(photos / "thin.png")
    Image.effect_noise((800, 600), 90).resize((8000, 6000)).save(photos / "large.jpg")
    found = {entry["image"].rpartition("/")[2]: entry for entry in localize(run, photos)}
    assert len(found) == 10 and (found["large.jpg"]["width"], found["large.jpg"]["height"]) == (8000, 6000)
    for entry in found.values():
        if entry["box"] is not None:
            x0, y0, x1, y1 = entry["box"]
            assert 0 <= x0 <= x1 < entry["width"] and 0 <= y0 <= y1 < entry["height"]
    np.testing.assert_array_equal(np.asarray(data.decode(photos / "I16.png")), noise[..., [0, 0, 0]])
    pictures = {path.name[6:]: Image.open(path).size for path in (run / "images").glob("*.png")}
    assert (
        len(pictures) == 10 and pictures["large.png"] == (448, 2 * 336) and pictures["one.png"] == (448, 896)
    )


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_photo_gets_the_boxes_of_the_upright_one(trained, tmp_path, orientation):
    _, run = trained
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 70, 3), dtype=np.uint8)).save(
        tmp_path / "turned.png", exif=exif
    )
    upright = ImageOps.exif_transpose(Image.open(tmp_path / "turned.png"))
    Image.fromarray(np.asarray(upright)).save(tmp_path / "upright.png")
    np.testing.assert_array_equal(
        np.asarray(data.decode(tmp_path / "turned.png", upright=True)), np.asarray(upright)
    )
    plain, turned = localize(run, tmp_path / "upright.png", tmp_path / "turned.png")
    assert plain.pop("image") != turned.pop("image") and plain == turned
    assert (plain["width"], plain["height"]) == ((40, 70) if orientation > 4 else (70, 40))


def test_the_box_covers_in_the_photo_what_it_covers_in_the_map():
    for size, image_size, box in (
        (224, (448, 224), [10, 10, 20, 20]),
        (224, (8000, 6000), [3, 0, 223, 1]),
        (64, (1, 1), [5, 6, 30, 40]),
        (64, (50, 7), [63, 63, 63, 63]),
    ):
        x0, y0, x1, y1 = evaluation.original_box(np.array(box), size, image_size)
        touched = [
            [p for p in range(n) if p * size < (b + 1) * n and (p + 1) * size > a * n]
            for n, a, b in ((image_size[0], box[0], box[2]), (image_size[1], box[1], box[3]))
        ]
        assert [x0, x1, y0, y1] == [touched[0][0], touched[0][-1], touched[1][0], touched[1][-1]]
    assert evaluation.original_box(np.zeros(4, dtype=int), 224, (50, 50)) is None


def test_the_threshold_is_val_s_or_the_user_s(trained, tmp_path, fails, capsys):
    _, run = trained
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 70, 3), dtype=np.uint8)).save(
        tmp_path / "photo.png"
    )
    areas = []
    for threshold in ("0", "0.4", "0.8"):
        (entry,) = localize(run, tmp_path / "photo.png", "--threshold", threshold)
        x0, y0, x1, y1 = entry["box"]
        areas.append((x1 - x0 + 1) * (y1 - y0 + 1))
        assert f"threshold {float(threshold):.3f}" in capsys.readouterr().out
    assert areas == sorted(areas, reverse=True) and areas[0] > areas[2]
    (chosen,) = localize(run, tmp_path / "photo.png")
    level = torch.load(run / "best.pt", weights_only=True)["val"]["levels"]["largest"]
    assert f"threshold {level / 255:.3f}" in capsys.readouterr().out
    assert [chosen] == localize(run, tmp_path / "photo.png", "--threshold", str((level + 0.5) / 255))
    fails(evaluate.main, [run, "--images", tmp_path / "photo.png", "--threshold", "1"], "in [0, 1)")
    fails(
        evaluate.main, [run, "--device", "cpu", "--images", tmp_path / "splits"], "no images in this folder"
    )


def test_an_unreadable_photo_is_named_and_the_rest_is_done(trained, tmp_path, capsys):
    _, run = trained
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        Image.effect_noise((90, 60), 90).save(photos / name)
    (photos / "b.jpg").write_bytes((photos / "b.jpg").read_bytes()[:700])
    with pytest.raises(SystemExit) as end:
        localize(run, photos, tmp_path / "nothing.jpg")
    assert end.value.code == 1
    assert [entry["image"] for entry in read_json(run / "images" / "boxes.json")] == [
        str(photos / "a.jpg"),
        str(photos / "c.jpg"),
    ]
    error = capsys.readouterr().err
    assert (
        f"{photos / 'b.jpg'}: truncated" in error
        and "nothing.jpg: no such image" in error
        and "2 of 4 images could not be read" in error
    )


def test_another_normalization_gets_its_own_threshold_from_val(trained, tmp_path, capsys):
    _, run = trained
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 70, 3), dtype=np.uint8)).save(
        tmp_path / "photo.png"
    )
    for normalization in ("ivr", "max"):
        evaluate.main([str(run), "--device", "cpu", "--split", "val", "--normalize", normalization])
        threshold = read_json(run / f"results_best_val_{normalization}.json")["thresholds"]["largest"]
        capsys.readouterr()
        (chosen,) = localize(run, tmp_path / "photo.png", "--normalize", normalization)
        assert f"threshold {threshold:.3f}" in capsys.readouterr().out
        level = str(threshold + 0.5 / 255)
        assert [chosen] == localize(
            run, tmp_path / "photo.png", "--normalize", normalization, "--threshold", level
        )
    capsys.readouterr()
    # The run was copied to a machine without the data.
    (fallback,) = localize(
        run, tmp_path / "photo.png", "--normalize", "ivr", "--data-root", tmp_path / "nowhere"
    )
    printed = capsys.readouterr().out
    assert printed.count("no threshold was chosen on val") == 1 and "--threshold sets another" in printed
    assert [fallback] == localize(run, tmp_path / "photo.png", "--normalize", "ivr", "--threshold", "0.2")


def test_without_a_threshold_from_val_the_papers_value_is_used(tmp_path, tiny_preset, capsys):
    run, photo = tmp_path / "run", tmp_path / "own" / "class 0" / "0.png"
    train.main(own_flags(make_folder(tmp_path), run))
    (fallback,) = localize(run, photo)
    assert capsys.readouterr().out.count("no threshold was chosen on val (val has no boxes): 0.2 of") == 1
    assert (
        [fallback] == localize(run, photo, "--threshold", "0.2") != localize(run, photo, "--threshold", "0.9")
    )
    for normalization in ("max", "ivr"):
        (fallback,) = localize(run, photo, "--normalize", normalization)
        assert [fallback] == localize(run, photo, "--normalize", normalization, "--threshold", "0.2")


# ------------------------------------------------------------------------------------------------------ check


@pytest.mark.parametrize("workers", ["0", "2"])
def test_check_counts_what_is_missing_damaged_or_of_another_size(tmp_path, fails, capsys, workers):
    data_root, splits = make_tiny(tmp_path)
    flags = ["check", "--dataset", "tiny", "--data-root", data_root, "--splits", splits, "--workers", workers]
    datasets.main([str(flag) for flag in flags])
    printed = capsys.readouterr()
    assert "tiny train: 18 images, 18 masks, 0 with a problem" in printed.out and not printed.err
    root = data_root / "tiny"
    (root / "train" / "03.png").unlink()
    (root / "masks" / "val_02.png").unlink()
    half = (root / "train" / "04.png").read_bytes()
    (root / "train" / "04.png").write_bytes(half[: len(half) // 2])
    (root / "masks" / "test_01.png").write_text("no mask")
    Image.new("RGB", (33, 44)).save(root / "test" / "05.png")
    with pytest.raises(InputError, match="^tiny: 2 missing, 2 damaged, 1 of another size$"):
        datasets.main([str(flag) for flag in flags])
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if line.startswith("missing")] == [
        f"missing: {root / path}: no such image" for path in ("train/03.png", "masks/val_02.png")
    ]
    assert any(
        line.startswith(f"of another size: {root / 'test/05.png'}: 33 x 44 pixels where the list has")
        for line in printed
    )
    assert [
        line.rpartition(", ")[2] for line in printed if ": damaged" not in line and line.startswith("tiny ")
    ] == ["2 with a problem", "1 with a problem", "2 with a problem"]
    (splits / "tiny" / "test" / "class_labels.txt").write_text("test/00.png,9\n")
    fails(datasets.main, flags, "class_labels.txt:1: label 9 is out of range")


@pytest.mark.parametrize("quiet", [False, True])
def test_check_shows_how_far_it_is_unless_it_is_to_be_quiet(tmp_path, capsys, monkeypatch, quiet):
    data_root, splits = make_tiny(tmp_path)
    monkeypatch.setattr(utils.Progress, "quiet", False)
    monkeypatch.setattr(utils.time, "monotonic", itertools.count(0, 45).__next__)  # slow files
    flags = ["check", "--dataset", "tiny", "--data-root", data_root, "--splits", splits, "--workers", "0"]
    datasets.main([*map(str, flags), *["--quiet"][:quiet]])
    shown = re.findall(r"^(tiny \w+): (\d+) of (\d+) files", capsys.readouterr().err, re.MULTILINE)
    assert bool(shown) != quiet and {(*where, n) for *where, n in shown if where[1] == n} == (
        set() if quiet else {("tiny train", "36", "36"), ("tiny val", "12", "12"), ("tiny test", "18", "18")}
    )


def test_check_of_a_folder_and_of_lists_without_val(tmp_path, capsys):
    folder = make_folder(tmp_path)
    datasets.main(["check", "--dataset", str(folder), "--workers", "0"])
    assert "every file is there" in capsys.readouterr().out
    (folder / "localization.txt").write_text("class 0/0.png,1,2,3,400\n")
    with pytest.raises(InputError, match="localization.txt:1: box 1,2,3,400 leaves its image"):
        datasets.main(["check", "--dataset", str(folder), "--workers", "0"])
    (folder / "class 2" / "7.png").write_text("no image")
    with pytest.raises(InputError, match="own: 1 damaged$"):
        datasets.main(["check", "--dataset", str(folder), "--workers", "0"])
    data_root, splits = make_tiny(tmp_path)
    shutil.rmtree(splits / "tiny" / "val")
    datasets.main(
        [
            "check",
            "--dataset",
            "tiny",
            "--data-root",
            str(data_root),
            "--splits",
            str(splits),
            "--workers",
            "0",
        ]
    )
    assert "tiny val: 6 images" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------- damaged inputs


def test_a_flipped_bit_in_a_weight_is_found(trained, fails):
    _, run = trained
    content, weight = (
        (run / "best.pt").read_bytes(),
        torch.load(run / "best.pt", weights_only=True)["model"]["fc.weight"].numpy().tobytes(),
    )
    at = content.index(weight) + 5
    (run / "best.pt").write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    fails(evaluate.main, [run, "--device", "cpu"], run / "best.pt", "wrong checksum of")


@pytest.mark.parametrize(
    "part, value",
    [("val", ...), ("val", {}), ("val", {"levels": {"30": 1}}), ("epoch", "3"), ("classes", ["one"])],
)
def test_a_checkpoint_without_a_part_is_named(trained, fails, part, value):
    _, run = trained
    checkpoint = torch.load(run / "best.pt", weights_only=True)
    if value is ...:
        del checkpoint[part]
    else:
        checkpoint[part] = value
    torch.save(checkpoint, run / "best.pt")
    fails(
        evaluate.main,
        [run, "--device", "cpu"],
        run / "best.pt",
        f"not a checkpoint of train.py ({part} is missing or has the wrong type)",
    )


def test_a_score_map_with_a_cut_header_is_named(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((3, 3)))
    content = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(content.replace(b"}", b" ", 1))
    with pytest.raises(InputError, match="a.npy: not a .npy array"):
        data.load_score_map(tmp_path, "a")


def test_damaged_inputs_give_neither_tracebacks_nor_wrong_numbers(trained, tmp_path):
    outcomes = fuzz_inputs.run(tmp_path, cases=60, seed=1)
    assert sum(outcomes.values()) == 60
    for target in fuzz_inputs.TARGETS:
        assert outcomes[target.__name__, "refused"] >= 4
