"""The drawn data set: the same bytes every time, exact boxes and masks, every class, never half-drawn."""

from colorsys import hsv_to_rgb

import numpy as np
import pytest
import torch
from conftest import run
from PIL import Image

from bridge_wsol import config
from bridge_wsol.data import Masks, load_masks
from bridge_wsol.datasets import load_splits
from bridge_wsol.reproduce import demo


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(demo, "DEMO_COUNTS", {"train": 16, "val": 16, "test": 16})


def files(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_drawn_twice_the_bytes_are_the_same_and_what_is_whole_is_not_drawn_again(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "DEMO_COUNTS", {"train": 6, "val": 2, "test": 4})
    for place in ("a", "b"):
        demo.draw_demo(tmp_path / place / "data", tmp_path / place / "lists")
    root, lists = tmp_path / "a" / "data" / "demo", tmp_path / "a" / "lists" / "demo"
    image = root / "test" / "00003.png"
    for damaged, drawn_again in ((None, False), (root / demo.STAMP, True), (lists / demo.STAMP, False)):
        image.write_bytes(b"touched")
        if damaged:
            damaged.write_text("demo version 0\n")
            (lists / "val" / "localization.txt").unlink()  # lists are written again, from the masks
        demo.draw_demo(root.parent, lists.parent)
        assert (image.read_bytes() != b"touched") == drawn_again
        image.write_bytes((tmp_path / "b" / image.relative_to(tmp_path / "a")).read_bytes())
        assert files(tmp_path / "a") == files(tmp_path / "b")


def test_boxes_and_masks_are_exact(tmp_path):
    splits, record = load_splits("demo", tmp_path / "data", tmp_path / "lists")
    assert record["num_classes"] == 16 and [len(split) for split in splits.values()] == [16, 16, 16]
    images = [(split, i) for split in splits.values() for i in range(len(split))]
    for split, i in images:
        mask, ignore, _ = load_masks(split.root, split.masks[i], demo.SIZE)
        y, x = np.nonzero(mask)
        assert split.boxes[i].tolist() == [[x.min(), y.min(), x.max(), y.max()]] and not ignore.any()
        head, *_ = load_masks(split.root, Masks([f"parts/{split.ids[i]}"], []), demo.SIZE)
        assert mask[head].all() and 0 < head.sum() < 0.4 * mask.sum() and 0.02 < mask.mean() < 0.75
    assert len({Image.open(split.path(i)).tobytes() for split, i in images}) == 48  # all differ
    assert all({*split.labels} == {*range(16)} for split in splits.values())


def test_the_head_has_the_colour_of_the_species():
    colours = [255 * np.array(hsv_to_rgb(*head)) for head in demo.HEADS.values()]
    for label in range(16):
        bird = demo.draw_bird(np.random.default_rng([7, label]), label)
        colour = np.median(np.asarray(bird.image)[bird.part], axis=0)
        assert np.argmin([np.abs(colour - other).sum() for other in colours]) == label % 8


def test_the_default_run_starts_from_the_shipped_backbone(tmp_path, fails):
    flags = f"--lists {tmp_path}/lists --device cpu --workers 0 --epochs 1 --lr 1e-9 --pictures 0"
    run("train", f"--data-root {tmp_path}/data --out {tmp_path}/run {flags}")
    weights = config.PRESETS["demo", "vgg16"][config.OURS]["weights"]
    trained = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["model"]
    for name, value in torch.load(weights, weights_only=True).items():  # at a rate that moves nothing
        torch.testing.assert_close(trained[name], value.float(), rtol=1e-4, atol=1e-4)
    fails("train", f"--data-root {weights} --out {tmp_path}/other {flags}", weights)  # no place for a folder
