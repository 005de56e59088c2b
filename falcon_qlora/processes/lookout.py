"""What ends a run on one of several nodes ends it on all, soon, with one message on each that names the host.

    lookout.begin(300)            # in each process, before anything can fail: they find each other
    lookout.tell(text, 2)         # of an error here; returns when the other nodes have heard of it
    lookout.who_is_gone(error)    # if a collective has failed for it
    lookout.end()                 # from here on each may leave

A thread of each process tells the store each second that it lives, and looks whether another has told of an
error. If so it prints that, once on each node, and ends its process, wherever the main thread waits. On one
node nothing of this is needed: there `endings` and the launcher see each other's processes.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from typing import Any

from falcon_qlora.common.errors import EXIT_BUG, EXIT_HANGING
from falcon_qlora.processes import agreement, launcher, meeting, ranks
from falcon_qlora.processes.lines import Lines

_LOOK_SECONDS = 1.0
_STORE_SECONDS = 10.0
# How long others may take to hear of an error, and this process to be ended by another's.
_HEAR_SECONDS = 5.0
# Before a process whose line has ended is taken for gone: it may have told of an error.
_LOST_SECONDS = 2.0
# Without a sign of life; also for a store whose machine does not answer. A link may be cut for a while.
_GONE_SECONDS = 90.0
_FINISH_SECONDS = 20.0


class _Lookout:
    """This process's watch, once it has begun."""

    def __init__(self) -> None:
        self.members: list[dict[str, Any]] = []
        self.patience = _GONE_SECONDS
        self.stepped = False
        self.finish: Callable[[], None] = lambda: None
        self._name = ""
        self._store: Any = None
        self._ended = threading.Event()
        self._tells = False  # an error of its own
        self._signs: dict[int, tuple[str, float]] = {}
        self._lines: Lines | None = None
        self._lost_since: float | None = None

    def begin(self, patience_seconds: float) -> None:
        self._name, store, self.members = meeting.meet(patience_seconds)
        with contextlib.suppress(OSError, RuntimeError):  # then signs of life have to do
            self._lines = Lines(store)
        threading.Thread(target=self._watch, name="lookout", daemon=True).start()

    @property
    def watches(self) -> bool:
        return bool(self.members) and not self._ended.is_set()

    def end(self) -> None:
        self._ended.set()
        if self._lines is not None:
            self._lines.end()

    def tell(self, text: str, status: int, *, here: bool = True) -> None:
        if self._tells:  # another thread does, and ends this process
            time.sleep(_HEAR_SECONDS)
            return
        self._tells, mine = True, ranks.process_index()
        try:
            store = self._connected()
            first = store.add("telling", 1) == 1
        except Exception:  # no other process can be asked whether it has told: one on each node does
            first, store = ranks.local_process_index() == 0, None
        if not first:
            self._tells = False
            time.sleep(_HEAR_SECONDS)  # in which this process is ended
            return
        if here:
            _print(text)
        with contextlib.suppress(Exception):
            store.set("ended", json.dumps({"rank": mine, "text": text, "status": status}))
            self._wait_until_heard(store, ranks.node_index())

    def _wait_until_heard(self, store: Any, by: int) -> None:
        """Wait until all nodes but `by`, which told, have heard of the error."""
        keys = [f"heard/{node}" for node in {member["node"] for member in self.members} - {by}]
        deadline = time.monotonic() + _HEAR_SECONDS
        while not store.check(keys) and time.monotonic() < deadline:
            time.sleep(0.1)

    def who_is_gone(self) -> str | None:
        """Which ranks show no sign of life, as an error; ends this process if another told of an error."""
        seconds = 3.5 * _LOOK_SECONDS
        try:
            before = self._all_signs()
            time.sleep(seconds)
            gone = [rank for rank, sign in self._all_signs().items() if before[rank] == sign]
        except Exception:
            time.sleep(seconds)
            gone = [0]  # whose machine holds the store
        return self.told_gone(gone) if gone else None

    def named(self, some: list[int]) -> str:
        hosts: dict[str, list[str]] = {}
        for rank in some:
            host = f" on {self.members[rank]['host']}" if self.members else ""
            hosts.setdefault(host, []).append(str(rank))
        return " and ".join(f"rank {', '.join(of_host)}{host}" for host, of_host in hosts.items())

    def told_gone(self, gone: list[int], since: str = "") -> str:
        why = "ended, stopped, or cut off from the network"
        return f"error: {self.named(gone)} has not responded{since}: {why}\n"

    def _all_signs(self) -> dict[int, str]:
        others = [rank for rank in range(len(self.members)) if rank != ranks.process_index()]
        store = self._connected()
        return {rank: _value(store, f"alive/{rank}") for rank in others}

    def _connected(self) -> Any:
        import torch.distributed as dist

        return dist.PrefixStore(self._name, agreement.connect(_STORE_SECONDS))

    def _watch(self) -> None:
        refused, silent, number = 0, time.monotonic(), 0
        while not self._ended.wait(_LOOK_SECONDS):
            number += 1
            try:
                self._store = self._store or self._connected()
                self._store.set(f"alive/{ranks.process_index()}", str(number))
                if self._store.check(["ended"]):
                    self._leave(json.loads(self._store.get("ended")))
                if ranks.is_main_process():
                    self._look_for_signs()
                refused, silent = 0, time.monotonic()
                if gone := self._lost():  # and none has told of an error
                    self.tell(self.told_gone(gone), EXIT_BUG)
                    self._finish_and_exit(EXIT_BUG)
            except Exception:
                self._store = None
                refused = refused + 1 if _refuses() else 0
                gone = self._lost() or [0] * (refused > 2 or time.monotonic() - silent > self.patience)
                if gone and not self._ended.is_set():
                    self._leave({"text": self.told_gone(gone)})

    def _lost(self) -> list[int]:
        """The ranks that are gone before the first step; later a collective shows it."""
        if self._lines is None or self.stepped or self._ended.is_set():
            return []
        gone = self._lines.lost()
        self._lost_since = (self._lost_since or time.monotonic()) if gone else None
        return gone if self._lost_since and time.monotonic() - self._lost_since > _LOST_SECONDS else []

    def _look_for_signs(self) -> None:
        """On the main process: end the run if a rank has shown no sign of life for too long."""
        now, gone = time.monotonic(), []
        for rank in range(1, len(self.members)):
            sign = _value(self._store, f"alive/{rank}")
            if sign != self._signs.get(rank, (None, 0.0))[0]:
                self._signs[rank] = sign, now
            elif now - self._signs[rank][1] > self.patience:
                gone.append(rank)
        if gone:
            seconds = f"{self.patience:.0f} s"
            self.tell(self.told_gone(gone, f" for {seconds}"), EXIT_HANGING)
            self._finish_and_exit(EXIT_HANGING)

    def _leave(self, told: dict[str, Any]) -> None:
        """End this process for what another has told."""
        from falcon_qlora.processes import endings

        if self._tells:
            return
        by = told.get("rank")
        elsewhere = by is None or self.members[by]["node"] != ranks.node_index()
        if ranks.local_process_index() == 0 and elsewhere and not endings.sibling_died():
            _print(told["text"])
            with contextlib.suppress(Exception):
                self._store.set(f"heard/{ranks.node_index()}", "")
                if ranks.is_main_process() and by is not None:  # the store may end with this process
                    self._wait_until_heard(self._store, self.members[by]["node"])
        elif elsewhere:
            time.sleep(2 * _LOOK_SECONDS)  # while that one prints: this one's end would be its end
        self._finish_and_exit(told.get("status", EXIT_BUG))

    def _finish_and_exit(self, status: int) -> None:
        writing = threading.Thread(target=self.finish, name="finish", daemon=True)
        writing.start()
        writing.join(_FINISH_SECONDS)
        os._exit(status)


