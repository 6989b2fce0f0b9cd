"""The data sets: where their images are below --data-root, which lists they have, folders of one's own.

The lists are in --lists (default data_splits), in the format of data_splits/README.md: the published lists
of CUB, ILSVRC and OpenImages, those of CUB10 and Imagenette, and those of the demo once it is drawn.

    python -m bridge_wsol.datasets check --dataset CUB     opens every image and mask of every split
"""

from __future__ import annotations

import filecmp
import fnmatch
import hashlib
import os
import shutil
from bisect import bisect_left
from collections import defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image

from . import utils
from .data import Masks, Split, load_masks, open_rgb, read_localization, read_split, remark_lines
from .utils import InputError, first_line, user_path

SPLITS = ("train", "val", "test")
SHIPPED = Path(__file__).parents[1] / "data_splits"  # the lists of a clone


class DataSet(NamedTuple):
    """Where the images of a data set are."""

    images: str  # folder below --data-root; image ids are relative to it
    val_images: str = ""  # the same for the ids of val; "": images
    val_folder: str = ""  # folder whose absence means that val is held out from train; "": val has its list
    # Further folders for the images, tried in this order where `images` is absent. Where there are some, the
    # files of any of them may be smaller copies: their sizes are not compared with those of the lists.
    copies: tuple[str, ...] = ()


DATASETS = {
    "demo": DataSet("demo"),  # drawn: reproduce/demo.py
    "CUB10": DataSet("CUB_200_2011/images"),  # the first ten classes of CUB
    "CUB": DataSet("CUB_200_2011/images", "CUBV2", "CUBV2"),
    "ILSVRC": DataSet("ILSVRC", val_folder="ILSVRC/val2"),
    "OpenImages": DataSet("OpenImages"),
    # Ten classes of ImageNet; val and test are images of ILSVRC val, with its boxes.
    "Imagenette": DataSet("imagenette2", copies=("imagenette2-320", "imagenette2-160")),
}


def is_folder(dataset: str, lists: Path) -> bool:
    """Whether a --dataset is a folder of your own images: a path, or the only thing of that name."""
    named = dataset in DATASETS or (lists / dataset).is_dir()
    return "/" in dataset or dataset in (".", "..") or (not named and Path(dataset).is_dir())


def lists_folder(dataset: str, lists: str | Path) -> Path:
    """The folder of the lists: the clone's where `lists` is the default and holds none of this data set."""
    own = Path(lists)
    of_clone = own == Path(SHIPPED.name) and dataset != "demo" and not (own / dataset).is_dir()
    return SHIPPED if of_clone and (SHIPPED / dataset).is_dir() else own


