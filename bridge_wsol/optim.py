"""Presets (appendix B and C.5), flags and configuration of a run; learning-rate groups and schedule."""

from __future__ import annotations

import argparse
import platform
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torchvision
from torch import Tensor, nn

from .datasets import NAMES, is_folder
from .models import ARCHS
from .utils import InputError, Parser, default_workers, write_json

# Sources of the values, as config.json states them.
B = "appendix B"
C5 = "appendix C.5"
CODE = "authors' released configuration"
ANSWER = "authors' answer in an issue of their code"
CHOE = "Choe et al."
OURS = "our choice"

# VGG16's features at a quarter of the width, pretrained on drawn shapes (demo.py).
DEMO_WEIGHTS = str(Path(__file__).with_name("demo_vgg16.pth"))

# (data set, architecture) -> {name: (value, source)}. What the values mean: FLAGS below, and
# stride: input pixels per location of the map (16: 224 -> 14 x 14, 8: 224 -> 28 x 28).
# fmt: off
PRESETS: dict[tuple[str, str], dict[str, tuple[Any, str]]] = {
    ("CUB", "vgg16"): {
        "lr": (4e-3, B), "lr_new": (2e-2, B),
        "lambda_sim": (0.5, CODE), "lambda_norm": (0.15, CODE), "lambda_drop": (3.0, CODE),
        "tau_fg": (0.6, CODE), "tau_bg": (0.1, CODE), "gamma": (0.8, CODE), "p": (0.5, CODE),
        "epochs": (70, CODE), "warm_epochs": (20, CODE),
        "decay_at": ([41, 61], CODE), "decay_factor": (0.2, CODE),
        "warm_batch_size": (32, CODE), "batch_size": (64, CODE),
        "norm_class": ("max", CODE), "stride": (16, CHOE),
    },
    ("CUB", "resnet50"): {
        "lr": (2e-3, B), "lr_new": (2e-2, B),
        "lambda_sim": (0.6, C5), "lambda_norm": (0.07, C5), "lambda_drop": (2.0, C5),
        "tau_fg": (0.4, C5), "tau_bg": (0.2, C5), "gamma": (0.8, C5), "p": (0.25, C5),
        "epochs": (70, CODE), "warm_epochs": (20, CODE),
        "decay_at": ([41, 61], CODE), "decay_factor": (0.2, CODE),
        "warm_batch_size": (32, CODE), "batch_size": (32, CODE),
        "norm_class": ("max", CODE), "stride": (8, CHOE),
    },
    # The first ten classes of CUB, with CUB's values for the losses. CUB's learning rates are too high here.
    # The rates were chosen for the CAM baseline on val (VGG16, one seed) and serve all methods. ResNet50 has
    # CUB's rates divided by 8, the factor that VGG16 got; they are not tuned.
    ("CUB10", "vgg16"): {
        "lr": (5e-4, OURS), "lr_new": (2.5e-3, OURS),
        "lambda_sim": (0.5, f"CUB: {CODE}"), "lambda_norm": (0.15, f"CUB: {CODE}"),
        "lambda_drop": (3.0, f"CUB: {CODE}"),
        "tau_fg": (0.6, f"CUB: {CODE}"), "tau_bg": (0.1, f"CUB: {CODE}"),
        "gamma": (0.8, f"CUB: {CODE}"), "p": (0.5, f"CUB: {CODE}"),
        "epochs": (12, OURS), "warm_epochs": (3, OURS), "val_every": (12, OURS),
        "decay_at": ([9], OURS), "decay_factor": (0.2, OURS),
        "warm_batch_size": (32, OURS), "batch_size": (32, OURS),
        "norm_class": ("max", f"CUB: {CODE}"), "stride": (16, CHOE),
    },
    ("CUB10", "resnet50"): {
        "lr": (2.5e-4, OURS), "lr_new": (2.5e-3, OURS),
        "lambda_sim": (0.6, f"CUB: {C5}"), "lambda_norm": (0.07, f"CUB: {C5}"),
        "lambda_drop": (2.0, f"CUB: {C5}"), "tau_fg": (0.4, f"CUB: {C5}"), "tau_bg": (0.2, f"CUB: {C5}"),
        "gamma": (0.8, f"CUB: {C5}"), "p": (0.25, f"CUB: {C5}"),
        "epochs": (12, OURS), "warm_epochs": (3, OURS), "val_every": (12, OURS),
        "decay_at": ([9], OURS), "decay_factor": (0.2, OURS),
        "warm_batch_size": (32, OURS), "batch_size": (32, OURS),
        "norm_class": ("max", f"CUB: {CODE}"), "stride": (8, CHOE),
    },
    ("ILSVRC", "vgg16"): {
        "lr": (2e-5, B), "lr_new": (1e-4, B),
        "lambda_sim": (0.5, C5), "lambda_norm": (0.2, C5), "lambda_drop": (3.0, C5),
        "tau_fg": (0.5, C5), "tau_bg": (0.3, C5), "gamma": (0.8, C5), "p": (0.5, C5),
        "epochs": (40, ANSWER), "warm_epochs": (5, ANSWER),
        "decay_at": ([11, 31], ANSWER), "decay_factor": (0.1, ANSWER),
        "warm_batch_size": (32, ANSWER), "batch_size": (32, ANSWER),
        "norm_class": ("target", CODE), "stride": (16, CHOE),
    },
    ("ILSVRC", "resnet50"): {
        "lr": (1e-5, B), "lr_new": (1e-4, B),
        "lambda_sim": (8.0, ANSWER), "lambda_norm": (1.0, ANSWER), "lambda_drop": (2.0, ANSWER),
        "tau_fg": (0.28, ANSWER), "tau_bg": (0.25, ANSWER), "gamma": (0.8, ANSWER), "p": (0.25, ANSWER),
        "epochs": (30, ANSWER), "warm_epochs": (14, ANSWER),
        "decay_at": ([21], ANSWER), "decay_factor": (0.1, ANSWER),
        "warm_batch_size": (32, ANSWER), "batch_size": (32, ANSWER),
        "norm_class": ("target", CODE), "stride": (8, CHOE),
    },
    ("OpenImages", "vgg16"): {
        "lr": (2e-3, OURS), "lr_new": (2e-2, OURS),
        "lambda_sim": (0.5, C5), "lambda_norm": (0.2, C5), "lambda_drop": (3.0, C5),
        "tau_fg": (0.5, C5), "tau_bg": (0.3, C5), "gamma": (0.8, C5), "p": (0.5, C5),
        "epochs": (10, OURS), "warm_epochs": (2, OURS),
        "decay_at": ([4, 7], OURS), "decay_factor": (0.1, OURS),
        "warm_batch_size": (32, OURS), "batch_size": (32, OURS),
        "norm_class": ("target", C5), "stride": (16, CHOE),
    },
    # The drawn data set: a quarter of VGG16's width, 112 x 112 pixels, 14 x 14 maps. Chosen on val, one seed.
    # val_every: only the last epoch is evaluated. The pretrained features localize best before the classes
    # are learned, so the best epoch by localization would be one that hardly classifies.
    ("demo", "vgg16"): {
        "lr": (8e-4, OURS), "lr_new": (8e-2, OURS), "frozen_blocks": (2, OURS),
        "lambda_sim": (1.0, OURS), "lambda_norm": (1.5, OURS), "lambda_drop": (0.3, OURS),
        "tau_fg": (0.3, OURS), "tau_bg": (0.2, OURS), "gamma": (0.9, OURS), "p": (0.25, OURS),
        "epochs": (10, OURS), "warm_epochs": (0, OURS), "val_every": (10, OURS),
        "decay_at": ([9], OURS), "decay_factor": (0.2, OURS),
        "warm_batch_size": (32, OURS), "batch_size": (32, OURS),
        "norm_class": ("target", OURS), "stride": (8, OURS), "width": (0.25, OURS),
        "resize_size": (128, OURS), "image_size": (112, OURS),
        "weights": (DEMO_WEIGHTS, OURS), "pictures": (6, OURS),
    },
    # The run that pretrained bridge_wsol/demo_vgg16.pth, from scratch.
    ("demo-pretrain", "vgg16"): {
        "lr": (3e-2, OURS), "lr_new": (3e-2, OURS),
        "lambda_sim": (0.0, OURS), "lambda_norm": (0.0, OURS), "lambda_drop": (0.0, OURS),
        "tau_fg": (0.25, OURS), "tau_bg": (0.15, OURS), "gamma": (0.8, OURS), "p": (0.5, OURS),
        "epochs": (12, OURS), "warm_epochs": (12, OURS),
        "decay_at": ([9, 11], OURS), "decay_factor": (0.2, OURS),
        "warm_batch_size": (32, OURS), "batch_size": (32, OURS),
        "norm_class": ("target", OURS), "stride": (8, OURS), "width": (0.25, OURS),
        "resize_size": (128, OURS), "image_size": (112, OURS),
        "weights": ("none", OURS), "batch_norm": (True, OURS),
    },
}

