"""Evaluates a trained run, or any method's score maps, by the protocol of Choe et al. (CVPR 2020).

    python evaluate.py runs/CUB_vgg16_bridge                               the best checkpoint on test
    python evaluate.py --score-maps DIR --dataset CUB --split test         any method's maps, same protocol
    python evaluate.py runs/CUB_vgg16_bridge --images photo.jpg folder/    boxes and pictures for your images

Prints a table and writes RUN/results_<checkpoint>_<split>.json; for score maps results_<DIR>_<split>.json.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bridge_wsol import cam, drawing, evaluation, optim
from bridge_wsol.baselines import METHODS
from bridge_wsol.data import Split, decode, image_files, load_score_maps, test_loader
from bridge_wsol.datasets import load_splits
from bridge_wsol.utils import (
    InputError,
    Parser,
    Progress,
    atomic_write,
    counted,
    default_workers,
    one_line_errors,
    resolve_device,
    write_json,
)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The flags. Raises InputError for flags that contradict each other."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("what to evaluate").add_argument
    add("run", nargs="?", type=Path, metavar="RUN", help="run folder of train.py")
    add("--checkpoint", choices=("best", "last"), default="best", help="default best")
    add("--split", choices=("test", "val"), default="test", help="default test")
    text = "folder of score maps, instead of RUN; needs --dataset"
    add("--score-maps", type=Path, metavar="DIR", help=text)
    add("--dataset", metavar="D", help="with --score-maps: data set of the maps")
    text = "images, or folders of them, to localize with RUN"
    add("--images", type=Path, nargs="+", metavar="PATH", help=text)

    add = parser.add_argument_group("maps and thresholds").add_argument
    text = "normalization of the score maps (default minmax, the protocol's)"
    add("--normalize", choices=cam.NORMALIZATIONS, default="minmax", help=text)
    text = 'percentile for pas (default 0.9) or ivr (0.45), in [0, 1); "val": select ivr\'s on val'
    add("--percentile", type=_percentile, metavar="Q", help=text)
    text = (
        "fixed threshold, a fraction of each map's maximum, in [0, 1): adds GT-known and Top-k Loc of "
        "the largest contour at T (the rule of CAM, CVPR 2016); with --images: instead of val's threshold"
    )
    add("--threshold", type=float, metavar="T", help=text)
    optim.add_method_values(add, optim.map_values(METHODS))

    add = parser.add_argument_group("where things are").add_argument
    add("--data-root", type=Path, metavar="DIR", help="default: the run's, or data")
    add("--splits", type=Path, metavar="DIR", help="folder of the lists (default: the run's, or data_splits)")
    text = "results file; with --images: folder for boxes.json and pictures"
    add("--out", type=Path, metavar="PATH", help=text)
    add("--save-maps", type=Path, metavar="DIR", help="writes each score map to DIR/<image id>.npy")
    add("--per-image", type=Path, metavar="FILE.csv", help="writes class, IoU and box of every image")
    add("--pictures", type=int, default=0, metavar="N", help="draws N images of the split with boxes and CAM")

    add = parser.add_argument_group("how it runs").add_argument
    add("--batch-size", type=int, default=32, metavar="N", help="default 32")
    text = "DataLoader workers, and evaluation workers (default: CPU cores, at most 8)"
    add("--workers", type=int, default=default_workers(), metavar="N", help=text)
    add("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, ...")
    text = "default: the run's; auto: bf16 where the device is fast at it"
    add("--amp", choices=("auto", "bf16", "off"), help=text)
    add("--quiet", action="store_true", help="no progress line on stderr")
    args = parser.parse_args(argv)
    args.of_map = {x: vars(args)[x] for x in optim.map_values(METHODS) if vars(args)[x] is not None}
    _check(parser, args)
    args.suffix = "" if args.normalize == "minmax" else f"_{args.normalize}"  # of the results file
    args.suffix += "" if args.percentile is None else f"_{args.percentile}"
    return args


def _percentile(text: str) -> float | str:
    if text != "val" and not 0 <= float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be val, or in [0, 1)")
    return text if text == "val" else float(text)


def _check(parser: Parser, args: argparse.Namespace) -> None:
    if (args.run is None) == (args.score_maps is None):
        parser.error("pass either a RUN folder or --score-maps DIR")
    if args.score_maps and not args.dataset:
        parser.error("--score-maps needs --dataset")
    if args.score_maps and (args.images or args.save_maps):
        parser.error("--images and --save-maps need a RUN, not --score-maps")
    if args.images and (args.save_maps or args.per_image or args.pictures):
        parser.error("--save-maps, --per-image and --pictures go with a split, not with --images")
    if args.of_map and (args.score_maps or args.images):
        parser.error(f"--{next(iter(args.of_map)).replace('_', '-')} needs a RUN, without --images")
    if args.threshold is not None and not 0 <= args.threshold < 1:
        parser.error(f"--threshold {args.threshold}: must be in [0, 1)")
    if args.dataset and args.run:
        parser.error("--dataset goes with --score-maps; a RUN has its own: remove the flag")
    if args.percentile is not None and args.normalize not in cam.PERCENTILES:
        parser.error(f"--percentile needs --normalize {' or '.join(cam.PERCENTILES)}")
    if args.percentile == "val" and (args.normalize != "ivr" or args.run is None or args.images):
        parser.error("--percentile val needs --normalize ivr and a RUN, without --images")
    if args.batch_size < 1 or args.workers < 0 or args.pictures < 0:
        parser.error("--batch-size must be at least 1, --workers and --pictures at least 0")


def main(argv: list[str] | None = None) -> None:
    """A run, a folder of score maps, or one's own images."""
    args = parse_args(argv)
    Progress.quiet = args.quiet
    if args.score_maps:
        evaluate_folder(args)
    elif args.images:
        localize_images(args)
    else:
        evaluate_run(args)


