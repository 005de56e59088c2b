"""Finds the process that hangs: a collective that never ends, a disk that does not answer.

Every process notes where it is as it goes along. One that has not moved for the time allowed posts its Python
stack for the others. The process that hangs is the one furthest behind, or one that does not respond at all.
It is named once, and all processes end. If NCCL keeps a record of its last collectives, each process first
writes its own into the run's folder, in the form that torch's reader of such records takes.

Before training, where a process may rightly be in one place for hours, native code of others is watched: one
call of it that does not return is named with its file, and the process ends.
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

from falcon_qlora.common.errors import EXIT_BUG, EXIT_HANGING, NativeWork, native_work
from falcon_qlora.common.files import remove_temporary_files
from falcon_qlora.processes import agreement, endings, lookout, ranks

_ANSWER_SECONDS = 3.0
# Beyond the time allowed, if not even the watching thread gets to run.
_LAST_RESORT_SECONDS = 60.0
_STANDARD_ERROR = 2
WRITER = "checkpoint"  # name of the thread that writes one
# A step is one collective, an evaluation or a save a few more.
_RECORDED_COLLECTIVES = "128"
# Torch warns of the second, older name.
_RECORD_VARIABLES = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")
_RECORD_PREFIX = "nccl_trace_rank_"
# That of `--hang_minutes`, for commands without it.
NATIVE_MINUTES = 15.0
_LOOK_SECONDS = 5.0


def record_collectives() -> None:
    """Have NCCL record its last collectives; call it before the process group is made.

    A value that the environment has already is kept; 0 is for none.
    """
    if not any(name in os.environ for name in _RECORD_VARIABLES):
        os.environ[_RECORD_VARIABLES[0]] = _RECORDED_COLLECTIVES


class _Native:
    """What `end_native_code_after` was told."""

    seconds = 0.0
    status = EXIT_BUG
    thread: threading.Thread | None = None
    left_alone = False  # while a `Watchdog` is at work


def end_native_code_after(minutes: float, *, status: int = EXIT_BUG) -> None:
    """From here on, end this process if one call of others' native code takes longer.

    Of several calls of this the last one counts. A process that was stopped for a while is not ended for it.

    Args:
        minutes: how long a call may take; 0: for ever.
        status: to end with.
    """
    _Native.seconds, _Native.status = minutes * 60, status
    # A thread is not alive in a fork of its process.
    if minutes and not (_Native.thread and _Native.thread.is_alive()):
        _Native.thread = threading.Thread(target=_watch_native, name="native code", daemon=True)
        _Native.thread.start()


def _watch_native() -> None:
    seen: dict[NativeWork, float] = {}
    while True:
        # What is counted is this thread's own looks, which rest while the process is stopped.
        each = min(_LOOK_SECONDS, _Native.seconds / 4) or _LOOK_SECONDS
        time.sleep(each)
        seen = {work: seen.get(work, 0.0) + each for work in native_work()}
        for work, seconds in seen.items():
            if 0 < _Native.seconds < seconds and not _Native.left_alone:
                with contextlib.suppress(Exception):
                    endings.report(
                        f"error: native code has not returned for {seconds:.0f} s, {work.what}: take another "
                        "tokenizer (--tokenizer_name_or_path), or give it longer (--hang_minutes)\n"
                    )
                remove_temporary_files()
                os._exit(_Native.status)


class Watchdog:
    """Watches this process's main thread.

    Args:
        seconds: how long it may stay in one place; 0: for ever.
        record: the folder that gets NCCL's record if the process hangs.
    """

    def __init__(self, seconds: float, record: Path):
        self.seconds = seconds
        self._record = record
        self._place = (0, 0, "starting")
        self._moved = time.monotonic()
        self._ended = threading.Event()

    def start(self) -> None:
        self._moved = time.monotonic()
        _Native.left_alone = True
        if self.seconds:
            self._ended.clear()
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def stop(self) -> None:
        _Native.left_alone = False
        if self.seconds:
            self._ended.set()
            faulthandler.cancel_dump_traceback_later()

    def at(self, step: int, phase: int, what: str) -> None:
        """Note that the main thread has reached a place.

        Args:
            step: of the run.
            phase: of the step, rising: the process with the lowest step and phase is the one that hangs.
            what: for the message, such as ``computing``.
        """
        self._place = (step, phase, what)
        self._moved = time.monotonic()

    def _watch(self) -> None:
        while not self._ended.wait(min(5.0, self.seconds / 4)):
            still = time.monotonic() - self._moved
            if still > self.seconds:
                self._end(still)
            # To the process's own standard error: a notebook's replacement for it is no file.
            faulthandler.dump_traceback_later(
                self.seconds + _LAST_RESORT_SECONDS, exit=True, file=_STANDARD_ERROR
            )
            if self._ended.is_set():
                faulthandler.cancel_dump_traceback_later()

    def _end(self, still: float) -> None:
        with contextlib.suppress(Exception):
            stack, (step, phase, what) = _stack(), self._place
            what = ", ".join([what, *(work.what for work in native_work())])
            try:
                tell((step, phase, what), stack, still, record=write_record(self._record))
            except (OSError, RuntimeError):  # the store does not answer
                lookout.tell_store_is_gone(EXIT_HANGING)
        os._exit(EXIT_HANGING)


def write_record(folder: Path) -> Path | None:
    """Write NCCL's record of this process's last collectives.

    Returns:
        The folder; None if there is no NCCL, or it does not respond in time.
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

    # In a separate thread: it may wait for what hangs.
    threading.Thread(target=write, name="flight record", daemon=True).start()
    return folder if written.wait(_ANSWER_SECONDS) else None


