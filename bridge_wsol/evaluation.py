"""From a network or files to numbers: score maps of a split, their metrics, trained runs, results files.

The protocol is that of Choe et al. (CVPR 2020): the map of the ground-truth class, bicubic resize, min-max
per image; `boxes` and `metrics` do the rest. For one's own maps, from Python:

    evaluate_score_maps(((name, my_map(name)) for name in split.ids), split)
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain, repeat, zip_longest
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from . import cam, config, metrics, utils
from .boxes import LEVELS, scale_boxes
from .data import Split, as_score_map, eval_loader, load_masks, remark_lines, to_input
from .datasets import is_folder, lists_folder, load_splits
from .losses import full_precision
from .methods import CAM, find
from .metrics import LEVEL_NAMES, ImageResult, PerImage, flat, label_ranks, measure, selection_score, tree_map
from .models import load_weights, read_weights
from .utils import InputError

# ------------------------------------------------------------------------------------------- score maps


class MapBatch(NamedTuple):
    """Score maps of some images of a split."""

    indices: list[int]
    maps: np.ndarray  # N x size x size float32 in [0, 1]
    logits: np.ndarray | None = None  # N x K; None without a classifier


@torch.inference_mode()
def network_maps(
    method: CAM,
    loader: DataLoader,
    amp: str,
    normalize: str | None = "minmax",
    percentile: float | None = None,
) -> Iterator[MapBatch]:
    """Score map of the ground-truth class and logits, for every image: one forward pass each.

    normalize None: the maps as the method returns them, N x h x w, unbounded.
    """
    method.eval()
    device = next(method.parameters()).device
    for images, labels, indices in loader:
        with utils.autocast(device, amp):
            logits, maps = method.predict(to_input(images, device), labels.to(device))
        if normalize is not None:
            maps = cam.resize(maps, method.config.image_size, method.upsampling)
            maps = cam.normalize(maps, normalize, percentile)
        yield MapBatch(indices.tolist(), maps.cpu().numpy(), full_precision(logits).cpu().numpy())


def pair_maps(
    pairs: Iterable[tuple[Any, ...]],
    split: Split,
    *,
    image_size: int,
    normalize: str = "minmax",
    percentile: float | None = None,
) -> Iterator[MapBatch]:
    """Batches of one image from (image id, score map) pairs, in any order; a third item holds K logits.

    A map is H x W, floats in [0, 1], of any size: it is resized (bicubic) to image_size and normalized.
    Of several processes, each has the pairs of every world_size-th image. Raises InputError for an id that is
    not in this share of the split or comes twice, for images of it that have not come at the end, and for a
    map or logits of another form.
    """
    share = range(utils.rank(), len(split), utils.world_size())
    index_of = {split.ids[index]: index for index in share}
    for image, score_map, *logits in pairs:
        index = index_of.pop(image, None)
        if index is None:
            raise InputError(f"{image}: not an image of {split.name}, or its second score map")
        maps = cam.resize(torch.from_numpy(as_score_map(score_map, image))[None], image_size)
        batch = MapBatch([index], cam.normalize(maps, normalize, percentile).numpy())
        if logits:
            scores = np.array(logits[0], dtype=float, ndmin=2)
            if scores.shape[:-1] != (1,) or scores.shape[1] <= split.labels[index]:
                raise InputError(f"{image}: logits must be a list of numbers, one for each class")
            batch = batch._replace(logits=scores)
        yield batch
    if index_of:
        first = next(iter(index_of))
        raise InputError(f"{split.name}: {len(index_of)} images without a score map, {first} first")


def save_maps(batches: Iterable[MapBatch], split: Split, folder: Path) -> Iterator[MapBatch]:
    """The batches, each map written to folder/<image id>.npy on its way."""
    for batch in batches:
        for index, score_map in zip(batch.indices, batch.maps):
            path = Path(folder) / f"{split.ids[index]}.npy"
            with utils.atomic_write(path) as part, part.open("wb") as file:
                np.save(file, score_map)
        yield batch


# ---------------------------------------------------------------------------------------------- metrics


class Evaluated(NamedTuple):
    """The evaluation of a split."""

    result: dict[str, Any]  # of `PerImage.result`, and "intervals"
    per_image: PerImage
    images: list[ImageResult]  # with IoUs and boxes if they were to be kept


def evaluate_maps(
    batches: Iterable[MapBatch],
    split: Split,
    *,
    workers: int = 0,
    val_levels: dict[str, int] | None = None,
    threshold: float | None = None,
    intervals: bool = False,
    keep: bool = False,
) -> Evaluated:
    """All metrics of the score maps of a split; the same in every process. `workers` changes no result.

    workers: processes that sweep maps while the network makes the next ones.
    val_levels: levels chosen on val, for the accuracy at thresholds that did not see this split.
    threshold: a fixed one, a fraction of each map's maximum, for "fixed_threshold" in the metrics.
    intervals: add "intervals", [low, high] of each metric; in the first process alone.
    keep: keep IoUs and boxes of every image. Raises InputError as `PerImage.stack` does, and for a threshold
    outside [0, 1); ValueError where an image has no map or two.
    """
    require_threshold(threshold)
    own: list[tuple[int, ImageResult]] = []
    blank, share = 0, len(range(utils.rank(), len(split), utils.world_size()))
    items = (
        x for at, maps, logits in batches for x in zip(at, maps, repeat(None) if logits is None else logits)
    )
    measured = utils.imap(partial(measure_image, split, threshold), items, workers)
    for (index, score_map, _), result in utils.progress(measured, split.name, share):
        own.append((index, result if keep else result._replace(ious=None, largest=None)))
        blank += not score_map.any()
    if blank := sum(utils.all_gather(blank)):
        problem = "maps are constant, all zero or not finite: they have no box"
        utils.print_rank0(f"{blank} of {len(split)} {problem}")
    everything = sorted(chain(*utils.all_gather(own)), key=lambda x: x[0])
    if [index for index, _ in everything] != [*range(len(split))]:
        raise ValueError(f"{split.name}: {len(everything)} maps; each of {len(split)} images needs one")
    images = [result for _, result in everything]
    for line in remark_lines(split.name, (remark for image in images for remark in image.remarks)):
        utils.print_rank0(line)
    per_image = PerImage.stack(images, val_levels, threshold)
    if per_image.pixels is not None and not per_image.pixels[:, 0].any():
        raise InputError(f"{split.name}: no mask has an object pixel: every pixel above 0 counts as object")
    result = per_image.result()
    if intervals and utils.rank() == 0:
        result["intervals"] = metrics.intervals([per_image], split.digest())
    return Evaluated(result, per_image, images)


def evaluate_score_maps(
    pairs: Iterable[tuple[Any, ...]],
    split: Split,
    *,
    image_size: int = 224,
    normalize: str = "minmax",
    percentile: float | None = None,
    workers: int = 0,
    val_levels: dict[str, int] | None = None,
    threshold: float | None = None,
    intervals: bool = False,
) -> dict[str, Any]:
    """The metrics of any method's maps, as a results file has them.

    pairs, image_size, normalize, percentile: of `pair_maps`. The others: of `evaluate_maps`.
    """
    batches = pair_maps(pairs, split, image_size=image_size, normalize=normalize, percentile=percentile)
    how = dict(workers=workers, val_levels=val_levels, threshold=threshold, intervals=intervals)
    return evaluate_maps(batches, split, **how).result


def measure_image(split: Split, threshold: float | None, item: tuple[Any, ...]) -> ImageResult:
    """The work that runs beside the network. item: index, score map, logits of an image."""
    index, score_map, logits = item
    boxes, masks, remarks = None, None, []
    if index in split.boxes:
        boxes = scale_boxes(split.boxes[index], tuple(split.sizes[index]), len(score_map))
    if index in split.masks:
        size = None if split.sizes is None else split.sizes[index]
        *masks, remarks = load_masks(split.root, split.masks[index], len(score_map), size)
    result = measure(score_map, boxes, masks, threshold)._replace(remarks=tuple(remarks))
    if logits is None:
        return result
    rank = label_ranks(logits[None], split.labels[[index]])[0]
    return result._replace(rank=int(rank), predicted=int(logits.argmax()))


def require_threshold(threshold: float | None) -> None:
    """Raises InputError for a fixed threshold outside [0, 1)."""
    if threshold is not None and not 0 <= threshold < 1:
        raise InputError(f"threshold {threshold}: must be in [0, 1)")


def write_per_image(path: Path, split: Split, evaluated: Evaluated) -> None:
    """A CSV line per image: IoU at each chosen threshold; box of the largest contour, in map pixels.

    evaluated: with IoUs and boxes kept.
    """
    text, levels = io.StringIO(), evaluated.result["levels"]
    rows = csv.writer(text, lineterminator="\n")
    head = ["id", "label", "predicted", *(f"iou_{name}" for name in LEVEL_NAMES), "x0", "y0", "x1", "y1"]
    rows.writerow(head)
    for image, label, found in zip(split.ids, split.labels, evaluated.images):
        of_boxes: list[Any] = [None] * 8
        if found.ious is not None:
            of_boxes = [f"{found.ious[int(name == 'largest'), levels[name]]:.6f}" for name in LEVEL_NAMES]
            of_boxes += [*found.largest[levels["largest"]]]
        rows.writerow([image, label, found.predicted, *of_boxes])
    utils.write_text(path, text.getvalue())


# -------------------------------------------------------------------------------------------- results files


def results_name(
    checkpoint: str,
    split: str,
    normalize: str = "minmax",
    percentile: float | str | None = None,
    map_options: dict[str, Any] | None = None,
) -> str:
    """The name of a results file.

    percentile: None for the default; "val" for one that val chose. map_options: the values that were changed.
    """
    name = f"results_{checkpoint}_{split}"
    name += "" if normalize == "minmax" else f"_{normalize}"
    name += "" if percentile is None else f"_{percentile}"
    return name + "".join(f"_{key}={value}" for key, value in (map_options or {}).items()) + ".json"


def report(path: Path, evaluated: Evaluated, split: Split, head: dict[str, Any], table: bool = True) -> None:
    """Writes the results file, head first, and the file per image beside it; then prints the table.

    Percent; thresholds as fractions of the 255 levels. The first process writes and prints.
    """
    try:
        if utils.rank() == 0:
            utils.write_json(path, head | evaluated.result)
            save_per_image(per_image_path(path), evaluated.per_image, split)
    finally:  # also where the files cannot be written
        if table:
            print_table(evaluated.result, head)
    utils.print_rank0(f"written to {path}")


# Rows of the printed table: name, key in `metrics.flat`, note with the thresholds.
TABLE = (
    ("MaxBoxAccV2", "v2_mean", "mean of the three"),
    ("  IoU 30", "v2_30", "at threshold {t30:.3f}"),
    ("  IoU 50", "v2_50", "at threshold {t50:.3f}"),
    ("  IoU 70", "v2_70", "at threshold {t70:.3f}"),
    ("GT-known Loc", "gt_known_loc", "all contours, = MaxBoxAccV2 at IoU 50"),
    ("GT-known Loc", "gt_known_loc_largest", "largest contour, = MaxBoxAcc, at threshold {tlargest:.3f}"),
    ("Top-1 Loc", "top1_loc", "all contours"),
    ("Top-5 Loc", "top5_loc", "all contours"),
    ("MaxBoxAccV2", "v2_at_val", "at the thresholds chosen on val"),
    ("GT-known Loc", "fixed_gt_known_loc", "{fixed}"),
    ("Top-1 Loc", "fixed_top1_loc", "{fixed}"),
    ("Top-5 Loc", "fixed_top5_loc", "{fixed}"),
    ("PxAP", "pxap", ""),
    ("peak IoU", "piou", ""),
    ("Top-1 cls", "top1_cls", ""),
    ("Top-5 cls", "top5_cls", ""),
)


def print_table(result: dict[str, Any], head: dict[str, Any]) -> None:
    """The metrics of a results file, with their intervals and thresholds."""
    title = [f"{head['dataset']} {head['split']}"]
    if head["method"]:
        epoch = f" checkpoint (epoch {head['epoch']})" if head["epoch"] else ""
        title += [f"{head['arch']} {head['method']}", f"{head['checkpoint']}{epoch}"]
        title += [f"{name} {head[name]}" for name in find(head["method"]).map_options if name in head]
    else:
        title.append(f"score maps of {head['score_maps']}")
    if "percentile" in head:
        title.append(f"{head['normalize']} at percentile {head['percentile']['value']:.2f}")
    title.append(f"{result['images']} images")
    counts = {key: n for key, n in result.items() if key.startswith("images_with_")}
    title += [f"{n} with {key.removeprefix('images_with_')}" for key, n in counts.items()]
    brackets = "intervals" in result
    utils.print_rank0(f"{', '.join(title)} (percent{', [95 % interval over images]' if brackets else ''})")
    notes = {f"t{name}": threshold for name, threshold in (result["thresholds"] or {}).items()}
    if fixed := result["metrics"].get("fixed_threshold"):
        notes["fixed"] = f"largest contour, at {fixed['threshold']:g} of each map's maximum"
    values, bounds = flat(result["metrics"]), flat(result.get("intervals", {}))
    for name, key, note in TABLE:
        if (value := values.get(key)) is not None:
            text = "[{:.1f}, {:.1f}]".format(*bounds[key]) if bounds.get(key) else ""
            line = f"  {name:<14}{value:6.2f} {text:<{14 if brackets else 0}} {note.format(**notes)}"
            utils.print_rank0(line.rstrip())


def read_results(
    run: Path, checkpoint: str, split: str, normalize: str = "minmax"
) -> tuple[Path, dict[str, Any]]:
    """(path, content) of a run's results file, or of `run` where that is a results file itself.

    Its "fingerprint" is that of the run, with the part of the evaluated split; a file of an earlier version
    has what config.json tells.
    Raises InputError for a missing or damaged file, naming the command that makes it.
    """
    path, command = run, "python evaluate.py --score-maps DIR --dataset NAME --out FILE"
    if run.suffix != ".json":
        path, command = run / results_name(checkpoint, split, normalize), f"python evaluate.py {run}"
        command += f" --checkpoint {checkpoint} --split {split} --normalize {normalize}"
    result = utils.read_json(path, command)
    curves = result.get("curves") or {}
    known = isinstance(result.get("metrics"), dict) and "dataset" in result and "pxap" in result["metrics"]
    if not known or not isinstance(curves, dict) or any(len(c) != LEVELS for c in curves.values()):
        raise InputError(f"{path}: not a results file; it is made by: {command}")
    if "fingerprint" not in result:
        of_run = {} if path == run else {"values": config.fingerprint(config.read_config(run))}
        result["fingerprint"] = of_run
    return path, result


class Stored(NamedTuple):
    """The content of a file per image."""

    per_image: PerImage
    digest: str  # of the split
    ids: list[str]
    truth: np.ndarray  # N uint32, `Split.checksums`


def per_image_path(results: Path) -> Path:
    """The file per image beside a results file."""
    return results.with_name(results.name.removesuffix(".json") + ".npz")


def save_per_image(path: Path, per_image: PerImage, split: Split) -> None:
    """Writes `PerImage.arrays`, and which images they are of."""
    content = {"digest": split.digest(), "ids": split.ids, "truth": split.checksums(), **per_image.arrays()}
    with utils.atomic_write(path) as part, part.open("wb") as file:
        np.savez_compressed(file, **content)


def load_per_image(results: Path, expected: dict[str, Any]) -> Stored:
    """The file per image beside a results file with the metrics `expected`.

    Raises InputError for a missing or damaged one, and for one of another evaluation.
    """
    path = per_image_path(results)
    try:
        with np.load(path) as file:
            found = dict(file)
        ids, digest, truth = found.pop("ids").tolist(), str(found.pop("digest")), found.pop("truth")
        stored = Stored(PerImage.of_arrays(found), digest, ids, truth)
        int(digest, 16)
        if not len(ids) == len(truth) == len(stored.per_image.boxed):
            raise ValueError("arrays of different lengths")
        measured = stored.per_image.result()["metrics"]
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file: evaluate again, evaluate.py writes it") from error
    except Exception as error:  # a damaged archive raises errors of ten kinds
        raise InputError(f"{path}: not a file per image: evaluate again") from error
    # Other versions of NumPy may sum PxAP in another order.
    if tree_map(lambda x: round(x, 6), measured) != tree_map(lambda x: round(x, 6), expected):
        raise InputError(f"{path}: not of the evaluation in {results.name}: evaluate again")
    return stored


def require_same_images(files: dict[Path, Stored]) -> None:
    """Raises InputError where these files are not of the same images with the same labels and boxes."""
    (first, known), *others = files.items()
    for path, other in others:
        pairs = zip_longest(zip(known.ids, known.truth.tolist()), zip(other.ids, other.truth.tolist()))
        image = next(((a or b)[0] for a, b in pairs if a != b), None)
        if image is not None:
            what = "images, labels, sizes, boxes or mask paths"
            raise InputError(f"{path}: other {what} than {first} has; the first that differs is {image}")


# ---------------------------------------------------------------------------------------------- trained runs

# What a checkpoint holds; with another type or without it, the file is of another program or version.
CHECKPOINT = dict(model=dict, optimizer=dict, random_states=dict, config=dict, sources=dict, fingerprint=dict)
CHECKPOINT |= dict(epoch=int, num_classes=int, classes=list | None, val=dict | None, best=dict | None)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of train.py, on the CPU. Raises InputError for another file."""
    checkpoint = utils.load_tensors(path)
    wrong = [name for name, kind in CHECKPOINT.items() if not isinstance(checkpoint.get(name, ...), kind)]
    wrong = wrong or [name for name in config.RUN_VALUES if name not in checkpoint["config"]]
    if wrong:
        problem = f"({wrong[0]} is missing or has the wrong type)"
        raise InputError(f"{path}: not a checkpoint of this version of train.py {problem}")
    return checkpoint


