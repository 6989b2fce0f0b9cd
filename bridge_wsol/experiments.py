"""Many runs."""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .baselines import METHODS
from .cam import NORMALIZATIONS
from .drawing import with_suffix
from .evaluation import names_of, read_config, read_results
from .optim import parse_args, resolve_config
from .utils import InputError, Parser, alone, one_line_errors, write_json, write_text

# A row: a method, with :NAME=VALUE,... under values of its own, with +NORMALIZATION the same runs under another normalization of the map
# (ivr's percentile chosen on val).
ROWS = (
    "cam",
    "cam+ivr",
    "has",
    "acol",
    "spg",
    "adl",
    "adl+ivr",
    "cutmix",
    "eil",
    "pas",
    "pas+pas",
    "calm",
    "calm+log",
    "bridge",
    "bridge+ivr",
    "bridge+cutmix",
)


# Heading -> where the number is in "metrics" of a results file; images/s comes from the log.
COLUMNS = {
    "MaxBoxAccV2": ("max_box_acc_v2", "mean"),
    "IoU 30": ("max_box_acc_v2", "30"),
    "IoU 50": ("max_box_acc_v2", "50"),
    "IoU 70": ("max_box_acc_v2", "70"),
    "GT-known": ("gt_known_loc_largest",),
    "Top-1 Loc": ("top1_loc",),
    "PxAP": ("pxap",),
    "Top-1 cls": ("top1_cls",),
}


def run_script(script: str, *arguments: Any) -> None:
    """Runs train.py or evaluate.py of this checkout. Raises InputError where it fails; its own line on stderr says why."""
    path = Path(__file__).parents[1] / script
    if not path.exists():
        raise InputError(f"{path}: no such file: the comparison runs from a clone, pip install -e")
    code = subprocess.run([sys.executable, str(path), *map(str, arguments)]).returncode
    if code:
        raise InputError(
            f"{script} ended with exit code {code}: {' '.join(map(str, arguments))}; the same command goes on from here"
        )


class Row(NamedTuple):
    method: str
    flags: list[str]  # of train.py, this row's own
    normalization: str
    run: str  # its runs are folders of this name with _seedN behind


def row_of(name: str) -> Row:
    """What METHOD[:NAME=VALUE,...][+NORMALIZATION] asks for. Raises InputError for another name."""
    trained, _, normalization = name.rpartition("+")
    if normalization not in NORMALIZATIONS or not trained:
        trained, normalization = name, "minmax"
    method, colon, values = trained.partition(":")
    pairs = [value.split("=") for value in values.split(",")] if colon else []
    if method not in METHODS or not all(len(pair) == 2 and all(pair) for pair in pairs):
        raise InputError(
            f"--methods {name}: not METHOD[:NAME=VALUE,...][+NORMALIZATION] with a method of {', '.join(METHODS)} "
            f"and a normalization of {', '.join(NORMALIZATIONS)}"
        )
    flags = [f"--{flag.replace('_', '-')}={value}" for flag, value in pairs]
    return Row(method, flags, normalization, trained.replace(":", "_").replace(",", "_"))


def compare(rows: list[str], seeds: list[int], runs: Path, checkpoint: str, flags: list[str]) -> str:
    """Trains what is not trained yet, each row with each seed in RUNS/METHOD_seedN, and returns the table, as in RUNS/table.md.

    flags: of train.py, the same for all runs in RUNS. Several calls at the same time share the runs out among them. Raises InputError
    for other flags than those that RUNS began with, and where a run fails.
    """
    asked = {name: row_of(name) for name in rows}
    # What only decides where and how fast it runs may change between calls.
    begun, free = runs / "flags.json", ("--workers", "--device", "--data-root", "--splits")
    own = [
        flag
        for i, flag in enumerate(flags)
        if flag.split("=")[0] not in free and (i == 0 or flags[i - 1] not in free)
    ]
    if begun.exists() and json.loads(begun.read_text(encoding="utf-8")) != own:
        raise InputError(
            f"{begun}: these runs were begun with other flags: give the same, or choose another --runs"
        )
    write_json(begun, own)

    found: dict[str, list[dict[str, float | None]]] = {name: [] for name in rows}
    left = [
        (seed, name) for seed in seeds for name in rows
    ]  # all rows of a seed first: a table that is not finished compares like with like
    wait = False
    while left:
        busy = []
        for seed, name in left:
            run = runs / f"{asked[name].run}_seed{seed}"
            with alone(run, wait) as ours:
                if not ours:
                    busy.append((seed, name))
                    continue
                found[name].append(
                    measured(finish(asked[name], seed, run, checkpoint, flags), run / "log.jsonl")
                )
            write_text(runs / "table.md", comparison_table(found))
        left, wait = busy, True  # what other calls are at comes last
    return comparison_table(found)


