"""When the user's command began, and what it was, for what a run reports of itself."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

# Set by the launcher for its workers: seconds since the epoch.
_VARIABLE = "FALCON_QLORA_BEGAN"
_COMMAND = "FALCON_QLORA_COMMAND"  # its words, as JSON


@contextlib.contextmanager
def told_to_workers(words: Sequence[str]) -> Iterator[None]:
    """Have processes that are started within the block count from the start of this one.

    Args:
        words: of the command, for `command_words`.
    """
    told = {_VARIABLE: repr(_start_of(os.getpid())), _COMMAND: json.dumps(list(words))}
    os.environ.update(told)
    try:
        yield
    finally:
        for name in told:
            del os.environ[name]


def command_words() -> list[str]:
    """The words of the user's command: the launcher's, else torchrun's, else this process's own."""
    if (told := os.environ.get(_COMMAND)) is not None:
        return [str(word) for word in json.loads(told)]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().split(b"\0")
            return list(map(os.fsdecode, filter(None, words)))
    return list(sys.argv)


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
