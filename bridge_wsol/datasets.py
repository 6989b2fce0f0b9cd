"""The data sets and their lists: demo, CUB, ILSVRC, OpenImages, and a folder of your own images.

Lists are built once, into the folder of --splits, in the format of data_splits/README.md. Built lists are
compared with the counts and SHA-256 of the published lists in data_splits/checksums.json.

No lock is needed when several runs build the same lists: every file is renamed into place, and the file that
marks a list as complete is written last.

    python -m bridge_wsol.datasets check --dataset CUB     opens every image and mask of every split
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import shutil
import tarfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np

from .data import (
    LIST_FILES,
    SIDEWAYS,
    Lists,
    Split,
    decode,
    is_image,
    open_image,
    read_localization,
    read_split,
    turn_of,
    write_lists,
)
from .demo import draw_demo, draw_pretraining
from .processes import ordered_map
from .utils import (
    InputError,
    Parser,
    Progress,
    counted,
    default_workers,
    first_line,
    one_line_errors,
    write_json,
    writing,
)

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# ----------------------------------------------------------------------------------- what data sets there are

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class DataSet:
    """Where the images of a data set are, and what makes its lists, in <splits folder>/<name>."""

    images: str  # folder below --data-root; image ids are relative to it
    draw: Callable[[Path, Path], None] | None = None  # draws images and lists: (data root, splits folder)
    build: Callable[[Path, Path], str] | None = None  # builds lists: (data root, their folder) -> description
    source: str = ""  # a path below --data-root that is there if lists can be built; "": images
    val_images: str = ""  # folder of the images of the published val list; "": images
    val_ids: Callable[[Path, list[str]], list[str]] | None = None  # (folder of images, val ids) -> ids here
    val_hint: str = ""  # appended to the message about missing val images


DATASETS = {
    "demo": DataSet("demo", draw=draw_demo),
    "demo-pretrain": DataSet("demo-pretrain", draw=draw_pretraining),
    "CUB": DataSet(
        "CUB_200_2011/images",
        build=lambda data_root, lists: ensure_cub_lists(data_root / "CUB_200_2011", lists),
        source="CUB_200_2011/images.txt",
        val_images="CUBV2",
        val_hint="; CUBV2 is a separate download: without it, pass --val-per-class 2",
    ),
    # The first ten classes of CUB. val: five images per class of CUB's train. The repository has the lists.
    "CUB10": DataSet(
        "CUB_200_2011/images",
        build=lambda _, lists: f"{lists}: 10 of CUB's 200 classes; {NOT_COMPARABLE}",
    ),
    "ILSVRC": DataSet(
        "ILSVRC",
        build=lambda data_root, lists: ensure_ilsvrc_lists(data_root / "ILSVRC", lists),
        val_ids=lambda root, ids: imagenet_v2_names(root, ids),
        val_hint="; ImageNetV2 is a separate download: without it, pass --val-per-class 2",
    ),
    "OpenImages": DataSet("OpenImages", build=lambda data_root, lists: describe_lists("OpenImages", lists)),
}
NAMES = tuple(DATASETS)


def data_set(name: str) -> DataSet:
    """The entry of DATASETS. Any other name has its images in a folder of that name, and given lists."""
    return DATASETS.get(name, DataSet(name))


def is_folder(dataset: str) -> bool:
    """Whether a --dataset is a folder of your own images: not in DATASETS, but a path or a folder here."""
    return dataset not in NAMES and ("/" in dataset or Path(dataset).is_dir())


# ------------------------------------------------------------------------------------------------ load_splits


def load_splits(
    dataset: str,
    data_root: Path,
    splits_dir: Path,
    names: tuple[str, ...],
    val_per_class: int | None = None,
    check_images: bool = True,
    lists_only: bool = False,
) -> tuple[dict[str, Split], dict[str, Any]]:
    """The named splits of a data set, and a record of their origin for config.json and the log.

    dataset: a name, whose lists are in splits_dir/<name>, or the path of a folder (`read_folder`). The first
        call draws demo, or builds the lists of CUB and ILSVRC from their official files.
    names: of "train", "val" and "test".
    val_per_class: images per class to hold out from train as val. None: val is the published train-fullsup
        if splits_dir has its list; otherwise 2 images per class are held out.
    check_images: raise InputError if an image file is missing.
    lists_only: for work without images, such as the evaluation of score maps. Images are not checked. If the
        data is not there, the lists in splits_dir are used as they are. No effect for a folder.

    The record has "num_classes", "digests" ({name: `Split.digest`}) and, depending on the data set: "lists"
    and "val" (text), "classes" (their names, if the folders of the train images tell them), "warning".
    Raises InputError as `read_split` does, for missing images, and for labels outside 0 ... K - 1, where K is
    the number of classes of train.
    """
    if is_folder(dataset):
        found, record = _folder_splits(dataset, val_per_class, boxes=check_images)
    else:
        found, record = _listed_splits(dataset, data_root, splits_dir, names, val_per_class, lists_only)
        if check_images and not lists_only:
            for name in names:
                found[name].require_images()
    record["digests"] = {name: found[name].digest() for name in names}
    return {name: found[name] for name in names}, record


def load_split(
    dataset: str, name: str = "test", data_root: str | Path = "data", splits_dir: str | Path = "data_splits"
) -> Split:
    """One split from its lists alone, without its images: what the evaluation of score maps needs.

    name: "train", "val" or "test". Raises InputError as `load_splits` with lists_only does. Masks are
    read later, from data_root.
    """
    return load_splits(dataset, Path(data_root), Path(splits_dir), (name,), lists_only=True)[0][name]


def _folder_splits(
    dataset: str, val_per_class: int | None, boxes: bool
) -> tuple[dict[str, Split], dict[str, Any]]:
    found, record = read_folder(Path(dataset), localization=boxes)
    if val_per_class is not None:
        pool = _join(found["train"], found["val"], f"{dataset} train")
        found["train"], found["val"] = hold_out(pool, val_per_class, dataset)
        record["val"] = _held_out(val_per_class, found["val"])
    return found, record


def _listed_splits(
    dataset: str,
    data_root: Path,
    splits_dir: Path,
    names: tuple[str, ...],
    val_per_class: int | None,
    lists_only: bool,
) -> tuple[dict[str, Split], dict[str, Any]]:
    kind = data_set(dataset)
    root, folder, record = _prepare(dataset, data_root, splits_dir, names if lists_only else ())
    published_val = (folder / "val" / "image_ids.txt").exists()
    from_list = published_val and val_per_class is None
    found, num_classes = {}, None
    # The published lists of ILSVRC have no train: test maps can be evaluated without it.
    if "train" in names or ("val" in names and not from_list) or (folder / "train").is_dir():
        found["train"] = train = read_split(folder / "train", root, f"{dataset} train")
        num_classes = int(train.labels.max()) + 1
        record |= _about_train(train, num_classes, folder / "train")
        if not from_list:
            per_class = 2 if val_per_class is None else val_per_class
            found["train"], found["val"] = hold_out(train, per_class, dataset)
            no_list = f"no published train-fullsup in {folder / 'val'}"
            why = "as --val-per-class asks" if published_val else no_list
            record["val"] = f"{_held_out(per_class, found['val'])} ({why})"
    if from_list:
        val_root = data_root / (kind.val_images or kind.images)
        val = read_split(folder / "val", val_root, f"{dataset} val", num_classes)
        if kind.val_ids and "val" in names:
            val = replace(val, ids=kind.val_ids(root, val.ids))
        found["val"] = replace(val, hint=kind.val_hint)
        record["val"] = f"the list of {folder / 'val'}: {len(val)} images"
    if "test" in names:
        found["test"] = read_split(folder / "test", root, f"{dataset} test", num_classes)
    record["num_classes"] = num_classes or max(int(split.labels.max()) + 1 for split in found.values())
    return found, record


def _prepare(
    dataset: str, data_root: Path, splits_dir: Path, lists_suffice: tuple[str, ...] = ()
) -> tuple[Path, Path, dict[str, Any]]:
    """Draws the data set or builds its lists if needed: (where ids start, folder of the lists, record).

    lists_suffice: the splits whose lists are enough. If they are there and the data is not, nothing is built.
    """
    kind = data_set(dataset)
    root, folder = data_root / kind.images, splits_dir / dataset
    # If the official files are there, they may be newer than the lists.
    if lists_suffice and not (data_root / (kind.source or kind.images)).exists():
        if all((folder / name / "image_ids.txt").exists() for name in lists_suffice):
            return root, folder, {"lists": describe_lists(dataset, folder)}
    if kind.draw:
        kind.draw(data_root, splits_dir)
    elif not data_root.is_dir():
        lists = f", and {folder} has no lists of {', '.join(lists_suffice)}" if lists_suffice else ""
        raise InputError(f"--data-root {data_root}: no such folder{lists}")
    record = {"lists": kind.build(data_root, folder)} if kind.build else {}
    if not folder.is_dir():
        raise InputError(
            f"{folder}: no lists of {dataset}: "
            f"pass --splits DIR, a folder that holds {dataset}/train, val and test"
            + ("" if dataset in NAMES else f"; or start where {dataset} is a folder of images")
        )
    return root, folder, record


def _about_train(train: Split, num_classes: int, folder: Path) -> dict[str, Any]:
    """What the record has on train: a warning about classes without images, and the names of the classes."""
    about: dict[str, Any] = {}
    absent = np.setdiff1d(np.arange(num_classes), train.labels)
    if len(absent):
        some = ", ".join(map(str, absent[:5])) + (", ..." if len(absent) > 5 else "")
        about["warning"] = f"{len(absent)} of the {num_classes} classes have no image in {folder}: {some}"
    return about | {"classes": class_names(train)}


def class_names(train: Split) -> list[str] | None:
    """The folder names of the classes, if each class has one folder and each folder one class; else None."""
    folders = {
        (int(label), image.rpartition("/")[0].rpartition("/")[2])
        for label, image in zip(train.labels, train.ids)
    }
    names = [name for _, name in sorted(folders)]
    one_each = len(folders) == len({label for label, _ in folders}) == len(set(names))
    return names if one_each and len(names) > 1 else None


def hold_out(train: Split, per_class: int, dataset: str) -> tuple[Split, Split]:
    """Moves `per_class` images of each class from train to val: (train, val).

    The images are drawn with a fixed seed. Each class keeps at least one image in train. Raises InputError if
    per_class is below 1, or if no class has two images.
    """
    if per_class < 1:
        raise InputError(f"--val-per-class {per_class}: val needs images: pass at least 1")
    rng = np.random.default_rng(0)
    held: list[int] = []
    for label in np.unique(train.labels):
        of_class = np.flatnonzero(train.labels == label)
        held += rng.permutation(of_class)[: min(per_class, len(of_class) - 1)].tolist()
    if not held:
        raise InputError(
            f"{train.name}: one image per class, none can be held out: "
            f"write a list {dataset}/val in the folder of --splits"
        )
    kept = np.setdiff1d(np.arange(len(train)), held).tolist()
    return train.take(kept, train.name), train.take(sorted(held), f"{dataset} val")


def _held_out(per_class: int, val: Split) -> str:
    return f"held out from train: {per_class} images per class, {len(val)} in all, the same for every seed"


def _join(a: Split, b: Split, name: str) -> Split:
    """The images of two splits of one folder, in the order of their ids."""
    order = sorted(range(len(a) + len(b)), key=(a.ids + b.ids).__getitem__)
    both = replace(
        a,
        ids=a.ids + b.ids,
        labels=np.concatenate([a.labels, b.labels]),
        sizes=None if a.sizes is None else np.concatenate([a.sizes, b.sizes]),
        boxes=a.boxes | {len(a) + i: boxes for i, boxes in b.boxes.items()},
    )
    return both.take(order, name)


# -------------------------------------------------------------------------------------------- published lists


def differing_files(dataset: str, split: str, lists: Lists) -> list[str] | None:
    """The files that differ from the published list, in any order of lines; None if there is no such list."""
    published = _published().get(f"{dataset}/{split}")
    if published is None:
        return None

    def digest(name: str) -> str:
        return hashlib.sha256("\n".join(sorted(lists.get(name, []))).encode()).hexdigest()

    return [name for name in published if digest(name) != published[name]["sha256_of_sorted_lines"]]


def describe_lists(dataset: str, folder: Path) -> str:
    """One line on lists that were not built here: for each split, whether it is the published list."""
    parts = []
    for split in SPLITS:
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
        if differ is None:
            parts.append(f"{split} has no published list")
        elif not differ:
            parts.append(f"{split} as published")
        else:
            n, expected = len(lists["image_ids"]), published["image_ids"]["lines"]
            what = f"{', '.join(differ)} not as published"
            if n != expected:
                what = f"{n} images where the published list has {expected}"
            parts.append(f"{split} {what}: {NOT_COMPARABLE}")
    return f"the lists found in {folder}: {'; '.join(parts)}"


NOT_COMPARABLE = "results are not comparable with published ones"


def _published() -> dict[str, dict[str, dict]]:
    path = Path(__file__).parents[1] / "data_splits" / "checksums.json"
    return json.loads(path.read_text(encoding="utf-8"))


def read_lines(path: Path) -> list[str]:
    """The lines of a text file. Raises InputError if it cannot be read or is not text."""
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise InputError(f"{path}: cannot be read ({reason})") from error


# ------------------------------------------------------------------------------------------ CUB: the download

CUB_URL = "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz?download=1"
CUB_MD5 = "97eceeb196236b17998738112f37df78"


def download(dataset: str, data_root: Path) -> None:
    """--download of train.py. Raises InputError for a data set that this program does not download."""
    if data_set(dataset).images != data_set("CUB").images:
        raise InputError(f"--download: only CUB can be downloaded, not {dataset}: see docs/data.md")
    download_cub(data_root)


def download_cub(data_root: Path) -> None:
    """Downloads CUB-200-2011, verifies its MD5 and unpacks it, unless data_root/CUB_200_2011 is there.

    Resumes an interrupted download. Uses data_root/CUB_200_2011.tgz, if it is there, instead of a download.
    data_root/CUB_200_2011 appears when it is complete. Raises InputError if a step fails.
    """
    target, archive = data_root / "CUB_200_2011", data_root / "CUB_200_2011.tgz"
    with writing(data_root):
        data_root.mkdir(parents=True, exist_ok=True)
    with _one_at_a_time(data_root):
        if target.is_dir():
            return
        own = archive.exists()
        if not own:
            archive = archive.with_name(f"{archive.name}.part")
            _download(CUB_URL, archive)
        _verify(archive, own)
        _unpack(archive, target)
        if not own:
            archive.unlink()


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """A second download waits for the first one: both append to the same file, whose name a resume must find.

    The lock ends with its process, also if that is killed, and leaves no file.
    """
    if fcntl is None:
        yield
        return
    with writing(folder):
        handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a network file system without locks
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting for another download into {folder}", flush=True)
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _download(url: str, part: Path) -> None:
    """Downloads url to `part`. Resumes if the server allows it; retries as long as new bytes arrive."""
    while True:
        have = part.stat().st_size if part.exists() else 0
        total, problem = _download_once(url, part, have)
        got = part.stat().st_size if part.exists() else 0
        if problem is None and (total is None or got == total):
            return
        if got <= have:  # nothing new
            problem = problem or "the connection was closed"
            kept = f"; {got} of {total or 'unknown'} bytes are kept: run the same command again to resume"
            raise InputError(f"{url}: the download was interrupted ({problem}){kept if got else ''}")


def _download_once(url: str, part: Path, have: int) -> tuple[int | None, str | None]:
    """One connection: (size of the whole file if the server gives it, what went wrong)."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    total = None
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            begins = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
            resumed = response.status == 206 and begins is not None and int(begins[1]) == have
            done = have if resumed else 0
            length = response.headers.get("Content-Length", "")
            total = done + int(length) if length.isdigit() else None
            print(f"downloading {url} to {part}" + (f", resuming at byte {done}" if done else ""), flush=True)
            with writing(part):
                file = part.open("ab" if resumed else "wb")
            with file, Progress("downloading", (total or 0) >> 20, "MiB", done >> 20) as progress:
                while block := response.read(1 << 16):
                    with writing(part):
                        file.write(block)
                    done += len(block)
                    if total:
                        progress.show(done >> 20)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # `part` is complete, or no beginning of this file: the checksum decides
            return None, None
        return total, f"the server answers {error.code} {error.reason}"
    except (OSError, http.client.HTTPException) as error:
        return total, first_line(getattr(error, "reason", None) or error)
    return total, None


