"""Errors, values of a configuration, files, progress, devices, processes."""

from __future__ import annotations

import argparse
import ctypes
import errno
import json
import multiprocessing
import os
import platform
import random
import re
import secrets
import signal
import statistics
import sys
import tempfile
import threading
import time
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as nnf

T = TypeVar("T")
R = TypeVar("R")


# ------------------------------------------------------------------------------------------------ errors


class InputError(Exception):
    """Bad input. The message is one line: the problem with its file, line or flag, then the fix."""


class Parser(argparse.ArgumentParser):
    """argparse that reports an error in one line."""

    def error(self, message: str) -> NoReturn:
        """Raises InputError."""
        raise InputError(f"{message} ({self.prog} --help lists the flags)")


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Around a script's main: bad input is one line on stderr and exit code 2, Ctrl-C exit code 130."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # file names of any bytes
    code = 2
    try:
        yield
        sys.stdout.flush()
        return
    except InputError as error:
        # A data loader's worker sends its error as text inside a traceback: the message is the last line.
        message = str(error).strip().splitlines()[-1].rsplit(f"{InputError.__name__}: ", 1)[-1]
    except torch.OutOfMemoryError as error:
        message = f"out of GPU memory ({first_line(error)}): pass a smaller --batch-size"
    except OSError as error:
        if error.filename is None and error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise  # not of the output
        message = f"{error.filename or 'output'}: {error.strerror}"
        if error.filename is None:  # of stdout: the exit must not write to it again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt as interrupt:
        message, code = interrupt.args or ("interrupted", 130)
    # Before the processes join, all of a machine raise the same error.
    if world_size() > 1 or os.environ.get("LOCAL_RANK", "0") == "0":
        # On a terminal, the line of a progress that was interrupted is erased.
        sys.stderr.write("\r\x1b[K" * sys.stderr.isatty() + "error: " * (code == 2) + f"{message}\n")
    sys.exit(code)


@contextmanager
def last_words(line: str) -> Iterator[None]:
    """The line with which `one_line_errors` ends after Ctrl-C and SIGTERM inside; exit codes 130 and 143."""

    def end(number: int, _: Any) -> None:
        # Workers may have got the signal, too: torch would raise an error about it.
        signal.signal(signal.SIGCHLD, lambda *_: None)
        raise KeyboardInterrupt(number)

    # torchrun ends its processes by SIGTERM: Python would handle it after the collective that they wait in.
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
    own = alone and threading.current_thread() is threading.main_thread()  # no other may set a handler
    before = signal.signal(signal.SIGTERM, end) if own else None
    try:
        yield
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(line, 128 + (interrupt.args or (signal.SIGINT,))[0]) from None
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def first_line(error: Any) -> str:
    """What the system says of an OSError, else the first line of the message; at most 120 characters."""
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return text.splitlines()[0][:120]


# -------------------------------------------------------------------------------- values of a configuration


@dataclass(frozen=True)
class Value:
    """A number or word of a run's configuration: the flag --name-with-dashes, and what it may be.

    allowed: the words, or an interval such as "[0, 1)" or "(0, inf)"; None: anything of its kind. Words in a
    dictionary are read when they are needed: methods register themselves at any time.
    default: a value, or a function of (data set, architecture). source: where the default is from.
    resume: whether it may change on --resume.
    """

    kind: Callable[[str], Any]  # int, float, str, or another function of a flag's text
    default: Any = None
    help: str = ""
    allowed: tuple[str, ...] | dict[str, Any] | str | None = None
    source: str = "default"
    resume: bool = False

    def check(self, name: str, value: Any) -> None:
        """Raises InputError for a value that is not allowed."""
        if isinstance(self.allowed, tuple | dict):
            fits, rule = value in self.allowed, f"must be {' or '.join(self.allowed)}"
        elif self.allowed:
            low, high = map(float, self.allowed[1:-1].split(","))
            above = value >= low if self.allowed[0] == "[" else value > low
            fits = above and (value <= high if self.allowed[-1] == "]" else value < high)
            rule = f"must be in {self.allowed}"
        else:
            return
        if not fits:
            raise InputError(f"{flag(name)} {value}: {rule}")

    def default_for(self, dataset: str, arch: str) -> Any:
        """The default on a data set, for an architecture."""
        return self.default(dataset, arch) if callable(self.default) else self.default


def flag(name: str) -> str:
    """The flag of a value: --lambda-sim for lambda_sim. torchrun takes --p for one of its own flags."""
    return "--drop-p" if name == "p" else f"--{name.replace('_', '-')}"


