"""The configuration of a run: presets with the source of each value, flags, config.json.

A value is taken from the first of: a flag; the preset of data set and architecture, or its changes for a
method; the default in VALUES or in the method's class.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torchvision

from . import utils
from .datasets import DATASETS, is_folder
from .methods import METHODS, find
from .models import ARCHS
from .utils import InputError, Parser, Value, flag, read_json, write_json

# Sources of the values, as config.json states them.
B = "appendix B"
C5 = "appendix C.5"
CODE = "authors' released configuration"
ANSWER = "authors' answer in an issue of their code"
CHOE = "Choe et al."
OURS = "our choice"
# Of the compared systems.
AUTHORS, COMMON_CODE = "its authors' code", "the common code's default"

# lambda and tau, gamma and p, of four pairs of data set and architecture.
CUB_VGG16 = dict(lambda_sim=0.5, lambda_norm=0.15, lambda_drop=3.0, tau_fg=0.6, tau_bg=0.1, gamma=0.8, p=0.5)
CUB_RESNET50 = dict(
    lambda_sim=0.6, lambda_norm=0.07, lambda_drop=2.0, tau_fg=0.4, tau_bg=0.2, gamma=0.8, p=0.25
)
IMAGENET_VGG16 = dict(
    lambda_sim=0.5, lambda_norm=0.2, lambda_drop=3.0, tau_fg=0.5, tau_bg=0.3, gamma=0.8, p=0.5
)
IMAGENET_RESNET50 = dict(
    lambda_sim=8.0, lambda_norm=1.0, lambda_drop=2.0, tau_fg=0.28, tau_bg=0.25, gamma=0.8, p=0.25
)
MAXIMUM, TARGET = dict(norm_class="max"), dict(norm_class="target")
# Values that other data sets take from ILSVRC.
OF_ILSVRC_VGG16 = {f"ILSVRC: {C5}": IMAGENET_VGG16, f"ILSVRC: {CODE}": TARGET, CHOE: dict(stride=16)}
OF_ILSVRC_RESNET50 = {f"ILSVRC: {ANSWER}": IMAGENET_RESNET50, f"ILSVRC: {CODE}": TARGET, CHOE: dict(stride=8)}
CUB_SCHEDULE = dict(epochs=70, warm_epochs=20, decay_at=[41, 61], decay_factor=0.2, warm_batch_size=32)
CUB10_SCHEDULE = dict(epochs=12, warm_epochs=3, decay_at=[9], decay_factor=0.2, val_every=0)
IMAGENETTE_SCHEDULE = dict(epochs=8, warm_epochs=2, decay_at=[6], decay_factor=0.2, val_every=0)
OPENIMAGES_SCHEDULE = dict(epochs=10, warm_epochs=2, decay_at=[4, 7], decay_factor=0.1)
BATCHES = dict(warm_batch_size=32, batch_size=32)

# (data set, architecture) or (data set, architecture, method) -> {source: {name: value}}. VALUES below tells
# what the values mean.
PRESETS: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {
    ("CUB", "vgg16"): {
        B: dict(lr=4e-3, lr_new=2e-2),
        CODE: CUB_VGG16 | MAXIMUM | CUB_SCHEDULE | dict(batch_size=64),
        CHOE: dict(stride=16),
    },
    ("CUB", "resnet50"): {
        B: dict(lr=2e-3, lr_new=2e-2),
        C5: CUB_RESNET50,
        CODE: CUB_SCHEDULE | MAXIMUM | dict(batch_size=32),
        CHOE: dict(stride=8),
    },
    # The first ten classes of CUB. CUB's learning rates are too high here. The rates were chosen for the CAM
    # baseline on val (VGG16, one seed) and serve all methods. ResNet50 has CUB's rates divided by 8, the
    # factor that VGG16 got; they are not tuned.
    ("CUB10", "vgg16"): {
        OURS: dict(lr=5e-4, lr_new=2.5e-3) | CUB10_SCHEDULE | BATCHES,
        f"CUB: {CODE}": CUB_VGG16 | MAXIMUM,
        CHOE: dict(stride=16),
    },
    ("CUB10", "resnet50"): {
        OURS: dict(lr=2.5e-4, lr_new=2.5e-3) | CUB10_SCHEDULE | BATCHES,
        f"CUB: {C5}": CUB_RESNET50,
        f"CUB: {CODE}": MAXIMUM,
        CHOE: dict(stride=8),
    },
    ("ILSVRC", "vgg16"): {
        B: dict(lr=2e-5, lr_new=1e-4),
        C5: IMAGENET_VGG16,
        ANSWER: dict(epochs=40, warm_epochs=5, decay_at=[11, 31], decay_factor=0.1) | BATCHES,
        CODE: TARGET,
        CHOE: dict(stride=16),
    },
    ("ILSVRC", "resnet50"): {
        B: dict(lr=1e-5, lr_new=1e-4),
        ANSWER: IMAGENET_RESNET50
        | BATCHES
        | dict(epochs=30, warm_epochs=14, decay_at=[21], decay_factor=0.1),
        CODE: TARGET,
        CHOE: dict(stride=8),
    },
    ("OpenImages", "vgg16"): {
        OURS: dict(lr=2e-3, lr_new=2e-2) | BATCHES | OPENIMAGES_SCHEDULE,
        C5: IMAGENET_VGG16 | TARGET,
        CHOE: dict(stride=16),
    },
    # Ten classes of ImageNet. The values of the method are ILSVRC's. The rates were chosen for the CAM
    # baseline on val (VGG16, one seed) and serve all methods but two. ResNet50 has ILSVRC's rates times 100,
    # the factor that VGG16 got; they are not tuned.
    ("Imagenette", "vgg16"): {
        OURS: dict(lr=2e-3, lr_new=1e-2) | IMAGENETTE_SCHEDULE | BATCHES,
        **OF_ILSVRC_VGG16,
    },
    ("Imagenette", "resnet50"): {
        OURS: dict(lr=1e-3, lr_new=1e-2) | IMAGENETTE_SCHEDULE | BATCHES,
        **OF_ILSVRC_RESNET50,
    },
    # Both have two cross-entropies. At higher rates the training loss fell to chance (EIL: the CAM baseline's
    # rates) or stayed near it for three epochs (ACoL: half of them).
    ("Imagenette", "vgg16", "acol"): {OURS: dict(lr=5e-4, lr_new=2.5e-3)},
    ("Imagenette", "vgg16", "eil"): {OURS: dict(lr=1e-3, lr_new=5e-3)},
    # A folder of one's own images. The values of the method are ILSVRC's, the schedule is CUB10's. The rates
    # were chosen for the CAM baseline on val of a folder of 500 photos (VGG16, one seed). ResNet50 has half
    # of CUB10's rates, as VGG16; they are not tuned.
    ("folder", "vgg16"): {
        OURS: dict(lr=2.5e-4, lr_new=1.25e-3) | CUB10_SCHEDULE | BATCHES,
        **OF_ILSVRC_VGG16,
    },
    ("folder", "resnet50"): {
        OURS: dict(lr=1.25e-4, lr_new=1.25e-3) | CUB10_SCHEDULE | BATCHES,
        **OF_ILSVRC_RESNET50,
    },
    # The drawn data set: an eighth of VGG16's width, 112 x 112 pixels, 14 x 14 maps. Chosen on val.
    # val_every: only the last epoch is evaluated. The pretrained features localize best before the classes
    # are learned, so the best epoch by localization would be one that hardly classifies.
    ("demo", "vgg16"): {
        OURS: BATCHES
        | dict(lr=1.6e-3, lr_new=0.12, frozen_blocks=2, lambda_sim=1.0, lambda_norm=1.5, lambda_drop=0.3)
        | dict(tau_fg=0.6, tau_bg=0.4, gamma=0.9, p=0.25, norm_class="target")
        | dict(epochs=10, warm_epochs=0, decay_at=[9], decay_factor=0.2, val_every=0, pictures=6)
        | dict(stride=8, width=0.125, resize_size=128, image_size=112)
        # Pretrained on drawn shapes (tests/pretrain_demo.py).
        | dict(weights=str(Path(__file__).with_name("demo_vgg16.pth"))),
    },
    # Chosen at a quarter of VGG16's width, where at higher rates some seeds do not learn.
    ("demo", "vgg16", "acol"): {OURS: dict(lr=4e-4, lr_new=4e-2)},
    ("demo", "vgg16", "eil"): {OURS: dict(lr=4e-4, lr_new=4e-2)},
    ("demo", "vgg16", "spg"): {OURS: dict(lr_new=2e-2)},
    ("demo", "vgg16", "has"): {f"{AUTHORS}, for 112 pixels": dict(has_cells=[0, 8, 16, 22, 28])},
}


def whole_numbers(text: str) -> list[int]:
    """The kind of a value with several: whole numbers, comma-separated."""
    return [int(number) for number in text.split(",")]


RATE, COUNT, FROM_0 = "(0, inf)", "[1, inf)", "[0, inf)"
PATH, AMP = os.path.expanduser, ("auto", "bf16", "off")
VALUES = {  # of every run; those without a help text have no flag
    "what to train": {
        "dataset": Value(PATH, "demo", f"{', '.join(DATASETS)}, one of --lists, or a folder of images"),
        "arch": Value(str, "vgg16", "backbone", ARCHS),
        "method": Value(str, "bridge", "bridge: the paper's; cam: the CAM baseline", METHODS),
        "preset": Value(str, None, "whose values are the defaults (default: the data set's, folder, or CUB)"),
        "weights": Value(PATH, "imagenet", "imagenet (torchvision's), none, or a file"),
        "frozen_blocks": Value(int, 0, "keep the weights of the first N blocks as pretrained", FROM_0),
        "seed": Value(int, 0, "random seed", "[0, 9223372036854775808)"),
    },
    "where things are": {
        "data_root": Value(PATH, "data", "folder with the data set as distributed", resume=True),
        "lists": Value(PATH, "data_splits", "folder of the lists of images, labels, boxes", resume=True),
    },
    "how it runs": {
        "device": Value(str, "auto", "auto, cpu, cuda, cuda:1, ...", resume=True),
        "amp": Value(str, "auto", "auto: bf16 where it is faster", AMP, resume=True),
        "workers": Value(int, None, "worker processes (default: CPU 0, GPU the cores)", FROM_0, resume=True),
        "val_every": Value(int, 1, "evaluate every N epochs (0: none) and at the end", FROM_0, resume=True),
        "val_per_class": Value(int, None, "val from train, per class (default: val's list, else 2)", FROM_0),
        "pictures": Value(int, 0, "draw the boxes of N test images at the end", FROM_0, resume=True),
    },
    "schedule and networks": {
        "epochs": Value(int, None, "epochs in all", COUNT, resume=True),
        "warm_epochs": Value(int, None, "first epochs, with L_CE and L_drop alone", FROM_0),
        "batch_size": Value(int, None, "global batch size, by default of the warm epochs, too", COUNT),
        "warm_batch_size": Value(int, None, "global batch size of the warm epochs", COUNT),
        "lr": Value(float, None, "learning rate of the pretrained layers (appendix B)", RATE),
        "lr_new": Value(float, None, "learning rate of new layers; ResNet50: layer4 and fc", RATE),
        "decay_at": Value(whole_numbers, None, "epochs, from 1, at which the rates decay"),
        "decay_factor": Value(float, None, "factor of the rates at each of them", RATE),
        "momentum": Value(float, 0.9, "of SGD", "[0, 1)", B),
        "nesterov": Value(bool, True, "", None, CODE),
        "weight_decay": Value(float, 5e-4, "of SGD", FROM_0, B),
        "stride": Value(int, 16, "image pixels per location of the map, 8 or 16", None, CHOE),
        "width": Value(float, 1.0, "factor of VGG16's channels", "[0.01, 1]", "the paper's networks"),
        "resize_size": Value(int, 256, "side of a training image before the crop, in pixels", COUNT, CHOE),
        "image_size": Value(int, 224, "side of a crop and of a test image, in pixels", COUNT, CHOE),
    },
}
RUN_VALUES: dict[str, Value] = {name: value for group in VALUES.values() for name, value in group.items()}
# Values that say where and how a run is computed, and where its values are from; all others are its identity.
MACHINE = ("workers", "device", "amp", "data_root", "lists", "pictures", "preset")


def all_values() -> dict[str, Value]:
    """The values of every run and of every method."""
    return RUN_VALUES | {name: value for cls in METHODS.values() for name, value in cls.all_values().items()}


def preset_values(
    name: str, arch: str, method: str = "cam", dataset: str | None = None
) -> dict[str, tuple[Any, str]]:
    """{value: (default, source)} of the preset `name` for a method. Raises InputError for an unknown pair.

    dataset: the data set of the run, if not that of the preset; its kind decides CALM's map.
    """
    if (name, arch) not in PRESETS:
        pairs = ", ".join(f"{pair[0]} {pair[1]}" for pair in PRESETS if len(pair) == 2)
        problem = f"no preset; there are {pairs}; pass one as --preset"
        raise InputError(f"--dataset {name} --arch {arch}: {problem}")
    names = RUN_VALUES | find(method).all_values()
    found = {key: (value.default_for(dataset or name, arch), value.source) for key, value in names.items()}
    for key in ((name, arch), (name, arch, method)):
        for source, values in PRESETS.get(key, {}).items():
            of = "preset" if name == (dataset or name) else f"preset of {name}"
            found |= {x: (value, f"{of}: {source}") for x, value in values.items() if x in names}
    return found


def fingerprint(values: dict[str, Any]) -> str:
    """A hash of the values that decide a run's results, without its seed: equal for the seeds of a row.

    Left out are the values of MACHINE. Of the paths of a data set and of weights the last part counts.
    A run's "fingerprint" in its files has this as "values", and `Split.fingerprint` of each split.
    """
    own = {name: value for name, value in values.items() if name not in (*MACHINE, "seed")}
    own |= {name: Path(own[name]).name for name in ("dataset", "weights")}
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:16]


def image_size(dataset: str) -> int:
    """Side in pixels of the images and score maps of a data set's evaluation."""
    return preset_values(dataset if (dataset, "vgg16") in PRESETS else "CUB", "vgg16")["image_size"][0]


