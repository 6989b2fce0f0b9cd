"""Images and their lists: the list format, decoding, `Split`, score-map files, loaders.

A split is a folder `<DATASET>/<train|val|test>/` of text files; data_splits/README.md describes them. Choe et
al. call train train-weaksup, and val train-fullsup: the images on which epochs and thresholds are chosen.

The batches of a run do not depend on the number of workers: every crop is drawn from (seed, epoch, index).
"""

from __future__ import annotations

import hashlib
import os
import re
import signal
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from .utils import InputError, first_line, rank, world_size, write_text

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
    smaller: bool = False  # the files may be smaller copies of the images that sizes and boxes belong to

    def __len__(self) -> int:
        return len(self.ids)

    def path(self, index: int) -> Path:
        """The file of image `index`."""
        return self.root / self.ids[index]

    def file_size(self, index: int) -> np.ndarray | None:
        """Width and height that the file of image `index` must have for its boxes; None: any."""
        return None if self.sizes is None or self.smaller else self.sizes[index]

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

    def checksums(self) -> np.ndarray:
        """N uint32: of each image's label, size, boxes and paths of masks."""
        import zlib

        sizes = np.zeros((len(self), 2), dtype=int) if self.sizes is None else self.sizes
        boxes = [self.boxes[i].tolist() if i in self.boxes else None for i in range(len(self))]
        masks = [self.masks.get(i) for i in range(len(self))]
        texts = map(repr, zip(self.labels.tolist(), sizes.tolist(), boxes, masks))
        return np.array([zlib.crc32(t.encode("utf-8", "surrogateescape")) for t in texts], dtype=np.uint32)

    def fingerprint(self):
        boxes = (
            hashlib.sha256(self.checksums().astype("<u4").tobytes()).hexdigest()[:16]
            if self.boxes or self.masks
            else None
        )
        return {"images": self.digest(), "boxes": boxes}

    def require_images(self) -> None:
        """Raises InputError if image files are missing. The message names the first one and counts them.

        Lists each folder once: a million single queries take minutes on a network disk.
        """

        @cache
        def names(folder: str) -> set[str]:
            return {*os.listdir(self.root / folder)} if (self.root / folder).is_dir() else set()

        # A file system may list a name in another spelling (accents, case): query the file then.
        parts = map(os.path.split, self.ids)
        unlisted = [i for i, (folder, name) in enumerate(parts) if name not in names(folder)]
        missing = [i for i in unlisted if not self.path(i).is_file()]
        if missing:
            raise InputError(
                f"{self.path(missing[0])}: no such image ({len(missing)} of the {len(self)} of {self.name} "
                "are missing): check --data-root, or --lists if the list belongs to other data"
            )


# -------------------------------------------------------------------------------------------- the list format

MAX_CLASSES = 10**6  # a larger label is a mistake


def write_lists(folder: Path, lists: dict[str, list[str]]) -> None:
    """Writes {file name without .txt: lines} of one split."""
    for name, lines in lists.items():
        write_text(folder / f"{name}.txt", "".join(f"{line}\n" for line in lines))


def read_split(folder: Path, root: Path, name: str, num_classes: int | None = None) -> Split:
    """Reads the files of one folder; image_sizes.txt and localization.txt may be absent.

    Raises InputError with file and line for a line of another form, for an image that is not in
    image_ids.txt, is listed twice or lacks a label or size, for a label below 0 or not below num_classes, and
    for a box with x1 < x0 or outside its image.
    """
    path, index = folder / "image_ids.txt", {}
    for n, image in _lines(path):
        if image in index or leaves_root(image):
            problem = "is listed twice" if image in index else "leaves the data root"
            raise InputError(f"{path}:{n}: {image[:80]} {problem}")
        index[image] = len(index)
    if not index:
        raise InputError(f"{path}: empty")
    ids = list(index)
    labels = _one_per_image(folder / "class_labels.txt", index, "image,label", 1)[:, 0]
    top = (num_classes or MAX_CLASSES) - 1
    if not 0 <= labels.min() <= labels.max() <= top:
        worst = int(labels.argmin() if labels.min() < 0 else labels.argmax())
        rule = f"labels run from 0 to {top}{', the classes of train' if num_classes else ''}"
        raise InputError(f"{folder / 'class_labels.txt'}: {ids[worst]} has label {labels[worst]}: {rule}")
    path, sizes = folder / "image_sizes.txt", None
    if path.exists() and path.stat().st_size:
        sizes = _one_per_image(path, index, "image,width,height", 2)
        if sizes.min() < 1:
            raise InputError(f"{path}: {ids[sizes.min(1).argmin()]}: width and height must be positive")
    boxes, masks = read_localization(folder / "localization.txt", index, sizes)
    return Split(name, root, ids, labels, sizes, boxes, masks)


