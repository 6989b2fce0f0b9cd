"""Trains a network by the method of Kim et al. (CVPR 2022) and evaluates it on test.

    python train.py                                            the embedded demo: nothing to download, minutes on a CPU
    python train.py --dataset CUB --arch vgg16                 the paper's run, every value from the preset
    python train.py --dataset CUB --arch vgg16 --method cam    the vanilla classifier through the same path
    python train.py --dataset my_photos/                       a folder with one sub-folder of images a class
    python train.py --dataset CUB --arch vgg16 --resume        goes on after an interruption

Writes --out (default runs/DATASET_ARCH_METHOD): config.json, log.jsonl, last.pt, best.pt, results_*.json.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from bridge_wsol import optim
from bridge_wsol.baselines import CAM, METHODS
from bridge_wsol.data import load_splits, test_loader, to_input, train_loader
from bridge_wsol.datasets import download_cub
from bridge_wsol.models import ARCHS, load_pretrained, restore_weights
from bridge_wsol.utils import (
    InputError, Parser, autocast, default_workers, environment, load_tensors, one_line_errors, random_states, resolve_device,
    save_checkpoint, seed_everything, set_random_states, write_json, write_text,
)
from evaluate import evaluate_maps, load_run, network_maps, selection_score, table, write_results

# What is no preset's business. None: decided by the data (val_per_class) or the machine (workers).
DEFAULTS = {
    "data_root": "data", "splits": "data_splits", "weights": "imagenet", "seed": 0, "val_every": 1, "val_per_class": None,
    "workers": default_workers(), "device": "auto", "amp": "auto",
}
# A resumed run may have others of these than the interrupted one: they change where, how fast and how long it runs, not what it computes.
FREE_ON_RESUME = ("epochs", "val_every", "workers", "device", "amp", "data_root", "splits")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS)
    parser.add_argument("--dataset", default="demo", help="demo (default, drawn on first use), CUB, ILSVRC, OpenImages, or a folder with one sub-folder of images a class")
    parser.add_argument("--download", action="store_true", default=False, help="fetch CUB_200_2011 into --data-root where it is not there yet")
    parser.add_argument("--arch", choices=ARCHS, default="vgg16")
    parser.add_argument("--method", choices=METHODS, default="bridge", help="cam: the vanilla classifier")
    parser.add_argument("--out", type=Path, default=None, help="default: runs/DATASET_ARCH_METHOD")
    parser.add_argument("--resume", action="store_true", default=False, help="go on with the run in --out, with its values")
    parser.add_argument("--data-root", metavar="DIR", help="the data set as distributed (default data)")
    parser.add_argument("--splits", metavar="DIR", help="lists of images, labels and boxes (default data_splits)")
    parser.add_argument("--weights", metavar="W", help="imagenet (torchvision's, the default but for demo), none, or a file of them")
    parser.add_argument("--val-per-class", type=int, metavar="N", help="hold N images a class out from train for val (2 where val has no list)")
    parser.add_argument("--val-every", type=int, metavar="N", help="choose the best among every N-th epoch and the last (default 1)")
    parser.add_argument("--seed", type=int, metavar="N")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that load images, and as many that sweep maps (default: one a core, at most 8)")
    parser.add_argument("--device", help="auto (default), cpu, cuda, cuda:1, ...")
    parser.add_argument("--amp", choices=("auto", "bf16", "off"), help="auto (default): bf16 on GPUs that have it")
    group = parser.add_argument_group("preset values, under their paper names (default: bridge_wsol/optim.py for --dataset and --arch)")
    for name in ("epochs", "warm_epochs", "batch_size", "warm_batch_size"):
        group.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N")
    for name in ("lr", "lr_new", "lambda_sim", "lambda_norm", "lambda_drop", "tau_fg", "tau_bg", "gamma", "p", "decay_factor"):
        group.add_argument(f"--{name.replace('_', '-')}", type=float, metavar="X")
    group.add_argument("--decay-at", type=int, nargs="*", metavar="EPOCH", help="epochs, from 1, from which the rates are multiplied once more")
    group.add_argument("--norm-class", choices=("target", "max"), help="whose S splits the locations in L_norm")
    group = parser.add_argument_group("values of one method (default: its `preset` in bridge_wsol/baselines.py)")
    for name, value in method_values().items():
        group.add_argument(f"--{name.replace('_', '-')}", type=type(value), metavar="X")
    return parser.parse_args(argv)


def method_values() -> dict[str, Any]:
    """The hyperparameters that methods add to the presets, each with an example of its value."""
    own = {name: value for method in METHODS.values() for arch in ARCHS for name, (value, _) in method.preset("CUB", arch).items()}
    return {name: value for name, value in own.items() if name not in optim.preset("CUB", "vgg16")}


def resolve_config(args: argparse.Namespace, interrupted: dict[str, Any] | None) -> tuple[SimpleNamespace, dict[str, str]]:
    """(every value of the run, where each comes from: the preset and its source, a flag, or the default).

    A resumed run has the interrupted one's values. Raises InputError for a flag that contradicts them, or a value out of range.
    """
    flags = {name: value for name, value in vars(args).items() if name not in ("resume", "out", "download")}
    if interrupted:
        values, sources = dict(interrupted["config"]), dict(interrupted["sources"])
        for name, value in flags.items():
            if name not in FREE_ON_RESUME and value != values[name]:
                raise InputError(
                    f"--{name.replace('_', '-')} {value}: the run to resume has {values[name]}: give that one, or choose another --out"
                )
    else:
        preset = optim.preset(args.dataset, args.arch) | METHODS[args.method].preset(args.dataset, args.arch)
        values = DEFAULTS | {name: value for name, (value, _) in preset.items()}
        sources = dict.fromkeys(DEFAULTS, "default") | {name: f"preset: {source}" for name, (_, source) in preset.items()}
        for name in method_values().keys() & flags.keys() - preset.keys():
            raise InputError(f"--{name.replace('_', '-')}: not a value of --method {args.method}")
        if "batch_size" in flags:
            flags.setdefault("warm_batch_size", flags["batch_size"])
    c = SimpleNamespace(**(values | flags))

    def require(condition: bool, name: str, what: str) -> None:
        if not condition:
            raise InputError(f"--{name.replace('_', '-')} {getattr(c, name)}: must be {what}")

    for name in ("epochs", "batch_size", "warm_batch_size", "val_every"):
        require(getattr(c, name) >= 1, name, "at least 1")
    for name in ("warm_epochs", "workers", "seed", "lambda_sim", "lambda_norm", "lambda_drop", "gamma"):
        require(getattr(c, name) >= 0, name, "at least 0")
    for name in ("lr", "lr_new", "decay_factor"):
        require(0 < getattr(c, name) < float("inf"), name, "above 0")
    for name in ("tau_fg", "tau_bg", "p"):
        require(0 <= getattr(c, name) <= 1, name, "in [0, 1]")
    return c, sources | dict.fromkeys(flags, "flag")


def train_one_epoch(
    model: nn.Module, method: CAM, loader: DataLoader, optimizer: torch.optim.Optimizer, c: SimpleNamespace, epoch: int, device: torch.device
) -> dict[str, float]:
    """One pass over train. Returns each loss by name (means over images, unweighted), "loss" (their weighted sum), "top1" in percent."""
    model.train()
    sums: dict[str, torch.Tensor] = {}
    for images, labels in loader:
        images, labels = to_input(images, device), labels.to(device, non_blocking=True)
        with autocast(device, c.amp):
            terms, logits = method.losses(model, images, labels, epoch)
        loss = sum(weight * value for weight, value in terms.values())

        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        values = {"loss": loss, "top1": 100 * (logits.argmax(1) == labels).float().mean()} | {name: value for name, (_, value) in terms.items()}
        for name, value in values.items():
            sums[name] = sums.get(name, 0) + value.detach() * len(labels)
    return {name: float(value) / len(loader.dataset) for name, value in sums.items()}


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    name = Path(args.dataset).resolve().name if optim.is_folder(args.dataset) else args.dataset
    out = args.out or Path("runs") / f"{name}_{args.arch}_{args.method}"
    checkpoint = open_run(out, args.resume)
    c, sources = resolve_config(args, checkpoint)
    device = resolve_device(c.device)
    seed_everything(c.seed)

    if args.download:
        if c.dataset != "CUB":
            raise InputError(f"--download fetches CUB; for {c.dataset}, see the README's section on data")
        download_cub(Path(c.data_root))
    splits, record = load_splits(c.dataset, Path(c.data_root), Path(c.splits), ("train", "val", "test"), c.val_per_class)
    for what in ("lists", "val"):
        if what in record:
            print(f"{what}: {record[what]}")
    if not splits["val"].boxes and not splits["val"].masks:
        print("val has no boxes: the best epoch is the one with the highest Top-1 classification accuracy on it")
    method = METHODS[c.method](c)
    model = method.network(record["num_classes"])
    if checkpoint is None:
        load_pretrained(model, c.arch, c.weights, keep_fc=c.dataset == "ILSVRC")
    model.to(device, memory_format=torch.channels_last)
    optimizer = optim.build_optimizer(
        model, c.arch, lr=c.lr, lr_new=c.lr_new, momentum=c.momentum, nesterov=c.nesterov, weight_decay=c.weight_decay
    )
    done, best, val = 0, None, None
    if checkpoint is not None:
        restore_weights(model, checkpoint["model"], out / "last.pt")
        optimizer.load_state_dict(checkpoint["optimizer"])
        set_random_states(checkpoint["random_states"])
        done, best, val = checkpoint["epoch"], checkpoint["best"], checkpoint["val"]
        print(f"resumed after epoch {done}")
    resolved = {name: {"value": value, "source": sources[name]} for name, value in sorted(vars(c).items())}
    write_json(out / "config.json", {"config": resolved, "data": record, "environment": environment(device)})
    log = read_log(out / "log.jsonl", done)

    # The batch size changes after the warm stage (CUB, VGG16), so each stage has its loader; the epoch decides order and crops.
    in_stage = {"resize_size": c.resize_size, "image_size": c.image_size, "seed": c.seed, "workers": c.workers}
    loaders = {size: train_loader(splits["train"], size, **in_stage) for size in {c.warm_batch_size, c.batch_size}}
    evaluation = {"method": method, "device": device, "amp": c.amp, "normalization": "minmax", "image_size": c.image_size}
    val_loader = test_loader(splits["val"], c.batch_size, image_size=c.image_size, workers=c.workers)

    started = time.perf_counter()
    for epoch in range(done + 1, c.epochs + 1):
        epoch_started = time.perf_counter()
        rates = optim.set_learning_rates(optimizer, epoch, c.decay_at, c.decay_factor)
        loader = loaders[c.warm_batch_size if epoch <= c.warm_epochs else c.batch_size]
        loader.sampler.epoch = epoch
        losses = train_one_epoch(model, method, loader, optimizer, c, epoch, device)
        images_per_second = len(splits["train"]) / (time.perf_counter() - epoch_started)
        if not math.isfinite(losses["loss"]):
            by_name = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
            raise InputError(f"epoch {epoch}: the loss is not finite ({by_name}); lower --lr and --lr-new; {out} keeps the epochs before")

        entry: dict[str, Any] = {"epoch": epoch, **losses, "lr": rates[0], "lr_new": rates[1]}
        is_best = False
        if epoch % c.val_every == 0 or epoch == c.epochs:
            val = evaluate_maps(network_maps(model, val_loader, **evaluation), splits["val"], workers=c.workers)
            val = {"epoch": epoch, "metrics": val["metrics"], "levels": val["levels"]}
            entry["val"] = val["metrics"]
            is_best = best is None or selection_score(val["metrics"])[1] > best["score"]
            if is_best:
                best = {"epoch": epoch, "score": selection_score(val["metrics"])[1]}
        entry |= {"images_per_second": images_per_second, "seconds": time.perf_counter() - epoch_started}

        log.append(entry)
        write_text(out / "log.jsonl", "".join(json.dumps(line) + "\n" for line in log))
        state = {
            "model": model.state_dict(), "optimizer": optimizer.state_dict(), "random_states": random_states(),
            "epoch": epoch, "best": best, "val": val, "config": vars(c), "sources": sources, "num_classes": record["num_classes"],
            "classes": record.get("classes"),
        }
        if is_best:
            save_checkpoint(out / "best.pt", state)
        save_checkpoint(out / "last.pt", state)  # last of all: a crash before it repeats this epoch, identically
        left = (time.perf_counter() - started) / (epoch - done) * (c.epochs - epoch)
        print(epoch_line(entry, c.epochs, is_best, left), flush=True)

    loader = test_loader(splits["test"], c.batch_size, image_size=c.image_size, workers=c.workers)
    results: dict[int, dict[str, Any]] = {}
    for which in ("best", "last"):
        model, method, checkpoint = load_run(out, which, device)
        epoch = checkpoint["epoch"]
        if epoch not in results:
            maps = network_maps(model, loader, **evaluation)
            results[epoch] = evaluate_maps(maps, splits["test"], workers=c.workers, val_levels=checkpoint["val"]["levels"])
            print(table(f"{c.dataset} test, {c.arch} {c.method}, {which} checkpoint (epoch {epoch})", results[epoch]))
        head = {"dataset": c.dataset, "arch": c.arch, "method": c.method, "split": "test", "checkpoint": which, "epoch": epoch}
        write_results(out / f"results_{which}_test.json", results[epoch], **head, normalize="minmax")
    print(f"written to {out}")


def open_run(out: Path, resume: bool) -> dict[str, Any] | None:
    """The checkpoint to go on from; None for a new run.

    Raises InputError for an existing folder without --resume, a folder without checkpoint with it, or a damaged checkpoint.
    """
    if not resume:
        if out.exists():
            raise InputError(f"{out}: exists already: go on with --resume, choose another --out, or remove it")
        return None
    if not (out / "last.pt").exists():
        # Interrupted before the first epoch ended, there is nothing to go on from: the same run starts anew.
        return None
    checkpoint = load_tensors(out / "last.pt")
    if not {"model", "optimizer", "random_states", "epoch", "best", "val", "config", "sources"} <= checkpoint.keys():
        raise InputError(f"{out / 'last.pt'}: not a checkpoint of train.py")
    return checkpoint


def read_log(path: Path, epochs: int) -> list[dict[str, Any]]:
    """The lines of the epochs that the checkpoint has; a line of an epoch that was interrupted later is left out."""
    if not epochs:
        return []
    try:
        return [entry for entry in map(json.loads, path.read_text(encoding="utf-8").splitlines()) if entry["epoch"] <= epochs]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: the log of the interrupted run cannot be read ({error})") from error


def epoch_line(entry: dict[str, Any], epochs: int, is_best: bool, seconds_left: float) -> str:
    losses = "  ".join(f"{name} {value:.4f}" for name, value in entry.items() if name == "loss" or name.startswith("l_"))
    line = f"epoch {entry['epoch']}/{epochs}  {losses}  train top-1 {entry['top1']:.1f}"
    if "val" in entry:
        name, score = selection_score(entry["val"])
        line += f"  val {name} {score:.2f}{' (best)' if is_best else ''}, top-1 {entry['val']['top1_cls']:.1f}"
    hours, seconds = divmod(round(seconds_left), 3600)
    return f"{line}  {entry['images_per_second']:.1f} images/s  {hours}h{seconds // 60:02d}m{seconds % 60:02d}s left"


if __name__ == "__main__":
    with one_line_errors():
        main()
