"""Fine-tuning runs in processes side by side.

A spawned process looks functions up by their module's name and does not import a package's ``__main__``: what
runs there is here.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from tests.benchmarks.quality.learning import Job, Rows, Run, Schedule, fine_tune, read_rows

DIED = "a process that fine-tunes died: out of memory, or killed"
_CHILDREN = 4  # share the cores: the workers and this process
_Job = TypeVar("_Job")
_Result = TypeVar("_Result")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all runs have in common, but for the rows themselves, which each process reads.

    It is handed to processes as they start, through a pipe: a process that dies before it has read all of it
    would leave its parent writing forever, were it more than the pipe holds.
    """

    data: Path
    tokenizer: Path
    held_out: int
    limit: int | None
    schedule: Schedule
    device: torch.device

    def rows(self) -> Rows:
        return read_rows(self.data, self.tokenizer, held_out=self.held_out, limit=self.limit)


@contextmanager
def started(workers: int, setting: Setting) -> Iterator[ProcessPoolExecutor]:
    """Processes that are starting up already, which takes them as long as a run; killed in the end."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_receive, initargs=(setting,))
    try:
        for _ in range(workers):
            pool.submit(time.sleep, 1)
        yield pool
    finally:
        for process in multiprocessing.active_children():
            process.kill()
        pool.shutdown(cancel_futures=True)


_received: tuple[Setting, Rows]


def _receive(setting: Setting) -> None:
    global _received
    threading.Thread(target=_end_with_parent, daemon=True).start()
    warnings.simplefilter("ignore", FutureWarning)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // _CHILDREN))
    torch.set_float32_matmul_precision("highest")
    _received = (setting, setting.rows())


def _end_with_parent() -> None:
    """A parent that is killed outright ends nobody: its children would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def fine_tune_received(job: Job) -> Run:
    """Fine-tune in a process of `started`."""
    setting, rows = _received
    return fine_tune(job, rows, setting.schedule, setting.device)


def outcomes(
    pool: ProcessPoolExecutor, function: Callable[[_Job], _Result], jobs: Sequence[_Job], seconds: float
) -> Iterator[tuple[_Job, _Result | str]]:
    """Run `function` on every job in the pool's processes.

    Args:
        pool: of `started`.
        function: of a module that the processes can import.
        jobs: the most important first; no two are equal.
        seconds: what has not finished after so long is given up.

    Yields:
        Each job as it finishes with its result, or with the reason why there is none.
    """
    left = dict.fromkeys(jobs)
    why = _not_reached(seconds)
    try:
        futures: dict[Future[_Result], Any] = {pool.submit(function, job): job for job in jobs}
        for future in as_completed(futures, timeout=seconds):
            error = future.exception()
            if isinstance(error, BrokenProcessPool):
                raise error
            job = futures[future]
            del left[job]
            yield job, future.result() if error is None else _told(error)
    except TimeoutError:
        pass
    except BrokenProcessPool:
        why = DIED
    for job in left:
        yield job, why


def outcomes_here(
    function: Callable[[_Job], _Result], jobs: Sequence[_Job], seconds: float
) -> Iterator[tuple[_Job, _Result | str]]:
    """The same in this process, where an error is the caller's; no job starts after `seconds`."""
    until = time.monotonic() + seconds
    for job in jobs:
        yield job, function(job) if time.monotonic() < until else _not_reached(seconds)


def _not_reached(seconds: float) -> str:
    return f"not reached in {seconds / 60:.1f} minutes"


def _told(error: BaseException) -> str:
    traceback.print_exception(error)
    return f"{type(error).__name__}: {str(error)[:300]}"
