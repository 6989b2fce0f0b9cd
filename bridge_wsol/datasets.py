"""What concerns one data set: CUB's download, and the split lists built from CUB's and ILSVRC's official files.

Lists are built once, into the folder of --splits, in the field's text format (data_splits/README.md), and are compared with the published
ones by count and SHA-256 (data_splits/checksums.json).
"""

from __future__ import annotations

import hashlib
import http.client
import json
import re
import shutil
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np

from .data import SIDEWAYS, Split, decode, is_image, open_image, read_localization, read_split, turn_of
from .demo import draw_demo, draw_pretraining
from .processes import ordered_map
from .utils import (
    InputError,
    Parser,
    alone,
    default_workers,
    first_line,
    one_line_errors,
    write_json,
    write_text,
    writing,
)

LIST_FILES = ("image_ids", "class_labels", "image_sizes", "localization")

Lists = dict[str, list[str]]  # file name without .txt -> lines


def write_lists(folder: Path, lists: Lists) -> None:
    for name in sorted(lists, key="image_ids".__eq__):  # last: where it is, the list is whole
        write_text(folder / f"{name}.txt", "".join(f"{line}\n" for line in lists[name]))


def differing_files(dataset: str, split: str, lists: Lists) -> list[str] | None:
    """The files whose lines are not the published list's, in any order; None where no such list was published."""
    published = _published().get(f"{dataset}/{split}")
    if published is None:
        return None

    def digest(name: str) -> str:
        return hashlib.sha256("\n".join(sorted(lists.get(name, []))).encode()).hexdigest()

    return [name for name in published if digest(name) != published[name]["sha256_of_sorted_lines"]]


def describe_lists(dataset: str, folder: Path) -> str:
    """One line on lists that came from elsewhere: which are the published ones, and which have other images than those."""
    parts = []
    for split in ("train", "val", "test"):
        paths = {name: folder / split / f"{name}.txt" for name in LIST_FILES}
        if not paths["image_ids"].exists():
            continue
        published = _published().get(f"{dataset}/{split}")
        lists = {
            name: [line for line in read_lines(path) if line.strip()]
            for name, path in paths.items()
            if published and path.exists()
        }
        differ = differing_files(dataset, split, lists)
        if differ == []:
            parts.append(f"{split} as published")
        elif differ:
            n, expected = len(lists["image_ids"]), published["image_ids"]["lines"]
            what = (
                f"{n} images where the published list has {expected}"
                if n != expected
                else f"{', '.join(differ)} not as published"
            )
            parts.append(f"{split} {what}: results do not compare with published ones")
        else:
            parts.append(f"{split} of your own")
    return f"the lists found in {folder}: {'; '.join(parts)}"


def _published() -> dict[str, dict[str, dict]]:
    return json.loads(
        (Path(__file__).parents[1] / "data_splits" / "checksums.json").read_text(encoding="utf-8")
    )


def read_lines(path: Path) -> list[str]:
    """Raises InputError for a file that cannot be read or is no text."""
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise InputError(f"{path}: cannot be read ({reason})") from error


# ------------------------------------------------------------------------------------------------------------------ CUB

CUB_URL = "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz?download=1"
CUB_MD5 = "97eceeb196236b17998738112f37df78"


def download(dataset: str, data_root: Path) -> None:
    """--download of train.py. Raises InputError for a data set that this program does not download."""
    if dataset != "CUB":
        raise InputError(f"--download: only CUB can be downloaded, not {dataset}: see docs/data.md")
    download_cub(data_root)


def download_cub(data_root: Path) -> None:
    """Fetches CUB-200-2011 into data_root, where it is not there already: downloads, verifies, unpacks.

    A download that was cut is gone on with, by this call or the next. Nothing is unpacked before the MD5 is right, and data_root/CUB_200_2011
    appears when it is whole. Raises InputError for whatever goes wrong; a CUB_200_2011.tgz in data_root is used instead of a download.
    """
    with alone(data_root):
        if not (data_root / "CUB_200_2011").is_dir():
            _fetch_cub(data_root)


def _fetch_cub(data_root: Path) -> None:
    target, archive = data_root / "CUB_200_2011", data_root / "CUB_200_2011.tgz"
    own = archive.exists()
    if not own:
        archive = archive.with_name(f"{archive.name}.part")
        _download(CUB_URL, archive)
    with writing(archive), archive.open("rb") as file:
        digest = hashlib.md5(usedforsecurity=False)
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != CUB_MD5:
        if not own:
            archive.unlink()
        way_out = "remove it" if own else "it was removed: try again, or download it by hand"
        raise InputError(
            f"{archive}: MD5 {digest.hexdigest()} where CUB_200_2011.tgz has {CUB_MD5}: damaged or another file; {way_out}"
        )
    print(f"unpacking {archive} into {target}", flush=True)
    unpacked = data_root / ".CUB_200_2011.part"
    try:
        shutil.rmtree(unpacked, ignore_errors=True)
        with writing(target):
            with tarfile.open(archive) as tar:
                tar.extractall(unpacked, filter="data")
            (unpacked / "CUB_200_2011").rename(target)
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise InputError(f"{archive}: cannot be unpacked ({first_line(error)})") from error
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)
    if not own:
        archive.unlink()