def load_splits(
    dataset: str,
    data_root: str | Path,
    lists: str | Path,
    names: tuple[str, ...] = SPLITS,
    val_per_class: int | None = None,
    images: bool = True,
) -> tuple[dict[str, Split], dict[str, Any]]:
    """The named splits of a data set, and a record of them for config.json and the checkpoints.

    dataset: a name, whose lists are in lists/<name>, or the path of a folder (`read_folder`).
    val_per_class: images per class to hold out from train as val; 0: val is its own list. None: 2 where val
        has no list, or no folder with its images; else 0.
    images: whether image files are needed; a missing one is an InputError then. False: only the lists.

    The record has "val_per_class" as resolved, "num_classes", "classes" (their names, or None), "lists"
    ({name: `Split.fingerprint`}) and "notes" (lines to print). Raises InputError as `read_split` does, and
    for labels outside 0 ... K - 1, where K is the number of classes of train.
    """
    data_root, lists, notes = Path(data_root), lists_folder(dataset, lists), []
    if is_folder(dataset, lists):
        found, classes, notes = read_folder(Path(dataset), join_val=bool(val_per_class))
        val_per_class = (0 if "val" in found else 2) if val_per_class is None else val_per_class
        if not val_per_class and "val" in names and "val" not in found:
            raise InputError(f"{dataset}: no folder val/, and 0 images per class held out from train for val")
        num_classes = len(classes)
    else:
        kind = DATASETS.get(dataset, DataSet(dataset))
        if dataset == "demo" and (images or not (lists / "demo").is_dir()):
            from .reproduce.demo import draw_demo  # upwards, for this data set alone

            draw_demo(data_root, lists)
        if val_per_class is None:
            folder = data_root / (kind.val_folder or ".")
            own = (lists / dataset / "val" / "image_ids.txt").exists() and (folder.is_dir() or not images)
            val_per_class = 0 if own else 2
        needed = {"train" if name == "val" and val_per_class else name for name in names}
        found, num_classes, classes = _read_lists(dataset, kind, data_root, lists, needed)
        notes += _other_lists(dataset, lists)
    if val_per_class and {"train", "val"} & {*names}:
        found["train"], found["val"] = hold_out(found["train"], val_per_class)
    found = {name: found[name] for name in names}
    if "val" in names:
        origin = f", {val_per_class} per class held out from train" if val_per_class else ""
        notes.append(f"val: {len(found['val'])} images{origin}")
    if "train" in names and len(absent := np.setdiff1d(np.arange(num_classes), found["train"].labels)):
        notes.append(f"{len(absent)} of {num_classes} classes have no image in train: {absent[:5]}")
    if dataset == "ILSVRC":
        found = {name: _ilsvrc_files(split, lists) for name, split in found.items()}
    if images:
        for split in found.values():
            split.require_images()
        if any(split.smaller for split in found.values()):
            notes.append(f"{dataset}: sizes are not compared, images may be smaller copies")
    record = dict(notes=notes, classes=classes, val_per_class=val_per_class, num_classes=num_classes)
    return found, record | {"lists": {name: split.fingerprint() for name, split in found.items()}}


def load_split(
    dataset: str, name: str = "test", data_root: str | Path = "data", lists: str | Path = "data_splits"
) -> Split:
    """One split ("train", "val" or "test") from its lists alone: what the evaluation of score maps needs.

    Masks are read later, from data_root. Raises InputError as `load_splits` does.
    """
    return load_splits(dataset, data_root, lists, (name,), images=False)[0][name]


# ---------------------------------------------------------------------------------------------- named sets


def _read_lists(
    dataset: str, kind: DataSet, data_root: Path, lists: Path, names: set[str]
) -> tuple[dict[str, Split], int, list[str] | None]:
    """(splits, number of classes, their names if the folders of train tell them)."""
    folder, places = lists / dataset, [data_root / name for name in (kind.images, *kind.copies)]
    root = next((place for place in places if place.is_dir()), places[0])
    if not folder.is_dir():
        forms = "train, val and test there, or the path of a folder of images"
        raise InputError(f"{dataset}: no lists in {folder}: expected {forms}")
    found, num_classes, classes = {}, None, None
    listed = (folder / "train" / "image_ids.txt").exists()
    if dataset == "ILSVRC" and not listed:
        classes = _shipped(lists, "wnids.txt").split()
        num_classes = len(classes)
        if "train" in names:
            found["train"] = ilsvrc_train(root, classes)
    elif listed or "train" in names:  # also for the number of classes
        found["train"] = train = read_split(folder / "train", root, f"{dataset} train")
        num_classes, classes = int(train.labels.max()) + 1, class_names(train)
    for name in names - {"train"}:
        images = data_root / kind.val_images if name == "val" and kind.val_images else root
        found[name] = read_split(folder / name, images, f"{dataset} {name}", num_classes)
    found = {name: replace(split, smaller=bool(kind.copies)) for name, split in found.items()}
    return found, num_classes or max(int(s.labels.max()) + 1 for s in found.values()), classes


def _other_lists(dataset: str, lists: Path) -> list[str]:
    """A line if the lists are others than the shipped ones of this data set."""
    if dataset not in DATASETS or dataset == "demo" or lists.resolve() == SHIPPED:
        return []
    names = sorted(str(path.relative_to(SHIPPED)) for path in (SHIPPED / dataset).glob("*/*.txt"))
    _, other, _ = filecmp.cmpfiles(SHIPPED, lists, names, shallow=False)
    problem = "lists are not the published ones"
    return [f"{len(other)} {problem} ({lists / other[0]} first): results do not compare"] if other else []


