"""Which process this is, and what the processes agree on.

The only reader of RANK, LOCAL_RANK and WORLD_SIZE. Nothing here starts a process group: Accelerate does.
Waiting is done on torchrun's key-value store and not in a collective, so it cannot run into NCCL's
timeout however long one process downloads or tokenizes.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import os
import pickle
import socket
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from falcon_qlora.common.errors import EXIT_BUG, EXIT_USER_ERROR, UserError, message_of

T = TypeVar("T")

_WAIT_LIMIT = datetime.timedelta(days=7)
_LOOK_SECONDS = 0.02
_REPORT_LIMIT = datetime.timedelta(seconds=10)
_PIECE_BYTES = 2**22
_SCATTER = 0x1E3779B97F4A7C15  # odd, its bits without a pattern: the golden ratio's


def process_index() -> int:
    """This process's index over all nodes, from 0."""
    return int(os.environ.get("RANK", "0"))


def local_process_index() -> int:
    """This process's index on its node, from 0: the index of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """How many processes train together, over all nodes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """How many processes run on this node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_main_process() -> bool:
    return process_index() == 0


def is_local_main_process() -> bool:
    return local_process_index() == 0


def restart_count() -> int:
    """How often torchrun has restarted this group of processes."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def launch_id() -> str:
    """What this launch is called: the same over torchrun's restarts, another for every new command.

    torchrun's own name for the job, or where it was given none its agent's process, our parent.
    """
    job = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    if job != "none":
        return job
    agent = os.getppid()
    try:
        # A container gives every launch the same process number; they do not start at the same moment.
        started = Path(f"/proc/{agent}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        started = ""
    return f"{socket.gethostname()} {agent} {started}".rstrip()


def local_device() -> torch.device:
    """The device of this process's replica: the GPU of its local index, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_process_index())


class PeerError(Exception):
    """Another process has met an error and has reported it; this one leaves quietly."""

    def __init__(self, exit_status: int):
        super().__init__("another process reported the error")
        self.exit_status = exit_status


class ReplicasDifferError(Exception):
    """Processes that must hold the same do not; the message says which."""


_sequence = 0


def main_process_first(work: Callable[[], T]) -> T:
    """Run `work` on the main process, then on the others once it is done; return each one's own result.

    Meant for work that fills a cache: the first call does it, the later ones find it. Without a process
    group every process runs `work` at once.

    Raises:
        PeerError: on the other processes, where the main process failed.
    """
    global _sequence
    if world_size() == 1 or not dist.is_initialized():
        return work()
    _sequence += 1
    key = f"falcon_qlora/first/{_sequence}"
    store = _store()
    if not is_main_process():
        store.wait([key], _WAIT_LIMIT)
        status = int(store.get(key))
        if status:
            raise PeerError(status)
        return work()
    try:
        result = work()
    except BaseException as error:
        store.set(key, str(_status_of(error)))
        raise
    store.set(key, "0")
    return result


def from_main_process(make: Callable[[], T]) -> T:
    """Run `make` on the main process alone and return its (small, picklable) result on every process."""
    global _sequence
    if world_size() == 1 or not dist.is_initialized():
        return make()
    _sequence += 1
    key = f"falcon_qlora/from_main/{_sequence}"
    store = _store()
    if is_main_process():
        try:
            result = make()
        except BaseException as error:
            store.set(key, pickle.dumps((_status_of(error), None)))  # type: ignore[arg-type]
            raise
        store.set(key, pickle.dumps((0, result)))  # type: ignore[arg-type]
        return result
    store.wait([key], _WAIT_LIMIT)
    status, result = pickle.loads(store.get(key))
    if status:
        raise PeerError(status)
    return result


def wait_for_all() -> None:
    """Return once every process has come here."""
    global _sequence
    if world_size() == 1 or not dist.is_initialized():
        return
    _sequence += 1
    key = f"falcon_qlora/all/{_sequence}"
    store = _store()
    if store.add(f"{key}/arrived", 1) == world_size():
        store.set(key, "")
    store.wait([key], _WAIT_LIMIT)


def gather_objects(mine: T) -> list[T]:
    """Each process's (small, picklable) object, by process index."""
    if world_size() == 1 or not dist.is_initialized():
        return [mine]
    everyone: list[Any] = [None] * world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def check_replicas(tensors: Iterable[torch.Tensor]) -> None:
    """See that all processes hold the same bytes; every process calls this.

    Each tensor is summed up on its device, so that little is copied out and exchanged.

    Raises:
        ReplicasDifferError: on every process, if one of them holds something else.
    """
    if world_size() == 1:
        return
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(str(_checksums(tensor)).encode())
    everyone = gather_objects(digest.hexdigest())
    odd = [index for index, theirs in enumerate(everyone) if theirs != everyone[0]]
    if odd:
        raise ReplicasDifferError(f"processes {odd} do not hold what process 0 holds")


def _checksums(tensor: torch.Tensor) -> list[int]:
    """A sum over the bytes of each piece of `tensor`, modulo 2^64: any one byte that differs shows."""
    whole = _bytes_of(tensor)
    # A weight for each place, odd and scattered, so that exchanged bytes show; in pieces, so that little
    # memory is taken.
    weights = torch.arange(1, min(len(whole), _PIECE_BYTES) + 1, device=whole.device)
    weights *= _SCATTER
    weights ^= weights >> 29
    weights |= 1
    sums = [(piece * weights[: len(piece)]).sum() for piece in whole.split(_PIECE_BYTES)]
    return torch.stack(sums).tolist()


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)


