"""Trains a network by the method of Kim et al. (CVPR 2022) and evaluates it on test.

    python train.py                                            the embedded demo: nothing to download, minutes on a CPU
    python train.py --dataset CUB --arch vgg16                 the paper's run, every value from the preset
    python train.py --dataset CUB --arch vgg16 --method cam    the vanilla classifier through the same path
    python train.py --dataset my_photos/                       a folder with one sub-folder of images a class
    python train.py --dataset CUB --arch vgg16 --resume        goes on after an interruption
    torchrun --nproc_per_node 8 train.py --dataset ILSVRC      one process a GPU: the same batches, shared out

Writes --out (default runs/DATASET_ARCH_METHOD): config.json, log.jsonl, last.pt, best.pt, results_*.json.
"""

from __future__ import annotations

import json
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from bridge_wsol import optim
from bridge_wsol.baselines import METHODS
from bridge_wsol.data import resized_pixels, test_loader, to_input, train_loader
from bridge_wsol.datasets import download_cub, is_folder, load_splits
from bridge_wsol.evaluation import (
    evaluate_maps,
    load_run,
    network_maps,
    selection_score,
    table,
    write_results,
)
from bridge_wsol.methods import CAM, Losses
from bridge_wsol.models import load_pretrained, load_tensors, restore_weights, save_checkpoint
from bridge_wsol.optim import environment, parse_args, resolve_config
from bridge_wsol.utils import (
    InputError,
    Stopped,
    StopRequest,
    all_gather,
    autocast,
    first_process_first,
    join_processes,
    keep_freed_memory,
    leave_processes,
    one_line_errors,
    random_states,
    rank,
    resolve_device,
    seed_everything,
    set_random_states,
    world_size,
    write_json,
    write_text,
)


class TrainingStep(nn.Module):
    """The losses of a batch as one module: all that a method computes goes through it, so DistributedDataParallel can wrap it."""

    def __init__(self, model: nn.Module, method: CAM):
        super().__init__()
        self.model, self.method = model, method

    def forward(self, images: Tensor, labels: Tensor, epoch: int) -> Losses:
        return self.method.losses(self.model, images, labels, epoch)


class Progress(NamedTuple):
    """How far an epoch is: what an interrupted one needs to go on bit for bit."""

    step: int  # batches done
    sums: dict[str, Tensor]  # each loss and the accuracy, summed over this process's images


def train_one_epoch(
    step: nn.Module,
    loader: DataLoader,
    optimizer: torch.optim.Optimizer,
    c: SimpleNamespace,
    epoch: int,
    device: torch.device,
    begun: Progress,
    stop: StopRequest,
) -> Progress:
    """One pass over train, from where it was `begun` to its end or to the step at which somebody asked to `stop`.

    Raises InputError for a loss that is not finite, with the step and every loss by name.
    """
    step.train()
    sums, recent, done = dict(begun.sums), [], begun.step
    loader.batch_sampler.epoch, loader.batch_sampler.first = epoch, begun.step
    for done, (images, labels) in enumerate(loader, start=begun.step + 1):
        images, labels = to_input(images, device), labels.to(device, non_blocking=True)
        own, whole = loader.batch_sampler.size(done - 1)
        optimizer.zero_grad(
            set_to_none=True
        )  # before the forward pass, where the activations need the memory
        with autocast(device, c.amp):
            terms, logits = step(images, labels, epoch)
        loss = sum(weight * value for weight, value in terms.values())

        # Gradients are averaged over processes; their shares of a last, smaller batch may differ.
        (loss * (own * world_size() / whole)).backward()
        optimizer.step()

        values = {"loss": loss, "top1": 100 * (logits.argmax(1) == labels).float().mean()} | {
            name: value for name, (_, value) in terms.items()
        }
        recent.append((done, {name: value.detach() for name, value in values.items()}))
        for name, value in recent[-1][1].items():
            sums[name] = sums.get(name, 0) + value * own
        if (
            device.type == "cpu" or done % 20 == 0 or done == len(loader)
        ):  # asking a GPU for a value stops it for a moment
            refuse_non_finite(recent, epoch, len(loader))
            recent.clear()
            if anybody_asked(stop, device):
                break
    return Progress(done, sums)


