"""Kills a small run at random moments and resumes it: it must end as an uninterrupted run.

    python tests/kill_resume.py [--kills 20] [--epochs 40] [--seed 0] [--workers 0 2]

SIGKILL while a checkpoint is being written, SIGKILL at any moment, SIGTERM and Ctrl-C in turn. Compared:
every tensor of last.pt and best.pt, the results, and log.jsonl without times.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from conftest import REPOSITORY, TINY, make_tiny, same_run

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": ENVIRONMENT}


def command(flags: str) -> list[str]:
    return [sys.executable, str(REPOSITORY / "train.py"), *flags.split()]


def finish(flags: str) -> None:
    done = subprocess.run(command(flags), **PIPES)
    if done.returncode:
        raise SystemExit(f"the run failed by itself:\n{done.stdout}{done.stderr}")


def interrupt(flags: str, out: Path, how: str, rng: random.Random) -> str:
    """Starts or resumes the run and ends it after a moment. Returns what happened."""

    def writing() -> set[str]:
        return {path.name for path in out.glob(".last.pt.*.part")}

    before = writing()  # what the kill before left
    process = subprocess.Popen(command(f"{flags} --out {out} --resume"), **PIPES)
    process.stdout.readline()  # the first line: the program is up
    moment = time.monotonic() + rng.uniform(0, 0.5)
    of_file = how == "writing"
    while process.poll() is None and (time.monotonic() < moment or (of_file and writing() <= before)):
        time.sleep(0 if of_file else 0.001)
    process.send_signal(signal.SIGKILL if of_file else signal.Signals[how])
    _, errors = process.communicate()
    if process.returncode not in (0, 130, 143, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT):
        raise SystemExit(f"{how}: exit code {process.returncode}\n{errors}")
    log = out / "log.jsonl"
    epochs = len(log.read_text().splitlines()) if log.exists() else 0
    half = ", a checkpoint half written" if not writing() <= before else ""
    return f"{how}: exit code {process.returncode}, {epochs} epochs in the log{half}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for flag, default in (("--kills", 20), ("--epochs", 40), ("--seed", 0)):
        parser.add_argument(flag, type=int, default=default)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        make_tiny(Path(folder))
        flags = f"{TINY} --data-root {folder}/data --lists {folder}/lists --epochs {args.epochs}"
        whole = Path(folder) / "whole"
        finish(f"{flags} --out {whole}")
        for workers in args.workers:
            with_workers, out = f"{flags} --workers {workers}", Path(folder) / f"{workers}"
            for i in range(args.kills):
                how = ("writing", "SIGKILL", "SIGTERM", "SIGINT")[i % 4]
                print(f"{workers} workers, {i + 1}: {interrupt(with_workers, out, how, rng)}", flush=True)
                if (out / "results_last_test.json").exists():  # it ended between two kills: once more
                    assert same_run(whole, out)
                    out = Path(folder) / f"{workers}_{i}"
            finish(f"{with_workers} --out {out} --resume")
            assert same_run(whole, out)
            print(f"{workers} workers: equal to the uninterrupted run in every tensor, number and log entry")


if __name__ == "__main__":
    main()