# ----------------------------------------------------------------------------------------------------- flags


def add_flags(group: argparse._ArgumentGroup, names: dict[str, Value]) -> None:
    """Adds a flag for each of these values that has a help text."""
    for name, value in names.items():
        words = value.allowed if isinstance(value.allowed, tuple | dict) else None
        text = value.help if words or not value.allowed else f"{value.help}; {value.allowed}"
        if value.default is not None and not callable(value.default):
            shown = ",".join(map(str, value.default)) if isinstance(value.default, list) else value.default
            text += f" (default {shown})"
        how = {"choices": words} if words else {"metavar": "N" if value.kind is int else "X"}
        how |= {"nargs": "*"} if name == "decay_at" else {}
        if value.help:
            group.add_argument(flag(name), dest=name, type=value.kind, help=text, **how)


def parse_args(argv: list[str] | None, description: str) -> argparse.Namespace:
    """The flags of train.py; `given` has the values of the configuration that were among them."""
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=description, formatter_class=form, argument_default=argparse.SUPPRESS)
    groups = {title: parser.add_argument_group(title) for title in VALUES}
    for title, group in groups.items():
        add_flags(group, VALUES[title])
    add = groups["where things are"].add_argument
    add("--out", type=utils.user_path, default=None, metavar="DIR", help="default runs/DATASET_ARCH_METHOD")
    add("--download", action="store_true", default=False, help="download CUB or Imagenette if it is missing")
    add = groups["how it runs"].add_argument
    add("--resume", action="store_true", default=False, help="continue the run in --out, with its values")
    add("--quiet", action="store_true", default=False, help="no progress line on stderr")
    added = {*RUN_VALUES}
    for method, cls in METHODS.items():
        # A method may give a value of its base class another default: one flag serves both.
        if own := {name: v for name, v in vars(cls).get("values", {}).items() if name not in added}:
            added |= own.keys()
            about = (cls.__doc__ or "").partition("\n")[0]
            add_flags(parser.add_argument_group(f"--method {method}", about), own)
    args = vars(parser.parse_args(argv))
    given = {name: args.pop(name) for name in list(args) if name in all_values()}
    if "decay_at" in given:  # 6,9 and 6 9 are the same
        given["decay_at"] = [epoch for part in given["decay_at"] for epoch in part]
    return argparse.Namespace(**args, given=given)


