"""Helpers of several modules: errors, progress, devices, files that are never half-written."""

from __future__ import annotations

import argparse
import ctypes
import glob
import json
import os
import platform
import secrets
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

T, R = TypeVar("T"), TypeVar("R")


class InputError(Exception):
    """Bad input. The message is one line: the problem with its file, line or flag, then the fix."""


class Stopped(Exception):
    """SIGTERM or Ctrl-C, after everything was saved. The message tells how to resume."""


class Parser(argparse.ArgumentParser):
    """argparse that reports an error in one line."""

    def error(self, message: str) -> NoReturn:
        """Raises InputError."""
        raise InputError(f"{message} ({self.prog} --help lists the flags)")


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Around a script's main: one line on stderr; exit code 2 (InputError, an OSError with its file) or 130.

    Where several processes raise the same error, the first one prints it.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # file names of any bytes
    try:
        yield
    except InputError as error:
        traceback.clear_frames(error.__traceback__)  # ends the workers of data loaders now, not at exit
        # A data loader's worker sends its error as text inside a traceback: the message is the last line.
        sys.exit(_fail(str(error).strip().splitlines()[-1].rsplit(f"{InputError.__name__}: ", 1)[-1]))
    except Stopped as stopped:
        if rank() == 0:
            sys.stderr.write(f"{stopped}\n")
        sys.exit(130)
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted\n")
        sys.exit(130)
    except OSError as error:
        if error.filename is None:
            raise
        sys.exit(_fail(f"{error.filename}: {error.strerror}"))
    except torch.OutOfMemoryError as error:
        sys.exit(_fail(f"out of GPU memory ({first_line(error)}): pass a smaller --batch-size"))
    except RuntimeError as error:
        # gloo and NCCL report a lost process in many ways.
        words = ("connection", "peer", "gloo", "nccl", "timed out", "timeout")
        if world_size() == 1 or not any(word in str(error).lower() for word in words):
            raise
        _fail(f"process {rank()} of {world_size()}: another process has ended; rerun with --resume")
        os._exit(1)  # sys.exit would wait for the lost process


def _fail(message: str) -> int:
    if int(os.environ.get("RANK", 0)) == 0 or world_size() > 1:
        sys.stderr.write(f"error: {message}\n")
    return 2


def first_line(error: Any) -> str:
    """The first line of an error's message, at most 120 characters."""
    text = str(error).strip()
    return text.splitlines()[0][:120] if text else type(error).__name__


def rank() -> int:
    """Number of this process among those that torchrun started, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes that torchrun started."""
    return dist.get_world_size() if dist.is_initialized() else 1


class Progress:
    """A line on stderr that shows how far a long job is. Only the first process writes; none with `quiet`.

    On a terminal the line is rewritten at most twice a second and erased at the end. Elsewhere, for instance
    in a job's log, a line is written every 60 s, and once more at the end of a job that has written any.
    """

    quiet = False  # --quiet

    def __init__(self, what: str, total: int, unit: str = "images", done: int = 0):
        self.what, self.total, self.unit, self.first, self.done = what, total, unit, done, done
        self.terminal, self.written = sys.stderr.isatty(), False
        self.started = self.shown = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: Any) -> None:
        if self.written:
            self._write("" if self.terminal else self.line())

    def show(self, done: int, note: Callable[[], str] = str) -> None:
        """Writes the line where it is due. note: more text, called only then, as it may cost time."""
        self.done, now = done, time.monotonic()
        if not self.quiet and rank() == 0 and now - self.shown >= (0.5 if self.terminal else 60):
            self.shown, self.written = now, True
            self._write(self.line(note()))

    def line(self, note: str = "") -> str:
        """What is done, at which speed, and the time left, then the note."""
        speed = (self.done - self.first) / max(time.monotonic() - self.started, 1e-9)
        left = f", {duration((self.total - self.done) / speed)} left" if speed else ""
        return f"{self.what}: {self.done} of {self.total} {self.unit}, {speed:.1f}/s{left}{note}"

    def _write(self, line: str) -> None:
        sys.stderr.write(f"\r{line}\x1b[K" if self.terminal else f"{line}\n")
        sys.stderr.flush()


def counted(items: Iterable[T], what: str, total: int, unit: str = "images") -> Iterator[T]:
    """Yields the items and shows a `Progress` of their number."""
    with Progress(what, total, unit) as progress:
        for done, item in enumerate(items, 1):
            yield item
            progress.show(done)


def duration(seconds: float) -> str:
    """Seconds as 0h05m09s."""
    hours, seconds = divmod(round(seconds), 3600)
    return f"{hours}h{seconds // 60:02d}m{seconds % 60:02d}s"


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
        raise InputError(
            f"--device {name} cannot be used ({first_line(error)}): pass --device cpu"
        ) from error
    if device.type == "cpu":
        keep_freed_memory()
    return device


def keep_freed_memory() -> None:
    """Lets tensors on the CPU reuse freed memory, where the C library is glibc.

    glibc returns large blocks to the system, which zeroes every page before it hands them out again: 6 %
    (VGG16) to 18 % (ResNet50) of a float32 training step.
    """
    if platform.libc_ver()[0] == "glibc":
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # never


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """--amp: "bf16", "off", or "auto": bf16 where the device is fast at it."""
    on = amp == "bf16" or (amp == "auto" and has_bf16(device))
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=on)


def has_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for bf16; emulated, it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Private functions of torch: where they are gone, the CPU runs in float32.
    instructions = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, name, bool)() for name in instructions)


def default_workers() -> int:
    """Default of --workers: the number of CPU cores this process may use, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, cores)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns a failure to write into an InputError that names the path."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from error


@contextmanager
def atomic_write(path: Path, one_writer: bool = False) -> Iterator[Path]:
    """Yields a temporary path beside `path`; renames it to `path` at the end, or removes it after an error.

    Readers never see a half-written file, and of two writers the later one wins. one_writer: no other process
    writes `path` now, so files that killed processes left are removed. Raises InputError on failure.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with writing(path):
            if path.exists() and not path.is_file():
                raise OSError("not a regular file")  # /dev/null would be replaced
            path.parent.mkdir(parents=True, exist_ok=True)
            if one_writer:
                for left in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
                    left.unlink()
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
