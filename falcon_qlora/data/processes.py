"""Tokenizing in several processes that share nothing with this one: each is a Python begun anew.

A fork copies the locks that other threads hold (those of a process group, of CUDA, of libraries) and nobody
frees them in the copy; `datasets.map(num_proc=…)` forks, and may wait for ever.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from types import ModuleType
from typing import Any

import datasets

from falcon_qlora.common.errors import UserError


def run_each(tasks: Sequence[Callable[[], None]]) -> None:
    """Run each task in a process of its own, all at once, and wait for them.

    None outlives this process, however it ends, nor this call: the first failure ends them all.

    Args:
        tasks: what `pickle` can write; nothing of them may be defined in a script.

    Raises:
        UserError: if a process ended without a word, as by the system when memory runs out.
        Exception: what a task raised, the first that is known.
    """
    context = multiprocessing.get_context("spawn")
    running: dict[Any, Any] = {}
    try:
        for task in tasks:
            result, told = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(told, pickle.dumps(task)), daemon=True)
            with told, _without_main(), _deaf_to_ctrl_c():
                process.start()
            running[result] = process
        waiting = list(running)
        while waiting:
            for ready in wait(waiting):
                waiting.remove(ready)
                _outcome(ready, running[ready])
    finally:
        for result, process in running.items():
            process.kill()
            process.join()
            result.close()


def _outcome(result: Any, process: Any) -> None:
    try:
        error = result.recv()
    except EOFError:
        process.join()
        raise UserError(
            f"a process that tokenized ended without a word (status {process.exitcode}), "
            "perhaps for want of memory; --dataset_num_proc 1 tokenizes in this process"
        ) from None
    if error is not None:
        raise error


def _work(told: Connection, task: bytes) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each process is a thread of its own already
    # Its own is shared between processes, and left behind by one that is ended.
    datasets.utils.tqdm.set_lock(threading.RLock())
    try:
        pickle.loads(task)()
    except Exception as error:
        told.send(_as_told(error))
    else:
        told.send(None)


def _as_told(error: Exception) -> Exception:
    """The error with where it was raised, in a form that comes through a pipe."""
    if isinstance(error, UserError):
        return error
    error.add_note(traceback.format_exc())
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(traceback.format_exc())
    return error


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """A process begun anew would run the user's script once more, to find in it what tasks may refer to."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@contextlib.contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """It goes to all processes of a terminal; the one that waits for the others ends them."""
    resource_tracker.ensure_running()  # which would have it heard again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