def read_localization(
    path: Path, index: dict[str, int], sizes: np.ndarray | None
) -> tuple[dict[int, np.ndarray], dict[int, Masks]]:
    """(boxes, masks) by index of the image; both are empty if there is no such file.

    Boxes: G x 4 int64, pixels, both corners inside. index: {image id: index}. sizes: N x 2, width and height.
    Raises InputError as `read_split` does.
    """
    boxes, masks = defaultdict(list), defaultdict(lambda: Masks([], []))
    for n, line in _lines(path) if path.exists() else ():
        image, box = _numbers(line, 4)
        fields = line.rsplit(",", 2)
        if image in index and sizes is not None:
            x0, y0, x1, y1 = box
            width, height = sizes[index[image]]
            if not (0 <= x0 <= x1 < width and 0 <= y0 <= y1 < height):
                rule = f"0 <= x0 <= x1 < {width} and 0 <= y0 <= y1 < {height}, pixels of its image"
                raise InputError(f"{path}:{n}: box {x0},{y0},{x1},{y1}: must have {rule}")
            boxes[index[image]].append(box)
        elif fields[0] in index and len(fields) == 3 and fields[1] and not any(map(leaves_root, fields[1:])):
            instances, ignore = masks[index[fields[0]]]
            instances.append(fields[1])
            ignore += [fields[2]] if fields[2] else []
        else:
            raise InputError(
                f"{path}:{n}: {line[:80]}: expected image,x0,y0,x1,y1 (whole pixels, with image_sizes.txt) "
                "or image,mask,ignore (paths), of a listed image"
            )
    return {i: np.array(b) for i, b in boxes.items()}, dict(masks)


def _one_per_image(path: Path, index: dict[str, int], form: str, k: int) -> np.ndarray:
    """N x k int64 from a file with one line per image, of this form."""
    values: dict[str, list[int]] = {}
    for n, line in _lines(path):
        image, numbers = _numbers(line, k)
        if image not in index or image in values:
            again = image in values
            problem = f"a second line for {image[:80]}" if again else f"expected {form} in whole numbers"
            raise InputError(f"{path}:{n}: {line[:80]}: {problem}, of an image of image_ids.txt")
        values[image] = numbers
    for image in index:
        if image not in values:
            raise InputError(f"{path}: no line for {image}")
    return np.array([values[image] for image in index], dtype=np.int64)


def _numbers(line: str, k: int) -> tuple[str | None, list[int]]:
    """(image id, the k whole numbers after it) of a line; an id of None for a line of another form."""
    image, *values = line.rsplit(",", k)
    # int() alone would accept "1_0", digits of any script, and numbers that no array holds.
    if len(values) != k or not all(re.fullmatch("-?[0-9]{1,10}", value) for value in values):
        return None, []
    return image, [int(value) for value in values]


