"""Long runs: several processes, signals, non-finite losses, full disks, the cache, the progress line."""

import errno
import io
import itertools
import multiprocessing
import os
import platform
import re
import shutil
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
from conftest import REPOSITORY
from PIL import Image
from test_train import lines_of, read_json, same_run, weights

import evaluate
import train
from bridge_wsol import datasets, demo, evaluation, utils
from bridge_wsol.data import EpochSampler, TrainImages, resized_pixels, split_loaders, test_loader
from bridge_wsol.datasets import load_splits
from bridge_wsol.utils import InputError, atomic_write

PROGRAM = str(REPOSITORY / "tests" / "tiny_train.py")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
NO_DROPOUT = ["--p", "0"]


def torchrun(*arguments, die_at=0, rank=0):
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "--",
        PROGRAM,
        str(die_at),
        str(rank),
    ]
    return subprocess.run(
        [*launch, *map(str, arguments)], capture_output=True, text=True, env=ENVIRONMENT, timeout=120
    )


def test_two_processes_are_one_with_the_same_batches(trained, tmp_path):
    flags, _ = trained
    flags = [
        *flags,
        *NO_DROPOUT,
        "--warm-batch-size",
        "17",
        "--batch-size",
        "4",
        "--epochs",
        "2",
    ]  # 18 images: 17 + 1, then 4 ... 4 + 2
    train.main([*flags, "--out", str(tmp_path / "one")])
    both = torchrun(*flags, "--out", tmp_path / "two")
    assert both.returncode == 0, both.stderr
    one, two = (weights(tmp_path / name / "last.pt") for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-5)
    for a, b in zip(lines_of(tmp_path / "one"), lines_of(tmp_path / "two"), strict=True):
        for name in a.keys() - {"val"}:
            assert a[name] == pytest.approx(b[name], abs=1e-5), name
    assert both.stdout.count("epoch 1/2") == both.stdout.count("written to") == 1  # one of them speaks

    # The same weights, evaluated by one process and by two, give the same results; 9 is not divisible by 2.
    shutil.copytree(tmp_path / "one", tmp_path / "again")
    for name in ("best", "last"):
        (tmp_path / "again" / f"results_{name}_test.json").unlink()
    assert torchrun(*flags, "--out", tmp_path / "again", "--resume").returncode == 0
    for name in ("best", "last"):
        assert read_json(tmp_path / "again" / f"results_{name}_test.json") == read_json(
            tmp_path / "one" / f"results_{name}_test.json"
        )


def test_a_process_that_dies_ends_the_job_with_a_line(trained, tmp_path):
    flags, _ = trained
    job = torchrun(*flags, "--epochs", "3", "--out", tmp_path / "dies", die_at=8, rank=1)
    # The other process meets the lost connection or torchrun's SIGTERM, whichever is first.
    said = [
        line for line in job.stderr.splitlines() if line.startswith(("error: ", "interrupted in epoch 2"))
    ]
    assert job.returncode != 0 and len(said) == 1, job.stderr
    assert ("process 0 of 2" in said[0] or said[0].startswith("interrupted")) and "--resume" in said[0]
    torch.load(tmp_path / "dies" / "last.pt", weights_only=True)


@pytest.mark.slow
def test_two_processes_stop_together_and_their_resumed_epoch_has_the_same_means(trained, tmp_path):
    flags = [*trained[0], *NO_DROPOUT, "--epochs", "2"]
    assert torchrun(*flags, "--out", tmp_path / "whole").returncode == 0
    stopped = [*flags, "--out", tmp_path / "stopped"]
    assert torchrun(*stopped, die_at=-7, rank=1).returncode != 0  # epoch 2, step 2 of 3
    progress = torch.load(tmp_path / "stopped" / "last.pt", weights_only=True)["progress"]
    assert progress["step"] == 2
    assert torchrun(*stopped, "--resume").returncode == 0
    for a, b in zip(lines_of(tmp_path / "whole"), lines_of(tmp_path / "stopped"), strict=True):
        for name in a.keys() - {"val"}:
            assert a[name] == pytest.approx(b[name], rel=1e-5), name


def test_an_error_of_all_processes_is_said_once(trained, tmp_path):
    flags, _ = trained
    (tmp_path / "splits" / "tiny" / "val" / "class_labels.txt").write_text("nonsense\n")
    job = torchrun(*flags, "--out", tmp_path / "new")
    said = [line for line in job.stderr.splitlines() if line.startswith("error: ")]
    assert job.returncode != 0 and len(said) == 1 and "class_labels.txt:1" in said[0]