def _verify(archive: Path, own: bool) -> None:
    """Raises InputError if the MD5 is wrong. Removes the file then, unless it is the user's own."""
    with writing(archive), archive.open("rb") as file:
        digest = hashlib.md5(usedforsecurity=False)
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != CUB_MD5:
        if not own:
            archive.unlink()
        way_out = "remove it" if own else "it was removed: try again, or download it by hand"
        raise InputError(
            f"{archive}: MD5 {digest.hexdigest()} where CUB_200_2011.tgz has {CUB_MD5}: "
            f"damaged or another file: {way_out}"
        )


def _unpack(archive: Path, target: Path) -> None:
    print(f"unpacking {archive} into {target}", flush=True)
    unpacked = target.with_name(f".{target.name}.part")
    try:
        shutil.rmtree(unpacked, ignore_errors=True)
        with writing(target):
            with tarfile.open(archive) as tar:
                tar.extractall(unpacked, filter="data")
            (unpacked / target.name).rename(target)
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise InputError(f"{archive}: cannot be unpacked ({first_line(error)})") from error
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)


# --------------------------------------------------------------------------------------------- CUB: the lists

CUB_FILES = {  # what follows the image's number on each line: in words, and each field as a pattern
    "images.txt": ("its path", [r"\S+"]),
    "image_class_labels.txt": ("its class (a whole number from 1)", [r"[1-9]\d{0,8}"]),
    "train_test_split.txt": ("1 (train) or 0 (test)", [r"[01]"]),
    "bounding_boxes.txt": ("x, y, width and height in pixels", [r"\d{1,9}(?:\.\d*)?"] * 4),
}
CUB_IMAGES = 11788


