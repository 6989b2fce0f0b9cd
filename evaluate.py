"""Evaluates a trained run, or any method's score maps, by the protocol of Choe et al. (CVPR 2020).

    python evaluate.py runs/CUB_vgg16_bridge                               the best checkpoint on test
    python evaluate.py FILE.pth --dataset CUB --arch vgg16                 a CAM network that other code saved
    python evaluate.py --score-maps DIR --dataset CUB --split test         any method's maps, same protocol
    python evaluate.py runs/CUB_vgg16_bridge --images photo.jpg folder/    boxes and pictures for your images
    torchrun --nproc_per_node 8 evaluate.py RUN                            one process per GPU, same results

Prints a table and writes RUN/results_<checkpoint>_<split>.json; for score maps results_<DIR>_<split>.json.
A file of the same name with .npz has what is correct image by image, for `reproduce difference`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

import bridge_wsol.reproduce.baselines  # noqa: F401  for --help: the compared systems
from bridge_wsol import cam, config, evaluation, localize, utils
from bridge_wsol.data import Split, load_score_maps, open_rgb
from bridge_wsol.datasets import image_files, load_split
from bridge_wsol.evaluation import MapBatch
from bridge_wsol.methods import METHODS
from bridge_wsol.models import ARCHS
from bridge_wsol.utils import InputError, flag, user_path

Maps = Callable[[Split], Iterator[MapBatch]]  # the score maps of a split, or of a part of it


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The flags; map_options has the values of the map that were given."""
    form, folder = argparse.RawDescriptionHelpFormatter, dict(type=user_path, metavar="DIR")
    parser = utils.Parser(description=__doc__, formatter_class=form)
    group = parser.add_argument_group("what to evaluate")
    add = group.add_mutually_exclusive_group(required=True).add_argument
    text = "run folder of train.py, or a file of the authors' or Choe et al.'s code (needs --dataset, --arch)"
    add("run", nargs="?", type=user_path, metavar="RUN", help=text)
    add("--score-maps", **folder, help="folder of score maps, instead of RUN; needs --dataset")
    add = group.add_argument
    add("--checkpoint", choices=("best", "last"), default="best", help="default best")
    add("--split", choices=("test", "val"), default="test", help="default test")
    add("--dataset", type=os.path.expanduser, metavar="D", help="with --score-maps or a file: the data set")
    add("--arch", choices=ARCHS, help="with a file: its network")
    text = "with a file: image pixels per location of the map (default: what the file tells, if it does)"
    add("--stride", type=int, choices=(8, 16), help=text)
    text = "with --score-maps: pixels of a side that maps are resized to (default: the data set's, 224)"
    add("--image-size", type=int, metavar="N", help=text)
    text = "images, or folders of them, to localize with RUN"
    add("--images", type=user_path, nargs="+", metavar="PATH", help=text)

    add = parser.add_argument_group("maps and thresholds").add_argument
    text = "normalization of the score maps (default minmax, the protocol's)"
    add("--normalize", choices=cam.NORMALIZATIONS, default="minmax", help=text)
    text = 'percentile for pas (default 0.9) or ivr (0.45), in [0, 1); "val": select ivr\'s on val'
    add("--percentile", type=percentile, metavar="Q", help=text)
    text = "fixed threshold, a fraction of each map's maximum, in [0, 1): adds GT-known and Top-k Loc of the "
    text += "largest contour at T (the rule of CAM, CVPR 2016); with --images: instead of val's threshold"
    add("--threshold", type=float, metavar="T", help=text)
    map_options = {name: cls.all_values()[name] for cls in METHODS.values() for name in cls.map_options}
    for name, value in map_options.items():
        add(flag(name), choices=value.allowed, help=f"{value.help} (default: the run's)")

    add = parser.add_argument_group("where things are").add_argument
    add("--data-root", **folder, help="default: the run's, or data")
    add("--lists", **folder, help="folder of the lists (default: the run's, or data_splits)")
    text = "results file; with --images: folder for boxes.json and pictures"
    add("--out", type=user_path, metavar="PATH", help=text)
    add("--save-maps", **folder, help="writes each score map to DIR/<image id>.npy")
    text = "writes class, IoU and box of every image"
    add("--per-image", type=user_path, metavar="FILE.csv", help=text)
    add("--no-intervals", action="store_true", help="without the 95 %% intervals over images")
    text = "draws N images of the split with boxes and map"
    add("--pictures", type=int, default=0, metavar="N", help=text)

    add = parser.add_argument_group("how it runs").add_argument
    add("--batch-size", type=int, default=32, metavar="N", help="default 32")
    text = "loading and sweeping processes (default: 0 with --images or a RUN on the CPU, else the cores)"
    add("--workers", type=int, metavar="N", help=text)
    add("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, ...")
    add("--amp", choices=("auto", "bf16", "off"), help="default: the run's; auto: bf16 where it is fast")
    add("--quiet", action="store_true", help="no progress line on stderr")
    args = parser.parse_args(argv)
    args.map_options = {name: vars(args)[name] for name in map_options if vars(args)[name] is not None}
    check(parser, args)
    return args


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Raises InputError for flags that do not go together."""
    of_file = args.run is not None and args.run.is_file()
    if (args.score_maps or of_file) and not args.dataset or (of_file and not args.arch):
        parser.error("--score-maps needs --dataset, and a file --dataset and --arch")
    if args.run and not of_file and (args.dataset or args.image_size or args.arch or args.stride):
        flags = "--dataset, --image-size, --arch and --stride"
        parser.error(f"{flags} go with --score-maps or a file; a run folder has its own: remove the flag")
    if (args.score_maps or of_file) and args.images:
        parser.error("--images needs a RUN folder")
    if args.images and os.environ.get("WORLD_SIZE", "1") != "1":
        parser.error("--images runs in one process: start it by python instead of torchrun")
    if (args.score_maps or args.images) and (args.save_maps or args.map_options or args.percentile == "val"):
        parser.error("--save-maps, --percentile val and values of a map need a RUN, without --images")
    if min(args.batch_size, args.image_size or 1) < 1 or min(args.workers or 0, args.pictures) < 0:
        parser.error("--batch-size and --image-size must be at least 1, --workers and --pictures at least 0")
    if args.percentile is not None and args.normalize not in cam.PERCENTILES:
        parser.error(f"--percentile needs --normalize {' or '.join(cam.PERCENTILES)}")
    evaluation.require_threshold(args.threshold)


def percentile(text: str) -> float | str:
    """The value of --percentile."""
    if text != "val" and not 0 <= float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be val, or in [0, 1)")
    return text if text == "val" else float(text)


def main(argv: list[str] | None = None) -> None:
    """A run, a folder of score maps, or one's own images."""
    args = parse_args(argv)
    utils.set_quiet(args.quiet)
    utils.keep_freed_memory()
    if args.score_maps:
        evaluate_folder(args)
    elif args.images:
        localize_images(args)
    else:
        evaluate_run(args)
    utils.leave_processes()