# -------------------------------------------------------------------------------------------------- files


def user_path(text: str) -> Path:
    """The type of a flag: a path. A shell does not expand ~ in --out=~/runs."""
    return Path(text).expanduser()


@contextmanager
def own_folder(folder: Path, resume: bool) -> Iterator[None]:
    """Around a run: its folder belongs to this process, and to those that torchrun started with it.

    A new folder is made at once, and removed at the end if nothing was written into it. A lock, which the
    system frees when the process dies, keeps a second process away. Parts of files that a kill has left are
    removed. Raises InputError for a folder that exists (resume False), or that another process uses.
    """
    if environment_rank() > 0:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=resume)
        lock = (folder / ".lock").open("a")
    except FileExistsError:
        fix = "pass --resume to continue it, pass another --out, or remove it"
        raise InputError(f"{folder}: exists: {fix}") from None
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({first_line(error)})") from error
    with lock:
        try:
            import fcntl  # not on Windows

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for part in folder.glob(".*.part"):
                part.unlink()
        except BlockingIOError:
            problem = "another process trains in this folder: wait for it, or pass another --out"
            raise InputError(f"{folder}: {problem}") from None
        except (ImportError, OSError):  # some network disks have no locks
            pass
        try:
            yield
        finally:
            (folder / ".lock").unlink(missing_ok=True)
            with suppress(OSError):  # it has files
                folder.rmdir()


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Makes the folder of `path`. Raises InputError if that, or what is done inside, fails."""
    try:
        if path.exists() and not path.is_file():
            raise OSError("not a regular file")  # /dev/null would be replaced
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({first_line(error)})") from error


def try_write(path: Path) -> None:
    """Raises InputError if no file can be written at this path: before the work whose result it takes."""
    with _writing(path):
        tempfile.TemporaryFile(dir=path.parent).close()


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; renames it to `path` at the end, or removes it after an error.

    Readers never see a half-written file. Raises InputError if the file cannot be written.
    """
    path = Path(path)
    part = path.with_name(f".{path.name[:50]}.{secrets.token_hex(4)}.part")  # file systems allow 255 bytes
    try:
        with _writing(path):
            yield part
            os.replace(part, path)
    finally:
        with suppress(OSError):
            part.unlink()


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text, all or nothing."""
    with atomic_write(path) as part:
        part.write_text(text, encoding="utf-8", errors="surrogateescape")  # file names of any bytes


def write_json(path: Path, value: Any) -> None:
    """Writes JSON, all or nothing. Raises ValueError for NaN and infinity."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path, made_by: str) -> dict[str, Any]:
    """A file that the command `made_by` writes. Raises InputError, naming that command."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("not a dictionary")
        return value
    except (OSError, ValueError, RecursionError) as error:
        problem = f"cannot be read ({first_line(error)})"
        raise InputError(f"{path}: {problem}; it is made by: {made_by}") from error


def save_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Writes tensors, numbers, strings, lists and dicts, all or nothing, for `load_tensors`."""
    with atomic_write(path) as part, part.open("wb") as file:
        try:
            torch.save(checkpoint, file)  # with a path, torch would store its name
        except RuntimeError as error:  # torch's error for a full disk
            raise OSError(first_line(error)) from error


