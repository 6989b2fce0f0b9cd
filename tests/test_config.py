"""Presets against the values of the paper, flags, and what a run to resume may change."""

import re

import pytest

import bridge_wsol.reproduce.baselines  # noqa: F401  registers the compared systems
from bridge_wsol import config
from bridge_wsol.methods import CAM, METHODS, Bridge
from bridge_wsol.utils import InputError, Value

LOSSES = ("lambda_sim", "lambda_norm", "lambda_drop", "tau_fg", "tau_bg", "gamma", "p", "norm_class")
RATES = ("lr", "lr_new", "momentum", "weight_decay", "nesterov")
SCHEDULE = ("epochs", "warm_epochs", "decay_at", "decay_factor", "warm_batch_size", "batch_size")
SIZES = ("stride", "width", "resize_size", "image_size")


def resolve(flags="", checkpoint=None):
    return config.resolve_config(config.parse_args(flags.split(), "").given, checkpoint)


# Typed from appendix B and C.5, the released configuration and the authors' answers; below them, our choices.
TABLE = {
    "CUB vgg16": "0.5 0.15 3.0 0.6 0.1 0.8 0.5 max | 0.004 0.02 | 70 20 [41, 61] 0.2 32 64 | 16",
    "CUB resnet50": "0.6 0.07 2.0 0.4 0.2 0.8 0.25 max | 0.002 0.02 | 70 20 [41, 61] 0.2 32 32 | 8",
    "ILSVRC vgg16": "0.5 0.2 3.0 0.5 0.3 0.8 0.5 target | 2e-05 0.0001 | 40 5 [11, 31] 0.1 32 32 | 16",
    "ILSVRC resnet50": "8.0 1.0 2.0 0.28 0.25 0.8 0.25 target | 1e-05 0.0001 | 30 14 [21] 0.1 32 32 | 8",
    "OpenImages vgg16": "0.5 0.2 3.0 0.5 0.3 0.8 0.5 target | 0.002 0.02 | 10 2 [4, 7] 0.1 32 32 | 16",
    "CUB10 vgg16": "0.5 0.15 3.0 0.6 0.1 0.8 0.5 max | 0.0005 0.0025 | 12 3 [9] 0.2 32 32 | 16",
    "CUB10 resnet50": "0.6 0.07 2.0 0.4 0.2 0.8 0.25 max | 0.00025 0.0025 | 12 3 [9] 0.2 32 32 | 8",
    "Imagenette vgg16": "0.5 0.2 3.0 0.5 0.3 0.8 0.5 target | 0.002 0.01 | 8 2 [6] 0.2 32 32 | 16",
    "Imagenette resnet50": "8.0 1.0 2.0 0.28 0.25 0.8 0.25 target | 0.001 0.01 | 8 2 [6] 0.2 32 32 | 8",
    "folder vgg16": "0.5 0.2 3.0 0.5 0.3 0.8 0.5 target | 0.00025 0.00125 | 12 3 [9] 0.2 32 32 | 16",
    "folder resnet50": "8.0 1.0 2.0 0.28 0.25 0.8 0.25 target | 0.000125 0.00125 | 12 3 [9] 0.2 32 32 | 8",
    "demo vgg16": "1.0 1.5 0.3 0.6 0.4 0.9 0.25 target | 0.0016 0.12 | 10 0 [9] 0.2 32 32 | 8",
}


def test_every_preset_has_the_values_of_its_sources():
    assert TABLE.keys() == {" ".join(key) for key in config.PRESETS if len(key) == 2}
    for pair, text in TABLE.items():
        found = {name: value for name, (value, _) in config.preset_values(*pair.split(), "bridge").items()}
        groups = (LOSSES, RATES[:2], SCHEDULE, SIZES[:1])
        assert " | ".join(" ".join(str(found[name]) for name in group) for group in groups) == text
        assert [found[name] for name in RATES[2:]] == [0.9, 5e-4, True]  # True: Nesterov
        assert [found[name] for name in SIZES[1:]] == ([0.125, 128, 112] if "demo" in pair else [1, 256, 224])


@pytest.mark.parametrize("pair", TABLE)
def test_presets_are_complete_and_every_value_has_a_known_source(pair):
    known = {getattr(config, name) for name in ("B", "C5", "CODE", "ANSWER", "CHOE", "OURS", "AUTHORS")}
    for method, cls in METHODS.items():
        found = config.preset_values(*pair.split(), method)
        assert found.keys() == config.RUN_VALUES.keys() | cls.all_values().keys()
        for name, (value, source) in found.items():
            assert value is not None or name in ("preset", "workers", "val_per_class"), name
            if source.startswith("preset: "):
                assert re.match(r"preset: (?:CUB: |ILSVRC: )?([^,]*)", source)[1] in known, name
            elif name in (*LOSSES, *RATES, *SCHEDULE, *SIZES) or name in cls.all_values():
                assert source != "default", name
        assert found["nesterov"] == (True, config.CODE)