@pytest.mark.slow
def test_two_machines_are_one(trained, tmp_path):
    """Two torchrun agents on loopback, one process each, as on two machines."""
    flags, _ = trained
    flags = [*flags, *NO_DROPOUT, "--epochs", "2"]
    train.main([*flags, "--out", str(tmp_path / "one")])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    agents = []
    for node in ("0", "1"):
        where = ["--nnodes", "2", "--node_rank", node, "--master_addr", "127.0.0.1", "--master_port", port]
        launch = [sys.executable, "-m", "torch.distributed.run", *where, "--nproc_per_node", "1"]
        command = [*launch, "--", PROGRAM, "0", "0", *flags, "--out", str(tmp_path / "two")]
        agents.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT))
    printed = [agent.communicate(timeout=120)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0]
    assert "epoch 2/2" in printed[0] and not printed[1]  # the first process alone prints
    one, two = (weights(tmp_path / name / "last.pt") for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-5)


@pytest.mark.parametrize("n, batch_size, world_size", [(18, 4, 2), (17, 8, 4), (5, 4, 3), (3, 8, 4)])
def test_the_shares_of_all_processes_are_the_batches_of_one(n, batch_size, world_size):
    alone = EpochSampler(n, batch_size, seed=0)
    shares = [EpochSampler(n, batch_size, 0, rank, world_size) for rank in range(world_size)]
    for number, (whole, parts) in enumerate(zip(alone, zip(*shares, strict=True), strict=True)):
        counted = [part[: share.size(number)[0]] for part, share in zip(parts, shares)]
        assert sorted(item for part in counted for item in part) == sorted(whole)
        assert all(share.size(number)[1] == len(whole) for share in shares) and all(
            parts
        )  # nobody is without an image
    assert len({len(list(share)) for share in shares}) == 1 and len(alone) == number + 1


def test_test_images_are_shared_out_without_repetition(trained, tmp_path):
    split = load_splits("tiny", tmp_path / "data", tmp_path / "splits", ("test",))[0]["test"]
    loaders = [test_loader(split, 2, image_size=64, workers=0, rank=rank, world_size=4) for rank in range(4)]
    seen = [index for loader in loaders for _, _, indices in loader for index in indices.tolist()]
    assert sorted(seen) == list(range(9))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_inside_an_epoch_saves_and_the_run_goes_on_as_if_nothing_had_happened(
    trained, tmp_path, number, monkeypatch, fails
):
    flags, run = trained
    steps, whole = [], train.TrainingStep.forward

    def forward(*args):
        steps.append(1)
        if len(steps) == 7:  # epoch 1 has 5 steps of 4 images, epoch 2 has 3 of 8
            os.kill(os.getpid(), number)
        return whole(*args)

    monkeypatch.setattr(train.TrainingStep, "forward", forward)
    with pytest.raises(utils.Stopped, match="epoch 2, step 2 of 3: rerun with --resume"):
        train.main([*flags, "--out", str(tmp_path / "stopped")])
    assert len(lines_of(tmp_path / "stopped")) == 1 and not same_weights(run, tmp_path / "stopped")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    # Its weights are no result of epoch 1, neither for evaluate.py nor at the end of a shorter run.
    argv = [tmp_path / "stopped", "--checkpoint", "last", "--device", "cpu"]
    fails(evaluate.main, argv, "last.pt", "epoch 2, after step 2", "--resume", "--checkpoint best")
    argv = [*flags, "--out", tmp_path / "stopped", "--resume", "--epochs", "1"]
    fails(train.main, argv, "--epochs 1", "at least 2")
    train.main([*flags, "--workers", "2", "--out", str(tmp_path / "stopped"), "--resume"])
    assert len(steps) == 8 and same_run(run, tmp_path / "stopped")


def same_weights(a, b):
    ours, theirs = weights(a / "last.pt"), weights(b / "last.pt")
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_signal_during_validation_repeats_it(trained, tmp_path, monkeypatch):
    flags, run = trained
    with monkeypatch.context() as patch:
        whole = evaluation.network_maps
        patch.setattr(
            evaluation,
            "network_maps",
            lambda *a, **k: (os.kill(os.getpid(), signal.SIGTERM), whole(*a, **k))[1],
        )
        with pytest.raises(utils.Stopped, match="epoch 1, step 5 of 5"):
            train.main([*flags, "--out", str(tmp_path / "stopped")])
    assert lines_of(tmp_path / "stopped") == [] if (tmp_path / "stopped" / "log.jsonl").exists() else True
    train.main([*flags, "--out", str(tmp_path / "stopped"), "--resume"])
    assert same_run(run, tmp_path / "stopped")


