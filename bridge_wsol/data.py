"""Images and their lists: the list format, decoding, `Split`, loaders and the cache of resized images.

A split is a folder `<DATASET>/<train|val|test>/` of text files; data_splits/README.md describes them. Choe et
al. call train train-weaksup, and val train-fullsup: the images on which epochs and thresholds are chosen.

The batches of a run do not depend on the number of workers: every crop is drawn from (seed, epoch, index).
"""

from __future__ import annotations

import glob
import hashlib
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from .processes import ignore_interrupts, ordered_map
from .utils import InputError, atomic_write, counted, first_line, write_text

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Masks(NamedTuple):
    """Paths of an image's masks, relative to the image root: one per instance, and the regions to ignore."""

    instances: list[str]
    ignore: list[str]


@dataclass(frozen=True)
class Split:
    """One split in memory. The lists are parallel: image i has ids[i], labels[i], sizes[i], boxes[i]."""

    name: str
    root: Path  # ids are relative to it
    ids: list[str]
    labels: np.ndarray  # N int64, from 0
    sizes: np.ndarray | None = None  # N x 2 int64, width and height in pixels; needed with boxes only
    boxes: dict[int, np.ndarray] = field(default_factory=dict)  # index -> G x 4 int64, pixels of the image
    masks: dict[int, Masks] = field(default_factory=dict)
    # Rotate images as EXIF says. Not so in published data sets: their boxes lie on the stored pixels.
    upright: bool = False
    hint: str = ""  # appended to the message about missing images

    def __len__(self) -> int:
        return len(self.ids)

    def path(self, index: int) -> Path:
        """The file of image `index`."""
        return self.root / self.ids[index]

    def take(self, indices: Iterable[int], name: str) -> Split:
        """A split with the images of these indices, in this order."""
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

    def digest(self) -> str:
        """A hash of the images and their labels, in their order."""
        content = repr((self.ids, self.labels.tolist())).encode("utf-8", "surrogateescape")
        return hashlib.sha256(content).hexdigest()[:16]

    def require_images(self) -> None:
        """Raises InputError if image files are missing. The message names the first one and counts them."""
        missing = self.missing()
        if missing:
            raise InputError(
                f"{self.path(missing[0])}: no such image "
                f"({len(missing)} of the {len(self)} of {self.name} are missing): "
                f"check --data-root, or --splits if the list belongs to other data{self.hint}"
            )

    def missing(self) -> list[int]:
        """Indices of the images that are not there.

        Lists each folder once: a million single queries take minutes on a network disk.
        """
        there: dict[str, set[str] | None] = {}
        missing: list[int] = []
        for i, image in enumerate(self.ids):
            folder, _, name = image.rpartition("/")
            if folder not in there:
                try:
                    there[folder] = set(os.listdir(self.root / folder))
                except OSError:
                    there[folder] = None
            # A file system may list a name in another spelling (accents, case): query the file.
            if there[folder] is None or (name not in there[folder] and not self.path(i).is_file()):
                missing.append(i)
        return missing


# -------------------------------------------------------------------------------------------- the list format

MAX_CLASSES = 10**6  # a larger label is a mistake
LIST_FILES = ("image_ids", "class_labels", "image_sizes", "localization")

Lists = dict[str, list[str]]  # file name without .txt -> lines


def write_lists(folder: Path, lists: Lists) -> None:
    """Writes the files of one split. image_ids.txt comes last: if it exists, the list is complete."""
    for name in sorted(lists, key="image_ids".__eq__):
        write_text(folder / f"{name}.txt", "".join(f"{line}\n" for line in lists[name]))


def read_split(folder: Path, root: Path, name: str, num_classes: int | None = None) -> Split:
    """Reads the files of one folder; image_sizes.txt and localization.txt may be absent.

    Raises InputError with file and line for: a wrong number of fields; a value that is not a number; an image
    that is not in image_ids.txt, or that is listed twice; an image without label; a label below 0 or not
    below num_classes; a box with x1 < x0, or outside its image.
    """
    index = _read_ids(folder / "image_ids.txt")
    labels = _read_labels(folder / "class_labels.txt", index, num_classes)
    sizes = _read_sizes(folder / "image_sizes.txt", index)
    return Split(
        name, root, list(index), labels, sizes, *read_localization(folder / "localization.txt", index, sizes)
    )


