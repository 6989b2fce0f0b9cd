"""From a network or files to numbers: score maps of a split, their metrics, trained runs, boxes for photos.

The protocol is that of Choe et al. (CVPR 2020): the map of the ground-truth class, bicubic resize, min-max
per image; `boxes` and `metrics` do the rest. For use from Python:

    found = Localizer("runs/CUB_vgg16_bridge")("photo.jpg")                       boxes for one's own images
    evaluate_score_maps(((name, my_map(name)) for name in split.ids), split)      metrics for one's own maps
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_bounding_boxes, make_grid

from . import bootstrap, cam, utils
from .boxes import LEVELS, fixed_level, iou_matrix, level_boxes, scale_boxes
from .data import Masks, Split, as_score_map, eval_loader, load_masks, open_rgb, to_input
from .datasets import is_folder, load_splits
from .losses import full_precision
from .methods import CAM, METHODS, find
from .metrics import DELTAS, LEVEL_NAMES, Evaluator, Measured, label_ranks, measure, selection_score
from .models import load_weights
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
    normalization: str | None = "minmax",
    percentile: float | None = None,
) -> Iterator[MapBatch]:
    """Score map of the ground-truth class and logits, for every image: one forward pass each.

    normalization None: the maps as the method returns them, N x h x w, unbounded, for `choose_percentile`.
    """
    method.eval()
    device = next(method.parameters()).device
    for images, labels, indices in loader:
        with utils.autocast(device, amp):
            logits, maps = method.predict(to_input(images, device), labels.to(device))
        if normalization is not None:
            maps = cam.resize(maps, method.config.image_size, method.upsampling)
            maps = cam.normalize(maps, normalization, percentile)
        yield MapBatch(indices.tolist(), maps.cpu().numpy(), full_precision(logits).cpu().numpy())


def pair_maps(
    pairs: Iterable[tuple[Any, ...]],
    split: Split,
    *,
    image_size: int,
    normalization: str = "minmax",
    percentile: float | None = None,
) -> Iterator[MapBatch]:
    """Batches of one image from (image id, score map) pairs, in any order; a third item holds K logits.

    A map is H x W, floats in [0, 1], of any size: it is resized (bicubic) to image_size and normalized.
    Raises InputError for an id that is not in the split or comes twice, for images of the split that have not
    come at the end, and for a map or logits of another form.
    """
    index_of = {image: index for index, image in enumerate(split.ids)}
    for image, score_map, *logits in pairs:
        index = index_of.pop(image, None)
        if index is None:
            raise InputError(f"{image}: not an image of {split.name}, or its second score map")
        maps = cam.resize(torch.from_numpy(as_score_map(score_map, image))[None], image_size)
        batch = MapBatch([index], cam.normalize(maps, normalization, percentile).numpy())
        if logits:
            scores = np.array(logits[0], dtype=float, ndmin=2)
            if scores.shape[:-1] != (1,) or scores.shape[1] <= split.labels[index]:
                raise InputError(f"{image}: logits must be a list of numbers, one for each class")
            batch = batch._replace(logits=scores)
        yield batch
    if index_of:
        first = next(iter(index_of))
        raise InputError(f"{split.name}: {len(index_of)} images without a score map, {first} first")


def evaluate_score_maps(
    pairs: Iterable[tuple[Any, ...]], split: Split, *, image_size: int = 224, **options: Any
) -> dict[str, Any]:
    """`evaluate_maps` of the maps of `pair_maps`. options: of both functions."""
    normalization = {k: options.pop(k) for k in ("normalization", "percentile") if k in options}
    return evaluate_maps(pair_maps(pairs, split, image_size=image_size, **normalization), split, **options)


# ---------------------------------------------------------------------------------------------- metrics


class Job(NamedTuple):
    """One image, for a worker process."""

    index: int
    rank: int | None  # of the label; None without logits
    predicted: int | None  # Top-1 class
    score_map: np.ndarray
    boxes: np.ndarray | None  # G x 4, in pixels of the map
    root: Path
    masks: Masks | None
    threshold: float | None


def evaluate_maps(
    batches: Iterable[MapBatch],
    split: Split,
    *,
    workers: int = 0,
    val_levels: dict[str, int] | None = None,
    save_maps: Path | None = None,
    per_image: Path | None = None,
    hits_file: Path | None = None,
    intervals: bool = False,
    threshold: float | None = None,
) -> dict[str, Any]:
    """All metrics of the score maps, `metrics.Hits.result`. `workers` changes no result.

    workers: processes that sweep maps while the network makes the next ones.
    val_levels: levels chosen on val, for the accuracy at thresholds that did not see this split.
    save_maps: a folder for the maps. per_image, hits_file: a CSV file and a hits file to write.
    intervals: add "intervals", [low, high] of each metric. Only the first process has them.
    threshold: a fixed one, a fraction of each map's maximum, for "fixed_threshold" in the metrics.
    Raises InputError as `Evaluator.hits` does, and for a threshold outside [0, 1).
    """
    require_threshold(threshold)
    evaluator, whole, blank = Evaluator(keep=per_image is not None), Evaluator(), 0
    measured = utils.imap(_measure, _jobs(batches, split, threshold), workers)
    share = len(range(utils.rank(), len(split), utils.world_size()))
    for job, found in utils.progress(measured, split.name, share):
        evaluator.add(job.index, found, job.rank, job.predicted)
        blank += not job.score_map.any()
        if save_maps is not None:
            with (
                utils.atomic_write(Path(save_maps) / f"{split.ids[job.index]}.npy") as part,
                part.open("wb") as file,
            ):
                np.save(file, job.score_map)
    for part in utils.all_gather(evaluator):
        whole.merge(part)
    if blank := sum(utils.all_gather(blank)):
        utils.print_rank0(
            f"{blank} of {len(split)} maps are constant, all zero or not finite: they have no box"
        )
    hits = whole.hits(val_levels, threshold)
    result = hits.result()
    if intervals and utils.rank() == 0:
        result["intervals"] = bootstrap.intervals([hits], split.digest())
    if per_image is not None and utils.rank() == 0:
        write_per_image(per_image, split, whole, result["levels"])
    if hits_file is not None and utils.rank() == 0:
        bootstrap.save_hits(hits_file, hits, split)
    return result


def _jobs(batches: Iterable[MapBatch], split: Split, threshold: float | None) -> Iterator[Job]:
    for indices, maps, logits in batches:
        ranks = predicted = [None] * len(indices)
        if logits is not None:
            ranks, predicted = label_ranks(logits, split.labels[indices]).tolist(), logits.argmax(1).tolist()
        for index, rank, top1, score_map in zip(indices, ranks, predicted, maps):
            boxes = split.boxes.get(index)
            if boxes is not None:
                boxes = scale_boxes(boxes, tuple(split.sizes[index]), len(score_map))
            yield Job(index, rank, top1, score_map, boxes, split.root, split.masks.get(index), threshold)


def _measure(job: Job) -> Measured:
    """The work that runs beside the network: the sweep over all levels, the histogram of pixels."""
    masks = None if job.masks is None else load_masks(job.root, job.masks, len(job.score_map))
    return measure(job.score_map, job.boxes, masks, job.threshold)


def require_threshold(threshold: float | None) -> None:
    """Raises InputError for a fixed threshold outside [0, 1)."""
    if threshold is not None and not 0 <= threshold < 1:
        raise InputError(f"threshold {threshold}: must be in [0, 1)")


def write_per_image(path: Path, split: Split, evaluator: Evaluator, levels: dict[str, int] | None) -> None:
    """A CSV line per image: IoU at each chosen threshold; box of the largest contour, in map pixels."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    head = ["id", "label", "predicted", *(f"iou_{name}" for name in LEVEL_NAMES), "x0", "y0", "x1", "y1"]
    rows.writerow(head)
    for index, (*_, predicted, found) in sorted(evaluator.images.items()):
        row: list[Any] = [split.ids[index], split.labels[index], "" if predicted is None else predicted]
        if found.ious is not None:
            row += [f"{found.ious[int(name == 'largest'), levels[name]]:.6f}" for name in LEVEL_NAMES]
            row += [*found.largest[levels["largest"]]]
        rows.writerow(row + [""] * (len(head) - len(row)))
    utils.write_text(path, text.getvalue())