def _download(url: str, part: Path) -> None:
    """Fetches url into `part`, from the end of what is there where the server allows it; tries again as long as that brings more."""
    with writing(part):
        part.parent.mkdir(parents=True, exist_ok=True)
    while True:
        have = part.stat().st_size if part.exists() else 0
        total, problem = _download_once(url, part, have)
        got = part.stat().st_size if part.exists() else 0
        if problem is None and (total is None or got == total):
            return
        if got <= have:  # nothing new
            kept = (
                f"; {got} of {total or 'unknown'} bytes are kept: the same command goes on from there"
                if got
                else ""
            )
            raise InputError(f"{url}: the download broke off ({problem or 'the connection was cut'}){kept}")


def _download_once(url: str, part: Path, have: int) -> tuple[int | None, str | None]:
    """(size of the whole file if the server tells, what went wrong) of one connection."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    total = None
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            begins = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
            resumed = response.status == 206 and begins is not None and int(begins[1]) == have
            done = have if resumed else 0
            length = response.headers.get("Content-Length", "")
            total = done + int(length) if length.isdigit() else None
            print(f"downloading {url} to {part}" + (f", from byte {done} on" if done else ""), flush=True)
            with writing(part):
                file = part.open("ab" if resumed else "wb")
            with file:
                shown = done
                while block := response.read(1 << 16):
                    with writing(part):
                        file.write(block)
                    done += len(block)
                    if total and done - shown >= max(total // 20, 1 << 20):
                        print(f"  {done >> 20} of {total >> 20} MiB", flush=True)
                        shown = done
    except urllib.error.HTTPError as error:
        if (
            error.code == 416
        ):  # what is there is no beginning of this file, or all of it: the checksum will tell
            return None, None
        return total, f"the server says {error.code} {error.reason}"
    except (OSError, http.client.HTTPException) as error:
        return total, first_line(getattr(error, "reason", None) or error)
    return total, None


CUB_FILES = {  # what follows the image's number on each line: in words, and each field as a pattern
    "images.txt": ("its path", [r"\S+"]),
    "image_class_labels.txt": ("its class (a whole number from 1)", [r"[1-9]\d{0,8}"]),
    "train_test_split.txt": ("1 (train) or 0 (test)", [r"[01]"]),
    "bounding_boxes.txt": ("x, y, width and height in pixels", [r"\d{1,9}(?:\.\d*)?"] * 4),
}
CUB_IMAGES = 11788


def has_official_files(official: Path) -> bool:
    """Whether CUB's lists can be built from this folder."""
    return all((official / name).is_file() for name in CUB_FILES)


def ensure_cub_lists(official: Path, folder: Path) -> str:
    """Builds CUB's train and test lists from the official files, once; returns one line that says which CUB this is.

    A full CUB must give the published lists (checksums.json: count and SHA-256); a part of it is called one. Lists that were built from
    other official files than those now in the data root are built anew; lists that came from elsewhere are left alone.
    """
    stamp = folder / "built_from.json"
    if (folder / "train" / "image_ids.txt").exists() and not stamp.exists():
        return describe_lists("CUB", folder)
    if not official.is_dir():
        raise InputError(
            f"{official}: no such folder: pass --download, or unpack CUB_200_2011.tgz into --data-root"
        )
    sources = {}
    for name in CUB_FILES:
        if not (official / name).is_file():
            raise InputError(
                f"{official / name}: no such file: {official} is not CUB-200-2011 as distributed"
            )
        sources[name] = hashlib.sha256((official / name).read_bytes()).hexdigest()
    if stamp.exists():
        with suppress(ValueError, AttributeError, KeyError):  # a damaged stamp: the lists are built anew
            built = json.loads(stamp.read_text(encoding="utf-8"))
            if built.get("sources") == sources:
                return str(built["says"])

    lists, classes = _cub_lists(official)
    images = sum(len(lists[split]["image_ids"]) for split in lists)
    if images == CUB_IMAGES:
        for split, files in lists.items():
            for name in differing_files("CUB", split, files):
                raise InputError(
                    f"CUB: {split}/{name}.txt built from the official files differs from the published list: the copy is damaged"
                )
        says = f"built from {official}, equal to the published lists ({images} images, {classes} classes)"
    else:
        says = f"built from {official}: a subset, {classes} of 200 classes, {images} of {CUB_IMAGES} images; results do not compare with published ones"
    write_json(
        stamp, {}
    )  # so that lists of which a killed process wrote a part do not pass for somebody's own
    for split, files in lists.items():
        write_lists(folder / split, files)
    write_json(stamp, {"says": says, "sources": sources})
    return says


