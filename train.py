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
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader

from bridge_wsol import evaluation, figures, models, optim, processes, utils
from bridge_wsol.baselines import METHODS
from bridge_wsol.data import Split, resized_pixels, split_loaders, to_input
from bridge_wsol.datasets import SPLITS, download, is_folder, load_splits
from bridge_wsol.methods import CAM, Losses
from bridge_wsol.processes import StopRequest, all_gather, all_sum, first_process_first, say, timed
from bridge_wsol.utils import Progress, Stopped, autocast, rank, world_size, write_text


class TrainingStep(nn.Module):
    """The losses of a batch as one module, so that DistributedDataParallel can wrap it."""

    def __init__(self, model: nn.Module, method: CAM):
        super().__init__()
        self.model, self.method = model, method

    def forward(self, images: Tensor, labels: Tensor, epoch: int) -> Losses:
        """images N x 3 x H x W, normalized; labels N."""
        return self.method.losses(self.model, images, labels, epoch)


class EpochState(NamedTuple):
    """How far an epoch is: what an interrupted one needs to continue bit for bit."""

    step: int  # batches done
    sums: dict[str, Tensor]  # each loss and the accuracy, summed over this process's images


@dataclass
class Run:
    """All parts of a run, and how far it is."""

    out: Path
    config: SimpleNamespace
    sources: dict[str, str]  # of the configuration's values
    record: dict[str, Any]  # of the data, from `load_splits`
    device: torch.device
    model: nn.Module
    method: CAM
    step: nn.Module
    optimizer: torch.optim.Optimizer
    splits: dict[str, Split]
    loaders: dict[str | int, DataLoader]  # of train, by batch size; of val; of test
    epoch: int = 0  # epochs done
    state: EpochState = EpochState(0, {})  # of the next epoch
    best: dict[str, Any] | None = None  # epoch and score on val
    val: dict[str, Any] | None = None  # epoch, metrics and thresholds of the last evaluation on val
    log: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)  # of this process, by stage
    stop: StopRequest = field(default_factory=StopRequest)


def main(argv: list[str] | None = None) -> None:
    """Flags -> configuration -> data -> network -> epochs -> test."""
    args = optim.parse_args(argv, __doc__, METHODS)
    Progress.quiet = args.quiet
    name = Path(args.dataset).resolve().name if is_folder(args.dataset) else args.dataset
    out = args.out or Path("runs") / f"{name}_{args.arch}_{args.method}"
    checkpoint = evaluation.open_checkpoint(out, args.resume)
    config, sources = optim.resolve_config(args, checkpoint, METHODS)
    device = utils.resolve_device(config.device)
    processes.join_processes(device)
    models.seed_everything(config.seed)
    if args.download:
        first_process_first(lambda: download(config.dataset, Path(config.data_root)))
    started = time.monotonic()
    run = build(out, config, sources, device, fresh=checkpoint is None)
    run.seconds["data and network"] = time.monotonic() - started
    try:
        if checkpoint:
            resume(run, checkpoint)
        if rank() == 0:
            optim.write_config(out / "config.json", config, sources, run.record, device)
        for epoch in range(run.epoch + 1, config.epochs + 1):
            train_and_validate(run, epoch)
        all_gather(None)  # until the last checkpoint is written
        with timed(run.seconds, "evaluation"):
            test(run)
            if rank() == 0 and config.pictures and run.splits["test"].boxes:
                draw(run)
    finally:
        run.stop.close()
    say("time: " + ", ".join(f"{stage} {utils.duration(spent)}" for stage, spent in run.seconds.items()))
    if (config.dataset, config.method) == ("demo", "bridge"):
        say(evaluation.README_PICTURE.format(run=out))
    processes.leave_processes()


def build(out: Path, c: SimpleNamespace, sources: dict[str, str], device: torch.device, fresh: bool) -> Run:
    """Data, network, optimizer and loaders of configuration c. fresh: load the pretrained weights."""
    where = c.dataset, Path(c.data_root), Path(c.splits)
    splits, record = first_process_first(lambda: load_splits(*where, SPLITS, c.val_per_class))
    for what in [name for name in ("lists", "val", "warning") if name in record]:
        say(f"{what}: {record[what]}")
    if not splits["val"].boxes and not splits["val"].masks:
        say("val has no boxes: the best epoch is the one with the best Top-1 classification on val")
    method = METHODS[c.method](c)
    model = method.network(record["num_classes"])
    if fresh:
        load_fc = c.dataset == "ILSVRC"
        first_process_first(lambda: models.load_pretrained(model, c.arch, c.weights, load_fc=load_fc))
    model.freeze_blocks(c.frozen_blocks).to(device, memory_format=torch.channels_last)
    rates = {"lr": c.lr, "lr_new": c.lr_new, "momentum": c.momentum, "nesterov": c.nesterov}
    optimizer = optim.build_optimizer(model, c.arch, **rates, weight_decay=c.weight_decay)
    step: nn.Module = TrainingStep(model, method)
    if world_size() > 1:
        if device.type == "cuda":  # batch norm over the global batch; the CPU has no such layer
            step = nn.SyncBatchNorm.convert_sync_batchnorm(step)
        step = nn.parallel.DistributedDataParallel(step)
    pixels = c.cache and first_process_first(
        lambda: resized_pixels(splits["train"], c.resize_size, Path(c.cache), c.workers)
    )
    loaders = split_loaders(splits, vars(c), pixels, rank=rank(), world_size=world_size())
    return Run(out, c, sources, record, device, model, method, step, optimizer, splits, loaders)