def class_names(train: Split) -> list[str] | None:
    """The folder names of the classes, if each class has one folder and each folder one class; else None."""
    folders = {(int(k), f"/{image}".split("/")[-2]) for k, image in zip(train.labels, train.ids)}
    names = [name for _, name in sorted(folders)]
    one_each = len(folders) == len({label for label, _ in folders}) == len(set(names))
    return names if one_each and len(names) > 1 else None


def hold_out(train: Split, per_class: int) -> tuple[Split, Split]:
    """Moves `per_class` images of each class from train to val: (train, val).

    The images are drawn with a fixed seed. Each class keeps at least one image in train. Raises InputError if
    no class has two images.
    """
    rng, held = np.random.default_rng(0), []
    for label in np.unique(train.labels):
        of_class = np.flatnonzero(train.labels == label)
        held += rng.permutation(of_class)[: min(per_class, len(of_class) - 1)].tolist()
    if not held:
        raise InputError(f"{train.name}: one image per class, none can be held out for val: give val a list")
    kept = np.setdiff1d(np.arange(len(train)), held).tolist()
    return train.take(kept, train.name), train.take(sorted(held), train.name.replace("train", "val"))


def _shipped(lists: Path, name: str) -> str:
    """The text of a file that is in data_splits/ILSVRC of a clone, and perhaps in --lists, too.

    wnids.txt: the 1,000 wnids of ILSVRC, sorted; line k + 1 is class k of the published lists.
    """
    own = lists / "ILSVRC" / name
    try:
        return (own if own.exists() else SHIPPED / "ILSVRC" / name).read_text()
    except OSError as error:
        problem = f"cannot be read ({first_line(error)}): it is in data_splits of a clone"
        raise InputError(f"{own}: {problem}") from error


def ilsvrc_train(root: Path, wnids: list[str]) -> Split:
    """ILSVRC's train from its folders ILSVRC/train/<wnid>. Raises InputError for other folders."""
    train = root / "train"
    folders = {*fnmatch.filter(_listing(train)[0] if train.is_dir() else [], "n????????")}
    if differing := folders ^ {*wnids}:
        problem = f"{len(folders)} folders of classes where the 1,000 of ILSVRC 2012 are expected"
        example = f"{min(differing)} is {'extra' if min(differing) in folders else 'missing'}"
        raise InputError(f"{train}: {problem}: {example}")
    images = [_listing(train / wnid)[1] for wnid in wnids]
    ids = [f"train/{wnid}/{image}" for wnid, of_class in zip(wnids, images) for image in of_class]
    labels = np.repeat(np.arange(len(wnids)), [len(of_class) for of_class in images])
    utils.print_rank0(f"ILSVRC train: {len(ids)} images in {train}")
    return Split("ILSVRC train", root, ids, labels, from_disk=True)


def _ilsvrc_files(split: Split, lists: Path) -> Split:
    """The split with the files of this copy.

    val/ may be sorted into val/<wnid>/. ImageNetV2 in val2/ may have the names of its present release: lines
    `class/n.jpeg,<hash>.jpeg` of imagenet_v2_names.csv map the names of the published list to them.
    """
    first, wnids = split.ids[0], _shipped(lists, "wnids.txt").split()
    if first.startswith("val/") and (split.root / "val" / wnids[split.labels[0]]).is_dir():
        files = [image.replace("val/", f"val/{wnids[k]}/", 1) for image, k in zip(split.ids, split.labels)]
        return replace(split, files=files)
    if first.startswith("val2/") and (split.root / "val2").is_dir() and not split.path(0).exists():
        pairs = (line.split(",") for line in _shipped(lists, "val/imagenet_v2_names.csv").split())
        hashed = {f"val2/{old}": f"val2/{old.rpartition('/')[0]}/{new}" for old, new in pairs}
        if (split.root / hashed.get(first, "")).is_file():
            return replace(split, files=[hashed.get(image, image) for image in split.ids])
    return split


