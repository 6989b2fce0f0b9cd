"""Long runs: several processes, full disks, worker processes, several runs at the same time."""

import multiprocessing
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, lines_of, load, results, run
from kill_resume import ENVIRONMENT
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_post_hook

from bridge_wsol import utils
from bridge_wsol.data import EpochSampler
from bridge_wsol.datasets import load_splits
from bridge_wsol.reproduce import demo
from bridge_wsol.utils import InputError, atomic_write, imap, one_line_errors

PROCESSES = [sys.executable, "-m", "torch.distributed.run"]
FORK = multiprocessing.get_context("fork")  # quicker than a new interpreter


def in_forks(function, items):
    """Exit codes of processes that call function(item), one for each item, at the same time."""
    processes = [FORK.Process(target=function, args=(item,)) for item in items]
    for step in ("start", "join"):
        for process in processes:
            getattr(process, step)()
    return [process.exitcode for process in processes]


def program(*command):
    how = {"capture_output": True, "text": True, "env": ENVIRONMENT, "timeout": 300}
    return subprocess.run([*map(str, command)], **how)


def torchrun(flags, script=REPOSITORY / "train.py"):
    return program(*PROCESSES, "--standalone", "--nproc_per_node", 2, "--", script, *flags.split())


def close_runs(one, two):
    """Equal up to the rounding of sums over other parts of a batch. val: of weights that are not equal."""
    ours, theirs = load(one / "last.pt")["model"], load(two / "last.pt")["model"]
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, rtol=0, atol=1e-5)
    for a, b in zip(lines_of(one), lines_of(two), strict=True):
        assert a.pop("val").keys() == b.pop("val").keys() and a == pytest.approx(b, abs=1e-5)


# 18 images in batches of 17 and 1, then 4 ... 4 and 2: shares of different sizes, and one without images.
# Every process has its own dropout.
SPLIT = "--drop-p 0 --warm-batch-size 17 --batch-size 4"


@pytest.mark.slow
def test_two_processes_are_one_with_the_same_batches(trained, tmp_path):
    flags, one, two = f"{trained[0]} {SPLIT} --pictures 3", tmp_path / "one", tmp_path / "two"
    run("train", f"{flags} --out {one}")
    both = torchrun(f"{flags} --out {two}")
    assert both.returncode == 0, both.stderr
    close_runs(one, two)
    assert both.stdout.count("epoch 1/2") == 1  # one of them speaks

    # The weights that two processes have evaluated, evaluated by one; 9 images are not divisible by 2.
    for which in ("best", "last"):
        by_two = results(two, f"results_{which}_test.json")
        run("evaluate", f"{two} --checkpoint {which} --device cpu --workers 0 --batch-size 4 --pictures 3")
        assert results(two, f"results_{which}_test.json") == by_two
    names = ("boxes_test.png", "boxes_results_best_test.png")
    a, b = (np.asarray(Image.open(two / name)) for name in names)
    assert np.array_equal(a, b)


EVERY = "--pictures 3 --batch-size 4"
ON_VAL = f"{EVERY} --normalize ivr --percentile val --threshold 0.3"


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", [EVERY, ON_VAL, f"{EVERY} --score-maps maps --dataset tiny --image-size 64"]
)
def test_two_processes_evaluate_as_one(flags, trained, where, capsys):
    """Every file, bit for bit. 9 images in batches of 4: two for one process, one for the other."""
    of_run = "--score-maps" not in flags
    run("evaluate", f"{trained[1]} --device cpu --workers 0 {where} --save-maps maps")
    capsys.readouterr()
    flags = f"{f'{trained[1]} --device cpu' * of_run} {flags} {where} --workers 0"
    parts = {}
    for name in ("one", "two"):
        outputs = f"--out {name}/results.json --per-image {name}/images.csv"
        outputs += f" --save-maps {name}/maps" * of_run
        if name == "one":
            run("evaluate", f"{flags} {outputs}")
            printed = capsys.readouterr().out
        else:
            job = torchrun(f"{flags} {outputs}", REPOSITORY / "evaluate.py")
            assert job.returncode == 0, job.stderr
            assert job.stdout == printed.replace("one/", "two/")
        files = sorted(path for path in Path(name).rglob("*") if path.is_file())
        parts[name] = {path.relative_to(name): path.read_bytes() for path in files}
    assert len(parts["one"]) == 4 + 9 * of_run
    for path, expected in parts["one"].items():
        assert parts["two"].pop(path) == expected, path
    assert not parts["two"]