def evaluate_run(args: argparse.Namespace) -> None:
    """RUN on a split: table, results file, and the files that were asked for."""
    device = resolve_device(args.device)
    model, method, checkpoint = evaluation.load_run(args.run, args.checkpoint, device, args.of_map)
    config = checkpoint["config"]
    own = args.normalize == "minmax" and not args.of_map
    val_levels = evaluation.levels_of(checkpoint) if own else None
    names = (args.split,) if val_levels else ("val", args.split)
    splits = evaluation.run_splits(args.run, checkpoint, names, args.data_root, args.splits)
    size, amp = config["image_size"], args.amp or config.get("amp", "auto")
    q = cam.PERCENTILES.get(args.normalize) if args.percentile is None else args.percentile

    def maps_of(split: Split, normalization: str | None) -> Iterator[evaluation.MapBatch]:
        loader = test_loader(split, args.batch_size, image_size=size, workers=args.workers)
        setting = {"method": method, "device": device, "amp": amp, "image_size": size, "percentile": q}
        return evaluation.network_maps(model, loader, normalization=normalization, **setting)

    # The thresholds in the checkpoint belong to the run's own maps, with min-max.
    choice, val, n = {}, splits.get("val"), args.workers
    if q == "val":
        setting = {"image_size": size, "upsampling": method.upsampling, "workers": n}
        q, choice, val_levels = evaluation.choose_percentile(maps_of(val, None), val, **setting)
    elif not val_levels and val.boxes and args.split != "val":
        val_levels = evaluation.evaluate_maps(maps_of(val, args.normalize), val, workers=n)["levels"]

    name = f"{args.checkpoint}_{args.split}{args.suffix}"
    name += "".join(f"_{key}={value}" for key, value in args.of_map.items())
    title = f"{config['dataset']} {args.split}, {config['arch']} {config['method']}"
    title += f", {args.checkpoint} checkpoint (epoch {checkpoint['epoch']})"
    title += "".join(f", {key} {value}" for key, value in args.of_map.items())
    head = {key: config[key] for key in evaluation.RUN_KEYS} | args.of_map | {"split": args.split}
    head |= {"checkpoint": args.checkpoint, "epoch": checkpoint["epoch"], "normalize": args.normalize}
    split, out = splits[args.split], args.out or args.run / f"results_{name}.json"
    pictures = args.run / f"pictures_{name}"
    options = {"val_levels": val_levels, "save_maps": args.save_maps}
    head |= {} if q is None else {"percentile": {"value": q, **choice}}
    finish(args, maps_of(split, args.normalize), split, title, head, out, pictures, **options)


