"""A small data set with a preset, and the real data of the folder that BRIDGE_WSOL_TEST_DATA names."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sys
import tarfile
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(
    0, str(Path(__file__).parents[1])
)  # train.py and evaluate.py are scripts, not modules of the package

import train
from bridge_wsol import optim, utils
from bridge_wsol.utils import one_line_errors

REPOSITORY = Path(__file__).parents[1]
torch.set_num_threads(1)  # the networks here are too small to share


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """No test reads or writes data/, runs/ or data_splits/ of the checkout."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


@pytest.fixture
def tiny_preset(monkeypatch):
    """CUB's VGG16 preset at 1/16 of the width on 64 x 64 images, for a data set `tiny` and for CUB."""
    set_tiny_preset(monkeypatch)


def set_tiny_preset(monkeypatch):
    """Reduced in every way; float32 on every machine, unless a test asks for bf16."""
    monkeypatch.setattr(utils, "has_bf16", lambda device: False)
    monkeypatch.setitem(
        optim.PRESETS,
        ("tiny", "vgg16"),
        optim.PRESETS["CUB", "vgg16"]
        | {
            "epochs": (2, "test"),
            "warm_epochs": (1, "test"),
            "warm_batch_size": (4, "test"),
            "batch_size": (8, "test"),
        },
    )
    for name, value in {"resize_size": 72, "image_size": 64, "width": 1 / 16}.items():
        monkeypatch.setitem(optim.COMMON, name, (value, "test"))


def write_split(folder: Path, **files: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in files.items():
        (folder / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines))


def make_tiny(root: Path) -> tuple[Path, Path]:
    """(data root, splits folder): three classes by colour; a bright square on noise; boxes and masks."""
    data_root, splits = root / "data", root / "splits"
    rng = np.random.default_rng(0)
    for split, n in (("train", 18), ("val", 6), ("test", 9)):
        files: dict[str, list[str]] = {
            "image_ids": [],
            "class_labels": [],
            "image_sizes": [],
            "localization": [],
        }
        for i in range(n):
            width, height = rng.integers(40, 90, 2)
            pixels = rng.integers(0, 90, (height, width, 3), dtype=np.uint8)
            x0, y0 = rng.integers(0, 15, 2)
            x1, y1 = x0 + rng.integers(10, 20), y0 + rng.integers(10, 20)
            pixels[y0 : y1 + 1, x0 : x1 + 1, i % 3] = 255
            mask = np.zeros((height, width), dtype=np.uint8)
            mask[y0 : y1 + 1, x0 : x1 + 1] = 255
            image, mask_path = f"{split}/{i:02d}.png", f"masks/{split}_{i:02d}.png"
            for path, array in ((image, pixels), (mask_path, mask)):
                (data_root / "tiny" / path).parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(data_root / "tiny" / path)
            files["image_ids"].append(image)
            files["class_labels"].append(f"{image},{i % 3}")
            files["image_sizes"].append(f"{image},{width},{height}")
            files["localization"] += [f"{image},{x0},{y0},{x1},{y1}", f"{image},{mask_path},"]
        write_split(splits / "tiny" / split, **files)
    return data_root, splits


@pytest.fixture
def tiny(tmp_path, tiny_preset) -> list[str]:
    """The flags of train.py that name the small data set, on the CPU without workers."""
    data_root, splits = make_tiny(tmp_path)
    return tiny_flags(data_root, splits)


def tiny_flags(data_root: Path, splits: Path) -> list[str]:
    flags = [
        "--dataset",
        "tiny",
        "--data-root",
        data_root,
        "--splits",
        splits,
        "--weights",
        "none",
        "--device",
        "cpu",
        "--workers",
        "0",
    ]
    return [str(flag) for flag in flags]


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory) -> tuple[Path, str]:
    """(folder with data, splits and a finished run, what training printed); never to be written to."""
    root, printed = tmp_path_factory.mktemp("trained"), io.StringIO()
    with pytest.MonkeyPatch.context() as monkeypatch, contextlib.redirect_stdout(printed):
        set_tiny_preset(monkeypatch)
        train.main([*tiny_flags(*make_tiny(root)), "--out", str(root / "run")])
    return root, printed.getvalue()


@pytest.fixture
def trained(trained_once, tiny_preset, tmp_path) -> tuple[list[str], Path]:
    """(the flags, the folder of a finished two-epoch run): a copy of its own for each test."""
    shutil.copytree(trained_once[0], tmp_path, dirs_exist_ok=True)
    return tiny_flags(tmp_path / "data", tmp_path / "splits"), tmp_path / "run"


@pytest.fixture
def fails(capsys):
    """fails(main, argv, *words): main ends with exit code 2 and one line on stderr that has all the words."""

    def check(main, argv, *words):
        with pytest.raises(SystemExit) as end, one_line_errors():
            main([str(argument) for argument in argv])
        error = capsys.readouterr().err
        cause = end.value
        # Frees the data loaders in these frames now: their workers are slow to end when collected as cycles.
        while cause is not None:
            traceback.clear_frames(cause.__traceback__)
            cause = cause.__context__
        assert end.value.code == 2
        assert error.count("\n") == 1 and error.startswith("error: "), error
        for word in words:
            assert str(word) in error, f"{word!r} is not in {error!r}"

    return check


@pytest.fixture(scope="session")
def real_data(tmp_path_factory) -> Path:
    """The ten first classes of CUB-200-2011 and the published split lists, unpacked."""
    source = os.environ.get("BRIDGE_WSOL_TEST_DATA")
    if not source:
        pytest.skip("BRIDGE_WSOL_TEST_DATA names no folder with CUB_200_2011-10.tar and wsol-metadata.tar.xz")
    root = tmp_path_factory.mktemp("real")
    for name in ("CUB_200_2011-10.tar", "wsol-metadata.tar.xz"):
        with tarfile.open(Path(source) / name) as archive:
            archive.extractall(root, filter="data")
    return root