@pytest.mark.slow
def test_two_machines_are_one(trained, tmp_path):
    """Two torchrun agents on loopback, one process each, as on two machines."""
    flags = f"{trained[0]} {SPLIT}"
    run("train", f"{flags} --out {tmp_path}/one")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    agents = []
    for node in (0, 1):
        how = f"--nnodes 2 --node_rank {node} --master_addr 127.0.0.1 --master_port {port} --nproc_per_node 1"
        command = [*PROCESSES, *how.split(), "--", str(REPOSITORY / "train.py")]
        command += f"{flags} --out {tmp_path}/two".split()
        agents.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT))
    printed = [agent.communicate(timeout=300)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0]
    assert "epoch 2/2" in printed[0] and not printed[1]  # the first process alone prints
    close_runs(tmp_path / "one", tmp_path / "two")


DIES = """
import itertools, os, signal, sys
from torch.optim.optimizer import register_optimizer_step_post_hook
sys.path.insert(0, sys.argv.pop(1))
import train
from bridge_wsol.utils import one_line_errors

steps = itertools.count(1)

def die(*_):
    if next(steps) == 7 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)

register_optimizer_step_post_hook(die)
with one_line_errors():
    train.main()
"""


@pytest.mark.slow
def test_a_process_that_dies_ends_the_job_which_then_goes_on(trained, tmp_path):
    """In step 2 of 3 of the second epoch."""
    flags, script = f"{trained[0]} --drop-p 0", tmp_path / "dies.py"
    script.write_text(DIES)
    assert torchrun(f"{flags} --out {tmp_path}/whole").returncode == 0
    assert torchrun(f"{REPOSITORY} {flags} --out {tmp_path}/dies", script).returncode != 0
    assert load(tmp_path / "dies" / "last.pt")["epoch"] == 1
    assert torchrun(f"{flags} --out {tmp_path}/dies --resume").returncode == 0
    close_runs(tmp_path / "whole", tmp_path / "dies")


@pytest.mark.slow
def test_an_error_of_all_processes_is_said_once(trained, tmp_path):
    (tmp_path / "lists" / "tiny" / "val" / "class_labels.txt").write_text("nonsense\n")
    job = torchrun(f"{trained[0]} --out {tmp_path}/new")
    said = [line for line in job.stderr.splitlines() if line.startswith("error: ")]
    assert job.returncode != 0 and len(said) == 1 and "class_labels.txt:1" in said[0]


@pytest.mark.parametrize("n, batch_size, processes", [(17, 8, 4), (5, 4, 3)])
def test_the_shares_of_all_processes_are_the_batches_of_one(n, batch_size, processes, tmp_path):
    whole = list(EpochSampler(n, batch_size, seed=0))

    def share(rank):
        store = torch.distributed.FileStore(str(tmp_path / "store"), processes)
        torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=processes)
        sampler = EpochSampler(n, batch_size, seed=0)
        parts = [(part, *sampler.size(number)) for number, part in enumerate(sampler)]
        torch.save(parts, tmp_path / f"{rank}.pt")
        torch.distributed.barrier()  # none leaves before all are connected
        torch.distributed.destroy_process_group()

    assert in_forks(share, range(processes)) == [0] * processes
    shares = [torch.load(tmp_path / f"{rank}.pt") for rank in range(processes)]
    for batch, parts in zip(whole, zip(*shares, strict=True), strict=True):
        assert sorted(item for part, own, _ in parts for item in part[:own]) == sorted(batch)
        assert all(part and size == len(batch) for part, _, size in parts)  # nobody is without an image


@pytest.mark.slow
def test_the_scripts_end_bad_input_with_one_line_and_exit_code_2():
    for script, flags in (("evaluate.py", ["nowhere"]), ("train.py", ["--dataset", "nowhere"])):
        ended = program(sys.executable, REPOSITORY / script, *flags)
        assert ended.returncode == 2 and ended.stderr.count("\n") == 1 and "nowhere" in ended.stderr


def test_ctrl_c_and_sigterm_end_a_training_with_one_line_that_names_resume(trained, tmp_path):
    """Ctrl-C is signal 2, SIGTERM 15. Two workers, which leave the folder with the main process."""
    flags, whole = trained

    def train(number):
        signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal
        handle = register_optimizer_step_post_hook(lambda *_: os.kill(os.getpid(), number))
        with (tmp_path / "err").open("w") as sys.stderr, one_line_errors():
            run("train", f"{flags} --out {tmp_path}/{number} --workers 2")
        handle.remove()

    for number, code in ((2, 130), (15, 143)):
        assert in_forks(train, [number]) == [code]
        said = (tmp_path / "err").read_text()
        assert said.count("\n") == 1 and "--resume" in said and f"{tmp_path}/{number}" in said
        assert not (tmp_path / str(number) / ".lock").exists()
        run("train", f"{flags} --out {tmp_path}/{number} --resume")
        assert lines_of(tmp_path / str(number)) == lines_of(whole)