def _cub_lists(official: Path) -> tuple[dict[str, Lists], int]:
    """{split: {file name: lines}} and the number of classes. Boxes: int(x), int(y), int(x + w), int(y + h), clipped to the image."""
    images = _cub_table(official / "images.txt")
    labels, in_train, boxes = (_cub_table(official / name, images) for name in list(CUB_FILES)[1:])
    lists: dict[str, Lists] = {split: {name: [] for name in LIST_FILES} for split in ("train", "test")}
    for number, (image,) in images.items():
        x, y, w, h = map(float, boxes[number])
        width, height = open_image(official / "images" / image).size
        if x >= width or y >= height:
            path, n = official / "bounding_boxes.txt", list(boxes).index(number) + 1  # one row a line
            raise InputError(
                f"{path}:{n}: a box inside image {number} ({image}, {width} x {height}) "
                f"is expected: its corner is {x:g}, {y:g}"
            )
        box = int(x), int(y), min(int(x + w), width - 1), min(int(y + h), height - 1)
        files = lists["train" if in_train[number] == ("1",) else "test"]
        files["image_ids"].append(image)
        files["class_labels"].append(f"{image},{int(labels[number][0]) - 1}")
        files["image_sizes"].append(f"{image},{width},{height}")
        files["localization"].append(",".join(map(str, (image, *box))))
    return lists, len(set(labels.values()))


def _cub_table(path: Path, images: Collection[int] | None = None) -> dict[int, tuple[str, ...]]:
    """{image number: the fields after it}, in the order of the lines, one a line.

    Raises InputError for a line that is not as CUB_FILES says, a number that was there before or is not in
    images (None: any may be there), and one of images that is missing.
    """
    words, fields = CUB_FILES[path.name]
    pattern = re.compile(r"\s+".join(f"({field})" for field in (r"\d{1,9}", *fields)), re.ASCII)
    rows: dict[int, tuple[str, ...]] = {}
    for n, line in enumerate(read_lines(path), 1):
        found = pattern.fullmatch(line.strip())
        if found is None:
            raise InputError(f"{path}:{n}: an image's number and {words} are expected: {line[:80]!r}")
        number = int(found[1])
        if number in rows:
            raise InputError(f"{path}:{n}: one line for each image is expected: {number} was there before")
        if images is not None and number not in images:
            raise InputError(f"{path}:{n}: an image of images.txt is expected: {number} is not there")
        rows[number] = found.groups()[1:]
    missing = next((number for number in images or () if number not in rows), None)
    if missing is not None:
        raise InputError(f"{path}: a line for every image of images.txt is expected: {missing} has none")
    return rows


# --------------------------------------------------------------------------------------------------------------- ILSVRC

ILSVRC_CLASSES, ILSVRC_VAL_IMAGES = 1000, 50000
GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"


def ensure_ilsvrc_lists(official: Path, folder: Path) -> str:
    """Builds the lists of ILSVRC that `folder` lacks from the official distribution, once; returns one line on all of them.

    official: train/<wnid>/*.JPEG; val/*.JPEG, or val/<wnid>/*.JPEG as often rearranged; for test (the literature's name for the official
    val) the development kit's ILSVRC2012_validation_ground_truth.txt with meta.mat, and the validation boxes ILSVRC2012_val_*.xml, both
    anywhere below `official` (outside train and val) in their folders of the archives. Instead of meta.mat: ILSVRC2012_ids.txt, whose
    n-th line is the wnid of ILSVRC2012_ID n. Classes are the sorted wnids. Raises InputError where a part is missing or contradicts another.
    """
    said = []
    wnids: list[str] = []
    if not (folder / "train" / "image_ids.txt").exists() and (official / "train").is_dir():
        lists, wnids = _ilsvrc_train(official)
        write_lists(folder / "train", lists)
        said.append(
            f"train built from {official / 'train'}: {len(wnids)} classes, {len(lists['image_ids'])} images"
        )
        if len(wnids) != ILSVRC_CLASSES:
            said[-1] += f", a subset of the {ILSVRC_CLASSES}: results do not compare with published ones"
    if not (folder / "test" / "image_ids.txt").exists() and (official / "val").is_dir():
        if not wnids and (folder / "train" / "image_ids.txt").exists():
            wnids = sorted(
                {
                    line.split("/")[-2]
                    for line in read_lines(folder / "train" / "image_ids.txt")
                    if line.count("/") > 1
                }
            )
        lists, note = _ilsvrc_test(official, wnids)
        write_lists(folder / "test", lists)
        differ = differing_files("ILSVRC", "test", lists)
        same = f"{', '.join(differ)} not as published" if differ else "equal to the published list"
        said.append(
            f"test built from {official / 'val'}: {len(lists['image_ids'])} of {ILSVRC_VAL_IMAGES} images ({same}){note}"
        )
    return "; ".join(said) or describe_lists("ILSVRC", folder)


