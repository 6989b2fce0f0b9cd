"""The drawn data set: the same bytes every time, exact boxes and masks, every class, never half-drawn."""

import json
from colorsys import hsv_to_rgb

import numpy as np
import pytest
import torch
from conftest import results, run
from PIL import Image

from bridge_wsol import config
from bridge_wsol.data import Masks, load_masks
from bridge_wsol.datasets import load_splits
from bridge_wsol.reproduce import demo

WEIGHTS = config.PRESETS["demo", "vgg16"][config.OURS]["weights"]


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(demo, "DEMO_COUNTS", {"train": 32, "val": 16, "test": 16})
    monkeypatch.setattr(demo, "PRETRAINING_COUNTS", {"train": 35})


def files(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_drawn_twice_the_bytes_are_the_same_and_what_is_whole_is_not_drawn_again(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "DEMO_COUNTS", {"train": 4, "val": 4, "test": 4})
    for place in ("a", "b"):
        demo.draw_demo(tmp_path / place / "data", tmp_path / place / "lists")
    assert files(tmp_path / "a") == files(tmp_path / "b")
    root, lists = tmp_path / "a" / "data" / "demo", tmp_path / "a" / "lists" / "demo"
    for damage, drawn_again in (
        (lambda: None, False),
        ((root / demo.STAMP).unlink, True),
        (lambda: (root / demo.STAMP).write_text("demo version 0\n"), True),
    ):
        (root / "test" / "00003.png").write_bytes(b"touched")
        damage()
        demo.draw_demo(root.parent, lists.parent)
        assert (files(tmp_path / "a") == files(tmp_path / "b")) == drawn_again
    # Lists that were written in part are written again, from the masks; the images stay.
    (lists / demo.STAMP).unlink()
    (lists / "val" / "localization.txt").unlink()
    (root / "test" / "00003.png").write_bytes(b"touched")
    demo.draw_demo(root.parent, lists.parent)
    assert files(lists) == files(tmp_path / "b" / "lists" / "demo")
    assert (root / "test" / "00003.png").read_bytes() == b"touched"


def test_boxes_and_masks_are_exact(tmp_path):
    splits, record = load_splits("demo", tmp_path / "data", tmp_path / "lists")
    assert record["num_classes"] == 16 and [len(split) for split in splits.values()] == [32, 16, 16]
    seen = set()
    for split in splits.values():
        assert {*split.labels} == {*range(16)}
        for i, image in enumerate(split.ids):
            mask, ignore = load_masks(split.root, split.masks[i], demo.SIZE)
            y, x = np.nonzero(mask)
            assert split.boxes[i].tolist() == [[x.min(), y.min(), x.max(), y.max()]] and not ignore.any()
            head, _ = load_masks(split.root, Masks([f"parts/{image}"], []), demo.SIZE)
            assert mask[head].all() and 0 < head.sum() < 0.4 * mask.sum() and 0.02 < mask.mean() < 0.75
            with Image.open(split.path(i)) as opened:
                assert opened.size == (demo.SIZE, demo.SIZE) and opened.mode == "RGB"
                seen.add(opened.tobytes())
    assert len(seen) == 64  # no image of train in test


def test_the_head_has_the_colour_of_the_species():
    colours = [255 * np.array(hsv_to_rgb(*head)) for head in demo.HEADS.values()]
    for label in range(16):
        bird = demo.draw_bird(np.random.default_rng([7, label]), label)
        colour = np.median(np.asarray(bird.image)[bird.part], axis=0)
        assert np.argmin([np.abs(colour - other).sum() for other in colours]) == label % 8


def test_the_default_run_starts_from_the_shipped_backbone(tmp_path, fails):
    places = f"--data-root {tmp_path}/data --lists {tmp_path}/lists --out {tmp_path}/run"
    run("train", f"{places} --device cpu --workers 0 --epochs 1 --lr 1e-9 --pictures 0")
    values = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert values["dataset"]["value"] == "demo" and values["weights"]["value"] == WEIGHTS
    trained = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["model"]
    for name, value in torch.load(WEIGHTS, weights_only=True).items():  # at a rate that moves nothing
        torch.testing.assert_close(trained[name], value.float(), rtol=1e-4, atol=1e-4)
    assert results(tmp_path / "run")["metrics"]["pxap"] > 0
    file = tmp_path / "run" / "config.json"  # where no folder can be made
    fails("train", f"--data-root {file} --lists {tmp_path}/lists --out {tmp_path}/other", file)


def test_pretraining_writes_the_backbone_in_the_form_of_the_shipped_one(tmp_path):
    demo.pretrain(tmp_path / "shapes", tmp_path / "new.pth", epochs=1)
    new, shipped = (torch.load(path, weights_only=True) for path in (tmp_path / "new.pth", WEIGHTS))
    assert new.keys() == shipped.keys() and all(value.isfinite().all() for value in new.values())
    assert all((new[name].shape, new[name].dtype) == (x.shape, x.dtype) for name, x in shipped.items())