def foreign_checkpoint(path: Path, dataset: str, arch: str, stride: int | None = None) -> dict[str, Any]:
    """A file of another code (`models.read_weights`) as a checkpoint of the CAM baseline.

    stride: of its training; None: the file tells it. Raises InputError where it does not, and for a file
    without conv6 or fc.
    """
    state, told = read_weights(path, arch)
    if not isinstance(fc := state.get("fc.weight"), Tensor):
        held = ", ".join([*state][:3]) or "nothing"
        raise InputError(f"{path}: expected a network with conv6 and fc; the file holds {held}, ...")
    if told is None and stride is None:
        raise InputError(f"{path}: the file does not tell the stride: pass the --stride of its training")
    if told and stride and told != stride:
        raise InputError(f"--stride {stride}: the layers of {path} say {told}")
    given = {"dataset": dataset, "arch": arch, "method": "cam", "stride": told or stride, "val_per_class": 0}
    values, sources = config.resolve_config(given)
    known = {"num_classes": len(fc), "classes": None, "epoch": None, "val": None}
    what = {"config": vars(values), "sources": sources}
    return known | what | {"model": state, "fingerprint": {"values": config.fingerprint(vars(values))}}


def thresholds_of(result: dict[str, Any]) -> dict[str, Any]:
    """What a result of val says of thresholds: fields of `Chosen`, kept in a checkpoint."""
    curves, boxed = result["curves"], result.get("images_with_boxes", result["images"])
    middle = curves and metrics.middle_level(curves["largest"])
    return {"levels": result["levels"], "boxed": boxed if curves else 0, "middle": middle}


