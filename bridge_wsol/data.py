"""Splits and images: the field's text format, CUB's lists from its official files, loaders that are the same for any number of workers.

A split is a folder `<DATASET>/<train|val|test>/` of text files (data_splits/README.md has the format). Train is the field's
train-weaksup, val its train-fullsup: the images on which epochs and thresholds are chosen.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Iterable, Iterator, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from .demo import draw_demo, draw_pretraining
from .utils import InputError, ignore_interrupts, ordered_map, replacing, write_text

SPLITS = ("train", "val", "test")

# Where under --data-root the image ids of a data set start; a data set not named here is a folder of its own name.
IMAGE_ROOTS = {"CUB": "CUB_200_2011/images"}
# Data sets that this package draws, on first use.
DRAWN = {"demo": draw_demo, "demo-pretrain": draw_pretraining}
CUBV2_ROOT = "CUBV2"  # the images of CUB's published train-fullsup, a download of its own

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Masks(NamedTuple):
    """Paths of an image's masks, relative to the image root: one per instance, and the region to ignore."""

    instances: list[str]
    ignore: list[str]


@dataclass(frozen=True)
class Split:
    """One split in memory. Lists run parallel: image i has ids[i], labels[i], sizes[i], boxes[i], masks[i]."""

    name: str
    root: Path  # ids are relative to it
    ids: list[str]
    labels: np.ndarray  # N int64, from 0
    sizes: np.ndarray | None = None  # N x 2 int64, width and height in pixels; needed with boxes only
    boxes: dict[int, np.ndarray] = field(default_factory=dict)  # index -> G x 4 int64, pixels of the image
    masks: dict[int, Masks] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    def path(self, index: int) -> Path:
        return self.root / self.ids[index]

    def take(self, indices: Iterable[int], name: str) -> Split:
        """The split of these images, in this order."""
        indices = list(indices)
        return replace(
            self,
            name=name,
            ids=[self.ids[i] for i in indices],
            labels=self.labels[indices],
            sizes=None if self.sizes is None else self.sizes[indices],
            boxes={new: self.boxes[old] for new, old in enumerate(indices) if old in self.boxes},
            masks={new: self.masks[old] for new, old in enumerate(indices) if old in self.masks},
        )

    def require_images(self) -> None:
        """Raises InputError when files are missing, before hours are spent: names the first and counts them."""
        missing = [i for i in range(len(self)) if not self.path(i).is_file()]
        if missing:
            raise InputError(
                f"{self.path(missing[0])}: no such image ({len(missing)} of the {len(self)} of {self.name} are missing): "
                "check --data-root, or --splits if the list is not this data's"
            )


# ---------------------------------------------------------------------------------------------------------------- reading