def tell(place: tuple[int, int, str], stack: str, still: float, *, record: Path | None = None) -> None:
    """Print once for all processes which of them hangs; return when it is printed.

    Args:
        record: the folder of this process's NCCL record, if it was written.
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
        time.sleep(3 * _ANSWER_SECONDS)  # the others may have stopped a little later
        answers = {}
        for process in range(ranks.world_size()):
            if store.check([f"{prefix}/{process}"]):
                answers[process] = store.get(f"{prefix}/{process}").decode()
        _print(describe(answers, ranks.world_size(), still), where)
        store.set(f"{prefix}/told", "")
    else:
        store.wait([f"{prefix}/told"])


def describe(answers: dict[int, str], processes: int, still: float) -> str:
    """Which process hangs, from what each has posted."""
    silent = [process for process in range(processes) if process not in answers]
    if silent:
        cut = ", or cut off from the network" if lookout.watches() else ""
        return f"{lookout.named(silent)} is not responding: stopped, or blocked in native code{cut}"
    said = {process: json.loads(answer) for process, answer in answers.items()}
    furthest_back = min(tuple(place[:2]) for place in said.values())
    held = {process: place for process, place in said.items() if tuple(place[:2]) == furthest_back}
    if len(held) == processes > 1:
        text = f"all {processes} ranks have made no progress for {still:.0f} s"
    else:
        text = f"{lookout.named(held)} has made no progress for {still:.0f} s"
    (step, _, what, stack), *_ = held.values()
    return f"{text}, {what} at step {step}. Its Python stack:\n{stack.rstrip()}"


def _stack() -> str:
    """The stack of the main thread, and of the checkpoint's writer, for which it may be waiting."""
    frames = sys._current_frames()
    main = frames.get(threading.main_thread().ident or 0)
    stacks = ["(it has ended)" if main is None else "".join(traceback.format_stack(main)).rstrip()]
    for thread in threading.enumerate():
        if thread.name == WRITER and thread.ident in frames:
            stacks.append("It waits for this thread, which writes a checkpoint:")
            stacks.append("".join(traceback.format_stack(frames[thread.ident])))
    return "\n".join(stacks)


def _print(text: str, where: str) -> None:
    lines = "\n".join([f"error: {text}", *filter(None, [where]), ""])
    if lookout.watches():
        lookout.tell(lines, EXIT_HANGING)
    else:
        print(lines, end="", file=sys.stderr, flush=True)