QS = tuple(round(0.05 * i, 2) for i in range(1, 15))  # IVR's percentiles to choose from: 0.05, ..., 0.70


def choose_percentile(
    batches: Iterable[MapBatch], split: Split, method: CAM, workers: int
) -> tuple[float, dict[str, Any], dict[str, int] | None]:
    """IVR's percentile with the best `selection_score` on val, the lowest of equals.

    batches: maps without normalization. Returns (q, {"chosen_on", "by", "scores"}, levels chosen on val).
    Raises InputError where val has neither boxes nor masks.
    """
    if not split.boxes and not split.masks:
        raise InputError(f"--percentile val: {split.name} has neither boxes nor masks: pass a number")
    kept, scores, levels = list(batches), {}, {}

    def normalized(q: float) -> Iterator[MapBatch]:
        for batch in kept:
            maps = cam.resize(torch.from_numpy(batch.maps), method.config.image_size, method.upsampling)
            yield batch._replace(maps=cam.normalize(maps, "ivr", q).numpy())

    for q in QS:
        result = evaluate_maps(normalized(q), split, workers=workers)
        name, scores[q] = selection_score(result["metrics"])
        levels[q] = result["levels"]
    best = max(QS, key=scores.__getitem__)
    return best, {"chosen_on": "val", "by": name, "scores": scores}, levels[best]


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


