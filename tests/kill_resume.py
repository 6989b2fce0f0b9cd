"""Kills a small run at random moments and resumes it: it must end byte for byte as an uninterrupted run.

    python tests/kill_resume.py [--kills 20] [--epochs 12] [--seed 0] [--workers 0 2]

SIGKILL while a checkpoint is being written, SIGKILL at any moment, and SIGTERM in turn. Compared: last.pt,
best.pt, the results, and log.jsonl without times.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from conftest import make_tiny, tiny_flags


def command(flags: list[str], out: Path, *more: str) -> list[str]:
    program = [sys.executable, str(Path(__file__).with_name("tiny_train.py")), "0", "0"]
    return [*program, *flags, "--out", str(out), *more]


def finish(flags: list[str], out: Path, *more: str) -> None:
    done = subprocess.run(command(flags, out, *more), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the run failed by itself:\n{done.stdout}{done.stderr}")


def interrupt(flags: list[str], out: Path, how: str, rng: random.Random) -> str:
    """Starts or resumes the run and ends it after a moment. Returns what happened."""

    def writing() -> set[str]:
        return {path.name for path in out.glob(".last.pt.*.part")}

    before = writing()  # what the kill before left
    process = subprocess.Popen(
        command(flags, out, "--resume"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    process.stdout.readline()  # the first line: the program is up
    moment = time.monotonic() + rng.uniform(0, 2)
    while process.poll() is None and (
        time.monotonic() < moment or (how == "writing" and writing() <= before)
    ):
        if how != "writing":
            time.sleep(0.001)
    if process.poll() is None:
        process.send_signal(signal.SIGTERM if how == "SIGTERM" else signal.SIGKILL)
    _, errors = process.communicate()
    if how == "SIGTERM" and process.returncode == 130 and "with --resume" not in errors:
        raise SystemExit(f"SIGTERM left without its line: {errors}")
    if process.returncode not in (0, 130, -signal.SIGKILL, -signal.SIGTERM) or "Traceback" in errors:
        raise SystemExit(f"{how}: exit code {process.returncode}\n{errors}")
    log = out / "log.jsonl"
    epochs = len(log.read_text().splitlines()) if log.exists() else 0
    half = ", a checkpoint half written" if not writing() <= before else ""
    return f"{how}: exit code {process.returncode}, {epochs} epochs in the log{half}"


def content(out: Path) -> dict[str, object]:
    files: dict[str, object] = {
        path.name: path.read_bytes()
        for path in sorted(out.iterdir())
        if path.suffix == ".pt" or path.name.startswith("results")
    }
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return files | {
        "log": [
            {k: v for k, v in line.items() if k not in ("images_per_second", "seconds")} for line in lines
        ]
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        flags = [*tiny_flags(*make_tiny(Path(folder))), "--epochs", str(args.epochs)]
        for workers in args.workers:
            rng, out = random.Random(args.seed), Path(folder) / f"killed_{workers}"
            # A run of its own for each: checkpoints tell the number of workers they were written with.
            whole, with_workers = Path(folder) / f"whole_{workers}", [*flags, "--workers", str(workers)]
            finish(with_workers, whole)
            for i in range(args.kills):
                how = ("writing", "SIGKILL", "SIGTERM")[i % 3]
                print(f"{workers} workers, {i + 1}: {interrupt(with_workers, out, how, rng)}", flush=True)
                if (
                    out / "results_last_test.json"
                ).exists():  # it got to its end between two kills: once more, elsewhere
                    compare(whole, out, with_workers)
                    out = Path(folder) / f"killed_{workers}_{i}"
            compare(whole, out, with_workers)
            print(f"{workers} workers: equal to the uninterrupted run in every byte")


def compare(whole: Path, out: Path, flags: list[str]) -> None:
    finish(flags, out, "--resume")
    ours, theirs = content(whole), content(out)
    different = [name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)]
    if different:
        raise SystemExit(f"{out.name}: {', '.join(different)} differ from the uninterrupted run")


if __name__ == "__main__":
    main()