_siblings: list[int] = []


def remember_siblings() -> None:
    """Learn which processes of this machine train together with this one."""
    namespace = os.readlink("/proc/self/ns/pid") if sys.platform.startswith("linux") else ""
    here = (socket.gethostname(), namespace, os.getppid())
    everyone = gather_objects((here, os.getpid()))
    _siblings[:] = [pid for place, pid in everyone if place == here and pid != os.getpid()]


def forget_siblings() -> None:
    """From here on each process may end by itself."""
    _siblings.clear()


def sibling_died() -> bool:
    """Whether one of the processes that `remember_siblings` found is gone."""
    return not all(_lives(pid) for pid in _siblings)


def _lives(pid: int) -> bool:
    try:
        if sys.platform.startswith("linux"):
            # What has ended and is not yet collected by its parent is a zombie.
            stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
            return stat.rpartition(")")[2].split()[0] not in ("Z", "X")
        os.kill(pid, 0)
    except OSError:
        return False
    return True


def exit_status(work: Callable[[], object]) -> int:
    """Run `work` and return the status to exit with, having said what went wrong once over all processes.

    What the user can mend is one line and status 2, a file or memory that the system refuses one line and
    status 1, a bug a traceback and status 1. Of errors that several processes meet, the first to be reported
    is printed: the others mostly follow from it.
    """
    try:
        work()
    except PeerError as error:
        _report(None)
        return error.exit_status
    except KeyboardInterrupt:
        return 130
    except UserError as error:
        _report(f"error: {error}\n")
        return EXIT_USER_ERROR
    except Exception as error:
        if _siblings and _waits_for_death():
            return EXIT_BUG  # what follows from another's death says nothing more; the launcher tells of it
        told = message_of(error)
        _report(f"{told}\n" if told else traceback.format_exc())
        return EXIT_BUG
    return 0


def _waits_for_death(seconds: float = 0.5) -> bool:
    """Whether a sibling is gone, or is so within a moment: a connection ends shortly before its process."""
    deadline = time.monotonic() + seconds
    while not sibling_died():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def fresh_store(timeout_seconds: float) -> dist.Store | None:
    """torchrun's store as if nothing had been written there yet, for the process group.

    torchrun keeps one store over its restarts, with what the processes before have written: some of the new
    ones would read their addresses, and wait for processes that are gone. Nodes do not count restarts alike,
    so the processes agree on a name: each shows a number of its own, and the main process answers to every
    number that it sees, old ones too, until all have said that they heard.

    Returns:
        None where the main process makes a store each time, or there is one process.

    Raises:
        RuntimeError: if the processes do not all come in time.
    """
    if world_size() == 1 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    store, mine, prefix = connect(timeout_seconds), uuid.uuid4().hex, "falcon_qlora/meet"
    if not is_main_process():
        store.set(f"{prefix}/{process_index()}", mine)
        name = store.get(f"{prefix}/answer/{mine}").decode()
        store.set(f"{prefix}/{name}/{process_index()}", "")
        return dist.PrefixStore(name, store)
    away, deadline = set(range(1, world_size())), time.monotonic() + timeout_seconds
    while away:
        for process in sorted(away):
            if store.check([f"{prefix}/{process}"]):
                store.set(f"{prefix}/answer/{store.get(f'{prefix}/{process}').decode()}", mine)
            if store.check([f"{prefix}/{mine}/{process}"]):
                away.remove(process)
        if time.monotonic() > deadline:
            raise RuntimeError(f"processes {sorted(away)} did not come within {timeout_seconds:.0f} s")
        time.sleep(_LOOK_SECONDS)
    return dist.PrefixStore(mine, store)


def connect(timeout_seconds: float) -> dist.TCPStore:
    """A connection of one's own to the processes' store, for a thread or before there is a process group.

    Raises:
        RuntimeError: if there is no answer.
        KeyError: if torchrun has not started this process.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    limit = datetime.timedelta(seconds=timeout_seconds)
    return dist.TCPStore(address, port, is_master=False, timeout=limit)


def leave(status: int) -> None:
    """End this process at once.

    After an error without goodbyes: the others may be waiting in a collective. After a success without the
    interpreter's own end, in which threads of native libraries are sometimes taken down while they run and
    abort the process: everything that a run writes is written by then.
    """
    if status == 0 and dist.is_initialized() and torch.cuda.is_available():
        dist.destroy_process_group()  # NCCL asks for it
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _status_of(error: BaseException) -> int:
    return EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_BUG


def _report(message: str | None) -> None:
    """Print `message`, if no process has printed one yet; return once it is printed.

    A process that left earlier would have torchrun's agent end the others, the one that prints among them.
    It goes by a connection of its own to the agent's store: there may be no process group yet.

    Args:
        message: None where another process has one.
    """
    key = f"falcon_qlora/reported/{restart_count()}"
    store = None
    if world_size() > 1:
        with contextlib.suppress(RuntimeError, KeyError):
            store = connect(_REPORT_LIMIT.total_seconds())
    alone = store is None and is_main_process()
    if message is not None and (alone or (store is not None and store.add(key, 1) == 1)):
        print(message, end="", file=sys.stderr, flush=True)
        if store is not None:
            store.set(f"{key}/printed", "")
    elif store is not None:
        with contextlib.suppress(RuntimeError):
            store.wait([f"{key}/printed"], _REPORT_LIMIT)


def _store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()
