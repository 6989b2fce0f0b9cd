"""Evaluates a trained run, or any method's score maps, by the protocol of Choe et al. (CVPR 2020).

    python evaluate.py runs/CUB_vgg16_bridge                               the best checkpoint on test
    python evaluate.py --score-maps DIR --dataset CUB --split test         another method's maps, same protocol
    python evaluate.py runs/CUB_vgg16_bridge --images photo.jpg folder/    boxes and pictures for your own images

It prints a table and writes RUN/results_<checkpoint>_<split>.json. Of a network it needs one forward pass per image.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Iterable, Iterator, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from bridge_wsol import cam, figures, optim
from bridge_wsol.baselines import CAM, METHODS
from bridge_wsol.boxes import LEVELS, fixed_level, level_boxes, scale_boxes
from bridge_wsol.data import (
    Masks, Split, decode, image_files, load_masks, load_rgb, load_score_map, load_splits, test_loader, to_input,
)
from bridge_wsol.losses import full_precision
from bridge_wsol.metrics import BoxAccuracy, Localization, PixelAveragePrecision, label_ranks, localize, top_k_accuracy
from bridge_wsol.models import restore_weights
from bridge_wsol.utils import (
    InputError, Parser, autocast, default_workers, gathered, keep_freed_memory, load_tensors, one_line_errors, ordered_map, replacing,
    resolve_device, write_json, write_text,
)


class MapBatch(NamedTuple):
    """Score maps of some images of a split, whoever made them."""

    indices: list[int]
    maps: np.ndarray  # N x size x size float32 in [0, 1]
    ranks: list[int] | None = None  # `label_ranks`; None without a classifier
    predicted: list[int] | None = None  # the first class of each


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path, metavar="RUN", help="a folder that train.py wrote")
    parser.add_argument("--checkpoint", choices=("best", "last"), default="best")
    parser.add_argument("--split", choices=("test", "val"), default="test")
    parser.add_argument("--normalize", choices=cam.NORMALIZATIONS, default="minmax", help="of the score map; the protocol's is minmax")
    parser.add_argument("--percentile", type=percentile, metavar="Q", help="of pas (0.9) or ivr (0.45), in [0, 1); val: the ivr one best on val")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=default_workers(), help="processes that load images, and as many that sweep their maps")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--amp", choices=("auto", "bf16", "off"), help="default: the run's; auto: bf16 on GPUs and CPUs with instructions for it")
    parser.add_argument("--data-root", type=Path, help="default: the one the run was trained with, or data")
    parser.add_argument("--splits", type=Path, help="default: the one the run was trained with, or data_splits")
    parser.add_argument("--save-maps", type=Path, metavar="DIR", help="write each score map to DIR/<image id>.npy")
    parser.add_argument("--per-image", type=Path, metavar="FILE.csv", help="write class, IoU and box of every image")
    parser.add_argument("--pictures", type=int, default=0, metavar="N", help="draw N images of the split with boxes and CAM")
    parser.add_argument("--score-maps", type=Path, metavar="DIR", help="evaluate the maps in DIR instead of a run; needs --dataset")
    parser.add_argument("--dataset", help="with --score-maps: whose images the maps belong to")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the results file; with --images: the folder for boxes.json and pictures")
    parser.add_argument(
        "--threshold",
        type=float,
        metavar="T",
        help="fixed threshold, a fraction of each map's maximum, in [0, 1): adds GT-known and Top-k Loc of the largest contour at T "
        "(the rule of the papers since CAM, CVPR 2016); with --images: instead of the threshold chosen on val",
    )
    parser.add_argument("--images", type=Path, nargs="+", metavar="PATH", help="images, or folders of them, to localize with RUN")
    args = parser.parse_args(argv)
    if (args.run is None) == (args.score_maps is None):
        parser.error("give either a RUN folder or --score-maps DIR")
    if args.score_maps and not args.dataset:
        parser.error("--score-maps needs --dataset")
    if args.score_maps and (args.images or args.save_maps):
        parser.error("--images and --save-maps need a RUN, not --score-maps")
    if args.threshold is not None and not 0 <= args.threshold < 1:
        parser.error(f"--threshold {args.threshold}: must be in [0, 1)")
    if args.dataset and args.run:
        parser.error("--dataset goes with --score-maps; a RUN knows its own")
    if args.percentile is not None and args.normalize not in cam.PERCENTILES:
        parser.error(f"--percentile goes with --normalize {' or '.join(cam.PERCENTILES)}")
    if args.percentile == "val" and (args.normalize != "ivr" or args.run is None or args.images):
        parser.error("--percentile val goes with --normalize ivr and the evaluation of a RUN")
    if args.batch_size < 1 or args.workers < 0 or args.pictures < 0:
        parser.error("--batch-size must be at least 1, --workers and --pictures at least 0")
    return args


def percentile(text: str) -> float | str:
    """A value of --percentile."""
    if text != "val" and not 0 <= float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be val, or at least 0 and below 1")
    return text if text == "val" else float(text)


# ------------------------------------------------------------------------------------------------- where maps come from


@torch.inference_mode()
def network_maps(
    model: nn.Module,
    loader: DataLoader,
    *,
    method: CAM,
    device: torch.device,
    amp: str,
    normalization: str | None,
    image_size: int,
    percentile: float | None = None,
) -> Iterator[MapBatch]:
    """The ground-truth class's map of every image, as a score map, and the rank of its class: one forward pass each.

    normalization None: the maps as the method gives them, N x h x w and unbounded, for `score_maps`.
    """
    model.eval()
    for images, labels, indices in loader:
        with autocast(device, amp):
            logits, maps = method.predict(model, to_input(images, device), labels.to(device))
        if normalization is not None:
            maps = cam.normalize(cam.resize(maps, image_size, method.upsampling), normalization, percentile)
        logits = full_precision(logits).cpu().numpy()
        ranks = label_ranks(logits, labels.numpy())
        yield MapBatch(indices.tolist(), maps.cpu().numpy(), ranks.tolist(), logits.argmax(1).tolist())


def score_maps(batches: Iterable[MapBatch], image_size: int, upsampling: str, normalization: str, percentile: float) -> Iterator[MapBatch]:
    """What `network_maps` would give with this normalization, from the maps it gave without one."""
    for batch in batches:
        maps = cam.resize(torch.from_numpy(batch.maps), image_size, upsampling)
        yield batch._replace(maps=cam.normalize(maps, normalization, percentile).numpy())


def file_maps(folder: Path, split: Split, image_size: int, normalization: str, percentile: float | None = None) -> Iterator[MapBatch]:
    """The score maps of a folder, resized and normalized as the network's are. Raises InputError as `load_score_map` does."""
    if not folder.is_dir():
        raise InputError(f"--score-maps {folder}: no such folder")
    for index, image in enumerate(split.ids):
        score_map = torch.from_numpy(load_score_map(folder, image))[None]
        maps = cam.normalize(cam.resize(score_map, image_size), normalization, percentile)
        yield MapBatch([index], maps.numpy())