def resume(run: Run, checkpoint: dict[str, Any]) -> None:
    """Restores a run from last.pt and log.jsonl."""
    evaluation.require_same_data(run.out, checkpoint, run.record)
    models.restore_weights(run.model, checkpoint["model"], run.out / "last.pt")
    with evaluation.not_a_checkpoint(run.out / "last.pt", evaluation.FIX_OUT):
        run.optimizer.load_state_dict(checkpoint["optimizer"])
        models.set_random_states(checkpoint["random_states"])
        run.epoch, run.best, run.val = checkpoint["epoch"], checkpoint["best"], checkpoint["val"]
        if progress := checkpoint["progress"]:
            sums = progress["sums"].items() if rank() == 0 else ()
            run.state = EpochState(progress["step"], {name: value.to(run.device) for name, value in sums})
    run.log = evaluation.read_log(run.out, run.epoch)
    within = f", in epoch {run.epoch + 1} after step {run.state.step}" if run.state.step else ""
    say(f"resumed after epoch {run.epoch}{within}")


def train_and_validate(run: Run, epoch: int) -> None:
    """One epoch: training, val, log line, checkpoints. Raises Stopped after a signal, when all is saved."""
    c, started, steps_before = run.config, time.perf_counter(), run.state.step
    rates = optim.set_learning_rates(run.optimizer, epoch, c.decay_at, c.decay_factor)
    loader = run.loaders[c.warm_batch_size if epoch <= c.warm_epochs else c.batch_size]
    if rank() > 0:  # own dropout draws; the first process's stream is the one in the checkpoint
        torch.manual_seed(int(np.random.SeedSequence([c.seed, epoch, rank()]).generate_state(1)[0]))
    images, is_best = len(run.splits["train"]), False
    try:
        with timed(run.seconds, "training"):
            run.state = train_one_epoch(run, loader, epoch)
        if run.state.step < len(loader):
            raise Stopped
        entry = {"epoch": epoch, **epoch_means(run.state, images), "lr": rates[0], "lr_new": rates[1]}
        # Running statistics of batch norm: the first process's, as in the checkpoint.
        for buffer in run.model.buffers() if world_size() > 1 else ():
            dist.broadcast(buffer, src=0)
        speed = (1 - steps_before / len(loader)) * images / (time.perf_counter() - started)
        if epoch % c.val_every == 0 or epoch == c.epochs:
            with timed(run.seconds, "evaluation"):
                is_best = validate(run, epoch)
            entry["val"] = run.val["metrics"]
    except Stopped:
        save(run, "last.pt", epoch - 1, run.state)
        step = f"epoch {epoch}, step {run.state.step} of {len(loader)}"
        raise Stopped(f"interrupted in {step}: rerun with --resume to continue") from None
    except RuntimeError:
        if run.stop.asked:  # the signal ended a data loader's worker before its batch came
            raise Stopped(f"interrupted in epoch {epoch}: rerun with --resume to continue") from None
        raise
    entry |= {"images_per_second": speed, "seconds": time.perf_counter() - started}
    run.state, run.epoch = EpochState(0, {}), epoch
    run.log.append(entry)
    if rank() == 0:
        write_text(run.out / "log.jsonl", "".join(json.dumps(line) + "\n" for line in run.log))
    if is_best:
        save(run, "best.pt", epoch)
    save(run, "last.pt", epoch)  # last of all: after a crash before it, this epoch is repeated identically
    say(evaluation.epoch_line(run.log, c.epochs, is_best))