# --------------------------------------------------------------------------------------------- the downloads

CUB_URL = "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz?download=1"
CUB_MD5 = "97eceeb196236b17998738112f37df78"


def download(dataset: str, data_root: Path) -> None:
    """--download of train.py: CUB-200-2011 or Imagenette (320 pixels), unless a folder of it is there.

    Uses data_root/CUB_200_2011.tgz if it is there; the MD5 is checked. Raises InputError if a step fails, and
    for a data set that this program does not download.
    """
    if dataset not in ("CUB", "CUB10", "Imagenette"):
        problem = f"only CUB, CUB10 and Imagenette can be downloaded, not {dataset}"
        raise InputError(f"--download: {problem}: see docs/data.md")
    places = [place.split("/")[0] for place in (DATASETS[dataset].images, *DATASETS[dataset].copies)]
    if any((data_root / place).is_dir() for place in places):
        return
    from torchvision.datasets import Imagenette  # torchvision takes long to import
    from torchvision.datasets.utils import check_integrity, download_and_extract_archive

    archive, part = data_root / "CUB_200_2011.tgz", data_root / ".download.part"
    of_cub = dataset != "Imagenette"
    if of_cub and archive.exists() and not check_integrity(str(archive), CUB_MD5):
        raise InputError(f"{archive}: MD5 is not {CUB_MD5}: damaged, or another file: remove it")
    try:
        shutil.rmtree(part, ignore_errors=True)  # torchvision takes a half-unpacked folder for a whole one
        part.mkdir(parents=True)
        if of_cub:
            download_and_extract_archive(CUB_URL, str(data_root), str(part), archive.name, CUB_MD5)
        else:
            Imagenette(part, size="320px", download=True)
        name = "CUB_200_2011" if of_cub else "imagenette2-320"
        (part / name).rename(data_root / name)
        shutil.rmtree(part)
    except Exception as error:  # errors of the network, the archive and the disk
        problem = f"the download failed ({first_line(error)})"
        raise InputError(f"{dataset}: {problem}: see docs/data.md") from error


# -------------------------------------------------------------------------------- a folder of your own images

ALIASES = {"val": ("valid", "validation")}  # names of split folders that other tools write
VAL_FROM, TEST_FROM = 0.7, 0.85  # of the hashes, in [0, 1): train, then val, then test
# What Pillow can read: suffixes in lower case, without those of formats that it only recognizes.
READABLE = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
READABLE -= {".mpg", ".mpeg", ".h5", ".hdf", ".bufr", ".grib"}