_lookout = _Lookout()


def begin(patience_seconds: float) -> None:
    """Find the processes of all nodes, and watch from here on; does nothing on a single node.

    Args:
        patience_seconds: for how long the others are waited for.

    Raises:
        UserError: if not all processes arrive in time.
    """
    if ranks.world_size() > ranks.local_world_size():
        _lookout.begin(patience_seconds)


def watches() -> bool:
    """Whether other nodes are told of an error here."""
    return _lookout.watches


def end() -> None:
    """From here on each process may end by itself."""
    _lookout.end()


def tell(text: str | None, status: int, *, here: bool = True) -> None:
    """Print an error, with this host's name, on every node; the first one only.

    Args:
        text: None if another process has one.
        status: with which the processes end.
        here: print it on this node too.
    """
    if text is None:
        time.sleep(_HEAR_SECONDS)  # in which this process is ended
    else:
        _lookout.tell(_with_host(text), status, here=here)


def who_is_gone(error: Exception) -> str | None:
    """Which ranks are gone, as a message with their hosts, if a collective has failed for it; else None."""
    return _lookout.who_is_gone() if _lookout.watches and _of_collective(error) else None


def _of_collective(error: Exception) -> bool:
    places = (frame.filename for frame in traceback.extract_tb(error.__traceback__))
    told = type(error).__name__ in ("DistNetworkError", "DistStoreError")  # of torch, of its store too
    told = told or any(word in str(error) for word in ("gloo", "NCCL", "Connection closed by peer", "store"))
    return isinstance(error, RuntimeError) and (
        told or any("/torch/distributed/" in place for place in places)
    )


def tell_store_is_gone(status: int) -> None:
    """Print that the main process's machine, which has the store, does not answer."""
    if _lookout.watches:
        _lookout.tell(_lookout.told_gone([0]), status)


def training_begins(finish: Callable[[], None], *, patience_seconds: float) -> None:
    """From here on a rank may show no sign of life for longer: its `Watchdog` tells of it first.

    Args:
        finish: waits for what is being written; called before this process is ended.
        patience_seconds: of the watchdog; 0: for ever.
    """
    _lookout.finish = finish
    _lookout.patience = patience_seconds + _GONE_SECONDS if patience_seconds else math.inf


def has_stepped() -> None:
    """The first step is done: from here on ranks wait for each other in collectives alone."""
    _lookout.stepped = True


def named(rank_indexes: Iterable[int]) -> str:
    """These ranks, with their hosts where there are several."""
    return _lookout.named(list(rank_indexes))


def _with_host(text: str) -> str:
    host = socket.gethostname()
    if any(member["host"] in text for member in _lookout.members):
        return text
    if text.startswith("error: "):
        return text.replace("error: ", f"error: {host}: ", 1)
    return f"rank {ranks.process_index()} on {host}:\n{text}"


def _print(text: str) -> None:
    print(text, end="", file=sys.stderr, flush=True)
    launcher.leave(launcher.TOLD)


def _value(store: Any, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""


def _refuses() -> bool:
    """Whether the machine of the store answers, and nothing listens there any more."""
    try:
        agreement.require_store()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False