def write_results(path: Path, result: dict[str, Any], head: dict[str, Any]) -> None:
    """The head, then images, metrics, levels, thresholds, curves, intervals. The first process writes."""
    if utils.rank() == 0:
        utils.write_json(path, head | result)


def report(path: Path, result: dict[str, Any], head: dict[str, Any]) -> None:
    """Writes the results file, then prints its table: percent; thresholds as fractions of the 255 levels."""
    write_results(path, result, head)
    m, t, bounds = result["metrics"], result["thresholds"], result.get("intervals", {})
    rows: list[tuple[str, str, str | None, str]] = []  # name, key, key within it, note
    if t is not None:
        rows += [("MaxBoxAccV2", "max_box_acc_v2", "mean", "mean of the three")]
        deltas = [str(delta) for delta in DELTAS]
        rows += [(f"  IoU {d}", "max_box_acc_v2", d, f"at threshold {t[d]:.3f}") for d in deltas]
        largest = f"largest contour, = MaxBoxAcc, at threshold {t['largest']:.3f}"
        rows += [
            ("GT-known Loc", "gt_known_loc", None, "all contours, = MaxBoxAccV2 at IoU 50"),
            ("GT-known Loc", "gt_known_loc_largest", None, largest),
            ("Top-1 Loc", "top1_loc", None, "all contours"),
            ("Top-5 Loc", "top5_loc", None, "all contours"),
            ("MaxBoxAccV2", "max_box_acc_v2_at_val_threshold", "mean", "at the thresholds chosen on val"),
        ]
    if fixed := m.get("fixed_threshold"):
        note = f"largest contour, at the fixed threshold {fixed['threshold']:g} of the map's maximum"
        names = {"GT-known Loc": "gt_known_loc", "Top-1 Loc": "top1_loc", "Top-5 Loc": "top5_loc"}
        rows += [(name, "fixed_threshold", key, note) for name, key in names.items()]
    names = {"PxAP": "pxap", "peak IoU": "piou", "Top-1 cls": "top1_cls", "Top-5 cls": "top5_cls"}
    rows += [(name, key, None, "") for name, key in names.items()]
    title = [f"{head['dataset']} {head['split']}"]
    map_options = [name for cls in METHODS.values() for name in cls.map_options]
    if head["method"]:
        epoch = f" checkpoint (epoch {head['epoch']})" if head["epoch"] else ""
        title += [f"{head['arch']} {head['method']}", f"{head['checkpoint']}{epoch}"]
    else:
        title.append(f"score maps of {head['score_maps']}")
    title += [f"{name} {head[name]}" for name in dict.fromkeys(map_options) if name in head]
    if "percentile" in head:
        title.append(f"{head['normalize']} at percentile {head['percentile']['value']:.2f}")
    title.append(f"{result['images']} images")
    counts = {key: n for key, n in result.items() if key.startswith("images_with_")}
    title += [f"{n} with {key.removeprefix('images_with_')}" for key, n in counts.items()]
    utils.print_rank0(f"{', '.join(title)} (percent{', [95 % interval over images]' if bounds else ''})")
    for name, key, inner, note in rows:
        x, interval = ((tree.get(key) or {}).get(inner) if inner else tree.get(key) for tree in (m, bounds))
        if x is not None:
            text = "[{:.1f}, {:.1f}]".format(*interval) if interval else ""
            utils.print_rank0(f"  {name:<14}{x:6.2f} {text:<{14 if bounds else 0}} {note}".rstrip())
    utils.print_rank0(f"written to {path}")


