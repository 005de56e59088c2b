"""How a process ends: its exit status, one message for all processes, and another process's death."""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from falcon_qlora.common.errors import (
    EXIT_BEREFT,
    EXIT_BUG,
    EXIT_STOPPED,
    EXIT_USER_ERROR,
    UserError,
    message_of,
    panics_as_errors,
)
from falcon_qlora.processes import lookout, meeting
from falcon_qlora.processes.agreement import PeerError, connect, met_by_all
from falcon_qlora.processes.ranks import (
    is_main_process,
    local_process_index,
    node_index,
    restart_count,
    world_size,
)

_REPORT_LIMIT = datetime.timedelta(seconds=10)

_siblings: list[int] = []
_main: list[int] = []


def remember_siblings() -> None:
    """Find the processes on this machine that train together with this one; waits for all processes."""
    namespace = os.readlink("/proc/self/ns/pid") if sys.platform.startswith("linux") else ""
    here = (socket.gethostname(), namespace, os.getppid())
    everyone = met_by_all((here, os.getpid(), is_main_process()))
    found = {pid: main for place, pid, main in everyone if place == here and pid != os.getpid()}
    _siblings[:], _main[:] = found, (pid for pid, main in found.items() if main)


def forget_siblings(*, but_main: bool = False) -> None:
    """From here on each process may end by itself; but rank 0 only where this one does not wait for it."""
    _siblings[:] = _main if but_main else ()


def sibling_died() -> bool:
    """Whether one of the processes that `remember_siblings` found is gone."""
    return not all(_lives(pid) for pid in _siblings)


def _lives(pid: int) -> bool:
    try:
        if sys.platform.startswith("linux"):
            # A process that has ended but is not yet collected by its parent is a zombie.
            stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
            return stat.rpartition(")")[2].split()[0] not in ("Z", "X")
        os.kill(pid, 0)
    except OSError:
        return False
    return True


def exit_status(work: Callable[[], object]) -> int:
    """Run `work` and return the status to exit with; an error is printed once for all processes.

    What the user can fix gives one line and status 2. A file or memory that the system refuses gives one line
    and status 1. A bug gives a traceback and status 1. If several processes fail, only the first error
    reported is printed: the others mostly follow from it.
    """
    try:
        with panics_as_errors():
            work()
    except PeerError as error:
        report(None, error.exit_status)
        return error.exit_status
    except KeyboardInterrupt:
        return 130
    except UserError as error:
        report(f"error: {error}\n", EXIT_USER_ERROR)
        return EXIT_USER_ERROR
    except Exception as error:
        if _siblings and _waits_for_death():
            return EXIT_BEREFT  # it only follows from another process's death
        told = lookout.who_is_gone(error) or message_of(error)
        report(f"{told.rstrip()}\n" if told else traceback.format_exc(), EXIT_BUG)
        return EXIT_BUG
    return 0


def _waits_for_death(seconds: float = 0.5) -> bool:
    """Whether a sibling is gone, now or within `seconds`: a connection ends shortly before its process."""
    deadline = time.monotonic() + seconds
    while not sibling_died():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def leave(status: int) -> None:
    """End this process at once.

    After an error nothing is shut down: the others may be waiting in a collective. After a success the
    interpreter's own shutdown is skipped: it sometimes ends threads of native libraries while they run, which
    aborts the process. All that a run writes is written by then.
    """
    if status in (0, EXIT_STOPPED):
        meeting.part()
        import torch
        import torch.distributed as dist

        if dist.is_initialized() and torch.cuda.is_available():
            dist.destroy_process_group()  # NCCL asks for it
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def report(message: str | None, status: int = EXIT_BUG) -> None:
    """Print `message` if no process has printed one yet; return once one is printed.

    If a process left earlier, torchrun's agent would end the others, including the one that prints. This uses
    a separate connection to the agent's store: there may be no process group yet.

    Args:
        message: None if another process has one.
        status: with which this process ends; those of other nodes end with it too.
    """
    if lookout.watches():
        lookout.tell(message, status)
        return
    key = f"falcon_qlora/reported/{restart_count()}"
    store = None
    if world_size() > 1:
        with contextlib.suppress(RuntimeError, KeyError, OSError):
            store = connect(_REPORT_LIMIT.total_seconds())
    # On another node nobody else could say it either.
    speaks = is_main_process() or (node_index() > 0 and local_process_index() == 0)
    alone = store is None and speaks
    if message is not None and (alone or (store is not None and store.add(key, 1) == 1)):
        print(message, end="", file=sys.stderr, flush=True)
        if store is not None:
            store.set(f"{key}/printed", "")
    elif store is not None:
        with contextlib.suppress(RuntimeError):
            store.wait([f"{key}/printed"], _REPORT_LIMIT)