def leaves_root(path: str) -> bool:
    """Whether a path of a list leaves the folder that it is relative to."""
    return path.startswith("/") or ".." in path.split("/")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, line) of each line that is not empty."""
    try:
        with path.open(encoding="utf-8-sig") as file:  # some editors write a byte order mark
            for n, line in enumerate(file, 1):
                if line := line.strip():
                    yield n, line
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        fix = "data_splits/README.md describes the format"
        raise InputError(f"{path}: cannot be read ({reason}): {fix}") from error


# --------------------------------------------------------------------------------------------------- decoding


def decode(path: Path, listed: np.ndarray | None = None, upright: bool = False) -> Image.Image:
    """An image file as RGB. upright: rotated as its EXIF orientation says.

    listed: (width, height) for which its boxes were drawn. Raises InputError for an image that cannot be
    read, or that has another size than listed.
    """
    try:
        image = Image.open(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such image") from None
    except Exception as error:  # Pillow's readers raise errors of many types for a damaged header
        raise InputError(f"{path}: not an image that can be read ({first_line(error)})") from error
    with image:
        rgb = to_rgb(image, path, upright)
    if listed is not None and rgb.size != tuple(listed):
        sizes = f"{rgb.width} x {rgb.height} pixels where the list has {listed[0]} x {listed[1]}"
        raise InputError(f"{path}: {sizes}: its boxes would not fit")
    return rgb


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
    rgb.info.pop("exif", None)  # the orientation is applied now, or not wanted
    return rgb


def load_rgb(path: Path, size: int, listed: np.ndarray | None = None, upright: bool = False) -> Image.Image:
    """`decode`, then resize to size x size: bilinear, antialiased like torchvision's resize of PIL images."""
    return decode(path, listed, upright).resize((size, size), Image.Resampling.BILINEAR)


