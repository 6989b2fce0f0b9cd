"""The Python blocks of README and docs run as they stand."""

import json
import re
import shutil
import sys

import pytest
from conftest import REPOSITORY
from PIL import Image

from bridge_wsol import losses
from bridge_wsol.methods import METHODS

# Packages that only blocks of the docs need: such a block runs where its package is installed.
OTHERS = {"torchcam", "pytorch_grad_cam", "pandas", "tensorboard", "matplotlib"}


def blocks(page):
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


PAGES = [str(path.relative_to(REPOSITORY)) for path in sorted(REPOSITORY.glob("docs/*.md")) if blocks(path)]


def run_blocks(page, folder, monkeypatch):
    """The names that the blocks of a page leave, run one after another in `folder`."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    shutil.copy(losses.__file__, folder)  # the pages say: copy it
    registered, names = dict(METHODS), {"__name__": "page"}
    try:
        for block in blocks(page):
            try:
                exec(compile(block, page, "exec"), names)
            except ModuleNotFoundError as error:
                assert error.name in OTHERS
    finally:
        sys.modules.pop("losses", None)
        METHODS.clear()
        METHODS.update(registered)
    return names


@pytest.fixture
def folder(trained_once, tmp_path):
    """A working folder with a photo and the runs that the pages name; the lists are the clone's."""
    for name in ("demo_vgg16_cam", "my_photos_vgg16_bridge"):
        shutil.copytree(trained_once[0] / "run", tmp_path / "runs" / name)
    Image.linear_gradient("L").convert("RGB").save(tmp_path / "photo.jpg")
    coco = {"images": [{"id": 7, "file_name": "ants/1.jpg"}]}
    coco["annotations"] = [{"image_id": 7, "bbox": [2.0, 3.0, 1.0, 5.0]}]
    (tmp_path / "annotations.json").write_text(json.dumps(coco))
    return tmp_path


@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page_run(page, folder, monkeypatch):
    assert len(run_blocks(page, folder, monkeypatch)) > 2
    if page == "docs/data.md":  # a box one pixel wide
        assert (folder / "localization.txt").read_text() == "ants/1.jpg,2,3,2,7\n"


@pytest.mark.slow
def test_readme_runs_and_the_centre_baseline_has_its_number(folder, monkeypatch):
    """Expected: computed from CUB's lists by another program."""
    found = run_blocks("README.md", folder, monkeypatch)["result"]["metrics"]["max_box_acc_v2"]
    expected = {"30": 93.91, "50": 59.60, "70": 17.00, "mean": 56.83}
    assert found == pytest.approx(expected, abs=0.006)