def ensure_cub_lists(official: Path, folder: Path) -> str:
    """Builds CUB's train and test lists from the official files if needed; returns one line on them.

    The lists of a full CUB must equal the published ones (checksums.json: count and SHA-256). A part of CUB
    is reported as a subset. Lists that were built from other official files are built again. Lists that were
    not built here, of train or test, stay as they are: they have no built_from.json.
    """
    stamp = folder / "built_from.json"
    given = any((folder / split / "image_ids.txt").exists() for split in ("train", "test"))
    if given and not stamp.exists():
        return describe_lists("CUB", folder)
    sources = _cub_sources(official)
    if stamp.exists():
        with suppress(ValueError, AttributeError, KeyError):  # a damaged stamp: build the lists again
            built = json.loads(stamp.read_text(encoding="utf-8"))
            if built.get("sources") == sources:
                return str(built["says"])

    lists, classes = _cub_lists(official)
    images = sum(len(lists[split]["image_ids"]) for split in lists)
    if images == CUB_IMAGES:
        for split, files in lists.items():
            for name in differing_files("CUB", split, files):
                raise InputError(
                    f"{official}: {split}/{name}.txt built from its files differs from the published list: "
                    "the copy is damaged, download it again"
                )
        says = f"built from {official}, equal to the published lists ({images} images, {classes} classes)"
    else:
        says = (
            f"built from {official}: a subset, {classes} of 200 classes, {images} of {CUB_IMAGES} images; "
            f"{NOT_COMPARABLE}"
        )
    # An empty stamp first: if this process is killed now, the next run builds the lists again.
    write_json(stamp, {})
    for split, files in lists.items():
        write_lists(folder / split, files)
    write_json(stamp, {"says": says, "sources": sources})
    return says


