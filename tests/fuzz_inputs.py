"""Damages lists, images, score maps and checkpoints at random.

    python tests/fuzz_inputs.py --cases 1000 --seed 0

A damaged file is either refused, in one line that names it, or equals a plain reading of the same bytes.
"""

import argparse
import io
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
import conftest

from bridge_wsol.data import Masks, Split, load_masks, load_score_maps, open_rgb
from bridge_wsol.datasets import load_splits
from bridge_wsol.evaluation import TrainedRun
from bridge_wsol.utils import InputError

WORDS = ["", " ", "-1", "1e3", "nan", "0x10", "1_0", "９", "9" * 20, "../up.png", "/etc/passwd", "\x00"]
WORDS += ["\ufeff", "a,b", ",", "\u2028", "3.5", "+7", "é", *map(str, range(0, 100, 9))]


def damage(content: bytes, rng: np.random.Generator) -> bytes:
    """Flips bytes of the header or of the whole; or cuts, zeros or inserts a block; or replaces all."""
    kind, start, n = rng.integers(6), int(rng.integers(len(content))), int(rng.integers(1, 64))
    if kind < 2:
        flipped = np.frombuffer(content, np.uint8).copy()
        flipped[rng.integers(0, len(content) if kind else min(len(content), 200), n % 12 + 1)] ^= np.uint8(n)
        return flipped.tobytes()
    ends = (content[start + n :], bytes(n) + content[start + n :], rng.bytes(n) + content[start:])
    return rng.bytes(n) if kind == 5 else content[:start] + ends[kind - 2]


def damage_lines(content: bytes, rng: np.random.Generator) -> bytes:
    """Replaces, lengthens, adds or removes a field of a line or two, or swaps two lines."""
    lines = content.decode().splitlines()
    for i, j in rng.integers(0, len(lines), (rng.integers(1, 3), 2)):
        fields, word, kind = lines[i].split(","), WORDS[rng.integers(len(WORDS))], rng.integers(5)
        k = int(rng.integers(len(fields)))
        fields[k : k + 1] = ([word], [fields[k] + word], [word, fields[k]], [], [fields[k]])[kind]
        lines[i], lines[j] = (lines[j], lines[i]) if kind == 4 else (",".join(fields), lines[j])
    return "\n".join(lines).encode()


def damage_list(root: Path, rng: np.random.Generator) -> Iterator[Path]:
    """As all targets: damages a file, yields the place that a refusal must name, reads and compares."""
    folder, names = root / "lists" / "tiny", ("image_ids", "class_labels", "image_sizes", "localization")
    folder /= ("train", "val", "test")[rng.integers(3)]
    path = folder / f"{names[rng.integers(4)]}.txt"
    good = path.read_bytes()
    path.write_bytes((damage if rng.random() < 0.3 else damage_lines)(good, rng))
    try:
        yield folder  # of a shortened list, the message names another one of the folder
        split = load_splits("tiny", root / "data", root / "lists", images=False)[0][folder.name]
        lines = [(folder / f"{name}.txt").read_text("utf-8-sig").split("\n") for name in names]
        ids, labels, sizes, places = ([x.strip().split(",") for x in rows if x.strip()] for rows in lines)
        assert split.ids == [",".join(fields) for fields in ids]
        assert {image: int(k) for image, k in labels} == dict(zip(split.ids, split.labels.tolist()))
        found = {} if split.sizes is None else dict(zip(split.ids, split.sizes.tolist()))
        assert {image: [int(w), int(h)] for image, w, h in sizes} == found
        boxes = [[split.ids[i], *map(str, box)] for i, of_image in split.boxes.items() for box in of_image]
        assert sorted(boxes) == sorted([x, *map(str, map(int, box))] for x, *box in places if len(box) == 4)
        plain = [fields for fields in places if len(fields) == 3]
        masks = [(split.ids[i], *masks) for i, masks in split.masks.items()]
        by_image = {x: [fields[1:] for fields in plain if fields[0] == x] for x, _, _ in plain}
        assert masks == [(x, [m for m, _ in y], [g for _, g in y if g]) for x, y in by_image.items()]
    finally:
        path.write_bytes(good)