# Values of every preset that does not set its own.
COMMON: dict[str, tuple[Any, str]] = {
    "momentum": (0.9, B), "nesterov": (True, CODE), "weight_decay": (5e-4, B),
    "resize_size": (256, CHOE), "image_size": (224, CHOE),
    "width": (1.0, "the paper's networks"), "batch_norm": (False, "the paper's networks"),
}
# fmt: on


def preset(dataset: str, arch: str) -> dict[str, tuple[Any, str]]:
    """{name: (value, source)} of a run, without the method's own values and flags.

    A folder of one's own images has CUB's values. Raises InputError for a pair without a preset.
    """
    if is_folder(dataset) and ("CUB", arch) in PRESETS:
        return COMMON | {name: (value, f"{OURS}: CUB's") for name, (value, _) in PRESETS["CUB", arch].items()}
    if (dataset, arch) not in PRESETS:
        pairs = ", ".join(f"{d} {a}" for d, a in PRESETS)
        raise InputError(
            f"--dataset {dataset} --arch {arch}: no preset; choose one of {pairs}, or a folder of images"
        )
    return COMMON | PRESETS[dataset, arch]


def image_size(dataset: str) -> int:
    """Side in pixels of the images and score maps of a data set's evaluation."""
    sizes = [(COMMON | values)["image_size"][0] for (name, _), values in PRESETS.items() if name == dataset]
    return sizes[0] if sizes else COMMON["image_size"][0]