def finish(
    args: argparse.Namespace,
    maps: Iterator[evaluation.MapBatch],
    split: Split,
    title: str,
    head: dict[str, Any],
    out: Path,
    pictures: Path,
    **options: Any,
) -> None:
    """Evaluates the maps; prints the table, writes the results file (first keys: head), draws --pictures."""
    drawn = np.linspace(0, len(split) - 1, min(args.pictures, len(split))).astype(int).tolist()
    options |= {"workers": args.workers, "per_image": args.per_image, "threshold": args.threshold}
    result = evaluation.evaluate_maps(maps, split, keep=drawn, **options)
    if "percentile" in head:
        q, by = head["percentile"]["value"], head["percentile"].get("by")
        title += f", {args.normalize} at percentile {q:.2f}"
        title += f", chosen on val by {by} ({head['percentile']['scores'][q]:.2f})" if by else ""
    print(evaluation.table(title, result))
    evaluation.write_results(out, result, **head)
    print(f"written to {out}")
    for index in drawn:
        drawing.draw_result(pictures, split, index, result)
    if drawn:
        print(f"{len(drawn)} pictures in {pictures}")


def evaluate_folder(args: argparse.Namespace) -> None:
    """--score-maps: needs the lists alone; images for --pictures, masks where the data set has them."""
    places = args.data_root or Path("data"), args.splits or Path("data_splits")
    split = load_splits(args.dataset, *places, (args.split,), lists_only=True)[0][args.split]
    if args.pictures:
        split.require_images()
    if not args.score_maps.is_dir():
        raise InputError(f"--score-maps {args.score_maps}: no such folder")
    q = cam.PERCENTILES.get(args.normalize) if args.percentile is None else args.percentile
    setting = {"image_size": optim.image_size(args.dataset), "normalization": args.normalize, "percentile": q}
    maps = evaluation.pair_maps(load_score_maps(args.score_maps, split), split, **setting)
    title = f"{args.dataset} {args.split}, score maps of {args.score_maps}"
    head = {"dataset": args.dataset, "split": args.split, **dict.fromkeys(("arch", "method", "checkpoint"))}
    head |= {"normalize": args.normalize} | ({} if q is None else {"percentile": {"value": q}})
    name = f"results_{args.score_maps.resolve().name}_{args.split}{args.suffix}.json"
    out = args.out or Path(name)
    pictures = out.with_suffix("") if out.suffix else out.with_name(f"{out.name}_pictures")
    finish(args, maps, split, title, head, out, pictures)


def localize_images(args: argparse.Namespace) -> None:
    """--images: boxes.json, and a picture per image. Skips unreadable files; the exit code is then 1."""
    names = ("checkpoint", "normalize", "percentile", "threshold", "amp")
    names += ("data_root", "splits", "batch_size", "workers")
    setting = {name: getattr(args, name) for name in names}
    localizer = evaluation.Localizer(args.run, args.device, **setting)
    if localizer.note:
        used = f"{localizer.threshold} of the map's maximum is used; --threshold sets another"
        print(f"no threshold was chosen on val ({localizer.note}): {used}")
    folder, files = args.out or args.run / "images", image_files(args.images)
    entries, failed = [], 0
    try:
        for path in counted(files, "images", len(files)):
            try:
                image = decode(path, upright=True)
            except InputError as error:
                failed += 1
                sys.stderr.write(f"skipped: {error}\n")
                continue
            found = localizer(image)
            entry = {"image": str(path), "width": image.width, "height": image.height}
            entries.append(entry | {"box": found.box, "top5": found.top5})
            with atomic_write(folder / f"{len(entries):05d}_{path.stem[:80]}.png") as part:
                shown = drawing.in_proportion(image, found.score_map, found.box)
                drawing.localization(*shown).save(part, format="PNG")
            print(f"{path}: {found.text()}", flush=True)
    finally:  # also after Ctrl-C
        write_json(folder / "boxes.json", entries)
    print(f"{len(entries)} images, threshold {localizer.threshold:.3f}; written to {folder}")
    if failed:
        sys.stderr.write(f"{failed} of {len(files)} images could not be read\n")
        sys.exit(1)


if __name__ == "__main__":
    with one_line_errors():
        main()