def read_results(
    run: Path, checkpoint: str, split: str, normalize: str = "minmax"
) -> tuple[Path, dict[str, Any]]:
    """(path, content) of a run's results file, or of `run` where that is a results file itself.

    Raises InputError for a missing or damaged file, naming the command that makes it.
    """
    path, command = run, "python evaluate.py --score-maps DIR --dataset NAME --out FILE"
    if run.suffix != ".json":
        path = run / results_name(checkpoint, split, normalize)
        command = (
            f"python evaluate.py {run} --checkpoint {checkpoint} --split {split} --normalize {normalize}"
        )
    result = utils.read_json(path, command)
    curves = result.get("curves") or {}
    known = isinstance(result.get("metrics"), dict) and "dataset" in result and "pxap" in result["metrics"]
    if not known or not isinstance(curves, dict) or any(len(c) != LEVELS for c in curves.values()):
        raise InputError(f"{path}: not a results file; it is made by: {command}")
    return path, result


# ---------------------------------------------------------------------------------------------- trained runs

# What a checkpoint holds; with another type or without it, the file is of another program or version.
CHECKPOINT = dict(model=dict, optimizer=dict, random_states=dict, config=dict, sources=dict, lists=dict)
CHECKPOINT |= dict(epoch=int, num_classes=int, classes=list | None, val=dict | None, best=dict | None)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of train.py, on the CPU. Raises InputError for another file."""
    checkpoint = utils.load_tensors(path)
    for name, kind in CHECKPOINT.items():
        if not isinstance(checkpoint.get(name, ...), kind):
            problem = f"({name} is missing or has the wrong type)"
            raise InputError(f"{path}: not a checkpoint of this version of train.py {problem}")
    return checkpoint


class TrainedRun:
    """A run of train.py: its method with the weights of RUN/<which>.pt in eval mode, and its data.

    which: "best" or "last". checkpoint: instead of that file. map_options: values of the method's map, instead of
    those of the run. Raises InputError for a folder that is not a run, and for a value that is not one of its
    map.
    """

    def __init__(
        self,
        folder: str | Path,
        which: str,
        device: torch.device,
        map_options: dict[str, Any] | None = None,
        checkpoint: dict[str, Any] | None = None,
    ):
        self.folder, self.which, self.device, self.map_options = (
            Path(folder),
            which,
            device,
            map_options or {},
        )
        path = self.folder if checkpoint else self.folder / f"{which}.pt"
        self.checkpoint = checkpoint or load_checkpoint(path)
        self.config = SimpleNamespace(**self.checkpoint["config"] | self.map_options)
        cls = find(self.config.method)
        for name, value in self.map_options.items():
            if name not in cls.map_options:
                raise InputError(
                    f"{utils.flag(name)}: --method {self.config.method} of {folder} has no such value"
                )
            cls.all_values()[name].check(name, value)
        self.method = cls(self.config, self.checkpoint["num_classes"])
        load_weights(self.method.net, self.checkpoint["model"], path)
        self.method.to(device, memory_format=torch.channels_last).eval()

    @property
    def val_levels(self) -> dict[str, int] | None:
        """The levels that val chose with these weights and this map, with min-max; None if it did not."""
        val = self.checkpoint["val"] or {}
        known = val.get("epoch") == self.checkpoint["epoch"] and not self.map_options
        return val.get("levels") if known else None

    def split(self, name: str, data_root: str | Path | None = None, lists: str | Path | None = None) -> Split:
        """A split of the run's data set. data_root, lists: instead of those of the run. data_root is the new
        place of a folder of one's own, or the folder above it.

        Raises InputError as `load_splits` does, and where the lists have other classes or another val than
        the run had: its thresholds would be chosen on other images.
        """
        c, then = self.config, self.checkpoint
        dataset, where = c.dataset, (data_root or c.data_root, lists or c.lists)
        if data_root and is_folder(dataset, Path(where[1])):  # the folder has moved
            moved = Path(data_root) / Path(dataset).name
            dataset = os.path.join(moved if moved.is_dir() else data_root, "")
        splits, now = load_splits(dataset, *where, (name,), c.val_per_class)
        for key in ("num_classes", "classes"):
            if now[key] != then[key] and then[key] is not None:
                raise InputError(
                    f"{self.folder}: trained on other classes than {c.dataset} has now: check --lists"
                )
        if name == "val" and now["lists"]["val"] != then["lists"].get("val", now["lists"]["val"]):
            raise InputError(f"{self.folder}: the list of val has changed since the run: check --lists")
        return splits[name]

    def maps(
        self, split: Split, batch_size: int, workers: int, amp: str | None = None, **normalization: Any
    ) -> Iterator[MapBatch]:
        """`network_maps` of a split. amp: None: the run's. normalization: of `network_maps`."""
        loader = eval_loader(split, batch_size, self.config.image_size, workers)
        return network_maps(self.method, loader, amp or self.config.amp, **normalization)

    def head(self, split: str, normalize: str = "minmax") -> dict[str, Any]:
        """The first keys of a results file."""
        keys = {
            key: getattr(self.config, key) for key in ("dataset", "arch", "method", "seed")
        } | self.map_options
        epoch = self.checkpoint["epoch"]
        return keys | dict(split=split, checkpoint=self.which, epoch=epoch, normalize=normalize)


