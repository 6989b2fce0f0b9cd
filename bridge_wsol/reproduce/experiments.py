"""Many runs of train.py: comparison of methods, sweep over a hyperparameter; tables and differences of runs.

    python -m bridge_wsol.reproduce compare --seeds 0 1 2                          every method on the demo
    python -m bridge_wsol.reproduce compare --methods cam cam+ivr bridge:lambda_norm=0 --dataset CUB
    python -m bridge_wsol.reproduce sweep --param lambda_sim --values 0 0.5 1      one run per value and seed
    python -m bridge_wsol.reproduce table RUN [RUN ...]                            tables of existing runs
    python -m bridge_wsol.reproduce difference RUN RUN                             B - A with its interval

A row of a table is METHOD[:NAME=VALUE,...][+NORMALIZATION]: a method, values of its run, a normalization of
its maps. Each row and seed has one run, in RUNS/<row>_seed<N>. Rows that differ only in the normalization or
in a value of the map (calm_map, pas_nwc) share the run. Finished runs are skipped, interrupted runs are
resumed. Flags that these commands do not have are passed to train.py.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from .. import evaluation, metrics
from ..cam import NORMALIZATIONS
from ..config import MACHINE, RUN_VALUES, fingerprint, parse_args, read_config, resolve_config
from ..datasets import SPLITS, download, load_splits
from ..evaluation import Stored, per_image_path, read_results, require_same_images, results_name
from ..methods import METHODS
from ..metrics import PerImage, flat
from ..utils import InputError, flag, read_json, set_quiet, user_path, write_json, write_text
from . import baselines  # noqa: F401  registers the compared systems

SCRIPTS = Path(__file__).parents[2]  # the clone, with train.py and evaluate.py

# The comparison's default rows: the paper's systems and the field's, some with their own normalization.
ROWS = (
    "cam cam+ivr has acol spg adl adl+ivr cutmix eil pas pas+pas calm:calm_map=joint calm:calm_map=joint+log "
    "calm:calm_map=location calm:calm_map=location+log bridge bridge+ivr"
).split()

# Number of a run -> its heading in a table. All are percent except images/s.
METRICS = {
    "top1_loc": "Top-1 Loc",
    "top5_loc": "Top-5 Loc",
    "gt_known_loc": "GT-known Loc (all contours)",
    "gt_known_loc_largest": "GT-known Loc (largest contour)",
    "v2_30": "IoU 30",
    "v2_50": "IoU 50",
    "v2_70": "IoU 70",
    "v2_mean": "MaxBoxAccV2",
    "v2_at_val": "MaxBoxAccV2 at val's thresholds",
    "top1_cls": "Top-1 cls",
    "top5_cls": "Top-5 cls",
    "pxap": "PxAP",
    "piou": "peak IoU",
}
HEADINGS = METRICS | {"images_per_second": "images/s"}
# What a sweep measures, the first that the data set has: PxAP without boxes, Top-1 cls without masks, too.
SWEPT = {"gt_known_loc": "GT-known Loc", "pxap": "PxAP", "top1_cls": "Top-1 cls"}
COMPARED = (
    *("v2_mean", "v2_30", "v2_50", "v2_70", "gt_known_loc", "gt_known_loc_largest", "top1_loc"),
    *("v2_at_val", "pxap", "top1_cls", "images_per_second"),
)
FORMS = (
    ("Localization, %", ("top1_loc", "top5_loc", "gt_known_loc", "gt_known_loc_largest", "top1_cls")),
    ("MaxBoxAccV2, %", ("v2_30", "v2_50", "v2_70", "v2_mean", "v2_at_val")),
    ("PxAP, % (the form of Table A1)", ("pxap", "piou")),
)
# The metric of a table that has a column with its interval over images: the first that the table has.
LEADING, OVER_IMAGES = ("v2_mean", "gt_known_loc", "pxap", "top1_cls"), ", 95 % over images"


@dataclass
class Row:
    """A row of a table: runs that differ in the seed only, and how `compare` and `sweep` make them."""

    label: str
    method: str = ""
    values: dict[str, str] = field(default_factory=dict)  # of the run
    map_options: dict[str, str] = field(default_factory=dict)  # values of the map, for evaluate.py
    normalization: str = "minmax"
    results: list[dict[str, Any]] = field(default_factory=list)  # one results file per seed, and its "path"
    identity: dict[str, Any] = field(default_factory=dict)  # `identity`, what the seeds share
    runs: dict[Any, Path] = field(default_factory=dict)  # by seed

    @property
    def pair(self) -> str:
        """Data set and backbone, as a heading."""
        dataset, arch = self.results[0]["dataset"], self.results[0].get("arch") or ""
        return f"{dataset} {({'vgg16': 'VGG16', 'resnet50': 'ResNet50'}).get(arch, arch)}".strip()

    def numbers(self, key: str) -> list[float]:
        """The values of a key of HEADINGS, one per seed; none where the results have no such number."""
        found = [(result | flat(result["metrics"])).get(key) for result in self.results]
        return [value for value in found if value is not None]

    @property
    def has_files(self) -> bool:
        """Whether each seed has a file per image."""
        return all(per_image_path(result["path"]).exists() for result in self.results)

    @cached_property
    def stored(self) -> dict[Path, Stored]:
        """The files per image of the seeds, which must be of the same images. Raises InputError."""
        files = {of["path"]: evaluation.load_per_image(of["path"], of["metrics"]) for of in self.results}
        require_same_images(files)
        return files

    @property
    def per_image(self) -> tuple[list[PerImage], str]:
        """What is correct image by image, of each seed; and the digest of the split. Raises InputError."""
        files = [*self.stored.values()]
        return [file.per_image for file in files], files[0].digest

    @cached_property
    def intervals(self) -> dict[str, Any]:
        """The interval over images of the seeds' mean, by the keys of METRICS; {} without files per image."""
        if self.has_files:
            return flat(metrics.intervals(*self.per_image))
        return flat(self.results[0].get("intervals", {})) if len(self.results) == 1 else {}

    def folder(self, runs: Path, seed: int) -> Path:
        """The folder of a run. Rows that differ in the map only share it."""
        return runs / "_".join([self.method, *(f"{k}={v}" for k, v in self.values.items()), f"seed{seed}"])

    def arguments(self, args: argparse.Namespace, seed: int) -> list[str]:
        """The flags of train.py for a run."""
        own = {"method": self.method, **self.values, "seed": seed, "out": self.folder(args.runs, seed)}
        return [*args.flags, *(f"{flag(name)}={value}" for name, value in own.items()), "--resume"]


