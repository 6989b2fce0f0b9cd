"""Many runs of train.py: the comparison of methods, the sweep over a hyperparameter (Fig. A5), and tables.

    python -m bridge_wsol.experiments compare --seeds 0 1 2                         every method on the demo
    python -m bridge_wsol.experiments compare --methods cam cam+ivr bridge:lambda_norm=0 --dataset CUB
    python -m bridge_wsol.experiments sweep --param lambda_sim --values 0 0.5 1     one run per value and seed
    python -m bridge_wsol.experiments table RUN [RUN ...]                           tables of existing runs

A row of a table is METHOD[:NAME=VALUE,...][+NORMALIZATION]: a method, values of its run, a normalization of
its maps. Each row and seed has one run, in RUNS/<row>_seed<N>. Rows that differ only in the normalization or
in a value of the map (calm_map, pas_nwc) share the run. Finished runs are skipped, interrupted runs are
resumed. Flags that this program does not have are passed to train.py.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import os
import re
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch

from .baselines import METHODS
from .cam import NORMALIZATIONS
from .datasets import download, is_folder, load_splits
from .drawing import with_suffix
from .evaluation import names_of, read_config, read_json, read_log, read_results
from .optim import (
    CHOICES,
    DEFAULTS,
    FREE_ON_RESUME,
    MACHINE,
    PAPER_FLAGS,
    RUN_FLAGS,
    is_unused,
    method_values,
    parse_args,
    resolve_config,
)
from .utils import InputError, Parser, Progress, Stopped, one_line_errors, write_json, write_text, writing

# The comparison's default rows: the paper's systems and the field's, some with their own normalization.
ROWS = (
    "cam cam+ivr has acol spg adl adl+ivr cutmix eil pas pas+pas calm:calm_map=joint calm:calm_map=joint+log "
    "calm:calm_map=location calm:calm_map=location+log bridge bridge+ivr"
).split()

# Key of a number of a run -> its heading in a table. All are percent except images/s.
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
}
HEADINGS = METRICS | {"images_per_second": "images/s"}
# What a sweep measures, the first that the data set has: PxAP without boxes, Top-1 cls without masks, too.
SWEPT = {"gt_known_loc": "GT-known Loc", "pxap": "PxAP", "top1_cls": "Top-1 cls"}

COMPARED = (
    *("v2_mean", "v2_30", "v2_50", "v2_70", "gt_known_loc_largest", "top1_loc", "v2_at_val"),
    *("pxap", "top1_cls", "images_per_second"),
)
FORMS = (
    ("Localization, %", ("top1_loc", "top5_loc", "gt_known_loc", "gt_known_loc_largest", "top1_cls")),
    ("MaxBoxAccV2, %", ("v2_30", "v2_50", "v2_70", "v2_mean", "v2_at_val")),
    ("PxAP, % (the form of Table A1)", ("pxap",)),
)


# ---------------------------------------------------------------------------------------------- rows and runs


class Row(NamedTuple):
    """One row of a comparison or sweep."""

    method: str
    flags: list[str]  # of train.py, for this row only
    of_map: dict[str, str]  # values of the map: flags of evaluate.py
    normalization: str
    run: str  # the run folders are <run>_seed<N>


class Run(NamedTuple):
    """One run of train.py, and the rows for which it is evaluated."""

    folder: Path
    seed: int
    arguments: list[str]  # of train.py
    given: argparse.Namespace  # the same, parsed
    config: SimpleNamespace  # the resolved configuration
    rows: list[Row]


def row_of(name: str) -> Row:
    """The row METHOD[:NAME=VALUE,...][+NORMALIZATION]. Raises InputError for any other name."""
    trained, _, normalization = name.rpartition("+")
    if normalization not in NORMALIZATIONS or not trained:
        trained, normalization = name, "minmax"
    method, colon, values = trained.partition(":")
    # A comma can also belong to a value: has:has_cells=16,32.
    pairs = [value.split("=") for value in re.split(r",(?=[\w-]+=)", values)] if colon else []
    complete = all(len(pair) == 2 and all(pair) and pair[1][-1] != "," for pair in pairs)
    if method not in METHODS or not complete:
        raise InputError(
            f"--methods {name}: not METHOD[:NAME=VALUE,...][+NORMALIZATION]; METHOD is one of "
            f"{', '.join(METHODS)}, NORMALIZATION one of {', '.join(NORMALIZATIONS)}"
        )
    pairs = [(key.replace("-", "_"), value) for key, value in pairs]
    for key, _ in pairs:
        if key in (*CHOICES, "seed", "out"):
            raise InputError(f"--methods {name}: {key} is not a value of a row: use the flag of the command")
    of_map = {key: value for key, value in pairs if key in METHODS[method].of_map}
    trained = [(key, value) for key, value in pairs if key not in of_map]
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in trained]
    run = "_".join([method, *(f"{key}={value}" for key, value in trained)])
    return Row(method, flags, of_map, normalization, run)


def run_folder(runs: Path, row: Row, seed: int) -> Path:
    """The folder of the run of a row and seed. Rows that differ in the map only share it."""
    return runs / f"{row.run}_seed{seed}"


def plan(rows: Iterable[Row], args: argparse.Namespace) -> list[Run]:
    """The runs of these rows with each of args.seeds, all rows of a seed before the next seed.

    Checks flags, existing run folders and the lists of the data set, so that mistakes are reported before the
    first run starts. Raises InputError.
    """
    if len(set(args.seeds)) < len(args.seeds):
        raise InputError(f"--seeds {' '.join(map(str, args.seeds))}: a seed is repeated: give each seed once")
    runs: dict[Path, Run] = {}
    for seed in args.seeds:
        for row in rows:
            folder = run_folder(args.runs, row, seed)
            if folder not in runs:
                own = [f"--method={row.method}", *row.flags, f"--seed={seed}", f"--out={folder}", "--resume"]
                given = parse_args([*args.flags, *own], "", METHODS)
                config, _ = resolve_config(given, None, METHODS)
                runs[folder] = Run(folder, seed, [*args.flags, *own], given, config, [])
            # The class checks the method's own values.
            METHODS[row.method](SimpleNamespace(**vars(runs[folder].config) | row.of_map))
            runs[folder].rows.append(row)
    waiting = [run for run in runs.values() if not is_finished(run)]
    check_lists([run for run in runs.values() if run not in waiting])
    if waiting:
        script_path("train.py")
        check_data(waiting[0])
    print(f"{len(runs) - len(waiting)} of {len(runs)} runs are finished", flush=True)
    return list(runs.values())


def check_data(run: Run) -> None:
    """Reads the lists of the run's data set. Draws or downloads the data set first, as train.py would."""
    config, Progress.quiet = run.config, run.given.quiet
    if run.given.download:
        download(config.dataset, Path(config.data_root))
    names = ("train", "val", "test")
    load_splits(config.dataset, Path(config.data_root), Path(config.splits), names, config.val_per_class)


