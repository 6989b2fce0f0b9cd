"""Images and their lists: `Split`, the list format, opening images, score-map files, loaders.

A split is a folder `<DATASET>/<train|val|test>/` of text files; data_splits/README.md describes them. Choe et
al. call train train-weaksup, and val train-fullsup: the images on which epochs and thresholds are chosen.

The batches of a run do not depend on the number of workers: every crop is drawn from (seed, epoch, index).
"""

from __future__ import annotations

import hashlib
import os
import re
import signal
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cache
from mmap import mmap
from pathlib import Path
from typing import Any, NamedTuple
from unicodedata import normalize

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
    root: Path  # ids, files and paths of masks are relative to it
    ids: list[str]  # names of the images, those of the list wherever the files are
    labels: np.ndarray  # N int64, from 0
    sizes: np.ndarray | None = None  # N x 2 int64, width and height in pixels; needed with boxes only
    boxes: dict[int, np.ndarray] = field(default_factory=dict)  # index -> G x 4 int64, pixels of the image
    masks: dict[int, Masks] = field(default_factory=dict)
    files: list[str] | None = None  # where the images are; None: ids
    # Rotate images as EXIF says. Not so in published data sets: their boxes lie on the stored pixels.
    upright: bool = False
    smaller: bool = False  # the files may be smaller copies of the images that sizes and boxes belong to
    from_disk: bool = False  # the ids are what the folders hold: no file can be missing

    def __len__(self) -> int:
        return len(self.ids)

    def path(self, index: int) -> Path:
        """The file of image `index`."""
        return self.root / (self.files or self.ids)[index]

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
            files=self.files and [self.files[i] for i in indices],
            labels=self.labels[indices],
            sizes=None if self.sizes is None else self.sizes[indices],
            boxes={new: self.boxes[old] for new, old in enumerate(indices) if old in self.boxes},
            masks={new: self.masks[old] for new, old in enumerate(indices) if old in self.masks},
        )

    def digest(self) -> str:
        """A hash of the images and their labels, in their order; it seeds resamples of the images."""
        content = repr((self.ids, self.labels.tolist())).encode("utf-8", "surrogateescape")
        return hashlib.sha256(content).hexdigest()[:16]

    def checksums(self) -> np.ndarray:
        """N uint32: the CRC-32 of each image's label, size, boxes and paths of masks."""
        sizes = np.zeros((len(self), 2), dtype=int) if self.sizes is None else self.sizes
        boxes = [self.boxes[i].tolist() if i in self.boxes else None for i in range(len(self))]
        masks = [self.masks.get(i) for i in range(len(self))]
        texts = map(repr, zip(self.labels.tolist(), sizes.tolist(), boxes, masks))
        checksums = [zlib.crc32(text.encode("utf-8", "surrogateescape")) for text in texts]
        return np.array(checksums, dtype=np.uint32)

    def fingerprint(self) -> dict[str, str | None]:
        """{"images": `digest`, "boxes": a hash of `checksums`, None without boxes and masks}."""
        located = bool(self.boxes or self.masks)
        boxes = hashlib.sha256(self.checksums().astype("<u4").tobytes()).hexdigest()[:16] if located else None
        return {"images": self.digest(), "boxes": boxes}

    def require_images(self) -> None:
        """Raises InputError if image files are missing. The message names the first one and counts them.

        Lists each folder once: a million single queries take minutes on a network disk.
        """

        @cache
        def names(folder: str) -> set[str]:
            return {*os.listdir(self.root / folder)} if (self.root / folder).is_dir() else set()

        # A file system may list a name in another spelling (accents, case): query the file then.
        parts = map(os.path.split, () if self.from_disk else self.files or self.ids)
        unlisted = [i for i, (folder, name) in enumerate(parts) if name not in names(folder)]
        missing = [i for i in unlisted if not self.path(i).is_file()]
        if missing:
            problem = f"no such image ({len(missing)} of the {len(self)} of {self.name} are missing)"
            fix = "is the data root another folder, or does the list belong to other data?"
            raise InputError(f"{self.path(missing[0])}: {problem}: {fix}")


# -------------------------------------------------------------------------------------------- the list format

MAX_NUMBER = 10**6  # a larger label, width or height is a mistake


def write_lists(folder: Path, lists: dict[str, list[str]]) -> None:
    """Writes {file name without .txt: lines} of one split."""
    for name, lines in lists.items():
        write_text(folder / f"{name}.txt", "".join(f"{line}\n" for line in lines))