def _cub_sources(official: Path) -> dict[str, str]:
    """{official file: its SHA-256}. Raises InputError if one is missing."""
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
    return sources


def _cub_lists(official: Path) -> tuple[dict[str, Lists], int]:
    """{split: {file name: lines}} and the number of classes.

    Boxes: int(x), int(y), int(x + w), int(y + h), clipped to the image.
    """
    images = _cub_table(official / "images.txt")
    labels, in_train, boxes = (_cub_table(official / name, images) for name in list(CUB_FILES)[1:])
    lists: dict[str, Lists] = {split: {name: [] for name in LIST_FILES} for split in ("train", "test")}
    for number, (image,) in counted(images.items(), "reading the sizes of CUB", len(images)):
        x, y, w, h = map(float, boxes[number])
        width, height = _image_size(official / "images" / image)
        if x >= width or y >= height:
            path, n = official / "bounding_boxes.txt", list(boxes).index(number) + 1  # one row per line
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
    """{image number: the fields after it}, in the order of the lines.

    Raises InputError for a line that does not match CUB_FILES, a number that is repeated, a number that is
    not in images (None: any number), and a number of images without a line.
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


def _image_size(path: Path) -> tuple[int, int]:
    """(width, height) in pixels, as stored."""
    with open_image(path) as image:
        return image.size


# ----------------------------------------------------------------------------------------------------- ILSVRC

ILSVRC_CLASSES, ILSVRC_VAL_IMAGES = 1000, 50000
GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"


def ensure_ilsvrc_lists(official: Path, folder: Path) -> str:
    """Builds the lists of ILSVRC that `folder` lacks from the official files; returns one line on all lists.

    `official` holds train/<wnid>/*.JPEG, and val/*.JPEG or val/<wnid>/*.JPEG. The official val becomes test,
    as in the literature. For test, two more parts are needed anywhere else below `official`: the development
    kit (ILSVRC2012_validation_ground_truth.txt beside meta.mat), and the validation boxes
    ILSVRC2012_val_*.xml. Line n of a file ILSVRC2012_ids.txt, if there is one, is the wnid of ILSVRC2012_ID
    n, and replaces meta.mat. Classes are the sorted wnids. Raises InputError if a part is missing or
    contradicts another one.
    """
    said = []
    wnids: list[str] = []
    train_list, test_list = (folder / name / "image_ids.txt" for name in ("train", "test"))
    if not train_list.exists() and (official / "train").is_dir():
        lists, wnids = _ilsvrc_train(official)
        write_lists(folder / "train", lists)
        said.append(
            f"train built from {official / 'train'}: {len(wnids)} classes, {len(lists['image_ids'])} images"
        )
        if len(wnids) != ILSVRC_CLASSES:
            said[-1] += f", a subset of the {ILSVRC_CLASSES} classes: {NOT_COMPARABLE}"
    if not test_list.exists() and (official / "val").is_dir():
        if not wnids and train_list.exists():
            wnids = sorted({line.split("/")[-2] for line in read_lines(train_list) if line.count("/") > 1})
        lists, note = _ilsvrc_test(official, wnids)
        write_lists(folder / "test", lists)
        differ = differing_files("ILSVRC", "test", lists)
        same = f"{', '.join(differ)} not as published" if differ else "equal to the published list"
        said.append(
            f"test built from {official / 'val'}: "
            f"{len(lists['image_ids'])} of {ILSVRC_VAL_IMAGES} images ({same}){note}"
        )
    return "; ".join(said) or describe_lists("ILSVRC", folder)


def _ilsvrc_train(official: Path) -> tuple[Lists, list[str]]:
    """(lists, sorted wnids) from the folders of train."""
    train = official / "train"
    folders = (path for path in train.iterdir() if path.is_dir())
    wnids = sorted(path.name for path in folders if re.fullmatch(r"n\d{8}", path.name))
    if not wnids:
        raise InputError(
            f"{train}: no folders such as n01440764: "
            "unpack ILSVRC2012_img_train.tar and the archive of each class in it"
        )
    lists: Lists = {"image_ids": [], "class_labels": []}
    for label, wnid in enumerate(wnids):
        files = (path for path in (train / wnid).iterdir() if path.suffix.lower() in (".jpeg", ".jpg"))
        names = sorted(path.name for path in files)
        if not names:
            raise InputError(
                f"{train / wnid}: no .JPEG images of this class: "
                f"unpack {wnid}.tar into it, or remove the folder"
            )
        lists["image_ids"] += [f"train/{wnid}/{name}" for name in names]
        lists["class_labels"] += [f"train/{wnid}/{name},{label}" for name in names]
    return lists, wnids


def _ilsvrc_test(official: Path, wnids: list[str]) -> tuple[Lists, str]:
    """(lists, a note on images without boxes). wnids: the classes, [] for all; others are skipped."""
    found = _ilsvrc_val_images(official, wnids)
    xml_of = {path.stem: path for path in _outside_of_images(official, "ILSVRC2012_val_*.xml")}
    if not xml_of:
        raise InputError(
            f"{official}: no validation boxes: unpack ILSVRC2012_bbox_val_v3.tgz into {official / 'bbox_val'}"
        )
    sizes = ordered_map(_image_size, (official / image for image in found), default_workers())
    sizes = counted(sizes, "reading the sizes of ILSVRC val", len(found))
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
    if not without:
        return lists, ""
    some = ", ".join(without[:5]) + (", ..." if len(without) > 5 else "")
    return lists, f"; {len(without)} images without boxes count for classification alone: {some}"


def _ilsvrc_val_images(official: Path, wnids: list[str]) -> dict[str, tuple[str, int]]:
    """{image id: (stem of the file, label)} of the official val, in the order of the file names."""
    truth = _development_kit(official)
    classes = wnids or sorted(set(truth.values()))
    label_of = {wnid: label for label, wnid in enumerate(classes)}
    val = official / "val"
    found: dict[str, tuple[str, int]] = {}
    for path in sorted((*val.glob("*.JPEG"), *val.glob("n*/*.JPEG")), key=lambda path: path.name):
        number = re.fullmatch(r"ILSVRC2012_val_(\d{8})", path.stem)
        if number is None or int(number[1]) not in truth:
            raise InputError(f"{path}: not an image of {GROUND_TRUTH}: remove it from val")
        wnid, inside = truth[int(number[1])], path.parent.name
        if inside not in ("val", wnid):
            raise InputError(
                f"{path}: is in the folder of {inside}, but its class in the development kit is {wnid}"
            )
        if wnid in label_of:
            found[path.relative_to(official).as_posix()] = path.stem, label_of[wnid]
    if not found:
        raise InputError(f"{val}: no ILSVRC2012_val_*.JPEG: unpack ILSVRC2012_img_val.tar into it")
    return found


