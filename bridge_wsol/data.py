"""Splits and images: the field's text format, a folder of one's own, loaders that are the same for any number of workers.

A split is a folder `<DATASET>/<train|val|test>/` of text files (data_splits/README.md has the format). Train is the field's
train-weaksup, val its train-fullsup: the images on which epochs and thresholds are chosen.

    python -m bridge_wsol.data check --dataset CUB --data-root data     opens every image of every split, before hours are spent
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from .processes import ignore_interrupts, ordered_map
from .utils import InputError, alone, atomic_write, first_line

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
    # Turn images as their EXIF orientation says. Not so in the published data sets: their boxes lie on the pixels as stored.
    upright: bool = False
    hint: str = ""  # a way out for this split alone, said when its images are missing

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
        missing = self.missing()
        if missing:
            raise InputError(
                f"{self.path(missing[0])}: no such image ({len(missing)} of the {len(self)} of {self.name} are missing): "
                f"check --data-root, or --splits if the list is not this data's{self.hint}"
            )

    def missing(self) -> list[int]:
        """The images that are not there. Lists each folder once: asking a million times for one file takes minutes on a network disk."""
        there: dict[str, set[str] | None] = {}
        missing: list[int] = []
        for i, image in enumerate(self.ids):
            folder, _, name = image.rpartition("/")
            if folder not in there:
                try:
                    there[folder] = set(os.listdir(self.root / folder))
                except OSError:
                    there[folder] = None
            # A name that is not listed is asked for: a file system may spell it differently (accents, upper and lower case).
            if there[folder] is None or (name not in there[folder] and not self.path(i).is_file()):
                missing.append(i)
        return missing


# ---------------------------------------------------------------------------------------------------------------- reading


def read_split(folder: Path, root: Path, name: str, num_classes: int | None = None) -> Split:
    """Reads image_ids.txt, class_labels.txt and, where present, image_sizes.txt and localization.txt of one folder.

    Raises InputError naming file and line for a wrong number of fields, a value that is no number, an image that is not in
    image_ids.txt or there twice, an image without label, a label below 0 or not below num_classes, a box with x1 < x0 or outside
    its image.
    """
    path = folder / "image_ids.txt"
    index: dict[str, int] = {}
    for n, (image,) in _lines(path, (1,)):
        if image in index:
            raise InputError(f"{path}:{n}: {image[:80]} was listed before")
        index[image] = len(index)
        if image[0] == "/" or (".." in image and ".." in image.split("/")):
            raise InputError(f"{path}:{n}: {image[:80]} leaves the data root")
    if not index:
        raise InputError(f"{path}: empty")
    ids = list(index)

    labels = [-1] * len(ids)
    path = folder / "class_labels.txt"
    parsed: dict[str, int] = {}  # a million lines have a thousand labels
    for n, (image, text) in _lines(path, (2,)):
        i = _index_of(image, index, path, n)
        label = parsed[text] if text in parsed else parsed.setdefault(text, _integers([text], path, n)[0])
        if label < 0 or (num_classes is not None and label >= num_classes):
            top = "" if num_classes is None else f" to {num_classes - 1}, the classes of train"
            raise InputError(f"{path}:{n}: label {label} is out of range: labels run from 0{top}")
        if labels[i] >= 0:
            raise InputError(f"{path}:{n}: {image[:80]} has a label already")
        labels[i] = label
    _require_all(np.array(labels) >= 0, ids, path, "label")

    sizes = None
    path = folder / "image_sizes.txt"
    if path.exists() and path.stat().st_size:
        sizes = np.zeros((len(ids), 2), dtype=np.int64)
        for n, (image, *size) in _lines(path, (3,)):
            i, size = _index_of(image, index, path, n), _integers(size, path, n)
            if min(size) < 1:
                raise InputError(f"{path}:{n}: width and height must be positive, got {size[0]} x {size[1]}")
            if sizes[i, 0]:
                raise InputError(f"{path}:{n}: {image[:80]} has a size already")
            sizes[i] = size
        _require_all(sizes[:, 0] > 0, ids, path, "size")

    return Split(
        name,
        root,
        ids,
        np.array(labels, dtype=np.int64),
        sizes,
        *read_localization(folder / "localization.txt", index, sizes),
    )


def read_localization(
    path: Path, index: dict[str, int], sizes: np.ndarray | None
) -> tuple[dict[int, np.ndarray], dict[int, Masks]]:
    boxes: dict[int, list[list[int]]] = {}
    masks: dict[int, Masks] = {}
    if not path.exists():
        return {}, {}
    for n, (image, *values) in _lines(path, (3, 5)):
        i = _index_of(image, index, path, n)
        if len(values) == 2:
            for relative in values:
                if relative.startswith("/") or ".." in relative.split("/"):
                    raise InputError(f"{path}:{n}: {relative} leaves the data root")
            if not values[0]:
                raise InputError(f"{path}:{n}: a mask's path is expected after {image[:80]}")
            paths = masks.setdefault(i, Masks([], []))
            paths.instances.append(values[0])
            paths.ignore.extend(values[1:] if values[1] else [])
            continue
        x0, y0, x1, y1 = box = _integers(values, path, n)
        if x1 < x0 or y1 < y0 or x0 < 0 or y0 < 0:
            raise InputError(f"{path}:{n}: box {x0},{y0},{x1},{y1} needs 0 <= x0 <= x1 and 0 <= y0 <= y1")
        if sizes is None:
            raise InputError(
                f"{path}:{n}: boxes need {path.with_name('image_sizes.txt')}, which is absent or empty"
            )
        if x1 >= sizes[i, 0] or y1 >= sizes[i, 1]:
            raise InputError(
                f"{path}:{n}: box {x0},{y0},{x1},{y1} leaves its image of {sizes[i, 0]} x {sizes[i, 1]}"
            )
        boxes.setdefault(i, []).append(box)
    return {i: np.array(b) for i, b in boxes.items()}, masks


def _lines(path: Path, fields: tuple[int, ...]) -> Iterator[tuple[int, list[str]]]:
    """(line number from 1, comma-separated fields) of each line that is not empty; the number of fields is checked."""
    try:
        with path.open(encoding="utf-8") as file:
            for n, line in enumerate(file, 1):
                if line := line.strip():
                    values = [line] if fields == (1,) else line.split(",")
                    if len(values) not in fields:
                        expected = " or ".join(map(str, fields))
                        raise InputError(
                            f"{path}:{n}: {len(values)} comma-separated fields where {expected} are expected: {line[:80]}"
                        )
                    yield n, values
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise InputError(
            f"{path}: cannot be read ({reason}); data_splits/README.md has the format"
        ) from error


def _integers(values: list[str], path: Path, n: int) -> list[int]:
    # int() alone would take "1_0" and digits of any script, and numbers that no array holds.
    if not all(
        value.removeprefix("-").isdecimal() and value.isascii() and len(value) <= 10 for value in values
    ):
        raise InputError(f"{path}:{n}: {','.join(values)[:80]} should be whole numbers")
    return [int(value) for value in values]


def _index_of(image: str, index: dict[str, int], path: Path, n: int) -> int:
    if image not in index:
        raise InputError(f"{path}:{n}: {image[:80]} is not in {path.with_name('image_ids.txt')}")
    return index[image]


def _require_all(present: np.ndarray, ids: list[str], path: Path, what: str) -> None:
    if not present.all():
        raise InputError(f"{path}: no {what} for {ids[int(np.argmin(present))]}")


# ------------------------------------------------------------------------------------------------------------- data sets


# ------------------------------------------------------------------------------------------------- a folder of one's own


def is_image(path: Path) -> bool:
    # Names with a leading dot are what systems leave beside images, such as "._photo.jpg".
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()


# ---------------------------------------------------------------------------------------------------------------- images


# EXIF orientation -> how the stored pixels are turned to stand upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = [TURNS[orientation] for orientation in (5, 6, 7, 8)]


def open_image(path: Path) -> Image.Image:
    """Opens an image without decoding it. Raises InputError where there is none."""
    try:
        return Image.open(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such image") from None
    except Exception as error:  # Pillow's readers raise whatever a damaged header leads them to
        raise InputError(f"{path}: not an image that can be read ({first_line(error)})") from error


def turn_of(image: Image.Image) -> Image.Transpose | None:
    try:
        return TURNS.get(image.getexif().get(0x0112))
    except Exception:  # damaged EXIF data says nothing; the pixels may be well
        return None


def decode(path: Path, listed: np.ndarray | None = None, upright: bool = False) -> Image.Image:
    """An image of any mode as RGB, in its own size; upright: turned as its EXIF orientation says.

    Raises InputError for an image that cannot be read, or is not of the listed (width, height), which its boxes were drawn on.
    """
    with open_image(path) as image:
        turn = turn_of(image) if upright else None
        width, height = image.size[::-1] if turn in SIDEWAYS else image.size
        if listed is not None and (width, height) != tuple(listed):
            raise InputError(
                f"{path}: {width} x {height} pixels where the list has {listed[0]} x {listed[1]}: its boxes would not fit"
            )
        try:
            if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
                image = Image.fromarray(
                    (np.asarray(image) >> 8).astype(np.uint8)
                )  # 16 bits; Pillow would cut them off at 255
            rgb = image.convert("RGB")
        except Exception as error:  # Pillow's decoders raise whatever damaged data leads them to
            raise InputError(f"{path}: truncated or damaged image ({first_line(error)})") from error
    rgb.info.pop("exif", None)  # the orientation is applied now, or not wanted
    return rgb if turn is None else rgb.transpose(turn)


def load_rgb(path: Path, size: int, listed: np.ndarray | None = None, upright: bool = False) -> Image.Image:
    """`decode`, resized straight to size x size (bilinear, antialiased as torchvision's on PIL images)."""
    return decode(path, listed, upright).resize((size, size), Image.Resampling.BILINEAR)


def load_masks(root: Path, masks: Masks, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(mask, ignore) of an image, size x size bool: the union of its instances, and what its ignore image adds to it."""
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
            # Nearest neighbour in double precision, as the field's evaluator has it (OpenCV's INTER_NEAREST).
            # At size 224 some pixel is the one before floor(x * n / size) for 105 of the widths 225 ... 1699.
            rows, columns = (np.floor(np.arange(size) * (1 / (size / n))).astype(int) for n in pixels.shape)
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
    except (
        Exception
    ) as error:  # numpy reads the header as Python's literals, with all the errors of its parser
        raise InputError(f"{path}: not a .npy array ({first_line(error)})") from error
    if not isinstance(score_map, np.ndarray) or score_map.ndim != 2 or not score_map.size:
        raise InputError(
            f"{path}: a score map is a 2-D array, this has shape {getattr(score_map, 'shape', 'of an archive')}"
        )
    if score_map.dtype.kind not in "fiub":
        raise InputError(f"{path}: a score map holds floats in [0, 1], this holds {score_map.dtype}")
    if np.isnan(score_map).any():
        raise InputError(f"{path}: holds NaN")
    if score_map.min() < 0 or score_map.max() > 1:
        raise InputError(
            f"{path}: values in [{score_map.min():.4g}, {score_map.max():.4g}] where [0, 1] is expected"
        )
    return score_map.astype(np.float32)


def image_files(paths: list[Path]) -> list[Path]:
    """The files themselves, and every image below the folders, in order. Raises InputError for a folder without any."""
    files: list[Path] = []
    for path in paths:
        inside = sorted(filter(is_image, path.rglob("*"))) if path.is_dir() else [path]
        if not inside:
            raise InputError(f"--images {path}: no images in this folder")
        files += inside
    return files


class TrainImages(Dataset):
    """Training images: resize to resize_size x resize_size, random crop of image_size, random horizontal flip.

    Indexed by (epoch, index), the sampler's items: the crop is drawn from (seed, epoch, index) alone, so it is the same for any
    number of workers, in any order, and after a resume. Items: uint8 3 x image_size x image_size, label.
    """

    def __init__(
        self, split: Split, resize_size: int, image_size: int, seed: int, pixels: np.ndarray | None = None
    ):
        self.split, self.resize_size, self.image_size, self.seed, self.pixels = (
            split,
            resize_size,
            image_size,
            seed,
            pixels,
        )

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = item
        rng = np.random.default_rng([self.seed, epoch, index])
        x, y = rng.integers(0, self.resize_size - self.image_size, size=2, endpoint=True)
        image = (
            np.asarray(load_rgb(self.split.path(index), self.resize_size, upright=self.split.upright))
            if self.pixels is None
            else self.pixels[index]
        )
        image = image[y : y + self.image_size, x : x + self.image_size]
        return _to_tensor(image[:, ::-1] if rng.random() < 0.5 else image), int(self.split.labels[index])


def resized_pixels(split: Split, size: int, folder: Path, workers: int) -> np.ndarray:
    """All images of a split as load_rgb gives them, N x size x size x 3 uint8, in one memory-mapped file that is made the first time.

    The file's name has a hash of the list, the sizes and the times of the images' files: other images get another file.
    Raises InputError for an image that cannot be read, or where the file cannot be written (full CUB at 256: 1.2 GB).
    """
    files = [split.path(i) for i in range(len(split))]
    states = [
        (image, stat.st_size, stat.st_mtime_ns)
        for image, stat in zip(split.ids, (file.stat() for file in files))
    ]
    key = hashlib.sha256(repr((size, Image.__version__, states)).encode()).hexdigest()[:16]
    path = folder / f"{split.name.replace(' ', '_').replace('/', '_')}_{size}_{key}.npy"
    with alone(folder):
        if not path.exists():
            print(f"caching {len(split)} images in {path}", flush=True)
            with atomic_write(path, one_writer=True) as part:
                pixels = np.lib.format.open_memmap(part, "w+", np.uint8, (len(split), size, size, 3))
                resized = ordered_map(_load_resized, [(file, size, split.upright) for file in files], workers)
                for i, image in enumerate(resized):
                    pixels[i] = image
                pixels.flush()
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _load_resized(job: tuple[Path, int, bool]) -> np.ndarray:
    path, size, upright = job
    return np.asarray(load_rgb(path, size, upright=upright))


class TestImages(Dataset):
    """Images for evaluation: resized straight to image_size x image_size. Items: uint8 3 x image_size x image_size, label, index."""

    __test__ = False  # not a test case, whatever pytest thinks of the name

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
        self.n, self.batch_size, self.seed, self.rank, self.world_size, self.epoch, self.first = (
            n,
            batch_size,
            seed,
            rank,
            world_size,
            1,
            0,
        )

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
    return _loader(
        images, workers, batch_sampler=EpochSampler(len(split), batch_size, seed, rank, world_size)
    )


def test_loader(
    split: Split, batch_size: int, *, image_size: int, workers: int, rank: int = 0, world_size: int = 1
) -> DataLoader:
    """Batches of (images uint8, labels, indices) in the split's order; of several processes, each has every world_size-th image."""
    return _loader(
        TestImages(split, image_size),
        workers,
        batch_size=batch_size,
        sampler=range(rank, len(split), world_size),
    )


test_loader.__test__ = False


def split_loaders(
    splits: dict[str, Split], config: dict[str, Any], pixels: np.ndarray | None, **share: int
) -> dict[str | int, DataLoader]:
    """{batch size: loader of train, one per stage of training; "val": ..., "test": ...}.

    config: the values of a run. pixels: of `resized_pixels`. share: workers, rank, world_size.
    """
    share = {"image_size": config["image_size"], **share}
    training = {"resize_size": config["resize_size"], "seed": config["seed"], "pixels": pixels, **share}
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
        # A generator of its own: the loader would otherwise draw from the stream that attentive dropout uses.
        generator=torch.Generator().manual_seed(0),
        **kwargs,
    )
