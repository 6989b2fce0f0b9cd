"""Presets, the two groups, the schedule."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from bridge_wsol import optim
from bridge_wsol.methods import METHODS
from bridge_wsol.models import build_model
from bridge_wsol.utils import InputError


@pytest.mark.parametrize(
    "arch, width, is_new",
    [
        ("vgg16", 1 / 16, lambda name: not name.startswith("features.")),
        ("resnet50", 1.0, lambda name: name.startswith(("layer4.", "fc."))),
    ],
)
def test_every_parameter_is_in_exactly_one_group(arch, width, is_new):
    model = build_model(arch, 5, stride=16, width=width)
    optimizer = optim.build_optimizer(
        model, arch, lr=0.1, lr_new=0.5, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    names = {parameter: name for name, parameter in model.named_parameters()}
    old, new = ([names[parameter] for parameter in group["params"]] for group in optimizer.param_groups)
    assert sorted(old + new) == sorted(names.values())
    assert new == [name for name in names.values() if is_new(name)]
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.5]


def test_the_schedule_decays_from_the_named_epochs_on_and_has_no_memory():
    optimizer = optim.build_optimizer(
        build_model("vgg16", 2, stride=16, width=1 / 16),
        "vgg16",
        lr=1.0,
        lr_new=5.0,
        momentum=0.9,
        nesterov=True,
        weight_decay=0,
    )
    for epoch, factor in ((1, 1), (40, 1), (41, 0.2), (60, 0.2), (61, 0.04), (70, 0.04), (5, 1)):
        rates = optim.set_learning_rates(optimizer, epoch, [41, 61], 0.2)
        assert (
            rates == pytest.approx([factor, 5 * factor]) == [group["lr"] for group in optimizer.param_groups]
        )


def test_one_step_is_nesterov_sgd_by_hand():
    parameter = torch.nn.Parameter(torch.tensor([2.0]))
    model = torch.nn.Module()
    model.fc = torch.nn.Module()
    model.fc.weight = parameter
    optimizer = optim.build_optimizer(
        model, "vgg16", lr=0.1, lr_new=0.5, momentum=0.9, nesterov=True, weight_decay=0.01
    )
    velocity, value = 0.0, 2.0
    for _ in range(3):
        parameter.grad = torch.tensor([1.0])
        optimizer.step()
        gradient = 1.0 + 0.01 * value
        velocity = 0.9 * velocity + gradient
        value -= 0.5 * (gradient + 0.9 * velocity)
        assert parameter.item() == pytest.approx(value, rel=1e-6)


def test_presets_of_the_paper_are_complete_and_sourced():
    own = {"weights", "val_every", "pictures", "frozen_blocks"}
    names = {frozenset(optim.COMMON | values) - own for values in optim.PRESETS.values()}
    assert len(names) == 1
    for pair in (
        ("CUB", "vgg16"),
        ("CUB", "resnet50"),
        ("ILSVRC", "vgg16"),
        ("ILSVRC", "resnet50"),
        ("OpenImages", "vgg16"),
    ):
        for name, (value, source) in optim.preset(*pair).items():
            assert value is not None and source, (pair, name)
    # Appendix B and C.5, typed from the paper.
    cub, imagenet = optim.preset("CUB", "resnet50"), optim.preset("ILSVRC", "vgg16")
    names = (
        "lr",
        "lr_new",
        "weight_decay",
        "momentum",
        "lambda_sim",
        "lambda_norm",
        "lambda_drop",
        "tau_fg",
        "tau_bg",
        "gamma",
        "p",
    )
    assert [cub[name][0] for name in names] == [2e-3, 2e-2, 5e-4, 0.9, 0.6, 0.07, 2, 0.4, 0.2, 0.8, 0.25]
    assert [imagenet[name][0] for name in names] == [2e-5, 1e-4, 5e-4, 0.9, 0.5, 0.2, 3, 0.5, 0.3, 0.8, 0.5]


def test_vanilla_is_the_same_run_without_the_losses():
    bridge, cam = (
        optim.preset("CUB", "vgg16") | METHODS[name].preset("CUB", "vgg16") for name in ("bridge", "cam")
    )
    changed = {name for name in bridge if bridge[name][0] != cam[name][0]}
    assert changed == {"lambda_sim", "lambda_norm", "lambda_drop"} and all(
        cam[name][0] == 0 for name in changed
    )


@pytest.mark.parametrize("arch", ["vgg16", "resnet50"])
def test_ten_classes_have_cub_s_values_of_the_losses(arch):
    ten, cub = (optim.preset(name, arch) for name in ("CUB10", "CUB"))
    for name in (*"lambda_sim lambda_norm lambda_drop tau_fg tau_bg gamma p norm_class".split(),):
        assert ten[name][0] == cub[name][0] and ten[name][1].endswith(cub[name][1])
    differ = {name for name in ten if ten[name][0] != cub.get(name, (None,))[0]}
    schedule = {"lr", "lr_new", "epochs", "warm_epochs", "decay_at", "batch_size", "val_every"}
    assert differ <= schedule and all(ten[name][1] == optim.OURS for name in differ)


def test_the_demo_keeps_its_decoded_images_and_others_do_not():
    def resolved(*flags):
        args = optim.parse_args(["--data-root", "there", *flags], "", METHODS)
        config, sources = optim.resolve_config(args, None, METHODS)
        return config.cache, sources["cache"]

    assert resolved() == (str(Path("there") / "cache"), f"preset: {optim.OURS}")
    assert resolved("--cache", "here") == ("here", "flag")
    assert resolved("--dataset", "CUB") == (None, "default")


def test_an_older_run_without_the_newest_flags_can_be_resumed():
    config, sources = optim.resolve_config(optim.parse_args(["--dataset", "CUB"], "", METHODS), None, METHODS)
    old = {"config": dict(vars(config)), "sources": dict(sources)} | dict(epoch=0, progress=None, val=None)
    for name in ("pictures", "frozen_blocks"):
        del old["config"][name], old["sources"][name]
    args = optim.parse_args(["--dataset", "CUB", "--resume"], "", METHODS)
    assert optim.resolve_config(args, old, METHODS)[0] == config


def resolve(*flags, interrupted=None):
    return optim.resolve_config(optim.parse_args(list(flags), "", METHODS), interrupted, METHODS)


def test_the_source_of_a_default_is_not_a_flag():
    names = ("dataset", "arch", "method")
    assert [resolve()[1][name] for name in names] == ["default"] * 3
    assert [resolve("--dataset", "CUB", "--method", "cam")[1][name] for name in names][::2] == ["flag"] * 2


@pytest.mark.parametrize(
    "flags",
    [
        ("--lambda-sim", "5"),
        ("--tau-fg", "0.3"),
        ("--norm-class", "max"),
        ("--gamma", "0.9"),
        ("--p", "0.5"),
        ("--has-p", "0.5"),
    ],
)
def test_a_value_that_the_method_does_not_use_is_refused(flags):
    with pytest.raises(InputError, match=f"{flags[0]}: not a value of --method cam: remove it"):
        resolve("--method", "cam", *flags)
    if flags[0] != "--has-p":
        resolve("--method", "bridge", *flags)


@pytest.mark.parametrize(
    "flags",
    [
        ("--seed", str(2**63)),
        ("--lambda-sim", "inf"),
        ("--decay-at", "0"),
        ("--decay-at", "2", "2"),
        ("--eil-lambda", "inf", "--method", "eil"),
    ],
)
def test_values_out_of_range_name_their_flag(flags):
    with pytest.raises(InputError, match=f"{flags[0]} .*: must be"):
        config, _ = resolve(*flags)
        METHODS[config.method](config)


def test_what_a_run_to_resume_has_behind_it():
    config, sources = resolve("--dataset", "CUB", "--epochs", "9")
    at = {"config": vars(config), "sources": sources, "epoch": 3, "progress": None, "val": {"epoch": 3}}
    within = at | {"progress": {"step": 2}}
    unseen = at | {"val": {"epoch": 2}}  # --val-every 2
    for checkpoint, least in ((at, 3), (within, 4), (unseen, 4)):
        with pytest.raises(InputError, match=f"--epochs {least - 1}: .* at least {least}"):
            resolve("--epochs", str(least - 1), interrupted=checkpoint)
        assert resolve("--epochs", str(least), interrupted=checkpoint)[0].epochs == least
    # dataset, arch and method are those of the run; a value of another method is none of this run's.
    assert resolve(interrupted=at)[0].dataset == "CUB"
    with pytest.raises(InputError, match="--adl-gamma: not a value of --method bridge"):
        resolve("--adl-gamma", "0.5", interrupted=at)


def test_frozen_blocks_need_pretrained_weights():
    flags = ["--dataset", "CUB", "--weights", "none"]
    for more, fits in ((["--frozen-blocks", "1"], False), ([], True)):
        args = optim.parse_args(flags + more, "", METHODS)
        with nullcontext() if fits else pytest.raises(InputError, match="random .*: add --frozen-blocks 0"):
            optim.resolve_config(args, None, METHODS)


def test_unknown_pairs_are_answered_with_those_there_are():
    with pytest.raises(InputError, match="OpenImages --arch resnet50: no preset; .*CUB vgg16, CUB resnet50"):
        optim.preset("OpenImages", "resnet50")