def _read_ids(path: Path) -> dict[str, int]:
    """{image id: index}, in the order of the lines."""
    index: dict[str, int] = {}
    for n, (image,) in _lines(path, (1,)):
        if image in index:
            raise InputError(f"{path}:{n}: {image[:80]} was listed before")
        index[image] = len(index)
        if image[0] == "/" or (".." in image and ".." in image.split("/")):
            raise InputError(f"{path}:{n}: {image[:80]} leaves the data root")
    if not index:
        raise InputError(f"{path}: empty")
    return index


def _read_labels(path: Path, index: dict[str, int], num_classes: int | None) -> np.ndarray:
    labels = [-1] * len(index)
    parsed: dict[str, int] = {}  # a million lines have a thousand labels
    for n, (image, text) in _lines(path, (2,)):
        i = _index_of(image, index, path, n)
        label = parsed[text] if text in parsed else parsed.setdefault(text, _integers([text], path, n)[0])
        if not 0 <= label < (num_classes or MAX_CLASSES):
            top = f"{num_classes - 1}, the classes of train" if num_classes else str(MAX_CLASSES - 1)
            raise InputError(f"{path}:{n}: label {label} is out of range: labels run from 0 to {top}")
        if labels[i] >= 0:
            raise InputError(f"{path}:{n}: {image[:80]} has a label already")
        labels[i] = label
    labels = np.array(labels, dtype=np.int64)
    _require_all(labels >= 0, index, path, "label")
    return labels


def _read_sizes(path: Path, index: dict[str, int]) -> np.ndarray | None:
    if not path.exists() or not path.stat().st_size:
        return None
    sizes = np.zeros((len(index), 2), dtype=np.int64)
    for n, (image, *values) in _lines(path, (3,)):
        i, size = _index_of(image, index, path, n), _integers(values, path, n)
        if min(size) < 1:
            raise InputError(f"{path}:{n}: width and height must be positive, got {size[0]} x {size[1]}")
        if sizes[i, 0]:
            raise InputError(f"{path}:{n}: {image[:80]} has a size already")
        sizes[i] = size
    _require_all(sizes[:, 0] > 0, index, path, "size")
    return sizes


def read_localization(
    path: Path, index: dict[str, int], sizes: np.ndarray | None
) -> tuple[dict[int, np.ndarray], dict[int, Masks]]:
    """(boxes, masks) by index of the image; both are empty if there is no such file.

    Boxes: G x 4 int64, pixels, both corners inside. index: {image id: index}. sizes: N x 2, width and height.
    Raises InputError as `read_split` does.
    """
    boxes: dict[int, list[list[int]]] = {}
    masks: dict[int, Masks] = {}
    if not path.exists():
        return {}, {}
    for n, (image, *values) in _lines(path, (3, 5)):
        i = _index_of(image, index, path, n)
        if len(values) == 2:
            _check_mask_paths(values, image, path, n)
            paths = masks.setdefault(i, Masks([], []))
            paths.instances.append(values[0])
            paths.ignore.extend(values[1:] if values[1] else [])
        else:
            box = _integers(values, path, n)
            _check_box(box, None if sizes is None else sizes[i], path, n)
            boxes.setdefault(i, []).append(box)
    return {i: np.array(b) for i, b in boxes.items()}, masks


def _check_mask_paths(values: list[str], image: str, path: Path, n: int) -> None:
    for relative in values:
        if relative.startswith("/") or ".." in relative.split("/"):
            raise InputError(f"{path}:{n}: {relative} leaves the data root")
    if not values[0]:
        raise InputError(f"{path}:{n}: a mask's path is expected after {image[:80]}")