def resolve_config(
    given: dict[str, Any], checkpoint: dict[str, Any] | None = None
) -> tuple[SimpleNamespace, dict[str, str]]:
    """(all values of a run, {name: source}); a source is the preset's, "flag" or "default".

    given: values by name, as `parse_args` has them. checkpoint: of the run to resume, whose values are kept.
    Raises InputError for a value that contradicts that run, that its method does not have, or that is out of
    range.
    """
    lists = Path(given.get("lists", RUN_VALUES["lists"].default))
    if "dataset" in given and is_folder(given["dataset"], lists):
        # A path, also where a data set of this name appears later, and without the shell's last slash.
        dataset = os.path.normpath(given["dataset"])
        dataset = dataset if os.path.dirname(dataset) else os.path.join(os.curdir, dataset)
        given = given | {"dataset": dataset}
    if checkpoint:
        values, sources = dict(checkpoint["config"]), dict(checkpoint["sources"])
        known = all_values()
        for name, value in given.items():
            if name == "dataset" and Path(values[name]).name == Path(value).name and os.sep in values[name]:
                continue  # a folder that may have moved: train.py compares the lists of its images
            if name in values and value != values[name] and not known[name].resume:
                fix = f"the run to resume has {values[name]}: pass that, or another --out"
                raise InputError(f"{flag(name)} {value}: {fix}")
        done, val = checkpoint["epoch"], checkpoint["val"] or {}
        least = done + (val.get("epoch") != done)  # the last epoch is evaluated on val
        if given.get("epochs", values["epochs"]) < least:
            raise InputError(f"--epochs {given['epochs']}: the run has {done} epochs: pass at least {least}")
    else:
        dataset, arch, method = (given.get(x, RUN_VALUES[x].default) for x in ("dataset", "arch", "method"))
        other = "folder" if is_folder(dataset, lists) else "CUB"
        name = given.get("preset", dataset if any(dataset == pair[0] for pair in PRESETS) else other)
        of_preset = preset_values(name, arch, method, dataset)
        values = {key: value for key, (value, _) in of_preset.items()} | {"preset": name}
        sources = {key: source for key, (_, source) in of_preset.items()}
        if "batch_size" in given:
            given = {"warm_batch_size": given["batch_size"]} | given
    values, sources = values | given, sources | dict.fromkeys(given, "flag")
    allowed = RUN_VALUES | find(values["method"]).all_values()
    for name, value in values.items():
        if name not in allowed:
            raise InputError(f"{flag(name)}: not a value of --method {values['method']}: remove it")
        if value is not None:
            allowed[name].check(name, value)
    decay_at, image, resized = (values[name] for name in ("decay_at", "image_size", "resize_size"))
    if min(decay_at, default=1) < 1 or len({*decay_at}) < len(decay_at):
        raise InputError(f"--decay-at {' '.join(map(str, decay_at))}: must be epochs from 1, each once")
    if image > resized:
        raise InputError(f"--image-size {image}: larger than --resize-size {resized}")
    if values.get("tau_fg", 1) < values.get("tau_bg", 0):
        raise InputError(f"--tau-fg {values['tau_fg']}: smaller than --tau-bg {values['tau_bg']}")
    if values["frozen_blocks"] and values["weights"] == "none":
        raise InputError("--weights none: frozen blocks would keep random weights: add --frozen-blocks 0")
    return SimpleNamespace(**values), sources