def row_of(name: str) -> Row:
    """The row METHOD[:NAME=VALUE,...][+NORMALIZATION]. Raises InputError for any other name."""
    trained, _, normalization = name.rpartition("+")
    if normalization not in NORMALIZATIONS or not trained:
        trained, normalization = name, "minmax"
    method, colon, values = trained.partition(":")
    # A comma can also belong to a value: has:has_cells=16,32.
    pairs = [value.split("=") for value in re.split(r",(?=[\w-]+=)", values)] if colon else []
    if method not in METHODS or not all(len(x) == 2 and all(x) and x[1][-1] != "," for x in pairs):
        names = f"METHOD is one of {', '.join(METHODS)}, NORMALIZATION one of {', '.join(NORMALIZATIONS)}"
        raise InputError(f"--methods {name}: not METHOD[:NAME=VALUE,...][+NORMALIZATION]; {names}")
    row = Row(name, method, normalization=normalization)
    for key, value in pairs:
        key = key.replace("-", "_")
        if key in ("dataset", "arch", "method", "seed", "out"):
            raise InputError(f"--methods {name}: {key} is not a value of a row: use the flag of the command")
        if key in METHODS[method].map_options:
            METHODS[method].all_values()[key].check(key, value)
            row.map_options[key] = value
        else:
            row.values[key] = value
    return row


