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

import json
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader

import bridge_wsol.reproduce.baselines  # noqa: F401  for --help: the compared systems
from bridge_wsol import evaluation, utils
from bridge_wsol.bootstrap import hits_path
from bridge_wsol.config import parse_args, resolve_config, run_folder, write_config
from bridge_wsol.data import Split, TrainImages, eval_loader, to_input, train_loader
from bridge_wsol.datasets import download, load_splits
from bridge_wsol.methods import CAM, find
from bridge_wsol.metrics import selection_score
from bridge_wsol.models import load_pretrained, load_weights
from bridge_wsol.optim import build_optimizer, set_learning_rates
from bridge_wsol.utils import (
    InputError,
    all_gather,
    autocast,
    first_process_first,
    print_rank0,
    rank,
    world_size,
)


@dataclass
class Run:
    """All parts of a run, and how far it is."""

    out: Path
    config: SimpleNamespace
    sources: dict[str, str]  # of the configuration's values
    record: dict[str, Any]  # of the data, from `load_splits`
    device: torch.device
    method: CAM
    step: nn.Module  # the method, wrapped if there are several processes
    optimizer: torch.optim.Optimizer
    splits: dict[str, Split]
    epoch: int = 0  # epochs done
    best: dict[str, Any] | None = None  # epoch and score on val
    val: dict[str, Any] | None = None  # epoch, metrics and levels of the last evaluation on val
    log: list[dict[str, Any]] = field(default_factory=list)


def main(argv: list[str] | None = None) -> None:
    """Flags -> configuration -> data -> network -> epochs -> test."""
    args = parse_args(argv, __doc__)
    utils.set_quiet(args.quiet)
    out = run_folder(args)
    if out.exists() and not args.resume:
        raise InputError(f"{out}: exists: pass --resume to continue it, pass another --out, or remove it")
    resumed = (out / "last.pt").exists()
    checkpoint = evaluation.load_checkpoint(out / "last.pt") if resumed else None
    config, sources = resolve_config(args, checkpoint)
    device = utils.resolve_device(config.device)
    utils.keep_freed_memory()
    utils.join_processes(device)
    utils.seed_everything(config.seed)
    if config.workers is None:
        config.workers = utils.default_workers(device)
    if args.download:
        first_process_first(lambda: download(config.dataset, Path(config.data_root)))

    run = build(out, config, sources, device, fresh=checkpoint is None)
    if checkpoint:
        resume(run, checkpoint)
    if rank() == 0:
        write_config(out / "config.json", config, sources, run.record, device)
    images = TrainImages(run.splits["train"], config.resize_size, config.image_size, config.seed)
    loader = None
    for epoch in range(run.epoch + 1, config.epochs + 1):
        batch_size = config.warm_batch_size if epoch <= config.warm_epochs else config.batch_size
        if loader is None or loader.batch_sampler.batch_size != batch_size:
            loader = train_loader(images, batch_size, config.workers)
        train_and_validate(run, loader, epoch)
    all_gather(None)  # until the last checkpoint is written
    test(run)
    if dist.is_initialized():
        dist.destroy_process_group()


def build(out: Path, c: SimpleNamespace, sources: dict[str, str], device: torch.device, fresh: bool) -> Run:
    """Data, method and optimizer of configuration c. fresh: load the pretrained weights."""
    where = c.dataset, c.data_root, c.lists
    splits, record = first_process_first(lambda: load_splits(*where, val_per_class=c.val_per_class))
    c.val_per_class = record["val_per_class"]  # decided once per run
    for note in record["notes"]:
        print_rank0(note)
    if not splits["val"].boxes and not splits["val"].masks:
        print_rank0("val has no boxes: the best epoch is the one with the best Top-1 classification on val")
    method = find(c.method)(c, record["num_classes"])
    if fresh:
        load_fc = c.dataset == "ILSVRC"
        first_process_first(lambda: load_pretrained(method.net, c.arch, c.weights, load_fc))
    method.net.freeze_blocks(c.frozen_blocks)
    method.to(device, memory_format=torch.channels_last)
    step: nn.Module = method
    if world_size() > 1:
        if device.type == "cuda":  # batch norm over the global batch; the CPU has no such layer
            method = nn.SyncBatchNorm.convert_sync_batchnorm(method)
        step = nn.parallel.DistributedDataParallel(method)
    return Run(out, c, sources, record, device, method, step, build_optimizer(method, c), splits)


def resume(run: Run, checkpoint: dict[str, Any]) -> None:
    """Restores a run from last.pt and log.jsonl. Raises InputError where its lists have changed."""
    if checkpoint["lists"] != run.record["lists"]:
        raise InputError(f"{run.out}: the lists have changed since the run began: train in another --out")
    load_weights(run.method.net, checkpoint["model"], run.out / "last.pt")
    run.optimizer.load_state_dict(checkpoint["optimizer"])
    utils.set_random_states(checkpoint["random_states"])
    run.epoch, run.best, run.val = (checkpoint[name] for name in ("epoch", "best", "val"))
    lines = (run.out / "log.jsonl").read_text(encoding="utf-8").splitlines()
    run.log = [entry for entry in map(json.loads, lines) if entry["epoch"] <= run.epoch]
    print_rank0(f"resumed after epoch {run.epoch}")