class Chosen(NamedTuple):
    """What val gives for maps of one normalization: `TrainedRun.choose`."""

    levels: dict[str, int] | None  # by LEVEL_NAMES; None: no thresholds, `reason` tells why
    percentile: float | None = None  # of the normalization; None: its default
    reason: str = ""  # also where the thresholds are not those of the training
    scores: dict[str, Any] | None = None  # of each percentile, where val chose it
    boxed: int = 0  # images of val with boxes
    middle: int | None = None  # of the best levels of the largest contour

    def for_photos(self) -> tuple[int | None, str]:
        """(level of the largest contour, note) for boxes of new images.

        The middle one of the best levels: on few images many are equally good. None, and the note tells why,
        where val has no boxes, or fewer than ENOUGH_BOXED images with boxes.
        """
        if 0 < self.boxed < ENOUGH_BOXED:
            few = f"val has {self.boxed} images with boxes, {ENOUGH_BOXED} are needed to choose a threshold"
            return None, few
        return self.middle, self.reason

    def head(self, normalize: str) -> dict[str, Any]:
        """The percentile as in a results file; empty for a normalization without one."""
        q = cam.PERCENTILES.get(normalize) if self.percentile is None else self.percentile
        return {} if q is None else {"percentile": {"value": q, **(self.scores or {})}}