@pytest.mark.parametrize("at", [2, 6])
def test_a_loss_that_is_not_finite_is_named_with_its_step(trained, tmp_path, monkeypatch, at):
    flags, _ = trained
    steps, whole = [], train.TrainingStep.forward

    def forward(*args):
        losses = whole(*args)
        steps.append(1)
        if len(steps) == at:
            losses.terms["l_drop"] = 3.0, losses.terms["l_drop"][1] * float("nan")
        return losses

    monkeypatch.setattr(train.TrainingStep, "forward", forward)
    epoch, step = {2: (1, 2), 6: (2, 1)}[at]
    with pytest.raises(
        InputError, match=rf"non-finite loss in epoch {epoch}, step {step}/.* \(.*l_ce \d.*l_drop nan.*--lr"
    ) as error:
        train.main([*flags, "--out", str(tmp_path / "new")])
    assert len(steps) == at and "top1" not in str(error.value)
    if epoch == 2:
        kept = torch.load(tmp_path / "new" / "last.pt", weights_only=True)
        assert kept["epoch"] == 1 and all(value.isfinite().all() for value in kept["model"].values())


def test_a_full_disk_leaves_the_checkpoint_before(trained, fails, tmp_path):
    """A limit on the size of files stands in for a full disk: the checkpoint's write fails half-way."""
    flags, run = trained
    before = (run / "last.pt").read_bytes()
    limit = len(before) // 2
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); sys.argv = sys.argv[1:];"
        "import runpy; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            code,
            PROGRAM,
            "0",
            "0",
            *flags,
            "--epochs",
            "3",
            "--out",
            str(run),
            "--resume",
        ],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=60,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert re.search(r"error: .*\.pt: cannot be written", done.stderr)
    assert (run / "last.pt").read_bytes() == before and not list(run.glob(".*.part"))
    train.main([*flags, "--epochs", "3", "--out", str(run), "--resume"])  # with room again it goes on
    assert len(lines_of(run)) == 3


def test_the_cache_changes_nothing_but_the_time(trained, tmp_path):
    flags, run = trained
    cache = tmp_path / "cache"
    train.main([*flags, "--cache", str(cache), "--out", str(tmp_path / "cached")])
    assert same_run(run, tmp_path / "cached")
    (file,) = cache.iterdir()
    made = file.stat().st_mtime_ns
    train.main([*flags, "--cache", str(cache), "--workers", "2", "--out", str(tmp_path / "again")])
    assert same_run(run, tmp_path / "again") and [path.stat().st_mtime_ns for path in cache.iterdir()] == [
        made
    ]