def refuse_non_finite(recent: list[tuple[int, dict[str, Tensor]]], epoch: int, steps: int) -> None:
    finite = torch.stack([values["loss"] for _, values in recent]).isfinite().tolist()
    if not all(finite):
        at, values = recent[finite.index(False)]
        by_name = ", ".join(f"{name} {float(value):.4g}" for name, value in values.items() if name != "top1")
        raise InputError(
            f"epoch {epoch}, step {at} of {steps}: the loss is not finite ({by_name}); last.pt is still the one before: lower --lr and --lr-new"
        )


def anybody_asked(stop: StopRequest, device: torch.device) -> bool:
    """Processes stop after the same step or not at all: each would wait for the others' gradients."""
    if world_size() == 1:
        return stop.asked
    asked = torch.tensor(float(stop.asked), device=device)
    dist.all_reduce(asked)
    return bool(asked > 0)


def means(progress: Progress, images: int) -> dict[str, float]:
    """Each loss by name (unweighted), "loss" (their weighted sum), "top1" in percent: means over all images, those of other processes too."""
    parts = all_gather({name: float(value) for name, value in progress.sums.items()})
    return {name: sum(part[name] for part in parts) / images for name in parts[0]}


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv, __doc__, METHODS)
    name = Path(args.dataset).resolve().name if is_folder(args.dataset) else args.dataset
    out = args.out or Path("runs") / f"{name}_{args.arch}_{args.method}"
    checkpoint = open_run(out, args.resume)
    c, sources = resolve_config(args, checkpoint, METHODS)
    device = resolve_device(c.device)
    if device.type == "cpu":
        keep_freed_memory()
    join_processes(device)
    stop = StopRequest()
    try:
        run(out, args, c, sources, checkpoint, device, stop)
    finally:
        stop.close()
    leave_processes()