# Images of val with boxes from which on its threshold serves photos: docs/results/thresholds.md.
ENOUGH_BOXED = 50
NO_BOXES = "no thresholds of val: it has no boxes"
CHANGED = "the boxes of val have changed since the training: thresholds are chosen anew"
QS = tuple(round(0.05 * i, 2) for i in range(1, 15))  # IVR's percentiles to choose from: 0.05, ..., 0.70


class TrainedRun:
    """A run of train.py: its method with the weights of RUN/<checkpoint>.pt in eval mode, and its data.

    `method.net` is the network, a torch module; `state` the content of the checkpoint. checkpoint: "best" or
    "last". device: as --device.
    data_root, lists, amp: instead of those of the run. data_root is the new place of a folder of one's own,
    or the folder above it. batch_size, workers: of evaluations; they change no metric but by rounding.
    map_options: values of the method's map, instead of those of the run. state: instead of the file.
    Raises InputError for a folder that is not a run, and for a value that is not one of its map.
    """

    def __init__(
        self,
        folder: str | Path,
        checkpoint: str = "best",
        device: str | torch.device = "auto",
        *,
        data_root: str | Path | None = None,
        lists: str | Path | None = None,
        amp: str | None = None,
        batch_size: int = 32,
        workers: int = 0,
        map_options: dict[str, Any] | None = None,
        state: dict[str, Any] | None = None,
    ):
        self.folder, self.name, self.map_options = Path(folder), checkpoint, map_options or {}
        path = self.folder if state else self.folder / f"{checkpoint}.pt"
        self.state = state or load_checkpoint(path)
        self.config = SimpleNamespace(**self.state["config"] | self.map_options)
        self.data_root, self.lists = data_root, lists_folder(self.config.dataset, lists or self.config.lists)
        self.device = device if isinstance(device, torch.device) else utils.resolve_device(device)
        self.amp, _ = utils.resolve_amp(amp or self.config.amp, self.device)
        self.batch_size, self.workers = batch_size, workers
        try:
            cls = find(self.config.method)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        for name, value in self.map_options.items():
            if name not in cls.map_options:
                problem = f"method {self.config.method} of {folder} has no such value"
                raise InputError(f"{name}: {problem}")
            cls.all_values()[name].check(name, value)
        self.method = cls(self.config, self.state["num_classes"])
        load_weights(self.method.net, self.state["model"], path)
        self.method.to(self.device, memory_format=torch.channels_last).eval()

    def split(self, name: str, images: bool = True) -> Split:
        """A split of the run's data set. images: whether its files are needed.

        Raises InputError as `load_splits` does, and where the lists have other classes or other images of val
        than the run had: its thresholds would be chosen on images that it may have seen.
        """
        c, then = self.config, self.state
        dataset, data_root = c.dataset, self.data_root or c.data_root
        if self.data_root and is_folder(dataset, self.lists):  # the folder has moved
            moved = Path(data_root) / Path(dataset).name
            dataset = os.path.join(moved if moved.is_dir() else data_root, "")
        splits, now = load_splits(dataset, data_root, self.lists, (name,), c.val_per_class, images)
        for key in ("num_classes", "classes"):
            if now[key] != then[key] and then[key] is not None:
                problem = f"trained on other classes than {c.dataset} has now"
                raise InputError(f"{self.folder}: {problem}: check lists")
        before = then["fingerprint"].get("val")
        if name == "val" and before and now["lists"]["val"]["images"] != before["images"]:
            raise InputError(f"{self.folder}: the list of val has changed since the run: check lists")
        return splits[name]

    def maps(
        self, split: Split, normalize: str | None = "minmax", percentile: float | None = None
    ) -> Iterator[MapBatch]:
        """`network_maps` of a split."""
        loader = eval_loader(split, self.batch_size, self.config.image_size, self.workers)
        return network_maps(self.method, loader, self.amp, normalize, percentile)

    def choose(
        self, normalize: str = "minmax", percentile: float | str | None = None, val: Split | None = None
    ) -> Chosen:
        """The thresholds that val gives for maps of this normalization.

        Those that the training chose hold for its own map with min-max, while the boxes of val are the same.
        Else val is evaluated with these maps. percentile: of `cam.normalize`; "val": val chooses IVR's, the
        one with the best `selection_score`, the lowest of equals. val: the split, where it is open already.
        Raises InputError for "val" with another normalization, or where val cannot choose.
        """
        if percentile == "val" and normalize != "ivr":
            raise InputError("percentile val needs normalize ivr")
        known, changed = self.state["val"], False
        own_map = normalize == "minmax" and not self.map_options
        if own_map and known and known["epoch"] == self.state["epoch"] and "middle" in known:
            changed = self._val_boxes_changed(val)
            if not changed:
                found = {name: known[name] for name in ("levels", "boxed", "middle")}
                return Chosen(**found, reason="" if found["levels"] else NO_BOXES)
        try:
            val = val or self.split("val")
        except InputError as error:
            if percentile == "val":
                raise
            return Chosen(None, percentile, f"no thresholds of val: {error}")
        if percentile == "val":
            return self._choose_percentile(val)
        if not val.boxes:
            return Chosen(None, percentile, NO_BOXES)
        maps = self.maps(val, normalize, percentile)
        found = thresholds_of(evaluate_maps(maps, val, workers=self.workers).result)
        return Chosen(**found, percentile=percentile, reason=CHANGED if changed else "")

    def _val_boxes_changed(self, val: Split | None) -> bool:
        """Whether val has other boxes than in the training; False where its lists are not there."""
        c, before = self.config, self.state["fingerprint"]["val"]
        try:
            if val is None and (is_folder(c.dataset, self.lists) or (self.lists / c.dataset).is_dir()):
                val = self.split("val", images=False)
        except InputError:
            pass  # other images, or none: the thresholds are those of the training's val
        return val is not None and val.fingerprint()["boxes"] != before["boxes"]

    def _choose_percentile(self, split: Split) -> Chosen:
        if not split.boxes and not split.masks:
            raise InputError(f"percentile val: {split.name} has neither boxes nor masks: pass a number")
        kept, scores, found = list(self.maps(split, None)), {}, {}

        def normalized(q: float) -> Iterator[MapBatch]:
            for batch in kept:
                maps = torch.from_numpy(batch.maps)
                maps = cam.resize(maps, self.config.image_size, self.method.upsampling)
                yield batch._replace(maps=cam.normalize(maps, "ivr", q).numpy())

        for q in QS:
            result = evaluate_maps(normalized(q), split, workers=self.workers).result
            by, scores[q] = selection_score(result["metrics"])
            found[q] = thresholds_of(result)
        best = max(QS, key=scores.__getitem__)
        how = {"chosen_on": "val", "by": by, "scores": scores}
        return Chosen(**found[best], percentile=best, scores=how)

    def head(self, split: Split, name: str, normalize: str = "minmax") -> dict[str, Any]:
        """The first keys of the results file of a split of this name."""
        keys = {key: getattr(self.config, key) for key in ("dataset", "arch", "method", "seed")}
        of_map = dict(split=name, checkpoint=self.name, epoch=self.state["epoch"], normalize=normalize)
        what = self.state["fingerprint"] | {name: split.fingerprint()}
        return keys | self.map_options | of_map | {"fingerprint": what}