def load_tensors(path: Path) -> dict[str, Any]:
    """Reads a file of `save_checkpoint` or torch.save onto the CPU, without executing code in it.

    Raises InputError if it is missing, damaged, or contains other objects.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as records:  # torch writes checksums but does not verify them
                if (damaged := records.testzip()) is not None:
                    raise ValueError(f"wrong checksum of {damaged}")
        value = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(value, dict):
            raise ValueError(f"it holds a {type(value).__name__}")
        return value
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:  # torch raises many types
        problem = f"damaged, or not a file of tensors by name ({first_line(error)})"
        if held := re.search(r"GLOBAL ([\w.]+)", str(error)):
            problem = f"holds a {held[1]}, which could run code and is not loaded: save its state_dict alone"
        raise InputError(f"{path}: {problem}") from error


# ----------------------------------------------------------------------------------------------- progress


def progress(
    items: Iterable[T], what: str, total: int, unit: str = "images", note: Callable[[], str] = str
) -> Iterator[T]:
    """Yields the items, and shows on stderr how many of `total` are done. note: more text, called when shown.

    On a terminal one line is rewritten, elsewhere a line is written every minute; by the first process alone,
    and not with --quiet.
    """
    terminal, started = sys.stderr.isatty(), time.monotonic()
    shown = started if rank() == 0 and not _quiet else float("inf")
    for done, item in enumerate(items, 1):
        yield item
        now, done = time.monotonic(), min(done, total)  # a process's share may be a batch larger
        if now - shown >= (0.5 if terminal else 60):
            speed, shown = done / (now - started), now
            line = f"{what}: {done} of {total} {unit}, {speed:.1f}/s"
            line += f", {duration((total - done) / speed)} left{note()}"
            sys.stderr.write(f"\r{line}\x1b[K" if terminal else f"{line}\n")
            sys.stderr.flush()
    if terminal and shown not in (started, float("inf")):
        sys.stderr.write("\r\x1b[K")


_quiet = False


def set_quiet(quiet: bool) -> None:
    """--quiet: whether `progress` shows nothing."""
    global _quiet
    _quiet = quiet


def duration(seconds: float) -> str:
    """Seconds as 0:05:09."""
    return str(timedelta(seconds=round(seconds)))


# ------------------------------------------------------------------------------------- devices and randomness


def resolve_device(name: str) -> torch.device:
    """The device of --device; "auto" takes a GPU where there is one. Under torchrun each process has its own.

    Raises InputError for a device that torch does not know or cannot use.
    """
    if name in ("auto", "cuda") and torch.cuda.is_available():
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    elif name == "auto":
        name = "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device).tolist()  # "meta" has no values
    except (RuntimeError, AssertionError) as error:
        problem = f"cannot be used ({first_line(error)})"
        raise InputError(f"device {name}: {problem}: pass cpu") from error
    return device


def keep_freed_memory() -> None:
    """Lets arrays on the CPU reuse freed memory, where the C library is glibc.

    glibc returns large blocks to the system, which zeroes every page before it hands them out again: 6 %
    (VGG16) to 18 % (ResNet50) of a float32 training step, a fifth of the sweep over thresholds.
    """
    if platform.libc_ver()[0] == "glibc":
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # never


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """The context of a forward pass. amp: "bf16" or "off", of `resolve_amp`; KeyError for another one."""
    enabled = {"bf16": True, "off": False}[amp]
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


BF16_GAIN = 1.3  # of a convolution on the CPU, from which on --amp auto takes bf16


def resolve_amp(amp: str, device: torch.device) -> tuple[str, str]:
    """("bf16" or "off", source) of --amp on this device.

    "auto": bf16 on a GPU that has instructions for it, and on such a CPU if it is BF16_GAIN times as fast as
    float32: CPUs with AVX-512 but without AMX can be slower in it.
    """
    if amp != "auto":
        return amp, "flag"
    if device.type == "cuda":
        fast, source = torch.cuda.is_bf16_supported(including_emulation=False), "auto: what the GPU supports"
    else:  # Private functions of torch: where they are gone, the CPU runs in float32.
        instructions = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        fast, source = any(getattr(torch.cpu, name, bool)() for name in instructions), "auto: no bf16 here"
        if fast:
            bf16, float32 = convolution_speed("bf16"), convolution_speed("off")
            fast = bf16 >= BF16_GAIN * float32
            source = f"auto: bf16 {bf16:.0f}, float32 {float32:.0f} GFLOP/s"
    return "bf16" if fast else "off", source


def convolution_speed(amp: str) -> float:
    """GFLOP/s of a 3 x 3 convolution on the CPU, forward and backward: the median of five, some 0.1 s."""
    shapes = (2, 128, 28, 28), (128, 128, 3, 3)
    values = (torch.ones(shape) for shape in shapes)  # not drawn: the random state stays
    images, weight = (x.to(memory_format=torch.channels_last).requires_grad_() for x in values)
    seconds = []
    for _ in range(6):
        started = time.perf_counter()
        with autocast(torch.device("cpu"), amp):
            product = nnf.conv2d(images, weight, padding=1)
        product.sum().backward()
        seconds.append(time.perf_counter() - started)
    return 3 * 2 * product.numel() * weight[0].numel() / statistics.median(seconds[1:]) / 1e9


def cores() -> int:
    """CPU cores that this process may use, at most 8: for workers where no network needs the CPU."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, usable)


def default_workers(device: torch.device) -> int:
    """Default of --workers: 0 on the CPU, whose cores the network needs, else one per core, at most 8."""
    return 0 if device.type == "cpu" else cores()


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and torch on all devices; on the CPU, equal seeds give bit-identical runs."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = False


