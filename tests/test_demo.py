"""The drawn data set: the same bytes every time, exact boxes and masks, every class, never half-drawn."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train
from bridge_wsol import demo, optim
from bridge_wsol.data import load_masks
from bridge_wsol.datasets import load_splits
from bridge_wsol.utils import InputError


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(demo, "DEMO_COUNTS", {"train": 32, "val": 16, "test": 16})
    monkeypatch.setattr(demo, "PRETRAINING_COUNTS", {"train": 35, "val": 35, "test": 35})


def files(root):
    return {
        str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()
    }


def test_drawn_twice_the_bytes_are_the_same_and_the_second_time_nothing_is_drawn(few, tmp_path):
    for place in ("a", "b"):
        demo.draw_demo(tmp_path / place / "data", tmp_path / place / "splits")
    assert files(tmp_path / "a") == files(tmp_path / "b")
    image = tmp_path / "a" / "data" / "demo" / "test" / "00003.png"
    image.write_bytes(b"touched")
    demo.draw_demo(tmp_path / "a" / "data", tmp_path / "a" / "splits")
    assert image.read_bytes() == b"touched"
    complete = tmp_path / "a" / "data" / "demo" / "complete.txt"
    complete.unlink()  # as if another version had been interrupted
    demo.draw_demo(tmp_path / "a" / "data", tmp_path / "a" / "splits")
    assert files(tmp_path / "a") == files(tmp_path / "b")
    image.write_bytes(b"touched")
    complete.write_text(complete.read_text().rsplit(" by ", 1)[0] + " by another drawer\n")
    demo.draw_demo(tmp_path / "a" / "data", tmp_path / "a" / "splits")
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_an_interrupted_drawing_leaves_nothing_and_that_of_a_faster_process_stays(few, tmp_path, monkeypatch):
    data_root, splits, draw = tmp_path / "data", tmp_path / "splits", demo.draw_demo
    draw_one, drawn = demo._draw_one, []

    def interrupted(order):
        drawn.append(draw_one(order))
        if len(drawn) == 9:
            raise KeyboardInterrupt
        return drawn[-1]

    monkeypatch.setattr(demo, "default_workers", lambda: 0)
    monkeypatch.setattr(demo, "_draw_one", interrupted)
    with pytest.raises(KeyboardInterrupt):
        draw(data_root, splits)
    assert not list(data_root.iterdir()) and not splits.exists()

    def another_is_faster(order):
        if not (data_root / "demo").exists():
            monkeypatch.setattr(demo, "_draw_one", draw_one)
            draw(data_root, splits)
            (data_root / "demo" / "test" / "00003.png").write_bytes(b"of the first")
        return draw_one(order)

    monkeypatch.setattr(demo, "_draw_one", another_is_faster)
    draw(data_root, splits)
    assert (data_root / "demo" / "test" / "00003.png").read_bytes() == b"of the first"
    assert [path.name for path in data_root.iterdir()] == ["demo"]


def test_lists_in_another_folder_are_written_without_touching_the_images(few, tmp_path):
    data_root, first, second = tmp_path / "data", tmp_path / "first", tmp_path / "second"
    demo.draw_demo(data_root, first)
    before = {path: path.stat().st_mtime_ns for path in data_root.rglob("*")}
    demo.draw_demo(data_root, second)
    assert files(first) == files(second)
    assert before == {path: path.stat().st_mtime_ns for path in data_root.rglob("*")}


def test_lists_of_which_a_part_was_written_are_written_again(few, tmp_path, monkeypatch):
    data_root, splits, write = tmp_path / "data", tmp_path / "splits", demo.write_lists

    def killed(folder, lists):
        write(folder, lists)
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "write_lists", killed)
    with pytest.raises(KeyboardInterrupt):
        demo.draw_demo(data_root, splits)
    assert (splits / "demo" / "train").exists() and not (splits / "demo" / "test").exists()
    monkeypatch.setattr(demo, "write_lists", write)
    found, _ = load_splits("demo", data_root, splits, ("train", "val", "test"))
    assert [len(split.boxes) for split in found.values()] == [32, 16, 16]


@pytest.mark.parametrize("dataset, classes", [("demo", 16), ("demo-pretrain", 35)])
def test_boxes_and_masks_are_exact(few, tmp_path, dataset, classes):
    splits, record = load_splits(dataset, tmp_path / "data", tmp_path / "splits", ("train", "val", "test"))
    assert record["num_classes"] == classes
    seen = set()
    for split in splits.values():
        assert set(split.labels.tolist()) == set(range(classes)) and len(split.boxes) == len(
            split.masks
        ) == len(split)
        for i in range(len(split)):
            mask, ignore = load_masks(split.root, split.masks[i], demo.SIZE)
            y, x = np.nonzero(mask)
            assert split.boxes[i].tolist() == [[x.min(), y.min(), x.max(), y.max()]] and not ignore.any()
            assert 0.02 < mask.mean() < 0.75
            part = split.root / "parts" / split.ids[i]
            assert part.exists() == (dataset == "demo")
            if part.exists():
                head = load_masks(split.root, type(split.masks[i])([str(part)], []), demo.SIZE)[0]
                assert head.any() and not (head & ~mask).any() and head.sum() < 0.4 * mask.sum()
            seen.add(split.path(i).read_bytes())
    assert len(seen) == sum(map(len, splits.values()))  # no image of train in test


def test_the_head_is_inside_the_bird_and_has_the_species_colour():
    for species, (hue, saturation, value) in enumerate(demo.HEADS.values()):
        for genus in range(len(demo.GENERA)):
            label = genus * len(demo.HEADS) + species
            bird = demo.draw_bird(np.random.default_rng([7, label]), label)
            assert not (bird.part & ~bird.mask).any()
            assert 0.01 < bird.part.sum() / bird.mask.sum() < 0.4
            colour = np.median(np.asarray(bird.image)[bird.part], axis=0)
            expected = np.array(demo._rgb(hue, saturation, value))
            others = [np.array(demo._rgb(*other)) for other in demo.HEADS.values()]
            distances = [np.abs(colour - other).sum() for other in others]
            assert int(np.argmin(distances)) == species, (species, colour, expected)


def test_a_place_that_cannot_be_written_is_named(few, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file.*cannot be written"):
        demo.draw_demo(tmp_path / "file", tmp_path / "splits")


def test_images_have_the_documented_form(few, tmp_path):
    demo.draw_demo(tmp_path / "data", tmp_path / "splits")
    with Image.open(tmp_path / "data" / "demo" / "val" / "00000.png") as image:
        assert image.size == (demo.SIZE, demo.SIZE) and image.mode == "RGB"


def test_the_default_run_uses_the_shipped_backbone(few, tmp_path):
    weights = Path(optim.DEMO_WEIGHTS)
    assert weights.stat().st_size <= 3_000_000
    flags = [
        "--data-root",
        tmp_path / "data",
        "--splits",
        tmp_path / "splits",
        "--device",
        "cpu",
        "--workers",
        "0",
    ]
    train.main(
        [
            str(flag)
            for flag in [*flags, "--epochs", 2, "--warm-epochs", 1, "--lr", 1e-9, "--out", tmp_path / "run"]
        ]
    )
    config = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert config["dataset"]["value"] == "demo" and config["weights"]["value"] == optim.DEMO_WEIGHTS
    shipped = torch.load(weights, weights_only=True)
    trained = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["model"]
    for name, value in shipped.items():  # at a rate that moves nothing
        torch.testing.assert_close(trained[name], value.float(), rtol=1e-4, atol=1e-4)
    metrics = json.loads((tmp_path / "run" / "results_best_test.json").read_text())["metrics"]
    assert metrics["max_box_acc_v2"]["mean"] > 0 and metrics["pxap"] > 0