def test_crops_of_the_cache_need_no_workers_on_the_cpu(trained, monkeypatch):
    """Worker processes would take the cores from the network. A GPU waits for the input instead."""
    flags, run = trained
    splits = load_splits("tiny", Path(flags[3]), Path(flags[5]), ("train", "val", "test"))[0]
    config = read_json(run / "config.json")["config"]
    config = {name: entry["value"] for name, entry in config.items()} | {"workers": 2}
    pixels = np.zeros((18, 72, 72, 3), dtype=np.uint8)
    for gpu, kept, expected in ((False, pixels, 0), (False, None, 2), (True, pixels, 2)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        loaders = split_loaders(splits, config, kept)
        of_train = {loader.num_workers for name, loader in loaders.items() if isinstance(name, int)}
        assert of_train == {expected} and loaders["test"].num_workers == 2


def test_a_full_disk_ends_the_caching_with_a_line(trained, tmp_path, monkeypatch):
    """Without the reservation of its space a memory-mapped file kills the process (SIGBUS)."""

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    split = load_splits("tiny", tmp_path / "data", tmp_path / "splits", ("train",))[0]["train"]
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(InputError, match="cache/tiny_train.*npy: cannot be written .No space left"):
        resized_pixels(split, 72, tmp_path / "cache", 0)
    assert not list((tmp_path / "cache").iterdir())


def test_the_cache_is_of_these_images(trained, fails, tmp_path):
    split = load_splits("tiny", tmp_path / "data", tmp_path / "splits", ("train",))[0]["train"]
    pixels = resized_pixels(split, 20, tmp_path / "cache", workers=2)
    plain, cached = TrainImages(split, 20, 16, seed=0), TrainImages(split, 20, 16, 0, pixels)
    for item in ((1, 0), (1, 17), (2, 5)):
        assert torch.equal(plain[item][0], cached[item][0]) and plain[item][1] == cached[item][1]
    first = split.path(0)
    first.write_bytes(split.path(1).read_bytes())
    os.utime(first, ns=(0, time.time_ns()))
    again = resized_pixels(split, 20, tmp_path / "cache", workers=0)
    assert (
        np.array_equal(again[0], pixels[1])
        and not np.array_equal(pixels[0], pixels[1])
        and len(list((tmp_path / "cache").iterdir())) == 2
    )
    split.path(2).write_bytes(b"no image")
    with pytest.raises(InputError, match=split.ids[2]):
        resized_pixels(split, 20, tmp_path / "cache", workers=0)
    assert len(list((tmp_path / "cache").iterdir())) == 2  # nothing half-made


def test_classes_without_images_are_a_warning(trained, tmp_path, capsys):
    flags, _ = trained
    labels = tmp_path / "splits" / "tiny" / "train" / "class_labels.txt"
    labels.write_text(re.sub(r",2$", ",4", labels.read_text(), flags=re.MULTILINE))
    train.main([*flags, "--epochs", "1", "--out", str(tmp_path / "new")])
    printed = capsys.readouterr().out
    assert re.search(r"warning: 2 of the 5 classes have no image in .*train: 2, 3", printed)
    assert read_json(tmp_path / "new" / "config.json")["data"]["num_classes"] == 5


def test_out_of_gpu_memory_is_one_line_that_names_the_flag(tiny, fails, tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has 80 GiB.")

    monkeypatch.setattr(train.TrainingStep, "forward", full)
    words = "out of GPU memory", "Tried to allocate 2.00 GiB", "smaller --batch-size"
    fails(train.main, [*tiny, "--out", tmp_path / "run"], *words)


def test_workers_do_not_outlive_a_killed_process():
    program = """
import os, signal, time
from bridge_wsol.processes import ordered_map

def work(_):
    time.sleep(0.02)

for i, _ in enumerate(ordered_map(work, range(9), 2)):
    if i == 3:
        os.kill(os.getpid(), signal.SIGKILL)
"""
    # Its workers hold the pipe of its output: run() returns when the last of them is gone.
    killed = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY, timeout=60
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc's")
def test_the_memory_of_freed_tensors_is_used_again():
    """Counted in page faults: the system hands 100 MB out in some 25,000 of them, each time or once."""
    program = """
import resource, torch
from bridge_wsol.utils import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(2):
        torch.ones(25_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults())
keep_freed_memory()
print(min(faults() for _ in range(20)))  # the first fill the heap; the system may take pages back
"""
    environment = {
        key: value
        for key, value in ENVIRONMENT.items()
        if not key.startswith(("MALLOC_", "LD_PRELOAD", "GLIBC_TUNABLES"))
    }
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=environment,
        timeout=60,
    )
    before, after = map(int, done.stdout.split())
    assert after < before / 20, (before, after)


# ------------------------------------------------------------------------- several runs at the same time


FORK = multiprocessing.get_context("fork")  # quicker than a new interpreter


def test_several_first_runs_all_end_with_whole_images(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "DEMO_COUNTS", {"train": 64, "val": 16, "test": 16})
    begun = FORK.Barrier(3)

    def first_run(said):
        begun.wait()
        with said.open("w") as file, redirect_stdout(file):
            splits, _ = load_splits("demo", tmp_path / "data", tmp_path / "splits", ("train", "val", "test"))
            sizes = [split.path(i).stat().st_size for split in splits.values() for i in range(len(split))]
            print(f"{len(sizes)} images of {sum(sizes)} bytes")

    said = [tmp_path / f"{i}.txt" for i in range(3)]
    started = [FORK.Process(target=first_run, args=(path,)) for path in said]
    for process in started:
        process.start()
    for process in started:
        process.join()
    said = [path.read_text().splitlines() for path in said]
    assert [process.exitcode for process in started] == [0, 0, 0]
    assert any(line.startswith("drawing 96 images into") for lines in said for line in lines)
    assert len({lines[-1] for lines in said}) == 1 and said[0][-1].startswith("96 images of ")
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["demo"]
    masks = (tmp_path / "data" / "demo" / "masks").rglob("*.png")
    assert all(Image.open(path).getbbox() for path in masks)  # decodes them


def test_the_lock_of_a_download_ends_with_its_process(tmp_path, monkeypatch):
    inside, again, folder = FORK.Event(), FORK.Event(), tmp_path / "data"
    folder.mkdir()

    def hold(event, seconds):
        with datasets._one_at_a_time(folder):
            event.set()
            time.sleep(seconds)

    first = FORK.Process(target=hold, args=(inside, 60))
    second = FORK.Process(target=hold, args=(again, 0))
    first.start()
    inside.wait()
    second.start()
    assert not again.wait(0.5)
    first.kill()
    assert again.wait(30)
    first.join()
    second.join()
    assert second.exitcode == 0 and list(folder.iterdir()) == []

    def unsupported(*_):
        raise OSError

    monkeypatch.setattr(datasets.fcntl, "flock", unsupported)  # a file system without locks: no waiting
    hold(again, 0)


def test_two_writers_of_a_file_do_not_meet_and_what_a_killed_one_left_is_removed(tmp_path):
    path = tmp_path / "runs" / "table[1].md"
    with atomic_write(path) as first, atomic_write(path) as second:
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first" and list(path.parent.iterdir()) == [path]  # the outer block ended last
    for name in (f".{path.name}.0123abcd.part", ".table1.md.0123abcd.part"):
        (path.parent / name).write_text("half")
    with atomic_write(path, one_writer=True) as part:
        part.write_text("whole")
    assert path.read_text() == "whole" and sorted(path.parent.iterdir()) == [
        path.parent / ".table1.md.0123abcd.part",
        path,
    ]


# ------------------------------------------------------------------------------------------ progress


class Stderr(io.StringIO):
    def __init__(self, terminal):
        super().__init__()
        self.terminal = terminal

    def isatty(self):
        return self.terminal


@pytest.fixture
def clock(monkeypatch):
    """clock(seconds) lets time pass for Progress."""
    now = [100.0]
    monkeypatch.setattr(utils.time, "monotonic", lambda: now[0])

    def wait(seconds):
        now[0] += seconds

    return wait


def show_each_second(clock, seconds, total):
    with utils.Progress("drawing", total) as progress:
        for second in range(1, seconds + 1):
            clock(1)
            progress.show(2 * second, lambda: ", well")


def test_a_terminal_shows_one_line_at_most_twice_a_second_and_erases_it(monkeypatch, clock):
    monkeypatch.setattr(sys, "stderr", Stderr(terminal=True))
    with utils.Progress("drawing", 40) as progress:
        for done in range(1, 31):
            clock(0.125)
            progress.show(done, lambda: ", well")
    lines = sys.stderr.getvalue().split("\r")[1:]
    assert len(lines) == 8 and "\n" not in sys.stderr.getvalue()  # seven in 3.75 seconds, then nothing
    assert lines[0] == "drawing: 4 of 40 images, 8.0/s, 0h00m04s left, well\x1b[K" and lines[-1] == "\x1b[K"


def test_a_log_gets_a_line_a_minute_and_one_at_the_end(monkeypatch, clock):
    monkeypatch.setattr(sys, "stderr", Stderr(terminal=False))
    show_each_second(clock, seconds=150, total=300)
    lines = sys.stderr.getvalue().splitlines()
    assert lines == [
        "drawing: 120 of 300 images, 2.0/s, 0h01m30s left, well",
        "drawing: 240 of 300 images, 2.0/s, 0h00m30s left, well",
        "drawing: 300 of 300 images, 2.0/s, 0h00m00s left",
    ]


def test_short_jobs_quiet_ones_and_other_processes_write_nothing(monkeypatch, clock):
    monkeypatch.setattr(sys, "stderr", Stderr(terminal=False))
    show_each_second(clock, seconds=59, total=300)
    with monkeypatch.context() as patch:
        patch.setattr(utils.Progress, "quiet", True)
        show_each_second(clock, seconds=150, total=300)
    with monkeypatch.context() as patch:
        patch.setattr(utils, "rank", lambda: 1)
        show_each_second(clock, seconds=150, total=300)
    assert sys.stderr.getvalue() == ""


def test_training_and_evaluation_show_how_far_they_are(trained, tmp_path, monkeypatch):
    flags, _ = trained
    monkeypatch.setattr(sys, "stderr", Stderr(terminal=True))
    times = itertools.count()
    monkeypatch.setattr(
        utils.time, "monotonic", lambda: float(next(times))
    )  # each look at the clock takes 1 s
    train.main([*flags, "--out", str(tmp_path / "shown")])
    shown = sys.stderr.getvalue()
    for pattern in (
        r"\repoch 1/2: 1 of 5 steps, .*left  loss \d\.\d{4}  l_ce .*  l_drop .* images/s, .* in the run\x1b",
        r"\repoch 2/2: 3 of 3 steps, .*l_sim .*l_norm ",
        r"\rtiny val: 6 of 6 images",
        r"\rtiny test: 9 of 9 images",
    ):
        assert re.search(pattern, shown), pattern
    sys.stderr = Stderr(terminal=True)
    train.main([*flags, "--out", str(tmp_path / "quiet"), "--quiet"])
    assert sys.stderr.getvalue() == "" and same_run(tmp_path / "shown", tmp_path / "quiet")
    utils.Progress.quiet = False
