"""What the processes agree on, and how one waits for another.

Nothing here starts a process group: Accelerate does. Waiting uses torchrun's key-value store and not a
collective, so it cannot run into NCCL's timeout however long one process downloads or tokenizes. Torch is
imported only if there is more than one process.
"""

from __future__ import annotations

import collections
import datetime
import hashlib
import os
import pickle
import socket
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

from falcon_qlora.common.errors import EXIT_BUG, EXIT_USER_ERROR, UserError
from falcon_qlora.processes.ranks import (
    is_main_process,
    local_process_index,
    node_index,
    process_index,
    world_size,
)

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

T = TypeVar("T")

_WAIT_LIMIT = datetime.timedelta(days=7)
_CONNECT_SECONDS = 60.0
_PROBE_SECONDS = 3.0
_PROBE_AGAIN_SECONDS = 0.2
_LOOK_SECONDS = 0.02
_PIECE_WORDS = 2**22
_SCATTER = 0x1E3779B97F4A7C15  # odd, with bits of no pattern: the golden ratio's
# All processes ask the same questions in the same order; each has its own key in the store.
_asked: collections.Counter[str] = collections.Counter()


class PeerError(Exception):
    """Another process has met an error and has reported it; this one leaves quietly."""

    def __init__(self, exit_status: int):
        super().__init__("another process reported the error")
        self.exit_status = exit_status


class ReplicasDifferError(Exception):
    """The replicas diverged; the message names the ranks."""


def from_main_process(make: Callable[[], T]) -> T:
    """Run `make` on the main process alone and return its (small, picklable) result on every process.

    Without a process group every process runs `make` itself.

    Raises:
        PeerError: on the other processes, where the main process failed.
    """
    if not _in_group():
        return make()
    key = _key(make)
    return _made(key, make) if is_main_process() else _made_elsewhere(key)


def main_process_first(work: Callable[[], T]) -> T:
    """Run `work` on the main process, then on one of each node, then on the others; return each one's own.

    Meant for work that fills a cache, which nodes may share or have each its own: the first call does it, the
    later ones find it. Without a process group every process runs `work` at once.

    Raises:
        PeerError: on the processes that wait for one that failed.
    """
    if not _in_group():
        return work()
    key = _key(work)
    own: list[T] = []
    of_node = f"{key}/{node_index()}"
    if not is_main_process():
        _made_elsewhere(key)
    if is_main_process() or local_process_index() == 0:
        _made(key if is_main_process() else of_node, lambda: own.append(work()))
        return own[0]
    if node_index() > 0:
        _made_elsewhere(of_node)
    return work()


def _key(asked: Callable[[], Any] | str) -> str:
    """A key that no other question has: with its own name, so that the next one never reads its answer."""
    name = asked if isinstance(asked, str) else f"{asked.__module__}.{asked.__qualname__}"
    _asked[name] += 1
    return f"falcon_qlora/{name}/{_asked[name]}"


def _made(key: str, make: Callable[[], T]) -> T:
    """The result of `make`, which other processes find by this key."""
    store = _store()
    try:
        result = make()
    except BaseException as error:
        store.set(key, pickle.dumps((_status_of(error), None)))  # type: ignore[arg-type]
        raise
    store.set(key, pickle.dumps((0, result)))  # type: ignore[arg-type]
    return result


def _status_of(error: BaseException) -> int:
    """With which a process that met it ends."""
    return EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_BUG


def _made_elsewhere(key: str) -> Any:
    store = _store()
    store.wait([key], _WAIT_LIMIT)
    status, result = pickle.loads(store.get(key))
    if status:
        raise PeerError(status)
    return result


def wait_for_all() -> None:
    """Return once every process has called this."""
    if not _in_group():
        return
    key, store = _key("all"), _store()
    if store.add(f"{key}/arrived", 1) == world_size():
        store.set(key, "")
    store.wait([key], _WAIT_LIMIT)


def met_by_all(mine: T) -> list[T]:
    """Each process's (small, picklable) object, by process index, once every process has called this."""
    if not _in_group():
        return [mine]
    key, store = _key("met"), _store()
    keys = [f"{key}/{process}" for process in range(world_size())]
    store.set(keys[process_index()], pickle.dumps(mine))  # type: ignore[arg-type]
    store.wait(keys, _WAIT_LIMIT)
    return [pickle.loads(store.get(each)) for each in keys]


def done_by_all(work: Callable[[], T]) -> T:
    """Run `work` on every process and return its result here once all are through.

    Raises:
        PeerError: if it failed elsewhere, where its error is raised.
    """
    try:
        result = work()
    except Exception as error:
        met_by_all(_status_of(error))
        raise
    if status := max(met_by_all(0)):
        raise PeerError(status)
    return result


def met_by_main(mine: T) -> list[T]:
    """On the main process each process's (small, picklable) object, by process index; elsewhere its own.

    Only the main process waits, and reads: with many processes that is far less than `met_by_all`.
    """
    if not _in_group():
        return [mine]
    key, store = _key("met_by_main"), _store()
    keys = [f"{key}/{process}" for process in range(world_size())]
    store.set(keys[process_index()], pickle.dumps(mine))  # type: ignore[arg-type]
    if not is_main_process():
        return [mine]
    store.wait(keys, _WAIT_LIMIT)
    return [pickle.loads(store.get(each)) for each in keys]