def test_a_full_disk_leaves_the_checkpoint_before(trained, fails):
    """A limit on the size of files stands in for a full disk: the checkpoint's write fails half-way."""
    flags, folder = trained
    before, limits = (folder / "last.pt").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resume = f"{flags} --epochs 3 --out {folder} --resume"
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        fails("train", resume, ".pt: cannot be written")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (folder / "last.pt").read_bytes() == before and not list(folder.glob(".*.part"))
    run("train", resume)  # with room again it goes on
    assert len(lines_of(folder)) == 3


def test_out_of_gpu_memory_is_one_line_that_names_the_flag(capsys):
    with pytest.raises(SystemExit) as end, one_line_errors():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has 80 GiB.")
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1
    assert "Tried to allocate 2.00 GiB" in said and "--batch-size" in said
    with pytest.raises(RuntimeError, match="shapes"), one_line_errors():  # a bug stays a bug
        raise RuntimeError("shapes cannot be multiplied")


def kill_own_process(_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_ends_the_evaluation_with_a_line():
    with pytest.raises(InputError, match="a worker process was killed .* --workers"):
        list(imap(kill_own_process, range(50), 2))


@pytest.mark.parametrize("workers", [0, 2])
def test_ordered_map_keeps_the_order_and_does_not_run_ahead(workers):
    made = []

    def items():
        for i in range(40):
            made.append(i)
            yield -i

    pairs = imap(abs, items(), workers)
    assert next(pairs) == (0, 0) and len(made) <= 9
    assert list(pairs) == [(-i, i) for i in range(1, 40)]


def test_workers_do_not_outlive_a_killed_process():
    """Its workers hold the pipe, which ends when the last of them is gone."""
    reader, writer = os.pipe()

    def work(_):
        for i, _ in enumerate(imap(time.sleep, [0.02] * 9, 2)):
            if i == 3:
                kill_own_process(i)

    assert in_forks(work, [None]) == [-signal.SIGKILL]
    os.close(writer)
    assert select.select([reader], [], [], 10)[0]
    os.close(reader)


def test_several_first_runs_all_end_with_whole_images(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "DEMO_COUNTS", {"train": 16, "val": 16, "test": 16})
    begun = FORK.Barrier(3)

    def first_run(said):
        begun.wait()
        with said.open("w") as file, redirect_stdout(file):
            splits, _ = load_splits("demo", tmp_path / "data", tmp_path / "lists")
            sizes = [split.path(i).stat().st_size for split in splits.values() for i in range(len(split))]
            print(f"{len(sizes)} images of {sum(sizes)} bytes")

    said = [tmp_path / f"{i}.txt" for i in range(3)]
    assert in_forks(first_run, said) == [0, 0, 0]
    last = {path.read_text().splitlines()[-1] for path in said}
    assert len(last) == 1 and last.pop().startswith("48 images of ")
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["demo"]
    masks = (tmp_path / "data" / "demo" / "masks").rglob("*.png")
    assert all(Image.open(path).getbbox() for path in masks)  # decodes them


def test_two_writers_of_a_file_do_not_meet_and_only_files_are_replaced(tmp_path):
    path = tmp_path / "runs" / "table[1].md"
    with atomic_write(path) as first, atomic_write(path) as second:
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first" and list(path.parent.iterdir()) == [path]  # the outer block ended last
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as part:
        part.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "first" and list(path.parent.iterdir()) == [path]
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="pipe"), atomic_write(tmp_path / "pipe"):
        pass
    assert (tmp_path / "pipe").is_fifo()


def test_a_log_gets_a_line_a_minute_with_the_rate_and_the_time_left(monkeypatch, capsys):
    now = [100.0]
    utils.set_quiet(False)  # as a main of another test may have left it
    monkeypatch.setattr(utils.time, "monotonic", lambda: now[0])
    for _ in utils.progress(range(150), "drawing", 300):
        now[0] += 1
    lines = [f"drawing: {60 * n} of 300 images, 1.0/s, 0:0{5 - n}:00 left" for n in (1, 2)]
    assert capsys.readouterr().err.splitlines() == lines