def read_split(folder: Path, root: Path, name: str, num_classes: int | None = None) -> Split:
    """Reads the files of one folder; image_sizes.txt and localization.txt may be absent.

    Raises InputError with file and line for a line of another form or about another image, for an image that
    is listed twice or lacks a label or size, for a label outside 0 ... num_classes - 1, and for a box that is
    not inside its image.
    """
    path, index = folder / "image_ids.txt", {}
    for where, image, _ in rows(path):
        if image in index or not is_below(image):
            raise InputError(f"{where}: expected paths of images below the data root, each once")
        index[image] = len(index)
    if not index:
        raise InputError(f"{path}: empty")
    top = (num_classes or MAX_NUMBER) - 1
    labels = per_image(folder / "class_labels.txt", "image,label", index, range(top + 1))[:, 0]
    path, sizes = folder / "image_sizes.txt", None
    if path.exists() and path.stat().st_size:
        sizes = per_image(path, "image,width,height", index, range(1, MAX_NUMBER + 1))
    boxes, masks = read_localization(folder / "localization.txt", index, sizes)
    return Split(name, root, [*index], labels, sizes, boxes, masks)


def per_image(path: Path, form: str, index: dict[str, int], valid: range) -> np.ndarray:
    """N x k int64 from a file with one line of this form, k numbers after the image, for each of N images."""
    values: dict[str, list[int]] = {}
    rule = f"{form} once for each image of image_ids.txt, numbers from {valid[0]} to {valid[-1]}"
    for where, image, numbers in rows(path, form.count(",")):
        if image not in index or image in values or not numbers or not all(x in valid for x in numbers):
            raise InputError(f"{where}: expected {rule}")
        values[image] = numbers
    if len(values) < len(index):
        raise InputError(f"{path}: no line for {next(x for x in index if x not in values)}: expected {rule}")
    return np.array([values[image] for image in index], dtype=np.int64)


def read_localization(
    path: Path, index: dict[str, int], sizes: np.ndarray | None
) -> tuple[dict[int, np.ndarray], dict[int, Masks]]:
    """(boxes, masks) by index of the image; both are empty if there is no such file.

    Boxes: G x 4 int64, pixels, both corners inside. index: {image id: index}. sizes: N x 2, width and height.
    Raises InputError as `read_split` does, for the first bad line, with the number of the others.
    """
    boxes, masks, bad = defaultdict(list), defaultdict(lambda: Masks([], [])), []
    spellings = cache(lambda: {normalize("NFC", image) for image in index})
    for where, image, box in rows(path, 4) if path.exists() else ():
        image, *paths = [image] if box else image.rsplit(",", 2)
        i = index.get(image)
        if box and i is None:
            other = "; it is there in another Unicode normalization (NFC or NFD)"
            bad.append(f"{where}: no such image" + other * (normalize("NFC", image) in spellings()))
        elif box and sizes is None:
            bad.append(f"{where}: boxes need image_sizes.txt")
        elif box:
            (x0, y0, x1, y1), (width, height) = box, sizes[i]
            boxes[i].append(box)
            if not (0 <= x0 <= x1 < width and 0 <= y0 <= y1 < height):
                rule = f"0 <= x0 <= x1 < {width} and 0 <= y0 <= y1 < {height}, pixels of its image"
                bad.append(f"{where}: expected {rule}")
        elif i is None or len(paths) != 2 or not paths[0] or not all(map(is_below, paths)):
            forms = "image,x0,y0,x1,y1 (whole pixels) or image,mask,ignore (paths), of a listed image"
            bad.append(f"{where}: expected {forms}")
        else:
            masks[i].instances.append(paths[0])
            masks[i].ignore.extend(filter(None, paths[1:]))
    if bad:
        raise InputError(bad[0] + f" (and {len(bad) - 1} more lines)" * (len(bad) > 1))
    return {i: np.array(b) for i, b in boxes.items()}, dict(masks)


