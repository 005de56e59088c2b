"""Finds the process that hangs: a collective that never ends, a disk that does not answer.

Every process says where it is as it goes along. One that has not moved for the time allowed leaves its Python
stack for the others; what held them all up is the one that is furthest behind, or the one that does not
answer at all. It is named once, and all of them end. Where NCCL keeps a record of its last collectives, each
process writes its own into the run's folder first, as torch's reader of such records takes it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
import traceback
from pathlib import Path

from falcon_qlora.common.errors import EXIT_HANGING
from falcon_qlora.processes import agreement, ranks

_ANSWER_SECONDS = 3.0
# Beyond the time allowed: where not even the watching thread gets to run.
_LAST_RESORT_SECONDS = 60.0
_STANDARD_ERROR = 2
WRITER = "checkpoint"  # name of the thread that writes one
# A step is one collective, an evaluation or a save some more.
_RECORDED_COLLECTIVES = "128"
# Torch warns of the second, older name.
_RECORD_VARIABLES = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")
_RECORD_PREFIX = "nccl_trace_rank_"


def record_collectives() -> None:
    """Have NCCL remember its last collectives; before the process group is made.

    What the environment says already, 0 for none, holds.
    """
    if not any(name in os.environ for name in _RECORD_VARIABLES):
        os.environ[_RECORD_VARIABLES[0]] = _RECORDED_COLLECTIVES


class Watchdog:
    """Watches this process's main thread.

    Args:
        seconds: how long it may stay in one place; 0: for ever.
        record: the folder that gets NCCL's record if it hangs.
    """

    def __init__(self, seconds: float, record: Path):
        self._seconds = seconds
        self._record = record
        self._place = (0, 0, "starting")
        self._moved = time.monotonic()
        self._ended = threading.Event()

    def start(self) -> None:
        self._moved = time.monotonic()
        if self._seconds:
            self._ended.clear()
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def stop(self) -> None:
        if self._seconds:
            self._ended.set()
            faulthandler.cancel_dump_traceback_later()

    def at(self, step: int, phase: int, what: str) -> None:
        """The main thread has come to a place.

        Args:
            step: of the run.
            phase: of the step, rising: the process with the lowest step and phase is the one that hangs.
            what: for the message, such as ``computing``.
        """
        self._place = (step, phase, what)
        self._moved = time.monotonic()

    def _watch(self) -> None:
        while not self._ended.wait(min(5.0, self._seconds / 4)):
            still = time.monotonic() - self._moved
            if still > self._seconds:
                self._end(still)
            # Onto the process's own standard error: in a notebook what stands for it is no file.
            faulthandler.dump_traceback_later(
                self._seconds + _LAST_RESORT_SECONDS, exit=True, file=_STANDARD_ERROR
            )
            if self._ended.is_set():
                faulthandler.cancel_dump_traceback_later()

    def _end(self, still: float) -> None:
        with contextlib.suppress(Exception):
            stack = _stack()
            tell(self._place, stack, still, record=write_record(self._record))
        os._exit(EXIT_HANGING)


def write_record(folder: Path) -> Path | None:
    """Write what NCCL remembers of this process's last collectives.

    Returns:
        The folder; None where there is no NCCL, or it does not say in time.
    """
    import torch.distributed as dist
    from torch._C import _distributed_c10d

    dump = getattr(_distributed_c10d, "_dump_nccl_trace", None)  # not in a build without NCCL
    if dump is None or not dist.is_initialized() or "nccl" not in dist.get_backend():
        return None
    written = threading.Event()

    def write() -> None:
        with contextlib.suppress(Exception):
            record = dump()
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{_RECORD_PREFIX}{ranks.process_index()}").write_bytes(record)
            written.set()

    # By a thread of its own: it may wait for what hangs.
    threading.Thread(target=write, name="flight record", daemon=True).start()
    return folder if written.wait(_ANSWER_SECONDS) else None


def tell(place: tuple[int, int, str], stack: str, still: float, *, record: Path | None = None) -> None:
    """Say once over all processes which of them hangs; return when it is said.

    Args:
        record: where this process has written what NCCL remembers, if it has.
    """
    where = f"NCCL's last collectives are in {record}; torchfrtrace reads them" if record else ""
    mine = json.dumps([*place, stack])
    if ranks.world_size() == 1:
        _print(describe({0: mine}, 1, still), where)
        return
    prefix = f"falcon_qlora/hang/{ranks.restart_count()}"
    store = agreement.connect(timeout_seconds=10 * _ANSWER_SECONDS)
    store.set(f"{prefix}/{ranks.process_index()}", mine)
    if store.add(prefix, 1) == 1:
        time.sleep(3 * _ANSWER_SECONDS)  # the others may have come to a stop a little later
        answers = {}
        for process in range(ranks.world_size()):
            if store.check([f"{prefix}/{process}"]):
                answers[process] = store.get(f"{prefix}/{process}").decode()
        _print(describe(answers, ranks.world_size(), still), where)
        store.set(f"{prefix}/told", "")
    else:
        store.wait([f"{prefix}/told"])


def describe(answers: dict[int, str], processes: int, still: float) -> str:
    """Which process hangs, by what each has said of itself."""
    silent = [process for process in range(processes) if process not in answers]
    if silent:
        which = ", ".join(map(str, silent))
        return f"process {which} is not responding: stopped, or blocked in native code"
    said = {process: json.loads(answer) for process, answer in answers.items()}
    furthest_back = min(tuple(place[:2]) for place in said.values())
    held = {process: place for process, place in said.items() if tuple(place[:2]) == furthest_back}
    if len(held) == processes > 1:
        text = f"all {processes} processes have not moved for {still:.0f} s"
    else:
        text = f"process {', '.join(map(str, held))} has not moved for {still:.0f} s"
    (step, _, what, stack), *_ = held.values()
    return f"{text}, {what} at step {step}. Its Python stack:\n{stack.rstrip()}"


def _stack() -> str:
    """The main thread's, and that of the thread that writes a checkpoint, for which it may be waiting."""
    frames = sys._current_frames()
    main = frames.get(threading.main_thread().ident or 0)
    stacks = ["(it has ended)" if main is None else "".join(traceback.format_stack(main)).rstrip()]
    for thread in threading.enumerate():
        if thread.name == WRITER and thread.ident in frames:
            stacks.append("It waits for this thread, which writes a checkpoint:")
            stacks.append("".join(traceback.format_stack(frames[thread.ident])))
    return "\n".join(stacks)


def _print(text: str, where: str) -> None:
    print(f"error: {text}", *filter(None, [where]), sep="\n", file=sys.stderr, flush=True)
