"""How many CPU cores this process may use, and work that is done on one."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_GROUPS, _OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def usable_cores() -> int:
    """The cores of this process; fewer where a control group, such as a container's, limits its CPU time."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min([cores, *_limits()])))


@contextmanager
def on_one_core() -> Iterator[None]:
    """Within the block, what this thread asks of PyTorch is computed on it alone.

    For a thousand small tensors: an operation that is shared out waits until every core is free, which on a
    busy machine takes milliseconds.
    """
    import torch

    cores = torch.get_num_threads()
    torch.set_num_threads(1)
    # It also set what threads to come begin with, and keep; so one of them sets that back at once.
    other = threading.Thread(target=torch.set_num_threads, args=(cores,))
    other.start()
    other.join()
    try:
        yield
    finally:
        torch.set_num_threads(cores)


def _limits() -> Iterator[float]:
    """The limits of this process's control groups, in cores."""
    try:
        lines = _OWN.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        # A container may see its own group as the root, under its name outside.
        for group in (Path(path), *Path(path).parents):
            if not controllers:
                yield from _quota(_GROUPS / group.relative_to("/") / "cpu.max")
            elif "cpu" in controllers.split(","):
                yield from _quota_of_v1(_GROUPS / controllers / group.relative_to("/"))


def _quota(file: Path) -> Iterator[float]:
    try:
        quota, period = file.read_text(encoding="ascii").split()
        yield int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return  # "max", or no such group here


def _quota_of_v1(folder: Path) -> Iterator[float]:
    try:
        quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
    except (OSError, ValueError):
        return
    if quota > 0 and period > 0:
        yield quota / period