def read_folder(folder: Path, join_val: bool = False) -> tuple[dict[str, Split], list[str], list[str]]:
    """(splits, names of the classes, lines to print) of a folder of images, in one of two layouts.

    <class>/<image>: the SHA-256 of an image's path below the folder sets its split: about 70 % train, 15 %
        val, 15 % test, so adding or removing images moves few others. But val and test get at least
        int(0.15 n) of the n images of a class, and one; a class needs at least 3 images.
    <split>/<class>/<image>, with train/, test/ and perhaps val/, valid/ or validation/ (torchvision's
        ImageFolder): as it is. The classes are those of train. join_val: val joins train, in the order of
        their paths.

    Classes are in the order of their names. folder/localization.txt, if it is there, has boxes of some or all
    images, lines `path below the folder,x0,y0,x1,y1` in pixels of the upright image (EXIF orientation
    applied). Raises InputError for other layouts, for a class with too few images, and as `read_split` does.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: neither the name of a data set nor a folder")
    ids, classes, unused = _layout(folder)
    everything = [image for chosen in ids.values() for image in chosen]
    index = {image: i for i, image in enumerate(everything)}
    label_of = {name: label for label, name in enumerate(classes)}
    labels = np.array([label_of[Path(image).parent.name] for image in everything], dtype=np.int64)
    whole = Split(str(folder), folder, everything, labels, upright=True, from_disk=True)
    if (path := folder / "localization.txt").exists():
        read = utils.imap(_upright_size, [folder / image for image in everything], utils.cores())
        read = utils.progress(read, f"reading the sizes of {folder}", len(everything))
        sizes = np.array([size for _, size in read])
        boxes, masks = read_localization(path, index, sizes)
        if masks:
            raise InputError(f"{path}: masks need a data set in the list format: write boxes here")
        whole = replace(whole, sizes=sizes, boxes=boxes)
    names = [name for name in SPLITS if name in ids]
    splits = {name: whole.take(map(index.get, ids[name]), f"{folder} {name}") for name in names}
    for name, split in splits.items():
        if not len(split):
            raise InputError(f"{folder / name}: no images")
    counts = [f"{name} {len(split)} ({len(split.boxes)} with boxes)" for name, split in splits.items()]
    notes = [f"{folder}: {len(classes)} classes; images: {', '.join(counts)}"]
    if unused:
        what = "files that Pillow does not read, images beside the classes, or folders beside the splits"
        notes.append(f"left out: {len(unused)} {what}, {min(unused)} first")
    if join_val and splits.pop("val", None):
        joined = sorted(ids["train"] + ids["val"])
        splits["train"] = whole.take(map(index.get, joined), splits["train"].name)
    return splits, classes, notes


def _layout(folder: Path) -> tuple[dict[str, list[str]], list[str], list[Path]]:
    """({split: ids of its images}, names of the classes, what is not used) of `read_folder`."""
    inside, loose, _ = _listing(folder)
    places = {alias: name for name in SPLITS for alias in (name, *ALIASES.get(name, ())) if alias in inside}
    by_split = all(name in places and _listing(folder / name)[0] for name in ("train", "test"))
    classes = _listing(folder / "train" if by_split else folder)[0]
    if len(classes) < 2:
        problem = f"{len(classes)} sub-folders where one per class is expected, two at least"
        raise InputError(f"{folder}: {problem}")
    ids, unused = defaultdict(list), [folder / file for file in loose]
    if by_split:
        unused += [folder / name for name in inside if name not in places]
        unused += [folder / place / file for place in places for file in _listing(folder / place)[1]]
    for place, split in places.items() if by_split else [("", "")]:
        for name in _listing(folder / place)[0]:
            where = Path(place, name)
            inside, files, others = _listing(folder / where)
            if name not in classes or inside:
                problem = "holds folders" if name in classes else "no class of train"
                raise InputError(f"{folder / where}: {problem}: expected one sub-folder per class")
            images = [str(where / file) for file in files]
            unused += [folder / where / file for file in others]
            for part, chosen in ({split: images} if by_split else _by_hash(images, folder / where)).items():
                ids[part] += chosen
    return ids, classes, unused


def _listing(folder: str | Path) -> tuple[list[str], list[str], list[str]]:
    """The names in a folder, sorted: (folders, images, other files); without a query for each of them."""
    names: tuple[list[str], list[str], list[str]] = [], [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.startswith("."):  # some systems write "._photo.jpg" beside the images
                readable = os.path.splitext(entry.name)[1].lower() in READABLE
                names[0 if entry.is_dir() else 1 if readable else 2].append(entry.name)
    return sorted(names[0]), sorted(names[1]), sorted(names[2])


def image_files(paths: list[Path]) -> list[Path]:
    """The files, and every image below the folders. Raises InputError for a folder without images."""
    files: list[Path] = []
    for path in paths:
        inside = [path]
        if path.is_dir():
            folders = [folder for folder, _, _ in os.walk(path, followlinks=True)]
            inside = sorted(Path(folder, name) for folder in folders for name in _listing(folder)[1])
        if not inside:
            raise InputError(f"--images {path}: no images in this folder")
        files += inside
    return files


def _by_hash(images: list[str], where: Path) -> dict[str, list[str]]:
    """{split: images, sorted} of one class."""
    n = len(images)
    if n < 3:
        raise InputError(f"{where}: {n} images: at least 3 per class are needed, one per split")

    def place(image: str) -> float:  # in [0, 1)
        digest = hashlib.sha256(image.encode("utf-8", "surrogateescape")).digest()
        return int.from_bytes(digest[:8], "big") / 2**64

    places, order = zip(*sorted((place(image), image) for image in images))
    least = max(3 * n // 20, 1)  # images of val, and of test
    # The positions in `order` at which val and test begin.
    val = min(max(bisect_left(places, VAL_FROM), 1), n - 2 * least)
    test = min(max(bisect_left(places, TEST_FROM), val + least), n - least)
    return {"train": sorted(order[:val]), "val": sorted(order[val:test]), "test": sorted(order[test:])}


def _upright_size(path: Path) -> tuple[int, int]:
    """Width and height as shown, from the file's header but for TIFF, which Pillow turns by itself."""
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
            if image.format != "TIFF":
                return image.size[::-1] if turned else image.size
        return open_rgb(path, upright=True).size
    except Exception as error:  # Pillow raises errors of many types
        raise InputError(f"{path}: not an image that can be read ({first_line(error)})") from error