def test_cam_is_the_same_run_without_the_losses():
    cam, bridge = (config.preset_values("CUB", "vgg16", name) for name in ("cam", "bridge"))
    assert bridge.keys() - cam.keys() == {*LOSSES} and cam == {name: bridge[name] for name in cam}


OTHER_RATES = {
    "demo": {"acol": (4e-4, 4e-2), "eil": (4e-4, 4e-2), "spg": (1.6e-3, 2e-2)},
    "Imagenette": {"acol": (5e-4, 2.5e-3), "eil": (1e-3, 5e-3)},
    "CUB": {},
}


def test_some_methods_have_other_rates_than_bridge():
    for dataset, expected in OTHER_RATES.items():
        found = [resolve(f"--dataset {dataset} --method {name}")[0] for name in ("bridge", *METHODS)]
        rates = {c.method: (c.lr, c.lr_new) for c in found}
        assert {name: pair for name, pair in rates.items() if pair != rates["bridge"]} == expected


def test_values_that_depend_on_data_set_and_architecture():
    maps = dict.fromkeys(("CUB", "CUB10", "demo"), "location")  # every class is a bird
    maps |= dict.fromkeys(("ILSVRC", "OpenImages", "photos/", "listed"), "joint")
    assert {name: resolve(f"--method calm --dataset {name}")[0].calm_map for name in maps} == maps
    for flags, cells in (("", [0, 8, 16, 22, 28]), ("--dataset CUB", [0, 16, 32, 44, 56])):
        assert resolve(f"--method has {flags}")[0].has_cells == cells
    assert resolve("--method has --has-cells 0,5")[0].has_cells == [0, 5]
    gammas = [resolve(f"--method adl --dataset CUB --arch {a}")[0].adl_gamma for a in ("vgg16", "resnet50")]
    assert gammas == [0.8, 0.9]
    cub, own = vars(resolve("--dataset CUB")[0]), resolve("--dataset photos/")
    assert vars(resolve("--dataset listed")[0]) == cub | {"dataset": "listed"}
    assert vars(own[0]) == vars(resolve("--dataset ./photos --preset folder")[0]) != cub
    assert own[1]["tau_fg"] == "preset of folder: ILSVRC: appendix C.5"
    assert resolve("--dataset photos/ --preset OpenImages")[0].lr == 2e-3
    with pytest.raises(InputError, match="OpenImages --arch resnet50: no preset; .*CUB vgg16, CUB resnet50"):
        resolve("--dataset OpenImages --arch resnet50")


NAN, INF = float("nan"), float("inf")
INTERVALS = [("[0, 1]", (0, 0.5, 1), (-1e-9, 1.1, NAN)), ("(0, 1]", (1e-9, 1), (0, 1.1))]
INTERVALS += [("[0, 1)", (0, 0.99), (1, -1)), ("(0, inf)", (1e-9, 1e300), (0, INF, NAN))]
INTERVALS += [("[-1, 1]", (-1, 1), (-1.1,)), (("on", "off"), ("on", "off"), ("o",)), (None, (-5, "any"), ())]


@pytest.mark.parametrize("allowed, inside, outside", INTERVALS)
def test_intervals_and_words(allowed, inside, outside):
    value = Value(float, allowed=allowed)
    for x in inside:
        value.check("my_name", x)
    for x in outside:
        with pytest.raises(InputError, match=f"--my-name {x}: must be"):
            value.check("my_name", x)


BAD = """--seed 9223372036854775808|--lambda-sim nan|--decay-at 0|--decay-at 2 2|--norm-class mean
--method magic|--width 0.001|--has-cells 16,-2 --method has|--has-cells= --method has
--image-size 300|--tau-fg 0.05|--preset mine|--batch-size 1.5"""


@pytest.mark.parametrize("flags", BAD.replace("\n", "|").split("|"))
def test_bad_values_name_their_flag(flags):
    with pytest.raises(InputError) as raised:
        resolve(f"{flags} --dataset CUB")
    assert flags.split()[0].split("=")[0] in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("flag, method", [("--drop-p", "bridge"), ("--has-p", "has")])