def finish(row: Row, seed: int, run: Path, checkpoint: str, flags: list[str]) -> Path:
    """Trains and evaluates what of a row and seed is missing in the folder `run`; returns the file of its results."""
    if not (run / "results_last_test.json").exists():  # the last file that train.py writes
        run_script(
            "train.py", "--method", row.method, "--seed", seed, "--out", run, *flags, *row.flags, "--resume"
        )
    if row.normalization == "minmax":
        return run / f"results_{checkpoint}_test.json"
    results = (
        run / f"results_{checkpoint}_test_{row.normalization}{'_val' * (row.normalization == 'ivr')}.json"
    )
    if not results.exists():
        choose = ["--percentile", "val"] if row.normalization == "ivr" else []
        run_script(
            "evaluate.py",
            run,
            "--checkpoint",
            checkpoint,
            "--normalize",
            row.normalization,
            *choose,
            *machine(flags),
        )
    return results


def machine(flags: list[str]) -> list[str]:
    """Those of train.py's flags that evaluate.py has too and does not take from the run."""
    shared = ("--workers", "--device", "--data-root", "--splits")
    return [
        flag
        for i, flag in enumerate(flags)
        if flag.split("=")[0] in shared or (i > 0 and flags[i - 1] in shared)
    ]


def measured(results: Path, log: Path) -> dict[str, float | None]:
    """{heading: number} of one run; images/s is the median over its epochs."""
    row = {}
    for heading, path in COLUMNS.items():
        value = json.loads(results.read_text(encoding="utf-8"))["metrics"]
        for key in path:
            value = value and value[key]
        row[heading] = value
    epochs = [json.loads(line)["images_per_second"] for line in log.read_text(encoding="utf-8").splitlines()]
    return row | {"images/s": statistics.median(epochs)}


def comparison_table(found: dict[str, list[dict[str, float | None]]]) -> str:
    """Markdown: a line a method, mean and (from two seeds on) sample standard deviation; columns that nobody has are left out."""
    headings = [
        h
        for h in (*COLUMNS, "images/s")
        if any(run[h] is not None for runs in found.values() for run in runs)
    ]
    lines = [f"| method | seeds | {' | '.join(headings)} |", "|---" * (len(headings) + 2) + "|"]
    for name, runs in found.items():
        if not runs:
            continue
        cells = []
        for heading in headings:
            values = [run[heading] for run in runs if run[heading] is not None]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}" if values else "")
        lines.append(f"| {name} | {len(runs)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = Parser(
        prog="python -m bridge_wsol.baselines",
        description="Trains and evaluates methods over seeds, and writes one table of test results.",
        epilog="Every other flag is train.py's. Finished runs are not repeated, interrupted ones go on; several such calls at once share the work.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        default=ROWS,
        metavar="M",
        help=f"METHOD[:NAME=VALUE,...][+NORMALIZATION] (default: {' '.join(ROWS)})",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="default: 0 1 2")
    parser.add_argument(
        "--runs",
        type=Path,
        default=Path("runs/comparison"),
        metavar="DIR",
        help="of the runs and table.md (default runs/comparison)",
    )
    parser.add_argument(
        "--checkpoint",
        choices=("best", "last"),
        default="last",
        help="whose results (default last: the same epoch for all)",
    )
    args, flags = parser.parse_known_args(argv)
    for flag in ("--method", "--seed", "--out", "--resume"):
        if any(given.split("=")[0] == flag for given in flags):
            parser.error(f"{flag} is set by the comparison: --methods, --seeds and --runs decide")
    print(compare(list(args.methods), args.seeds, args.runs, args.checkpoint, flags))
    print(f"written to {args.runs / 'table.md'}")


# What may differ between a finished run and the one a sweep asks for: where and how fast it runs.
FREE = ("data_root", "splits", "workers", "device", "amp", "val_every")


