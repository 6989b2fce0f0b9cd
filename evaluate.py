"""Evaluates a trained run, or any method's score maps, by the protocol of Choe et al. (CVPR 2020).

    python evaluate.py runs/CUB_vgg16_bridge                               the best checkpoint on test
    python evaluate.py FILE.pth --dataset CUB --arch vgg16                 a CAM network that other code saved
    python evaluate.py --score-maps DIR --dataset CUB --split test         any method's maps, same protocol
    python evaluate.py runs/CUB_vgg16_bridge --images photo.jpg folder/    boxes and pictures for your images

Prints a table and writes RUN/results_<checkpoint>_<split>.json; for score maps results_<DIR>_<split>.json.
A file of the same name with .npz has what is right image by image, for `experiments difference`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import bridge_wsol.reproduce.baselines  # noqa: F401  for --help: the compared systems
from bridge_wsol import cam, config, evaluation, utils
from bridge_wsol.bootstrap import hits_path
from bridge_wsol.data import Split, load_score_maps, open_rgb
from bridge_wsol.datasets import image_files, load_split
from bridge_wsol.methods import METHODS
from bridge_wsol.models import ARCHS, read_weights
from bridge_wsol.utils import InputError, flag


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The flags; map_options has the values of the map that were given."""
    form = argparse.RawDescriptionHelpFormatter
    parser = utils.Parser(description=__doc__, formatter_class=form)
    add = parser.add_argument_group("what to evaluate").add_argument
    text = "run folder of train.py, or a file of the authors' or Choe et al.'s code (needs --dataset, --arch)"
    add("run", nargs="?", type=Path, metavar="RUN", help=text)
    add("--checkpoint", choices=("best", "last"), default="best", help="default best")
    add("--split", choices=("test", "val"), default="test", help="default test")
    text = "folder of score maps, instead of RUN; needs --dataset"
    add("--score-maps", type=Path, metavar="DIR", help=text)
    add("--dataset", metavar="D", help="with --score-maps or a file: the data set")
    add("--arch", choices=ARCHS, help="with a file: its network")
    text = "with a file of resnet50: image pixels per location of the map, 8 or 16 (vgg16's file tells it)"
    add("--stride", type=int, choices=(8, 16), help=text)
    text = "with --score-maps: pixels of a side that maps are resized to (default: the data set's, 224)"
    add("--image-size", type=int, metavar="N", help=text)
    text = "images, or folders of them, to localize with RUN"
    add("--images", type=Path, nargs="+", metavar="PATH", help=text)

    add = parser.add_argument_group("maps and thresholds").add_argument
    text = "normalization of the score maps (default minmax, the protocol's)"
    add("--normalize", choices=cam.NORMALIZATIONS, default="minmax", help=text)
    text = 'percentile for pas (default 0.9) or ivr (0.45), in [0, 1); "val": select ivr\'s on val'
    add("--percentile", type=percentile, metavar="Q", help=text)
    text = (
        "fixed threshold, a fraction of each map's maximum, in [0, 1): adds GT-known and Top-k Loc of "
        "the largest contour at T (the rule of CAM, CVPR 2016); with --images: instead of val's threshold"
    )
    add("--threshold", type=float, metavar="T", help=text)
    map_options = {name: cls.all_values()[name] for cls in METHODS.values() for name in cls.map_options}
    for name, value in map_options.items():
        add(flag(name), choices=value.allowed, help=f"{value.help} (default: the run's)")

    add = parser.add_argument_group("where things are").add_argument
    add("--data-root", type=Path, metavar="DIR", help="default: the run's, or data")
    add("--lists", type=Path, metavar="DIR", help="folder of the lists (default: the run's, or data_splits)")
    text = "results file; with --images: folder for boxes.json and pictures"
    add("--out", type=Path, metavar="PATH", help=text)
    add("--save-maps", type=Path, metavar="DIR", help="writes each score map to DIR/<image id>.npy")
    add("--per-image", type=Path, metavar="FILE.csv", help="writes class, IoU and box of every image")
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
    _check(parser, args)
    return args


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Raises InputError for flags that contradict each other."""
    if (args.run is None) == (args.score_maps is None):
        parser.error("pass either a RUN folder or --score-maps DIR")
    if args.score_maps and not args.dataset:
        parser.error("--score-maps needs --dataset")
    if args.score_maps and (args.images or args.save_maps or args.map_options or args.percentile == "val"):
        parser.error("--images, --save-maps, --percentile val and values of a map need a RUN")
    if args.images and (args.save_maps or args.per_image or args.pictures or args.map_options):
        parser.error("--save-maps, --per-image, --pictures and values of a map do not go with --images")
    if args.run and args.run.is_file():
        if not args.dataset or not args.arch:
            parser.error(f"{args.run}: a file needs --dataset and --arch")
    elif args.run and (args.dataset or args.image_size or args.arch or args.stride):
        flags = "--dataset, --image-size, --arch and --stride"
        parser.error(f"{flags} go with --score-maps or a file; a run folder has its own: remove the flag")
    if args.percentile is not None and args.normalize not in cam.PERCENTILES:
        parser.error(f"--percentile needs --normalize {' or '.join(cam.PERCENTILES)}")
    if args.percentile == "val" and (args.normalize != "ivr" or args.images):
        parser.error("--percentile val needs --normalize ivr, without --images")
    if min(args.batch_size, args.image_size or 1) < 1 or min(args.workers or 0, args.pictures) < 0:
        parser.error("--batch-size and --image-size must be at least 1, --workers and --pictures at least 0")
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


def evaluate_run(args: argparse.Namespace) -> None:
    """RUN on a split."""
    device = utils.resolve_device(args.device)
    checkpoint = foreign_checkpoint(args) if args.run.is_file() else None
    which = args.run.name if checkpoint else args.checkpoint
    run = evaluation.TrainedRun(args.run, which, device, args.map_options, checkpoint)
    workers = utils.default_workers(run.device) if args.workers is None else args.workers
    places, loading = (args.data_root, args.lists), (args.batch_size, workers, args.amp)
    split, head = run.split(args.split, *places), run.head(args.split, args.normalize)
    q = cam.PERCENTILES.get(args.normalize) if args.percentile is None else args.percentile
    # The thresholds in the checkpoint belong to the run's own maps, with min-max.
    val_levels, choice = run.val_levels if args.normalize == "minmax" else None, {}
    if val_levels is None and (args.split != "val" or q == "val"):
        try:
            val = run.split("val", *places)
        except InputError as error:
            if checkpoint is None or q == "val":
                raise
            print(f"no thresholds of val: {error}")
            val = None
        if q == "val":
            maps = run.maps(val, *loading, normalization=None)
            q, choice, val_levels = evaluation.choose_percentile(maps, val, run.method, workers)
        elif val and val.boxes:
            maps = run.maps(val, *loading, normalization=args.normalize, percentile=q)
            val_levels = evaluation.evaluate_maps(maps, val, workers=workers)["levels"]

    def maps_of(images: Split) -> Iterator[evaluation.MapBatch]:
        return run.maps(images, *loading, normalization=args.normalize, percentile=q)

    head |= {} if q is None else {"percentile": {"value": q, **choice}}
    of_file = (args.run.stem, args.run.parent) if checkpoint else (args.checkpoint, args.run)
    name = (of_file[0], args.split, args.normalize, args.percentile, args.map_options)
    out = args.out or of_file[1] / evaluation.results_name(*name)
    finish(args, maps_of, split, out, head, workers=workers, val_levels=val_levels, save_maps=args.save_maps)


def foreign_checkpoint(args: argparse.Namespace) -> dict[str, Any]:
    """A file of another code (`models.read_weights`) as a checkpoint of the CAM baseline."""
    state, stride = read_weights(args.run, args.arch)
    if not isinstance(fc := state.get("fc.weight"), torch.Tensor):
        held = ", ".join([*state][:3]) or "nothing"
        raise InputError(f"{args.run}: expected a network with conv6 and fc; the file holds {held}, ...")
    if stride is None and args.stride is None:
        raise InputError(f"{args.run}: the file does not tell the stride: pass the --stride of its training")
    if stride and args.stride and stride != args.stride:
        raise InputError(f"--stride {args.stride}: the layers of {args.run} say {stride}")
    flags = ["--dataset", args.dataset, "--arch", args.arch, "--method", "cam"]
    flags += ["--stride", str(stride or args.stride), "--val-per-class", "0"]
    values, sources = config.resolve_config(config.parse_args(flags, ""))
    known = {"num_classes": len(fc), "classes": None, "lists": {}, "epoch": None, "val": None}
    return known | {"model": state, "config": vars(values), "sources": sources}


def evaluate_folder(args: argparse.Namespace) -> None:
    """--score-maps: needs the lists alone; masks where the data set has them, images for --pictures."""
    places = args.data_root or Path("data"), args.lists or Path("data_splits")
    split = load_split(args.dataset, args.split, *places)
    if not args.score_maps.is_dir():
        raise InputError(f"--score-maps {args.score_maps}: no such folder")
    q = cam.PERCENTILES.get(args.normalize) if args.percentile is None else args.percentile
    size = args.image_size or config.image_size(args.dataset)

    def maps_of(images: Split) -> Iterator[evaluation.MapBatch]:
        pairs, how = load_score_maps(args.score_maps, images), {"normalization": args.normalize}
        return evaluation.pair_maps(pairs, images, image_size=size, percentile=q, **how)

    head = {"dataset": args.dataset, "split": args.split, "normalize": args.normalize}
    head |= dict.fromkeys(("arch", "method", "checkpoint")) | {"score_maps": str(args.score_maps)}
    head |= {} if q is None else {"percentile": {"value": q}}
    name = (args.score_maps.resolve().name, args.split, args.normalize, args.percentile)
    out = args.out or Path(evaluation.results_name(*name))
    finish(args, maps_of, split, out, head, workers=utils.cores() if args.workers is None else args.workers)


def finish(
    args: argparse.Namespace, maps_of: Callable, split: Split, out: Path, head: dict[str, Any], **options: Any
) -> None:
    """Evaluates the maps of the split, writes the results file, prints its table, draws --pictures."""
    options |= {"per_image": args.per_image, "threshold": args.threshold, "hits_file": hits_path(out)}
    options |= {"intervals": not args.no_intervals}
    result = evaluation.evaluate_maps(maps_of(split), split, **options)
    evaluation.report(out, result, head)
    if args.pictures and split.boxes:
        drawn, path = evaluation.evenly_spaced(split, args.pictures), out.with_name(f"boxes_{out.stem}.png")
        evaluation.draw_split(path, drawn, maps_of(drawn), result["levels"]["largest"])


def localize_images(args: argparse.Namespace) -> None:
    """--images: boxes.json, and a picture per image. Skips unreadable files; the exit code is then 1."""
    names = ("checkpoint", "normalize", "percentile", "threshold", "amp")
    setting = {name: getattr(args, name) for name in (*names, "data_root", "lists", "batch_size")}
    localizer = evaluation.Localizer(args.run, args.device, workers=args.workers or 0, **setting)
    if localizer.note:
        used = f"{localizer.threshold} of the map's maximum is used; --threshold sets another"
        print(f"no threshold was chosen on val ({localizer.note}): {used}")
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
            picture = evaluation.draw_found(image, found)
            evaluation.save_picture(folder / f"{len(entries):05d}_{utils.short(path.stem, 80)}.png", picture)
            print(f"{path}: {found.text()}", flush=True)
    finally:  # also after Ctrl-C
        utils.write_json(folder / "boxes.json", entries)
    print(f"{len(entries)} images, threshold {localizer.threshold:.3f}; written to {folder}")
    if failed:
        sys.stderr.write(f"{failed} of {len(files)} images could not be read\n")
        sys.exit(1)


if __name__ == "__main__":
    with utils.one_line_errors():
        main()
