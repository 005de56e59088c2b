"""Phases of a run's start: a line as each begins, and its seconds for the record."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from falcon_qlora.terminal.console import say_doing

seconds: dict[str, float] = {}
"""Phase → its seconds, of the last run that began in this process."""

now = ""
"""The phase that has begun last."""


@contextmanager
def phase(name: str, doing: str | None = None) -> Iterator[None]:
    """Time the block as a phase.

    Args:
        name: the phase's name in the record.
        doing: what is printed as it begins; None if that was printed already.
    """
    if doing is not None:
        say_doing(doing)
    global now
    now = name.replace("_", " ")
    begun = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] = time.perf_counter() - begun