# ----------------------------------------------------------------------------------------------------------- evaluation


class Job(NamedTuple):
    """What a worker process needs of one image."""

    index: int
    score_map: np.ndarray
    boxes: np.ndarray | None  # G x 4 in the map's pixels
    root: Path
    masks: Masks | None
    threshold: float | None  # a fixed one


def measure(job: Job) -> tuple[int, Localization | None, int | None, PixelAveragePrecision | None]:
    """The part of the evaluation that runs beside the network: the sweep over all levels, the histogram of the pixels.

    (index, boxes of every level, level of the fixed threshold, pixels), each None where the image or the job has none.
    """
    localization = level = pixels = None
    if job.boxes is not None:
        localization = localize(job.score_map, job.boxes)
        if job.threshold is not None:
            level = fixed_level(job.score_map, job.threshold)
    if job.masks is not None:
        pixels = PixelAveragePrecision()
        pixels.update(job.score_map, *load_masks(job.root, job.masks, len(job.score_map)))
    return job.index, localization, level, pixels


def evaluate_maps(
    batches: Iterable[MapBatch],
    split: Split,
    *,
    workers: int,
    val_levels: dict[str, int] | None = None,
    save_maps: Path | None = None,
    per_image: Path | None = None,
    keep: Iterable[int] = (),
    threshold: float | None = None,
) -> dict[str, Any]:
    """All metrics of a set of score maps: {"images", "metrics", "levels", "thresholds", "curves", "kept"}.

    workers: processes that sweep the maps while the network makes the next ones; the results do not depend on their number.
    val_levels: levels chosen on val, for the accuracy at thresholds that did not see this split. per_image: a CSV file to write.
    keep: indices whose maps come back in "kept". threshold: a fixed one, a fraction of each map's maximum, for "fixed_threshold" in the
    metrics (`BoxAccuracy.at_fixed_levels`). Metrics that need what is not there (boxes, masks, logits) are None.
    """
    accuracy, pixels, kept, keep = BoxAccuracy(), PixelAveragePrecision(), {}, set(keep)
    seen: list[int] = []  # of this process; of several (torchrun), each brings its share of the images
    ranks: dict[int, int] = {}
    predicted: dict[int, int] = {}
    largest: dict[int, np.ndarray] = {}
    fixed: dict[int, int] = {}  # index -> level of the fixed threshold

    def jobs() -> Iterator[Job]:
        for batch in batches:
            seen.extend(batch.indices)
            if batch.ranks is not None:
                ranks.update(zip(batch.indices, batch.ranks))
                predicted.update(zip(batch.indices, batch.predicted))
            for index, score_map in zip(batch.indices, batch.maps):
                if save_maps is not None:
                    with replacing(save_maps / f"{split.ids[index]}.npy") as part, part.open("wb") as file:
                        np.save(file, score_map)
                if index in keep:
                    kept[index] = score_map
                boxes = split.boxes.get(index)
                if boxes is not None:
                    boxes = scale_boxes(boxes, tuple(split.sizes[index]), len(score_map))
                yield Job(index, score_map, boxes, split.root, split.masks.get(index), threshold)

    for index, localization, level, image_pixels in ordered_map(measure, jobs(), workers):
        if localization is not None:
            accuracy.update(index, localization.ious, ranks.get(index))
            if per_image is not None:
                largest[index] = localization.largest
        if level is not None:
            fixed[index] = level
        if image_pixels is not None:
            pixels.merge(image_pixels)

    shares = gathered((seen, ranks, predicted, largest, fixed, accuracy, pixels))
    if len(shares) > 1:
        seen, ranks, predicted, largest, fixed, accuracy, pixels = [], {}, {}, {}, {}, BoxAccuracy(), PixelAveragePrecision()
        for share in shares:
            seen += share[0]
            for mine, theirs in zip((ranks, predicted, largest, fixed), share[1:5]):
                mine |= theirs
            accuracy.merge(share[5])
            pixels.merge(share[6])
        seen.sort()

    names = ("max_box_acc_v2", "max_box_acc", "gt_known_loc", "gt_known_loc_largest", "top1_loc", "top5_loc")
    metrics: dict[str, Any] = dict.fromkeys((*names, "top1_cls", "top5_cls", "max_box_acc_v2_at_val_threshold", "pxap"))
    result: dict[str, Any] = {"images": len(seen), "metrics": metrics, "levels": None, "thresholds": None, "curves": None, "kept": kept}
    if split.boxes:
        computed = accuracy.compute(val_levels)
        metrics |= computed.pop("metrics")
        result |= computed
        result["thresholds"] = {name: level / LEVELS for name, level in result["levels"].items()}
        if threshold is not None:
            metrics["fixed_threshold"] = {"threshold": threshold, **accuracy.at_fixed_levels(fixed)}
    if ranks:
        metrics |= {f"top{k}_cls": top_k_accuracy(list(ranks.values()), k) for k in (1, 5)}
    if split.masks:
        metrics["pxap"] = pixels.compute()
    if per_image is not None:
        write_per_image(per_image, split, seen, accuracy, largest, predicted, result["levels"])
    return result


