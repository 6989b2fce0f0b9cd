"""Files that other code saved, inputs from public bug reports, and outputs that end early."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, results, run

from bridge_wsol.data import Split, load_score_maps
from bridge_wsol.datasets import load_splits
from bridge_wsol.evaluation import evaluate_score_maps
from bridge_wsol.models import build_network, load_weights, read_weights
from bridge_wsol.utils import InputError, one_line_errors

# Our names -> those of the authors' release and of Choe et al.'s code, with a fourth pool and without.
LAYOUTS = {
    "authors16": (
        ("features.24", "features.2.1"),
        ("features.26", "features.2.3"),
        ("features.28", "features.2.5"),
    ),
    "authors8": (
        ("features.24", "features.2.0"),
        ("features.26", "features.2.2"),
        ("features.28", "features.2.4"),
    ),
    "choe16": (),
    "choe8": (("features.24", "features.23"), ("features.26", "features.25"), ("features.28", "features.27")),
}


def as_saved(state: dict, layout: str) -> dict:
    """A VGG16 state dict under the names of another code."""
    saved = {}
    for name, value in state.items():
        layer, kind = name.rsplit(".", 1)
        new = dict(LAYOUTS[layout]).get(layer, layer)
        if layout.startswith("authors") and new == layer:
            new = re.sub(r"^features\.(\d+)$", r"features.0.\1", layer)
        saved[f"{new.replace('conv6.0', 'conv6')}.{kind}"] = value
    return saved


WRAPPERS = (
    lambda state: state,
    lambda state: {"state_dict": {f"module.{name}": value for name, value in state.items()}, "epoch": 3},
    lambda state: {"model_state_dict": state},
    lambda state: {"model": {f"module.{name}": value for name, value in state.items()}},
)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_vgg16_of_other_code_is_ours_bit_for_bit(tmp_path, layout, wrap):
    stride = int(layout.strip("authorsce"))
    net = build_network("vgg16", 5, stride, width=1 / 16)
    torch.save(wrap(as_saved(net.state_dict(), layout)), tmp_path / "other.pth")
    state, found = read_weights(tmp_path / "other.pth", "vgg16")
    other = build_network("vgg16", 5, stride, width=1 / 16)
    load_weights(other, state, tmp_path / "other.pth")
    images = torch.randn(2, 3, 64, 64)
    assert found == stride and torch.equal(net(images), other(images))


@pytest.mark.parametrize("authors", [True, False])
def test_a_resnet50_of_other_code_is_ours_bit_for_bit(tmp_path, authors):
    net, other = (build_network("resnet50", 5, stride=8).eval() for _ in range(2))
    theirs = {"layer4.0.": "layer4_1.0.", "layer4.1.": "layer4_2.0.", "layer4.2.": "layer4_2.1."}
    state = {
        theirs.get(name[:9], name[:9]) + name[9:] if authors else name: v
        for name, v in net.state_dict().items()
    }
    torch.save({"state_dict": state}, tmp_path / "other.pth")
    state, stride = read_weights(tmp_path / "other.pth", "resnet50")
    load_weights(other, state, tmp_path / "other.pth")
    images = torch.randn(1, 3, 32, 32)
    assert stride is None and torch.equal(net(images), other(images))


@pytest.mark.slow
def test_evaluate_a_file_of_other_code(tiny, tmp_path, fails):
    torch.manual_seed(0)
    net = build_network("vgg16", 3, stride=8)
    torch.save(net.state_dict(), tmp_path / "ours.pth")
    torch.save({"state_dict": as_saved(net.state_dict(), "authors8")}, tmp_path / "theirs.pth")
    flags = f"--dataset tiny --arch vgg16 --data-root {tmp_path}/data --lists {tmp_path}/lists --device cpu"
    fails("evaluate", f"{tmp_path}/ours.pth {flags}", "ours.pth", "--stride")  # our names do not tell it
    fails("evaluate", f"{tmp_path}/theirs.pth {flags} --stride 16", "--stride 16", "say 8")
    run("evaluate", f"{tmp_path}/ours.pth {flags} --stride 8 --out {tmp_path}/ours.json")
    run("evaluate", f"{tmp_path}/theirs.pth {flags}")
    ours, theirs = results(tmp_path, "ours.json"), results(tmp_path, "results_theirs_test.json")
    assert theirs["metrics"]["max_box_acc_v2_at_val_threshold"] is not None
    assert all(ours[key] == theirs[key] for key in ("metrics", "levels", "curves", "images"))


def test_other_files_are_described(tmp_path, fails, tiny):
    flags = f"--dataset tiny --arch vgg16 --data-root {tmp_path}/data --lists {tmp_path}/lists"
    torch.save({"state_dict": {"SPG_A_1.0.weight": torch.zeros(3)}}, tmp_path / "spg.pth")
    fails("evaluate", f"{tmp_path}/spg.pth {flags}", "spg.pth", "conv6 and fc", "SPG_A_1.0.weight")
    fails("evaluate", f"{tmp_path}/spg.pth --dataset tiny", "--arch")


@pytest.mark.parametrize("end", ["pipe", pytest.param("full disk", marks=pytest.mark.slow)])
def test_results_are_written_where_the_output_ends(trained, tmp_path, end):
    flags = f"{trained[1]} --out {tmp_path}/r.json --data-root {tmp_path}/data --lists {tmp_path}/lists"
    flags += " --quiet --batch-size 8"
    command = [sys.executable, str(REPOSITORY / "evaluate.py"), *flags.split()]
    if end == "pipe":
        reader, writer = os.pipe()
        os.close(reader)
    else:
        writer = os.open("/dev/full", os.O_WRONLY)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "output" in done.stderr
    assert results(tmp_path, "r.json")["metrics"] == results(trained[1])["metrics"]


def test_workers_without_memory_are_told_the_way_out(capsys):
    error = RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. Out of shared memory?")
    with pytest.raises(SystemExit) as end, one_line_errors():
        raise error
    printed = capsys.readouterr().err
    assert end.value.code == 2 and printed.count("\n") == 1
    assert "--workers 0" in printed and "--shm-size" in printed
    with pytest.raises(RuntimeError), one_line_errors():  # a bug stays a bug
        raise RuntimeError("shapes cannot be multiplied")


def test_score_maps_of_any_float_type_and_blank_ones(tiny, tmp_path, capsys):
    split = load_splits("tiny", tmp_path / "data", tmp_path / "lists", ("test",))[0]["test"]
    rng = np.random.default_rng(0)
    maps = {image: rng.integers(0, 129, (16, 16)) / 128 for image in split.ids}  # exact in half precision
    expected = evaluate_score_maps(maps.items(), split)
    for kind in (torch.float16, torch.bfloat16, torch.float64):
        tensors = ((image, torch.tensor(value).to(kind)) for image, value in maps.items())
        assert evaluate_score_maps(tensors, split) == expected
    assert "have no box" not in capsys.readouterr().out
    blank = {image: np.zeros((4, 4)) if i < 2 else maps[image] for i, image in enumerate(split.ids)}
    assert evaluate_score_maps(blank.items(), split)["images"] == 9
    assert "2 of 9 maps" in capsys.readouterr().out
    torch.save(torch.zeros(4, 4), tmp_path / "a.npy")
    with pytest.raises(InputError, match="a.npy: a score map must be one 2-D array"):
        list(load_score_maps(tmp_path, Split("test", tmp_path, ["a.jpg"], np.zeros(1, dtype=int))))