# -------------------------------------------------------------------------------- flags -> configuration

# Values without a preset. val_per_class None: the list of val where there is one, else 2 images per class.
DEFAULTS = {
    "data_root": "data",
    "splits": "data_splits",
    "weights": "imagenet",
    "seed": 0,
    "val_every": 1,
    "val_per_class": None,
    "workers": default_workers(),
    "device": "auto",
    "amp": "auto",
    "cache": None,
    "pictures": 0,
    "frozen_blocks": 0,
}

# A method without losses of the paper says so in its `preset`, as the source of their weights.
NOT_USED = "not used by this method"
WEIGHT_OF = {name: name for name in ("lambda_sim", "lambda_norm", "lambda_drop")}
WEIGHT_OF |= {"tau_fg": "lambda_sim", "tau_bg": "lambda_sim", "norm_class": "lambda_norm"}
WEIGHT_OF |= {"gamma": "lambda_drop", "p": "lambda_drop"}

# Flags that may differ on --resume. Of these, device, amp and val_every can change results.
FREE_ON_RESUME = ("epochs", "val_every", "workers", "device", "amp", "cache", "data_root", "splits")
FREE_ON_RESUME += ("pictures",)
# Values that say where and how a run is computed; all others can change its results.
MACHINE = ("workers", "device", "cache", "data_root", "splits", "pictures")
# What chooses the preset, and its defaults.
CHOICES = {"dataset": "demo", "arch": "vgg16", "method": "bridge"}
# Flags that are no part of the configuration.
NOT_CONFIG = ("resume", "out", "download", "quiet")


class Flag(NamedTuple):
    """A number or word of the configuration: its flag, and the values it may have."""

    kind: type
    range: str  # in words
    allows: Callable[[Any], bool]
    help: str


def _at_least(kind: type, least: int, text: str) -> Flag:
    return Flag(kind, f"at least {least}", lambda x: least <= x < float("inf"), text)


def _rate(text: str) -> Flag:
    return Flag(float, "above 0", lambda x: 0 < x < float("inf"), text)


def _share(text: str) -> Flag:
    return Flag(float, "in [0, 1]", lambda x: 0 <= x <= 1, text)