def write_per_image(
    path: Path,
    split: Split,
    indices: list[int],
    accuracy: BoxAccuracy,
    largest: dict[int, np.ndarray],
    predicted: dict[int, int],
    levels: dict[str, int] | None,
) -> None:
    """A CSV line an image: its IoU at each chosen threshold, and the largest contour's box at its own, in pixels of the map."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["id", "label", "predicted", "iou_30", "iou_50", "iou_70", "iou_largest", "x0", "y0", "x1", "y1"])
    for index in indices:
        row: list[Any] = [split.ids[index], split.labels[index], predicted.get(index, "")]
        if index in largest:
            ious = accuracy.ious[index]
            row += [f"{ious[0, levels[name]]:.6f}" for name in ("30", "50", "70")]
            row += [f"{ious[1, levels['largest']]:.6f}", *largest[index][levels["largest"]]]
        rows.writerow(row + [""] * (11 - len(row)))
    write_text(path, text.getvalue())


def selection_score(metrics: dict[str, Any]) -> tuple[str, float]:
    """(name, value) by which the best epoch is chosen on val: mean MaxBoxAccV2, PxAP where there are masks only (appendix B)."""
    if metrics["max_box_acc_v2"] is not None:
        return "MaxBoxAccV2", metrics["max_box_acc_v2"]["mean"]
    return ("PxAP", metrics["pxap"]) if metrics["pxap"] is not None else ("Top-1 cls", metrics["top1_cls"])


QS = tuple(round(0.05 * i, 2) for i in range(1, 15))  # IVR's percentiles to choose from: 0.05, 0.10, ..., 0.70


def choose_percentile(
    batches: Iterable[MapBatch], split: Split, *, image_size: int, upsampling: str, workers: int
) -> tuple[float, dict[str, Any], dict[str, int] | None]:
    """IVR's percentile with the best `selection_score` on val, the lowest of equals, from its maps without normalization.

    Returns (q, {"chosen_on", "by", "scores"}, val's levels at q). Raises InputError where val has neither boxes nor masks.
    """
    if not split.boxes and not split.masks:
        raise InputError(f"--percentile val: {split.name} has neither boxes nor masks to choose by: give a number")
    kept = list(batches)
    scores, levels = {}, {}
    for q in QS:
        result = evaluate_maps(score_maps(kept, image_size, upsampling, "ivr", q), split, workers=workers)
        name, scores[q] = selection_score(result["metrics"])
        levels[q] = result["levels"]
    best = max(QS, key=scores.__getitem__)
    return best, {"chosen_on": "val", "by": name, "scores": scores}, levels[best]


def write_results(path: Path, result: dict[str, Any], **head: Any) -> None:
    """results_<checkpoint>_<split>.json (shared by train.py and this script)."""
    write_json(path, head | {k: result[k] for k in ("images", "metrics", "thresholds", "curves")})


def table(title: str, result: dict[str, Any]) -> str:
    """The metrics as people read them; everything in percent, thresholds as fractions of the map's maximum."""
    m, t = result["metrics"], result["thresholds"]
    rows: list[tuple[str, float | None, str]] = []
    if t is not None:
        v2 = m["max_box_acc_v2"]
        at_deltas = ", ".join(f"IoU {d}: {v2[d]:.2f} at threshold {t[d]:.3f}" for d in ("30", "50", "70"))
        rows += [
            ("MaxBoxAccV2", v2["mean"], at_deltas),
            ("GT-known Loc", m["gt_known_loc"], "all contours, = MaxBoxAccV2 at IoU 50"),
            ("GT-known Loc", m["gt_known_loc_largest"], f"largest contour, = MaxBoxAcc, at threshold {t['largest']:.3f}"),
            ("Top-1 Loc", m["top1_loc"], "all contours"),
            ("Top-5 Loc", m["top5_loc"], "all contours"),
        ]
        honest = m["max_box_acc_v2_at_val_threshold"]
        if honest is not None:
            rows.append(("MaxBoxAccV2", honest["mean"], "at the thresholds chosen on val"))
        fixed = m.get("fixed_threshold")
        if fixed is not None:
            at = f"largest contour, at the fixed threshold {fixed['threshold']:g} of the map's maximum"
            names = {"GT-known Loc": "gt_known_loc", "Top-1 Loc": "top1_loc", "Top-5 Loc": "top5_loc"}
            rows += [(name, fixed[key], at) for name, key in names.items()]
    rows += [("PxAP", m["pxap"], ""), ("Top-1 cls", m["top1_cls"], ""), ("Top-5 cls", m["top5_cls"], "")]
    lines = [f"  {name:<14}{value:6.2f}  {note}".rstrip() for name, value, note in rows if value is not None]
    return "\n".join([f"{title}, {result['images']} images (percent)", *lines])


# --------------------------------------------------------------------------------------------------------------- a run


def checkpoint_problem(checkpoint: dict[str, Any]) -> str | None:
    """The first part that a checkpoint of train.py has and this lacks, or has of another kind."""
    kinds = {"model": dict, "config": dict, "epoch": int, "num_classes": int, "val": (dict, type(None))}
    for name, kind in kinds.items():
        if not isinstance(checkpoint.get(name, ...), kind):
            return name
    levels = checkpoint["val"] and checkpoint["val"].get("levels", ...)
    if levels is not None and not (isinstance(levels, dict) and all(levels.get(name) in range(LEVELS) for name in ("30", "50", "70", "largest"))):
        return "val"
    classes = checkpoint.get("classes")  # younger than the rest
    if classes is not None and not (isinstance(classes, list) and len(classes) == checkpoint["num_classes"]):
        return "classes"
    return None


def load_run(run: Path, which: str, device: torch.device) -> tuple[nn.Module, CAM, dict[str, Any]]:
    """(network, its method, checkpoint) of RUN/<which>.pt. Raises InputError for a folder that is no run, or a damaged checkpoint."""
    path = run / f"{which}.pt"
    if not path.exists():
        raise InputError(f"{path}: no such checkpoint: RUN is a folder that train.py wrote")
    checkpoint = load_tensors(path)
    problem = checkpoint_problem(checkpoint)
    if problem:
        raise InputError(f"{path}: not a checkpoint of train.py ({problem} is missing or of the wrong kind)")
    try:
        c = checkpoint["config"]
        if c["method"] not in METHODS:
            raise InputError(f"{path}: a run of method {c['method']!r}, which nothing here defines: import the file with its class before evaluating")
        method = METHODS[c["method"]](SimpleNamespace(**c))
        model = method.network(checkpoint["num_classes"])
        restore_weights(model, checkpoint["model"], path)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not a checkpoint of train.py ({error} is missing or of the wrong kind)") from error
    return model.to(device, memory_format=torch.channels_last), method, checkpoint


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    device = resolve_device(args.device)
    if device.type == "cpu":
        keep_freed_memory()
    if args.score_maps:
        return evaluate_score_maps(args)

    model, method, checkpoint = load_run(args.run, args.checkpoint, device)
    config = checkpoint["config"]
    args.amp = args.amp or config.get("amp", "auto")
    if args.images:
        return localize_images(args, model, method, checkpoint, device)

    data_root, splits_dir = args.data_root or Path(config["data_root"]), args.splits or Path(config["splits"])
    splits, record = load_splits(config["dataset"], data_root, splits_dir, ("val", args.split), config["val_per_class"])
    if record["num_classes"] != checkpoint["num_classes"]:
        raise InputError(
            f"{args.run / args.checkpoint}.pt was trained on {checkpoint['num_classes']} classes, "
            f"{splits_dir / config['dataset']} has {record['num_classes']}"
        )

    if checkpoint.get("classes") and record.get("classes") and checkpoint["classes"] != record["classes"]:
        raise InputError(f"{args.run / args.checkpoint}.pt was trained on other classes than the sub-folders of {config['dataset']} are now")

    size = config["image_size"]

    def maps_of(split: Split, normalization: str | None) -> Iterator[MapBatch]:
        loader = test_loader(split, args.batch_size, image_size=size, workers=args.workers)
        return network_maps(
            model, loader, method=method, device=device, amp=args.amp, normalization=normalization, image_size=size, percentile=q
        )

    q, choice = cam.PERCENTILES.get(args.normalize) if args.percentile is None else args.percentile, {}
    # The thresholds in the checkpoint are those of min-max maps.
    val_levels = (checkpoint["val"] or {}).get("levels") if args.normalize == "minmax" else None
    if q == "val":
        maps = maps_of(splits["val"], None)
        q, choice, val_levels = choose_percentile(maps, splits["val"], image_size=size, upsampling=method.upsampling, workers=args.workers)
    elif args.normalize != "minmax" and args.split != "val":
        val_levels = evaluate_maps(maps_of(splits["val"], args.normalize), splits["val"], workers=args.workers)["levels"]
    split = splits[args.split]
    drawn = spread_out(split, args.pictures)
    result = evaluate_maps(
        maps_of(split, args.normalize), split, workers=args.workers, val_levels=val_levels, save_maps=args.save_maps,
        per_image=args.per_image, keep=drawn, threshold=args.threshold,
    )

    name = f"{args.checkpoint}_{args.split}" + ("" if args.normalize == "minmax" else f"_{args.normalize}")
    name += "" if args.percentile is None else f"_{args.percentile}"
    title = f"{config['dataset']} {args.split}, {config['arch']} {config['method']}, {args.checkpoint} checkpoint (epoch {checkpoint['epoch']})"
    print(table(title + percentile_note(args.normalize, q, choice), result))
    out = args.out or args.run / f"results_{name}.json"
    head = {key: config[key] for key in ("dataset", "arch", "method")}
    head |= {"split": args.split, "checkpoint": args.checkpoint, "epoch": checkpoint["epoch"], "normalize": args.normalize}
    write_results(out, result, **head, **({} if q is None else {"percentile": {"value": q, **choice}}))
    print(f"written to {out}")
    if drawn:
        folder = args.run / f"pictures_{name}"
        for index in drawn:
            draw_result(folder, split, index, result)
        print(f"{len(drawn)} pictures in {folder}")


def evaluate_score_maps(args: argparse.Namespace) -> None:
    data_root, splits_dir = args.data_root or Path("data"), args.splits or Path("data_splits")
    splits, _ = load_splits(args.dataset, data_root, splits_dir, (args.split,), lists_only=True)
    split = splits[args.split]
    if args.pictures:
        split.require_images()
    image_size = optim.image_size(args.dataset)
    drawn = spread_out(split, args.pictures)
    q = cam.PERCENTILES.get(args.normalize) if args.percentile is None else args.percentile
    batches = file_maps(args.score_maps, split, image_size, args.normalize, q)
    result = evaluate_maps(batches, split, workers=args.workers, per_image=args.per_image, keep=drawn, threshold=args.threshold)
    print(table(f"{args.dataset} {args.split}, score maps of {args.score_maps}" + percentile_note(args.normalize, q, {}), result))
    out = args.out or Path(f"results_{args.score_maps.resolve().name}_{args.split}.json")
    nothing = dict.fromkeys(("arch", "method", "checkpoint"))
    head = {"dataset": args.dataset, "split": args.split, **nothing, "normalize": args.normalize}
    write_results(out, result, **head, **({} if q is None else {"percentile": {"value": q}}))
    print(f"written to {out}")
    for index in drawn:
        draw_result(out.with_suffix(""), split, index, result)


def percentile_note(normalize: str, q: float | None, choice: dict[str, Any]) -> str:
    """What a table's title says of a normalization that has a percentile."""
    if q is None:
        return ""
    chosen = f", chosen on {choice['chosen_on']} by {choice['by']} ({choice['scores'][q]:.2f})" if choice else ""
    return f", {normalize} at percentile {q:.2f}{chosen}"


def spread_out(split: Split, n: int) -> list[int]:
    """n indices at equal distances over the split, for --pictures."""
    return np.linspace(0, len(split) - 1, min(n, len(split))).astype(int).tolist()


def draw_result(folder: Path, split: Split, index: int, result: dict[str, Any]) -> None:
    """Fig. A4's form for one image of the split: ground truth blue, the largest contour at the set's threshold green."""
    score_map = result["kept"][index]
    size = score_map.shape[0]
    predicted = truth = None
    if index in split.boxes:
        predicted = level_boxes(score_map).largest[result["levels"]["largest"]]
        truth = scale_boxes(split.boxes[index], tuple(split.sizes[index]), size)
    picture = figures.localization(load_rgb(split.path(index), size, upright=split.upright), score_map, predicted, truth)
    with replacing(folder / f"{split.ids[index].replace('/', '_')}.png") as part:
        picture.save(part, format="PNG")


# Of the map's maximum, where val chose none: the value of CAM (CVPR 2016) and of the papers after it.
FALLBACK_THRESHOLD = 0.2


@torch.inference_mode()
def localize_images(args: argparse.Namespace, model: nn.Module, method: CAM, checkpoint: dict[str, Any], device: torch.device) -> None:
    """boxes.json and a picture for each of the user's own images: five classes, and the box of the first.

    The box is the largest contour of the predicted class's map at --threshold, else at the threshold chosen on val for this normalization,
    else at FALLBACK_THRESHOLD; in pixels of the original image as it is shown, its EXIF orientation applied; null where nothing of the map exceeds the threshold. An image that cannot be read is
    named and left out; the exit code is then 1.
    """
    size, names = checkpoint["config"]["image_size"], checkpoint.get("classes")
    level, threshold = None, args.threshold
    if threshold is None:
        level, why = chosen_level(args, model, method, checkpoint, device)
        if level is None:
            threshold = FALLBACK_THRESHOLD
            print(f"no threshold was chosen on val ({why}): {threshold} of the map's maximum is used; --threshold sets another")
    folder = args.out or args.run / "images"
    model.eval()
    found, failed = [], 0
    for path in image_files(args.images):
        try:
            image = decode(path, upright=True)
        except InputError as error:
            failed += 1
            sys.stderr.write(f"left out: {error}\n")
            continue
        picture = image.resize((size, size), Image.Resampling.BILINEAR)
        with autocast(device, args.amp):
            logits, maps = method.predict(model, to_input(torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None], device))
        probabilities = full_precision(logits[0]).softmax(0)
        top = probabilities.topk(min(5, len(probabilities)))
        score_map = cam.normalize(cam.resize(maps, size, method.upsampling), args.normalize, args.percentile)[0].cpu().numpy()
        at = fixed_level(score_map, threshold) if level is None else level
        box = original_box(level_boxes(score_map).largest[at], size, image.size)
        classes = [{"class": int(k), **({"name": names[k]} if names else {}), "probability": float(q)} for k, q in zip(top.indices, top.values)]
        found.append({"image": str(path), "width": image.width, "height": image.height, "box": box, "top5": classes})
        with replacing(folder / f"{len(found):05d}_{path.stem}.png") as part:
            figures.localization(*in_proportion(image, score_map, box)).save(part, format="PNG")
        where = ",".join(map(str, box)) if box else "none"
        print(f"{path}: class {classes[0].get('name', classes[0]['class'])} ({100 * classes[0]['probability']:.1f} %), box {where}", flush=True)
    write_json(folder / "boxes.json", found)
    print(f"{len(found)} images, threshold {threshold if level is None else level / LEVELS:.3f}; written to {folder}")
    if failed:
        sys.stderr.write(f"{failed} of {failed + len(found)} images could not be read\n")
        sys.exit(1)