# ----------------------------------------------------------------------------------------- train and evaluate


def finish_all(rows: list[Row], args: argparse.Namespace) -> None:
    """Trains and evaluates what is missing, seed by seed, and reads the rows' `results`.

    Mistakes in the flags, run folders of other configurations and missing data are reported before the first
    run starts. Raises InputError, also for a run that fails.
    """
    args.seeds = [*dict.fromkeys(args.seeds)]
    runs = {row.folder(args.runs, seed): row.arguments(args, seed) for seed in args.seeds for row in rows}
    finished = [folder for folder, flags in runs.items() if is_finished(folder, flags)]
    check_lists(finished, len(finished) < len(runs), parse_args(next(iter(runs.values())), ""))
    print(f"{len(finished)} of {len(runs)} runs are finished", flush=True)
    for seed in args.seeds:
        for row in rows:
            row.results.append(finish(row, seed, args))


def is_finished(folder: Path, flags: list[str]) -> bool:
    """Whether the folder has this run with all its epochs and the test results of both checkpoints.

    Raises InputError for a folder with another configuration, or with more epochs than asked for.
    """
    parsed = parse_args(flags, "")
    config, _ = resolve_config(parsed.given)
    if not (folder / "config.json").exists():
        return False
    there = read_config(folder)
    # Where they were asked for, amp and val_every matter, although they may change on --resume.
    free = {*MACHINE, "val_every"} - ({"amp", "val_every"} & parsed.given.keys())
    free |= {"epochs"} if config.epochs > there.get("epochs", 0) else set()
    for name, value in vars(config).items():
        # None and "auto": decided at the start of a run.
        if name not in free and value not in (None, "auto", there.get(name)):
            problem = f"a run with {name} {there.get(name)} instead of {value}"
            raise InputError(f"{folder}: {problem}: choose another --runs, or remove this folder")
    evaluated = all((folder / results_name(which, "test")).exists() for which in ("best", "last"))
    return evaluated and read_results(folder, "last", "test")[1].get("epoch") == config.epochs


def check_lists(finished: list[Path], waiting: bool, args: argparse.Namespace) -> None:
    """Raises InputError where the runs have different lists, and for missing images if runs are `waiting`.

    args: of train.py, for one of the runs. The data set is drawn or downloaded first, as train.py would.
    """
    set_quiet(args.quiet)
    c, lists = resolve_config(args.given)[0], {}
    if waiting and args.download:
        download(c.dataset, Path(c.data_root))
    if waiting or "lists" in args.given:
        names, where = SPLITS if waiting else ("test",), (c.dataset, c.data_root, c.lists)
        record = load_splits(*where, names, c.val_per_class, images=waiting)[1]
        lists[f"--lists {c.lists}"] = record["lists"]
    for folder in finished:
        lists[str(folder)] = read_json(folder / "config.json", "train.py").get("fingerprint", {})
    first = next(iter(lists))
    for other, name in product(lists, SPLITS):
        a, b = (lists[of].get(name) for of in (first, other))
        if a and b and a != b:
            raise InputError(f"{other}: a run with another {name} list than {first} has")