def _development_kit(official: Path) -> dict[int, str]:
    """{number of each validation image, from 1: wnid}."""
    path = next(_outside_of_images(official, GROUND_TRUTH), None)
    if path is None:
        raise InputError(f"{official}: no {GROUND_TRUTH} in it: unpack ILSVRC2012_devkit_t12.tar.gz into it")
    ids, wnid_of = _ilsvrc_ids(path.parent)
    truth = {}
    for n, line in enumerate(read_lines(path), 1):
        if not line.strip().isdigit() or int(line) not in wnid_of:
            raise InputError(f"{path}:{n}: {line[:40]!r} is no ILSVRC2012_ID of {ids}")
        truth[n] = wnid_of[int(line)]
    return truth


def _ilsvrc_ids(folder: Path) -> tuple[Path, dict[int, str]]:
    """(the file of the ids, {ILSVRC2012_ID: wnid})."""
    path = folder / "ILSVRC2012_ids.txt"
    if path.exists():
        wnid_of = {n: line.strip() for n, line in enumerate(read_lines(path), 1) if line.strip()}
    else:
        path = folder / "meta.mat"
        try:
            from scipy.io import loadmat  # slow to import, and needed only here

            synsets = loadmat(path, squeeze_me=True)["synsets"]
            wnid_of = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
        except Exception as error:
            raise InputError(f"{path}: no synsets can be read from it ({first_line(error)})") from error
    for number, wnid in wnid_of.items():
        if not re.fullmatch(r"n\d{8}", wnid):
            raise InputError(f"{path}:{number}: {wnid[:40]!r} is no wnid such as n01440764")
    return path, wnid_of