def check_lists(finished: list[Run]) -> None:
    """Raises InputError where --splits has another test list than the runs that are finished."""
    if not finished or "splits" not in finished[0].given or is_folder(finished[0].config.dataset):
        return
    config = finished[0].config
    where = config.dataset, Path(config.data_root), Path(config.splits)
    now = load_splits(*where, ("test",), config.val_per_class, lists_only=True)[1]["digests"]["test"]
    for run in finished:
        then = read_json(run.folder / "config.json", "train.py").get("data", {}).get("digests", {})
        if then.get("test", now) != now:  # older runs have none
            raise InputError(f"{run.folder}: a run with another test list than --splits {config.splits} has")


def is_finished(run: Run) -> bool:
    """Whether the folder has this run with all its epochs and the test results of both checkpoints.

    Raises InputError for a folder with another configuration, or with more epochs than asked for.
    """
    folder, fix = run.folder, "choose another --runs, or remove this folder"
    if not (folder / "config.json").exists():
        return False
    there = DEFAULTS | read_config(folder)  # an older run has no value of a newer flag
    given = {"amp", "val_every"} & set(run.given.given)
    for name, value in vars(run.config).items():
        if name in FREE_ON_RESUME and name not in given:
            continue
        if there.get(name) != json.loads(json.dumps(value)):
            raise InputError(f"{folder}: a run with {name} {there.get(name)} instead of {value}: {fix}")
    evaluated = all((folder / f"results_{which}_test.json").exists() for which in ("best", "last"))
    in_results = read_results(folder, "last", "test")[1].get("epoch", 0) if evaluated else 0
    trained = max([in_results, *(entry["epoch"] for entry in logged(folder))])
    if trained > run.config.epochs:
        raise InputError(f"{folder}: a run of {trained} epochs instead of {run.config.epochs}: {fix}")
    return in_results == run.config.epochs