def is_finished(folder: Path, arguments: list[str]) -> bool:
    """Whether the run that these arguments ask for is in the folder, evaluated. Raises InputError for another run's folder."""
    asked = vars(resolve_config(parse_args(arguments, "", METHODS), None, METHODS)[0])
    if not (folder / "last.pt").exists():
        return False
    there = read_config(folder)
    for name, value in asked.items():
        if name not in (*FREE, "epochs") and there.get(name) != json.loads(json.dumps(value)):
            raise InputError(
                f"{folder}: a run with {name} {there.get(name)}, where this sweep asks for {value}: pass another --runs DIR, or remove it"
            )
    if not all((folder / f"results_{which}_test.json").exists() for which in ("best", "last")):
        return False
    epoch = read_results(folder, "last", "test")[1].get("epoch", 0)
    if epoch > asked["epochs"]:
        raise InputError(
            f"{folder}: a run of {epoch} epochs, where this sweep asks for {asked['epochs']}: pass another --runs DIR, or remove it"
        )
    return epoch == asked["epochs"]


def train_run(folder: Path, arguments: list[str], jobs: int) -> None:
    """train.py in a process of its own, as from the command line; with several at a time each prints into <folder>.log."""
    command = [sys.executable, str(Path(__file__).parents[1] / "train.py"), *arguments]
    environment = dict(os.environ)
    if jobs == 1:
        print(f"{folder}: training", flush=True)
        code = subprocess.run(command, env=environment).returncode
        where = "said why above"
    else:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
        log = folder.with_name(f"{folder.name}.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        print(f"{folder}: training, log in {log}", flush=True)
        with log.open("a", encoding="utf-8") as file:
            code = subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT).returncode
        where = f"said why in {log}"
    if code:
        raise InputError(
            f"{folder}: train.py ended with exit code {code} and {where}; the same command goes on from here"
        )


METRICS = {
    "top1_loc": "Top-1 Loc",
    "top5_loc": "Top-5 Loc",
    "gt_known_loc": "GT-known Loc",
    "gt_known_loc_largest": "GT-known Loc, largest contour",
    "v2_30": "IoU 30",
    "v2_50": "IoU 50",
    "v2_70": "IoU 70",
    "v2_mean": "MaxBoxAccV2",
    "v2_at_val": "at val's thresholds",
    "top1_cls": "Top-1 cls",
    "top5_cls": "Top-5 cls",
    "pxap": "PxAP",
}


FORMS = (
    ("Localization, %", ("top1_loc", "top5_loc", "gt_known_loc", "top1_cls")),
    ("MaxBoxAccV2, %", ("v2_30", "v2_50", "v2_70", "v2_mean", "v2_at_val")),
    ("PxAP, % (the form of Table A1)", ("pxap",)),
)


class Group(NamedTuple):
    """Runs that differ in the seed only."""

    label: str
    dataset: str
    arch: str | None
    seeds: list[int]
    metrics: dict[str, list[float]]  # of METRICS, those that the results have


def grouped(args: argparse.Namespace) -> list[Group]:
    """The runs by all that config.json says but the seed and what does not change a result. Raises InputError for a run that comes twice."""
    found: dict[str, list[dict[str, Any]]] = {}
    for run, name in zip(args.runs, names_of(args)):
        path, result = read_results(run, args.checkpoint, args.split, args.normalize)
        if path == run:
            config: dict[str, Any] = {"file": str(run.resolve()), "method": name}
        else:
            config = {name: value for name, value in read_config(run).items() if name not in FREE}
        seed = config.pop("seed", 0)
        entry = {
            "run": run,
            "name": name if args.names else config["method"],
            "named": bool(args.names),
            "seed": seed,
            "config": config,
            "result": result,
        }
        same = found.setdefault(json.dumps(config, sort_keys=True), [])
        for other in same:
            if other["seed"] == seed:
                raise InputError(
                    f"{run}: the same run as {other['run']}, seed {seed} included: one of them only"
                )
        same.append(entry)

    groups = list(found.values())
    made = []
    for group in groups:
        first = group[0]
        keys = [first["result"].get(key) for key in ("dataset", "arch")]
        alike = [
            g[0]["config"]
            for g in groups
            if [g[0]["result"].get(key) for key in ("dataset", "arch")] == keys
            and g[0]["name"] == first["name"]
        ]
        differing = sorted(k for k in set().union(*alike) if len({json.dumps(c.get(k)) for c in alike}) > 1)
        values = ", ".join(f"{k} {first['config'].get(k)}" for k in differing)
        label = f"{first['name']} ({values})" if differing else first["name"]
        metrics: dict[str, list[float]] = {}
        for entry in group:
            m = entry["result"]["metrics"]
            flat = {**m, **{f"v2_{k}": v for k, v in (m["max_box_acc_v2"] or {}).items()}}
            flat["v2_at_val"] = (m["max_box_acc_v2_at_val_threshold"] or {}).get("mean")
            for key in METRICS:
                if flat.get(key) is not None:
                    metrics.setdefault(key, []).append(flat[key])
        made.append(Group(label, *keys, [entry["seed"] for entry in group], metrics))
    return made


