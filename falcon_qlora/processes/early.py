"""Signals while a command's first modules are imported: one line instead of a traceback, or of silence.

    early.install()      # the package's first import
    early.give_back()    # whoever handles the signals from here on

Imports next to nothing. What happens in the 0.02 s before, while Python itself starts, only a shell can tell.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

_PACKAGE = "falcon_qlora"
_COMMANDS = (_PACKAGE, f"{_PACKAGE}.__main__")
# Signals that ask a run to stop; SIGUSR1 is how some schedulers announce preemption.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_defaults: dict[signal.Signals, Any] = {}


def install() -> None:
    """Handle the signals that would end this process, if it is one of the command line's.

    A rank ends without a word: its launcher tells. SIGTERM and SIGUSR1 end it even in native code.
    """
    module = _module()
    if module is None:
        return
    is_command = module in _COMMANDS
    for number in STOP_SIGNALS if is_command else (signal.SIGINT,):
        handler = signal.getsignal(number)
        if handler in (signal.SIG_DFL, signal.default_int_handler):
            _defaults[number] = handler
            signal.signal(number, tell_and_end if is_command else _end)


def give_back() -> None:
    """Make the signals' handlers what they were before `install`."""
    for number, handler in _defaults.items():
        if signal.getsignal(number) in (tell_and_end, _end):
            signal.signal(number, handler)
    _defaults.clear()


def words_for(number: int) -> str:
    """How a command says that this signal has ended it."""
    return f"ended by {signal.Signals(number).name} on {os.uname().nodename}"


def tell_and_end(number: int, frame: Any) -> None:
    """End this process by a signal, and say so. It does no more than it must: anything may be half done."""
    told = "interrupted" if number == signal.SIGINT else words_for(number)
    os.write(2, f"error: {told}\n".encode(errors="backslashreplace"))
    os._exit(128 + number)


def _end(number: int, frame: Any) -> None:
    os._exit(128 + number)


def _module() -> str | None:
    """The module of this package that this process was started to run; None for anybody else's program."""
    program = sys.argv[0] if sys.argv else ""
    if os.path.basename(program) == "falcon-qlora":
        return _PACKAGE
    if program != "-m":  # so it stays until Python has found the module, which imports its packages
        return None
    module = sys.orig_argv[-len(sys.argv)].removeprefix("-m")
    return module if module.split(".")[0] == _PACKAGE else None