# -------------------------------------------------------------------------------- a trained run in Python

# A fraction of the map's maximum, where val chose no threshold: the value of CAM (CVPR 2016).
FALLBACK_THRESHOLD = 0.2


class Found(NamedTuple):
    """What `Localizer` found in an image."""

    box: list[int] | None  # x0, y0, x1, y1, in pixels of the image as shown, corners inside; None: empty map
    top5: list[dict[str, Any]]  # "class" from 0, "name" where known, "probability"; the best first
    # Of the Top-1 class, float32 in [0, 1], at the run's image_size (224 x 224): stretch it over the image.
    score_map: np.ndarray

    def text(self) -> str:
        """The best class with its probability, and the box."""
        best, box = self.top5[0], "none" if self.box is None else ",".join(map(str, self.box))
        return f"class {best.get('name', best['class'])} ({100 * best['probability']:.1f} %), box {box}"


class Localizer:
    """A trained run, for images of one's own: box of the Top-1 class, five best classes, score map.

    The box is the largest contour at `threshold`, in [0, 1). A threshold that you pass is a fraction of the
    map's maximum. The default is the one chosen on val for this normalization, a fraction of [0, 1]; without
    it FALLBACK_THRESHOLD of the maximum, and `note` tells why.

    run: a folder that train.py wrote. checkpoint: "best" or "last". amp: default the run's.
    normalize, percentile: of `cam.normalize`. data_root, lists, batch_size, workers: for val, which is
    evaluated where a normalization other than "minmax" needs its threshold. Raises InputError as `TrainedRun`
    does.
    """

    def __init__(
        self,
        run: str | Path,
        device: str = "auto",
        *,
        checkpoint: str = "best",
        normalize: str = "minmax",
        percentile: float | None = None,
        threshold: float | None = None,
        amp: str | None = None,
        **val: Any,
    ):
        require_threshold(threshold)
        self.run = TrainedRun(run, checkpoint, utils.resolve_device(device))
        self.how, self.amp = (normalize, percentile), amp or self.run.config.amp
        self.threshold, self.level, self.note = threshold, None, ""
        if threshold is None:
            self.level, self.note = self._chosen_level(**val)
            self.threshold = FALLBACK_THRESHOLD if self.level is None else self.level / LEVELS

    def __call__(self, images: Any) -> Found | list[Found]:
        """A path, PIL image or array H x W x 3 uint8 (RGB) -> Found; a list of them -> a list.

        The EXIF orientation of a path or PIL image is applied.

        Raises InputError for an image that cannot be read.
        """
        if isinstance(images, (str, Path, Image.Image, np.ndarray)):
            return self._localize(images)
        return [self._localize(image) for image in images]

    @torch.inference_mode()
    def _localize(self, image: str | Path | Image.Image | np.ndarray) -> Found:
        image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
        image = open_rgb(image, upright=True)
        run, size = self.run, self.run.config.image_size
        pixels = pil_to_tensor(image.resize((size, size), Image.Resampling.BILINEAR))
        with utils.autocast(run.device, self.amp):
            logits, maps = run.method.predict(to_input(pixels[None], run.device))
        maps = cam.normalize(cam.resize(maps, size, run.method.upsampling), *self.how)
        score_map = maps[0].cpu().numpy()
        level = fixed_level(score_map, self.threshold) if self.level is None else self.level
        box = original_box(level_boxes(score_map).largest[level], size, image.size)
        probabilities, names = full_precision(logits)[0].softmax(0), run.checkpoint["classes"]
        top = probabilities.topk(min(5, len(probabilities)))
        best = list(zip(top.indices.tolist(), top.values.tolist()))
        top5 = [{"class": k, **({"name": names[k]} if names else {}), "probability": q} for k, q in best]
        return Found(box, top5, score_map)

    def _chosen_level(
        self, data_root: Any = None, lists: Any = None, batch_size: int = 32, workers: int = 0
    ) -> tuple[int | None, str]:
        """(the largest contour's level chosen on val, "") or (None, the reason)."""
        levels, (normalize, percentile) = self.run.val_levels, self.how
        if levels and normalize == "minmax":
            return levels["largest"], ""
        if levels is None and (self.run.checkpoint["val"] or {}).get("epoch") == self.run.checkpoint["epoch"]:
            return None, "val has no boxes"
        try:
            split = self.run.split("val", data_root, lists)
        except InputError as error:
            return None, f"the threshold needs the images of val: {error}"
        if not split.boxes:
            return None, "val has no boxes"
        maps = self.run.maps(
            split, batch_size, workers, self.amp, normalization=normalize, percentile=percentile
        )
        return evaluate_maps(maps, split, workers=workers)["levels"]["largest"], ""