def rows(path: Path, k: int = 0) -> Iterator[tuple[str, str, list[int]]]:
    """("FILE:LINE: TEXT", image, its k numbers) of each line that is not empty.

    Of a line that is not an image and k whole numbers, with commas between: (..., the line, []).
    """
    try:
        with path.open(encoding="utf-8-sig") as file:  # some editors write a byte order mark
            for n, line in enumerate(map(str.strip, file), 1):
                image, *numbers = line.rsplit(",", k)
                # int() alone would accept "1_0", digits of any script, and numbers that no array holds.
                if len(numbers) != k or not all(re.fullmatch("-?[0-9]{1,10}", x) for x in numbers):
                    image, numbers = line, []
                if line:
                    yield f"{path}:{n}: {line[:80]}", image, [int(x) for x in numbers]
    except (OSError, UnicodeDecodeError) as error:
        reason = first_line(error) if isinstance(error, OSError) else "not UTF-8 text"
        fix = "data_splits/README.md describes the format"
        raise InputError(f"{path}: cannot be read ({reason}): {fix}") from error


def is_below(path: str) -> bool:
    """Whether a path of a list stays below the folder that it is relative to."""
    return not path.startswith("/") and ".." not in path.split("/")


# --------------------------------------------------------------------------------------------- opening images


def open_rgb(
    source: str | Path | Image.Image, listed: np.ndarray | None = None, upright: bool = False
) -> Image.Image:
    """An image, from a file or of Pillow, as RGB. upright: rotated as its EXIF orientation says.

    listed: (width, height) for which its boxes were drawn. Raises InputError for an image that cannot be
    read, of another size than listed, or with values of 32 bits that are not 0 ... 255.
    """
    given = isinstance(source, Image.Image)
    name = "image" if given else source
    try:
        with nullcontext(source) if given else Image.open(source) as stored:
            image = ImageOps.exif_transpose(stored) if upright else stored
            if image.mode.startswith("I;16") or (image.mode == "I" and stored.format == "PNG"):
                # 16 bits per pixel: Pillow would clip the values at 255.
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            low, high = image.getextrema() if image.mode in ("I", "F") else (0, 0)  # Pillow clips them, too
            rgb = image.convert("RGB")
    except FileNotFoundError:
        raise InputError(f"{name}: no such image") from None
    except Exception as error:  # Pillow's readers raise errors of many types for damaged files
        problem = f"not an image that can be read, or damaged ({first_line(error)})"
        raise InputError(f"{name}: {problem}") from error
    if not 0 <= low <= high <= 255 or (image.mode == "F" and 0 < high <= 1):
        raise InputError(f"{name}: values from {low:g} to {high:g} where 0 ... 255 are expected: convert it")
    if listed is not None and rgb.size != tuple(listed):
        sizes = f"{rgb.width} x {rgb.height} pixels where the list has {listed[0]} x {listed[1]}"
        raise InputError(f"{name}: {sizes}: its boxes would not fit")
    return rgb


def resized(image: Image.Image, size: int) -> np.ndarray:
    """size x size x 3 uint8: bilinear, antialiased like torchvision's resize of PIL images."""
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))


def load_masks(
    root: Path, masks: Masks, size: int, listed: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, list[tuple[str, str]]]:
    """(mask, ignore, remarks) of an image.

    mask, ignore: size x size bool, the union of its instances; what to ignore outside of it. remarks: what
    the reader of a mask may not expect, as (text, file and values). listed: (width, height) of the image.
    Raises InputError as `open_mask` does.
    """
    mask, ignore = np.zeros((2, size, size), dtype=bool)
    remarks: list[tuple[str, str]] = []
    for paths, region in zip(masks, (mask, ignore)):
        for path in (root / relative for relative in paths):
            pixels = open_mask(path, listed, remarks, of_object=region is mask)
            # Nearest neighbour in double precision, like OpenCV's INTER_NEAREST in the evaluator of Choe et
            # al. At size 224, 105 of the widths 225 ... 1699 have a pixel at floor(x * n / size) - 1.
            rows, columns = (np.floor(np.arange(size) * (1 / (size / n))).astype(int) for n in pixels.shape)
            region |= pixels[rows[:, None], columns] > 0.5
    return mask, ignore & ~mask, remarks


