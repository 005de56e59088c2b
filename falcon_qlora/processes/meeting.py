"""How the processes of a start find each other, for how long one waits for the others, and who leaves last.

A process may die before the others know of it. Under torchrun on several nodes, and under srun, nobody ends
the rest then: they say for whom they wait, and end.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import sys
import time
import uuid
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from falcon_qlora.common.errors import EXIT_USER_ERROR, UserError, first_line
from falcon_qlora.common.quantities import duration
from falcon_qlora.processes import agreement
from falcon_qlora.processes.agreement import PeerError
from falcon_qlora.processes.ranks import (
    is_main_process,
    local_process_index,
    node_index,
    process_index,
    restart_count,
    set_restart_count,
    world_size,
)

if TYPE_CHECKING:
    import torch.distributed as dist

PATIENCE_SECONDS = 300.0  # default of --meet_minutes
_TELL_SECONDS = 30.0
# That the main process, which knows who is away, says so before the others give up.
_GRACE_SECONDS = 15.0
_LOOK_SECONDS = 0.02
_STORE_SECONDS = 900.0
# For how long the main process, which may have the store, waits at its end for those who still read there.
_PART_SECONDS = 60.0
_MOST_NAMED = 8
_PREFIX = "falcon_qlora/meet"

_met: tuple[str, dist.Store, list[dict[str, Any]]] | None = None


class _Wait:
    """Waiting for ranks, which is told once on the way.

    Args:
        seconds: for how long at most.
        speaks: whether this process is the one that tells.
    """

    def __init__(self, seconds: float, *, speaks: bool):
        self._seconds, self._speaks, self._began = seconds, speaks, time.monotonic()
        self._told = False

    def longer(self, seconds: float) -> _Wait:
        """A wait for so much longer from now on, in silence."""
        return _Wait(self._seconds + seconds, speaks=False)

    def told_alone(self, text: str) -> PeerError:
        """The error of each process, printed here: there is no store to agree by on who does."""
        if self._speaks:
            print(f"error: {text}", file=sys.stderr, flush=True)
        return PeerError(EXIT_USER_ERROR)

    def look_again(self, away: Collection[int], where: str = "") -> None:
        """Return in a moment, for another look.

        Raises:
            UserError: if the ranks that are away have been waited for long enough.
        """
        waited = time.monotonic() - self._began
        if waited > self._seconds:
            raise UserError(
                f"{_named(away)} did not come within {duration(self._seconds)}{where}: not started, or ended "
                "before it met the others. See its own output; --meet_minutes waits for longer"
            )
        if self._speaks and not self._told and waited > min(_TELL_SECONDS, self._seconds / 2):
            self._told = True
            print(
                f"note: {_named(away)} has not come for {duration(waited)}{where}: waiting for up to "
                f"{duration(self._seconds - waited)} more (--meet_minutes)",
                file=sys.stderr,
                flush=True,
            )
        time.sleep(_LOOK_SECONDS)


def _named(some: Collection[int]) -> str:
    told = ", ".join(map(str, sorted(some)[:_MOST_NAMED]))
    more = f" and {len(some) - _MOST_NAMED} more" if len(some) > _MOST_NAMED else ""
    return f"rank {told}{more}"


def fresh_store(patience_seconds: float, store_seconds: float) -> dist.Store | None:
    """The store for the process group, as if nothing had been written there yet; None for one process.

    Args:
        patience_seconds: see `meet`.
        store_seconds: for how long a question to the store may take.

    Raises:
        UserError, PeerError: see `meet`.
    """
    return None if world_size() == 1 else meet(patience_seconds, store_seconds)[1]


def meet(
    patience_seconds: float, store_seconds: float = _STORE_SECONDS
) -> tuple[str, dist.Store, list[dict[str, Any]]]:
    """Find the other processes of this start; those of an earlier start may have written into the same store.

    torchrun keeps one store over its restarts. New processes could read old addresses there and wait for
    processes that are gone. So the processes agree on a name. Each posts a number of its own; the main
    process answers every number that it sees, old ones too, until all processes have confirmed. How often
    they were restarted is agreed on too: the agent of a node that has come back counts from 0.

    Args:
        patience_seconds: for how long the others are waited for.
        store_seconds: for how long a question to the store may take, here and later.

    Returns:
        The name, the store with that prefix, and of each process its ``host`` and ``node``.

    Raises:
        UserError: if not all processes arrive in time.
        PeerError: if another process has told of that.
    """
    global _met
    if _met is not None:
        return _met
    import torch.distributed as dist

    # Of those who wait for the main process, one on each node tells, and one beside it.
    speaks = is_main_process() or local_process_index() == 0 or process_index() == 1
    wait = _Wait(patience_seconds, speaks=speaks)
    try:
        store = _shared_store(wait, store_seconds)
        name, members = (_called if is_main_process() else _came)(store, wait)
    except RuntimeError as error:  # torch's own, in many lines: the store is gone
        raise wait.told_alone(
            f"the ranks have not met ({first_line(error)}): see the others' output"
        ) from None
    set_restart_count(max(member["restarts"] for member in members))
    _met = name, dist.PrefixStore(name, store), members
    return _met


def part() -> None:
    """At the end of a run that has succeeded: the main process leaves last, as the store may end with it.

    One that reads from a store that is gone would end as a failure. Every process calls this; only the main
    process waits.
    """
    if _met is None:
        return
    _, store, members = _met
    key, deadline = f"{_PREFIX}/parted", time.monotonic() + _PART_SECONDS
    with contextlib.suppress(RuntimeError):  # the store is gone: nobody waits
        parted = store.add(key, 1)
        while is_main_process() and parted < len(members) and time.monotonic() < deadline:
            time.sleep(_LOOK_SECONDS)
            parted = store.add(key, 0)


def _here() -> dict[str, Any]:
    return {"host": socket.gethostname(), "node": node_index(), "restarts": restart_count()}


def _called(store: Any, wait: _Wait) -> tuple[str, list[dict[str, Any]]]:
    """On the main process: the name, and what each process says of itself."""
    name = uuid.uuid4().hex
    try:
        members = [_here(), *_gathered(store, name, wait)]
    except UserError:
        store.set(f"{_PREFIX}/{name}/all", json.dumps(None))
        raise
    store.set(f"{_PREFIX}/{name}/all", json.dumps(members))
    return name, members


def _came(store: Any, wait: _Wait) -> tuple[str, list[dict[str, Any]]]:
    """On another process: the same."""
    mine = uuid.uuid4().hex
    store.set(f"{_PREFIX}/{process_index()}", mine)
    while not store.check([f"{_PREFIX}/answer/{mine}"]):
        wait.look_again([0])
    name = store.get(f"{_PREFIX}/answer/{mine}").decode()
    store.set(f"{_PREFIX}/{name}/{process_index()}", json.dumps(_here()))
    wait = wait.longer(_GRACE_SECONDS)
    while not store.check([f"{_PREFIX}/{name}/all"]):
        wait.look_again([0])
    members = json.loads(store.get(f"{_PREFIX}/{name}/all"))
    if members is None:
        raise PeerError(EXIT_USER_ERROR)
    return name, members


def _gathered(store: Any, mine: str, wait: _Wait) -> list[dict[str, Any]]:
    """What each other process says of itself, once all have answered by the name `mine`."""
    others = range(1, world_size())
    away = set(others)
    while away:
        for process in sorted(away):
            if store.check([f"{_PREFIX}/{process}"]):
                store.set(f"{_PREFIX}/answer/{store.get(f'{_PREFIX}/{process}').decode()}", mine)
            if store.check([f"{_PREFIX}/{mine}/{process}"]):
                away.remove(process)
        if away:
            wait.look_again(away)
    return [json.loads(store.get(f"{_PREFIX}/{mine}/{process}")) for process in others]


def _shared_store(wait: _Wait, store_seconds: float) -> dist.TCPStore:
    """torchrun's store; the main process makes one where torchrun has none."""
    import torch.distributed as dist

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and is_main_process():
        limit = datetime.timedelta(seconds=store_seconds)
        return dist.TCPStore(address, port, is_master=True, timeout=limit, wait_for_workers=False)
    while True:
        try:
            return agreement.connect(store_seconds)
        except OSError:
            pass
        try:
            wait.look_again([0], f" to {address}:{port}")
        except UserError as error:
            raise wait.told_alone(str(error)) from None