def chosen_level(
    args: argparse.Namespace, model: nn.Module, method: CAM, checkpoint: dict[str, Any], device: torch.device
) -> tuple[int | None, str]:
    """(the level of the largest contour chosen on val for this normalization; None and the reason where val cannot tell)."""
    config, levels = checkpoint["config"], (checkpoint["val"] or {}).get("levels")
    if levels is None:
        return None, "val has no boxes"
    if args.normalize == "minmax":
        return levels["largest"], ""
    data_root, splits_dir = args.data_root or Path(config["data_root"]), args.splits or Path(config["splits"])
    try:
        split = load_splits(config["dataset"], data_root, splits_dir, ("val",), config["val_per_class"])[0]["val"]
    except InputError as error:
        return None, f"its images are needed for --normalize {args.normalize}: {error}"
    q = cam.PERCENTILES.get(args.normalize) if args.percentile is None else args.percentile
    size = config["image_size"]
    loader = test_loader(split, args.batch_size, image_size=size, workers=args.workers)
    maps = network_maps(
        model, loader, method=method, device=device, amp=args.amp, normalization=args.normalize, image_size=size, percentile=q
    )
    return evaluate_maps(maps, split, workers=args.workers)["levels"]["largest"], ""


def original_box(box: np.ndarray, size: int, image_size: tuple[int, int]) -> list[int] | None:
    """A box of the size x size map in pixels of an image (width, height): every pixel that it touches. None for no box, 0,0,0,0."""
    if not box.any():
        return None
    x0, y0, x1, y1 = box.tolist()
    width, height = image_size
    # The pixels x0 ... x1 of the map cover the fractions x0 / size ... (x1 + 1) / size of the image.
    return [x0 * width // size, y0 * height // size, -(-(x1 + 1) * width // size) - 1, -(-(y1 + 1) * height // size) - 1]


def in_proportion(image: Image.Image, score_map: np.ndarray, box: list[int] | None, side: int = 448) -> tuple[Image.Image, np.ndarray, np.ndarray | None]:
    """Image, map and box of the image, all scaled so that the image's longer side is `side`, its proportions kept."""
    scale = side / max(image.size)
    width, height = (max(1, round(n * scale)) for n in image.size)
    resized_map = np.asarray(Image.fromarray(score_map).resize((width, height), Image.Resampling.BILINEAR))
    corners = None if box is None else np.array([box[0] * width // image.width, box[1] * height // image.height, box[2] * width // image.width, box[3] * height // image.height])
    return image.resize((width, height), Image.Resampling.BILINEAR), resized_map, corners


if __name__ == "__main__":
    with one_line_errors():
        main()
