"""What the first minutes of a run go to: a line as each phase begins, and its seconds for the record."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.text import Text

from falcon_qlora.terminal.console import console

seconds: dict[str, float] = {}
"""Phase → its seconds, of the run that began last in this process."""


@contextmanager
def phase(name: str, doing: str | None = None) -> Iterator[None]:
    """Time what is done in the block.

    Args:
        name: of the phase, in the record.
        doing: what is said of it as it begins; None where it has been said.
    """
    if doing is not None:
        console().print(Text(f"{doing} …", style="dim"))
    begun = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] = time.perf_counter() - begun