# ------------------------------------------------------------------------------------------------------ check


def check(dataset: str, data_root: Path, lists: Path, workers: int) -> int:
    """Opens every image and mask of every split; prints the problems, a line each, and returns their number.

    Raises InputError for bad lists and missing images, as `load_splits` does.
    """
    splits, record = load_splits(dataset, data_root, lists)
    print("\n".join(record["notes"]))
    problems, of_train = 0, {}
    for name, split in splits.items():
        inspected = utils.imap(partial(_inspect, split), range(len(split)), workers)
        lines, remarks, leaks = [], [], []
        for index, (content, problem, of_masks) in utils.progress(inspected, split.name, len(split)):
            lines += [problem] if problem else []
            remarks += of_masks
            if name == "train":
                of_train[content] = split.path(index)
            elif content in of_train:
                leaks.append(f"{split.path(index)} is {of_train[content]}")
        problems += len(lines)
        lines.append(f"{split.name}: {len(split)} images, {len(lines)} with a problem")
        if leaks:
            lines.append(f"{split.name}: {len(leaks)} images equal one of train byte for byte: {leaks[0]}")
        print("\n".join(lines + remark_lines(split.name, remarks)), flush=True)
    return problems


def _inspect(split: Split, index: int) -> tuple[bytes, str | None, list[tuple[str, str]]]:
    """(hash of an image file, what is wrong with it or its masks, remarks on its masks)."""
    content = b""
    try:
        open_rgb(split.path(index), split.file_size(index), split.upright)
        content = hashlib.sha256(split.path(index).read_bytes()).digest()
        size = None if split.sizes is None else split.sizes[index]
        return content, None, load_masks(split.root, split.masks.get(index, Masks([], [])), 224, size)[2]
    except InputError as error:
        return content, str(error), []


def main(argv: list[str] | None = None) -> None:
    """The command line of `check`."""
    about = "Opens every image and mask of a data set. Exit code 0: all can be read; 2: some cannot."
    parser = utils.Parser(prog="python -m bridge_wsol.datasets", description=about)
    add = parser.add_argument
    add("command", choices=("check",))
    add("--dataset", type=os.path.expanduser, required=True, help="a name, or a folder of your own images")
    text = "folder of the data sets (default data)"
    add("--data-root", type=user_path, default="data", metavar="DIR", help=text)
    text = "folder of the lists (default data_splits)"
    add("--lists", type=user_path, default="data_splits", metavar="DIR", help=text)
    text = "processes that open images (default: the cores)"
    add("--workers", type=int, default=utils.cores(), metavar="N", help=text)
    add("--quiet", action="store_true", help="no progress line on stderr")
    args = parser.parse_args(argv)
    utils.set_quiet(args.quiet)
    if problems := check(args.dataset, args.data_root, args.lists, max(args.workers, 0)):
        raise InputError(f"{args.dataset}: {problems} files with a problem")
    print(f"{args.dataset}: every file is there and can be read")


if __name__ == "__main__":
    with utils.one_line_errors():
        main()