def _check_box(box: list[int], size: np.ndarray | None, path: Path, n: int) -> None:
    x0, y0, x1, y1 = box
    if x1 < x0 or y1 < y0 or x0 < 0 or y0 < 0:
        raise InputError(f"{path}:{n}: box {x0},{y0},{x1},{y1} needs 0 <= x0 <= x1 and 0 <= y0 <= y1")
    if size is None:
        sizes = path.with_name("image_sizes.txt")
        raise InputError(f"{path}:{n}: boxes need {sizes}, which is absent or empty")
    if x1 >= size[0] or y1 >= size[1]:
        raise InputError(f"{path}:{n}: box {x0},{y0},{x1},{y1} leaves its image of {size[0]} x {size[1]}")


def _lines(path: Path, fields: tuple[int, ...]) -> Iterator[tuple[int, list[str]]]:
    """(line number from 1, comma-separated fields) of each line that is not empty."""
    try:
        with path.open(encoding="utf-8-sig") as file:  # some editors write a byte order mark
            for n, line in enumerate(file, 1):
                if line := line.strip():
                    values = [line] if fields == (1,) else line.split(",")
                    if len(values) not in fields:
                        expected = " or ".join(map(str, fields))
                        raise InputError(
                            f"{path}:{n}: {len(values)} comma-separated fields "
                            f"where {expected} are expected: {line[:80]}"
                        )
                    yield n, values
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise InputError(
            f"{path}: cannot be read ({reason}): data_splits/README.md describes the format"
        ) from error


def _integers(values: list[str], path: Path, n: int) -> list[int]:
    # int() alone would accept "1_0", digits of any script, and numbers that no array holds.
    if not all(
        value.removeprefix("-").isdecimal() and value.isascii() and len(value) <= 10 for value in values
    ):
        raise InputError(f"{path}:{n}: {','.join(values)[:80]} should be whole numbers")
    return [int(value) for value in values]


def _index_of(image: str, index: dict[str, int], path: Path, n: int) -> int:
    if image not in index:
        raise InputError(f"{path}:{n}: {image[:80]} is not in {path.with_name('image_ids.txt')}")
    return index[image]


def _require_all(present: np.ndarray, index: dict[str, int], path: Path, what: str) -> None:
    if not present.all():
        raise InputError(f"{path}: no {what} for {list(index)[int(np.argmin(present))]}")


# --------------------------------------------------------------------------------------------------- decoding

# EXIF orientation -> the transpose that makes the stored pixels upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = [TURNS[orientation] for orientation in (5, 6, 7, 8)]  # width and height change places


def is_image(path: Path) -> bool:
    """Whether this is a file with the suffix of an image."""
    # Some systems write hidden files such as "._photo.jpg" beside the images.
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()


def image_files(paths: list[Path]) -> list[Path]:
    """The files, and every image below the folders. Raises InputError for a folder without images."""
    files: list[Path] = []
    for path in paths:
        inside = sorted(filter(is_image, path.rglob("*"))) if path.is_dir() else [path]
        if not inside:
            raise InputError(f"--images {path}: no images in this folder")
        files += inside
    return files


