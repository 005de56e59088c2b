"""When the user's command began, so that a run can report its whole wall time."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

# Set by the launcher for its workers: seconds since the epoch.
_VARIABLE = "FALCON_QLORA_BEGAN"


@contextlib.contextmanager
def told_to_workers() -> Iterator[None]:
    """Have processes that are started within the block count from the start of this one."""
    os.environ[_VARIABLE] = repr(_start_of(os.getpid()))
    try:
        yield
    finally:
        del os.environ[_VARIABLE]


def command_began(default: float) -> float:
    """Seconds since the epoch at which the command began.

    Args:
        default: for a call from Python, whose process may have done other things before.
    """
    told = os.environ.get(_VARIABLE)
    if told is not None:
        return min(float(told), default)
    # Under torchrun the command is its agent, this process's parent.
    return _start_of(os.getppid()) if "TORCHELASTIC_RUN_ID" in os.environ else default


def _start_of(process: int) -> float:
    """When a process was started; the current time if the system does not say."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
        ticks = int(stat.rpartition(")")[2].split()[19])
        since_boot = ticks / os.sysconf("SC_CLK_TCK")
        return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot)
    except (OSError, AttributeError, IndexError, ValueError):
        return time.time()
