"""Several processes, their signals and their time: those of torchrun, and worker processes of one."""

from __future__ import annotations

import multiprocessing
import os
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
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from .utils import InputError, Stopped, rank, world_size

T, R = TypeVar("T"), TypeVar("R")


def join_processes(device: torch.device) -> None:
    """Joins the other processes that torchrun started, if it did: its environment variables name them."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # In an evaluation each process waits for the slowest one, far less than an hour.
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=1))


def leave_processes() -> None:
    """Ends what `join_processes` began."""
    if dist.is_initialized():
        dist.destroy_process_group()


def all_gather(part: T) -> list[T]:
    """The parts of all processes, in the order of their ranks, in every process. Waits for all of them."""
    if world_size() == 1:
        return [part]
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, part)
    return parts


def all_sum(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Sums over all processes, on the CPU, in every process. The names are those of the first process."""
    parts = all_gather({name: value.cpu() for name, value in values.items()})
    return {name: sum(part.get(name, 0) for part in parts) for name in parts[0]}


def first_process_first(work: Callable[[], R]) -> R:
    """work() in the first process, then in the others, which find the files it has written.

    An error in the first process ends the others without a message.
    """
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


def say(text: str) -> None:
    """Prints, in the first process alone."""
    if rank() == 0:
        print(text, flush=True)


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Adds the seconds that the block takes to seconds[stage]."""
    started = time.monotonic()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.monotonic() - started


class StopRequest:
    """Notes the first SIGTERM or Ctrl-C, for the training loop to ask for; a second one ends the process."""

    def __init__(self) -> None:
        self.asked, self.before = False, {}
        with suppress(ValueError):  # not the main thread: its owner handles the signals
            for number in (signal.SIGTERM, signal.SIGINT):
                self.before[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        self.asked = True
        self.close()

    def close(self) -> None:
        """Restores the signal handlers."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def seen(self, device: torch.device) -> bool:
        """Whether a signal came to any process: all of them stop after the same step, or none does."""
        if world_size() == 1:
            return self.asked
        asked = torch.tensor(float(self.asked), device=device)
        dist.all_reduce(asked)
        return bool(asked > 0)

    def guard(self, items: Iterable[T], message: str) -> Iterator[T]:
        """Yields the items; raises Stopped with the message after a signal.

        Not with several processes: they wait for each other, and stop together between training steps.
        """
        for item in items:
            if self.asked and world_size() == 1:
                raise Stopped(message)
            yield item


def ordered_map(function: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """function(item) for each item, in order, on `workers` processes (0: in this process, one by one).

    At most four items per worker are under way, so a fast producer does not fill the memory.
    """
    if workers == 0:
        yield from map(function, items)
        return
    # Forked workers share this process's memory and start at once; they use neither torch nor a GPU.
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(workers, context, initializer=_end_with, initargs=(os.getpid(),)) as pool:
        under_way: deque[Future[R]] = deque()
        try:
            for item in items:
                under_way.append(pool.submit(function, item))
                if len(under_way) >= 4 * workers:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        except BrokenProcessPool as error:
            problem = f"a worker process was killed ({error}), perhaps for lack of memory"
            raise InputError(f"{problem}: pass a smaller --workers, or 0") from error
        finally:
            pool.shutdown(cancel_futures=True)


def ignore_interrupts(*_: Any) -> None:
    """For worker processes: Ctrl-C reaches the whole group, and the main process decides what happens."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _end_with(parent: int) -> None:
    """Ends a worker when its parent is killed: a worker that waits for the next item would not notice."""
    ignore_interrupts()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