RUN_FLAGS = {
    "seed": Flag(int, "in [0, 2^63)", lambda x: 0 <= x < 2**63, "random seed (default 0)"),
    "workers": _at_least(
        int, 0, "DataLoader workers, and evaluation workers (default: CPU cores, at most 8)"
    ),
    "val_every": _at_least(
        int, 1, "evaluate on val every N epochs and after the last (default 1; demo, CUB10: last only)"
    ),
    "pictures": _at_least(
        int, 0, "draw the boxes of N test images at the end, as in Fig. A4 (default 0; demo: 6)"
    ),
    "frozen_blocks": _at_least(
        int, 0, "keep the weights of the first N blocks as pretrained (default 0, as in the paper; demo: 2)"
    ),
}
PAPER_FLAGS = {
    "lambda_sim": _at_least(float, 0, "weight of L_sim"),
    "lambda_norm": _at_least(float, 0, "weight of L_norm"),
    "lambda_drop": _at_least(float, 0, "weight of L_drop; 0 switches attentive dropout off"),
    "tau_fg": _share("L_sim: foreground where F-hat > tau_fg, a fraction of F's range"),
    "tau_bg": _share("L_sim: background where F-hat < tau_bg"),
    "gamma": _at_least(float, 0, "attentive dropout: candidates above gamma times the maximum"),
    "p": _share("attentive dropout: probability to drop a candidate (torchrun: write -- train.py --p 0.5)"),
    "epochs": _at_least(int, 1, "epochs in all"),
    "warm_epochs": _at_least(int, 0, "first epochs, with L_CE and L_drop alone"),
    "batch_size": _at_least(int, 1, "global batch size, of both stages unless --warm-batch-size is given"),
    "warm_batch_size": _at_least(int, 1, "global batch size of the warm epochs"),
    "lr": _rate("learning rate of the pretrained layers (appendix B)"),
    "lr_new": _rate("learning rate of the new layers; ResNet50: layer4 and the classifier"),
    "decay_factor": _rate("factor of the learning rates at each epoch of --decay-at"),
}


def parse_args(argv: list[str] | None, description: str, methods: dict[str, Any]) -> argparse.Namespace:
    """The flags of train.py. Only those that were given are set, and `given` has their names.

    dataset, arch and method are always set. methods: the registry, name -> class.
    """
    parser = Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument_group("what to train").add_argument
    add(
        "--dataset",
        metavar="D",
        help=f"{', '.join(NAMES)} (default demo), or a folder of images",
    )
    add("--arch", choices=ARCHS, help="default vgg16")
    add("--method", choices=methods, help="default bridge, the paper's; cam: CAM baseline")
    add("--weights", metavar="W", help="imagenet (torchvision's; default, but for demo), none, or a file")
    _add_numbers(add, {name: RUN_FLAGS[name] for name in ("frozen_blocks", "seed")})

    add = parser.add_argument_group("where things are").add_argument
    add("--data-root", metavar="DIR", help="folder with the data set as distributed (default data)")
    add(
        "--splits",
        metavar="DIR",
        help="folder with the lists of images, labels and boxes (default data_splits)",
    )
    add("--out", type=Path, default=None, metavar="DIR", help="run folder (default runs/DATASET_ARCH_METHOD)")
    add(
        "--cache",
        metavar="DIR",
        help="folder for resized training images, 0.2 MB per image (default: no cache; demo: "
        "DATA_ROOT/cache)",
    )
    add(
        "--download",
        action="store_true",
        default=False,
        help="download CUB_200_2011 to --data-root if missing",
    )

    add = parser.add_argument_group("how it runs").add_argument
    add("--resume", action="store_true", default=False, help="continue the run in --out, with its values")
    add("--device", help="auto (default), cpu, cuda, cuda:1, ...")
    add("--amp", choices=("auto", "bf16", "off"), help="auto (default): bf16 where the device is fast at it")
    add("--quiet", action="store_true", default=False, help="no progress line on stderr")
    add(
        "--val-per-class",
        type=int,
        metavar="N",
        help="images per class to hold out from train as val (default: 2 if val has no list)",
    )
    _add_numbers(add, {name: RUN_FLAGS[name] for name in ("val_every", "pictures", "workers")})

    _add_values(parser, methods)
    given = vars(parser.parse_args(argv))
    return argparse.Namespace(**CHOICES | given, given=tuple(given))


def _add_values(parser: argparse.ArgumentParser, methods: dict[str, Any]) -> None:
    where = "Default: the preset of --dataset and --arch, a table with sources in bridge_wsol/optim.py."
    add = parser.add_argument_group("the paper's values", where).add_argument
    _add_numbers(add, PAPER_FLAGS)
    add("--decay-at", type=int, nargs="*", metavar="EPOCH", help="epochs, from 1, at which the rates decay")
    text = "S in L_norm: target = ground-truth class, max = maximum over classes"
    add("--norm-class", choices=("target", "max"), help=text)

    where = "Meaning, unit and source of each: the docstring of its class in bridge_wsol/baselines.py."
    add = parser.add_argument_group("one compared method's values", where).add_argument
    add_method_values(add, method_values(methods))