def _outside_of_images(official: Path, pattern: str) -> Iterator[Path]:
    """Files of this name below official. Skips the image folders: train has a million files."""
    yield from official.glob(pattern)
    for folder in sorted(path for path in official.iterdir() if path.is_dir()):
        if folder.name not in ("train", "val", "val2"):
            yield from sorted(folder.rglob(pattern))


def _xml_boxes(path: Path, width: int, height: int) -> list[tuple[int, int, int, int]]:
    """The boxes of all objects, both corners inside. Clips them: some files have x1 = width."""
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
    """The ids of the published val list with the file names that ImageNetV2 has here.

    The list has val2/<class>/<0 ... 9>.jpeg. The folder may have the archive's name instead of val2, and the
    files another suffix. Raises InputError for a later release that names its files by a hash: it does not
    tell which image is which.
    """
    folders = [root / "val2", *sorted(root.glob("imagenetv2-*"))]
    folder = next((path for path in folders if path.is_dir()), None)
    if folder is None or not ids[0].startswith("val2/"):
        return ids
    first = folder / ids[0].removeprefix("val2/")
    suffixes = (".jpeg", ".jpg", ".JPEG", ".JPG", ".png")
    suffix = next((s for s in suffixes if first.with_suffix(s).exists()), None)
    if suffix is None:
        inside = next((path.name for path in sorted(first.parent.glob("*.*"))), "nothing")
        raise InputError(
            f"{first.parent}: holds {inside} where the published val list has {first.name}: "
            "another release of ImageNetV2, with renamed files: "
            "get the one with 0.jpeg to 9.jpeg, or pass --val-per-class 2"
        )
    return [(folder.name + image.removeprefix("val2")).rpartition(".")[0] + suffix for image in ids]