def finish(row: Row, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Trains the run where it is not finished, evaluates it for the row.

    Returns the results, and in them "images_per_second", the median over epochs.
    """
    folder, flags = row.folder(args.runs, seed), row.arguments(args, seed)
    if not is_finished(folder, flags):
        run_script("train.py", flags, folder)
    own: dict[str, Any] = {"percentile": "val"} if row.normalization == "ivr" else {}
    name = results_name(args.checkpoint, "test", row.normalization, own.get("percentile"), row.map_options)
    done, path = read_results(folder, args.checkpoint, "test")[1]["epoch"], folder / name
    if not path.exists() or read_results(path, args.checkpoint, "test")[1]["epoch"] != done:
        parsed = parse_args(flags, "")
        own |= {"checkpoint": args.checkpoint, "normalize": row.normalization, **row.map_options}
        # evaluate.py takes all else from the run.
        taken = parsed.given.keys() & {*MACHINE} - {"pictures", "preset"}
        own |= {name: parsed.given[name] for name in sorted(taken)}
        flags = [f"{flag(name)}={value}" for name, value in own.items()] + ["--quiet"] * parsed.quiet
        run_script("evaluate.py", [str(folder), *flags], folder)
    log = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    speed = float(np.median([json.loads(line)["images_per_second"] for line in log]))
    return read_results(path, args.checkpoint, "test")[1] | {"images_per_second": speed, "path": path}


def run_script(script: str, arguments: list[str], folder: Path) -> None:
    """Runs train.py or evaluate.py for the run in `folder`, as a process. Raises InputError if it fails."""
    print(f"{folder}: {script}", flush=True)
    code = subprocess.run([sys.executable, str(SCRIPTS / script), *arguments], check=False).returncode
    if code:
        problem = "was interrupted" if code == 130 else f"ended with exit code {code}, its message is above"
        fix = f"run the same command again to resume ({script} {' '.join(arguments)})"
        raise InputError(f"{folder}: {script} {problem}: {fix}")


# ----------------------------------------------------------------------------------------------------- tables


def spread(values: Sequence[float] | None, digits: int) -> str:
    """Mean ± sample standard deviation (n - 1) of several values, a single value as it is, – for none."""
    if not values:
        return "–"
    text = f"{np.mean(values):.{digits}f}"
    return f"{text} ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else text


def bracket(bounds: Sequence[float]) -> str:
    """[low, high]."""
    return "[{:.1f}, {:.1f}]".format(*(round(bound, 1) + 0.0 for bound in bounds))  # no -0.0


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table of these cells, with a line end after each row."""
    lines = [[cell.replace("|", r"\|") for cell in row] for row in (head, *rows)]
    return "".join(f"| {' | '.join(row)} |\n" for row in (lines[0], ["---"] * len(head), *lines[1:]))


def table_of(title: str, rows: list[Row], keys: Sequence[str], digits: int, corner: str = "") -> str:
    """A Markdown table under its title: a line per label, a column per key and pair that any row has.

    A column more has the interval over images of the first of LEADING, where there are files per image.
    corner: heading of the labels. Returns "" for a table without numbers.
    """
    cells, counts = {}, set()
    leading = next((x for x in LEADING if x in keys and any(row.numbers(x) for row in rows)), None)
    for row in rows:
        for key in keys:
            if values := row.numbers(key):
                counts.add(len(values))
                cells[row.label, row.pair, HEADINGS[key]] = spread(values, digits)
            if key == leading and values and (bounds := row.intervals.get(key)):
                cells[row.label, row.pair, HEADINGS[key] + OVER_IMAGES] = bracket(bounds)
    names = [HEADINGS[key] + suffix for key in keys for suffix in ("", OVER_IMAGES)]
    pairs, used = dict.fromkeys(row.pair for row in rows), {place[1:] for place in cells}
    columns = [(pair, name) for pair in pairs for name in names if (pair, name) in used]
    head = [f"{pair if len(pairs) > 1 else ''} {name}".strip() for pair, name in columns]
    if counts not in (set(), {1}):
        title += f"; mean ± standard deviation over {' or '.join(map(str, sorted(counts)))} seeds"
    labels = dict.fromkeys(label for label, _, _ in cells)
    lines = [[label, *(cells.get((label, *x), "–") for x in columns)] for label in labels]
    return f"{title}\n\n{markdown([corner, *head], lines)}" if lines else ""


def write_tables(out: Path, text: str, rows: list[Row], keys: Iterable[str]) -> None:
    """Prints the text and writes it to out.md; out.csv has means and sample deviations in full precision."""
    content = io.StringIO()
    lines = csv.writer(content, lineterminator="\n")
    head = ["method", "dataset", "arch", "seeds"]
    lines.writerow([*head, *(f"{key}_{what}" for key in keys for what in ("mean", "deviation"))])
    for row in rows:
        first, seeds = row.results[0], [str(result.get("seed", 0)) for result in row.results]
        line = [row.label, first["dataset"], first.get("arch") or "", " ".join(seeds)]
        for values in map(row.numbers, keys):
            line.append(repr(float(np.mean(values))) if values else "")
            line.append(repr(float(np.std(values, ddof=1))) if len(values) > 1 else "")
        lines.writerow(line)
    print(text)
    for suffix, written in (("md", text), ("csv", content.getvalue())):
        write_text(Path(f"{out}.{suffix}"), written)
        print(f"written to {out}.{suffix}")


def names_of(args: argparse.Namespace) -> list[str]:
    """What to call each of args.runs: --names, or the names of the folders and files."""
    if args.names and len(args.names) != len(args.runs):
        raise InputError(f"--names: {len(args.names)} names for {len(args.runs)} runs: pass one per run")
    return args.names or [run.stem if run.suffix == ".json" else run.resolve().name for run in args.runs]


MEASURED = ("val_thresholds", "metrics", "levels", "thresholds", "curves", "intervals", "precision_at_recall")


def identity(run: Path, result: dict[str, Any] | None = None) -> tuple[dict[str, Any], Any]:
    """(what the seeds of a row share, the seed) of a run folder or results file; result: its content.

    What: the fingerprint of the run, and how its maps were made. Score maps of others have no seed: the path
    of the results stands for it.
    """
    if result is None and run.suffix != ".json":
        values = read_config(run)
        of_run = read_json(run / "config.json", "train.py").get("fingerprint")
        return {"fingerprint": of_run or {"values": fingerprint(values)}}, values["seed"]
    result = result or read_results(run, "", "")[1]
    # These differ between seeds where val chose them.
    chosen = {"epoch"} if result.get("checkpoint") != "last" else set()
    chosen |= {"percentile"} if "chosen_on" in (result.get("percentile") or {}) else set()
    what = {name: value for name, value in result.items() if name not in (*MEASURED, *chosen, "seed")}
    return what, result.get("seed", str(run.resolve()))


def differences(rows: Sequence[Row]) -> list[str]:
    """For each row the values in which any of them differ, as text: of config.json and of `identity`."""
    runs, described = [next(iter(row.runs.values())) for row in rows], []
    for run, row in zip(runs, rows):
        folder = run.parent if run.suffix == ".json" else run
        values = (read_config(folder) if (folder / "config.json").exists() else {}) | row.identity
        described.append({k: v for k, v in values.items() if k not in (*MACHINE, "seed", "fingerprint")})
    names = sorted(set().union(*described))
    names = [name for name in names if len({json.dumps(of.get(name)) for of in described}) > 1]
    if not names:
        return [f"the lists of {run.stem}" for run in runs]
    return [", ".join(f"{name} {of.get(name)}" for name in names) for of in described]


def row_with(rows: dict[str, Row], name: str, run: Path, what: dict[str, Any], seed: Any) -> Row:
    """The row of a run, by its name and `identity`; a new one in `rows` where there is none.

    Raises InputError for a run that the row has already.
    """
    row = rows.setdefault(json.dumps([name, what], sort_keys=True), Row(name, identity=what))
    if (twin := row.runs.setdefault(seed, run)) is not run:
        raise InputError(f"{run}: the same run as {twin}, by the same seed {seed}: give one of the two")
    return row


def check_pools(args: argparse.Namespace) -> None:
    """Raises InputError where runs args.runs with the same name are not seeds of one configuration."""
    rows: dict[str, Row] = {}
    for run, name in zip(args.runs, names_of(args)):
        row_with(rows, name, run, *identity(run))
        first, *others = (row for row in rows.values() if row.label == name)
        if others:
            a, b = differences([first, *others])
            fix = "runs with the same name must differ in the seed only: pass other --names"
            raise InputError(f"{run}: has the name {name}, which has {a} and {b}: {fix}")


def grouped(args: argparse.Namespace) -> list[Row]:
    """The runs args.runs, a row per `identity`. Raises InputError for a run that is given twice.

    Runs with different --names are never in one row. The label is the name, the run's method, or the file's
    name without _seed<N>; where rows of one data set and backbone share it, the values in which they differ
    are added.
    """
    rows: dict[str, Row] = {}
    for run, name in zip(args.runs, names_of(args)):
        path, result = read_results(run, args.checkpoint, args.split, args.normalize)
        what, seed = identity(run, result)
        if args.names:
            what.pop("score_maps", None)  # score maps of one name are seeds
        else:
            name = name.removesuffix(f"_seed{seed}") if run.suffix == ".json" else result["method"]
            what |= {} if "seed" in result else {"file": str(path)}
        row_with(rows, name, run, what, seed).results.append(result | {"path": path})
    alike: dict[tuple[str, str], list[Row]] = {}
    for row in rows.values():
        alike.setdefault((row.label, row.pair), []).append(row)
    for same in alike.values():
        for row, values in zip(same, differences(same)) if len(same) > 1 else ():
            row.label += f" ({values})"
    return [*rows.values()]


def require_same_split(rows: Sequence[Row]) -> None:
    """Raises InputError where the rows of a data set are of other images, or of other boxes.

    By the fingerprint of the split; by the number of images where a results file has none.
    """
    first: dict[str, dict[str, Any]] = {}
    for result in (result for row in rows for result in row.results):
        known = first.setdefault(result["dataset"], result)
        split = result.get("split", "test")
        a, b = (x["fingerprint"].get(split) for x in (known, result))
        differ = a != b if a and b else known["images"] != result["images"]
        if differ and known.get("split", "test") == split:
            counts = f"{result['images']} {split} images, {known['path']} {known['images']}"
            problem = "and they or their boxes are not the same: numbers of one table need the same images"
            raise InputError(f"{result['path']}: has {counts}, {problem}")


# --------------------------------------------------------------------------------------------------- commands


def compare(args: argparse.Namespace) -> None:
    """Trains methods over seeds, tabulates their results.

    Writes RUNS/table.md and .csv.
    """
    rows = [row_of(name) for name in dict.fromkeys(args.methods)]
    finish_all(rows, args)
    title = f"{rows[0].pair}, test, {args.checkpoint} checkpoint, %"
    write_tables(args.runs / "table", table_of(title, rows, COMPARED, 1, "method"), rows, COMPARED)


def sweep(args: argparse.Namespace) -> Path:
    """Trains and evaluates one method at several values of a hyperparameter; returns the file for Fig. A5.

    Writes RUNS/sweep_<param>.json, .md and .csv. The preset's value has the run folder of `compare`, which
    the sweeps over several parameters share. Raises InputError for a parameter without a number to sweep.
    """
    param, parsed = args.param.replace("-", "_"), parse_args(args.flags, "")
    c = resolve_config(parsed.given)[0]
    values, fixed = RUN_VALUES | METHODS[c.method].all_values(), {"seed", *MACHINE, *parsed.given}
    swept = [x for x, of in vars(c).items() if type(of) in (int, float) and values[x].help and x not in fixed]
    if param not in swept:
        problem = f"not a number of {c.dataset} {c.arch} {c.method}, or given as a flag"
        raise InputError(f"--param {args.param}: {problem}: choose one of {', '.join(swept)}")
    preset, rows, args.seeds = getattr(c, param), {}, args.seeds or [c.seed]
    for x in sorted(args.values):
        # As train.py's integer flags take it: 2, not 2.0.
        value = "" if x == preset else f":{param}={repr(x).removesuffix('.0')}"
        rows[x] = row_of(c.method + value)
        rows[x].label = f"{x:g}" if value else f"{x:g} (preset)"
    made = [*rows.values()]
    finish_all(made, args)
    localization = [key for key in ("gt_known_loc", "pxap") if made[0].numbers(key)]
    keys = (*localization[:1], "top1_cls")  # none without boxes and masks
    head = {"dataset": c.dataset, "arch": c.arch, "method": c.method, "param": param, "preset": preset}
    numbers = ({key: row.numbers(key) for key in keys} for row in made)
    found = [{"value": x, "seeds": args.seeds, **of} for x, of in zip(rows, numbers)]
    path = args.runs / f"sweep_{param}.json"
    write_json(path, head | {"checkpoint": args.checkpoint, "values": found})
    title = f"{made[0].pair} {c.method}, test, {args.checkpoint} checkpoint, %"
    write_tables(path.with_suffix(""), table_of(title, made, keys, 2, param), made, keys)
    print(f"written to {path}")
    return path


def read_sweep(path: Path) -> dict[str, Any]:
    """The content of a file of `sweep`, its values ascending, with a "title" and its "metric".

    Raises InputError for any other file.
    """
    made_by = "python -m bridge_wsol.reproduce sweep --param NAME --values X ..."
    content = read_json(path, made_by)
    try:
        rows = sorted(content["values"], key=lambda row: row["value"])
        metric = next(name for name in SWEPT if name in rows[0])
        # ValueError also where one value has more seeds than another.
        numbers = np.array([[content["preset"], row["value"], *row[metric]] for row in rows], dtype=float)
        title, _ = " ".join(content[name] for name in ("dataset", "arch", "method")), content["param"]
        if not np.isfinite(numbers).all():
            raise ValueError("not numbers")
    except (LookupError, TypeError, ValueError, AttributeError, StopIteration) as error:
        raise InputError(f"{path}: not a file of a sweep; it is made by: {made_by}") from error
    return content | {"title": title, "metric": metric, "values": rows}


def table(args: argparse.Namespace) -> None:
    """Tables of existing runs, in the paper's forms.

    The main form and that of Table A1. Runs that differ in the seed only share a row.
    """
    rows = grouped(args)
    require_same_split(rows)
    pairs, splits = {row.pair for row in rows}, {row.results[0].get("split", "test") for row in rows}
    head = ", ".join(name for names in (pairs, splits) for name in names if len(names) == 1)
    head += ". " if head else ""
    tables = [table_of(head + title, rows, keys, args.digits) for title, keys in FORMS]
    write_tables(args.out, "\n".join(filter(None, tables)), rows, METRICS)


def difference(args: argparse.Namespace) -> None:
    """Two runs on the same images: B - A with its interval.

    A and B are rows as in `table` (seeds are one row), A the first. Writes --out as .md and .json. Raises
    InputError for another number of rows, other images, and files per image that are missing.
    """
    rows = grouped(args)
    if len(rows) != 2:
        sides = f"{len(rows)} sides ({', '.join(row.label for row in rows)}) where two are compared"
        raise InputError(f"{sides}: seeds of one configuration are one side; or pass --names, one per run")
    require_same_images(rows[0].stored | rows[1].stored)
    (a, digest), (b, _) = (row.per_image for row in rows)
    found, bounds = map(flat, metrics.difference(a, b, digest))
    keys = [key for key in METRICS if found.get(key) is not None]
    if not keys:
        raise InputError(f"{rows[0].label} and {rows[1].label} have no metric in common")
    one_label = rows[0].label == rows[1].label
    names = [f"{row.label} ({row.pair})" if one_label else row.label for row in rows]
    of_keys, lines, content = {}, [], {"metrics": {}}
    for side, name, row in zip("ab", names, rows):
        content[side] = {"name": name, "results": [*map(str, row.stored)]}
        of_keys[side] = {key: (float(np.mean(row.numbers(key))), row.intervals[key]) for key in keys}
    of_keys["difference"] = {key: (found[key], bounds[key]) for key in keys}
    for key in keys:
        numbers = {side: values[key] for side, values in of_keys.items()}
        content["metrics"][key] = {side: {"value": x, "interval": of} for side, (x, of) in numbers.items()}
        cells = [f"{x:.{args.digits}f} {bracket(of)}" for x, of in numbers.values()]
        lines.append([METRICS[key], *cells])
    gap = f"{names[1]} − {names[0]}"
    text = markdown(["%, [95 % over images]", *names, gap], lines) + "\n"
    if found.get("gt_known_loc") is not None:
        of_a, of_b = map(metrics.localized, (a, b))
        only = {"a": float((of_a * (1 - of_b)).sum()), "b": float((of_b * (1 - of_a)).sum())}
        content["only"], alone = only, [f"{x:.1f}".removesuffix(".0") for x in only.values()]
        text += f"Right at IoU 50 by {names[0]} alone: {alone[0]}, by {names[1]} alone: {alone[1]} "
        text += f"of {int(a[0].boxed.sum())} images.\n\n"
    leading = next(key for key in (*LEADING, *keys) if key in keys)
    low, high = bounds[leading]
    text += f"{gap} is {found[leading]:.1f} {bracket((low, high))} in {METRICS[leading]}: "
    text += f"the 95 % interval {'contains' if low <= 0 <= high else 'excludes'} 0."
    text += f" Means over {len(a)} and {len(b)} seeds." if max(len(a), len(b)) > 1 else ""
    print(text := text + " The intervals do not contain the choice of the seed.\n")
    write_text(Path(f"{args.out}.md"), text)
    write_json(Path(f"{args.out}.json"), content)
    print(f"written to {args.out}.md and .json")


# ----------------------------------------------------------------------------------------------- command line

COMMANDS = {"compare": compare, "sweep": sweep, "table": table, "difference": difference}


def add_flags(sub: argparse.ArgumentParser, command: str) -> None:
    """The flags of one command."""
    add, trains = sub.add_argument, command in ("compare", "sweep")
    default = "last" if command == "compare" else "best"
    add("--checkpoint", choices=("best", "last"), default=default, help=f"default {default}")
    if trains:
        sub.epilog = "Flags not listed here are passed to train.py."
        seeds, runs = ([0, 1, 2], "comparison") if command == "compare" else (None, "sweep")
        text = "default 0 1 2" if seeds else "default: the value of --seed, or 0"
        add("--seeds", nargs="+", type=int, default=seeds, metavar="N", help=text)
        text = f"folder of the runs and tables (default runs/{runs})"
        add("--runs", type=user_path, default=Path("runs", runs), metavar="DIR", help=text)
    if command == "compare":
        text = f"METHOD[:NAME=VALUE,...][+NORMALIZATION] (default: {' '.join(ROWS)})"
        add("--methods", nargs="+", default=ROWS, metavar="ROW", help=text)
    elif command == "sweep":
        add("--param", help="a number of the run's configuration, for example lambda_sim")
        add("--values", nargs="+", type=float, metavar="X", help="values of --param")
    else:
        text = "folders of train.py, files of evaluate.py"
        add("runs", nargs="+", type=user_path, metavar="RUN", help=text)
        add("--names", nargs="+", metavar="NAME", help="names of the runs, in their order (default: methods)")
        add("--split", choices=("test", "val"), default="test", help="split of the results (default test)")
        add("--normalize", choices=NORMALIZATIONS, default="minmax", help="of the maps (default minmax)")
        text = "decimals of the values (default 2)"
        add("--digits", type=int, default=2, choices=range(10), metavar="N", help=text)
        text = f"files to write, without suffix (default figures/{command})"
        add("--out", type=user_path, default=Path("figures", command), metavar="PATH", help=text)


def check(args: argparse.Namespace) -> None:
    """Before compare and sweep train. Raises InputError for flags that they set, and without train.py."""
    if not (SCRIPTS / "train.py").exists():
        raise InputError(f"{SCRIPTS}: no train.py here: work in a clone of the repository (pip install -e .)")
    if args.command == "sweep" and None in (args.param, args.values):
        raise InputError("sweep: needs --param and --values to train, or JSON files to draw")
    own = ["--out", "--resume", *(["--method", "--seed"] if args.command == "compare" else [])]
    if taken := [word for word in args.flags if word.split("=")[0] in own]:
        raise InputError(f"{taken[0]}: the command sets it: use --runs, --methods and --seeds")