def add_method_values(add: Callable[..., Any], values: dict[str, tuple[Any, str]]) -> None:
    """Adds a flag for each of these `method_values`. add: the parser's add_argument."""
    for name, (value, text) in values.items():
        add(f"--{name.replace('_', '-')}", type=type(value), metavar="X", help=text)


def map_values(methods: dict[str, Any]) -> dict[str, tuple[Any, str]]:
    """Those of `method_values` that change the map of a trained network and nothing else, for evaluate.py."""
    of_map = {name for cls in methods.values() for name in cls.of_map}
    values = {name: value for name, value in method_values(methods).items() if name in of_map}
    return {x: (value, f"{text.split(' (')[0]} (default: the run's)") for x, (value, text) in values.items()}


def _add_numbers(add: Callable[..., Any], flags: dict[str, Flag]) -> None:
    for name, flag in flags.items():
        metavar = "N" if flag.kind is int else "X"
        add(f"--{name.replace('_', '-')}", type=flag.kind, metavar=metavar, help=f"{flag.help}; {flag.range}")


def method_values(methods: dict[str, Any]) -> dict[str, tuple[Any, str]]:
    """{name: (a default, help)} of the values that methods add to the presets. methods: name -> class."""
    common = preset("CUB", "vgg16")
    own: dict[str, tuple[Any, str]] = {}
    for method, cls in methods.items():
        of_archs = [cls.preset("CUB", arch) for arch in ARCHS]
        allowed = {name: of for base in cls.__mro__ for name, of in vars(base).get("allowed", {}).items()}
        for name, (value, _) in of_archs[0].items():
            if name in common or name in own:
                continue
            defaults = "; ResNet50 ".join(dict.fromkeys(str(values[name][0]) for values in of_archs))
            range_ = allowed.get(name, ())
            if isinstance(value, str):
                allows = " or ".join(range_)
            elif range_[1] == float("inf"):
                allows = f"at least {range_[0]}"
            else:
                allows = f"in [{range_[0]}, {range_[1]}]"
            own[name] = value, f"{method}: {allows} (default {defaults})"
    return own


def resolve_config(
    args: argparse.Namespace, interrupted: dict[str, Any] | None, methods: dict[str, Any]
) -> tuple[SimpleNamespace, dict[str, str]]:
    """(all values of a run, {name: source}); a source is the preset's, "flag" or "default".

    args: of `parse_args`. interrupted: the checkpoint of the run to resume, whose values are kept.
    methods: the registry. Raises InputError for a flag that contradicts that run, that its method does not
    use, or whose value is out of range.
    """
    flags = {name: getattr(args, name) for name in args.given if name not in NOT_CONFIG}
    if interrupted:
        values = DEFAULTS | interrupted["config"]  # an older run has no value of a newer flag
        sources = dict.fromkeys(DEFAULTS, "default") | interrupted["sources"]
        for name, value in flags.items():
            if name in values and name not in FREE_ON_RESUME and value != values[name]:
                flag = f"--{name.replace('_', '-')} {value}"
                raise InputError(f"{flag}: the run to resume has {values[name]}: pass that, or another --out")
    else:
        own = preset(args.dataset, args.arch) | methods[args.method].preset(args.dataset, args.arch)
        chosen = {name: getattr(args, name) for name in CHOICES}
        values = DEFAULTS | chosen | {name: value for name, (value, _) in own.items()}
        sources = dict.fromkeys((*DEFAULTS, *CHOICES), "default")
        sources |= {name: f"preset: {source}" for name, (_, source) in own.items()}
        if "batch_size" in flags:
            flags.setdefault("warm_batch_size", flags["batch_size"])
    config = SimpleNamespace(**(values | flags))
    for name in flags:
        if name not in values or is_unused(name, sources):
            flag = f"--{name.replace('_', '-')}"
            raise InputError(f"{flag}: not a value of --method {config.method}: remove it")
    if interrupted:
        _check_epochs(config.epochs, interrupted)
    if config.dataset == "demo" and config.cache is None:  # 79 MB
        config.cache, sources["cache"] = str(Path(config.data_root) / "cache"), f"preset: {OURS}"
    for name, flag in (RUN_FLAGS | PAPER_FLAGS).items():
        value = getattr(config, name)
        if not flag.allows(value):
            raise InputError(f"--{name.replace('_', '-')} {value}: must be {flag.range}")
    if min(config.decay_at, default=1) < 1 or len(set(config.decay_at)) < len(config.decay_at):
        epochs = " ".join(map(str, config.decay_at))
        raise InputError(f"--decay-at {epochs}: must be epochs from 1, each once")
    if config.frozen_blocks and config.weights == "none":
        problem = f"--weights none: {config.frozen_blocks} frozen blocks would keep random weights"
        raise InputError(f"{problem}: add --frozen-blocks 0")
    return config, sources | dict.fromkeys(flags, "flag")