def run_folder(args: argparse.Namespace) -> Path:
    """--out, or runs/DATASET_ARCH_METHOD."""
    dataset, arch, method = (args.given.get(x, RUN_VALUES[x].default) for x in ("dataset", "arch", "method"))
    folder = is_folder(dataset, Path(args.given.get("lists", RUN_VALUES["lists"].default)))
    return args.out or Path("runs") / f"{Path(dataset).resolve().name if folder else dataset}_{arch}_{method}"


def write_config(path: Path, run: dict[str, Any], data: dict[str, Any], device: torch.device) -> None:
    """config.json: every value with its source; the data and the fingerprint; versions, device and commit.

    run: its "config", "sources" and "fingerprint".
    """
    commit, root = None, Path(__file__).parents[1]
    if (root / ".git").exists():  # not of a repository that this code lies in
        with suppress(OSError, subprocess.TimeoutExpired):
            command = "git describe --always --abbrev=40 --exclude=* --dirty".split()
            git = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=10)
            commit = git.stdout.strip() or None
    environment = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "git_commit": commit,
    }
    values = {x: {"value": v, "source": run["sources"][x]} for x, v in sorted(run["config"].items())}
    identity = {"fingerprint": run["fingerprint"], "config": values}
    write_json(path, identity | {"data": data, "environment": environment})


def read_config(run: Path) -> dict[str, Any]:
    """{name: value} of a run, from its config.json. Raises InputError for a damaged file."""
    path = run / "config.json"
    try:
        return {name: entry["value"] for name, entry in read_json(path, "train.py")["config"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not the configuration of a run ({error} is missing or wrong)") from error
