"""What the launcher starts as each process: the training module, tied to the launcher's life.

Torch's agent stops the workers when it ends in order. Where it cannot (it was killed, or Ctrl-C came
again while it waited for them), the kernel does.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys
import threading
from typing import Any

from falcon_qlora.processes import launcher

_PR_SET_PDEATHSIG = 1
_INTERRUPT_SECONDS = 5.0


def main() -> None:
    """Run the module named first, with the words that follow, as ``python -m`` would."""
    parent, module = int(sys.argv[1]), sys.argv[2]
    sys.argv[:] = sys.argv[2:]
    _end_with(parent)
    stopping = launcher.mark(launcher.STOPPING)
    if stopping is not None and stopping.exists():
        os._exit(128 + signal.SIGTERM)  # restarted by an agent that does not know that it is to stop
    signal.signal(signal.SIGINT, _interrupt)
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except KeyboardInterrupt:
        os._exit(128 + signal.SIGINT)


def _interrupt(number: int, frame: Any) -> None:
    """Raise KeyboardInterrupt, and end the process if that does not: Python ignores it in a `__del__`."""
    timer = threading.Timer(_INTERRUPT_SECONDS, os._exit, [128 + number])
    timer.daemon = True
    timer.start()
    raise KeyboardInterrupt


def _end_with(parent: int) -> None:
    """Have this process killed when the launcher ends. Linux only; elsewhere nothing is done."""
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


if __name__ == "__main__":
    main()
