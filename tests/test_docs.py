"""README and docs: the Python blocks run, the links resolve, the numbers are those of the results files.

docs_numbers.txt, beside this file, says of which file each number is.
"""

import fnmatch
import json
import re
import shutil
import sys
from functools import cache

import numpy as np
import pytest
from conftest import REPOSITORY
from PIL import Image

from bridge_wsol import losses, metrics
from bridge_wsol.config import PRESETS, preset_values
from bridge_wsol.methods import METHODS
from bridge_wsol.reproduce.experiments import Row, bracket, spread
from bridge_wsol.utils import read_json

PRESET_COLUMNS = ("lambda_sim lambda_norm lambda_drop", "tau_fg tau_bg", "gamma p", "lr lr_new")
# Packages that only blocks of the docs need: such a block runs where its package is installed.
OTHERS = {"torchcam", "pytorch_grad_cam", "pandas", "tensorboard"}


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


# ------------------------------------------------------------------------------------------------------ links

ALL_PAGES = [REPOSITORY / "README.md", *REPOSITORY.glob("docs/**/*.md"), REPOSITORY / "data_splits/README.md"]


def without_blocks(page):
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


@cache
def anchors(page):
    """The anchors of a page's headings, by GitHub's rules."""
    found = []
    for heading in re.findall(r"^#+ +(.+?) *$", without_blocks(page), re.MULTILINE):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        found.append(slug)
        if (again := found.count(slug) - 1) > 0:
            found[-1] += f"-{again}"
    return found


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_every_link_resolves(page):
    text = re.sub(r"`[^`\n]*`", "", without_blocks(page))
    for link in map("".join, re.findall(r"\]\(([^)\s]+)\)|<img src=\"([^\"]+)", text)):
        if not re.match(r"https?://[\w.-]+(/\S*)?$", link):
            file, _, anchor = link.partition("#")
            target = (page.parent / file).resolve() if file else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


# ---------------------------------------------------------------------------------------------------- numbers

RESULTS = REPOSITORY / "docs/results"
# Heading of a column -> the numbers of a cell, by the names of Row.numbers. Other columns have no results.
COLUMNS = {
    "seeds": [],
    "GT-known Loc": ["gt_known_loc"],
    "largest contour": ["gt_known_loc_largest"],
    "Top-1 Loc": ["top1_loc"],
    "MaxBoxAccV2": ["v2_mean"],
    "over images": ["v2_mean"],
    "− cam": ["v2_mean"],
    "IoU 30 / 70": ["v2_30", "v2_70"],
    "at val's thresholds": ["v2_at_val"],
    "the same at val's thresholds": ["v2_at_val"],
    "PxAP": ["pxap"],
    "peak IoU": ["piou"],
    "precision at a recall of 10 / 30 / 50 / 70 / 90 %": [f"precision_{x}" for x in (10, 30, 50, 70, 90)],
    "Top-1 cls": ["top1_cls"],
    "epochs": ["epoch"],
}


@cache
def row_of(source):
    """The results of CUB10/cam, all seeds, or of CUB10/cam_seed[12]: a row of a table."""
    paths = sorted(RESULTS.glob(f"{source}{'' if '_seed' in source else '_seed?'}.json"))
    row = Row(source, results=[read_json(path, "") | {"path": path} for path in paths])
    for result in row.results:
        result |= {f"precision_{of}": x for of, x in (result.get("precision_at_recall") or {}).items()}
    return row


@cache
def bounds_of(source):
    """The intervals of a row, or of the difference of two, A>B."""
    of_demo = {"demo/cam": "a", "demo/bridge": "b", "demo/cam>demo/bridge": "difference"}
    if source in of_demo:  # its files per image are not kept
        of = read_json(RESULTS / "demo_difference.json", "")["metrics"]
        return {key: value[of_demo[source]]["interval"] for key, value in of.items()}
    if ">" not in source:
        return row_of(source).intervals
    (a, digest), (b, _) = (row_of(side).per_image for side in source.split(">"))
    return metrics.flat(metrics.difference(a, b, digest)[1])


