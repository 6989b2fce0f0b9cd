"""Trains a network by the method of Kim et al. (CVPR 2022) and evaluates it on test.

    python train.py                                            the embedded demo: no download, CPU, minutes
    python train.py --dataset CUB --arch vgg16                 the paper's run, every value from the preset
    python train.py --dataset CUB --arch vgg16 --method cam    the CAM baseline, same code path
    python train.py --dataset my_photos/                       your images: one sub-folder per class
    python train.py --dataset CUB --arch vgg16 --resume        continues an interrupted run
    torchrun --nproc_per_node 8 train.py --dataset ILSVRC      one process per GPU, same global batches

Writes --out (default runs/DATASET_ARCH_METHOD): config.json, log.jsonl, last.pt, best.pt, results_*.json.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader

import bridge_wsol.reproduce.baselines  # noqa: F401  for --help: the compared systems
from bridge_wsol import evaluation, localize, utils
from bridge_wsol.config import fingerprint, parse_args, read_config, resolve_config, run_folder, write_config
from bridge_wsol.data import Split, TrainImages, eval_loader, to_input, train_loader
from bridge_wsol.datasets import download, load_splits
from bridge_wsol.evaluation import TrainedRun, evaluate_maps, load_checkpoint
from bridge_wsol.methods import CAM, find
from bridge_wsol.metrics import selection_score
from bridge_wsol.models import load_pretrained, load_weights
from bridge_wsol.optim import build_optimizer, set_learning_rates
from bridge_wsol.utils import InputError, first_process_first, print_rank0, rank, world_size


@dataclass
class Run:
    """The parts of a run, and how far it is."""

    out: Path
    config: SimpleNamespace
    identity: dict[str, Any]  # what a checkpoint says of the run: config, sources, classes, fingerprint
    splits: dict[str, Split]
    device: torch.device
    method: CAM
    step: nn.Module  # the method, wrapped if there are several processes
    optimizer: torch.optim.Optimizer
    epoch: int = 0  # the last one that was trained, or is trained now
    best: dict[str, Any] | None = None  # epoch and score on val
    val: dict[str, Any] | None = None  # epoch, metrics and levels of the last evaluation on val
    log: list[dict[str, Any]] = field(default_factory=list)  # an entry per epoch


def main(argv: list[str] | None = None) -> None:
    """Flags -> configuration, data, network -> epochs -> test."""
    args = parse_args(argv, __doc__)
    utils.set_quiet(args.quiet)
    out = run_folder(args)
    with utils.own_folder(out, args.resume), utils.last_words(f"interrupted: --resume continues {out}"):
        run = open_run(args, out)
        c = run.config
        images = TrainImages(run.splits["train"], c.resize_size, c.image_size, c.seed)
        loaders = lru_cache(maxsize=1)(lambda batch_size: train_loader(images, batch_size, c.workers))
        for epoch in range(run.epoch + 1, c.epochs + 1):
            run.epoch, started = epoch, time.perf_counter()
            lr, lr_new = set_learning_rates(run.optimizer, epoch, c.decay_at, c.decay_factor)
            loader = loaders(c.warm_batch_size if epoch <= c.warm_epochs else c.batch_size)
            entry = {"epoch": epoch, **train_one_epoch(run, loader), "lr": lr, "lr_new": lr_new}
            entry["images_per_second"] = len(images) / (time.perf_counter() - started)
            if (c.val_every and epoch % c.val_every == 0) or epoch == c.epochs:
                entry["val"] = validate(run)
            run.log.append(entry | {"seconds": time.perf_counter() - started})
            save(run)
            print_rank0(epoch_line(run))
        utils.barrier()  # until the last checkpoint is written
        test(run)
        utils.leave_processes()


def open_run(args: argparse.Namespace, out: Path) -> Run:
    """The run in the folder `out`, new or as its last.pt has it; writes config.json."""
    last = out / "last.pt"
    checkpoint = load_checkpoint(last) if last.exists() else None
    if args.resume and checkpoint is None:
        print_rank0(f"{out}: no last.pt to resume: a new run begins")
    c, sources = resolve_config(args.given, checkpoint)
    device = utils.resolve_device(c.device)
    utils.keep_freed_memory()
    utils.join_processes(device)
    utils.seed_everything(c.seed)
    if c.amp == "auto":  # decided once per run, by the first process
        c.amp, sources["amp"] = utils.all_gather(utils.resolve_amp(c.amp, device))[0]
    if c.workers is None:
        c.workers = utils.default_workers(device)

    if args.download:
        first_process_first(lambda: download(c.dataset, Path(c.data_root)))
    where = c.dataset, c.data_root, c.lists
    splits, record = first_process_first(lambda: load_splits(*where, val_per_class=c.val_per_class))
    c.val_per_class = record["val_per_class"]  # decided once per run
    print_rank0("\n".join(record["notes"]))
    if not splits["val"].boxes and not splits["val"].masks:
        print_rank0("val has no boxes: the best epoch is the one with the best Top-1 classification on val")
    elif c.val_every and 0 < len(splits["val"].boxes) < evaluation.ENOUGH_BOXED:
        few = f"val has {len(splits['val'].boxes)} images with boxes: too few to choose the best epoch by"
        print_rank0(f"{few}; --val-every 0 takes the last one")
    identity = {"config": vars(c), "sources": sources}
    identity |= {name: record[name] for name in ("num_classes", "classes")}
    identity["fingerprint"] = {"values": fingerprint(vars(c)), **record.pop("lists")}
    method, step = build(c, record["num_classes"], device, pretrained=checkpoint is None)
    run = Run(out, c, identity, splits, device, method, step, build_optimizer(method, c))
    if checkpoint:
        resume(run, checkpoint)
    if rank() == 0:
        write_config(out / "config.json", identity, record, device)
    return run


def build(c: SimpleNamespace, classes: int, device: torch.device, pretrained: bool) -> tuple[CAM, nn.Module]:
    """(the method, what a training step calls). pretrained: load the weights that --weights names."""
    method = find(c.method)(c, classes)
    if pretrained:
        load_fc = c.dataset == "ILSVRC"
        first_process_first(lambda: load_pretrained(method.net, c.arch, c.weights, load_fc))
    method.net.freeze_blocks(c.frozen_blocks)
    method.to(device, memory_format=torch.channels_last)
    if world_size() == 1:
        return method, method
    if device.type == "cuda":  # batch norm over the global batch; the CPU has no such layer
        method = nn.SyncBatchNorm.convert_sync_batchnorm(method)
    return method, nn.parallel.DistributedDataParallel(method)


def resume(run: Run, checkpoint: dict[str, Any]) -> None:
    """Restores a run from last.pt and log.jsonl. Raises InputError where a split has other images now."""
    before, now = checkpoint["fingerprint"], run.identity["fingerprint"]
    for name in run.splits:
        if before[name]["images"] != now[name]["images"]:
            problem = f"the list of {name} has changed since the run began"
            raise InputError(f"{run.out}: {problem}: train in another --out")
    load_weights(run.method.net, checkpoint["model"], run.out / "last.pt")
    run.optimizer.load_state_dict(checkpoint["optimizer"])
    utils.set_random_states(checkpoint["random_states"])
    run.epoch, run.best, run.val = (checkpoint[name] for name in ("epoch", "best", "val"))
    best = run.out / "best.pt"
    if run.best and (not best.exists() or before["val"]["boxes"] != now["val"]["boxes"]):
        reason = "the boxes of val have changed" if best.exists() else f"{best} is missing"
        how = "is selected among the next ones" if run.epoch < run.config.epochs else "is not selected anew"
        print_rank0(f"{reason}: the best epoch {how}")
        run.best = None
    with suppress(InputError):  # a side file, written anew
        for name, value in read_config(run.out).items():
            if value != (own := checkpoint["config"].get(name)) and vars(run.config).get(name) == own:
                print_rank0(f"{run.out}: {name} is {value} in config.json and {own} in last.pt, which counts")
    if before["values"] != now["values"] and best.exists() and rank() == 0:  # with more epochs, another run
        saved = load_checkpoint(best)
        saved |= {key: run.identity[key] for key in ("config", "sources")}
        saved["fingerprint"]["values"] = now["values"]
        utils.save_checkpoint(best, saved)
    run.log = read_log(run.out / "log.jsonl", run.epoch)
    print_rank0(f"resumed after epoch {run.epoch}")


def read_log(path: Path, epoch: int) -> list[dict[str, Any]]:
    """The entries of log.jsonl up to this epoch. A line that a crash has cut is left out, and said."""
    log = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        with suppress(ValueError, KeyError, TypeError):
            entry = json.loads(line)
            if entry["epoch"] <= epoch:
                log.append(entry | {"seconds": float(entry["seconds"])})
    if len(log) < epoch:
        print_rank0(f"{path}: the losses and times of {epoch - len(log)} of {epoch} epochs are missing")
    return log


def train_one_epoch(run: Run, loader: DataLoader) -> dict[str, float]:
    """One pass over train: means over all images of each loss and of "top1", in percent.

    Raises InputError for a loss that is not finite, with every loss by name.
    """
    c, title, sums, latest = run.config, f"epoch {run.epoch}/{run.config.epochs}", {}, {}
    if rank() > 0:  # own dropout draws; the first process's stream is the one in the checkpoint
        torch.manual_seed(int(np.random.SeedSequence([c.seed, run.epoch, rank()]).generate_state(1)[0]))
    run.step.train()
    loader.batch_sampler.set_epoch(run.epoch)
    batches = utils.progress(loader, title, len(loader), "steps", lambda: f"  {loss_text(latest)}")
    for number, (images, labels) in enumerate(batches):
        images, labels = to_input(images, run.device), labels.to(run.device, non_blocking=True)
        own, whole = loader.batch_sampler.size(number)
        run.optimizer.zero_grad(set_to_none=True)  # before the forward pass, which needs the memory
        with utils.autocast(run.device, c.amp):
            terms, logits = run.step(images, labels, run.epoch)
        loss = sum(weight * value for weight, value in terms.values())
        # Gradients are averaged over processes. In a smaller last batch the processes' shares differ.
        (loss * (own * world_size() / whole)).backward()
        run.optimizer.step()

        top1 = 100 * (logits.argmax(1) == labels).float().mean()
        latest = {"loss": loss, "top1": top1} | {name: value for name, (_, value) in terms.items()}
        latest = {name: value.detach() for name, value in latest.items()}
        sums = {name: sums.get(name, 0) + value * own for name, value in latest.items()}
        # A sum stays non-finite. Reading it makes the CPU wait for the GPU.
        read = run.device.type == "cpu" or number % 20 == 19 or number + 1 == len(loader)
        if read and not torch.isfinite(sums["loss"]):
            problem = f"non-finite loss in {title} ({loss_text(latest)})"
            raise InputError(f"{problem}; last.pt was not updated: lower --lr and --lr-new")
    for buffer in run.method.buffers() if world_size() > 1 else ():
        dist.broadcast(buffer, src=0)  # running statistics of batch norm, as in the checkpoint
    parts = utils.all_gather({name: value.cpu() for name, value in sums.items()})
    return {name: float(sum(part[name] for part in parts)) / len(run.splits["train"]) for name in parts[0]}


def validate(run: Run) -> dict[str, Any]:
    """The metrics on val, by which the best epoch is selected (appendix B)."""
    c, val = run.config, run.splits["val"]
    loader = eval_loader(val, c.batch_size, c.image_size, c.workers)
    maps = evaluation.network_maps(run.method, loader, c.amp)
    result = evaluate_maps(maps, val, workers=c.workers).result
    run.val = {"epoch": run.epoch, "metrics": result["metrics"], **evaluation.thresholds_of(result)}
    _, score = selection_score(result["metrics"])
    if run.best is None or score > run.best["score"]:
        run.best = {"epoch": run.epoch, "score": score}
    return result["metrics"]


def save(run: Run) -> None:
    """Writes log.jsonl and last.pt, and best.pt after the best epoch. The first process writes."""
    if rank() > 0:
        return
    utils.write_text(run.out / "log.jsonl", "".join(json.dumps(entry) + "\n" for entry in run.log))
    checkpoint = run.identity | {"epoch": run.epoch, "best": run.best, "val": run.val}
    checkpoint |= {"model": run.method.net.state_dict(), "optimizer": run.optimizer.state_dict()}
    checkpoint["random_states"] = utils.random_states()
    if run.best and run.best["epoch"] == run.epoch:
        utils.save_checkpoint(run.out / "best.pt", checkpoint)
    # Written last: if the process ends before, --resume repeats the epoch.
    utils.save_checkpoint(run.out / "last.pt", checkpoint)


def test(run: Run) -> None:
    """The best and the last checkpoint, read from their files, on test: tables, results, boxes_test.png."""
    c, split, done = run.config, run.splits["test"], {}
    for name in ("best", "last") if (run.out / "best.pt").exists() else ("last",):
        trained = TrainedRun(run.out, name, run.device, batch_size=c.batch_size, workers=c.workers)
        epoch, path = trained.state["epoch"], run.out / evaluation.results_name(name, "test")
        if first := epoch not in done:
            levels, maps = trained.choose(val=run.splits["val"]).levels, trained.maps(split)
            how = dict(workers=c.workers, val_levels=levels, intervals=True)
            done[epoch] = evaluate_maps(maps, split, **how)
        evaluation.report(path, done[epoch], split, trained.head(split, "test"), table=first)
        if name == "best" and c.pictures and split.boxes:
            drawn, level = localize.evenly_spaced(split, c.pictures), done[epoch].result["levels"]["largest"]
            localize.draw_split(run.out / "boxes_test.png", drawn, trained.maps(drawn), level)


def epoch_line(run: Run) -> str:
    """The last entry of a run's log as text."""
    entry, epochs = run.log[-1], run.config.epochs
    line = f"epoch {run.epoch}/{epochs}  {loss_text(entry)}  train top-1 {entry['top1']:.1f}"
    if "val" in entry:
        name, score = selection_score(entry["val"])
        best = " (best)" if run.best["epoch"] == run.epoch else ""
        line += f"  val {name} {score:.2f}{best}, top-1 {entry['val']['top1_cls']:.1f}"
    left = sum(past["seconds"] for past in run.log) / len(run.log) * (epochs - run.epoch)
    return f"{line}  {entry['images_per_second']:.1f} images/s  {utils.duration(left)} left"


def loss_text(values: dict[str, Any]) -> str:
    """Each loss by name."""
    return "  ".join(f"{k} {float(v):.4f}" for k, v in values.items() if k == "loss" or k.startswith("l_"))


if __name__ == "__main__":
    with utils.one_line_errors():
        main()
