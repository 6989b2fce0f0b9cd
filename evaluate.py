"""Evaluates a trained run, or any method's score maps, by the protocol of Choe et al. (CVPR 2020).

    python evaluate.py runs/CUB_vgg16_bridge                               the best checkpoint on test
    python evaluate.py --score-maps DIR --dataset CUB --split test         another method's maps, same protocol
    python evaluate.py runs/CUB_vgg16_bridge --images photo.jpg folder/    boxes and pictures for your own images

It prints a table and writes RUN/results_<checkpoint>_<split>.json. Of a network it needs one forward pass per image.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from bridge_wsol import cam, drawing, optim
from bridge_wsol.boxes import LEVELS, fixed_level, level_boxes, scale_boxes
from bridge_wsol.data import Split, decode, image_files, load_rgb, test_loader, to_input
from bridge_wsol.datasets import load_splits
from bridge_wsol.drawing import in_proportion
from bridge_wsol.evaluation import (
    FALLBACK_THRESHOLD,
    MapBatch,
    choose_percentile,
    evaluate_maps,
    file_maps,
    load_run,
    network_maps,
    original_box,
    percentile_note,
    table,
    write_results,
)
from bridge_wsol.losses import full_precision
from bridge_wsol.methods import CAM
from bridge_wsol.utils import (
    InputError,
    Parser,
    atomic_write,
    autocast,
    default_workers,
    keep_freed_memory,
    one_line_errors,
    resolve_device,
    write_json,
)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path, metavar="RUN", help="a folder that train.py wrote")
    parser.add_argument("--checkpoint", choices=("best", "last"), default="best")
    parser.add_argument("--split", choices=("test", "val"), default="test")
    parser.add_argument(
        "--normalize",
        choices=cam.NORMALIZATIONS,
        default="minmax",
        help="of the score map; the protocol's is minmax",
    )
    parser.add_argument(
        "--percentile",
        type=percentile,
        metavar="Q",
        help="of pas (0.9) or ivr (0.45), in [0, 1); val: the ivr one best on val",
    )
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument(
        "--workers",
        type=int,
        default=default_workers(),
        help="processes that load images, and as many that sweep their maps",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument(
        "--amp",
        choices=("auto", "bf16", "off"),
        help="default: the run's; auto: bf16 on GPUs and CPUs with instructions for it",
    )
    parser.add_argument("--data-root", type=Path, help="default: the one the run was trained with, or data")
    parser.add_argument(
        "--splits", type=Path, help="default: the one the run was trained with, or data_splits"
    )
    parser.add_argument(
        "--save-maps", type=Path, metavar="DIR", help="write each score map to DIR/<image id>.npy"
    )
    parser.add_argument(
        "--per-image", type=Path, metavar="FILE.csv", help="write class, IoU and box of every image"
    )
    parser.add_argument(
        "--pictures", type=int, default=0, metavar="N", help="draw N images of the split with boxes and CAM"
    )
    parser.add_argument(
        "--score-maps",
        type=Path,
        metavar="DIR",
        help="evaluate the maps in DIR instead of a run; needs --dataset",
    )
    parser.add_argument("--dataset", help="with --score-maps: whose images the maps belong to")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="the results file; with --images: the folder for boxes.json and pictures",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        metavar="T",
        help="fixed threshold, a fraction of each map's maximum, in [0, 1): adds GT-known and Top-k Loc of the largest contour at T "
        "(the rule of the papers since CAM, CVPR 2016); with --images: instead of the threshold chosen on val",
    )
    parser.add_argument(
        "--images",
        type=Path,
        nargs="+",
        metavar="PATH",
        help="images, or folders of them, to localize with RUN",
    )
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


# ----------------------------------------------------------------------------------------------------------- evaluation


# --------------------------------------------------------------------------------------------------------------- a run


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
    splits, record = load_splits(
        config["dataset"], data_root, splits_dir, ("val", args.split), config["val_per_class"]
    )
    if record["num_classes"] != checkpoint["num_classes"]:
        raise InputError(
            f"{args.run / args.checkpoint}.pt was trained on {checkpoint['num_classes']} classes, "
            f"{splits_dir / config['dataset']} has {record['num_classes']}"
        )

    if checkpoint.get("classes") and record.get("classes") and checkpoint["classes"] != record["classes"]:
        raise InputError(
            f"{args.run / args.checkpoint}.pt was trained on other classes than the sub-folders of {config['dataset']} are now"
        )

    size = config["image_size"]

    def maps_of(split: Split, normalization: str | None) -> Iterator[MapBatch]:
        loader = test_loader(split, args.batch_size, image_size=size, workers=args.workers)
        return network_maps(
            model,
            loader,
            method=method,
            device=device,
            amp=args.amp,
            normalization=normalization,
            image_size=size,
            percentile=q,
        )

    q, choice = cam.PERCENTILES.get(args.normalize) if args.percentile is None else args.percentile, {}
    # The thresholds in the checkpoint are those of min-max maps.
    val_levels = (checkpoint["val"] or {}).get("levels") if args.normalize == "minmax" else None
    if q == "val":
        maps = maps_of(splits["val"], None)
        q, choice, val_levels = choose_percentile(
            maps, splits["val"], image_size=size, upsampling=method.upsampling, workers=args.workers
        )
    elif args.normalize != "minmax" and args.split != "val":
        val_levels = evaluate_maps(
            maps_of(splits["val"], args.normalize), splits["val"], workers=args.workers
        )["levels"]
    split = splits[args.split]
    drawn = spread_out(split, args.pictures)
    result = evaluate_maps(
        maps_of(split, args.normalize),
        split,
        workers=args.workers,
        val_levels=val_levels,
        save_maps=args.save_maps,
        per_image=args.per_image,
        keep=drawn,
        threshold=args.threshold,
    )

    name = f"{args.checkpoint}_{args.split}" + ("" if args.normalize == "minmax" else f"_{args.normalize}")
    name += "" if args.percentile is None else f"_{args.percentile}"
    title = f"{config['dataset']} {args.split}, {config['arch']} {config['method']}, {args.checkpoint} checkpoint (epoch {checkpoint['epoch']})"
    print(table(title + percentile_note(args.normalize, q, choice), result))
    out = args.out or args.run / f"results_{name}.json"
    head = {key: config[key] for key in ("dataset", "arch", "method")}
    head |= {
        "split": args.split,
        "checkpoint": args.checkpoint,
        "epoch": checkpoint["epoch"],
        "normalize": args.normalize,
    }
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
    result = evaluate_maps(
        batches, split, workers=args.workers, per_image=args.per_image, keep=drawn, threshold=args.threshold
    )
    print(
        table(
            f"{args.dataset} {args.split}, score maps of {args.score_maps}"
            + percentile_note(args.normalize, q, {}),
            result,
        )
    )
    out = args.out or Path(f"results_{args.score_maps.resolve().name}_{args.split}.json")
    nothing = dict.fromkeys(("arch", "method", "checkpoint"))
    head = {"dataset": args.dataset, "split": args.split, **nothing, "normalize": args.normalize}
    write_results(out, result, **head, **({} if q is None else {"percentile": {"value": q}}))
    print(f"written to {out}")
    for index in drawn:
        draw_result(out.with_suffix(""), split, index, result)


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
    picture = drawing.localization(
        load_rgb(split.path(index), size, upright=split.upright), score_map, predicted, truth
    )
    with atomic_write(folder / f"{split.ids[index].replace('/', '_')}.png") as part:
        picture.save(part, format="PNG")


@torch.inference_mode()
def localize_images(
    args: argparse.Namespace, model: nn.Module, method: CAM, checkpoint: dict[str, Any], device: torch.device
) -> None:
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
            print(
                f"no threshold was chosen on val ({why}): {threshold} of the map's maximum is used; --threshold sets another"
            )
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
            logits, maps = method.predict(
                model, to_input(torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None], device)
            )
        probabilities = full_precision(logits[0]).softmax(0)
        top = probabilities.topk(min(5, len(probabilities)))
        score_map = (
            cam.normalize(cam.resize(maps, size, method.upsampling), args.normalize, args.percentile)[0]
            .cpu()
            .numpy()
        )
        at = fixed_level(score_map, threshold) if level is None else level
        box = original_box(level_boxes(score_map).largest[at], size, image.size)
        classes = [
            {"class": int(k), **({"name": names[k]} if names else {}), "probability": float(q)}
            for k, q in zip(top.indices, top.values)
        ]
        found.append(
            {"image": str(path), "width": image.width, "height": image.height, "box": box, "top5": classes}
        )
        with atomic_write(folder / f"{len(found):05d}_{path.stem}.png") as part:
            drawing.localization(*in_proportion(image, score_map, box)).save(part, format="PNG")
        where = ",".join(map(str, box)) if box else "none"
        print(
            f"{path}: class {classes[0].get('name', classes[0]['class'])} ({100 * classes[0]['probability']:.1f} %), box {where}",
            flush=True,
        )
    write_json(folder / "boxes.json", found)
    print(
        f"{len(found)} images, threshold {threshold if level is None else level / LEVELS:.3f}; written to {folder}"
    )
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
        split = load_splits(config["dataset"], data_root, splits_dir, ("val",), config["val_per_class"])[0][
            "val"
        ]
    except InputError as error:
        return None, f"its images are needed for --normalize {args.normalize}: {error}"
    q = cam.PERCENTILES.get(args.normalize) if args.percentile is None else args.percentile
    size = config["image_size"]
    loader = test_loader(split, args.batch_size, image_size=size, workers=args.workers)
    maps = network_maps(
        model,
        loader,
        method=method,
        device=device,
        amp=args.amp,
        normalization=args.normalize,
        image_size=size,
        percentile=q,
    )
    return evaluate_maps(maps, split, workers=args.workers)["levels"]["largest"], ""


if __name__ == "__main__":
    with one_line_errors():
        main()