def run(
    out: Path,
    args: Namespace,
    c: SimpleNamespace,
    sources: dict[str, str],
    checkpoint: dict[str, Any] | None,
    device: torch.device,
    stop: StopRequest,
) -> None:
    first = rank() == 0  # the one of several processes that writes and speaks
    say = print if first else lambda *_, **__: None
    seed_everything(c.seed)

    names = ("train", "val", "test")
    if args.download:
        if c.dataset != "CUB":
            raise InputError(f"--download fetches CUB; for {c.dataset}, see the README's section on data")
        first_process_first(lambda: download_cub(Path(c.data_root)))
    splits, record = first_process_first(
        lambda: load_splits(c.dataset, Path(c.data_root), Path(c.splits), names, c.val_per_class)
    )
    for what in ("lists", "val", "warning"):
        if what in record:
            say(f"{what}: {record[what]}")
    if not splits["val"].boxes and not splits["val"].masks:
        say(
            "val has no boxes: the best epoch is the one with the highest Top-1 classification accuracy on it"
        )
    method = METHODS[c.method](c)
    model = method.network(record["num_classes"])
    if checkpoint is None:
        first_process_first(lambda: load_pretrained(model, c.arch, c.weights, load_fc=c.dataset == "ILSVRC"))
    model.to(device, memory_format=torch.channels_last)
    optimizer = optim.build_optimizer(
        model,
        c.arch,
        lr=c.lr,
        lr_new=c.lr_new,
        momentum=c.momentum,
        nesterov=c.nesterov,
        weight_decay=c.weight_decay,
    )
    done, best, val, progress = 0, None, None, Progress(0, {})
    if checkpoint is not None:
        restore_weights(model, checkpoint["model"], out / "last.pt")
        optimizer.load_state_dict(checkpoint["optimizer"])
        set_random_states(checkpoint["random_states"])
        done, best, val = checkpoint["epoch"], checkpoint["best"], checkpoint["val"]
        if checkpoint["progress"]:
            progress = Progress(
                checkpoint["progress"]["step"],
                {k: v.to(device) for k, v in checkpoint["progress"]["sums"].items()},
            )
        say(
            f"resumed after epoch {done}"
            + (f", in epoch {done + 1} after step {progress.step}" if progress.step else "")
        )
    log = read_log(out / "log.jsonl", done)
    if first:
        resolved = {
            name: {"value": value, "source": sources[name]} for name, value in sorted(vars(c).items())
        }
        write_json(
            out / "config.json", {"config": resolved, "data": record, "environment": environment(device)}
        )

    step: nn.Module = TrainingStep(model, method)
    if world_size() > 1:
        if (
            device.type == "cuda"
        ):  # batch norm over the whole batch, as in one process; there is none such on the CPU
            step = nn.SyncBatchNorm.convert_sync_batchnorm(step)
        step = DistributedDataParallel(step)
    pixels = None
    if c.cache:
        pixels = first_process_first(
            lambda: resized_pixels(splits["train"], c.resize_size, Path(c.cache), c.workers)
        )
    # The batch size changes after the warm stage (CUB, VGG16), so each stage has its loader; the epoch decides order and crops.
    shared_out = {"workers": c.workers, "rank": rank(), "world_size": world_size()}
    in_stage = {
        "resize_size": c.resize_size,
        "image_size": c.image_size,
        "seed": c.seed,
        "pixels": pixels,
        **shared_out,
    }
    loaders = {
        size: train_loader(splits["train"], size, **in_stage) for size in {c.warm_batch_size, c.batch_size}
    }
    evaluation = {"device": device, "amp": c.amp, "normalization": "minmax", "image_size": c.image_size}
    val_loader, final_loader = (
        test_loader(splits[name], c.batch_size, image_size=c.image_size, **shared_out)
        for name in ("val", "test")
    )

    def save(name: str, epoch: int, progress: Progress | None = None) -> None:
        if first:
            save_checkpoint(
                out / name,
                {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "random_states": random_states(),
                    "epoch": epoch,
                    "progress": progress and progress._asdict(),
                    "best": best,
                    "val": val,
                    "config": vars(c),
                    "sources": sources,
                    "num_classes": record["num_classes"],
                    "classes": record.get("classes"),
                },
            )

    started, steps_before = time.perf_counter(), progress.step
    for epoch in range(done + 1, c.epochs + 1):
        epoch_started = time.perf_counter()
        rates = optim.set_learning_rates(optimizer, epoch, c.decay_at, c.decay_factor)
        loader = loaders[c.warm_batch_size if epoch <= c.warm_epochs else c.batch_size]
        if (
            rank() > 0
        ):  # dropout draws of its own; the first process has the one stream that a checkpoint keeps
            torch.manual_seed(int(np.random.SeedSequence([c.seed, epoch, rank()]).generate_state(1)[0]))
        try:
            progress = train_one_epoch(step, loader, optimizer, c, epoch, device, progress, stop)
            if progress.step < len(loader):
                raise Stopped
            losses = means(progress, len(splits["train"]))
            for buffer in (
                model.buffers() if world_size() > 1 else ()
            ):  # running statistics: the first process's, as in the checkpoint
                dist.broadcast(buffer, src=0)
            images_per_second = (
                (len(loader) - steps_before)
                * len(splits["train"])
                / len(loader)
                / (time.perf_counter() - epoch_started)
            )

            entry: dict[str, Any] = {"epoch": epoch, **losses, "lr": rates[0], "lr_new": rates[1]}
            is_best = False
            if epoch % c.val_every == 0 or epoch == c.epochs:
                maps = until_stopped(network_maps(model, val_loader, method=method, **evaluation), stop)
                metrics_of_val = evaluate_maps(maps, splits["val"], workers=c.workers)
                val = {
                    "epoch": epoch,
                    "metrics": metrics_of_val["metrics"],
                    "levels": metrics_of_val["levels"],
                }
                entry["val"] = val["metrics"]
                is_best = best is None or selection_score(val["metrics"])[1] > best["score"]
                if is_best:
                    best = {"epoch": epoch, "score": selection_score(val["metrics"])[1]}
        except Stopped:
            save("last.pt", epoch - 1, progress)
            raise Stopped(
                f"stopped in epoch {epoch} after step {progress.step} of {len(loader)}: the same command with --resume goes on"
            ) from None
        except RuntimeError:
            if stop.asked:  # a data loader's process got the signal too and ended before its batch
                raise Stopped(
                    f"stopped in epoch {epoch}: the same command with --resume goes on from what {out} has"
                ) from None
            raise
        entry |= {"images_per_second": images_per_second, "seconds": time.perf_counter() - epoch_started}
        progress, steps_before = Progress(0, {}), 0

        log.append(entry)
        if first:
            write_text(out / "log.jsonl", "".join(json.dumps(line) + "\n" for line in log))
        if is_best:
            save("best.pt", epoch)
        save("last.pt", epoch)  # last of all: a crash before it repeats this epoch, identically
        left = (time.perf_counter() - started) / (epoch - done) * (c.epochs - epoch)
        say(epoch_line(entry, c.epochs, is_best, left), flush=True)

    all_gather(None)  # everybody waits until the last checkpoint is written
    results: dict[int, dict[str, Any]] = {}
    for which in ("best", "last"):
        model, method, checkpoint = load_run(out, which, device)
        epoch = checkpoint["epoch"]
        if epoch not in results:
            try:
                maps = until_stopped(network_maps(model, final_loader, method=method, **evaluation), stop)
                results[epoch] = evaluate_maps(
                    maps, splits["test"], workers=c.workers, val_levels=checkpoint["val"]["levels"]
                )
            except Stopped:
                raise Stopped(
                    "stopped in the evaluation on test: the same command with --resume repeats it, or evaluate.py"
                ) from None
            say(
                table(
                    f"{c.dataset} test, {c.arch} {c.method}, {which} checkpoint (epoch {epoch})",
                    results[epoch],
                )
            )
        if first:
            head = {
                "dataset": c.dataset,
                "arch": c.arch,
                "method": c.method,
                "split": "test",
                "checkpoint": which,
                "epoch": epoch,
            }
            write_results(out / f"results_{which}_test.json", results[epoch], **head, normalize="minmax")
    say(f"written to {out}")


