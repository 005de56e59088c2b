"""The process that the launcher starts: it runs the training module and dies with the launcher.

A command that starts others, such as `compare`, starts them so too.

Torch's agent stops the workers when it exits normally. If it cannot (it was killed, or Ctrl-C came again
while it waited for them), the operating system's kernel does.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import runpy
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from falcon_qlora.processes import launcher

_PR_SET_PDEATHSIG = 1
_INTERRUPT_SECONDS = 5.0
_OOM_SCORE = 100  # thousandths of the memory there is
# Python's default is ten times longer. So long a thread that gave up the interpreter for one operation of
# PyTorch's waits until another gives it back, and checks of a save make thousands beside the training.
_TURN_SECONDS = 5e-4


def main() -> None:
    """Run the named module with the arguments after its name, as ``python -m`` would."""
    parent, module = int(sys.argv[1]), sys.argv[2]
    sys.argv[:] = sys.argv[2:]
    _end_with(parent)
    stopping = launcher.mark(launcher.STOPPING)
    if stopping is not None and stopping.exists():
        os._exit(128 + signal.SIGTERM)  # restarted by an agent that was not told to stop
    signal.signal(signal.SIGINT, _interrupt)
    sys.setswitchinterval(_TURN_SECONDS)
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except KeyboardInterrupt:
        os._exit(128 + signal.SIGINT)


def _interrupt(number: int, frame: Any) -> None:
    """Raise KeyboardInterrupt; exit if that has no effect, as Python ignores it in a `__del__`."""
    timer = threading.Timer(_INTERRUPT_SECONDS, os._exit, [128 + number])
    timer.daemon = True
    timer.start()
    raise KeyboardInterrupt


def _end_with(parent: int) -> None:
    """Have the kernel kill this process when the launcher ends; on Linux only."""
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    # Where memory runs out the kernel is to kill this process and not the launcher, which tells of it.
    likely = Path("/proc/self/oom_score_adj")
    with contextlib.suppress(OSError, ValueError):
        likely.write_text(str(min(1000, int(likely.read_text()) + _OOM_SCORE)), encoding="ascii")


if __name__ == "__main__":
    main()