def logged(folder: Path) -> list[dict[str, Any]]:
    """One entry per finished epoch of a run; none where the run has no log yet."""
    return read_log(folder, sys.maxsize) if (folder / "log.jsonl").exists() else []


# ----------------------------------------------------------------------------------------- train and evaluate


class Slot(NamedTuple):
    """The share of the machine that one of the parallel jobs has."""

    device: list[str]  # the flag --device, where a job has its own GPU
    environment: dict[str, str]
    log: bool  # output goes to RUNS/<run>.log instead of the terminal
    stop: threading.Event  # set by the first failure


def slots(jobs: int, stop: threading.Event, one_device: bool) -> list[Slot]:
    """A slot per job. Several jobs share the CPU's cores and have a GPU each, except with one_device."""
    if jobs == 1:
        return [Slot([], dict(os.environ), False, stop)]
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
    gpus = torch.cuda.device_count() if torch.cuda.is_available() and not one_device else 0
    devices = [["--device", f"cuda:{i % gpus}"] if gpus else [] for i in range(jobs)]
    return [Slot(device, threads | os.environ, True, stop) for device in devices]


def finish_all(runs: list[Run], args: argparse.Namespace) -> Iterator[list[int]]:
    """Trains and evaluates what is missing, args.jobs runs at a time. Yields the seeds that are finished.

    Raises the error of the first run that fails. The other runs are stopped then; train.py saves their state.
    """
    stop, free = threading.Event(), SimpleQueue()
    for slot in slots(args.jobs, stop, "device" in runs[0].given):
        free.put(slot)
    failures: list[Exception] = []

    def work(run: Run) -> bool:
        slot = free.get()
        try:
            if not failures:
                finish(run, args.checkpoint, slot)
        except Stopped as stopped:
            # Ctrl-C reaches every train.py. A second signal would end the others before they have saved.
            failures.append(stopped)
        except InputError as error:
            failures.append(error)
            stop.set()
        finally:
            free.put(slot)
        return not failures

    pool = ThreadPoolExecutor(args.jobs)
    try:
        futures = [(run.seed, pool.submit(work, run)) for run in runs]
        for i, seed in enumerate(args.seeds, 1):
            finished = [future.result() for run_seed, future in futures if run_seed == seed]
            if not all(finished):
                break
            yield args.seeds[:i]
    finally:
        pool.shutdown(cancel_futures=True)
    if failures:
        raise failures[0]


def finish(run: Run, checkpoint: str, slot: Slot) -> None:
    """Trains the run where it is not finished, and evaluates it for its rows."""
    if not is_finished(run):
        run_script("train.py", [*run.arguments, *slot.device], run.folder, slot)
    done = read_results(run.folder, checkpoint, "test")[1].get("epoch")
    # evaluate.py takes all else from the run.
    machine = {name: vars(run.given).get(name) for name in ("workers", "device", "data_root", "splits")}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in machine.items() if value is not None]
    flags += ["--quiet"] * run.given.quiet
    for row in run.rows:
        path = results_path(run.folder, checkpoint, row)
        if path.exists() and read_results(path, checkpoint, "test")[1].get("epoch") == done:
            continue
        own = ["--checkpoint", checkpoint, "--normalize", row.normalization]
        own += ["--percentile", "val"] if row.normalization == "ivr" else []
        own += [f"--{name.replace('_', '-')}={value}" for name, value in row.of_map.items()]
        run_script("evaluate.py", [str(run.folder), *own, *flags, *slot.device], run.folder, slot)


def results_path(folder: Path, checkpoint: str, row: Row) -> Path:
    """The file of a run's test results for a row; for ivr at the percentile chosen on val."""
    suffix = {"minmax": "", "ivr": "_ivr_val"}.get(row.normalization, f"_{row.normalization}")
    suffix += "".join(f"_{name}={value}" for name, value in row.of_map.items())
    return folder / f"results_{checkpoint}_test{suffix}.json"


def script_path(script: str) -> Path:
    """The path of train.py or evaluate.py. Raises InputError where only the package is installed."""
    path = Path(__file__).parents[1] / script
    if not path.exists():
        raise InputError(f"{path}: no such file: work in a clone of the repository (pip install -e .)")
    return path