def open_mask(
    path: Path, listed: np.ndarray | None, remarks: list[tuple[str, str]], of_object: bool
) -> np.ndarray:
    """The grey values of a mask, h x w uint8; above 0 is object (Choe et al.). Adds to the remarks.

    Raises InputError for a file that cannot be read, for an alpha channel that is not constant, which may be
    the mask, and for the shape of the image turned by 90 degrees.
    """
    low = high = 0
    try:
        with Image.open(path) as image:
            if image.has_transparency_data:
                low, high = image.convert("RGBA").getchannel("A").getextrema()
            grey = image.convert("L")
    except Exception as error:
        raise InputError(f"{path}: missing or damaged mask ({first_line(error)})") from error
    if low != high:
        raise InputError(f"{path}: the mask has an alpha channel that is not constant: save it as grey")
    values = [value for value, count in enumerate(grey.histogram()) if count]
    if len(values) > 2:
        text = "have more than two values: every pixel above 0 counts as object"
        remarks.append((text, f"{path}: {len(values)} values"))
    if values[0] and of_object:
        text = "have no pixel of value 0: the whole image counts as object"
        remarks.append((text, f"{path}: values from {values[0]}"))
    if listed is not None and not _alike(grey.size, *listed):
        sizes = f"{grey.width} x {grey.height} pixels for an image of {listed[0]} x {listed[1]}"
        if _alike(grey.size, *listed[::-1]):
            raise InputError(f"{path}: a mask of {sizes}: was it drawn on the rotated photo?")
        text = "have another aspect ratio than their image: they are stretched"
        remarks.append((text, f"{path}: {sizes}"))
    return np.asarray(grey)


def _alike(size: tuple[int, int], width: int, height: int) -> bool:
    """Whether a mask has the aspect ratio of the image within 2 %, or but for the rounding to pixels."""
    w, h = size
    rounding = abs(w * height - h * width) < max(width, height)
    return rounding or abs(w * height / (h * width) - 1) <= 0.02


def remark_lines(name: str, remarks: Iterable[tuple[str, str]]) -> list[str]:
    """A line for each kind of remark on the masks of a split, with the number of files and the first."""
    found = defaultdict(list)
    for text, detail in remarks:
        found[text].append(detail)
    return [f"{name}: {len(of)} masks {text} (first {of[0]})" for text, of in found.items()]


# ----------------------------------------------------------------------------------------------- score maps


def load_score_maps(folder: str | Path, split: Split) -> Iterator[tuple[str, np.ndarray]]:
    """(image id, map) of each image, from DIR/<image id>.npy or DIR/<image id without extension>.npy.

    Of several processes, each gets every world_size-th image. Raises InputError for a map that is missing,
    that two images share or that is not a .npy array.
    """
    folder, stems = Path(folder), Counter(os.path.splitext(image)[0] for image in split.ids)
    for image in split.ids[rank() :: world_size()]:
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
    is_array = isinstance(score_map, np.ndarray)
    if not is_array or score_map.ndim != 2 or not score_map.size or score_map.dtype.kind not in "fiub":
        form = f"{score_map.dtype} of shape {score_map.shape}" if is_array else type(values).__name__
        raise InputError(f"{name}: a score map must be one 2-D array of floats in [0, 1], got {form}")
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
        self.kept = self.is_kept = None
        if (size := len(split) * resize_size**2 * 3) <= SMALL:
            # Memory that forked workers share, so that one decodes for all, in all loaders.
            kept, is_kept = (np.frombuffer(mmap(-1, n), np.uint8) for n in (size, len(split)))
            self.kept, self.is_kept = kept.reshape(len(split), resize_size, resize_size, 3), is_kept

    def __len__(self) -> int:
        return len(self.split)

    def pixels(self, index: int) -> np.ndarray:
        """The resized image: resize_size x resize_size x 3 uint8."""
        if self.kept is not None and self.is_kept[index]:
            return self.kept[index]
        image = resized(open_rgb(self.split.path(index), upright=self.split.upright), self.resize_size)
        if self.kept is not None:
            self.kept[index], self.is_kept[index] = image, True
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

    def __init__(self, split: Split, image_size: int):
        self.split, self.image_size = split, image_size

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        image = open_rgb(self.split.path(index), self.split.file_size(index), self.split.upright)
        return _to_tensor(resized(image, self.image_size)), int(self.split.labels[index]), index


def _to_tensor(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def to_input(images: Tensor, device: torch.device) -> Tensor:
    """uint8 N x 3 x H x W -> float32 on the device, channels last, normalized with ImageNet's statistics.

    Moves bytes to the device and converts them there: a quarter of the traffic.
    """
    # torch.tensor(x, device=device) would wait, in every step, until the GPU has done all steps before.
    values = (torch.tensor(x).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    mean, std = (x.to(device, non_blocking=True) for x in values)
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

    In the order of the split. Of several processes, each gets every world_size-th of these batches: others
    would round differently.
    """
    starts = range(0, len(split), batch_size)[rank() :: world_size()]
    batches = [range(start, min(start + batch_size, len(split))) for start in starts]
    return _loader(EvalImages(split, image_size), workers, batch_sampler=batches)


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