def of_curves(source, key):
    """Claim C.1. width@30: of the mean curve; widths@30: of each seed's curve.

    Of A>B: above@30, equal, below: at how many of the thresholds, in percent, the mean curve of B is; most:
    the most that B is below A.
    """
    what, _, iou = key.partition("@")
    a, *b = (np.array([of["curves"][iou] for of in row_of(x).results]) for x in source.split(">"))
    if what.startswith("width"):
        return [metrics.flatness(curve)[2] for curve in (a if what == "widths" else [a.mean(0)])]
    gap = np.round(b[0].mean(0) - a.mean(0), 9)  # the means of equal counts can differ by 1e-14
    shares = {"above": gap > 0, "equal": gap == 0, "below": gap < 0}
    return [-gap.min() if what == "most" else 100 * shares[what].mean()]


def matching(content, pattern):
    return [content[key] for key in fnmatch.filter(content, pattern)]


def of_file(source, key):
    """The values of a key a/b/c of a JSON file, or of its runs of one name: CUB10_gap:bridge box/S_inside.

    a? is each key of this form.
    """
    file, _, name = source.partition(":")
    content = read_json(RESULTS / f"{file}.json", "")
    found = [run for run in content["runs"] if run["name"] == name] if name else [content]
    for part in key.split("/"):
        found = [x for of in found for x in ([of[int(part)]] if isinstance(of, list) else matching(of, part))]
    return sum((of if isinstance(of, list) else [of] for of in found), [])


def values_of(source, key):
    """The values of a number: one per seed, or one."""
    if "@" in key:
        return of_curves(source, key)
    sides = [row_of(side).numbers(key) for side in source.split(">")]
    if len(sides) == 2:
        return [np.mean(sides[1]) - np.mean(sides[0])]
    return sides[0] or of_file(source, key)


def shown(source, key, form=""):
    """A number as the pages write it.

    form: digits (1), ± with the deviation, d: the deviation alone, [] with the interval.
    """
    digits, values = int((re.findall(r"\d", form) or [1])[0]), values_of(source, key)
    if "±" in form or "d" in form:
        text = spread(values, digits)
        return text.partition("± ")[2] if "d" in form else text
    text = f"{round(float(np.mean(values)), digits) + 0.0:.{digits}f}"
    return f"{text} {bracket(bounds_of(source)[key])}" if "[" in form else text


def shown_cell(source, heading, cell):
    """What a cell of a table must be, in the form (±, interval) that it has."""
    form = "±" if "±" in cell else "[]" if "[" in cell else "0" if heading == "epochs" else ""
    if heading == "seeds":
        return str(len(row_of(source.partition(">")[0]).results))
    if heading == "over images" and source.startswith("demo/"):
        table = (RESULTS / "demo_table.md").read_text(encoding="utf-8")
        return re.search(re.escape(f"| {shown(source, 'v2_mean', '±')} | ") + r"(\[.*?\])", table)[1]
    if heading == "over images":
        return bracket(bounds_of(source)["v2_mean"])
    if heading == "− cam":  # seed 0 of both
        folder, name = source.split("/")
        source = f"{folder}/cam_seed0>{folder}/{name.removesuffix('_seed0')}_seed0"
    return " / ".join(shown(source, key, form) for key in COLUMNS[heading])