def run_script(script: str, arguments: list[str], folder: Path, slot: Slot) -> None:
    """Runs train.py or evaluate.py for the run in `folder`, as a process. slot.stop ends it with SIGTERM.

    Raises InputError where the script fails, Stopped where it was interrupted.
    """
    command = [sys.executable, str(script_path(script)), *arguments]
    log = folder.with_name(f"{folder.name}.log")
    # One write: print() alone would write the end of the line apart, after another job's line.
    print(f"{folder}: {script}{f', output in {log}' * slot.log}\n", end="", flush=True)
    with writing(log):
        log.parent.mkdir(parents=True, exist_ok=True)
        output = log.open("a", encoding="utf-8") if slot.log else None
    try:
        with subprocess.Popen(
            command, env=slot.environment, stdout=output, stderr=output and subprocess.STDOUT
        ) as process:
            while process.poll() is None and not slot.stop.wait(0.1):
                pass
            if process.poll() is None:
                process.terminate()
    finally:
        if output:
            output.close()
    if process.returncode == 130:
        raise Stopped(f"{folder}: {script} was interrupted; run the same command again to resume")
    if process.returncode:
        where = f"in {log}" if slot.log else "above"
        raise InputError(
            f"{folder}: {script} ended with exit code {process.returncode}, its message is {where}: fix the "
            f"cause and run the same command again to resume ({script} {' '.join(arguments)})"
        )


# -------------------------------------------------------------------------------------------- numbers of runs


class Group(NamedTuple):
    """Runs that differ in the seed only."""

    label: str
    dataset: str
    arch: str | None
    split: str
    seeds: list[int]
    metrics: dict[str, list[float]]  # keys of HEADINGS, as far as the results have them; one value per seed

    @property
    def pair(self) -> str:
        """Data set and backbone, as a heading."""
        arch = {"vgg16": "VGG16", "resnet50": "ResNet50", None: ""}.get(self.arch, self.arch)
        return f"{self.dataset} {arch}".strip()


def numbers(result: dict[str, Any]) -> dict[str, float]:
    """The numbers of a results file under the keys of METRICS, in percent, as far as the file has them."""
    metrics = result["metrics"]
    found = metrics | {f"v2_{key}": value for key, value in (metrics["max_box_acc_v2"] or {}).items()}
    found["v2_at_val"] = (metrics.get("max_box_acc_v2_at_val_threshold") or {}).get("mean")
    return {key: found[key] for key in METRICS if found.get(key) is not None}


def make_group(label: str, result: dict[str, Any], seeds: list[int], runs: list[dict[str, float]]) -> Group:
    """A Group of these `numbers`, one per seed. result: the results file of one of the runs."""
    metrics = {key: [run[key] for run in runs if key in run] for key in HEADINGS}
    found = {key: values for key, values in metrics.items() if values}
    return Group(label, result["dataset"], result.get("arch"), result.get("split", "test"), seeds, found)


def row_group(label: str, row: Row, seeds: list[int], args: argparse.Namespace) -> Group:
    """The finished runs of a row."""
    runs = []
    for seed in seeds:
        folder = run_folder(args.runs, row, seed)
        path = results_path(folder, args.checkpoint, row)
        result = read_results(path, args.checkpoint, "test")[1]
        runs.append(numbers(result))
        # An epoch that was interrupted after its last step has 0.
        if speeds := [entry["images_per_second"] for entry in logged(folder) if entry["images_per_second"]]:
            runs[-1]["images_per_second"] = statistics.median(speeds)
    return make_group(label, result, seeds, runs)


class Entry(NamedTuple):
    """One of the runs of the table command."""

    run: Path
    name: str
    seed: int
    config: dict[str, Any]  # what can change a result, without the seed
    result: dict[str, Any]  # the results file

    @property
    def kind(self) -> tuple[Any, ...]:
        """Name, data set and backbone. Labels distinguish the groups that share them."""
        return self.name, self.result.get("dataset"), self.result.get("arch")


def settings(run: Path) -> dict[str, Any]:
    """The values of a run, seed included, that can change its results. Newer flags have their defaults."""
    values = DEFAULTS | read_config(run)
    return {name: value for name, value in values.items() if name not in MACHINE}


def file_settings(result: dict[str, Any]) -> dict[str, Any]:
    """What a results file has of its run, without the seed and without what differs between seeds."""
    chosen = {"epoch"} if result.get("checkpoint") != "last" else set()
    chosen |= {"percentile"} if "chosen_on" in (result.get("percentile") or {}) else set()
    numbers = {"seed", "metrics", "thresholds", "curves"}
    return {key: value for key, value in result.items() if key not in numbers | chosen}