def _ilsvrc_train(official: Path) -> tuple[Lists, list[str]]:
    wnids = sorted(
        path.name
        for path in (official / "train").iterdir()
        if path.is_dir() and re.fullmatch(r"n\d{8}", path.name)
    )
    if not wnids:
        raise InputError(
            f"{official / 'train'}: no folders n01440764 and so on: unpack ILSVRC2012_img_train.tar and the archive of each class in it"
        )
    lists: Lists = {"image_ids": [], "class_labels": []}
    for label, wnid in enumerate(wnids):
        names = sorted(
            path.name
            for path in (official / "train" / wnid).iterdir()
            if path.suffix.lower() in (".jpeg", ".jpg")
        )
        if not names:
            raise InputError(
                f"{official / 'train' / wnid}: no .JPEG images of this class: unpack {wnid}.tar into it, or remove it"
            )
        lists["image_ids"] += [f"train/{wnid}/{name}" for name in names]
        lists["class_labels"] += [f"train/{wnid}/{name},{label}" for name in names]
    return lists, wnids


def _ilsvrc_test(official: Path, wnids: list[str]) -> tuple[Lists, str]:
    """(lists, what else is to be said). wnids: the classes; of a part of ILSVRC, the other classes' images are left out. [] for all."""
    truth = _development_kit(official)
    classes = wnids or sorted(set(truth.values()))
    label_of = {wnid: label for label, wnid in enumerate(classes)}
    found: dict[str, tuple[str, int]] = {}  # image id -> (stem, label)
    for path in sorted(
        (*(official / "val").glob("*.JPEG"), *(official / "val").glob("n*/*.JPEG")),
        key=lambda path: path.name,
    ):
        number = re.fullmatch(r"ILSVRC2012_val_(\d{8})", path.stem)
        if number is None or int(number[1]) not in truth:
            raise InputError(f"{path}: not an image of {GROUND_TRUTH}: remove it from val")
        wnid, inside = truth[int(number[1])], path.parent.name
        if inside not in ("val", wnid):
            raise InputError(f"{path}: in the folder of {inside}, the development kit says {wnid}")
        if wnid in label_of:
            found[path.relative_to(official).as_posix()] = path.stem, label_of[wnid]
    if not found:
        raise InputError(
            f"{official / 'val'}: no ILSVRC2012_val_*.JPEG: unpack ILSVRC2012_img_val.tar into it"
        )

    xml_of = {path.stem: path for path in _outside_of_images(official, "ILSVRC2012_val_*.xml")}
    if not xml_of:
        raise InputError(
            f"{official}: no validation boxes: unpack ILSVRC2012_bbox_val_v3.tgz into {official / 'bbox_val'}"
        )
    sizes = ordered_map(_image_size, (official / image for image in found), default_workers())
    lists: Lists = {name: [] for name in LIST_FILES}
    without = []
    for (image, (stem, label)), (width, height) in zip(found.items(), sizes):
        lists["image_ids"].append(image)
        lists["class_labels"].append(f"{image},{label}")
        lists["image_sizes"].append(f"{image},{width},{height}")
        boxes = _xml_boxes(xml_of[stem], width, height) if stem in xml_of else []
        lists["localization"] += [",".join(map(str, (image, *box))) for box in boxes]
        if not boxes:
            without.append(image)
    note = (
        f"; {len(without)} images without boxes count for classification alone: {', '.join(without[:5])}"
        if without
        else ""
    )
    return lists, note + (", ..." if len(without) > 5 else "")


def _development_kit(official: Path) -> dict[int, str]:
    """Number of each validation image, from 1 -> wnid."""
    path = next(_outside_of_images(official, GROUND_TRUTH), None)
    if path is None:
        raise InputError(f"{official}: no {GROUND_TRUTH} in it: unpack ILSVRC2012_devkit_t12.tar.gz into it")
    text, mat = path.with_name("ILSVRC2012_ids.txt"), path.with_name("meta.mat")
    wnid_of: dict[int, str] = {}
    if text.exists():
        wnid_of = {n: line.strip() for n, line in enumerate(read_lines(text), 1) if line.strip()}
        mat = text
    else:
        try:
            from scipy.io import loadmat  # slow to import, and needed here alone

            for row in loadmat(mat, squeeze_me=True)["synsets"]:
                wnid_of[int(row["ILSVRC2012_ID"])] = str(row["WNID"])
        except Exception as error:
            raise InputError(f"{mat}: no synsets can be read from it ({first_line(error)})") from error
    for number, wnid in wnid_of.items():
        if not re.fullmatch(r"n\d{8}", wnid):
            raise InputError(f"{mat}:{number}: {wnid[:40]!r} is no wnid as n01440764 is")
    truth = {}
    for n, line in enumerate(read_lines(path), 1):
        if not line.strip().isdigit() or int(line) not in wnid_of:
            raise InputError(f"{path}:{n}: {line[:40]!r} is no ILSVRC2012_ID of {mat}")
        truth[n] = wnid_of[int(line)]
    return truth