def random_states() -> dict[str, Any]:
    """Torch's random states, for a checkpoint. Seed and epoch determine all other random numbers of a run."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"torch": torch.get_rng_state(), "cuda": cuda}


def set_random_states(states: dict[str, Any]) -> None:
    """Restores `random_states`. The states of GPUs are restored only if their number has not changed."""
    torch.set_rng_state(states["torch"])
    if len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])


# ---------------------------------------------------------------------------------------------- processes


def rank() -> int:
    """Number of this process among those that torchrun started, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes that torchrun started."""
    return dist.get_world_size() if dist.is_initialized() else 1


def environment_rank() -> int:
    """Number of this process among those of a launcher, by its environment variables; 0 without one.

    Raises InputError for variables that are not numbers, or that contradict each other.
    """
    names = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT")
    given = {name: os.environ[name] for name in names if name in os.environ}
    text = " ".join(f"{name}={value}" for name, value in given.items())
    if not all(value.isdecimal() for value in given.values()):
        raise InputError(f"environment variables {text}: must be whole numbers")
    size, rank = int(given.get("WORLD_SIZE", 1)), int(given.get("RANK", 0))
    if size < 2:  # a cluster may number its jobs by RANK
        return 0
    if "RANK" not in given or "MASTER_PORT" not in given or "MASTER_ADDR" not in os.environ or rank >= size:
        problem = "several processes need RANK < WORLD_SIZE, MASTER_ADDR and MASTER_PORT"
        raise InputError(f"environment variables {text}: {problem}: use torchrun, or unset WORLD_SIZE")
    return rank


def join_processes(device: torch.device) -> None:
    """Joins the other processes that torchrun started, if it did: its environment variables name them.

    Raises InputError as `environment_rank` does.
    """
    environment_rank()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # In an evaluation each process waits for the slowest one, far less than an hour.
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=1))


def leave_processes() -> None:
    """Ends what `join_processes` has begun."""
    if dist.is_initialized():
        dist.destroy_process_group()


def all_gather(part: T) -> list[T]:
    """The parts of all processes, in the order of their ranks, in every process. Waits for all of them."""
    if world_size() == 1:
        return [part]
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, part)
    return parts


def barrier() -> None:
    """Waits for all processes."""
    if world_size() > 1:
        dist.barrier()


def first_process_first(work: Callable[[], R]) -> R:
    """work() in the first process, then in the others, which find the files it has written.

    An error in the first process ends the others without a message.
    """
    if world_size() == 1:
        return work()
    went_well = [False]
    try:
        if rank() == 0:
            result, went_well = work(), [True]
    finally:
        dist.broadcast_object_list(went_well, src=0)
    if not went_well[0]:
        sys.exit(2)
    return result if rank() == 0 else work()


def print_rank0(text: str) -> None:
    """Prints, in the first process alone."""
    if rank() == 0:
        print(text, flush=True)


def imap(function: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[tuple[T, R]]:
    """(item, function(item)) for each item, in order, on `workers` processes (0: in this one, one by one).

    At most four items per worker are under way, so a fast producer does not fill the memory.
    """
    if workers == 0:
        yield from ((item, function(item)) for item in items)
        return
    # Forked workers share this process's memory and start at once; they use neither torch nor a GPU.
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    under_way: deque[tuple[T, Any]] = deque()
    # The function goes to a worker once: with its data (the lists of a split) it may be large.
    context, start = multiprocessing.get_context(method), (_start_worker, (os.getpid(), function))
    with ProcessPoolExecutor(workers, context, *start) as pool:
        try:
            for item in items:
                under_way.append((item, pool.submit(_work, item)))
                if len(under_way) >= 4 * workers:
                    item, future = under_way.popleft()
                    yield item, future.result()
            for item, future in under_way:
                yield item, future.result()
        except BrokenProcessPool as error:
            problem = f"a worker process was killed ({error}), perhaps for lack of memory"
            raise InputError(f"{problem}: pass a smaller --workers, or 0") from error
        finally:
            pool.shutdown(cancel_futures=True)


_function: Callable[[Any], Any]  # of this worker process


def _work(item: Any) -> Any:
    return _function(item)


def _start_worker(parent: int, function: Callable[[Any], Any]) -> None:
    """Starts a worker: it leaves Ctrl-C to the main process, and ends soon after that was killed."""
    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not the main process's handler

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