def read_entry(run: Path, name: str, args: argparse.Namespace) -> Entry:
    """Reads a run folder, or a results file: those of seeds share a row if they share name and data set.

    A file's name without --names is that of the file, without _seed<N>.
    """
    path, result = read_results(run, args.checkpoint, args.split, args.normalize)
    if path != run:
        config = settings(run)
        seed, name = config.pop("seed", 0), name if args.names else config["method"]
    elif "seed" in result:
        seed, name = result["seed"], name.removesuffix(f"_seed{result['seed']}")
        config = file_settings(result) | {"name": name}
    else:
        seed, config = 0, {"file": str(run.resolve()), "method": name}
    return Entry(run, name, seed, config, result)


def check_pools(args: argparse.Namespace) -> None:
    """Raises InputError where runs args.runs with the same name are not seeds of one configuration."""
    pools: dict[str, list[tuple[Path, dict[str, Any]]]] = {}
    names = names_of(args)
    for run, name in zip(args.runs, names):
        if names.count(name) == 1:
            continue
        if run.suffix == ".json":
            result = read_json(run, "evaluate.py")
            config = file_settings(result)
            config["seed"] = result.get("seed", str(run.resolve()))  # maps of others have no seed
        else:
            config = settings(run)
        for other, known in pools.setdefault(name, []):
            differing = [key for key in sorted(config.keys() | known) if config.get(key) != known.get(key)]
            if differing != ["seed"]:
                values = ", ".join(
                    f"{key} {known.get(key)} and {config.get(key)}" for key in differing if key != "seed"
                )
                raise InputError(
                    f"{run}: has the name {name}, as {other}, and {values or 'the same seed'}: runs with the "
                    "same name must differ in the seed only: pass other --names"
                )
        pools[name].append((run, config))


def grouped(args: argparse.Namespace) -> list[Group]:
    """The runs args.runs, grouped by configuration. Raises InputError for a run that is given twice.

    Runs with different --names are never in one group. The label is the name or method; where groups share
    it, the values in which they differ are added.
    """
    found: dict[str, list[Entry]] = {}
    for run, name in zip(args.runs, names_of(args)):
        entry = read_entry(run, name, args)
        key = entry.config | ({"name": name} if args.names else {})
        same = found.setdefault(json.dumps(key, sort_keys=True), [])
        for other in same:
            if other.seed == entry.seed:
                raise InputError(
                    f"{run}: the same run as {other.run}, seed {entry.seed}: give one of the two"
                )
        same.append(entry)

    made = []
    for entries in found.values():
        first = entries[0]
        alike = [other[0].config for other in found.values() if other[0].kind == first.kind]
        keys = sorted(set().union(*alike))
        differing = [key for key in keys if len({json.dumps(config.get(key)) for config in alike}) > 1]
        values = ", ".join(f"{key} {first.config.get(key)}" for key in differing)
        label = f"{first.name} ({values})" if values else first.name
        seeds = [entry.seed for entry in entries]
        made.append(make_group(label, first.result, seeds, [numbers(entry.result) for entry in entries]))
    return made


# ----------------------------------------------------------------------------------------------------- tables


def spread(values: Sequence[float] | None, digits: int, plus_minus: str = " ± ") -> str:
    """Mean ± sample standard deviation (n - 1) of several values, a single value as it is, – for none."""
    if not values:
        return "–"
    text = f"{np.mean(values):.{digits}f}"
    return text + f"{plus_minus}{np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else text


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table of these cells, with a line end after each row."""
    lines = [[cell.replace("|", r"\|") for cell in row] for row in (head, *rows)]
    return "".join(f"| {' | '.join(row)} |\n" for row in (lines[0], ["---"] * len(head), *lines[1:]))


def latex(text: str) -> str:
    """The text with LaTeX's special characters escaped."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--"}
    return "".join(special.get(c, f"\\{c}" if c in "&%$#_{}" else c) for c in text)