def read_split(folder: Path, root: Path, name: str, num_classes: int | None = None) -> Split:
    """Reads image_ids.txt, class_labels.txt and, where present, image_sizes.txt and localization.txt of one folder.

    Raises InputError naming file and line for a wrong number of fields, a value that is no number, an image that is not in
    image_ids.txt or there twice, an image without label, a label below 0 or not below num_classes, a box with x1 < x0 or outside
    its image.
    """
    ids = [image for _, (image,) in _lines(folder / "image_ids.txt", (1,))]
    index = {image: i for i, image in enumerate(ids)}
    if not ids:
        raise InputError(f"{folder / 'image_ids.txt'}: empty")
    if len(index) < len(ids):
        seen: set[str] = set()
        line = next(n for n, image in enumerate(ids, 1) if image in seen or seen.add(image))
        raise InputError(f"{folder / 'image_ids.txt'}:{line}: {ids[line - 1]} was listed before")
    for n, image in enumerate(ids, 1):
        if image.startswith("/") or ".." in image.split("/"):
            raise InputError(f"{folder / 'image_ids.txt'}:{n}: {image} leaves the data root")

    labels = np.full(len(ids), -1, dtype=np.int64)
    path = folder / "class_labels.txt"
    for n, (image, label) in _lines(path, (2,)):
        labels[_index_of(image, index, path, n)] = value = _integers([label], path, n)[0]
        if value < 0 or (num_classes is not None and value >= num_classes):
            top = "" if num_classes is None else f" to {num_classes - 1}, the classes of train"
            raise InputError(f"{path}:{n}: label {value} is out of range: labels run from 0{top}")
    _require_all(labels >= 0, ids, path, "label")

    sizes = None
    path = folder / "image_sizes.txt"
    if path.exists() and path.stat().st_size:
        sizes = np.zeros((len(ids), 2), dtype=np.int64)
        for n, (image, *size) in _lines(path, (3,)):
            sizes[_index_of(image, index, path, n)] = size = _integers(size, path, n)
            if min(size) < 1:
                raise InputError(f"{path}:{n}: width and height must be positive, got {size[0]} x {size[1]}")
        _require_all(sizes[:, 0] > 0, ids, path, "size")

    boxes: dict[int, list[list[int]]] = {}
    masks: dict[int, Masks] = {}
    path = folder / "localization.txt"
    if path.exists():
        for n, (image, *values) in _lines(path, (3, 5)):
            i = _index_of(image, index, path, n)
            if len(values) == 2:
                paths = masks.setdefault(i, Masks([], []))
                paths.instances.append(values[0])
                paths.ignore.extend(values[1:] if values[1] else [])
                continue
            x0, y0, x1, y1 = box = _integers(values, path, n)
            if x1 < x0 or y1 < y0 or x0 < 0 or y0 < 0:
                raise InputError(f"{path}:{n}: box {x0},{y0},{x1},{y1} needs 0 <= x0 <= x1 and 0 <= y0 <= y1")
            if sizes is None:
                raise InputError(f"{path}:{n}: boxes need {folder / 'image_sizes.txt'}, which is absent or empty")
            if x1 >= sizes[i, 0] or y1 >= sizes[i, 1]:
                raise InputError(f"{path}:{n}: box {x0},{y0},{x1},{y1} leaves its image of {sizes[i, 0]} x {sizes[i, 1]}")
            boxes.setdefault(i, []).append(box)
    return Split(name, root, ids, labels, sizes, {i: np.array(b) for i, b in boxes.items()}, masks)