def train_one_epoch(run: Run, loader: DataLoader, epoch: int) -> EpochState:
    """One pass over train, from run.state to its end, or to the step at which a signal came.

    Raises InputError for a loss that is not finite, with the step and every loss by name.
    """
    run.step.train()
    sums, recent, done = dict(run.state.sums), [], run.state.step
    loader.batch_sampler.epoch, loader.batch_sampler.first = epoch, done
    with Progress(f"epoch {epoch}/{run.config.epochs}", len(loader), "steps", done) as progress:
        for done, (images, labels) in enumerate(loader, start=run.state.step + 1):
            images, labels = to_input(images, run.device), labels.to(run.device, non_blocking=True)
            own, whole = loader.batch_sampler.size(done - 1)
            run.optimizer.zero_grad(set_to_none=True)  # before the forward pass, which needs the memory
            with autocast(run.device, run.config.amp):
                terms, logits = run.step(images, labels, epoch)
            loss = sum(weight * value for weight, value in terms.values())
            # Gradients are averaged over processes, whose shares of a last, smaller batch may differ.
            (loss * (own * world_size() / whole)).backward()
            run.optimizer.step()

            top1 = 100 * (logits.argmax(1) == labels).float().mean()
            values = {"loss": loss, "top1": top1} | {name: value for name, (_, value) in terms.items()}
            recent.append((done, {name: value.detach() for name, value in values.items()}))
            for name, value in recent[-1][1].items():
                sums[name] = sums.get(name, 0) + value * own
            after = run.config.epochs - epoch
            progress.show(done, partial(evaluation.progress_note, recent[-1][1], whole, progress, after))
            # Reading a value makes the CPU wait for the GPU.
            if run.device.type == "cpu" or done % 20 == 0 or done == len(loader):
                optim.check_finite(recent, epoch, len(loader))
                recent.clear()
                if run.stop.seen(run.device):
                    break
    return EpochState(done, sums)


def validate(run: Run, epoch: int) -> bool:
    """Evaluates on val; whether this epoch is the best so far (appendix B)."""
    found = evaluate(run, "val")
    run.val = {"epoch": epoch, "metrics": found["metrics"], "levels": found["levels"]}
    score = evaluation.selection_score(found["metrics"])[1]
    if run.best is None or score > run.best["score"]:
        run.best = {"epoch": epoch, "score": score}
    return run.best["epoch"] == epoch


def evaluate(run: Run, name: str, val_levels: dict[str, int] | None = None) -> dict[str, Any]:
    """All metrics on a split. Raises Stopped after a signal."""
    c = run.config
    setting = {"device": run.device, "amp": c.amp, "normalization": "minmax", "image_size": c.image_size}
    batches = evaluation.network_maps(run.model, run.loaders[name], method=run.method, **setting)
    batches = run.stop.guard(batches, f"interrupted in the evaluation on {name}: rerun with --resume")
    return evaluation.evaluate_maps(batches, run.splits[name], workers=c.workers, val_levels=val_levels)


def test(run: Run) -> None:
    """The best and the last checkpoint on test: tables, results_best_test.json, results_last_test.json."""
    c, results = run.config, {}
    for which in ("best", "last"):
        run.model, run.method, checkpoint = evaluation.load_run(run.out, which, run.device)
        epoch = checkpoint["epoch"]
        if epoch not in results:
            results[epoch] = evaluate(run, "test", checkpoint["val"]["levels"])
            title = f"{c.dataset} test, {c.arch} {c.method}, {which} checkpoint (epoch {epoch})"
            say(evaluation.table(title, results[epoch]))
        if rank() == 0:
            head = {key: getattr(c, key) for key in evaluation.RUN_KEYS} | {"split": "test"}
            head |= {"checkpoint": which, "epoch": epoch, "normalize": "minmax"}
            evaluation.write_results(run.out / f"results_{which}_test.json", results[epoch], **head)
    say(f"written to {run.out}")


def draw(run: Run) -> None:
    """boxes_test.png: ground truth, box and CAM of some test images, in the form of Fig. A4."""
    out, n = run.out / "boxes_test", run.config.pictures
    what = ["boxes", str(run.out), "--columns=3", f"--random={n}", f"--device={run.device}", f"--out={out}"]
    figures.boxes(figures.parse_args(what))
    say(f"boxes of {n} test images drawn in {out}.png")


def save(run: Run, name: str, epoch: int, state: EpochState | None = None) -> None:
    """Writes a checkpoint; the first process alone."""
    checkpoint = {"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}
    checkpoint |= {"random_states": models.random_states(), "epoch": epoch, "best": run.best, "val": run.val}
    progress = state and {"step": state.step, "sums": all_sum(state.sums)}
    checkpoint |= {"progress": progress, "config": vars(run.config), "sources": run.sources}
    checkpoint |= {key: run.record.get(key) for key in ("num_classes", "classes", "digests")}
    if rank() == 0:
        models.save_checkpoint(run.out / name, checkpoint)


def epoch_means(state: EpochState, images: int) -> dict[str, float]:
    """Means over all images: each loss, "loss" (their weighted sum), "top1" in percent."""
    return {name: float(total) / images for name, total in all_sum(state.sums).items()}


if __name__ == "__main__":
    with utils.one_line_errors():
        main()
