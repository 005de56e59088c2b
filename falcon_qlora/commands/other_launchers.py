"""What launchers tell each other: that a rank has died before the ranks of all nodes have met.

From then on the ranks see each other (`processes.lookout`). Before, only the launcher sees its own. The
channel is the store of torchrun's agents, at the endpoint where they meet.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from falcon_qlora.processes import agreement, launcher

_LOOK_SECONDS = 1.0
_STORE_SECONDS = 5.0
# How long the others may take to hear of it: the store may be this launcher's.
_HEAR_SECONDS = 10.0
_tells = threading.Event()  # this one


def watch(launch_config: Any, folder: Path, leave: Callable[[str], None]) -> None:
    """Look on a thread whether a rank of another node has died, until training begins.

    Args:
        launch_config: torchrun's.
        folder: of the launcher.
        leave: ends this process and its workers with an error, once.
    """
    if launch_config.rdzv_backend == "c10d":
        threading.Thread(target=_look, args=[launch_config, folder, leave], daemon=True).start()


def tell(launch_config: Any, folder: Path, text: str) -> None:
    """Tell the others that a rank has died here, unless it or another has told them."""
    if launch_config.rdzv_backend != "c10d" or (folder / launcher.TOLD).exists() or _trains(folder):
        return
    _tells.set()
    with contextlib.suppress(Exception):  # then they are as they were without
        store, deadline = _store(launch_config), time.monotonic() + _HEAR_SECONDS
        store.set(_key(launch_config), text)
        while store.add(f"{_key(launch_config)}/heard", 0) < launch_config.max_nodes - 1:
            if time.monotonic() > deadline:
                break
            time.sleep(_LOOK_SECONDS / 5)


def _look(launch_config: Any, folder: Path, leave: Callable[[str], None]) -> None:
    store = None
    while folder.exists() and not _trains(folder) and not _tells.is_set():
        time.sleep(_LOOK_SECONDS)
        try:
            store = store or _store(launch_config)
            if not _tells.is_set() and store.check([_key(launch_config)]) and not _trains(folder):
                told = store.get(_key(launch_config)).decode()
                store.add(f"{_key(launch_config)}/heard", 1)
                leave(told)
                return
        except Exception:
            store = None


def _trains(folder: Path) -> bool:
    return (folder / launcher.TRAINING).exists()


def _key(launch_config: Any) -> str:
    return f"falcon_qlora/{launch_config.run_id}/died"


def _store(launch_config: Any) -> Any:
    host, _, port = launch_config.rdzv_endpoint.rpartition(":")
    return agreement.connect(_STORE_SECONDS, place=(host.strip("[]"), int(port)))