def load_masks(root: Path, masks: Masks, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(mask, ignore) of an image, size x size bool: the union of its instances; what to ignore outside it."""
    mask, ignore = np.zeros((2, size, size), dtype=bool)
    for paths, region in zip(masks, (mask, ignore)):
        for path in (root / relative for relative in paths):
            try:
                with Image.open(path) as image:
                    pixels = np.asarray(image.convert("L"))
            except Exception as error:
                raise InputError(f"{path}: missing or damaged mask ({first_line(error)})") from error
            # Nearest neighbour in double precision, like OpenCV's INTER_NEAREST in the evaluator of Choe et
            # al. At size 224, 105 of the widths 225 ... 1699 have a pixel at floor(x * n / size) - 1.
            rows, columns = (np.floor(np.arange(size) * (1 / (size / n))).astype(int) for n in pixels.shape)
            region |= pixels[rows[:, None], columns] > 0.5
    return mask, ignore & ~mask


# ----------------------------------------------------------------------------------------------- score maps


def load_score_maps(folder: str | Path, split: Split) -> Iterator[tuple[str, np.ndarray]]:
    """(image id, map) of each image, from DIR/<image id>.npy or DIR/<image id without extension>.npy.

    Raises InputError for a map that is missing, that two images share or that is not a .npy array.
    """
    folder, stems = Path(folder), Counter(os.path.splitext(image)[0] for image in split.ids)
    for image in split.ids:
        path, stem = folder / f"{image}.npy", os.path.splitext(image)[0]
        if not path.is_file() and stems[stem] == 1:
            path = folder / f"{stem}.npy"
        if not path.is_file():
            fix = "; other images differ in the suffix only: name the maps by whole ids"
            raise InputError(f"{folder / image}.npy: no score map for {image}{fix * (stems[stem] > 1)}")
        try:
            score_map = np.load(path, allow_pickle=False)
        except Exception as error:  # numpy parses the header as Python code: errors of many types
            raise InputError(f"{path}: not a .npy array ({first_line(error)})") from error
        yield image, as_score_map(score_map, path)


def as_score_map(values: Any, name: Any) -> np.ndarray:
    """A score map as float32, H x W in [0, 1]; values beyond by rounding, up to 1e-6, are clipped.

    values: an array, or a tensor of any type and device. name: for the InputError about an array of another
    form, or values that are NaN or outside [0, 1].
    """
    score_map = values.detach().cpu().double().numpy() if isinstance(values, Tensor) else values
    if not isinstance(score_map, np.ndarray) or score_map.ndim != 2 or not score_map.size:
        form = f"shape {score_map.shape}" if isinstance(score_map, np.ndarray) else type(values).__name__
        raise InputError(f"{name}: a score map must be one 2-D array of floats in [0, 1], got {form}")
    if score_map.dtype.kind not in "fiub":
        raise InputError(f"{name}: a score map must hold floats in [0, 1], got {score_map.dtype}")
    low, high = score_map.min(), score_map.max()
    if not -1e-6 <= low <= high <= 1 + 1e-6:  # false for NaN as well
        raise InputError(f"{name}: values in [{low:.9g}, {high:.9g}] where [0, 1] is expected")
    return score_map.astype(np.float32).clip(0, 1)


# --------------------------------------------------------------------------------------- images as a data set

SMALL = 2**27  # bytes: a training set that is smaller once resized is decoded once and kept in memory


class TrainImages(Dataset):
    """Training images: resize to resize_size, random crop of image_size, random horizontal flip.

    The sampler's items (epoch, index) are its indices. The crop depends on (seed, epoch, index) alone, so it
    is the same for any number of workers, in any order, and after a resume.
    Items: uint8 3 x image_size x image_size, label.
    """

    def __init__(self, split: Split, resize_size: int, image_size: int, seed: int):
        self.split, self.seed = split, seed
        self.resize_size, self.image_size = resize_size, image_size
        self.keep = len(split) * resize_size**2 * 3 <= SMALL
        self.kept: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.split)

    def pixels(self, index: int) -> np.ndarray:
        """The resized image: resize_size x resize_size x 3 uint8."""
        if (image := self.kept.get(index)) is None:
            path = self.split.path(index)
            image = np.asarray(load_rgb(path, self.resize_size, upright=self.split.upright))
            if self.keep:
                self.kept[index] = image
        return image

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = item
        rng = np.random.default_rng([self.seed, epoch, index])
        x, y = rng.integers(0, self.resize_size - self.image_size, size=2, endpoint=True)
        image = self.pixels(index)[y : y + self.image_size, x : x + self.image_size]
        return _to_tensor(image[:, ::-1] if rng.random() < 0.5 else image), int(self.split.labels[index])


class EvalImages(Dataset):
    """Images for evaluation, resized to image_size x image_size.

    Items: uint8 3 x image_size x image_size, label, index.
    """

    __test__ = False  # pytest would take a class of this name for a test case

    def __init__(self, split: Split, image_size: int):
        self.split, self.image_size = split, image_size

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        listed, upright = self.split.file_size(index), self.split.upright
        image = load_rgb(self.split.path(index), self.image_size, listed, upright)
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

    Call `set_epoch` before each pass. Each process takes a slice of the global batch of batch_size images.
    """

    def __init__(self, n: int, batch_size: int, seed: int):
        self.n, self.batch_size, self.seed, self.epoch = n, batch_size, seed, 1

    def set_epoch(self, epoch: int) -> None:
        """The epoch of the next pass, from 1."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.n // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.n)
        for start in range(0, self.n, self.batch_size):
            batch = order[start : start + self.batch_size]
            # If the last batch has fewer images than processes: one without images loads one, with weight 0.
            part = batch[rank() :: world_size()] if rank() < len(batch) else batch[:1]
            yield [(self.epoch, int(i)) for i in part]

    def size(self, batch: int) -> tuple[int, int]:
        """(number of images of this process that count, number of images of all processes) in a batch."""
        whole = min(self.batch_size, self.n - batch * self.batch_size)
        return len(range(rank(), whole, world_size())), whole


def train_loader(images: TrainImages, batch_size: int, workers: int) -> DataLoader:
    """Batches of (images: uint8 N x 3 x image_size x image_size, labels: N int64).

    Call `loader.batch_sampler.set_epoch` before each epoch. batch_size: of all processes together.
    """
    return _loader(images, workers, batch_sampler=EpochSampler(len(images), batch_size, images.seed))


def eval_loader(split: Split, batch_size: int, image_size: int, workers: int) -> DataLoader:
    """Batches of (images: uint8 N x 3 x image_size x image_size, labels: N int64, indices: N int64).

    In the order of the split. Of several processes, each gets every world_size-th image.
    """
    share = range(rank(), len(split), world_size())
    return _loader(EvalImages(split, image_size), workers, batch_size=batch_size, sampler=share)


eval_loader.__test__ = False  # not a test case


def _loader(dataset: Dataset, workers: int, **kwargs: Any) -> DataLoader:
    return DataLoader(
        dataset,
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=_ignore_interrupts,
        pin_memory=torch.cuda.is_available(),
        # Without its own generator the loader would draw from the stream that attentive dropout uses.
        generator=torch.Generator().manual_seed(0),
        **kwargs,
    )


def _ignore_interrupts(_: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the main process answers