# -------------------------------------------------------------------------------- a folder of your own images

FOLDER_SHARES = {"train": 0.7, "val": 0.15, "test": 0.15}


def read_folder(folder: Path, localization: bool = True) -> tuple[dict[str, Split], dict[str, Any]]:
    """({split name: Split}, record of `load_splits`) of a folder with one sub-folder of images per class.

    Classes are the sub-folders in the order of their names. The SHA-256 of an image's path below the folder
    sets its split: about 70 % train, 15 % val, 15 % test. If a split would have no image of a class, it gets
    the nearest one; a class needs at least 3 images. So adding or removing images moves no others, except in
    classes so small that a split would be empty.

    localization: read folder/localization.txt if it is there. Its lines `class/image.jpg,x0,y0,x1,y1` hold
        boxes of some or all images, in pixels of the upright image (EXIF orientation applied).

    Raises InputError for a folder without sub-folders, for a class with too few images or with sub-folders,
    and as `read_split` does.
    """
    classes = _folder_classes(folder)
    ids: dict[str, list[str]] = {name: [] for name in FOLDER_SHARES}
    labels: dict[str, list[int]] = {name: [] for name in FOLDER_SHARES}
    for label, name in enumerate(classes):
        images = [f"{name}/{path.name}" for path in (folder / name).iterdir() if is_image(path)]
        for split, chosen in _by_hash(images, folder / name).items():
            ids[split] += chosen
            labels[split] += [label] * len(chosen)
    path = folder / "localization.txt"
    boxes: dict[str, tuple] = dict.fromkeys(ids, (None, {}, {}))
    if localization and path.exists():
        boxes = _folder_boxes(folder, path, ids)
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
    return splits, {
        "lists": f"{folder}: {len(classes)} classes; {counts}, assigned by the hash of each image's path",
        "val": f"the {len(splits['val'])} images of {folder} that the hash assigns to val",
        "num_classes": len(classes),
        "classes": classes,
    }


def _folder_classes(folder: Path) -> list[str]:
    """The sub-folders in the order of their names. Raises InputError if they are not one per class."""
    if not folder.is_dir():
        raise InputError(f"--dataset {folder}: neither the name of a data set nor a folder")

    def inside(path: Path) -> list[Path]:
        return sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))

    classes = [path.name for path in inside(folder)]
    if len(classes) < 2:
        raise InputError(
            f"--dataset {folder}: {len(classes)} sub-folders where one for each class is expected, "
            "two at least"
        )
    for name in classes:
        for nested in inside(folder / name):
            raise InputError(
                f"{nested}: a folder inside of the class {name}: move its images up: "
                f"--dataset {folder} has one sub-folder for each class, none deeper"
            )
    return classes


def _by_hash(images: list[str], where: Path) -> dict[str, list[str]]:
    """{split: images, sorted} of one class."""
    if len(images) < len(FOLDER_SHARES):
        raise InputError(
            f"{where}: {len(images)} images: at least {len(FOLDER_SHARES)} per class are needed, "
            "one each for train, val and test"
        )

    def place(image: str) -> float:  # in [0, 1)
        digest = hashlib.sha256(image.encode("utf-8", "surrogateescape")).digest()
        return int.from_bytes(digest[:8], "big") / 2**64

    places = {image: place(image) for image in images}
    order = sorted(images, key=lambda image: (places[image], image))
    n, first, second = len(order), FOLDER_SHARES["train"], FOLDER_SHARES["train"] + FOLDER_SHARES["val"]
    # The positions in `order` at which val and test begin, so that no split is empty.
    val = min(max(sum(places[image] < first for image in order), 1), n - 2)
    test = min(max(sum(places[image] < second for image in order), val + 1), n - 1)
    return {"train": sorted(order[:val]), "val": sorted(order[val:test]), "test": sorted(order[test:])}