def original_box(box: np.ndarray, size: int, image_size: tuple[int, int]) -> list[int] | None:
    """A box of the size x size map in pixels of an image (width, height): every pixel that it touches.

    None for the box 0, 0, 0, 0, which stands for no box.
    """
    if not box.any():
        return None
    x0, y0, x1, y1 = box.tolist()
    width, height = image_size
    # Pixels x0 ... x1 of the map cover the fractions x0 / size ... (x1 + 1) / size of the image's width.
    right, bottom = -(-(x1 + 1) * width // size) - 1, -(-(y1 + 1) * height // size) - 1
    return [x0 * width // size, y0 * height // size, right, bottom]


# ---------------------------------------------------------------------------------------------- pictures

TRUTH, PREDICTION = (40, 80, 255), (0, 220, 60)  # Fig. A4: ground truth blue, prediction green
# A perceptually uniform scale (dark blue, violet, red, orange, yellow): brightness grows with the value.
COLOURS = ((13, 8, 135), (126, 3, 168), (204, 71, 120), (248, 149, 64), (240, 249, 33))


def draw_boxes(
    image: Image.Image, score_map: np.ndarray, box: Any = None, truth: np.ndarray | None = None
) -> Tensor:
    """An image with its boxes, and below it the same under its score map: 3 x H x W uint8.

    image: RGB. score_map: h x w in [0, 1], stretched over it. box (4) and truth (G x 4): x0, y0, x1, y1 in
    pixels of `image`, green with its best IoU, and blue.
    """
    stretched = Image.fromarray(score_map).resize(image.size, Image.Resampling.BILINEAR)
    values, keys = np.asarray(stretched), np.linspace(0, 1, len(COLOURS))
    heat = np.stack([np.interp(values, keys, channel) for channel in zip(*COLOURS)])
    photo = pil_to_tensor(image)
    blend = (0.4 * photo + 0.6 * torch.from_numpy(heat)).round().to(torch.uint8)
    width = max(2, image.width // 100)
    boxes = [] if truth is None else [(torch.as_tensor(truth), TRUTH, None)]
    if box is not None:
        labels = None if truth is None else [f"IoU {iou_matrix(np.asarray(box), truth).max():.2f}"]
        boxes.append((torch.as_tensor(np.asarray(box))[None], PREDICTION, labels))
    for of_box, colour, labels in boxes:  # on the photo the text could hide a box
        photo = draw_bounding_boxes(photo, of_box, colors=colour, width=width)
        blend = draw_bounding_boxes(blend, of_box, labels, colour, width=width)
    return make_grid([photo, blend], nrow=1, padding=0)


def draw_found(image: Image.Image, found: Found, side: int = 448) -> Tensor:
    """`draw_boxes` of a photo, scaled so that its longer side has `side` pixels."""
    scale = side / max(image.size)
    size = tuple(max(1, round(length * scale)) for length in image.size)
    box = found.box and [found.box[i] * size[i % 2] // image.size[i % 2] for i in range(4)]
    return draw_boxes(image.resize(size, Image.Resampling.BILINEAR), found.score_map, box)


def draw_split(path: Path, split: Split, batches: Iterable[MapBatch], level: int, columns: int = 3) -> None:
    """A grid of `draw_boxes` in the form of Fig. A4. level: of the largest contour."""
    own = [pair for batch in batches for pair in zip(batch.indices, batch.maps)]
    pictures = []
    for index, score_map in sorted(
        (pair for part in utils.all_gather(own) for pair in part), key=lambda x: x[0]
    ):
        box, zoom = level_boxes(score_map).largest[level], 1 + (len(score_map) < 224)
        truth = scale_boxes(split.boxes[index], tuple(split.sizes[index]), len(score_map))
        photo = open_rgb(split.path(index), upright=split.upright)
        photo = photo.resize((zoom * len(score_map),) * 2, Image.Resampling.BILINEAR)
        boxes = (zoom * corners + np.array([0, 0, zoom - 1, zoom - 1]) for corners in (box, truth))
        pictures.append(draw_boxes(photo, score_map, *boxes))
    if utils.rank() == 0:
        save_picture(path, make_grid(pictures, nrow=columns, padding=6, pad_value=255))
    utils.print_rank0(f"{len(pictures)} images with boxes in {path}")


def evenly_spaced(split: Split, n: int) -> Split:
    """n images of a split, evenly spaced, of those that have boxes: for `draw_split`."""
    boxed = sorted(split.boxes)
    chosen = np.linspace(0, len(boxed) - 1, min(n, len(boxed))).astype(int)
    return split.take([boxed[i] for i in chosen], split.name)


def save_picture(path: Path, picture: Tensor) -> None:
    """Writes 3 x H x W uint8 as PNG, all or nothing."""
    with utils.atomic_write(path) as part:
        to_pil_image(picture).save(part, format="PNG")