def _outside_of_images(official: Path, pattern: str) -> Iterator[Path]:
    """Files of this name below official, without walking through the million images of train."""
    yield from official.glob(pattern)
    for folder in sorted(
        path for path in official.iterdir() if path.is_dir() and path.name not in ("train", "val", "val2")
    ):
        yield from sorted(folder.rglob(pattern))


def _image_size(path: Path) -> tuple[int, int]:
    with open_image(path) as image:
        return image.size


def _xml_boxes(path: Path, width: int, height: int) -> list[tuple[int, int, int, int]]:
    """The boxes of all objects, both corners inside the image: the files have x1 = width now and then."""
    boxes = []
    try:
        for box in ElementTree.parse(path).getroot().iter("bndbox"):
            x0, y0, x1, y1 = (int(box.findtext(name)) for name in ("xmin", "ymin", "xmax", "ymax"))
            boxes.append((max(x0, 0), max(y0, 0), min(x1, width - 1), min(y1, height - 1)))
    except (OSError, ElementTree.ParseError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not a file of boxes ({first_line(error)})") from error
    for x0, y0, x1, y1 in boxes:
        if x1 < x0 or y1 < y0:
            raise InputError(f"{path}: box {x0},{y0},{x1},{y1} is outside its image of {width} x {height}")
    return boxes


def imagenet_v2_names(root: Path, ids: list[str]) -> list[str]:
    """The ids of the published train-fullsup (ImageNetV2: val2/<class>/<0 ... 9>.jpeg) as its files are named here, where that is certain.

    The folder may have the archive's name instead of val2, the files another suffix. Raises InputError for a later release, whose files are
    named by a hash: which is which cannot be told.
    """
    folders = [root / "val2", *sorted(root.glob("imagenetv2-*"))]
    folder = next((path for path in folders if path.is_dir()), None)
    if folder is None or not ids[0].startswith("val2/"):
        return ids
    first = folder / ids[0].removeprefix("val2/")
    suffix = next(
        (s for s in (".jpeg", ".jpg", ".JPEG", ".JPG", ".png") if first.with_suffix(s).exists()), None
    )
    if suffix is None:
        inside = next((path.name for path in sorted(first.parent.glob("*.*"))), "nothing")
        raise InputError(
            f"{first.parent}: holds {inside} where the published val list has {first.name}: another release of ImageNetV2, "
            "with renamed files; get the one with 0.jpeg to 9.jpeg, or hold val out of train with --val-per-class 2"
        )
    return [(folder.name + image.removeprefix("val2")).rpartition(".")[0] + suffix for image in ids]


NAMES = ("demo", "demo-pretrain", "CUB", "ILSVRC", "OpenImages")


def is_folder(dataset: str) -> bool:
    """Whether a --dataset is the path of a folder of one's own images: no name that has a preset, and a path or a folder here."""
    return dataset not in NAMES and ("/" in dataset or Path(dataset).is_dir())


SPLITS = ("train", "val", "test")


# Where under --data-root the image ids of a data set start; a data set not named here is a folder of its own name.
IMAGE_ROOTS = {"CUB": "CUB_200_2011/images"}


# Data sets that this package draws, on first use.
DRAWN = {"demo": draw_demo, "demo-pretrain": draw_pretraining}


CUBV2_ROOT = "CUBV2"  # the images of CUB's published train-fullsup, a download of its own


_HELD_OUT = " of its own; --val-per-class 2 holds val out of train instead"


VAL_HINTS = {
    "CUB": f"; CUBV2's images are a download{_HELD_OUT}",
    "ILSVRC": f"; ImageNetV2's images are a download{_HELD_OUT}",
}


def load_splits(
    dataset: str,
    data_root: Path,
    splits_dir: Path,
    names: tuple[str, ...],
    val_per_class: int | None = None,
    check_images: bool = True,
    lists_only: bool = False,
) -> tuple[dict[str, Split], dict[str, Any]]:
    """The named splits of a data set and a record of where they come from, for config.json and the log.

    dataset: a name, whose lists are in splits_dir, or the path of a folder (`read_folder`). demo is drawn, and the lists of CUB and ILSVRC are
    built from their official files, the first time. val is the published train-fullsup where its list is there; otherwise, or when
    val_per_class says so, that many images of each class are held out from train (default 2). check_images: that each file is there.
    lists_only: for work without images, such as the evaluation of score maps. Lists in splits_dir are used as they are where the data
    is not there; images are not checked. Not for a folder, whose images are its lists.
    record: "lists" and "val" in words, "num_classes", and "classes", their names, where the folders of the train images tell them.
    Raises InputError for what `read_split` names, missing images, and labels outside 0 ... K - 1, K the classes of train.
    """
    if is_folder(dataset):
        found, record = read_folder(Path(dataset), localization=check_images)
        if val_per_class is not None:
            pool = _join(found["train"], found["val"], f"{dataset} train")
            found["train"], found["val"] = hold_out(pool, val_per_class, dataset)
            record["val"] = (
                f"held out from train: {val_per_class} images a class, {len(found['val'])} in all, the same for every seed"
            )
        return {name: found[name] for name in names}, record

    root, folder, record = _prepare(dataset, data_root, splits_dir, names if lists_only else ())
    published_val = (folder / "val" / "image_ids.txt").exists()
    from_list = published_val and val_per_class is None
    found, num_classes = {}, None
    # The published lists of ILSVRC come without its train list: maps of its test images can be evaluated all the same.
    if "train" in names or ("val" in names and not from_list) or (folder / "train").is_dir():
        found["train"] = train = read_split(folder / "train", root, f"{dataset} train")
        num_classes = int(train.labels.max()) + 1
        absent = np.setdiff1d(np.arange(num_classes), train.labels)
        if len(absent):
            some = ", ".join(map(str, absent[:5])) + (", ..." if len(absent) > 5 else "")
            record["warning"] = (
                f"{len(absent)} of the {num_classes} classes have no image in {folder / 'train'}: {some}"
            )
        record["classes"] = class_names(train)
        if not from_list:
            per_class = 2 if val_per_class is None else val_per_class
            found["train"], found["val"] = hold_out(train, per_class, dataset)
            why = (
                "as --val-per-class says"
                if published_val
                else f"no published train-fullsup in {folder / 'val'}"
            )
            record["val"] = (
                f"held out from train: {per_class} images a class, {len(found['val'])} in all, the same for every seed ({why})"
            )
    if from_list:
        val_root = data_root / CUBV2_ROOT if dataset == "CUB" else root
        val = read_split(folder / "val", val_root, f"{dataset} val", num_classes)
        if dataset == "ILSVRC" and "val" in names:
            val = replace(val, ids=imagenet_v2_names(root, val.ids))
        found["val"] = replace(val, hint=VAL_HINTS.get(dataset, ""))
        record["val"] = f"the list of {folder / 'val'}: {len(val)} images"
    if "test" in names:
        found["test"] = read_split(folder / "test", root, f"{dataset} test", num_classes)
    record["num_classes"] = num_classes or max(int(split.labels.max()) + 1 for split in found.values())
    if check_images and not lists_only:
        for name in names:
            found[name].require_images()
    return {name: found[name] for name in names}, record


def _prepare(
    dataset: str, data_root: Path, splits_dir: Path, lists_suffice: tuple[str, ...] = ()
) -> tuple[Path, Path, dict[str, Any]]:
    """(where ids start, the folder of the lists, record) of a data set with a name; draws it or builds its lists where that is to be done.

    lists_suffice: splits whose lists are enough, so that nothing is drawn or built where they are there and the data is not.
    """
    root, folder = data_root / IMAGE_ROOTS.get(dataset, dataset), splits_dir / dataset
    record: dict[str, Any] = {}
    if lists_suffice and all((folder / name / "image_ids.txt").exists() for name in lists_suffice):
        # Official files, where they are, may be newer than the lists.
        if not (has_official_files(root.parent) if dataset == "CUB" else root.is_dir()):
            return root, folder, {"lists": describe_lists(dataset, folder)}
    if dataset not in DRAWN and not data_root.is_dir():
        raise InputError(f"--data-root {data_root}: no such folder")
    with alone(data_root):  # several runs may be the first at once
        if dataset in DRAWN:
            DRAWN[dataset](data_root, splits_dir)
        elif dataset == "CUB":
            record["lists"] = ensure_cub_lists(data_root / "CUB_200_2011", folder)
        elif dataset == "ILSVRC" and (root.is_dir() or folder.is_dir()):
            record["lists"] = ensure_ilsvrc_lists(root, folder)
    if not folder.is_dir():
        raise InputError(
            f"{folder}: no lists of {dataset}: pass --splits DIR, a folder that holds {dataset}/train, val and test"
        )
    if dataset == "OpenImages":
        record["lists"] = describe_lists(dataset, folder)
    return root, folder, record


def class_names(train: Split) -> list[str] | None:
    """The folder of each class's images, where every class has one of its own; None where folders do not tell classes."""
    folders = {
        (int(label), image.rpartition("/")[0].rpartition("/")[2])
        for label, image in zip(train.labels, train.ids)
    }
    names = [name for _, name in sorted(folders)]
    one_each = len(folders) == len({label for label, _ in folders}) == len(set(names))
    return names if one_each and len(names) > 1 else None


def hold_out(train: Split, per_class: int, dataset: str) -> tuple[Split, Split]:
    """(train without, val with) `per_class` images of each class that has more, drawn with a fixed seed."""
    if per_class < 1:
        raise InputError(
            f"--val-per-class {per_class}: at least 1 image a class is needed to choose epochs and thresholds"
        )
    rng = np.random.default_rng(0)
    held: list[int] = []
    for label in np.unique(train.labels):
        of_class = np.flatnonzero(train.labels == label)
        held += rng.permutation(of_class)[: min(per_class, len(of_class) - 1)].tolist()
    if not held:
        raise InputError(
            f"{train.name}: one image a class, none can be held out: give {dataset}/val a list of its own"
        )
    kept = np.setdiff1d(np.arange(len(train)), held).tolist()
    return train.take(kept, train.name), train.take(sorted(held), f"{dataset} val")


def _join(a: Split, b: Split, name: str) -> Split:
    """The images of both, in the order of their ids; of one folder."""
    order = sorted(range(len(a) + len(b)), key=(a.ids + b.ids).__getitem__)
    both = replace(
        a,
        ids=a.ids + b.ids,
        labels=np.concatenate([a.labels, b.labels]),
        sizes=None if a.sizes is None else np.concatenate([a.sizes, b.sizes]),
        boxes=a.boxes | {len(a) + i: boxes for i, boxes in b.boxes.items()},
    )
    return both.take(order, name)


FOLDER_SHARES = {"train": 0.7, "val": 0.15, "test": 0.15}


def read_folder(folder: Path, localization: bool = True) -> tuple[dict[str, Split], dict[str, Any]]:
    """Train, val and test of a folder with one sub-folder of images a class, and the record of `load_splits`.

    An image's split is decided by the SHA-256 of its path below the folder, so it stays the same whatever images come or go: about 70 % train,
    15 % val, 15 % test. A class in which a split would have none gives it the nearest one; at least 3 images a class are needed.
    Classes are the sub-folders in the order of their names. folder/localization.txt, lines `class/image.jpg,x0,y0,x1,y1`, holds boxes, of some images
    or all, in pixels of the upright image (EXIF orientation applied). localization: read it.
    Raises InputError for a folder without sub-folders, a class with too few images or with sub-folders, and as `read_split` does.
    """
    if not folder.is_dir():
        raise InputError(f"--dataset {folder}: neither the name of a data set nor a folder")
    classes = sorted(
        path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")
    )
    if len(classes) < 2:
        raise InputError(
            f"--dataset {folder}: {len(classes)} sub-folders where one for each class is expected, two at least"
        )
    ids: dict[str, list[str]] = {name: [] for name in FOLDER_SHARES}
    labels: dict[str, list[int]] = {name: [] for name in FOLDER_SHARES}
    for name in classes:
        nested = next(
            (
                path
                for path in sorted((folder / name).iterdir())
                if path.is_dir() and not path.name.startswith(".")
            ),
            None,
        )
        if nested is not None:
            raise InputError(
                f"{nested}: a folder inside of the class {name}: --dataset {folder} has one sub-folder of images for each class, none deeper"
            )
    for label, name in enumerate(classes):
        images = [f"{name}/{path.name}" for path in (folder / name).iterdir() if is_image(path)]
        for split, chosen in _by_hash(images, folder / name).items():
            ids[split] += chosen
            labels[split] += [label] * len(chosen)

    path = folder / "localization.txt"
    boxes: dict[str, tuple] = dict.fromkeys(ids, (None, {}, {}))
    if localization and path.exists():
        everything = [image for split in ids for image in ids[split]]
        sizes = np.array(list(ordered_map(partial(upright_size, folder), everything, default_workers())))
        of_all, masks = read_localization(path, {image: i for i, image in enumerate(everything)}, sizes)
        if masks:
            raise InputError(
                f"{path}: lines of a folder of one's own hold boxes: class/image.jpg,x0,y0,x1,y1"
            )
        start = 0
        for split, images in ids.items():
            end = start + len(images)
            boxes[split] = sizes[start:end], {i - start: b for i, b in of_all.items() if start <= i < end}, {}
            start = end
    splits = {
        split: Split(
            f"{folder} {split}",
            folder,
            ids[split],
            np.array(labels[split], dtype=np.int64),
            *boxes[split],
            upright=True,
        )
        for split in ids
    }
    counts = ", ".join(
        f"{split} {len(s)} images" + (f" ({len(s.boxes)} with boxes)" if path.exists() else "")
        for split, s in splits.items()
    )
    says = f"{folder}: {len(classes)} classes; {counts}, decided by the hash of each image's name"
    return splits, {
        "lists": says,
        "val": f"the {len(splits['val'])} images of {folder} that the hash assigns to it",
        "num_classes": len(classes),
        "classes": classes,
    }


def _by_hash(images: list[str], where: Path) -> dict[str, list[str]]:
    """{split: images, sorted} of one class."""
    if len(images) < len(FOLDER_SHARES):
        raise InputError(
            f"{where}: {len(images)} images: at least {len(FOLDER_SHARES)} a class are needed, one each for train, val and test"
        )
    place = {
        image: int.from_bytes(hashlib.sha256(image.encode("utf-8", "surrogateescape")).digest()[:8], "big")
        / 2**64
        for image in images
    }
    order = sorted(images, key=lambda image: (place[image], image))
    n, first, second = len(order), FOLDER_SHARES["train"], FOLDER_SHARES["train"] + FOLDER_SHARES["val"]
    val = min(
        max(sum(place[image] < first for image in order), 1), n - 2
    )  # where val begins, and where test does: no split without images
    test = min(max(sum(place[image] < second for image in order), val + 1), n - 1)
    return {"train": sorted(order[:val]), "val": sorted(order[val:test]), "test": sorted(order[test:])}


def upright_size(root: Path, image: str) -> tuple[int, int]:
    """(width, height) as the image is shown, its EXIF orientation applied."""
    with open_image(root / image) as opened:
        return opened.size[::-1] if turn_of(opened) in SIDEWAYS else opened.size


class _Inspection(NamedTuple):
    path: Path
    listed: tuple[int, int] | None  # width and height
    upright: bool


def _inspect(item: _Inspection) -> tuple[str, str] | None:
    """(kind, line) of what is wrong with an image or mask."""
    try:
        size = decode(item.path, upright=item.upright).size
    except InputError as error:
        return "damaged" if item.path.exists() else "missing", str(error)
    if item.listed is not None and size != item.listed:
        return (
            "of another size",
            f"{item.path}: {size[0]} x {size[1]} pixels where the list has {item.listed[0]} x {item.listed[1]}",
        )
    return None


def check(dataset: str, data_root: Path, splits_dir: Path, workers: int, shown: int = 20) -> dict[str, int]:
    """Opens every image and mask of every split that has a list: {"missing", "damaged", "of another size"} with their numbers.

    Prints a line for each of the first `shown` of a kind, and one for each split. Raises InputError for bad lists, as `load_splits` does.
    """
    if is_folder(dataset):
        names = SPLITS
    else:
        folder = _prepare(dataset, data_root, splits_dir)[1]
        names = tuple(name for name in SPLITS if (folder / name / "image_ids.txt").exists())
        names = tuple(
            name for name in SPLITS if name in names or (name == "val" and "train" in names)
        )  # held out from train
    splits, record = load_splits(dataset, data_root, splits_dir, names, check_images=False)
    if "lists" in record:
        print(f"lists: {record['lists']}")
    counts = dict.fromkeys(("missing", "damaged", "of another size"), 0)
    for split in splits.values():
        items = [
            _Inspection(
                split.path(i), None if split.sizes is None else tuple(split.sizes[i].tolist()), split.upright
            )
            for i in range(len(split))
        ]
        masks = dict.fromkeys(
            relative for of_image in split.masks.values() for paths in of_image for relative in paths
        )
        items += [_Inspection(split.root / relative, None, False) for relative in masks]
        before, last = sum(counts.values()), time.monotonic()
        for done, problem in enumerate(ordered_map(_inspect, items, workers), 1):
            if problem is not None:
                counts[problem[0]] += 1
                if counts[problem[0]] <= shown:
                    print(f"{problem[0]}: {problem[1]}", flush=True)
            if time.monotonic() - last > 1 or done == len(items):
                last = time.monotonic()
                sys.stderr.write(
                    f"\r{split.name}: {done} of {len(items)} files" + ("\n" if done == len(items) else "")
                )
                sys.stderr.flush()
        print(
            f"{split.name}: {len(split)} images"
            + (f", {len(masks)} masks" if masks else "")
            + f", {sum(counts.values()) - before} with a problem"
        )
    if is_folder(dataset) and not any(counts.values()):
        load_splits(dataset, data_root, splits_dir, SPLITS)  # its boxes too, which need readable images
    return counts


def main(argv: list[str] | None = None) -> None:
    parser = Parser(
        prog="python -m bridge_wsol.data",
        description="Opens every image of a data set: exit code 0 when all is well, 2 when not.",
    )
    parser.add_argument("command", choices=("check",))
    parser.add_argument("--dataset", required=True, help="a name, or a folder of your own images")
    parser.add_argument("--data-root", type=Path, default=Path("data"), metavar="DIR")
    parser.add_argument("--splits", type=Path, default=Path("data_splits"), metavar="DIR")
    parser.add_argument(
        "--workers", type=int, default=default_workers(), metavar="N", help="processes that open images"
    )
    args = parser.parse_args(argv)
    if args.workers < 0:
        parser.error("--workers must be at least 0")
    counts = check(args.dataset, args.data_root, args.splits, args.workers)
    if any(counts.values()):
        raise InputError(f"{args.dataset}: {', '.join(f'{n} {kind}' for kind, n in counts.items() if n)}")
    print(f"{args.dataset}: every file is there and can be read")


if __name__ == "__main__":
    with one_line_errors():
        main()