def evaluate_run(args: argparse.Namespace) -> None:
    """RUN on a split: open, split, choose the thresholds, evaluate, report."""
    device, of_file = utils.resolve_device(args.device), args.run.is_file()
    args.workers = utils.default_workers(device) if args.workers is None else args.workers
    names = ("data_root", "lists", "amp", "batch_size", "workers", "map_options")
    setting = {name: getattr(args, name) for name in names}
    if of_file:
        setting["state"] = evaluation.foreign_checkpoint(args.run, args.dataset, args.arch, args.stride)
    name = args.run.name if of_file else args.checkpoint
    run = evaluation.TrainedRun(args.run, name, device, **setting)
    maps = (args.split, args.normalize, args.percentile, args.map_options)
    folder = args.run.parent if of_file else args.run
    args.out = args.out or folder / evaluation.results_name(Path(name).stem, *maps)
    try_outputs(args)
    split = run.split(args.split)
    utils.join_processes(device)
    chosen = evaluation.Chosen(None, args.percentile)
    if args.split != "val" or args.percentile == "val":  # on val itself, they are those of the evaluation
        chosen = run.choose(args.normalize, args.percentile)
    head = run.head(split, args.split, args.normalize) | chosen.head(args.normalize)
    if chosen.reason:
        utils.print_rank0(chosen.reason)
        head["val_thresholds"] = chosen.reason
    maps_of = partial(run.maps, normalize=args.normalize, percentile=chosen.percentile)
    finish(args, split, maps_of, head, chosen.levels if args.split != "val" else None)


