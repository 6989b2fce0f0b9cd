"""Damages lists, images, score maps and checkpoints at random: python tests/fuzz_inputs.py [CASES [SEED]]

A damaged file is either refused, in one line that names it, or equals a plain reading of the same bytes.
"""

import io
import sys
import tempfile
from collections import Counter
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

WORDS = "-1 1e3 nan 0x10 1_0 ９ 99999999999999999999 ../up.png /etc/passwd , a,b 3.5 +7 é 0 9 18 27 45 63"
WORDS = [word.encode() for word in (*WORDS.split(), *" \n\x00\ufeff\u2028")]


def damage(content, rng, words=()):
    """A block of 0 to 1 or 63 bytes, in the header or anywhere, becomes a word or other bytes."""
    start, limit = rng.integers(len(content) if rng.random() < 0.5 else 99), (2, 64)[rng.integers(2)]
    new = words[rng.integers(len(words))] if len(words) else rng.bytes(rng.integers(limit))
    return content[:start] + new + content[start + rng.integers(limit) :]


def a_list(root, rng):
    """As of every kind: (path, damaged content, what a refusal must name, the comparison)."""
    names = ("image_ids", "class_labels", "image_sizes", "localization")
    folder = root / "lists" / "tiny" / ("train", "val", "test")[rng.integers(3)]
    path = folder / f"{names[rng.integers(4)]}.txt"

    def compare():
        split = load_splits("tiny", root / "data", root / "lists", images=False)[0][folder.name]
        texts = [(folder / f"{name}.txt").read_text("utf-8-sig").split("\n") for name in names]
        *tables, places = ([x.strip().split(",") for x in lines if x.strip()] for lines in texts)
        tables.append([x for x in places if len(x) == 5])
        found = [*zip(split.ids), *zip(split.ids, split.labels.tolist())]
        found += [] if split.sizes is None else zip(split.ids, *split.sizes.T.tolist())
        found += [(split.ids[i], *box.tolist()) for i, boxes in split.boxes.items() for box in boxes]
        assert sorted(found) == sorted((x, *map(int, rest)) for table in tables for x, *rest in table)
        assert split.ids == [image for (image,) in tables[0]]
        masks = {x: [y for y in places if y[0] == x and len(y) == 3] for x, *_ in places}
        masks = {x: ([m for _, m, _ in y], [g for *_, g in y if g]) for x, y in masks.items() if y}
        assert masks == {split.ids[i]: of_image for i, of_image in split.masks.items()}

    good = path.read_bytes()
    words = ((), WORDS, good.splitlines(keepends=True))[rng.integers(3)]
    return path, damage(good, rng, words), folder, compare


def an_image(root, rng):
    kinds = "png RGB,png P,png RGBA,jpeg L,jpeg CMYK,tiff RGB,gif P,bmp RGB,webp RGB".split(",")
    suffix, mode = kinds[rng.integers(len(kinds))].split()
    path, file = root / f"damaged.{suffix}", io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).convert(mode).save(file, suffix)

    def compare():
        found = np.asarray(open_rgb(path))
        with Image.open(path) as plain:
            assert plain.mode[0] == "I" or np.array_equal(np.asarray(plain.convert("RGB")), found)
        assert sorted(open_rgb(path, upright=True).size) == sorted(found.shape[:2])
        assert not load_masks(root, Masks([path.name], [path.name]), 20)[1].any()

    return path, damage(file.getvalue(), rng), path, compare


def a_score_map(root, rng):
    file, path = io.BytesIO(), root / "damaged.npy"
    np.save(file, rng.random((6, 5)).astype(("f4", "f8", "f2", ">f4")[rng.integers(4)]))

    def compare():
        ((_, found),) = load_score_maps(root, Split("maps", root, ["damaged.jpg"], np.zeros(1, dtype=int)))
        assert found.ndim == 2 and found.size and found.min() >= 0 and found.max() <= 1
        assert np.abs(found - np.load(path, allow_pickle=False)).max() <= 2e-6

    return path, damage(file.getvalue(), rng), path, compare


def a_checkpoint(root, rng):
    """An accepted one equals the undamaged run, bit for bit: a checkpoint has checksums."""
    path, file = root / "run" / "best.pt", io.BytesIO()
    whole, value = torch.load(path), (None, 3, "text", [], torch.zeros(2), ...)[rng.integers(6)]
    other = whole | {[*whole][rng.integers(len(whole))]: value}  # train.py does not write such a file
    torch.save({key: x for key, x in other.items() if x is not ...}, file)

    def compare():
        run = TrainedRun(path.parent, "best", torch.device("cpu"))
        torch.testing.assert_close(run.method.net.state_dict(), whole["model"], rtol=0, atol=0)
        assert vars(run.config) == whole["config"] and run.choose().levels in (None, whole["val"]["levels"])

    return path, damage(path.read_bytes(), rng) if rng.random() < 0.5 else file.getvalue(), path, compare


def fuzz(root: Path, cases: int, seed: int) -> Counter:
    """{(kind, "refused" or "accepted"): cases}. root: data, lists, run of the small data set."""
    kinds, outcomes = (a_list, an_image, a_score_map, a_checkpoint), Counter()
    for case in range(cases):
        kind, outcome = kinds[case % len(kinds)], "accepted"
        path, content, place, compare = kind(root, np.random.default_rng([seed, case]))
        good = path.read_bytes() if path.exists() else b""
        path.write_bytes(content)
        try:
            compare()
        except Exception as error:
            outcome = "refused"
            if not isinstance(error, InputError) or "\n" in str(error) or str(place) not in str(error):
                raise AssertionError(f"{kind.__name__}, seed {seed}, case {case}: {error!r}") from error
        path.write_bytes(good)
        outcomes[kind.__name__, outcome] += 1
    return outcomes


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        conftest.make_tiny(Path(folder))
        places = f"--data-root {folder}/data --lists {folder}/lists --out {folder}/run"
        conftest.run("train", f"{conftest.TINY} {places}")
        for outcome, n in fuzz(Path(folder), *map(int, [*sys.argv[1:], 1000, 0][:2])).items():
            print(*outcome, n)