def _lines(path: Path, fields: tuple[int, ...]) -> Iterator[tuple[int, list[str]]]:
    """(line number from 1, comma-separated fields) of each line that is not empty; the number of fields is checked."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise InputError(f"{path}: cannot be read ({reason}); data_splits/README.md has the format") from error
    for n, line in enumerate(text.splitlines(), 1):
        if line.strip():
            values = line.strip().split(",") if fields != (1,) else [line.strip()]
            if len(values) not in fields:
                expected = " or ".join(map(str, fields))
                raise InputError(f"{path}:{n}: {len(values)} comma-separated fields where {expected} are expected: {line.strip()[:80]}")
            yield n, values


def _integers(values: list[str], path: Path, n: int) -> list[int]:
    try:
        return [int(value) for value in values]
    except ValueError:
        raise InputError(f"{path}:{n}: {','.join(values)[:80]} should be whole numbers") from None


def _index_of(image: str, index: dict[str, int], path: Path, n: int) -> int:
    if image not in index:
        raise InputError(f"{path}:{n}: {image[:80]} is not in {path.with_name('image_ids.txt')}")
    return index[image]


def _require_all(present: np.ndarray, ids: list[str], path: Path, what: str) -> None:
    if not present.all():
        raise InputError(f"{path}: no {what} for {ids[int(np.argmin(present))]}")


# ------------------------------------------------------------------------------------------------------------- data sets


def load_splits(
    dataset: str, data_root: Path, splits_dir: Path, names: tuple[str, ...], val_per_class: int | None = None
) -> tuple[dict[str, Split], dict[str, Any]]:
    """The named splits of a data set and a record of where they come from, for config.json and the log.

    demo is drawn, and CUB's lists are built from its official files, the first time. val is the published train-fullsup where its list is there;
    otherwise, or when val_per_class says so, that many images of each class are held out from train (default 2).
    Raises InputError for what `read_split` names, missing images, and labels outside 0 ... K - 1, K the classes of train.
    """
    root = data_root / IMAGE_ROOTS.get(dataset, dataset)
    if dataset in DRAWN:
        DRAWN[dataset](data_root, splits_dir)
    if not data_root.is_dir():
        raise InputError(f"--data-root {data_root}: no such folder")
    folder, record = splits_dir / dataset, {}
    if dataset == "CUB":
        record["lists"] = ensure_cub_lists(data_root / "CUB_200_2011", folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no lists of {dataset}: pass --splits DIR, a folder that holds {dataset}/train, val and test")

    published_val = (folder / "val" / "image_ids.txt").exists()
    from_list = published_val and val_per_class is None
    found, num_classes = {}, None
    # The published lists of ILSVRC come without its train list: maps of its test images can be evaluated all the same.
    if "train" in names or not from_list or (folder / "train").is_dir():
        found["train"] = train = read_split(folder / "train", root, f"{dataset} train")
        num_classes = int(train.labels.max()) + 1
        absent = np.setdiff1d(np.arange(num_classes), train.labels)
        if len(absent):
            some = ", ".join(map(str, absent[:5])) + (", ..." if len(absent) > 5 else "")
            record["warning"] = f"{len(absent)} of the {num_classes} classes have no image in {folder / 'train'}: {some}"
        if not from_list:
            per_class = 2 if val_per_class is None else val_per_class
            found["train"], found["val"] = hold_out(train, per_class, dataset)
            why = "as --val-per-class says" if published_val else f"no published train-fullsup in {folder / 'val'}"
            record["val"] = f"held out from train: {per_class} images a class, {len(found['val'])} in all, the same for every seed ({why})"
    if from_list:
        val_root = data_root / CUBV2_ROOT if dataset == "CUB" else root
        found["val"] = read_split(folder / "val", val_root, f"{dataset} val", num_classes)
        record["val"] = f"the list of {folder / 'val'}: {len(found['val'])} images"
    if "test" in names:
        found["test"] = read_split(folder / "test", root, f"{dataset} test", num_classes)
    record["num_classes"] = num_classes or max(int(split.labels.max()) + 1 for split in found.values())
    for name in names:
        found[name].require_images()
    return {name: found[name] for name in names}, record


def hold_out(train: Split, per_class: int, dataset: str) -> tuple[Split, Split]:
    """(train without, val with) `per_class` images of each class that has more, drawn with a fixed seed."""
    if per_class < 1:
        raise InputError(f"--val-per-class {per_class}: at least 1 image a class is needed to choose epochs and thresholds")
    rng = np.random.default_rng(0)
    held: list[int] = []
    for label in np.unique(train.labels):
        of_class = np.flatnonzero(train.labels == label)
        held += rng.permutation(of_class)[: min(per_class, len(of_class) - 1)].tolist()
    if not held:
        raise InputError(f"{train.name}: one image a class, none can be held out: give {dataset}/val a list of its own")
    kept = np.setdiff1d(np.arange(len(train)), held).tolist()
    return train.take(kept, train.name), train.take(sorted(held), f"{dataset} val")


CUB_FILES = ("images.txt", "image_class_labels.txt", "train_test_split.txt", "bounding_boxes.txt")
CUB_IMAGES = 11788


def ensure_cub_lists(official: Path, folder: Path) -> str:
    """Builds CUB's train and test lists from the official files, once; returns one line that says which CUB this is.

    A full CUB must give the published lists (checksums.json: count and SHA-256); a part of it is called one. Lists that were built from
    other official files than those now in the data root are built anew; lists that came from elsewhere are left alone.
    """
    stamp = folder / "built_from.json"
    if (folder / "train" / "image_ids.txt").exists() and not stamp.exists():
        return f"the lists found in {folder}"
    if not official.is_dir():
        raise InputError(f"{official}: no such folder: unpack CUB_200_2011.tgz into --data-root")
    sources = {}
    for name in CUB_FILES:
        if not (official / name).is_file():
            raise InputError(f"{official / name}: no such file: {official} is not CUB-200-2011 as distributed")
        sources[name] = hashlib.sha256((official / name).read_bytes()).hexdigest()
    if stamp.exists():
        built = json.loads(stamp.read_text(encoding="utf-8"))
        if built.get("sources") == sources:
            return built["says"]

    lists, classes = _cub_lists(official)
    images = sum(len(lists[split]["image_ids"]) for split in lists)
    if images == CUB_IMAGES:
        _verify_lists("CUB", lists)
        says = f"built from {official}, equal to the published lists ({images} images, {classes} classes)"
    else:
        says = f"built from {official}: a subset, {classes} of 200 classes, {images} of {CUB_IMAGES} images; results do not compare with published ones"
    for split, files in lists.items():
        for name, lines in files.items():
            write_text(folder / split / f"{name}.txt", "".join(f"{line}\n" for line in lines))
    write_text(stamp, json.dumps({"says": says, "sources": sources}, indent=1) + "\n")
    return says


def _cub_lists(official: Path) -> tuple[dict[str, dict[str, list[str]]], int]:
    """{split: {file name: lines}} and the number of classes. Boxes: int(x), int(y), int(x + w), int(y + h), clipped to the image."""
    table = {name: dict(_cub_table(official / name)) for name in CUB_FILES}
    lists: dict[str, dict[str, list[str]]] = {
        split: {name: [] for name in ("image_ids", "class_labels", "image_sizes", "localization")} for split in ("train", "test")
    }
    for key, (image,) in table["images.txt"].items():
        try:
            label = int(table["image_class_labels.txt"][key][0]) - 1
            split = "train" if int(table["train_test_split.txt"][key][0]) else "test"
            x, y, w, h = map(float, table["bounding_boxes.txt"][key])
        except (KeyError, ValueError, IndexError):
            raise InputError(f"{official}: image {key} ({image}) has no usable label, split or box in the official files") from None
        width, height = open_image(official / "images" / image).size
        box = int(x), int(y), min(int(x + w), width - 1), min(int(y + h), height - 1)
        files = lists[split]
        files["image_ids"].append(image)
        files["class_labels"].append(f"{image},{label}")
        files["image_sizes"].append(f"{image},{width},{height}")
        files["localization"].append(",".join(map(str, (image, *box))))
    return lists, len({row[0] for row in table["image_class_labels.txt"].values()})


def _cub_table(path: Path) -> Iterator[tuple[str, list[str]]]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text: not CUB-200-2011 as distributed") from None
    for n, line in enumerate(text.splitlines(), 1):
        key, *values = line.split() or [""]
        if not values:
            raise InputError(f"{path}:{n}: an image number and its values are expected: {line[:80]!r}")
        yield key, values


def _verify_lists(dataset: str, lists: dict[str, dict[str, list[str]]]) -> None:
    published = json.loads((Path(__file__).parents[1] / "data_splits" / "checksums.json").read_text(encoding="utf-8"))
    for split, files in lists.items():
        for name, lines in files.items():
            digest = hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()
            if digest != published[f"{dataset}/{split}"][name]["sha256_of_sorted_lines"]:
                raise InputError(f"{dataset}: {split}/{name}.txt built from the official files differs from the published list: the copy is damaged")


# ---------------------------------------------------------------------------------------------------------------- images


def open_image(path: Path) -> Image.Image:
    """Opens an image without decoding it. Raises InputError where there is none."""
    try:
        return Image.open(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such image") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: not an image that can be read ({str(error).splitlines()[0][:120]})") from error


def load_rgb(path: Path, size: int, listed: np.ndarray | None = None) -> Image.Image:
    """Decodes an image of any mode and resizes it straight to size x size (bilinear, antialiased as torchvision's on PIL images).

    Raises InputError for an image that cannot be read, or is not of the listed (width, height), which its boxes were drawn on.
    """
    with open_image(path) as image:
        if listed is not None and image.size != tuple(listed):
            raise InputError(
                f"{path}: {image.size[0]} x {image.size[1]} pixels where the list has {listed[0]} x {listed[1]}: its boxes would not fit"
            )
        try:
            return image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
        except (OSError, ValueError, SyntaxError, IndexError) as error:
            raise InputError(f"{path}: truncated or damaged image ({str(error).splitlines()[0][:120]})") from error


def load_masks(root: Path, masks: Masks, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(mask, ignore) of an image, size x size bool: the union of its instances, and what its ignore image adds to it."""
    mask, ignore = np.zeros((2, size, size), dtype=bool)
    for paths, region in zip(masks, (mask, ignore)):
        for relative in paths:
            with open_image(root / relative) as image:
                try:
                    pixels = np.asarray(image.convert("L"))
                except (OSError, ValueError, SyntaxError) as error:
                    raise InputError(f"{root / relative}: truncated or damaged mask ({error})") from error
            # Nearest neighbour as the field's evaluator has it: the pixel at floor(x * width / size).
            rows, columns = (np.arange(size) * n // size for n in pixels.shape)
            region |= pixels[rows[:, None], columns] > 0.5
    return mask, ignore & ~mask


def load_score_map(folder: Path, image: str) -> np.ndarray:
    """DIR/<image id>.npy or DIR/<image id without extension>.npy -> H x W float32.

    Raises InputError for a map that is missing, not a 2-D array of numbers, empty, or holds NaN or values outside [0, 1].
    """
    candidates = [folder / f"{image}.npy", (folder / image).with_suffix(".npy")]
    path = next((p for p in candidates if p.is_file()), None)
    if path is None:
        raise InputError(f"{candidates[0]}: no score map for {image} (nor {candidates[1].name})")
    try:
        score_map = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: not a .npy array ({str(error).splitlines()[0][:120]})") from error
    if not isinstance(score_map, np.ndarray) or score_map.ndim != 2 or not score_map.size:
        raise InputError(f"{path}: a score map is a 2-D array, this has shape {getattr(score_map, 'shape', 'of an archive')}")
    if score_map.dtype.kind not in "fiub":
        raise InputError(f"{path}: a score map holds floats in [0, 1], this holds {score_map.dtype}")
    if np.isnan(score_map).any():
        raise InputError(f"{path}: holds NaN")
    if score_map.min() < 0 or score_map.max() > 1:
        raise InputError(f"{path}: values in [{score_map.min():.4g}, {score_map.max():.4g}] where [0, 1] is expected")
    return score_map.astype(np.float32)


def image_files(paths: list[Path]) -> list[Path]:
    """The files themselves, and every image below the folders, in order. Raises InputError for a folder without any."""
    files: list[Path] = []
    for path in paths:
        inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES) if path.is_dir() else [path]
        if not inside:
            raise InputError(f"--images {path}: no images in this folder")
        files += inside
    return files


class TrainImages(Dataset):
    """Training images: resize to resize_size x resize_size, random crop of image_size, random horizontal flip.

    Indexed by (epoch, index), the sampler's items: the crop is drawn from (seed, epoch, index) alone, so it is the same for any
    number of workers, in any order, and after a resume. Items: uint8 3 x image_size x image_size, label.
    """

    def __init__(self, split: Split, resize_size: int, image_size: int, seed: int, pixels: np.ndarray | None = None):
        self.split, self.resize_size, self.image_size, self.seed, self.pixels = split, resize_size, image_size, seed, pixels

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = item
        rng = np.random.default_rng([self.seed, epoch, index])
        x, y = rng.integers(0, self.resize_size - self.image_size, size=2, endpoint=True)
        image = np.asarray(load_rgb(self.split.path(index), self.resize_size)) if self.pixels is None else self.pixels[index]
        image = image[y : y + self.image_size, x : x + self.image_size]
        return _to_tensor(image[:, ::-1] if rng.random() < 0.5 else image), int(self.split.labels[index])


def resized_pixels(split: Split, size: int, folder: Path, workers: int) -> np.ndarray:
    """All images of a split as load_rgb gives them, N x size x size x 3 uint8, in one memory-mapped file that is made the first time.

    The file's name has a hash of the list, the sizes and the times of the images' files: other images get another file.
    Raises InputError for an image that cannot be read, or where the file cannot be written (full CUB at 256: 1.2 GB).
    """
    files = [split.path(i) for i in range(len(split))]
    states = [(image, stat.st_size, stat.st_mtime_ns) for image, stat in zip(split.ids, (file.stat() for file in files))]
    key = hashlib.sha256(repr((size, Image.__version__, states)).encode()).hexdigest()[:16]
    path = folder / f"{split.name.replace(' ', '_').replace('/', '_')}_{size}_{key}.npy"
    if not path.exists():
        print(f"caching {len(split)} images in {path}", flush=True)
        with replacing(path) as part:
            pixels = np.lib.format.open_memmap(part, "w+", np.uint8, (len(split), size, size, 3))
            resized = ordered_map(_load_resized, [(file, size) for file in files], workers)
            for i, image in enumerate(resized):
                pixels[i] = image
            pixels.flush()
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _load_resized(job: tuple[Path, int]) -> np.ndarray:
    return np.asarray(load_rgb(*job))


class TestImages(Dataset):
    """Images for evaluation: resized straight to image_size x image_size. Items: uint8 3 x image_size x image_size, label, index."""

    __test__ = False  # not a test case, whatever pytest thinks of the name

    def __init__(self, split: Split, image_size: int):
        self.split, self.image_size = split, image_size

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        listed = None if self.split.sizes is None else self.split.sizes[index]
        image = load_rgb(self.split.path(index), self.image_size, listed)
        return _to_tensor(np.asarray(image)), int(self.split.labels[index]), index


def _to_tensor(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def to_input(images: Tensor, device: torch.device) -> Tensor:
    """uint8 N x 3 x H x W -> float32 on the device, normalized with ImageNet's mean and deviation, channels last.

    Bytes cross to the device, not floats: a quarter of the traffic.
    """
    mean, std = (torch.tensor(x, device=device).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    images = (images.to(device, non_blocking=True).float() / 255 - mean) / std
    return images.contiguous(memory_format=torch.channels_last)


class EpochSampler(Sampler):
    """Batches of every index once, in an order drawn from (seed, epoch); items are lists of (epoch, index). Set `epoch` before each pass.

    Of several processes, each gets its part of every batch: together they see what one process would. `first`: batches to leave out, those
    before an interruption.
    """

    def __init__(self, n: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1):
        self.n, self.batch_size, self.seed, self.rank, self.world_size, self.epoch, self.first = n, batch_size, seed, rank, world_size, 1, 0

    def __len__(self) -> int:
        return -(-self.n // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.n)
        for start in range(self.first * self.batch_size, self.n, self.batch_size):
            batch = order[start : start + self.batch_size]
            # A last batch smaller than the number of processes leaves some without: they take an image along that does not count.
            part = batch[self.rank :: self.world_size] if self.rank < len(batch) else batch[:1]
            yield [(self.epoch, int(i)) for i in part]

    def size(self, batch: int) -> tuple[int, int]:
        """(images of this process that count, images of all) in a batch."""
        whole = min(self.batch_size, self.n - batch * self.batch_size)
        return len(range(self.rank, whole, self.world_size)), whole


def train_loader(
    split: Split,
    batch_size: int,
    *,
    resize_size: int,
    image_size: int,
    seed: int,
    workers: int,
    pixels: np.ndarray | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> DataLoader:
    """Batches of (images uint8, labels); set `loader.batch_sampler.epoch` before each epoch. pixels: of `resized_pixels`."""
    images = TrainImages(split, resize_size, image_size, seed, pixels)
    return _loader(images, workers, batch_sampler=EpochSampler(len(split), batch_size, seed, rank, world_size))


def test_loader(split: Split, batch_size: int, *, image_size: int, workers: int, rank: int = 0, world_size: int = 1) -> DataLoader:
    """Batches of (images uint8, labels, indices) in the split's order; of several processes, each has every world_size-th image."""
    return _loader(TestImages(split, image_size), workers, batch_size=batch_size, sampler=range(rank, len(split), world_size))


test_loader.__test__ = False


def _loader(dataset: Dataset, workers: int, **kwargs: Any) -> DataLoader:
    return DataLoader(
        dataset,
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=ignore_interrupts,
        pin_memory=torch.cuda.is_available(),
        # A generator of its own: the loader would otherwise draw from the stream that attentive dropout uses.
        generator=torch.Generator().manual_seed(0),
        **kwargs,
    )