def is_unused(name: str, sources: dict[str, str]) -> bool:
    """Whether a value belongs to a loss of the paper that the method does not have."""
    return sources.get(WEIGHT_OF.get(name)) == f"preset: {NOT_USED}"


def _check_epochs(epochs: int, interrupted: dict[str, Any]) -> None:
    """Raises InputError where a checkpoint to resume is beyond these epochs, or ends them without val."""
    done, val = interrupted["epoch"], interrupted["val"] or {}
    least = done if val.get("epoch") == done and not interrupted["progress"] else done + 1
    if epochs < least:
        raise InputError(f"--epochs {epochs}: the run to resume is beyond that: pass at least {least}")


def write_config(
    path: Path, config: SimpleNamespace, sources: dict[str, str], data: dict[str, Any], device: torch.device
) -> None:
    """config.json: every value with its source; the data; versions, device and commit."""
    command, commit = ["git", "rev-parse", "HEAD"], None
    with suppress(OSError, subprocess.TimeoutExpired):
        here = Path(__file__).parent
        git = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=10)
        commit = git.stdout.strip() or None
    environment = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "git_commit": commit,
    }
    values = {name: {"value": value, "source": sources[name]} for name, value in sorted(vars(config).items())}
    write_json(path, {"config": values, "data": data, "environment": environment})


# --------------------------------------------------------------------------------------------- optimizer


def parameter_groups(model: nn.Module, arch: str) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(old, new) layers of appendix B; every parameter is in exactly one of the two lists.

    VGG16: `features` / conv6 and fc, which VGG16-GAP adds. ResNet50: layers before layer4 / layer4 and fc.
    Layers that a method adds are new. The authors' released code has fc alone in ResNet50's second group;
    where sources differ, the appendix decides.
    """
    resnet = ("conv1.", "bn1.", "layer1.", "layer2.", "layer3.")
    old_prefixes = {"vgg16": ("features.",), "resnet50": resnet}[arch]
    named = list(model.named_parameters())
    old = [parameter for name, parameter in named if name.startswith(old_prefixes)]
    new = [parameter for name, parameter in named if not name.startswith(old_prefixes)]
    return old, new


def build_optimizer(
    model: nn.Module,
    arch: str,
    *,
    lr: float,
    lr_new: float,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
) -> torch.optim.SGD:
    """SGD over the two groups; each keeps its first rate as `base_lr` for `set_learning_rates`."""
    old, new = parameter_groups(model, arch)
    groups = [{"params": old, "lr": lr, "base_lr": lr}, {"params": new, "lr": lr_new, "base_lr": lr_new}]
    # One pass over each parameter instead of four; the same update up to rounding.
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in model.parameters())
    return torch.optim.SGD(
        groups, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay, fused=fused
    )


def set_learning_rates(
    optimizer: torch.optim.Optimizer, epoch: int, decay_at: list[int], decay_factor: float
) -> list[float]:
    """Sets and returns the rate of each group: base_lr times decay_factor for each of decay_at reached.

    The step schedule depends on the epoch alone, counted from 1.
    """
    factor = decay_factor ** sum(epoch >= start for start in decay_at)
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    return [group["lr"] for group in optimizer.param_groups]


def check_finite(recent: list[tuple[int, dict[str, Tensor]]], epoch: int, steps: int) -> None:
    """Raises InputError for the first of recent steps whose loss is not finite."""
    finite = torch.stack([values["loss"] for _, values in recent]).isfinite().tolist()
    if not all(finite):
        step, values = recent[finite.index(False)]
        by_name = ", ".join(f"{name} {float(value):.4g}" for name, value in values.items() if name != "top1")
        problem = f"non-finite loss in epoch {epoch}, step {step}/{steps} ({by_name})"
        raise InputError(f"{problem}; last.pt was not updated: lower --lr and --lr-new")
