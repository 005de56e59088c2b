"""A connection from the main process to each other one, by which the kernels tell that a process is gone.

A process that has ended closes its end. A machine that is gone leaves the kernel's probes unanswered. Neither
depends on how busy a process is, as signs of life do which one of its threads has to give.
"""

from __future__ import annotations

import contextlib
import os
import socket
from typing import Any

from falcon_qlora.processes import ranks

# Gone after 20 s without an answer: a link may be cut for a while.
_PROBES = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 3, "TCP_KEEPCNT": 5}
_CONNECT_SECONDS = 5.0
_DONE = b"."


class Lines:
    """This process's ends of the lines.

    Args:
        store: in which the main process leaves its port for the others; they wait for it.

    Raises:
        OSError: if the main process cannot be reached.
    """

    def __init__(self, store: Any):
        self._server: socket.socket | None = None
        self._lines: dict[int, socket.socket] = {}
        if ranks.is_main_process():
            try:
                self._server = socket.create_server(("", 0), backlog=ranks.world_size())
            finally:
                store.set("line", str(self._server.getsockname()[1] if self._server else 0))
            self._server.setblocking(False)
        else:
            place = os.environ["MASTER_ADDR"], int(store.get("line"))
            line = socket.create_connection(place, _CONNECT_SECONDS)
            line.sendall(ranks.process_index().to_bytes(4, "big"))
            self._lines[0] = _probed(line)

    def lost(self) -> list[int]:
        """The ranks whose line has ended without `end`."""
        self._accept()
        gone = []
        for rank, line in list(self._lines.items()):
            try:
                said = line.recv(1)
            except BlockingIOError:
                continue
            except OSError:
                said = b""
            if said == _DONE:
                del self._lines[rank]
            else:
                gone.append(rank)
        return gone

    def end(self) -> None:
        """From here on this process may end."""
        for line in list(self._lines.values()):
            with contextlib.suppress(OSError):
                line.sendall(_DONE)

    def _accept(self) -> None:
        while self._server is not None:
            try:
                line, _ = self._server.accept()
                line.settimeout(_CONNECT_SECONDS)
                rank = int.from_bytes(line.recv(4, socket.MSG_WAITALL), "big")
            except BlockingIOError:
                return
            except OSError:
                continue
            if 0 < rank < ranks.world_size():
                self._lines[rank] = _probed(line)


def _probed(line: socket.socket) -> socket.socket:
    line.setblocking(False)
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _PROBES.items():
        if hasattr(socket, name):
            line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return line