def spread(values: Sequence[float] | None, digits: int, plus_minus: str = " ± ") -> str:
    """Mean ± standard deviation (n - 1) of several values, one value as it is, – for none."""
    if not values:
        return "–"
    text = f"{np.mean(values):.{digits}f}"
    return text + f"{plus_minus}{np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else text


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [[cell.replace("|", r"\|") for cell in row] for row in (head, *rows)]
    return "".join(f"| {' | '.join(row)} |\n" for row in (lines[0], ["---"] * len(head), *lines[1:]))


def latex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--"}
    return "".join(special.get(c, f"\\{c}" if c in "&%$#_{}" else c) for c in text)


def table(args: argparse.Namespace) -> list[Path]:
    """Table A1's form and the paper's main form: rows are methods, columns the metrics on each data set and backbone."""
    groups = grouped(args)
    pairs = list(dict.fromkeys((g.dataset, g.arch) for g in groups))
    cells = {(g.label, g.dataset, g.arch): g for g in groups}
    labels = list(dict.fromkeys(g.label for g in groups))
    as_markdown, as_latex = [], ["% \\usepackage{booktabs}"]
    for title, keys in FORMS:
        columns = [
            (pair, key)
            for pair in pairs
            for key in keys
            if any(key in g.metrics for g in groups if (g.dataset, g.arch) == pair)
        ]
        if not columns:
            continue
        rows = [(label, [cells.get((label, *pair)) for pair, _ in columns]) for label in labels]
        rows = [
            (label, of)
            for label, of in rows
            if any(g and key in g.metrics for g, (_, key) in zip(of, columns))
        ]
        seeds = {len(g.seeds) for _, of in rows for g in of if g}
        note = (
            ""
            if seeds == {1}
            else f"; mean ± standard deviation over {' or '.join(map(str, sorted(seeds)))} seeds"
        )
        head = ["", *(f"{_pair(pair)} {METRICS[key]}" for pair, key in columns)]
        body = [
            [label, *(spread(g and g.metrics.get(key), args.digits) for g, (_, key) in zip(of, columns))]
            for label, of in rows
        ]
        as_markdown.append(f"{title}{note}\n\n{markdown(head, body)}")

        used = [pair for pair in pairs if any(p == pair for p, _ in columns)]
        spans, rules, at = [], [], 2
        for pair in used:
            n = sum(p == pair for p, _ in columns)
            spans.append(f"\\multicolumn{{{n}}}{{c}}{{{latex(_pair(pair))}}}")
            rules.append(f"\\cmidrule(lr){{{at}-{at + n - 1}}}")
            at += n
        lines = [
            " & ".join(["", *spans]) + r" \\",
            "".join(rules),
            " & ".join(["", *(latex(METRICS[key]) for _, key in columns)]) + r" \\",
            r"\midrule",
        ]
        for label, of in rows:
            numbers = [
                spread(g and g.metrics.get(key), args.digits, r" \pm ") for g, (_, key) in zip(of, columns)
            ]
            lines.append(
                " & ".join([latex(label), *("--" if n == "–" else f"${n}$" for n in numbers)]) + r" \\"
            )
        as_latex += [
            f"% {title}{note}",
            f"\\begin{{tabular}}{{l{'c' * len(columns)}}}",
            r"\toprule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]

    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(
        [
            "method",
            "dataset",
            "arch",
            "seeds",
            *(f"{key}_{what}" for key in METRICS for what in ("mean", "deviation")),
        ]
    )
    for g in groups:
        row: list[Any] = [g.label, g.dataset, g.arch or "", " ".join(map(str, g.seeds))]
        for key in METRICS:
            values = g.metrics.get(key, [])
            row += [
                repr(float(np.mean(values))) if values else "",
                repr(float(np.std(values, ddof=1))) if len(values) > 1 else "",
            ]
        rows.writerow(row)
    written = []
    for suffix, content in (
        (".md", "\n".join(as_markdown)),
        (".tex", "\n".join(as_latex)),
        (".csv", text.getvalue()),
    ):
        write_text(with_suffix(args.out, suffix), content)
        written.append(with_suffix(args.out, suffix))
    print("\n".join(as_markdown))
    return written


def _pair(pair: tuple[str, str | None]) -> str:
    arch = {"vgg16": "VGG16", "resnet50": "ResNet50", None: ""}.get(pair[1], pair[1])
    return f"{pair[0]} {arch}".strip()


if __name__ == "__main__":
    with one_line_errors():
        main()