def open_image(path: Path) -> Image.Image:
    """Opens an image without decoding it. Raises InputError if the file is missing or not an image."""
    try:
        return Image.open(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such image") from None
    except Exception as error:  # Pillow's readers raise errors of many types for a damaged header
        raise InputError(f"{path}: not an image that can be read ({first_line(error)})") from error


def turn_of(image: Image.Image) -> Image.Transpose | None:
    """The transpose that the EXIF orientation asks for; None if there is none. Decodes a TIFF."""
    try:
        if image.format == "TIFF":  # Pillow turns it when it decodes it
            image.load()
            return None
        return TURNS.get(image.getexif().get(0x0112))
    except Exception:  # damaged EXIF data; the pixels may be intact
        return None


def decode(path: Path, listed: np.ndarray | None = None, upright: bool = False) -> Image.Image:
    """An image of any mode as RGB, in its own size. upright: rotated as its EXIF orientation says.

    listed: (width, height) in pixels on which its boxes were drawn. Raises InputError for an image that
    cannot be read, or that has another size than listed.
    """
    with open_image(path) as image:
        turn = turn_of(image) if upright else None
        width, height = image.size[::-1] if turn in SIDEWAYS else image.size
        if listed is not None and (width, height) != tuple(listed):
            raise InputError(
                f"{path}: {width} x {height} pixels where the list has {listed[0]} x {listed[1]}: "
                "its boxes would not fit"
            )
        rgb = to_rgb(image, path)
    rgb.info.pop("exif", None)  # the orientation is applied now, or not wanted
    return rgb if turn is None else rgb.transpose(turn)


def to_rgb(image: Image.Image, name: Any = "image", upright: bool = False) -> Image.Image:
    """An image of any mode as RGB. upright: rotated as its EXIF orientation says.

    name: for the InputError about an image that is damaged, or whose values of 32 bits are not 0 ... 255.
    """
    try:
        png = image.format == "PNG"
        image = ImageOps.exif_transpose(image) if upright else image
        if image.mode.startswith("I;16") or (image.mode == "I" and png):
            # 16 bits per pixel: Pillow would clip the values at 255.
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        low, high = image.getextrema() if image.mode in ("I", "F") else (0, 0)  # Pillow clips them, too
        rgb = image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise errors of many types for damaged data
        raise InputError(f"{name}: truncated or damaged image ({first_line(error)})") from error
    if not 0 <= low <= high <= 255 or (image.mode == "F" and 0 < high <= 1):
        raise InputError(f"{name}: values from {low:g} to {high:g} where 0 ... 255 are expected: convert it")
    return rgb


def load_rgb(path: Path, size: int, listed: np.ndarray | None = None, upright: bool = False) -> Image.Image:
    """`decode`, then resize to size x size: bilinear, antialiased like torchvision's resize of PIL images."""
    return decode(path, listed, upright).resize((size, size), Image.Resampling.BILINEAR)


def load_masks(root: Path, masks: Masks, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(mask, ignore) of an image, size x size bool: the union of its instances; what to ignore outside it."""
    mask, ignore = np.zeros((2, size, size), dtype=bool)
    for paths, region in zip(masks, (mask, ignore)):
        for relative in paths:
            with open_image(root / relative) as image:
                try:
                    pixels = np.asarray(image.convert("L"))
                except Exception as error:
                    raise InputError(
                        f"{root / relative}: truncated or damaged mask ({first_line(error)})"
                    ) from error
            # Nearest neighbour in double precision, like OpenCV's INTER_NEAREST in the evaluator of Choe et
            # al. At size 224, 105 of the widths 225 ... 1699 have a pixel at floor(x * n / size) - 1.
            rows, columns = (np.floor(np.arange(size) * (1 / (size / n))).astype(int) for n in pixels.shape)
            region |= pixels[rows[:, None], columns] > 0.5
    return mask, ignore & ~mask


def load_score_maps(folder: Path, split: Split) -> Iterator[tuple[str, np.ndarray]]:
    """(image id, map) of each image. Raises InputError as `load_score_map`, and for a shared file."""
    stems = Counter(os.path.splitext(image)[0] for image in split.ids)
    for image in split.ids:
        if stems[os.path.splitext(image)[0]] > 1 and not (folder / f"{image}.npy").is_file():
            problem = "no score map, and other images differ from it in the suffix only"
            raise InputError(f"{folder / image}.npy: {problem}: name the maps by whole ids")
        yield image, load_score_map(folder, image)


def load_score_map(folder: Path, image: str) -> np.ndarray:
    """Reads DIR/<image id>.npy or DIR/<image id without extension>.npy: H x W float32 in [0, 1].

    Raises InputError for a map that is missing, empty or not a 2-D array of numbers, and for NaN or values
    outside [0, 1].
    """
    candidates = [folder / f"{image}.npy", (folder / image).with_suffix(".npy")]
    path = next((p for p in candidates if p.is_file()), None)
    if path is None:
        raise InputError(f"{candidates[0]}: no score map for {image} (nor {candidates[1].name})")
    try:
        score_map = np.load(path, allow_pickle=False)
    except Exception as error:  # numpy parses the header as Python code: errors of many types
        raise InputError(f"{path}: not a .npy array ({first_line(error)})") from error
    if not isinstance(score_map, np.ndarray) or score_map.ndim != 2 or not score_map.size:
        shape = getattr(score_map, "shape", "of an archive")
        raise InputError(f"{path}: a score map is a 2-D array, this has shape {shape}")
    if score_map.dtype.kind not in "fiub":
        raise InputError(f"{path}: a score map holds floats in [0, 1], this holds {score_map.dtype}")
    if np.isnan(score_map).any():
        raise InputError(f"{path}: holds NaN")
    low, high = score_map.min(), score_map.max()
    if low < 0 or high > 1:
        raise InputError(f"{path}: values in [{low:.4g}, {high:.4g}] where [0, 1] is expected")
    return score_map.astype(np.float32)


# --------------------------------------------------------------------------------------- images as a data set


class TrainImages(Dataset):
    """Training images: resize to resize_size, random crop of image_size, random horizontal flip.

    The sampler's items (epoch, index) are its indices. The crop depends on (seed, epoch, index) alone, so it
    is the same for any number of workers, in any order, and after a resume. pixels: the cache of
    `resized_pixels`. Items: uint8 3 x image_size x image_size, label.
    """

    def __init__(
        self, split: Split, resize_size: int, image_size: int, seed: int, pixels: np.ndarray | None = None
    ):
        self.split, self.seed, self.pixels = split, seed, pixels
        self.resize_size, self.image_size = resize_size, image_size

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = item
        rng = np.random.default_rng([self.seed, epoch, index])
        x, y = rng.integers(0, self.resize_size - self.image_size, size=2, endpoint=True)
        if self.pixels is None:
            path = self.split.path(index)
            image = np.asarray(load_rgb(path, self.resize_size, upright=self.split.upright))
        else:
            image = self.pixels[index]
        image = image[y : y + self.image_size, x : x + self.image_size]
        return _to_tensor(image[:, ::-1] if rng.random() < 0.5 else image), int(self.split.labels[index])


class TestImages(Dataset):
    """Images for evaluation, resized to image_size x image_size.

    Items: uint8 3 x image_size x image_size, label, index.
    """

    __test__ = False  # pytest would take a class of this name for a test case

    def __init__(self, split: Split, image_size: int):
        self.split, self.image_size = split, image_size

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        listed = None if self.split.sizes is None else self.split.sizes[index]
        image = load_rgb(self.split.path(index), self.image_size, listed, self.split.upright)
        return _to_tensor(np.asarray(image)), int(self.split.labels[index]), index


def _to_tensor(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def to_input(images: Tensor, device: torch.device) -> Tensor:
    """uint8 N x 3 x H x W -> float32 on the device, channels last, normalized with ImageNet's statistics.

    Moves bytes to the device and converts them there: a quarter of the traffic.
    """
    mean, std = (torch.tensor(x, device=device).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    images = (images.to(device, non_blocking=True).float() / 255 - mean) / std
    return images.contiguous(memory_format=torch.channels_last)


# ---------------------------------------------------------------------------------------------------- loaders


class EpochSampler(Sampler):
    """Batches of every index once, in an order drawn from (seed, epoch); items are lists of (epoch, index).

    Set `epoch` before each pass. `first`: number of batches to skip after a resume.
    Each rank takes a slice of the global batch of batch_size images.
    """

    def __init__(self, n: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1):
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.epoch, self.first = 1, 0

    def __len__(self) -> int:
        return -(-self.n // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.n)
        for start in range(self.first * self.batch_size, self.n, self.batch_size):
            batch = order[start : start + self.batch_size]
            # If the last batch has fewer images than ranks: a rank without images loads one, with weight 0.
            part = batch[self.rank :: self.world_size] if self.rank < len(batch) else batch[:1]
            yield [(self.epoch, int(i)) for i in part]

    def size(self, batch: int) -> tuple[int, int]:
        """(number of images of this rank that count, number of images of all ranks) in a batch."""
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
    """Batches of (images: uint8 N x 3 x image_size x image_size, labels: N int64).

    Set `loader.batch_sampler.epoch` before each epoch. pixels: the cache of `resized_pixels`.
    """
    images = TrainImages(split, resize_size, image_size, seed, pixels)
    return _loader(
        images, workers, batch_sampler=EpochSampler(len(split), batch_size, seed, rank, world_size)
    )


def test_loader(
    split: Split, batch_size: int, *, image_size: int, workers: int, rank: int = 0, world_size: int = 1
) -> DataLoader:
    """Batches of (images: uint8 N x 3 x image_size x image_size, labels: N int64, indices: N int64).

    In the order of the split. Of several processes, each gets every world_size-th image.
    """
    return _loader(
        TestImages(split, image_size),
        workers,
        batch_size=batch_size,
        sampler=range(rank, len(split), world_size),
    )


test_loader.__test__ = False  # not a test case


def split_loaders(
    splits: dict[str, Split], config: dict[str, Any], pixels: np.ndarray | None, **share: int
) -> dict[str | int, DataLoader]:
    """{batch size: loader of train, one per stage of training; "val": ..., "test": ...}.

    config: the values of a run. pixels: of `resized_pixels`. share: rank, world_size.
    """
    share = {"image_size": config["image_size"], "workers": config["workers"], **share}
    training = {"resize_size": config["resize_size"], "seed": config["seed"], "pixels": pixels, **share}
    if pixels is not None and not torch.cuda.is_available():
        training["workers"] = 0  # crops of the cache cost little; worker processes would slow the network
    sizes = {config["warm_batch_size"], config["batch_size"]}
    loaders = {size: train_loader(splits["train"], size, **training) for size in sizes}
    of_images = {name: test_loader(splits[name], config["batch_size"], **share) for name in ("val", "test")}
    return loaders | of_images


def _loader(dataset: Dataset, workers: int, **kwargs: Any) -> DataLoader:
    return DataLoader(
        dataset,
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=ignore_interrupts,
        pin_memory=torch.cuda.is_available(),
        # Without its own generator the loader would draw from the stream that attentive dropout uses.
        generator=torch.Generator().manual_seed(0),
        **kwargs,
    )


# ------------------------------------------------------------------------------------------------------ cache


def resized_pixels(split: Split, size: int, folder: Path, workers: int) -> np.ndarray:
    """All images of a split, resized as by `load_rgb`: N x size x size x 3 uint8, memory-mapped.

    The first call writes the file in `folder` (full CUB at 256: 1.2 GB). Its name has a hash of the list and
    of the sizes and times of the image files, so that changed images get another file. Processes that write
    it at the same time all write the same bytes. Raises InputError for an image that cannot be read, or if
    the file cannot be written.
    """
    files = [split.path(i) for i in range(len(split))]
    states = [
        (image, stat.st_size, stat.st_mtime_ns)
        for image, stat in zip(split.ids, (file.stat() for file in files))
    ]
    key = hashlib.sha256(repr((size, Image.__version__, states)).encode()).hexdigest()[:16]
    path = folder / f"{split.name.replace(' ', '_').replace('/', '_')}_{size}_{key}.npy"
    if not path.exists():
        print(f"caching {len(split)} images in {path}", flush=True)
        remove_leftovers(path)
        with atomic_write(path) as part:
            pixels = np.lib.format.open_memmap(part, "w+", np.uint8, (len(split), size, size, 3))
            if hasattr(os, "posix_fallocate"):  # a full disk would kill the process that writes to the map
                with part.open("r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, part.stat().st_size)
            resized = ordered_map(_load_resized, [(file, size, split.upright) for file in files], workers)
            for i, image in enumerate(counted(resized, "caching", len(split))):
                pixels[i] = image
            pixels.flush()
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _load_resized(job: tuple[Path, int, bool]) -> np.ndarray:
    path, size, upright = job
    return np.asarray(load_rgb(path, size, upright=upright))


def remove_leftovers(path: Path) -> None:
    """Removes the temporary files and folders .NAME.*.part beside `path` that a killed process left.

    Only those that are older than a day: another process may be writing a younger one.
    """
    for part in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        with suppress(OSError):
            if time.time() - part.stat().st_mtime > 24 * 3600:
                shutil.rmtree(part) if part.is_dir() else part.unlink()
