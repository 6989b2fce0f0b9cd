"""What the modules share that is in no paper: clear errors, seeds, files that are never half-written."""

from __future__ import annotations

import argparse
import ctypes
import glob
import json
import multiprocessing
import os
import platform
import random
import secrets
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
import torch.distributed as dist

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

T, R = TypeVar("T"), TypeVar("R")


class Parser(argparse.ArgumentParser):
    """argparse whose complaint is one line, as for all other bad input."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} ({self.prog} --help lists the flags)")


class InputError(Exception):
    """Something the user gave cannot be used. The message is one line: the file, line or flag, and the way out."""


class Stopped(Exception):
    """SIGTERM or Ctrl-C, at a point where everything is saved. The message says how to go on."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Around a script's main: bad input ends it with one line on stderr and exit code 2; Ctrl-C and SIGTERM with 130.

    Of several processes that meet the same error, the first one reports it.
    """
    try:
        yield
    except InputError as error:
        # A data loader's worker process wraps the message in its traceback, as text: its last line is ours.
        sys.exit(_fail(str(error).strip().splitlines()[-1].rsplit(f"{InputError.__name__}: ", 1)[-1]))
    except Stopped as stopped:
        if rank() == 0:
            sys.stderr.write(f"{stopped}\n")
        sys.exit(130)
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted\n")
        sys.exit(130)
    except RuntimeError as error:
        # What gloo and NCCL say, in many ways, when a process at the other end is gone.
        if world_size() == 1 or not any(
            word in str(error).lower()
            for word in ("connection", "peer", "gloo", "nccl", "timed out", "timeout")
        ):
            raise
        _fail(
            f"process {rank()} of {world_size()}: another process of this job has ended; start the job again with --resume"
        )
        os._exit(1)  # no orderly end: the library would wait for the lost one


def _fail(message: str) -> int:
    if int(os.environ.get("RANK", 0)) == 0 or world_size() > 1:
        sys.stderr.write(f"error: {message}\n")
    return 2


class StopRequest:
    """Turns the first SIGTERM or Ctrl-C into a flag that the training loop asks for between steps; a second one ends the process at once."""

    def __init__(self) -> None:
        self.asked = False
        with suppress(ValueError):  # not the main thread: whoever runs training there has the signals
            self.before = {
                number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)
            }

    def _note(self, number: int, frame: Any) -> None:
        self.asked = True
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def close(self) -> None:
        for number, handler in getattr(self, "before", {}).items():
            signal.signal(number, handler)


def ignore_interrupts(*_: Any) -> None:
    """For worker processes: Ctrl-C reaches the whole group, and what happens then is the main process's decision."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _end_with(parent: int) -> None:
    """For the workers of `ordered_map`: ends this one when `parent` is killed, which a worker that waits for its next item would never notice."""
    ignore_interrupts()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


# ------------------------------------------------------------------------------------- several processes (torchrun)


def join_processes(device: torch.device) -> None:
    """Meets the other processes that torchrun started, if it did; RANK, WORLD_SIZE and the address come from its environment."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # Evaluation makes the others wait for the slowest; an epoch of sweeps on a slow disk is well below this.
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=1))


def leave_processes() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def all_gather(part: T) -> list[T]:
    """Every process's part, in the order of their ranks, in every process."""
    if world_size() == 1:
        return [part]
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, part)
    return parts


def first_process_first(work: Callable[[], R]) -> R:
    """work() in the first process, then in the others: what it writes is there when they look. Its error ends them without a second line."""
    if world_size() == 1:
        return work()
    went_well = [False]
    try:
        if rank() == 0:
            result = work()
            went_well = [True]
    finally:
        dist.broadcast_object_list(went_well, src=0)
    if not went_well[0]:
        sys.exit(2)
    return result if rank() == 0 else work()


def first_line(error: Any) -> str:
    """What an error says, cut to fit into a line of ours."""
    text = str(error).strip()
    return text.splitlines()[0][:120] if text else type(error).__name__


def keep_freed_memory() -> None:
    """Lets tensors on the CPU reuse the memory of those before them, where the C library is glibc.

    It would return the large ones' to the system, which zeroes each page before it gives it again: 6 (VGG16) to 18 % (ResNet50) of a step in float32.
    """
    if platform.libc_ver()[0] == "glibc":
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # never


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and torch (all devices). Same seed, same machine: same run, bit for bit on the CPU."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = False


def random_states() -> dict[str, Any]:
    """Torch's random states, for a checkpoint: all the randomness of a run that is not derived from (seed, epoch)."""
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    if len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])