class Page:
    """The text of a page (PATH or PATH#Heading), from which each number that was checked is taken out."""

    def __init__(self, page):
        file, _, title = page.partition("#")
        self.text, self.names = re.sub(r"\]\([^)]*\)|<img.*", "]", without_blocks(REPOSITORY / file)), {}
        self.text = self.section(title) if title else self.text

    def section(self, title):
        """The text below a heading."""
        below = self.text.split(f"# {title}\n", 1)[1]
        return re.split(r"^#", below, maxsplit=1, flags=re.MULTILINE)[0]

    def source(self, text):
        """A source, with its short names written out: c>b_seed0."""
        parts = (part.partition("_seed") for part in text.split(">"))
        return ">".join(self.names.get(name, name) + seed + n for name, seed, n in parts)

    def rows(self, title, sources):
        """Checks the tables of results of a section. sources: one per row; - is no result."""
        text, sources = self.section(title) if title else self.text, [*map(self.source, sources)]
        for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
            head, _, *rows = [[x.strip() for x in line.split("|")[1:-1]] for line in table.splitlines()]
            for line, cells in zip(table.splitlines()[2:], rows if {*head} & {*COLUMNS} else []):
                source, kept = sources.pop(0), []
                for heading, cell in zip(head, (cell.replace("*", "") for cell in cells)):
                    if heading not in COLUMNS or source == "-":
                        kept.append(cell)
                    elif cell not in ("", "–"):
                        assert cell == shown_cell(source, heading, cell), (title, cells[0], heading)
                self.text = self.text.replace(line, f"| {' | '.join(kept)} |", 1)
        assert not sources

    def says(self, template):
        """Checks a text of the page, in which {source key form} stands for a number."""
        expected = re.sub(
            r"\{(\S+) (\S+?)(?: (\S+))?\}",
            lambda match: shown(self.source(match[1]), match[2], match[3] or ""),
            template,
        )
        self.text = " ".join(self.text.replace("**", "").split())
        assert expected in self.text, f"not on the page: {expected}"
        self.text = self.text.replace(expected, "", -1 if expected == template else 1)


def numbers_file():
    """{page: [(what, the rest of the line)]} of docs_numbers.txt."""
    found = {}
    for line in (REPOSITORY / "tests/docs_numbers.txt").read_text(encoding="utf-8").splitlines():
        what, _, rest = line.partition(" ")
        if what == "page":
            lines = found.setdefault(rest, [])
        elif what and what != "#":
            lines.append((what, rest))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("page", numbers_file())
def test_every_number_is_that_of_its_file(page):
    """All decimal numbers of a page (or section): of a results file, or listed as no result ("free")."""
    checked = Page(page)
    for what, rest in numbers_file()[page]:
        if what == "name":
            name, source = rest.split(maxsplit=1)
            checked.names[name] = source
        elif what == "rows":
            title, _, sources = rest.rpartition(":")
            checked.rows(title, sources.split())
        else:
            checked.says(rest)
    assert not re.findall(r"(?<![\w.])-?\d+\.\d+", checked.text)


def test_every_page_of_results_is_checked():
    """But for the tables that the program writes: their names have an underscore."""
    pages = {f"docs/results/{path.name}" for path in RESULTS.glob("*.md") if "_" not in path.name}
    assert pages | {"docs/results.md", "README.md#Results"} <= numbers_file().keys()


def test_the_presets_of_the_page_are_those_of_the_program():
    text = (REPOSITORY / "docs" / "training.md").read_text(encoding="utf-8")
    for dataset, arch in (key for key in PRESETS if len(key) == 2):
        x = {name: value for name, (value, _) in preset_values(dataset, arch, "bridge").items()}
        groups = (", ".join(f"{x[name]:g}" for name in names.split()) for names in PRESET_COLUMNS)
        lambdas, taus, dropout, rates = groups
        decay = f"{' '.join(map(str, x['decay_at']))} × {x['decay_factor']:g}"
        schedule = f"{x['epochs']} ({x['warm_epochs']}), {decay}"
        sizes = f"{x['batch_size']} ({x['warm_batch_size']}), {x['stride']}"
        cells = [dataset, arch, lambdas, taus, dropout, x["norm_class"], rates, schedule, sizes]
        assert f"| {' | '.join(cells)} |" in text, cells