def announce(word: Any) -> None:
    """On the main process: tell every other process, which calls `listen`, a (small, picklable) object."""
    _store().set(_key("word"), pickle.dumps(word))  # type: ignore[arg-type]


def listen() -> Any:
    """On the other processes: the next object that the main process announces."""
    key, store = _key("word"), _store()
    store.wait([key], _WAIT_LIMIT)
    return pickle.loads(store.get(key))


def leave_word(meeting: str, mine: Any) -> None:
    """Leave a (small, picklable) object for `words_left`; on any thread.

    Args:
        meeting: a name that no other has had, the same on all processes.
    """
    store = connect(_CONNECT_SECONDS, patience_seconds=_CONNECT_SECONDS)
    store.set(f"{meeting}/{process_index()}", pickle.dumps(mine))  # type: ignore[arg-type]


def words_left(meeting: str, give_up: Callable[[], bool]) -> list[Any]:
    """What each process has left for this meeting, by its index; waits for all, on any thread.

    Raises:
        PeerError: if they have not all left something when `give_up` returns True.
    """
    store = connect(_CONNECT_SECONDS, patience_seconds=_CONNECT_SECONDS)
    keys = [f"{meeting}/{process}" for process in range(world_size())]
    while True:
        last = give_up()
        if store.check(keys):
            return [pickle.loads(store.get(key)) for key in keys]
        if last:
            raise PeerError(EXIT_BUG)
        time.sleep(_LOOK_SECONDS)


def _in_group() -> bool:
    if world_size() == 1:
        return False
    import torch.distributed as dist

    return dist.is_initialized()


def _store() -> dist.Store:
    import torch.distributed as dist

    return dist.distributed_c10d._get_default_store()


def gather_objects(mine: T) -> list[T]:
    """Each process's (small, picklable) object, by process index."""
    if not _in_group():
        return [mine]
    import torch.distributed as dist

    everyone: list[Any] = [None] * world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def check_replicas(tensors: Iterable[torch.Tensor]) -> str:
    """Check that all processes hold the same bytes; every process calls this.

    Each tensor is reduced to checksums on its device, so that little is copied and exchanged.

    Returns:
        Their checksum; empty for one process, which has none to compare with.

    Raises:
        ReplicasDifferError: on every process, if one of them holds something else.
    """
    if world_size() == 1:
        return ""
    everyone = gather_objects(checksum(tensors))
    odd = [index for index, theirs in enumerate(everyone) if theirs != everyone[0]]
    if odd:
        raise ReplicasDifferError(f"ranks {odd} do not match rank 0")
    return everyone[0]


def checksum(tensors: Iterable[torch.Tensor]) -> str:
    """A hash of the bytes that this process holds."""
    import torch

    sums = [_checksums(tensor) for tensor in tensors]
    # Read together: each read makes the host wait for the device.
    read = [number for each in sums if not each.is_cuda for number in each.tolist()]
    on_device = [each for each in sums if each.is_cuda]
    read += torch.cat(on_device).tolist() if on_device else []
    return hashlib.sha256(str(read).encode()).hexdigest()


def _checksums(tensor: torch.Tensor) -> torch.Tensor:
    """A weighted sum of the words of each piece, modulo 2^64: any single word that differs shows."""
    import torch

    word = torch.uint8 if tensor.element_size() % 4 else torch.int32
    whole = tensor.detach().contiguous().flatten().view(word)
    # The weights are odd and scattered, so that swapped words show. Pieces keep the weights small.
    weights = torch.arange(1, min(len(whole), _PIECE_WORDS) + 1, device=whole.device)
    weights *= _SCATTER
    weights ^= weights >> 29
    weights |= 1
    sums = [(piece * weights[: len(piece)]).sum() for piece in whole.split(_PIECE_WORDS)]
    return torch.stack(sums)


def require_store(place: tuple[str, int] | None = None) -> None:
    """Try the machine and port of a store; None: those of the ranks' store.

    Raises:
        OSError: if there is no answer.
    """
    socket.create_connection(place or _place(), _PROBE_SECONDS).close()


def connect(
    timeout_seconds: float, *, place: tuple[str, int] | None = None, patience_seconds: float = 0.0
) -> dist.TCPStore:
    """A separate connection to a store, for a thread or before there is a process group.

    The store is tried first: torch would try for long, and print each attempt that fails.

    Args:
        timeout_seconds: how long each later question to the store may take.
        place: its machine and port; None: those of the ranks' store.
        patience_seconds: how long to try again, as over a link that is cut for a while.

    Raises:
        OSError: if there is no answer.
        RuntimeError: if what answers is no store.
        KeyError: if torchrun has not started this process.
    """
    import torch.distributed as dist

    deadline = time.monotonic() + patience_seconds
    while True:
        try:
            require_store(place)
            break
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_PROBE_AGAIN_SECONDS)
    limit = datetime.timedelta(seconds=timeout_seconds)
    return dist.TCPStore(*(place or _place()), is_master=False, timeout=limit)


def _place() -> tuple[str, int]:
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