def resolve_device(name: str) -> torch.device:
    """ "auto": the GPU where there is one. Raises InputError for a device torch does not know or cannot reach.

    Of several processes (torchrun), each has a GPU of its own.
    """
    if name in ("auto", "cuda") and torch.cuda.is_available():
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    elif name == "auto":
        name = "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {name} cannot be used here ({reason}): pass --device cpu") from error
    return device


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """--amp: "bf16", "off", or "auto": bf16 where it is fast."""
    on = amp == "bf16" or (amp == "auto" and has_bf16(device))
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=on)


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies in bf16 itself; emulated, it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Private, so perhaps gone one day: then the CPU goes on in float32.
    instructions = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, name, bool)() for name in instructions)


def default_workers() -> int:
    """Worker processes when --workers is not given: one per core this process may use, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, cores)


def ordered_map(function: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """function(item) for each item, in order, on `workers` processes (0: here and now), so that the next items can be made meanwhile.

    At most four items a worker are under way: a fast producer does not fill the memory.
    """
    if workers == 0:
        yield from map(function, items)
        return
    # Forked workers share this process's memory and start at once; they touch neither torch nor a GPU.
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    with ProcessPoolExecutor(
        workers, multiprocessing.get_context(method), initializer=_end_with, initargs=(os.getpid(),)
    ) as pool:
        under_way: deque[Future[R]] = deque()
        try:
            for item in items:
                under_way.append(pool.submit(function, item))
                if len(under_way) >= 4 * workers:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        except BrokenProcessPool as error:
            raise InputError(
                f"a worker process was killed ({error}): out of memory? Pass a smaller --workers, or 0"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


class Progress:
    """A line on stderr that shows how far a long job is. Written by the first process alone; by none with `quiet`.

    On a terminal the line is rewritten at most twice a second and removed at the end. Elsewhere, for instance in
    a job's log, a line is written every 60 s, and one more at the end of a job that has written any.
    """

    quiet = False  # --quiet

    def __init__(self, what: str, total: int, unit: str = "images", done: int = 0):
        """`total` things of this unit are to be done, `done` of them before now."""
        self.what, self.total, self.unit, self.first, self.done = what, total, unit, done, done
        self.terminal = sys.stderr.isatty()
        self.started = self.shown = time.monotonic()
        self.written = False

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: Any) -> None:
        if self.written:
            self._write("\r\x1b[K" if self.terminal else f"{self.line()}\n")

    def show(self, done: int, note: Callable[[], str] = str) -> None:
        """Writes the line where it is due. note: what else the line says; called only then, as it may cost time."""
        self.done, now = done, time.monotonic()
        if self.quiet or rank() > 0 or now - self.shown < (0.5 if self.terminal else 60):
            return
        self.shown, self.written = now, True
        self._write(f"\r{self.line(note())}\x1b[K" if self.terminal else f"{self.line(note())}\n")

    def line(self, note: str = "") -> str:
        """What is done, what else there is to say, how fast it goes and how long it will take."""
        speed = (self.done - self.first) / max(time.monotonic() - self.started, 1e-9)
        left = f", {duration((self.total - self.done) / speed)} left" if speed else ""
        return f"{self.what}: {self.done} of {self.total} {self.unit}{note}, {speed:.1f} {self.unit}/s{left}"

    def _write(self, text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()


def counted(items: Iterable[T], what: str, total: int, unit: str = "images") -> Iterator[T]:
    """The items as they come, with a `Progress` of how many came."""
    with Progress(what, total, unit) as progress:
        for done, item in enumerate(items, 1):
            yield item
            progress.show(done)


def duration(seconds: float) -> str:
    """Seconds as 0h05m09s."""
    hours, seconds = divmod(round(seconds), 3600)
    return f"{hours}h{seconds // 60:02d}m{seconds % 60:02d}s"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns a failure to write into an InputError that names the path."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from error


@contextmanager
def atomic_write(path: Path, one_writer: bool = False) -> Iterator[Path]:
    """Yields a temporary path beside `path`; renames it to `path` when the block ends well, removes it when not.

    A reader, a crash or a full disk never meets a half-written file, and of two writers the later one wins. one_writer: nobody else writes
    `path` now, so that what a killed process left of it is removed. Raises InputError where nothing can be written.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if one_writer:
                for left in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
                    left.unlink()
            yield part
            os.replace(part, path)
    finally:
        with suppress(OSError):
            part.unlink()


@contextmanager
def alone(folder: Path, wait: bool = True) -> Iterator[bool]:
    """Keeps other processes out of such blocks of the same folder, which is made; they wait, or with wait=False get False at once.

    The lock ends with its process, however that ends, and leaves no file. True without a lock where the file system has none. Raises
    InputError where the folder cannot be made.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows, or a folder that may not be listed
        yield True
        return
    try:
        yield _locked(handle, folder, wait)
    finally:
        # Not by closing alone: a forked worker that is still about has the handle too.
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)


def _locked(handle: int, folder: Path, wait: bool) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not wait:
            return False
        print(f"waiting for another process at work in {folder}", flush=True)
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError:  # a network file system without locks
        pass
    return True


def write_text(path: Path, text: str) -> None:
    with atomic_write(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")