class Table(NamedTuple):
    """Rows of labels and the values over seeds in each column."""

    title: str
    corner: str  # heading of the labels
    columns: list[tuple[str, str]]  # (data set and backbone, or "" where the title has them; key of HEADINGS)
    rows: dict[str, dict[tuple[str, str], list[float]]]  # label -> column -> one value per seed

    def caption(self) -> str:
        """The title, and over how many seeds the means are."""
        seeds = {len(values) for row in self.rows.values() for values in row.values()}
        if seeds == {1}:
            return self.title
        counts = " or ".join(map(str, sorted(seeds)))
        return f"{self.title}; mean ± standard deviation over {counts} seeds"

    def markdown(self, digits: int) -> str:
        """The table in Markdown, under its caption."""
        head = [self.corner, *(f"{pair} {HEADINGS[key]}".strip() for pair, key in self.columns)]
        rows = [
            [label, *(spread(values.get(column), digits) for column in self.columns)]
            for label, values in self.rows.items()
        ]
        return f"{self.caption()}\n\n{markdown(head, rows)}"

    def latex(self, digits: int) -> str:
        """The table as a tabular of the package booktabs; data set and backbone span their columns."""
        pairs = [pair for pair, _ in self.columns]
        spans, rules = [""], ""
        for pair in dict.fromkeys(pairs):
            n, first = pairs.count(pair), pairs.index(pair) + 2
            spans.append(f"\\multicolumn{{{n}}}{{c}}{{{latex(pair)}}}")
            rules += f"\\cmidrule(lr){{{first}-{first + n - 1}}}"
        lines = [" & ".join(spans) + r" \\", rules] if any(pairs) else []
        head = [self.corner, *(HEADINGS[key] for _, key in self.columns)]
        lines += [" & ".join(map(latex, head)) + r" \\", r"\midrule"]
        for label, values in self.rows.items():
            cells = [spread(values.get(column), digits, r" \pm ") for column in self.columns]
            cells = [latex(label), *("--" if cell == "–" else f"${cell}$" for cell in cells)]
            lines.append(" & ".join(cells) + r" \\")
        begin = [f"% {self.caption()}", f"\\begin{{tabular}}{{l{'c' * len(pairs)}}}", r"\toprule"]
        return "\n".join([*begin, *lines, r"\bottomrule", r"\end{tabular}", ""])


def make_table(
    title: str, keys: Sequence[str], groups: list[Group], corner: str = "", pairs: bool = False
) -> Table:
    """A row per label, a column per key that any group has. pairs: columns per data set and backbone."""
    columns, rows = {}, {}
    for group in groups:
        for key in keys:
            column = (group.pair if pairs else "", key)
            columns[column] = columns.get(column, False) or key in group.metrics
            if key in group.metrics:
                rows.setdefault(group.label, {})[column] = group.metrics[key]
    return Table(title, corner, [column for column, used in columns.items() if used], rows)


