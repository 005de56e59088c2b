"""When the command was typed that this process serves, so that a run can tell what it really took."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

# What the launcher tells its workers: seconds since the epoch.
_VARIABLE = "FALCON_QLORA_BEGAN"


@contextlib.contextmanager
def told_to_workers() -> Iterator[None]:
    """Have the processes that are started within the block count from the start of this one."""
    os.environ[_VARIABLE] = repr(_start_of(os.getpid()))
    try:
        yield
    finally:
        del os.environ[_VARIABLE]


def command_began(default: float) -> float:
    """Seconds since the epoch at which the command began.

    Args:
        default: for a function called in Python, whose process may have done other things before.
    """
    told = os.environ.get(_VARIABLE)
    if told is not None:
        return min(float(told), default)
    # Under torchrun its agent is what was typed.
    return _start_of(os.getppid()) if "TORCHELASTIC_RUN_ID" in os.environ else default


def _start_of(process: int) -> float:
    """When a process was started; now, where the system does not tell."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
        ticks = int(stat.rpartition(")")[2].split()[19])
        since_boot = ticks / os.sysconf("SC_CLK_TCK")
        return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot)
    except (OSError, AttributeError, IndexError, ValueError):
        return time.time()