def evaluate_folder(args: argparse.Namespace) -> None:
    """--score-maps: needs the lists alone; masks where the data set has them, images for --pictures."""
    split = load_split(args.dataset, args.split, args.data_root or "data", args.lists or "data_splits")
    if not args.score_maps.is_dir():
        raise InputError(f"--score-maps {args.score_maps}: no such folder")
    args.workers = utils.cores() if args.workers is None else args.workers
    args.image_size = args.image_size or config.image_size(args.dataset)
    how = dict(image_size=args.image_size, normalize=args.normalize, percentile=args.percentile)
    name = (args.score_maps.resolve().name, args.split, args.normalize, args.percentile)
    args.out = args.out or Path(evaluation.results_name(*name))
    try_outputs(args)
    utils.join_processes(torch.device("cpu"))
    head = {"dataset": args.dataset, "split": args.split, "normalize": args.normalize}
    head |= dict.fromkeys(("arch", "method", "checkpoint")) | {"score_maps": str(args.score_maps)}
    head |= {"image_size": args.image_size} | evaluation.Chosen(None, args.percentile).head(args.normalize)
    head["fingerprint"] = {args.split: split.fingerprint()}

    def maps_of(images: Split) -> Iterator[MapBatch]:
        return evaluation.pair_maps(load_score_maps(args.score_maps, images), images, **how)

    finish(args, split, maps_of, head)


def try_outputs(args: argparse.Namespace) -> None:
    """Raises InputError, before any work, for an output that cannot be written or is of something else."""
    for path in filter(None, (args.out, args.per_image, args.save_maps and args.save_maps / "map.npy")):
        utils.try_write(path)
    if args.score_maps and args.out.exists():
        before = utils.read_json(args.out, "evaluate.py").get("score_maps")
        if before is None or Path(before).resolve() != args.score_maps.resolve():
            raise InputError(f"{args.out}: has the results of {before or 'a run'}: pass another --out")


def finish(
    args: argparse.Namespace, split: Split, maps_of: Maps, head: dict[str, Any], val_levels: Any = None
) -> None:
    """Evaluates the maps of the split: table, results file, and what else the flags ask for."""
    maps = maps_of(split)
    if args.save_maps:
        maps = evaluation.save_maps(maps, split, args.save_maps)
    how = dict(workers=args.workers, val_levels=val_levels, threshold=args.threshold)
    how |= dict(intervals=not args.no_intervals, keep=args.per_image is not None)
    evaluated = evaluation.evaluate_maps(maps, split, **how)
    evaluation.report(args.out, evaluated, split, head)
    if args.per_image and utils.rank() == 0:
        evaluation.write_per_image(args.per_image, split, evaluated)
    if args.pictures and split.boxes:
        drawn, level = localize.evenly_spaced(split, args.pictures), evaluated.result["levels"]["largest"]
        localize.draw_split(args.out.with_name(f"boxes_{args.out.stem}.png"), drawn, maps_of(drawn), level)


def localize_images(args: argparse.Namespace) -> None:
    """--images: boxes.json, and a picture per image. Skips unreadable files; the exit code is then 1."""
    names = ("checkpoint", "normalize", "percentile", "threshold", "amp")
    setting = {name: getattr(args, name) for name in (*names, "data_root", "lists", "batch_size")}
    localizer = localize.Localizer(args.run, args.device, workers=args.workers or 0, **setting)
    if localizer.note:
        of = " of each map's maximum" if localizer.level is None else ""
        print(f"{localizer.note}; the threshold is {localizer.threshold:.3f}{of}, --threshold sets another")
    folder, files = args.out or args.run / "images", image_files(args.images)
    entries, failed = [], 0
    try:
        for path in utils.progress(files, "images", len(files)):
            try:
                image = open_rgb(path, upright=True)
            except InputError as error:
                failed += 1
                sys.stderr.write(f"skipped: {error}\n")
                continue
            found = localizer(image)
            entry = {"image": str(path), "width": image.width, "height": image.height}
            entries.append(entry | {"box": found.box, "top5": found.top5})
            picture = localize.draw_found(image, found)
            localize.save_picture(folder / f"{len(entries):05d}_{path.stem[:60]}.png", picture)
            print(f"{path}: {found}", flush=True)
    finally:  # also after Ctrl-C
        utils.write_json(folder / "boxes.json", entries)
    print(f"{len(entries)} images, threshold {localizer.threshold:.3f}; written to {folder}")
    if failed:
        sys.stderr.write(f"{failed} of {len(files)} images could not be read\n")
        sys.exit(1)


if __name__ == "__main__":
    with utils.one_line_errors():
        main()