def train_and_validate(run: Run, loader: DataLoader, epoch: int) -> None:
    """One epoch: training, val, log line, checkpoints."""
    c, started = run.config, time.perf_counter()
    rates = set_learning_rates(run.optimizer, epoch, c.decay_at, c.decay_factor)
    if rank() > 0:  # own dropout draws; the first process's stream is the one in the checkpoint
        torch.manual_seed(int(np.random.SeedSequence([c.seed, epoch, rank()]).generate_state(1)[0]))
    entry = {"epoch": epoch, **train_one_epoch(run, loader, epoch), "lr": rates[0], "lr_new": rates[1]}
    entry["images_per_second"] = len(run.splits["train"]) / (time.perf_counter() - started)
    # Running statistics of batch norm: the first process's, as in the checkpoint.
    for buffer in run.method.buffers() if world_size() > 1 else ():
        dist.broadcast(buffer, src=0)
    if epoch % c.val_every == 0 or epoch == c.epochs:
        val_loader = eval_loader(run.splits["val"], c.batch_size, c.image_size, c.workers)
        maps = evaluation.network_maps(run.method, val_loader, c.amp)
        found = evaluation.evaluate_maps(maps, run.splits["val"], workers=c.workers)
        run.val = {"epoch": epoch, "metrics": found["metrics"], "levels": found["levels"]}
        entry["val"], (_, score) = found["metrics"], selection_score(found["metrics"])  # appendix B
        if run.best is None or score > run.best["score"]:
            run.best = {"epoch": epoch, "score": score}
    run.epoch, entry["seconds"] = epoch, time.perf_counter() - started
    run.log.append(entry)
    if rank() == 0:
        utils.write_text(run.out / "log.jsonl", "".join(json.dumps(line) + "\n" for line in run.log))
        if run.best and run.best["epoch"] == epoch:
            save(run, "best.pt")
        save(run, "last.pt")  # written last: if the process ends before, --resume repeats the epoch
    print_rank0(epoch_line(run))


def train_one_epoch(run: Run, loader: DataLoader, epoch: int) -> dict[str, float]:
    """One pass over train: means over all images of each loss and of "top1", in percent.

    Raises InputError for a loss that is not finite, with every loss by name.
    """
    run.step.train()
    loader.batch_sampler.set_epoch(epoch)
    sums, values, title = {}, {}, f"epoch {epoch}/{run.config.epochs}"
    batches = utils.progress(loader, title, len(loader), "steps", lambda: f"  {loss_text(values)}")
    for number, (images, labels) in enumerate(batches):
        images, labels = to_input(images, run.device), labels.to(run.device, non_blocking=True)
        own, whole = loader.batch_sampler.size(number)
        run.optimizer.zero_grad(set_to_none=True)  # before the forward pass, which needs the memory
        with autocast(run.device, run.config.amp):
            terms, logits = run.step(images, labels, epoch)
        loss = sum(weight * value for weight, value in terms.values())
        # Gradients are averaged over processes. In a smaller last batch the processes' shares differ.
        (loss * (own * world_size() / whole)).backward()
        run.optimizer.step()

        top1 = 100 * (logits.argmax(1) == labels).float().mean()
        values = {"loss": loss, "top1": top1} | {name: value for name, (_, value) in terms.items()}
        values = {name: value.detach() for name, value in values.items()}
        for name, value in values.items():
            sums[name] = sums.get(name, 0) + value * own
        # A sum stays non-finite. Reading it makes the CPU wait for the GPU.
        read = run.device.type == "cpu" or number % 20 == 19 or number + 1 == len(loader)
        if read and not torch.isfinite(sums["loss"]):
            late = "" if run.device.type == "cpu" else " or one of the 19 before it"
            step = f"step {number + 1}/{len(loader)}{late} ({loss_text(values)})"
            problem = f"non-finite loss in {title}, {step}"
            raise InputError(f"{problem}; last.pt was not updated: lower --lr and --lr-new")
    parts = all_gather({name: value.cpu() for name, value in sums.items()})
    return {name: float(sum(part[name] for part in parts)) / len(run.splits["train"]) for name in parts[0]}


def test(run: Run) -> None:
    """The best and the last checkpoint on test: tables, results_{best,last}_test.json, .npz (hits)."""
    c, split, results = run.config, run.splits["test"], {}
    for which in ("best", "last"):
        trained = evaluation.TrainedRun(run.out, which, run.device)
        epoch, path = trained.checkpoint["epoch"], run.out / evaluation.results_name(which, "test")
        if epoch in results:
            if rank() == 0:
                with utils.atomic_write(hits_path(path)) as part:
                    shutil.copyfile(path.with_name("results_best_test.npz"), part)
            evaluation.write_results(path, results[epoch], trained.head("test"))
            print_rank0(f"the same epoch: written to {path}")
            continue
        maps, levels = trained.maps(split, c.batch_size, c.workers), trained.val_levels
        options = {"val_levels": levels, "hits_file": hits_path(path), "intervals": True}
        results[epoch] = evaluation.evaluate_maps(maps, split, workers=c.workers, **options)
        evaluation.report(path, results[epoch], trained.head("test"))
        if which == "best" and c.pictures and split.boxes:
            drawn, level = evaluation.evenly_spaced(split, c.pictures), results[epoch]["levels"]["largest"]
            maps = trained.maps(drawn, c.batch_size, workers=0)
            evaluation.draw_split(run.out / "boxes_test.png", drawn, maps, level)


def save(run: Run, name: str) -> None:
    """Writes a checkpoint."""
    checkpoint = {"model": run.method.net.state_dict(), "optimizer": run.optimizer.state_dict()}
    checkpoint |= {"random_states": utils.random_states(), "epoch": run.epoch, "best": run.best}
    checkpoint |= {"val": run.val, "config": vars(run.config), "sources": run.sources}
    checkpoint |= {key: run.record[key] for key in ("num_classes", "classes", "lists")}
    utils.save_checkpoint(run.out / name, checkpoint)


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
