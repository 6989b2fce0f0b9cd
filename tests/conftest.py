"""A small data set, and the real data of the folder that BRIDGE_WSOL_TEST_DATA names."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import shlex
import shutil
import tarfile
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bridge_wsol.data import Split
from bridge_wsol.evaluation import save_per_image
from bridge_wsol.metrics import PerImage, intervals
from bridge_wsol.utils import one_line_errors

REPOSITORY = Path(__file__).parents[1]
torch.set_num_threads(1)  # the networks here are too small to share


# CUB's preset at 1/16 of the width on 64 x 64 images; float32 on every machine.
TINY = "--dataset tiny --preset CUB --weights none --device cpu --amp off --width 0.0625"
TINY += " --resize-size 72 --image-size 64 --epochs 2 --warm-epochs 1 --batch-size 8 --warm-batch-size 4"


def run(script: str, flags: str) -> None:
    """The main of a script or of a command of the package, with flags as in a shell."""
    of_package = {"reproduce": "bridge_wsol.reproduce.__main__", "datasets": "bridge_wsol.datasets"}
    importlib.import_module(of_package.get(script, script)).main(shlex.split(str(flags)))


def results(folder: Path, name: str = "results_best_test.json") -> dict:
    return json.loads((folder / name).read_text())


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """No test reads or writes data/, runs/ or data_splits/ of the checkout."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


def write_split(folder: Path, **files: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in files.items():
        (folder / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines))


def make_tiny(root: Path) -> None:
    """root/data and root/lists: three classes by colour; a bright square on noise; boxes and masks."""
    rng = np.random.default_rng(0)
    for split, n in (("train", 18), ("val", 6), ("test", 9)):
        names = ("image_ids", "class_labels", "image_sizes", "localization")
        files: dict[str, list[str]] = {name: [] for name in names}
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
                (root / "data" / "tiny" / path).parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(root / "data" / "tiny" / path)
            files["image_ids"].append(image)
            files["class_labels"].append(f"{image},{i % 3}")
            files["image_sizes"].append(f"{image},{width},{height}")
            files["localization"] += [f"{image},{x0},{y0},{x1},{y1}", f"{image},{mask_path},"]
        write_split(root / "lists" / "tiny" / split, **files)


def make_folder(root: Path, images: int = 12, places: tuple[str, ...] = ("",)) -> Path:
    """A folder of three classes in each of the places: a bright patch of channel k on noise for class k."""
    rng = np.random.default_rng(0)
    for folder, k in ((root / place / f"class {k}", k) for place in places for k in range(3)):
        folder.mkdir(parents=True)
        for i in range(images):
            pixels = rng.integers(0, 90, (40, 60, 3), dtype=np.uint8)
            pixels[5:30, 5:30, k] = 255
            Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


@pytest.fixture
def tiny(tmp_path) -> str:
    """The flags of train.py for the small data set in tmp_path/data and tmp_path/lists."""
    make_tiny(tmp_path)
    return f"{TINY} --data-root {tmp_path}/data --lists {tmp_path}/lists"


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory) -> tuple[Path, str]:
    """(folder with data, lists and a finished run, what training printed); never to be written to."""
    root, printed = tmp_path_factory.mktemp("trained"), io.StringIO()
    make_tiny(root)
    with contextlib.redirect_stdout(printed):
        run("train", f"{TINY} --data-root {root}/data --lists {root}/lists --out {root}/run")
    return root, printed.getvalue()


@pytest.fixture
def trained(trained_once, tmp_path) -> tuple[str, Path]:
    """(the flags, the folder of a finished two-epoch run): a copy of its own for each test.

    The copy's data and lists are those in tmp_path only if the flags say so.
    """
    shutil.copytree(trained_once[0], tmp_path, dirs_exist_ok=True)
    return f"{TINY} --data-root {tmp_path}/data --lists {tmp_path}/lists", tmp_path / "run"


@pytest.fixture
def where(tmp_path) -> str:
    """The flags of evaluate.py for the small data set."""
    return f"--data-root {tmp_path}/data --lists {tmp_path}/lists"


@pytest.fixture
def fails(capsys):
    """fails(script, flags, *words): ends with exit code 2 and one line on stderr that has all the words."""

    def check(script, flags, *words):
        with pytest.raises(SystemExit) as end, one_line_errors():
            run(script, flags)
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
    """The ten first classes of CUB-200-2011, unpacked."""
    source = os.environ.get("BRIDGE_WSOL_TEST_DATA")
    if not source:
        pytest.skip("BRIDGE_WSOL_TEST_DATA names no folder with CUB_200_2011-10.tar")
    root = tmp_path_factory.mktemp("real")
    with tarfile.open(Path(source) / "CUB_200_2011-10.tar") as archive:
        # Python before 3.10.12 and 3.11.4 has no filters.
        archive.extractall(root, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return root


def write_results(path, per_image, split, **head):
    """A results file and its file per image."""
    head = {"dataset": "D", "arch": "vgg16", "method": "cam", "split": "test", **head}
    found = per_image.result() | {"intervals": intervals([per_image], split.digest())}
    path.write_text(json.dumps(head | found))
    save_per_image(path.with_suffix(".npz"), per_image, split)


def split_of(n, boxes=None, sizes=(32, 32)):
    boxes = {i: np.array([[0, 0, 9, 9]]) for i in range(n)} if boxes is None else boxes
    labels = np.zeros(n, dtype=np.int64)
    return Split("D", Path(), [f"{i}.jpg" for i in range(n)], labels, np.array([sizes] * n), boxes)


def correct_at(*rows, boxed=None):
    """Images with a correct box at level 10 where the row says so, for all IoUs; not of the largest."""
    found = np.array(rows, dtype=bool)
    correct = np.zeros((len(found), 4, 255), dtype=bool)
    correct[:, :3, 10] = found[:, None]
    boxed = np.ones(len(found), dtype=bool) if boxed is None else np.array(boxed, dtype=bool)
    return PerImage(boxed, ~boxed & False, correct)


def load(path):
    return torch.load(path, weights_only=True)


def lines_of(folder):
    """log.jsonl without what the clock decides."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("images_per_second", "seconds")} for line in lines]


def content(path):
    """The parts of a checkpoint that do not depend on where and on how many workers it was made, as text."""
    parts = load(path)
    names = ("model", "optimizer", "random_states", "epoch", "best", "val", "fingerprint")
    return {name: json.dumps(parts[name], default=torch.Tensor.tolist) for name in names}


def same_run(a, b):
    assert lines_of(a) == lines_of(b)
    for which in ("best", "last"):
        assert results(a, f"results_{which}_test.json") == results(b, f"results_{which}_test.json")
        assert content(a / f"{which}.pt") == content(b / f"{which}.pt")
    return True
