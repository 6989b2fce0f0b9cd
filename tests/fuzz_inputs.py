"""Damages inputs at random. Looks for tracebacks, messages without a file name, and wrong numbers.

    python tests/fuzz_inputs.py --cases 1000 --seed 0

The targets are lists, images, score maps and checkpoints, in turn. A damaged input must be refused, with one
line that names a file, or accepted. An accepted input is compared with a plain reading of the same bytes. The
test suite runs a small number of cases (test_datasets.py).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from conftest import make_tiny

from bridge_wsol import evaluation
from bridge_wsol.data import Masks, decode, load_masks, load_score_map
from bridge_wsol.datasets import load_splits
from bridge_wsol.utils import InputError

WORDS = [
    "",
    " ",
    "-1",
    "1e3",
    "nan",
    "0x10",
    "1_0",
    "９",
    "99999999999999999999",
    "../up.png",
    "/etc/passwd",
    "\x00",
    "\ufeff",
    "a,b",
    ",",
    "\u2028",
    "3.5",
    "+7",
    "é",
]


def damage_bytes(content: bytes, rng: np.random.Generator) -> bytes:
    """Flips, cuts, zeros or inserts bytes, or replaces all of them."""
    data, n = bytearray(content), len(content)
    at = int(rng.integers(max(n, 1)))
    end = min(n, at + int(rng.integers(1, 64)))
    kind = rng.integers(7)
    if kind == 0:
        for i in rng.integers(0, n, rng.integers(1, 12)):
            data[i] ^= int(rng.integers(1, 256))
    elif kind == 1:
        del data[at:]
    elif kind == 2:
        data[at:end] = bytes(end - at)
    elif kind == 3:
        del data[at:end]
    elif kind == 4:
        data[at:at] = rng.bytes(int(rng.integers(1, 64)))
    elif kind == 5:
        data = bytearray(rng.bytes(int(rng.integers(0, 200))))
    else:  # the header
        for i in rng.integers(0, min(n, 200), rng.integers(1, 6)):
            data[i] = int(rng.integers(256))
    return bytes(data)


def damage_lines(text: str, rng: np.random.Generator) -> bytes:
    lines = text.splitlines()
    for _ in range(rng.integers(1, 4)):
        i, j = rng.integers(0, len(lines), 2)
        fields = lines[i].split(",")
        k = int(rng.integers(len(fields)))
        word = WORDS[rng.integers(len(WORDS))]
        kind = rng.integers(7)
        if kind == 0:
            fields[k] = word
        elif kind == 1:
            fields[k] += word
        elif kind == 2:
            fields.insert(k, word)
        elif kind == 3:
            del fields[k]
        elif kind == 4:
            fields = lines[j].split(",")
        elif kind == 5:
            fields[k] = str(rng.integers(-3, 100))
        else:
            fields = []
        lines[i] = ",".join(fields)
    return "\n".join(lines).encode()


def is_refusal(error: InputError, *names: str) -> str:
    line = str(error)
    assert "\n" not in line.strip() and any(name in line for name in names), (
        f"not one line that names {names}: {line!r}"
    )
    return "refused"


def fuzz_split(root: Path, rng: np.random.Generator) -> str:
    """A list of the small data set: an accepted one equals a plain reading of its lines."""
    folder = root / "splits" / "tiny" / ("train", "val", "test")[rng.integers(3)]
    path = folder / f"{('image_ids', 'class_labels', 'image_sizes', 'localization')[rng.integers(4)]}.txt"
    good = path.read_bytes()
    path.write_bytes(damage_bytes(good, rng) if rng.random() < 0.3 else damage_lines(good.decode(), rng))
    try:
        found, _ = load_splits("tiny", root / "data", root / "splits", ("train", "val", "test"))
        split = found[folder.name]
        rows = {
            name: [
                line.strip().split(",")
                for line in (folder / f"{name}.txt").open(encoding="utf-8")
                if line.strip()
            ]
            for name in ("class_labels", "image_sizes", "localization")
        }
        assert split.ids == [
            line.strip() for line in (folder / "image_ids.txt").open(encoding="utf-8") if line.strip()
        ]
        assert {image: int(label) for image, label in rows["class_labels"]} == dict(
            zip(split.ids, split.labels.tolist())
        )
        if rows["image_sizes"]:
            assert {image: [int(w), int(h)] for image, w, h in rows["image_sizes"]} == dict(
                zip(split.ids, split.sizes.tolist())
            )
        boxes: dict[str, list] = {}
        masks: dict[str, list] = {}
        for image, *values in rows["localization"]:
            (boxes if len(values) == 4 else masks).setdefault(image, []).append(
                [int(x) for x in values] if len(values) == 4 else values
            )
        assert boxes == {split.ids[i]: b.tolist() for i, b in split.boxes.items()}
        assert {
            image: ([m for m, _ in lines], [g for _, g in lines if g]) for image, lines in masks.items()
        } == {split.ids[i]: tuple(m) for i, m in split.masks.items()}
        return "accepted"
    except InputError as error:
        # The error of a shortened list may name another file of the list, or a missing image.
        return is_refusal(error, str(folder), str(root / "data" / "tiny"))
    finally:
        path.write_bytes(good)


FORMATS = {"png": {}, "jpg": {"quality": 90}, "gif": {}, "bmp": {}, "tif": {}, "webp": {}}


def fuzz_image(root: Path, rng: np.random.Generator) -> str:
    """An image or mask: an accepted one has the pixels that Pillow reads from these bytes."""
    suffix = list(FORMATS)[rng.integers(len(FORMATS))]
    mode = ("RGB", "L", "P", "RGBA", "CMYK")[rng.integers(5)] if suffix in ("png", "tif", "jpg") else "RGB"
    mode = {"png": {"CMYK": "RGB"}, "jpg": {"P": "L", "RGBA": "RGB"}}.get(suffix, {}).get(mode, mode)
    exif = Image.Exif()
    exif[0x0112] = int(rng.integers(1, 9))
    file = io.BytesIO()
    image = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).convert(mode)
    image.save(
        file,
        {"jpg": "jpeg", "tif": "tiff"}.get(suffix, suffix),
        **({"exif": exif} if suffix in ("jpg", "png", "webp") else {}),
        **FORMATS[suffix],
    )
    path = root / f"damaged.{suffix}"
    path.write_bytes(damage_bytes(file.getvalue(), rng))
    try:
        decoded = decode(path)
        with Image.open(path) as plain:
            if not plain.mode.startswith("I"):
                assert np.array_equal(np.asarray(plain.convert("RGB")), np.asarray(decoded))
        upright = decode(path, upright=True)
        assert sorted(upright.size) == sorted(decoded.size) and upright.mode == "RGB"
        mask, ignore = load_masks(root, Masks([path.name], [path.name]), 20)
        assert mask.shape == (20, 20) and not ignore.any()
        return "accepted"
    except InputError as error:
        return is_refusal(error, str(path))


def fuzz_score_map(root: Path, rng: np.random.Generator) -> str:
    """A score map: an accepted one is in [0, 1] and equals what numpy reads from these bytes."""
    score_map = rng.random((6, 5)).astype(("f4", "f8", "f2", ">f4")[rng.integers(4)])
    kind = rng.integers(8)
    if kind == 0:
        score_map[2, 3] = (np.nan, np.inf, -np.inf, -1e-3, 1.001)[rng.integers(5)]
    elif kind == 1:
        score_map = (
            score_map[0],
            score_map[None],
            score_map[:0],
            score_map.astype("c8"),
            score_map.astype("U4"),
            score_map.astype(object),
            np.array(0.5),
        )[rng.integers(7)]
    file = io.BytesIO()
    np.save(file, score_map, allow_pickle=True)
    path = root / "maps" / "a" / "1.jpg.npy"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(damage_bytes(file.getvalue(), rng) if kind > 1 else file.getvalue())
    try:
        found = load_score_map(root / "maps", "a/1.jpg")
        assert found.ndim == 2 and found.size and found.min() >= 0 and found.max() <= 1
        assert np.array_equal(found, np.load(path, allow_pickle=False).astype(np.float32))
        return "accepted"
    except InputError as error:
        return is_refusal(error, str(path))


def fuzz_checkpoint(root: Path, rng: np.random.Generator) -> str:
    """best.pt: an accepted one equals the undamaged run, bit for bit: a checkpoint has checksums."""
    path = root / "run" / "best.pt"
    good = path.read_bytes()
    if rng.random() < 0.5:
        path.write_bytes(damage_bytes(good, rng))
    else:  # a valid file that train.py would not write
        whole = torch.load(path, weights_only=True)
        name = list(whole)[rng.integers(len(whole))]
        if rng.random() < 0.5:
            del whole[name]
        else:
            whole[name] = (None, 3, "text", [], {}, torch.zeros(2))[rng.integers(6)]
        torch.save(whole, path)
    expected = torch.load(io.BytesIO(good), weights_only=True)
    try:
        model, _, checkpoint = evaluation.load_run(root / "run", "best", torch.device("cpu"))
        state = model.state_dict()
        assert state.keys() == expected["model"].keys() and all(
            torch.equal(state[key], expected["model"][key]) for key in state
        )
        assert (
            checkpoint["config"] == expected["config"]
            and checkpoint["num_classes"] == expected["num_classes"]
        )
        assert checkpoint["val"] is None or checkpoint["val"] == expected["val"]
        return "accepted"
    except InputError as error:
        return is_refusal(error, str(path))
    finally:
        path.write_bytes(good)


TARGETS: list[Callable[[Path, np.random.Generator], str]] = [
    fuzz_split,
    fuzz_image,
    fuzz_score_map,
    fuzz_checkpoint,
]


def run(root: Path, cases: int, seed: int) -> Counter:
    """{(target, "refused" or "accepted"): number of cases}. Raises AssertionError at the first failure.

    root: a folder with data and splits of the small data set, and a finished run.
    """
    outcomes: Counter = Counter()
    for case in range(cases):
        target = TARGETS[case % len(TARGETS)]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                outcomes[target.__name__, target(root, np.random.default_rng([seed, case]))] += 1
        except BaseException as error:
            raise AssertionError(
                f"{target.__name__}, --seed {seed}, case {case}: {type(error).__name__}: {error}"
            ) from error
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    import pytest
    from conftest import set_tiny_preset, tiny_flags

    import train

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as monkeypatch:
        root = Path(folder)
        set_tiny_preset(monkeypatch)
        with contextlib.redirect_stdout(io.StringIO()):
            train.main([*tiny_flags(*make_tiny(root)), "--out", str(root / "run")])
        outcomes = run(root, args.cases, args.seed)
    for (target, outcome), n in sorted(outcomes.items()):
        print(f"{target:<16} {outcome:<9} {n}")


if __name__ == "__main__":
    main()