def csv_text(groups: list[Group], keys: Iterable[str]) -> str:
    """A CSV line per group, with mean and sample standard deviation of each key in full precision."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    head = ["method", "dataset", "arch", "seeds"]
    rows.writerow([*head, *(f"{key}_{what}" for key in keys for what in ("mean", "deviation"))])
    for group in groups:
        row: list[Any] = [group.label, group.dataset, group.arch or "", " ".join(map(str, group.seeds))]
        for key in keys:
            values = group.metrics.get(key, [])
            row.append(repr(float(np.mean(values))) if values else "")
            row.append(repr(float(np.std(values, ddof=1))) if len(values) > 1 else "")
        rows.writerow(row)
    return text.getvalue()


def write_tables(out: Path, tables: list[Table], csv_table: str, digits: int) -> tuple[str, list[Path]]:
    """Writes out.md, out.tex and out.csv. Returns (the Markdown, the paths)."""
    as_markdown = "\n".join(table.markdown(digits) for table in tables)
    as_latex = "\n".join(["% \\usepackage{booktabs}", *(table.latex(digits) for table in tables)])
    contents = {".md": as_markdown, ".tex": as_latex, ".csv": csv_table}
    for suffix, content in contents.items():
        write_text(with_suffix(out, suffix), content)
    return as_markdown, [with_suffix(out, suffix) for suffix in contents]


# --------------------------------------------------------------------------------------------------- commands


def refuse(flags: list[str], names: Sequence[str], fix: str) -> None:
    """Raises InputError for a flag of train.py that this program sets."""
    for flag in flags:
        if flag.split("=")[0] in names:
            raise InputError(f"{flag.split('=')[0]}: the command sets this flag of train.py: {fix}")


def compare(args: argparse.Namespace) -> list[Path]:
    """Trains and evaluates methods over seeds. Writes RUNS/table.md, .tex and .csv after each seed."""
    refuse(args.flags, ("--method", "--seed", "--out", "--resume"), "use --methods, --seeds and --runs")
    rows = {name: row_of(name) for name in args.methods}
    runs = plan(rows.values(), args)
    for seeds in finish_all(runs, args):
        groups = [row_group(name, row, seeds, args) for name, row in rows.items()]
        title = f"{groups[0].pair}, test, {args.checkpoint} checkpoint, %"
        made = make_table(title, COMPARED, groups, corner="method")
        text, written = write_tables(args.runs / "table", [made], csv_text(groups, COMPARED), digits=1)
    print(text)
    return written


def sweep(args: argparse.Namespace) -> list[Path]:
    """Fig. A5: trains a run per value and seed. Writes RUNS/sweep_<param>.* after each seed of all values.

    The preset's value has the run folder of `compare`, which the sweeps over several parameters share.
    """
    preset, value = swept_preset(args)
    args.seeds = args.seeds or [preset.seed]
    param = args.param.replace("-", "_")
    # The value as train.py's integer flags take it: 2, not 2.0.
    names = {x: f"{preset.method}:{param}={repr(x).removesuffix('.0')}" for x in sorted(args.values)}
    rows = {x: row_of(preset.method if x == value else name) for x, name in names.items()}
    out = args.runs / f"sweep_{param}"
    runs = plan(rows.values(), args)
    for seeds in finish_all(runs, args):
        labels = {x: f"{x:g} (preset)" if x == value else f"{x:g}" for x in rows}
        groups = [row_group(labels[x], row, seeds, args) for x, row in rows.items()]
        localization = [key for key in ("gt_known_loc", "pxap") if key in groups[0].metrics]
        keys = (*localization[:1], "top1_cls")  # none without boxes and masks
        numbers_of = [{key: group.metrics[key] for key in keys} for group in groups]
        entries = [{"value": x, "seeds": seeds, **found} for x, found in zip(rows, numbers_of)]
        head = {name: getattr(preset, name) for name in ("dataset", "arch", "method")}
        head |= {"param": param, "preset": value, "checkpoint": args.checkpoint}
        write_json(with_suffix(out, ".json"), {**head, "values": entries})
        title = f"{groups[0].pair} {preset.method}, test, {args.checkpoint} checkpoint, %"
        made = make_table(title, keys, groups, corner=param)
        text, written = write_tables(out, [made], csv_text(groups, keys), digits=2)
    print(text)
    print(f"to draw it: python -m bridge_wsol.figures sweep {with_suffix(out, '.json')}")
    return [with_suffix(out, ".json"), *written]


def read_sweep(path: Path) -> dict[str, Any]:
    """The content of a file of `experiments sweep`, its values ascending, with a "title" and its "metric".

    Raises InputError for any other file.
    """
    made_by = "python -m bridge_wsol.experiments sweep"
    content = read_json(path, made_by)
    try:
        rows = sorted(content["values"], key=lambda row: row["value"])
        metric = [name for name in SWEPT if name in rows[0]][0]
        numbers = [content["preset"], *(n for row in rows for n in (row["value"], *row[metric]))]
        title = " ".join(content[name] for name in ("dataset", "arch", "method"))
        complete = (
            all(type(number) in (int, float) and math.isfinite(number) for number in numbers)
            and all(0 < len(row[metric]) == len(rows[0][metric]) for row in rows)
            and content["param"].isidentifier()
        )
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError):
        complete = False
    if not complete:
        raise InputError(f"{path}: not a file of a sweep; it is made by: {made_by}")
    return content | {"title": title, "metric": metric, "values": rows}


def swept_preset(args: argparse.Namespace) -> tuple[SimpleNamespace, float]:
    """(configuration without the sweep, its value of args.param). Raises InputError for another parameter."""
    param = args.param.replace("-", "_")
    refuse(args.flags, ("--out", "--resume"), "use --runs")
    preset, sources = resolve_config(parse_args(args.flags, "", METHODS), None, METHODS)
    flags = RUN_FLAGS | PAPER_FLAGS | method_values(METHODS)
    numeric = [name for name, value in vars(preset).items() if type(value) in (int, float) and name in flags]
    swept = [name for name in numeric if sources[name] != "default" and not is_unused(name, sources)]
    if param not in swept:
        raise InputError(
            f"--param {args.param}: not a number of the preset: choose one of {', '.join(swept)} "
            f"(for {preset.dataset} {preset.arch} {preset.method})"
        )
    if sources[param] == "flag":
        raise InputError(f"--{param.replace('_', '-')}: the sweep sets this flag: remove it")
    if len(set(args.values)) < len(args.values):
        raise InputError("--values: a value is repeated: give each value once")
    return preset, getattr(preset, param)


def table(args: argparse.Namespace) -> list[Path]:
    """Tables of runs: localization and MaxBoxAccV2 (the paper's main form), PxAP (the form of Table A1).

    Runs that differ in the seed only share a row.
    """
    groups = grouped(args)
    of_pairs, splits = ({getattr(group, name) for group in groups} for name in ("pair", "split"))
    several = len(of_pairs) > 1
    head = ", ".join(name for names in (of_pairs, splits) for name in names if len(names) == 1)
    head += ". " if head else ""
    made = [make_table(head + title, keys, groups, pairs=several) for title, keys in FORMS]
    made = [form for form in made if form.columns]
    text, written = write_tables(args.out, made, csv_text(groups, METRICS), args.digits)
    print(text)
    return written


COMMANDS = {
    "compare": (compare, "trains and evaluates methods over seeds, and tabulates their test results"),
    "sweep": (sweep, "trains and evaluates one method at several values of a hyperparameter (Fig. A5)"),
    "table": (table, "tabulates existing runs: the paper's main form and the form of Table A1"),
}


def add_train_flags(add: Callable[..., Any], seeds: list[int] | None, runs: str) -> None:
    """Adds the flags that compare and sweep share. add: the parser's add_argument."""
    default = " ".join(map(str, seeds)) if seeds else "the value of --seed, or 0"
    add("--seeds", nargs="+", type=int, default=seeds, metavar="N", help=f"default: {default}")
    what = f"folder of the runs and tables (default {runs})"
    add("--runs", type=Path, default=Path(runs), metavar="DIR", help=what)
    what = "runs at the same time, each on its own GPU where there are several (default 1)"
    add("--jobs", type=int, default=1, metavar="N", help=what)


def add_table_flags(add: Callable[..., Any]) -> None:
    """Adds the flags that only the table command has."""
    what = "folders that train.py wrote, or results files of evaluate.py"
    add("runs", nargs="+", type=Path, metavar="RUN", help=what)
    what = "names of the runs, in their order (default: their methods)"
    add("--names", nargs="+", metavar="NAME", help=what)
    add("--split", choices=("test", "val"), default="test", help="split of the results (default test)")
    what = "normalization of the maps (default minmax)"
    add("--normalize", choices=NORMALIZATIONS, default="minmax", help=what)
    add("--digits", type=int, default=2, metavar="N", help="decimals (default 2)")
    what = "path of the files, without suffix (default figures/table)"
    add("--out", type=Path, default=Path("figures/table"), metavar="PATH", help=what)


def parse_command(argv: list[str] | None) -> argparse.Namespace:
    """The parsed command line; args.flags are the flags of train.py. Raises InputError."""
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="python -m bridge_wsol.experiments", description=__doc__, formatter_class=form)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (_, what) in COMMANDS.items():
        # No abbreviations: --p is a flag of train.py, and not short for --param.
        sub = commands.add_parser(name, help=what, description=what, allow_abbrev=False)
        checkpoint = "last" if name == "compare" else "best"
        what = f"checkpoint whose results are tabulated (default {checkpoint})"
        sub.add_argument("--checkpoint", choices=("best", "last"), default=checkpoint, help=what)
        if name != "table":
            sub.epilog = "Flags not listed here are passed to train.py."
    compare_add, sweep_add = (commands.choices[name].add_argument for name in ("compare", "sweep"))
    add_train_flags(compare_add, [0, 1, 2], "runs/comparison")
    what = f"METHOD[:NAME=VALUE,...][+NORMALIZATION] (default: {' '.join(ROWS)})"
    compare_add("--methods", nargs="+", default=ROWS, metavar="ROW", help=what)
    add_train_flags(sweep_add, None, "runs/sweep")
    sweep_add("--param", required=True, help="a number of the preset, for example lambda_sim")
    sweep_add("--values", nargs="+", required=True, type=float, metavar="X", help="values of --param")
    add_table_flags(commands.choices["table"].add_argument)

    args, args.flags = parser.parse_known_args(argv)
    if args.flags and args.command == "table":
        parser.error(f"unrecognized arguments: {' '.join(args.flags)}")
    for name, least in (("jobs", 1), ("digits", 0)):
        if getattr(args, name, least) < least:
            parser.error(f"--{name} {getattr(args, name)}: must be at least {least}")
    if args.command == "table" and args.out.suffix in (".md", ".tex", ".csv"):
        args.out = args.out.with_suffix("")
    return args


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    args = parse_command(argv)
    for path in COMMANDS[args.command][0](args):
        print(f"written to {path}")


if __name__ == "__main__":
    with one_line_errors():
        main()