def damage_image(root: Path, rng: np.random.Generator) -> Iterator[Path]:
    kinds = "png RGB,png P,png RGBA,jpeg L,jpeg CMYK,tiff RGB,gif P,bmp RGB,webp RGB".split(",")
    suffix, mode = kinds[rng.integers(len(kinds))].split()
    exif, file, path = Image.Exif(), io.BytesIO(), root / f"damaged.{suffix}"
    exif[0x0112] = int(rng.integers(1, 9))
    image = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).convert(mode)
    image.save(file, suffix, **({"exif": exif} if suffix in ("jpeg", "png", "webp") else {}))
    path.write_bytes(damage(file.getvalue(), rng))
    yield path
    decoded, upright = open_rgb(path), open_rgb(path, upright=True)
    with Image.open(path) as plain:
        assert plain.mode[0] == "I" or np.array_equal(np.asarray(plain.convert("RGB")), np.asarray(decoded))
    assert sorted(upright.size) == sorted(decoded.size)
    assert not load_masks(root, Masks([path.name], [path.name]), 20)[1].any()


def damage_score_map(root: Path, rng: np.random.Generator) -> Iterator[Path]:
    score_map, file, path = rng.random((6, 5)), io.BytesIO(), root / "damaged.npy"
    np.save(file, score_map.astype(("f4", "f8", "f2", ">f4")[rng.integers(4)]))
    path.write_bytes(damage(file.getvalue(), rng))
    yield path
    ((_, found),) = load_score_maps(root, Split("maps", root, ["damaged.jpg"], np.zeros(1, dtype=int)))
    assert found.ndim == 2 and found.size and found.min() >= 0 and found.max() <= 1
    assert np.abs(found - np.load(path, allow_pickle=False)).max() <= 2e-6


def damage_checkpoint(root: Path, rng: np.random.Generator) -> Iterator[Path]:
    """An accepted one equals the undamaged run, bit for bit: a checkpoint has checksums."""
    path = root / "run" / "best.pt"
    good, whole = path.read_bytes(), torch.load(path, weights_only=True)
    if rng.random() < 0.5:
        path.write_bytes(damage(good, rng))
    else:  # a valid file that train.py would not write
        value = (None, 3, "text", [], {}, torch.zeros(2), ...)[rng.integers(7)]
        other = whole | {list(whole)[rng.integers(len(whole))]: value}
        torch.save({key: x for key, x in other.items() if x is not ...}, path)
    try:
        yield path
        run = TrainedRun(root / "run", "best", torch.device("cpu"))
        for key, value in run.method.net.state_dict().items():
            assert torch.equal(value, whole["model"].pop(key))
        assert not whole["model"] and vars(run.config) == whole["config"]
        assert run.choose().levels in (None, whole["val"]["levels"])
    finally:
        path.write_bytes(good)


def fuzz(root: Path, cases: int, seed: int) -> Counter:
    """{(target, "refused" or "accepted"): cases}. root: data, lists, run of the small data set."""
    targets, outcomes = (damage_list, damage_image, damage_score_map, damage_checkpoint), Counter()
    for case in range(cases):
        target, outcome = targets[case % len(targets)], "accepted"
        steps = target(root, np.random.default_rng([seed, case]))
        place = str(next(steps))
        try:
            next(steps, None)
        except Exception as error:
            outcome = "refused"
            if not isinstance(error, InputError) or "\n" in str(error) or place not in str(error):
                raise AssertionError(f"{target.__name__}, --seed {seed}, case {case}: {error!r}") from error
        outcomes[target.__name__, outcome] += 1
    return outcomes


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for flag, default in (("--cases", 1000), ("--seed", 0)):
        parser.add_argument(flag, type=int, default=default)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        conftest.make_tiny(Path(root))
        places = f"--data-root {root}/data --lists {root}/lists --out {root}/run"
        conftest.run("train", f"{conftest.TINY} {places}")
        for (target, outcome), n in sorted(fuzz(Path(root), args.cases, args.seed).items()):
            print(f"{target:<18} {outcome:<9} {n}")