def _folder_boxes(folder: Path, path: Path, ids: dict[str, list[str]]) -> dict[str, tuple]:
    """{split: (sizes, boxes, no masks)} from localization.txt, as `Split` takes them."""
    everything = [image for split in ids for image in ids[split]]
    read = ordered_map(partial(upright_size, folder), everything, default_workers())
    sizes = np.array(list(counted(read, f"reading the sizes of {folder}", len(everything))))
    of_all, masks = read_localization(path, {image: i for i, image in enumerate(everything)}, sizes)
    if masks:
        raise InputError(f"{path}: masks are not supported here: write boxes, class/image.jpg,x0,y0,x1,y1")
    boxes, start = {}, 0
    for split, images in ids.items():
        end = start + len(images)
        boxes[split] = sizes[start:end], {i - start: b for i, b in of_all.items() if start <= i < end}, {}
        start = end
    return boxes


def upright_size(root: Path, image: str) -> tuple[int, int]:
    """(width, height) in pixels, with the EXIF orientation applied."""
    with open_image(root / image) as opened:
        return opened.size[::-1] if turn_of(opened) in SIDEWAYS else opened.size


# ------------------------------------------------------------------------------------------------------ check

PROBLEMS = ("missing", "damaged", "of another size")


def check(dataset: str, data_root: Path, splits_dir: Path, workers: int, shown: int = 20) -> dict[str, int]:
    """Opens every image and mask of every split that has a list; returns the number of each of PROBLEMS.

    Prints a line for each of the first `shown` problems of a kind, and one for each split. Raises InputError
    for bad lists, as `load_splits` does.
    """
    names = SPLITS
    if not is_folder(dataset):
        folder = _prepare(dataset, data_root, splits_dir)[1]
        has = {name: (folder / name / "image_ids.txt").exists() for name in SPLITS}
        has["val"] |= has["train"]  # held out from train
        names = tuple(name for name in SPLITS if has[name])
    splits, record = load_splits(dataset, data_root, splits_dir, names, check_images=False)
    if "lists" in record:
        print(f"lists: {record['lists']}")
    counts = dict.fromkeys(PROBLEMS, 0)
    for split in splits.values():
        items, masks = _files(split)
        before = sum(counts.values())
        for problem in counted(ordered_map(_inspect, items, workers), split.name, len(items), "files"):
            if problem is not None:
                counts[problem[0]] += 1
                if counts[problem[0]] <= shown:
                    print(f"{problem[0]}: {problem[1]}", flush=True)
        print(
            f"{split.name}: {len(split)} images"
            + (f", {masks} masks" if masks else "")
            + f", {sum(counts.values()) - before} with a problem"
        )
    if is_folder(dataset) and not any(counts.values()):
        load_splits(dataset, data_root, splits_dir, SPLITS)  # reads the boxes, too: they need readable images
    return counts


class _Inspection(NamedTuple):
    path: Path
    listed: tuple[int, int] | None  # width and height
    upright: bool


def _files(split: Split) -> tuple[list[_Inspection], int]:
    """(every image and mask of a split, the number of masks)."""
    sizes = [None] * len(split) if split.sizes is None else [tuple(size) for size in split.sizes.tolist()]
    images = [_Inspection(split.path(i), sizes[i], split.upright) for i in range(len(split))]
    masks = {path for of_image in split.masks.values() for paths in of_image for path in paths}
    return [*images, *(_Inspection(split.root / path, None, False) for path in sorted(masks))], len(masks)


def _inspect(item: _Inspection) -> tuple[str, str] | None:
    """(one of PROBLEMS, a line on it) for an image or mask; None if it is good."""
    try:
        width, height = decode(item.path, upright=item.upright).size
    except InputError as error:
        return "damaged" if item.path.exists() else "missing", str(error)
    if item.listed is not None and (width, height) != item.listed:
        listed = f"{item.listed[0]} x {item.listed[1]}"
        return "of another size", f"{item.path}: {width} x {height} pixels where the list has {listed}"
    return None


def main(argv: list[str] | None = None) -> None:
    """The command line of `check`."""
    parser = Parser(
        prog="python -m bridge_wsol.datasets",
        description="Opens every image and mask of a data set. Exit code 0: all can be read; 2: some cannot.",
    )
    parser.add_argument("command", choices=("check",))
    parser.add_argument("--dataset", required=True, help="a name, or a folder of your own images")
    parser.add_argument("--data-root", type=Path, default=Path("data"), metavar="DIR", help="default: data")
    parser.add_argument(
        "--splits", type=Path, default=Path("data_splits"), metavar="DIR", help="lists; default: data_splits"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=default_workers(),
        metavar="N",
        help="processes that open images (default: CPU cores, at most 8)",
    )
    parser.add_argument("--quiet", action="store_true", help="print no progress")
    args = parser.parse_args(argv)
    if args.workers < 0:
        parser.error("--workers must be at least 0")
    Progress.quiet = args.quiet
    counts = check(args.dataset, args.data_root, args.splits, args.workers)
    if any(counts.values()):
        raise InputError(f"{args.dataset}: {', '.join(f'{n} {kind}' for kind, n in counts.items() if n)}")
    print(f"{args.dataset}: every file is there and can be read")


if __name__ == "__main__":
    with one_line_errors():
        main()