def until_stopped(batches: Iterable, stop: StopRequest) -> Iterator:
    for batch in batches:
        if stop.asked and world_size() == 1:  # several processes stop together, between training steps
            raise Stopped
        yield batch


def open_run(out: Path, resume: bool) -> dict[str, Any] | None:
    """The checkpoint to go on from; None for a new run.

    Raises InputError for an existing folder without --resume, a folder without checkpoint with it, or a damaged checkpoint.
    """
    if not resume:
        if out.exists():
            raise InputError(
                f"{out}: exists already: go on with --resume, choose another --out, or remove it"
            )
        return None
    if not (out / "last.pt").exists():
        # Interrupted before the first epoch ended, there is nothing to go on from: the same run starts anew.
        return None
    checkpoint = load_tensors(out / "last.pt")
    if (
        not {"model", "optimizer", "random_states", "epoch", "progress", "best", "val", "config", "sources"}
        <= checkpoint.keys()
    ):
        raise InputError(f"{out / 'last.pt'}: not a checkpoint of train.py")
    return checkpoint


def read_log(path: Path, epochs: int) -> list[dict[str, Any]]:
    """The lines of the epochs that the checkpoint has; a line of an epoch that was interrupted later is left out."""
    if not epochs:
        return []
    try:
        return [
            entry
            for entry in map(json.loads, path.read_text(encoding="utf-8").splitlines())
            if entry["epoch"] <= epochs
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: the log of the interrupted run cannot be read ({error})") from error


def epoch_line(entry: dict[str, Any], epochs: int, is_best: bool, seconds_left: float) -> str:
    losses = "  ".join(
        f"{name} {value:.4f}" for name, value in entry.items() if name == "loss" or name.startswith("l_")
    )
    line = f"epoch {entry['epoch']}/{epochs}  {losses}  train top-1 {entry['top1']:.1f}"
    if "val" in entry:
        name, score = selection_score(entry["val"])
        line += (
            f"  val {name} {score:.2f}{' (best)' if is_best else ''}, top-1 {entry['val']['top1_cls']:.1f}"
        )
    hours, seconds = divmod(round(seconds_left), 3600)
    return f"{line}  {entry['images_per_second']:.1f} images/s  {hours}h{seconds // 60:02d}m{seconds % 60:02d}s left"


if __name__ == "__main__":
    with one_line_errors():
        main()