def test_a_value_that_the_method_does_not_have_is_refused(flag, method):
    with pytest.raises(InputError, match=f"{flag}: not a value of --method cam"):
        resolve(f"--method cam {flag} 0.5")
    name = flag.strip("-").replace("drop-", "").replace("-", "_")
    found, sources = resolve(f"--method {method} {flag} 0.5")
    assert vars(found)[name] == 0.5 and sources[name] == "flag"


def test_sources_and_the_batch_size_of_the_warm_epochs():
    _, sources = resolve("--dataset CUB --lr 1")
    assert [sources[name] for name in ("dataset", "arch", "lr")] == ["flag", "default", "flag"]
    assert sources["lr_new"] == f"preset: {config.B}"
    for flags, sizes in (("", (32, 64)), ("--batch-size 9", (9, 9)), ("--warm-batch-size 3", (3, 64))):
        found, _ = resolve(f"--dataset CUB {flags}")
        assert (found.warm_batch_size, found.batch_size) == sizes
    with pytest.raises(InputError, match="--weights none.*random .*: add --frozen-blocks 0"):
        resolve("--weights none")  # the demo freezes two blocks
    assert resolve("--weights none --frozen-blocks 0")[0].weights == "none"


def test_a_run_to_resume_keeps_its_values_except_those_that_may_change():
    then, sources = resolve("--dataset CUB --epochs 9 --lr 0.5")
    run = {"config": vars(then), "sources": sources, "epoch": 3, "val": {"epoch": 3}}
    assert resolve("", run) == (then, sources) == resolve("--lr 0.5 --dataset CUB", run)
    free = "--epochs 12 --val-every 2 --workers 3 --device cpu --amp off --pictures 4 --data-root d --lists l"
    assert set(free.split()[1::2]) <= {str(value) for value in vars(resolve(free, run)[0]).values()}
    fixed = ("--lr 0.4", "--seed 1", "--method cam", "--dataset CUB10", "--warm-epochs 1", "--drop-p 0.1")
    for flags in fixed:
        with pytest.raises(InputError, match=f"{flags}: the run to resume has"):
            resolve(flags, run)
    with pytest.raises(InputError, match="--epochs 2: the run has 3 epochs: pass at least 3"):
        resolve("--epochs 2", run)
    assert resolve("--epochs 3", run)[0].epochs == 3
    with pytest.raises(InputError, match="--epochs 3: .* pass at least 4"):  # the last epoch sees val
        resolve("--epochs 3", run | {"val": {"epoch": 2}})
    with pytest.raises(InputError, match="--adl-gamma: not a value of --method bridge"):
        resolve("--adl-gamma 0.5", run)


def test_a_method_of_one_s_own_may_change_a_default_and_registers_at_any_time():
    class Mine(Bridge, name="mine"):
        values = {"alpha": Value(float, 3.0, "of mine", "[0, inf)"), "momentum": Value(float, 0.5, "less")}

    try:
        found, sources = resolve("--method mine --tau-fg 0.5")
        assert (found.alpha, found.momentum, found.tau_fg) == (3.0, 0.5, 0.5)
        assert sources["alpha"] == "default"
        assert CAM.all_values().keys() < Bridge.all_values().keys() < Mine.all_values().keys()
        with pytest.raises(InputError, match="--alpha -1.0: must be in"):
            resolve("--method mine --alpha -1")
    finally:
        del METHODS["mine"]


def test_a_data_set_of_the_list_format_trains_with_cub_s_values():
    found, sources = resolve("--dataset tiny --preset CUB")
    cub = config.preset_values("CUB", "vgg16", "bridge", "tiny")
    assert found.dataset == "tiny" and cub["lr"][1] == "preset of CUB: appendix B"
    for name in (*LOSSES, *RATES, *SCHEDULE):
        assert (getattr(found, name), sources[name]) == cub[name], name


def test_the_fingerprint_is_of_what_decides_the_results():
    values = vars(resolve("--dataset CUB --weights /a/w.pth")[0])
    known = config.fingerprint(values)
    free = {
        "seed": 7,
        "device": "cuda",
        "amp": "off",
        "workers": 3,
        "data_root": "/x",
        "lists": "/y",
        "pictures": 4,
    }
    for name, value in (free | {"weights": "/b/w.pth", "dataset": "/disk/CUB"}).items():
        assert config.fingerprint(values | {name: value}) == known, name
    changes = {"lr": 1.0, "epochs": 71, "p": 0.4, "decay_at": [41], "weights": "/a/v.pth", "method": "cam"}
    assert len({config.fingerprint(values | {name: value}) for name, value in changes.items()} | {known}) == 7
